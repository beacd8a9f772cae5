//! What is watched of one peer over time, for those who operate it: the pace of its queue, and what happened lately.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use crate::{
    queue::class::Class,
    relay::cost::Rooms,
    time::{Mono, Now, Wall},
};

/// The rooms of one peer that the metrics name. A series cannot be taken back, so a room that has one keeps it.
#[derive(Clone, Debug, Default)]
pub struct RoomSeries {
    max: usize,
    named: BTreeSet<Arc<str>>,
}

/// Before anything of this size has passed, the first room that speaks would be a large one.
const ROOM_BYTES_MIN: u64 = 10_000;

impl RoomSeries {
    pub fn new(max: usize) -> Self {
        let named = BTreeSet::new();
        Self { max, named }
    }

    /// The bytes of the rooms that have a name, and of the `other`s; nothing, if none is to have one.
    ///
    /// A room gets one when it causes half of what it would if all that get one caused the same.
    pub fn bytes(&mut self, rooms: &Rooms) -> Vec<(Arc<str>, u64)> {
        if self.max == 0 {
            return Vec::new();
        }
        let part = (rooms.total_bytes() / (2 * self.max as u64)).max(ROOM_BYTES_MIN);
        for (name, cost) in rooms.top(self.max) {
            if self.named.len() < self.max && cost.bytes() >= part {
                self.named.insert(name);
            }
        }
        let mut other = rooms.total_bytes();
        let mut all = Vec::new();
        for name in &self.named {
            let bytes = rooms.get(name).map_or(0, |cost| cost.bytes() - cost.doubtful_bytes);
            other = other.saturating_sub(bytes);
            all.push((Arc::clone(name), bytes));
        }
        all.push(("other".into(), other));
        all
    }
}

/// How old the oldest of each class is, with all peers: for each peer a series of its own would be too many, and which of them is late,
/// the age of its oldest entry tells.
#[derive(Clone, Debug, Default)]
pub struct ClassAges(Arc<Mutex<Ages>>);

#[derive(Debug, Default)]
struct Ages {
    last: u64,
    of: BTreeMap<u64, [Duration; Class::COUNT]>,
}

/// One peer's part in it, for as long as it lives.
#[derive(Debug)]
pub struct PeerAges {
    all: ClassAges,
    number: u64,
}

impl ClassAges {
    pub fn join(&self) -> PeerAges {
        let number = self.with(|ages| {
            ages.last += 1;
            ages.last
        });
        let all = self.clone();
        PeerAges { all, number }
    }

    fn with<T>(&self, act: impl FnOnce(&mut Ages) -> T) -> T {
        // Whoever panicked had written whole values.
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl PeerAges {
    /// Tells this peer's ages, and gives the oldest of all.
    pub fn tell(&self, mine: [Duration; Class::COUNT]) -> [Duration; Class::COUNT] {
        self.all.with(|ages| {
            ages.of.insert(self.number, mine);
            let mut oldest = mine;
            for other in ages.of.values() {
                for (oldest, age) in oldest.iter_mut().zip(other) {
                    *oldest = age.max(oldest).to_owned();
                }
            }
            oldest
        })
    }
}

impl Drop for PeerAges {
    fn drop(&mut self) {
        self.all.with(|ages| ages.of.remove(&self.number));
    }
}

/// How fast the spool empties.
///
/// In two parts, because entries that look alike cost next to nothing: how many bytes TCP takes across in a second, and how many of them
/// an entry's bytes have cost so far. What the link can do shows only when it is busy: somebody who says a line every ten seconds
/// does not try it. So a pace seen while nothing had to wait counts only if it is the best so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    bytes_per_second: f64,
    /// Of what was seen last, if the connection is still the same.
    last: Option<(Mono, Look)>,
    /// TCP's bytes for one of an entry.
    cost: Option<f64>,
}

/// What the kernel says of the connection.
#[derive(Clone, Copy, Debug, Default)]
pub struct Look {
    /// Bytes that the far kernel has confirmed.
    pub acked: u64,
    /// Bytes a second, as the kernel measured it last; the link may be able to do more.
    pub delivered_per_second: u64,
    /// Whether something waits for its first transmission.
    pub busy: bool,
}

/// Of the pace seen anew while the link was busy: the last four looks or so count.
const WEIGHT: f64 = 0.25;

/// Looks that are closer together say little.
const APART_MIN: Duration = Duration::from_millis(500);

impl Pace {
    /// `look` is none while the link is down. `sent` is what TCP has sent in all, `acked` what entries' bytes the peer has for it.
    pub fn note(&mut self, look: Option<Look>, sent: u64, acked: u64, now: Mono) {
        self.cost = (acked > 0).then(|| sent as f64 / acked as f64);
        let Some(look) = look else {
            self.last = None;
            return;
        };
        let Some((at, before)) = self.last.filter(|(_, before)| before.acked <= look.acked) else {
            self.last = Some((now, look));
            return;
        };
        let took = now.since(at);
        if took < APART_MIN {
            return;
        }
        // A busy link on which nothing arrives is slow if something arrives later, and otherwise it is not there: that is known then.
        if look.busy && look.acked == before.acked {
            return;
        }
        let seen = (look.acked - before.acked) as f64 / took.as_secs_f64();
        if before.busy && look.busy && self.bytes_per_second > 0.0 {
            self.bytes_per_second += (seen - self.bytes_per_second) * WEIGHT;
        } else {
            self.bytes_per_second = self.bytes_per_second.max(seen).max(look.delivered_per_second as f64);
        }
        self.last = Some((now, look));
    }

