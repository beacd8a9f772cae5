//! What plain S2S would have cost behind a compressor that remembers.
//!
//! To say that narrows saves against plain S2S is cheap: most of it any compressor would save as well. So the same stanzas go through
//! one, as a server with stream compression (XEP-0138) would send them: each copy alone, flushed after each. It is given a sample, in
//! stretches so long that what it remembers counts, and its memory is kept from one stretch to the next.

use super::RelayStats;
use crate::codec::compress::Compressor;

/// Of so many bytes of stanzas …
const PERIOD_BYTES: u64 = 512 * 1024;

/// … this many are sampled, from the first on: all of what is said on a quiet day, and an eighth of the work on a busy one.
const STRETCH_BYTES: u64 = 64 * 1024;

#[derive(Debug, Default)]
pub enum Plain {
    /// Nothing has been said. A compressor takes memory, and not every peer speaks.
    #[default]
    Unused,
    Sampling {
        compressor: Compressor,
        /// Of the period.
        seen: u64,
        out: Vec<u8>,
    },
    /// It failed, for want of memory; nothing depends on it.
    Failed,
}

impl Plain {
    pub fn note(&mut self, stanza: &[u8], stats: &mut RelayStats) {
        if let Self::Unused = self {
            *self = match Compressor::of_a_server() {
                Ok(compressor) => Self::Sampling {
                    compressor,
                    seen: 0,
                    out: Vec::new(),
                },
                Err(_) => Self::Failed,
            };
        }
        let Self::Sampling { compressor, seen, out } = self else {
            return;
        };
        let bytes = stanza.len() as u64;
        let sampled = *seen < STRETCH_BYTES;
        *seen = if *seen + bytes < PERIOD_BYTES { *seen + bytes } else { 0 };
        if !sampled {
            return;
        }
        out.clear();
        match compressor.compress(stanza, out) {
            Ok(()) => {
                stats.sampled_bytes += bytes;
                stats.sampled_compressed_bytes += out.len() as u64;
            }
            Err(_) => *self = Self::Failed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of much the beginning of each period is sampled, and copies of one message cost little after the first.
    #[test]
    fn a_part_is_sampled() {
        let (mut plain, mut stats) = (Plain::default(), RelayStats::default());
        let count = 4 * PERIOD_BYTES / 256;
        for n in 0..count {
            let stanza = format!(
                "<message to='user{:04}@b.example'>{}</message>",
                n % 1000,
                "x".repeat(213)
            );
            assert_eq!(stanza.len(), 256);
            plain.note(stanza.as_bytes(), &mut stats);
        }
        assert_eq!(stats.sampled_bytes, 4 * STRETCH_BYTES);
        assert!(
            (1..STRETCH_BYTES / 2).contains(&stats.sampled_compressed_bytes),
            "{stats:?}"
        );
    }
}
