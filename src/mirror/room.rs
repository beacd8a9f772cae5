//! A far room as its users beside us were shown it.
//!
//! Nothing here is guessed: sessions, occupants and the version of each presence that each session got are read from what the room
//! itself has sent. A row of the store holds what one stanza changes, so a room of a hundred costs little more than a small one.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::{
    muc::MucUser,
    words::{body_mark, node_of},
};
use crate::{
    codec::{
        entry::Cast,
        varint::{ReadError, Reader, put_len, put_prefixed, put_varint},
    },
    stanza::Stanza,
};

/// A room with more is not mirrored: each presence would rewrite a row of that many addresses. Debian's ejabberd has 200 a room.
pub const SESSIONS_MAX: usize = 2_000;
pub const OCCUPANTS_MAX: usize = 5_000;
/// Messages of our users that a room has not reflected; beyond it they are shown only when the room does.
pub const ECHOES_MAX: usize = 5_000;
/// No part of a row is longer: it came in a stanza.
const PART_MAX: usize = 1 << 20;

const ROW_VERSION: u8 = 1;

/// A user of ours in the room, by his full address.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Session {
    /// The one that was asked for, until the room has said which it gave.
    pub nick: String,
    /// The room has let it in, or those beside it have.
    pub joined: bool,
    /// The room has not: what was shown of it near by, as a template.
    pub provisional: Option<Bytes>,
    /// Stands for it in the rows of occupants, which would be mostly addresses otherwise. Given once in a room's life here.
    pub number: u32,
    /// It is in, and has asked to enter once more.
    pub again: Option<Again>,
}

/// A question of one who is in. Whom the room puts out before it hears that, it may let in again.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Again {
    pub id: String,
    /// The last echo before it: what it said later itself, it says as one who is in again.
    pub after: u64,
}

/// What some sessions were shown of one occupant. Moderators see more than others, so there may be several.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Version {
    pub template: Bytes,
    pub to_at: u32,
    /// By the numbers of the sessions.
    pub shown_to: BTreeSet<u32>,
}

impl Version {
    pub fn stanza(&self) -> Option<Stanza> {
        Stanza::parse(self.template.clone()).ok()
    }

    pub fn muc(&self) -> Option<MucUser> {
        MucUser::of(&node_of(&self.stanza()?))
    }
}

/// A message of one of our users that the room has not reflected.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Echo {
    pub nick: String,
    /// Empty if it has none.
    pub id: String,
    /// What it says, as a mark.
    pub words: u64,
    pub state: EchoState,
    /// The room has begun to reflect it: the numbers of the sessions that have not heard it yet.
    pub left: Option<BTreeSet<u32>>,
}

impl Echo {
    pub fn new(nick: &str, id: String, words: u64, state: EchoState) -> Self {
        Self {
            nick: nick.to_owned(),
            id,
            words,
            state,
            left: None,
        }
    }

    /// Whether a session waits for it, if any does.
    fn is_left_to(&self, session: &Session) -> bool {
        self.left.as_ref().is_none_or(|left| left.contains(&session.number))
    }
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum EchoState {
    /// It waits for the room. As it would be shown here, if the link goes meanwhile: a template, and where `to` goes.
    Unheard { template: Bytes, to_at: u32 },
    /// It waits for the room, and is heard from it only: who says it may not speak, or it is no plain message.
    NotShown,
    /// These sessions were shown it before the room had it.
    Shown { to: BTreeSet<String> },
}

/// What some of our users were told that is not so.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Split {
    /// Whom they do not see as they are.
    pub hidden: BTreeSet<String>,
    /// The sessions that were there when it was told. Who enters later sees everything as it comes.
    pub told: BTreeSet<u32>,
}

#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Room {
    pub sessions: BTreeMap<String, Session>,
    /// The last number given to a session.
    pub last: u32,
    pub occupants: BTreeMap<String, Vec<Version>>,
    /// In the order in which they were said.
    pub echoes: BTreeMap<u64, Echo>,
    /// Who was shown to whom as having left, before the room knew: its own word about it is not repeated.
    pub settled: BTreeMap<String, BTreeSet<String>>,
    /// Its messages carry ids of its own (XEP-0359), which an echo could not.
    pub gives_ids: bool,
    /// Since our users were told of the split, until all has come.
    pub split: Option<Split>,
}

impl Room {
    /// Whether one of our users has this nick.
    pub fn is_ours(&self, nick: &str) -> bool {
        self.sessions
            .values()
            .any(|session| session.joined && session.nick == nick)
    }

