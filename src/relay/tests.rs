//! What needs a certain moment that chance rarely brings about. The rest is in `tests/sim`.

use super::*;
use crate::{
    queue::{
        journal::Model,
        rules::{Action, Conditions, Pattern, Payload, Placement},
    },
    time::{Mono, Wall},
};

fn at(ms: u64) -> Now {
    Now {
        mono: Mono::from_start(Duration::from_millis(ms)),
        wall: Wall(ms),
    }
}

fn domain(name: &str) -> Domain {
    Domain::new(name).unwrap()
}

fn copy(user: u32, body: &str) -> Stanza {
    let text = format!(
        "<message from='r@c.a.example/n' to='u{user}@b.example/r' type='groupchat'><body>{body}</body></message>"
    );
    Stanza::parse(Bytes::from(text)).unwrap()
}

/// Outward beside a disk that finishes at once.
struct Half {
    outward: Outward,
    disk: Model,
    batch: u64,
    stats: RelayStats,
}

impl Half {
    fn new(memory_bytes: usize) -> Self {
        Self {
            outward: Outward::new(
                &Opening::default(),
                Duration::from_millis(50),
                memory_bytes,
                Classes::default(),
                at(0),
            ),
            disk: Model::new(Epoch(1)),
            batch: 1,
            stats: RelayStats::default(),
        }
    }

    fn say(&mut self, user: u32, body: &str, now: u64) {
        self.outward
            .handle_stanza(
                &copy(user, body),
                &Rules::default(),
                self.batch,
                at(now),
                &mut self.stats,
            )
            .unwrap();
        self.write(now);
    }

    fn tell(&mut self, text: &str, now: u64) {
        let stanza = Stanza::parse(Bytes::copy_from_slice(text.as_bytes())).unwrap();
        self.outward
            .handle_stanza(&stanza, &Rules::default(), self.batch, at(now), &mut self.stats)
            .unwrap();
        self.outward.handle_timeout(self.batch, at(now + 50), &mut self.stats);
        self.outward.settle(self.batch, at(now + 50), &mut self.stats);
        self.write(now + 50);
    }

    /// Gives what there is to the disk, and gives the reads that were asked for.
    fn write(&mut self, now: u64) -> Vec<(Seq, usize)> {
        self.outward.flush(self.batch, at(now), &mut self.stats);
        let (mut changes, mut reads) = (Vec::new(), Vec::new());
        while let Some(output) = self.outward.poll_output() {
            match output {
                outward::Output::Change(change) => changes.push(change),
                outward::Output::Read { from, bytes_max, .. } => reads.push((from, bytes_max)),
            }
        }
        self.disk.apply(Batch {
            number: self.batch,
            changes,
        });
        self.disk.commit(self.batch);
        self.batch += 1;
        reads
    }

    fn read(&mut self, from: u64, entries_max: usize, now: u64) {
        let (slots, end) = self.disk.read_spool(Seq(from), entries_max, usize::MAX);
        self.outward
            .handle_read(slots, end, &Rules::default(), at(now), &mut self.stats);
    }

    /// What crosses: numbers, and to how many. Void is to nobody.
    fn cross(&mut self) -> Vec<(u64, usize)> {
        let mut crossed = Vec::new();
        while self.outward.offer(self.batch, |offer| match offer {
            Offer::Whole { seq, entry, .. } => {
                let recipients = match entry {
                    Entry::Cast(cast) => cast.recipients.len(),
                    Entry::Void => 0,
                };
                crossed.push((seq.0, recipients));
                Answer::Takes(1)
            }
            Offer::Part { .. } => Answer::Blocked,
        }) {}
        crossed
    }
}

/// A group that still grows is never taken from the disk as if it were whole, also when there is no room for it in memory.
///
/// With memory for one entry, read a closed one and the open one after it; then let the open one grow.
#[test]
fn an_open_group_is_not_taken_from_the_disk() {
    let mut half = Half::new(1);
    half.say(1, "closed", 0);
    half.say(2, "closed", 0);
    half.outward.handle_timeout(1, at(50), &mut half.stats);
    half.say(1, "open", 60);
    half.outward.link_up(&Received::default());
    half.outward.advance();
    assert_eq!(half.write(60), [(Seq(1), 0)]);
    half.read(1, 9, 60);
    assert_eq!(half.cross(), [(1, 2)]);
    half.say(2, "open", 70);
    assert_eq!(half.cross(), [(2, 2)]);
}

/// What the peer has beyond a gap is not looked for on the disk, where it is no more: neither between other slots nor at the end.
#[test]
fn what_the_peer_has_is_not_read_again() {
    let mut half = Half::new(1 << 20);
    for n in 1..=4 {
        half.say(1, &n.to_string(), 0);
    }
    half.outward.handle_timeout(1, at(50), &mut half.stats);
    half.write(50);
    half.outward.link_up(&Received {
        beyond: vec![Seq(2), Seq(4)],
        ..Received::default()
    });
    half.outward.advance();
    let reads = half.write(60);
    assert_eq!(reads.len(), 1);
    half.read(1, 9, 60);
    half.outward.advance();
    assert_eq!(half.write(60), []);
    assert_eq!(half.cross(), [(1, 1), (3, 1)]);
}

/// A peer whose disk is new has not what the old one had acknowledged beyond a gap, and our disk has it no more. Voids take those places,
/// also the last, so that the peer can count on.
#[test]
fn a_gap_that_nobody_can_fill_is_filled_with_voids() {
    let mut half = Half::new(1 << 20);
    for n in 1..=4 {
        half.say(1, &n.to_string(), 0);
    }
    half.outward.handle_timeout(1, at(50), &mut half.stats);
    let had = Received {
        beyond: vec![Seq(2), Seq(4)],
        ..Received::default()
    };
    half.outward.link_up(&had);
    half.write(50);
    half.outward.link_down();
    half.outward.link_up(&Received::default());
    half.outward.advance();
    assert_eq!(half.write(60).len(), 1);
    half.read(1, 9, 60);
    half.outward.advance();
    assert_eq!(half.write(60), []);
    let mut crossed = half.cross();
    crossed.sort_unstable();
    assert_eq!(crossed, [(1, 1), (2, 0), (3, 1), (4, 0)]);
}

