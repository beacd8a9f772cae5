//! `narrows run`: puts the parts together, and takes them apart in good order.
//!
//! Order matters. The stores open first: without them nothing may be accepted. Then the owners of the peers, then the
//! listener for our server, because a server that finds a far domain's door shut throws that domain's users out of its rooms.
//! On SIGTERM the legs close first and what they brought goes to disk, then the lanes and the link close, then the stores.
//!
//! On SIGHUP, or when the admin port is asked to, the configuration is read again. All that can fail is done before anything changes,
//! and a connection that is open stays open, unless its peer has been removed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, watch},
    task::{JoinError, JoinSet},
};
use tracing::{error, info, warn};

use super::{
    Exit, keys,
    log::Leveller,
    page::{self, History, page},
    reload::{Outcome, Plan},
    sockets::Inherited,
    status::{self, EventStatus, PeerStatus, QueueStatus, RoomStatus, RoomsStatus, Saved, Status, Traffic},
};
use crate::{
    config::{self, Compression, Config, Identity, Management},
    io::{
        admin::{self, Admin},
        ca::{Authority, AuthorityError},
        clock::Clock,
        dns::{Location, Resolver},
        keys::{KeyError, PrivateKey},
        lane::{CurrentSite, LegContext},
        legs::{self, LegHandle, Legs, Routes},
        link::{self, LinkCounters, LinkListener, LinkStartError, LinkTimes, PeerConfig, PeerLink},
        peer::{self, Peer, Report},
        receipts::Receipts,
        store::{self, StoreError},
        tls::{self, Acceptor, ChainAndKey, Connector, Roots, ServerTrust, TlsError},
        trace::{Show, Taps},
        watch::{ClassAges, Event},
    },
    link::session::SessionConfig,
    metrics,
    queue::class::Class,
    relay::{self, Relay, Settings, cost::Cost},
    stanza::Domain,
    stream::{Site, dialback::Secret},
};

/// For our server to close its streams after we have closed ours.
const LEGS_DRAIN_MAX: Duration = Duration::from_secs(5);

/// How often counters that others keep go to the metrics.
const COUNT_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error("{path}: {error}")]
    File { path: PathBuf, error: io::Error },
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{what} cannot listen on {address}: {error}")]
    Bind {
        what: &'static str,
        address: String,
        error: io::Error,
    },
    #[error(transparent)]
    Link(#[from] LinkStartError),
    #[error("the system gives no random numbers: {0}")]
    Random(getrandom::Error),
    #[error("{0}")]
    System(String),
}

impl RunError {
    fn exit(&self) -> Exit {
        match self {
            Self::File { .. } | Self::Authority(_) | Self::Key(_) | Self::Tls(_) => Exit::Config,
            Self::Store(_) => Exit::Store,
            Self::Bind { .. } | Self::Link(LinkStartError::Listen { .. }) => Exit::Bind,
            Self::Link(_) | Self::Random(_) | Self::System(_) => Exit::Failed,
        }
    }
}

/// Wishes for a reload that wait at once: one is under way, and the next one does for all.
const RELOADS_MAX: usize = 2;

/// Runs until SIGTERM or SIGINT. `file` is what `config` was read from.
pub fn run(file: PathBuf, config: Config, leveller: Leveller) -> Exit {
    let inherited = Inherited::take_all();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            error!(%error, "No threads can be started.");
            return Exit::Failed;
        }
    };
    match runtime.block_on(assemble(file, config, leveller, inherited)) {
        Ok(()) => {
            info!("Stopped.");
            Exit::Ok
        }
        Err(error) => {
            error!("{error}");
            error.exit()
        }
    }
}

