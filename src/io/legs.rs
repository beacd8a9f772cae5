//! Streams that our server opens towards the far domains.
//!
//! Each connection is a task around one [`ReceivingStream`]. Stanzas go to the owner of the peer that has the far domain,
//! in the order in which they came, through a bounded channel: while it is full the connection is not read. The owner says
//! with [`LegHandle::committed`] which of them are on disk, and only then does the stream acknowledge them.
//!
//! A server counts a refused connection as the far domain's failure and throws room members out (ejabberd for up to five
//! minutes), so the listener is the last thing that may be short of anything. What is bounded is what anybody can cause:
//! connections that have not authenticated.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    future::pending,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch},
    task::JoinSet,
    time::timeout,
};
use tracing::{debug, error, info, warn};

use super::{
    lane::{self, Counted, LegContext},
    wire::{self, Wire, WireEvent},
};
use crate::{
    metrics::{LEG_CLOSED, LEG_REFUSED, Leg as Role},
    relay::LegId,
    stanza::{Domain, DomainPair, Stanza},
    stream::{
        Certificate, CloseReason, Method, ReceivingStream, Verdict,
        receiving::{Input, Output},
    },
};

/// Connections that have not authenticated. A server has two per domain pair on the way at most; the rest is for scanners.
const UNAUTHENTICATED_MAX: usize = 256;

/// Dialback questions to our server that are on the way at once: for one stream, and for all.
const LEG_VERIFICATIONS_MAX: usize = 16;
const VERIFICATIONS_MAX: usize = 64;

/// For the first byte. Servers speak at once.
const FIRST_BYTE_MAX: Duration = Duration::from_secs(30);

/// For the bytes before TLS begins: a few hundred.
const FLUSH_MAX: Duration = Duration::from_secs(10);

/// The first byte of a TLS handshake record (RFC 8446 §5.1).
const TLS_HANDSHAKE: u8 = 0x16;

/// Stanzas of one stream that its owner has not committed. Above it the stream is not read. It is a bound on memory (and
/// on the owner's mistakes), not a window: the channel to the owner is full long before.
const UNCOMMITTED_MAX: u64 = 65_536;

/// Their bytes: the burst for which [`EVENTS_MAX`] is, with 1 kB a copy, twice, or sixteen of the largest stanzas that servers
/// send. What is on its way to the disk takes milliseconds, so a server that is held up here for 15 s has a broken disk beside it.
pub const UNCOMMITTED_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Answers that the server does not take. Above it the stream is not read: it only asks for more of them.
const WAITING_BYTES_MAX: usize = 256 * 1024;

/// After `accept` failed, which it does when file descriptors run out: they may be back then.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// How many [`LegEvent`]s wait for an owner. ejabberd closes a stream that is not read for 15 s and loses what it had
/// queued, so this covers a burst of 40 broadcasts to 100 occupants while the disk is busy.
pub const EVENTS_MAX: usize = 4096;

/// What the owner of a peer hears of streams that our server opened.
#[derive(Debug)]
pub enum LegEvent {
    /// To be answered, once it is on disk or refused, by [`LegHandle::committed`]: every stanza, exactly once.
    Stanza {
        leg: LegId,
        /// Counts the stream's stanzas from 1, whoever owns them.
        n: u64,
        pair: DomainPair,
        stanza: Stanza,
    },
    /// Nothing more comes from this stream. Told to all who ever got a stanza from it.
    Gone { leg: LegId },
}

/// Who owns the peer that has a far domain.
#[derive(Clone, Debug, Default)]
pub struct Routes(BTreeMap<Domain, mpsc::Sender<LegEvent>>);

impl Routes {
    /// The channel's capacity should be [`EVENTS_MAX`].
    pub fn insert(&mut self, far: Domain, owner: mpsc::Sender<LegEvent>) {
        self.0.insert(far, owner);
    }
}

/// The owners' way back to the streams. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct LegHandle(Arc<Mutex<BTreeMap<LegId, Arc<Ledger>>>>);

