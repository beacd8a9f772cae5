//! What every client of a scenario received, and whether two runs of it are the same.
//!
//! [`compare`] holds two [`Recording`]s against each other, client by client:
//! 1. the same stanzas, as often ([`mask`] takes out what servers make up anew in every run);
//! 2. in the same order per sender (the full `from`; in a room that is the occupant);
//! 3. in the same order per room or user (the bare `from`), except that presences which follow each other may change
//!    places: who is in a room is told in the order of a hash table;
//! 4. with one renaming of made-up values for the whole run, so that equal values stay equal and different ones differ.
//!
//! Time is not compared.

pub mod echo;
pub mod mask;
pub mod xml;

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

use self::mask::{Masked, Volatile, is_capabilities_request, mask};
use self::xml::Element;
use crate::client::shorten;

/// More differences than these help nobody to find the first cause.
const SHOWN_MAX: usize = 20;

/// What the clients of one run received.
#[derive(Clone, Debug, Default)]
pub struct Recording {
    /// What was done, in order.
    pub steps: Vec<String>,
    pub clients: BTreeMap<String, Vec<Heard>>,
}

/// A stanza, and the step during which it came.
#[derive(Clone, Debug)]
pub struct Heard {
    pub step: usize,
    pub stanza: Element,
}

impl Recording {
    pub fn stanzas(&self) -> usize {
        self.clients.values().map(Vec::len).sum()
    }

    /// Everything as text, a stanza a line, for a person or `diff`.
    pub fn dump(&self) -> String {
        let mut out = String::new();
        for (client, heard) in &self.clients {
            for Heard { step, stanza } in heard {
                let _ = writeln!(out, "{client}\t{}\t{}", self.step(*step), stanza.canonical());
            }
        }
        out
    }

    fn step(&self, at: usize) -> String {
        format!("{at} {}", self.steps.get(at).map_or("", String::as_str))
    }
}

/// Where two recordings differ, for a person to read.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Differences(pub Vec<String>);

