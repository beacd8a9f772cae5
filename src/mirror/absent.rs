//! Guests that are out of our rooms while the link is down (`split_far: leave`), and how they come back.
//!
//! They leave in their own name, and the room says nothing more to them. What it said meanwhile is in its history, which each asks for when
//! it enters again ([XEP-0045 §7.2.13](https://xmpp.org/extensions/xep-0045.html#enter-history)). Those beyond the link are to see
//! neither: the leaves are kept from them, and of what a room tells who enters, only what they do not know crosses: who is new or has
//! changed, who is gone, what was said after what they heard last, another subject. So it is written down what each of them was shown.
//!
//! ```text
//!             split               the room confirms         all has come, or something of its own
//!  (here) ────────────▶ Leaving ────────────────────▶ Gone ─────────────────────────────────┐
//!     ▲                    │    all has come, or something of its own                       ▼
//!     │                    └───────────────────────────────────────────────────────▶ Returning ─────▶ Parting
//!     └──────────────────────────── the subject, which ends what a room tells ───────────┘    its leave
//! ```
//!
//! The first thing that a guest has said meanwhile brings it back before it is said; one that has left meanwhile does not come back at
//! all. A process that was killed while a room answered has it asked again.
//!
//! A history may be too short. Where the last that was heard is not found in it, the guest is told that something may be missing. What has
//! no body is in no history.

use std::{
    collections::{BTreeSet, VecDeque},
    time::Duration,
};

use bytes::Bytes;

use super::{
    Output, SplitFar,
    muc::{BANNED, LOST, MEMBERS_ONLY, MucUser, NEW_NICK, NEW_ROOM, SELF_PRESENCE},
    primary::{Guest, Primary, VERIFY_EVERY},
    room::Room,
    rows,
    tail::{Expected, Line, Word, latest_in},
    words::{AWAY, cast_to, form_of, lost_presence, node_of, to_attribute},
};
use crate::{
    codec::{
        entry::Cast,
        varint::{Reader, put_len, put_varint},
        xml::Node,
    },
    stanza::{Kind, Stanza, bare, escape_attribute, escape_text, ns},
    time::{Now, Wall},
};

/// Lines of history that are asked for, and kept until all have come. Servers keep 20 as shipped.
const LINES_MAX: usize = 200;
/// Marks kept of what a guest heard last: enough to find the place where words repeat.
const HEARD_MAX: usize = 8;
/// Forms of its own presence: those that moderators, others and it itself see, and some that are older.
const FORMS_MAX: usize = 64;
/// A room that has not answered is asked again, at first after this.
const RETRY_FIRST: Duration = Duration::from_secs(10);
/// Other nicks that are tried for one that was taken meanwhile.
const NICKS_MAX: u8 = 3;

/// A guest that is not where its client thinks it is.
#[derive(Clone, Debug)]
pub struct Out {
    stage: Stage,
    /// Marks of the last words that it was sent, the latest last, and when that was.
    heard: VecDeque<u64>,
    heard_at: Wall,
    subject: Option<u64>,
    /// Marks of what was shown of it when it left.
    shown_as: Vec<u64>,
    tries: u32,
    nicks: u8,
    /// It may never have left, or be in already: the room may not tell others once more that it has come.
    in_doubt: bool,
    /// No session of this nick was left in the room.
    vacant: bool,
    /// Guests to whom the room has shown the nick since.
    shown_to: BTreeSet<String>,
}

#[derive(Clone, Debug)]
enum Stage {
    /// It has left, and the room may not know yet.
    Leaving {
        /// What the room said before is not here yet either.
        behind: bool,
    },
    Gone,
    Returning {
        /// The room has confirmed that it had left: what comes now is the answer to its return.
        confirmed: bool,
        /// Who is there.
        seen: BTreeSet<String>,
        /// What was said, once it is in.
        history: Option<VecDeque<Line>>,
    },
    /// It has left for good while it returned.
    Parting,
}

/// The same without what is known of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    Here,
    Leaving { behind: bool },
    Gone,
    Returning { confirmed: bool, entered: bool },
    Parting,
}

