//! Addresses (RFC 7622), as far as routing needs them.
//!
//! Only domains are prepared: they decide where a stanza goes and who may send it. Local parts and
//! resources are carried as they came, for the servers to judge.

use std::{fmt, sync::Arc};

use jid::DomainPart;

/// A domain in the one form in which it is compared (RFC 7622 §3.2).
#[derive(Clone, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Domain(Arc<str>);

impl Domain {
    pub fn new(text: &str) -> Result<Self, AddressError> {
        // An already prepared name is the common case, and preparing costs a heap round trip.
        let plain = !text.is_empty()
            && text.len() <= 253
            && text
                .bytes()
                .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'))
            && !text.ends_with('.');
        if plain {
            return Ok(Self(text.into()));
        }
        DomainPart::new(text)
            .map(|part| Self(part.as_str().into()))
            .map_err(|_| AddressError::Domain)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

/// One of our server's domains and one of a peer's: what an S2S stream is for.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct DomainPair {
    pub local: Domain,
    pub far: Domain,
}

impl fmt::Display for DomainPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.local, self.far)
    }
}

/// The address without its resource.
pub fn bare(address: &str) -> &str {
    address.split_once('/').map_or(address, |(bare, _)| bare)
}

/// The resource, if there is one.
pub fn resource_of(address: &str) -> Option<&str> {
    address.split_once('/').map(|(_, resource)| resource)
}

/// The domain of an address, not yet prepared.
pub fn domain_of(address: &str) -> &str {
    let bare = bare(address);
    bare.split_once('@').map_or(bare, |(_, domain)| domain)
}

/// Whether `text` is `pattern` with each `*` of it replaced by some characters, or none.
pub fn matches(pattern: &str, text: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else {
        return pattern == text;
    };
    let (middle, tail) = rest.rsplit_once('*').unwrap_or(("", rest));
    let Some(mut text) = text.strip_prefix(head).and_then(|text| text.strip_suffix(tail)) else {
        return false;
    };
    // Each piece at the first place where it stands: a later one would only leave less for the next.
    middle.split('*').all(|piece| match text.split_once(piece) {
        Some((_, after)) => {
            text = after;
            true
        }
        None => false,
    })
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    #[error("not a domain by RFC 7622 §3.2")]
    Domain,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A slash ends the bare part first: a resource may hold `@` and more slashes (RFC 7622 §3.1).
    #[test]
    fn splits_at_the_first_slash() {
        let address = "room@conference.a.example/at @ work/now";
        assert_eq!(bare(address), "room@conference.a.example");
        assert_eq!(domain_of(address), "conference.a.example");
        assert_eq!(resource_of(address), Some("at @ work/now"));
        assert_eq!(domain_of("a.example/x@y"), "a.example");
    }

    /// Two spellings of one domain are equal once prepared; what is none is refused.
    #[test]
    fn prepares_domains() {
        assert_eq!(Domain::new("A.Example").unwrap(), Domain::new("a.example").unwrap());
        assert_eq!(Domain::new(""), Err(AddressError::Domain));
        assert_eq!(Domain::new("a b"), Err(AddressError::Domain));
    }

    /// A `*` stands for any characters or none, wherever it is; all else stands for itself.
    #[test]
    fn wildcards_match_any_characters() {
        for (pattern, text, expected) in [
            ("ops@c.example", "ops@c.example", true),
            ("ops@c.example", "ops@c.example.org", false),
            ("ops@c.example", "devops@c.example", false),
            ("*@c.example", "ops@c.example", true),
            ("*@c.example", "ops@cc.example", false),
            ("*ops@c.example", "ops@c.example", true),
            ("ops*@c.example", "ops-night@c.example", true),
            ("ops@*.example", "ops@c.b.example", true),
            ("ops@*.example", "ops@example", false),
            ("*@*", "ops@c.example", true),
            ("*-*-*@c.example", "a-b-c@c.example", true),
            ("*-*-*@c.example", "a-b@c.example", false),
            ("a*b*a@*", "aba@x", true),
            ("a*b*a@*", "ab@x", false),
            // The same characters do not serve two pieces.
            ("aba*aba@x", "aba@x", false),
            ("aba*ba@x", "ababa@x", true),
            ("*ab*ab*", "ab@xab", true),
            ("*ab*ab*", "abb", false),
            ("ü*@c.example", "über@c.example", true),
            ("*", "", true),
            ("**", "any", true),
            ("", "any", false),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
    }
}
