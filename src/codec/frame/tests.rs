use proptest::prelude::*;

use super::*;

fn read_all(reader: &mut FrameReader, batch: &RawBatch) -> Result<Vec<Frame>, FrameError> {
    let (mut text, mut ids) = (Reader::new(&batch.text), Reader::new(&batch.ids));
    let mut frames = Vec::new();
    while let Some(frame) = reader.read(&mut text, &mut ids)? {
        frames.push(frame);
    }
    Ok(frames)
}

fn cast(template: impl Into<Vec<u8>>, to_at: usize, recipients: impl IntoIterator<Item = String>) -> Entry {
    let mut recipients: Vec<Bytes> = recipients
        .into_iter()
        .map(|one| Bytes::from(one.into_bytes()))
        .collect();
    recipients.sort();
    recipients.dedup();
    Entry::Cast(Cast {
        template: Bytes::from(template.into()),
        to_at: to_at as u32,
        recipients,
    })
}

fn occupants(numbers: std::ops::Range<usize>) -> impl Iterator<Item = String> {
    numbers.map(|n| format!(" to='user{n}@b.example/phone'"))
}

/// Templates made of what packing treats in a special way, and of everything else.
fn templates() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..8),
        (0u8..4).prop_map(|n| format!("{n}23e4567-e89b-12d3-a456-426614174000").into_bytes()),
        Just(b"123E4567-e89b-12d3-a456-426614174000".to_vec()),
        Just(b"23e4567-e89b-12d3-a456-426614174000".to_vec()),
        any::<[u8; 16]>().prop_map(|id| {
            let mut out = Vec::new();
            Id::Uuid(id).put_text(&mut out);
            out
        }),
        any::<[u8; 18]>().prop_map(|id| format!("'{}'", URL_SAFE_NO_PAD.encode(id)).into_bytes()),
        (0u64..3).prop_map(|n| format!("\"179516764160103{n}\"").into_bytes()),
        (0u64..30_000_000_000_000_000).prop_map(|n| format!("'{n:016}'").into_bytes()),
        (0u64..3).prop_map(|n| format!("'{n:032x}'").into_bytes()),
        (0u64..3).prop_map(|n| format!("'{}'", u64::MAX - n).into_bytes()),
        Just(b"'18446744073709551616'".to_vec()),
        (0u8..3).prop_map(|n| format!("'{}'", STANDARD.encode([n; 32])).into_bytes()),
        Just(b"'AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAB='".to_vec()),
    ];
    proptest::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
}

proptest! {
    /// Whole entries come back as they were, whatever the memory of the connection has seen before.
    #[test]
    fn entries_round_trip(
        entries in proptest::collection::vec((templates(), any::<prop::sample::Index>(), 0usize..30, 1usize..8, 1u64..50), 1..30)
    ) {
        let (mut writer, mut reader) = (FrameWriter::default(), FrameReader::default());
        for (template, at, first, count, seq) in entries {
            let to_at = at.index(template.len() + 1);
            let entry = cast(template, to_at, occupants(first..first + count));
            writer.entry(Seq(seq), 1234, &entry, false);
            let frames = read_all(&mut reader, &writer.take()).unwrap();
            prop_assert_eq!(frames, vec![Frame::Entry { seq: Seq(seq), held_ms: 1200, entry, kept: false }]);
        }
    }

    /// No bytes make the reader panic.
    #[test]
    fn any_bytes_are_safe(
        texts in proptest::collection::vec(proptest::collection::vec(0u8..70, 0..60), 1..8),
        ids in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut reader = FrameReader::default();
        for text in texts {
            let batch = RawBatch { text, ids: ids.clone(), compressible: true };
            let _ = read_all(&mut reader, &batch);
        }
    }

    /// Any positions survive a hello and an ack.
    #[test]
    fn positions_round_trip(upto in 0u64..1 << 60, steps in proptest::collection::vec(1u64..4, 0..50)) {
        let mut received = Received { epoch: Epoch(7), upto: Seq(upto), beyond: Vec::new() };
        let mut last = upto + 1;
        for step in steps {
            last += step;
            received.add(Seq(last));
        }
        let mut out = Vec::new();
        put_beyond(&mut out, received.upto, &received.beyond);
        prop_assert_eq!(read_beyond(&mut Reader::new(&out), received.upto), Ok(received.beyond));
    }
}

