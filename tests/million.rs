//! A queue that grows large and drains again, through the whole of two real processes: legs, store, link, store, legs.
//!
//! The servers are played by our own halves of streams, as in `legs_facing.rs`: one writes messages as fast as they are acknowledged
//! (XEP-0198: committed), the other takes them. The far sidecar is away at first; the near one is killed in the middle of the queue's growth
//! and in the middle of its draining, and the far one is restarted. Every message arrives once, and in its sender's order.

use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener as StdListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use narrows::{
    codec::xml::Limits,
    io::{
        ca::Authority,
        clock::Clock,
        dns::{Location, Resolver},
        lane::{self, CurrentSite, LaneEvent, LaneHandle, LegContext, Parcel},
        legs::{EVENTS_MAX, LegEvent, LegHandle, Legs, Routes},
        receipts::Receipts,
        tls::{Acceptor, Connector, Identity, Roots, ServerTrust},
    },
    relay::LaneKey,
    stanza::{Domain, DomainPair, Kind},
    stream::{Site, dialback::Secret},
};
use tokio::{net::TcpListener, sync::mpsc, time::timeout};

/// A hang fails the test; nothing is concluded from the time itself.
const PATIENCE: Duration = Duration::from_secs(120);

/// People who write to one other each.
const SENDERS: usize = 16;

/// Written at a time, and so many times before the first is acknowledged.
const PARCEL: usize = 250;
const PARCELS_AHEAD: usize = 8;

/// The issue's bound for a queue of 100,000 entries.
const MEMORY_BYTES_MAX: u64 = 64 << 20;

fn domain(name: &str) -> Domain {
    Domain::new(name).expect("a domain")
}

/// A narrows process, its directory and its configuration.
struct Sidecar {
    dir: PathBuf,
    admin: SocketAddr,
    process: Option<Child>,
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

fn narrows(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_narrows"))
        .args(arguments)
        .output()
        .expect("the binary was built for this test");
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a test's path is plain")
}

impl Sidecar {
    /// Its key and its authority; gives the public key.
    fn prepare(dir: &Path, admin: SocketAddr) -> (Self, String) {
        fs::create_dir_all(dir).expect("a directory");
        narrows(&["ca", "init", text(&dir.join("ca"))]);
        let key = narrows(&["keygen", text(&dir.join("key"))]);
        let sidecar = Self {
            dir: dir.to_owned(),
            admin,
            process: None,
        };
        (sidecar, key)
    }

    fn configure(&self, yaml: &str) {
        let dir = self.dir.display();
        let yaml = yaml.replace("DIR", &dir.to_string());
        fs::write(self.dir.join("narrows.yaml"), yaml).expect("a file");
    }

    fn start(&mut self) {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.join("log"))
            .expect("a log");
        let process = Command::new(env!("CARGO_BIN_EXE_narrows"))
            .args(["run", "--config", text(&self.dir.join("narrows.yaml"))])
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("it starts");
        self.process = Some(process);
        let begin = Instant::now();
        while !self.status().is_some_and(|status| status["not_ready"].is_null()) {
            assert!(begin.elapsed() < PATIENCE, "{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may have ended by itself, and then the rest of the test says so.
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    fn stop(&mut self) {
        let mut process = self.process.take().expect("it runs");
        let pid = process.id().to_string();
        let asked = Command::new("kill").args(["-TERM", &pid]).status().expect("kill runs");
        assert!(asked.success());
        assert!(process.wait().expect("it ends").success(), "{}", self.log());
    }

    fn status(&self) -> Option<serde_json::Value> {
        let output = Command::new(env!("CARGO_BIN_EXE_narrows"))
            .args(["status", "--json", "--admin", &self.admin.to_string()])
            .output()
            .expect("the binary was built for this test");
        serde_json::from_slice(&output.stdout).ok()
    }

    /// What the process has in memory now, and at most had.
    fn memory_bytes(&self) -> (u64, u64) {
        let pid = self.process.as_ref().expect("it runs").id();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        let bytes = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kib = line.and_then(|line| line.split_whitespace().next());
            kib.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or_default() << 10
        };
        (bytes("VmRSS:"), bytes("VmHWM:"))
    }

    fn disk_bytes(&self) -> u64 {
        let entries = fs::read_dir(self.dir.join("data")).expect("its data");
        let sizes = entries.map(|entry| entry.and_then(|entry| entry.metadata()).map_or(0, |file| file.len()));
        sizes.sum()
    }
}

fn free_port() -> SocketAddr {
    let listener = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    listener.local_addr().expect("it has one")
}

/// Half of a server: what it takes for its own domain is the far one of this half.
fn context(local: &str, far: &str, dir: &Path, trusted: &Path, server: SocketAddr) -> Arc<LegContext> {
    let authority = Authority::create(dir, "test", &[domain(far)]).expect("an authority");
    let identity = Identity::new(authority.issue(&[domain(far)]).expect("a certificate")).expect("a good one");
    let roots = Arc::new(Roots::load(trusted).expect("the sidecar's authority"));
    let limits = Limits::AFTER_AUTHENTICATION;
    Arc::new(LegContext {
        site: CurrentSite::new(Site {
            local: BTreeSet::from([domain(local)]),
            far: BTreeSet::from([domain(far)]),
            require_tls: true,
            offer_management: true,
            use_management: true,
            before_authentication: limits,
            after_authentication: limits,
            secret: Secret::new([7; 32]),
        }),
        clock: Clock::start(),
        acceptor: Acceptor::new(Arc::clone(&identity), Arc::clone(&roots)).expect("an acceptor"),
        connector: Connector::new(identity, roots, ServerTrust::Any).expect("a connector"),
        resolver: Resolver::default(),
        receipts: Receipts::default(),
        server: Location::Fixed {
            host: server.ip().to_string(),
            port: server.port(),
        },
        connections_max: 300,
    })
}

/// The server that writes.
struct Writer {
    context: Arc<LegContext>,
    stream: Option<LaneHandle>,
    life: u64,
    /// The first message of this stream.
    first: usize,
    next: usize,
    events_tx: mpsc::Sender<LaneEvent>,
    events: mpsc::Receiver<LaneEvent>,
}

impl Writer {
    fn new(context: Arc<LegContext>) -> Self {
        let (events_tx, events) = mpsc::channel(64);
        Self {
            context,
            stream: None,
            life: 0,
            first: 0,
            next: 0,
            events_tx,
            events,
        }
    }