    /// What TCP takes across in a second, in bytes, as a link with something to send has shown it; none before that.
    pub fn capacity(&self) -> Option<f64> {
        (self.bytes_per_second > 0.0).then_some(self.bytes_per_second)
    }

    /// How long so many bytes of entries will take. `None` if nothing has shown it yet.
    pub fn time_for(&self, waiting: u64) -> Option<Duration> {
        if waiting == 0 {
            return Some(Duration::ZERO);
        }
        let seconds = waiting as f64 * self.cost? / self.bytes_per_second;
        Duration::try_from_secs_f64(seconds).ok()
    }
}

/// Something that an operator would tell another.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Event {
    pub at: Wall,
    pub what: String,
}

/// Events that are kept: a bad day.
const EVENTS_MAX: usize = 50;

/// The last events, the newest last.
#[derive(Clone, Debug, Default)]
pub struct Events(VecDeque<Event>);

impl Events {
    pub fn note(&mut self, now: Now, what: String) {
        if self.0.len() >= EVENTS_MAX {
            self.0.pop_front();
        }
        self.0.push_back(Event { at: now.wall, what });
    }

    pub fn iter(&self) -> impl Iterator<Item = &Event> {
        self.0.iter()
    }
}

/// Tells when something that is counted begins to happen, once for as long as it goes on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Run {
    count: u64,
    last: Option<Mono>,
}

/// Without anything more for so long, it was over.
const RUN_ENDS: Duration = Duration::from_secs(60);