/// A second message to the same hundred occupants costs as much as one to a single occupant.
#[test]
fn a_known_set_costs_a_byte() {
    let size = |count: usize| {
        let mut writer = FrameWriter::default();
        writer.entry(Seq(1), 0, &cast("<message/>", 8, occupants(0..count)), false);
        writer.take();
        writer.entry(Seq(2), 0, &cast("<presence/>", 9, occupants(0..count)), false);
        writer.take().text.len()
    };
    assert_eq!(size(1), size(100));
}

/// When one of a hundred leaves and another comes, only these two are named.
#[test]
fn a_changed_set_is_sent_as_a_difference() {
    let (mut writer, mut reader) = (FrameWriter::default(), FrameReader::default());
    writer.entry(Seq(1), 0, &cast("<message/>", 8, occupants(0..100)), false);
    read_all(&mut reader, &writer.take()).unwrap();
    let entry = cast("<message/>", 8, occupants(1..101));
    writer.entry(Seq(2), 0, &entry, false);
    let batch = writer.take();
    assert!(batch.text.len() < 60, "{}", batch.text.len());
    assert_eq!(
        read_all(&mut reader, &batch),
        Ok(vec![Frame::Entry {
            seq: Seq(2),
            held_ms: 0,
            entry,
            kept: false,
        }])
    );
}

/// A UUID costs sixteen bytes and a mark, and two bytes when it comes again.
#[test]
fn uuids_are_cut_out() {
    let mut writer = FrameWriter::default();
    let id = "123e4567-e89b-12d3-a456-426614174000";
    writer.entry(
        Seq(1),
        0,
        &cast(
            format!("<message id='{id}'><origin-id id='{id}'/></message>"),
            8,
            occupants(0..1),
        ),
        false,
    );
    let batch = writer.take();
    assert_eq!(batch.ids.len(), 16);
    assert!(!batch.text.windows(8).any(|text| text == b"123e4567"));
}

/// The ids of both servers' archives are cut out too, and cost what is random in them.
#[test]
fn archive_ids_are_cut_out() {
    let ids_bytes = |templates: &[&str]| {
        let mut writer = FrameWriter::default();
        for (seq, template) in (1..).zip(templates) {
            writer.entry(Seq(seq), 0, &cast(*template, 8, occupants(0..1)), false);
        }
        writer.take().ids.len()
    };
    assert_eq!(ids_bytes(&["<message id='25w4IzgWt2H_KH1G4qhBuLiH'/>"]), 18);
    assert_eq!(ids_bytes(&["<message id='0123456789abcdef0123456789abcdef'/>"]), 16);
    assert_eq!(ids_bytes(&["<message id='14900623995289813628'/>"]), 8);
    let occupant = "<occupant-id id='P0whYXi8MzHUSad9xAqSAyJVGTOHZkZwSUi4YdAza1o='/>";
    assert_eq!(ids_bytes(&[occupant, &format!("{occupant}again")]), 32);
    assert_eq!(
        ids_bytes(&["<message id='1795167641601034'/>", "<message id='1795167642703747'/>"]),
        8 + 4
    );
    assert_eq!(
        ids_bytes(&[
            "<message id='urn_xmpp_chat_markers_02'/>",
            "<message id=25w4IzgWt2H_KH1G4qhBuLiH/>"
        ]),
        0
    );
}

/// The tables stay within their bounds, and both ends forget the same.
#[test]
fn tables_are_bounded() {
    let (mut writer, mut reader) = (FrameWriter::default(), FrameReader::default());
    for round in 0..300 {
        let first = round * 13 % 97 * 1000;
        let entry = cast("<message/>", 8, occupants(first..first + 1 + round * 7 % 900));
        writer.entry(Seq(round as u64 + 1), 0, &entry, false);
        let frames = read_all(&mut reader, &writer.take()).unwrap();
        assert!(matches!(&frames[..], [Frame::Entry { entry: read, .. }] if *read == entry));
        for memory in [&writer.memory, &reader.memory] {
            assert!(memory.sets.len() <= SETS_MAX && memory.singles.len() <= SINGLES_MAX);
            assert!(memory.sets_bytes <= SETS_BYTES_MAX);
            assert_eq!(
                memory.sets_bytes,
                memory.sets.iter().map(|set| set.bytes).sum::<usize>()
            );
        }
    }
}

