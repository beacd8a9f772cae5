//! The last words of our rooms, so that those which were lost on the way are found.
//!
//! A server without acknowledgements (XEP-0198) does not know what we had taken in when our process was killed: what was on its way then, the
//! room's far occupants would never hear. But a room repeats its last words to who enters, also to one who is inside and enters again
//! ([XEP-0045 §7.2.13](https://xmpp.org/extensions/xep-0045.html#enter-history)). So we keep a mark of each message that a room of ours
//! says to far occupants, in the batch that carries it. A process that begins asks each such room once, in the name of one of them, and
//! sends what is missing to all that were inside, with the time that the room tells (XEP-0203). Whether they are is asked as well, and
//! answered before that; and of those who have entered since the last that they were sent, it is known when, and what they were told then.
//!
//! ```text
//!            begun                 the guest is inside              its subject comes
//!  (none) ─────────▶ Suspected ────────────────────────▶ Asked ───────────────────────▶ (none)
//!                        │     (XEP-0410, then it enters)   │       or too late           ▲
//!                        └──────────────────────────────────┴─────────────────────────────┘
//!                               too late, or nobody is inside
//! ```
//!
//! The answer begins with the guest's own presence, under the id with which we asked, and ends with the subject. All between them is for us,
//! also when nobody waits for it any more, or a process before this one had asked.
//!
//! What the room says while it is suspected or asked waits for what is missing, so that its order is kept; it is written down, for its server
//! takes it for accepted.
//!
//! Words are lost where a process ended: they are what the history has between the last that is marked and the first that waits, and
//! after what waited in a process that was killed, too. Where one of those is not found in the history, nothing is certain, and
//! nothing is sent: never is a word said twice. What has no body, and what a room's history does not hold, is not found.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, UNIX_EPOCH},
};

use bytes::Bytes;

use super::{
    Output,
    room::{SESSIONS_MAX, begin_row, row},
    rows::{self, Rows},
    words::{has_body, is_wish_of, mark_of, node_of},
};
use crate::{
    codec::varint::{Reader, put_len, put_varint},
    stanza::{Kind, Stanza, ns, resource_of},
    time::{Mono, Now, Wall},
};

/// Marks kept of a room. It finds the place in a history of 20, which both servers keep as shipped, also if words repeat.
const MARKS_MAX: usize = 32;
/// Rooms that are asked when a process begins: those that spoke last. Each answers with all who are in it.
const ROOMS_MAX: usize = 100;
/// Lines of history asked for. Servers have fewer as shipped.
pub const LINES_MAX: usize = 50;
/// The wait for a room's answer. Servers answer in milliseconds; before it, they and we set up a stream each.
const PATIENCE: Duration = Duration::from_secs(10);
/// So long an answer may be on its way for one that is no guest any more.
const STRAY_MAX: Duration = Duration::from_secs(300);
/// What rooms say meanwhile, in all of them together: some thousand lines. Beyond it nothing waits any more.
const HELD_BYTES_MAX: usize = 4 << 20;

/// What a room has said to far occupants.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Tail {
    /// When the first of them was let in.
    since: Wall,
    said_at: Wall,
    /// Marks, the latest last.
    said: VecDeque<u64>,
    /// Marks of those who were sent the latest; `None` when it is known from a history.
    served: Option<BTreeSet<u64>>,
    /// By their marks, those who have entered and were sent nothing since: what they know from the history that they got.
    newcomers: BTreeMap<u64, Entrance>,
    /// A mark of the latest subject, if one was told.
    subject: Option<u64>,
    /// The latest copy without its address, and its mark: the next ones need not be read.
    copy: Option<(u64, u64)>,
}

/// When one has entered a room, and the last that it was told then, as a mark.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Entrance {
    at: Wall,
    told: Option<u64>,
}

impl Entrance {
    /// What it will be told has all.
    const TO_COME: Self = Self {
        at: Wall(u64::MAX),
        told: None,
    };

    /// Whether it was told what stands at this place in the history, or had not entered when that was said. A server that tells seconds only
    /// leaves that open for one: then it had not.
    fn knows(&self, history: &VecDeque<Line>, at: usize) -> bool {
        let told = |mark| history.iter().rposition(|line| line.mark == mark);
        match self.told.and_then(told) {
            Some(last) => at <= last,
            None => history[at].stamp.is_none_or(|stamp| stamp <= self.at),
        }
    }
}

