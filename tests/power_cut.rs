//! The store through power cuts and on a full disk, on file systems made for it. Needs root, `mkfs.ext4` and loop devices.
//!
//! A power cut is real for the file system: `FS_IOC_SHUTDOWN` without a flush of its log throws away all that is not on the
//! device yet, and refuses everything from then on. What stays unproved is a disk that lies about flushes, and torn sectors.

// Namespaces and the shutdown of a file system are reached through libc only.
#![allow(unsafe_code)]

use std::{
    env, fs,
    io::{self, Read},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
};

use bytes::Bytes;
use narrows::{
    codec::position::Seq,
    io::store::{self, Answer, Fault, Options, Request},
    queue::journal::{Batch, Change},
    time::Wall,
};

use self::store_load::Checker;

mod store_load;

/// Names the store for a test that was started again as a child of itself.
const CHILD_STORE: &str = "NARROWS_TEST_CHILD_STORE";

/// `_IOR('X', 125, __u32)`, from the kernel's include/uapi/linux/fs.h (earlier: fs/ext4/ext4.h).
const FS_IOC_SHUTDOWN: libc::Ioctl = 0x8004_587d_u32 as libc::Ioctl;

/// Neither the data nor the log of the file system is flushed before.
const FS_SHUTDOWN_FLAGS_NOLOGFLUSH: u32 = 2;

