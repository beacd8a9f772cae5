//! A link that is gone for longer than `mirror.split.hold`: who is beyond it is shown as gone or away, who is near talks on, and
//! when it is back everybody has everything and sees who is really there. Nobody ever has to enter again.
//!
//! The clocks are shortened: the split is declared after some seconds, not minutes.

use std::{
    collections::{BTreeMap, BTreeSet},
    thread::sleep,
    time::{Duration, Instant, SystemTime},
};

use narrows_lab::{
    Ejabberd, Layout, Profile, Prosody, ServerSpec, World,
    client::{Client, Failure, MUC_ADMIN, Outcome},
    load::heard,
    scenario::{FAR_USERS, Side, Stage, WorldStage},
};

use crate::{
    cast::{Cast, enter, make_room, sign_in},
    faults::{held_pair, kill_set_up, unthrottled},
    seen::{PATIENCE, heard_times, hears, presence_of, sees, was_put_out},
    stage::{in_company, world},
};

const HOLD: Duration = Duration::from_secs(4);

/// How exactly a stamp tells the time.
const STAMP_STEP: Duration = Duration::from_secs(1);

/// What happens to the sidecars while the link is gone.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Blow {
    None,
    /// Both are killed before the split is declared, and again when it is.
    Kills,
}

/// When a stanza was said, if it tells (XEP-0203).
fn stamp_of(stanza: &narrows_lab::client::Stanza) -> Option<SystemTime> {
    let stamp = stanza.element.child("urn:xmpp:delay", "delay")?.attr("stamp")?;
    humantime::parse_rfc3339(stamp).ok()
}

/// Kills both, one after the other.
fn kill_both(world: &World) -> Outcome {
    for site in [&world.a, &world.b] {
        kill_set_up(site)?;
        site.sidecar().start_again()?;
    }
    Ok(())
}

