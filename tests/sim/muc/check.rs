//! What the promises say of rooms, once everything has come to rest.
//!
//! Two kinds of checks stand side by side. The strict one compares what one server wrote with what the other read, byte for byte, for
//! each flow and recipient; what a mirror may make different is let through by name, see [`Declared`]. The others hold whatever is
//! declared: they look at what users have been shown and told.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use narrows::stanza::{bare, domain_of, resource_of};

use super::{
    client::{Client, View},
    room::Room,
    words::{self, Speeches},
    world::{Faults, Sent, Way, World, may_be_forgotten},
    xml::{self, attribute, child, elements, has_status, inner, muc_user, name},
};

/// The differences from a direct stream that the design declares (its §7), each to be switched on by itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Declared<'a> {
    /// What waited long carries a `<delay/>` that its server did not write.
    pub delay: bool,
    /// During a split far occupants are shown as gone (333) or away, and afterwards as they are then, not all that they were meanwhile;
    /// rooms are told the same of the peer's users.
    pub shows: bool,
    /// What was said on this side of the link, which are these bodies, is heard near by before the room has reflected it, without the room's
    /// `stanza-id`; the reflection is swallowed.
    pub echo: Option<&'a BTreeSet<String>>,
    /// Words that have no id get one before they cross.
    pub id: bool,
    /// Self-pings, pings and disco are answered near by, and do not cross; and each end asks its own server.
    pub near: bool,
    /// During a split what only the room can grant is refused near by, and does not cross; so is what a visitor says. Nor do private
    /// messages between those who are on one side of it: they have them without the room.
    pub refused: bool,
    /// A session that its room no longer has, because something was lost with a process, is told so by the mirror.
    pub truth: bool,
    /// A session has left near by during a split: if the room puts it out before it hears of that, it does not tell it so once more.
    pub settled: bool,
    /// What a room said while a process was killed may be found in its history, which one session is asked to have repeated: then it comes
    /// as old, and of that repetition nothing else crosses.
    pub found: bool,
    /// Who was out of a room while the link was down, and is not let in again, is told why.
    pub out: bool,
    /// Who came to a room and went while the link was down is not shown to those who had not seen it.
    pub visits: bool,
}

impl Declared<'_> {
    pub fn of(faults: Faults) -> Self {
        Self {
            delay: faults.mirror,
            shows: faults.mirror,
            echo: None,
            id: faults.mirror,
            near: faults.mirror,
            refused: faults.mirror,
            truth: faults.mirror && faults.kills,
            settled: false,
            found: faults.mirror && (faults.kills || faults.leaves),
            out: faults.mirror && faults.leaves,
            visits: faults.cuts || faults.flaps || faults.kills,
        }
    }

    /// Whether what was read may be what was written.
    fn is_same(self, sent: &Bytes, heard: &Bytes) -> bool {
        let (sent, heard) = (xml::text(sent), xml::text(heard));
        let is_sent = |heard: &str| sent == heard || self.id && has_got_id(sent, heard);
        is_sent(heard) || self.delay && is_sent(&without_delay(heard))
    }

    /// The same of something that may be missing, and may be found then.
    fn is_heard(self, (sent, excused): (&Bytes, bool), heard: &Bytes) -> bool {
        let is_found = || excused && words::is_found(xml::text(sent), xml::text(heard));
        self.is_same(sent, heard) || self.found && is_found()
    }

    fn is_echo(self, stanza: &str) -> bool {
        let is_said_here = |body: &str| self.echo.is_some_and(|said| said.contains(body));
        words::body(stanza).is_some_and(is_said_here) || self.echo.is_some() && words::is_notice(stanza)
    }

    fn may_be_missing(self, sent: &Bytes) -> bool {
        let stanza = xml::text(sent);
        self.near && (is_near_question(stanza) || is_answer(stanza) || is_refusal_of_ours(stanza))
            || self.settled && is_own_leave(stanza).is_some()
            || self.is_echo(stanza)
            || self.shows && is_show(stanza)
            || self.refused && is_request(stanza)
            || self.out && (is_of_return(stanza) || words::body(stanza).is_some())
    }

    fn may_be_extra(self, heard: &Bytes) -> bool {
        let stanza = xml::text(heard);
        self.near && (is_near_question(stanza) || is_answer(stanza))
            || self.is_echo(stanza) && !words::is_old(stanza)
            || self.shows && is_show(stanza)
            || self.refused && is_refusal(stanza)
            || self.out && (is_put_out(stanza) || words::body(stanza).is_some() || words::is_notice(stanza))
            || self.truth && muc_user(stanza).is_some_and(|x| has_status(x, "110") && has_status(x, "333"))
    }
}

/// Whether these are the same, but for what a sidecar adds.
pub fn is_carried(sent: &Bytes, doubtful: &Bytes) -> bool {
    let (sent, doubtful) = (xml::text(sent), xml::text(doubtful));
    let plain = without_delay(doubtful);
    [doubtful, &plain]
        .iter()
        .any(|doubtful| sent == *doubtful || has_got_id(sent, doubtful))
}

/// Without a `<delay/>` that another than a room has added: a room's tells how old a line of history is.
fn without_delay(stanza: &str) -> String {
    let room = attribute(stanza, "from").map(bare).unwrap_or_default();
    match child(stanza, "delay") {
        Some(delay) if attribute(delay, "from") != Some(room) => stanza.replacen(delay, "", 1),
        Some(_) | None => stanza.to_owned(),
    }
}

fn is_near_question(stanza: &str) -> bool {
    let asks = name(stanza) == "iq" && attribute(stanza, "type") == Some("get");
    asks && ["<ping ", "disco#info", "disco#items"]
        .iter()
        .any(|what| stanza.contains(what))
}

