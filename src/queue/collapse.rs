//! Stanzas that are the same but for `to` become one cast.
//!
//! A server writes one copy of a broadcast for every far recipient. [`Collapse`] gives the first copy a number in the
//! spool at once and adds the recipients of the copies that follow, so the first copy can be on disk before the last one
//! has come. What it keeps true:
//!
//! 1. Two stanzas share a cast only if all their bytes outside `to` are equal, and an operator's rules have them wait alike. Never an id alone.
//! 2. Per recipient, the order of the numbers is the order in which the stanzas came: a recipient joins an open group only
//!    if it stands in no group of the same sender that was opened later. Otherwise a new group begins.
//! 3. A recipient that comes twice closes the group: a room that says the same thing twice is heard twice.
//! 4. Recipients are those that the server addressed, nobody else.
//!
//! # Life of a group
//!
//! ```text
//!           first copy             every session the room is known to have is reached,
//!   (none) ───────────▶ open ───── a recipient repeats, or the window ends ─────▶ sealed
//!                        │ ▲
//!                        └─┘ further copies
//! ```
//!
//! A group is *written* whenever it has changed and *sealed* once. Only sealed groups cross the link.
//! A *flow* is the bare address of a sender: a room, a user, a component. Order is kept within a flow.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;

use super::{place::is_of_archive, rules::Placement};
use crate::{
    codec::{
        entry::{self, Cast, ENTRY_BYTES_MAX},
        position::Seq,
    },
    stanza::{Kind, Stanza, bare, domain_of, resource_of},
    time::{Deadline, Mono, Now},
};

/// Whose stanzas are kept in order: the bare address of a sender, as written.
pub type Flow = Arc<str>;

/// A recipient's address, unescaped.
type Address = Arc<str>;

/// Open groups that are held at most; the oldest is sealed to make room. A room's event opens about three
/// (for participants, moderators and the subject itself), so this is 300 rooms speaking within one window.
const OPEN_MAX: usize = 1024;

/// Addresses of one cast: with the largest stanza that a server writes (512 KiB) they stay within an entry
/// ([`crate::codec::entry::ENTRY_BYTES_MAX`]). About 6,000 recipients; more make a second cast.
const RECIPIENT_BYTES_MAX: usize = 256 * 1024;

/// What an entry holds beside each address, see [`Cast::encoded_bytes`].
const RECIPIENT_BESIDE: usize = Cast::RECIPIENT_BESIDE;

/// A session that so many messages to everybody passed by in a row is not in the room any more. Not the first one: of a broadcast that
/// the server could not write within one window, the first group lacks what the later ones have.
const MISSED_MAX: u32 = 2;

/// Recipients of one flow that are remembered before it is asked whether they still matter.
const LATEST_MIN: usize = 1024;

/// Sessions that are remembered, over all rooms. Beyond it everything is forgotten and learned again, which costs
/// one window of delay for each room.
const SESSIONS_MAX: usize = 100_000;

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Output {
    /// The group's slot must be written (again).
    Write { seq: Seq, cast: Cast },
    /// Nothing will be added any more. Follows the last `Write` of the group.
    Sealed { seq: Seq, flow: Flow, cast: Cast },
}

/// Where a stanza went.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Placed {
    pub seq: Seq,
    /// Whether the slot is new.
    pub new: bool,
    /// What it adds to the slot.
    pub bytes: usize,
}

/// Why a stanza is not taken in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Refusal {
    /// It lacks an address.
    NoAddress,
    /// No entry can hold it: its address is longer than an address can be, or it is too large.
    TooLarge,
}

/// What makes copies one cast.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Key {
    template: Bytes,
    to_at: usize,
    to_domain: String,
    placement: Placement,
}

/// The sender's full address, the kind and the id, if there is one: the copies of one event share them, whatever their variant.
type Event = (String, Kind, Option<String>);

#[derive(Debug)]
struct Group {
    flow: Flow,
    key: Key,
    event: Event,
    /// The attribute that each address was written in: quotes and escapes may differ, and are kept.
    recipients: BTreeMap<Address, Bytes>,
    recipient_bytes: usize,
    /// At most, see [`Cast::encoded_bytes`].
    encoded_bytes: usize,
    closes_at: Mono,
    /// Whether a whole room is addressed, so that its recipients tell who is in it.
    to_everybody: bool,
}

#[derive(Debug)]
struct FlowState {
    open: BTreeSet<Seq>,
    /// For each recipient the latest number it stands in, kept while a group is open.
    latest: BTreeMap<Address, Seq>,
    /// At this size it is looked through for what is of no use any more.
    prune_at: usize,
}

impl Default for FlowState {
    fn default() -> Self {
        Self {
            open: BTreeSet::new(),
            latest: BTreeMap::new(),
            prune_at: LATEST_MIN,
        }
    }
}

