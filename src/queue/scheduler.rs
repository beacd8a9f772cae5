//! Which entry, and how much of it, crosses next.
//!
//! The scheduler holds the part of the spool that is in memory: slots in the order of their numbers, sorted into flows.
//! Within a flow nothing overtakes; flows take turns, and an entry too large for one frame crosses piece by piece, one piece
//! a turn, so that a chat line waits for one piece at most. What is small goes on in the same turn until it has taken about half of
//! that: what the link knows from before takes next to nothing as long as it comes in the same order. What keeps it honest:
//!
//! - Only a slot that is sealed *and* on disk is offered: after a crash the peer never knows more of our numbering than we do.
//! - Memory is bounded by [`Scheduler::has_room`]; the rest of the spool stays on disk until it is asked for.
//! - What the link does not take now stays in its place.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use super::collapse::Flow;
use crate::{
    codec::{entry::Entry, position::Seq},
    time::Mono,
};

/// What is offered to the link.
#[derive(Debug)]
pub enum Offer<'a> {
    Whole {
        seq: Seq,
        entry: &'a Entry,
        accepted: Mono,
    },
    /// From `offset` on, as much as it likes.
    Part {
        seq: Seq,
        encoded: &'a Bytes,
        offset: usize,
        accepted: Mono,
    },
}

/// After so many bytes it is another flow's turn: half a piece of what goes in parts (see
/// [`SessionConfig::fragment_bytes_max`](crate::link::session::SessionConfig::fragment_bytes_max)), since the last entry comes on top.
const TURN_BYTES: usize = 512;

/// What the link does with an offer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// The whole entry, which takes so many bytes on the link, or so many bytes of a part.
    Takes(usize),
    /// It does not take the entry whole: offer it in parts.
    InParts,
    /// Not this one now; perhaps another flow's.
    Blocked,
    /// Nothing more now.
    Full,
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
    /// It crosses in parts.
    Split {
        encoded: Bytes,
        offset: usize,
        accepted: Mono,
    },
}

#[derive(Debug)]
pub struct Scheduler {
    bytes_max: usize,
    flows: BTreeMap<Flow, VecDeque<(Seq, Slot)>>,
    /// Flows in the order of their turns.
    turns: VecDeque<Flow>,
    /// What the first of them has taken since its turn began.
    turn_bytes: usize,
    /// Numbers up to this one are here, were given out, or are done with.
    upto: Seq,
    bytes: usize,
}

impl Scheduler {
    /// `bytes_max` is what may be in memory.
    pub fn new(bytes_max: usize) -> Self {
        Self {
            bytes_max,
            flows: BTreeMap::new(),
            turns: VecDeque::new(),
            turn_bytes: 0,
            upto: Seq(0),
            bytes: 0,
        }
    }

    /// Forgets everything and starts after `upto`: the peer has told what it holds.
    pub fn restart(&mut self, upto: Seq) {
        *self = Self::new(self.bytes_max);
        self.upto = upto;
    }

    /// The number that is taken in next.
    pub fn wants(&self) -> Seq {
        Seq(self.upto.0 + 1)
    }

    pub fn has_room(&self) -> bool {
        self.bytes < self.bytes_max
    }