fn is_answer(stanza: &str) -> bool {
    name(stanza) == "iq" && matches!(attribute(stanza, "type"), Some("result" | "error"))
}

/// What a sidecar has said in a user's name was refused, which is no news for the user.
fn is_refusal_of_ours(stanza: &str) -> bool {
    let id = attribute(stanza, "id").unwrap_or_default();
    name(stanza) == "presence" && is_refusal(stanza) && id.starts_with("narrows-")
}

/// Whether these are the same words to a room, the second of them with an id of ours.
fn has_got_id(sent: &str, heard: &str) -> bool {
    let id = attribute(heard, "id").filter(|id| id.starts_with("narrows-") && attribute(sent, "id").is_none());
    id.is_some_and(|id| heard.replacen(&format!(" id='{id}'"), "", 1) == sent)
}

/// What a room says to who leaves and enters again, beside who is there and what was said: the subject, a refusal, and how ejabberd's
/// rooms show themselves and take leave.
fn is_of_return(stanza: &str) -> bool {
    let is_of_room_itself =
        || attribute(stanza, "from").is_some_and(|from| is_of_room(from) && resource_of(from).is_none());
    match name(stanza) {
        "presence" => {
            is_own_leave(stanza).is_some() || attribute(stanza, "type") == Some("error") || is_of_room_itself()
        }
        "message" => child(stanza, "subject").is_some() && child(stanza, "body").is_none(),
        _ => false,
    }
}

/// That one is out of a room, or goes on in it under another nick.
fn is_put_out(stanza: &str) -> bool {
    name(stanza) == "presence"
        && attribute(stanza, "type") == Some("unavailable")
        && muc_user(stanza).is_some_and(|x| has_status(x, "110"))
}

/// Who is there and how, as a room tells it or is told.
fn is_show(stanza: &str) -> bool {
    let is_for_room = attribute(stanza, "to").is_some_and(|to| domain_of(to).starts_with("conference."));
    // That one is out oneself is never a show, but for one's own leave, which is confirmed near by during a split.
    let stanza_type = attribute(stanza, "type");
    let is_own_leave = |x: &str| has_status(x, "110") && x.matches("<status ").count() == 1;
    let is_shown = muc_user(stanza).is_some_and(|x| stanza_type.is_none() || !has_status(x, "110") || is_own_leave(x));
    name(stanza) == "presence" && stanza_type != Some("error") && (is_for_room || is_shown)
}

/// What a client wants of a room beside being heard.
fn is_request(stanza: &str) -> bool {
    match name(stanza) {
        "presence" => attribute(stanza, "type").is_none(),
        "iq" => matches!(attribute(stanza, "type"), Some("get" | "set")),
        _ => child(stanza, "body").is_none(),
    }
}

fn is_refusal(stanza: &str) -> bool {
    attribute(stanza, "type") == Some("error")
}

/// What happened, so that a run which tested nothing is noticed.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub acts: u64,
    pub delivered: u64,
    pub copies: u64,
    pub casts: u64,
    pub cuts: u64,
    pub lane_breaks: u64,
    pub kills: u64,
    pub restarts: u64,
    pub vanished: u64,
    pub expelled: u64,
    pub occupants: u64,
    pub rosters: u64,
    pub answers: u64,
    pub lost: u64,
    /// Somebody came and went, and a session was not told.
    pub unseen: u64,
    /// What rooms said at least once to somebody far.
    pub said: BTreeSet<&'static str>,
}

/// What rooms have to say, and how it is known.
const SAYINGS: [(&str, &str); 26] = [
    ("new room", "<status code='201'/>"),
    ("addresses are shown", "<status code='100'/>"),
    ("configuration", "<status code='104'/>"),
    ("no longer anonymous", "<status code='172'/>"),
    ("anonymous", "<status code='173'/>"),
    ("ban", "<status code='301'/>"),
    ("new nick", "<status code='303'/>"),
    ("kick", "<status code='307'/>"),
    ("no longer a member", "<status code='321'/>"),
    ("members only", "<status code='322'/>"),
    ("shutdown", "<status code='332'/>"),
    ("destroyed", "<destroy>"),
    ("history", "<delay "),
    ("subject", "<subject>"),
    ("archived", "<stanza-id "),
    ("a moderator", "role='moderator'"),
    ("a visitor", "role='visitor'"),
    ("private message", "type='chat'"),
    ("invitation", "<invite "),
    ("request for voice", "<title>Voice request"),
    ("relayed question", "jabber:iq:version"),
    ("disco", "<identity "),
    ("nick is taken", "<conflict "),
    ("may not", "<forbidden "),
    ("password", "<not-authorized "),
    ("not a member", "<registration-required "),
];

impl Tally {
    fn fields(&mut self) -> [&mut u64; 15] {
        [
            &mut self.acts,
            &mut self.delivered,
            &mut self.copies,
            &mut self.casts,
            &mut self.cuts,
            &mut self.lane_breaks,
            &mut self.kills,
            &mut self.restarts,
            &mut self.vanished,
            &mut self.expelled,
            &mut self.occupants,
            &mut self.rosters,
            &mut self.answers,
            &mut self.lost,
            &mut self.unseen,
        ]
    }

    pub fn add(&mut self, mut other: Self) {
        self.said.append(&mut other.said);
        for (sum, more) in self.fields().into_iter().zip(other.fields()) {
            *sum += *more;
        }
    }

