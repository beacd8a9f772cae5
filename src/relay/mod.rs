//! One peer's machines together, and the one place that routes.

use crate::stanza::DomainPair;

/// Names a receiving stream for as long as the process lives.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct LegId(pub u64);

/// One of the initiating streams towards our server for a domain pair. Recipients are spread over a pair's lanes by
/// a hash, so that each recipient's stanzas stay in order.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct LaneKey {
    pub pair: DomainPair,
    pub lane: u8,
}
