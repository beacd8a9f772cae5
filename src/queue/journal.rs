//! What a peer's store is asked to do, as plain data.
//!
//! The relay decides what must be durable and gives it as [`Batch`]es; the store carries out each batch whole or
//! not at all, in order, and answers when it is on disk. The simulator's disk does the same, and loses
//! what it had not answered for: that is [`Model`].
//!
//! After a crash a store holds the changes of the batches 1 to k, for some k. Every answered batch is among them, with one
//! exception that is harmless: batches after the last that [matters](Batch::matters), which only trim the spool, may come
//! undone (see [`Change::DropSpool`]).

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::{
    codec::position::{Epoch, Received, Seq},
    time::Wall,
};

/// One change.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Change {
    /// Writes a spool slot. A cast that is still open is written again as it grows; `accepted` stays when its first copy was.
    PutSpool { seq: Seq, accepted: Wall, entry: Bytes },
    /// The peer has stored these: every slot up to `upto`, and those of `beyond`. What is not there is passed over.
    ///
    /// A trim may come undone in a crash, because it costs nothing: the slots are offered again, and the peer's position, which it
    /// tells at every hello, drops them again. No answer may be built on a trim being durable.
    DropSpool { upto: Seq, beyond: Vec<Seq> },
    /// Stores an entry that has crossed, under a number of our own: arrivals are counted, and a peer that lost its disk may start
    /// again from 1. The slot must be free: to write over an entry that the local server has not got would be to lose it, so a store
    /// refuses that and stops.
    PutInbox { seq: Seq, entry: Bytes },
    /// All copies of the entry, in the order of its recipients (bit k for recipient k), that were or are about to be written to a
    /// leg. The set is stored in place of the one before; of an entry that is not there, nothing is stored.
    /// Stored before the write, so that a killed process does not write them twice. In a batch that was not answered, a mark alone may come
    /// undone: nothing was written for it.
    MarkInbox { seq: Seq, given: Vec<u8> },
    /// Every copy is with the local server.
    DropInbox { seq: Seq },
    /// The position, in the same batch as the entries it covers.
    SetReceived(Received),
    /// Keeps a row of the rooms' state, in place of the one with this key. What key and value mean is known to the mirror alone.
    ///
    /// Rows are small things that are read together at the next opening, so they are bounded ([`STATE_KEY_BYTES_MAX`],
    /// [`STATE_VALUE_BYTES_MAX`], and [`STATE_BYTES_MAX`] for all): who writes them counts with [`state_bytes`], because a store refuses
    /// what is beyond and stops.
    ///
    /// Of a batch that was not answered, the state may be there although its marks in the inbox were taken back: it must not say that a
    /// copy was given.
    PutState { key: Bytes, value: Bytes },
    /// Of a key that is not there, nothing is dropped.
    DropState { key: Bytes },
}

/// Bytes of a key: a full JID has at most 3071 (RFC 7622 §3.1), and there is room for a word or two beside it.
pub const STATE_KEY_BYTES_MAX: usize = 4 << 10;

/// Bytes of a value: twice the largest stanza that a server takes as shipped.
pub const STATE_VALUE_BYTES_MAX: usize = 1 << 20;

/// All rows together, by [`state_bytes`]: 100 rooms with 1000 occupants and 500 bytes each fill half of it. It bounds how long an opening
/// takes (at this bound 0.6 to 3 s in an unoptimized build, for large to empty rows), and the memory after it.
pub const STATE_BYTES_MAX: u64 = 128 << 20;

/// Two handles and a place in a map: what a row costs in memory beside its content.
const STATE_ROW_BYTES: u64 = 128;

/// What a row with a key and a value of these lengths counts towards [`STATE_BYTES_MAX`].
pub const fn state_bytes(key: usize, value: usize) -> u64 {
    STATE_ROW_BYTES + key as u64 + value as u64
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

impl Batch {
    /// Whether its loss would lose or double anything. A batch that only trims the spool does not matter in this sense: it may be
    /// answered before it is on disk, and be committed together with a later one.
    pub fn matters(&self) -> bool {
        self.changes.iter().any(|change| match change {
            Change::DropSpool { .. } => false,
            // A lost mark or drop would deliver twice; a lost position would ask the peer for what it has already let go; lost state
            // would show a room as it was before the entries that are durable.
            Change::PutSpool { .. }
            | Change::PutInbox { .. }
            | Change::MarkInbox { .. }
            | Change::DropInbox { .. }
            | Change::SetReceived(_)
            | Change::PutState { .. }
            | Change::DropState { .. } => true,
        })
    }
}

/// What a store knows when it is opened.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Opening {
    pub epoch: Epoch,
    /// The oldest spool entry still held, if any, and the last number ever given out (also when the spool is empty).
    pub spool_first: Option<Seq>,
    pub spool_last: Seq,
    /// Of the oldest: see [`Slot::accepted`].
    pub spool_since: Option<Wall>,
    pub levels: Levels,
    /// The last number in the inbox; 0 if it is empty.
    pub inbox_last: Seq,
    pub received: Received,
    /// All rows of the rooms' state.
    pub state: BTreeMap<Bytes, Bytes>,
}

