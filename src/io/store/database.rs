//! The tables, and the statements on them. One thread uses it; it knows nothing of requests and answers.

use std::{
    collections::BTreeMap,
    fmt, fs,
    io::{ErrorKind, Read},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Row, config::DbConfig, params};
use sha2::{Digest, Sha256};

use super::{
    BootId, Options,
    error::{Fault, StoreError},
    log,
};
use crate::{
    codec::position::{Epoch, Received, Seq},
    queue::journal::{
        Change, Levels, Opening, STATE_BYTES_MAX, STATE_KEY_BYTES_MAX, STATE_VALUE_BYTES_MAX, Slot, state_bytes,
    },
    time::Wall,
};

/// "narw": `file(1)` and we tell our files by it.
const APPLICATION_ID: i64 = 0x6e61_7277;

/// Of the tables below. A file of another version is left alone, but for [`BEFORE_ROOMS`].
const FORMAT_VERSION: i64 = 3;

/// The version that had no table `rooms`, no count of it in the table `state`, and no `accepted` in the table `spool`.
/// [`Database::upgrade`] makes one of ours of it.
const BEFORE_ROOMS: i64 = 2;

/// Bytes: what SQLite keeps at the beginning of its files.
const HEADER_SIZE: u64 = 100;

/// Bytes. A commit writes whole pages: small ones halve what a slow flash has to take, against the usual 4096.
const PAGE_SIZE: u64 = 2048;

/// How long a lock is waited for: an earlier process may be on its way out.
const LOCK_WAIT: Duration = Duration::from_secs(2);

/// Pages in the write-ahead log (4 MiB) after which they are moved into the database. It bounds what is read at the next opening
/// after a crash; a smaller one would write often-changed pages more often.
const CHECKPOINT_PAGES: i64 = 2048;

/// Free pages (1 MiB) that the file keeps, so that it is not shrunk and grown again all day.
const FREE_PAGES_KEPT: i64 = 512;

/// Pages (256 KiB) given back in one step, so that a request never waits for long.
const SHRINK_PAGES: i64 = 128;

const SCHEMA: &str = "
CREATE TABLE spool (seq INTEGER PRIMARY KEY, entry BLOB NOT NULL, sum INTEGER NOT NULL, accepted INTEGER) STRICT;
CREATE TABLE inbox (seq INTEGER PRIMARY KEY, entry BLOB NOT NULL, sum INTEGER NOT NULL) STRICT;
CREATE TABLE given (
    seq INTEGER NOT NULL,
    turn INTEGER NOT NULL,
    copies BLOB NOT NULL,
    sum INTEGER NOT NULL,
    PRIMARY KEY (seq, turn)
) STRICT, WITHOUT ROWID;
CREATE TABLE rooms (key BLOB PRIMARY KEY, value BLOB NOT NULL, sum INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE state (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    epoch INTEGER NOT NULL,
    spool_last INTEGER NOT NULL,
    spool_entries INTEGER NOT NULL,
    spool_bytes INTEGER NOT NULL,
    inbox_entries INTEGER NOT NULL,
    inbox_bytes INTEGER NOT NULL,
    received_epoch INTEGER NOT NULL,
    received_upto INTEGER NOT NULL,
    received_beyond TEXT NOT NULL,
    sum INTEGER NOT NULL,
    rooms_rows INTEGER NOT NULL DEFAULT 0,
    rooms_bytes INTEGER NOT NULL DEFAULT 0
) STRICT;
";

/// What `SCHEMA` has and version 2 had not. Version 2 kept one state of an entry's marks: all that it has count. The sums in the tables
/// `state` and `spool` stay as they are: where `rooms` is empty and `accepted` is not known, they cover the same.
const UPGRADE: &str = "
CREATE TABLE rooms (key BLOB PRIMARY KEY, value BLOB NOT NULL, sum INTEGER NOT NULL) STRICT, WITHOUT ROWID;
ALTER TABLE state ADD COLUMN rooms_rows INTEGER NOT NULL DEFAULT 0;
ALTER TABLE state ADD COLUMN rooms_bytes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE spool ADD COLUMN accepted INTEGER;
ALTER TABLE given RENAME TO given_2;
CREATE TABLE given (
    seq INTEGER NOT NULL,
    turn INTEGER NOT NULL,
    copies BLOB NOT NULL,
    sum INTEGER NOT NULL,
    PRIMARY KEY (seq, turn)
) STRICT, WITHOUT ROWID;
INSERT INTO given (seq, turn, copies, sum) SELECT seq, 0, copies, sum FROM given_2;
DROP TABLE given_2;
";

/// An open store file, held alone.
#[derive(Debug)]
pub(super) struct Database {
    connection: Connection,
    path: PathBuf,
    wal_path: PathBuf,
    state: State,
    in_transaction: bool,
    release: Arc<Release>,
}

/// The one row of the table `state`, as the open transaction will leave it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct State {
    epoch: Epoch,
    spool_last: Seq,
    spool: Holding,
    inbox: Holding,
    rooms: Holding,
    received: Received,
}

/// What a table holds, so that nobody has to count.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Holding {
    entries: u64,
    bytes: u64,
}

impl fmt::Display for Holding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rows of {} bytes", self.entries, self.bytes)
    }
}

impl Holding {
    fn add(&mut self, bytes: u64) {
        self.entries += 1;
        self.bytes += bytes;
    }

    /// `None` if more is taken than is held.
    fn remove(&mut self, entries: u64, bytes: u64) -> Option<()> {
        *self = Self {
            entries: self.entries.checked_sub(entries)?,
            bytes: self.bytes.checked_sub(bytes)?,
        };
        Some(())
    }
}

