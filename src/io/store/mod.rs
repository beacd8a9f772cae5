//! The durable store of one peer's link: spool, inbox, position and the state of rooms, in one SQLite file.
//!
//! One thread per store takes [`Request`]s from a channel, carries out what has gathered, makes it durable
//! with one flush, and answers. There is no timer in it: while a flush takes its time, the next group gathers.
//!
//! What it keeps true:
//! - The changes of a batch become durable together, and batches in their order: after any crash the file holds the batches 1 to k.
//! - [`Answer::Committed`] is given when the batch is on disk (`synchronous=FULL`). The one exception is a batch that does not
//!   [matter](Batch::matters): spool trims are answered at once and ride in the next commit, or in their own
//!   after [`TRIMS_MAX`] of them or [`TRIM_DELAY`]. Their loss is harmless; that of a mark or a drop in the inbox is not, so those
//!   never wait.
//! - A read sees every batch submitted before it, and shows nothing that is not on disk: a spool number that a peer has seen must not
//!   come to mean something else after a crash.
//! - A mark in the inbox is taken back at the next opening if its batch was not noted ([`Release`]) and the system has run since: nothing
//!   was written for it. After a restart of the system it cannot be known what was noted, and every mark counts.
//! - An opening reads the ends of spool and inbox and all of the rooms' state, which is bounded
//!   ([`STATE_BYTES_MAX`](crate::queue::journal::STATE_BYTES_MAX)), so it takes a bounded time however much waits.
//! - After the first error nothing more is accepted, read or answered. What failed is never tried again as if nothing had
//!   happened: after a failed flush the system may have forgotten what it did not write.
//!
//! # The file
//!
//! `<data_dir>/<peer>.sqlite`, with `-wal` beside it while narrows runs and after a crash; the two belong together. narrows holds it
//! alone (`database is locked` to all others), so look inside with `sqlite3` when narrows is stopped, or at a copy of both. In
//! `<peer>.sqlite-given` is noted which marks may have been written; without it, every mark counts.
//!
//! | table | row | columns |
//! | --- | --- | --- |
//! | `spool` | an entry that waits to cross | `seq` our number, `entry` as `codec::entry` writes it, `sum`, `accepted` when, in milliseconds since 1970 (`NULL` if version 2 wrote it) |
//! | `inbox` | an entry that has crossed and waits for the local server | `seq` the peer's number, `entry`, `sum` |
//! | `given` | of an inbox entry, the copies that were given to a leg, after the batch that has this `turn` | `seq`, `turn`, `copies` bit k for recipient k, `sum` |
//! | `rooms` | a piece of the rooms' state | `key` and `value` as the mirror writes them, `sum` |
//! | `state` | the only one | `epoch`; `spool_last`, the last number given out; entries and bytes of spool and inbox; rows and bytes of `rooms` (bytes as [`state_bytes`](crate::queue::journal::state_bytes) counts); `received_epoch`, `received_upto`, `received_beyond` (with commas): the position in the peer's numbering; `sum` |
//!
//! `sum` is the head of SHA-256 over the number (or the key) and the content. Epochs are unsigned and shown as signed. `PRAGMA application_id` is
//! "narw", `PRAGMA user_version` the version of these tables: 3. A file of version 2, which had neither `rooms` nor `accepted`, becomes one
//! of version 3 when it is opened; an older narrows then refuses it. `PRAGMA integrity_check` checks what SQLite knows of.
//!
//! WAL needs a local disk, not NFS. A disk that lies about flushes loses what it lied about.

mod database;
mod error;
mod log;

