use proptest::prelude::*;

use super::*;
use crate::codec::{compress::dictionary_id, entry::Cast, frame::VERSION, position::Epoch};

fn at(seconds: f64) -> Now {
    Now {
        mono: Mono::from_start(Duration::from_secs_f64(seconds)),
        ..Now::default()
    }
}

fn hello(epoch: u64) -> Hello {
    Hello {
        version: VERSION,
        capabilities: 0,
        epoch: Epoch(epoch),
        received: Received::default(),
        first_unacked: Seq(1),
        last: Seq(0),
        site: Some("ship".to_owned()),
        dictionary: dictionary_id(),
        entry_bytes_max: ENTRY_BYTES_MAX as u64,
        ack_delay_ms: 5000,
    }
}

fn entry(template: &str, recipients: &[&str]) -> Entry {
    let mut recipients: Vec<Bytes> = recipients
        .iter()
        .map(|one| Bytes::from(format!(" to='{one}'")))
        .collect();
    recipients.sort();
    Entry::Cast(Cast {
        template: Bytes::copy_from_slice(template.as_bytes()),
        to_at: 8,
        recipients,
    })
}

/// One end with what its relay would keep: the outputs so far, and what it stored.
struct End {
    session: LinkSession,
    outputs: Vec<Output>,
}

impl End {
    fn new(hello: Hello) -> Self {
        Self::with(SessionConfig::default(), hello)
    }

    fn with(config: SessionConfig, hello: Hello) -> Self {
        Self {
            session: LinkSession::new(config, hello, at(0.0)),
            outputs: Vec::new(),
        }
    }

    fn handle(&mut self, input: Input, now: Now) -> Result<(), LinkError> {
        self.session.handle(input, now)?;
        while let Some(output) = self.session.poll_output() {
            self.outputs.push(output);
        }
        Ok(())
    }

    fn store_all(&mut self, now: Now) {
        let arrived = self.session.arrived().clone();
        self.handle(Input::Stored(arrived), now).unwrap();
    }

    fn received(&self) -> Vec<(Seq, Entry)> {
        let entries = self.outputs.iter().filter_map(|output| match output {
            Output::Received { seq, entry, .. } => Some((*seq, Entry::decode(entry).unwrap())),
            _ => None,
        });
        entries.collect()
    }

    fn last_acked(&self) -> Option<&Received> {
        self.outputs.iter().rev().find_map(|output| match output {
            Output::Acked(acked) => Some(acked),
            _ => None,
        })
    }
}

/// Everything that `from` has to say reaches `to` at once.
fn pass(from: &mut End, to: &mut End, now: Now) -> Result<usize, LinkError> {
    let mut bytes = 0;
    while let Some(batch) = from.session.poll_transmit(now) {
        bytes += batch.len();
        to.handle(Input::Bytes(batch), now)?;
    }
    Ok(bytes)
}

/// Two ends that know each other.
fn open_pair() -> (End, End) {
    greeted(hello(1), hello(2))
}

fn greeted(ours: Hello, theirs: Hello) -> (End, End) {
    let (mut a, mut b) = (End::new(ours), End::new(theirs));
    pass(&mut a, &mut b, at(0.0)).unwrap();
    pass(&mut b, &mut a, at(0.0)).unwrap();
    assert!(a.session.is_open() && b.session.is_open());
    (a, b)
}

/// Gives `b` frames as a peer that does not keep the rules might write them.
fn say(b: &mut End, write: impl FnOnce(&mut FrameWriter)) -> Result<(), LinkError> {
    let mut writer = FrameWriter::default();
    write(&mut writer);
    let mut wire = Vec::new();
    put_batch(&mut wire, BatchKind::Plain, &writer.take().text);
    b.handle(Input::Bytes(wire.into()), at(1.0))
}

/// An entry crosses, is acknowledged only when it is stored, and only after the delay if nothing else is said.
#[test]
fn acknowledges_what_is_stored_after_the_delay() {
    let (mut a, mut b) = open_pair();
    let sent = entry("<message/>", &["b1@b.example"]);
    assert_eq!(a.session.send(Seq(1), &sent, Duration::ZERO), Sent::Whole);
    pass(&mut a, &mut b, at(1.0)).unwrap();
    assert_eq!(b.received(), [(Seq(1), sent)]);
    assert_eq!(b.session.poll_transmit(at(7.0)), None, "not stored yet");
    b.store_all(at(7.0));
    assert!(b.session.wants_transmit(at(7.0)));
    let bytes = pass(&mut b, &mut a, at(7.0)).unwrap();
    assert!(bytes <= 8, "{bytes}");
    assert_eq!(a.last_acked().map(|acked| acked.upto), Some(Seq(1)));
    assert!(!a.session.has_unacked());
    assert_eq!(b.session.poll_transmit(at(20.0)), None, "said once");
}

/// An acknowledgement rides on what is sent anyway.
#[test]
fn ack_rides_on_an_entry() {
    let (mut a, mut b) = open_pair();
    a.session.send(Seq(1), &Entry::Void, Duration::ZERO);
    pass(&mut a, &mut b, at(1.0)).unwrap();
    b.store_all(at(1.0));
    assert_eq!(b.session.poll_transmit(at(1.0)), None);
    b.session
        .send(Seq(1), &entry("<message/>", &["a@a.example"]), Duration::ZERO);
    pass(&mut b, &mut a, at(1.1)).unwrap();
    assert_eq!(a.last_acked().map(|acked| acked.upto), Some(Seq(1)));
    assert_eq!(b.session.stats().acks_sent_alone, 0);
}

