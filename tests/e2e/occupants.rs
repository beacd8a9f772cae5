//! Clients of slixmpp with self-pings (XEP-0410) through an outage during which everything happens: both sides talk, somebody enters,
//! leaves, is kicked, and a nick is taken on both sides. Afterwards they have heard everything, once and in order per sender; they see the
//! same; and none of them has ever been out, or thought so.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, sleep},
    time::{Duration, Instant},
};

use narrows_lab::{
    Ejabberd, Layout, PASSWORD, Profile, Prosody, ServerSpec, Site,
    client::{Failure, MUC_ADMIN, Outcome},
    scenario::{Side, Stage, WorldStage},
};
use serde_json::Value;

use crate::{
    cast::{enter, make_room, sign_in},
    faults::{held_pair, unthrottled},
    seen::{PATIENCE, presence_of},
    stage::{in_company, world},
};

/// Somebody says something this often on each side.
const SAID_EVERY: Duration = Duration::from_secs(2);

/// A client in a process of its own.
struct Occupant {
    nick: String,
    process: Child,
    orders: ChildStdin,
    told: Arc<Mutex<Vec<Value>>>,
    /// Words it was told to say.
    said: usize,
}

impl Drop for Occupant {
    fn drop(&mut self) {
        // It may have ended by itself, which is told elsewhere.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Occupant {
    fn start(site: &Site, user: &str, room: &str, pings_every: Duration) -> Outcome<Self> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/occupant.py");
        let mut command = site.command("/usr/bin/python3")?;
        command.args([
            script,
            &format!("{user}@{}/slixmpp", site.domain()),
            PASSWORD,
            room,
            user,
        ]);
        command.arg(pings_every.as_secs().to_string());
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let lost = || Failure("a process without pipes".to_owned());
        let orders = process.stdin.take().ok_or_else(lost)?;
        let lines = BufReader::new(process.stdout.take().ok_or_else(lost)?).lines();
        let told = Arc::new(Mutex::new(Vec::new()));
        let tell = Arc::clone(&told);
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let value = serde_json::from_str(&line).unwrap_or(Value::String(line));
                tell.lock().unwrap_or_else(PoisonError::into_inner).push(value);
            }
        });
        let occupant = Self {
            nick: user.to_owned(),
            process,
            orders,
            told,
            said: 0,
        };
        occupant.expect("to be in", |value| value["self"] == "available")?;
        Ok(occupant)
    }

    fn told(&self) -> Vec<Value> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn expect(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Outcome<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let told = self.told();
            if let Some(value) = told.iter().rev().find(|value| wanted(value)) {
                return Ok(value.clone());
            }
            if Instant::now() > deadline {
                let last: Vec<_> = told.iter().rev().take(20).collect();
                return Err(Failure(format!("{}: {what}, and not {last:?}", self.nick)));
            }
            sleep(Duration::from_millis(50));
        }
    }

    fn order(&mut self, line: &str) -> Outcome {
        Ok(writeln!(self.orders, "{line}")?)
    }

    fn say(&mut self) -> Outcome {
        self.said += 1;
        self.order(&format!("say {} {}", self.nick, self.said))
    }

    /// Numbers that were heard of each sender, in the order in which they were.
    fn heard(&self) -> BTreeMap<String, Vec<usize>> {
        let mut heard: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for value in self.told() {
            let words = value["heard"].as_str().and_then(|words| words.split_once(' '));
            if let Some((sender, Ok(number))) = words.map(|(sender, number)| (sender, number.parse())) {
                heard.entry(sender.to_owned()).or_default().push(number);
            }
        }
        heard
    }

    /// Waits until it has heard this, exactly.
    fn has_heard(&self, all: &BTreeMap<String, Vec<usize>>) -> Outcome {
        let deadline = Instant::now() + 2 * PATIENCE;
        while self.heard() != *all && Instant::now() < deadline {
            sleep(Duration::from_millis(100));
        }
        let heard = self.heard();
        if heard == *all {
            return Ok(());
        }
        Err(Failure(format!("{} heard {heard:?} of {all:?}", self.nick)))
    }

    fn sees(&mut self, everybody: &BTreeSet<&str>) -> Outcome {
        let wanted: Vec<Value> = everybody.iter().map(|nick| Value::from(*nick)).collect();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let before = self.told().len();
            self.order("roster")?;
            self.expect("its roster", |value| value["roster"].is_array())?;
            let roster = self
                .told()
                .iter()
                .skip(before)
                .find_map(|value| value["roster"].as_array().cloned());
            if roster.as_ref() == Some(&wanted) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Failure(format!("{} sees {roster:?}, not {wanted:?}", self.nick)));
            }
            sleep(Duration::from_millis(200));
        }
    }

    /// Whether all went as if there had been no outage: he was never out, nor thought so, and nothing that he said came back.
    fn noticed_nothing(&self) -> Outcome {
        let odd = |value: &&Value| {
            value["self"] == "unavailable"
                || value["self"] == "error"
                || ["rejoin", "error", "disconnected"]
                    .iter()
                    .any(|what| !value[what].is_null())
                || value["ping"] == "out"
                || value.is_string()
        };
        match self.told().iter().find(odd) {
            Some(value) => Err(Failure(format!("{}: {value}", self.nick))),
            None => Ok(()),
        }
    }
}

/// How long everything takes.
#[derive(Clone, Copy)]
struct Times {
    hold: Duration,
    outage: Duration,
    pings_every: Duration,
}

const SHORT: Times = Times {
    hold: Duration::from_secs(5),
    outage: Duration::from_secs(40),
    pings_every: Duration::from_secs(4),
};

