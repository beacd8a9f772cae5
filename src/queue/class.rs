//! What kind of traffic a stanza is: what goes first, what may be given up, and when.
//!
//! A class is about how urgent something is, never about order: order is kept by sender and recipient, and by room
//! ([`super::scheduler`]). So a room's messages and the comings and goings of its occupants are one class, and what an entry of another
//! class must not overtake, it waits for.
//!
//! [`Class::of`] looks at one stanza alone. Whether a presence of a room tells of a newcomer or only of another status depends on what
//! was said before.

use std::{
    ops::{Index, IndexMut},
    time::Duration,
};

use bytes::Bytes;
use memchr::memmem;

use crate::stanza::{Child, Kind, Stanza, ns, resource_of};

/// In the order of urgency.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Class {
    /// What keeps the numbering dense: a few bytes.
    Control,
    /// Somebody waits for it: answers to IQs, a user's own presence in a room, and what it is told of a room that it enters.
    Urgent,
    /// What people say, and who enters and leaves a room.
    Message,
    /// Questions.
    Iq,
    /// Changes of status. Only the newest counts.
    Presence,
    /// Chat states (XEP-0085). Of use for some seconds.
    State,
    /// What is large or not waited for: avatars, PEP, pages of an archive, files.
    Bulk,
}

impl Class {
    pub const COUNT: usize = 7;

    pub const ALL: [Self; Self::COUNT] = [
        Self::Control,
        Self::Urgent,
        Self::Message,
        Self::Iq,
        Self::Presence,
        Self::State,
        Self::Bulk,
    ];

    /// The value in metrics and in the configuration.
    pub fn as_label(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Urgent => "urgent",
            Self::Message => "message",
            Self::Iq => "iq",
            Self::Presence => "presence",
            Self::State => "state",
            Self::Bulk => "bulk",
        }
    }

    /// What a stanza is without any rules of an operator's.
    ///
    /// A presence of a room is of class [`Class::Message`] here: it may be that of a newcomer, and then nothing may overtake it.
    pub fn of(stanza: &Stanza) -> Self {
        let stanza_type = stanza.stanza_type();
        match (stanza.kind(), stanza_type.as_deref()) {
            (Kind::Iq, Some("result" | "error")) if is_bulk(stanza) => Self::Bulk,
            (Kind::Iq, Some("result" | "error")) => Self::Urgent,
            (Kind::Iq, _) if is_bulk(stanza) => Self::Bulk,
            (Kind::Iq, _) => Self::Iq,
            (Kind::Presence, None | Some("unavailable")) => {
                if stanza.has_muc_status("110") {
                    Self::Urgent
                } else if stanza.has_muc_user() || stanza.to().is_some_and(|to| may_be_occupant(&to)) {
                    Self::Message
                } else {
                    Self::Presence
                }
            }
            // Subscriptions, probes and errors each say something of their own.
            (Kind::Presence, _) => Self::Message,
            (Kind::Message, Some("error")) => Self::Message,
            (Kind::Message, Some("groupchat")) if is_chat_state(stanza) => Self::State,
            // However large: what follows in the room waits for it.
            (Kind::Message, Some("groupchat")) => Self::Message,
            (Kind::Message, _) if is_bulk(stanza) => Self::Bulk,
            (Kind::Message, _) if is_chat_state(stanza) => Self::State,
            (Kind::Message, _) => Self::Message,
        }
    }
}

/// How a class is treated.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ClassSettings {
    /// While several classes wait, each gets the link in proportion to this. Never 0.
    pub weight: u32,
    /// How long an entry may wait, from when it was accepted. Then whoever asked or said it is told, if it may be
    /// ([`bounce`](crate::stanza::bounce)); what is volatile goes without a word. `None`: for ever.
    pub expiry: Option<Duration>,
    /// Whether an entry may be overtaken, and may be replaced by a later one of the same sender that says all it says.
    pub volatile: bool,
    /// What may wait. At the limit the newest is refused with `resource-constraint`; what is volatile is dropped.
    pub entries_max: u64,
    pub bytes_max: u64,
}

/// All of them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Classes([ClassSettings; Class::COUNT]);

impl Index<Class> for Classes {
    type Output = ClassSettings;

    fn index(&self, class: Class) -> &ClassSettings {
        &self.0[class as usize]
    }
}

impl IndexMut<Class> for Classes {
    fn index_mut(&mut self, class: Class) -> &mut ClassSettings {
        &mut self.0[class as usize]
    }
}

impl Default for Classes {
    fn default() -> Self {
        Self(Class::ALL.map(ClassSettings::of))
    }
}

/// Longer than one planned outage.
const MESSAGE_EXPIRY: Duration = Duration::from_secs(12 * 60 * 60);

