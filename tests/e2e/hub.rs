//! Two sites behind links of their own, with users in one room: each has a mirror of it, and neither notices the other's link.

use std::{
    collections::BTreeSet,
    thread::sleep,
    time::{Duration, Instant},
};

use narrows_lab::{
    C2S_PORT, Ejabberd, Layout, Limits, PASSWORD, Profile, Prosody, ServerSpec, Site, World,
    client::{Client, Failure, MUC_ADMIN, Outcome},
    scenario::{Side, Stage, WorldStage, accounts},
};

use crate::{
    cast::{enter, make_room, sign_in},
    faults::{held_pair, unthrottled},
    seen::{PATIENCE, heard_times, hears, presence_of, sees, was_put_out},
    stage::in_company,
};

const HOLD: Duration = Duration::from_secs(4);

/// Words of which it is counted how often they cross each link.
const WORDS: usize = 5;

fn three_sites(name: &str, a: ServerSpec, b: ServerSpec, c: ServerSpec) -> World {
    // Copies that a busy machine writes late are waited for: `one_copy.rs` says why.
    let spec = held_pair()
        .yaml("mirror", &format!("split: {{ hold: {}s }}", HOLD.as_secs()))
        .yaml("queue", "collapse_window: 2s");
    let [a, b, c] = [a, b, c].map(|server| unthrottled(server).limits(Limits::ServersOnly));
    World::builder(name)
        .link(Profile::lan())
        .site_a(a)
        .site_b(b)
        .site_c(c.unlimited_from(["a.example", "conference.a.example"]))
        .users_a(accounts(0))
        .users_b(accounts(0))
        .users_c(["c1", "c2", "c3"])
        .layout(Layout::Sidecar(spec))
        .start()
        .unwrap_or_else(|error| panic!("the world {name} does not start: {error}"))
}

fn sign_in_at(site: &Site, user: &str) -> Outcome<Client> {
    let bare = format!("{user}@{}", site.domain());
    let client = Client::connect(site.connect_tcp(C2S_PORT)?, &bare, PASSWORD, "cast")?;
    client.presence("")?;
    Ok(client)
}

/// A sidecar brings its metrics up to date once a second.
const METRICS_AFTER: Duration = Duration::from_millis(1500);

/// What A has sent to each of its peers when nothing is under way: casts and copies.
fn sent(world: &World) -> Outcome<Vec<(f64, f64)>> {
    let deadline = Instant::now() + PATIENCE;
    let mut last = sent_so_far(world)?;
    loop {
        sleep(METRICS_AFTER);
        let now = sent_so_far(world)?;
        if now == last {
            return Ok(now);
        }
        if Instant::now() > deadline {
            return Err(Failure(format!("there is always something to send: {now:?}")));
        }
        last = now;
    }
}

fn sent_so_far(world: &World) -> Outcome<Vec<(f64, f64)>> {
    let metrics = world.a.sidecar().metrics()?;
    let peers = ["ship", "island"].iter().map(|peer| {
        let peer = format!("peer=\"{peer}\"");
        let labels = ["direction=\"sent\"", &peer];
        let count = |name| metrics.sum(name, &labels);
        (count("narrows_casts_total"), count("narrows_copies_total"))
    });
    Ok(peers.collect())
}

