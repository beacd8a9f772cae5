//! Nine clients doing things at random, the same for the same seed on every stage.
//!
//! What is done next depends on the seed and on a [`Model`] of who is where, never on what has been received: a run
//! through a pair of sidecars sends exactly what a direct run sends, and the recordings can be compared
//! ([`crate::transcript::compare`]). The model may be wrong (a visitor speaks, a nick is taken): the refusal is then
//! part of what is compared.

use std::collections::{BTreeMap, BTreeSet};

use crate::client::{Failure, MUC_ADMIN, MUC_OWNER, MUC_USER, Outcome};
use crate::transcript::Recording;
use crate::transcript::xml::escaped;

use super::{Dice, Play, Stage};

/// Two users beside the rooms, one of them twice; five across the link, one of them twice.
pub const NINE: [&str; 9] = [
    "adam/pc",
    "alice/pc",
    "alice/phone",
    "b1/r1",
    "b2/r1",
    "b3/r1",
    "b3/r2",
    "b4/r1",
    "b5/r1",
];
/// She makes the rooms and gives the orders.
const OWNER: &str = "alice/pc";
const ROOMS: [&str; 2] = ["deck", "mess"];

/// Plays so many random steps; what everybody received is the result.
pub fn recording(stage: &dyn Stage, seed: u64, steps: usize) -> Outcome<Recording> {
    let mut play = Play::new(stage);
    let rooms: Vec<String> = ROOMS.iter().map(|room| play.room(&format!("{room}{seed}"))).collect();
    for name in NINE {
        play.come_online(name)?;
    }
    play.settle()?;
    clear_rosters(&mut play)?;
    play.step("alice makes the rooms");
    let mut model = Model::new(seed, rooms.clone());
    for room in &rooms {
        play.client(OWNER).join(room, "alice", None, None)?;
        play.settle()?;
        let form = format!(
            "<query xmlns='{MUC_OWNER}'><x xmlns='jabber:x:data' type='submit'><field var='FORM_TYPE'>\
             <value>http://jabber.org/protocol/muc#roomconfig</value></field><field var='muc#roomconfig_changesubject'>\
             <value>1</value></field></x></query>"
        );
        play.client(OWNER).ask("set", room, &form, stage.patience())?;
        model.enter(room, OWNER, "alice");
    }
    play.settle()?;
    befriend_some(&mut play)?;
    for step in 0..steps {
        model.act(&mut play).map_err(|Failure(why)| {
            let what = play.recording.steps.last().map_or("", String::as_str);
            Failure(format!("step {step} of seed {seed}, {what}: {why}"))
        })?;
    }
    play.step("alice destroys the rooms");
    for room in &rooms {
        play.room_ends(room);
        let order = format!("<query xmlns='{MUC_OWNER}'><destroy/></query>");
        play.client(OWNER).ask("set", room, &order, stage.patience())?;
    }
    play.settle()?;
    play.finish()
}

/// Takes everybody off everybody's roster, as a run before this one may have left it, and waits for the end of it.
pub(super) fn clear_rosters(play: &mut Play<'_>) -> Outcome {
    for name in play.names() {
        let roster = play
            .client(&name)
            .ask("get", "", "<query xmlns='jabber:iq:roster'/>", play.stage.patience())?;
        let Some(query) = roster.element.child("jabber:iq:roster", "query") else {
            return Err(Failure(format!("{name} has no roster: {}", roster.raw)));
        };
        let jids = query.elements().filter_map(|item| item.attr("jid"));
        // In an order that does not depend on the server's table.
        for jid in jids.collect::<BTreeSet<_>>() {
            let jid = escaped(jid);
            let remove = format!("<query xmlns='jabber:iq:roster'><item jid='{jid}' subscription='remove'/></query>");
            play.client(&name).ask("set", "", &remove, play.stage.patience())?;
            play.settle()?;
        }
    }
    play.settle()
}

