//! What an operator has decided about certain stanzas: left out, cut down, put into another class.
//!
//! Rules are asked in their order. One that [places](Action::Place) or [drops](Action::Drop) is the last one asked; one that
//! [takes something out](Action::Strip), or is only [watched](Rule::observe), lets the next ones see what is left. What stays true whatever the
//! rules say:
//!
//! 1. Every recipient's copy is judged by itself, before copies are gathered. Only copies that are still the same become one cast,
//!    so a rule about recipients splits casts and never drops or cuts down a copy that it does not match.
//! 2. What somebody waits for comes, if only as an error: an IQ request that is dropped is answered, and a dropped result is replaced by an error
//!    ([RFC 6120 §8.2.3](https://www.rfc-editor.org/rfc/rfc6120#section-8.2.3)).
//! 3. A user whose message is dropped is told. What carries no words (chat states, receipts), headlines and presence go in silence, which
//!    the standards allow ([RFC 6121 §8.5](https://www.rfc-editor.org/rfc/rfc6121#section-8.5)), and so does all that comes from a room:
//!    rooms put out whoever answers with an error.
//! 4. [What ends something](must_cross) crosses: leaves, refusals, errors, and the presence that tells a user that he is in a room.
//! 5. Order is kept: a class says how urgent something is, and what must not be overtaken is not (see [`super::class`]).
//! 6. Rooms are not blinded: what a room or a server must read (the children of [`KEPT`], and all of an IQ) is not taken out.

use std::{cell::OnceCell, collections::BTreeMap, fmt, sync::Arc, time::Duration};

use bytes::Bytes;

use super::class::Class;
use crate::stanza::{Child, Condition, ErrorType, Kind, Stanza, bare, bounce, domain_of, matches, ns, refused_result};

/// Each stanza is held against each rule.
pub const RULES_MAX: usize = 100;

/// Payloads of one stanza that rules look at: real stanzas have less than 20, and what a stranger writes must not cost rules × payloads.
const PAYLOADS_MAX: usize = 256;

/// Names of rules that are counted, over all reloads.
const NAMES_MAX: usize = 4 * RULES_MAX;

/// Namespaces whose elements are never taken out: the stanza's own (`body`, `show`, `error`…), and those by which rooms and clients know
/// where they are.
const KEPT: &[&str] = &[
    ns::SERVER,
    ns::MUC,
    ns::MUC_USER,
    ns::DELAY,
    ns::STANZA_ID,
    ns::OCCUPANT_ID,
];

/// Which way a stanza goes, as this side sees it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Direction {
    /// From our server to the peer.
    Sent,
    /// From the peer to our server.
    Received,
}

/// The type of a stanza; what RFC 6121 takes a missing `type` for has a name too.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Type {
    Normal,
    Chat,
    Groupchat,
    Headline,
    Available,
    Unavailable,
    Subscribe,
    Subscribed,
    Unsubscribe,
    Unsubscribed,
    Probe,
    Get,
    Set,
    Result,
    Error,
}

impl Type {
    pub const ALL: [Self; 15] = [
        Self::Normal,
        Self::Chat,
        Self::Groupchat,
        Self::Headline,
        Self::Available,
        Self::Unavailable,
        Self::Subscribe,
        Self::Subscribed,
        Self::Unsubscribe,
        Self::Unsubscribed,
        Self::Probe,
        Self::Get,
        Self::Set,
        Self::Result,
        Self::Error,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Chat => "chat",
            Self::Groupchat => "groupchat",
            Self::Headline => "headline",
            Self::Available => "available",
            Self::Unavailable => "unavailable",
            Self::Subscribe => "subscribe",
            Self::Subscribed => "subscribed",
            Self::Unsubscribe => "unsubscribe",
            Self::Unsubscribed => "unsubscribed",
            Self::Probe => "probe",
            Self::Get => "get",
            Self::Set => "set",
            Self::Result => "result",
            Self::Error => "error",
        }
    }

    /// Whether stanzas of this kind can have it.
    pub fn is_of(self, kind: Kind) -> bool {
        match self {
            Self::Normal | Self::Chat | Self::Groupchat | Self::Headline => kind == Kind::Message,
            Self::Available
            | Self::Unavailable
            | Self::Subscribe
            | Self::Subscribed
            | Self::Unsubscribe
            | Self::Unsubscribed
            | Self::Probe => kind == Kind::Presence,
            Self::Get | Self::Set | Self::Result => kind == Kind::Iq,
            Self::Error => true,
        }
    }

    /// `None` for a type that the stanza's kind has not.
    pub fn of(stanza: &Stanza) -> Option<Self> {
        let kind = stanza.kind();
        let written = stanza.stanza_type();
        let known = |written: &str| {
            let mut all = Self::ALL.into_iter();
            all.find(|known| known.as_str() == written && known.is_of(kind))
        };
        match (kind, written.as_deref()) {
            // "If an application receives a message with … a value not specified", it is normal (RFC 6121 §5.2.2).
            (Kind::Message, written) => Some(written.and_then(known).unwrap_or(Self::Normal)),
            (Kind::Presence, None) => Some(Self::Available),
            // Nobody writes it, and it is no presence type.
            (Kind::Presence, Some("available")) => None,
            (Kind::Presence | Kind::Iq, written) => written.and_then(known),
        }
    }
}

