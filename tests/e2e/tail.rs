//! What a room said while nobody took it in is found in its history, and sent on.

use std::{thread::sleep, time::Duration};

use narrows_lab::{
    Ejabberd, Layout, Profile, Prosody, ServerSpec,
    client::{Client, Failure, Outcome},
    load::is_expulsion,
    scenario::{Side, Stage, WorldStage},
};

use crate::{
    cast::{enter, make_room, sign_in},
    faults::{held_pair, unthrottled},
    stage::{in_company, world},
};

const PATIENCE: Duration = Duration::from_secs(30);

/// What a client heard in the room, in its order.
fn heard(client: &Client) -> Vec<String> {
    let transcript = client.transcript().into_iter();
    transcript
        .filter(|stanza| stanza.kind() == "groupchat")
        .filter_map(|stanza| stanza.body())
        .collect()
}

/// The sidecar beside the room stands still, the room speaks on, and the sidecar is killed: what it had been sent lies in its sockets and is
/// gone. All of it comes all the same, once and in order, and before what is said next.
fn words_are_found(name: &str, a: ServerSpec, b: ServerSpec) {
    const STOP: i32 = 19;
    let _company = in_company();
    let layout = Layout::Sidecar(held_pair());
    let world = &world(name, Profile::lan(), unthrottled(a), unthrottled(b), 0, layout);
    let play = || -> Outcome {
        let stage = WorldStage::new(world);
        let room = format!("deck@{}", stage.rooms(Side::A));
        let alice = sign_in(&stage, Side::A, "alice")?;
        make_room(&stage, &alice, &room)?;
        let far = ["b1", "b2", "b3"].map(|user| sign_in(&stage, Side::B, user));
        let far = far.into_iter().collect::<Outcome<Vec<Client>>>()?;
        for client in &far {
            enter(&stage, client, &room)?;
        }
        let hears = |client: &Client, body: &str| {
            let what = format!("{body:?}, for {}", client.user());
            client
                .expect(&what, PATIENCE, |stanza| stanza.body().as_deref() == Some(body))
                .map(drop)
        };
        alice.groupchat(&room, "one")?;
        for client in &far {
            hears(client, "one")?;
        }
        world.a.sidecar().signal(STOP)?;
        for word in ["two", "three"] {
            alice.groupchat(&room, word)?;
            hears(&alice, word)?;
        }
        // The room has said it. What its server had not written by now, it would write to the next process, and nothing would be found.
        sleep(Duration::from_millis(500));
        world.a.sidecar().kill9()?;
        world.a.sidecar().start_again()?;
        alice.groupchat(&room, "four")?;
        for client in &far {
            hears(client, "four")?;
        }
        // Both ways, and whatever is still on its way comes before it.
        far[0].groupchat(&room, "five")?;
        hears(&alice, "five")?;
        for client in &far {
            hears(client, "five")?;
            let words = heard(client);
            if words != ["one", "two", "three", "four", "five"] {
                return Err(Failure(format!("{} heard {words:?}", client.user())));
            }
            if let Some(out) = client.transcript().iter().find(|stanza| is_expulsion(stanza)) {
                return Err(Failure(format!("{} is out: {}", client.user(), out.raw)));
            }
        }
        let found = world.a.sidecar().metrics()?.sum("narrows_mirror_found_total", &[]);
        if found != 2.0 {
            return Err(Failure(format!("{found} were found")));
        }
        Ok(())
    };
    play().unwrap_or_else(|failure| panic!("{name}: {failure}"));
}

/// The room on Prosody, far users on ejabberd.
#[test]
fn words_are_found_prosody_and_ejabberd() {
    words_are_found("tpe", Prosody::stock(), Ejabberd::stock());
}

/// The room on ejabberd, far users on Prosody.
#[test]
fn words_are_found_ejabberd_and_prosody() {
    words_are_found("tep", Ejabberd::stock(), Prosody::stock());
}

/// Rooms that keep an archive stamp their messages, also those of the history.
#[test]
fn words_are_found_in_rooms_with_an_archive() {
    words_are_found("tpm", Prosody::stock().mam(), Ejabberd::stock());
    words_are_found("tem", Ejabberd::stock().mam(), Prosody::stock());
}