impl Out {
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.push(match self.stage {
            Stage::Leaving { behind: false } => 0,
            Stage::Leaving { behind: true } => 1,
            Stage::Gone => 2,
            Stage::Returning { .. } => 3,
            Stage::Parting => 4,
        });
        put_varint(out, self.heard_at.0);
        out.push(u8::from(self.subject.is_some()));
        put_len(out, self.heard.len());
        put_len(out, self.shown_as.len());
        for mark in self.subject.iter().chain(&self.heard).chain(&self.shown_as) {
            out.extend_from_slice(&mark.to_be_bytes());
        }
    }

    pub fn decode(reader: &mut Reader<'_>) -> Option<Self> {
        let stage = reader.byte().ok()?;
        let in_doubt = stage == 3;
        let stage = match stage {
            0 => Stage::Leaving { behind: false },
            1 => Stage::Leaving { behind: true },
            // What a room had answered is not known any more: it is asked again.
            2 | 3 => Stage::Gone,
            4 => Stage::Parting,
            _ => return None,
        };
        let heard_at = Wall(reader.varint().ok()?);
        let has_subject = reader.byte().ok()? != 0;
        let heard = reader.len_upto(HEARD_MAX).ok()?;
        let shown_as = reader.len_upto(FORMS_MAX).ok()?;
        let mark = |reader: &mut Reader<'_>| Some(u64::from_be_bytes(reader.take(8).ok()?.try_into().ok()?));
        let subject = match has_subject {
            true => Some(mark(reader)?),
            false => None,
        };
        Some(Self {
            stage,
            heard: (0..heard).map(|_| mark(reader)).collect::<Option<_>>()?,
            heard_at,
            subject,
            shown_as: (0..shown_as).map(|_| mark(reader)).collect::<Option<_>>()?,
            tries: 0,
            nicks: 0,
            in_doubt,
            vacant: false,
            shown_to: BTreeSet::new(),
        })
    }

    /// Whether a room is to answer, or its leave to be told.
    pub fn is_under_way(&self) -> bool {
        match self.stage {
            Stage::Returning { .. } | Stage::Parting => true,
            Stage::Leaving { .. } | Stage::Gone => false,
        }
    }

    fn returning(confirmed: bool) -> Stage {
        Stage::Returning {
            confirmed,
            seen: BTreeSet::new(),
            history: None,
        }
    }

    fn hear(&mut self, mark: u64, now: Now) {
        self.heard.push_back(mark);
        if self.heard.len() > HEARD_MAX {
            self.heard.pop_front();
        }
        self.heard_at = now.wall;
    }

    /// Where in this history begins what was not heard, and whether nothing before it is missing.
    fn unheard(&self, history: &VecDeque<Line>) -> (usize, bool) {
        if let Some(latest) = latest_in(history, &self.heard) {
            return (latest + 1, true);
        }
        // Some servers tell seconds only.
        let is_new = |line: &Line| line.stamp.is_some_and(|stamp| stamp.0 + 999 >= self.heard_at.0);
        let begin = history.iter().position(is_new).unwrap_or(history.len());
        // Where nothing had been said before, an empty history is whole.
        (begin, self.heard.is_empty() && (begin > 0 || history.is_empty()))
    }
}

impl Guest {
    fn place(&self) -> Place {
        match self.out.as_ref().map(|out| &out.stage) {
            None => Place::Here,
            Some(Stage::Leaving { behind }) => Place::Leaving { behind: *behind },
            Some(Stage::Gone) => Place::Gone,
            Some(Stage::Returning { confirmed, history, .. }) => Place::Returning {
                confirmed: *confirmed,
                entered: history.is_some(),
            },
            Some(Stage::Parting) => Place::Parting,
        }
    }
}

impl Primary {
    pub fn load_seen(&mut self, room: &str, value: &[u8]) -> Option<()> {
        if !self.rooms.contains_key(room) {
            return None;
        }
        self.shown.insert(room.to_owned(), Room::decode(value)?);
        Some(())
    }

    pub fn load_seen_occupant(&mut self, room: &str, nick: &[u8], value: &[u8]) -> Option<()> {
        let nick = std::str::from_utf8(nick).ok()?.to_owned();
        let versions = Room::decode_occupant(value)?;
        self.shown.get_mut(room)?.occupants.insert(nick, versions);
        Some(())
    }

    /// Whether a room is to answer something that those beyond the link wait for.
    pub fn awaits_rooms(&self) -> bool {
        let outs = self.rooms.values().flat_map(|guests| guests.values());
        outs.filter_map(|guest| guest.out.as_ref()).any(Out::is_under_way)
    }

    /// A guest asks to enter: from here on it is known what it is shown. Who was in before that was, is never taken out.
    pub(super) fn track(&mut self, room: &str, address: &str, nick: &str) {
        if self.split_far != SplitFar::Leave {
            return self.untrack(room, address);
        }
        if self.is_tracked(room, address) {
            return;
        }
        self.shown
            .entry(room.to_owned())
            .or_default()
            .add_session(address, nick);
        self.write_seen(room, &[]);
    }

    pub(super) fn untrack(&mut self, room: &str, address: &str) {
        let Some(shown) = self.shown.get_mut(room) else { return };
        if !shown.sessions.contains_key(address) {
            return;
        }
        let changed = shown.remove_session(address);
        self.write_seen(room, &changed);
        if self.shown.get(room).is_some_and(|shown| shown.sessions.is_empty()) {
            self.forget_shown(room);
        }
    }

    pub(super) fn is_tracked(&self, room: &str, address: &str) -> bool {
        let shown = self.shown.get(room);
        shown.is_some_and(|shown| shown.sessions.contains_key(address))
    }

    fn forget_shown(&mut self, room: &str) {
        let Some(shown) = self.shown.remove(room) else { return };
        self.rows.remove(rows::Kind::Seen.key(room, b""), &mut self.outputs);
        for nick in shown.occupants.keys() {
            let key = rows::Kind::SeenOccupant.key(room, nick.as_bytes());
            self.rows.remove(key, &mut self.outputs);
        }
    }

    /// What cannot be written is not known: those guests are away instead, the next time.
    fn write_seen(&mut self, room: &str, nicks: &[String]) {
        let mut taken = true;
        if let Some(shown) = self.shown.get(room) {
            let value = shown.encode();
            taken &= self.rows.put(rows::Kind::Seen.key(room, b""), value, &mut self.outputs);
        }
        for nick in nicks {
            taken &= self.write_seen_occupant(room, nick);
        }
        if !taken || self.shown.get(room).is_some_and(Room::is_too_large) {
            self.overflows += 1;
            self.forget_shown(room);
        }
    }

