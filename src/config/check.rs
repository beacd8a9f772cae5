//! What one key alone cannot show to be wrong.

use std::{collections::BTreeMap, net::SocketAddr, path::Path, time::Duration};

use super::{
    Config, Direction, Domain, Management, Match, Period, PeriodOrOff, PublicKey, Rule,
    read::{Report, Step, at},
};
use crate::{
    queue::rules::RULES_MAX,
    stanza::{self, Kind},
};

/// A fragment below this is mostly frame header; above, the piece no longer lets others in between.
const FRAGMENT_BYTES: std::ops::RangeInclusive<u64> = 128..=64 << 10;

/// A batch is one TLS record of at most 16 KiB, compressed; what it holds may be a few times as much.
const BATCH_BYTES: std::ops::RangeInclusive<u64> = 256..=64 << 10;

/// RFC 6120 §13.12 forbids a limit below 10,000 bytes; above 16 MiB a stanza no longer fits in sensible memory.
const STANZA_BYTES: std::ops::RangeInclusive<u64> = 10_000..=16 << 20;

/// Every message in a mirrored room is held against the rules in turn.
const ROOM_RULES_MAX: usize = 100;

/// Who has waited a minute for his own words has long said them again.
const ECHO_RTT_MAX: Duration = Duration::from_secs(60);

/// What is to be told after more than a day is better never told: `near: hold`, `far: hold`.
const SPLIT_HOLD_MAX: Duration = Duration::from_secs(24 * 3600);

/// After a day every server may have been updated, and nobody thinks of a cache any more.
const DISCO_LIFETIME_MAX: Duration = Duration::from_secs(24 * 3600);

/// A message that comes an hour late without a word of it misleads.
const DELAY_STAMP_AFTER_MAX: Duration = Duration::from_secs(3600);

/// A class that waits for longer has no expiry: `off`.
const EXPIRY_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// Below this, what is waited for is given up while it crosses.
const EXPIRY_MIN: Duration = Duration::from_secs(1);

/// With twenty peers these are as many series as all others together.
const ROOM_METRICS_MAX: u64 = 100;

/// More is as good as all of it.
const WEIGHTS: std::ops::RangeInclusive<u64> = 1..=1000;

pub(super) fn check(config: &Config, own_key: impl FnOnce(&Path) -> Option<PublicKey>, report: &mut Report) {
    domains(config, report);
    peers(config, own_key(&config.link.private_key), report);
    listeners(config, report);
    legs(config, report);
    link(config, report);
    queue(config, report);
    classes(config, report);
    rules(config, report);
    mirror(config, report);
}

fn domains(config: &Config, report: &mut Report) {
    if config.local.domains.is_empty() {
        report.error(at!["local", "domains"], vec![], "at least one local domain is needed");
    }
    let mut claimed: BTreeMap<&str, (String, Vec<Step>)> = BTreeMap::new();
    let local = config
        .local
        .domains
        .iter()
        .enumerate()
        .map(|(index, domain)| (domain, "the local server".to_owned(), at!["local", "domains", index]));
    let far = config.peers.iter().enumerate().flat_map(|(peer_index, peer)| {
        peer.domains.iter().enumerate().map(move |(index, domain)| {
            let path = at!["peers", peer_index, "domains", index];
            (domain, format!("the peer `{}`", peer.name), path)
        })
    });
    for (domain, owner, path) in local.chain(far) {
        match claimed.get(domain.0.as_str()) {
            Some((other, other_path)) => report.error(
                path,
                vec![other_path.clone()],
                if *other == owner {
                    format!("`{domain}` is listed twice")
                } else {
                    format!("`{domain}` belongs to {other} already: a domain is at one site")
                },
            ),
            None => {
                claimed.insert(domain.0.as_str(), (owner, path));
            }
        }
    }
}

fn peers(config: &Config, own_key: Option<PublicKey>, report: &mut Report) {
    if config.peers.is_empty() {
        report.error(at!["peers"], vec![], "at least one peer is needed");
    }
    for (index, peer) in config.peers.iter().enumerate() {
        let earlier = || config.peers.iter().enumerate().take(index);
        if peer.domains.is_empty() {
            report.error(at!["peers", index, "domains"], vec![], "at least one domain is needed");
        }
        // Names become file names, and some file systems do not tell case apart.
        if let Some((other, _)) =
            earlier().find(|(_, other)| other.name.as_str().eq_ignore_ascii_case(peer.name.as_str()))
        {
            report.error(
                at!["peers", index, "name"],
                vec![at!["peers", other, "name"]],
                format!("there are two peers called `{}`", peer.name),
            );
        }
        if let Some((other, named)) = earlier().find(|(_, other)| other.public_key == peer.public_key) {
            report.error(
                at!["peers", index, "public_key"],
                vec![at!["peers", other, "public_key"]],
                format!(
                    "the peer `{}` has this key already: a key tells who is calling",
                    named.name
                ),
            );
        }
        if own_key == Some(peer.public_key) {
            report.error(
                at!["peers", index, "public_key"],
                vec![at!["link", "private_key"]],
                "this is our own public key: the peer's is needed here, and ours in the peer's configuration",
            );
        }
        if peer.connect.is_none() && config.link.listen.is_none() {
            report.error(
                at!["peers", index],
                vec![at!["link", "listen"], at!["peers", index, "connect"]],
                format!(
                    "no link to `{}` can come about: neither has it `connect`, nor is there a `link.listen` for it to dial",
                    peer.name
                ),
            );
        }
    }
}