/// A line of a room's history.
#[derive(Clone, Debug)]
pub struct Line {
    pub stanza: Stanza,
    pub mark: u64,
    pub stamp: Option<Wall>,
}

/// A copy that waits.
#[derive(Debug)]
struct Held {
    /// `None` once it has crossed, because who it is for was about to leave.
    stanza: Option<Stanza>,
    mark: u64,
    to: String,
    /// Of its row, and whether it is there.
    number: u64,
    written: bool,
    /// It waited in an earlier process.
    old: bool,
}

/// The copies of one message that wait.
struct Event {
    mark: u64,
    copies: Vec<Held>,
}

#[derive(Debug)]
enum Stage {
    Suspected,
    Asked {
        guest: String,
        /// Of the wish to enter.
        id: String,
        /// It was let in again: what follows to it is history, and then the subject.
        entered: bool,
    },
}

/// An answer to us in the name of one that is no guest any more.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stray {
    /// It has left before the room had answered; the room hears of that after our question.
    Asked,
    /// The same, and the room has let it in for us: history and subject follow.
    Told,
    /// The room had put it out before it heard our question, has let it in, and is told that it leaves: what it tells one who enters is for us.
    Unwanted,
}

/// What history and subject are to a guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Expected {
    /// It has asked to enter.
    Answer,
    /// We have, in its name.
    Repetition,
    Nothing,
}

/// A room that may have said more than we know.
#[derive(Debug)]
struct Check {
    stage: Stage,
    until: Mono,
    /// Who was inside when the last process ended, and is.
    inside: BTreeSet<String>,
    history: VecDeque<Line>,
    held: Vec<Held>,
}

/// What a group message is here.
pub enum Word {
    Said(u64),
    Line {
        mark: u64,
        stamp: Option<Wall>,
    },
    /// With a mark of it.
    Subject(u64),
    Other,
}

#[derive(Debug, Default)]
pub struct Tails {
    tails: BTreeMap<String, Tail>,
    checks: BTreeMap<String, Check>,
    held_bytes: usize,
    /// The last number given to a copy that waits.
    last: u64,
    /// What waited in an earlier process, by room and number.
    held: BTreeMap<(String, u64), Stanza>,
    /// Rows of what waits no more.
    useless: Vec<Bytes>,
    /// Rooms whose rows are to be written.
    changed: BTreeSet<String>,
    /// History that nobody has asked for was for a process before this one, whose question is not known any more.
    doubtful_until: Option<Mono>,
    /// By room and address, and until when they may come: they may be lost. One for each room that was asked.
    strays: BTreeMap<(String, String), (Stray, Mono)>,
    /// Of the last of them.
    strays_until: Option<Mono>,
    found: u64,
}

impl Tails {
    pub fn load(&mut self, room: &str, value: &[u8]) -> Option<()> {
        self.tails.insert(room.to_owned(), Tail::decode(value)?);
        Some(())
    }

    pub fn load_held(&mut self, room: &str, number: &[u8], value: &[u8]) -> Option<()> {
        let number = u64::from_be_bytes(number.try_into().ok()?);
        let stanza = Stanza::parse(Bytes::copy_from_slice(value)).ok()?;
        self.held.insert((room.to_owned(), number), stanza);
        self.last = self.last.max(number);
        Some(())
    }

    /// Messages that were found and sent on.
    pub fn found(&self) -> u64 {
        self.found
    }

    /// A process begins: these are in our rooms. Gives those who may be asked about first.
    pub fn suspect(
        &mut self,
        inside: BTreeMap<String, BTreeSet<String>>,
        now: Now,
        outputs: &mut VecDeque<Output>,
    ) -> Vec<(String, String)> {
        let said_at = |room: &String| self.tails.get(room).map(|tail| tail.said_at);
        let mut rooms: Vec<_> = inside.into_iter().filter(|(room, _)| said_at(room).is_some()).collect();
        rooms.sort_by_key(|(room, _)| std::cmp::Reverse(said_at(room)));
        self.doubtful_until = Some(now.mono + PATIENCE);
        let mut first = Vec::new();
        for (room, inside) in rooms.into_iter().take(ROOMS_MAX) {
            first.extend(inside.first().map(|guest| (room.clone(), guest.clone())));
            let check = Check {
                stage: Stage::Suspected,
                until: now.mono + PATIENCE,
                inside,
                history: VecDeque::new(),
                held: Vec::new(),
            };
            self.checks.insert(room, check);
        }
        for ((room, number), stanza) in std::mem::take(&mut self.held) {
            let word = self.tails.get_mut(&room).map(|tail| tail.read(&stanza, &room));
            match (word, self.checks.get_mut(&room), stanza.to()) {
                (Some(Word::Said(mark)), Some(check), Some(to)) => {
                    self.held_bytes += stanza.bytes().len();
                    let to = to.into_owned();
                    check.held.push(Held {
                        stanza: Some(stanza),
                        mark,
                        to,
                        number,
                        written: true,
                        old: true,
                    });
                }
                _ => {
                    self.useless.push(held_key(&room, number));
                    outputs.push_back(Output::Cross(stanza));
                }
            }
        }
        first
    }

