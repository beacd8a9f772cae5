//! The program as its admin meets it: arguments, output, exit codes.

use std::{
    fs,
    io::{BufRead, BufReader, Lines, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, Output, Stdio},
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
        yaml.replace("lanes: 1", "lane: 1")
            .replace("ack_delay: 5s", "ack_delay: soon"),
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
    for command in ["status", "reload"] {
        let output = narrows(&[command, "--admin", &free.to_string()]);
        assert_eq!(code(&output), 6);
        assert!(stderr(&output).contains("nobody answers at"));
    }
}

/// Without the lab beside it, the demo says where it is.
#[test]
fn demo_says_where_it_is() {
    // A link, on the file system of the target directory: a copy is open for writing for a moment, another test's child may inherit
    // that, and then it cannot be executed ("Text file busy").
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let alone = directory.path().join("narrows");
    fs::hard_link(env!("CARGO_BIN_EXE_narrows"), &alone).unwrap();
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

/// A port that nobody has at this moment.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// All that `run` needs, in a directory of its own: key, authority, configuration.
struct Place {
    directory: tempfile::TempDir,
    admin: String,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let admin = format!("127.0.0.1:{}", free_port());
        let at = |name: &str| text(&directory.path().join(name)).to_owned();
        assert_eq!(code(&narrows(&["keygen", &at("key")])), 0);
        assert_eq!(code(&narrows(&["ca", "init", &at("ca")])), 0);
        let yaml = format!(
            "site: ship\ndata_dir: {}\nlocal: {{domains: [b.example], server: 127.0.0.1:{}}}\n\
             legs: {{listen: [127.0.0.1:{}], certificates: {}}}\nlink: {{listen: 127.0.0.1:{}, private_key: {}}}\n\
             admin: {{listen: {admin}}}\n\
             peers: [{{name: shore, domains: [a.example], public_key: AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=}}]\n",
            at("data"),
            free_port(),
            free_port(),
            at("ca"),
            free_port(),
            at("key"),
        );
        fs::write(directory.path().join("narrows.yaml"), yaml).unwrap();
        Self { directory, admin }
    }

    fn config(&self) -> String {
        text(&self.directory.path().join("narrows.yaml")).to_owned()
    }

    /// Runs until its log says that it has started; or ends by itself.
    fn run(&self) -> Running {
        let mut child = command(&["run", "--config", &self.config()])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let log = lines
            .by_ref()
            .map_while(Result::ok)
            .take_while(|line| !line.contains("Started."))
            .collect();
        Running { child, lines, log }
    }
}

struct Running {
    child: Child,
    lines: Lines<BufReader<ChildStderr>>,
    log: Vec<String>,
}

