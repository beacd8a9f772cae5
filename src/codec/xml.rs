//! Strict framing of XML streams. (Being written.)

use bytes::Bytes;

/// What one stream may cost us. Two sets are in use: before and after authentication.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of one top-level element, and of the stream header.
    pub stanza_bytes_max: usize,
    /// Open elements below the stream root.
    pub depth_max: usize,
    /// Attributes and namespace declarations of one element.
    pub attributes_max: usize,
    /// Elements in one top-level element.
    pub elements_max: usize,
}

/// What comes off a stream, in order.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum StreamItem {
    Header(StreamHeader),
    Element(Element),
    /// `</stream:stream>`
    Close,
}

/// RFC 6120 §4.7
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct StreamHeader {
    pub from: Option<String>,
    pub to: Option<String>,
    pub id: Option<String>,
    pub version: Option<String>,
    /// Whether the `db` dialback namespace was declared (XEP-0220 §2.1.1).
    pub dialback: bool,
}

/// One complete top-level element, self-contained: prefixes bound only on the stream header are declared on it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Element {
    pub namespace: String,
    pub name: String,
    pub bytes: Bytes,
}

/// A parsed element, for negotiation: small things that are looked into, never forwarded.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Node {
    pub namespace: String,
    pub name: String,
    pub attributes: Vec<(String, String)>,
    pub text: String,
    pub children: Vec<Node>,
}

/// Takes a stream's bytes in any chunks and gives its elements.
#[derive(Debug)]
pub struct StreamReader {}

impl StreamReader {
    pub fn new(limits: Limits) -> Self {
        let _ = limits;
        todo!()
    }

    /// From the next top-level element on.
    pub fn set_limits(&mut self, limits: Limits) {
        let _ = limits;
    }

    pub fn push(&mut self, bytes: &[u8]) {
        let _ = bytes;
    }

    /// The next item, or `None` until more bytes are pushed. After an error the reader stays failed.
    pub fn poll_item(&mut self) -> Result<Option<StreamItem>, XmlError> {
        todo!()
    }
}

impl Element {
    pub fn node(&self) -> Node {
        todo!()
    }
}

impl Node {
    pub fn attribute(&self, name: &str) -> Option<&str> {
        let _ = name;
        todo!()
    }

    pub fn child(&self, namespace: &str, name: &str) -> Option<&Node> {
        let _ = (namespace, name);
        todo!()
    }
}

/// Why a stream cannot go on, by its stream error (RFC 6120 §4.9.3).
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum XmlError {
    #[error("not well-formed XML")]
    NotWellFormed,
    #[error("a comment, processing instruction, DTD or entity reference")]
    Restricted,
    #[error("{0} over its limit")]
    OverLimit(&'static str),
    #[error("not a stream header")]
    BadHeader,
    #[error("text between stanzas")]
    BadFormat,
}

impl XmlError {
    /// The defined condition: `not-well-formed`, `restricted-xml`, `policy-violation`, `invalid-namespace`, `bad-format`,
    /// `bad-namespace-prefix`, `unsupported-encoding`, …
    pub fn condition(&self) -> &'static str {
        todo!()
    }
}