    fn write_seen_occupant(&mut self, room: &str, nick: &str) -> bool {
        let key = rows::Kind::SeenOccupant.key(room, nick.as_bytes());
        match self.shown.get(room).and_then(|shown| shown.encode_occupant(nick)) {
            Some(value) => self.rows.put(key, value, &mut self.outputs),
            None => {
                self.rows.remove(key, &mut self.outputs);
                true
            }
        }
    }

    fn note_shown(&mut self, room: &str, nick: &str, to: &str, stanza: &Stanza) {
        let (Some(shown), Some((template, to_at, attribute))) = (self.shown.get_mut(room), stanza.split_to()) else {
            return;
        };
        let cast = Cast {
            template,
            to_at: to_at as u32,
            recipients: vec![attribute],
        };
        shown.show(nick, &cast, &[to.to_owned()]);
        if !self.write_seen_occupant(room, nick) || self.shown.get(room).is_some_and(Room::is_too_large) {
            self.overflows += 1;
            self.forget_shown(room);
        }
    }

    fn note_hidden(&mut self, room: &str, nick: &str, to: &str) {
        if let Some(shown) = self.shown.get_mut(room) {
            shown.hide(nick, &[to.to_owned()]);
            // A row that is smaller than it was.
            let _ = self.write_seen_occupant(room, nick);
        }
    }

    fn was_shown(&self, room: &str, nick: &str, to: &str, stanza: &Stanza) -> bool {
        let version = self.shown.get(room).and_then(|shown| shown.version(nick, to));
        let same = stanza.split_to().zip(version);
        same.is_some_and(|((template, ..), version)| {
            template == version.template || form_of(&template) == form_of(&version.template)
        })
    }

    fn place(&self, room: &str, address: &str) -> Option<Place> {
        Some(self.rooms.get(room)?.get(address)?.place())
    }

    /// Whether a guest that is taken for gone may be in its room.
    fn is_in_doubt(&self, room: &str, address: &str) -> bool {
        let guest = self.rooms.get(room).and_then(|guests| guests.get(address));
        guest.is_some_and(|guest| guest.place() == Place::Gone && guest.out.as_ref().is_some_and(|out| out.in_doubt))
    }

    fn guest_mut(&mut self, room: &str, address: &str) -> Option<&mut Guest> {
        self.rooms.get_mut(room)?.get_mut(address)
    }

    /// Whether this nick is that of another guest, which is out only because of the link.
    fn is_out(&self, room: &str, nick: &str, than: &str) -> bool {
        let others = self.rooms.get(room).into_iter().flatten();
        let is_out = |guest: &Guest| match guest.place() {
            Place::Leaving { .. } | Place::Gone | Place::Returning { .. } => true,
            Place::Here | Place::Parting => false,
        };
        others
            .filter(|(address, guest)| *address != than && guest.nick == nick)
            .any(|(_, guest)| is_out(guest))
    }

    /// Has the guests leave that are known well enough to come back. Where nobody else is, nobody sees it, and the room might not outlive it.
    pub(super) fn leave_all(&mut self, now: Now) -> bool {
        let mut due = Vec::new();
        for (room, guests) in &self.rooms {
            let Some(shown) = self.shown.get(room) else { continue };
            let is_guest = |nick: &String| guests.values().any(|guest| guest.joined && guest.nick == *nick);
            if shown.occupants.keys().all(is_guest) {
                continue;
            }
            let inside = guests.iter().filter(|(address, guest)| {
                guest.joined
                    && shown.sessions.contains_key(*address)
                    && matches!(guest.place(), Place::Here | Place::Returning { .. })
            });
            due.extend(inside.map(|(address, _)| (room.clone(), address.clone())));
        }
        for (room, address) in &due {
            self.tails.settle(room, now, &mut self.outputs);
            self.leave(room, address, now);
        }
        !due.is_empty()
    }

    fn leave(&mut self, room: &str, address: &str, now: Now) {
        let (mut heard, subject) = self.tails.heard(room, address);
        heard.drain(..heard.len().saturating_sub(HEARD_MAX));
        let Some(guest) = self.rooms.get_mut(room).and_then(|guests| guests.get_mut(address)) else {
            return;
        };
        let versions = self.shown.get(room).and_then(|shown| shown.occupants.get(&guest.nick));
        let forms = versions.into_iter().flatten();
        let shown_as: BTreeSet<u64> = forms.map(|version| form_of(&version.template)).collect();
        let shown_as = shown_as.into_iter().take(FORMS_MAX).collect();
        guest.away = false;
        match &mut guest.out {
            Some(out) => out.stage = Stage::Leaving { behind: true },
            None => {
                guest.out = Some(Out {
                    stage: Stage::Leaving { behind: false },
                    heard,
                    heard_at: now.wall,
                    subject,
                    shown_as,
                    tries: 0,
                    nicks: 0,
                    in_doubt: false,
                    vacant: false,
                    shown_to: BTreeSet::new(),
                });
            }
        }
        self.note_vacant(room, address);
        self.write(room, address, now);
        self.deliver_leave(room, address);
    }

    /// With the last session of a nick, the others do not see it any more.
    fn note_vacant(&mut self, room: &str, address: &str) {
        let Some(guests) = self.rooms.get_mut(room) else { return };
        let Some(nick) = guests.get(address).map(|guest| guest.nick.clone()) else {
            return;
        };
        let mut sessions: Vec<&mut Guest> = guests.values_mut().filter(|guest| guest.nick == nick).collect();
        if sessions.iter().all(|guest| guest.out.is_some()) {
            let outs = sessions.iter_mut().filter_map(|guest| guest.out.as_mut());
            outs.for_each(|out| (out.vacant, out.shown_to) = (true, BTreeSet::new()));
        }
    }

