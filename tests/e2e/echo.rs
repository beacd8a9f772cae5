//! `echo: local`: the declared differences from plain S2S that recordings cannot show, and what a split adds to them.
//!
//! The recordings (`recordings.rs`) wait for each step, so they show no other order. Here the link is down when it matters: what is heard
//! near by cannot have come from the room then, and nothing depends on how fast anybody is.

use std::time::Duration;

use narrows_lab::{
    Ejabberd, Layout, Profile, Prosody, ServerSpec,
    client::{Client, Failure, MUC_ADMIN, MUC_OWNER, Outcome, Stanza},
    scenario::{Side, Stage, WorldStage},
};

use crate::{
    cast::{enter, make_room, sign_in},
    faults::{held_pair, unthrottled},
    seen::{PATIENCE, heard_times, hears, presence_of},
    stage::{in_company, world},
};

const HOLD: Duration = Duration::from_secs(4);

/// Where a room's id stands (XEP-0359).
const SID: &str = "urn:xmpp:sid:0";

fn moderated() -> String {
    format!(
        "<query xmlns='{MUC_OWNER}'><x xmlns='jabber:x:data' type='submit'>\
         <field var='FORM_TYPE'><value>http://jabber.org/protocol/muc#roomconfig</value></field>\
         <field var='muc#roomconfig_moderatedroom'><value>1</value></field></x></query>"
    )
}

fn ordered(owner: &Client, room: &str, query: &str) -> Outcome {
    let answer = owner.ask("set", room, query, PATIENCE)?;
    match answer.kind() {
        "result" => Ok(()),
        _ => Err(Failure(format!("an order is refused: {}", answer.raw))),
    }
}

/// The bodies that a client has heard in the room, in the order in which it did.
fn order_at(client: &Client, room: &str, bodies: &[&str]) -> Vec<String> {
    let transcript = client.transcript();
    let said = transcript
        .iter()
        .filter(|stanza| stanza.is_message() && stanza.from().starts_with(room) && stanza.kind() == "groupchat");
    said.filter_map(Stanza::body)
        .filter(|body| bodies.contains(&body.as_str()))
        .collect()
}

fn copy_of(client: &Client, body: &str) -> Outcome<Stanza> {
    let transcript = client.transcript();
    let copy = transcript
        .into_iter()
        .find(|stanza| stanza.is_message() && stanza.body().as_deref() == Some(body));
    copy.ok_or_else(|| Failure(format!("{} has not heard {body:?}", client.user())))
}

/// What a visitor is told who speaks: the stanza without its text, which each server words for itself.
fn refused(client: &Client, room: &str, body: &str) -> Outcome<(String, String, String)> {
    let id = client.groupchat(room, body)?;
    let error = client.expect("that it may not speak", PATIENCE, |stanza| {
        stanza.is_message() && stanza.kind() == "error" && stanza.id() == id
    })?;
    let kind = error.element.elements().find(|child| child.name == "error");
    let kind = kind.and_then(|child| child.attr("type")).unwrap_or_default().to_owned();
    Ok((
        error.from().to_owned(),
        kind,
        error.error().unwrap_or_default().to_owned(),
    ))
}

