//! What XEP-0198 towards us does when we are killed: measured, not tested, because it takes minutes.
//!
//! ```text
//! cargo test --test e2e management -- --ignored --nocapture
//! ```
//!
//! Prosody hosts a room with five far occupants, near users speak thirty times a second, and the sidecar beside Prosody is killed in the
//! middle, twelve times in each arrangement. Prosody acknowledges what we send in every one of them; what differs is
//! whether we offer to acknowledge what *it* sends (`legs.management`), and whether someone holds our listening socket while we are dead.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use narrows_lab::{
    Ejabberd, Layout, Profile, Prosody, SidecarSpec, Vouched,
    client::{Client, Outcome},
    load::{heard, numbered},
    scenario::Dice,
};

use crate::{
    cast::{Cast, enter},
    faults::{seed, unthrottled},
    stage::stand_vouched,
};

const KILLS: usize = 12;
const PAUSE: Duration = Duration::from_millis(33);

#[derive(Debug, Default)]
struct Found {
    said: usize,
    /// Messages that an occupant did not hear though he stayed in the room.
    lost: usize,
    /// Messages that nobody heard who was put out.
    missed_outside: usize,
    expelled: usize,
}

fn measure(name: &str, spec: SidecarSpec) -> Found {
    let stand = stand_vouched(
        name,
        Profile::lan(),
        unthrottled(Prosody::stock()),
        unthrottled(Ejabberd::stock()),
        0,
        Layout::Sidecar(spec),
        // Prosody acknowledges, and asks for it, only where both ends have proven themselves by certificates.
        Vouched::ByLab,
    );
    let world = &stand.world;
    let run = || -> Outcome<Found> {
        let mut cast = Cast::gather(world, "measure")?;
        let mut dice = Dice::new(seed(7));
        let mut found = Found::default();
        for _ in 0..KILLS {
            let witness = heard(&cast.adam, "groupchat").len();
            let seen = cast.adam.received();
            let before: Vec<usize> = cast.far.iter().map(|client| client.received()).collect();
            let kill_after = 15 + dice.below(30);
            let mut again = None;
            for number in 0..75 {
                cast.say(0, "and so on, and so forth")?;
                sleep(PAUSE);
                if number == kill_after {
                    sleep(PAUSE * dice.below(100) as u32 / 100);
                    world.a.sidecar().kill9()?;
                    again = Some(Instant::now() + Duration::from_millis(200));
                }
                if again.is_some_and(|at| at <= Instant::now()) {
                    again = None;
                    world.a.sidecar().start_again()?;
                }
            }
            // The last word tells when what will come has come; who was put out will not hear it.
            let last = cast
                .say(0, "at last")
                .map(|()| Instant::now() + Duration::from_secs(20))?;
            let said = |cast: &Cast<'_>| heard(&cast.adam, "groupchat")[witness..].to_vec();
            // He who is put out is not always told: the way to him may be what is broken. Those who stay are.
            let put_out = |cast: &Cast<'_>, client: &Client| {
                let nick = format!("{}/{}", cast.room, client.user());
                let seen = cast.adam.transcript_from(seen);
                seen.iter()
                    .any(|stanza| stanza.is_presence() && stanza.kind() == "unavailable" && stanza.from() == nick)
            };
            let done = |cast: &Cast<'_>| {
                let word = said(cast).last().cloned();
                cast.far.iter().zip(&before).all(|(client, before)| {
                    let transcript = client.transcript_from(*before);
                    put_out(cast, client) || transcript.iter().rev().filter_map(numbered).next() == word
                })
            };
            while Instant::now() < last && !(said(&cast).len() >= 76 && done(&cast)) {
                sleep(Duration::from_millis(50));
            }
            let said = said(&cast);
            found.said += said.len();
            for (client, before) in cast.far.iter().zip(&before) {
                let transcript = client.transcript_from(*before);
                let got: Vec<_> = transcript.iter().filter_map(numbered).collect();
                let missing = said.iter().filter(|message| !got.contains(message)).count();
                if put_out(&cast, client) {
                    found.expelled += 1;
                    found.missed_outside += missing;
                    client.forget();
                    enter(&cast.stage, client, &cast.room)?;
                } else {
                    found.lost += missing;
                }
            }
        }
        Ok(found)
    };
    run().unwrap_or_else(|failure| panic!("{name}: {failure}"))
}

/// Prints the table for the configuration's documentation.
#[test]
#[ignore = "measures for minutes, and judges nothing: see the beginning of this file"]
fn management_under_kill() {
    let pair = || SidecarSpec::new(env!("CARGO_BIN_EXE_narrows"));
    let on = |spec: SidecarSpec| spec.yaml("legs", "management: on");
    println!("| arrangement | messages | kills | copies lost | occupants put out | copies that they missed |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for (name, what, spec) in [
        ("mna", "socket not held, `auto`", pair()),
        ("mno", "socket not held, `on`", on(pair())),
        ("mha", "socket held, `auto`", pair().held()),
        ("mho", "socket held, `on`", on(pair().held())),
    ] {
        let found = measure(name, spec);
        println!(
            "| {what} | {} | {KILLS} | {} | {} | {} |",
            found.said, found.lost, found.expelled, found.missed_outside
        );
    }
}
