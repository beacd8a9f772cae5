//! What a room says crosses the link once, however many occupants are behind it.
//!
//! One world for each kind of server that hosts the room; its far occupants join in steps, and at each step a user near the room
//! says the same number of lines. The sidecars' counters tell how many entries crossed, the emulator's how many bytes.

use std::fmt::Write;
use std::thread;
use std::time::{Duration, Instant};

use narrows_lab::client::{Client, Outcome};
use narrows_lab::scenario::{Dice, Side, Stage, WorldStage, crowd_user};
use narrows_lab::{Capture, Ejabberd, Profile, Prosody, ServerSpec, World};

use crate::stage::{pair_with, stand};

/// So many occupants are behind the link, step by step.
const CROWDS: [usize; 4] = [1, 10, 50, 100];

/// Lines of each step. A line's ids are random, so more of them make the steps comparable.
const LINES: usize = 40;

/// Lines before the first step: the compressor has then seen the words, as it has before all later steps.
const LINES_BEFORE: usize = 120;

/// Lines are numbered from here, so that all numbers are equally long.
const FIRST: usize = 1000;

/// Between two lines: longer than 100 copies take.
const PACE: Duration = Duration::from_millis(250);

/// The link is at rest when nothing was sent for so long: longer than [`ACK_DELAY`] and what TCP still has to say.
const REST: Duration = Duration::from_secs(3);

/// Shorter than the default, to wait less; acknowledgements are a few of a hundred bytes a line.
const ACK_DELAY: &str = "ack_delay: 2s";

/// Longer than the default: how long a server is kept from writing the rest of its copies is the machine's matter, and 50 ms are not much on
/// a busy one. A group that has reached everybody in the room does not wait for the end of the window.
const COLLAPSE_WINDOW: &str = "collapse_window: 2s";

/// A hundred sign-ins and joins on two loaded cores.
const PATIENCE: Duration = Duration::from_secs(90);

/// One step's figures.
#[derive(Debug)]
struct Step {
    occupants: usize,
    entries: f64,
    casts: f64,
    copies: f64,
    bytes_each: f64,
}

/// A conversation in one room, which grows.
struct Talk<'w> {
    world: &'w World,
    stage: WorldStage<'w>,
    room: String,
    near: Client,
    far: Vec<Client>,
    dice: Dice,
    said: usize,
}

impl<'w> Talk<'w> {
    fn begin(world: &'w World) -> Outcome<Self> {
        let stage = WorldStage::new(world).waiting(PATIENCE);
        let room = format!("deck@{}", stage.rooms(Side::A));
        let near = stage.connect(Side::A, "alice", "pc")?;
        near.join(&room, "alice", None, None)?;
        near.expect("to be in", PATIENCE, |stanza| stanza.has_status("110"))?;
        let form =
            "<query xmlns='http://jabber.org/protocol/muc#owner'><x xmlns='jabber:x:data' type='submit'/></query>";
        near.ask("set", &room, form, PATIENCE)?;
        Ok(Self {
            world,
            stage,
            room,
            near,
            far: Vec::new(),
            dice: Dice::new(1),
            said: FIRST,
        })
    }

    /// Lets far users join until there are so many. All ask before the first is waited for: who comes is told who is there in presences
    /// that nobody else gets, and each waits for the end of its window.
    fn grow(&mut self, occupants: usize) -> Outcome {
        let before = self.far.len();
        while self.far.len() < occupants {
            let user = crowd_user(self.far.len() + 1);
            let client = self.stage.connect(Side::B, &user, "crowd")?;
            client.join(&self.room, &user, None, Some(0))?;
            self.far.push(client);
        }
        for client in &self.far[before..] {
            client.expect("to be in", PATIENCE, |stanza| stanza.has_status("110"))?;
        }
        Ok(())
    }

    /// Says lines at the near side and waits until everybody at the far side has the last one.
    fn speak(&mut self, lines: usize) -> Outcome {
        for _ in 0..lines {
            self.said += 1;
            let line = line(&self.room, self.said, &mut self.dice);
            self.near.send(&line)?;
            thread::sleep(PACE);
        }
        let last = format!("{} ", self.said);
        for client in &self.far {
            client.expect("the last line", PATIENCE, |stanza| {
                stanza.body().is_some_and(|body| body.starts_with(&last))
            })?;
        }
        Ok(())
    }

