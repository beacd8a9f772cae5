//! The three forms of the configuration agree, and every mistake is shown where it is.

use std::{collections::BTreeSet, fmt::Write as _, fs, path::Path, time::Duration};

use serde_json::Value;

use super::*;
use crate::{
    queue::{class::Class, rules},
    stanza,
};

/// A configuration with nothing but what is needed.
const SMALL: &str = "\
site: ship
data_dir: /var/lib/narrows
local:
  domains: [b.example, conference.b.example]
link:
  listen: 0.0.0.0:5270
  private_key: /etc/narrows/key
peers:
  - name: shore
    domains: [a.example]
    public_key: AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=
";

fn parse(text: &str) -> Result<(Config, Vec<Warning>), Vec<ConfigError>> {
    Config::parse(Path::new("n.yaml"), text, |_| None)
}

/// The mistakes of `text`, as shown, in the order of the file.
fn mistakes(text: &str) -> Vec<String> {
    parse(text).unwrap_err().iter().map(ToString::to_string).collect()
}

/// The one mistake that [`SMALL`] has after `from` became `to`.
fn mistake(from: &str, to: &str) -> String {
    assert!(SMALL.contains(from), "{from}");
    let all = mistakes(&SMALL.replacen(from, to, 1));
    assert_eq!(all.len(), 1, "{all:#?}");
    all[0].clone()
}

/// What is left out has its default, and an empty section is none.
#[test]
fn small_configuration_has_the_defaults() {
    let (config, warnings) = parse(SMALL).unwrap();
    assert!(warnings.is_empty());
    assert_eq!(config.legs, Legs::default());
    assert_eq!(config.queue, Queue::default());
    assert_eq!(config.mirror.settings(), mirror::MirrorSettings::default());
    assert_eq!(config.identity(), Identity::Ca("/var/lib/narrows/ca".into()));
    assert_eq!(config.peers[0].public_key.bytes(), &[1; 32]);
    assert_eq!(parse(&format!("{SMALL}admin:\nlegs:\n  trust:\n")).unwrap().0, config);
}

/// A key that does not exist is shown with its place and the key that was likely meant.
#[test]
fn unknown_key_is_shown_with_the_likely_one() {
    assert_eq!(
        mistake("  listen: 0", "  lisen: 0").lines().collect::<Vec<_>>()[..4],
        [
            "n.yaml:6:3: link.lisen: there is no such key",
            " 6 |   lisen: 0.0.0.0:5270",
            "   |   ^",
            "   help: did you mean `listen`?",
        ]
    );
}

