//! What operators look at, with a real Prometheus that watches a real pair: every query of every dashboard and every alert gives what it
//! should, before, during and after an outage; and the bytes that the sidecars report are those that the link carried. The README's picture
//! of the overview is drawn from such a run (`the_overview_is_drawn`).

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread::{self, sleep},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use narrows_lab::{
    Ejabberd, Profile, Prosody, Site, World,
    client::{Failure, Outcome},
    net::{Process, write_file},
};
use serde_json::{Value, json};

use crate::{
    boards::{BOARDS, Query, alerts, board, directory, list, names, panels, queries, text},
    cast::Cast,
    stage::{pair_with, stand},
};

/// The usual place of Prometheus.
const PROMETHEUS_PORT: u16 = 9090;

/// Where Prometheus, at A, finds the admin port of B. This way does not lead over the link.
const FAR_ADMIN_PORT: u16 = 9276;

const ADMIN_PORT: u16 = 9275;

/// Shorter than Grafana's usual windows, as the whole run is.
const RATE_INTERVAL: &str = "30s";

const PATIENCE: Duration = Duration::from_secs(60);

/// The link is at rest when nothing was sent for so long: longer than acknowledgements wait here.
const REST: Duration = Duration::from_secs(3);

/// What the issue asks for.
const BYTES_APART_MAX: f64 = 0.02;

/// A Prometheus at A that watches both sidecars and evaluates the alerts.
struct Prometheus<'w> {
    site: &'w Site,
    _process: Process,
}

impl<'w> Prometheus<'w> {
    fn start(world: &'w World) -> io::Result<Self> {
        let dir = world.dir().join("prometheus");
        fs::create_dir_all(&dir)?;
        let config = format!(
            "global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\n\
             rule_files: [{}]\n\
             scrape_configs:\n\
             - job_name: narrows\n  \
               static_configs:\n  \
               - {{ targets: ['127.0.0.1:{ADMIN_PORT}'], labels: {{ instance: shore }} }}\n  \
               - {{ targets: ['127.0.0.1:{FAR_ADMIN_PORT}'], labels: {{ instance: ship }} }}\n",
            directory().join("alerts.yaml").display()
        );
        let file = dir.join("prometheus.yml");
        write_file(&file, &config, 0o644)?;
        let process = Self::launch(&world.a, &file, &dir)?;
        let prometheus = Self {
            site: &world.a,
            _process: process,
        };
        let deadline = Instant::now() + PATIENCE;
        while !prometheus.instant("up").is_ok_and(|up| up.len() == 2) {
            if Instant::now() > deadline {
                return Err(io::Error::other("Prometheus does not see both sidecars"));
            }
            sleep(Duration::from_millis(200));
        }
        Ok(prometheus)
    }

    fn launch(site: &Site, config: &Path, dir: &Path) -> io::Result<Process> {
        let mut command = site.command("prometheus")?;
        command
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", dir.join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{PROMETHEUS_PORT}"))
            .arg("--log.level=warn");
        Process::start("prometheus", command, &dir.join("log"))
    }

    /// Asks its API; what it says is wrong is an error.
    fn ask(&self, path: &str) -> Result<Value, String> {
        let mut stream = self
            .site
            .connect_tcp(PROMETHEUS_PORT)
            .map_err(|error| error.to_string())?;
        let mut answer = String::new();
        // HTTP/1.0: in one piece, up to the end of the connection.
        write!(stream, "GET /api/v1/{path} HTTP/1.0\r\nHost: localhost\r\n\r\n")
            .and_then(|()| stream.read_to_string(&mut answer))
            .map_err(|error| error.to_string())?;
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        let value: Value = serde_json::from_str(body).map_err(|error| format!("{error}: {answer}"))?;
        match value["status"].as_str() {
            Some("success") => Ok(value["data"].clone()),
            _ => Err(text(&value, "error").to_owned()),
        }
    }

    /// The series that a query gives now, each with its value.
    fn instant(&self, expr: &str) -> Result<Vec<f64>, String> {
        let data = self.ask(&format!("query?query={}", encoded(expr)))?;
        if data["resultType"] != "vector" {
            return Err(format!("not a vector but {}", data["resultType"]));
        }
        Ok(list(&data, "result").map(|series| number(&series["value"])).collect())
    }

    /// All values of the series that a query gives over a time.
    fn over(&self, expr: &str, from: f64, to: f64) -> Result<Vec<f64>, String> {
        let data = self.ask(&format!(
            "query_range?query={}&start={from}&end={to}&step=2",
            encoded(expr)
        ))?;
        if data["resultType"] != "matrix" {
            return Err(format!("not a matrix but {}", data["resultType"]));
        }
        let points = list(&data, "result").flat_map(|series| list(series, "values"));
        Ok(points.map(number).collect())
    }
}

