//! The world of one seed: a hub and its peers, each a server beside its ends of the pairs, and their clients.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use bytes::Bytes;
use narrows::{
    codec::position::Epoch,
    link::session::{LinkError, SessionConfig},
    mirror::{MirrorSettings, SplitFar},
    queue::rules::{Action, Conditions, Direction, Placement, Rule, Type},
    queue::{
        class::{Class, Classes},
        journal::Model,
    },
    relay::{LegId, LinkClose, Relay, Settings},
    stanza::{Domain, DomainPair, Kind, Stanza, bare, domain_of},
    time::{Mono, Now, Wall},
};

use super::{
    check::{Tally, is_carried},
    client::{Act, Client, Question, a_nick},
    room::{self, Affiliation, Config, Room},
    server::{Flavour, Server},
    words::{Speech, Speeches},
    xml::{self, child},
};
use crate::{
    pair::{self, End, Event, Manner, Pair},
    random::Random,
};

/// What goes wrong in a world, and how large it is.
#[derive(Clone, Copy, Debug)]
pub struct Faults {
    pub peers: usize,
    /// The link is lost now and then, sometimes for long.
    pub cuts: bool,
    /// It comes and goes all the time.
    pub flaps: bool,
    /// Servers close streams.
    pub lanes: bool,
    /// Sidecars are killed, and what their disks had not finished is torn off.
    pub kills: bool,
    /// Servers restart.
    pub restarts: bool,
    /// Clients vanish without a word.
    pub vanishing: bool,
    /// The relays mirror rooms: what may differ then is in [`super::check::Declared`].
    pub mirror: bool,
    /// Guests leave their rooms for as long as a split lasts.
    pub leaves: bool,
}

/// One direction of one pair, as the two servers see it.
#[derive(Default)]
pub struct Way {
    /// The site where it ends.
    pub to: usize,
    /// Written by the server, in order.
    pub sent: Vec<Sent>,
    /// Read by the other, in order.
    pub heard: Vec<Bytes>,
    unaccepted: BTreeMap<(LegId, u64), usize>,
    /// Marked as given on the disk when the process was killed: the other server may never have read it.
    pub doubtful: BTreeSet<Bytes>,
    /// Casts that what was sent may become at most, and when the groups were opened that it belongs to.
    pub casts_due: u64,
    pub casts: u64,
    opened: BTreeMap<(u64, Bytes), (Mono, u64)>,
    /// By room and recipient, the group that was opened last of those that it stands in.
    latest: BTreeMap<(String, String), u64>,
    /// Whose broadcasts were begun when, by address and kind.
    begun: BTreeMap<(String, Kind), BTreeMap<u64, Mono>>,
    /// From which words, and when, a relay that has only listened can first know who is in a room; and whom it then knows.
    known: BTreeMap<String, (u64, Mono)>,
    /// A process has begun that may ask rooms what they have said last.
    asked_until: Option<Mono>,
    reached: BTreeSet<(String, String)>,
    /// In whose names rooms were asked for their last words, and were by a process that is no more.
    asked: BTreeSet<String>,
    strays: BTreeSet<String>,
}

pub struct Sent {
    pub bytes: Bytes,
    /// The process was killed before it had it on disk.
    pub abandoned: bool,
    /// What a room repeats to one who is in, because a sidecar has asked for it; and whether the process that did is no more: then it may be
    /// taken for what the session has asked for itself.
    pub repeated: bool,
    pub is_stray: bool,
}

impl Way {
    fn to(site: usize) -> Self {
        Self {
            to: site,
            ..Self::default()
        }
    }

    /// Whether this may be missing.
    pub fn is_excused(&self, sent: &Sent) -> bool {
        sent.abandoned || self.doubtful.iter().any(|doubtful| is_carried(&sent.bytes, doubtful))
    }
}

pub struct World {
    pub random: Random,
    pub faults: Faults,
    now: Now,
    /// The hub is the first.
    pub servers: Vec<Server>,
    /// Between the hub, at end 0, and peer `k + 1`.
    pub pairs: Vec<Pair>,
    /// By pair and the end where it begins.
    pub ways: Vec<[Way; 2]>,
    pub clients: Vec<Client>,
    /// Their earlier lives.
    pub gone: Vec<Client>,
    /// Sessions that once went without a word: a room may find out, and expel them.
    pub vanished: BTreeSet<String>,
    /// Servers that have restarted, and may have forgotten what they were asked.
    pub restarted: BTreeSet<usize>,
    /// What was said to rooms.
    pub said: Speeches,
    /// When each link may come up again.
    down_until: Vec<Mono>,
    numbers: u64,
    pub tally: Tally,
    /// For whoever must find out what went wrong: what has this in it is printed as it happens.
    traced: Option<String>,
}

