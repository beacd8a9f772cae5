//! Bytes ⇄ types, with limits: XML streams, queue entries, link frames, compression.

pub mod check;
pub mod compress;
pub mod entry;
pub mod frame;
pub mod position;
pub mod reflection;
pub mod templates;
pub mod varint;
pub mod xml;
