//! Two sites on one machine.

pub mod client;
pub mod transcript;
