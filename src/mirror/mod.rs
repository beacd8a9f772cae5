//! Rooms near their users: what both ends know of the rooms between two sites, and what follows from it when the link is gone.
//!
//! The room is the only truth. A [`Mirror`] stands between a peer's queues and our server's legs and reads what passes: as the
//! *mirror* of the peer's rooms it knows what our users were shown, as the *primary* of our own rooms it knows which of the peer's users are
//! in them. What it knows is written in the batch that carries the stanza it learned it from, so a killed process comes back
//! knowing exactly what it had passed on. What it does not know goes through as it is.
//!
//! # A mirrored room
//!
//! ```text
//!          a local user's join          the room's self-presence
//!  (none) ─────────────────▶ Joining ────────────────────────▶ Live ◀───────────────┐
//!                               ▲ refused: (none)               │ ▲                 │
//!                               └────── every session has left ─┘ │ back before     │ all that waited has
//!                                                       link down │ `split_hold`    │ come: who is there
//!                                                               ▼ │                 │ is shown
//!                                                            Waiting                │
//!                                                               │ `split_hold`      │
//!                                                               ▼      link up      │
//!                                                            Detached ─────────▶ Resyncing
//!                                                               ▲    link down      │
//!                                                               └───────────────────┘
//! ```
//!
//! * *Live*: everything passes as it came. Self-pings are answered here (XEP-0410), and discovery from a cache.
//! * *Waiting*: the link is down, nobody is told anything, messages wait. Plain messages are shown near by at once (`echo: auto`).
//! * *Detached*: our users see who is beyond the link leave; they talk on with each other. Joins, nick changes and
//!   commands are refused (or joins let in for the time being, `provisional.rs`), leaves are settled here and reported later. If the link comes
//!   back for a moment only, whoever does not know is told after another `split_hold`.
//! * *Resyncing*: what waited comes in the order of the room. Messages are shown as they come; who came and went meanwhile is shown in
//!   the end, as it is then.
//!
//! The primary marks the peer's users as away when the split is declared, and puts their last presence back when it is over. They
//! stay occupants all the time, so the room goes on addressing them, and what it says waits in the spool. What a room said while a
//! process was killed is found in its history (`tail.rs`). Or it has them leave, and come back when the split is over
//! (`absent.rs`).

mod absent;
mod far;
mod local;
mod muc;
mod near;
mod primary;
mod provisional;
mod room;
mod rows;
mod settings;
mod tail;
mod words;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use bytes::Bytes;

use self::{
    local::Refusal,
    muc::LOST,
    near::Near,
    primary::Primary,
    room::{EchoState, Room, Split},
    rows::Rows,
    words::{away_presence, cast, cast_to, lost_presence},
};
pub use self::{
    rows::{BYTES_MAX as ROWS_BYTES_MAX, KEY_BYTES_MAX, ROW_BYTES, VALUE_BYTES_MAX},
    settings::*,
};
use crate::{
    codec::{entry::Cast, position::Epoch},
    stanza::{Domain, Stanza, answer, domain_of},
    time::{Deadline, Mono, Now},
};

/// Rooms that are mirrored at once, in each direction; more pass as they are.
const ROOMS_MAX: usize = 2_000;

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Output {
    /// For our server, in order with what has crossed, and stored like it.
    Deliver(Cast),
    /// For our server, at once; nothing is lost with it.
    Ask(Stanza),
    /// For the peer, in the name of our server.
    Cross(Stanza),
    PutRow {
        key: Bytes,
        value: Bytes,
    },
    DropRow {
        key: Bytes,
    },
}