    pub fn holds_words(&self) -> bool {
        self.held_bytes > 0
    }

    pub fn poll_timeout(&self) -> Option<Mono> {
        self.checks.values().map(|check| check.until).min()
    }

    pub fn handle_timeout(&mut self, now: Now, outputs: &mut VecDeque<Output>) {
        let late = self.checks.iter().filter(|(_, check)| check.until <= now.mono);
        for room in late.map(|(room, _)| room.clone()).collect::<Vec<_>>() {
            self.conclude(&room, now, outputs);
        }
    }

    /// Whether a room is yet to be asked for its last words.
    pub fn is_suspected(&self, room: &str) -> bool {
        let stage = self.checks.get(room).map(|check| &check.stage);
        matches!(stage, Some(Stage::Suspected))
    }

    pub fn asked(&mut self, room: &str, guest: &str, id: &str) {
        if let Some(check) = self.checks.get_mut(room) {
            check.stage = Stage::Asked {
                guest: guest.to_owned(),
                id: id.to_owned(),
                entered: false,
            };
        }
    }

    /// The room has let a guest in again because we have asked for it under this id: it repeats its last words.
    pub fn repeats(&mut self, room: &str, guest: &str, wish: &str) {
        if let Some(Stage::Asked {
            guest: asked,
            id,
            entered,
        }) = self.checks.get_mut(room).map(|check| &mut check.stage)
        {
            *entered |= asked == guest && id == wish;
        }
    }

    /// The room has let in a guest that had asked for it: says whether something was to come before that.
    pub fn entered(&mut self, room: &str, guest: &str, now: Now, outputs: &mut VecDeque<Output>) -> bool {
        let tail = self.tails.entry(room.to_owned()).or_insert_with(|| Tail::new(now));
        // What was said before is in the history that it gets. And what has waited for it comes before that.
        let held = self.held_bytes;
        if let Some(check) = self.checks.get_mut(room) {
            check.release(guest, room, &mut self.held_bytes, &mut self.useless, outputs);
        }
        let mark = mark_of(&[guest.as_bytes()]);
        if let Some(served) = &mut tail.served {
            served.insert(mark);
        }
        let entrance = Entrance {
            at: now.wall,
            told: None,
        };
        tail.newcomers.insert(mark, entrance);
        self.changed.insert(room.to_owned());
        self.held_bytes < held
    }

    /// The room has refused something that we have said in a guest's name.
    pub fn refused(&mut self, room: &str, guest: &str, now: Now, outputs: &mut VecDeque<Output>) {
        self.strays.remove(&(room.to_owned(), guest.to_owned()));
        let stage = self.checks.get(room).map(|check| &check.stage);
        if let Some(Stage::Asked {
            guest: asked, entered, ..
        }) = stage
            && asked == guest
            && !entered
        {
            self.conclude(room, now, outputs);
        }
    }

    /// A guest enters by itself: the history that it gets has what was lost. Says whether one that it gets before that is for us.
    pub fn enters(&mut self, room: &str, guest: &str) -> bool {
        if let Some(tail) = self.tails.get_mut(room) {
            tail.newcomers.insert(mark_of(&[guest.as_bytes()]), Entrance::TO_COME);
            self.changed.insert(room.to_owned());
        }
        let key = (room.to_owned(), guest.to_owned());
        let is_known = matches!(self.strays.get(&key), Some((Stray::Asked | Stray::Told, _)));
        is_known && self.strays.remove(&key).is_some_and(|(stray, _)| stray == Stray::Told)
    }

