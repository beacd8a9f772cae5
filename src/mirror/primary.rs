//! Our own rooms, and the peer's users in them.
//!
//! While the link is down the room must neither lose its far occupants nor think that they listen: they are marked as away, and
//! get their own presence back when the link is. While it is up, the room is asked now and then whether it still has them (XEP-0410, over our
//! own leg, so it costs the link nothing): a room that was restarted may have forgotten, and nobody else would tell.

use std::{
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
    tail::{Inside, LINES_MAX, Tails},
    words::{AWAY, away, has_body, lost_presence, node_of, to_attribute},
};
use crate::{
    codec::{entry::Cast, position::Epoch, varint::put_prefixed},
    stanza::{Domain, Kind, Stanza, bare, domain_of, escape_attribute, ns, resource_of},
    time::{Deadline, Mono, Now},
};

/// Sessions that are remembered as lost, to see whether they come back.
const LOST_MAX: usize = 1_000;

/// How often a room is asked about each far occupant. One question costs its server some microseconds.
pub(super) const VERIFY_EVERY: Duration = Duration::from_secs(300);
/// After a stream to our server began anew: its rooms may still be loading.
const VERIFY_SOON: Duration = Duration::from_secs(5);
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
    /// It is out of the room, or about to come back.
    pub(super) out: Option<Out>,
    pub(super) asking: Asking,
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