/// Where entries are rare each is acknowledged at once, but for a moment in which an answer may take it along: TCP has to
/// acknowledge it anyway. Where they are not, one acknowledgement does for all of a delay, at the moment when one has come.
#[test]
fn ack_goes_along_with_that_of_tcp() {
    let acked_at = |pause: f64| {
        let (mut a, mut b) = open_pair();
        let mut acked = Vec::new();
        for seq in 1..=12 {
            let now = at(seq as f64 * pause);
            a.session.send(Seq(seq), &Entry::Void, Duration::ZERO);
            pass(&mut a, &mut b, now).unwrap();
            b.store_all(now);
            assert_eq!(b.session.poll_transmit(now), None);
            let moment = at(seq as f64 * pause + 0.025);
            assert!(b.session.poll_timeout().is_some_and(|next| next.at >= moment.mono));
            if pass(&mut b, &mut a, moment).unwrap() > 0 {
                acked.push(seq);
            }
        }
        acked
    };
    assert_eq!(acked_at(10.0), (1..=12).collect::<Vec<_>>());
    assert_eq!(acked_at(1.0), [4, 9]);
}

/// A peer that sends much is acknowledged before the delay is over: at the 256th entry, not at the 255th.
#[test]
fn ack_does_not_wait_for_many() {
    let (mut a, mut b) = open_pair();
    for seq in 1..=256 {
        a.session.send(Seq(seq), &Entry::Void, Duration::ZERO);
        pass(&mut a, &mut b, at(1.0)).unwrap();
        b.store_all(at(1.0));
        assert_eq!(b.session.poll_transmit(at(1.0)).is_some(), seq == 256, "{seq}");
    }
}

/// What waits goes along with our hello, is there as soon as that is, and does not go again.
#[test]
fn first_entries_go_with_the_hello() {
    let (mut a, mut b) = (End::new(hello(1)), End::new(hello(2)));
    let sent = [1, 2].map(|n| (Seq(n), entry(&format!("<message>{n}</message>"), &["b1@b.example"])));
    for (seq, entry) in &sent {
        assert_eq!(a.session.send(*seq, entry, Duration::ZERO), Sent::Whole);
    }
    let first = a.session.poll_transmit(at(0.0)).unwrap();
    assert_eq!(a.session.poll_transmit(at(0.0)), None);
    b.handle(Input::Bytes(first), at(0.3)).unwrap();
    assert_eq!(b.received(), sent);
    b.store_all(at(0.3));
    pass(&mut b, &mut a, at(0.6)).unwrap();
    assert_eq!(a.session.send(Seq(1), &sent[0].1, Duration::ZERO), Sent::Known);
    assert_eq!(a.session.send(Seq(3), &sent[0].1, Duration::ZERO), Sent::Whole);
    pass(&mut a, &mut b, at(0.6)).unwrap();
    assert_eq!(b.received().last(), Some(&(Seq(3), sent[0].1.clone())));
}

/// Nothing is asked of a peer that has not greeted, also if entries have gone early: only its hello is awaited.
#[test]
fn early_entries_do_not_hasten_the_peer() {
    let mut a = End::new(hello(1));
    for seq in 1..3 {
        a.session.send(Seq(seq), &Entry::Void, Duration::ZERO);
        assert!(a.session.poll_transmit(at(0.0)).is_some());
    }
    a.handle(Input::Timeout, at(59.9)).unwrap();
    assert_eq!(a.session.poll_transmit(at(59.9)), None);
    assert_eq!(
        a.handle(Input::Timeout, at(60.0)),
        Err(LinkError::PeerSilent { for_ms: 60_000 })
    );
}

/// Early entries are few and small: up to the limit they go, the next and what is large waits for the peer's hello.
#[test]
fn early_entries_are_bounded() {
    let mut a = End::new(hello(1));
    let large = entry(&"x".repeat(EARLY_BYTES_MAX), &["b1@b.example"]);
    assert_eq!(a.session.send(Seq(1), &large, Duration::ZERO), Sent::Blocked);
    assert_eq!(a.session.send_fragment(Seq(1), &large.encode(), 0, Duration::ZERO), 0);
    let invalid = Entry::Cast(Cast {
        template: "<message/>".into(),
        to_at: 8,
        recipients: vec![],
    });
    assert_eq!(a.session.send(Seq(1), &invalid, Duration::ZERO), Sent::Blocked);
    let gone = (1..100).take_while(|seq| {
        // Not one like another: what was seen before takes next to nothing.
        let small = entry(&format!("{seq:0>100}"), &["b1@b.example"]);
        let sent = a.session.send(Seq(*seq), &small, Duration::ZERO);
        a.session.poll_transmit(at(0.0));
        sent == Sent::Whole
    });
    let gone = gone.count();
    assert!((6..=9).contains(&gone), "{gone}");
}

/// A peer that has stored what goes early takes it once; both ends then stand where the peer said.
#[test]
fn early_entries_that_the_peer_has_are_dropped() {
    let ours = Hello {
        first_unacked: Seq(3),
        last: Seq(9),
        ..hello(1)
    };
    let theirs = Hello {
        received: Received {
            epoch: Epoch(1),
            upto: Seq(4),
            beyond: vec![Seq(6)],
        },
        ..hello(2)
    };
    let (mut a, mut b) = (End::new(ours), End::new(theirs));
    let to = entry("<message/>", &["b1@b.example", "b2@b.example"]);
    for seq in 3..=6 {
        assert_eq!(a.session.send(Seq(seq), &to, Duration::ZERO), Sent::Whole);
    }
    pass(&mut a, &mut b, at(0.0)).unwrap();
    pass(&mut b, &mut a, at(0.0)).unwrap();
    assert_eq!(b.received(), [(Seq(5), to.clone())]);
    assert_eq!(a.last_acked().unwrap().upto, Seq(4));
    assert_eq!(a.session.send(Seq(6), &to, Duration::ZERO), Sent::Known);
    assert_eq!(a.session.send(Seq(7), &to, Duration::ZERO), Sent::Whole);
    pass(&mut a, &mut b, at(0.0)).unwrap();
    b.store_all(at(0.0));
    pass(&mut b, &mut a, at(9.0)).unwrap();
    assert_eq!(a.last_acked().unwrap().upto, Seq(7));
    assert!(!a.session.has_unacked());
}