    /// Every fault that the worlds were to have happened in some of them, and no other.
    pub fn assert_covers(&self, faults: Faults) {
        assert!(self.copies > self.casts, "too little was shared");
        assert!(self.rosters > 0 && self.answers > 0, "nobody was in a room");
        for (what, count, expected) in [
            ("cuts", self.cuts, faults.cuts || faults.flaps),
            ("lane breaks", self.lane_breaks, faults.lanes),
            ("kills", self.kills, faults.kills),
            ("restarts", self.restarts, faults.restarts),
            ("vanished", self.vanished, faults.vanishing),
            ("lost", self.lost, faults.kills),
        ] {
            assert_eq!(count > 0, expected, "{what}: {count}");
        }
        // A leave that was lost makes a ghost.
        assert!(self.expelled > 0 || !faults.vanishing);
        assert!(self.expelled == 0 || faults.vanishing || faults.kills);
        // A plain run may go without the rarer ones.
        let expected = |what: &str| what != "shutdown" || faults.restarts;
        let unsaid: Vec<&str> = SAYINGS
            .into_iter()
            .map(|(what, _)| what)
            .filter(|what| expected(what) && !self.said.contains(what))
            .collect();
        let unsaid_max = if self.acts > 100_000 { 0 } else { 8 };
        assert!(unsaid.len() <= unsaid_max, "never said: {unsaid:?}");
    }
}

/// A room and a session between whom something was lost that may be.
type Lost = BTreeSet<(String, String)>;

impl World {
    /// Holds what everybody was told and shown against what the rooms said and hold.
    pub fn check(&mut self) {
        let declared = Declared::of(self.faults);
        let mut lost = Lost::new();
        for (way, back) in self.ways.iter().flat_map(|[a, b]| [(a, b), (b, a)]) {
            let near = match declared.refused {
                true => Near::of(way, back),
                false => Near::default(),
            };
            let said = (&self.said, way.to);
            self.tally.unseen += check_way(way, declared, said, &near, &mut lost);
            check_real_addresses(way);
            for (what, form) in SAYINGS {
                let is_said = || way.sent.iter().any(|sent| xml::text(&sent.bytes).contains(form));
                if !self.tally.said.contains(what) && is_said() {
                    self.tally.said.insert(what);
                }
            }
            assert!(
                way.casts <= way.casts_due,
                "P2: {} casts, {} would have done",
                way.casts,
                way.casts_due
            );
            self.tally.casts += way.casts;
        }
        assert!(self.faults.kills || lost.is_empty());
        self.tally.lost += lost.len() as u64;
        self.check_rooms(&lost);
        if !self.faults.kills && !self.faults.restarts && !self.faults.vanishing {
            self.check_heard(&lost);
        }
        self.check_clients(&lost);
    }

    fn check_rooms(&mut self, lost: &Lost) {
        for server in &self.servers {
            for room in server.rooms.values() {
                let is_lost = |jid: &str| lost.contains(&(room.jid.clone(), jid.to_owned()));
                for jid in &room.expelled {
                    let vanished = self.vanished.contains(jid);
                    assert!(vanished || is_lost(jid), "P5: {jid} fell out of {}", room.jid);
                    self.tally.expelled += 1;
                }
                for (nick, occupant) in &room.occupants {
                    for jid in &occupant.sessions {
                        self.tally.occupants += 1;
                        let client = self.clients.iter().find(|client| client.jid == *jid);
                        let view = client.and_then(|client| Some(&client.stays.get(&room.jid)?.view));
                        let knows = view.is_some_and(|view| view.inside.as_ref() == Some(nick));
                        assert!(
                            knows || is_lost(jid),
                            "{jid} does not know that it is in {} as {nick}: {view:?} {}",
                            room.jid,
                            self.transcript(&room.jid, jid)
                        );
                    }
                }
            }
        }
    }

    /// P3: who is in a room has heard all that was said since it entered, once and in order, or was told that something is missing.
    fn check_heard(&self, lost: &Lost) {
        for client in &self.clients {
            for (site, server) in self.servers.iter().enumerate().filter(|(site, _)| *site != client.site) {
                for room in server.rooms.values() {
                    let inside = client
                        .stays
                        .get(&room.jid)
                        .is_some_and(|stay| stay.view.inside.is_some());
                    let Some(&since) = room.since.get(&client.jid).filter(|_| inside) else {
                        continue;
                    };
                    if lost.contains(&(room.jid.clone(), client.jid.clone())) {
                        continue;
                    }
                    let (pair, end) = if site == 0 { (client.site - 1, 0) } else { (site - 1, 1) };
                    let is_for = |bytes: &&Bytes| {
                        let stanza = xml::text(bytes);
                        let of = |name| attribute(stanza, name).unwrap_or_default();
                        bare(of("from")) == room.jid && of("to") == client.jid && of("type") == "groupchat"
                    };
                    let heard = self.ways[pair][end].heard.iter().filter(is_for);
                    let heard: Vec<&str> = heard
                        .filter_map(|bytes| Some(inner(child(xml::text(bytes), "body")?)))
                        .collect();
                    let asks = |sent: &&Sent| {
                        let stanza = xml::text(&sent.bytes);
                        let of = |name| attribute(stanza, name).unwrap_or_default();
                        of("from") == client.jid && bare(of("to")) == room.jid && stanza.contains("protocol/muc'")
                    };
                    let sent = self.ways[pair][1 - end].sent.iter();
                    // Who has left by itself while it was out anyhow was not missed by the room.
                    let leaves = |sent: &&Sent| {
                        let stanza = xml::text(&sent.bytes);
                        let of = |name| attribute(stanza, name).unwrap_or_default();
                        of("from") == client.jid && bare(of("to")) == room.jid && of("type") == "unavailable"
                    };
                    if sent.clone().any(|sent| leaves(&sent)) {
                        continue;
                    }
                    let asked = sent.filter(asks).count();
                    let is_told = heard.iter().any(|body| words::is_gap(body));
                    let mut last = 0;
                    for (author, body) in &room.said[since..] {
                        let places = (0..heard.len()).filter(|&at| heard[at] == body);
                        let places: Vec<usize> = places.collect();
                        let whose = || format!("{body:?} of {author}: {} in {}", client.jid, room.jid);
                        assert!(is_told || !places.is_empty(), "never heard: {}", whose());
                        if asked == 1 {
                            assert!(places.len() <= 1, "heard twice: {}", whose());
                        }
                        // What was heard near by came before its turn.
                        if asked == 1
                            && domain_of(author) != domain_of(&client.jid)
                            && let Some(&at) = places.first()
                        {
                            assert!(at >= last, "out of order: {}", whose());
                            last = at;
                        }
                    }
                }
            }
        }
    }

