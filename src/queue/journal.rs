//! What a peer's store is asked to do, as plain data.
//!
//! The relay decides what must be durable and gives it as [`Batch`]es; the store carries out each batch whole or
//! not at all, in order, and answers when it is on disk. The simulator's disk does the same, and loses
//! what it had not answered for.

use bytes::Bytes;

use crate::codec::position::{Epoch, Received, Seq};

/// One change.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Change {
    /// Writes a spool slot. A cast that is still open is written again as it grows.
    PutSpool { seq: Seq, entry: Bytes },
    /// The peer has stored these.
    DropSpool { upto: Seq, beyond: Vec<Seq> },
    /// Stores an entry that has crossed; `seq` is the peer's number.
    PutInbox { seq: Seq, entry: Bytes },
    /// `copies` of the entry's copies (in the order of its recipients, bit k for recipient k) are about to be written to a leg.
    /// Stored before the write, so that a killed process does not write them twice.
    MarkInbox { seq: Seq, given: Vec<u8> },
    /// Every copy is with the local server.
    DropInbox { seq: Seq },
    /// The position, in the same batch as the entries it covers.
    SetReceived(Received),
}

/// Changes that become durable together.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Batch {
    /// Counts up from 1 in each life of the process.
    pub number: u64,
    pub changes: Vec<Change>,
}

/// How much a store holds; bytes are those of the entries.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Levels {
    pub spool_entries: u64,
    pub spool_bytes: u64,
    pub inbox_entries: u64,
    pub inbox_bytes: u64,
}

/// What a store knows when it is opened.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Opening {
    pub epoch: Epoch,
    /// The oldest spool entry still held, if any, and the last number ever given out.
    pub spool_first: Option<Seq>,
    pub spool_last: Seq,
    pub levels: Levels,
    pub received: Received,
}

/// A slot read back.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Slot {
    pub seq: Seq,
    pub entry: Bytes,
    /// Of an inbox slot: the copies marked as given, see [`Change::MarkInbox`]. Empty if none.
    pub given: Vec<u8>,
}
