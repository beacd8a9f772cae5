//! The owner of one peer: a task around its [`Relay`].
//!
//! Everything that concerns a peer happens in this one task, so nothing in it is locked: stanzas from legs, answers of the
//! disk, events of lanes, bytes of the link and the passing of time come in, and the relay says what to do.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use tracing::{debug, info, warn};

use super::{
    clock::Clock,
    lane::{self, DownReason, LaneEvent, LaneHandle, LegContext, Parcel},
    legs::{LegEvent, LegHandle},
    link::{LinkConnection, LinkEvent, LinkReader, LinkTimes, LinkWriter, PeerLink, Survivor, TcpStats, survivor},
    store::{Answer, Request, Store, StoreError},
    trace::{self, Watchers},
    watch::{Events, Look, Pace, PeerAges, RoomSeries, Run},
};
use crate::{
    codec::position::Seq,
    metrics::{
        self as m, Direction, EchoEvent, Layer, Mechanism, NearAnswer, Refused, RoomState, RuleMode, Squeezed,
        StanzaKind,
    },
    mirror::{self, MirrorStats},
    pii::Pii,
    queue::{class::Class, journal::Levels, ledger::Level, rules::Mode},
    relay::{Drop as Dropped, Input, LaneFault, LaneKey, LinkClose, Output, Relay, RelayStats, Settings, cost::Cost},
    stanza::{Kind, Stanza},
    stream::CloseReason,
    time::{Deadline, Mono, Now, Wall},
};

/// Stanzas that are taken in at one turn, so that a flood of them does not starve the others.
const BURST_MAX: usize = 256;

/// Events of lanes that wait for the owner. A lane confirms batches, not stanzas, so this is plenty.
const LANE_EVENTS_MAX: usize = 1024;

/// How often figures that are read rather than counted go to the metrics. Prometheus rarely asks more often.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// Rooms that `/status` names: a screen of them, and the tenth hardly matters.
const ROOMS_SHOWN: usize = 10;

/// After a SIGTERM: for what is accepted to be on disk and what is with a lane to be confirmed.
const DRAIN_MAX: Duration = Duration::from_secs(10);

/// For the last word on the link, and for the server to close its side of a lane.
const GOODBYE_MAX: Duration = Duration::from_secs(2);

/// A connection on which the peer never said a word is no reason to dial at once again: it refuses our key, or cannot start.
const REFUSED_WAIT: Duration = Duration::from_secs(10);

/// What an owner is made of.
#[derive(Debug)]
pub struct Peer {
    pub name: String,
    pub relay: Relay,
    pub clock: Clock,
    pub store: Store,
    pub answers: mpsc::UnboundedReceiver<Answer>,
    pub legs: mpsc::Receiver<LegEvent>,
    pub leg_handle: LegHandle,
    pub leg_context: Arc<LegContext>,
    pub link: PeerLink,
    pub link_times: LinkTimes,
    pub report: watch::Sender<Report>,
    /// What the administrator has changed since.
    pub settings: watch::Receiver<Settings>,
    /// Who watches stanzas.
    pub watchers: Watchers,
    pub class_ages: PeerAges,
    /// Of how many rooms the metrics tell.
    pub room_metrics: usize,
    pub draining: watch::Receiver<bool>,
}

/// How a peer stands, for `/status`.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub link_up: bool,
    pub link_since: Duration,
    /// Why the link is down, or was last.
    pub last_error: Option<String>,
    pub rtt: Option<Duration>,
    pub levels: Levels,
    /// In the order of [`Class::ALL`].
    pub classes: [Level; Class::COUNT],
    pub spool_oldest: Duration,
    /// How long what waits will take, if that can be told.
    pub drain: Option<Duration>,
    /// Since the peer last acknowledged something.
    pub acked_ago: Option<Duration>,
    pub relay: RelayStats,
    pub rooms: mirror::Levels,
    /// The dearest rooms, the dearest first.
    pub room_costs: Vec<(Arc<str>, Cost)>,
    pub tcp: TcpTotals,
    /// Bytes that TLS was given, sent and received.
    pub payload: [u64; 2],
    pub saved: Saved,
    pub events: Events,
    pub lanes_up: usize,
    pub unconfirmed: usize,
}

/// Bytes of plain S2S that did not cross, by what saved them.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Saved {
    pub mirror: u64,
    pub rules: u64,
    pub collapse: u64,
    pub compaction: u64,
    pub compression: u64,
}

