//! What users of two sites can do, and what each of them must see of it: rooms (XEP-0045) first, then the rest.
//!
//! The acts are played in order on one [`Play`], since each goes on where the last one ended. An act says what it does
//! ([`Play::step`]), lets everything arrive ([`Play::settle`]), and then asserts who saw it, how often (once!) and who
//! did not. What Prosody and ejabberd do differently is written where it shows.

use crate::client::{Answers, CAPS, DISCO_INFO, DISCO_ITEMS, Failure, MUC_ADMIN, MUC_OWNER, MUC_USER, Outcome, Stanza};
use crate::servers::Kind;
use crate::transcript::Recording;
use crate::transcript::xml::{CLIENT, Element, escaped};

use super::{Play, Stage};

/// One thing that users do.
#[derive(Clone, Copy, Debug)]
pub struct Act {
    pub name: &'static str,
    run: fn(&mut Play<'_>) -> Outcome,
}

/// All acts, in the order in which they are played.
pub fn acts() -> Vec<Act> {
    macro_rules! acts {
        ($($name:ident),* $(,)?) => { vec![$(Act { name: stringify!($name), run: $name }),*] };
    }
    acts![
        sign_in,
        create_room,
        join_from_afar,
        join_with_password_and_history,
        join_with_a_nick_in_use,
        message_plain_and_unicode,
        message_with_markup,
        message_with_unknown_extensions,
        message_of_60_kilobytes,
        subject,
        presence_change,
        nick_change,
        private_message,
        invite_through_the_room,
        invite_directly,
        two_sessions_with_one_nick,
        voice_request,
        role_changes,
        affiliation_changes,
        kick,
        ban,
        configuration_change,
        requests_to_the_room_and_through_it,
        archive_of_the_room,
        speak_without_being_in,
        leave,
        connection_breaks,
        destroy,
        chat_outside_of_rooms,
        receipts_and_chat_states,
        errors_outside_of_rooms,
        subscription,
        presence_to_many_contacts,
        requests_between_clients_and_servers,
        vcard,
        personal_events,
        unsubscription,
    ]
}

/// Plays all acts; the result is what everybody received, to compare with another stage.
pub fn play_all(stage: &dyn Stage) -> Outcome<Recording> {
    let mut play = Play::new(stage);
    for act in acts() {
        (act.run)(&mut play).map_err(|Failure(why)| Failure(format!("{}: {why}", act.name)))?;
    }
    play.finish()
}

const ALICE: &str = "alice/pc";
const ADAM: &str = "adam/pc";
const B1: &str = "b1/r1";
const B2: &str = "b2/r1";
const B3: &str = "b3/r1";
const B3_TOO: &str = "b3/r2";
const B4: &str = "b4/r1";
const B5: &str = "b5/r1";

/// Which personal event is published (XEP-0172).
const NICK: &str = "http://jabber.org/protocol/nick";

/// Who is in the hall most of the time.
const HALL: [&str; 6] = [ALICE, ADAM, B1, B2, B3, B4];
/// The same without the owner.
const GUESTS: [&str; 5] = [ADAM, B1, B2, B3, B4];

fn hall(play: &mut Play<'_>) -> String {
    play.room("hall")
}

fn nick(name: &str) -> &str {
    name.split('/').next().unwrap_or_default()
}

fn occupant(room: &str, name: &str) -> String {
    format!("{room}/{}", nick(name))
}

// ---- what to look for

fn presence_from<'a>(from: &'a str, kind: &'a str) -> impl Fn(&Stanza) -> bool + 'a {
    move |stanza| stanza.is_presence() && stanza.from() == from && stanza.kind() == kind
}

fn body_from<'a>(from: &'a str, kind: &'a str, body: &'a str) -> impl Fn(&Stanza) -> bool + 'a {
    move |stanza| {
        // A message without a type is a normal one (RFC 6121 §5.2.2), and ejabberd takes that type off.
        let has_kind =
            stanza.kind() == kind || (matches!(stanza.kind(), "" | "normal") && matches!(kind, "" | "normal"));
        stanza.is_message() && stanza.from() == from && has_kind && stanza.body().as_deref() == Some(body)
    }
}

fn error_of<'a>(from: &'a str, condition: &'a str) -> impl Fn(&Stanza) -> bool + 'a {
    move |stanza| stanza.kind() == "error" && stanza.from() == from && stanza.error() == Some(condition)
}

fn status_from<'a>(from: &'a str, code: &'a str) -> impl Fn(&Stanza) -> bool + 'a {
    move |stanza| stanza.from() == from && stanza.has_status(code)
}

/// A message that carries this child exactly, and this body.
fn carries<'a>(from: &'a str, body: &'a str, child: &'a Element) -> impl Fn(&Stanza) -> bool + 'a {
    move |stanza| {
        let carried = stanza.element.child(&child.ns, &child.name);
        body_from(from, "groupchat", body)(stanza)
            && carried.is_some_and(|carried| carried.canonical() == child.canonical())
    }
}

/// A request to the room, with its answer, which must be a result.
fn request(play: &Play<'_>, who: &str, kind: &str, to: &str, payload: &str) -> Outcome<Stanza> {
    let answer = play.client(who).ask(kind, to, payload, play.stage.patience())?;
    match answer.kind() {
        "result" => Ok(answer),
        _ => Err(Failure(format!("{who} asked {to} for {payload}: {}", answer.raw))),
    }
}

fn refused(play: &Play<'_>, who: &str, kind: &str, to: &str, payload: &str, condition: &str) -> Outcome {
    let answer = play.client(who).ask(kind, to, payload, play.stage.patience())?;
    match answer.error() {
        Some(error) if error == condition => Ok(()),
        Some(_) | None => Err(Failure(format!(
            "{who} asked {to} for {payload}, not {condition} but: {}",
            answer.raw
        ))),
    }
}

fn ensure(is: bool, what: impl FnOnce() -> String) -> Outcome {
    if is { Ok(()) } else { Err(Failure(what())) }
}

fn configure(play: &Play<'_>, room: &str, fields: &[(&str, &str)]) -> Outcome {
    let fields: String = fields
        .iter()
        .map(|(name, value)| format!("<field var='muc#roomconfig_{name}'><value>{value}</value></field>"))
        .collect();
    let form = format!(
        "<query xmlns='{MUC_OWNER}'><x xmlns='jabber:x:data' type='submit'><field var='FORM_TYPE'>\
         <value>http://jabber.org/protocol/muc#roomconfig</value></field>{fields}</x></query>"
    );
    request(play, ALICE, "set", room, &form).map(drop)
}

fn set_role(play: &Play<'_>, who: &str, room: &str, nick: &str, role: &str, reason: &str) -> Outcome {
    let item = format!(
        "<query xmlns='{MUC_ADMIN}'><item nick='{nick}' role='{role}'><reason>{reason}</reason></item></query>"
    );
    request(play, who, "set", room, &item).map(drop)
}

