//! Reaching a peer, over a path that may be away at any moment.
//!
//! A new attempt starts every few seconds while older ones wait for their answers: after an outage the kernel's own retry
//! of a connection may be half a minute away, ours is not. The first that connects goes through the handshake.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{net::TcpStream, sync::mpsc, task::JoinSet, time};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, pki_types::ServerName},
};

use crate::io::{
    keys::PublicKey,
    link::{
        LinkCounters, LinkEvent, LinkTimes,
        connection::{LinkConnection, LinkInfo, SharedTcp},
        kernel, tls,
    },
};

/// Attempts that wait for an answer at once.
const ATTEMPTS_MAX: usize = 6;
/// Between attempts on the different addresses of a peer (RFC 8305 §5).
const NEXT_ADDRESS_AFTER: Duration = Duration::from_millis(250);
/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 16;
/// A look-up may need the very path that is away; then the last known addresses serve.
const RESOLVE_MAX: Duration = Duration::from_secs(3);
/// However slow the path seemed, a handshake is given up after this.
const HANDSHAKE_MAX: Duration = Duration::from_secs(90);

/// Why an attempt failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    #[error("cannot find {host}: {source}")]
    Resolve { host: String, source: io::Error },
    #[error("cannot connect to {address}: {source}")]
    Connect { address: SocketAddr, source: io::Error },
    /// Most often: it is not the peer, its key is another one.
    #[error("{address} did not prove the peer's key: {source}")]
    Handshake { address: SocketAddr, source: io::Error },
}

impl DialError {
    pub fn as_label(&self) -> &'static str {
        match self {
            Self::Resolve { .. } => "resolve",
            Self::Connect { .. } => "connect",
            Self::Handshake { .. } => "handshake",
        }
    }
}

pub(super) struct Dialler {
    pub target: String,
    pub peer: PublicKey,
    pub ours: PublicKey,
    pub tls: Arc<ClientConfig>,
    pub times: LinkTimes,
    pub counters: Arc<LinkCounters>,
    pub events: mpsc::Sender<LinkEvent>,
    /// The last that were found.
    pub addresses: Vec<SocketAddr>,
}

struct Connected {
    stream: TcpStream,
    address: SocketAddr,
    took: Duration,
}

impl Dialler {
    /// Tries until a connection is up. Dropping the future gives all attempts up.
    pub async fn until_up(&mut self) -> LinkConnection {
        let mut attempts: JoinSet<Result<Connected, DialError>> = JoinSet::new();
        let mut started = 0usize;
        let mut next = time::Instant::now();
        loop {
            tokio::select! {
                Some(done) = attempts.join_next() => match done {
                    Ok(Ok(connected)) => match self.shake_hands(connected).await {
                        Ok(connection) => return connection,
                        Err(error) => self.failed(error),
                    },
                    Ok(Err(error)) => self.failed(error),
                    // An attempt that panicked is one that failed.
                    Err(_) => {}
                },
                () = time::sleep_until(next), if attempts.len() < ATTEMPTS_MAX => {
                    self.find_addresses(started).await;
                    if let Some(address) = self.addresses.get(started % self.addresses.len().max(1)) {
                        self.counters.dial_attempts.add();
                        attempts.spawn(connect(*address, self.times.connect_timeout));
                    }
                    started = started.wrapping_add(1);
                    next = time::Instant::now() + self.pause(started);
                }
            }
        }
    }

    /// How long until the next attempt, when `started` have begun.
    fn pause(&self, started: usize) -> Duration {
        let addresses = self.addresses.len().max(1);
        if started < addresses {
            return NEXT_ADDRESS_AFTER;
        }
        let doublings = ((started - addresses) / addresses).min(16) as u32;
        let pause = self
            .times
            .retry_min
            .saturating_mul(1 << doublings)
            .min(self.times.retry_max);
        jittered(pause)
    }

    /// Looks the peer up again at the start of each round over its addresses.
    async fn find_addresses(&mut self, started: usize) {
        if !self.addresses.is_empty() && !started.is_multiple_of(self.addresses.len()) {
            return;
        }
        let found = match time::timeout(RESOLVE_MAX, tokio::net::lookup_host(&self.target)).await {
            Ok(found) => found.map(|found| found.take(ADDRESSES_MAX).collect::<Vec<_>>()),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        };
        match found {
            Ok(found) if !found.is_empty() => self.addresses = found,
            Ok(_) => self.failed(DialError::Resolve {
                host: self.target.clone(),
                source: io::Error::new(io::ErrorKind::NotFound, "it has no address"),
            }),
            Err(source) => self.failed(DialError::Resolve {
                host: self.target.clone(),
                source,
            }),
        }
    }

    async fn shake_hands(&self, connected: Connected) -> Result<LinkConnection, DialError> {
        let Connected { stream, address, took } = connected;
        let failed = |source| DialError::Handshake { address, source };
        kernel::prepare(&stream).map_err(failed)?;
        let stream = SharedTcp(Arc::new(stream));
        // The name is not sent; rustls wants one.
        let name = ServerName::IpAddress(address.ip().into());
        let handshake = TlsConnector::from(self.tls.clone()).connect(name, stream.clone());
        // One round trip, and on a slow link as long again for its bytes.
        let patience = self.times.handshake_timeout.max(took * 6).min(HANDSHAKE_MAX);
        let done = time::timeout(patience, handshake)
            .await
            .unwrap_or(Err(io::ErrorKind::TimedOut.into()));
        let tls = match done {
            Ok(tls) => tls,
            Err(source) => {
                kernel::forget_on_close(&stream.0);
                return Err(failed(source));
            }
        };
        if tls::proven_key(tls.get_ref().1.peer_certificates()).is_none_or(|key| !key.is(&self.peer)) {
            return Err(failed(io::Error::other("no key was proven")));
        }
        let info = LinkInfo {
            peer: self.peer,
            address,
            dialled: true,
            dialled_by_smaller: self.ours < self.peer,
            up_since: Instant::now(),
        };
        self.counters.dialled.add();
        Ok(LinkConnection::new(info, tls.into()))
    }

    fn failed(&self, error: DialError) {
        self.counters.dial_failures.add();
        // If nobody takes events, one less does no harm.
        let _ = self.events.try_send(LinkEvent::DialFailed(error));
    }
}

async fn connect(address: SocketAddr, timeout: Duration) -> Result<Connected, DialError> {
    let start = Instant::now();
    let stream = match time::timeout(timeout, TcpStream::connect(address)).await {
        Ok(result) => result,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    };
    let stream = stream.map_err(|source| DialError::Connect { address, source })?;
    Ok(Connected {
        stream,
        address,
        took: start.elapsed(),
    })
}

/// Up to a fifth shorter, so that two ends do not keep meeting in the middle.
fn jittered(pause: Duration) -> Duration {
    let random = getrandom::u32().unwrap_or(0) % 1000;
    pause - pause * random / 5000
}