fn listeners(config: &Config, report: &mut Report) {
    if config.legs.listen.is_empty() {
        report.error(
            at!["legs", "listen"],
            vec![],
            "at least one address is needed, or the server cannot reach the far domains",
        );
    }
    let mut all: Vec<(SocketAddr, Vec<Step>)> = config
        .legs
        .listen
        .iter()
        .enumerate()
        .map(|(index, listen)| (listen.0, at!["legs", "listen", index]))
        .collect();
    all.extend(config.link.listen.map(|listen| (listen.0, at!["link", "listen"])));
    all.push((config.admin.listen.0, at!["admin", "listen"]));
    for (index, (address, path)) in all.iter().enumerate() {
        if let Some((_, other)) = all[..index].iter().find(|(other, _)| collide(*address, *other)) {
            report.error(
                path.clone(),
                vec![other.clone()],
                format!("another listener has {address} already"),
            );
        }
    }
    within(
        config.admin.room_metrics.into(),
        0..=ROOM_METRICS_MAX,
        at!["admin", "room_metrics"],
        report,
    );
    if !config.admin.listen.0.ip().is_loopback() {
        report.warning(
            at!["admin", "listen"],
            "metrics and status are open to whoever reaches this address: there is no password",
        );
    }
}

/// Port 0 is any free port; an unspecified address takes the port on every address of its family.
fn collide(one: SocketAddr, other: SocketAddr) -> bool {
    one.port() == other.port()
        && one.port() != 0
        && one.is_ipv4() == other.is_ipv4()
        && (one.ip() == other.ip() || one.ip().is_unspecified() || other.ip().is_unspecified())
}

fn legs(config: &Config, report: &mut Report) {
    let legs = &config.legs;
    if legs.certificate.is_some() && legs.certificates.is_some() {
        report.error(
            at!["legs", "certificate"],
            vec![at!["legs", "certificates"]],
            "there is `certificates` too: either our own CA or the site's, not both",
        );
    }
    if !legs.require_tls && legs.listen.iter().any(|listen| !listen.0.ip().is_loopback()) {
        report.warning(
            at!["legs", "require_tls"],
            "stanzas may cross the network between the server and this sidecar in the clear",
        );
    }
    if legs.management == Management::Off {
        report.warning(
            at!["legs", "management"],
            "without acknowledgements, what is in flight when a process dies is lost without notice",
        );
    }
    within(legs.lanes.into(), 1..=8, at!["legs", "lanes"], report);
    within(
        legs.connections_max.into(),
        1..=65_536,
        at!["legs", "connections_max"],
        report,
    );
    let limits = &legs.limits;
    within_bytes(
        limits.stanza_bytes.0,
        STANZA_BYTES,
        at!["legs", "limits", "stanza_bytes"],
        report,
    );
    within(limits.depth.into(), 8..=1024, at!["legs", "limits", "depth"], report);
    within(
        limits.attributes.into(),
        8..=1024,
        at!["legs", "limits", "attributes"],
        report,
    );
    within(
        limits.elements.into(),
        64..=1_000_000,
        at!["legs", "limits", "elements"],
        report,
    );
}

