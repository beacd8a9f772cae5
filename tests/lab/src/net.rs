//! Network namespaces: one per site, with their own loopback, addresses and resolver.
//!
//! What it keeps true: nothing outlives the world that made it. A guard process waits for our end of a
//! pipe to close, which happens however we die, and then ends whatever still runs in the namespaces and
//! deletes them with the world's directory. Only processes inside the world's own namespaces are ended.

use std::ffi::{CString, OsStr};
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// What every namespace's name and every world's directory begins with; the pid of its maker follows.
pub const PREFIX: &str = "nw";

/// Where `ip netns` keeps the namespaces.
const NETNS_DIR: &str = "/run/netns";

/// The TUN device inside each namespace.
const DEVICE: &str = "link";

/// `TUNSETIFF`: `_IOW('T', 202, int)`, the same on all Linux architectures that Debian has.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

/// An error whose text keeps its lines when a test's `expect` prints it: they may be a server's log.
pub fn failure(kind: io::ErrorKind, text: String) -> io::Error {
    io::Error::new(kind, Told(text))
}

struct Told(String);

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Told {}

/// Runs a command to its end; its output is the error's text when it fails.
pub fn run<I, S>(program: &str, args: I) -> io::Result<String>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let mut command = Command::new(program);
    command.args(args);
    finish(command)
}

/// Runs a prepared command to its end; its output is the error's text when it fails.
pub fn finish(mut command: Command) -> io::Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().map_err(|error| {
        failure(
            error.kind(),
            format!("cannot run {program}: {error} (is it installed? see tests/setup)"),
        )
    })?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    let args: Vec<_> = command.get_args().map(OsStr::to_string_lossy).collect();
    Err(failure(
        io::ErrorKind::Other,
        format!("{program} {}: {}\n{text}{complaint}", args.join(" "), output.status),
    ))
}

/// An error unless we are root, saying what root is for.
pub fn require_root() -> io::Result<()> {
    // SAFETY: geteuid has no preconditions.
    if unsafe { libc::geteuid() } == 0 {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        "the two-site lab needs root: it makes network namespaces, TUN devices and private mounts, and starts servers under their own users",
    ))
}

/// A system user that a server runs as.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Account {
    /// User id.
    pub uid: u32,
    /// Its primary group.
    pub gid: u32,
}

impl Account {
    /// Looks a user up by name.
    pub fn named(name: &str) -> io::Result<Self> {
        let entry = run("getent", ["passwd", name]).map_err(|_| {
            failure(
                io::ErrorKind::Other,
                format!("there is no user {name} here: is its package installed? see tests/setup"),
            )
        })?;
        let mut fields = entry.trim().split(':').skip(2);
        let mut number = || fields.next().and_then(|field| field.parse().ok());
        match (number(), number()) {
            (Some(uid), Some(gid)) => Ok(Self { uid, gid }),
            _ => Err(failure(io::ErrorKind::Other, format!("odd passwd entry of {name}"))),
        }
    }

    /// Gives a file or directory, and everything in it, to this user.
    pub fn own(self, path: &Path) -> io::Result<()> {
        std::os::unix::fs::lchown(path, Some(self.uid), Some(self.gid))?;
        if fs::symlink_metadata(path)?.is_dir() {
            for entry in fs::read_dir(path)? {
                self.own(&entry?.path())?;
            }
        }
        Ok(())
    }
}

/// One network namespace.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    file: File,
    /// What processes inside see in place of a system file: (ours, theirs).
    binds: Vec<(PathBuf, PathBuf)>,
}

