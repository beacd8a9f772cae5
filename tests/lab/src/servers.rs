//! Debian's Prosody and ejabberd with Debian's shipped configuration, at a site.
//!
//! The configuration is the package's own file with the changes listed in [`prosody_config`] and
//! [`ejabberd_config`]: paths, domains, a plain-text client port on loopback, accounts. What decides
//! how S2S behaves stays as shipped: `s2s_secure_auth`, `mod_limits`, `mod_smacks` of Prosody;
//! `s2s_use_starttls: required`, `mod_s2s_dialback` of ejabberd. Each edit must find the text that it
//! changes, so a package that ships something else fails loudly instead of being half configured.
//!
//! A server runs as its package's user, in the site's namespace, in a directory of its own.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::net::{Account, Namespace, Process, failure, finish, run, tail, wait_for, write_file};

/// The password of every test account.
pub const PASSWORD: &str = "secret";

/// Where test clients connect: plain TCP on the site's loopback.
pub const C2S_PORT: u16 = 5222;

/// Where the server listens for other servers.
pub const S2S_PORT: u16 = 5269;

/// A loaded two-core machine starts an ejabberd in 10 s.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// Then the next try, in case the first went to a server that was just ending.
const PROBE_PATIENCE: Duration = Duration::from_secs(2);

/// ejabberd stops in 2 s, but gives some of its processes 30 s to end by themselves.
const STOP_PATIENCE: Duration = Duration::from_secs(60);

/// Lines of a log that are shown when something fails. Four logs and two outputs of a world have to fit where only some kilobytes are kept.
const TAIL_LINES: usize = 20;

/// Lines of what it printed: ejabberd prints its log again, and what it says when it cannot start is at the end.
const OUTPUT_LINES: usize = 8;

/// Which server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Prosody 0.12.
    Prosody,
    /// ejabberd 23.01.
    Ejabberd,
}

impl Kind {
    /// As command lines and log files spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prosody => "prosody",
            Self::Ejabberd => "ejabberd",
        }
    }
}

/// Prosody, to be configured.
#[derive(Clone, Copy, Debug)]
pub struct Prosody;

impl Prosody {
    /// As Debian ships it.
    pub fn stock() -> ServerSpec {
        ServerSpec::new(Kind::Prosody)
    }
}

/// ejabberd, to be configured.
#[derive(Clone, Copy, Debug)]
pub struct Ejabberd;

impl Ejabberd {
    /// As Debian ships it.
    pub fn stock() -> ServerSpec {
        ServerSpec::new(Kind::Ejabberd)
    }
}

/// Which of the shipped rate limits stay.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Limits {
    /// All: Prosody 10 kB/s per client and 30 kB/s per inbound S2S connection, ejabberd 3 kB/s per client.
    Shipped,
    /// Test clients may send as fast as they like; S2S is as shipped.
    ServersOnly,
    /// None.
    Off,
}

/// A server as a test wants it: as shipped, but for what is said here.
#[derive(Clone, Debug)]
pub struct ServerSpec {
    pub(crate) kind: Kind,
    trust_ca: Vec<PathBuf>,
    insecure_domains: Vec<String>,
    unlimited_from: Vec<String>,
    mam: bool,
    limits: Limits,
    room_options: Vec<(String, String)>,
    debug: bool,
}

impl ServerSpec {
    fn new(kind: Kind) -> Self {
        Self {
            kind,
            trust_ca: Vec::new(),
            insecure_domains: Vec::new(),
            unlimited_from: Vec::new(),
            mam: false,
            limits: Limits::Shipped,
            room_options: Vec::new(),
            debug: false,
        }
    }

    /// Which server this is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Adds a CA to the trust store that this server sees, as `update-ca-certificates` would.
    pub fn trust_ca(mut self, certificate: impl Into<PathBuf>) -> Self {
        self.trust_ca.push(certificate.into());
        self
    }