const USERS: u64 = 5;
const ROOMS: u64 = 2;
const STEPS: usize = 700;

/// Whoever comes back after a long time is served within this: a lane that failed is tried after 15 s, a link after 10 s,
/// an acknowledgement waits 5 s.
const REST_MAX: Duration = Duration::from_secs(60);
const REDIAL: Duration = Duration::from_secs(10);

/// So long a room may be asked for its last words.
const ASKED_MAX: Duration = Duration::from_secs(10);

/// Here every presence is compared, so none may be overtaken or replaced. What gives way to a newer one is seen in the other worlds.
fn every_presence_counts() -> Rule {
    Rule {
        name: "every presence counts".into(),
        direction: Direction::Sent,
        when: Conditions {
            kind: Some(Kind::Presence),
            types: vec![Type::Available, Type::Unavailable],
            ..Conditions::default()
        },
        then: Action::Place(Placement {
            class: Some(Class::Message),
            expiry: None,
        }),
        observe: false,
    }
}

/// Nobody gives up: what is lost is lost by mistake. Only what is volatile gives way to the newest.
fn patient() -> Classes {
    let mut classes = Classes::default();
    for class in Class::ALL {
        classes[class].expiry = None;
    }
    classes
}

fn settings(here: &Server, there: &Server, faults: Faults, random: &mut Random) -> Settings {
    let mirror = match faults.mirror {
        true => MirrorSettings {
            enabled: true,
            split_hold: Duration::from_secs(random.pick(&[10, 300])),
            split_far: match faults.leaves {
                true => SplitFar::Leave,
                false => SplitFar::Away,
            },
            ..MirrorSettings::default()
        },
        false => MirrorSettings {
            enabled: false,
            delay_stamp_after: Duration::MAX,
            ..MirrorSettings::default()
        },
    };
    let domains = |server: &Server| [server.host(), server.service()].map(|name| domain(&name)).to_vec();
    Settings {
        local: domains(here),
        far: domains(there),
        collapse_window: Duration::from_millis(random.pick(&[50, 50, 50, 10])),
        queue_bytes_max: 1 << 30,
        queue_entries_max: 1 << 30,
        classes: patient(),
        rules: vec![every_presence_counts()],
        lanes_per_pair: random.pick(&[1, 1, 2, 3]),
        lane_retry_max: Duration::from_secs(15),
        memory_bytes: random.pick(&[300, 10_000, 1 << 20]),
        batch_bytes: random.pick(&[300, 4096]),
        compress: false,
        site: None,
        session: SessionConfig {
            ack_delay: Duration::from_millis(random.pick(&[0, 20, 1000, 5000])),
            ack_entries_max: random.pick(&[1, 3, 64]),
            fragment_bytes_max: random.pick(&[100, 1024]),
            ..SessionConfig::default()
        },
        mirror,
    }
}

fn domain(text: &str) -> Domain {
    Domain::new(text).expect("a domain")
}

