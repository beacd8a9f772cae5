//! The part of the configuration that says what goes first, what is given up, and what does not go at all.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{AddressPattern, ClassName, CountOrOff, Name, Payload, PeriodOrOff, Queue, Size, SizeOrOff, StanzaType};
use crate::{
    queue::{
        class::{Class, ClassSettings, Classes as Settings},
        rules,
    },
    stanza::Kind,
};

/// The classes that something waits in, by urgency: each gets its share of the link, and order is kept all the same, per sender and recipient
/// and per room.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Classes {
    /// What somebody waits for: answers to IQs, a user's own presence in a room, errors.
    ///
    /// Weight 16: there is little of it.
    pub urgent: Urgent,

    /// What people say, and who enters and leaves a room.
    ///
    /// Expiry `12h`: longer than one planned outage; then the sender is told.
    pub message: Message,

    /// Questions.
    ///
    /// Expiry `1m`: clients wait no longer. 10,000 is what a thousand clients ask at once.
    pub iq: Iq,

    /// Changes of status. Only the newest of a sender counts.
    ///
    /// No expiry: however old, the newest is what is so.
    pub presence: Presence,

    /// Chat states: who is typing.
    ///
    /// Expiry `5s`: who was typing then has said it, or does no more.
    pub state: State,

    /// What is large or not waited for: avatars, pages of an archive, files.
    ///
    /// 200 MiB take two days at 9600 bit/s.
    pub bulk: Bulk,
}

/// A class's section. The keys are the same in each, the defaults are those of [`ClassSettings::of`].
macro_rules! class_section {
    ($section:ident, $class:expr, $doc:literal) => {
        #[doc = $doc]
        #[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $section {
            /// Its share of the link while others wait too, from 1 to 1000.
            #[schemars(range(min = 1, max = 1000))]
            pub weight: u32,

            /// How long something may wait, or `off`.
            pub expiry: PeriodOrOff,

            /// How many entries may wait for each peer. `off`: as many as the queue takes.
            pub entries_max: CountOrOff,

            /// How many bytes may wait for each peer. `off`: as many as the queue takes.
            pub bytes_max: SizeOrOff,
        }

        impl Default for $section {
            fn default() -> Self {
                let default = ClassSettings::of($class);
                Self {
                    weight: default.weight,
                    expiry: PeriodOrOff::from(default.expiry),
                    entries_max: CountOrOff::from(default.entries_max),
                    bytes_max: SizeOrOff::from(default.bytes_max),
                }
            }
        }

        impl $section {
            fn settings(&self) -> ClassSettings {
                ClassSettings {
                    weight: self.weight,
                    expiry: self.expiry.period(),
                    entries_max: self.entries_max.value(),
                    bytes_max: self.bytes_max.value(),
                    ..ClassSettings::of($class)
                }
            }
        }
    };
}

class_section!(Urgent, Class::Urgent, "What somebody waits for.");
class_section!(Message, Class::Message, "What people say.");
class_section!(Iq, Class::Iq, "Questions.");
class_section!(Presence, Class::Presence, "Changes of status.");
class_section!(State, Class::State, "Chat states.");
class_section!(Bulk, Class::Bulk, "What is large or not waited for.");

impl Classes {
    /// The same without YAML, for the queue itself.
    pub fn settings(&self) -> Settings {
        let mut settings = Settings::default();
        for (class, key) in self.all() {
            settings[class] = key;
        }
        settings
    }

    /// Each class that has keys.
    pub(super) fn all(&self) -> [(Class, ClassSettings); 6] {
        [
            (Class::Urgent, self.urgent.settings()),
            (Class::Message, self.message.settings()),
            (Class::Iq, self.iq.settings()),
            (Class::Presence, self.presence.settings()),
            (Class::State, self.state.settings()),
            (Class::Bulk, self.bulk.settings()),
        ]
    }
}

