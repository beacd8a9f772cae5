//! How long a chat line takes over a link of 9600 bit/s while other things cross, and what a large queue takes in memory.
//!
//! Two relays, disks that finish at once, and a link in simulated time: 1,200 bytes a second in each direction and 300 ms each way, with
//! [`PACKET_BYTES`] for each packet. Beside it stands what plain S2S would do in the same time: every copy in its turn, as the
//! server wrote it. `cargo bench --bench queue`.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use bytes::Bytes;
use narrows::{
    codec::position::Epoch,
    link::session::SessionConfig,
    mirror::MirrorSettings,
    queue::{class::Classes, journal::Model},
    relay::{Input, LaneKey, LegId, MEMORY_BYTES, Output, Relay, Settings},
    stanza::{Domain, DomainPair, Stanza, domain_of},
    time::{Mono, Now, Wall},
};

/// 9600 bit/s.
const BYTES_A_SECOND: u64 = 1200;
const ONE_WAY: Duration = Duration::from_millis(300);
/// IPv4, TCP with time stamps, TLS.
const PACKET_BYTES: u64 = 52 + 22;
/// What goes into one of them.
const SEGMENT_BYTES: u64 = 1400;
const FAR_OCCUPANTS: usize = 10;
const LINES: u64 = 60;
const LINE_EVERY: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Load {
    Idle,
    Large,
    Presences,
    Page,
    Backlog,
}

struct End {
    relay: Relay,
    disk: Option<Model>,
    /// What is on its way to the other end.
    flying: VecDeque<(Mono, Bytes)>,
    /// When the last of it has left.
    free_at: Mono,
    bytes: u64,
    read: Vec<(Mono, Bytes)>,
    confirmed: BTreeMap<LaneKey, u64>,
}

fn now_at(mono: Duration) -> Now {
    Now {
        mono: Mono::from_start(mono),
        wall: Wall(mono.as_millis() as u64),
    }
}

fn wire_time(bytes: u64) -> Duration {
    let packets = bytes.div_ceil(SEGMENT_BYTES).max(1);
    Duration::from_secs_f64((bytes + packets * PACKET_BYTES) as f64 / BYTES_A_SECOND as f64)
}

impl End {
    fn new(name: char, other: char, keeps: bool) -> Self {
        let domain = |text: String| Domain::new(&text).expect("a domain");
        let domains = |name| {
            vec![
                domain(format!("{name}.example")),
                domain(format!("rooms.{name}.example")),
            ]
        };
        let settings = Settings {
            local: domains(name),
            far: domains(other),
            collapse_window: Duration::from_millis(50),
            queue_bytes_max: 1 << 30,
            queue_entries_max: 1_000_000,
            classes: Classes::default(),
            rules: Vec::new(),
            lanes_per_pair: 1,
            lane_retry_max: Duration::from_secs(15),
            memory_bytes: MEMORY_BYTES,
            batch_bytes: 4096,
            compress: true,
            site: None,
            session: SessionConfig::default(),
            mirror: MirrorSettings {
                enabled: false,
                ..MirrorSettings::default()
            },
        };
        let disk = Model::new(Epoch(u64::from(u32::from(name))));
        Self {
            relay: Relay::new(settings, &disk.opening(), now_at(Duration::ZERO)),
            disk: keeps.then_some(disk),
            flying: VecDeque::new(),
            free_at: Mono::default(),
            bytes: 0,
            read: Vec::new(),
            confirmed: BTreeMap::new(),
        }
    }