#[derive(Debug, Default)]
struct Room {
    /// The far sessions that it is known to have, and how many messages to everybody have passed each by.
    sessions: BTreeMap<Address, u32>,
    /// The hash of the last message to everybody whose window ended.
    last: u64,
}

#[derive(Debug)]
pub struct Collapse {
    window: Duration,
    next: Seq,
    groups: BTreeMap<Seq, Group>,
    by_key: BTreeMap<Key, Seq>,
    flows: BTreeMap<Flow, FlowState>,
    rooms: BTreeMap<Flow, Room>,
    /// Over all rooms.
    sessions_total: usize,
    changed: BTreeSet<Seq>,
    outputs: VecDeque<Output>,
}

impl Collapse {
    /// `last` is the last number that was ever given out, `window` how long a group waits for copies that may follow.
    pub fn new(last: Seq, window: Duration) -> Self {
        Self {
            window,
            next: Seq(last.0 + 1),
            groups: BTreeMap::new(),
            by_key: BTreeMap::new(),
            flows: BTreeMap::new(),
            rooms: BTreeMap::new(),
            sessions_total: 0,
            changed: BTreeSet::new(),
            outputs: VecDeque::new(),
        }
    }

    /// The last number given out.
    pub fn last(&self) -> Seq {
        Seq(self.next.0 - 1)
    }

    /// Whether a group may still grow, and whose it is.
    pub fn open_flow(&self, seq: Seq) -> Option<Flow> {
        self.groups.get(&seq).map(|group| group.flow.clone())
    }

    /// Takes in a stanza, which must have `from` and `to`. `placement` is what rules say of how it waits, which may differ by recipient.
    pub fn handle_stanza(&mut self, stanza: &Stanza, placement: Placement, now: Now) -> Result<Placed, Refusal> {
        let (Some((template, to_at, to_attribute)), Some(from), Some(to)) =
            (stanza.split_to(), stanza.from(), stanza.to())
        else {
            return Err(Refusal::NoAddress);
        };
        let (empty_bytes, bytes) = (
            Cast::encoded_bytes_of(&template, 0, 0),
            to_attribute.len() + RECIPIENT_BESIDE,
        );
        // What the other end would not take must not take a number here.
        if to_attribute.len() > entry::RECIPIENT_BYTES_MAX || empty_bytes + bytes > ENTRY_BYTES_MAX {
            return Err(Refusal::TooLarge);
        }
        let flow: Flow = bare(&from).into();
        let key = Key {
            template,
            to_at,
            to_domain: domain_of(&to).to_owned(),
            placement,
        };
        let stanza_type = stanza.stanza_type();
        let mut spread = Spread::of(
            stanza.kind(),
            stanza_type.as_deref(),
            &to,
            self.rooms.contains_key(&flow),
        );
        if spread == Spread::Room && stanza.is_for_newcomers() {
            // It tells nothing of who else is in the room.
            spread = Spread::Some;
        }
        // A client's presence to a room names the nick that it wants. Two that differ in nothing else must stay in order, and a cast
        // has none. What a room or an account says to everybody is to be told by its payload, or goes to bare addresses.
        if stanza.kind() == Kind::Presence && resource_of(&to).is_some() && !stanza.has_muc_user() {
            spread = Spread::One;
        }
        // Pages of an archive are for who asked, and wait beside those for others.
        if spread == Spread::Some && is_of_archive(stanza) {
            spread = Spread::One;
        }
        let to: Address = to.into();
        let event = (from.into_owned(), stanza.kind(), stanza.id().map(Cow::into_owned));
        if stanza.kind() == Kind::Presence && stanza.has_muc_status("110") {
            self.seal_list(&flow, &to, &event);
            if !self.rooms.contains_key(&flow) {
                spread = Spread::One;
            }
        }
        self.learn(&flow, stanza, stanza_type.as_deref(), &to);

        if spread != Spread::One
            && let Some(&seq) = self.by_key.get(&key)
        {
            if self.admits(seq, &to, to_attribute.len()) {
                self.add(seq, to, to_attribute);
                self.seal_if_complete(seq);
                return Ok(Placed { seq, new: false, bytes });
            }
            self.seal(seq);
        }
        let seq = self.open(
            Group {
                flow,
                key,
                event,
                recipients: BTreeMap::new(),
                recipient_bytes: 0,
                encoded_bytes: empty_bytes,
                closes_at: now.mono + self.window,
                to_everybody: spread == Spread::Room,
            },
            to,
            to_attribute,
        );
        if spread == Spread::One || self.window.is_zero() {
            self.seal(seq);
        } else {
            self.seal_if_complete(seq);
        }
        let bytes = empty_bytes + bytes;
        Ok(Placed { seq, new: true, bytes })
    }