/// Of a pair of time and value, as Prometheus writes it.
fn number(pair: &Value) -> f64 {
    pair[1]
        .as_str()
        .and_then(|value| value.parse().ok())
        .unwrap_or(f64::NAN)
}

fn encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

/// Puts a dashboard's variables in, as Grafana does when all is selected.
fn filled_in(expr: &str, range: &str) -> String {
    expr.replace("$__rate_interval", RATE_INTERVAL)
        .replace("$__range", range)
        .replace("$job", ".+")
        .replace("$instance", ".+")
        .replace("$peer", ".+")
}

/// Lets connections to a listener lead to the admin port of a site, beside the link, until all is done.
fn lead_through(listener: &TcpListener, site: &Site, done: &AtomicBool) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    thread::scope(|scope| {
        while !done.load(Ordering::Relaxed) {
            match listener.accept() {
                Ok((near, _)) => {
                    near.set_nonblocking(false)?;
                    let far = site.connect_tcp(ADMIN_PORT)?;
                    let (near_too, far_too) = (near.try_clone()?, far.try_clone()?);
                    scope.spawn(|| carry(near, far));
                    scope.spawn(|| carry(far_too, near_too));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(Duration::from_millis(20)),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    })
}

fn carry(mut from: TcpStream, mut to: TcpStream) {
    // Whichever end is first, both are done.
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

/// Waits until nothing has been on the link for a while, and the metrics have heard of all that was.
fn rest(world: &World) {
    let mut last = (world.link.stats().sent_packets(), Instant::now());
    while last.1.elapsed() < REST {
        sleep(Duration::from_millis(100));
        let now = world.link.stats().sent_packets();
        if now != last.0 {
            last = (now, Instant::now());
        }
    }
}

/// IP bytes from A to B and from B to A: as the link counted them, and as the sidecars say.
fn ip_bytes(world: &World) -> io::Result<[(f64, f64); 2]> {
    let link = world.link.stats();
    let said = |site: &Site| -> io::Result<f64> {
        let labels = ["direction=\"sent\"", "level=\"ip\""];
        Ok(site.sidecar().metrics()?.sum("narrows_link_bytes_total", &labels))
    };
    Ok([
        (link.a_to_b.sent.bytes as f64, said(&world.a)?),
        (link.b_to_a.sent.bytes as f64, said(&world.b)?),
    ])
}

/// Waits until a metric of a sidecar has come to something.
fn until(what: &str, site: &Site, metric: &str, come: impl Fn(f64) -> bool) -> Outcome {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let value = site.sidecar().metrics()?.sum(metric, &[]);
        if come(value) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Failure(format!("{what}: {metric} is {value} at {}", site.domain())));
        }
        sleep(Duration::from_millis(200));
    }
}

/// How long all goes on.
struct Course {
    /// Messages before the outage, in it, and after it.
    turns: [usize; 3],
    pause: Duration,
}

const SHORT: Course = Course {
    turns: [100, 40, 20],
    pause: Duration::from_millis(250),
};

/// So long that lines have a shape.
const LONG: Course = Course {
    turns: [120, 60, 100],
    pause: Duration::from_millis(1500),
};

