//! `narrows run`: the assembly of a sidecar.

use std::{sync::Arc, time::Instant};

use tokio::{net::TcpListener, signal::unix};

use super::{
    Exit,
    status::{PeerStatus, Status},
};
use crate::{
    config::Config,
    io::admin::{self, Admin},
    metrics,
};

/// Runs until SIGTERM or SIGINT.
pub fn run(config: Config) -> Exit {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "No threads can be started.");
            return Exit::Failed;
        }
    };
    runtime.block_on(assemble(config))
}

async fn assemble(config: Config) -> Exit {
    let started = Instant::now();
    let metrics = match metrics::install(config.peers.iter().map(|peer| peer.name.as_str())) {
        Ok(metrics) => metrics,
        Err(error) => {
            tracing::error!(%error, "Start failed.");
            return Exit::Failed;
        }
    };
    metrics::QUEUE_LIMIT_BYTES.set((), config.queue.bytes_max.0 as f64);
    metrics::QUEUE_LIMIT_ENTRIES.set((), config.queue.entries_max as f64);

    let address = config.admin.listen.0;
    let listener = match TcpListener::bind(address).await {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%address, %error, "The admin port cannot be opened.");
            return Exit::Bind;
        }
    };
    // Before READY: from then on a signal is expected to be obeyed.
    let (mut terminate, mut interrupt) = match (
        unix::signal(unix::SignalKind::terminate()),
        unix::signal(unix::SignalKind::interrupt()),
    ) {
        (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
        (Err(error), _) | (_, Err(error)) => {
            tracing::error!(%error, "Signals cannot be received.");
            return Exit::Failed;
        }
    };

    let site = config.site.to_string();
    let peers: Vec<PeerStatus> = config.peers.iter().map(peer_status).collect();
    let admin = Admin {
        metrics,
        healthy: Arc::new(|| Ok(())),
        ready: Arc::new(|| Err("legs and link are being built".to_owned())),
        status: Arc::new(move || {
            let status = Status {
                site: site.clone(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                uptime_seconds: started.elapsed().as_secs_f64(),
                not_ready: Some("legs and link are being built".to_owned()),
                peers: peers.clone(),
                ..Status::default()
            };
            serde_json::to_value(status).unwrap_or_default()
        }),
    };
    tracing::info!(site = %config.site, admin = %address, "Started.");
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::warn!(%error, "systemd cannot be told that the start is done.");
    }
    tokio::select! {
        result = admin::serve(listener, admin) => {
            tracing::error!(?result, "The admin port closed.");
            return Exit::Failed;
        }
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("Stopped.");
    Exit::Ok
}

fn peer_status(peer: &crate::config::Peer) -> PeerStatus {
    PeerStatus {
        name: peer.name.to_string(),
        domains: peer.domains.iter().map(ToString::to_string).collect(),
        ..PeerStatus::default()
    }
}
