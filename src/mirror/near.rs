//! Questions that are answered from what was answered before (XEP-0030).
//!
//! A far service or room says the same to everybody who asks what it is, and clients ask whenever they start. What it said is kept for
//! a while, and repeated to whom it may concern:
//!
//! * `disco#info` of a service is for all;
//! * `disco#info` of a room, for whoever is in it;
//! * anything else may differ by who asks, and is repeated to the same user only.
//!
//! Only what came whole, as an answer to the same question, is repeated; errors never are.
//!
//! Whether a service is there (XEP-0199) is known for a while from anything that its server has said.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use crate::{
    codec::{check, xml::Node},
    stanza::{Stanza, bare, escape_attribute, ns, resource_of},
    time::{Mono, Now},
};

/// Questions under way; beyond it the oldest has waited longest in vain, and its answer is passed on and not kept.
const QUESTIONS_MAX: usize = 1_000;
/// Answers kept, and the size of one: some room lists are megabytes, and change all the time.
const ANSWERS_MAX: usize = 500;
const ANSWER_BYTES_MAX: usize = 8 * 1024;

/// What a server has said shows for so long that it is there. One that asks far servers regularly (as modules that keep streams alive do)
/// asks once a minute.
const THERE_FOR: Duration = Duration::from_secs(60);

/// Who a kept answer is for.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Audience {
    All,
    Occupants,
    One(String),
}

#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Key {
    /// Whom the question is for.
    to: String,
    namespace: String,
    node: String,
    audience: Audience,
}

#[derive(Debug)]
struct Answer {
    /// The `query` element as it came.
    query: String,
    at: Mono,
}

#[derive(Debug)]
pub struct Near {
    lifetime: Duration,
    /// By asker and id.
    questions: BTreeMap<(String, String), Key>,
    /// The same in the order in which they were asked.
    asked: VecDeque<(String, String)>,
    answers: BTreeMap<Key, Answer>,
    /// Keys in the order in which their answers came.
    order: VecDeque<Key>,
    /// When each of the peer's domains last said something. A peer speaks for those of its configuration only.
    heard: BTreeMap<String, Mono>,
}

impl Near {
    pub fn new(lifetime: Duration) -> Self {
        Self {
            lifetime,
            questions: BTreeMap::new(),
            asked: VecDeque::new(),
            answers: BTreeMap::new(),
            order: VecDeque::new(),
            heard: BTreeMap::new(),
        }
    }

    /// Something of this domain has crossed, which its server said then.
    pub fn hear(&mut self, domain: &str, at: Mono) {
        match self.heard.get_mut(domain) {
            Some(last) => *last = at.max(*last),
            None => drop(self.heard.insert(domain.to_owned(), at)),
        }
    }

    pub fn is_there(&self, domain: &str, now: Now) -> bool {
        self.heard.get(domain).is_some_and(|at| now.mono.since(*at) < THERE_FOR)
    }

    pub fn set_lifetime(&mut self, lifetime: Duration) {
        self.lifetime = lifetime;
    }

    /// A question of one of our users: gives the answer, or waits for the one that will come.
    pub fn ask(
        &mut self,
        stanza: &Stanza,
        node: &Node,
        from: &str,
        to: &str,
        is_occupant: bool,
        now: Now,
    ) -> Option<Stanza> {
        // What is asked of an occupant, its client answers.
        if self.lifetime.is_zero() || resource_of(to).is_some() {
            return None;
        }
        let query = [ns::DISCO_INFO, ns::DISCO_ITEMS]
            .iter()
            .find_map(|namespace| node.child(namespace, "query"))?;
        // Only a plain question: extensions (XEP-0059 pages, for one) ask for a part.
        if !query.children.is_empty() || node.children.len() != 1 {
            return None;
        }
        let is_room = to.contains('@');
        let audience = match (query.namespace == ns::DISCO_INFO, is_room, is_occupant) {
            (true, false, _) => Audience::All,
            (true, true, true) => Audience::Occupants,
            _ => Audience::One(bare(from).to_owned()),
        };
        let key = Key {
            to: to.to_owned(),
            namespace: query.namespace.clone(),
            node: query.attribute("node").unwrap_or_default().to_owned(),
            audience,
        };
        if let Some(answer) = self.answers.get(&key)
            && now.mono.since(answer.at) < self.lifetime
        {
            return result(stanza, &answer.query);
        }
        if let Some(id) = stanza.id() {
            self.note_question((from.to_owned(), id.into_owned()), key);
        }
        None
    }

    fn note_question(&mut self, question: (String, String), key: Key) {
        self.take_question(&question);
        if self.questions.len() >= QUESTIONS_MAX
            && let Some(oldest) = self.asked.pop_front()
        {
            self.questions.remove(&oldest);
        }
        self.asked.push_back(question.clone());
        self.questions.insert(question, key);
    }

    fn take_question(&mut self, question: &(String, String)) -> Option<Key> {
        let key = self.questions.remove(question)?;
        self.asked.retain(|asked| asked != question);
        Some(key)
    }

    /// An IQ that has crossed: keeps it, if it answers a question of ours.
    pub fn handle_far(&mut self, stanza: &Stanza, now: Now) {
        let (Some(to), Some(id)) = (stanza.to(), stanza.id()) else {
            return;
        };
        let question = (to.into_owned(), id.into_owned());
        if self.questions.get(&question).map(|key| &*key.to) != stanza.from().as_deref() {
            return;
        }
        let Some(key) = self.take_question(&question) else {
            return;
        };
        if stanza.stanza_type().as_deref() != Some("result") || stanza.bytes().len() > ANSWER_BYTES_MAX {
            return;
        }
        let Some(query) = stanza.child_text(&key.namespace, "query") else {
            return;
        };
        // It may lean on a prefix that was declared outside of it.
        if check::stanza(&format!("<iq type='result' id=''>{query}</iq>").into()).is_err() {
            return;
        }
        if self.answers.len() >= ANSWERS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.answers.remove(&oldest);
        }
        self.order.retain(|known| *known != key);
        self.order.push_back(key.clone());
        self.answers.insert(key, Answer { query, at: now.mono });
    }

    /// Whether a room has said, to whomever, that everybody may enter (XEP-0045 §15.3).
    pub fn is_open(&self, room: &str) -> bool {
        let info = |key: &&Key| key.to == room && key.namespace == ns::DISCO_INFO && key.node.is_empty();
        let said = self.order.iter().rev().find(info).and_then(|key| self.answers.get(key));
        said.is_some_and(|answer| {
            let has = |feature: &str| {
                ["'", "\""]
                    .iter()
                    .any(|quote| answer.query.contains(&format!("{quote}{feature}{quote}")))
            };
            has("muc_open") && !has("muc_passwordprotected")
        })
    }

    /// A room has said that its configuration changed, or is gone.
    pub fn forget_room(&mut self, room: &str) {
        self.answers.retain(|key, _| key.to != room);
        self.order.retain(|key| key.to != room);
    }

    /// Their answers may be lost with the link.
    pub fn forget_questions(&mut self) {
        self.questions.clear();
        self.asked.clear();
    }
}

/// The result for who has asked.
pub fn result(question: &Stanza, payload: &str) -> Option<Stanza> {
    let (from, to, id) = (question.to()?, question.from()?, question.id()?);
    let answer = format!(
        "<iq type='result' from='{}' to='{}' id='{}'>{payload}</iq>",
        escape_attribute(&from),
        escape_attribute(&to),
        escape_attribute(&id)
    );
    Stanza::parse(answer.into()).ok()
}