impl Database {
    /// Opens the file, or creates it if there is none. A file that is there is never replaced, whatever is in it.
    pub(super) fn open(path: &Path, options: &Options) -> Result<(Self, Opening), StoreError> {
        let wal_path = beside(path, "-wal");
        let there = path.try_exists().map_err(|error| StoreError::io(path, &error))?;
        if !there {
            // SQLite would take the old log for the new database's own.
            if wal_path.try_exists().map_err(|error| StoreError::io(path, &error))? {
                return Err(StoreError::new(path, Fault::Orphan, wal_path.display().to_string()));
            }
            create(path)?;
        }
        check_header(path)?;
        let fail = |error| StoreError::sqlite(path, &error);
        let connection = connect(path, false).map_err(fail)?;
        if let Some(bytes) = options.file_bytes_max {
            let pages = i64::try_from(bytes / PAGE_SIZE).unwrap_or(i64::MAX).max(1);
            let _: i64 = connection
                .pragma_update_and_check(None, "max_page_count", pages, |row| row.get(0))
                .map_err(fail)?;
        }
        // Not the header's: that of the log counts, if it has one.
        let version = connection
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .map_err(fail)?;
        check_version(path, version)?;
        let state = read_state(&connection, version).map_err(fail)?.ok_or_else(|| {
            StoreError::new(
                path,
                Fault::Corrupt,
                "the row in table state does not match its checksum",
            )
        })?;
        let release_path = beside(path, "-given");
        let fail_note = |error| StoreError::io(&release_path, &error);
        let (release, released) = Release::open(&release_path, options.boot_id, state.epoch).map_err(fail_note)?;
        let mut database = Self {
            connection,
            path: path.to_owned(),
            wal_path,
            state,
            in_transaction: false,
            release: Arc::new(release),
        };
        database.check_ends()?;
        let rooms = match version {
            BEFORE_ROOMS => BTreeMap::new(),
            _ => database.read_rooms()?,
        };
        database.take_over_log()?;
        if version == BEFORE_ROOMS {
            database.upgrade()?;
        }
        let last = undo_marks(&mut database.connection, released).map_err(fail)?;
        database.release.begin(last).map_err(fail_note)?;
        let opening = database.opening(rooms)?;
        Ok((database, opening))
    }

    /// Makes a file of version 3 of one of version 2: whole or not at all.
    fn upgrade(&self) -> Result<(), StoreError> {
        let upgraded = self.connection.execute_batch("BEGIN IMMEDIATE").and_then(|()| {
            self.connection.execute_batch(UPGRADE)?;
            self.connection.pragma_update(None, "user_version", FORMAT_VERSION)?;
            self.connection.execute_batch("COMMIT")
        });
        upgraded.map_err(|error| self.failed(error))?;
        // An older narrows, which looks at the header of the database, is to see it there.
        self.wal("PRAGMA wal_checkpoint(TRUNCATE)").map(|_| ())
    }

    /// Looks at both ends of the tables only: the whole of a large file is not read at every start.
    fn check_ends(&self) -> Result<(), StoreError> {
        for (table, holding) in [("spool", self.state.spool), ("inbox", self.state.inbox)] {
            let (first, last) = self.ends(table)?;
            let empty = first.is_none();
            if empty != (holding.entries == 0) || (empty && holding.bytes != 0) {
                let counted = holding.entries;
                return Err(self.corrupt(format!(
                    "table state counts {counted} rows in {table}, which begins with {first:?}"
                )));
            }
            if table == "spool" && last.is_some_and(|last| last > self.state.spool_last) {
                return Err(self.corrupt(format!("the spool holds {last:?} after its last number")));
            }
        }
        Ok(())
    }

    /// All of the table `rooms`, which must be as much as is counted.
    fn read_rooms(&self) -> Result<BTreeMap<Bytes, Bytes>, StoreError> {
        let fail = |error| self.failed(error);
        let mut statement = self
            .connection
            .prepare("SELECT key, value, sum FROM rooms ORDER BY key")
            .map_err(fail)?;
        let mut rows = statement.query([]).map_err(fail)?;
        let counted = self.state.rooms;
        let mut rooms = BTreeMap::new();
        let mut held = Holding::default();
        while let Some(row) = rows.next().map_err(fail)? {
            let (key, value, sum) = read_room(row).map_err(fail)?;
            if room_checksum(&key, &value) != sum {
                let before = held.entries;
                return Err(self.corrupt(format!(
                    "the row after {before} of table rooms does not match its checksum"
                )));
            }
            held.add(state_bytes(key.len(), value.len()));
            let twice = rooms.insert(key, value).is_some();
            // A damaged tree may go round in circles.
            if twice || held.bytes > counted.bytes {
                break;
            }
        }
        if held != counted || rooms.len() as u64 != counted.entries {
            return Err(self.corrupt(format!(
                "table state counts {counted} in table rooms, where {held} or more were found"
            )));
        }
        Ok(rooms)
    }

    /// Makes sure that nothing is missing from the log of an earlier life, and empties it.
    fn take_over_log(&self) -> Result<(), StoreError> {
        let (logged, _) = self.wal("PRAGMA wal_checkpoint(NOOP)")?;
        let damage = log::damage(&self.wal_path, logged.unsigned_abs());
        if let Some(detail) = damage.map_err(|error| StoreError::io(&self.wal_path, &error))? {
            return Err(StoreError::new(&self.wal_path, Fault::Corrupt, detail));
        }
        self.wal("PRAGMA wal_checkpoint(TRUNCATE)").map(|_| ())
    }