/// Gives the calling thread, and what it starts, mounts of its own that go away with it.
fn leave_mount_namespace() {
    // SAFETY: takes no pointer; only this thread and what it starts are moved.
    let left = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    assert_eq!(left, 0, "this test needs root: unshare: {}", io::Error::last_os_error());
    run("mount", &["--make-rprivate", "/"]);
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output();
    let output = output.unwrap_or_else(|error| panic!("this test needs {program}: {error}"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary folders have plain names")
}

/// Throws away what the file system has not written to its device.
fn cut_power(mount: &Path) {
    let root = fs::File::open(mount).expect("the mount point can be opened");
    // SAFETY: the descriptor is open, and the argument points to the u32 that this request reads.
    let done = unsafe { libc::ioctl(root.as_raw_fd(), FS_IOC_SHUTDOWN, &FS_SHUTDOWN_FLAGS_NOLOGFLUSH) };
    assert_eq!(done, 0, "FS_IOC_SHUTDOWN: {}", io::Error::last_os_error());
}

fn child(test: &str, path: &Path) -> Command {
    let mut command = Command::new(env::current_exe().expect("a test knows its binary"));
    command
        .args(["--exact", test, "--nocapture", "--test-threads=1", "--quiet"])
        .env(CHILD_STORE, path);
    command
}

/// As after a power cut, when the system is another one.
fn restarted() -> Options {
    Options {
        boot_id: None,
        ..Options::default()
    }
}

/// A power cut at any moment takes no answered batch and leaves none in part.
///
/// A child runs the load on an ext4 of its own; cut the power under it, mount again, compare everything, go on in the same file.
#[test]
fn power_cut_loses_nothing_answered() {
    if let Some(path) = env::var_os(CHILD_STORE) {
        let error = store_load::run(Path::new(&path), restarted(), io::stderr());
        panic!("{error}");
    }
    leave_mount_namespace();
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let image = folder.path().join("disk.ext4");
    let mount = folder.path().join("disk");
    fs::File::create(&image)
        .and_then(|file| file.set_len(64 << 20))
        .expect("64 MiB are free");
    run("mkfs.ext4", &["-q", "-F", text(&image)]);
    fs::create_dir(&mount).unwrap();
    let path = mount.join("shore.sqlite");
    let mut checker = Checker::new(restarted());
    let mut answered = 0;
    for round in 0..20_usize {
        run("mount", &["-o", "loop", text(&image), text(&mount)]);
        let mut writer = child("power_cut_loses_nothing_answered", &path)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the test can start itself");
        let pipe = writer.stderr.take().expect("it was asked for");
        let seen = Arc::new(Seen::default());
        let reader = thread::spawn({
            let seen = Arc::clone(&seen);
            move || seen.follow(pipe)
        });
        // A different number of answers in each round, so that the cut meets different work; the first meets the store's making.
        while seen.count.load(Ordering::SeqCst) < (round as u64 * 53) % 300 {
            assert!(!reader.is_finished(), "the child stopped by itself");
            thread::yield_now();
        }
        // In a power cut nobody sees an answer given later. Here the child lives on for a moment, and a flush that the
        // shutdown meets on its way may return to it as if it had been done.
        answered = seen.last.load(Ordering::SeqCst).max(answered);
        cut_power(&mount);
        writer.kill().expect("the child is ours");
        writer.wait().expect("the child is ours");
        reader.join().expect("it only reads");
        run("umount", &[text(&mount)]);
        run("mount", &["-o", "loop", text(&image), text(&mount)]);
        checker.check(&path, answered);
        run("umount", &[text(&mount)]);
    }
    assert!(
        answered > 1000,
        "only {answered} batches were answered: nothing was tried"
    );
}

/// What a child has answered so far.
#[derive(Debug, Default)]
struct Seen {
    count: AtomicU64,
    last: AtomicU64,
}

impl Seen {
    /// Until the pipe ends, or what the child says is no number any more but why it stopped.
    fn follow(&self, mut pipe: impl Read) {
        let mut number = [0; 8];
        while pipe.read_exact(&mut number).is_ok() {
            let number = u64::from_be_bytes(number);
            // Numbers of this test begin with zeros, and text does not.
            if number >= 1 << 32 {
                break;
            }
            self.last.store(number, Ordering::SeqCst);
            self.count.fetch_add(1, Ordering::SeqCst);
        }
        // To the end, so that the child can say all of it.
        let _ = io::copy(&mut pipe, &mut io::sink());
    }
}

/// On a full disk the store says so and stops, whatever it was writing; with room again, all that was answered is there.
///
/// Fill a small file system through the store, make some room, go on in the same file; twice.
#[test]
fn full_disk_stops_acceptance_and_loses_nothing() {
    leave_mount_namespace();
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let mount: PathBuf = folder.path().to_owned();
    run("mount", &["-t", "tmpfs", "-o", "size=24m", "none", text(&mount)]);
    let ballasts = [mount.join("one"), mount.join("two")];
    for ballast in &ballasts {
        fs::write(ballast, vec![1; 6 << 20]).expect("12 of 24 MiB are free");
    }
    let path = mount.join("shore.sqlite");
    let mut stored = 0;
    for ballast in &ballasts {
        let (answers, incoming) = mpsc::channel();
        let (store, opening) = store::open(&path, Options::default(), move |answer| {
            let _ = answers.send(answer);
        })
        .unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(opening.levels.spool_entries, stored);
        let mut answered = 0;
        let error = loop {
            let number = answered + 1;
            let changes = vec![Change::PutSpool {
                seq: Seq(opening.spool_last.0 + number),
                accepted: Wall(number),
                entry: Bytes::from(vec![b'x'; 2000]),
            }];
            store.submit(Request::Commit(Batch { number, changes }));
            match incoming.recv() {
                Ok(Answer::Committed { batch, .. }) => answered = batch,
                Ok(Answer::Failed(error)) => break error,
                other => panic!("unexpected: {other:?}"),
            }
        };
        store.close();
        assert_eq!(error.fault, Fault::Full, "{error}");
        assert!(answered > 100, "only {answered} were answered");
        stored += answered;
        // Opening makes the log empty, which takes room as well.
        if let Err(error) = store::open(&path, Options::default(), |_| {}) {
            assert_eq!(error.fault, Fault::Full, "{error}");
        }
        fs::remove_file(ballast).unwrap();
    }
    let (store, opening) = store::open(&path, Options::default(), |_| {}).unwrap_or_else(|error| panic!("{error}"));
    store.close();
    assert_eq!(opening.levels.spool_entries, stored);
    run("umount", &[text(&mount)]);
}
