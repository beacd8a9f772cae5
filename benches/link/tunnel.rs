//! Plain S2S through `ssh -C`, as an administrator would do it without us: the servers speak without TLS, since what is
//! encrypted does not compress, and one SSH connection carries both directions.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use narrows_lab::net::{Process, failure, finish, tail, wait_for, write_file};
use narrows_lab::{Kind, S2S_PORT, Site, World};

/// Where sshd listens at site A.
const SSH_PORT: u16 = 2222;
/// Where the tunnel's ends listen for the local server.
pub const TUNNEL_PORT: u16 = 5369;
/// Key exchange on two loaded cores.
const PATIENCE: Duration = Duration::from_secs(20);

const SSHD: &str = "/usr/sbin/sshd";

/// Both processes; they end with it.
pub struct Tunnel {
    _client: Process,
    _server: Process,
}

/// Why there can be no tunnel, if there cannot.
pub fn missing() -> Option<&'static str> {
    (!Path::new(SSHD).exists()).then_some("Debian's package openssh-server is not installed")
}

impl Tunnel {
    /// Lays the tunnel, and makes the servers of a direct world use it.
    pub fn lay(world: &World) -> io::Result<Self> {
        let dir = world.dir().join("ssh");
        fs::create_dir_all(&dir)?;
        for name in ["host", "user"] {
            let mut command = world.a.command("ssh-keygen")?;
            command
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(dir.join(name));
            finish(command)?;
        }
        fs::copy(dir.join("user.pub"), dir.join("authorized_keys"))?;
        // Where sshd looks for its privilege separation directory; the package makes it when its service starts.
        fs::create_dir_all("/run/sshd")?;
        let path = dir.display();
        let config = format!(
            "Port {SSH_PORT}\nHostKey {path}/host\nAuthorizedKeysFile {path}/authorized_keys\nPidFile none\n\
             StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\nCompression yes\n"
        );
        write_file(&dir.join("sshd_config"), &config, 0o600)?;
        let mut sshd = world.a.command(SSHD)?;
        sshd.args(["-D", "-e", "-f"]).arg(dir.join("sshd_config"));
        let mut server = Process::start("sshd", sshd, &dir.join("sshd.log"))?;
        alive("sshd listens", &world.a, SSH_PORT, &mut server, &dir.join("sshd.log"))?;

        let mut ssh = world.b.command("ssh")?;
        ssh.args([
            "-C",
            "-N",
            "-F",
            "none",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
        ]);
        ssh.args(["-o", "ExitOnForwardFailure=yes", "-o", "IdentitiesOnly=yes"]);
        let forward = format!("127.0.0.1:{TUNNEL_PORT}:127.0.0.1:{S2S_PORT}");
        ssh.args(["-L", &forward, "-R", &forward, "-p", &SSH_PORT.to_string(), "-i"])
            .arg(dir.join("user"));
        ssh.arg(format!("root@{}", world.a.address()));
        let mut client = Process::start("ssh", ssh, &dir.join("ssh.log"))?;
        alive("ssh listens", &world.b, TUNNEL_PORT, &mut client, &dir.join("ssh.log"))?;

        for (here, there) in [(&world.a, &world.b), (&world.b, &world.a)] {
            redirect(here, there)?;
            without_tls(here)?;
        }
        Ok(Self {
            _client: client,
            _server: server,
        })
    }
}

fn alive(what: &str, site: &Site, port: u16, process: &mut Process, log: &Path) -> io::Result<()> {
    let listens = || site.connect_tcp(port).is_ok();
    let runs = || match process.ended()? {
        Some(status) => Err(failure(io::ErrorKind::Other, format!("it ended: {status}"))),
        None => Ok(()),
    };
    wait_for(what, PATIENCE, listens, runs)
        .map_err(|error| failure(error.kind(), format!("{error}\n{}", tail(log, 20))))
}

/// What the server sends to the far server's address goes into the tunnel.
pub fn redirect(here: &Site, there: &Site) -> io::Result<()> {
    let rules = format!(
        "table ip tunnel {{\n chain out {{\n  type nat hook output priority -100;\n  \
         ip daddr {} tcp dport {S2S_PORT} redirect to :{TUNNEL_PORT}\n }}\n}}\n",
        there.address()
    );
    let mut nft = here.command("nft")?;
    nft.arg(rules);
    finish(nft).map(drop)
}

/// Compression finds nothing in what is encrypted.
pub fn without_tls(site: &Site) -> io::Result<()> {
    let server = site.server();
    server.stop()?;
    let (file, edits): (_, &[(&str, &str)]) = match server.kind() {
        Kind::Prosody => (
            "prosody.cfg.lua",
            &[
                ("\"tls\";", "-- (no \"tls\")"),
                (
                    "c2s_require_encryption = false",
                    "c2s_require_encryption = false\ns2s_require_encryption = false\ns2s_secure_auth = false\n",
                ),
            ],
        ),
        Kind::Ejabberd => (
            "ejabberd.yml",
            &[("s2s_use_starttls: required", "s2s_use_starttls: false")],
        ),
    };
    let path = server.dir().join(file);
    let mut text = fs::read_to_string(&path)?;
    for (old, new) in edits {
        if !text.contains(old) {
            return Err(io::Error::other(format!("{} has no {old}", path.display())));
        }
        text = text.replace(old, new);
    }
    // In place: owner and mode stay.
    fs::write(&path, text)?;
    server.start_again()
}
