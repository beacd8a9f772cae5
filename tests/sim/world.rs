//! The world of one seed.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use bytes::Bytes;
use narrows::{
    codec::position::Epoch,
    link::session::SessionConfig,
    queue::journal::{Batch, Model},
    relay::{Input, LaneFault, LaneKey, LegId, Output, Relay, Settings},
    stanza::{Domain, DomainPair, Stanza},
    time::{Mono, Now, Wall},
};

#[derive(Clone, Copy, Debug)]
pub struct Faults {
    pub link: bool,
    pub lanes: bool,
    pub kills: bool,
}

impl Faults {
    pub const NONE: Self = Self {
        link: false,
        lanes: false,
        kills: false,
    };
}

/// What happened, so that a run which tested nothing is noticed.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    said: u64,
    copies: u64,
    casts: u64,
    cuts: u64,
    lane_breaks: u64,
    kills: u64,
    unaccepted_lost: u64,
    in_doubt_lost: u64,
    parts: u64,
}

impl Tally {
    pub fn add(&mut self, other: &Self) {
        self.said += other.said;
        self.copies += other.copies;
        self.casts += other.casts;
        self.cuts += other.cuts;
        self.lane_breaks += other.lane_breaks;
        self.kills += other.kills;
        self.unaccepted_lost += other.unaccepted_lost;
        self.in_doubt_lost += other.in_doubt_lost;
        self.parts += other.parts;
    }

    pub fn assert_covers(&self, faults: Faults) {
        assert!(
            self.said > 0 && self.copies > self.casts && self.parts > 0,
            "too little was said"
        );
        assert_eq!(self.cuts > 0, faults.link);
        assert_eq!(self.lane_breaks > 0, faults.lanes);
        assert_eq!(self.kills > 0, faults.kills);
        if !faults.kills {
            assert_eq!((self.unaccepted_lost, self.in_doubt_lost), (0, 0));
        }
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014): small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What one copy is known by: who sent it, to whom, and its bytes (which hold a number that never repeats).
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Copy {
    flow: String,
    to: String,
    number: u64,
    bytes: Bytes,
}

impl Copy {
    fn read(bytes: &Bytes) -> Self {
        let stanza = Stanza::parse(bytes.clone()).expect("what arrives is a stanza");
        let from = stanza.from().expect("has from").into_owned();
        Self {
            flow: from.split('/').next().expect("never empty").to_owned(),
            to: stanza.to().expect("has to").into_owned(),
            number: stanza.id().expect("has id").parse().expect("ids are numbers"),
            bytes: bytes.clone(),
        }
    }
}

/// A lane as the server sees it.
struct LaneEnd {
    life: u64,
    up: bool,
    acks: bool,
    /// Written to the kernel, not yet read by the server.
    written: VecDeque<Bytes>,
    read: u64,
    confirmed: u64,
}

struct Site {
    name: char,
    relay: Relay,
    settings: Settings,
    disk: Model,
    /// Given to the disk and not yet finished.
    batches: VecDeque<Batch>,
    reads: VecDeque<Input>,
    /// Copies that the server has written and we have not said to be on disk, by leg and number.
    unaccepted: BTreeMap<(LegId, u64), Copy>,
    leg: u64,
    leg_count: u64,
    lanes: BTreeMap<LaneKey, LaneEnd>,
    acks: bool,
    /// Accepted from this site's server, in order.
    accepted: Vec<Copy>,
    /// Not accepted when the process was killed: they may arrive once, or never.
    abandoned: BTreeSet<Copy>,
    /// What this site's server has read.
    heard: Vec<Copy>,
    /// Marked as given by a batch that the disk finished, but never written, because the process was killed in between.
    doubtful: u64,
}

pub struct World {
    random: Random,
    faults: Faults,
    now: Now,
    sites: [Site; 2],
    link: bool,
    /// Bytes on their way to site 0 and to site 1.
    pipes: [VecDeque<Bytes>; 2],
    /// Stanzas that the servers still want to write: interleaved copies.
    to_say: [VecDeque<Bytes>; 2],
    numbers: u64,
    casts_before: u64,
    tally: Tally,
}

fn domain(text: &str) -> Domain {
    Domain::new(text).expect("a domain")
}

fn settings(name: char, other: char, random: &mut Random) -> Settings {
    Settings {
        local: vec![
            domain(&format!("{name}.example")),
            domain(&format!("conference.{name}.example")),
        ],
        far: vec![
            domain(&format!("{other}.example")),
            domain(&format!("conference.{other}.example")),
        ],
        collapse_window: Duration::from_millis(50),
        queue_bytes_max: 1 << 30,
        queue_entries_max: 1 << 30,
        lanes_per_pair: 1 + (random.below(3) as u8),
        memory_bytes: narrows::relay::MEMORY_BYTES,
        batch_bytes: 4096,
        compress: true,
        site: None,
        session: SessionConfig::default(),
    }
}

impl Site {
    fn new(name: char, other: char, random: &mut Random, now: Now) -> Self {
        let settings = settings(name, other, random);
        let disk = Model::new(Epoch(random.next()));
        Self {
            name,
            relay: Relay::new(settings.clone(), &disk.opening(), now),
            settings,
            disk,
            batches: VecDeque::new(),
            reads: VecDeque::new(),
            unaccepted: BTreeMap::new(),
            leg: 1,
            leg_count: 0,
            lanes: BTreeMap::new(),
            acks: random.one_in(2),
            accepted: Vec::new(),
            abandoned: BTreeSet::new(),
            heard: Vec::new(),
            doubtful: 0,
        }
    }
}

impl World {
    pub fn new(seed: u64, faults: Faults) -> Self {
        let mut random = Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x6e61_7272_6f77_7321);
        let now = Now {
            mono: Mono::from_start(Duration::ZERO),
            wall: Wall(1_800_000_000_000),
        };
        let sites = [
            Site::new('a', 'b', &mut random, now),
            Site::new('b', 'a', &mut random, now),
        ];
        Self {
            random,
            faults,
            now,
            sites,
            link: false,
            pipes: [VecDeque::new(), VecDeque::new()],
            to_say: [VecDeque::new(), VecDeque::new()],
            numbers: 0,
            casts_before: 0,
            tally: Tally::default(),
        }
    }

