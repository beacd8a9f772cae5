//! Each state of a mirrored room, and in each of them each process that may end: either sidecar is killed, either server restarts.
//!
//! The states are those of the diagram in `src/mirror/mod.rs`; a room goes through all of them again and again, in one world. After
//! each blow everybody is brought together again. Nobody may have to enter again but who has lost his connection, and who was in a
//! room of ejabberd's when that restarted, for it forgets its occupants and tells them. Whatever was said to those who stayed is heard
//! once, and all see the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    thread::sleep,
    time::{Duration, Instant},
};

use narrows_lab::{
    Ejabberd, Kind, Layout, Profile, Prosody, ServerSpec, Site, Way, World,
    client::{Client, Failure, Outcome, Stanza},
    scenario::{Side, Stage, WorldStage},
};

use crate::{
    cast::{enter, make_room, sign_in},
    faults::{held_pair, kill_set_up, unthrottled},
    seen::{PATIENCE, heard_times, hears, presence_of, sees},
    stage::{in_company, world},
};

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum State {
    Joining,
    Live,
    Waiting,
    Detached,
    Resyncing,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Blow {
    Kill(Side),
    Restart(Side),
}

/// Longer than a server takes to restart, so that what began in `Waiting` is still that for a while.
const HOLD: Duration = Duration::from_secs(6);

/// The link is found to be down sooner than by default, to wait less.
const SOON: [&str; 3] = ["ack_delay: 1s", "quiet_after: 1s", "dead_after: 3s"];

/// Each way while somebody enters: there is time for a blow.
const FAR: Duration = Duration::from_millis(1500);

/// What comes at 9600 bit/s while a room is `Resyncing`: some seconds.
const BACKLOG: usize = 25;

/// Tries to have everybody hear everybody: one is enough, unless somebody learns only then that he is out.
const ROUNDS_MAX: usize = 4;

const ROUND: Duration = Duration::from_secs(15);

/// Alice is beside the room, the others are behind the link.
const USERS: [(Side, &str); 3] = [(Side::A, "alice"), (Side::B, "b1"), (Side::B, "b2")];

/// Enters and leaves.
const GUEST: &str = "b3";

/// Something said, and who must have heard it in the end.
#[derive(Debug)]
struct Word {
    body: String,
    speaker: usize,
    hearers: BTreeSet<usize>,
}

struct Play<'w> {
    world: &'w World,
    stage: WorldStage<'w>,
    room: String,
    /// In the order of [`USERS`].
    clients: Vec<Client>,
    guest: Option<Client>,
    words: Vec<Word>,
    said: usize,
    /// How often somebody had to sign in again.
    sessions: usize,
}

impl<'w> Play<'w> {
    fn begin(world: &'w World) -> Outcome<Self> {
        let stage = WorldStage::new(world);
        let room = format!("deck@{}", stage.rooms(Side::A));
        let mut clients = Vec::new();
        for (side, user) in USERS {
            let client = sign_in(&stage, side, user)?;
            match clients.is_empty() {
                true => make_room(&stage, &client, &room)?,
                false => enter(&stage, &client, &room)?,
            }
            clients.push(client);
        }
        Ok(Self {
            world,
            stage,
            room,
            clients,
            guest: None,
            words: Vec::new(),
            said: 0,
            sessions: 0,
        })
    }

    fn occupant(&self, nick: &str) -> String {
        format!("{}/{nick}", self.room)
    }

    /// Says something that all who are inside are to hear. What is said beside the room is in it when this returns.
    fn say(&mut self, speaker: usize, more: &str) -> Outcome {
        self.said += 1;
        let body = format!("{} {} {more}", USERS[speaker].1, self.said);
        let client = &self.clients[speaker];
        client.groupchat(&self.room, &body)?;
        if USERS[speaker].0 == Side::A {
            hears(client, &body)?;
        }
        self.words.push(Word {
            body,
            speaker,
            hearers: (0..USERS.len()).collect(),
        });
        Ok(())
    }

