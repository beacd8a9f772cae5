//! Shells around the pure floors: sockets, TLS, files, clocks, DNS, HTTP.

pub mod admin;
pub mod backoff;
pub mod ca;
pub mod clock;
pub mod dns;
pub mod keys;
pub mod lane;
pub mod legs;
pub mod link;
pub mod peer;
pub mod receipts;
pub mod store;
pub mod tls;
pub mod trace;
mod verifier;
pub mod watch;
pub mod wire;
