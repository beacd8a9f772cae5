//! From the link to our server: entries that have crossed, and the lanes that carry their copies.
//!
//! An entry is on disk before the peer is told that it arrived, and stays there until every copy is with the server.
//! A copy is *marked* as given, on disk, before it is written to a lane, and is *confirmed* when the server has acknowledged it
//! (XEP-0198), or where it does not speak that, when the kernel has taken it.
//!
//! ```text
//!            crossed                 lane has room        batch on disk           confirmed
//!   (link) ──────────▶ queued on ──────────────▶ marked ───────────────▶ written ──────────▶ done
//!                       its lane ◀──────────────────────────────────────────┘
//!                                 the lane went down: what it had not confirmed is queued again
//! ```
//!
//! After our own process was killed, a copy that was marked but not confirmed is *in doubt*: the kernel delivers what was
//! written before the kill, so it is not written again, and counted.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use bytes::Bytes;

use super::{Drop, LaneFault, LaneKey, RelayStats};
use crate::{
    codec::{
        check,
        entry::{Cast, Entry},
        position::Seq,
    },
    queue::journal::{Change, Slot},
    stanza::{Condition, Domain, DomainPair, ErrorType, Stanza, bare, bounce, domain_of},
    time::{Deadline, Mono, Now},
};

/// What may be written to a lane and not yet be confirmed: at most this is in doubt when our process is killed. It also bounds what a
/// room says back in one go, which is lost where a kill meets it on a leg without acks: with 16 KiB a kill in the burst after a
/// cut lost 18 messages to five occupants, with this 11. Servers confirm within milliseconds what they read, so a lane still
/// carries some hundred kB a second.
const IN_FLIGHT_BYTES_MAX: usize = 2 * 1024;

/// Slots asked for in one read.
const READ_ENTRIES_MAX: usize = 512;

/// First wait before a lane that failed is opened again; it doubles up to `lane_retry_max`. The server is near, so trying costs nothing;
/// a restart takes seconds, and nobody should wait a minute for it to be noticed.
const RETRY_FIRST: Duration = Duration::from_millis(500);

/// A stanza on which this many lives of a lane ended in a row is set aside: everything behind it would wait for ever.
const STRIKES_MAX: u32 = 3;

/// Checked recipients that are remembered, and how long each may be: some megabytes, also if the peer wants to fill them.
const RECIPIENTS_MAX: usize = 10_000;
const RECIPIENT_BYTES_MAX: usize = 512;

/// Arrivals whose number at the peer is remembered for those who watch.
const ORIGINS_MAX: usize = 10_000;

/// Answers of our own that wait for a lane. They are not durable; beyond this the newest is dropped and counted.
const OWN_MAX: usize = 1024;

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Output {
    Change(Change),
    OpenLane {
        lane: LaneKey,
        life: u64,
    },
    /// To be written once the batch that holds the changes given out before it is on disk.
    Write {
        lane: LaneKey,
        life: u64,
        stanzas: Vec<Bytes>,
    },
    Read {
        from: Seq,
        entries_max: usize,
        bytes_max: usize,
    },
    /// An answer for a far sender.
    Answer(Stanza),
}

/// What is known of a `to` attribute.
#[derive(Clone, Debug)]
struct Recipient {
    domain: Domain,
    /// Of the bare address, however it is written: it picks the lane. Bare, because a room is addressed as itself and by its
    /// occupants' nicks, and has to hear a user's words in order.
    hash: u64,
}