    /// Passes over the wanted number: the peer has it already.
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
        // A flow's slots ascend, and a room's backlog may be long.
        if let Ok(at) = slots.binary_search_by_key(&seq, |(at, _)| *at) {
            self.bytes += size(&entry);
            slots[at].1 = Slot::Ready { entry, batch, accepted };
        }
    }

    /// Takes in the wanted number as read back from the disk. `batch` is the one with its last write.
    pub fn load(&mut self, flow: Flow, seq: Seq, entry: Entry, batch: u64, accepted: Mono) {
        self.bytes += size(&entry);
        self.push(flow, seq, Slot::Ready { entry, batch, accepted });
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

    /// Offers flows' next pieces in turn, given that batches up to `committed` are on disk, until one is taken. `false` if
    /// none was.
    pub fn offer(&mut self, committed: u64, mut offer: impl FnMut(Offer<'_>) -> Answer) -> bool {
        for _ in 0..self.turns.len() {
            let Some(flow) = self.turns.pop_front() else {
                return false;
            };
            let Some(slots) = self.flows.get_mut(&flow) else {
                continue;
            };
            let answer = offer_first(slots, &mut self.bytes, committed, &mut offer);
            let goes_on = match answer {
                Answer::Takes(bytes) => {
                    self.turn_bytes += bytes;
                    self.turn_bytes < TURN_BYTES
                }
                Answer::Full => true,
                Answer::Blocked | Answer::InParts => false,
            };
            if !goes_on || slots.is_empty() {
                self.turn_bytes = 0;
            }
            if slots.is_empty() {
                self.flows.remove(&flow);
            } else if goes_on {
                self.turns.push_front(flow);
            } else {
                self.turns.push_back(flow);
            }
            match answer {
                Answer::Takes(_) => return true,
                Answer::Full => return false,
                Answer::Blocked | Answer::InParts => {}
            }
        }
        false
    }
}

/// Offers what stands first in a flow.
fn offer_first(
    slots: &mut VecDeque<(Seq, Slot)>,
    held_bytes: &mut usize,
    committed: u64,
    offer: &mut impl FnMut(Offer<'_>) -> Answer,
) -> Answer {
    let Some((seq, slot)) = slots.front_mut() else {
        return Answer::Blocked;
    };
    let seq = *seq;
    if let Slot::Ready { entry, batch, accepted } = slot {
        let accepted = *accepted;
        if *batch > committed {
            return Answer::Blocked;
        }
        match offer(Offer::Whole { seq, entry, accepted }) {
            Answer::Takes(bytes) => {
                *held_bytes -= size(entry);
                slots.pop_front();
                return Answer::Takes(bytes);
            }
            Answer::InParts => {
                *held_bytes -= size(entry);
                let encoded = entry.encode();
                *held_bytes += encoded.len();
                *slot = Slot::Split {
                    encoded,
                    offset: 0,
                    accepted,
                };
            }
            answer @ (Answer::Blocked | Answer::Full) => return answer,
        }
    }
    let Slot::Split {
        encoded,
        offset,
        accepted,
    } = slot
    else {
        return Answer::Blocked;
    };
    let answer = offer(Offer::Part {
        seq,
        encoded,
        offset: *offset,
        accepted: *accepted,
    });
    if let Answer::Takes(bytes) = answer {
        *offset += bytes;
        if *offset >= encoded.len() {
            *held_bytes -= encoded.len();
            slots.pop_front();
        }
    }
    answer
}

/// What an entry costs in memory, and about what its encoding will.
fn size(entry: &Entry) -> usize {
    match entry {
        Entry::Cast(cast) => cast.template.len() + cast.recipients.iter().map(|to| to.len() + 2).sum::<usize>(),
        // Its place in the queue.
        Entry::Void => size_of::<(Seq, Slot)>(),
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
        Scheduler::new(1 << 20)
    }

    /// A link that takes 1,000 bytes at a time.
    fn seqs(scheduler: &mut Scheduler, committed: u64) -> Vec<u64> {
        let mut seqs = Vec::new();
        while scheduler.offer(committed, |offer| match offer {
            Offer::Whole { entry, .. } if size(entry) > 1000 => Answer::InParts,
            Offer::Whole { seq, entry, .. } => {
                seqs.push(seq.0);
                Answer::Takes(size(entry))
            }
            Offer::Part {
                seq, encoded, offset, ..
            } => {
                seqs.push(seq.0);
                Answer::Takes((encoded.len() - offset).min(1000))
            }
        }) {}
        seqs
    }

    /// A large entry of one sender shares the link with another sender's lines, piece by piece.
    #[test]
    fn a_large_entry_does_not_hold_up_another_flow() {
        let mut scheduler = scheduler();
        scheduler.load("big".into(), Seq(1), entry(2500), 0, Mono::default());
        for seq in 2..=4 {
            scheduler.load("room".into(), Seq(seq), entry(TURN_BYTES), 0, Mono::default());
        }
        assert_eq!(seqs(&mut scheduler, 0), [1, 2, 1, 3, 1, 4]);
    }

    /// What is small goes on in the same turn until that has taken its bytes.
    #[test]
    fn a_turn_is_a_number_of_bytes() {
        let mut scheduler = scheduler();
        for seq in 1..=8 {
            let (flow, bytes) = if seq % 2 == 0 {
                ("one", 1)
            } else {
                ("two", TURN_BYTES / 2)
            };
            scheduler.load(flow.into(), Seq(seq), entry(bytes), 0, Mono::default());
        }
        assert_eq!(seqs(&mut scheduler, 0), [1, 3, 2, 4, 6, 8, 5, 7]);
    }

    /// Within a flow a line waits for the large entry before it.
    #[test]
    fn nothing_overtakes_within_a_flow() {
        let mut scheduler = scheduler();
        scheduler.load("room".into(), Seq(1), entry(2500), 0, Mono::default());
        scheduler.load("room".into(), Seq(2), entry(10), 0, Mono::default());
        assert_eq!(seqs(&mut scheduler, 0), [1, 1, 1, 2]);
    }

    /// What is still growing, or not yet on disk, holds its place and does not cross.
    #[test]
    fn offers_only_what_is_sealed_and_on_disk() {
        let mut scheduler = scheduler();
        let room: Flow = "room".into();
        scheduler.reserve(room.clone(), Seq(1));
        scheduler.load("other".into(), Seq(2), entry(10), 0, Mono::default());
        assert_eq!(seqs(&mut scheduler, 0), [2]);
        scheduler.fill(&room, Seq(1), entry(10), 7, Mono::default());
        assert!(seqs(&mut scheduler, 6).is_empty());
        assert_eq!(seqs(&mut scheduler, 7), [1]);
    }

    /// What the link cannot take now stays first in its flow; if the link is only blocked for it, others go.
    #[test]
    fn a_refused_offer_stays_in_its_place() {
        let mut scheduler = scheduler();
        scheduler.load("one".into(), Seq(1), entry(10), 0, Mono::default());
        scheduler.load("two".into(), Seq(2), entry(10), 0, Mono::default());
        assert!(!scheduler.offer(0, |_| Answer::Full));
        let mut offered = Vec::new();
        assert!(scheduler.offer(0, |offer| match offer {
            Offer::Whole { seq: Seq(1), .. } => Answer::Blocked,
            Offer::Whole { seq, .. } | Offer::Part { seq, .. } => {
                offered.push(seq.0);
                Answer::Takes(0)
            }
        }));
        assert_eq!(offered, [2]);
        assert_eq!(seqs(&mut scheduler, 0), [1]);
    }

    /// Memory is given back with the last byte of what crossed.
    #[test]
    fn memory_is_counted() {
        let mut scheduler = Scheduler::new(3000);
        scheduler.load("one".into(), Seq(1), entry(2000), 0, Mono::default());
        assert!(scheduler.has_room());
        scheduler.load("two".into(), Seq(2), entry(2000), 0, Mono::default());
        assert!(!scheduler.has_room());
        seqs(&mut scheduler, 0);
        assert_eq!(scheduler.bytes, 0);
    }
}