    pub fn sessions_of<'a>(&'a self, nick: &'a str) -> impl Iterator<Item = &'a String> + 'a {
        let of_nick = move |(_, session): &(&String, &Session)| session.joined && session.nick == nick;
        self.sessions.iter().filter(of_nick).map(|(address, _)| address)
    }

    /// Whether what the room says of this occupant waits, for those who were told of the split.
    pub fn is_hidden(&self, nick: &str) -> bool {
        let Some(split) = &self.split else { return false };
        // Who was one of ours when they were shown is gone on only if that is said, too.
        let versions = || self.occupants.get(nick).into_iter().flatten();
        let is_shown = || versions().any(|version| !version.shown_to.is_disjoint(&split.told));
        split.hidden.contains(nick) || !self.is_ours(nick) && !is_shown()
    }

    /// Whether this session was told of the split.
    pub fn was_told(&self, address: &str) -> bool {
        let number = self.sessions.get(address).map(|session| session.number);
        self.split
            .as_ref()
            .zip(number)
            .is_some_and(|(split, number)| split.told.contains(&number))
    }

    /// A session that has asked to enter.
    pub fn add_session(&mut self, address: &str, nick: &str) {
        self.last += 1;
        let session = Session {
            nick: nick.to_owned(),
            joined: false,
            provisional: None,
            number: self.last,
            again: None,
        };
        self.sessions.insert(address.to_owned(), session);
    }

    /// The addresses of those who were shown this.
    pub fn viewers<'a>(&'a self, version: &'a Version) -> impl Iterator<Item = &'a String> + 'a {
        let sees = |(_, session): &(&String, &Session)| version.shown_to.contains(&session.number);
        self.sessions.iter().filter(sees).map(|(address, _)| address)
    }

    /// What a session was last shown of an occupant.
    pub fn version(&self, nick: &str, session: &str) -> Option<&Version> {
        let (versions, session) = (self.occupants.get(nick)?, self.sessions.get(session)?);
        versions
            .iter()
            .find(|version| version.shown_to.contains(&session.number))
    }

    /// These sessions were shown this of the occupant.
    pub fn show(&mut self, nick: &str, cast: &Cast, addresses: &[String]) {
        self.hide(nick, addresses);
        let numbers = self.numbers(addresses);
        if numbers.is_empty() {
            return;
        }
        let versions = self.occupants.entry(nick.to_owned()).or_default();
        let same = versions
            .iter_mut()
            .find(|version| version.template == cast.template && version.to_at == cast.to_at);
        match same {
            Some(version) => version.shown_to.extend(numbers),
            None => versions.push(Version {
                // A copy, so that the recipients of the entry are not kept in memory with it.
                template: Bytes::copy_from_slice(&cast.template),
                to_at: cast.to_at,
                shown_to: numbers.into_iter().collect(),
            }),
        }
    }

    /// These sessions no longer see the occupant.
    pub fn hide(&mut self, nick: &str, addresses: &[String]) {
        let numbers = self.numbers(addresses);
        let Some(versions) = self.occupants.get_mut(nick) else {
            return;
        };
        for version in versions.iter_mut() {
            for number in &numbers {
                version.shown_to.remove(number);
            }
        }
        versions.retain(|version| !version.shown_to.is_empty());
        if versions.is_empty() {
            self.occupants.remove(nick);
        }
    }

    fn numbers(&self, addresses: &[String]) -> Vec<u32> {
        let sessions = addresses.iter().filter_map(|address| self.sessions.get(address));
        sessions.map(|session| session.number).collect()
    }

    /// The room has put a session out; the nicks whose rows changed are given back. One that has asked to enter again still asks.
    pub fn put_out(&mut self, address: &str) -> Vec<String> {
        let asks = self.sessions.get(address).filter(|session| session.again.is_some());
        let asks = asks.map(|session| (session.nick.clone(), session.again.clone()));
        let changed = self.remove_session(address);
        if let Some((nick, again)) = asks {
            self.add_session(address, &nick);
            if let Some(session) = self.sessions.get_mut(address) {
                session.again = again;
            }
        }
        changed
    }

    /// A session is out; the nicks whose rows changed are given back.
    pub fn remove_session(&mut self, session: &str) -> Vec<String> {
        let Some(Session { number, .. }) = self.sessions.remove(session) else {
            return Vec::new();
        };
        let mut changed = Vec::new();
        for (nick, versions) in &mut self.occupants {
            let saw = versions.iter_mut().any(|version| version.shown_to.remove(&number));
            if saw {
                versions.retain(|version| !version.shown_to.is_empty());
                changed.push(nick.clone());
            }
        }
        self.occupants.retain(|_, versions| !versions.is_empty());
        changed
    }

    /// Whether nobody of ours is in it, and the room has said all that was shown here before it.
    pub fn is_over(&self) -> bool {
        self.sessions.is_empty() && self.settled.is_empty() && self.echoes_shown() == 0
    }

    /// Whether a session has not heard a message from the room.
    pub fn is_left_to(&self, echo: &Echo, address: &str) -> bool {
        self.sessions
            .get(address)
            .is_some_and(|session| echo.is_left_to(session))
    }

    /// Messages that were shown here and that the room has not taken.
    pub fn echoes_shown(&self) -> usize {
        let shown = |echo: &&Echo| matches!(echo.state, EchoState::Shown { .. });
        self.echoes.values().filter(shown).count()
    }

    /// The number of a message that waits for the room.
    pub fn echo_of(&self, nick: &str, id: &str) -> Option<u64> {
        self.find_echo(|echo| echo.nick == nick && echo.id == id)
    }

    /// The same for what the room has said. What had no id is known by its words; so is, from one whom he was never shown, what its author
    /// said under a nick whose change was lost with a process.
    pub fn echo_said(&self, nick: &str, id: &str, stanza: &Stanza) -> Option<u64> {
        let is_known = |author: &str| {
            self.sessions_of(author)
                .any(|session| self.version(nick, session).is_some())
        };
        let words = body_mark(&node_of(stanza));
        let is_said = |echo: &Echo| (echo.id == id || echo.id.is_empty()) && echo.words == words;
        self.find_echo(|echo| echo.nick == nick && echo.id == id && !id.is_empty())
            .or_else(|| self.find_echo(|echo| echo.nick == nick && echo.id.is_empty() && echo.words == words))
            .or_else(|| self.find_echo(|echo| is_said(echo) && !is_known(&echo.nick)))
    }

    fn find_echo(&self, is_it: impl Fn(&Echo) -> bool) -> Option<u64> {
        let found = self.echoes.iter().find(|(_, echo)| is_it(echo));
        found.map(|(number, _)| *number)
    }

    /// The room has said the message of this number to these: gives those who had seen it. It is kept until all have heard it from the
    /// room, who may be told in more than one go.
    pub fn echo_seen<'a>(&mut self, number: u64, told: impl Iterator<Item = &'a String>) -> BTreeSet<String> {
        let Some(echo) = self.echoes.get_mut(&number) else {
            return BTreeSet::new();
        };
        let EchoState::Shown { to } = &mut echo.state else {
            let joined = self.sessions.values().filter(|session| session.joined);
            let joined: BTreeSet<u32> = joined.map(|session| session.number).collect();
            let told = told.filter_map(|address| self.sessions.get(address));
            let told: BTreeSet<u32> = told.map(|session| session.number).collect();
            let left = &echo.left.take().unwrap_or_else(|| joined.clone()) - &told;
            // Who has left since hears it no more.
            let left = &left & &joined;
            match left.is_empty() {
                true => drop(self.echoes.remove(&number)),
                false => echo.left = Some(left),
            }
            return BTreeSet::new();
        };
        let seen = told.filter(|address| to.remove(*address)).cloned().collect();
        if to.is_empty() {
            self.echoes.remove(&number);
        }
        seen
    }

    /// The room has let one in that had asked for it under this: gives the echoes that it has had for this one, before or while it was out.
    /// Of its own words those are said by then, of others' those that nobody waits for any more.
    pub fn echoes_had(&self, address: &str, nick: &str, again: &Again) -> Vec<u64> {
        let is_had = |(number, echo): &(&u64, &Echo)| match &echo.state {
            EchoState::Unheard { .. } | EchoState::NotShown => false,
            EchoState::Shown { to } if !to.contains(address) => false,
            EchoState::Shown { .. } if echo.nick == nick => **number <= again.after,
            EchoState::Shown { to } => to.len() == 1,
        };
        self.echoes.iter().filter(is_had).map(|(number, _)| *number).collect()
    }

    /// Which of these wait for something that this author has said before, and that others were shown: the room has not said it to its author.
    pub fn waiting_for(&self, author: &str, before: u64, joined: &BTreeSet<String>) -> BTreeSet<String> {
        let earlier = self.echoes.range(..before).filter(|(_, echo)| echo.nick == author);
        let mut waits = BTreeSet::new();
        for (_, echo) in earlier {
            match &echo.state {
                EchoState::Unheard { .. } => {}
                EchoState::NotShown => {
                    let left = joined.iter().filter(|address| self.is_left_to(echo, address));
                    waits.extend(left.cloned());
                }
                EchoState::Shown { to } if self.sessions_of(author).any(|session| to.contains(session)) => {
                    waits.extend(joined.difference(to).cloned());
                }
                EchoState::Shown { .. } => {}
            }
        }
        waits
    }

    /// The room has said this of its author's. What he said before and was heard from nobody else the room has not taken.
    pub fn passed_over(&self, number: u64) -> Vec<u64> {
        let is_over = |echo: &Echo| echo.left.is_none() && echo.state == EchoState::NotShown;
        self.earlier(number, is_over)
    }

    /// What its author said before and some have heard: whoever hears this has heard that.
    pub fn in_between(&self, number: u64) -> Vec<u64> {
        self.earlier(number, |echo| echo.left.is_some())
    }

    fn earlier(&self, number: u64, is_it: impl Fn(&Echo) -> bool) -> Vec<u64> {
        let Some(Echo { nick, .. }) = self.echoes.get(&number) else {
            return Vec::new();
        };
        let earlier = self.echoes.range(..number);
        let earlier = earlier.filter(|(_, echo)| echo.nick == *nick && is_it(echo));
        earlier.map(|(number, _)| *number).collect()
    }

    pub fn is_too_large(&self) -> bool {
        self.sessions.len() > SESSIONS_MAX || self.occupants.len() > OCCUPANTS_MAX
    }

    /// Its own row: everything but occupants and echoes.
    pub fn encode(&self) -> Bytes {
        let mut out = begin_row();
        out.push(u8::from(self.gives_ids) | u8::from(self.split.is_some()) << 1);
        put_len(&mut out, self.last as usize);
        put_len(&mut out, self.sessions.len());
        for (address, session) in &self.sessions {
            put_prefixed(&mut out, address.as_bytes());
            put_prefixed(&mut out, session.nick.as_bytes());
            let flags = [session.joined, session.provisional.is_some(), session.again.is_some()];
            out.push(flags.iter().rev().fold(0, |bits, flag| bits << 1 | u8::from(*flag)));
            put_len(&mut out, session.number as usize);
            if let Some(shown) = &session.provisional {
                put_prefixed(&mut out, shown);
            }
            if let Some(again) = &session.again {
                put_prefixed(&mut out, again.id.as_bytes());
                put_prefixed(&mut out, &again.after.to_be_bytes());
            }
        }
        put_len(&mut out, self.settled.len());
        for (nick, sessions) in &self.settled {
            put_prefixed(&mut out, nick.as_bytes());
            put_texts(&mut out, sessions);
        }
        if let Some(split) = &self.split {
            put_texts(&mut out, &split.hidden);
            put_numbers(&mut out, &split.told);
        }
        out.into()
    }

    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = row(bytes)?;
        let flags = reader.byte().ok()?;
        let mut room = Self {
            gives_ids: flags & 1 != 0,
            ..Self::default()
        };
        room.last = number(&mut reader)?;
        for _ in 0..reader.len_upto(SESSIONS_MAX + 1).ok()? {
            let address = text(&mut reader)?;
            let nick = text(&mut reader)?;
            let flags = reader.byte().ok()?;
            let number = number(&mut reader)?;
            let provisional = match flags & 2 != 0 {
                true => Some(Bytes::copy_from_slice(reader.prefixed(PART_MAX).ok()?)),
                false => None,
            };
            let again = match flags & 4 != 0 {
                true => Some(Again {
                    id: text(&mut reader)?,
                    after: u64::from_be_bytes(reader.prefixed(8).ok()?.try_into().ok()?),
                }),
                false => None,
            };
            let session = Session {
                nick,
                joined: flags & 1 != 0,
                provisional,
                number,
                again,
            };
            room.sessions.insert(address, session);
        }
        for _ in 0..reader.len_upto(OCCUPANTS_MAX).ok()? {
            let nick = text(&mut reader)?;
            room.settled.insert(nick, texts(&mut reader)?);
        }
        if flags & 2 != 0 {
            room.split = Some(Split {
                hidden: texts(&mut reader)?,
                told: numbers(&mut reader)?,
            });
        }
        reader.finish().ok()?;
        Some(room)
    }

    pub fn encode_occupant(&self, nick: &str) -> Option<Bytes> {
        let versions = self.occupants.get(nick)?;
        let mut out = begin_row();
        put_len(&mut out, versions.len());
        for version in versions {
            put_prefixed(&mut out, &version.template);
            put_len(&mut out, version.to_at as usize);
            put_numbers(&mut out, &version.shown_to);
        }
        Some(out.into())
    }

    pub fn decode_occupant(bytes: &[u8]) -> Option<Vec<Version>> {
        let mut reader = row(bytes)?;
        let mut versions = Vec::new();
        for _ in 0..reader.len_upto(SESSIONS_MAX + 1).ok()? {
            let template = Bytes::copy_from_slice(reader.prefixed(PART_MAX).ok()?);
            let to_at = u32::try_from(reader.len_upto(template.len()).ok()?).ok()?;
            let shown_to = numbers(&mut reader)?;
            versions.push(Version {
                template,
                to_at,
                shown_to,
            });
        }
        reader.finish().ok()?;
        Some(versions)
    }
}