/// Who comes and goes while nobody can see it is not shown. Of whom the peer may have seen come, it sees the leave: what was given to a
/// connection that has ended is in doubt until the peer says what it has.
#[test]
fn a_visit_is_left_out_unless_it_may_have_been_seen() {
    let stanza = |nick: &str, stanza_type: &str, x: &str| {
        format!(
            "<presence from='r@c.a.example/{nick}' to='u1@b.example/r'{stanza_type}><x xmlns='http://jabber.org/protocol/muc#user'>{x}</x></presence>"
        )
    };
    let (own, gone) = ("<status code='110'/>", " type='unavailable'");
    let join =
        "<presence from='u1@b.example/r' to='r@c.a.example/u1'><x xmlns='http://jabber.org/protocol/muc'/></presence>";
    for is_given in [false, true] {
        let mut half = Half::new(1 << 20);
        half.outward
            .handle_join(&Stanza::parse(Bytes::from_static(join.as_bytes())).unwrap());
        half.tell(&stanza("u1", "", own), 0);
        half.tell(&stanza("x", "", "<item role='participant'/>"), 1000);
        if is_given {
            half.outward.greet();
            assert_eq!(half.cross(), [(1, 1), (2, 1)]);
            half.outward.link_down();
            half.outward.advance();
            half.write(2000);
            half.read(1, 9, 2000);
        }
        half.tell(&stanza("x", gone, "<item role='none'/>"), 9000);
        half.outward.link_up(&Received::default());
        half.outward.advance();
        half.write(10_000);
        half.read(1, 9, 10_000);
        let mut crossed = half.cross();
        crossed.sort_unstable();
        let recipients = usize::from(is_given);
        assert_eq!(crossed, [(1, 1), (2, recipients), (3, recipients)]);
        // What was left out is counted as the disk has it, and what crossed as it was stored.
        let (slots, _) = half.disk.read_spool(Seq(1), 9, usize::MAX);
        let bytes: Vec<u64> = slots.iter().map(|slot| slot.entry.len() as u64).collect();
        let stored: u64 = bytes.iter().sum();
        assert_eq!(half.stats.entry_bytes - half.stats.superseded_bytes, stored);
        assert_eq!(half.stats.superseded_bytes > 0, !is_given);
        let twice = if is_given { bytes[0] + bytes[1] } else { 0 };
        assert_eq!(half.outward.crossed_bytes().iter().sum::<u64>(), stored + twice);
        let voids = half.outward.crossed_bytes()[Class::Control as usize];
        assert_eq!(voids, if is_given { 0 } else { bytes[1] + bytes[2] });
    }
}

/// A word from our server opens the lane that its answer will take, before there is one, and once.
#[test]
fn what_will_be_answered_opens_the_lane() {
    let (local, far) = (Domain::new("b.example").unwrap(), Domain::new("a.example").unwrap());
    let pair = DomainPair {
        local: local.clone(),
        far: far.clone(),
    };
    let mut inward = Inward::new(vec![local], vec![far], 3, Duration::from_secs(15), 1 << 20, Seq(0));
    let mut stats = RelayStats::default();
    let mut opened = |inward: &mut Inward, ms| {
        inward.advance(at(ms), &mut stats);
        inward.poll_output()
    };
    inward.expect(pair.clone(), "b1@b.example/r");
    let Some(inward::Output::OpenLane { lane, life }) = opened(&mut inward, 0) else {
        panic!("no lane is opened");
    };
    assert_eq!(lane.pair, pair);
    inward.expect(pair, "b1@b.example/other");
    assert_eq!(opened(&mut inward, 0), None);
    // A server that is away is not asked again and again.
    inward.handle_lane_down(&lane, life, LaneFault::Gone, at(0), &mut RelayStats::default());
    assert_eq!(opened(&mut inward, 100_000), None);
    assert_eq!(inward.poll_timeout(), None);
}

/// A lane on which it depends when a server is back is opened until the server is; after that it may end as any other.
#[test]
fn a_held_lane_is_opened_until_the_server_is_back() {
    let (local, far) = (Domain::new("b.example").unwrap(), Domain::new("a.example").unwrap());
    let pair = DomainPair {
        local: local.clone(),
        far: far.clone(),
    };
    let mut inward = Inward::new(vec![local], vec![far], 1, Duration::from_secs(15), 1 << 20, Seq(0));
    let mut stats = RelayStats::default();
    inward.expect(pair, "b1@b.example/r");
    inward.advance(at(0), &mut stats);
    let Some(inward::Output::OpenLane { lane, life }) = inward.poll_output() else {
        panic!("no lane is opened");
    };
    inward.handle_lane_up(&lane, life, false, None);
    inward.handle_lane_down(&lane, life, LaneFault::Gone, at(0), &mut stats);
    inward.hold(&lane);
    let mut now = 0;
    for life in 2..12 {
        inward.advance(at(now), &mut stats);
        let again = inward::Output::OpenLane {
            lane: lane.clone(),
            life,
        };
        assert_eq!(inward.poll_output(), Some(again));
        inward.handle_lane_down(&lane, life, LaneFault::Gone, at(now), &mut stats);
        inward.advance(at(now), &mut stats);
        assert_eq!(inward.poll_output(), None);
        now = inward.poll_timeout().unwrap().at.since_start().as_millis() as u64;
    }
    inward.advance(at(now), &mut stats);
    assert!(inward.poll_output().is_some());
    inward.handle_lane_up(&lane, 12, false, None);
    inward.handle_lane_down(&lane, 12, LaneFault::Gone, at(now), &mut stats);
    inward.advance(at(now + 100_000), &mut stats);
    assert_eq!((inward.poll_output(), inward.poll_timeout()), (None, None));
}

