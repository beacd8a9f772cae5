//! `narrows run`: puts the parts together, and takes them apart in good order.
//!
//! Order matters. The stores open first: without them nothing may be accepted. Then the owners of the peers, then the
//! listener for our server, because a server that finds a far domain's door shut throws that domain's users out of its rooms.
//! The link comes last; it may be down for days anyway. On SIGTERM the legs close first and what they brought
//! goes to disk, then the lanes and the link close, then the stores.

use std::{fmt, fs, io, path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, watch},
    task::JoinSet,
};
use tracing::{info, warn};

use crate::{
    codec::xml::Limits,
    config::{self, Compression, Config, Identity, Management, PeriodOrOff},
    io::{
        admin,
        ca::{Authority, AuthorityError},
        clock::Clock,
        dns::{DnsError, Location, Resolver},
        lane::LegContext,
        legs::{self, LegHandle, Legs, Routes},
        link,
        peer::{self, Peer, PeerStatus},
        store::{self, StoreError},
        tls::{self, Acceptor, ChainAndKey, Connector, Roots, ServerTrust, TlsError},
    },
    link::session::SessionConfig,
    metrics,
    relay::{Relay, Settings},
    stanza::Domain,
    stream::{Site, dialback::Secret},
};

/// For our server to close its streams after we have closed ours.
const LEGS_DRAIN_MAX: Duration = Duration::from_secs(5);

/// Why it could not start, or had to stop.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    #[error("{path}: {error}")]
    File { path: PathBuf, error: io::Error },
    #[error("{0}")]
    Authority(#[from] AuthorityError),
    #[error("{0}")]
    Tls(#[from] TlsError),
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error("{what} cannot listen on {address}: {error}")]
    Bind {
        what: &'static str,
        address: String,
        error: io::Error,
    },
    #[error("no random numbers from the system: {0}")]
    Random(getrandom::Error),
    #[error("{0}")]
    Dns(#[from] DnsError),
    #[error("{0}")]
    Other(String),
}

fn domains(list: &[config::Domain]) -> Vec<Domain> {
    list.iter().map(|domain| domain.0.clone()).collect()
}

fn far_domains(config: &Config) -> Vec<Domain> {
    config.peers.iter().flat_map(|peer| domains(&peer.domains)).collect()
}

fn site(config: &Config) -> Result<Site, RunError> {
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).map_err(RunError::Random)?;
    let limits = &config.legs.limits;
    Ok(Site {
        local: domains(&config.local.domains).into_iter().collect(),
        far: far_domains(config).into_iter().collect(),
        require_tls: config.legs.require_tls,
        offer_management: config.legs.management == Management::On,
        use_management: config.legs.management != Management::Off,
        before_authentication: Limits::BEFORE_AUTHENTICATION,
        after_authentication: Limits {
            stanza_bytes_max: limits.stanza_bytes.0 as usize,
            depth_max: limits.depth.into(),
            attributes_max: limits.attributes.into(),
            elements_max: limits.elements as usize,
        },
        secret: Secret::new(secret),
    })
}

/// The certificate for the far domains, and the task that keeps it fresh if it is ours to make.
fn identity(config: &Config, tasks: &mut JoinSet<()>) -> Result<Arc<tls::Identity>, RunError> {
    match config.identity() {
        Identity::Files { chain, key } => Ok(tls::Identity::new(ChainAndKey::load(&chain, &key)?)?),
        Identity::Ca(directory) => {
            let authority = Authority::load(&directory)?;
            let far = far_domains(config);
            let identity = tls::Identity::new(authority.issue(&far)?)?;
            tasks.spawn(authority.renew(far, Arc::clone(&identity)));
            Ok(identity)
        }
    }
}