    /// A guest leaves by itself, and the room may still answer what we have asked in its name, or does so: that comes before it hears of this.
    pub fn leaves(&mut self, room: &str, guest: &str, is_told: bool, now: Now) {
        let stage = self.checks.get(room).map(|check| &check.stage);
        let is_asked = matches!(stage, Some(Stage::Asked { guest: asked, entered: false, .. }) if asked == guest);
        // Or a process before this one has asked.
        let is_asked = is_asked || self.doubtful_until > Some(now.mono);
        let stray = match (is_told, is_asked) {
            (true, _) => Stray::Told,
            (false, true) => Stray::Asked,
            (false, false) => return,
        };
        self.expect_stray(room, guest, stray, now);
    }

    pub fn expects_strays(&mut self, now: Now) -> bool {
        if self.strays_until <= Some(now.mono) {
            self.strays.clear();
        }
        !self.strays.is_empty()
    }

    fn expect_stray(&mut self, room: &str, guest: &str, stray: Stray, now: Now) {
        let until = now.mono + STRAY_MAX;
        self.strays_until = Some(until);
        self.strays.insert((room.to_owned(), guest.to_owned()), (stray, until));
    }

    pub fn has_stray(&self, room: &str, to: &str) -> bool {
        self.strays.contains_key(&(room.to_owned(), to.to_owned()))
    }

    /// Whether this answers what we have asked in the name of one that is no guest any more.
    pub fn is_stray(&mut self, stanza: &Stanza, room: &str, to: &str, now: Now) -> bool {
        let key = (room.to_owned(), to.to_owned());
        let Some((stray, until)) = self.strays.get_mut(&key).filter(|_| stanza.kind() != Kind::Iq) else {
            return false;
        };
        let is_own = stanza.kind() == Kind::Presence && stanza.has_muc_status("110");
        let is_ours = || stanza.id().is_some_and(|id| is_wish_of(&id, to));
        match (*stray, is_own, stanza.stanza_type().is_none()) {
            _ if *until <= now.mono => drop(self.strays.remove(&key)),
            // Or it has left by itself before a process was killed, and this is the answer.
            (Stray::Unwanted, true, false) => drop(self.strays.remove(&key)),
            // It has asked itself since.
            (Stray::Unwanted, true, true) if !is_ours() => drop(self.strays.remove(&key)),
            (Stray::Asked | Stray::Told, true, false) => drop(self.strays.remove(&key)),
            (Stray::Asked, true, true) if is_ours() => *stray = Stray::Told,
            (Stray::Told, true, true) if !is_ours() => *stray = Stray::Asked,
            (Stray::Asked, ..) | (Stray::Told, true, true) => {}
            (Stray::Unwanted, true, true) => return true,
            (Stray::Unwanted, false, is_available) if stanza.kind() == Kind::Presence => return is_available,
            (Stray::Told | Stray::Unwanted, false, _) => {
                return match Tail::new(now).read(stanza, room) {
                    Word::Line { .. } => true,
                    Word::Subject(_) => {
                        if *stray == Stray::Told {
                            *stray = Stray::Asked;
                        }
                        true
                    }
                    Word::Said(_) | Word::Other => false,
                };
            }
        }
        false
    }

    /// What a room has to say to this one comes because of us, until it is out again.
    pub fn expect_unwanted(&mut self, room: &str, guest: &str, now: Now) {
        self.expect_stray(room, guest, Stray::Unwanted, now);
    }

    /// A guest is out, or enters by itself: it is told all it needs, and can be asked for nothing. What waits for it crosses before that.
    pub fn left(&mut self, room: &str, guest: &str, now: Now, outputs: &mut VecDeque<Output>) {
        if let Some(tail) = self.tails.get_mut(room) {
            tail.newcomers.remove(&mark_of(&[guest.as_bytes()]));
        }
        let Some(check) = self.checks.get_mut(room) else { return };
        check.inside.remove(guest);
        check.release(guest, room, &mut self.held_bytes, &mut self.useless, outputs);
        let is_asked = matches!(&check.stage, Stage::Asked { guest: asked, .. } if asked == guest);
        if is_asked || check.inside.is_empty() {
            self.conclude(room, now, outputs);
        }
    }

    /// Nobody of the peer's users is in it any more.
    pub fn close(&mut self, room: &str, now: Now, outputs: &mut VecDeque<Output>) {
        self.conclude(room, now, outputs);
        if self.tails.remove(room).is_some() {
            self.changed.insert(room.to_owned());
        }
    }

