//! Those who talk while things break: two users beside the room, five across the link, all in one room, and one pair of them
//! in a conversation of their own.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::{Duration, Instant},
};

use narrows_lab::{
    World,
    client::{Client, Failure, Outcome},
    load::{Fate, heard, is_expulsion, numbered, speak, tell},
    scenario::{Dice, FAR_USERS, Side, Stage, WorldStage},
};

/// Members of the cast that are not to be told apart from their own words elsewhere.
const RESOURCE: &str = "cast";

/// Persistent, so that Prosody knows it again after a restart.
const FORM: &str = "<query xmlns='http://jabber.org/protocol/muc#owner'><x xmlns='jabber:x:data' type='submit'>\
    <field var='FORM_TYPE'><value>http://jabber.org/protocol/muc#roomconfig</value></field>\
    <field var='muc#roomconfig_persistentroom'><value>1</value></field></x></query>";

/// Everybody, in the room.
pub struct Cast<'w> {
    pub stage: WorldStage<'w>,
    pub room: String,
    /// Speaks in the room and to `b5`; owns the room.
    pub alice: Client,
    /// Only listens, beside the room: he knows what it said.
    pub adam: Client,
    /// `b1` to `b4` speak in the room; `b5` listens there, and speaks to `alice`.
    pub far: Vec<Client>,
    room_sent: BTreeMap<String, usize>,
    talk_sent: BTreeMap<String, usize>,
    /// When each was said in the room.
    pub said_at: BTreeMap<(String, usize), Instant>,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcomes {
    pub room: Fate,
    /// Of the conversation of two: never received, received twice, out of order.
    pub talk_lost: BTreeSet<(String, usize)>,
    pub talk_doubled: usize,
    pub talk_late: usize,
    /// Messages that came back to their senders as errors.
    pub returned: usize,
    /// Who was put out of the room, as they and the near occupants saw it.
    pub expelled: Vec<String>,
}

impl Outcomes {
    pub fn lost(&self) -> usize {
        self.room.lost() + self.talk_lost.len()
    }

    /// Nothing twice, nothing out of order, nobody out of the room.
    pub fn is_orderly(&self) -> bool {
        self.room.doubled + self.room.late + self.talk_doubled + self.talk_late == 0 && self.expelled.is_empty()
    }
}

impl fmt::Display for Outcomes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "room: {}", self.room)?;
        writeln!(
            f,
            "between two: {} lost {:?}, {} doubled, {} late",
            self.talk_lost.len(),
            self.talk_lost,
            self.talk_doubled,
            self.talk_late
        )?;
        write!(f, "{} returned, {} expelled", self.returned, self.expelled.len())?;
        self.expelled.iter().take(5).try_for_each(|who| write!(f, "\n  {who}"))
    }
}

impl<'w> Cast<'w> {
    /// Signs everybody in and brings them into a new room at A.
    pub fn gather(world: &'w World, room: &str) -> Outcome<Self> {
        let stage = WorldStage::new(world);
        let room = format!("{room}@{}", stage.rooms(Side::A));
        let alice = sign_in(&stage, Side::A, "alice")?;
        make_room(&stage, &alice, &room)?;
        let adam = sign_in(&stage, Side::A, "adam")?;
        enter(&stage, &adam, &room)?;
        let mut far = Vec::new();
        for user in FAR_USERS {
            let client = sign_in(&stage, Side::B, user)?;
            enter(&stage, &client, &room)?;
            far.push(client);
        }
        Ok(Self {
            stage,
            room,
            alice,
            adam,
            far,
            room_sent: BTreeMap::new(),
            talk_sent: BTreeMap::new(),
            said_at: BTreeMap::new(),
        })
    }

    /// Somebody says something, in the room or to the one other.
    pub fn speak_one(&mut self, dice: &mut Dice) -> Outcome {
        let more = "x".repeat(dice.below(120));
        match dice.below(10) {
            0 => self.talk(true, &more),
            1 => self.talk(false, &more),
            2..=4 => self.say(0, &more),
            speaker => self.say(speaker - 4, &more).or_else(|_| self.say(1, &more)),
        }
    }

    /// `speaker` 0 is `alice`, then `b1` to `b4`.
    pub fn say(&mut self, speaker: usize, more: &str) -> Outcome {
        let client = match speaker {
            0 => &self.alice,
            far => self
                .far
                .get(far - 1)
                .filter(|_| far < 5)
                .ok_or_else(|| Failure(format!("there is no speaker {far}")))?,
        };
        let count = self.room_sent.entry(client.user().to_owned()).or_default();
        *count += 1;
        self.said_at.insert((client.user().to_owned(), *count), Instant::now());
        speak(client, &self.room, *count, more)
    }

