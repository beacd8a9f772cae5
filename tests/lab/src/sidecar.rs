//! The narrows binary beside a server: keys, authority, configuration, process, metrics.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::net::{Namespace, Process, failure, finish, tail, wait_for, write_file};
use crate::servers::S2S_PORT;

/// Where the sidecar stands in for the far domains, on the site's loopback.
pub const LEGS_PORT: u16 = 15269;

/// Where a sidecar waits for its peer.
pub const LINK_PORT: u16 = 5270;

/// Where `/metrics`, `/readyz` and `/status` are, on the site's loopback.
pub const ADMIN_PORT: u16 = 9275;

/// Opening the spool and binding is quick; ten times that for a loaded machine.
const START_PATIENCE: Duration = Duration::from_secs(30);

/// Draining ends by itself sooner.
const STOP_PATIENCE: Duration = Duration::from_secs(60);

/// Lines of the log that are shown when something fails.
const TAIL_LINES: usize = 30;

/// A sidecar's answer to an administrator's question comes at once or not at all.
const ADMIN_PATIENCE: Duration = Duration::from_secs(5);

/// Which sidecar opens the link. What is said of B holds for C.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Dial {
    /// A calls B.
    AToB,
    /// B calls A.
    #[default]
    BToA,
    /// Each calls the other.
    Both,
}

/// The sidecars of a world as a test wants them.
#[derive(Clone, Debug)]
pub struct SidecarSpec {
    pub(crate) binary: PathBuf,
    pub(crate) dial: Dial,
    pub(crate) direct_tls: bool,
    pub(crate) held: bool,
    pub(crate) in_memory: bool,
    environment: Vec<(String, String)>,
    keys: Vec<String>,
    sections: BTreeMap<String, Vec<String>>,
}

impl SidecarSpec {
    /// Sidecars run from this binary.
    pub fn new(binary: impl Into<PathBuf>) -> Self {
        Self {
            binary: binary.into(),
            dial: Dial::default(),
            direct_tls: false,
            held: false,
            in_memory: false,
            environment: Vec::new(),
            keys: Vec::new(),
            sections: BTreeMap::new(),
        }
    }

    /// Which of them opens the link.
    pub fn dial(mut self, dial: Dial) -> Self {
        self.dial = dial;
        self
    }

    /// Also announces the sidecars by `_xmpps-server` records (XEP-0368).
    pub fn direct_tls(mut self) -> Self {
        self.direct_tls = true;
        self
    }

    /// The world keeps the sockets that the servers connect to, as a systemd `.socket` unit does: while a sidecar is
    /// dead, connections wait.
    pub fn held(mut self) -> Self {
        self.held = true;
        self
    }

    /// The spools are in memory: a kill finds them as on a disk, and how long a flush takes is not a matter of the machine.
    pub fn in_memory(mut self) -> Self {
        self.in_memory = true;
        self
    }

    /// Adds a line to a section of all configurations: `.yaml("legs", "collapse_window: 50ms")`.
    /// Further lines that belong to it carry their own indentation.
    pub fn yaml(mut self, section: &str, line: &str) -> Self {
        self.sections
            .entry(section.to_owned())
            .or_default()
            .push(line.to_owned());
        self
    }

    /// Adds a key outside of all sections to all configurations: `.key("profile", "hf")`.
    pub fn key(mut self, key: &str, value: &str) -> Self {
        self.keys.push(format!("{key}: {value}\n"));
        self
    }

    /// Sets an environment variable of all, e.g. the log filter.
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.environment.push((key.to_owned(), value.to_owned()));
        self
    }
}

/// What the world tells a sidecar about its site.
#[derive(Clone, Debug)]
pub struct Post {
    /// The site's namespace.
    pub namespace: Arc<Namespace>,
    /// The sidecar's own directory.
    pub dir: PathBuf,
    /// Its name, e.g. `shore`.
    pub site: String,
    /// The domains of the server beside it.
    pub local_domains: Vec<String>,
    /// What the local server's certificate is checked against, if it is not self-signed.
    pub trust: Option<PathBuf>,
    /// Who is at the other ends of its links.
    pub peers: Vec<Peer>,
    /// Whether a peer calls us.
    pub listen: bool,
}