impl fmt::Display for Differences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} differences ('-' only in the first run, '+' only in the second):",
            self.0.len()
        )?;
        for line in self.0.iter().take(SHOWN_MAX) {
            writeln!(f, "{line}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Differences {}

/// Whether every client received the same in both runs.
pub fn compare(first: &Recording, second: &Recording) -> Result<(), Differences> {
    let mut found = Vec::new();
    if first.steps != second.steps {
        found.push(format!(
            "not the same scenario: {}",
            first_difference(&first.steps, &second.steps)
        ));
    }
    let mut renaming = Renaming::default();
    let nobody = Vec::new();
    let names: std::collections::BTreeSet<_> = first.clients.keys().chain(second.clients.keys()).collect();
    for name in names {
        let lines = |recording: &Recording| -> Vec<Line> {
            let heard = recording.clients.get(name).unwrap_or(&nobody);
            let heard = heard.iter().filter(|heard| !is_capabilities_request(&heard.stanza));
            heard.map(|heard| Line::new(heard, recording)).collect()
        };
        compare_client(name, &lines(first), &lines(second), &mut renaming, &mut found);
    }
    if found.is_empty() {
        Ok(())
    } else {
        Err(Differences(found))
    }
}

/// A stanza made ready for comparison.
struct Line {
    step: String,
    is_presence: bool,
    from: String,
    masked: Masked,
}

impl Line {
    fn new(heard: &Heard, recording: &Recording) -> Self {
        Self {
            step: recording.step(heard.step),
            is_presence: heard.stanza.name == "presence",
            from: heard.stanza.attr("from").unwrap_or_default().to_owned(),
            masked: mask(&heard.stanza),
        }
    }

    fn bare_from(&self) -> &str {
        self.from.split('/').next().unwrap_or_default()
    }

    fn show(&self) -> String {
        format!("[{}] {}", self.step, shorten(&self.masked.skeleton))
    }
}

fn compare_client(name: &str, first: &[Line], second: &[Line], renaming: &mut Renaming, found: &mut Vec<String>) {
    let before = found.len();
    compare_sets(name, first, second, found);
    if found.len() > before {
        return; // what is missing would be reported again as out of order
    }
    let (ours, theirs) = (by_key(first, |line| &line.from), by_key(second, |line| &line.from));
    for (from, ours) in &ours {
        let theirs = &theirs[from]; // the sets are equal, so the senders are
        compare_order(name, &format!("from {from}"), ours, theirs, found);
    }
    if found.len() > before {
        return;
    }
    let (bare_ours, bare_theirs) = (by_key(first, Line::bare_from), by_key(second, Line::bare_from));
    for (from, ours) in &bare_ours {
        compare_order(
            name,
            &format!("of {from}"),
            &runs_sorted(ours),
            &runs_sorted(&bare_theirs[from]),
            found,
        );
    }
    for (from, ours) in &ours {
        for (one, other) in ours.iter().zip(&theirs[from]) {
            renaming.compare(name, one, other, found);
        }
    }
}

fn compare_sets(name: &str, first: &[Line], second: &[Line], found: &mut Vec<String>) {
    let mut balance: BTreeMap<&str, (Vec<&Line>, Vec<&Line>)> = BTreeMap::new();
    for line in first {
        balance.entry(&line.masked.skeleton).or_default().0.push(line);
    }
    for line in second {
        balance.entry(&line.masked.skeleton).or_default().1.push(line);
    }
    let mut only_first = Vec::new();
    let mut only_second = Vec::new();
    for (ours, theirs) in balance.into_values() {
        let common = ours.len().min(theirs.len());
        only_first.extend(ours.into_iter().skip(common));
        only_second.extend(theirs.into_iter().skip(common));
    }
    for line in only_first {
        let twin = only_second
            .iter()
            .position(|other| other.step == line.step && other.from == line.from);
        match twin.map(|at| only_second.remove(at)) {
            Some(other) => found.push(format!(
                "{name}: altered\n  - {}\n  + {}\n  {}",
                line.show(),
                other.show(),
                apart(line, other)
            )),
            None => found.push(format!("{name}: missing\n  - {}", line.show())),
        }
    }
    found.extend(
        only_second
            .into_iter()
            .map(|line| format!("{name}: extra\n  + {}", line.show())),
    );
}

/// Where two skeletons begin to differ.
fn apart(one: &Line, other: &Line) -> String {
    let (one, other) = (&one.masked.skeleton, &other.masked.skeleton);
    let same = one.chars().zip(other.chars()).take_while(|(a, b)| a == b).count();
    let rest = |text: &str| text.chars().skip(same.saturating_sub(20)).take(80).collect::<String>();
    format!("from character {same}: …{} / …{}", rest(one), rest(other))
}

fn by_key<'l>(lines: &'l [Line], key: impl Fn(&'l Line) -> &'l str) -> BTreeMap<&'l str, Vec<&'l Line>> {
    let mut map: BTreeMap<&str, Vec<&Line>> = BTreeMap::new();
    for line in lines {
        map.entry(key(line)).or_default().push(line);
    }
    map
}

/// Presences that follow each other, in an order that does not depend on the server's tables.
fn runs_sorted<'l>(lines: &[&'l Line]) -> Vec<&'l Line> {
    let mut lines = lines.to_vec();
    for run in lines.chunk_by_mut(|one, other| one.is_presence && other.is_presence) {
        run.sort_by(|one, other| one.masked.skeleton.cmp(&other.masked.skeleton));
    }
    lines
}

fn compare_order(name: &str, what: &str, first: &[&Line], second: &[&Line], found: &mut Vec<String>) {
    let apart = first
        .iter()
        .zip(second)
        .position(|(one, other)| one.masked.skeleton != other.masked.skeleton);
    if let Some(at) = apart {
        let shown = |lines: &[&Line], sign: char| -> String {
            lines
                .iter()
                .skip(at)
                .take(3)
                .map(|line| format!("\n  {sign} {}", line.show()))
                .collect()
        };
        found.push(format!(
            "{name}: another order {what}{}{}",
            shown(first, '-'),
            shown(second, '+')
        ));
    }
}

fn first_difference(first: &[String], second: &[String]) -> String {
    let at = first.iter().zip(second).take_while(|(one, other)| one == other).count();
    format!("step {at}: {:?} / {:?}", first.get(at), second.get(at))
}