fn link(config: &Config, report: &mut Report) {
    let link = &config.link;
    within_bytes(link.batch_bytes.0, BATCH_BYTES, at!["link", "batch_bytes"], report);
    within_bytes(
        link.fragment_bytes.0,
        FRAGMENT_BYTES,
        at!["link", "fragment_bytes"],
        report,
    );
    if link.fragment_bytes > link.batch_bytes {
        report.error(
            at!["link", "fragment_bytes"],
            vec![at!["link", "batch_bytes"]],
            format!(
                "a fragment must fit into a batch, and `batch_bytes` is {}",
                link.batch_bytes
            ),
        );
    }
    for (key, period) in [("quiet_after", link.quiet_after), ("reconnect_max", link.reconnect_max)] {
        if period.0.is_zero() {
            report.error(at!["link", key], vec![], "this must be more than nothing");
        }
    }
    if link.keepalive.period().is_some_and(|period| period.is_zero()) {
        report.error(
            at!["link", "keepalive"],
            vec![],
            "this must be more than nothing, or `off`",
        );
    }
    if link.quiet_after >= link.dead_after {
        report.error(
            at!["link", "quiet_after"],
            vec![at!["link", "dead_after"]],
            format!("this must be less than `dead_after`, which is {}", link.dead_after),
        );
    }
    if link
        .keepalive
        .period()
        .is_some_and(|period| period > link.keepalive_max.0)
    {
        report.error(
            at!["link", "keepalive"],
            vec![at!["link", "keepalive_max"]],
            format!("this must be at most `keepalive_max`, which is {}", link.keepalive_max),
        );
    }
    // A peer waits this long for what it is owed; the disk on its side fills meanwhile.
    if link.ack_delay.0 > std::time::Duration::from_secs(60) {
        report.error(at!["link", "ack_delay"], vec![], "60s is the most");
    }
}

fn queue(config: &Config, report: &mut Report) {
    let queue = &config.queue;
    if queue.bytes_max < config.legs.limits.stanza_bytes {
        report.error(
            at!["queue", "bytes_max"],
            vec![at!["legs", "limits", "stanza_bytes"]],
            format!(
                "one stanza may have {}, and it must fit",
                config.legs.limits.stanza_bytes
            ),
        );
    }
    if queue.entries_max < 1000 {
        report.error(at!["queue", "entries_max"], vec![], "this must be 1000 or more");
    }
    if queue.collapse_window.0 > std::time::Duration::from_secs(5) {
        report.error(
            at!["queue", "collapse_window"],
            vec![],
            "every stanza would wait this long: 5s is the most",
        );
    }
}

fn classes(config: &Config, report: &mut Report) {
    for (class, settings) in config.queue.classes.all() {
        let at = |key: &str| at!["queue", "classes", class.as_label(), key];
        within(settings.weight.into(), WEIGHTS, at("weight"), report);
        expiry(settings.expiry, at("expiry"), report);
        if settings.entries_max == 0 {
            report.error(at("entries_max"), vec![], "this must be 1 or more, or `off`");
        }
        if settings.bytes_max < STANZA_BYTES.start() / 2 {
            report.error(
                at("bytes_max"),
                vec![],
                "this must be 5kB or more, or `off`: a stanza must fit",
            );
        }
    }
}

fn expiry(expiry: Option<Duration>, path: Vec<Step>, report: &mut Report) {
    if expiry.is_some_and(|expiry| !(EXPIRY_MIN..=EXPIRY_MAX).contains(&expiry)) {
        let (min, max) = (Period(EXPIRY_MIN), Period(EXPIRY_MAX));
        report.error(path, vec![], format!("this must be from {min} to {max}, or `off`"));
    }
}

fn rules(config: &Config, report: &mut Report) {
    let rules = &config.queue.rules;
    if rules.len() > RULES_MAX {
        let text = format!("{RULES_MAX} are the most: each stanza is held against each of them");
        report.error(at!["queue", "rules"], vec![], text);
    }
    let mut last: Option<&Rule> = None;
    for (index, rule) in rules.iter().enumerate().take(RULES_MAX) {
        let at = |key: &str| at!["queue", "rules", index, key];
        if let Some(other) = rules.iter().take(index).position(|other| other.name == rule.name) {
            report.error(
                at("name"),
                vec![at!["queue", "rules", other, "name"]],
                format!("there are two rules called `{}`", rule.name),
            );
        }
        let places = rule.class.is_some() || rule.expiry.is_some();
        let does = usize::from(places) + usize::from(!rule.strip.is_empty()) + usize::from(rule.drop);
        if does != 1 {
            let text = match does {
                0 => "this rule does nothing: it needs `class`, `expiry`, `strip` or `drop`",
                _ => "a rule does one thing: it strips, or drops, or says class and expiry; make it two rules",
            };
            report.error(at!["queue", "rules", index], vec![], text);
        }
        if places && rule.direction() == Direction::Received {
            report.error(
                at!["queue", "rules", index, "match", "direction"],
                vec![at("class"), at("expiry")],
                "what has crossed has no class and no expiry any more: it can be stripped or dropped",
            );
        }
        expiry(rule.expiry.and_then(PeriodOrOff::period), at("expiry"), report);
        conditions(config, index, rule, report);
        if let Some(last) = last {
            let text = format!(
                "this is never asked: `{}` before it decides about every stanza",
                last.name
            );
            report.warning(at!["queue", "rules", index], text);
        } else if rule.when == Match::default() && rule.strip.is_empty() && !rule.observe {
            last = Some(rule);
        }
    }
}