/// Another site, as a sidecar is told of it.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// Its domains.
    pub domains: Vec<String>,
    /// Where it can be called, if we are to call it.
    pub connect: Option<SocketAddr>,
}

/// A sidecar at a site. Killed when dropped.
#[derive(Debug)]
pub struct Sidecar {
    post: Post,
    binary: PathBuf,
    environment: Vec<(String, String)>,
    public_key: String,
    /// See [`SidecarSpec::held`].
    held: Option<TcpListener>,
    process: Mutex<Option<Process>>,
    _memory: Option<Memory>,
}

/// A directory in memory, gone when dropped.
#[derive(Debug)]
struct Memory(PathBuf);

impl Memory {
    /// Named after the directory that it serves, which no two worlds share.
    fn new(served: &Path) -> io::Result<Self> {
        let name: Vec<_> = served.iter().skip(1).map(|part| part.to_string_lossy()).collect();
        let path = Path::new("/dev/shm").join(name.join("-"));
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // Nothing can be done about a failure here.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Sidecar {
    /// Makes its key and its authority; it does not run yet.
    pub fn prepare(spec: &SidecarSpec, post: Post) -> io::Result<Self> {
        fs::create_dir_all(&post.dir)?;
        let memory = match spec.in_memory {
            true => Some(Memory::new(&post.dir)?),
            false => None,
        };
        match &memory {
            Some(Memory(path)) => std::os::unix::fs::symlink(path, post.dir.join("data"))?,
            None => fs::create_dir_all(post.dir.join("data"))?,
        }
        let narrows = |words: &[&str], path: &Path| {
            let mut command = post.namespace.command(&spec.binary)?;
            command.args(words).arg(path);
            finish(command)
        };
        let public_key = narrows(&["keygen"], &post.dir.join("key"))?.trim().to_owned();
        narrows(&["ca", "init"], &post.dir.join("ca"))?;
        let listen = || TcpListener::bind((Ipv4Addr::LOCALHOST, LEGS_PORT));
        let held = spec.held.then(|| post.namespace.enter(listen)?).transpose()?;
        Ok(Self {
            binary: spec.binary.clone(),
            environment: spec.environment.clone(),
            public_key,
            held,
            _memory: memory,
            process: Mutex::new(None),
            post,
        })
    }

    /// Writes the configuration, now that the peers' keys are known: one for each, in their order.
    pub fn configure(&self, spec: &SidecarSpec, peer_public_keys: &[&str]) -> io::Result<()> {
        write_file(&self.config_path(), &config(spec, &self.post, peer_public_keys), 0o600)
    }

    /// Starts it, without waiting.
    pub fn launch(&self) -> io::Result<()> {
        let mut slot = self.process();
        if slot.is_some() {
            return Err(failure(
                io::ErrorKind::Other,
                format!("the sidecar at {} runs already", self.post.site),
            ));
        }
        let mut command = self.post.namespace.command(&self.binary)?;
        command.args(["run", "--config"]).arg(self.config_path());
        command.current_dir(&self.post.dir);
        command.envs(self.environment.iter().map(|(key, value)| (key, value)));
        if let Some(held) = &self.held {
            pass_on(held, &mut command);
        }
        *slot = Some(Process::start("narrows", command, &self.log_path())?);
        Ok(())
    }

    /// Waits until `/readyz` says yes.
    pub fn wait_ready(&self) -> io::Result<()> {
        let what = format!("the sidecar at {} is ready", self.post.site);
        let ready = || self.http("/readyz").is_ok_and(|(status, _)| status == 200);
        let runs = || match self.process().as_mut() {
            Some(process) => match process.ended()? {
                Some(status) => Err(failure(
                    io::ErrorKind::Other,
                    format!("the sidecar at {} ended: {status}", self.post.site),
                )),
                None => Ok(()),
            },
            None => Err(io::Error::other("it was not started")),
        };
        wait_for(&what, START_PATIENCE, ready, runs)
            .map_err(|error| failure(error.kind(), format!("{}\n{error}", self.log_tail())))
    }

    /// Starts a sidecar that was stopped or killed, with the data it had, and waits until it is ready.
    pub fn start_again(&self) -> io::Result<()> {
        self.launch()?;
        self.wait_ready()
    }

    /// Ends it as a power cut would.
    pub fn kill9(&self) -> io::Result<Option<ExitStatus>> {
        self.process().take().map(|mut process| process.kill9()).transpose()
    }

    /// Asks it to drain and end, and waits for that.
    pub fn term(&self) -> io::Result<Option<ExitStatus>> {
        self.process()
            .take()
            .map(|mut process| process.term(STOP_PATIENCE))
            .transpose()
    }

    /// Sends it a signal, e.g. SIGHUP.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        match self.process().as_mut() {
            Some(process) => process.signal(signal),
            None => Err(failure(
                io::ErrorKind::Other,
                format!("the sidecar at {} does not run", self.post.site),
            )),
        }
    }

    /// Drains it and starts it again.
    pub fn restart(&self) -> io::Result<()> {
        self.term()?;
        self.start_again()
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process().as_ref().map(Process::pid)
    }

    /// Its public key, as `narrows keygen` printed it.
    pub fn public_key(&self) -> &str {
        &self.public_key
    }

    /// The certificate of its authority, for the local server's trust store.
    pub fn ca_certificate(&self) -> PathBuf {
        self.post.dir.join("ca").join("ca.pem")
    }

    /// Its configuration file.
    pub fn config_path(&self) -> PathBuf {
        self.post.dir.join("narrows.yaml")
    }

    /// Where its spool is.
    pub fn data_dir(&self) -> PathBuf {
        self.post.dir.join("data")
    }

    /// Its log file.
    pub fn log_path(&self) -> PathBuf {
        self.post.dir.join("narrows.log")
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        tail(&self.log_path(), TAIL_LINES)
    }

    /// What `/metrics` says now.
    pub fn metrics(&self) -> io::Result<Metrics> {
        match self.http("/metrics")? {
            (200, text) => Ok(Metrics::parse(&text)),
            (status, text) => Err(failure(io::ErrorKind::Other, format!("/metrics: {status} {text}"))),
        }
    }

    /// Asks its administrator's port: (HTTP status, body).
    pub fn http(&self, path: &str) -> io::Result<(u16, String)> {
        self.post.namespace.enter(|| http_get(ADMIN_PORT, path))?
    }

    fn process(&self) -> MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets a command inherit a listening socket. systemd would make it descriptor 3 and say whom it is for; narrows also