#[derive(Debug)]
struct Item {
    cast: Cast,
    given: Bits,
    unconfirmed: usize,
    bytes: usize,
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum Copy {
    Of { seq: Seq, index: usize },
    Own(Bytes),
}

#[derive(Debug)]
enum LaneState {
    /// Nothing is queued, or nothing was yet.
    Closed,
    /// The server was not to be had.
    Waiting {
        until: Mono,
    },
    Opening {
        life: u64,
    },
    Up {
        life: u64,
        /// Whether the server acknowledges stanzas.
        acks: bool,
        stanza_bytes_max: usize,
        /// How many of this life's copies are confirmed.
        confirmed: u64,
    },
}

#[derive(Debug)]
struct Lane {
    state: LaneState,
    /// Opened if it is not open yet, though nothing is queued.
    expected: bool,
    /// The same, as often as it takes.
    held: bool,
    queue: VecDeque<Copy>,
    /// Of them, answers of our own.
    own: usize,
    in_flight: VecDeque<(Copy, usize)>,
    in_flight_bytes: usize,
    failures: u32,
    /// The copy that stood first when the server last refused what we sent, and how often in a row it did. While there is one, stanzas
    /// go one at a time, so that it is clear which one the server does not like, and those before it are not sent again.
    suspect: Option<(Copy, u32)>,
}

#[derive(Debug)]
pub struct Inward {
    local: Vec<Domain>,
    far: Vec<Domain>,
    lanes_per_pair: u8,
    /// The longest wait before a lane that failed is opened again.
    lane_retry_max: Duration,
    /// What may be in memory, by bytes of templates and addresses; the rest waits on disk.
    memory_bytes: usize,
    lanes: BTreeMap<LaneKey, Lane>,
    items: BTreeMap<Seq, Item>,
    bytes: usize,
    /// Recipients that were checked: the same ones come again with every message of a room.
    recipients: BTreeMap<Bytes, Recipient>,
    /// The last number given to an arrival. It is ours: a peer that lost its disk counts from 1 again.
    last: Seq,
    /// Arrivals up to this one are in memory or done with; the rest, up to `last`, is only on disk.
    taken: Seq,
    /// While a read is under way: `last` when it was asked for.
    reading: Option<Seq>,
    lives: u64,
    stopped: bool,
    /// Whether what becomes of each copy is told.
    traced: bool,
    /// The numbers that the peer has for what is still here, as far as it came since this process started.
    origins: BTreeMap<Seq, Seq>,
    /// What our server has confirmed since this was last asked, with the peer's number.
    delivered: Vec<(Option<Seq>, Bytes)>,
    outputs: VecDeque<Output>,
}

impl Inward {
    pub fn new(
        local: Vec<Domain>,
        far: Vec<Domain>,
        lanes_per_pair: u8,
        lane_retry_max: Duration,
        memory_bytes: usize,
        last: Seq,
    ) -> Self {
        Self {
            local,
            far,
            lanes_per_pair: lanes_per_pair.max(1),
            lane_retry_max,
            memory_bytes,
            lanes: BTreeMap::new(),
            items: BTreeMap::new(),
            bytes: 0,
            recipients: BTreeMap::new(),
            last,
            taken: Seq(0),
            reading: None,
            lives: 0,
            stopped: false,
            traced: false,
            origins: BTreeMap::new(),
            delivered: Vec::new(),
            outputs: VecDeque::new(),
        }
    }

    /// Takes in a cast for our server: one that has crossed and was [admitted](Self::admit), or one of our own. Gives the bytes of
    /// its entry.
    pub fn put(&mut self, pair: &DomainPair, cast: Cast, origin: Option<Seq>) -> usize {
        let all_in_memory = self.taken == self.last;
        let seq = Seq(self.last.0 + 1);
        self.last = seq;
        if let Some(origin) = origin.filter(|_| self.traced) {
            self.origins.insert(seq, origin);
            if self.origins.len() > ORIGINS_MAX {
                self.origins.pop_first();
            }
        }
        let entry = Entry::Cast(cast.clone()).encode();
        let bytes = entry.len();
        self.outputs.push_back(Output::Change(Change::PutInbox { seq, entry }));
        if all_in_memory && self.bytes < self.memory_bytes {
            self.taken = seq;
            self.enqueue(seq, pair, cast, Bits::default());
        }
        bytes
    }

    /// Which pair a cast of our own belongs to, if it is one that the server may be given.
    pub fn pair_of(&mut self, cast: &Cast) -> Option<DomainPair> {
        cast.check().ok()?;
        self.admit(&Entry::Cast(cast.clone()).encode())
            .ok()
            .flatten()
            .map(|(pair, _)| pair)
    }

