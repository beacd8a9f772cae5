//! Two sites and the link between them, made from a few words and gone when dropped.
//!
//! A third site may stand behind a link of its own: A is a hub then, and B and C know nothing of each other.
//!
//! ```no_run
//! use narrows_lab::{Ejabberd, Layout, Profile, Prosody, World};
//!
//! let world = World::builder("join")
//!     .link(Profile::vsat128k())
//!     .site_a(Prosody::stock())
//!     .site_b(Ejabberd::stock())
//!     .users_a(["alice"])
//!     .users_b(["bob"])
//!     .layout(Layout::Direct)
//!     .start()?;
//! let client = world.a.connect_tcp(narrows_lab::C2S_PORT)?;
//! world.link.down();
//! # Ok::<(), std::io::Error>(())
//! ```

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use crate::dns::{Dns, Record};
use crate::emulator::{Link, Profile};
use crate::failures;
use crate::net::{Guard, Namespace};
use crate::servers::{self, Authority, C2S_PORT, Certificate, Place, S2S_PORT, Server, ServerSpec};
use crate::sidecar::{Dial, LEGS_PORT, LINK_PORT, Peer, Post, Sidecar, SidecarSpec};

/// At most: the hub, and the sites behind its links.
const SITES_MAX: usize = 3;

/// The site at which all links end.
const HUB: usize = 0;

/// Not `.test`: libunbound, and so Prosody, never asks a name server for it (RFC 6761).
const DOMAINS: [&str; SITES_MAX] = ["a.example", "b.example", "c.example"];

/// What the sidecars call themselves.
const SITES: [&str; SITES_MAX] = ["shore", "ship", "island"];

/// The addresses of the hub and of another site on the link between them. Worlds do not see each other, so all have the same ones.
fn addresses(there: usize) -> [Ipv4Addr; 2] {
    [1, 2].map(|end| Ipv4Addr::new(10, 91, there as u8 - 1, end))
}

/// How a server finds the far domains.
#[derive(Clone, Debug)]
pub enum Layout {
    /// At the far server: plain S2S across the link.
    Direct,
    /// At the near sidecar.
    Sidecar(SidecarSpec),
}

/// Which CA the servers find in their trust store besides the system's.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Trust {
    /// The one they need: the lab's own in [`Layout::Direct`], their sidecar's in [`Layout::Sidecar`].
    #[default]
    Installed,
    /// None: Prosody as shipped then needs [`ServerSpec::insecure_domains`].
    AsShipped,
}

/// Who vouches for the servers' own certificates.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Vouched {
    /// The lab's CA.
    ByLab,
    /// Nobody, as for the certificates that Debian's packages make.
    ByNobody,
}

/// A world to be made.
#[derive(Debug)]
pub struct WorldBuilder {
    name: String,
    profile: Profile,
    seed: u64,
    layout: Layout,
    trust: Trust,
    vouched: Option<Vouched>,
    servers: [Option<ServerSpec>; SITES_MAX],
    users: [Vec<String>; SITES_MAX],
}

impl WorldBuilder {
    /// How the link behaves at first.
    pub fn link(mut self, profile: Profile) -> Self {
        self.profile = profile;
        self
    }

    /// What the link loses and delays at random is decided by this.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// The server at site A.
    pub fn site_a(mut self, server: ServerSpec) -> Self {
        self.servers[0] = Some(server);
        self
    }

    /// The server at site B.
    pub fn site_b(mut self, server: ServerSpec) -> Self {
        self.servers[1] = Some(server);
        self
    }

    /// A third site, C, with this server, behind a link to A of its own.
    pub fn site_c(mut self, server: ServerSpec) -> Self {
        self.servers[2] = Some(server);
        self
    }

    /// Accounts at site A.
    pub fn users_a<S: Into<String>>(mut self, users: impl IntoIterator<Item = S>) -> Self {
        self.users[0].extend(users.into_iter().map(Into::into));
        self
    }

    /// Accounts at site B.
    pub fn users_b<S: Into<String>>(mut self, users: impl IntoIterator<Item = S>) -> Self {
        self.users[1].extend(users.into_iter().map(Into::into));
        self
    }

    /// Accounts at site C.
    pub fn users_c<S: Into<String>>(mut self, users: impl IntoIterator<Item = S>) -> Self {
        self.users[2].extend(users.into_iter().map(Into::into));
        self
    }

    /// How the servers find the far domains.
    pub fn layout(mut self, layout: Layout) -> Self {
        self.layout = layout;
        self
    }

