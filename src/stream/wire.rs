//! What both kinds of stream write, and the few things that both read the same way.

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::CloseReason;
use crate::{
    codec::xml::{Element, Node},
    stanza::{Domain, escape_attribute, escape_text, ns},
};

/// XML being written: attribute values and text are escaped, everything else is ours.
#[derive(Debug, Default)]
pub(super) struct Markup(String);

impl Markup {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn raw(&mut self, markup: &str) {
        self.0.push_str(markup);
    }

    /// `<name`, for attributes to follow.
    pub fn open(&mut self, name: &str) {
        self.0.push('<');
        self.0.push_str(name);
    }

    pub fn attribute(&mut self, name: &str, value: &str) {
        self.0.push(' ');
        self.0.push_str(name);
        self.0.push_str("='");
        self.0.push_str(&escape_attribute(value));
        self.0.push('\'');
    }

    pub fn close_start(&mut self) {
        self.0.push('>');
    }

    pub fn close_empty(&mut self) {
        self.0.push_str("/>");
    }

    pub fn end(&mut self, name: &str) {
        self.0.push_str("</");
        self.0.push_str(name);
        self.0.push('>');
    }

    /// `<name xmlns='namespace'/>`
    pub fn empty(&mut self, name: &str, namespace: &str) {
        self.open(name);
        self.attribute("xmlns", namespace);
        self.close_empty();
    }

    pub fn text(&mut self, text: &str) {
        self.0.push_str(&escape_text(text));
    }
}

impl From<Markup> for Bytes {
    fn from(markup: Markup) -> Self {
        markup.0.into()
    }
}

/// The declaration and the header that every stream of ours begins with (RFC 6120 §4.7).
///
/// No `xml:lang`: a server may copy it to stanzas that have none, and they would not be the stanzas that were sent.
pub(super) fn header(from: Option<&Domain>, to: Option<&Domain>, id: Option<&str>) -> Markup {
    let mut header = Markup::new();
    header.raw("<?xml version='1.0'?>");
    header.open("stream:stream");
    header.attribute("xmlns", ns::SERVER);
    header.attribute("xmlns:stream", ns::STREAM);
    // XEP-0220 §2.4.1: the declaration says that we speak dialback.
    header.attribute("xmlns:db", ns::DIALBACK);
    if let Some(from) = from {
        header.attribute("from", from.as_str());
    }
    if let Some(to) = to {
        header.attribute("to", to.as_str());
    }
    if let Some(id) = id {
        header.attribute("id", id);
    }
    header.attribute("version", "1.0");
    header.close_start();
    header
}

/// RFC 6120 §4.9, with the closing tag that must follow it.
pub(super) fn stream_error(condition: &str, why: &str, particular: Option<Markup>) -> Markup {
    let mut error = Markup::new();
    error.raw("<stream:error>");
    error.empty(condition, ns::STREAM_ERRORS);
    error.open("text");
    error.attribute("xmlns", ns::STREAM_ERRORS);
    error.attribute("xml:lang", "en");
    error.close_start();
    error.text(why);
    error.end("text");
    if let Some(particular) = particular {
        error.raw(&particular.0);
    }
    error.end("stream:error");
    error.raw(CLOSE);
    error
}

/// The server's stream error, for the log.
pub(super) fn read_stream_error(element: &Element) -> CloseReason {
    let node = element.node();
    let of_error = |child: &&Node| child.namespace == ns::STREAM_ERRORS;
    let condition = node.children.iter().filter(of_error).find(|child| child.name != "text");
    let text = node.children.iter().filter(of_error).find(|child| child.name == "text");
    CloseReason::ServerError {
        condition: shown(condition.map_or("undefined-condition", |condition| &condition.name)),
        text: shown(text.map_or("", |text| &text.text)),
    }
}

/// Text of the server's as it may appear in a log line.
pub(super) fn shown(text: &str) -> String {
    text.chars()
        .map(|char| if char.is_control() { ' ' } else { char })
        .take(SHOWN_CHARS_MAX)
        .collect()
}

/// RFC 6120 §4.7.5: the servers that we stand beside speak 1.0; earlier streams had neither features nor TLS.
pub(super) fn is_version_1(version: Option<&str>) -> bool {
    version
        .and_then(|version| version.split_once('.'))
        .and_then(|(major, _)| major.parse::<u32>().ok())
        .is_some_and(|major| major >= 1)
}

