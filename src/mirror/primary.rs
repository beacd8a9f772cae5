//! Our own rooms, and the peer's users in them.
//!
//! While the link is down the room must neither lose its far occupants nor think that they listen: they are marked as away, and
//! get their own presence back when the link is. While it is up, the room is asked now and then whether it still has them (XEP-0410, over our
//! own leg, so it costs the link nothing): a room that was restarted may have forgotten, and nobody else would tell.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Bound,
    time::Duration,
};

use bytes::Bytes;

use super::{
    Output, ROOMS_MAX, SplitFar,
    absent::{Out, password_of},
    muc::{LOST, MucUser, SELF_PRESENCE},
    near,
    room::{Room, SESSIONS_MAX, begin_row, row, text},
    rows::{self, Rows},
    tail::{Expected, LINES_MAX, Tails},
    words::{AWAY, away, has_body, is_ours, is_wish_of, lost_presence, node_of, to_attribute, undo_away, wish_of},
};
use crate::{
    codec::{
        entry::Cast,
        position::Epoch,
        varint::{put_prefixed, put_varint},
        xml::Node,
    },
    stanza::{Domain, Kind, Stanza, bare, domain_of, escape_attribute, ns, resource_of},
    time::{Deadline, Mono, Now},
};

/// Sessions that are remembered as lost, to see whether they come back.
const LOST_MAX: usize = 1_000;

/// How often a room is asked about each far occupant. One question costs its server some microseconds.
pub(super) const VERIFY_EVERY: Duration = Duration::from_secs(300);
/// After a stream to our server began anew: its rooms may still be loading.
const VERIFY_SOON: Duration = Duration::from_secs(5);
/// Of rooms whose last words are in doubt, one guest each is asked about first.
const AFTER_FIRST: Duration = Duration::from_millis(1);
/// Questions at once; the others have their turn when these are answered.
const VERIFY_BURST: usize = 100;
/// The wait for the rest of a burst.
const VERIFY_NEXT: Duration = Duration::from_secs(2);

/// A far user in one of our rooms.
#[derive(Clone, Debug)]
pub(super) struct Guest {
    pub(super) nick: String,
    pub(super) joined: bool,
    /// What it last sent to the room, without what only a join has.
    pub(super) presence: Stanza,
    /// With which it entered.
    pub(super) password: Option<String>,
    pub(super) away: bool,
    /// Its role and affiliation as the room last told them, as a mark.
    standing: Option<u64>,
    /// They are others since it was marked as away: what the room says of it is told again, until it is back.
    restated: bool,
    /// It is out of the room, or about to come back.
    pub(super) out: Option<Out>,
    pub(super) asking: Asking,
    /// The room has let it in once more because we have asked for that: history and subject that follow are for us. Whatever it says of the
    /// guest later may look like that, too, and then nothing follows.
    pub(super) repeats: bool,
    /// When the room is asked about it next.
    pub(super) verify_at: Mono,
}

/// What a room was asked about a guest.
#[derive(Debug)]
struct Asked {
    room: String,
    address: String,
    question: Question,
}

#[derive(Debug)]
enum Question {
    /// Whether the guest of this nick is inside (XEP-0410).
    IsInside { nick: String },
    /// Whether there is such a room at all: it has said that nobody in it has the guest's nick.
    IsThere,
}

impl Guest {
    pub(super) fn asks(&self) -> bool {
        matches!(self.asking, Asking::Asked(_))
    }

    /// What history and subject are to it.
    pub(super) fn expected(&self) -> Expected {
        match (self.repeats, &self.asking) {
            (true, _) => Expected::Repetition,
            (false, Asking::Asked(_) | Asking::Told) => Expected::Answer,
            (false, Asking::No) => Expected::Nothing,
        }
    }
}

/// Whether a guest is to be told all that the room has to say to who enters.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Asking {
    No,
    /// It has asked to enter, under this id.
    Asked(Option<String>),
    /// The room has let it in; history and subject follow.
    Told,
}

#[derive(Debug)]
pub struct Primary {
    local: Vec<Domain>,
    pub(super) split_far: SplitFar,
    epoch: Epoch,
    /// By room, then by full address.
    pub(super) rooms: BTreeMap<String, BTreeMap<String, Guest>>,
    /// Rooms as guests were shown them, who may be taken out of them.
    pub(super) shown: BTreeMap<String, Room>,
    /// Questions that the room has not answered, by id.
    asked: BTreeMap<String, Asked>,
    /// The last number of an id of ours. A process begins with the time, so that it gives none again.
    ids_last: u64,
    next_burst: Option<Mono>,
    /// No guest is to be asked about before: those in their rooms are many, and looked through only then.
    wake_at: Option<Mono>,
    ghosts: u64,
    /// By room and full address, those who were told so and have not come back.
    lost: BTreeSet<(String, String)>,
    ghosts_returned: u64,
    /// Questions of rooms about guests that were answered here.
    pongs: u64,
    pub(super) overflows: u64,
    /// Lines that were fetched for guests that came back.
    pub(super) returned_lines: u64,
    pub(super) tails: Tails,
    pub(super) rows: Rows,
    pub(super) outputs: VecDeque<Output>,
}