    fn ends(&self, table: &str) -> Result<(Option<Seq>, Option<Seq>), StoreError> {
        // Two look-ups: SQLite answers min and max of one query together with a scan.
        let sql = format!("SELECT (SELECT min(seq) FROM {table}), (SELECT max(seq) FROM {table})");
        self.connection
            .query_row(&sql, [], |row| Ok((row.get(0)?, row.get(1)?)))
            .map(|(first, last): (Option<i64>, Option<i64>)| (first.map(seq_of), last.map(seq_of)))
            .map_err(|error| self.failed(error))
    }

    fn opening(&self, rooms: BTreeMap<Bytes, Bytes>) -> Result<Opening, StoreError> {
        let (spool_first, _) = self.ends("spool")?;
        let (_, inbox_last) = self.ends("inbox")?;
        let State {
            epoch,
            spool_last,
            received,
            ..
        } = &self.state;
        Ok(Opening {
            epoch: *epoch,
            spool_first,
            spool_last: *spool_last,
            spool_since: self.spool_since()?,
            levels: self.levels(),
            inbox_last: inbox_last.unwrap_or_default(),
            received: received.clone(),
            state: rooms,
        })
    }

    /// When the first slot of the spool was accepted.
    fn spool_since(&self) -> Result<Option<Wall>, StoreError> {
        self.connection
            .query_row("SELECT accepted FROM spool ORDER BY seq LIMIT 1", [], |row| row.get(0))
            .optional()
            .map(|accepted: Option<Option<i64>>| accepted.flatten().map(wall_of))
            .map_err(|error| self.failed(error))
    }

    pub(super) fn levels(&self) -> Levels {
        let State { spool, inbox, .. } = &self.state;
        Levels {
            spool_entries: spool.entries,
            spool_bytes: spool.bytes,
            inbox_entries: inbox.entries,
            inbox_bytes: inbox.bytes,
        }
    }

    /// Carries out a change within the open transaction, which it begins if there is none. After an error only
    /// dropping the database is right.
    pub(super) fn carry_out(&mut self, change: &Change, batch: u64) -> Result<(), StoreError> {
        if !self.in_transaction {
            self.execute("BEGIN IMMEDIATE", [])?;
            self.in_transaction = true;
        }
        match change {
            Change::PutSpool { seq, accepted, entry } => self.put_spool(*seq, *accepted, entry),
            Change::DropSpool { upto, beyond } => self.drop_spool(*upto, beyond),
            Change::PutInbox { seq, entry } => self.put_inbox(*seq, entry),
            Change::MarkInbox { seq, given } => self.mark_inbox(*seq, given, batch),
            Change::DropInbox { seq } => self.drop_inbox(*seq),
            Change::SetReceived(received) => {
                self.state.received.clone_from(received);
                Ok(())
            }
            Change::PutState { key, value } => self.put_room(key, value),
            Change::DropState { key } => self.drop_room(key),
        }
    }

    fn put_spool(&mut self, seq: Seq, accepted: Wall, entry: &Bytes) -> Result<(), StoreError> {
        let id = self.row_id(seq)?;
        // A new number needs no look-up.
        if seq <= self.state.spool_last
            && let Some(before) = self.length("SELECT length(entry) FROM spool WHERE seq = ?1", id)?
        {
            self.take_from_spool(1, before)?;
        }
        // Milliseconds above 2^63-1 are no date.
        let accepted = i64::try_from(accepted.0).unwrap_or(i64::MAX);
        self.execute(
            "INSERT OR REPLACE INTO spool (seq, entry, sum, accepted) VALUES (?1, ?2, ?3, ?4)",
            params![id, &entry[..], slot_checksum(seq, Some(accepted), entry), accepted],
        )?;
        self.state.spool.add(entry.len() as u64);
        self.state.spool_last = self.state.spool_last.max(seq);
        Ok(())
    }

    fn drop_spool(&mut self, upto: Seq, beyond: &[Seq]) -> Result<(), StoreError> {
        // What is above cannot be a row.
        let upto = i64::try_from(upto.0).unwrap_or(i64::MAX);
        let (entries, bytes): (i64, i64) = self
            .connection
            .prepare_cached("SELECT count(*), coalesce(sum(length(entry)), 0) FROM spool WHERE seq <= ?1")
            .and_then(|mut statement| statement.query_row([upto], |row| Ok((row.get(0)?, row.get(1)?))))
            .map_err(|error| self.failed(error))?;
        if entries > 0 {
            self.execute("DELETE FROM spool WHERE seq <= ?1", [upto])?;
            self.take_from_spool(entries.unsigned_abs(), bytes.unsigned_abs())?;
        }
        for id in beyond.iter().filter_map(|seq| i64::try_from(seq.0).ok()) {
            if let Some(bytes) = self.length("SELECT length(entry) FROM spool WHERE seq = ?1", id)? {
                self.execute("DELETE FROM spool WHERE seq = ?1", [id])?;
                self.take_from_spool(1, bytes)?;
            }
        }
        Ok(())
    }

    fn take_from_spool(&mut self, entries: u64, bytes: u64) -> Result<(), StoreError> {
        let taken = self.state.spool.remove(entries, bytes);
        taken.ok_or_else(|| self.corrupt("the spool holds more than table state counts"))
    }

    fn put_inbox(&mut self, seq: Seq, entry: &Bytes) -> Result<(), StoreError> {
        let id = self.row_id(seq)?;
        let stored = self.execute(
            "INSERT INTO inbox (seq, entry, sum) VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING",
            params![id, &entry[..], checksum(seq, entry)],
        )?;
        if stored == 0 {
            let detail = format!("inbox number {} is not free", seq.0);
            return Err(StoreError::new(&self.path, Fault::Refused, detail));
        }
        self.state.inbox.add(entry.len() as u64);
        Ok(())
    }

