//! Where an entry waits: in which class, and behind what.
//!
//! What must not be overtaken is kept in order in two ways. Entries of one [`Track`] cross one after the other. And an entry waits for those of
//! the same full sender on other tracks that came before it and may be for the same recipient. So, per sender and recipient
//! ([RFC 6120 §10.1](https://www.rfc-editor.org/rfc/rfc6120#section-10.1)) and in a room, the order of arrival is the order of crossing,
//! whatever the classes: an answer that follows words of the same sender waits for them, while a page of a room's archive,
//! which the room itself sends to one session, waits beside the talk of its occupants.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use memchr::memmem;

use super::{
    class::{Class, Classes, is_chat_state},
    rules::Placement,
};
use crate::stanza::{Kind, NodeEvent, Stanza, bare, resource_of};

/// One of the ways in which a sender's stanzas go.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Line {
    /// A room to its occupants: talk, private messages, who comes and goes.
    Room,
    /// To one other address, and to its sessions.
    Pair(Arc<str>),
    /// To several addresses, none of which is a room's occupant.
    Many,
    /// Changes of status, which may be overtaken.
    Presence,
    /// Chat states, which may be overtaken.
    State,
}

impl Line {
    pub fn is_volatile(&self) -> bool {
        match self {
            Self::Presence | Self::State => true,
            Self::Room | Self::Pair(_) | Self::Many => false,
        }
    }
}

/// Entries of one track cross in order. Tracks of one class take turns.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Track {
    /// The bare address.
    pub sender: Arc<str>,
    pub line: Line,
}

/// What an entry is to others of the same sender.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Sort {
    Presence,
    State,
    Message,
    Iq,
}

/// Whether an occupant comes to a room or goes, in the eyes of all that are told so.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Coming {
    /// None of them has seen it.
    Enters,
    Leaves,
    /// Anything else, or not known.
    #[default]
    Neither,
}

impl Coming {
    /// Of two that are told the same.
    pub fn and(self, other: Self) -> Self {
        if self == other { self } else { Self::Neither }
    }
}

#[derive(Clone, Debug)]
pub struct Place {
    pub class: Class,
    pub track: Track,
    /// Of the sender's full address. Two that share it wait for each other in vain, and no worse.
    pub from: u64,
    pub sort: Sort,
    pub expiry: Option<Duration>,
    /// What it tells of a node of publish-subscribe.
    pub event: Option<Arc<NodeEvent>>,
    pub coming: Coming,
}

impl Place {
    /// Where a stanza of this class waits; `rule` is what an operator has said about it. `None` without both addresses.
    pub fn of(stanza: &Stanza, class: Class, rule: Placement, classes: &Classes) -> Option<Self> {
        let (from, to) = (stanza.from()?, stanza.to()?);
        let class = rule.class.unwrap_or(class);
        let sort = match stanza.kind() {
            Kind::Presence => Sort::Presence,
            Kind::Iq => Sort::Iq,
            Kind::Message if is_chat_state(stanza) => Sort::State,
            Kind::Message => Sort::Message,
        };
        let stanza_type = stanza.stanza_type();
        // A rule says how urgent something is. It does not make words into what may be lost on the way.
        let line = match (sort, class) {
            (Sort::Presence, Class::Presence) if matches!(stanza_type.as_deref(), None | Some("unavailable")) => {
                Line::Presence
            }
            (Sort::State, Class::State) => Line::State,
            _ if stanza.kind() != Kind::Iq && stanza.has_muc_user() => Line::Room,
            // Of a room itself, such as what it can do, told to an occupant.
            (Sort::Presence, _) if resource_of(&from).is_none() && resource_of(&to).is_some() => Line::Room,
            (Sort::Message | Sort::State, _) => match stanza_type.as_deref() {
                // A room writes to full addresses, a user to a bare room.
                Some("groupchat") if resource_of(&to).is_some() => Line::Room,
                None | Some("normal" | "headline") if !is_of_archive(stanza) => Line::Many,
                Some(_) | None => Line::Pair(bare(&to).into()),
            },
            (Sort::Presence, _)
                if resource_of(&to).is_none() && matches!(stanza_type.as_deref(), None | Some("unavailable")) =>
            {
                Line::Many
            }
            (Sort::Presence | Sort::Iq, _) => Line::Pair(bare(&to).into()),
        };
        // Who came and went is so however long ago it was, whichever class takes it along.
        let is_status = sort == Sort::Presence && matches!(stanza_type.as_deref(), None | Some("unavailable"));
        let expiry = classes[if is_status { Class::Presence } else { class }].expiry;
        let sender = bare(&from).into();
        Some(Self {
            class,
            track: Track { sender, line },
            from: hash(&from),
            sort,
            expiry: rule.expiry.unwrap_or(expiry),
            event: (sort == Sort::Message)
                .then(|| stanza.node_event())
                .flatten()
                .map(Arc::new),
            coming: Coming::Neither,
        })
    }

    /// Of what cannot be read.
    pub fn unknown() -> Self {
        Self {
            class: Class::Message,
            track: Track {
                sender: "".into(),
                line: Line::Many,
            },
            from: 0,
            sort: Sort::Message,
            expiry: None,
            event: None,
            coming: Coming::Neither,
        }
    }
}

/// A page of an archive (XEP-0313) is for who asked.
pub fn is_of_archive(stanza: &Stanza) -> bool {
    const ARCHIVE: &str = "urn:xmpp:mam:2";
    memmem::find(stanza.bytes(), ARCHIVE.as_bytes()).is_some()
        && stanza
            .children()
            .is_some_and(|children| children.iter().any(|child| child.is(ARCHIVE, "result")))
}

pub fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    /// However long a link is gone, who came and went meanwhile is told: only an operator's rule gives that up.
    #[test]
    fn presences_do_not_expire() {
        let x = "<x xmlns='http://jabber.org/protocol/muc#user'><item role='none'/></x>";
        let room = "from='r@conference.a.example/n' to='u@b.example/r'";
        let expiry = |text: &str, rule: Placement| {
            let stanza = Stanza::parse(Bytes::copy_from_slice(text.as_bytes())).unwrap();
            Place::of(&stanza, Class::of(&stanza), rule, &Classes::default())
                .unwrap()
                .expiry
        };
        for text in [
            format!("<presence {room}>{x}</presence>"),
            format!("<presence {room} type='unavailable'>{x}</presence>"),
            "<presence from='u@b.example/r' to='r@conference.a.example/n' type='unavailable'/>".to_owned(),
        ] {
            assert_eq!(expiry(&text, Placement::default()), None, "{text}");
            let hour = Some(Duration::from_secs(3600));
            let rule = Placement {
                expiry: Some(hour),
                ..Placement::default()
            };
            assert_eq!(expiry(&text, rule), hour, "{text}");
        }
        let words = format!("<message {room} type='groupchat'><body>x</body></message>");
        assert!(expiry(&words, Placement::default()).is_some());
    }
}
