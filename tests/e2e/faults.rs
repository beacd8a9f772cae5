//! Processes that are killed and links that break, while everybody talks.
//!
//! A server that finds the far domain's door shut throws that domain's users out of its rooms, so the listening sockets are
//! held for the sidecars, as a systemd `.socket` unit does.
//!
//! What a server has sent and we have not on disk when we are killed is lost, as on any stream without acknowledgements. How long that
//! takes is the flush of the disk: 1.4 ms at best here, and hundreds when other work keeps it busy; a process cannot even die
//! before its flush is done. So that the count depends on narrows and not on its neighbours, the spools are in memory here;
//! that a disk keeps what it has flushed is the power-cut test's matter.
//!
//! `NARROWS_E2E_SEED=n` replays a seed; `NARROWS_LONG=1` cuts the link for up to two minutes, and takes its time.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread::sleep,
    time::{Duration, Instant},
};

use narrows_lab::{
    Ejabberd, Layout, Profile, Prosody, ServerSpec, SidecarSpec, Site, World,
    client::{Failure, Outcome},
    scenario::Dice,
};

use crate::{
    cast::{Cast, Outcomes},
    stage::stand,
};

/// What crosses in one run.
const MESSAGES: usize = 2000;

/// Between two messages, on average: 45 a second are some 250 copies a second for the server beside the room.
const PAUSE: Duration = Duration::from_millis(20);

/// Messages in flight that a kill may cost, on average. The aim is under one, and most kills cost none. But one that meets a returning
/// link's burst to the room finds what the room has just said to it: as much as a lane may have under way, some eleven messages. On a
/// busy machine that made 7 and 12 in storms of 12 kills.
const IN_FLIGHT_A_KILL_MAX: usize = 2;

/// After the storm: longer than any back-off of ours or of the servers.
const SETTLE: Duration = Duration::from_secs(60);

/// The pair, with sockets that outlive it.
pub fn held_pair() -> SidecarSpec {
    SidecarSpec::new(env!("CARGO_BIN_EXE_narrows"))
        .held()
        .env("RUST_LOG", "narrows=trace")
}

/// The pair that is compared with the room's own order: while the link is down, a local echo would show near users their own words
/// before it.
pub fn ordered_pair() -> SidecarSpec {
    held_pair().yaml("mirror", "echo: reflect")
}

pub fn long() -> bool {
    std::env::var_os("NARROWS_LONG").is_some()
}

pub fn seed(default: u64) -> u64 {
    seed_to_replay().unwrap_or(default)
}

