//! What is said, and how one copy of it is known again.

use bytes::Bytes;
use narrows::{
    codec::{
        entry::{Cast, Entry},
        position::Seq,
    },
    queue::journal::Model,
    stanza::{Stanza, bare},
};

use crate::random::Random;

/// One copy: who sent it, to whom, its number (which never repeats) and its bytes.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Copy {
    pub flow: String,
    pub to: String,
    pub number: u64,
    pub error: bool,
    pub bytes: Bytes,
}

impl Copy {
    pub fn read(bytes: &Bytes) -> Self {
        let stanza = Stanza::parse(bytes.clone()).expect("what arrives is a stanza");
        Self {
            flow: bare(&stanza.from().expect("has from")).to_owned(),
            to: stanza.to().expect("has to").into_owned(),
            number: stanza.id().expect("has id").parse().expect("ids are numbers"),
            error: stanza.is_error(),
            bytes: bytes.clone(),
        }
    }

    pub fn kind(&self) -> What {
        What::of(self.number)
    }

    /// Which of those who share a bare address has said it.
    pub fn sender(&self) -> u64 {
        match self.kind() {
            What::RoomPresence | What::RoomMessage | What::Iq => self.number % 5,
            What::Chat => 0,
        }
    }

    /// Whether this need not be heard, because of what was said later.
    pub fn gives_way_to(&self, later: &Self) -> bool {
        let presence = |copy: &Self| copy.kind() == What::RoomPresence && !copy.error;
        presence(self)
            && presence(later)
            && later.number > self.number
            && (&later.flow, later.sender(), &later.to) == (&self.flow, self.sender(), &self.to)
    }

    pub fn is_poison(&self) -> bool {
        is_poison(&self.bytes)
    }
}

