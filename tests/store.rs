//! The durable store: against its model, under kill -9, with a full disk, a damaged file, and a million entries.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
};

use bytes::Bytes;
use narrows::{
    codec::position::{Epoch, Received, Seq},
    io::store::{self, Answer, Fault, Options, Request, Store, StoreError},
    queue::journal::{
        Batch, Change, Model, Opening, STATE_BYTES_MAX, STATE_KEY_BYTES_MAX, STATE_VALUE_BYTES_MAX, Slot, state_bytes,
    },
    time::Wall,
};
use proptest::prelude::*;

use self::store_load::{Checker, open_with, read_all};

mod store_load;

/// Names the store for a test that was started again as a child of itself.
const CHILD_STORE: &str = "NARROWS_TEST_CHILD_STORE";

fn temp() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let path = folder.path().join("shore.sqlite");
    (folder, path)
}

/// This test binary again, running only one test, as a child that knows it is one.
fn child(test: &str, path: &Path) -> Command {
    let mut command = Command::new(env::current_exe().expect("a test knows its binary"));
    command
        .args(["--exact", test, "--nocapture", "--test-threads=1", "--quiet"])
        .env(CHILD_STORE, path);
    command
}

fn child_store() -> Option<PathBuf> {
    env::var_os(CHILD_STORE).map(PathBuf::from)
}

fn open(path: &Path) -> (Store, mpsc::Receiver<Answer>, Opening) {
    open_with(path, Options::default())
}

fn put_spool(number: u64, seq: u64, size: usize) -> Request {
    let entry = Bytes::from(vec![seq as u8; size]);
    let accepted = Wall(seq);
    let changes = vec![Change::PutSpool {
        seq: Seq(seq),
        accepted,
        entry,
    }];
    Request::Commit(Batch { number, changes })
}

fn trim(number: u64, upto: u64) -> Request {
    let changes = vec![Change::DropSpool {
        upto: Seq(upto),
        beyond: vec![],
    }];
    Request::Commit(Batch { number, changes })
}

/// Waits for the answer to a batch.
fn committed(answers: &mpsc::Receiver<Answer>, number: u64) {
    loop {
        match answers.recv() {
            Ok(Answer::Committed { batch, .. }) if batch >= number => return,
            Ok(Answer::Committed { .. }) => {}
            other => panic!("unexpected: {other:?}"),
        }
    }
}

fn refusal(path: &Path) -> StoreError {
    let opened = store::open(path, Options::default(), |_| {});
    opened.expect_err("the store was to be refused")
}

/// A step of the comparison with the model.
#[derive(Clone, Debug)]
enum Step {
    Commit(Vec<Change>),
    ReadSpool(u64, usize, usize),
    ReadInbox(u64, usize, usize),
    Reopen,
}