fn declared_differences(name: &str, a: ServerSpec, b: ServerSpec) {
    let _company = in_company();
    let pair = held_pair()
        .yaml("mirror", "echo: local")
        .yaml("mirror", &format!("split: {{ hold: {}s }}", HOLD.as_secs()));
    let pair = ["ack_delay: 500ms", "quiet_after: 1s", "dead_after: 2s"]
        .into_iter()
        .fold(pair, |pair, line| pair.yaml("link", line));
    let layout = Layout::Sidecar(pair);
    let world = &world(name, Profile::lan(), unthrottled(a), unthrottled(b), 0, layout);
    let play = || -> Outcome {
        let stage = WorldStage::new(world);
        let room = format!("deck@{}", stage.rooms(Side::A));
        let alice = &sign_in(&stage, Side::A, "alice")?;
        make_room(&stage, alice, &room)?;
        let adam = &sign_in(&stage, Side::A, "adam")?;
        let [b1, b2, b3] = &["b1", "b2", "b3"].map(|user| sign_in(&stage, Side::B, user));
        let (Ok(b1), Ok(b2), Ok(b3)) = (b1, b2, b3) else {
            return Err(Failure(format!("{b1:?} {b2:?} {b3:?}")));
        };
        for client in [adam, b1, b2, b3] {
            enter(&stage, client, &room)?;
        }
        ordered(alice, &room, &moderated())?;
        let item = "<item nick='b3' role='visitor'/>";
        ordered(alice, &room, &format!("<query xmlns='{MUC_ADMIN}'>{item}</query>"))?;
        let muted = |stanza: &Stanza| {
            stanza.is_presence() && stanza.from() == format!("{room}/b3") && stanza.item_attr("role") == "visitor"
        };
        for client in [alice, adam, b1, b2, b3] {
            client.expect("that b3 is a visitor", PATIENCE, muted)?;
        }
        let by_room = refused(b3, &room, "mute, says the room")?;

        // The room has its order already when those near by have another.
        world.link.down();
        let bodies = ["first in the room", "first near by"];
        alice.groupchat(&room, bodies[0])?;
        for client in [alice, adam] {
            hears(client, bodies[0])?;
        }
        b1.groupchat(&room, bodies[1])?;
        for client in [b1, b2, b3] {
            hears(client, bodies[1])?;
        }
        // Who may not speak is told so near by while the room cannot tell it, and as the room does.
        for client in [b1, b2, b3] {
            let gone = format!("{room}/alice");
            presence_of(client, "that alice is gone", &gone, "unavailable", HOLD + PATIENCE)?;
        }
        let near_by = refused(b3, &room, "mute, says the mirror")?;
        if near_by != by_room {
            return Err(Failure(format!(
                "a visitor is told {near_by:?} near by, {by_room:?} by the room"
            )));
        }
        world.link.up();
        for client in [alice, adam] {
            hears(client, bodies[1])?;
        }
        // Only the room can have said this, and all that it said before is before it.
        alice.groupchat(&room, "at last")?;
        for client in [alice, adam, b1, b2, b3] {
            hears(client, "at last")?;
            for unheard in ["mute, says the room", "mute, says the mirror"] {
                if heard_times(client, unheard) > 0 {
                    return Err(Failure(format!("{} heard a visitor: {unheard:?}", client.user())));
                }
            }
        }
        let of_the_room = bodies.map(str::to_owned).to_vec();
        let near: Vec<String> = of_the_room.iter().rev().cloned().collect();
        for (client, order) in [
            (alice, &of_the_room),
            (adam, &of_the_room),
            (b1, &near),
            (b2, &near),
            (b3, &near),
        ] {
            // Each once, too.
            let heard = order_at(client, &room, &bodies);
            if heard != *order {
                return Err(Failure(format!("{} heard {heard:?}", client.user())));
            }
        }
        // The copies near by are of the message that the room has, without an id that nobody has given.
        let id = copy_of(alice, bodies[1])?.id().to_owned();
        for client in [b1, b2, b3] {
            let copy = copy_of(client, bodies[1])?;
            if copy.id() != id || copy.element.child(SID, "stanza-id").is_some() {
                return Err(Failure(format!("{} heard {}", client.user(), copy.raw)));
            }
        }
        println!("{name}: a visitor is told {by_room:?}");
        Ok(())
    };
    play().unwrap_or_else(|failure| panic!("{name}: {failure}"));
}

/// The room on Prosody, its far users on ejabberd.
#[test]
fn differences_of_local_echoes_prosody_and_ejabberd() {
    declared_differences("dpe", Prosody::stock(), Ejabberd::stock());
}

/// The room on ejabberd, its far users on Prosody.
#[test]
fn differences_of_local_echoes_ejabberd_and_prosody() {
    declared_differences("dep", Ejabberd::stock(), Prosody::stock());
}
