//! The small certificate authority that vouches for the far domains at this site.
//!
//! A server with `s2s_secure_auth` (Debian's Prosody) talks to a far domain only under a certificate that it trusts, and the
//! far domains' real keys are far away. So each site makes an authority of its own, the administrator adds `ca.pem` to the
//! machine's trust store, and at every start the process mints one certificate for all far domains, in memory.
//!
//! Such an authority could vouch for any name, so it is told which ones when it is made: with name constraints
//! (RFC 5280 §4.2.1.10) a stolen `ca.key` is good for the far domains only.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose, NameConstraints, PKCS_ECDSA_P256_SHA256, SanType,
};
use time::OffsetDateTime;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime, pem::PemObject};

use super::{
    dns,
    tls::{ChainAndKey, Identity, Roots},
};
use crate::stanza::Domain;

const CERTIFICATE_FILE: &str = "ca.pem";
const KEY_FILE: &str = "ca.key";

/// The authority outlives the machine it stands on: to replace it, somebody must go to the trust store again.
const AUTHORITY_DAYS: i64 = 3650;

/// The longest that public rules let a server certificate live (CA/Browser Forum, 398 days), less a day; a process that
/// runs for longer renews it.
const LEAF_DAYS: i64 = 397;

/// How wrong the server's clock may be. A ship's clock is often not set by anybody.
const SKEW_DAYS: i64 = 1;

/// A process renews its certificate long before it ends.
const RENEW_AFTER: Duration = Duration::from_secs(200 * 24 * 3600);

/// After a failure; the old certificate is still good for months.
const RENEW_AGAIN_AFTER: Duration = Duration::from_secs(3600);

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuthorityError {
    #[error("{path} exists already, and servers may trust it; move it away to make a new authority")]
    Exists { path: PathBuf },
    #[error("{path}: {error}")]
    File { path: PathBuf, error: io::Error },
    #[error("{path}: {error}")]
    Content { path: PathBuf, error: String },
    #[error("{0:?} cannot stand in a certificate")]
    Domain(String),
    #[error(
        "the authority cannot vouch for all far domains: it was made for others, or its time is over; make a new one (`narrows ca init`)"
    )]
    NotVouched,
    #[error("the certificate cannot be made: {0}")]
    Make(#[from] rcgen::Error),
}

/// The authority's key and certificate.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// What `ca.pem` holds. More than one certificate if the authority is itself issued by the site's own PKI.
    chain: Vec<CertificateDer<'static>>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority(..)")
    }
}

impl Authority {
    /// Makes an authority and writes `ca.pem` and `ca.key` (readable by the owner only) into `dir`. It can vouch for
    /// `domains` and the names below them; with none given, for anything. What is there already is never overwritten.
    pub fn create(dir: &Path, name: &str, domains: &[Domain]) -> Result<Self, AuthorityError> {
        let (certificate_path, key_path) = paths(dir);
        for path in [&certificate_path, &key_path] {
            if path.symlink_metadata().is_ok() {
                return Err(AuthorityError::Exists { path: path.clone() });
            }
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = authority_params(name, domains)?.self_signed(&key)?;

        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(dir)
            .map_err(|error| file_error(dir, error))?;
        write_new(&key_path, 0o600, &key.serialize_pem())?;
        if let Err(error) = write_new(&certificate_path, 0o644, &certificate.pem()) {
            // Half an authority would stand in the way of the next attempt.
            let _ = std::fs::remove_file(&key_path);
            return Err(error);
        }
        File::open(dir)
            .and_then(|dir| dir.sync_all())
            .map_err(|error| file_error(dir, error))?;
        Self::load(dir)
    }

    pub fn load(dir: &Path) -> Result<Self, AuthorityError> {
        let (certificate_path, key_path) = paths(dir);
        let read = |path: &Path| std::fs::read_to_string(path).map_err(|error| file_error(path, error));
        let key = KeyPair::from_pem(&read(&key_path)?).map_err(|error| content_error(&key_path, error))?;
        let pem = read(&certificate_path)?;
        let chain = CertificateDer::pem_slice_iter(pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| content_error(&certificate_path, error))?;
        let first = chain
            .first()
            .ok_or_else(|| content_error(&certificate_path, "holds no certificate"))?;
        let issuer = Issuer::from_ca_cert_der(first, key).map_err(|error| content_error(&certificate_path, error))?;
        Ok(Self { issuer, chain })
    }

    /// One certificate for all `domains`, for both roles, and its key. Neither touches the disk.
    ///
    /// An error if this authority is past its time or constrained to other domains: a server would refuse the certificate.
    pub fn issue(&self, domains: &[Domain]) -> Result<ChainAndKey, AuthorityError> {
        let issued = self.mint(domains)?;
        let root = self.chain.last().cloned();
        let vouched = Roots::new(root.into_iter().collect()).examine(&issued.chain, UnixTime::now());
        if !vouched.is_some_and(|certificate| certificate.trusted) {
            return Err(AuthorityError::NotVouched);
        }
        Ok(issued)
    }

    /// As [`issue`](Self::issue), without asking whether anybody will believe it.
    #[doc(hidden)]
    pub fn mint(&self, domains: &[Domain]) -> Result<ChainAndKey, AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = leaf_params(domains)?.signed_by(&key, &self.issuer)?;
        let mut chain = vec![certificate.der().clone()];
        chain.extend(self.chain.iter().cloned());
        Ok(ChainAndKey {
            chain,
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        })
    }