impl Namespace {
    /// Makes a namespace with its loopback up and without IPv6.
    pub fn create(name: &str) -> io::Result<Self> {
        run("ip", ["netns", "add", name])?;
        let namespace = Self {
            name: name.to_owned(),
            file: File::open(Path::new(NETNS_DIR).join(name))?,
            binds: Vec::new(),
        };
        namespace.enter(|| {
            // A kernel without IPv6 has no such files, and needs none.
            for key in ["ipv6/conf/all/disable_ipv6", "ipv6/conf/default/disable_ipv6"] {
                let _ = fs::write(Path::new("/proc/sys/net").join(key), "1");
            }
            // Each connection shall meet the link afresh, not what the last one measured.
            let _ = fs::write("/proc/sys/net/ipv4/tcp_no_metrics_save", "1");
        })?;
        run("ip", ["-n", name, "link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// The name that `ip netns` knows it by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Processes started from now on see `ours` at the path `theirs`.
    pub fn bind(&mut self, ours: &Path, theirs: &Path) {
        self.binds.push((ours.to_owned(), theirs.to_owned()));
    }

    /// Makes the TUN device of one of its links, with an address here and one for the far end.
    pub fn tun(&self, number: usize, address: &str, peer: &str) -> io::Result<File> {
        let name = format!("{DEVICE}{number}");
        let device = self.enter(|| open_tun(&name))??;
        run(
            "ip",
            ["-n", &self.name, "addr", "add", address, "peer", peer, "dev", &name],
        )?;
        run("ip", ["-n", &self.name, "link", "set", &name, "up"])?;
        Ok(device)
    }

    /// Runs a closure on a thread inside the namespace. Sockets made there stay there.
    pub fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> io::Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                set_namespace(self.file.as_raw_fd())?;
                Ok(inside())
            });
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// A command that will run inside, in a session and with mounts of its own.
    pub fn command(&self, program: impl AsRef<OsStr>) -> io::Result<Command> {
        self.command_as(program, None, &[])
    }

    /// The same as another user, with more files replaced: (ours, theirs).
    pub fn command_as(
        &self,
        program: impl AsRef<OsStr>,
        account: Option<Account>,
        binds: &[(PathBuf, PathBuf)],
    ) -> io::Result<Command> {
        let namespace = OwnedFd::from(self.file.try_clone()?);
        let mounts = self
            .binds
            .iter()
            .chain(binds)
            // A link is mounted over at its target: /etc/resolv.conf is one on many systems.
            .map(|(ours, theirs)| Ok((c_path(ours)?, c_path(&fs::canonicalize(theirs)?)?)))
            .collect::<io::Result<Vec<_>>>()?;
        let mut command = Command::new(program);
        command.stdin(Stdio::null());
        // SAFETY: after the fork this only makes system calls on values prepared above; it neither allocates nor locks.
        unsafe { command.pre_exec(move || settle_in(namespace.as_raw_fd(), &mounts, account)) };
        Ok(command)
    }
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn set_namespace(fd: i32) -> io::Result<()> {
    // SAFETY: setns takes no pointers.
    check(unsafe { libc::setns(fd, libc::CLONE_NEWNET) })
}

/// In the child, between fork and exec.
fn settle_in(namespace: i32, mounts: &[(CString, CString)], account: Option<Account>) -> io::Result<()> {
    // SAFETY: every pointer is to a C string that outlives the call, or null where the call allows it.
    unsafe {
        check(libc::setsid())?;
        check(libc::setns(namespace, libc::CLONE_NEWNET))?;
        check(libc::unshare(libc::CLONE_NEWNS))?;
        let null = std::ptr::null();
        check(libc::mount(
            null,
            c"/".as_ptr(),
            null,
            libc::MS_REC | libc::MS_SLAVE,
            null.cast(),
        ))?;
        for (ours, theirs) in mounts {
            check(libc::mount(
                ours.as_ptr(),
                theirs.as_ptr(),
                null,
                libc::MS_BIND,
                null.cast(),
            ))?;
        }
        if let Some(account) = account {
            check(libc::setgroups(0, null.cast()))?;
            check(libc::setgid(account.gid))?;
            check(libc::setuid(account.uid))?;
        }
    }
    Ok(())
}

/// Opens a TUN device in the namespace of the calling thread.
fn open_tun(name: &str) -> io::Result<File> {
    let node = Path::new("/dev/net/tun");
    if !node.exists() {
        // A bare container may lack the node though the kernel has the driver.
        fs::create_dir_all("/dev/net")?;
        run("mknod", ["-m", "600", "/dev/net/tun", "c", "10", "200"])?;
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(node)
        .map_err(|error| {
            failure(
                error.kind(),
                format!("cannot open /dev/net/tun: {error} (is the tun module loaded?)"),
            )
        })?;
    // SAFETY: an all-zero ifreq is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, &mut request) })?;
    Ok(file)
}

/// A process that we started, the leader of its own session.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
}

impl Process {
    /// Starts a command with its output in a file.
    pub fn start(name: &str, mut command: Command, output: &Path) -> io::Result<Self> {
        let log = OpenOptions::new().create(true).append(true).open(output)?;
        let child = command.stdout(log.try_clone()?).stderr(log).spawn().map_err(|error| {
            let program = command.get_program().to_string_lossy();
            failure(
                error.kind(),
                format!("cannot start {program}: {error} (is it installed? see tests/setup)"),
            )
        })?;
        Ok(Self {
            name: name.to_owned(),
            child,
        })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Sends a signal to it alone.
    pub fn signal(&mut self, signal: i32) -> io::Result<()> {
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        // SAFETY: kill takes no pointers; the child is ours and not yet reaped, so the pid is still its own.
        check(unsafe { libc::kill(self.child.id() as libc::pid_t, signal) })
    }

    /// Ends it and its children at once, as a power cut would, and waits for it.
    pub fn kill9(&mut self) -> io::Result<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        // SAFETY: kill takes no pointers; the child made itself leader of a group of that number.
        unsafe { libc::kill(-(self.child.id() as libc::pid_t), libc::SIGKILL) };
        self.child.kill()?;
        self.child.wait()
    }

    /// Asks it to end and waits; an error if it takes longer than that, and then it is killed.
    pub fn term(&mut self, patience: Duration) -> io::Result<ExitStatus> {
        self.signal(libc::SIGTERM)?;
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.kill9()?;
        Err(failure(
            io::ErrorKind::Other,
            format!("{} did not end within {patience:?} of SIGTERM", self.name),
        ))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Nothing can be done about a failure here; the guard looks once more.
        let _ = self.kill9();
    }
}

/// Waits until a condition holds, asking every 20 ms; `while_waiting` may give up early with a reason.
pub fn wait_for(
    what: &str,
    patience: Duration,
    mut holds: impl FnMut() -> bool,
    mut while_waiting: impl FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let deadline = Instant::now() + patience;
    while !holds() {
        while_waiting()?;
        if Instant::now() > deadline {
            return Err(failure(
                io::ErrorKind::TimedOut,
                format!("{what}: not within {patience:?}"),
            ));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The last lines of a file, for a message about a failure.
pub fn tail(path: &Path, lines: usize) -> String {
    let Ok(bytes) = fs::read(path) else {
        return format!("({}: not there)\n", path.display());
    };
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<_> = text.lines().collect();
    let last = &all[all.len().saturating_sub(lines)..];
    format!(
        "--- {} (last {} of {} lines)\n{}\n",
        path.display(),
        last.len(),
        all.len(),
        last.join("\n")
    )
}

/// The directory and the guard of one world.
#[derive(Debug)]
pub struct Guard {
    label: String,
    dir: PathBuf,
    child: Child,
    /// The guard acts when this closes.
    leash: Option<ChildStdin>,
}

/// Ends what runs in the namespaces `$1-a`, `$1-b` and `$1-c`, deletes them, and the directory `$2` unless it is to be kept.
const CLEAN: &str = r#"
for ns in "$1-a" "$1-b" "$1-c"; do
    [ -e "/run/netns/$ns" ] || continue
    for pid in $(ip netns pids "$ns"); do kill -9 "$pid" 2>/dev/null; done
    ip netns del "$ns"
done
[ -n "$3" ] || rm -rf -- "$2"
"#;

impl Guard {
    /// Cleans up after dead runs, makes the world's directory and starts its guard.
    pub fn new(name: &str) -> io::Result<Self> {
        require_root()?;
        clean_up_after_the_dead()?;
        let label = format!("{PREFIX}{}-{name}", std::process::id());
        let dir = base_dir().join(&label);
        if Path::new(NETNS_DIR).join(format!("{label}-a")).exists() {
            return Err(failure(
                io::ErrorKind::Other,
                format!("this process already has a world named {name}"),
            ));
        }
        fs::create_dir_all(&dir)?;
        // The servers' own users must get in.
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
        let mut command = Command::new("sh");
        command
            .args(["-c", &format!("read -r _\n{CLEAN}"), "narrows-lab-guard", &label])
            .arg(&dir)
            .arg(std::env::var_os("NARROWS_LAB_KEEP").unwrap_or_default())
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        // An interrupt from the terminal is for us, not for the guard.
        // SAFETY: setsid has no preconditions.
        unsafe { command.pre_exec(|| check(libc::setsid())) };
        let mut child = command.spawn()?;
        let leash = child.stdin.take();
        Ok(Self {
            label,
            dir,
            child,
            leash,
        })
    }

    /// `nw<pid>-<name>`.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The world's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        drop(self.leash.take());
        let _ = self.child.wait();
    }
}

/// Where worlds keep their files. `/tmp` may be a small memory disk; `NARROWS_LAB_DIR` says otherwise.
fn base_dir() -> PathBuf {
    std::env::var_os("NARROWS_LAB_DIR").map_or_else(|| PathBuf::from("/tmp"), PathBuf::from)
}

/// Removes worlds whose maker and guard both died: known by the pid in their name.
fn clean_up_after_the_dead() -> io::Result<()> {
    let mut labels = std::collections::BTreeSet::new();
    for (dir, suffixes) in [
        (PathBuf::from(NETNS_DIR), &["-a", "-b", "-c"][..]),
        (base_dir(), &[""][..]),
    ] {
        let Ok(entries) = fs::read_dir(dir) else { continue };
        for entry in entries {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let label = suffixes.iter().find_map(|suffix| name.strip_suffix(suffix));
            if let Some(label) = label.filter(|label| maker_is_dead(label)) {
                labels.insert(label.to_owned());
            }
        }
    }
    for label in labels {
        let dir = base_dir().join(&label);
        let keep = std::env::var("NARROWS_LAB_KEEP").unwrap_or_default();
        let dir = dir.to_string_lossy();
        run("sh", ["-c", CLEAN, "narrows-lab-clean", &label, &dir, &keep])?;
    }
    Ok(())
}

fn maker_is_dead(label: &str) -> bool {
    let pid = label
        .strip_prefix(PREFIX)
        .and_then(|rest| rest.split_once('-'))
        .map(|(pid, _)| pid);
    pid.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists())
}

/// Writes a file with exactly these permissions.
pub fn write_file(path: &Path, content: &str, mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(mode)
        .open(path)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(content.as_bytes())
}
