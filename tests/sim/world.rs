//! The world of one seed.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use bytes::Bytes;
use narrows::{
    codec::position::{Epoch, Seq},
    link::session::{LinkError, SessionConfig},
    mirror::MirrorSettings,
    queue::{
        class::{Class, Classes},
        journal::{Batch, Change, Levels, Model},
    },
    relay::{Drop, Input, LegId, LinkClose, RelayStats, Settings},
    stanza::{Domain, DomainPair, Stanza, domain_of},
    time::{Mono, Now, Wall},
};

use crate::{
    check::Tally,
    pair::{self, End, Event, Manner, Pair},
    random::Random,
    said::{self, Copy, Members, What},
};

/// What goes wrong in a world.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// The link comes and goes, with what is in flight lost; connections replace each other.
    pub link: bool,
    /// Servers close streams.
    pub lanes: bool,
    /// Processes are killed, and what their disks had not finished is torn off.
    pub kills: bool,
    /// Processes end in good order and begin again.
    pub drains: bool,
    /// A disk is lost, and an empty one put in its place.
    pub replaced: bool,
    /// Servers refuse some stanzas with a stream error.
    pub poison: bool,
    /// Servers take no large stanzas.
    pub oversize: bool,
    /// Queues are small, and servers slow.
    pub small_queues: bool,
    /// The peer at site 0 sends what it may not.
    pub forged: bool,
    /// A few words, and then nothing.
    pub few_words: bool,
}

pub struct Site {
    pub name: char,
    /// Copies that the server has written and we have not said to be on disk, by leg and number; and whether they were refused.
    unaccepted: BTreeMap<(LegId, u64), (Copy, bool)>,
    stanza_bytes_max: Option<usize>,
    rooms: Vec<Members>,
    /// Accepted from this site's server, in order.
    pub accepted: Vec<Copy>,
    /// Refused because the queue was full.
    pub refused: Vec<Copy>,
    /// Not accepted when the process was killed: they may arrive once, or never.
    pub abandoned: BTreeSet<Copy>,
    /// What this site's server has read.
    pub heard: Vec<Copy>,
    /// Marked as given on the disk when the process was killed, and not read by the server then.
    pub doubtful: BTreeSet<Copy>,
    /// Copies for this site's server that went with this or the other site's disk.
    pub gone_with_disk: BTreeSet<Copy>,
    /// Copies that were stored here, on a disk that is gone, and that the other had not been told about.
    pub told_again: BTreeMap<Copy, u64>,
    /// Casts that what was said must have become.
    pub casts_due: u64,
    pub casts: u64,
    pub in_doubt: u64,
    pub dropped: BTreeMap<Drop, u64>,
    /// When the first copy of the broadcast being written came, as long as its group is open.
    group_opened: BTreeMap<u64, Mono>,
    window: Duration,
}

pub struct World {
    pub random: Random,
    pub faults: Faults,
    pub now: Now,
    pub sites: [Site; 2],
    /// Site 0 is at its end 0.
    pair: Pair,
    /// Stanzas that the servers still want to write: interleaved copies.
    to_say: [VecDeque<Bytes>; 2],
    numbers: u64,
    /// How often a process has ended at either site.
    pub ends: [u64; 2],
    pub tally: Tally,
}

fn domain(text: &str) -> Domain {
    Domain::new(text).expect("a domain")
}

/// Nobody gives up: what is lost is lost by mistake. Only what is volatile gives way to the newest.
fn patient() -> Classes {
    let mut classes = Classes::default();
    for class in Class::ALL {
        classes[class].expiry = None;
    }
    classes
}