impl World {
    pub fn new(seed: u64, faults: Faults) -> Self {
        let mut random = Random::new(seed);
        let now = Now {
            mono: Mono::from_start(Duration::ZERO),
            wall: Wall(1_800_000_000_000),
        };
        let mut servers: Vec<Server> = ('a'..='z')
            .take(1 + faults.peers)
            .map(|name| Server::new(name, random.pick(&[Flavour::Prosody, Flavour::Ejabberd])))
            .collect();
        let mut clients = Vec::new();
        for (site, server) in servers.iter_mut().enumerate() {
            // The hub's rooms are what this is about; a peer may have one of its own.
            let rooms = if site == 0 { ROOMS } else { random.below(2) };
            for room in 0..rooms {
                let room = a_room(server, room, 1 + faults.peers, &mut random);
                server.rooms.insert(room.jid.clone(), room);
            }
            for user in 0..USERS {
                for _ in 0..1 + u64::from(user == 1) {
                    clients.push(Client::new(site, format!("u{user}@{}", server.host())));
                }
            }
        }
        let mut end = |here: usize, there: usize| {
            let settings = settings(&servers[here], &servers[there], faults, &mut random);
            let manner = Manner {
                acks: servers[here].flavour == Flavour::Prosody,
                stanza_bytes_max: None,
                is_poison: |_| false,
            };
            End::new(settings, Model::new(Epoch(random.next())), manner, now)
        };
        let peers = 1..=faults.peers;
        let pairs: Vec<Pair> = peers.map(|peer| Pair::new([end(0, peer), end(peer, 0)])).collect();
        Self {
            random,
            faults,
            now,
            servers,
            ways: (1..=pairs.len()).map(|peer| [Way::to(peer), Way::to(0)]).collect(),
            down_until: vec![now.mono; pairs.len()],
            pairs,
            clients,
            gone: Vec::new(),
            vanished: BTreeSet::new(),
            restarted: BTreeSet::new(),
            said: Speeches::new(),
            numbers: 0,
            tally: Tally::default(),
            traced: std::env::var("NARROWS_SIM_TRACE").ok(),
        }
    }

    pub fn run(&mut self) {
        for client in 0..self.clients.len() {
            self.connect(client);
            self.enter(client);
        }
        for _ in 0..STEPS {
            self.step();
        }
        self.rest();
        // What a room says finds out who is not there any more (and nothing else does).
        for site in 0..self.servers.len() {
            self.servers[site].speak_in_rooms(self.now.wall, &mut self.random);
            self.settle(site);
        }
        self.rest();
        for client in 0..self.clients.len() {
            for room in self.clients[client].stays.keys().cloned().collect::<Vec<_>>() {
                if let Some(act) = self.clients[client].ping_self(&room) {
                    self.say(client, &act);
                }
            }
        }
        self.rest();
        for (pair, ways) in self.pairs.iter().zip(&mut self.ways) {
            for (end, way) in pair.ends.iter().zip(ways) {
                way.note_casts(&end.relay);
            }
        }
    }

    fn step(&mut self) {
        let pair = self.random.below(self.pairs.len() as u64) as usize;
        let end = self.random.below(2) as usize;
        match self.random.below(40) {
            0..=7 => self.act(),
            8..=13 => {
                for _ in 0..1 + self.random.below(16) {
                    self.write_leg(pair, end);
                }
            }
            14..=18 => {
                for _ in 0..1 + self.random.below(4) {
                    self.finish_disk(pair, end);
                }
            }
            19..=24 => {
                for _ in 0..1 + self.random.below(6) {
                    self.carry(pair, end);
                }
            }
            25..=29 => drop(self.read_lanes(pair, end, false)),
            30..=31 => {
                if !self.pairs[pair].wire.is_up() && self.now.mono >= self.down_until[pair] {
                    self.pairs[pair].wire.dial();
                }
                self.take_up(pair, end);
                if !self.random.one_in(3) {
                    self.take_up(pair, 1 - end);
                }
            }
            // Often enough to hurt, and not so often that nobody far ever gets to enter.
            32 if self.faults.flaps && self.random.one_in(3) || self.faults.cuts && self.random.one_in(10) => {
                self.cut(pair)
            }
            33 if self.faults.lanes && self.random.one_in(2) => {
                let broken = self.pairs[pair].break_lane(end, self.now, &mut self.random);
                self.tally.lane_breaks += u64::from(broken);
                self.notice(pair);
            }
            34 if self.faults.kills && self.random.one_in(6) => self.kill(pair, end),
            35 if self.faults.restarts && self.random.one_in(16) => {
                let site = self.random.below(self.servers.len() as u64) as usize;
                self.restart(site);
            }
            _ => self.pass(20),
        }
    }

    /// Up to so many milliseconds go by; while a link is down for long, more.
    fn pass(&mut self, ms_max: u64) {
        let down = self.down_until.iter().map(|until| until.since(self.now.mono));
        let down_ms = down.max().unwrap_or_default().as_millis() as u64;
        let time = Duration::from_millis(1 + self.random.below(ms_max.max(down_ms / 16)));
        self.pass_until(self.now.mono + time);
    }

    fn pass_until(&mut self, until: Mono) {
        pair::pass_until(&mut self.pairs, &mut self.now, until);
        for pair in 0..self.pairs.len() {
            self.notice(pair);
        }
    }