/// When the process after the one that began with [`at`] is asked, on a clock of its own, with the calendar at this.
fn restarted(wall_ms: u64) -> Now {
    Now {
        mono: Mono::from_start(Duration::from_secs(3600)),
        wall: Wall(wall_ms),
    }
}

/// What is left on the disk as another process sees it, and how many seconds each entry has waited when it crosses.
fn held_after_restart(disk: &Model, noted: bool, now: Now) -> (Outward, Vec<u64>) {
    let mut opening = disk.opening();
    let (mut slots, end) = disk.read_spool(Seq(0), 9, usize::MAX);
    if !noted {
        opening.spool_since = None;
        slots.iter_mut().for_each(|slot| slot.accepted = None);
    }
    let mut outward = Outward::new(&opening, Duration::from_millis(50), 1 << 20, Classes::default(), now);
    outward.link_up(&Received::default());
    outward.advance();
    outward.handle_read(slots, end, &Rules::default(), now, &mut RelayStats::default());
    let mut held = Vec::new();
    while outward.offer(0, |offer| match offer {
        Offer::Whole { accepted, .. } => {
            held.push(now.mono.since(accepted).as_secs());
            Answer::Takes(0)
        }
        Offer::Part { .. } => Answer::Blocked,
    }) {}
    (outward, held)
}

/// What waits since an earlier process is as old as it is: its slot tells when its first copy came.
///
/// Let the second of three grow after it was written, and go on in another process a minute later, or with a calendar that was put
/// back, or from a store that did not note it.
#[test]
fn what_an_earlier_process_accepted_is_as_old_as_it_is() {
    let mut half = Half::new(1 << 20);
    half.say(1, "one", 0);
    half.say(1, "two", 9_990);
    half.say(2, "two", 10_030);
    half.say(1, "three", 20_000);

    let minute = restarted(60_000);
    let (mut outward, held) = held_after_restart(&half.disk, true, minute);
    assert_eq!(held, [60, 50, 40]);
    for (upto, oldest) in [(0, 60_000), (1, 50_010), (2, 40_000), (3, 0)] {
        outward.handle_acked(&Received {
            upto: Seq(upto),
            ..Received::default()
        });
        assert_eq!(outward.oldest(minute), Duration::from_millis(oldest));
    }
    let took = outward.take_delivered(minute);
    assert_eq!(took, [60_000, 50_010, 40_000].map(Duration::from_millis));

    assert_eq!(held_after_restart(&half.disk, true, restarted(5_000)).1, [5, 0, 0]);
    assert_eq!(held_after_restart(&half.disk, false, minute).1, [0, 0, 0]);
}

/// Of what came within one second the rest is as old as its first, also when that has crossed.
#[test]
fn the_rest_of_a_second_is_as_old_as_its_first() {
    let mut half = Half::new(1 << 20);
    half.say(1, "one", 5_000);
    half.say(1, "two", 5_100);
    half.outward.handle_acked(&Received {
        upto: Seq(1),
        ..Received::default()
    });
    assert_eq!(half.outward.oldest(at(65_000)), Duration::from_secs(60));
}

/// A process that drains opens no lane any more, so a lane's retry does not wake it, again and again.
#[test]
fn a_draining_process_waits_for_no_lane() {
    let (local, far) = (Domain::new("b.example").unwrap(), Domain::new("a.example").unwrap());
    let mut inward = Inward::new(
        vec![local.clone()],
        vec![far.clone()],
        1,
        Duration::from_secs(15),
        1 << 20,
        Seq(0),
    );
    let mut stats = RelayStats::default();
    inward.send_own(DomainPair { local, far }, Bytes::from_static(b"<iq/>"), &mut stats);
    inward.advance(at(0), &mut stats);
    let Some(inward::Output::OpenLane { lane, life }) = inward.poll_output() else {
        panic!("no lane is opened");
    };
    inward.handle_lane_down(&lane, life, LaneFault::Gone, at(0), &mut stats);
    assert!(inward.poll_timeout().is_some());
    inward.stop();
    assert_eq!(inward.poll_timeout(), None);
}

/// A server whose lane dies is not in doubt about an answer of ours: only what crossed is counted.
#[test]
fn answers_of_our_own_are_never_in_doubt() {
    let (local, far) = (Domain::new("b.example").unwrap(), Domain::new("a.example").unwrap());
    let pair = DomainPair { local, far };
    let (mut inward, mut stats) = (
        Inward::new(
            vec![pair.local.clone()],
            vec![pair.far.clone()],
            1,
            Duration::from_secs(15),
            1 << 20,
            Seq(0),
        ),
        RelayStats::default(),
    );
    let template = Bytes::from("<message from='u@a.example/r'/>");
    let cast = Cast {
        to_at: "<message from='u@a.example/r'".len() as u32,
        template,
        recipients: vec![" to='v@b.example/r'".into()],
    };
    inward.put(&pair, cast, None);
    inward.send_own(pair.clone(), Bytes::from_static(b"<iq/>"), &mut stats);
    inward.advance(at(0), &mut stats);
    let lane = LaneKey { pair, lane: 0 };
    inward.handle_lane_up(&lane, 1, false, None);
    inward.advance(at(0), &mut stats);
    assert_eq!(inward.lanes_up(), (1, 2));
    inward.handle_lane_down(&lane, 1, LaneFault::Gone, at(0), &mut stats);
    assert_eq!(stats.in_doubt, 1);
}

/// A relay with a disk that finishes at once, and a server that takes everything: what it is given to read.
struct Whole {
    relay: Relay,
    disk: Model,
    read: Vec<Bytes>,
}

impl Whole {
    fn new(settings: Settings) -> Self {
        let disk = Model::new(Epoch(1));
        Self {
            relay: Relay::new(settings, &disk.opening(), at(0)),
            disk,
            read: Vec::new(),
        }
    }