    /// Prosody: authenticate these domains by dialback (`s2s_insecure_domains`). ejabberd does as shipped.
    pub fn insecure_domains<S: Into<String>>(mut self, domains: impl IntoIterator<Item = S>) -> Self {
        self.insecure_domains.extend(domains.into_iter().map(Into::into));
        self
    }

    /// Prosody: no rate limit for S2S from these domains (`unlimited_jids`), the documented cure.
    pub fn unlimited_from<S: Into<String>>(mut self, domains: impl IntoIterator<Item = S>) -> Self {
        self.unlimited_from.extend(domains.into_iter().map(Into::into));
        self
    }

    /// Archives messages and rooms (XEP-0313).
    pub fn mam(mut self) -> Self {
        self.mam = true;
        self
    }

    /// Which rate limits stay.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// A line for the MUC service: Prosody `muc_room_default_public = true`, ejabberd a default room option.
    pub fn room_option(mut self, key: &str, value: &str) -> Self {
        self.room_options.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Logs at debug level.
    pub fn debug(mut self) -> Self {
        self.debug = true;
        self
    }
}

/// What the world tells a server about its site.
#[derive(Clone, Debug)]
pub struct Place {
    /// The site's namespace.
    pub namespace: Arc<Namespace>,
    /// The server's own directory.
    pub dir: PathBuf,
    /// Its virtual host.
    pub domain: String,
    /// Its MUC service.
    pub conference: String,
    /// The names of its accounts.
    pub users: Vec<String>,
    /// Certificate and key files in PEM.
    pub certificate: Certificate,
}

/// A certificate and its key, in PEM files.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// A server at a site. Killed when dropped.
#[derive(Debug)]
pub struct Server {
    spec: ServerSpec,
    place: Place,
    account: Account,
    /// What it sees in place of the system's trust store.
    binds: Vec<(PathBuf, PathBuf)>,
    process: Mutex<Option<Process>>,
}

impl Server {
    /// Writes configuration, accounts and certificates, and starts the server. It is ready afterwards.
    pub fn start(spec: ServerSpec, place: Place) -> io::Result<Self> {
        let server = Self::prepare(spec, place)?;
        server.start_again()?;
        if server.spec.kind == Kind::Ejabberd {
            server.register_ejabberd_users()?;
        }
        Ok(server)
    }

    fn prepare(spec: ServerSpec, place: Place) -> io::Result<Self> {
        let account = Account::named(spec.kind.name())?;
        fs::create_dir_all(&place.dir)?;
        let binds = if spec.trust_ca.is_empty() {
            Vec::new()
        } else {
            let store = place.dir.join("trust");
            copy_trust_store(&store, &spec.trust_ca)?;
            vec![(store, PathBuf::from(TRUST_STORE))]
        };
        match spec.kind {
            Kind::Prosody => prepare_prosody(&spec, &place)?,
            Kind::Ejabberd => prepare_ejabberd(&spec, &place)?,
        }
        account.own(&place.dir)?;
        Ok(Self {
            spec,
            place,
            account,
            binds,
            process: Mutex::new(None),
        })
    }

    /// Which server this is.
    pub fn kind(&self) -> Kind {
        self.spec.kind
    }

    /// Its directory: configuration, data, logs.
    pub fn dir(&self) -> &Path {
        &self.place.dir
    }

    /// Its log file.
    pub fn log_path(&self) -> PathBuf {
        self.place.dir.join(format!("{}.log", self.spec.kind.name()))
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process().as_ref().map(Process::pid)
    }

    /// The last lines of its log and of what it printed.
    pub fn log_tail(&self) -> String {
        tail(&self.log_path(), TAIL_LINES) + &tail(&self.output_path(), OUTPUT_LINES)
    }

