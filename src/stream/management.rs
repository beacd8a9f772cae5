//! Stream management (XEP-0198): the counters of both directions, without resumption.
//!
//! On the wire a count is modulo 2³²; here it is a `u64` that never wraps, so only the two conversions can be wrong.
//! Resumption is not used: neither server offers it between servers, and what is on disk is sent again anyway.

use std::collections::VecDeque;

/// What the server sends us and wants acknowledged. Counts stanzas of the whole stream.
///
/// *Handled* means committed to disk: the server forgets a stanza once we acknowledge it.
#[derive(Debug)]
pub struct Inbound {
    /// Stanzas before `<enable/>`: they do not count.
    before: u64,
    committed: u64,
    acked: u64,
    /// How many stanzas had come before each unanswered `<r/>`, ascending.
    requests: VecDeque<u64>,
}

impl Inbound {
    /// On `<enable/>`, after `received` stanzas, of which `committed` are on disk.
    pub fn new(received: u64, committed: u64) -> Self {
        Self {
            before: received,
            committed,
            acked: received,
            requests: VecDeque::new(),
        }
    }

    /// On `<r/>` after `received` stanzas: the `h` to answer now, if all of them are on disk.
    pub fn on_request(&mut self, received: u64) -> Option<u32> {
        if self.committed >= received {
            return Some(self.acknowledge());
        }
        // Prosody has one request open at a time. If somebody has many, the later ones share an answer.
        if self.requests.len() == REQUESTS_MAX {
            self.requests.pop_back();
        }
        self.requests.push_back(received);
        None
    }

    /// Stanzas 1..=`upto` are on disk: the `h` to send, if an open request now has its answer. One answers all that it
    /// covers, for it is cumulative.
    pub fn on_committed(&mut self, upto: u64) -> Option<u32> {
        self.committed = self.committed.max(upto);
        let open = self.requests.len();
        while self
            .requests
            .front()
            .is_some_and(|received| *received <= self.committed)
        {
            self.requests.pop_front();
        }
        (self.requests.len() < open).then(|| self.acknowledge())
    }

    /// Before the stream is closed: the `h` to send without being asked, if it says anything new.
    pub fn on_close(&mut self) -> Option<u32> {
        (self.committed > self.acked).then(|| self.acknowledge())
    }

    fn acknowledge(&mut self) -> u32 {
        self.acked = self.acked.max(self.committed);
        (self.committed.saturating_sub(self.before)) as u32
    }
}

/// What we send and the server acknowledges. Counts from `<enable/>`.
#[derive(Debug, Default)]
pub struct Outbound {
    sent: u64,
    acked: u64,
}

impl Outbound {
    pub fn on_sent(&mut self, stanzas: u64) {
        self.sent += stanzas;
    }

    /// How many stanzas the server has acknowledged by now.
    pub fn on_ack(&mut self, h: u32) -> Result<u64, AckError> {
        let acked = self.acked as u32;
        let progress = u64::from(h.wrapping_sub(acked));
        if progress > self.outstanding() {
            // Half the circle decides which of the two it was; both end the stream.
            return Err(if acked.wrapping_sub(h) <= u32::MAX / 2 {
                AckError::Regressed { h, acked }
            } else {
                AckError::TooHigh {
                    h,
                    sent: self.sent as u32,
                }
            });
        }
        self.acked += progress;
        Ok(self.acked)
    }

    pub fn acked(&self) -> u64 {
        self.acked
    }

