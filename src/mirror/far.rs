//! What has crossed: what of it our server gets, and what it teaches us.

use std::{borrow::Cow, collections::BTreeSet, time::Duration};

use super::{
    Mirror, Output, SplitNear,
    muc::MucUser,
    room::{Echo, EchoState, Room, Session},
    words::{address_in, cast_to, gives_id, node_of, stamped, without},
};
use crate::{
    codec::entry::Cast,
    stanza::{Kind, Stanza, bare, domain_of, escape_attribute, escape_text, ns, resource_of},
    time::Now,
};

/// Those of a cast's recipients who are not to have it, or not yet. All others are, also where nothing is known of them.
type Withheld = BTreeSet<String>;

impl Mirror {
    /// A cast that has crossed, after waiting so long: gives what our server is to have of it.
    pub fn handle_far(&mut self, cast: Cast, held: Duration, now: Now) -> Option<Cast> {
        if !self.settings.enabled {
            return Some(cast);
        }
        let Some(stanza) = cast.copy(0).and_then(|copy| Stanza::parse(copy).ok()) else {
            return Some(cast);
        };
        if stanza.kind() == Kind::Message
            && held > self.settings.delay_stamp_after
            && let Some(stamped) = stamped(&stanza, held, now)
        {
            return self.handle_known(
                Cast {
                    template: stamped,
                    ..cast
                },
                &stanza,
                held,
                now,
            );
        }
        self.handle_known(cast, &stanza, held, now)
    }

    fn handle_known(&mut self, cast: Cast, stanza: &Stanza, held: Duration, now: Now) -> Option<Cast> {
        let Some(from) = stanza.from().map(Cow::into_owned) else {
            return Some(cast);
        };
        // An error may be the word of a sidecar, for a server that is away.
        if !stanza.is_error() {
            self.near.hear(domain_of(&from), now.mono - held);
        }
        let name = bare(&from);
        if stanza.kind() == Kind::Iq {
            self.near.handle_far(stanza, now);
            return self.primary.handle_cast(cast, now);
        }
        if self.rooms.contains_key(name) {
            let recipients: Vec<String> = cast.recipients.iter().filter_map(address_in).collect();
            let withheld = match (stanza.kind(), resource_of(&from)) {
                (Kind::Presence, Some(nick)) => self.presence(&cast, stanza, name, nick, &recipients),
                (Kind::Message, nick) => self.message(stanza, name, nick, &recipients),
                (Kind::Presence | Kind::Iq, _) => Withheld::new(),
            };
            return without(cast, &withheld);
        }
        self.primary.handle_cast(cast, now)
    }

    /// What the room says of an occupant.
    fn presence(&mut self, cast: &Cast, stanza: &Stanza, name: &str, nick: &str, addresses: &[String]) -> Withheld {
        let muc = MucUser::of(&node_of(stanza));
        match (stanza.stanza_type().as_deref(), muc) {
            (None, Some(muc)) => self.available(cast, stanza, &muc, name, nick, addresses),
            (Some("unavailable"), muc) => self.unavailable(&muc.unwrap_or_default(), name, nick, addresses),
            (Some("error"), _) => {
                self.not_let_in(stanza, name, addresses);
                Withheld::new()
            }
            _ => Withheld::new(),
        }
    }

    fn available(
        &mut self,
        cast: &Cast,
        stanza: &Stanza,
        muc: &MucUser,
        name: &str,
        nick: &str,
        addresses: &[String],
    ) -> Withheld {
        let mut withheld = self.withheld(muc, name, nick, addresses);
        for address in addresses.iter().filter(|_| muc.is_self()) {
            let asked = self.rooms.get(name).and_then(|room| room.sessions.get(address));
            // It has another nick there than it had here.
            if asked.is_some_and(|session| session.nick != nick) {
                self.withdraw(name, address, &[]);
            }
        }
        let Some(room) = self.rooms.get_mut(name) else {
            return withheld;
        };
        // Who has left here is gone, whatever the room said before it knew; who has asked to enter again, is there again.
        let returned = room.sessions.values().any(|session| session.nick == nick);
        if let Some(told) = room.settled.get(nick).filter(|_| !returned) {
            withheld.extend(told.iter().cloned());
            let others: Vec<String> = addresses
                .iter()
                .filter(|address| !told.contains(*address))
                .cloned()
                .collect();
            room.show(nick, cast, &others);
            self.write_occupant(name, nick);
            return withheld;
        }
        let mut changed = room.settled.remove(nick).is_some();
        room.show(nick, cast, addresses);
        let mut had = Vec::new();
        for address in addresses.iter().filter(|_| muc.is_self()) {
            let Some(session) = room.sessions.get_mut(address) else {
                continue;
            };
            if !session.joined || session.provisional.is_some() || session.nick != nick {
                session.joined = true;
                session.provisional = None;
                nick.clone_into(&mut session.nick);
                changed = true;
            }
            if let Some(again) = session
                .again
                .take_if(|again| Some(&*again.id) == stanza.id().as_deref())
            {
                changed = true;
                let echoes = room.echoes_had(address, nick, &again);
                had.extend(echoes.into_iter().map(|number| (number, address.clone())));
            }
        }
        if room.is_too_large() {
            self.overflow(name);
            return Withheld::new();
        }
        self.write_occupant(name, nick);
        if changed {
            self.write_room(name);
        }
        for (number, address) in had {
            self.forget_viewer(name, number, &address);
        }
        withheld
    }

