//! Two relays against each other, each with its disk and its server's ends of the lanes, and the link between them.
//!
//! This is what every world has in common. What servers say and make of what they hear is the worlds' own: they hand in
//! stanzas, and take out [`Event`]s in the order in which things happened.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use narrows::{
    codec::{
        entry::Entry,
        position::{Epoch, Seq},
    },
    queue::journal::{Batch, Change, Levels, Model},
    relay::{Input, LaneFault, LaneKey, LegId, LinkClose, Output, Relay, Settings},
    stanza::{DomainPair, Stanza},
    time::{Mono, Now, Wall},
};

use crate::{random::Random, wire::Wire};

/// What happened at one end.
pub enum Event {
    /// The `n`th stanza of this leg is on disk.
    Accepted(LegId, u64),
    /// This entry is on its way to the disk: it has crossed.
    Stored(Bytes),
    /// A batch is on disk, and this is what the disk holds.
    Committed(Levels),
    /// The server has read this.
    Heard(Bytes),
    /// The server has closed a stream on what it does not take.
    Refused,
    Closed(LinkClose),
}

/// How the server takes what lanes bring.
#[derive(Clone, Copy)]
pub struct Manner {
    /// Whether it acknowledges stanzas (XEP-0198).
    pub acks: bool,
    pub stanza_bytes_max: Option<usize>,
    /// What it closes its stream on.
    pub is_poison: fn(&Bytes) -> bool,
}

/// A lane as the server sees it.
struct LaneEnd {
    life: u64,
    up: bool,
    acks: bool,
    /// Written to the kernel, not yet read by the server.
    written: VecDeque<Bytes>,
    read: u64,
    told: u64,
}

impl LaneEnd {
    /// Without acks: what the kernel has taken.
    fn confirmed(&self) -> u64 {
        if self.acks {
            self.read
        } else {
            self.read + self.written.len() as u64
        }
    }
}

enum Job {
    Commit(Batch),
    Read(Input),
}

pub struct End {
    pub relay: Relay,
    pub settings: Settings,
    pub disk: Model,
    pub manner: Manner,
    /// Given to the disk and not yet finished, in order; a read has seen what was given before it.
    jobs: VecDeque<Job>,
    /// The place of the last read of the spool that found nothing, to notice one that is asked for again and again.
    empty_read: Option<Seq>,
    leg: u64,
    leg_count: u64,
    lanes: BTreeMap<LaneKey, LaneEnd>,
}

impl End {
    pub fn new(settings: Settings, disk: Model, manner: Manner, now: Now) -> Self {
        Self {
            relay: Relay::new(settings.clone(), &disk.opening(), now),
            settings,
            disk,
            manner,
            jobs: VecDeque::new(),
            empty_read: None,
            leg: 1,
            leg_count: 0,
            lanes: BTreeMap::new(),
        }
    }

    pub fn is_idle(&self) -> bool {
        self.jobs.is_empty() && self.relay.is_quiet()
    }

    /// The copies that the disk says were given to a lane.
    pub fn marked(&self) -> Vec<Bytes> {
        let (slots, _) = self.disk.read_inbox(Seq(0), usize::MAX, usize::MAX);
        let is_given = |given: &[u8], k: usize| given.get(k / 8).is_some_and(|byte| byte & (1 << (k % 8)) != 0);
        let mut marked = Vec::new();
        for slot in slots {
            if let Ok(Entry::Cast(cast)) = Entry::decode(&slot.entry) {
                let given = (0..cast.recipients.len()).filter(|k| is_given(&slot.given, *k));
                marked.extend(given.filter_map(|k| cast.copy(k)));
            }
        }
        marked
    }
}

pub struct Pair {
    pub ends: [End; 2],
    pub wire: Wire,
    pub events: VecDeque<(usize, Event)>,
}

impl Pair {
    pub fn new(ends: [End; 2]) -> Self {
        Self {
            ends,
            wire: Wire::default(),
            events: VecDeque::new(),
        }
    }