    pub fn tally(&self) -> Tally {
        self.tally.clone()
    }

    /// Some hundred steps of life, then rest.
    pub fn run(&mut self) {
        for _ in 0..400 {
            self.step();
        }
        self.rest();
    }

    fn step(&mut self) {
        let site = self.random.below(2) as usize;
        match self.random.below(16) {
            0 => self.say(site),
            1..=4 => self.write_leg(site),
            5..=6 => self.finish_disk(site),
            7..=9 => self.carry(site),
            10 => self.read_lane(site),
            11 => self.pass(40),
            12 => self.raise_link(),
            13 if self.faults.link && self.random.one_in(3) => self.cut_link(),
            14 if self.faults.lanes && self.random.one_in(2) => self.break_lane(site),
            15 if self.faults.kills && self.random.one_in(4) => self.kill(site),
            _ => self.pass(10),
        }
    }

    /// No more faults, until nothing is left to do.
    fn rest(&mut self) {
        for round in 0.. {
            assert!(round < 20_000, "never comes to rest: {}", self.unrest());
            for site in 0..2 {
                self.write_leg(site);
                self.finish_disk(site);
                self.carry(site);
                self.read_lane(site);
            }
            self.raise_link();
            self.pass(50);
            let quiet = (0..2).all(|site| {
                self.to_say[site].is_empty()
                    && self.sites[site].relay.is_quiet()
                    && self.sites[site].unaccepted.is_empty()
                    && self.sites[site].lanes.values().all(|lane| lane.written.is_empty())
            });
            if quiet {
                return;
            }
        }
    }

    fn unrest(&self) -> String {
        let site = |site: &Site| {
            format!(
                "{}: {:?}, {:?}, {} unaccepted, lanes {:?}, settled {}, linked {}; ",
                site.name,
                site.relay.levels(),
                site.relay.stats(),
                site.unaccepted.len(),
                site.relay.lanes_up(),
                site.relay.is_settled(),
                site.relay.is_linked(),
            )
        };
        self.sites.iter().map(site).collect()
    }

