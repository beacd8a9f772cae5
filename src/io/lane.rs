//! Streams that we open towards our server, in a far domain's name.
//!
//! A lane is one such stream for one domain pair, from the look-up of the server to the end of the connection: one *life*.
//! It never comes back by itself. [`LaneEvent::Down`] is the last thing it says, and its owner decides when there is a next
//! life ([`Backoff`](super::backoff::Backoff)) and what has to be written again in it: all that was not
//! [`Confirmed`](LaneEvent::Confirmed).
//!
//! *Confirmed* means what the stream can know: with XEP-0198 that the server has acknowledged the stanza, without it that
//! the server has answered a ping that came after it ([`receipts`](super::receipts)). The kernel's taking it means little: it
//! may hold much that the server has not read. Measured in a burst: 0.3 s worth (60 KB) with ejabberd, 6 s (170 KB)
//! with a Prosody that reads at its shipped 30 kB/s; a server throws that away when we are killed. Only where pings find no answer,
//! and at the end of a stream, what the kernel has taken counts as delivered. Prosody has XEP-0198 on streams that authenticated by
//! certificate, not by dialback.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::mpsc,
    task::AbortHandle,
    time::{error::Elapsed, timeout},
};
use tracing::{debug, info};

use super::{
    clock::Clock,
    dns::{DnsError, Location, Resolver, Target},
    receipts::{Asker, Receipts},
    tls::{Acceptor, Connector, TlsError},
    wire::{self, Wire, WireEvent},
};
use crate::{
    metrics::{LEG_CLOSED, LEG_OPENED, LEG_VERIFICATIONS, LEGS, Leg, LegState, Verified},
    relay::LaneKey,
    stanza::DomainPair,
    stream::{
        Certificate, CloseReason, InitiatingStream, Site, Verdict,
        initiating::{Input, Output, Purpose},
    },
    time::{Deadline, Mono},
};

/// For each address. ejabberd gives up after as long; a server on a LAN answers in milliseconds or is not there.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// For the bytes before TLS begins: a few hundred.
const FLUSH_MAX: Duration = Duration::from_secs(10);

/// For one dialback verification, from the look-up to the answer. ejabberd waits 30 s for us, Prosody 90 s.
const VERIFY_MAX: Duration = Duration::from_secs(20);

/// What is handed to the machine at once: about one TLS record, one `<r/>`, and the most that is in doubt without XEP-0198
/// when we die between the kernel's taking it and the owner's noting it.
const SLICE_BYTES: usize = 16 * 1024;

/// A ping that is not answered for so long will not be, and what the kernel has taken counts. The owner's window is read in 0.6 s
/// by a Prosody at its shipped 30 kB/s; setting up the stream for the answer takes some round trips on a LAN.
const RECEIPT_MAX: Duration = Duration::from_secs(2);

/// Batches that may wait in front of a lane. The owner keeps the rest, where it is on disk.
const COMMANDS_MAX: usize = 8;

/// Above so many bytes that the server does not take, we stop hearing it as well: it only asks for more answers.
const WAITING_BYTES_MAX: usize = 1024 * 1024;

/// What all legs of a site share.
#[derive(Debug)]
pub struct LegContext {
    pub site: CurrentSite,
    pub clock: Clock,
    pub acceptor: Acceptor,
    pub connector: Connector,
    pub resolver: Resolver,
    /// Between the streams that ask and those that bring the answers.
    pub receipts: Receipts,
    /// Where our own server is.
    pub server: Location,
    /// Connections that the server may have open to us at once.
    pub connections_max: u32,
}

/// The site as streams that are opened from now on know it. Those that are open keep what they began with: they are between
/// domains that were known then.
#[derive(Debug)]
pub struct CurrentSite(RwLock<Arc<Site>>);

impl CurrentSite {
    pub fn new(site: Site) -> Self {
        Self(RwLock::new(Arc::new(site)))
    }

    pub fn get(&self) -> Arc<Site> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn replace(&self, site: Site) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(site);
    }
}

