//! A room as Prosody 0.12 or ejabberd 23.01 keeps it (XEP-0045): whom it lets in, what it says to whom and in which order.
//!
//! Simpler than they are: what has no bearing on what crosses a link is left out, a nick that two sessions share cannot be changed,
//! and all rooms are persistent.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use narrows::{stanza::bare, time::Wall};

use super::{
    server::Flavour,
    xml::{self, attribute, child, elements, inner, muc_user, name},
};
use crate::random::Random;

/// Lines of history that are kept: fewer than the default of 20, so that it overflows.
const HISTORY_MAX: usize = 6;

/// Clients ask for fewer, if they ask for a number; a sidecar asks for more.
const LINES_ASKED_MAX: usize = 10;

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Affiliation {
    Outcast,
    None,
    Member,
    Admin,
    Owner,
}

impl Affiliation {
    pub const ALL: [Self; 5] = [Self::Outcast, Self::None, Self::Member, Self::Admin, Self::Owner];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outcast => "outcast",
            Self::None => "none",
            Self::Member => "member",
            Self::Admin => "admin",
            Self::Owner => "owner",
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Role {
    None,
    Visitor,
    Participant,
    Moderator,
}

impl Role {
    pub const ALL: [Self; 4] = [Self::None, Self::Visitor, Self::Participant, Self::Moderator];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Visitor => "visitor",
            Self::Participant => "participant",
            Self::Moderator => "moderator",
        }
    }
}

#[derive(Clone, Debug, Default)]
pub struct Config {
    pub moderated: bool,
    pub members_only: bool,
    pub password: Option<String>,
    /// `whois=anyone`: everybody is shown the real addresses.
    pub non_anonymous: bool,
    /// `presencebroadcast=[moderator]`.
    pub restricted: bool,
    /// Whether messages are archived: they then carry a `stanza-id`.
    pub archived: bool,
}

#[derive(Clone, Debug)]
pub struct Occupant {
    /// The newest first.
    pub sessions: Vec<String>,
    pub role: Role,
    pub presence: Presence,
}

/// What an occupant last said of itself.
#[derive(Clone, Debug, Default)]
pub struct Presence {
    id: Option<String>,
    pub payload: String,
}

#[derive(Clone, Debug)]
struct Line {
    nick: String,
    id: Option<String>,
    payload: String,
    stamp: Wall,
}

/// What a room wants sent.
#[derive(Clone, Debug)]
pub struct Words {
    pub to: String,
    pub bytes: Bytes,
    /// Copies of one broadcast share it.
    pub event: u64,
    /// Told to one who has not asked for it: its sidecar has.
    pub repeated: bool,
}

/// What a room is given to do its work with.
pub struct Tools<'a> {
    pub flavour: Flavour,
    pub wall: Wall,
    pub random: &'a mut Random,
    pub events: &'a mut u64,
    pub words: Vec<Words>,
}

impl Tools<'_> {
    fn event(&mut self) -> u64 {
        *self.events += 1;
        *self.events
    }

    fn fresh_id(&mut self) -> String {
        format!("{}", self.random.next())
    }
}

pub struct Room {
    pub jid: String,
    pub config: Config,
    pub occupants: BTreeMap<String, Occupant>,
    pub affiliations: BTreeMap<String, Affiliation>,
    /// Who may make it again when it was destroyed.
    founder: String,
    pub exists: bool,
    subject: Option<(String, String, Wall)>,
    history: VecDeque<Line>,
    archived: u64,
    /// All that was ever said to everybody: by whom, and the words.
    pub said: Vec<(String, String)>,
    /// How much had been said when a session entered that is in, or out only because of its link.
    pub since: BTreeMap<String, usize>,
    /// Questions to occupants under way, by the id that they were given: who asked, and under which id.
    asked: BTreeMap<String, (String, String)>,
    /// Whether the server itself has left somebody with a roster that is not the room's: see `server-behaviour` of restricted
    /// presence and of members-only rooms in Prosody.
    pub keeps_from_some: bool,
    /// Sessions that were expelled because an error came from them.
    pub expelled: BTreeSet<String>,
}

/// What a presence says beside who is where.
#[derive(Default)]
struct Beside<'a> {
    available: bool,
    codes: &'a [&'a str],
    actor: Option<&'a str>,
    reason: Option<&'a str>,
    nick: Option<&'a str>,
    destroy: bool,
    /// What stands before `muc#user`.
    status: Option<&'a str>,
}

impl Beside<'_> {
    const HERE: Self = Self {
        available: true,
        codes: &[],
        actor: None,
        reason: None,
        nick: None,
        destroy: false,
        status: None,
    };
}

/// What a stanza begins with.
struct Head<'a> {
    name: &'a str,
    stanza_type: Option<&'a str>,
    from: &'a str,
    id: Option<&'a str>,
    lang: bool,
}

impl<'a> Head<'a> {
    fn new(name: &'a str, stanza_type: Option<&'a str>, from: &'a str, id: Option<&'a str>, lang: bool) -> Self {
        Self {
            name,
            stanza_type,
            from,
            id,
            lang,
        }
    }
}

/// Which of the three forms of a presence a session is sent.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Variant {
    Anonymous,
    Full,
    Own,
}

impl Room {
    pub fn new(jid: String, founder: String, config: Config) -> Self {
        Self {
            jid,
            config,
            occupants: BTreeMap::new(),
            affiliations: BTreeMap::from([(founder.clone(), Affiliation::Owner)]),
            founder,
            exists: true,
            subject: None,
            history: VecDeque::new(),
            archived: 0,
            said: Vec::new(),
            since: BTreeMap::new(),
            asked: BTreeMap::new(),
            keeps_from_some: false,
            expelled: BTreeSet::new(),
        }
    }

    pub fn nick_of(&self, jid: &str) -> Option<&str> {
        let mut occupants = self.occupants.iter();
        let (nick, _) = occupants.find(|(_, occupant)| occupant.sessions.iter().any(|session| session == jid))?;
        Some(nick)
    }

    pub fn affiliation(&self, jid: &str) -> Affiliation {
        self.affiliations.get(bare(jid)).copied().unwrap_or(Affiliation::None)
    }