    /// A server decides to tell something to some far users.
    fn say(&mut self, site: usize) {
        let (here, there) = (self.sites[site].name, self.sites[1 - site].name);
        self.numbers += 1;
        let number = self.numbers;
        let room = self.random.below(2);
        let size = if self.random.one_in(12) {
            3000 + self.random.below(4000)
        } else {
            self.random.below(80)
        };
        let body: String = (0..size)
            .map(|_| char::from(b'a' + self.random.below(26) as u8))
            .collect();
        let reached = 1 + self.random.below(5);
        let copies = (0..reached).map(|user| match number % 3 {
            0 => format!(
                "<presence to='u{user}@{there}.example/r' from='r{room}@conference.{here}.example/n{number}' id='{number}'>\
                 <status>{body}</status></presence>"
            ),
            1 => format!(
                "<message from='r{room}@conference.{here}.example/n' id='{number}' type=\"groupchat\" \
                 to=\"u{user}@{there}.example/r\"><body>{body}</body></message>"
            ),
            _ => format!("<iq id='{number}' type='get' from='r{room}@conference.{here}.example/n' to='u{user}@{there}.example/r'/>"),
        });
        let copies: Vec<Bytes> = copies.map(Bytes::from).collect();
        self.tally.said += 1;
        // Another room's copies come in between (server-behaviour: ejabberd), never the same room's.
        let same_room = |bytes: &Bytes| Copy::read(bytes).flow == format!("r{room}@conference.{here}.example");
        let mut at = self.to_say[site].iter().rposition(same_room).map_or(0, |last| last + 1);
        for copy in copies {
            let left = self.to_say[site].len() - at;
            at += self.random.below(left as u64 + 1) as usize;
            self.to_say[site].insert(at, copy);
            at += 1;
        }
    }

    fn write_leg(&mut self, index: usize) {
        let Some(bytes) = self.to_say[index].pop_front() else {
            return;
        };
        let site = &mut self.sites[index];
        site.leg_count += 1;
        let (leg, n) = (LegId(site.leg), site.leg_count);
        site.unaccepted.insert((leg, n), Copy::read(&bytes));
        self.tally.copies += 1;
        let other = self.sites[1 - index].name;
        let pair = DomainPair {
            local: domain(&format!("conference.{}.example", self.sites[index].name)),
            far: domain(&format!("{other}.example")),
        };
        let stanza = Stanza::parse(bytes).expect("a stanza");
        self.handle(index, Input::Stanza { leg, n, pair, stanza });
    }

    fn finish_disk(&mut self, index: usize) {
        let site = &mut self.sites[index];
        if let Some(batch) = site.batches.pop_front() {
            site.disk.commit(batch.number);
            let levels = site.disk.opening().levels;
            self.handle(
                index,
                Input::Committed {
                    batch: batch.number,
                    levels,
                },
            );
        } else if let Some(read) = site.reads.pop_front() {
            self.handle(index, read);
        }
    }

    /// Lets the socket take something, and some of what is under way arrive.
    fn carry(&mut self, index: usize) {
        if !self.link {
            return;
        }
        if self.pipes[1 - index].len() < 4
            && let Some(bytes) = self.sites[index].relay.poll_transmit(self.now)
        {
            self.pipes[1 - index].push_back(bytes);
        }
        self.drain(index);
        if let Some(mut bytes) = self.pipes[index].pop_front() {
            let cut = self.random.below(bytes.len() as u64 + 1) as usize;
            let first = bytes.split_to(cut);
            if !bytes.is_empty() {
                self.pipes[index].push_front(bytes);
            }
            self.handle(index, Input::LinkBytes(first));
        }
    }

    fn raise_link(&mut self) {
        if !self.link {
            self.link = true;
            self.pipes = [VecDeque::new(), VecDeque::new()];
            for site in 0..2 {
                self.handle(site, Input::LinkUp);
            }
        }
    }

    fn cut_link(&mut self) {
        if self.link {
            self.tally.cuts += 1;
            self.drop_link();
        }
    }

    fn drop_link(&mut self) {
        self.link = false;
        self.pipes = [VecDeque::new(), VecDeque::new()];
        for site in 0..2 {
            self.handle(site, Input::LinkDown);
        }
    }