    async fn open(&mut self) {
        self.life += 1;
        self.first = self.next;
        let lane = LaneKey {
            pair: DomainPair {
                local: domain("b.example"),
                far: domain("a.example"),
            },
            lane: 0,
        };
        let before = Arc::new(|_| Ok(()));
        let events = self.events_tx.clone();
        self.stream = Some(lane::spawn(Arc::clone(&self.context), lane, self.life, before, events));
        while !matches!(self.event().await, LaneEvent::Up { acks: true, .. }) {}
    }

    /// Writes all up to this one, and waits until they are acknowledged: they are on the sidecar's disk.
    async fn write(&mut self, upto: usize) {
        let mut acknowledged = self.next;
        while acknowledged < upto {
            while self.next < upto && self.next < acknowledged + PARCEL * PARCELS_AHEAD {
                let end = upto.min(self.next + PARCEL);
                let stanzas = (self.next..end).map(message).collect();
                let stream = self.stream.as_ref().expect("it is open");
                stream.try_write(Parcel { batch: 1, stanzas }).expect("there is room");
                self.next = end;
            }
            match self.event().await {
                LaneEvent::Confirmed { stanzas, .. } => acknowledged = self.first + stanzas as usize,
                LaneEvent::Up { .. } => {}
                LaneEvent::Down { reason, .. } => panic!("the stream is gone: {reason}"),
            }
        }
    }

    /// The sidecar is gone, and with it the stream.
    async fn lose(&mut self) {
        while !matches!(self.event().await, LaneEvent::Down { .. }) {}
        self.stream = None;
    }

