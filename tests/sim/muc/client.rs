//! A client, and what its user is shown.

use std::collections::BTreeMap;

use bytes::Bytes;
use narrows::stanza::bare;

use super::{
    server::Said,
    xml::{self, attribute, child, elements, has_status, inner, muc_user, name},
};
use crate::random::Random;

/// An occupant as somebody is shown it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Shown {
    pub role: String,
    pub affiliation: String,
    pub show: String,
}

/// A room as one session has been told of it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct View {
    /// The session's own nick, while it is in.
    pub inside: Option<String>,
    pub shown: BTreeMap<String, Shown>,
}

impl View {
    /// Takes in what the room says to this session.
    pub fn see(&mut self, stanza: &str) {
        let nick = attribute(stanza, "from").and_then(|from| from.split_once('/'));
        let (Some((_, nick)), Some(x), "presence") = (nick, muc_user(stanza), name(stanza)) else {
            return;
        };
        let item = child(x, "item").unwrap_or_default();
        let of_item = |name| attribute(item, name).unwrap_or_default().to_owned();
        match attribute(stanza, "type") {
            None => {
                let show = child(stanza, "show").map(inner).unwrap_or_default().to_owned();
                let shown = Shown {
                    role: of_item("role"),
                    affiliation: of_item("affiliation"),
                    show,
                };
                self.shown.insert(nick.to_owned(), shown);
                if has_status(x, "110") {
                    self.inside = Some(nick.to_owned());
                }
            }
            Some("unavailable") => {
                self.shown.remove(nick);
                let own = has_status(x, "110") || self.inside.as_deref() == Some(nick);
                if own && has_status(x, "303") {
                    self.inside = Some(of_item("nick"));
                } else if own && of_item("role") == "none" {
                    *self = Self::default();
                }
            }
            Some(_) => {}
        }
    }
}

/// What a client knows of a room that it is in, or has asked to enter.
#[derive(Clone, Debug, Default)]
pub struct Stay {
    /// It has asked under this id, and has no answer yet.
    pub asked: Option<String>,
    /// It has wanted another nick: which one it has is known to the room only, for a while.
    pub has_changed_nick: bool,
    /// It has asked to be out: that it is, is no news.
    pub leaves: bool,
    pub view: View,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Question {
    SelfPing,
    Room,
    Occupant,
}

#[derive(Clone, Debug)]
pub struct Asked {
    pub question: Question,
    pub to: String,
    pub answers: u64,
}

pub struct Client {
    pub site: usize,
    pub jid: String,
    pub online: bool,
    pub stays: BTreeMap<String, Stay>,
    /// By id.
    pub asked: BTreeMap<String, Asked>,
    /// What it entered again because a self-ping (XEP-0410) told it that it was out.
    pub rejoins: Vec<String>,
    serial: u64,
}

/// What a client does, in its own words; the world has its server say it.
#[derive(Clone, Debug)]
pub struct Act {
    pub name: &'static str,
    pub stanza_type: Option<&'static str>,
    pub id: Option<String>,
    pub to: String,
    pub payload: String,
}

impl Act {
    pub fn said(&self) -> Said<'_> {
        Said {
            name: self.name,
            stanza_type: self.stanza_type,
            id: self.id.as_deref(),
            to: &self.to,
            payload: &self.payload,
        }
    }
}

impl Client {
    pub fn new(site: usize, jid: String) -> Self {
        Self {
            site,
            jid,
            online: false,
            stays: BTreeMap::new(),
            asked: BTreeMap::new(),
            rejoins: Vec::new(),
            serial: 0,
        }
    }

    fn id(&mut self) -> String {
        self.serial += 1;
        format!("{}-{}", self.jid.replace(['@', '/', '.'], "-"), self.serial)
    }