    fn mark_inbox(&mut self, seq: Seq, given: &[u8], batch: u64) -> Result<(), StoreError> {
        let Ok(id) = i64::try_from(seq.0) else {
            return Ok(());
        };
        let (turn, noted) = self.release.turns(batch);
        // In a table of its own: a mark does not write a large entry again.
        self.execute(
            "INSERT INTO given (seq, turn, copies, sum) SELECT seq, ?2, ?3, ?4 FROM inbox WHERE seq = ?1 \
             ON CONFLICT (seq, turn) DO UPDATE SET copies = excluded.copies, sum = excluded.sum",
            params![id, turn, given, checksum(seq, given)],
        )?;
        // What a kill could bring back: the last state that may have been written, and those after it.
        self.execute(
            "DELETE FROM given WHERE seq = ?1 AND turn < (SELECT max(turn) FROM given WHERE seq = ?1 AND turn <= ?2)",
            params![id, noted],
        )?;
        Ok(())
    }

    fn drop_inbox(&mut self, seq: Seq) -> Result<(), StoreError> {
        let Ok(id) = i64::try_from(seq.0) else {
            return Ok(());
        };
        let Some(bytes) = self.length("SELECT length(entry) FROM inbox WHERE seq = ?1", id)? else {
            return Ok(());
        };
        self.execute("DELETE FROM inbox WHERE seq = ?1", [id])?;
        self.execute("DELETE FROM given WHERE seq = ?1", [id])?;
        let taken = self.state.inbox.remove(1, bytes);
        taken.ok_or_else(|| self.corrupt("the inbox holds more than table state counts"))
    }

    fn put_room(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.take_from_rooms(key)?;
        self.state.rooms.add(state_bytes(key.len(), value.len()));
        let held = self.state.rooms;
        if key.len() > STATE_KEY_BYTES_MAX || value.len() > STATE_VALUE_BYTES_MAX || held.bytes > STATE_BYTES_MAX {
            let (key, value) = (key.len(), value.len());
            let detail = format!("state of a room with {key} + {value} bytes, which makes {held}");
            return Err(StoreError::new(&self.path, Fault::Refused, detail));
        }
        self.execute(
            "INSERT OR REPLACE INTO rooms (key, value, sum) VALUES (?1, ?2, ?3)",
            params![key, value, room_checksum(key, value)],
        )?;
        Ok(())
    }

    fn drop_room(&mut self, key: &[u8]) -> Result<(), StoreError> {
        if self.take_from_rooms(key)? {
            self.execute("DELETE FROM rooms WHERE key = ?1", [key])?;
        }
        Ok(())
    }

    /// Stops counting the row with this key. `false` if there is none.
    fn take_from_rooms(&mut self, key: &[u8]) -> Result<bool, StoreError> {
        let Some(value) = self.length("SELECT length(value) FROM rooms WHERE key = ?1", key)? else {
            return Ok(false);
        };
        let bytes = state_bytes(key.len(), usize::try_from(value).unwrap_or(usize::MAX));
        let taken = self.state.rooms.remove(1, bytes);
        taken.ok_or_else(|| self.corrupt("table rooms holds more than table state counts"))?;
        Ok(true)
    }

    /// Makes the open transaction durable, if there is one.
    pub(super) fn commit(&mut self) -> Result<(), StoreError> {
        if !self.in_transaction {
            return Ok(());
        }
        let row = StateRow::new(&self.state).ok_or_else(|| {
            let detail = "a number above 2^63-1 cannot be stored";
            StoreError::new(&self.path, Fault::Refused, detail)
        })?;
        self.execute(
            "UPDATE state SET spool_last = ?1, spool_entries = ?2, spool_bytes = ?3, inbox_entries = ?4, inbox_bytes = ?5, \
             received_epoch = ?6, received_upto = ?7, received_beyond = ?8, sum = ?9, rooms_rows = ?10, rooms_bytes = ?11",
            params![
                row.spool_last,
                row.spool_entries,
                row.spool_bytes,
                row.inbox_entries,
                row.inbox_bytes,
                row.received_epoch,
                row.received_upto,
                row.received_beyond,
                row.checksum(),
                row.rooms_rows,
                row.rooms_bytes,
            ],
        )?;
        self.execute("COMMIT", [])?;
        self.in_transaction = false;
        Ok(())
    }

    /// Moves the write-ahead log into the database when it has grown enough. SQLite would do it by itself, but not tell us of errors.
    pub(super) fn checkpoint_if_due(&mut self) -> Result<(), StoreError> {
        let (logged, moved) = self.wal("PRAGMA wal_checkpoint(NOOP)")?;
        if logged - moved >= CHECKPOINT_PAGES {
            self.wal("PRAGMA wal_checkpoint(PASSIVE)")?;
        }
        Ok(())
    }

    /// The pages in the log, and how many of them are in the database as well.
    fn wal(&self, sql: &str) -> Result<(i64, i64), StoreError> {
        self.connection
            .prepare_cached(sql)
            .and_then(|mut statement| statement.query_row([], |row| Ok((row.get(1)?, row.get(2)?))))
            .map_err(|error| self.failed(error))
    }

    /// Gives some free pages at the end of the file back to the file system. `false` if there was nothing to do.
    pub(super) fn shrink_a_little(&mut self) -> Result<bool, StoreError> {
        if self.in_transaction || self.free_pages()? <= FREE_PAGES_KEPT {
            return Ok(false);
        }
        let sql = format!("PRAGMA incremental_vacuum({SHRINK_PAGES})");
        self.connection
            .prepare_cached(&sql)
            .and_then(|mut statement| {
                // It gives a row for each page.
                let mut rows = statement.query([])?;
                while rows.next()?.is_some() {}
                Ok(())
            })
            .map_err(|error| self.failed(error))?;
        if self.free_pages()? > FREE_PAGES_KEPT {
            self.checkpoint_if_due()?;
        } else {
            // The file is cut only now.
            self.wal("PRAGMA wal_checkpoint(TRUNCATE)")?;
        }
        Ok(true)
    }

