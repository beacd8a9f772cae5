//! What nine clients receive through the pair equals what they receive over plain S2S (P1).
//!
//! A seeded scenario is played twice on the same kinds of servers: first with plain S2S between them, then through the pair.
//! Each client's transcript, with what servers make up masked, must be the same multiset, in the same order per sender.
//! `NARROWS_E2E_SEED=n` plays only that seed.
//!
//! So it is with the mirror as it is by default, which on a good link echoes nothing. Under `echo: local` near users hear each other before
//! the room has heard them: `narrows_lab::transcript::echo` lists what may differ in the copies that they have, and all else is compared.
//! Each step is waited for, so that near words come before those of the room cannot show, and is not excused: `echo.rs` sees to that.

use std::panic::resume_unwind;

use narrows_lab::{
    Ejabberd, Kind, Layout, Profile, Prosody, ServerSpec, World,
    client::{Failure, Outcome},
    scenario::{FAR_USERS, WorldStage, recording},
    transcript::{Recording, compare, echo::excuse_echoes},
};

use crate::{
    faults::seed_to_replay,
    stage::{in_company, pair, pair_with, world},
};

const SEEDS: [u64; 5] = [1, 2, 3, 4, 5];
const STEPS: usize = 60;

fn seeds() -> Vec<u64> {
    seed_to_replay().map_or_else(|| SEEDS.to_vec(), |seed| vec![seed])
}

fn record(world: &World, seeds: &[u64]) -> Outcome<Vec<Recording>> {
    let stage = WorldStage::new(world);
    let play =
        |seed| recording::recording(&stage, seed, STEPS).map_err(|Failure(why)| Failure(format!("seed {seed}: {why}")));
    seeds.iter().copied().map(play).collect()
}

/// Plays these seeds once more, under `echo: local`, and holds them against plain S2S.
fn equals_plain_but_for_echoes(name: &str, seeds: &[u64], plain: &[Recording], a: ServerSpec, b: ServerSpec) {
    let hosts = a.kind();
    let echoing = world(name, Profile::lan(), a, b, 0, pair_with(&[("mirror", "echo: local")]));
    let echoed = record(&echoing, seeds).unwrap_or_else(|failure| panic!("{name}: {failure}"));
    let is_near = |user: &str| FAR_USERS.iter().any(|near| user.starts_with(near));
    for ((seed, plain), echoed) in seeds.iter().zip(plain).zip(&echoed) {
        let mut expected = plain.clone();
        let excused = excuse_echoes(&mut expected, echoed, is_near);
        compare(&expected, echoed)
            .unwrap_or_else(|differences| panic!("{name}, seed {seed}, echo: local: {differences}"));
        println!("{name}, seed {seed}: declared differences: {excused:?}");
        // There is no archive here, and nobody but ejabberd's rooms puts elements into another order.
        assert_eq!(excused.without_ids, 0, "{name}, seed {seed}");
        assert!(
            hosts == Kind::Ejabberd || excused.in_authors_order == 0,
            "{name}, seed {seed}: {excused:?}"
        );
    }
    // It was heard near by, and not once more from the room.
    let metrics = echoing.b.sidecar().metrics().expect("the sidecar answers");
    let echoes = |event: &str| metrics.sum("narrows_mirror_echoes_total", &[&format!("event=\"{event}\"")]);
    let (shown, reflected) = (echoes("shown"), echoes("reflected"));
    println!("{name}: {shown} words were echoed, {reflected} reflections were not repeated");
    assert!(shown > 0.0 && reflected == shown, "{name}: {shown} {reflected}");
}

fn all_seeds_equal_plain_but_for_echoes(name: &str, a: &dyn Fn() -> ServerSpec, b: &dyn Fn() -> ServerSpec) {
    let _company = in_company();
    let plain_name = format!("{name}d");
    let plain_world = world(&plain_name, Profile::lan(), a(), b(), 0, Layout::Direct);
    let plain = record(&plain_world, &seeds()).unwrap_or_else(|failure| panic!("{plain_name}: {failure}"));
    drop(plain_world);
    equals_plain_but_for_echoes(&format!("{name}e"), &seeds(), &plain, a(), b());
}

fn equals_plain(name: &str, a: &dyn Fn() -> ServerSpec, b: &dyn Fn() -> ServerSpec) {
    let _company = in_company();
    let (plain_name, pair_name) = (format!("{name}d"), format!("{name}n"));
    let plain_world = world(&plain_name, Profile::lan(), a(), b(), 0, Layout::Direct);
    let pair_world = world(&pair_name, Profile::lan(), a(), b(), 0, pair());
    // Both mostly wait for the servers' delayed acknowledgements, so they do not disturb each other.
    let (plain, pair) = std::thread::scope(|scope| {
        let plain = scope.spawn(|| record(&plain_world, &seeds()));
        let pair = record(&pair_world, &seeds());
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
    drop((plain_world, pair_world));
    equals_plain_but_for_echoes(&format!("{name}e"), &seeds()[..1], &plain[..1], a(), b());
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

/// All seeds under `echo: local`, of which the plain run plays the first.
#[test]
#[ignore = "some minutes: cargo test --test e2e all_recordings_with_echoes -- --ignored --nocapture"]
fn all_recordings_with_echoes_prosody_and_ejabberd() {
    all_seeds_equal_plain_but_for_echoes("lpe", &Prosody::stock, &Ejabberd::stock);
}

/// Rooms on ejabberd.
#[test]
#[ignore = "some minutes: cargo test --test e2e all_recordings_with_echoes -- --ignored --nocapture"]
fn all_recordings_with_echoes_ejabberd_and_prosody() {
    all_seeds_equal_plain_but_for_echoes("lep", &Ejabberd::stock, &Prosody::stock);
}