fn conditions(config: &Config, index: usize, rule: &Rule, report: &mut Report) {
    let at = |key: &str| at!["queue", "rules", index, "match", key];
    let when = &rule.when;
    if let Some(kind) = when.stanza.map(Kind::from) {
        if let Some(position) = when.types.iter().position(|of| !of.0.is_of(kind)) {
            report.error(
                at!["queue", "rules", index, "match", "type", position],
                vec![at("stanza")],
                format!("`{}` is no type of {}", when.types[position], kind.as_str()),
            );
        }
        if kind == Kind::Iq && !rule.strip.is_empty() {
            report.error(
                at("stanza"),
                vec![at!["queue", "rules", index, "strip"]],
                "nothing can be taken out of an `iq`: it is its payload (RFC 6120 §8.2.3)",
            );
        }
    }
    let peers = || config.peers.iter();
    if let Some(peer) = &when.peer
        && !peers().any(|known| known.name == *peer)
    {
        let known: Vec<&str> = peers().map(|known| known.name.as_str()).collect();
        let text = format!("there is no peer `{peer}`, only {}", known.join(", "));
        report.error(at("peer"), vec![at!["peers"]], text);
    }
    let local: Vec<&Domain> = config.local.domains.iter().collect();
    let far: Vec<&Domain> = peers()
        .filter(|peer| when.peer.as_ref().is_none_or(|named| *named == peer.name))
        .flat_map(|peer| &peer.domains)
        .collect();
    let (senders, recipients) = match rule.direction() {
        Direction::Sent => (local, far),
        Direction::Received => (far, local),
    };
    for (key, pattern, domains) in [("from", &when.from, senders), ("to", &when.to, recipients)] {
        if let Some(pattern) = pattern
            && !domains
                .iter()
                .any(|domain| stanza::matches(pattern.domain(), domain.0.as_str()))
        {
            report.warning(at(key), "this matches nobody: no domain on that side is like it");
        }
    }
}

fn mirror(config: &Config, report: &mut Report) {
    let mirror = &config.mirror;
    for (period, max, path) in [
        (mirror.echo_rtt_max.0, ECHO_RTT_MAX, at!["mirror", "echo_rtt_max"]),
        (mirror.split.hold.0, SPLIT_HOLD_MAX, at!["mirror", "split", "hold"]),
        (
            mirror.disco_lifetime.period().unwrap_or_default(),
            DISCO_LIFETIME_MAX,
            at!["mirror", "disco_lifetime"],
        ),
        (
            mirror.delay_stamp_after.0,
            DELAY_STAMP_AFTER_MAX,
            at!["mirror", "delay_stamp_after"],
        ),
    ] {
        if period > max {
            report.error(path, vec![], format!("{} is the most", Period(max)));
        }
    }
    if mirror.split.hold.0.is_zero() {
        report.error(
            at!["mirror", "split", "hold"],
            vec![],
            "this must be more than nothing, or every short gap is an outage",
        );
    }
    if mirror.rooms.len() > ROOM_RULES_MAX {
        report.error(
            at!["mirror", "rooms"],
            vec![],
            format!("{ROOM_RULES_MAX} are the most: one `*` may stand for many rooms"),
        );
    }
    let mut patterns = BTreeMap::new();
    for (index, room) in mirror.rooms.iter().enumerate().take(ROOM_RULES_MAX) {
        let path = at!["mirror", "rooms", index, "match"];
        if let Some(first) = patterns.get(&room.pattern) {
            report.error(
                path,
                vec![at!["mirror", "rooms", *first, "match"]],
                format!("`{}` is listed twice: the first counts", room.pattern),
            );
            continue;
        }
        patterns.insert(&room.pattern, index);
        let mut far = config.peers.iter().flat_map(|peer| &peer.domains);
        if !far.any(|domain| stanza::matches(room.pattern.domain(), domain.0.as_str())) {
            report.warning(path, "this matches no room: no peer has the domain behind the `@`");
        }
    }
}

fn within(value: u64, range: std::ops::RangeInclusive<u64>, path: Vec<Step>, report: &mut Report) {
    if !range.contains(&value) {
        let text = format!("this must be from {} to {}", range.start(), range.end());
        report.error(path, vec![], text);
    }
}

fn within_bytes(value: u64, range: std::ops::RangeInclusive<u64>, path: Vec<Step>, report: &mut Report) {
    if !range.contains(&value) {
        let text = format!(
            "this must be from {} to {}",
            super::Size(*range.start()),
            super::Size(*range.end())
        );
        report.error(path, vec![], text);
    }
}
