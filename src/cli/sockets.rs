//! Listening sockets that someone else holds open for us: a systemd `.socket` unit, or whoever speaks its protocol (`LISTEN_FDS`).
//!
//! A server whose connection is refused gives up at once, and its rooms then remove every far occupant: while nobody
//! listens, nobody may speak. A socket that outlives our process lets the server's connections wait, through a
//! restart as well as through a kill.

use std::{io, net::SocketAddr};

use listenfd::ListenFd;
use tracing::{info, warn};

/// The TCP sockets that this process was given.
#[derive(Debug, Default)]
pub struct Inherited(Vec<(SocketAddr, std::net::TcpListener)>);

impl Inherited {
    /// Takes them over. To be called once, before there are threads: it clears the environment, so that no child process
    /// takes them for its own.
    pub fn take_all() -> Self {
        let mut given = ListenFd::from_env();
        let mut sockets = Vec::new();
        for index in 0..given.len() {
            let taken = given
                .take_tcp_listener(index)
                .and_then(|socket| socket.map(|socket| Ok((socket.local_addr()?, socket))).transpose());
            match taken {
                Ok(Some(socket)) => sockets.push(socket),
                Ok(None) => {}
                Err(error) => warn!(index, %error, "A socket that was passed to us cannot be used."),
            }
        }
        Self(sockets)
    }

    /// The one that listens on this address, if it was given.
    pub fn take(&mut self, address: SocketAddr) -> io::Result<Option<tokio::net::TcpListener>> {
        let Some(at) = self.0.iter().position(|(there, _)| *there == address) else {
            return Ok(None);
        };
        let (_, socket) = self.0.swap_remove(at);
        socket.set_nonblocking(true)?;
        info!(%address, "Listening on a socket that was passed to us.");
        tokio::net::TcpListener::from_std(socket).map(Some)
    }
}

impl Drop for Inherited {
    /// What the configuration does not name is closed, and said: most likely the two addresses should have been the same.
    fn drop(&mut self) {
        for (address, _) in &self.0 {
            warn!(%address, "A socket was passed to us that `legs.listen` does not name.");
        }
    }
}
