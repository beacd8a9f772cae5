//! A stream that we open towards our server, in a far domain's name.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;

use super::{Certificate, CloseReason, Site, Verdict};
use crate::{
    stanza::DomainPair,
    time::{Deadline, Now},
};

/// What the stream is opened for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Purpose {
    Deliver,
    /// Only to ask about one dialback key, as [`receiving::Output::Verify`](super::receiving::Output::Verify) wants.
    Verify {
        request: u64,
        stream_id: String,
        key: String,
    },
}

#[derive(Clone, Debug)]
pub enum Input {
    /// The TCP connection is there (with direct TLS: give [`Input::Secured`] next).
    Connected,
    Bytes(Bytes),
    /// TLS is established; the server's certificate.
    Secured(Option<Certificate>),
    /// Complete stanzas, in order; only after [`Output::Ready`].
    Write(Vec<Bytes>),
    Eof,
    Drain,
    Timeout,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Output {
    Send(Bytes),
    /// Begin TLS as the client's side of it, after the sends before it are flushed.
    StartTls,
    /// Stanzas may be written. `acks`: XEP-0198 is on; `stanza_bytes_max`: XEP-0478.
    Ready {
        acks: bool,
        stanza_bytes_max: Option<usize>,
    },
    /// How many stanzas the server has acknowledged, since the beginning.
    Confirmed {
        stanzas: u64,
    },
    Verified {
        request: u64,
        verdict: Verdict,
    },
    /// Flush and close the socket. Nothing follows.
    Close(CloseReason),
}

#[derive(Debug)]
pub struct InitiatingStream {
    outputs: VecDeque<Output>,
}

impl InitiatingStream {
    pub fn new(
        site: Arc<Site>,
        pair: DomainPair,
        purpose: Purpose,
        seed: [u8; 32],
        now: Now,
        direct_tls: bool,
    ) -> Self {
        let _ = (site, pair, purpose, seed, now, direct_tls);
        todo!()
    }

    pub fn handle(&mut self, input: Input, now: Now) {
        let _ = (input, now);
        todo!()
    }

    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<Deadline> {
        todo!()
    }
}