impl Primary {
    pub fn new(local: Vec<Domain>, split_far: SplitFar, epoch: Epoch, now: Now) -> Self {
        Self {
            local,
            split_far,
            epoch,
            rooms: BTreeMap::new(),
            shown: BTreeMap::new(),
            asked: BTreeMap::new(),
            ids_last: now.wall.0,
            next_burst: None,
            wake_at: None,
            ghosts: 0,
            lost: BTreeSet::new(),
            ghosts_returned: 0,
            pongs: 0,
            overflows: 0,
            returned_lines: 0,
            tails: Tails::default(),
            rows: Rows::default(),
            outputs: VecDeque::new(),
        }
    }

    pub fn set_split_far(&mut self, split_far: SplitFar) {
        self.split_far = split_far;
    }

    pub fn load(&mut self, room: &str, address: &str, value: &[u8], now: Now) -> Option<()> {
        let domain = Domain::new(domain_of(room)).ok()?;
        if !self.local.contains(&domain) {
            return None;
        }
        let mut reader = row(value)?;
        let flags = reader.varint().ok()?;
        let has = |bit: u32| flags & 1 << bit != 0;
        let nick = text(&mut reader)?;
        let presence = Stanza::parse(Bytes::from(text(&mut reader)?)).ok()?;
        let mut optional = |bit: u32| match has(bit) {
            true => text(&mut reader).map(Some),
            false => Some(None),
        };
        let (password, asked_as) = (optional(2)?, optional(6)?);
        let standing = match has(7) {
            true => Some(reader.varint().ok()?),
            false => None,
        };
        let out = match has(3) {
            true => Some(Out::decode(&mut reader)?),
            false => None,
        };
        let guest = Guest {
            nick,
            joined: has(0),
            presence,
            password,
            away: has(1),
            standing,
            restated: has(8),
            out,
            asking: match (has(4), has(5)) {
                (false, _) => Asking::No,
                (true, false) => Asking::Asked(asked_as),
                (true, true) => Asking::Told,
            },
            repeats: has(9),
            verify_at: now.mono + VERIFY_SOON,
        };
        self.wake_by(guest.verify_at);
        self.rooms
            .entry(room.to_owned())
            .or_default()
            .insert(address.to_owned(), guest);
        Some(())
    }

    /// After the guests.
    pub fn load_tail(&mut self, room: &str, value: &[u8]) -> Option<()> {
        self.rooms.contains_key(room).then(|| self.tails.load(room, value))?
    }

    pub fn load_held(&mut self, room: &str, number: &[u8], value: &[u8]) -> Option<()> {
        self.tails.load_held(room, number, value)
    }

    /// A process begins, and with it what the rooms said last is in doubt.
    pub fn begin(&mut self, now: Now) {
        let mut inside: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (room, guests) in &self.rooms {
            let guests = guests.iter().filter(|(_, guest)| guest.joined && guest.out.is_none());
            for (address, guest) in guests {
                inside.entry(room.clone()).or_default().insert(address.clone());
                if guest.asks() {
                    self.tails.enters(room, address);
                }
            }
        }
        // What was lost is for those who are inside: of one that is not, the news may be lost, too. The answers come before the last words.
        for (room, first) in self.tails.suspect(inside, now, &mut self.outputs) {
            let guests = self.rooms.get(&room).into_iter().flatten();
            let guests: Vec<String> = guests.map(|(address, _)| address.clone()).collect();
            for address in guests {
                let wait = if address == first { Duration::ZERO } else { AFTER_FIRST };
                self.verify_by(&room, &address, now.mono + wait);
            }
        }
    }

    /// Writes what has changed with every message.
    pub fn flush(&mut self, now: Now) {
        self.tails.flush(now, &mut self.rows, &mut self.outputs);
    }

    pub fn rows(&mut self) -> &mut Rows {
        &mut self.rows
    }

    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<Deadline> {
        let late = self.tails.poll_timeout().map(|at| Deadline {
            at,
            why: "a room's tail",
        });
        Deadline::earlier(self.ask_at(), late)
    }

