//! The lab's own foundation: real servers of either kind at either site talk plain S2S across the link.
//!
//! Each test needs root and the packages of `tests/setup`, and fails without them.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Mutex;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use narrows_lab::{Ejabberd, Layout, PASSWORD, Profile, Prosody, Site, Trust, Vouched, World, WorldBuilder};

/// Four servers starting at once would time out on two cores.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Longer than any server's start-up of a new S2S stream here.
const PATIENCE: Duration = Duration::from_secs(30);

/// A client of a few fixed stanzas; scenarios have a better one.
struct RawClient {
    stream: TcpStream,
    seen: String,
}

impl RawClient {
    /// Logs in with SASL PLAIN (RFC 6120 §6) and becomes available.
    fn login(site: &Site, user: &str) -> Self {
        let stream = site
            .connect_tcp(narrows_lab::C2S_PORT)
            .expect("the client port accepts");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
        let mut client = Self {
            stream,
            seen: String::new(),
        };
        let header = format!(
            "<?xml version='1.0'?><stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' \
             version='1.0' to='{}'>",
            site.domain()
        );
        client.send(&header);
        client.wait_for("</stream:features>");
        let plain = STANDARD.encode(format!("\0{user}\0{PASSWORD}"));
        client.send(&format!(
            "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>{plain}</auth>"
        ));
        client.wait_for("<success");
        client.send(&header);
        client.wait_for("</stream:features>");
        client.send(
            "<iq type='set' id='bind'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'><resource>r</resource></bind></iq>",
        );
        client.wait_for("</iq>");
        client.send("<presence/>");
        client.wait_for("<presence");
        client
    }

    fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).expect("the server reads");
    }

    /// Reads until that text has come, and forgets what came up to it.
    fn wait_for(&mut self, text: &str) {
        let mut buffer = [0; 4096];
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            let length = match self.stream.read(&mut buffer) {
                Ok(length) if length > 0 => length,
                end => panic!("{text:?} did not come ({end:?}); instead: {}", self.seen),
            };
            self.seen.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
    }
}

fn message(to: &str, text: &str) -> String {
    format!("<message to='{to}' type='chat' id='{text}'><body>{text}</body></message>")
}

/// A message crosses in each direction, and all of it is seen on the link.
fn messages_cross(builder: WorldBuilder) {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let world = builder
        .link(Profile::lan())
        .users_a(["alice"])
        .users_b(["bob", "b.ob-2"])
        .layout(Layout::Direct)
        .start()
        .expect("the world starts");
    let mut alice = RawClient::login(&world.a, "alice");
    let mut bob = RawClient::login(&world.b, "bob");
    RawClient::login(&world.b, "b.ob-2");

    alice.send(&message("bob@b.example/r", "over-there"));
    bob.wait_for("<body>over-there</body>");
    bob.send(&message("alice@a.example/r", "and-back"));
    alice.wait_for("<body>and-back</body>");

    let stats = world.link.stats();
    assert!(
        stats.a_to_b.port(5269).bytes > 1000,
        "S2S did not use the link: {stats:?}"
    );
    assert!(
        stats.b_to_a.port(5269).bytes > 1000,
        "S2S did not use the link: {stats:?}"
    );
}

/// Rooms' site on Prosody, far site on ejabberd: the main combination.
#[test]
fn prosody_and_ejabberd() {
    messages_cross(World::builder("pe").site_a(Prosody::stock()).site_b(Ejabberd::stock()));
}

/// Rooms' site on ejabberd, far site on Prosody.
#[test]
fn ejabberd_and_prosody() {
    messages_cross(World::builder("ep").site_a(Ejabberd::stock()).site_b(Prosody::stock()));
}

/// Two Prosodys beside each other do not share data or ports.
#[test]
fn prosody_and_prosody() {
    messages_cross(World::builder("pp").site_a(Prosody::stock()).site_b(Prosody::stock()));
}

/// Two ejabberds beside each other do not share node names, cookies or epmd.
#[test]
fn ejabberd_and_ejabberd() {
    messages_cross(World::builder("ee").site_a(Ejabberd::stock()).site_b(Ejabberd::stock()));
}

/// Without any CA the servers agree by dialback (XEP-0220), where Prosody is told that it may.
#[test]
fn dialback_without_a_ca() {
    let lenient = Prosody::stock().insecure_domains(["b.example", "conference.b.example"]);
    messages_cross(
        World::builder("db")
            .site_a(lenient)
            .site_b(Ejabberd::stock())
            .certificates(Vouched::ByNobody)
            .trust(Trust::AsShipped),
    );
}

/// Prosody as shipped refuses a server that nobody vouches for: `s2s_secure_auth` is in force here.
#[test]
fn shipped_prosody_refuses_a_self_signed_server() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let world = World::builder("sec")
        .site_a(Prosody::stock())
        .site_b(Prosody::stock())
        .users_a(["alice"])
        .certificates(Vouched::ByNobody)
        .trust(Trust::AsShipped)
        .start()
        .expect("the world starts");
    let mut alice = RawClient::login(&world.a, "alice");
    alice.send(&message("bob@b.example/r", "refused"));
    alice.wait_for("type='error'");
    alice.wait_for("</message>");
}
