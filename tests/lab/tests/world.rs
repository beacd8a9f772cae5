//! Worlds come and go without leaving anything behind, and their sites see only each other.
//!
//! Each test needs root and the packages of `tests/setup`, and fails without them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use base64::Engine as _;
use narrows_lab::net::wait_for;
use narrows_lab::{Capture, Ejabberd, Layout, Limits, Profile, Prosody, SidecarSpec, Site, Trust, Vouched, Way, World};

/// Bounds a read that would otherwise wait for ever when a test fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// Sends numbered datagrams from A to B and says which arrived, in their order.
fn datagrams(world: &World, numbers: std::ops::Range<u8>) -> Vec<u8> {
    let to = SocketAddr::from((world.b.address(), 7777));
    let receiver = world
        .b
        .enter(|| UdpSocket::bind(to))
        .expect("B is entered")
        .expect("B binds");
    receiver
        .set_read_timeout(Some(Duration::from_secs(1)))
        .expect("a timeout can be set");
    let sender = world
        .a
        .enter(|| UdpSocket::bind("0.0.0.0:0"))
        .expect("A is entered")
        .expect("A binds");
    for number in numbers {
        sender.send_to(&[number; 100], to).expect("A sends");
    }
    let mut buffer = [0; 200];
    std::iter::from_fn(|| receiver.recv(&mut buffer).ok().map(|_| buffer[0])).collect()
}

/// Packets cross in order and are counted with their headers; none crosses a cut link.
#[test]
fn packets_cross_unless_the_link_is_cut() {
    let world = World::new("cut", Profile::lan()).expect("the world starts");
    let capture = Capture::begin(&world.link);
    assert_eq!(datagrams(&world, 0..10), (0..10).collect::<Vec<_>>());
    // 20 bytes of IP and 8 of UDP each.
    assert_eq!(capture.bytes_each_way(), (1280, 0));
    assert_eq!(capture.packets(), 10);

    world.link.down();
    assert!(!world.link.is_up());
    assert_eq!(datagrams(&world, 10..20), []);
    world.link.up();
    assert_eq!(datagrams(&world, 20..30), (20..30).collect::<Vec<_>>());

    let stats = world.link.reset();
    assert_eq!(stats.a_to_b.dropped_down.packets, 10);
    assert_eq!(world.link.stats().sent_packets(), 0);
}

/// A packet in flight is lost by a cut, as the wire's own tests say, also between real devices.
#[test]
fn a_cut_loses_what_is_in_flight() {
    let world = World::new(
        "flight",
        Profile::both(Way {
            delay: PATIENCE,
            ..Way::default()
        }),
    )
    .expect("the world starts");
    assert_eq!(datagrams(&world, 0..3), []);
    world.link.down();
    world.link.set(Profile::lan());
    world.link.up();
    assert_eq!(datagrams(&world, 3..6), [3, 4, 5]);
    assert_eq!(world.link.stats().a_to_b.dropped_down.packets, 3);
}

/// Two worlds use the same addresses and do not meet.
#[test]
fn worlds_do_not_meet() {
    let one = World::new("one", Profile::lan()).expect("the first world starts");
    let two = World::new("two", Profile::lan()).expect("the second world starts");
    one.link.down();
    assert_eq!(datagrams(&two, 0..3), [0, 1, 2]);
    assert_eq!(datagrams(&one, 0..3), []);
    assert_eq!(one.link.stats().a_to_b.offered.packets, 3);
}

/// Everything of a world is gone when it is dropped, processes that were started inside included.
#[test]
fn a_dropped_world_leaves_nothing() {
    let world = World::new("drop", Profile::lan()).expect("the world starts");
    let dir = world.dir().to_owned();
    let namespace = Path::new("/run/netns").join(world.a.namespace().name());
    assert!(dir.exists() && namespace.exists());
    let mut child = world
        .a
        .command("sleep")
        .expect("A takes commands")
        .arg("600")
        .spawn()
        .expect("it starts");
    drop(world);
    child.wait().expect("it was ended");
    assert!(!dir.exists() && !namespace.exists());
}

