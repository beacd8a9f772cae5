//! The shell around the link: TLS connections to peers, dialled or accepted, and how one takes over from another.
//!
//! [`start`] listens for all peers at once and gives a [`PeerLink`] for each. Its owner (the peer's relay) says when it wants a
//! connection, takes [`LinkEvent`]s, and runs a [`LinkSession`](crate::link::session::LinkSession) over each
//! [`LinkConnection`]. While a session doubts its path, the owner may ask for another connection beside it; TCP's own retries
//! back off to minutes, so it is a new connection that notices first that the path is back. [`survivor`] says which of
//! two connections stays.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
    time,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{self, CertificateError},
};
use tracing::{debug, info, warn};

use crate::io::keys::{PrivateKey, PublicKey};

mod connection;
mod dial;
mod kernel;
mod tls;

pub use connection::{LinkConnection, LinkInfo, LinkReader, LinkWriter, StatsHandle};
pub use dial::DialError;
pub use kernel::TcpStats;

/// Connections that have not proven a key yet. Each costs about 20 KB, and an open file.
const UNPROVEN_MAX: usize = 64;
/// Addresses whose refusal was logged; beyond that they are only counted.
const LOGGED_MAX: usize = 256;
/// Events that wait for a peer's relay.
const EVENTS_MAX: usize = 16;
/// After an error of `accept`, which is most often a lack of open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// How patient the shell is.
#[derive(Clone, Copy, Debug)]
pub struct LinkTimes {
    /// Between attempts to dial: at first, …
    pub retry_min: Duration,
    /// … and after some doublings. An attempt without an answer costs 60 bytes and the kernel's repeats; the peer is reached at
    /// most this long after the path is back.
    pub retry_max: Duration,
    /// How long one attempt waits for TCP. Longer than the longest round trip.
    pub connect_timeout: Duration,
    /// How long TLS may take on either end; on a path that connects slowly, longer.
    pub handshake_timeout: Duration,
    /// Connections of both ends that come up within this time of each other count as dialled at once.
    pub at_once: Duration,
}

impl Default for LinkTimes {
    fn default() -> Self {
        Self {
            retry_min: Duration::from_secs(1),
            retry_max: Duration::from_secs(3),
            connect_timeout: Duration::from_secs(15),
            handshake_timeout: Duration::from_secs(15),
            at_once: Duration::from_secs(10),
        }
    }
}

#[derive(Clone, Debug)]
pub struct PeerConfig {
    pub name: String,
    pub public_key: PublicKey,
    /// `host:port`; without it we wait for the peer to dial.
    pub connect: Option<String>,
}

#[derive(Debug)]
pub enum LinkEvent {
    /// A connection to the peer, authenticated by its key. If we dialled, the peer may still refuse ours, see
    /// [`LinkReader::read`]: its first bytes prove that it did not.
    Up(Box<LinkConnection>),
    DialFailed(DialError),
}

/// What goes on at the edge of the link, since the start.
#[derive(Debug, Default)]
pub struct LinkCounters {
    pub dial_attempts: Counter,
    pub dial_failures: Counter,
    pub dialled: Counter,
    pub accepted: Counter,
    pub refused_unknown_key: Counter,
    /// Broken off, too slow, or not TLS at all.
    pub refused_handshake: Counter,
    /// Too many at once that had not proven a key.
    pub refused_busy: Counter,
}

#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Keeps the listener; when it is dropped nothing more is accepted.
#[derive(Debug)]
pub struct LinkListener {
    address: Option<SocketAddr>,
    key: PrivateKey,
    times: LinkTimes,
    counters: Arc<LinkCounters>,
    guests: Arc<RwLock<Guests>>,
    _tasks: JoinSet<()>,
}

/// Who may come in.
#[derive(Debug)]
struct Guests {
    /// Asks for one of the keys below.
    tls: Arc<rustls::ServerConfig>,
    inlets: BTreeMap<PublicKey, mpsc::Sender<LinkEvent>>,
}

impl Guests {
    fn new(key: &PrivateKey, inlets: BTreeMap<PublicKey, mpsc::Sender<LinkEvent>>) -> Result<Self, rustls::Error> {
        let tls = Arc::new(tls::server_config(key, inlets.keys().copied().collect())?);
        Ok(Self { tls, inlets })
    }
}