/// Complete stanzas, in order, and the batch that marks them as given.
#[derive(Clone, Debug)]
pub struct Parcel {
    pub batch: u64,
    pub stanzas: Vec<Bytes>,
}

/// Called with a batch before anything that it marks is written. It must be quick; if it fails, nothing is written and the life ends.
pub type BeforeWrite = Arc<dyn Fn(u64) -> io::Result<()> + Send + Sync>;

#[derive(Debug)]
pub enum LaneCommand {
    /// Only after [`LaneEvent::Up`]; what comes earlier waits.
    Write(Parcel),
    /// Close gracefully after all that was to be written. Dropping the handle does the same.
    Drain,
}

#[derive(Clone, Debug)]
pub enum LaneEvent {
    Up {
        lane: LaneKey,
        life: u64,
        /// XEP-0198 is on.
        acks: bool,
        /// The server's limit (XEP-0478).
        stanza_bytes_max: Option<usize>,
    },
    /// So many of this life's stanzas, counted from its beginning, need not be written again.
    Confirmed { lane: LaneKey, life: u64, stanzas: u64 },
    /// The last event of a life.
    Down {
        lane: LaneKey,
        life: u64,
        reason: DownReason,
    },
}

/// Why a life ended.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DownReason {
    #[error("{0}")]
    NotFound(#[from] DnsError),
    #[error("{address}: {error}")]
    NotConnected { address: String, error: String },
    #[error("{0}")]
    Tls(String),
    #[error("the connection broke: {0}")]
    Broken(String),
    #[error("{0}")]
    Closed(CloseReason),
    #[error("no randomness: {0}")]
    NoRandomness(String),
}

impl DownReason {
    /// The value in metrics.
    pub fn as_label(&self) -> &'static str {
        match self {
            Self::NotFound(_) | Self::Tls(_) | Self::NoRandomness(_) => "failed",
            Self::NotConnected { .. } | Self::Broken(_) => "io",
            Self::Closed(reason) => reason.as_label(),
        }
    }
}

/// The owner's end of a lane.
#[derive(Debug)]
pub struct LaneHandle {
    pub tx: mpsc::Sender<LaneCommand>,
    task: AbortHandle,
}

impl LaneHandle {
    /// Hands stanzas over, or gives them back if the lane has enough for now (or is gone, as its `Down` says).
    pub fn try_write(&self, parcel: Parcel) -> Result<(), Parcel> {
        self.tx
            .try_send(LaneCommand::Write(parcel))
            .map_err(|error| match error.into_inner() {
                LaneCommand::Write(parcel) => parcel,
                LaneCommand::Drain => unreachable!("a parcel was sent"),
            })
    }

    /// Closes gracefully: what was handed over is written first.
    pub fn drain(self) {}

    /// Ends the life at once and without a [`LaneEvent::Down`].
    pub fn abort(&self) {
        self.task.abort();
    }
}

/// Starts a life. `life` is the owner's number for it, so that late events of an earlier one are known for what they are.
pub fn spawn(
    context: Arc<LegContext>,
    lane: LaneKey,
    life: u64,
    before_write: BeforeWrite,
    events: mpsc::Sender<LaneEvent>,
) -> LaneHandle {
    let (tx, commands) = mpsc::channel(COMMANDS_MAX);
    let task = tokio::spawn(async move {
        let reason = live(&context, &lane, life, &before_write, commands, &events).await;
        info!(pair = %lane.pair, lane = lane.lane, life, %reason, "Leg to the server is down.");
        LEG_CLOSED.increment((Leg::Initiating, reason.as_label()));
        // Nobody hears it any more if the owner is gone.
        let _ = events.send(LaneEvent::Down { lane, life, reason }).await;
    });
    LaneHandle {
        tx,
        task: task.abort_handle(),
    }
}

