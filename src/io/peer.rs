//! The owner of one peer: a task around its [`Relay`].
//!
//! Everything that concerns a peer happens in this one task, so nothing in it is locked: stanzas from legs, answers of the
//! disk, events of lanes, bytes of the link and the passing of time come in, and the relay says what to do.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tracing::{debug, error, info, warn};

use super::{
    clock::Clock,
    lane::{self, DownReason, LaneEvent, LaneHandle, LegContext},
    legs::{LegEvent, LegHandle},
    link::{LinkConnection, LinkControl, LinkStats},
    store::{Answer, Request, Store, StoreError},
};
use crate::{
    metrics::{self as m, Direction, Layer, Leg, StanzaKind},
    relay::{Drop, Input, LaneFault, LaneKey, LinkClose, Output, Relay},
    stanza::Kind,
    stream::CloseReason,
};

/// Inputs that are taken in before time and sockets are looked at again, so that a flood of one kind does not starve the others.
const BURST_MAX: usize = 256;

/// How often figures that are read rather than counted go to the metrics. Prometheus rarely asks more often.
const METRICS_EVERY: Duration = Duration::from_secs(1);

/// After a SIGTERM: for what is accepted to be on disk and what is on its way to the server to be confirmed.
const DRAIN_MAX: Duration = Duration::from_secs(10);

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
    pub link: mpsc::Receiver<LinkConnection>,
    pub link_control: LinkControl,
    pub status: watch::Sender<PeerStatus>,
    pub draining: watch::Receiver<bool>,
}

/// What `/status` says of a peer.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct PeerStatus {
    pub name: String,
    /// Whether the link is up and the peer has told what it holds.
    pub link_up: bool,
    /// Seconds since that changed.
    pub link_since_seconds: u64,
    pub rtt_seconds: Option<f64>,
    pub spool_entries: u64,
    pub spool_bytes: u64,
    pub spool_oldest_seconds: u64,
    pub inbox_entries: u64,
    pub inbox_bytes: u64,
    pub lanes_up: usize,
    pub lane_unconfirmed: usize,
    /// Since the process started.
    pub entries_sent: u64,
    pub entries_received: u64,
    pub casts: u64,
    pub copies_accepted: u64,
    pub copy_bytes_accepted: u64,
    pub copies_delivered: u64,
    pub copy_bytes_delivered: u64,
    pub duplicates: u64,
    pub refused: u64,
    pub in_doubt: u64,
    pub dropped: BTreeMap<&'static str, u64>,
    pub link_bytes_sent: u64,
    pub link_bytes_received: u64,
}

#[derive(Debug)]
struct Lane {
    life: u64,
    handle: LaneHandle,
    /// Written by the relay, not yet taken by the lane's task. The relay bounds what is unconfirmed.
    waiting: VecDeque<Vec<Bytes>>,
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
    link: Option<LinkConnection>,
    link_control: LinkControl,
    link_stats: LinkStats,
    link_since: crate::time::Mono,
    link_was_up: bool,
    status: watch::Sender<PeerStatus>,
}

/// Runs until it is drained, or until the store fails: then nothing may be accepted any more.
pub async fn run(peer: Peer) -> Result<(), StoreError> {
    let (lane_events, mut lane_inbox) = mpsc::channel(1024);
    let Peer {
        name,
        relay,
        clock,
        store,
        mut answers,
        mut legs,
        leg_handle,
        leg_context,
        link: mut connections,
        link_control,
        status,
        mut draining,
    } = peer;
    let mut owner = Owner {
        name,
        relay,
        clock,
        store,
        leg_handle,
        leg_context,
        lanes: BTreeMap::new(),
        lane_events,
        link: None,
        link_control,
        link_stats: LinkStats::default(),
        link_since: clock.now().mono,
        link_was_up: false,
        status,
    };
    let mut metrics_tick = tokio::time::interval(METRICS_EVERY);
    let mut drain_until = None;
    owner.carry_out();
    loop {
        let deadline = owner.relay.poll_timeout();
        let link = owner.link.as_mut();
        tokio::select! {
            biased;
            Some(answer) = answers.recv() => owner.handle_answer(answer)?,
            Some(event) = lane_inbox.recv() => owner.handle_lane(event),
            Some(connection) = connections.recv() => owner.handle_connection(connection),
            event = link_event(link) => owner.handle_link(event),
            Some(event) = legs.recv() => {
                owner.handle_leg(event);
                for _ in 1..BURST_MAX {
                    let Ok(event) = legs.try_recv() else { break };
                    owner.handle_leg(event);
                }
            }
            () = clock.sleep_until(deadline) => owner.handle(Input::Timeout),
            _ = metrics_tick.tick() => owner.report(),
            _ = draining.wait_for(|draining| *draining), if drain_until.is_none() => {
                drain_until = Some(clock.now().mono + DRAIN_MAX);
                owner.handle(Input::Drain);
            }
        }
        owner.carry_out();
        if let Some(until) = drain_until {
            let (_, unconfirmed) = owner.relay.lanes_up();
            if (owner.relay.is_settled() && unconfirmed == 0) || owner.clock.now().mono >= until {
                break;
            }
        }
    }
    owner.say_goodbye().await;
    owner.report();
    owner.store.close();
    Ok(())
}