    /// Prints what happened, if it is looked for.
    fn trace(&self, at: (usize, usize), what: &str, detail: &str) {
        if self
            .traced
            .as_ref()
            .is_some_and(|text| detail.is_empty() || detail.contains(text))
        {
            eprintln!(
                "{:>12?} {at:?} {what:>6} {detail}",
                self.now.mono.since(Mono::from_start(Duration::ZERO))
            );
        }
    }

    fn cut(&mut self, pair: usize) {
        self.trace((pair, 2), "cut", "");
        self.tally.cuts += 1;
        self.pairs[pair].wire.cut();
        let seconds = match self.faults.flaps {
            true => self.random.pick(&[0, 0, 0, 1]),
            false => self.random.pick(&[0, 1, 30, 1200]),
        };
        self.down_until[pair] = self.now.mono + Duration::from_secs(seconds);
    }

    fn kill(&mut self, pair: usize, end: usize) {
        self.trace((pair, end), "kill", "");
        self.tally.kills += 1;
        self.pairs[pair].end_process(end, &mut self.random);
        self.notice(pair);
        let out = &mut self.ways[pair][end];
        for at in std::mem::take(&mut out.unaccepted).into_values() {
            out.sent[at].abandoned = true;
        }
        let asked = std::mem::take(&mut out.asked);
        out.strays.extend(asked);
        out.opened.clear();
        out.latest.clear();
        out.begun.clear();
        out.known.clear();
        out.reached.clear();
        out.asked_until = self.faults.mirror.then(|| self.now.mono + ASKED_MAX);
        out.note_casts(&self.pairs[pair].ends[end].relay);
        let marked = self.pairs[pair].ends[end].marked();
        self.ways[pair][1 - end].doubtful.extend(marked);
        self.pairs[pair].start_process(end, self.now);
        self.notice(pair);
    }

    /// A server restarts: its streams close, its clients are gone and come back.
    fn restart(&mut self, site: usize) {
        self.tally.restarts += 1;
        self.restarted.insert(site);
        let abruptly = self.faults.vanishing && self.random.one_in(3);
        self.servers[site].restart(abruptly, self.now.wall, &mut self.random);
        for client in 0..self.clients.len() {
            if self.clients[client].site == site && self.clients[client].online {
                if abruptly {
                    self.vanished.insert(self.clients[client].jid.clone());
                }
                self.end(client);
            }
        }
        self.settle(site);
        for (pair, end) in self.ends_of(site) {
            while self.pairs[pair].break_lane(end, self.now, &mut self.random) {
                self.notice(pair);
            }
            self.notice(pair);
        }
    }

    fn ends_of(&self, site: usize) -> Vec<(usize, usize)> {
        match site {
            0 => (0..self.pairs.len()).map(|pair| (pair, 0)).collect(),
            peer => vec![(peer - 1, 1)],
        }
    }

    fn site_at(pair: usize, end: usize) -> usize {
        if end == 0 { 0 } else { pair + 1 }
    }

    // Clients.

    /// A client comes, under an address that nobody had before: what an earlier life was still to hear is not for it.
    fn connect(&mut self, client: usize) {
        self.numbers += 1;
        let client = &mut self.clients[client];
        client.jid = format!("{}/r{}", bare(&client.jid), self.numbers);
        client.online = true;
        self.servers[client.site].connect(&client.jid);
    }

    /// A client is gone.
    fn end(&mut self, client: usize) {
        let next = Client::new(self.clients[client].site, bare(&self.clients[client].jid).to_owned());
        self.gone.push(std::mem::replace(&mut self.clients[client], next));
    }

    fn say(&mut self, client: usize, act: &Act) {
        let (site, jid) = (self.clients[client].site, self.clients[client].jid.clone());
        self.tally.acts += 1;
        if let Some(body) =
            child(&format!("<x>{}</x>", act.payload), "body").filter(|_| act.stanza_type == Some("groupchat"))
        {
            let speech = Speech {
                author: jid.clone(),
                site,
                room: act.to.clone(),
                payload: act.payload.clone(),
            };
            self.said.insert(body.to_owned(), speech);
        }
        self.servers[site].hear(&jid, &act.said(), self.now.wall, &mut self.random);
        self.settle(site);
    }