    fn handle(&mut self, input: Input) {
        self.relay.handle(input, at(0));
        self.finish();
    }

    fn finish(&mut self) {
        while let Some(output) = self.relay.poll_output() {
            match output {
                Output::Commit(batch) => {
                    let number = batch.number;
                    self.disk.apply(batch);
                    self.disk.commit(number);
                    let levels = self.disk.opening().levels;
                    self.handle(Input::Committed { batch: number, levels });
                }
                Output::OpenLane { lane, life } => self.handle(Input::LaneUp {
                    lane,
                    life,
                    acks: false,
                    stanza_bytes_max: None,
                }),
                Output::WriteLane { stanzas, .. } => self.read.extend(stanzas),
                Output::ReadSpool {
                    from,
                    entries_max,
                    bytes_max,
                } => {
                    let (slots, end) = self.disk.read_spool(from, entries_max, bytes_max);
                    self.handle(Input::SpoolRead { slots, end });
                }
                Output::ReadInbox { .. } | Output::Accepted { .. } | Output::LinkQuiet(_) | Output::CloseLink(_) => {}
            }
        }
    }
}

fn settings() -> Settings {
    Settings {
        local: vec![Domain::new("a.example").unwrap()],
        far: vec![Domain::new("b.example").unwrap()],
        collapse_window: Duration::ZERO,
        queue_bytes_max: 1 << 30,
        queue_entries_max: 1 << 30,
        classes: Classes::default(),
        rules: Vec::new(),
        lanes_per_pair: 1,
        lane_retry_max: Duration::from_secs(15),
        memory_bytes: 1 << 20,
        batch_bytes: 4096,
        compress: false,
        site: None,
        session: SessionConfig::default(),
        mirror: MirrorSettings::default(),
    }
}

/// A peer that takes smaller entries than ours may be, as another version may: the sender of what is too large is told once, a room
/// never is, and the rest crosses.
#[test]
fn who_sends_more_than_the_peer_takes_is_told() {
    let disk = Model::new(Epoch(1));
    let settings = settings();
    let mut whole = Whole {
        relay: Relay::new(settings.clone(), &disk.opening(), at(0)),
        disk,
        read: Vec::new(),
    };
    let pair = DomainPair {
        local: settings.local[0].clone(),
        far: settings.far[0].clone(),
    };
    let large = "x".repeat(1000);
    for (n, (from, stanza_type, body)) in [
        ("u@a.example/r", "chat", large.as_str()),
        ("room@a.example/n", "groupchat", &large),
        ("u@a.example/r", "chat", "small"),
    ]
    .into_iter()
    .enumerate()
    {
        let text = format!(
            "<message id='{n}' type='{stanza_type}' from='{from}' to='v@b.example/r'><body>{body}</body></message>"
        );
        whole.handle(Input::Stanza {
            leg: LegId(1),
            n: n as u64 + 1,
            pair: pair.clone(),
            stanza: Stanza::parse(text.into()).unwrap(),
        });
    }
    let hello = Hello {
        version: frame::VERSION,
        capabilities: 0,
        epoch: Epoch(2),
        received: Received::default(),
        first_unacked: Seq(1),
        last: Seq(0),
        site: None,
        dictionary: compress::NO_COMPRESSION,
        entry_bytes_max: 500,
        ack_delay_ms: 0,
    };
    let mut peer = LinkSession::new(SessionConfig::default(), hello, at(0));
    whole.handle(Input::LinkUp);
    let mut crossed = Vec::new();
    for _ in 0..4 {
        while let Some(bytes) = peer.poll_transmit(at(0)) {
            whole.handle(Input::LinkBytes(bytes));
        }
        while let Some(bytes) = whole.relay.poll_transmit(at(0)) {
            whole.finish();
            peer.handle(session::Input::Bytes(bytes), at(0)).unwrap();
        }
        while let Some(output) = peer.poll_output() {
            if let session::Output::Received { seq, entry, .. } = output {
                crossed.push((seq.0, Entry::decode(&entry).unwrap() == Entry::Void));
            }
        }
    }
    crossed.sort_unstable();
    assert_eq!(crossed, [(1, true), (2, true), (3, false)]);
    assert_eq!(whole.relay.stats().dropped_total(Drop::OverPeerLimit), 2);
    let told: Vec<Stanza> = whole
        .read
        .iter()
        .map(|bytes| Stanza::parse(bytes.clone()).unwrap())
        .collect();
    assert_eq!(told.len(), 1);
    assert!(told[0].is_error() && told[0].id().as_deref() == Some("0"), "{told:?}");
}