async fn assemble(file: PathBuf, config: Config, leveller: Leveller, mut inherited: Inherited) -> Result<(), RunError> {
    let started = Instant::now();
    let clock = Clock::start();
    let metrics = metrics::install(config.peers.iter().map(|peer| peer.name.as_str()))
        .map_err(|error| RunError::System(error.to_string()))?;
    // From READY on a signal is expected to be obeyed.
    let mut signals = Signals::new()?;
    let admin_listener = bind("the admin port", config.admin.listen.0).await?;
    let mut background = JoinSet::new();

    let (identity, authority) = identity(&config)?;
    let leg_context = Arc::new(leg_context(&config, clock, Arc::clone(&identity))?);
    let leg_handle = LegHandle::default();
    let (key, warning) = PrivateKey::load(&config.link.private_key)?;
    if let Some(warning) = warning {
        warn!("{warning}");
    }
    let alive = Arc::new(AtomicBool::new(true));
    let mut opened = Vec::new();
    for peer in &config.peers {
        opened.push(open_store(&config, peer)?);
    }
    let times = link_times(&config);
    let peers: Vec<PeerConfig> = config.peers.iter().map(peer_config).collect::<Result<_, _>>()?;
    let listen = config.link.listen.as_ref().map(|listen| listen.0);
    let (link_listener, links) = link::start(listen, &key, &peers, times).await?;
    background.spawn(count_refusals(Arc::clone(link_listener.counters())));

    let mut running = Running {
        file,
        leveller,
        clock,
        identity,
        renewal: JoinSet::new(),
        legs: Legs::new(Arc::clone(&leg_context), Routes::default(), leg_handle.clone()),
        leg_context,
        leg_handle,
        link_listener,
        times,
        owners: JoinSet::new(),
        reins: BTreeMap::new(),
        leaving: BTreeSet::new(),
        reports: Reports::default(),
        taps: Taps::default(),
        class_ages: ClassAges::default(),
        config,
    };
    running.tell_limits();
    running.keep_fresh(authority);
    for ((peer, opened), link) in running.config.peers.clone().iter().zip(opened).zip(links) {
        let settings = settings(&running.config, peer);
        running.start(peer, settings, opened, link);
    }

    for address in &running.config.legs.listen {
        let listener = legs_listener(address.0, &mut inherited).await?;
        let legs = running.legs.clone();
        background.spawn(async move { legs.serve(listener).await });
    }
    drop(inherited);
    let status = status_of(&running, started);
    let history = Arc::new(Mutex::new(History::default()));
    background.spawn(keep_history(Arc::clone(&status), Arc::clone(&history)));
    let status_too = Arc::clone(&status);
    let (healthy, ready) = (Arc::clone(&alive), Arc::clone(&alive));
    let (reload, wishes) = mpsc::channel(RELOADS_MAX);
    let admin = Admin {
        metrics,
        healthy: Arc::new(move || says(&healthy)),
        ready: Arc::new(move || says(&ready)),
        page: Arc::new(move || page(&status_too(), &lock(&history))),
        status: Arc::new(move || serde_json::to_value(status()).unwrap_or_default()),
        reload,
        taps: running.taps.clone(),
        show: show(&running.config),
    };
    background.spawn(async move {
        if let Err(error) = admin::serve(admin_listener, admin).await {
            error!(%error, "The admin port is closed.");
        }
    });

    let config = &running.config;
    info!(site = %config.site, admin = %config.admin.listen, peers = config.peers.len(), "Started.");
    notify(sd_notify::NotifyState::Ready);
    let failed = running.last(&mut signals, wishes).await;
    notify(sd_notify::NotifyState::Stopping);
    if let Some(ended) = failed {
        alive.store(false, Ordering::Relaxed);
        // Nothing may be accepted without the store. A supervisor starts us again, and the error says what to do.
        return match ended {
            Ok((_, Ok(()))) => Err(RunError::System("the owner of a peer ended by itself".to_owned())),
            Ok((_, Err(error))) => Err(error.into()),
            Err(error) => Err(RunError::System(format!("the owner of a peer failed: {error}"))),
        };
    }
    info!("Stopping.");
    running.stop().await
}

/// How the owner of a peer has ended.
type Ended = Result<(config::Name, Result<(), StoreError>), JoinError>;

/// All that lives until the process ends, and what is needed to change it.
struct Running {
    file: PathBuf,
    /// What is in force.
    config: Config,
    leveller: Leveller,
    clock: Clock,
    identity: Arc<tls::Identity>,
    /// The task that keeps the far domains' certificate fresh, if it is ours to make.
    renewal: JoinSet<()>,
    leg_context: Arc<LegContext>,
    leg_handle: LegHandle,
    legs: Legs,
    link_listener: LinkListener,
    times: LinkTimes,
    owners: JoinSet<(config::Name, Result<(), StoreError>)>,
    reins: BTreeMap<config::Name, Rein>,
    /// Peers that were removed and whose owners have not ended yet.
    leaving: BTreeSet<config::Name>,
    reports: Reports,
    taps: Taps,
    class_ages: ClassAges,
}