use std::{
    fmt, mem,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use self::database::Database;
pub use self::database::Release;
pub use self::error::{Fault, StoreError};
use crate::{
    codec::position::Seq,
    metrics::STORE_COMMIT,
    queue::journal::{Batch, Change, Levels, Opening, Slot},
};

/// Batches that only trim and may wait for a commit together.
pub const TRIMS_MAX: u32 = 256;

/// How long they may wait.
pub const TRIM_DELAY: Duration = Duration::from_secs(1);

/// Bytes of entries in one commit: bounds what the first of a group waits for the last.
const GROUP_BYTES_MAX: usize = 4 << 20;

/// Batches in one commit.
const GROUP_BATCHES_MAX: u32 = 1024;

/// Without requests for so long, a file with much free room is made smaller, step by step.
const IDLE_AFTER: Duration = Duration::from_millis(200);

/// What the store is asked to do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Request {
    Commit(Batch),
    /// Slots from a number on. At least one is given if there is one and `entries_max` is not 0, however large it is.
    ReadSpool {
        from: Seq,
        entries_max: usize,
        bytes_max: usize,
    },
    ReadInbox {
        from: Seq,
        entries_max: usize,
        bytes_max: usize,
    },
}

/// What the store says, in the order of the requests.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Answer {
    /// This and all earlier batches are on disk; of those that do not [matter](Batch::matters), see the module's comment.
    Committed {
        batch: u64,
        /// What the store holds now.
        levels: Levels,
    },
    /// `end`: no slot follows these.
    Spool {
        slots: Vec<Slot>,
        end: bool,
    },
    Inbox {
        slots: Vec<Slot>,
        end: bool,
    },
    /// The last answer. Nothing after what was last answered is accepted.
    Failed(StoreError),
}

/// How a store is kept.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Options {
    /// The file does not grow beyond (the log beside it adds some MiB); reaching it is [`Fault::Full`]. A last line of defence: the relay
    /// counts bytes and refuses long before. Default: none.
    pub file_bytes_max: Option<u64>,
    /// What names this run of the operating system. Another one means that there was a restart, perhaps a power cut; then, and without it,
    /// every mark in the inbox counts. Default: the kernel's boot id.
    pub boot_id: Option<BootId>,
}

/// A UUID as the kernel writes it.
pub type BootId = [u8; 36];

impl Default for Options {
    fn default() -> Self {
        let boot = std::fs::read("/proc/sys/kernel/random/boot_id").ok();
        Self {
            file_bytes_max: None,
            boot_id: boot.and_then(|boot| boot.first_chunk().copied()),
        }
    }
}

/// Counters of a store, readable from any thread.
#[derive(Debug, Default)]
pub struct Stats {
    commits: AtomicU64,
    commit_nanos: AtomicU64,
    bytes_on_disk: AtomicU64,
    submitted: AtomicU64,
    handled: AtomicU64,
}

impl Stats {
    /// Commits, each with one flush or more.
    pub fn commits(&self) -> u64 {
        self.commits.load(Ordering::Relaxed)
    }

    /// The time spent in them.
    pub fn commit_time(&self) -> Duration {
        Duration::from_nanos(self.commit_nanos.load(Ordering::Relaxed))
    }

    /// The database and its log, after the last commit.
    pub fn bytes_on_disk(&self) -> u64 {
        self.bytes_on_disk.load(Ordering::Relaxed)
    }

    /// Requests that were submitted.
    pub fn submitted(&self) -> u64 {
        self.submitted.load(Ordering::Relaxed)
    }

    /// Requests that were taken from the channel; the rest of [`Stats::submitted`] waits in it.
    pub fn handled(&self) -> u64 {
        self.handled.load(Ordering::Relaxed)
    }
}

/// A handle on the thread that owns the file.
///
/// Dropping it without [`Store::close`] lets the thread finish what was submitted, without waiting for it.
pub struct Store {
    /// Unbounded, so that a submitter never blocks: who submits bounds what it has outstanding.
    requests: mpsc::Sender<Request>,
    thread: thread::JoinHandle<()>,
    stats: Arc<Stats>,
    release: Arc<Release>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("stats", &self.stats)
            .finish_non_exhaustive()
    }
}

