//! Legs without a server: two sidecars' halves face each other, each taking the other for its server.
//!
//! Ours opens streams as `a.example`; the other, whose local domain that is, receives them, and for dialback asks back at
//! our listener. Sockets and TLS are real, the addresses loopback; no root, no packages.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use narrows::{
    codec::xml::Limits,
    io::{
        ca::Authority,
        clock::Clock,
        dns::{Location, Resolver},
        lane::{self, CurrentSite, DownReason, LaneEvent, LaneHandle, LegContext, Parcel},
        legs::{EVENTS_MAX, LegEvent, LegHandle, Legs, Routes, UNCOMMITTED_BYTES_MAX},
        tls::{Acceptor, Connector, Identity, Roots, ServerTrust},
    },
    relay::{LaneKey, LegId},
    stanza::{Domain, DomainPair, Kind, Stanza},
    stream::{Site, dialback::Secret},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::timeout,
};

/// A hang fails the test; nothing is concluded from the time itself.
const PATIENCE: Duration = Duration::from_secs(30);

/// After so long nothing more comes. On a slow machine more might: then the test sees less than there is to see, and passes.
const QUIET: Duration = Duration::from_secs(2);

#[derive(Clone, Copy)]
enum Proof {
    Certificates,
    Dialback,
}

/// A certificate for one domain, and the authority that vouches for it.
fn vouched(name: &str) -> (Arc<Identity>, Roots) {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::create(dir.path(), "test", &[domain(name)]).unwrap();
    let identity = Identity::new(authority.issue(&[domain(name)]).unwrap()).unwrap();
    (identity, Roots::load(&dir.path().join("ca.pem")).unwrap())
}

fn context(local: &str, far: &str, identity: Arc<Identity>, roots: Roots, server: SocketAddr) -> Arc<LegContext> {
    let limits = Limits {
        stanza_bytes_max: 512 * 1024,
        depth_max: 64,
        attributes_max: 64,
        elements_max: 16_384,
    };
    let roots = Arc::new(roots);
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
        acceptor: Acceptor::new(Arc::clone(&identity), Arc::clone(&roots)).unwrap(),
        connector: Connector::new(identity, roots, ServerTrust::Any).unwrap(),
        resolver: Resolver::default(),
        receipts: narrows::io::receipts::Receipts::default(),
        server: Location::Fixed {
            host: server.ip().to_string(),
            port: server.port(),
        },
        connections_max: 300,
    })
}

/// Both halves. `near` opens lanes; `other` receives, and hands what it receives to `stanzas`.
struct Facing {
    near: Arc<LegContext>,
    other: Legs,
    other_address: SocketAddr,
    committed: LegHandle,
    stanzas: mpsc::Receiver<LegEvent>,
    events_tx: mpsc::Sender<LaneEvent>,
    events: mpsc::Receiver<LaneEvent>,
}

impl Facing {
    async fn start(proof: Proof, room_for_stanzas: usize) -> Self {
        let near_listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let other_listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let near_address = near_listener.local_addr().unwrap();
        let other_address = other_listener.local_addr().unwrap();
        let (near_identity, near_authority) = vouched("a.example");
        let (other_identity, other_authority) = vouched("b.example");
        let (near_roots, other_roots) = match proof {
            Proof::Certificates => (other_authority, near_authority),
            Proof::Dialback => Default::default(),
        };
        let near = context("b.example", "a.example", near_identity, near_roots, other_address);
        let other = context("a.example", "b.example", other_identity, other_roots, near_address);

        let (owner, stanzas) = mpsc::channel(room_for_stanzas);
        let committed = LegHandle::default();
        let mut routes = Routes::default();
        routes.insert(domain("b.example"), owner);
        let other = Legs::new(other, routes, committed.clone());
        let near_legs = Legs::new(Arc::clone(&near), Routes::default(), LegHandle::default());
        tokio::spawn({
            let other = other.clone();
            async move { other.serve(other_listener).await }
        });
        tokio::spawn(async move { near_legs.serve(near_listener).await });
        let (events_tx, events) = mpsc::channel(8);
        Self {
            near,
            other,
            other_address,
            committed,
            stanzas,
            events_tx,
            events,
        }
    }

