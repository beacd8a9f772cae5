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