    pub fn handle_timeout(&mut self, now: Now) {
        // Groups wait equally long, so the oldest numbers are due first.
        while let Some((&seq, group)) = self.groups.first_key_value()
            && group.closes_at <= now.mono
        {
            if group.to_everybody {
                let (flow, reached) = (group.flow.clone(), group.recipients.keys().cloned().collect());
                let mut hasher = DefaultHasher::new();
                group.key.template.hash(&mut hasher);
                self.set_sessions(flow, hasher.finish(), &reached);
            }
            self.seal(seq);
        }
    }

    /// Closes every group, for a shutdown.
    pub fn seal_all(&mut self) {
        while let Some((&seq, _)) = self.groups.first_key_value() {
            self.seal(seq);
        }
    }

    pub fn poll_timeout(&self) -> Option<Deadline> {
        let at = self.groups.first_key_value()?.1.closes_at;
        Some(Deadline {
            at,
            why: "collapse window",
        })
    }

    /// What cannot wait: groups that are sealed, with their last writes.
    /// For groups that open from now on.
    pub fn set_window(&mut self, window: Duration) {
        self.window = window;
    }

    pub fn poll_sealed(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// All there is, the writes of groups that have grown included: to be asked when a batch is about to go to the disk, so that
    /// a hundred copies that came while it was busy are one write.
    pub fn poll_output(&mut self) -> Option<Output> {
        if let Some(output) = self.outputs.pop_front() {
            return Some(output);
        }
        let seq = self.changed.pop_first()?;
        let cast = self.groups[&seq].cast();
        Some(Output::Write { seq, cast })
    }

    /// Whether a recipient may stand in this group: not if it stands there already, nor if it would be moved before something
    /// that came earlier.
    fn admits(&self, seq: Seq, to: &Address, attribute_bytes: usize) -> bool {
        let group = &self.groups[&seq];
        let latest = self.flows.get(&group.flow).and_then(|flow| flow.latest.get(to));
        latest.is_none_or(|&latest| latest < seq)
            && group.recipient_bytes + attribute_bytes <= RECIPIENT_BYTES_MAX
            && group.encoded_bytes + attribute_bytes + RECIPIENT_BESIDE <= ENTRY_BYTES_MAX
    }

    fn open(&mut self, group: Group, to: Address, attribute: Bytes) -> Seq {
        if self.groups.len() >= OPEN_MAX
            && let Some((&oldest, _)) = self.groups.first_key_value()
        {
            self.seal(oldest);
        }
        let seq = self.next;
        self.next = Seq(seq.0 + 1);
        self.flows.entry(group.flow.clone()).or_default().open.insert(seq);
        self.by_key.insert(group.key.clone(), seq);
        self.groups.insert(seq, group);
        self.add(seq, to, attribute);
        seq
    }

    fn add(&mut self, seq: Seq, to: Address, attribute: Bytes) {
        let Some(group) = self.groups.get_mut(&seq) else {
            return;
        };
        if let Some(flow) = self.flows.get_mut(&group.flow) {
            flow.latest.insert(to.clone(), seq);
        }
        group.recipient_bytes += attribute.len();
        group.encoded_bytes += attribute.len() + RECIPIENT_BESIDE;
        group.recipients.insert(to, attribute);
        self.changed.insert(seq);
    }

    fn seal(&mut self, seq: Seq) {
        let Some(group) = self.groups.remove(&seq) else {
            return;
        };
        let cast = group.cast();
        if self.changed.remove(&seq) {
            self.outputs.push_back(Output::Write {
                seq,
                cast: cast.clone(),
            });
        }
        if self.by_key.get(&group.key) == Some(&seq) {
            self.by_key.remove(&group.key);
        }
        if let Some(flow) = self.flows.get_mut(&group.flow) {
            flow.open.remove(&seq);
            match flow.open.first() {
                None => {
                    self.flows.remove(&group.flow);
                }
                // A sender that never pauses would make this grow for ever. What came before all open groups matters no more.
                Some(&first) if flow.latest.len() >= flow.prune_at => {
                    flow.latest.retain(|_, seq| *seq >= first);
                    flow.prune_at = (2 * flow.latest.len()).max(LATEST_MIN);
                }
                Some(_) => {}
            }
        }
        let flow = group.flow;
        self.outputs.push_back(Output::Sealed { seq, flow, cast });
    }

    /// A room has said all that a newcomer is told before its own presence (XEP-0045 §7.2.2): who else is there. What has gone to it
    /// alone so far is not for others.
    fn seal_list(&mut self, flow: &Flow, newcomer: &Address, own: &Event) {
        let Some(state) = self.flows.get(flow) else { return };
        let is_listed = |group: &Group| {
            group.event != *own && group.recipients.len() == 1 && group.recipients.contains_key(newcomer)
        };
        let listed: Vec<Seq> = state
            .open
            .iter()
            .copied()
            .filter(|seq| is_listed(&self.groups[seq]))
            .collect();
        for seq in listed {
            self.seal(seq);
        }
    }

    /// Seals the groups of this group's event if together they reach every session of the room.
    fn seal_if_complete(&mut self, seq: Seq) {
        let Some(group) = self.groups.get(&seq) else { return };
        let (Some(Room { sessions, .. }), Some(flow)) = (self.rooms.get(&group.flow), self.flows.get(&group.flow))
        else {
            return;
        };
        let event: Vec<Seq> = flow
            .open
            .iter()
            .copied()
            .filter(|seq| self.groups[seq].event == group.event)
            .collect();
        let reached: usize = event.iter().map(|seq| self.groups[seq].recipients.len()).sum();
        let complete = reached >= sessions.len()
            && sessions.keys().all(|session| {
                event
                    .iter()
                    .any(|seq| self.groups[seq].recipients.contains_key(session))
            });
        if complete {
            for seq in event {
                self.seal(seq);
            }
        }
    }

    /// Follows who is in a room that is known: whoever it speaks to is, until it is told that itself has left (status 110,
    /// XEP-0045 §7.14). A room gets known by a message to everybody whose window has ended; before that, some of its sessions may
    /// have joined before we were started.
    fn learn(&mut self, flow: &Flow, stanza: &Stanza, stanza_type: Option<&str>, to: &Address) {
        let Some(Room { sessions, .. }) = self.rooms.get_mut(flow) else {
            return;
        };
        let before = sessions.len();
        match (stanza.kind(), stanza_type) {
            // Presences too: of a broadcast that was under way when we were started only a part came, and a quiet room may say no
            // other message for long.
            (Kind::Message, Some("groupchat")) | (Kind::Presence, None) => {
                sessions.insert(to.clone(), 0);
            }
            (Kind::Presence, Some("unavailable")) if stanza.has_muc_status("110") => {
                sessions.remove(to);
            }
            (Kind::Message | Kind::Presence | Kind::Iq, _) => {}
        }
        self.sessions_total = self.sessions_total + sessions.len() - before;
        if sessions.is_empty() {
            self.rooms.remove(flow);
        }
        if self.sessions_total > SESSIONS_MAX {
            self.forget_sessions();
        }
    }

    /// A message to everybody has reached these within its window. The others may have left the room without our knowledge; or the
    /// server was slow, and their copies are still to come, in another group of the same message.
    fn set_sessions(&mut self, flow: Flow, message: u64, reached: &BTreeSet<Address>) {
        let Room { sessions, last } = self.rooms.entry(flow).or_default();
        let before = sessions.len();
        if std::mem::replace(last, message) != message {
            sessions.retain(|session, missed| {
                *missed += u32::from(!reached.contains(session));
                *missed < MISSED_MAX
            });
        }
        sessions.extend(reached.iter().map(|session| (session.clone(), 0)));
        self.sessions_total = self.sessions_total + sessions.len() - before;
        if self.sessions_total > SESSIONS_MAX {
            self.forget_sessions();
        }
    }

    fn forget_sessions(&mut self) {
        self.rooms.clear();
        self.sessions_total = 0;
    }
}

/// How many copies of a stanza a server may write.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Spread {
    /// It is addressed once: it need not wait for a window.
    One,
    /// Several recipients may get it.
    Some,
    /// Every session of a room does.
    Room,
}