    fn lane(&self, life: u64) -> LaneHandle {
        lane::spawn(
            Arc::clone(&self.near),
            key(),
            life,
            Arc::new(|_| Ok(())),
            self.events_tx.clone(),
        )
    }

    async fn event(&mut self) -> LaneEvent {
        timeout(PATIENCE, self.events.recv()).await.unwrap().unwrap()
    }

    async fn up(&mut self) -> bool {
        match self.event().await {
            LaneEvent::Up { acks, .. } => acks,
            other => panic!("not up, but {other:?}"),
        }
    }

    async fn down(&mut self) -> DownReason {
        loop {
            match self.event().await {
                LaneEvent::Down { reason, .. } => return reason,
                LaneEvent::Up { .. } | LaneEvent::Confirmed { .. } => (),
            }
        }
    }

    async fn confirmed(&mut self) -> u64 {
        match self.event().await {
            LaneEvent::Confirmed { stanzas, .. } => stanzas,
            other => panic!("not confirmed, but {other:?}"),
        }
    }

    /// The next one that is not a lane's ping, which a server would answer. Those are only committed.
    async fn stanza(&mut self) -> (LegId, u64, Stanza) {
        loop {
            match timeout(PATIENCE, self.stanzas.recv()).await.unwrap().unwrap() {
                LegEvent::Stanza { leg, n, stanza, .. } if stanza.kind() == Kind::Iq => {
                    self.committed.committed(leg, n)
                }
                LegEvent::Stanza { leg, n, stanza, .. } => return (leg, n, stanza),
                LegEvent::Gone { .. } => panic!("the stream is gone"),
            }
        }
    }
}

fn hand(lane: &LaneHandle, stanzas: Vec<Bytes>) {
    lane.try_write(Parcel { batch: 1, stanzas }).unwrap();
}

fn domain(name: &str) -> Domain {
    Domain::new(name).unwrap()
}

fn key() -> LaneKey {
    LaneKey {
        pair: DomainPair {
            local: domain("b.example"),
            far: domain("a.example"),
        },
        lane: 0,
    }
}

fn message(n: usize) -> Bytes {
    format!("<message id='{n}' from='x@a.example' to='y@b.example'><body>{n}</body></message>").into()
}

fn large_message(n: usize, bytes: usize) -> Bytes {
    let body = "x".repeat(bytes);
    format!("<message id='{n}' from='x@a.example' to='y@b.example'><body>{body}</body></message>").into()
}

/// A stanza is acknowledged when it is on disk, not when it has arrived, and never before an earlier one.
///
/// Commit the third and the second of three first: nothing may be confirmed until the first is committed, too.
#[tokio::test]
async fn acknowledges_what_is_committed() {
    let mut facing = Facing::start(Proof::Certificates, 64).await;
    let lane = facing.lane(1);
    assert!(facing.up().await, "XEP-0198 after SASL EXTERNAL");
    hand(&lane, (1..=3).map(message).collect());
    let mut leg = None;
    for n in 1..=3 {
        let (from, number, stanza) = facing.stanza().await;
        assert_eq!((number, stanza.id().as_deref()), (n, Some(&*n.to_string())));
        leg = Some(from);
    }
    let leg = leg.unwrap();
    for n in [3, 2] {
        facing.committed.committed(leg, n);
        tokio::task::yield_now().await;
        assert!(facing.events.try_recv().is_err());
    }
    facing.committed.committed(leg, 1);
    let mut confirmed = 0;
    while confirmed < 3 {
        confirmed = facing.confirmed().await;
    }
}

/// Without trusted certificates dialback authenticates, by a question over a connection of its own; what is written counts
/// as confirmed once the kernel has it and the ping behind it has found no answer.
#[tokio::test]
async fn dialback_asks_back() {
    let mut facing = Facing::start(Proof::Dialback, 64).await;
    let lane = facing.lane(1);
    assert!(!facing.up().await, "no XEP-0198 without SASL");
    hand(&lane, vec![message(1)]);
    assert_eq!(facing.confirmed().await, 1);
    assert_eq!(facing.stanza().await.1, 1);
}