    /// The server reads some of what a lane has brought, and acknowledges some of it.
    fn read_lane(&mut self, index: usize) {
        let site = &mut self.sites[index];
        let keys: Vec<LaneKey> = site.lanes.keys().cloned().collect();
        for key in keys {
            let end = self.sites[index].lanes.get_mut(&key).expect("the key was just read");
            let life = end.life;
            if !end.up {
                end.up = true;
                let acks = end.acks;
                self.handle(
                    index,
                    Input::LaneUp {
                        lane: key,
                        life,
                        acks,
                        stanza_bytes_max: None,
                    },
                );
                continue;
            }
            let some = self.random.below(end.written.len() as u64 + 1);
            for _ in 0..some {
                let bytes = end.written.pop_front().expect("counted above");
                end.read += 1;
                self.sites[index].heard.push(Copy::read(&bytes));
                let site = &mut self.sites[index];
                let end = site.lanes.get_mut(&key).expect("still there");
                if end.acks {
                    end.confirmed = end.read;
                }
                break;
            }
            let end = self.sites[index].lanes.get_mut(&key).expect("still there");
            let stanzas = end.confirmed;
            self.handle(
                index,
                Input::LaneConfirmed {
                    lane: key,
                    life,
                    stanzas,
                },
            );
        }
    }

    /// The server closes a lane in good order: what it has read it has acknowledged, if it does that at all; the rest is not read.
    /// A server without acks is given until it has read what the kernel took, because what is lost there nobody can know.
    fn break_lane(&mut self, index: usize) {
        let site = &mut self.sites[index];
        let pick = self.random.below(site.lanes.len().max(1) as u64) as usize;
        let Some(key) = site.lanes.keys().nth(pick).cloned() else {
            return;
        };
        let mut end = site.lanes.remove(&key).expect("picked from the keys");
        if !end.acks {
            for bytes in end.written.drain(..) {
                site.heard.push(Copy::read(&bytes));
            }
        }
        self.tally.lane_breaks += 1;
        let (life, confirmed) = (end.life, end.confirmed);
        if end.up {
            self.handle(
                index,
                Input::LaneConfirmed {
                    lane: key.clone(),
                    life,
                    stanzas: confirmed,
                },
            );
        }
        let fault = LaneFault::Gone;
        self.handle(index, Input::LaneDown { lane: key, life, fault });
    }

    /// kill -9, in the midst of a write to disk: of the unfinished batches some are on disk, whole, in order.
    fn kill(&mut self, index: usize) {
        self.tally.kills += 1;
        if self.link {
            self.drop_link();
        }
        let site = &mut self.sites[index];
        let finished = self.random.below(site.batches.len() as u64 + 1) as usize;
        for batch in site.batches.drain(..).take(finished) {
            site.disk.commit(batch.number);
        }
        site.batches.clear();
        site.reads.clear();
        site.disk.crash();
        // The kernel still delivers what was written before.
        for (_, mut end) in std::mem::take(&mut site.lanes) {
            for bytes in end.written.drain(..) {
                site.heard.push(Copy::read(&bytes));
            }
        }
        site.abandoned
            .extend(std::mem::take(&mut site.unaccepted).into_values());
        // A server without XEP-0198 does not know what it lost; the rest it still has to say goes to a new stream.
        site.leg += 1;
        site.leg_count = 0;
        self.casts_before += site.relay.stats().casts;
        let opening = site.disk.opening();
        site.doubtful += marked(&site.disk);
        site.relay = Relay::new(site.settings.clone(), &opening, self.now);
        self.drain(index);
    }

    /// Up to so many milliseconds go by.
    fn pass(&mut self, ms_max: u64) {
        let time = Duration::from_millis(1 + self.random.below(ms_max));
        let until = self.now.mono + time;
        for index in 0..2 {
            while let Some(deadline) = self.sites[index].relay.poll_timeout()
                && deadline.at <= until
            {
                self.now.mono = self.now.mono.max(deadline.at);
                let before = deadline;
                self.handle(index, Input::Timeout);
                assert_ne!(
                    self.sites[index].relay.poll_timeout(),
                    Some(before),
                    "a timeout must do something"
                );
            }
        }
        self.now.mono = until;
        self.now.wall = Wall(self.now.wall.0 + time.as_millis() as u64);
    }

    fn handle(&mut self, index: usize, input: Input) {
        self.sites[index].relay.handle(input, self.now);
        self.drain(index);
    }