    fn check_clients(&mut self, lost: &Lost) {
        let rooms: BTreeMap<&str, (usize, &Room)> = self
            .servers
            .iter()
            .enumerate()
            .flat_map(|(site, server)| server.rooms.values().map(move |room| (room.jid.as_str(), (site, room))))
            .collect();
        for client in self.clients.iter().chain(&self.gone) {
            for room in &client.rejoins {
                let is_lost = lost.contains(&(room.clone(), client.jid.clone()));
                assert!(is_lost, "P5: {} had to enter {room} again", client.jid);
            }
        }
        for client in &self.clients {
            let is_lost = |room: &str| lost.contains(&(room.to_owned(), client.jid.clone()));
            for (room, stay) in client.stays.iter().filter(|(room, _)| !is_lost(room)) {
                assert!(stay.asked.is_none(), "{} still waits before {room}", client.jid);
                let (site, room) = rooms[room.as_str()];
                assert_eq!(
                    stay.view.inside.as_deref(),
                    room.nick_of(&client.jid),
                    "{} in {}",
                    client.jid,
                    room.jid
                );
                if stay.view.inside.is_some() {
                    self.tally.rosters += 1;
                    self.check_roster(client, &stay.view, room);
                    let (mut view, mut told) = (stay.view.clone(), self.told(site, room, client));
                    // That a guest is away because of the link is kept from those beside it; a room that shows only some may never say
                    // that this is over.
                    if self.faults.mirror && room.keeps_from_some {
                        let shown = view.shown.values_mut().chain(told.shown.values_mut());
                        shown.for_each(|shown| shown.show.clear());
                        // Nor does it say to all that one has left, who was shown near by as leaving; nor, to one who was shown it
                        // before, that a guest has left and come again: those who are not shown it then see it go.
                        let is_seen = |nick: &String| {
                            view.shown.contains_key(nick) || room.occupants.contains_key(nick) && !self.faults.leaves
                        };
                        told.shown.retain(|nick, _| is_seen(nick));
                    }
                    assert_eq!(view, told, "{} was told otherwise by {}", client.jid, room.jid);
                }
            }
            for (id, asked) in &client.asked {
                assert!(asked.answers <= 1, "{} answers to {id}", asked.answers);
                self.tally.answers += asked.answers;
                let forgotten = may_be_forgotten(asked.question) && !self.restarted.is_empty();
                let answered = asked.answers == 1 || forgotten || self.faults.kills;
                assert!(answered, "nobody answered {id} to {}", asked.to);
            }
        }
    }

    /// Whoever is shown is there, and as they are; whoever is there is shown.
    fn check_roster(&self, client: &Client, view: &View, room: &Room) {
        // The server itself does not tell everybody everything.
        if room.keeps_from_some {
            return;
        }
        let whose = || {
            let transcript = self.transcript(&room.jid, &client.jid);
            format!("{}'s view of {}: {transcript}", client.jid, room.jid)
        };
        let shown: Vec<&String> = view.shown.keys().collect();
        let there: Vec<&String> = room.occupants.keys().collect();
        assert_eq!(shown, there, "{}", whose());
        for (nick, shown) in &view.shown {
            let occupant = &room.occupants[nick];
            assert_eq!(shown.role, occupant.role.as_str(), "{nick} in {}", whose());
            let show = format!("<x>{}</x>", occupant.presence.payload);
            let show = child(&show, "show").map(inner).unwrap_or_default();
            assert_eq!(shown.show, show, "{nick} in {}", whose());
        }
    }

    /// What a far session and a room last heard of each other, for whoever must find out what went wrong.
    fn transcript(&self, room: &str, jid: &str) -> String {
        let mut lines = Vec::new();
        for way in self.ways.iter().flatten() {
            let of_both = |bytes: &&Bytes| {
                let stanza = xml::text(bytes);
                let of = |name| attribute(stanza, name).unwrap_or_default();
                let (from, to) = (of("from"), of("to"));
                bare(from) == room && to == jid || from == jid && bare(to) == room
            };
            let heard: Vec<&Bytes> = way.heard.iter().filter(of_both).collect();
            let last = heard.len().saturating_sub(12);
            lines.extend(heard[last..].iter().map(|bytes| format!("\n  {}", xml::text(bytes))));
        }
        lines.concat()
    }

    /// What the room has told a session, all in all.
    fn told(&self, site: usize, room: &Room, client: &Client) -> View {
        let mut told = View::default();
        let mut see = |bytes: &Bytes| {
            let stanza = xml::text(bytes);
            let is_from = attribute(stanza, "from").map(bare) == Some(&room.jid);
            if is_from && attribute(stanza, "to") == Some(&client.jid) {
                told.see(stanza);
            }
        };
        if site == client.site {
            self.servers[site].local.iter().for_each(|(_, bytes)| see(bytes));
        } else {
            let (pair, end) = if site == 0 { (client.site - 1, 0) } else { (site - 1, 1) };
            self.ways[pair][end].sent.iter().for_each(|sent| see(&sent.bytes));
        }
        told
    }
}