/// Clients give up after 30 to 60 s, and servers' own S2S time-outs are of that order.
const IQ_EXPIRY: Duration = Duration::from_secs(60);

/// Who was typing so long ago has said it, or does no more.
const STATE_EXPIRY: Duration = Duration::from_secs(5);

/// A user's client asks some ten things when it enters a room; this is a thousand clients at once.
const IQ_ENTRIES_MAX: u64 = 10_000;

/// One for each occupant of a hundred rooms of a hundred.
const PRESENCE_ENTRIES_MAX: u64 = 10_000;

/// They live for seconds: two hundred people typing.
const STATE_ENTRIES_MAX: u64 = 1_000;

/// A hundred pages of an archive, of a hundred messages each.
const BULK_ENTRIES_MAX: u64 = 10_000;

/// At 9600 bit/s two days without anything else.
const BULK_BYTES_MAX: u64 = 200 << 20;

/// Of what is small, by the thousand.
const SMALL_BYTES_MAX: u64 = 64 << 20;

impl ClassSettings {
    /// What a class has without configuration.
    pub fn of(class: Class) -> Self {
        // As much as the queue as a whole takes.
        let durable = Self {
            weight: 8,
            expiry: None,
            volatile: false,
            entries_max: u64::MAX,
            bytes_max: u64::MAX,
        };
        match class {
            // A few bytes, and others may wait for what they say.
            Class::Control => Self { weight: 32, ..durable },
            // There is little of it, and somebody waits in front of a screen.
            Class::Urgent => Self { weight: 16, ..durable },
            Class::Message => Self {
                expiry: Some(MESSAGE_EXPIRY),
                ..durable
            },
            Class::Iq => Self {
                weight: 4,
                expiry: Some(IQ_EXPIRY),
                entries_max: IQ_ENTRIES_MAX,
                bytes_max: SMALL_BYTES_MAX,
                ..durable
            },
            // No expiry: however old, the newest is what is so.
            Class::Presence => Self {
                weight: 2,
                volatile: true,
                entries_max: PRESENCE_ENTRIES_MAX,
                bytes_max: SMALL_BYTES_MAX,
                ..durable
            },
            Class::State => Self {
                weight: 1,
                expiry: Some(STATE_EXPIRY),
                volatile: true,
                entries_max: STATE_ENTRIES_MAX,
                bytes_max: SMALL_BYTES_MAX,
            },
            Class::Bulk => Self {
                weight: 1,
                expiry: Some(MESSAGE_EXPIRY),
                entries_max: BULK_ENTRIES_MAX,
                bytes_max: BULK_BYTES_MAX,
                ..durable
            },
        }
    }
}

/// Beyond it what is not for a room is bulk: four pieces of a large stanza, some 3 s at 9600 bit/s before compression.
const BULK_BYTES_MIN: usize = 4 << 10;

/// Payloads that are bulk at any size, with the name of the element if not all of the namespace is.
const BULK_PAYLOADS: [(&str, Option<&str>); 7] = [
    // XEP-0313: a page, and its end, which must not come before it. Questions are questions.
    ("urn:xmpp:mam:2", Some("result")),
    ("urn:xmpp:mam:2", Some("fin")),
    // XEP-0163, XEP-0084
    ("http://jabber.org/protocol/pubsub#event", None),
    // XEP-0047
    ("http://jabber.org/protocol/ibb", Some("data")),
    // XEP-0231
    ("urn:xmpp:bob", None),
    // XEP-0054, XEP-0292
    ("vcard-temp", Some("vCard")),
    ("urn:ietf:params:xml:ns:vcard-4.0", None),
];

/// XEP-0085
const CHAT_STATES: &str = "http://jabber.org/protocol/chatstates";

fn is_bulk(stanza: &Stanza) -> bool {
    if stanza.bytes().len() > BULK_BYTES_MIN {
        return true;
    }
    // Few have any of these, and a look through the bytes is far cheaper than parsing them.
    let may_be = |bytes: &Bytes| {
        BULK_PAYLOADS
            .iter()
            .any(|(namespace, _)| memmem::find(bytes, namespace.as_bytes()).is_some())
    };
    may_be(stanza.bytes())
        && stanza.children().is_some_and(|children| {
            children.iter().any(|child| {
                // An empty `vCard` asks for one.
                let asks = stanza.stanza_type().is_some_and(|value| value == "get");
                !asks
                    && BULK_PAYLOADS
                        .iter()
                        .any(|bulk| bulk.0 == child.namespace && bulk.1.is_none_or(|bulk| bulk == child.name))
            })
        })
}

