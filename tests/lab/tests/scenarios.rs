//! The test of the tests: plain S2S between real servers passes every act, and two runs of it compare equal.
//!
//! If this fails, a pair of sidecars cannot be blamed for failing the same. `tests/all` plays one combination of servers; when
//! `tests/e2e` fails with another one, play that one here: `cargo test -p narrows-lab --test scenarios -- --ignored`.
//! Needs root and the packages of `tests/setup`.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use narrows_lab::load::{Crowd, speak, tally_all};
use narrows_lab::scenario::{Dice, Side, Stage, WorldStage, accounts, acts, recording};
use narrows_lab::transcript::{Heard, Recording, compare};
use narrows_lab::{Ejabberd, Layout, Limits, Profile, Prosody, ServerSpec, World};

/// Four servers starting at once would time out on two cores. Once they run, scenes mostly wait, so several may play.
static STARTING: Mutex<()> = Mutex::new(());

const SEEDS: [u64; 2] = [1, 2];

fn on_world(name: &str, a: ServerSpec, b: ServerSpec, scene: impl FnOnce(&World)) {
    let alone = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    let world = World::builder(name)
        .link(Profile::lan())
        .site_a(a.limits(Limits::ServersOnly))
        .site_b(b.limits(Limits::ServersOnly))
        .users_a(accounts(10))
        .users_b(accounts(10))
        .layout(Layout::Direct)
        .start()
        .expect("the world starts");
    drop(alone);
    scene(&world);
}

fn play_acts(name: &str, a: ServerSpec, b: ServerSpec) {
    on_world(name, a.mam(), b, |world| {
        let played = acts::play_all(&WorldStage::new(world).archived());
        let recording = played.unwrap_or_else(|failure| panic!("{name}: {failure}"));
        assert!(
            recording.stanzas() > 500,
            "{name}: only {} stanzas",
            recording.stanzas()
        );
    });
}

/// Records some seeds in a world of its own.
fn record(name: &str, a: ServerSpec, b: ServerSpec) -> Vec<Recording> {
    let mut recordings = Vec::new();
    on_world(name, a, b, |world| {
        for seed in SEEDS {
            let recorded = recording::recording(&WorldStage::new(world), seed, 60);
            let recorded = recorded.unwrap_or_else(|failure| panic!("{name}: {failure}"));
            assert!(recorded.stanzas() > 300, "{name}: only {} stanzas", recorded.stanzas());
            recordings.push(recorded);
        }
    });
    recordings
}

/// As a pair will be compared with plain S2S: each run with servers of its own.
fn record_twice(name: &str, a: ServerSpec, b: ServerSpec) {
    let first = record(&format!("{name}1"), a.clone(), b.clone());
    let second = record(&format!("{name}2"), a, b);
    for ((seed, first), second) in SEEDS.into_iter().zip(&first).zip(&second) {
        compare(first, second).unwrap_or_else(|differences| panic!("{name}, seed {seed}: {differences}"));
        damage_is_found(first, second, seed);
    }
}