/// A peer with as much beyond a gap as there may be passes over what would be more, and is sent it again when there is room.
#[test]
fn early_entries_beyond_a_full_gap_are_sent_again() {
    let beyond: Vec<Seq> = (3..3 + Received::BEYOND_MAX as u64).map(Seq).collect();
    let theirs = Hello {
        received: Received {
            epoch: Epoch(1),
            upto: Seq(0),
            beyond,
        },
        ..hello(2)
    };
    let ours = Hello {
        last: Seq(300),
        ..hello(1)
    };
    let (mut a, mut b) = (End::new(ours), End::new(theirs));
    let mut sent = |seq| a.session.send(Seq(seq), &Entry::Void, Duration::ZERO);
    assert_eq!([sent(2), sent(300)], [Sent::Whole; 2]);
    pass(&mut a, &mut b, at(0.0)).unwrap();
    pass(&mut b, &mut a, at(0.0)).unwrap();
    assert_eq!(b.received(), []);
    let mut sent = |seq| a.session.send(Seq(seq), &Entry::Void, Duration::ZERO);
    assert_eq!([sent(2), sent(300)], [Sent::Blocked; 2]);
    assert_eq!([sent(1), sent(2), sent(300)], [Sent::Whole; 3]);
    pass(&mut a, &mut b, at(0.0)).unwrap();
    let seqs: Vec<Seq> = b.received().iter().map(|(seq, _)| *seq).collect();
    assert_eq!(seqs, [Seq(1), Seq(2), Seq(300)]);
}

/// A peer with another dictionary, or none, or little room passes early entries over; they are sent again, and what follows can be
/// read.
#[test]
fn early_entries_that_do_not_count_are_sent_again() {
    let other = |change: &dyn Fn(&mut Hello)| {
        let mut theirs = hello(2);
        change(&mut theirs);
        theirs
    };
    for theirs in [
        other(&|hello| hello.dictionary ^= 1),
        other(&|hello| hello.dictionary = 0),
        other(&|hello| hello.entry_bytes_max = EARLY_BYTES_MAX as u64 - 1),
    ] {
        let (mut a, mut b) = (End::new(hello(1)), End::new(theirs));
        let to = entry("<message/>", &["b1@b.example", "b2@b.example"]);
        assert_eq!(a.session.send(Seq(1), &to, Duration::ZERO), Sent::Whole);
        pass(&mut a, &mut b, at(0.0)).unwrap();
        assert_eq!(b.received(), []);
        // In the batch that is built when the hello comes: it is not sent either.
        assert_eq!(a.session.send(Seq(2), &to, Duration::ZERO), Sent::Whole);
        pass(&mut b, &mut a, at(0.0)).unwrap();
        assert!(!a.session.has_unacked());
        for seq in 1..=2 {
            assert_eq!(a.session.send(Seq(seq), &to, Duration::ZERO), Sent::Whole);
        }
        pass(&mut a, &mut b, at(0.0)).unwrap();
        assert_eq!(b.received(), [(Seq(1), to.clone()), (Seq(2), to)]);
    }
}

/// An early batch before the hello is refused, and so is one inside another.
#[test]
fn early_batches_stand_alone_and_after_the_hello() {
    let wire = |body: &[u8]| {
        let mut wire = Vec::new();
        put_batch(&mut wire, BatchKind::Early, body);
        Input::Bytes(wire.into())
    };
    let mut b = End::new(hello(2));
    assert_eq!(b.handle(wire(&[0]), at(0.0)), Err(LinkError::NotAHello));
    let (_, mut b) = open_pair();
    let mut nested = vec![0];
    let early = Coder::agreed(dictionary_id(), dictionary_id());
    Compressor::new(early)
        .unwrap()
        .compress(&[9, 0, 0], &mut nested)
        .unwrap();
    assert_eq!(
        b.handle(wire(&nested), at(0.0)),
        Err(LinkError::Frame(FrameError::UnknownType(9)))
    );
}

/// Who says goodbye before the peer's hello leaves out what was to go early, and has no use for what the peer then says.
#[test]
fn goodbye_before_the_hello_of_the_peer() {
    let (mut a, mut b) = (End::new(hello(1)), End::new(hello(2)));
    pass(&mut a, &mut b, at(0.0)).unwrap();
    a.session.send(Seq(1), &Entry::Void, Duration::ZERO);
    a.session.goodbye(Reason::Shutdown);
    for seq in 1..3 {
        b.session.send(Seq(seq), &Entry::Void, Duration::ZERO);
        pass(&mut b, &mut a, at(0.0)).unwrap();
    }
    pass(&mut a, &mut b, at(0.0)).unwrap();
    assert_eq!(b.received(), []);
    assert_eq!(b.outputs.last(), Some(&Output::Goodbye(Reason::Shutdown)));
}

/// Who leaves before it has said hello, but has stored what came early, says all of it. Found by the simulator (`drained_processes`, 30).
#[test]
fn goodbye_acknowledges_what_came_early() {
    let (mut a, mut b) = (End::new(hello(1)), End::new(hello(2)));
    a.session.send(Seq(1), &Entry::Void, Duration::ZERO);
    pass(&mut a, &mut b, at(0.0)).unwrap();
    b.store_all(at(0.0));
    b.session.goodbye(Reason::Shutdown);
    pass(&mut b, &mut a, at(0.0)).unwrap();
    assert_eq!(a.last_acked().unwrap().upto, Seq(1));
    assert_eq!(a.outputs.last(), Some(&Output::Goodbye(Reason::Shutdown)));
}