    /// Starts a server that was stopped or killed, with the data it had, and waits until it is ready.
    pub fn start_again(&self) -> io::Result<()> {
        let mut slot = self.process();
        if slot.is_some() {
            return Err(failure(
                io::ErrorKind::Other,
                format!("{} at {} runs already", self.spec.kind.name(), self.place.domain),
            ));
        }
        let command = match self.spec.kind {
            Kind::Prosody => self.prosody_command()?,
            Kind::Ejabberd => self.ejabberd_command()?,
        };
        let mut process = Process::start(self.spec.kind.name(), command, &self.output_path())?;
        let what = format!("{} at {} takes connections", self.spec.kind.name(), self.place.domain);
        let ready = || {
            self.place
                .namespace
                .enter(|| answers(&self.place.domain))
                .is_ok_and(|answer| answer.is_ok())
        };
        wait_for(&what, START_PATIENCE, ready, || match process.ended()? {
            Some(status) => Err(failure(io::ErrorKind::Other, format!("it ended: {status}"))),
            None => Ok(()),
        })
        .map_err(|error| failure(error.kind(), format!("{}\n{what}: {error}", self.log_tail())))?;
        *slot = Some(process);
        Ok(())
    }

    /// Stops it as an administrator would: SIGTERM, and streams are closed in order.
    pub fn stop(&self) -> io::Result<()> {
        match self.process().take() {
            Some(mut process) => process
                .term(STOP_PATIENCE)
                .map(drop)
                .map_err(|error| failure(error.kind(), format!("{error}\n{}", self.log_tail()))),
            None => Ok(()),
        }
    }

    /// Ends it as a power cut would.
    pub fn kill9(&self) -> io::Result<Option<ExitStatus>> {
        self.process().take().map(|mut process| process.kill9()).transpose()
    }

    /// Stops it in order and starts it again.
    pub fn restart(&self) -> io::Result<()> {
        self.stop()?;
        self.start_again()
    }

    fn process(&self) -> MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn output_path(&self) -> PathBuf {
        self.place.dir.join("output.log")
    }

    fn prosody_command(&self) -> io::Result<std::process::Command> {
        let mut command = self
            .place
            .namespace
            .command_as("prosody", Some(self.account), &self.binds)?;
        command
            .arg("-F")
            .arg("--config")
            .arg(self.place.dir.join("prosody.cfg.lua"));
        command.current_dir(&self.place.dir);
        Ok(command)
    }

    /// The Erlang machine with what `ejabberdctl foreground` gives it, but without the shell between
    /// us and it, so that a signal reaches the server itself.
    fn ejabberd_command(&self) -> io::Result<std::process::Command> {
        let dir = &self.place.dir;
        let mut command = self.erl()?;
        command.args([
            "-sname",
            NODE,
            "+K",
            "true",
            "+P",
            "250000",
            "-env",
            "ERL_CRASH_DUMP_BYTES",
            "0",
        ]);
        // Erlang's schedulers spin before they sleep; several nodes on two cores would starve each other.
        command.args(["+sbwt", "none", "+sbwtdcpu", "none", "+sbwtdio", "none"]);
        command.args(["-mnesia", "dir", &format!("\"{}\"", dir.join("spool").display())]);
        command.args(["-ejabberd", "log_rotate_count", "0", "-s", "ejabberd", "-noinput"]);
        command.env("EJABBERD_CONFIG_PATH", dir.join("ejabberd.yml"));
        command.env("EJABBERD_LOG_PATH", self.log_path());
        command.env("EJABBERD_PID_PATH", dir.join("ejabberd.pid"));
        command.env("ERL_CRASH_DUMP", dir.join("erl_crash.dump"));
        command.env("ERL_MAX_PORTS", "32000");
        command.env("ERL_MAX_ETS_TABLES", "1400");
        command.env("CONTRIB_MODULES_CONF_DIR", dir.join("modules.d"));
        Ok(command)
    }

    /// Erlang in the site's namespace, with the site's own cookie and hence its own epmd and node name.
    fn erl(&self) -> io::Result<std::process::Command> {
        let mut command = self
            .place
            .namespace
            .command_as("erl", Some(self.account), &self.binds)?;
        command.current_dir(&self.place.dir);
        // The cookie is in the home directory.
        command.env("HOME", &self.place.dir);
        command.env("ERL_INETRC", "/etc/ejabberd/inetrc");
        command.env("ERL_LIBS", erlang_libraries()?);
        Ok(command)
    }