    pub fn handle(&mut self, stanza: &str, tools: &mut Tools<'_>) {
        let (Some(from), Some(to)) = (attribute(stanza, "from"), attribute(stanza, "to")) else {
            return;
        };
        let resource = to.split_once('/').map(|(_, nick)| nick);
        match (name(stanza), attribute(stanza, "type"), resource) {
            ("presence", Some("error"), _) => self.expel(from, "presence error", tools),
            ("presence", Some("unavailable"), Some(_)) => self.leave(from, stanza, tools),
            ("presence", None, Some(nick)) => self.handle_presence(from, nick, stanza, tools),
            ("message", Some("error"), nick) => self.handle_error(from, nick, stanza, tools),
            ("message", Some("groupchat"), None) => self.handle_groupchat(from, stanza, tools),
            ("message", _, None) => self.handle_request(from, stanza, tools),
            ("message", _, Some(nick)) => self.handle_private(from, nick, stanza, tools),
            ("iq", Some("get" | "set"), None) => self.handle_question(from, stanza, tools),
            ("iq", Some("get" | "set"), Some(nick)) => self.relay_question(from, nick, stanza, tools),
            ("iq", _, Some(_)) => self.relay_answer(stanza, tools),
            _ => {}
        }
    }

    // Presences.

    fn handle_presence(&mut self, from: &str, nick: &str, stanza: &str, tools: &mut Tools<'_>) {
        let children = elements(inner(stanza)).into_iter();
        let is_join = |child: &&str| attribute(child, "xmlns") == Some("http://jabber.org/protocol/muc");
        let (joins, payload): (Vec<_>, Vec<_>) = children.partition(is_join);
        let payload = payload.concat();
        let presence = Presence {
            id: attribute(stanza, "id").map(str::to_owned),
            payload,
        };
        match self.nick_of(from).map(str::to_owned) {
            Some(old) if old == nick => {
                self.set_presence(nick, presence);
                if joins.is_empty() {
                    self.announce(nick, from, &Beside::HERE, tools);
                } else {
                    // From one who is in: everything again.
                    let begin = tools.words.len();
                    self.welcome(nick, from, joins[0], false, tools);
                    if asks_for_last_words(stanza).is_some() {
                        tools.words[begin..].iter_mut().for_each(|words| words.repeated = true);
                    }
                }
            }
            Some(old) => self.change_nick(&old, nick, from, presence, stanza, tools),
            None if joins.is_empty() => {
                let (kind, condition) = match tools.flavour {
                    Flavour::Prosody => ("cancel", "item-not-found"),
                    Flavour::Ejabberd => ("modify", "not-acceptable"),
                };
                self.refuse(
                    stanza,
                    kind,
                    condition,
                    "You are not currently connected to this chat",
                    tools,
                );
            }
            None => {
                let begin = tools.words.len();
                self.join(from, nick, presence, joins[0], stanza, tools);
                if asks_for_last_words(stanza).is_some() {
                    tools.words[begin..].iter_mut().for_each(|words| words.repeated = true);
                }
            }
        }
    }

    fn set_presence(&mut self, nick: &str, presence: Presence) {
        if let Some(occupant) = self.occupants.get_mut(nick) {
            occupant.presence = presence;
        }
    }

    fn join(&mut self, from: &str, nick: &str, presence: Presence, x: &str, stanza: &str, tools: &mut Tools<'_>) {
        let made = !self.exists;
        if made {
            if bare(from) != self.founder {
                let (kind, condition) = match tools.flavour {
                    Flavour::Prosody => ("cancel", "item-not-found"),
                    Flavour::Ejabberd => ("auth", "forbidden"),
                };
                return self.refuse(
                    stanza,
                    kind,
                    condition,
                    "Room creation is denied by service policy",
                    tools,
                );
            }
            self.exists = true;
            self.affiliations = BTreeMap::from([(self.founder.clone(), Affiliation::Owner)]);
        }
        let affiliation = self.affiliation(from);
        let password = child(x, "password").map(inner);
        let refusal = if affiliation == Affiliation::Outcast {
            Some(("auth", "forbidden", "You have been banned from this room"))
        } else if self.config.members_only && affiliation < Affiliation::Member {
            Some((
                "auth",
                "registration-required",
                "Membership is required to enter this room",
            ))
        } else if self.config.password.is_some() && password != self.config.password.as_deref() {
            Some(("auth", "not-authorized", "A password is required to enter this room"))
        } else {
            let taken = self.occupants.get(nick);
            taken
                .is_some_and(|occupant| bare(&occupant.sessions[0]) != bare(from))
                .then_some((
                    "cancel",
                    "conflict",
                    "That nickname is already in use by another occupant",
                ))
        };
        if let Some((kind, condition, text)) = refusal {
            return self.refuse(stanza, kind, condition, text, tools);
        }
        let role = match affiliation {
            Affiliation::Owner | Affiliation::Admin => Role::Moderator,
            Affiliation::Member => Role::Participant,
            Affiliation::Outcast | Affiliation::None if self.config.moderated => Role::Visitor,
            Affiliation::Outcast | Affiliation::None => Role::Participant,
        };
        let occupant = self.occupants.entry(nick.to_owned()).or_insert(Occupant {
            sessions: Vec::new(),
            role,
            presence: Presence::default(),
        });
        occupant.sessions.insert(0, from.to_owned());
        self.since.entry(from.to_owned()).or_insert(self.said.len());
        self.set_presence(nick, presence);
        self.welcome(nick, from, x, made, tools);
    }

    /// XEP-0045 §7.2: those who are there, the newcomer, what was said, the subject.
    fn welcome(&mut self, nick: &str, session: &str, x: &str, made: bool, tools: &mut Tools<'_>) {
        if tools.flavour == Flavour::Ejabberd {
            self.say_caps(&[session.to_owned()], tools);
        }
        for other in self.nicks(tools.flavour) {
            if other != nick && self.is_shown(&other) {
                let variant = self.variant(&other, session, session, tools.flavour);
                let event = tools.event();
                self.send_presence(&other, variant, session, &Beside::HERE, event, tools);
            }
        }
        let codes: &[&str] = match (self.config.non_anonymous, made) {
            (true, true) => &["100", "201"],
            (true, false) => &["100"],
            (false, true) => &["201"],
            (false, false) => &[],
        };
        let beside = Beside { codes, ..Beside::HERE };
        self.announce(nick, session, &beside, tools);
        self.tell_history(session, x, tools);
        self.tell_subject(session, tools);
    }

    fn tell_history(&mut self, session: &str, x: &str, tools: &mut Tools<'_>) {
        let lines_max = lines_asked(x).unwrap_or(HISTORY_MAX);
        let skipped = self.history.len().saturating_sub(lines_max);
        for line in self.history.iter().skip(skipped).cloned().collect::<Vec<_>>() {
            let delay = format!(
                "<delay xmlns='urn:xmpp:delay' from='{}' stamp='{}'/>",
                self.jid,
                stamp(line.stamp, tools.flavour)
            );
            let payload = match tools.flavour {
                Flavour::Prosody => line.payload + &delay,
                Flavour::Ejabberd => delay + &line.payload,
            };
            let from = format!("{}/{}", self.jid, line.nick);
            let event = tools.event();
            let id = line.id.as_deref();
            self.send(
                &Head::new("message", Some("groupchat"), &from, id, true),
                &payload,
                session,
                event,
                tools,
            );
        }
    }