/// Talk, an outage that users are told of, and talk again. Those who talked stay.
fn live_through_it<'w>(world: &'w World, course: &Course) -> Outcome<Cast<'w>> {
    let mut cast = Cast::gather(world, "bridge")?;
    let mut speak = |turns: usize| -> Outcome {
        for turn in 0..turns {
            cast.say(
                turn % 5,
                "All stations: the supply boat is two hours late. Please confirm.",
            )?;
            sleep(course.pause);
        }
        Ok(())
    };
    rest(world);
    let before = ip_bytes(world)?;
    speak(course.turns[0])?;
    rest(world);
    // The sidecars look at the kernel's figures once a second.
    sleep(Duration::from_secs(2));
    for ((link, said), (link_before, said_before)) in ip_bytes(world)?.into_iter().zip(before) {
        let (link, said) = (link - link_before, said - said_before);
        println!(
            "{} messages: {link} bytes on the link, {said} as the sidecar says",
            course.turns[0]
        );
        if (said - link).abs() > link * BYTES_APART_MAX {
            return Err(Failure(format!(
                "{link} bytes went over the link, the metrics say {said}"
            )));
        }
    }
    world.link.down();
    speak(course.turns[1] / 2)?;
    until("users are told", &world.b, "narrows_mirror_splits_total", |count| {
        count > 0.0
    })?;
    speak(course.turns[1] - course.turns[1] / 2)?;
    world.link.up();
    until("users are shown", &world.b, "narrows_mirror_heals_total", |count| {
        count > 0.0
    })?;
    speak(course.turns[2])?;
    for site in [&world.a, &world.b] {
        until("all has crossed", site, "narrows_spool_entries", |entries| {
            entries == 0.0
        })?;
    }
    Ok(cast)
}

/// Whether a query gives what a panel can show.
fn check(query: &Query, prometheus: &Prometheus<'_>, since: f64) -> Result<(), String> {
    let now = unix_now();
    let expr = filled_in(&query.expr, &format!("{}s", (now - since).ceil()));
    let values = match query.instant {
        true => prometheus.instant(&expr),
        false => prometheus.over(&expr, since, now),
    }
    .map_err(|error| format!("{}: {error}\n  {expr}", query.place))?;
    if values.iter().any(|value| value.is_finite()) || values.is_empty() && query.may_be_empty {
        Ok(())
    } else {
        Err(format!(
            "{}: nothing to show, {} values\n  {expr}",
            query.place,
            values.len()
        ))
    }
}

fn unix_now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |since| since.as_secs_f64())
}

/// Every panel shows something after talk and an outage, every alert is understood and has what it looks at, and the bytes that the metrics
/// tell are those that the link has carried.
#[test]
fn dashboards_and_alerts_see_a_real_pair() {
    let picture = watched(&SHORT);
    // That the picture of the README can be drawn, with all that is on it.
    for panel in panels(&board("overview")) {
        let title = text(panel, "title");
        assert!(picture.contains(title), "{title} is not in the picture");
    }
}

/// Draws `grafana/overview.svg` anew, from what Prometheus says of a longer run.
#[test]
#[ignore = "eight minutes: cargo test --test e2e the_overview_is_drawn -- --ignored"]
fn the_overview_is_drawn() {
    fs::write(directory().join("overview.svg"), watched(&LONG)).expect("it can be written");
}

