//! Two sites on one machine.

pub mod client;
pub mod load;
pub mod scenario;
pub mod transcript;