    fn deliver_leave(&mut self, room: &str, address: &str) {
        let Some(guest) = self.rooms.get(room).and_then(|guests| guests.get(address)) else {
            return;
        };
        let template = format!(
            "<presence from='{}' type='unavailable'><status>{}</status></presence>",
            escape_attribute(address),
            escape_text(AWAY)
        );
        let to = format!("{room}/{}", guest.nick);
        let leave = cast_to(template.into(), "<presence".len() as u32, std::iter::once(&to));
        self.outputs.push_back(Output::Deliver(leave));
    }

    /// All that was said beyond the link is here.
    pub(super) fn return_all(&mut self, now: Now) -> bool {
        let mut due = Vec::new();
        for (room, guests) in &self.rooms {
            let out = guests
                .iter()
                .filter(|(_, guest)| matches!(guest.place(), Place::Leaving { .. } | Place::Gone));
            due.extend(out.map(|(address, _)| (room.clone(), address.clone())));
        }
        for (room, address) in &due {
            self.send_back(room, address, now);
        }
        !due.is_empty()
    }

    /// A guest that is out says something for which it has to be in: says whether it comes back first.
    pub(super) fn wake(&mut self, stanza: &Stanza, now: Now) -> bool {
        let (Some(from), Some(to)) = (stanza.from(), stanza.to()) else {
            return false;
        };
        let needs_it = match (stanza.kind(), stanza.stanza_type().as_deref()) {
            (_, Some("error" | "result" | "unavailable")) => false,
            (Kind::Presence | Kind::Message | Kind::Iq, _) => true,
        };
        let room = bare(&to);
        let is_out = matches!(self.place(room, &from), Some(Place::Leaving { .. } | Place::Gone));
        if needs_it && is_out {
            self.send_back(room, &from, now);
        }
        needs_it && is_out
    }

    fn send_back(&mut self, room: &str, address: &str, now: Now) {
        let Some(guest) = self.guest_mut(room, address) else {
            return;
        };
        let confirmed = guest.place() == Place::Gone;
        if let Some(out) = &mut guest.out {
            out.stage = Out::returning(confirmed);
            out.tries = 0;
        }
        let Some(join) = rejoin(room, guest).and_then(|join| join.split_to()) else {
            return;
        };
        let (template, to_at, attribute) = join;
        self.outputs.push_back(Output::Deliver(Cast {
            template,
            to_at: to_at as u32,
            recipients: vec![attribute],
        }));
        self.await_room(room, address, now);
    }

    /// A room that has not answered is asked again: its server may have lost the question.
    pub(super) fn ask_again(&mut self, room: &str, address: &str, now: Now) {
        match self.place(room, address) {
            Some(Place::Returning { .. }) => {
                let Some(guest) = self.guest_mut(room, address) else {
                    return;
                };
                if let Some(out) = &mut guest.out {
                    out.stage = Out::returning(true);
                    out.tries += 1;
                    out.in_doubt = true;
                }
                if let Some(join) = rejoin(room, guest) {
                    self.outputs.push_back(Output::Ask(join));
                }
                self.await_room(room, address, now);
            }
            Some(Place::Parting) => self.depart(room, address, &[], now),
            Some(Place::Here | Place::Leaving { .. } | Place::Gone) | None => {}
        }
    }

    fn await_room(&mut self, room: &str, address: &str, now: Now) {
        let Some(guest) = self.guest_mut(room, address) else {
            return;
        };
        let tries = guest.out.as_ref().map_or(0, |out| out.tries);
        guest.verify_at = now.mono + (RETRY_FIRST * (1 << tries.min(5))).min(VERIFY_EVERY);
        let at = guest.verify_at;
        self.wake_by(at);
        self.write(room, address, now);
    }

    /// Its client has left for good.
    pub(super) fn leaves_for_good(&mut self, room: &str, address: &str, now: Now) {
        match self.place(room, address) {
            None | Some(Place::Here) => self.remove(room, address, now),
            Some(Place::Leaving { .. } | Place::Gone) => self.depart(room, address, &[], now),
            // The room says so.
            Some(Place::Returning { .. } | Place::Parting) => {
                if let Some(out) = self.guest_mut(room, address).and_then(|guest| guest.out.as_mut()) {
                    out.stage = Stage::Parting;
                }
                self.await_room(room, address, now);
            }
        }
    }