/// Wrong types, values and names each get a message of their own, at the value.
#[test]
fn wrong_values_are_shown_where_they_are() {
    for (from, to, wanted) in [
        (
            "site: ship",
            "site: [ship]",
            "n.yaml:1:7: site: this is a list, but it must be a name",
        ),
        (
            "site: ship",
            "site: 5",
            "n.yaml:1:7: site: this is the number `5`, but it must be a name",
        ),
        (
            "data_dir: /var/lib/narrows\n",
            "",
            "n.yaml:1:1: data_dir: this key is needed",
        ),
        (
            "  private_key: /etc/narrows/key\n",
            "",
            "n.yaml:5:1: link.private_key: this key is needed",
        ),
        ("AQEBAQ", "", "n.yaml:11:17: peers[0].public_key: not a public key: it "),
        (
            "conference.b",
            "conference b",
            "n.yaml:4:24: local.domains[1]: `conference b.example` is not a domain",
        ),
        (
            "0.0.0.0:5270",
            "0.0.0.0",
            "n.yaml:6:11: link.listen: `0.0.0.0` is not an address to listen on",
        ),
        (
            "link:",
            "legs: {lanes: many}\nlink:",
            "n.yaml:5:15: legs.lanes: this is the text \"many\", but it must be a whole number",
        ),
        (
            "link:",
            "legs: {lanes: 9}\nlink:",
            "n.yaml:5:15: legs.lanes: this must be from 1 to 8",
        ),
        (
            "link:",
            "link:\n  compression: ztsd",
            "n.yaml:6:16: link.compression: `ztsd` is not possible here, only zstd, off",
        ),
        (
            "link:",
            "link:\n  ack_delay: 200",
            "n.yaml:6:14: link.ack_delay: this is the number `200`, but it must be a period",
        ),
        (
            "link:",
            "link:\n  reconnect_max: 0s",
            "n.yaml:6:18: link.reconnect_max: this must be more than nothing",
        ),
        (
            "link:",
            "queue: {bytes_max: 1KiB}\nlink:",
            "n.yaml:5:20: queue.bytes_max: one stanza may have 512KiB",
        ),
        (
            "link:",
            "mirror: {enabled: maybe}\nlink:",
            "n.yaml:5:19: mirror.enabled: this is the text \"maybe\", but it must be true or false",
        ),
        (
            "link:",
            "mirror: {split: {far: gone}}\nlink:",
            "n.yaml:5:23: mirror.split.far: `gone` is not possible here, only leave, away, hold",
        ),
        (
            "link:",
            "mirror: {split: {hold: 0s}}\nlink:",
            "n.yaml:5:24: mirror.split.hold: this must be more than nothing",
        ),
        (
            "link:",
            "mirror: {split: {hold: 2days}}\nlink:",
            "n.yaml:5:24: mirror.split.hold: 1day is the most",
        ),
        (
            "link:",
            "mirror: {echo_rtt_max: 61s}\nlink:",
            "n.yaml:5:24: mirror.echo_rtt_max: 1m is the most",
        ),
        (
            "link:",
            "mirror: {disco_lifetime: 25h}\nlink:",
            "n.yaml:5:26: mirror.disco_lifetime: 1day is the most",
        ),
        (
            "link:",
            "mirror: {disco_lifetime: never}\nlink:",
            "n.yaml:5:26: mirror.disco_lifetime: `never` is not a period: write",
        ),
        (
            "link:",
            "mirror: {delay_stamp_after: 2h}\nlink:",
            "n.yaml:5:29: mirror.delay_stamp_after: 1h is the most",
        ),
        (
            "link:",
            "mirror:\n  rooms:\n    - {match: '*', echo: local}\nlink:",
            "n.yaml:7:15: mirror.rooms[0].match: `*` is not the address of a room",
        ),
        (
            "link:",
            "mirror:\n  rooms:\n    - {match: '*@a.example'}\nlink:",
            "n.yaml:7:7: mirror.rooms[0].echo: this key is needed",
        ),
        (
            "link:",
            "mirror:\n  rooms:\n    - {match: '*@a.example', echo: locally}\nlink:",
            "n.yaml:7:36: mirror.rooms[0].echo: `locally` is not possible here, only reflect, local, auto",
        ),
        (
            "link:",
            "mirror:\n  rooms:\n    - {match: '*@a.example', echo: local}\n    - {match: '*@A.example', echo: auto}\nlink:",
            "n.yaml:8:15: mirror.rooms[1].match: `*@a.example` is listed twice: the first counts",
        ),
        (
            "  - name: shore",
            "  - shore\n  - name: shore",
            "n.yaml:9:5: peers[0]: ",
        ),
        (
            "site: ship",
            "site: ship\nsite: shore",
            "n.yaml:2:1: `site` stands here twice",
        ),
        ("site: ship", "site: ship\n\tx: y", "n.yaml:2:1: "),
    ] {
        let shown = mistake(from, to);
        assert!(shown.starts_with(wanted), "wanted {wanted:?}, got\n{shown}");
    }
    assert!(mistake("link:", "link:\n  compression: ztsd").contains("did you mean `zstd`?"));
    assert!(mistake("site: ship", "site: ship\n\tx: y").contains("not with tabs"));
    assert!(mistakes("")[0].contains("holds no configuration"));
    assert!(mistakes("- a")[0].contains("holds no configuration"));
    assert!(
        Config::load(Path::new("/nonexistent/n.yaml")).unwrap_err()[0]
            .to_string()
            .contains("cannot be read")
    );
}