    fn tell_subject(&self, session: &str, tools: &mut Tools<'_>) {
        let event = tools.event();
        let (from, payload) = match &self.subject {
            None => (self.jid.clone(), "<subject/>".to_owned()),
            Some((nick, subject, set)) => {
                let mut payload = format!("<subject>{subject}</subject>");
                if tools.flavour == Flavour::Prosody {
                    let stamp = stamp(*set, tools.flavour);
                    payload += &format!("<delay xmlns='urn:xmpp:delay' from='{}' stamp='{stamp}'/>", self.jid);
                }
                (format!("{}/{nick}", self.jid), payload)
            }
        };
        self.send(
            &Head::new("message", Some("groupchat"), &from, None, false),
            &payload,
            session,
            event,
            tools,
        );
    }

    fn change_nick(
        &mut self,
        old: &str,
        new: &str,
        from: &str,
        presence: Presence,
        stanza: &str,
        tools: &mut Tools<'_>,
    ) {
        if self.occupants.contains_key(new) {
            let text = "That nickname is already in use by another occupant";
            return self.refuse(stanza, "cancel", "conflict", text, tools);
        }
        if self.occupants[old].sessions.len() > 1 {
            return self.refuse(
                stanza,
                "modify",
                "not-acceptable",
                "Another session has this nickname",
                tools,
            );
        }
        let recipients = self.recipients(old, from, "presence", tools.flavour);
        let shown = self.is_shown(old);
        let recipients: Vec<String> = recipients.into_iter().filter(|to| shown || to == from).collect();
        let mut occupant = self.occupants.remove(old).expect("they are in");
        // ejabberd tells the old presence again.
        if tools.flavour == Flavour::Prosody {
            occupant.presence = presence;
        }
        let moved = Beside {
            codes: &["303"],
            nick: Some(new),
            ..Beside::default()
        };
        let (gone, come) = (tools.event(), tools.event());
        self.occupants.insert(old.to_owned(), occupant.clone());
        let variant = |room: &Self, to: &str| room.variant(old, to, from, tools.flavour);
        let variants: Vec<Variant> = recipients.iter().map(|to| variant(self, to)).collect();
        match tools.flavour {
            Flavour::Prosody => {
                for (to, variant) in recipients.iter().zip(&variants) {
                    self.send_presence(old, *variant, to, &moved, gone, tools);
                }
                self.occupants.remove(old);
                self.occupants.insert(new.to_owned(), occupant);
                for (to, variant) in recipients.iter().zip(&variants) {
                    self.send_presence(new, *variant, to, &Beside::HERE, come, tools);
                }
            }
            // To each in turn: gone, and come again.
            Flavour::Ejabberd => {
                self.occupants.insert(new.to_owned(), occupant);
                for (to, variant) in recipients.iter().zip(&variants) {
                    self.send_presence(old, *variant, to, &moved, gone, tools);
                    self.send_presence(new, *variant, to, &Beside::HERE, come, tools);
                }
                self.occupants.remove(old);
            }
        }
    }

    fn leave(&mut self, from: &str, stanza: &str, tools: &mut Tools<'_>) {
        let Some(nick) = self.nick_of(from).map(str::to_owned) else {
            return;
        };
        let status = child(stanza, "status");
        if !status.is_some_and(|status| status.contains("The link to this user")) {
            self.since.remove(from);
        }
        let beside = Beside {
            status,
            ..Beside::default()
        };
        self.remove(&nick, from, &beside, tools);
    }

    /// A session goes. If it was the last of its nick everybody is told, else only itself.
    fn remove(&mut self, nick: &str, session: &str, beside: &Beside<'_>, tools: &mut Tools<'_>) {
        let shown = self.is_shown(nick);
        let occupant = self.occupants.get_mut(nick).expect("they are in");
        let role = std::mem::replace(&mut occupant.role, Role::None);
        if occupant.sessions.len() == 1 {
            let recipients = self.recipients(nick, session, "presence", tools.flavour);
            let event = tools.event();
            for to in recipients.iter().filter(|to| shown || *to == session) {
                let variant = self.variant(nick, to, session, tools.flavour);
                if variant == Variant::Own && tools.flavour == Flavour::Ejabberd && beside.codes.is_empty() {
                    self.say_bare_leave(to, tools);
                }
                self.send_presence(nick, variant, to, beside, event, tools);
            }
            self.occupants.remove(nick);
        } else {
            let event = tools.event();
            self.send_presence(nick, Variant::Own, session, beside, event, tools);
            let occupant = self.occupants.get_mut(nick).expect("they are in");
            occupant.sessions.retain(|other| other != session);
            occupant.role = role;
        }
    }

    /// An error from an occupant that means it is not there.
    fn expel(&mut self, from: &str, condition: &str, tools: &mut Tools<'_>) {
        let Some(nick) = self.nick_of(from).map(str::to_owned) else {
            return;
        };
        self.expelled.insert(from.to_owned());
        self.since.remove(from);
        let status = match tools.flavour {
            Flavour::Prosody => format!("<status>Kicked: {}</status>", condition.replace('-', " ")),
            Flavour::Ejabberd => format!(
                "<status xml:lang='en'>It is not allowed to send error messages to the room. The participant ({nick}) has sent an \
                 error message ({condition}) and got kicked from the room</status>"
            ),
        };
        let codes: &[&str] = match tools.flavour {
            Flavour::Prosody => &["333"],
            Flavour::Ejabberd => &[],
        };
        let beside = Beside {
            codes,
            status: Some(&status),
            ..Beside::default()
        };
        self.remove(&nick, from, &beside, tools);
    }

    /// Everybody of a nick is put out.
    fn put_out(&mut self, nick: &str, beside: &Beside<'_>, tools: &mut Tools<'_>) {
        let shown = self.is_shown(nick);
        let Some(occupant) = self.occupants.get_mut(nick) else {
            return;
        };
        occupant.role = Role::None;
        let sessions = occupant.sessions.clone();
        self.since.retain(|session, _| !sessions.contains(session));
        let recipients = self.recipients(nick, &sessions[0], "presence", tools.flavour);
        let event = tools.event();
        for to in recipients.iter().filter(|to| shown || sessions.contains(to)) {
            let variant = match sessions.contains(to) {
                true => Variant::Own,
                false => self.variant(nick, to, &sessions[0], tools.flavour),
            };
            self.send_presence(nick, variant, to, beside, event, tools);
        }
        self.occupants.remove(nick);
    }

