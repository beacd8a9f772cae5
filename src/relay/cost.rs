//! Which rooms cost how much of the link: those that cost most, in a table that does not grow.
//!
//! At its limit the cheapest room makes place for a new one, which takes over its account ([space-saving]): so a room that costs much is
//! never missing, and what an account may hold too much is known.
//!
//! [space-saving]: https://doi.org/10.1007/978-3-540-30570-5_27

use std::{collections::BTreeMap, sync::Arc};

use crate::stanza::{Kind, Stanza, bare, resource_of};

/// Rooms that have an account: some tens of kilobytes a peer.
const ROOMS_MAX: usize = 256;

/// A name that is longer is no room's (RFC 7622: two parts of 1,023 bytes and an `@`).
const NAME_BYTES_MAX: usize = 2047;

/// What one room has cost.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Cost {
    /// A name for those who must not see the room's: the order in which rooms were seen.
    pub number: u64,
    /// Bytes of entries, before compression, that it put on the spool, and that came over the link.
    pub sent_bytes: u64,
    pub received_bytes: u64,
    /// What plain S2S would have carried for it, in stanzas.
    pub copies: u64,
    /// Of the bytes, those that may be another room's.
    pub doubtful_bytes: u64,
}

impl Cost {
    pub fn bytes(&self) -> u64 {
        self.sent_bytes + self.received_bytes
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Way {
    Sent,
    Received,
}

#[derive(Debug, Default)]
pub struct Rooms {
    accounts: BTreeMap<Arc<str>, Cost>,
    seen: u64,
    /// Of all rooms, those without an account too.
    total_bytes: u64,
}

impl Rooms {
    /// Puts bytes and copies to the account of the room that a stanza is about, if it is about one.
    pub fn note(&mut self, stanza: &Stanza, way: Way, bytes: u64, copies: u64) {
        let (Some(from), Some(to)) = (stanza.from(), stanza.to()) else {
            return;
        };
        let (from_bare, to_bare) = (bare(&from), bare(&to));
        let name = match stanza.kind() {
            Kind::Message if stanza.stanza_type().as_deref() == Some("groupchat") => {
                // To a room one speaks by its bare address; from it comes what has a nick, or is for a session.
                if resource_of(&to).is_none() { to_bare } else { from_bare }
            }
            Kind::Presence if stanza.is_join() => to_bare,
            Kind::Presence if stanza.has_muc_user() => from_bare,
            Kind::Message | Kind::Presence | Kind::Iq => {
                let known = [from_bare, to_bare]
                    .into_iter()
                    .find(|name| self.accounts.contains_key(*name));
                let Some(name) = known else { return };
                name
            }
        };
        if name.len() > NAME_BYTES_MAX {
            return;
        }
        self.total_bytes += bytes;
        if !self.accounts.contains_key(name) {
            self.open(name);
        }
        let Some(cost) = self.accounts.get_mut(name) else {
            return;
        };
        match way {
            Way::Sent => cost.sent_bytes += bytes,
            Way::Received => cost.received_bytes += bytes,
        }
        cost.copies += copies;
    }

    fn open(&mut self, name: &str) {
        let mut cost = Cost::default();
        if self.accounts.len() >= ROOMS_MAX {
            let cheapest = self.accounts.iter().min_by_key(|(_, cost)| cost.bytes());
            if let Some(cheapest) = cheapest.map(|(name, _)| Arc::clone(name))
                && let Some(inherited) = self.accounts.remove(&cheapest)
            {
                cost.doubtful_bytes = inherited.bytes();
                (cost.sent_bytes, cost.received_bytes) = (inherited.sent_bytes, inherited.received_bytes);
            }
        }
        self.seen += 1;
        cost.number = self.seen;
        self.accounts.insert(name.into(), cost);
    }

    /// Those that cost most, the dearest first.
    pub fn top(&self, count: usize) -> Vec<(Arc<str>, Cost)> {
        let mut all: Vec<_> = self.accounts.iter().collect();
        all.sort_by_key(|(_, cost)| (std::cmp::Reverse(cost.bytes()), cost.number));
        let all = all.into_iter().take(count);
        all.map(|(name, cost)| (Arc::clone(name), cost.clone())).collect()
    }

    pub fn get(&self, name: &str) -> Option<&Cost> {
        self.accounts.get(name)
    }

    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stanza(text: &str) -> Stanza {
        Stanza::parse(text.to_owned().into()).unwrap()
    }

    /// What is said to a room, by it and about who is in it is the room's; what two users say to each other is not.
    #[test]
    fn cost_is_the_rooms() {
        let mut rooms = Rooms::default();
        let mut note = |text: &str| rooms.note(&stanza(text), Way::Sent, 10, 1);
        note("<message from='u@a.example/r' to='v@b.example' type='chat'/>");
        note("<message from='u@a.example/r' to='m@c.b.example' type='groupchat'/>");
        note("<message from='m@c.b.example/nick' to='v@b.example/r' type='groupchat'/>");
        note(
            "<presence from='u@a.example/r' to='n@c.b.example/nick'><x xmlns='http://jabber.org/protocol/muc'/></presence>",
        );
        note(
            "<presence from='m@c.b.example/n' to='v@b.example/r'><x xmlns='http://jabber.org/protocol/muc#user'/></presence>",
        );
        // A leave is like any presence, but the room is known.
        note("<presence from='u@a.example/r' to='n@c.b.example/nick' type='unavailable'/>");
        let top: Vec<_> = rooms
            .top(9)
            .into_iter()
            .map(|(name, cost)| (name, cost.sent_bytes))
            .collect();
        assert_eq!(top, [("m@c.b.example".into(), 30), ("n@c.b.example".into(), 20)]);
        assert_eq!(rooms.total_bytes(), 50);
    }

    /// Beyond the limit a dear room stays in its place, and a new one takes the cheapest one's, with what it may owe to it.
    #[test]
    fn dear_rooms_stay() {
        let mut rooms = Rooms::default();
        let mut say = |room: u64, bytes: u64| {
            let text = format!("<message from='u@a.example/r' to='room{room}@c.b.example' type='groupchat'/>");
            rooms.note(&stanza(&text), Way::Received, bytes, 2);
        };
        say(0, 1_000_000);
        for room in 1..1000 {
            say(room, 100);
        }
        assert_eq!(rooms.accounts.len(), ROOMS_MAX);
        let top = rooms.top(1);
        assert_eq!((&*top[0].0, top[0].1.received_bytes), ("room0@c.b.example", 1_000_000));
        let last = rooms.get("room999@c.b.example").unwrap();
        assert_eq!((last.received_bytes - last.doubtful_bytes, last.number), (100, 1000));
        assert_eq!(rooms.total_bytes(), 1_000_000 + 999 * 100);
    }
}