/// What only the whole shows to be wrong is found, and shown at the key to change.
#[test]
fn impossible_combinations_are_refused() {
    let second = "  - {name: shore2, domains: [c.example], public_key: AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=}\n";
    let with_second = |from: &str, to: &str| {
        let all = mistakes(&format!("{SMALL}{}", second.replacen(from, to, 1)));
        assert_eq!(all.len(), 1, "{all:#?}");
        all[0].clone()
    };
    assert!(parse(&format!("{SMALL}{second}")).is_ok());
    for (shown, wanted) in [
        (
            mistake("[a.example]", "[B.example]"),
            "n.yaml:10:15: peers[0].domains[0]: `b.example` belongs to the local server already",
        ),
        (
            mistake("[a.example]", "[a.example, A.example]"),
            "n.yaml:10:26: peers[0].domains[1]: `a.example` is listed twice",
        ),
        (
            mistake("[a.example]", "[]"),
            "n.yaml:10:14: peers[0].domains: at least one domain",
        ),
        (
            with_second("c.example", "a.example"),
            "n.yaml:12:30: peers[1].domains[0]: `a.example` belongs to the peer `shore` already",
        ),
        (
            with_second("shore2", "Shore"),
            "n.yaml:12:12: peers[1].name: there are two peers called `Shore`",
        ),
        (
            with_second(
                "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=",
                "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=",
            ),
            "n.yaml:12:54: peers[1].public_key: the peer `shore` has this key already",
        ),
        (
            mistake("  listen: 0.0.0.0:5270\n", ""),
            "n.yaml:8:5: peers[0]: no link to `shore` can come about",
        ),
        (
            mistake(
                "link:",
                "legs: {certificates: /a, certificate: {chain: /a, key: /b}}\nlink:",
            ),
            "n.yaml:5:39: legs.certificate: there is `certificates` too",
        ),
        (
            mistake("0.0.0.0:5270", "0.0.0.0:5299"),
            "n.yaml:6:11: link.listen: another listener has 0.0.0.0:5299",
        ),
        (
            mistake("link:", "admin: {listen: '127.0.0.1:5270'}\nlink:"),
            "n.yaml:5:17: admin.listen: another listener",
        ),
        (
            mistake("link:", "link:\n  dead_after: 2s"),
            "n.yaml:5:1: link.quiet_after: this must be less than `dead_after`, which is 2s",
        ),
        (
            mistake("link:", "link:\n  keepalive: 1h"),
            "n.yaml:6:14: link.keepalive: this must be at most `keepalive_max`, which is 8m",
        ),
        (
            mistake("link:", "link:\n  batch_bytes: 512B"),
            "n.yaml:5:1: link.fragment_bytes: a fragment must fit",
        ),
    ] {
        assert!(shown.starts_with(wanted), "wanted {wanted:?}, got\n{shown}");
    }
    let own = Config::parse(Path::new("n.yaml"), SMALL, |file| {
        assert_eq!(file, Path::new("/etc/narrows/key"));
        Some(PublicKey([1; 32]))
    });
    assert!(
        own.unwrap_err()[0]
            .to_string()
            .starts_with("n.yaml:11:17: peers[0].public_key: this is our own")
    );
}

/// All mistakes come at once, in the order of the file, and one mistake does not make a second one elsewhere.
#[test]
fn all_mistakes_are_shown_at_once() {
    let text = SMALL
        .replace("site: ship\n", "sit: ship\n")
        .replace("listen: 0.0.0.0:5270", "listen: anywhere")
        .replace("[a.example]", "[a.example, b.example, 'x y']")
        .replace("    public_key", "    publik_key");
    let all = mistakes(&text);
    let heads: Vec<&str> = all.iter().filter_map(|one| one.lines().next()).collect();
    assert_eq!(
        heads,
        [
            "n.yaml:1:1: sit: there is no such key",
            "n.yaml:6:11: link.listen: `anywhere` is not an address to listen on: write an IP address and a port, like `127.0.0.1:5299` or `[::]:5270`",
            "n.yaml:10:26: peers[0].domains[1]: `b.example` belongs to the local server already: a domain is at one site",
            "n.yaml:10:37: peers[0].domains[2]: `x y` is not a domain by RFC 7622 §3.2",
            "n.yaml:11:5: peers[0].publik_key: there is no such key",
        ],
        "{all:#?}"
    );
}

/// A file that is wrong in every way ends in errors, never in a panic or a loop. Cut [`SMALL`] everywhere, put each kind of
/// value at every word.
#[test]
fn no_text_panics() {
    for end in 0..SMALL.len() {
        let _ = parse(&SMALL[..end]);
        for junk in [
            "5", "[]", "{}", "~", "\"", "&a", "*a", "- x", ": ", "!t x", "<<: *a", "\u{0}", "x: y",
        ] {
            if SMALL.as_bytes()[end] == b' ' {
                let _ = parse(&format!("{} {junk}{}", &SMALL[..end], &SMALL[end..]));
            }
        }
    }
}

/// The mirror is given what was written, and asked for a room it answers by the rules.
#[test]
fn mirror_is_read_as_written() {
    let text = format!(
        "{SMALL}mirror:
  enabled: false
  echo: reflect
  echo_rtt_max: 800ms
  rooms:
    - {{match: 'Ops-*@a.example', echo: local}}
    - {{match: '*@a.example', echo: auto}}
  split: {{hold: 30s, near: away, far: hold}}
  disco_lifetime: off
  delay_stamp_after: 0s
"
    );
    let (config, warnings) = parse(&text).unwrap();
    assert!(warnings.is_empty(), "{warnings:?}");
    let settings = config.mirror.settings();
    let rule = |pattern: &str, echo| mirror::RoomRule {
        pattern: pattern.to_owned(),
        echo,
    };
    let expected = mirror::MirrorSettings {
        enabled: false,
        echo: mirror::Echo::Reflect,
        echo_rtt_max: Duration::from_millis(800),
        rooms: vec![
            rule("ops-*@a.example", mirror::Echo::Local),
            rule("*@a.example", mirror::Echo::Auto),
        ],
        split_hold: Duration::from_secs(30),
        split_near: mirror::SplitNear::Away,
        split_far: mirror::SplitFar::Hold,
        split_join: mirror::SplitJoin::Refuse,
        disco_lifetime: Duration::ZERO,
        delay_stamp_after: Duration::ZERO,
    };
    assert_eq!(settings, expected);
    assert_eq!(settings.echo_of("ops-night@a.example"), mirror::Echo::Local);
    assert_eq!(settings.echo_of("hall@conference.a.example"), mirror::Echo::Reflect);
}