    fn handle(&mut self, input: Input, now: Now) {
        self.relay.handle(input, now);
        while let Some(output) = self.relay.poll_output() {
            match output {
                Output::Commit(batch) => {
                    let number = batch.number;
                    let levels = match &mut self.disk {
                        Some(disk) => {
                            disk.apply(batch);
                            disk.commit(number);
                            disk.opening().levels
                        }
                        None => Default::default(),
                    };
                    self.relay.handle(Input::Committed { batch: number, levels }, now);
                }
                Output::ReadSpool {
                    from,
                    entries_max,
                    bytes_max,
                } => {
                    if let Some(disk) = &self.disk {
                        let (slots, end) = disk.read_spool(from, entries_max, bytes_max);
                        self.relay.handle(Input::SpoolRead { slots, end }, now);
                    }
                }
                Output::ReadInbox {
                    from,
                    entries_max,
                    bytes_max,
                } => {
                    if let Some(disk) = &self.disk {
                        let (slots, end) = disk.read_inbox(from, entries_max, bytes_max);
                        self.relay.handle(Input::InboxRead { slots, end }, now);
                    }
                }
                Output::OpenLane { lane, life } => {
                    let up = Input::LaneUp {
                        lane,
                        life,
                        acks: false,
                        stanza_bytes_max: None,
                    };
                    self.relay.handle(up, now);
                }
                Output::WriteLane {
                    lane, life, stanzas, ..
                } => {
                    let confirmed = self.confirmed.entry(lane.clone()).or_default();
                    *confirmed += stanzas.len() as u64;
                    let stanzas_so_far = *confirmed;
                    self.read.extend(stanzas.into_iter().map(|bytes| (now.mono, bytes)));
                    let confirmed = Input::LaneConfirmed {
                        lane,
                        life,
                        stanzas: stanzas_so_far,
                    };
                    self.relay.handle(confirmed, now);
                }
                Output::Accepted { .. } | Output::LinkQuiet(_) => {}
                Output::CloseLink(why) => panic!("{why:?}"),
            }
        }
    }

    fn transmit(&mut self, now: Now) {
        // The next batch is made when the one before has left.
        while self.free_at <= now.mono && self.relay.wants_transmit() {
            let Some(bytes) = self.relay.poll_transmit(now) else {
                break;
            };
            let takes = wire_time(bytes.len() as u64);
            let left = now.mono.max(self.free_at) + takes;
            self.free_at = left;
            self.bytes += (takes.as_secs_f64() * BYTES_A_SECOND as f64) as u64;
            self.flying.push_back((left + ONE_WAY, bytes));
        }
        self.handle(Input::Timeout, now);
    }
}

/// What is said at one moment: the copies.
type Said = (Duration, Vec<String>);

fn to_occupants(stanza: impl Fn(usize) -> String) -> Vec<String> {
    (0..FAR_OCCUPANTS).map(stanza).collect()
}