/// What one sender wrote for one recipient, and whether it may be missing; and what was read.
#[derive(Default)]
struct Flow<'a> {
    written: Vec<(&'a Bytes, bool)>,
    read: Vec<&'a Bytes>,
}

/// P1, P3, P4, §5 rule 4: each recipient reads what was written to it, all of it, in order, and nothing else; words are heard once.
/// Returns how many visits were left out.
fn check_way(way: &Way, declared: Declared<'_>, heard_here: (&Speeches, usize), near: &Near, lost: &mut Lost) -> u64 {
    let (speeches, site) = heard_here;
    let here = speeches.iter().filter(|(_, speech)| speech.site == site);
    let here: BTreeSet<String> = here.map(|(body, _)| body.clone()).collect();
    let key = |bytes: &Bytes| {
        let stanza = xml::text(bytes);
        let of = |name| attribute(stanza, name).unwrap_or_default();
        // A room's talk is in order, whoever speaks; what it answers comes in the order of its answers. Two sessions of one user are two
        // senders (RFC 6120 §10.1): one's words may be shared with others' and wait for them.
        // What a room has to say to one session, in its own name, is not part of the talk.
        let is_aside = || stanza.starts_with("<message") && !of("from").contains('/') && of("type") != "groupchat";
        let sender = match (stanza.starts_with("<iq"), is_of_room(of("from"))) {
            (true, _) => format!("iq of {}", of("from")),
            (false, true) if is_aside() => format!("{} itself", of("from")),
            (false, true) => bare(of("from")).to_owned(),
            (false, false) => of("from").to_owned(),
        };
        (sender, recipient(of("to")))
    };
    // What a mirror said and a killed process had marked as given: the server may not have read it.
    let said: BTreeSet<&Bytes> = way.sent.iter().map(|sent| &sent.bytes).chain(&way.heard).collect();
    let doubted: Vec<&Bytes> = way.doubtful.iter().filter(|bytes| !said.contains(bytes)).collect();
    for bytes in &doubted {
        let of = |name| attribute(xml::text(bytes), name).unwrap_or_default();
        for (room, session) in [("from", "to"), ("to", "from")] {
            lost.insert((bare(of(room)).to_owned(), of(session).to_owned()));
        }
    }
    let mut flows: BTreeMap<(String, String), Flow<'_>> = BTreeMap::new();
    // What a room repeats for us is kept from the session in whose name it was asked.
    let is_ours = |sent: &Sent| {
        declared.found && sent.repeated && !sent.is_stray && words::body(xml::text(&sent.bytes)).is_some()
    };
    let is_sent = |sent: &&Sent| !is_ours(sent) && !near.has_settled(&sent.bytes);
    for sent in way.sent.iter().filter(is_sent) {
        let written = (&sent.bytes, way.is_excused(sent) || declared.found && sent.is_stray);
        flows.entry(key(&sent.bytes)).or_default().written.push(written);
    }
    for heard in way.heard.iter().filter(|heard| !near.has_settled(heard)) {
        flows.entry(key(heard)).or_default().read.push(heard);
    }
    check_whispers(way, &near.whispers);
    let mut unseen = 0;
    for ((from, to), Flow { written, read }) in flows {
        let written = match declared.found {
            true => without_unwanted(written, &read),
            false => written,
        };
        let settled = read
            .iter()
            .any(|bytes| is_near_leave(bytes) && !written.iter().any(|(sent, _)| sent == bytes));
        let declared = Declared {
            settled: settled && declared.shows,
            ..declared
        };
        let is_room = is_of_room(&from);
        let declared = Declared {
            echo: (is_room && declared.shows).then_some(&here),
            ..declared
        };
        // Words that wait while a room is asked for what was lost are overtaken by all else.
        let is_apart = |bytes: &Bytes| declared.found && words::body(xml::text(bytes)).is_some();
        let mut missing = Vec::new();
        for apart in [false, true] {
            let written: Vec<_> = written
                .iter()
                .filter(|(bytes, _)| is_apart(bytes) == apart)
                .copied()
                .collect();
            let read: Vec<_> = read.iter().filter(|bytes| is_apart(bytes) == apart).copied().collect();
            match matching(&written, &read, declared) {
                Some(found) => {
                    unseen += found.visits;
                    missing.extend(found.lost.into_iter().map(|at| written[at].0));
                }
                None => panic!("from {from} to {to}: {}", difference(&written, &read, declared)),
            }
        }
        for bytes in missing {
            let stanza = xml::text(bytes);
            // Either of them may be the room.
            for (room, session) in [("from", "to"), ("to", "from")] {
                let of = |name| attribute(stanza, name).unwrap_or_default();
                lost.insert((bare(of(room)).to_owned(), of(session).to_owned()));
            }
        }
        let of_flow = |bytes: &&&Bytes| key(bytes) == (from.clone(), to.clone());
        let doubted: Vec<&Bytes> = doubted.iter().filter(of_flow).copied().collect();
        // Who was out has words from the room's history, see `check_heard`.
        if is_room && !declared.out {
            words::check(&written, &read, &doubted, declared, heard_here);
        }
    }
    unseen
}

