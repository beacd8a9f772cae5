use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::{
    codec::{
        compress::dictionary_id,
        entry::{Cast, ENTRY_BYTES_MAX, Entry},
        frame::{self, Hello, Reason},
        position::{Epoch, Received, Seq},
    },
    link::session::{Input, LinkError, LinkSession, Output, Sent, SessionConfig},
    time::{Mono, Now, Wall},
};

struct Site {
    key: PrivateKey,
    _dir: tempfile::TempDir,
}

fn site() -> Site {
    let dir = tempfile::tempdir().unwrap();
    Site {
        key: PrivateKey::generate(&dir.path().join("key")).unwrap(),
        _dir: dir,
    }
}

fn peer(key: &PrivateKey, connect: Option<SocketAddr>) -> PeerConfig {
    PeerConfig {
        name: "peer".to_owned(),
        public_key: key.public(),
        connect: connect.map(|address| address.to_string()),
    }
}

fn quick() -> LinkTimes {
    LinkTimes {
        retry_min: Duration::from_millis(10),
        retry_max: Duration::from_millis(50),
        ..LinkTimes::default()
    }
}

fn anywhere() -> Option<SocketAddr> {
    Some(([127, 0, 0, 1], 0).into())
}

async fn listen(ours: &Site, theirs: &Site) -> (LinkListener, PeerLink) {
    let (listener, mut links) = start(anywhere(), &ours.key, &[peer(&theirs.key, None)], quick())
        .await
        .unwrap();
    (listener, links.remove(0))
}

async fn dialler(ours: &Site, theirs: &PrivateKey, at: SocketAddr) -> (LinkListener, PeerLink) {
    let (listener, mut links) = start(None, &ours.key, &[peer(theirs, Some(at))], quick())
        .await
        .unwrap();
    (listener, links.remove(0))
}

async fn up(link: &mut PeerLink) -> LinkConnection {
    loop {
        if let LinkEvent::Up(connection) = link.next_event().await {
            return *connection;
        }
    }
}

async fn send(connection: &mut LinkConnection, bytes: &'static [u8]) {
    connection.writer.ready().await.unwrap();
    connection.writer.start(Bytes::from_static(bytes));
    connection.writer.ready().await.unwrap();
}

/// Two ends that know each other's keys talk, and setting that up costs at most 800 bytes of TCP payload.
#[tokio::test]
async fn peers_talk() {
    let (ship, shore) = (site(), site());
    let (listener, mut shore_link) = listen(&shore, &ship).await;
    let (_ship, mut ship_link) = dialler(&ship, &shore.key, listener.address().unwrap()).await;
    ship_link.dial();
    let (mut a, mut b) = tokio::join!(up(&mut ship_link), up(&mut shore_link));
    assert!(a.info.peer.is(&shore.key.public()) && b.info.peer.is(&ship.key.public()));
    assert_eq!((a.info.dialled, b.info.dialled), (true, false));
    assert_eq!(a.info.dialled_by_smaller, b.info.dialled_by_smaller);
    send(&mut a, b"hello").await;
    assert_eq!(b.reader.read().await.unwrap().unwrap(), "hello");
    send(&mut b, b"and back").await;
    assert_eq!(a.reader.read().await.unwrap().unwrap(), "and back");
    let stats = a.writer.stats().unwrap();
    // Two records of 22 bytes around what was said, the rest is the handshake.
    let handshake = stats.bytes_sent + stats.bytes_received - (22 + 5) - (22 + 8);
    assert!((700..=800).contains(&handshake), "{handshake}");
    a.writer.shutdown().await.unwrap();
    assert_eq!(b.reader.read().await.unwrap(), None);
    let watch = a.writer.stats_handle();
    drop(a);
    assert_eq!(watch.stats(), None);
}

/// A client whose key is not configured is refused, counted, and told so.
#[tokio::test]
async fn unknown_key_is_refused() {
    let (ship, shore, stranger) = (site(), site(), site());
    let (listener, _shore_link) = listen(&shore, &ship).await;
    let (_s, mut link) = dialler(&stranger, &shore.key, listener.address().unwrap()).await;
    link.dial();
    let mut connection = up(&mut link).await;
    let error = connection.reader.read().await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
    assert_eq!(listener.counters().refused_unknown_key.value(), 1);
    assert_eq!(listener.counters().accepted.value(), 0);
}