impl LinkListener {
    /// From now on this peer may come in, and its link is there to be used.
    pub fn add(&self, peer: &PeerConfig) -> Result<PeerLink, LinkStartError> {
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let mut tasks = JoinSet::new();
        let wanted = match &peer.connect {
            Some(target) => {
                let dialler = dial::Dialler {
                    target: target.clone(),
                    peer: peer.public_key,
                    ours: self.key.public(),
                    tls: Arc::new(tls::client_config(&self.key, peer.public_key)?),
                    times: self.times,
                    counters: self.counters.clone(),
                    events: events.clone(),
                    addresses: Vec::new(),
                };
                let wanted = watch::Sender::new(false);
                tasks.spawn(keep_dialling(dialler, wanted.clone()));
                Some(wanted)
            }
            None => None,
        };
        let mut guests = self.guests.write().unwrap_or_else(PoisonError::into_inner);
        let mut inlets = guests.inlets.clone();
        inlets.insert(peer.public_key, events);
        *guests = Guests::new(&self.key, inlets)?;
        Ok(PeerLink {
            name: peer.name.clone(),
            events: receiver,
            wanted,
            _tasks: tasks,
        })
    }

    /// Who has this key is a stranger from now on. The connection that it has is its link's to close.
    pub fn remove(&self, peer: &PublicKey) -> Result<(), LinkStartError> {
        let mut guests = self.guests.write().unwrap_or_else(PoisonError::into_inner);
        let mut inlets = guests.inlets.clone();
        inlets.remove(peer);
        *guests = Guests::new(&self.key, inlets)?;
        Ok(())
    }

    /// Where we listen, if we do.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    pub fn counters(&self) -> &Arc<LinkCounters> {
        &self.counters
    }
}

/// One peer's way in and out. When it is dropped its dialling ends.
#[derive(Debug)]
pub struct PeerLink {
    name: String,
    events: mpsc::Receiver<LinkEvent>,
    /// Whether a connection is wanted; `None` if we cannot dial.
    wanted: Option<watch::Sender<bool>>,
    _tasks: JoinSet<()>,
}

impl PeerLink {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Asks for a connection, now. Until one is up the peer is dialled again and again; then not, until this is called anew.
    pub fn dial(&self) {
        self.want(true);
    }

    /// Takes it back: what was in doubt is well again.
    pub fn rest(&self) {
        self.want(false);
    }

    pub fn can_dial(&self) -> bool {
        self.wanted.is_some()
    }

    /// The next event. Safe to cancel.
    pub async fn next_event(&mut self) -> LinkEvent {
        match self.events.recv().await {
            Some(event) => event,
            // Neither a listener nor a dialler is left; nothing will ever happen.
            None => std::future::pending().await,
        }
    }

    fn want(&self, dial: bool) {
        if let Some(wanted) = &self.wanted {
            wanted.send_replace(dial);
        }
    }
}

/// Which of two connections with one peer stays.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Survivor {
    Old,
    New,
}

/// Both ends come to the same answer, up to the time that a connection takes to come up.
///
/// A new connection means that its dialler has given up the old one, so it stays; unless both were dialled at once, one by each
/// end: then the one that was dialled by the end with the smaller key stays.
pub fn survivor(old: &LinkInfo, old_in_doubt: bool, new: &LinkInfo, times: &LinkTimes) -> Survivor {
    let at_once = new.up_since.saturating_duration_since(old.up_since) < times.at_once;
    if at_once && !old_in_doubt && old.dialled != new.dialled && old.dialled_by_smaller {
        Survivor::Old
    } else {
        Survivor::New
    }
}