/// Which made-up value of the second run stands for which one of the first.
#[derive(Default)]
struct Renaming {
    forth: BTreeMap<(Volatile, String), String>,
    back: BTreeMap<(Volatile, String), String>,
}

impl Renaming {
    fn compare(&mut self, name: &str, one: &Line, other: &Line, found: &mut Vec<String>) {
        for ((kind, ours), (_, theirs)) in one.masked.values.iter().zip(&other.masked.values) {
            let forth = self
                .forth
                .entry((*kind, ours.clone()))
                .or_insert_with(|| theirs.clone());
            let back = self.back.entry((*kind, theirs.clone())).or_insert_with(|| ours.clone());
            if forth != theirs || back != ours {
                let known = format!("{ours} was {forth}, {theirs} was {back} before");
                found.push(format!(
                    "{name}: {kind:?} {ours} / {theirs}, but {known}\n  - {}\n  + {}",
                    one.show(),
                    other.show()
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two clients in a room of Prosody with an archive, as they would hear a join, messages, a relayed request.
    fn heard(run: &str) -> Recording {
        let message = |to: &str, nick: &str, id: &str, at: &str, body: &str| {
            format!(
                "<message type='groupchat' from='r@c/{nick}' to='{to}' id='{id}'><body>{body}</body>\
                 <occupant-id xmlns='urn:xmpp:occupant-id:0' id='{nick}{run}'/>\
                 <stanza-id xmlns='urn:xmpp:sid:0' by='r@c' id='{at}{run}'/></message>"
            )
        };
        let presence = |to: &str, nick: &str| {
            format!(
                "<presence from='r@c/{nick}' to='{to}'><x xmlns='http://jabber.org/protocol/muc#user'>\
                 <item affiliation='none' role='participant'/></x></presence>"
            )
        };
        let for_client = |to: &str| {
            vec![
                (0, presence(to, "b1")),
                (0, presence(to, "alice")),
                (
                    0,
                    format!(
                        "<message from='r@c' to='{to}' type='groupchat'><subject/><delay xmlns='urn:xmpp:delay' stamp='{run}'/></message>"
                    ),
                ),
                (1, message(to, "alice", "nw.alice.pc.1", "s1", "one")),
                (1, message(to, "alice", "nw.alice.pc.2", "s2", "two")),
                (2, message(to, "b1", &format!("made{run}"), "s3", "three")),
                (3, format!("<iq from='r@c/b1' to='{to}' id='relay{run}' type='get'/>")),
            ]
        };
        let parse = |lines: Vec<(usize, String)>| {
            lines
                .into_iter()
                .map(|(step, text)| Heard {
                    step,
                    stanza: Element::parse(&text).unwrap(),
                })
                .collect()
        };
        Recording {
            steps: ["join", "alice speaks", "b1 speaks", "ask"].map(str::to_owned).to_vec(),
            clients: ["b1@b/r", "b2@b/r"]
                .iter()
                .map(|to| ((*to).to_owned(), parse(for_client(to))))
                .collect(),
        }
    }

    fn changed(change: impl FnOnce(&mut Vec<Heard>)) -> Result<(), Differences> {
        let mut second = heard("Y");
        change(second.clients.get_mut("b2@b/r").unwrap());
        compare(&heard("X"), &second)
    }

    /// What servers make up anew does not make two runs differ, nor does the order of a room's list of occupants.
    #[test]
    fn equal_runs_are_equal() {
        compare(&heard("X"), &heard("X")).unwrap();
        compare(&heard("X"), &heard("Y")).unwrap();
        changed(|heard| heard.swap(0, 1)).unwrap();
        let dump = heard("X").dump();
        assert_eq!(dump.lines().count(), heard("X").stanzas());
    }

    /// Each of the four ways to spoil a stream is seen at every place, and the report names client, step and stanza.
    #[test]
    fn a_lost_doubled_or_altered_stanza_is_found() {
        for at in 0..7 {
            let lost = changed(|heard| drop(heard.remove(at))).unwrap_err();
            assert!(lost.0[0].starts_with("b2@b/r: missing\n  - ["), "{lost}");
            let doubled = changed(|heard| heard.insert(at, heard[at].clone())).unwrap_err();
            assert!(doubled.0[0].starts_with("b2@b/r: extra\n  + ["), "{doubled}");
            let altered =
                changed(|heard| drop(heard[at].stanza.attrs.insert("n".to_owned(), String::new()))).unwrap_err();
            assert!(altered.0[0].starts_with("b2@b/r: altered\n  - ["), "{altered}");
            assert_eq!((lost.0.len(), doubled.0.len(), altered.0.len()), (1, 1, 1));
        }
    }

    /// A list of features is a set, and what a server asks for itself is not compared; what a client asks is.
    #[test]
    fn the_affairs_of_servers_are_left_out() {
        let add = |run: &str, stanza: &str| {
            let mut recording = heard(run);
            let stanza = Element::parse(stanza).unwrap();
            recording
                .clients
                .get_mut("b2@b/r")
                .unwrap()
                .push(Heard { step: 3, stanza });
            recording
        };
        let info = |features: [&str; 2]| {
            let features: String = features.iter().map(|var| format!("<feature var='{var}'/>")).collect();
            format!(
                "<iq type='result' id='nw.1'><query xmlns='http://jabber.org/protocol/disco#info'>{features}</query></iq>"
            )
        };
        compare(&add("X", &info(["a", "b"])), &add("Y", &info(["b", "a"]))).unwrap();
        compare(&add("X", &info(["a", "b"])), &add("Y", &info(["a", "c"]))).unwrap_err();
        let ask = |id: &str, node: &str| {
            format!(
                "<iq type='get' id='{id}'><query xmlns='http://jabber.org/protocol/disco#info' node='{node}'/></iq>"
            )
        };
        compare(&heard("X"), &add("Y", &ask("17", "n#hash"))).unwrap();
        compare(&heard("X"), &add("Y", &ask("nw.1", "n#hash"))).unwrap_err();
        compare(&heard("X"), &add("Y", &ask("17", "n"))).unwrap_err();
    }

    /// Order counts for one sender and between a room's messages; between a room's messages and its presences, too.
    #[test]
    fn a_changed_order_is_found() {
        let one_sender = changed(|heard| heard.swap(3, 4)).unwrap_err();
        assert!(
            one_sender.0[0].starts_with("b2@b/r: another order from r@c/alice"),
            "{one_sender}"
        );
        let one_room = changed(|heard| heard.swap(4, 5)).unwrap_err();
        assert!(one_room.0[0].starts_with("b2@b/r: another order of r@c"), "{one_room}");
        let presence_late = changed(|heard| heard[0..4].rotate_left(1)).unwrap_err();
        assert!(
            presence_late.0[0].starts_with("b2@b/r: another order of r@c"),
            "{presence_late}"
        );
    }

    /// Made-up values may be others, but equal ones must stay equal and different ones different, for all clients.
    #[test]
    fn a_broken_reference_is_found() {
        let set = |heard: &mut Vec<Heard>, at: usize, name: &str, value: &str| {
            let xml::Node::Element(child) = heard[at]
                .stanza
                .children
                .iter_mut()
                .find(|node| matches!(node, xml::Node::Element(element) if element.name == name))
                .unwrap()
            else {
                unreachable!("found as an element")
            };
            child.attrs.insert("id".to_owned(), value.to_owned());
        };
        for (name, value) in [
            ("stanza-id", "s3Y"),
            ("stanza-id", "fresh"),
            ("occupant-id", "b1Y"),
            ("occupant-id", "fresh"),
        ] {
            let broken = changed(|heard| set(heard, 3, name, value)).unwrap_err();
            assert!(broken.0[0].starts_with("b2@b/r: "), "{broken}");
        }
        // An id that a script has made is compared as it is.
        assert!(
            changed(|heard| drop(
                heard[3]
                    .stanza
                    .attrs
                    .insert("id".to_owned(), "nw.alice.pc.9".to_owned())
            ))
            .is_err()
        );
        // A client that heard something else altogether.
        let mut second = heard("X");
        second.clients.remove("b1@b/r");
        assert_eq!(compare(&heard("X"), &second).unwrap_err().0.len(), 7);
    }
}
