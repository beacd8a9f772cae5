//! Legs with the real servers: Debian's Prosody and ejabberd, each alone with our half of the streams.
//!
//! Needs root and the servers' packages. What is proven here is the negotiation: who authenticates how in which direction,
//! that stanzas pass both ways, and that a restart of the server is survived. Whole pairs are tested in `tests/e2e`.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use narrows::{
    codec::xml::Limits,
    io::{
        ca::Authority,
        clock::Clock,
        dns::{Location, Resolver, Target},
        lane::{self, CurrentSite, LaneEvent, LaneHandle, LegContext, Parcel},
        legs::{EVENTS_MAX, LegEvent, LegHandle, Legs, Routes},
        tls::{Acceptor, Connector, Identity, Roots, ServerTrust},
    },
    relay::LaneKey,
    stanza::{Domain, DomainPair, Stanza},
    stream::{Site, dialback::Secret},
};
use narrows_lab::{
    Ejabberd, Kind, Prosody, Server,
    dns::{Dns, Record},
    net::{Guard, Namespace},
    servers::{self, Place},
};
use tokio::{net::TcpListener, sync::mpsc, task::spawn_blocking, time::timeout};

const LOCAL: &str = "b.example";
const FAR: &str = "a.example";
const LEGS_PORT: u16 = 5299;

const STARTTLS: &str = "_xmpp-server";
const DIRECT_TLS: &str = "_xmpps-server";

/// Longer than any server's own limit for setting up a stream (Prosody 90 s), so that its complaint is seen first.
const PATIENCE: Duration = Duration::from_secs(100);

/// How the server comes to believe that we are the far domain.
#[derive(Clone, Copy, PartialEq)]
enum Proof {
    /// Each side's certificate is trusted by the other.
    Certificates,
    /// Neither is.
    Dialback,
}

/// One namespace with one server. Dropped in this order.
struct Lab {
    server: Arc<Server>,
    _dns: Dns,
    namespace: Arc<Namespace>,
    authority: PathBuf,
    server_certificate: PathBuf,
    _guard: Guard,
}

impl Lab {
    /// `service` is the only one that the server can find us by.
    fn start(name: &str, kind: Kind, proof: Proof, service: &str) -> Self {
        let guard = Guard::new(name).unwrap();
        let dir = guard.dir().to_owned();
        let mut namespace = Namespace::create(&format!("{}-a", guard.label())).unwrap();
        let records = [
            Record::srv(service, FAR, "sidecar.example", LEGS_PORT),
            Record::srv("_xmpp-server", LOCAL, "server.example", narrows_lab::S2S_PORT),
            Record::a("sidecar.example", Ipv4Addr::LOCALHOST),
            Record::a("server.example", Ipv4Addr::LOCALHOST),
        ];
        let dns = Dns::start(&mut namespace, &dir.join("dns"), &records).unwrap();
        let namespace = Arc::new(namespace);

        let authority = dir.join("ca");
        Authority::create(&authority, "narrows test", &[domain(FAR)]).unwrap();
        let certificate = servers::self_signed(&dir.join("certificate"), &[LOCAL.to_owned()]).unwrap();
        let mut spec = match kind {
            Kind::Prosody => Prosody::stock().debug(),
            Kind::Ejabberd => Ejabberd::stock(),
        };
        spec = match proof {
            Proof::Certificates => spec.trust_ca(authority.join("ca.pem")),
            Proof::Dialback => spec.insecure_domains([FAR]),
        };
        let server_certificate = certificate.certificate.clone();
        let place = Place {
            namespace: Arc::clone(&namespace),
            dir: dir.join("server"),
            domain: LOCAL.to_owned(),
            conference: format!("conference.{LOCAL}"),
            users: Vec::new(),
            certificate,
        };
        let server = Server::start(spec, place).unwrap();
        Self {
            server: Arc::new(server),
            _dns: dns,
            namespace,
            authority,
            server_certificate,
            _guard: guard,
        }
    }

    /// Runs a test inside the namespace; shows the server's log if it fails.
    fn run(&self, test: impl AsyncFnOnce(&Self) + Send) {
        let complain = Complain(&self.server);
        self.namespace
            .enter(|| {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .unwrap();
                runtime.block_on(test(self));
            })
            .unwrap();
        std::mem::forget(complain);
    }