/// Listens, if there is an address to listen on, and makes each peer's link. Nothing is dialled before it is asked for.
pub async fn start(
    listen: Option<SocketAddr>,
    key: &PrivateKey,
    peers: &[PeerConfig],
    times: LinkTimes,
) -> Result<(LinkListener, Vec<PeerLink>), LinkStartError> {
    let counters = Arc::new(LinkCounters::default());
    let guests = Arc::new(RwLock::new(Guests::new(key, BTreeMap::new())?));
    let mut tasks = JoinSet::new();
    let mut address = None;
    if let Some(listen) = listen {
        let listener = bind(listen).map_err(|source| LinkStartError::Listen {
            address: listen,
            source,
        })?;
        address = listener.local_addr().ok();
        let acceptor = Acceptor {
            guests: guests.clone(),
            ours: key.public(),
            times,
            counters: counters.clone(),
            logged: Mutex::default(),
        };
        tasks.spawn(Arc::new(acceptor).run(listener));
    }
    let listener = LinkListener {
        address,
        key: key.clone(),
        times,
        counters,
        guests,
        _tasks: tasks,
    };
    let links = peers.iter().map(|peer| listener.add(peer)).collect::<Result<_, _>>()?;
    Ok((listener, links))
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkStartError {
    #[error("cannot listen for peers on {address}: {source}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("cannot set up TLS for the link: {0}")]
    Tls(#[from] rustls::Error),
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4(),
        SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6(),
    }?;
    // A restart must not wait for old connections to be forgotten.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(UNPROVEN_MAX as u32)
}

async fn keep_dialling(mut dialler: dial::Dialler, wanted: watch::Sender<bool>) {
    let mut watch = wanted.subscribe();
    loop {
        if watch.wait_for(|wanted| *wanted).await.is_err() {
            return;
        }
        let connection = tokio::select! {
            connection = dialler.until_up() => Some(connection),
            _ = watch.wait_for(|wanted| !wanted) => None,
        };
        if let Some(connection) = connection {
            wanted.send_replace(false);
            if dialler.events.send(LinkEvent::Up(Box::new(connection))).await.is_err() {
                return;
            }
        }
    }
}

struct Acceptor {
    guests: Arc<RwLock<Guests>>,
    ours: PublicKey,
    times: LinkTimes,
    counters: Arc<LinkCounters>,
    logged: Mutex<BTreeSet<IpAddr>>,
}

impl Acceptor {
    async fn run(self: Arc<Self>, listener: TcpListener) {
        let unproven = Arc::new(Semaphore::new(UNPROVEN_MAX));
        let mut handshakes = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, address)) => {
                        let Ok(permit) = unproven.clone().try_acquire_owned() else {
                            self.counters.refused_busy.add();
                            continue;
                        };
                        let this = self.clone();
                        handshakes.spawn(async move {
                            this.shake_hands(stream, address).await;
                            drop(permit);
                        });
                    }
                    Err(error) => {
                        warn!(%error, "Cannot accept a connection of a peer.");
                        time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(_) = handshakes.join_next() => {}
            }
        }
    }

    fn guests(&self) -> RwLockReadGuard<'_, Guests> {
        self.guests.read().unwrap_or_else(PoisonError::into_inner)
    }

    async fn shake_hands(&self, stream: TcpStream, address: SocketAddr) {
        if kernel::prepare(&stream).is_err() {
            return;
        }
        let stream = connection::SharedTcp(Arc::new(stream));
        let handshake = TlsAcceptor::from(self.guests().tls.clone()).accept(stream);
        // Whoever dials waits longer if its path was slow to connect; we cannot know, so we wait long.
        let patience = self.times.handshake_timeout * 2;
        let done = time::timeout(patience, handshake)
            .await
            .unwrap_or(Err(io::ErrorKind::TimedOut.into()));
        let tls = match done {
            Ok(tls) => tls,
            Err(error) => return self.refuse(address, &error),
        };
        let proven = tls::proven_key(tls.get_ref().1.peer_certificates());
        let inlet = |key: PublicKey| Some((key, self.guests().inlets.get(&key)?.clone()));
        let Some((peer, events)) = proven.and_then(inlet) else {
            return;
        };
        let info = LinkInfo {
            peer,
            address,
            dialled: false,
            dialled_by_smaller: peer < self.ours,
            up_since: Instant::now(),
        };
        self.counters.accepted.add();
        // A relay that takes no events has more than enough connections to choose from.
        if events
            .try_send(LinkEvent::Up(Box::new(LinkConnection::new(info, tls.into()))))
            .is_err()
        {
            debug!(%address, "A connection of a peer found nobody to take it.");
        }
    }

    fn refuse(&self, address: SocketAddr, error: &io::Error) {
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        let unknown = matches!(
            tls,
            Some(rustls::Error::InvalidCertificate(
                CertificateError::ApplicationVerificationFailure
            ))
        );
        if !unknown {
            self.counters.refused_handshake.add();
            debug!(%address, %error, "A handshake on the link failed.");
            return;
        }
        self.counters.refused_unknown_key.add();
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.len() < LOGGED_MAX && logged.insert(address.ip()) {
            info!(%address, "Refused a connection: its key belongs to no configured peer. Said once per address.");
        }
    }
}

#[cfg(test)]
mod tests;
