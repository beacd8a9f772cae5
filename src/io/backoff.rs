//! How long to wait before trying again.

use std::time::Duration;

/// Doubles from a base to a maximum, and draws the wait from the upper half of that, so that the lanes that a server's
/// restart cut at once do not come back at once.
#[derive(Clone, Debug)]
pub struct Backoff {
    base: Duration,
    max: Duration,
    failures: u32,
}

impl Backoff {
    pub fn new(base: Duration, max: Duration) -> Self {
        Self {
            base,
            max: max.max(base),
            failures: 0,
        }
    }

    /// The wait after one more failure. `random` is any number; all of its bits count.
    pub fn next(&mut self, random: u64) -> Duration {
        let doubled = self.base.saturating_mul(1u32 << self.failures.min(31));
        self.failures = self.failures.saturating_add(1);
        let whole = doubled.min(self.max);
        let half = whole / 2;
        // Both are below 2^32 in any sane configuration; u128 keeps the product exact in the others too.
        let part = half.as_nanos() * u128::from(random) / u128::from(u64::MAX);
        whole - half + Duration::from_nanos(u64::try_from(part).unwrap_or(u64::MAX)).min(half)
    }

    /// It went well: the next wait is the base again.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// Failures since the last success.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Duration = Duration::from_millis(500);
    const MAX: Duration = Duration::from_secs(30);

    /// The wait doubles up to the maximum and stays there; a success starts it over.
    ///
    /// With the largest random number the wait is the whole of each step.
    #[test]
    fn doubles_up_to_the_maximum() {
        let mut backoff = Backoff::new(BASE, MAX);
        let waits: Vec<_> = (0..9).map(|_| backoff.next(u64::MAX).as_millis()).collect();
        assert_eq!(waits, [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000]);
        backoff.reset();
        assert_eq!(backoff.next(u64::MAX), BASE);
    }

    /// Whatever is drawn, the wait lies between half a step and a whole one; a huge count of failures overflows nothing.
    #[test]
    fn jitter_stays_in_the_upper_half() {
        for random in [0, 1, u64::MAX / 3, u64::MAX] {
            let mut backoff = Backoff::new(BASE, MAX);
            for _ in 0..100 {
                let wait = backoff.next(random);
                assert!(wait >= BASE / 2 && wait <= MAX, "{wait:?}");
            }
            assert!(backoff.next(random) >= MAX / 2);
        }
        let mut endless = Backoff::new(Duration::MAX, Duration::MAX);
        assert!(endless.next(7) > Duration::ZERO);
    }
}