    /// Something comes for this client, and it may have something to say to it.
    pub fn hear(&mut self, bytes: &Bytes) -> Option<Act> {
        let stanza = xml::text(bytes);
        let from = attribute(stanza, "from")?.to_owned();
        let room = bare(&from).to_owned();
        let id = attribute(stanza, "id");
        match (name(stanza), attribute(stanza, "type")) {
            ("presence", Some("error")) => {
                let stay = self.stays.get_mut(&room)?;
                if stay.asked.as_deref() == id {
                    stay.asked = None;
                    if stay.view.inside.is_none() {
                        self.stays.remove(&room);
                    }
                }
                None
            }
            ("presence", _) => {
                let stay = self.stays.get_mut(&room)?;
                stay.view.see(stanza);
                if stay.view.inside.is_some() {
                    let is_own = muc_user(stanza).is_some_and(|x| has_status(x, "110"));
                    if is_own && attribute(stanza, "type").is_none() && stay.asked.as_deref() == id {
                        stay.asked = None;
                    }
                } else if stay.asked.is_none() && attribute(stanza, "type").is_some() {
                    self.stays.remove(&room);
                }
                None
            }
            ("iq", Some("get" | "set")) => {
                let query = elements(inner(stanza)).first().copied()?;
                let namespace = attribute(query, "xmlns").unwrap_or_default();
                Some(Act {
                    name: "iq",
                    stanza_type: Some("result"),
                    id: id.map(str::to_owned),
                    to: from,
                    payload: format!("<query xmlns='{namespace}'><name>model</name></query>"),
                })
            }
            ("iq", stanza_type) => {
                let asked = self.asked.get_mut(id?)?;
                asked.answers += 1;
                let (question, room) = (asked.question, bare(&asked.to).to_owned());
                // XEP-0410 §3: only this says that one is out; not what the far nick, or a server on the way, says.
                let out = stanza_type == Some("error") && stanza.contains("<not-acceptable ");
                let stay = self.stays.get(&room).filter(|stay| !stay.leaves);
                let inside = stay.and_then(|stay| stay.view.inside.clone());
                if question == Question::SelfPing
                    && out
                    && let Some(nick) = inside
                {
                    self.rejoins.push(room.clone());
                    return Some(self.join(&room, &nick, None, None));
                }
                None
            }
            _ => None,
        }
    }

    pub fn join(&mut self, room: &str, nick: &str, password: Option<&str>, history: Option<u64>) -> Act {
        let id = self.id();
        let stay = self.stays.entry(room.to_owned()).or_default();
        stay.asked = Some(id.clone());
        stay.leaves = false;
        if stay.view.inside.is_none() {
            stay.view = View::default();
            stay.has_changed_nick = false;
        }
        let password = password.map(|password| format!("<password>{password}</password>"));
        let history = history.map(|lines| format!("<history maxstanzas='{lines}'/>"));
        let x = password.unwrap_or_default() + &history.unwrap_or_default();
        Act {
            name: "presence",
            stanza_type: None,
            id: Some(id),
            to: format!("{room}/{nick}"),
            payload: format!("<x xmlns='http://jabber.org/protocol/muc'>{x}</x>"),
        }
    }

    /// XEP-0410
    pub fn ping_self(&mut self, room: &str) -> Option<Act> {
        let nick = self.stays.get(room)?.view.inside.clone()?;
        let to = format!("{room}/{nick}");
        Some(self.ask(
            Question::SelfPing,
            "get",
            to,
            "<ping xmlns='urn:xmpp:ping'/>".to_owned(),
        ))
    }

    pub fn ask(&mut self, question: Question, stanza_type: &'static str, to: String, payload: String) -> Act {
        let id = self.id();
        let asked = Asked {
            question,
            to: to.clone(),
            answers: 0,
        };
        self.asked.insert(id.clone(), asked);
        Act {
            name: "iq",
            stanza_type: Some(stanza_type),
            id: Some(id),
            to,
            payload,
        }
    }

    fn write(&mut self, stanza_type: Option<&'static str>, with_id: bool, to: String, payload: String) -> Act {
        Act {
            name: "message",
            stanza_type,
            id: with_id.then(|| self.id()),
            to,
            payload,
        }
    }