/// A peer that is added may come in from then on and one that is removed no more; whoever is connected stays so meanwhile.
#[tokio::test]
async fn peers_come_and_go_while_others_talk() {
    let (ship, shore, north) = (site(), site(), site());
    let (listener, mut shore_link) = listen(&shore, &ship).await;
    let at = listener.address().unwrap();
    let (_ship, mut ship_link) = dialler(&ship, &shore.key, at).await;
    ship_link.dial();
    let (mut a, mut b) = tokio::join!(up(&mut ship_link), up(&mut shore_link));

    let mut north_link = listener.add(&peer(&north.key, None)).unwrap();
    let (_north, mut link) = dialler(&north, &shore.key, at).await;
    link.dial();
    let (c, d) = tokio::join!(up(&mut link), up(&mut north_link));
    assert!(d.info.peer.is(&north.key.public()));
    drop((c, d));

    listener.remove(&north.key.public()).unwrap();
    link.dial();
    let error = up(&mut link).await.reader.read().await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
    send(&mut a, b"still here").await;
    assert_eq!(b.reader.read().await.unwrap().unwrap(), "still here");
}

/// A server that cannot prove the pinned key is not talked to.
#[tokio::test]
async fn impostor_is_not_talked_to() {
    let (ship, shore, impostor) = (site(), site(), site());
    let (listener, _link) = listen(&impostor, &ship).await;
    let (_s, mut link) = dialler(&ship, &shore.key, listener.address().unwrap()).await;
    link.dial();
    let LinkEvent::DialFailed(error) = link.next_event().await else {
        panic!("it was talked to")
    };
    assert_eq!(error.as_label(), "handshake");
}

/// What is not TLS is dropped and counted, and does not keep peers out.
#[tokio::test]
async fn noise_is_refused() {
    let (ship, shore) = (site(), site());
    let (listener, mut shore_link) = listen(&shore, &ship).await;
    let mut noise = TcpStream::connect(listener.address().unwrap()).await.unwrap();
    noise.write_all(b"<stream:stream to='a.example'>").await.unwrap();
    let mut answer = Vec::new();
    // An alert and the end, or a reset.
    let _ = noise.read_to_end(&mut answer).await;
    assert_eq!(listener.counters().refused_handshake.value(), 1);
    let (_ship, mut ship_link) = dialler(&ship, &shore.key, listener.address().unwrap()).await;
    ship_link.dial();
    let _ = tokio::join!(up(&mut ship_link), up(&mut shore_link));
}

/// Beyond so many that prove nothing, further connections are closed at once.
#[tokio::test]
async fn unproven_connections_are_bounded() {
    let (ship, shore) = (site(), site());
    let (listener, _link) = listen(&shore, &ship).await;
    let mut idle = Vec::new();
    for _ in 0..UNPROVEN_MAX {
        idle.push(TcpStream::connect(listener.address().unwrap()).await.unwrap());
    }
    let mut extra = TcpStream::connect(listener.address().unwrap()).await.unwrap();
    assert_eq!(extra.read(&mut [0; 8]).await.unwrap_or(0), 0);
    assert_eq!(listener.counters().refused_busy.value(), 1);
}

/// A peer that is away is dialled until it is there; then again only when that is asked for.
#[tokio::test]
async fn dials_until_the_peer_is_there() {
    let (ship, shore) = (site(), site());
    // A port that is free again.
    let address = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let (_ship, mut ship_link) = dialler(&ship, &shore.key, address).await;
    ship_link.dial();
    let LinkEvent::DialFailed(error) = ship_link.next_event().await else {
        panic!("nobody is there")
    };
    assert_eq!(error.as_label(), "connect");
    let peers = [peer(&ship.key, None)];
    let (listener, mut links) = start(Some(address), &shore.key, &peers, quick()).await.unwrap();
    let (first, _) = tokio::join!(up(&mut ship_link), up(&mut links[0]));
    drop(first);
    ship_link.dial();
    let _ = tokio::join!(up(&mut ship_link), up(&mut links[0]));
    assert_eq!(listener.counters().accepted.value(), 2);
}

