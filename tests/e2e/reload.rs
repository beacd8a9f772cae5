//! A configuration that is read again while people talk.

use std::{
    fs,
    process::Output,
    time::{Duration, Instant},
};

use narrows_lab::{Ejabberd, Profile, Prosody, World, client::Outcome};

use crate::{
    cast::Cast,
    stage::{in_company, pair, world},
};

const PATIENCE: Duration = Duration::from_secs(60);

/// A key that is nobody's.
const NORTH: &str =
    "\n  - name: north\n    domains: [north.example]\n    public_key: AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=\n";

/// A rule that is added by a reload takes effect, peers come and go, a bad file changes nothing, and all the while nobody notices: no stream with
/// the servers and no link is closed, and no word is lost.
#[test]
fn a_reload_changes_rules_and_peers_and_closes_nothing() {
    let _company = in_company();
    let (a, b) = (Prosody::stock(), Ejabberd::stock());
    let world = world("reload", Profile::lan(), a, b, 0, pair());
    play(&world).unwrap_or_else(|error| panic!("{error}\n{}", world.a.sidecar().log_tail()));
}

fn play(world: &World) -> Outcome {
    let mut cast = Cast::gather(world, "reload")?;
    cast.settle(PATIENCE)?;
    let before = connections(world);
    let good = config(world);

    // Chat states stay here from now on.
    let rules = "queue:\n  rules:\n    - {name: states, match: {body: false}, strip: ['http://jabber.org/protocol/chatstates']}\n";
    let changed = good.replace("legs:\n", "legs:\n  lanes: 2\n") + "log: {level: debug}\n" + rules;
    let said = reload(world, &changed);
    assert_eq!(
        (said.status.code(), text(&said.stdout)),
        (
            Some(0),
            "in force: log.level, queue.rules\nneeds a restart: legs.lanes\n".to_owned()
        ),
        "{}",
        text(&said.stderr)
    );
    cast.alice.message(
        &cast.room,
        "groupchat",
        "<composing xmlns='http://jabber.org/protocol/chatstates'/>",
    )?;
    cast.adam
        .expect("that alice is typing, beside her", PATIENCE, |stanza| {
            stanza.raw.contains("composing")
        })?;
    cast.settle(PATIENCE)?;
    for client in &cast.far {
        client.expect_none("that alice is typing, over the link", |stanza| {
            stanza.raw.contains("composing")
        })?;
    }
    let counted = |wanted: f64| {
        // Metrics are told once a second.
        until("the rule has counted", || {
            let metrics = world.a.sidecar().metrics().expect("metrics are told");
            metrics.sum("narrows_rule_stanzas_total", &["rule=\"states\"", "mode=\"applied\""]) == wanted
        });
    };
    counted(5.0);

    // A bad file is said to be one, with the place, and the rule is still there.
    let said = reload(world, &changed.replace("rules:", "rulse:"));
    assert_eq!((said.status.code(), text(&said.stdout)), (Some(3), String::new()));
    assert!(
        text(&said.stderr).contains("queue.rulse: there is no such key")
            && text(&said.stderr).contains("nothing has changed"),
        "{}",
        text(&said.stderr)
    );
    cast.alice.message(
        &cast.room,
        "groupchat",
        "<paused xmlns='http://jabber.org/protocol/chatstates'/>",
    )?;
    cast.adam.expect("that alice has paused", PATIENCE, |stanza| {
        stanza.raw.contains("paused")
    })?;
    cast.settle(PATIENCE)?;
    counted(10.0);

    // A peer comes and goes; the other one stays.
    let peers = |text: &str| text.replacen("\npeers:\n", &format!("\npeers:{NORTH}"), 1);
    let said = reload(world, &peers(&changed));
    assert!(text(&said.stdout).contains("the peer north is added"), "{said:?}");
    cast.settle(PATIENCE)?;
    let status = || world.a.sidecar().http("/status").expect("the status is told").1;
    assert!(status().contains("\"north\""), "{}", status());
    assert!(world.a.sidecar().data_dir().join("north.sqlite").exists());

    fs::write(world.a.sidecar().config_path(), &good).expect("the file can be written");
    world.a.sidecar().signal(libc::SIGHUP).expect("it can be told");
    let gone = "What waited for it is still in its database";
    let log = || fs::read_to_string(world.a.sidecar().log_path()).unwrap_or_default();
    until("the peer has gone", || log().contains(gone));
    assert!(!status().contains("\"north\""), "{}", status());
    cast.alice.message(
        &cast.room,
        "groupchat",
        "<composing xmlns='http://jabber.org/protocol/chatstates'/>",
    )?;
    for client in &cast.far {
        client.expect("that alice is typing: there is no rule any more", PATIENCE, |stanza| {
            stanza.raw.contains("composing")
        })?;
    }
    cast.settle(PATIENCE)?;

    assert_eq!(connections(world), before);
    let outcomes = cast.outcomes();
    assert!(outcomes.is_orderly() && outcomes.lost() == 0, "{outcomes}");
    Ok(())
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// How often links came up, and how often they and streams with the server ended, at both sites.
fn connections(world: &World) -> Vec<f64> {
    [&world.a, &world.b]
        .into_iter()
        .flat_map(|site| {
            let metrics = site.sidecar().metrics().expect("metrics are told");
            [
                "narrows_link_connects_total",
                "narrows_link_closed_total",
                "narrows_leg_closed_total",
            ]
            .map(|name| metrics.sum(name, &[]))
        })
        .collect()
}

fn config(world: &World) -> String {
    fs::read_to_string(world.a.sidecar().config_path()).expect("the file can be read")
}

/// What `narrows reload` says at A after its file was changed.
fn reload(world: &World, config: &str) -> Output {
    let file = world.a.sidecar().config_path();
    let before = fs::read_to_string(&file).expect("the file can be read");
    assert_ne!(before, config);
    fs::write(&file, config).expect("the file can be written");
    let mut command = world
        .a
        .command(env!("CARGO_BIN_EXE_narrows"))
        .expect("a site has commands");
    command.args(["reload", "--admin", "127.0.0.1:9275"]);
    let output = command.output().expect("the binary was built for this test");
    fs::write(&file, before).expect("the file can be written");
    output
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
