//! The real binary between real servers, in network namespaces of their own.
//!
//! Needs root and the packages of `tests/setup`; without them a test fails and says so. One world stands at a time: two cores
//! do not carry eight servers.

mod acts;
mod cast;
mod faults;
mod management;
mod outage;
mod restarts;
mod stage;