/// A maker that is killed leaves nothing either: its guard notices.
///
/// Run the lab's own program with an ejabberd, whose epmd leaves its session, and kill it.
#[test]
fn a_killed_maker_leaves_nothing() {
    let mut maker = Command::new(env!("CARGO_BIN_EXE_narrows-lab"))
        .args(["up", "a=ejabberd"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the maker starts");
    let mut lines = BufReader::new(maker.stdout.take().expect("its output is ours")).lines();
    let first = lines.next().expect("it says something").expect("it says text");
    let dir = first
        .strip_prefix("files: ")
        .expect("it says where its files are")
        .to_owned();
    assert!(lines.any(|line| line.is_ok_and(|line| line == "Enter ends it.")));
    let namespace = format!("nw{}-up-a", maker.id());
    let inside = || {
        let pids = Command::new("ip")
            .args(["netns", "pids", &namespace])
            .output()
            .expect("ip runs")
            .stdout;
        String::from_utf8(pids).expect("pids are numbers")
    };
    assert!(inside().lines().count() > 1, "a server and a name server run inside");
    maker.kill().expect("the maker is killed");
    maker.wait().expect("the maker is gone");
    let gone = || !Path::new(&dir).exists() && !Path::new("/run/netns").join(&namespace).exists();
    wait_for("the guard cleans up", PATIENCE, gone, || Ok(())).expect("nothing is left");
    assert_eq!(inside(), "");
}

/// In a sidecar layout each server finds the far domains at the sidecar beside it, and sidecars are started,
/// ended and asked like the real one.
///
/// A stand-in counts the connections that come when a user writes to the far site.
#[test]
fn a_sidecar_layout_leads_to_the_sidecar() {
    let stand_in = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/stand-in");
    let world = World::builder("side")
        .site_a(Prosody::stock())
        .site_b(Ejabberd::stock())
        .users_a(["alice"])
        .users_b(["bob"])
        .layout(Layout::Sidecar(SidecarSpec::new(stand_in).yaml("legs", "lanes: 1")))
        .start()
        .expect("the world starts");
    for (site, user, far) in [
        (&world.a, "alice", "b.example"),
        (&world.b, "bob", "conference.a.example"),
    ] {
        let legs = || site.sidecar().metrics().expect("it has metrics").sum("legs_total", &[]);
        assert_eq!(legs(), 0.0);
        let mut stream = log_in(site, user, narrows_lab::PASSWORD).expect("the password is right");
        let stanzas = format!(
            "<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' version='1.0' to='{}'>\
             <iq type='set' id='b'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>\
             <message to='someone@{far}'><body>over there?</body></message>",
            site.domain()
        );
        stream.write_all(stanzas.as_bytes()).expect("the server reads");
        wait_for("a leg", PATIENCE, || legs() > 0.0, || Ok(())).expect("the server finds the sidecar");
        let config = std::fs::read_to_string(site.sidecar().config_path()).expect("there is a configuration");
        assert!(config.contains("\n  lanes: 1\n"), "{config}");
    }
    assert_eq!(world.link.stats().sent_packets(), 0, "nothing leads across the link");

    let first = world.a.sidecar().pid();
    world.a.sidecar().kill9().expect("it is killed");
    world.a.sidecar().start_again().expect("it starts again");
    assert_ne!(world.a.sidecar().pid(), first);
    let status = world.a.sidecar().term().expect("it ends in time").expect("it ran");
    assert!(status.success());
}

/// A stopped server comes back with its accounts, and so does a killed one.
#[test]
fn servers_come_back() {
    let world = World::builder("back")
        .site_a(
            Prosody::stock()
                .limits(Limits::ServersOnly)
                .mam()
                .room_option("muc_room_default_public", "true"),
        )
        .site_b(
            Ejabberd::stock()
                .limits(Limits::ServersOnly)
                .mam()
                .room_option("public", "true"),
        )
        .users_a(["alice"])
        .users_b(["bob"])
        .trust(Trust::AsShipped)
        .certificates(Vouched::ByNobody)
        .start()
        .expect("the world starts");
    for (site, user) in [(&world.a, "alice"), (&world.b, "bob")] {
        assert!(logs_in(site, user, narrows_lab::PASSWORD));
        let first = site.server().pid();
        site.server().restart().expect("it restarts");
        assert!(logs_in(site, user, narrows_lab::PASSWORD));
        site.server().kill9().expect("it is killed");
        assert_eq!(site.server().pid(), None);
        site.server().start_again().expect("it starts again");
        assert!(logs_in(site, user, narrows_lab::PASSWORD));
        assert!(!logs_in(site, user, "wrong"));
        assert_ne!(site.server().pid(), first);
    }
}

fn logs_in(site: &Site, user: &str, password: &str) -> bool {
    log_in(site, user, password).is_some()
}

/// A client's stream after SASL PLAIN (RFC 6120 §6), if the password is right.
fn log_in(site: &Site, user: &str, password: &str) -> Option<TcpStream> {
    let mut stream = site
        .connect_tcp(narrows_lab::C2S_PORT)
        .expect("the client port accepts");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
    let plain = base64::engine::general_purpose::STANDARD.encode(format!("\0{user}\0{password}"));
    let domain = site.domain();
    // Always in one piece: ejabberd sometimes forgets a client whose header comes in several.
    let header = format!(
        "<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' version='1.0' to='{domain}'>"
    );
    stream.write_all(header.as_bytes()).expect("the server reads");
    let (mut seen, mut buffer) = (String::new(), [0; 4096]);
    let mut wait_for_either = |stream: &mut TcpStream, one: &str, other: &str| {
        while !seen.contains(one) && !seen.contains(other) {
            match stream.read(&mut buffer) {
                Ok(length) if length > 0 => seen += &String::from_utf8_lossy(&buffer[..length]),
                end => panic!("neither {one} nor {other} ({end:?}): {seen}"),
            }
        }
        seen.contains(one)
    };
    assert!(wait_for_either(&mut stream, "</stream:features>", "</stream:stream>"));
    let auth = format!("<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>{plain}</auth>");
    stream.write_all(auth.as_bytes()).expect("the server reads");
    wait_for_either(&mut stream, "<success", "<failure").then_some(stream)
}