/// Users of three sites talk; one link is lost for longer than `mirror.split.hold`, the other is not.
fn two_mirrors(name: &str, a: ServerSpec, b: ServerSpec, c: ServerSpec) {
    let _company = in_company();
    let world = &three_sites(name, a, b, c);
    let play = || -> Outcome {
        let stage = WorldStage::new(world);
        let (island, _) = world.c.as_ref().ok_or_else(|| Failure("there is no C".to_owned()))?;
        let room = format!("deck@{}", stage.rooms(Side::A));
        let nick = |nick: &str| format!("{room}/{nick}");
        let alice = &sign_in(&stage, Side::A, "alice")?;
        make_room(&stage, alice, &room)?;
        let adam = &sign_in(&stage, Side::A, "adam")?;
        let [b1, b2, b3] = &["b1", "b2", "b3"].map(|user| sign_in(&stage, Side::B, user));
        let [c1, c2, c3] = &["c1", "c2", "c3"].map(|user| sign_in_at(island, user));
        let [Ok(b1), Ok(b2), Ok(b3), Ok(c1), Ok(c2), Ok(c3)] = [b1, b2, b3, c1, c2, c3] else {
            return Err(Failure(format!("{b1:?} {b2:?} {b3:?} {c1:?} {c2:?} {c3:?}")));
        };
        for client in [adam, b1, b2, c1, c2] {
            enter(&stage, client, &room)?;
        }
        let inside = [alice, adam, b1, b2, c1, c2];
        let everybody = |nicks: &[&str]| {
            nicks
                .iter()
                .map(|nick| (*nick).to_owned())
                .collect::<BTreeSet<String>>()
        };
        for client in inside {
            sees(client, &room, &everybody(&["alice", "adam", "b1", "b2", "c1", "c2"]))?;
        }
        let mut said = Vec::new();
        let say = |client: &Client, body: &str, hearers: &[&Client]| -> Outcome {
            client.groupchat(&room, body)?;
            hearers.iter().try_for_each(|hearer| hears(hearer, body))
        };
        for (client, body) in [
            (alice, "from the shore"),
            (b1, "from the ship"),
            (c1, "from the island"),
        ] {
            say(client, body, &inside)?;
            said.push(body);
        }

        // Each word crosses each link once, for both who are behind it.
        let before = sent(world)?;
        for word in 0..WORDS {
            say(alice, &format!("word {word}"), &inside)?;
        }
        let grown: Vec<(f64, f64)> = sent(world)?
            .into_iter()
            .zip(before)
            .map(|(after, before)| (after.0 - before.0, after.1 - before.1))
            .collect();
        if grown != [(WORDS as f64, 2.0 * WORDS as f64); 2] {
            return Err(Failure(format!("casts and copies of {WORDS} words: {grown:?}")));
        }

        // Who is behind one link is seen behind the other, as he comes, changes and goes.
        enter(&stage, b3, &room)?;
        enter(&stage, c3, &room)?;
        b1.presence_to(&nick("bo"), "", "")?;
        for client in [alice, adam, b1, b2, b3, c1, c2, c3] {
            presence_of(client, "the new nick", &nick("bo"), "", PATIENCE)?;
        }
        let kick = format!("<query xmlns='{MUC_ADMIN}'><item nick='c3' role='none'/></query>");
        let kicked = alice.ask("set", &room, &kick, PATIENCE)?;
        if kicked.kind() != "result" {
            return Err(Failure(format!("the kick: {}", kicked.raw)));
        }
        for client in [alice, adam, b1, b2, b3, c1, c2, c3] {
            let out = presence_of(client, "the kick", &nick("c3"), "unavailable", PATIENCE)?;
            if !out.has_status("307") {
                return Err(Failure(format!("{} is told: {}", client.user(), out.raw)));
            }
        }
        let at_a_and_c = [alice, adam, c1, c2];
        let at_b = [b1, b2, b3];

        world.link.down();
        // That the link is gone is noticed by whom it owes an answer.
        b1.groupchat(&room, "anybody?")?;
        say(alice, "is the ship there?", &at_a_and_c)?;
        for client in at_b {
            for far in ["alice", "adam", "c1", "c2"] {
                let what = format!("that {far} is gone");
                let gone = presence_of(client, &what, &nick(far), "unavailable", HOLD + PATIENCE)?;
                if !gone.has_status("333") {
                    return Err(Failure(format!("not because of the link: {}", gone.raw)));
                }
            }
        }
        for client in at_a_and_c {
            for far in ["bo", "b2", "b3"] {
                let away = |stanza: &narrows_lab::client::Stanza| {
                    stanza.is_presence() && stanza.from() == nick(far) && stanza.raw.contains("<show>away</show>")
                };
                client.expect(&format!("that {far} is away"), HOLD + PATIENCE, away)?;
            }
        }
        say(alice, "can the island hear us?", &at_a_and_c)?;
        say(c1, "it can", &at_a_and_c)?;
        say(b1, "we are alone", &at_b)?;
        said.extend([
            "anybody?",
            "is the ship there?",
            "can the island hear us?",
            "it can",
            "we are alone",
        ]);
        c2.leave(&room, "c2", "")?;
        for client in at_a_and_c {
            presence_of(client, "that c2 has left", &nick("c2"), "unavailable", PATIENCE)?;
        }
        b3.leave(&room, "b3", "")?;
        for client in at_b {
            presence_of(client, "that b3 has left", &nick("b3"), "unavailable", PATIENCE)?;
        }

        world.link.up();
        let rest = [alice, adam, b1, b2, c1];
        for client in rest {
            for body in &said[3..] {
                // Those who were together have it already.
                if heard_times(client, body) == 0 {
                    hears(client, body)?;
                }
            }
            sees(client, &room, &everybody(&["alice", "adam", "bo", "b2", "c1"]))?;
        }
        for (client, body) in [(b1, "the ship again"), (c1, "welcome")] {
            say(client, body, &rest)?;
            said.push(body);
        }
        for client in rest {
            if was_put_out(client) && client.user() != "b1" {
                return Err(Failure(format!("{} was put out", client.user())));
            }
            for body in &said {
                let times = heard_times(client, body);
                if times != 1 {
                    return Err(Failure(format!("{} heard {body:?} {times} times", client.user())));
                }
            }
        }
        // His own change of nick (303) told him that he is no longer there under the old one, and nothing else has.
        let told_out = |stanza: &narrows_lab::client::Stanza| {
            stanza.is_presence()
                && stanza.kind() == "unavailable"
                && stanza.has_status("110")
                && !stanza.has_status("303")
        };
        match b1.transcript().iter().find(|stanza| told_out(stanza)) {
            Some(out) => Err(Failure(format!("b1 was put out: {}", out.raw))),
            None => Ok(()),
        }
    };
    play().unwrap_or_else(|failure| panic!("{name}: {failure}"));
}

/// The room on Prosody.
#[test]
fn two_mirrors_of_prosody() {
    two_mirrors("hp", Prosody::stock(), Ejabberd::stock(), Prosody::stock());
}

/// The room on ejabberd.
#[test]
fn two_mirrors_of_ejabberd() {
    two_mirrors("he", Ejabberd::stock(), Prosody::stock(), Ejabberd::stock());
}