/// A peer that comes back is sent what it has not stored, and nothing else.
#[test]
fn resume_skips_what_the_peer_has() {
    let ours = Hello {
        first_unacked: Seq(3),
        last: Seq(9),
        ..hello(1)
    };
    let received = Received {
        epoch: Epoch(1),
        upto: Seq(5),
        beyond: vec![Seq(7)],
    };
    let (mut a, _) = greeted(
        ours,
        Hello {
            received: received.clone(),
            ..hello(2)
        },
    );
    assert_eq!(a.last_acked(), Some(&received));
    let sent = |seq| a.session.send(Seq(seq), &Entry::Void, Duration::ZERO);
    assert_eq!(
        [5, 6, 7, 8].map(sent),
        [Sent::Known, Sent::Whole, Sent::Known, Sent::Whole]
    );
}

/// A peer whose store is new starts at what we still have; one that lost a part says how much is missing.
#[test]
fn lost_stores_are_noticed() {
    let theirs = Hello {
        first_unacked: Seq(21),
        last: Seq(30),
        ..hello(2)
    };
    let mut ours = hello(1);
    ours.received = Received {
        epoch: Epoch(77),
        upto: Seq(500),
        beyond: Vec::new(),
    };
    let (a, _) = greeted(ours.clone(), theirs.clone());
    let expected = Received {
        epoch: Epoch(2),
        upto: Seq(20),
        beyond: Vec::new(),
    };
    assert!(matches!(&a.outputs[0], Output::PeerHello { received, missing: 0, .. } if *received == expected));

    ours.received = Received {
        epoch: Epoch(2),
        upto: Seq(10),
        beyond: vec![Seq(12)],
    };
    let (a, b) = greeted(ours, theirs);
    assert!(matches!(&a.outputs[0], Output::PeerHello { received, missing: 9, .. } if *received == expected));
    assert_eq!(b.last_acked(), Some(&expected));
}

/// Each broken rule ends the session with its own name, the peer is told, and the error stays.
#[test]
fn broken_rules_end_the_session() {
    let refused = |label: &str, write: &dyn Fn(&mut FrameWriter)| {
        let (_, mut b) = open_pair();
        let error = say(&mut b, write).unwrap_err();
        assert_eq!((error.as_label(), error.blame()), (label, Blame::Peer));
        assert_eq!(b.handle(Input::Timeout, at(1.0)), Err(error));
        let goodbye = b.session.poll_transmit(at(1.0)).unwrap();
        assert_eq!(goodbye[..], [4, 7, 2]);
        assert_eq!(b.session.poll_transmit(at(1.0)), None);
    };
    let first = |total| Part::First { total, held_ms: 0 };
    refused("second_hello", &|w| w.hello(&hello(3)));
    refused("acked_unsent", &|w| {
        w.ack(&Ack {
            upto: Seq(1),
            ..Ack::default()
        })
    });
    refused("acked_unsent", &|w| {
        w.ack(&Ack {
            beyond: vec![Seq(2)],
            ..Ack::default()
        })
    });
    refused("fragment_out_of_order", &|w| {
        w.fragment(Seq(1), Part::Next { offset: 1 }, b"x")
    });
    refused("fragment_out_of_order", &|w| {
        w.fragment(Seq(1), first(9), b"abc");
        w.fragment(Seq(1), Part::Next { offset: 2 }, b"x");
    });
    refused("fragment_beyond_total", &|w| {
        w.fragment(Seq(1), first(4), b"abc");
        w.fragment(Seq(1), Part::Next { offset: 3 }, b"xy");
    });
    refused("too_many_fragmented", &|w| {
        (1..=FRAGMENTED_MAX as u64 + 1).for_each(|seq| w.fragment(Seq(seq), first(9), b"abc"));
    });
    refused("bad_entry", &|w| w.fragment(Seq(1), first(3), b"abc"));
    refused("too_far_ahead", &|w| {
        (2..260).for_each(|seq| {
            w.entry(Seq(seq), 0, &Entry::Void, false);
        })
    });
}

/// The largest entry is agreed on in the hellos: at the limit it passes, one byte more is refused by both ends.
#[test]
fn entry_limit_is_kept_by_both() {
    let encoded = Entry::Cast(Cast {
        template: vec![b'x'; 5000].into(),
        to_at: 0,
        recipients: vec!["a".into()],
    })
    .encode();
    for (limit, taken) in [(encoded.len(), 1024), (encoded.len() - 1, 0)] {
        let theirs = Hello {
            entry_bytes_max: limit as u64,
            ..hello(2)
        };
        let (mut a, mut b) = greeted(hello(1), theirs);
        assert_eq!(a.session.send_fragment(Seq(1), &encoded, 0, Duration::ZERO), taken);
        let first = Part::First {
            total: limit + 1,
            held_ms: 0,
        };
        let error = say(&mut b, |w| w.fragment(Seq(1), first, b"x")).unwrap_err();
        assert_eq!(
            error,
            LinkError::TooLarge {
                seq: Seq(1),
                bytes: limit + 1
            }
        );
    }
}

/// The first frame must be a hello, and one of our version.
#[test]
fn only_a_hello_opens() {
    let mut b = End::new(hello(2));
    assert_eq!(say(&mut b, |w| w.ping(1)), Err(LinkError::NotAHello));
    let mut b = End::new(hello(2));
    let other = Hello { version: 9, ..hello(1) };
    assert_eq!(
        say(&mut b, |w| w.hello(&other)),
        Err(LinkError::Version {
            theirs: 9,
            ours: VERSION
        })
    );
    let mut b = End::new(hello(2));
    let ahead = Received {
        epoch: Epoch(2),
        upto: Seq(1),
        beyond: Vec::new(),
    };
    let error = say(&mut b, |w| {
        w.hello(&Hello {
            received: ahead,
            ..hello(1)
        })
    })
    .unwrap_err();
    assert_eq!(error.blame(), Blame::Local);
}