/// The comparison of two real runs holds only as long as none of them is touched.
fn damage_is_found(first: &Recording, second: &Recording, seed: u64) {
    let mut dice = Dice::new(seed);
    for _ in 0..20 {
        let names: Vec<_> = second.clients.keys().collect();
        let name = (*dice.pick(&names)).clone();
        let place = dice.below(second.clients[&name].len());
        let damages: [fn(&mut Vec<Heard>, usize); 3] = [
            |heard, place| drop(heard.remove(place)),
            |heard, place| heard.insert(place, heard[place].clone()),
            |heard, place| {
                drop(
                    heard[place]
                        .stanza
                        .attrs
                        .insert("to".to_owned(), "eve@a.example".to_owned()),
                )
            },
        ];
        for damage in damages {
            let mut damaged = second.clone();
            damage(damaged.clients.get_mut(&name).expect("picked from its keys"), place);
            assert!(
                compare(first, &damaged).is_err(),
                "damage at {place} of {name} is not found"
            );
        }
    }
    // Two messages of one sender that change places.
    let is_text = |heard: &Heard| heard.stanza.name == "message" && heard.stanza.attr("type") == Some("groupchat");
    let mut damaged = second.clone();
    let heard = damaged.clients.get_mut("alice/pc").expect("she is always there");
    let pairs = (0..heard.len()).flat_map(|earlier| (earlier + 1..heard.len()).map(move |later| (earlier, later)));
    let swappable = |&(earlier, later): &(usize, usize)| {
        let (one, other): (&Heard, &Heard) = (&heard[earlier], &heard[later]);
        let same_sender = one.stanza.attr("from") == other.stanza.attr("from");
        is_text(one) && is_text(other) && same_sender && one.stanza.children != other.stanza.children
    };
    let (earlier, later) = pairs.into_iter().find(swappable).expect("somebody spoke twice");
    heard.swap(earlier, later);
    assert!(
        compare(first, &damaged).is_err(),
        "two messages have changed places unnoticed"
    );
}

/// Every act on the main combination: rooms on Prosody, far users on ejabberd.
#[test]
fn acts_prosody_and_ejabberd() {
    play_acts("ape", Prosody::stock(), Ejabberd::stock());
}

/// Every act the other way round.
#[test]
#[ignore = "tests/e2e plays the same through the pair; to tell whose fault a failure there is"]
fn acts_ejabberd_and_prosody() {
    play_acts("aep", Ejabberd::stock(), Prosody::stock());
}

/// Every act between servers of one kind.
#[test]
#[ignore = "tests/e2e plays the same through the pair; to tell whose fault a failure there is"]
fn acts_prosody_and_prosody() {
    play_acts("app", Prosody::stock(), Prosody::stock());
}

/// Every act between servers of the other kind.
#[test]
#[ignore = "tests/e2e plays the same through the pair; to tell whose fault a failure there is"]
fn acts_ejabberd_and_ejabberd() {
    play_acts("aee", Ejabberd::stock(), Ejabberd::stock());
}

/// The same seed on other servers of the same kinds is the same for every client.
#[test]
fn recordings_prosody_and_ejabberd() {
    record_twice("rpe", Prosody::stock(), Ejabberd::stock());
}

/// The same the other way round.
#[test]
#[ignore = "tests/e2e plays the same through the pair; to tell whose fault a failure there is"]
fn recordings_ejabberd_and_prosody() {
    record_twice("rep", Ejabberd::stock(), Prosody::stock());
}

/// A crowd joins and hears numbered messages from both sites, none lost, doubled or late.
#[test]
fn a_crowd_hears_everything() {
    on_world("crowd", Prosody::stock(), Ejabberd::stock(), |world| {
        let stage = WorldStage::new(world);
        let scene = || -> narrows_lab::client::Outcome {
            let alice = stage.connect(Side::A, "alice", "pc")?;
            let room = format!("crowd@{}", stage.rooms(Side::A));
            alice.join(&room, "alice", None, None)?;
            let form =
                "<query xmlns='http://jabber.org/protocol/muc#owner'><x xmlns='jabber:x:data' type='submit'/></query>";
            alice.expect("to be in", stage.patience(), |stanza| stanza.has_status("110"))?;
            alice.ask("set", &room, form, stage.patience())?;
            let crowd = Crowd::join(&stage, Side::B, &room, 10)?;
            for number in 1..=20 {
                speak(&alice, &room, number, "from the shore")?;
                speak(&crowd.members[0], &room, number, "from the ship")?;
            }
            for sender in ["alice", "u1"] {
                crowd.wait_for(sender, 20, stage.patience())?;
            }
            let sent = BTreeMap::from([("alice".to_owned(), 20), ("u1".to_owned(), 20)]);
            let tally = tally_all(&crowd.members, &sent);
            assert!(tally.is_clean() && tally.received == 400, "{tally}");
            Ok(())
        };
        scene().unwrap_or_else(|failure| panic!("{failure}"));
    });
}
