//! What one durable queue slot holds.
//!
//! An entry is self-contained: no table or context is needed to read it back, in any later version.
//!
//! ```text
//! version=1  kind=0                                                   void
//! version=1  kind=1  to_at  template_len  count  (len attribute)×count  template
//! ```
//! Numbers are varints. The template stands last, so that it can be used where it lies.

use bytes::Bytes;

use crate::codec::varint::{ReadError, Reader, len_bytes, put_len, put_prefixed, slice_of};

/// Encoded bytes of one entry. Debian's ejabberd and Prosody take stanzas of up to 512 KiB; the rest is for recipients.
pub const ENTRY_BYTES_MAX: usize = 1 << 20;

/// Three JID parts of 1,023 bytes (RFC 7622 §3.1), each byte written as `&#x..;` at worst, and ` to=''`.
pub const RECIPIENT_BYTES_MAX: usize = 3 * 1023 * 6 + 64;

const VERSION: u8 = 1;
const KIND_VOID: u8 = 0;
const KIND_CAST: u8 = 1;

/// One stanza for one or many recipients of one domain.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Cast {
    /// The stanza without its `to` attribute.
    pub template: Bytes,
    /// Where the attribute goes.
    pub to_at: u32,
    /// The attribute for each recipient, exactly as the server wrote it (white space, quotes and escapes), e.g. ` to='b1@b.example/r'`.
    /// Never empty, no repetition, in ascending order.
    pub recipients: Vec<Bytes>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Entry {
    Cast(Cast),
    /// An entry that was given up before it crossed. It keeps the numbering dense.
    Void,
}

impl Cast {
    /// The length before each address: below 2^32, so five bytes at most.
    pub const RECIPIENT_BESIDE: usize = 5;

    /// The stanza for the k-th recipient, byte for byte as it came. `None` if there are not as many.
    pub fn copy(&self, k: usize) -> Option<Bytes> {
        let attribute = self.recipients.get(k)?;
        let (before, after) = self.template.split_at_checked(self.to_at as usize)?;
        let mut copy = Vec::with_capacity(self.template.len() + attribute.len());
        copy.extend_from_slice(before);
        copy.extend_from_slice(attribute);
        copy.extend_from_slice(after);
        Some(copy.into())
    }

    /// Whether this can be encoded and read back.
    pub fn check(&self) -> Result<(), EntryError> {
        if self.to_at as usize > self.template.len() {
            return Err(EntryError::ToOutside);
        }
        check_recipients(&self.recipients)?;
        let encoded = self.encoded_bytes();
        if encoded > ENTRY_BYTES_MAX {
            Err(EntryError::TooLarge(encoded))
        } else {
            Ok(())
        }
    }

    /// An upper bound of the encoded size, without encoding.
    pub fn encoded_bytes(&self) -> usize {
        let attributes = self.recipients.iter().map(Bytes::len).sum();
        Self::encoded_bytes_of(&self.template, self.recipients.len(), attributes)
    }

    /// The same for so many recipients whose attributes take so many bytes together.
    pub fn encoded_bytes_of(template: &[u8], recipients: usize, attributes: usize) -> usize {
        // Version, kind and three numbers of at most five bytes (all are below 2^32).
        17 + template.len() + recipients * Self::RECIPIENT_BESIDE + attributes
    }
}

impl Entry {
    /// What [`Entry::encode`] makes, to the byte, without making it.
    pub fn encoded_bytes(&self) -> usize {
        let cast = match self {
            Self::Void => return 2,
            Self::Cast(cast) => cast,
        };
        let attributes = cast
            .recipients
            .iter()
            .map(|attribute| len_bytes(attribute.len()) + attribute.len());
        let numbers = [cast.to_at as usize, cast.template.len(), cast.recipients.len()];
        2 + numbers.into_iter().map(len_bytes).sum::<usize>() + attributes.sum::<usize>() + cast.template.len()
    }

    /// What [`Entry::decode`] reads. Invariants are the caller's to keep, [`Cast::check`] tells.
    pub fn encode(&self) -> Bytes {
        let cast = match self {
            Self::Void => return Bytes::from_static(&[VERSION, KIND_VOID]),
            Self::Cast(cast) => cast,
        };
        let mut out = Vec::with_capacity(cast.encoded_bytes());
        out.extend_from_slice(&[VERSION, KIND_CAST]);
        put_len(&mut out, cast.to_at as usize);
        put_len(&mut out, cast.template.len());
        put_len(&mut out, cast.recipients.len());
        for attribute in &cast.recipients {
            put_prefixed(&mut out, attribute);
        }
        out.extend_from_slice(&cast.template);
        out.into()
    }