/// A hello of another version says so, whatever follows in it.
#[test]
fn another_version_is_named() {
    let mut text = vec![frame_type::HELLO];
    put_prefixed(&mut text, &[9, 1, 2, 3]);
    let batch = RawBatch {
        text,
        ..RawBatch::default()
    };
    assert_eq!(
        read_all(&mut FrameReader::default(), &batch),
        Err(FrameError::Version { theirs: 9 })
    );
}

/// A frame that may be ignored is ignored; one that may not is refused.
#[test]
fn optional_frames_are_skipped() {
    let batch = |text: &[u8]| RawBatch {
        text: text.to_vec(),
        ..RawBatch::default()
    };
    let mut reader = FrameReader::default();
    assert_eq!(
        read_all(&mut reader, &batch(&[0x41, 2, 9, 9, 5, 3])),
        Ok(vec![Frame::Ping(3)])
    );
    assert_eq!(
        read_all(&mut reader, &batch(&[0x3f])),
        Err(FrameError::UnknownType(0x3f))
    );
    assert_eq!(
        read_all(&mut reader, &batch(&[0x41, 9])),
        Err(ReadError::Truncated.into())
    );
}

/// A length over the limit is refused before its bytes are waited for.
#[test]
fn oversize_batch_is_refused_at_once() {
    let mut buffer = BatchBuffer::default();
    let mut head = Vec::new();
    put_varint(&mut head, (BATCH_BYTES_MAX as u64 + 1) << 1);
    buffer.push(&head);
    assert!(matches!(
        buffer.poll_batch(),
        Err(FrameError::Read(ReadError::OverLimit { .. }))
    ));
}

/// One end of a connection.
#[derive(Default)]
struct End {
    writer: FrameWriter,
    reader: FrameReader,
    last: u64,
    read: u64,
}

impl End {
    /// Gives how many bytes of frames the entry takes in a batch with what was said before.
    fn say(&mut self, entry: &Entry) -> usize {
        let before = self.writer.text.len();
        self.last += 1;
        let may_keep = self.reader.may_keep(entry);
        if self.writer.entry(Seq(self.last), 0, entry, may_keep) {
            self.reader.keep(Seq(self.last), entry);
        }
        self.writer.text.len() - before
    }

    fn acknowledge(&mut self) {
        let upto = Seq(self.read);
        self.writer.ack(&Ack { upto, ..Ack::default() });
    }

    fn hear(&mut self, batch: &RawBatch) -> Result<Vec<Entry>, FrameError> {
        let mut entries = Vec::new();
        for frame in read_all(&mut self.reader, batch)? {
            if let Frame::Entry { seq, entry, kept, .. } = frame {
                assert_eq!(seq.0, self.read + 1);
                self.read = seq.0;
                if kept {
                    self.writer.handle_kept(seq, &entry);
                }
                entries.push(entry);
            }
        }
        Ok(entries)
    }
}

fn to_one(template: String, user: usize) -> Entry {
    cast(template, 9, occupants(user..user + 1))
}

/// What a room tells who enters it.
fn roster(occupants: impl IntoIterator<Item = usize>, joiner: usize) -> Vec<Entry> {
    let presence = |n| format!("<presence from='room@a.example/nick{n}'><show>away</show></presence>");
    let own = format!("<presence from='room@a.example/nick{joiner}'><status code='110'/></presence>");
    let history = (0..20).map(|n| format!("<message  id='line{n}'><body>the {n}th line</body></message>"));
    let mut all: Vec<String> = occupants.into_iter().map(presence).collect();
    all.push(own);
    all.extend(history);
    all.into_iter().map(|template| to_one(template, joiner)).collect()
}