    /// Tells everybody an occupant's presence.
    fn announce(&self, nick: &str, acting: &str, beside: &Beside<'_>, tools: &mut Tools<'_>) {
        let shown = self.is_shown(nick);
        let own = &self.occupants[nick].sessions;
        let event = tools.event();
        for to in self.recipients(nick, acting, "presence", tools.flavour) {
            if shown || own.contains(&to) {
                let variant = self.variant(nick, &to, acting, tools.flavour);
                self.send_presence(nick, variant, &to, beside, event, tools);
            }
        }
    }

    /// Whether others are told of this occupant.
    fn is_shown(&self, nick: &str) -> bool {
        !self.config.restricted || self.occupants[nick].role == Role::Moderator
    }

    fn variant(&self, about: &str, to: &str, acting: &str, flavour: Flavour) -> Variant {
        let own = self.occupants[about].sessions.iter().any(|session| session == to);
        let is_moderator = |nick: &str| self.occupants[nick].role == Role::Moderator;
        let sees_all = self.config.non_anonymous || self.nick_of(to).is_some_and(is_moderator);
        match flavour {
            Flavour::Prosody if own => Variant::Own,
            Flavour::Ejabberd if own && to == acting => Variant::Own,
            Flavour::Prosody | Flavour::Ejabberd if sees_all => Variant::Full,
            Flavour::Prosody | Flavour::Ejabberd => Variant::Anonymous,
        }
    }

    fn nicks(&self, flavour: Flavour) -> Vec<String> {
        let mut nicks: Vec<String> = self.occupants.keys().cloned().collect();
        if flavour == Flavour::Prosody {
            nicks.sort_by_key(|nick| hash(&format!("{}{nick}", self.jid)));
        }
        nicks
    }

    /// Prosody tells the subject last, its other sessions before it; ejabberd everybody by address.
    fn recipients(&self, about: &str, acting: &str, kind: &str, flavour: Flavour) -> Vec<String> {
        let sessions = |nick: &String| self.occupants[nick].sessions.clone();
        match flavour {
            Flavour::Prosody => {
                let mut nicks = self.nicks(flavour);
                nicks.sort_by_key(|nick| nick == about);
                nicks.iter().flat_map(sessions).collect()
            }
            Flavour::Ejabberd => {
                let mut all: Vec<String> = self.occupants.keys().flat_map(sessions).collect();
                all.sort();
                if kind == "message" {
                    all.reverse();
                }
                let _ = acting;
                all
            }
        }
    }

    fn send_presence(
        &self,
        about: &str,
        variant: Variant,
        to: &str,
        beside: &Beside<'_>,
        event: u64,
        tools: &mut Tools<'_>,
    ) {
        let occupant = &self.occupants[about];
        let (flavour, available) = (tools.flavour, beside.available);
        let affiliation = self.affiliation(&occupant.sessions[0]).as_str();
        let role = occupant.role.as_str();
        let shows_jid = variant != Variant::Anonymous && !(beside.destroy && flavour == Flavour::Ejabberd);
        let sessions: &[String] = match (shows_jid, flavour) {
            (true, Flavour::Prosody) => &occupant.sessions,
            (true, Flavour::Ejabberd) | (false, _) => &occupant.sessions[..1],
        };
        let reason = beside.reason.map(|reason| format!("<reason>{reason}</reason>"));
        let actor = beside.actor.map(|nick| {
            let jid = self.occupants.get(nick).map(|actor| actor.sessions[0].as_str());
            match (flavour, variant, jid) {
                (Flavour::Prosody, Variant::Full, Some(jid)) => format!("<actor jid='{jid}' nick='{nick}'/>"),
                _ => format!("<actor nick='{nick}'/>"),
            }
        });
        let inside = match flavour {
            Flavour::Prosody => actor.unwrap_or_default() + &reason.unwrap_or_default(),
            Flavour::Ejabberd => reason.unwrap_or_default() + &actor.unwrap_or_default(),
        };
        let mut items = String::new();
        for jid in sessions {
            let jid = shows_jid.then_some(jid.as_str());
            let attributes = match flavour {
                Flavour::Prosody => [
                    ("affiliation", Some(affiliation)),
                    ("role", Some(role)),
                    ("jid", jid),
                    ("nick", beside.nick),
                ],
                Flavour::Ejabberd => [
                    ("nick", beside.nick),
                    ("jid", jid),
                    ("role", Some(role)),
                    ("affiliation", Some(affiliation)),
                ],
            };
            items += xml::text(&xml::write(flavour, event, "item", &attributes, &inside));
        }
        let code = |code: &&str| format!("<status code='{code}'/>");
        let mut codes: String = match variant {
            // 100 and 201 are the newcomer's business.
            Variant::Own => beside.codes.iter().map(code).collect(),
            Variant::Anonymous | Variant::Full => {
                let for_all = beside.codes.iter().filter(|code| !["100", "201"].contains(code));
                for_all.map(code).collect()
            }
        };
        let own = if variant == Variant::Own {
            "<status code='110'/>"
        } else {
            ""
        };
        let destroy = if beside.destroy {
            "<destroy><reason>closing</reason></destroy>"
        } else {
            ""
        };
        let x = match flavour {
            Flavour::Prosody if available => format!("{items}{codes}{own}"),
            Flavour::Prosody => format!("{destroy}{codes}{items}{own}"),
            Flavour::Ejabberd => {
                if !beside.destroy {
                    codes.insert_str(0, own);
                }
                format!("{destroy}{items}{codes}")
            }
        };
        let x = format!("<x xmlns='{}'>{x}</x>", xml::MUC_USER);
        let payload = if available {
            occupant.presence.payload.as_str()
        } else {
            beside.status.unwrap_or_default()
        };
        let payload = match flavour {
            Flavour::Prosody => format!("{payload}{}{x}", self.occupant_id(&occupant.sessions[0])),
            Flavour::Ejabberd => xml::recode(flavour, &format!("{x}{payload}")),
        };
        let from = format!("{}/{about}", self.jid);
        let id = if available {
            occupant.presence.id.as_deref()
        } else {
            None
        };
        let stanza_type = (!available).then_some("unavailable");
        self.send(
            &Head::new("presence", stanza_type, &from, id, available),
            &payload,
            to,
            event,
            tools,
        );
    }

    fn occupant_id(&self, session: &str) -> String {
        let id = hash(&format!("{}{}", self.jid, bare(session)));
        format!("<occupant-id xmlns='urn:xmpp:occupant-id:0' id='{id:016x}+NZl4GfpEJeUSHhsBhYk=' />")
            .replace(" />", "/>")
    }