    pub fn handle(&mut self, end: usize, input: Input, now: Now) {
        self.ends[end].relay.handle(input, now);
        self.drain(end);
    }

    /// The server writes a stanza to its leg; says which it is.
    pub fn write(&mut self, end: usize, pair: DomainPair, stanza: Stanza, now: Now) -> (LegId, u64) {
        let here = &mut self.ends[end];
        here.leg_count += 1;
        let (leg, n) = (LegId(here.leg), here.leg_count);
        self.handle(end, Input::Stanza { leg, n, pair, stanza }, now);
        (leg, n)
    }

    pub fn finish_disk(&mut self, end: usize, now: Now, random: &mut Random) -> bool {
        match self.ends[end].jobs.pop_front() {
            None => return false,
            Some(Job::Read(read)) => self.handle(end, read, now),
            Some(Job::Commit(batch)) => {
                let disk = &mut self.ends[end].disk;
                // What only trims may be answered before it is on disk, and come undone.
                if batch.matters() || random.one_in(2) {
                    disk.commit(batch.number);
                }
                let levels = disk.opening().levels;
                self.events.push_back((end, Event::Committed(levels)));
                let batch = batch.number;
                self.handle(end, Input::Committed { batch, levels }, now);
            }
        }
        true
    }

    /// Takes up a connection that is offered.
    pub fn take_up(&mut self, end: usize, now: Now) -> bool {
        let taken = self.wire.take_up(end);
        if taken {
            self.handle(end, Input::LinkUp, now);
        }
        taken
    }

    /// Lets the socket take something, and some of what is under way arrive.
    pub fn carry(&mut self, end: usize, now: Now, random: &mut Random) -> bool {
        let mut done = self.transmit(end, now);
        if let Some(pipe) = self.wire.incoming(end)
            && let Some(mut bytes) = pipe.pop_front()
        {
            let all = bytes.len() as u64;
            let cut = if random.one_in(4) { random.below(all + 1) } else { all } as usize;
            let first = bytes.split_to(cut);
            if !bytes.is_empty() {
                pipe.push_front(bytes);
            }
            self.handle(end, Input::LinkBytes(first), now);
            done = true;
        }
        if self.wire.is_over(end) {
            self.wire.leave(end);
            self.handle(end, Input::LinkDown, now);
            done = true;
        }
        done
    }

    /// Lets the socket take something.
    fn transmit(&mut self, end: usize, now: Now) -> bool {
        let mut done = false;
        if self.wire.is_held(end)
            && self.wire.has_room(end)
            && self.ends[end].relay.wants_transmit()
            && let Some(bytes) = self.ends[end].relay.poll_transmit(now)
        {
            self.wire.write(end, bytes);
            done = true;
        }
        self.drain(end);
        done
    }

    /// The link is closed in good order: the last that it takes says so.
    pub fn say_goodbye(&mut self, end: usize, now: Now) {
        self.ends[end].relay.say_goodbye();
        while self.wire.is_held(end)
            && self.ends[end].relay.wants_transmit()
            && let Some(bytes) = self.ends[end].relay.poll_transmit(now)
        {
            self.wire.write(end, bytes);
        }
        self.drain(end);
        self.wire.leave(end);
    }