    fn ask_at(&self) -> Option<Deadline> {
        let next = self.wake_at?;
        Some(Deadline {
            at: self.next_burst.map_or(next, |burst| next.max(burst)),
            why: "rooms are asked",
        })
    }

    pub(super) fn wake_by(&mut self, at: Mono) {
        self.wake_at = Some(self.wake_at.map_or(at, |wake| wake.min(at)));
    }

    pub fn guests(&self) -> usize {
        self.rooms.values().map(BTreeMap::len).sum()
    }

    /// Whether guests are marked as away because of the link, or out.
    pub fn has_absent(&self) -> bool {
        let mut guests = self.rooms.values().flat_map(BTreeMap::values);
        guests.any(|guest| guest.away || guest.out.is_some())
    }

    pub fn ghosts(&self) -> u64 {
        self.ghosts
    }

    /// Of them, those that the room has let in again.
    pub fn ghosts_returned(&self) -> u64 {
        self.ghosts_returned
    }

    pub fn pongs(&self) -> u64 {
        self.pongs
    }

    pub fn found(&self) -> u64 {
        self.tails.found() + self.returned_lines
    }

    pub fn overflows(&self) -> u64 {
        self.overflows
    }

    pub fn forget(&mut self, now: Now) {
        self.give_up_absent(now);
        // Nobody will know that they are to be put back.
        self.heal(now);
        self.tails.forget(now, &mut self.outputs);
        for (room, guests) in std::mem::take(&mut self.rooms) {
            for address in guests.keys() {
                self.rows.remove(guest_key(&room, address), &mut self.outputs);
            }
        }
        self.asked.clear();
    }

    /// What far users send to our server, copy by copy: gives it back, unless it has to come after something else.
    pub fn handle_cast(&mut self, cast: Cast, now: Now) -> Option<Cast> {
        let mut comes_back = false;
        // Only presences go to several rooms at once.
        let copies = match cast.template.starts_with(b"<presence") {
            true => cast.recipients.len(),
            false => 1,
        };
        for copy in (0..copies).filter_map(|index| cast.copy(index)) {
            let Ok(stanza) = Stanza::parse(copy) else { continue };
            comes_back |= self.wake(&stanza, now);
            self.handle_far(&stanza, now);
        }
        if comes_back {
            self.outputs.push_back(Output::Deliver(cast));
            return None;
        }
        Some(cast)
    }

    /// A stanza of a far user for our server.
    fn handle_far(&mut self, stanza: &Stanza, now: Now) {
        let (Some(from), Some(to)) = (stanza.from(), stanza.to()) else {
            return;
        };
        let Some(nick) = resource_of(&to) else { return };
        if stanza.kind() != Kind::Presence || resource_of(&from).is_none() {
            return;
        }
        let name = bare(&to);
        match stanza.stanza_type().as_deref() {
            None => {
                let known = self.rooms.get(name).and_then(|guests| guests.get(&*from));
                if known.is_none() && !stanza.is_join() {
                    return;
                }
                if known.is_none() && !self.has_room_for(name) {
                    self.overflows += 1;
                    return;
                }
                let Some(presence) = stanza.without_child(ns::MUC, "x") else {
                    return;
                };
                let is_join = stanza.is_join();
                let repeats = match is_join {
                    true => self.tails.enters(name, &from),
                    false => false,
                };
                let password = match is_join && self.split_far == SplitFar::Leave {
                    true => password_of(stanza),
                    false => known.and_then(|guest| guest.password.clone()),
                };
                let guest = Guest {
                    // Until the room says otherwise.
                    nick: known.map_or(nick, |guest| &guest.nick).to_owned(),
                    joined: known.is_some_and(|guest| guest.joined),
                    presence,
                    password,
                    away: false,
                    standing: known.and_then(|guest| guest.standing),
                    restated: false,
                    out: known.and_then(|guest| guest.out.clone()),
                    asking: match is_join {
                        true => Asking::Asked(stanza.id().map(Cow::into_owned)),
                        false => known.map_or(Asking::No, |guest| guest.asking.clone()),
                    },
                    repeats: repeats || known.is_some_and(|guest| guest.repeats),
                    verify_at: known.map_or(now.mono + VERIFY_EVERY, |guest| guest.verify_at),
                };
                let nick = guest.nick.clone();
                self.rooms
                    .entry(name.to_owned())
                    .or_default()
                    .insert(from.clone().into_owned(), guest);
                if is_join {
                    self.track(name, &from, &nick);
                }
                self.write(name, &from, now);
            }
            Some("unavailable") => {
                let guest = self.rooms.get(name).and_then(|guests| guests.get(&*from));
                let repeats = guest.is_some_and(|guest| guest.repeats);
                self.tails.leaves(name, &from, repeats, now);
                self.leaves_for_good(name, &from, now);
            }
            Some(_) => {}
        }
    }

