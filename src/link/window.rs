//! How much may be on its way at once, so that what is said next does not wait behind it.
//!
//! TCP sends until packets are lost, and a modem with a deep buffer loses none: then what has been sent waits there for many seconds, and no
//! order that is decided here is of use. So no more is given to TCP than the path holds, and what keeps a short queue before it: the round
//! trip without a queue is the shortest that was seen, and what it takes longer is waiting (as in TCP Vegas and LEDBAT, [RFC
//! 6817](https://www.rfc-editor.org/rfc/rfc6817)). It grows while that is short, if it was used up; and shrinks while it is long.

use std::time::Duration;

use crate::time::{Mono, Now};

/// What is sent may wait for so long before the path, or for half a round trip, whichever is longer: with less a path whose round trips
/// vary would stand idle.
const QUEUE: Duration = Duration::from_millis(400);
/// A piece of what is large, in its packet: less would be none at all.
const MIN_BYTES: u64 = 1_200;
const FIRST_BYTES: u64 = 2_400;
const MAX_BYTES: u64 = 64 << 20;
/// Between two changes at least: of a path without a delay.
const CHANGE_MIN: Duration = Duration::from_millis(2);

/// A path, as the kernel has measured it.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    /// Smoothed.
    pub rtt: Duration,
    /// The shortest of the last minutes.
    pub rtt_min: Duration,
    /// Sent or written, and not confirmed.
    pub on_its_way: u64,
}

#[derive(Debug)]
pub struct Window {
    bytes: u64,
    /// Somebody was refused since it was changed.
    used_up: bool,
    changed_at: Option<Mono>,
}

impl Default for Window {
    fn default() -> Self {
        Self {
            bytes: FIRST_BYTES,
            used_up: false,
            changed_at: None,
        }
    }
}

impl Window {
    /// How many bytes may follow now, if any.
    pub fn room(&mut self, path: Path, now: Now) -> Option<u64> {
        let due = self
            .changed_at
            .is_none_or(|at| now.mono.since(at) >= path.rtt.max(CHANGE_MIN));
        if due {
            self.change(path);
            (self.used_up, self.changed_at) = (false, Some(now.mono));
        }
        let room = self.bytes.saturating_sub(path.on_its_way);
        // Not a little at a time: each packet has its headers.
        let enough = room >= self.bytes / 4 || path.on_its_way == 0;
        self.used_up |= !enough;
        enough.then_some(room.max(1))
    }

    fn change(&mut self, path: Path) {
        if path.rtt.is_zero() {
            return;
        }
        let wanted = path.rtt_min + QUEUE.max(path.rtt_min / 2);
        let ratio = (wanted.as_secs_f64() / path.rtt.as_secs_f64()).clamp(0.5, 2.0);
        if ratio < 1.0 || self.used_up {
            // Half of the way, for the round trip is of a while ago.
            let bytes = self.bytes as f64 * (1.0 + ratio) / 2.0;
            self.bytes = (bytes as u64).clamp(MIN_BYTES, MAX_BYTES);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::Wall;

    fn at(ms: u64) -> Now {
        Now {
            mono: Mono::from_start(Duration::from_millis(ms)),
            wall: Wall::default(),
        }
    }

    /// A path of this rate and delay with a buffer without end, and one who always has more to say: the longest that something waits for it
    /// after a while, and how much of its rate is used.
    fn greedy(bytes_per_second: f64, delay: Duration) -> (Duration, f64) {
        const SECONDS: u64 = 240;
        let (mut window, mut rtt) = (Window::default(), delay);
        // What is on its way: when it is confirmed, and how much it is.
        let mut flying: std::collections::VecDeque<(f64, u64)> = std::collections::VecDeque::new();
        let (mut free_at, mut sent_late, mut longest) = (0.0_f64, 0.0, 0.0_f64);
        for ms in 0..SECONDS * 1000 {
            let now = ms as f64 / 1000.0;
            while let Some((confirmed, _)) = flying.front().filter(|(confirmed, _)| *confirmed <= now).copied() {
                // As the kernel smooths it, roughly.
                let sample = (confirmed - now).max(0.0) + delay.as_secs_f64() + (free_at - now).max(0.0);
                rtt = Duration::from_secs_f64(0.875 * rtt.as_secs_f64() + 0.125 * sample);
                flying.pop_front();
            }
            let on_its_way = flying.iter().map(|(_, bytes)| bytes).sum();
            let path = Path {
                rtt,
                rtt_min: delay,
                on_its_way,
            };
            if let Some(room) = window.room(path, at(ms)) {
                let bytes = room.min(1_100);
                free_at = free_at.max(now) + bytes as f64 / bytes_per_second;
                flying.push_back((free_at + delay.as_secs_f64(), bytes));
                if ms > SECONDS * 500 {
                    sent_late += bytes as f64;
                    longest = longest.max(free_at - now);
                }
            }
        }
        let used = sent_late / (bytes_per_second * SECONDS as f64 / 2.0);
        (Duration::from_secs_f64(longest), used)
    }

    /// On every path what is sent waits for a moment only, and hardly any of the path is left unused.
    #[test]
    fn queues_are_short_and_paths_are_used() {
        for (bits_per_second, delay_ms, longest_ms, used_min) in [
            (2_400.0, 6_000, 10_000, 0.8),
            (9_600.0, 600, 1_200, 0.85),
            (128_000.0, 600, 900, 0.85),
            (10_000_000.0, 20, 600, 0.85),
        ] {
            let (longest, used) = greedy(bits_per_second / 8.0, Duration::from_millis(delay_ms));
            let what = format!("{bits_per_second} bit/s, {delay_ms} ms: {longest:?}, {used:.2}");
            assert!(longest <= Duration::from_millis(longest_ms), "{what}");
            assert!(used >= used_min, "{what}");
        }
    }

    /// Who has little to say learns nothing of the path from that.
    #[test]
    fn it_grows_only_when_it_is_used_up() {
        let mut window = Window::default();
        let idle = Path {
            rtt: Duration::from_millis(600),
            rtt_min: Duration::from_millis(600),
            on_its_way: 0,
        };
        for ms in (0..60_000).step_by(700) {
            assert_eq!(window.room(idle, at(ms)), Some(FIRST_BYTES));
        }
    }
}