/// What was done that an administrator may want to see, counted since the process started.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct MirrorStats {
    /// Messages shown near by before the room had them, and reflections that were not repeated for that reason.
    pub echoes: u64,
    pub reflections_swallowed: u64,
    /// Echoed messages that the room did not take.
    pub echoes_refused: u64,
    pub pings_answered: u64,
    pub discos_answered: u64,
    /// Refused to our users because the link was down.
    pub refused: u64,
    pub splits: u64,
    pub heals: u64,
    /// Bytes of stanzas that only came because the mirror has spoken to our server itself. Without it there would be none.
    pub caused_bytes: u64,
    /// Sessions that the room turned out not to have any more, and of them those that the room has let in again.
    pub ghosts: u64,
    pub ghosts_returned: u64,
    /// Rooms and sessions that pass as they are from then on, because a limit was reached.
    pub overflows: u64,
    /// Messages that our rooms had said while nobody took them in, and that were found.
    pub found: u64,
}

/// Where the link stands, as users notice it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Link {
    Live,
    /// It is up, and what waited is still coming.
    Resyncing,
    /// It is down and nobody was told.
    Waiting {
        since: Mono,
    },
    /// It is down and users were told; at `rest_at`, those who were not there then, or were told otherwise since, because it was up
    /// for a moment.
    Detached {
        rest_at: Option<Mono>,
    },
}

/// Room by room, for `/status`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Levels {
    pub rooms: usize,
    pub sessions: usize,
    pub rooms_split: usize,
    pub guests: usize,
    pub echoes_pending: usize,
}

/// Where a mirrored room stands, as its users notice it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RoomState {
    /// It has not let any of our users in yet.
    Joining,
    /// Nobody was told anything: the link is up, or has not been down for `split_hold`.
    Live,
    Detached,
    Resyncing,
}

impl RoomState {
    pub const ALL: [Self; 4] = [Self::Joining, Self::Live, Self::Detached, Self::Resyncing];
}

#[derive(Debug)]
pub struct Mirror {
    settings: MirrorSettings,
    far: Vec<Domain>,
    link: Link,
    rtt: Option<Duration>,
    rooms: BTreeMap<String, Room>,
    rows: Rows,
    primary: Primary,
    near: Near,
    /// The last number given to an echo: their order.
    echo_last: u64,
    /// Makes ids of ours unlike any other's.
    epoch: Epoch,
    /// Guests were shown as back when the link came up.
    guests_back: bool,
    stats: MirrorStats,
    outputs: VecDeque<Output>,
}

impl Mirror {
    /// `state` is what [`Output::PutRow`] and [`Output::DropRow`] have written.
    pub fn new(
        settings: MirrorSettings,
        local: Vec<Domain>,
        far: Vec<Domain>,
        epoch: Epoch,
        state: &BTreeMap<Bytes, Bytes>,
        now: Now,
    ) -> Self {
        let mut mirror = Self {
            near: Near::new(settings.disco_lifetime),
            primary: Primary::new(local, settings.split_far, epoch, now),
            settings,
            far,
            link: Link::Waiting { since: now.mono },
            rtt: None,
            rooms: BTreeMap::new(),
            rows: Rows::default(),
            echo_last: 0,
            epoch,
            guests_back: false,
            stats: MirrorStats::default(),
            outputs: VecDeque::new(),
        };
        mirror.load(state, now);
        mirror
    }