/// By which an owner is led.
struct Rein {
    settings: watch::Sender<Settings>,
    draining: watch::Sender<bool>,
}

impl Running {
    /// Starts the owner of a peer.
    fn start(&mut self, peer: &config::Peer, settings: Settings, opened: Opened, link: PeerLink) {
        let (events, legs) = mpsc::channel(legs::EVENTS_MAX);
        self.legs.add_owner(domains(&peer.domains), &events);
        let (report, reported) = watch::channel(Report::default());
        lock(&self.reports).push((peer.clone(), reported));
        let rein = Rein {
            settings: watch::Sender::new(settings.clone()),
            draining: watch::Sender::new(false),
        };
        let owner = peer::run(Peer {
            name: peer.name.to_string(),
            relay: Relay::new(settings, &opened.opening, self.clock.now()),
            clock: self.clock,
            store: opened.store,
            answers: opened.answers,
            legs,
            leg_handle: self.leg_handle.clone(),
            leg_context: Arc::clone(&self.leg_context),
            link,
            link_times: self.times,
            report,
            settings: rein.settings.subscribe(),
            watchers: self.taps.watchers(),
            class_ages: self.class_ages.join(),
            room_metrics: self.config.admin.room_metrics.into(),
            draining: rein.draining.subscribe(),
        });
        self.reins.insert(peer.name.clone(), rein);
        let name = peer.name.clone();
        self.owners.spawn(async move { (name, owner.await) });
    }

    /// Lets a peer go: nothing more is taken for it, and its owner puts down what it has. Its database stays.
    fn dismiss(&mut self, peer: &config::Peer) -> Result<(), RunError> {
        self.link_listener.remove(&peer_config(peer)?.public_key)?;
        self.legs.remove_owner(&domains(&peer.domains));
        lock(&self.reports).retain(|(other, _)| other.name != peer.name);
        if let Some(rein) = self.reins.remove(&peer.name) {
            rein.draining.send_replace(true);
            self.leaving.insert(peer.name.clone());
        }
        Ok(())
    }

    /// Until a signal ends it, or an owner fails.
    async fn last(&mut self, signals: &mut Signals, mut wishes: mpsc::Receiver<admin::Reload>) -> Option<Ended> {
        let Signals {
            terminate,
            interrupt,
            hangup,
        } = signals;
        loop {
            tokio::select! {
                _ = terminate.recv() => return None,
                _ = interrupt.recv() => return None,
                _ = hangup.recv() => drop(self.reload()),
                Some(wish) = wishes.recv() => {
                    let outcome = self.reload();
                    let json = serde_json::to_value(&outcome).unwrap_or_default();
                    // Whoever asked may have gone; the log has it too.
                    let _ = wish.send(if outcome.errors.is_empty() { Ok(json) } else { Err(json) });
                }
                Some(ended) = self.owners.join_next() => match ended {
                    Ok((name, result)) if self.leaving.remove(&name) => {
                        metrics::LINK_UP.set(name.as_str(), 0.0);
                        match result {
                            Ok(()) => info!(peer = %name, "The peer is gone. What waited for it is still in its database."),
                            Err(error) => error!(peer = %name, %error, "The database of a peer that was removed failed."),
                        }
                    }
                    ended => return Some(ended),
                },
            }
        }
    }

    /// Reads the configuration again. What is wrong with it, or with what it names, changes nothing.
    fn reload(&mut self) -> Outcome {
        let outcome = match Config::load_with(&self.file, keys::own_key) {
            Err(errors) => Outcome::refused(errors),
            Ok((new, warnings)) => match self.adopt(Plan::new(&self.config, &new)) {
                Err(error) => Outcome::refused([error]),
                Ok(mut outcome) => {
                    outcome.warnings.extend(warnings.iter().map(ToString::to_string));
                    outcome
                }
            },
        };
        for text in &outcome.errors {
            error!(
                "The configuration is not taken, and nothing has changed: {}",
                first_line(text)
            );
        }
        for text in &outcome.warnings {
            warn!("{}", first_line(text));
        }
        if outcome.errors.is_empty() {
            let list = |of: &[String]| of.join(", ");
            info!(
                applied = list(&outcome.applied),
                next_connection = list(&outcome.next_connection),
                restart = list(&outcome.restart),
                "The configuration was read again."
            );
        }
        outcome
    }