/// Runs a pair, looks at it with Prometheus, panics at what is wrong, and gives the picture of the overview.
fn watched(course: &Course) -> String {
    let stand = stand(
        "watch",
        Profile::vsat128k(),
        Prosody::stock(),
        Ejabberd::stock(),
        0,
        pair_with(&[("link", "ack_delay: 1s"), ("mirror", "split: { hold: 6s }")]),
    );
    let world = &stand.world;
    let since = unix_now();
    let done = AtomicBool::new(false);
    let listener = world.a.listen(FAR_ADMIN_PORT).expect("the port is free");
    let wrong = thread::scope(|scope| {
        let through = scope.spawn(|| lead_through(&listener, &world.b, &done));
        let wrong = watch(world, course, since);
        done.store(true, Ordering::Relaxed);
        through
            .join()
            .expect("it does not panic")
            .expect("the way to B's admin port holds");
        wrong
    });
    let wrong = wrong.unwrap_or_else(|failure| panic!("{}", failure.0));
    assert!(
        wrong.is_empty(),
        "{} queries are wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    let picture = fs::read_to_string(picture_file(world));
    picture.expect("it has been drawn")
}

fn picture_file(world: &World) -> PathBuf {
    world.dir().join("overview.svg")
}

/// Asks all that the overview asks, as Grafana would, and has `grafana/draw.py` draw it.
fn draw(world: &World, prometheus: &Prometheus<'_>, since: f64) -> io::Result<()> {
    let now = unix_now();
    let (range, step) = (format!("{}s", (now - since).ceil()), ((now - since) / 200.0).max(1.0));
    let answer = |expr: &str, instant: bool| {
        let expr = encoded(&filled_in(expr, &range));
        let path = match instant {
            true => format!("query?query={expr}"),
            false => format!("query_range?query={expr}&start={since}&end={now}&step={step}"),
        };
        let data = prometheus.ask(&path).map_err(io::Error::other)?;
        Ok::<_, io::Error>(data["result"].clone())
    };
    let overview = board("overview");
    let mut panels_said = Vec::new();
    for panel in panels(&overview) {
        let targets = list(panel, "targets").map(|target| answer(text(target, "expr"), target["instant"] == true));
        panels_said.push(json!({ "id": panel["id"], "targets": targets.collect::<io::Result<Vec<Value>>>()? }));
    }
    let annotations = list(&overview["annotations"], "list").map(|of| answer(text(of, "expr"), false));
    let said = json!({
        "from": since,
        "to": now,
        "panels": panels_said,
        "annotations": annotations.collect::<io::Result<Vec<Value>>>()?,
    });
    let answers = world.dir().join("answers.json");
    fs::write(&answers, said.to_string())?;
    let script = directory().join("draw.py");
    let board = directory().join("overview.json");
    let drawn = Command::new("python3")
        .args([&script, &board, &answers, &picture_file(world)])
        .output()?;
    match drawn.status.success() {
        true => Ok(()),
        false => Err(io::Error::other(String::from_utf8_lossy(&drawn.stderr).into_owned())),
    }
}

/// Gives what is wrong with queries.
fn watch(world: &World, course: &Course, since: f64) -> Outcome<Vec<String>> {
    let prometheus = Prometheus::start(world)?;
    let cast = live_through_it(world, course)?;
    // Two more scrapes.
    sleep(Duration::from_secs(3));
    draw(world, &prometheus, since)?;
    let mut wrong = Vec::new();
    let mut asked = 0;
    for name in BOARDS {
        for query in queries(name, &board(name)) {
            asked += 1;
            wrong.extend(check(&query, &prometheus, since).err());
        }
    }
    for alert in alerts() {
        asked += 1;
        // Nothing is wrong, so most give nothing; what they look at must be there.
        let (name, expr) = (text(&alert, "alert"), text(&alert, "expr"));
        let fires = prometheus.instant(expr);
        let silent: Vec<String> = names(expr)
            .into_iter()
            .filter(|name| prometheus.instant(name).is_ok_and(|series| series.is_empty()))
            .collect();
        if let Err(error) = fires {
            wrong.push(format!("{name}: {error}"));
        }
        if !silent.is_empty() {
            wrong.push(format!("{name}: there is no {silent:?}"));
        }
    }
    let rules = prometheus.ask("rules").map_err(Failure)?;
    let rules: Vec<&Value> = list(&rules, "groups").flat_map(|group| list(group, "rules")).collect();
    let health: BTreeSet<&str> = rules.iter().map(|rule| text(rule, "health")).collect();
    if rules.len() != alerts().len() || health != BTreeSet::from(["ok"]) {
        wrong.push(format!("{} rules of {}, {health:?}", rules.len(), alerts().len()));
    }
    let firing = rules.iter().filter(|rule| text(rule, "state") == "firing");
    let firing: Vec<&str> = firing.map(|rule| text(rule, "name")).collect();
    let series = prometheus.instant("scrape_samples_scraped").map_err(Failure)?;
    let took = prometheus
        .instant("max_over_time(scrape_duration_seconds[2m])")
        .map_err(Failure)?;
    println!("{asked} queries; samples of each scrape: {series:?}; the longest took {took:.3?} s; firing: {firing:?}");
    drop(cast);
    Ok(wrong)
}

/// Where `narrows trace` writes at a site.
fn trace_file(world: &World, name: &str) -> std::path::PathBuf {
    world.dir().join(format!("trace-{name}"))
}

/// Starts `narrows trace` at a site, and waits until it sees something.
fn trace(world: &World, site: &Site, name: &str, arguments: &[&str]) -> io::Result<Process> {
    let mut command = site.command(env!("CARGO_BIN_EXE_narrows"))?;
    command
        .args(["trace", "--admin", &format!("127.0.0.1:{ADMIN_PORT}")])
        .args(arguments);
    Process::start("narrows trace", command, &trace_file(world, name))
}

/// Waits until a file holds all of these.
fn until_holds(path: &Path, wanted: &[&str]) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = fs::read_to_string(path).unwrap_or_default();
        let missing: Vec<&&str> = wanted.iter().filter(|wanted| !text.contains(**wanted)).collect();
        if missing.is_empty() {
            return text;
        }
        assert!(
            Instant::now() < deadline,
            "no {missing:?} in {}:\n{text}",
            path.display()
        );
        sleep(Duration::from_millis(100));
    }
}