    /// All accounts in one call; `ejabberdctl register` would take a second for each.
    fn register_ejabberd_users(&self) -> io::Result<()> {
        if self.place.users.is_empty() {
            return Ok(());
        }
        let users: Vec<_> = self.place.users.iter().map(|user| format!("<<\"{user}\">>")).collect();
        let script = format!(
            "lists:foreach(fun(User) -> \
                 case rpc:call('{NODE}', ejabberd_auth, try_register, [User, <<\"{}\">>, <<\"{PASSWORD}\">>]) of \
                     ok -> ok; \
                     {{error, exists}} -> ok; \
                     Other -> io:format(standard_error, \"~s: ~p~n\", [User, Other]), halt(1) \
                 end \
             end, [{}]), halt(0).",
            self.place.domain,
            users.join(",")
        );
        let mut command = self.erl()?;
        command.args(["-sname", "lab@localhost", "-hidden", "-noinput", "-eval", &script]);
        finish(command)
            .map(drop)
            .map_err(|error| failure(io::ErrorKind::Other, format!("{error}\n{}", self.log_tail())))
    }
}

/// Whether a client's stream is answered and the S2S port is open.
///
/// A connection alone says little: ejabberd listens seconds before it accepts.
fn answers(domain: &str) -> io::Result<()> {
    let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, C2S_PORT))?;
    client.set_read_timeout(Some(PROBE_PATIENCE))?;
    // In one piece: ejabberd 23.01 leaves about one in a hundred clients without an answer whose header comes in several.
    let header = format!(
        "<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' version='1.0' to='{domain}'>"
    );
    client.write_all(header.as_bytes())?;
    client.read_exact(&mut [0])?;
    TcpStream::connect((Ipv4Addr::LOCALHOST, S2S_PORT)).map(drop)
}

/// Nodes of different sites may share it: each namespace has its own epmd, and its own cookie.
const NODE: &str = "ejabberd@localhost";

/// Where both servers look for CAs: the directory Prosody, one file in it ejabberd.
const TRUST_STORE: &str = "/etc/ssl/certs";

/// A private copy of the system's trust store with more CAs, as `update-ca-certificates` would leave it.
fn copy_trust_store(to: &Path, authorities: &[PathBuf]) -> io::Result<()> {
    let _ = fs::remove_dir_all(to);
    run("cp", ["-a".as_ref(), TRUST_STORE.as_ref(), to.as_os_str()])?;
    let bundle = to.join("ca-certificates.crt");
    let mut all = fs::read_to_string(&bundle)?;
    for (number, authority) in authorities.iter().enumerate() {
        let pem = fs::read_to_string(authority)
            .map_err(|error| failure(error.kind(), format!("CA {}: {error}", authority.display())))?;
        let name = format!("lab-{number}.pem");
        write_file(&to.join(&name), &pem, 0o644)?;
        let path = to.join(&name);
        let hash = run(
            "openssl",
            [
                "x509".as_ref(),
                "-noout".as_ref(),
                "-subject_hash".as_ref(),
                "-in".as_ref(),
                path.as_os_str(),
            ],
        )?;
        let taken = |number: &usize| !to.join(format!("{}.{number}", hash.trim())).exists();
        let free = (0..100).find(taken).unwrap_or(100);
        std::os::unix::fs::symlink(&name, to.join(format!("{}.{free}", hash.trim())))?;
        all.push_str(&pem);
    }
    write_file(&bundle, &all, 0o644)
}

/// The shipped file, changed step by step; each step must find its text exactly once.
struct Edit {
    file: &'static str,
    text: String,
}

impl Edit {
    fn replace(&mut self, from: &str, to: &str) -> io::Result<()> {
        match self.text.matches(from).count() {
            1 => {
                self.text = self.text.replacen(from, to, 1);
                Ok(())
            }
            n => Err(failure(
                io::ErrorKind::Other,
                format!("{}: {from:?} is there {n} times, expected once", self.file),
            )),
        }
    }
}