fn set_affiliation(play: &Play<'_>, who: &str, room: &str, jid: &str, affiliation: &str) -> Outcome {
    let item = format!("<query xmlns='{MUC_ADMIN}'><item jid='{jid}' affiliation='{affiliation}'/></query>");
    request(play, who, "set", room, &item).map(drop)
}

// ---- rooms

/// Everybody comes online, and nobody has contacts yet.
fn sign_in(play: &mut Play<'_>) -> Outcome {
    for name in [ALICE, ADAM, B1, B2, B3, B3_TOO, B4, B5] {
        play.come_online(name)?;
    }
    play.settle()?;
    super::recording::clear_rosters(play)?;
    for name in [ALICE, B1] {
        // An earlier run may have left an event, and whoever begins to listen is told the last one.
        let delete =
            format!("<pubsub xmlns='http://jabber.org/protocol/pubsub#owner'><delete node='{NICK}'/></pubsub>");
        play.client(name).ask("set", "", &delete, play.stage.patience())?;
    }
    play.step("sign in");
    play.settle()
}

fn create_room(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    play.step("create the hall");
    play.client(ALICE).join(&room, "alice", None, None)?;
    play.settle()?;
    play.each_sees(
        &[ALICE],
        "that the room is new",
        status_from(&occupant(&room, ALICE), "201"),
    )?;
    configure(
        play,
        &room,
        &[
            ("changesubject", "1"),
            ("allowinvites", "1"),
            ("publicroom", "1"),
            ("roomname", "Hall"),
        ],
    )?;
    play.settle()?;
    play.none_sees(&[ADAM, B1], "a new room's presence", |stanza| {
        stanza.from().starts_with(&room)
    })
}

/// Each who joins sees those who are there, in the order of XEP-0045 §7.1; those who are there see who joins.
fn join_from_afar(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    for (at, name) in HALL.iter().enumerate().skip(1) {
        play.step(format!("{name} joins"));
        play.client(name).join(&room, nick(name), None, Some(0))?;
        play.settle()?;
        let me = occupant(&room, name);
        let (others, mine) = (&HALL[..at], &HALL[at..=at]);
        for other in others {
            play.each_sees(mine, "who is there", presence_from(&occupant(&room, other), ""))?;
        }
        play.each_sees(others, "who joins", |stanza| {
            presence_from(&me, "")(stanza) && !stanza.has_status("110")
        })?;
        play.each_sees(mine, "that it is in", |stanza| {
            presence_from(&me, "")(stanza) && stanza.has_status("110")
        })?;
        play.each_sees(mine, "the subject", |stanza| {
            stanza.kind() == "groupchat" && stanza.subject().is_some()
        })?;
        let seen = play.client(name).unclaimed();
        let place = |wanted: &dyn Fn(&Stanza) -> bool| seen.iter().position(wanted);
        let own = place(&|stanza: &Stanza| stanza.has_status("110"));
        let last_other = seen
            .iter()
            .rposition(|stanza| stanza.is_presence() && !stanza.has_status("110"));
        let subject = place(&|stanza: &Stanza| stanza.subject().is_some());
        // ejabberd writes to all occupants sorted by address, so its joiner may be told of itself before the last other.
        let in_order =
            own < subject && last_other < subject && (play.host_kind() == Kind::Ejabberd || last_other < own);
        ensure(in_order, || {
            format!("{name}: others until {last_other:?}, self at {own:?}, subject at {subject:?}")
        })?;
    }
    // A moderator is told addresses, the others are not.
    let hidden = play.client(B2).transcript();
    let told = hidden.iter().filter(|stanza| stanza.from() == occupant(&room, ADAM));
    ensure(
        told.clone().count() > 0 && told.clone().all(|stanza| stanza.item_attr("jid").is_empty()),
        || "b2 is told adam's address".to_owned(),
    )
}

fn join_with_password_and_history(play: &mut Play<'_>) -> Outcome {
    let vault = play.room("vault");
    play.step("alice makes a room with a password and talks to herself");
    play.client(ALICE).join(&vault, "alice", None, None)?;
    play.settle()?;
    configure(
        play,
        &vault,
        &[("passwordprotectedroom", "1"), ("roomsecret", "open &lt;sesame&gt;")],
    )?;
    for body in ["old one", "old two", "old three"] {
        play.client(ALICE).groupchat(&vault, body)?;
    }
    play.settle()?;

    let b1 = occupant(&vault, B1);
    play.step("b1 has no password, then a wrong one");
    play.client(B1).join(&vault, "b1", None, None)?;
    play.client(B1).join(&vault, "b1", Some("sesame"), None)?;
    play.settle()?;
    play.each_sees_times(2, &[B1], "that it is refused", error_of(&b1, "not-authorized"))?;
    play.none_sees(&[ALICE], "who is refused", presence_from(&b1, ""))?;

    play.step("b1 has the password and asks for two old messages");
    play.client(B1).join(&vault, "b1", Some("open <sesame>"), Some(2))?;
    play.settle()?;
    play.each_sees(&[ALICE], "who joins", presence_from(&b1, ""))?;
    let alice = occupant(&vault, ALICE);
    for body in ["old two", "old three"] {
        play.each_sees(&[B1], "an old message", |stanza| {
            body_from(&alice, "groupchat", body)(stanza) && stanza.element.child("urn:xmpp:delay", "delay").is_some()
        })?;
    }
    play.none_sees(
        &[B1],
        "what it has not asked for",
        body_from(&alice, "groupchat", "old one"),
    )?;

    play.step("both leave the room with a password");
    play.client(B1).leave(&vault, "b1", "")?;
    play.settle()?;
    play.room_ends(&vault);
    play.client(ALICE).leave(&vault, "alice", "")?;
    play.settle()
}

fn join_with_a_nick_in_use(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    for (who, taken) in [(B5, "adam"), (B5, "b1")] {
        play.step(format!("{who} wants the nick of {taken}"));
        play.client(who).join(&room, taken, None, None)?;
        play.settle()?;
        play.each_sees(&[who], "a conflict", error_of(&format!("{room}/{taken}"), "conflict"))?;
        play.none_sees(&HALL, "anything", |stanza| stanza.from().starts_with(&room))?;
    }
    Ok(())
}