fn settings(name: char, other: char, faults: Faults, random: &mut Random) -> Settings {
    let (queue_bytes_max, queue_entries_max) = match faults.small_queues {
        // One large stanza does not fill it.
        true => (8000 + random.below(10_000), 3 + random.below(12)),
        false => (1 << 30, 1 << 30),
    };
    Settings {
        local: vec![
            domain(&format!("{name}.example")),
            domain(&format!("conference.{name}.example")),
        ],
        far: vec![
            domain(&format!("{other}.example")),
            domain(&format!("conference.{other}.example")),
        ],
        collapse_window: Duration::from_millis(random.pick(&[50, 50, 50, 10, 0])),
        queue_bytes_max,
        queue_entries_max,
        classes: patient(),
        rules: Vec::new(),
        lanes_per_pair: random.pick(&[1, 2, 3]),
        lane_retry_max: Duration::from_secs(15),
        memory_bytes: random.pick(&[1, 300, 2000, 10_000, 1 << 20]),
        batch_bytes: random.pick(&[1, 300, 4096]),
        // Used if both want it. The compressor costs more than all the rest of a world, and has tests of its own.
        compress: random.one_in(4),
        site: None,
        session: SessionConfig {
            ack_delay: Duration::from_millis(random.pick(&[0, 20, 1000, 5000])),
            ack_entries_max: random.pick(&[1, 3, 64]),
            fragment_bytes_max: random.pick(&[100, 1024]),
            ..SessionConfig::default()
        },
        mirror: MirrorSettings {
            // Bytes are compared here.
            delay_stamp_after: Duration::MAX,
            ..MirrorSettings::default()
        },
    }
}

impl Site {
    fn new(name: char, other: char, faults: Faults, random: &mut Random, now: Now) -> (Self, End) {
        let settings = settings(name, other, faults, random);
        let mut disk = Model::new(Epoch(random.next()));
        if faults.forged && name == 'a' {
            let forged = said::forged(name, other).into_iter().zip(1..);
            let changes = forged
                .map(|(entry, seq)| Change::PutSpool {
                    seq: Seq(seq),
                    accepted: now.wall,
                    entry,
                })
                .collect();
            disk.apply(Batch { number: 1, changes });
            disk.commit(1);
        }
        let stanza_bytes_max = faults.oversize.then_some(2000);
        let manner = Manner {
            // A server without acks does not say which stanza it refused: what is behind it in the kernel is TCP's.
            acks: faults.poison || random.one_in(2),
            stanza_bytes_max,
            is_poison: said::is_poison,
        };
        let site = Self {
            name,
            window: settings.collapse_window,
            unaccepted: BTreeMap::new(),
            stanza_bytes_max,
            rooms: (0..2).map(|_| 1 + random.below(31)).collect(),
            accepted: Vec::new(),
            refused: Vec::new(),
            abandoned: BTreeSet::new(),
            heard: Vec::new(),
            doubtful: BTreeSet::new(),
            gone_with_disk: BTreeSet::new(),
            told_again: BTreeMap::new(),
            casts_due: 0,
            casts: 0,
            in_doubt: 0,
            dropped: BTreeMap::new(),
            group_opened: BTreeMap::new(),
        };
        (site, End::new(settings, disk, manner, now))
    }

    pub fn is_over_limit(&self, copy: &Copy) -> bool {
        self.stanza_bytes_max.is_some_and(|max| copy.bytes.len() > max)
    }

    /// What the relay has counted outlives it.
    fn keep_counts(&mut self, stats: &RelayStats) {
        self.casts += stats.casts;
        self.in_doubt += stats.in_doubt;
        for drop in Drop::ALL {
            *self.dropped.entry(drop).or_default() += stats.dropped_total(drop);
        }
    }
}

/// Steps of a life: some twenty things are said, and cross while more is said and fails.
const STEPS: usize = 500;

/// After the last fault everything must have been delivered within this: a lane that was refused is tried again after 15 s, and one
/// end of the link that closed it for want of room waits 10 s. And each must know of the other that it has it:
/// acknowledgements wait 5 s.
const DELIVERED_AFTER_MAX: Duration = Duration::from_secs(30);
const QUIET_AFTER_MAX: Duration = Duration::from_secs(45);

/// How long a shell waits before it dials again.
const REDIAL: Duration = Duration::from_secs(10);

