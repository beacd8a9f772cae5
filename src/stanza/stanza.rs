//! One stanza: its exact bytes, and where in them the addressing is.

use std::borrow::Cow;

use bytes::Bytes;

/// RFC 6120 §8.2
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Kind {
    Message,
    Presence,
    Iq,
}

/// A stanza as it came: a single well-formed element in `jabber:server` without a prefix.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Stanza {
    bytes: Bytes,
    kind: Kind,
}

impl Stanza {
    /// Finds the addressing in an element that [`crate::codec::xml`] has let through.
    pub fn parse(bytes: Bytes) -> Result<Self, StanzaError> {
        let _ = bytes;
        todo!()
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The `type` attribute, unescaped.
    pub fn stanza_type(&self) -> Option<Cow<'_, str>> {
        todo!()
    }

    pub fn id(&self) -> Option<Cow<'_, str>> {
        todo!()
    }

    pub fn from(&self) -> Option<Cow<'_, str>> {
        todo!()
    }

    pub fn to(&self) -> Option<Cow<'_, str>> {
        todo!()
    }

    /// Cuts the `to` attribute out: the bytes without it (nor the white space before it), the offset where it stood, and the
    /// attribute exactly as written (white space, name, quotes and escapes), so that joining them again is byte-exact.
    pub fn split_to(&self) -> Option<(Bytes, usize, Bytes)> {
        todo!()
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum StanzaError {
    /// Neither `message` nor `presence` nor `iq`.
    #[error("not a stanza")]
    NotAStanza,
    #[error("the element cannot be read")]
    Malformed,
}