fn message_plain_and_unicode(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    let bodies = [
        "plain",
        "a & b < c > d ' e \" f",
        "two\nlines\tand a tab, and  spaces ",
        "Grüße aus Łódź: שלום, مرحبا, 你好, ｆｕｌｌ",
        "👩‍👩‍👧‍👦🏴󠁧󠁢󠁳󠁣󠁴󠁿 🇺🇳 é\u{301} \u{1F4A7}",
        "]]> &amp; <!-- -->",
    ];
    for name in [ALICE, B1, B4] {
        for body in bodies {
            play.step(format!("{name} says {body:?}"));
            let id = play.client(name).groupchat(&room, body)?;
            play.settle()?;
            let from = occupant(&room, name);
            play.only_these_see(&HALL, "the message", |stanza| {
                body_from(&from, "groupchat", body)(stanza) && stanza.id() == id
            })?;
        }
    }
    Ok(())
}

fn says(play: &mut Play<'_>, name: &str, what: &str, body: &str, child: &str) -> Outcome {
    let room = hall(play);
    let wanted = Element::parse(child).map_err(Failure)?;
    play.step(format!("{name} says {what}"));
    play.client(name)
        .message(&room, "groupchat", &format!("<body>{}</body>{child}", escaped(body)))?;
    play.settle()?;
    let from = occupant(&room, name);
    play.only_these_see(&HALL, what, carries(&from, body, &wanted))
}

fn message_with_markup(play: &mut Play<'_>) -> Outcome {
    let xhtml = "<html xmlns='http://jabber.org/protocol/xhtml-im'><body xmlns='http://www.w3.org/1999/xhtml'>\
        <p style='font-weight:bold'>hi &amp; <em>bye</em> &lt;there&gt;</p> <br/><a href='https://e.example/?a=1&amp;b=2'>x</a></body></html>";
    says(play, ADAM, "XHTML-IM", "hi & bye <there>", xhtml)?;
    says(play, B2, "XHTML-IM", "hi & bye <there>", xhtml)
}

fn message_with_unknown_extensions(play: &mut Play<'_>) -> Outcome {
    for name in [ALICE, B3] {
        let deep = "<x xmlns='urn:example:unknown:1' a='1' b='&lt;&amp;&apos;&quot;'><y xmlns='urn:example:unknown:2'>\
            text<z/>more<z xmlns=''/></y> <w xml:lang='de'>ü</w></x>";
        says(play, name, "what nobody knows", "unknown", deep)?;
        let reply = "<reply xmlns='urn:xmpp:reply:0' to='someone@a.example' id='nw.x'/>";
        says(play, name, "a reply", "> quoted\nanswer", reply)?;
        let origin = "<origin-id xmlns='urn:xmpp:sid:0' id='de305d54-75b4-431b-adb2-eb6b9e546013'/>";
        says(play, name, "an origin id", "with an id of its own", origin)?;
        let replace = "<replace xmlns='urn:xmpp:message-correct:0' id='nw.x'/>";
        says(play, name, "a correction", "corrected", replace)?;
    }
    Ok(())
}

fn message_of_60_kilobytes(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    for name in [ALICE, B1] {
        let body: String = (0..)
            .map(|line| format!("line {line}: Wasser & Wein\n"))
            .take(2600)
            .collect::<String>()[..60_000]
            .to_owned();
        play.step(format!("{name} says 60 kB"));
        play.client(name).groupchat(&room, &body)?;
        play.settle()?;
        play.only_these_see(&HALL, "60 kB", body_from(&occupant(&room, name), "groupchat", &body))?;
    }
    Ok(())
}

fn subject(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    for (name, subject) in [(ALICE, "first & foremost"), (B1, "Thema: 💧"), (B2, "")] {
        play.step(format!("{name} sets the subject {subject:?}"));
        play.client(name).subject(&room, subject)?;
        play.settle()?;
        let from = occupant(&room, name);
        play.only_these_see(&HALL, "the subject", |stanza| {
            stanza.from() == from && stanza.subject().as_deref() == Some(subject) && stanza.body().is_none()
        })?;
    }
    Ok(())
}

fn presence_change(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    for name in [ADAM, B3] {
        for (show, status) in [("away", "out & about"), ("dnd", "💤"), ("", "")] {
            play.step(format!("{name} is {show:?} in the room"));
            let content = match show {
                "" => String::new(),
                _ => format!(
                    "<show>{show}</show><status>{}</status><priority>3</priority>",
                    escaped(status)
                ),
            };
            let me = occupant(&room, name);
            play.client(name).presence_to(&me, "", &content)?;
            play.settle()?;
            play.only_these_see(&HALL, "the status", |stanza| {
                presence_from(&me, "")(stanza)
                    && stanza.element.child_text(CLIENT, "show").unwrap_or_default() == show
                    && stanza.element.child_text(CLIENT, "status").unwrap_or_default() == status
            })?;
        }
    }
    Ok(())
}

fn nick_change(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    for name in [ADAM, B2] {
        let old = nick(name).to_owned();
        let new = format!("Señor {old}");
        for (from, to) in [(&old, &new), (&new, &old)] {
            play.step(format!("{from} becomes {to}"));
            play.client(name).presence_to(&format!("{room}/{to}"), "", "")?;
            play.settle()?;
            let (gone, come) = (format!("{room}/{from}"), format!("{room}/{to}"));
            play.only_these_see(&HALL, "that the nick changes", |stanza| {
                presence_from(&gone, "unavailable")(stanza)
                    && stanza.has_status("303")
                    && stanza.item_attr("nick") == to
            })?;
            play.only_these_see(&HALL, "the new nick", presence_from(&come, ""))?;
        }
    }
    play.step("b2 wants the nick of alice");
    play.client(B2).presence_to(&occupant(&room, ALICE), "", "")?;
    play.settle()?;
    play.each_sees(&[B2], "a conflict", |stanza| {
        stanza.is_presence() && stanza.error() == Some("conflict")
    })?;
    play.none_sees(&[ALICE, ADAM, B1, B3, B4], "anything", |stanza| {
        stanza.from().starts_with(&room)
    })
}

fn private_message(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    for (from, to) in [(ALICE, B1), (B1, ALICE), (B2, B4), (B3, ADAM)] {
        play.step(format!("{from} tells {to} something in private"));
        let body = format!("psst, {to} <3");
        play.client(from).message(
            &occupant(&room, to),
            "chat",
            &format!("<body>{}</body><x xmlns='{MUC_USER}'/>", escaped(&body)),
        )?;
        play.settle()?;
        play.only_these_see(
            &[to],
            "the private message",
            body_from(&occupant(&room, from), "chat", &body),
        )?;
    }
    play.step("b1 tells nobody something in private");
    play.client(B1).chat(&format!("{room}/nobody"), "hello?")?;
    play.settle()?;
    play.each_sees(
        &[B1],
        "that nobody is there",
        error_of(&format!("{room}/nobody"), "item-not-found"),
    )
}