    fn log(&self) -> String {
        fs::read_to_string(self.server.log_path()).unwrap()
    }
}

struct Complain<'a>(&'a Server);

impl Drop for Complain<'_> {
    fn drop(&mut self) {
        eprintln!("{}", self.0.log_tail());
    }
}

/// Our half: the listener, and lanes as they are asked for.
struct Sidecar {
    context: Arc<LegContext>,
    legs: Legs,
    handle: LegHandle,
    from_server: mpsc::Receiver<LegEvent>,
    lane_events_tx: mpsc::Sender<LaneEvent>,
    lane_events: mpsc::Receiver<LaneEvent>,
}

impl Sidecar {
    async fn start(lab: &Lab, proof: Proof) -> Self {
        let authority = Authority::load(&lab.authority).unwrap();
        let identity = Identity::new(authority.issue(&[domain(FAR)]).unwrap()).unwrap();
        let roots = Arc::new(match proof {
            Proof::Certificates => Roots::load(&lab.server_certificate).unwrap(),
            Proof::Dialback => Roots::default(),
        });
        let trust = match proof {
            Proof::Certificates => ServerTrust::Verified,
            Proof::Dialback => ServerTrust::Any,
        };
        let limits = Limits {
            stanza_bytes_max: 512 * 1024,
            depth_max: 64,
            attributes_max: 64,
            elements_max: 16_384,
        };
        let context = Arc::new(LegContext {
            site: CurrentSite::new(Site {
                local: BTreeSet::from([domain(LOCAL)]),
                far: BTreeSet::from([domain(FAR)]),
                require_tls: true,
                offer_management: true,
                use_management: true,
                before_authentication: limits,
                after_authentication: limits,
                secret: Secret::new([7; 32]),
            }),
            clock: Clock::start(),
            acceptor: Acceptor::new(Arc::clone(&identity), Arc::clone(&roots)).unwrap(),
            connector: Connector::new(identity, roots, trust).unwrap(),
            resolver: Resolver::default(),
            receipts: narrows::io::receipts::Receipts::default(),
            server: Location::Fixed {
                host: "127.0.0.1".to_owned(),
                port: narrows_lab::S2S_PORT,
            },
            connections_max: 64,
        });
        let (owner, from_server) = mpsc::channel(EVENTS_MAX);
        let mut routes = Routes::default();
        routes.insert(domain(FAR), owner);
        let handle = LegHandle::default();
        let legs = Legs::new(Arc::clone(&context), routes, handle.clone());
        let listener = TcpListener::bind(("127.0.0.1", LEGS_PORT)).await.unwrap();
        tokio::spawn({
            let legs = legs.clone();
            async move { legs.serve(listener).await }
        });
        let (lane_events_tx, lane_events) = mpsc::channel(64);
        Self {
            context,
            legs,
            handle,
            from_server,
            lane_events_tx,
            lane_events,
        }
    }

    fn lane(&self, life: u64) -> LaneHandle {
        let pair = DomainPair {
            local: domain(LOCAL),
            far: domain(FAR),
        };
        let key = LaneKey { pair, lane: 0 };
        lane::spawn(
            Arc::clone(&self.context),
            key,
            life,
            Arc::new(|_| Ok(())),
            self.lane_events_tx.clone(),
        )
    }

    async fn lane_event(&mut self) -> LaneEvent {
        let event = timeout(PATIENCE, self.lane_events.recv()).await;
        event.expect("the lane says something").unwrap()
    }

    /// Waits until a lane of this life is up; whether it has acks.
    async fn up(&mut self, expected: u64) -> bool {
        match self.lane_event().await {
            LaneEvent::Up { life, acks, .. } if life == expected => acks,
            other => panic!("not up, but {other:?}"),
        }
    }

    /// Waits until so many stanzas are confirmed.
    async fn confirmed(&mut self, expected: u64) {
        loop {
            match self.lane_event().await {
                LaneEvent::Confirmed { stanzas, .. } if stanzas >= expected => return,
                LaneEvent::Confirmed { .. } => (),
                other => panic!("not confirmed, but {other:?}"),
            }
        }
    }