fn split_and_heal(name: &str, a: ServerSpec, b: ServerSpec, blow: Blow) {
    let _company = in_company();
    let hold = format!("split: {{ hold: {}s }}", HOLD.as_secs());
    let layout = Layout::Sidecar(held_pair().yaml("mirror", &hold));
    let world = &world(name, Profile::lan(), unthrottled(a), unthrottled(b), 0, layout);
    let play = || -> Outcome {
        let stage = WorldStage::new(world);
        let room = format!("deck@{}", stage.rooms(Side::A));
        let nick = |user: &str| format!("{room}/{user}");
        let alice = sign_in(&stage, Side::A, "alice")?;
        make_room(&stage, &alice, &room)?;
        let adam = sign_in(&stage, Side::A, "adam")?;
        enter(&stage, &adam, &room)?;
        let mut far = Vec::new();
        for user in FAR_USERS {
            let client = sign_in(&stage, Side::B, user)?;
            // The last stays outside for now.
            if user != "b5" {
                enter(&stage, &client, &room)?;
            }
            far.push(client);
        }
        let [b1, b2, b3, b4, b5] = &far[..] else {
            return Err(Failure("there are five".to_owned()));
        };
        alice.groupchat(&room, "before")?;
        for client in [b1, b2, b3, b4] {
            hears(client, "before")?;
        }
        world.link.down();
        if blow == Blow::Kills {
            kill_both(world)?;
        }

        // Those beside the ship talk on before anybody is told anything.
        b1.groupchat(&room, "anybody?")?;
        hears(b2, "anybody?")?;
        for client in [b1, b2, b3, b4] {
            presence_of(
                client,
                "that alice is gone",
                &nick("alice"),
                "unavailable",
                HOLD + PATIENCE,
            )?;
            let gone = presence_of(client, "that adam is gone", &nick("adam"), "unavailable", PATIENCE)?;
            if !gone.has_status("333") {
                return Err(Failure(format!("not because of the link: {}", gone.raw)));
            }
        }
        for user in ["b1", "b2", "b3", "b4"] {
            for client in [&alice, &adam] {
                client.expect(&format!("that {user} is away"), HOLD + PATIENCE, |stanza| {
                    stanza.is_presence() && stanza.from() == nick(user) && stanza.raw.contains("<show>away</show>")
                })?;
            }
        }
        // What was said so far is said; a stamp, which tells seconds, is to show that it was not after the kill.
        sleep(2 * STAMP_STEP);
        let said_before = SystemTime::now();
        if blow == Blow::Kills {
            kill_both(world)?;
        }

        b2.groupchat(&room, "we are alone")?;
        for client in [b1, b2, b3, b4] {
            hears(client, "we are alone")?;
        }
        alice.groupchat(&room, "so are we")?;
        hears(&adam, "so are we")?;
        b1.chat(&nick("b2"), "a whisper")?;
        hears(b2, "a whisper")?;
        let undecided = b1.ask("get", &nick("b1"), "<ping xmlns='urn:xmpp:ping'/>", PATIENCE)?;
        if undecided.error() != Some("remote-server-timeout") {
            return Err(Failure(format!("a ping during the split: {}", undecided.raw)));
        }
        b5.join(&room, "b5", None, Some(0))?;
        let refused = presence_of(b5, "the refusal of its join", &nick("b5"), "error", PATIENCE)?;
        if refused.error() != Some("remote-server-timeout") {
            return Err(Failure(format!("a join during the split: {}", refused.raw)));
        }
        // One leaves on each side, and one of the ship's is thrown out by the room, which the ship cannot know yet.
        b4.leave(&room, "b4", "")?;
        for client in [b1, b2, b3] {
            presence_of(client, "that b4 has left", &nick("b4"), "unavailable", PATIENCE)?;
        }
        adam.leave(&room, "adam", "")?;
        presence_of(&alice, "that adam has left", &nick("adam"), "unavailable", PATIENCE)?;
        let kick = format!("<query xmlns='{MUC_ADMIN}'><item nick='b3' role='none'/></query>");
        let kicked = alice.ask("set", &room, &kick, PATIENCE)?;
        if kicked.kind() != "result" {
            return Err(Failure(format!("the kick: {}", kicked.raw)));
        }

        world.link.up();
        for client in [b1, b2] {
            hears(client, "so are we")?;
            presence_of(client, "that alice is there after all", &nick("alice"), "", PATIENCE)?;
        }
        for body in ["anybody?", "we are alone"] {
            hears(&alice, body)?;
        }
        let out = presence_of(b3, "that it was thrown out", &nick("b3"), "unavailable", PATIENCE)?;
        if !out.has_status("307") {
            return Err(Failure(format!("b3 is told: {}", out.raw)));
        }
        enter(&stage, b5, &room)?;
        b1.groupchat(&room, "after")?;
        for client in [&alice, b1, b2, b5] {
            hears(client, "after")?;
        }
        let pong = b1.ask("get", &nick("b1"), "<ping xmlns='urn:xmpp:ping'/>", PATIENCE)?;
        if pong.kind() != "result" {
            return Err(Failure(format!("a ping after the split: {}", pong.raw)));
        }
        // What the room says of `b5` and of those who left has yet to come to all.
        let everybody = BTreeSet::from(["alice", "b1", "b2", "b5"].map(str::to_owned));
        for client in [&alice, b1, b2, b5] {
            sees(client, &room, &everybody)?;
        }
        for client in [&alice, b1, b2] {
            if was_put_out(client) {
                return Err(Failure(format!("{} was put out", client.user())));
            }
            for body in ["before", "anybody?", "we are alone", "so are we", "after"] {
                let times = heard_times(client, body);
                if times != 1 {
                    return Err(Failure(format!("{} heard {body:?} {times} times", client.user())));
                }
            }
        }
        // What a client without the pair would have told: when it was really said.
        let late = alice
            .transcript()
            .into_iter()
            .find(|stanza| stanza.body().as_deref() == Some("anybody?"));
        let stamp = late.as_ref().and_then(stamp_of);
        // The process to which it was said may have been killed since.
        if stamp.is_none_or(|stamp| stamp + STAMP_STEP > said_before) {
            return Err(Failure(format!("what waited does not tell since when: {late:?}")));
        }
        Ok(())
    };
    play().unwrap_or_else(|failure| panic!("{name}: {failure}"));
}