fn invite_through_the_room(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    for from in [ALICE, B1] {
        play.step(format!("{from} invites b5"));
        let (inviter, invited) = (play.bare(from), play.bare(B5));
        // Prosody names the occupant, ejabberd the user.
        let is_from = |of: &str| of == occupant(&room, from) || of.starts_with(&inviter);
        let invite =
            format!("<x xmlns='{MUC_USER}'><invite to='{invited}'><reason>come &amp; see</reason></invite></x>");
        play.client(from).message(&room, "", &invite)?;
        play.settle()?;
        play.only_these_see(&[B5], "the invitation", |stanza| {
            let invite = stanza.element.find(MUC_USER, "invite");
            let of = invite.and_then(|invite| invite.attr("from")).unwrap_or_default();
            stanza.from() == room
                && is_from(of)
                && invite
                    .and_then(|invite| invite.child_text(MUC_USER, "reason"))
                    .as_deref()
                    == Some("come & see")
        })?;
        let seen = play.client(B5).take("the invitation", |stanza| {
            stanza.element.find(MUC_USER, "invite").is_some()
        })?;
        let answer_to = seen
            .element
            .find(MUC_USER, "invite")
            .and_then(|invite| invite.attr("from"))
            .unwrap_or_default();
        play.step(format!("b5 declines, which {from} sees"));
        let decline = format!("<x xmlns='{MUC_USER}'><decline to='{answer_to}'><reason>no time</reason></decline></x>");
        play.client(B5).message(&room, "", &decline)?;
        play.settle()?;
        play.only_these_see(&[from], "that b5 declines", |stanza| {
            let decline = stanza.element.find(MUC_USER, "decline");
            stanza.from() == room
                && decline.is_some_and(|decline| decline.attr("from").unwrap_or_default().starts_with(&invited))
        })?;
    }
    Ok(())
}

fn invite_directly(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    for (from, to) in [(ALICE, B5), (B1, ADAM)] {
        play.step(format!("{from} invites {to} directly"));
        let (inviter, invited) = (play.jid(from), play.jid(to));
        let invite = format!("<x xmlns='jabber:x:conference' jid='{room}' reason='a &amp; b'/>");
        play.client(from).message(&invited, "", &invite)?;
        play.settle()?;
        play.only_these_see(&[to], "the direct invitation", |stanza| {
            let invite = stanza.element.child("jabber:x:conference", "x");
            stanza.from() == inviter && invite.and_then(|invite| invite.attr("reason")) == Some("a & b")
        })?;
    }
    Ok(())
}

/// XEP-0045 leaves it open how often an occupant with two sessions is announced: the servers differ.
fn two_sessions_with_one_nick(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    play.step("b3's second session joins under the same nick");
    play.client(B3_TOO).join(&room, "b3", None, Some(0))?;
    play.settle()?;
    let b3 = occupant(&room, B3);
    for other in [ALICE, ADAM, B1, B2, B4] {
        play.each_sees(&[B3_TOO], "who is there", presence_from(&occupant(&room, other), ""))?;
    }
    let in_again = play
        .client(B3_TOO)
        .count(|stanza| presence_from(&b3, "")(stanza) && stanza.has_status("110"));
    ensure(in_again >= 1, || {
        "b3's second session is not told that it is in".to_owned()
    })?;

    let seven = [ALICE, ADAM, B1, B2, B3, B3_TOO, B4];
    for (from, body) in [
        (ALICE, "to all sessions"),
        (B3, "from the first"),
        (B3_TOO, "from the second"),
    ] {
        play.step(format!("{from} says {body}"));
        play.client(from).groupchat(&room, body)?;
        play.settle()?;
        play.only_these_see(
            &seven,
            "the message",
            body_from(&occupant(&room, from), "groupchat", body),
        )?;
    }
    play.step("alice tells b3 something in private");
    play.client(ALICE).chat(&b3, "to both of you")?;
    play.settle()?;
    play.only_these_see(
        &[B3, B3_TOO],
        "the private message",
        body_from(&occupant(&room, ALICE), "chat", "to both of you"),
    )?;

    play.step("b3's first session leaves");
    play.client(B3).leave(&room, "b3", "")?;
    play.settle()?;
    play.each_sees(&[B3], "that it is out", presence_from(&b3, "unavailable"))?;
    play.none_sees(
        &[ALICE, ADAM, B1, B2, B4],
        "that b3 is out",
        presence_from(&b3, "unavailable"),
    )?;
    play.step("alice says who is left");
    play.client(ALICE).groupchat(&room, "who is left?")?;
    play.settle()?;
    let left = [ALICE, ADAM, B1, B2, B3_TOO, B4];
    play.only_these_see(
        &left,
        "the message",
        body_from(&occupant(&room, ALICE), "groupchat", "who is left?"),
    )?;

    play.step("b3's second session leaves, the first comes back");
    play.client(B3_TOO).leave(&room, "b3", "")?;
    play.settle()?;
    play.each_sees(
        &[ALICE, ADAM, B1, B2, B4],
        "that b3 is out",
        presence_from(&b3, "unavailable"),
    )?;
    play.client(B3).join(&room, "b3", None, Some(0))?;
    play.settle()?;
    play.each_sees(&HALL, "that b3 is in", presence_from(&b3, ""))
}

fn voice_request(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    play.step("the room becomes moderated");
    configure(play, &room, &[("moderatedroom", "1")])?;
    play.settle()?;
    play.step("b4 loses its voice");
    set_role(play, ALICE, &room, "b4", "visitor", "hush")?;
    play.settle()?;
    play.each_sees(&HALL, "that b4 is a visitor", |stanza| {
        presence_from(&occupant(&room, B4), "")(stanza) && stanza.item_attr("role") == "visitor"
    })?;
    play.step("b4 speaks nevertheless");
    play.client(B4).groupchat(&room, "I have no voice")?;
    play.settle()?;
    play.each_sees(&[B4], "that it may not", error_of(&room, "forbidden"))?;
    play.none_sees(&[ALICE, ADAM, B1, B2, B3], "what b4 says", Stanza::is_message)?;

    play.step("b4 asks for a voice");
    let form_type =
        "<field var='FORM_TYPE' type='hidden'><value>http://jabber.org/protocol/muc#request</value></field>";
    let ask = format!(
        "<x xmlns='jabber:x:data' type='submit'>{form_type}\
         <field var='muc#role' type='list-single' label='Requested role'><value>participant</value></field></x>"
    );
    play.client(B4).message(&room, "", &ask)?;
    play.settle()?;
    let asks = |stanza: &Stanza| stanza.from() == room && stanza.element.child("jabber:x:data", "x").is_some();
    play.only_these_see(&[ALICE], "the form", asks)?;

    play.step("alice grants it");
    let grant = format!(
        "<x xmlns='jabber:x:data' type='submit'>{form_type}<field var='muc#role'><value>participant</value></field>\
         <field var='muc#jid'><value>{}</value></field><field var='muc#roomnick'><value>b4</value></field>\
         <field var='muc#request_allow'><value>true</value></field></x>",
        play.jid(B4)
    );
    play.client(ALICE).message(&room, "", &grant)?;
    play.settle()?;
    play.each_sees(&HALL, "that b4 has a voice", |stanza| {
        presence_from(&occupant(&room, B4), "")(stanza) && stanza.item_attr("role") == "participant"
    })?;
    play.step("the room is not moderated any more");
    configure(play, &room, &[("moderatedroom", "0")])?;
    play.settle()
}