/// A rule about the recipients of a cast concerns the copies that match it and no other: they are dropped, cut down, and the rest crosses as it
/// came. Its sender is told, if it is a user.
#[test]
fn rules_judge_each_copy_by_itself() {
    let drops = |name: &str, to: &str| Rule {
        name: name.into(),
        direction: Direction::Sent,
        when: Conditions {
            to: Some(Pattern::new(to)),
            ..Conditions::default()
        },
        then: Action::Drop,
        observe: false,
    };
    let disk = Model::new(Epoch(1));
    let settings = Settings {
        collapse_window: Duration::from_millis(50),
        rules: vec![
            drops("silent", "u1@b.example"),
            Rule {
                then: Action::Strip(vec![Payload {
                    namespace: "urn:x".to_owned(),
                    name: None,
                }]),
                ..drops("smaller", "u2@b.example")
            },
        ],
        ..settings()
    };
    let pair = DomainPair {
        local: settings.local[0].clone(),
        far: settings.far[0].clone(),
    };
    let mut whole = Whole {
        relay: Relay::new(settings, &disk.opening(), at(0)),
        disk,
        read: Vec::new(),
    };
    let copy = |from: &str, stanza_type: &str, user: u32| {
        let text = format!(
            "<message type='{stanza_type}' from='{from}' to='u{user}@b.example/r' id='i'><body>x</body><x xmlns='urn:x'/></message>"
        );
        Stanza::parse(Bytes::from(text)).unwrap()
    };
    for (n, stanza) in (1..=4)
        .map(|user| copy("r@a.example/n", "groupchat", user))
        .chain([copy("v@a.example/r", "chat", 1)])
        .enumerate()
    {
        whole.handle(Input::Stanza {
            leg: LegId(1),
            n: n as u64 + 1,
            pair: pair.clone(),
            stanza,
        });
    }
    whole.handle(Input::Drain);
    let (slots, _) = whole.disk.read_spool(Seq(1), 9, usize::MAX);
    let crossing: Vec<Vec<Bytes>> = slots
        .iter()
        .map(|slot| match Entry::decode(&slot.entry).unwrap() {
            Entry::Cast(cast) => (0..cast.recipients.len()).map(|k| cast.copy(k).unwrap()).collect(),
            Entry::Void => Vec::new(),
        })
        .collect();
    let smaller = "<message type='groupchat' from='r@a.example/n' to='u2@b.example/r' id='i'><body>x</body></message>";
    let whole_of = |user| copy("r@a.example/n", "groupchat", user).bytes().clone();
    assert_eq!(crossing, [vec![Bytes::from(smaller)], vec![whole_of(3), whole_of(4)]]);
    let told: Vec<Stanza> = whole
        .read
        .iter()
        .map(|bytes| Stanza::parse(bytes.clone()).unwrap())
        .collect();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].is_error() && told[0].to().as_deref() == Some("v@a.example/r"));
    assert_eq!(
        (whole.relay.stats().copies_accepted, whole.relay.stats().refused),
        (5, 0)
    );
    let counted: Vec<(&str, u64)> = whole
        .relay
        .rules()
        .counts()
        .map(|(name, _, count)| (name, count.stanzas))
        .collect();
    assert_eq!(counted, [("silent", 2), ("smaller", 1)]);
}

/// What comes from the peer is judged as well, copy by copy; a question that is dropped is answered over the link.
#[test]
fn rules_judge_what_comes_from_the_peer() {
    let rule = |name: &str, to: Option<&str>, then| Rule {
        name: name.into(),
        direction: Direction::Received,
        when: Conditions {
            to: to.map(Pattern::new),
            ..Conditions::default()
        },
        then,
        observe: false,
    };
    let unwanted = vec![Payload {
        namespace: "urn:x".to_owned(),
        name: None,
    }];
    let disk = Model::new(Epoch(1));
    let settings = Settings {
        rules: vec![
            rule("none", Some("u1@a.example"), Action::Drop),
            rule("smaller", None, Action::Strip(unwanted)),
        ],
        ..settings()
    };
    let pair = DomainPair {
        local: settings.local[0].clone(),
        far: settings.far[0].clone(),
    };
    let mut relay = Relay::new(settings, &disk.opening(), at(0));
    let cast = |template: &str, users: std::ops::RangeInclusive<u32>| Cast {
        template: Bytes::copy_from_slice(template.as_bytes()),
        to_at: template.find(' ').unwrap() as u32,
        recipients: users.map(|user| format!(" to='u{user}@a.example/r'").into()).collect(),
    };
    let message =
        |inside: &str| format!("<message from='r@b.example/n' type='groupchat'><body>x</body>{inside}</message>");
    let judged = relay.judge_received(&pair, cast(&message("<x xmlns='urn:x'/>"), 1..=3), at(0));
    assert_eq!(judged, [cast(&message(""), 2..=3)]);
    let plain = cast(&message("<y xmlns='urn:y'/>"), 2..=3);
    assert_eq!(relay.judge_received(&pair, plain.clone(), at(0)), [plain]);
    assert_eq!(relay.stats().casts, 0);

    let question = "<iq type='get' from='v@b.example/r' id='q'><query xmlns='urn:q'/></iq>";
    assert_eq!(relay.judge_received(&pair, cast(question, 1..=1), at(0)), []);
    assert_eq!(relay.stats().casts, 1);
}

/// The other end of a link that comes up, and what it is told first.
fn linked(whole: &mut Whole) -> (LinkSession, Hello) {
    let hello = Hello {
        version: frame::VERSION,
        capabilities: 0,
        epoch: Epoch(2),
        received: Received::default(),
        first_unacked: Seq(1),
        last: Seq(0),
        site: None,
        dictionary: compress::dictionary_id(),
        entry_bytes_max: 1 << 20,
        ack_delay_ms: 0,
    };
    let mut peer = LinkSession::new(SessionConfig::default(), hello, at(0));
    whole.handle(Input::LinkUp);
    let bytes = whole.relay.poll_transmit(at(0)).expect("a hello");
    peer.handle(session::Input::Bytes(bytes), at(0)).unwrap();
    let heard = std::iter::from_fn(|| peer.poll_output()).find_map(|output| match output {
        session::Output::PeerHello { hello, .. } => Some(hello),
        _ => None,
    });
    (peer, heard.expect("it is said in the first batch"))
}

/// What a relay says when the link comes up.
fn hello_of(whole: &mut Whole) -> Hello {
    linked(whole).1
}

/// A dictionary is named in the hello if what crosses is to be compressed, and none if not: then the peer does not compress either.
#[test]
fn compression_is_offered_if_it_is_wanted() {
    for (compress, offered) in [(true, compress::dictionary_id()), (false, compress::NO_COMPRESSION)] {
        let mut whole = Whole::new(Settings { compress, ..settings() });
        assert_eq!(hello_of(&mut whole).dictionary, offered);
    }
}

