//! Processes that are killed and links that break, while everybody talks.
//!
//! A server that finds the far domain's door shut throws that domain's users out of its rooms, so the listening sockets are
//! held for the sidecars, as a systemd `.socket` unit does.
//!
//! `NARROWS_E2E_SEED=n` replays a seed; `NARROWS_LONG=1` cuts the link for up to two minutes, and takes its time.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread::sleep,
    time::{Duration, Instant},
};

use narrows_lab::{Ejabberd, Layout, Profile, Prosody, ServerSpec, SidecarSpec, Site, World, scenario::Dice};

use crate::{
    cast::Cast,
    stage::{stand, words},
};

/// What crosses in one run.
const MESSAGES: usize = 2000;

/// Between two messages, on average: 50 a second are some 250 copies a second for the server beside the room.
const PAUSE: Duration = Duration::from_millis(20);

/// After the storm: longer than any back-off of ours or of the servers.
const SETTLE: Duration = Duration::from_secs(60);

/// The pair, with sockets that outlive it.
pub fn held_pair() -> SidecarSpec {
    SidecarSpec::new(env!("CARGO_BIN_EXE_narrows"))
        .held()
        .env("RUST_LOG", "narrows=trace")
}

pub fn long() -> bool {
    std::env::var_os("NARROWS_LONG").is_some()
}

pub fn seed(default: u64) -> u64 {
    match std::env::var("NARROWS_E2E_SEED") {
        Ok(seed) => seed.parse().expect("NARROWS_E2E_SEED is a number"),
        Err(_) => default,
    }
}

/// Prosody's limit of 30 kB/s per stream is a matter of its own: it is lifted, as the documentation advises.
pub fn unthrottled(server: ServerSpec) -> ServerSpec {
    server.unlimited_from(["a.example", "conference.a.example", "b.example", "conference.b.example"])
}

/// What was done to the pair.
#[derive(Debug, Default)]
struct Blows {
    kills: usize,
    /// Where, when, and how long the process took to be gone.
    killed: Vec<(String, Instant, Duration)>,
    cuts: usize,
    cut_time: Duration,
}

/// Ends a sidecar as a power cut would, and starts it again within a second.
fn kill(site: &Site, dice: &mut Dice, blows: &mut Blows) {
    let at = Instant::now();
    site.sidecar().kill9().expect("the sidecar is killed");
    blows.kills += 1;
    blows.killed.push((site.domain().to_owned(), at, at.elapsed()));
    sleep(Duration::from_millis(dice.below(1000) as u64));
    site.sidecar().start_again().expect("the sidecar starts again");
}

/// Kills and cuts until everything is said, and leaves everything whole.
fn storm(world: &World, dice: &mut Dice, said: &AtomicBool) -> Blows {
    let mut blows = Blows::default();
    let cut_ms_max = if long() { 119_000 } else { 9_000 };
    while !said.load(Ordering::Relaxed) {
        sleep(Duration::from_millis(200 + dice.below(1800) as u64));
        match dice.below(3) {
            0 => {
                kill(&world.a, dice, &mut blows);
            }
            1 => {
                kill(&world.b, dice, &mut blows);
            }
            _ => {
                // Mostly short: the smaller of two throws.
                let cut = 1000 + dice.below(cut_ms_max).min(dice.below(cut_ms_max)) as u64;
                let since = Instant::now();
                world.link.down();
                if dice.chance(50) {
                    sleep(Duration::from_millis(dice.below(cut as usize) as u64));
                    kill(if dice.chance(50) { &world.a } else { &world.b }, dice, &mut blows);
                }
                sleep(Duration::from_millis(cut).saturating_sub(since.elapsed()));
                world.link.up();
                blows.cuts += 1;
                blows.cut_time += since.elapsed();
            }
        }
    }
    blows
}