/// Words of the length that people use, no two alike.
fn words(n: u64) -> String {
    (0..8)
        .map(|k| format!("{:x} ", (n * 8 + k + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 44))
        .collect()
}

fn line(room: &str, n: u64) -> Vec<String> {
    to_occupants(|k| {
        format!(
            "<message from='{room}@rooms.a.example/n{}' to='u{k}@b.example/r' type='groupchat' id='{room}-{n}'><body>{}</body></message>",
            n % 7,
            words(n)
        )
    })
}

fn status(n: u64) -> Vec<String> {
    let occupant = n % 20;
    to_occupants(|k| {
        format!(
            "<presence from='talk@rooms.a.example/o{occupant}' to='u{k}@b.example/r' id='p{n}'><show>{}</show><status>{}</status>\
             <x xmlns='http://jabber.org/protocol/muc#user'><item affiliation='member' role='participant'/></x></presence>",
            if n.is_multiple_of(2) { "away" } else { "dnd" },
            words(n)
        )
    })
}

fn load(load: Load, start: Duration) -> Vec<Said> {
    let at = |ms: u64| start + Duration::from_millis(ms);
    match load {
        Load::Idle => Vec::new(),
        Load::Large => {
            let data: String = (0..1600).map(words).collect();
            let large = |n: u64| {
                format!("<iq type='result' id='v{n}' from='a{n}@a.example' to='u1@b.example/r'><vCard xmlns='vcard-temp'><PHOTO>{}</PHOTO></vCard></iq>", &data[..100_000.min(data.len())])
            };
            (0..3).map(|n| (at(n * 100_000), vec![large(n)])).collect()
        }
        Load::Presences => (0..1000).map(|n| (at(n * 300), status(n))).collect(),
        Load::Page => (0..4)
            .map(|page: u64| {
                let mut said: Vec<String> = (0..200)
                    .map(|n| {
                        let n = page * 200 + n;
                        format!(
                            "<message from='talk@rooms.a.example' to='u1@b.example/r'><result xmlns='urn:xmpp:mam:2' queryid='q' id='{n}'><forwarded xmlns='urn:xmpp:forward:0'>\
                             <delay xmlns='urn:xmpp:delay' stamp='2026-11-20T10:{:02}:{:02}Z'/><message xmlns='jabber:client' from='talk@rooms.a.example/n{}' type='groupchat' id='old-{n}'>\
                             <body>{}</body></message></forwarded></result></message>",
                            n / 60 % 60,
                            n % 60,
                            n % 7,
                            words(n + 10_000)
                        )
                    })
                    .collect();
                said.push(format!("<iq type='result' id='q{page}' from='talk@rooms.a.example' to='u1@b.example/r'><fin xmlns='urn:xmpp:mam:2'/></iq>"));
                (at(page * 75_000), said)
            })
            .collect(),
        // Another room has talked for ten minutes, while there was no link.
        Load::Backlog => (0..300).map(|n| (Duration::from_secs(1) + Duration::from_secs(2 * n), line("other", n))).collect(),
    }
}

/// The lines' delivery times, and the bytes sent.
fn pair(what: &[Said], link_up: Duration, until: Duration) -> (BTreeMap<u64, Duration>, u64, Duration) {
    let (mut a, mut b) = (End::new('a', 'b', true), End::new('b', 'a', true));
    let mut said = what.iter().peekable();
    let mut times = BTreeMap::new();
    let mut started = BTreeMap::<u64, Duration>::new();
    let (mut n, mut up, mut looked, mut last) = (0, false, 0, Duration::ZERO);
    let mut time = Duration::ZERO;
    while time < until {
        let now = now_at(time);
        if !up && time >= link_up {
            up = true;
            a.handle(Input::LinkUp, now);
            b.handle(Input::LinkUp, now);
        }
        while let Some((_, copies)) = said.next_if(|(at, _)| *at <= time) {
            for copy in copies {
                let stanza = Stanza::parse(Bytes::from(copy.clone())).expect("a stanza");
                if let Some(id) = stanza.id()
                    && let Some(number) = id.strip_prefix("talk-")
                {
                    started.entry(number.parse().expect("a number")).or_insert(time);
                }
                let domain = |address: Option<std::borrow::Cow<'_, str>>| {
                    Domain::new(domain_of(&address.expect("an address"))).expect("a domain")
                };
                let pair = DomainPair {
                    local: domain(stanza.from()),
                    far: domain(stanza.to()),
                };
                n += 1;
                a.handle(
                    Input::Stanza {
                        leg: LegId(1),
                        n,
                        pair,
                        stanza,
                    },
                    now,
                );
            }
        }
        exchange(&mut a, &mut b, now);
        exchange(&mut b, &mut a, now);
        while looked < b.read.len() {
            let (_, bytes) = &b.read[looked];
            looked += 1;
            last = time;
            let stanza = Stanza::parse(bytes.clone()).expect("a stanza");
            if let Some(number) = stanza.id().and_then(|id| id.strip_prefix("talk-").map(str::to_owned)) {
                let number: u64 = number.parse().expect("a number");
                times.entry(number).or_insert(time - started[&number]);
            }
        }
        time += Duration::from_millis(10);
    }
    (times, a.bytes, last)
}

fn exchange(from: &mut End, to: &mut End, now: Now) {
    from.transmit(now);
    while from.flying.front().is_some_and(|(at, _)| *at <= now.mono)
        && let Some((_, bytes)) = from.flying.pop_front()
    {
        to.handle(Input::LinkBytes(bytes), now);
    }
}

/// The same through a stream: every copy in its turn.
fn plain(what: &[Said], link_up: Duration) -> (BTreeMap<u64, Duration>, u64, Duration) {
    let (mut free, mut times, mut bytes) = (link_up, BTreeMap::new(), 0);
    for (at, copies) in what {
        for copy in copies {
            free = free.max(*at) + wire_time(copy.len() as u64);
            bytes += (wire_time(copy.len() as u64).as_secs_f64() * BYTES_A_SECOND as f64) as u64;
            if let Some(number) = copy.split("id='talk-").nth(1).and_then(|rest| rest.split('\'').next()) {
                times
                    .entry(number.parse().expect("a number"))
                    .or_insert(free + ONE_WAY - *at);
            }
        }
    }
    (times, bytes, free)
}

