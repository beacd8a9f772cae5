//! What is in `grafana/`, read back.

use std::{fs, path::PathBuf};

use serde_json::Value;

/// The dashboards, without `.json`.
pub const BOARDS: [&str; 4] = ["overview", "link", "rooms", "queue"];

/// The directory that is mounted into Grafana.
pub fn directory() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/grafana"))
}

/// A query of a panel, a variable or an annotation.
#[derive(Debug)]
pub struct Query {
    /// Where it stands, for who reads a failure.
    pub place: String,
    pub expr: String,
    /// Asked once, for the end of the time shown.
    pub instant: bool,
    /// The panel says what it shows when there is nothing, so there may be nothing.
    pub may_be_empty: bool,
}

pub fn board(name: &str) -> Value {
    let path = directory().join(format!("{name}.json"));
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A list in a value; what is missing is empty.
pub fn list<'v>(value: &'v Value, key: &str) -> impl Iterator<Item = &'v Value> {
    value[key].as_array().into_iter().flatten()
}

pub fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or_default()
}

/// The panels that show something; rows only part them.
pub fn panels(board: &Value) -> impl Iterator<Item = &Value> {
    list(board, "panels").filter(|panel| panel["type"] != "row")
}

/// Every query of a dashboard.
pub fn queries(name: &str, board: &Value) -> Vec<Query> {
    let mut queries = Vec::new();
    for panel in panels(board) {
        for target in list(panel, "targets") {
            queries.push(Query {
                place: format!("{name}: {} ({})", text(panel, "title"), text(target, "legendFormat")),
                expr: text(target, "expr").to_owned(),
                instant: target["instant"] == true,
                may_be_empty: panel["fieldConfig"]["defaults"].get("noValue").is_some(),
            });
        }
    }
    for annotation in list(&board["annotations"], "list") {
        queries.push(Query {
            place: format!("{name}: annotation {}", text(annotation, "name")),
            expr: text(annotation, "expr").to_owned(),
            instant: false,
            may_be_empty: false,
        });
    }
    queries
}

/// Every rule of `alerts.yaml`.
pub fn alerts() -> Vec<Value> {
    let path = directory().join("alerts.yaml");
    let content = fs::read_to_string(&path).expect("alerts.yaml is there");
    let rules: Value = serde_yaml::from_str(&content).expect("alerts.yaml is YAML");
    list(&rules, "groups")
        .flat_map(|group| list(group, "rules"))
        .cloned()
        .collect()
}

/// The names of metrics in an expression, as they stand there.
pub fn names(expr: &str) -> Vec<String> {
    expr.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .filter(|word| word.starts_with("narrows_") || word.starts_with("process_"))
        .map(str::to_owned)
        .collect()
}