    fn free_pages(&self) -> Result<i64, StoreError> {
        self.connection
            .prepare_cached("PRAGMA freelist_count")
            .and_then(|mut statement| statement.query_row([], |row| row.get(0)))
            .map_err(|error| self.failed(error))
    }

    pub(super) fn read_spool(
        &self,
        from: Seq,
        entries_max: usize,
        bytes_max: usize,
    ) -> Result<(Vec<Slot>, bool), StoreError> {
        let sql = "SELECT seq, entry, sum, accepted, NULL, NULL FROM spool WHERE seq >= ?1 ORDER BY seq";
        self.read(sql, from, entries_max, bytes_max)
    }

    pub(super) fn read_inbox(
        &self,
        from: Seq,
        entries_max: usize,
        bytes_max: usize,
    ) -> Result<(Vec<Slot>, bool), StoreError> {
        let sql = "SELECT inbox.seq, inbox.entry, inbox.sum, NULL, given.copies, given.sum FROM inbox \
                   LEFT JOIN given ON given.seq = inbox.seq \
                   AND given.turn = (SELECT max(turn) FROM given WHERE seq = inbox.seq) \
                   WHERE inbox.seq >= ?1 ORDER BY inbox.seq";
        self.read(sql, from, entries_max, bytes_max)
    }

    fn read(
        &self,
        sql: &str,
        from: Seq,
        entries_max: usize,
        bytes_max: usize,
    ) -> Result<(Vec<Slot>, bool), StoreError> {
        let mut slots = Vec::new();
        let Ok(from) = i64::try_from(from.0) else {
            return Ok((slots, true));
        };
        let fail = |error| self.failed(error);
        let mut statement = self.connection.prepare_cached(sql).map_err(fail)?;
        let mut rows = statement.query([from]).map_err(fail)?;
        let mut bytes = 0;
        loop {
            let Some(row) = rows.next().map_err(fail)? else {
                return Ok((slots, true));
            };
            if slots.len() >= entries_max {
                return Ok((slots, false));
            }
            let slot = read_slot(row)
                .map_err(fail)?
                .map_err(|seq| self.corrupt(format!("row {} does not match its checksum ({sql})", seq.0)))?;
            if !slots.is_empty() && bytes + slot.entry.len() > bytes_max {
                return Ok((slots, false));
            }
            bytes += slot.entry.len();
            slots.push(slot);
        }
    }

    pub(super) fn release(&self) -> Arc<Release> {
        Arc::clone(&self.release)
    }

    /// What the database and its log take on disk.
    pub(super) fn bytes_on_disk(&self) -> u64 {
        [&self.path, &self.wal_path]
            .iter()
            .filter_map(|path| fs::metadata(path).ok())
            .map(|metadata| metadata.len())
            .sum()
    }

    /// Empties the log into the database and lets go of the file.
    pub(super) fn close(self) -> Result<(), StoreError> {
        let Self { connection, path, .. } = self;
        close(connection).map_err(|error| StoreError::sqlite(&path, &error))?;
        // Everything is answered: every mark counts, as it does without the note.
        let note = beside(&path, "-given");
        fs::remove_file(&note).map_err(|error| StoreError::io(&note, &error))
    }

    fn execute(&self, sql: &str, values: impl rusqlite::Params) -> Result<usize, StoreError> {
        self.connection
            .prepare_cached(sql)
            .and_then(|mut statement| statement.execute(values))
            .map_err(|error| self.failed(error))
    }

    fn length(&self, sql: &str, id: impl rusqlite::ToSql) -> Result<Option<u64>, StoreError> {
        self.connection
            .prepare_cached(sql)
            .and_then(|mut statement| statement.query_row([id], |row| row.get(0)).optional())
            .map(|length: Option<i64>| length.map(i64::unsigned_abs))
            .map_err(|error| self.failed(error))
    }

    fn row_id(&self, seq: Seq) -> Result<i64, StoreError> {
        i64::try_from(seq.0).map_err(|_| {
            let detail = format!("number {} is above 2^63-1 and cannot be stored", seq.0);
            StoreError::new(&self.path, Fault::Refused, detail)
        })
    }

    fn failed(&self, error: rusqlite::Error) -> StoreError {
        StoreError::sqlite(&self.path, &error)
    }

    fn corrupt(&self, detail: impl Into<String>) -> StoreError {
        StoreError::new(&self.path, Fault::Corrupt, detail)
    }
}

/// The row of the table `state` in SQLite's numbers.
struct StateRow {
    epoch: i64,
    spool_last: i64,
    spool_entries: i64,
    spool_bytes: i64,
    inbox_entries: i64,
    inbox_bytes: i64,
    received_epoch: i64,
    received_upto: i64,
    received_beyond: String,
    rooms_rows: i64,
    rooms_bytes: i64,
}

impl StateRow {
    /// `None` if a number is too large for SQLite.
    fn new(state: &State) -> Option<Self> {
        let small = |number: u64| i64::try_from(number).ok();
        let beyond: Vec<_> = state.received.beyond.iter().map(|seq| seq.0.to_string()).collect();
        Some(Self {
            epoch: state.epoch.0.cast_signed(),
            spool_last: small(state.spool_last.0)?,
            spool_entries: small(state.spool.entries)?,
            spool_bytes: small(state.spool.bytes)?,
            inbox_entries: small(state.inbox.entries)?,
            inbox_bytes: small(state.inbox.bytes)?,
            received_epoch: state.received.epoch.0.cast_signed(),
            received_upto: small(state.received.upto.0)?,
            received_beyond: beyond.join(","),
            rooms_rows: small(state.rooms.entries)?,
            rooms_bytes: small(state.rooms.bytes)?,
        })
    }