/// A slot read back.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Slot {
    pub seq: Seq,
    /// Of a spool slot: when it was accepted. `None` if it was written by a narrows that did not note it.
    pub accepted: Option<Wall>,
    pub entry: Bytes,
    /// Of an inbox slot: the copies marked as given, see [`Change::MarkInbox`]. Empty if none.
    pub given: Vec<u8>,
}

/// A store without a disk: what a store must do, in the simplest form that does it.
///
/// The simulator runs relays on it, and the real store is compared with it. It is two stores: what reads see (all that was applied),
/// and what a [crash](Model::crash) leaves (all that was committed).
#[derive(Clone, Debug)]
pub struct Model {
    seen: Tables,
    durable: Tables,
    /// Applied, not yet durable.
    pending: Vec<Batch>,
}

#[derive(Clone, Debug)]
struct Tables {
    epoch: Epoch,
    spool: BTreeMap<Seq, (Wall, Bytes)>,
    spool_last: Seq,
    inbox: BTreeMap<Seq, (Bytes, Vec<u8>)>,
    received: Received,
    state: BTreeMap<Bytes, Bytes>,
    state_bytes: u64,
}

impl Model {
    /// A new, empty store.
    pub fn new(epoch: Epoch) -> Self {
        let empty = Tables {
            epoch,
            spool: BTreeMap::new(),
            spool_last: Seq(0),
            inbox: BTreeMap::new(),
            received: Received::default(),
            state: BTreeMap::new(),
            state_bytes: 0,
        };
        Self {
            seen: empty.clone(),
            durable: empty,
            pending: Vec::new(),
        }
    }

    /// Carries out a batch: reads see it, a crash undoes it.
    ///
    /// Panics where a store would refuse and stop ([`Change::PutInbox`], [`Change::PutState`]): in a simulation that is a bug found.
    pub fn apply(&mut self, batch: Batch) {
        for change in &batch.changes {
            self.seen.carry_out(change);
        }
        self.pending.push(batch);
    }

    /// Makes all batches up to this number durable. What matters may be answered from here on; what does not, at any time.
    pub fn commit(&mut self, upto: u64) {
        let count = self.pending.partition_point(|batch| batch.number <= upto);
        for batch in self.pending.drain(..count) {
            for change in &batch.changes {
                self.durable.carry_out(change);
            }
        }
    }

    /// Power is gone: what was not committed is undone. The numbers of batches may start again from 1.
    pub fn crash(&mut self) {
        self.pending.clear();
        self.seen = self.durable.clone();
    }

    pub fn opening(&self) -> Opening {
        let Tables {
            epoch,
            spool,
            spool_last,
            inbox,
            received,
            state,
            state_bytes: _,
        } = &self.seen;
        Opening {
            epoch: *epoch,
            spool_first: spool.keys().next().copied(),
            spool_last: *spool_last,
            spool_since: spool.values().next().map(|(accepted, _)| *accepted),
            levels: Levels {
                spool_entries: spool.len() as u64,
                spool_bytes: spool.values().map(|(_, entry)| entry.len() as u64).sum(),
                inbox_entries: inbox.len() as u64,
                inbox_bytes: inbox.values().map(|(entry, _)| entry.len() as u64).sum(),
            },
            inbox_last: inbox.keys().next_back().copied().unwrap_or_default(),
            received: received.clone(),
            state: state.clone(),
        }
    }

    /// The slots from `from` on, and whether none follows them. At least one is read if there is one and `entries_max` is not 0,
    /// however large; apart from that, both limits hold.
    pub fn read_spool(&self, from: Seq, entries_max: usize, bytes_max: usize) -> (Vec<Slot>, bool) {
        let slots = self.seen.spool.range(from..).map(|(&seq, (accepted, entry))| Slot {
            seq,
            accepted: Some(*accepted),
            entry: entry.clone(),
            given: Vec::new(),
        });
        take(slots, entries_max, bytes_max)
    }

    /// As [`Model::read_spool`].
    pub fn read_inbox(&self, from: Seq, entries_max: usize, bytes_max: usize) -> (Vec<Slot>, bool) {
        let slots = self.seen.inbox.range(from..).map(|(&seq, (entry, given))| Slot {
            seq,
            accepted: None,
            entry: entry.clone(),
            given: given.clone(),
        });
        take(slots, entries_max, bytes_max)
    }
}

