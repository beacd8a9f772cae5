//! What may differ where words are shown near by before their room has said them (narrows' `mirror.echo`), difference by difference.
//!
//! [`excuse_echoes`] changes a direct run into the one that an echoing run may be, and counts what it changed; whatever else differs, the
//! comparison still finds:
//! 1. the copy of somebody near has no id of the room's archive, where the room has given one;
//! 2. its elements stand in the order in which their author wrote them: ejabberd's rooms put them into one of their own.
//!
//! Nothing is excused the other way round, in part, or for anybody else: an archive id that is a wrong one, or one that only the echoing
//! run has, is a difference. So is an `<occupant-id/>` that is missing, for narrows knows it and adds it.

use std::collections::BTreeMap;

use super::xml::{CLIENT, Element, Node};
use super::{Heard, Recording, mask};

/// How often each difference was there.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Excused {
    pub without_ids: usize,
    pub in_authors_order: usize,
}

/// Makes of a direct run what an echoing one may be. `is_near` says who hears each other at once, by what their names and nicks begin with.
pub fn excuse_echoes(direct: &mut Recording, echoing: &Recording, is_near: impl Fn(&str) -> bool) -> Excused {
    let mut excused = Excused::default();
    for (name, heard) in direct.clients.iter_mut().filter(|(name, _)| is_near(name)) {
        let mut twins: BTreeMap<(String, String), Vec<&Element>> = BTreeMap::new();
        let echoed = echoing.clients.get(name).into_iter().flatten().rev();
        for Heard { stanza, .. } in echoed {
            if let Some(word) = word_of(stanza, &is_near) {
                twins.entry(word).or_default().push(stanza);
            }
        }
        for Heard { stanza, .. } in heard {
            let twin = word_of(stanza, &is_near).and_then(|word| twins.get_mut(&word)?.pop());
            if let Some(twin) = twin {
                excuse(stanza, twin, &mut excused);
            }
        }
    }
    excused
}

/// Who said what, if it was said now and to the whole room, and by somebody near.
fn word_of(stanza: &Element, is_near: impl Fn(&str) -> bool) -> Option<(String, String)> {
    let from = stanza.attr("from")?;
    let (_, nick) = from.split_once('/')?;
    let body = stanza.child_text(CLIENT, "body")?;
    let is_said = stanza.name == "message" && stanza.attr("type") == Some("groupchat");
    let is_old = stanza.elements().any(|child| child.name == "delay");
    (is_said && !is_old && is_near(nick)).then(|| (from.to_owned(), body))
}

fn excuse(direct: &mut Element, echoed: &Element, excused: &mut Excused) {
    let has_ids = |stanza: &Element| stanza.elements().any(mask::is_archive_id);
    if has_ids(direct) && !has_ids(echoed) {
        direct
            .children
            .retain(|node| !matches!(node, Node::Element(element) if mask::is_archive_id(element)));
        excused.without_ids += 1;
    }
    let [before, wanted] = [&*direct, echoed].map(|stanza| stanza.children.iter().map(kind).collect::<Vec<_>>());
    if before == wanted {
        return;
    }
    let mut rest: Vec<Node> = direct.children.clone();
    let mut ordered = Vec::new();
    for wanted in wanted {
        let Some(at) = rest.iter().position(|node| kind(node) == wanted) else {
            return;
        };
        ordered.push(rest.remove(at));
    }
    if rest.is_empty() {
        direct.children = ordered;
        excused.in_authors_order += 1;
    }
}