/// takes it under its own number and without `LISTEN_PID`, which nobody knows before the fork.
fn pass_on(socket: &TcpListener, command: &mut Command) {
    let descriptor = socket.as_raw_fd();
    command.env("LISTEN_FDS", "1");
    command.env("LISTEN_FDS_FIRST_FD", descriptor.to_string());
    // SAFETY: between fork and exec this makes one system call on a number; the socket outlives the spawn.
    unsafe {
        command.pre_exec(move || match libc::fcntl(descriptor, libc::F_SETFD, 0) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
}

/// The configuration file of one sidecar.
fn config(spec: &SidecarSpec, post: &Post, peer_public_keys: &[&str]) -> String {
    let dir = post.dir.display();
    let list = |domains: &[String]| domains.join(", ");
    let mut sections: Vec<(String, Vec<String>)> = vec![
        (
            "local".into(),
            vec![
                format!("domains: [{}]", list(&post.local_domains)),
                format!("server: 127.0.0.1:{S2S_PORT}"),
            ],
        ),
        (
            "legs".into(),
            vec![
                format!("listen: [\"127.0.0.1:{LEGS_PORT}\"]"),
                format!("certificates: {dir}/ca"),
            ],
        ),
        ("link".into(), vec![format!("private_key: {dir}/key")]),
        ("admin".into(), vec![format!("listen: \"127.0.0.1:{ADMIN_PORT}\"")]),
    ];
    if let Some(trust) = &post.trust {
        sections[1].1.push(format!("trust: {}", trust.display()));
    }
    if post.listen {
        sections[2].1.push(format!("listen: \"0.0.0.0:{LINK_PORT}\""));
    }
    for (name, lines) in &spec.sections {
        match sections.iter_mut().find(|(section, _)| section == name) {
            Some((_, there)) => there.extend(lines.iter().cloned()),
            None => sections.push((name.clone(), lines.clone())),
        }
    }
    let mut text = format!("site: {}\ndata_dir: {dir}/data\n{}", post.site, spec.keys.concat());
    for (name, lines) in sections {
        text += &format!("{name}:\n");
        for line in lines {
            text += &format!("  {line}\n");
        }
    }
    text += "peers:\n";
    for (peer, public_key) in post.peers.iter().zip(peer_public_keys) {
        text += &format!(
            "  - name: {}\n    domains: [{}]\n    public_key: \"{public_key}\"\n",
            peer.name,
            list(&peer.domains)
        );
        if let Some(address) = peer.connect {
            text += &format!("    connect: \"{address}\"\n");
        }
    }
    text
}

/// Everything is on loopback and small, so one plain request does.
fn http_get(port: u16, path: &str) -> io::Result<(u16, String)> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, ADMIN_PATIENCE)?;
    stream.set_read_timeout(Some(ADMIN_PATIENCE))?;
    // HTTP/1.0: the answer comes in one piece and the connection ends with it.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let odd = || failure(io::ErrorKind::Other, format!("odd answer to GET {path}: {answer:?}"));
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(odd)?;
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .ok_or_else(odd)?;
    Ok((status, body.to_owned()))
}

