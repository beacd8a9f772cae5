//! What nine clients receive through the pair equals what they receive over plain S2S (P1).
//!
//! A seeded scenario is played twice on the same kinds of servers: first with plain S2S between them, then through the pair.
//! Each client's transcript, with what servers make up masked, must be the same multiset, in the same order per sender.
//! `NARROWS_E2E_SEED=n` plays only that seed.

use std::panic::resume_unwind;

use narrows_lab::{
    Ejabberd, Layout, Profile, Prosody, ServerSpec, World,
    client::{Failure, Outcome},
    scenario::{WorldStage, recording},
    transcript::{Recording, compare},
};

use crate::{
    faults::seed_to_replay,
    stage::{in_company, pair, world},
};

const SEEDS: [u64; 5] = [1, 2, 3, 4, 5];
const STEPS: usize = 60;

fn seeds() -> Vec<u64> {
    seed_to_replay().map_or_else(|| SEEDS.to_vec(), |seed| vec![seed])
}

fn record(world: &World) -> Outcome<Vec<Recording>> {
    let stage = WorldStage::new(world);
    let play =
        |seed| recording::recording(&stage, seed, STEPS).map_err(|Failure(why)| Failure(format!("seed {seed}: {why}")));
    seeds().into_iter().map(play).collect()
}

fn equals_plain(name: &str, a: &dyn Fn() -> ServerSpec, b: &dyn Fn() -> ServerSpec) {
    let _company = in_company();
    let (plain_name, pair_name) = (format!("{name}d"), format!("{name}n"));
    let plain_world = world(&plain_name, Profile::lan(), a(), b(), 0, Layout::Direct);
    let pair_world = world(&pair_name, Profile::lan(), a(), b(), 0, pair());
    // Both mostly wait for the servers' delayed acknowledgements, so they do not disturb each other.
    let (plain, pair) = std::thread::scope(|scope| {
        let plain = scope.spawn(|| record(&plain_world));
        let pair = record(&pair_world);
        (plain.join().unwrap_or_else(|panic| resume_unwind(panic)), pair)
    });
    let plain = plain.unwrap_or_else(|failure| panic!("{plain_name}: {failure}"));
    let pair = pair.unwrap_or_else(|failure| panic!("{pair_name}: {failure}"));
    for ((seed, plain), pair) in seeds().iter().zip(&plain).zip(&pair) {
        assert!(
            plain.stanzas() > 300,
            "{name}, seed {seed}: only {} stanzas",
            plain.stanzas()
        );
        compare(plain, pair).unwrap_or_else(|differences| panic!("{name}, seed {seed}: {differences}"));
    }
}

/// Rooms on Prosody, far users on ejabberd.
#[test]
fn recordings_prosody_and_ejabberd() {
    equals_plain("rpe", &Prosody::stock, &Ejabberd::stock);
}

/// Rooms on ejabberd, far users on Prosody.
#[test]
fn recordings_ejabberd_and_prosody() {
    equals_plain("rep", &Ejabberd::stock, &Prosody::stock);
}
