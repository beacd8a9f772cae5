//! The key that a site proves itself with to its peers, and the keys it knows them by.
//!
//! In the manner of WireGuard: one Ed25519 key (RFC 8410) in a file that only we may read, and a public key per peer in the
//! configuration, as base64 of its 32 bytes. The same 32 bytes cross in the TLS handshake (RFC 7250).

use std::{
    fmt,
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use rcgen::{KeyPair, PKCS_ED25519, PublicKeyData};
use subtle::ConstantTimeEq;
use tokio_rustls::rustls::{
    crypto::ring::sign::any_eddsa_type,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer},
    sign::CertifiedKey,
};

/// RFC 8410 §4: what stands before the 32 bytes of an Ed25519 key in its SubjectPublicKeyInfo.
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
const PUBLIC_KEY_BYTES: usize = 32;
/// A PEM file with such a key has about 200 bytes; comments may stand around it.
const FILE_BYTES_MAX: u64 = 16 * 1024;
/// Read by its owner only.
const PRIVATE_MODE: u32 = 0o600;

/// An Ed25519 public key. The order is that of the bytes and means nothing, but both ends see the same.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PublicKey([u8; PUBLIC_KEY_BYTES]);

impl PublicKey {
    /// Reads what crosses in a handshake.
    pub fn from_spki(spki: &[u8]) -> Option<Self> {
        let key = spki.strip_prefix(&SPKI_PREFIX)?;
        Some(Self(key.try_into().ok()?))
    }

    pub fn spki(&self) -> Vec<u8> {
        [&SPKI_PREFIX[..], &self.0].concat()
    }

    /// Compares in a time that says nothing about where two keys differ.
    pub fn is(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = PublicKeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = STANDARD.decode(text.trim()).map_err(|_| PublicKeyError::NotBase64)?;
        let len = bytes.len();
        Ok(Self(bytes.try_into().map_err(|_| PublicKeyError::WrongLength(len))?))
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PublicKeyError {
    #[error("a public key is base64, as `narrows pubkey FILE` prints it")]
    NotBase64,
    #[error("a public key has 32 bytes, not {0}")]
    WrongLength(usize),
}

/// Our private key, ready to sign handshakes.
#[derive(Clone)]
pub struct PrivateKey {
    public: PublicKey,
    certified: Arc<CertifiedKey>,
}

impl PrivateKey {
    /// Makes a key and writes it to a new file. A file that is there is never touched: peers know its key.
    pub fn generate(path: &Path) -> Result<Self, KeyError> {
        let pair = KeyPair::generate_for(&PKCS_ED25519).map_err(|_| KeyError::NoRandomness)?;
        let pem = pair.serialize_pem();
        let failed = |source| KeyError::Write {
            path: path.to_owned(),
            source,
        };
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(PRIVATE_MODE)
            .open(path)
            .map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => KeyError::Exists(path.to_owned()),
                _ => failed(error),
            })?;
        file.write_all(pem.as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(failed)?;
        Self::from_pem(&pem).ok_or_else(|| KeyError::NotAKey(path.to_owned()))
    }

    /// Reads a key, and says if others on this machine can read it too.
    pub fn load(path: &Path) -> Result<(Self, Option<KeyWarning>), KeyError> {
        let failed = |source| KeyError::Read {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.mode() & 0o777;
        let mut pem = String::new();
        file.take(FILE_BYTES_MAX).read_to_string(&mut pem).map_err(failed)?;
        let key = Self::from_pem(&pem).ok_or_else(|| KeyError::NotAKey(path.to_owned()))?;
        let readable = mode & 0o077 != 0;
        Ok((
            key,
            readable.then(|| KeyWarning {
                path: path.to_owned(),
                mode,
            }),
        ))
    }

    pub fn public(&self) -> PublicKey {
        self.public
    }

    /// As rustls wants it: the raw public key in the place of a certificate.
    pub fn certified(&self) -> Arc<CertifiedKey> {
        self.certified.clone()
    }

    fn from_pem(pem: &str) -> Option<Self> {
        let pair = KeyPair::from_pem(pem).ok()?;
        if !pair.is_compatible(&PKCS_ED25519) {
            return None;
        }
        let public = PublicKey(pair.der_bytes().try_into().ok()?);
        let signing = any_eddsa_type(&PrivatePkcs8KeyDer::from(pair.serialize_der())).ok()?;
        let certified = CertifiedKey::new(vec![CertificateDer::from(public.spki())], signing);
        Some(Self {
            public,
            certified: Arc::new(certified),
        })
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateKey of {}", self.public)
    }
}

/// Not an error: the administrator may have reasons.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct KeyWarning {
    pub path: PathBuf,
    pub mode: u32,
}

impl fmt::Display for KeyWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        write!(
            f,
            "others can read the private key (mode {:04o}): chmod 600 {path}",
            self.mode
        )
    }
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    #[error("{} is there already, and is left as it is: `narrows pubkey` prints its public key", .0.display())]
    Exists(PathBuf),
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} holds no Ed25519 private key: `narrows keygen FILE` makes one", .0.display())]
    NotAKey(PathBuf),
    #[error("the system gives no random numbers")]
    NoRandomness,
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A key that was written is read back, is private, and is never written over.
    #[test]
    fn keys_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let made = PrivateKey::generate(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let (read, warning) = PrivateKey::load(&path).unwrap();
        assert_eq!((read.public(), warning), (made.public(), None));
        assert!(matches!(PrivateKey::generate(&path), Err(KeyError::Exists(_))));
        assert_eq!(PrivateKey::load(&path).unwrap().0.public(), made.public());
    }

    /// A key that others can read works, with a warning that says what to type.
    #[test]
    fn readable_keys_are_warned_of() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        PrivateKey::generate(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let (_, warning) = PrivateKey::load(&path).unwrap();
        assert!(warning.unwrap().to_string().contains("chmod 600"));
    }

    /// What is not an Ed25519 key is refused by name.
    #[test]
    fn other_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let other = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)
            .unwrap()
            .serialize_pem();
        for content in [
            "",
            "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
            &other,
        ] {
            fs::write(&path, content).unwrap();
            assert!(matches!(PrivateKey::load(&path), Err(KeyError::NotAKey(_))));
        }
        assert!(matches!(
            PrivateKey::load(&dir.path().join("none")),
            Err(KeyError::Read { .. })
        ));
    }

    /// A public key survives the configuration and the handshake; wrong ones are told apart.
    #[test]
    fn public_keys_round_trip() {
        let key = PublicKey([7; 32]);
        assert_eq!(key.to_string().parse(), Ok(key));
        assert_eq!(PublicKey::from_spki(&key.spki()), Some(key));
        assert_eq!(PublicKey::from_spki(&key.spki()[1..]), None);
        assert_eq!("?".parse::<PublicKey>(), Err(PublicKeyError::NotBase64));
        assert_eq!("AAAA".parse::<PublicKey>(), Err(PublicKeyError::WrongLength(3)));
        assert!(key.is(&key) && !key.is(&PublicKey([8; 32])));
    }
}