    /// A guest does not come back: it is told so with these codes, and those who were shown it, that it is gone.
    fn depart(&mut self, room: &str, address: &str, codes: &[u16], now: Now) {
        let Some(guest) = self.rooms.get(room).and_then(|guests| guests.get(address)) else {
            return;
        };
        let nick = guest.nick.clone();
        let shown_as = guest.out.as_ref().map(|out| out.shown_as.clone()).unwrap_or_default();
        let mut guests = self.rooms[room].iter();
        let is_held = guests.any(|(other, guest)| other != address && guest.nick == nick);
        let occupant = format!("{room}/{nick}");
        let (mut told, mut told_again) = (Vec::new(), Vec::new());
        let shown = self.shown.get(room);
        let own = shown.and_then(|shown| shown.version(&nick, address)?.muc());
        let codes: Vec<u16> = std::iter::once(SELF_PRESENCE).chain(codes.iter().copied()).collect();
        told.push((
            address.to_owned(),
            lost_presence(&occupant, &own.unwrap_or_else(MucUser::gone), &codes),
        ));
        if let Some(shown) = shown.filter(|_| !is_held) {
            let versions = shown.occupants.get(&nick).into_iter().flatten();
            for version in versions {
                let viewers = shown.viewers(version).filter(|viewer| *viewer != address);
                // Another may have the nick by now, and was shown since: those beyond the link may have taken that for this one.
                let (muc, is_other) = match shown_as.contains(&form_of(&version.template)) {
                    true => (version.muc().unwrap_or_else(MucUser::gone), false),
                    false => (MucUser::gone(), true),
                };
                for viewer in viewers {
                    told.push((viewer.clone(), lost_presence(&occupant, &muc, &[])));
                    told_again.extend(is_other.then(|| (viewer.clone(), version.template.clone(), version.to_at)));
                }
            }
        }
        for (viewer, (template, to_at)) in told {
            self.cross(&template, to_at, &viewer);
            match told_again.iter().find(|(other, ..)| *other == viewer) {
                Some((_, template, to_at)) => self.cross(template, *to_at, &viewer),
                None => self.note_hidden(room, &nick, &viewer),
            }
        }
        self.remove(room, address, now);
    }

    fn cross(&mut self, template: &Bytes, to_at: u32, to: &str) {
        let copy = Stanza::join(template, to_at as usize, &to_attribute(to));
        if let Ok(stanza) = Stanza::parse(copy) {
            self.outputs.push_back(Output::Cross(stanza));
        }
    }

    /// The peer and we have nothing in common any more: who is out stays out.
    pub(super) fn give_up_absent(&mut self, now: Now) {
        let out: Vec<(String, String)> = self
            .rooms
            .iter()
            .flat_map(|(room, guests)| guests.iter().map(move |(address, guest)| (room, address, guest)))
            .filter(|(_, _, guest)| guest.out.is_some())
            .map(|(room, address, _)| (room.clone(), address.clone()))
            .collect();
        for (room, address) in out {
            self.depart(&room, &address, &[LOST], now);
        }
    }

    /// A presence of a room for a guest: gives it back, if it is to cross.
    pub(super) fn watch(
        &mut self,
        stanza: Stanza,
        node: &Node,
        room: &str,
        nick: Option<&str>,
        to: &str,
        now: Now,
    ) -> Option<Stanza> {
        let Some(guest) = self.rooms.get(room).and_then(|guests| guests.get(to)) else {
            return Some(stanza);
        };
        let (place, own_nick) = (guest.place(), guest.nick.clone());
        if place == Place::Here && !self.is_tracked(room, to) {
            return Some(stanza);
        }
        // ejabberd's rooms show themselves to who comes, and take leave of who goes.
        let Some(nick) = nick else {
            return (place == Place::Here).then_some(stanza);
        };
        let muc = MucUser::of(node);
        match (stanza.stanza_type().as_deref(), muc) {
            (None, Some(muc)) if muc.is_self() => self.let_in(stanza, &muc, room, nick, to, place, now),
            (None, _) => self.sees(stanza, room, nick, to, place, now),
            (Some("unavailable"), muc) => {
                let muc = muc.unwrap_or_default();
                if muc.is_own_leave() {
                    return self.put_out(stanza, node, &muc, room, to, place, now);
                }
                // Another session of the nick may really have left.
                let is_for_now = muc.is_plain_leave() && is_ours(node) && self.is_out(room, nick, to);
                let is_renamed = muc.is_self() && muc.new_nick().is_some() && self.is_in_doubt(room, to);
                if is_for_now || matches!(place, Place::Gone | Place::Parting) && !is_renamed {
                    return None;
                }
                self.note_hidden(room, nick, to);
                Some(stanza)
            }
            (Some("error"), _) if nick == own_nick => match place {
                Place::Returning { entered: false, .. } => {
                    self.not_let_back(node, room, to, now);
                    None
                }
                Place::Parting => {
                    self.depart(room, to, &[], now);
                    None
                }
                Place::Here | Place::Leaving { .. } | Place::Gone | Place::Returning { .. } => Some(stanza),
            },
            (Some(_), _) => Some(stanza),
        }
    }

    /// A room tells a guest of another occupant.
    fn sees(&mut self, stanza: Stanza, room: &str, nick: &str, to: &str, place: Place, now: Now) -> Option<Stanza> {
        if matches!(place, Place::Gone | Place::Parting) {
            return None;
        }
        if let Some(out) = self.guest_mut(room, to).and_then(|guest| guest.out.as_mut())
            && let Stage::Returning {
                confirmed: true, seen, ..
            } = &mut out.stage
        {
            seen.insert(nick.to_owned());
        }
        let guests = self
            .rooms
            .get_mut(room)
            .into_iter()
            .flat_map(|guests| guests.values_mut());
        let mut sessions: Vec<&mut Guest> = guests.filter(|guest| guest.nick == nick).collect();
        // What the room says before it has heard that they left tells nothing of who sees them then.
        let returns = |guest: &&mut Guest| matches!(guest.place(), Place::Returning { confirmed: true, .. });
        if sessions.iter().any(returns) {
            let outs = sessions.iter_mut().filter_map(|guest| guest.out.as_mut());
            for out in outs {
                out.shown_to.insert(to.to_owned());
            }
        }
        let is_told_again = matches!(place, Place::Returning { .. }) || self.is_out(room, nick, to);
        if is_told_again && self.was_shown(room, nick, to, &stanza) {
            return None;
        }
        self.note_shown(room, nick, to, &stanza);
        self.note_form(room, nick, &stanza, now);
        Some(stanza)
    }