    /// Something that a user in this room might do. `number` makes words that were never said before.
    pub fn act_in(&mut self, room: &str, number: u64, everybody: &[String], random: &mut Random) -> Option<Act> {
        let view = self.stays.get(room)?.view.clone();
        let nick = view.inside.clone()?;
        let occupants: Vec<&String> = view.shown.keys().collect();
        // Alone, and between the two presences of a change of nick.
        if occupants.is_empty() {
            return None;
        }
        let other = (*occupants.get(random.below(occupants.len() as u64) as usize)?).clone();
        let somebody = everybody[random.below(everybody.len() as u64) as usize].clone();
        let length = if random.one_in(10) { 1500 } else { random.below(60) };
        let body: String = (0..length).map(|_| char::from(b'a' + random.below(26) as u8)).collect();
        let body = format!("<body>{number} {body}</body>");
        let presence = |to: String, payload: String| Act {
            name: "presence",
            stanza_type: None,
            id: None,
            to,
            payload,
        };
        let admin = |item: String| format!("<query xmlns='http://jabber.org/protocol/muc#admin'>{item}</query>");
        let own = view.shown.get(&nick);
        let rules = own.is_some_and(|own| own.role == "moderator") && random.one_in(3);
        let what = if rules { 35 + random.below(15) } else { random.below(50) };
        Some(match what {
            0..=15 => {
                let with_id = !random.one_in(4);
                let marked = if random.one_in(3) {
                    "<origin-id xmlns='urn:xmpp:sid:0' id='o'/>"
                } else {
                    ""
                };
                self.write(Some("groupchat"), with_id, room.to_owned(), body + marked)
            }
            16..=19 => {
                let x = format!("<x xmlns='{}'/>", xml::MUC_USER);
                self.write(Some("chat"), true, format!("{room}/{other}"), body + &x)
            }
            20 => self.write(Some("chat"), true, format!("{room}/nobody"), body),
            21..=22 => {
                self.stays.get_mut(room)?.has_changed_nick = true;
                presence(format!("{room}/{}", a_nick(random)), String::new())
            }
            23..=25 => {
                let show = random.pick(&["away", "dnd", "xa", "chat"]);
                let payload = format!("<show>{show}</show><status>{number}</status>");
                presence(format!("{room}/{nick}"), payload)
            }
            26..=27 => {
                // Who leaves waits no longer to be let in.
                let stay = self.stays.get_mut(room)?;
                (stay.asked, stay.leaves) = (None, true);
                Act {
                    stanza_type: Some("unavailable"),
                    ..presence(format!("{room}/{nick}"), "<status>bye</status>".to_owned())
                }
            }
            28..=30 => return self.ping_self(room),
            31 => {
                let what = random.pick(&["disco#info", "disco#items"]);
                let payload = format!("<query xmlns='http://jabber.org/protocol/{what}'/>");
                self.ask(Question::Room, "get", room.to_owned(), payload)
            }
            32 => {
                let service = room.split_once('@').expect("rooms have names").1.to_owned();
                let payload = random.pick(&[
                    "<query xmlns='http://jabber.org/protocol/disco#info'/>",
                    "<ping xmlns='urn:xmpp:ping'/>",
                ]);
                self.ask(Question::Room, "get", service, payload.to_owned())
            }
            33..=34 => {
                let payload = "<query xmlns='jabber:iq:version'/>".to_owned();
                self.ask(Question::Occupant, "get", format!("{room}/{other}"), payload)
            }
            35..=36 => {
                let subject = format!("<subject>{number}</subject>");
                self.write(Some("groupchat"), true, room.to_owned(), subject)
            }
            37 => {
                let (to, x) = (bare(&somebody), xml::MUC_USER);
                let invite = format!("<x xmlns='{x}'><invite to='{to}'><reason>come</reason></invite></x>");
                self.write(None, true, room.to_owned(), invite)
            }
            38 => {
                let form = "<x type='submit' xmlns='jabber:x:data'><field var='muc#role'><value>participant</value></field></x>";
                self.write(None, true, room.to_owned(), form.to_owned())
            }
            39..=41 => {
                let role = random.pick(&["none", "visitor", "participant", "participant", "moderator"]);
                let item = admin(format!("<item nick='{other}' role='{role}'/>"));
                self.ask(Question::Room, "set", room.to_owned(), item)
            }
            42..=44 => {
                let affiliation = random.pick(&["outcast", "none", "none", "member", "member", "admin"]);
                let item = admin(format!("<item jid='{}' affiliation='{affiliation}'/>", bare(&somebody)));
                self.ask(Question::Room, "set", room.to_owned(), item)
            }
            45 if random.one_in(3) => {
                let payload = "<query xmlns='http://jabber.org/protocol/muc#owner'><destroy><reason>closing</reason></destroy></query>";
                self.ask(Question::Room, "set", room.to_owned(), payload.to_owned())
            }
            _ => {
                let field = random.pick(&["moderatedroom", "membersonly", "whois", "whois", "presencebroadcast"]);
                let value = random.below(2);
                let payload = format!(
                    "<query xmlns='http://jabber.org/protocol/muc#owner'><x xmlns='jabber:x:data' type='submit'>\
                     <field var='muc#roomconfig_{field}'><value>{value}</value></field></x></query>"
                );
                self.ask(Question::Room, "set", room.to_owned(), payload)
            }
        })
    }
}

/// From few enough that they are often taken.
pub fn a_nick(random: &mut Random) -> String {
    format!("nick{}", random.below(12))
}