    /// Which CA is added to the servers' trust stores.
    pub fn trust(mut self, trust: Trust) -> Self {
        self.trust = trust;
        self
    }

    /// Who vouches for the servers' certificates: by default the lab in a direct layout, nobody behind sidecars.
    pub fn certificates(mut self, vouched: Vouched) -> Self {
        self.vouched = Some(vouched);
        self
    }

    /// Makes the world. Everything runs and is ready afterwards.
    pub fn start(self) -> io::Result<World> {
        failures::remember();
        let guard = Guard::new(&self.name)?;
        let label = guard.label();
        let mut namespaces: Vec<Namespace> = (0..self.sites())
            .map(|here| Namespace::create(&format!("{label}-{}", side(here))))
            .collect::<io::Result<_>>()?;
        let mut links = Vec::new();
        for there in 1..self.sites() {
            let [hub, other] = addresses(there).map(|address| address.to_string());
            links.push(Link::start(
                namespaces[HUB].tun(there - 1, &hub, &other)?,
                namespaces[there].tun(0, &other, &hub)?,
                self.profile,
                self.seed,
            )?);
        }

        let mut dns = Vec::new();
        for (here, namespace) in namespaces.iter_mut().enumerate() {
            let dir = guard.dir().join(side(here));
            fs::create_dir_all(&dir)?;
            if self.servers.iter().any(Option::is_some) {
                dns.push(Some(Dns::start(namespace, &dir.join("dns"), &self.records(here))?));
            } else {
                dns.push(None);
            }
        }

        let namespaces: Vec<Arc<Namespace>> = namespaces.into_iter().map(Arc::new).collect();
        let sidecars = self.start_sidecars(guard.dir(), &namespaces)?;
        let servers = self.start_servers(guard.dir(), &namespaces, &sidecars)?;

        let mut parts = sidecars.into_iter().zip(servers).zip(dns).enumerate();
        let mut site = || {
            let (here, ((sidecar, server), dns)) = parts.next()?;
            Some(Site {
                server,
                sidecar,
                dns: Mutex::new(dns),
                namespace: Arc::clone(&namespaces[here]),
                dir: guard.dir().join(side(here)),
                domain: DOMAINS[here].to_owned(),
                address: addresses(here.max(1))[here.min(1)],
                users: self.users[here].clone(),
            })
        };
        let mut links = links.into_iter();
        match (site(), site(), links.next()) {
            (Some(a), Some(b), Some(link)) => Ok(World {
                a,
                b,
                link,
                c: site().zip(links.next()),
                guard,
            }),
            _ => unreachable!("there are at least two sites, with a link"),
        }
    }

    fn sites(&self) -> usize {
        match self.servers[2] {
            Some(_) => SITES_MAX,
            None => SITES_MAX - 1,
        }
    }

    /// The sites at the other ends of a site's links.
    fn beyond(&self, here: usize) -> Vec<usize> {
        match here {
            HUB => (1..self.sites()).collect(),
            _ => vec![HUB],
        }
    }

    /// All keys are made before any configuration is written: each holds the others' public keys.
    fn start_sidecars(&self, dir: &Path, namespaces: &[Arc<Namespace>]) -> io::Result<Vec<Option<Sidecar>>> {
        let Layout::Sidecar(spec) = &self.layout else {
            return Ok(namespaces.iter().map(|_| None).collect());
        };
        let trust = self.lab_authority(dir)?.map(|authority| authority.certificate());
        let mut sidecars = Vec::new();
        for (here, namespace) in namespaces.iter().enumerate() {
            let calls = match spec.dial {
                Dial::AToB => here == HUB,
                Dial::BToA => here != HUB,
                Dial::Both => true,
            };
            let called = spec.dial == Dial::Both || !calls;
            let peer = |there: usize| {
                let [hub, other] = addresses(here.max(there));
                let address = if there == HUB { hub } else { other };
                Peer {
                    name: SITES[there].to_owned(),
                    domains: domains(there),
                    connect: calls.then(|| SocketAddr::from((address, LINK_PORT))),
                }
            };
            let post = Post {
                namespace: Arc::clone(namespace),
                dir: dir.join(side(here)).join("sidecar"),
                site: SITES[here].to_owned(),
                local_domains: domains(here),
                trust: trust.clone(),
                peers: self.beyond(here).into_iter().map(peer).collect(),
                listen: called,
            };
            sidecars.push(Sidecar::prepare(spec, post)?);
        }
        for (here, sidecar) in sidecars.iter().enumerate() {
            let keys: Vec<&str> = self
                .beyond(here)
                .into_iter()
                .map(|there| sidecars[there].public_key())
                .collect();
            sidecar.configure(spec, &keys)?;
        }
        // They must listen before a server speaks: ejabberd backs off up to 300 s from a refused connection.
        for sidecar in &sidecars {
            sidecar.launch()?;
        }
        for sidecar in &sidecars {
            sidecar.wait_ready()?;
        }
        Ok(sidecars.into_iter().map(Some).collect())
    }

