//! From our server to the link: stanzas become casts, casts wait in the spool, the spool crosses.
//!
//! The spool on disk is the truth; the scheduler holds the next part of it in memory while the link is up. A number is taken
//! into the scheduler in its turn, from one of three places: the open group that has it, the cast that was just sealed,
//! or the disk.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;

use super::{Drop, RelayStats};
use crate::{
    codec::{
        entry::{Cast, Entry},
        position::{Received, Seq},
    },
    queue::{
        class::{Class, Classes},
        collapse::{self, Collapse, Placed, Refusal},
        journal::{Change, Opening, Slot},
        ledger::{Ledger, Level},
        news::News,
        place::{Line, Place, Sort},
        rules::{Placement, Rules},
        scheduler::{Answer, Expired, GivenUp, Offer, Scheduler},
    },
    stanza::Stanza,
    time::{Deadline, Mono, Now, Wall},
};

/// Slots asked for in one read.
const READ_ENTRIES_MAX: usize = 512;

/// Rooms that are remembered. Forgetting them puts what they say to one beside what they say to all.
const ROOMS_MAX: usize = 10_000;

/// How exactly the age of what waits is known.
const AGE_STEP: Duration = Duration::from_secs(1);

/// Points at which it is known: ten hours of talk without a pause, and what comes after them counts as no younger than the last.
const AGES_MAX: usize = 36_000;

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Output {
    Change(Change),
    Read {
        from: Seq,
        entries_max: usize,
        bytes_max: usize,
    },
}

/// Why a stanza is not taken in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Refused {
    NoAddress,
    TooLarge,
    ClassFull(Class),
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NoAddress => Self::NoAddress,
            Refusal::TooLarge => Self::TooLarge,
        }
    }
}

#[derive(Debug)]
struct Reading {
    from: Seq,
    /// The last number that there was when the read began.
    upto: Seq,
}

/// A group that may still grow.
#[derive(Debug)]
struct Open {
    /// When its first copy came.
    accepted: Now,
    /// The batch with its last write. It may be sealed long after it, in a batch that stays empty.
    batch: u64,
    /// What was last written.
    bytes: u64,
    place: Place,
}

/// A cast that was sealed while a read was under way.
#[derive(Debug)]
struct Sealed {
    place: Place,
    cast: Cast,
    /// The batch with its last write.
    batch: u64,
}

#[derive(Debug)]
pub struct Outward {
    /// The part of the spool that may be in memory.
    memory_bytes: usize,
    collapse: Collapse,
    scheduler: Scheduler,
    classes: Classes,
    news: News,
    /// Who has spoken as a room does. What else it says is in order with that.
    rooms: BTreeSet<Arc<str>>,
    ledger: Ledger,
    /// Whether entries may cross. They are taken into memory before, so that what is of no use any more is found while the link is down.
    open: bool,
    /// What has been given to the present connection and is not acknowledged.
    given: BTreeSet<Seq>,
    /// The same of earlier ones, until the peer says what it has. It may have any of it, so nobody is told that it was not delivered.
    in_doubt: BTreeSet<Seq>,
    /// Until then that holds for everything that an earlier process has written.
    inherited_in_doubt: bool,
    acked: Seq,
    /// Beyond `acked`, these are with the peer too, and not on our disk any more.
    beyond: BTreeSet<Seq>,
    /// The last number that an earlier process gave out: how old these are, their slots tell.
    inherited: Seq,
    /// The last number whose slot has been given to the store.
    written: Seq,
    open_groups: BTreeMap<Seq, Open>,
    reading: Option<Reading>,
    /// Groups that the read under way may have seen before their last write: at most those that were open when it began.
    sealed_while_reading: BTreeMap<Seq, Sealed>,
    /// When numbers that wait were given out; those between two count as the one before them.
    ages: BTreeMap<Seq, Mono>,
    /// The last that was among them and is acknowledged: those up to the next one count as it.
    acked_age: Mono,
    /// Bytes of entries that were given to a connection, by class.
    crossed_bytes: [u64; Class::COUNT],
    /// When the ones among them were given out that have been acknowledged since this was last asked.
    delivered: Vec<Mono>,
    outputs: VecDeque<Output>,
}