    fn unavailable(&mut self, muc: &MucUser, name: &str, nick: &str, addresses: &[String]) -> Withheld {
        let withheld = self.withheld(muc, name, nick, addresses);
        let mut leaves = nick;
        if let Some(new) = muc.new_nick() {
            self.rename(name, nick, new);
            leaves = new;
        }
        let mut changed = vec![nick.to_owned()];
        if let Some(room) = self.rooms.get_mut(name) {
            room.hide(nick, addresses);
            if muc.is_own_leave() {
                // What one that has asked to enter again has heard, the room may yet say to it.
                let asks = |address: &&String| {
                    let session = room.sessions.get(*address);
                    session.is_some_and(|session| session.again.is_some())
                };
                let out: Vec<String> = addresses.iter().filter(|address| !asks(address)).cloned().collect();
                changed.extend(addresses.iter().flat_map(|address| room.put_out(address)));
                self.forget_viewers(name, &out);
            }
        }
        // What was settled here is not said again.
        let Some(room) = self.rooms.get_mut(name) else {
            return withheld;
        };
        let is_leave = leaves == nick;
        let settled = room.settled.get_mut(leaves).map(|told| {
            let known = addresses.iter().filter(|address| match is_leave {
                true => told.remove(*address),
                false => told.contains(*address) && !muc.is_self(),
            });
            known.cloned().collect()
        });
        room.settled.retain(|_, told| !told.is_empty());
        self.write_changed(name, &changed);
        settled.unwrap_or(withheld)
    }