#[derive(Debug)]
struct Lane {
    life: u64,
    handle: LaneHandle,
    /// Written by the relay, not yet taken by the lane's task. The relay bounds what is unconfirmed.
    waiting: VecDeque<Parcel>,
}

#[derive(Debug)]
struct Owner {
    name: String,
    relay: Relay,
    clock: Clock,
    store: Store,
    leg_handle: LegHandle,
    leg_context: Arc<LegContext>,
    lanes: BTreeMap<LaneKey, Lane>,
    lane_events: mpsc::Sender<LaneEvent>,
    link: PeerLink,
    connection: Option<Box<LinkConnection>>,
    link_times: LinkTimes,
    /// The session doubts its path.
    in_doubt: bool,
    /// Whether the peer has said anything on this connection.
    heard: bool,
    redial_at: Option<Mono>,
    counted: Counted,
    report: watch::Sender<Report>,
    up: bool,
    since: Mono,
    last_error: Option<String>,
    watched: Watched,
    /// Reasons for which something was dropped, that the log has, and how often as the metrics have it.
    told_dropped: BTreeMap<Dropped, u64>,
    told_overflow: bool,
    watchers: Watchers,
    class_ages: PeerAges,
    room_series: RoomSeries,
}

/// What has been counted by connections that are gone.
#[derive(Debug, Default)]
struct Counted {
    tcp: TcpTotals,
}

/// What TCP carried, on all connections so far.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct TcpTotals {
    /// Repeats too.
    pub sent: u64,
    pub received: u64,
    pub retransmitted: u64,
    pub ip_sent: u64,
    pub ip_received: u64,
}

impl TcpTotals {
    fn plus(mut self, connection: &LinkConnection, now: &TcpStats) -> Self {
        // A dual-stack socket names an IPv4 peer by a mapped address.
        let header = if connection.info.address.ip().to_canonical().is_ipv4() {
            20
        } else {
            40
        };
        let (ip_sent, ip_received) = now.ip_bytes(header);
        self.sent += now.bytes_sent;
        self.received += now.bytes_received;
        self.retransmitted += now.bytes_retransmitted;
        self.ip_sent += ip_sent;
        self.ip_received += ip_received;
        self
    }
}

/// What is remembered from one look to the next.
#[derive(Debug, Default)]
struct Watched {
    pace: Pace,
    events: Events,
    acked: Seq,
    acked_at: Option<Wall>,
    mirror: MirrorStats,
    /// By class, as the metrics have it.
    expired: [u64; Class::COUNT],
    sent_bytes: [u64; Class::COUNT],
    received_bytes: [u64; Class::COUNT],
    refused: Run,
    dropped: Run,
    /// Since when users are without the far side.
    split_since: Option<Mono>,
}

impl Watched {
    /// Notes what is new since the last look.
    fn look(&mut self, relay: &Relay, now: Now) {
        let (stats, mirror) = (relay.stats(), relay.mirror().stats());
        if relay.acked() > self.acked {
            self.acked = relay.acked();
            self.acked_at = Some(now.wall);
        }
        if self.refused.begins(stats.refused, now.mono) {
            self.events
                .note(now, "stanzas are refused: the queue is full".to_owned());
        }
        let dropped = Dropped::ALL.into_iter().map(|dropped| stats.dropped_total(dropped));
        if self.dropped.begins(dropped.sum(), now.mono) {
            self.events.note(now, "stanzas are dropped, see the log".to_owned());
        }
        if mirror.splits > self.mirror.splits {
            self.split_since = Some(now.mono);
            self.events
                .note(now, "users were told that the link is gone".to_owned());
        }
        if mirror.heals > self.mirror.heals {
            if let Some(since) = self.split_since.take() {
                m::MIRROR_SPLIT.record_period((), now.mono.since(since));
            }
            self.events.note(now, "users were shown who is there".to_owned());
        }
        self.mirror = mirror;
    }
}