impl Outward {
    pub fn new(opening: &Opening, window: Duration, memory_bytes: usize, classes: Classes, now: Now) -> Self {
        let last = opening.spool_last;
        let mut ages = BTreeMap::new();
        if let Some(first) = opening.spool_first {
            // Not known when: it has waited at least as long as we are there.
            let since = opening.spool_since.map_or(now.mono, |accepted| on_mono(accepted, now));
            ages.insert(first, since);
        }
        let acked = opening.spool_first.map_or(last, |first| Seq(first.0 - 1));
        let mut scheduler = Scheduler::new(memory_bytes, classes);
        scheduler.restart(acked);
        Self {
            memory_bytes,
            collapse: Collapse::new(last, window),
            scheduler,
            classes,
            news: News::default(),
            rooms: BTreeSet::new(),
            ledger: Ledger::new(acked, last),
            open: false,
            given: BTreeSet::new(),
            in_doubt: BTreeSet::new(),
            inherited_in_doubt: true,
            acked,
            beyond: BTreeSet::new(),
            inherited: last,
            written: last,
            open_groups: BTreeMap::new(),
            reading: None,
            sealed_while_reading: BTreeMap::new(),
            ages,
            acked_age: Mono::default(),
            crossed_bytes: [0; Class::COUNT],
            delivered: Vec::new(),
            outputs: VecDeque::new(),
        }
    }

    pub fn set_window(&mut self, window: Duration) {
        self.collapse.set_window(window);
    }

    /// For what is placed from now on.
    pub fn set_classes(&mut self, classes: Classes) {
        self.classes = classes;
        self.scheduler.set_classes(classes);
    }

    /// How much of a class waits.
    pub fn level(&self, class: Class) -> Level {
        self.ledger.level(class)
    }

    /// Where an entry is counted that waits.
    pub fn class_of(&self, seq: Seq) -> Option<Class> {
        self.ledger.class(seq)
    }

    /// A far session enters one of our rooms.
    pub fn handle_join(&mut self, join: &Stanza) {
        self.news.handle_join(join);
    }

    /// A far session speaks as this occupant of a room of ours, or wants to.
    pub fn handle_nick(&mut self, presence: &Stanza) {
        self.news.handle_nick(presence);
    }

    pub fn acked(&self) -> Seq {
        self.acked
    }

    pub fn last(&self) -> Seq {
        self.collapse.last()
    }

    /// Takes in a stanza. `batch` is the one that gathers.
    pub fn handle_stanza(
        &mut self,
        stanza: &Stanza,
        rules: &Rules,
        batch: u64,
        now: Now,
        stats: &mut RelayStats,
    ) -> Result<Placed, Refused> {
        let (class, coming) = self.news.class_of(stanza);
        let rule = rules.place(stanza);
        let mut place = self.place(stanza, class, rule).ok_or(Refusal::NoAddress)?;
        place.coming = coming;
        if self.ledger.is_full(place.class, &self.classes) {
            return Err(Refused::ClassFull(place.class));
        }
        let placed = self.collapse.handle_stanza(stanza, rule, now)?;
        if placed.new {
            self.note_age(placed.seq, now.mono);
            self.ledger.set(placed.seq, place.class, placed.bytes);
            let open = Open {
                accepted: now,
                batch,
                bytes: 0,
                place,
            };
            self.open_groups.insert(placed.seq, open);
            self.take_in_open();
        } else {
            self.ledger.add(placed.seq, placed.bytes);
            // It may have been sealed by this copy, and is drained below.
            if let Some(open) = self.open_groups.get_mut(&placed.seq) {
                open.place.coming = open.place.coming.and(coming);
            }
        }
        self.drain_collapse(batch, now, stats);
        Ok(placed)
    }

    /// Writes what has grown: the batch is about to go to the disk.
    pub fn flush(&mut self, batch: u64, now: Now, stats: &mut RelayStats) {
        while let Some(output) = self.collapse.poll_output() {
            self.handle_collapse(output, batch, now, stats);
        }
    }

    pub fn handle_timeout(&mut self, batch: u64, now: Now, stats: &mut RelayStats) {
        self.collapse.handle_timeout(now);
        self.drain_collapse(batch, now, stats);
    }

    pub fn seal_all(&mut self, batch: u64, now: Now, stats: &mut RelayStats) {
        self.collapse.seal_all();
        self.drain_collapse(batch, now, stats);
    }

    /// The link is up. Until the peer has said what it holds, we go by what it last acknowledged.
    pub fn greet(&mut self) {
        self.open = true;
    }

    /// The peer holds what `received` says. All is offered from there on: the session knows what has gone early.
    pub fn link_up(&mut self, received: &Received) {
        self.handle_acked(received);
        // A peer that lost its disk no longer has what it had acknowledged.
        self.beyond = received
            .beyond
            .iter()
            .copied()
            .filter(|seq| *seq > self.acked)
            .collect();
        self.in_doubt.clear();
        self.inherited_in_doubt = false;
        self.scheduler.restart(self.acked);
        self.open = true;
        self.take_in_open();
    }

