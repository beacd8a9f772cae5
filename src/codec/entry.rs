//! What one durable queue slot holds.
//!
//! An entry is self-contained: no table or context is needed to read it back, in any later version.

use bytes::Bytes;

/// One stanza for one or many recipients of one domain.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Cast {
    /// The stanza without its `to` attribute.
    pub template: Bytes,
    /// Where the attribute goes.
    pub to_at: u32,
    /// The attribute for each recipient, exactly as the server wrote it (white space, quotes and escapes), e.g. ` to='b1@b.example/r'`.
    /// Never empty, no repetition, in ascending order.
    pub recipients: Vec<Bytes>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Entry {
    Cast(Cast),
    /// An entry that was given up before it crossed. It keeps the numbering dense.
    Void,
}
