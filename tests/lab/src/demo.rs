//! The demonstration: people on a ship and ashore talk in one room over a satellite telephone, and the link fails
//! in the middle of it.
//!
//! Real servers, real sidecars, real clients; only the link is emulated. Every line that it prints is measured: bytes
//! by the emulator, at IP level; what waits and what plain S2S would have carried by the sidecars' own metrics; what
//! was heard by every client itself. It ends well only if nobody missed anything, heard anything twice, or was thrown out.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use narrows_lab::client::{Client, Failure, Outcome, Stanza};
use narrows_lab::load::{Crowd, numbered, speak, tally_all};
use narrows_lab::scenario::{NEAR_USERS, Side, Stage, WorldStage, accounts};
use narrows_lab::{Ejabberd, Layout, Limits, Profile, Prosody, SidecarSpec, Site, World};

pub const USAGE: &str = "\
usage: narrows-lab demo [people=20] [talk=30] [cut=25]
         people  in the room on the ship, 1 to 50
         talk    seconds of talk before the cut, and again after it, 10 or more
         cut     seconds that the link is away; people go on talking";

/// Of the far people, so many talk; the others listen.
const FAR_SPEAKERS: usize = 4;
/// Between two messages in the room: a lively talk of some people, and about a quarter of the link.
const PAUSE: Duration = Duration::from_millis(1200);
/// Between two lines of what is going on.
const TICK: Duration = Duration::from_secs(2);
/// Between two looks at what the clients have received.
const LOOK: Duration = Duration::from_millis(200);
/// Nothing takes longer on a link that is up, so what has not come by then will not come.
const PATIENCE: Duration = Duration::from_secs(180);
/// Bytes a second each way.
const LINK_RATE: f64 = 9600.0 / 8.0;

/// What people say.
const LINES: [&str; 24] = [
    "Good morning from the bridge, how do you read us?",
    "Loud and clear. What is your position?",
    "54°12' N, 7°53' E, making eleven knots.",
    "The forecast for tonight has gone up to force 8 from the north-west.",
    "Thanks, we have seen it coming, the barometer fell by six since noon.",
    "Did the spare part for the pump arrive?",
    "It is on the quay, with your name on it.",
    "Perfect 👍",
    "The engine room wants to know whether the manual is the new edition.",
    "I will ask.",
    "Yes, second edition, 2019.",
    "Can somebody send the list of the crew that leaves in Bergen?",
    "Seven names, I will mail it as soon as the link allows.",
    "We had dolphins on the port side an hour ago!",
    "Pictures or it did not happen :)",
    "At 9600 bit/s? You will get one by Christmas.",
    "Fair enough.",
    "Please confirm the new rendezvous: Friday 06:30 UTC at the pilot station.",
    "Confirmed, Friday 06:30 UTC.",
    "The doctor asks for a second opinion, is anybody at the clinic?",
    "Dr. Sørensen is back at two, I have left her a note.",
    "Thank you. It is not urgent, the patient is up and eating.",
    "Changing course to 340 now.",
    "Noted: 340 at 14:20.",
];

/// How the demonstration goes.
struct Plan {
    people: usize,
    talk: Duration,
    cut: Duration,
}

impl Plan {
    fn read(args: &[String]) -> io::Result<Self> {
        let mut plan = Self {
            people: 20,
            talk: Duration::from_secs(30),
            cut: Duration::from_secs(25),
        };
        for arg in args {
            let odd = || io::Error::new(io::ErrorKind::InvalidInput, format!("{arg}: not understood\n{USAGE}"));
            let (key, value) = arg.split_once('=').ok_or_else(odd)?;
            let value: u64 = value.parse().map_err(|_| odd())?;
            match key {
                "people" if (1..=50).contains(&value) => plan.people = value as usize,
                "talk" if (10..=3600).contains(&value) => plan.talk = Duration::from_secs(value),
                "cut" if value <= 3600 => plan.cut = Duration::from_secs(value),
                _ => return Err(odd()),
            }
        }
        Ok(plan)
    }
}