fn percentile(times: &BTreeMap<u64, Duration>, of: f64) -> f64 {
    let mut all: Vec<Duration> = times.values().copied().collect();
    all.sort_unstable();
    let index = ((all.len() as f64 - 1.0) * of).round() as usize;
    all.get(index).map_or(f64::NAN, Duration::as_secs_f64)
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS"))
        .unwrap_or_default();
    line.split_whitespace()
        .nth(1)
        .and_then(|number| number.parse().ok())
        .unwrap_or_default()
}

fn memory() {
    for entries in [100_000, 1_000_000_u64] {
        let before = resident_kib();
        let mut end = End::new('a', 'b', false);
        for number in 0..entries {
            let now = now_at(Duration::from_millis(number * 10));
            let text = &line("other", number)[0];
            let stanza = Stanza::parse(Bytes::from(text.clone())).expect("a stanza");
            let domain = |text: &str| Domain::new(text).expect("a domain");
            let pair = DomainPair {
                local: domain("rooms.a.example"),
                far: domain("b.example"),
            };
            end.handle(
                Input::Stanza {
                    leg: LegId(1),
                    n: number + 1,
                    pair,
                    stanza,
                },
                now,
            );
            end.handle(Input::Timeout, now);
        }
        println!(
            "{entries} entries wait: resident memory grew by {:.1} MiB",
            (resident_kib() - before) as f64 / 1024.0
        );
    }
}

/// What an outage leaves: a thousand lines, and five thousand presences of which only the last of each occupant counts.
fn drain() {
    let lines: Vec<Said> = (0..1000)
        .map(|n| (Duration::from_millis(1000 + n * 100), line("talk", n)))
        .collect();
    let mut both = lines.clone();
    both.extend((0..5000).map(|n| (Duration::from_millis(1000 + n * 20), status(n))));
    both.sort_by_key(|(at, _)| *at);
    let up = Duration::from_secs(120);
    for (name, what) in [("1,000 lines", &lines), ("1,000 lines and 5,000 presences", &both)] {
        let (_, bytes, last) = pair(what, up, up + Duration::from_secs(400));
        let (_, plain_bytes, plain_last) = plain(what, up);
        println!(
            "{name}: drained in {:.1} s, {bytes} B; plain S2S {:.0} s, {plain_bytes} B",
            (last - up).as_secs_f64(),
            (plain_last - up).as_secs_f64()
        );
    }
}

fn main() {
    // First, while nothing else has taken memory and given it back.
    memory();
    println!("| meanwhile | lines | p50 | p95 | plain S2S p50 | p95 |\n| --- | --- | --- | --- | --- | --- |");
    for what in [Load::Idle, Load::Large, Load::Presences, Load::Page, Load::Backlog] {
        let up = if what == Load::Backlog {
            Duration::from_secs(602)
        } else {
            Duration::ZERO
        };
        let start = up + Duration::from_secs(20);
        let mut said = load(what, start);
        said.extend((0..LINES).map(|n| {
            (
                start + LINE_EVERY * n as u32 + Duration::from_millis(n * 37),
                line("talk", n),
            )
        }));
        // Those who are there have been seen before.
        if what == Load::Presences {
            said.extend((0..20).map(|n| (Duration::from_secs(1), status(n))));
        }
        said.sort_by_key(|(at, _)| *at);
        let (times, _, _) = pair(&said, up, start + LINE_EVERY * (LINES as u32 + 12));
        let (plainly, _, _) = plain(&said, up);
        println!(
            "| {what:?} | {} | {:.2} s | {:.2} s | {:.2} s | {:.2} s |",
            times.len(),
            percentile(&times, 0.5),
            percentile(&times, 0.95),
            percentile(&plainly, 0.5),
            percentile(&plainly, 0.95)
        );
    }
    drain();
}
