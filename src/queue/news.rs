//! Whether a presence of a room is news of who is there, or only another status of somebody who is.
//!
//! Both look the same. So it is remembered, for each far session, how each occupant was last shown to it (XEP-0045 §14.1: what stands in `x`).
//! A presence that shows the same again is a change of status, and of those only the newest counts. Where it is not known, after a start
//! above all, it is taken for a newcomer: then nothing is lost but a few bytes.

use std::collections::BTreeMap;

use super::{class::Class, place::hash};
use crate::stanza::{Kind, Stanza, bare, ns};

/// Occupants that are remembered, over all sessions: some megabytes. Beyond it all are forgotten, and learned again.
const SHOWN_MAX: usize = 100_000;

#[derive(Debug, Default)]
pub struct News {
    /// By room and session, then by occupant.
    shown: BTreeMap<u64, BTreeMap<u64, u64>>,
    total: usize,
}

impl News {
    /// Notes a stanza that is about to be taken in, and gives its class.
    pub fn class_of(&mut self, stanza: &Stanza) -> Class {
        let class = Class::of(stanza);
        if stanza.kind() != Kind::Presence || !stanza.has_muc_user() {
            return class;
        }
        let (Some(from), Some(to)) = (stanza.from(), stanza.to()) else {
            return class;
        };
        let (view, occupant) = (hash((bare(&from), &*to)), hash(&*from));
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
                class
            }
            Some(_) => class,
        }
    }

    /// A far session enters a room: whatever it was shown before, it is told all again.
    pub fn handle_join(&mut self, stanza: &Stanza) {
        if let (Some(session), Some(room)) = (stanza.from(), stanza.to()) {
            self.forget(hash((bare(&room), &*session)));
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
        let mut class = |to, stanza_type, item, status| news.class_of(&presence(to, stanza_type, item, status));
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
        assert_eq!(news.class_of(&presence(to, "", "<item/>", "b")), Class::Message);
        assert_eq!(news.class_of(&presence(to, "", "<item/>", "c")), Class::Presence);
    }
}
