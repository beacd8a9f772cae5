//! Everything that users do in rooms and outside, through the pair, for both kinds of servers at both ends.

use narrows_lab::{
    Ejabberd, Profile, Prosody, ServerSpec,
    scenario::{WorldStage, acts},
};

use crate::stage::{in_company, pair, world};

fn play(name: &str, a: ServerSpec, b: ServerSpec) {
    let _company = in_company();
    let world = world(name, Profile::lan(), a.mam(), b, 0, pair());
    let stage = WorldStage::new(&world).archived();
    let recording = acts::play_all(&stage).unwrap_or_else(|failure| panic!("{name}: {failure}"));
    assert!(
        recording.stanzas() > 500,
        "{name}: only {} stanzas",
        recording.stanzas()
    );
    for site in [&world.a, &world.b] {
        let (_, status) = site.sidecar().http("/status").expect("the sidecar answers");
        let status: serde_json::Value = serde_json::from_str(&status).expect("/status is JSON");
        for direction in ["receiving", "initiating"] {
            let legs = status["legs"][direction].as_u64();
            assert!(legs > Some(0), "{name}: stanzas came and went, but {status}");
        }
    }
}

/// Rooms on Prosody, far users on ejabberd.
#[test]
fn acts_prosody_and_ejabberd() {
    play("ape", Prosody::stock(), Ejabberd::stock());
}

/// Rooms on ejabberd, far users on Prosody.
#[test]
fn acts_ejabberd_and_prosody() {
    play("aep", Ejabberd::stock(), Prosody::stock());
}

/// Prosody at both ends.
#[test]
fn acts_prosody_and_prosody() {
    play("app", Prosody::stock(), Prosody::stock());
}

/// ejabberd at both ends.
#[test]
fn acts_ejabberd_and_ejabberd() {
    play("aee", Ejabberd::stock(), Ejabberd::stock());
}
