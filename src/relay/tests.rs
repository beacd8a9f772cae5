//! What needs a certain moment that chance rarely brings about. The rest is in `tests/sim`.

use super::{outward::Output, *};
use crate::{
    queue::journal::Model,
    time::{Mono, Wall},
};

fn at(ms: u64) -> Now {
    Now {
        mono: Mono::from_start(Duration::from_millis(ms)),
        wall: Wall::default(),
    }
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
            outward: Outward::new(Seq(0), Seq(0), Duration::from_millis(50), memory_bytes, at(0)),
            disk: Model::new(Epoch(1)),
            batch: 1,
            stats: RelayStats::default(),
        }
    }

    fn say(&mut self, user: u32, body: &str, now: u64) {
        self.outward
            .handle_stanza(&copy(user, body), self.batch, at(now), &mut self.stats)
            .unwrap();
        self.write(now);
    }

    /// Gives what there is to the disk, and gives the reads that were asked for.
    fn write(&mut self, now: u64) -> Vec<(Seq, usize)> {
        self.outward.flush(self.batch, at(now), &mut self.stats);
        let (mut changes, mut reads) = (Vec::new(), Vec::new());
        while let Some(output) = self.outward.poll_output() {
            match output {
                Output::Change(change) => changes.push(change),
                Output::Read { from, bytes_max, .. } => reads.push((from, bytes_max)),
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
        self.outward.handle_read(slots, end, at(now), &mut self.stats);
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
                Answer::Takes(0)
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