    /// A client wants to be in some room.
    fn enter(&mut self, client: usize) {
        let site = self.clients[client].site;
        let reaches = |other: usize| other == site || other == 0 || site == 0;
        let in_reach = (0..self.servers.len()).filter(|other| reaches(*other));
        let rooms: Vec<&Room> = in_reach.flat_map(|other| self.servers[other].rooms.values()).collect();
        // Most meet in one.
        let room = match self.random.one_in(3) {
            true => rooms[self.random.below(rooms.len() as u64) as usize],
            false => self.servers[0].rooms.values().next().expect("the hub has rooms"),
        };
        let name = room.jid.clone();
        let stay = self.clients[client].stays.get(&name).cloned().unwrap_or_default();
        // A second answer would be taken for the first.
        if stay.asked.is_some() || stay.has_changed_nick {
            return;
        }
        let password = room.config.password.clone().filter(|_| !self.random.one_in(6));
        // Sessions of one user mostly share a nick; some nicks are taken.
        let nick = match (stay.view.inside, self.random.below(6)) {
            // It is in, and wants to be told everything again.
            (Some(nick), _) => nick,
            (None, 0) => a_nick(&mut self.random),
            (None, _) => format!("n-{}", bare(&self.clients[client].jid).replace(['@', '.'], "-")),
        };
        let history = self.random.one_in(2).then(|| self.random.below(5));
        let act = self.clients[client].join(&name, &nick, password.as_deref(), history);
        self.say(client, &act);
    }

    fn act(&mut self) {
        let client = self.random.below(self.clients.len() as u64) as usize;
        if !self.clients[client].online {
            self.connect(client);
            return self.enter(client);
        }
        let rooms: Vec<String> = self.clients[client].stays.keys().cloned().collect();
        match self.random.below(16) {
            0..=1 => self.enter(client),
            2 if self.faults.vanishing && self.random.one_in(2) => {
                let (site, jid) = (self.clients[client].site, self.clients[client].jid.clone());
                self.tally.vanished += 1;
                self.end(client);
                self.servers[site].forget(&jid);
                self.vanished.insert(jid);
            }
            3 if self.random.one_in(2) => {
                let (site, jid) = (self.clients[client].site, self.clients[client].jid.clone());
                self.end(client);
                self.servers[site].disconnect(&jid, self.now.wall, &mut self.random);
                self.settle(site);
            }
            _ if rooms.is_empty() => self.enter(client),
            _ => {
                let room = &rooms[self.random.below(rooms.len() as u64) as usize];
                let everybody: Vec<String> = self.clients.iter().map(|client| client.jid.clone()).collect();
                self.numbers += 1;
                let act = self.clients[client].act_in(room, self.numbers, &everybody, &mut self.random);
                if let Some(act) = act {
                    self.say(client, &act);
                }
            }
        }
    }

    /// Clients hear what their server has for them, and answer.
    fn settle(&mut self, site: usize) {
        while let Some((jid, bytes)) = self.servers[site].delivered.pop_front() {
            self.tally.delivered += 1;
            // One that has just ended hears nothing more.
            if let Some(client) = self.clients.iter_mut().find(|client| client.jid == jid)
                && let Some(act) = client.hear(&bytes)
            {
                let said = act.said();
                self.servers[site].hear(&jid, &said, self.now.wall, &mut self.random);
            }
        }
    }

    // The pairs.

    fn write_leg(&mut self, pair: usize, end: usize) -> bool {
        let (here, there) = (Self::site_at(pair, end), Self::site_at(pair, 1 - end));
        let there = self.servers[there].name;
        let Some(words) = self.servers[here].next_for(there, &mut self.random) else {
            return false;
        };
        self.trace((pair, end), "says", xml::text(&words.bytes));
        let stanza = Stanza::parse(words.bytes.clone()).expect("servers write stanzas");
        let from = stanza.from().expect("servers say who sent it").into_owned();
        let domains = DomainPair {
            local: domain(domain_of(&from)),
            far: domain(domain_of(&words.to)),
        };
        self.tally.copies += 1;
        let way = &mut self.ways[pair][end];
        let window = self.pairs[pair].ends[end].settings.collapse_window;
        way.note_cast(&stanza, words.event, self.now.mono, window);
        way.sent.push(Sent {
            bytes: words.bytes,
            abandoned: false,
            repeated: words.repeated,
            is_stray: words.repeated && way.strays.contains(&words.to),
        });
        let place = self.pairs[pair].write(end, domains, stanza, self.now);
        way.unaccepted.insert(place, way.sent.len() - 1);
        self.notice(pair);
        true
    }