/// Without what a room tells one who was out, and whom it has let in because a sidecar had asked: from that on until it is out again. That
/// it is in, it is not told.
fn without_unwanted<'a>(written: Vec<(&'a Bytes, bool)>, read: &[&Bytes]) -> Vec<(&'a Bytes, bool)> {
    let (mut is_inside, mut is_unwanted) = (false, false);
    let is_wanted = |(bytes, _): &(&Bytes, bool)| {
        let stanza = xml::text(bytes);
        let is_answer = attribute(stanza, "id").is_some_and(|id| id.starts_with("narrows-"));
        let is_entrance = name(stanza) == "presence"
            && attribute(stanza, "type").is_none()
            && muc_user(stanza).is_some_and(|x| has_status(x, "110"));
        is_unwanted &= !is_entrance || is_answer;
        is_unwanted |= is_answer && is_entrance && !is_inside && !read.contains(bytes);
        let mut was_unwanted = is_unwanted;
        let is_leave = is_own_leave(stanza).is_some() || stanza.contains("<destroy>");
        let is_word = words::body(stanza).is_some() && !words::is_old(stanza);
        was_unwanted &= attribute(stanza, "type") != Some("unavailable") && !is_word;
        is_unwanted &= !is_leave;
        is_inside = (is_inside || is_entrance) && !is_leave;
        !was_unwanted
    };
    written.into_iter().filter(is_wanted).collect()
}

/// One's own leave as it is confirmed near by.
fn is_near_leave(bytes: &Bytes) -> bool {
    is_own_leave(xml::text(bytes)).is_some_and(|x| x.matches("<status ").count() == 1)
}

/// That one is out oneself, with what is said of it.
fn is_own_leave(stanza: &str) -> Option<&str> {
    let is_leave = name(stanza) == "presence" && attribute(stanza, "type") == Some("unavailable");
    muc_user(stanza).filter(|x| is_leave && has_status(x, "110") && !has_status(x, "303"))
}

/// What was settled beside its author, because the room was out of reach.
#[derive(Default)]
struct Near {
    /// The words of private messages that were given out there. No two are the same.
    whispers: BTreeSet<String>,
    /// What those said who may not speak and were told so there.
    refused: BTreeSet<Bytes>,
}

impl Near {
    fn of(way: &Way, back: &Way) -> Self {
        Self {
            whispers: &whispers(way, back) | &whispers(back, way),
            refused: refused_near(way, back),
        }
    }

    fn has_settled(&self, bytes: &Bytes) -> bool {
        whisper(bytes).is_some_and(|words| self.whispers.contains(words)) || self.refused.contains(bytes)
    }
}

fn whisper(bytes: &Bytes) -> Option<&str> {
    let stanza = xml::text(bytes);
    (attribute(stanza, "type") == Some("chat")).then(|| child(stanza, "body"))?
}

/// What `there` was to bring to a room and did not, while `back` brought it from there though the room never said it.
fn whispers(there: &Way, back: &Way) -> BTreeSet<String> {
    let heard = |way: &Way| -> BTreeSet<String> { way.heard.iter().filter_map(whisper).map(str::to_owned).collect() };
    let said = |way: &Way| -> BTreeSet<String> {
        let words = way.sent.iter().filter_map(|sent| whisper(&sent.bytes));
        words.map(str::to_owned).collect()
    };
    &(&said(there) - &heard(there)) & &(&heard(back) - &said(back))
}

/// The author of words to all in a room, and their id.
fn speech(bytes: &Bytes) -> Option<(String, String)> {
    let stanza = xml::text(bytes);
    let of = |name| attribute(stanza, name).unwrap_or_default().to_owned();
    let is_speech = of("type") == "groupchat" && domain_of(&of("to")).starts_with("conference.");
    is_speech.then(|| (of("from"), of("id")))
}

/// What was not brought to a room because `back` told its author that he may not speak, though the room never said so: as often as he was
/// told, for some words have no id.
fn refused_near(way: &Way, back: &Way) -> BTreeSet<Bytes> {
    let refusal = |bytes: &Bytes| {
        let stanza = xml::text(bytes);
        let of = |name| attribute(stanza, name).unwrap_or_default().to_owned();
        (name(stanza) == "message" && stanza.contains("<forbidden ")).then(|| (of("to"), of("id")))
    };
    let mut told: BTreeMap<(String, String), i64> = BTreeMap::new();
    for key in back.heard.iter().filter_map(refusal) {
        *told.entry(key).or_default() += 1;
    }
    for key in back.sent.iter().filter_map(|sent| refusal(&sent.bytes)) {
        *told.entry(key).or_default() -= 1;
    }
    let body = |bytes: &Bytes| child(xml::text(bytes), "body").map(str::to_owned);
    let brought: BTreeSet<String> = way.heard.iter().filter_map(body).collect();
    let mut refused = BTreeSet::new();
    for Sent { bytes, .. } in &way.sent {
        if let Some(times) = speech(bytes)
            .and_then(|key| told.get_mut(&key))
            .filter(|times| **times > 0)
            && body(bytes).is_some_and(|body| !brought.contains(&body))
        {
            *times -= 1;
            refused.insert(bytes.clone());
        }
    }
    refused
}

/// Each session hears a whisper once, from a room.
fn check_whispers(way: &Way, near: &BTreeSet<String>) {
    let mut heard = BTreeSet::new();
    for bytes in &way.heard {
        if let Some(words) = whisper(bytes).filter(|words| near.contains(*words)) {
            let stanza = xml::text(bytes);
            let of = |name| attribute(stanza, name).unwrap_or_default();
            assert!(domain_of(of("from")).starts_with("conference."), "{stanza}");
            assert!(heard.insert((of("to"), words)), "heard twice: {stanza}");
        }
    }
}

fn is_of_room(address: &str) -> bool {
    domain_of(address).starts_with("conference.")
}