/// Asks our server whether it made a dialback key (XEP-0220 §2.3), over a connection of its own.
pub(super) async fn verify(
    context: &LegContext,
    pair: DomainPair,
    request: u64,
    stream_id: String,
    key: String,
) -> Verdict {
    let purpose = Purpose::Verify {
        request,
        stream_id,
        key,
    };
    let verdict = match timeout(VERIFY_MAX, ask(context, &pair, &purpose)).await {
        Ok(Ok(verdict)) => verdict,
        Ok(Err(error)) => {
            info!(%pair, %error, "Our server could not be asked about a dialback key.");
            Verdict::Error
        }
        Err(Elapsed { .. }) => {
            info!(%pair, "Our server did not answer about a dialback key in time.");
            Verdict::Error
        }
    };
    LEG_VERIFICATIONS.increment(match verdict {
        Verdict::Valid => Verified::Valid,
        Verdict::Invalid => Verified::Invalid,
        Verdict::Error => Verified::Error,
    });
    verdict
}

async fn ask(context: &LegContext, pair: &DomainPair, purpose: &Purpose) -> Result<Verdict, DownReason> {
    let mut failure = None;
    for target in targets(context, pair).await? {
        match ask_at(context, pair, purpose.clone(), target).await {
            Ok(verdict) => return Ok(verdict),
            Err(error) => failure = Some(error),
        }
    }
    Err(failure.unwrap_or_else(|| DnsError::NotOffered(pair.local.clone()).into()))
}

async fn ask_at(
    context: &LegContext,
    pair: &DomainPair,
    purpose: Purpose,
    target: Target,
) -> Result<Verdict, DownReason> {
    let (mut wire, mut stream) = open(context, pair, purpose, target).await?;
    let mut answer = None;
    loop {
        while let Some(output) = stream.poll_output() {
            match output {
                Output::Send(bytes) => wire.send(&bytes),
                Output::StartTls => {
                    let certificate = start_tls(context, pair, &mut wire).await?;
                    stream.handle(Input::Secured(certificate), context.clock.now());
                }
                Output::Verified { verdict, .. } => answer = Some(verdict),
                Output::Close(reason) => {
                    tokio::spawn(wire.close());
                    return answer.ok_or(DownReason::Closed(reason));
                }
                // Not with this purpose.
                Output::Ready { .. } | Output::Confirmed { .. } => (),
            }
        }
        if let Some(verdict) = answer {
            tokio::spawn(wire.close());
            return Ok(verdict);
        }
        tokio::select! {
            event = wire.next(true) => pass_on(event, &mut stream, context)?,
            () = context.clock.sleep_until(stream.poll_timeout()) => stream.handle(Input::Timeout, context.clock.now()),
        }
    }
}

/// One life, over as many addresses as it takes to become ready once.
async fn live(
    context: &LegContext,
    lane: &LaneKey,
    life: u64,
    before_write: &BeforeWrite,
    mut commands: mpsc::Receiver<LaneCommand>,
    events: &mpsc::Sender<LaneEvent>,
) -> DownReason {
    let targets = match targets(context, &lane.pair).await {
        Ok(targets) => targets,
        Err(reason) => return reason,
    };
    let mut failure = DownReason::NotFound(DnsError::NotOffered(lane.pair.local.clone()));
    for target in targets {
        let (wire, stream) = match open(context, &lane.pair, Purpose::Deliver, target).await {
            Ok(opened) => opened,
            Err(reason) => {
                failure = reason;
                continue;
            }
        };
        let mut delivery = Delivery::new(lane, life, before_write, events);
        failure = delivery.run(context, wire, stream, &mut commands).await;
        if delivery.was_ready {
            // The owner may be waiting to hand something over, and must be able to hear the last events.
            drop(commands);
            delivery.tell_rest().await;
            return failure;
        }
        debug!(pair = %lane.pair, lane = lane.lane, address = %target.address, reason = %failure,
            "This address did not serve.");
    }
    failure
}

