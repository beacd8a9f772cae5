//! Dialback keys (XEP-0220, XEP-0185): stateless, so that any of our streams can answer for any other.

use crate::stanza::Domain;

/// The secret that keys are made from. It never leaves the process.
pub struct Secret([u8; 32]);

impl Secret {
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub fn key(&self, receiving: &Domain, originating: &Domain, stream_id: &str) -> Option<String> {
        let _ = (&self.0, receiving, originating, stream_id);
        todo!()
    }

    /// Whether `key` is the one that [`key`](Self::key) makes. Takes the same time whatever differs.
    pub fn verify(&self, receiving: &Domain, originating: &Domain, stream_id: &str, key: &str) -> bool {
        let _ = (receiving, originating, stream_id, key);
        todo!()
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}