    /// What a group message says that a room sends to a guest.
    pub fn read(&mut self, stanza: &Stanza, room: &str, now: Now) -> Word {
        let tail = self.tails.entry(room.to_owned()).or_insert_with(|| Tail::new(now));
        tail.read(stanza, room)
    }

    /// The last words that a guest was sent, as marks, and the subject.
    pub fn heard(&self, room: &str, guest: &str) -> (VecDeque<u64>, Option<u64>) {
        let Some(tail) = self.tails.get(room) else {
            return (VecDeque::new(), None);
        };
        let mut said = tail.said.clone();
        let mark = mark_of(&[guest.as_bytes()]);
        if tail.served.as_ref().is_some_and(|served| !served.contains(&mark)) {
            said.pop_back();
        }
        (said, tail.subject)
    }

    /// A guest has all that a room's history tells, and this is the subject.
    pub fn caught_up(&mut self, room: &str, guest: &str, history: &VecDeque<Line>, subject: Option<u64>, now: Now) {
        let tail = self.tails.entry(room.to_owned()).or_insert_with(|| Tail::new(now));
        let begin = latest_in(history, &tail.said).map_or(0, |at| at + 1);
        let to = mark_of(&[guest.as_bytes()]);
        if begin < history.len() {
            history.range(begin..).for_each(|line| tail.push(line.mark));
            tail.served = Some(BTreeSet::from([to]));
        } else if let Some(served) = &mut tail.served {
            served.insert(to);
        }
        tail.subject = subject;
        tail.said_at = now.wall;
        self.changed.insert(room.to_owned());
    }

    /// What waits in a room does so no longer.
    pub fn settle(&mut self, room: &str, now: Now, outputs: &mut VecDeque<Output>) {
        self.conclude(room, now, outputs);
    }

    /// A message of a room to somebody in it: gives it back, unless it waits or is for us alone.
    pub fn hear(
        &mut self,
        stanza: Stanza,
        room: &str,
        to: &str,
        expected: Expected,
        now: Now,
        outputs: &mut VecDeque<Output>,
    ) -> Option<Stanza> {
        if stanza.stanza_type().as_deref() != Some("groupchat") {
            return Some(stanza);
        }
        let tail = self.tails.entry(room.to_owned()).or_insert_with(|| Tail::new(now));
        let word = tail.read(&stanza, room);
        let check = self.checks.get_mut(room);
        match (word, check) {
            (Word::Said(mark), Some(check)) => {
                self.held_bytes += stanza.bytes().len();
                self.last += 1;
                check.held.push(Held {
                    stanza: Some(stanza),
                    mark,
                    to: to.to_owned(),
                    number: self.last,
                    written: false,
                    old: false,
                });
                if self.held_bytes > HELD_BYTES_MAX {
                    self.conclude(room, now, outputs);
                }
                None
            }
            (Word::Said(mark), None) => {
                tail.note(mark, to, now);
                self.changed.insert(room.to_owned());
                Some(stanza)
            }
            (Word::Line { mark, stamp }, check) if expected == Expected::Repetition => {
                if let Some(check) = check.filter(|check| check.is_told(to)) {
                    check.history.push_back(Line { stanza, mark, stamp });
                    // A room that tells more than it was asked for.
                    if check.history.len() > LINES_MAX {
                        check.history.pop_front();
                    }
                }
                None
            }
            (Word::Line { .. }, _) if expected == Expected::Nothing && self.doubtful_until > Some(now.mono) => None,
            (Word::Line { mark, .. }, check) => {
                // That it has entered may be lost with a process.
                let held = self.held_bytes;
                if let Some(check) = check {
                    check.release(to, room, &mut self.held_bytes, &mut self.useless, outputs);
                }
                if tail.served.is_none() && !tail.said.contains(&mark) {
                    tail.push(mark);
                }
                let newcomer = tail.newcomers.entry(mark_of(&[to.as_bytes()]));
                newcomer
                    .or_insert(Entrance {
                        at: now.wall,
                        told: None,
                    })
                    .told = Some(mark);
                self.changed.insert(room.to_owned());
                if self.held_bytes < held {
                    outputs.push_back(Output::Cross(stanza));
                    return None;
                }
                Some(stanza)
            }
            (Word::Subject(_), Some(check)) if expected == Expected::Repetition && check.is_told(to) => {
                self.conclude(room, now, outputs);
                // After what was missing and what has waited.
                outputs.push_back(Output::Cross(stanza));
                None
            }
            (Word::Subject(mark), _) => {
                if tail.subject.replace(mark) != Some(mark) {
                    self.changed.insert(room.to_owned());
                }
                Some(stanza)
            }
            (Word::Other, _) => Some(stanza),
        }
    }