impl World {
    pub fn new(seed: u64, faults: Faults) -> Self {
        let mut random = Random::new(seed);
        let now = Now {
            mono: Mono::from_start(Duration::ZERO),
            wall: Wall(1_800_000_000_000),
        };
        let (a, end_a) = Site::new('a', 'b', faults, &mut random, now);
        let (b, end_b) = Site::new('b', 'a', faults, &mut random, now);
        Self {
            random,
            faults,
            now,
            sites: [a, b],
            pair: Pair::new([end_a, end_b]),
            to_say: [VecDeque::new(), VecDeque::new()],
            numbers: 0,
            ends: [0; 2],
            tally: Tally::default(),
        }
    }

    pub fn run(&mut self) {
        if self.faults.few_words {
            self.say_a_few_words();
        } else {
            for _ in 0..STEPS {
                self.step();
            }
        }
        self.rest();
        for (site, end) in self.sites.iter_mut().zip(&self.pair.ends) {
            site.keep_counts(end.relay.stats());
        }
    }

    fn step(&mut self) {
        let site = self.random.below(2) as usize;
        match self.random.below(26) {
            0 => self.say(site),
            1..=4 => drop(self.write_leg(site)),
            5..=8 => {
                for _ in 0..1 + self.random.below(3) {
                    self.finish_disk(site);
                }
            }
            9..=13 => {
                for _ in 0..1 + self.random.below(6) {
                    self.carry(site);
                }
            }
            14..=16 if !self.faults.small_queues || self.random.one_in(8) => drop(self.read_lanes(site, false)),
            17 => self.pass(40),
            18..=19 => {
                let wanted = !self.pair.wire.is_up() || self.faults.link && self.random.one_in(4);
                if !self.take_up(site) && wanted {
                    self.pair.wire.dial();
                }
            }
            20 if self.faults.link && self.random.one_in(4) => {
                self.tally.cuts += 1;
                self.pair.wire.cut();
            }
            21 if self.faults.lanes && self.random.one_in(2) => self.break_lane(site),
            22 if self.faults.kills && self.random.one_in(5) => self.kill(site),
            23 if self.faults.drains && self.random.one_in(8) => self.drain_and_restart(site),
            24 if self.faults.replaced && self.random.one_in(16) => self.replace_disk(site),
            _ => self.pass(10),
        }
    }

    /// One to three stanzas with pauses, on a link that is up or comes up later, and nothing after them: each is there as soon as its
    /// window has ended.
    fn say_a_few_words(&mut self) {
        if self.random.one_in(2) {
            self.rest();
        }
        let mut due = self.now.mono;
        for _ in 0..1 + self.random.below(3) {
            let site = self.random.below(2) as usize;
            self.say(site);
            while !self.to_say[site].is_empty() {
                self.write_leg(site);
                due = due.max(self.now.mono + self.sites[site].window);
                match self.random.below(4) {
                    0 => drop(self.finish_disk(site)),
                    1 => self.pass(30),
                    2 => self.come_to_a_stop(),
                    _ => {}
                }
            }
            if self.random.one_in(3) {
                continue;
            }
            if !self.pair.wire.is_up() {
                self.pair.wire.dial();
            }
            self.come_to_a_stop();
            self.pass_until(due);
            self.come_to_a_stop();
            assert!(
                self.is_delivered(),
                "not delivered when the window had ended: {}",
                self.unrest()
            );
        }
    }