const PROSODY_CONFIG: &str = "/etc/prosody/prosody.cfg.lua";

/// The configuration that the prosody package ships, also if somebody has edited it on this machine.
fn prosody_shipped() -> io::Result<String> {
    let text = fs::read_to_string(PROSODY_CONFIG).map_err(|error| {
        failure(
            error.kind(),
            format!("{PROSODY_CONFIG}: {error} (is prosody installed? see tests/setup)"),
        )
    })?;
    let conffiles = run("dpkg-query", ["-W", "-f=${Conffiles}", "prosody"])?;
    let sum = run("md5sum", [PROSODY_CONFIG])?;
    let shipped = |line: &&str| line.trim_start().starts_with(PROSODY_CONFIG);
    let sum = sum.split_whitespace().next().unwrap_or_default();
    if conffiles.lines().find(shipped).is_some_and(|line| line.contains(sum)) {
        return Ok(text);
    }
    let script = "set -e; d=$(mktemp -d); trap 'rm -rf \"$d\"' EXIT; cd \"$d\"; \
                  apt-get download -q prosody >&2; dpkg-deb --fsys-tarfile prosody_*.deb | tar -xO ./etc/prosody/prosody.cfg.lua";
    run("sh", ["-c", script]).map_err(|error| {
        failure(
            io::ErrorKind::Other,
            format!("{PROSODY_CONFIG} was edited, and the package's own cannot be had: {error}"),
        )
    })
}

fn lua_list(items: &[String]) -> String {
    let quoted: Vec<_> = items.iter().map(|item| format!("\"{item}\"")).collect();
    format!("{{ {} }}", quoted.join(", "))
}

/// Prosody's shipped configuration with the least changes.
pub fn prosody_config(spec: &ServerSpec, place: &Place) -> io::Result<String> {
    let dir = place.dir.display();
    let mut edit = Edit {
        file: PROSODY_CONFIG,
        text: prosody_shipped()?,
    };
    // Paths: pid file, logs (and none to syslog), certificates.
    edit.replace("\"/run/prosody/prosody.pid\"", &format!("\"{dir}/prosody.pid\""))?;
    let level = if spec.debug { "debug" } else { "info" };
    edit.replace(
        "info = \"/var/log/prosody/prosody.log\"",
        &format!("{level} = \"{dir}/prosody.log\""),
    )?;
    edit.replace(
        "error = \"/var/log/prosody/prosody.err\"",
        &format!("error = \"{dir}/prosody.err\""),
    )?;
    edit.replace("{ levels = { \"error\" }; to = \"syslog\";  };", "")?;
    edit.replace("certificates = \"certs\"", &format!("certificates = \"{dir}/certs\""))?;
    // The site's domains instead of localhost and conf.d.
    edit.replace("\nVirtualHost \"localhost\"", "\n-- (localhost is not served here)")?;
    edit.replace("\nInclude \"conf.d/*.cfg.lua\"", "\n-- (nothing included)")?;
    match spec.limits {
        Limits::Shipped => {}
        Limits::ServersOnly => edit.replace("rate = \"10kb/s\"", "rate = \"100mb/s\"")?,
        Limits::Off => edit.replace("\"limits\"; --", "--\"limits\"; --")?,
    }
    if spec.mam {
        edit.replace("--\"mam\";", "\"mam\";")?;
    }
    let mut global = format!(
        "\n-- Data in a directory of its own; clients in plain text, on loopback only.\n\
         data_path = \"{dir}/data\"\n\
         c2s_interfaces = {{ \"127.0.0.1\" }}\n\
         c2s_require_encryption = false\n\
         allow_unencrypted_plain_auth = true\n"
    );
    if !spec.insecure_domains.is_empty() {
        global += &format!("s2s_insecure_domains = {}\n", lua_list(&spec.insecure_domains));
    }
    if !spec.unlimited_from.is_empty() {
        global += &format!("unlimited_jids = {}\n", lua_list(&spec.unlimited_from));
    }
    edit.replace("\n-- (localhost is not served here)", &global)?;
    edit.text += &format!(
        "\nVirtualHost \"{}\"\n\nComponent \"{}\" \"muc\"\n",
        place.domain, place.conference
    );
    if spec.mam {
        edit.text += "modules_enabled = { \"muc_mam\" }\n";
    }
    for (key, value) in &spec.room_options {
        edit.text += &format!("{key} = {value}\n");
    }
    Ok(edit.text)
}