    pub fn outstanding(&self) -> u64 {
        self.sent - self.acked
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum AckError {
    /// XEP-0198 §6: `handled-count-too-high`.
    #[error("h is {h}, but only {sent} were sent")]
    TooHigh { h: u32, sent: u32 },
    #[error("h is {h}, but was {acked} before")]
    Regressed { h: u32, acked: u32 },
}

/// Each is 8 bytes of ours for some 25 of the server's.
const REQUESTS_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    /// `h` is what is on disk, counted from `<enable/>`, and never what was only received.
    #[test]
    fn acknowledges_only_what_is_committed() {
        let mut inbound = Inbound::new(5, 3);
        assert_eq!(
            inbound.on_request(5),
            None,
            "two from before enable are not on disk yet"
        );
        assert_eq!(inbound.on_committed(4), None);
        assert_eq!(inbound.on_committed(5), Some(0));
        assert_eq!(inbound.on_request(5), Some(0));
        assert_eq!(inbound.on_request(7), None);
        assert_eq!(inbound.on_request(9), None);
        assert_eq!(inbound.on_committed(6), None);
        assert_eq!(
            inbound.on_committed(8),
            Some(3),
            "the first is answered, with all that is committed"
        );
        assert_eq!(inbound.on_committed(9), Some(4));
        assert_eq!(inbound.on_committed(9), None);
        assert_eq!(inbound.on_committed(2), None, "commits do not go back");
        assert_eq!(inbound.on_close(), None);
        inbound.on_committed(10);
        assert_eq!(inbound.on_close(), Some(5));
        assert_eq!(inbound.on_close(), None);
    }

    /// However many requests are open, the queue of them is bounded, and each is answered in the end.
    #[test]
    fn many_requests_share_answers() {
        let mut inbound = Inbound::new(0, 0);
        for received in 1..=1000 {
            assert_eq!(inbound.on_request(received), None);
        }
        assert_eq!(inbound.requests.len(), REQUESTS_MAX);
        assert_eq!(inbound.on_committed(1), Some(1));
        assert_eq!(inbound.on_committed(999), Some(999));
        assert_eq!(inbound.on_committed(1000), Some(1000));
        assert!(inbound.requests.is_empty());
    }

    /// The count goes from 2³²−1 to 0 in both directions (XEP-0198 §4).
    #[test]
    fn counts_wrap() {
        let mut inbound = Inbound::new(0, 0);
        inbound.on_committed((1 << 32) - 1);
        assert_eq!(inbound.on_request((1 << 32) - 1), Some(u32::MAX));
        inbound.on_committed(1 << 32);
        assert_eq!(inbound.on_request(1 << 32), Some(0));

        let mut outbound = Outbound {
            sent: (1 << 32) - 1,
            acked: (1 << 32) - 2,
        };
        assert_eq!(outbound.on_ack(u32::MAX), Ok((1 << 32) - 1));
        assert_eq!(outbound.on_ack(0), Err(AckError::TooHigh { h: 0, sent: u32::MAX }));
        outbound.on_sent(2);
        assert_eq!(outbound.on_ack(0), Ok(1 << 32));
        assert_eq!(outbound.on_ack(1), Ok((1 << 32) + 1));
        assert_eq!(outbound.outstanding(), 0);
        assert_eq!(
            outbound.on_ack(u32::MAX),
            Err(AckError::Regressed { h: u32::MAX, acked: 1 })
        );
    }

    /// An `h` beyond what was sent or below what was acknowledged is an error, and changes nothing.
    #[test]
    fn impossible_acks_are_refused() {
        let mut outbound = Outbound::default();
        assert_eq!(outbound.on_ack(0), Ok(0));
        assert_eq!(outbound.on_ack(1), Err(AckError::TooHigh { h: 1, sent: 0 }));
        outbound.on_sent(3);
        assert_eq!(outbound.on_ack(2), Ok(2));
        assert_eq!(outbound.on_ack(2), Ok(2), "the same again is no news and no error");
        assert_eq!(outbound.on_ack(1), Err(AckError::Regressed { h: 1, acked: 2 }));
        assert_eq!(outbound.on_ack(4), Err(AckError::TooHigh { h: 4, sent: 3 }));
        assert_eq!((outbound.acked(), outbound.outstanding()), (2, 1));
    }
}
