//! Scenarios: what users of two sites do, step by step, and what each of them must see.
//!
//! A scenario plays on any [`Stage`]: two servers with a direct stream between them, or with a pair of sidecars, or
//! something a test has made up. [`acts`] goes through what XEP-0045 and everyday XMPP offer and asserts what each
//! client sees; [`recording`] lets nine clients do things at random from a seed, to compare one stage with another.
//!
//! Both are deterministic because nothing is done before everything that the last step has caused has arrived:
//! [`Play::settle`] has every client ping every server and room that it has to do with. The answer to a ping comes
//! after whatever was sent before it on the same way, so when some rounds of pings bring nothing new, nothing is
//! under way. That holds for any delay, and needs no sleeping.

pub mod acts;
pub mod recording;
mod stage;

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::Duration;

use crate::client::{Answers, Client, Failure, Outcome, Stanza};
use crate::servers::Kind;
use crate::transcript::{Heard, Recording};

pub use self::stage::WorldStage;

/// One of the two sites.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Side {
    A,
    B,
}

impl Side {
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }
}

/// Users of the site that hosts the room.
pub const NEAR_USERS: [&str; 2] = ["alice", "adam"];
/// Users of the other site.
pub const FAR_USERS: [&str; 5] = ["b1", "b2", "b3", "b4", "b5"];

/// The `number`th user (from 1) of a crowd ([`crate::load`]).
pub fn crowd_user(number: usize) -> String {
    format!("u{number}")
}

/// The accounts that both sites must have, with room for crowds of that size.
pub fn accounts(crowd: usize) -> Vec<String> {
    let named = NEAR_USERS.iter().chain(&FAR_USERS).map(|user| (*user).to_owned());
    named.chain((1..=crowd).map(crowd_user)).collect()
}

/// Two sites with their servers running.
pub trait Stage {
    /// The domain of the site's users.
    fn domain(&self, site: Side) -> String;

    /// The domain of the site's room service.
    fn rooms(&self, site: Side) -> String;

    /// Which server runs there.
    fn kind(&self, site: Side) -> Kind;

    /// Signs a user in at the site's own server.
    fn connect(&self, site: Side, user: &str, resource: &str) -> Outcome<Client>;

    /// The site whose server hosts the rooms of the scenario.
    fn host(&self) -> Side {
        Side::A
    }

    /// Whether that server archives its rooms (XEP-0313); stock Debian does not.
    fn archives(&self) -> bool {
        false
    }

    /// How long anything may take to arrive.
    fn patience(&self) -> Duration {
        Duration::from_secs(60)
    }

    /// How long what a room says may stand still on its way, while an answer of the room itself passes by.
    fn gathering(&self) -> Duration {
        Duration::ZERO
    }
}

/// Pings are repeated until this many rounds have brought nothing new. One round flushes one hop of a chain such as
/// user, server, room, server, user; the longest in the scenarios has two hops after the last stanza that anybody sees.
const QUIET_ROUNDS: usize = 2;
/// Where ids begin once the stage is set: how much there was to tidy up differs between runs.
const FIRST_ID: u64 = 1000;
/// If it has not become quiet by then, two clients or servers keep answering each other.
const ROUNDS_MAX: usize = 50;

/// A scenario that is being played.
pub struct Play<'s> {
    pub stage: &'s dyn Stage,
    /// Every room of the scenario, so that pings go there as well.
    rooms: Vec<String>,
    sessions: BTreeMap<String, Session>,
    /// What the ids of a session that is gone have come to, so that the next one of that name goes on.
    ids_used: BTreeMap<String, u64>,
    recording: Recording,
}

struct Session {
    client: Client,
    /// So many of its stanzas are in the recording.
    recorded: usize,
}

impl std::fmt::Debug for Play<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Play")
            .field("rooms", &self.rooms)
            .field("sessions", &self.names())
            .finish_non_exhaustive()
    }
}

impl<'s> Play<'s> {
    pub fn new(stage: &'s dyn Stage) -> Self {
        Self {
            stage,
            rooms: Vec::new(),
            sessions: BTreeMap::new(),
            ids_used: BTreeMap::new(),
            recording: Recording::default(),
        }
    }

    /// The domain of the users beside the rooms.
    pub fn near(&self) -> String {
        self.stage.domain(self.stage.host())
    }

    /// The domain of the users across the link.
    pub fn far(&self) -> String {
        self.stage.domain(self.stage.host().other())
    }