/// Runs until it is drained, or until the store fails: then nothing may be accepted any more.
pub async fn run(peer: Peer) -> Result<(), StoreError> {
    let (lane_events, mut lane_inbox) = mpsc::channel(LANE_EVENTS_MAX);
    let Peer {
        name,
        relay,
        clock,
        store,
        mut answers,
        mut legs,
        leg_handle,
        leg_context,
        link,
        link_times,
        report,
        mut settings,
        mut draining,
        watchers,
        class_ages,
        room_metrics,
    } = peer;
    let mut taps = watchers.clone();
    let mut owner = Owner {
        name,
        relay,
        clock,
        store,
        leg_handle,
        leg_context,
        lanes: BTreeMap::new(),
        lane_events,
        link,
        connection: None,
        link_times,
        in_doubt: false,
        heard: false,
        redial_at: None,
        counted: Counted::default(),
        report,
        up: false,
        since: clock.now().mono,
        last_error: None,
        watched: Watched::default(),
        told_dropped: BTreeMap::new(),
        told_overflow: false,
        watchers,
        class_ages,
        room_series: RoomSeries::new(room_metrics),
    };
    owner.look_who_watches();
    let mut report_tick = tokio::time::interval(REPORT_EVERY);
    let mut drain_until = None;
    owner.link.dial();
    owner.carry_out();
    loop {
        let deadline = Deadline::earlier(owner.relay.poll_timeout(), owner.redial());
        let transmit = owner.relay.wants_transmit();
        let (reader, writer) = match owner.connection.as_deref_mut() {
            Some(connection) => (Some(&mut connection.reader), Some(&mut connection.writer)),
            None => (None, None),
        };
        tokio::select! {
            biased;
            Some(answer) = answers.recv() => owner.handle_answer(answer)?,
            Some(event) = lane_inbox.recv() => owner.handle_lane(event),
            event = owner.link.next_event() => owner.handle_link(event),
            read = read_link(reader) => owner.handle_read(read),
            ready = writable(writer, transmit) => owner.handle_writable(ready),
            Some(event) = legs.recv() => owner.handle_leg(event),
            () = clock.sleep_until(deadline) => owner.handle_timeout(),
            _ = report_tick.tick() => {
                owner.look_who_watches();
                owner.tell();
            }
            () = taps.changed() => owner.look_who_watches(),
            Ok(()) = settings.changed() => {
                let settings = Box::new(settings.borrow_and_update().clone());
                owner.handle(Input::Settings(settings));
            }
            _ = draining.wait_for(|draining| *draining), if drain_until.is_none() => {
                drain_until = Some(clock.now().mono + DRAIN_MAX);
                owner.handle(Input::Drain);
            }
        }
        // Whatever else there is to do, what our server has sent goes towards the disk at every turn: until it is there, a kill
        // loses it. Behind a returning link's burst it would wait for hundreds of milliseconds.
        for _ in 0..BURST_MAX {
            let Ok(event) = legs.try_recv() else { break };
            owner.handle_leg(event);
        }
        owner.carry_out();
        if let Some(until) = drain_until
            && (owner.is_drained() || clock.now().mono >= until)
        {
            break;
        }
    }
    owner.leave(&mut lane_inbox).await;
    owner.tell();
    owner.store.close();
    Ok(())
}

/// What comes on the link; never, if there is none.
async fn read_link(reader: Option<&mut LinkReader>) -> io::Result<Option<Bytes>> {
    match reader {
        Some(reader) => reader.read().await,
        None => std::future::pending().await,
    }
}

/// When the link can take a batch, and of how many bytes, if there may be one; meanwhile what was started goes out.
async fn writable(writer: Option<&mut LinkWriter>, transmit: bool) -> io::Result<usize> {
    match writer {
        Some(writer) if transmit || writer.is_busy() => writer.ready().await,
        Some(_) | None => std::future::pending().await,
    }
}

impl Owner {
    fn handle(&mut self, input: Input) {
        self.relay.handle(input, self.clock.now());
    }

    fn handle_answer(&mut self, answer: Answer) -> Result<(), StoreError> {
        match answer {
            Answer::Committed { batch, levels } => self.handle(Input::Committed { batch, levels }),
            Answer::Spool { slots, end } => self.handle(Input::SpoolRead { slots, end }),
            Answer::Inbox { slots, end } => self.handle(Input::InboxRead { slots, end }),
            Answer::Failed(failure) => {
                m::STORE_ERRORS.increment(failure.fault.as_label());
                return Err(failure);
            }
        }
        Ok(())
    }

    fn handle_leg(&mut self, event: LegEvent) {
        match event {
            LegEvent::Stanza { leg, n, pair, stanza } => {
                m::STANZAS.increment((&self.name, kind_label(stanza.kind())));
                self.handle(Input::Stanza { leg, n, pair, stanza });
            }
            // What it brought is accepted or will be; nobody waits for it any more.
            LegEvent::Gone { leg } => debug!(peer = %self.name, leg = leg.0, "A stream of the server is gone."),
        }
    }

