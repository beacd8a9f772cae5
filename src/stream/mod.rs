//! S2S streams with our own server (RFC 6120, XEP-0220, XEP-0198): pure state machines.
//!
//! A [`ReceivingStream`] is one that the server opened towards a far domain; an [`InitiatingStream`] is one that we
//! open towards it, in a far domain's name. Neither owns a socket: they take bytes and give bytes, and say when TLS is
//! to begin. Neither can fail: what the server does wrong becomes a stream error on the wire and a [`CloseReason`] as
//! the last output.

use std::{borrow::Cow, collections::BTreeSet, fmt};

use crate::{codec::xml::Limits, stanza::Domain};

pub mod dialback;
pub mod initiating;
pub mod management;
pub mod receiving;
mod wire;

pub use initiating::InitiatingStream;
pub use receiving::ReceivingStream;

/// What every stream of a site knows about the site.
#[derive(Clone, Debug)]
pub struct Site {
    pub local: BTreeSet<Domain>,
    pub far: BTreeSet<Domain>,
    /// Neither role goes on without TLS.
    pub require_tls: bool,
    /// XEP-0198 is offered to the server on receiving streams.
    pub offer_management: bool,
    /// XEP-0198 is enabled on initiating streams when the server offers it.
    pub use_management: bool,
    pub before_authentication: Limits,
    pub after_authentication: Limits,
    pub secret: dialback::Secret,
}

/// The identities that the server's TLS certificate claims.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Certificate {
    /// Its chain leads to a configured root and it is valid now.
    pub trusted: bool,
    /// subjectAltName dNSName.
    pub dns: Vec<String>,
    /// SRV-ID: `_xmpp-server.a.example` (RFC 4985).
    pub srv: Vec<String>,
    /// id-on-xmppAddr (RFC 6120 §13.7.1.4).
    pub xmpp: Vec<String>,
}

impl Certificate {
    /// Whether one of the identities is `domain` (RFC 6120 §13.7.1.2). Says nothing about trust.
    pub fn proves(&self, domain: &Domain) -> bool {
        let is_domain = |name: &str| Domain::new(name).is_ok_and(|name| name == *domain);
        // RFC 6125 §6.4.3: a wildcard stands for the whole leftmost label, and for exactly one.
        let is_wildcard = |name: &str| match (name.strip_prefix("*."), domain.as_str().split_once('.')) {
            (Some(parent), Some((_, rest))) => Domain::new(parent).is_ok_and(|parent| parent.as_str() == rest),
            _ => false,
        };
        self.dns.iter().any(|name| is_domain(name) || is_wildcard(name))
            // A certificate for another service of the same host does not speak for its XMPP server (RFC 6125 §6.5.1).
            || self.srv.iter().filter_map(|name| name.strip_prefix("_xmpp-server.")).any(is_domain)
            || self.xmpp.iter().any(|name| is_domain(name))
    }
}

/// How the other side of a stream proved its domain.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Method {
    /// SASL EXTERNAL (XEP-0178).
    External,
    /// XEP-0220.
    Dialback,
}

impl Method {
    /// The value in metrics.
    pub fn as_label(self) -> &'static str {
        match self {
            Self::External => "external",
            Self::Dialback => "dialback",
        }
    }
}

/// What an authoritative server says of a dialback key.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    Valid,
    Invalid,
    /// It could not be asked.
    Error,
}

/// Why a stream ended.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum CloseReason {
    /// The server closed it with `</stream:stream>`.
    ClosedByServer,
    /// We closed it, and the server closed it too.
    Drained,
    /// The connection ended without a closing tag.
    Eof,
    /// The purpose was served: a verification got its answer.
    Done,
    /// The server sent this stream error (RFC 6120 §4.9).
    ServerError { condition: String, text: String },
    /// The server did wrong and we sent this stream error.
    OurError {
        condition: &'static str,
        why: Cow<'static, str>,
    },
    /// Negotiation did not get as far as it must.
    Failed { why: Cow<'static, str> },
    /// What was waited for.
    Timeout(&'static str),
}

impl CloseReason {
    /// The value in metrics.
    pub fn as_label(&self) -> &'static str {
        match self {
            Self::ClosedByServer => "closed_by_server",
            Self::Drained => "drained",
            Self::Eof => "eof",
            Self::Done => "done",
            // Both servers end an idle stream this way; it is worth telling from trouble.
            Self::ServerError { condition, .. } if condition == "connection-timeout" => "idle",
            Self::ServerError { .. } => "server_error",
            Self::OurError { .. } => "our_error",
            Self::Failed { .. } => "failed",
            Self::Timeout(_) => "timeout",
        }
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ClosedByServer => f.write_str("the server closed the stream"),
            Self::Drained => f.write_str("closed on both sides"),
            Self::Eof => f.write_str("the connection ended without a closing tag"),
            Self::Done => f.write_str("its purpose was served"),
            Self::ServerError { condition, text } if text.is_empty() => {
                write!(f, "the server sent the stream error {condition}")
            }
            Self::ServerError { condition, text } => write!(f, "the server sent the stream error {condition}: {text}"),
            Self::OurError { condition, why } => write!(f, "we sent the stream error {condition}: {why}"),
            Self::Failed { why } => write!(f, "negotiation failed: {why}"),
            Self::Timeout(what) => write!(f, "waited too long for {what}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(dns: &[&str], srv: &[&str], xmpp: &[&str]) -> Certificate {
        let own = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
        Certificate {
            trusted: true,
            dns: own(dns),
            srv: own(srv),
            xmpp: own(xmpp),
        }
    }

    /// Any of the three kinds of identity proves a domain, and only that domain (RFC 6120 §13.7.1.2).
    #[test]
    fn certificate_proves_its_own_names() {
        let domain = Domain::new("conference.ship.example").unwrap();
        for good in [
            certificate(&["Conference.SHIP.example"], &[], &[]),
            certificate(&["other.example", "conference.ship.example"], &[], &[]),
            certificate(&[], &["_xmpp-server.conference.ship.example"], &[]),
            certificate(&[], &[], &["conference.ship.example"]),
        ] {
            assert!(good.proves(&domain), "{good:?}");
        }
        for bad in [
            certificate(&[], &[], &[]),
            certificate(&["ship.example", "a.conference.ship.example", ""], &[], &[]),
            certificate(
                &[],
                &["_xmpp-client.conference.ship.example", "conference.ship.example"],
                &[],
            ),
            certificate(&[], &[], &["_xmpp-server.conference.ship.example"]),
        ] {
            assert!(!bad.proves(&domain), "{bad:?}");
        }
    }

    /// A wildcard is a whole leftmost label and covers exactly one (RFC 6125 §6.4.3).
    #[test]
    fn wildcard_covers_one_label() {
        let domain = |text| Domain::new(text).unwrap();
        let wild = certificate(&["*.ship.example"], &[], &[]);
        assert!(wild.proves(&domain("conference.ship.example")));
        assert!(!wild.proves(&domain("a.conference.ship.example")));
        assert!(!wild.proves(&domain("ship.example")));
        for odd in ["*", "*.", "c*.ship.example", "conference.*.example", "*.*.example"] {
            assert!(
                !certificate(&[odd], &[], &[]).proves(&domain("conference.ship.example")),
                "{odd}"
            );
        }
        assert!(!certificate(&[], &[], &["*.ship.example"]).proves(&domain("conference.ship.example")));
        assert!(!certificate(&[], &["_xmpp-server.*.ship.example"], &[]).proves(&domain("conference.ship.example")));
    }
}
