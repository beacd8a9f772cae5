//! What our server sends to the peer: what of it crosses, and what is dealt with here.

use std::{borrow::Cow, collections::BTreeSet};

use bytes::Bytes;

use super::{
    Link, Mirror, Output, ROOMS_MAX,
    muc::SELF_PRESENCE,
    near,
    room::{self, ECHOES_MAX, EchoState, Room, Version},
    settings::{Echo, SplitJoin},
    words::{body_mark, cast_to, has_body, lost_presence, node_of, occupant_id},
};
use crate::{
    codec::{entry::Cast, xml::Node},
    stanza::{Condition, Domain, ErrorType, Kind, Stanza, bare, domain_of, ns, resource_of},
    time::Now,
};

/// Why something is not done now, as its sender is told.
pub(super) type Refusal = (ErrorType, Condition, &'static str);

pub(super) const LINK_DOWN: Refusal = (
    ErrorType::Wait,
    Condition::RemoteServerTimeout,
    "The link to this room is down.",
);
pub(super) const NICK_TAKEN: Refusal = (ErrorType::Cancel, Condition::Conflict, "The nick is taken.");
/// XEP-0199 §4.1 has any error for an answer; this one tells that it is the network.
const SERVICE_AWAY: Refusal = (
    ErrorType::Wait,
    Condition::RemoteServerTimeout,
    "The link to this service is down.",
);
const NICK_STAYS: Refusal = (
    ErrorType::Wait,
    Condition::NotAcceptable,
    "The link to this room is down: nicks cannot be changed.",
);
/// XEP-0045 §7.5: as the room would answer.
const VISITOR: Refusal = (
    ErrorType::Auth,
    Condition::Forbidden,
    "Visitors may not speak in this room.",
);

/// What becomes of a question.
enum Asked {
    Crosses,
    Answered(Stanza),
    /// Who is asked cannot be asked now.
    Refused(Refusal),
}

/// What becomes of something said to a room or in it.
enum Fate {
    Crosses,
    /// In this form, which the room's answer will tell us again.
    CrossesAs(Stanza),
    /// Whom it is for has it, or who said it has an answer.
    Settled,
}

impl Mirror {
    /// A stanza of our server for the peer: gives what is to cross, if anything is.
    pub fn handle_local(&mut self, stanza: Stanza, now: Now) -> Option<Stanza> {
        if !self.settings.enabled {
            return Some(stanza);
        }
        let (Some(from), Some(to)) = (stanza.from(), stanza.to()) else {
            return Some(stanza);
        };
        let (from, to) = (from.into_owned(), to.into_owned());
        let name = bare(&to);
        match stanza.kind() {
            Kind::Presence if resource_of(&to).is_some() => match stanza.stanza_type().as_deref() {
                None if resource_of(&from).is_some() => {
                    if let Some(refusal) = self.enter_or_change(&stanza, &from, &to) {
                        self.refuse(&stanza, refusal);
                        return None;
                    }
                }
                Some("unavailable") if self.is_provisional(name, &from) => self.leave_again(name, &from),
                Some("unavailable") if self.is_detached() && self.is_session(name, &from) => {
                    self.leave_near(name, &from);
                }
                _ => {}
            },
            Kind::Message if self.is_session(name, &from) => {
                return match self.speak(&stanza, &from, &to) {
                    Fate::Crosses => Some(stanza),
                    Fate::CrossesAs(stanza) => Some(stanza),
                    Fate::Settled => None,
                };
            }
            Kind::Iq => match self.ask(&stanza, &from, &to, now) {
                Asked::Crosses => {}
                Asked::Answered(answer) => {
                    self.deliver_stanza(&answer);
                    return None;
                }
                Asked::Refused(refusal) => {
                    self.refuse(&stanza, refusal);
                    return None;
                }
            },
            Kind::Presence | Kind::Message => {}
        }
        let bytes = stanza.bytes().len() as u64;
        let crosses = self.primary.handle_local(stanza, &from, &to, now);
        if crosses.is_none() {
            self.stats.caused_bytes += bytes;
        }
        crosses
    }

    fn is_session(&self, room: &str, session: &str) -> bool {
        self.rooms
            .get(room)
            .is_some_and(|room| room.sessions.contains_key(session))
    }

    pub(super) fn is_provisional(&self, room: &str, session: &str) -> bool {
        let session = self.rooms.get(room).and_then(|room| room.sessions.get(session));
        session.is_some_and(|session| session.provisional.is_some())
    }

    /// An available presence for an occupant's address: why it is refused near by, if it is.
    fn enter_or_change(&mut self, stanza: &Stanza, from: &str, to: &str) -> Option<Refusal> {
        let (name, nick) = (bare(to), resource_of(to)?);
        let known = self.rooms.get(name).and_then(|room| room.sessions.get(from));
        match known {
            None if !stanza.is_join() => None,
            None if self.is_detached() => match self.settings.split_join {
                SplitJoin::Refuse => Some(LINK_DOWN),
                SplitJoin::Provisional => self.enter_near(stanza, name, from, nick),
            },
            None => {
                let domain = Domain::new(domain_of(name)).ok();
                if domain.is_some_and(|domain| self.far.contains(&domain)) {
                    if self.rooms.contains_key(name) || self.rooms.len() < ROOMS_MAX {
                        self.rooms.entry(name.to_owned()).or_default().add_session(from, nick);
                        self.write_room(name);
                    } else {
                        self.stats.overflows += 1;
                    }
                }
                None
            }
            Some(session) if session.joined && session.nick != nick && self.is_detached() => Some(NICK_STAYS),
            Some(session) if session.joined && stanza.is_join() => {
                self.note_again(stanza, name, from);
                None
            }
            Some(_) => None,
        }
    }

    /// One who is in asks to enter, to be told everything again. Without an id the answer could not be known.
    fn note_again(&mut self, stanza: &Stanza, name: &str, from: &str) {
        let Some(id) = stanza.id().map(Cow::into_owned) else {
            return;
        };
        let after = self.echo_last;
        if let Some(session) = self.rooms.get_mut(name).and_then(|room| room.sessions.get_mut(from)) {
            session.again = Some(room::Again { id, after });
            self.write_room(name);
        }
    }

    /// A session leaves while nobody beyond the link can be told: those beside it are told at once, the room when the link is back.
    fn leave_near(&mut self, name: &str, from: &str) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        let Some(session) = room.sessions.get(from).cloned() else {
            return;
        };
        let others = room
            .sessions_of(&session.nick)
            .filter(|address| *address != from)
            .count();
        // Whom the room has not let in yet nobody has seen: who has that nick may be another.
        let shown = room.occupants.get(&session.nick).filter(|_| session.joined);
        let versions = shown.cloned().unwrap_or_default();
        let occupant = format!("{name}/{}", session.nick);
        // Who has not heard of the room that it is in, hears both from it.
        let mut told = BTreeSet::new();
        for version in &versions {
            let Some(muc) = version.muc() else { continue };
            let (own, rest): (Vec<_>, Vec<_>) = room.viewers(version).partition(|address| *address == from);
            // While another session holds the nick, the occupant stays.
            let rest = rest.into_iter().filter(|_| others == 0).collect();
            for (codes, viewers) in [(&[SELF_PRESENCE][..], own), (&[], rest)] {
                if !viewers.is_empty() {
                    let (template, to_at) = lost_presence(&occupant, &muc, codes);
                    told.extend(viewers.iter().map(|address| (*address).clone()));
                    let shown = cast_to(template, to_at, viewers.into_iter());
                    self.outputs.push_back(Output::Deliver(shown));
                }
            }
        }
        if others == 0 && session.joined {
            room.occupants.remove(&session.nick);
        }
        if !told.is_empty() {
            room.settled.entry(session.nick.clone()).or_default().extend(told);
        }
        let mut changed = room.remove_session(from);
        changed.push(session.nick);
        self.write_changed(name, &changed);
    }

    /// A message of a session of ours to its room or to somebody in it.
    fn speak(&mut self, stanza: &Stanza, from: &str, to: &str) -> Fate {
        let name = bare(to);
        let Some(room) = self.rooms.get(name) else {
            return Fate::Crosses;
        };
        let Some(session) = room.sessions.get(from).filter(|session| session.joined) else {
            return Fate::Crosses;
        };
        let node = node_of(stanza);
        if !has_body(&node) {
            return Fate::Crosses;
        }
        let nick = session.nick.clone();
        match (stanza.stanza_type().as_deref(), resource_of(to)) {
            (Some("groupchat"), None) => self.speak_to_all(stanza, &node, name, from, &nick),
            (None | Some("chat" | "normal"), Some(other)) if self.is_detached() => {
                match whisper(room, stanza, &node, name, &nick, other) {
                    Some(told) => {
                        self.outputs.push_back(Output::Deliver(told));
                        Fate::Settled
                    }
                    None => Fate::Crosses,
                }
            }
            _ => Fate::Crosses,
        }
    }

    fn speak_to_all(&mut self, stanza: &Stanza, node: &Node, name: &str, from: &str, nick: &str) -> Fate {
        let Some(room) = self.rooms.get(name) else {
            return Fate::Crosses;
        };
        let own = room.version(nick, from);
        let role = own
            .and_then(Version::muc)
            .map(|muc| muc.role().to_owned())
            .unwrap_or_default();
        let split = self.is_detached();
        let policy = self.settings.echo_of(name);
        let at_once = match policy {
            Echo::Reflect => false,
            Echo::Local => true,
            Echo::Auto => match self.link {
                Link::Live | Link::Resyncing => self.rtt.is_some_and(|rtt| rtt > self.settings.echo_rtt_max),
                Link::Waiting { .. } | Link::Detached { .. } => true,
            },
        };
        if at_once && split && role == "visitor" {
            self.refuse(stanza, VISITOR);
            return Fate::Settled;
        }
        let plain = node.child(ns::SERVER, "subject").is_none();
        let may_speak = role == "participant" || role == "moderator";
        if policy == Echo::Reflect {
            return Fate::Crosses;
        }
        if !(plain && may_speak) {
            // Not to be shown, but what is said after it waits for it.
            if room.echoes.len() < ECHOES_MAX {
                self.echo_last += 1;
                let id = stanza.id().map(Cow::into_owned).unwrap_or_default();
                let echo = room::Echo::new(nick, id, body_mark(node), EchoState::NotShown);
                self.put_echo(name, self.echo_last, echo);
            }
            return Fate::Crosses;
        }
        // Ids that the room gives cannot be known here; during a split there is no other way.
        let at_once = at_once && (split || !room.gives_ids);
        let given = match stanza.id() {
            Some(_) => None,
            None if at_once => stanza.with_id(&format!("narrows-{:x}-{:x}", self.epoch.0, self.echo_last + 1)),
            None => None,
        };
        let crossing = given.as_ref().unwrap_or(stanza);
        // As it is, as long as it may be heard from the room: without an id it is known again by its words.
        let id = crossing.id().map(Cow::into_owned).unwrap_or_default();
        if room.echoes.len() < ECHOES_MAX
            && let Some((template, to_at)) = shown(crossing, &format!("{name}/{nick}"), own)
        {
            self.echo_last += 1;
            let echo = room::Echo::new(nick, id, body_mark(node), EchoState::Unheard { template, to_at });
            self.put_echo(name, self.echo_last, echo);
        }
        if at_once {
            // With all that was said before it, so that it is heard in order.
            self.show_unheard(name);
        }
        given.map_or(Fate::Crosses, Fate::CrossesAs)
    }

    fn put_echo(&mut self, name: &str, number: u64, echo: room::Echo) {
        if let Some(room) = self.rooms.get_mut(name) {
            room.echoes.insert(number, echo);
            self.write_echo(name, number);
        }
    }

    /// The room is not heard for a while: what it was to reflect is shown now.
    pub(super) fn show_unheard(&mut self, name: &str) {
        let Some(room) = self
            .rooms
            .get(name)
            .filter(|room| self.is_detached() || !room.gives_ids)
        else {
            return;
        };
        let joined = room.sessions.iter().filter(|(_, session)| session.joined);
        let joined: BTreeSet<String> = joined.map(|(address, _)| address.clone()).collect();
        let unheard = room.echoes.iter().filter_map(|(number, echo)| match &echo.state {
            EchoState::Unheard { template, to_at } => {
                // Who has entered since something else of this author was shown hears both from the room.
                let left = joined.iter().filter(|address| room.is_left_to(echo, address));
                let left: BTreeSet<String> = left.cloned().collect();
                let to = &left - &room.waiting_for(&echo.nick, *number, &joined);
                let shown = cast_to(template.clone(), *to_at, to.iter());
                Some((*number, echo.clone(), to, shown))
            }
            EchoState::NotShown | EchoState::Shown { .. } => None,
        });
        for (number, echo, to, shown) in unheard.collect::<Vec<_>>() {
            if to.is_empty() {
                continue;
            }
            let state = EchoState::Shown { to };
            self.put_echo(
                name,
                number,
                room::Echo {
                    state,
                    left: None,
                    ..echo
                },
            );
            // What is not written down would be heard again from the room.
            if !self.rooms.contains_key(name) {
                return;
            }
            self.outputs.push_back(Output::Deliver(shown));
            self.stats.echoes += 1;
        }
    }

    /// A question of our server or one of its users.
    fn ask(&mut self, stanza: &Stanza, from: &str, to: &str, now: Now) -> Asked {
        let asks = matches!(stanza.stanza_type().as_deref(), Some("get" | "set"));
        if !asks {
            return Asked::Crosses;
        }
        let name = bare(to);
        let session = self.rooms.get(name).and_then(|room| room.sessions.get(from));
        let node = node_of(stanza);
        let commands = [ns::MUC_ADMIN, ns::MUC_OWNER]
            .iter()
            .any(|namespace| node.child(namespace, "query").is_some());
        if commands && self.is_detached() && stanza.stanza_type().as_deref() == Some("set") {
            return Asked::Refused(LINK_DOWN);
        }
        let is_get = stanza.stanza_type().as_deref() == Some("get");
        if is_get && node.child(ns::PING, "ping").is_some() {
            // XEP-0199 §4.3: whether a server is there.
            if !to.contains(['@', '/']) {
                return match self.link {
                    Link::Live if self.near.is_there(to, now) => self.pong(stanza),
                    Link::Detached { .. } => Asked::Refused(SERVICE_AWAY),
                    Link::Live | Link::Resyncing | Link::Waiting { .. } => Asked::Crosses,
                };
            }
            let own = session.is_some_and(|session| {
                session.joined && session.provisional.is_none() && resource_of(to) == Some(&session.nick)
            });
            let own = own || self.is_detached() && self.is_provisional(name, from);
            return match (own, self.link) {
                // XEP-0410 §3.2: what comes back is the room's own answer to an occupant.
                (true, Link::Live) => self.pong(stanza),
                // Undecided: a client that hears anything else may enter again.
                (true, Link::Detached { .. }) => Asked::Refused(LINK_DOWN),
                (true, Link::Resyncing | Link::Waiting { .. }) | (false, _) => Asked::Crosses,
            };
        }
        if is_get
            && self.link == Link::Live
            && let Some(answer) = self.near.ask(stanza, &node, from, to, session.is_some(), now)
        {
            self.stats.discos_answered += 1;
            return Asked::Answered(answer);
        }
        Asked::Crosses
    }

    fn pong(&mut self, ping: &Stanza) -> Asked {
        self.stats.pings_answered += 1;
        near::result(ping, "").map_or(Asked::Crosses, Asked::Answered)
    }
}

/// A message as the room would show it, without the ids that it gives: a template, and where `to` goes.
fn shown(stanza: &Stanza, occupant: &str, own: Option<&Version>) -> Option<(Bytes, u32)> {
    let mut shown = stanza.with_from(occupant)?;
    let own = own.and_then(Version::stanza);
    if let Some(occupant_id) = own.and_then(|own| occupant_id(&node_of(&own))) {
        shown = shown.with_child(&occupant_id)?;
    }
    let (template, to_at, _) = shown.split_to()?;
    Some((template, to_at as u32))
}

/// A private message between two of our users while the room is out of reach: it does not need the room, and never reaches it. `None`
/// if it cannot be given to anybody here.
fn whisper(room: &Room, stanza: &Stanza, node: &Node, name: &str, nick: &str, other: &str) -> Option<Cast> {
    let mut shown = stanza.with_from(&format!("{name}/{nick}"))?;
    if node.child(ns::MUC_USER, "x").is_none() {
        shown = shown.with_child(&format!("<x xmlns='{}'/>", ns::MUC_USER))?;
    }
    let (template, to_at, _) = shown.split_to()?;
    let told = cast_to(template, to_at as u32, room.sessions_of(other));
    (!told.recipients.is_empty()).then_some(told)
}