    /// Sends on what is missing, and then what has waited for it.
    fn conclude(&mut self, room: &str, now: Now, outputs: &mut VecDeque<Output>) {
        let Some(mut check) = self.checks.remove(room) else {
            return;
        };
        let history = std::mem::take(&mut check.history);
        let held = std::mem::take(&mut check.held);
        for Held { stanza, number, .. } in &held {
            self.held_bytes -= stanza.as_ref().map_or(0, |stanza| stanza.bytes().len());
            self.useless.push(held_key(room, *number));
        }
        if let Some(tail) = self.tails.get_mut(room) {
            let (words, found) = tail.words(&history, events(held), &check.inside);
            self.found += found;
            for (stanza, mark, to) in words {
                tail.note(mark, &to, now);
                outputs.extend(stanza.map(Output::Cross));
            }
            // They have the latest, from the room or its history.
            let newcomers = tail.newcomers.keys();
            tail.served
                .iter_mut()
                .for_each(|served| served.extend(newcomers.clone()));
            self.changed.insert(room.to_owned());
        } else {
            outputs.extend(held.into_iter().filter_map(|held| held.stanza).map(Output::Cross));
        }
    }

    /// Writes what has changed, in the batch with what it tells of. A tail that is not taken is only not found after a kill; what waits
    /// and is not taken waits no longer.
    pub fn flush(&mut self, now: Now, rows: &mut Rows, outputs: &mut VecDeque<Output>) {
        let mut refused = BTreeSet::new();
        for (room, check) in &mut self.checks {
            for held in check.held.iter_mut().filter(|held| !held.written) {
                let Some(stanza) = &held.stanza else { continue };
                held.written = rows.put(held_key(room, held.number), stanza.bytes().clone(), outputs);
                if !held.written {
                    refused.insert(room.clone());
                }
            }
        }
        for room in refused {
            self.conclude(&room, now, outputs);
        }
        for key in std::mem::take(&mut self.useless) {
            rows.remove(key, outputs);
        }
        for room in std::mem::take(&mut self.changed) {
            let key = rows::Kind::Tail.key(&room, b"");
            let written = self
                .tails
                .get(&room)
                .is_some_and(|tail| rows.put(key.clone(), tail.encode(), outputs));
            if !written {
                rows.remove(key, outputs);
            }
        }
    }

    pub fn forget(&mut self, now: Now, outputs: &mut VecDeque<Output>) {
        for room in self.tails.keys().cloned().collect::<Vec<_>>() {
            self.close(&room, now, outputs);
        }
    }
}

impl Check {
    /// What waits for this guest crosses now.
    fn release(
        &mut self,
        guest: &str,
        room: &str,
        held_bytes: &mut usize,
        useless: &mut Vec<Bytes>,
        outputs: &mut VecDeque<Output>,
    ) {
        for held in self.held.iter_mut().filter(|held| held.to == guest) {
            if let Some(stanza) = held.stanza.take() {
                *held_bytes -= stanza.bytes().len();
                useless.push(held_key(room, held.number));
                outputs.push_back(Output::Cross(stanza));
            }
        }
    }

    /// Whether history and subject to this guest are what we have asked for.
    fn is_told(&self, to: &str) -> bool {
        matches!(&self.stage, Stage::Asked { guest, entered: true, .. } if guest == to)
    }
}

impl Tail {
    fn new(now: Now) -> Self {
        Self {
            since: now.wall,
            said_at: now.wall,
            said: VecDeque::new(),
            served: None,
            newcomers: BTreeMap::new(),
            subject: None,
            copy: None,
        }
    }