enum LinkEvent {
    Read(std::io::Result<Option<Bytes>>),
    Writable(std::io::Result<()>),
}

/// The next thing on the link; never, if there is none.
async fn link_event(link: Option<&mut LinkConnection>) -> LinkEvent {
    match link {
        None => std::future::pending().await,
        Some(link) => link.event().await,
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
                m::STORE_ERRORS.increment(&self.name);
                return Err(failure);
            }
        }
        Ok(())
    }

    fn handle_leg(&mut self, event: LegEvent) {
        match event {
            LegEvent::Stanza { leg, n, pair, stanza } => {
                m::STANZAS.increment((&self.name, Leg::Receiving, kind_label(stanza.kind())));
                self.handle(Input::Stanza { leg, n, pair, stanza });
            }
            // What it brought is accepted or will be; nobody waits for it any more.
            LegEvent::Gone { leg } => debug!(peer = %self.name, leg = leg.0, "A stream of the server is gone."),
        }
    }

    fn handle_lane(&mut self, event: LaneEvent) {
        match event {
            LaneEvent::Up { lane, life, acks, stanza_bytes_max } => {
                info!(peer = %self.name, pair = %lane.pair, lane = lane.lane, acks, "Stream to the server is up.");
                self.handle(Input::LaneUp { lane, life, acks, stanza_bytes_max });
            }
            LaneEvent::Confirmed { lane, life, stanzas } => {
                self.handle(Input::LaneConfirmed { lane: lane.clone(), life, stanzas });
                self.write_waiting(&lane);
            }
            LaneEvent::Down { lane, life, reason } => {
                if self.lanes.get(&lane).is_some_and(|known| known.life == life) {
                    self.lanes.remove(&lane);
                }
                let fault = fault_of(&reason);
                self.handle(Input::LaneDown { lane, life, fault });
            }
        }
    }

    fn handle_connection(&mut self, connection: LinkConnection) {
        if self.link.replace(connection).is_some() {
            self.handle(Input::LinkDown);
        }
        self.handle(Input::LinkUp);
    }

    fn handle_link(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Read(Ok(Some(bytes))) => self.handle(Input::LinkBytes(bytes)),
            LinkEvent::Read(Ok(None)) => self.lose_link("the peer closed the connection"),
            LinkEvent::Read(Err(error)) | LinkEvent::Writable(Err(error)) => self.lose_link(&error.to_string()),
            LinkEvent::Writable(Ok(())) => {
                if let Some(link) = self.link.as_mut() {
                    match self.relay.poll_transmit(self.clock.now()) {
                        Some(bytes) => link.send(bytes),
                        None => link.nothing_to_send(),
                    }
                }
            }
        }
    }

    /// Does what the relay asks for, until it asks for nothing more.
    fn carry_out(&mut self) {
        while let Some(output) = self.relay.poll_output() {
            match output {
                Output::Commit(batch) => self.store.submit(Request::Commit(batch)),
                Output::ReadSpool { from, entries_max, bytes_max } => {
                    self.store.submit(Request::ReadSpool { from, entries_max, bytes_max });
                }
                Output::ReadInbox { from, entries_max, bytes_max } => {
                    self.store.submit(Request::ReadInbox { from, entries_max, bytes_max });
                }
                Output::Accepted { leg, n } => self.leg_handle.committed(leg, n),
                Output::OpenLane { lane, life } => {
                    let handle = lane::spawn(Arc::clone(&self.leg_context), lane.clone(), life, self.lane_events.clone());
                    let waiting = VecDeque::new();
                    self.lanes.insert(lane, Lane { life, handle, waiting });
                }
                Output::WriteLane { lane, life, stanzas } => {
                    if let Some(known) = self.lanes.get_mut(&lane)
                        && known.life == life
                    {
                        known.waiting.push_back(stanzas);
                        self.write_waiting(&lane);
                    }
                }
                Output::CloseLink(why) => self.close_link(why),
            }
        }
        if self.relay.wants_transmit(self.clock.now())
            && let Some(link) = self.link.as_mut()
        {
            link.want_to_send();
        }
    }

    fn write_waiting(&mut self, lane: &LaneKey) {
        let Some(lane) = self.lanes.get_mut(lane) else { return };
        while let Some(stanzas) = lane.waiting.pop_front() {
            if let Err(stanzas) = lane.handle.try_write(stanzas) {
                lane.waiting.push_front(stanzas);
                return;
            }
        }
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
