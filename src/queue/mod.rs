//! What waits, in which order, and for whom.

pub mod collapse;
pub mod journal;
pub mod scheduler;