fn prepare_prosody(spec: &ServerSpec, place: &Place) -> io::Result<()> {
    write_file(&place.dir.join("prosody.cfg.lua"), &prosody_config(spec, place)?, 0o640)?;
    let certs = place.dir.join("certs");
    fs::create_dir_all(&certs)?;
    fs::copy(
        &place.certificate.certificate,
        certs.join(format!("{}.crt", place.domain)),
    )?;
    fs::copy(&place.certificate.key, certs.join(format!("{}.key", place.domain)))?;
    // mod_auth_internal_hashed hashes a plain password at the first login.
    let accounts = place
        .dir
        .join("data")
        .join(place.domain.replace('.', "%2e"))
        .join("accounts");
    fs::create_dir_all(&accounts)?;
    for user in &place.users {
        let account = format!("return {{\n\t[\"password\"] = \"{PASSWORD}\";\n}};\n");
        write_file(&accounts.join(format!("{}.dat", lua_file_name(user))), &account, 0o640)?;
    }
    Ok(())
}

/// Prosody's file name of a node: everything but letters and digits as `%xx`.
fn lua_file_name(node: &str) -> String {
    let mut name = String::new();
    for byte in node.bytes() {
        if byte.is_ascii_alphanumeric() {
            name.push(char::from(byte));
        } else {
            name += &format!("%{byte:02x}");
        }
    }
    name
}

/// The package makes `/etc/ejabberd/ejabberd.yml` from this file, which nobody edits.
const EJABBERD_CONFIG: &str = "/usr/share/ejabberd/ejabberd.yml.example";

/// ejabberd's shipped configuration with the least changes.
pub fn ejabberd_config(spec: &ServerSpec, place: &Place) -> io::Result<String> {
    let mut edit = Edit {
        file: EJABBERD_CONFIG,
        text: fs::read_to_string(EJABBERD_CONFIG).map_err(|error| {
            failure(
                error.kind(),
                format!("{EJABBERD_CONFIG}: {error} (is ejabberd installed? see tests/setup)"),
            )
        })?,
    };
    edit.replace(
        "\nhosts:\n  - localhost\n",
        &format!("\nhosts:\n  - {}\n", place.domain),
    )?;
    edit.replace(
        "\n  - \"/etc/ejabberd/ejabberd.pem\"",
        &format!("\n  - \"{}/ejabberd.pem\"", place.dir.display()),
    )?;
    // Clients in plain text, on loopback only.
    edit.replace("port: 5222\n    ip: \"::\"", "port: 5222\n    ip: \"127.0.0.1\"")?;
    edit.replace("starttls_required: true", "starttls_required: false")?;
    // The namespace has no IPv6.
    edit.text = edit.text.replace("ip: \"::\"", "ip: \"0.0.0.0\"");
    if spec.debug {
        edit.replace("\nloglevel: info", "\nloglevel: debug")?;
    }
    if spec.limits != Limits::Shipped {
        edit.replace("    none: admin\n    normal: all\n", "    none: all\n")?;
        // More than five subscriptions of one user in a minute are dropped, which no script can foresee.
        edit.replace(
            "    count: 5\n    interval: 60\n",
            "    count: 10000\n    interval: 60\n",
        )?;
    }
    if spec.mam {
        edit.replace(
            "  ## mod_mam:\n",
            "  mod_mam:\n    assume_mam_usage: true\n    default: always\n  ## as shipped:\n",
        )?;
    }
    let mut options = String::from("      mam: true\n");
    for (key, value) in &spec.room_options {
        options += &format!("      {key}: {value}\n");
    }
    edit.replace("      mam: true\n", &options)?;
    Ok(edit.text)
}