    fn talk(&mut self, from_alice: bool, more: &str) -> Outcome {
        let (from, to) = match from_alice {
            true => (&self.alice, &self.far[4]),
            false => (&self.far[4], &self.alice),
        };
        let count = self.talk_sent.entry(from.user().to_owned()).or_default();
        *count += 1;
        tell(from, &to.jid, *count, more)
    }

    /// How many messages were sent, all together.
    pub fn sent(&self) -> usize {
        self.room_sent.values().sum::<usize>() + self.talk_sent.values().sum::<usize>()
    }

    /// Everybody has a last word, and everybody waits for all of them: what was said before is behind them then.
    pub fn settle(&mut self, patience: Duration) -> Outcome {
        for speaker in 0..5 {
            self.say(speaker, "at last")?;
        }
        self.talk(true, "at last")?;
        self.talk(false, "at last")?;
        let deadline = Instant::now() + patience;
        let wait = |client: &Client, kind: &str, sender: &str, number: usize| {
            let left = deadline.saturating_duration_since(Instant::now());
            client
                .expect(&format!("the last word of {sender}"), left, |stanza| {
                    stanza.kind() == kind && numbered(stanza).is_some_and(|mark| mark == (sender.to_owned(), number))
                })
                .map(drop)
        };
        for (sender, number) in &self.room_sent {
            for client in self.far.iter().chain([&self.adam]) {
                wait(client, "groupchat", sender, *number)?;
            }
        }
        wait(&self.far[4], "chat", "alice", self.talk_sent["alice"])?;
        wait(&self.alice, "chat", "b5", self.talk_sent["b5"])
    }

    pub fn outcomes(&self) -> Outcomes {
        let listeners: Vec<_> = self
            .far
            .iter()
            .chain([&self.alice])
            .map(|client| (client.user().to_owned(), heard(client, "groupchat")))
            .collect();
        let room = Fate::of(&self.room_sent, &heard(&self.adam, "groupchat"), &listeners);
        // For a conversation of two the receiver is the witness.
        let words: Vec<_> = [heard(&self.far[4], "chat"), heard(&self.alice, "chat")].concat();
        let talk = Fate::of(&self.talk_sent, &words, &[]);
        let everybody = || self.far.iter().chain([&self.alice, &self.adam]);
        let returned = |client: &Client| {
            let transcript = client.transcript();
            let errors = transcript
                .iter()
                .filter(|stanza| stanza.is_message() && stanza.kind() == "error");
            errors.count()
        };
        let mut expelled = Vec::new();
        for client in everybody() {
            let seen = client.transcript();
            let gone = seen
                .iter()
                .filter(|stanza| is_expulsion(stanza) || (stanza.is_presence() && stanza.kind() == "unavailable"));
            expelled.extend(gone.map(|stanza| format!("{}: {}", client.user(), stanza.raw)));
        }
        Outcomes {
            room,
            talk_lost: talk.not_entered,
            talk_doubled: talk.doubled,
            talk_late: talk.late,
            returned: everybody().map(returned).sum(),
            expelled,
        }
    }
}

pub fn sign_in(stage: &WorldStage<'_>, side: Side, user: &str) -> Outcome<Client> {
    let client = stage.connect(side, user, RESOURCE)?;
    client.presence("")?;
    Ok(client)
}

/// Makes a room by entering it.
pub fn make_room(stage: &WorldStage<'_>, owner: &Client, room: &str) -> Outcome {
    enter(stage, owner, room)?;
    let answer = owner.ask("set", room, FORM, stage.patience())?;
    match answer.kind() {
        "result" => Ok(()),
        _ => Err(Failure(format!("the room is not made: {}", answer.raw))),
    }
}

/// Enters, without history, and waits until the room says that it has happened.
pub fn enter(stage: &WorldStage<'_>, client: &Client, room: &str) -> Outcome {
    client.join(room, client.user(), None, Some(0))?;
    let inside = format!("{room}/{}", client.user());
    let answer = client.expect("that it is in the room", stage.patience(), |stanza| {
        stanza.is_presence() && stanza.from() == inside && (stanza.has_status("110") || stanza.kind() == "error")
    })?;
    match answer.kind() {
        "" => Ok(()),
        _ => Err(Failure(format!("{} may not join: {}", client.jid, answer.raw))),
    }
}
