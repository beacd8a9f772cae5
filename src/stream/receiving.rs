//! A stream that our server opened towards a far domain.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;

use super::{Certificate, CloseReason, Method, Site, Verdict};
use crate::{
    stanza::{DomainPair, Stanza},
    time::{Deadline, Now},
};

#[derive(Clone, Debug)]
pub enum Input {
    Bytes(Bytes),
    /// TLS is established: after [`Output::StartTls`], or at once with direct TLS.
    Secured(Option<Certificate>),
    /// The answer to [`Output::Verify`].
    Verdict {
        request: u64,
        verdict: Verdict,
    },
    /// Stanzas 1..=upto of this stream are on disk.
    Committed {
        upto: u64,
    },
    /// The connection ended.
    Eof,
    /// Close gracefully: `</stream:stream>`, then read on until the server closes.
    Drain,
    Timeout,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Output {
    Send(Bytes),
    /// Begin TLS as the server's side of it, after the sends before it are flushed.
    StartTls,
    /// Ask the authoritative server (ours) about this key, over a connection of its own.
    Verify {
        request: u64,
        pair: DomainPair,
        stream_id: String,
        key: String,
    },
    Authenticated {
        pair: DomainPair,
        how: Method,
    },
    /// `n` counts from 1; `from` and `to` are checked.
    Stanza {
        n: u64,
        pair: DomainPair,
        stanza: Stanza,
    },
    /// Flush and close the socket. Nothing follows.
    Close(CloseReason),
}

#[derive(Debug)]
pub struct ReceivingStream {
    outputs: VecDeque<Output>,
}

impl ReceivingStream {
    /// `seed` is for stream ids.
    pub fn new(site: Arc<Site>, seed: [u8; 32], now: Now, direct_tls: bool) -> Self {
        let _ = (site, seed, now, direct_tls);
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
