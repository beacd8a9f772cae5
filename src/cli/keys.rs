//! `keygen`, `pubkey` and `ca`: what they print.

use std::path::Path;

use crate::config::{Config, PublicKey};

#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("this part is being built")]
    Unbuilt,
}

pub(super) fn generate(_file: &Path) -> Result<String, Failure> {
    Err(Failure::Unbuilt)
}

pub(super) fn public(_file: &Path) -> Result<String, Failure> {
    Err(Failure::Unbuilt)
}

/// Our own public key, to find a peer that was given it. Whether the file can be used is not judged here: a configuration
/// may be checked on another machine.
pub(super) fn own_key(_file: &Path) -> Option<PublicKey> {
    None
}

pub(super) fn ca_init(_directory: &Path, _config: Option<&Config>) -> Result<String, Failure> {
    Err(Failure::Unbuilt)
}

pub(super) fn ca_show(_directory: &Path) -> Result<String, Failure> {
    Err(Failure::Unbuilt)
}