impl Spread {
    fn of(kind: Kind, stanza_type: Option<&str>, to: &str, from_room: bool) -> Self {
        match (kind, stanza_type) {
            // A user's words to a room (XEP-0045 §7.4). Rooms themselves write to full addresses.
            (Kind::Message, Some("groupchat")) if resource_of(to).is_none() => Self::One,
            (Kind::Message, Some("groupchat")) => Self::Room,
            (Kind::Message, None | Some("normal" | "headline")) => Self::Some,
            // A private message goes to every session behind a nick (XEP-0045 §7.5).
            (Kind::Message, Some("chat")) if from_room => Self::Some,
            (Kind::Presence, None | Some("unavailable")) => Self::Some,
            (Kind::Message | Kind::Presence | Kind::Iq, _) => Self::One,
        }
    }
}

impl Group {
    fn cast(&self) -> Cast {
        let mut recipients: Vec<Bytes> = self.recipients.values().cloned().collect();
        recipients.sort_unstable();
        Cast {
            template: self.key.template.clone(),
            // A stanza is 512 KiB at most, so its offsets fit.
            to_at: u32::try_from(self.key.to_at).unwrap_or(u32::MAX),
            recipients,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WINDOW: Duration = Duration::from_millis(50);

    fn at(ms: u64) -> Now {
        Now {
            mono: Mono::from_start(Duration::from_millis(ms)),
            ..Now::default()
        }
    }

    fn stanza(text: &str) -> Stanza {
        Stanza::parse(Bytes::copy_from_slice(text.as_bytes())).unwrap()
    }

    fn message(from: &str, to: &str, body: &str) -> Stanza {
        stanza(&format!(
            "<message from='{from}' to='{to}' type='groupchat'><body>{body}</body></message>"
        ))
    }

    fn own_presence(room: &str, to: &str) -> Stanza {
        stanza(&format!(
            "<presence from='{room}/me' to='{to}'><x xmlns='http://jabber.org/protocol/muc#user'>\
             <item role='participant' affiliation='none'/><status code='110'/></x></presence>"
        ))
    }

    fn sealed(collapse: &mut Collapse) -> Vec<(u64, usize)> {
        std::iter::from_fn(|| collapse.poll_output())
            .filter_map(|output| match output {
                Output::Sealed { seq, cast, .. } => Some((seq.0, cast.recipients.len())),
                Output::Write { .. } => None,
            })
            .collect()
    }

    /// Copies that differ only in `to` take one slot; the window closes it when nobody is known to be missing.
    #[test]
    fn equal_copies_are_one_cast() {
        let mut collapse = Collapse::new(Seq(0), WINDOW);
        for n in 0..5 {
            let copy = message("r@c.example/n", &format!("b{n}@b.example/r"), "hi");
            collapse.handle_stanza(&copy, Placement::default(), at(n)).unwrap();
        }
        assert_eq!(sealed(&mut collapse), []);
        collapse.handle_timeout(at(49));
        assert_eq!(sealed(&mut collapse), []);
        collapse.handle_timeout(at(50));
        assert_eq!(sealed(&mut collapse), [(1, 5)]);
        assert_eq!(collapse.poll_timeout(), None);
    }

    /// Once every session of the room is reached, nothing more is waited for.
    #[test]
    fn a_room_whose_sessions_are_all_reached_does_not_wait() {
        let mut collapse = Collapse::new(Seq(0), WINDOW);
        let say = |collapse: &mut Collapse, users: std::ops::Range<u32>, body: &str, now| {
            for n in users {
                let copy = message("r@c.example/n", &format!("b{n}@b.example/r"), body);
                collapse.handle_stanza(&copy, Placement::default(), at(now)).unwrap();
            }
        };
        say(&mut collapse, 0..3, "who is there?", 0);
        collapse.handle_timeout(at(100));
        assert_eq!(sealed(&mut collapse), [(1, 3)]);
        say(&mut collapse, 0..3, "hi", 200);
        assert_eq!(sealed(&mut collapse), [(2, 3)]);
        // One more comes in: it is waited for at once.
        let presence = own_presence("r@c.example", "b3@b.example/r");
        collapse
            .handle_stanza(&presence, Placement::default(), at(300))
            .unwrap();
        collapse.handle_timeout(at(400));
        assert_eq!(sealed(&mut collapse), [(3, 1)]);
        say(&mut collapse, 0..3, "welcome", 500);
        assert_eq!(sealed(&mut collapse), []);
        say(&mut collapse, 3..4, "welcome", 501);
        assert_eq!(sealed(&mut collapse), [(4, 4)]);
    }

    /// Neither a wish to enter a room waits for a window, nor what the room then tells the newcomer alone: who is there, and that it
    /// is. What goes to others meanwhile is not touched.
    #[test]
    fn an_entrance_waits_for_no_window() {
        let mut collapse = Collapse::new(Seq(0), WINDOW);
        let take_in = |collapse: &mut Collapse, stanza: &Stanza| {
            collapse.handle_stanza(stanza, Placement::default(), at(0)).unwrap();
        };
        let wish = "<presence from='b1@b.example/r' to='r@c.example/b1'><x xmlns='http://jabber.org/protocol/muc'/></presence>";
        take_in(&mut collapse, &stanza(wish));
        assert_eq!(sealed(&mut collapse), [(1, 1)]);
        take_in(&mut collapse, &message("r@c.example/n", "b9@b.example/r", "to all"));
        for nick in ["n", "m"] {
            let there = "<x xmlns='http://jabber.org/protocol/muc#user'><item role='participant'/></x>";
            let listed = format!("<presence from='r@c.example/{nick}' to='b1@b.example/r'>{there}</presence>");
            take_in(&mut collapse, &stanza(&listed));
        }
        assert_eq!(sealed(&mut collapse), []);
        take_in(&mut collapse, &own_presence("r@c.example", "b1@b.example/r"));
        assert_eq!(sealed(&mut collapse), [(3, 1), (4, 1), (5, 1)]);
        collapse.handle_timeout(at(50));
        assert_eq!(sealed(&mut collapse), [(2, 1)]);
    }

    /// What a room plays back to a newcomer does not make it forget the others: its next message is one cast again.
    ///
    /// Three are known, a fourth enters and is sent old messages and the subject, then the room speaks.
    #[test]
    fn a_newcomers_history_and_subject_are_not_the_whole_room() {
        let newcomer = "b3@b.example/r";
        let playback = [
            format!(
                "<message from='r@c.example/n' to='{newcomer}' type='groupchat'><body>old</body>\
                 <delay xmlns='urn:xmpp:delay' stamp='2026-01-01T12:00:00Z'/></message>"
            ),
            format!("<message from='r@c.example' to='{newcomer}' type='groupchat'><subject/></message>"),
        ];
        for playback in playback {
            let mut collapse = Collapse::new(Seq(0), WINDOW);
            let take_in = |collapse: &mut Collapse, stanza: &Stanza, now| {
                collapse.handle_stanza(stanza, Placement::default(), at(now)).unwrap();
            };
            for n in 0..3 {
                let copy = message("r@c.example/n", &format!("b{n}@b.example/r"), "one");
                take_in(&mut collapse, &copy, 0);
            }
            collapse.handle_timeout(at(100));
            take_in(&mut collapse, &own_presence("r@c.example", newcomer), 200);
            take_in(&mut collapse, &stanza(&playback), 200);
            collapse.handle_timeout(at(300));
            assert_eq!(sealed(&mut collapse), [(1, 3), (2, 1), (3, 1)]);
            for n in (0..4).rev() {
                let copy = message("r@c.example/n", &format!("b{n}@b.example/r"), "two");
                take_in(&mut collapse, &copy, 400);
            }
            assert_eq!(sealed(&mut collapse), [(4, 4)]);
        }
    }

    /// A broadcast that the server was slow to write is several casts; the next one, written at once, is one again.
    #[test]
    fn a_slow_broadcast_does_not_split_the_next() {
        let mut collapse = Collapse::new(Seq(0), WINDOW);
        let say = |collapse: &mut Collapse, users: &[u32], body: &str, now| {
            collapse.handle_timeout(at(now));
            for n in users {
                let copy = message("r@c.example/n", &format!("b{n}@b.example/r"), body);
                collapse.handle_stanza(&copy, Placement::default(), at(now)).unwrap();
            }
        };
        say(&mut collapse, &[0, 1], "slow", 0);
        say(&mut collapse, &[2], "slow", 60);
        say(&mut collapse, &[3], "slow", 120);
        collapse.handle_timeout(at(200));
        assert_eq!(sealed(&mut collapse), [(1, 2), (2, 1), (3, 1)]);
        for (seq, users) in [(4, [2, 3, 0, 1]), (5, [0, 1, 2, 3])] {
            say(&mut collapse, &users, &format!("quick {seq}"), 300 * seq);
            assert_eq!(sealed(&mut collapse), [(seq, 4)]);
        }
        // Two of them have left behind our back: they are waited for twice, and then no more.
        for (seq, waits) in [(6, true), (7, true), (8, false)] {
            say(&mut collapse, &[0, 1], &format!("left {seq}"), 300 * seq);
            assert_eq!(sealed(&mut collapse).is_empty(), waits);
            collapse.handle_timeout(at(300 * seq + 50));
            sealed(&mut collapse);
        }
    }

    /// An occupant's two presences are two events, though one reaches the sessions that the other has not reached yet: the second is
    /// not whole before it has reached everybody itself (simulator, `quiet_world`, seed 3915).
    #[test]
    fn two_events_of_one_occupant_are_not_taken_for_one() {
        let mut collapse = Collapse::new(Seq(0), WINDOW);
        let presence = |collapse: &mut Collapse, id: &str, users: &[u32], now| {
            for n in users {
                let text = format!(
                    "<presence from='r@c.example/n' to='b{n}@b.example/r' id='{id}'><x xmlns='http://jabber.org/protocol/muc#user'/></presence>"
                );
                collapse
                    .handle_stanza(&stanza(&text), Placement::default(), at(now))
                    .unwrap();
            }
        };
        for n in 0..4 {
            let copy = message("r@c.example/n", &format!("b{n}@b.example/r"), "who is there?");
            collapse.handle_stanza(&copy, Placement::default(), at(0)).unwrap();
        }
        // The server is slow: the first presence is cut in two by its window.
        presence(&mut collapse, "p1", &[0, 1], 10);
        collapse.handle_timeout(at(60));
        presence(&mut collapse, "p1", &[2, 3], 61);
        assert_eq!(sealed(&mut collapse), [(1, 4), (2, 2)]);
        presence(&mut collapse, "p2", &[0, 1], 62);
        assert_eq!(sealed(&mut collapse), []);
        presence(&mut collapse, "p2", &[2, 3], 63);
        assert_eq!(sealed(&mut collapse), [(4, 4)]);
    }

    /// A broadcast was under way when we were started, and we know of one session only: presences tell of the others as well as
    /// messages do, so that one of them crosses in two casts, not all (simulator, `drained_processes`, seed 2919).
    #[test]
    fn a_room_that_was_seen_in_part_is_known_by_its_next_presence() {
        let mut collapse = Collapse::new(Seq(0), WINDOW);
        let rest = message("r@c.example/n", "b0@b.example/r", "the rest");
        collapse.handle_stanza(&rest, Placement::default(), at(0)).unwrap();
        collapse.handle_timeout(at(50));
        assert_eq!(sealed(&mut collapse), [(1, 1)]);
        for (id, casts) in [(1, [(2, 1), (3, 2)].as_slice()), (2, &[(4, 3)]), (3, &[(5, 3)])] {
            for n in 0..3 {
                let text = format!(
                    "<presence from='r@c.example/n' to='b{n}@b.example/r' id='{id}'><x xmlns='http://jabber.org/protocol/muc#user'/></presence>"
                );
                collapse
                    .handle_stanza(&stanza(&text), Placement::default(), at(100 * id))
                    .unwrap();
            }
            collapse.handle_timeout(at(100 * id + 50));
            assert_eq!(sealed(&mut collapse), casts);
        }
    }

    /// The same words twice are two messages: join, part and join again must not become one (a repeated recipient).
    #[test]
    fn a_repeated_recipient_begins_a_new_cast() {
        let mut collapse = Collapse::new(Seq(0), WINDOW);
        let seqs: Vec<u64> = ["b1", "b2", "b1", "b2"]
            .iter()
            .map(|user| message("r@c.example/n", &format!("{user}@b.example/r"), "ok"))
            .map(|stanza| {
                collapse
                    .handle_stanza(&stanza, Placement::default(), at(0))
                    .unwrap()
                    .seq
                    .0
            })
            .collect();
        assert_eq!(seqs, [1, 1, 2, 2]);
    }

    /// ejabberd changes a nick recipient by recipient (leave, join, next recipient): no copy may move before what came earlier.
    #[test]
    fn a_recipient_never_moves_before_a_later_group() {
        let mut collapse = Collapse::new(Seq(0), WINDOW);
        let mut seqs = Vec::new();
        for user in ["b1", "b2"] {
            for body in ["one", "two"] {
                let copy = message("r@c.example/n", &format!("{user}@b.example/r"), body);
                seqs.push(
                    collapse
                        .handle_stanza(&copy, Placement::default(), at(0))
                        .unwrap()
                        .seq
                        .0,
                );
            }
        }
        assert_eq!(seqs, [1, 2, 1, 2]);
        // Now b2 gets "one" again after "two": it must not join a group before its "two".
        let again = message("r@c.example/n", "b2@b.example/r", "one");
        assert_eq!(
            collapse
                .handle_stanza(&again, Placement::default(), at(0))
                .unwrap()
                .seq
                .0,
            3
        );
    }

    /// A client that wants one nick and then another ends up with the second: a room hears both in order, each in a cast of its own.
    #[test]
    fn two_wishes_for_a_nick_stay_in_order() {
        let mut collapse = Collapse::new(Seq(0), WINDOW);
        for nick in ["z", "a"] {
            let wish = format!("<presence from='u@a.example/r' to='room@c.example/{nick}'/>");
            collapse
                .handle_stanza(&stanza(&wish), Placement::default(), at(0))
                .unwrap();
        }
        assert_eq!(sealed(&mut collapse), [(1, 1), (2, 1)]);
        // An account's presence goes to the accounts of its contacts, and is one cast.
        for contact in ["b1", "b2"] {
            let presence = format!("<presence from='u@a.example/r' to='{contact}@b.example'/>");
            collapse
                .handle_stanza(&stanza(&presence), Placement::default(), at(0))
                .unwrap();
        }
        collapse.handle_timeout(at(50));
        assert_eq!(sealed(&mut collapse), [(3, 2)]);
    }

    /// A chat line between two users and an IQ are never broadcasts: they do not wait for a window.
    #[test]
    fn what_is_addressed_once_does_not_wait() {
        let mut collapse = Collapse::new(Seq(7), WINDOW);
        for text in [
            "<message type='chat' from='a@a.example/x' to='b@b.example'/>",
            "<message type='groupchat' from='a@a.example/x' to='room@b.example'/>",
            "<iq type='get' id='1' from='a@a.example/x' to='b.example'/>",
        ] {
            collapse
                .handle_stanza(&stanza(text), Placement::default(), at(0))
                .unwrap();
        }
        assert_eq!(sealed(&mut collapse), [(8, 1), (9, 1), (10, 1)]);
    }

    /// No cast is larger than an entry may be: a recipient that would make it so begins another, and a stanza that fits into none
    /// gets no number. Shown for a stanza near the limit, and for one that is small with addresses that are long.
    #[test]
    fn every_cast_fits_into_an_entry() {
        for body_bytes in [ENTRY_BYTES_MAX - 100_000, 10] {
            let mut collapse = Collapse::new(Seq(0), WINDOW);
            let body = "x".repeat(body_bytes);
            for n in 0..40 {
                let to = format!("b{n}@b.example/{}", "r".repeat(18_000));
                collapse
                    .handle_stanza(&message("r@c.example/n", &to, &body), Placement::default(), at(0))
                    .unwrap();
            }
            collapse.seal_all();
            let mut casts = 0;
            while let Some(output) = collapse.poll_output() {
                if let Output::Sealed { cast, .. } = output {
                    cast.check().unwrap();
                    casts += 1;
                }
            }
            assert!((2..20).contains(&casts), "{casts}");
        }
        let mut collapse = Collapse::new(Seq(0), WINDOW);
        let padded = |spaces: usize| stanza(&format!("<message from='r@c/n'{}to='b@b/r'/>", " ".repeat(spaces)));
        assert!(
            collapse
                .handle_stanza(&padded(18_000), Placement::default(), at(0))
                .is_ok()
        );
        assert_eq!(
            collapse.handle_stanza(&padded(20_000), Placement::default(), at(0)),
            Err(Refusal::TooLarge)
        );
        let huge = message("r@c/n", "b@b/r", &"x".repeat(ENTRY_BYTES_MAX));
        assert_eq!(
            collapse.handle_stanza(&huge, Placement::default(), at(0)),
            Err(Refusal::TooLarge)
        );
        assert_eq!(collapse.last(), Seq(1));
    }

    /// Who was written to long ago is forgotten, although the sender never pauses.
    #[test]
    fn a_sender_that_never_pauses_is_bounded() {
        let mut collapse = Collapse::new(Seq(0), WINDOW);
        for n in 0..20_000 {
            let copy = message("r@c.example/n", &format!("b{n}@b.example/r"), &n.to_string());
            collapse.handle_timeout(at(n));
            collapse.handle_stanza(&copy, Placement::default(), at(n)).unwrap();
        }
        assert!(collapse.flows["r@c.example"].latest.len() <= 2 * LATEST_MIN);
    }

    /// The number of rooms that may speak at once is bounded; the oldest group gives way, whole.
    #[test]
    fn open_groups_are_bounded() {
        let mut collapse = Collapse::new(Seq(0), WINDOW);
        for n in 0..=OPEN_MAX {
            let copy = message(&format!("r{n}@c.example/n"), "b@b.example/r", "hi");
            collapse.handle_stanza(&copy, Placement::default(), at(0)).unwrap();
        }
        assert_eq!(sealed(&mut collapse), [(1, 1)]);
    }

    proptest! {
        /// For any interleaving of copies of few texts from few rooms to few people, with time passing at random: everybody
        /// gets exactly the stanzas that were addressed to them, byte for byte, each sender's in order.
        #[test]
        fn each_recipient_gets_its_stanzas_in_order(
            steps in prop::collection::vec((0..2_u8, 0..3_u8, 0..4_u8, 0..30_u64, any::<bool>()), 1..120)
        ) {
            let mut collapse = Collapse::new(Seq(0), WINDOW);
            let mut sent: BTreeMap<(String, String), Vec<Bytes>> = BTreeMap::new();
            let mut written: BTreeMap<Seq, Cast> = BTreeMap::new();
            let mut finished: BTreeMap<Seq, Cast> = BTreeMap::new();
            let mut drain = |collapse: &mut Collapse| {
                while let Some(output) = collapse.poll_output() {
                    match output {
                        Output::Write { seq, cast } => {
                            assert!(!finished.contains_key(&seq), "written after it was sealed");
                            written.insert(seq, cast);
                        }
                        Output::Sealed { seq, cast, .. } => {
                            assert_eq!(written.get(&seq), Some(&cast), "the last write is what was sealed");
                            assert!(finished.insert(seq, cast).is_none());
                        }
                    }
                }
            };
            let mut now = 0;
            for (room, body, user, wait, presence) in steps {
                now += wait;
                collapse.handle_timeout(at(now));
                let (from, to) = (format!("r{room}@c.example/n"), format!("b{user}@b.example/r"));
                let stanza = if presence { own_presence(&format!("r{room}@c.example"), &to) } else { message(&from, &to, &body.to_string()) };
                sent.entry((format!("r{room}"), to)).or_default().push(stanza.bytes().clone());
                collapse.handle_stanza(&stanza, Placement::default(), at(now)).unwrap();
                drain(&mut collapse);
            }
            collapse.seal_all();
            drain(&mut collapse);
            let mut got: BTreeMap<(String, String), Vec<Bytes>> = BTreeMap::new();
            for cast in finished.values() {
                for k in 0..cast.recipients.len() {
                    let copy = cast.copy(k).unwrap();
                    let stanza = Stanza::parse(copy.clone()).unwrap();
                    let room = stanza.from().unwrap()[..2].to_owned();
                    got.entry((room, stanza.to().unwrap().into_owned())).or_default().push(copy);
                }
            }
            prop_assert_eq!(sent, got);
        }
    }
}