    fn start_servers(
        &self,
        dir: &Path,
        namespaces: &[Arc<Namespace>],
        sidecars: &[Option<Sidecar>],
    ) -> io::Result<Vec<Option<Server>>> {
        let authority = self.lab_authority(dir)?;
        let mut starts = Vec::new();
        for (here, namespace) in namespaces.iter().enumerate() {
            let Some(spec) = self.servers[here].clone() else {
                starts.push(None);
                continue;
            };
            let certificate = self.certificate(&dir.join(side(here)).join("certificate"), here, authority.as_ref())?;
            let place = Place {
                namespace: Arc::clone(namespace),
                dir: dir.join(side(here)).join(spec.kind().name()),
                domain: DOMAINS[here].to_owned(),
                conference: conference(here),
                users: self.users[here].clone(),
                certificate,
            };
            let needed = match (self.trust, &sidecars[here], &authority) {
                (Trust::AsShipped, _, _) => None,
                (Trust::Installed, Some(sidecar), _) => Some(sidecar.ca_certificate()),
                (Trust::Installed, None, authority) => authority.as_ref().map(Authority::certificate),
            };
            let spec = match needed {
                Some(ca) => spec.trust_ca(ca),
                None => spec,
            };
            starts.push(Some((spec, place)));
        }
        // All at once: an ejabberd takes seconds, and there are two cores.
        std::thread::scope(|scope| {
            let start = |(spec, place)| scope.spawn(|| Server::start(spec, place));
            let threads: Vec<_> = starts.into_iter().map(|each| each.map(start)).collect();
            let finish = |thread: Option<std::thread::ScopedJoinHandle<'_, io::Result<Server>>>| {
                thread
                    .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                    .transpose()
            };
            threads.into_iter().map(finish).collect()
        })
    }

    /// What the name server of a site knows.
    fn records(&self, here: usize) -> Vec<Record> {
        let mut records = Vec::new();
        for domain in domains(here) {
            records.push(Record::a(domain, Ipv4Addr::LOCALHOST));
        }
        for there in self.beyond(here) {
            let [hub, other] = addresses(here.max(there));
            for domain in domains(there) {
                match &self.layout {
                    Layout::Direct => {
                        records.push(Record::srv("_xmpp-server", &domain, &domain, S2S_PORT));
                        records.push(Record::a(&domain, if there == HUB { hub } else { other }));
                    }
                    Layout::Sidecar(spec) => {
                        let target = format!("narrows.{}", DOMAINS[here]);
                        if spec.direct_tls {
                            records.push(Record::srv("_xmpps-server", &domain, &target, LEGS_PORT));
                        }
                        records.push(Record::srv("_xmpp-server", &domain, &target, LEGS_PORT));
                    }
                }
            }
        }
        if let Layout::Sidecar(_) = self.layout {
            records.push(Record::a(format!("narrows.{}", DOMAINS[here]), Ipv4Addr::LOCALHOST));
        }
        records
    }

    fn vouched(&self) -> Vouched {
        self.vouched.unwrap_or(match self.layout {
            Layout::Direct => Vouched::ByLab,
            Layout::Sidecar(_) => Vouched::ByNobody,
        })
    }

    /// The lab's CA, made at the first call.
    fn lab_authority(&self, dir: &Path) -> io::Result<Option<Authority>> {
        match self.vouched() {
            Vouched::ByNobody => Ok(None),
            Vouched::ByLab => Authority::in_dir(&dir.join("lab-ca")).map(Some),
        }
    }

    fn certificate(&self, dir: &Path, here: usize, authority: Option<&Authority>) -> io::Result<Certificate> {
        match authority {
            Some(authority) => authority.issue(dir, &domains(here)),
            None => servers::self_signed(dir, &domains(here)),
        }
    }
}

fn side(here: usize) -> &'static str {
    ["a", "b", "c"][here]
}

fn conference(here: usize) -> String {
    format!("conference.{}", DOMAINS[here])
}

fn domains(here: usize) -> Vec<String> {
    vec![DOMAINS[here].to_owned(), conference(here)]
}

