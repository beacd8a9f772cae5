//! Dialback (XEP-0220): its keys, and what both kinds of stream do with its elements.
//!
//! Keys are made as [XEP-0185] recommends. Nothing is remembered: whichever of our streams is asked can answer for any
//! other, also after a restart of the connection that the question came on.
//!
//! [XEP-0185]: https://xmpp.org/extensions/xep-0185.html

use std::fmt::{self, Write as _};

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::{Verdict, wire::Markup};
use crate::{
    codec::xml::Node,
    stanza::{Domain, ns},
};

/// The secret that keys are made from. It never leaves the process.
#[derive(Clone)]
pub struct Secret {
    /// XEP-0185 §2: "The output of the SHA256 hashing algorithm MUST be provided in the hexadecimal representation".
    hashed: String,
}

impl Secret {
    pub fn new(bytes: [u8; 32]) -> Self {
        Self::from_text(&bytes)
    }

    fn from_text(secret: &[u8]) -> Self {
        Self {
            hashed: hex(&Sha256::digest(secret)),
        }
    }

    /// The key that proves us to be `originating` on the stream that `receiving` gave this id.
    ///
    /// `None` for a stream id that no server gives. The fields are separated by single spaces and must not be
    /// confusable (CVE-2016-0756): a prepared domain holds none, and the id comes last and holds none either.
    pub fn key(&self, receiving: &Domain, originating: &Domain, stream_id: &str) -> Option<String> {
        let separable = [receiving.as_str(), originating.as_str(), stream_id]
            .iter()
            .all(|field| {
                !field.is_empty() && !field.contains(char::is_whitespace) && !field.contains(char::is_control)
            });
        if !separable || stream_id.len() > STREAM_ID_BYTES_MAX {
            return None;
        }
        let mut mac = Hmac::<Sha256>::new_from_slice(self.hashed.as_bytes()).expect("HMAC takes keys of any length");
        mac.update(format!("{receiving} {originating} {stream_id}").as_bytes());
        Some(hex(&mac.finalize().into_bytes()))
    }