    /// Reads the rows back. What cannot be read, or no longer belongs to this peer, is forgotten with its room, which passes as it is.
    fn load(&mut self, state: &BTreeMap<Bytes, Bytes>, now: Now) {
        let mut useless: BTreeSet<Bytes> = state.keys().cloned().collect();
        let mut doubtful = BTreeSet::new();
        let enabled = self.settings.enabled;
        // What waited was accepted, and crosses in any case.
        let kinds = rows::Kind::ALL.into_iter();
        for kind in kinds.filter(|kind| enabled || *kind == rows::Kind::Held) {
            for (key, value) in state {
                let Some((room, what)) = kind.parts(key) else { continue };
                if self.load_row(kind, room, what, value, now).is_some() {
                    useless.remove(key);
                    let rows = match kind {
                        rows::Kind::Guest
                        | rows::Kind::Tail
                        | rows::Kind::Held
                        | rows::Kind::Seen
                        | rows::Kind::SeenOccupant => self.primary.rows(),
                        rows::Kind::Room | rows::Kind::Occupant | rows::Kind::Echo => &mut self.rows,
                    };
                    rows.note(key, value);
                } else if matches!(kind, rows::Kind::Room | rows::Kind::Occupant | rows::Kind::Echo) {
                    doubtful.insert(room.to_owned());
                }
            }
        }
        for key in useless {
            self.outputs.push_back(Output::DropRow { key });
        }
        for room in doubtful {
            self.drop_room(&room);
        }
        // Who was told of a split is not told again, and what was refused stays refused.
        if self.rooms.values().any(|room| room.split.is_some()) || self.primary.has_absent() {
            self.link = self.detached_again(now);
        }
        self.primary.begin(now);
    }

    fn load_row(&mut self, kind: rows::Kind, room: &str, what: &[u8], value: &[u8], now: Now) -> Option<()> {
        match kind {
            rows::Kind::Guest => self.primary.load(room, std::str::from_utf8(what).ok()?, value, now)?,
            rows::Kind::Tail => self.primary.load_tail(room, value)?,
            rows::Kind::Held => self.primary.load_held(room, what, value)?,
            rows::Kind::Seen => self.primary.load_seen(room, value)?,
            rows::Kind::SeenOccupant => self.primary.load_seen_occupant(room, what, value)?,
            rows::Kind::Room => {
                let domain = Domain::new(domain_of(room)).ok()?;
                if !self.far.contains(&domain) {
                    return None;
                }
                let decoded = Room::decode(value)?;
                let again = decoded.sessions.values().filter_map(|session| session.again.as_ref());
                // No number is given again that somebody may compare with.
                self.echo_last = again.map(|again| again.after).fold(self.echo_last, u64::max);
                self.rooms.insert(room.to_owned(), decoded);
            }
            rows::Kind::Occupant => {
                let nick = std::str::from_utf8(what).ok()?.to_owned();
                let versions = Room::decode_occupant(value)?;
                self.rooms.get_mut(room)?.occupants.insert(nick, versions);
            }
            rows::Kind::Echo => {
                let number = u64::from_be_bytes(what.try_into().ok()?);
                self.rooms
                    .get_mut(room)?
                    .echoes
                    .insert(number, room::Echo::decode(value)?);
                self.echo_last = self.echo_last.max(number);
            }
        }
        Some(())
    }

    /// Other settings from now on. Whether there is a mirror at all stays as it was: what it does not know of a room it cannot learn in the
    /// middle, and what users were shown cannot be left.
    pub fn reconfigure(&mut self, settings: MirrorSettings) {
        self.near.set_lifetime(settings.disco_lifetime);
        self.primary.set_split_far(settings.split_far);
        self.settings = MirrorSettings {
            enabled: self.settings.enabled,
            ..settings
        };
    }