/// A link that comes and goes, each time for less than `split.hold`, while both sides talk: everybody has everything once and in order, and
/// nobody sees anybody leave or become away.
fn flapping(name: &str, a: ServerSpec, b: ServerSpec) {
    const FLAPS: usize = 6;
    const DOWN: Duration = Duration::from_secs(5);
    const UP: Duration = Duration::from_secs(3);
    let _company = in_company();
    // Found down soon, and up again soon: otherwise most of the flaps would pass unnoticed.
    let link = ["ack_delay: 500ms", "quiet_after: 1s", "dead_after: 2s"];
    let pair = held_pair().yaml("mirror", "split: { hold: 30s }");
    let layout = Layout::Sidecar(link.into_iter().fold(pair, |pair, line| pair.yaml("link", line)));
    let world = &world(name, Profile::lan(), unthrottled(a), unthrottled(b), 0, layout);
    let play = || -> Outcome {
        let mut cast = Cast::gather(world, "flaps")?;
        let mut seen_down = 0;
        for _ in 0..FLAPS {
            for (up, lasts) in [(false, DOWN), (true, UP)] {
                match up {
                    true => world.link.up(),
                    false => world.link.down(),
                }
                let since = Instant::now();
                while since.elapsed() < lasts {
                    for speaker in 0..5 {
                        cast.say(speaker, "")?;
                    }
                    sleep(Duration::from_millis(500));
                }
                let is_up = world.b.sidecar().metrics()?.sum("narrows_link_up", &[]) == 1.0;
                seen_down += usize::from(!up && !is_up);
            }
        }
        cast.settle(Duration::from_secs(60))?;
        let outcomes = cast.outcomes();
        println!("{name}: the link was seen down {seen_down} times\n{outcomes}");
        // Near users hear each other before the room has heard them (`echo: auto`): what is late for that is in order of its sender.
        let bad = outcomes.lost() + outcomes.returned + outcomes.room.doubled + outcomes.talk_doubled;
        if bad > 0 || !outcomes.expelled.is_empty() || seen_down < FLAPS / 2 {
            return Err(Failure(outcomes.to_string()));
        }
        for client in cast.far.iter().chain([&cast.alice, &cast.adam]) {
            let mut last = BTreeMap::new();
            for (sender, number) in heard(client, "groupchat") {
                if last.insert(sender.clone(), number).is_some_and(|last| last >= number) {
                    return Err(Failure(format!("{} heard {number} of {sender} late", client.user())));
                }
            }
            let shown = |stanza: &&narrows_lab::client::Stanza| {
                stanza.is_presence() && (stanza.kind() == "unavailable" || stanza.raw.contains("<show>away</show>"))
            };
            if let Some(presence) = client.transcript().iter().find(shown) {
                return Err(Failure(format!("{} is shown {}", client.user(), presence.raw)));
            }
        }
        let splits = |site: &narrows_lab::Site| {
            Ok::<_, Failure>(site.sidecar().metrics()?.sum("narrows_mirror_splits_total", &[]))
        };
        match splits(&world.a)? + splits(&world.b)? {
            0.0 => Ok(()),
            splits => Err(Failure(format!("{splits} splits were declared"))),
        }
    };
    play().unwrap_or_else(|failure| panic!("{name}: {failure}"));
}

/// The room on Prosody, its far users on ejabberd.
#[test]
fn flapping_prosody_and_ejabberd() {
    flapping("fpe", Prosody::stock(), Ejabberd::stock());
}

/// The room on ejabberd, its far users on Prosody.
#[test]
fn flapping_ejabberd_and_prosody() {
    flapping("fep", Ejabberd::stock(), Prosody::stock());
}