/// Plays it; whether all promises held.
pub fn run(args: &[String]) -> io::Result<bool> {
    if args.iter().any(|arg| arg == "--help" || arg == "-h") {
        println!("{USAGE}");
        return Ok(true);
    }
    let plan = Plan::read(args)?;
    narrows_lab::net::require_root()?;
    let narrows = beside_us("narrows")?;
    println!(
        "
    shore, a.example                                         ship, b.example
    Prosody <──> narrows <══ 9600 bit/s, 300 ms one way ══> narrows <──> ejabberd
    alice, adam, and the room                                {} people in that room
",
        plan.people
    );
    println!("Starting both servers and both sidecars ...");
    let world = World::builder("demo")
        .link(Profile::sat9600())
        .site_a(Prosody::stock().limits(Limits::ServersOnly))
        .site_b(Ejabberd::stock().limits(Limits::ServersOnly))
        .users_a(accounts(0))
        .users_b(accounts(plan.people))
        .layout(Layout::Sidecar(SidecarSpec::new(&narrows)))
        .start()?;
    println!(
        "In another terminal you can watch the ship's sidecar meanwhile:\n  ip netns exec {} {} top\n",
        world.b.namespace().name(),
        narrows.display()
    );
    match play(&world, &plan) {
        Ok(good) => Ok(good),
        Err(Failure(why)) => {
            eprintln!("{}{}", world.a.log_tails(), world.b.log_tails());
            Err(io::Error::other(why))
        }
    }
}

/// The program of that name in our own directory: cargo puts both there.
fn beside_us(name: &str) -> io::Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name(name);
    if Path::new(&path).is_file() {
        return Ok(path);
    }
    let text = format!("{} is not there: tests/demo builds it", path.display());
    Err(io::Error::new(io::ErrorKind::NotFound, text))
}

fn play(world: &World, plan: &Plan) -> Outcome<bool> {
    let stage = WorldStage::new(world).waiting(PATIENCE);
    let show = Show::new(world);
    std::thread::scope(|scope| {
        // Dropping our end of the channel ends the ticking.
        let (_over, until) = mpsc::channel();
        scope.spawn(|| show.tick(until));
        perform(&show, &stage, plan)
    })
    .map(|scores| scores.print(plan))
}

/// Entering, talking with a cut in the middle, and the count.
fn perform(show: &Show<'_>, stage: &WorldStage<'_>, plan: &Plan) -> Outcome<Scores> {
    let room = format!("bridge@{}", stage.rooms(Side::A));
    let near = enter_near(stage, &room)?;
    let crowd = enter_far(show, stage, &room, &near[0], plan.people)?;
    let entered = show.used()?;

    let speakers: Vec<&Client> = crowd.members.iter().take(FAR_SPEAKERS).chain(&near).collect();
    let listeners: Vec<&Client> = near.iter().chain(&crowd.members).collect();
    let mut talk = Talk::new(&room, &speakers, show);
    let cut = while_doing(
        || show.listen(&listeners),
        &show.quiet,
        || talk_with_a_cut(show, plan, &mut talk, &crowd, &near),
    )?;
    Ok(Scores {
        said: talk.said(),
        listeners: listeners.len(),
        entered,
        all: show.used()?,
        cut,
        tally: tally_all(listeners.iter().copied(), &talk.sent),
    })
}

/// Runs `aside` on a thread of its own until `act` is done; it ends when it sees the flag.
fn while_doing<T>(aside: impl FnOnce() + Send, done: &AtomicBool, act: impl FnOnce() -> T) -> T {
    std::thread::scope(|scope| {
        scope.spawn(aside);
        let result = act();
        done.store(true, Ordering::Relaxed);
        result
    })
}

fn enter_far(show: &Show<'_>, stage: &WorldStage<'_>, room: &str, near: &Client, people: usize) -> Outcome<Crowd> {
    show.event(&format!("{people} people on the ship enter the room over the link."));
    let crowd = while_doing(
        || show.count_inside(near),
        &show.all_inside,
        || Crowd::join(stage, Side::B, room, people),
    )?;
    show.event("Everybody is in the room.");
    Ok(crowd)
}