    /// The server that hosts the rooms.
    pub fn host_kind(&self) -> Kind {
        self.stage.kind(self.stage.host())
    }

    /// The address of a room, which is pinged from now on.
    pub fn room(&mut self, name: &str) -> String {
        let room = format!("{name}@{}", self.stage.rooms(self.stage.host()));
        if !self.rooms.contains(&room) {
            self.rooms.push(room.clone());
        }
        room
    }

    /// From now on the room is not pinged: it is about to end, and ejabberd drops what reaches a room that ends.
    pub fn room_ends(&mut self, room: &str) {
        self.rooms.retain(|other| other != room);
    }

    /// Signs `user/resource` in at its site, without presence.
    pub fn sign_in(&mut self, name: &str) -> Outcome {
        let (user, resource) = name
            .split_once('/')
            .ok_or_else(|| Failure(format!("{name} is not user/resource")))?;
        let host = self.stage.host();
        let site = if NEAR_USERS.contains(&user) { host } else { host.other() };
        let client = self.stage.connect(site, user, resource)?;
        client.set_answers(Answers::Refuse);
        if let Some(used) = self.ids_used.get(name) {
            client.continue_ids(*used);
        }
        let session = Session { client, recorded: 0 };
        match self.sessions.insert(name.to_owned(), session) {
            None => Ok(()),
            Some(_) => Err(Failure(format!("{name} is signed in already"))),
        }
    }

    /// Signs in as a user's client does: with the roster, which makes it one that is told of changes, then presence.
    pub fn come_online(&mut self, name: &str) -> Outcome {
        self.sign_in(name)?;
        self.client(name)
            .ask("get", "", "<query xmlns='jabber:iq:roster'/>", self.stage.patience())?;
        self.client(name).presence("").map(drop)
    }

    /// Ends a session: in order, or by breaking its connection. What still comes meanwhile is a matter of luck, and not
    /// recorded.
    pub fn sign_out(&mut self, name: &str, orderly: bool) -> Outcome {
        self.record();
        let session = self
            .sessions
            .remove(name)
            .ok_or_else(|| Failure(format!("{name} is not signed in")))?;
        self.ids_used.insert(name.to_owned(), session.client.ids_used());
        if orderly {
            session.client.close();
        } else {
            session.client.cut();
        }
        Ok(())
    }

    /// A client that must be signed in.
    ///
    /// # Panics
    /// If it is not: the scenario is wrong.
    pub fn client(&self, name: &str) -> &Client {
        match self.sessions.get(name) {
            Some(session) => &session.client,
            None => panic!("{name} is not signed in"),
        }
    }

    pub fn is_signed_in(&self, name: &str) -> bool {
        self.sessions.contains_key(name)
    }

    pub fn jid(&self, name: &str) -> String {
        self.client(name).jid.clone()
    }

    pub fn bare(&self, name: &str) -> String {
        self.client(name).bare().to_owned()
    }

    /// Everybody who is signed in.
    pub fn names(&self) -> Vec<String> {
        self.sessions.keys().cloned().collect()
    }

    /// Begins a step: what comes from now on belongs to it, and what came before is of no more interest.
    pub fn step(&mut self, what: impl Into<String>) {
        self.record();
        let is_first = self.recording.steps.is_empty();
        self.recording.steps.push(what.into());
        for session in self.sessions.values() {
            session.client.forget();
            if is_first {
                session.client.continue_ids(FIRST_ID);
            }
        }
    }

    /// Waits until everything that is under way has arrived.
    pub fn settle(&mut self) -> Outcome {
        self.settle_rounds(QUIET_ROUNDS)?;
        self.record();
        Ok(())
    }

    fn settle_rounds(&self, quiet_rounds: usize) -> Outcome {
        let (near, far) = (self.near(), self.far());
        let mut targets: Vec<&str> = vec![&near];
        if far != near {
            targets.push(&far);
        }
        let service = self.stage.rooms(self.stage.host());
        match self.rooms.as_slice() {
            [] => targets.push(&service),
            rooms => targets.extend(rooms.iter().map(String::as_str)),
        }
        let mut quiet = 0;
        for _ in 0..ROUNDS_MAX {
            let before = self.received();
            self.ping_all(&targets)?;
            sleep(self.stage.gathering());
            quiet = if self.received() == before { quiet + 1 } else { 0 };
            if quiet == quiet_rounds {
                return Ok(());
            }
        }
        Err(Failure(format!(
            "it does not become quiet in {ROUNDS_MAX} rounds of pings"
        )))
    }