/// `split.join: provisional`: users enter the room while it is out of reach, one under a nick that is taken there meanwhile. They talk; when the
/// link is back, the one is inside and what it said is heard, and the other is told that it is out.
fn entering_while_away(name: &str, a: ServerSpec, b: ServerSpec) {
    let _company = in_company();
    let split = format!("split: {{ hold: {}s, join: provisional }}", HOLD.as_secs());
    let layout = Layout::Sidecar(held_pair().yaml("mirror", &split));
    let world = &world(name, Profile::lan(), unthrottled(a), unthrottled(b), 0, layout);
    let play = || -> Outcome {
        let stage = WorldStage::new(world);
        let room = format!("deck@{}", stage.rooms(Side::A));
        let nick = |nick: &str| format!("{room}/{nick}");
        let alice = sign_in(&stage, Side::A, "alice")?;
        make_room(&stage, &alice, &room)?;
        let adam = sign_in(&stage, Side::A, "adam")?;
        let far = ["b1", "b2", "b3"].map(|user| sign_in(&stage, Side::B, user));
        let far = far.into_iter().collect::<Outcome<Vec<Client>>>()?;
        let [b1, b2, b3] = &far[..] else {
            return Err(Failure("there are three".to_owned()));
        };
        enter(&stage, b1, &room)?;
        let info = b1.ask(
            "get",
            &room,
            "<query xmlns='http://jabber.org/protocol/disco#info'/>",
            PATIENCE,
        )?;
        if !info.raw.contains("muc_open") {
            return Err(Failure(format!("the room is not open: {}", info.raw)));
        }
        world.link.down();
        // A link on which nothing waits is found to be down later.
        b1.groupchat(&room, "anybody?")?;
        presence_of(b1, "that alice is gone", &nick("alice"), "unavailable", HOLD + PATIENCE)?;
        enter(&stage, b2, &room)?;
        b3.join(&room, "jack", None, Some(0))?;
        presence_of(b3, "that it is in", &nick("jack"), "", PATIENCE)?;
        presence_of(b1, "that b2 is there", &nick("b2"), "", PATIENCE)?;
        b2.groupchat(&room, "from b2")?;
        b3.groupchat(&room, "from b3")?;
        for client in [b1, b2, b3] {
            hears(client, "from b2")?;
            hears(client, "from b3")?;
        }
        adam.join(&room, "jack", None, Some(0))?;
        presence_of(&adam, "that it is in", &nick("jack"), "", PATIENCE)?;

        world.link.up();
        hears(&alice, "from b2")?;
        let out = presence_of(b3, "that it is out", &nick("jack"), "unavailable", PATIENCE)?;
        if !(out.has_status("110") && out.has_status("333")) {
            return Err(Failure(format!("b3 is told: {}", out.raw)));
        }
        presence_of(b3, "why", &nick("jack"), "error", PATIENCE)?;
        alice.groupchat(&room, "welcome")?;
        for client in [b1, b2, &adam] {
            hears(client, "welcome")?;
        }
        let everybody = BTreeSet::from(["alice", "b1", "b2", "jack"].map(str::to_owned));
        for client in [&alice, &adam, b1, b2] {
            sees(client, &room, &everybody)?;
        }
        for (client, body, times) in [
            (b1, "from b2", 1),
            (b2, "from b2", 1),
            (&alice, "from b2", 1),
            (&alice, "from b3", 0),
        ] {
            let heard = heard_times(client, body);
            if heard != times {
                return Err(Failure(format!("{} heard {body:?} {heard} times", client.user())));
            }
        }
        Ok(())
    };
    play().unwrap_or_else(|failure| panic!("{name}: {failure}"));
}

/// The room on Prosody.
#[test]
fn entering_while_away_prosody_and_ejabberd() {
    entering_while_away("jpe", Prosody::stock(), Ejabberd::stock());
}

/// The room on ejabberd.
#[test]
fn entering_while_away_ejabberd_and_prosody() {
    entering_while_away("jep", Ejabberd::stock(), Prosody::stock());
}

/// The room on Prosody, its far users on ejabberd.
#[test]
fn split_prosody_and_ejabberd() {
    split_and_heal("mpe", Prosody::stock(), Ejabberd::stock(), Blow::None);
}

/// The room on ejabberd, its far users on Prosody.
#[test]
fn split_ejabberd_and_prosody() {
    split_and_heal("mep", Ejabberd::stock(), Prosody::stock(), Blow::None);
}

/// Both sidecars are killed while the link is gone, before and after the split is declared.
#[test]
fn split_with_kills_prosody_and_ejabberd() {
    split_and_heal("mpk", Prosody::stock(), Ejabberd::stock(), Blow::Kills);
}

/// The same with the room on ejabberd.
#[test]
fn split_with_kills_ejabberd_and_prosody() {
    split_and_heal("mek", Ejabberd::stock(), Prosody::stock(), Blow::Kills);
}