/// An entry for which the peer would cut the connection is not sent.
#[test]
fn invalid_entries_are_not_sent() {
    let (mut a, _) = open_pair();
    let cast = |recipients: Vec<Bytes>| {
        Entry::Cast(Cast {
            template: "<message/>".into(),
            to_at: 8,
            recipients,
        })
    };
    for recipients in [vec![], vec!["b".into(), "a".into()], vec![vec![b'x'; 20_000].into()]] {
        assert_eq!(a.session.send(Seq(1), &cast(recipients), Duration::ZERO), Sent::Refused);
    }
    assert!(!a.session.wants_transmit(at(0.0)));
}

/// What comes twice is counted and dropped.
#[test]
fn duplicates_are_dropped() {
    let (_, mut b) = open_pair();
    say(&mut b, |w| {
        (0..2).for_each(|_| {
            w.entry(Seq(1), 0, &Entry::Void, false);
        })
    })
    .unwrap();
    assert_eq!(b.received().len(), 1);
    assert_eq!(b.session.stats().duplicates_received, 1);
}

/// A small entry overtakes a large one, and the gap is acknowledged around.
#[test]
fn small_overtakes_large() {
    let (mut a, mut b) = open_pair();
    let large = Entry::Cast(Cast {
        template: vec![b'x'; 3000].into(),
        to_at: 0,
        recipients: vec!["a".into()],
    });
    let small = entry("<message/>", &["b1@b.example"]);
    let encoded = large.encode();
    assert_eq!(a.session.send(Seq(1), &large, Duration::ZERO), Sent::NeedsFragments);
    let mut offset = a.session.send_fragment(Seq(1), &encoded, 0, Duration::from_secs(3));
    a.session.send(Seq(2), &small, Duration::ZERO);
    pass(&mut a, &mut b, at(1.0)).unwrap();
    b.store_all(at(1.0));
    pass(&mut b, &mut a, at(9.0)).unwrap();
    assert_eq!(a.last_acked().unwrap().beyond, [Seq(2)]);
    while offset < encoded.len() {
        offset += a.session.send_fragment(Seq(1), &encoded, offset, Duration::ZERO);
    }
    pass(&mut a, &mut b, at(9.0)).unwrap();
    assert_eq!(b.received(), [(Seq(2), small), (Seq(1), large)]);
    assert!(matches!(b.outputs.last(), Some(Output::Received { held_ms: 3000, .. })));
}

/// When as many as may have overtaken a large entry, the others wait, large ones too; the large one itself goes on.
#[test]
fn overtaking_is_bounded() {
    let (mut a, mut b) = open_pair();
    let large = Entry::Cast(Cast {
        template: vec![b'x'; 1500].into(),
        to_at: 0,
        recipients: vec!["a".into()],
    })
    .encode();
    let piece = |a: &mut End, seq, offset| a.session.send_fragment(Seq(seq), &large, offset, Duration::ZERO);
    // All places but one are taken by others; the last is kept for the lowest.
    let begun: Vec<usize> = (2..=9).map(|seq| piece(&mut a, seq, 0)).collect();
    assert_eq!(begun, [1024, 1024, 1024, 1024, 1024, 1024, 1024, 0]);
    for seq in 10..10 + Received::BEYOND_MAX as u64 {
        assert_eq!(a.session.send(Seq(seq), &Entry::Void, Duration::ZERO), Sent::Whole);
    }
    assert_eq!(a.session.send(Seq(999), &Entry::Void, Duration::ZERO), Sent::Blocked);
    assert_eq!(piece(&mut a, 2, 1024), 0);
    assert_eq!(piece(&mut a, 1, 0), 1024);
    assert_eq!(piece(&mut a, 1, 1024), large.len() - 1024);
    assert_eq!(piece(&mut a, 2, 1024), large.len() - 1024);
    pass(&mut a, &mut b, at(1.0)).unwrap();
    assert_eq!(b.session.arrived().upto, Seq(2));
}

