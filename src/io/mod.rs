//! Shells around the pure floors: sockets, TLS, files, clocks, DNS, HTTP.

pub mod keys;
pub mod link;