    /// `None` if a number is none of ours.
    fn state(&self) -> Option<State> {
        let large = |number: i64| u64::try_from(number).ok();
        let beyond = match self.received_beyond.as_str() {
            "" => Vec::new(),
            list => list
                .split(',')
                .map(|number| number.parse().map(Seq))
                .collect::<Result<_, _>>()
                .ok()?,
        };
        Some(State {
            epoch: Epoch(self.epoch.cast_unsigned()),
            spool_last: Seq(large(self.spool_last)?),
            spool: Holding {
                entries: large(self.spool_entries)?,
                bytes: large(self.spool_bytes)?,
            },
            inbox: Holding {
                entries: large(self.inbox_entries)?,
                bytes: large(self.inbox_bytes)?,
            },
            rooms: Holding {
                entries: large(self.rooms_rows)?,
                bytes: large(self.rooms_bytes)?,
            },
            received: Received {
                epoch: Epoch(self.received_epoch.cast_unsigned()),
                upto: Seq(large(self.received_upto)?),
                beyond,
            },
        })
    }

    fn checksum(&self) -> i64 {
        let Self {
            epoch,
            spool_last,
            spool_entries,
            spool_bytes,
            inbox_entries,
            inbox_bytes,
            received_epoch,
            received_upto,
            received_beyond,
            rooms_rows,
            rooms_bytes,
        } = self;
        let mut text = format!(
            "{epoch} {spool_last} {spool_entries} {spool_bytes} {inbox_entries} {inbox_bytes} {received_epoch} {received_upto} \
             {received_beyond}"
        );
        // As in version 2, if there is nothing in it.
        if (*rooms_rows, *rooms_bytes) != (0, 0) {
            text += &format!(" {rooms_rows} {rooms_bytes}");
        }
        checksum(Seq(1), text.as_bytes())
    }
}

/// 32 bits that bind a row's content to its number. SQLite's own checksums end with the write-ahead log; a worn disk is noticed by
/// this one. (Not against anyone who means harm: who can write the file can write the sum.)
fn checksum(seq: Seq, content: &[u8]) -> i64 {
    head(Sha256::new().chain_update(seq.0.to_be_bytes()).chain_update(content))
}

/// The same for a row of the table `spool`, which may say when it was accepted, or of `inbox`, which does not.
fn slot_checksum(seq: Seq, accepted: Option<i64>, entry: &[u8]) -> i64 {
    let mut hash = Sha256::new().chain_update(seq.0.to_be_bytes());
    if let Some(accepted) = accepted {
        hash.update(accepted.to_be_bytes());
    }
    head(hash.chain_update(entry))
}

/// The same for a row of the table `rooms`.
fn room_checksum(key: &[u8], value: &[u8]) -> i64 {
    let key_bytes = key.len() as u64;
    head(
        Sha256::new()
            .chain_update(key_bytes.to_be_bytes())
            .chain_update(key)
            .chain_update(value),
    )
}

fn head(hash: Sha256) -> i64 {
    let digest = hash.finalize();
    i64::from(u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]))
}

/// `Err` names the row that is damaged.
fn read_slot(row: &Row<'_>) -> rusqlite::Result<Result<Slot, Seq>> {
    let seq = seq_of(row.get(0)?);
    let entry = row.get_ref(1)?.as_blob()?;
    let accepted: Option<i64> = row.get(3)?;
    let given = row.get_ref(4)?.as_blob_or_null()?;
    let given_sum: Option<i64> = row.get(5)?;
    let sound = slot_checksum(seq, accepted, entry) == row.get::<_, i64>(2)?
        && given.map(|given| checksum(seq, given)) == given_sum;
    Ok(if sound {
        Ok(Slot {
            seq,
            accepted: accepted.map(wall_of),
            entry: Bytes::copy_from_slice(entry),
            given: given.unwrap_or_default().to_vec(),
        })
    } else {
        Err(seq)
    })
}

/// Key, value and checksum.
fn read_room(row: &Row<'_>) -> rusqlite::Result<(Bytes, Bytes, i64)> {
    let bytes = |at| Ok::<_, rusqlite::Error>(Bytes::copy_from_slice(row.get_ref(at)?.as_blob()?));
    Ok((bytes(0)?, bytes(1)?, row.get(2)?))
}

/// Rows below 0 are not ours; their checksum does not hold.
fn seq_of(id: i64) -> Seq {
    Seq(id.cast_unsigned())
}

/// Below 0 is no date of ours either.
fn wall_of(ms: i64) -> Wall {
    Wall(u64::try_from(ms).unwrap_or(0))
}

/// `None` if the row does not match its checksum.
fn read_state(connection: &Connection, version: i64) -> rusqlite::Result<Option<State>> {
    let rooms = match version {
        BEFORE_ROOMS => "0, 0",
        _ => "rooms_rows, rooms_bytes",
    };
    let (row, sum) = connection.query_row(
        &format!(
            "SELECT epoch, spool_last, spool_entries, spool_bytes, inbox_entries, inbox_bytes, received_epoch, received_upto, \
             received_beyond, sum, {rooms} FROM state WHERE id = 1"
        ),
        [],
        |row| {
            let state = StateRow {
                epoch: row.get(0)?,
                spool_last: row.get(1)?,
                spool_entries: row.get(2)?,
                spool_bytes: row.get(3)?,
                inbox_entries: row.get(4)?,
                inbox_bytes: row.get(5)?,
                received_epoch: row.get(6)?,
                received_upto: row.get(7)?,
                received_beyond: row.get(8)?,
                rooms_rows: row.get(10)?,
                rooms_bytes: row.get(11)?,
            };
            Ok((state, row.get::<_, i64>(9)?))
        },
    )?;
    Ok(row.state().filter(|_| row.checksum() == sum))
}