/// A message to a hundred occupants costs what one to a single occupant costs.
#[test]
fn one_copy_whatever_the_number() {
    let cost = |count: usize| {
        let (mut a, mut b) = open_pair();
        let names: Vec<String> = (0..count).map(|n| format!("user{n:03}@b.example/phone")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut bytes = 0;
        for seq in 1..=20 {
            let body = format!("<message type='groupchat'><body>line {seq}</body></message>");
            a.session.send(Seq(seq), &entry(&body, &names), Duration::ZERO);
            bytes = pass(&mut a, &mut b, at(1.0)).unwrap();
        }
        bytes
    };
    assert!(cost(100).abs_diff(cost(1)) <= 1, "{} {}", cost(1), cost(100));
}

/// Silence is noticed when something is owed: first doubt, then death; one byte in between ends the doubt.
#[test]
fn silence_is_noticed_in_two_steps() {
    let (mut a, mut b) = open_pair();
    a.session.send(Seq(1), &Entry::Void, Duration::ZERO);
    a.session.poll_transmit(at(1.0)).unwrap();
    assert_eq!(
        a.session.poll_timeout(),
        Some(Deadline {
            at: at(9.0).mono,
            why: "peer quiet"
        })
    );
    a.handle(Input::Timeout, at(8.9)).unwrap();
    assert!(!a.outputs.contains(&Output::Quiet));
    a.handle(Input::Timeout, at(9.0)).unwrap();
    assert_eq!(a.outputs.last(), Some(&Output::Quiet));
    assert!(a.session.poll_transmit(at(9.0)).is_some(), "a ping");
    a.handle(Input::Progress, at(15.0)).unwrap();
    assert_eq!(a.outputs.last(), Some(&Output::Alive));
    a.handle(Input::Timeout, at(34.9)).unwrap();
    assert_eq!(
        a.handle(Input::Timeout, at(35.0)),
        Err(LinkError::PeerSilent { for_ms: 20_000 })
    );
    // The other end was owed nothing, and waits in peace.
    b.handle(Input::Timeout, at(59.0)).unwrap();
    assert_eq!(b.session.poll_transmit(at(59.0)), None);
}

/// An idle link is asked ever more seldom whether it is there; only one of the two asks.
#[test]
fn keepalive_slows_down() {
    let (mut a, mut b) = open_pair();
    let (mut pings, mut bytes) = (0, 0);
    for second in 1..3600 {
        let now = at(f64::from(second));
        for end in [&mut a, &mut b] {
            if end
                .session
                .poll_timeout()
                .is_some_and(|deadline| deadline.at <= now.mono)
            {
                end.handle(Input::Timeout, now).unwrap();
            }
        }
        bytes += pass(&mut a, &mut b, now).unwrap() + pass(&mut b, &mut a, now).unwrap();
        bytes += pass(&mut a, &mut b, now).unwrap();
        pings = a.session.stats().pings_sent + b.session.stats().pings_sent;
    }
    assert!((5..=12).contains(&pings) && bytes < 100, "{pings} pings, {bytes} bytes");
}

/// The round trip is told from the time that the acknowledgement waited.
#[test]
fn round_trip_is_measured_without_the_delay() {
    let (mut a, mut b) = open_pair();
    a.session.send(Seq(1), &Entry::Void, Duration::ZERO);
    let batch = a.session.poll_transmit(at(0.0)).unwrap();
    b.handle(Input::Bytes(batch), at(0.3)).unwrap();
    b.store_all(at(0.3));
    let ack = b.session.poll_transmit(at(5.3)).unwrap();
    a.handle(Input::Bytes(ack), at(5.6)).unwrap();
    let rtt = a.session.stats().rtt.unwrap();
    assert!(
        rtt.abs_diff(Duration::from_millis(600)) < Duration::from_millis(2),
        "{rtt:?}"
    );
}

/// What is said after a silence does not count the silence as its way: it leaves when its batch is taken, not when something was last
/// heard. Seen as 0.6 to 1.8 s on a LAN.
#[test]
fn round_trip_is_measured_without_the_silence_before() {
    let (mut a, mut b) = open_pair();
    a.session.send(Seq(1), &Entry::Void, Duration::ZERO);
    let batch = a.session.poll_transmit(at(40.0)).unwrap();
    b.handle(Input::Bytes(batch), at(40.3)).unwrap();
    b.store_all(at(41.0));
    let ack = b.session.poll_transmit(at(45.3)).unwrap();
    a.handle(Input::Bytes(ack), at(45.6)).unwrap();
    let rtt = a.session.stats().rtt.unwrap();
    assert!(
        rtt.abs_diff(Duration::from_millis(600)) < Duration::from_millis(2),
        "{rtt:?}"
    );
}

/// A goodbye is said once, takes the acknowledgement along, and nothing follows it.
#[test]
fn goodbye_is_the_last_word() {
    let (mut a, mut b) = open_pair();
    b.session.send(Seq(1), &Entry::Void, Duration::ZERO);
    pass(&mut b, &mut a, at(1.0)).unwrap();
    a.store_all(at(1.0));
    a.session.goodbye(Reason::Shutdown);
    assert_eq!(a.session.send(Seq(1), &Entry::Void, Duration::ZERO), Sent::Blocked);
    pass(&mut a, &mut b, at(1.0)).unwrap();
    assert_eq!(b.last_acked().unwrap().upto, Seq(1));
    assert_eq!(b.outputs.last(), Some(&Output::Goodbye(Reason::Shutdown)));
    assert_eq!(a.session.poll_transmit(at(99.0)), None);
}

/// What unfolds into much is opened only as it is taken.
#[test]
fn output_is_bounded_while_it_is_not_taken() {
    let (mut a, mut b) = open_pair();
    let names: Vec<String> = (0..2000).map(|n| format!("user{n}@b.example")).collect();
    let many = entry("<message/>", &names.iter().map(String::as_str).collect::<Vec<_>>());
    for seq in 1..=200 {
        a.session.send(Seq(seq), &many, Duration::ZERO);
        while let Some(batch) = a.session.poll_transmit(at(1.0)) {
            b.session.handle(Input::Bytes(batch), at(1.0)).unwrap();
        }
    }
    assert!(b.session.output_bytes < 2 * OUTPUT_BYTES_MAX);
    b.handle(Input::Progress, at(1.0)).unwrap();
    assert_eq!(b.received().len(), 200);
}

#[derive(Clone, Debug)]
enum Step {
    Whole,
    BeginLarge(usize),
    Continue(prop::sample::Index),
    Transmit,
    Deliver(usize),
    Store,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => Just(Step::Whole),
        1 => (1usize..9000).prop_map(Step::BeginLarge),
        3 => any::<prop::sample::Index>().prop_map(Step::Continue),
        2 => Just(Step::Transmit),
        4 => (1usize..3000).prop_map(Step::Deliver),
        1 => Just(Step::Store),
    ];
    proptest::collection::vec(step, 1..120)
}

/// One direction at work: what was said, what is on the way, what is cut in pieces.
#[derive(Default)]
struct Traffic {
    /// The peer's hello has been read.
    greeted: bool,
    next: u64,
    complete: Vec<(Seq, Entry)>,
    large: Vec<(Seq, Entry, Bytes, usize)>,
    wire: Vec<u8>,
}