#[derive(Clone, Debug)]
enum Step {
    Say {
        end: usize,
        text: usize,
        recipient: usize,
        count: usize,
    },
    Reflect {
        end: usize,
        recipient: usize,
    },
    Acknowledge {
        end: usize,
    },
    Flush {
        end: usize,
    },
    Deliver {
        end: usize,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (0..2usize, 0..12usize, 0..4usize, 1..3usize)
            .prop_map(|(end, text, recipient, count)| Step::Say { end, text, recipient, count }),
        4 => (0..2usize, 0..4usize).prop_map(|(end, recipient)| Step::Reflect { end, recipient }),
        2 => (0..2usize).prop_map(|end| Step::Acknowledge { end }),
        3 => (0..2usize).prop_map(|end| Step::Flush { end }),
        3 => (0..2usize).prop_map(|end| Step::Deliver { end }),
    ];
    proptest::collection::vec(step, 1..400)
}

proptest! {
    // Large templates take their time.
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Two ends that talk at once and acknowledge now and then, with batches under way in both directions, read what was
    /// written: known templates, runs, moved addresses, reflections, and all of it forgotten for want of room.
    #[test]
    fn two_ends_stay_in_step(steps in steps(), large in 0usize..40_000) {
        let mut ends = [End::default(), End::default()];
        let mut wires: [std::collections::VecDeque<(RawBatch, Vec<Entry>)>; 2] = Default::default();
        let mut said: [Vec<Entry>; 2] = Default::default();
        let mut heard: [Option<Entry>; 2] = Default::default();
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::Say { end, text, recipient, count } => {
                    // The first few come again and again, of two sizes and with two places for the address.
                    let id = if text < 8 { text } else { number };
                    let filler = "x".repeat(if text % 3 == 0 { large.min(TEMPLATE_WHOLE_MAX - 200) } else { 50 });
                    let template = format!("<message  type='groupchat' id='{id:032x}'><body>{filler}</body></message>");
                    let entry = cast(template, 8 + text % 2, occupants(recipient..recipient + count));
                    ends[end].say(&entry);
                    said[end].push(entry);
                }
                Step::Reflect { end, recipient } => {
                    if let Some(Entry::Cast(Cast { template, .. })) = &heard[end] {
                        let text = String::from_utf8_lossy(template).replacen("<message ", "<message from='room@a.example/nick' ", 1);
                        let entry = cast(text, 8, occupants(recipient..recipient + 2));
                        ends[end].say(&entry);
                        said[end].push(entry);
                    }
                }
                Step::Acknowledge { end } => ends[end].acknowledge(),
                Step::Flush { end } => wires[end].push_back((ends[end].writer.take(), std::mem::take(&mut said[end]))),
                Step::Deliver { end } => {
                    if let Some((batch, expected)) = wires[1 - end].pop_front() {
                        let entries = ends[end].hear(&batch).unwrap();
                        prop_assert_eq!(&entries, &expected);
                        heard[end] = entries.last().cloned().or(heard[end].take());
                    }
                }
            }
        }
    }
}

/// Who enters a room after somebody else costs a few bytes beside the own presence, whatever the number of occupants.
#[test]
fn a_second_roster_costs_a_few_bytes() {
    let (mut a, mut b) = (End::default(), End::default());
    let mut enter = |occupants: Vec<usize>, joiner: usize| {
        let told = roster(occupants, joiner);
        let mut bytes = 0;
        for entry in &told {
            bytes += a.say(entry);
        }
        let batch = a.writer.take();
        assert_eq!(b.hear(&batch).unwrap(), told);
        // What a first entry to a recipient takes, and the own presence.
        bytes
            - " to='user100@b.example/phone'".len()
            - "<presence from='room@a.example/nick100'><status code='110'/></presence>".len()
    };
    assert!(enter((0..50).collect(), 100) > 3000);
    let bytes = enter((0..50).collect(), 101);
    assert!(bytes <= 16, "{bytes}");
    // One has left, and one is there twice as late.
    let bytes = enter((0..20).chain(21..50).collect(), 102);
    assert!(bytes <= 20, "{bytes}");
    let bytes = enter((0..20).chain(30..50).chain(21..30).collect(), 103);
    assert!(bytes <= 28, "{bytes}");
}