/// Opens the store in `path`, or creates it if there is no such file; its directory must exist.
///
/// `answers` is called on the store's thread and must not block: pass on to a channel.
pub fn open(
    path: &Path,
    options: Options,
    answers: impl Fn(Answer) + Send + 'static,
) -> Result<(Store, Opening), StoreError> {
    let (database, opening) = Database::open(path, &options)?;
    let stats = Arc::new(Stats::default());
    stats.bytes_on_disk.store(database.bytes_on_disk(), Ordering::Relaxed);
    let release = database.release();
    let (requests, incoming) = mpsc::channel();
    let writer = Writer {
        database,
        answers,
        stats: Arc::clone(&stats),
        commit_seconds: STORE_COMMIT.handle(()),
        group: Group::Empty,
    };
    let thread = thread::Builder::new()
        .name("store".into())
        .spawn(move || writer.run(&incoming))
        .map_err(|error| StoreError::io(path, &error))?;
    let store = Store {
        requests,
        thread,
        stats,
        release,
    };
    Ok((store, opening))
}

impl Store {
    /// Hands a request over. After [`Answer::Failed`] it goes nowhere.
    pub fn submit(&self, request: Request) {
        self.stats.submitted.fetch_add(1, Ordering::Relaxed);
        // The thread ends early only after it has said `Failed`.
        let _ = self.requests.send(request);
    }

    pub fn stats(&self) -> Arc<Stats> {
        Arc::clone(&self.stats)
    }

    /// For whoever writes what is marked.
    pub fn release(&self) -> Arc<Release> {
        Arc::clone(&self.release)
    }

    /// Waits until all that was submitted is done and answered, and the file is closed. Not to be called from `answers`.
    pub fn close(self) {
        let Self { requests, thread, .. } = self;
        drop(requests);
        // A panic in `answers` has been printed by its thread; the file is as after a crash, which is fine.
        let _ = thread.join();
    }
}

/// What the open transaction holds.
#[derive(Debug)]
enum Group {
    Empty,
    /// Only trims, answered already.
    Trims {
        batches: u32,
        since: Instant,
    },
    /// To be committed and answered before anything else is answered.
    Due {
        batches: u32,
        bytes: usize,
        last: u64,
    },
}

struct Writer<F> {
    database: Database,
    answers: F,
    stats: Arc<Stats>,
    commit_seconds: metrics::Histogram,
    group: Group,
}

impl<F: Fn(Answer)> Writer<F> {
    fn run(mut self, incoming: &mpsc::Receiver<Request>) {
        match self.serve(incoming).and_then(|()| self.commit()) {
            Ok(()) => {
                if let Err(error) = self.database.close() {
                    (self.answers)(Answer::Failed(error));
                }
            }
            Err(error) => {
                // The file is let go first: who is told may want to look at it.
                drop(self.database);
                (self.answers)(Answer::Failed(error));
            }
        }
    }

