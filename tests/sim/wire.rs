//! The link: connections that break, and that each end takes up in its own time.
//!
//! A new connection may come up while an older one still stands, and one end may be on the new one while the other reads on from the
//! old: only when an end has taken up the new one are the old one's bytes nothing to it any more (which the shell sees to).

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

/// Batches that are on their way in one direction at most: what the socket buffers of a narrow link take.
const UNDER_WAY_MAX: usize = 4;

#[derive(Default)]
pub struct Wire {
    made: u64,
    /// By connection, what is on its way to either end.
    connections: BTreeMap<u64, [VecDeque<Bytes>; 2]>,
    at: [Option<u64>; 2],
    offered: [Option<u64>; 2],
}

impl Wire {
    pub fn is_up(&self) -> bool {
        self.at[0].is_some() && self.at[0] == self.at[1] && self.has(self.at[0])
    }

    pub fn is_held(&self, end: usize) -> bool {
        self.at[end].is_some()
    }

    fn has(&self, connection: Option<u64>) -> bool {
        connection.is_some_and(|connection| self.connections.contains_key(&connection))
    }

    /// A connection is there for both to take up.
    pub fn dial(&mut self) {
        self.made += 1;
        self.connections.insert(self.made, Default::default());
        self.offered = [Some(self.made); 2];
        let held = self.at;
        self.connections
            .retain(|connection, _| *connection == self.made || held.contains(&Some(*connection)));
    }

    /// Whether there was something to take up.
    pub fn take_up(&mut self, end: usize) -> bool {
        let Some(offered) = self.offered[end].take() else {
            return false;
        };
        self.at[end] = Some(offered);
        true
    }

    /// Everything under way is lost.
    pub fn cut(&mut self) {
        self.connections.clear();
        self.offered = [None; 2];
    }

    /// This end closes, or is gone; what it wrote still arrives.
    pub fn leave(&mut self, end: usize) {
        self.at[end] = None;
        self.offered[end] = None;
    }

    pub fn has_room(&self, end: usize) -> bool {
        self.at[end]
            .and_then(|connection| self.connections.get(&connection))
            .is_none_or(|pipes| pipes[1 - end].len() < UNDER_WAY_MAX)
    }

    pub fn write(&mut self, end: usize, bytes: Bytes) {
        if let Some(pipes) = self.at[end].and_then(|connection| self.connections.get_mut(&connection)) {
            pipes[1 - end].push_back(bytes);
        }
    }

    pub fn incoming(&mut self, end: usize) -> Option<&mut VecDeque<Bytes>> {
        let connection = self.at[end]?;
        let pipe = &mut self.connections.get_mut(&connection)?[end];
        (!pipe.is_empty()).then_some(pipe)
    }

    /// Whether this end finds out that its connection is gone: nothing is left to read, and nobody is at the other end.
    pub fn is_over(&mut self, end: usize) -> bool {
        let Some(connection) = self.at[end] else { return false };
        let other = 1 - end;
        let held = self.at[other] == Some(connection) || self.offered[other] == Some(connection);
        !self.has(Some(connection)) || !held && self.incoming(end).is_none()
    }
}
