//! Every key of the configuration says something: changed, it changes what the parts are told, and each part has a test that it obeys.

use std::{collections::BTreeSet, fs, path::Path};

use serde_yaml::Value;

use super::*;
use crate::{cli::explain::explain, config::Name, queue::class::Class};

/// A configuration in which everything is given that keys may be about.
const BASE: &str = "
site: ship
data_dir: /var/lib/narrows
local: {domains: [b.example, conference.b.example]}
link: {listen: '0.0.0.0:5270', private_key: /etc/narrows/key}
peers: [{name: shore, domains: [a.example], public_key: AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=}]
";

/// A key, what is written in its place, what the parts are told, of which this must be a part then and not before, and the test that shows
/// that it is obeyed.
struct Key {
    key: &'static str,
    yaml: &'static str,
    told: fn(&Config) -> String,
    then: &'static str,
    obeyed: &'static str,
}

const fn key(
    key: &'static str,
    yaml: &'static str,
    told: fn(&Config) -> String,
    then: &'static str,
    obeyed: &'static str,
) -> Key {
    Key {
        key,
        yaml,
        told,
        then,
        obeyed,
    }
}

fn relay(config: &Config) -> Settings {
    settings(config, &config.peers[0])
}

fn mirror(config: &Config) -> String {
    format!("{:?}", relay(config).mirror)
}

fn session(config: &Config) -> String {
    format!("{:?}", relay(config).session)
}

fn times(config: &Config) -> String {
    format!("{:?}", link_times(config))
}

fn identified(config: &Config) -> String {
    format!("{:?}", config.identity())
}

fn log(config: &Config) -> String {
    format!("{:?}", config.log)
}

/// What becomes of a message that has some of everything.
fn explained(config: &Config) -> String {
    const STANZA: &str = "<message from='v@b.example/r' to='u@a.example/r' type='chat'><body>x</body>\
                          <event xmlns='urn:x'><items node='n'/></event></message>";
    const QUESTION: &str = "<iq from='v@b.example/r' to='u@a.example/r' type='get' id='i'><event xmlns='urn:x'/></iq>";
    const ANSWER: &str = "<message from='u@a.example/r' to='v@b.example/r' type='chat'><body>x</body></message>";
    [STANZA, QUESTION, ANSWER]
        .map(|stanza| explain(config, stanza.as_bytes()).expect("these are stanzas"))
        .join("\n")
}

fn classes(config: &Config) -> String {
    let classes = relay(config).classes;
    Class::ALL
        .map(|class| format!("{}: {:?}", class.as_label(), classes[class]))
        .join("\n")
}