    /// The next stanza of the server, which is then on disk for all it knows.
    async fn stanza(&mut self) -> Stanza {
        loop {
            let event = timeout(PATIENCE, self.from_server.recv()).await;
            match event.expect("the server sends something").unwrap() {
                LegEvent::Stanza { leg, n, pair, stanza } => {
                    assert_eq!((pair.local.as_str(), pair.far.as_str()), (LOCAL, FAR));
                    self.handle.committed(leg, n);
                    return stanza;
                }
                LegEvent::Gone { .. } => (),
            }
        }
    }

    /// A question crosses on the lane, and its answer comes on the stream that the server opens for it.
    async fn ask(&mut self, lane: &LaneHandle, id: &str) {
        hand(lane, vec![ping(id)]);
        let answer = self.stanza().await;
        assert_eq!(answer.id().as_deref(), Some(id));
        assert_eq!(answer.stanza_type().as_deref(), Some("result"));
    }
}

fn hand(lane: &LaneHandle, stanzas: Vec<Bytes>) {
    lane.try_write(Parcel { batch: 1, stanzas }).unwrap();
}

fn domain(name: &str) -> Domain {
    Domain::new(name).unwrap()
}

fn ping(id: &str) -> Bytes {
    format!("<iq type='get' id='{id}' from='user@{FAR}/r' to='{LOCAL}'><ping xmlns='urn:xmpp:ping'/></iq>").into()
}

/// Up, a question answered, a batch in order, the server restarted, and again.
async fn everyday(lab: &Lab, proof: Proof, acks: bool) {
    let mut sidecar = Sidecar::start(lab, proof).await;
    let lane = sidecar.lane(1);
    assert_eq!(sidecar.up(1).await, acks, "XEP-0198");
    sidecar.ask(&lane, "first").await;
    sidecar.confirmed(1).await;

    let batch: Vec<_> = (0..500).map(|n| ping(&format!("batch-{n}"))).collect();
    hand(&lane, batch);
    for n in 0..500 {
        assert_eq!(sidecar.stanza().await.id().as_deref(), Some(&*format!("batch-{n}")));
    }
    sidecar.confirmed(501).await;

    let server = Arc::clone(&lab.server);
    spawn_blocking(move || server.restart()).await.unwrap().unwrap();
    match sidecar.lane_event().await {
        LaneEvent::Down { life: 1, reason, .. } => eprintln!("down: {reason}"),
        other => panic!("not down, but {other:?}"),
    }
    let lane = sidecar.lane(2);
    sidecar.up(2).await;
    sidecar.ask(&lane, "second").await;
    sidecar.confirmed(1).await;

    lane.drain();
    match sidecar.lane_event().await {
        LaneEvent::Down { life: 2, reason, .. } => eprintln!("drained: {reason}"),
        other => panic!("not drained, but {other:?}"),
    }
    sidecar.legs.drain(PATIENCE).await;
}

/// Debian's Prosody with our CA in its trust store: SASL EXTERNAL in both directions, XEP-0198 in both.
///
/// With `s2s_secure_auth = true` it accepts nothing less, so a stream that is up was authenticated so.
#[test]
fn prosody_by_certificates() {
    let lab = Lab::start("leg-pc", Kind::Prosody, Proof::Certificates, STARTTLS);
    lab.run(async |lab| everyday(lab, Proof::Certificates, true).await);
}

/// Prosody that does not know our CA, with us in `s2s_insecure_domains`: dialback in both directions.
#[test]
fn prosody_by_dialback() {
    let lab = Lab::start("leg-pd", Kind::Prosody, Proof::Dialback, STARTTLS);
    lab.run(async |lab| everyday(lab, Proof::Dialback, false).await);
}

/// Debian's ejabberd with our CA in the trust store.
#[test]
fn ejabberd_by_certificates() {
    let lab = Lab::start("leg-ec", Kind::Ejabberd, Proof::Certificates, STARTTLS);
    lab.run(async |lab| everyday(lab, Proof::Certificates, false).await);
    let log = lab.log();
    assert!(log.contains("Accepted inbound s2s EXTERNAL authentication a.example -> b.example"));
    assert!(log.contains("Accepted outbound s2s EXTERNAL authentication b.example -> a.example"));
}

