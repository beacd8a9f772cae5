//! A load for a store whose every batch follows from its number, so that what a crash left can be told exactly.

use std::{
    collections::VecDeque,
    io::{self, Write},
    path::Path,
    sync::mpsc,
};

use bytes::Bytes;
use narrows::{
    codec::position::{Epoch, Received, Seq},
    io::store::{self, Answer, Options, Request, Store},
    queue::journal::{Batch, Change, Model, Opening, Slot},
    time::Wall,
};

/// Batches that the load keeps unanswered, so that commits group.
const OUTSTANDING_MAX: usize = 8;

/// Entries behind the newest that stay, in spool and inbox.
const WINDOW: u64 = 20;

/// Batch `number` of the load; the position tells after a crash how far it went, except for a trim at its end.
pub fn batch(number: u64) -> Batch {
    let old = number.saturating_sub(WINDOW);
    let changes = if number % 5 == 4 {
        vec![Change::DropSpool {
            upto: Seq(2 * old),
            beyond: vec![Seq(2 * old + 3)],
        }]
    } else {
        let put = |seq, size| Change::PutSpool {
            seq: Seq(seq),
            accepted: Wall(seq),
            entry: content(seq, size),
        };
        vec![
            // An open cast grows: its slot is written again.
            put((2 * number).saturating_sub(2).max(1), 3000),
            put(2 * number - 1, 400),
            put(2 * number, 6000),
            Change::PutInbox {
                seq: Seq(number),
                entry: content(number, 9000),
            },
            Change::MarkInbox {
                seq: Seq(number - 1),
                given: vec![number as u8; 1 + number as usize % 30],
            },
            Change::DropInbox { seq: Seq(old) },
            Change::SetReceived(Received {
                epoch: Epoch(u64::MAX - 1),
                upto: Seq(number),
                beyond: vec![Seq(number + 2), Seq(number + 5)],
            }),
            // Rows of all ages, some of which are replaced often and some dropped.
            Change::PutState {
                key: key(number % 7),
                value: content(number, 5000),
            },
            Change::PutState {
                key: key(number),
                value: content(number, 300),
            },
            Change::DropState { key: key(old) },
        ]
    };
    Batch { number, changes }
}

/// Keys of different lengths.
fn key(number: u64) -> Bytes {
    format!("{number}@{}", "room".repeat(number as usize % 50)).into()
}

/// Some bytes, up to `size`, that differ with the number.
fn content(number: u64, size: u64) -> Bytes {
    let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
    let length = mixed % size;
    (0..length).map(|at| (mixed.wrapping_add(at * at) >> 3) as u8).collect()
}

/// Opens a store whose answers can be waited for.
pub fn open_with(path: &Path, options: Options) -> (Store, mpsc::Receiver<Answer>, Opening) {
    let (answers, incoming) = mpsc::channel();
    let (store, opening) = store::open(path, options, move |answer| {
        // Who no longer listens has seen enough.
        let _ = answers.send(answer);
    })
    .unwrap_or_else(|error| panic!("{error}"));
    (store, incoming, opening)
}

/// Runs the load for ever, going on where the store is, and writes the number of each answer to `answered`. Returns what stopped it.
pub fn run(path: &Path, options: Options, mut answered: impl Write) -> io::Error {
    let (store, answers, opening) = open_with(path, options);
    let mut outstanding = VecDeque::new();
    let mut next = opening.received.upto.0 + 1;
    loop {
        while outstanding.len() < OUTSTANDING_MAX {
            store.submit(Request::Commit(batch(next)));
            outstanding.push_back(next);
            next += 1;
        }
        match answers.recv() {
            Ok(Answer::Committed { batch: upto, .. }) => {
                outstanding.retain(|&number| number > upto);
                // As before a write to a leg.
                let noted = store.release().note(upto);
                if let Err(error) = noted.and_then(|()| answered.write_all(&upto.to_be_bytes())) {
                    return error;
                }
            }
            Ok(Answer::Failed(error)) => return io::Error::other(error),
            Ok(answer) => return io::Error::other(format!("unexpected: {answer:?}")),
            Err(gone) => return io::Error::other(gone),
        }
    }
}

/// Follows a store through its crashes.
#[derive(Debug)]
pub struct Checker {
    options: Options,
    model: Model,
    applied: u64,
}

impl Checker {
    /// `options` are those of the load.
    pub fn new(options: Options) -> Self {
        Self {
            options,
            model: Model::new(Epoch(0)),
            applied: 0,
        }
    }

    /// Opens the store after a crash and compares all that is in it with what the load has written; `answered` was answered.
    pub fn check(&mut self, path: &Path, answered: u64) {
        let (store, answers, opening) = open_with(path, self.options.clone());
        let found = opening.received.upto.0;
        // A trim after the last position may be there or not; that load goes over it again.
        let trim = batch(found + 1);
        let matters_upto = (1..=answered)
            .rev()
            .find(|&number| batch(number).matters())
            .unwrap_or(0);
        assert!(found >= matters_upto, "{answered} was answered, {found} found");
        let actual = (opening.clone(), read_all(&store, &answers));
        store.close();
        // Of the last commits, if they were not noted, the marks are taken back.
        let is_there = |told: u64| {
            let model = self.after(told, found);
            let mut trimmed = model.clone();
            trimmed.apply(trim.clone());
            let same = |model: &Model| contents(model, opening.epoch) == actual;
            (same(&model) || (!trim.matters() && same(&trimmed))).then_some(model)
        };
        let first = self.applied.max(answered.min(found));
        let model = (first..=found).rev().find_map(is_there);
        self.model = model.unwrap_or_else(|| panic!("differs after batch {found}, {answered} answered"));
        self.applied = found;
    }

    /// The model after all batches up to `found`, of which those after `told` have left no marks.
    fn after(&self, told: u64, found: u64) -> Model {
        assert!(found >= self.applied, "went back from {} to {found}", self.applied);
        let mut model = self.model.clone();
        for next in self.applied + 1..=found {
            let mut batch = batch(next);
            if next > told && self.options.boot_id.is_some() {
                batch
                    .changes
                    .retain(|change| !matches!(change, Change::MarkInbox { .. }));
            }
            model.apply(batch);
        }
        model.commit(found);
        model
    }
}

type Contents = (Opening, (Vec<Slot>, Vec<Slot>));

fn contents(model: &Model, epoch: Epoch) -> Contents {
    let opening = Opening {
        epoch,
        ..model.opening()
    };
    let spool = model.read_spool(Seq(0), usize::MAX, usize::MAX).0;
    let inbox = model.read_inbox(Seq(0), usize::MAX, usize::MAX).0;
    (opening, (spool, inbox))
}

/// All of the spool and all of the inbox.
pub fn read_all(store: &Store, answers: &mpsc::Receiver<Answer>) -> (Vec<Slot>, Vec<Slot>) {
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
    match (answers.recv(), answers.recv()) {
        (
            Ok(Answer::Spool {
                slots: spool,
                end: true,
            }),
            Ok(Answer::Inbox {
                slots: inbox,
                end: true,
            }),
        ) => (spool, inbox),
        other => panic!("unexpected: {other:?}"),
    }
}
