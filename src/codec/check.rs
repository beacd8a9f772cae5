//! The strict look at a stanza that did not come off a server's stream.
//!
//! Servers close a stream on one byte that they do not like, and two parsers that disagree about a stanza are a hole. So what
//! the peer sends is held to what [`super::xml`] lets through from a server.

use bytes::Bytes;

use super::xml::{Limits, StreamItem, StreamReader, XmlError};
use crate::stanza::{Stanza, ns};

const HEADER: &[u8] =
    b"<stream:stream xmlns='jabber:server' xmlns:stream='http://etherx.jabber.org/streams' version='1.0'>";

/// Reads `bytes` as exactly one self-contained stanza.
pub fn stanza(bytes: &Bytes) -> Result<Stanza, XmlError> {
    let mut reader = StreamReader::new(Limits::AFTER_AUTHENTICATION);
    reader.push(HEADER);
    let Some(StreamItem::Header(_)) = reader.poll_item()? else {
        return Err(XmlError::NotWellFormed);
    };
    reader.push(bytes);
    match reader.poll_item()? {
        // Equal bytes: nothing stands before or behind it, and nothing had to be declared.
        Some(StreamItem::Element(element)) if element.namespace == ns::SERVER && element.bytes == *bytes => {
            Stanza::parse(element.bytes).map_err(|_| XmlError::NotWellFormed)
        }
        Some(StreamItem::Element(_) | StreamItem::Header(_) | StreamItem::Close) | None => Err(XmlError::NotWellFormed),
    }
}

/// The address in a `to` attribute as [`Stanza::split_to`] cuts it out.
pub fn to_attribute(attribute: &[u8]) -> Result<String, XmlError> {
    let bytes: Bytes = [b"<message".as_slice(), attribute, b"/>"].concat().into();
    let stanza = stanza(&bytes)?;
    match stanza.split_to() {
        // Nothing but the one attribute.
        Some((rest, _, cut)) if rest.as_ref() == b"<message/>" && cut == attribute => {
            stanza.to().map(|to| to.into_owned()).ok_or(XmlError::NotWellFormed)
        }
        Some(_) | None => Err(XmlError::NotWellFormed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(text: &str) -> Bytes {
        Bytes::copy_from_slice(text.as_bytes())
    }

    /// One stanza, nothing around it, nothing that a server would not have been allowed to send.
    #[test]
    fn takes_one_stanza_and_nothing_else() {
        assert!(stanza(&bytes("<message from='a@a.example' to='b@b.example'/>")).is_ok());
        for bad in [
            "",
            "<message",
            "<message/><message/>",
            " <message/>",
            "<message/> ",
            "<iq/>x",
            "</stream:stream>",
            "<features/>",
            "<message><!-- x --></message>",
            "<stream:error/>",
            "<message><stream:error/></message>",
        ] {
            assert!(stanza(&bytes(bad)).is_err(), "{bad}");
        }
    }

    /// An attribute from the peer cannot smuggle a second attribute or an element in.
    #[test]
    fn takes_one_to_attribute_and_nothing_else() {
        assert_eq!(
            to_attribute(b" to='b@b.example/O&apos;Neill'").unwrap(),
            "b@b.example/O'Neill"
        );
        assert_eq!(to_attribute(b"\n\tto=\"b@b.example\"").unwrap(), "b@b.example");
        for bad in [
            "",
            " to='b@b.example",
            "to='b@b.example'",
            " to='b@b.example' from='x'",
            " from='x' to='b@b.example'",
            " to='b'><body/></message><message to='c'",
            " to='b' ",
            " too='b'",
        ] {
            assert!(to_attribute(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