    fn drain(&mut self, index: usize) {
        while let Some(output) = self.sites[index].relay.poll_output() {
            let site = &mut self.sites[index];
            match output {
                Output::Commit(batch) => {
                    site.disk.apply(batch.clone());
                    site.batches.push_back(batch);
                }
                Output::ReadSpool {
                    from,
                    entries_max,
                    bytes_max,
                } => {
                    let (slots, end) = site.disk.read_spool(from, entries_max.min(3), bytes_max);
                    site.reads.push_back(Input::SpoolRead { slots, end });
                }
                Output::ReadInbox {
                    from,
                    entries_max,
                    bytes_max,
                } => {
                    let (slots, end) = site.disk.read_inbox(from, entries_max.min(3), bytes_max);
                    site.reads.push_back(Input::InboxRead { slots, end });
                }
                Output::Accepted { leg, n } => {
                    let copy = site
                        .unaccepted
                        .remove(&(leg, n))
                        .expect("accepted once, and only what was written");
                    site.accepted.push(copy);
                }
                Output::OpenLane { lane, life } => {
                    let end = LaneEnd {
                        life,
                        up: false,
                        acks: site.acks,
                        written: VecDeque::new(),
                        read: 0,
                        confirmed: 0,
                    };
                    assert!(
                        site.lanes.insert(lane, end).is_none(),
                        "one stream for a lane at a time"
                    );
                }
                Output::WriteLane { lane, life, stanzas } => {
                    if let Some(end) = site.lanes.get_mut(&lane)
                        && end.life == life
                    {
                        assert!(end.up);
                        if !end.acks {
                            end.confirmed += stanzas.len() as u64;
                        }
                        end.written.extend(stanzas);
                    }
                }
                Output::LinkQuiet(_) => {}
                Output::CloseLink(why) => panic!("site {}: {why:?}", site.name),
            }
        }
    }

    pub fn check(&mut self) {
        for index in 0..2 {
            let (from, to) = (&self.sites[index], &self.sites[1 - index]);
            let mut counts: BTreeMap<&Copy, u64> = BTreeMap::new();
            for copy in &to.heard {
                *counts.entry(copy).or_default() += 1;
            }
            for (copy, count) in &counts {
                assert!(*count == 1, "heard {count} times: {copy:?}");
            }
            let mut lost = 0;
            for copy in &from.accepted {
                lost += u64::from(!counts.contains_key(copy));
            }
            assert!(lost <= to.doubtful, "{lost} lost, {} in doubt", to.doubtful);
            self.tally.in_doubt_lost += lost;
            let known: BTreeSet<&Copy> = from.accepted.iter().chain(&from.abandoned).collect();
            for copy in counts.keys() {
                assert!(known.contains(*copy), "nobody said {copy:?}");
            }
            self.tally.unaccepted_lost +=
                from.abandoned.iter().filter(|copy| !counts.contains_key(copy)).count() as u64;
            self.tally.parts += to.heard.iter().filter(|copy| copy.bytes.len() > 3000).count() as u64;
            let mut last: BTreeMap<(&str, &str), u64> = BTreeMap::new();
            for copy in &to.heard {
                if let Some(before) = last.insert((&copy.flow, &copy.to), copy.number) {
                    assert!(before < copy.number, "{copy:?} came after {before}");
                }
            }
        }
        let casts = self.casts_before + self.sites.iter().map(|site| site.relay.stats().casts).sum::<u64>();
        self.tally.casts += casts;
        if !self.faults.kills {
            let iqs: u64 = self
                .sites
                .iter()
                .flat_map(|site| &site.accepted)
                .filter(|copy| copy.number % 3 == 2)
                .count() as u64;
            let casts_said = (1..=self.numbers).filter(|number| number % 3 != 2).count() as u64;
            assert!(
                casts <= iqs + casts_said + self.late_copies(),
                "{casts} casts for {iqs} IQs and {casts_said} broadcasts"
            );
        }
    }

    /// Copies that were written after the window of their group had ended, which is the server's doing.
    fn late_copies(&self) -> u64 {
        self.tally.copies / 2
    }
}

/// Copies that the disk says were given to a lane: after a kill nobody can say whether they were.
fn marked(disk: &Model) -> u64 {
    let (slots, _) = disk.read_inbox(Default::default(), usize::MAX, usize::MAX);
    let bits = |given: &Vec<u8>| given.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>();
    slots.iter().map(|slot| bits(&slot.given)).sum()
}