/// Whoever watches learns what becomes of each stanza and why, and nothing of users unless that is asked for and allowed; and the name of
/// one entry leads through the logs of both sides.
///
/// Talk, with a chat state that a rule takes out, and compare what was decided with what watchers and logs were told.
#[test]
fn trace_tells_why_and_hides_who() {
    let rule = "rules: [{name: states, match: {body: false}, strip: ['http://jabber.org/protocol/chatstates']}]";
    let levels = [("log", "level: debug"), ("queue", rule), ("mirror", "echo: local")];
    let stand = stand(
        "trace",
        Profile::lan(),
        Prosody::stock(),
        Ejabberd::stock(),
        0,
        pair_with(&levels),
    );
    let world = &stand.world;
    let mut cast = Cast::gather(world, "secretroom").unwrap_or_else(|failure| panic!("{}", failure.0));
    let watchers = [
        trace(world, &world.a, "a", &["--json"]),
        trace(world, &world.b, "b", &[]),
        trace(world, &world.a, "class", &["--class", "iq"]),
        trace(world, &world.a, "bodies", &["--bodies"]),
    ]
    .map(|process| process.expect("the binary was built for this test"));
    // Not before they are there: what has passed is not shown.
    for (site, count) in [(&world.a, 2.0), (&world.b, 1.0)] {
        let deadline = Instant::now() + PATIENCE;
        let asked = || {
            let metrics = site.sidecar().metrics().expect("metrics are told");
            metrics.sum("narrows_admin_requests_total", &["path=\"trace\""])
        };
        while asked() < count {
            assert!(Instant::now() < deadline, "nobody watches at {}", site.domain());
            sleep(Duration::from_millis(100));
        }
    }
    let state = "<composing xmlns='http://jabber.org/protocol/chatstates'/>";
    cast.alice
        .message(&cast.room, "groupchat", state)
        .expect("alice can speak");
    for turn in 0..10 {
        cast.say(turn % 5, "topsecret")
            .unwrap_or_else(|failure| panic!("{}", failure.0));
    }
    let near = until_holds(
        &trace_file(world, "a"),
        &[
            "\"decision\":\"dropped\"",
            "the rule states drops it",
            "\"decision\":\"queued\"",
            "\"decision\":\"collapsed\"",
            "copy 5 of the entry",
            "\"decision\":\"sent\"",
            "\"decision\":\"arrived\"",
            "\"decision\":\"delivered\"",
            "\"class\":\"message\"",
        ],
    );
    let far = until_holds(
        &trace_file(world, "b"),
        &[
            "came over the link for 5",
            "delivered",
            "echoed",
            "swallowed",
            "bytes hidden",
        ],
    );
    for text in [&near, &far] {
        for hidden in ["topsecret", "secretroom", "alice", world.a.domain(), world.b.domain()] {
            assert!(!text.contains(hidden), "{hidden} is shown:\n{text}");
        }
    }
    let refused = fs::read_to_string(trace_file(world, "bodies")).unwrap_or_default();
    assert!(refused.contains("admin.show"), "{refused}");
    let other_class = fs::read_to_string(trace_file(world, "class")).unwrap_or_default();
    assert!(!other_class.contains("class message"), "{other_class}");

    // An entry that was shared by all five: its name is in both logs, from the stanza that came to the copies that the server has.
    let line = near
        .lines()
        .find(|line| line.contains("copy 5 of the entry"))
        .expect("it was there");
    let line: Value = serde_json::from_str(line).expect("a line is JSON");
    let id = format!("entry={} ", text(&line, "entry"));
    for (site, steps) in [
        (&world.a, ["Stanza queued", "Stanza collapsed", "Stanza sent"]),
        (&world.b, ["Stanza arrived", "Stanza delivered", "Stanza delivered"]),
    ] {
        until_holds(&site.sidecar().log_path(), &[&id]);
        let log = fs::read_to_string(site.sidecar().log_path()).expect("there is a log");
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(&id)).collect();
        for step in steps {
            assert!(
                lines.iter().any(|line| line.contains(step)),
                "no {step} of {id} at {}: {lines:#?}",
                site.domain()
            );
        }
        assert!(
            !log.contains("topsecret") && !log.contains("secretroom"),
            "the log hides who and what"
        );
    }
    drop(watchers);
}

