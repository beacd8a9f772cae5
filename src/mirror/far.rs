//! What has crossed: what of it our server gets, and what it teaches us.

use std::{borrow::Cow, time::Duration};

use bytes::Bytes;

use super::{
    Mirror, Output, SplitNear,
    muc::MucUser,
    room::{Echoed, Room},
    words::{address_in, cast, gives_id, narrowed, node_of, stamped, to_attribute},
};
use crate::{
    codec::entry::Cast,
    stanza::{Kind, Stanza, bare, escape_attribute, escape_text, ns, resource_of},
    time::Now,
};

/// A recipient's address, and the attribute it was written in.
type Recipient = (String, Bytes);

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

    fn presence(
        &mut self,
        cast: Cast,
        stanza: &Stanza,
        name: &str,
        nick: &str,
        recipients: &[Recipient],
    ) -> Option<Cast> {
        let room = self.rooms.get_mut(name)?;
        let node = node_of(stanza);
        let muc = MucUser::of(&node);
        // Who is beyond the link is shown when all has come; who enters meanwhile is told at once.
        let withheld = room.split_shown && self.settings.split_near == SplitNear::Leave && !room.is_ours(nick);
        let entering = |room: &Room| {
            let joined = |address: &String| room.sessions.get(address).is_some_and(|session| session.joined);
            recipients
                .iter()
                .filter(|(address, _)| !joined(address))
                .map(|(_, attribute)| attribute.clone())
                .collect()
        };
        let to_entering: Vec<Bytes> = if withheld { entering(room) } else { Vec::new() };
        match (stanza.stanza_type().as_deref(), muc) {
            (None, Some(muc)) => {
                room.show(nick, &cast, recipients);
                let mut own_changed = false;
                if muc.is_self() {
                    for (address, _) in recipients {
                        if let Some(session) = room.sessions.get_mut(address)
                            && (!session.joined || session.nick != nick)
                        {
                            session.joined = true;
                            nick.clone_into(&mut session.nick);
                            own_changed = true;
                        }
                    }
                }
                own_changed |= room.settled.remove(nick).is_some();
                if room.is_too_large() {
                    self.drop_room(name);
                    return Some(cast);
                }
                self.write_occupant(name, nick);
                if own_changed {
                    self.write_room(name);
                }
                if withheld && !muc.is_self() {
                    narrowed(cast, to_entering)
                } else {
                    Some(cast)
                }
            }
            (Some("unavailable"), muc) => {
                let muc = muc.unwrap_or_default();
                room.hide(nick, recipients);
                let mut changed = vec![nick.to_owned()];
                if muc.is_self() && !muc.is_nick_change() && muc.is_leave() {
                    for (address, _) in recipients {
                        changed.extend(room.remove_session(address));
                    }
                }
                // What was settled here is not said again.
                let settled = room.settled.get_mut(nick).map(|told| {
                    let (again, news): (Vec<_>, Vec<_>) =
                        recipients.iter().partition(|(address, _)| told.contains(address));
                    for (address, _) in again {
                        told.remove(address);
                    }
                    (
                        told.is_empty(),
                        news.into_iter()
                            .map(|(_, attribute)| attribute.clone())
                            .collect::<Vec<_>>(),
                    )
                });
                let news = match settled {
                    Some((over, news)) => {
                        if over {
                            room.settled.remove(nick);
                        }
                        Some(news)
                    }
                    None => None,
                };
                let is_self = muc.is_self();
                self.write_changed(name, &changed);
                match news {
                    Some(news) => narrowed(cast, news),
                    None if withheld && !is_self => narrowed(cast, to_entering),
                    None => Some(cast),
                }
            }
            (Some("error"), _) => {
                let mut changed = false;
                for (address, _) in recipients {
                    if room.sessions.get(address).is_some_and(|session| !session.joined) {
                        room.sessions.remove(address);
                        changed = true;
                    }
                }
                if changed {
                    self.write_changed(name, &[]);
                }
                Some(cast)
            }
            _ => Some(cast),
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
                self.is_heard(name, nick, &id);
                let room = self.rooms.get_mut(name)?;
                let found = room.echoes.iter().find(|(_, echo)| echo.nick == nick && echo.id == id);
                let Some((&number, _)) = found else { return Some(cast) };
                let echo = room.echoes.get_mut(&number)?;
                let (seen, news): (Vec<_>, Vec<_>) = recipients
                    .iter()
                    .partition(|(address, _)| echo.shown_to.contains(address));
                if seen.is_empty() {
                    return Some(cast);
                }
                for (address, _) in seen {
                    echo.shown_to.remove(address);
                }
                // The room sends one variant of a message; who is still missing then has left.
                self.drop_echo(name, number);
                self.stats.reflections_swallowed += 1;
                let news: Vec<Bytes> = news.into_iter().map(|(_, attribute)| attribute.clone()).collect();
                narrowed(cast, news)
            }
            (Some("error"), None, Some(id)) => {
                let author = recipients.first().and_then(|(address, _)| room.sessions.get(address));
                let Some(author) = author.map(|session| session.nick.clone()) else {
                    return Some(cast);
                };
                self.is_heard(name, &author, &id);
                let refused = self.rooms[name]
                    .echoes
                    .iter()
                    .find(|(_, echo)| echo.nick == author && echo.id == id);
                if let Some((number, echo)) = refused.map(|(number, echo)| (*number, echo.clone())) {
                    self.drop_echo(name, number);
                    self.stats.echoes_refused += 1;
                    self.tell_refused(name, &author, &echo, recipients);
                }
                Some(cast)
            }
            _ => Some(cast),
        }
    }

    /// Tells those who saw a message that the room has not taken it. Its author has the room's own answer.
    fn tell_refused(&mut self, name: &str, nick: &str, echo: &Echoed, author: &[Recipient]) {
        let text = format!("A message of {nick}, sent while the link was down or slow, was not accepted by the room.");
        let body = escape_text(&text);
        let template = format!(
            "<message from='{}' type='groupchat'><body>{body}</body></message>",
            escape_attribute(name)
        );
        let present = self.rooms[name].sessions.keys();
        let others = present
            .filter(|address| echo.shown_to.contains(*address) && author.iter().all(|(author, _)| author != *address));
        let attributes: Vec<Bytes> = others.map(|address| to_attribute(address)).collect();
        if !attributes.is_empty() {
            let to_at = "<message".len() as u32;
            self.outputs
                .push_back(Output::Deliver(cast(template.into(), to_at, attributes.iter())));
        }
    }
}
