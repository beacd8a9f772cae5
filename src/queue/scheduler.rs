//! Which entry, and how much of it, crosses next.
//!
//! The scheduler holds the part of the spool that is in memory: slots in the order of their numbers, sorted into tracks
//! ([`super::place`]). Classes share the link by their weights; who has been quiet does not wait for a round of the others, but goes next.
//! Within a class tracks take turns, and an entry too large for one frame crosses piece by piece, one piece
//! a turn, so that a chat line waits for one piece at most. What is small goes on in the same turn until it has taken about half of
//! that: what the link knows from before takes next to nothing as long as it comes in the same order. What keeps it honest:
//!
//! - Only a slot that is sealed *and* on disk is offered: after a crash the peer never knows more of our numbering than we do.
//! - What came later from the same sender for the same recipient does not overtake. Only what is volatile may be overtaken, and it overtakes
//!   nothing itself. It is given up when a later one says all that it says, to all that it is for: a void takes its place, which
//!   crosses before everything else, so that it is not remembered again after a crash when the later one has crossed.
//! - So it is with an item of publish-subscribe when a later event shows the same item anew, unless the node says anything else between.
//! - Somebody who comes to a room and goes while the link is away is not shown: both give way to voids, which cross when both are on disk.
//!   That holds if exactly those are told of the leave who were told of the entrance, none of them can have seen it, and nothing else of
//!   that occupant waits.
//! - Nothing starves: a class with a weight has its share, and what the most have overtaken gets every other turn.
//! - Memory is bounded by [`Scheduler::has_room`]; the rest of the spool stays on disk until it is asked for.
//! - What the link does not take now stays in its place.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;

use super::{
    class::{Class, Classes},
    place::{Coming, Line, Place, Sort, Track},
};
use crate::{
    codec::{
        entry::{Cast, Entry},
        position::{Received, Seq},
    },
    stanza::{NodeEvent, Stanza},
    time::{Mono, Now},
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

impl Offer<'_> {
    pub fn seq(&self) -> Seq {
        match self {
            Self::Whole { seq, .. } | Self::Part { seq, .. } => *seq,
        }
    }
}

/// After so many bytes it is another track's turn: half a piece of what goes in parts (see
/// [`SessionConfig::fragment_bytes_max`](crate::link::session::SessionConfig::fragment_bytes_max)), since the last entry comes on top.
const TURN_BYTES: usize = 512;

/// When so many have overtaken one, it gets every other turn. The link takes [`Received::BEYOND_MAX`] beyond a gap, and then nothing but
/// what closes it.
const OVERTAKEN_MAX: usize = Received::BEYOND_MAX / 4;

/// What has not waited for so long is not replaced: a link that keeps up carries everything as it was said.
const REPLACED_AFTER: Duration = Duration::from_secs(1);

/// Events of one node that are looked back at, for one that a later one replaces. Most tell all subscribers in one cast or two.
const EVENTS_BACK_MAX: usize = 16;

/// What a slot takes beside its entry: its place, its handles, and its share of the tables.
const SLOT_BYTES: usize = 400;

/// Senders that are remembered before it is asked whether anything of theirs still waits.
const SENDERS_MIN: usize = 1024;

/// A class's account is kept in bytes times this, divided by its weight.
const SCALE: u64 = 1 << 10;

/// What the link does with an offer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// The whole entry, which takes so many bytes on the link, or so many bytes of a part.
    Takes(usize),
    /// It does not take the entry whole: offer it in parts.
    InParts,
    /// Not this one now; perhaps another track's.
    Blocked,
    /// Nothing more now.
    Full,
}

#[derive(Debug)]
struct Slot {
    seq: Seq,
    class: Class,
    from: u64,
    sort: Sort,
    expiry: Option<Duration>,
    event: Option<ShownEvent>,
    coming: Coming,
    /// Of other tracks: up to these numbers they cross first.
    after: Vec<(Track, Seq)>,
    state: State,
}

/// What a slot tells of a node.
#[derive(Clone, Debug)]
struct ShownEvent {
    event: Arc<NodeEvent>,
    /// What the same sender said of the same node before, on the same track.
    before: Option<Seq>,
}

/// An occupant that has come, and perhaps gone, while its coming waits.
#[derive(Debug)]
struct Visit {
    track: Track,
    entrance: Seq,
    /// Changes of status, which must have given way.
    between: Vec<(Track, Seq)>,
}

#[derive(Debug)]
enum State {
    /// Still growing: it holds its place in the track.
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

#[derive(Debug, Default)]
struct Ring {
    /// Tracks in the order of their turns.
    turns: VecDeque<Track>,
    /// What the first of them has taken since its turn began.
    turn_bytes: usize,
    /// What the class has had, by its weight.
    account: u64,
}

/// Something that was given up.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct GivenUp {
    pub seq: Seq,
    pub class: Class,
    pub accepted: Mono,
    pub entry: Entry,
}

/// Something that has waited too long.
#[derive(Debug)]
pub struct Expired {
    pub seq: Seq,
    pub class: Class,
    pub is_volatile: bool,
    pub accepted: Mono,
    pub entry: Entry,
}

#[derive(Debug)]
pub struct Scheduler {
    bytes_max: usize,
    classes: Classes,
    tracks: BTreeMap<Track, VecDeque<Slot>>,
    rings: [Ring; Class::COUNT],
    /// The account of the class that was served last: who comes new begins there.
    account: u64,
    /// The first of each track.
    fronts: BTreeMap<Seq, Track>,
    /// What has crossed since the lowest number became the lowest, and whether that had the last turn.
    overtaken: usize,
    lowest: Seq,
    lowest_was_served: bool,
    /// By sender, the last durable number on each track. Also what has crossed, until it is looked at.
    last: BTreeMap<u64, Vec<(Track, Seq)>>,
    prune_at: usize,
    /// By sender, what is volatile. As above.
    fleeting: BTreeMap<u64, Vec<(Track, Seq)>>,
    /// By track and node, the last that tells of it. Also what has crossed, until it is looked at.
    events: BTreeMap<(Track, String), Seq>,
    /// By occupant.
    visits: BTreeMap<u64, Visit>,
    /// Those that have ended, with the number of the leave.
    ended: Vec<(Visit, Seq)>,
    /// Numbers without an entry, with the batch that they wait for. They go first.
    voids: BTreeMap<Seq, u64>,
    deadlines: BTreeMap<(Mono, Seq), Track>,
    given_up: Vec<GivenUp>,
    /// Numbers up to this one are here, were given out, or are done with.
    upto: Seq,
    bytes: usize,
}