    /// One that has left is shown to others, for as long as the room does not know.
    fn note_form(&mut self, room: &str, nick: &str, stanza: &Stanza, now: Now) {
        let others = self.rooms.get(room).into_iter().flatten();
        let leaving = others.filter(|(_, guest)| guest.nick == nick && matches!(guest.place(), Place::Leaving { .. }));
        let leaving: Vec<String> = leaving.map(|(address, _)| address.clone()).collect();
        let Some((template, ..)) = stanza.split_to().filter(|_| !leaving.is_empty()) else {
            return;
        };
        let form = form_of(&template);
        for address in leaving {
            if let Some(out) = self.guest_mut(room, &address).and_then(|guest| guest.out.as_mut())
                && out.shown_as.len() < FORMS_MAX
                && !out.shown_as.contains(&form)
            {
                out.shown_as.push(form);
                self.write(room, &address, now);
            }
        }
    }

    /// A room tells a guest that it is in.
    #[expect(clippy::too_many_arguments, reason = "what a room says, and where the guest stands")]
    fn let_in(
        &mut self,
        stanza: Stanza,
        muc: &MucUser,
        room: &str,
        nick: &str,
        to: &str,
        place: Place,
        now: Now,
    ) -> Option<Stanza> {
        match place {
            // It was in before a process was killed, and the room answers what it asked itself.
            Place::Gone if self.is_in_doubt(room, to) => {
                let is_known = self.was_shown(room, nick, to, &stanza);
                self.note_shown(room, nick, to, &stanza);
                return (!is_known).then_some(stanza);
            }
            Place::Gone | Place::Parting => return None,
            Place::Here | Place::Leaving { .. } => {
                self.show_absent(room, to);
                self.note_shown(room, nick, to, &stanza);
                return Some(stanza);
            }
            // Of an earlier wish to enter, or once more.
            Place::Returning { confirmed: false, .. } | Place::Returning { entered: true, .. } => {
                let is_known = self.was_shown(room, nick, to, &stanza);
                self.note_shown(room, nick, to, &stanza);
                return (!is_known).then_some(stanza);
            }
            Place::Returning {
                confirmed: true,
                entered: false,
            } => {}
        }
        if muc.codes.contains(&NEW_ROOM) {
            // The room that it was in is no more, and nobody has asked for another.
            self.dissolve(room, now);
            return None;
        }
        let is_known = self.was_shown(room, nick, to, &stanza);
        let old = self
            .guest_mut(room, to)
            .map(|guest| std::mem::replace(&mut guest.nick, nick.to_owned()));
        if let Some(old) = old.filter(|old| old != nick) {
            self.tell_new_nick(room, &old, nick, to);
        }
        self.note_shown(room, nick, to, &stanza);
        if !is_known {
            self.outputs.push_back(Output::Cross(stanza));
        }
        let mut seen = BTreeSet::from([nick.to_owned()]);
        if let Some(out) = self.guest_mut(room, to).and_then(|guest| guest.out.as_mut())
            && let Stage::Returning {
                seen: others, history, ..
            } = &mut out.stage
        {
            seen.append(others);
            *history = Some(VecDeque::new());
        }
        self.hide_unseen(room, to, &seen);
        self.write(room, to, now);
        None
    }

    /// A guest that is in is told all again, and the room knows nothing of those who are out because of the link.
    fn show_absent(&mut self, room: &str, to: &str) {
        let guest = self.rooms.get(room).and_then(|guests| guests.get(to));
        let Some(shown) = self.shown.get(room).filter(|_| guest.is_some_and(Guest::asks)) else {
            return;
        };
        let absent = shown.occupants.keys().filter(|nick| self.is_out(room, nick, to));
        let versions = absent.filter_map(|nick| shown.version(nick, to));
        let versions: Vec<(Bytes, u32)> = versions
            .map(|version| (version.template.clone(), version.to_at))
            .collect();
        for (template, to_at) in versions {
            self.cross(&template, to_at, to);
        }
    }

    /// Who was shown to a guest and is not there any more is gone.
    fn hide_unseen(&mut self, room: &str, to: &str, seen: &BTreeSet<String>) {
        let Some(shown) = self.shown.get(room) else { return };
        let is_gone = |nick: &&String| !seen.contains(*nick) && !self.is_out(room, nick, to);
        let gone: Vec<(String, MucUser)> = shown
            .occupants
            .keys()
            .filter(is_gone)
            .filter_map(|nick| {
                let version = shown.version(nick, to)?;
                Some((nick.clone(), version.muc().unwrap_or_else(MucUser::gone)))
            })
            .collect();
        for (nick, muc) in gone {
            let (template, to_at) = lost_presence(&format!("{room}/{nick}"), &muc, &[]);
            self.cross(&template, to_at, to);
            self.note_hidden(room, &nick, to);
        }
    }