const KEYS: &[Key] = &[
    key(
        "site",
        "site: vessel",
        |c| format!("{:?}", relay(c).site),
        "vessel",
        "tests/cli.rs run_answers_status_and_stops_on_a_signal",
    ),
    key(
        "data_dir",
        "data_dir: /other",
        |c| store_path(c, &c.peers[0].name).display().to_string(),
        "/other/shore.sqlite",
        "tests/e2e/reload.rs a_reload_changes_rules_and_peers_and_closes_nothing",
    ),
    key(
        "profile",
        "profile: hf",
        session,
        "ack_delay: 30s",
        "src/config/tests.rs profiles_stand_under_the_file",
    ),
    key(
        "local.domains",
        "local: {domains: [x.example]}",
        |c| format!("{:?}", site(c).unwrap().local),
        "x.example",
        "tests/spec/rfc6120.rs judges_the_header_from",
    ),
    key(
        "local.server",
        "local: {server: 'h.example:5555'}",
        |c| format!("{:?}", server(c)),
        "5555",
        "src/io/dns.rs a_fixed_address_is_taken_as_it_is",
    ),
    key(
        "legs.listen",
        "legs: {listen: ['127.0.0.1:1234']}",
        |c| format!("{:?}", c.legs.listen),
        "1234",
        "tests/cli.rs connections_from_the_server_are_bounded",
    ),
    key(
        "legs.certificates",
        "legs: {certificates: /elsewhere/ca}",
        identified,
        "/elsewhere/ca",
        "tests/legs.rs prosody_by_certificates",
    ),
    key(
        "legs.certificate.chain",
        "legs: {certificate: {chain: /c.pem, key: /k.pem}}",
        identified,
        "/c.pem",
        "tests/cli.rs a_certificate_of_the_sites_own_is_used",
    ),
    key(
        "legs.certificate.key",
        "legs: {certificate: {chain: /c.pem, key: /k.pem}}",
        identified,
        "/k.pem",
        "tests/cli.rs a_certificate_of_the_sites_own_is_used",
    ),
    key(
        "legs.trust",
        "legs: {trust: /roots.pem}",
        |c| format!("{:?}", c.legs.trust),
        "/roots.pem",
        "src/io/tls.rs verified_refuses_an_unknown_root",
    ),
    key(
        "legs.require_tls",
        "legs: {require_tls: false}",
        |c| site(c).unwrap().require_tls.to_string(),
        "false",
        "tests/spec/rfc6120.rs offers_dialback_beside_optional_tls",
    ),
    key(
        "legs.verify_server",
        "legs: {verify_server: true}",
        |c| format!("{:?}", trust(c)),
        "Verified",
        "src/io/tls.rs verified_refuses_an_unknown_root",
    ),
    key(
        "legs.management",
        "legs: {management: on}",
        |c| site(c).unwrap().offer_management.to_string(),
        "true",
        "tests/spec/xep0198.rs enabled_only_where_it_was_offered",
    ),
    key(
        "legs.lanes",
        "legs: {lanes: 3}",
        |c| relay(c).lanes_per_pair.to_string(),
        "3",
        "tests/sim/main.rs quiet_world",
    ),
    key(
        "legs.reconnect_max",
        "legs: {reconnect_max: 77s}",
        |c| format!("{:?}", relay(c).lane_retry_max),
        "77s",
        "src/relay/tests.rs a_held_lane_is_opened_until_the_server_is_back",
    ),
    key(
        "legs.connections_max",
        "legs: {connections_max: 7}",
        |c| c.legs.connections_max.to_string(),
        "7",
        "tests/cli.rs connections_from_the_server_are_bounded",
    ),
    key(
        "legs.limits.stanza_bytes",
        "legs: {limits: {stanza_bytes: 77KiB}}",
        |c| format!("{:?}", site(c).unwrap().after_authentication),
        "stanza_bytes_max: 78848",
        "src/codec/xml.rs keeps_the_limits",
    ),
    key(
        "legs.limits.depth",
        "legs: {limits: {depth: 77}}",
        |c| format!("{:?}", site(c).unwrap().after_authentication),
        "depth_max: 77",
        "src/codec/xml.rs keeps_the_limits",
    ),
    key(
        "legs.limits.attributes",
        "legs: {limits: {attributes: 77}}",
        |c| format!("{:?}", site(c).unwrap().after_authentication),
        "attributes_max: 77",
        "src/codec/xml.rs keeps_the_limits",
    ),
    key(
        "legs.limits.elements",
        "legs: {limits: {elements: 77}}",
        |c| format!("{:?}", site(c).unwrap().after_authentication),
        "elements_max: 77",
        "src/codec/xml.rs keeps_the_limits",
    ),
    key(
        "link.private_key",
        "link: {private_key: /other/key}",
        |c| c.link.private_key.display().to_string(),
        "/other/key",
        "tests/cli.rs keys_are_made_once",
    ),
    key(
        "link.listen",
        "link: {listen: '0.0.0.0:1234'}",
        |c| format!("{:?}", c.link.listen),
        "1234",
        "src/io/link/tests.rs peers_talk",
    ),
    key(
        "link.ack_delay",
        "link: {ack_delay: 7s}",
        session,
        "ack_delay: 7s",
        "src/link/session/tests.rs every_setting_is_obeyed",
    ),
    key(
        "link.keepalive",
        "link: {keepalive: off}",
        session,
        "keepalive: None",
        "src/link/session/tests.rs every_setting_is_obeyed",
    ),
    key(
        "link.keepalive_max",
        "link: {keepalive_max: 77m}",
        session,
        "keepalive_max: 4620s",
        "src/link/session/tests.rs every_setting_is_obeyed",
    ),
    key(
        "link.quiet_after",
        "link: {quiet_after: 7s}",
        session,
        "quiet_after: 7s",
        "src/link/session/tests.rs every_setting_is_obeyed",
    ),
    key(
        "link.dead_after",
        "link: {dead_after: 77s}",
        session,
        "dead_after: 77s",
        "src/link/session/tests.rs every_setting_is_obeyed",
    ),
    key(
        "link.reconnect_max",
        "link: {reconnect_max: 77s}",
        times,
        "retry_max: 77s",
        "src/io/link/tests.rs dials_until_the_peer_is_there",
    ),
    key(
        "link.batch_bytes",
        "link: {batch_bytes: 7KiB}",
        |c| relay(c).batch_bytes.to_string(),
        "7168",
        "tests/sim/main.rs quiet_world",
    ),
    key(
        "link.fragment_bytes",
        "link: {fragment_bytes: 777B}",
        session,
        "fragment_bytes_max: 777",
        "src/link/session/tests.rs every_setting_is_obeyed",
    ),
    key(
        "link.compression",
        "link: {compression: off}",
        |c| relay(c).compress.to_string(),
        "false",
        "src/relay/tests.rs compression_is_offered_if_it_is_wanted",
    ),
    key(
        "peers.name",
        "peers: [{name: north, domains: [a.example], public_key: AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=}]",
        |c| store_path(c, &c.peers[0].name).display().to_string(),
        "north.sqlite",
        "tests/e2e/reload.rs a_reload_changes_rules_and_peers_and_closes_nothing",
    ),
    key(
        "peers.domains",
        "peers: [{name: shore, domains: [a.example, x.example], public_key: AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=}]",
        |c| format!("{:?}", relay(c).far),
        "x.example",
        "tests/sim/main.rs dishonest_peer",
    ),
    key(
        "peers.public_key",
        "peers: [{name: shore, domains: [a.example], public_key: AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=}]",
        |c| peer_config(&c.peers[0]).unwrap().public_key.to_string(),
        "AgIC",
        "src/io/link/tests.rs unknown_key_is_refused",
    ),
    key(
        "peers.connect",
        "peers: [{name: shore, domains: [a.example], public_key: AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=, connect: 'h.example:5270'}]",
        |c| format!("{:?}", peer_config(&c.peers[0]).unwrap().connect),
        "h.example:5270",
        "src/io/link/tests.rs dials_until_the_peer_is_there",
    ),
    key(
        "queue.bytes_max",
        "queue: {bytes_max: 77MiB}",
        |c| relay(c).queue_bytes_max.to_string(),
        "80740352",
        "tests/sim/main.rs full_queues",
    ),
    key(
        "queue.entries_max",
        "queue: {entries_max: 7777}",
        |c| relay(c).queue_entries_max.to_string(),
        "7777",
        "tests/sim/main.rs full_queues",
    ),
    key(
        "queue.collapse_window",
        "queue: {collapse_window: 77ms}",
        |c| format!("{:?}", relay(c).collapse_window),
        "77ms",
        "src/queue/collapse.rs equal_copies_are_one_cast",
    ),
    key(
        "queue.rules.name",
        "queue: {rules: [{name: other, drop: true}]}",
        explained,
        "rule other: matches",
        "src/queue/rules.rs matches_are_counted_by_name",
    ),
    key(
        "queue.rules.match.stanza",
        "queue: {rules: [{name: r, match: {stanza: iq}, drop: true}]}",
        explained,
        "rule r: no, it is another kind",
        "src/queue/rules.rs every_condition_tells_fit_from_unfit",
    ),
    key(
        "queue.rules.match.type",
        "queue: {rules: [{name: r, match: {type: [normal]}, drop: true}]}",
        explained,
        "rule r: no, it has another type",
        "src/queue/rules.rs every_condition_tells_fit_from_unfit",
    ),
    key(
        "queue.rules.match.payload",
        "queue: {rules: [{name: r, match: {payload: urn:y}, drop: true}]}",
        explained,
        "rule r: no, it has no such payload",
        "src/queue/rules.rs every_condition_tells_fit_from_unfit",
    ),
    key(
        "queue.rules.match.node",
        "queue: {rules: [{name: r, match: {node: m}, drop: true}]}",
        explained,
        "rule r: no, its payload is about another node",
        "src/queue/rules.rs every_condition_tells_fit_from_unfit",
    ),
    key(
        "queue.rules.match.body",
        "queue: {rules: [{name: r, match: {body: false}, drop: true}]}",
        explained,
        "rule r: no, it differs in whether it has a body",
        "src/queue/rules.rs every_condition_tells_fit_from_unfit",
    ),
    key(
        "queue.rules.match.from",
        "queue: {rules: [{name: r, match: {from: 'w*@b.example'}, drop: true}]}",
        explained,
        "rule r: no, `from` is another",
        "src/queue/rules.rs every_condition_tells_fit_from_unfit",
    ),
    key(
        "queue.rules.match.to",
        "queue: {rules: [{name: r, match: {to: 'w*@a.example'}, drop: true}]}",
        explained,
        "rule r: no, `to` is another",
        "src/relay/tests.rs rules_judge_each_copy_by_itself",
    ),
    key(
        "queue.rules.match.larger_than",
        "queue: {rules: [{name: r, match: {larger_than: 1KiB}, drop: true}]}",
        explained,
        "rule r: no, it is not larger",
        "src/queue/rules.rs every_condition_tells_fit_from_unfit",
    ),
    key(
        "queue.rules.match.direction",
        "queue: {rules: [{name: r, match: {direction: received}, drop: true}]}",
        explained,
        "rule r: no, it goes the other way",
        "src/relay/tests.rs rules_judge_what_comes_from_the_peer",
    ),
    key(
        "queue.rules.match.peer",
        "queue: {rules: [{name: r, match: {peer: shore}, drop: true}]}",
        |c| {
            c.queue
                .rules_for(&"other".parse::<Name>().unwrap())
                .is_empty()
                .to_string()
                + &explained(c)
        },
        "rule r: matches",
        "src/config/tests.rs rules_are_read_as_written",
    ),
    key(
        "queue.rules.class",
        "queue: {rules: [{name: r, class: bulk}]}",
        explained,
        "class bulk (by itself message), weight 1",
        "src/relay/tests.rs rules_place_each_copy_by_itself",
    ),
    key(
        "queue.rules.expiry",
        "queue: {rules: [{name: r, expiry: 77m}]}",
        explained,
        "expires after 1h17m",
        "src/relay/tests.rs rules_place_each_copy_by_itself",
    ),
    key(
        "queue.rules.strip",
        "queue: {rules: [{name: r, strip: [urn:x]}]}",
        explained,
        "rule r: matches: strip urn:x\nit goes, with ",
        "src/queue/rules.rs what_is_taken_out_is_exact",
    ),
    key(
        "queue.rules.drop",
        "queue: {rules: [{name: r, drop: true}]}",
        explained,
        "it does not go, and its sender is told",
        "src/queue/rules.rs a_drop_is_told_to_whom_it_concerns",
    ),
    key(
        "queue.rules.observe",
        "queue: {rules: [{name: r, drop: true, observe: true}]}",
        explained,
        "would match, and only counts",
        "src/queue/rules.rs rules_are_asked_in_order",
    ),
    key(
        "mirror.enabled",
        "mirror: {enabled: false}",
        mirror,
        "enabled: false",
        "src/mirror/tests.rs every_setting_is_obeyed",
    ),
    key(
        "mirror.echo",
        "mirror: {echo: local}",
        mirror,
        "echo: Local",
        "src/mirror/tests.rs every_setting_is_obeyed",
    ),
    key(
        "mirror.echo_rtt_max",
        "mirror: {echo_rtt_max: 7s}",
        mirror,
        "echo_rtt_max: 7s",
        "src/mirror/tests.rs every_setting_is_obeyed",
    ),
    key(
        "mirror.rooms.match",
        "mirror: {rooms: [{match: 'x@a.example', echo: local}]}",
        |c| format!("{:?}", relay(c).mirror.echo_of("x@a.example")),
        "Local",
        "src/mirror/settings.rs first_rule_that_matches_wins",
    ),
    key(
        "mirror.rooms.echo",
        "mirror: {rooms: [{match: 'x@a.example', echo: local}]}",
        |c| format!("{:?}", relay(c).mirror.echo_of("x@a.example")),
        "Local",
        "src/mirror/settings.rs first_rule_that_matches_wins",
    ),
    key(
        "mirror.split.hold",
        "mirror: {split: {hold: 77s}}",
        mirror,
        "split_hold: 77s",
        "src/mirror/tests.rs every_setting_is_obeyed",
    ),
    key(
        "mirror.split.near",
        "mirror: {split: {near: away}}",
        mirror,
        "split_near: Away",
        "src/mirror/tests.rs every_setting_is_obeyed",
    ),
    key(
        "mirror.split.far",
        "mirror: {split: {far: hold}}",
        mirror,
        "split_far: Hold",
        "src/mirror/tests.rs every_setting_is_obeyed",
    ),
    key(
        "mirror.split.join",
        "mirror: {split: {join: provisional}}",
        mirror,
        "split_join: Provisional",
        "src/mirror/tests.rs every_setting_is_obeyed",
    ),
    key(
        "mirror.disco_lifetime",
        "mirror: {disco_lifetime: 77s}",
        mirror,
        "disco_lifetime: 77s",
        "src/mirror/tests.rs every_setting_is_obeyed",
    ),
    key(
        "mirror.delay_stamp_after",
        "mirror: {delay_stamp_after: 77s}",
        mirror,
        "delay_stamp_after: 77s",
        "src/mirror/tests.rs every_setting_is_obeyed",
    ),
    key(
        "admin.listen",
        "admin: {listen: '127.0.0.1:1234'}",
        |c| c.admin.listen.to_string(),
        "1234",
        "tests/cli.rs run_answers_status_and_stops_on_a_signal",
    ),
    key(
        "admin.show",
        "admin: {show: bodies}",
        |c| format!("{:?}", show(c)),
        "Bodies",
        "tests/e2e/watching.rs trace_tells_why_and_hides_who",
    ),
    key(
        "admin.room_metrics",
        "admin: {room_metrics: 7}",
        |c| c.admin.room_metrics.to_string(),
        "7",
        "src/io/watch.rs few_rooms_have_a_series",
    ),
    key(
        "log.level",
        "log: {level: trace}",
        log,
        "level: Trace",
        "tests/e2e/reload.rs a_reload_changes_rules_and_peers_and_closes_nothing",
    ),
    key(
        "log.format",
        "log: {format: json}",
        log,
        "format: Json",
        "src/cli/log.rs json_lines_are_objects",
    ),
    key(
        "log.show_addresses",
        "log: {show_addresses: true}",
        log,
        "show_addresses: true",
        "src/cli/log.rs addresses_are_shown_on_request",
    ),
];