fn talk_with_a_cut(show: &Show<'_>, plan: &Plan, talk: &mut Talk<'_>, crowd: &Crowd, near: &[Client]) -> Outcome<Cut> {
    show.event("They talk.");
    talk.go_on(plan.talk)?;

    let said_before = talk.said();
    show.world.link.down();
    let seconds = plan.cut.as_secs();
    show.event(&format!("The link is cut, for {seconds} s. They go on talking."));
    talk.go_on(plan.cut)?;
    let queued = show.waiting()?;
    let said_in_cut = talk.said() - said_before;
    let sent = talk.sent.clone();
    show.world.link.up();
    let back = Instant::now();
    show.event(&format!("The link is back. {queued} entries wait in the two spools."));

    let caught_up = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            hear_all(crowd, near, &sent)?;
            let took = back.elapsed();
            show.event("Everybody has heard everything that was said during the cut.");
            Outcome::Ok(took)
        });
        talk.go_on(plan.talk)?;
        waiting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    show.event("They stop talking.");
    hear_all(crowd, near, &talk.sent)?;
    show.settle()?;
    Ok(Cut {
        said_in_cut,
        queued,
        caught_up,
    })
}

/// Signs the people ashore in; the first one opens the room.
fn enter_near(stage: &WorldStage<'_>, room: &str) -> Outcome<Vec<Client>> {
    let mut near = Vec::new();
    for user in NEAR_USERS {
        let client = stage.connect(Side::A, user, "desk")?;
        client.presence("")?;
        client.join(room, user, None, Some(0))?;
        let inside = format!("{room}/{user}");
        client.expect("to be in the room", PATIENCE, |stanza| {
            stanza.is_presence() && stanza.from() == inside && stanza.has_status("110")
        })?;
        if near.is_empty() {
            // XEP-0045 §10.1.2: a new room is locked until its owner accepts its settings.
            let defaults =
                "<query xmlns='http://jabber.org/protocol/muc#owner'><x xmlns='jabber:x:data' type='submit'/></query>";
            client.ask("set", room, defaults, PATIENCE)?;
        }
        near.push(client);
    }
    Ok(near)
}

/// Waits until all have heard the last message of each speaker. What comes from one speaker keeps its order.
fn hear_all(crowd: &Crowd, near: &[Client], sent: &BTreeMap<String, usize>) -> Outcome {
    for (sender, last) in sent.iter().filter(|(_, last)| **last > 0) {
        crowd.wait_for(sender, *last, PATIENCE)?;
        for client in near {
            client.expect(&format!("message {last} of {sender}"), PATIENCE, |stanza| {
                numbered(stanza).is_some_and(|(of, got)| of == *sender && got == *last)
            })?;
        }
    }
    Ok(())
}

/// People who take turns.
struct Talk<'t> {
    room: &'t str,
    speakers: &'t [&'t Client],
    show: &'t Show<'t>,
    /// The number of each speaker's last message.
    sent: BTreeMap<String, usize>,
    next: Instant,
}