    fn handle_lane(&mut self, event: LaneEvent) {
        match event {
            LaneEvent::Up {
                lane,
                life,
                acks,
                stanza_bytes_max,
            } => {
                info!(peer = %self.name, pair = %lane.pair, lane = lane.lane, acks, "Stream to the server is up.");
                self.handle(Input::LaneUp {
                    lane,
                    life,
                    acks,
                    stanza_bytes_max,
                });
            }
            LaneEvent::Confirmed { lane, life, stanzas } => {
                self.handle(Input::LaneConfirmed {
                    lane: lane.clone(),
                    life,
                    stanzas,
                });
                self.write_waiting(&lane);
            }
            LaneEvent::Down { lane, life, reason } => {
                if self.lanes.get(&lane).is_some_and(|known| known.life == life) {
                    self.lanes.remove(&lane);
                }
                let fault = fault_of(&reason);
                if fault == LaneFault::Refused {
                    warn!(peer = %self.name, pair = %lane.pair, %reason, "The server refused what it was sent.");
                }
                self.handle(Input::LaneDown { lane, life, fault });
            }
        }
    }

    fn handle_link(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Up(new) => {
                if let Some(old) = &self.connection {
                    match survivor(&old.info, self.in_doubt, &new.info, &self.link_times) {
                        Survivor::Old => return,
                        Survivor::New => self.lose_link("replaced", "a newer connection took over"),
                    }
                }
                info!(peer = %self.name, address = %new.info.address, dialled = new.info.dialled, "Connected to the peer.");
                self.link.rest();
                self.redial_at = None;
                self.in_doubt = false;
                self.heard = false;
                self.connection = Some(new);
                m::LINK_CONNECTS.increment(&self.name);
                self.handle(Input::LinkUp);
            }
            LinkEvent::DialFailed(error) => {
                // An outage of hours is one line in the log, not thousands.
                if self.last_error.as_deref() != Some(&error.to_string()) {
                    info!(peer = %self.name, %error, "The peer cannot be reached.");
                }
                self.last_error = Some(error.to_string());
                m::LINK_CLOSED.increment(error.as_label());
            }
        }
    }

    fn handle_read(&mut self, read: io::Result<Option<Bytes>>) {
        match read {
            Ok(Some(bytes)) => {
                self.heard = true;
                self.handle(Input::LinkBytes(bytes));
            }
            Ok(None) => self.lose_link("closed_by_peer", "the peer closed the connection"),
            Err(error) => self.lose_link("io", &error.to_string()),
        }
    }

    fn handle_writable(&mut self, ready: io::Result<usize>) {
        let room = match ready {
            Ok(room) => room,
            Err(error) => return self.lose_link("io", &error.to_string()),
        };
        if let Some(bytes) = self.relay.poll_transmit_upto(room, self.clock.now())
            && let Some(connection) = self.connection.as_deref_mut()
        {
            connection.writer.start(bytes);
        }
    }

    fn handle_timeout(&mut self) {
        if self.redial_at.is_some_and(|at| at <= self.clock.now().mono) {
            self.redial_at = None;
            self.link.dial();
        }
        self.handle(Input::Timeout);
    }

    fn redial(&self) -> Option<Deadline> {
        self.redial_at.map(|at| Deadline { at, why: "redial" })
    }

    /// Does what the relay asks for, until it asks for nothing more.
    fn carry_out(&mut self) {
        while let Some(output) = self.relay.poll_output() {
            match output {
                Output::Commit(batch) => self.store.submit(Request::Commit(batch)),
                Output::ReadSpool {
                    from,
                    entries_max,
                    bytes_max,
                } => self.store.submit(Request::ReadSpool {
                    from,
                    entries_max,
                    bytes_max,
                }),
                Output::ReadInbox {
                    from,
                    entries_max,
                    bytes_max,
                } => self.store.submit(Request::ReadInbox {
                    from,
                    entries_max,
                    bytes_max,
                }),
                Output::Accepted { leg, n } => self.leg_handle.committed(leg, n),
                Output::OpenLane { lane, life } => self.open_lane(lane, life),
                Output::WriteLane {
                    lane,
                    life,
                    batch,
                    stanzas,
                } => {
                    if let Some(known) = self.lanes.get_mut(&lane)
                        && known.life == life
                    {
                        known.waiting.push_back(Parcel { batch, stanzas });
                        self.write_waiting(&lane);
                    }
                }
                Output::LinkQuiet(true) => {
                    self.in_doubt = true;
                    self.link.dial();
                }
                Output::LinkQuiet(false) => {
                    self.in_doubt = false;
                    self.link.rest();
                }
                Output::CloseLink(why) => self.close_link(&why),
            }
        }
        self.show_trace();
        for took in self.relay.take_delivered(self.clock.now()) {
            m::DELIVERY.record_period((), took);
        }
        let up = self.relay.is_linked();
        if up != self.up {
            self.up = up;
            let now = self.clock.now();
            self.since = now.mono;
            let levels = self.relay.levels();
            let what = match (up, &self.last_error) {
                (true, _) => format!("the link is up, {} entries wait", levels.spool_entries),
                (false, Some(why)) => format!("the link is down: {why}"),
                (false, None) => "the link is down".to_owned(),
            };
            self.watched.events.note(now, what);
            if up {
                self.last_error = None;
                info!(peer = %self.name, spool = levels.spool_entries, inbox = levels.inbox_entries, "Link is up.");
            } else {
                info!(peer = %self.name, spool = levels.spool_entries, inbox = levels.inbox_entries, "Link is down.");
            }
            self.tell();
        }
    }

    /// While somebody watches, or the log has a line for each stanza, the relay notes what becomes of each.
    fn look_who_watches(&mut self) {
        let logged = tracing::enabled!(tracing::Level::DEBUG);
        self.relay.set_traced(logged || self.watchers.any());
    }

    fn show_trace(&mut self) {
        while let Some(event) = self.relay.poll_trace() {
            self.watchers.show(&self.name, &event);
            if tracing::enabled!(tracing::Level::DEBUG) {
                let stanza = event.stanza.clone().and_then(|bytes| Stanza::parse(bytes).ok());
                let from = stanza.as_ref().and_then(Stanza::from).unwrap_or_default();
                let to = stanza.as_ref().and_then(Stanza::to).unwrap_or_default();
                debug!(
                    peer = %self.name,
                    entry = event.entry.as_ref().map(tracing::field::display),
                    direction = trace::direction(event.direction),
                    class = event.class.map(Class::as_label),
                    kind = event.kind().map(Kind::as_str),
                    from = %Pii(&*from),
                    to = %Pii(&*to),
                    "Stanza {}: {}.",
                    event.decision.as_label(),
                    event.decision
                );
            }
        }
        self.watchers.miss(self.relay.take_trace_missed());
    }

    fn open_lane(&mut self, lane: LaneKey, life: u64) {
        let handle = lane::spawn(
            Arc::clone(&self.leg_context),
            lane.clone(),
            life,
            {
                let release = self.store.release();
                Arc::new(move |batch| release.note(batch))
            },
            self.lane_events.clone(),
        );
        let waiting = VecDeque::new();
        self.lanes.insert(lane, Lane { life, handle, waiting });
    }

    fn write_waiting(&mut self, lane: &LaneKey) {
        let Some(lane) = self.lanes.get_mut(lane) else { return };
        while let Some(parcel) = lane.waiting.pop_front() {
            if let Err(parcel) = lane.handle.try_write(parcel) {
                lane.waiting.push_front(parcel);
                return;
            }
        }
    }

    fn close_link(&mut self, why: &LinkClose) {
        let (label, text, wait) = match why {
            LinkClose::Error(error) => (error.as_label(), error.to_string(), None),
            LinkClose::Goodbye(reason) => (
                "closed_by_peer",
                format!("the peer says goodbye: {}", reason.as_label()),
                None,
            ),
            LinkClose::InboxFull => (
                "inbox_full",
                "the local server takes nothing and the inbox is full".to_owned(),
                Some(REFUSED_WAIT),
            ),
        };
        if self.connection.is_some() {
            warn!(peer = %self.name, reason = label, "The connection to the peer is given up: {text}.");
            self.lose_link(label, &text);
            if let Some(wait) = wait {
                self.link.rest();
                self.redial_at = Some(self.clock.now().mono + wait);
            }
        }
    }

    fn lose_link(&mut self, label: &'static str, why: &str) {
        let Some(connection) = self.connection.take() else {
            return;
        };
        if let Ok(stats) = connection.writer.stats() {
            self.counted.tcp = self.counted.tcp.plus(&connection, &stats);
        }
        debug!(peer = %self.name, reason = label, why, "The connection to the peer is gone.");
        self.last_error = Some(why.to_owned());
        m::LINK_CLOSED.increment(label);
        if self.heard {
            self.link.dial();
        } else {
            self.redial_at = Some(self.clock.now().mono + REFUSED_WAIT);
        }
        self.handle(Input::LinkDown);
    }

    /// Nothing is on its way to the disk or to the server.
    fn is_drained(&self) -> bool {
        let (_, unconfirmed) = self.relay.lanes_up();
        self.relay.is_settled() && unconfirmed == 0
    }

    /// Says goodbye to the peer and to the server.
    async fn leave(&mut self, lane_inbox: &mut mpsc::Receiver<LaneEvent>) {
        self.relay.say_goodbye();
        if let Some(mut connection) = self.connection.take() {
            let now = self.clock.now();
            let last_word = async {
                connection.writer.ready().await?;
                while let Some(bytes) = self.relay.poll_transmit(now) {
                    connection.writer.start(bytes);
                    connection.writer.ready().await?;
                }
                connection.writer.shutdown().await
            };
            if !matches!(timeout(GOODBYE_MAX, last_word).await, Ok(Ok(()))) {
                debug!(peer = %self.name, "The peer could not be told goodbye.");
            }
        }
        let mut open = self.lanes.len();
        // Dropping a handle drains its lane.
        self.lanes.clear();
        let all_down = async {
            while open > 0 {
                match lane_inbox.recv().await {
                    Some(LaneEvent::Down { .. }) => open -= 1,
                    Some(LaneEvent::Up { .. } | LaneEvent::Confirmed { .. }) => {}
                    None => break,
                }
            }
        };
        if timeout(GOODBYE_MAX, all_down).await.is_err() {
            debug!(peer = %self.name, "The server did not close its streams in time.");
        }
    }

    /// Tells metrics and `/status` how things stand.
    fn tell(&mut self) {
        let now = self.clock.now();
        let (lanes_up, unconfirmed) = self.relay.lanes_up();
        let (levels, mirrored) = (self.relay.levels(), self.relay.mirror().stats());
        let mut stats = self.relay.stats().clone();
        // Plain S2S has no mirror that speaks for anyone.
        stats.copy_bytes_accepted = stats.copy_bytes_accepted.saturating_sub(mirrored.caused_bytes);
        stats.near_bytes = stats.near_bytes.saturating_sub(mirrored.caused_bytes);
        let sums = self.relay.session_totals();
        let rtt = sums.rtt;
        let oldest = self.relay.oldest(now);
        self.watched.look(&self.relay, now);
        let peer = self.name.as_str();

        let seconds = |wall: Wall| wall.0 as f64 / 1000.0;
        let changed = seconds(now.wall) - now.mono.since(self.since).as_secs_f64();
        m::LINK_CHANGED.set(peer, changed);
        m::LINK_ACKED.set(peer, self.watched.acked_at.map_or(0.0, seconds));
        m::LINK_UP.set(peer, f64::from(u8::from(self.up)));
        m::LINK_RTT.set(peer, rtt.unwrap_or_default().as_secs_f64());
        let connection = self.connection.as_deref();
        let kernel = connection.and_then(|connection| Some((connection, connection.writer.stats().ok()?)));
        let tcp = kernel.map_or(self.counted.tcp, |(connection, stats)| {
            self.counted.tcp.plus(connection, &stats)
        });
        let acked_bytes = self.relay.acked_bytes();
        let look = kernel.filter(|_| self.up).map(|(_, stats)| Look {
            acked: stats.bytes_acked,
            delivered_per_second: stats.delivered_per_second,
            busy: stats.unsent_bytes > 0,
        });
        self.watched.pace.note(look, tcp.sent, acked_bytes, now.mono);
        let drain = self.watched.pace.time_for(levels.spool_bytes);
        m::LINK_CAPACITY.set(peer, self.watched.pace.capacity().unwrap_or_default());
        m::LINK_TCP_RTT.set(peer, kernel.map_or(0.0, |(_, stats)| stats.rtt.as_secs_f64()));
        m::LINK_BYTES.follow((peer, Direction::Sent, Layer::Tcp), tcp.sent);
        m::LINK_BYTES.follow((peer, Direction::Received, Layer::Tcp), tcp.received);
        m::LINK_BYTES.follow((peer, Direction::Sent, Layer::Ip), tcp.ip_sent);
        m::LINK_BYTES.follow((peer, Direction::Received, Layer::Ip), tcp.ip_received);
        m::LINK_RETRANSMITTED.follow(peer, tcp.retransmitted);
        for (direction, frames, wire, batches) in [
            (
                Direction::Sent,
                sums.frame_bytes_sent,
                sums.bytes_sent,
                sums.batches_sent,
            ),
            (
                Direction::Received,
                sums.frame_bytes_received,
                sums.bytes_received,
                sums.batches_received,
            ),
        ] {
            m::LINK_BYTES.follow((peer, direction, Layer::Frame), frames);
            m::LINK_BYTES.follow((peer, direction, Layer::Tls), wire);
            m::LINK_BATCHES.follow((peer, direction), batches);
        }
        m::ENTRIES.follow((peer, Direction::Sent), stats.entries_sent);
        m::ENTRIES.follow((peer, Direction::Received), stats.entries_received);
        m::INTERRUPTED.follow(peer, self.relay.interrupted());
        m::MISSING.follow(peer, stats.missing);
        m::CASTS.follow((peer, Direction::Sent), stats.shared);
        m::CASTS.follow((peer, Direction::Received), stats.shared_received);
        m::COPIES.follow((peer, Direction::Sent), stats.copies_accepted);
        m::COPIES.follow((peer, Direction::Received), stats.copies_delivered);
        m::STANZA_BYTES.follow((peer, Direction::Sent), stats.copy_bytes_accepted);
        m::STANZA_BYTES.follow((peer, Direction::Received), stats.copy_bytes_delivered);
        let saved = Saved {
            mirror: stats.near_bytes,
            rules: stats.rule_bytes,
            collapse: stats.crossing_bytes.saturating_sub(stats.entry_bytes),
            compaction: stats.superseded_bytes,
            compression: acked_bytes.saturating_sub(sums.bytes_sent),
        };
        m::SAVED.follow((peer, Mechanism::Mirror), saved.mirror);
        m::SAVED.follow((peer, Mechanism::Rules), saved.rules);
        m::SAVED.follow((peer, Mechanism::Collapse), saved.collapse);
        m::SAVED.follow((peer, Mechanism::Compaction), saved.compaction);
        m::SAVED.follow((peer, Mechanism::Compression), saved.compression);
        m::SAMPLE.follow((peer, Squeezed::Plain), stats.sampled_bytes);
        m::SAMPLE.follow((peer, Squeezed::Compressed), stats.sampled_compressed_bytes);
        m::DUPLICATES_DROPPED.follow(peer, stats.duplicates);
        m::IN_DOUBT.follow(peer, stats.in_doubt);
        for dropped in Dropped::ALL {
            let total = stats.dropped_total(dropped);
            let told = self.told_dropped.get(&dropped).copied().unwrap_or_default();
            m::DROPPED.add(dropped.as_label(), total - told);
            if total > told && self.told_dropped.insert(dropped, total).is_none() {
                warn!(peer = %self.name, reason = dropped.as_label(), "Stanzas are not delivered. This is said once; the metrics count them.");
            }
        }
        m::REFUSED.follow((peer, Refused::QueueFull), stats.refused);
        m::REFUSED.follow((peer, Refused::ClassFull), stats.class_full.iter().sum());
        m::REFUSED.follow((peer, Refused::Expired), stats.expired.iter().sum());
        m::SUPERSEDED.follow(peer, stats.superseded.iter().sum());
        let ages = self
            .class_ages
            .tell(Class::ALL.map(|class| self.relay.oldest_of(class, now)));
        let sent_bytes = self.relay.sent_bytes();
        for class in Class::ALL {
            let index = class as usize;
            m::CLASS_OLDEST.set(class, ages[index].as_secs_f64());
            for (direction, bytes, told) in [
                (Direction::Sent, sent_bytes[index], &mut self.watched.sent_bytes[index]),
                (
                    Direction::Received,
                    stats.received_bytes[index],
                    &mut self.watched.received_bytes[index],
                ),
            ] {
                m::CLASS_CROSSED_BYTES.add((class, direction), bytes - *told);
                *told = bytes;
            }
            let level = self.relay.level(class);
            m::CLASS_ENTRIES.set((peer, class), level.entries as f64);
            m::CLASS_BYTES.set((peer, class), level.bytes as f64);
            let (expired, told) = (stats.expired[class as usize], &mut self.watched.expired[class as usize]);
            m::CLASS_EXPIRED.add(class, expired - *told);
            *told = expired;
        }
        m::SPOOL_ENTRIES.set(peer, levels.spool_entries as f64);
        m::SPOOL_BYTES.set(peer, levels.spool_bytes as f64);
        m::SPOOL_OLDEST.set(peer, oldest.as_secs_f64());
        m::SPOOL_ACKED_BYTES.follow(peer, acked_bytes);
        m::SPOOL_DRAIN.set(peer, drain.map_or(f64::INFINITY, |drain| drain.as_secs_f64()));
        m::INBOX_ENTRIES.set(peer, levels.inbox_entries as f64);
        m::INBOX_BYTES.set(peer, levels.inbox_bytes as f64);
        m::LANE_UNCONFIRMED.set(peer, unconfirmed as f64);
        for (rule, mode, count) in self.relay.rules().counts() {
            let mode = match mode {
                Mode::Applied => RuleMode::Applied,
                Mode::Observed => RuleMode::Observed,
            };
            m::RULE_STANZAS.follow((peer, rule, mode), count.stanzas);
            m::RULE_SAVED.follow((peer, rule, mode), count.bytes_saved);
        }
        let rooms = self.relay.mirror().levels();
        for (state, count) in self.relay.mirror().rooms_by_state() {
            m::MIRROR_ROOMS.set((peer, room_state_label(state)), count as f64);
        }
        m::MIRROR_SESSIONS.set(peer, rooms.sessions as f64);
        m::MIRROR_GUESTS.set(peer, rooms.guests as f64);
        m::MIRROR_ECHOES_PENDING.set(peer, rooms.echoes_pending as f64);
        m::MIRROR_ECHOES.follow((peer, EchoEvent::Shown), mirrored.echoes);
        m::MIRROR_ECHOES.follow((peer, EchoEvent::Reflected), mirrored.reflections_swallowed);
        m::MIRROR_ECHOES.follow((peer, EchoEvent::RefusedByRoom), mirrored.echoes_refused);
        m::MIRROR_ANSWERS.follow((peer, NearAnswer::Ping), mirrored.pings_answered);
        m::MIRROR_ANSWERS.follow((peer, NearAnswer::Disco), mirrored.discos_answered);
        m::MIRROR_REFUSED.follow(peer, mirrored.refused);
        m::MIRROR_SPLITS.follow(peer, mirrored.splits);
        m::MIRROR_HEALS.follow(peer, mirrored.heals);
        m::MIRROR_GHOSTS.follow(peer, mirrored.ghosts);
        m::MIRROR_GHOSTS_RETURNED.follow(peer, mirrored.ghosts_returned);
        m::MIRROR_FOUND.follow(peer, mirrored.found);
        m::MIRROR_OVERFLOWS.follow(peer, mirrored.overflows);
        if mirrored.overflows > 0 && !std::mem::replace(&mut self.told_overflow, true) {
            warn!(peer = %self.name, "A room is too large to be mirrored, or rooms are too many. This is said once; the metrics count them.");
        }
        for (room, bytes) in self.room_series.bytes(self.relay.rooms()) {
            m::ROOM_BYTES.follow((peer, &room), bytes);
        }
        m::STORE_BYTES.set(peer, self.store.stats().bytes_on_disk() as f64);

        self.report.send_replace(Report {
            link_up: self.up,
            link_since: now.mono.since(self.since),
            last_error: self.last_error.clone(),
            rtt,
            levels,
            classes: Class::ALL.map(|class| self.relay.level(class)),
            spool_oldest: oldest,
            drain,
            acked_ago: self.watched.acked_at.map(|at| now.wall.since(at)),
            relay: stats,
            rooms,
            room_costs: self.relay.rooms().top(ROOMS_SHOWN),
            tcp,
            payload: [sums.bytes_sent, sums.bytes_received],
            saved,
            events: self.watched.events.clone(),
            lanes_up,
            unconfirmed,
        });
    }
}

fn room_state_label(state: mirror::RoomState) -> RoomState {
    match state {
        mirror::RoomState::Joining => RoomState::Joining,
        mirror::RoomState::Live => RoomState::Live,
        mirror::RoomState::Detached => RoomState::Detached,
        mirror::RoomState::Resyncing => RoomState::Resyncing,
    }
}

fn kind_label(kind: Kind) -> StanzaKind {
    match kind {
        Kind::Message => StanzaKind::Message,
        Kind::Presence => StanzaKind::Presence,
        Kind::Iq => StanzaKind::Iq,
    }
}

/// Whether the server refused what we sent, or the stream merely ended.
fn fault_of(reason: &DownReason) -> LaneFault {
    match reason {
        DownReason::Closed(CloseReason::ServerError { condition, .. })
            if !matches!(condition.as_str(), "system-shutdown" | "connection-timeout" | "reset") =>
        {
            LaneFault::Refused
        }
        _ => LaneFault::Gone,
    }
}