fn role_changes(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    for (name, role) in [
        (B1, "moderator"),
        (ADAM, "visitor"),
        (ADAM, "participant"),
        (B1, "participant"),
    ] {
        play.step(format!("{name} becomes a {role}"));
        set_role(play, ALICE, &room, nick(name), role, "so be it")?;
        play.settle()?;
        let changed =
            |stanza: &Stanza| presence_from(&occupant(&room, name), "")(stanza) && stanza.item_attr("role") == role;
        if role == "moderator" {
            // Prosody tells a new moderator of everybody again, itself included.
            play.each_sees(&[ALICE, ADAM, B2, B3, B4], "the role", changed)?;
            ensure(play.client(name).count(changed) >= 1, || {
                format!("{name} is not told its role")
            })?;
        } else {
            play.each_sees(&HALL, "the role", changed)?;
        }
    }
    play.step("b2 may not change roles");
    let item = format!("<query xmlns='{MUC_ADMIN}'><item nick='adam' role='none'/></query>");
    refused(play, B2, "set", &room, &item, forbidden(play))?;
    play.settle()?;
    play.none_sees(&HALL, "a presence", Stanza::is_presence)
}

/// What an ordinary occupant is told who gives orders.
fn forbidden(play: &Play<'_>) -> &'static str {
    match play.host_kind() {
        Kind::Prosody => "not-allowed",
        Kind::Ejabberd => "not-allowed",
    }
}

fn affiliation_changes(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    for (name, affiliation) in [(B2, "member"), (B2, "admin"), (B1, "owner"), (B1, "none"), (B2, "none")] {
        play.step(format!("{name} becomes {affiliation}"));
        set_affiliation(play, ALICE, &room, &play.bare(name), affiliation)?;
        play.settle()?;
        for who in HALL {
            let seen = play.client(who).count(|stanza| {
                presence_from(&occupant(&room, name), "")(stanza) && stanza.item_attr("affiliation") == affiliation
            });
            // A new moderator may be told of itself twice.
            ensure(seen == 1 || (who == name && seen == 2), || {
                format!("{who} saw {name} become {affiliation} {seen} times")
            })?;
        }
    }
    play.step("b5, who is not in the room, becomes a member");
    let b5 = play.bare(B5);
    set_affiliation(play, ALICE, &room, &b5, "member")?;
    play.settle()?;
    let list = request(
        play,
        ALICE,
        "get",
        &room,
        &format!("<query xmlns='{MUC_ADMIN}'><item affiliation='member'/></query>"),
    )?;
    let member = list
        .element
        .find(MUC_ADMIN, "item")
        .and_then(|item| item.attr("jid").map(str::to_owned));
    ensure(member.as_deref() == Some(b5.as_str()), || {
        format!("the members: {}", list.raw)
    })?;
    set_affiliation(play, ALICE, &room, &b5, "none")?;
    play.settle()
}

fn kick(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    play.step("b1 becomes a moderator");
    set_role(play, ALICE, &room, "b1", "moderator", "")?;
    play.settle()?;
    for (by, name) in [(ALICE, B4), (B1, ADAM), (B1, B2)] {
        play.step(format!("{by} kicks {name}"));
        let out = occupant(&room, name);
        set_role(play, by, &room, nick(name), "none", "go &amp; rest")?;
        play.settle()?;
        play.only_these_see(&HALL, "the kick", |stanza| {
            let reason = stanza.item().and_then(|item| item.child_text(MUC_USER, "reason"));
            presence_from(&out, "unavailable")(stanza)
                && stanza.has_status("307")
                && reason.as_deref() == Some("go & rest")
        })?;
        play.each_sees(&[name], "that it is out itself", |stanza| {
            stanza.has_status("307") && stanza.has_status("110")
        })?;
        play.step(format!("{name} comes back"));
        play.client(name).join(&room, nick(name), None, Some(0))?;
        play.settle()?;
        play.each_sees(&HALL, "that it is back", presence_from(&out, ""))?;
    }
    play.step("b1 is no moderator any more");
    set_role(play, ALICE, &room, "b1", "participant", "")?;
    play.settle()
}

fn ban(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    let out = occupant(&room, B4);
    play.step("alice bans b4");
    set_affiliation(play, ALICE, &room, &play.bare(B4), "outcast")?;
    play.settle()?;
    play.only_these_see(&HALL, "the ban", |stanza| {
        presence_from(&out, "unavailable")(stanza) && stanza.has_status("301")
    })?;
    play.step("b4 tries to come back");
    play.client(B4).join(&room, "b4", None, None)?;
    play.settle()?;
    play.each_sees(&[B4], "that it may not", error_of(&out, "forbidden"))?;
    play.none_sees(&[ALICE, ADAM, B1, B2, B3], "b4", presence_from(&out, ""))?;
    play.step("alice forgives, b4 comes back");
    set_affiliation(play, ALICE, &room, &play.bare(B4), "none")?;
    play.settle()?;
    play.client(B4).join(&room, "b4", None, Some(0))?;
    play.settle()?;
    play.each_sees(&HALL, "b4", presence_from(&out, ""))
}

fn configuration_change(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    for (field, value, code) in [
        ("whois", "anyone", "172"),
        ("whois", "moderators", "173"),
        ("roomname", "Great &amp; Hall", "104"),
    ] {
        play.step(format!("alice sets {field} to {value}"));
        configure(play, &room, &[(field, value)])?;
        play.settle()?;
        play.each_sees(&HALL, "the change", |stanza| {
            stanza.is_message() && stanza.from() == room && stanza.kind() == "groupchat" && stanza.has_status(code)
        })?;
    }
    let info = request(play, B1, "get", &room, &format!("<query xmlns='{DISCO_INFO}'/>"))?;
    let name = info
        .element
        .find(DISCO_INFO, "identity")
        .and_then(|identity| identity.attr("name").map(str::to_owned));
    ensure(name.as_deref() == Some("Great & Hall"), || {
        format!("the room's name: {}", info.raw)
    })
}

fn requests_to_the_room_and_through_it(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    let service = play.stage.rooms(play.stage.host());
    for name in [ADAM, B1] {
        play.step(format!("{name} asks what the service and the room can do"));
        for to in [&service, &room] {
            let info = request(play, name, "get", to, &format!("<query xmlns='{DISCO_INFO}'/>"))?;
            let query = info.element.child(DISCO_INFO, "query");
            let muc = query.is_some_and(|query| {
                query
                    .elements()
                    .any(|element| element.attr("var") == Some("http://jabber.org/protocol/muc"))
            });
            ensure(muc, || format!("no MUC at {to}: {}", info.raw))?;
        }
        let items = request(play, name, "get", &service, &format!("<query xmlns='{DISCO_ITEMS}'/>"))?;
        let query = items.element.child(DISCO_ITEMS, "query");
        let listed = query.is_some_and(|query| query.elements().any(|item| item.attr("jid") == Some(&room)));
        ensure(listed, || format!("{room} is not listed: {}", items.raw))?;

        play.step(format!("{name} pings itself through the room"));
        request(
            play,
            name,
            "get",
            &occupant(&room, name),
            "<ping xmlns='urn:xmpp:ping'/>",
        )?;
        play.settle()?;
    }
    play.step("b5 pings itself through a room that it is not in");
    refused(
        play,
        B5,
        "get",
        &occupant(&room, B5),
        "<ping xmlns='urn:xmpp:ping'/>",
        "not-acceptable",
    )?;

    for (from, to) in [(ALICE, B1), (B1, ADAM), (B2, B4)] {
        play.step(format!("{from} asks {to} through the room"));
        play.client(to).set_answers(Answers::Nothing);
        let id = play
            .client(from)
            .iq_get(&occupant(&room, to), "<query xmlns='urn:example:question' a='1'/>")?;
        let question = play
            .client(to)
            .expect("the question", play.stage.patience(), |stanza| {
                stanza.element.child("urn:example:question", "query").is_some()
            })?;
        ensure(question.from() == occupant(&room, from), || {
            format!("the asker: {}", question.raw)
        })?;
        play.client(to)
            .iq_result(&question, "<query xmlns='urn:example:question'>42 &amp; more</query>")?;
        let answer = play
            .client(from)
            .expect("the answer", play.stage.patience(), |stanza| stanza.id() == id)?;
        let text = answer.element.child_text("urn:example:question", "query");
        ensure(
            text.as_deref() == Some("42 & more") && answer.from() == occupant(&room, to),
            || answer.raw.clone(),
        )?;
        play.client(to).set_answers(Answers::Refuse);
        play.step(format!("{to} does not know what {from} means"));
        let payload = "<query xmlns='urn:example:nonsense'/>";
        refused(play, from, "get", &occupant(&room, to), payload, "service-unavailable")?;
        play.settle()?;
    }
    Ok(())
}

/// The room's archive, or the refusal where there is none.
fn archive_of_the_room(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    play.step("alice says something worth keeping");
    play.client(ALICE).groupchat(&room, "worth keeping")?;
    play.settle()?;
    for name in [ADAM, B1] {
        play.step(format!("{name} asks the archive for the last two messages"));
        let query = format!(
            "<query xmlns='urn:xmpp:mam:2' queryid='q-{}'><set xmlns='http://jabber.org/protocol/rsm'><max>2</max><before/></set></query>",
            nick(name)
        );
        let answer = play.client(name).ask("set", &room, &query, play.stage.patience())?;
        play.settle()?;
        if !play.stage.archives() {
            ensure(answer.kind() == "error", || format!("an archive: {}", answer.raw))?;
            continue;
        }
        ensure(answer.kind() == "result", || format!("no archive: {}", answer.raw))?;
        play.each_sees(&[name], "what was kept", |stanza| {
            let kept = stanza
                .element
                .find("urn:xmpp:forward:0", "forwarded")
                .and_then(|kept| kept.find(CLIENT, "body"));
            stanza.from() == room && kept.is_some_and(|body| body.text() == "worth keeping")
        })?;
        let results = |stanza: &Stanza| stanza.element.child("urn:xmpp:mam:2", "result").is_some();
        play.each_sees_times(2, &[name], "results", results)?;
    }
    Ok(())
}

fn speak_without_being_in(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    play.step("b5 speaks without being in");
    play.client(B5).groupchat(&room, "let me in")?;
    play.client(B5).chat(&occupant(&room, ALICE), "let me in")?;
    play.settle()?;
    play.each_sees(&[B5], "that it may not", error_of(&room, "not-acceptable"))?;
    play.each_sees(
        &[B5],
        "that it may not whisper",
        error_of(&occupant(&room, ALICE), "not-acceptable"),
    )?;
    play.none_sees(&HALL, "what b5 says", Stanza::is_message)
}

fn leave(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    for name in [ADAM, B4] {
        let me = occupant(&room, name);
        play.step(format!("{name} leaves with a word"));
        play.client(name).leave(&room, nick(name), "so long & thanks")?;
        play.settle()?;
        play.only_these_see(&HALL, "who leaves", |stanza| {
            let status = stanza.element.child_text(CLIENT, "status");
            presence_from(&me, "unavailable")(stanza) && status.as_deref() == Some("so long & thanks")
        })?;
        play.step(format!("alice speaks without {name}"));
        play.client(ALICE).groupchat(&room, "who is gone?")?;
        play.settle()?;
        let left: Vec<&str> = HALL.into_iter().filter(|other| *other != name).collect();
        play.only_these_see(
            &left,
            "the message",
            body_from(&occupant(&room, ALICE), "groupchat", "who is gone?"),
        )?;
        play.step(format!("{name} comes back"));
        play.client(name).join(&room, nick(name), None, Some(1))?;
        play.settle()?;
        play.each_sees(
            &[name],
            "the last message",
            body_from(&occupant(&room, ALICE), "groupchat", "who is gone?"),
        )?;
    }
    Ok(())
}

fn connection_breaks(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    let out = occupant(&room, B4);
    play.step("b4 signs out without a word to the room");
    play.sign_out(B4, true)?;
    // Nobody's ping waits for b4's server to say goodbye for it.
    play.client(B1).expect(
        "that b4 is out",
        play.stage.patience(),
        presence_from(&out, "unavailable"),
    )?;
    play.settle()?;
    play.each_sees(
        &[ALICE, ADAM, B2, B3],
        "that b4 is out",
        presence_from(&out, "unavailable"),
    )?;
    play.step("b4 comes back");
    play.come_online(B4)?;
    play.client(B4).join(&room, "b4", None, Some(0))?;
    play.settle()?;
    play.each_sees(&HALL, "b4", presence_from(&out, ""))
}

fn destroy(play: &mut Play<'_>) -> Outcome {
    let room = hall(play);
    let service = play.stage.rooms(play.stage.host());
    play.step("alice destroys the hall");
    play.room_ends(&room);
    let order = format!(
        "<query xmlns='{MUC_OWNER}'><destroy jid='yard@{service}'><reason>too &amp; small</reason></destroy></query>"
    );
    request(play, ALICE, "set", &room, &order)?;
    play.settle()?;
    for name in GUESTS {
        play.each_sees(&[name], "the end", |stanza| {
            let destroy = stanza.element.find(MUC_USER, "destroy");
            stanza.kind() == "unavailable"
                && destroy
                    .is_some_and(|destroy| destroy.child_text(MUC_USER, "reason").as_deref() == Some("too & small"))
        })?;
    }
    play.none_sees(&[B5], "the end", |stanza| stanza.from().starts_with(&room))
}

// ---- outside of rooms

fn chat_outside_of_rooms(play: &mut Play<'_>) -> Outcome {
    for (from, to) in [(ALICE, B1), (B1, ALICE), (B3, ADAM)] {
        let (sender, receiver, bare) = (play.jid(from), play.jid(to), play.bare(to));
        for (kind, body) in [
            ("chat", "a & b"),
            ("normal", "👋"),
            ("", "no type"),
            ("headline", "news"),
        ] {
            play.step(format!("{from} sends {to} a {kind} message"));
            let content = format!("<body>{}</body><thread>t1</thread><subject>s</subject>", escaped(body));
            play.client(from).message(&receiver, kind, &content)?;
            play.settle()?;
            play.only_these_see(&[to], "the message", body_from(&sender, kind, body))?;
        }
        play.step(format!("{from} writes to all of {to}"));
        play.client(from).chat(&bare, "wherever you are")?;
        play.settle()?;
        play.only_these_see(&[to], "the message", body_from(&sender, "chat", "wherever you are"))?;
    }
    play.step("alice writes to b3, who has two sessions");
    let (alice, b3) = (play.jid(ALICE), play.bare(B3));
    play.client(ALICE).chat(&b3, "which one of you?")?;
    play.settle()?;
    play.only_these_see(
        &[B3, B3_TOO],
        "the message",
        body_from(&alice, "chat", "which one of you?"),
    )
}

fn receipts_and_chat_states(play: &mut Play<'_>) -> Outcome {
    for (from, to) in [(ADAM, B2), (B2, ADAM)] {
        let (sender, receiver) = (play.jid(from), play.jid(to));
        play.step(format!("{from} wants a receipt from {to}"));
        let composing = "<composing xmlns='http://jabber.org/protocol/chatstates'/>";
        play.client(from).message(&receiver, "chat", composing)?;
        let content = "<body>got it?</body><active xmlns='http://jabber.org/protocol/chatstates'/><request xmlns='urn:xmpp:receipts'/>";
        let id = play.client(from).message(&receiver, "chat", content)?;
        play.settle()?;
        let composes = |stanza: &Stanza| {
            stanza
                .element
                .child("http://jabber.org/protocol/chatstates", "composing")
                .is_some()
        };
        play.only_these_see(&[to], "who writes", composes)?;
        let asks =
            |stanza: &Stanza| stanza.id() == id && stanza.element.child("urn:xmpp:receipts", "request").is_some();
        play.only_these_see(&[to], "the request", asks)?;
        play.step(format!("{to} gives a receipt"));
        play.client(to).message(
            &sender,
            "chat",
            &format!("<received xmlns='urn:xmpp:receipts' id='{id}'/>"),
        )?;
        play.settle()?;
        play.only_these_see(&[from], "the receipt", |stanza| {
            let receipt = stanza.element.child("urn:xmpp:receipts", "received");
            stanza.from() == receiver && receipt.and_then(|receipt| receipt.attr("id")) == Some(id.as_str())
        })?;
    }
    Ok(())
}

fn errors_outside_of_rooms(play: &mut Play<'_>) -> Outcome {
    let cases = [
        (ALICE, format!("nobody@{}", play.far())),
        (B1, format!("nobody@{}", play.near())),
    ];
    for (from, nobody) in cases {
        play.step(format!("{from} writes to {nobody}"));
        play.client(from).chat(&nobody, "anybody?")?;
        play.settle()?;
        play.only_these_see(
            &[from],
            "that nobody is there",
            error_of(&nobody, "service-unavailable"),
        )?;
        refused(
            play,
            from,
            "get",
            &nobody,
            "<query xmlns='urn:example:question'/>",
            "service-unavailable",
        )?;
    }
    Ok(())
}

/// Lets two users see each other, each step waited for: the servers limit how many of these come at once.
fn befriend(play: &mut Play<'_>, one: &str, other: &str) -> Outcome {
    for (asker, asked) in [(one, other), (other, one)] {
        let (asker_bare, asked_bare) = (play.bare(asker), play.bare(asked));
        play.step(format!("{asker} asks {asked} for its presence"));
        play.client(asker).presence_to(&asked_bare, "subscribe", "")?;
        play.settle()?;
        play.each_sees(&[asked], "the request", presence_from(&asker_bare, "subscribe"))?;
        play.step(format!("{asked} agrees"));
        play.client(asked).presence_to(&asker_bare, "subscribed", "")?;
        play.settle()?;
        play.each_sees(&[asker], "that it is agreed", presence_from(&asked_bare, "subscribed"))?;
        play.each_sees(&[asker], "where the other is", presence_from(&play.jid(asked), ""))?;
    }
    Ok(())
}

fn subscription(play: &mut Play<'_>) -> Outcome {
    befriend(play, ALICE, B1)?;
    play.step("b2 refuses adam");
    let (adam, b2) = (play.bare(ADAM), play.bare(B2));
    play.client(ADAM).presence_to(&b2, "subscribe", "")?;
    play.settle()?;
    play.each_sees(&[B2], "the request", presence_from(&adam, "subscribe"))?;
    play.client(B2).presence_to(&adam, "unsubscribed", "")?;
    play.settle()?;
    // ejabberd does not tell who was not subscribed yet, but takes the request off the roster.
    play.none_sees(&[ADAM], "b2's presence", presence_from(&play.jid(B2), ""))
}

fn presence_to_many_contacts(play: &mut Play<'_>) -> Outcome {
    for far in [B2, B3, B4] {
        befriend(play, ALICE, far)?;
    }
    let alice = play.jid(ALICE);
    let friends = [B1, B2, B3, B3_TOO, B4];
    for (show, status) in [("away", "at sea & away"), ("", "")] {
        play.step(format!("alice is {show:?} for her contacts"));
        let content = match show {
            "" => String::new(),
            _ => format!("<show>{show}</show><status>{}</status>", escaped(status)),
        };
        play.client(ALICE).presence(&content)?;
        play.settle()?;
        play.each_sees(&friends, "alice's status", |stanza| {
            presence_from(&alice, "")(stanza) && stanza.element.child_text(CLIENT, "show").unwrap_or_default() == show
        })?;
        play.none_sees(&[ADAM, B5], "alice's status", presence_from(&alice, ""))?;
    }
    let b1 = play.jid(B1);
    play.step("b1 is away for alice");
    play.client(B1).presence("<show>xa</show>")?;
    play.settle()?;
    play.each_sees(&[ALICE], "b1's status", presence_from(&b1, ""))?;
    play.step("b1 sends alice its presence directly, and takes it back");
    play.client(B1).presence_to(&alice, "", "<status>just you</status>")?;
    play.client(B1)
        .presence_to(&play.jid(ADAM), "", "<status>and you</status>")?;
    play.settle()?;
    play.each_sees(&[ALICE, ADAM], "b1's presence", presence_from(&b1, ""))?;
    play.step("b1 becomes unavailable and comes back");
    play.client(B1).presence_to("", "unavailable", "")?;
    play.settle()?;
    play.each_sees(&[ALICE, ADAM], "that b1 is away", presence_from(&b1, "unavailable"))?;
    play.client(B1).presence("")?;
    play.settle()?;
    play.each_sees(&[ALICE], "that b1 is back", presence_from(&b1, ""))?;
    play.each_sees(&[B1], "that alice is there", presence_from(&alice, ""))
}

fn requests_between_clients_and_servers(play: &mut Play<'_>) -> Outcome {
    let servers = [(ALICE, play.far()), (B1, play.near())];
    for (name, server) in servers {
        play.step(format!("{name} asks {server}"));
        request(play, name, "get", &server, "<ping xmlns='urn:xmpp:ping'/>")?;
        request(play, name, "get", &server, "<query xmlns='jabber:iq:version'/>")?;
        let info = request(play, name, "get", &server, &format!("<query xmlns='{DISCO_INFO}'/>"))?;
        ensure(info.element.find(DISCO_INFO, "identity").is_some(), || info.raw.clone())?;
        request(play, name, "get", &server, &format!("<query xmlns='{DISCO_ITEMS}'/>"))?;
    }
    for (from, to) in [(ALICE, B1), (B1, ALICE)] {
        let (asker, asked) = (play.jid(from), play.jid(to));
        for kind in ["get", "set"] {
            play.step(format!("{from} sends {to} a {kind}"));
            play.client(to).set_answers(Answers::Nothing);
            let payload = "<query xmlns='urn:example:question' a='1'><b/> text </query>";
            let id = match kind {
                "get" => play.client(from).iq_get(&asked, payload)?,
                _ => play.client(from).iq_set(&asked, payload)?,
            };
            let question = play
                .client(to)
                .expect("the question", play.stage.patience(), |stanza| stanza.id() == id)?;
            ensure(question.from() == asker && question.kind() == kind, || {
                question.raw.clone()
            })?;
            play.client(to)
                .iq_result(&question, "<answer xmlns='urn:example:question'>42</answer>")?;
            let answer = play
                .client(from)
                .expect("the answer", play.stage.patience(), |stanza| stanza.id() == id)?;
            let text = answer.element.child_text("urn:example:question", "answer");
            ensure(text.as_deref() == Some("42"), || answer.raw.clone())?;
            play.client(to).set_answers(Answers::Refuse);
            play.settle()?;
        }
        refused(
            play,
            from,
            "get",
            &asked,
            "<query xmlns='urn:example:nonsense'/>",
            "service-unavailable",
        )?;
    }
    Ok(())
}

fn vcard(play: &mut Play<'_>) -> Outcome {
    for (from, to) in [(ALICE, B1), (B1, ALICE)] {
        play.step(format!("{to} writes a vCard, {from} reads it"));
        let card = format!(
            "<vCard xmlns='vcard-temp'><FN>{} &amp; Söhne</FN><NICKNAME>{0}</NICKNAME></vCard>",
            nick(to)
        );
        request(play, to, "set", "", &card)?;
        play.settle()?;
        let read = request(play, from, "get", &play.bare(to), "<vCard xmlns='vcard-temp'/>")?;
        let name = read
            .element
            .child("vcard-temp", "vCard")
            .and_then(|card| card.child_text("vcard-temp", "FN"));
        ensure(name == Some(format!("{} & Söhne", nick(to))), || read.raw.clone())?;
        play.settle()?;
    }
    Ok(())
}

/// Personal eventing (XEP-0163): whoever announces interest and is subscribed is told, once.
fn personal_events(play: &mut Play<'_>) -> Outcome {
    const EVENT: &str = "http://jabber.org/protocol/pubsub#event";
    let listeners = [ALICE, B1, B2];
    play.step("some announce interest in nicks");
    for name in listeners {
        play.client(name).set_answers(Answers::Caps);
        play.client(name).presence(CAPS)?;
    }
    // A server asks for capabilities that it does not know; when it has them is its own affair.
    play.settle()?;
    for (from, to) in [(ALICE, [B1, B2].as_slice()), (B1, [ALICE].as_slice())] {
        play.step(format!("{from} publishes a nick"));
        let event = format!(
            "<pubsub xmlns='http://jabber.org/protocol/pubsub'><publish node='{NICK}'><item id='nw.current'>\
             <nick xmlns='{NICK}'>{} &amp; Co</nick></item></publish></pubsub>",
            nick(from)
        );
        request(play, from, "set", "", &event)?;
        let (bare, wanted) = (play.bare(from), format!("{} & Co", nick(from)));
        let told = |stanza: &Stanza| {
            let event = stanza.element.child(EVENT, "event");
            stanza.from() == bare
                && event
                    .and_then(|event| event.find(NICK, "nick"))
                    .is_some_and(|nick| nick.text() == wanted)
        };
        for listener in to {
            play.client(listener).expect("the event", play.stage.patience(), told)?;
        }
        play.settle()?;
        play.none_sees(to, "the event again", told)?;
        play.none_sees(&[ADAM, B3, B4, B5], "the event", told)?;
    }
    Ok(())
}

fn unsubscription(play: &mut Play<'_>) -> Outcome {
    play.step("alice and b1 part");
    let (alice, b1) = (play.bare(ALICE), play.bare(B1));
    play.client(ALICE).presence_to(&b1, "unsubscribe", "")?;
    play.settle()?;
    play.each_sees(
        &[B1],
        "that alice is not interested",
        presence_from(&alice, "unsubscribe"),
    )?;
    play.client(ALICE).presence_to(&b1, "unsubscribed", "")?;
    play.settle()?;
    play.each_sees(
        &[B1],
        "that it may not see alice",
        presence_from(&alice, "unsubscribed"),
    )?;
    play.step("alice is away, which b1 does not see");
    play.client(ALICE).presence("<show>away</show>")?;
    play.settle()?;
    play.none_sees(&[B1], "alice's status", |stanza| {
        stanza.is_presence() && stanza.from().starts_with(&alice)
    })?;
    play.step("everybody forgets everybody");
    super::recording::clear_rosters(play)
}
