//! Instants and deadlines as plain values.
//!
//! Nothing below `io` reads a clock: a caller passes [`Now`] in, so a simulated hour takes no time
//! and a seed replays it.

use std::{ops, time::Duration};

/// A point on a clock that never runs backwards. Its zero is some time before the process started, so that what an earlier process
/// did has its place on it too.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Mono(Duration);

impl Mono {
    pub const fn from_start(since_start: Duration) -> Self {
        Self(since_start)
    }

    pub const fn since_start(self) -> Duration {
        self.0
    }

    /// How long after `earlier` this is; zero if it is not.
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl ops::Add<Duration> for Mono {
    type Output = Self;

    fn add(self, delay: Duration) -> Self {
        Self(self.0.saturating_add(delay))
    }
}

impl ops::Sub<Duration> for Mono {
    type Output = Self;

    /// So long before; what would be before the zero is the zero.
    fn sub(self, age: Duration) -> Self {
        Self(self.0.saturating_sub(age))
    }
}

/// A point on the calendar, in milliseconds since 1970-01-01T00:00:00Z. It may jump.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Wall(pub u64);

impl Wall {
    /// How long after `earlier` this is; zero if it is not, because the clock was put back.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

/// Both clocks, read together.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Now {
    pub mono: Mono,
    pub wall: Wall,
}

/// When a machine wants to be called again, and what for (the reason is for logs and tests).
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Deadline {
    pub at: Mono,
    pub why: &'static str,
}

impl Deadline {
    /// The earlier of two deadlines that may not exist.
    pub fn earlier(one: Option<Self>, other: Option<Self>) -> Option<Self> {
        match (one, other) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        }
    }
}
