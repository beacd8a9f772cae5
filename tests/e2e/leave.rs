//! `mirror.split.far: leave`: who is beyond a link that is gone is out of the room meanwhile. When it is back nobody has to enter again, no
//! client saw that it was out, and all that was said is heard.

use std::{collections::BTreeSet, thread::sleep, time::Duration};

use narrows_lab::{
    Ejabberd, Layout, Profile, Prosody, ServerSpec,
    client::{Client, Failure, MUC_ADMIN, Outcome},
    scenario::{Side, Stage, WorldStage},
};

use crate::{
    cast::{enter, make_room, sign_in},
    faults::{held_pair, unthrottled},
    seen::{PATIENCE, heard, hears, presence_of, sees, was_put_out},
    stage::{in_company, world},
};

const HOLD: Duration = Duration::from_secs(4);

/// Whether a client was ever told that a nick has left.
fn saw_leave(client: &Client, occupant: &str) -> bool {
    let transcript = client.transcript();
    transcript
        .iter()
        .any(|stanza| stanza.is_presence() && stanza.from() == occupant && stanza.kind() == "unavailable")
}

/// The link goes, the room sees its far occupants leave, and goes on: it talks, one leaves, one comes, one takes a status, one of the far users
/// is banned. Far users talk, too. Then the link is back.
fn leave_and_return(name: &str, a: ServerSpec, b: ServerSpec) {
    let _company = in_company();
    let split = format!("split: {{ hold: {}s, near: hold, far: leave }}", HOLD.as_secs());
    let layout = Layout::Sidecar(held_pair().yaml("mirror", &split));
    let world = &world(name, Profile::lan(), unthrottled(a), unthrottled(b), 0, layout);
    let play = || -> Outcome {
        let stage = WorldStage::new(world);
        let room = format!("deck@{}", stage.rooms(Side::A));
        let nick = |user: &str| format!("{room}/{user}");
        let alice = sign_in(&stage, Side::A, "alice")?;
        make_room(&stage, &alice, &room)?;
        let adam = sign_in(&stage, Side::A, "adam")?;
        enter(&stage, &adam, &room)?;
        let far = ["b1", "b2", "b3"].map(|user| sign_in(&stage, Side::B, user));
        let far = far.into_iter().collect::<Outcome<Vec<Client>>>()?;
        for client in &far {
            enter(&stage, client, &room)?;
        }
        alice.groupchat(&room, "before")?;
        for client in &far {
            hears(client, "before")?;
        }
        world.link.down();
        for user in ["b1", "b2", "b3"] {
            let left = presence_of(
                &alice,
                &format!("that {user} has left"),
                &nick(user),
                "unavailable",
                HOLD + PATIENCE,
            )?;
            if left.has_status("333") || !left.raw.contains("<status>") {
                return Err(Failure(format!("not of its own will: {}", left.raw)));
            }
        }
        // Nothing waits for them: what is said now, they have to be told by the room later.
        for body in ["one", "two"] {
            alice.groupchat(&room, body)?;
            hears(&alice, body)?;
        }
        far[0].groupchat(&room, "and here")?;
        hears(&far[1], "and here")?;
        adam.leave(&room, "adam", "")?;
        presence_of(&alice, "that adam has left", &nick("adam"), "unavailable", PATIENCE)?;
        alice.groupchat(&room, "three")?;
        hears(&alice, "three")?;
        let ban = format!(
            "<query xmlns='{MUC_ADMIN}'><item affiliation='outcast' jid='{}'/></query>",
            far[2].bare()
        );
        let banned = alice.ask("set", &room, &ban, PATIENCE)?;
        if banned.kind() != "result" {
            return Err(Failure(format!("the ban: {}", banned.raw)));
        }

        world.link.up();
        let out = presence_of(&far[2], "that it is banned", &nick("b3"), "unavailable", PATIENCE)?;
        if !out.has_status("110") || !out.has_status("301") {
            return Err(Failure(format!("b3 is told: {}", out.raw)));
        }
        hears(&alice, "and here")?;
        for client in &far[..2] {
            for body in ["one", "two", "three"] {
                hears(client, body)?;
            }
            presence_of(client, "that adam is gone", &nick("adam"), "unavailable", PATIENCE)?;
        }
        // Both are in the room again before it goes on.
        for user in ["b1", "b2"] {
            presence_of(&alice, &format!("that {user} is back"), &nick(user), "", PATIENCE)?;
        }
        alice.groupchat(&room, "after")?;
        far[1].groupchat(&room, "the end")?;
        for client in [&alice, &far[0], &far[1]] {
            hears(client, "after")?;
            hears(client, "the end")?;
            sees(client, &room, &BTreeSet::from(["alice", "b1", "b2"].map(str::to_owned)))?;
        }
        // What came too much would be here by now.
        sleep(Duration::from_secs(1));
        for client in &far[..2] {
            let words: BTreeSet<String> = heard(client).into_iter().collect();
            if words.len() != heard(client).len() || words.len() != 7 {
                return Err(Failure(format!("{} heard {:?}", client.user(), heard(client))));
            }
            let from_ship = heard(client)
                .into_iter()
                .filter(|body| body != "and here" && body != "the end");
            if !from_ship.eq(["before", "one", "two", "three", "after"]) {
                return Err(Failure(format!("{} heard {:?}", client.user(), heard(client))));
            }
            if was_put_out(client) || saw_leave(client, &nick("b1")) || saw_leave(client, &nick("b2")) {
                return Err(Failure(format!("{} saw somebody leave", client.user())));
            }
            let pong = client.ask("get", &nick(client.user()), "<ping xmlns='urn:xmpp:ping'/>", PATIENCE)?;
            if pong.kind() != "result" {
                return Err(Failure(format!("a ping after the split: {}", pong.raw)));
            }
        }
        Ok(())
    };
    play().unwrap_or_else(|failure| panic!("{name}: {failure}"));
}

/// The room on Prosody, far users on ejabberd.
#[test]
fn leave_prosody_and_ejabberd() {
    leave_and_return("lpe", Prosody::stock(), Ejabberd::stock());
}

/// The room on ejabberd, far users on Prosody.
#[test]
fn leave_ejabberd_and_prosody() {
    leave_and_return("lep", Ejabberd::stock(), Prosody::stock());
}