    /// Whether `key` is the one that [`key`](Self::key) makes. Takes the same time wherever the two differ.
    pub fn verify(&self, receiving: &Domain, originating: &Domain, stream_id: &str, key: &str) -> bool {
        self.key(receiving, originating, stream_id)
            .is_some_and(|expected| expected.as_bytes().ct_eq(key.as_bytes()).into())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// One `<db:result/>` or `<db:verify/>`, its addresses prepared.
pub(super) struct Dialback {
    pub from: Domain,
    pub to: Domain,
    /// On `<db:verify/>`: the stream that is asked about. Prosody also adds it to the answers to `<db:result/>`.
    pub id: Option<String>,
    pub key: String,
    /// `None` in a request. A server that cannot be told what it means by another value is taken to have failed.
    pub answer: Option<Verdict>,
    /// The stanza error condition in an answer of `type='error'`.
    pub condition: Option<String>,
}

impl Dialback {
    /// `None` if `from` or `to` is missing or not a domain: the element cannot even be answered.
    pub fn read(node: &Node) -> Option<Self> {
        let domain = |name| node.attribute(name).and_then(|text| Domain::new(text).ok());
        let answer = node.attribute("type").map(|answer| match answer {
            "valid" => Verdict::Valid,
            "invalid" => Verdict::Invalid,
            _ => Verdict::Error,
        });
        let error = node.children.iter().find(|child| child.name == "error");
        Some(Self {
            from: domain("from")?,
            to: domain("to")?,
            id: node.attribute("id").map(str::to_owned),
            // XEP-0220 shows keys with line breaks around them.
            key: node.text.trim_ascii().to_owned(),
            answer,
            condition: error
                .and_then(|error| error.children.iter().find(|child| child.namespace == ns::STANZA_ERRORS))
                .map(|condition| condition.name.clone()),
        })
    }
}

/// Answers for one of our domains whether a key is ours (XEP-0220 §2.2.2). `None` if there is no id to look at.
pub(super) fn answer_verify(
    request: &Dialback,
    is_ours: impl FnOnce(&Domain) -> bool,
    secret: &Secret,
) -> Option<Markup> {
    let id = request.id.as_deref()?;
    let mut answer = Markup::new();
    answer.open("db:verify");
    answer.attribute("from", request.to.as_str());
    answer.attribute("to", request.from.as_str());
    answer.attribute("id", id);
    if !is_ours(&request.to) {
        // "is not a stream error and therefore MUST NOT result in closing of the stream"
        error_answer(&mut answer, "db:verify", "item-not-found");
    } else if secret.verify(&request.from, &request.to, id, &request.key) {
        answer.attribute("type", "valid");
        answer.close_empty();
    } else {
        answer.attribute("type", "invalid");
        answer.close_empty();
    }
    Some(answer)
}

/// The answer to a `<db:result/>`: from the target domain to the sender domain (XEP-0220 §2.2.1).
pub(super) fn result_answer(from: &Domain, to: &Domain, answer: Answer) -> Markup {
    let mut markup = Markup::new();
    markup.open("db:result");
    markup.attribute("from", from.as_str());
    markup.attribute("to", to.as_str());
    match answer {
        Answer::Valid => markup.attribute("type", "valid"),
        Answer::Invalid => markup.attribute("type", "invalid"),
        Answer::Error(condition) => {
            error_answer(&mut markup, "db:result", condition);
            return markup;
        }
    }
    markup.close_empty();
    markup
}

/// What can be said about a `<db:result/>`.
pub(super) enum Answer {
    Valid,
    Invalid,
    /// XEP-0220 §2.5: a stanza error condition.
    Error(&'static str),
}

/// Ends a begun start tag with `type='error'` and the condition.
fn error_answer(markup: &mut Markup, name: &str, condition: &str) {
    markup.attribute("type", "error");
    markup.close_start();
    // XEP-0220 §2.5: "an <error/> element (implicitly qualified by the 'jabber:server' namespace)"
    markup.raw("<error type='");
    markup.raw(match condition {
        "resource-constraint" => "wait",
        "policy-violation" | "not-acceptable" => "modify",
        "forbidden" => "auth",
        _ => "cancel",
    });
    markup.raw("'>");
    markup.empty(condition, ns::STANZA_ERRORS);
    markup.raw("</error>");
    markup.end(name);
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        write!(text, "{byte:02x}").expect("a String takes everything");
    }
    text
}

/// UUIDs are 36 bytes and ejabberd's numbers 20; what is ten times that is not a stream id.
const STREAM_ID_BYTES_MAX: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(text: &str) -> Domain {
        Domain::new(text).unwrap()
    }

    /// The example of XEP-0185 §3 and the one of XEP-0220 §2.2.2, digit for digit.
    #[test]
    fn makes_the_keys_of_the_specifications() {
        let secret = Secret::from_text(b"s3cr3tf0rd14lb4ck");
        assert_eq!(
            secret
                .key(&domain("xmpp.example.com"), &domain("example.org"), "D60000229F")
                .as_deref(),
            Some("37c69b1cf07a3f67c04a5ef5902fa5114f2c76fe4a2686482ba5b89323075643")
        );
        assert!(secret.verify(
            &domain("xmpp.example.com"),
            &domain("example.org"),
            "D60000229F",
            "37c69b1cf07a3f67c04a5ef5902fa5114f2c76fe4a2686482ba5b89323075643"
        ));
    }

    /// A key is good for its own three fields and nothing else, whatever is moved from one to another (CVE-2016-0756).
    #[test]
    fn key_is_bound_to_every_field() {
        let secret = Secret::new([7; 32]);
        let (receiving, originating) = (domain("ship.example"), domain("shore.example"));
        let key = secret.key(&receiving, &originating, "id1").unwrap();
        assert!(secret.verify(&receiving, &originating, "id1", &key));
        assert!(!secret.verify(&originating, &receiving, "id1", &key));
        assert!(!secret.verify(&receiving, &originating, "id2", &key));
        assert!(!secret.verify(&domain("ship.exampl"), &domain("eshore.example"), "id1", &key));
        assert!(!Secret::new([8; 32]).verify(&receiving, &originating, "id1", &key));
        for wrong in ["", "0", &key[1..], &format!("{key}0"), &key.to_uppercase()] {
            assert!(!secret.verify(&receiving, &originating, "id1", wrong), "{wrong}");
        }
    }

    /// An id that could be read as more fields, or that no server would give, makes no key and verifies none.
    #[test]
    fn confusable_stream_ids_are_refused() {
        let secret = Secret::new([7; 32]);
        let (receiving, originating) = (domain("ship.example"), domain("shore.example"));
        let long = "x".repeat(STREAM_ID_BYTES_MAX + 1);
        for id in ["", " ", "a b", "a\u{a0}b", "a\nb", "a\0b", long.as_str()] {
            assert_eq!(secret.key(&receiving, &originating, id), None, "{id:?}");
            assert!(!secret.verify(&receiving, &originating, id, ""), "{id:?}");
        }
        assert!(secret.key(&receiving, &originating, &long[1..]).is_some());
    }

    /// The secret is not in what logs may print.
    #[test]
    fn debug_hides_the_secret() {
        assert_eq!(format!("{:?}", Secret::new([7; 32])), "Secret(..)");
    }
}