    fn read(&mut self, stanza: &Stanza, room: &str) -> Word {
        let Some(((template, _, _), from)) = stanza.split_to().zip(stanza.from()) else {
            return Word::Other;
        };
        let copy = mark_of(&[&template]);
        if let Some((_, mark)) = self.copy.filter(|(same, _)| *same == copy) {
            return Word::Said(mark);
        }
        let node = node_of(stanza);
        if !has_body(&node) {
            return match node.child(ns::SERVER, "subject") {
                Some(subject) => {
                    let nick = resource_of(&from).unwrap_or_default();
                    Word::Subject(mark_of(&[nick.as_bytes(), subject.text.as_bytes()]))
                }
                None => Word::Other,
            };
        }
        let body = node.child(ns::SERVER, "body").map_or("", |body| &body.text);
        let id = stanza.id().unwrap_or_default();
        let mark = mark_of(&[
            resource_of(&from).unwrap_or_default().as_bytes(),
            id.as_bytes(),
            body.as_bytes(),
        ]);
        let mut delays = node.children_in(ns::DELAY);
        // Others' delays are what a message had to wait for before the room had it.
        match delays.find(|delay| delay.attribute("from") == Some(room)) {
            Some(delay) => Word::Line {
                mark,
                stamp: delay.attribute("stamp").and_then(wall_of),
            },
            None => {
                self.copy = Some((copy, mark));
                Word::Said(mark)
            }
        }
    }

    /// This was sent to this guest.
    fn note(&mut self, mark: u64, to: &str, now: Now) {
        let to = mark_of(&[to.as_bytes()]);
        self.newcomers.remove(&to);
        match &mut self.served {
            Some(served) if self.said.back() == Some(&mark) && !served.contains(&to) => {
                served.insert(to);
            }
            _ => {
                self.push(mark);
                self.served = Some(BTreeSet::from([to]));
            }
        }
        self.said_at = now.wall;
    }

    fn push(&mut self, mark: u64) {
        self.said.push_back(mark);
        if self.said.len() > MARKS_MAX {
            self.said.pop_front();
        }
    }

    /// What follows the words that are marked, copy by copy: what waited, and what is missing of the history; and how many messages
    /// were missing.
    fn words(
        &self,
        history: &VecDeque<Line>,
        events: Vec<Event>,
        inside: &BTreeSet<String>,
    ) -> (Vec<(Option<Stanza>, u64, String)>, u64) {
        let (mut words, mut found) = (Vec::new(), 0);
        let mut send = |at: usize, served: &dyn Fn(&String) -> bool| {
            let line = &history[at];
            let entrance = |guest: &String| self.newcomers.get(&mark_of(&[guest.as_bytes()]));
            let knows = |guest: &String| entrance(guest).is_some_and(|entrance| entrance.knows(history, at));
            let rest = inside.iter().filter(|guest| !served(guest) && !knows(guest));
            let copies = rest.filter_map(|to| Some((Some(line.stanza.with_to(to)?), line.mark, to.clone())));
            let copies: Vec<_> = copies.collect();
            found += u64::from(!copies.is_empty());
            copies
        };
        let latest = latest_in(history, &self.said);
        let mut begin = match latest {
            Some(at) => at + 1,
            // Nothing was said to anybody: all since they are there.
            None if self.said.is_empty() => history
                .iter()
                .position(|line| line.stamp.is_some_and(|stamp| stamp > self.since))
                .unwrap_or(history.len()),
            None => history.len(),
        };
        // The latest may not have gone to all. If the process ended in the middle of it, the rest waits.
        let mut events = events.into_iter().peekable();
        let was_served = |guest: &str| {
            let served = self.served.as_ref();
            served.is_none_or(|served| served.contains(&mark_of(&[guest.as_bytes()])))
        };
        // Who has entered since has it from the history, too.
        let is_new = |guest: &str| self.newcomers.contains_key(&mark_of(&[guest.as_bytes()]));
        let goes_on = |event: &Event| {
            let mut copies = event.copies.iter();
            self.said.back() == Some(&event.mark) && copies.all(|held| !was_served(&held.to) || is_new(&held.to))
        };
        let more = events.next_if(goes_on).map(|event| event.copies).unwrap_or_default();
        // Whether a process has ended after what came last.
        let mut gap = more.last().is_none_or(|held| held.old);
        if let Some(at) = latest {
            let waits = |guest: &String| more.iter().any(|held| held.to == *guest);
            words.extend(send(at, &|guest| was_served(guest) || waits(guest)));
        }
        words.extend(more.into_iter().map(|held| (held.stanza, held.mark, held.to)));
        for Event { mark, copies } in events {
            let found = history.range(begin..).position(|line| line.mark == mark);
            if let Some(ahead) = found.filter(|_| gap) {
                words.extend((begin..begin + ahead).flat_map(|at| send(at, &|_| false)));
            }
            let was_cut = gap || copies.iter().any(|held| held.old);
            gap = copies.last().is_some_and(|held| held.old);
            let line = found.map(|ahead| begin + ahead);
            begin = found.map_or(history.len(), |ahead| begin + ahead + 1);
            let served: BTreeSet<String> = copies.iter().map(|held| held.to.clone()).collect();
            words.extend(copies.into_iter().map(|held| (held.stanza, mark, held.to)));
            if let Some(line) = line.filter(|_| was_cut) {
                words.extend(send(line, &|guest| served.contains(guest)));
            }
        }
        if gap {
            words.extend((begin..history.len()).flat_map(|at| send(at, &|_| false)));
        }
        (words, found)
    }