    fn has_room_for(&self, name: &str) -> bool {
        match self.rooms.get(name) {
            Some(guests) => guests.len() < SESSIONS_MAX,
            None => self.rooms.len() < ROOMS_MAX,
        }
    }

    /// A stanza of our server for the peer: gives it back, if it is to cross.
    pub fn handle_local(&mut self, stanza: Stanza, from: &str, to: &str, now: Now) -> Option<Stanza> {
        if self.tails.expects_strays(now) && self.tails.is_stray(&stanza, bare(from), to, now) {
            return None;
        }
        match stanza.kind() {
            Kind::Iq => {
                if let Some(pong) = self.pong(&stanza, from, to) {
                    self.pongs += 1;
                    self.outputs.push_back(Output::Ask(pong));
                    return None;
                }
                let Some(id) = stanza.id().filter(|id| is_ours(id)) else {
                    return Some(stanza);
                };
                let id = id.into_owned();
                self.answered(&id, &stanza, from, now);
                None
            }
            Kind::Presence => {
                let name = bare(from);
                // To what we have said in a guest's name, which its client knows nothing of.
                if stanza.is_error() && stanza.id().is_some_and(|id| is_ours(&id)) {
                    self.tails.refused(name, to, now, &mut self.outputs);
                    return None;
                }
                if self.is_let_in_for_nobody(&stanza, name, to) {
                    self.take_back(from, to, now);
                    return None;
                }
                if !self.rooms.contains_key(name) {
                    return Some(stanza);
                }
                let node = node_of(&stanza);
                let stanza = match self.is_away(&stanza, &node, name, resource_of(from)) {
                    true => self.handle_away(stanza, &node, name, resource_of(from)?, to, now)?,
                    false => stanza,
                };
                let stanza = self.watch(stanza, &node, name, resource_of(from), to, now)?;
                let (Some(guests), Some(nick)) = (self.rooms.get_mut(name), resource_of(from)) else {
                    return Some(stanza);
                };
                match stanza.stanza_type().as_deref() {
                    None => {
                        let muc = MucUser::of(&node).filter(MucUser::is_self);
                        let waited = muc.is_some_and(|muc| self.has_entered(&stanza, &muc, name, nick, to, now));
                        // After what has waited for it.
                        if waited {
                            self.outputs.push_back(Output::Cross(stanza));
                            return None;
                        }
                    }
                    Some("unavailable") if guests.contains_key(to) => {
                        let muc = MucUser::of(&node).unwrap_or_default();
                        // The presence under the new nick may be lost with a process.
                        if let Some(new) = muc.new_nick().filter(|_| muc.is_self())
                            && let Some(guest) = guests.get_mut(to)
                        {
                            new.clone_into(&mut guest.nick);
                            self.write(name, to, now);
                        } else if muc.is_own_leave() {
                            let waits = self.tails.holds_words();
                            self.has_left(name, to, now);
                            // After what has waited for it.
                            if waits {
                                self.outputs.push_back(Output::Cross(stanza));
                                return None;
                            }
                        }
                    }
                    Some("error") => self.not_let_in(&stanza, name, to, now),
                    Some(_) => {}
                }
                Some(stanza)
            }
            Kind::Message => {
                let name = bare(from);
                let Some(guest) = self.rooms.get(name).and_then(|guests| guests.get(to)) else {
                    return Some(stanza);
                };
                // XEP-0045 §7.2.15: the subject comes last.
                let (is_last, repeats, is_told) = (is_subject(&stanza), guest.repeats, guest.asking == Asking::Told);
                let heard = self.hear_word(stanza, name, to, now);
                if is_last && (repeats || is_told && heard.is_some()) {
                    self.answered_to(name, to, now);
                }
                heard
            }
        }
    }

    /// Whether a room has let one in because we have asked for it, whom it had put out before it heard that.
    fn is_let_in_for_nobody(&self, stanza: &Stanza, room: &str, to: &str) -> bool {
        let is_answer = stanza.stanza_type().is_none() && stanza.id().is_some_and(|id| is_wish_of(&id, to));
        let is_guest = || self.rooms.get(room).is_some_and(|guests| guests.contains_key(to));
        is_answer && stanza.has_muc_status("110") && !is_guest() && !self.tails.has_stray(room, to)
    }