impl<'t> Talk<'t> {
    fn new(room: &'t str, speakers: &'t [&'t Client], show: &'t Show<'t>) -> Self {
        let sent = speakers.iter().map(|client| (client.user().to_owned(), 0)).collect();
        Self {
            room,
            speakers,
            show,
            sent,
            next: Instant::now(),
        }
    }

    fn said(&self) -> usize {
        self.sent.values().sum()
    }

    fn go_on(&mut self, period: Duration) -> Outcome {
        let end = self.next + period;
        while self.next < end {
            std::thread::sleep(self.next.saturating_duration_since(Instant::now()));
            let turn = self.said();
            let speaker = self.speakers[turn % self.speakers.len()];
            let number = self.sent.entry(speaker.user().to_owned()).or_default();
            *number += 1;
            speak(speaker, self.room, *number, LINES[turn % LINES.len()])?;
            self.show.said.store(turn + 1, Ordering::Relaxed);
            self.next += PAUSE;
        }
        std::thread::sleep(self.next.saturating_duration_since(Instant::now()));
        Ok(())
    }
}

/// Bytes, both ways: from shore to ship, and from ship to shore.
#[derive(Clone, Copy, Default)]
struct Used {
    /// At IP level, on the link.
    link: [f64; 2],
    /// Of the XML alone, if every copy had crossed.
    plain: [f64; 2],
}

impl Used {
    fn since(self, before: Self) -> Self {
        let minus = |now: [f64; 2], then: [f64; 2]| [now[0] - then[0], now[1] - then[1]];
        Self {
            link: minus(self.link, before.link),
            plain: minus(self.plain, before.plain),
        }
    }
}

/// What goes on, for those who watch.
struct Show<'w> {
    world: &'w World,
    began: Instant,
    said: AtomicUsize,
    heard: AtomicUsize,
    inside: AtomicUsize,
    all_inside: AtomicBool,
    quiet: AtomicBool,
}

impl<'w> Show<'w> {
    const HEAD: &'static str = "  time  link  aboard  said  copies heard  in the spools  bytes on the link";

    fn new(world: &'w World) -> Self {
        Self {
            world,
            began: Instant::now(),
            said: AtomicUsize::new(0),
            heard: AtomicUsize::new(0),
            inside: AtomicUsize::new(0),
            all_inside: AtomicBool::new(false),
            quiet: AtomicBool::new(false),
        }
    }

    fn clock(&self) -> String {
        let seconds = self.began.elapsed().as_secs();
        format!("{:3}:{:02}", seconds / 60, seconds % 60)
    }

    fn event(&self, what: &str) {
        println!("{}  -- {what}", self.clock());
    }

