//! Crowds in a room, numbered messages, and the count of what was lost, doubled or out of order.
//!
//! For tests that cut links and kill processes, and for the demonstration: [`Crowd::join`] brings users of one site
//! into a room, [`speak`] sends a numbered message, and [`tally`] compares what a client has received with what was sent.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, Instant};

use crate::client::{Client, Failure, Outcome, Stanza};
use crate::scenario::{Side, Stage, crowd_user};

/// How a numbered message begins; the sender and the number follow.
const MARK: &str = "load";
/// So many clients sign in at once: more would only wait for two cores.
const SIGN_INS_MAX: usize = 8;

/// Users of one site in one room.
#[derive(Debug)]
pub struct Crowd {
    pub room: String,
    pub members: Vec<Client>,
}

impl Crowd {
    /// Signs in the first `count` crowd users of a site and lets them all join, without history.
    pub fn join(stage: &(dyn Stage + Sync), site: Side, room: &str, count: usize) -> Outcome<Self> {
        let numbers: Vec<usize> = (1..=count).collect();
        let mut members = Vec::new();
        for few in numbers.chunks(SIGN_INS_MAX) {
            let signed_in: Vec<Outcome<Client>> = std::thread::scope(|scope| {
                let sign_in = |number: usize| scope.spawn(move || stage.connect(site, &crowd_user(number), "crowd"));
                let threads: Vec<_> = few.iter().map(|number| sign_in(*number)).collect();
                let panicked = |_| Err(Failure("signing in panicked".to_owned()));
                threads
                    .into_iter()
                    .map(|thread| thread.join().unwrap_or_else(panicked))
                    .collect()
            });
            for client in signed_in {
                let client = client?;
                client.presence("")?;
                client.join(room, client.user(), None, Some(0))?;
                members.push(client);
            }
        }
        for client in &members {
            let inside = format!("{room}/{}", client.user());
            let answer = client.expect("that it is in the room", stage.patience(), |stanza| {
                stanza.is_presence()
                    && stanza.from() == inside
                    && (stanza.has_status("110") || stanza.kind() == "error")
            })?;
            if answer.kind() == "error" {
                return Err(Failure(format!("{} may not join: {}", client.jid, answer.raw)));
            }
        }
        Ok(Self {
            room: room.to_owned(),
            members,
        })
    }

    /// Waits until every member has received that message, or tells who has not.
    pub fn wait_for(&self, sender: &str, number: usize, timeout: Duration) -> Outcome {
        let deadline = Instant::now() + timeout;
        for client in &self.members {
            let left = deadline.saturating_duration_since(Instant::now());
            client.expect(&format!("message {number} of {sender}"), left, |stanza| {
                numbered(stanza).is_some_and(|(of, got)| of == sender && got == number)
            })?;
        }
        Ok(())
    }
}

/// Sends the `number`th (from 1) numbered message of this client to a room; `more` makes it longer.
pub fn speak(client: &Client, room: &str, number: usize, more: &str) -> Outcome {
    client
        .groupchat(room, &format!("{MARK} {} {number} {more}", client.user()))
        .map(drop)
}

/// As [`speak`], to one user.
pub fn tell(client: &Client, to: &str, number: usize, more: &str) -> Outcome {
    client
        .chat(to, &format!("{MARK} {} {number} {more}", client.user()))
        .map(drop)
}

/// What a client was told in rooms (`groupchat`) or by one user (`chat`): sender and number, in order.
pub fn heard(client: &Client, kind: &str) -> Vec<(String, usize)> {
    let transcript = client.transcript();
    let of_kind = transcript.iter().filter(|stanza| stanza.kind() == kind);
    of_kind.filter_map(numbered).collect()
}

/// What became of a room's numbered messages, when some were lost before the room had them.
///
/// A witness beside the room says what the room has said, and in which order; what the others heard is held against that.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Fate {
    pub said: usize,
    /// Never reached the room.
    pub not_entered: BTreeSet<(String, usize)>,
    /// Said by the room, and not heard by all.
    pub not_heard: BTreeSet<(String, usize)>,
    pub doubled: usize,
    pub late: usize,
    pub notes: Vec<String>,
}

