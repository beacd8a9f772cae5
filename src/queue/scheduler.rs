//! Which entry, and how much of it, crosses next.
//!
//! The scheduler holds the part of the spool that is in memory: slots in the order of their numbers, sorted into flows.
//! Within a flow nothing overtakes; flows take turns, and an entry too large for one frame crosses piece by piece, one piece
//! a turn, so that a chat line waits for one piece at most. What keeps it honest:
//!
//! - Only a slot that is sealed *and* on disk is given out: after a crash the peer never knows more of our numbering than we do.
//! - Memory is bounded by [`Scheduler::has_room`]; the rest of the spool stays on disk until it is asked for.
//! - The peer keeps track of at most [`Received::BEYOND_MAX`] entries that overtook another; then it is that one's turn.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use super::collapse::Flow;
use crate::{
    codec::{
        entry::Entry,
        position::{Received, Seq},
    },
    time::Mono,
};

/// What is given to the link in one go.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Piece {
    Whole { seq: Seq, entry: Entry, accepted: Mono },
    Part { seq: Seq, encoded: Bytes, offset: usize },
}

#[derive(Debug)]
enum Slot {
    /// Still growing: it holds its place in the flow.
    Open,
    Ready {
        entry: Entry,
        /// The batch with its last write.
        batch: u64,
        accepted: Mono,
    },
    /// Parts of it have been given out.
    Split { encoded: Bytes, offset: usize },
}

#[derive(Debug)]
pub struct Scheduler {
    bytes_max: usize,
    part_bytes_max: usize,
    flows: BTreeMap<Flow, VecDeque<(Seq, Slot)>>,
    /// Flows in the order of their turns.
    turns: VecDeque<Flow>,
    /// Numbers up to this one are here, were given out, or are done with.
    upto: Seq,
    bytes: usize,
    /// Given out in parts and not yet through: what others may not overtake by too much.
    split: BTreeMap<Seq, ()>,
}

impl Scheduler {
    /// `bytes_max` is what may be in memory; an entry whose encoding is over `part_bytes_max` crosses in parts.
    pub fn new(bytes_max: usize, part_bytes_max: usize) -> Self {
        Self {
            bytes_max,
            part_bytes_max,
            flows: BTreeMap::new(),
            turns: VecDeque::new(),
            upto: Seq(0),
            bytes: 0,
            split: BTreeMap::new(),
        }
    }

    /// Forgets everything and starts after `upto`: the peer has told what it holds.
    pub fn restart(&mut self, upto: Seq) {
        *self = Self::new(self.bytes_max, self.part_bytes_max);
        self.upto = upto;
    }

    /// The number that is taken in next.
    pub fn wants(&self) -> Seq {
        Seq(self.upto.0 + 1)
    }

    pub fn has_room(&self) -> bool {
        self.bytes < self.bytes_max
    }

    /// Passes over the wanted number: the peer has it already, or it is void.
    pub fn skip(&mut self, seq: Seq) {
        debug_assert_eq!(seq, self.wants());
        self.upto = seq;
    }

    /// Takes the wanted number's place in its flow, to be filled when its group is sealed.
    pub fn reserve(&mut self, flow: Flow, seq: Seq) {
        self.push(flow, seq, Slot::Open);
    }

    /// Fills a reserved place. Without one the entry stays on disk for now.
    pub fn fill(&mut self, flow: &Flow, seq: Seq, entry: Entry, batch: u64, accepted: Mono) {
        let Some(slots) = self.flows.get_mut(flow) else { return };
        if let Some((_, slot)) = slots.iter_mut().find(|(at, _)| *at == seq) {
            self.bytes += size(&entry);
            *slot = Slot::Ready { entry, batch, accepted };
        }
    }

    /// Takes in the wanted number as read back from the disk.
    pub fn load(&mut self, flow: Flow, seq: Seq, entry: Entry, accepted: Mono) {
        self.bytes += size(&entry);
        self.push(
            flow,
            seq,
            Slot::Ready {
                entry,
                batch: 0,
                accepted,
            },
        );
    }

    fn push(&mut self, flow: Flow, seq: Seq, slot: Slot) {
        debug_assert_eq!(seq, self.wants());
        self.upto = seq;
        let slots = self.flows.entry(flow.clone()).or_default();
        if slots.is_empty() {
            self.turns.push_back(flow);
        }
        slots.push_back((seq, slot));
    }

    /// The next piece, given that batches up to `committed` are on disk and the peer has confirmed everything up to `acked`.
    pub fn next(&mut self, committed: u64, acked: Seq) -> Option<Piece> {
        for _ in 0..self.turns.len() {
            let flow = self.turns.pop_front()?;
            let piece = self.take(&flow, committed, acked);
            match self.flows.get(&flow) {
                Some(slots) if slots.is_empty() => {
                    self.flows.remove(&flow);
                }
                Some(_) => self.turns.push_back(flow),
                None => {}
            }
            if piece.is_some() {
                return piece;
            }
        }
        None
    }