impl Run {
    pub fn begins(&mut self, count: u64, now: Mono) -> bool {
        let grows = count > self.count;
        let begins = grows && self.last.is_none_or(|last| now.since(last) >= RUN_ENDS);
        self.count = count;
        if grows {
            self.last = Some(now);
        }
        begins
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{relay::cost::Way, stanza::Stanza};

    fn at(seconds: u64) -> Mono {
        Mono::from_start(Duration::from_secs(1000 + seconds))
    }

    fn look(acked: u64, busy: bool) -> Look {
        Look {
            acked,
            delivered_per_second: 0,
            busy,
        }
    }

    /// Quiet talk does not make the link look slow, an outage does not either, and a busy link shows what it can do.
    #[test]
    fn pace_is_what_a_busy_link_shows() {
        let mut pace = Pace::default();
        assert_eq!((pace.time_for(1), pace.time_for(0)), (None, Some(Duration::ZERO)));
        // A line of 1000 bytes, which costs 100, crosses within a second; then little is said for a while.
        pace.note(Some(look(0, false)), 0, 0, at(0));
        pace.note(Some(look(100, false)), 100, 1_000, at(1));
        for second in 2..60 {
            pace.note(Some(look(100 + second / 10, false)), 100, 1_000, at(second));
        }
        assert_eq!(pace.time_for(5_000), Some(Duration::from_secs(5)));
        // An hour without the link, and a new connection. A queue crosses at 1000 bytes a second, for which entries cost as before.
        pace.note(None, 100, 1_000, at(70));
        for second in 0..30 {
            pace.note(
                Some(look(1_000 * second, true)),
                100 + 1_000 * second,
                1_000 + 10_000 * second,
                at(3_600 + second),
            );
        }
        let time = pace.time_for(50_000).unwrap();
        assert!(
            time.abs_diff(Duration::from_secs(5)) < Duration::from_millis(100),
            "{time:?}"
        );
        // It is cut, which is noticed after a while.
        for second in 30..50 {
            let at = at(3_600 + second);
            pace.note(Some(look(29_000, true)), 29_100, 291_000, at);
        }
        pace.note(None, 29_100, 291_000, at(3_650));
        let time = pace.time_for(50_000).unwrap();
        assert!(
            time.abs_diff(Duration::from_secs(5)) < Duration::from_millis(100),
            "{time:?}"
        );
        // It is back, and thinner.
        for second in 0..30 {
            pace.note(
                Some(look(30_000 + 100 * second, true)),
                30_000,
                300_000,
                at(3_700 + second),
            );
        }
        let time = pace.time_for(50_000).unwrap();
        assert!(
            time.abs_diff(Duration::from_secs(50)) < Duration::from_secs(2),
            "{time:?}"
        );
    }

    /// The link's capacity is what it did when it had to: talk that leaves it half empty says nothing against it.
    #[test]
    fn capacity_is_what_a_busy_link_shows() {
        let mut pace = Pace::default();
        assert_eq!(pace.capacity(), None);
        for second in 0..30 {
            pace.note(
                Some(look(1_000 * second, true)),
                1_000 * second,
                10_000 * second,
                at(second),
            );
        }
        for second in 30..60 {
            pace.note(Some(look(29_000 + second, false)), 30_000, 300_000, at(second));
        }
        let capacity = pace.capacity().unwrap();
        assert!((990.0..1_010.0).contains(&capacity), "{capacity}");
        // Nor does an outage.
        pace.note(None, 30_000, 300_000, at(60));
        assert_eq!(pace.capacity(), Some(capacity));
    }

    /// The oldest of all peers counts, and one that has gone does not.
    #[test]
    fn ages_are_of_the_peers_that_are_there() {
        let all = ClassAges::default();
        let (quiet, late) = (all.join(), all.join());
        let age = |seconds| [Duration::from_secs(seconds); Class::COUNT];
        assert_eq!(quiet.tell(age(1)), age(1));
        assert_eq!(late.tell(age(60)), age(60));
        assert_eq!(quiet.tell(age(2)), age(60));
        drop(late);
        assert_eq!(quiet.tell(age(3)), age(3));
    }

    /// One packet on a fast link is over before anyone looks; the kernel has timed it.
    #[test]
    fn pace_of_a_fast_link_is_the_kernels() {
        let mut pace = Pace::default();
        let fast = Look {
            acked: 300,
            delivered_per_second: 1_000_000,
            busy: false,
        };
        pace.note(Some(fast), 300, 3_000, at(0));
        pace.note(Some(fast), 300, 3_000, at(1));
        assert_eq!(pace.time_for(1_000_000), Some(Duration::from_millis(100)));
    }

    /// What goes on for an hour is one event; an hour later it is another.
    #[test]
    fn runs_begin_once() {
        let mut run = Run::default();
        let begun: Vec<u64> = (0..10_000)
            .filter(|second| run.begins(second.min(&7_200) / 10, at(*second)))
            .collect();
        assert_eq!(begun, [10]);
        assert!(!run.begins(720, at(20_000)) && run.begins(721, at(20_001)) && !run.begins(722, at(20_002)));
    }

    /// The oldest events make room.
    #[test]
    fn events_are_few() {
        let mut events = Events::default();
        for n in 0..1000 {
            events.note(Now::default(), n.to_string());
        }
        assert_eq!(events.iter().count(), EVENTS_MAX);
        assert_eq!(events.iter().last().unwrap().what, "999");
    }

    /// No more rooms have a series than were asked for, those that have one keep it, and nothing is missing from the sum.
    #[test]
    fn few_rooms_have_a_series() {
        let mut rooms = Rooms::default();
        let say = |rooms: &mut Rooms, room: &str, bytes: u64| {
            let text = format!("<message from='u@a.example/r' to='{room}@c.b.example' type='groupchat'/>");
            let stanza = Stanza::parse(text.into()).unwrap();
            rooms.note(&stanza, Way::Sent, bytes, 1);
        };
        say(&mut rooms, "large", 50_000);
        assert_eq!(RoomSeries::new(0).bytes(&rooms), []);
        let mut series = RoomSeries::new(2);
        for room in 0..1000 {
            say(&mut rooms, &room.to_string(), 10);
        }
        let told = |series: &mut RoomSeries, rooms: &Rooms| -> Vec<(String, u64)> {
            let all = series.bytes(rooms).into_iter();
            all.map(|(name, bytes)| (name.to_string(), bytes)).collect()
        };
        let large = |bytes| ("large@c.b.example".to_owned(), bytes);
        assert_eq!(told(&mut series, &rooms), [large(50_000), ("other".to_owned(), 10_000)]);
        for room in ["second", "third"] {
            say(&mut rooms, room, 60_000);
        }
        let all = told(&mut series, &rooms);
        assert_eq!(all.len(), 3, "{all:?}");
        assert!(all.contains(&large(50_000)), "{all:?}");
        assert_eq!(all.iter().map(|(_, bytes)| bytes).sum::<u64>(), 180_000);
    }
}