/// A peer that does not read is not written to without end: the writer is ready only while little is unsent.
#[tokio::test]
async fn batches_wait_for_the_kernel() {
    let (ship, shore) = (site(), site());
    let (listener, mut shore_link) = listen(&shore, &ship).await;
    let (_ship, mut ship_link) = dialler(&ship, &shore.key, listener.address().unwrap()).await;
    ship_link.dial();
    let (mut a, mut b) = tokio::join!(up(&mut ship_link), up(&mut shore_link));
    let batch = Bytes::from(vec![7u8; 4096]);
    let mut written = 0usize;
    // Nobody reads at the other end: once its buffer is full, `ready` has nothing to be ready for.
    loop {
        tokio::select! {
            biased;
            ready = a.writer.ready() => {
                ready.unwrap();
                assert!(a.writer.stats().unwrap().unsent_bytes <= 2048);
                a.writer.start(batch.clone());
                written += batch.len();
            }
            () = time::sleep(Duration::from_millis(300)) => break,
        }
    }
    // When it reads again, all of it arrives, and the writer is ready again.
    let read_all = async {
        let mut read = 0;
        while read < written {
            read += b.reader.read().await.unwrap().unwrap().len();
        }
    };
    let (ready, ()) = tokio::join!(a.writer.ready(), read_all);
    ready.unwrap();
    assert!(!a.writer.is_busy());
}

/// Of two connections that were dialled at once both ends keep the same; otherwise the new one stays.
#[test]
fn both_ends_keep_the_same_connection() {
    let now = Instant::now();
    let key = site().key.public();
    let info = |dialled, dialled_by_smaller, after| LinkInfo {
        peer: key,
        address: ([127, 0, 0, 1], 1).into(),
        dialled,
        dialled_by_smaller,
        up_since: now + Duration::from_secs(after),
    };
    let times = LinkTimes::default();
    // The smaller end sees its own dial first, the larger end sees its own first: both keep what the smaller dialled.
    assert_eq!(
        survivor(&info(true, true, 0), false, &info(false, false, 1), &times),
        Survivor::Old
    );
    assert_eq!(
        survivor(&info(true, false, 0), false, &info(false, true, 1), &times),
        Survivor::New
    );
    // The same dialler comes again, the old one is old, or it is in doubt.
    assert_eq!(
        survivor(&info(true, true, 0), false, &info(true, true, 1), &times),
        Survivor::New
    );
    assert_eq!(
        survivor(&info(true, true, 0), false, &info(false, false, 10), &times),
        Survivor::New
    );
    assert_eq!(
        survivor(&info(true, true, 0), true, &info(false, false, 1), &times),
        Survivor::New
    );
}

/// What a relay does with a session and a connection, without its stores: entries 1..=count go out, what comes in is kept.
struct MiniRelay {
    epoch: u64,
    count: u64,
    stored: Received,
    inbox: Vec<(Seq, Bytes)>,
    acked: Seq,
}

impl MiniRelay {
    fn new(epoch: u64, count: u64) -> Self {
        Self {
            epoch,
            count,
            stored: Received::default(),
            inbox: Vec::new(),
            acked: Seq(0),
        }
    }

    fn hello(&self) -> Hello {
        Hello {
            version: frame::VERSION,
            capabilities: 0,
            epoch: Epoch(self.epoch),
            received: self.stored.clone(),
            first_unacked: Seq(self.acked.0 + 1),
            last: Seq(self.count),
            site: None,
            dictionary: dictionary_id(),
            entry_bytes_max: ENTRY_BYTES_MAX as u64,
            ack_delay_ms: 50,
        }
    }

    fn entry(seq: u64) -> Entry {
        let template = format!("<message><body>{}</body></message>", "line ".repeat(seq as usize % 700));
        let recipients = vec![Bytes::from_static(b" to='b@b.example'")];
        Entry::Cast(Cast {
            template: template.into(),
            to_at: 8,
            recipients,
        })
    }