/// Rules are held against every message, so there is a bound to them.
#[test]
fn rules_for_rooms_are_bounded() {
    let rules = |count: usize| {
        let rules = (0..count).map(|room| format!("    - {{match: {room}@a.example, echo: local}}\n"));
        format!("{SMALL}mirror:\n  rooms:\n{}", rules.collect::<String>())
    };
    assert!(parse(&rules(100)).is_ok());
    let all = mistakes(&rules(101));
    assert_eq!(all.len(), 1, "{all:#?}");
    assert!(
        all[0].starts_with("n.yaml:14:5: mirror.rooms: 100 are the most"),
        "{}",
        all[0]
    );
}

/// The queue is given the classes as written, with the defaults of the class for what is left out.
#[test]
fn classes_are_read_as_written() {
    let text = format!(
        "{SMALL}queue:
  classes:
    message: {{weight: 20, expiry: off}}
    bulk: {{entries_max: 5, bytes_max: 1MiB}}
    state: {{entries_max: off}}
"
    );
    let classes = parse(&text).unwrap().0.queue.classes.settings();
    let mut expected = crate::queue::class::Classes::default();
    (expected[Class::Message].weight, expected[Class::Message].expiry) = (20, None);
    (expected[Class::Bulk].entries_max, expected[Class::Bulk].bytes_max) = (5, 1 << 20);
    expected[Class::State].entries_max = u64::MAX;
    assert_eq!(classes, expected);
    assert_eq!(
        parse(SMALL).unwrap().0.queue.classes.settings(),
        crate::queue::class::Classes::default()
    );
}

