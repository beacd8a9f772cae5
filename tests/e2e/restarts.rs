//! Servers that restart in good order while the other side writes to their users.
//!
//! A server that stops loses its users' sessions and, if it is ejabberd, the occupants of its rooms: that is its own doing. What is for
//! its users meanwhile waits with us, and is stored for them when the server is back.

use std::{
    collections::BTreeMap,
    io,
    panic::resume_unwind,
    sync::atomic::{AtomicUsize, Ordering},
    thread::{self, sleep},
    time::{Duration, Instant},
};

use narrows_lab::{
    Ejabberd, Layout, Profile, Prosody, ServerSpec,
    client::{Client, Failure, Outcome},
    load::{Fate, heard, tell},
    scenario::{Side, Stage, WorldStage},
};

use crate::{
    cast::{enter, make_room, sign_in},
    faults::{held_pair, unthrottled},
    stage::{in_company, world},
};

/// ejabberd as shipped stores a hundred messages for one user.
const MESSAGES: usize = 80;

/// So that the sending goes on for longer than a restart takes.
const PAUSE: Duration = Duration::from_millis(120);

/// The server is asked to stop when so many are sent.
const RESTART_AT: usize = 15;

/// When a room was asked for the first time, in any case.
const ASKED_BY: Duration = Duration::from_secs(10);

/// Waits until all that a client has sent to a domain is there, and what that domain has sent to it before is here.
fn wait_through(stage: &WorldStage<'_>, client: &Client, domain: &str) -> Outcome {
    let ping = client.sync(domain)?;
    client.synced(&ping, stage.patience()).map(drop)
}

/// A user is written to while his server restarts: he has everything once and in order, and his rooms work when he has come back.
fn restart(name: &str, a: ServerSpec, b: ServerSpec) {
    let _company = in_company();
    let world = &world(
        name,
        Profile::lan(),
        unthrottled(a),
        unthrottled(b),
        0,
        Layout::Sidecar(held_pair()),
    );
    let stage = WorldStage::new(world);
    let room = format!("deck@{}", stage.rooms(Side::A));
    for (side, site, writer, reader) in [(Side::B, &world.b, "alice", "b1"), (Side::A, &world.a, "b2", "adam")] {
        let play = || -> Outcome<(Fate, usize)> {
            let from = sign_in(&stage, side.other(), writer)?;
            let to = sign_in(&stage, side, reader)?;
            let address = to.bare().to_owned();
            wait_through(&stage, &to, &stage.domain(side))?;
            for number in 1..=RESTART_AT {
                tell(&from, &address, number, "")?;
                sleep(PAUSE);
            }
            wait_through(&stage, &from, &stage.domain(side))?;
            let told = AtomicUsize::new(RESTART_AT);
            let told_stopping = thread::scope(|scope| -> Outcome<usize> {
                let restarting = scope.spawn(|| -> io::Result<usize> {
                    site.server().stop()?;
                    let told_stopping = told.load(Ordering::Relaxed);
                    site.server().start_again()?;
                    Ok(told_stopping)
                });
                for number in RESTART_AT + 1..=MESSAGES {
                    told.store(number, Ordering::Relaxed);
                    tell(&from, &address, number, "")?;
                    sleep(PAUSE);
                }
                Ok(restarting.join().unwrap_or_else(|panic| resume_unwind(panic))?)
            })?;
            let mut had = heard(&to, "chat");
            to.cut();
            // Both servers of our kind keep order among what is stored and among what is live, but ejabberd lets the live overtake the
            // stored: a session can be reached before what is stored for it is handed out. So nothing is under way while the reader
            // comes back, and nothing is said before he has what was stored. A server answers a ping after what came before it.
            wait_through(&stage, &from, &stage.domain(side))?;
            let again = sign_in(&stage, side, reader)?;
            wait_through(&stage, &again, &stage.domain(side))?;
            tell(&from, &address, MESSAGES + 1, "")?;
            again.expect("the last word", stage.patience(), |stanza| {
                narrows_lab::load::numbered(stanza).is_some_and(|(_, number)| number == MESSAGES + 1)
            })?;
            had.extend(heard(&again, "chat"));
            let sent = BTreeMap::from([(writer.to_owned(), MESSAGES + 1)]);

            // Who has lost his session, or his room, enters again; then both sides hear each other.
            let near = sign_in(&stage, Side::A, "alice")?;
            let far = sign_in(&stage, Side::B, "b3")?;
            make_room(&stage, &near, &room)?;
            enter(&stage, &far, &room)?;
            for client in [&near, &far] {
                client.groupchat(&room, &format!("{} is here", client.user()))?;
            }
            for (client, other) in [(&near, &far), (&far, &near)] {
                let word = format!("{} is here", other.user());
                client.expect(&word, stage.patience(), |stanza| {
                    stanza.body().as_deref() == Some(&word)
                })?;
            }
            Ok((Fate::of(&sent, &had, &[]), told_stopping))
        };
        let (fate, told_stopping) = play().unwrap_or_else(|failure| panic!("{name}: {failure}"));
        let told = format!("{name}: {:?} restarted: {fate}", site.server().kind());
        println!("{told}");
        // What a server has read and not delivered when it stops is its own to lose, and all that reached it before has been delivered.
        let is_its_own = |(_, number): &(String, usize)| (RESTART_AT + 1..=told_stopping).contains(number);
        assert!(
            fate.doubled + fate.late == 0 && fate.not_entered.iter().all(is_its_own),
            "{told}\nand all but what was told until {told_stopping} is ours to keep"
        );
    }
}