fn change() -> impl Strategy<Value = Change> {
    let seq = || (1..40_u64).prop_map(Seq);
    let key = || prop::collection::vec(0..3_u8, 0..4).prop_map(Bytes::from);
    let entry = || prop_oneof![0..50_usize, 0..5000_usize].prop_map(|size| Bytes::from(vec![b'x'; size]));
    prop_oneof![
        4 => (seq(), 0..=i64::MAX.unsigned_abs(), entry()).prop_map(|(seq, accepted, entry)| Change::PutSpool {
            seq,
            accepted: Wall(accepted),
            entry,
        }),
        4 => (seq(), entry()).prop_map(|(seq, entry)| Change::PutInbox { seq, entry }),
        1 => (0..40_u64, prop::collection::vec(seq(), 0..4)).prop_map(|(upto, beyond)| Change::DropSpool {
            upto: Seq(upto),
            beyond,
        }),
        2 => (seq(), prop::collection::vec(any::<u8>(), 0..9)).prop_map(|(seq, given)| Change::MarkInbox { seq, given }),
        2 => seq().prop_map(|seq| Change::DropInbox { seq }),
        1 => (any::<u64>(), 0..99_u64, prop::collection::vec(seq(), 0..9)).prop_map(|(epoch, upto, beyond)| {
            Change::SetReceived(Received {
                epoch: Epoch(epoch),
                upto: Seq(upto),
                beyond,
            })
        }),
        2 => (key(), entry()).prop_map(|(key, value)| Change::PutState { key, value }),
        1 => key().prop_map(|key| Change::DropState { key }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => prop::collection::vec(change(), 0..6).prop_map(Step::Commit),
        2 => (0..45_u64, 0..9_usize, 0..9000_usize).prop_map(|(from, entries, bytes)| Step::ReadSpool(from, entries, bytes)),
        2 => (0..45_u64, 0..9_usize, 0..9000_usize).prop_map(|(from, entries, bytes)| Step::ReadInbox(from, entries, bytes)),
        1 => Just(Step::Reopen),
    ]
}

/// Drops what a store refuses: an inbox slot that is not free.
fn allowed(changes: Vec<Change>, model: &Model) -> Vec<Change> {
    let mut probe = model.clone();
    let mut allowed = Vec::new();
    for change in changes {
        let taken = match &change {
            Change::PutInbox { seq, .. } => {
                let (slots, _) = probe.read_inbox(*seq, 1, 0);
                slots.first().is_some_and(|slot| slot.seq == *seq)
            }
            _ => false,
        };
        if !taken {
            probe.apply(Batch {
                number: 1,
                changes: vec![change.clone()],
            });
            allowed.push(change);
        }
    }
    allowed
}

fn next_read(answers: &mpsc::Receiver<Answer>) -> (Vec<Slot>, bool) {
    loop {
        match answers.recv() {
            Ok(Answer::Committed { .. }) => {}
            Ok(Answer::Spool { slots, end } | Answer::Inbox { slots, end }) => return (slots, end),
            other => panic!("unexpected: {other:?}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The store does what the model does.
    ///
    /// Give both the same batches, compare each read, and after each opening what it tells.
    #[test]
    fn does_what_the_model_does(steps in prop::collection::vec(step(), 1..40)) {
        let (_folder, path) = temp();
        let (mut store, mut answers, opening) = open(&path);
        let mut model = Model::new(opening.epoch);
        prop_assert_eq!(opening, model.opening());
        let mut number = 0;
        for step in steps {
            match step {
                Step::Commit(changes) => {
                    number += 1;
                    let batch = Batch { number, changes: allowed(changes, &model) };
                    model.apply(batch.clone());
                    store.submit(Request::Commit(batch));
                }
                Step::ReadSpool(from, entries_max, bytes_max) => {
                    let from = Seq(from);
                    store.submit(Request::ReadSpool { from, entries_max, bytes_max });
                    prop_assert_eq!(next_read(&answers), model.read_spool(from, entries_max, bytes_max));
                }
                Step::ReadInbox(from, entries_max, bytes_max) => {
                    let from = Seq(from);
                    store.submit(Request::ReadInbox { from, entries_max, bytes_max });
                    prop_assert_eq!(next_read(&answers), model.read_inbox(from, entries_max, bytes_max));
                }
                Step::Reopen => {
                    store.close();
                    let opening;
                    (store, answers, opening) = open(&path);
                    prop_assert_eq!(opening, model.opening());
                }
            }
        }
        store.close();
    }
}

/// Found by the comparison above: behind an entry larger than the limit, an empty one is over it as well.
#[test]
fn nothing_is_read_beyond_a_large_entry() {
    let (_folder, path) = temp();
    let (store, answers, opening) = open(&path);
    let mut model = Model::new(opening.epoch);
    for (number, size) in [(1, 900), (2, 0)] {
        let request = put_spool(number, number, size);
        if let Request::Commit(batch) = &request {
            model.apply(batch.clone());
        }
        store.submit(request);
    }
    let (from, entries_max, bytes_max) = (Seq(1), 9, 500);
    store.submit(Request::ReadSpool {
        from,
        entries_max,
        bytes_max,
    });
    let read = next_read(&answers);
    assert_eq!((read.0.len(), read.1), (1, false));
    assert_eq!(read, model.read_spool(from, entries_max, bytes_max));
    store.close();
}

/// Every batch is answered, in order, and nothing is answered after the last.
#[test]
fn answers_every_batch_once_and_in_order() {
    let (_folder, path) = temp();
    let (store, answers, _) = open(&path);
    for number in 1..=500 {
        store.submit(put_spool(number, number, 100));
    }
    let stats = store.stats();
    store.close();
    let numbers: Vec<u64> = answers
        .iter()
        .map(|answer| match answer {
            Answer::Committed { batch, .. } => batch,
            other => panic!("unexpected: {other:?}"),
        })
        .collect();
    assert!(numbers.is_sorted_by(|one, next| one < next), "{numbers:?}");
    assert_eq!(numbers.last(), Some(&500));
    assert_eq!(stats.commits(), numbers.len() as u64);
    assert_eq!((stats.submitted(), stats.handled()), (500, 500));
}

/// A kill at any moment takes no answered batch and leaves none in part.
///
/// A child runs the load and tells what is answered; kill it, compare everything, let the next go on in the same file.
#[test]
fn kill_loses_nothing_answered() {
    if let Some(path) = child_store() {
        let error = store_load::run(&path, Options::default(), io::stderr());
        panic!("{error}");
    }
    let (_folder, path) = temp();
    let mut checker = Checker::new(Options::default());
    let mut answered = 0;
    for round in 0..25_usize {
        let mut writer = child("kill_loses_nothing_answered", &path)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the test can start itself");
        let mut pipe = writer.stderr.take().expect("it was asked for");
        // A different number of answers in each round, so that the kill meets different work.
        for _ in 0..(round * 37) % 200 {
            let mut number = [0; 8];
            pipe.read_exact(&mut number).expect("the child answers");
            answered = u64::from_be_bytes(number);
        }
        writer.kill().expect("the child is ours");
        writer.wait().expect("the child is ours");
        answered = rest_of_answers(pipe).unwrap_or(answered);
        checker.check(&path, answered);
    }
    assert!(
        answered > 1000,
        "only {answered} batches were answered: nothing was tried"
    );
}

/// A mark that was not noted before a kill is taken back, because nothing was written for it; after a restart of the system, when
/// it cannot be known, it counts. What was unmarked stays so, noted or not: the leg that had it is gone.
///
/// Look at the store as a kill would have left it after some marks, of which only the first are noted.
#[test]
fn marks_that_were_not_noted_are_taken_back() {
    let commit = |number: u64, change: Change| {
        let changes = vec![change];
        Request::Commit(Batch { number, changes })
    };
    let beside = |path: &Path, suffix: &str| PathBuf::from(format!("{}{suffix}", path.display()));
    let ours = Options::default().boot_id;
    let other = Some(*b"00000000-0000-0000-0000-000000000000");
    for (marks, noted, boot_id, there, given) in [
        (&[0b01, 0b11][..], 1, ours, true, 0b01),
        (&[0b01, 0b11], 2, ours, true, 0b11),
        (&[0b01, 0b11], 1, ours, false, 0b11),
        (&[0b01, 0b11], 1, other, true, 0b11),
        (&[0b01, 0b11], 1, None, true, 0b11),
        // Several that are not noted, and one in between that is.
        (&[0b001, 0b011, 0b111], 1, ours, true, 0b001),
        (&[0b001, 0b011, 0b111], 2, ours, true, 0b011),
        // The leg breaks, and there is another one for which the mark was made again.
        (&[0b11, 0b01], 1, ours, true, 0b01),
        (&[0b11, 0b01, 0b11], 1, ours, true, 0b01),
        (&[0b11, 0b01, 0b11], 3, ours, true, 0b11),
        // Nothing was noted.
        (&[0b01, 0b11], 0, ours, true, 0),
    ] {
        let (_folder, path) = temp();
        let (store, answers, _) = open(&path);
        let entry = Bytes::from_static(b"entry");
        store.submit(commit(1, Change::PutInbox { seq: Seq(1), entry }));
        for (number, &copies) in (2..).zip(marks) {
            let given = vec![copies];
            store.submit(commit(number, Change::MarkInbox { seq: Seq(1), given }));
            committed(&answers, number);
            if number - 1 <= noted {
                store.release().note(number).unwrap();
            }
        }

        let (_folder, copy) = temp();
        for suffix in ["", "-wal", "-given"] {
            fs::copy(beside(&path, suffix), beside(&copy, suffix)).unwrap();
        }
        store.close();
        if !there {
            fs::remove_file(beside(&copy, "-given")).unwrap();
        }
        let options = || Options {
            boot_id,
            ..Options::default()
        };
        // What was found once is found again.
        for _ in 0..2 {
            let (said, answers) = mpsc::channel();
            let (killed, _) = store::open(&copy, options(), move |answer| said.send(answer).unwrap()).unwrap();
            let (_, inbox) = read_all(&killed, &answers);
            let found = inbox[0].given.first().copied().unwrap_or_default();
            assert_eq!(found, given, "{marks:?}, noted {noted} in {there}, {boot_id:?}");
            killed.close();
        }
    }
}

/// The last answer that a dead child wrote; one more may be cut.
fn rest_of_answers(mut pipe: impl Read) -> Option<u64> {
    let mut bytes = Vec::new();
    pipe.read_to_end(&mut bytes)
        .expect("the pipe of a dead child can be read");
    bytes.as_chunks().0.last().map(|number| u64::from_be_bytes(*number))
}

/// Only one process at a time has a store.
#[test]
fn second_opening_is_refused() {
    let (_folder, path) = temp();
    let (store, _answers, _) = open(&path);
    let error = refusal(&path);
    assert_eq!(error.fault, Fault::Locked);
    assert!(
        error
            .to_string()
            .contains("shore.sqlite: the store is in use by another process")
    );
    store.close();
    open(&path).0.close();
}

/// Numbers go on after everything was trimmed, and the epoch stays; another store has another epoch.
#[test]
fn numbering_outlives_an_empty_spool() {
    let (_folder, path) = temp();
    let (store, _answers, before) = open(&path);
    for seq in 1..=9 {
        store.submit(put_spool(seq, seq, 10));
    }
    store.submit(trim(10, 9));
    store.close();
    let (store, _answers, after) = open(&path);
    store.close();
    assert_eq!(
        (after.spool_first, after.spool_last, after.levels.spool_bytes),
        (None, Seq(9), 0)
    );
    assert_eq!(after.epoch, before.epoch);
    let (_other_folder, other) = temp();
    assert_ne!(open(&other).2.epoch, after.epoch);
}

/// Trims are answered at once and committed together, at the latest when the store is closed.
///
/// Compare how many commits 100 trims cost beside the 1 commit before them.
#[test]
fn trims_share_a_commit() {
    let (_folder, path) = temp();
    let (store, answers, _) = open(&path);
    let entries = (1..=100).map(|seq| Change::PutSpool {
        seq: Seq(seq),
        accepted: Wall(seq),
        entry: Bytes::from_static(b"entry"),
    });
    store.submit(Request::Commit(Batch {
        number: 1,
        changes: entries.collect(),
    }));
    committed(&answers, 1);
    let stats = store.stats();
    let before = stats.commits();
    for seq in 1..=100 {
        store.submit(trim(seq + 1, seq));
    }
    committed(&answers, 101);
    assert_eq!(
        read_all(&store, &answers).0,
        vec![],
        "a read sees trims that are not committed yet"
    );
    store.close();
    // The delay may run out in between on a machine that is busy elsewhere, but not for each of them.
    let commits = stats.commits() - before;
    assert!(commits < 50, "{commits} commits");
    assert_eq!(open(&path).2.levels.spool_entries, 0);
}

/// A full disk is said so, at once, and nothing is accepted after it; what was answered is there.
#[test]
fn full_file_stops_acceptance() {
    let (_folder, path) = temp();
    let (answers, incoming) = mpsc::channel();
    let options = Options {
        file_bytes_max: Some(200_000),
        ..Options::default()
    };
    let (store, _) = store::open(&path, options, move |answer| {
        let _ = answers.send(answer);
    })
    .unwrap();
    for number in 1..=300 {
        store.submit(put_spool(number, number, 1000));
    }
    // Reads are not answered any more either.
    store.submit(Request::ReadSpool {
        from: Seq(0),
        entries_max: 1,
        bytes_max: 1,
    });
    store.close();
    let mut answers: Vec<_> = incoming.iter().collect();
    let Some(Answer::Failed(error)) = answers.pop() else {
        panic!("the last answer says what failed");
    };
    assert_eq!(error.fault, Fault::Full);
    let text = error.to_string();
    assert!(
        text.contains("shore.sqlite: no room to write") && text.contains("make room"),
        "{text}"
    );
    let answered = answers.iter().map(|answer| match answer {
        Answer::Committed { batch, .. } => *batch,
        other => panic!("unexpected: {other:?}"),
    });
    let answered = answered.max().unwrap_or(0);
    let (store, _answers, opening) = open(&path);
    store.close();
    assert_eq!(opening.levels.spool_entries, answered);
}

/// An inbox slot that is not free is not written over: the store stops, and the slot is as it was.
#[test]
fn taken_inbox_slot_is_refused() {
    let (_folder, path) = temp();
    let (store, answers, _) = open(&path);
    for (number, text) in [(1, "first"), (2, "second")] {
        let changes = vec![Change::PutInbox {
            seq: Seq(7),
            entry: Bytes::from(text),
        }];
        store.submit(Request::Commit(Batch { number, changes }));
        if number == 1 {
            committed(&answers, 1);
        }
    }
    store.close();
    let last = answers.iter().last();
    assert!(matches!(last, Some(Answer::Failed(error)) if error.fault == Fault::Refused));
    let (store, answers, _) = open(&path);
    assert_eq!(read_all(&store, &answers).1[0].entry, "first");
    store.close();
}

/// State beyond its bounds is refused, each and in sum, and up to them it is kept: what an opening reads is bounded.
///
/// Fill it with rows of the largest size but for one byte, and put that byte in one more batch.
#[test]
fn state_is_bounded() {
    let put = |number, key, value| {
        let changes = vec![Change::PutState { key, value }];
        Request::Commit(Batch { number, changes })
    };
    let refused = |store: Store, answers: mpsc::Receiver<Answer>, request| {
        store.submit(request);
        store.close();
        let last = answers.iter().last();
        assert!(matches!(last, Some(Answer::Failed(error)) if error.fault == Fault::Refused));
    };
    let (_folder, path) = temp();
    for (key, value) in [(STATE_KEY_BYTES_MAX + 1, 0), (0, STATE_VALUE_BYTES_MAX + 1)] {
        let (store, answers, _) = open(&path);
        refused(store, answers, put(1, vec![0; key].into(), vec![0; value].into()));
    }

    let (store, answers, _) = open(&path);
    let mut left = STATE_BYTES_MAX - state_bytes(STATE_KEY_BYTES_MAX, 0);
    let mut number = 0_u64;
    let mut expected = BTreeMap::new();
    while left > 0 {
        number += 1;
        let key = Bytes::from(number.to_be_bytes().to_vec());
        let value_bytes = (left - state_bytes(key.len(), 0)).min(STATE_VALUE_BYTES_MAX as u64);
        left -= state_bytes(key.len(), value_bytes as usize);
        let value = Bytes::from(vec![number as u8; value_bytes as usize]);
        expected.insert(key.clone(), value.clone());
        store.submit(put(number, key, value));
    }
    let longest = Bytes::from(vec![0xff; STATE_KEY_BYTES_MAX]);
    store.submit(put(number + 1, longest.clone(), Bytes::new()));
    // In place of the one before, as the bounds do not count it twice.
    store.submit(put(number + 2, longest.clone(), Bytes::new()));
    committed(&answers, number + 2);
    refused(
        store,
        answers,
        put(number + 3, longest.clone(), Bytes::from_static(b"x")),
    );

    let (store, _answers, opening) = open(&path);
    expected.insert(longest, Bytes::new());
    assert!(opening.state == expected, "what was within the bounds is there");
    store.close();
}

/// A number that SQLite cannot hold is refused, not turned into another.
#[test]
fn numbers_above_63_bits_are_refused() {
    let (_folder, path) = temp();
    let (store, answers, _) = open(&path);
    store.submit(trim(1, u64::MAX));
    store.submit(Request::ReadSpool {
        from: Seq(u64::MAX),
        entries_max: 1,
        bytes_max: 1,
    });
    store.submit(put_spool(2, u64::MAX, 1));
    store.close();
    let answers: Vec<_> = answers.iter().collect();
    assert!(
        matches!(&answers[..], [
        Answer::Committed { batch: 1, .. },
        Answer::Spool { end: true, .. },
        Answer::Failed(error),
    ] if error.fault == Fault::Refused),
        "{answers:?}"
    );
}

/// The state of the rooms; spool and inbox.
type Everything = (BTreeMap<Bytes, Bytes>, (Vec<Slot>, Vec<Slot>));

/// A store with a few entries and no log, closed; and what is in it.
fn filled(path: &Path) -> Everything {
    let (store, answers, opening) = open(path);
    let mut model = Model::new(opening.epoch);
    for number in 1..=60 {
        model.apply(store_load::batch(number));
        store.submit(Request::Commit(store_load::batch(number)));
    }
    committed(&answers, 60);
    let queues = read_all(&store, &answers);
    store.close();
    (model.opening().state, queues)
}

/// Opens and reads everything; every outcome but a panic is returned.
fn try_all(path: &Path) -> Result<Everything, StoreError> {
    let (answers, incoming) = mpsc::channel();
    let (store, opening) = store::open(path, Options::default(), move |answer| {
        let _ = answers.send(answer);
    })?;
    let (from, entries_max, bytes_max) = (Seq(0), usize::MAX, usize::MAX);
    store.submit(Request::ReadSpool {
        from,
        entries_max,
        bytes_max,
    });
    store.submit(Request::ReadInbox {
        from,
        entries_max,
        bytes_max,
    });
    store.close();
    match (incoming.recv(), incoming.recv()) {
        (Ok(Answer::Spool { slots: spool, .. }), Ok(Answer::Inbox { slots: inbox, .. })) => {
            Ok((opening.state, (spool, inbox)))
        }
        (Ok(Answer::Failed(error)), _) | (_, Ok(Answer::Failed(error))) => Err(error),
        other => panic!("unexpected: {other:?}"),
    }
}

/// Wherever bytes of the file are overwritten, what is read is either right or refused: never wrong, never silently less.
///
/// Overwrite 16 bytes at a time throughout the file, in steps that meet every page in several places.
#[test]
fn damage_is_found_wherever_it_is() {
    let (_folder, path) = temp();
    let sound = filled(&path);
    let bytes = fs::read(&path).unwrap();
    let mut refused = 0;
    let places = (0..bytes.len() - 16).step_by(509);
    let count = places.clone().count();
    for place in places {
        let mut damaged = bytes.clone();
        for byte in &mut damaged[place..place + 16] {
            *byte ^= 0xa5;
        }
        fs::write(&path, &damaged).unwrap();
        match try_all(&path) {
            Ok(read) => assert!(read == sound, "damage at {place} changed what is read"),
            Err(error) => {
                refused += 1;
                let expected = matches!(
                    error.fault,
                    Fault::Corrupt | Fault::NotAStore | Fault::Version | Fault::Io | Fault::Full
                );
                assert!(expected, "damage at {place}: {error}");
            }
        }
        // A refused file is left as it was found, for `.recover`.
        let _ = fs::remove_file(path.with_extension("sqlite-wal"));
    }
    assert!(refused * 2 > count, "only {refused} of {count} were found");
}

/// Damage in the log of a process that died is found as well, if anything was flushed after it.
///
/// Copy a store in use with its log, which is what a crash leaves; overwrite 16 bytes at a time throughout the log. At most the last batch
/// may be missing, for it may just as well have been torn.
#[test]
fn damaged_log_is_not_taken_for_a_torn_one() {
    let (folder, path) = temp();
    let (store, answers, opening) = open(&path);
    let mut model = Model::new(opening.epoch);
    let mut states = Vec::new();
    // The last two matter, so that each has a commit of its own.
    for number in 1..=38 {
        store.submit(Request::Commit(store_load::batch(number)));
        committed(&answers, number);
        model.apply(store_load::batch(number));
        states.push((model.opening().state, read_all(&store, &answers)));
    }
    let log = |path: &Path| path.with_extension("sqlite-wal");
    let (bytes, log_bytes) = (fs::read(&path).unwrap(), fs::read(log(&path)).unwrap());
    store.close();
    let crashed = folder.path().join("crashed.sqlite");
    let crash_with = |log_bytes: &[u8]| {
        fs::write(&crashed, &bytes).unwrap();
        fs::write(log(&crashed), log_bytes).unwrap();
        try_all(&crashed)
    };
    let [.., before_last, last] = &states[..] else {
        panic!("there are 38");
    };
    assert!(crash_with(&log_bytes).unwrap() == *last, "an undamaged log is taken");
    let mut refused = 0;
    let places = (0..log_bytes.len() - 16).step_by(499);
    let count = places.clone().count();
    for place in places {
        let mut damaged = log_bytes.clone();
        for byte in &mut damaged[place..place + 16] {
            *byte ^= 0xa5;
        }
        match crash_with(&damaged) {
            Ok(read) => assert!(
                read == *last || read == *before_last,
                "damage at {place} went unnoticed"
            ),
            Err(error) => {
                refused += 1;
                assert_eq!(error.fault, Fault::Corrupt, "damage at {place}: {error}");
                assert!(fs::read(log(&crashed)).unwrap() == damaged, "the log was changed");
            }
        }
    }
    assert!(refused * 10 > count * 9, "only {refused} of {count} were found");
    // Cut short anywhere, a log is a torn one, and some state of before is found.
    for length in (0..log_bytes.len()).step_by(4999) {
        let read = crash_with(&log_bytes[..length]).unwrap_or_else(|error| panic!("cut at {length}: {error}"));
        assert!(
            read == Everything::default() || states.contains(&read),
            "cut at {length}"
        );
    }
}

/// A file that is cut short, empty, foreign, or of another version is refused by name and left alone.
#[test]
fn what_is_not_a_store_is_refused_and_left_alone() {
    let (_folder, path) = temp();
    filled(&path);
    let sound = fs::read(&path).unwrap();
    let altered = |at: usize, with: &[u8]| {
        let mut bytes = sound.clone();
        bytes[at..at + with.len()].copy_from_slice(with);
        bytes
    };
    // Offsets of the SQLite header: magic at 0, user version at 60, application id at 68.
    for (bytes, fault) in [
        (vec![], Fault::Corrupt),
        (b"<stream:stream>".repeat(99), Fault::NotAStore),
        (altered(0, b"no database"), Fault::NotAStore),
        (altered(60, &[0, 0, 0, 1]), Fault::Version),
        (altered(60, &[0, 0, 0, 4]), Fault::Version),
        (altered(68, &[0, 0, 0, 0]), Fault::NotAStore),
        (sound[..sound.len() / 2].to_vec(), Fault::Corrupt),
    ] {
        fs::write(&path, &bytes).unwrap();
        let error = refusal(&path);
        assert_eq!(error.fault, fault, "{error}");
        assert!(error.to_string().contains("shore.sqlite: "), "{error}");
        assert!(fs::read(&path).unwrap() == bytes, "{fault:?}: the file was changed");
    }
}

/// Offset 60 of the SQLite header: the version of the tables.
fn header_version(path: &Path) -> u8 {
    fs::read(path).unwrap()[63]
}

/// A store of version 2 as narrows left it when it was killed: the database, and all of these rows in its log. And `after` them.
fn format_2(path: &Path, after: &str) {
    let connection = rusqlite::Connection::open(path).unwrap();
    connection
        .execute_batch(
            "PRAGMA page_size = 2048; PRAGMA auto_vacuum = INCREMENTAL; PRAGMA journal_mode = WAL;
             PRAGMA application_id = 0x6e617277; PRAGMA user_version = 2;
             CREATE TABLE spool (seq INTEGER PRIMARY KEY, entry BLOB NOT NULL, sum INTEGER NOT NULL) STRICT;
             CREATE TABLE inbox (seq INTEGER PRIMARY KEY, entry BLOB NOT NULL, sum INTEGER NOT NULL) STRICT;
             CREATE TABLE given (seq INTEGER PRIMARY KEY, copies BLOB NOT NULL, sum INTEGER NOT NULL, before BLOB NOT NULL,
                 turn INTEGER NOT NULL) STRICT;
             CREATE TABLE state (id INTEGER PRIMARY KEY CHECK (id = 1), epoch INTEGER NOT NULL, spool_last INTEGER NOT NULL,
                 spool_entries INTEGER NOT NULL, spool_bytes INTEGER NOT NULL, inbox_entries INTEGER NOT NULL,
                 inbox_bytes INTEGER NOT NULL, received_epoch INTEGER NOT NULL, received_upto INTEGER NOT NULL,
                 received_beyond TEXT NOT NULL, sum INTEGER NOT NULL) STRICT;
             PRAGMA wal_checkpoint(TRUNCATE);
             BEGIN;
             INSERT INTO given VALUES (3, x'05', 4041341351, x'', 1);
             INSERT INTO inbox VALUES (3, x'6861732063726F73736564', 2714918281);
             INSERT INTO spool VALUES (4, x'7761697473', 859417254), (6, x'776169747320746F6F', 953159394);
             INSERT INTO state VALUES (1, -5770637109608009964, 6, 2, 14, 1, 11, -2, 3, '5,8', 1206434389);
             COMMIT;",
        )
        .unwrap();
    connection.execute_batch(after).unwrap();
    let files = [path.to_owned(), path.with_extension("sqlite-wal")];
    let bytes = files.each_ref().map(|file| fs::read(file).unwrap());
    // It moves the log into the database, which a kill does not.
    drop(connection);
    for (file, bytes) in files.iter().zip(bytes) {
        fs::write(file, bytes).unwrap();
    }
}

/// A store of the version before is taken over with all that is in it, its log included. From then on it keeps rooms' state, and
/// since when entries wait; of those that are there, nobody knows.
#[test]
fn older_store_is_upgraded() {
    goes_on_from_format_2("");
}

/// A crash right after the upgrade leaves it in the log only: the database still has the old version in its header.
#[test]
fn upgrade_may_crash_before_it_reaches_the_database() {
    goes_on_from_format_2(
        "BEGIN;
         CREATE TABLE rooms (key BLOB PRIMARY KEY, value BLOB NOT NULL, sum INTEGER NOT NULL) STRICT, WITHOUT ROWID;
         ALTER TABLE state ADD COLUMN rooms_rows INTEGER NOT NULL DEFAULT 0;
         ALTER TABLE state ADD COLUMN rooms_bytes INTEGER NOT NULL DEFAULT 0;
         ALTER TABLE spool ADD COLUMN accepted INTEGER;
         DROP TABLE given;
         CREATE TABLE given (seq INTEGER NOT NULL, turn INTEGER NOT NULL, copies BLOB NOT NULL, sum INTEGER NOT NULL,
             PRIMARY KEY (seq, turn)) STRICT, WITHOUT ROWID;
         INSERT INTO given VALUES (3, 0, x'05', 4041341351);
         PRAGMA user_version = 3;
         COMMIT;",
    );
}

fn goes_on_from_format_2(after: &str) {
    let (_folder, path) = temp();
    format_2(&path, after);
    assert_eq!(header_version(&path), 2);
    let (store, answers, opening) = open(&path);
    // An older narrows is to refuse it from now on.
    assert_eq!(header_version(&path), 3);
    let mut model = Model::new(Epoch((-5_770_637_109_608_009_964_i64).cast_unsigned()));
    let put_inbox = |seq, entry| Change::PutInbox {
        seq: Seq(seq),
        entry: Bytes::from_static(entry),
    };
    let put_spool = |seq, entry| Change::PutSpool {
        seq: Seq(seq),
        accepted: Wall(9),
        entry: Bytes::from_static(entry),
    };
    let changes = vec![
        put_spool(4, b"waits"),
        put_spool(6, b"waits too"),
        put_inbox(3, b"has crossed"),
        Change::MarkInbox {
            seq: Seq(3),
            given: vec![0b101],
        },
        Change::SetReceived(Received {
            epoch: Epoch(u64::MAX - 1),
            upto: Seq(3),
            beyond: vec![Seq(5), Seq(8)],
        }),
    ];
    model.apply(Batch { number: 1, changes });
    let expected = |model: &Model| {
        let opening = Opening {
            spool_since: None,
            ..model.opening()
        };
        let mut spool = model.read_spool(Seq(0), usize::MAX, usize::MAX).0;
        for slot in spool.iter_mut().filter(|slot| slot.seq <= Seq(6)) {
            slot.accepted = None;
        }
        (opening, (spool, model.read_inbox(Seq(0), usize::MAX, usize::MAX).0))
    };
    assert_eq!((opening, read_all(&store, &answers)), expected(&model));

    let state = Change::PutState {
        key: Bytes::from_static(b"room"),
        value: Bytes::from_static(b"occupants"),
    };
    let batch = Batch {
        number: 1,
        changes: vec![state, put_spool(7, b"came later")],
    };
    model.apply(batch.clone());
    store.submit(Request::Commit(batch));
    store.close();
    let (store, answers, opening) = open(&path);
    assert_eq!((opening, read_all(&store, &answers)), expected(&model));
    store.close();
}

/// A log without its database is not taken for a new store's, and not thrown away.
#[test]
fn lone_log_is_refused() {
    let (_folder, path) = temp();
    let log = path.with_extension("sqlite-wal");
    fs::write(&log, "what waits").unwrap();
    assert_eq!(refusal(&path).fault, Fault::Orphan);
    assert_eq!(fs::read(&log).unwrap(), b"what waits");
    assert!(!path.exists());
}

/// A process that died while it made the store leaves nothing that is in the way.
#[test]
fn half_made_store_is_made_again() {
    let (folder, path) = temp();
    fs::write(path.with_extension("sqlite.new"), "SQLite format 3\0 and no more").unwrap();
    open(&path).0.close();
    let names: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["shore.sqlite"]);
}

/// Others on the machine cannot read what people wrote.
#[test]
fn only_the_owner_may_read() {
    let (_folder, path) = temp();
    let (store, answers, _) = open(&path);
    store.submit(put_spool(1, 1, 10));
    committed(&answers, 1);
    for file in [&path, &path.with_extension("sqlite-wal")] {
        let mode = fs::metadata(file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", file.display());
    }
    store.close();
}

/// A directory that is not there is said so.
#[test]
fn missing_directory_is_reported() {
    let (folder, _) = temp();
    let error = refusal(&folder.path().join("gone/shore.sqlite"));
    assert_eq!(error.fault, Fault::Io);
}

/// The file gives room back when it is no longer needed.
#[test]
fn file_shrinks_when_idle() {
    let (_folder, path) = temp();
    let (store, answers, _) = open(&path);
    for number in 1..=1000 {
        store.submit(put_spool(number, number, 20_000));
    }
    committed(&answers, 1000);
    let full = store.stats().bytes_on_disk();
    assert!(full > 20_000_000);
    store.submit(trim(1001, 1000));
    // Nothing tells when it is done but the file itself; a store that never shrinks ends in the test runner's own limit.
    while store.stats().bytes_on_disk() > 3_000_000 {
        std::thread::yield_now();
    }
    store.close();
}

/// A counter of this process, from /proc/self.
fn proc_self(file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/self/{file}")).expect("/proc is mounted");
    let line = text
        .lines()
        .find(|line| line.starts_with(name))
        .expect("the kernel counts this");
    let number = line
        .split_ascii_whitespace()
        .nth(1)
        .and_then(|number| number.parse().ok());
    number.expect("it is a number")
}

/// With a million entries a store opens by reading no more than with few, in little memory, after a crash as well.
///
/// Let the kernel count what a child reads while it opens, and what memory it has taken at most after reading it all in pieces.
#[test]
fn a_million_entries_open_at_once() {
    if let Some(path) = child_store() {
        let before = proc_self("io", "rchar:");
        let (store, answers, opening) = open(&path);
        let read = proc_self("io", "rchar:") - before;
        assert_eq!(
            (opening.levels.spool_entries, opening.spool_first),
            (1_000_000, Some(Seq(1)))
        );
        // The log is at most a checkpoint's worth and a group.
        assert!(read < 12 << 20, "opening read {read} bytes");
        let memory = proc_self("status", "VmHWM:");
        let entries = scan(&store, &answers);
        assert_eq!(entries, 1_000_000);
        let grown = proc_self("status", "VmHWM:") - memory;
        assert!(grown < 16 << 10, "reading it took {grown} KiB of memory");
        // Not closed: the next opening finds the log.
        store.submit(put_spool(1, 1_000_000, 300));
        committed(&answers, 1);
        std::process::exit(0);
    }
    let (_folder, path) = temp();
    let (store, answers, _) = open(&path);
    for number in 0..1000 {
        let changes = (1..=1000).map(|at| Change::PutSpool {
            seq: Seq(number * 1000 + at),
            accepted: Wall(number),
            entry: Bytes::from(vec![at as u8; 200]),
        });
        store.submit(Request::Commit(Batch {
            number,
            changes: changes.collect(),
        }));
        committed(&answers, number);
    }
    store.close();
    for _ in 0..2 {
        let output = child("a_million_entries_open_at_once", &path).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
}

/// Reads the spool in pieces and counts.
fn scan(store: &Store, answers: &mpsc::Receiver<Answer>) -> u64 {
    let mut from = Seq(0);
    let mut count = 0;
    loop {
        store.submit(Request::ReadSpool {
            from,
            entries_max: 1000,
            bytes_max: 1 << 20,
        });
        let (slots, end) = next_read(answers);
        count += slots.len() as u64;
        if end {
            return count;
        }
        from = Seq(slots.last().expect("there are more").seq.0 + 1);
    }
}