/// Order is kept towards a session, or an account; a room hears a user in order, by whichever nick it is addressed.
fn recipient(to: &str) -> String {
    match is_of_room(to) {
        true => bare(to).to_owned(),
        false => to.to_owned(),
    }
}

/// Who came to a room and went, as one session was to be told: where the entrance stands, and the leave. Nothing else of that occupant stands
/// between them, and it is neither the session itself nor one who has only changed the nick.
fn visits(sent: &[(&Bytes, bool)]) -> Vec<(usize, usize)> {
    let mut came = BTreeMap::new();
    let mut visits = Vec::new();
    for (at, (bytes, _)) in sent.iter().enumerate() {
        let stanza = xml::text(bytes);
        let from = attribute(stanza, "from").unwrap_or_default();
        let before = came.remove(from);
        let Some(x) = muc_user(stanza).filter(|_| name(stanza) == "presence") else {
            continue;
        };
        if has_status(x, "110") || has_status(x, "303") {
            continue;
        }
        match (attribute(stanza, "type"), before) {
            (None, None) => {
                came.insert(from, at);
            }
            (Some("unavailable"), Some(entrance)) => visits.push((entrance, at)),
            (None | Some(_), _) => {}
        }
    }
    visits
}

/// What was written and not read.
#[derive(Default)]
struct Missing {
    /// Where it stands that may have been lost.
    lost: Vec<usize>,
    /// How many visits were left out.
    visits: u64,
}

/// Which of what was written is missing, if what was read can be what was written but for what may be missing or added. A visit may be
/// missing as a whole: nobody saw it while the link was down.
fn matching(sent: &[(&Bytes, bool)], heard: &[&Bytes], declared: Declared<'_>) -> Option<Missing> {
    if sent.len() == heard.len() && sent.iter().zip(heard).all(|((sent, _), heard)| sent == heard) {
        return Some(Missing::default());
    }
    let visits = if declared.visits { visits(sent) } else { Vec::new() };
    let of_visit: BTreeSet<usize> = visits.iter().flat_map(|(came, went)| [*came, *went]).collect();
    let is_excused = |at: usize| sent[at].1 || declared.may_be_missing(sent[at].0);
    let may_skip = |at: usize| is_excused(at) || of_visit.contains(&at);
    let is_same = |i: usize, j: usize| declared.is_heard(sent[i], heard[j]);
    // From the end: whether the rest of one fits the rest of the other.
    let mut fits = vec![vec![false; heard.len() + 1]; sent.len() + 1];
    for i in (0..=sent.len()).rev() {
        for j in (0..=heard.len()).rev() {
            fits[i][j] = i == sent.len() && j == heard.len()
                || i < sent.len() && may_skip(i) && fits[i + 1][j]
                || j < heard.len() && declared.may_be_extra(heard[j]) && fits[i][j + 1]
                || i < sent.len() && j < heard.len() && fits[i + 1][j + 1] && is_same(i, j);
        }
    }
    if !fits[0][0] {
        return None;
    }
    let (mut i, mut j, mut lost) = (0, 0, Vec::new());
    let mut skipped = BTreeSet::new();
    while i < sent.len() || j < heard.len() {
        if i < sent.len() && j < heard.len() && fits[i + 1][j + 1] && is_same(i, j) {
            (i, j) = (i + 1, j + 1);
        } else if j < heard.len() && declared.may_be_extra(heard[j]) && fits[i][j + 1] {
            j += 1;
        } else {
            if sent[i].1 {
                lost.push(i);
            }
            skipped.insert(i);
            i += 1;
        }
    }
    // Half a visit is nobody's who was never seen.
    let is_whole = |(came, went): &(usize, usize)| {
        let halves = [(came, went), (went, came)];
        halves
            .iter()
            .all(|(one, other)| !skipped.contains(one) || is_excused(**one) || skipped.contains(other))
    };
    let is_out = |(came, _): &&(usize, usize)| skipped.contains(came) && !is_excused(*came);
    visits.iter().all(is_whole).then(|| Missing {
        lost,
        visits: visits.iter().filter(is_out).count() as u64,
    })
}

/// How far one can be followed in the other, and what stands there.
fn difference(sent: &[(&Bytes, bool)], heard: &[&Bytes], declared: Declared<'_>) -> String {
    let mut reached = BTreeSet::from([(0, 0)]);
    let mut furthest = (0, 0);
    while let Some((i, j)) = reached.pop_first() {
        furthest = furthest.max((i + j, i));
        let (written, read) = (sent.get(i), heard.get(j));
        if written.is_some_and(|(bytes, excused)| *excused || declared.may_be_missing(bytes)) {
            reached.insert((i + 1, j));
        }
        if read.is_some_and(|bytes| declared.may_be_extra(bytes)) {
            reached.insert((i, j + 1));
        }
        if let (Some(written), Some(read)) = (written, read)
            && declared.is_heard(*written, read)
        {
            reached.insert((i + 1, j + 1));
        }
    }
    let (i, j) = (furthest.1, furthest.0 - furthest.1);
    let written = sent.get(i).map(|(bytes, _)| xml::text(bytes));
    let read = heard.get(j).map(|bytes| xml::text(bytes));
    let (writes, reads) = (sent.len(), heard.len());
    format!("after {i} of {writes} written and {j} of {reads} read, written\n  {written:?}, read\n  {read:?}")
}