/// Rules and limits change at once, what the ends of a link agree on with the next connection, and whose domains these are never.
#[test]
fn settings_change_while_all_goes_on() {
    let mut whole = Whole::new(settings());
    let pair = DomainPair {
        local: domain("a.example"),
        far: domain("b.example"),
    };
    let mut n = 0;
    let mut say = |whole: &mut Whole| {
        n += 1;
        let text =
            format!("<message type='chat' id='{n}' from='v@a.example/r' to='u@b.example/r'><body>x</body></message>");
        whole.handle(Input::Stanza {
            leg: LegId(1),
            n,
            pair: pair.clone(),
            stanza: Stanza::parse(Bytes::from(text)).unwrap(),
        });
        (whole.relay.stats().casts, whole.relay.stats().refused)
    };
    assert_eq!(say(&mut whole), (1, 0));
    assert_eq!(hello_of(&mut whole).ack_delay_ms, 5000);

    let mut new = settings();
    new.rules = vec![Rule {
        name: "none".into(),
        direction: Direction::Sent,
        when: Conditions::default(),
        then: Action::Drop,
        observe: false,
    }];
    whole.handle(Input::Settings(Box::new(new.clone())));
    assert_eq!(say(&mut whole), (1, 0));

    new.rules.clear();
    new.queue_entries_max = 1;
    new.session.ack_delay = Duration::from_secs(7);
    new.far = vec![domain("c.example")];
    whole.handle(Input::Settings(Box::new(new)));
    assert_eq!(say(&mut whole), (1, 1));
    assert!(whole.relay.session().is_some(), "the link was not closed");
    whole.handle(Input::LinkDown);
    assert_eq!(hello_of(&mut whole).ack_delay_ms, 7000);
    assert_eq!(whole.relay.settings.far, settings().far);
}

/// What waits too long is given up, and whoever may be told is told, once: a question after a minute, words after half a day; a room never,
/// and nobody of a chat state. The number stays, so that the peer can count on; a process that starts later knows nothing of it.
#[test]
fn what_waits_too_long_is_told_to_who_asked() {
    let mut whole = Whole::new(settings());
    let pair = DomainPair {
        local: domain("a.example"),
        far: domain("b.example"),
    };
    let state = "<composing xmlns='http://jabber.org/protocol/chatstates'/>";
    for (n, text) in [
        "<iq type='get' id='1' from='u@a.example/r' to='v@b.example/r'><q xmlns='q'/></iq>".to_owned(),
        "<message type='groupchat' id='2' from='r@a.example/n' to='v@b.example/r'><body>x</body></message>".to_owned(),
        format!("<message type='chat' id='3' from='u@a.example/r' to='v@b.example/r'>{state}</message>"),
        "<message type='chat' id='4' from='w@a.example/r' to='v@b.example/r'><body>x</body></message>".to_owned(),
    ]
    .into_iter()
    .enumerate()
    {
        whole.handle(Input::Stanza {
            leg: LegId(1),
            n: n as u64 + 1,
            pair: pair.clone(),
            stanza: Stanza::parse(text.into()).unwrap(),
        });
    }
    let pass = |whole: &mut Whole, seconds: u64| {
        whole.relay.handle(Input::Timeout, at(seconds * 1000));
        whole.finish();
        let (slots, _) = whole.disk.read_spool(Seq(1), 9, usize::MAX);
        let waits: Vec<u64> = slots
            .iter()
            .filter(|slot| Entry::decode(&slot.entry) != Ok(Entry::Void))
            .map(|slot| slot.seq.0)
            .collect();
        assert_eq!(slots.len(), 4);
        let told: Vec<String> = whole
            .read
            .drain(..)
            .map(|bytes| Stanza::parse(bytes).unwrap())
            .map(|stanza| {
                assert!(stanza.is_error());
                stanza.id().unwrap().into_owned()
            })
            .collect();
        (waits, told.join(" "))
    };
    assert_eq!(pass(&mut whole, 4), (vec![1, 2, 3, 4], String::new()));
    let age = |whole: &mut Whole, class, seconds: u64| whole.relay.oldest_of(class, at(seconds * 1000)).as_secs();
    let of = [Class::Iq, Class::Message, Class::State, Class::Bulk];
    assert_eq!(of.map(|class| age(&mut whole, class, 4)), [4, 4, 4, 0]);
    assert_eq!(pass(&mut whole, 6), (vec![1, 2, 4], String::new()));
    assert_eq!(pass(&mut whole, 61), (vec![2, 4], "1".to_owned()));
    assert_eq!(pass(&mut whole, 62), (vec![2, 4], String::new()));
    assert_eq!(of.map(|class| age(&mut whole, class, 62)), [0, 62, 0, 0]);
    assert_eq!(pass(&mut whole, 13 * 3600), (vec![], "4".to_owned()));
    assert_eq!(whole.relay.stats().expired.iter().sum::<u64>(), 4);
    // What was given up has not crossed.
    assert_eq!(whole.relay.acked_bytes(), 0);
    assert!(whole.relay.stats().expired_bytes > 400);
    assert!(
        Class::ALL
            .iter()
            .all(|class| *class == Class::Control || whole.relay.level(*class).entries == 0)
    );
}

/// Too many questions for one destination: one more is answered at once, words go on.
#[test]
fn a_full_class_refuses_the_newest() {
    let mut settings = settings();
    settings.classes[Class::Iq].entries_max = 1;
    let mut whole = Whole::new(settings);
    let pair = DomainPair {
        local: domain("a.example"),
        far: domain("b.example"),
    };
    for (n, text) in [
        "<iq type='get' id='1' from='u@a.example/r' to='v@b.example/r'><q xmlns='q'/></iq>",
        "<iq type='get' id='2' from='u@a.example/r' to='v@b.example/r'><q xmlns='q'/></iq>",
        "<message id='3' from='u@a.example/r' to='v@b.example/r'><body>x</body></message>",
    ]
    .into_iter()
    .enumerate()
    {
        whole.handle(Input::Stanza {
            leg: LegId(1),
            n: n as u64 + 1,
            pair: pair.clone(),
            stanza: Stanza::parse(text.into()).unwrap(),
        });
    }
    let told: Vec<Stanza> = whole
        .read
        .iter()
        .map(|bytes| Stanza::parse(bytes.clone()).unwrap())
        .collect();
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].id().as_deref(), Some("2"));
    assert_eq!(whole.disk.opening().levels.spool_entries, 2);
}