/// A peer's relay is given the rules that concern the peer, as written and in order.
#[test]
fn rules_are_read_as_written() {
    let text = format!(
        "{SMALL}queue:
  rules:
    - name: no-chat-states
      match: {{payload: http://jabber.org/protocol/chatstates composing, body: false, from: 'Conference.B.example'}}
      drop: true
    - {{name: elsewhere, match: {{peer: shore}}, class: bulk}}
    - name: cut
      match: {{direction: received, stanza: message, type: [chat, normal], node: 'n*', to: '*@b.example', larger_than: 1KiB}}
      strip: ['urn:x:*', 'urn:y y']
      observe: true
    - {{name: last, class: iq, expiry: off}}
"
    );
    let (config, warnings) = parse(&text).unwrap();
    assert!(warnings.is_empty(), "{warnings:?}");
    let payload = |namespace: &str, name: Option<&str>| rules::Payload {
        namespace: namespace.to_owned(),
        name: name.map(str::to_owned),
    };
    let rule = |name: &str, when, then| rules::Rule {
        name: name.into(),
        direction: rules::Direction::Sent,
        when,
        then,
        observe: false,
    };
    let place = |class, expiry| rules::Action::Place(rules::Placement { class, expiry });
    let elsewhere = rule(
        "elsewhere",
        rules::Conditions::default(),
        place(Some(Class::Bulk), None),
    );
    let all = [
        rule(
            "no-chat-states",
            rules::Conditions {
                payload: Some(payload("http://jabber.org/protocol/chatstates", Some("composing"))),
                body: Some(false),
                from: Some(rules::Pattern::new("conference.b.example")),
                ..rules::Conditions::default()
            },
            rules::Action::Drop,
        ),
        elsewhere.clone(),
        rules::Rule {
            direction: rules::Direction::Received,
            observe: true,
            ..rule(
                "cut",
                rules::Conditions {
                    kind: Some(stanza::Kind::Message),
                    types: vec![rules::Type::Chat, rules::Type::Normal],
                    node: Some("n*".to_owned()),
                    to: Some(rules::Pattern::new("*@b.example")),
                    larger_than: Some(1024),
                    ..rules::Conditions::default()
                },
                rules::Action::Strip(vec![payload("urn:x:*", None), payload("urn:y", Some("y"))]),
            )
        },
        rule("last", rules::Conditions::default(), place(Some(Class::Iq), Some(None))),
    ];
    assert_eq!(config.queue.rules_for(&"shore".parse().unwrap()), all);
    let others: Vec<_> = all.into_iter().filter(|rule| *rule != elsewhere).collect();
    assert_eq!(config.queue.rules_for(&"other".parse().unwrap()), others);
}

/// What a rule cannot mean is refused at the key to change, and what it hardly means is said.
#[test]
fn impossible_rules_are_refused() {
    // `n.yaml:14:5: path: text` as `14: path: text`.
    let lines_only = |shown: &str| {
        let parts: Vec<&str> = shown.splitn(4, ':').collect();
        format!("{}:{}", parts[1], parts[3])
    };
    for (rules, wanted) in [
        (
            "{name: a, drop: true, when: {}}",
            "14: queue.rules[0].when: there is no such key",
        ),
        (
            "{name: a, match: {tpye: [chat]}, drop: true}",
            "14: queue.rules[0].match.tpye: there is no such key",
        ),
        ("{name: a}", "14: queue.rules[0]: this rule does nothing"),
        ("{drop: true}", "14: queue.rules[0].name: this key is needed"),
        (
            "{name: a, drop: true, class: bulk}",
            "14: queue.rules[0]: a rule does one thing",
        ),
        (
            "{name: a, strip: [x], expiry: 1h}",
            "14: queue.rules[0]: a rule does one thing",
        ),
        (
            "{name: a b, drop: true}",
            "14: queue.rules[0].name: `a b` is not a name",
        ),
        (
            "{name: a, class: control}",
            "14: queue.rules[0].class: `control` is not a class, only urgent",
        ),
        (
            "{name: a, expiry: 500ms}",
            "14: queue.rules[0].expiry: this must be from 1s",
        ),
        (
            "{name: a, strip: [a b c]}",
            "14: queue.rules[0].strip[0]: `a b c` is not a payload",
        ),
        (
            "{name: a, match: {type: [chats]}, drop: true}",
            "14: queue.rules[0].match.type[0]: `chats` is not a type",
        ),
        (
            "{name: a, match: {type: [chat, get], stanza: message}, drop: true}",
            "14: queue.rules[0].match.type[1]: `get` is no type of message",
        ),
        (
            "{name: a, match: {stanza: iq}, strip: [x]}",
            "14: queue.rules[0].match.stanza: nothing can be taken out of an `iq`",
        ),
        (
            "{name: a, match: {direction: received}, class: bulk}",
            "14: queue.rules[0].match.direction: what has crossed has no class",
        ),
        (
            "{name: a, match: {peer: shoer}, drop: true}",
            "14: queue.rules[0].match.peer: there is no peer `shoer`, only shore",
        ),
        (
            "{name: a, match: {from: 'a@b@c'}, drop: true}",
            "14: queue.rules[0].match.from: `a@b@c` is not an address",
        ),
        (
            "{name: a, drop: true, observe: true}\n    - {name: a, class: iq}",
            "15: queue.rules[1].name: there are two rules called `a`",
        ),
    ] {
        let all = mistakes(&format!("{SMALL}queue:\n  rules:\n    - {rules}\n"));
        assert_eq!(all.len(), 1, "{rules}: {all:#?}");
        assert!(
            lines_only(&all[0]).starts_with(wanted),
            "wanted {wanted:?}, got\n{}",
            all[0]
        );
    }
    for (class, wanted) in [
        (
            "bulk: {weight: 0}",
            "14: queue.classes.bulk.weight: this must be from 1 to 1000",
        ),
        (
            "bulk: {weihgt: 1}",
            "14: queue.classes.bulk.weihgt: there is no such key",
        ),
        ("iq: {expiry: 0s}", "14: queue.classes.iq.expiry: this must be from 1s"),
        (
            "iq: {entries_max: 0}",
            "14: queue.classes.iq.entries_max: this must be 1 or more",
        ),
        (
            "iq: {entries_max: many}",
            "14: queue.classes.iq.entries_max: this is the text \"many\", but it must be a whole number, or `off`",
        ),
        (
            "iq: {bytes_max: 1kB}",
            "14: queue.classes.iq.bytes_max: this must be 5kB or more",
        ),
        (
            "control: {weight: 1}",
            "14: queue.classes.control: there is no such key",
        ),
    ] {
        let all = mistakes(&format!("{SMALL}queue:\n  classes:\n    {class}\n"));
        assert_eq!(all.len(), 1, "{class}: {all:#?}");
        assert!(
            lines_only(&all[0]).starts_with(wanted),
            "wanted {wanted:?}, got\n{}",
            all[0]
        );
    }
    let many: String = (0..101)
        .map(|n| format!("    - {{name: r{n}, match: {{body: true}}, drop: true}}\n"))
        .collect();
    let all = mistakes(&format!("{SMALL}queue:\n  rules:\n{many}"));
    assert_eq!(all.len(), 1, "{all:#?}");
    assert!(all[0].contains("queue.rules: 100 are the most"), "{}", all[0]);

    let odd = "    - {name: a, match: {to: '*@b.example'}, drop: true}\n    - {name: b, class: iq}\n    - {name: c, drop: true}\n";
    let warnings = parse(&format!("{SMALL}queue:\n  rules:\n{odd}")).unwrap().1;
    let warnings: Vec<String> = warnings.iter().map(ToString::to_string).collect();
    assert_eq!(warnings.len(), 2, "{warnings:#?}");
    assert!(
        warnings[0].contains("queue.rules[0].match.to: this matches nobody"),
        "{}",
        warnings[0]
    );
    assert!(
        warnings[1].contains("queue.rules[2]: this is never asked: `b` before it"),
        "{}",
        warnings[1]
    );
}

/// A profile stands under the file: own keys win, a list as a whole, and a value that comes from it is said to.
#[test]
fn profiles_stand_under_the_file() {
    let hf = parse(&format!("{SMALL}profile: hf\n")).unwrap().0;
    assert_eq!(hf.link.ack_delay, Period::from_secs(30));
    assert_eq!(
        (hf.link.keepalive, hf.link.keepalive_max),
        (PeriodOrOff::Off, Link::keepalive_max())
    );
    assert!(hf.queue.rules.iter().any(|rule| rule.name.as_str() == "hf-avatars"));
    let own = format!(
        "{}profile: hf\nqueue: {{rules: [], classes: {{iq: {{weight: 9}}}}}}\nmirror:\n",
        SMALL.replace("link:", "link:\n  ack_delay: 3s")
    );
    let own = parse(&own).unwrap().0;
    assert_eq!(own.link.ack_delay, Period::from_secs(3));
    assert_eq!(own.link.quiet_after, hf.link.quiet_after);
    assert_eq!((own.queue.rules.len(), own.mirror.echo), (0, Echo::Local));
    let iq = own.queue.classes.settings()[Class::Iq];
    assert_eq!((iq.weight, iq.expiry), (9, Some(Duration::from_secs(300))));

    let all = mistakes(&format!(
        "{}profile: hf\n",
        SMALL.replace("link:", "link:\n  dead_after: 10s")
    ));
    assert_eq!(all.len(), 1, "{all:#?}");
    assert!(
        all[0].starts_with("n.yaml:5:1: link.quiet_after: this must be less than `dead_after`, which is 10s"),
        "{}",
        all[0]
    );
    assert!(
        all[0].ends_with("help: this value comes from `profile: hf`; the key in this file would win"),
        "{}",
        all[0]
    );
    let unknown = mistakes(&format!("{SMALL}profile: vast\n"));
    assert!(
        unknown[0].contains("`vast` is not possible here, only lan, vsat, satcom, hf"),
        "{}",
        unknown[0]
    );
    assert!(unknown[0].contains("did you mean `vsat`?"), "{}", unknown[0]);
}

/// Each profile can be used as it is, has only what differs from the defaults, and says why: a comment stands over each key or the group
/// that it is in.
#[test]
fn profiles_hold_what_differs_and_why() {
    fn hold(under: &Value, default: &Value, path: &str) {
        for (key, value) in under.as_object().into_iter().flatten() {
            let (default, path) = (&default[key], format!("{path}.{key}"));
            assert!(!default.is_null() || value.is_array(), "{path} is no key");
            match value.is_object() {
                true => hold(value, default, &path),
                false => assert_ne!(value, default, "{path} is the default"),
            }
        }
    }
    let default = serde_json::to_value(parse(SMALL).unwrap().0).unwrap();
    for profile in Profile::ALL {
        let name = profile.as_str();
        let (_, warnings) =
            parse(&format!("{SMALL}profile: {name}\n")).unwrap_or_else(|errors| panic!("{name}: {errors:#?}"));
        assert!(warnings.is_empty(), "{name}: {warnings:?}");
        hold(&serde_yaml::from_str(profile.text()).unwrap(), &default, name);
        let blocks = profile.text().split("\n\n");
        for block in blocks {
            let lines: Vec<&str> = block.lines().map(str::trim).collect();
            let sections = lines.iter().take_while(|line| line.ends_with(':')).count();
            assert!(
                sections == lines.len() || lines[sections..].iter().any(|line| line.starts_with('#')),
                "{name} does not say why:\n{block}"
            );
        }
    }
}

/// What is allowed but odd is said and does not stop the start.
#[test]
fn odd_but_possible_settings_are_warnings() {
    let text = format!(
        "{SMALL}admin: {{listen: '0.0.0.0:9275'}}\nlegs: {{management: off}}
mirror: {{rooms: [{{match: '*@conference.c.example', echo: local}}]}}\n"
    );
    let warnings: Vec<String> = parse(&text).unwrap().1.iter().map(ToString::to_string).collect();
    assert_eq!(warnings.len(), 3, "{warnings:#?}");
    assert!(warnings[0].starts_with("n.yaml:12:17: admin.listen: metrics and status are open"));
    assert!(warnings[1].starts_with("n.yaml:13:20: legs.management: without acknowledgements"));
    assert!(warnings[2].starts_with("n.yaml:14:26: mirror.rooms[0].match: this matches no room"));
}

/// Another file given by mistake, and a device that never ends, are refused.
#[test]
fn endless_file_is_refused() {
    let error = Config::load(Path::new("/dev/zero")).unwrap_err()[0].to_string();
    assert!(error.contains("larger than 1 MiB"), "{error}");
    let error = Config::load(Path::new("/")).unwrap_err()[0].to_string();
    assert!(error.contains("cannot be read"), "{error}");
}

/// Fails unless `file` holds `wanted`; with `NARROWS_BLESS=1` it writes it instead.
fn is_current(file: &str, wanted: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    if std::env::var_os("NARROWS_BLESS").is_some() {
        // Other tests read the file at the same time.
        let new = path.with_extension("new");
        fs::write(&new, wanted).unwrap();
        fs::rename(&new, &path).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == wanted,
        "{file} is not what src/config/mod.rs makes it: run `NARROWS_BLESS=1 cargo test --lib config` and look at the difference"
    );
}

/// Editors get the schema of the types as they are now.
#[test]
fn schema_is_current() {
    is_current("config/schema.json", &format!("{:#}\n", Config::schema()));
}

/// The example has every key of the schema in its order, with its text, and the default where there is one.
#[test]
fn example_is_current() {
    let schema = Config::schema();
    let mut example = String::from(EXAMPLE_HEAD);
    write_section(&mut example, &schema, &schema, "", "", &mut BTreeSet::new());
    is_current("config/example.yaml", &example);
}

/// The example can be used as it is, and each default in it is the default that the code has.
#[test]
fn example_is_valid_and_shows_the_defaults() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/example.yaml");
    let (config, warnings) = Config::load(&path).unwrap_or_else(|errors| panic!("{errors:#?}"));
    assert!(warnings.is_empty(), "{warnings:?}");

    // Take out all that has no default: what is left must be the defaults.
    let (small, _) = parse(SMALL).unwrap();
    assert_eq!(config.queue, small.queue);
    assert_eq!(config.mirror, small.mirror);
    assert_eq!(config.admin, small.admin);
    assert_eq!(config.log, small.log);
    let mut legs = config.legs.clone();
    legs.certificates = None;
    assert_eq!(legs, small.legs);
    let mut link = config.link.clone();
    (link.listen, link.private_key) = (small.link.listen, small.link.private_key.clone());
    assert_eq!(link, small.link);
}

const EXAMPLE_HEAD: &str = "\
# yaml-language-server: $schema=schema.json

# Every key that narrows knows, with its default where it has one; `narrows check FILE` says what is wrong with a file.
# A key that may be left out and has no default is shown as a comment, unless most sites will want it.

";

/// What the example shows where there is no default. With a `#`, the key is shown as a comment.
const SAMPLES: &[(&str, &str)] = &[
    ("site", "ship"),
    ("data_dir", "/var/lib/narrows"),
    ("profile", "# vsat"),
    ("local.domains", "[b.example, conference.b.example]"),
    ("local.server", "# 127.0.0.1:5269"),
    ("legs.certificates", "/var/lib/narrows/ca"),
    ("legs.certificate.chain", "# /etc/narrows/far.pem"),
    ("legs.certificate.key", "# /etc/narrows/far.key"),
    ("legs.trust", "# /etc/ssl/certs/ca-certificates.crt"),
    ("link.private_key", "/etc/narrows/key"),
    ("link.listen", "0.0.0.0:5270"),
    ("queue.rules.name", "# no-chat-states"),
    ("queue.rules.match.stanza", "# message"),
    ("queue.rules.match.type", "# [groupchat, chat]"),
    ("queue.rules.match.payload", "# http://jabber.org/protocol/chatstates"),
    ("queue.rules.match.node", "# \"urn:xmpp:avatar:*\""),
    ("queue.rules.match.body", "# false"),
    ("queue.rules.match.from", "# \"*@conference.b.example\""),
    ("queue.rules.match.to", "# a.example"),
    ("queue.rules.match.larger_than", "# 16KiB"),
    ("queue.rules.match.direction", "# sent"),
    ("queue.rules.match.peer", "# shore"),
    ("queue.rules.class", "# bulk"),
    ("queue.rules.expiry", "# 1h"),
    (
        "queue.rules.strip",
        "# [http://jabber.org/protocol/chatstates, http://jabber.org/protocol/xhtml-im html]",
    ),
    ("queue.rules.drop", "# false"),
    ("queue.rules.observe", "# false"),
    ("mirror.rooms.match", "# \"*@conference.a.example\""),
    ("mirror.rooms.echo", "# reflect"),
    ("peers.name", "shore"),
    ("peers.domains", "[a.example, conference.a.example]"),
    ("peers.public_key", "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="),
    ("peers.connect", "shore.example:5270"),
];

/// Follows a reference, also one in an `anyOf` (an optional section) or an `allOf`.
fn resolve<'v>(root: &'v Value, schema: &'v Value) -> &'v Value {
    let mut nested = ["anyOf", "allOf"]
        .into_iter()
        .filter_map(|key| schema[key][0].as_object().map(|_| &schema[key][0]));
    match schema["$ref"].as_str() {
        Some(reference) => &root["$defs"][reference.trim_start_matches("#/$defs/")],
        None => nested.next().map_or(schema, |nested| resolve(root, nested)),
    }
}

fn write_section(
    out: &mut String,
    root: &Value,
    section: &Value,
    path: &str,
    indent: &str,
    seen: &mut BTreeSet<String>,
) {
    for (key, schema) in section["properties"].as_object().expect("a section has keys") {
        let path = if path.is_empty() {
            key.clone()
        } else {
            format!("{path}.{key}")
        };
        let resolved = resolve(root, schema);
        let items = resolve(root, &resolved["items"]);
        let description = schema["description"]
            .as_str()
            .unwrap_or_else(|| panic!("{path} has no doc comment"));
        // The sections of classes have the same keys, which are explained once.
        if path.starts_with("queue.classes.") && seen.contains(description) {
            if out.ends_with("\n\n") {
                out.pop();
            }
        } else {
            for paragraph in description.split("\n\n") {
                wrap(out, paragraph, indent);
            }
        }
        seen.insert(description.to_owned());
        let sample = SAMPLES
            .iter()
            .find(|(sample, _)| *sample == path)
            .map(|(_, value)| *value);
        // A section or list whose keys are all commented out is so itself.
        let hash = |keys: &str| {
            let shown = |line: &str| !line.trim_start().starts_with('#') && !line.is_empty();
            if keys.lines().any(shown) { "" } else { "#" }
        };
        if resolved["properties"].is_object() {
            let mut keys = String::new();
            write_section(&mut keys, root, resolved, &path, &format!("{indent}  "), seen);
            writeln!(out, "{indent}{}{key}:", hash(&keys)).unwrap();
            out.push_str(&keys);
        } else if items["properties"].is_object() {
            let mut keys = String::new();
            write_section(&mut keys, root, items, &path, &format!("{indent}    "), seen);
            let hash = hash(&keys);
            writeln!(out, "{indent}{hash}{key}:\n{indent}  {hash}-").unwrap();
            out.push_str(&keys);
        } else {
            let default = match &schema["default"] {
                Value::Null => None,
                Value::String(text) => Some(text.clone()),
                other => Some(other.to_string()),
            };
            match (default, sample) {
                (Some(default), None) => writeln!(out, "{indent}{key}: {default}\n").unwrap(),
                (None, Some(sample)) => match sample.strip_prefix("# ") {
                    Some(sample) => writeln!(out, "{indent}#{key}: {sample}\n").unwrap(),
                    None => writeln!(out, "{indent}{key}: {sample}\n").unwrap(),
                },
                (default, sample) => panic!("{path} has the default {default:?} and the sample {sample:?}"),
            }
        }
    }
}

fn wrap(out: &mut String, paragraph: &str, indent: &str) {
    let mut line = format!("{indent}#");
    for word in paragraph.split_whitespace() {
        if line.len() + 1 + word.len() > 110 {
            writeln!(out, "{line}").unwrap();
            line = format!("{indent}#");
        }
        write!(line, " {word}").unwrap();
    }
    writeln!(out, "{line}").unwrap();
}
