//! What a room said while nobody took it in is found in its history, and sent on.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use narrows_lab::{
    Ejabberd, Layout, Profile, Prosody, ServerSpec, Sidecar,
    client::{Client, Failure, MUC_ADMIN, Outcome},
    load::is_expulsion,
    scenario::{Side, Stage, WorldStage},
};

use crate::{
    cast::{make_room, sign_in},
    faults::{held_pair, unthrottled},
    seen::heard,
    stage::{in_company, world},
};

const PATIENCE: Duration = Duration::from_secs(30);

/// No copy of a room's word is shorter, and it is encrypted.
const COPY_BYTES_MIN: u64 = 150;

/// What lies in the sockets of a sidecar that stands still.
fn unread_bytes(sidecar: &Sidecar) -> u64 {
    let pid = sidecar.pid().expect("it was started");
    let tables = ["tcp", "tcp6"].map(|name| format!("/proc/{pid}/net/{name}"));
    let tables = tables.map(|path| std::fs::read_to_string(path).unwrap_or_default());
    let sockets = tables.iter().flat_map(|table| table.lines().skip(1));
    // proc_pid_net(5): "tx_queue:rx_queue" is the fifth.
    let unread = sockets.filter_map(|socket| {
        socket
            .split_whitespace()
            .nth(4)?
            .split_once(':')
            .map(|(_, unread)| unread)
    });
    unread.filter_map(|unread| u64::from_str_radix(unread, 16).ok()).sum()
}

/// The sidecar beside the room stands still, the room speaks on, and the sidecar is killed: what it had been sent lies in its sockets and is
/// gone. All of it comes all the same, once and in order, and before what is said next.
fn words_are_found(name: &str, a: ServerSpec, b: ServerSpec, form: &str, password: Option<&str>) {
    const STOP: i32 = 19;
    let _company = in_company();
    let layout = Layout::Sidecar(held_pair());
    let world = &world(name, Profile::lan(), unthrottled(a), unthrottled(b), 0, layout);
    let play = || -> Outcome {
        let stage = WorldStage::new(world);
        let room = format!("deck@{}", stage.rooms(Side::A));
        let alice = sign_in(&stage, Side::A, "alice")?;
        make_room(&stage, &alice, &room)?;
        let form = format!(
            "<query xmlns='http://jabber.org/protocol/muc#owner'><x xmlns='jabber:x:data' type='submit'>\
             <field var='FORM_TYPE'><value>http://jabber.org/protocol/muc#roomconfig</value></field>{form}</x></query>"
        );
        alice.ask("set", &room, &form, PATIENCE)?;
        let far = ["b1", "b2", "b3"].map(|user| sign_in(&stage, Side::B, user));
        let far = far.into_iter().collect::<Outcome<Vec<Client>>>()?;
        for client in &far {
            let member = format!(
                "<query xmlns='{MUC_ADMIN}'><item affiliation='member' jid='{}'/></query>",
                client.bare()
            );
            alice.ask("set", &room, &member, PATIENCE)?;
            client.join(&room, client.user(), password, Some(0))?;
            client.expect("that it is in", PATIENCE, |stanza| {
                stanza.from() == format!("{room}/{}", client.user()) && stanza.has_status("110")
            })?;
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
        let waited_before = unread_bytes(world.a.sidecar());
        for word in ["two", "three"] {
            alice.groupchat(&room, word)?;
            hears(&alice, word)?;
        }
        // The room has said it. What its server has not written by then, it writes to the next process, and nothing is found.
        let written = far.len() as u64 * 2 * COPY_BYTES_MIN;
        let begun = Instant::now();
        while unread_bytes(world.a.sidecar()) < waited_before + written {
            if begun.elapsed() > PATIENCE {
                return Err(Failure("the server writes nothing".to_owned()));
            }
            sleep(Duration::from_millis(20));
        }
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
            if let Some(error) = client.transcript().iter().find(|stanza| stanza.kind() == "error") {
                return Err(Failure(format!("{} is told: {}", client.user(), error.raw)));
            }
        }
        let found = world.a.sidecar().metrics()?.sum("narrows_mirror_found_total", &[]);
        // And copies of the third that went to the process that was killed.
        if ![2.0, 3.0].contains(&found) {
            return Err(Failure(format!("{found} were found")));
        }
        Ok(())
    };
    play().unwrap_or_else(|failure| panic!("{name}: {failure}"));
}

/// The room on Prosody, far users on ejabberd.
#[test]
fn words_are_found_prosody_and_ejabberd() {
    words_are_found("tpe", Prosody::stock(), Ejabberd::stock(), "", None);
}

/// The room on ejabberd, far users on Prosody.
#[test]
fn words_are_found_ejabberd_and_prosody() {
    words_are_found("tep", Ejabberd::stock(), Prosody::stock(), "", None);
}

/// Rooms that keep an archive stamp their messages, also those of the history.
#[test]
fn words_are_found_in_rooms_with_an_archive() {
    words_are_found("tpm", Prosody::stock().mam(), Ejabberd::stock(), "", None);
    words_are_found("tem", Ejabberd::stock().mam(), Prosody::stock(), "", None);
}

/// A room for members who know the password lets those who are inside enter again without it.
#[test]
fn words_are_found_in_closed_rooms() {
    let form = "<field var='muc#roomconfig_membersonly'><value>1</value></field>\
                <field var='muc#roomconfig_moderatedroom'><value>1</value></field>\
                <field var='muc#roomconfig_passwordprotectedroom'><value>1</value></field>\
                <field var='muc#roomconfig_roomsecret'><value>sesame</value></field>";
    words_are_found("tpc", Prosody::stock(), Ejabberd::stock(), form, Some("sesame"));
    words_are_found("tec", Ejabberd::stock(), Prosody::stock(), form, Some("sesame"));
}