/// What one life has written, and what of it is confirmed and told.
struct Delivery<'a> {
    lane: &'a LaneKey,
    life: u64,
    before_write: &'a BeforeWrite,
    events: &'a mpsc::Sender<LaneEvent>,
    was_ready: bool,
    acks: bool,
    /// Not told yet: the owner has not made room.
    up: Option<LaneEvent>,
    confirmed: u64,
    told: u64,
    /// Handed over, but not given to the machine yet; with the batches.
    queue: VecDeque<(u64, Bytes)>,
    written: u64,
    /// Without acks: what was written, and how it will be confirmed.
    marks: VecDeque<Mark>,
    /// Without acks: for receipts. None if we have no random number for it.
    asker: Option<Asker>,
    /// Pings find no answer.
    unanswered: bool,
    draining: bool,
    counted: Counted,
}

/// The end of a slice.
#[derive(Debug)]
struct Mark {
    /// Stanzas up to here, …
    stanzas: u64,
    /// … with the kernel when it has taken so many bytes, …
    bytes: u64,
    /// … and with the server when this ping is answered, …
    ping: u64,
    /// … which will not happen after that.
    until: Mono,
}

impl<'a> Delivery<'a> {
    fn new(lane: &'a LaneKey, life: u64, before_write: &'a BeforeWrite, events: &'a mpsc::Sender<LaneEvent>) -> Self {
        Self {
            lane,
            life,
            before_write,
            events,
            was_ready: false,
            acks: false,
            up: None,
            confirmed: 0,
            told: 0,
            queue: VecDeque::new(),
            written: 0,
            marks: VecDeque::new(),
            asker: None,
            unanswered: false,
            draining: false,
            counted: Counted::new(Leg::Initiating),
        }
    }

    async fn run(
        &mut self,
        context: &LegContext,
        mut wire: Wire,
        mut stream: InitiatingStream,
        commands: &mut mpsc::Receiver<LaneCommand>,
    ) -> DownReason {
        let events = self.events;
        let reason = loop {
            if let Some(reason) = self.carry_out(context, &mut wire, &mut stream).await {
                break reason;
            }
            if self.was_ready && wire.waiting() == 0 && !self.queue.is_empty() {
                let (slice, batch, ping) = self.next_slice();
                // From here on a kill may find them written.
                if let Err(error) = (self.before_write)(batch) {
                    break error.into();
                }
                stream.handle(Input::Write(slice), context.clock.now());
                if let Some(reason) = self.carry_out(context, &mut wire, &mut stream).await {
                    break reason;
                }
                if !self.acks {
                    self.marks.push_back(Mark {
                        stanzas: self.written,
                        bytes: wire.accepted() + wire.waiting() as u64,
                        ping,
                        until: context.clock.now().mono + RECEIPT_MAX,
                    });
                }
            }
            let mono = context.clock.now().mono;
            self.confirm_read(&wire, mono);
            let deadline = Deadline::earlier(stream.poll_timeout(), self.next_receipt(mono));

            let now = || context.clock.now();
            tokio::select! {
                event = wire.next(wire.waiting() < WAITING_BYTES_MAX) => {
                    if let Err(reason) = pass_on(event, &mut stream, context) {
                        break reason;
                    }
                }
                () = context.clock.sleep_until(deadline) => stream.handle(Input::Timeout, now()),
                () = answer(self.asker.as_ref()) => {}
                command = commands.recv(), if self.was_ready && self.queue.is_empty() && !self.draining => match command {
                    Some(LaneCommand::Write(Parcel { batch, stanzas })) => {
                        self.queue.extend(stanzas.into_iter().map(|stanza| (batch, stanza)));
                    }
                    // While nothing waits to be given to the machine, all that was handed over is before the closing tag.
                    Some(LaneCommand::Drain) | None => {
                        self.draining = true;
                        stream.handle(Input::Drain, now());
                    }
                },
                Ok(room) = events.reserve(), if self.has_news() => {
                    if let Some(news) = self.news() {
                        room.send(news);
                    }
                }
            }
        };
        // What was read is not known any more; written again, it might come twice.
        self.asker = None;
        self.unanswered = true;
        self.confirm_read(&wire, context.clock.now().mono);
        tokio::spawn(wire.close());
        reason
    }