/// The keys of a class, which are the same in each.
const CLASS_KEYS: &[(&str, &str, &str, &str)] = &[
    (
        "weight",
        "77",
        "weight: 77",
        "src/relay/tests.rs every_setting_of_a_class_is_obeyed",
    ),
    (
        "expiry",
        "77s",
        "expiry: Some(77s)",
        "src/relay/tests.rs every_setting_of_a_class_is_obeyed",
    ),
    (
        "entries_max",
        "77",
        "entries_max: 77",
        "src/relay/tests.rs every_setting_of_a_class_is_obeyed",
    ),
    (
        "bytes_max",
        "77KiB",
        "bytes_max: 78848",
        "src/relay/tests.rs every_setting_of_a_class_is_obeyed",
    ),
];

/// Keys that hold a value, commented out or not, in the example.
fn keys_of_the_example() -> BTreeSet<String> {
    let example = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("config/example.yaml")).unwrap();
    let mut keys = BTreeSet::new();
    let mut sections: Vec<(usize, &str)> = Vec::new();
    for line in example.lines() {
        let text = line.trim_start();
        let indent = line.len() - text.len();
        let text = text.strip_prefix('#').unwrap_or(text);
        if text.is_empty() || text.starts_with([' ', '-']) {
            continue;
        }
        let (name, value) = text.split_once(':').expect("a key");
        sections.retain(|(at, _)| *at < indent);
        sections.push((indent, name));
        if !value.is_empty() {
            keys.insert(sections.iter().map(|(_, name)| *name).collect::<Vec<_>>().join("."));
        }
    }
    keys
}