    /// ejabberd's room presents itself, to each under a random id of its own.
    fn say_caps(&self, to: &[String], tools: &mut Tools<'_>) {
        let c = "<c ver='aGqaG7cgTjcWADwk9b03OTbE/JY=' node='http://www.process-one.net/en/ejabberd/' hash='sha-1' \
                 xmlns='http://jabber.org/protocol/caps'/>";
        for to in to {
            let (id, event) = (tools.fresh_id(), tools.event());
            self.send(
                &Head::new("presence", None, &self.jid, Some(&id), false),
                c,
                to,
                event,
                tools,
            );
        }
    }

    fn say_bare_leave(&self, to: &str, tools: &mut Tools<'_>) {
        let (id, event) = (tools.fresh_id(), tools.event());
        let unavailable = Some("unavailable");
        self.send(
            &Head::new("presence", unavailable, &self.jid, Some(&id), false),
            "",
            to,
            event,
            tools,
        );
    }

    // Messages.

    fn handle_groupchat(&mut self, from: &str, stanza: &str, tools: &mut Tools<'_>) {
        let Some(nick) = self.nick_of(from).map(str::to_owned) else {
            let text = "Only occupants are allowed to send messages to the conference";
            return self.refuse(stanza, "modify", "not-acceptable", text, tools);
        };
        let role = self.occupants[&nick].role;
        let is_subject = child(stanza, "subject").is_some() && child(stanza, "body").is_none();
        if is_subject && role < Role::Moderator || self.config.moderated && role < Role::Participant {
            let text = "You do not currently have permission to speak in this chat";
            return self.refuse(stanza, "auth", "forbidden", text, tools);
        }
        let from_nick = format!("{}/{nick}", self.jid);
        let flavour = tools.flavour;
        let id = attribute(stanza, "id").map(str::to_owned);
        let mut payload = xml::recode(flavour, inner(stanza));
        let (id, lang) = if is_subject {
            let subject = child(stanza, "subject").map(inner).unwrap_or_default().to_owned();
            self.subject = Some((nick.clone(), subject.clone(), tools.wall));
            match flavour {
                // Rebuilt: nothing else of it is left.
                Flavour::Prosody => {
                    payload = format!("<subject>{subject}</subject>");
                    (None, false)
                }
                Flavour::Ejabberd => (id, true),
            }
        } else {
            let id = match flavour {
                Flavour::Prosody => id.or_else(|| Some(format!("xw6F66{}", tools.fresh_id()))),
                Flavour::Ejabberd => id,
            };
            if flavour == Flavour::Prosody {
                payload += &self.occupant_id(from);
            }
            if self.config.archived {
                self.archived += 1;
                let stanza_id = format!(
                    "<stanza-id xmlns='urn:xmpp:sid:0' by='{}' id='{}'/>",
                    self.jid, self.archived
                );
                payload = match flavour {
                    Flavour::Prosody => payload + &stanza_id,
                    Flavour::Ejabberd => stanza_id + &payload,
                };
            }
            let body = child(stanza, "body").map(inner).unwrap_or_default();
            self.said.push((from.to_owned(), body.to_owned()));
            self.history.push_back(Line {
                nick: nick.clone(),
                id: id.clone(),
                payload: payload.clone(),
                stamp: tools.wall,
            });
            if self.history.len() > HISTORY_MAX {
                self.history.pop_front();
            }
            (id, true)
        };
        self.say_to_all(&from_nick, id.as_deref(), lang, &payload, tools);
    }

    fn say_to_all(&self, from: &str, id: Option<&str>, lang: bool, payload: &str, tools: &mut Tools<'_>) {
        let event = tools.event();
        for to in self.recipients("", "", "message", tools.flavour) {
            self.send(
                &Head::new("message", Some("groupchat"), from, id, lang),
                payload,
                &to,
                event,
                tools,
            );
        }
    }

    /// The room itself has something to say to everybody (XEP-0045 §10.2.1).
    pub fn say_status(&self, codes: &[&str], tools: &mut Tools<'_>) {
        let codes: String = codes.iter().map(|code| format!("<status code='{code}'/>")).collect();
        let payload = format!("<x xmlns='{}'>{codes}</x>", xml::MUC_USER);
        let id = match tools.flavour {
            Flavour::Prosody => None,
            Flavour::Ejabberd => {
                self.say_caps(&self.recipients("", "", "presence", tools.flavour), tools);
                Some(tools.fresh_id())
            }
        };
        self.say_to_all(&self.jid.clone(), id.as_deref(), false, &payload, tools);
    }

    fn handle_private(&mut self, from: &str, nick: &str, stanza: &str, tools: &mut Tools<'_>) {
        let Some(own) = self.nick_of(from).map(str::to_owned) else {
            let text = "Only occupants are allowed to send private messages to the conference";
            return self.refuse(stanza, "modify", "not-acceptable", text, tools);
        };
        let Some(occupant) = self.occupants.get(nick) else {
            return self.refuse(stanza, "cancel", "item-not-found", "Recipient not in room", tools);
        };
        let sessions = occupant.sessions.clone();
        let mut payload = xml::recode(tools.flavour, inner(stanza));
        if tools.flavour == Flavour::Prosody {
            payload += &self.occupant_id(from);
        }
        let from = format!("{}/{own}", self.jid);
        let (stanza_type, id) = (attribute(stanza, "type"), attribute(stanza, "id"));
        let event = tools.event();
        for to in &sessions {
            self.send(
                &Head::new("message", stanza_type, &from, id, true),
                &payload,
                to,
                event,
                tools,
            );
        }
    }

    fn handle_error(&mut self, from: &str, nick: Option<&str>, stanza: &str, tools: &mut Tools<'_>) {
        let error = child(stanza, "error").unwrap_or_default();
        let condition = elements(inner(error))
            .first()
            .map_or("", |condition| name(condition))
            .to_owned();
        let expels = [
            "gone",
            "internal-server-error",
            "item-not-found",
            "jid-malformed",
            "recipient-unavailable",
            "redirect",
            "remote-server-not-found",
            "remote-server-timeout",
            "service-unavailable",
        ];
        if expels.contains(&condition.as_str()) || nick.is_none() && tools.flavour == Flavour::Ejabberd {
            self.expel(from, &condition, tools);
        } else if let Some(nick) = nick
            && self.nick_of(from).is_some()
            && self.occupants.contains_key(nick)
        {
            self.handle_private(from, nick, stanza, tools);
        }
    }