    /// Does what the machine wants done, until it wants nothing.
    async fn carry_out(
        &mut self,
        context: &LegContext,
        wire: &mut Wire,
        stream: &mut InitiatingStream,
    ) -> Option<DownReason> {
        while let Some(output) = stream.poll_output() {
            match output {
                Output::Send(bytes) => wire.send(&bytes),
                Output::StartTls => match start_tls(context, &self.lane.pair, wire).await {
                    Ok(certificate) => stream.handle(Input::Secured(certificate), context.clock.now()),
                    Err(reason) => return Some(reason),
                },
                Output::Ready { acks, stanza_bytes_max } => self.ready(context, acks, stanza_bytes_max),
                Output::Confirmed { stanzas } => self.confirmed = self.confirmed.max(stanzas),
                Output::Close(reason) => return Some(DownReason::Closed(reason)),
                // Not with this purpose.
                Output::Verified { .. } => (),
            }
        }
        None
    }

    fn ready(&mut self, context: &LegContext, acks: bool, stanza_bytes_max: Option<usize>) {
        info!(pair = %self.lane.pair, lane = self.lane.lane, life = self.life, acks, "Leg to the server is up.");
        self.counted.ready();
        self.was_ready = true;
        self.acks = acks;
        self.asker = match acks {
            true => None,
            false => random().ok().map(|secret| context.receipts.asker(secret)),
        };
        self.unanswered = self.asker.is_none();
        self.up = Some(LaneEvent::Up {
            lane: self.lane.clone(),
            life: self.life,
            acks,
            stanza_bytes_max,
        });
    }

    /// What to write next, the last batch in it, and the number of the ping at its end.
    fn next_slice(&mut self) -> (Vec<Bytes>, u64, u64) {
        let mut slice = Vec::new();
        let (mut bytes, mut last_batch) = (0, 0);
        while let Some((batch, stanza)) = self.queue.pop_front() {
            if bytes > 0 && bytes + stanza.len() > SLICE_BYTES {
                self.queue.push_front((batch, stanza));
                break;
            }
            bytes += stanza.len();
            last_batch = batch;
            slice.push(stanza);
        }
        self.written += slice.len() as u64;
        let Some(asker) = &mut self.asker else {
            return (slice, last_batch, 0);
        };
        let (ping, number) = asker.ask(&self.lane.pair);
        slice.push(ping);
        (slice, last_batch, number)
    }

    fn confirm_read(&mut self, wire: &Wire, now: Mono) {
        let answered = self.asker.as_ref().map_or(0, Asker::answered);
        if self.asker.as_ref().is_some_and(Asker::is_up_to_date) {
            self.unanswered = false;
        }
        while let Some(mark) = self.marks.front() {
            let taken = mark.bytes <= wire.accepted();
            let read = mark.ping > 0 && mark.ping <= answered;
            if taken && !read && !self.unanswered && mark.until <= now {
                info!(pair = %self.lane.pair, lane = self.lane.lane, "The server does not answer pings in time.");
                self.unanswered = true;
            }
            if !(read || taken && self.unanswered) {
                return;
            }
            self.confirmed = mark.stanzas;
            self.marks.pop_front();
        }
    }

    /// When the oldest ping has gone unanswered for too long. One that the kernel has not taken by then is looked at when it has.
    fn next_receipt(&self, now: Mono) -> Option<Deadline> {
        let mark = self.marks.front().filter(|mark| !self.unanswered && mark.until > now)?;
        Some(Deadline {
            at: mark.until,
            why: "receipt",
        })
    }

    fn has_news(&self) -> bool {
        self.up.is_some() || self.confirmed > self.told
    }

    /// What the owner does not know yet, first things first.
    fn news(&mut self) -> Option<LaneEvent> {
        if let Some(up) = self.up.take() {
            return Some(up);
        }
        (self.confirmed > self.told).then(|| {
            self.told = self.confirmed;
            LaneEvent::Confirmed {
                lane: self.lane.clone(),
                life: self.life,
                stanzas: self.confirmed,
            }
        })
    }