    /// A batch is about to go to the disk: writes what has changed with every message.
    pub fn flush(&mut self, now: Now) {
        self.primary.flush(now);
    }

    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front().or_else(|| self.primary.poll_output())
    }

    pub fn poll_timeout(&self) -> Option<Deadline> {
        if !self.settings.enabled {
            return None;
        }
        let split = self.split_at().map(|at| Deadline { at, why: "split" });
        let primary = self.primary.poll_timeout();
        Deadline::earlier(split, primary)
    }

    /// When users are to be told that the link is down.
    fn split_at(&self) -> Option<Mono> {
        match self.link {
            Link::Waiting { since } => Some(since + self.settings.split_hold),
            Link::Detached { rest_at } => rest_at,
            Link::Live | Link::Resyncing => None,
        }
    }

    fn detached_again(&self, now: Now) -> Link {
        Link::Detached {
            rest_at: Some(now.mono + self.settings.split_hold),
        }
    }

    fn is_detached(&self) -> bool {
        matches!(self.link, Link::Detached { .. })
    }

    pub fn stats(&self) -> MirrorStats {
        MirrorStats {
            ghosts: self.primary.ghosts(),
            ghosts_returned: self.primary.ghosts_returned(),
            pings_answered: self.stats.pings_answered + self.primary.pongs(),
            found: self.primary.found(),
            overflows: self.stats.overflows + self.primary.overflows(),
            ..self.stats
        }
    }

    pub fn levels(&self) -> Levels {
        let rooms = || self.rooms.values();
        Levels {
            rooms: rooms().filter(|room| !room.sessions.is_empty()).count(),
            sessions: rooms().map(|room| room.sessions.len()).sum(),
            rooms_split: rooms().filter(|room| room.split.is_some()).count(),
            guests: self.primary.guests(),
            echoes_pending: rooms().map(Room::echoes_shown).sum(),
        }
    }

    /// How many rooms with users of ours stand where. That the link is gone and nobody was told of it, the link tells.
    pub fn rooms_by_state(&self) -> [(RoomState, usize); 4] {
        let used = || self.rooms.values().filter(|room| !room.sessions.is_empty());
        RoomState::ALL.map(|state| (state, used().filter(|room| self.state_of(room) == state).count()))
    }

    fn state_of(&self, room: &Room) -> RoomState {
        match (&room.split, self.link) {
            (Some(_), Link::Resyncing) => RoomState::Resyncing,
            (Some(_), Link::Live | Link::Waiting { .. } | Link::Detached { .. }) => RoomState::Detached,
            (None, _) if !room.sessions.values().any(|session| session.joined) => RoomState::Joining,
            (None, _) => RoomState::Live,
        }
    }

    /// The peer has said what it holds; what it has for us follows.
    pub fn handle_link_up(&mut self, now: Now) {
        if !self.settings.enabled || matches!(self.link, Link::Live | Link::Resyncing) {
            return;
        }
        self.link = Link::Resyncing;
        self.guests_back = self.primary.heal(now);
    }

    /// All that the peer had when the link came up is here.
    pub fn handle_caught_up(&mut self, now: Now) {
        if self.link != Link::Resyncing {
            return;
        }
        self.link = Link::Live;
        self.guests_back |= self.primary.return_all(now);
        let rooms: Vec<String> = self.rooms.keys().cloned().collect();
        let mut healed = std::mem::take(&mut self.guests_back);
        for name in rooms {
            healed |= self.show_truth(&name);
        }
        self.stats.heals += u64::from(healed);
    }

    pub fn handle_link_down(&mut self, now: Now) {
        self.rtt = None;
        self.near.forget_questions();
        self.link = match self.link {
            // The split is not over before all has come.
            Link::Resyncing if self.rooms.values().any(|room| room.split.is_some()) => self.detached_again(now),
            Link::Live | Link::Resyncing => Link::Waiting { since: now.mono },
            link @ (Link::Waiting { .. } | Link::Detached { .. }) => link,
        };
        let rooms: Vec<String> = self.rooms.keys().cloned().collect();
        for name in rooms {
            self.show_unheard(&name);
        }
    }

    /// How long a word takes to the peer and back, as last measured.
    pub fn note_rtt(&mut self, rtt: Option<Duration>) {
        self.rtt = rtt;
    }

    /// A stream towards our server began anew: it may have been restarted.
    pub fn handle_leg_up(&mut self, local: &Domain, now: Now) {
        self.primary.verify_soon(local, now);
    }

    /// Whether words of our rooms wait here, that were accepted, or rooms are to let somebody in again who is to hear theirs.
    pub fn awaits_rooms(&self) -> bool {
        self.primary.holds_words() || self.primary.awaits_rooms()
    }

    /// Whether users of the peer are in rooms of this domain of ours.
    pub fn has_guests(&self, local: &Domain) -> bool {
        self.primary.has_guests(local)
    }

    /// The peer's numbering or ours began anew, so something may be missing from what we know.
    pub fn forget(&mut self, now: Now) {
        let rooms: Vec<String> = self.rooms.keys().cloned().collect();
        for name in rooms {
            self.drop_room(&name);
        }
        self.primary.forget(now);
    }

    pub fn handle_timeout(&mut self, now: Now) {
        if self.settings.enabled && self.split_at().is_some_and(|at| at <= now.mono) {
            self.link = Link::Detached { rest_at: None };
            self.split(now);
        }
        self.primary.handle_timeout(now);
    }

    /// Tells both sides' users that the link is gone, whoever of them does not know.
    fn split(&mut self, now: Now) {
        let rooms: Vec<String> = self.rooms.keys().cloned().collect();
        let mut shown = self.primary.split(now);
        for name in rooms {
            shown |= self.show_split(&name);
            self.show_unheard(&name);
        }
        self.stats.splits += u64::from(shown);
    }

    fn show_split(&mut self, name: &str) -> bool {
        let near = self.settings.split_near;
        let Some(room) = self.rooms.get_mut(name).filter(|_| near != SplitNear::Hold) else {
            return false;
        };
        let before = room.split.clone().unwrap_or_default();
        let beyond: BTreeSet<String> = room
            .occupants
            .keys()
            .filter(|nick| !room.is_ours(nick))
            .cloned()
            .collect();
        let all: BTreeSet<u32> = room.sessions.values().map(|session| session.number).collect();
        // To whom they have left they were not shown since, but away they were as they came.
        let tells: BTreeSet<u32> = match near {
            SplitNear::Leave => all.difference(&before.told).copied().collect(),
            SplitNear::Away | SplitNear::Hold => all.clone(),
        };
        if room.split.is_some() && tells.is_empty() {
            return false;
        }
        room.split = Some(Split {
            hidden: before.hidden.union(&beyond).cloned().collect(),
            told: all,
        });
        let told = |address: &&String| {
            room.sessions
                .get(*address)
                .is_some_and(|session| tells.contains(&session.number))
        };
        let room = &*room;
        let beyond = room.occupants.iter().filter(|(nick, _)| beyond.contains(*nick));
        for (nick, version) in beyond.flat_map(|(nick, versions)| versions.iter().map(move |version| (nick, version))) {
            let occupant = format!("{name}/{nick}");
            let shown = match near {
                SplitNear::Leave => version.muc().map(|muc| lost_presence(&occupant, &muc, &[LOST])),
                SplitNear::Away => away_presence(version),
                SplitNear::Hold => None,
            };
            if let Some((template, to_at)) = shown {
                let shown = cast_to(template, to_at, room.viewers(version).filter(told));
                if !shown.recipients.is_empty() {
                    self.outputs.push_back(Output::Deliver(shown));
                }
            }
        }
        self.write_room(name);
        true
    }

    /// Shows who is there after all: what the room has last said of each.
    fn show_truth(&mut self, name: &str) -> bool {
        let Some(room) = self.rooms.get_mut(name) else {
            return false;
        };
        let Some(split) = room.split.take() else { return false };
        let room = &self.rooms[name];
        let beyond = room.occupants.iter().filter(|(nick, _)| split.hidden.contains(*nick));
        for version in beyond.flat_map(|(_, versions)| versions) {
            let told = room
                .viewers(version)
                .filter(|address| split.told.contains(&room.sessions[*address].number));
            let truth = cast_to(version.template.clone(), version.to_at, told);
            if !truth.recipients.is_empty() {
                self.outputs.push_back(Output::Deliver(truth));
            }
        }
        self.write_room(name);
        true
    }

    fn deliver_stanza(&mut self, stanza: &Stanza) {
        if let Some((template, to_at, attribute)) = stanza.split_to() {
            self.outputs.push_back(Output::Deliver(cast(
                template,
                to_at as u32,
                std::iter::once(&attribute),
            )));
        }
    }

    /// To one of our users, never to a room.
    fn refuse(&mut self, stanza: &Stanza, (error_type, condition, text): Refusal) {
        self.stats.refused += 1;
        let answer = answer(stanza, error_type, condition, text);
        if let Some(answer) = answer.and_then(|answer| Stanza::parse(answer).ok()) {
            self.deliver_stanza(&answer);
        }
    }

    /// Writes an echo, or that it is no more.
    fn write_echo(&mut self, name: &str, number: u64) {
        let key = rows::Kind::Echo.key(name, &number.to_be_bytes());
        match self
            .rooms
            .get(name)
            .and_then(|room| room.echoes.get(&number))
            .map(room::Echo::encode)
        {
            Some(value) => self.put_row(name, key, value),
            None => self.rows.remove(key, &mut self.outputs),
        }
    }

    /// These sessions are out of the room: it will not tell them what they have seen.
    fn forget_viewers(&mut self, name: &str, out: &[String]) {
        let Some(room) = self.rooms.get(name) else { return };
        let numbers: Vec<u64> = room.echoes.keys().copied().collect();
        for (number, address) in numbers
            .into_iter()
            .flat_map(|number| out.iter().map(move |address| (number, address)))
        {
            self.forget_viewer(name, number, address);
        }
    }

    /// The room will not tell this one what it has seen.
    fn forget_viewer(&mut self, name: &str, number: u64, address: &String) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        let is_shown = |echo: &room::Echo| matches!(echo.state, EchoState::Shown { .. });
        if room.echoes.get(&number).is_some_and(is_shown)
            && !room.echo_seen(number, std::iter::once(address)).is_empty()
        {
            self.write_echo(name, number);
        }
    }

    /// Writes a row of a room; without it the room cannot be mirrored.
    fn put_row(&mut self, name: &str, key: Bytes, value: Bytes) {
        if !self.rows.put(key, value, &mut self.outputs) {
            self.overflow(name);
        }
    }

    /// More of this room cannot be kept: from now on it passes as it is.
    fn overflow(&mut self, name: &str) {
        self.stats.overflows += 1;
        self.drop_room(name);
    }

    fn write_room(&mut self, name: &str) {
        if let Some(room) = self.rooms.get(name) {
            let value = room.encode();
            self.put_row(name, rows::Kind::Room.key(name, b""), value);
        }
    }

    fn write_occupant(&mut self, name: &str, nick: &str) {
        let key = rows::Kind::Occupant.key(name, nick.as_bytes());
        match self.rooms.get(name).and_then(|room| room.encode_occupant(nick)) {
            Some(value) => self.put_row(name, key, value),
            None => self.rows.remove(key, &mut self.outputs),
        }
    }

    /// Writes a room and these of its occupants. A room of which nothing more is due is no longer mirrored.
    fn write_changed(&mut self, name: &str, nicks: &[String]) {
        for nick in nicks {
            self.write_occupant(name, nick);
        }
        if !self.drop_if_over(name) {
            self.write_room(name);
        }
    }

    fn drop_if_over(&mut self, name: &str) -> bool {
        let is_over = self.rooms.get(name).is_some_and(Room::is_over);
        if is_over {
            self.drop_room(name);
        }
        is_over
    }

    fn drop_room(&mut self, name: &str) {
        let Some(room) = self.rooms.remove(name) else { return };
        let occupants = room
            .occupants
            .keys()
            .map(|nick| rows::Kind::Occupant.key(name, nick.as_bytes()));
        let echoes = room
            .echoes
            .keys()
            .map(|number| rows::Kind::Echo.key(name, &number.to_be_bytes()));
        for key in std::iter::once(rows::Kind::Room.key(name, b""))
            .chain(occupants)
            .chain(echoes)
        {
            self.rows.remove(key, &mut self.outputs);
        }
    }
}

#[cfg(test)]
mod tests;
