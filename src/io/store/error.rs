//! What can be wrong with a store: which file, what happened, what to do.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use rusqlite::{ErrorCode, ffi};

/// Why a store cannot be opened, or has stopped.
///
/// As text it is one line that names the file, what happened, and what an administrator can do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StoreError {
    pub path: PathBuf,
    pub fault: Fault,
    /// What the system or SQLite said, or where in the file it is.
    pub detail: String,
}

/// The kinds of trouble.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum Fault {
    /// No room on the file system, or the file has reached [`file_bytes_max`](super::Options::file_bytes_max).
    Full,
    /// The system refused to read or write.
    Io,
    /// We may not read or write it.
    Permission,
    /// What is in the file cannot be right.
    Corrupt,
    /// An SQLite database, but not one of ours; or no database at all.
    NotAStore,
    /// Made by another version of narrows.
    Version,
    /// Another process has it.
    Locked,
    /// The database is gone, but its write-ahead log is there.
    Orphan,
    /// A batch asked for what a store must refuse: our own bug.
    Refused,
}

impl Fault {
    /// The value in metrics.
    pub fn as_label(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Io => "io",
            Self::Permission => "permission",
            Self::Corrupt => "corrupt",
            Self::NotAStore => "not_a_store",
            Self::Version => "version",
            Self::Locked => "locked",
            Self::Orphan => "orphan",
            Self::Refused => "refused",
        }
    }

    fn what(self) -> &'static str {
        match self {
            Self::Full => "no room to write",
            Self::Io => "cannot be read or written",
            Self::Permission => "access is denied",
            Self::Corrupt => "the file is damaged",
            Self::NotAStore => "this is not a narrows store",
            Self::Version => "the store has another format version",
            Self::Locked => "the store is in use by another process",
            Self::Orphan => "the database is missing, but its write-ahead log is there",
            Self::Refused => "the store was asked for what it must refuse; this is a bug in narrows",
        }
    }

    fn advice(self) -> &'static str {
        match self {
            Self::Full => "make room on its file system and start narrows again; what was accepted is in the file",
            Self::Io => "look in the kernel log for errors of the disk; start narrows again when it is sound",
            Self::Permission => "narrows needs to own the file and to write in its directory",
            Self::Corrupt => {
                "check the disk; restore the file with its -wal from a backup, or save what `sqlite3 FILE .recover` finds and move both \
                 away: narrows then starts with an empty store, and what waited in it is lost"
            }
            Self::NotAStore => {
                "check data_dir, and move the file away if it does not belong there; if it was a store, its beginning is damaged: restore it with its -wal from a backup"
            }
            Self::Version => "run the version of narrows that wrote it, or drain it there before changing versions",
            Self::Locked => "stop the other narrows (or sqlite3) that uses this data_dir",
            Self::Orphan => {
                "put the database back beside its -wal file; to give up what waited in it, move the -wal file away as well"
            }
            Self::Refused => "report it with this line; what was accepted is in the file",
        }
    }
}

impl StoreError {
    pub(super) fn new(path: &Path, fault: Fault, detail: impl Into<String>) -> Self {
        Self {
            path: path.to_owned(),
            fault,
            detail: detail.into(),
        }
    }

    pub(super) fn io(path: &Path, error: &io::Error) -> Self {
        let fault = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Fault::Full,
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Fault::Permission,
            _ => Fault::Io,
        };
        Self::new(path, fault, error.to_string())
    }

    pub(super) fn sqlite(path: &Path, error: &rusqlite::Error) -> Self {
        let fault = match error {
            rusqlite::Error::SqliteFailure(failure, _) => match failure.code {
                ErrorCode::DiskFull => Fault::Full,
                ErrorCode::DatabaseCorrupt => Fault::Corrupt,
                ErrorCode::NotADatabase => Fault::NotAStore,
                ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked => Fault::Locked,
                ErrorCode::PermissionDenied | ErrorCode::ReadOnly => Fault::Permission,
                // A constraint of ours that does not hold, or a table that is not there: we did not write this file.
                ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch => Fault::Corrupt,
                ErrorCode::Unknown if failure.extended_code == ffi::SQLITE_ERROR => Fault::Corrupt,
                _ => Fault::Io,
            },
            // A column does not have the type that only we write.
            _ => Fault::Corrupt,
        };
        let detail = match error.sqlite_extended_error_code() {
            Some(code) => format!("SQLite: {error}, code {code}"),
            None => format!("SQLite: {error}"),
        };
        Self::new(path, fault, detail)
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, fault, detail } = self;
        write!(f, "{}: {} ({detail}); {}", path.display(), fault.what(), fault.advice())
    }
}

impl std::error::Error for StoreError {}