    fn adopt(&mut self, mut plan: Plan) -> Result<Outcome, RunError> {
        let Plan {
            effective,
            added,
            removed,
            ..
        } = &plan;
        // What can fail comes first.
        if let Some(peer) = added.iter().find(|peer| self.leaving.contains(&peer.name)) {
            let text = format!("the peer {} has not quite gone yet: try again in a moment", peer.name);
            return Err(RunError::System(text));
        }
        let renewed = match effective.identity() {
            Identity::Ca(directory) if !(added.is_empty() && removed.is_empty()) => {
                let authority = Authority::load(&directory)?;
                let material = authority.issue(&far_domains(effective))?;
                Some((authority, material))
            }
            Identity::Ca(_) | Identity::Files { .. } => None,
        };
        let keys: Vec<PeerConfig> = added.iter().map(peer_config).collect::<Result<_, _>>()?;
        let opened: Vec<Opened> = added
            .iter()
            .map(|peer| open_store(effective, peer))
            .collect::<Result<_, _>>()?;
        let links: Vec<PeerLink> = keys
            .iter()
            .map(|key| self.link_listener.add(key))
            .collect::<Result<_, _>>()?;

        if let Some((authority, material)) = renewed {
            self.identity.replace(material)?;
            self.config.peers.clone_from(&effective.peers);
            self.keep_fresh(Some(authority));
        }
        self.leg_context.site.replace(Site {
            far: far_domains(effective).into_iter().collect(),
            ..(*self.leg_context.site.get()).clone()
        });
        for peer in removed {
            self.dismiss(peer)?;
        }
        metrics::install(added.iter().map(|peer| peer.name.as_str()))
            .map_err(|error| RunError::System(error.to_string()))?;
        for ((peer, opened), link) in added.iter().zip(opened).zip(links) {
            self.start(peer, settings(effective, peer), opened, link);
        }
        for peer in &effective.peers {
            if let Some(rein) = self.reins.get(&peer.name) {
                rein.settings.send_replace(settings(effective, peer));
            }
        }
        if effective.log.level != self.config.log.level && !self.leveller.set(effective.log.level) {
            plan.outcome
                .warnings
                .push("log.level: RUST_LOG overrides it".to_owned());
        }
        self.config = plan.effective;
        self.tell_limits();
        Ok(plan.outcome)
    }

    /// From now on the authority renews the certificate for the far domains that there are now.
    fn keep_fresh(&mut self, authority: Option<Authority>) {
        self.renewal.abort_all();
        if let Some(authority) = authority {
            let (far, identity) = (far_domains(&self.config), Arc::clone(&self.identity));
            self.renewal.spawn(authority.renew(far, identity));
        }
    }

    fn tell_limits(&self) {
        metrics::QUEUE_LIMIT_BYTES.set((), self.config.queue.bytes_max.0 as f64);
        metrics::QUEUE_LIMIT_ENTRIES.set((), self.config.queue.entries_max as f64);
    }

    async fn stop(mut self) -> Result<(), RunError> {
        self.legs.drain(LEGS_DRAIN_MAX).await;
        for rein in self.reins.values() {
            rein.draining.send_replace(true);
        }
        let mut result = Ok(());
        while let Some(ended) = self.owners.join_next().await {
            match ended {
                Ok((_, Ok(()))) => {}
                Ok((_, Err(error))) => result = Err(error.into()),
                Err(error) => result = Err(RunError::System(format!("the owner of a peer failed: {error}"))),
            }
        }
        result
    }
}

/// An excerpt is for a terminal; a log wants one line.
fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Follows what the link's listener counts.
async fn count_refusals(counters: Arc<LinkCounters>) {
    let mut tick = tokio::time::interval(COUNT_EVERY);
    loop {
        tick.tick().await;
        for (reason, counter) in [
            ("unknown_key", &counters.refused_unknown_key),
            ("handshake", &counters.refused_handshake),
            ("busy", &counters.refused_busy),
        ] {
            metrics::LINK_REFUSED.follow(reason, counter.value());
        }
    }
}