/// What a child is, whatever it holds; nothing for a text.
fn kind(node: &Node) -> Option<(&str, &str)> {
    match node {
        Node::Element(element) => Some((&element.ns, &element.name)),
        Node::Text(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Differences, compare};
    use super::*;

    const OCCUPANT: &str = "<occupant-id xmlns='urn:xmpp:occupant-id:0' id='o'/>";
    const ARCHIVED: &str = "<stanza-id xmlns='urn:xmpp:sid:0' by='r@c' id='s'/>";
    const OWN: &str = "<active xmlns='http://jabber.org/protocol/chatstates'/>";

    /// What somebody hears of somebody: content after content.
    fn run(client: &str, nick: &str, contents: &[String]) -> Recording {
        let heard = contents.iter().map(|content| Heard {
            step: 0,
            stanza: Element::parse(&format!(
                "<message xmlns='jabber:client' type='groupchat' from='r@c/{nick}' to='{client}' id='nw.1'>{content}</message>"
            ))
            .unwrap(),
        });
        Recording {
            steps: vec!["speak".to_owned()],
            clients: [(client.to_owned(), heard.collect())].into(),
        }
    }

    fn hold(client: &str, nick: &str, direct: &[&str], echoing: &[&str]) -> Result<Excused, Differences> {
        let [direct, echoing] = [direct, echoing].map(|parts| run(client, nick, &[parts.concat()]));
        let mut expected = direct;
        let excused = excuse_echoes(&mut expected, &echoing, |name| name.starts_with('b'));
        compare(&expected, &echoing).map(|()| excused)
    }

    /// Each declared difference is excused and counted, alone and together.
    #[test]
    fn a_declared_difference_is_excused_and_counted() {
        let counts = |without_ids, in_authors_order| {
            Ok(Excused {
                without_ids,
                in_authors_order,
            })
        };
        let body = "<body>one</body>";
        let near = |direct: &[&str], echoing: &[&str]| hold("b2/r", "b1", direct, echoing);
        assert_eq!(near(&[body, OCCUPANT], &[body, OCCUPANT]), counts(0, 0));
        assert_eq!(near(&[body, ARCHIVED, OCCUPANT], &[body, OCCUPANT]), counts(1, 0));
        assert_eq!(near(&[OWN, body], &[body, OWN]), counts(0, 1));
        assert_eq!(near(&[OWN, ARCHIVED, body], &[body, OWN]), counts(1, 1));
    }

    /// Everything else that may be wrong with an echo is a difference; so is what is declared, at or from those who are not near.
    #[test]
    fn any_other_difference_is_found() {
        let body = "<body>one</body>";
        let near = |direct: &[&str], echoing: &[&str]| hold("b2/r", "b1", direct, echoing);
        near(&[body, OCCUPANT], &[body]).unwrap_err();
        near(&[body], &[body, OCCUPANT]).unwrap_err();
        near(&[body], &[body, ARCHIVED]).unwrap_err();
        near(&[body, ARCHIVED], &[body, &ARCHIVED.replace("r@c", "x@c")]).unwrap_err();
        near(&[body, OWN], &[body]).unwrap_err();
        near(&[OWN, body], &[body, OWN, OWN]).unwrap_err();
        near(&[body], &["<body>two</body>"]).unwrap_err();
        for (client, nick) in [("alice/pc", "b1"), ("b2/r", "alice")] {
            hold(client, nick, &[body, ARCHIVED], &[body]).unwrap_err();
            hold(client, nick, &[OWN, body], &[body, OWN]).unwrap_err();
        }
        // What is old comes from the room.
        let delay = "<delay xmlns='urn:xmpp:delay' stamp='s'/>";
        near(&[body, ARCHIVED, delay], &[body, delay]).unwrap_err();
    }

    /// A word that is lost, doubled, or overtaken by another of its author stays a difference.
    #[test]
    fn words_are_not_excused() {
        let words = ["one", "two"].map(|word| format!("<body>{word}</body>{ARCHIVED}"));
        let bare = ["one", "two"].map(|word| format!("<body>{word}</body>"));
        let hold = |echoing: &[String]| {
            let (mut direct, echoing) = (run("b2/r", "b1", &words), run("b2/r", "b1", echoing));
            excuse_echoes(&mut direct, &echoing, |name| name.starts_with('b'));
            compare(&direct, &echoing)
        };
        let [one, two] = &bare;
        hold(&bare).unwrap();
        hold(std::slice::from_ref(one)).unwrap_err();
        hold(&[one.clone(), two.clone(), two.clone()]).unwrap_err();
        hold(&[two.clone(), one.clone()]).unwrap_err();
    }
}