    /// A mediated invitation (§7.8.2) or a request for voice (§7.13).
    fn handle_request(&mut self, from: &str, stanza: &str, tools: &mut Tools<'_>) {
        let Some(nick) = self.nick_of(from).map(str::to_owned) else {
            let text = "Only occupants are allowed to send messages to the conference";
            return self.refuse(stanza, "modify", "not-acceptable", text, tools);
        };
        let event = tools.event();
        let room = self.jid.clone();
        if let Some(invite) = muc_user(stanza).and_then(|x| child(x, "invite")) {
            let Some(to) = attribute(invite, "to") else { return };
            let payload = format!(
                "<x xmlns='{}'><invite from='{from}'>{}</invite></x><x xmlns='jabber:x:conference' jid='{room}'/>",
                xml::MUC_USER,
                inner(invite)
            );
            self.send(
                &Head::new("message", None, &room, None, false),
                &payload,
                to,
                event,
                tools,
            );
        } else if child(stanza, "x").is_some_and(|x| attribute(x, "xmlns") == Some("jabber:x:data")) {
            let form = format!(
                "<x type='form' xmlns='jabber:x:data'><title>Voice request</title><field var='muc#jid'><value>{from}</value></field>\
                 <field var='muc#roomnick'><value>{nick}</value></field></x>"
            );
            for to in self.recipients("", "", "message", tools.flavour) {
                let is_moderator = |nick: &str| self.occupants[nick].role == Role::Moderator;
                if self.nick_of(&to).is_some_and(is_moderator) {
                    self.send(
                        &Head::new("message", None, &room, None, false),
                        &form,
                        &to,
                        event,
                        tools,
                    );
                }
            }
        }
    }

    // Questions.

    fn handle_question(&mut self, from: &str, stanza: &str, tools: &mut Tools<'_>) {
        let Some(query) = elements(inner(stanza)).first().copied() else {
            return;
        };
        let namespace = attribute(query, "xmlns").unwrap_or_default();
        if !self.exists {
            return self.refuse(
                stanza,
                "cancel",
                "item-not-found",
                "Conference room does not exist",
                tools,
            );
        }
        match namespace {
            "http://jabber.org/protocol/disco#info" => {
                let feature = |is: bool, yes: &str, no: &str| format!("<feature var='{}'/>", if is { yes } else { no });
                let payload = format!(
                    "<query xmlns='{namespace}'><identity category='conference' type='text'/>{}{}{}</query>",
                    feature(self.config.moderated, "muc_moderated", "muc_unmoderated"),
                    feature(self.config.members_only, "muc_membersonly", "muc_open"),
                    feature(self.config.non_anonymous, "muc_nonanonymous", "muc_semianonymous"),
                );
                self.answer(stanza, &payload, tools);
            }
            "http://jabber.org/protocol/disco#items" => {
                let items: String = match tools.flavour {
                    Flavour::Prosody => String::new(),
                    Flavour::Ejabberd => {
                        let item = |nick: &String| format!("<item name='{nick}' jid='{}/{nick}'/>", self.jid);
                        self.occupants.keys().map(item).collect()
                    }
                };
                self.answer(stanza, &format!("<query xmlns='{namespace}'>{items}</query>"), tools);
            }
            "http://jabber.org/protocol/muc#admin" => self.administrate(from, query, stanza, tools),
            "http://jabber.org/protocol/muc#owner" => self.configure(from, query, stanza, tools),
            _ => {
                let text = "The feature requested is not supported by the conference";
                self.refuse(stanza, "cancel", "service-unavailable", text, tools);
            }
        }
    }

    /// Roles and affiliations (§8, §9).
    fn administrate(&mut self, from: &str, query: &str, stanza: &str, tools: &mut Tools<'_>) {
        let actor = self.nick_of(from).map(str::to_owned);
        let item = child(query, "item").unwrap_or_default();
        let target_nick = attribute(item, "nick");
        if let Some(nick) = target_nick {
            let role = attribute(item, "role");
            let Some(role) = Role::ALL.into_iter().find(|known| Some(known.as_str()) == role) else {
                return;
            };
            let Some(target) = self.occupants.get(nick) else {
                return self.refuse(stanza, "cancel", "item-not-found", "", tools);
            };
            let may = actor
                .as_ref()
                .is_some_and(|actor| self.occupants[actor].role == Role::Moderator)
                && self.affiliation(&target.sessions[0]) < Affiliation::Admin;
            if !may {
                return self.refuse(stanza, "cancel", "not-allowed", "", tools);
            }
            self.answer(stanza, "", tools);
            if role == Role::None {
                let beside = Beside {
                    codes: &["307"],
                    actor: actor.as_deref(),
                    reason: Some("enough"),
                    ..Beside::default()
                };
                return self.put_out(nick, &beside, tools);
            }
            return self.set_role(nick, role, actor.as_deref(), tools);
        }
        let affiliation = attribute(item, "affiliation");
        let (Some(target), Some(affiliation)) = (
            attribute(item, "jid"),
            Affiliation::ALL
                .into_iter()
                .find(|known| Some(known.as_str()) == affiliation),
        ) else {
            return;
        };
        let (own, theirs) = (self.affiliation(from), self.affiliation(target));
        if own < Affiliation::Admin || theirs >= own || affiliation >= own {
            return self.refuse(stanza, "cancel", "not-allowed", "", tools);
        }
        self.answer(stanza, "", tools);
        self.affiliations.insert(bare(target).to_owned(), affiliation);
        self.apply_affiliation(target, affiliation, actor.as_deref(), tools);
    }

    fn set_role(&mut self, nick: &str, role: Role, actor: Option<&str>, tools: &mut Tools<'_>) {
        let shown = self.is_shown(nick);
        let occupant = self.occupants.get_mut(nick).expect("they are in");
        let before = std::mem::replace(&mut occupant.role, role);
        let sessions = occupant.sessions.clone();
        if shown && !self.is_shown(nick) && tools.flavour == Flavour::Prosody {
            self.withdraw(nick, tools);
        }
        // ejabberd tells everybody, whether it would show them or not.
        let restricted = self.config.restricted;
        self.config.restricted = restricted && tools.flavour == Flavour::Prosody;
        let beside = Beside {
            actor: actor.filter(|_| tools.flavour == Flavour::Prosody),
            ..Beside::HERE
        };
        self.announce(nick, &sessions[0], &beside, tools);
        self.config.restricted = restricted;
        if tools.flavour == Flavour::Prosody && role == Role::Moderator && before != role && !self.config.non_anonymous
        {
            // A new moderator is shown who everybody is.
            for other in self.nicks(tools.flavour) {
                if other != nick && self.is_shown(&other) {
                    for to in &sessions {
                        let event = tools.event();
                        self.send_presence(&other, Variant::Full, to, &Beside::HERE, event, tools);
                    }
                }
            }
        }
    }