/// As an operator has it, with the defaults.
const REAL: Times = Times {
    hold: Duration::from_secs(300),
    outage: Duration::from_secs(600),
    pings_every: Duration::from_secs(60),
};

fn through_an_outage(name: &str, a: ServerSpec, b: ServerSpec, times: Times) {
    let _company = in_company();
    let split = format!("split: {{ hold: {}s, join: provisional }}", times.hold.as_secs());
    let pair = Layout::Sidecar(held_pair().yaml("mirror", &split));
    let world = &world(name, Profile::vsat128k(), unthrottled(a), unthrottled(b), 1, pair);
    let play = || -> Outcome {
        let stage = WorldStage::new(world);
        let room = format!("deck@{}", stage.rooms(Side::A));
        let nick = |nick: &str| format!("{room}/{nick}");
        let alice = sign_in(&stage, Side::A, "alice")?;
        make_room(&stage, &alice, &room)?;
        let mut staying = Vec::new();
        for (site, user) in [(&world.a, "adam"), (&world.b, "b1"), (&world.b, "b2")] {
            staying.push(Occupant::start(site, user, &room, times.pings_every)?);
        }
        let [b3, b4, b5] = &["b3", "b4", "b5"].map(|user| sign_in(&stage, Side::B, user));
        let (Ok(b3), Ok(b4), Ok(b5)) = (b3, b4, b5) else {
            return Err(Failure(format!("{b3:?} {b4:?} {b5:?}")));
        };
        for client in [b3, b5] {
            enter(&stage, client, &room)?;
        }
        // What the room is, for those who enter while it is out of reach.
        b3.ask(
            "get",
            &room,
            "<query xmlns='http://jabber.org/protocol/disco#info'/>",
            PATIENCE,
        )?;
        for occupant in &mut staying {
            occupant.say()?;
        }

        world.link.down();
        let since = Instant::now();
        let mut jack = None;
        while since.elapsed() < times.outage {
            for occupant in &mut staying {
                occupant.say()?;
            }
            if jack.is_none() && since.elapsed() > times.hold + (times.outage - times.hold) / 2 {
                // Where the room is out of reach one leaves, and one enters under a nick that another takes in the room.
                presence_of(b3, "that alice is gone", &nick("alice"), "unavailable", PATIENCE)?;
                b5.leave(&room, "b5", "")?;
                b4.join(&room, "jack", None, Some(0))?;
                presence_of(b4, "that it is in", &nick("jack"), "", PATIENCE)?;
                let near_jack = sign_in(&stage, Side::A, "u1")?;
                near_jack.join(&room, "jack", None, Some(0))?;
                presence_of(&near_jack, "that it is in", &nick("jack"), "", PATIENCE)?;
                let kick = format!("<query xmlns='{MUC_ADMIN}'><item nick='b3' role='none'/></query>");
                let kicked = alice.ask("set", &room, &kick, PATIENCE)?;
                if kicked.kind() != "result" {
                    return Err(Failure(format!("the kick: {}", kicked.raw)));
                }
                // He goes and comes back, which only the end of it may show to those far away.
                near_jack.leave(&room, "jack", "")?;
                near_jack.join(&room, "jack", None, Some(0))?;
                jack = Some(near_jack);
            }
            sleep(SAID_EVERY.min(times.outage.saturating_sub(since.elapsed())));
        }
        world.link.up();
        for occupant in &mut staying {
            occupant.say()?;
        }
        let all: BTreeMap<String, Vec<usize>> = staying
            .iter()
            .map(|occupant| (occupant.nick.clone(), (1..=occupant.said).collect()))
            .collect();
        for occupant in &staying {
            occupant.has_heard(&all)?;
        }
        let out = presence_of(b3, "that it was kicked", &nick("b3"), "unavailable", PATIENCE)?;
        if !out.has_status("307") {
            return Err(Failure(format!("b3 is told: {}", out.raw)));
        }
        presence_of(b4, "why it is out", &nick("jack"), "error", PATIENCE)?;
        let everybody = BTreeSet::from(["adam", "alice", "b1", "b2", "jack"]);
        for occupant in &mut staying {
            occupant.sees(&everybody)?;
            // Whoever thinks that he is out would find it now.
            let pings = occupant.told().iter().filter(|value| !value["ping"].is_null()).count();
            let deadline = Instant::now() + times.pings_every + PATIENCE;
            let asked = |occupant: &Occupant| occupant.told().iter().filter(|value| !value["ping"].is_null()).count();
            while asked(occupant) == pings && Instant::now() < deadline {
                sleep(Duration::from_millis(100));
            }
            occupant.expect("a ping that tells that it is in", |value| value["ping"] == "inside")?;
            occupant.noticed_nothing()?;
            println!(
                "{name}: {} said {}, pinged {} times",
                occupant.nick,
                occupant.said,
                asked(occupant)
            );
        }
        Ok(())
    };
    play().unwrap_or_else(|failure| panic!("{name}: {failure}"));
}

/// The room on Prosody.
#[test]
fn slixmpp_through_an_outage_prosody_and_ejabberd() {
    through_an_outage("xpe", Prosody::stock(), Ejabberd::stock(), SHORT);
}

/// The room on ejabberd.
#[test]
fn slixmpp_through_an_outage_ejabberd_and_prosody() {
    through_an_outage("xep", Ejabberd::stock(), Prosody::stock(), SHORT);
}

/// Ten minutes, with the defaults.
#[test]
#[ignore = "eleven minutes: cargo test --test e2e slixmpp_through_ten_minutes -- --ignored --nocapture"]
fn slixmpp_through_ten_minutes() {
    through_an_outage("xlp", Prosody::stock(), Ejabberd::stock(), REAL);
}
