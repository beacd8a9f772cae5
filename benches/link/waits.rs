//! How long a line of a room takes on a slow link while something else crosses.
//!
//! The link has 9600 bit/s and 300 ms each way, and a modem's deep buffer. Two users behind it are in a room with an archive, and hear
//! lines from beside the room at an even pace. Meanwhile nothing happens; or something goes to the second of them that takes the link a
//! minute and more, and is sent anew whenever it has come; or a whole room's backlog drains. The pair and plain S2S have worlds of their own,
//! side by side in one run.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use narrows_lab::{
    Ejabberd, Layout, Limits, Profile, Prosody, SidecarSpec, World,
    client::{Client, Failure, Outcome},
    scenario::{Dice, Side, Stage, WorldStage, accounts},
};

use crate::{
    Way,
    lines::{Lines, Shape},
    talk::{percentile, settle},
};

/// What plain S2S has queued takes minutes.
const PATIENCE: Duration = Duration::from_secs(1200);

/// Between two lines; and while a backlog drains, which may take seconds only.
const PACE: Duration = Duration::from_secs(3);
const PACE_OF_DRAIN: Duration = Duration::from_millis(500);

/// Lines of a measurement; while a backlog drains, at most.
const LINES: usize = 40;

const LARGE_BYTES: usize = 100_000;
/// Two hundred a minute.
const PRESENCE_EVERY: Duration = Duration::from_millis(300);
const PAGE: usize = 200;
/// Ten minutes of a room in which somebody speaks every five seconds.
const BACKLOG: usize = 120;

/// The 95th percentile may grow by so much.
const ADDED_MAX_MS: f64 = 2_000.0;

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Meanwhile {
    Nothing,
    Large,
    Presences,
    Page,
    Backlog,
}

impl Meanwhile {
    const ALL: [Self; 5] = [Self::Nothing, Self::Large, Self::Presences, Self::Page, Self::Backlog];

    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Large => "messages of 100 KB to another user, one after the other",
            Self::Presences => "200 changes of status a minute in the same room",
            Self::Page => "pages of 200 messages from the room's archive, one after the other",
            Self::Backlog => "ten minutes of another room, after an outage",
        }
    }
}

type Measured = BTreeMap<Meanwhile, Vec<Duration>>;

/// Measures both ways, and prints the table. Fails where the pair adds more than it may.
pub fn measure(lines: &Lines) -> Outcome {
    let (pair, plain) = thread::scope(|scope| {
        let plain = scope.spawn(|| converse(Way::Plain, lines));
        (converse(Way::Pair, lines), plain.join())
    });
    let pair = pair?;
    // What others do is only for comparison.
    let plain = plain.unwrap_or_else(|_| Err(Failure("it ended in a panic".to_owned())));
    let plain = plain.unwrap_or_else(|Failure(why)| {
        eprintln!("plain S2S: {why}");
        Measured::new()
    });
    println!("\n### Seconds until a line is heard\n");
    println!(
        "9600 bit/s, 300 ms each way; a room on Prosody, two users in it on ejabberd behind the link, a line every 3 s.\n"
    );
    println!("| meanwhile | lines | p50 | p95 | plain S2S p50 | p95 |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: |");
    for (what, times) in &pair {
        let of = |times: &Vec<Duration>, percent| format!("{:.2}", percentile(times, percent) / 1000.0);
        let others = |percent| plain.get(what).map_or("-".to_owned(), |times| of(times, percent));
        println!(
            "| {} | {} | **{}** | **{}** | {} | {} |",
            what.name(),
            times.len(),
            of(times, 50),
            of(times, 95),
            others(50),
            others(95)
        );
    }
    let idle = pair
        .get(&Meanwhile::Nothing)
        .map_or(f64::NAN, |times| percentile(times, 95));
    let added = pair.values().map(|times| percentile(times, 95) - idle);
    let worst = added.fold(f64::NEG_INFINITY, f64::max);
    println!("\nAdded to the 95th percentile: at most {:.2} s.", worst / 1000.0);
    match worst <= ADDED_MAX_MS {
        true => Ok(()),
        false => Err(Failure(format!("more than {} s", ADDED_MAX_MS / 1000.0))),
    }
}

/// Who is in the rooms of one world.
struct Deck<'w> {
    world: &'w World,
    room: String,
    /// Beside the rooms: one speaks, the other does all else.
    alice: Client,
    adam: Client,
    /// Behind the link: one listens, the other gets all else.
    hears: Client,
    gets: Client,
    dice: Dice,
    rest: Duration,
}

