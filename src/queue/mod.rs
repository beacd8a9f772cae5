//! What waits, in which order, and for whom.

pub mod class;
pub mod collapse;
pub mod journal;
pub mod ledger;
pub mod news;
pub mod place;
pub mod rules;
pub mod scheduler;
