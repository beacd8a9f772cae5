//! The dashboards and alerts against the list of metrics, against Grafana's own schema, and against the rules that its linter has for dashboards.
//!
//! That every query also gives something is seen in `tests/e2e/watching.rs`.

mod boards;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use boards::{BOARDS, alerts, board, directory, list, names, panels, queries, text};
use narrows::metrics::{ALL, Kind, Metric, Words};
use serde_json::{Value, json};

/// The metric that a name in a query means; a histogram has three.
fn metric(name: &str) -> Option<&'static Metric> {
    ALL.iter().copied().find(|metric| match metric.kind {
        Kind::Histogram(_) => name
            .strip_prefix(metric.name)
            .is_some_and(|rest| ["_bucket", "_sum", "_count"].contains(&rest)),
        Kind::Counter | Kind::Gauge => name == metric.name,
    })
}

/// Each name with what stands in the braces behind it.
fn selectors(expr: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut rest = expr;
    while let Some(at) = rest.find("narrows_").into_iter().chain(rest.find("process_")).min() {
        let end = rest[at..]
            .find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
            .map_or(rest.len(), |length| at + length);
        let name = rest[at..end].to_owned();
        rest = &rest[end..];
        let inside = rest.strip_prefix('{').and_then(|rest| rest.split_once('}'));
        found.push((name, inside.map_or(String::new(), |(inside, _)| inside.to_owned())));
    }
    found
}

/// All expressions there are, with their places.
fn expressions() -> Vec<(String, String)> {
    let of_boards = BOARDS
        .into_iter()
        .flat_map(|name| queries(name, &board(name)))
        .map(|query| (query.place, query.expr));
    let of_alerts = alerts()
        .into_iter()
        .map(|rule| (text(&rule, "alert").to_owned(), text(&rule, "expr").to_owned()));
    of_boards.chain(of_alerts).collect()
}

/// A query names metrics, labels and words that narrows has: a panel that is always empty helps nobody.
#[test]
fn queries_use_what_there_is() {
    for (place, expr) in expressions() {
        for (name, matchers) in selectors(&expr) {
            let metric = metric(&name).unwrap_or_else(|| panic!("{place}: there is no metric {name}"));
            for matcher in matchers.split(',').filter(|matcher| !matcher.is_empty()) {
                let (label, value) = matcher
                    .split_once(['=', '~', '!'])
                    .unwrap_or_else(|| panic!("{place}: {matcher}"));
                // Prometheus' own.
                if ["job", "instance"].contains(&label) {
                    continue;
                }
                let words = metric.labels.iter().find(|(known, _)| *known == label);
                let (_, words) = words.unwrap_or_else(|| panic!("{place}: {name} has no label {label}"));
                if let Words::Closed(words) = words {
                    for word in value.trim_matches(['=', '~', '!', '"']).split('|') {
                        assert!(words.contains(&word), "{place}: {name}: {label} is never {word}");
                    }
                }
            }
        }
        // Labels by which it is summed up.
        for list in expr.split(" by (").skip(1).filter_map(|rest| rest.split_once(')')) {
            for label in list.0.split(',').map(str::trim) {
                let has = |name: &String| {
                    metric(name).is_some_and(|metric| metric.labels.iter().any(|(known, _)| *known == label))
                };
                assert!(
                    ["job", "instance", "le"].contains(&label) || names(&expr).iter().any(has),
                    "{place}: nothing has the label {label}"
                );
            }
        }
    }
}

/// Counters are read as rates or increases; as a sum they say nothing after a restart.
#[test]
fn counters_are_read_as_rates() {
    for (place, expr) in expressions() {
        for (name, _) in selectors(&expr) {
            let kind = metric(&name).map(|metric| metric.kind);
            if kind == Some(Kind::Gauge) {
                continue;
            }
            for (at, _) in expr.match_indices(&format!("{name}{{")) {
                let before = &expr[..at];
                assert!(
                    before.ends_with("rate(") || before.ends_with("increase("),
                    "{place}: {name} is a counter: {expr}"
                );
            }
        }
    }
}