    /// XEP-0045 §7.6: what has not been reflected yet will be under the new nick, for the room took the change before it. So will be the
    /// leave of who has left here.
    fn rename(&mut self, name: &str, nick: &str, new: &str) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        let mut renamed = Vec::new();
        for (&number, echo) in room.echoes.iter_mut().filter(|(_, echo)| echo.nick == nick) {
            new.clone_into(&mut echo.nick);
            renamed.push(number);
        }
        if let Some(told) = room.settled.remove(nick) {
            room.settled.insert(new.to_owned(), told);
        }
        for number in renamed {
            self.write_echo(name, number);
        }
    }

    /// While what waited comes, who is beyond the link is shown to those only who have entered since; to all others when all has come.
    fn withheld(&mut self, muc: &MucUser, name: &str, nick: &str, addresses: &[String]) -> Withheld {
        let hidden = |room: &&mut Room| self.settings.split_near == SplitNear::Leave && room.is_hidden(nick);
        let Some(room) = self.rooms.get_mut(name).filter(hidden) else {
            return Withheld::new();
        };
        if muc.is_self() || muc.is_own_leave() {
            return Withheld::new();
        }
        if room
            .split
            .as_mut()
            .is_some_and(|split| split.hidden.insert(nick.to_owned()))
        {
            self.write_room(name);
        }
        // A room that could not be written has nobody any more to whom it will be shown later.
        let Some(room) = self.rooms.get(name) else {
            return Withheld::new();
        };
        addresses
            .iter()
            .filter(|address| room.was_told(address))
            .cloned()
            .collect()
    }

    /// The room has refused to let them in, or in again.
    fn not_let_in(&mut self, stanza: &Stanza, name: &str, addresses: &[String]) {
        for address in addresses {
            if self.is_provisional(name, address) {
                self.refused_after_all(name, address);
            }
        }
        let Some(room) = self.rooms.get_mut(name) else { return };
        let before = room.sessions.len();
        let id = stanza.id();
        // What was said before another wish to enter may be refused after that.
        let asks = |session: &Session| {
            let again = session.again.as_ref();
            again.is_some_and(|again| Some(&*again.id) != id.as_deref())
        };
        room.sessions
            .retain(|address, session| session.joined || asks(session) || !addresses.contains(address));
        let mut changed = room.sessions.len() != before;
        for address in addresses {
            let Some(session) = room.sessions.get_mut(address) else {
                continue;
            };
            changed |= session
                .again
                .take_if(|again| Some(&*again.id) == id.as_deref())
                .is_some();
        }
        if changed {
            let out = addresses.iter().filter(|address| !room.sessions.contains_key(*address));
            let out: Vec<String> = out.cloned().collect();
            self.forget_viewers(name, &out);
            self.write_changed(name, &[]);
        }
    }

    fn message(&mut self, stanza: &Stanza, name: &str, nick: Option<&str>, addresses: &[String]) -> Withheld {
        match (stanza.stanza_type().as_deref(), nick, stanza.id()) {
            (Some("groupchat"), _, id) => {
                // XEP-0045 §10.2.1: the configuration changed, and with it what the room says of itself.
                if nick.is_none() && node_of(stanza).child(ns::MUC_USER, "x").is_some() {
                    self.near.forget_room(name);
                }
                self.note_ids(stanza, name);
                nick.map_or_else(Withheld::new, |nick| {
                    self.reflected(stanza, name, nick, id.as_deref().unwrap_or_default(), addresses)
                })
            }
            (Some("error"), None, id) => {
                self.not_taken(name, id.as_deref().unwrap_or_default(), addresses);
                Withheld::new()
            }
            _ => Withheld::new(),
        }
    }

    /// Whether the room gives its messages ids (XEP-0359): once it did, an echo would be another message to clients.
    fn note_ids(&mut self, stanza: &Stanza, name: &str) {
        if let Some(room) = self.rooms.get_mut(name)
            && !room.gives_ids
            && gives_id(stanza, name)
        {
            room.gives_ids = true;
            self.write_room(name);
        }
    }

    /// The room has said this to these: gives those who had heard it before.
    fn reflected(&mut self, stanza: &Stanza, name: &str, nick: &str, id: &str, addresses: &[String]) -> Withheld {
        let Some(room) = self.rooms.get_mut(name) else {
            return Withheld::new();
        };
        let Some(number) = room.echo_said(nick, id, stanza) else {
            return Withheld::new();
        };
        let (passed_over, in_between) = (room.passed_over(number), room.in_between(number));
        let seen = room.echo_seen(number, addresses.iter());
        for number in &in_between {
            room.echo_seen(*number, addresses.iter());
        }
        for number in in_between.into_iter().chain([number]) {
            self.write_echo(name, number);
        }
        for number in passed_over {
            self.drop_echo(name, number);
        }
        self.drop_if_over(name);
        self.stats.reflections_swallowed += u64::from(!seen.is_empty());
        seen
    }

    fn drop_echo(&mut self, name: &str, number: u64) {
        if let Some(room) = self.rooms.get_mut(name) {
            room.echoes.remove(&number);
            self.write_echo(name, number);
        }
    }

    /// The room has told one of these that it does not take his message.
    fn not_taken(&mut self, name: &str, id: &str, addresses: &[String]) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        let author = addresses.first().and_then(|address| room.sessions.get(address));
        let number = match author {
            Some(author) => room.echo_of(&author.nick, id),
            // He has left since.
            None => room
                .echoes
                .iter()
                .find(|(_, echo)| echo.id == id)
                .map(|(number, _)| *number),
        };
        let Some(number) = number else { return };
        let echo = room.echoes.remove(&number);
        self.write_echo(name, number);
        if let Some(Echo {
            nick,
            state: EchoState::Shown { to },
            ..
        }) = echo
        {
            self.stats.echoes_refused += 1;
            self.tell_refused(name, &nick, &to, addresses);
        }
        self.drop_if_over(name);
    }

    /// Tells those who saw a message that the room has not taken it. Its author has the room's own answer.
    fn tell_refused(&mut self, name: &str, nick: &str, shown_to: &BTreeSet<String>, author: &[String]) {
        let text = format!("A message of {nick}, sent while the link was down or slow, was not accepted by the room.");
        let body = escape_text(&text);
        let template = format!(
            "<message from='{}' type='groupchat'><body>{body}</body></message>",
            escape_attribute(name)
        );
        let present = self.rooms.get(name).into_iter().flat_map(|room| room.sessions.keys());
        let others = present.filter(|address| shown_to.contains(*address) && !author.contains(address));
        let told = cast_to(template.into(), "<message".len() as u32, others);
        if !told.recipients.is_empty() {
            self.outputs.push_back(Output::Deliver(told));
        }
    }
}