    /// The server reads what lanes have brought, all of it or some, and acknowledges it.
    pub fn read_lanes(&mut self, end: usize, all: bool, now: Now, random: &mut Random) -> bool {
        let mut done = false;
        let keys: Vec<LaneKey> = self.ends[end].lanes.keys().cloned().collect();
        for lane in keys {
            let here = &mut self.ends[end];
            let Manner {
                acks,
                stanza_bytes_max,
                is_poison,
            } = here.manner;
            let Some(open) = here.lanes.get_mut(&lane) else {
                continue;
            };
            let life = open.life;
            if !open.up {
                open.up = true;
                let up = Input::LaneUp {
                    lane,
                    life,
                    acks,
                    stanza_bytes_max,
                };
                self.handle(end, up, now);
                done = true;
                continue;
            }
            let some = if all { u64::MAX } else { random.below(8) };
            let mut poisoned = false;
            for _ in 0..some {
                let Some(bytes) = open.written.pop_front() else { break };
                if is_poison(&bytes) {
                    poisoned = true;
                    break;
                }
                open.read += 1;
                self.events.push_back((end, Event::Heard(bytes)));
            }
            let stanzas = open.confirmed();
            if stanzas > open.told && (all || poisoned || random.one_in(2)) {
                open.told = stanzas;
                let lane = lane.clone();
                self.handle(end, Input::LaneConfirmed { lane, life, stanzas }, now);
                done = true;
            }
            if poisoned {
                self.events.push_back((end, Event::Refused));
                self.ends[end].lanes.remove(&lane);
                let fault = LaneFault::Refused;
                self.handle(end, Input::LaneDown { lane, life, fault }, now);
                done = true;
            }
        }
        done
    }

    /// The server closes a lane in good order: what it has read it has acknowledged, if it does that at all; the rest is not read.
    /// A server without acks is given until it has read what the kernel took, because what is lost there nobody can know.
    /// Says whether there was one.
    pub fn break_lane(&mut self, end: usize, now: Now, random: &mut Random) -> bool {
        let here = &mut self.ends[end];
        let pick = random.below(here.lanes.len().max(1) as u64) as usize;
        let Some(lane) = here.lanes.keys().nth(pick).cloned() else {
            return false;
        };
        let mut open = here.lanes.remove(&lane).expect("picked from the keys");
        let (life, stanzas) = (open.life, open.confirmed());
        if !open.acks {
            let heard = open.written.drain(..).map(|bytes| (end, Event::Heard(bytes)));
            self.events.extend(heard);
        }
        if open.up {
            let lane = lane.clone();
            self.handle(end, Input::LaneConfirmed { lane, life, stanzas }, now);
        }
        let fault = LaneFault::Gone;
        self.handle(end, Input::LaneDown { lane, life, fault }, now);
        true
    }

    /// The process is no more: of what its disk had not finished some is on disk, whole, in order.
    pub fn end_process(&mut self, end: usize, random: &mut Random) {
        self.wire.leave(end);
        let here = &mut self.ends[end];
        let finished = random.below(here.jobs.len() as u64 + 1) as usize;
        for job in here.jobs.drain(..).take(finished) {
            if let Job::Commit(batch) = job {
                here.disk.commit(batch.number);
            }
        }
        here.disk.crash();
        // The kernel still delivers what was written before.
        for (_, open) in std::mem::take(&mut here.lanes) {
            for bytes in open.written {
                // The server closes the stream here. What is behind it is marked, and will be missed.
                if (here.manner.is_poison)(&bytes) {
                    break;
                }
                self.events.push_back((end, Event::Heard(bytes)));
            }
        }
    }

    /// Whatever was given to the disk is on it.
    pub fn finish_commits(&mut self, end: usize) {
        let here = &mut self.ends[end];
        for job in here.jobs.drain(..) {
            if let Job::Commit(batch) = job {
                here.disk.commit(batch.number);
            }
        }
    }

    pub fn start_process(&mut self, end: usize, now: Now) {
        let here = &mut self.ends[end];
        // A server without XEP-0198 does not know what it lost; the rest it still has to say goes to a new stream.
        here.leg += 1;
        here.leg_count = 0;
        here.relay = Relay::new(here.settings.clone(), &here.disk.opening(), now);
        here.empty_read = None;
        self.drain(end);
    }

    pub fn replace_disk(&mut self, end: usize, epoch: Epoch) {
        self.ends[end].disk = Model::new(epoch);
    }

    /// Whether all that was accepted is with the servers.
    pub fn is_delivered(&self) -> bool {
        (0..2).all(|end| {
            let here = &self.ends[end];
            here.relay.is_delivered() && here.disk.opening().levels.inbox_entries == 0 && self.crossed(end)
        })
    }