fn read(text: &str) -> Config {
    let read = Config::parse(Path::new("n.yaml"), text, |_| None);
    read.unwrap_or_else(|errors| panic!("{text}: {errors:#?}")).0
}

/// The base with other keys in place of some of its own.
fn with(yaml: &str) -> Config {
    fn put(into: &mut Value, from: Value) {
        match (into, from) {
            (Value::Mapping(into), Value::Mapping(from)) => {
                for (key, from) in from {
                    put(into.entry(key).or_insert(Value::Null), from);
                }
            }
            (into, from) => *into = from,
        }
    }
    let mut value: Value = serde_yaml::from_str(BASE).unwrap();
    put(&mut value, serde_yaml::from_str(yaml).unwrap());
    read(&serde_yaml::to_string(&value).unwrap())
}

fn is_obeyed(key: &str, obeyed: &str) {
    let (file, name) = obeyed.split_once(' ').expect("a file and a test");
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap_or_default();
    assert!(
        text.contains(&format!("fn {name}(")),
        "{key}: there is no test {name} in {file}"
    );
}

/// A key that nobody listens to, one that has no test, and one that is not in the list are found.
#[test]
fn every_key_of_the_example_says_something() {
    let base = read(BASE);
    let mut listed = BTreeSet::new();
    let mut deaf = Vec::new();
    for row in KEYS {
        let (before, after) = ((row.told)(&base), (row.told)(&with(row.yaml)));
        if before.contains(row.then) || !after.contains(row.then) {
            deaf.push(format!(
                "{}: wanted {:?}, told {after}; before {before}",
                row.key, row.then
            ));
        }
        is_obeyed(row.key, row.obeyed);
        listed.insert(row.key.to_owned());
    }
    for class in Class::ALL.into_iter().filter(|class| *class != Class::Control) {
        for (name, value, then, obeyed) in CLASS_KEYS {
            let key = format!("queue.classes.{}.{name}", class.as_label());
            let of_class = |told: &str| {
                let mut lines = told.lines().map(str::to_owned);
                lines.find(|line| line.starts_with(class.as_label())).unwrap()
            };
            let (before, after) = (
                of_class(&classes(&base)),
                classes(&with(&format!(
                    "queue: {{classes: {{{}: {{{name}: {value}}}}}}}",
                    class.as_label()
                ))),
            );
            assert!(!before.contains(then), "{key}: this is so without it");
            assert!(of_class(&after).contains(then), "{key}: wanted {then}, told {after}");
            is_obeyed(&key, obeyed);
            listed.insert(key);
        }
    }
    assert!(deaf.is_empty(), "{}", deaf.join("\n\n"));
    let example = keys_of_the_example();
    assert!(example.len() > 80, "{example:?}");
    let missing: Vec<_> = example.difference(&listed).collect();
    assert!(missing.is_empty(), "keys without a row: {missing:?}");
    let gone: Vec<_> = listed.difference(&example).collect();
    assert!(gone.is_empty(), "rows without a key: {gone:?}");
}
