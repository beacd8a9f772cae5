//! A conversation in one room of a world, measured.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use narrows_lab::client::{Client, Failure, Outcome};
use narrows_lab::scenario::{Dice, Side, Stage, WorldStage, crowd_user};
use narrows_lab::{Capture, World};

use crate::lines::{Line, Shape};

/// Joins of a hundred occupants over plain S2S are 10,000 presences.
const PATIENCE: Duration = Duration::from_secs(180);

/// Near the room so many people speak; each nick of the conversation is one of them.
const NEAR: [&str; 4] = ["alice", "adam", "u1", "u2"];

/// Of the far occupants, so many speak.
const FAR_SPEAKERS: usize = 4;

/// Who says the lines.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Speaks {
    /// Users beside the room.
    Near,
    /// Users behind the link.
    Far,
}

/// What a run cost and how long it took.
#[derive(Clone, Debug)]
pub struct Figures {
    /// Bytes at IP level, both directions, of one line.
    pub bytes: f64,
    pub packets: f64,
    pub body_bytes: f64,
    /// From sending to reception, of every copy at a far occupant.
    pub copies: Vec<Duration>,
    /// The same of the last copy of each line.
    pub all: Vec<Duration>,
    /// Entries of the room's side that crossed, for one line; nothing without sidecars.
    pub entries: Option<f64>,
}

pub struct Talk<'w> {
    world: &'w World,
    stage: WorldStage<'w>,
    room: String,
    sidecars: bool,
    near: Vec<Client>,
    far: Vec<Client>,
    dice: Dice,
    pace: Duration,
    rest: Duration,
}

impl<'w> Talk<'w> {
    pub fn begin(world: &'w World, sidecars: bool, pace: Duration, rest: Duration) -> Outcome<Self> {
        let stage = WorldStage::new(world).waiting(PATIENCE);
        let room = format!("deck@{}", stage.rooms(Side::A));
        let mut near = Vec::new();
        for user in NEAR {
            let client = stage.connect(Side::A, user, "pc")?;
            client.join(&room, user, None, None)?;
            client.expect("to be in", PATIENCE, |stanza| stanza.has_status("110"))?;
            if near.is_empty() {
                let form = "<query xmlns='http://jabber.org/protocol/muc#owner'><x xmlns='jabber:x:data' type='submit'/></query>";
                client.ask("set", &room, form, PATIENCE)?;
            }
            near.push(client);
        }
        Ok(Self {
            world,
            stage,
            room,
            sidecars,
            near,
            far: Vec::new(),
            dice: Dice::new(1),
            pace,
            rest,
        })
    }

    /// Lets far users join until there are so many.
    pub fn grow(&mut self, occupants: usize) -> Outcome {
        while self.far.len() < occupants {
            let user = crowd_user(self.far.len() + 1);
            let client = self.stage.connect(Side::B, &user, "crowd")?;
            // `u1` and `u2` are near, too: another nick.
            client.join(&self.room, &format!("far-{user}"), None, Some(0))?;
            client.expect("to be in", PATIENCE, |stanza| stanza.has_status("110"))?;
            self.far.push(client);
        }
        settle(self.world, self.rest);
        Ok(())
    }

    pub fn set_pace(&mut self, pace: Duration) {
        self.pace = pace;
    }

    fn entries(&self) -> Outcome<Option<f64>> {
        if !self.sidecars {
            return Ok(None);
        }
        let metrics = self.world.a.sidecar().metrics()?;
        Ok(Some(metrics.sum("narrows_entries_total", &["direction=\"sent\""])))
    }

    /// Says the lines, each by the one who stands for its nick, and waits for everything.
    pub fn say(&mut self, lines: &[Line], speaks: Speaks, shape: Shape) -> Outcome<Figures> {
        for client in &self.far {
            client.forget();
        }
        let marks: Vec<usize> = self.far.iter().map(Client::received).collect();
        let entries = self.entries()?;
        let capture = Capture::begin(&self.world.link);
        let mut sent = BTreeMap::new();
        let mut last = String::new();
        let mut next = Instant::now();
        for line in lines {
            let speakers = match speaks {
                Speaks::Near => &self.near[..],
                Speaks::Far => &self.far[..self.far.len().min(FAR_SPEAKERS)],
            };
            let number: usize = line.nick.bytes().map(usize::from).sum();
            let speaker = &speakers[number % speakers.len()];
            let (stanza, id) = shape.stanza(&self.room, &line.body, &mut self.dice);
            thread::sleep(next.saturating_duration_since(Instant::now()));
            next = Instant::now() + self.pace;
            sent.insert(id.clone(), Instant::now());
            speaker.send(&stanza)?;
            last = id;
        }
        for client in &self.far {
            client.expect("the last line", PATIENCE, |stanza| stanza.id() == last)?;
        }
        settle(self.world, self.rest);
        let count = lines.len() as f64;
        let (bytes, packets) = (capture.bytes() as f64 / count, capture.packets() as f64 / count);
        let entries = self
            .entries()?
            .zip(entries)
            .map(|(after, before)| (after - before) / count);

        let mut copies = Vec::new();
        let mut all: BTreeMap<&str, Duration> = BTreeMap::new();
        for (client, mark) in self.far.iter().zip(marks) {
            for stanza in client.transcript_from(mark) {
                let Some((id, at)) = sent.get_key_value(stanza.id()) else {
                    continue;
                };
                let took = (client.connected_at() + stanza.at).saturating_duration_since(*at);
                copies.push(took);
                let slowest = all.entry(id).or_default();
                *slowest = took.max(*slowest);
            }
        }
        if copies.len() != lines.len() * self.far.len() {
            return Err(Failure(format!(
                "{} copies of {} lines to {} occupants",
                copies.len(),
                lines.len(),
                self.far.len()
            )));
        }
        let body_bytes = lines.iter().map(|line| line.body.len()).sum::<usize>() as f64 / count;
        Ok(Figures {
            bytes,
            packets,
            body_bytes,
            copies,
            all: all.into_values().collect(),
            entries,
        })
    }
}

/// Waits until nothing was on the link for so long, acknowledgements included.
pub fn settle(world: &World, rest: Duration) {
    let (mut packets, mut since) = (0, Instant::now());
    while since.elapsed() < rest {
        let now = world.link.stats().sent_packets();
        if now != packets {
            (packets, since) = (now, Instant::now());
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The `percent`th percentile in milliseconds.
pub fn percentile(times: &[Duration], percent: usize) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let place = (sorted.len().saturating_sub(1)) * percent / 100;
    sorted.get(place).map_or(f64::NAN, |time| time.as_secs_f64() * 1000.0)
}