/// One site: a namespace, and what runs in it.
#[derive(Debug)]
pub struct Site {
    // Dropped in this order: the server goes first, so that it does not complain about the others.
    server: Option<Server>,
    sidecar: Option<Sidecar>,
    dns: Mutex<Option<Dns>>,
    namespace: Arc<Namespace>,
    dir: PathBuf,
    domain: String,
    address: Ipv4Addr,
    users: Vec<String>,
}

impl Site {
    /// Its server.
    ///
    /// # Panics
    /// If the world was made without one.
    pub fn server(&self) -> &Server {
        self.server.as_ref().expect("this world was made without a server here")
    }

    /// Its sidecar.
    ///
    /// # Panics
    /// If the world was made without one.
    pub fn sidecar(&self) -> &Sidecar {
        self.sidecar.as_ref().expect("this world was made without sidecars")
    }

    pub fn has_sidecar(&self) -> bool {
        self.sidecar.is_some()
    }

    /// Its domain, e.g. `a.example`.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Its MUC service, e.g. `conference.a.example`.
    pub fn conference(&self) -> String {
        format!("conference.{}", self.domain)
    }

    /// Its accounts; the password of each is [`crate::PASSWORD`].
    pub fn users(&self) -> &[String] {
        &self.users
    }

    /// Its address on the link.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Its directory, where all logs are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Where clients inside connect.
    pub fn c2s_addr(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, C2S_PORT))
    }

    /// Runs a closure on a thread inside the site. Sockets made there stay there.
    pub fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> io::Result<T> {
        self.namespace.enter(inside)
    }

    /// Connects to a port on the site's loopback.
    pub fn connect_tcp(&self, port: u16) -> io::Result<TcpStream> {
        self.enter(|| TcpStream::connect((Ipv4Addr::LOCALHOST, port)))?
    }

    /// Connects from inside the site to anywhere, e.g. across the link.
    pub fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        self.enter(|| TcpStream::connect(address))?
    }

    /// Listens inside the site, on all its addresses.
    pub fn listen(&self, port: u16) -> io::Result<TcpListener> {
        self.enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))?
    }

    /// A command that will run inside the site.
    pub fn command(&self, program: &str) -> io::Result<Command> {
        self.namespace.command(program)
    }

    /// Takes the site's name server away.
    pub fn stop_dns(&self) -> io::Result<()> {
        match self
            .dns
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .as_mut()
        {
            Some(dns) => dns.stop(),
            None => Ok(()),
        }
    }

    /// The last lines of everything that logs here, and what the sidecar says of itself (of up to a second ago).
    pub fn log_tails(&self) -> String {
        let server = self.server.as_ref().map(Server::log_tail).unwrap_or_default();
        let sidecar = self.sidecar.as_ref().map(|sidecar| {
            let status = sidecar.http("/status");
            let status = status.map_or_else(|error| error.to_string(), |(_, body)| body);
            format!("{}{status}\n", sidecar.log_tail())
        });
        server + &sidecar.unwrap_or_default()
    }
}

/// Two sites and their link. Everything is torn down when it is dropped.
#[derive(Debug)]
pub struct World {
    // Dropped in this order: what runs, the link under it, and the namespaces and files last.
    /// Where rooms live in most tests: the shore.
    pub a: Site,
    /// Behind the bad link: the ship.
    pub b: Site,
    /// What joins them.
    pub link: Link,
    /// The third site, and what joins it to A, if there is one.
    pub c: Option<(Site, Link)>,
    guard: Guard,
}

impl World {
    /// Begins to describe a world; its name tells it from others of this process.
    pub fn builder(name: &str) -> WorldBuilder {
        WorldBuilder {
            name: name.to_owned(),
            profile: Profile::lan(),
            seed: 0,
            layout: Layout::Direct,
            trust: Trust::default(),
            vouched: None,
            servers: Default::default(),
            users: Default::default(),
        }
    }

    /// Two bare sites and a link: no servers, no name servers.
    pub fn new(name: &str, profile: Profile) -> io::Result<Self> {
        Self::builder(name).link(profile).start()
    }

    /// The world's directory, gone when the world is (unless `NARROWS_LAB_KEEP` is set).
    pub fn dir(&self) -> &Path {
        self.guard.dir()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // A test that fails shows what the servers had to say, and then once more why it failed.
        if std::thread::panicking() {
            let c = self.c.as_ref().map(|(site, _)| site.log_tails());
            eprintln!(
                "{}{}{}{}",
                self.a.log_tails(),
                self.b.log_tails(),
                c.unwrap_or_default(),
                failures::remembered()
            );
        }
    }
}
