//! A name server per site, whose answers decide how the server there finds the far domains.
//!
//! dnsmasq listens on the namespace's loopback; processes inside see a `resolv.conf` and a `hosts` of
//! their own. Names it was not told about do not exist: no question leaves the machine.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::time::Duration;

use crate::net::{Namespace, Process, failure, tail, wait_for, write_file};

/// One thing that the name server knows.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Record {
    /// An address.
    A { name: String, address: Ipv4Addr },
    /// A service: `_xmpp-server._tcp.a.example` at a host and port.
    Srv { name: String, target: String, port: u16 },
}

impl Record {
    /// An address record.
    pub fn a(name: impl Into<String>, address: Ipv4Addr) -> Self {
        Self::A {
            name: name.into(),
            address,
        }
    }

    /// A service record; `service` is `_xmpp-server` or `_xmpps-server`.
    pub fn srv(service: &str, domain: &str, target: impl Into<String>, port: u16) -> Self {
        Self::Srv {
            name: format!("{service}._tcp.{domain}"),
            target: target.into(),
            port,
        }
    }

    fn option(&self) -> String {
        match self {
            Self::A { name, address } => format!("host-record={name},{address}"),
            Self::Srv { name, target, port } => format!("srv-host={name},{target},{port}"),
        }
    }
}

/// The running name server of one site.
#[derive(Debug)]
pub struct Dns {
    process: Process,
}

impl Dns {
    /// Starts the name server, and makes what starts in the namespace from now on use it.
    pub fn start(namespace: &mut Namespace, dir: &Path, records: &[Record]) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let config = dir.join("dnsmasq.conf");
        let mut text = String::from(
            "# Made by the lab.\n\
             no-resolv\nno-hosts\nno-daemon\nbind-interfaces\nlisten-address=127.0.0.1\nuser=root\npid-file=\n\
             # What is not listed below does not exist.\naddress=/#/\n",
        );
        for record in records {
            text.push_str(&record.option());
            text.push('\n');
        }
        write_file(&config, &text, 0o644)?;
        let (resolv, hosts) = (dir.join("resolv.conf"), dir.join("hosts"));
        write_file(&resolv, "nameserver 127.0.0.1\n", 0o644)?;
        write_file(&hosts, "127.0.0.1 localhost\n", 0o644)?;
        namespace.bind(&resolv, Path::new("/etc/resolv.conf"));
        namespace.bind(&hosts, Path::new("/etc/hosts"));

        let log = dir.join("dnsmasq.log");
        let mut command = namespace.command("dnsmasq")?;
        // It takes the value only in the same word.
        command.arg(format!("--conf-file={}", config.display()));
        command.current_dir(dir);
        let mut process = Process::start("dnsmasq", command, &log)?;
        let answers = || {
            namespace
                .enter(|| {
                    let socket = UdpSocket::bind("127.0.0.1:0")?;
                    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
                    socket.connect("127.0.0.1:53")?;
                    socket.send(QUESTION)?;
                    socket.recv(&mut [0; 512])
                })
                .is_ok_and(|answer: io::Result<usize>| answer.is_ok())
        };
        wait_for("dnsmasq answers", Duration::from_secs(10), answers, || {
            match process.ended()? {
                Some(status) => Err(failure(io::ErrorKind::Other, format!("dnsmasq ended: {status}"))),
                None => Ok(()),
            }
        })
        .map_err(|error| failure(error.kind(), format!("{error}\n{}", tail(&log, 20))))?;
        Ok(Self { process })
    }

    /// Takes the name server away, as an outage of the site's resolver.
    pub fn stop(&mut self) -> io::Result<()> {
        self.process.kill9().map(drop)
    }
}

/// A question for the address of `ready.`: any answer, also that there is none, shows that the server runs.
const QUESTION: &[u8] = b"\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x05ready\x00\x00\x01\x00\x01";