/// Debian's ejabberd as it is shipped, knowing nothing of us.
#[test]
fn ejabberd_by_dialback() {
    let lab = Lab::start("leg-ed", Kind::Ejabberd, Proof::Dialback, STARTTLS);
    lab.run(async |lab| everyday(lab, Proof::Dialback, false).await);
    let log = lab.log();
    assert!(log.contains("Accepted inbound s2s dialback authentication a.example -> b.example"));
    assert!(log.contains("Accepted outbound s2s dialback authentication b.example -> a.example"));
}

/// Both servers come with direct TLS (XEP-0368) where only that is on offer, and authenticate as with STARTTLS.
#[test]
fn prosody_and_ejabberd_with_direct_tls() {
    let lab = Lab::start("leg-px", Kind::Prosody, Proof::Certificates, DIRECT_TLS);
    lab.run(async |lab| everyday(lab, Proof::Certificates, true).await);
    drop(lab);
    let lab = Lab::start("leg-ex", Kind::Ejabberd, Proof::Dialback, DIRECT_TLS);
    lab.run(async |lab| everyday(lab, Proof::Dialback, false).await);
}

/// SRV records lead to host and port, and without them the domain's own address with port 5269.
///
/// The resolver reads `/etc/resolv.conf`, which only a process of its own sees replaced: the test starts itself in one.
#[test]
fn the_server_is_found_by_srv() {
    const INSIDE: &str = "NARROWS_TEST_INSIDE";
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        return runtime.block_on(find_by_srv());
    }
    let guard = Guard::new("leg-dns").unwrap();
    let mut namespace = Namespace::create(&format!("{}-a", guard.label())).unwrap();
    let records = [
        Record::srv("_xmpp-server", LOCAL, "server.example", 5270),
        Record::srv("_xmpps-server", LOCAL, "server.example", 5271),
        Record::a("server.example", Ipv4Addr::LOCALHOST),
        Record::a("plain.example", Ipv4Addr::new(127, 0, 0, 7)),
    ];
    let _dns = Dns::start(&mut namespace, &guard.dir().join("dns"), &records).unwrap();
    let mut inside = namespace.command(std::env::current_exe().unwrap()).unwrap();
    inside.args(["--exact", "the_server_is_found_by_srv"]).env(INSIDE, "1");
    assert!(inside.status().unwrap().success());
}

async fn find_by_srv() {
    let resolver = Resolver::default();
    let find = async |name| resolver.targets(&domain(name), &Location::LookUp, |_| 0).await;
    let target = |last, port, direct_tls| Target {
        address: (IpAddr::from([127, 0, 0, last]), port).into(),
        direct_tls,
    };
    let mut found = find(LOCAL).await.unwrap();
    found.sort_by_key(|target| target.address);
    assert_eq!(found, [target(1, 5270, false), target(1, 5271, true)]);
    assert_eq!(find("plain.example").await.unwrap(), [target(7, 5269, false)]);
    let missing = find("missing.example").await.unwrap_err().to_string();
    assert!(missing.contains("missing.example"), "{missing}");
}

/// OpenSSL, which both servers use, takes the authority's constraints as we mean them.
#[test]
fn openssl_honours_the_authority_and_its_constraints() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::create(dir.path(), "narrows test", &[domain(FAR), domain("bücher.example")]).unwrap();
    let verify = |names: &[&str]| {
        let names: Vec<_> = names.iter().map(|name| domain(name)).collect();
        let issued = authority.mint(&names).unwrap();
        let leaf = dir.path().join("leaf.der");
        fs::write(&leaf, &issued.chain[0]).unwrap();
        openssl_verify(&dir.path().join("ca.pem"), &leaf, names[0].as_str())
    };
    let good = verify(&[FAR, "conference.a.example", "bücher.example"]);
    assert!(good.contains(": OK"), "{good}");
    let bad = verify(&[FAR, "bank.example"]);
    assert!(bad.contains("permitted subtree violation"), "{bad}");
}

fn openssl_verify(authority: &Path, leaf: &Path, host: &str) -> String {
    let output = std::process::Command::new("openssl")
        .args([
            "verify",
            "-x509_strict",
            "-purpose",
            "sslserver",
            "-verify_hostname",
            host,
            "-CAfile",
        ])
        .args([authority, leaf])
        .output()
        .unwrap();
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}