    /// Prosody takes an occupant out of the others' sight, who stays in the room.
    fn withdraw(&self, nick: &str, tools: &mut Tools<'_>) {
        let own = &self.occupants[nick].sessions;
        let event = tools.event();
        for to in self.recipients(nick, &own[0], "presence", tools.flavour) {
            if !own.contains(&to) {
                let variant = self.variant(nick, &to, &own[0], tools.flavour);
                self.send_presence(nick, variant, &to, &Beside::default(), event, tools);
            }
        }
    }

    fn apply_affiliation(
        &mut self,
        target: &str,
        affiliation: Affiliation,
        actor: Option<&str>,
        tools: &mut Tools<'_>,
    ) {
        let of_target = |(_, occupant): &(&String, &Occupant)| bare(&occupant.sessions[0]) == bare(target);
        let nicks: Vec<String> = self
            .occupants
            .iter()
            .filter(of_target)
            .map(|(nick, _)| nick.clone())
            .collect();
        for nick in &nicks {
            if affiliation == Affiliation::Outcast || self.config.members_only && affiliation < Affiliation::Member {
                let code = if affiliation == Affiliation::Outcast {
                    "301"
                } else {
                    "321"
                };
                let beside = Beside {
                    codes: &[code],
                    actor,
                    ..Beside::default()
                };
                self.put_out(nick, &beside, tools);
                continue;
            }
            let role = match affiliation {
                Affiliation::Owner | Affiliation::Admin => Role::Moderator,
                Affiliation::Member => Role::Participant,
                Affiliation::Outcast | Affiliation::None => self.occupants[nick].role.min(Role::Participant),
            };
            self.set_role(nick, role, actor, tools);
        }
        if nicks.is_empty() {
            let flavour = tools.flavour;
            let (affiliation, bare) = (Some(affiliation.as_str()), Some(bare(target)));
            let event = tools.event();
            let (id, item) = match flavour {
                Flavour::Prosody => (None, [("affiliation", affiliation), ("jid", bare), ("role", None)]),
                Flavour::Ejabberd => {
                    let item = [("jid", bare), ("role", Some("none")), ("affiliation", affiliation)];
                    (Some(tools.fresh_id()), item)
                }
            };
            let item = xml::write(flavour, event, "item", &item, "");
            let payload = format!("<x xmlns='{}'>{}</x>", xml::MUC_USER, xml::text(&item));
            for to in self.recipients("", "", "message", flavour) {
                let is_moderator = |nick: &str| self.occupants[nick].role == Role::Moderator;
                if self.nick_of(&to).is_some_and(is_moderator) {
                    self.send(
                        &Head::new("message", None, &self.jid, id.as_deref(), false),
                        &payload,
                        &to,
                        event,
                        tools,
                    );
                }
            }
        }
    }

    /// Configuration and the end of a room (§10).
    fn configure(&mut self, from: &str, query: &str, stanza: &str, tools: &mut Tools<'_>) {
        if self.affiliation(from) < Affiliation::Owner {
            return self.refuse(stanza, "auth", "forbidden", "Owner privileges required", tools);
        }
        self.answer(stanza, "", tools);
        if child(query, "destroy").is_some() {
            return self.destroy(tools);
        }
        let x = child(query, "x").unwrap_or_default();
        let mut codes = vec!["104"];
        for field in elements(inner(x)) {
            let value = child(field, "value").map(inner).unwrap_or_default();
            let yes = value == "1";
            match attribute(field, "var").unwrap_or_default() {
                "muc#roomconfig_moderatedroom" => self.config.moderated = yes,
                "muc#roomconfig_membersonly" => {
                    self.config.members_only = yes;
                    if yes {
                        self.put_out_strangers(tools);
                    }
                }
                "muc#roomconfig_whois" if yes != self.config.non_anonymous => {
                    self.config.non_anonymous = yes;
                    codes.push(if yes { "172" } else { "173" });
                }
                "muc#roomconfig_presencebroadcast" => self.restrict(yes, tools),
                _ => {}
            }
        }
        self.say_status(&codes, tools);
    }

    fn restrict(&mut self, restricted: bool, tools: &mut Tools<'_>) {
        if self.config.restricted == restricted {
            return;
        }
        self.keeps_from_some = true;
        if tools.flavour == Flavour::Prosody {
            self.config.restricted = true;
            for nick in self.nicks(tools.flavour) {
                if !self.is_shown(&nick) {
                    if restricted {
                        self.withdraw(&nick, tools);
                    } else {
                        let own = self.occupants[&nick].sessions[0].clone();
                        self.config.restricted = false;
                        self.announce(&nick, &own, &Beside::HERE, tools);
                        self.config.restricted = true;
                    }
                }
            }
        }
        self.config.restricted = restricted;
    }

    fn put_out_strangers(&mut self, tools: &mut Tools<'_>) {
        let beside = Beside {
            codes: &["322"],
            ..Beside::default()
        };
        for nick in self.nicks(tools.flavour) {
            let session = self.occupants[&nick].sessions[0].clone();
            if self.affiliation(&session) >= Affiliation::Member {
                continue;
            }
            match tools.flavour {
                Flavour::Ejabberd => self.put_out(&nick, &beside, tools),
                // Nobody else is told.
                Flavour::Prosody => {
                    self.keeps_from_some = true;
                    let restricted = std::mem::replace(&mut self.config.restricted, true);
                    self.put_out(&nick, &beside, tools);
                    self.config.restricted = restricted;
                }
            }
        }
    }

    fn destroy(&mut self, tools: &mut Tools<'_>) {
        let beside = Beside {
            destroy: true,
            ..Beside::default()
        };
        for nick in self.nicks(tools.flavour) {
            let occupant = self.occupants.get_mut(&nick).expect("they are in");
            occupant.role = Role::None;
            for to in occupant.sessions.clone() {
                if tools.flavour == Flavour::Ejabberd {
                    self.say_bare_leave(&to, tools);
                }
                let event = tools.event();
                self.send_presence(&nick, Variant::Own, &to, &beside, event, tools);
            }
        }
        self.occupants.clear();
        self.since.clear();
        self.exists = false;
        self.subject = None;
        self.history.clear();
        self.config = Config::default();
        self.keeps_from_some = false;
    }

    /// The server ends in good order and begins again. ejabberd forgets who was in and tells them, Prosody knows them still.
    pub fn restart(&mut self, tools: &mut Tools<'_>) {
        match tools.flavour {
            Flavour::Prosody => {}
            Flavour::Ejabberd => {
                self.asked.clear();
                let x = format!(
                    "<x xmlns='{}'><item role='none' affiliation='none'><reason>You are being removed from the room because of a \
                     system shutdown</reason></item><status code='332'/><status code='110'/></x>",
                    xml::MUC_USER
                );
                for nick in self.nicks(tools.flavour) {
                    for to in self.occupants[&nick].sessions.clone() {
                        let (from, event) = (format!("{}/{nick}", self.jid), tools.event());
                        let unavailable = Some("unavailable");
                        self.send(
                            &Head::new("presence", unavailable, &from, None, false),
                            &x,
                            &to,
                            event,
                            tools,
                        );
                    }
                }
                self.occupants.clear();
                self.since.clear();
            }
        }
    }