/// An address in which each `*` stands for any characters, or none: a domain, a bare or a full address, by its form.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Pattern(String);

impl Pattern {
    /// In lower case before the slash, as servers write addresses.
    pub fn new(text: &str) -> Self {
        match text.split_once('/') {
            Some((bare, resource)) => Self(format!("{}/{resource}", bare.to_lowercase())),
            None => Self(text.to_lowercase()),
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn fits(&self, address: &str) -> bool {
        let compared = if self.0.contains('/') {
            address
        } else if self.0.contains('@') {
            bare(address)
        } else {
            domain_of(address)
        };
        matches(&self.0, compared)
    }
}

/// A payload by its namespace, in which each `*` stands for any characters or none, and its element's name, if that matters.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Payload {
    pub namespace: String,
    pub name: Option<String>,
}

impl Payload {
    fn fits(&self, namespace: &str, name: &str) -> bool {
        matches(&self.namespace, namespace) && self.name.as_ref().is_none_or(|wanted| wanted == name)
    }
}

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{} {name}", self.namespace),
            None => f.write_str(&self.namespace),
        }
    }
}

/// All that is given must be true of a stanza.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Conditions {
    pub kind: Option<Kind>,
    /// One of these; any, if there is none.
    pub types: Vec<Type>,
    /// One of its children.
    pub payload: Option<Payload>,
    /// The node that one of those children is about.
    pub node: Option<String>,
    /// Whether there is a `body`.
    pub body: Option<bool>,
    pub from: Option<Pattern>,
    pub to: Option<Pattern>,
    /// Bytes of the stanza, as it came.
    pub larger_than: Option<usize>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Rule {
    pub name: Arc<str>,
    pub direction: Direction,
    pub when: Conditions,
    pub then: Action,
    /// Only count.
    pub observe: bool,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Action {
    /// These children are taken out.
    Strip(Vec<Payload>),
    Drop,
    /// It waits in this class, and for as long as this, in place of what it would.
    Place(Placement),
}

/// How something waits, as far as rules say it.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Placement {
    pub class: Option<Class>,
    /// `Some(None)`: for ever.
    pub expiry: Option<Option<Duration>>,
}

/// Why a rule passed a stanza by.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Miss {
    Direction,
    Kind,
    Type,
    From,
    To,
    Size,
    Payload,
    Node,
    Body,
    /// It has nothing of what the rule takes out.
    NothingToStrip,
    /// See [`must_cross`].
    MustCross,
}

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Direction => "it goes the other way",
            Self::Kind => "it is another kind of stanza",
            Self::Type => "it has another type",
            Self::From => "`from` is another",
            Self::To => "`to` is another",
            Self::Size => "it is not larger",
            Self::Payload => "it has no such payload",
            Self::Node => "its payload is about another node",
            Self::Body => "it differs in whether it has a body",
            Self::NothingToStrip => "it has nothing of what is to be stripped",
            Self::MustCross => "it ends or answers something, so it is never dropped",
        })
    }
}

/// What became of a stanza.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Fate {
    /// It goes on, perhaps with less in it.
    Passes(Stanza),
    /// This goes on in its place: whoever asked is told.
    Replaced(Stanza),
    /// It goes nowhere; its sender gets the answer, if there is one.
    Dropped { answer: Option<Bytes> },
}

/// What one rule had to say about a stanza.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Said {
    Passed(Miss),
    /// It matched, and the next ones are asked.
    Stripped,
    /// It matched, and is only watched.
    Observed,
    /// It matched, and no other is asked.
    Decided,
}

/// How often a rule has matched. Each recipient's copy counts.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Count {
    pub stanzas: u64,
    /// What did not cross because of it, or would not have.
    pub bytes_saved: u64,
}

/// Whether a rule did what it says.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Mode {
    Applied,
    Observed,
}

/// The rules of one peer, and what they have counted.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    rules: Vec<Rule>,
    counts: BTreeMap<(Arc<str>, Mode), Count>,
}

impl Rules {
    pub fn new(rules: Vec<Rule>) -> Self {
        let mut new = Self::default();
        new.replace(rules);
        new
    }

    /// Other rules from now on. Those that keep their names go on counting.
    pub fn replace(&mut self, rules: Vec<Rule>) {
        self.rules = rules;
        if self.counts.len() > NAMES_MAX {
            let known = |name: &Arc<str>| self.rules.iter().any(|rule| rule.name == *name);
            self.counts.retain(|(name, _), _| known(name));
        }
        for rule in &self.rules {
            self.counts.entry((Arc::clone(&rule.name), rule.mode())).or_default();
        }
    }

    /// Whether any rule is about this direction.
    pub fn has(&self, direction: Direction) -> bool {
        self.rules.iter().any(|rule| rule.direction == direction)
    }

    /// Of the rules that there are, and of those that there were.
    pub fn counts(&self) -> impl Iterator<Item = (&str, Mode, Count)> {
        self.counts.iter().map(|((name, mode), count)| (&**name, *mode, *count))
    }