/// Alice and three users across the link see each other.
fn befriend_some(play: &mut Play<'_>) -> Outcome {
    for far in ["b1/r1", "b2/r1", "b3/r1"] {
        for (asker, asked) in [(OWNER, far), (far, OWNER)] {
            play.step(format!("{asker} and {asked} become friends"));
            let (asker_bare, asked_bare) = (play.bare(asker), play.bare(asked));
            play.client(asker).presence_to(&asked_bare, "subscribe", "")?;
            play.settle()?;
            play.client(asked).presence_to(&asker_bare, "subscribed", "")?;
            play.settle()?;
        }
    }
    Ok(())
}

/// Who is where, as far as the script knows.
struct Model {
    dice: Dice,
    rooms: Vec<String>,
    /// Of (room, session): the nick.
    inside: BTreeMap<(String, String), String>,
    /// Every (room, session, nick) that was asked for since the session signed in, in vain or not.
    asked: BTreeSet<(String, String, String)>,
    /// Texts are numbered, so that each of them is recognised.
    said: usize,
}

impl Model {
    fn new(seed: u64, rooms: Vec<String>) -> Self {
        Self {
            dice: Dice::new(seed),
            rooms,
            inside: BTreeMap::new(),
            asked: BTreeSet::new(),
            said: 0,
        }
    }

    fn ask_for(&mut self, room: &str, name: &str, nick: &str) {
        self.asked.insert((room.to_owned(), name.to_owned(), nick.to_owned()));
    }

    fn enter(&mut self, room: &str, name: &str, nick: &str) {
        self.inside.insert((room.to_owned(), name.to_owned()), nick.to_owned());
    }

    fn nick(&self, room: &str, name: &str) -> Option<String> {
        self.inside.get(&(room.to_owned(), name.to_owned())).cloned()
    }

    /// Whether only one session has this nick: a request to a nick with two goes to either.
    fn is_single(&self, room: &str, nick: &str) -> bool {
        self.inside
            .iter()
            .filter(|((other, _), taken)| other == room && taken.as_str() == nick)
            .count()
            == 1
    }

    /// Somebody who is in the room, the owner aside if she must not be.
    fn someone_inside(&mut self, room: &str, owner_too: bool) -> Option<(String, String)> {
        let inside = self
            .inside
            .iter()
            .filter(|((other, name), _)| other == room && (owner_too || name != OWNER));
        let inside: Vec<(String, String)> = inside.map(|((_, name), nick)| (name.clone(), nick.clone())).collect();
        if inside.is_empty() {
            None
        } else {
            Some(self.dice.pick(&inside).clone())
        }
    }

    fn text(&mut self) -> String {
        const WORDS: [&str; 16] = [
            "wind",
            "Süd-Südwest",
            "& so on",
            "<fast>",
            "'now'",
            "💧",
            "fuel: 42 %",
            "再见",
            "two\nlines",
            "ok",
            "who?",
            "position 54°10'N",
            "\"quoted\"",
            "tab\there",
            "repeat please",
            "over",
        ];
        self.said += 1;
        let mut text = format!("{}:", self.said);
        for _ in 0..=self.dice.below(8) {
            text.push(' ');
            text.push_str(WORDS[self.dice.below(WORDS.len())]);
        }
        if self.dice.chance(3) {
            text.push_str(&" and so it goes".repeat(200));
        }
        text
    }