impl LegHandle {
    /// The stream's stanza `n` is on disk (or was refused for good).
    pub fn committed(&self, leg: LegId, n: u64) {
        let ledger = lock(&self.0).get(&leg).cloned();
        // A stream that is gone needs no acknowledgement.
        if let Some(ledger) = ledger {
            lock(&ledger.committed).insert(n);
            ledger.changed.notify_one();
        }
    }
}

/// Which of one stream's stanzas are on disk.
#[derive(Debug, Default)]
struct Ledger {
    committed: Mutex<Prefix>,
    changed: Notify,
}

/// Numbers that come in any order, and how far they are complete.
#[derive(Debug, Default)]
struct Prefix {
    /// All of 1..=upto are in.
    upto: u64,
    /// Beyond that. Bounded by [`UNCOMMITTED_MAX`].
    early: BTreeSet<u64>,
}

impl Prefix {
    fn insert(&mut self, n: u64) {
        if n > self.upto {
            self.early.insert(n);
        }
        while self.early.first() == Some(&(self.upto + 1)) {
            self.early.pop_first();
            self.upto += 1;
        }
    }
}

/// The streams that our server opens.
#[derive(Clone, Debug)]
pub struct Legs(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    context: Arc<LegContext>,
    routes: RwLock<Routes>,
    handle: LegHandle,
    next_leg: AtomicU64,
    /// Streams that have authenticated and are open.
    ready: AtomicUsize,
    unauthenticated: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    verifications: Arc<Semaphore>,
    draining: watch::Sender<bool>,
}

impl Inner {
    fn owner(&self, far: &Domain) -> Option<mpsc::Sender<LegEvent>> {
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        routes.0.get(far).cloned()
    }
}

impl Legs {
    pub fn new(context: Arc<LegContext>, routes: Routes, handle: LegHandle) -> Self {
        let connections_max = context.connections_max;
        Self(Arc::new(Inner {
            context,
            routes: RwLock::new(routes),
            handle,
            next_leg: AtomicU64::new(1),
            ready: AtomicUsize::new(0),
            unauthenticated: Arc::new(Semaphore::new(UNAUTHENTICATED_MAX)),
            connections: Arc::new(Semaphore::new(connections_max as usize)),
            verifications: Arc::new(Semaphore::new(VERIFICATIONS_MAX)),
            draining: watch::Sender::new(false),
        }))
    }

    /// From now on this owner has these far domains, and no other has them.
    pub fn add_owner(&self, far: impl IntoIterator<Item = Domain>, owner: &mpsc::Sender<LegEvent>) {
        let mut routes = self.0.routes.write().unwrap_or_else(PoisonError::into_inner);
        for domain in far {
            routes.insert(domain, owner.clone());
        }
    }