    pub fn handle_read(&mut self, slots: Vec<Slot>, end: bool, stats: &mut RelayStats) {
        let Some(upto) = self.reading.take() else { return };
        for slot in slots {
            self.taken = slot.seq;
            // The configuration may have changed since the entry came, so it is looked at again.
            match self.admit(&slot.entry) {
                Ok(Some((pair, cast))) => {
                    let given = Bits(slot.given);
                    stats.in_doubt += given.count() as u64;
                    self.enqueue(slot.seq, &pair, cast, given);
                }
                Ok(None) => self
                    .outputs
                    .push_back(Output::Change(Change::DropInbox { seq: slot.seq })),
                Err(drop) => {
                    stats.dropped(drop);
                    self.outputs
                        .push_back(Output::Change(Change::DropInbox { seq: slot.seq }));
                }
            }
        }
        if end {
            self.taken = self.taken.max(upto);
        }
    }

    pub fn handle_lane_up(&mut self, key: &LaneKey, life: u64, acks: bool, stanza_bytes_max: Option<usize>) {
        if let Some(lane) = self.lanes.get_mut(key)
            && matches!(lane.state, LaneState::Opening { life: opening } if opening == life)
        {
            lane.failures = 0;
            lane.held = false;
            lane.state = LaneState::Up {
                life,
                acks,
                stanza_bytes_max: stanza_bytes_max.unwrap_or(usize::MAX),
                confirmed: 0,
            };
        }
    }

    /// `stanzas` of this life's stanzas are with the server.
    pub fn handle_lane_confirmed(&mut self, key: &LaneKey, life: u64, stanzas: u64, stats: &mut RelayStats) {
        let Some(lane) = self.lanes.get_mut(key) else { return };
        let LaneState::Up {
            life: up, confirmed, ..
        } = &mut lane.state
        else {
            return;
        };
        if *up != life {
            return;
        }
        let mut done = Vec::new();
        while *confirmed < stanzas
            && let Some((copy, bytes)) = lane.in_flight.pop_front()
        {
            *confirmed += 1;
            lane.in_flight_bytes -= bytes;
            lane.suspect = None;
            stats.copies_delivered += 1;
            stats.copy_bytes_delivered += bytes as u64;
            done.push(copy);
        }
        for copy in done {
            if self.traced {
                self.note_delivered(&copy);
            }
            self.done(&copy);
        }
    }

    pub fn set_traced(&mut self, traced: bool) {
        self.traced = traced;
        if !traced {
            self.origins.clear();
            self.delivered.clear();
        }
    }

    /// What our server has confirmed, with the peer's number, if it is known.
    pub fn take_delivered(&mut self) -> Vec<(Option<Seq>, Bytes)> {
        std::mem::take(&mut self.delivered)
    }

    fn note_delivered(&mut self, copy: &Copy) {
        let (origin, stanza) = match copy {
            Copy::Own(stanza) => (None, Some(stanza.clone())),
            Copy::Of { seq, index } => {
                let item = self.items.get(seq);
                (
                    self.origins.get(seq).copied(),
                    item.and_then(|item| item.cast.copy(*index)),
                )
            }
        };
        self.delivered.extend(stanza.map(|stanza| (origin, stanza)));
    }

    pub fn handle_lane_down(&mut self, key: &LaneKey, life: u64, fault: LaneFault, now: Now, stats: &mut RelayStats) {
        let Some(lane) = self.lanes.get_mut(key) else { return };
        let (current, acks) = match lane.state {
            LaneState::Opening { life } => (life, true),
            LaneState::Up { life, acks, .. } => (life, acks),
            LaneState::Closed | LaneState::Waiting { .. } => return,
        };
        if current != life {
            return;
        }
        let never_up = matches!(lane.state, LaneState::Opening { .. });
        let mut poison = None;
        if let Some((first, _)) = lane.in_flight.front()
            && fault == LaneFault::Refused
        {
            let strikes = match lane.suspect.take() {
                Some((copy, strikes)) if copy == *first => strikes + 1,
                Some(_) | None => 1,
            };
            if strikes >= STRIKES_MAX {
                poison = lane.in_flight.pop_front().map(|(copy, _)| copy);
            } else {
                lane.suspect = Some((first.clone(), strikes));
            }
        }
        if !acks {
            let copies = lane
                .in_flight
                .iter()
                .filter(|(copy, _)| matches!(copy, Copy::Of { .. }));
            stats.in_doubt += copies.count() as u64;
        }
        let again: Vec<Copy> = lane.in_flight.drain(..).map(|(copy, _)| copy).collect();
        lane.in_flight_bytes = 0;
        let mut unmarked = BTreeSet::new();
        for copy in again.into_iter().rev() {
            match &copy {
                Copy::Of { seq, index } => {
                    if let Some(item) = self.items.get_mut(seq) {
                        item.given.clear(*index);
                        unmarked.insert(*seq);
                    }
                }
                Copy::Own(_) => lane.own += 1,
            }
            lane.queue.push_front(copy);
        }
        lane.state = if lane.queue.is_empty() && !never_up {
            // The server may close what is idle (ejabberd after an hour). That is no fault.
            LaneState::Closed
        } else {
            let wait = RETRY_FIRST
                .saturating_mul(1 << lane.failures.min(8))
                .min(self.lane_retry_max);
            lane.failures += 1;
            LaneState::Waiting { until: now.mono + wait }
        };
        self.mark(unmarked);
        if let Some(poison) = poison {
            stats.dropped(Drop::RefusedByServer);
            let text = "The receiving server refused this stanza.";
            if let Copy::Of { seq, index } = &poison
                && let Some(bytes) = self.items.get(seq).and_then(|item| item.cast.copy(*index))
            {
                self.answer(bytes, text);
            }
            self.done(&poison);
        }
    }