/// Copies of which rules say that they wait differently cross as casts of their own, each in its class, and expire each in its time.
#[test]
fn rules_place_each_copy_by_itself() {
    let mut whole = Whole::new(Settings {
        collapse_window: Duration::from_millis(50),
        rules: vec![Rule {
            name: "slow".into(),
            direction: Direction::Sent,
            when: Conditions {
                to: Some(Pattern::new("u2@b.example")),
                ..Conditions::default()
            },
            then: Action::Place(Placement {
                class: Some(Class::Bulk),
                expiry: Some(Some(Duration::from_secs(30))),
            }),
            observe: false,
        }],
        ..settings()
    });
    let pair = DomainPair {
        local: domain("a.example"),
        far: domain("b.example"),
    };
    let room = (1..=3).map(|user| copy(user, "to all"));
    let users = (1..=2).map(|user| {
        let text = format!(
            "<message type='chat' id='{user}' from='v@a.example/r' to='u{user}@b.example/r'><body>x</body></message>"
        );
        Stanza::parse(Bytes::from(text)).unwrap()
    });
    for (n, stanza) in room.chain(users).enumerate() {
        whole.handle(Input::Stanza {
            leg: LegId(1),
            n: n as u64 + 1,
            pair: pair.clone(),
            stanza,
        });
    }
    let entries = |whole: &Whole| [Class::Message, Class::Bulk].map(|class| whole.relay.level(class).entries);
    assert_eq!(entries(&whole), [2, 2]);
    for (seconds, left) in [(29, [2, 2]), (31, [2, 0])] {
        whole.relay.handle(Input::Timeout, at(seconds * 1000));
        whole.finish();
        assert_eq!(entries(&whole), left, "{seconds}");
    }
    let told: Vec<Stanza> = whole
        .read
        .iter()
        .map(|bytes| Stanza::parse(bytes.clone()).unwrap())
        .collect();
    assert_eq!(told.len(), 1, "the room is told nothing: {told:?}");
    assert!(told[0].is_error() && told[0].id().as_deref() == Some("2"));
}

/// What is set for a class is what happens to it: its share of the link, how long it waits, and how much of it.
#[test]
fn every_setting_of_a_class_is_obeyed() {
    // Odd ones are bulk.
    let message = |n: u64| {
        let text = format!(
            "<message type='chat' id='{n}' from='v{n}@a.example/r' to='u{}@b.example/r'><body>{n:0100}</body></message>",
            n % 2
        );
        Stanza::parse(Bytes::from(text)).unwrap()
    };
    let whole = |change: fn(&mut Classes)| {
        let bulk = Rule {
            name: "odd".into(),
            direction: Direction::Sent,
            when: Conditions {
                to: Some(Pattern::new("u1@b.example")),
                ..Conditions::default()
            },
            then: Action::Place(Placement {
                class: Some(Class::Bulk),
                expiry: None,
            }),
            observe: false,
        };
        let mut settings = Settings {
            rules: vec![bulk],
            ..settings()
        };
        change(&mut settings.classes);
        let pair = DomainPair {
            local: domain("a.example"),
            far: domain("b.example"),
        };
        let mut whole = Whole::new(settings);
        for n in 0..60 {
            whole.handle(Input::Stanza {
                leg: LegId(1),
                n: n + 1,
                pair: pair.clone(),
                stanza: message(n),
            });
        }
        whole
    };
    let entries = |whole: &Whole| [Class::Message, Class::Bulk].map(|class| whole.relay.level(class).entries);

    // Of the first that cross, how many are bulk.
    let share = |mut whole: Whole| {
        let (mut peer, _) = linked(&mut whole);
        while let Some(bytes) = peer.poll_transmit(at(0)) {
            whole.handle(Input::LinkBytes(bytes));
        }
        let mut crossed = Vec::new();
        while let Some(bytes) = whole.relay.poll_transmit(at(0)) {
            whole.finish();
            peer.handle(session::Input::Bytes(bytes), at(0)).unwrap();
            while let Some(output) = peer.poll_output() {
                if let session::Output::Received { seq, .. } = output {
                    crossed.push(seq.0);
                }
            }
        }
        assert_eq!(crossed.len(), 60);
        crossed.iter().take(30).filter(|seq| *seq % 2 == 0).count()
    };
    let rare = share(whole(|classes| {
        (classes[Class::Message].weight, classes[Class::Bulk].weight) = (20, 1)
    }));
    let even = share(whole(|classes| {
        (classes[Class::Message].weight, classes[Class::Bulk].weight) = (5, 5)
    }));
    let often = share(whole(|classes| {
        (classes[Class::Message].weight, classes[Class::Bulk].weight) = (1, 20)
    }));
    assert!(
        rare <= 6 && (10..=20).contains(&even) && often >= 24,
        "{rare} {even} {often}"
    );

    assert_eq!(entries(&whole(|_| {})), [30, 30]);
    assert_eq!(entries(&whole(|classes| classes[Class::Bulk].entries_max = 7)), [30, 7]);
    let few = whole(|classes| classes[Class::Bulk].bytes_max = 1000);
    assert!(entries(&few)[1] < 10, "{:?}", entries(&few));
    assert_eq!(
        few.relay.stats().class_full[Class::Bulk as usize],
        30 - entries(&few)[1]
    );
    assert!(!few.read.is_empty(), "who is refused is told");

    let mut short = whole(|classes| classes[Class::Bulk].expiry = Some(Duration::from_secs(77)));
    for (seconds, left) in [(76, [30, 30]), (78, [30, 0])] {
        short.relay.handle(Input::Timeout, at(seconds * 1000));
        short.finish();
        assert_eq!(entries(&short), left, "{seconds}");
    }
    assert_eq!(short.relay.stats().expired[Class::Bulk as usize], 30);
    assert!(!short.read.is_empty(), "whose words expire is told");
}

