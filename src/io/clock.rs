//! The two clocks, read together.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::time::{Deadline, Mono, Now, Wall};

/// Where [`Mono`] begins. Copies count from the same moment, so one is made at start and handed around.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
}

impl Clock {
    pub fn start() -> Self {
        Self { start: Instant::now() }
    }

    pub fn now(&self) -> Now {
        let wall_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
        Now {
            mono: Mono::from_start(self.start.elapsed()),
            wall: Wall(wall_ms),
        }
    }

    /// Sleeps until a machine wants to be called again; for ever if it does not.
    pub async fn sleep_until(&self, deadline: Option<Deadline>) {
        match deadline.and_then(|deadline| self.start.checked_add(deadline.at.since_start())) {
            Some(at) => tokio::time::sleep_until(at.into()).await,
            None => std::future::pending().await,
        }
    }
}