    /// Nobody has these far domains any more. A stream on which something still comes for one of them is cut: what is on its way
    /// to a domain that is gone is the server's to return.
    pub fn remove_owner<'d>(&self, far: impl IntoIterator<Item = &'d Domain>) {
        let mut routes = self.0.routes.write().unwrap_or_else(PoisonError::into_inner);
        for domain in far {
            routes.0.remove(domain);
        }
    }

    /// Accepts connections until [`drain`](Self::drain). Several listeners are several calls.
    pub async fn serve(&self, listener: TcpListener) {
        let mut draining = self.0.draining.subscribe();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = draining.wait_for(|draining| *draining) => return,
            };
            match accepted {
                Ok((tcp, address)) => self.admit(tcp, address),
                Err(error) => {
                    error!(%error, "The server's connections cannot be accepted.");
                    tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
                }
            }
        }
    }

    /// Closes all streams gracefully and waits until they are gone, at most for `patience`. What a server still sends
    /// before it closes its side is taken and committed as ever.
    pub async fn drain(&self, patience: Duration) {
        self.0.draining.send_replace(true);
        let all = self.0.context.connections_max;
        if timeout(patience, self.0.connections.acquire_many(all)).await.is_err() {
            warn!("Some streams of the server were still open after the time for draining.");
        }
    }

    /// Streams that have authenticated and are open, for `/status`.
    pub fn ready(&self) -> usize {
        self.0.ready.load(Ordering::Relaxed)
    }

    fn admit(&self, tcp: TcpStream, address: SocketAddr) {
        let connection = Arc::clone(&self.0.connections).try_acquire_owned();
        let unauthenticated = Arc::clone(&self.0.unauthenticated).try_acquire_owned();
        let (Ok(connection), Ok(unauthenticated)) = (connection, unauthenticated) else {
            warn!(%address, "Too many connections; this one is refused.");
            LEG_REFUSED.increment(());
            return;
        };
        let inner = Arc::clone(&self.0);
        let leg = LegId(inner.next_leg.fetch_add(1, Ordering::Relaxed));
        tokio::spawn(async move {
            let ended = Leg::new(&inner, leg, unauthenticated).live(tcp, address).await;
            let reason = match &ended {
                Ok(reason) => {
                    info!(leg = leg.0, %address, %reason, "The server's stream is closed.");
                    reason.as_label()
                }
                Err(error) => {
                    info!(leg = leg.0, %address, %error, "The server's stream broke.");
                    "io"
                }
            };
            LEG_CLOSED.increment((Role::Receiving, reason));
            drop(connection);
        });
    }
}

/// One connection.
struct Leg<'a> {
    inner: &'a Arc<Inner>,
    id: LegId,
    ledger: Arc<Ledger>,
    /// Given back with the first authentication.
    unauthenticated: Option<OwnedSemaphorePermit>,
    /// Taken from the stream, but the owner has no room yet. At most what one read holds.
    waiting: VecDeque<(mpsc::Sender<LegEvent>, LegEvent)>,
    /// Who got something.
    owners: Vec<mpsc::Sender<LegEvent>>,
    taken: u64,
    committed: u64,
    /// What was taken and is not committed: the numbers and sizes.
    uncommitted: VecDeque<(u64, usize)>,
    uncommitted_bytes: usize,
    verifications: JoinSet<(u64, Verdict)>,
    counted: Counted,
}

