//! What became of each stanza, and why, for whoever watches (`narrows trace`, the log at `debug`).
//!
//! Nothing is noted until somebody watches: then every decision is an [`Event`], plain data that the caller takes away at every turn.
//! An entry has one name on both ends of a link and in both logs, its [`EntryId`].

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    sync::Arc,
};

use bytes::Bytes;

use crate::{
    codec::position::{Epoch, Seq},
    queue::{class::Class, rules::Direction},
    stanza::Kind,
    time::Wall,
};

use super::Drop;

/// The name of an entry on both ends: who sent it, which life of its store, and its number there.
///
/// The last four digits of the store's random name do: a site has a new store once in years.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EntryId {
    /// What the sender calls itself, if it says so.
    pub site: Option<Arc<str>>,
    pub epoch: Epoch,
    pub seq: Seq,
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(site) = &self.site {
            write!(f, "{site}-")?;
        }
        write!(f, "{:04x}/{}", self.epoch.0 & 0xffff, self.seq.0)
    }
}

/// A question that was answered without the link.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Question {
    Ping,
    Disco,
}

/// Why a stanza was not taken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Refusal {
    QueueFull,
    ClassFull,
    TooLarge,
    /// It needs the room, and the link is gone.
    Split,
}

/// What was done, in the order of a stanza's way.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Decision {
    /// A rule has taken something out of it.
    Stripped {
        rule: Arc<str>,
    },
    /// A rule has dropped it.
    RuledOut {
        rule: Arc<str>,
    },
    Refused(Refusal),
    Answered(Question),
    /// The mirror has settled it here: it answered a question of ours, or somebody left while the link was gone.
    Settled,
    /// The mirror has shown it near by already; it crosses all the same.
    Echoed,
    /// It is the first copy of an entry; a rule may have said in which class.
    Queued {
        rule: Option<Arc<str>>,
    },
    /// It became one more recipient of an entry: the so-manieth.
    Collapsed {
        copies: usize,
    },
    /// It waited longer than its class may.
    Expired,
    /// A later one took its place.
    Replaced,
    /// It went onto the link.
    Sent,
    /// It came from the link, with so many recipients.
    Arrived {
        copies: usize,
    },
    /// It had come before.
    Repeated,
    /// The room's copy of what was shown near by at once.
    Swallowed,
    /// The mirror keeps it, or says it in another way.
    Kept,
    /// Our server has it.
    Delivered,
    /// It is not carried on.
    Lost(Drop),
}

impl Decision {
    pub fn as_label(&self) -> &'static str {
        match self {
            Self::Stripped { .. } => "stripped",
            Self::RuledOut { .. } => "dropped",
            Self::Refused(_) => "refused",
            Self::Answered(_) => "answered",
            Self::Settled => "settled",
            Self::Echoed => "echoed",
            Self::Queued { .. } => "queued",
            Self::Collapsed { .. } => "collapsed",
            Self::Expired => "expired",
            Self::Replaced => "replaced",
            Self::Sent => "sent",
            Self::Arrived { .. } => "arrived",
            Self::Repeated => "repeated",
            Self::Swallowed => "swallowed",
            Self::Kept => "kept",
            Self::Delivered => "delivered",
            Self::Lost(_) => "lost",
        }
    }
}

/// The reason, in words.
impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stripped { rule } => write!(f, "the rule {rule} has taken something out of it"),
            Self::RuledOut { rule } => write!(f, "the rule {rule} drops it"),
            Self::Refused(Refusal::QueueFull) => f.write_str("the queue is full"),
            Self::Refused(Refusal::ClassFull) => f.write_str("too much of its class waits"),
            Self::Refused(Refusal::TooLarge) => f.write_str("it is too large"),
            Self::Refused(Refusal::Split) => f.write_str("it needs the room, and the link is gone"),
            Self::Answered(Question::Ping) => f.write_str("a ping, answered here"),
            Self::Answered(Question::Disco) => f.write_str("a discovery, answered here"),
            Self::Settled => f.write_str("the mirror has settled it here"),
            Self::Echoed => f.write_str("shown here at once; the room will hear it"),
            Self::Queued { rule: None } => f.write_str("a new entry"),
            Self::Queued { rule: Some(rule) } => write!(f, "a new entry, placed by the rule {rule}"),
            Self::Collapsed { copies } => write!(f, "copy {copies} of the entry"),
            Self::Expired => f.write_str("it waited too long"),
            Self::Replaced => f.write_str("a later one took its place"),
            Self::Sent => f.write_str("given to the link"),
            Self::Arrived { copies: 1 } => f.write_str("came over the link for one"),
            Self::Arrived { copies } => write!(f, "came over the link for {copies}"),
            Self::Repeated => f.write_str("had come before"),
            Self::Swallowed => f.write_str("the room's copy of what was shown here at once"),
            Self::Kept => f.write_str("the mirror keeps it, or tells it otherwise"),
            Self::Delivered => f.write_str("the server has it"),
            Self::Lost(drop) => write!(f, "not carried on: {}", drop.as_label()),
        }
    }
}