    fn received(&self) -> usize {
        self.sessions.values().map(|session| session.client.received()).sum()
    }

    fn ping_all(&self, targets: &[&str]) -> Outcome {
        let mut pending = Vec::new();
        for session in self.sessions.values() {
            for target in targets {
                pending.push((&session.client, target, session.client.sync(target)?));
            }
        }
        for (client, target, id) in pending {
            client
                .synced(&id, self.stage.patience())
                .map_err(|Failure(why)| Failure(format!("{why} to {target}")))?;
        }
        Ok(())
    }

    /// Fails unless each of these has received exactly one such stanza in this step. Settle first.
    pub fn each_sees(&self, names: &[&str], what: &str, wanted: impl Fn(&Stanza) -> bool) -> Outcome {
        self.each_sees_times(1, names, what, wanted)
    }

    /// Fails if any of these has received such a stanza in this step. Settle first.
    pub fn none_sees(&self, names: &[&str], what: &str, wanted: impl Fn(&Stanza) -> bool) -> Outcome {
        self.each_sees_times(0, names, what, wanted)
    }

    pub fn each_sees_times(
        &self,
        times: usize,
        names: &[&str],
        what: &str,
        wanted: impl Fn(&Stanza) -> bool,
    ) -> Outcome {
        for name in names {
            let client = self.client(name);
            let count = client.count(&wanted);
            if count != times {
                let all: String = client
                    .unclaimed()
                    .iter()
                    .map(|stanza| format!("\n    {}", crate::client::shorten(&stanza.raw)))
                    .collect();
                return Err(Failure(format!(
                    "{name} received {what} {count} times, not {times}; all of this step:{all}"
                )));
            }
        }
        Ok(())
    }

    /// As [`Self::each_sees`] for those named, and nobody else may.
    pub fn only_these_see(&self, names: &[&str], what: &str, wanted: impl Fn(&Stanza) -> bool) -> Outcome {
        self.each_sees(names, what, &wanted)?;
        let all = self.names();
        let others: Vec<&str> = all
            .iter()
            .map(String::as_str)
            .filter(|name| !names.contains(name))
            .collect();
        self.none_sees(&others, what, wanted)
    }

    /// Moves what has come into the recording.
    fn record(&mut self) {
        let mut fresh = Vec::new();
        for (name, session) in &mut self.sessions {
            let more = session.client.transcript_from(session.recorded);
            session.recorded += more.len();
            fresh.push((name.clone(), more));
        }
        for (name, stanzas) in fresh {
            self.keep(&name, stanzas.into_iter());
        }
    }

    fn keep(&mut self, name: &str, stanzas: impl Iterator<Item = Stanza>) {
        let Some(step) = self.recording.steps.len().checked_sub(1) else {
            return; // before the first step the stage is being set
        };
        let heard = stanzas.map(|stanza| Heard {
            step,
            stanza: stanza.element,
        });
        self.recording.clients.entry(name.to_owned()).or_default().extend(heard);
    }

    /// What everybody has received. Then everybody goes, and who still sees whom go is not recorded.
    pub fn finish(mut self) -> Outcome<Recording> {
        self.settle()?;
        for session in self.sessions.into_values() {
            session.client.close();
        }
        Ok(self.recording)
    }
}

/// Randomness that is the same for a seed for ever: SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `bound`; that small bounds are hit a little unevenly does not matter here.
    pub fn below(&mut self, bound: usize) -> usize {
        let bound = u64::try_from(bound.max(1)).unwrap_or(u64::MAX);
        usize::try_from(self.roll() % bound).unwrap_or(0)
    }

    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// # Panics
    /// If there is nothing to pick from.
    pub fn pick<'t, T>(&mut self, from: &'t [T]) -> &'t T {
        &from[self.below(from.len())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A seed means the same scenario on every machine and in every version.
    ///
    /// The first values of SplitMix64 for seed 1234567, as published.
    #[test]
    fn dice_are_splitmix64() {
        let mut dice = Dice::new(1_234_567);
        let rolled: Vec<u64> = (0..5).map(|_| dice.roll()).collect();
        let published = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
            4_593_380_528_125_082_431,
            16_408_922_859_458_223_821,
        ];
        assert_eq!(rolled, published);
    }
}