impl Tables {
    fn carry_out(&mut self, change: &Change) {
        match change {
            Change::PutSpool { seq, accepted, entry } => {
                self.spool.insert(*seq, (*accepted, entry.clone()));
                self.spool_last = self.spool_last.max(*seq);
            }
            Change::DropSpool { upto, beyond } => {
                while let Some(first) = self.spool.first_entry()
                    && first.key() <= upto
                {
                    first.remove();
                }
                for seq in beyond {
                    self.spool.remove(seq);
                }
            }
            Change::PutInbox { seq, entry } => {
                let before = self.inbox.insert(*seq, (entry.clone(), Vec::new()));
                assert!(before.is_none(), "inbox slot {seq:?} was not free");
            }
            Change::MarkInbox { seq, given } => {
                if let Some((_, before)) = self.inbox.get_mut(seq) {
                    before.clone_from(given);
                }
            }
            Change::DropInbox { seq } => {
                self.inbox.remove(seq);
            }
            Change::SetReceived(received) => self.received.clone_from(received),
            Change::PutState { key, value } => {
                assert!(key.len() <= STATE_KEY_BYTES_MAX, "the key is too long");
                assert!(value.len() <= STATE_VALUE_BYTES_MAX, "the value is too long");
                self.drop_state(key);
                self.state_bytes += state_bytes(key.len(), value.len());
                assert!(self.state_bytes <= STATE_BYTES_MAX, "there is too much state");
                self.state.insert(key.clone(), value.clone());
            }
            Change::DropState { key } => self.drop_state(key),
        }
    }

    fn drop_state(&mut self, key: &Bytes) {
        if let Some(value) = self.state.remove(key) {
            self.state_bytes -= state_bytes(key.len(), value.len());
        }
    }
}

fn take(mut slots: impl Iterator<Item = Slot>, entries_max: usize, bytes_max: usize) -> (Vec<Slot>, bool) {
    let mut taken = Vec::new();
    let mut bytes = 0;
    loop {
        let Some(slot) = slots.next() else {
            return (taken, true);
        };
        let over = !taken.is_empty() && bytes + slot.entry.len() > bytes_max;
        if taken.len() >= entries_max || over {
            return (taken, false);
        }
        bytes += slot.entry.len();
        taken.push(slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(number: u64, seq: u64) -> Batch {
        Batch {
            number,
            changes: vec![Change::PutSpool {
                seq: Seq(seq),
                accepted: Wall(0),
                entry: Bytes::from_static(b"entry"),
            }],
        }
    }

    fn seqs(read: (Vec<Slot>, bool)) -> (Vec<u64>, bool) {
        (read.0.iter().map(|slot| slot.seq.0).collect(), read.1)
    }

    /// A crash leaves what was committed, no less and no more, and reads see what was applied.
    #[test]
    fn crash_undoes_the_uncommitted() {
        let mut model = Model::new(Epoch(7));
        model.apply(put(1, 1));
        model.apply(put(2, 2));
        model.commit(1);
        assert_eq!(seqs(model.read_spool(Seq(0), 9, 99)), (vec![1, 2], true));
        model.crash();
        assert_eq!(seqs(model.read_spool(Seq(0), 9, 99)), (vec![1], true));
        assert_eq!(model.opening().spool_last, Seq(1));
    }

    /// Numbering goes on where it was when nothing is left in the spool.
    #[test]
    fn last_number_outlives_its_entry() {
        let mut model = Model::new(Epoch(7));
        model.apply(put(1, 1));
        let trim = Batch {
            number: 2,
            changes: vec![Change::DropSpool {
                upto: Seq(u64::MAX),
                beyond: vec![],
            }],
        };
        assert!(!trim.matters());
        model.apply(trim);
        assert_eq!(model.opening().spool_first, None);
        assert_eq!(model.opening().spool_last, Seq(1));
    }

    /// State is replaced and dropped by its key, commits with the rest of its batch, and goes with it in a crash.
    #[test]
    fn state_is_kept_by_key() {
        let put_state = |number, value| Batch {
            number,
            changes: vec![Change::PutState {
                key: Bytes::from_static(b"room"),
                value: Bytes::from_static(value),
            }],
        };
        let state = |model: &Model| model.opening().state.get(&b"room"[..]).cloned();
        let mut model = Model::new(Epoch(7));
        model.apply(put_state(1, b"first"));
        model.apply(put_state(2, b"second"));
        model.commit(1);
        assert_eq!(state(&model), Some(Bytes::from_static(b"second")));
        model.crash();
        assert_eq!(state(&model), Some(Bytes::from_static(b"first")));
        let drop = Batch {
            number: 1,
            changes: vec![Change::DropState {
                key: Bytes::from_static(b"room"),
            }],
        };
        assert!(drop.matters() && put_state(1, b"first").matters());
        model.apply(drop);
        assert_eq!(state(&model), None);
    }

    /// A read stops at either limit, says whether more follows, and is never stuck before a large entry.
    #[test]
    fn reads_within_limits_but_never_nothing() {
        let mut model = Model::new(Epoch(7));
        for seq in 1..=3 {
            model.apply(put(seq, seq));
        }
        assert_eq!(seqs(model.read_spool(Seq(1), 2, 99)), (vec![1, 2], false));
        assert_eq!(seqs(model.read_spool(Seq(2), 9, 9)), (vec![2], false));
        assert_eq!(seqs(model.read_spool(Seq(3), 1, 0)), (vec![3], true));
        assert_eq!(seqs(model.read_spool(Seq(1), 0, 99)), (vec![], false));
    }
}