    /// One that a room has let in and that does not want to be there leaves, and hears of neither.
    fn take_back(&mut self, occupant: &str, address: &str, now: Now) {
        self.tails.expect_unwanted(bare(occupant), address, now);
        let leave = format!(
            "<presence type='unavailable' from='{}' to='{}'/>",
            escape_attribute(address),
            escape_attribute(occupant)
        );
        self.outputs.extend(Stanza::parse(leave.into()).ok().map(Output::Ask));
    }

    /// Whether a room repeats our own word about a guest.
    fn is_away(&self, stanza: &Stanza, node: &Node, room: &str, nick: Option<&str>) -> bool {
        let status = node.child(ns::SERVER, "status");
        stanza.stanza_type().is_none()
            && status.is_some_and(|status| status.text == AWAY)
            && self.away_guest(room, nick).is_some()
    }

    fn away_guest(&self, room: &str, nick: Option<&str>) -> Option<(&String, &Guest)> {
        let mut guests = self.rooms.get(room)?.iter();
        guests.find(|(_, guest)| guest.away && nick == Some(&guest.nick))
    }

    /// A room says of a guest what we have made it say: those beyond the link know better. But where it tells another role or affiliation
    /// with it, they have not heard of that, and are told; gives it back as the guest would have it said.
    fn handle_away(
        &mut self,
        stanza: Stanza,
        node: &Node,
        room: &str,
        nick: &str,
        to: &str,
        now: Now,
    ) -> Option<Stanza> {
        let (address, guest) = self.away_guest(room, Some(nick))?;
        let (address, is_restated) = (address.clone(), guest.restated);
        let muc = MucUser::of(node).unwrap_or_default();
        let is_new = guest.standing.is_some_and(|standing| standing != muc.standing());
        if is_restated || is_new {
            let told = undo_away(&stanza, &guest.presence);
            if !is_restated && let Some(guest) = self.rooms.get_mut(room).and_then(|guests| guests.get_mut(&address)) {
                guest.restated = true;
                self.write(room, &address, now);
            }
            return told;
        }
        if muc.is_self() {
            self.has_entered(&stanza, &muc, room, nick, to, now);
        }
        None
    }

    fn answered_to(&mut self, room: &str, address: &str, now: Now) {
        if let Some(guest) = self.rooms.get_mut(room).and_then(|guests| guests.get_mut(address)) {
            match guest.repeats {
                true => guest.repeats = false,
                false => guest.asking = Asking::No,
            }
            self.write(room, address, now);
        }
    }

    /// Nothing that a room has to say to who enters is on its way any more.
    fn has_been_told(&mut self, room: &str, address: &str, now: Now) {
        let guest = self.rooms.get_mut(room).and_then(|guests| guests.get_mut(address));
        if let Some(guest) = guest.filter(|guest| guest.repeats || guest.asking == Asking::Told) {
            guest.repeats = false;
            if guest.asking == Asking::Told {
                guest.asking = Asking::No;
            }
            self.write(room, address, now);
        }
    }

    /// A room tells a guest that it is in. Says whether something has waited for that, and is to come before it.
    fn has_entered(&mut self, stanza: &Stanza, muc: &MucUser, room: &str, nick: &str, to: &str, now: Now) -> bool {
        let Some(guest) = self.rooms.get_mut(room).and_then(|guests| guests.get_mut(to)) else {
            return false;
        };
        let id = stanza.id().map(Cow::into_owned);
        let wish = id.clone().filter(|id| is_wish_of(id, to));
        let is_own = match &guest.asking {
            Asking::Asked(asked) => wish.is_none() && (*asked == id || !guest.joined),
            Asking::No | Asking::Told => false,
        };
        if is_own {
            guest.asking = Asking::Told;
        }
        let repeats = wish.is_some() || guest.repeats && !is_own;
        let standing = Some(muc.standing());
        if is_own || guest.repeats != repeats || !guest.joined || guest.nick != nick || guest.standing != standing {
            let returns = !self.lost.is_empty() && self.lost.remove(&(room.to_owned(), to.to_owned()));
            self.ghosts_returned += u64::from(returns);
            guest.joined = true;
            guest.repeats = repeats;
            guest.standing = standing;
            nick.clone_into(&mut guest.nick);
            let verify_at = guest.verify_at;
            self.wake_by(verify_at);
            self.write(room, to, now);
        }
        match wish {
            Some(wish) => self.tails.repeats(room, to, &wish),
            None => return is_own && self.tails.entered(room, to, now, &mut self.outputs),
        }
        false
    }

    /// A room tells a guest that it is out. One that has asked to enter again still asks.
    fn has_left(&mut self, room: &str, address: &str, now: Now) {
        let Some(guest) = self.rooms.get_mut(room).and_then(|guests| guests.get_mut(address)) else {
            return;
        };
        if !guest.asks() {
            return self.remove(room, address, now);
        }
        (guest.joined, guest.repeats) = (false, false);
        let nick = guest.nick.clone();
        self.tails.left(room, address, now, &mut self.outputs);
        self.untrack(room, address);
        self.track(room, address, &nick);
        self.write(room, address, now);
    }