/// A domain whose peer was removed has no owner: the next stanza for it cuts the stream, so that the server knows and tells its users. What came
/// before is the old owner's, what comes on a new stream is a new owner's.
#[tokio::test]
async fn a_domain_without_an_owner_is_cut() {
    let mut facing = Facing::start(Proof::Certificates, 64).await;
    let lane = facing.lane(1);
    facing.up().await;
    hand(&lane, vec![message(1)]);
    let (leg, n, _) = facing.stanza().await;
    facing.committed.committed(leg, n);
    facing.other.remove_owner(&[domain("b.example")]);
    hand(&lane, vec![message(2)]);
    facing.down().await;

    let (owner, stanzas) = mpsc::channel(64);
    facing.other.add_owner([domain("b.example")], &owner);
    facing.stanzas = stanzas;
    let lane = facing.lane(2);
    facing.up().await;
    hand(&lane, vec![message(3)]);
    assert_eq!(facing.stanza().await.2.id().as_deref(), Some("3"));
}

/// An owner without room holds the stream back; nothing is lost, all comes in order.
#[tokio::test]
async fn a_slow_owner_holds_the_stream_back() {
    const ALL: usize = 5000;
    let mut facing = Facing::start(Proof::Dialback, 1).await;
    let lane = facing.lane(1);
    facing.up().await;
    hand(&lane, (1..=ALL).map(message).collect());
    for n in 1..=ALL {
        let (leg, number, stanza) = facing.stanza().await;
        assert_eq!(stanza.id().as_deref(), Some(&*n.to_string()));
        facing.committed.committed(leg, number);
    }
    let mut confirmed = 0;
    while confirmed < ALL as u64 {
        confirmed = facing.confirmed().await;
    }
}

/// What one stream has brought and its owner has not on disk is bounded in bytes; what is on disk makes room.
///
/// Send twice the bound to an owner that takes everything and commits nothing, until no more comes; then let it commit.
#[tokio::test]
async fn an_idle_disk_holds_the_stream_back() {
    const BYTES: usize = 100_000;
    const ALL: usize = 2 * UNCOMMITTED_BYTES_MAX / BYTES;
    let mut facing = Facing::start(Proof::Certificates, EVENTS_MAX).await;
    let lane = facing.lane(1);
    facing.up().await;
    hand(&lane, (1..=ALL).map(|n| large_message(n, BYTES)).collect());
    let (mut came, mut bytes, mut leg) = (0, 0, None);
    while let Ok((from, number, stanza)) = timeout(QUIET, facing.stanza()).await {
        (came, leg) = (number, Some(from));
        bytes += stanza.bytes().len();
    }
    assert!(bytes < UNCOMMITTED_BYTES_MAX + 2 * BYTES, "{bytes}");
    (1..=came).for_each(|n| facing.committed.committed(leg.unwrap(), n));
    for n in came + 1..=ALL as u64 {
        let (leg, number, _) = facing.stanza().await;
        assert_eq!(number, n);
        facing.committed.committed(leg, n);
    }
}

/// A stream of the server counts as open from when it has authenticated until it is over.
#[tokio::test]
async fn open_streams_are_counted() {
    let mut facing = Facing::start(Proof::Certificates, 64).await;
    assert_eq!(facing.other.ready(), 0);
    let lane = facing.lane(1);
    facing.up().await;
    assert_eq!(facing.other.ready(), 1);
    lane.drain();
    facing.down().await;
    let over = async {
        while facing.other.ready() > 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, over).await.unwrap();
}