/// Whether it says that somebody types or not, and nothing else.
pub fn is_chat_state(stanza: &Stanza) -> bool {
    /// XEP-0334: how it is to be handled, not what it says; XEP-0359: which it is; and who says it (XEP-0421, XEP-0045).
    const BESIDE: [&str; 4] = [ns::HINTS, ns::STANZA_ID, ns::OCCUPANT_ID, ns::MUC_USER];
    stanza.kind() == Kind::Message
        && memmem::find(stanza.bytes(), CHAT_STATES.as_bytes()).is_some()
        && stanza.children().is_some_and(|children| {
            let is_state = |child: &Child| child.namespace == CHAT_STATES;
            let is_beside =
                |child: &Child| BESIDE.contains(&child.namespace.as_str()) || child.is(ns::SERVER, "thread");
            children.iter().any(is_state) && children.iter().all(|child| is_state(child) || is_beside(child))
        })
}

/// A presence to an address like this may be a user's to a room (XEP-0045 §7.2, §7.14): to enter, to leave, to change nick or status.
fn may_be_occupant(to: &str) -> bool {
    to.contains('@') && resource_of(to).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(text: &str) -> Class {
        Class::of(&Stanza::parse(Bytes::copy_from_slice(text.as_bytes())).unwrap())
    }

    /// One stanza of each kind that has a class of its own.
    #[test]
    fn stanzas_have_their_class() {
        let state = "<composing xmlns='http://jabber.org/protocol/chatstates'/>";
        let x = "<x xmlns='http://jabber.org/protocol/muc#user'><item role='participant'/></x>";
        let own = "<x xmlns='http://jabber.org/protocol/muc#user'><status code='110'/></x>";
        let result = "<result xmlns='urn:xmpp:mam:2' id='1'><forwarded xmlns='urn:xmpp:forward:0'><message xmlns='jabber:client'><body>b</body></message></forwarded></result>";
        let event = "<event xmlns='http://jabber.org/protocol/pubsub#event'/>";
        let large = format!("<body>{}</body>", "x".repeat(BULK_BYTES_MIN));
        let table = [
            (
                "<iq type='get'><query xmlns='urn:xmpp:mam:2'/></iq>".to_owned(),
                Class::Iq,
            ),
            ("<iq type='get'><vCard xmlns='vcard-temp'/></iq>".to_owned(), Class::Iq),
            ("<iq type='result'/>".to_owned(), Class::Urgent),
            (
                "<iq type='result'><fin xmlns='urn:xmpp:mam:2'/></iq>".to_owned(),
                Class::Bulk,
            ),
            (
                "<iq type='result'><vCard xmlns='vcard-temp'/></iq>".to_owned(),
                Class::Bulk,
            ),
            (
                "<iq type='set'><data xmlns='http://jabber.org/protocol/ibb'>AA==</data></iq>".to_owned(),
                Class::Bulk,
            ),
            (format!("<message>{result}</message>"), Class::Bulk),
            (format!("<message>{event}</message>"), Class::Bulk),
            (format!("<message type='chat'>{large}</message>"), Class::Bulk),
            (format!("<message type='groupchat'>{large}</message>"), Class::Message),
            (
                "<message><body>urn:xmpp:mam:2</body></message>".to_owned(),
                Class::Message,
            ),
            (format!("<message type='chat'>{state}</message>"), Class::State),
            (
                format!("<message type='chat'>{state}<no-store xmlns='urn:xmpp:hints'/></message>"),
                Class::State,
            ),
            (
                format!("<message type='chat'>{state}<body>b</body></message>"),
                Class::Message,
            ),
            (format!("<message type='error'>{state}</message>"), Class::Message),
            (format!("<message type='groupchat'>{state}</message>"), Class::State),
            (
                "<message><received xmlns='urn:xmpp:receipts' id='1'/></message>".to_owned(),
                Class::Message,
            ),
            (format!("<presence>{x}</presence>"), Class::Message),
            (format!("<presence type='unavailable'>{x}</presence>"), Class::Message),
            (format!("<presence>{own}</presence>"), Class::Urgent),
            ("<presence to='v@b.example'/>".to_owned(), Class::Presence),
            ("<presence to='room@b.example/nick'/>".to_owned(), Class::Message),
            (
                "<presence type='unavailable' to='v@b.example'/>".to_owned(),
                Class::Presence,
            ),
            (
                "<presence type='subscribe' to='v@b.example'/>".to_owned(),
                Class::Message,
            ),
        ];
        for (text, expected) in table {
            assert_eq!(class(&text), expected, "{text}");
        }
    }

    /// What is configured for one class is that class's, and the defaults hang together.
    #[test]
    fn settings_are_found_by_class() {
        let mut classes = Classes::default();
        for class in Class::ALL {
            assert_eq!(classes[class], ClassSettings::of(class));
            assert!(classes[class].weight > 0);
            classes[class].weight = class as u32 + 100;
        }
        assert_eq!(classes[Class::Iq].weight, Class::Iq as u32 + 100);
    }
}
