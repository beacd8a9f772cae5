//! One peer's machines together, and the one place that routes.
//!
//! A [`Relay`] owns everything that concerns one peer: the collapse of what our server sends, the spool, the link session,
//! the inbox and the lanes towards our server. It is pure: stanzas, frames, commits and the time are handed in, and come out as
//! [`Output`]s. The simulator runs two of them against each other; `io` runs one beside sockets and a disk.
//!
//! # The way of one stanza
//!
//! ```text
//! leg ─▶ collapse ─▶ spool ─(commit: the leg may ack)─▶ schedule ─▶ link session ─▶ link
//! link ─▶ link session ─▶ inbox ─(commit: the link may ack)─▶ mark ─(commit)─▶ lane ─▶ server
//! ```
//!
//! # Commits
//!
//! What must be durable gathers in a batch. One batch is with the disk at a time, so under load the next one grows while the
//! disk works: group commit without a timer. Whatever waits for the disk (acknowledging a leg or the peer, sending an entry,
//! writing to a lane) names the batch that it waits for.

pub mod cost;
mod inward;
mod outward;
mod plain;
pub mod trace;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;

use self::{
    cost::{Rooms, Way},
    inward::Inward,
    outward::{Outward, Refused},
    plain::Plain,
    trace::{Decision, EntryId, Event, Question, Refusal, Trace},
};
use crate::{
    codec::{
        compress,
        entry::{Cast, ENTRY_BYTES_MAX, Entry},
        frame::{self, Hello, Reason},
        position::{Added, Epoch, Received, Seq},
    },
    link::session::{self, LinkError, LinkSession, Sent, SessionConfig, SessionStats},
    mirror::{self, Mirror, MirrorSettings, MirrorStats},
    queue::{
        class::{Class, Classes},
        collapse::Placed,
        journal::{
            Batch, Change, Levels, Opening, STATE_BYTES_MAX, STATE_KEY_BYTES_MAX, STATE_VALUE_BYTES_MAX, Slot,
            state_bytes,
        },
        ledger::Level,
        rules::{Action, Direction, Fate, Rule, Rules, Said},
        scheduler::{Answer, Expired, Offer},
    },
    stanza::{Condition, Domain, DomainPair, ErrorType, Stanza, bounce, domain_of},
    time::{Deadline, Now},
};

/// Names a receiving stream for as long as the process lives.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct LegId(pub u64);

/// One of the initiating streams towards our server for a domain pair. Recipients are spread over a pair's lanes by
/// a hash of their bare addresses, so that what goes to one user or one room stays in order.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct LaneKey {
    pub pair: DomainPair,
    pub lane: u8,
}

/// Why a lane went down.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LaneFault {
    /// The server closed it in good order, or could not be reached.
    Gone,
    /// The server refused something that we sent: a stream error other than a shutdown.
    Refused,
}

/// Why something that came was not carried on. The values of the metric's `reason` label.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Drop {
    Malformed,
    /// The peer sent in the name of a domain that is not its own.
    WrongSender,
    /// The peer sent to a domain that is not ours.
    WrongRecipient,
    /// The server closed its stream on this stanza again and again.
    RefusedByServer,
    /// Larger than the server takes (XEP-0478).
    OverServerLimit,
    /// Larger than the peer takes.
    OverPeerLimit,
    AnswerQueueFull,
}

impl Drop {
    pub const ALL: [Self; 7] = [
        Self::Malformed,
        Self::WrongSender,
        Self::WrongRecipient,
        Self::RefusedByServer,
        Self::OverServerLimit,
        Self::OverPeerLimit,
        Self::AnswerQueueFull,
    ];

    pub fn as_label(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::WrongSender => "wrong_sender",
            Self::WrongRecipient => "wrong_recipient",
            Self::RefusedByServer => "refused_by_server",
            Self::OverServerLimit => "over_server_limit",
            Self::OverPeerLimit => "over_peer_limit",
            Self::AnswerQueueFull => "answer_queue_full",
        }
    }
}

/// What the relay has counted since the process started.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RelayStats {
    /// Stanzas that our server sent, every copy counted: what plain S2S would have carried.
    pub copies_accepted: u64,
    pub copy_bytes_accepted: u64,
    /// Of these, what was dealt with on this side, so that nothing crossed for it.
    pub near_bytes: u64,
    /// What rules have stripped and dropped of them.
    pub rule_bytes: u64,
    /// The rest, and what the mirror says itself.
    pub crossing_bytes: u64,
    /// What became of the rest: slots, as they are stored. Those that may still grow are not among them.
    pub entry_bytes: u64,
    /// A sample of the accepted copies, and what a compressor that remembers makes of it.
    pub sampled_bytes: u64,
    pub sampled_compressed_bytes: u64,
    /// Slots that they became.
    pub casts: u64,
    /// Of which have more than one recipient.
    pub shared: u64,
    /// Stanzas that were refused because the spool was full. Not among the accepted ones.
    pub refused: u64,
    pub entries_sent: u64,
    pub entries_received: u64,
    /// Of which have more than one recipient.
    pub shared_received: u64,
    pub duplicates: u64,
    /// Entries that the peer no longer has and we never got: its disk or ours was put back to an earlier state.
    pub missing: u64,
    pub copies_delivered: u64,
    pub copy_bytes_delivered: u64,
    /// Copies whose delivery may be unknown: the leg has no acks and broke, or we were killed in between. After a kill, copies of
    /// the same cast that were known to be delivered are among them: the disk does not tell them apart.
    pub in_doubt: u64,
    pub link_ups: u64,
    /// By class: what waited too long, what a later one took the place of, and what was refused because there was too much of its class.
    pub expired: [u64; Class::COUNT],
    pub superseded: [u64; Class::COUNT],
    /// Of entries, as they were stored.
    pub superseded_bytes: u64,
    pub expired_bytes: u64,
    /// Of entries that have come, by what they look like here.
    pub received_bytes: [u64; Class::COUNT],
    pub class_full: [u64; Class::COUNT],
    dropped: BTreeMap<Drop, u64>,
}

impl RelayStats {
    fn dropped(&mut self, drop: Drop) {
        *self.dropped.entry(drop).or_default() += 1;
    }

    pub fn dropped_total(&self, drop: Drop) -> u64 {
        self.dropped.get(&drop).copied().unwrap_or_default()
    }
}