    /// A room refuses something to a guest: perhaps to let it in, or in again.
    fn not_let_in(&mut self, error: &Stanza, room: &str, address: &str, now: Now) {
        let Some(guest) = self.rooms.get_mut(room).and_then(|guests| guests.get_mut(address)) else {
            return;
        };
        let is_answer = matches!(&guest.asking, Asking::Asked(asked) if asked.as_deref() == error.id().as_deref());
        match (is_answer, guest.joined) {
            (true, true) => {
                guest.asking = Asking::No;
                self.write(room, address, now);
            }
            (true, false) => self.remove(room, address, now),
            (false, _) => {}
        }
    }

    /// A room asks whether a guest is still there, as Openfire's do, and puts out who does not answer. The peer tells when one has gone, so
    /// whoever is inside is there, whatever the link does.
    fn pong(&self, stanza: &Stanza, from: &str, to: &str) -> Option<Stanza> {
        let guest = self.rooms.get(from)?.get(to)?;
        let asks = stanza.stanza_type().as_deref() == Some("get") && node_of(stanza).child(ns::PING, "ping").is_some();
        (asks && guest.joined).then(|| near::result(stanza, ""))?
    }

    /// Marks the guests as away, or has them leave. Says whether there are any.
    pub fn split(&mut self, now: Now) -> bool {
        let leaves = match self.split_far {
            SplitFar::Leave => true,
            SplitFar::Away => false,
            SplitFar::Hold => return false,
        };
        let left = leaves && self.leave_all(now);
        let marked = self.speak_for(now, |guest, is_tracked| {
            if !guest.joined || guest.away || guest.out.is_some() || leaves && is_tracked {
                return None;
            }
            guest.away = true;
            guest.restated = false;
            away(&guest.presence)
        });
        left || marked
    }

    /// Puts back what the guests last said of themselves.
    pub fn heal(&mut self, now: Now) -> bool {
        self.speak_for(now, |guest, _| {
            std::mem::take(&mut guest.away).then(|| guest.presence.clone())
        })
    }

    /// Has guests say something in their rooms.
    fn speak_for(&mut self, now: Now, says: impl Fn(&mut Guest, bool) -> Option<Stanza>) -> bool {
        let mut spoken = Vec::new();
        for (room, guests) in &mut self.rooms {
            let shown = self.shown.get(room);
            for (address, guest) in guests {
                let is_tracked = shown.is_some_and(|shown| shown.sessions.contains_key(address));
                if let Some(stanza) = says(guest, is_tracked) {
                    spoken.push((room.clone(), address.clone(), stanza));
                }
            }
        }
        for (room, address, stanza) in &spoken {
            let id = self.new_id('s');
            // The nick may have been changed since.
            let nick = &self.rooms[room][address].nick;
            if let Some((template, to_at, attribute)) = stanza
                .with_to(&format!("{room}/{nick}"))
                .and_then(|stanza| stanza.with_id(&id)?.split_to())
            {
                self.outputs.push_back(Output::Deliver(Cast {
                    template,
                    to_at: to_at as u32,
                    recipients: vec![attribute],
                }));
            }
            self.write(room, address, now);
        }
        !spoken.is_empty()
    }

    pub fn holds_words(&self) -> bool {
        self.tails.holds_words()
    }

    pub fn has_guests(&self, local: &Domain) -> bool {
        let mut of_domain = self.rooms.iter().filter(|(room, _)| is_of(room, local));
        of_domain.any(|(_, guests)| guests.values().any(|guest| guest.joined))
    }

    /// The rooms of this domain are asked about their guests before long.
    pub fn verify_soon(&mut self, local: &Domain, now: Now) {
        self.wake_by(now.mono + VERIFY_SOON);
        for (room, guests) in &mut self.rooms {
            if is_of(room, local) {
                for guest in guests.values_mut() {
                    guest.verify_at = guest.verify_at.min(now.mono + VERIFY_SOON);
                }
            }
        }
    }

    fn verify_by(&mut self, room: &str, address: &str, at: Mono) {
        if let Some(guest) = self.rooms.get_mut(room).and_then(|guests| guests.get_mut(address)) {
            guest.verify_at = guest.verify_at.min(at);
            self.wake_by(at);
        }
    }