/// Whether a guest is to be told all that the room has to say to who enters.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Asking {
    No,
    /// It has asked to enter.
    Asked,
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
    asked_last: u64,
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
    pub fn new(local: Vec<Domain>, split_far: SplitFar, epoch: Epoch) -> Self {
        Self {
            local,
            split_far,
            epoch,
            rooms: BTreeMap::new(),
            shown: BTreeMap::new(),
            asked: BTreeMap::new(),
            asked_last: 0,
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
        let flags = reader.byte().ok()?;
        let nick = text(&mut reader)?;
        let presence = Stanza::parse(Bytes::from(text(&mut reader)?)).ok()?;
        let password = match flags & 4 != 0 {
            true => Some(text(&mut reader)?),
            false => None,
        };
        let out = match flags & 8 != 0 {
            true => Some(Out::decode(&mut reader)?),
            false => None,
        };
        let guest = Guest {
            nick,
            joined: flags & 1 != 0,
            presence,
            password,
            away: flags & 2 != 0,
            out,
            asking: match (flags & 16 != 0, flags & 32 != 0) {
                (false, _) => Asking::No,
                (true, false) => Asking::Asked,
                (true, true) => Asking::Told,
            },
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
        let mut inside: BTreeMap<String, Inside> = BTreeMap::new();
        for (room, guests) in &self.rooms {
            for (address, guest) in guests.iter().filter(|(_, guest)| guest.joined && guest.out.is_none()) {
                let Inside { guests: all, asking } = inside.entry(room.clone()).or_default();
                all.insert(address.clone());
                asking.extend((guest.asking != Asking::No).then(|| address.clone()));
            }
        }
        for (room, address) in self.tails.suspect(inside, now, &mut self.outputs) {
            self.verify_now(&room, &address, now);
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
                if is_join {
                    self.tails.enters(name, &from, now, &mut self.outputs);
                }
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
                    out: known.and_then(|guest| guest.out.clone()),
                    asking: match is_join {
                        true => Asking::Asked,
                        false => known.map_or(Asking::No, |guest| guest.asking),
                    },
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
                self.tails.leaves(name, &from, now);
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
        if self.tails.expects_strays(now) {
            let guest = self.rooms.get(bare(from)).and_then(|guests| guests.get(to));
            let asking = guest.is_some_and(|guest| guest.asking != Asking::No);
            if self.tails.is_stray(&stanza, bare(from), to, asking, now) {
                return None;
            }
        }
        match stanza.kind() {
            Kind::Iq => {
                if let Some(pong) = self.pong(&stanza, from, to) {
                    self.pongs += 1;
                    self.outputs.push_back(Output::Ask(pong));
                    return None;
                }
                let Some(id) = stanza.id().filter(|id| self.is_ours(id)) else {
                    return Some(stanza);
                };
                let id = id.into_owned();
                self.answered(&id, &stanza, from, now);
                None
            }
            Kind::Presence => {
                let name = bare(from);
                let Some(guests) = self.rooms.get(name) else {
                    return Some(stanza);
                };
                let node = node_of(&stanza);
                // Our own word about a guest: those beyond the link know better.
                if stanza.stanza_type().is_none()
                    && node
                        .child(ns::SERVER, "status")
                        .is_some_and(|status| status.text == AWAY)
                    && guests
                        .values()
                        .any(|guest| guest.away && resource_of(from) == Some(&guest.nick))
                {
                    let is_self = MucUser::of(&node).is_some_and(|muc| muc.is_self());
                    if is_self && guests.contains_key(to) {
                        self.tails.entered(name, to, now, &mut self.outputs);
                    }
                    return None;
                }
                let stanza = self.watch(stanza, &node, name, resource_of(from), to, now)?;
                let (Some(guests), Some(nick)) = (self.rooms.get_mut(name), resource_of(from)) else {
                    return Some(stanza);
                };
                match stanza.stanza_type().as_deref() {
                    None => {
                        let is_self = MucUser::of(&node).is_some_and(|muc| muc.is_self());
                        let enters = is_self && guests.contains_key(to);
                        let waited = enters && self.tails.entered(name, to, now, &mut self.outputs);
                        if let Some(guest) = guests.get_mut(to)
                            && is_self
                        {
                            let is_answer = !guest.joined || stanza.id() == guest.presence.id();
                            let told = guest.asking == Asking::Asked && is_answer;
                            if told {
                                guest.asking = Asking::Told;
                            }
                            if told || !guest.joined || guest.nick != nick {
                                guest.joined = true;
                                let returns =
                                    !self.lost.is_empty() && self.lost.remove(&(name.to_owned(), to.to_owned()));
                                self.ghosts_returned += u64::from(returns);
                                nick.clone_into(&mut guest.nick);
                                let verify_at = guest.verify_at;
                                self.wake_by(verify_at);
                                self.write(name, to, now);
                            }
                        }
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
                            self.remove(name, to, now);
                            // After what has waited for it.
                            if waits {
                                self.outputs.push_back(Output::Cross(stanza));
                                return None;
                            }
                        }
                    }
                    // It is inside all the same, and its client would take it for the end of that.
                    Some("error") if self.tails.refused(name, to, now, &mut self.outputs) => return None,
                    Some("error") if guests.get(to).is_some_and(|guest| !guest.joined) => self.remove(name, to, now),
                    Some(_) => {}
                }
                Some(stanza)
            }
            Kind::Message => {
                let name = bare(from);
                let Some(guest) = self.rooms.get(name).and_then(|guests| guests.get(to)) else {
                    return Some(stanza);
                };
                let asking = guest.asking;
                let heard = self.hear_word(stanza, name, to, now)?;
                // XEP-0045 §7.2.15: the subject comes last.
                if asking == Asking::Told && is_subject(&heard) {
                    self.answered_to(name, to, now);
                }
                Some(heard)
            }
        }
    }

    fn answered_to(&mut self, room: &str, address: &str, now: Now) {
        if let Some(guest) = self.rooms.get_mut(room).and_then(|guests| guests.get_mut(address)) {
            guest.asking = Asking::No;
            self.write(room, address, now);
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
            // The nick may have been changed since.
            let nick = &self.rooms[room][address].nick;
            if let Some((template, to_at, attribute)) = stanza
                .with_to(&format!("{room}/{nick}"))
                .and_then(|stanza| stanza.split_to())
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

    fn verify_now(&mut self, room: &str, address: &str, now: Now) {
        if let Some(guest) = self.rooms.get_mut(room).and_then(|guests| guests.get_mut(address)) {
            guest.verify_at = now.mono;
            self.wake_by(now.mono);
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
        self.asked_last += 1;
        let id = format!("{}{:x}", self.id_prefix(), self.asked_last);
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

    /// No one else's ids look like this: the epoch was drawn at random.
    fn id_prefix(&self) -> String {
        format!("narrows-{:x}-p", self.epoch.0)
    }

    fn is_ours(&self, id: &str) -> bool {
        id.starts_with(&self.id_prefix())
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
                if self.tails.may_ask(&room, &address) {
                    self.enter_again(&room, &address);
                } else {
                    self.ask_another(&room, &address, now);
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
            self.verify_now(room, &other, now);
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
        if let Some(join) = join {
            self.tails.asked(room, address);
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
        let mut value = begin_row();
        let flags = [
            guest.joined,
            guest.away,
            guest.password.is_some(),
            guest.out.is_some(),
            guest.asking != Asking::No,
            guest.asking == Asking::Told,
        ];
        value.push((0..).zip(flags).map(|(bit, flag)| u8::from(flag) << bit).sum());
        put_prefixed(&mut value, guest.nick.as_bytes());
        put_prefixed(&mut value, guest.presence.bytes());
        if let Some(password) = &guest.password {
            put_prefixed(&mut value, password.as_bytes());
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