/// The habits of Grafana's linter: variables for data source, job and instance that every query obeys, windows that follow the
/// zoom, a title that asks, a description, a unit, nothing on top of another.
#[test]
fn dashboards_keep_the_rules() {
    let mut uids = BTreeSet::new();
    for name in BOARDS {
        let board = board(name);
        assert!(
            uids.insert(text(&board, "uid").to_owned()) && text(&board, "uid").len() <= 40,
            "{name}"
        );
        assert!(
            board["editable"] == false && board["schemaVersion"].as_u64() >= Some(36),
            "{name}"
        );
        let variables: Vec<&str> = list(&board["templating"], "list")
            .map(|variable| text(variable, "name"))
            .collect();
        assert_eq!(variables, ["datasource", "job", "instance", "peer"], "{name}");
        let annotations: Vec<&str> = list(&board["annotations"], "list")
            .map(|annotation| text(annotation, "name"))
            .collect();
        assert_eq!(annotations, ["Split", "Heal"], "{name}");
        for query in queries(name, &board) {
            assert!(
                query.instant || !query.expr.contains("$__range"),
                "{}: a line of sums",
                query.place
            );
            assert!(
                !query.may_be_empty || query.expr.contains('>'),
                "{}: nothing filters it",
                query.place
            );
            for (metric_name, matchers) in selectors(&query.expr) {
                let place = &query.place;
                assert!(
                    matchers.starts_with("job=~\"$job\",instance=~\"$instance\""),
                    "{place}: {metric_name} of all instances"
                );
                let per_peer =
                    metric(&metric_name).is_some_and(|metric| metric.labels.iter().any(|(label, _)| *label == "peer"));
                assert_eq!(matchers.contains("peer=~\"$peer\""), per_peer, "{place}: {metric_name}");
            }
        }
        check_panels(name, &board);
    }
}

fn check_panels(name: &str, board: &Value) {
    let mut ids = BTreeSet::new();
    let mut taken = BTreeMap::new();
    for panel in list(board, "panels") {
        let title = text(panel, "title");
        assert!(
            ids.insert(panel["id"].as_u64().unwrap()),
            "{name}: {title}: its id is there twice"
        );
        let place = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        assert!(place("x") + place("w") <= 24, "{name}: {title} is beyond the edge");
        for x in place("x")..place("x") + place("w") {
            for y in place("y")..place("y") + place("h") {
                if let Some(other) = taken.insert((x, y), title.to_owned()) {
                    panic!("{name}: {title} lies on {other}");
                }
            }
        }
    }
    for panel in panels(board) {
        let title = text(panel, "title");
        assert!(title.ends_with('?'), "{name}: {title:?} asks nothing");
        assert!(
            text(panel, "description").ends_with('.'),
            "{name}: {title} is not described"
        );
        assert!(
            !text(&panel["fieldConfig"]["defaults"], "unit").is_empty(),
            "{name}: {title} has no unit"
        );
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{name}: {title}");
        assert!(list(panel, "targets").next().is_some(), "{name}: {title} shows nothing");
        for target in list(panel, "targets") {
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{name}: {title}");
            let expr = text(target, "expr");
            for (at, _) in expr.match_indices("rate(") {
                let window = expr[at..]
                    .split_once('[')
                    .and_then(|(_, rest)| rest.split_once(']'))
                    .unwrap()
                    .0;
                assert!(
                    ["$__rate_interval", "10m", "1h"].contains(&window),
                    "{name}: {title}: {window}"
                );
            }
        }
    }
}

/// Who is woken finds a page that says what to do.
#[test]
fn every_alert_has_a_runbook() {
    let runbooks = fs::read_to_string(directory().join("runbooks.md")).unwrap();
    for rule in alerts() {
        let name = text(&rule, "alert");
        assert!(runbooks.contains(&format!("\n## {name}\n")), "{name} has no section");
        let runbook = text(&rule["annotations"], "runbook");
        assert_eq!(runbook, format!("grafana/runbooks.md#{}", name.to_lowercase()));
    }
}

