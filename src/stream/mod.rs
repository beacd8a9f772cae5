//! S2S streams with our own server (RFC 6120, XEP-0220, XEP-0198): pure state machines.
//!
//! A [`ReceivingStream`](receiving::ReceivingStream) is one that the server opened towards a far domain; an
//! [`InitiatingStream`](initiating::InitiatingStream) is one that we open towards it, in a far domain's name.
//! Neither owns a socket: they take bytes and give bytes, and say when TLS is to begin.

pub mod dialback;
pub mod initiating;
pub mod management;
pub mod receiving;