impl Scheduler {
    /// `bytes_max` is what may be in memory.
    pub fn new(bytes_max: usize, classes: Classes) -> Self {
        Self {
            bytes_max,
            classes,
            tracks: BTreeMap::new(),
            rings: Default::default(),
            account: 0,
            fronts: BTreeMap::new(),
            overtaken: 0,
            lowest: Seq(0),
            lowest_was_served: false,
            last: BTreeMap::new(),
            prune_at: SENDERS_MIN,
            fleeting: BTreeMap::new(),
            events: BTreeMap::new(),
            visits: BTreeMap::new(),
            ended: Vec::new(),
            voids: BTreeMap::new(),
            deadlines: BTreeMap::new(),
            given_up: Vec::new(),
            upto: Seq(0),
            bytes: 0,
        }
    }

    pub fn set_classes(&mut self, classes: Classes) {
        self.classes = classes;
    }

    /// Forgets everything and starts after `upto`.
    pub fn restart(&mut self, upto: Seq) {
        *self = Self::new(self.bytes_max, self.classes);
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

    /// Takes the wanted number's place in its track, to be filled when its group is sealed.
    pub fn reserve(&mut self, place: &Place, seq: Seq) {
        self.push(place, seq, State::Open);
    }

    /// Fills a reserved place. Without one the entry stays on disk for now.
    pub fn fill(&mut self, place: &Place, seq: Seq, entry: Entry, batch: u64, accepted: Mono, now: Mono) {
        let track = &place.track;
        let Some(slot) = find(&mut self.tracks, track, seq) else {
            return;
        };
        // As it came out over all who are told.
        slot.coming = place.coming;
        self.bytes += size(&entry);
        slot.state = State::Ready { entry, batch, accepted };
        self.make_ready(track, seq, now);
    }

    /// Takes in the wanted number as read back from the disk. `batch` is the one with its last write.
    pub fn load(&mut self, place: &Place, seq: Seq, entry: Entry, batch: u64, accepted: Mono, now: Mono) {
        if entry == Entry::Void {
            debug_assert_eq!(seq, self.wants());
            self.upto = seq;
            self.voids.insert(seq, batch);
            return;
        }
        self.bytes += size(&entry);
        self.push(place, seq, State::Ready { entry, batch, accepted });
        self.make_ready(&place.track, seq, now);
    }

    /// Something has been given up, for good as soon as this batch is on disk: a void takes its number.
    pub fn put_void(&mut self, seq: Seq, batch: u64) {
        self.voids.insert(seq, batch);
    }

    /// What a later entry has taken the place of.
    pub fn take_given_up(&mut self) -> Vec<GivenUp> {
        std::mem::take(&mut self.given_up)
    }

    /// When something has waited too long.
    pub fn poll_timeout(&self) -> Option<Mono> {
        self.deadlines.first_key_value().map(|((at, _), _)| *at)
    }

    /// What has waited too long, and is not in doubt: taken out, so that the caller puts a void in its place.
    pub fn take_expired(&mut self, now: Now, in_doubt: impl Fn(Seq) -> bool) -> Option<Expired> {
        while let Some(first) = self.deadlines.first_entry()
            && first.key().0 <= now.mono
        {
            let ((_, seq), track) = first.remove_entry();
            // What has begun to cross goes on; what may have crossed is asked about when the link is back.
            let ready =
                find(&mut self.tracks, &track, seq).is_some_and(|slot| matches!(slot.state, State::Ready { .. }));
            if !ready || in_doubt(seq) {
                continue;
            }
            if let Some((slot, entry, _, accepted)) = self.remove(&track, seq) {
                return Some(Expired {
                    seq,
                    class: slot.class,
                    is_volatile: track.line.is_volatile(),
                    accepted,
                    entry,
                });
            }
        }
        None
    }

    fn push(&mut self, place: &Place, seq: Seq, state: State) {
        debug_assert_eq!(seq, self.wants());
        self.upto = seq;
        let Place {
            class,
            track,
            from,
            sort,
            expiry,
            event,
            coming,
        } = place;
        let after = self.predecessors(track, *from);
        let log = if track.line.is_volatile() {
            &mut self.fleeting
        } else {
            &mut self.last
        };
        let of_sender = log.entry(*from).or_default();
        match of_sender.iter_mut().find(|(known, _)| known == track) {
            Some(last) if !track.line.is_volatile() => last.1 = seq,
            _ => of_sender.push((track.clone(), seq)),
        }
        self.note_visit(track, *from, *coming, seq);
        let event = event.as_ref().map(|event| ShownEvent {
            before: self.events.insert((track.clone(), event.node.clone()), seq),
            event: event.clone(),
        });
        let slots = self.tracks.entry(track.clone()).or_default();
        let is_first = slots.is_empty();
        slots.push_back(Slot {
            seq,
            class: *class,
            from: *from,
            sort: *sort,
            expiry: *expiry,
            event,
            coming: *coming,
            after,
            state,
        });
        if is_first {
            self.enter(track.clone(), seq, *class);
        }
        self.prune();
    }

    /// What of other tracks a new entry must not overtake.
    fn predecessors(&mut self, track: &Track, from: u64) -> Vec<(Track, Seq)> {
        let mut after = Vec::new();
        if let Some(last) = self.last.get_mut(&from) {
            let tracks = &self.tracks;
            last.retain(|(track, seq)| is_pending(tracks, track, *seq));
            // What goes to one address and what goes to another have no recipient in common.
            let concerns =
                |other: &Track| other != track && !matches!((&other.line, &track.line), (Line::Pair(_), Line::Pair(_)));
            after.extend(last.iter().filter(|(other, _)| concerns(other)).cloned());
        }
        // What may be overtaken overtakes nothing: a status, neither the newcomer nor the history before it.
        if track.line.is_volatile() {
            let room = Track {
                sender: track.sender.clone(),
                line: Line::Room,
            };
            if let Some(slot) = self.tracks.get(&room).and_then(VecDeque::back) {
                let seq = slot.seq;
                after.retain(|(other, _)| *other != room);
                after.push((room, seq));
            }
        }
        after
    }

    /// A slot's entry is known: what it takes the place of goes, what it only follows goes first.
    fn make_ready(&mut self, track: &Track, seq: Seq, now: Mono) {
        let Some(slot) = find(&mut self.tracks, track, seq) else {
            return;
        };
        let State::Ready {
            entry: Entry::Cast(cast),
            batch,
            accepted,
        } = &slot.state
        else {
            return;
        };
        let (from, sort, cast, batch) = (slot.from, slot.sort, cast.clone(), *batch);
        if let Some(expiry) = slot.expiry {
            self.deadlines.insert((*accepted + expiry, seq), track.clone());
        }
        self.replace_items(track, seq, &cast, batch, now);
        let Some(mut fleeting) = self.fleeting.remove(&from) else {
            return;
        };
        let mut after = Vec::new();
        fleeting.retain(|(earlier, number)| {
            let Some(slot) = find(&mut self.tracks, earlier, *number) else {
                return false;
            };
            let concerns = match &earlier.line {
                Line::Presence => sort == Sort::Presence,
                Line::State => matches!(sort, Sort::State | Sort::Message | Sort::Presence),
                Line::Room | Line::Pair(_) | Line::Many => false,
            };
            if *number >= seq || !concerns {
                return true;
            }
            let overlap = match &slot.state {
                State::Ready {
                    entry: Entry::Cast(earlier),
                    accepted,
                    ..
                } => match overlap(&earlier.recipients, &cast.recipients) {
                    Overlap::All if now.since(*accepted) < REPLACED_AFTER => Overlap::Some,
                    overlap => overlap,
                },
                State::Ready { .. } | State::Open | State::Split { .. } => Overlap::Some,
            };
            match overlap {
                Overlap::None => true,
                Overlap::All => {
                    self.give_up(earlier, *number, batch);
                    false
                }
                Overlap::Some => {
                    if earlier != track {
                        after.push((earlier.clone(), *number));
                    }
                    true
                }
            }
        });
        if !fleeting.is_empty() {
            self.fleeting.insert(from, fleeting);
        }
        if let Some(slot) = find(&mut self.tracks, track, seq) {
            slot.after.extend(after);
        }
    }

    fn note_visit(&mut self, track: &Track, from: u64, coming: Coming, seq: Seq) {
        match coming {
            Coming::Enters => {
                let visit = Visit {
                    track: track.clone(),
                    entrance: seq,
                    between: Vec::new(),
                };
                // That it enters again, for others, is as much of a reason to show it as anything else that it does.
                if self.visits.insert(from, visit).is_some() {
                    self.visits.remove(&from);
                }
            }
            Coming::Leaves => {
                if let Some(visit) = self.visits.remove(&from)
                    && visit.track == *track
                    && self.ended.len() < SENDERS_MIN
                {
                    self.ended.push((visit, seq));
                }
            }
            Coming::Neither if track.line == Line::Presence => {
                if let Some(visit) = self.visits.get_mut(&from) {
                    visit.between.push((track.clone(), seq));
                    // Most have given way to the last.
                    if visit.between.len() > EVENTS_BACK_MAX {
                        self.visits.remove(&from);
                    }
                }
            }
            Coming::Neither => {
                self.visits.remove(&from);
            }
        }
    }

    /// Those who came and went without anybody having seen them give way to voids, which the caller writes in this batch. Of what is in
    /// doubt somebody may have seen it.
    pub fn leave_out_visits(&mut self, batch: u64, now: Mono, in_doubt: impl Fn(Seq) -> bool) {
        for (visit, leave) in std::mem::take(&mut self.ended) {
            let Visit {
                track,
                entrance,
                between,
            } = &visit;
            let is_open = find(&mut self.tracks, track, leave).is_some_and(|slot| matches!(slot.state, State::Open));
            if is_open {
                // Who is told of it is not known yet.
                self.ended.push((visit, leave));
                continue;
            }
            let has_gone = |(track, seq): &(Track, Seq)| find(&mut self.tracks, track, *seq).is_none();
            if between.iter().all(has_gone)
                && !in_doubt(*entrance)
                && !in_doubt(leave)
                && self.is_unseen(track, *entrance, leave, now)
            {
                self.give_up(track, *entrance, batch);
                self.give_up(track, leave, batch);
            }
        }
    }

    fn is_unseen(&self, track: &Track, entrance: Seq, leave: Seq, now: Mono) -> bool {
        let Some(slots) = self.tracks.get(track) else {
            return false;
        };
        let slot = |seq: Seq| {
            slots
                .binary_search_by_key(&seq, |slot| slot.seq)
                .ok()
                .map(|index| &slots[index])
        };
        let (Some(first), Some(last)) = (slot(entrance), slot(leave)) else {
            return false;
        };
        let (
            State::Ready {
                entry: Entry::Cast(enters),
                accepted,
                ..
            },
            State::Ready {
                entry: Entry::Cast(leaves),
                ..
            },
        ) = (&first.state, &last.state)
        else {
            return false;
        };
        // Two that share a hash are not one.
        let sender = |cast: &Cast| Some(Stanza::parse(cast.copy(0)?).ok()?.from()?.into_owned());
        (first.coming, last.coming) == (Coming::Enters, Coming::Leaves)
            && now.since(*accepted) >= REPLACED_AFTER
            && enters.recipients == leaves.recipients
            && sender(enters).is_some_and(|from| sender(leaves) == Some(from))
    }

    /// What waits of the item that this slot shows anew, to nobody else, goes. Anything else that was said of the node to any of them
    /// in the meantime keeps what came before it.
    fn replace_items(&mut self, track: &Track, seq: Seq, cast: &Cast, batch: u64, now: Mono) {
        let Some(ShownEvent { event, mut before }) =
            find(&mut self.tracks, track, seq).and_then(|slot| slot.event.clone())
        else {
            return;
        };
        if event.item.is_none() {
            return;
        }
        for _ in 0..EVENTS_BACK_MAX {
            let Some(number) = before else { return };
            let Some(slot) = find(&mut self.tracks, track, number) else {
                return;
            };
            let State::Ready {
                entry: Entry::Cast(earlier),
                accepted,
                ..
            } = &slot.state
            else {
                return;
            };
            let overlap = overlap(&earlier.recipients, &cast.recipients);
            let is_same = slot.event.as_ref().is_some_and(|earlier| earlier.event == event);
            let has_waited = now.since(*accepted) >= REPLACED_AFTER;
            before = slot.event.as_ref().and_then(|event| event.before);
            match overlap {
                Overlap::None => {}
                Overlap::All if is_same && has_waited => self.give_up(track, number, batch),
                Overlap::All | Overlap::Some => return,
            }
        }
    }

    /// A later entry, last written in this batch, says all that it says.
    fn give_up(&mut self, track: &Track, seq: Seq, batch: u64) {
        if let Some((slot, entry, before, accepted)) = self.remove(track, seq) {
            self.voids.insert(seq, before.max(batch));
            self.given_up.push(GivenUp {
                seq,
                class: slot.class,
                accepted,
                entry,
            });
        }
    }

    /// Takes a slot that is ready out of its track.
    fn remove(&mut self, track: &Track, seq: Seq) -> Option<(Slot, Entry, u64, Mono)> {
        let slots = self.tracks.get_mut(track)?;
        let index = slots.binary_search_by_key(&seq, |slot| slot.seq).ok()?;
        if !matches!(slots[index].state, State::Ready { .. }) {
            return None;
        }
        let class = slots.front()?.class;
        let mut slot = slots.remove(index)?;
        if index == 0 {
            self.leave(track, seq, class);
        }
        let State::Ready { entry, batch, accepted } = std::mem::replace(&mut slot.state, State::Open) else {
            return None;
        };
        self.bytes -= size(&entry);
        if let Some(expiry) = slot.expiry {
            self.deadlines.remove(&(accepted + expiry, seq));
        }
        Some((slot, entry, batch, accepted))
    }

    /// A track has a first entry.
    fn enter(&mut self, track: Track, seq: Seq, class: Class) {
        let ring = &mut self.rings[class as usize];
        if ring.turns.is_empty() {
            ring.account = ring.account.max(self.account);
        }
        ring.turns.push_back(track.clone());
        self.fronts.insert(seq, track);
    }

    /// A track's first entry, of this number and class, is gone; the track goes on if there is another.
    fn leave(&mut self, track: &Track, seq: Seq, class: Class) {
        self.fronts.remove(&seq);
        let next = self.tracks.get(track).and_then(|slots| slots.front());
        let next = next.map(|slot| (slot.seq, slot.class));
        let ring = &mut self.rings[class as usize];
        if let Some((seq, next)) = next
            && next == class
        {
            self.fronts.insert(seq, track.clone());
            return;
        }
        if ring.turns.front() == Some(track) {
            ring.turns.pop_front();
            ring.turn_bytes = 0;
        } else {
            ring.turns.retain(|other| other != track);
        }
        match next {
            Some((seq, class)) => self.enter(track.clone(), seq, class),
            None => {
                self.tracks.remove(track);
            }
        }
    }

    /// Senders of whom nothing waits any more are forgotten.
    fn prune(&mut self) {
        if self.last.len() + self.fleeting.len() + self.events.len() + self.visits.len() < self.prune_at {
            return;
        }
        let tracks = &self.tracks;
        for log in [&mut self.last, &mut self.fleeting] {
            log.retain(|_, waiting| {
                waiting.retain(|(track, seq)| is_pending(tracks, track, *seq));
                !waiting.is_empty()
            });
        }
        self.events.retain(|(track, _), seq| is_pending(tracks, track, *seq));
        self.visits
            .retain(|_, visit| is_pending(tracks, &visit.track, visit.entrance));
        let waiting = self.last.len() + self.fleeting.len() + self.events.len() + self.visits.len();
        self.prune_at = (2 * waiting).max(SENDERS_MIN);
    }

    /// Offers what may cross next, given that batches up to `committed` are on disk, until something is taken. `false` if
    /// nothing was.
    pub fn offer(&mut self, committed: u64, mut offer: impl FnMut(Offer<'_>) -> Answer) -> bool {
        if let Some((&seq, _)) = self.voids.iter().find(|(_, batch)| **batch <= committed) {
            let whole = Offer::Whole {
                seq,
                entry: &Entry::Void,
                accepted: Mono::default(),
            };
            match offer(whole) {
                Answer::Takes(_) => {
                    self.voids.remove(&seq);
                    return true;
                }
                Answer::Full => return false,
                Answer::Blocked | Answer::InParts => {}
            }
        }
        let lowest = self.fronts.first_key_value().map(|(seq, track)| (*seq, track.clone()));
        let Some((lowest, lowest_track)) = lowest else {
            return false;
        };
        if lowest != self.lowest {
            (self.lowest, self.overtaken) = (lowest, 0);
        }
        if self.overtaken >= OVERTAKEN_MAX && !self.lowest_was_served {
            match self.serve(&lowest_track, committed, &mut offer) {
                Answer::Takes(_) => {
                    self.lowest_was_served = true;
                    return true;
                }
                Answer::Full => return false,
                Answer::Blocked | Answer::InParts => {}
            }
        }
        let mut order = Class::ALL;
        order.sort_by_key(|class| (self.rings[*class as usize].account, *class));
        for class in order {
            for _ in 0..self.rings[class as usize].turns.len() {
                let Some(track) = self.rings[class as usize].turns.front().cloned() else {
                    break;
                };
                match self.serve(&track, committed, &mut offer) {
                    Answer::Takes(_) => {
                        self.overtaken += 1;
                        self.lowest_was_served = false;
                        return true;
                    }
                    Answer::Full => return false,
                    Answer::Blocked | Answer::InParts => self.end_turn(class, &track),
                }
            }
        }
        false
    }

    /// Offers what stands first in a track, and counts what was taken.
    fn serve(&mut self, track: &Track, committed: u64, offer: &mut impl FnMut(Offer<'_>) -> Answer) -> Answer {
        let waits = |slot: &Slot| {
            slot.after
                .iter()
                .any(|(track, seq)| is_pending(&self.tracks, track, *seq))
        };
        let Some(first) = self.tracks.get(track).and_then(|slots| slots.front()) else {
            return Answer::Blocked;
        };
        if waits(first) {
            return Answer::Blocked;
        }
        let (seq, class) = (first.seq, first.class);
        let Some(slots) = self.tracks.get_mut(track) else {
            return Answer::Blocked;
        };
        let (answer, done) = offer_first(slots, &mut self.bytes, &mut self.deadlines, committed, offer);
        if let Answer::Takes(bytes) = answer {
            let weight = u64::from(self.classes[class].weight.max(1));
            let ring = &mut self.rings[class as usize];
            self.account = self.account.max(ring.account);
            ring.account += bytes as u64 * SCALE / weight;
            if ring.turns.front() == Some(track) {
                ring.turn_bytes += bytes;
            }
            if done {
                self.leave(track, seq, class);
            }
            let ring = &mut self.rings[class as usize];
            if ring.turn_bytes >= TURN_BYTES {
                self.end_turn(class, track);
            }
        }
        answer
    }

    fn end_turn(&mut self, class: Class, track: &Track) {
        let ring = &mut self.rings[class as usize];
        if ring.turns.front() == Some(track) {
            ring.turn_bytes = 0;
            ring.turns.rotate_left(1);
        }
    }
}

fn find<'a>(tracks: &'a mut BTreeMap<Track, VecDeque<Slot>>, track: &Track, seq: Seq) -> Option<&'a mut Slot> {
    let slots = tracks.get_mut(track)?;
    // A track's slots ascend, and a room's backlog may be long.
    let index = slots.binary_search_by_key(&seq, |slot| slot.seq).ok()?;
    slots.get_mut(index)
}

/// Whether a track has not yet come past this number.
fn is_pending(tracks: &BTreeMap<Track, VecDeque<Slot>>, track: &Track, seq: Seq) -> bool {
    let front = tracks.get(track).and_then(VecDeque::front);
    front.is_some_and(|slot| slot.seq <= seq)
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Overlap {
    None,
    Some,
    All,
}

/// Of these, how many are among the others. Both ascend.
fn overlap(these: &[Bytes], others: &[Bytes]) -> Overlap {
    let found = these.iter().filter(|to| others.binary_search(to).is_ok()).count();
    if found == 0 {
        Overlap::None
    } else if found == these.len() {
        Overlap::All
    } else {
        Overlap::Some
    }
}

/// Offers what stands first in a track. The flag says that it is through, and gone.
fn offer_first(
    slots: &mut VecDeque<Slot>,
    held_bytes: &mut usize,
    deadlines: &mut BTreeMap<(Mono, Seq), Track>,
    committed: u64,
    offer: &mut impl FnMut(Offer<'_>) -> Answer,
) -> (Answer, bool) {
    let Some(slot) = slots.front_mut() else {
        return (Answer::Blocked, false);
    };
    let (seq, expiry) = (slot.seq, slot.expiry);
    if let State::Ready { entry, batch, accepted } = &slot.state {
        let accepted = *accepted;
        if *batch > committed {
            return (Answer::Blocked, false);
        }
        let answer = offer(Offer::Whole { seq, entry, accepted });
        if matches!(answer, Answer::Takes(_) | Answer::InParts) {
            *held_bytes -= size(entry);
            if let Some(expiry) = expiry {
                deadlines.remove(&(accepted + expiry, seq));
            }
        }
        match answer {
            Answer::Takes(_) => {
                slots.pop_front();
                return (answer, true);
            }
            Answer::InParts => {
                let encoded = entry.encode();
                *held_bytes += encoded.len();
                slot.state = State::Split {
                    encoded,
                    offset: 0,
                    accepted,
                };
            }
            Answer::Blocked | Answer::Full => return (answer, false),
        }
    }
    let State::Split {
        encoded,
        offset,
        accepted,
    } = &mut slot.state
    else {
        return (Answer::Blocked, false);
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
            return (answer, true);
        }
    }
    (answer, false)
}

/// What an entry costs in memory.
fn size(entry: &Entry) -> usize {
    SLOT_BYTES
        + match entry {
            Entry::Cast(Cast {
                template, recipients, ..
            }) => template.len() + recipients.iter().map(|to| to.len() + size_of::<Bytes>()).sum::<usize>(),
            Entry::Void => 0,
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When everything has waited.
    const LATER: Mono = Mono::from_start(Duration::from_secs(60));

    fn entry(bytes: usize) -> Entry {
        Entry::Cast(Cast {
            template: vec![b'x'; bytes].into(),
            to_at: 1,
            recipients: vec![Bytes::from_static(b" to='b@b.example'")],
        })
    }

    fn scheduler() -> Scheduler {
        Scheduler::new(1 << 20, Classes::default())
    }

    /// What a room says, in one class, as if by one sender.
    fn place(name: &str) -> Place {
        place_in(name, Class::Message, Line::Room)
    }

    fn place_in(name: &str, class: Class, line: Line) -> Place {
        Place {
            class,
            track: Track {
                sender: name.into(),
                line,
            },
            from: crate::queue::place::hash(name),
            sort: match class {
                Class::Presence => Sort::Presence,
                Class::State => Sort::State,
                _ => Sort::Message,
            },
            expiry: None,
            event: None,
            coming: Coming::Neither,
        }
    }

    /// A link that takes 1,000 bytes at a time.
    fn seqs(scheduler: &mut Scheduler, committed: u64) -> Vec<u64> {
        let mut seqs = Vec::new();
        while scheduler.offer(committed, |offer| match offer {
            Offer::Whole { entry, .. } if size(entry) - SLOT_BYTES > 1000 + 80 => Answer::InParts,
            Offer::Whole { seq, entry, .. } => {
                seqs.push(seq.0);
                Answer::Takes(size(entry) - SLOT_BYTES)
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
        scheduler.load(&place("big"), Seq(1), entry(2500), 0, Mono::default(), LATER);
        for seq in 2..=4 {
            scheduler.load(&place("room"), Seq(seq), entry(TURN_BYTES), 0, Mono::default(), LATER);
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
            scheduler.load(&place(flow), Seq(seq), entry(bytes), 0, Mono::default(), LATER);
        }
        assert_eq!(seqs(&mut scheduler, 0), [1, 3, 2, 4, 6, 8, 5, 7]);
    }

    /// Within a flow a line waits for the large entry before it.
    #[test]
    fn nothing_overtakes_within_a_flow() {
        let mut scheduler = scheduler();
        scheduler.load(&place("room"), Seq(1), entry(2500), 0, Mono::default(), LATER);
        scheduler.load(&place("room"), Seq(2), entry(10), 0, Mono::default(), LATER);
        assert_eq!(seqs(&mut scheduler, 0), [1, 1, 1, 2]);
    }

    /// What is still growing, or not yet on disk, holds its place and does not cross.
    #[test]
    fn offers_only_what_is_sealed_and_on_disk() {
        let mut scheduler = scheduler();
        let room = place("room");
        scheduler.reserve(&room, Seq(1));
        scheduler.load(&place("other"), Seq(2), entry(10), 0, Mono::default(), LATER);
        assert_eq!(seqs(&mut scheduler, 0), [2]);
        scheduler.fill(&room, Seq(1), entry(10), 7, Mono::default(), LATER);
        assert!(seqs(&mut scheduler, 6).is_empty());
        assert_eq!(seqs(&mut scheduler, 7), [1]);
    }

    /// What the link cannot take now stays first in its flow; if the link is only blocked for it, others go.
    #[test]
    fn a_refused_offer_stays_in_its_place() {
        let mut scheduler = scheduler();
        scheduler.load(&place("one"), Seq(1), entry(10), 0, Mono::default(), LATER);
        scheduler.load(&place("two"), Seq(2), entry(10), 0, Mono::default(), LATER);
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
        let mut scheduler = Scheduler::new(3000, Classes::default());
        scheduler.load(&place("one"), Seq(1), entry(2000), 0, Mono::default(), LATER);
        assert!(scheduler.has_room());
        scheduler.load(&place("two"), Seq(2), entry(2000), 0, Mono::default(), LATER);
        assert!(!scheduler.has_room());
        seqs(&mut scheduler, 0);
        assert_eq!(scheduler.bytes, 0);
    }

    /// A link that takes what it is offered, one at a time.
    fn next(scheduler: &mut Scheduler) -> Option<u64> {
        next_committed(scheduler, u64::MAX)
    }

    fn next_committed(scheduler: &mut Scheduler, committed: u64) -> Option<u64> {
        let mut next = None;
        scheduler.offer(committed, |offer| {
            next = Some(offer.seq().0);
            match offer {
                Offer::Whole { entry, .. } if size(entry) > 1000 + SLOT_BYTES + 80 => Answer::InParts,
                Offer::Whole { entry, .. } => Answer::Takes(size(entry) - SLOT_BYTES),
                Offer::Part { encoded, offset, .. } => Answer::Takes((encoded.len() - offset).min(1000)),
            }
        });
        next
    }

    /// While bulk crosses, a chat line waits for one piece of it; a backlog of lines leaves bulk its share.
    #[test]
    fn who_comes_new_goes_next_and_nobody_starves() {
        let mut scheduler = scheduler();
        let load = |scheduler: &mut Scheduler, place: &Place, bytes| {
            let seq = scheduler.wants();
            scheduler.load(place, seq, entry(bytes), 0, Mono::default(), LATER);
        };
        load(&mut scheduler, &place_in("avatar", Class::Bulk, Line::Many), 100_000);
        assert_eq!(next(&mut scheduler), Some(1));
        assert_eq!(next(&mut scheduler), Some(1));
        load(&mut scheduler, &place("room"), 300);
        assert_eq!(next(&mut scheduler), Some(2));
        assert_eq!(next(&mut scheduler), Some(1));
        for _ in 0..200 {
            load(&mut scheduler, &place("room"), 300);
        }
        let turns: Vec<_> = (0..100).map(|_| next(&mut scheduler) == Some(1)).collect();
        let bulk = turns.iter().filter(|bulk| **bulk).count();
        // An eighth of the bytes, and more once it has been overtaken often.
        assert!((3..40).contains(&bulk), "{bulk} of 100");
        assert!(!turns[..3].iter().all(|bulk| *bulk));
    }

    /// A later presence takes the place of one that has not crossed if it is for all its recipients, and follows it otherwise. A void, which
    /// waits for both to be on disk, keeps the number.
    #[test]
    fn the_newest_presence_takes_the_place_of_the_others() {
        let to = |recipients: &[&'static str]| {
            Entry::Cast(Cast {
                template: Bytes::from_static(b"<presence/>"),
                to_at: 9,
                recipients: recipients.iter().map(|to| Bytes::from_static(to.as_bytes())).collect(),
            })
        };
        let status = place_in("room", Class::Presence, Line::Presence);
        let left = Place {
            sort: Sort::Presence,
            ..place("room")
        };
        let mut scheduler = scheduler();
        scheduler.load(&status, Seq(1), to(&["a", "b"]), 1, Mono::default(), LATER);
        scheduler.load(&status, Seq(2), to(&["a"]), 2, Mono::default(), LATER);
        scheduler.load(&status, Seq(3), to(&["a", "b", "c"]), 3, Mono::default(), LATER);
        let given_up: Vec<_> = scheduler.take_given_up().iter().map(|given_up| given_up.seq).collect();
        assert_eq!(given_up, [Seq(1), Seq(2)]);
        assert!(!scheduler.offer(2, |offer| panic!("{offer:?}")));
        // It leaves, as two of three are told: the third sees its status first.
        scheduler.load(&left, Seq(4), to(&["a", "b"]), 4, Mono::default(), LATER);
        let order: Vec<_> = std::iter::from_fn(|| next(&mut scheduler)).collect();
        assert_eq!(order, [1, 2, 3, 4]);
    }

    /// What the same sender says to the same recipient is in order, whatever its class; what it says to others is not held up.
    #[test]
    fn a_sender_is_not_overtaken_by_itself() {
        let mut scheduler = scheduler();
        let pair = |to: &str| Line::Pair(to.into());
        scheduler.load(
            &place_in("r", Class::Bulk, pair("u")),
            Seq(1),
            entry(5000),
            0,
            Mono::default(),
            LATER,
        );
        scheduler.load(
            &place_in("r", Class::Urgent, pair("u")),
            Seq(2),
            entry(10),
            0,
            Mono::default(),
            LATER,
        );
        scheduler.load(
            &place_in("r", Class::Urgent, pair("v")),
            Seq(3),
            entry(10),
            0,
            Mono::default(),
            LATER,
        );
        scheduler.load(
            &place_in("r", Class::Message, Line::Room),
            Seq(4),
            entry(10),
            0,
            Mono::default(),
            LATER,
        );
        let occupant = Place {
            from: 7,
            ..place_in("r", Class::Message, Line::Room)
        };
        let order: Vec<_> = std::iter::from_fn(|| next(&mut scheduler)).collect();
        assert_eq!(order, [3, 1, 1, 1, 1, 1, 1, 2, 4]);
        scheduler.load(
            &place_in("r", Class::Bulk, pair("u")),
            Seq(5),
            entry(5000),
            0,
            Mono::default(),
            LATER,
        );
        scheduler.load(&occupant, Seq(6), entry(10), 0, Mono::default(), LATER);
        assert_eq!(next(&mut scheduler), Some(6));
    }

    /// What has only just come is not replaced, and is still not overtaken by what its sender says next.
    #[test]
    fn a_link_that_keeps_up_carries_all() {
        let mut scheduler = scheduler();
        let typing = place_in("u", Class::State, Line::State);
        let words = place_in("u", Class::Message, Line::Pair("v".into()));
        scheduler.load(&typing, Seq(1), entry(10), 0, LATER, LATER);
        scheduler.load(&words, Seq(2), entry(10), 0, LATER, LATER);
        assert!(scheduler.take_given_up().is_empty());
        let order: Vec<_> = std::iter::from_fn(|| next(&mut scheduler)).collect();
        assert_eq!(order, [1, 2]);
    }

    #[derive(Clone, Copy, Debug)]
    enum Says {
        Status,
        Enters,
        Words,
        Typing,
    }

    proptest::proptest! {
        /// Held against the plain queue, in which everything arrives in its order: what a recipient ends up with is the same.
        ///
        /// Three occupants say things to some of four sessions, and now and then something crosses.
        #[test]
        fn what_is_left_out_makes_no_difference_in_the_end(
            said in proptest::collection::vec((0..4_u8, 0..3_u64, 1..16_u8, 0..3_u8), 1..80),
        ) {
            let mut scheduler = scheduler();
            let mut log = BTreeMap::new();
            let mut heard: Vec<(u64, bool)> = Vec::new();
            let cross = |scheduler: &mut Scheduler, heard: &mut Vec<(u64, bool)>| {
                scheduler.offer(0, |offer| match offer {
                    Offer::Whole { seq, entry, .. } => {
                        heard.push((seq.0, *entry != Entry::Void));
                        Answer::Takes(100)
                    }
                    Offer::Part { .. } => unreachable!("nothing goes in parts"),
                })
            };
            for (what, from, recipients, crosses) in said {
                let (says, sort, class, line) = match what {
                    0 => (Says::Status, Sort::Presence, Class::Presence, Line::Presence),
                    1 => (Says::Enters, Sort::Presence, Class::Message, Line::Room),
                    2 => (Says::Words, Sort::Message, Class::Message, Line::Room),
                    _ => (Says::Typing, Sort::State, Class::State, Line::State),
                };
                let place = Place { from, sort, ..place_in("room", class, line) };
                let entry = Entry::Cast(Cast {
                    template: Bytes::from_static(b"<x/>"),
                    to_at: 2,
                    recipients: (0..4_u8).filter(|to| recipients & (1 << to) != 0).map(|to| Bytes::from(vec![to])).collect(),
                });
                let seq = scheduler.wants();
                scheduler.load(&place, seq, entry, 0, Mono::default(), LATER);
                log.insert(seq.0, (says, from, recipients));
                for _ in 0..crosses {
                    cross(&mut scheduler, &mut heard);
                }
            }
            while cross(&mut scheduler, &mut heard) {}
            let mut numbers: Vec<u64> = heard.iter().map(|(seq, _)| *seq).collect();
            numbers.sort_unstable();
            proptest::prop_assert_eq!(numbers, log.keys().copied().collect::<Vec<_>>(), "each number crosses once");
            for to in 0..4 {
                let is_for = |seq: &u64| log[seq].2 & (1 << to) != 0;
                let heard: Vec<u64> = heard.iter().filter(|(_, whole)| *whole).map(|(seq, _)| *seq).filter(is_for).collect();
                let is_durable = |seq: &u64| matches!(log[seq].0, Says::Enters | Says::Words);
                let durable: Vec<u64> = heard.iter().copied().filter(is_durable).collect();
                let all: Vec<u64> = log.keys().copied().filter(is_for).filter(is_durable).collect();
                proptest::prop_assert_eq!(&durable, &all, "what is durable comes, in order");
                for (at, seq) in heard.iter().enumerate() {
                    let overtakes = !is_durable(seq) && heard[at..].iter().any(|later| later < seq && is_durable(later));
                    proptest::prop_assert!(!overtakes, "{seq} has overtaken");
                }
                for from in 0..3 {
                    let of = |seq: &&u64| log[*seq].1 == from;
                    let is_presence = |seq: &&u64| matches!(log[*seq].0, Says::Status | Says::Enters);
                    let shown: Vec<&u64> = heard.iter().filter(of).filter(is_presence).collect();
                    proptest::prop_assert!(shown.is_sorted());
                    let last = log.keys().rfind(|seq| is_for(seq) && of(seq) && is_presence(seq));
                    proptest::prop_assert_eq!(shown.last().copied(), last, "the last presence is the last that was said");
                    let speaks: Vec<&u64> = heard.iter().filter(of).filter(|seq| !is_presence(seq)).collect();
                    proptest::prop_assert!(speaks.is_sorted(), "nobody types after he has said it");
                }
            }
        }
    }

    proptest::proptest! {
        /// Held against the plain queue: a subscriber ends up with the same items, and misses none but one that the node shows it anew
        /// before it says anything else.
        #[test]
        fn an_item_that_is_shown_anew_is_shown_once(
            said in proptest::collection::vec((0..2_u8, 0..4_u8, 1..8_u8, 0..3_u8), 1..80),
        ) {
            let mut scheduler = scheduler();
            let mut log = BTreeMap::new();
            let mut heard: Vec<(u64, bool)> = Vec::new();
            let cross = |scheduler: &mut Scheduler, heard: &mut Vec<(u64, bool)>| {
                scheduler.offer(0, |offer| match offer {
                    Offer::Whole { seq, entry, .. } => {
                        heard.push((seq.0, *entry != Entry::Void));
                        Answer::Takes(100)
                    }
                    Offer::Part { .. } => unreachable!("nothing goes in parts"),
                })
            };
            for (node, item, recipients, crosses) in said {
                // The last is a retraction, or several items.
                let item = (item < 3).then(|| item.to_string());
                let event = Some(Arc::new(NodeEvent { node: node.to_string(), item }));
                let place = Place { event: event.clone(), ..place_in("u", Class::Bulk, Line::Many) };
                let entry = Entry::Cast(Cast {
                    template: Bytes::from_static(b"<x/>"),
                    to_at: 2,
                    recipients: (0..3_u8).filter(|to| recipients & (1 << to) != 0).map(|to| Bytes::from(vec![to])).collect(),
                });
                let seq = scheduler.wants();
                scheduler.load(&place, seq, entry, 0, Mono::default(), LATER);
                log.insert(seq.0, (event, recipients));
                for _ in 0..crosses {
                    cross(&mut scheduler, &mut heard);
                }
            }
            while cross(&mut scheduler, &mut heard) {}
            let mut numbers: Vec<u64> = heard.iter().map(|(seq, _)| *seq).collect();
            numbers.sort_unstable();
            proptest::prop_assert_eq!(numbers, log.keys().copied().collect::<Vec<_>>(), "each number crosses once");
            for to in 0..3 {
                let shown: Vec<u64> = heard.iter().filter(|(seq, whole)| *whole && log[seq].1 & (1 << to) != 0).map(|(seq, _)| *seq).collect();
                proptest::prop_assert!(shown.is_sorted());
                for (seq, (event, recipients)) in &log {
                    if recipients & (1 << to) == 0 || shown.contains(seq) {
                        continue;
                    }
                    let event = event.as_ref().unwrap();
                    let next = log.range(seq + 1..).map(|(_, (later, recipients))| (later.as_ref().unwrap(), recipients))
                        .find(|(later, recipients)| **recipients & (1 << to) != 0 && later.node == event.node);
                    proptest::prop_assert!(
                        event.item.is_some() && next.is_some_and(|(later, _)| later == event),
                        "{} is missing", seq
                    );
                }
            }
        }
    }

    /// While nothing crosses, one event of an item is left: the newest.
    #[test]
    fn the_newest_event_of_an_item_takes_the_place_of_the_others() {
        let place = |node: &str, item: Option<&str>| Place {
            event: Some(Arc::new(NodeEvent {
                node: node.into(),
                item: item.map(Into::into),
            })),
            ..place_in("u", Class::Bulk, Line::Many)
        };
        let mut scheduler = scheduler();
        let shown = [
            ("mood", Some("current")),
            ("mood", Some("current")),
            ("tune", Some("current")),
            ("mood", Some("current")),
            ("notes", Some("a")),
            ("notes", Some("b")),
            ("notes", Some("a")),
            ("tune", None),
            ("tune", Some("current")),
        ];
        for (at, (node, item)) in (1..).zip(shown) {
            scheduler.load(&place(node, item), Seq(at), entry(100), at, Mono::default(), LATER);
        }
        let given_up: Vec<_> = scheduler
            .take_given_up()
            .iter()
            .map(|given_up| given_up.seq.0)
            .collect();
        assert_eq!(given_up, [1, 2]);
        // Its void waits until what replaces it is on disk.
        assert_eq!(next_committed(&mut scheduler, 1), None);
        assert_eq!(next_committed(&mut scheduler, 2), Some(1));
        let order: Vec<_> = std::iter::from_fn(|| next(&mut scheduler)).collect();
        assert_eq!(order, [2, 3, 4, 5, 6, 7, 8, 9]);
    }

    proptest::proptest! {
        /// Held against the plain queue: a session sees everybody come, speak and go as it would there, but for those who come and go again
        /// without a word. They are left out for all who would have seen them, or for none.
        ///
        /// Three occupants enter, speak, change their status and leave; who is told of them changes now and then.
        #[test]
        fn a_visit_that_nobody_saw_is_left_out_whole(
            said in proptest::collection::vec((0..3_u64, 0..6_u8, 1..8_u8, 0..8_u8), 1..120),
        ) {
            let mut scheduler = scheduler();
            let mut inside = [0_u8; 3];
            let mut log = BTreeMap::new();
            let mut heard: Vec<(u64, bool)> = Vec::new();
            let mut in_doubt = std::collections::BTreeSet::new();
            for (batch, (from, what, recipients, crosses)) in (1..).zip(said) {
                let (coming, class, line, sort) = match (inside[from as usize], what) {
                    (0, _) => (Coming::Enters, Class::Message, Line::Room, Sort::Presence),
                    (_, 0) => (Coming::Neither, Class::Message, Line::Room, Sort::Message),
                    (_, 1) => (Coming::Neither, Class::Presence, Line::Presence, Sort::Presence),
                    (_, _) => (Coming::Leaves, Class::Message, Line::Room, Sort::Presence),
                };
                let told = match (coming, inside[from as usize]) {
                    (Coming::Enters, _) => recipients,
                    // A newcomer is told of the leave as well.
                    (Coming::Leaves, told) if what == 2 => told | recipients,
                    (Coming::Leaves | Coming::Neither, told) => told,
                };
                inside[from as usize] = match coming {
                    Coming::Enters => told,
                    Coming::Leaves => 0,
                    Coming::Neither => inside[from as usize],
                };
                let place = Place { from, sort, coming, ..place_in("room", class, line) };
                let template = format!("<presence from='room@a/{from}'/>");
                let entry = Entry::Cast(Cast {
                    to_at: 9,
                    template: template.into(),
                    recipients: (0..3_u8).filter(|to| told & (1 << to) != 0).map(|to| format!(" to='u{to}@b'").into()).collect(),
                });
                let seq = scheduler.wants();
                scheduler.load(&place, seq, entry, batch, Mono::default(), LATER);
                log.insert(seq.0, (from, coming, told));
                if crosses == 7 {
                    in_doubt.insert(seq);
                }
                scheduler.leave_out_visits(batch, LATER, |seq| in_doubt.contains(&seq));
                if crosses < 2 {
                    scheduler.offer(batch, |offer| match offer {
                        Offer::Whole { seq, entry, .. } => {
                            heard.push((seq.0, *entry != Entry::Void));
                            Answer::Takes(100)
                        }
                        Offer::Part { .. } => unreachable!("nothing goes in parts"),
                    });
                }
            }
            while scheduler.offer(u64::MAX, |offer| {
                if let Offer::Whole { seq, entry, .. } = offer {
                    heard.push((seq.0, *entry != Entry::Void));
                }
                Answer::Takes(100)
            }) {}
            let whole: BTreeMap<u64, bool> = heard.iter().copied().collect();
            proptest::prop_assert_eq!((whole.len(), heard.len()), (log.len(), log.len()), "each number crosses once");
            for (seq, (from, coming, told)) in &log {
                if whole[seq] {
                    continue;
                }
                let may_be_seen = *coming != Coming::Neither && in_doubt.contains(&Seq(*seq));
                proptest::prop_assert!(!may_be_seen, "{} may have been seen", seq);
                let mut of_it = log.iter().filter(|(_, (other, ..))| other == from);
                match coming {
                    Coming::Enters => {
                        let end = log.range(seq + 1..).find(|(_, (other, coming, _))| other == from && *coming == Coming::Leaves);
                        let (end, (_, _, also)) = end.unwrap();
                        proptest::prop_assert!(!whole[end] && told == also, "{} left without having come", seq);
                        let between = of_it.filter(|(number, _)| *number > seq && *number < end).any(|(number, _)| whole[number]);
                        proptest::prop_assert!(!between, "{} spoke without having come", from);
                    }
                    Coming::Leaves => {
                        let start = of_it.rfind(|(number, (_, coming, _))| *number < seq && *coming == Coming::Enters);
                        proptest::prop_assert!(start.is_some_and(|(start, _)| !whole[start]), "{} never left", seq);
                    }
                    // Another status, or the leave, has taken its place.
                    Coming::Neither => {}
                }
            }
        }
    }

    /// Nobody comes and goes: both numbers are voids, and neither crosses before both are on disk.
    #[test]
    fn a_visit_that_nobody_saw_takes_no_room_on_the_link() {
        let visit = |coming| Place {
            coming,
            ..place("room")
        };
        let cast = || {
            Entry::Cast(Cast {
                template: Bytes::from_static(b"<presence from='room@a/n'/>"),
                to_at: 9,
                recipients: vec![Bytes::from_static(b" to='b@b.example'")],
            })
        };
        let mut scheduler = scheduler();
        scheduler.load(&visit(Coming::Enters), Seq(1), cast(), 1, Mono::default(), LATER);
        scheduler.load(&place("room two"), Seq(2), entry(10), 2, Mono::default(), LATER);
        scheduler.load(&visit(Coming::Leaves), Seq(3), cast(), 3, Mono::default(), LATER);
        scheduler.leave_out_visits(5, LATER, |_| false);
        let given_up: Vec<_> = scheduler
            .take_given_up()
            .iter()
            .map(|given_up| given_up.seq.0)
            .collect();
        assert_eq!(given_up, [1, 3]);
        assert_eq!(next_committed(&mut scheduler, 4), Some(2));
        assert_eq!(next_committed(&mut scheduler, 4), None);
        assert_eq!(next_committed(&mut scheduler, 5), Some(1));
        assert_eq!(next_committed(&mut scheduler, 5), Some(3));
    }
}