/// Opens the file as we use it: alone, with a log that is flushed at every commit. Nothing is written to one that is not new.
fn connect(path: &Path, new: bool) -> rusqlite::Result<Connection> {
    // Without CREATE: an absent file is our caller's to make. Without URI: a name is only a name.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(LOCK_WAIT)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    connection.set_prepared_statement_cache_capacity(32);
    // Before anything is read, so that the lock is never given back and the log needs no shared memory.
    let _: String = connection.pragma_update_and_check(None, "locking_mode", "EXCLUSIVE", |row| row.get(0))?;
    if new {
        // Both take hold only while the file is empty; later, the second would write.
        connection.pragma_update(None, "page_size", PAGE_SIZE.cast_signed())?;
        connection.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
    }
    let journal_mode: String = connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))?;
    // NORMAL loses the last commits in a power cut.
    connection.pragma_update(None, "synchronous", "FULL")?;
    let synchronous: i64 = connection.pragma_query_value(None, "synchronous", |row| row.get(0))?;
    if journal_mode != "wal" || synchronous != 2 {
        return Err(rusqlite::Error::SqliteFailure(
            rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_IOERR),
            Some(format!("journal mode {journal_mode}, synchronous {synchronous}")),
        ));
    }
    let _: i64 = connection.pragma_update_and_check(None, "wal_autocheckpoint", 0, |row| row.get(0))?;
    let limit = CHECKPOINT_PAGES * PAGE_SIZE.cast_signed();
    let _: i64 = connection.pragma_update_and_check(None, "journal_size_limit", limit, |row| row.get(0))?;
    connection.pragma_update(None, "cell_size_check", true)?;
    Ok(connection)
}

/// Lets go of the file and removes the log. A connection that is only dropped, after an error, leaves both as they are.
fn close(connection: Connection) -> rusqlite::Result<()> {
    // By ourselves first: closing does not tell of errors.
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false)?;
    connection.close().map_err(|(_, error)| error)
}

/// Looks at the file before SQLite does, which would take an empty one for a new database and turn another's into WAL mode.
fn check_header(path: &Path) -> Result<(), StoreError> {
    let mut header = Vec::new();
    fs::File::open(path)
        .and_then(|file| file.take(HEADER_SIZE).read_to_end(&mut header))
        .map_err(|error| StoreError::io(path, &error))?;
    let number = |at: usize| {
        header
            .get(at..at + 4)
            .map(|bytes| i64::from(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])))
    };
    // Offsets by https://www.sqlite.org/fileformat2.html#the_database_header
    match (header.starts_with(b"SQLite format 3\0"), number(60), number(68)) {
        (true, Some(version), Some(APPLICATION_ID)) => check_version(path, version),
        (true, Some(_), Some(application)) => {
            let detail = format!("an SQLite database of application {application:#x}");
            Err(StoreError::new(path, Fault::NotAStore, detail))
        }
        (true, _, _) => Err(StoreError::new(path, Fault::Corrupt, "it ends within its header")),
        (false, _, _) if header.is_empty() => Err(StoreError::new(path, Fault::Corrupt, "it is empty")),
        (false, _, _) => Err(StoreError::new(path, Fault::NotAStore, "not an SQLite database")),
    }
}

fn check_version(path: &Path, version: i64) -> Result<(), StoreError> {
    match version {
        BEFORE_ROOMS | FORMAT_VERSION => Ok(()),
        _ => {
            let detail = format!("version {version}, this narrows knows {BEFORE_ROOMS} and {FORMAT_VERSION}");
            Err(StoreError::new(path, Fault::Version, detail))
        }
    }
}

/// Makes an empty store under another name and gives it its own when it is whole and on disk, so that no
/// crash leaves half of one.
fn create(path: &Path) -> Result<(), StoreError> {
    let draft = beside(path, ".new");
    let fail_io = |error| StoreError::io(path, &error);
    remove_draft(&draft).map_err(fail_io)?;
    // What people write is in it.
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&draft)
        .map_err(fail_io)?;
    let connection = connect(&draft, true).map_err(|error| StoreError::sqlite(path, &error))?;
    let state = State {
        epoch: Epoch(getrandom::u64().map_err(|error| StoreError::new(path, Fault::Io, error.to_string()))?),
        ..State::default()
    };
    fill(&connection, &state).map_err(|error| StoreError::sqlite(path, &error))?;
    close(connection).map_err(|error| StoreError::sqlite(path, &error))?;
    fs::File::open(&draft)
        .and_then(|file| file.sync_all())
        .map_err(fail_io)?;
    // A link, not a rename: if another process was faster, its file stays.
    match fs::hard_link(&draft, path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(fail_io(error)),
        Ok(()) | Err(_) => {}
    }
    remove_draft(&draft).map_err(fail_io)?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    fs::File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(fail_io)
}

fn fill(connection: &Connection, state: &State) -> rusqlite::Result<()> {
    connection.execute_batch("BEGIN IMMEDIATE")?;
    connection.pragma_update(None, "application_id", APPLICATION_ID)?;
    connection.pragma_update(None, "user_version", FORMAT_VERSION)?;
    connection.execute_batch(SCHEMA)?;
    let row = StateRow::new(state).ok_or(rusqlite::Error::QueryReturnedNoRows)?;
    connection.execute(
        "INSERT INTO state (id, epoch, spool_last, spool_entries, spool_bytes, inbox_entries, inbox_bytes, received_epoch, \
         received_upto, received_beyond, sum) VALUES (1, ?1, 0, 0, 0, 0, 0, 0, 0, '', ?2)",
        params![row.epoch, row.checksum()],
    )?;
    connection.execute_batch("COMMIT")
}