    fn finish_disk(&mut self, pair: usize, end: usize) -> bool {
        let done = self.pairs[pair].finish_disk(end, self.now, &mut self.random);
        self.notice(pair);
        done
    }

    fn take_up(&mut self, pair: usize, end: usize) -> bool {
        let done = self.pairs[pair].take_up(end, self.now);
        if done {
            self.trace((pair, end), "link", "");
        }
        self.notice(pair);
        done
    }

    fn carry(&mut self, pair: usize, end: usize) -> bool {
        let done = self.pairs[pair].carry(end, self.now, &mut self.random);
        self.notice(pair);
        done
    }

    fn read_lanes(&mut self, pair: usize, end: usize, all: bool) -> bool {
        let done = self.pairs[pair].read_lanes(end, all, self.now, &mut self.random);
        self.notice(pair);
        done
    }

    /// Takes note of what has happened at a pair; servers do with what they hear what they do.
    fn notice(&mut self, pair: usize) {
        while let Some((end, event)) = self.pairs[pair].events.pop_front() {
            match event {
                Event::Accepted(leg, n) => {
                    let known = self.ways[pair][end].unaccepted.remove(&(leg, n));
                    known.expect("accepted once, and only what was written");
                }
                Event::Heard(bytes) => {
                    self.trace((pair, end), "hears", xml::text(&bytes));
                    self.ways[pair][1 - end].heard.push(bytes.clone());
                    if let Some(session) = room::asks_for_last_words(xml::text(&bytes)) {
                        self.ways[pair][end].asked.insert(session.to_owned());
                    }
                    let site = Self::site_at(pair, end);
                    self.servers[site].route(bytes, self.now.wall, &mut self.random);
                    self.settle(site);
                }
                Event::Stored(entry) => self.trace((pair, end), "stores", &String::from_utf8_lossy(&entry)),
                Event::Committed(_) => {}
                Event::Refused => panic!("nothing here is poison"),
                Event::Closed(LinkClose::Error(LinkError::PeerSilent { .. })) => {}
                Event::Closed(why) => panic!("pair {pair}, end {end}: {why:?}"),
            }
        }
    }

    /// No more faults, and nobody acts. Whatever can be done is done at once, and time passes only when nothing can.
    fn rest(&mut self) {
        let begun = self.now.mono;
        loop {
            for pair in &mut self.pairs {
                if !pair.wire.is_up() {
                    pair.wire.dial();
                }
            }
            self.come_to_a_stop();
            let idle = self.pairs.iter().flat_map(|pair| &pair.ends).all(End::is_idle);
            let accepted = self.ways.iter().flatten().all(|way| way.unaccepted.is_empty());
            if idle && accepted {
                assert!(
                    self.pairs.iter().all(Pair::is_delivered),
                    "idle, but not delivered: {}",
                    self.unrest()
                );
                return;
            }
            let ends = self.pairs.iter().flat_map(|pair| &pair.ends);
            let deadline = ends.filter_map(|end| end.relay.poll_timeout()).min();
            let redial = self.now.mono + REDIAL;
            let at = match deadline {
                Some(deadline) if self.pairs.iter().all(|pair| pair.wire.is_up()) => deadline.at,
                Some(deadline) => deadline.at.min(redial),
                None => redial,
            };
            assert!(
                at.since(begun) <= REST_MAX,
                "never comes to rest: {deadline:?}, {}",
                self.unrest()
            );
            self.pass_until(at);
        }
    }

    fn come_to_a_stop(&mut self) {
        for round in 0.. {
            assert!(round < 100_000, "goes round in circles: {}", self.unrest());
            let mut done = false;
            for at in 0..self.pairs.len() * 2 {
                let (pair, end) = (at / 2, at % 2);
                while self.write_leg(pair, end) {
                    done = true;
                }
                done |= self.carry(pair, end);
                done |= self.finish_disk(pair, end);
                done |= self.take_up(pair, end);
                done |= self.carry(pair, end);
                done |= self.read_lanes(pair, end, true);
            }
            if !done {
                return;
            }
        }
    }

    fn unrest(&self) -> String {
        self.pairs.iter().map(Pair::unrest).collect()
    }
}