    /// Waits until everything is acknowledged and nothing is on the link.
    fn rest(&self) {
        let mut packets = 0;
        let mut since = Instant::now();
        while since.elapsed() < REST {
            let now = self.world.link.stats().sent_packets();
            if now != packets {
                (packets, since) = (now, Instant::now());
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn measure(&mut self, occupants: usize) -> Outcome<Step> {
        self.grow(occupants)?;
        if self.said == FIRST {
            self.speak(LINES_BEFORE)?;
        }
        self.rest();
        for client in &self.far {
            client.forget();
        }
        let near = self.world.a.sidecar();
        let before = near.metrics()?;
        let capture = Capture::begin(&self.world.link);
        self.speak(LINES)?;
        self.rest();
        let after = near.metrics()?;
        let grown = |name: &str| {
            let sent = ["direction=\"sent\""];
            after.sum(name, &sent) - before.sum(name, &sent)
        };
        // The last line was claimed when it came.
        let heard: usize = self
            .far
            .iter()
            .map(|client| client.count(|stanza| stanza.body().is_some()) + 1)
            .sum();
        assert_eq!(heard, occupants * LINES, "lines heard");
        Ok(Step {
            occupants,
            entries: grown("narrows_entries_total"),
            casts: grown("narrows_casts_total"),
            copies: grown("narrows_copies_total"),
            bytes_each: capture.bytes() as f64 / LINES as f64,
        })
    }
}

/// A line as clients write them: random ids, a marker, eight words. The number comes first, in the same length.
fn line(room: &str, number: usize, dice: &mut Dice) -> String {
    let mut id = String::new();
    for digits in [8, 4, 4, 4, 12] {
        let dash = if id.is_empty() { "" } else { "-" };
        let _ = write!(id, "{dash}{:0digits$x}", dice.roll() & ((1 << (4 * digits)) - 1));
    }
    let mut text = format!("{number} ");
    for _ in 0..8 {
        let word = dice.roll();
        text.extend((0..4).map(|at| char::from(b'a' + (word >> (5 * at)) as u8 % 26)));
        text.push(' ');
    }
    format!(
        "<message to='{room}' type='groupchat' id='{id}'><body>{text}</body>\
         <active xmlns='http://jabber.org/protocol/chatstates'/><origin-id xmlns='urn:xmpp:sid:0' id='{id}'/></message>"
    )
}

fn play(name: &str, a: ServerSpec, b: ServerSpec) {
    let most = CROWDS.into_iter().max().unwrap_or_default();
    // Prosody reads 30 kB/s from a stream as shipped, and 100 copies are 60 kB.
    let b = b.unlimited_from(["a.example", "conference.a.example"]);
    let stand = stand(
        name,
        Profile::lan(),
        a,
        b,
        most,
        pair_with(&[("link", ACK_DELAY), ("queue", COLLAPSE_WINDOW)]),
    );
    let measured = Talk::begin(&stand.world).and_then(|mut talk| {
        let steps: Outcome<Vec<Step>> = CROWDS.into_iter().map(|occupants| talk.measure(occupants)).collect();
        steps
    });
    let steps = measured.unwrap_or_else(|failure| panic!("{name}: {failure}"));
    for step in &steps {
        println!("{name}: {step:?}");
    }
    let lines = LINES as f64;
    for step in &steps {
        // What has one recipient is no cast.
        let casts = if step.occupants > 1 { lines } else { 0.0 };
        let copies = (step.occupants * LINES) as f64;
        assert_eq!(
            (step.entries, step.casts, step.copies),
            (lines, casts, copies),
            "{name}: {steps:?}"
        );
    }
    let bytes = |step: Option<&Step>| step.map_or(f64::NAN, |step| step.bytes_each);
    let ratio = bytes(steps.last()) / bytes(steps.first());
    assert!(
        (0.95..=1.05).contains(&ratio),
        "{name}: bytes a line grow by {ratio}: {steps:?}"
    );
}

/// A room on Prosody says a line to 1, 10, 50 and 100 occupants behind the link: one entry, and as many bytes.
///
/// Count entries, casts, copies and IP bytes of 40 lines at each size of the crowd.
#[test]
fn one_copy_of_prosody() {
    play("ocp", Prosody::stock(), Ejabberd::stock());
}

/// The same for a room on ejabberd.
#[test]
fn one_copy_of_ejabberd() {
    play("oce", Ejabberd::stock(), Prosody::stock());
}