    /// Writes down which copies of these are given.
    fn mark(&mut self, seqs: BTreeSet<Seq>) {
        for seq in seqs {
            if let Some(item) = self.items.get(&seq) {
                let given = item.given.0.clone();
                self.outputs.push_back(Output::Change(Change::MarkInbox { seq, given }));
            }
        }
    }

    /// Tells the far sender that our server does not take this, if it may be told.
    fn answer(&mut self, bytes: Bytes, text: &str) {
        if let Some(answer) = Stanza::parse(bytes)
            .ok()
            .and_then(|stanza| bounce(&stanza, ErrorType::Modify, Condition::PolicyViolation, text))
            .and_then(|answer| Stanza::parse(answer).ok())
        {
            self.outputs.push_back(Output::Answer(answer));
        }
    }

    /// Something for a local user that need not be durable: a refusal. In the order of what else is for it: what we ask a room in the name
    /// of somebody must not come after their leave.
    pub fn send_own(&mut self, pair: DomainPair, stanza: Bytes, stats: &mut RelayStats) {
        let read = Stanza::parse(stanza.clone()).ok();
        let to = read.as_ref().and_then(Stanza::to).unwrap_or_default();
        let key = self.lane_key(pair, hash(bare(&to).as_bytes()));
        let lane = self.lanes.entry(key).or_insert_with(Lane::new);
        if lane.own >= OWN_MAX {
            return stats.dropped(Drop::AnswerQueueFull);
        }
        lane.own += 1;
        lane.queue.push_back(Copy::Own(stanza));
    }

    /// Somebody here speaks to the far end: what comes back will need this lane, and opening it takes longer than writing to it.
    pub fn expect(&mut self, pair: DomainPair, speaker: &str) {
        let key = self.lane_key(pair, hash(bare(speaker).as_bytes()));
        self.lanes.entry(key).or_insert_with(Lane::new).expected = true;
    }

    /// The server may be restarting, and it matters when it is back: this lane is opened again, though nothing is queued.
    pub fn hold(&mut self, key: &LaneKey) {
        if let Some(lane) = self.lanes.get_mut(key) {
            lane.held = true;
        }
    }

    fn lane_key(&self, pair: DomainPair, hash: u64) -> LaneKey {
        LaneKey {
            pair,
            lane: u8::try_from(hash % u64::from(self.lanes_per_pair)).unwrap_or(0),
        }
    }

    /// Gives nothing more to lanes; what they have may still be confirmed.
    pub fn stop(&mut self) {
        self.stopped = true;
    }

