//! A server: its clients' sessions, its rooms, and what it has to say to other servers.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use narrows::{
    stanza::{bare, domain_of},
    time::Wall,
};

use super::{
    room::{self, Room, Tools, Words},
    xml::{self, attribute, inner, name},
};
use crate::random::Random;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Flavour {
    Prosody,
    Ejabberd,
}

/// What a session says.
pub struct Said<'a> {
    pub name: &'a str,
    pub stanza_type: Option<&'a str>,
    pub id: Option<&'a str>,
    pub to: &'a str,
    pub payload: &'a str,
}

pub struct Server {
    pub name: char,
    pub flavour: Flavour,
    pub rooms: BTreeMap<String, Room>,
    /// Who is there, and where it has sent its presence to: those are told when it goes (RFC 6121 §4.6).
    sessions: BTreeMap<String, BTreeSet<String>>,
    /// What waits to be written to other servers, by the name of their site and the flow that it belongs to.
    outbox: BTreeMap<char, BTreeMap<String, VecDeque<Words>>>,
    /// For sessions that are there.
    pub delivered: VecDeque<(String, Bytes)>,
    /// What was given to own sessions or would have been if they were there, by rooms of this server. For the checks.
    pub local: Vec<(String, Bytes)>,
    events: u64,
}

impl Server {
    pub fn new(name: char, flavour: Flavour) -> Self {
        Self {
            name,
            flavour,
            rooms: BTreeMap::new(),
            sessions: BTreeMap::new(),
            outbox: BTreeMap::new(),
            delivered: VecDeque::new(),
            local: Vec::new(),
            events: 0,
        }
    }

    pub fn host(&self) -> String {
        format!("{}.example", self.name)
    }

    pub fn service(&self) -> String {
        format!("conference.{}.example", self.name)
    }

    pub fn connect(&mut self, jid: &str) {
        self.sessions.insert(jid.to_owned(), BTreeSet::new());
    }

    /// The session is gone without a word from it or about it: the server lost power, or lost what it knew.
    pub fn forget(&mut self, jid: &str) {
        self.sessions.remove(jid);
    }

    /// The session ends, and the server says so to whomever it had sent its presence.
    pub fn disconnect(&mut self, jid: &str, wall: Wall, random: &mut Random) {
        for to in self.sessions.remove(jid).unwrap_or_default() {
            let attributes = [
                ("type", Some("unavailable")),
                ("to", Some(to.as_str())),
                ("from", Some(jid)),
                ("xml:lang", None),
            ];
            let bytes = xml::write(self.flavour, self.events, "presence", &attributes, "");
            self.route(bytes, wall, random);
        }
    }

    /// A session of this server says something.
    pub fn hear(&mut self, jid: &str, said: &Said<'_>, wall: Wall, random: &mut Random) {
        let Some(directed) = self.sessions.get_mut(jid) else {
            return;
        };
        match (said.name, said.stanza_type) {
            ("presence", None) => drop(directed.insert(said.to.to_owned())),
            ("presence", Some("unavailable")) => drop(directed.remove(said.to)),
            _ => {}
        }
        self.events += 1;
        let attributes = [
            ("type", said.stanza_type),
            ("to", Some(said.to)),
            ("from", Some(jid)),
            ("id", said.id),
            ("xml:lang", Some("en")),
        ];
        let photo = match (said.name, said.stanza_type, self.flavour) {
            ("presence", None, Flavour::Prosody) => "<x xmlns='vcard-temp:x:update'><photo/></x>",
            ("presence", None, Flavour::Ejabberd) => "<x xmlns='vcard-temp:x:update'/>",
            _ => "",
        };
        let payload = xml::recode(self.flavour, &format!("{}{photo}", said.payload));
        let bytes = xml::write(self.flavour, self.events, said.name, &attributes, &payload);
        self.route(bytes, wall, random);
    }

    /// A stanza is for this server, or for another one.
    pub fn route(&mut self, bytes: Bytes, wall: Wall, random: &mut Random) {
        let words = self.words(bytes);
        self.route_all(vec![words], wall, random);
    }

    fn route_all(&mut self, words: Vec<Words>, wall: Wall, random: &mut Random) {
        let mut waiting = VecDeque::from(words);
        while let Some(words) = waiting.pop_front() {
            let domain = domain_of(&words.to).to_owned();
            if domain == self.host() {
                waiting.extend(self.deliver(words));
            } else if domain == self.service() {
                waiting.extend(self.give_to_room(&words, wall, random));
            } else {
                let flow = attribute(xml::text(&words.bytes), "from").map(bare).unwrap_or_default();
                let site = domain
                    .trim_start_matches("conference.")
                    .chars()
                    .next()
                    .expect("sites have names");
                let flows = self.outbox.entry(site).or_default();
                flows.entry(flow.to_owned()).or_default().push_back(words);
            }
        }
    }

    fn words(&mut self, bytes: Bytes) -> Words {
        self.events += 1;
        let to = attribute(xml::text(&bytes), "to")
            .expect("stanzas have an address")
            .to_owned();
        let event = self.events;
        let repeated = false;
        Words {
            to,
            bytes,
            event,
            repeated,
        }
    }