impl Fate {
    /// Holds what each listener heard against the witness, and the witness against what was sent (numbered from 1).
    pub fn of(
        sent: &BTreeMap<String, usize>,
        witness: &[(String, usize)],
        listeners: &[(String, Vec<(String, usize)>)],
    ) -> Self {
        let mut fate = Self {
            said: witness.len(),
            ..Self::default()
        };
        let own = tally_numbers("the witness", witness.iter().cloned(), sent);
        fate.doubled += own.doubled;
        fate.late += own.late + own.unknown;
        fate.notes.extend(own.notes);
        let places: BTreeMap<&(String, usize), usize> = witness
            .iter()
            .enumerate()
            .map(|(place, message)| (message, place))
            .collect();
        let all = sent
            .iter()
            .flat_map(|(sender, count)| (1..=*count).map(move |number| (sender.clone(), number)));
        fate.not_entered = all.filter(|message| !places.contains_key(message)).collect();
        for (name, heard) in listeners {
            fate.add_listener(name, heard, &places);
        }
        fate
    }

    fn add_listener(&mut self, name: &str, heard: &[(String, usize)], places: &BTreeMap<&(String, usize), usize>) {
        let mut had = BTreeSet::new();
        let mut last = None;
        for message in heard {
            let (sender, number) = message;
            let Some(place) = places.get(message) else {
                self.late += 1;
                self.notes
                    .push(format!("{name} heard {sender} {number}, which the room never said"));
                continue;
            };
            if !had.insert(message) {
                self.doubled += 1;
                self.notes.push(format!("{name} heard {sender} {number} again"));
                continue;
            }
            if last.is_some_and(|last| last > place) {
                self.late += 1;
                self.notes.push(format!(
                    "{name} heard {sender} {number} after something that the room said later"
                ));
            }
            last = last.max(Some(place));
        }
        let missed = places.len() - places.keys().filter(|message| had.contains(**message)).count();
        if missed > 0 {
            self.notes
                .push(format!("{name} never heard {missed} of {}", places.len()));
        }
        for message in places.keys().filter(|message| !had.contains(**message)) {
            self.not_heard.insert((*message).clone());
        }
    }

    /// Messages that did not come through to everybody.
    pub fn lost(&self) -> usize {
        self.not_entered.len() + self.not_heard.len()
    }
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} said by the room, ", self.said)?;
        write!(
            f,
            "{} never entered it, {} not heard by all, ",
            self.not_entered.len(),
            self.not_heard.len()
        )?;
        write!(f, "{} doubled, {} late", self.doubled, self.late)?;
        /// More findings say nothing new.
        const NOTES_MAX: usize = 20;
        self.notes
            .iter()
            .take(NOTES_MAX)
            .try_for_each(|note| write!(f, "\n  {note}"))
    }
}

/// The sender and the number of a numbered message, unless it is one that has come back as an error.
pub fn numbered(stanza: &Stanza) -> Option<(String, usize)> {
    if !stanza.is_message() || stanza.kind() == "error" {
        return None;
    }
    parse_mark(&stanza.body()?)
}

fn parse_mark(body: &str) -> Option<(String, usize)> {
    let mut words = body.split(' ');
    match (words.next(), words.next(), words.next()) {
        (Some(MARK), Some(sender), Some(number)) => Some((sender.to_owned(), number.parse().ok()?)),
        _ => None,
    }
}

/// What became of the numbered messages of all senders, at one receiver or, added up, at many.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Tally {
    pub expected: usize,
    pub received: usize,
    /// Sent, and never received.
    pub lost: usize,
    /// Received once more than they were sent.
    pub doubled: usize,
    /// Received after a later one of the same sender.
    pub late: usize,
    /// Numbered messages of which nobody knows.
    pub unknown: usize,
    /// How often the receiver was told that it is not in a room any more.
    pub expelled: usize,
    /// The first findings, for a person to read.
    pub notes: Vec<String>,
}