/// An occupant that is new to the roster costs what a reference costs, and the others are foreseen as before.
#[test]
fn a_roster_goes_on_after_what_is_new() {
    let (mut a, mut b) = (End::default(), End::default());
    let mut sizes = Vec::new();
    for joiner in 0..10 {
        // Those who came stand among the others, at a place of their own.
        let occupants = (100..150)
            .flat_map(|n| [Some(n), (n % 10 < joiner && n < 110).then_some(n % 10)])
            .flatten();
        let told = roster(occupants, joiner);
        let bytes: usize = told.iter().map(|entry| a.say(entry)).sum();
        sizes.push(bytes);
        let news = cast(
            format!("<presence from='room@a.example/nick{joiner}'><show>away</show></presence>"),
            9,
            occupants_of(joiner),
        );
        a.say(&news);
        let batch = a.writer.take();
        assert_eq!(b.hear(&batch).unwrap(), [told, vec![news]].concat());
    }
    assert!(sizes[2..].iter().all(|bytes| *bytes < 130), "{sizes:?}");
}

/// Everybody who was there when this one came.
fn occupants_of(joiner: usize) -> impl Iterator<Item = String> {
    occupants(200..201 + joiner)
}

/// A room's reflection does not say again what its author said, nor does it when the acknowledgement is on its way.
#[test]
fn a_reflection_refers_to_what_was_said() {
    let (mut a, mut b) = (End::default(), End::default());
    for number in 0..300 {
        let body = format!(
            "<body>the {number}th thing that was said behind the link</body><active xmlns='http://jabber.org/protocol/chatstates'/></message>"
        );
        let id = format!("id='{number:08}' type='groupchat'>");
        let said = to_one(format!("<message  from='user@b.example/phone' {id}{body}"), 0);
        let reflected = to_one(format!("<message  from='room@a.example/nick' {id}{body}"), 1);
        b.say(&said);
        a.hear(&b.writer.take()).unwrap();
        if number % 7 == 0 {
            a.acknowledge();
        }
        let bytes = a.say(&reflected);
        assert!(bytes < 90, "{bytes} at {number}");
        let batch = a.writer.take();
        assert_eq!(b.hear(&batch).unwrap(), [reflected]);
    }
}

/// The id of a line that was reflected by reference is known like any other: a marker for it takes two bytes of it.
#[test]
fn ids_within_pieces_are_known() {
    let (mut a, mut b) = (End::default(), End::default());
    let line = |from: &str| {
        let id = "123e4567-e89b-12d3-a456-426614174000";
        to_one(
            format!("<message  id='{id}' from='{from}'><origin-id xmlns='urn:xmpp:sid:0' id='{id}'/></message>"),
            0,
        )
    };
    b.say(&line("user@b.example/phone"));
    a.hear(&b.writer.take()).unwrap();
    let marker = to_one(
        "<message ><displayed id='123e4567-e89b-12d3-a456-426614174000'/></message>".into(),
        0,
    );
    a.say(&line("room@a.example/nick"));
    a.say(&marker);
    let batch = a.writer.take();
    assert!(batch.ids.is_empty(), "{}", batch.ids.len());
    assert_eq!(b.hear(&batch).unwrap(), [line("room@a.example/nick"), marker]);
}

/// Without acknowledgements nothing is kept beyond the limit, and what is not kept crosses in full.
#[test]
fn what_is_not_kept_is_not_referred_to() {
    let (mut a, mut b) = (End::default(), End::default());
    let line = |from: &str, number: usize| {
        let text =
            format!("<message  from='{from}' id='{number:08}'><body>what number {number} has said</body></message>");
        to_one(text, 0)
    };
    for number in 0..1000 {
        b.say(&line("user@b.example/phone", number));
    }
    assert!(!b.reader.may_keep(&line("user@b.example/phone", 1000)));
    a.hear(&b.writer.take()).unwrap();
    let (first, last) = (line("room@a.example/n", 0), line("room@a.example/n", 999));
    assert!(a.say(&first) < a.say(&last));
    assert_eq!(b.hear(&a.writer.take()).unwrap(), [first, last]);
    // With the acknowledgement there is room again.
    a.acknowledge();
    b.hear(&a.writer.take()).unwrap();
    assert!(b.reader.may_keep(&line("user@b.example/phone", 1000)));
}

