//! `keygen`, `pubkey` and `ca`: what they print.

use std::{fs, io, path::Path, path::PathBuf};

use crate::{
    config::{Config, PublicKey},
    io::{
        ca::{Authority, AuthorityError},
        keys::{KeyError, PrivateKey},
    },
    stanza::Domain,
};

#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error("{path}: {error}")]
    File { path: PathBuf, error: io::Error },
}

/// The public key alone, so that a script can take it as it is.
pub(super) fn generate(file: &Path) -> Result<String, Failure> {
    let key = PrivateKey::generate(file)?;
    Ok(format!("{}\n", key.public()))
}

pub(super) fn public(file: &Path) -> Result<String, Failure> {
    let (key, warning) = PrivateKey::load(file)?;
    if let Some(warning) = warning {
        eprintln!("narrows: {warning}");
    }
    Ok(format!("{}\n", key.public()))
}

/// Our own public key, to find a peer that was given it. Whether the file can be used is not judged here: a configuration
/// may be checked on another machine.
pub(super) fn own_key(file: &Path) -> Option<PublicKey> {
    let (key, _) = PrivateKey::load(file).ok()?;
    // The two types differ in what they are for, and have their text in common.
    key.public().to_string().parse().ok()
}

/// With a configuration, the authority can vouch for its far domains only.
pub(super) fn ca_init(directory: &Path, config: Option<&Config>) -> Result<String, Failure> {
    let far: Vec<Domain> = config
        .into_iter()
        .flat_map(|config| &config.peers)
        .flat_map(|peer| &peer.domains)
        .map(|domain| domain.0.clone())
        .collect();
    let name = match config {
        Some(config) => format!("narrows {}", config.site),
        None => "narrows".to_owned(),
    };
    Authority::create(directory, &name, &far)?;
    let certificate = certificate_path(directory);
    let certificate = certificate.display();
    let limits = if far.is_empty() {
        "It can vouch for any domain: keep the directory from other eyes, or make it anew with --config.".to_owned()
    } else {
        let far: Vec<&str> = far.iter().map(Domain::as_str).collect();
        format!("It can vouch for {} only.", far.join(", "))
    };
    Ok(format!(
        "The authority is in {}. {limits}\n\
         A server that checks certificates has to trust it, and reads this at its start. On Debian:\n  \
         cp {certificate} /usr/local/share/ca-certificates/narrows.crt && update-ca-certificates\n",
        directory.display()
    ))
}

/// The certificate as it is, to be piped to where it is wanted; read as an authority first, so that damage is noticed.
pub(super) fn ca_show(directory: &Path) -> Result<String, Failure> {
    Authority::load(directory)?;
    let path = certificate_path(directory);
    fs::read_to_string(&path).map_err(|error| Failure::File { path, error })
}

fn certificate_path(directory: &Path) -> PathBuf {
    directory.join("ca.pem")
}
