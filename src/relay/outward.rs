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
        collapse::{self, Collapse, Flow},
        journal::{Change, Slot},
        scheduler::{Answer, Offer, Scheduler},
    },
    stanza::{Stanza, bare},
    time::{Deadline, Mono, Now},
};

/// The part of the spool that is in memory.
const MEMORY_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Slots asked for in one read.
const READ_ENTRIES_MAX: usize = 512;

/// Points at which the age of the spool is known; one a second, so this is ten hours, and older is "older than that".
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
pub struct Outward {
    collapse: Collapse,
    scheduler: Scheduler,
    /// Whether entries may cross: the peer has said what it holds.
    open: bool,
    acked: Seq,
    /// Beyond `acked`, these are with the peer too.
    beyond: BTreeSet<Seq>,
    /// The last number whose slot has been given to the store.
    written: Seq,
    /// The batch with the last write of each open group. A group may be sealed long after it, in a batch that stays empty.
    open_writes: BTreeMap<Seq, u64>,
    /// While a read is under way: from where.
    reading: Option<Seq>,
    /// Sealed while a read was under way, which may have seen the slot before its last write.
    sealed_while_reading: BTreeMap<Seq, (Flow, Cast)>,
    /// When numbers were given out, for the age of what waits.
    ages: VecDeque<(Seq, Mono)>,
    outputs: VecDeque<Output>,
}

impl Outward {
    pub fn new(acked: Seq, last: Seq, window: Duration, now: Now) -> Self {
        let mut ages = VecDeque::new();
        if acked < last {
            ages.push_back((last, now.mono));
        }
        Self {
            collapse: Collapse::new(last, window),
            scheduler: Scheduler::new(MEMORY_BYTES_MAX),
            open: false,
            acked,
            beyond: BTreeSet::new(),
            written: last,
            open_writes: BTreeMap::new(),
            reading: None,
            sealed_while_reading: BTreeMap::new(),
            ages,
            outputs: VecDeque::new(),
        }
    }

    pub fn acked(&self) -> Seq {
        self.acked
    }

    pub fn last(&self) -> Seq {
        self.collapse.last()
    }

    /// Takes in a stanza. `batch` is the one that its slot will be written with.
    pub fn handle_stanza(&mut self, stanza: &Stanza, batch: u64, now: Now, stats: &mut RelayStats) {
        stats.copies_accepted += 1;
        stats.copy_bytes_accepted += stanza.bytes().len() as u64;
        match self.collapse.handle_stanza(stanza, now) {
            // The streams let nothing through without both addresses.
            None => stats.dropped(Drop::Malformed),
            Some((seq, true)) => {
                stats.casts += 1;
                self.note_age(seq, now);
                self.take_in_open();
            }
            Some((_, false)) => {}
        }
        self.drain_collapse(batch, now, stats);
    }

    pub fn handle_timeout(&mut self, batch: u64, now: Now, stats: &mut RelayStats) {
        self.collapse.handle_timeout(now);
        self.drain_collapse(batch, now, stats);
    }

    pub fn seal_all(&mut self, batch: u64, now: Now, stats: &mut RelayStats) {
        self.collapse.seal_all();
        self.drain_collapse(batch, now, stats);
    }

    /// The link is up and the peer holds what `received` says.
    pub fn link_up(&mut self, received: &Received) {
        self.handle_acked(received);
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
        while self.ages.front().is_some_and(|(seq, _)| *seq <= self.acked) {
            self.ages.pop_front();
        }
        self.outputs.push_back(Output::Change(Change::DropSpool {
            upto,
            beyond: beyond.clone(),
        }));
    }

    pub fn handle_read(&mut self, slots: Vec<Slot>, now: Now, stats: &mut RelayStats) {
        let sealed = std::mem::take(&mut self.sealed_while_reading);
        let from = self.reading.take();
        // The link may have begun anew since, further back: what lies before this read would be passed over.
        if !self.open || from.is_none_or(|from| self.scheduler.wants() < from) {
            return;
        }
        for slot in slots {
            // What is missing between two slots has been acknowledged and dropped.
            while self.scheduler.wants() < slot.seq && self.collapse.open_flow(self.scheduler.wants()).is_none() {
                self.scheduler.skip(self.scheduler.wants());
            }
            self.take_in_open();
            if self.scheduler.wants() != slot.seq {
                continue;
            }
            if self.beyond.contains(&slot.seq) {
                self.scheduler.skip(slot.seq);
                continue;
            }
            let (flow, entry) = match sealed.get(&slot.seq) {
                Some((flow, cast)) => (flow.clone(), Entry::Cast(cast.clone())),
                None => match flow_of(&slot.entry) {
                    Some(read) => read,
                    None => {
                        // Our own disk gave us something that we did not write. The peer counts it, so it crosses as void.
                        stats.dropped(Drop::Malformed);
                        (Flow::from(""), Entry::Void)
                    }
                },
            };
            self.scheduler.load(flow, slot.seq, entry, now.mono);
        }
        self.take_in_open();
    }

    /// Asks the disk for what comes next, if there is room for it.
    pub fn advance(&mut self) {
        self.take_in_open();
        let wants = self.scheduler.wants();
        if self.open && self.reading.is_none() && self.scheduler.has_room() && wants <= self.written {
            self.reading = Some(wants);
            self.outputs.push_back(Output::Read {
                from: wants,
                entries_max: READ_ENTRIES_MAX,
                bytes_max: MEMORY_BYTES_MAX / 2,
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

    /// How long the oldest entry has waited, to the second.
    pub fn oldest(&self, now: Now) -> Duration {
        self.ages
            .front()
            .map_or(Duration::ZERO, |(_, since)| now.mono.since(*since))
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
        while let Some(output) = self.collapse.poll_output() {
            match output {
                collapse::Output::Write { seq, cast } => {
                    self.written = self.written.max(seq);
                    self.open_writes.insert(seq, batch);
                    let entry = Entry::Cast(cast).encode();
                    self.outputs.push_back(Output::Change(Change::PutSpool { seq, entry }));
                }
                collapse::Output::Sealed { seq, flow, cast } => {
                    stats.shared += u64::from(cast.recipients.len() > 1);
                    if self.reading.is_some() {
                        self.sealed_while_reading.insert(seq, (flow.clone(), cast.clone()));
                    }
                    if self.open && self.scheduler.wants() == seq && self.scheduler.has_room() {
                        self.scheduler.reserve(flow.clone(), seq);
                    }
                    let written = self.open_writes.remove(&seq).unwrap_or(batch);
                    self.scheduler.fill(&flow, seq, Entry::Cast(cast), written, now.mono);
                }
            }
        }
        self.take_in_open();
    }

    fn note_age(&mut self, seq: Seq, now: Now) {
        let recent = self
            .ages
            .back()
            .is_some_and(|(_, at)| now.mono.since(*at) < Duration::from_secs(1));
        if (!recent || self.ages.is_empty()) && self.ages.len() < AGES_MAX {
            self.ages.push_back((seq, now.mono));
        }
    }
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