    fn tick(&self, until: Receiver<()>) {
        println!("{}", Self::HEAD);
        while until.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
            let waiting = self
                .waiting()
                .map_or_else(|_| "?".to_owned(), |entries| entries.to_string());
            println!(
                "{}  {:4}  {:6}  {:4}  {:12}  {:>13}  {:17}",
                self.clock(),
                if self.world.link.is_up() { "up" } else { "CUT" },
                self.inside.load(Ordering::Relaxed),
                self.said.load(Ordering::Relaxed),
                self.heard.load(Ordering::Relaxed),
                waiting,
                self.world.link.stats().sent_bytes(),
            );
        }
    }

    /// Counts the people of the ship that somebody ashore sees come in.
    fn count_inside(&self, near: &Client) {
        let came_in = |stanza: &Stanza| {
            let nick = stanza.from().split_once('/').map_or("", |(_, nick)| nick);
            stanza.is_presence() && stanza.kind().is_empty() && nick.starts_with('u')
        };
        while !self.all_inside.load(Ordering::Relaxed) {
            std::thread::sleep(LOOK);
            self.inside.store(near.count(came_in), Ordering::Relaxed);
        }
    }

    /// Counts what all clients hear, copies of one message as often as they come.
    fn listen(&self, clients: &[&Client]) {
        let mut seen = vec![0; clients.len()];
        while !self.quiet.load(Ordering::Relaxed) {
            for (client, seen) in clients.iter().zip(&mut seen) {
                let fresh = client.transcript_from(*seen);
                *seen += fresh.len();
                let heard = fresh.iter().filter(|stanza| numbered(stanza).is_some()).count();
                self.heard.fetch_add(heard, Ordering::Relaxed);
            }
            std::thread::sleep(LOOK);
        }
    }

    fn sites(&self) -> [&Site; 2] {
        [&self.world.a, &self.world.b]
    }

    /// Entries in both spools: each stays there until the other sidecar has stored it, and has said so.
    fn waiting(&self) -> Outcome<u64> {
        let mut entries = 0.0;
        for site in self.sites() {
            entries += site.sidecar().metrics()?.sum("narrows_spool_entries", &[]);
        }
        Ok(entries as u64)
    }

    /// Until both spools are empty, and what an error might still bring has had its time.
    fn settle(&self) -> Outcome {
        let deadline = Instant::now() + PATIENCE;
        while self.waiting()? > 0 {
            if Instant::now() > deadline {
                return Err(Failure("the spools do not become empty".to_owned()));
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        std::thread::sleep(Duration::from_secs(2));
        Ok(())
    }

    fn used(&self) -> Outcome<Used> {
        let stats = self.world.link.stats();
        let mut used = Used {
            link: [stats.a_to_b.sent.bytes as f64, stats.b_to_a.sent.bytes as f64],
            ..Used::default()
        };
        for (way, site) in self.sites().into_iter().enumerate() {
            used.plain[way] = site
                .sidecar()
                .metrics()?
                .sum("narrows_stanza_bytes_total", &["direction=\"sent\""]);
        }
        Ok(used)
    }
}

/// What became of the cut.
struct Cut {
    said_in_cut: usize,
    queued: u64,
    caught_up: Duration,
}

/// What is printed in the end.
struct Scores {
    said: usize,
    listeners: usize,
    entered: Used,
    all: Used,
    cut: Cut,
    tally: narrows_lab::load::Tally,
}

impl Scores {
    /// Prints the table; whether all is as promised.
    fn print(&self, plan: &Plan) -> bool {
        let talked = self.all.since(self.entered);
        let columns = [self.entered, talked, self.all];
        let row = |name: &str, cell: &dyn Fn(Used) -> String| {
            let cells: String = columns.iter().map(|used| format!("{:>12}", cell(*used))).collect();
            println!("  {name:44}{cells}");
        };
        let both = |ways: [f64; 2]| ways[0] + ways[1];
        // The ways do not disturb each other; the fuller one decides.
        let seconds = |ways: [f64; 2]| format!("{:.0} s", ways[0].max(ways[1]) / LINK_RATE);
        let joined = format!("{} joins", plan.people);
        let talked = format!("{} messages", self.said);
        println!("\n  {:44}{joined:>12}{talked:>12}{:>12}", "", "together");
        row("bytes on the link (IP level, both ways)", &|used| {
            grouped(both(used.link))
        });
        row("  time that they take at 9600 bit/s", &|used| seconds(used.link));
        row("plain S2S: bytes of its XML alone (*)", &|used| {
            grouped(both(used.plain))
        });
        row("  time that they would take", &|used| seconds(used.plain));
        row("saved: one byte instead of", &|used| {
            format!("{:.1}", both(used.plain) / both(used.link).max(1.0))
        });
        println!("  (*) every copy of every stanza, computed by the sidecars; TCP, IP and TLS would come on top\n");

        let line = |name: &str, value: String| println!("  {name:44}{value:>12}");
        line("messages said", grouped(self.said as f64));
        line(
            "copies heard, of copies due",
            format!(
                "{} of {}",
                grouped(self.tally.received as f64),
                grouped(self.tally.expected as f64)
            ),
        );
        line(
            &format!("said during the cut of {} s", plan.cut.as_secs()),
            self.cut.said_in_cut.to_string(),
        );
        line("entries queued when the link came back", self.cut.queued.to_string());
        line(
            "  heard by all, after the link was back",
            format!("{:.1} s", self.cut.caught_up.as_secs_f64()),
        );
        line("lost", self.tally.lost.to_string());
        line("doubled", self.tally.doubled.to_string());
        line("out of order", self.tally.late.to_string());
        line("people thrown out of the room", self.tally.expelled.to_string());
        let good = self.tally.is_clean() && self.tally.expected == self.said * self.listeners;
        if !good {
            println!("\n{}", self.tally);
        }
        println!(
            "\n  On a real pair `narrows top` shows links, queues, savings and the dearest rooms live, `narrows trace` what becomes of each\n  \
             stanza and why, a browser a page at the admin port (http://127.0.0.1:9275/), and grafana/ has the dashboards overview, link,\n  \
             rooms and queue and the alerts for a Prometheus that scrapes it: grafana/README.md says how."
        );
        good
    }
}

/// 1234567 as 1,234,567.
fn grouped(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