    /// Until nobody can submit any more.
    fn serve(&mut self, incoming: &mpsc::Receiver<Request>) -> Result<(), StoreError> {
        // How long to wait for a request before the file is made smaller; `None` when there is nothing to give back.
        let mut patience = Some(IDLE_AFTER);
        loop {
            let wait = match &self.group {
                Group::Trims { since, .. } => Some(TRIM_DELAY.saturating_sub(since.elapsed())),
                Group::Empty | Group::Due { .. } => patience,
            };
            let request = match wait {
                None => incoming.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
                Some(wait) => incoming.recv_timeout(wait),
            };
            match request {
                Ok(request) => {
                    self.gather(request, incoming)?;
                    patience = Some(IDLE_AFTER);
                }
                Err(mpsc::RecvTimeoutError::Timeout) => match self.group {
                    Group::Trims { .. } => self.commit()?,
                    Group::Empty | Group::Due { .. } => {
                        patience = self.database.shrink_a_little()?.then_some(Duration::ZERO);
                        self.measure();
                    }
                },
                Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    }

    /// Carries out a request and those that have come meanwhile, up to a full group, and commits.
    fn gather(&mut self, first: Request, incoming: &mpsc::Receiver<Request>) -> Result<(), StoreError> {
        let mut next = Some(first);
        while let Some(request) = next {
            self.handle(request)?;
            self.stats.handled.fetch_add(1, Ordering::Relaxed);
            next = match self.group {
                Group::Due { batches, bytes, .. } if batches >= GROUP_BATCHES_MAX || bytes >= GROUP_BYTES_MAX => None,
                Group::Trims { batches, since } if batches >= TRIMS_MAX || since.elapsed() >= TRIM_DELAY => {
                    return self.commit();
                }
                Group::Empty | Group::Trims { .. } | Group::Due { .. } => incoming.try_recv().ok(),
            };
        }
        match self.group {
            Group::Due { .. } => self.commit(),
            Group::Empty | Group::Trims { .. } => Ok(()),
        }
    }

    fn handle(&mut self, request: Request) -> Result<(), StoreError> {
        match request {
            Request::Commit(batch) => self.carry_out(&batch),
            Request::ReadSpool {
                from,
                entries_max,
                bytes_max,
            } => {
                self.commit_what_is_due()?;
                let (slots, end) = self.database.read_spool(from, entries_max, bytes_max)?;
                (self.answers)(Answer::Spool { slots, end });
                Ok(())
            }
            Request::ReadInbox {
                from,
                entries_max,
                bytes_max,
            } => {
                self.commit_what_is_due()?;
                let (slots, end) = self.database.read_inbox(from, entries_max, bytes_max)?;
                (self.answers)(Answer::Inbox { slots, end });
                Ok(())
            }
        }
    }

    fn carry_out(&mut self, batch: &Batch) -> Result<(), StoreError> {
        for change in &batch.changes {
            self.database.carry_out(change, batch.number)?;
        }
        let size = batch.changes.iter().map(size_of_change).sum::<usize>();
        let last = batch.number;
        self.group = match mem::replace(&mut self.group, Group::Empty) {
            Group::Empty if batch.matters() => Group::Due {
                batches: 1,
                bytes: size,
                last,
            },
            Group::Trims { batches, .. } if batch.matters() => Group::Due {
                batches: batches + 1,
                bytes: size,
                last,
            },
            Group::Empty => Group::Trims {
                batches: 1,
                since: Instant::now(),
            },
            Group::Trims { batches, since } => Group::Trims {
                batches: batches + 1,
                since,
            },
            Group::Due {
                batches,
                bytes,
                last: _,
            } => Group::Due {
                batches: batches + 1,
                bytes: bytes + size,
                last,
            },
        };
        match self.group {
            // All that matters before it is on disk, or the group would be due.
            Group::Trims { .. } => self.answer_committed(last),
            Group::Empty | Group::Due { .. } => {}
        }
        Ok(())
    }

    fn commit_what_is_due(&mut self) -> Result<(), StoreError> {
        match self.group {
            Group::Due { .. } => self.commit(),
            Group::Empty | Group::Trims { .. } => Ok(()),
        }
    }

    /// Makes the group durable and answers for it.
    fn commit(&mut self) -> Result<(), StoreError> {
        let group = mem::replace(&mut self.group, Group::Empty);
        if matches!(group, Group::Empty) {
            return Ok(());
        }
        let begun = Instant::now();
        self.database.commit()?;
        let took = begun.elapsed();
        self.commit_seconds.record(took);
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.stats.commits.fetch_add(1, Ordering::Relaxed);
        self.stats.commit_nanos.fetch_add(took, Ordering::Relaxed);
        match group {
            Group::Due { last, .. } => self.answer_committed(last),
            Group::Empty | Group::Trims { .. } => {}
        }
        self.database.checkpoint_if_due()?;
        self.measure();
        Ok(())
    }

    fn answer_committed(&self, batch: u64) {
        let levels = self.database.levels();
        (self.answers)(Answer::Committed { batch, levels });
    }

    fn measure(&self) {
        let bytes = self.database.bytes_on_disk();
        self.stats.bytes_on_disk.store(bytes, Ordering::Relaxed);
    }
}

/// About what a change adds to a commit.
fn size_of_change(change: &Change) -> usize {
    match change {
        Change::PutSpool { entry, .. } | Change::PutInbox { entry, .. } => entry.len(),
        Change::MarkInbox { given, .. } => given.len(),
        Change::DropSpool { beyond, .. } => beyond.len() * size_of::<Seq>(),
        Change::PutState { key, value } => key.len() + value.len(),
        Change::DropState { key } => key.len(),
        Change::DropInbox { .. } | Change::SetReceived(_) => 0,
    }
}