    pub fn handle_timeout(&mut self, now: Now) {
        self.tails.handle_timeout(now, &mut self.outputs);
        if self.ask_at().is_none_or(|deadline| deadline.at > now.mono) {
            return;
        }
        self.next_burst = None;
        let mut due = Vec::new();
        let mut again = Vec::new();
        let mut wake_at: Option<Mono> = None;
        for (room, guests) in &mut self.rooms {
            for (address, guest) in guests.iter_mut().filter(|(_, guest)| guest.joined) {
                if guest.verify_at <= now.mono && due.len() < VERIFY_BURST {
                    guest.verify_at = now.mono + VERIFY_EVERY;
                    match &guest.out {
                        None => due.push((room.clone(), address.clone(), guest.nick.clone())),
                        Some(_) => again.push((room.clone(), address.clone())),
                    }
                }
                wake_at = Some(wake_at.map_or(guest.verify_at, |wake| wake.min(guest.verify_at)));
            }
        }
        self.wake_at = wake_at;
        for (room, address) in again {
            self.ask_again(&room, &address, now);
        }
        if due.len() == VERIFY_BURST {
            self.next_burst = Some(now.mono + VERIFY_NEXT);
        }
        // A room that does not answer is asked again in its turn; the old question is forgotten.
        let again: BTreeSet<(String, String)> = due
            .iter()
            .map(|(room, address, _)| (room.clone(), address.clone()))
            .collect();
        self.asked
            .retain(|_, asked| !again.contains(&(asked.room.clone(), asked.address.clone())));
        for (room, address, nick) in due {
            self.ask(room, address, Question::IsInside { nick });
        }
    }

    /// Asks a room in the name of a guest.
    fn ask(&mut self, room: String, address: String, question: Question) {
        let id = self.new_id('p');
        let (to, payload) = match &question {
            Question::IsInside { nick } => (format!("{room}/{nick}"), format!("<ping xmlns='{}'/>", ns::PING)),
            Question::IsThere => (room.clone(), format!("<query xmlns='{}'/>", ns::DISCO_INFO)),
        };
        let iq = format!(
            "<iq type='get' from='{}' to='{}' id='{id}'>{payload}</iq>",
            escape_attribute(&address),
            escape_attribute(&to),
        );
        if let Ok(iq) = Stanza::parse(iq.into()) {
            let asked = Asked {
                room,
                address,
                question,
            };
            self.asked.insert(id, asked);
            self.outputs.push_back(Output::Ask(iq));
        }
    }

    /// For what we ask (`p`) or say (`s`) in a guest's name, so that no answer is taken for one to the guest.
    fn new_id(&mut self, what: char) -> String {
        self.ids_last += 1;
        format!("narrows-{:x}-{what}{:x}", self.epoch.0, self.ids_last)
    }

    /// A room has answered a question of ours.
    fn answered(&mut self, id: &str, answer: &Stanza, from: &str, now: Now) {
        let Some(Asked {
            room,
            address,
            question,
        }) = self.asked.remove(id)
        else {
            return;
        };
        let Some(guest) = self.rooms.get(&room).and_then(|guests| guests.get(&address)) else {
            return;
        };
        if bare(from) != room || !guest.joined || guest.out.is_some() {
            return;
        }
        // The nick's change may have been on its way when we asked: the next question is about the new one.
        let is_of_nick = |nick: &String| guest.nick == *nick;
        match question {
            Question::IsInside { .. } if !answer.is_error() => {
                // What it was told as it entered came before this, or was lost with a process.
                self.has_been_told(&room, &address, now);
                if self.tails.is_suspected(&room) {
                    self.enter_again(&room, &address);
                }
            }
            Question::IsInside { nick } if says(answer, "not-acceptable") && is_of_nick(&nick) => {
                self.lose(&room, &address, now);
            }
            // XEP-0410 §3.3: the guest is in, and has another nick, which we may not have heard of. Or there is no such room any more.
            Question::IsInside { nick } if says(answer, "item-not-found") && is_of_nick(&nick) => {
                self.ask_another(&room, &address, now);
                self.ask(room, address, Question::IsThere);
            }
            Question::IsThere if says(answer, "item-not-found") => self.lose(&room, &address, now),
            Question::IsInside { .. } | Question::IsThere => {}
        }
    }

    /// A room does not have this guest any more, and has not said so.
    fn lose(&mut self, room: &str, address: &str, now: Now) {
        let Some(guest) = self.rooms.get(room).and_then(|guests| guests.get(address)) else {
            return;
        };
        self.ghosts += 1;
        if self.lost.len() < LOST_MAX {
            self.lost.insert((room.to_owned(), address.to_owned()));
        }
        let occupant = format!("{room}/{}", guest.nick);
        // As the room would have said it, had it known to whom.
        let (template, to_at) = lost_presence(&occupant, &MucUser::gone(), &[SELF_PRESENCE, LOST]);
        let told = Stanza::join(&template, to_at as usize, &to_attribute(address));
        self.remove(room, address, now);
        if let Ok(told) = Stanza::parse(told) {
            self.outputs.push_back(Output::Cross(told));
        }
        self.ask_another(room, address, now);
    }

