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

impl Received {
    /// Entries that overtake a large one are this many at most; then the sender waits.
    pub const BEYOND_MAX: usize = 256;
}

impl Received {
    /// Notes the arrival of `seq`; `false` if it had arrived before.
    pub fn note(&mut self, seq: Seq) -> bool {
        if seq <= self.upto {
            return false;
        }
        match self.beyond.binary_search(&seq) {
            Ok(_) => return false,
            Err(at) => self.beyond.insert(at, seq),
        }
        let contiguous = (1..).zip(&self.beyond).take_while(|(k, seq)| seq.0 == self.upto.0 + k).count();
        self.upto.0 += contiguous as u64;
        self.beyond.drain(..contiguous);
        true
    }

    pub fn contains(&self, seq: Seq) -> bool {
        seq <= self.upto || self.beyond.binary_search(&seq).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that come out of order are kept apart until the gap before them is filled.
    #[test]
    fn closes_gaps() {
        let mut received = Received::default();
        let news: Vec<bool> = [1, 3, 4, 3, 2, 1, 6].into_iter().map(|seq| received.note(Seq(seq))).collect();
        assert_eq!(news, [true, true, true, false, true, false, true]);
        assert_eq!((received.upto, received.beyond.clone()), (Seq(4), vec![Seq(6)]));
        assert!(received.contains(Seq(2)) && received.contains(Seq(6)) && !received.contains(Seq(5)));
    }
}