fn converse(way: Way, lines: &Lines) -> Outcome<Measured> {
    let layout = match way {
        Way::Pair => Layout::Sidecar(SidecarSpec::new(env!("CARGO_BIN_EXE_narrows"))),
        Way::Plain | Way::Tunnel | Way::Squeezed => Layout::Direct,
    };
    let world = World::builder(if way == Way::Pair { "waits" } else { "plain" })
        .link(Profile::lan())
        .site_a(Prosody::stock().mam().limits(Limits::Off))
        .site_b(Ejabberd::stock().limits(Limits::Off))
        .users_a(accounts(2))
        .users_b(accounts(2))
        .layout(layout)
        .start()?;
    let mut deck = Deck::enter(&world)?;
    let mut measured = Measured::new();
    for what in Meanwhile::ALL {
        let times = deck.hear_while(what, lines)?;
        eprintln!(
            "{}, {}: {} lines, {:.0} / {:.0} ms",
            way.name(),
            what.name(),
            times.len(),
            percentile(&times, 50),
            percentile(&times, 95)
        );
        measured.insert(what, times);
    }
    Ok(measured)
}

impl<'w> Deck<'w> {
    fn enter(world: &'w World) -> Outcome<Self> {
        let stage = WorldStage::new(world).waiting(PATIENCE);
        let alice = stage.connect(Side::A, "alice", "pc")?;
        let adam = stage.connect(Side::A, "adam", "pc")?;
        let hears = stage.connect(Side::B, "u1", "crowd")?;
        let gets = stage.connect(Side::B, "u2", "crowd")?;
        let deck = Self {
            world,
            room: format!("deck@{}", stage.rooms(Side::A)),
            alice,
            adam,
            hears,
            gets,
            dice: Dice::new(1),
            rest: Duration::from_secs(7),
        };
        for room in [deck.room.clone(), deck.cabin()] {
            for client in [&deck.alice, &deck.adam, &deck.hears, &deck.gets] {
                client.join(&room, client.user(), None, Some(0))?;
                client.expect("to be in", PATIENCE, |stanza| {
                    stanza.has_status("110") && stanza.from().starts_with(&room)
                })?;
                if client.user() == "alice" {
                    let form = "<query xmlns='http://jabber.org/protocol/muc#owner'><x xmlns='jabber:x:data' type='submit'/></query>";
                    client.ask("set", &room, form, PATIENCE)?;
                }
            }
        }
        Ok(deck)
    }

    fn cabin(&self) -> String {
        self.room.replacen("deck", "cabin", 1)
    }

    /// Says lines while this goes on: how long each took to the one who listens.
    fn hear_while(&mut self, what: Meanwhile, lines: &Lines) -> Outcome<Vec<Duration>> {
        if what == Meanwhile::Page {
            self.fill_archive(lines)?;
        }
        self.world.link.set(Profile::sat9600());
        settle(self.world, self.rest);
        let backlog = match what {
            Meanwhile::Backlog => {
                let [first, last] = self.leave_backlog(lines)?;
                // What the way back takes is the outage's.
                self.hears.expect("the first that waited", PATIENCE, |stanza| {
                    stanza.body().as_deref() == Some(&*first)
                })?;
                Some(last)
            }
            Meanwhile::Nothing | Meanwhile::Large | Meanwhile::Presences | Meanwhile::Page => None,
        };
        let stanzas: Vec<(String, String)> = lines
            .slice(what as usize * LINES, LINES)
            .iter()
            .map(|line| Shape::Usual.stanza(&self.room, &line.body, &mut self.dice))
            .collect();
        let (deck, done) = (&*self, AtomicBool::new(false));
        let mark = deck.hears.received();
        let said = thread::scope(|scope| {
            let other = scope.spawn(|| deck.go_on(what, &done));
            let said = deck.say(&stanzas, backlog.as_deref());
            done.store(true, Ordering::Relaxed);
            other.join().map_err(|_| Failure("it ended in a panic".to_owned()))??;
            said
        })?;
        let heard = deck.hears.transcript_from(mark);
        let times = said.iter().map(|(id, at)| {
            let stanza = heard.iter().find(|stanza| stanza.id() == *id);
            let stanza = stanza.ok_or_else(|| Failure(format!("{id} was not heard")))?;
            Ok((deck.hears.connected_at() + stanza.at).saturating_duration_since(*at))
        });
        let times = times.collect::<Outcome<Vec<Duration>>>()?;
        // What is left of it is not for the next.
        self.world.link.set(Profile::lan());
        settle(self.world, self.rest);
        for client in [&self.alice, &self.adam, &self.hears, &self.gets] {
            client.forget();
        }
        Ok(times)
    }

