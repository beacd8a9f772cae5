//! Whether a presence of a room is news of who is there, or only another status of somebody who is.
//!
//! Both look the same. So it is remembered, for each far session, how each occupant was last shown to it (XEP-0045 §14.1: what stands in `x`).
//! A presence that shows the same again is a change of status, and of those only the newest counts. Where it is not known, after a start
//! above all, it is taken for a newcomer: then nothing is lost but a few bytes.
//!
//! Whether somebody is certainly new to a session is another question, asked before a visit that nobody saw is left out. Then the session
//! must have entered before our eyes, and been told who is there: its view is *whole*. Who came with that list is not new to it, for it may
//! have been inside before. Nor are the far side's own users, nor who has only changed the nick.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    class::Class,
    place::{Coming, hash},
};
use crate::stanza::{Kind, Stanza, bare, ns, resource_of};

/// Occupants that are remembered, over all sessions: some megabytes. Beyond it all are forgotten, and learned again.
const SHOWN_MAX: usize = 100_000;

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum View {
    /// An earlier process may have shown it somebody.
    #[default]
    Unknown,
    /// It has asked to enter, and is being told who is there.
    Entering,
    Whole,
}

#[derive(Debug, Default)]
pub struct News {
    /// By room and session, then by occupant.
    shown: BTreeMap<u64, BTreeMap<u64, u64>>,
    views: BTreeMap<u64, View>,
    /// Occupants that are, or once were, users of the far side.
    own: BTreeSet<u64>,
    total: usize,
}

impl News {
    /// Notes a stanza that is about to be taken in, and gives its class and who comes or goes with it.
    pub fn class_of(&mut self, stanza: &Stanza) -> (Class, Coming) {
        let class = Class::of(stanza);
        if stanza.kind() != Kind::Presence || !stanza.has_muc_user() {
            return (class, Coming::Neither);
        }
        let (Some(from), Some(to)) = (stanza.from(), stanza.to()) else {
            return (class, Coming::Neither);
        };
        let (view, occupant) = (hash((bare(&from), &*to)), hash(&*from));
        let coming = self.coming(stanza, view, occupant);
        let class = self.note(stanza, class, view, occupant);
        if stanza.has_muc_status("110") {
            self.own(occupant);
            let now = match (stanza.is_available(), self.views.get(&view)) {
                (true, Some(View::Entering)) => Some(View::Whole),
                (true, Some(View::Unknown | View::Whole) | None) | (false, _) => None,
            };
            if let Some(now) = now {
                self.views.insert(view, now);
            } else if !stanza.is_available() {
                self.views.remove(&view);
            }
        }
        (class, coming)
    }

    /// As far as this one session is told. Asked before the stanza is noted.
    fn coming(&self, stanza: &Stanza, view: u64, occupant: u64) -> Coming {
        let shown = self.shown.get(&view).is_some_and(|shown| shown.contains_key(&occupant));
        let is_whole = self.views.get(&view) == Some(&View::Whole);
        let other = !self.own.contains(&occupant) && !stanza.has_muc_status("110");
        match stanza.stanza_type().as_deref() {
            None if is_whole && other && !shown => Coming::Enters,
            // With 303 it only takes another nick.
            Some("unavailable") if is_whole && other && !stanza.has_muc_status("303") => Coming::Leaves,
            None | Some(_) => Coming::Neither,
        }
    }

    fn note(&mut self, stanza: &Stanza, class: Class, view: u64, occupant: u64) -> Class {
        match stanza.stanza_type().as_deref() {
            None => {
                let text = stanza.child_text(ns::MUC_USER, "x").unwrap_or_default();
                if self.total >= SHOWN_MAX {
                    *self = Self::default();
                }
                let before = self.shown.entry(view).or_default().insert(occupant, hash(&text));
                self.total += usize::from(before.is_none());
                let same = before == Some(hash(&text)) && !text.contains("<status");
                if same && class == Class::Message {
                    Class::Presence
                } else {
                    class
                }
            }
            // It has left itself.
            Some("unavailable") if stanza.has_muc_status("110") => {
                self.forget(view);
                class
            }
            Some("unavailable") => {
                if let Some(shown) = self.shown.get_mut(&view) {
                    self.total -= usize::from(shown.remove(&occupant).is_some());
                }
                if stanza.has_muc_status("303") {
                    // Under which nick it goes on is not looked at: until the session has left, nobody is certainly new to it.
                    self.views.insert(view, View::Unknown);
                }
                class
            }
            Some(_) => class,
        }
    }

    /// A far session enters a room: whatever it was shown before, it is told all again.
    pub fn handle_join(&mut self, stanza: &Stanza) {
        self.handle_nick(stanza);
        if let (Some(session), Some(room)) = (stanza.from(), stanza.to()) {
            let view = hash((bare(&room), &*session));
            self.forget(view);
            // Who enters twice without having left has seen what is forgotten here.
            let now = match self.views.get(&view) {
                None => View::Entering,
                Some(View::Unknown | View::Entering | View::Whole) => View::Unknown,
            };
            self.count(1);
            self.views.insert(view, now);
        }
    }

    /// A far session wants to be this occupant.
    pub fn handle_nick(&mut self, stanza: &Stanza) {
        // To a bare address it is a contact's.
        if let Some(occupant) = stanza.to().filter(|to| resource_of(to).is_some()) {
            self.own(hash(&*occupant));
        }
    }

