//! What nine clients receive through the pair equals what they receive over plain S2S (P1).
//!
//! A seeded scenario is played twice on the same kinds of servers: first with plain S2S between them, then through the pair.
//! Each client's transcript, with what servers make up masked, must be the same multiset, in the same order per sender.

use narrows_lab::{
    Ejabberd, Layout, Profile, Prosody, ServerSpec,
    scenario::{WorldStage, recording},
    transcript::{Recording, compare},
};

use crate::stage::{pair, stand, words};

const SEEDS: std::ops::RangeInclusive<u64> = 1..=5;
const STEPS: usize = 60;

fn record(name: &str, a: ServerSpec, b: ServerSpec, layout: Layout) -> Vec<Recording> {
    let through_pair = matches!(layout, Layout::Sidecar(_));
    let stand = stand(name, Profile::lan(), a, b, 0, layout);
    let stage = WorldStage::new(&stand.world);
    SEEDS
        .map(|seed| {
            recording::recording(&stage, seed, STEPS).unwrap_or_else(|failure| {
                let words = if through_pair {
                    words(&stand.world)
                } else {
                    String::new()
                };
                panic!("{name}, seed {seed}: {failure}\n{words}")
            })
        })
        .collect()
}

fn equals_plain(name: &str, a: &dyn Fn() -> ServerSpec, b: &dyn Fn() -> ServerSpec) {
    let plain = record(&format!("{name}d"), a(), b(), Layout::Direct);
    let pair = record(&format!("{name}n"), a(), b(), pair());
    for ((seed, plain), pair) in SEEDS.zip(&plain).zip(&pair) {
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