impl Tally {
    /// Nothing lost, doubled, late or made up, and nobody expelled.
    pub fn is_clean(&self) -> bool {
        self.lost + self.doubled + self.late + self.unknown + self.expelled == 0
    }

    pub fn add(&mut self, other: Self) {
        self.expected += other.expected;
        self.received += other.received;
        self.lost += other.lost;
        self.doubled += other.doubled;
        self.late += other.late;
        self.unknown += other.unknown;
        self.expelled += other.expelled;
        for note in other.notes {
            self.note(note);
        }
    }

    fn note(&mut self, note: String) {
        /// More findings say nothing new.
        const NOTES_MAX: usize = 20;
        if self.notes.len() < NOTES_MAX {
            self.notes.push(note);
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} received, {} lost, {} doubled, {} late",
            self.received, self.expected, self.lost, self.doubled, self.late
        )?;
        write!(f, ", {} unknown, {} expelled", self.unknown, self.expelled)?;
        self.notes.iter().try_for_each(|note| write!(f, "\n  {note}"))
    }
}

/// Holds what one client received against how many messages each sender has sent (numbered from 1).
pub fn tally(receiver: &str, transcript: &[Stanza], sent: &BTreeMap<String, usize>) -> Tally {
    let bodies = transcript.iter().filter_map(numbered);
    let mut tally = tally_numbers(receiver, bodies, sent);
    for stanza in transcript.iter().filter(|stanza| is_expulsion(stanza)) {
        tally.expelled += 1;
        tally.note(format!("{receiver} is expelled: {}", stanza.raw));
    }
    tally
}

/// The sum over clients that should all have received everything.
pub fn tally_all<'c>(receivers: impl IntoIterator<Item = &'c Client>, sent: &BTreeMap<String, usize>) -> Tally {
    receivers.into_iter().fold(Tally::default(), |mut sum, client| {
        sum.add(tally(&client.jid, &client.transcript(), sent));
        sum
    })
}

/// Self-presence of type unavailable: this client is out of the room, whoever wanted that.
pub fn is_expulsion(stanza: &Stanza) -> bool {
    let out = stanza.is_presence() && stanza.kind() == "unavailable" && stanza.has_status("110");
    out && !stanza.has_status("303")
}

