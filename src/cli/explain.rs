//! `narrows explain`: what becomes of one stanza, and which rule says so.
//!
//! Nothing runs and nothing is asked: the answer comes from the configuration alone. What depends on what was said before (whether a
//! presence of a room tells of a newcomer, whether the mirror answers near by) is not in it.

use std::fmt::Write as _;

use bytes::Bytes;
use memchr::memmem;

use crate::{
    codec::{check, xml::XmlError},
    config::{Config, Name},
    queue::{
        class::Class,
        rules::{Action, Direction, Fate, Placement, Rule, Rules, Said, Type},
    },
    stanza::{Domain, Stanza, domain_of},
};

#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    #[error("this is not a stanza: {0}")]
    Xml(#[from] XmlError),
    #[error("the stanza lacks `{0}`")]
    NoAddress(&'static str),
    #[error(
        "nobody sends this through narrows: one address must be of the local server ({local}) and the other of a peer ({far})"
    )]
    NotOurs { local: String, far: String },
}

/// Says what becomes of the stanza in `text`.
pub fn explain(config: &Config, text: &[u8]) -> Result<String, ExplainError> {
    let stanza = check::stanza(&between_servers(text))?;
    let (direction, peer) = way(config, &stanza)?;
    let rules = Rules::new(config.queue.rules_for(peer));
    let (asked, fate) = rules.explain(stanza.clone(), direction);

    let mut out = String::new();
    let way = match direction {
        Direction::Sent => "to",
        Direction::Received => "from",
    };
    let of = Type::of(&stanza).map_or("of no known type", Type::as_str);
    let _ = writeln!(
        out,
        "{} {of}, {} bytes, {way} the peer {peer}",
        stanza.kind().as_str(),
        stanza.bytes().len()
    );
    if asked.is_empty() {
        out.push_str("no rule concerns this peer\n");
    }
    for (rule, said) in &asked {
        let _ = writeln!(out, "rule {}: {}", rule.name, answer(rule, *said));
    }
    match &fate {
        Fate::Dropped { answer: Some(_) } => {
            out.push_str("it does not go, and its sender is told (policy-violation)\n")
        }
        Fate::Dropped { answer: None } => out.push_str("it does not go, and nobody is told\n"),
        Fate::Replaced(error) => {
            let _ = writeln!(
                out,
                "an error goes in its place ({} bytes), for who waits for it",
                error.bytes().len()
            );
        }
        Fate::Passes(left) if left.bytes().len() < stanza.bytes().len() => {
            let _ = writeln!(out, "it goes, with {} bytes", left.bytes().len());
        }
        Fate::Passes(_) => out.push_str("it goes as it is\n"),
    }
    if let (Fate::Passes(left) | Fate::Replaced(left), Direction::Sent) = (&fate, direction) {
        waits(config, &rules, left, &mut out);
    }
    Ok(out)
}

/// As a server would write it: without the line break with which an editor ends a file, and without the namespace in which a client's log
/// has it.
fn between_servers(text: &[u8]) -> Bytes {
    let text = text.trim_ascii();
    let tag = text.iter().position(|&byte| byte == b'>').unwrap_or(text.len());
    for declaration in [b" xmlns='jabber:client'", b" xmlns=\"jabber:client\""] {
        if let Some(start) = memmem::find(&text[..tag], declaration) {
            return [&text[..start], &text[start + declaration.len()..]].concat().into();
        }
    }
    Bytes::copy_from_slice(text)
}

/// Which way it goes, and the peer at the other end.
fn way<'c>(config: &'c Config, stanza: &Stanza) -> Result<(Direction, &'c Name), ExplainError> {
    let from = stanza.from().ok_or(ExplainError::NoAddress("from"))?;
    let to = stanza.to().ok_or(ExplainError::NoAddress("to"))?;
    let (from, to) = (Domain::new(domain_of(&from)).ok(), Domain::new(domain_of(&to)).ok());
    let is_local = |domain: &Option<Domain>| {
        config
            .local
            .domains
            .iter()
            .any(|local| Some(&local.0) == domain.as_ref())
    };
    let peer_of = |domain: &Option<Domain>| {
        let has = |far: &crate::config::Domain| Some(&far.0) == domain.as_ref();
        config.peers.iter().find(|peer| peer.domains.iter().any(has))
    };
    let found = match (is_local(&from), is_local(&to)) {
        (true, false) => peer_of(&to).map(|peer| (Direction::Sent, &peer.name)),
        (false, true) => peer_of(&from).map(|peer| (Direction::Received, &peer.name)),
        (true, true) | (false, false) => None,
    };
    found.ok_or_else(|| {
        let list = |domains: &mut dyn Iterator<Item = &'c crate::config::Domain>| {
            domains.map(ToString::to_string).collect::<Vec<_>>().join(", ")
        };
        ExplainError::NotOurs {
            local: list(&mut config.local.domains.iter()),
            far: list(&mut config.peers.iter().flat_map(|peer| &peer.domains)),
        }
    })
}

/// What a rule that was asked has to say.
fn answer(rule: &Rule, said: Said) -> String {
    match said {
        Said::Passed(miss) => format!("no, {miss}"),
        Said::Observed => format!("would match, and only counts: {}", does(&rule.then)),
        Said::Stripped => format!("matches: {}", does(&rule.then)),
        Said::Decided => format!("matches: {}; no rule after it is asked", does(&rule.then)),
    }
}