#[derive(Clone, Debug)]
pub struct Settings {
    /// Our server's domains.
    pub local: Vec<Domain>,
    /// The peer's.
    pub far: Vec<Domain>,
    pub collapse_window: Duration,
    /// What may wait in each direction. At the spool's limit the newest stanza is refused, at the inbox's limit the link is
    /// closed until there is room again.
    pub queue_bytes_max: u64,
    pub queue_entries_max: u64,
    /// How what waits for the peer is treated.
    pub classes: Classes,
    /// What the operator has decided about certain stanzas.
    pub rules: Vec<Rule>,
    pub lanes_per_pair: u8,
    /// The longest wait before a lane that failed is opened again.
    pub lane_retry_max: Duration,
    /// What may be in memory in each direction, by bytes of entries; the rest waits on disk.
    pub memory_bytes: usize,
    /// Bytes of frames that go into one batch, before compression.
    pub batch_bytes: usize,
    /// Whether a dictionary and zstd are offered to the peer.
    pub compress: bool,
    /// What this site is called, for the peer's log.
    pub site: Option<String>,
    pub session: SessionConfig,
    pub mirror: MirrorSettings,
}

#[derive(Clone, Debug)]
pub enum Input {
    /// The `n`th stanza of a receiving stream.
    Stanza {
        leg: LegId,
        n: u64,
        pair: DomainPair,
        stanza: Stanza,
    },
    /// This batch and all before it are on disk; what the store holds now.
    Committed {
        batch: u64,
        levels: Levels,
    },
    SpoolRead {
        slots: Vec<Slot>,
        end: bool,
    },
    InboxRead {
        slots: Vec<Slot>,
        end: bool,
    },
    LaneUp {
        lane: LaneKey,
        life: u64,
        acks: bool,
        stanza_bytes_max: Option<usize>,
    },
    LaneConfirmed {
        lane: LaneKey,
        life: u64,
        stanzas: u64,
    },
    LaneDown {
        lane: LaneKey,
        life: u64,
        fault: LaneFault,
    },
    /// An authenticated connection to the peer begins, in place of any before it.
    LinkUp,
    LinkBytes(Bytes),
    LinkDown,
    /// Other settings from now on, as far as [`Relay`] can change them while it runs.
    Settings(Box<Settings>),
    /// The process is about to end: nothing more comes from legs, nothing more goes to lanes.
    Drain,
    Timeout,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Output {
    Commit(Batch),
    ReadSpool {
        from: Seq,
        entries_max: usize,
        bytes_max: usize,
    },
    ReadInbox {
        from: Seq,
        entries_max: usize,
        bytes_max: usize,
    },
    /// The `n`th stanza of this stream is on disk.
    Accepted {
        leg: LegId,
        n: u64,
    },
    OpenLane {
        lane: LaneKey,
        life: u64,
    },
    WriteLane {
        lane: LaneKey,
        life: u64,
        /// The one that marks them.
        batch: u64,
        stanzas: Vec<Bytes>,
    },
    /// Nothing was heard from the peer for longer than it should take (or again, after that): another connection may be
    /// tried beside this one.
    LinkQuiet(bool),
    /// The connection must go: the peer broke the protocol, is dead, or we have no room.
    CloseLink(LinkClose),
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum LinkClose {
    Error(LinkError),
    /// What the peer said when it left.
    Goodbye(Reason),
    InboxFull,
}

/// Waits for a batch to be on disk.
#[derive(Debug)]
enum Waiting {
    Accept {
        leg: LegId,
        n: u64,
    },
    Write {
        lane: LaneKey,
        life: u64,
        stanzas: Vec<Bytes>,
    },
    Stored(Received),
}

/// The connection to the peer.
#[derive(Debug)]
enum Link {
    Down,
    /// It is up, but what an earlier one brought is still on its way to the disk, and our hello says what is there.
    Waiting {
        /// The peer's hello, as far as it has come.
        bytes: Vec<Bytes>,
    },
    Up {
        session: Box<LinkSession>,
        /// The peer has said what it holds: entries may cross.
        greeted: bool,
    },
}

impl Link {
    fn session(&mut self) -> Option<&mut LinkSession> {
        match self {
            Self::Up { session, .. } => Some(session),
            Self::Down | Self::Waiting { .. } => None,
        }
    }
}

/// What [`Settings::memory_bytes`] is outside tests: some thousand chat lines, so that the disk is read in large steps, and little
/// beside what compression takes.
pub const MEMORY_BYTES: usize = 4 * 1024 * 1024;

// A store refuses what is beyond its limits and stops, so the mirror must keep below them: a row, and those of both directions together.
const _: () = assert!(mirror::KEY_BYTES_MAX <= STATE_KEY_BYTES_MAX);
const _: () = assert!(mirror::VALUE_BYTES_MAX <= STATE_VALUE_BYTES_MAX);
const _: () = assert!(mirror::ROW_BYTES >= state_bytes(0, 0));
const _: () = assert!(2 * mirror::ROWS_BYTES_MAX <= STATE_BYTES_MAX);

/// Pieces of the peer's hello that are kept while the disk is busy. It is one segment, and nothing follows it before ours.
const WAITING_PIECES_MAX: usize = 64;

#[derive(Debug)]
pub struct Relay {
    settings: Settings,
    epoch: Epoch,
    outward: Outward,
    inward: Inward,
    rules: Rules,
    mirror: Mirror,
    link: Link,
    /// What the sessions before the present one have counted.
    ended: SessionStats,
    /// Entries that were under way when they ended.
    interrupted: u64,
    /// While the link is up and what waited has not come: the last of it.
    catching_up: Option<Seq>,
    /// What has arrived from the peer; `stored` is the part of it that is on disk.
    received: Received,
    stored: Received,
    /// The batch that gathers.
    batch: Batch,
    waiting: BTreeMap<u64, Vec<Waiting>>,
    submitted: u64,
    committed: u64,
    levels: Levels,
    /// What was taken in since then, by the batch that it goes with: a slow disk must not let more in than the limit.
    uncommitted: VecDeque<(u64, Levels)>,
    stats: RelayStats,
    plain: Plain,
    rooms: Rooms,
    trace: Trace,
    /// What the peer calls itself.
    peer_site: Option<Arc<str>>,
    site: Option<Arc<str>>,
    /// What the spool held at the start.
    inherited_bytes: u64,
    transmit_due: bool,
    outputs: VecDeque<Output>,
}

impl Relay {
    pub fn new(settings: Settings, opening: &Opening, now: Now) -> Self {
        let mut relay = Self {
            epoch: opening.epoch,
            outward: Outward::new(
                opening,
                settings.collapse_window,
                settings.memory_bytes,
                settings.classes,
                now,
            ),
            inward: Inward::new(
                settings.local.clone(),
                settings.far.clone(),
                settings.lanes_per_pair,
                settings.lane_retry_max,
                settings.memory_bytes,
                opening.inbox_last,
            ),
            rules: Rules::new(settings.rules.clone()),
            mirror: Mirror::new(
                settings.mirror.clone(),
                settings.local.clone(),
                settings.far.clone(),
                opening.epoch,
                &opening.state,
                now,
            ),
            link: Link::Down,
            ended: SessionStats::default(),
            interrupted: 0,
            catching_up: None,
            received: opening.received.clone(),
            stored: opening.received.clone(),
            batch: Batch {
                number: 1,
                changes: Vec::new(),
            },
            waiting: BTreeMap::new(),
            submitted: 0,
            committed: 0,
            levels: opening.levels,
            uncommitted: VecDeque::new(),
            stats: RelayStats::default(),
            plain: Plain::default(),
            rooms: Rooms::default(),
            trace: Trace::default(),
            peer_site: None,
            site: settings.site.as_deref().map(Arc::from),
            inherited_bytes: opening.levels.spool_bytes,
            transmit_due: false,
            outputs: VecDeque::new(),
            settings,
        };
        relay.settle(now);
        relay
    }

    pub fn handle(&mut self, input: Input, now: Now) {
        self.transmit_due = true;
        match input {
            Input::Stanza { leg, n, pair, stanza } => self.handle_stanza(leg, n, pair, stanza, now),
            Input::Committed { batch, levels } => self.handle_committed(batch, levels, now),
            Input::SpoolRead { slots, end } => self.outward.handle_read(slots, end, &self.rules, now, &mut self.stats),
            Input::InboxRead { slots, end } => self.inward.handle_read(slots, end, &mut self.stats),
            Input::LaneUp {
                lane,
                life,
                acks,
                stanza_bytes_max,
            } => {
                self.inward.handle_lane_up(&lane, life, acks, stanza_bytes_max);
                self.mirror.handle_leg_up(&lane.pair.local, now);
            }
            Input::LaneConfirmed { lane, life, stanzas } => {
                self.inward.handle_lane_confirmed(&lane, life, stanzas, &mut self.stats);
                self.trace_delivered(now);
            }
            Input::LaneDown { lane, life, fault } => {
                self.inward.handle_lane_down(&lane, life, fault, now, &mut self.stats);
                // Its rooms may have lost their far occupants, and would not say so.
                if self.mirror.has_guests(&lane.pair.local) {
                    self.inward.hold(&lane);
                }
            }
            Input::LinkUp => self.handle_link_up(now),
            Input::LinkBytes(bytes) => match &mut self.link {
                Link::Waiting { bytes: waiting } if waiting.len() < WAITING_PIECES_MAX => waiting.push(bytes),
                Link::Waiting { .. } => self.close_link(LinkClose::Error(LinkError::NotAHello), now),
                Link::Down | Link::Up { .. } => self.handle_session(session::Input::Bytes(bytes), now),
            },
            Input::LinkDown => self.drop_link(now),
            Input::Settings(settings) => self.reconfigure(*settings),
            Input::Drain => {
                self.outward.seal_all(self.batch.number, now, &mut self.stats);
                self.inward.stop();
            }
            Input::Timeout => {
                self.outward.handle_timeout(self.batch.number, now, &mut self.stats);
                self.handle_session(session::Input::Timeout, now);
                self.mirror.handle_timeout(now);
            }
        }
        self.settle(now);
    }

    /// Takes what can change while all goes on: the queue's settings at once, the link's with the next connection. Domains, lanes and
    /// whether rooms are mirrored stay as they were.
    fn reconfigure(&mut self, new: Settings) {
        self.rules.replace(new.rules.clone());
        self.outward.set_window(new.collapse_window);
        self.outward.set_classes(new.classes);
        self.mirror.reconfigure(new.mirror.clone());
        let old = &self.settings;
        self.settings = Settings {
            local: old.local.clone(),
            far: old.far.clone(),
            lanes_per_pair: old.lanes_per_pair,
            lane_retry_max: old.lane_retry_max,
            memory_bytes: old.memory_bytes,
            site: old.site.clone(),
            ..new
        };
    }

    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// The next bytes for the link, asked for when the socket can take them: what is most urgent then is what goes.
    pub fn poll_transmit(&mut self, now: Now) -> Option<Bytes> {
        self.poll_transmit_upto(usize::MAX, now)
    }

    /// The same of a link that has room for so many bytes; with what was begun it may be a piece more.
    pub fn poll_transmit_upto(&mut self, room: usize, now: Now) -> Option<Bytes> {
        let batch_bytes = self.settings.batch_bytes.min(room);
        let session = self.link.session()?;
        let stats = &mut self.stats;
        let mut over_limit = Vec::new();
        let (traced, mut sent) = (self.trace.is_on(), Vec::new());
        // A piece of what is large ends a batch: what comes now waits for this one piece, not for more of them.
        let mut part = false;
        while !part
            && session.batch_bytes() < batch_bytes
            && self.outward.offer(self.committed, |offer| {
                let is_part = matches!(offer, Offer::Part { .. });
                let (seq, before) = (offer.seq(), stats.entries_sent);
                let answer = answer(session, stats, &mut over_limit, offer, now);
                part |= is_part && matches!(answer, Answer::Takes(_));
                if traced && stats.entries_sent > before {
                    sent.push(seq);
                }
                answer
            })
        {}
        let transmit = session.poll_transmit(now);
        self.transmit_due = transmit.is_some();
        for seq in sent {
            self.trace_entry(Decision::Sent, seq, None, None, now);
        }
        for cast in over_limit {
            self.tell_over_limit(&cast);
        }
        self.settle(now);
        transmit
    }

    /// Whether [`Relay::poll_transmit`] may have something: not if it had nothing and nothing has happened since.
    pub fn wants_transmit(&self) -> bool {
        self.transmit_due && matches!(self.link, Link::Up { .. })
    }

    /// Ends the link in good order: the next transmission says so.
    pub fn say_goodbye(&mut self) {
        if let Some(session) = self.link.session() {
            session.goodbye(Reason::Shutdown);
            self.transmit_due = true;
        }
    }

    pub fn poll_timeout(&self) -> Option<Deadline> {
        let session = self.session().and_then(LinkSession::poll_timeout);
        let mirror = self.mirror.poll_timeout();
        [self.outward.poll_timeout(), self.inward.poll_timeout(), session, mirror]
            .into_iter()
            .fold(None, Deadline::earlier)
    }

    pub fn stats(&self) -> &RelayStats {
        &self.stats
    }

    pub fn levels(&self) -> Levels {
        self.levels
    }

    /// Bytes of entries that have left the spool because the peer has them.
    pub fn acked_bytes(&self) -> u64 {
        let given_up = self.stats.superseded_bytes + self.stats.expired_bytes;
        (self.inherited_bytes + self.stats.entry_bytes).saturating_sub(self.levels.spool_bytes + given_up)
    }

    /// Up to where the peer has everything of ours.
    pub fn acked(&self) -> Seq {
        self.outward.acked()
    }

    /// How much of a class waits for the peer.
    pub fn level(&self, class: Class) -> Level {
        self.outward.level(class)
    }

    /// How long the oldest entry of a class has waited for the peer.
    pub fn oldest_of(&mut self, class: Class, now: Now) -> Duration {
        self.outward.oldest_of(class, now)
    }

    /// Bytes of entries that were given to the link, by class: those that were given again after a reconnect count again.
    pub fn sent_bytes(&self) -> [u64; Class::COUNT] {
        self.outward.crossed_bytes()
    }

    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    pub fn mirror(&self) -> &Mirror {
        &self.mirror
    }

    /// What the rooms have cost.
    pub fn rooms(&self) -> &Rooms {
        &self.rooms
    }

    /// Whether what becomes of each stanza is noted, for [`Self::poll_trace`].
    pub fn set_traced(&mut self, traced: bool) {
        if self.trace.is_on() != traced {
            self.trace.turn(traced);
            self.inward.set_traced(traced);
        }
    }

    pub fn poll_trace(&mut self) -> Option<Event> {
        self.trace.poll()
    }

    /// Events that were not noted, because nobody took the earlier ones away.
    pub fn take_trace_missed(&mut self) -> u64 {
        self.trace.take_missed()
    }

    pub fn session(&self) -> Option<&LinkSession> {
        match &self.link {
            Link::Up { session, .. } => Some(session),
            Link::Down | Link::Waiting { .. } => None,
        }
    }

    /// What all sessions have counted; the round trip is the present one's.
    pub fn session_totals(&self) -> SessionStats {
        let Some(now) = self.session().map(LinkSession::stats) else {
            return SessionStats {
                rtt: None,
                ..self.ended
            };
        };
        let before = self.ended;
        SessionStats {
            batches_sent: before.batches_sent + now.batches_sent,
            batches_received: before.batches_received + now.batches_received,
            bytes_sent: before.bytes_sent + now.bytes_sent,
            bytes_received: before.bytes_received + now.bytes_received,
            frame_bytes_sent: before.frame_bytes_sent + now.frame_bytes_sent,
            frame_bytes_received: before.frame_bytes_received + now.frame_bytes_received,
            ..now
        }
    }

    /// Entries that were under way when a connection ended.
    pub fn interrupted(&self) -> u64 {
        self.interrupted
    }

    /// Whether the peer has told what it holds, so that entries cross.
    pub fn is_linked(&self) -> bool {
        self.session().is_some_and(LinkSession::is_open)
    }

    pub fn lanes_up(&self) -> (usize, usize) {
        self.inward.lanes_up()
    }

    /// How long entries took, that have been acknowledged since this was last asked, from when they were accepted: one a second
    /// is watched. The peer may keep an acknowledgement back (`ack_delay`).
    pub fn take_delivered(&mut self, now: Now) -> Vec<Duration> {
        self.outward.take_delivered(now)
    }

    /// How long the oldest entry in the spool has waited.
    pub fn oldest(&self, now: Now) -> Duration {
        self.outward.oldest(now)
    }

    /// Whether everything that came from legs is on disk, and nothing is on its way to a lane.
    pub fn is_settled(&self) -> bool {
        self.committed == self.submitted && self.batch.changes.is_empty() && self.waiting.is_empty()
    }

    /// Whether everything received is with our server.
    pub fn is_delivered(&self) -> bool {
        self.inward.is_quiet()
    }

    /// Whether nothing waits anywhere: everything accepted is with the peer, everything received with our server.
    pub fn is_quiet(&self) -> bool {
        self.is_settled()
            && self.outward.acked() == self.outward.last()
            && self.inward.is_quiet()
            && !self.mirror.awaits_rooms()
    }

    fn handle_stanza(&mut self, leg: LegId, n: u64, pair: DomainPair, stanza: Stanza, now: Now) {
        let plain = stanza.bytes().clone();
        if self.trace.is_on() {
            self.trace_rules(&stanza, Direction::Sent, now);
        }
        // Before the mirror: what it knows is what crosses.
        let (stanza, answer) = match self.rules.judge(stanza, Direction::Sent) {
            Fate::Passes(stanza) | Fate::Replaced(stanza) => (Some(stanza), None),
            Fate::Dropped { answer } => (None, answer),
        };
        if let Some(stanza) = &stanza
            && self.is_spool_full()
        {
            self.stats.refused += 1;
            self.trace_sent(Decision::Refused(Refusal::QueueFull), stanza.bytes(), now);
            let text = "The queue for this destination is full. Try again later.";
            if let Some(answer) = bounce(stanza, ErrorType::Wait, Condition::ResourceConstraint, text) {
                self.inward.send_own(pair, answer, &mut self.stats);
            }
        } else {
            self.stats.copies_accepted += 1;
            self.stats.copy_bytes_accepted += plain.len() as u64;
            self.plain.note(&plain, &mut self.stats);
            let left = stanza.as_ref().map_or(0, |stanza| stanza.bytes().len());
            self.stats.rule_bytes += plain.len().saturating_sub(left) as u64;
            match (stanza, answer) {
                (Some(stanza), _) => self.take_over(stanza, pair, now),
                (None, Some(answer)) => self.inward.send_own(pair, answer, &mut self.stats),
                (None, None) => {}
            }
        }
        self.wait(Waiting::Accept { leg, n });
    }

    /// What the rules have let through crosses, unless it is dealt with here.
    fn take_over(&mut self, stanza: Stanza, pair: DomainPair, now: Now) {
        let rtt = self.session().and_then(|session| session.stats().rtt);
        self.mirror.note_rtt(rtt);
        let plain = stanza.bytes().clone();
        let before = self.trace.is_on().then(|| self.mirror.stats());
        let crosses = self.mirror.handle_local(stanza, now);
        if let Some(before) = before {
            self.trace_mirror(&plain, before, crosses.is_some(), now);
        }
        match crosses {
            Some(stanza) => self.cross(&stanza, pair, now),
            None => self.stats.near_bytes += plain.len() as u64,
        }
    }

    /// What is to cross gets its place in the spool, or its sender is told why not.
    fn cross(&mut self, stanza: &Stanza, pair: DomainPair, now: Now) {
        match self.take_in(stanza, now) {
            Ok(placed) if placed.new => {
                self.stats.casts += 1;
                if let Some(from) = stanza.from() {
                    self.inward.expect(pair, &from);
                }
            }
            Ok(_) => {}
            // The streams let nothing through without both addresses.
            Err(Refused::NoAddress) => {
                self.stats.dropped(Drop::Malformed);
                self.trace_sent(Decision::Lost(Drop::Malformed), stanza.bytes(), now);
            }
            Err(Refused::ClassFull(class)) => {
                self.stats.class_full[class as usize] += 1;
                self.trace_sent(Decision::Refused(Refusal::ClassFull), stanza.bytes(), now);
                let text = "Too much of this kind waits for this destination. Try again later.";
                // What is volatile goes without a word.
                if !self.settings.classes[class].volatile
                    && let Some(answer) = bounce(stanza, ErrorType::Wait, Condition::ResourceConstraint, text)
                {
                    self.inward.send_own(pair, answer, &mut self.stats);
                }
            }
            Err(Refused::TooLarge) => {
                self.stats.dropped(Drop::OverPeerLimit);
                self.trace_sent(Decision::Refused(Refusal::TooLarge), stanza.bytes(), now);
                self.tell_too_long(pair, stanza);
            }
        }
    }

    /// Tells the sender, if it may be told.
    fn tell_too_long(&mut self, pair: DomainPair, stanza: &Stanza) -> bool {
        let text = "The stanza or its address is too long.";
        let answer = bounce(stanza, ErrorType::Modify, Condition::PolicyViolation, text);
        let told = answer.is_some();
        if let Some(answer) = answer {
            self.inward.send_own(pair, answer, &mut self.stats);
        }
        told
    }

    /// The peer takes less than an entry of ours may hold, so this one will not be delivered.
    fn tell_over_limit(&mut self, cast: &Cast) {
        for index in 0..cast.recipients.len() {
            let told = cast
                .copy(index)
                .and_then(|copy| Stanza::parse(copy).ok())
                .and_then(|stanza| Some((pair_of(&stanza)?, stanza)))
                // It is named as one for our server is.
                .is_some_and(|(DomainPair { local: far, far: local }, stanza)| {
                    self.tell_too_long(DomainPair { local, far }, &stanza)
                });
            // The copies differ only in `to`: where one has no answer, as a room's has none, the others have none either.
            if !told {
                return;
            }
        }
    }

    /// What has waited too long goes, and its senders are told, if they may be: in one batch, so that a kill makes it neither twice nor never.
    fn expire(&mut self, now: Now) {
        while let Some(expired) = self.outward.take_expired(self.batch.number, now, &mut self.stats) {
            if self.trace.is_on() {
                let copy = match &expired.entry {
                    Entry::Cast(cast) => cast.copy(0),
                    Entry::Void => None,
                };
                self.trace_entry(Decision::Expired, expired.seq, Some(expired.class), copy, now);
            }
            if let Expired {
                entry: Entry::Cast(cast),
                is_volatile: false,
                ..
            } = &expired
            {
                self.tell_expired(cast);
            }
        }
    }

    fn tell_expired(&mut self, cast: &Cast) {
        let text = "There was no connection to the destination for too long.";
        for index in 0..cast.recipients.len() {
            let stanza = cast.copy(index).and_then(|copy| Stanza::parse(copy).ok());
            let answer =
                stanza.and_then(|stanza| bounce(&stanza, ErrorType::Wait, Condition::RemoteServerTimeout, text));
            // As above: where one has no answer, the others have none either.
            let Some(answer) = answer.and_then(|answer| Stanza::parse(answer).ok()) else {
                return;
            };
            if let (Some(pair), Some((template, to_at, attribute))) = (pair_of(&answer), answer.split_to()) {
                let to_at = to_at as u32;
                let recipients = vec![attribute];
                self.put_inbox(
                    &pair,
                    Cast {
                        template,
                        to_at,
                        recipients,
                    },
                    None,
                );
            }
        }
    }

    /// Gives a stanza its place in the spool.
    fn take_in(&mut self, stanza: &Stanza, now: Now) -> Result<Placed, Refused> {
        let (batch, stats) = (self.batch.number, &mut self.stats);
        let placed = self.outward.handle_stanza(stanza, &self.rules, batch, now, stats)?;
        stats.crossing_bytes += stanza.bytes().len() as u64;
        self.rooms.note(stanza, Way::Sent, placed.bytes as u64, 1);
        if self.trace.is_on() {
            let decision = match (self.trace.note_placed(placed.seq, stanza.bytes()), placed.new) {
                (_, true) => Decision::Queued {
                    rule: self.placing_rule(stanza),
                },
                (copies, false) => Decision::Collapsed { copies },
            };
            let class = self.outward.class_of(placed.seq);
            self.trace_entry(decision, placed.seq, class, Some(stanza.bytes().clone()), now);
        }
        let uncommitted = self.uncommitted();
        uncommitted.spool_entries += u64::from(placed.new);
        uncommitted.spool_bytes += placed.bytes as u64;
        Ok(placed)
    }

    /// Of the batch that gathers.
    fn uncommitted(&mut self) -> &mut Levels {
        let number = self.batch.number;
        if self.uncommitted.back().is_none_or(|(batch, _)| *batch != number) {
            self.uncommitted.push_back((number, Levels::default()));
        }
        // One was just made, if there was none.
        let last = self.uncommitted.len() - 1;
        &mut self.uncommitted[last].1
    }

    /// The name of an entry of ours.
    fn own_id(&self, seq: Seq) -> EntryId {
        EntryId {
            site: self.site.clone(),
            epoch: self.epoch,
            seq,
        }
    }

    /// Of a stanza that has no entry.
    fn trace_sent(&mut self, decision: Decision, stanza: &Bytes, now: Now) {
        self.trace.note(Event {
            at: now.wall,
            direction: Direction::Sent,
            decision,
            class: None,
            entry: None,
            stanza: Some(stanza.clone()),
        });
    }

    fn trace_entry(&mut self, decision: Decision, seq: Seq, class: Option<Class>, stanza: Option<Bytes>, now: Now) {
        if !self.trace.is_on() {
            return;
        }
        let event = Event {
            at: now.wall,
            direction: Direction::Sent,
            decision,
            class: class.or_else(|| self.outward.class_of(seq)),
            entry: Some(self.own_id(seq)),
            stanza: stanza.or_else(|| self.trace.known(seq)),
        };
        self.trace.note(event);
    }

    fn trace_arrived(&mut self, decision: Decision, seq: Seq, stanza: Option<&Bytes>, now: Now) {
        if !self.trace.is_on() {
            return;
        }
        let event = Event {
            at: now.wall,
            direction: Direction::Received,
            decision,
            class: None,
            entry: Some(self.peer_id(seq)),
            stanza: stanza.cloned(),
        };
        self.trace.note(event);
    }

    /// The name of an entry of the peer's.
    fn peer_id(&self, seq: Seq) -> EntryId {
        EntryId {
            site: self.peer_site.clone(),
            epoch: self.received.epoch,
            seq,
        }
    }

    fn trace_delivered(&mut self, now: Now) {
        for (origin, stanza) in self.inward.take_delivered() {
            let event = Event {
                at: now.wall,
                direction: Direction::Received,
                decision: Decision::Delivered,
                class: None,
                entry: origin.map(|seq| self.peer_id(seq)),
                stanza: Some(stanza),
            };
            self.trace.note(event);
        }
    }

    /// What the rules are about to do.
    fn trace_rules(&mut self, stanza: &Stanza, direction: Direction, now: Now) {
        let (said, _) = self.rules.explain(stanza.clone(), direction);
        let decisions: Vec<Decision> = said
            .into_iter()
            .filter_map(|(rule, said)| match (said, &rule.then) {
                (Said::Stripped, _) => Some(Decision::Stripped {
                    rule: Arc::clone(&rule.name),
                }),
                // What is left of it may not be worth sending.
                (Said::Decided, Action::Drop | Action::Strip(_)) => Some(Decision::RuledOut {
                    rule: Arc::clone(&rule.name),
                }),
                (Said::Decided, Action::Place(_)) | (Said::Observed | Said::Passed(_), _) => None,
            })
            .collect();
        for decision in decisions {
            self.trace.note(Event {
                at: now.wall,
                direction,
                decision,
                class: None,
                entry: None,
                stanza: Some(stanza.bytes().clone()),
            });
        }
    }

    /// The rule that says how a stanza waits.
    fn placing_rule(&self, stanza: &Stanza) -> Option<Arc<str>> {
        let (said, _) = self.rules.explain(stanza.clone(), Direction::Sent);
        let placed = said
            .into_iter()
            .find(|(rule, said)| *said == Said::Decided && matches!(rule.then, Action::Place(_)));
        placed.map(|(rule, _)| Arc::clone(&rule.name))
    }

    /// What the mirror has done with a stanza of our server, by what it has counted.
    fn trace_mirror(&mut self, stanza: &Bytes, before: MirrorStats, crosses: bool, now: Now) {
        let stats = self.mirror.stats();
        let decision = if stats.pings_answered > before.pings_answered {
            Decision::Answered(Question::Ping)
        } else if stats.discos_answered > before.discos_answered {
            Decision::Answered(Question::Disco)
        } else if stats.refused > before.refused {
            Decision::Refused(Refusal::Split)
        } else if stats.echoes > before.echoes {
            Decision::Echoed
        } else if !crosses {
            Decision::Settled
        } else {
            return;
        };
        self.trace_sent(decision, stanza, now);
    }

    fn handle_committed(&mut self, batch: u64, levels: Levels, now: Now) {
        self.committed = self.committed.max(batch);
        self.levels = levels;
        self.uncommitted.retain(|(batch, _)| *batch > self.committed);
        let later = self.waiting.split_off(&(self.committed + 1));
        let done = std::mem::replace(&mut self.waiting, later);
        let done = done
            .into_iter()
            .flat_map(|(batch, waiting)| waiting.into_iter().map(move |waiting| (batch, waiting)));
        for (batch, waiting) in done {
            match waiting {
                Waiting::Accept { leg, n } => self.outputs.push_back(Output::Accepted { leg, n }),
                Waiting::Write { lane, life, stanzas } => {
                    self.outputs.push_back(Output::WriteLane {
                        lane,
                        life,
                        batch,
                        stanzas,
                    });
                }
                Waiting::Stored(received) => {
                    self.stored = received.clone();
                    self.handle_session(session::Input::Stored(received), now);
                }
            }
        }
        self.greet(now);
    }

    fn handle_link_up(&mut self, now: Now) {
        self.drop_link(now);
        if self.is_inbox_full() {
            return self.close_link(LinkClose::InboxFull, now);
        }
        self.stats.link_ups += 1;
        self.link = Link::Waiting { bytes: Vec::new() };
        self.greet(now);
    }

    /// Begins a session, once everything that has arrived is on disk.
    fn greet(&mut self, now: Now) {
        let Link::Waiting { bytes } = &mut self.link else {
            return;
        };
        if self.stored != self.received {
            return;
        }
        let bytes = std::mem::take(bytes);
        let hello = Hello {
            version: frame::VERSION,
            capabilities: 0,
            epoch: self.epoch,
            received: self.stored.clone(),
            first_unacked: Seq(self.outward.acked().0 + 1),
            last: self.outward.last(),
            site: self.settings.site.clone(),
            dictionary: if self.settings.compress {
                compress::dictionary_id()
            } else {
                compress::NO_COMPRESSION
            },
            entry_bytes_max: ENTRY_BYTES_MAX as u64,
            ack_delay_ms: u64::try_from(self.settings.session.ack_delay.as_millis()).unwrap_or(u64::MAX),
        };
        self.link = Link::Up {
            session: Box::new(LinkSession::new(self.settings.session.clone(), hello, now)),
            greeted: false,
        };
        self.outward.greet();
        for bytes in bytes {
            self.handle_session(session::Input::Bytes(bytes), now);
        }
    }

    fn drop_link(&mut self, now: Now) {
        self.ended = self.session_totals();
        self.interrupted += self.session().map_or(0, LinkSession::unacked_entries);
        self.link = Link::Down;
        self.catching_up = None;
        self.outward.link_down();
        self.mirror.handle_link_down(now);
    }

    fn close_link(&mut self, why: LinkClose, now: Now) {
        self.drop_link(now);
        self.outputs.push_back(Output::CloseLink(why));
    }

    fn handle_session(&mut self, input: session::Input, now: Now) {
        let Some(session) = self.link.session() else { return };
        let result = session.handle(input, now);
        while let Some(output) = self.link.session().and_then(LinkSession::poll_output) {
            match output {
                session::Output::PeerHello {
                    hello,
                    received,
                    missing,
                } => {
                    self.peer_site = hello.site.as_deref().map(Arc::from);
                    self.handle_hello(received, missing, hello.last, now);
                }
                session::Output::Received { seq, held_ms, entry } => {
                    self.handle_entry(seq, Duration::from_millis(held_ms), &entry, now);
                }
                session::Output::Acked(acked) => self.handle_acked(&acked),
                session::Output::Quiet => self.outputs.push_back(Output::LinkQuiet(true)),
                session::Output::Alive => self.outputs.push_back(Output::LinkQuiet(false)),
                session::Output::Goodbye(reason) => self.close_link(LinkClose::Goodbye(reason), now),
            }
        }
        if let Err(error) = result {
            self.close_link(LinkClose::Error(error), now);
        }
    }

    fn handle_hello(&mut self, received: Received, missing: u64, last: Seq, now: Now) {
        self.stats.missing += missing;
        // Before the first meeting nothing had come that could be in doubt: what our users asked meanwhile, is known.
        let met_before = self.received != Received::default();
        if missing > 0 || met_before && received != self.received {
            self.mirror.forget(now);
        }
        self.mirror.handle_link_up(now);
        self.catching_up = Some(last);
        if received != self.received {
            // The first meeting, or a disk was replaced: the peer's numbering starts where its spool does.
            self.received = received;
            self.note_received();
        }
        self.note_caught_up(now);
    }

    /// Whether all has come that the peer had for us when the link came up.
    fn note_caught_up(&mut self, now: Now) {
        if self.catching_up.is_some_and(|last| self.received.upto >= last) {
            self.catching_up = None;
            self.mirror.handle_caught_up(now);
        }
    }

    fn handle_acked(&mut self, acked: &Received) {
        match &mut self.link {
            // The first says where the peer stands.
            Link::Up { greeted, .. } if !*greeted => {
                *greeted = true;
                self.outward.link_up(acked);
            }
            Link::Up { .. } | Link::Down | Link::Waiting { .. } => self.outward.handle_acked(acked),
        }
        if self.trace.is_on() {
            self.trace.forget(self.outward.acked());
        }
    }

    fn handle_entry(&mut self, seq: Seq, held: Duration, entry: &Bytes, now: Now) {
        if self.received.add(seq) != Added::New {
            self.stats.duplicates += 1;
            self.trace_arrived(Decision::Repeated, seq, None, now);
            return;
        }
        self.stats.entries_received += 1;
        match self.inward.admit(entry) {
            Ok(Some((pair, cast))) => {
                self.stats.shared_received += u64::from(cast.recipients.len() > 1);
                let copies = cast.recipients.len();
                if let Some(stanza) = cast.copy(0).and_then(|copy| Stanza::parse(copy).ok()) {
                    self.stats.received_bytes[Class::of(&stanza) as usize] += entry.len() as u64;
                    self.rooms
                        .note(&stanza, Way::Received, entry.len() as u64, copies as u64);
                    self.trace_arrived(Decision::Arrived { copies }, seq, Some(stanza.bytes()), now);
                }
                for cast in self.judge_received(&pair, cast, now) {
                    self.note_joins(&cast);
                    let (copy, before) = (self.trace.is_on().then(|| cast.copy(0)).flatten(), self.mirror.stats());
                    if let Some(cast) = self.mirror.handle_far(cast, held, now) {
                        self.put_inbox(&pair, cast, Some(seq));
                    } else if let Some(copy) = copy {
                        let echo = self.mirror.stats().reflections_swallowed > before.reflections_swallowed;
                        let decision = if echo { Decision::Swallowed } else { Decision::Kept };
                        self.trace_arrived(decision, seq, Some(&copy), now);
                    }
                }
            }
            Ok(None) => self.stats.received_bytes[Class::Control as usize] += entry.len() as u64,
            Err(drop) => {
                self.stats.dropped(drop);
                self.trace_arrived(Decision::Lost(drop), seq, None, now);
            }
        }
        // What follows from it comes after it, and with it.
        self.drain_mirror(now);
        self.note_received();
        self.note_caught_up(now);
        self.drain_mirror(now);
        if self.is_inbox_full() {
            self.close_link(LinkClose::InboxFull, now);
        }
    }

    /// Who enters a room of ours is told all again.
    fn note_joins(&mut self, cast: &Cast) {
        if cast.template.starts_with(b"<presence")
            && let Some(stanza) = cast.copy(0).and_then(|copy| Stanza::parse(copy).ok())
        {
            if stanza.is_join() {
                self.outward.handle_join(&stanza);
            } else {
                self.outward.handle_nick(&stanza);
            }
        }
    }

    /// What the rules leave of a cast from the peer: those copies of it that are still the same stay one.
    fn judge_received(&mut self, pair: &DomainPair, cast: Cast, now: Now) -> Vec<Cast> {
        if !self.rules.has(Direction::Received) {
            return vec![cast];
        }
        let mut casts = Vec::<Cast>::new();
        for copy in (0..cast.recipients.len()).filter_map(|index| cast.copy(index)) {
            // It was read when it was admitted.
            let Ok(stanza) = Stanza::parse(copy) else { continue };
            if self.trace.is_on() {
                self.trace_rules(&stanza, Direction::Received, now);
            }
            match self.rules.judge(stanza, Direction::Received) {
                Fate::Passes(stanza) | Fate::Replaced(stanza) => {
                    let Some((template, to_at, attribute)) = stanza.split_to() else {
                        continue;
                    };
                    let to_at = to_at as u32;
                    let same = |cast: &&mut Cast| cast.template == template && cast.to_at == to_at;
                    match casts.iter_mut().find(same) {
                        Some(cast) => cast.recipients.push(attribute),
                        None => casts.push(Cast {
                            template,
                            to_at,
                            recipients: vec![attribute],
                        }),
                    }
                }
                Fate::Dropped { answer: Some(answer) } if !self.is_spool_full() => {
                    if let Ok(answer) = Stanza::parse(answer) {
                        self.cross(&answer, pair.clone(), now);
                    }
                }
                Fate::Dropped { .. } => {}
            }
        }
        casts
    }

    /// `origin` is the number of the peer's entry that it is.
    fn put_inbox(&mut self, pair: &DomainPair, cast: Cast, origin: Option<Seq>) {
        let bytes = self.inward.put(pair, cast, origin);
        let uncommitted = self.uncommitted();
        uncommitted.inbox_entries += 1;
        uncommitted.inbox_bytes += bytes as u64;
    }

    /// Puts what the mirror has to say where it belongs, in the batch that gathers.
    fn drain_mirror(&mut self, now: Now) {
        while let Some(output) = self.mirror.poll_output() {
            match output {
                mirror::Output::PutRow { key, value } => self.batch.changes.push(Change::PutState { key, value }),
                mirror::Output::DropRow { key } => self.batch.changes.push(Change::DropState { key }),
                mirror::Output::Deliver(cast) => match self.inward.pair_of(&cast) {
                    Some(pair) => self.put_inbox(&pair, cast, None),
                    None => self.stats.dropped(Drop::Malformed),
                },
                mirror::Output::Ask(stanza) => match pair_of(&stanza) {
                    Some(pair) => self.inward.send_own(pair, stanza.bytes().clone(), &mut self.stats),
                    None => self.stats.dropped(Drop::Malformed),
                },
                mirror::Output::Cross(stanza) => match pair_of(&stanza) {
                    // Ours is who speaks here.
                    Some(DomainPair { local, far }) => self.cross(&stanza, DomainPair { local: far, far: local }, now),
                    None => self.stats.dropped(Drop::Malformed),
                },
            }
        }
    }

    /// The position goes with the batch that holds what it covers. Only its last value in a batch counts.
    fn note_received(&mut self) {
        self.batch
            .changes
            .retain(|change| !matches!(change, Change::SetReceived(_)));
        self.batch.changes.push(Change::SetReceived(self.received.clone()));
        let waiting = self.waiting.entry(self.batch.number).or_default();
        waiting.retain(|waiting| !matches!(waiting, Waiting::Stored(_)));
        waiting.push(Waiting::Stored(self.received.clone()));
    }

    fn is_spool_full(&self) -> bool {
        let waiting = || self.uncommitted.iter().map(|(_, levels)| levels);
        let bytes = waiting().map(|levels| levels.spool_bytes).sum::<u64>() + self.levels.spool_bytes;
        let entries = waiting().map(|levels| levels.spool_entries).sum::<u64>() + self.levels.spool_entries;
        bytes >= self.settings.queue_bytes_max || entries >= self.settings.queue_entries_max
    }

    fn is_inbox_full(&self) -> bool {
        let waiting = || self.uncommitted.iter().map(|(_, levels)| levels);
        let bytes = waiting().map(|levels| levels.inbox_bytes).sum::<u64>() + self.levels.inbox_bytes;
        let entries = waiting().map(|levels| levels.inbox_entries).sum::<u64>() + self.levels.inbox_entries;
        bytes >= self.settings.queue_bytes_max || entries >= self.settings.queue_entries_max
    }

    fn wait(&mut self, waiting: Waiting) {
        self.waiting.entry(self.batch.number).or_default().push(waiting);
    }

    /// Carries on whatever the last input made possible.
    fn settle(&mut self, now: Now) {
        self.drain_mirror(now);
        self.expire(now);
        self.inward.advance(now, &mut self.stats);
        let mut reads = Vec::new();
        self.gather(&mut reads, now);
        // After everything has its number: what this reads is looked at with that in mind.
        self.outward.advance();
        for replaced in self.outward.settle(self.batch.number, now, &mut self.stats) {
            let stanza = self.trace.known(replaced.seq);
            self.trace_entry(Decision::Replaced, replaced.seq, Some(replaced.class), stanza, now);
        }
        self.gather(&mut reads, now);
        // A batch is only ever given away here, when everything that belongs together is in it: a position without its
        // entries would lose them. A read must see what was written before it.
        if self.submitted == self.committed || !reads.is_empty() {
            self.submit(now);
        }
        self.outputs.extend(reads);
    }

    /// Puts what the two directions have to say where it belongs.
    fn gather(&mut self, reads: &mut Vec<Output>, now: Now) {
        loop {
            if let Some(output) = self.outward.poll_output() {
                match output {
                    outward::Output::Change(change) => self.batch.changes.push(change),
                    outward::Output::Read {
                        from,
                        entries_max,
                        bytes_max,
                    } => {
                        reads.push(Output::ReadSpool {
                            from,
                            entries_max,
                            bytes_max,
                        });
                    }
                }
            } else if let Some(output) = self.inward.poll_output() {
                match output {
                    inward::Output::Change(change) => self.batch.changes.push(change),
                    inward::Output::OpenLane { lane, life } => self.outputs.push_back(Output::OpenLane { lane, life }),
                    inward::Output::Write { lane, life, stanzas } => self.wait(Waiting::Write { lane, life, stanzas }),
                    inward::Output::Read {
                        from,
                        entries_max,
                        bytes_max,
                    } => {
                        reads.push(Output::ReadInbox {
                            from,
                            entries_max,
                            bytes_max,
                        });
                    }
                    inward::Output::Answer(stanza) => {
                        // It answers what was too large, and leaves its contents out.
                        let taken = self.take_in(&stanza, now);
                        debug_assert!(taken.is_ok());
                    }
                }
            } else {
                break;
            }
        }
    }

    fn submit(&mut self, now: Now) {
        self.mirror.flush(now);
        self.drain_mirror(now);
        self.outward.flush(self.batch.number, now, &mut self.stats);
        while let Some(output) = self.outward.poll_output() {
            // Flushing asks for no read.
            if let outward::Output::Change(change) = output {
                self.batch.changes.push(change);
            }
        }
        if self.batch.changes.is_empty() && !self.waiting.contains_key(&self.batch.number) {
            return;
        }
        let number = self.batch.number;
        self.submitted = number;
        let next = Batch {
            number: number + 1,
            changes: Vec::new(),
        };
        self.outputs
            .push_back(Output::Commit(std::mem::replace(&mut self.batch, next)));
    }
}

/// Of a stanza for our server: whose it is, and whom it is for.
fn pair_of(stanza: &Stanza) -> Option<DomainPair> {
    Some(DomainPair {
        local: Domain::new(domain_of(&stanza.to()?)).ok()?,
        far: Domain::new(domain_of(&stanza.from()?)).ok()?,
    })
}

/// Puts what the scheduler offers into the batch, as far as the session takes it.
///
/// What the peer does not take is left in `over_limit`; a void goes in its place.
fn answer(
    session: &mut LinkSession,
    stats: &mut RelayStats,
    over_limit: &mut Vec<Cast>,
    offer: Offer<'_>,
    now: Now,
) -> Answer {
    let before = session.batch_bytes();
    match offer {
        Offer::Whole { seq, entry, accepted } => match session.send(seq, entry, now.mono.since(accepted)) {
            Sent::Whole => {
                stats.entries_sent += 1;
                Answer::Takes(session.batch_bytes() - before)
            }
            Sent::Known => Answer::Takes(0),
            Sent::NeedsFragments => Answer::InParts,
            Sent::BatchFull => Answer::Full,
            Sent::Blocked => Answer::Blocked,
            Sent::Refused => match session.send(seq, &Entry::Void, Duration::ZERO) {
                Sent::Whole => {
                    stats.dropped(Drop::OverPeerLimit);
                    if let Entry::Cast(cast) = entry {
                        over_limit.push(cast.clone());
                    }
                    Answer::Takes(0)
                }
                _ => Answer::Full,
            },
        },
        Offer::Part {
            seq,
            encoded,
            offset,
            accepted,
        } => match session.send_fragment(seq, encoded, offset, now.mono.since(accepted)) {
            0 => Answer::Blocked,
            bytes => {
                stats.entries_sent += u64::from(offset + bytes == encoded.len());
                Answer::Takes(bytes)
            }
        },
    }
}

#[cfg(test)]
mod tests;