    /// Keeps `identity` fresh for as long as the process runs.
    pub async fn renew(self, domains: Vec<Domain>, identity: Arc<Identity>) {
        let mut wait = RENEW_AFTER;
        loop {
            tokio::time::sleep(wait).await;
            let renewed = self
                .issue(&domains)
                .map_err(|error| error.to_string())
                .and_then(|material| identity.replace(material).map_err(|error| error.to_string()));
            wait = match renewed {
                Ok(()) => {
                    tracing::info!("The far domains' certificate was renewed.");
                    RENEW_AFTER
                }
                Err(error) => {
                    tracing::error!(error, "The far domains' certificate cannot be renewed.");
                    RENEW_AGAIN_AFTER
                }
            };
        }
    }
}

fn authority_params(name: &str, domains: &[Domain]) -> Result<CertificateParams, AuthorityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params.not_before, params.not_after) = validity(AUTHORITY_DAYS);
    if !domains.is_empty() {
        let permitted = domains
            .iter()
            .map(|domain| Ok(GeneralSubtree::DnsName(a_label(domain)?)));
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: permitted.collect::<Result<_, AuthorityError>>()?,
            // A constraint limits names of its own kind only, so the other kind that servers look at is shut out.
            excluded_subtrees: [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)]
                .map(|all| GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(all, 0)))
                .into(),
        });
    }
    Ok(params)
}

/// Only dNSName stands for the domains, although RFC 6120 §13.7.1.4 has id-on-xmppAddr as well: ejabberd 23.01's stream
/// process crashes on such a name (p1_xmpp 1.6.1, `xmpp_stream_pkix:get_cert_domains/1`), and all servers read the first.
fn leaf_params(domains: &[Domain]) -> Result<CertificateParams, AuthorityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name("narrows");
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    (params.not_before, params.not_after) = validity(LEAF_DAYS);
    for domain in domains {
        params.subject_alt_names.push(SanType::DnsName(
            a_label(domain)?
                .try_into()
                .map_err(|_| AuthorityError::Domain(domain.to_string()))?,
        ));
    }
    Ok(params)
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// From a day ago on.
fn validity(days: i64) -> (OffsetDateTime, OffsetDateTime) {
    let start = OffsetDateTime::now_utc() - time::Duration::days(SKEW_DAYS);
    (start, start + time::Duration::days(days))
}

fn a_label(domain: &Domain) -> Result<String, AuthorityError> {
    dns::ascii(domain.as_str()).ok_or_else(|| AuthorityError::Domain(domain.to_string()))
}

fn paths(dir: &Path) -> (PathBuf, PathBuf) {
    (dir.join(CERTIFICATE_FILE), dir.join(KEY_FILE))
}

