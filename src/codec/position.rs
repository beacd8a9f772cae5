//! Where one direction of a link stands: numbers that both sides keep on disk.

/// The number of an entry in one direction of a link: dense, from 1, for the life of the sender's store.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Seq(pub u64);

/// Names one life of a store: made at random when the store is created, so that a peer notices a lost disk.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Epoch(pub u64);

/// What has arrived from the peer: everything up to `upto`, and `beyond` it these (ascending, at most [`Received::BEYOND_MAX`]).
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Received {
    /// Whose numbering this is.
    pub epoch: Epoch,
    pub upto: Seq,
    pub beyond: Vec<Seq>,
}

/// What became of a number that was to be added to a [`Received`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Added {
    New,
    /// It was there already.
    Known,
    /// It would be one too many beyond a gap; nothing has changed.
    Full,
}

impl Received {
    /// Entries that overtake a large one are this many at most; then the sender waits.
    pub const BEYOND_MAX: usize = 256;

    pub fn contains(&self, seq: Seq) -> bool {
        seq <= self.upto || self.beyond.binary_search(&seq).is_ok()
    }

    /// Whether everything in `other` is here too.
    pub fn covers(&self, other: &Self) -> bool {
        self.epoch == other.epoch && other.upto <= self.upto && other.beyond.iter().all(|seq| self.contains(*seq))
    }

    /// What [`Received::add`] would say.
    pub fn would_add(&self, seq: Seq) -> Added {
        if self.contains(seq) {
            Added::Known
        } else if self.is_next(seq) || self.beyond.len() < Self::BEYOND_MAX {
            Added::New
        } else {
            Added::Full
        }
    }

    /// Notes one more number, and closes the gap if it was the one that was missing.
    pub fn add(&mut self, seq: Seq) -> Added {
        let added = self.would_add(seq);
        if added == Added::New {
            if self.is_next(seq) {
                self.advance_to(seq);
            } else if let Err(at) = self.beyond.binary_search(&seq) {
                self.beyond.insert(at, seq);
            }
        }
        added
    }

    /// Everything up to `upto` counts as arrived.
    pub fn advance_to(&mut self, upto: Seq) {
        self.upto = self.upto.max(upto);
        let mut closed = 0;
        for seq in &self.beyond {
            if *seq > self.upto {
                if self.upto.0.checked_add(1) != Some(seq.0) {
                    break;
                }
                self.upto = *seq;
            }
            closed += 1;
        }
        self.beyond.drain(..closed);
    }

    /// The highest number here.
    pub fn last(&self) -> Seq {
        self.beyond.last().copied().unwrap_or(self.upto)
    }

    fn is_next(&self, seq: Seq) -> bool {
        self.upto.0.checked_add(1) == Some(seq.0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// In any order of arrival it holds the same numbers as a plain set would.
        #[test]
        fn agrees_with_a_plain_set(order in proptest::collection::vec(1u64..40, 0..80)) {
            let mut received = Received::default();
            let mut model = BTreeSet::new();
            for seq in order {
                let added = received.add(Seq(seq));
                prop_assert_eq!(added, if model.insert(seq) { Added::New } else { Added::Known });
                prop_assert!((1..41).all(|seq| received.contains(Seq(seq)) == model.contains(&seq)));
                prop_assert!(received.beyond.first().is_none_or(|first| first.0 > received.upto.0 + 1));
            }
        }
    }

    /// The gap is bounded, and the missing number is still taken.
    #[test]
    fn gap_is_bounded() {
        let mut received = Received::default();
        for seq in 0..Received::BEYOND_MAX as u64 {
            assert_eq!(received.add(Seq(seq + 2)), Added::New);
        }
        assert_eq!(received.add(Seq(1000)), Added::Full);
        assert_eq!(received.add(Seq(1)), Added::New);
        assert_eq!((received.upto, received.beyond.len()), (Seq(257), 0));
    }
}