    /// Judges one copy of a stanza, and counts.
    pub fn judge(&mut self, stanza: Stanza, direction: Direction) -> Fate {
        let counts = &mut self.counts;
        walk(&self.rules, stanza, direction, |rule, said, saved| {
            if matches!(said, Said::Passed(_)) {
                return;
            }
            let count = counts.entry((Arc::clone(&rule.name), rule.mode())).or_default();
            count.stanzas += 1;
            count.bytes_saved += saved as u64;
        })
    }

    /// How a stanza for the peer waits. The same when it is read back from the disk: taking something out of a stanza makes no rule match
    /// that did not before, so what is left is placed as the whole was. After a reload it is the new rules that say it.
    pub fn place(&self, stanza: &Stanza) -> Placement {
        let payloads = OnceCell::new();
        let mut matching = self.rules.iter().filter_map(|rule| match &rule.then {
            Action::Place(placement) if !rule.observe => {
                let miss = rule.miss(stanza, &payloads, Direction::Sent);
                miss.is_none().then_some(*placement)
            }
            Action::Place(_) | Action::Strip(_) | Action::Drop => None,
        });
        matching.next().unwrap_or_default()
    }

    /// As [`judge`](Self::judge) without counting: what each rule that was asked has to say.
    pub fn explain(&self, stanza: Stanza, direction: Direction) -> (Vec<(&Rule, Said)>, Fate) {
        let mut all = Vec::new();
        let fate = walk(&self.rules, stanza, direction, |rule, said, _| all.push((rule, said)));
        (all, fate)
    }
}

/// Asks the rules in turn; `heard` gets what each says, and how many bytes it keeps from crossing.
fn walk<'r>(
    rules: &'r [Rule],
    mut stanza: Stanza,
    direction: Direction,
    mut heard: impl FnMut(&'r Rule, Said, usize),
) -> Fate {
    let mut payloads = OnceCell::new();
    for rule in rules {
        if let Some(miss) = rule.miss(&stanza, &payloads, direction) {
            heard(rule, Said::Passed(miss), 0);
            continue;
        }
        let left = match &rule.then {
            Action::Strip(payloads) => stripped(payloads, &stanza),
            Action::Drop => None,
            Action::Place(_) => Some(stanza.clone()),
        };
        let saved = stanza.bytes().len() - left.as_ref().map_or(0, |left| left.bytes().len());
        if rule.observe {
            heard(rule, Said::Observed, saved);
            continue;
        }
        match (&rule.then, left) {
            (Action::Strip(_), Some(left)) => {
                heard(rule, Said::Stripped, saved);
                stanza = left;
                payloads = OnceCell::new();
            }
            (Action::Place(_), Some(left)) => {
                heard(rule, Said::Decided, saved);
                return Fate::Passes(left);
            }
            (Action::Strip(_) | Action::Drop | Action::Place(_), _) => {
                heard(rule, Said::Decided, saved);
                return dropped(stanza);
            }
        }
    }
    Fate::Passes(stanza)
}

impl Rule {
    fn mode(&self) -> Mode {
        if self.observe { Mode::Observed } else { Mode::Applied }
    }

    fn miss(&self, stanza: &Stanza, payloads: &OnceCell<Vec<Child>>, direction: Direction) -> Option<Miss> {
        // What cannot be read here cannot be read anywhere, and has no payload for us.
        let payloads = || {
            payloads.get_or_init(|| {
                let mut children = stanza.children().unwrap_or_default();
                children.truncate(PAYLOADS_MAX);
                children
            })
        };
        if self.direction != direction {
            return Some(Miss::Direction);
        }
        if let Some(miss) = self.when.miss(stanza, payloads) {
            return Some(miss);
        }
        match &self.then {
            Action::Drop if must_cross(stanza) => Some(Miss::MustCross),
            Action::Strip(unwanted) => {
                let any = || {
                    payloads()
                        .iter()
                        .any(|child| strips(unwanted, &child.namespace, &child.name))
                };
                (stanza.kind() == Kind::Iq || !any()).then_some(Miss::NothingToStrip)
            }
            Action::Drop | Action::Place(_) => None,
        }
    }
}

fn strips(unwanted: &[Payload], namespace: &str, name: &str) -> bool {
    !KEPT.contains(&namespace) && unwanted.iter().any(|payload| payload.fits(namespace, name))
}

/// What is left of a stanza, if that is worth sending: a message that was only its chat state is not.
fn stripped(unwanted: &[Payload], stanza: &Stanza) -> Option<Stanza> {
    // It was read a moment ago; if that fails now, nothing is taken out.
    let stripped = stanza.without_children(|namespace, name| strips(unwanted, namespace, name));
    Some(stripped.unwrap_or_else(|| stanza.clone())).filter(|left| !is_hollow(left))
}