fn write_new(path: &Path, mode: u32, content: &str) -> Result<(), AuthorityError> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(content.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|error| file_error(path, error))
}

fn file_error(path: &Path, error: io::Error) -> AuthorityError {
    AuthorityError::File {
        path: path.to_owned(),
        error,
    }
}

fn content_error(path: &Path, error: impl ToString) -> AuthorityError {
    AuthorityError::Content {
        path: path.to_owned(),
        error: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn domains(names: &[&str]) -> Vec<Domain> {
        names.iter().map(|name| Domain::new(name).unwrap()).collect()
    }

    fn mode(path: PathBuf) -> u32 {
        path.metadata().unwrap().permissions().mode() & 0o777
    }

    /// What an authority issues is trusted by who trusts the authority, now and for a year, and names every domain.
    #[test]
    fn issues_what_its_root_vouches_for() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("ca");
        let far = domains(&["a.example", "bücher.example", "conference.a.example"]);
        Authority::create(&dir, "test", &far).unwrap();
        let authority = Authority::load(&dir).unwrap();
        let issued = authority.issue(&far).unwrap();

        let roots = Roots::load(&dir.join("ca.pem")).unwrap();
        let certificate = roots.examine(&issued.chain, UnixTime::now()).unwrap();
        assert!(certificate.trusted);
        assert_eq!(
            certificate.dns,
            ["a.example", "xn--bcher-kva.example", "conference.a.example"]
        );
        assert!(certificate.xmpp.is_empty(), "ejabberd crashes on them");
        assert!(
            !Roots::default()
                .examine(&issued.chain, UnixTime::now())
                .unwrap()
                .trusted
        );

        let after =
            |days: u64| UnixTime::since_unix_epoch(Duration::from_secs(UnixTime::now().as_secs() + days * 86_400));
        assert!(roots.examine(&issued.chain, after(395)).unwrap().trusted);
        assert!(!roots.examine(&issued.chain, after(397)).unwrap().trusted);
        Identity::new(issued).unwrap();
    }

    /// A stolen key is good for the far domains only: what it signs for another domain, nobody trusts.
    #[test]
    fn a_constrained_authority_cannot_vouch_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let far = domains(&["a.example"]);
        let authority = Authority::create(dir.path(), "test", &far).unwrap();
        let roots = Roots::load(&dir.path().join("ca.pem")).unwrap();
        let trusted = |names: &[&str]| {
            let names = domains(names);
            let issued = authority.mint(&names).unwrap();
            let vouched = authority.issue(&names).is_ok();
            assert_eq!(vouched, roots.examine(&issued.chain, UnixTime::now()).unwrap().trusted);
            roots.examine(&issued.chain, UnixTime::now()).unwrap().trusted
        };
        assert!(trusted(&["a.example"]));
        assert!(trusted(&["conference.a.example"]));
        assert!(!trusted(&["bank.example"]));
        assert!(!trusted(&["a.example", "bank.example"]));
    }

    /// Servers may trust what is there, so it is never overwritten; the key is its owner's alone.
    #[test]
    fn never_overwrites_and_hides_the_key() {
        let dir = tempfile::tempdir().unwrap();
        Authority::create(dir.path(), "test", &[]).unwrap();
        assert_eq!(mode(dir.path().join("ca.key")), 0o600);
        assert_eq!(mode(dir.path().join("ca.pem")), 0o644);
        let before = std::fs::read(dir.path().join("ca.pem")).unwrap();

        let again = Authority::create(dir.path(), "test", &[]).unwrap_err();
        assert!(matches!(again, AuthorityError::Exists { .. }), "{again}");
        std::fs::remove_file(dir.path().join("ca.key")).unwrap();
        Authority::create(dir.path(), "test", &[]).unwrap_err();
        assert_eq!(std::fs::read(dir.path().join("ca.pem")).unwrap(), before);
    }

    /// What is missing or broken is said with its path.
    #[test]
    fn a_missing_authority_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Authority::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("ca.key"), "{error}");
    }
}
