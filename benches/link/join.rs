//! What it costs that far users enter a room that has many occupants near it, and some history.

use std::time::Duration;

use narrows_lab::client::{Client, Failure, Outcome};
use narrows_lab::scenario::{Dice, Side, Stage, WorldStage, crowd_user};
use narrows_lab::{Capture, Site, World};

use crate::lines::{Line, Shape};
use crate::talk::settle;

/// Fifty joins over plain S2S are 5,000 presences.
const PATIENCE: Duration = Duration::from_secs(180);

/// Occupants near the room before the first far one comes, and as many far ones.
pub const OCCUPANTS: usize = 50;

/// What both servers send of a room's history if nothing else is asked or configured.
pub const HISTORY: usize = 20;

/// Bytes from the room to the far users, and from them to the room.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bytes {
    pub to_users: u64,
    pub to_room: u64,
}

impl Bytes {
    /// The sum over some joins, rounded, for each of them.
    pub fn mean(all: impl ExactSizeIterator<Item = Self>) -> Self {
        let count = all.len() as u64;
        let sum = all.fold(Self::default(), |sum, one| Self {
            to_users: sum.to_users + one.to_users,
            to_room: sum.to_room + one.to_room,
        });
        Self {
            to_users: (sum.to_users + count / 2) / count,
            to_room: (sum.to_room + count / 2) / count,
        }
    }

    fn since(self, before: Self) -> Self {
        Self {
            to_users: self.to_users - before.to_users,
            to_room: self.to_room - before.to_room,
        }
    }
}

/// What one join cost.
#[derive(Clone, Copy, Debug)]
pub struct Join {
    /// IP packets on the link, both directions' acknowledgements included.
    pub ip: Bytes,
    /// What the pair gave to TLS: frames after compression, acknowledgements included. Nothing without sidecars.
    pub frames: Option<Bytes>,
}

/// Fills the room, lets the far users in one after the other, and gives what each of them cost.
pub fn measure(world: &World, sidecars: bool, lines: &[Line], rest: Duration) -> Outcome<Vec<Join>> {
    let stage = WorldStage::new(world).waiting(PATIENCE);
    let room = format!("deck@{}", stage.rooms(Side::A));
    let mut near = Vec::new();
    for number in 1..=OCCUPANTS {
        let client = stage.connect(Side::A, &crowd_user(number), "pc")?;
        client.join(&room, &format!("near-{number}"), None, None)?;
        client.expect("to be in", PATIENCE, |stanza| stanza.has_status("110"))?;
        if near.is_empty() {
            let form =
                "<query xmlns='http://jabber.org/protocol/muc#owner'><x xmlns='jabber:x:data' type='submit'/></query>";
            client.ask("set", &room, form, PATIENCE)?;
        }
        near.push(client);
    }
    let mut dice = Dice::new(2);
    for (number, line) in lines.iter().enumerate() {
        let (stanza, id) = Shape::Usual.stanza(&room, &line.body, &mut dice);
        let speaker = &near[number % 7];
        speaker.send(&stanza)?;
        speaker.expect("the line", PATIENCE, |stanza| stanza.id() == id)?;
    }
    let mut far: Vec<Client> = Vec::new();
    let mut joins = Vec::new();
    settle(world, rest);
    for number in 1..=OCCUPANTS {
        let client = stage.connect(Side::B, &crowd_user(number), "crowd")?;
        let (capture, before) = (Capture::begin(&world.link), frames(world, sidecars)?);
        client.join(&room, &format!("far-{number}"), None, None)?;
        client.expect("the subject", PATIENCE, |stanza| stanza.subject().is_some())?;
        settle(world, rest);
        let (to_users, to_room) = capture.bytes_each_way();
        joins.push(Join {
            ip: Bytes { to_users, to_room },
            frames: frames(world, sidecars)?
                .zip(before)
                .map(|(now, before)| now.since(before)),
        });
        let history = client.count(|stanza| stanza.body().is_some());
        if history != lines.len() {
            return Err(Failure(format!("far-{number} got {history} lines of history")));
        }
        far.push(client);
    }
    Ok(joins)
}

fn frames(world: &World, sidecars: bool) -> Outcome<Option<Bytes>> {
    if !sidecars {
        return Ok(None);
    }
    let sent = |site: &Site| -> Outcome<u64> {
        let labels = ["direction=\"sent\"", "level=\"tls\""];
        Ok(site.sidecar().metrics()?.sum("narrows_link_bytes_total", &labels) as u64)
    };
    Ok(Some(Bytes {
        to_users: sent(&world.a)?,
        to_room: sent(&world.b)?,
    }))
}
