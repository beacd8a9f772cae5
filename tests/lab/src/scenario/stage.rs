//! A [`World`] of the lab as a stage.

use std::time::Duration;

use super::{Side, Stage};
use crate::client::{Client, Outcome};
use crate::servers::{C2S_PORT, Kind, PASSWORD};
use crate::world::{Site, World};

/// Two real servers, with whatever the world has put between them.
///
/// The world's sites must have the accounts of [`super::accounts`].
#[derive(Clone, Copy, Debug)]
pub struct WorldStage<'w> {
    world: &'w World,
    host: Side,
    archives: bool,
    patience: Duration,
}

impl<'w> WorldStage<'w> {
    /// Rooms are at site A, and not archived by anything that the world's maker knows of.
    pub fn new(world: &'w World) -> Self {
        Self {
            world,
            host: Side::A,
            archives: false,
            // Prosody gives up a stream that does not come up after 90 s; nothing that works takes longer than that.
            patience: Duration::from_secs(90),
        }
    }

    /// Which site has the rooms.
    pub fn hosted_at(mut self, host: Side) -> Self {
        self.host = host;
        self
    }

    /// The rooms' server was made with [`crate::ServerSpec::mam`].
    pub fn archived(mut self) -> Self {
        self.archives = true;
        self
    }

    /// For links on which waiting longer is no fault.
    pub fn waiting(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    fn site(&self, side: Side) -> &'w Site {
        match side {
            Side::A => &self.world.a,
            Side::B => &self.world.b,
        }
    }
}

/// Twice `queue.collapse_window` as narrows has it by default.
const GATHERING: Duration = Duration::from_millis(100);

impl Stage for WorldStage<'_> {
    fn domain(&self, side: Side) -> String {
        self.site(side).domain().to_owned()
    }

    fn rooms(&self, side: Side) -> String {
        self.site(side).conference()
    }

    fn kind(&self, side: Side) -> Kind {
        self.site(side).server().kind()
    }

    fn connect(&self, side: Side, user: &str, resource: &str) -> Outcome<Client> {
        let site = self.site(side);
        let bare = format!("{user}@{}", site.domain());
        Client::connect(site.connect_tcp(C2S_PORT)?, &bare, PASSWORD, resource)
    }

    fn host(&self) -> Side {
        self.host
    }

    fn archives(&self) -> bool {
        self.archives
    }

    fn patience(&self) -> Duration {
        self.patience
    }

    /// A sidecar gathers the copies of a broadcast, and order is promised by full sender (and for a room's talk): an answer does not wait.
    fn gathering(&self) -> Duration {
        if self.world.a.has_sidecar() {
            GATHERING
        } else {
            Duration::ZERO
        }
    }
}