/// Notes how all stands, for the page's chart.
async fn keep_history(status: Arc<dyn Fn() -> Status + Send + Sync>, history: Arc<Mutex<History>>) {
    let mut tick = tokio::time::interval(page::STEP);
    loop {
        tick.tick().await;
        let status = status();
        lock(&history).note(&status);
    }
}

fn says(alive: &AtomicBool) -> Result<(), String> {
    if alive.load(Ordering::Relaxed) {
        Ok(())
    } else {
        Err("a store has failed".to_owned())
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> Result<Self, RunError> {
        let on = |kind| signal(kind).map_err(|error| RunError::System(format!("signals cannot be received: {error}")));
        Ok(Self {
            terminate: on(SignalKind::terminate())?,
            interrupt: on(SignalKind::interrupt())?,
            hangup: on(SignalKind::hangup())?,
        })
    }
}

async fn legs_listener(address: std::net::SocketAddr, inherited: &mut Inherited) -> Result<TcpListener, RunError> {
    const WHAT: &str = "the listener for the local server";
    match inherited.take(address) {
        Ok(Some(listener)) => Ok(listener),
        Ok(None) => bind(WHAT, address).await,
        Err(error) => Err(unbound(WHAT, address, error)),
    }
}

async fn bind(what: &'static str, address: std::net::SocketAddr) -> Result<TcpListener, RunError> {
    TcpListener::bind(address)
        .await
        .map_err(|error| unbound(what, address, error))
}

fn unbound(what: &'static str, address: std::net::SocketAddr, error: io::Error) -> RunError {
    RunError::Bind {
        what,
        address: address.to_string(),
        error,
    }
}

fn notify(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        warn!(%error, "systemd cannot be told.");
    }
}

fn domains(list: &[config::Domain]) -> Vec<Domain> {
    list.iter().map(|domain| domain.0.clone()).collect()
}

fn far_domains(config: &Config) -> Vec<Domain> {
    config.peers.iter().flat_map(|peer| domains(&peer.domains)).collect()
}

fn leg_context(config: &Config, clock: Clock, identity: Arc<tls::Identity>) -> Result<LegContext, RunError> {
    let roots = Arc::new(match &config.legs.trust {
        Some(path) => Roots::load(path)?,
        None => Roots::system(),
    });
    Ok(LegContext {
        site: CurrentSite::new(site(config)?),
        clock,
        acceptor: Acceptor::new(Arc::clone(&identity), Arc::clone(&roots))?,
        connector: Connector::new(identity, roots, trust(config))?,
        resolver: Resolver::default(),
        receipts: Receipts::default(),
        server: server(config),
        connections_max: config.legs.connections_max,
    })
}

fn trust(config: &Config) -> ServerTrust {
    match config.legs.verify_server {
        true => ServerTrust::Verified,
        false => ServerTrust::Any,
    }
}

fn server(config: &Config) -> Location {
    match &config.local.server {
        Some(server) => Location::Fixed {
            host: server.host.clone(),
            port: server.port,
        },
        None => Location::LookUp,
    }
}

fn site(config: &Config) -> Result<Site, RunError> {
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).map_err(RunError::Random)?;
    Ok(Site {
        local: domains(&config.local.domains).into_iter().collect(),
        far: far_domains(config).into_iter().collect(),
        require_tls: config.legs.require_tls,
        offer_management: config.legs.management == Management::On,
        use_management: config.legs.management != Management::Off,
        before_authentication: config.legs.limits.before_authentication(),
        after_authentication: config.legs.limits.after_authentication(),
        secret: Secret::new(secret),
    })
}

/// The certificate for the far domains, and the authority that made it, if it is ours.
fn identity(config: &Config) -> Result<(Arc<tls::Identity>, Option<Authority>), RunError> {
    match config.identity() {
        Identity::Files { chain, key } => Ok((tls::Identity::new(ChainAndKey::load(&chain, &key)?)?, None)),
        Identity::Ca(directory) => {
            let authority = Authority::load(&directory)?;
            let identity = tls::Identity::new(authority.issue(&far_domains(config))?)?;
            Ok((identity, Some(authority)))
        }
    }
}