impl Echo {
    pub fn encode(&self) -> Bytes {
        let mut out = begin_row();
        put_prefixed(&mut out, self.nick.as_bytes());
        put_prefixed(&mut out, self.id.as_bytes());
        put_varint(&mut out, self.words);
        out.push(u8::from(self.left.is_some()));
        if let Some(left) = &self.left {
            put_numbers(&mut out, left);
        }
        match &self.state {
            EchoState::Unheard { template, to_at } => {
                out.push(0);
                put_prefixed(&mut out, template);
                put_len(&mut out, *to_at as usize);
            }
            EchoState::NotShown => out.push(2),
            EchoState::Shown { to } => {
                out.push(1);
                put_texts(&mut out, to);
            }
        }
        out.into()
    }

    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = row(bytes)?;
        let (nick, id) = (text(&mut reader)?, text(&mut reader)?);
        let words = reader.varint().ok()?;
        let left = match reader.byte().ok()? {
            0 => None,
            _ => Some(numbers(&mut reader)?),
        };
        let state = match reader.byte().ok()? {
            0 => {
                let template = Bytes::copy_from_slice(reader.prefixed(PART_MAX).ok()?);
                let to_at = u32::try_from(reader.len_upto(template.len()).ok()?).ok()?;
                EchoState::Unheard { template, to_at }
            }
            1 => EchoState::Shown {
                to: texts(&mut reader)?,
            },
            2 => EchoState::NotShown,
            _ => return None,
        };
        reader.finish().ok()?;
        Some(Self {
            nick,
            id,
            words,
            state,
            left,
        })
    }
}

