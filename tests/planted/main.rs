//! Ten bugs, one line each, that the simulator must find.
//!
//! A check that never fails may check nothing. So the sources are copied to `target/planted`, and ten lines of the copy are changed such
//! that one build holds all ten bugs; `PLANTED=name` switches one on when it runs. Each must make a simulated world fail, and name its
//! seed; with none switched on, the same worlds must hold.
//!
//! On 2026-12-01 the first seeds that found them were, in the order below: 28, 12, 16, 16, 16, 2, 2, 1, 0 and 0.
//!
//! `cargo test --test planted` sees that every pattern still stands in the code exactly once. The copy takes a build of its own, a minute
//! or two, and its run some more: `cargo test --test planted -- --ignored --nocapture`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

struct Planted {
    name: &'static str,
    /// What it breaks (DESIGN §2 and §7).
    promise: &'static str,
    file: &'static str,
    /// Stands there exactly once, as one line or part of one.
    line: &'static str,
    /// Stands there instead; `PLANTED` is whether it is switched on.
    instead: &'static str,
    /// The worlds that are to find it, and within how many seeds.
    worlds: &'static str,
    seeds: u32,
}

const ALL: [Planted; 10] = [
    Planted {
        name: "reflections-are-repeated",
        promise: "P3: what was heard near by is heard again from the room",
        file: "src/mirror/far.rs",
        line: "let seen = room.echo_seen(number, addresses.iter());",
        instead: "let seen = if PLANTED { Withheld::new() } else { room.echo_seen(number, addresses.iter()) };",
        worlds: "muc::rooms_over_a_bad_link",
        seeds: 100,
    },
    Planted {
        name: "echoes-are-not-written",
        promise: "P3: a killed process forgets what it has shown",
        file: "src/mirror/mod.rs",
        line: ".and_then(|room| room.echoes.get(&number))",
        instead: ".and_then(|room| room.echoes.get(&number)).filter(|_| !PLANTED)",
        worlds: "muc::rooms_between_killed_sidecars",
        seeds: 100,
    },
    Planted {
        name: "nobody-comes-back",
        promise: "rosters agree once quiet: who was shown as gone stays gone after the split",
        file: "src/mirror/mod.rs",
        line: "let beyond = room.occupants.iter().filter(|(nick, _)| split.hidden.contains(*nick));",
        instead: "let beyond = room.occupants.iter().filter(|(nick, _)| !PLANTED && split.hidden.contains(*nick));",
        worlds: "muc::rooms_over_a_bad_link",
        seeds: 20,
    },
    Planted {
        name: "leaves-are-withheld",
        promise: "nobody is shown who is not there: who left while what waited came is still shown",
        file: "src/mirror/room.rs",
        line: "!self.is_ours(nick) && !is_shown()",
        instead: "!self.is_ours(nick) && (PLANTED || !is_shown())",
        worlds: "muc::rooms_over_a_bad_link",
        seeds: 200,
    },
    Planted {
        name: "guests-stay-away",
        promise: "after the split a room's guests are themselves again",
        file: "src/mirror/primary.rs",
        line: "std::mem::take(&mut guest.away).then(|| guest.presence.clone())",
        instead: "(std::mem::take(&mut guest.away) && !PLANTED).then(|| guest.presence.clone())",
        worlds: "muc::rooms_over_a_bad_link",
        seeds: 20,
    },
    Planted {
        name: "a-later-group-is-overtaken",
        promise: "P4: a recipient joins a group that was opened before one that it stands in",
        file: "src/queue/collapse.rs",
        line: "latest.is_none_or(|&latest| latest < seq)",
        instead: "(PLANTED || latest.is_none_or(|&latest| latest < seq))",
        worlds: "muc::rooms_in_a_quiet_world",
        seeds: 20,
    },
    Planted {
        name: "half-a-room-is-all-of-it",
        promise: "P2: a broadcast that reached half of a room is sent, and the rest is another cast",
        file: "src/queue/collapse.rs",
        line: "let complete = reached >= sessions.len()",
        instead: "let complete = PLANTED && 2 * reached >= sessions.len() || reached >= sessions.len()",
        worlds: "muc::rooms_in_a_quiet_world",
        seeds: 20,
    },
    Planted {
        name: "sent-before-it-is-on-disk",
        promise: "P3: the peer has what a killed process will say again, under the same number",
        file: "src/queue/scheduler.rs",
        line: "if *batch > committed {",
        instead: "if *batch > committed && !PLANTED {",
        worlds: "few_words",
        seeds: 20,
    },
    Planted {
        name: "acked-before-it-is-on-disk",
        promise: "P3: the peer lets go of what a killed process then has not",
        file: "src/link/session.rs",
        line: "upto: self.stored.upto,",
        instead: "upto: if PLANTED { self.arrived.upto } else { self.stored.upto },",
        worlds: "killed_processes",
        seeds: 20,
    },
    Planted {
        name: "another-life-of-a-store-is-the-same",
        promise: "P3: after a disk was replaced, what has its new numbers is taken for what came before",
        file: "src/link/session.rs",
        line: "if received.epoch != sender.epoch {",
        instead: "if received.epoch != sender.epoch && !PLANTED {",
        worlds: "replaced_disks",
        seeds: 20,
    },
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The text with this bug in it, switched off unless it is named.
fn plant(text: &str, bug: &Planted) -> String {
    let count = text.matches(bug.line).count();
    let (name, file) = (bug.name, bug.file);
    assert_eq!(
        count, 1,
        "{name}: {file} has this line {count} times, and must have it once: {}",
        bug.line
    );
    let instead = bug.instead.replace("PLANTED", &format!("crate::planted({name:?})"));
    text.replace(bug.line, &instead)
}

/// Copies a file or directory, with the bugs that are to be in it.
fn copy(what: &Path, to: &Path) {
    let from = root().join(what);
    if from.is_file() {
        let bugs = ALL.iter().filter(|bug| what == Path::new(bug.file));
        return write(&to.join(what), &bugs.fold(read(&from), |text, bug| plant(&text, bug)));
    }
    fs::create_dir_all(to.join(what)).expect("a directory in target");
    for entry in fs::read_dir(from).expect("the sources") {
        copy(&what.join(entry.expect("the sources").file_name()), to);
    }
}

/// What has not changed is not touched, so that it is not built again.
fn write(path: &Path, text: &str) {
    if fs::read_to_string(path).ok().as_deref() != Some(text) {
        fs::write(path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

/// Only what the simulator needs: the pure floors, and what they need. Built with some care for speed, since it runs for thousands of seeds.
fn manifest() -> String {
    let text = read(&root().join("Cargo.toml"));
    let (_, rest) = text
        .split_once("[dependencies]\n")
        .expect("the manifest has dependencies");
    let pure: Vec<&str> = rest.lines().take_while(|line| !line.is_empty()).collect();
    format!(
        "[package]\nname = \"narrows\"\nversion = \"0.1.0\"\nedition = \"2024\"\n[workspace]\n[features]\nruntime = []\n\
         [[test]]\nname = \"sim\"\npath = \"tests/sim/main.rs\"\n[profile.dev]\nopt-level = 1\ndebug = false\n[dependencies]\n{}\n",
        pure.join("\n")
    )
}

/// Writes the copy with all bugs in it.
fn plant_all() -> PathBuf {
    let copied = root().join("target/planted");
    let switch = "\n/// Which planted bug is switched on.\npub fn planted(name: &str) -> bool {\n    \
                  static ON: std::sync::OnceLock<String> = std::sync::OnceLock::new();\n    \
                  ON.get_or_init(|| std::env::var(\"PLANTED\").unwrap_or_default()) == name\n}\n";
    for floor in ["codec", "link", "mirror", "queue", "relay", "stanza", "stream"] {
        copy(&Path::new("src").join(floor), &copied);
    }
    for other in ["src/pii.rs", "src/time.rs", "tests/sim", "Cargo.lock"] {
        copy(Path::new(other), &copied);
    }
    write(&copied.join("src/lib.rs"), &(read(&root().join("src/lib.rs")) + switch));
    write(&copied.join("Cargo.toml"), &manifest());
    copied
}

/// Whether these worlds hold, and what they said.
fn simulate(copied: &Path, planted: &str, worlds: &str, seeds: u32) -> (bool, String) {
    let run = Command::new(env!("CARGO"))
        .args(["test", "--quiet", "--offline", "--test", "sim", "--", "--exact", worlds])
        .current_dir(copied)
        .env("CARGO_TARGET_DIR", copied.join("target"))
        .env("RUST_BACKTRACE", "0")
        .env("PLANTED", planted)
        .env("NARROWS_SIM_SEEDS", seeds.to_string())
        .env_remove("NARROWS_SIM_SEED")
        .output()
        .expect("cargo runs");
    let said = String::from_utf8_lossy(&run.stdout) + String::from_utf8_lossy(&run.stderr);
    (run.status.success(), said.into_owned())
}

/// Each line that is to be changed stands in the code once: whoever changes one of them finds out here, at once.
#[test]
fn every_bug_can_be_planted() {
    for bug in &ALL {
        assert!(
            !bug.promise.is_empty() && bug.instead.contains("PLANTED"),
            "{}",
            bug.name
        );
        assert_ne!(plant(&read(&root().join(bug.file)), bug), "");
    }
}

/// With none switched on all worlds hold; with any of them, a checker fails and names the seed.
#[test]
#[ignore = "takes a build of its own: cargo test --test planted -- --ignored --nocapture"]
fn every_planted_bug_is_found() {
    let copied = plant_all();
    let mut worlds: Vec<(&str, u32)> = ALL.iter().map(|bug| (bug.worlds, bug.seeds)).collect();
    worlds.sort_unstable();
    worlds.dedup();
    for (world, seeds) in worlds {
        let (holds, said) = simulate(&copied, "", world, seeds);
        assert!(
            holds && said.contains("test result: ok. 1 passed"),
            "without any bug, {world}: {said}"
        );
    }
    let mut missed = Vec::new();
    for bug in &ALL {
        let (holds, said) = simulate(&copied, bug.name, bug.worlds, bug.seeds);
        let seed = said
            .lines()
            .find(|line| line.starts_with("seed ") && line.contains("failed"));
        match seed.filter(|_| !holds) {
            Some(seed) => println!("{}: {}, {seed}", bug.name, bug.worlds),
            None => missed.push(bug.name),
        }
    }
    assert!(missed.is_empty(), "not found: {missed:?}");
}