    /// No more faults, and nothing more is said. Whatever can be done is done at once, and time passes only when nothing can: to the
    /// moment that a relay has asked for.
    pub fn rest(&mut self) {
        let begun = self.now.mono;
        if !self.pair.wire.is_up() {
            self.pair.wire.dial();
        }
        loop {
            self.come_to_a_stop();
            let accepted = self.sites.iter().all(|site| site.unaccepted.is_empty());
            if accepted && self.pair.ends.iter().all(End::is_idle) {
                assert!(self.is_delivered(), "idle, but not delivered: {}", self.unrest());
                return;
            }
            let deadline = self.pair.ends.iter().filter_map(|end| end.relay.poll_timeout()).min();
            let at = match deadline {
                Some(deadline) if self.pair.wire.is_up() => deadline.at,
                _ => {
                    let redial = self.now.mono + REDIAL;
                    deadline.map_or(redial, |deadline| deadline.at.min(redial))
                }
            };
            // Where queues are small each of them may fill up again, and the link waits.
            let waited = at.since(begun) / if self.faults.small_queues { 10 } else { 1 };
            assert!(
                waited <= QUIET_AFTER_MAX,
                "never comes to rest: {deadline:?}, {}",
                self.unrest()
            );
            assert!(
                waited <= DELIVERED_AFTER_MAX || self.is_delivered(),
                "not delivered: {deadline:?}, {}",
                self.unrest()
            );
            self.pass_until(at);
            if !self.pair.wire.is_up() {
                self.pair.wire.dial();
            }
        }
    }

    /// Does what can be done without time passing.
    fn come_to_a_stop(&mut self) {
        for round in 0.. {
            assert!(round < 100_000, "goes round in circles: {}", self.unrest());
            let mut done = false;
            for site in 0..2 {
                done |= self.write_leg(site);
                // Also before the disk: so that what it finishes must wake the link by itself.
                done |= self.carry(site);
                done |= self.finish_disk(site);
                done |= self.take_up(site);
                done |= self.carry(site);
                done |= self.read_lanes(site, true);
            }
            if !done {
                return;
            }
        }
    }

    /// Whether everything that was accepted is with the servers.
    fn is_delivered(&self) -> bool {
        (0..2).all(|site| self.to_say[site].is_empty() && self.sites[site].unaccepted.is_empty())
            && self.pair.is_delivered()
    }

    fn unrest(&self) -> String {
        let unaccepted = self.sites.iter().map(|site| site.unaccepted.len());
        format!(
            "{:?} unaccepted; {}",
            unaccepted.collect::<Vec<_>>(),
            self.pair.unrest()
        )
    }

    /// A server decides to tell something to some far users.
    fn say(&mut self, site: usize) {
        let (here, there) = (self.sites[site].name, self.sites[1 - site].name);
        self.numbers += 1;
        self.tally.said += 1;
        let poison = self.faults.poison && self.random.one_in(8);
        let rooms = &self.sites[site].rooms;
        let copies = said::say(self.numbers, here, there, rooms, poison, &mut self.random);
        let flow = Copy::read(&copies[0]).flow;
        // Another sender's copies come in between (ejabberd writes each copy apart), never the same one's.
        let to_say = &mut self.to_say[site];
        let same = to_say.iter().rposition(|bytes| Copy::read(bytes).flow == flow);
        let mut at = same.map_or(0, |last| last + 1);
        for copy in copies {
            at += self.random.below((to_say.len() - at) as u64 + 1) as usize;
            to_say.insert(at, copy);
            at += 1;
        }
    }

    fn write_leg(&mut self, index: usize) -> bool {
        let Some(bytes) = self.to_say[index].pop_front() else {
            return false;
        };
        let copy = Copy::read(&bytes);
        self.tally.copies += 1;
        let pair = DomainPair {
            local: domain(domain_of(&copy.flow)),
            far: domain(domain_of(&copy.to)),
        };
        let stanza = Stanza::parse(bytes).expect("a stanza");
        let refused = |pair: &Pair| pair.ends[index].relay.stats().refused;
        let refused_before = refused(&self.pair);
        let place = self.pair.write(index, pair, stanza, self.now);
        let refused = refused(&self.pair) > refused_before;
        let site = &mut self.sites[index];
        if !refused {
            site.note_cast(&copy, self.now.mono);
        }
        site.unaccepted.insert(place, (copy, refused));
        self.notice();
        true
    }

    fn finish_disk(&mut self, index: usize) -> bool {
        let done = self.pair.finish_disk(index, self.now, &mut self.random);
        self.notice();
        done
    }

