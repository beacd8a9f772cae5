//! What has crossed: what of it our server gets, and what it teaches us.

use std::{borrow::Cow, collections::BTreeSet, time::Duration};

use bytes::Bytes;

use super::{
    Mirror, Output, SplitNear,
    muc::MucUser,
    room::{Echo, EchoState},
    words::{address_in, cast_to, gives_id, narrowed, node_of, stamped},
};
use crate::{
    codec::entry::Cast,
    stanza::{Kind, Stanza, bare, escape_attribute, escape_text, ns, resource_of},
    time::Now,
};

/// A recipient's address, and the attribute it was written in.
type Recipient = (String, Bytes);

/// Who of a cast's recipients gets it.
enum Keeps {
    All,
    Only(BTreeSet<String>),
}

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
                now,
            );
        }
        self.handle_known(cast, &stanza, now)
    }

    fn handle_known(&mut self, cast: Cast, stanza: &Stanza, now: Now) -> Option<Cast> {
        let Some(from) = stanza.from().map(Cow::into_owned) else {
            return Some(cast);
        };
        let name = bare(&from);
        if stanza.kind() == Kind::Iq {
            self.near.handle_far(stanza, now);
            return Some(cast);
        }
        if self.rooms.contains_key(name) {
            let recipients: Vec<Recipient> = cast
                .recipients
                .iter()
                .filter_map(|attribute| Some((address_in(attribute)?, attribute.clone())))
                .collect();
            return match (stanza.kind(), resource_of(&from)) {
                (Kind::Presence, Some(nick)) => self.presence(cast, stanza, name, nick, &recipients),
                (Kind::Message, nick) => self.message(cast, stanza, name, nick, &recipients),
                (Kind::Presence | Kind::Iq, _) => Some(cast),
            };
        }
        self.primary.handle_far(stanza, now);
        Some(cast)
    }

    /// What the room says of an occupant.
    fn presence(
        &mut self,
        cast: Cast,
        stanza: &Stanza,
        name: &str,
        nick: &str,
        recipients: &[Recipient],
    ) -> Option<Cast> {
        let addresses: Vec<String> = recipients.iter().map(|(address, _)| address.clone()).collect();
        let muc = MucUser::of(&node_of(stanza));
        let keeps: Keeps = match (stanza.stanza_type().as_deref(), muc) {
            (None, Some(muc)) => self.available(&cast, &muc, name, nick, &addresses)?,
            (Some("unavailable"), muc) => self.unavailable(&muc.unwrap_or_default(), name, nick, &addresses)?,
            (Some("error"), _) => {
                self.not_let_in(name, &addresses);
                Keeps::All
            }
            _ => Keeps::All,
        };
        match keeps {
            Keeps::All => Some(cast),
            Keeps::Only(who) => {
                let kept = recipients.iter().filter(|(address, _)| who.contains(address));
                narrowed(cast, kept.map(|(_, attribute)| attribute.clone()).collect())
            }
        }
    }

    fn available(&mut self, cast: &Cast, muc: &MucUser, name: &str, nick: &str, addresses: &[String]) -> Option<Keeps> {
        let keeps = self.shown_now(muc, name, nick, addresses)?;
        let room = self.rooms.get_mut(name)?;
        // Who has left here is gone, whatever the room said before it knew; who has asked to enter again, is there again.
        let returned = room.sessions.values().any(|session| session.nick == nick);
        if let Some(told) = room.settled.get(nick).filter(|_| !returned) {
            let others = addresses.iter().filter(|address| !told.contains(*address));
            return Some(Keeps::Only(others.cloned().collect()));
        }
        let mut changed = room.settled.remove(nick).is_some();
        room.show(nick, cast, addresses);
        for address in addresses.iter().filter(|_| muc.is_self()) {
            if let Some(session) = room.sessions.get_mut(address)
                && (!session.joined || session.nick != nick)
            {
                session.joined = true;
                nick.clone_into(&mut session.nick);
                changed = true;
            }
        }
        if room.is_too_large() {
            self.drop_room(name);
            return Some(Keeps::All);
        }
        self.write_occupant(name, nick);
        if changed {
            self.write_room(name);
        }
        Some(keeps)
    }

    fn unavailable(&mut self, muc: &MucUser, name: &str, nick: &str, addresses: &[String]) -> Option<Keeps> {
        let keeps = self.shown_now(muc, name, nick, addresses)?;
        let mut leaves = nick;
        if let Some(new) = muc.new_nick() {
            self.rename(name, nick, new);
            leaves = new;
        }
        let room = self.rooms.get_mut(name)?;
        room.hide(nick, addresses);
        let mut changed = vec![nick.to_owned()];
        if muc.is_own_leave() {
            changed.extend(addresses.iter().flat_map(|address| room.remove_session(address)));
            self.forget_viewers(name, addresses);
        }
        // What was settled here is not said again.
        let room = self.rooms.get_mut(name)?;
        let is_leave = leaves == nick;
        let news = room.settled.get_mut(leaves).map(|told| {
            let news = addresses.iter().filter(|address| match is_leave {
                true => !told.remove(*address),
                false => !told.contains(*address) || muc.is_self(),
            });
            Keeps::Only(news.cloned().collect())
        });
        room.settled.retain(|_, told| !told.is_empty());
        self.write_changed(name, &changed);
        Some(news.unwrap_or(keeps))
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
    fn shown_now(&mut self, muc: &MucUser, name: &str, nick: &str, addresses: &[String]) -> Option<Keeps> {
        let room = self.rooms.get_mut(name)?;
        let withheld = self.settings.split_near == SplitNear::Leave && room.is_hidden(nick);
        if !withheld || muc.is_self() {
            return Some(Keeps::All);
        }
        if room
            .split
            .as_mut()
            .is_some_and(|split| split.hidden.insert(nick.to_owned()))
        {
            self.write_room(name);
        }
        let room = self.rooms.get(name)?;
        let now = addresses.iter().filter(|address| !room.was_told(address));
        Some(Keeps::Only(now.cloned().collect()))
    }

    /// The room has refused to let them in.
    fn not_let_in(&mut self, name: &str, addresses: &[String]) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        let before = room.sessions.len();
        room.sessions
            .retain(|address, session| session.joined || !addresses.contains(address));
        if room.sessions.len() != before {
            self.write_changed(name, &[]);
        }
    }

    fn message(
        &mut self,
        cast: Cast,
        stanza: &Stanza,
        name: &str,
        nick: Option<&str>,
        recipients: &[Recipient],
    ) -> Option<Cast> {
        let room = self.rooms.get_mut(name)?;
        match (stanza.stanza_type().as_deref(), nick, stanza.id()) {
            (Some("groupchat"), _, id) => {
                // XEP-0045 §10.2.1: the configuration changed, and with it what the room says of itself.
                if nick.is_none() && node_of(stanza).child(ns::MUC_USER, "x").is_some() {
                    self.near.forget_room(name);
                }
                if !room.gives_ids && gives_id(stanza, name) {
                    room.gives_ids = true;
                    self.write_room(name);
                }
                let (Some(nick), Some(id)) = (nick, id) else {
                    return Some(cast);
                };
                let room = self.rooms.get_mut(name)?;
                let (number, seen) = match room.echo_of(nick, &id) {
                    Some(number) => (
                        number,
                        room.echo_seen(number, recipients.iter().map(|(address, _)| address)),
                    ),
                    None => return Some(cast),
                };
                self.write_echo(name, number);
                self.drop_if_over(name);
                if seen.is_empty() {
                    return Some(cast);
                }
                self.stats.reflections_swallowed += 1;
                let news = recipients.iter().filter(|(address, _)| !seen.contains(address));
                narrowed(cast, news.map(|(_, attribute)| attribute.clone()).collect())
            }
            (Some("error"), None, Some(id)) => {
                let author = recipients.first().and_then(|(address, _)| room.sessions.get(address));
                let number = match author {
                    Some(author) => room.echo_of(&author.nick, &id),
                    // He has left since.
                    None => room
                        .echoes
                        .iter()
                        .find(|(_, echo)| echo.id == id)
                        .map(|(number, _)| *number),
                };
                if let Some(number) = number {
                    let echo = room.echoes.remove(&number);
                    self.write_echo(name, number);
                    if let Some(Echo {
                        nick,
                        state: EchoState::Shown { to },
                        ..
                    }) = echo
                    {
                        self.stats.echoes_refused += 1;
                        self.tell_refused(name, &nick, &to, recipients);
                    }
                    self.drop_if_over(name);
                }
                Some(cast)
            }
            _ => Some(cast),
        }
    }

    /// Tells those who saw a message that the room has not taken it. Its author has the room's own answer.
    fn tell_refused(&mut self, name: &str, nick: &str, shown_to: &BTreeSet<String>, author: &[Recipient]) {
        let text = format!("A message of {nick}, sent while the link was down or slow, was not accepted by the room.");
        let body = escape_text(&text);
        let template = format!(
            "<message from='{}' type='groupchat'><body>{body}</body></message>",
            escape_attribute(name)
        );
        let present = self.rooms[name].sessions.keys();
        let others = present
            .filter(|address| shown_to.contains(*address) && author.iter().all(|(author, _)| author != *address));
        let told = cast_to(template.into(), "<message".len() as u32, others);
        if !told.recipients.is_empty() {
            self.outputs.push_back(Output::Deliver(told));
        }
    }
}