    /// Whether what this end's spool holds is with the other.
    fn crossed(&self, end: usize) -> bool {
        let (here, there) = (self.ends[end].disk.opening(), self.ends[1 - end].disk.opening());
        here.spool_first.is_none() || there.received.epoch == here.epoch && there.received.upto >= here.spool_last
    }

    pub fn unrest(&self) -> String {
        let end = |end: &End| {
            format!(
                "{:?}: {:?}, {:?}, lanes {:?}, settled {}, linked {}; ",
                end.settings.local.first(),
                end.relay.levels(),
                end.relay.stats(),
                end.relay.lanes_up(),
                end.relay.is_settled(),
                end.relay.is_linked(),
            )
        };
        self.ends.iter().map(end).collect()
    }

    fn drain(&mut self, end: usize) {
        while let Some(output) = self.ends[end].relay.poll_output() {
            self.carry_out(end, output);
        }
    }

    fn carry_out(&mut self, end: usize, output: Output) {
        let here = &mut self.ends[end];
        match output {
            Output::Commit(batch) => {
                for change in &batch.changes {
                    if let Change::PutInbox { entry, .. } = change {
                        self.events.push_back((end, Event::Stored(entry.clone())));
                    }
                }
                here.disk.apply(batch.clone());
                here.jobs.push_back(Job::Commit(batch));
            }
            Output::ReadSpool {
                from,
                entries_max,
                bytes_max,
            } => {
                let (slots, last) = here.disk.read_spool(from, entries_max.min(3), bytes_max);
                if slots.is_empty() {
                    assert_ne!(here.empty_read, Some(from), "nothing is read, again and again");
                    here.empty_read = Some(from);
                } else {
                    here.empty_read = None;
                }
                here.jobs.push_back(Job::Read(Input::SpoolRead { slots, end: last }));
            }
            Output::ReadInbox {
                from,
                entries_max,
                bytes_max,
            } => {
                let (slots, last) = here.disk.read_inbox(from, entries_max.min(3), bytes_max);
                here.jobs.push_back(Job::Read(Input::InboxRead { slots, end: last }));
            }
            Output::Accepted { leg, n } => self.events.push_back((end, Event::Accepted(leg, n))),
            Output::OpenLane { lane, life } => {
                let open = LaneEnd {
                    life,
                    up: false,
                    acks: here.manner.acks,
                    written: VecDeque::new(),
                    read: 0,
                    told: 0,
                };
                assert!(
                    here.lanes.insert(lane, open).is_none(),
                    "one stream for a lane at a time"
                );
            }
            Output::WriteLane {
                lane, life, stanzas, ..
            } => {
                if let Some(open) = here.lanes.get_mut(&lane)
                    && open.life == life
                {
                    assert!(open.up);
                    open.written.extend(stanzas);
                }
            }
            Output::LinkQuiet(_) => {}
            Output::CloseLink(why) => {
                self.wire.leave(end);
                self.events.push_back((end, Event::Closed(why)));
            }
        }
    }
}

/// Time passes up to this moment; whoever asked for an earlier one is told in its turn.
pub fn pass_until(pairs: &mut [Pair], now: &mut Now, until: Mono) {
    let before = now.mono;
    loop {
        let due = (0..pairs.len() * 2)
            .filter_map(|at| Some((pairs[at / 2].ends[at % 2].relay.poll_timeout()?, at)))
            .filter(|(deadline, _)| deadline.at <= until)
            .min();
        let Some((deadline, at)) = due else { break };
        now.mono = now.mono.max(deadline.at);
        pairs[at / 2].handle(at % 2, Input::Timeout, *now);
        let next = pairs[at / 2].ends[at % 2].relay.poll_timeout();
        assert_ne!(next, Some(deadline), "a timeout must do something");
    }
    now.mono = now.mono.max(until);
    now.wall = Wall(now.wall.0 + now.mono.since(before).as_millis() as u64);
}