    /// A guest is in again, and with it all sessions of its nick: the other guests in the room to whom it was not shown again
    /// (`presencebroadcast`) no longer see it.
    fn hide_unshown(&mut self, room: &str, nick: &str, to: &str, shown_to: &BTreeSet<String>) {
        let Some(guests) = self.rooms.get(room) else { return };
        let is_shared = guests
            .iter()
            .any(|(other, guest)| other != to && guest.nick == nick && guest.out.is_some());
        let is_inside = |guest: &Guest| match guest.place() {
            Place::Here => guest.joined,
            Place::Returning { entered, .. } => entered,
            Place::Leaving { .. } | Place::Gone | Place::Parting => false,
        };
        let Some(shown) = self.shown.get(room).filter(|_| !is_shared) else {
            return;
        };
        let versions = shown.occupants.get(nick).into_iter().flatten();
        let viewers = versions.flat_map(|version| shown.viewers(version).map(move |viewer| (viewer, version)));
        let unshown = viewers.filter(|(viewer, _)| {
            let is_other = |guest: &&Guest| guest.nick != nick;
            !shown_to.contains(*viewer) && guests.get(*viewer).filter(is_other).is_some_and(is_inside)
        });
        let unshown: Vec<(String, MucUser)> = unshown
            .map(|(viewer, version)| (viewer.clone(), version.muc().unwrap_or_else(MucUser::gone)))
            .collect();
        for (viewer, muc) in unshown {
            let (template, to_at) = lost_presence(&format!("{room}/{nick}"), &muc, &[]);
            self.cross(&template, to_at, &viewer);
            self.note_hidden(room, nick, &viewer);
        }
    }

    fn tell_new_nick(&mut self, room: &str, old: &str, new: &str, to: &str) {
        let template = format!(
            "<presence from='{}' type='unavailable'><x xmlns='{}'><item affiliation='none' role='participant' nick='{}'/>\
             <status code='{NEW_NICK}'/><status code='{SELF_PRESENCE}'/></x></presence>",
            escape_attribute(&format!("{room}/{old}")),
            ns::MUC_USER,
            escape_attribute(new)
        );
        self.cross(&template.into(), "<presence".len() as u32, to);
        self.note_hidden(room, old, to);
    }

    /// A room tells a guest that it is out.
    #[expect(clippy::too_many_arguments, reason = "what a room says, and where the guest stands")]
    fn put_out(
        &mut self,
        stanza: Stanza,
        node: &Node,
        muc: &MucUser,
        room: &str,
        to: &str,
        place: Place,
        now: Now,
    ) -> Option<Stanza> {
        if !muc.is_plain_leave() {
            return Some(stanza);
        }
        // A stream that broke may have said twice what we had said.
        let is_ours = is_ours(node);
        let stage = match place {
            Place::Leaving { .. } => Stage::Gone,
            Place::Returning { entered: false, .. } => Out::returning(true),
            Place::Returning { entered: true, .. } if is_ours => Out::returning(true),
            Place::Gone => return None,
            Place::Here if is_ours => {
                self.leave_unsaid(room, to, now);
                return None;
            }
            Place::Here | Place::Returning { .. } | Place::Parting => return Some(stanza),
        };
        if let Some(out) = self.guest_mut(room, to).and_then(|guest| guest.out.as_mut()) {
            out.stage = stage;
        }
        self.write(room, to, now);
        None
    }

    /// The room has put a guest out with a leave of ours that it had heard before; the wish to enter that followed may come again, too.
    fn leave_unsaid(&mut self, room: &str, to: &str, now: Now) {
        let (mut heard, subject) = self.tails.heard(room, to);
        heard.drain(..heard.len().saturating_sub(HEARD_MAX));
        if let Some(guest) = self.guest_mut(room, to) {
            guest.out = Some(Out {
                stage: Out::returning(true),
                heard,
                heard_at: now.wall,
                subject,
                shown_as: Vec::new(),
                tries: 0,
                nicks: 0,
                in_doubt: true,
                vacant: false,
                shown_to: BTreeSet::new(),
            });
        }
        self.await_room(room, to, now);
    }

    /// The room has refused to let a guest in again.
    fn not_let_back(&mut self, node: &Node, room: &str, to: &str, now: Now) {
        let error = node.child(ns::SERVER, "error");
        let is = |condition: &str| error.is_some_and(|error| error.child(ns::STANZA_ERRORS, condition).is_some());
        if is("conflict")
            && let Some(guest) = self.guest_mut(room, to)
            && let Some(out) = guest.out.as_mut().filter(|out| out.nicks < NICKS_MAX)
        {
            out.nicks += 1;
            let old = guest.nick.clone();
            let new = format!("{old}_");
            new.clone_into(&mut guest.nick);
            self.tell_new_nick(room, &old, &new, to);
            if let Some(out) = self.guest_mut(room, to).and_then(|guest| guest.out.as_mut()) {
                // It is out, as far as the room is concerned.
                out.stage = Stage::Gone;
            }
            return self.send_back(room, to, now);
        }
        let code = match (is("forbidden"), is("registration-required")) {
            (true, _) => BANNED,
            (false, true) => MEMBERS_ONLY,
            (false, false) => LOST,
        };
        self.depart(room, to, &[code], now);
    }

    /// A room is no more, and with it no guest that was out is in it.
    fn dissolve(&mut self, room: &str, now: Now) {
        let guests = self.rooms.get(room).into_iter().flatten();
        let out: Vec<(String, Place)> = guests
            .filter(|(_, guest)| guest.out.is_some())
            .map(|(address, guest)| (address.clone(), guest.place()))
            .collect();
        for (address, place) in out {
            if matches!(place, Place::Returning { .. }) {
                self.deliver_leave(room, &address);
            }
            self.depart(room, &address, &[LOST], now);
        }
    }