    /// Everyone is in the middle of something; one of them does the next thing.
    fn act(&mut self, play: &mut Play<'_>) -> Outcome {
        let room = self.dice.pick(&self.rooms).clone();
        let name = (*self.dice.pick(&NINE)).to_owned();
        if !play.is_signed_in(&name) {
            play.step(format!("{name} signs in"));
            play.come_online(&name)?;
            return play.settle();
        }
        let choice = self.dice.below(100);
        match self.nick(&room, &name) {
            None if choice < 60 => self.join(play, &room, &name),
            None => self.outside(play, &room, &name),
            Some(nick) if choice < 45 => self.speak(play, &room, &name, &nick),
            Some(nick) if choice < 52 => self.whisper(play, &room, &name, &nick),
            Some(nick) if choice < 60 => self.change_status(play, &room, &name, &nick),
            Some(nick) if choice < 66 => self.change_nick(play, &room, &name, &nick),
            Some(_) if choice < 71 => {
                let subject = self.text();
                play.step(format!("{name} sets the subject of {room}"));
                play.client(&name).subject(&room, &subject)?;
                play.settle()
            }
            Some(nick) if choice < 76 => self.leave(play, &room, &name, &nick),
            Some(_) if choice < 85 => self.order(play, &room),
            Some(_) if choice < 91 => self.ask(play, &room, &name),
            Some(_) => self.outside(play, &room, &name),
        }
    }

    fn join(&mut self, play: &mut Play<'_>, room: &str, name: &str) -> Outcome {
        let user = name.split('/').next().unwrap_or_default();
        let history = match self.dice.below(4) {
            0 => None,
            1 => Some(0),
            _ => Some(u32::try_from(self.dice.below(8)).unwrap_or(0)),
        };
        let wanted = if self.dice.chance(8) {
            self.someone_inside(room, true).map(|(_, nick)| nick)
        } else {
            None
        };
        let others: Vec<(String, String)> = self
            .inside
            .iter()
            .filter(|((other, _), _)| other == room)
            .map(|((_, of), nick)| (of.clone(), nick.clone()))
            .collect();
        let nick = wanted.unwrap_or_else(|| user.to_owned());
        play.step(format!("{name} joins {room} as {nick}, history {history:?}"));
        play.client(name).join(room, &nick, None, history)?;
        self.ask_for(room, name, &nick);
        play.settle()?;
        // A nick may be shared with one's own other session only.
        let taken = others
            .iter()
            .any(|(of, taken)| *taken == nick && !of.starts_with(&format!("{user}/")));
        if !taken {
            self.enter(room, name, &nick);
        }
        Ok(())
    }

    fn leave(&mut self, play: &mut Play<'_>, room: &str, name: &str, nick: &str) -> Outcome {
        if name == OWNER {
            return self.speak(play, room, name, nick); // a room without its owner would be over
        }
        let status = if self.dice.chance(50) {
            self.text()
        } else {
            String::new()
        };
        play.step(format!("{name} leaves {room}"));
        play.client(name).leave(room, nick, &status)?;
        self.inside.remove(&(room.to_owned(), name.to_owned()));
        play.settle()
    }

    fn speak(&mut self, play: &mut Play<'_>, room: &str, name: &str, _nick: &str) -> Outcome {
        let body = escaped(&self.text());
        let kind = self.dice.below(10);
        let extra = match kind {
            0 => format!(
                "<html xmlns='http://jabber.org/protocol/xhtml-im'><body xmlns='http://www.w3.org/1999/xhtml'><p>{body}</p></body></html>"
            ),
            1 => "<x xmlns='urn:example:unknown' a='&lt;1&gt;'><y/> z</x>".to_owned(),
            2 => format!("<origin-id xmlns='urn:xmpp:sid:0' id='{:016x}'/>", self.dice.roll()),
            3 => "<active xmlns='http://jabber.org/protocol/chatstates'/>".to_owned(),
            4 => "<reply xmlns='urn:xmpp:reply:0' to='x@a.example' id='y'/><thread>t</thread>".to_owned(),
            _ => String::new(),
        };
        play.step(format!("{name} speaks in {room}, variant {kind}"));
        match kind {
            5 => play
                .client(name)
                .message(
                    room,
                    "groupchat",
                    "<composing xmlns='http://jabber.org/protocol/chatstates'/>",
                )
                .map(drop)?,
            6 => play.client(name).send(&format!(
                "<message type='groupchat' to='{}'><body>{body}</body></message>",
                escaped(room)
            ))?,
            _ => play
                .client(name)
                .message(room, "groupchat", &format!("<body>{body}</body>{extra}"))
                .map(drop)?,
        }
        play.settle()
    }