    /// Opens lanes that are wanted, and gives out what they can take.
    pub fn advance(&mut self, now: Now, stats: &mut RelayStats) {
        if self.stopped {
            return;
        }
        if self.reading.is_none() && self.bytes <= self.memory_bytes / 2 && self.taken < self.last {
            self.reading = Some(self.last);
            self.outputs.push_back(Output::Read {
                from: Seq(self.taken.0 + 1),
                entries_max: READ_ENTRIES_MAX,
                bytes_max: self.memory_bytes / 2,
            });
        }
        let mut marked = BTreeSet::new();
        let mut writes = Vec::new();
        let mut oversize = Vec::new();
        for (key, lane) in &mut self.lanes {
            let expected = std::mem::take(&mut lane.expected);
            if lane.queue.is_empty() && !expected && !lane.held {
                continue;
            }
            match lane.state {
                LaneState::Waiting { until } if until > now.mono => {}
                LaneState::Closed | LaneState::Waiting { .. } => {
                    self.lives += 1;
                    lane.state = LaneState::Opening { life: self.lives };
                    self.outputs.push_back(Output::OpenLane {
                        lane: key.clone(),
                        life: self.lives,
                    });
                }
                LaneState::Opening { .. } => {}
                LaneState::Up {
                    life, stanza_bytes_max, ..
                } => {
                    let mut stanzas = Vec::new();
                    while lane.in_flight_bytes < IN_FLIGHT_BYTES_MAX
                        && (lane.suspect.is_none() || lane.in_flight.is_empty())
                        && let Some(copy) = lane.queue.pop_front()
                    {
                        let bytes = match &copy {
                            Copy::Own(bytes) => {
                                lane.own -= 1;
                                bytes.clone()
                            }
                            Copy::Of { seq, index } => {
                                // Queued copies have their item: it goes only when all are confirmed.
                                let Some(item) = self.items.get_mut(seq) else { continue };
                                let Some(bytes) = item.cast.copy(*index) else { continue };
                                // Marked also if it is answered instead: it must not be answered again after a restart.
                                item.given.set(*index);
                                marked.insert(*seq);
                                if bytes.len() > stanza_bytes_max {
                                    oversize.push((copy, bytes));
                                    continue;
                                }
                                bytes
                            }
                        };
                        lane.in_flight_bytes += bytes.len();
                        lane.in_flight.push_back((copy, bytes.len()));
                        stanzas.push(bytes);
                    }
                    if !stanzas.is_empty() {
                        writes.push(Output::Write {
                            lane: key.clone(),
                            life,
                            stanzas,
                        });
                    }
                }
            }
        }
        self.mark(marked);
        self.outputs.extend(writes);
        for (copy, bytes) in oversize {
            stats.dropped(Drop::OverServerLimit);
            self.done(&copy);
            self.answer(bytes, "The receiving server takes no stanza of this size.");
        }
    }

    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<Deadline> {
        if self.stopped {
            return None;
        }
        let until = self.lanes.values().filter_map(|lane| match lane.state {
            LaneState::Waiting { until } if !lane.queue.is_empty() || lane.held => Some(until),
            LaneState::Closed | LaneState::Waiting { .. } | LaneState::Opening { .. } | LaneState::Up { .. } => None,
        });
        Some(Deadline {
            at: until.min()?,
            why: "lane retry",
        })
    }

    /// Lanes that are up, and copies written to them that are not confirmed.
    pub fn lanes_up(&self) -> (usize, usize) {
        let up = self
            .lanes
            .values()
            .filter(|lane| matches!(lane.state, LaneState::Up { .. }));
        let in_flight = self.lanes.values().map(|lane| lane.in_flight.len()).sum();
        (up.count(), in_flight)
    }

    /// Whether nothing waits for a lane or for its confirmation.
    pub fn is_quiet(&self) -> bool {
        self.taken == self.last && self.items.is_empty()
    }

    fn enqueue(&mut self, seq: Seq, pair: &DomainPair, cast: Cast, given: Bits) {
        let copies = cast.recipients.len();
        let waiting: Vec<usize> = (0..copies).filter(|&index| !given.get(index)).collect();
        if waiting.is_empty() {
            self.outputs.push_back(Output::Change(Change::DropInbox { seq }));
            return;
        }
        for &index in &waiting {
            // Checked when the entry was let in, so it is known, or else it has only one lane to go to.
            let hash = self
                .recipient(&cast.recipients[index])
                .map_or(0, |recipient| recipient.hash);
            let key = self.lane_key(pair.clone(), hash);
            let lane = self.lanes.entry(key).or_insert_with(Lane::new);
            lane.queue.push_back(Copy::Of { seq, index });
        }
        let bytes = cast.template.len() + cast.recipients.iter().map(Bytes::len).sum::<usize>();
        self.bytes += bytes;
        let item = Item {
            cast,
            given,
            unconfirmed: waiting.len(),
            bytes,
        };
        self.items.insert(seq, item);
    }