impl Running {
    fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .arg(format!("-{name}"))
            .arg(self.child.id().to_string())
            .status();
        assert!(sent.unwrap().success());
    }

    /// The exit code, and all of the log.
    fn end(mut self) -> (Option<i32>, String) {
        // To the end of the log first: a full pipe would hold the process up.
        self.log.extend(self.lines.by_ref().map_while(Result::ok));
        (self.child.wait().unwrap().code(), self.log.join("\n"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

/// A sidecar that runs says so to `status`, stops in order on SIGTERM and on SIGINT, and is gone then.
#[test]
fn run_answers_status_and_stops_on_a_signal() {
    let place = Place::new();
    for signal in ["TERM", "INT"] {
        let running = place.run();
        let status = narrows(&["status", "--config", &place.config()]);
        assert_eq!(code(&status), 0, "{}", stderr(&status));
        assert!(
            stdout(&status).starts_with("site ship, narrows "),
            "{}",
            stdout(&status)
        );
        assert!(stdout(&status).contains("\nshore "), "{}", stdout(&status));
        let json = narrows(&["status", "--admin", &place.admin, "--json"]);
        let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
        assert_eq!(json["peers"][0]["name"], "shore");
        running.signal(signal);
        let (code, log) = running.end();
        assert_eq!(code, Some(0), "{log}");
    }
    assert_eq!(code(&narrows(&["status", "--admin", &place.admin])), 6);
}

/// An address that is taken: 4, and the log names it.
#[test]
fn taken_address_is_named() {
    let place = Place::new();
    let _taken = TcpListener::bind(&place.admin).unwrap();
    let (code, log) = place.run().end();
    assert_eq!(code, Some(4), "{log}");
    assert!(log.contains(&place.admin), "{log}");
}

/// A private key is made once, is its owner's only, and its public key is printed alone, the same each time. A peer that
/// was given our own key by mistake is found.
#[test]
fn keys_are_made_once() {
    let place = Place::new();
    let file = place.directory.path().join("key");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let again = narrows(&["keygen", text(&file)]);
    assert_eq!((code(&again), stdout(&again).as_str()), (1, ""));
    assert!(stderr(&again).contains("is there already"), "{}", stderr(&again));

    let shown = narrows(&["pubkey", text(&file)]);
    assert_eq!(
        (code(&shown), stdout(&shown).len(), stderr(&shown).as_str()),
        (0, 45, "")
    );
    assert_eq!(code(&narrows(&["pubkey", "/nonexistent"])), 1);

    let yaml = fs::read_to_string(place.config()).unwrap();
    let own = stdout(&shown);
    fs::write(
        place.config(),
        yaml.replace("AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=", own.trim()),
    )
    .unwrap();
    let checked = narrows(&["check", &place.config()]);
    assert_eq!(code(&checked), 3);
    assert!(
        stderr(&checked).contains("this is our own public key"),
        "{}",
        stderr(&checked)
    );
}

/// A stanza on standard input is explained; one that is none: 1; a wrong configuration: 3, before anything is read.
#[test]
fn explain_tells_what_becomes_of_a_stanza() {
    let explain = |file: &Path, stanza: &str| {
        let mut child = command(&["explain", text(file)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It may have ended without reading.
        let _ = child.stdin.take().unwrap().write_all(stanza.as_bytes());
        child.wait_with_output().unwrap()
    };
    let good = explain(
        &example(),
        "<message from='u@b.example/r' to='v@a.example' type='chat'><body>x</body></message>\n",
    );
    assert_eq!((code(&good), stderr(&good).as_str()), (0, ""));
    assert!(
        stdout(&good).ends_with("it goes as it is\nclass message, weight 8\nexpires after 12h\n"),
        "{}",
        stdout(&good)
    );
    let bad = explain(&example(), "<message");
    assert_eq!((code(&bad), stdout(&bad).as_str()), (1, ""));
    assert!(stderr(&bad).contains("this is not a stanza"), "{}", stderr(&bad));
    assert_eq!(code(&explain(Path::new("/nonexistent"), "<message/>")), 3);
}

/// Beyond `connections_max` the server's connections are closed at once; the first stays open.
#[test]
fn connections_from_the_server_are_bounded() {
    let place = Place::new();
    let legs = format!("127.0.0.1:{}", free_port());
    let yaml = fs::read_to_string(place.config()).unwrap();
    let listen = yaml
        .split_once("legs: {listen: [")
        .unwrap()
        .1
        .split_once(']')
        .unwrap()
        .0
        .to_owned();
    fs::write(
        place.config(),
        yaml.replace(
            &format!("legs: {{listen: [{listen}]"),
            &format!("legs: {{connections_max: 1, listen: [{legs}]"),
        ),
    )
    .unwrap();
    let running = place.run();
    let header = b"<stream:stream xmlns='jabber:server' xmlns:stream='http://etherx.jabber.org/streams' to='a.example' version='1.0'>";
    let open = || {
        let mut stream = TcpStream::connect(&legs).unwrap();
        // One that was closed at once may refuse even this.
        let _ = stream.write_all(header);
        let mut answer = [0; 8];
        (stream.read(&mut answer).unwrap_or(0), stream)
    };
    let (answered, first) = open();
    assert!(answered > 0);
    assert_eq!(open().0, 0);
    drop(first);
    running.signal("TERM");
    assert_eq!(running.end().0, Some(0));
}

/// A certificate of the site's own stands in for the authority's; one that cannot be read is named and is a matter of the configuration.
#[test]
fn a_certificate_of_the_sites_own_is_used() {
    let place = Place::new();
    let at = |name: &str| place.directory.path().join(name);
    let yaml = fs::read_to_string(place.config()).unwrap();
    let authority = format!("certificates: {}", text(&at("ca")));
    assert!(yaml.contains(&authority));
    let own = format!(
        "certificate: {{chain: {}, key: {}}}",
        text(&at("own.pem")),
        text(&at("own.key"))
    );
    fs::write(place.config(), yaml.replace(&authority, &own)).unwrap();
    let made = rcgen::generate_simple_self_signed(["a.example".to_owned()]).unwrap();
    let key = made.signing_key.serialize_pem();
    for (chain, key, missing) in [
        (None, None, "own."),
        (Some(made.cert.pem()), None, "own.key"),
        (None, Some(key.clone()), "own.pem"),
    ] {
        for (name, content) in [("own.pem", chain), ("own.key", key)] {
            let _ = fs::remove_file(at(name));
            if let Some(content) = content {
                fs::write(at(name), content).unwrap();
            }
        }
        let (code, log) = place.run().end();
        assert_eq!(code, Some(3), "{log}");
        assert!(log.contains(missing), "{log}");
    }
    fs::write(at("own.pem"), made.cert.pem()).unwrap();
    fs::write(at("own.key"), key).unwrap();
    let running = place.run();
    running.signal("TERM");
    let (code, log) = running.end();
    assert_eq!(code, Some(0), "{log}");
}
