//! The link between two sidecars: numbered entries, acknowledgements, resume.

pub mod session;
pub mod window;