    async fn tell_rest(&mut self) {
        while let Some(news) = self.news() {
            if self.events.send(news).await.is_err() {
                return;
            }
        }
    }
}

/// Counts a connection for as long as it lives.
#[derive(Debug)]
pub(super) struct Counted {
    leg: Leg,
    state: LegState,
}

impl Counted {
    pub(super) fn new(leg: Leg) -> Self {
        LEG_OPENED.increment(leg);
        LEGS.add((leg, LegState::Negotiating), 1.0);
        Self {
            leg,
            state: LegState::Negotiating,
        }
    }

    pub(super) fn ready(&mut self) {
        LEGS.add((self.leg, self.state), -1.0);
        self.state = LegState::Ready;
        LEGS.add((self.leg, self.state), 1.0);
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        LEGS.add((self.leg, self.state), -1.0);
    }
}

/// Until the server has answered a ping; for ever if it is asked none.
async fn answer(asker: Option<&Asker>) {
    match asker {
        Some(asker) => asker.changed().await,
        None => std::future::pending().await,
    }
}

async fn targets(context: &LegContext, pair: &DomainPair) -> Result<Vec<Target>, DownReason> {
    let draw = |max: u64| match max {
        u64::MAX => random().unwrap_or(0),
        // The bias is below 2^-40: weights are 16 bits and records few.
        max => random().unwrap_or(0) % (max + 1),
    };
    Ok(context.resolver.targets(&pair.local, &context.server, draw).await?)
}

async fn open(
    context: &LegContext,
    pair: &DomainPair,
    purpose: Purpose,
    target: Target,
) -> Result<(Wire, InitiatingStream), DownReason> {
    let tcp = wire::connect(target.address, CONNECT_MAX)
        .await
        .map_err(|error| DownReason::NotConnected {
            address: target.address.to_string(),
            error: error.to_string(),
        })?;
    let now = || context.clock.now();
    let mut stream = InitiatingStream::new(
        context.site.get(),
        pair.clone(),
        purpose,
        seed().map_err(|error| DownReason::NoRandomness(error.to_string()))?,
        now(),
        target.direct_tls,
    );
    stream.handle(Input::Connected, now());
    if !target.direct_tls {
        return Ok((Wire::plain(tcp), stream));
    }
    let (tls, certificate) = context.connector.connect(tcp, &pair.local, true).await?;
    stream.handle(Input::Secured(certificate), now());
    Ok((Wire::secured(tls), stream))
}

async fn start_tls(
    context: &LegContext,
    pair: &DomainPair,
    wire: &mut Wire,
) -> Result<Option<Certificate>, DownReason> {
    timeout(FLUSH_MAX, wire.flush())
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    let tcp = wire.take_plain()?;
    let (tls, certificate) = context.connector.connect(tcp, &pair.local, false).await?;
    wire.put_back(tls);
    Ok(certificate)
}

/// Gives the machine what came. A connection that broke has nothing more to say, and the machine need not hear of it.
fn pass_on(
    event: io::Result<WireEvent>,
    stream: &mut InitiatingStream,
    context: &LegContext,
) -> Result<(), DownReason> {
    match event? {
        WireEvent::Bytes(bytes) => stream.handle(Input::Bytes(bytes), context.clock.now()),
        WireEvent::Eof => stream.handle(Input::Eof, context.clock.now()),
        WireEvent::Flushed => (),
    }
    Ok(())
}

/// For a stream's ids and keys.
pub(super) fn seed() -> Result<[u8; 32], getrandom::Error> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed)?;
    Ok(seed)
}

fn random() -> Result<u64, getrandom::Error> {
    getrandom::u64()
}

impl From<io::Error> for DownReason {
    fn from(error: io::Error) -> Self {
        Self::Broken(error.to_string())
    }
}

impl From<TlsError> for DownReason {
    fn from(error: TlsError) -> Self {
        Self::Tls(error.to_string())
    }
}