fn peer_config(peer: &config::Peer) -> Result<PeerConfig, RunError> {
    Ok(PeerConfig {
        name: peer.name.to_string(),
        public_key: peer
            .public_key
            .to_string()
            .parse()
            .map_err(|error| RunError::System(format!("the public key of {}: {error}", peer.name)))?,
        connect: peer.connect.as_ref().map(ToString::to_string),
    })
}

struct Opened {
    store: store::Store,
    opening: crate::queue::journal::Opening,
    answers: mpsc::UnboundedReceiver<store::Answer>,
}

fn store_path(config: &Config, peer: &config::Name) -> PathBuf {
    config.data_dir.join(format!("{peer}.sqlite"))
}

fn open_store(config: &Config, peer: &config::Peer) -> Result<Opened, RunError> {
    fs::create_dir_all(&config.data_dir).map_err(|error| RunError::File {
        path: config.data_dir.clone(),
        error,
    })?;
    let path = store_path(config, &peer.name);
    // Unbounded, because the store's thread must not wait. The relay has one batch and two reads with it at a time.
    let (sender, answers) = mpsc::unbounded_channel();
    let (store, opening) = store::open(&path, store::Options::default(), move |answer| {
        // After the owner has gone nobody needs it.
        let _ = sender.send(answer);
    })?;
    let levels = opening.levels;
    let room_bytes: usize = opening.state.iter().map(|(key, value)| key.len() + value.len()).sum();
    info!(
        peer = %peer.name,
        spool = levels.spool_entries,
        inbox = levels.inbox_entries,
        room_rows = opening.state.len(),
        room_bytes,
        "Store is open."
    );
    Ok(Opened {
        store,
        opening,
        answers,
    })
}

fn settings(config: &Config, peer: &config::Peer) -> Settings {
    let link = &config.link;
    Settings {
        local: domains(&config.local.domains),
        far: domains(&peer.domains),
        collapse_window: config.queue.collapse_window.0,
        queue_bytes_max: config.queue.bytes_max.0,
        queue_entries_max: config.queue.entries_max,
        classes: config.queue.classes.settings(),
        rules: config.queue.rules_for(&peer.name),
        lanes_per_pair: config.legs.lanes,
        lane_retry_max: config.legs.reconnect_max.0,
        memory_bytes: relay::MEMORY_BYTES,
        batch_bytes: usize::try_from(link.batch_bytes.0).unwrap_or(usize::MAX),
        compress: link.compression == Compression::Zstd,
        site: Some(config.site.to_string()),
        session: SessionConfig {
            ack_delay: link.ack_delay.0,
            keepalive: link.keepalive.period(),
            keepalive_max: link.keepalive_max.0,
            quiet_after: link.quiet_after.0,
            dead_after: link.dead_after.0,
            fragment_bytes_max: usize::try_from(link.fragment_bytes.0).unwrap_or(usize::MAX),
            ..SessionConfig::default()
        },
        mirror: config.mirror.settings(),
    }
}

fn link_times(config: &Config) -> LinkTimes {
    LinkTimes {
        retry_max: config.link.reconnect_max.0,
        retry_min: config.link.reconnect_max.0.min(LinkTimes::default().retry_min),
        // Where the peer may be silent for so long, a first answer takes as long.
        connect_timeout: LinkTimes::default().connect_timeout.max(config.link.quiet_after.0),
        handshake_timeout: LinkTimes::default().handshake_timeout.max(config.link.quiet_after.0),
        ..LinkTimes::default()
    }
}

/// What of users may be seen at the admin port.
fn show(config: &Config) -> Show {
    match config.admin.show {
        config::Shown::Nothing => Show::Nothing,
        config::Shown::Addresses => Show::Addresses,
        config::Shown::Bodies => Show::Bodies,
    }
}

type Reports = Arc<Mutex<Vec<(config::Peer, watch::Receiver<Report>)>>>;

