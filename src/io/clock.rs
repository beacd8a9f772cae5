//! The two clocks, read together.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::time::{Deadline, Mono, Now, Wall};

/// How far before the process's start [`Mono`] begins. What has waited since an earlier process is put on it by its age: a year is more
/// than any outage, and an age beyond it comes from a calendar that was wrong.
const HEAD_START: Duration = Duration::from_secs(366 * 24 * 60 * 60);

/// Where [`Mono`] stands. Copies count from the same moment, so one is made at start and handed around.
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
            mono: Mono::from_start(HEAD_START + self.start.elapsed()),
            wall: Wall(wall_ms),
        }
    }

    /// Sleeps until a machine wants to be called again; for ever if it does not.
    pub async fn sleep_until(&self, deadline: Option<Deadline>) {
        let wait = deadline.map(|deadline| deadline.at.since_start().saturating_sub(HEAD_START));
        match wait.and_then(|wait| self.start.checked_add(wait)) {
            Some(at) => tokio::time::sleep_until(at.into()).await,
            None => std::future::pending().await,
        }
    }
}