/// What a server closes its stream on.
pub fn is_poison(bytes: &Bytes) -> bool {
    const POISON: &[u8] = b"<poison";
    bytes.windows(POISON.len()).any(|bytes| bytes == POISON)
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum What {
    RoomPresence,
    RoomMessage,
    Iq,
    Chat,
}

impl What {
    pub fn of(number: u64) -> Self {
        match number % 4 {
            0 => Self::RoomPresence,
            1 => Self::RoomMessage,
            2 => Self::Iq,
            _ => Self::Chat,
        }
    }

    pub fn is_broadcast(self) -> bool {
        matches!(self, Self::RoomPresence | Self::RoomMessage)
    }

    /// Whether its sender may be sent an error. A room may not: it would expel an occupant.
    pub fn is_answerable(self) -> bool {
        matches!(self, Self::Iq | Self::Chat)
    }
}

/// Which far users are in a room, as a set of bits.
pub type Members = u64;

/// The copies of one stanza, in the order in which the server writes them.
pub fn say(number: u64, here: char, there: char, rooms: &[Members], poison: bool, random: &mut Random) -> Vec<Bytes> {
    let room = random.below(rooms.len() as u64) as usize;
    let size = if random.one_in(12) {
        3000 + random.below(4000)
    } else {
        random.below(80)
    };
    let body: String = (0..size).map(|_| char::from(b'a' + random.below(26) as u8)).collect();
    let extra = if poison { "<poison xmlns='x'/>" } else { "" };
    let from = format!("r{room}@conference.{here}.example/n{}", number % 5);
    let text = |user: u64| {
        let to = format!("u{user}@{there}.example/r");
        match What::of(number) {
            What::RoomPresence => {
                format!(
                    "<presence to='{to}' from='{from}' id='{number}'><status>{body}</status>{extra}<x xmlns='http://jabber.org/protocol/muc#user'/></presence>"
                )
            }
            What::RoomMessage => format!(
                "<message from='{from}' id='{number}' type=\"groupchat\" to=\"{to}\"><body>{body}</body>{extra}</message>"
            ),
            What::Iq => {
                format!("<iq id='{number}' type='get' from='{from}' to='{to}'><q xmlns='q'>{body}</q>{extra}</iq>")
            }
            What::Chat => format!(
                "<message from='c{room}@{here}.example/r'   to='{to}' type='chat' id='{number}'><body>{body}</body>{extra}</message>"
            ),
        }
    };
    if What::of(number).is_broadcast() {
        let mut users: Vec<u64> = (0..64).filter(|user| rooms[room] & (1 << user) != 0).collect();
        // Rooms address their occupants in no particular order.
        let turn = random.below(users.len() as u64) as usize;
        users.rotate_left(turn);
        users.into_iter().map(|user| text(user).into()).collect()
    } else {
        vec![text(random.below(5)).into()]
    }
}

/// What a dishonest peer may put on the link: all of it is to be dropped.
pub fn forged(here: char, there: char) -> Vec<Bytes> {
    let cast = |template: &str, to_at: usize, recipients: &[&str]| {
        Entry::Cast(Cast {
            template: Bytes::copy_from_slice(template.as_bytes()),
            to_at: to_at as u32,
            recipients: recipients
                .iter()
                .map(|to| Bytes::copy_from_slice(to.as_bytes()))
                .collect(),
        })
        .encode()
    };
    let honest = format!("<message from='u@{here}.example/r' id='0'><body>x</body></message>");
    let hidden = format!("<message to='u@evil.example' from='u@{here}.example/r' id='0'><body>x</body></message>");
    let to = format!(" to='u1@{there}.example/r'");
    let to = to.as_str();
    vec![
        // In another's name: a stranger's, or ours.
        cast("<message from='u@evil.example/r' id='0'/>", 8, &[to]),
        cast(&format!("<message from='u@{there}.example/r' id='0'/>"), 8, &[to]),
        cast("<message id='0'/>", 8, &[to]),
        // To a stranger, also beside an honest address.
        cast(&honest, 8, &[" to='u@evil.example'"]),
        cast(&honest, 8, &[" to='u@evil.example'", to]),
        // The honest address is not where the server looks.
        cast(&hidden, hidden.find("x</body>").expect("stands there"), &[to]),
        cast(&hidden, hidden.find(">x</body>").expect("stands there"), &[to]),
        // Not one stanza.
        cast(&honest.repeat(2), 8, &[to]),
        cast(
            &format!("<message from='u@{here}.example/r' id='0'><!-- x --></message>"),
            8,
            &[to],
        ),
        cast(&format!("<message from='u@{here}.example/r' id='0'>"), 8, &[to]),
        cast(&format!("<features from='u@{here}.example/r' id='0'/>"), 9, &[to]),
        cast(&honest, 8, &[" to='u1@b.example' type='error'"]),
        cast("</stream:stream>", 15, &[to]),
    ]
}

/// Whether a relay that finds this on its disk sends it on.
pub fn crosses(entry: &Bytes) -> bool {
    let Ok(Entry::Cast(cast)) = Entry::decode(entry) else {
        return false;
    };
    cast.copy(0)
        .and_then(|copy| Stanza::parse(copy).ok())
        .is_some_and(|stanza| stanza.from().is_some())
}

/// The copies that slots hold.
pub fn copies_of(entry: &Bytes) -> Vec<Copy> {
    match Entry::decode(entry) {
        Ok(Entry::Cast(cast)) => (0..cast.recipients.len())
            .filter_map(|k| cast.copy(k))
            .map(|bytes| Copy::read(&bytes))
            .collect(),
        Ok(Entry::Void) | Err(_) => Vec::new(),
    }
}

pub fn in_inbox(disk: &Model) -> Vec<Copy> {
    let (slots, _) = disk.read_inbox(Seq(0), usize::MAX, usize::MAX);
    slots.iter().flat_map(|slot| copies_of(&slot.entry)).collect()
}

pub fn in_spool(disk: &Model) -> Vec<(Seq, Vec<Copy>)> {
    let (slots, _) = disk.read_spool(Seq(0), usize::MAX, usize::MAX);
    slots.iter().map(|slot| (slot.seq, copies_of(&slot.entry))).collect()
}
