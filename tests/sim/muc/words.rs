//! What is said to everybody in a room: who must hear it, how often, and in which order.
//!
//! No two words are the same here, so each is followed from its author to every session that the room addressed. A session hears what
//! the room said to it once: from the room, in the room's order; or near by before that, if it was said on this side of the link; or,
//! if it was lost with a process, from the room's history. What nobody said, nobody hears.

use std::collections::BTreeMap;

use bytes::Bytes;
use narrows::stanza::{bare, domain_of, resource_of};

use super::{
    check::Declared,
    xml::{self, attribute, child, elements, inner, name},
};

/// What somebody has said to a room.
pub struct Speech {
    pub author: String,
    pub site: usize,
    pub room: String,
    /// As its client wrote it.
    pub payload: String,
}

/// By the element that holds it.
pub type Speeches = BTreeMap<String, Speech>;

/// The body of what is said to all in a room.
pub fn body(stanza: &str) -> Option<&str> {
    let is_said = attribute(stanza, "type") == Some("groupchat") && !is_notice(stanza);
    child(stanza, "body").filter(|_| is_said)
}

/// Whether the room repeats what was said before.
pub fn is_old(stanza: &str) -> bool {
    let room = attribute(stanza, "from").map(bare);
    let mut children = elements(inner(stanza)).into_iter();
    children.any(|child| name(child) == "delay" && attribute(child, "from") == room)
}

/// What a mirror says in the name of a room: that it has not taken what was heard near by. A room's own words have no body.
pub fn is_notice(stanza: &str) -> bool {
    let from = attribute(stanza, "from").unwrap_or_default();
    let is_room = domain_of(from).starts_with("conference.") && resource_of(from).is_none();
    is_room && child(stanza, "body").is_some_and(|body| body.contains("was not accepted by the room") || is_gap(body))
}

/// That words are missing which were said while one was out.
pub fn is_gap(body: &str) -> bool {
    body.contains("may be missing")
}

/// Whether these are the same words of the room, the second of them from a history; of a line of one's own that is another's.
pub fn is_found(sent: &str, heard: &str) -> bool {
    let same = |name| attribute(sent, name) == attribute(heard, name);
    let is_same = same("from") && same("to") && same("id") && body(sent).is_some() && body(sent) == body(heard);
    is_same && is_old(heard)
}

/// One word, as far as one session is concerned.
#[derive(Debug, Default)]
struct Word {
    /// Where it stands in what the room said to the session.
    place: Option<usize>,
    /// How often the room has said it, and repeated it to a newcomer.
    said: u64,
    repeated: u64,
    /// As often it may be missing.
    excuses: u64,
    heard: u64,
    heard_old: u64,
}

/// What one session was told by a room, `sent` without what the room repeated for us alone. `site` is the session's.
pub fn check(
    sent: &[(&Bytes, bool)],
    heard: &[&Bytes],
    doubted: &[&Bytes],
    declared: Declared<'_>,
    (speeches, site): (&Speeches, usize),
) {
    let mut words: BTreeMap<&str, Word> = BTreeMap::new();
    for (at, (bytes, excused)) in sent.iter().enumerate() {
        let stanza = xml::text(bytes);
        let Some(body) = body(stanza) else { continue };
        let word = words.entry(body).or_default();
        word.excuses += u64::from(*excused);
        if is_old(stanza) {
            word.repeated += 1;
        } else {
            assert_eq!(word.said, 0, "the room says it twice: {stanza}");
            word.said += 1;
            word.place = Some(at);
        }
    }
    // An echo that may have been heard stands for the reflection that was then swallowed.
    for body in doubted.iter().filter_map(|bytes| body(xml::text(bytes))) {
        words.entry(body).or_default().excuses += 1;
    }
    // Of what comes from beyond the link, the place of the last; and the last of each author.
    let (mut furthest, mut last) = (None, BTreeMap::new());
    for bytes in heard {
        let stanza = xml::text(bytes);
        let Some(body) = body(stanza) else { continue };
        let word = words.entry(body).or_default();
        let room = attribute(stanza, "from").map(bare);
        let speech = speeches.get(body).filter(|speech| Some(&*speech.room) == room);
        let speech = speech.unwrap_or_else(|| panic!("nobody said {stanza}"));
        let is_near = declared.echo.is_some() && speech.site == site;
        assert_eq!(
            children(inner(stanza)),
            children(&speech.payload),
            "said otherwise: {stanza}"
        );
        if is_old(stanza) {
            word.heard_old += 1;
            // With its place in a newcomer's history there is nothing to compare.
            if word.repeated > 0 {
                continue;
            }
        } else {
            word.heard += 1;
            let before = last.insert(&*speech.author, number(body));
            assert!(before < Some(number(body)), "after a later one of its author: {stanza}");
        }
        // What comes near by comes early, never late.
        if !is_near || word.place.is_some() {
            assert!(word.place.is_some(), "it was not for this one: {stanza}");
            assert!(furthest < word.place, "after what the room said later: {stanza}");
            furthest = furthest.max(word.place.filter(|_| !is_near));
        }
    }
    for (body, word) in words {
        let is_near = declared.echo.is_some() && speeches.get(body).is_some_and(|speech| speech.site == site);
        let Word {
            said,
            repeated,
            excuses,
            heard,
            heard_old,
            ..
        } = word;
        let found = heard_old.saturating_sub(repeated);
        let live_max = if is_near { 1 } else { said };
        assert!(
            heard + found <= live_max,
            "heard more often than it was said: {body} {word:?}"
        );
        assert!(
            found == 0 || declared.found,
            "only what was lost is found: {body} {word:?}"
        );
        let live_due = said.saturating_sub(excuses);
        assert!(heard + found >= live_due, "lost: {body} {word:?}");
        // The room may repeat to a newcomer what it has heard near by.
        let old_due = repeated.saturating_sub(excuses);
        assert!(
            heard_old >= old_due || is_near && heard > said,
            "not repeated: {body} {word:?}"
        );
    }
}

/// What was said beside what servers add, in any order.
fn children(payload: &str) -> Vec<&str> {
    let added = ["occupant-id", "stanza-id", "delay"];
    let mut children = elements(payload);
    children.retain(|child| !added.contains(&name(child)));
    children.sort_unstable();
    children
}

/// Words are numbered in the order in which they are said.
fn number(body: &str) -> Option<u64> {
    let text = body.strip_prefix("<body>")?;
    text.split(' ').next()?.parse().ok()
}