fn status_of(running: &Running, started: Instant) -> Arc<dyn Fn() -> Status + Send + Sync> {
    let site = running.config.site.to_string();
    let show = show(&running.config);
    let (reports, legs) = (Arc::clone(&running.reports), running.legs.clone());
    Arc::new(move || {
        let reports = lock(&reports);
        let peers: Vec<PeerStatus> = reports
            .iter()
            .map(|(peer, report)| peer_status(peer, &report.borrow(), show))
            .collect();
        Status {
            site: site.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: started.elapsed().as_secs_f64(),
            not_ready: None,
            peers,
            legs: status::Legs {
                receiving: legs.ready() as u64,
                initiating: reports.iter().map(|(_, report)| report.borrow().lanes_up as u64).sum(),
            },
        }
    })
}

fn peer_status(peer: &config::Peer, report: &Report, show: Show) -> PeerStatus {
    let (levels, relay) = (report.levels, &report.relay);
    // Of the entries' bytes; what an earlier process left waits too.
    let share_waiting = levels.spool_bytes as f64 / relay.entry_bytes.max(levels.spool_bytes).max(1) as f64;
    PeerStatus {
        name: peer.name.to_string(),
        domains: peer.domains.iter().map(ToString::to_string).collect(),
        up: report.link_up,
        since_seconds: report.link_since.as_secs_f64(),
        rtt_seconds: report.rtt.map(|rtt| rtt.as_secs_f64()),
        acked_seconds: report.acked_ago.map(|ago| ago.as_secs_f64()),
        drain_seconds: report.drain.map(|drain| drain.as_secs_f64()),
        last_error: report.last_error.clone(),
        spool: QueueStatus {
            entries: levels.spool_entries,
            bytes: levels.spool_bytes,
            classes: Class::ALL
                .into_iter()
                .zip(report.classes)
                .filter(|(_, level)| level.entries > 0)
                .map(|(class, level)| (class.as_label().to_owned(), level.entries))
                .collect(),
            stanza_bytes: (relay.copy_bytes_accepted as f64 * share_waiting) as u64,
            oldest_seconds: (levels.spool_entries > 0).then_some(report.spool_oldest.as_secs_f64()),
        },
        inbox: QueueStatus {
            entries: levels.inbox_entries,
            bytes: levels.inbox_bytes,
            ..QueueStatus::default()
        },
        sent: Traffic {
            entries: relay.entries_sent,
            copies: relay.copies_accepted,
            stanza_bytes: relay.copy_bytes_accepted,
            payload_bytes: report.payload[0],
            link_bytes: report.tcp.sent,
            ip_bytes: report.tcp.ip_sent,
        },
        received: Traffic {
            entries: relay.entries_received,
            copies: relay.copies_delivered,
            stanza_bytes: relay.copy_bytes_delivered,
            payload_bytes: report.payload[1],
            link_bytes: report.tcp.received,
            ip_bytes: report.tcp.ip_received,
        },
        in_doubt: relay.in_doubt,
        rooms: RoomsStatus {
            mirrored: report.rooms.rooms as u64,
            sessions: report.rooms.sessions as u64,
            split: report.rooms.rooms_split as u64,
            guests: report.rooms.guests as u64,
        },
        room_costs: report
            .room_costs
            .iter()
            .map(|(room, cost)| room_status(room, cost, show))
            .collect(),
        saved: Saved {
            mirror: report.saved.mirror,
            rules: report.saved.rules,
            collapse: report.saved.collapse,
            compaction: report.saved.compaction,
            compression: report.saved.compression,
            sampled: relay.sampled_bytes,
            sampled_compressed: relay.sampled_compressed_bytes,
        },
        events: report.events.iter().map(event_status).collect(),
    }
}

fn room_status(room: &str, cost: &Cost, show: Show) -> RoomStatus {
    let room = match show {
        Show::Nothing => format!("room {}", cost.number),
        Show::Addresses | Show::Bodies => room.to_owned(),
    };
    RoomStatus {
        room,
        sent_bytes: cost.sent_bytes,
        received_bytes: cost.received_bytes,
        copies: cost.copies,
    }
}

fn event_status(event: &Event) -> EventStatus {
    EventStatus {
        at: event.at.0 as f64 / 1000.0,
        what: event.what.clone(),
    }
}

#[cfg(test)]
mod tests;