impl Traffic {
    fn step(&mut self, step: &Step, from: &mut End, to: &mut End) {
        if !self.greeted && from.session.is_open() {
            self.greeted = true;
            // As the relay does: the session knows what went early and counts.
            for (seq, entry) in &self.complete {
                let sent = from.session.send(*seq, entry, Duration::ZERO);
                assert!(matches!(sent, Sent::Whole | Sent::Known), "{sent:?}");
            }
        }
        match step {
            Step::Whole => {
                let number = self.next + 1;
                let names: Vec<String> = (0..number % 5 + 1).map(|n| format!("user{n}@b.example")).collect();
                let names: Vec<&str> = names.iter().map(String::as_str).collect();
                let entry = entry(&format!("<message><body>{number}</body></message>"), &names);
                match from.session.send(Seq(number), &entry, Duration::ZERO) {
                    Sent::Whole => {
                        self.next = number;
                        self.complete.push((Seq(number), entry));
                    }
                    Sent::Blocked | Sent::BatchFull => {}
                    other => panic!("{other:?}"),
                }
            }
            Step::BeginLarge(size) => {
                self.next += 1;
                let recipients = vec![Bytes::from_static(b" to='b@b.example'")];
                let entry = Entry::Cast(Cast {
                    template: vec![b'x'; *size].into(),
                    to_at: 0,
                    recipients,
                });
                let encoded = entry.encode();
                self.large.push((Seq(self.next), entry, encoded, 0));
            }
            Step::Continue(which) if !self.large.is_empty() => {
                self.continue_large(which.index(self.large.len()), from);
            }
            Step::Continue(_) => {}
            Step::Transmit => self
                .wire
                .extend(from.session.poll_transmit(at(1.0)).unwrap_or_default()),
            Step::Deliver(bytes) => {
                let chunk: Vec<u8> = self.wire.drain(..self.wire.len().min(*bytes)).collect();
                to.handle(Input::Bytes(chunk.into()), at(1.0)).unwrap();
            }
            Step::Store => to.store_all(at(1.0)),
        }
    }

    fn continue_large(&mut self, which: usize, from: &mut End) {
        let (seq, _, encoded, offset) = &mut self.large[which];
        *offset += from.session.send_fragment(*seq, encoded, *offset, Duration::ZERO);
        if *offset == encoded.len() {
            let (seq, entry, ..) = self.large.remove(which);
            self.complete.push((seq, entry));
        }
    }

    fn greet(&mut self, from: &mut End, to: &mut End) {
        self.step(&Step::Transmit, from, to);
        self.step(&Step::Deliver(usize::MAX), from, to);
    }

    fn finish(&mut self, from: &mut End, to: &mut End) {
        self.step(&Step::Store, from, to);
        while !self.large.is_empty() {
            // Only so many may be under way at once: those that are not blocked get on.
            for which in (0..self.large.len()).rev() {
                self.continue_large(which, from);
            }
            self.step(&Step::Transmit, from, to);
        }
        self.step(&Step::Transmit, from, to);
        self.step(&Step::Deliver(usize::MAX), from, to);
        self.step(&Step::Store, from, to);
    }
}

proptest! {
    /// However entries and fragments mix, whatever the chunks and whenever the hellos: each entry arrives once, whole, and in the order
    /// in which it was complete.
    #[test]
    fn every_entry_arrives_once(
        alike in any::<bool>(),
        steps in proptest::collection::vec((any::<bool>(), steps()), 1..6),
    ) {
        let theirs = Hello { dictionary: dictionary_id() ^ u64::from(!alike), ..hello(2) };
        let (mut a, mut b) = (End::new(hello(1)), End::new(theirs));
        let (mut there, mut back) = (Traffic::default(), Traffic::default());
        for (forward, steps) in &steps {
            for step in steps {
                if *forward { there.step(step, &mut a, &mut b) } else { back.step(step, &mut b, &mut a) }
            }
        }
        there.greet(&mut a, &mut b);
        back.greet(&mut b, &mut a);
        there.finish(&mut a, &mut b);
        back.finish(&mut b, &mut a);
        prop_assert_eq!(b.received(), there.complete);
        prop_assert_eq!(a.received(), back.complete);
        // The acknowledgements cross too, and then nothing is left to say.
        for now in [at(10.0), at(11.0)] {
            pass(&mut a, &mut b, now).unwrap();
            pass(&mut b, &mut a, now).unwrap();
        }
        prop_assert!(!a.session.has_unacked() && !b.session.has_unacked());
    }

    /// Bytes that were changed on the way, or were never a session's, end in an error or in nothing: no panic, no flood.
    #[test]
    fn damage_is_survived(
        steps in steps(),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        noise in proptest::collection::vec(any::<u8>(), 0..50),
    ) {
        let (mut a, mut b) = open_pair();
        let mut there = Traffic::default();
        for step in steps.iter().filter(|step| !matches!(step, Step::Deliver(_) | Step::Store)) {
            there.step(step, &mut a, &mut b);
        }
        there.wire.extend(a.session.poll_transmit(at(1.0)).unwrap_or_default());
        there.wire.extend(noise);
        if !there.wire.is_empty() {
            for (index, byte) in damage {
                let index = index.index(there.wire.len());
                there.wire[index] = byte;
            }
        }
        let mut result = Ok(());
        for chunk in there.wire.chunks(700) {
            result = b.handle(Input::Bytes(Bytes::copy_from_slice(chunk)), at(1.0));
        }
        prop_assert!(b.outputs.len() <= there.wire.len() * 200 + 10);
        if let Err(error) = result {
            prop_assert!(!error.as_label().is_empty());
        }
    }
}