fn prepare_ejabberd(spec: &ServerSpec, place: &Place) -> io::Result<()> {
    write_file(&place.dir.join("ejabberd.yml"), &ejabberd_config(spec, place)?, 0o640)?;
    let pem = fs::read_to_string(&place.certificate.certificate)? + &fs::read_to_string(&place.certificate.key)?;
    write_file(&place.dir.join("ejabberd.pem"), &pem, 0o640)?;
    for dir in ["spool", "modules.d"] {
        fs::create_dir_all(place.dir.join(dir))?;
    }
    // Nodes with one cookie would take each other's answers for their own.
    let cookie: String = place.domain.bytes().map(|byte| format!("{byte:02X}")).collect();
    write_file(&place.dir.join(".erlang.cookie"), &cookie, 0o400)
}

/// Where Debian keeps the Erlang libraries of this architecture: beside ejabberd's own.
fn erlang_libraries() -> io::Result<PathBuf> {
    let files = run("dpkg-query", ["-L", "ejabberd"])?;
    files
        .lines()
        .find_map(|file| {
            Path::new(file.strip_suffix("/ebin/ejabberd.app")?)
                .parent()
                .map(Path::to_owned)
        })
        .ok_or_else(|| io::Error::other("the ejabberd package has no ejabberd.app"))
}

/// Makes certificates with openssl: self-signed ones, as Debian's packages do, and ones of a CA of the lab.
#[derive(Clone, Debug)]
pub struct Authority {
    dir: PathBuf,
}

impl Authority {
    /// The CA in a directory; made if there is none.
    pub fn in_dir(dir: &Path) -> io::Result<Self> {
        let authority = Self { dir: dir.to_owned() };
        if authority.certificate().exists() {
            return Ok(authority);
        }
        let extensions =
            "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n";
        make_certificate(dir, "ca", "Lab CA", extensions, None)?;
        Ok(authority)
    }

    /// The CA's own certificate.
    pub fn certificate(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    /// A certificate of this CA for all these domains.
    pub fn issue(&self, dir: &Path, domains: &[String]) -> io::Result<Certificate> {
        make_certificate(dir, "site", &domains[0], &site_extensions(domains), Some(&self.dir))
    }
}

/// A certificate that nobody vouches for, as Debian's packages make them.
pub fn self_signed(dir: &Path, domains: &[String]) -> io::Result<Certificate> {
    make_certificate(dir, "site", &domains[0], &site_extensions(domains), None)
}

fn site_extensions(domains: &[String]) -> String {
    let names: Vec<_> = domains.iter().map(|domain| format!("DNS:{domain}")).collect();
    format!(
        "basicConstraints=critical,CA:FALSE\nextendedKeyUsage=serverAuth,clientAuth\nsubjectAltName={}\n",
        names.join(",")
    )
}

fn make_certificate(
    dir: &Path,
    name: &str,
    common_name: &str,
    extensions: &str,
    authority: Option<&Path>,
) -> io::Result<Certificate> {
    fs::create_dir_all(dir)?;
    let made = Certificate {
        certificate: dir.join(format!("{name}.crt")),
        key: dir.join(format!("{name}.key")),
    };
    let config = dir.join(format!("{name}.cnf"));
    let text = format!(
        "[req]\nprompt=no\ndistinguished_name=name\nx509_extensions=extensions\n\
         [name]\nCN={common_name}\n[extensions]\n{extensions}"
    );
    write_file(&config, &text, 0o644)?;
    let mut command = std::process::Command::new("openssl");
    command.args([
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-sha256", "-days", "30",
    ]);
    command.arg("-config").arg(&config);
    command.arg("-keyout").arg(&made.key).arg("-out").arg(&made.certificate);
    if let Some(authority) = authority {
        command
            .arg("-CA")
            .arg(authority.join("ca.crt"))
            .arg("-CAkey")
            .arg(authority.join("ca.key"));
    }
    finish(command)?;
    Ok(made)
}