/// What is decided about certain stanzas.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// What the rule is called in metrics and by `narrows explain`.
    ///
    /// No default.
    pub name: Name,

    /// What a stanza must have to be matched: all that is given here.
    ///
    /// Default: nothing; then all stanzas match.
    #[serde(default, rename = "match")]
    pub when: Match,

    /// The class that it waits in: `urgent`, `message`, `iq`, `presence`, `state` or `bulk`.
    ///
    /// Default: the one that it has by its nature.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<ClassName>,

    /// How long it may wait, or `off`.
    ///
    /// Default: as its class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expiry: Option<PeriodOrOff>,

    /// Payloads that are taken out of messages and presences: a namespace, in which each `*` stands for any characters, and after a space an
    /// element's name if only that is meant. What rooms and clients cannot do without stays in (`body`, what XEP-0045 puts in …). A
    /// message of which nothing is left does not go.
    ///
    /// Default: none. A rule does one thing: it strips, or drops, or says class and expiry.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100))]
    pub strip: Vec<Payload>,

    /// Whether it does not go at all. A user whose words or question are dropped gets an error (`policy-violation`), and so does who waits for
    /// an answer; all else goes in silence, and what comes from a room always does, because rooms put out whoever answers with an
    /// error. Leaves, errors and a user's own presence in a room are never dropped.
    ///
    /// Default `false`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub drop: bool,

    /// Whether it is only counted what the rule would do (`narrows_rule_stanzas_total{mode="observed"}`).
    ///
    /// Default `false`. `true` is for trying a rule out.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub observe: bool,
}

/// What a stanza must have.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Match {
    /// `message`, `presence` or `iq`.
    ///
    /// Default: any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stanza: Option<StanzaKind>,

    /// Types, of which it has one. A message without a type is `normal`, a presence without one is `available`.
    ///
    /// Default: any.
    #[serde(rename = "type", skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 15))]
    pub types: Vec<StanzaType>,

    /// What one of its children is: a namespace, in which each `*` stands for any characters, and after a space an element's name if only that
    /// is meant.
    ///
    /// Default: any, or none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payload: Option<Payload>,

    /// The node that the payload is about, in publish-subscribe (PEP) and service discovery; each `*` stands for any characters.
    ///
    /// Default: any, or none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,

    /// Whether it has a `body`.
    ///
    /// Default: either.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<bool>,

    /// Who sends it: a domain, a room or user without resource, or a full address, by its form; each `*` stands for any characters.
    ///
    /// Default: anybody.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<AddressPattern>,

    /// Whom it is for, written as `from`. Copies of a message of which only some match cross as two.
    ///
    /// Default: anybody.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<AddressPattern>,

    /// The bytes of the stanza as the server wrote it must be more than this.
    ///
    /// Default: any size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub larger_than: Option<Size>,

    /// `sent`: what the server here sends to a peer. `received`: what comes from a peer, before the server here gets it; it has crossed
    /// then, so it can be stripped or dropped and has no class.
    ///
    /// Default `sent`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direction: Option<Direction>,

    /// The peer that it goes to or comes from.
    ///
    /// Default: any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<Name>,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StanzaKind {
    Message,
    Presence,
    Iq,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    Sent,
    Received,
}

impl From<StanzaKind> for Kind {
    fn from(kind: StanzaKind) -> Self {
        match kind {
            StanzaKind::Message => Self::Message,
            StanzaKind::Presence => Self::Presence,
            StanzaKind::Iq => Self::Iq,
        }
    }
}

impl Queue {
    /// The rules that concern a peer, without YAML, for its relay.
    pub fn rules_for(&self, peer: &Name) -> Vec<rules::Rule> {
        let concerns = |rule: &&Rule| rule.when.peer.as_ref().is_none_or(|named| named == peer);
        self.rules.iter().filter(concerns).map(Rule::settings).collect()
    }
}

impl Rule {
    pub(super) fn direction(&self) -> Direction {
        self.when.direction.unwrap_or(Direction::Sent)
    }

    fn settings(&self) -> rules::Rule {
        let then = if self.drop {
            rules::Action::Drop
        } else if !self.strip.is_empty() {
            rules::Action::Strip(self.strip.iter().map(|payload| payload.0.clone()).collect())
        } else {
            rules::Action::Place(rules::Placement {
                class: self.class.map(|class| class.0),
                expiry: self.expiry.map(PeriodOrOff::period),
            })
        };
        rules::Rule {
            name: self.name.as_str().into(),
            direction: match self.direction() {
                Direction::Sent => rules::Direction::Sent,
                Direction::Received => rules::Direction::Received,
            },
            when: self.when.settings(),
            then,
            observe: self.observe,
        }
    }
}

impl Match {
    fn settings(&self) -> rules::Conditions {
        rules::Conditions {
            kind: self.stanza.map(Kind::from),
            types: self.types.iter().map(|of| of.0).collect(),
            payload: self.payload.as_ref().map(|payload| payload.0.clone()),
            node: self.node.clone(),
            body: self.body,
            from: self.from.as_ref().map(|pattern| pattern.0.clone()),
            to: self.to.as_ref().map(|pattern| pattern.0.clone()),
            larger_than: self
                .larger_than
                .map(|size| usize::try_from(size.0).unwrap_or(usize::MAX)),
        }
    }
}