    fn give_to_room(&mut self, words: &Words, wall: Wall, random: &mut Random) -> Vec<Words> {
        let stanza = xml::text(&words.bytes);
        let mut tools = Tools {
            flavour: self.flavour,
            wall,
            random,
            events: &mut self.events,
            words: Vec::new(),
        };
        if let Some(room) = self.rooms.get_mut(bare(&words.to)) {
            room.handle(stanza, &mut tools);
            return tools.words;
        }
        // The service itself.
        let (name, stanza_type) = (name(stanza), attribute(stanza, "type"));
        if name != "iq" || !matches!(stanza_type, Some("get" | "set")) {
            return Vec::new();
        }
        let from = words.to.as_str();
        let (to, id) = (attribute(stanza, "from"), attribute(stanza, "id"));
        let (stanza_type, payload) = match inner(stanza) {
            query if query.contains("disco#info") => (
                "result",
                "<query xmlns='http://jabber.org/protocol/disco#info'><identity category='conference' type='text'/>\
                 <feature var='http://jabber.org/protocol/muc'/></query>"
                    .to_owned(),
            ),
            query if query.contains("urn:xmpp:ping") => ("result", String::new()),
            _ => (
                "error",
                room::refusal(self.flavour, stanza, "cancel", "service-unavailable", ""),
            ),
        };
        let attributes = [
            ("to", to),
            ("from", Some(from)),
            ("type", Some(stanza_type)),
            ("id", id),
        ];
        let bytes = xml::write(self.flavour, self.events, "iq", &attributes, &payload);
        vec![self.words(bytes)]
    }

    /// For one of our own: if it is not there, who speaks to it or asks it is told, and presences are dropped.
    fn deliver(&mut self, words: Words) -> Option<Words> {
        let stanza = xml::text(&words.bytes);
        let from = attribute(stanza, "from").expect("stanzas say who sent them").to_owned();
        if domain_of(&from) == self.service() {
            self.local.push((words.to.clone(), words.bytes.clone()));
        }
        let session = match words.to.contains('/') {
            true => self.sessions.contains_key(&words.to).then(|| words.to.clone()),
            false => self.sessions.keys().find(|jid| bare(jid) == words.to).cloned(),
        };
        if let Some(session) = session {
            self.delivered.push_back((session, words.bytes));
            return None;
        }
        let answered = match (name(stanza), attribute(stanza, "type")) {
            ("message", stanza_type) => stanza_type != Some("error"),
            ("iq", stanza_type) => matches!(stanza_type, Some("get" | "set")),
            _ => false,
        };
        if !answered {
            return None;
        }
        let payload = room::refusal(
            self.flavour,
            stanza,
            "cancel",
            "service-unavailable",
            "User session not found",
        );
        let attributes = [
            ("to", Some(from.as_str())),
            ("from", Some(words.to.as_str())),
            ("type", Some("error")),
            ("id", attribute(stanza, "id")),
        ];
        let bytes = xml::write(self.flavour, self.events, name(stanza), &attributes, &payload);
        Some(self.words(bytes))
    }

    /// The next stanza for another server. Prosody writes the copies of a broadcast together; ejabberd's rooms and users each write
    /// when they will.
    pub fn next_for(&mut self, site: char, random: &mut Random) -> Option<Words> {
        let flows = self.outbox.get_mut(&site)?;
        let flow = match self.flavour {
            Flavour::Prosody => {
                let first = flows.iter().min_by_key(|(_, words)| words[0].event);
                first.map(|(flow, _)| flow.clone())
            }
            Flavour::Ejabberd => {
                let pick = random.below(flows.len().max(1) as u64) as usize;
                flows.keys().nth(pick).cloned()
            }
        }?;
        let waiting = flows.get_mut(&flow)?;
        let words = waiting.pop_front();
        if waiting.is_empty() {
            flows.remove(&flow);
        }
        words
    }

    /// The server ends and begins again; its sessions are all gone, and unless it ended abruptly it says so.
    pub fn restart(&mut self, abruptly: bool, wall: Wall, random: &mut Random) {
        for jid in self.sessions.keys().cloned().collect::<Vec<_>>() {
            if abruptly {
                self.forget(&jid);
            } else {
                self.disconnect(&jid, wall, random);
            }
        }
        self.with_rooms(wall, random, Room::restart);
    }

    /// Every room says something to all that are in it.
    pub fn speak_in_rooms(&mut self, wall: Wall, random: &mut Random) {
        self.with_rooms(wall, random, |room, tools| room.say_status(&["104"], tools));
    }

    fn with_rooms(&mut self, wall: Wall, random: &mut Random, mut act: impl FnMut(&mut Room, &mut Tools<'_>)) {
        let mut words = Vec::new();
        for room in self.rooms.values_mut() {
            let mut tools = Tools {
                flavour: self.flavour,
                wall,
                random,
                events: &mut self.events,
                words: Vec::new(),
            };
            act(room, &mut tools);
            words.append(&mut tools.words);
        }
        self.route_all(words, wall, random);
    }
}
