//! Two relays, two model servers, a bad link, bad disks: a seed replays everything.
//!
//! Each step of a run lets one thing happen: a server says something to some far users, a disk finishes, bytes arrive, the link is
//! cut or returns, a lane breaks, a process is killed. What the promises say is checked at the end, once everything has come
//! to rest: what was accepted arrived exactly once and in order (P3, P4), at nobody else (§5 rule 4), byte for byte (P1), and
//! crossed as one cast however many it was for (P2).
//!
//! `NARROWS_SIM_SEEDS=10000 cargo test --release --test sim` runs more seeds; `NARROWS_SIM_SEED=n` replays one.

mod world;

use world::{Faults, World};

/// Seeds that a plain run tries. More are for the night: see above.
const SEEDS: u64 = 300;

fn seeds() -> Box<dyn Iterator<Item = u64>> {
    let number = |name| {
        std::env::var(name)
            .ok()
            .map(|text| text.parse::<u64>().expect("a number"))
    };
    match (number("NARROWS_SIM_SEED"), number("NARROWS_SIM_SEEDS")) {
        (Some(seed), _) => Box::new(seed..=seed),
        (None, seeds) => Box::new(0..seeds.unwrap_or(SEEDS)),
    }
}

fn run(faults: Faults) {
    let mut happened = world::Tally::default();
    for seed in seeds() {
        let result = std::panic::catch_unwind(|| {
            let mut world = World::new(seed, faults);
            world.run();
            world.check();
            world.tally()
        });
        match result {
            Ok(tally) => happened.add(&tally),
            Err(panic) => {
                eprintln!("seed {seed} failed: NARROWS_SIM_SEED={seed} replays it");
                std::panic::resume_unwind(panic);
            }
        }
    }
    println!("{happened:?}");
    if std::env::var_os("NARROWS_SIM_SEED").is_none() {
        happened.assert_covers(faults);
    }
}

/// Nothing fails: everything arrives, nothing is in doubt.
#[test]
fn quiet_world() {
    run(Faults::NONE);
}

/// The link comes and goes at random, with whatever is in flight lost.
#[test]
fn bad_link() {
    run(Faults {
        link: true,
        ..Faults::NONE
    });
}

/// The servers restart: lanes break at random.
#[test]
fn restarting_servers() {
    run(Faults {
        lanes: true,
        ..Faults::NONE
    });
}

/// Processes are killed at random and start again from what their disks had finished.
#[test]
fn killed_processes() {
    run(Faults {
        kills: true,
        ..Faults::NONE
    });
}

/// Everything at once.
#[test]
fn everything_fails() {
    run(Faults {
        link: true,
        lanes: true,
        kills: true,
    });
}