    fn own(&mut self, occupant: u64) {
        self.count(usize::from(!self.own.contains(&occupant)));
        self.own.insert(occupant);
    }

    /// Beside those in `shown`, which are forgotten one by one, all is forgotten at once.
    fn count(&mut self, more: usize) {
        if self.total + self.views.len() + self.own.len() + more > SHOWN_MAX {
            *self = Self::default();
        }
    }

    fn forget(&mut self, view: u64) {
        if let Some(shown) = self.shown.remove(&view) {
            self.total -= shown.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn presence(to: &str, stanza_type: &str, item: &str, status: &str) -> Stanza {
        let text = format!(
            "<presence from='room@c.a.example/n' to='{to}'{stanza_type}><status>{status}</status>\
             <x xmlns='http://jabber.org/protocol/muc#user'>{item}</x></presence>"
        );
        Stanza::parse(text.into()).unwrap()
    }

    /// Who is shown for the first time, otherwise than before, or after a leave is news; the same again is a status.
    #[test]
    fn only_the_same_again_is_a_status() {
        let mut news = News::default();
        let mut class = |to, stanza_type, item, status| news.class_of(&presence(to, stanza_type, item, status)).0;
        let (one, two) = ("u@b.example/r", "v@b.example/r");
        let (visitor, member) = ("<item role='visitor'/>", "<item role='participant'/>");
        assert_eq!(class(one, "", visitor, "a"), Class::Message);
        assert_eq!(class(one, "", visitor, "b"), Class::Presence);
        assert_eq!(class(two, "", visitor, "b"), Class::Message);
        assert_eq!(class(one, "", member, "b"), Class::Message);
        assert_eq!(class(one, "", member, "c"), Class::Presence);
        assert_eq!(class(one, " type='unavailable'", member, ""), Class::Message);
        assert_eq!(class(one, "", member, "c"), Class::Message);
        let own = "<item role='participant'/><status code='110'/>";
        assert_eq!(class(one, " type='unavailable'", own, ""), Class::Urgent);
        assert_eq!(class(one, "", member, "d"), Class::Message);
        assert_eq!(class(two, "", visitor, "c"), Class::Presence);
    }

    /// Who enters again, after a leave that nobody has seen, is told all again.
    #[test]
    fn who_enters_again_has_seen_nothing() {
        let mut news = News::default();
        let to = "u@b.example/r";
        news.class_of(&presence(to, "", "<item/>", "a"));
        let join = "<presence from='u@b.example/r' to='room@c.a.example/own'><x xmlns='http://jabber.org/protocol/muc'/></presence>";
        news.handle_join(&Stanza::parse(join.into()).unwrap());
        assert_eq!(news.class_of(&presence(to, "", "<item/>", "b")).0, Class::Message);
        assert_eq!(news.class_of(&presence(to, "", "<item/>", "c")).0, Class::Presence);
    }

    /// Somebody is certainly new to a session that has entered before our eyes, and has not been shown it. Not who came with the list, nor
    /// a user of the far side, nor anybody after a change of nick or a second entrance.
    #[test]
    fn only_a_whole_view_tells_who_is_new() {
        let to = "u@b.example/r";
        let item = "<item role='participant'/>";
        let told = |news: &mut News, nick: &str, stanza_type: &str, x: &str| {
            let text = presence(to, stanza_type, x, "").bytes().to_vec();
            let text = String::from_utf8(text)
                .unwrap()
                .replace("example/n'", &format!("example/{nick}'"));
            news.class_of(&Stanza::parse(text.into()).unwrap()).1
        };
        let (gone, own) = (" type='unavailable'", "<status code='110'/>");
        let join = |nick: &str| {
            let text = format!(
                "<presence from='{to}' to='room@c.a.example/{nick}'><x xmlns='http://jabber.org/protocol/muc'/></presence>"
            );
            Stanza::parse(text.into()).unwrap()
        };
        let mut news = News::default();
        assert_eq!(told(&mut news, "before", "", item), Coming::Neither);
        news.handle_join(&join("u"));
        assert_eq!(told(&mut news, "listed", "", item), Coming::Neither);
        assert_eq!(told(&mut news, "u", "", own), Coming::Neither);
        assert_eq!(told(&mut news, "new", "", item), Coming::Enters);
        assert_eq!(told(&mut news, "new", "", item), Coming::Neither);
        assert_eq!(told(&mut news, "new", gone, item), Coming::Leaves);
        assert_eq!(told(&mut news, "new", "", item), Coming::Enters);
        assert_eq!(told(&mut news, "listed", "", item), Coming::Neither);
        news.handle_nick(&join("another"));
        assert_eq!(told(&mut news, "another", "", item), Coming::Neither);
        assert_eq!(told(&mut news, "another", gone, item), Coming::Neither);
        // A second entrance, and then a leave and an entrance.
        news.handle_join(&join("u"));
        assert_eq!(told(&mut news, "u", "", own), Coming::Neither);
        assert_eq!(told(&mut news, "third", "", item), Coming::Neither);
        assert_eq!(told(&mut news, "u", gone, own), Coming::Neither);
        news.handle_join(&join("u"));
        assert_eq!(told(&mut news, "u", "", own), Coming::Neither);
        assert_eq!(told(&mut news, "fourth", "", item), Coming::Enters);
        assert_eq!(told(&mut news, "fourth", gone, "<status code='303'/>"), Coming::Neither);
        assert_eq!(told(&mut news, "fifth", "", item), Coming::Neither);
    }
}