impl Drop for Leg<'_> {
    fn drop(&mut self) {
        lock(&self.inner.handle.0).remove(&self.id);
        if self.unauthenticated.is_none() {
            self.inner.ready.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl<'a> Leg<'a> {
    fn new(inner: &'a Arc<Inner>, id: LegId, unauthenticated: OwnedSemaphorePermit) -> Self {
        let ledger = Arc::new(Ledger::default());
        lock(&inner.handle.0).insert(id, Arc::clone(&ledger));
        Self {
            inner,
            id,
            ledger,
            unauthenticated: Some(unauthenticated),
            waiting: VecDeque::new(),
            owners: Vec::new(),
            taken: 0,
            committed: 0,
            uncommitted: VecDeque::new(),
            uncommitted_bytes: 0,
            verifications: JoinSet::new(),
            counted: Counted::new(Role::Receiving),
        }
    }

    async fn live(mut self, tcp: TcpStream, address: SocketAddr) -> io::Result<CloseReason> {
        let ended = self.connection(tcp, address).await;
        // What the stream took was accepted, so its owners get it, also after the stream's end.
        for (owner, event) in std::mem::take(&mut self.waiting) {
            let _ = owner.send(event).await;
        }
        for owner in &self.owners {
            let _ = owner.send(LegEvent::Gone { leg: self.id }).await;
        }
        ended
    }

    async fn connection(&mut self, tcp: TcpStream, address: SocketAddr) -> io::Result<CloseReason> {
        wire::configure(&tcp)?;
        let context = &self.inner.context;
        let mut first = [0];
        let peeked = timeout(FIRST_BYTE_MAX, tcp.peek(&mut first)).await;
        if peeked.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?? == 0 {
            return Ok(CloseReason::Eof);
        }
        let direct_tls = first[0] == TLS_HANDSHAKE;
        debug!(leg = self.id.0, %address, direct_tls, "The server opens a stream.");

        let seed = lane::seed().map_err(io::Error::other)?;
        let mut stream = ReceivingStream::new(context.site.get(), seed, context.clock.now(), direct_tls);
        let wire = if direct_tls {
            let (tls, certificate) = context.acceptor.accept(tcp, true).await.map_err(io::Error::other)?;
            stream.handle(Input::Secured(certificate), context.clock.now());
            Wire::secured(tls)
        } else {
            Wire::plain(tcp)
        };
        self.run(wire, stream).await
    }

    async fn run(&mut self, mut wire: Wire, mut stream: ReceivingStream) -> io::Result<CloseReason> {
        let clock = self.inner.context.clock;
        let ledger = Arc::clone(&self.ledger);
        let mut draining = self.inner.draining.subscribe();
        let mut drained = false;
        loop {
            if let Some(reason) = self.carry_out(&mut wire, &mut stream).await? {
                tokio::spawn(wire.close());
                return Ok(reason);
            }
            self.hand_over();

            let read = self.waiting.is_empty()
                && wire.waiting() < WAITING_BYTES_MAX
                && self.taken - self.committed < UNCOMMITTED_MAX
                && self.uncommitted_bytes < UNCOMMITTED_BYTES_MAX;
            tokio::select! {
                event = wire.next(read) => match event? {
                    WireEvent::Bytes(bytes) => stream.handle(Input::Bytes(bytes), clock.now()),
                    WireEvent::Eof => stream.handle(Input::Eof, clock.now()),
                    WireEvent::Flushed => (),
                },
                () = clock.sleep_until(stream.poll_timeout()) => stream.handle(Input::Timeout, clock.now()),
                () = ledger.changed.notified() => {
                    let upto = lock(&ledger.committed).upto.min(self.taken);
                    if upto > self.committed {
                        self.commit(upto);
                        stream.handle(Input::Committed { upto }, clock.now());
                    }
                }
                () = room(self.waiting.front()) => (),
                Some(answer) = self.verifications.join_next() => {
                    // A task that was cancelled or panicked is a question without an answer; the machine's own timer ends it.
                    if let Ok((request, verdict)) = answer {
                        stream.handle(Input::Verdict { request, verdict }, clock.now());
                    }
                }
                _ = draining.wait_for(|draining| *draining), if !drained => {
                    drained = true;
                    stream.handle(Input::Drain, clock.now());
                }
            }
        }
    }

    /// Does what the machine wants done, until it wants nothing.
    async fn carry_out(&mut self, wire: &mut Wire, stream: &mut ReceivingStream) -> io::Result<Option<CloseReason>> {
        let clock = self.inner.context.clock;
        while let Some(output) = stream.poll_output() {
            match output {
                Output::Send(bytes) => wire.send(&bytes),
                Output::StartTls => {
                    let certificate = self.start_tls(wire).await?;
                    stream.handle(Input::Secured(certificate), clock.now());
                }
                Output::Verify {
                    request,
                    pair,
                    stream_id,
                    key,
                } => {
                    if !self.verify(request, pair, stream_id, key) {
                        let verdict = Verdict::Error;
                        stream.handle(Input::Verdict { request, verdict }, clock.now());
                    }
                }
                Output::Authenticated { pair, how } => self.authenticated(&pair, how),
                Output::Stanza { n, pair, stanza } => self.take(n, pair, stanza)?,
                Output::Close(reason) => return Ok(Some(reason)),
            }
        }
        Ok(None)
    }

    async fn start_tls(&self, wire: &mut Wire) -> io::Result<Option<Certificate>> {
        timeout(FLUSH_MAX, wire.flush())
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        let accepted = self.inner.context.acceptor.accept(wire.take_plain()?, false).await;
        let (tls, certificate) = accepted.map_err(io::Error::other)?;
        wire.put_back(tls);
        Ok(certificate)
    }

    /// Whether the question is on its way.
    fn verify(&mut self, request: u64, pair: DomainPair, stream_id: String, key: String) -> bool {
        let permit = Arc::clone(&self.inner.verifications).try_acquire_owned();
        let (Ok(permit), true) = (permit, self.verifications.len() < LEG_VERIFICATIONS_MAX) else {
            warn!(leg = self.id.0, %pair, "Too many dialback keys to be asked about.");
            return false;
        };
        let context = Arc::clone(&self.inner.context);
        self.verifications.spawn(async move {
            let _permit = permit;
            (request, lane::verify(&context, pair, request, stream_id, key).await)
        });
        true
    }

    fn authenticated(&mut self, pair: &DomainPair, how: Method) {
        if self.unauthenticated.take().is_some() {
            self.counted.ready();
            self.inner.ready.fetch_add(1, Ordering::Relaxed);
        }
        let method = match how {
            Method::External => "external",
            Method::Dialback => "dialback",
        };
        info!(leg = self.id.0, %pair, method, "The server's stream is authenticated.");
    }

    fn take(&mut self, n: u64, pair: DomainPair, stanza: Stanza) -> io::Result<()> {
        let Some(owner) = self.inner.owner(&pair.far) else {
            // The machine lets only configured far domains through. Its peer was removed since the stream was opened.
            info!(leg = self.id.0, %pair, "No peer has this far domain any more; its stream is cut.");
            return Err(io::Error::other("no owner"));
        };
        self.taken = n;
        self.uncommitted.push_back((n, stanza.bytes().len()));
        self.uncommitted_bytes += stanza.bytes().len();
        if self.inner.context.receipts.take(&pair, &stanza) {
            self.inner.handle.committed(self.id, n);
            return Ok(());
        }
        if !self.owners.iter().any(|known| known.same_channel(&owner)) {
            self.owners.push(owner.clone());
        }
        let leg = self.id;
        self.waiting
            .push_back((owner, LegEvent::Stanza { leg, n, pair, stanza }));
        Ok(())
    }

    /// All stanzas up to this one are on disk or refused.
    fn commit(&mut self, upto: u64) {
        self.committed = upto;
        while let Some(&(n, bytes)) = self.uncommitted.front()
            && n <= upto
        {
            self.uncommitted.pop_front();
            self.uncommitted_bytes -= bytes;
        }
    }

    /// Gives the owners what they have room for, in order.
    fn hand_over(&mut self) {
        while let Some((owner, event)) = self.waiting.pop_front() {
            match owner.try_send(event) {
                Ok(()) => (),
                Err(mpsc::error::TrySendError::Full(event)) => {
                    self.waiting.push_front((owner, event));
                    return;
                }
                // Its owner is gone: the process is ending. It was not committed, so nobody was told that it is safe.
                Err(mpsc::error::TrySendError::Closed(_)) => (),
            }
        }
    }
}

/// Until the first that waits could be handed over; for ever if none waits.
async fn room(first: Option<&(mpsc::Sender<LegEvent>, LegEvent)>) {
    match first {
        // The permit goes back at once; this task is the one that takes it again.
        Some((owner, _)) => drop(owner.reserve().await),
        None => pending().await,
    }
}

/// A holder that panicked leaves numbers behind, not half-built structures.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Several owners commit one stream's stanzas in any order; what may be acknowledged is the part without a gap.
    #[test]
    fn commits_count_up_to_the_first_gap() {
        let mut prefix = Prefix::default();
        let after: Vec<_> = [2, 4, 1, 1, 2, 5, 3]
            .into_iter()
            .map(|n| {
                prefix.insert(n);
                prefix.upto
            })
            .collect();
        assert_eq!(after, [0, 0, 2, 2, 2, 2, 5]);
        assert!(prefix.early.is_empty());
    }
}