    pub fn link_down(&mut self) {
        self.open = false;
        self.in_doubt.append(&mut self.given);
        self.scheduler.restart(self.acked);
        self.take_in_open();
    }

    /// The peer has these on its disk.
    pub fn handle_acked(&mut self, received: &Received) {
        let Received { upto, ref beyond, .. } = *received;
        if upto <= self.acked && beyond.iter().all(|seq| self.beyond.contains(seq)) {
            return;
        }
        self.acked = self.acked.max(upto);
        self.beyond.extend(beyond.iter().copied());
        self.beyond = self.beyond.split_off(&Seq(self.acked.0 + 1));
        self.ledger.advance_to(self.acked);
        self.given = self.given.split_off(&Seq(self.acked.0 + 1));
        for seq in beyond {
            self.ledger.clear(*seq);
            self.given.remove(seq);
        }
        while let Some(age) = self.ages.first_entry()
            && *age.key() <= self.acked
        {
            self.acked_age = age.remove();
            self.delivered.push(self.acked_age);
        }
        self.outputs.push_back(Output::Change(Change::DropSpool {
            upto,
            beyond: beyond.clone(),
        }));
    }

    /// Takes in what was read; `end` says that nothing followed it.
    pub fn handle_read(&mut self, slots: Vec<Slot>, end: bool, rules: &Rules, now: Now, stats: &mut RelayStats) {
        let sealed = std::mem::take(&mut self.sealed_while_reading);
        let Some(Reading { from, upto }) = self.reading.take() else {
            return;
        };
        // The link may have begun anew since, further back: what lies before this read would be passed over.
        if self.scheduler.wants() < from {
            return;
        }
        for slot in slots {
            self.pass_missing(slot.seq, now);
            let wants = self.scheduler.wants();
            if wants > slot.seq {
                continue;
            }
            // There is no room before it, or it grows still and there is none for it: what was read may not be its last write.
            if wants < slot.seq || self.collapse.open_flow(wants).is_some() {
                return;
            }
            if self.beyond.contains(&slot.seq) {
                self.scheduler.skip(slot.seq);
                continue;
            }
            let (place, entry, batch) = match sealed.get(&slot.seq) {
                Some(sealed) => (sealed.place.clone(), Entry::Cast(sealed.cast.clone()), sealed.batch),
                None => match self.place_of(slot.seq, &slot.entry, rules) {
                    Some((place, entry)) => (place, entry, 0),
                    None => {
                        // Our own disk gave us something that we did not write. The peer counts it, so it crosses as void.
                        stats.dropped(Drop::Malformed);
                        (Place::unknown(), Entry::Void, 0)
                    }
                },
            };
            let accepted = match slot.accepted {
                Some(accepted) if slot.seq <= self.inherited => on_mono(accepted, now),
                Some(_) | None => self.accepted_at(slot.seq),
            };
            self.note_age(slot.seq, accepted);
            self.scheduler.load(&place, slot.seq, entry, batch, accepted, now.mono);
        }
        if end {
            self.pass_missing(Seq(upto.0 + 1), now);
        }
        self.take_in_open();
    }

    /// Takes in the numbers before this one that the disk does not have any more: an earlier peer's disk had them. If the present
    /// one's has not, a void takes the number's place, because an open gap would stop the link.
    fn pass_missing(&mut self, before: Seq, now: Now) {
        loop {
            self.take_in_open();
            let wants = self.scheduler.wants();
            if wants >= before || self.collapse.open_flow(wants).is_some() {
                return;
            }
            if self.beyond.contains(&wants) {
                self.scheduler.skip(wants);
            } else if self.scheduler.has_room() {
                self.scheduler
                    .load(&Place::unknown(), wants, Entry::Void, 0, now.mono, now.mono);
            } else {
                return;
            }
        }
    }

    /// Asks the disk for what comes next, if there is room for it. The batch that gathers goes to the disk before the read does.
    pub fn advance(&mut self) {
        self.take_in_open();
        while self.beyond.contains(&self.scheduler.wants()) {
            self.scheduler.skip(self.scheduler.wants());
            self.take_in_open();
        }
        let wants = self.scheduler.wants();
        if self.reading.is_none() && self.scheduler.has_room() && wants <= self.written {
            self.reading = Some(Reading {
                from: wants,
                upto: self.collapse.last(),
            });
            self.outputs.push_back(Output::Read {
                from: wants,
                entries_max: READ_ENTRIES_MAX,
                bytes_max: self.memory_bytes / 2,
            });
        }
    }