/// A room's reflection crosses in fewer bytes than what it reflects, before and after that is acknowledged; a new connection
/// begins with nothing to refer to.
#[test]
fn a_reflection_crosses_by_reference() {
    let line = |from: &str, number: u64| {
        let body = "these are words that nobody has said before, and 17 others";
        let template =
            format!("<message from='{from}' id='{number:08}' type='groupchat'><body>{body} {number}</body></message>");
        entry(&template, &["somebody@example"])
    };
    let mut seq = 0;
    for _connection in 0..2 {
        let (mut room, mut user) = open_pair();
        for stored in [false, true, false] {
            seq += 1;
            let (said, reflected) = (line("b1@b.example/r", seq), line("room@a.example/b1", seq));
            let number = Seq(1 + (seq - 1) % 3);
            assert_eq!(user.session.send(number, &said, Duration::ZERO), Sent::Whole);
            pass(&mut user, &mut room, at(1.0)).unwrap();
            if stored {
                room.store_all(at(7.0));
                pass(&mut room, &mut user, at(7.0)).unwrap();
            }
            assert_eq!(room.session.send(number, &reflected, Duration::ZERO), Sent::Whole);
            assert!(room.session.batch_bytes() < 90, "{}", room.session.batch_bytes());
            pass(&mut room, &mut user, at(8.0)).unwrap();
            assert_eq!(user.received().last(), Some(&(number, reflected)));
        }
    }
}

/// What a room tells a second one who enters is a few bytes, is given out entry by entry, and is acknowledged like anything else.
#[test]
fn a_second_roster_is_given_out_entry_by_entry() {
    let (mut room, mut user) = open_pair();
    let roster = |to: &str| {
        let one = |n| {
            entry(
                &format!("<message from='room@a.example/n{n}'><show>away</show></message>"),
                &[to],
            )
        };
        (0..200).map(one).collect::<Vec<_>>()
    };
    let (first, second) = (roster("b1@b.example"), roster("b2@b.example"));
    for (seq, entry) in (1..).map(Seq).zip(&first) {
        assert_eq!(room.session.send(seq, entry, Duration::ZERO), Sent::Whole);
    }
    pass(&mut room, &mut user, at(1.0)).unwrap();
    for (seq, entry) in (201..).map(Seq).zip(&second) {
        assert_eq!(room.session.send(seq, entry, Duration::ZERO), Sent::Whole);
    }
    let bytes = pass(&mut room, &mut user, at(1.0)).unwrap();
    assert!(bytes < 40, "{bytes}");
    let all = user.received();
    assert!(all.iter().map(|(_, entry)| entry).eq(first.iter().chain(&second)));
    user.store_all(at(2.0));
    pass(&mut user, &mut room, at(2.0)).unwrap();
    assert_eq!(room.last_acked().map(|acked| acked.upto), Some(Seq(400)));
}

/// What is set is what happens: each setting with a value that is not the default's.
#[test]
fn every_setting_is_obeyed() {
    let pair = |config: &SessionConfig| {
        let hello = |epoch| Hello {
            ack_delay_ms: config.ack_delay.as_millis() as u64,
            ..hello(epoch)
        };
        let (mut a, mut b) = (End::with(config.clone(), hello(1)), End::with(config.clone(), hello(2)));
        pass(&mut a, &mut b, at(0.0)).unwrap();
        pass(&mut b, &mut a, at(0.0)).unwrap();
        (a, b)
    };
    let next = |end: &End| end.session.poll_timeout().map(|deadline| (deadline.why, deadline.at));

    for delay in [2, 11] {
        let (mut a, mut b) = pair(&SessionConfig {
            ack_delay: Duration::from_secs(delay),
            ..SessionConfig::default()
        });
        a.session.send(Seq(1), &Entry::Void, Duration::ZERO);
        pass(&mut a, &mut b, at(1.0)).unwrap();
        b.store_all(at(1.0));
        let due = (1 + delay) as f64;
        assert_eq!(b.session.poll_transmit(at(due - 0.1)), None);
        assert!(b.session.poll_transmit(at(due)).is_some());
    }
    for quiet in [7, 11] {
        let (mut a, _) = pair(&SessionConfig {
            quiet_after: Duration::from_secs(quiet),
            dead_after: Duration::from_secs(4 * quiet),
            ..SessionConfig::default()
        });
        a.session.send(Seq(1), &Entry::Void, Duration::ZERO);
        a.session.poll_transmit(at(1.0)).unwrap();
        // The peer may keep its acknowledgement back for 5 s.
        let quiet = quiet as f64;
        assert_eq!(next(&a), Some(("peer quiet", at(6.0 + quiet).mono)));
        a.handle(Input::Timeout, at(6.0 + quiet)).unwrap();
        a.handle(Input::Timeout, at(5.9 + 4.0 * quiet)).unwrap();
        assert!(a.handle(Input::Timeout, at(6.0 + 4.0 * quiet)).is_err());
    }
    let (mut a, mut b) = pair(&SessionConfig {
        keepalive: Some(Duration::from_secs(10)),
        keepalive_max: Duration::from_secs(20),
        ..SessionConfig::default()
    });
    for second in 1..=600 {
        let now = at(f64::from(second));
        for end in [&mut a, &mut b] {
            end.handle(Input::Timeout, now).unwrap();
        }
        for _ in 0..2 {
            pass(&mut a, &mut b, now).unwrap();
            pass(&mut b, &mut a, now).unwrap();
        }
    }
    let pings = a.session.stats().pings_sent + b.session.stats().pings_sent;
    assert!(
        (25..=60).contains(&pings),
        "every 20 s in the end, not every 10 s nor every 480: {pings}"
    );
    let (a, _) = pair(&SessionConfig {
        keepalive: None,
        ..SessionConfig::default()
    });
    assert_eq!(next(&a), None);

    let (mut a, _) = pair(&SessionConfig {
        fragment_bytes_max: 333,
        ..SessionConfig::default()
    });
    let encoded = Bytes::from(vec![b'x'; 3000]);
    assert_eq!(a.session.send_fragment(Seq(1), &encoded, 0, Duration::ZERO), 333);
}
