//! Users who enter a far room while the link is gone, as those beside them see it (`split.join: provisional`).
//!
//! Who is in the room here lets them in; the room is asked all the same, when the link is back. It may let them in, which they see
//! like anybody who enters; or not, because the nick was taken meanwhile, for one: then all who saw them here see them go, and they are told that they
//! are out. The room's word is the only truth: nobody is let in near by unless it has said that it is open to all.

use super::{
    Mirror, Output,
    local::{LINK_DOWN, NICK_TAKEN, Refusal},
    muc::{LOST, MucUser, SELF_PRESENCE},
    room::SESSIONS_MAX,
    words::{cast_to, lost_presence},
};
use crate::stanza::{Stanza, escape_attribute, ns};

impl Mirror {
    /// Lets a user in near by. Gives why not.
    pub(super) fn enter_near(&mut self, stanza: &Stanza, name: &str, from: &str, nick: &str) -> Option<Refusal> {
        let is_open = self.near.is_open(name);
        let has_people = |room: &&mut super::Room| {
            is_open && room.sessions.len() < SESSIONS_MAX && room.sessions.values().any(|session| session.joined)
        };
        let Some(room) = self.rooms.get_mut(name).filter(has_people) else {
            return Some(LINK_DOWN);
        };
        if room.occupants.contains_key(nick) || room.sessions.values().any(|session| session.nick == nick) {
            return Some(NICK_TAKEN);
        }
        // Whoever enters a moderated room may have to ask for a voice: what it gave to others who are nobody there, it will give to this one.
        let mut items = room
            .occupants
            .values()
            .flatten()
            .filter_map(|version| version.muc()?.items.first().cloned());
        let role = match items.any(|item| item.affiliation == "none" && item.role == "participant") {
            true => "participant",
            false => "visitor",
        };
        let occupant = format!("{name}/{nick}");
        let plain = stanza
            .without_child(ns::MUC, "x")
            .and_then(|plain| plain.with_from(&occupant));
        let shown = |codes: &str| {
            let x = format!(
                "<x xmlns='{}'><item affiliation='none' role='{role}'/>{codes}</x>",
                ns::MUC_USER
            );
            let (template, to_at, _) = plain.as_ref()?.with_child(&x)?.split_to()?;
            Some((template, to_at as u32))
        };
        let own_code = format!("<status code='{SELF_PRESENCE}'/>");
        let (Some((template, to_at)), Some((own_template, own_to_at))) = (shown(""), shown(&own_code)) else {
            return Some(LINK_DOWN);
        };
        let joined = room.sessions.iter().filter(|(_, session)| session.joined);
        let others: Vec<String> = joined.map(|(address, _)| address.clone()).collect();
        room.add_session(from, nick);
        if let Some(session) = room.sessions.get_mut(from) {
            session.joined = true;
            session.provisional = Some(template.clone());
        }
        let own = [from.to_owned()];
        let to_others = cast_to(template, to_at, others.iter());
        let to_own = cast_to(own_template, own_to_at, own.iter());
        room.show(nick, &to_others, &others);
        room.show(nick, &to_own, &own);
        let room = &*room;
        let here = room
            .occupants
            .iter()
            .filter(|(other, _)| *other != nick && room.is_ours(other));
        let mut told = Vec::new();
        for (other, versions) in here {
            // Its address was shown to others, not to this one.
            let muc = versions
                .first()
                .and_then(super::room::Version::muc)
                .unwrap_or_else(MucUser::gone);
            told.push(cast_to(
                plain_presence(&format!("{name}/{other}"), &muc),
                "<presence".len() as u32,
                own.iter(),
            ));
        }
        let subject = format!(
            "<message from='{}' type='groupchat'><subject/></message>",
            escape_attribute(name)
        );
        told.extend([
            to_others,
            to_own,
            cast_to(subject.into(), "<message".len() as u32, own.iter()),
        ]);
        self.outputs.extend(told.into_iter().map(Output::Deliver));
        self.write_room(name);
        self.write_occupant(name, nick);
        None
    }

    /// The room has not let a user in whom those beside it have: they see it go, and it is told that it is out.
    pub(super) fn refused_after_all(&mut self, name: &str, from: &str) {
        self.withdraw(name, from, &[LOST]);
        self.go_again(name, from, &[SELF_PRESENCE, LOST]);
    }

    /// It leaves before the room has heard of it: both are still to come there, and are told then.
    pub(super) fn leave_again(&mut self, name: &str, from: &str) {
        self.withdraw(name, from, &[]);
        self.go_again(name, from, &[SELF_PRESENCE]);
    }

    /// Those who saw a provisional occupant see it go: not those who have seen another under its nick since.
    pub(super) fn withdraw(&mut self, name: &str, from: &str, codes: &[u16]) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        let Some(session) = room.sessions.get(from).cloned() else {
            return;
        };
        let Some(template) = &session.provisional else { return };
        let versions = room.occupants.get(&session.nick).into_iter().flatten();
        let seen = versions.filter(|version| version.template == *template);
        let viewers: Vec<String> = seen.flat_map(|version| room.viewers(version)).cloned().collect();
        if !viewers.is_empty() {
            let (template, to_at) = lost_presence(&format!("{name}/{}", session.nick), &MucUser::gone(), codes);
            let shown = cast_to(template, to_at, viewers.iter());
            self.outputs.push_back(Output::Deliver(shown));
        }
        room.hide(&session.nick, &viewers);
        self.write_occupant(name, &session.nick);
    }

    fn go_again(&mut self, name: &str, from: &str, codes: &[u16]) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        let Some(nick) = room.sessions.get(from).map(|session| session.nick.clone()) else {
            return;
        };
        let (template, to_at) = lost_presence(&format!("{name}/{nick}"), &MucUser::gone(), codes);
        let own = [from.to_owned()];
        self.outputs
            .push_back(Output::Deliver(cast_to(template, to_at, own.iter())));
        let changed = room.remove_session(from);
        self.write_changed(name, &changed);
    }
}

/// Of whom no more may be known to who is told.
fn plain_presence(occupant: &str, muc: &MucUser) -> bytes::Bytes {
    let item = muc.items.first().cloned().unwrap_or_default();
    format!(
        "<presence from='{}'><x xmlns='{}'><item affiliation='{}' role='{}'/></x></presence>",
        escape_attribute(occupant),
        ns::MUC_USER,
        escape_attribute(&item.affiliation),
        escape_attribute(&item.role)
    )
    .into()
}