/// XEP-0198 §4: "the value of 'h' shall be reset from 2^32-1 back to zero".
pub(super) fn handled_count(element: &Element) -> Option<u32> {
    element.node().attribute("h")?.parse().ok()
}

pub(super) fn ack(h: u32) -> Markup {
    let mut ack = Markup::new();
    ack.open("a");
    ack.attribute("xmlns", ns::MANAGEMENT);
    ack.attribute("h", &h.to_string());
    ack.close_empty();
    ack
}

/// RFC 6120 §6.4.2: base64, with `=` for what is there but empty.
pub(super) fn encode_authzid(domain: &Domain) -> String {
    BASE64.encode(domain.as_str())
}

/// `None` for what is not base64 of UTF-8.
pub(super) fn decode_authzid(text: &str) -> Option<String> {
    match text {
        "=" => Some(String::new()),
        text => BASE64.decode(text).ok().and_then(|bytes| String::from_utf8(bytes).ok()),
    }
}

/// Stream ids that cannot be guessed (RFC 6120 §4.7.3), from a seed that is the connection's own.
#[derive(Debug)]
pub(super) struct StreamIds {
    seed: [u8; 32],
    given: u64,
}

impl StreamIds {
    pub fn new(seed: [u8; 32]) -> Self {
        Self { seed, given: 0 }
    }

    pub fn next(&mut self) -> String {
        self.given += 1;
        let digest = Sha256::new()
            .chain_update(self.seed)
            .chain_update(self.given.to_be_bytes())
            .finalize();
        // 128 bits, as much as a UUID.
        digest[..16].iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

pub(super) const CLOSE: &str = "</stream:stream>";

/// A sentence; it is shown to people.
const SHOWN_CHARS_MAX: usize = 200;

#[cfg(test)]
mod tests {
    use super::*;

    /// What is put into an attribute comes out of a parser unchanged: no value ends its quotes or begins a tag.
    #[test]
    fn escapes_what_a_parser_would_change() {
        let mut markup = Markup::new();
        markup.open("x");
        markup.attribute("id", "a'b\"<&>\n\t\r");
        markup.close_empty();
        assert_eq!(markup.0, "<x id='a&apos;b&quot;&lt;&amp;&gt;&#10;&#9;&#13;'/>");
    }

    /// What a server says about an error is shown, but cannot forge or flood a log.
    #[test]
    fn shown_text_is_short_and_plain() {
        assert_eq!(shown("Idle\nconnection\u{1b}[0m"), "Idle connection [0m");
        assert_eq!(shown(&"ö".repeat(10_000)).chars().count(), SHOWN_CHARS_MAX);
    }

    /// No two streams of a connection share an id, nor two connections with other seeds.
    #[test]
    fn stream_ids_differ() {
        let (mut one, mut other) = (StreamIds::new([1; 32]), StreamIds::new([2; 32]));
        let ids = [one.next(), one.next(), other.next(), other.next()];
        let distinct: std::collections::BTreeSet<_> = ids.iter().collect();
        assert_eq!(distinct.len(), ids.len());
        assert!(ids.iter().all(|id| id.len() == 32));
    }

    /// RFC 6120 §4.7.5: a missing version is 0.9.
    #[test]
    fn versions() {
        assert!(is_version_1(Some("1.0")));
        assert!(is_version_1(Some("1.2")));
        assert!(is_version_1(Some("2.0")));
        for old in [None, Some(""), Some("0.9"), Some("1"), Some("-1.0"), Some("x.y")] {
            assert!(!is_version_1(old), "{old:?}");
        }
    }

    /// RFC 6120 §6.4.2: `=` is an empty identity; what is not base64 of UTF-8 is none.
    #[test]
    fn authorization_identities() {
        assert_eq!(decode_authzid("=").as_deref(), Some(""));
        assert_eq!(decode_authzid("c2hpcC5leGFtcGxl").as_deref(), Some("ship.example"));
        assert_eq!(decode_authzid("/w=="), None);
        assert_eq!(decode_authzid("ship.example"), None);
        assert_eq!(
            encode_authzid(&Domain::new("ship.example").unwrap()),
            "c2hpcC5leGFtcGxl"
        );
    }
}