    fn encode(&self) -> Bytes {
        let mut out = begin_row();
        put_varint(&mut out, self.since.0);
        put_varint(&mut out, self.said_at.0);
        out.push(u8::from(self.served.is_some()));
        put_len(&mut out, self.said.len());
        put_len(&mut out, self.served.as_ref().map_or(0, BTreeSet::len));
        put_len(&mut out, self.newcomers.len());
        for mark in self.said.iter().chain(self.served.iter().flatten()) {
            out.extend_from_slice(&mark.to_be_bytes());
        }
        for (guest, Entrance { at, told }) in &self.newcomers {
            out.extend_from_slice(&guest.to_be_bytes());
            put_varint(&mut out, at.0);
            out.push(u8::from(told.is_some()));
            out.extend(told.iter().flat_map(|told| told.to_be_bytes()));
        }
        if let Some(subject) = self.subject {
            out.extend_from_slice(&subject.to_be_bytes());
        }
        out.into()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = row(bytes)?;
        let since = Wall(reader.varint().ok()?);
        let said_at = Wall(reader.varint().ok()?);
        let has_served = reader.byte().ok()? != 0;
        let said = reader.len_upto(MARKS_MAX).ok()?;
        let served = reader.len_upto(2 * SESSIONS_MAX).ok()?;
        let newcomers = reader.len_upto(2 * SESSIONS_MAX).ok()?;
        let mark = |reader: &mut Reader<'_>| Some(u64::from_be_bytes(reader.take(8).ok()?.try_into().ok()?));
        let said = (0..said).map(|_| mark(&mut reader)).collect::<Option<_>>()?;
        let served = (0..served).map(|_| mark(&mut reader)).collect::<Option<_>>()?;
        let newcomer = |reader: &mut Reader<'_>| {
            let (guest, at) = (mark(reader)?, Wall(reader.varint().ok()?));
            let told = match reader.byte().ok()? {
                0 => None,
                _ => Some(mark(reader)?),
            };
            Some((guest, Entrance { at, told }))
        };
        let newcomers = (0..newcomers).map(|_| newcomer(&mut reader)).collect::<Option<_>>()?;
        let subject = match reader.is_empty() {
            true => None,
            false => Some(mark(&mut reader)?),
        };
        reader.finish().ok()?;
        Some(Self {
            since,
            said_at,
            said,
            served: has_served.then_some(served),
            newcomers,
            subject,
            copy: None,
        })
    }
}

/// Where the last of these marks stands in a history. Where words repeat, the place before which most is the same.
pub fn latest_in(history: &VecDeque<Line>, said: &VecDeque<u64>) -> Option<usize> {
    let is_latest = |&at: &usize| Some(&history[at].mark) == said.back();
    let alike = |at: usize| {
        let before = history.range(..=at).rev();
        before
            .zip(said.iter().rev())
            .take_while(|(line, mark)| line.mark == **mark)
            .count()
    };
    (0..history.len()).filter(is_latest).max_by_key(|&at| (alike(at), at))
}

/// Copies of one message are one event; the same words to the same guest are said again.
fn events(held: Vec<Held>) -> Vec<Event> {
    let mut events: Vec<Event> = Vec::new();
    for held in held {
        let mark = held.mark;
        let is_copy = |event: &&mut Event| event.mark == mark && event.copies.iter().all(|other| other.to != held.to);
        match events.last_mut().filter(is_copy) {
            Some(event) => event.copies.push(held),
            None => events.push(Event {
                mark,
                copies: vec![held],
            }),
        }
    }
    events
}

fn held_key(room: &str, number: u64) -> Bytes {
    rows::Kind::Held.key(room, &number.to_be_bytes())
}

/// XEP-0082 §3.2
fn wall_of(stamp: &str) -> Option<Wall> {
    let since = humantime::parse_rfc3339(stamp).ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(Wall(u64::try_from(since.as_millis()).ok()?))
}
