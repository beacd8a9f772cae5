//! The real binary between real servers, in network namespaces of their own.
//!
//! Needs root and the packages of `tests/setup`; without them a test fails and says so. A world that measures stands alone;
//! others may stand beside each other, as many as there are test threads.

mod acts;
#[path = "../grafana/boards.rs"]
mod boards;
mod cast;
mod echo;
mod faults;
mod hub;
mod leave;
mod management;
mod mirror;
mod occupants;
mod one_copy;
mod outage;
mod profiles;
mod recordings;
mod reload;
mod restarts;
mod seen;
mod stage;
mod states;
mod tail;
mod watching;