/// The room on Prosody, far users on ejabberd; each restarts.
#[test]
fn restart_prosody_and_ejabberd() {
    restart("rpe", Prosody::stock(), Ejabberd::stock());
}

/// The room on ejabberd, far users on Prosody; each restarts.
#[test]
fn restart_ejabberd_and_prosody() {
    restart("rep", Ejabberd::stock(), Prosody::stock());
}

/// The room's server dies and comes back, and says nothing to those who are out of its rooms now: they are told, enter again, and all
/// hear each other. Nobody says anything meanwhile, so it is for narrows to notice.
fn room_server_dies(name: &str, a: ServerSpec, b: ServerSpec) {
    let _company = in_company();
    let world = &world(
        name,
        Profile::lan(),
        unthrottled(a),
        unthrottled(b),
        0,
        Layout::Sidecar(held_pair()),
    );
    let stage = WorldStage::new(world);
    let room = format!("deck@{}", stage.rooms(Side::A));
    let play = || -> Outcome {
        let alice = sign_in(&stage, Side::A, "alice")?;
        make_room(&stage, &alice, &room)?;
        let far = ["b1", "b2"].map(|user| sign_in(&stage, Side::B, user));
        let far = far.into_iter().collect::<Outcome<Vec<Client>>>()?;
        for client in &far {
            enter(&stage, client, &room)?;
        }
        // narrows asks the room five seconds after its streams have come about. That is not the question that is to be seen.
        sleep(ASKED_BY);
        world.a.server().kill9()?;
        let died = Instant::now();
        world.a.server().start_again()?;
        let back = Instant::now();
        for client in &far {
            let own = format!("{room}/{}", client.user());
            let told = client.expect("that it is out", stage.patience(), |stanza| {
                stanza.is_presence() && stanza.kind() == "unavailable" && stanza.from() == own
            })?;
            if !(told.has_status("110") && told.has_status("333")) {
                return Err(Failure(format!("not as one who was lost: {}", told.raw)));
            }
        }
        println!(
            "{name}: told {:.1} s after the server was back, which took {:.1} s",
            back.elapsed().as_secs_f64(),
            (back - died).as_secs_f64()
        );
        let again = sign_in(&stage, Side::A, "alice")?;
        enter(&stage, &again, &room)?;
        for client in &far {
            enter(&stage, client, &room)?;
        }
        again.groupchat(&room, "here again")?;
        for client in &far {
            client.expect("what alice says", stage.patience(), |stanza| {
                stanza.body().as_deref() == Some("here again")
            })?;
        }
        Ok(())
    };
    play().unwrap_or_else(|failure| panic!("{name}: {failure}"));
}

/// Prosody keeps a room's occupants when it stops in order, and not when it is killed.
#[test]
fn room_server_dies_prosody_and_ejabberd() {
    room_server_dies("dpe", Prosody::stock(), Ejabberd::stock());
}

/// ejabberd keeps the room.
#[test]
fn room_server_dies_ejabberd_and_prosody() {
    room_server_dies("dep", Ejabberd::stock(), Prosody::stock());
}
