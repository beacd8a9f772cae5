//! The durable store: against its model, under kill -9, with a full disk, a damaged file, and a million entries.

use std::{
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
    queue::journal::{Batch, Change, Model, Slot},
};
use proptest::prelude::*;

use self::store_load::{Checker, open, read_all};

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

fn put_spool(number: u64, seq: u64, size: usize) -> Request {
    let entry = Bytes::from(vec![seq as u8; size]);
    let changes = vec![Change::PutSpool { seq: Seq(seq), entry }];
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
    let entry = || prop_oneof![0..50_usize, 0..5000_usize].prop_map(|size| Bytes::from(vec![b'x'; size]));
    prop_oneof![
        4 => (seq(), entry()).prop_map(|(seq, entry)| Change::PutSpool { seq, entry }),
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
        let error = store_load::run(&path, io::stderr());
        panic!("{error}");
    }
    let (_folder, path) = temp();
    let mut checker = Checker::new();
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

/// A store with a few entries and no log, closed; and what is in it.
fn filled(path: &Path) -> (Vec<Slot>, Vec<Slot>) {
    let (store, answers, _) = open(path);
    for number in 1..=60 {
        store.submit(Request::Commit(store_load::batch(number)));
    }
    committed(&answers, 60);
    let everything = read_all(&store, &answers);
    store.close();
    everything
}

/// Opens and reads everything; every outcome but a panic is returned.
fn try_all(path: &Path) -> Result<(Vec<Slot>, Vec<Slot>), StoreError> {
    let (answers, incoming) = mpsc::channel();
    let (store, _) = store::open(path, Options::default(), move |answer| {
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
        (Ok(Answer::Spool { slots: spool, .. }), Ok(Answer::Inbox { slots: inbox, .. })) => Ok((spool, inbox)),
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
    let (store, answers, _) = open(&path);
    let mut states = Vec::new();
    // The last two matter, so that each has a commit of its own.
    for number in 1..=38 {
        store.submit(Request::Commit(store_load::batch(number)));
        committed(&answers, number);
        states.push(read_all(&store, &answers));
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
        assert!(read == (vec![], vec![]) || states.contains(&read), "cut at {length}");
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
        (altered(60, &[0, 0, 0, 2]), Fault::Version),
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