/// 2,000 messages in both directions through a storm: nothing that was accepted is lost, nothing comes twice or out of order,
/// nobody falls out of the room.
///
/// What was on its way from a server to us, or from us to a server, at the moment of a kill is TCP's. It is counted: less
/// than one message a kill.
fn weather(name: &str, a: ServerSpec, b: ServerSpec, seed: u64) {
    println!("{name}: seed {seed}");
    let stand = stand(
        name,
        Profile::lan(),
        unthrottled(a),
        unthrottled(b),
        0,
        Layout::Sidecar(held_pair().in_memory()),
    );
    let world = &stand.world;
    let fail = |what: String| -> ! { panic!("{name}, seed {seed}: {what}\n{}", words(world)) };
    let mut cast = Cast::gather(world, "storm").unwrap_or_else(|failure| fail(failure.0));
    let mut dice = Dice::new(seed);
    let mut weather_dice = Dice::new(!seed);
    let said = AtomicBool::new(false);
    let blows = std::thread::scope(|scope| {
        let storm = scope.spawn(|| storm(world, &mut weather_dice, &said));
        for _ in 0..MESSAGES {
            let spoken = cast.speak_one(&mut dice);
            if let Err(failure) = spoken {
                said.store(true, Ordering::Relaxed);
                fail(failure.0);
            }
            sleep(PAUSE * dice.below(200) as u32 / 100);
        }
        said.store(true, Ordering::Relaxed);
        storm.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    let settled = cast.settle(SETTLE);
    let outcomes = cast.outcomes();
    println!(
        "{name}: seed {seed}, {} messages, {} kills, {} cuts of {:.1} s together\n{outcomes}",
        cast.sent(),
        blows.kills,
        blows.cuts,
        blows.cut_time.as_secs_f64()
    );
    let t0 = blows.killed[0].1;
    for (site, at, took) in &blows.killed {
        println!(
            "kill {site} at {:.3} took {:.3}",
            (*at - t0).as_secs_f64(),
            took.as_secs_f64()
        );
    }
    let mut all: Vec<_> = outcomes
        .room
        .not_heard
        .iter()
        .map(|m| ("unheard", m))
        .chain(outcomes.room.not_entered.iter().map(|m| ("unentered", m)))
        .map(|(w, m)| {
            (
                cast.said_at[m].saturating_duration_since(t0).as_secs_f64(),
                w,
                m.clone(),
            )
        })
        .collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    for (at, what, m) in all {
        println!("  {what} {m:?} said at {at:.3}");
    }
    if let Err(failure) = settled {
        fail(format!("it does not settle: {failure}\n{outcomes}"));
    }
    let in_flight = outcomes.lost();
    if !outcomes.is_orderly() || outcomes.returned > 0 || in_flight >= blows.kills.max(1) {
        fail(format!("{blows:?}\n{outcomes}"));
    }
}

/// The room on Prosody, far users on ejabberd.
#[test]
fn weather_prosody_and_ejabberd() {
    weather("wpe", Prosody::stock(), Ejabberd::stock(), seed(1));
}

/// The room on ejabberd, far users on Prosody.
#[test]
fn weather_ejabberd_and_prosody() {
    weather("wep", Ejabberd::stock(), Prosody::stock(), seed(2));
}

#[test]
fn burst() {
    let stand = stand(
        "burst",
        Profile::lan(),
        unthrottled(Prosody::stock()),
        unthrottled(Ejabberd::stock()),
        0,
        Layout::Sidecar(held_pair().env("RUST_LOG", "debug")),
    );
    let world = &stand.world;
    let mut cast = Cast::gather(world, "storm").unwrap();
    let mut before = 0;
    for trial in 0..6 {
        world.a.sidecar().kill9().unwrap();
        let ups = |site: &Site| {
            std::fs::read_to_string(site.sidecar().log_path())
                .unwrap()
                .matches("Link is up")
                .count()
        };
        let had = ups(&world.b);
        for _ in 0..40 {
            for s in 0..5 {
                cast.say(
                    s,
                    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
                )
                .unwrap();
            }
            sleep(Duration::from_millis(5));
        }
        world.a.sidecar().start_again().unwrap();
        while ups(&world.b) == had {
            sleep(Duration::from_millis(1));
        }
        let wait = 20 + 40 * trial;
        sleep(Duration::from_millis(wait));
        let m = world.b.sidecar().metrics().unwrap();
        let inbox = m.sum("narrows_inbox_entries", &[]);
        let unconf = m.sum("narrows_lane_unconfirmed", &[]);
        world.b.sidecar().kill9().unwrap();
        world.b.sidecar().start_again().unwrap();
        cast.settle(SETTLE).unwrap();
        let o = cast.outcomes();
        eprintln!(
            "wait {wait} inbox {inbox} unconf {unconf} lost {} \n{o}",
            o.lost() - before
        );
        before = o.lost();
    }
}