impl Conditions {
    /// The cheap ones come first.
    fn miss<'p>(&self, stanza: &Stanza, payloads: impl Fn() -> &'p Vec<Child>) -> Option<Miss> {
        if self.kind.is_some_and(|kind| kind != stanza.kind()) {
            return Some(Miss::Kind);
        }
        if !self.types.is_empty() && !Type::of(stanza).is_some_and(|of| self.types.contains(&of)) {
            return Some(Miss::Type);
        }
        if self.larger_than.is_some_and(|bytes| stanza.bytes().len() <= bytes) {
            return Some(Miss::Size);
        }
        let fits = |pattern: &Option<Pattern>, address: Option<&str>| {
            let fits = |pattern: &Pattern| address.is_some_and(|address| pattern.fits(address));
            pattern.as_ref().is_none_or(fits)
        };
        if !fits(&self.from, stanza.from().as_deref()) {
            return Some(Miss::From);
        }
        if !fits(&self.to, stanza.to().as_deref()) {
            return Some(Miss::To);
        }
        let wanted = |child: &&Child| {
            let payload = self.payload.as_ref();
            payload.is_none_or(|payload| payload.fits(&child.namespace, &child.name))
        };
        if self.payload.is_some() && !payloads().iter().any(|child| wanted(&child)) {
            return Some(Miss::Payload);
        }
        if let Some(pattern) = &self.node {
            let mut nodes = payloads().iter().filter(wanted).filter_map(|child| child.node.as_ref());
            if !nodes.any(|node| matches(pattern, node)) {
                return Some(Miss::Node);
            }
        }
        let has_body = || payloads().iter().any(|child| child.is(ns::SERVER, "body"));
        if self.body.is_some_and(|body| body != has_body()) {
            return Some(Miss::Body);
        }
        None
    }
}

/// What ends or settles something that others have seen begin: leaves and the end of subscriptions, errors, answers that are errors, and a
/// user's own presence in a room, without which nobody is in.
fn must_cross(stanza: &Stanza) -> bool {
    match (stanza.kind(), Type::of(stanza)) {
        (Kind::Presence, Some(Type::Available)) => stanza.has_muc_status("110"),
        (Kind::Presence, Some(Type::Subscribe | Type::Probe)) => false,
        (Kind::Presence, _) => true,
        (Kind::Message | Kind::Iq, Some(Type::Error)) => true,
        (Kind::Message, _) => false,
        // One that is neither question nor answer is the server's to refuse.
        (Kind::Iq, of) => of.is_none(),
    }
}

/// Whether a message holds nothing but what says how to treat it.
fn is_hollow(stanza: &Stanza) -> bool {
    const BESIDE: &[&str] = &[ns::HINTS, ns::STANZA_ID, ns::OCCUPANT_ID, ns::DELAY];
    stanza.kind() == Kind::Message
        && stanza.children().is_some_and(|children| {
            let mut children = children.iter();
            children.all(|child| BESIDE.contains(&&*child.namespace) || child.is(ns::SERVER, "thread"))
        })
}

/// Who is told of a stanza that is not carried.
fn dropped(stanza: Stanza) -> Fate {
    const TEXT: &str = "This is not carried over the link.";
    if stanza.kind() == Kind::Iq
        && Type::of(&stanza) == Some(Type::Result)
        && let Some(error) = refused_result(&stanza, TEXT)
    {
        return Fate::Replaced(error);
    }
    let has_words = || {
        let children = stanza.children().unwrap_or_default();
        children.iter().any(|child| {
            child.is(ns::SERVER, "body") || child.is(ns::SERVER, "subject") || child.namespace == ENCRYPTED
        })
    };
    let answer = match stanza.kind() {
        Kind::Message if !has_words() => None,
        Kind::Message | Kind::Presence | Kind::Iq => {
            bounce(&stanza, ErrorType::Modify, Condition::PolicyViolation, TEXT)
        }
    };
    Fate::Dropped { answer }
}