    fn whisper(&mut self, play: &mut Play<'_>, room: &str, name: &str, own: &str) -> Outcome {
        let (_, nick) = self.someone_inside(room, true).unwrap_or_default();
        if nick == own || nick.is_empty() {
            return self.speak(play, room, name, own);
        }
        let body = escaped(&self.text());
        play.step(format!("{name} whispers to {nick} in {room}"));
        play.client(name).message(
            &format!("{room}/{nick}"),
            "chat",
            &format!("<body>{body}</body><x xmlns='{MUC_USER}'/>"),
        )?;
        play.settle()
    }

    fn change_status(&mut self, play: &mut Play<'_>, room: &str, name: &str, nick: &str) -> Outcome {
        let show = *self.dice.pick(&["away", "dnd", "xa", "chat"]);
        let status = escaped(&self.text());
        play.step(format!("{name} is {show} in {room}"));
        let content = format!("<show>{show}</show><status>{status}</status>");
        play.client(name).presence_to(&format!("{room}/{nick}"), "", &content)?;
        play.settle()
    }

    fn change_nick(&mut self, play: &mut Play<'_>, room: &str, name: &str, nick: &str) -> Outcome {
        // The servers differ in what happens to one of two sessions of a nick; that is not what is tested here.
        if name == OWNER || !self.is_single(room, nick) {
            return self.change_status(play, room, name, nick);
        }
        let user = name.split('/').next().unwrap_or_default();
        let resource = name.split('/').next_back().unwrap_or_default();
        self.said += 1;
        let new = if self.dice.chance(15) {
            "alice".to_owned()
        } else {
            format!("{user} {resource} ñ{}", self.said)
        };
        play.step(format!("{name} becomes {new} in {room}"));
        play.client(name).presence_to(&format!("{room}/{new}"), "", "")?;
        self.ask_for(room, name, &new);
        if new != "alice" {
            self.enter(room, name, &new);
        }
        play.settle()
    }

    /// The owner kicks, changes a role or an affiliation.
    fn order(&mut self, play: &mut Play<'_>, room: &str) -> Outcome {
        let Some((name, nick)) = self.someone_inside(room, false) else {
            return self.speak(play, room, OWNER, "alice");
        };
        let user = name.split('/').next().unwrap_or_default();
        if user == "alice" || !play.is_signed_in(&name) {
            return self.speak(play, room, OWNER, "alice");
        }
        let nick_attr = escaped(&nick);
        let (what, item) = match self.dice.below(6) {
            0 | 1 => {
                self.inside.retain(|(other, _), taken| other != room || *taken != nick);
                (
                    "kicks",
                    format!("<item nick='{nick_attr}' role='none'><reason>enough &amp; out</reason></item>"),
                )
            }
            2 => ("silences", format!("<item nick='{nick_attr}' role='visitor'/>")),
            3 => (
                "gives a voice to",
                format!("<item nick='{nick_attr}' role='participant'/>"),
            ),
            4 => (
                "makes a member of",
                format!("<item jid='{}' affiliation='member'/>", play.bare(&name)),
            ),
            _ => (
                "makes nobody of",
                format!("<item jid='{}' affiliation='none'/>", play.bare(&name)),
            ),
        };
        play.step(format!("alice {what} {nick} in {room}"));
        play.client(OWNER)
            .iq_set(room, &format!("<query xmlns='{MUC_ADMIN}'>{item}</query>"))?;
        play.settle()
    }