    fn check_levels(&self, index: usize, levels: Levels) {
        let limits = &self.pair.ends[index].settings;
        // Answers to what the server does not take come instead of what was in the inbox.
        let answers = u64::from(self.faults.poison || self.faults.oversize) * 1000;
        assert!(
            levels.spool_entries <= answers + limits.queue_entries_max,
            "the spool is over its limit"
        );
        assert!(
            levels.inbox_entries <= limits.queue_entries_max,
            "the inbox is over its limit"
        );
        // The one that goes over it is the last: 7,000 bytes at most here.
        assert!(
            levels.spool_bytes <= limits.queue_bytes_max + 8000 + answers * 1000,
            "the spool is over its limit"
        );
        assert!(
            levels.inbox_bytes <= limits.queue_bytes_max + 8000,
            "the inbox is over its limit"
        );
    }

    fn take_up(&mut self, index: usize) -> bool {
        let done = self.pair.take_up(index, self.now);
        self.notice();
        done
    }

    fn carry(&mut self, index: usize) -> bool {
        let done = self.pair.carry(index, self.now, &mut self.random);
        self.notice();
        done
    }

    fn read_lanes(&mut self, index: usize, all: bool) -> bool {
        let done = self.pair.read_lanes(index, all, self.now, &mut self.random);
        self.notice();
        done
    }

    fn break_lane(&mut self, index: usize) {
        self.tally.lane_breaks += u64::from(self.pair.break_lane(index, self.now, &mut self.random));
        self.notice();
    }

    /// kill -9, in the midst of a write to disk: of the unfinished batches some are on disk, whole, in order. The next life may end
    /// as early.
    fn kill(&mut self, index: usize) {
        loop {
            self.tally.kills += 1;
            self.end_process(index);
            self.start_process(index);
            if !self.random.one_in(3) {
                return;
            }
            self.finish_disk(index);
        }
    }

    /// What is left when a process is no more.
    fn end_process(&mut self, index: usize) {
        self.pair.end_process(index, &mut self.random);
        self.notice();
        let site = &mut self.sites[index];
        let lost = std::mem::take(&mut site.unaccepted).into_values();
        site.abandoned
            .extend(lost.filter(|(_, refused)| !refused).map(|(copy, _)| copy));
        let heard: BTreeSet<&Copy> = site.heard.iter().collect();
        // What is too large is marked in the batch with its answer: there is no doubt about it.
        let marked = self.pair.ends[index].marked();
        let doubtful = marked
            .iter()
            .map(Copy::read)
            .filter(|copy| !heard.contains(copy) && !site.is_over_limit(copy));
        site.doubtful.extend(doubtful.collect::<Vec<_>>());
    }

    fn start_process(&mut self, index: usize) {
        let site = &mut self.sites[index];
        site.group_opened.clear();
        site.keep_counts(self.pair.ends[index].relay.stats());
        self.ends[index] += 1;
        self.pair.start_process(index, self.now);
        self.notice();
    }

    /// SIGTERM: everything that has come in is on disk, everything that is with a lane is confirmed, then the process ends.
    fn drain_and_restart(&mut self, index: usize) {
        self.tally.drains += 1;
        self.handle(index, Input::Drain);
        for round in 0.. {
            assert!(round < 10_000, "does not drain: {}", self.unrest());
            let done = self.finish_disk(index) | self.read_lanes(index, true);
            let relay = &self.pair.ends[index].relay;
            if relay.is_settled() && relay.lanes_up().1 == 0 {
                break;
            }
            assert!(done, "does not drain: {}", self.unrest());
            self.pass(2);
        }
        assert!(self.sites[index].unaccepted.is_empty(), "drained, but not accepted");
        self.pair.say_goodbye(index, self.now);
        self.pair.finish_commits(index);
        self.notice();
        let before = self.sites[index].doubtful.clone();
        self.end_process(index);
        assert_eq!(before, self.sites[index].doubtful, "in doubt after a drain");
        self.start_process(index);
    }