    /// Reads an entry. Template and recipients share the memory of `bytes`.
    pub fn decode(bytes: &Bytes) -> Result<Self, EntryError> {
        if bytes.len() > ENTRY_BYTES_MAX {
            return Err(EntryError::TooLarge(bytes.len()));
        }
        let mut reader = Reader::new(bytes);
        let version = reader.byte()?;
        if version != VERSION {
            return Err(EntryError::UnknownVersion(version));
        }
        match reader.byte()? {
            KIND_VOID => {
                reader.finish()?;
                Ok(Self::Void)
            }
            KIND_CAST => {
                let to_at = reader.len_upto(ENTRY_BYTES_MAX)?;
                let template_len = reader.len_upto(ENTRY_BYTES_MAX)?;
                // Each recipient takes two bytes at least, so a lie about the count costs no memory.
                let count = reader.len_upto(reader.remaining() / 2)?;
                let mut recipients = Vec::with_capacity(count);
                for _ in 0..count {
                    recipients.push(slice_of(bytes, reader.prefixed(RECIPIENT_BYTES_MAX)?));
                }
                let template = slice_of(bytes, reader.take(template_len)?);
                reader.finish()?;
                if to_at > template.len() {
                    return Err(EntryError::ToOutside);
                }
                check_recipients(&recipients)?;
                Ok(Self::Cast(Cast {
                    template,
                    to_at: to_at as u32,
                    recipients,
                }))
            }
            kind => Err(EntryError::UnknownKind(kind)),
        }
    }
}

/// Not empty, ascending, distinct, each of a length that can be.
pub fn check_recipients(recipients: &[Bytes]) -> Result<(), EntryError> {
    if recipients.is_empty() {
        return Err(EntryError::NoRecipient);
    }
    if recipients
        .iter()
        .any(|attribute| attribute.is_empty() || attribute.len() > RECIPIENT_BYTES_MAX)
    {
        return Err(EntryError::BadRecipient);
    }
    if recipients.windows(2).any(|pair| pair[0] >= pair[1]) {
        return Err(EntryError::NotAscending);
    }
    Ok(())
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum EntryError {
    #[error("entry of version {0}, which this narrows does not know")]
    UnknownVersion(u8),
    #[error("entry of kind {0}, which this narrows does not know")]
    UnknownKind(u8),
    #[error("an entry of {0} bytes")]
    TooLarge(usize),
    #[error("a cast without recipients")]
    NoRecipient,
    #[error("a recipient that is empty or too long")]
    BadRecipient,
    #[error("recipients not in ascending order")]
    NotAscending,
    #[error("the place of the address lies outside the template")]
    ToOutside,
    #[error(transparent)]
    Read(#[from] ReadError),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cast(template: &str, to_at: u32, recipients: &[&str]) -> Cast {
        Cast {
            template: Bytes::copy_from_slice(template.as_bytes()),
            to_at,
            recipients: recipients
                .iter()
                .map(|attribute| Bytes::copy_from_slice(attribute.as_bytes()))
                .collect(),
        }
    }

    proptest! {
        /// Every valid entry comes back as it was.
        #[test]
        fn entries_round_trip(
            template in proptest::collection::vec(any::<u8>(), 0..300),
            at in any::<prop::sample::Index>(),
            recipients in proptest::collection::btree_set(proptest::collection::vec(any::<u8>(), 1..40), 1..20),
        ) {
            let to_at = at.index(template.len() + 1) as u32;
            let recipients = recipients.into_iter().map(Bytes::from).collect();
            let entry = Entry::Cast(Cast { template: template.into(), to_at, recipients });
            let encoded = entry.encode();
            prop_assert_eq!(entry.encoded_bytes(), encoded.len());
            prop_assert_eq!(Entry::decode(&encoded), Ok(entry));
        }

        /// No bytes make the decoder panic, and what it accepts it would write the same.
        #[test]
        fn any_bytes_are_safe(bytes in proptest::collection::vec(0u8..9, 0..40)) {
            let bytes = Bytes::from(bytes);
            if let Ok(entry) = Entry::decode(&bytes) {
                prop_assert_eq!(entry.encode(), bytes);
            }
        }
    }

    /// A copy is the stanza as the server wrote it.
    #[test]
    fn copy_joins_the_address_into_the_template() {
        let cast = cast(
            "<message from='a@a.example'/>",
            8,
            &[" to='b@b.example'", " to=\"c@b.example\""],
        );
        assert_eq!(
            cast.copy(1).unwrap(),
            "<message to=\"c@b.example\" from='a@a.example'/>"
        );
        assert_eq!(cast.copy(2), None);
    }

    /// A template is not copied when an entry is read: it lies in the bytes given.
    #[test]
    fn decoding_shares_memory() {
        let encoded = Entry::Cast(cast("<message/>", 8, &[" to='b'"])).encode();
        let Ok(Entry::Cast(cast)) = Entry::decode(&encoded) else {
            panic!("not a cast")
        };
        assert!(encoded.as_ptr_range().contains(&cast.template.as_ptr()));
    }

    /// Each invariant has its own refusal.
    #[test]
    fn refuses_what_breaks_an_invariant() {
        let refused = |cast: Cast| Entry::decode(&Entry::Cast(cast).encode()).unwrap_err();
        assert_eq!(refused(cast("<a/>", 2, &[])), EntryError::NoRecipient);
        assert_eq!(refused(cast("<a/>", 2, &["b", "a"])), EntryError::NotAscending);
        assert_eq!(refused(cast("<a/>", 2, &["a", "a"])), EntryError::NotAscending);
        assert_eq!(refused(cast("<a/>", 5, &["a"])), EntryError::ToOutside);
        assert_eq!(
            Entry::decode(&Bytes::from_static(&[2, 0])),
            Err(EntryError::UnknownVersion(2))
        );
        assert_eq!(
            Entry::decode(&Bytes::from_static(&[1, 7])),
            Err(EntryError::UnknownKind(7))
        );
        assert_eq!(
            Entry::decode(&Bytes::from_static(&[1, 0, 0])),
            Err(ReadError::Trailing(1).into())
        );
    }
}