pub fn seed_to_replay() -> Option<u64> {
    let seed = std::env::var("NARROWS_E2E_SEED").ok()?;
    Some(seed.parse().expect("NARROWS_E2E_SEED is a number"))
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

/// Ends a sidecar as a power cut would, when its server is not setting up a stream to it: what Prosody has queued for a stream that fails
/// then, it returns to the room, and the room puts those occupants out. README.md tells it.
pub fn kill_set_up(site: &Site) -> Outcome {
    let deadline = Instant::now() + SETTLE;
    loop {
        let metrics = site.sidecar().metrics()?;
        let legs = |state: &str| metrics.sum("narrows_legs", &["leg=\"receiving\"", &format!("state=\"{state}\"")]);
        if legs("negotiating") == 0.0 && legs("ready") > 0.0 {
            site.sidecar().kill9()?;
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Failure("the server's stream is not set up".to_owned()));
        }
        sleep(Duration::from_millis(50));
    }
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

/// When each kill was and how long the process took to go, and when what is lost was said: all in seconds since the first kill.
fn tell_losses(cast: &Cast<'_>, outcomes: &Outcomes, blows: &Blows) {
    let Some((_, first, _)) = blows.killed.first() else {
        return;
    };
    let since = |at: &Instant| {
        let (before, after) = (first.duration_since(*at), at.duration_since(*first));
        after.as_secs_f64() - before.as_secs_f64()
    };
    for (site, at, took) in &blows.killed {
        println!(
            "  {:.3} kill at {site}, gone after {:.3}",
            since(at),
            took.as_secs_f64()
        );
    }
    for (what, lost) in [
        ("into", &outcomes.room.not_entered),
        ("out of", &outcomes.room.not_heard),
    ] {
        for message in lost {
            let at = cast.said_at.get(message).map_or(0.0, since);
            println!("  {at:.3} lost on the way {what} the room: {} {}", message.0, message.1);
        }
    }
}

/// 2,000 messages in both directions through a storm: nothing that was accepted is lost, nothing comes twice or out of order,
/// nobody falls out of the room.
///
/// What was on its way from a server to us, or from us to a server, at the moment of a kill is TCP's. It is counted, and
/// bounded: [`IN_FLIGHT_A_KILL_MAX`].
fn weather(name: &str, a: ServerSpec, b: ServerSpec, seed: u64) {
    println!("{name}: seed {seed}");
    let stand = stand(
        name,
        Profile::lan(),
        unthrottled(a),
        unthrottled(b),
        0,
        Layout::Sidecar(ordered_pair().in_memory()),
    );
    let world = &stand.world;
    let fail = |what: String| -> ! { panic!("{name}, seed {seed}: {what}") };
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
    tell_losses(&cast, &outcomes, &blows);
    if let Err(failure) = settled {
        fail(format!("it does not settle: {failure}\n{outcomes}"));
    }
    let in_flight = outcomes.lost();
    if !outcomes.is_orderly() || outcomes.returned > 0 || in_flight > IN_FLIGHT_A_KILL_MAX * blows.kills {
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

/// A kill in the middle of what a returning link brings loses nothing of it: what is marked as given and was not written is written
/// by the next process.
///
/// Messages gather while the sidecar beside the room is away; soon after the link is back the one beside their readers is killed, sooner or
/// later each time. Before receipts and marks that can be taken back, each such kill lost up to forty of them; while marks were
/// final before the write was due, one kill in three lost what the window towards the server holds, up to eleven. What
/// is left is a word said while the room's server has not noticed that the first sidecar is gone: under one a kill.
#[test]
fn kill_in_a_burst() {
    const KILLS: usize = 6;
    const SAID: usize = 200;
    let name = "burst";
    let stand = stand(
        name,
        Profile::lan(),
        unthrottled(Prosody::stock()),
        unthrottled(Ejabberd::stock()),
        0,
        Layout::Sidecar(ordered_pair().in_memory()),
    );
    let world = &stand.world;
    let links = || {
        let log = fs::read_to_string(world.b.sidecar().log_path()).unwrap_or_default();
        log.matches("Link is up").count()
    };
    let burst = |cast: &mut Cast<'_>, wait: Duration| -> Outcome {
        let before = links();
        world.a.sidecar().kill9()?;
        for word in 0..SAID {
            cast.say(word % 5, &"x".repeat(60))?;
            sleep(Duration::from_millis(2));
        }
        world.a.sidecar().start_again()?;
        let deadline = Instant::now() + SETTLE;
        while links() == before && Instant::now() < deadline {
            sleep(Duration::from_millis(1));
        }
        sleep(wait);
        world.b.sidecar().kill9()?;
        world.b.sidecar().start_again()?;
        cast.settle(SETTLE)
    };
    let play = || -> Outcome<Outcomes> {
        let mut cast = Cast::gather(world, "burst")?;
        for kill in 0..KILLS {
            burst(&mut cast, Duration::from_millis(10 + 30 * kill as u64))?;
        }
        Ok(cast.outcomes())
    };
    let outcomes = play().unwrap_or_else(|failure| panic!("{name}: {failure}"));
    println!("{name}: {KILLS} kills of each sidecar\n{outcomes}");
    assert!(outcomes.is_orderly() && outcomes.lost() < KILLS, "{name}: {outcomes}");
}