    fn wait_for(&self, what: &str, site: &Site, is: impl Fn(&narrows_lab::Metrics) -> bool) -> Outcome {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if is(&site.sidecar().metrics()?) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Failure(format!("{}: {what}: not within {PATIENCE:?}", site.domain())));
            }
            sleep(Duration::from_millis(50));
        }
    }

    fn wait_for_link(&self, up: bool) -> Outcome {
        let value = f64::from(u8::from(up));
        [&self.world.a, &self.world.b].iter().try_for_each(|site| {
            self.wait_for("the link", site, |metrics| metrics.sum("narrows_link_up", &[]) == value)
        })
    }

    fn bring_into(&mut self, state: State) -> Outcome {
        match state {
            State::Joining => {
                self.world.link.set(Profile::both(Way {
                    delay: FAR,
                    ..Way::default()
                }));
                let guest = sign_in(&self.stage, Side::B, GUEST)?;
                let packets = || self.world.link.stats().b_to_a.sent.packets;
                let before = packets();
                guest.join(&self.room, GUEST, None, Some(0))?;
                let deadline = Instant::now() + PATIENCE;
                while packets() == before && Instant::now() < deadline {
                    sleep(Duration::from_millis(5));
                }
                self.guest = Some(guest);
                Ok(())
            }
            State::Live => Ok(()),
            State::Waiting => {
                self.world.link.down();
                self.say(0, "while the link is down")?;
                self.say(1, "while the link is down")?;
                self.wait_for_link(false)
            }
            State::Detached => {
                self.bring_into(State::Waiting)?;
                let [alice, b1, _] = &self.clients[..] else {
                    unreachable!()
                };
                presence_of(
                    b1,
                    "that alice is gone",
                    &self.occupant("alice"),
                    "unavailable",
                    HOLD + PATIENCE,
                )?;
                alice
                    .expect("that b1 is away", HOLD + PATIENCE, |stanza| {
                        stanza.from() == self.occupant("b1") && stanza.raw.contains("<show>away</show>")
                    })
                    .map(drop)
            }
            State::Resyncing => {
                self.bring_into(State::Detached)?;
                for _ in 0..BACKLOG {
                    let noise: String = (0..12)
                        .map(|at| format!("{:x}", (self.said * 7919 + at * 104_729) % 65_521))
                        .collect();
                    self.say(0, &noise)?;
                }
                self.world.link.set(Profile::sat9600());
                self.world.link.up();
                self.wait_for_link(true)
            }
        }
    }

    fn strike(&self, blow: Blow) -> Outcome {
        let site = |side| match side {
            Side::A => &self.world.a,
            Side::B => &self.world.b,
        };
        match blow {
            Blow::Kill(side) => {
                kill_set_up(site(side))?;
                site(side).sidecar().start_again()?;
            }
            Blow::Restart(side) => site(side).server().restart()?,
        }
        Ok(())
    }

    /// Whether the last that a client was told of itself is that it is out.
    fn is_out(&self, index: usize) -> bool {
        let own = self.occupant(USERS[index].1);
        let transcript = self.clients[index].transcript();
        let told = transcript
            .iter()
            .rev()
            .find(|stanza| stanza.is_presence() && stanza.from() == own && stanza.has_status("110"));
        told.is_some_and(|stanza| stanza.kind() == "unavailable")
    }

    /// Enters again. What was said before it may have missed. That its former stay is over may be told to it before it is in.
    fn enter_again(&mut self, index: usize) -> Outcome {
        let (client, own) = (&self.clients[index], self.occupant(USERS[index].1));
        client.forget();
        client.join(&self.room, USERS[index].1, None, Some(0))?;
        let inside = |stanza: &Stanza| {
            stanza.is_presence() && stanza.from() == own && stanza.has_status("110") && stanza.kind() == ""
        };
        client.expect("that it is inside again", PATIENCE, inside)?;
        for word in &mut self.words {
            word.hearers.remove(&index);
            // What waited was for the room to refuse.
            if word.speaker == index && USERS[index].0 == Side::B {
                word.hearers.clear();
            }
        }
        Ok(())
    }

    /// Everybody is brought together, and has what he must have. Gives who had to enter again though nothing happened to his connection.
    fn heal(&mut self, blow: Blow) -> Outcome<BTreeSet<&'static str>> {
        self.world.link.set(Profile::lan());
        self.world.link.up();
        self.wait_for_link(true)?;
        for (index, (side, user)) in USERS.into_iter().enumerate() {
            if self.clients[index].closed().is_some() {
                // What is still on its way to the session that is gone is not for this one.
                self.sessions += 1;
                let client = self.stage.connect(side, user, &format!("again-{}", self.sessions))?;
                client.presence("")?;
                self.clients[index] = client;
                self.enter_again(index)?;
            }
        }
        let mut again = BTreeSet::new();
        for round in 1.. {
            for (index, (_, user)) in USERS.into_iter().enumerate() {
                if self.is_out(index) {
                    self.enter_again(index)?;
                    again.insert(user);
                }
            }
            let first = self.words.len();
            for index in 0..USERS.len() {
                self.say(index, "everybody?")?;
            }
            let deadline = Instant::now() + ROUND;
            let heard = |word: &Word| {
                word.hearers
                    .iter()
                    .all(|hearer| heard_times(&self.clients[*hearer], &word.body) > 0)
            };
            while !self.words[first..].iter().all(heard) && Instant::now() < deadline {
                sleep(Duration::from_millis(50));
            }
            if self.words[first..].iter().all(heard) {
                break;
            }
            if round == ROUNDS_MAX || !(0..USERS.len()).any(|index| self.is_out(index)) {
                return Err(Failure(format!(
                    "they do not hear each other: {:?}",
                    &self.words[first..]
                )));
            }
            self.words.truncate(first);
        }
        if let Some(guest) = self.guest.take().filter(|guest| guest.closed().is_none()) {
            let own = self.occupant(GUEST);
            presence_of(&guest, "that it is in", &own, "", PATIENCE)?;
            guest.leave(&self.room, GUEST, "")?;
            presence_of(&guest, "that it has left", &own, "unavailable", PATIENCE)?;
        }
        let everybody = USERS.iter().map(|(_, user)| (*user).to_owned()).collect();
        for client in &self.clients {
            sees(client, &self.room, &everybody)?;
        }
        let doubt = match blow {
            Blow::Kill(Side::A) => self.world.a.sidecar().metrics()?.sum("narrows_in_doubt_total", &[]),
            Blow::Kill(Side::B) => self.world.b.sidecar().metrics()?.sum("narrows_in_doubt_total", &[]),
            Blow::Restart(_) => 0.0,
        };
        let mut missing = BTreeMap::new();
        for word in std::mem::take(&mut self.words) {
            for (index, client) in self.clients.iter().enumerate() {
                let times = heard_times(client, &word.body);
                if times > 1 {
                    return Err(Failure(format!(
                        "{} heard {:?} {times} times",
                        USERS[index].1, word.body
                    )));
                }
                if times == 0 && word.hearers.contains(&index) {
                    *missing.entry(USERS[index].1).or_insert(0) += 1;
                }
            }
        }
        // What was written to a server and not confirmed when a process was killed is neither here nor there, and counted.
        if missing.values().sum::<usize>() as f64 > doubt {
            return Err(Failure(format!("missing: {missing:?}, and in doubt are {doubt}")));
        }
        Ok(again)
    }
}

