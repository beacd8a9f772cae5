//! Two sites on one machine: network namespaces joined by an emulated link, with real XMPP servers
//! and sidecars inside.
//!
//! Everything here needs root and says so. A [`World`] is made by [`World::builder`] and torn down
//! when dropped, also when its maker is killed; several can exist beside each other.
//! It is a package of its own: nothing here is part of narrows, and nothing of narrows is used but its binary.

#![warn(missing_debug_implementations)]

pub mod capture;
pub mod client;
pub mod dns;
pub mod emulator;
mod failures;
pub mod load;
pub mod net;
pub mod scenario;
pub mod servers;
pub mod sidecar;
pub mod transcript;
pub mod world;

pub use capture::Capture;
pub use emulator::{Direction, Link, LinkStats, Profile, Way};
pub use servers::{C2S_PORT, Ejabberd, Kind, Limits, PASSWORD, Prosody, S2S_PORT, Server, ServerSpec};
pub use sidecar::{Dial, Metrics, Sidecar, SidecarSpec};
pub use world::{Layout, Site, Trust, Vouched, World, WorldBuilder};
