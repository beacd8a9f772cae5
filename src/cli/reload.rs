//! What a new configuration changes in a process that runs, and what it cannot.
//!
//! A [`Plan`] compares two configurations. What can change at once does: the queue, the mirror, the log's level, peers that come
//! and go. What both ends of a connection have agreed on changes with the next one. The rest needs a restart, stays as it was, and is
//! named. [`Outcome`] says all of it; the running process and `narrows reload` share it.

use std::{collections::BTreeSet, fmt, net::SocketAddr};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::status::{self, StatusError};
use crate::config::{Config, Link, Log, Mirror, Peer};

/// What a reload came to: the body of the answer to `POST /reload`. Keys are only added, as in [`status::Status`].
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Outcome {
    /// Why the file was not taken. Then nothing has changed.
    pub errors: Vec<String>,
    pub warnings: Vec<String>,
    /// What is in force now: keys, and peers.
    pub applied: Vec<String>,
    /// What is in force with the next connection of a link.
    pub next_connection: Vec<String>,
    /// What stays as it was until a restart.
    pub restart: Vec<String>,
}

impl Outcome {
    pub fn refused(errors: impl IntoIterator<Item = impl ToString>) -> Self {
        Self {
            errors: errors.into_iter().map(|error| error.to_string()).collect(),
            ..Self::default()
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (head, list) in [
            ("in force", &self.applied),
            ("in force with the next connection", &self.next_connection),
            ("needs a restart", &self.restart),
        ] {
            if !list.is_empty() {
                writeln!(f, "{head}: {}", list.join(", "))?;
            }
        }
        if self.applied.is_empty() && self.next_connection.is_empty() && self.restart.is_empty() {
            f.write_str("nothing has changed\n")?;
        }
        Ok(())
    }
}

/// How to get from one configuration to another without a restart.
#[derive(Debug)]
pub struct Plan {
    /// What is in force afterwards.
    pub effective: Config,
    pub added: Vec<Peer>,
    pub removed: Vec<Peer>,
    pub outcome: Outcome,
}

/// Of `link:`, what is agreed on when a connection begins. The rest of what can change applies to the next batch.
const OF_A_CONNECTION: &[&str] = &[
    "link.ack_delay",
    "link.keepalive",
    "link.keepalive_max",
    "link.quiet_after",
    "link.dead_after",
    "link.fragment_bytes",
    "link.compression",
];

impl Plan {
    pub fn new(old: &Config, new: &Config) -> Self {
        let named = |peers: &[Peer], peer: &Peer| peers.iter().find(|other| other.name == peer.name).cloned();
        let (mut kept, mut restart) = (Vec::new(), Vec::new());
        for peer in old
            .peers
            .iter()
            .filter_map(|peer| named(&new.peers, peer).map(|now| (peer, now)))
        {
            if *peer.0 != peer.1 {
                restart.push(format!("the peer {}", peer.0.name));
            }
            kept.push(peer.0.clone());
        }
        let removed: Vec<Peer> = old
            .peers
            .iter()
            .filter(|peer| named(&new.peers, peer).is_none())
            .cloned()
            .collect();
        let mut added = Vec::new();
        for peer in new.peers.iter().filter(|peer| named(&old.peers, peer).is_none()) {
            // What stays as it was until a restart may have what this one is to have.
            if clashes(peer, old, &kept) {
                restart.push(format!("the peer {}", peer.name));
            } else {
                added.push(peer.clone());
            }
        }
        let mut peers = kept;
        peers.extend(added.iter().cloned());
        let effective = Config {
            profile: new.profile,
            peers,
            queue: new.queue.clone(),
            mirror: Mirror {
                enabled: old.mirror.enabled,
                ..new.mirror.clone()
            },
            link: Link {
                private_key: old.link.private_key.clone(),
                listen: old.link.listen,
                reconnect_max: old.link.reconnect_max,
                ..new.link.clone()
            },
            log: Log {
                level: new.log.level,
                ..old.log.clone()
            },
            ..old.clone()
        };
        let (next_connection, mut applied): (Vec<String>, Vec<String>) = differences(old, &effective)
            .into_iter()
            .partition(|key| OF_A_CONNECTION.contains(&key.as_str()));
        applied.extend(added.iter().map(|peer| format!("the peer {} is added", peer.name)));
        applied.extend(removed.iter().map(|peer| format!("the peer {} is removed", peer.name)));
        let mut keys = differences(&effective, new);
        keys.append(&mut restart);
        Self {
            effective,
            added,
            removed,
            outcome: Outcome {
                applied,
                next_connection,
                restart: keys,
                ..Outcome::default()
            },
        }
    }
}

/// Whether a peer would share with those that stay what only one can have.
fn clashes(peer: &Peer, old: &Config, kept: &[Peer]) -> bool {
    let taken: BTreeSet<&str> = kept
        .iter()
        .flat_map(|other| &other.domains)
        .chain(&old.local.domains)
        .map(|domain| domain.0.as_str())
        .collect();
    let same_file = |other: &Peer| other.name.as_str().eq_ignore_ascii_case(peer.name.as_str());
    peer.domains.iter().any(|domain| taken.contains(domain.0.as_str()))
        || kept.iter().any(|other| other.public_key == peer.public_key)
        // Names become file names, and a peer that goes may still have its file open.
        || old.peers.iter().any(same_file)
}

/// The keys in which two configurations differ; lists are compared as wholes, and peers not at all.
fn differences(one: &Config, other: &Config) -> Vec<String> {
    let value = |config: &Config| {
        let mut value = serde_json::to_value(config).unwrap_or_default();
        if let Some(map) = value.as_object_mut() {
            map.remove("peers");
        }
        value
    };
    let mut found = Vec::new();
    compare(&value(one), &value(other), "", &mut found);
    found
}

fn compare(one: &Value, other: &Value, path: &str, found: &mut Vec<String>) {
    match (one, other) {
        (Value::Object(one), Value::Object(other)) => {
            let keys: BTreeSet<&String> = one.keys().chain(other.keys()).collect();
            for key in keys {
                let path = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                let of = |map: &serde_json::Map<String, Value>| map.get(key).cloned().unwrap_or_default();
                compare(&of(one), &of(other), &path, found);
            }
        }
        (one, other) if one != other => found.push(path.to_owned()),
        _ => {}
    }
}

/// Asks the sidecar at this admin port to read its configuration again.
pub fn ask(address: SocketAddr) -> Result<Outcome, StatusError> {
    let value = status::ask(address, "POST", "/reload")?;
    serde_json::from_value(value).map_err(|error| StatusError::Answer {
        address,
        why: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const CONFIG: &str = "\
site: ship
data_dir: /var/lib/narrows
local: {domains: [b.example]}
link: {listen: 0.0.0.0:5270, private_key: /etc/narrows/key}
peers:
  - {name: shore, domains: [a.example], public_key: AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=}
  - {name: north, domains: [n.example], public_key: AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=}
";

    fn config(text: &str) -> Config {
        Config::parse(Path::new("n.yaml"), text, |_| None)
            .unwrap_or_else(|errors| panic!("{errors:#?}"))
            .0
    }

    fn plan(text: &str) -> Plan {
        Plan::new(&config(CONFIG), &config(text))
    }

    /// What can change does, what cannot stays as it was, and both are named.
    #[test]
    fn what_changes_is_told_from_what_cannot() {
        let text = CONFIG
            .replace("site: ship", "site: vessel")
            .replace("5270", "5271")
            .replace(
                "link: {",
                "link: {ack_delay: 1s, batch_bytes: 2KiB, reconnect_max: 9s, ",
            );
        let more = "queue: {entries_max: 5000, rules: [{name: r, drop: true}]}\nmirror: {enabled: false, echo: local}\nlog: {level: warn, format: json}\n";
        let plan = plan(&(text + more));
        let outcome = plan.outcome;
        assert_eq!(
            outcome.applied,
            [
                "link.batch_bytes",
                "log.level",
                "mirror.echo",
                "queue.entries_max",
                "queue.rules"
            ]
        );
        assert_eq!(outcome.next_connection, ["link.ack_delay"]);
        assert_eq!(
            outcome.restart,
            [
                "link.listen",
                "link.reconnect_max",
                "log.format",
                "mirror.enabled",
                "site"
            ]
        );
        assert_eq!(plan.effective.queue.entries_max, 5000);
        assert_eq!(
            (plan.effective.site.as_str(), plan.effective.mirror.enabled),
            ("ship", true)
        );
        assert_eq!(
            outcome.to_string(),
            "in force: link.batch_bytes, log.level, mirror.echo, queue.entries_max, queue.rules\n\
             in force with the next connection: link.ack_delay\n\
             needs a restart: link.listen, link.reconnect_max, log.format, mirror.enabled, site\n"
        );
        assert_eq!(self::plan(CONFIG).outcome.to_string(), "nothing has changed\n");
    }

    /// Peers come and go. One that is changed stays as it was until a restart, and so does what would take something from it.
    #[test]
    fn peers_come_and_go() {
        const KEY: &str = "AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM=";
        let south = format!("  - {{name: south, domains: [s.example], public_key: {KEY}}}\n");
        let names = |peers: &[Peer]| peers.iter().map(|peer| peer.name.to_string()).collect::<Vec<_>>();

        let north = CONFIG.lines().last().unwrap();
        let swapped = plan(&(CONFIG.replace(&format!("{north}\n"), "") + &south));
        assert_eq!(
            (names(&swapped.added), names(&swapped.removed)),
            (vec!["south".to_owned()], vec!["north".to_owned()])
        );
        assert_eq!(names(&swapped.effective.peers), ["shore", "south"]);
        assert_eq!(
            swapped.outcome.applied,
            ["the peer south is added", "the peer north is removed"]
        );
        assert!(swapped.outcome.restart.is_empty());

        let changed = plan(&CONFIG.replace("a.example", "c.example"));
        assert_eq!(changed.outcome.restart, ["the peer shore"]);
        assert_eq!(changed.effective.peers, config(CONFIG).peers);

        // `shore` gives its domain away, but has it until the restart; a name that differs in case is the same file.
        let moved = plan(&(CONFIG.replace("a.example", "c.example") + &south.replace("s.example", "a.example")));
        assert_eq!(moved.outcome.restart, ["the peer shore", "the peer south"]);
        assert!(moved.added.is_empty());
        let renamed = plan(&CONFIG.replace("name: north", "name: North"));
        assert_eq!(
            (names(&renamed.removed), renamed.outcome.restart),
            (vec!["north".to_owned()], vec!["the peer North".to_owned()])
        );
    }
}