impl Way {
    /// What a relay has made of it. Who is told that it is out of a room is told that alone, and what is found was not sent.
    fn note_casts(&mut self, relay: &Relay) {
        let stats = relay.mirror().stats();
        self.casts += relay.stats().casts;
        self.casts_due += stats.ghosts + stats.found;
    }

    /// P2: how many casts this may cost at most. Copies of one broadcast share one while their window is open.
    fn note_cast(&mut self, stanza: &Stanza, event: u64, now: Mono, window: Duration) {
        let (template, ..) = stanza.split_to().expect("servers say whom it is for");
        let from = stanza.from().expect("servers say who sent it").into_owned();
        let to = stanza.to().expect("servers say whom it is for").into_owned();
        let room = bare(&from).to_owned();
        let stanza_type = stanza.stanza_type();
        let is_for_all = stanza_type.as_deref() == Some("groupchat") && !stanza.is_for_newcomers();
        // Whom a relay that has only listened does not yet know to be in the room may come as a surprise.
        let is_surprise = !self.reached.contains(&(room.clone(), to.clone()));
        let is_known = self.known.get(&room).is_some_and(|(_, from)| *from <= now);
        if stanza_type.as_deref() == Some("unavailable") && stanza.has_muc_status("110") {
            self.reached.remove(&(room.clone(), to.clone()));
            // A room without sessions is forgotten.
            if !self.reached.iter().any(|(other, _)| *other == room) {
                self.known.remove(&room);
            }
        } else if is_for_all || stanza.has_muc_status("110") {
            let (first, _) = match is_for_all {
                true => *self.known.entry(room.clone()).or_insert((event, now + window)),
                false => (0, now),
            };
            if is_known || first == event {
                self.reached.insert((room.clone(), to.clone()));
            }
        }
        let begun = self.begun.entry((from, stanza.kind())).or_default();
        begun.retain(|_, at| now.since(*at) < window);
        begun.entry(event).or_insert(now);
        // What a newcomer is told of an occupant and what the occupant then says look like one event in two forms, which together
        // have reached everybody: the second may end early.
        let alone = begun.len() == 1;
        let is_shared = matches!(
            stanza_type.as_deref(),
            None | Some("groupchat" | "unavailable" | "normal")
        );
        // In a room that is not known yet, nobody's own presence waits for that of another session of the same nick.
        let is_own = stanza.kind() == Kind::Presence && stanza.has_muc_status("110");
        // Words of a room that is asked for what was lost wait there; of a hearer that leaves meanwhile they go ahead.
        let is_asked = is_for_all && self.asked_until.is_some_and(|until| now < until);
        let is_shared = is_shared && (is_known || !is_own) && !is_asked;
        let latest = self.latest.entry((room, to)).or_default();
        if let Some((opened, number)) = self.opened.get(&(event, template.clone()))
            && is_shared
            && alone
            && !is_surprise
            && now.since(*opened) < window
            // Nobody is moved before what came to them earlier.
            && *latest <= *number
        {
            *latest = *number;
            return;
        }
        self.casts_due += 1;
        *latest = self.casts_due;
        self.opened.insert((event, template), (now, self.casts_due));
    }
}

fn a_room(server: &Server, number: u64, sites: usize, random: &mut Random) -> Room {
    let host = server.host();
    let config = Config {
        moderated: random.one_in(4),
        members_only: random.one_in(6),
        password: random.one_in(6).then(|| "open sesame".to_owned()),
        non_anonymous: random.one_in(3),
        restricted: false,
        archived: random.one_in(4),
    };
    let mut room = Room::new(
        format!("room{number}@{}", server.service()),
        if random.one_in(2) {
            format!("u0@{host}")
        } else {
            "u0@b.example".to_owned()
        },
        config,
    );
    // Somebody at the first peer helps. And some rooms are yet to be made.
    room.exists = !random.one_in(4);
    room.affiliations.insert("u1@b.example".to_owned(), Affiliation::Admin);
    for user in 0..USERS {
        for site in ('a'..='z').take(sites.max(3)) {
            if random.one_in(3) {
                let user = format!("u{user}@{site}.example");
                room.affiliations.entry(user).or_insert(Affiliation::Member);
            }
        }
    }
    room
}

/// The kinds of questions whose answers only the asked occupant can give.
pub fn may_be_forgotten(question: Question) -> bool {
    question == Question::Occupant
}
