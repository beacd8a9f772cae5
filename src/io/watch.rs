//! What is watched of one peer over time, for those who operate it: the pace of its queue, and what happened lately.

use std::{collections::VecDeque, time::Duration};

use crate::time::{Mono, Now, Wall};

/// How fast the spool empties, as the peer's acknowledgements show it.
///
/// Only what has a queue behind it shows what the link can do: when someone says a line every ten seconds, little crosses because
/// little is said. So a pace seen without a queue counts only if it is the best so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    bytes_per_second: f64,
    acked: u64,
    /// When the peer last acknowledged something, or there was nothing to acknowledge.
    at: Option<Mono>,
}

/// With more than this waiting, the link has all it can take: two batches.
const BACKLOG_BYTES: u64 = 8 * 1024;

/// Acknowledgements come in lumps, seconds apart; the pace is that of the last four or so.
const WEIGHT: f64 = 0.25;

impl Pace {
    /// What the peer has had acknowledged in all, and what still waits.
    pub fn note(&mut self, acked: u64, waiting: u64, up: bool, now: Mono) {
        let fresh = acked.saturating_sub(self.acked);
        let took = self.at.map(|at| now.since(at).as_secs_f64()).filter(|took| *took > 0.0);
        if let (Some(took), true) = (took, fresh > 0) {
            let seen = fresh as f64 / took;
            if self.bytes_per_second == 0.0 || waiting < BACKLOG_BYTES {
                self.bytes_per_second = self.bytes_per_second.max(seen);
            } else {
                self.bytes_per_second += (seen - self.bytes_per_second) * WEIGHT;
            }
        }
        if fresh > 0 || waiting == 0 || !up {
            self.acked = acked;
            self.at = Some(now);
        }
    }

    /// How long so many bytes will take. `None` if nothing has shown it yet.
    pub fn time_for(&self, waiting: u64) -> Option<Duration> {
        if waiting == 0 {
            return Some(Duration::ZERO);
        }
        let seconds = waiting as f64 / self.bytes_per_second;
        Duration::try_from_secs_f64(seconds).ok()
    }
}

/// Something that an operator would tell another.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Event {
    pub at: Wall,
    pub what: String,
}

/// Events that are kept: a bad day.
const EVENTS_MAX: usize = 50;

/// The last events, the newest last.
#[derive(Clone, Debug, Default)]
pub struct Events(VecDeque<Event>);

impl Events {
    pub fn note(&mut self, now: Now, what: String) {
        if self.0.len() >= EVENTS_MAX {
            self.0.pop_front();
        }
        self.0.push_back(Event { at: now.wall, what });
    }

    pub fn iter(&self) -> impl Iterator<Item = &Event> {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Mono {
        Mono::from_start(Duration::from_secs(1000 + seconds))
    }

    /// Quiet talk does not make the link look slow, an outage does not either, and a queue shows what it can do.
    #[test]
    fn pace_is_what_a_queue_shows() {
        let mut pace = Pace::default();
        assert_eq!(pace.time_for(1), None);
        assert_eq!(pace.time_for(0), Some(Duration::ZERO));
        // A line, acknowledged after five seconds.
        pace.note(0, 0, true, at(0));
        pace.note(0, 300, true, at(1));
        pace.note(300, 0, true, at(5));
        assert_eq!(pace.time_for(600), Some(Duration::from_secs(10)));
        // One at once, then again one late: the better one counts.
        pace.note(300, 0, true, at(9));
        pace.note(1300, 0, true, at(10));
        pace.note(1600, 0, true, at(30));
        assert_eq!(pace.time_for(600), Some(Duration::from_millis(600)));
        // An hour without the link, then ten seconds in which a queue crosses at 5 kB/s.
        pace.note(1600, 50_000, false, at(3600));
        for second in 1..=30 {
            pace.note(1600 + second * 5_000, 50_000, true, at(3600 + second));
        }
        let time = pace.time_for(50_000).unwrap();
        assert!(
            time.abs_diff(Duration::from_secs(10)) < Duration::from_secs(1),
            "{time:?}"
        );
    }

    /// The oldest events make room.
    #[test]
    fn events_are_few() {
        let mut events = Events::default();
        for n in 0..1000 {
            events.note(Now::default(), n.to_string());
        }
        assert_eq!(events.iter().count(), EVENTS_MAX);
        assert_eq!(events.iter().last().unwrap().what, "999");
    }
}