    /// A message of a room for a guest: gives it back, if it is to cross now.
    pub(super) fn hear_word(&mut self, stanza: Stanza, room: &str, to: &str, now: Now) -> Option<Stanza> {
        let Some(guest) = self.rooms.get(room).and_then(|guests| guests.get(to)) else {
            return Some(stanza);
        };
        let (place, expected) = (guest.place(), guest.expected());
        let is_known = place != Place::Here || self.is_tracked(room, to);
        if stanza.stanza_type().as_deref() != Some("groupchat") || !is_known {
            return self.tails.hear(stanza, room, to, expected, now, &mut self.outputs);
        }
        let word = self.tails.read(&stanza, room, now);
        match (place, word) {
            (Place::Here, Word::Line { .. }) if expected == Expected::Nothing => return None,
            (Place::Leaving { behind: false }, Word::Said(mark)) => {
                if let Some(out) = self.guest_mut(room, to).and_then(|guest| guest.out.as_mut()) {
                    out.hear(mark, now);
                }
                self.write(room, to, now);
            }
            (Place::Leaving { behind: false }, Word::Subject(mark)) => {
                if let Some(out) = self.guest_mut(room, to).and_then(|guest| guest.out.as_mut()) {
                    out.subject = Some(mark);
                }
                self.write(room, to, now);
            }
            (
                Place::Returning {
                    confirmed: true,
                    entered: true,
                },
                word,
            ) => match word {
                Word::Line { mark, stamp } => {
                    self.keep_line(Line { stanza, mark, stamp }, room, to);
                    return None;
                }
                Word::Subject(mark) => {
                    self.back(Some((stanza, mark)), room, to, now);
                    return None;
                }
                Word::Said(_) => self.back(None, room, to, now),
                Word::Other => {}
            },
            // It hears them when it is in again.
            (
                Place::Leaving { behind: true } | Place::Gone | Place::Parting | Place::Returning { .. },
                Word::Said(_) | Word::Line { .. } | Word::Subject(_),
            )
            | (Place::Leaving { behind: false }, Word::Line { .. }) => return None,
            (Place::Here, Word::Said(_) | Word::Line { .. } | Word::Subject(_))
            | (
                Place::Here | Place::Leaving { .. } | Place::Gone | Place::Parting | Place::Returning { .. },
                Word::Other,
            ) => {}
        }
        self.tails.hear(stanza, room, to, expected, now, &mut self.outputs)
    }

    fn keep_line(&mut self, line: Line, room: &str, to: &str) {
        if let Some(out) = self.guest_mut(room, to).and_then(|guest| guest.out.as_mut())
            && let Stage::Returning {
                history: Some(history), ..
            } = &mut out.stage
        {
            history.push_back(line);
            if history.len() > LINES_MAX {
                history.pop_front();
            }
        }
    }

    /// A guest has been told all: what it does not know of it crosses.
    fn back(&mut self, subject: Option<(Stanza, u64)>, room: &str, to: &str, now: Now) {
        let Some(guest) = self.guest_mut(room, to) else { return };
        guest.verify_at = now.mono + VERIFY_EVERY;
        let verify_at = guest.verify_at;
        let Some(out) = guest.out.take() else { return };
        let nick = guest.nick.clone();
        let Stage::Returning {
            history: Some(history), ..
        } = &out.stage
        else {
            return;
        };
        if !out.in_doubt && out.vacant {
            self.hide_unshown(room, &nick, to, &out.shown_to);
        }
        let (begin, is_whole) = out.unheard(history);
        if !is_whole {
            let text = "Some of what was said here while the link was down may be missing.";
            let template = format!(
                "<message from='{}' type='groupchat'><body>{text}</body></message>",
                escape_attribute(room)
            );
            self.cross(&template.into(), "<message".len() as u32, to);
        }
        self.returned_lines += (history.len() - begin) as u64;
        for line in history.range(begin..) {
            self.outputs.push_back(Output::Cross(line.stanza.clone()));
        }
        let mark = subject.as_ref().map(|(_, mark)| *mark).or(out.subject);
        self.tails.caught_up(room, to, history, mark, now);
        if let Some((stanza, mark)) = subject
            && out.subject != Some(mark)
        {
            self.outputs.push_back(Output::Cross(stanza));
        }
        self.wake_by(verify_at);
        self.write(room, to, now);
    }
}

/// Whether a room tells what we have said in a guest's name as it left.
fn is_ours(leave: &Node) -> bool {
    let status = leave.child(ns::SERVER, "status");
    status.is_some_and(|status| status.text == AWAY)
}

/// A guest's wish to enter again, as it was there before.
fn rejoin(room: &str, guest: &Guest) -> Option<Stanza> {
    let password = guest
        .password
        .as_ref()
        .map(|password| format!("<password>{}</password>", escape_text(password)));
    let x = format!(
        "<x xmlns='{}'>{}<history maxstanzas='{LINES_MAX}'/></x>",
        ns::MUC,
        password.unwrap_or_default()
    );
    guest
        .presence
        .with_child(&x)?
        .with_to(&format!("{room}/{}", guest.nick))
}

/// The password of a wish to enter.
pub fn password_of(join: &Stanza) -> Option<String> {
    let node = node_of(join);
    let password = node.child(ns::MUC, "x")?.child(ns::MUC, "password")?;
    Some(password.text.clone())
}