    /// Runs one connection until `enough` has arrived and all of ours is acknowledged, or until it breaks.
    async fn run(&mut self, connection: LinkConnection, enough: usize) -> Result<(), LinkError> {
        let LinkConnection {
            mut reader, mut writer, ..
        } = connection;
        let start = Instant::now();
        let now = || Now {
            mono: Mono::from_start(start.elapsed()),
            wall: Wall(0),
        };
        let config = SessionConfig {
            ack_delay: Duration::from_millis(50),
            ..SessionConfig::default()
        };
        let mut session = LinkSession::new(config, self.hello(), now());
        let (mut next, mut offset, mut blocked) = (self.acked.0 + 1, 0, false);
        while self.inbox.len() < enough || self.acked.0 < self.count || writer.is_busy() {
            let deadline = session.poll_timeout().map(|deadline| start + deadline.at.since_start());
            let more = session.is_open() && next <= self.count && !blocked;
            tokio::select! {
                read = reader.read() => match read {
                    Ok(Some(bytes)) => session.handle(Input::Bytes(bytes), now())?,
                    Ok(None) | Err(_) => return Ok(()),
                },
                ready = writer.ready(), if writer.is_busy() || more || session.wants_transmit(now()) => {
                    if ready.is_err() {
                        return Ok(());
                    }
                    // One entry or piece a batch: what goes next is decided when the socket asks.
                    while session.batch_bytes() == 0 && session.is_open() && next <= self.count {
                        let entry = Self::entry(next);
                        match session.send(Seq(next), &entry, Duration::ZERO) {
                            Sent::Whole | Sent::Known => next += 1,
                            Sent::NeedsFragments => {
                                let encoded = entry.encode();
                                offset += session.send_fragment(Seq(next), &encoded, offset, Duration::ZERO);
                                if offset == encoded.len() {
                                    (next, offset) = (next + 1, 0);
                                }
                            }
                            Sent::BatchFull | Sent::Blocked | Sent::Refused => {
                                blocked = true;
                                break;
                            }
                        }
                    }
                    if let Some(batch) = session.poll_transmit(now()) {
                        writer.start(batch);
                    }
                }
                () = time::sleep_until(deadline.unwrap_or(start).into()), if deadline.is_some() => {
                    session.handle(Input::Timeout, now())?;
                }
            }
            while let Some(output) = session.poll_output() {
                match output {
                    Output::PeerHello { received, .. } => self.stored = received,
                    Output::Received { seq, entry, .. } => {
                        self.inbox.push((seq, entry));
                        self.stored.add(seq);
                    }
                    Output::Acked(acked) => (self.acked, blocked) = (acked.upto, false),
                    Output::Quiet | Output::Alive | Output::Goodbye(_) => {}
                }
            }
            session.handle(Input::Stored(self.stored.clone()), now())?;
        }
        // Our own last acknowledgement may still be owed to the other end.
        session.goodbye(Reason::Shutdown);
        if let (Ok(_), Some(batch)) = (writer.ready().await, session.poll_transmit(now())) {
            writer.start(batch);
        }
        let _ = writer.shutdown().await;
        Ok(())
    }
}

/// Entries, large ones among them, cross real connections both ways while those are cut again and again: each arrives once,
/// and as it was.
#[tokio::test]
async fn entries_survive_cut_connections() {
    let (ship, shore) = (site(), site());
    let (listener, mut shore_link) = listen(&shore, &ship).await;
    let (_ship, mut ship_link) = dialler(&ship, &shore.key, listener.address().unwrap()).await;
    let (mut a, mut b) = (MiniRelay::new(1, 400), MiniRelay::new(2, 300));
    let (mut slice, mut cuts) = (Duration::from_millis(2), 0);
    while a.inbox.len() < 300 || b.inbox.len() < 400 {
        ship_link.dial();
        let (ours, theirs) = tokio::join!(up(&mut ship_link), up(&mut shore_link));
        // At first both are dropped in the middle of it, as if killed, and what they had not stored is not there.
        let both = async { tokio::join!(a.run(ours, 300), b.run(theirs, 400)) };
        match time::timeout(slice, both).await {
            Ok((ours, theirs)) => {
                ours.unwrap();
                theirs.unwrap();
            }
            Err(_) => cuts += 1,
        }
        slice *= 2;
    }
    assert!(cuts > 0);
    for (relay, count) in [(&a, 300), (&b, 400)] {
        let mut inbox = relay.inbox.clone();
        inbox.sort();
        let expected: Vec<_> = (1..=count)
            .map(|seq| (Seq(seq), MiniRelay::entry(seq).encode()))
            .collect();
        assert!(inbox == expected, "{} of {count} arrived", inbox.len());
    }
}