    /// Offers what may cross next, given the batches that are on disk. `false` if nothing was taken.
    pub fn offer(&mut self, committed: u64, mut offer: impl FnMut(Offer<'_>) -> Answer) -> bool {
        let (given, ledger, crossed) = (&mut self.given, &self.ledger, &mut self.crossed_bytes);
        self.open
            && self.scheduler.offer(committed, |offered| {
                let seq = offered.seq();
                let whole = match &offered {
                    Offer::Whole { entry, .. } => Some(entry.encoded_bytes()),
                    Offer::Part { .. } => None,
                };
                let answer = offer(offered);
                if let Answer::Takes(taken) = answer {
                    given.insert(seq);
                    // Nothing is taken of what the peer knows already, or does not take.
                    let bytes = if taken == 0 { 0 } else { whole.unwrap_or(taken) };
                    crossed[ledger.class(seq).unwrap_or(Class::Control) as usize] += bytes as u64;
                }
                answer
            })
    }

    /// Writes voids in the place of what later entries have made needless.
    pub fn settle(&mut self, batch: u64, now: Now, stats: &mut RelayStats) -> Vec<GivenUp> {
        let inherited = self.inherited_in_doubt.then_some(self.inherited);
        let (given, in_doubt) = (&self.given, &self.in_doubt);
        // Whoever may have seen the first half of a visit must see the second.
        self.scheduler.leave_out_visits(batch, now.mono, |seq| {
            given.contains(&seq) || in_doubt.contains(&seq) || inherited.is_some_and(|inherited| seq <= inherited)
        });
        let all = self.scheduler.take_given_up();
        for given_up in &all {
            stats.superseded[given_up.class as usize] += 1;
            stats.superseded_bytes += freed_bytes(&given_up.entry);
            self.write_void(given_up.seq, given_up.accepted, now);
        }
        all
    }

    /// What has waited for as long as its class may. A void takes its place in this batch, so whoever is told is told in it too.
    pub fn take_expired(&mut self, batch: u64, now: Now, stats: &mut RelayStats) -> Option<Expired> {
        let inherited = self.inherited_in_doubt.then_some(self.inherited);
        let (given, in_doubt) = (&self.given, &self.in_doubt);
        let expired = self.scheduler.take_expired(now, |seq| {
            given.contains(&seq) || in_doubt.contains(&seq) || inherited.is_some_and(|inherited| seq <= inherited)
        })?;
        stats.expired[expired.class as usize] += 1;
        stats.expired_bytes += freed_bytes(&expired.entry);
        self.scheduler.put_void(expired.seq, batch);
        self.write_void(expired.seq, expired.accepted, now);
        Some(expired)
    }

    fn write_void(&mut self, seq: Seq, accepted: Mono, now: Now) {
        let waited = now.mono.since(accepted).as_millis();
        let accepted = Wall(now.wall.0.saturating_sub(u64::try_from(waited).unwrap_or(u64::MAX)));
        self.ledger.set(seq, Class::Control, 0);
        let entry = Entry::Void.encode();
        self.outputs
            .push_back(Output::Change(Change::PutSpool { seq, accepted, entry }));
    }

    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<Deadline> {
        let expiry = self.scheduler.poll_timeout().map(|at| Deadline { at, why: "expiry" });
        Deadline::earlier(self.collapse.poll_timeout(), expiry)
    }

    /// How long entries took until the peer acknowledged them: one a second is watched.
    pub fn take_delivered(&mut self, now: Now) -> Vec<Duration> {
        let since = std::mem::take(&mut self.delivered);
        since.into_iter().map(|since| now.mono.since(since)).collect()
    }

    /// How long the oldest entry has waited, to the second.
    pub fn oldest(&self, now: Now) -> Duration {
        if self.acked >= self.last() {
            return Duration::ZERO;
        }
        now.mono.since(self.accepted_at(Seq(self.acked.0 + 1)))
    }

    /// The same for the entries of a class, as far as it is known what they are: what an earlier process has left is read in time.
    pub fn oldest_of(&mut self, class: Class, now: Now) -> Duration {
        let oldest = self.ledger.oldest(class);
        oldest.map_or(Duration::ZERO, |seq| now.mono.since(self.accepted_at(seq)))
    }

    /// Bytes of entries that were given to a connection, by class.
    pub fn crossed_bytes(&self) -> [u64; Class::COUNT] {
        self.crossed_bytes
    }

    /// When this number, which waits, was given out, to the second.
    fn accepted_at(&self, seq: Seq) -> Mono {
        let noted = self.ages.range(..=seq).next_back();
        noted.map_or(self.acked_age, |(_, at)| *at)
    }

    /// Takes the wanted number from its open group, if it has one.
    fn take_in_open(&mut self) {
        while self.scheduler.has_room()
            && let Some(open) = self.open_groups.get(&self.scheduler.wants())
        {
            self.scheduler.reserve(&open.place, self.scheduler.wants());
        }
    }

    fn drain_collapse(&mut self, batch: u64, now: Now, stats: &mut RelayStats) {
        while let Some(output) = self.collapse.poll_sealed() {
            self.handle_collapse(output, batch, now, stats);
        }
        self.take_in_open();
    }

    fn handle_collapse(&mut self, output: collapse::Output, batch: u64, now: Now, stats: &mut RelayStats) {
        match output {
            collapse::Output::Write { seq, cast } => {
                self.written = self.written.max(seq);
                let entry = Entry::Cast(cast).encode();
                let bytes = entry.len() as u64;
                let open = self.open_groups.get_mut(&seq);
                let accepted = open.map_or(now.wall, |open| {
                    (open.batch, open.bytes) = (batch, bytes);
                    open.accepted.wall
                });
                let put = Change::PutSpool { seq, accepted, entry };
                self.outputs.push_back(Output::Change(put));
            }
            collapse::Output::Sealed { seq, cast, .. } => {
                stats.shared += u64::from(cast.recipients.len() > 1);
                // A group is noted when it is opened.
                let Some(open) = self.open_groups.remove(&seq) else {
                    return;
                };
                let Open {
                    accepted,
                    batch,
                    bytes,
                    place,
                } = open;
                stats.entry_bytes += bytes;
                if self.reading.as_ref().is_some_and(|reading| seq <= reading.upto) {
                    let (place, cast) = (place.clone(), cast.clone());
                    self.sealed_while_reading.insert(seq, Sealed { place, cast, batch });
                }
                if self.scheduler.wants() == seq && self.scheduler.has_room() {
                    self.scheduler.reserve(&place, seq);
                }
                self.scheduler
                    .fill(&place, seq, Entry::Cast(cast), batch, accepted.mono, now.mono);
            }
        }
    }

    fn place(&mut self, stanza: &Stanza, class: Class, rule: Placement) -> Option<Place> {
        let mut place = Place::of(stanza, class, rule, &self.classes)?;
        let track = &mut place.track;
        match track.line {
            Line::Room if !self.rooms.contains(&track.sender) => {
                if self.rooms.len() >= ROOMS_MAX {
                    self.rooms.clear();
                }
                self.rooms.insert(track.sender.clone());
            }
            // But what it answers, and what it gives out of an archive, is for one.
            Line::Pair(_) | Line::Many
                if place.sort != Sort::Iq && place.class != Class::Bulk && self.rooms.contains(&track.sender) =>
            {
                track.line = Line::Room;
            }
            Line::Room | Line::Pair(_) | Line::Many | Line::Presence | Line::State => {}
        }
        Some(place)
    }

    /// Where an entry belongs that was read back from the disk. What an earlier process has written may tell of a newcomer, as far as is known.
    fn place_of(&mut self, seq: Seq, encoded: &Bytes, rules: &Rules) -> Option<(Place, Entry)> {
        let entry = Entry::decode(encoded).ok()?;
        let Entry::Cast(cast) = &entry else {
            self.ledger.set(seq, Class::Control, 0);
            return Some((Place::unknown(), entry));
        };
        let stanza = Stanza::parse(cast.copy(0)?).ok()?;
        let class = self.ledger.class(seq);
        let mut place = self.place(
            &stanza,
            class.unwrap_or_else(|| Class::of(&stanza)),
            rules.place(&stanza),
        )?;
        if let Some(class) = class {
            // As it was counted.
            place.class = class;
        } else {
            self.ledger.set(seq, place.class, encoded.len());
        }
        Some((place, entry))
    }

    fn note_age(&mut self, seq: Seq, at: Mono) {
        let before = self.accepted_at(seq);
        // Either way: a calendar that was put back leaves the later number with the earlier time.
        let apart = at.since(before) + before.since(at);
        if apart >= AGE_STEP && self.ages.len() < AGES_MAX {
            self.ages.insert(seq, at);
        }
    }
}

/// What the spool holds less when a void takes an entry's place.
fn freed_bytes(entry: &Entry) -> u64 {
    entry.encoded_bytes().saturating_sub(Entry::Void.encoded_bytes()) as u64
}

/// By the calendar, because the other clock does not outlive a process. It may have been put back since: then it was just now.
fn on_mono(accepted: Wall, now: Now) -> Mono {
    now.mono - now.wall.since(accepted)
}