    /// Of a room whose last words are in doubt, the next guest may be asked about in the place of this one.
    fn ask_another(&mut self, room: &str, address: &str, now: Now) {
        let after = (Bound::Excluded(address), Bound::Unbounded);
        let guests = self.rooms.get(room).into_iter();
        let mut others = guests.flat_map(|guests| guests.range::<str, _>(after));
        let other = others
            .find(|(_, guest)| guest.joined && guest.out.is_none())
            .map(|(address, _)| address.clone());
        if let Some(other) = other.filter(|_| self.tails.is_suspected(room)) {
            self.verify_by(room, &other, now.mono);
        }
    }

    /// A guest that is inside enters once more, so that the room repeats its last words. It is shown the others again.
    fn enter_again(&mut self, room: &str, address: &str) {
        let Some(guest) = self.rooms.get(room).and_then(|guests| guests.get(address)) else {
            return;
        };
        let presence = match guest.away {
            true => away(&guest.presence),
            false => Some(guest.presence.clone()),
        };
        let x = format!("<x xmlns='{}'><history maxstanzas='{LINES_MAX}'/></x>", ns::MUC);
        let join = presence
            .and_then(|presence| presence.with_child(&x))
            .and_then(|presence| presence.with_to(&format!("{room}/{}", guest.nick)));
        let id = self.new_id('p') + &wish_of(address);
        if let Some(join) = join.and_then(|join| join.with_id(&id)) {
            self.tails.asked(room, address, &id);
            self.outputs.push_back(Output::Ask(join));
        }
    }

    pub(super) fn remove(&mut self, room: &str, address: &str, now: Now) {
        self.untrack(room, address);
        self.tails.left(room, address, now, &mut self.outputs);
        let Some(guests) = self.rooms.get_mut(room) else { return };
        if guests.remove(address).is_some() {
            self.rows.remove(guest_key(room, address), &mut self.outputs);
        }
        if guests.is_empty() {
            self.rooms.remove(room);
            self.tails.close(room, now, &mut self.outputs);
        }
    }

    pub(super) fn write(&mut self, room: &str, address: &str, now: Now) {
        let Some(guest) = self.rooms.get(room).and_then(|guests| guests.get(address)) else {
            return;
        };
        let asked_as = match &guest.asking {
            Asking::Asked(id) => id.as_ref(),
            Asking::No | Asking::Told => None,
        };
        let mut value = begin_row();
        let flags = [
            guest.joined,
            guest.away,
            guest.password.is_some(),
            guest.out.is_some(),
            guest.asking != Asking::No,
            guest.asking == Asking::Told,
            asked_as.is_some(),
            guest.standing.is_some(),
            guest.restated,
            guest.repeats,
        ];
        put_varint(
            &mut value,
            (0..).zip(flags).map(|(bit, flag)| u64::from(flag) << bit).sum(),
        );
        put_prefixed(&mut value, guest.nick.as_bytes());
        put_prefixed(&mut value, guest.presence.bytes());
        for text in guest.password.iter().chain(asked_as) {
            put_prefixed(&mut value, text.as_bytes());
        }
        if let Some(standing) = guest.standing {
            put_varint(&mut value, standing);
        }
        if let Some(out) = &guest.out {
            out.encode(&mut value);
        }
        if !self.rows.put(guest_key(room, address), value.into(), &mut self.outputs) {
            self.overflows += 1;
            self.remove(room, address, now);
        }
    }
}

fn is_subject(stanza: &Stanza) -> bool {
    let node = node_of(stanza);
    stanza.stanza_type().as_deref() == Some("groupchat")
        && node.child(ns::SERVER, "subject").is_some()
        && !has_body(&node)
}

/// Whether this is the error that an answer gives.
fn says(answer: &Stanza, condition: &str) -> bool {
    let error = || node_of(answer).child(ns::SERVER, "error").cloned();
    answer.is_error() && error().is_some_and(|error| error.child(ns::STANZA_ERRORS, condition).is_some())
}

fn is_of(room: &str, domain: &Domain) -> bool {
    Domain::new(domain_of(room)).is_ok_and(|of| of == *domain)
}

fn guest_key(room: &str, address: &str) -> Bytes {
    rows::Kind::Guest.key(room, address.as_bytes())
}