/// Runs a command at a site to its end, and gives what it wrote.
fn output_of(site: &Site, program: &str, arguments: &[&str]) -> io::Result<std::process::Output> {
    site.command(program)?.args(arguments).output()
}

/// A browser without a screen, that asks for nothing by itself.
const BROWSER: &str = "chromium-headless-shell";
const BROWSER_OPTIONS: &[&str] = &[
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--enable-logging=stderr",
];

/// Where pictures for people go; nothing looks at them but they.
fn picture(name: &str) -> String {
    format!("{}/{name}", env!("CARGO_TARGET_TMPDIR"))
}

/// Has the browser read a page, and gives the page as the browser understands it, and what it has complained of.
fn browse(site: &Site, url: &str, net_log: &Path) -> io::Result<(String, Vec<String>)> {
    let log = format!("--log-net-log={}", net_log.display());
    let output = output_of(site, BROWSER, &[BROWSER_OPTIONS, &[&log, "--dump-dom", url]].concat())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let complaints = said.lines().filter(|line| line.contains(":CONSOLE")).map(str::to_owned);
    Ok((
        String::from_utf8_lossy(&output.stdout).into_owned(),
        complaints.collect(),
    ))
}

fn screenshot(site: &Site, url: &str, size: &str, name: &str) -> io::Result<()> {
    let options = [
        format!("--screenshot={}", picture(name)),
        format!("--window-size={size}"),
    ];
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    output_of(site, BROWSER, &[BROWSER_OPTIONS, &options, &[url]].concat()).map(drop)
}

/// The row of the page with this head, as it came over HTTP or out of the browser.
fn row<'p>(page: &'p str, head: &str) -> &'p str {
    let (_, rest) = page.split_once(&format!("<th>{head}")).unwrap_or_default();
    let rest = rest.trim_start_matches("</th>").trim_start_matches("<td>");
    rest.split(['<', '\n']).next().unwrap_or_default()
}

/// `narrows top` in a terminal of this size, once it shows what is wanted; with the terminal's colours.
fn top(site: &Site, columns: u16, lines: u16, wanted: &str) -> Outcome<String> {
    let socket = site.dir().join("tmux");
    let socket = socket.display().to_string();
    let (width, height) = (columns.to_string(), lines.to_string());
    let narrows = format!("{} top --admin 127.0.0.1:{ADMIN_PORT}", env!("CARGO_BIN_EXE_narrows"));
    let tmux = |arguments: &[&str]| output_of(site, "tmux", &[&["-S", &socket], arguments].concat());
    tmux(&["new-session", "-d", "-x", &width, "-y", &height, &narrows])?;
    let deadline = Instant::now() + PATIENCE;
    let screen = loop {
        sleep(Duration::from_millis(500));
        let screen = tmux(&["capture-pane", "-p", "-e"])?;
        let screen = String::from_utf8_lossy(&screen.stdout).into_owned();
        if screen.contains(wanted) {
            break screen;
        }
        if Instant::now() > deadline {
            return Err(Failure(format!("nothing is shown:\n{screen}")));
        }
    };
    tmux(&["kill-server"])?;
    Ok(screen)
}

/// The page of the admin port in a real browser: what the sidecar knows stands in it, nothing is asked of anybody else, and the browser has
/// nothing to complain of. `narrows top` in a real terminal shows the same. Pictures of both are left in the build's directory.
#[test]
fn page_and_top_in_a_browser_and_a_terminal() {
    let stand = stand(
        "browse",
        Profile::vsat128k(),
        Prosody::stock(),
        Ejabberd::stock(),
        0,
        pair_with(&[("admin", "show: addresses")]),
    );
    show_it(&stand.world).unwrap_or_else(|failure| panic!("{}", failure.0));
}