/// One decision about one stanza.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Event {
    pub at: Wall,
    pub direction: Direction,
    pub decision: Decision,
    pub class: Option<Class>,
    pub entry: Option<EntryId>,
    /// As it came, if it is known: `None` of what an earlier process has taken in.
    pub stanza: Option<Bytes>,
}

impl Event {
    pub fn kind(&self) -> Option<Kind> {
        let stanza = self.stanza.as_ref()?;
        let kinds = [Kind::Message, Kind::Presence, Kind::Iq];
        let begins = |kind: &Kind| {
            stanza
                .get(1..)
                .is_some_and(|rest| rest.starts_with(kind.as_str().as_bytes()))
        };
        kinds.into_iter().find(begins)
    }
}

/// Events that wait for the caller. He takes them at every turn, so this is more than one turn makes; more are counted.
const EVENTS_MAX: usize = 8192;

/// Entries whose first copy is remembered until they have crossed, and how large it may be: a few megabytes.
const KNOWN_MAX: usize = 1024;
const KNOWN_BYTES_MAX: usize = 4096;

#[derive(Debug)]
struct Known {
    stanza: Bytes,
    copies: usize,
}

/// What is noted while somebody watches.
#[derive(Debug, Default)]
pub struct Trace {
    on: bool,
    events: VecDeque<Event>,
    missed: u64,
    known: BTreeMap<Seq, Known>,
}

impl Trace {
    pub fn is_on(&self) -> bool {
        self.on
    }

    pub fn turn(&mut self, on: bool) {
        if !on {
            *self = Self::default();
        }
        self.on = on;
    }

    pub fn note(&mut self, event: Event) {
        if !self.on {
            return;
        }
        if self.events.len() < EVENTS_MAX {
            self.events.push_back(event);
        } else {
            self.missed += 1;
        }
    }

    pub fn poll(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Events that there was no room for, since this was last asked.
    pub fn take_missed(&mut self) -> u64 {
        std::mem::take(&mut self.missed)
    }

    /// One more copy has its place in an entry; how many there are now.
    pub fn note_placed(&mut self, seq: Seq, stanza: &Bytes) -> usize {
        if let Some(known) = self.known.get_mut(&seq) {
            known.copies += 1;
            return known.copies;
        }
        if stanza.len() <= KNOWN_BYTES_MAX {
            let stanza = stanza.clone();
            self.known.insert(seq, Known { stanza, copies: 1 });
        }
        if self.known.len() > KNOWN_MAX {
            self.known.pop_first();
        }
        1
    }

    /// The first copy of an entry, if it is remembered.
    pub fn known(&self, seq: Seq) -> Option<Bytes> {
        self.known.get(&seq).map(|known| known.stanza.clone())
    }

    /// The peer has everything up to this one.
    pub fn forget(&mut self, upto: Seq) {
        self.known = self.known.split_off(&Seq(upto.0 + 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(seq: u64) -> Event {
        Event {
            at: Wall(0),
            direction: Direction::Sent,
            decision: Decision::Sent,
            class: Some(Class::Message),
            entry: Some(EntryId {
                site: Some("ship".into()),
                epoch: Epoch(0xabc_1a2b),
                seq: Seq(seq),
            }),
            stanza: Some(Bytes::from_static(b"<message/>")),
        }
    }

    /// The same name on both ends, short enough to be read out.
    #[test]
    fn an_entry_has_a_name() {
        let mut id = event(4711).entry.unwrap();
        assert_eq!(id.to_string(), "ship-1a2b/4711");
        id.site = None;
        assert_eq!(id.to_string(), "1a2b/4711");
        assert_eq!(event(1).kind(), Some(Kind::Message));
    }

    /// Nothing is kept while nobody watches, no more than there is room for while somebody does, and what is missed is counted.
    #[test]
    fn nothing_is_noted_unwatched_and_the_rest_is_bounded() {
        let mut trace = Trace::default();
        trace.note(event(1));
        assert_eq!(trace.poll(), None);
        trace.turn(true);
        for seq in 0..EVENTS_MAX as u64 + 3 {
            trace.note(event(seq));
            trace.note_placed(Seq(seq), &Bytes::from_static(b"<message/>"));
        }
        assert_eq!((trace.take_missed(), trace.take_missed()), (3, 0));
        assert_eq!(trace.events.len(), EVENTS_MAX);
        assert_eq!(trace.known.len(), KNOWN_MAX);
        trace.forget(Seq(EVENTS_MAX as u64));
        assert_eq!(trace.known.len(), 2);
        trace.turn(false);
        assert_eq!((trace.poll(), trace.known.len()), (None, 0));
    }
}