fn tally_numbers(
    receiver: &str,
    received: impl Iterator<Item = (String, usize)>,
    sent: &BTreeMap<String, usize>,
) -> Tally {
    let mut tally = Tally {
        expected: sent.values().sum(),
        ..Tally::default()
    };
    let mut times: BTreeMap<&str, Vec<u32>> = sent
        .iter()
        .map(|(sender, count)| (sender.as_str(), vec![0; *count]))
        .collect();
    let mut last: BTreeMap<String, usize> = BTreeMap::new();
    for (sender, number) in received {
        let slot = times
            .get_mut(sender.as_str())
            .and_then(|slots| slots.get_mut(number.wrapping_sub(1)));
        let Some(slot) = slot else {
            tally.unknown += 1;
            tally.note(format!("{receiver} received {sender} {number}, which was not sent"));
            continue;
        };
        *slot += 1;
        if *slot > 1 {
            tally.doubled += 1;
            tally.note(format!("{receiver} received {sender} {number} again"));
            continue; // a copy is no matter of order
        }
        tally.received += 1;
        let last = last.entry(sender.clone()).or_default();
        if number < *last {
            tally.late += 1;
            tally.note(format!("{receiver} received {sender} {number} after {last}"));
        }
        *last = number.max(*last);
    }
    for (sender, slots) in times {
        for (at, _) in slots.iter().enumerate().filter(|(_, times)| **times == 0) {
            tally.lost += 1;
            tally.note(format!("{receiver} never received {sender} {}", at + 1));
        }
    }
    tally
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally_of(numbers: &[(&str, usize)]) -> Tally {
        let sent = BTreeMap::from([("alice".to_owned(), 3), ("b1".to_owned(), 2)]);
        tally_numbers(
            "b2",
            numbers.iter().map(|(sender, number)| ((*sender).to_owned(), *number)),
            &sent,
        )
    }

    /// Each kind of damage is counted as itself, and only once; senders do not disturb each other's order.
    #[test]
    fn lost_doubled_late_and_unknown_are_told_apart() {
        let clean = tally_of(&[("alice", 1), ("b1", 1), ("alice", 2), ("b1", 2), ("alice", 3)]);
        assert!(
            clean.is_clean() && clean.received == 5 && clean.expected == 5,
            "{clean}"
        );
        let lost = tally_of(&[("alice", 1), ("b1", 1), ("alice", 3), ("b1", 2)]);
        assert_eq!(
            (lost.lost, lost.doubled, lost.late, lost.unknown),
            (1, 0, 0, 0),
            "{lost}"
        );
        let doubled = tally_of(&[
            ("alice", 1),
            ("b1", 1),
            ("alice", 2),
            ("alice", 1),
            ("alice", 3),
            ("b1", 2),
        ]);
        assert_eq!(
            (doubled.lost, doubled.doubled, doubled.late, doubled.unknown),
            (0, 1, 0, 0),
            "{doubled}"
        );
        let late = tally_of(&[("alice", 1), ("alice", 3), ("alice", 2), ("b1", 1), ("b1", 2)]);
        assert_eq!(
            (late.lost, late.doubled, late.late, late.unknown),
            (0, 0, 1, 0),
            "{late}"
        );
        let unknown = tally_of(&[
            ("alice", 1),
            ("alice", 2),
            ("alice", 3),
            ("b1", 1),
            ("b1", 2),
            ("b1", 3),
            ("b1", 0),
            ("eve", 1),
        ]);
        assert_eq!(
            (unknown.lost, unknown.doubled, unknown.late, unknown.unknown),
            (0, 0, 0, 3),
            "{unknown}"
        );
        let mut sum = clean;
        sum.add(lost);
        assert_eq!(
            (sum.expected, sum.received, sum.lost, sum.is_clean()),
            (10, 9, 1, false)
        );
    }

    /// Losses before and after the room are told apart, a message that several miss counts once, and order is the room's.
    #[test]
    fn fate_is_held_against_the_room() {
        let of = |marks: &[(&str, usize)]| -> Vec<(String, usize)> {
            marks
                .iter()
                .map(|(sender, number)| ((*sender).to_owned(), *number))
                .collect()
        };
        let sent = BTreeMap::from([("alice".to_owned(), 3), ("b1".to_owned(), 2)]);
        let witness = of(&[("alice", 1), ("b1", 2), ("alice", 2), ("alice", 3)]);
        let listeners = [
            ("b1".to_owned(), of(&[("alice", 1), ("b1", 2), ("alice", 3)])),
            (
                "b2".to_owned(),
                of(&[("b1", 2), ("alice", 1), ("alice", 1), ("alice", 3)]),
            ),
            ("b3".to_owned(), witness.clone()),
        ];
        let fate = Fate::of(&sent, &witness, &listeners);
        assert_eq!(fate.not_entered, BTreeSet::from([("b1".to_owned(), 1)]));
        assert_eq!(fate.not_heard, BTreeSet::from([("alice".to_owned(), 2)]));
        assert_eq!(
            (fate.said, fate.doubled, fate.late, fate.lost()),
            (4, 1, 1, 2),
            "{fate}"
        );
    }

    /// Only numbered messages count.
    #[test]
    fn marks_are_read() {
        assert_eq!(parse_mark("load b1 17 and more"), Some(("b1".to_owned(), 17)));
        assert_eq!(parse_mark("load b1 17"), Some(("b1".to_owned(), 17)));
        for other in ["", "load", "load b1", "load b1 x", "hello b1 17", "load b1 -1"] {
            assert_eq!(parse_mark(other), None, "{other}");
        }
    }
}