    fn take(&mut self, flow: &Flow, committed: u64, acked: Seq) -> Option<Piece> {
        let slots = self.flows.get_mut(flow)?;
        let (seq, slot) = slots.front_mut()?;
        let seq = *seq;
        match slot {
            Slot::Open => None,
            Slot::Ready { batch, .. } if *batch > committed => None,
            Slot::Ready { entry, accepted, .. } => {
                let overtakes = self.split.first_key_value().is_some_and(|(&first, ())| first < seq);
                if overtakes && seq.0 > acked.0 + Received::BEYOND_MAX as u64 {
                    return None;
                }
                let accepted = *accepted;
                if size(entry) > self.part_bytes_max {
                    self.bytes -= size(entry);
                    let encoded = entry.encode();
                    self.bytes += encoded.len();
                    *slot = Slot::Split { encoded, offset: 0 };
                    self.split.insert(seq, ());
                    return self.take(flow, committed, acked);
                }
                self.bytes -= size(entry);
                let Some((seq, Slot::Ready { entry, .. })) = slots.pop_front() else {
                    unreachable!("the slot was looked at above");
                };
                Some(Piece::Whole { seq, entry, accepted })
            }
            Slot::Split { encoded, offset } => {
                let piece = Piece::Part {
                    seq,
                    encoded: encoded.clone(),
                    offset: *offset,
                };
                *offset += self.part_bytes_max.min(encoded.len() - *offset);
                if *offset == encoded.len() {
                    self.bytes -= encoded.len();
                    self.split.remove(&seq);
                    slots.pop_front();
                }
                Some(piece)
            }
        }
    }

    /// Whether a call of [`Self::next`] would give something.
    pub fn is_ready(&self, committed: u64, acked: Seq) -> bool {
        self.flows.values().any(|slots| match slots.front() {
            Some((_, Slot::Split { .. })) => true,
            Some((seq, Slot::Ready { batch, .. })) => {
                let overtakes = self.split.first_key_value().is_some_and(|(&first, ())| first < *seq);
                *batch <= committed && !(overtakes && seq.0 > acked.0 + Received::BEYOND_MAX as u64)
            }
            Some((_, Slot::Open)) | None => false,
        })
    }
}

/// What an entry costs in memory, and about what its encoding will.
fn size(entry: &Entry) -> usize {
    match entry {
        Entry::Cast(cast) => cast.template.len() + cast.recipients.iter().map(|to| to.len() + 2).sum::<usize>(),
        Entry::Void => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::entry::Cast;

    fn entry(bytes: usize) -> Entry {
        Entry::Cast(Cast {
            template: vec![b'x'; bytes].into(),
            to_at: 1,
            recipients: vec![Bytes::from_static(b" to='b@b.example'")],
        })
    }

    fn scheduler() -> Scheduler {
        Scheduler::new(1 << 20, 1000)
    }

    fn seqs(scheduler: &mut Scheduler, committed: u64) -> Vec<u64> {
        std::iter::from_fn(|| scheduler.next(committed, Seq(0)))
            .map(|piece| match piece {
                Piece::Whole { seq, .. } | Piece::Part { seq, .. } => seq.0,
            })
            .collect()
    }

    /// A large entry of one sender shares the link with another sender's lines, piece by piece.
    #[test]
    fn a_large_entry_does_not_hold_up_another_flow() {
        let mut scheduler = scheduler();
        scheduler.load("big".into(), Seq(1), entry(2500), Mono::default());
        for seq in 2..=4 {
            scheduler.load("room".into(), Seq(seq), entry(10), Mono::default());
        }
        assert_eq!(seqs(&mut scheduler, 0), [1, 2, 1, 3, 1, 4]);
    }

    /// Within a flow a line waits for the large entry before it.
    #[test]
    fn nothing_overtakes_within_a_flow() {
        let mut scheduler = scheduler();
        scheduler.load("room".into(), Seq(1), entry(2500), Mono::default());
        scheduler.load("room".into(), Seq(2), entry(10), Mono::default());
        assert_eq!(seqs(&mut scheduler, 0), [1, 1, 1, 2]);
    }

    /// What is still growing, or not yet on disk, holds its place and does not cross.
    #[test]
    fn gives_out_only_what_is_sealed_and_on_disk() {
        let mut scheduler = scheduler();
        let room: Flow = "room".into();
        scheduler.reserve(room.clone(), Seq(1));
        scheduler.load("other".into(), Seq(2), entry(10), Mono::default());
        assert_eq!(seqs(&mut scheduler, 0), [2]);
        scheduler.fill(&room, Seq(1), entry(10), 7, Mono::default());
        assert_eq!(seqs(&mut scheduler, 6), []);
        assert!(!scheduler.is_ready(6, Seq(0)) && scheduler.is_ready(7, Seq(0)));
        assert_eq!(seqs(&mut scheduler, 7), [1]);
    }

    /// While a large entry is under way, only as many may overtake it as the peer can keep track of.
    #[test]
    fn overtaking_is_bounded() {
        let mut scheduler = scheduler();
        let lines = Received::BEYOND_MAX as u64 + 50;
        scheduler.load(
            "big".into(),
            Seq(1),
            entry(1000 * (lines as usize + 10)),
            Mono::default(),
        );
        for seq in 2..lines + 2 {
            scheduler.load("room".into(), Seq(seq), entry(10), Mono::default());
        }
        let order = seqs(&mut scheduler, 0);
        let last_big = order.iter().rposition(|&seq| seq == 1).unwrap();
        let overtaken = order[..last_big].iter().filter(|&&seq| seq != 1).count();
        assert_eq!(overtaken, Received::BEYOND_MAX - 1);
        assert_eq!(*order.last().unwrap(), lines + 1);
    }
}
