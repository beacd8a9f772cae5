//! S2S streams with our own server (RFC 6120, XEP-0220, XEP-0198): pure state machines.
//!
//! A [`ReceivingStream`](receiving::ReceivingStream) is one that the server opened towards a far domain; an
//! [`InitiatingStream`](initiating::InitiatingStream) is one that we open towards it, in a far domain's name.
//! Neither owns a socket: they take bytes and give bytes, and say when TLS is to begin. Neither call can fail: what the
//! server does wrong becomes a stream error on the wire and [`CloseReason`] as the last output.

use std::{collections::BTreeSet, fmt};

use crate::{codec::xml::Limits, stanza::Domain};

pub mod dialback;
pub mod initiating;
pub mod management;
pub mod receiving;

pub use initiating::InitiatingStream;
pub use receiving::ReceivingStream;

/// What every stream of a site knows about the site.
#[derive(Debug)]
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
    pub fn proves(&self, domain: &Domain) -> bool {
        let _ = domain;
        todo!()
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
    /// The server sent this stream error.
    ServerError {
        condition: String,
        text: String,
    },
    /// We sent this stream error.
    OurError {
        condition: &'static str,
        why: &'static str,
    },
    /// Negotiation did not get as far as it must.
    Failed {
        why: &'static str,
    },
    Timeout(&'static str),
}

impl CloseReason {
    /// The value in metrics.
    pub fn as_label(&self) -> &'static str {
        todo!()
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let _ = f;
        todo!()
    }
}