fn show_it(world: &World) -> Outcome {
    let mut cast = Cast::gather(world, "bridge")?;
    let mut speak = |turns: usize| -> Outcome {
        for turn in 0..turns {
            cast.say(
                turn % 5,
                "All stations: the supply boat is two hours late. Please confirm.",
            )?;
            sleep(Duration::from_millis(200));
        }
        Ok(())
    };
    speak(60)?;
    world.link.down();
    speak(30)?;
    until("the link is seen to be down", &world.b, "narrows_link_up", |up| {
        up == 0.0
    })?;
    let down = top(&world.a, 80, 24, "once up")?;
    world.link.up();
    until("the link is back", &world.b, "narrows_link_up", |up| up == 1.0)?;
    speak(30)?;
    // Rates are known with the second answer.
    let busy = top(&world.b, 80, 24, "bit/s")?;
    println!("{down}\n{busy}");
    assert!(busy.contains("bridge@"), "{busy}");
    rest(world);
    // The sidecar looks at itself once a second.
    sleep(Duration::from_secs(2));

    let url = format!("http://127.0.0.1:{ADMIN_PORT}/");
    let net_log = world.dir().join("net-log.json");
    let heads = ["crossed", "saved here by", "rooms", "dearest rooms, before compression"];
    let deadline = Instant::now() + PATIENCE;
    let dom = loop {
        let (_, before) = world.b.sidecar().http("/")?;
        let (dom, complaints) = browse(&world.b, &url, &net_log)?;
        let (_, after) = world.b.sidecar().http("/")?;
        assert!(complaints.is_empty(), "{complaints:#?}");
        // A figure that has moved meanwhile says nothing.
        if heads.iter().all(|head| row(&before, head) == row(&after, head)) {
            for head in heads {
                assert!(!row(&before, head).is_empty(), "the page has no {head}: {before}");
                assert_eq!(row(&dom, head), row(&before, head), "{head}");
            }
            break dom;
        }
        assert!(Instant::now() < deadline, "the figures do not rest");
    };
    assert!(row(&dom, "rooms").starts_with("5 users here in 1 room there"), "{dom}");
    assert!(
        row(&dom, "dearest rooms, before compression").starts_with("bridge@"),
        "{dom}"
    );
    assert!(dom.contains("<svg") && dom.contains("the link is down"), "{dom}");

    let asked = fs::read_to_string(&net_log)?;
    let asked: BTreeSet<&str> = asked
        .split("\"url\":\"")
        .skip(1)
        .filter_map(|rest| rest.split('"').next())
        .filter(|url| url.starts_with("http") || url.starts_with("ws"))
        .collect();
    assert_eq!(
        asked,
        BTreeSet::from([url.as_str()]),
        "the browser asks for more than the page"
    );

    screenshot(&world.b, &url, "1000,900", "page.png")?;
    let html = format!(
        "<meta charset=utf-8><body style='margin:0;background:#181a1b;color:#ddd'><pre style='font:15px/1.25 monospace;margin:12px'>{}</pre>",
        in_html(&down)
    );
    let file = world.dir().join("top.html");
    write_file(&file, &html, 0o644)?;
    screenshot(&world.b, &format!("file://{}", file.display()), "760,400", "top.png")?;
    Ok(())
}

/// A terminal's text with its colours (ECMA-48 §8.3.117), for a browser.
fn in_html(screen: &str) -> String {
    let mut html = String::new();
    for (index, piece) in screen.split("\x1b[").enumerate() {
        let (style, text) = match (index, piece.split_once('m')) {
            (0, _) | (_, None) => ("", piece),
            (_, Some((codes, text))) => (style_of(codes), text),
        };
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        html += &format!("<span style='{style}'>{text}</span>");
    }
    html
}

/// As far as `narrows top` uses them: each piece has one.
fn style_of(codes: &str) -> &'static str {
    match codes {
        "38;5;1" => "color:#ff8a80;font-weight:bold",
        "38;5;2" => "color:#6fce85",
        "4" | "0;4" => "text-decoration:underline",
        "1" => "font-weight:bold",
        "2" => "color:#999",
        _ => "",
    }
}