fn remove_draft(draft: &Path) -> std::io::Result<()> {
    for path in [draft, &beside(draft, "-wal"), &beside(draft, "-journal")] {
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// Takes back the marks of which no copy was written to a leg, if it is known which, and says which turn was the last.
///
/// Given is what was given in the last turn that was noted, and not taken back in any later one: a copy that a leg died with is
/// to be written again, noted or not.
fn undo_marks(connection: &mut Connection, released: Option<i64>) -> rusqlite::Result<i64> {
    if let Some(released) = released {
        let transaction = connection.transaction()?;
        transaction.execute(
            "DELETE FROM given AS old WHERE turn < (SELECT max(turn) FROM given WHERE seq = old.seq AND turn <= ?1)",
            [released],
        )?;
        let rows = transaction
            .prepare(
                "SELECT seq, turn, copies FROM given WHERE seq IN (SELECT seq FROM given WHERE turn > ?1) ORDER BY seq, turn",
            )?
            .query_map([released], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
            .collect::<Result<Vec<(i64, i64, Vec<u8>)>, _>>()?;
        for states in rows.chunk_by(|(seq, ..), (next, ..)| seq == next) {
            // No chunk is empty.
            let (seq, first, ref copies) = states[0];
            let mut given = copies.clone();
            for (_, _, copies) in &states[1..] {
                given.truncate(copies.len());
                given.iter_mut().zip(copies).for_each(|(given, later)| *given &= later);
            }
            transaction.execute("DELETE FROM given WHERE seq = ?1", [seq])?;
            if first <= released {
                transaction.execute(
                    "INSERT INTO given (seq, turn, copies, sum) VALUES (?1, ?2, ?3, ?4)",
                    params![seq, first, given, checksum(seq_of(seq), &given)],
                )?;
            }
        }
        transaction.commit()?;
    }
    let last: Option<i64> = connection.query_row("SELECT max(turn) FROM given", [], |row| row.get(0))?;
    Ok(last.max(released).unwrap_or(0))
}

/// Which marks may have been followed by a write to a leg: those of the batches up to the one noted here.
///
/// A mark is in the file before a copy is written, so that no copy is written twice. But from there to the write it is a flush
/// of the disk and some changes of threads, and a kill on that way leaves the mark and no copy: the copy would be lost. So who writes
/// notes the mark's batch here, right before, which takes microseconds and outlives a kill. It need not outlive a power cut, after
/// which, known by the system's boot id, the marks themselves count.
#[derive(Debug)]
pub struct Release {
    file: fs::File,
    head: Option<[u8; RELEASE_HEAD]>,
    turns: Mutex<Turns>,
}

/// Batches are counted from 1 in each life, turns are not.
#[derive(Debug, Default)]
struct Turns {
    /// The last one of earlier lives.
    before: i64,
    noted: i64,
}

/// Bytes: the boot id, and the epoch of the store that the note is about.
const RELEASE_HEAD: usize = size_of::<BootId>() + 8;

impl Release {
    /// Also says what an earlier life has noted, if the system has run since.
    fn open(path: &Path, boot: Option<BootId>, epoch: Epoch) -> std::io::Result<(Self, Option<i64>)> {
        let mut file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        let head = boot.map(|boot| {
            let mut head = [0; RELEASE_HEAD];
            let (id, of) = head.split_at_mut(boot.len());
            id.copy_from_slice(&boot);
            of.copy_from_slice(&epoch.0.to_be_bytes());
            head
        });
        let mut noted = [0; RELEASE_HEAD + 8];
        let whole = match file.read_exact(&mut noted) {
            Ok(()) => true,
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => false,
            Err(error) => return Err(error),
        };
        let (there, turn) = noted.split_at(RELEASE_HEAD);
        let turn = turn.try_into().map(i64::from_be_bytes).ok();
        let ours = whole && head.is_some_and(|head| head == there);
        let release = Self {
            file,
            head,
            turns: Mutex::default(),
        };
        Ok((release, turn.filter(|_| ours)))
    }

    /// To be called before the first copy that is marked in this batch, or in one before it, is written to a leg.
    pub fn note(&self, batch: u64) -> std::io::Result<()> {
        // Held while it is written, so that an earlier note does not replace a later one.
        let mut turns = lock(&self.turns);
        let turn = turns.of(batch);
        if turn > turns.noted {
            self.write(turn)?;
            turns.noted = turn;
        }
        Ok(())
    }

    /// A new life begins: every mark that is there counts.
    fn begin(&self, before: i64) -> std::io::Result<()> {
        self.write(before)?;
        *lock(&self.turns) = Turns { before, noted: before };
        Ok(())
    }

    fn write(&self, turn: i64) -> std::io::Result<()> {
        if let Some(head) = self.head {
            let mut note = [0; RELEASE_HEAD + 8];
            note[..RELEASE_HEAD].copy_from_slice(&head);
            note[RELEASE_HEAD..].copy_from_slice(&turn.to_be_bytes());
            // One small write at one place: a kill leaves the old note or the new one.
            self.file.write_all_at(&note, 0)?;
        }
        Ok(())
    }

    /// The turn of a batch, and the last one noted.
    fn turns(&self, batch: u64) -> (i64, i64) {
        let turns = lock(&self.turns);
        (turns.of(batch), turns.noted)
    }
}

impl Turns {
    fn of(&self, batch: u64) -> i64 {
        self.before.saturating_add(i64::try_from(batch).unwrap_or(i64::MAX))
    }
}

/// Who panicked left two numbers behind.
fn lock(turns: &Mutex<Turns>) -> MutexGuard<'_, Turns> {
    turns.lock().unwrap_or_else(PoisonError::into_inner)
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