    /// A question to an occupant (§17.3): passed to one of its sessions under an id of the room's own, or answered by the room if
    /// the occupant asks itself (XEP-0410).
    fn relay_question(&mut self, from: &str, nick: &str, stanza: &str, tools: &mut Tools<'_>) {
        if !self.exists {
            let text = "Conference room does not exist";
            return self.refuse(stanza, "cancel", "item-not-found", text, tools);
        }
        let Some(own) = self.nick_of(from).map(str::to_owned) else {
            let (kind, text) = match tools.flavour {
                Flavour::Prosody => ("cancel", "You are not currently connected to this chat"),
                Flavour::Ejabberd => ("modify", "Only occupants are allowed to send queries to the conference"),
            };
            return self.refuse(stanza, kind, "not-acceptable", text, tools);
        };
        let Some(occupant) = self.occupants.get(nick) else {
            return self.refuse(
                stanza,
                "cancel",
                "item-not-found",
                "Recipient is not in the conference room",
                tools,
            );
        };
        if own == nick && child(stanza, "ping").is_some() {
            return self.answer(stanza, "", tools);
        }
        let to = occupant.sessions[0].clone();
        let id = match tools.flavour {
            Flavour::Prosody => format!("YjVAYi50{:016x}=", tools.random.next()),
            Flavour::Ejabberd => format!("rr-1795167411816-{}-8+8HdYqXJgGgqmOCqbsGaGqRuEg=", tools.random.next()),
        };
        let asked = attribute(stanza, "id").unwrap_or_default().to_owned();
        self.asked.insert(id.clone(), (from.to_owned(), asked));
        let (from, event) = (format!("{}/{own}", self.jid), tools.event());
        let payload = xml::recode(tools.flavour, inner(stanza));
        let stanza_type = attribute(stanza, "type");
        self.send(
            &Head::new("iq", stanza_type, &from, Some(&id), true),
            &payload,
            &to,
            event,
            tools,
        );
    }

    fn relay_answer(&mut self, stanza: &str, tools: &mut Tools<'_>) {
        let Some((to, id)) = attribute(stanza, "id").and_then(|id| self.asked.remove(id)) else {
            return;
        };
        let (Some(from), stanza_type) = (attribute(stanza, "from"), attribute(stanza, "type")) else {
            return;
        };
        let nick = self.nick_of(from).unwrap_or("gone").to_owned();
        let (from, event) = (format!("{}/{nick}", self.jid), tools.event());
        let payload = xml::recode(tools.flavour, inner(stanza));
        self.send(
            &Head::new("iq", stanza_type, &from, Some(&id), true),
            &payload,
            &to,
            event,
            tools,
        );
    }

    // What goes out.

    fn answer(&self, stanza: &str, payload: &str, tools: &mut Tools<'_>) {
        let (Some(to), Some(from)) = (attribute(stanza, "from"), attribute(stanza, "to")) else {
            return;
        };
        let (id, event) = (attribute(stanza, "id"), tools.event());
        let lang = tools.flavour == Flavour::Ejabberd;
        self.send(
            &Head::new("iq", Some("result"), from, id, lang),
            payload,
            to,
            event,
            tools,
        );
    }

    fn refuse(&self, stanza: &str, kind: &str, condition: &str, text: &str, tools: &mut Tools<'_>) {
        let (Some(to), Some(from)) = (attribute(stanza, "from"), attribute(stanza, "to")) else {
            return;
        };
        let payload = refusal(tools.flavour, stanza, kind, condition, text);
        let (id, event) = (attribute(stanza, "id"), tools.event());
        let lang = tools.flavour == Flavour::Ejabberd;
        self.send(
            &Head::new(name(stanza), Some("error"), from, id, lang),
            &payload,
            to,
            event,
            tools,
        );
    }

    fn send(&self, head: &Head<'_>, payload: &str, to: &str, event: u64, tools: &mut Tools<'_>) {
        let attributes = [
            ("xml:lang", head.lang.then_some("en")),
            ("to", Some(to)),
            ("from", Some(head.from)),
            ("type", head.stanza_type),
            ("id", head.id),
        ];
        let bytes = xml::write(tools.flavour, event, head.name, &attributes, payload);
        let to = to.to_owned();
        tools.words.push(Words {
            to,
            bytes,
            event,
            repeated: false,
        });
    }
}

/// In whose name a sidecar asks a room to repeat what it has said.
pub fn asks_for_last_words(stanza: &str) -> Option<&str> {
    let children = elements(inner(stanza)).into_iter();
    let asked = children
        .filter(|child| name(child) == "x")
        .filter_map(lines_asked)
        .max();
    asked.filter(|lines| *lines > LINES_ASKED_MAX)?;
    attribute(stanza, "from")
}

/// Of history, by who enters.
fn lines_asked(x: &str) -> Option<usize> {
    let lines = child(x, "history").and_then(|history| attribute(history, "maxstanzas"))?;
    Some(lines.parse().expect("a number"))
}

/// The error that a server answers with. ejabberd returns what it answers.
pub fn refusal(flavour: Flavour, stanza: &str, kind: &str, condition: &str, text: &str) -> String {
    let error = format!(
        "<error type='{kind}'><{condition} xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/>\
         <text xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'>{text}</text></error>"
    );
    match flavour {
        Flavour::Prosody => error,
        Flavour::Ejabberd => {
            let payload = xml::recode(flavour, inner(stanza));
            let (known, unknown): (Vec<_>, Vec<_>) = elements(&payload)
                .into_iter()
                .partition(|child| ["body", "subject", "show", "status"].contains(&name(child)));
            unknown.concat() + &error + &known.concat()
        }
    }
}

/// FNV-1a, for what the servers order and name by hashes.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// Near enough to XEP-0082: the day stays the same.
fn stamp(wall: Wall, flavour: Flavour) -> String {
    let seconds = wall.0 / 1000 % 86_400;
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match flavour {
        Flavour::Prosody => format!("2027-01-15T{hours:02}:{minutes:02}:{seconds:02}Z"),
        Flavour::Ejabberd => format!(
            "2027-01-15T{hours:02}:{minutes:02}:{seconds:02}.{:06}Z",
            wall.0 % 1000 * 1000
        ),
    }
}