/// A drained lane writes what it was given, and both ends agree that it is over.
#[tokio::test]
async fn drains_after_the_last_stanza() {
    let mut facing = Facing::start(Proof::Dialback, 64).await;
    let lane = facing.lane(1);
    facing.up().await;
    hand(&lane, (1..=20).map(message).collect());
    lane.drain();
    for n in 1..=20 {
        assert_eq!(facing.stanza().await.2.id().as_deref(), Some(&*n.to_string()));
    }
    assert_eq!(facing.down().await.as_label(), "drained");
    let ping = timeout(PATIENCE, facing.stanzas.recv()).await.unwrap();
    assert!(matches!(ping, Some(LegEvent::Stanza { stanza, .. }) if stanza.kind() == Kind::Iq));
    let gone = timeout(PATIENCE, facing.stanzas.recv()).await.unwrap();
    assert!(matches!(gone, Some(LegEvent::Gone { .. })));
}

/// When the receiving side drains, the lane comes down with its confirmations told, and the next life is refused a socket.
#[tokio::test]
async fn draining_the_listener_brings_lanes_down() {
    let mut facing = Facing::start(Proof::Certificates, 64).await;
    let lane = facing.lane(1);
    facing.up().await;
    hand(&lane, vec![message(1)]);
    let (leg, n, _) = facing.stanza().await;
    facing.committed.committed(leg, n);
    assert_eq!(facing.confirmed().await, 1);
    let other = facing.other.clone();
    let draining = tokio::spawn(async move { other.drain(PATIENCE).await });
    facing.down().await;
    timeout(PATIENCE, draining).await.unwrap().unwrap();
    let _late = facing.lane(2);
    assert!(matches!(facing.down().await, DownReason::NotConnected { .. }));
}

/// Nobody can use up the listener: beyond 256 connections that have not authenticated, new ones are closed at once, and
/// when one of the old ones ends there is room again. Streams that have authenticated go on all the while.
#[tokio::test]
async fn unauthenticated_connections_are_bounded() {
    let mut facing = Facing::start(Proof::Dialback, 64).await;
    let lane = facing.lane(1);
    facing.up().await;

    // Both ends of a connection are ours, so their number must be known before the next one is made.
    let mut idle = Vec::new();
    let refused = loop {
        let mut tcp = TcpStream::connect(facing.other_address).await.unwrap();
        match probe(&mut tcp).await {
            true => idle.push(tcp),
            false => break idle.len(),
        }
        assert!(idle.len() <= 256);
    };
    // The streams of the dialback question may still be closing.
    assert!((250..=256).contains(&refused), "{refused}");

    hand(&lane, vec![message(1)]);
    assert_eq!(facing.stanza().await.1, 1);

    idle.clear();
    let _next = facing.lane(2);
    loop {
        match facing.event().await {
            LaneEvent::Up { life: 2, .. } => break,
            LaneEvent::Down { life: 2, .. } => drop(facing.lane(2)),
            LaneEvent::Up { .. } | LaneEvent::Down { .. } | LaneEvent::Confirmed { .. } => (),
        }
    }
}

/// Whether a stream header is answered.
async fn probe(tcp: &mut TcpStream) -> bool {
    let header = "<stream:stream xmlns='jabber:server' xmlns:stream='http://etherx.jabber.org/streams' \
                  to='b.example' from='a.example' version='1.0'>";
    let _ = tcp.write_all(header.as_bytes()).await;
    let mut answer = [0; 64];
    matches!(timeout(PATIENCE, tcp.read(&mut answer)).await.unwrap(), Ok(read) if read > 0)
}

/// Nobody listens there: the life ends with the address and the reason in it.
#[tokio::test]
async fn a_server_that_is_away_is_named() {
    let (identity, roots) = vouched("a.example");
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = closed.local_addr().unwrap();
    drop(closed);
    let near = context("b.example", "a.example", identity, roots, address);
    let (events_tx, mut events) = mpsc::channel(8);
    let _lane = lane::spawn(near, key(), 1, Arc::new(|_| Ok(())), events_tx);
    let Some(LaneEvent::Down { reason, .. }) = timeout(PATIENCE, events.recv()).await.unwrap() else {
        panic!("it cannot be up");
    };
    assert!(reason.to_string().contains(&address.to_string()), "{reason}");
    assert_eq!(reason.as_label(), "io");
}