    async fn event(&mut self) -> LaneEvent {
        let event = timeout(PATIENCE, self.events.recv()).await;
        event.expect("something happens in time").expect("we hold a sender")
    }
}

/// The server that reads: what it was sent, in order.
struct Reader {
    stanzas: mpsc::Receiver<LegEvent>,
    committed: LegHandle,
    heard: Vec<usize>,
}

impl Reader {
    async fn read(&mut self, upto: usize) {
        while self.heard.len() < upto {
            let event = timeout(PATIENCE, self.stanzas.recv()).await;
            match event.expect("something comes in time").expect("the legs are served") {
                LegEvent::Stanza { leg, n, stanza, .. } => {
                    self.committed.committed(leg, n);
                    if stanza.kind() == Kind::Message {
                        let number = stanza.id().and_then(|id| id.parse().ok());
                        self.heard.push(number.expect("a message of ours"));
                    }
                }
                LegEvent::Gone { .. } => {}
            }
        }
    }
}

fn message(number: usize) -> Bytes {
    let person = number % SENDERS;
    format!(
        "<message id='{number}' type='chat' from='p{person}@a.example/r' to='q{person}@b.example'><body>message {number}: \
         the wind is {}, and so it goes on</body></message>",
        number * 7919 % 65_521
    )
    .into()
}

/// One process on each side of loopback: 'A' writes, and 'B' reads.
async fn grow_and_drain(count: usize, measured: usize) {
    let dir = tempfile::tempdir().expect("a directory");
    let [admin_a, admin_b, legs_a, legs_b, link] = [(); 5].map(|()| free_port());
    let server_a = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    let server_b = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    let address = |listener: &TcpListener| listener.local_addr().expect("it has one");

    let (mut a, key_a) = Sidecar::prepare(&dir.path().join("a"), admin_a);
    let (mut b, key_b) = Sidecar::prepare(&dir.path().join("b"), admin_b);
    let writer = context(
        "b.example",
        "a.example",
        &dir.path().join("server-a"),
        &a.dir.join("ca/ca.pem"),
        legs_a,
    );
    let reader = context(
        "a.example",
        "b.example",
        &dir.path().join("server-b"),
        &b.dir.join("ca/ca.pem"),
        legs_b,
    );
    let yaml =
        |site: &str, here: &str, there: &str, server: SocketAddr, legs: SocketAddr, admin: SocketAddr, key: &str| {
            let (listen, connect) = match site {
                "a" => (format!("listen: \"{link}\""), String::new()),
                _ => (String::new(), format!("connect: \"{link}\"")),
            };
            format!(
                "site: {site}\ndata_dir: DIR/data\nlocal:\n  domains: [{here}]\n  server: \"{server}\"\n\
             legs:\n  listen: [\"{legs}\"]\n  certificates: DIR/ca\n  trust: {trust}\n  management: on\n\
             link:\n  private_key: DIR/key\n  {listen}\n\
             peers:\n  - name: peer\n    domains: [{there}]\n    public_key: \"{key}\"\n    {connect}\n\
             queue:\n  entries_max: 2000000\n  bytes_max: 4GiB\nadmin:\n  listen: \"{admin}\"\n",
                trust = text(&dir.path().join(format!("server-{site}/ca.pem"))),
            )
        };
    a.configure(&yaml(
        "a",
        "a.example",
        "b.example",
        address(&server_a),
        legs_a,
        admin_a,
        &key_b,
    ));
    b.configure(&yaml(
        "b",
        "b.example",
        "a.example",
        address(&server_b),
        legs_b,
        admin_b,
        &key_a,
    ));

    // Each half answers for its own domain, and hears what comes for it.
    let half = |context: &Arc<LegContext>, far: &str, listener: TcpListener| {
        let (owner, stanzas) = mpsc::channel(EVENTS_MAX);
        let committed = LegHandle::default();
        let mut routes = Routes::default();
        routes.insert(domain(far), owner);
        let legs = Legs::new(Arc::clone(context), routes, committed.clone());
        tokio::spawn(async move { legs.serve(listener).await });
        (stanzas, committed)
    };
    let _writers_own = half(&writer, "a.example", server_a);
    let (stanzas, committed) = half(&reader, "b.example", server_b);
    let mut writer = Writer::new(writer);
    let mut reader = Reader {
        stanzas,
        committed,
        heard: Vec::with_capacity(count),
    };

    let begin = Instant::now();
    a.start();
    writer.open().await;
    writer.write(measured).await;
    let (memory, most) = a.memory_bytes();
    println!(
        "{measured} wait: {:.1} MiB of memory, {:.1} at most",
        mib(memory),
        mib(most)
    );
    assert!(most <= MEMORY_BYTES_MAX, "{most} bytes of memory");
    writer.write(count / 2).await;
    a.kill();
    writer.lose().await;
    let again = Instant::now();
    a.start();
    println!(
        "{} wait: killed, and ready again after {:.1} s",
        count / 2,
        again.elapsed().as_secs_f64()
    );
    writer.open().await;
    writer.write(count).await;
    let (memory, most) = a.memory_bytes();
    println!(
        "{count} wait: {:.1} MiB of memory, {:.1} at most, {:.0} MiB on disk, {:.0} s since the first",
        mib(memory),
        mib(most),
        mib(a.disk_bytes()),
        begin.elapsed().as_secs_f64()
    );

    let begin = Instant::now();
    b.start();
    reader.read(count / 3).await;
    a.kill();
    a.start();
    reader.read(2 * count / 3).await;
    b.stop();
    b.start();
    reader.read(count).await;
    println!(
        "all are through after {:.0} s, one killed and one restarted meanwhile; A has {:.1} MiB of memory, {:.1} at most, B {:.1} and {:.1}",
        begin.elapsed().as_secs_f64(),
        mib(a.memory_bytes().0),
        mib(a.memory_bytes().1),
        mib(b.memory_bytes().0),
        mib(b.memory_bytes().1),
    );

    let mut next: Vec<usize> = (0..SENDERS).collect();
    for number in &reader.heard {
        assert_eq!(
            *number,
            next[number % SENDERS],
            "lost, doubled or out of its sender's order"
        );
        next[number % SENDERS] += SENDERS;
    }
    // And that was all.
    a.stop();
    b.stop();
    let rest = std::iter::from_fn(|| reader.stanzas.try_recv().ok());
    let rest = rest.filter(|event| matches!(event, LegEvent::Stanza { stanza, .. } if stanza.kind() == Kind::Message));
    assert_eq!(rest.count(), 0, "something came after the last");
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

/// A small one, in any case.
#[tokio::test(flavor = "multi_thread")]
async fn a_queue_grows_and_drains() {
    grow_and_drain(20_000, 10_000).await;
}

/// A million.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "some minutes: cargo test --test million -- --ignored --nocapture"]
async fn a_million_wait_and_drain() {
    grow_and_drain(1_000_000, 100_000).await;
}