/// XEP-0384, whose messages need not have a body.
const ENCRYPTED: &str = "eu.siacs.conversations.axolotl";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::check;

    const CHAT_STATES: &str = "http://jabber.org/protocol/chatstates";
    const XHTML: &str = "http://jabber.org/protocol/xhtml-im";
    const USER: &str = "u@a.example/r";
    const NICK: &str = "room@conference.a.example/n";

    fn stanza(text: &str) -> Stanza {
        Stanza::parse(Bytes::copy_from_slice(text.as_bytes())).unwrap()
    }

    fn drops(name: &str, when: Conditions) -> Rule {
        Rule {
            name: name.into(),
            direction: Direction::Sent,
            when,
            then: Action::Drop,
            observe: false,
        }
    }

    fn strips(name: &str, namespace: &str) -> Rule {
        Rule {
            then: Action::Strip(vec![payload(namespace)]),
            ..drops(name, Conditions::default())
        }
    }

    fn payload(namespace: &str) -> Payload {
        Payload {
            namespace: namespace.to_owned(),
            name: None,
        }
    }

    fn judge(rules: &[Rule], text: &str) -> Fate {
        Rules::new(rules.to_vec()).judge(stanza(text), Direction::Sent)
    }

    /// What the rules leave of a stanza.
    fn left(rules: &[Rule], text: &str) -> String {
        match judge(rules, text) {
            Fate::Passes(stanza) | Fate::Replaced(stanza) => String::from_utf8(stanza.bytes().to_vec()).unwrap(),
            Fate::Dropped { .. } => String::new(),
        }
    }

    /// Each condition by itself: one stanza that it fits and one that it does not, and why not.
    #[test]
    fn every_condition_tells_fit_from_unfit() {
        let avatar = format!(
            "<message from='u@a.example' to='v@b.example/r' type='headline'><event xmlns='http://jabber.org/protocol/pubsub#event'>\
             <items node='urn:xmpp:avatar:metadata'><item id='{}'/></items></event></message>",
            "0".repeat(40)
        );
        let typing = format!(
            "<message from='{NICK}' to='v@b.example/r' type='groupchat'><composing xmlns='{CHAT_STATES}'/></message>"
        );
        let said = format!("<message from='{NICK}' to='v@b.example/r' type='groupchat'><body>x</body></message>");
        let plain = "<message from='u@a.example/r' to='w@c.b.example'><body>x</body></message>";
        let presence = "<presence from='u@a.example/r' to='v@b.example'/>";
        let any = Conditions::default;
        let pattern = |text| Some(Pattern::new(text));
        let table: Vec<(Conditions, &str, &str, Miss)> = vec![
            (
                Conditions {
                    kind: Some(Kind::Message),
                    ..any()
                },
                plain,
                presence,
                Miss::Kind,
            ),
            (
                Conditions {
                    types: vec![Type::Normal],
                    ..any()
                },
                plain,
                &said,
                Miss::Type,
            ),
            (
                Conditions {
                    types: vec![Type::Chat, Type::Available],
                    ..any()
                },
                presence,
                plain,
                Miss::Type,
            ),
            (
                Conditions {
                    payload: Some(payload(CHAT_STATES)),
                    ..any()
                },
                &typing,
                &said,
                Miss::Payload,
            ),
            (
                Conditions {
                    payload: Some(payload("*#event")),
                    ..any()
                },
                &avatar,
                &said,
                Miss::Payload,
            ),
            (
                Conditions {
                    payload: Some(Payload {
                        namespace: CHAT_STATES.to_owned(),
                        name: Some("paused".to_owned()),
                    }),
                    ..any()
                },
                "<message from='a.example' to='b.example'><paused xmlns='http://jabber.org/protocol/chatstates'/></message>",
                &typing,
                Miss::Payload,
            ),
            (
                Conditions {
                    node: Some("urn:xmpp:avatar:*".to_owned()),
                    ..any()
                },
                &avatar,
                &said,
                Miss::Node,
            ),
            (
                Conditions {
                    node: Some("q".to_owned()),
                    ..any()
                },
                "<iq type='get' id='1' from='u@a.example/r' to='b.example'><query xmlns='http://jabber.org/protocol/disco#info' node='q'/></iq>",
                &avatar,
                Miss::Node,
            ),
            (
                Conditions {
                    body: Some(false),
                    ..any()
                },
                &typing,
                &said,
                Miss::Body,
            ),
            (
                Conditions {
                    body: Some(true),
                    ..any()
                },
                &said,
                &typing,
                Miss::Body,
            ),
            (
                Conditions {
                    from: pattern("conference.a.example"),
                    ..any()
                },
                &said,
                plain,
                Miss::From,
            ),
            (
                Conditions {
                    from: pattern("ROOM@conference.*"),
                    ..any()
                },
                &said,
                plain,
                Miss::From,
            ),
            (
                Conditions {
                    from: pattern("*@*/n"),
                    ..any()
                },
                &said,
                plain,
                Miss::From,
            ),
            (
                Conditions {
                    to: pattern("*.b.example"),
                    ..any()
                },
                plain,
                &said,
                Miss::To,
            ),
            (
                Conditions {
                    to: pattern("v@b.example"),
                    ..any()
                },
                &said,
                plain,
                Miss::To,
            ),
            (
                Conditions {
                    larger_than: Some(plain.len() - 1),
                    ..any()
                },
                plain,
                presence,
                Miss::Size,
            ),
            (
                Conditions {
                    larger_than: Some(presence.len()),
                    ..any()
                },
                plain,
                presence,
                Miss::Size,
            ),
        ];
        for (when, fits, unfit, miss) in table {
            let rules = Rules::new(vec![drops("r", when.clone())]);
            let said_of = |text: &str| rules.explain(stanza(text), Direction::Sent).0[0].1;
            assert_eq!(said_of(fits), Said::Decided, "{when:?} {fits}");
            assert_eq!(said_of(unfit), Said::Passed(miss), "{when:?} {unfit}");
            let (said, fate) = rules.explain(stanza(fits), Direction::Received);
            assert_eq!(said[0].1, Said::Passed(Miss::Direction));
            assert_eq!(fate, Fate::Passes(stanza(fits)));
        }
    }

    /// The first rule that decides is the last one asked; those that cut down or watch let the next ones see what is left.
    #[test]
    fn rules_are_asked_in_order() {
        let text = format!(
            "<message from='{NICK}' to='v@b.example/r' type='groupchat'><body>x</body><html xmlns='{XHTML}'/><active xmlns='{CHAT_STATES}'/></message>"
        );
        let watched = Rule {
            observe: true,
            ..drops("watched", Conditions::default())
        };
        let large = drops(
            "large",
            Conditions {
                larger_than: Some(text.len() - 1),
                ..Conditions::default()
            },
        );
        let states = drops(
            "states",
            Conditions {
                payload: Some(payload(CHAT_STATES)),
                ..Conditions::default()
            },
        );
        let all = [
            watched.clone(),
            strips("xhtml", XHTML),
            large.clone(),
            strips("states-out", CHAT_STATES),
            states.clone(),
            strips("nothing", XHTML),
        ];
        let rules = Rules::new(all.to_vec());
        let (said, fate) = rules.explain(stanza(&text), Direction::Sent);
        let said: Vec<Said> = said.into_iter().map(|(_, said)| said).collect();
        assert_eq!(
            said,
            [
                Said::Observed,
                Said::Stripped,
                Said::Passed(Miss::Size),
                Said::Stripped,
                Said::Passed(Miss::Payload),
                Said::Passed(Miss::NothingToStrip),
            ]
        );
        let Fate::Passes(left) = fate else { panic!("{fate:?}") };
        assert_eq!(
            left.bytes(),
            &format!("<message from='{NICK}' to='v@b.example/r' type='groupchat'><body>x</body></message>")
        );
        let rules = Rules::new(vec![large, watched]);
        let (said, fate) = rules.explain(stanza(&text), Direction::Sent);
        assert_eq!(said.len(), 1);
        assert_eq!(fate, Fate::Dropped { answer: None });
    }

    /// Who is told what, for all that can be dropped; and what cannot.
    #[test]
    fn a_drop_is_told_to_whom_it_concerns() {
        let all = [drops("all", Conditions::default())];
        let typing = format!("<composing xmlns='{CHAT_STATES}'/>");
        let own = "<x xmlns='http://jabber.org/protocol/muc#user'><status code='110'/></x>";
        let join = "<x xmlns='http://jabber.org/protocol/muc'/>";
        let secret = "<encrypted xmlns='eu.siacs.conversations.axolotl'/>";
        let (far, room) = ("v@b.example/r", "room@b.example");
        for (name, stanza_type, from, to, inside, expected) in [
            // The words of a user: he is told.
            ("message", "chat", USER, far, "<body>x</body>", "told"),
            ("message", "groupchat", USER, room, "<body>x</body>", "told"),
            ("message", "groupchat", USER, room, "<subject>x</subject>", "told"),
            ("message", "chat", USER, far, secret, "told"),
            // Nobody waits for these.
            ("message", "chat", USER, far, &typing, "silent"),
            ("message", "headline", USER, far, "<body>x</body>", "silent"),
            ("presence", "", USER, far, "", "silent"),
            ("presence", "subscribe", "u@a.example", "v@b.example", "", "silent"),
            // Never an error to a room.
            ("message", "groupchat", NICK, far, "<body>x</body>", "silent"),
            (
                "message",
                "",
                "room@conference.a.example",
                far,
                "<body>x</body>",
                "silent",
            ),
            (
                "presence",
                "",
                NICK,
                far,
                "<x xmlns='http://jabber.org/protocol/muc#user'/>",
                "silent",
            ),
            // Who asks is told, and so is who gets no answer.
            ("presence", "", USER, "room@b.example/n", join, "told"),
            ("iq", "get", USER, far, "<q xmlns='q'/>", "told"),
            ("iq", "set", NICK, far, "<q xmlns='q'/>", "told"),
            ("iq", "result", USER, far, "<q xmlns='q'/>", "replaced"),
            // What ends or settles something.
            ("presence", "unavailable", NICK, far, "", "crosses"),
            ("presence", "", NICK, far, own, "crosses"),
            ("presence", "error", NICK, far, "", "crosses"),
            ("presence", "unsubscribe", USER, far, "", "crosses"),
            ("message", "error", USER, room, "", "crosses"),
            ("iq", "error", USER, far, "", "crosses"),
            ("iq", "", USER, far, "", "crosses"),
        ] {
            let stanza_type = match stanza_type {
                "" => String::new(),
                stanza_type => format!(" type='{stanza_type}'"),
            };
            let text = format!("<{name} from='{from}' to='{to}'{stanza_type} id='i'>{inside}</{name}>");
            let fate = judge(&all, &text);
            let found = match &fate {
                Fate::Passes(left) if *left == stanza(&text) => "crosses",
                Fate::Replaced(_) => "replaced",
                Fate::Dropped { answer: Some(_) } => "told",
                Fate::Dropped { answer: None } => "silent",
                Fate::Passes(_) => "changed",
            };
            assert_eq!(found, expected, "{text}");
            if let Fate::Dropped { answer: Some(answer) } = fate {
                let answer = Stanza::parse(answer).unwrap();
                assert!(answer.is_error() && answer.to().unwrap() == from && answer.from().unwrap() == to);
            }
        }
        assert_eq!(
            left(
                &all,
                "<iq type='result' from='u@a.example' to='v@b.example/r' id='i'><q xmlns='q'/></iq>"
            ),
            "<iq type='error' from='u@a.example' to='v@b.example/r' id='i'><error type='modify'>\
             <policy-violation xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/>\
             <text xmlns='urn:ietf:params:xml:ns:xmpp-stanzas' xml:lang='en'>This is not carried over the link.</text></error></iq>"
        );
    }

    /// Only what is named goes, all of it and nothing else; what rooms and servers need stays, whatever a rule says.
    #[test]
    fn what_is_taken_out_is_exact() {
        let all = [strips("all", "*")];
        let message = |inside: &str| {
            format!("<message from='{USER}' to='room@b.example' type='groupchat' id='i'>{inside}</message>")
        };
        let kept = "<body>x</body><x xmlns='http://jabber.org/protocol/muc#user'/><delay xmlns='urn:xmpp:delay'/>";
        let text = message(&format!("{kept} <a xmlns='a'><b/></a>\n<a xmlns='a'/>"));
        assert_eq!(left(&all, &text), message(&format!("{kept} \n")));
        assert_eq!(left(&[strips("a", "b")], &text), text);

        // A join is nothing without its `x`; presence without payloads is still presence.
        let join = "<presence from='u@a.example/r' to='room@b.example/n'><x xmlns='http://jabber.org/protocol/muc'/><c xmlns='http://jabber.org/protocol/caps' node='n'/></presence>";
        assert_eq!(
            left(&all, join),
            join.replace("<c xmlns='http://jabber.org/protocol/caps' node='n'/>", "")
        );
        // A question without its payload is none.
        let iq = "<iq type='get' from='u@a.example' to='b.example' id='i'><q xmlns='q'/></iq>";
        assert_eq!(left(&all, iq), iq);

        // Nothing is left of a chat state; the words of a message that was encrypted are missed.
        let typing = message(&format!(
            "<composing xmlns='{CHAT_STATES}'/><thread>t</thread><no-store xmlns='urn:xmpp:hints'/>"
        ));
        assert_eq!(judge(&all, &typing), Fate::Dropped { answer: None });
        let secret = message("<encrypted xmlns='eu.siacs.conversations.axolotl'/><store xmlns='urn:xmpp:hints'/>");
        assert!(matches!(judge(&all, &secret), Fate::Dropped { answer: Some(_) }));
        // It was as empty before.
        let empty = message("<thread>t</thread>");
        assert_eq!(left(&all, &empty), empty);
    }

    /// A stanza is placed by the first rule that says something of it and is not only watched; what is left after something was taken out is placed
    /// as the whole would have been.
    #[test]
    fn stanzas_are_placed_by_the_first_rule() {
        let places = |name: &str, class, when| Rule {
            then: Action::Place(Placement {
                class: Some(class),
                expiry: None,
            }),
            ..drops(name, when)
        };
        let from_room = || Conditions {
            from: Some(Pattern::new("conference.a.example")),
            ..Conditions::default()
        };
        let with_states = Conditions {
            payload: Some(payload(CHAT_STATES)),
            ..Conditions::default()
        };
        let forever = Rule {
            then: Action::Place(Placement {
                class: None,
                expiry: Some(None),
            }),
            ..drops("for ever", Conditions::default())
        };
        let watched = Rule {
            observe: true,
            ..places("watched", Class::Urgent, Conditions::default())
        };
        let all = vec![
            watched,
            strips("no xhtml", XHTML),
            places("states", Class::State, with_states),
            places("rooms", Class::Bulk, from_room()),
            places("never", Class::Urgent, from_room()),
            forever,
        ];
        let mut rules = Rules::new(all);
        let html = format!("<html xmlns='{XHTML}'/>");
        let state = format!("<active xmlns='{CHAT_STATES}'/>");
        for (from, inside, class, expiry) in [
            (NICK, format!("<body>x</body>{html}{state}"), Some(Class::State), None),
            (NICK, format!("<body>x</body>{html}"), Some(Class::Bulk), None),
            (USER, html, None, Some(None)),
        ] {
            let whole = stanza(&format!(
                "<message from='{from}' to='v@b.example/r'>{inside}<a xmlns='a'/></message>"
            ));
            let Fate::Passes(left) = rules.judge(whole.clone(), Direction::Sent) else {
                panic!("{whole:?}")
            };
            assert!(left.bytes().len() < whole.bytes().len());
            let expected = Placement { class, expiry };
            assert_eq!(rules.place(&left), expected);
            assert_eq!(rules.place(&whole), expected);
        }
        let placed = rules.counts().find(|(name, ..)| *name == "states").unwrap().2;
        assert_eq!((placed.stanzas, placed.bytes_saved), (1, 0));
        assert_eq!(
            Rules::default().place(&stanza("<presence from='a' to='b'/>")),
            Placement::default()
        );
    }

    /// Each copy counts under its rule's name, apart for what was only watched; a rule that returns after a reload counts on.
    #[test]
    fn matches_are_counted_by_name() {
        let text = format!("<message from='{USER}' to='v@b.example'><body>x</body><html xmlns='{XHTML}'/></message>");
        let watched = Rule {
            observe: true,
            ..drops("watched", Conditions::default())
        };
        let cut = strips("cut", XHTML);
        let mut rules = Rules::new(vec![watched, cut.clone()]);
        for _ in 0..2 {
            rules.judge(stanza(&text), Direction::Sent);
        }
        rules.replace(Vec::new());
        rules.judge(stanza(&text), Direction::Sent);
        rules.replace(vec![cut]);
        rules.judge(stanza(&text), Direction::Sent);
        let xhtml = format!("<html xmlns='{XHTML}'/>").len() as u64;
        let counted: Vec<_> = rules
            .counts()
            .map(|(name, mode, count)| (name.to_owned(), mode, count.stanzas, count.bytes_saved))
            .collect();
        assert_eq!(
            counted,
            [
                ("cut".to_owned(), Mode::Applied, 3, 3 * xhtml),
                ("watched".to_owned(), Mode::Observed, 2, 2 * text.len() as u64),
            ]
        );
    }

    /// Names come and go with every reload, and what is kept of them is bounded.
    #[test]
    fn names_that_come_and_go_are_bounded() {
        let mut rules = Rules::default();
        for n in 0..3 * NAMES_MAX {
            rules.replace(vec![drops(&n.to_string(), Conditions::default())]);
            rules.judge(
                stanza("<presence from='u@a.example/r' to='v@b.example'/>"),
                Direction::Sent,
            );
        }
        assert!(rules.counts().count() <= NAMES_MAX + 1);
    }

    fn any_payload() -> impl Strategy<Value = (&'static str, String)> {
        prop_oneof![
            Just(("body", "<body>x</body>".to_owned())),
            Just(("states", format!("<active xmlns='{CHAT_STATES}'/>"))),
            Just(("xhtml", format!("<html xmlns='{XHTML}'><body>x</body></html>"))),
            Just(("event", "<event xmlns='urn:e'><items node='n'/></event>".to_owned())),
            Just(("room", "<x xmlns='http://jabber.org/protocol/muc#user'/>".to_owned())),
            Just(("thread", "<thread>t</thread>".to_owned())),
        ]
    }

    fn any_rule() -> impl Strategy<Value = Rule> {
        let namespace = || {
            prop_oneof![
                Just(CHAT_STATES),
                Just(XHTML),
                Just("urn:e"),
                Just("*"),
                Just("urn:none")
            ]
        };
        let then = prop_oneof![
            namespace().prop_map(|namespace| Action::Strip(vec![payload(namespace)])),
            Just(Action::Drop),
            (0_u64..9).prop_map(|seconds| Action::Place(Placement {
                class: Some(Class::Bulk),
                expiry: Some(Some(Duration::from_secs(seconds))),
            })),
        ];
        let when = (
            prop::option::of(namespace()),
            prop::option::of(Just("n".to_owned())),
            prop::option::of(any::<bool>()),
            prop::option::of(60_usize..300),
            prop::option::of(Just(Type::Chat)),
        );
        (when, then, prop::bool::weighted(0.2)).prop_map(|((namespace, node, body, larger_than, of), then, observe)| {
            Rule {
                then,
                observe,
                ..drops(
                    "any",
                    Conditions {
                        payload: namespace.map(payload),
                        node,
                        body,
                        larger_than,
                        types: of.into_iter().collect(),
                        ..Conditions::default()
                    },
                )
            }
        })
    }

    proptest! {
        /// What is left of a stanza is again one, is left as it is by the same rules, and waits as they said when it came. Nothing that
        /// rooms need is gone, and what a room says to all is never answered.
        #[test]
        fn what_is_left_is_judged_the_same(
            rules in prop::collection::vec(any_rule(), 0..8),
            inside in prop::collection::vec(any_payload(), 0..8),
            from in prop_oneof![Just(USER), Just(NICK)],
            of in prop_oneof![Just("chat"), Just("groupchat"), Just("headline")],
        ) {
            let inside_text: String = inside.iter().map(|(_, text)| text.as_str()).collect();
            let whole = stanza(&format!("<message from='{from}' to='v@b.example/r' type='{of}'>{inside_text}</message>"));
            let rules = Rules::new(rules);
            let (asked, fate) = rules.explain(whole.clone(), Direction::Sent);
            match fate {
                Fate::Passes(left) => {
                    let decided = asked.iter().find(|(_, said)| *said == Said::Decided);
                    let placement = match decided.map(|(rule, _)| &rule.then) {
                        Some(Action::Place(placement)) => *placement,
                        _ => Placement::default(),
                    };
                    prop_assert_eq!(rules.place(&left), placement);
                    prop_assert_eq!(check::stanza(left.bytes()).ok(), Some(left.clone()));
                    prop_assert_eq!(rules.explain(left.clone(), Direction::Sent).1, Fate::Passes(left.clone()));
                    let kept = |name: &str, text: &str| {
                        let count = inside.iter().filter(|(what, _)| *what == name).count();
                        std::str::from_utf8(left.bytes()).unwrap().matches(text).count() >= count
                    };
                    prop_assert!(kept("body", "<body>") && kept("room", "muc#user") && kept("thread", "<thread>"));
                }
                // A private message of an occupant is answered: this condition makes a room pass it on, and put nobody out.
                Fate::Dropped { answer } => {
                    let answer = answer.map(|answer| String::from_utf8(answer.to_vec()).unwrap());
                    let allowed = from == USER || of == "chat";
                    prop_assert!(answer.is_none_or(|answer| allowed && answer.contains("<policy-violation")));
                }
                Fate::Replaced(_) => prop_assert!(false, "a message is replaced by nothing"),
            }
        }
    }
}