fn play(name: &str, a: ServerSpec, b: ServerSpec, blows: &[Blow]) {
    let _company = in_company();
    let hosts = a.kind();
    let pair = held_pair().yaml("mirror", &format!("split: {{ hold: {}s }}", HOLD.as_secs()));
    let pair = SOON.into_iter().fold(pair, |pair, line| pair.yaml("link", line));
    let world = &world(
        name,
        Profile::lan(),
        unthrottled(a),
        unthrottled(b),
        0,
        Layout::Sidecar(pair),
    );
    let fail = |when: &str, failure: Failure| -> ! { panic!("{name}: {when}: {failure}") };
    let mut play = Play::begin(world).unwrap_or_else(|failure| fail("at first", failure));
    for state in [
        State::Joining,
        State::Live,
        State::Waiting,
        State::Detached,
        State::Resyncing,
    ] {
        for blow in blows {
            let when = format!("{blow:?} while {state:?}");
            let begin = Instant::now();
            let again = play
                .bring_into(state)
                .and_then(|()| play.strike(*blow))
                .and_then(|()| play.heal(*blow))
                .unwrap_or_else(|failure| fail(&when, failure));
            println!(
                "{name}: {when}: {:.0} s, entered again: {again:?}",
                begin.elapsed().as_secs_f64()
            );
            let forgets = *blow == Blow::Restart(Side::A) && hosts == Kind::Ejabberd;
            assert!(
                forgets || again.is_empty(),
                "{name}: {when}: {again:?} had to enter again"
            );
        }
    }
}

const KILLS: [Blow; 2] = [Blow::Kill(Side::A), Blow::Kill(Side::B)];
const RESTARTS: [Blow; 2] = [Blow::Restart(Side::A), Blow::Restart(Side::B)];

/// The room on Prosody, its far users on ejabberd; either sidecar is killed.
#[test]
fn kills_in_each_state_of_a_room_of_prosody() {
    play("kpe", Prosody::stock(), Ejabberd::stock(), &KILLS);
}

/// The room on ejabberd, its far users on Prosody.
#[test]
fn kills_in_each_state_of_a_room_of_ejabberd() {
    play("kep", Ejabberd::stock(), Prosody::stock(), &KILLS);
}

/// The room on Prosody, its far users on ejabberd; either server restarts.
#[test]
fn restarts_in_each_state_of_a_room_of_prosody() {
    play("spe", Prosody::stock(), Ejabberd::stock(), &RESTARTS);
}

/// The room on ejabberd, its far users on Prosody.
#[test]
fn restarts_in_each_state_of_a_room_of_ejabberd() {
    play("sep", Ejabberd::stock(), Prosody::stock(), &RESTARTS);
}
