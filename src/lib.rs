//! narrows carries XMPP group chat over links that are thin, slow and often gone.
//!
//! A sidecar stands beside each of two unmodified XMPP servers. It ends its own server's S2S
//! streams as if it were the far domains, and speaks a protocol of its own to the other sidecar:
//! one copy of what a room sends, compressed, kept on disk until it is delivered.
//!
//! # Words that are ours
//!
//! | word | meaning |
//! | --- | --- |
//! | *site* | one server (or cluster), its local domains, and the sidecar beside it |
//! | *peer* | the other sidecar |
//! | *link* | the sidecars' own connection over the constrained network |
//! | *leg* | an S2S stream between a sidecar and its own server: *receiving* when the server opened it, *initiating* when we did (RFC 6120) |
//! | *cast* | one stanza for many recipients: a template (the stanza without its `to`) and the addresses |
//! | *entry* | what one durable queue slot holds |
//! | *spool* / *inbox* | entries waiting to cross / entries that have crossed and wait for the local server |
//!
//! # The house
//!
//! A file imports from lower floors only; neighbours do not import each other.
//!
//! ```text
//! 6  cli                       arguments, assembly, drain (the binary is thin)
//! 5  io config metrics         sockets, files, clocks, YAML, Prometheus      (feature `runtime`)
//! 4  relay                     one peer's machines together, and the one place that routes
//! 3  stream mirror queue link  pure state machines, side by side
//! 2  codec                     bytes ⇄ types, with limits
//! 1  stanza                    the words of XMPP
//! 0  time pii                  instants, deadlines, what must not be logged
//! ```
//!
//! Floors 0 to 4 are pure: time, randomness, bytes and commits come in as values. The machines on
//! floors 3 and 4 share one contract: `handle(input, now)`, `poll_output()`, `poll_timeout()`.

pub mod codec;
pub mod link;
pub mod mirror;
pub mod pii;
pub mod queue;
pub mod relay;
pub mod stanza;
pub mod stream;
pub mod time;

#[cfg(feature = "runtime")]
pub mod cli;
#[cfg(feature = "runtime")]
pub mod config;
#[cfg(feature = "runtime")]
pub mod io;
#[cfg(feature = "runtime")]
pub mod metrics;
