//! From our server to the link: stanzas become casts, casts wait in the spool, the spool crosses.
//!
//! The spool on disk is the truth; the scheduler holds the next part of it in memory while the link is up. A number is taken
//! into the scheduler in its turn, from one of three places: the open group that has it, the cast that was just sealed,
//! or the disk.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
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
        collapse::{self, Collapse, Flow, Placed, Refusal},
        journal::{Change, Opening, Slot},
        scheduler::{Answer, Offer, Scheduler},
    },
    stanza::{Stanza, bare},
    time::{Deadline, Mono, Now, Wall},
};

/// Slots asked for in one read.
const READ_ENTRIES_MAX: usize = 512;

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
}

/// A cast that was sealed while a read was under way.
#[derive(Debug)]
struct Sealed {
    flow: Flow,
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
    /// Whether entries may cross.
    open: bool,
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
    /// When the ones among them were given out that have been acknowledged since this was last asked.
    delivered: Vec<Mono>,
    outputs: VecDeque<Output>,
}

impl Outward {
    pub fn new(opening: &Opening, window: Duration, memory_bytes: usize, now: Now) -> Self {
        let last = opening.spool_last;
        let mut ages = BTreeMap::new();
        if let Some(first) = opening.spool_first {
            // Not known when: it has waited at least as long as we are there.
            let since = opening.spool_since.map_or(now.mono, |accepted| on_mono(accepted, now));
            ages.insert(first, since);
        }
        Self {
            memory_bytes,
            collapse: Collapse::new(last, window),
            scheduler: Scheduler::new(memory_bytes),
            open: false,
            acked: opening.spool_first.map_or(last, |first| Seq(first.0 - 1)),
            beyond: BTreeSet::new(),
            inherited: last,
            written: last,
            open_groups: BTreeMap::new(),
            reading: None,
            sealed_while_reading: BTreeMap::new(),
            ages,
            acked_age: Mono::default(),
            delivered: Vec::new(),
            outputs: VecDeque::new(),
        }
    }

    pub fn set_window(&mut self, window: Duration) {
        self.collapse.set_window(window);
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
        batch: u64,
        now: Now,
        stats: &mut RelayStats,
    ) -> Result<Placed, Refusal> {
        let placed = self.collapse.handle_stanza(stanza, now)?;
        if placed.new {
            self.note_age(placed.seq, now.mono);
            let open = Open {
                accepted: now,
                batch,
                bytes: 0,
            };
            self.open_groups.insert(placed.seq, open);
            self.take_in_open();
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
        self.scheduler.restart(self.acked);
        self.open = true;
        self.take_in_open();
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
        self.scheduler.restart(self.acked);
        self.open = true;
        self.take_in_open();
    }

    pub fn link_down(&mut self) {
        self.open = false;
        self.scheduler.restart(self.acked);
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
    pub fn handle_read(&mut self, slots: Vec<Slot>, end: bool, now: Now, stats: &mut RelayStats) {
        let sealed = std::mem::take(&mut self.sealed_while_reading);
        let Some(Reading { from, upto }) = self.reading.take() else {
            return;
        };
        // The link may have begun anew since, further back: what lies before this read would be passed over.
        if !self.open || self.scheduler.wants() < from {
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
            let (flow, entry, batch) = match sealed.get(&slot.seq) {
                Some(sealed) => (sealed.flow.clone(), Entry::Cast(sealed.cast.clone()), sealed.batch),
                None => match flow_of(&slot.entry) {
                    Some((flow, entry)) => (flow, entry, 0),
                    None => {
                        // Our own disk gave us something that we did not write. The peer counts it, so it crosses as void.
                        stats.dropped(Drop::Malformed);
                        (Flow::from(""), Entry::Void, 0)
                    }
                },
            };
            let accepted = match slot.accepted {
                Some(accepted) if slot.seq <= self.inherited => on_mono(accepted, now),
                Some(_) | None => self.accepted_at(slot.seq),
            };
            self.note_age(slot.seq, accepted);
            self.scheduler.load(flow, slot.seq, entry, batch, accepted);
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
                self.scheduler.load(Flow::from(""), wants, Entry::Void, 0, now.mono);
            } else {
                return;
            }
        }
    }

    /// Asks the disk for what comes next, if there is room for it. The batch that gathers goes to the disk before the read does.
    pub fn advance(&mut self) {
        self.take_in_open();
        while self.open && self.beyond.contains(&self.scheduler.wants()) {
            self.scheduler.skip(self.scheduler.wants());
            self.take_in_open();
        }
        let wants = self.scheduler.wants();
        if self.open && self.reading.is_none() && self.scheduler.has_room() && wants <= self.written {
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
    pub fn offer(&mut self, committed: u64, offer: impl FnMut(Offer<'_>) -> Answer) -> bool {
        self.open && self.scheduler.offer(committed, offer)
    }

    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<Deadline> {
        self.collapse.poll_timeout()
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

    /// When this number, which waits, was given out, to the second.
    fn accepted_at(&self, seq: Seq) -> Mono {
        let noted = self.ages.range(..=seq).next_back();
        noted.map_or(self.acked_age, |(_, at)| *at)
    }

    /// Takes the wanted number from its open group, if it has one.
    fn take_in_open(&mut self) {
        while self.open
            && self.scheduler.has_room()
            && let Some(flow) = self.collapse.open_flow(self.scheduler.wants())
        {
            self.scheduler.reserve(flow, self.scheduler.wants());
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
                let open = self.open_groups.entry(seq).or_insert(Open {
                    accepted: now,
                    batch,
                    bytes,
                });
                (open.batch, open.bytes) = (batch, bytes);
                let accepted = open.accepted.wall;
                let put = Change::PutSpool { seq, accepted, entry };
                self.outputs.push_back(Output::Change(put));
            }
            collapse::Output::Sealed { seq, flow, cast } => {
                stats.shared += u64::from(cast.recipients.len() > 1);
                let open = self.open_groups.remove(&seq);
                let Open { accepted, batch, bytes } = open.unwrap_or(Open {
                    accepted: now,
                    batch,
                    bytes: 0,
                });
                stats.entry_bytes += bytes;
                if self.reading.as_ref().is_some_and(|reading| seq <= reading.upto) {
                    let (flow, cast) = (flow.clone(), cast.clone());
                    self.sealed_while_reading.insert(seq, Sealed { flow, cast, batch });
                }
                if self.open && self.scheduler.wants() == seq && self.scheduler.has_room() {
                    self.scheduler.reserve(flow.clone(), seq);
                }
                self.scheduler.fill(&flow, seq, Entry::Cast(cast), batch, accepted.mono);
            }
        }
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

/// By the calendar, because the other clock does not outlive a process. It may have been put back since: then it was just now.
fn on_mono(accepted: Wall, now: Now) -> Mono {
    now.mono - now.wall.since(accepted)
}

/// Whose entry this is, as read back from the disk.
fn flow_of(encoded: &Bytes) -> Option<(Flow, Entry)> {
    let entry = Entry::decode(encoded).ok()?;
    let flow = match &entry {
        Entry::Void => Flow::from(""),
        Entry::Cast(cast) => {
            let stanza = Stanza::parse(cast.copy(0)?).ok()?;
            bare(&stanza.from()?).into()
        }
    };
    Some((flow, entry))
}