/// What each new frame looks like on the wire: whoever changes this changes [`VERSION`].
#[test]
fn frames_are_written_so() {
    let mut a = End::default();
    let text = |end: &mut End| end.writer.take().text.escape_ascii().to_string();
    a.say(&to_one("<message >one</message>".into(), 0));
    a.say(&to_one("<message >two</message>".into(), 0));
    assert_eq!(
        text(&mut a),
        r"\x0c\x00\x00\x07 to=\'user0@b.example/phone\'\x00<message \x03>one</message>\x00\x0c\x00\x00\x01<message \x03>two</message>\x00"
    );
    // The same to somebody else, as it came the last time: two in one frame.
    a.say(&to_one("<message >one</message>".into(), 1));
    a.say(&to_one("<message >two</message>".into(), 1));
    assert_eq!(text(&mut a), r"\n\x00\x00\x07 to=\'user1@b.example/phone\'\x00\x04");
    // Of age 1, then the address elsewhere.
    a.say(&to_one("<message >one</message>".into(), 1));
    a.say(&cast("<message >two</message>", 8, occupants(1..2)));
    assert_eq!(text(&mut a), r"\x0b\x07\r\x00\x00\x01\x00\x08");
}

/// References that lead nowhere break the connection's rules, and runs do not stand for more than they may.
#[test]
fn bad_references_are_refused() {
    let refused = |bytes: &[u8]| {
        let mut end = End::default();
        let mut other = End::default();
        end.say(&to_one(
            "<message  id='of the one who reads'><body>words</body></message>".into(),
            0,
        ));
        other.say(&to_one("<message >one</message>".into(), 0));
        other.say(&to_one("<message >two</message>".into(), 0));
        end.hear(&other.writer.take()).unwrap();
        let batch = RawBatch {
            text: bytes.to_vec(),
            ..RawBatch::default()
        };
        read_all(&mut end.reader, &batch).unwrap_err()
    };
    use frame_type::{CAST, KNOWN, MOVED, ON};
    // An age that is nobody's, a guess about what never followed, a run that goes on beyond what is known.
    assert_eq!(refused(&[ON, 2 << 2 | 3]), FrameError::UnknownTemplate);
    assert_eq!(refused(&[ON, 0]), FrameError::UnknownTemplate);
    assert_eq!(refused(&[ON, 2]), FrameError::UnknownTemplate);
    assert_eq!(refused(&[KNOWN, 0, 0, 7, b'x', 0, 2 << 2]), FrameError::UnknownTemplate);
    let mut long = vec![ON];
    put_varint(&mut long, RUN_MAX << 2);
    assert!(matches!(refused(&long), FrameError::Read(ReadError::OverLimit { .. })));
    // An address beyond the text.
    assert!(matches!(
        refused(&[MOVED, 0, 0, 1, 1, 100]),
        FrameError::Read(ReadError::OverLimit { .. })
    ));
    assert_eq!(refused(&[MOVED, 0, 0, 1, 2, 0]), FrameError::UnknownTemplate);
    // A text that was not said, a piece of none, and one that ends beyond it.
    assert_eq!(refused(&[CAST, 0, 0, 1, mark::REFLECTED, 2]), FrameError::UnknownSaid);
    assert_eq!(refused(&[CAST, 0, 0, 1, mark::PIECE, 0, 1]), FrameError::UnknownSaid);
    assert!(matches!(
        refused(&[CAST, 0, 0, 1, mark::REFLECTED, 0, mark::PIECE, 9, 100]),
        FrameError::Read(ReadError::OverLimit { .. })
    ));
    assert_eq!(refused(&[CAST, 0, 0, 1, mark::KNOWN_DIGEST, 0]), FrameError::UnknownId);
    // Nothing was sent yet that could go on.
    let batch = RawBatch {
        text: vec![ON, 3],
        ..RawBatch::default()
    };
    assert!(read_all(&mut FrameReader::default(), &batch).is_err());
}