    /// Says them one by one, until all are said, or what had waited has come; and waits until the last is heard.
    fn say<'s>(&self, stanzas: &'s [(String, String)], backlog: Option<&str>) -> Outcome<Vec<(&'s str, Instant)>> {
        let pace = if backlog.is_some() { PACE_OF_DRAIN } else { PACE };
        let mut said = Vec::new();
        let mut next = Instant::now();
        for (stanza, id) in stanzas {
            thread::sleep(next.saturating_duration_since(Instant::now()));
            next = Instant::now() + pace;
            said.push((id.as_str(), Instant::now()));
            self.alice.send(stanza)?;
            if backlog.is_some_and(|last| self.hears.count(|stanza| stanza.body().as_deref() == Some(last)) > 0) {
                break;
            }
        }
        if let Some((last, _)) = said.last() {
            self.hears
                .expect("the last line", PATIENCE, |stanza| stanza.id() == *last)?;
        }
        Ok(said)
    }

    /// What happens meanwhile, until it is enough.
    fn go_on(&self, what: Meanwhile, done: &AtomicBool) -> Outcome {
        let mut dice = Dice::new(2);
        let mut number = 0;
        while !done.load(Ordering::Relaxed) {
            number += 1;
            match what {
                Meanwhile::Nothing | Meanwhile::Backlog => return Ok(()),
                Meanwhile::Large => {
                    // As much as random text can have.
                    let mut text = String::new();
                    while text.len() < LARGE_BYTES {
                        write!(text, "{:016x}", dice.roll()).map_err(|error| Failure(error.to_string()))?;
                    }
                    let to = format!("{}/{}", self.gets.bare(), self.gets.resource());
                    self.adam.chat(&to, &text)?;
                    self.gets.expect("what is large", PATIENCE, |stanza| {
                        stanza.body().is_some_and(|body| body == text)
                    })?;
                }
                Meanwhile::Presences => {
                    let to = format!("{}/{}", self.room, self.adam.user());
                    self.adam
                        .presence_to(&to, "", &format!("<status>change {number}</status>"))?;
                    thread::sleep(PRESENCE_EVERY);
                }
                Meanwhile::Page => {
                    let query = format!(
                        "<query xmlns='urn:xmpp:mam:2' queryid='q{number}'><set xmlns='http://jabber.org/protocol/rsm'><max>{PAGE}</max></set></query>"
                    );
                    self.gets.ask("set", &self.room, &query, PATIENCE)?;
                }
            }
        }
        Ok(())
    }

    /// Says what the archive is to hold, while the link is fast.
    fn fill_archive(&mut self, lines: &Lines) -> Outcome {
        let mut last = String::new();
        for line in lines.slice(1000, PAGE) {
            let (stanza, id) = Shape::Usual.stanza(&self.room, &line.body, &mut self.dice);
            self.adam.send(&stanza)?;
            last = id;
        }
        self.hears
            .expect("the last of them", PATIENCE, |stanza| stanza.id() == last)?;
        settle(self.world, self.rest);
        Ok(())
    }

    /// Ten minutes of another room wait when the link is back: gives the bodies of the first and the last that was said in it.
    fn leave_backlog(&mut self, lines: &Lines) -> Outcome<[String; 2]> {
        let cabin = self.cabin();
        self.world.link.down();
        let said = lines.slice(2000, BACKLOG);
        let bodies = said
            .iter()
            .enumerate()
            .map(|(number, line)| format!("{} ({number})", line.body));
        let bodies: Vec<String> = bodies.collect();
        for body in &bodies {
            let (stanza, _) = Shape::Usual.stanza(&cabin, body, &mut self.dice);
            self.adam.send(&stanza)?;
        }
        self.adam.expect("its own last line", PATIENCE, |stanza| {
            stanza.from().starts_with(&cabin)
                && stanza
                    .body()
                    .is_some_and(|body| body.ends_with(&format!("({})", BACKLOG - 1)))
        })?;
        // Long enough for the pair to find out; TCP of plain S2S goes on afterwards.
        thread::sleep(Duration::from_secs(30));
        self.world.link.up();
        Ok([bodies[0].clone(), bodies[BACKLOG - 1].clone()])
    }
}