    /// A request to the room, to an occupant, or to the far server.
    fn ask(&mut self, play: &mut Play<'_>, room: &str, name: &str) -> Outcome {
        let (_, nick) = self.someone_inside(room, true).unwrap_or_default();
        let to = match self.dice.below(4) {
            0 => room.to_owned(),
            1 if self.is_single(room, &nick) => format!("{room}/{nick}"),
            2 => play.far(),
            _ => play.near(),
        };
        let payload = *self.dice.pick(&[
            "<ping xmlns='urn:xmpp:ping'/>",
            "<query xmlns='http://jabber.org/protocol/disco#info'/>",
            "<query xmlns='jabber:iq:version'/>",
            "<query xmlns='urn:example:question' a='&amp;'/>",
        ]);
        play.step(format!("{name} asks {to} for {payload}"));
        play.client(name).ask("get", &to, payload, play.stage.patience())?;
        play.settle()
    }

    /// What has nothing to do with rooms.
    fn outside(&mut self, play: &mut Play<'_>, room: &str, name: &str) -> Outcome {
        let other = (*self.dice.pick(&NINE)).to_owned();
        let choice = self.dice.below(10);
        if choice == 0 && name != OWNER {
            let orderly = self.dice.chance(50);
            play.step(format!(
                "{name} signs out{}",
                if orderly { "" } else { " without a word" }
            ));
            return self.sign_out(play, name, orderly);
        }
        if choice < 3 {
            play.step(format!("{name} changes its presence"));
            let show = *self.dice.pick(&["away", "dnd", "chat"]);
            play.client(name).presence(&format!(
                "<show>{show}</show><status>{}</status>",
                escaped(&self.text())
            ))?;
            return play.settle();
        }
        if choice == 3 {
            play.step(format!("{name} speaks in {room} from outside or inside"));
            play.client(name).groupchat(room, &self.text())?;
            return play.settle();
        }
        if other == name || !play.is_signed_in(&other) {
            return self.ask(play, room, name);
        }
        play.step(format!("{name} writes to {other}, variant {choice}"));
        let body = escaped(&self.text());
        let to = if choice < 7 {
            play.jid(&other)
        } else {
            play.bare(&other)
        };
        let content = match choice {
            4 => "<paused xmlns='http://jabber.org/protocol/chatstates'/>".to_owned(),
            5 => format!("<body>{body}</body><request xmlns='urn:xmpp:receipts'/>"),
            _ => format!("<body>{body}</body>"),
        };
        play.client(name).message(&to, "chat", &content)?;
        play.settle()
    }

    /// Others cannot ping for a server that notices a lost connection in its own time: whoever would see it waits for it.
    ///
    /// Who has asked for several nicks leaves the room first. Prosody says goodbye to each of them, in the order of a hash table, and the
    /// first one counts; if it is a nick that two sessions share, ejabberd takes it that one of those has gone, and tells nobody.
    fn sign_out(&mut self, play: &mut Play<'_>, name: &str, orderly: bool) -> Outcome {
        let rooms: Vec<(String, String)> = self
            .inside
            .iter()
            .filter(|((_, of), _)| of == name)
            .map(|((room, _), nick)| (room.clone(), nick.clone()))
            .collect();
        for (room, nick) in &rooms {
            let nicks = self.asked.iter().filter(|(of, by, _)| of == room && by == name).count();
            if nicks > 1 {
                play.client(name).leave(room, nick, "")?;
                play.settle()?;
            }
        }
        self.asked.retain(|(_, by, _)| by != name);
        play.sign_out(name, orderly)?;
        for (room, nick) in rooms {
            let single = self.is_single(&room, &nick);
            self.inside.remove(&(room.clone(), name.to_owned()));
            if single {
                let from = format!("{room}/{nick}");
                let gone = |stanza: &crate::client::Stanza| {
                    stanza.is_presence() && stanza.from() == from && stanza.kind() == "unavailable"
                };
                play.client(OWNER)
                    .expect("who signs out", play.stage.patience(), gone)?;
            }
        }
        play.settle()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sessions that the module promises: nine, and two users with two of them.
    #[test]
    fn nine_sessions_of_seven_users() {
        let users: BTreeSet<_> = NINE.iter().filter_map(|name| name.split('/').next()).collect();
        assert_eq!((NINE.len(), users.len()), (9, 7));
    }
}