/// The rest of a row of the one version that there is.
pub fn row(bytes: &[u8]) -> Option<Reader<'_>> {
    let mut reader = Reader::new(bytes);
    (reader.byte() == Ok(ROW_VERSION)).then_some(reader)
}

pub fn begin_row() -> Vec<u8> {
    vec![ROW_VERSION]
}

pub fn text(reader: &mut Reader<'_>) -> Option<String> {
    let bytes: Result<&[u8], ReadError> = reader.prefixed(PART_MAX);
    String::from_utf8(bytes.ok()?.to_vec()).ok()
}

fn number(reader: &mut Reader<'_>) -> Option<u32> {
    reader.len_upto(u32::MAX as usize).ok()?.try_into().ok()
}

fn put_numbers(out: &mut Vec<u8>, numbers: &BTreeSet<u32>) {
    put_len(out, numbers.len());
    for &number in numbers {
        put_len(out, number as usize);
    }
}

fn numbers(reader: &mut Reader<'_>) -> Option<BTreeSet<u32>> {
    let count = reader.len_upto(SESSIONS_MAX + 1).ok()?;
    (0..count).map(|_| number(reader)).collect()
}

fn put_texts(out: &mut Vec<u8>, texts: &BTreeSet<String>) {
    put_len(out, texts.len());
    for text in texts {
        put_prefixed(out, text.as_bytes());
    }
}

fn texts(reader: &mut Reader<'_>) -> Option<BTreeSet<String>> {
    let count = reader.len_upto(OCCUPANTS_MAX).ok()?;
    (0..count).map(|_| text(reader)).collect()
}
