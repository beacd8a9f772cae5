use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

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