    fn done(&mut self, copy: &Copy) {
        let Copy::Of { seq, .. } = copy else { return };
        let Some(item) = self.items.get_mut(seq) else { return };
        item.unconfirmed -= 1;
        if item.unconfirmed == 0 {
            self.bytes -= item.bytes;
            self.items.remove(seq);
            self.origins.remove(seq);
            self.outputs.push_back(Output::Change(Change::DropInbox { seq: *seq }));
        }
    }

    /// Reads an entry from the peer: `None` if it is void.
    ///
    /// The peer is trusted with its own domains only, and our server closes a stream on one bad byte, so the
    /// stanza is checked as strictly as if it had come from a server.
    pub fn admit(&mut self, encoded: &Bytes) -> Result<Option<(DomainPair, Cast)>, Drop> {
        let cast = match Entry::decode(encoded).map_err(|_| Drop::Malformed)? {
            Entry::Void => return Ok(None),
            Entry::Cast(cast) => cast,
        };
        let first = cast.copy(0).ok_or(Drop::Malformed)?;
        let stanza = check::stanza(&first).map_err(|_| Drop::Malformed)?;
        // The address that is checked below must be the one that the server will read: not a text in the body, beside another `to`.
        let (_, to_at, attribute) = stanza.split_to().ok_or(Drop::Malformed)?;
        if to_at != cast.to_at as usize || attribute != cast.recipients[0] {
            return Err(Drop::Malformed);
        }
        let from = stanza.from().ok_or(Drop::Malformed)?;
        let far = Domain::new(domain_of(&from)).map_err(|_| Drop::Malformed)?;
        if !self.far.contains(&far) {
            return Err(Drop::WrongSender);
        }
        let local = self.recipient(&cast.recipients[0])?.domain;
        if !self.local.contains(&local) {
            return Err(Drop::WrongRecipient);
        }
        for attribute in &cast.recipients[1..] {
            if self.recipient(attribute)?.domain != local {
                return Err(Drop::WrongRecipient);
            }
        }
        Ok(Some((DomainPair { local, far }, cast)))
    }

    fn recipient(&mut self, attribute: &Bytes) -> Result<Recipient, Drop> {
        if let Some(known) = self.recipients.get(attribute) {
            return Ok(known.clone());
        }
        let to = check::to_attribute(attribute).map_err(|_| Drop::Malformed)?;
        let recipient = Recipient {
            domain: Domain::new(domain_of(&to)).map_err(|_| Drop::Malformed)?,
            hash: hash(bare(&to).as_bytes()),
        };
        if self.recipients.len() >= RECIPIENTS_MAX {
            self.recipients.clear();
        }
        if attribute.len() <= RECIPIENT_BYTES_MAX {
            // A copy: a slice would keep the whole entry in memory.
            self.recipients
                .insert(Bytes::copy_from_slice(attribute), recipient.clone());
        }
        Ok(recipient)
    }
}

impl Lane {
    fn new() -> Self {
        Self {
            state: LaneState::Closed,
            expected: false,
            held: false,
            queue: VecDeque::new(),
            own: 0,
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            failures: 0,
            suspect: None,
        }
    }
}

/// FNV-1a: spreads recipients over lanes, always the same lane for one recipient, so its order is kept.
fn hash(address: &[u8]) -> u64 {
    let fold = |hash: u64, &byte: &u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    address.iter().fold(0xcbf2_9ce4_8422_2325, fold) >> 32
}

/// A set of copies: bit `k` of byte `k / 8`.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Bits(Vec<u8>);

impl Bits {
    fn get(&self, index: usize) -> bool {
        self.0.get(index / 8).is_some_and(|byte| byte & (1 << (index % 8)) != 0)
    }

    fn set(&mut self, index: usize) {
        if self.0.len() <= index / 8 {
            self.0.resize(index / 8 + 1, 0);
        }
        self.0[index / 8] |= 1 << (index % 8);
    }

    fn clear(&mut self, index: usize) {
        if let Some(byte) = self.0.get_mut(index / 8) {
            *byte &= !(1 << (index % 8));
        }
    }

    fn count(&self) -> usize {
        self.0.iter().map(|byte| byte.count_ones() as usize).sum()
    }
}
