//! The program as its admin meets it: arguments, output, exit codes.

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

fn narrows(arguments: &[&str]) -> Output {
    command(arguments).output().expect("the binary was built for this test")
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_narrows"));
    command
        .args(arguments)
        .env_remove("RUST_LOG")
        .env_remove("JOURNAL_STREAM");
    command
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("ended by itself")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a test's path is plain")
}

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config/example.yaml")
}

/// A good file: 0, and nothing on stderr. A bad one: 3, every mistake on stderr, nothing on stdout.
#[test]
fn check_tells_good_from_bad() {
    let good = narrows(&["check", text(&example())]);
    assert_eq!((code(&good), stderr(&good).as_str()), (0, ""));
    assert!(stdout(&good).ends_with("example.yaml: good\n"));

    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("bad.yaml");
    let yaml = fs::read_to_string(example()).unwrap();
    fs::write(
        &file,
        yaml.replace("lanes: 2", "lane: 2")
            .replace("ack_delay: 200ms", "ack_delay: soon"),
    )
    .unwrap();
    let bad = narrows(&["check", text(&file)]);
    assert_eq!((code(&bad), stdout(&bad).as_str()), (3, ""));
    let said = stderr(&bad);
    assert!(
        said.contains("legs.lane: there is no such key") && said.contains("did you mean `lanes`?"),
        "{said}"
    );
    assert!(
        said.contains("link.ack_delay: `soon` is not a period") && said.contains("2 errors"),
        "{said}"
    );

    assert_eq!(code(&narrows(&["check", "/nonexistent"])), 3);
    assert_eq!(code(&narrows(&["run", "--config", text(&file)])), 3);
}

/// Wrong arguments are 2, help is 0 and holds every exit code.
#[test]
fn wrong_arguments_are_a_usage_error() {
    for arguments in [
        &["nonsense"][..],
        &[],
        &["status", "--admin", "nowhere"],
        &["check", "a", "b"],
    ] {
        assert_eq!(code(&narrows(arguments)), 2, "{arguments:?}");
    }
    let help = narrows(&["--help"]);
    assert_eq!(code(&help), 0);
    for (code, word) in [
        (0, "done"),
        (1, "failed"),
        (2, "arguments"),
        (3, "configuration"),
        (4, "address"),
        (5, "store"),
        (6, "nobody"),
    ] {
        let line = stdout(&help)
            .lines()
            .find(|line| line.starts_with(&format!("  {code}  ")))
            .unwrap_or_default()
            .to_owned();
        assert!(line.contains(word), "{code}: {line}");
    }
    assert_eq!(code(&narrows(&["--version"])), 0);
}

/// Nobody at the admin port: 6.
#[test]
fn status_of_nobody_is_unreachable() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let output = narrows(&["status", "--admin", &free.to_string()]);
    assert_eq!(code(&output), 6);
    assert!(stderr(&output).contains("nobody answers at"));
}

/// Without the lab beside it, the demo says where it is.
#[test]
fn demo_says_where_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let alone = directory.path().join("narrows");
    fs::copy(env!("CARGO_BIN_EXE_narrows"), &alone).unwrap();
    let output = Command::new(alone).arg("demo").output().unwrap();
    assert_eq!(code(&output), 1);
    assert!(stderr(&output).contains("tests/demo"));
}

/// An authority is made once, its key is the owner's only, and its certificate is printed as it is.
#[test]
fn authority_is_made_once() {
    let directory = tempfile::tempdir().unwrap();
    let ca = directory.path().join("ca");
    let made = narrows(&["ca", "init", text(&ca), "--config", text(&example())]);
    assert_eq!(code(&made), 0, "{}", stderr(&made));
    assert!(
        stdout(&made).contains("for a.example, conference.a.example only"),
        "{}",
        stdout(&made)
    );
    assert_eq!(
        fs::metadata(ca.join("ca.key")).unwrap().permissions().mode() & 0o777,
        0o600
    );

    let shown = narrows(&["ca", "show", text(&ca)]);
    assert_eq!(
        (code(&shown), stdout(&shown)),
        (0, fs::read_to_string(ca.join("ca.pem")).unwrap())
    );

    let again = narrows(&["ca", "init", text(&ca)]);
    assert_eq!(code(&again), 1);
    assert!(stderr(&again).contains("exists already"), "{}", stderr(&again));
    assert_eq!(code(&narrows(&["ca", "show", text(directory.path())])), 1);
}