/// Whoever watches is told what becomes of each stanza, and why; nobody is told anything while nobody watches.
///
/// Send what is dropped by a rule, placed by one, shared, replaced and given up, and compare what is told with what was decided.
#[test]
fn what_becomes_of_a_stanza_is_told() {
    let rule = |name: &str, when, then| Rule {
        name: name.into(),
        direction: Direction::Sent,
        when,
        then,
        observe: false,
    };
    let larger = Conditions {
        larger_than: Some(500),
        ..Conditions::default()
    };
    let to_nobody = Conditions {
        to: Some(Pattern::new("nobody@b.example")),
        ..Conditions::default()
    };
    let slow = Placement {
        class: Some(Class::Bulk),
        expiry: None,
    };
    let settings = Settings {
        collapse_window: Duration::from_millis(50),
        rules: vec![
            rule("none", to_nobody, Action::Drop),
            rule("slow", larger, Action::Place(slow)),
        ],
        site: Some("shore".to_owned()),
        ..settings()
    };
    let pair = DomainPair {
        local: settings.local[0].clone(),
        far: settings.far[0].clone(),
    };
    let mut whole = Whole::new(settings);
    let mut n = 0;
    let mut say = |whole: &mut Whole, ms: u64, text: String| {
        n += 1;
        let stanza = Stanza::parse(text.into()).unwrap();
        let (leg, pair) = (LegId(1), pair.clone());
        whole.relay.handle(Input::Stanza { leg, n, pair, stanza }, at(ms));
        whole.finish();
    };
    let told = |whole: &mut Whole| -> Vec<String> {
        std::iter::from_fn(|| whole.relay.poll_trace())
            .map(|event| {
                let entry = event.entry.map(|entry| entry.to_string()).unwrap_or_default();
                let class = event.class.map_or("", Class::as_label);
                format!("{entry} {class} {}", event.decision)
            })
            .collect()
    };
    let chat = |to: &str, body: &str| {
        format!("<message from='room@a.example/n' to='{to}@b.example/r' type='groupchat'><body>{body}</body></message>")
    };
    say(&mut whole, 0, chat("u", "unwatched"));
    assert_eq!(told(&mut whole), [""; 0]);

    whole.relay.set_traced(true);
    for user in ["u", "v", "nobody"] {
        say(&mut whole, 0, chat(user, "hello"));
    }
    say(&mut whole, 0, chat("u", &"x".repeat(500)));
    for status in ["here", "there"] {
        let ms = if status == "here" { 0 } else { 5000 };
        whole.relay.handle(Input::Timeout, at(ms));
        let text = format!("<presence from='u@a.example/r' to='v@b.example'><status>{status}</status></presence>");
        say(&mut whole, ms, text);
    }
    say(
        &mut whole,
        5000,
        "<iq from='u@a.example/r' to='v@b.example/r' type='get' id='1'><query xmlns='x'/></iq>".into(),
    );
    for ms in [6000, 66_000] {
        whole.relay.handle(Input::Timeout, at(ms));
        whole.finish();
    }
    assert_eq!(
        told(&mut whole),
        [
            "shore-0001/2 message a new entry",
            "shore-0001/2 message copy 2 of the entry",
            "  the rule none drops it",
            "shore-0001/3 bulk a new entry, placed by the rule slow",
            "shore-0001/4 presence a new entry",
            "shore-0001/5 presence a new entry",
            "shore-0001/6 iq a new entry",
            "shore-0001/4 presence a later one took its place",
            "shore-0001/6 iq it waited too long",
        ]
    );
    let costs = whole.relay.rooms().top(9);
    assert_eq!((costs.len(), &*costs[0].0, costs[0].1.copies), (1, "room@a.example", 4));
}

/// What sessions have counted outlives them, whoever ended them: their owner, or the relay itself because the peer broke the protocol.
#[test]
fn counts_outlive_their_sessions() {
    let mut whole = Whole::new(settings());
    let mut before = 0;
    for broken in [false, true] {
        whole.handle(Input::LinkUp);
        let hello = whole.relay.poll_transmit(at(0)).expect("the hello goes first");
        let sent = whole.relay.session_totals().bytes_sent;
        assert_eq!(sent, before + hello.len() as u64);
        if broken {
            let nonsense = Bytes::from_static(&[0xff; 64]);
            whole.relay.handle(Input::LinkBytes(nonsense), at(0));
        } else {
            whole.relay.handle(Input::LinkDown, at(0));
        }
        assert!(whole.relay.session().is_none());
        assert_eq!(whole.relay.session_totals().bytes_sent, sent);
        before = sent;
    }
}

/// A link that has little room is given little, and still all in the end.
#[test]
fn a_batch_is_no_larger_than_there_is_room() {
    for (room, at_once) in [(1, 1), (usize::MAX, 20)] {
        let mut whole = Whole::new(settings());
        for n in 1..=20 {
            let text = format!(
                "<message type='chat' id='{n}' from='v@a.example/r' to='u@b.example/r'><body>{n:099}</body></message>"
            );
            whole.handle(Input::Stanza {
                leg: LegId(1),
                n,
                pair: DomainPair {
                    local: domain("a.example"),
                    far: domain("b.example"),
                },
                stanza: Stanza::parse(Bytes::from(text)).unwrap(),
            });
        }
        let (mut peer, _) = linked(&mut whole);
        while let Some(bytes) = peer.poll_transmit(at(0)) {
            whole.handle(Input::LinkBytes(bytes));
        }
        let (mut sent, mut most) = (whole.relay.stats().entries_sent, 0);
        while whole.relay.poll_transmit_upto(room, at(0)).is_some() {
            let all = whole.relay.stats().entries_sent;
            most = most.max(all - sent);
            sent = all;
        }
        assert!(sent >= 20);
        assert_eq!(most, at_once, "{room}");
    }
}
