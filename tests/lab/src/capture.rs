//! How much crossed the link, between two moments.

use crate::emulator::{Link, LinkStats};

/// A measurement that began when it was made; other measurements are not disturbed.
#[derive(Debug)]
pub struct Capture<'a> {
    link: &'a Link,
    before: LinkStats,
}

impl<'a> Capture<'a> {
    /// Begins to measure.
    pub fn begin(link: &'a Link) -> Self {
        Self {
            link,
            before: link.stats(),
        }
    }

    /// Bytes at IP level that both directions have put on the wire since.
    ///
    /// The link's counters must not have been reset meanwhile.
    pub fn bytes(&self) -> u64 {
        self.link.stats().sent_bytes() - self.before.sent_bytes()
    }

    /// Packets that both directions have put on the wire since.
    pub fn packets(&self) -> u64 {
        self.link.stats().sent_packets() - self.before.sent_packets()
    }

    /// The same, by direction: (A to B, B to A).
    pub fn bytes_each_way(&self) -> (u64, u64) {
        let now = self.link.stats();
        (
            now.a_to_b.sent.bytes - self.before.a_to_b.sent.bytes,
            now.b_to_a.sent.bytes - self.before.b_to_a.sent.bytes,
        )
    }
}