/// One scrape of `/metrics`: every series with its value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    series: BTreeMap<String, f64>,
}

impl Metrics {
    /// Reads Prometheus' text format; lines that are none are skipped.
    pub fn parse(text: &str) -> Self {
        let value = |line: &str| {
            // Label values may hold spaces, and a time may follow the value.
            let end = line
                .rfind('}')
                .map_or_else(|| line.find(' '), |brace| Some(brace + 1))?;
            let number = line.get(end..)?.split_whitespace().next()?.parse().ok()?;
            Some((line[..end].to_owned(), number))
        };
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        Self {
            series: lines.filter_map(value).collect(),
        }
    }

    /// One series by its full name, labels included as written.
    pub fn get(&self, series: &str) -> Option<f64> {
        self.series.get(series).copied()
    }

    /// The sum of all series of that name whose labels contain all of these texts, e.g. `peer="ship"`.
    pub fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let belongs = |series: &str| {
            let rest = series.strip_prefix(name);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('{'))
                && labels.iter().all(|label| series.contains(label))
        };
        self.series
            .iter()
            .filter(|(series, _)| belongs(series))
            .map(|(_, value)| value)
            .sum()
    }

    /// All series.
    pub fn series(&self) -> &BTreeMap<String, f64> {
        &self.series
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Series with and without labels are read, comments and nonsense are not.
    #[test]
    fn metrics_are_read() {
        let metrics = Metrics::parse(
            "# HELP narrows_casts_total Casts.\n# TYPE narrows_casts_total counter\n\
             narrows_casts_total{peer=\"ship\",direction=\"out\"} 5\n\
             narrows_casts_total{peer=\"a b\",direction=\"out\"} 2 1395066363000\n\
             narrows_up 1\nnarrows_casts_total_other 9\nnonsense\n",
        );
        assert_eq!(metrics.get("narrows_up"), Some(1.0));
        assert_eq!(metrics.sum("narrows_casts_total", &[]), 7.0);
        assert_eq!(metrics.sum("narrows_casts_total", &["peer=\"a b\""]), 2.0);
        assert_eq!(metrics.series().len(), 4);
    }
}