/// Prometheus' own checker takes the rules, and each fires when it should and not before.
#[test]
fn promtool_accepts_the_rules() {
    for arguments in [["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]] {
        let output = Command::new("promtool")
            .args(arguments)
            .current_dir(directory())
            .output()
            .expect("promtool is needed for this test: it is in Debian's package `prometheus`");
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "promtool {arguments:?}:\n{said}");
    }
    let tested = fs::read_to_string(directory().join("alerts_test.yaml")).unwrap();
    for rule in alerts() {
        let name = text(&rule, "alert");
        assert!(tested.contains(name), "{name} is not tested");
    }
}

/// A Python that has Grafana's schema: a virtual environment below `target/`, made when it is first wanted. That takes the network, as
/// building did.
fn python_with_schema() -> PathBuf {
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join("grafana-schema");
    let python = home.join("bin/python3");
    let wanted = here().join("requirements.txt");
    // Put there last, so that what was broken off is made anew.
    let done = home.join("requirements.txt");
    let is_same = |one: &Path, other: &Path| fs::read(one).ok() == fs::read(other).ok();
    if !is_same(&wanted, &done) {
        let install = ["-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r"].map(Path::new);
        let made = |command: &mut Command| {
            let output = command.output().expect("Python is in Debian's package `python3`");
            let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            assert!(
                output.status.success(),
                "Debian's package `python3-venv` and a way to PyPI are needed for this test: {said}"
            );
        };
        made(
            Command::new("/usr/bin/python3")
                .args(["-m", "venv", "--clear"])
                .arg(&home),
        );
        made(Command::new(&python).args(install).arg(&wanted));
        fs::copy(&wanted, &done).unwrap();
    }
    python
}

fn here() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/grafana"))
}

/// Every dashboard is what Grafana's schema says that a dashboard is: no field, value or type that Grafana does not know. That the check finds
/// such things is seen as well.
#[test]
fn dashboards_obey_the_schema() {
    let python = python_with_schema();
    let check = |files: &[PathBuf]| {
        let mut command = Command::new(&python);
        let output = command.arg(here().join("schema.py")).args(files).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        (output.status.success(), said.into_owned())
    };
    let (good, said) = check(&BOARDS.map(|name| directory().join(format!("{name}.json"))));
    assert!(good, "{said}");

    for (place, value) in [
        ("/panels/0/legend", json!(1)),
        ("/panels/0/type", json!("stats")),
        ("/panels/0/gridPos/w", json!("6")),
        ("/panels/0/options/colorMode", json!("rainbow")),
        ("/panels/0/options/reduceOptions/calc", json!("last")),
        ("/panels/0/targets/0/editorMode", json!("codes")),
        ("/panels/0/fieldConfig/defaults/thresholds/mode", json!("abs")),
        ("/panels/6/fieldConfig/defaults/custom/drawStyle", json!("lines")),
        ("/templating/list/0/type", json!("queries")),
    ] {
        let mut broken = board("overview");
        let (parent, key) = place.rsplit_once('/').unwrap();
        broken.pointer_mut(parent).unwrap()[key] = value;
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("broken.json");
        fs::write(&file, broken.to_string()).unwrap();
        let (good, said) = check(&[file]);
        assert!(!good && said.lines().count() == 1, "{place}: {said}");
    }
}

/// Grafana finds the dashboards where they lie when `grafana/` is its provisioning directory.
#[test]
fn provisioning_is_well_formed() {
    let read = |file: &str| -> Value {
        let text = fs::read_to_string(directory().join(file)).unwrap();
        serde_yaml::from_str(&text).unwrap()
    };
    let provider = &read("dashboards/narrows.yaml")["providers"][0];
    assert_eq!(
        (text(provider, "type"), text(&provider["options"], "path")),
        ("file", "/etc/grafana/provisioning")
    );
    assert_eq!(
        read("datasources/prometheus.yaml")["datasources"][0]["type"],
        "prometheus"
    );
    for file in fs::read_dir(directory()).unwrap() {
        let file = file.unwrap().file_name().into_string().unwrap();
        if let Some(name) = file.strip_suffix(".json") {
            assert!(BOARDS.contains(&name), "{name} is not tested");
        }
    }
}