fn does(action: &Action) -> String {
    match action {
        Action::Drop => "drop".to_owned(),
        Action::Strip(payloads) => {
            let payloads: Vec<String> = payloads.iter().map(ToString::to_string).collect();
            format!("strip {}", payloads.join(", "))
        }
        Action::Place(Placement { class, expiry }) => {
            let class = class.map(|class| format!("class {}", class.as_label()));
            let expiry = expiry.map(|expiry| format!("expiry {}", crate::config::PeriodOrOff::from(expiry)));
            [class, expiry].into_iter().flatten().collect::<Vec<_>>().join(", ")
        }
    }
}

/// In which class, how long, and who is told in the end.
fn waits(config: &Config, rules: &Rules, stanza: &Stanza, out: &mut String) {
    let (own, placement) = (Class::of(stanza), rules.place(stanza));
    let class = placement.class.unwrap_or(own);
    let settings = config.queue.classes.settings()[class];
    let _ = write!(out, "class {}", class.as_label());
    if class != own {
        let _ = write!(out, " (by itself {})", own.as_label());
    }
    let _ = writeln!(out, ", weight {}", settings.weight);
    match placement.expiry.unwrap_or(settings.expiry) {
        Some(expiry) => {
            let _ = writeln!(out, "expires after {}", crate::config::Period(expiry));
        }
        None => out.push_str("never expires\n"),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const CONFIG: &str = "\
site: ship
data_dir: /var/lib/narrows
local: {domains: [b.example, conference.b.example]}
link: {listen: 0.0.0.0:5270, private_key: /etc/narrows/key}
peers: [{name: shore, domains: [a.example], public_key: AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=}]
queue:
  classes: {bulk: {weight: 3}}
  rules:
    - {name: watched, match: {type: [chat]}, drop: true, observe: true}
    - {name: states, strip: [http://jabber.org/protocol/chatstates]}
    - {name: pictures, match: {payload: 'urn:xmpp:bob'}, drop: true}
    - {name: night, match: {from: 'night@conference.b.example'}, class: bulk, expiry: 30m}
    - {name: in, match: {direction: received, payload: 'urn:xmpp:bob'}, drop: true}
";

    fn said(text: &str) -> String {
        let (config, _) = Config::parse(Path::new("n.yaml"), CONFIG, |_| None).unwrap();
        explain(&config, text.as_bytes()).unwrap_or_else(|error| format!("error: {error}"))
    }

    /// Every rule that is asked says why it does not match, or what it does; then what becomes of the stanza.
    #[test]
    fn explains_each_rule_and_the_end() {
        let night = "<message xmlns='jabber:client' from='night@conference.b.example/n' to='u@a.example/r' type='groupchat'>\
                     <body>x</body><active xmlns='http://jabber.org/protocol/chatstates'/></message>\n";
        assert_eq!(
            said(night),
            "message groupchat, 160 bytes, to the peer shore\n\
             rule watched: no, it has another type\n\
             rule states: matches: strip http://jabber.org/protocol/chatstates\n\
             rule pictures: no, it has no such payload\n\
             rule night: matches: class bulk, expiry 30m; no rule after it is asked\n\
             it goes, with 105 bytes\n\
             class bulk (by itself message), weight 3\n\
             expires after 30m\n"
        );
        let picture = "<message from='v@b.example/r' to='u@a.example/r' type='chat'><body>x</body><data xmlns='urn:xmpp:bob'/></message>";
        assert_eq!(
            said(picture),
            "message chat, 113 bytes, to the peer shore\n\
             rule watched: would match, and only counts: drop\n\
             rule states: no, it has nothing of what is to be stripped\n\
             rule pictures: matches: drop; no rule after it is asked\n\
             it does not go, and its sender is told (policy-violation)\n"
        );
        let question = "<iq from='u@a.example/r' to='v@b.example' type='get' id='1'><q xmlns='urn:q'/></iq>";
        assert!(
            said(question).ends_with("rule in: no, it has no such payload\nit goes as it is\n"),
            "{}",
            said(question)
        );
        let presence = "<presence from='v@b.example/r' to='u@a.example'/>";
        assert!(
            said(presence).ends_with("it goes as it is\nclass presence, weight 2\nnever expires\n"),
            "{}",
            said(presence)
        );
    }

    /// What is no stanza, or not one of ours, is said to be what it is.
    #[test]
    fn refuses_what_does_not_come_by() {
        for (text, wanted) in [
            ("", "error: this is not a stanza: "),
            ("<message", "error: this is not a stanza: "),
            ("<message/><message/>", "error: this is not a stanza: "),
            (
                "<message><!-- x --></message>",
                "error: this is not a stanza: a comment",
            ),
            ("<stream xmlns='x'/>", "error: this is not a stanza: "),
            ("<message to='u@a.example'/>", "error: the stanza lacks `from`"),
            ("<message from='u@a.example'/>", "error: the stanza lacks `to`"),
            (
                "<message from='u@a.example' to='u@c.example'/>",
                "error: nobody sends this through narrows: one address must be of the local server (b.example, conference.b.example) and the other of a peer (a.example)",
            ),
            (
                "<message from='u@b.example' to='u@b.example'/>",
                "error: nobody sends this",
            ),
        ] {
            assert!(said(text).starts_with(wanted), "{text}: {}", said(text));
        }
    }
}