    /// The process is killed, and its disk is gone with all that was on it.
    fn replace_disk(&mut self, index: usize) {
        self.tally.disks_replaced += 1;
        let (here, there) = (&self.pair.ends[index], &self.pair.ends[1 - index]);
        let (old, other) = (here.disk.opening(), there.disk.opening());
        let crossed =
            |to: &narrows::codec::position::Received, epoch: Epoch, seq: Seq| to.epoch == epoch && to.contains(seq);
        let lost_inbox = said::in_inbox(&here.disk);
        let lost_spool: Vec<Copy> = said::in_spool(&here.disk)
            .into_iter()
            .filter(|(seq, _)| !crossed(&other.received, old.epoch, *seq))
            .flat_map(|(_, copies)| copies)
            .collect();
        // Stored here, and held there still: it is sent once more.
        let again: Vec<Copy> = said::in_spool(&there.disk)
            .into_iter()
            .filter(|(seq, _)| crossed(&old.received, other.epoch, *seq))
            .flat_map(|(_, copies)| copies)
            .collect();
        self.end_process(index);
        for copy in again {
            *self.sites[index].told_again.entry(copy).or_default() += 1;
        }
        self.sites[index].gone_with_disk.extend(lost_inbox);
        self.sites[1 - index].gone_with_disk.extend(lost_spool);
        self.pair.replace_disk(index, Epoch(self.random.next()));
        self.start_process(index);
    }

    /// Up to so many milliseconds go by.
    fn pass(&mut self, ms_max: u64) {
        let time = Duration::from_millis(1 + self.random.below(ms_max));
        self.pass_until(self.now.mono + time);
    }

    fn pass_until(&mut self, until: Mono) {
        pair::pass_until(std::slice::from_mut(&mut self.pair), &mut self.now, until);
        self.notice();
    }

    fn handle(&mut self, index: usize, input: Input) {
        self.pair.handle(index, input, self.now);
        self.notice();
    }

    /// Takes note of what has happened.
    fn notice(&mut self) {
        while let Some((index, event)) = self.pair.events.pop_front() {
            let [a, b] = &mut self.sites;
            let (site, other) = if index == 0 { (a, b) } else { (b, a) };
            match event {
                Event::Accepted(leg, n) => {
                    let known = site.unaccepted.remove(&(leg, n));
                    let (copy, refused) = known.expect("accepted once, and only what was written");
                    if refused {
                        site.refused.push(copy);
                    } else {
                        site.accepted.push(copy);
                    }
                }
                Event::Stored(entry) => other.assert_accepted(&entry),
                Event::Committed(levels) => self.check_levels(index, levels),
                Event::Heard(bytes) => site.heard.push(Copy::read(&bytes)),
                Event::Refused => self.tally.refusals += 1,
                Event::Closed(LinkClose::InboxFull) => self.tally.inbox_full += 1,
                Event::Closed(LinkClose::Goodbye(_)) => assert!(self.faults.drains, "nobody said goodbye"),
                Event::Closed(LinkClose::Error(LinkError::PeerSilent { .. })) => self.tally.silences += 1,
                Event::Closed(LinkClose::Error(error)) => panic!("site {}: {error}", site.name),
            }
        }
    }
}

impl Site {
    /// What this copy adds to the casts that must come about: one for a new group, none for an open one.
    fn note_cast(&mut self, copy: &Copy, now: Mono) {
        let kind = What::of(copy.number);
        if kind.is_broadcast()
            && let Some(opened) = self.group_opened.get(&copy.number)
            && now.since(*opened) < self.window
        {
            return;
        }
        self.group_opened.insert(copy.number, now);
        self.casts_due += 1;
    }

    /// Nothing may be with the peer that is not on this disk: what is not may be said again.
    fn assert_accepted(&self, entry: &Bytes) {
        for copy in said::copies_of(entry) {
            let early = self.unaccepted.values().any(|(unaccepted, _)| *unaccepted == copy);
            assert!(!early, "crossed before it was on disk: {copy:?}");
        }
    }
}