/// G27: a real address reaches a session only if the room showed it to that session.
fn check_real_addresses(way: &Way) {
    let shown = |bytes: &Bytes| -> Vec<(String, String, String)> {
        let stanza = xml::text(bytes);
        let of = |name| attribute(stanza, name).unwrap_or_default();
        let (room, to) = (bare(of("from")), of("to"));
        let Some(x) = muc_user(stanza) else { return Vec::new() };
        let items = elements(inner(x)).into_iter();
        let actors = items.clone().filter_map(|item| child(item, "actor"));
        items
            .chain(actors)
            .filter_map(|item| attribute(item, "jid"))
            .filter(|jid| resource_of(jid).is_some())
            .map(|jid| (room.to_owned(), to.to_owned(), jid.to_owned()))
            .collect()
    };
    let addressed: BTreeSet<_> = way.sent.iter().flat_map(|sent| shown(&sent.bytes)).collect();
    for address in way.heard.iter().flat_map(shown) {
        assert!(addressed.contains(&address), "shown a real address: {address:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FROM: &str = "from='room@conference.a.example/n' to='u@b.example/r'";

    fn fits(sent: &[&str], heard: &[&str], declared: Declared<'_>) -> bool {
        let read = |text: &&str| Bytes::from(text.replace("FROM", FROM));
        let (sent, heard): (Vec<Bytes>, Vec<Bytes>) =
            (sent.iter().map(read).collect(), heard.iter().map(read).collect());
        let sent: Vec<(&Bytes, bool)> = sent.iter().map(|bytes| (bytes, false)).collect();
        let heard: Vec<&Bytes> = heard.iter().collect();
        matching(&sent, &heard, declared).is_some()
    }

    const NOTHING: Declared<'static> = Declared {
        delay: false,
        shows: false,
        echo: None,
        id: false,
        near: false,
        refused: false,
        truth: false,
        settled: false,
        found: false,
        out: false,
        visits: false,
    };

    /// Each declared difference lets through what it is about, and nothing else does.
    #[test]
    fn differences_are_let_through_by_name() {
        let words = "<message FROM type='groupchat' id='1'><body>x</body></message>";
        let archived =
            "<message FROM type='groupchat' id='1'><body>x</body><stanza-id xmlns='urn:xmpp:sid:0' id='7'/></message>";
        let late = "<message FROM type='groupchat' id='1'><body>x</body>\
                    <delay xmlns='urn:xmpp:delay' from='b.example' stamp='s'/></message>";
        let old = "<message FROM type='groupchat' id='1'><body>x</body>\
                   <delay xmlns='urn:xmpp:delay' from='room@conference.a.example' stamp='s'/></message>";
        let gone = "<presence FROM type='unavailable'><x xmlns='http://jabber.org/protocol/muc#user'>\
                    <item role='none'/><status code='333'/></x></presence>";
        let out = "<presence FROM type='unavailable'><x xmlns='http://jabber.org/protocol/muc#user'>\
                   <item role='none'/><status code='110'/></x></presence>";
        let kicked = &out.replace("<status code='110'/>", "<status code='110'/><status code='307'/>");
        let lost = &out.replace("<status code='110'/>", "<status code='110'/><status code='333'/>");
        let ping = "<iq FROM type='get' id='1'><ping xmlns='urn:xmpp:ping'/></iq>";
        let version = "<iq FROM type='get' id='1'><query xmlns='jabber:iq:version'/></iq>";
        let pong = "<iq FROM type='result' id='1'/>";
        let join = "<presence FROM><x xmlns='http://jabber.org/protocol/muc'/></presence>";
        let others = "<message FROM type='groupchat' id='1'><body>from beyond</body></message>";
        let said = BTreeSet::from(["<body>x</body>".to_owned()]);
        let no = "<presence FROM type='error'><error type='wait'/></presence>";
        let came =
            "<presence FROM><x xmlns='http://jabber.org/protocol/muc#user'><item role='participant'/></x></presence>";
        let went = "<presence FROM type='unavailable'><x xmlns='http://jabber.org/protocol/muc#user'><item role='none'/></x></presence>";
        let kinds: [(Declared<'_>, &str); 7] = [
            (Declared { delay: true, ..NOTHING }, "delay"),
            (Declared { shows: true, ..NOTHING }, "shows"),
            (
                Declared {
                    echo: Some(&said),
                    ..NOTHING
                },
                "echo",
            ),
            (Declared { near: true, ..NOTHING }, "near"),
            (
                Declared {
                    refused: true,
                    ..NOTHING
                },
                "refused",
            ),
            (Declared { truth: true, ..NOTHING }, "truth"),
            (
                Declared {
                    visits: true,
                    ..NOTHING
                },
                "visits",
            ),
        ];
        for (sent, heard, by) in [
            (
                &[words, pong][..],
                &[words, pong][..],
                "delay shows echo near refused truth visits",
            ),
            // Both come here: an echo, and the reflection in its other form.
            (&[words], &[late], "delay echo"),
            (&[words], &[old], ""),
            (&[others], &[], ""),
            (&[], &[others], ""),
            (&[], &[gone], "shows"),
            (&[], &[out], "shows"),
            (&[], &[kicked], ""),
            (&[], &[lost], "truth"),
            (&[archived], &[words], "echo"),
            (&[], &[pong], "near"),
            (&[ping], &[], "near refused"),
            (&[version], &[], "refused"),
            (&[gone], &[], "shows"),
            (&[join], &[], "refused"),
            (&[], &[no], "refused"),
            (&[pong, words], &[words, pong], "echo near"),
            (&[kicked, words], &[words, kicked], "echo"),
            (&[came, went, version], &[version], "shows visits"),
            (&[came, version, went], &[version, went], "shows refused"),
            (&[came, words, went], &[words], "shows"),
            (&[went, came], &[], "shows"),
        ] {
            for (declared, kind) in kinds {
                assert_eq!(
                    fits(sent, heard, declared),
                    by.contains(kind),
                    "{kind}: {sent:?} as {heard:?}"
                );
            }
        }
    }
}
