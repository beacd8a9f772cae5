//! TLS with our own server, in both roles (RFC 6120 §5, §13.7; XEP-0368).
//!
//! Who may say what is decided by the streams, with SASL EXTERNAL or dialback; TLS only reports. A handshake succeeds with
//! any certificate whose key the other side holds (its signature is checked as always), and what the certificate proves is
//! handed on as [`stream::Certificate`](Certificate). [`ServerTrust::Verified`] is for sites whose server is not on a
//! network of its own: then a stream that we open goes on only if the certificate is good for the domain.
//!
//! Sessions are not resumed: a handshake costs nothing on a LAN, and a resumed session would skip what is reported here.

use std::{
    io,
    net::IpAddr,
    path::Path,
    sync::{Arc, RwLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{
    TlsAcceptor, TlsConnector, TlsStream,
    rustls::{
        self, ClientConfig, ServerConfig, SignatureScheme,
        client::{ResolvesClientCert, Resumption},
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, TrustAnchor, UnixTime, pem::PemObject},
        server::{ClientHello, NoServerSessionStorage, ResolvesServerCert},
        sign::CertifiedKey,
        version::{TLS12, TLS13},
    },
};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_parser::{
    der_parser::asn1_rs::{Any, FromDer, TaggedExplicit},
    extensions::GeneralName,
    prelude::X509Certificate,
};

use super::{dns, verifier::Verifier};
use crate::{stanza::Domain, stream::Certificate};

/// XEP-0368 §2
const DIRECT_TLS_PROTOCOL: &[u8] = b"xmpp-server";

/// A handshake that is not over by then never will be. ejabberd's own limit for all of the negotiation is 30 s.
const HANDSHAKE_MAX: Duration = Duration::from_secs(20);

/// Names that are read from one certificate. Rustls lets certificates of 64 KiB through.
const NAMES_MAX: usize = 512;

/// id-on-xmppAddr (RFC 6120 §13.7.1.4)
const XMPP_ADDR: &str = "1.3.6.1.5.5.7.8.5";
/// id-on-dnsSRV (RFC 4985)
const DNS_SRV: &str = "1.3.6.1.5.5.7.8.7";

/// What is asked of the server's certificate on streams that we open.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum ServerTrust {
    /// Nothing: it is our server, at an address that the administrator gave or on the site's LAN.
    #[default]
    Any,
    /// Its chain leads to a root of [`Roots`], and it names the domain.
    Verified,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    #[error("{path}: {error}")]
    File { path: String, error: String },
    #[error("the certificate does not fit the key: {0}")]
    Identity(rustls::Error),
    #[error("TLS cannot be set up: {0}")]
    SetUp(rustls::Error),
    #[error("TLS handshake: {0}")]
    Handshake(#[from] io::Error),
    #[error("TLS handshake not done within {} s", HANDSHAKE_MAX.as_secs())]
    Timeout,
    #[error("the server's certificate is not good for {0}")]
    NotProven(Domain),
}

impl TlsError {
    /// The value in metrics.
    pub fn as_label(&self) -> &'static str {
        match self {
            Self::File { .. } => "file",
            Self::Identity(_) => "identity",
            Self::SetUp(_) => "set_up",
            Self::Handshake(_) => "handshake",
            Self::Timeout => "timeout",
            Self::NotProven(_) => "not_proven",
        }
    }
}

/// A certificate chain and its private key.
#[derive(Debug)]
pub struct ChainAndKey {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

impl ChainAndKey {
    /// Reads PEM files.
    pub fn load(chain: &Path, key: &Path) -> Result<Self, TlsError> {
        Ok(Self {
            chain: read_certificates(chain)?,
            key: PrivateKeyDer::from_pem_file(key).map_err(|error| TlsError::File {
                path: key.display().to_string(),
                error: error.to_string(),
            })?,
        })
    }
}

/// The certificate that stands for the far domains, in both roles. It can be replaced while streams go on.
#[derive(Debug)]
pub struct Identity {
    current: RwLock<Arc<CertifiedKey>>,
}

impl Identity {
    pub fn new(material: ChainAndKey) -> Result<Arc<Self>, TlsError> {
        let current = RwLock::new(Self::certified(material)?);
        Ok(Arc::new(Self { current }))
    }

    /// New handshakes use the new certificate.
    pub fn replace(&self, material: ChainAndKey) -> Result<(), TlsError> {
        let certified = Self::certified(material)?;
        *self.current.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = certified;
        Ok(())
    }

    fn certified(material: ChainAndKey) -> Result<Arc<CertifiedKey>, TlsError> {
        CertifiedKey::from_der(material.chain, material.key, &ring::default_provider())
            .map(Arc::new)
            .map_err(TlsError::Identity)
    }

    fn current(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.current.read().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }
}

impl ResolvesServerCert for Identity {
    // The name in the ClientHello does not matter: one certificate holds all far domains, and Prosody sends none with STARTTLS.
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

impl ResolvesClientCert for Identity {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// What certificates are checked against.
#[derive(Debug, Default)]
pub struct Roots {
    anchors: Vec<TrustAnchor<'static>>,
    /// A server's own certificate may stand here itself, as self-signed ones have to.
    listed: Vec<CertificateDer<'static>>,
}

impl Roots {
    /// The machine's trust store. What cannot be read of it is left out.
    pub fn system() -> Self {
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            tracing::debug!(%error, "A part of the trust store cannot be read.");
        }
        Self::new(found.certs)
    }

    /// A PEM file of certificates.
    pub fn load(path: &Path) -> Result<Self, TlsError> {
        Ok(Self::new(read_certificates(path)?))
    }

    pub fn new(certificates: Vec<CertificateDer<'static>>) -> Self {
        let anchors = certificates
            .iter()
            .filter_map(|certificate| {
                anchor_from_trusted_cert(certificate)
                    .ok()
                    .map(|anchor| anchor.to_owned())
            })
            .collect();
        Self {
            anchors,
            listed: certificates,
        }
    }

    /// What a chain, its own certificate first, says and is worth at `now`.
    pub fn examine(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Option<Certificate> {
        let (own, intermediates) = chain.split_first()?;
        let (_, parsed) = X509Certificate::from_der(own).ok()?;
        Some(Certificate {
            trusted: self.is_listed(own, &parsed, now) || self.leads_to_root(own, intermediates, now),
            ..names(&parsed)
        })
    }

    fn leads_to_root(&self, own: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>], now: UnixTime) -> bool {
        let Ok(own) = EndEntityCert::try_from(own) else {
            return false;
        };
        // Servers use one certificate in both roles, and public CAs issue them for servers only.
        [KeyUsage::server_auth(), KeyUsage::client_auth()]
            .into_iter()
            .any(|usage| {
                own.verify_for_usage(
                    webpki::ALL_VERIFICATION_ALGS,
                    &self.anchors,
                    intermediates,
                    now,
                    usage,
                    None,
                    None,
                )
                .is_ok()
            })
    }

    fn is_listed(&self, own: &CertificateDer<'_>, parsed: &X509Certificate<'_>, now: UnixTime) -> bool {
        let now_s = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let validity = parsed.validity();
        self.listed.iter().any(|listed| listed.as_ref() == own.as_ref())
            && (validity.not_before.timestamp()..=validity.not_after.timestamp()).contains(&now_s)
    }
}

/// Does the handshake as the TLS server: for streams that our server opens.
#[derive(Clone, Debug)]
pub struct Acceptor {
    starttls: Arc<ServerConfig>,
    direct: Arc<ServerConfig>,
    roots: Arc<Roots>,
}

impl Acceptor {
    pub fn new(identity: Arc<Identity>, roots: Arc<Roots>) -> Result<Self, TlsError> {
        let mut starttls = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&TLS12, &TLS13])
            .map_err(TlsError::SetUp)?
            .with_client_cert_verifier(Verifier::any_certificate())
            .with_cert_resolver(identity);
        starttls.session_storage = Arc::new(NoServerSessionStorage {});
        starttls.send_tls13_tickets = 0;
        let mut direct = starttls.clone();
        direct.alpn_protocols = vec![DIRECT_TLS_PROTOCOL.to_vec()];
        Ok(Self {
            starttls: Arc::new(starttls),
            direct: Arc::new(direct),
            roots,
        })
    }

    pub async fn accept(
        &self,
        tcp: TcpStream,
        direct_tls: bool,
    ) -> Result<(TlsStream<TcpStream>, Option<Certificate>), TlsError> {
        let config = if direct_tls { &self.direct } else { &self.starttls };
        let handshake = TlsAcceptor::from(Arc::clone(config)).accept(tcp);
        let tls = TlsStream::Server(
            timeout(HANDSHAKE_MAX, handshake)
                .await
                .map_err(|_| TlsError::Timeout)??,
        );
        let certificate = peer_certificate(&tls, &self.roots);
        Ok((tls, certificate))
    }
}

/// Does the handshake as the TLS client: for streams that we open.
#[derive(Clone, Debug)]
pub struct Connector {
    starttls: Arc<ClientConfig>,
    direct: Arc<ClientConfig>,
    roots: Arc<Roots>,
    trust: ServerTrust,
}

impl Connector {
    pub fn new(identity: Arc<Identity>, roots: Arc<Roots>, trust: ServerTrust) -> Result<Self, TlsError> {
        let mut starttls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&TLS12, &TLS13])
            .map_err(TlsError::SetUp)?
            .dangerous()
            .with_custom_certificate_verifier(Verifier::any_certificate())
            .with_client_cert_resolver(identity);
        starttls.resumption = Resumption::disabled();
        let mut direct = starttls.clone();
        direct.alpn_protocols = vec![DIRECT_TLS_PROTOCOL.to_vec()];
        Ok(Self {
            starttls: Arc::new(starttls),
            direct: Arc::new(direct),
            roots,
            trust,
        })
    }

    /// `domain` is the one that the stream is opened to: the server chooses its certificate by it.
    pub async fn connect(
        &self,
        tcp: TcpStream,
        domain: &Domain,
        direct_tls: bool,
    ) -> Result<(TlsStream<TcpStream>, Option<Certificate>), TlsError> {
        let config = if direct_tls { &self.direct } else { &self.starttls };
        let name = match dns::ascii(domain.as_str()).and_then(|name| ServerName::try_from(name).ok()) {
            Some(name) => name,
            // What is no host name cannot stand in SNI; an address in its place sends none.
            None => ServerName::from(tcp.peer_addr().map_or(IpAddr::from([127, 0, 0, 1]), |peer| peer.ip())),
        };
        let handshake = TlsConnector::from(Arc::clone(config)).connect(name, tcp);
        let tls = TlsStream::Client(
            timeout(HANDSHAKE_MAX, handshake)
                .await
                .map_err(|_| TlsError::Timeout)??,
        );
        let certificate = peer_certificate(&tls, &self.roots);
        let proven = match self.trust {
            ServerTrust::Any => true,
            ServerTrust::Verified => certificate
                .as_ref()
                .is_some_and(|certificate| certificate.trusted && certificate.proves(domain)),
        };
        if !proven {
            return Err(TlsError::NotProven(domain.clone()));
        }
        Ok((tls, certificate))
    }
}

fn peer_certificate(tls: &TlsStream<TcpStream>, roots: &Roots) -> Option<Certificate> {
    let (_, session) = tls.get_ref();
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    roots.examine(session.peer_certificates()?, UnixTime::since_unix_epoch(since))
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |error: String| TlsError::File {
        path: path.display().to_string(),
        error,
    };
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| failed(error.to_string()))?;
    if certificates.is_empty() {
        return Err(failed("holds no certificate".to_owned()));
    }
    Ok(certificates)
}

/// The names that a certificate claims; `trusted` is left false.
fn names(certificate: &X509Certificate<'_>) -> Certificate {
    let mut names = Certificate::default();
    let Ok(Some(extension)) = certificate.subject_alternative_name() else {
        return names;
    };
    for name in extension.value.general_names.iter().take(NAMES_MAX) {
        match name {
            GeneralName::DNSName(name) => names.dns.push((*name).to_owned()),
            GeneralName::OtherName(kind, value) => {
                let list = match kind.to_id_string().as_str() {
                    XMPP_ADDR => &mut names.xmpp,
                    DNS_SRV => &mut names.srv,
                    _ => continue,
                };
                list.extend(other_name(value));
            }
            _ => (),
        }
    }
    names
}

/// RFC 5280 §4.2.1.6: the value of an `otherName` is tagged `[0] EXPLICIT`. Both that we read are strings.
fn other_name(value: &[u8]) -> Option<String> {
    let (_, tagged) = TaggedExplicit::<Any<'_>, x509_parser::der_parser::asn1_rs::Error, 0>::from_der(value).ok()?;
    str::from_utf8(tagged.into_inner().data).ok().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;
    use crate::io::ca::Authority;

    /// An identity for `domain` and the root that vouches for it.
    fn identity(domain: &str) -> (Arc<Identity>, Vec<CertificateDer<'static>>) {
        let dir = tempfile::tempdir().unwrap();
        let domains = [Domain::new(domain).unwrap()];
        let authority = Authority::create(dir.path(), "test", &domains).unwrap();
        let roots = read_certificates(&dir.path().join("ca.pem")).unwrap();
        (Identity::new(authority.issue(&domains).unwrap()).unwrap(), roots)
    }

    struct Handshakes {
        client: Result<Option<Certificate>, TlsError>,
        server: Result<Option<Certificate>, TlsError>,
    }

    /// Both roles, each with a certificate of its own, each knowing the other's root or not.
    async fn shake_hands(roots_known: bool, trust: ServerTrust, direct_tls: bool) -> Handshakes {
        let (near, near_root) = identity("near.example");
        let (far, far_root) = identity("far.example");
        let known = |roots| {
            Arc::new(if roots_known {
                Roots::new(roots)
            } else {
                Roots::default()
            })
        };
        let acceptor = Acceptor::new(far, known(near_root)).unwrap();
        let connector = Connector::new(near, known(far_root), trust).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = async {
            let (tcp, _) = listener.accept().await.unwrap();
            let (mut tls, certificate) = acceptor.accept(tcp, direct_tls).await?;
            let _ = tls.write_all(b"hello").await;
            let _ = tls.flush().await;
            Ok(certificate)
        };
        let client = async {
            let tcp = TcpStream::connect(address).await.unwrap();
            let domain = Domain::new("far.example").unwrap();
            let (mut tls, certificate) = connector.connect(tcp, &domain, direct_tls).await?;
            tls.read_exact(&mut [0; 5]).await?;
            Ok(certificate)
        };
        let (client, server) = tokio::join!(client, server);
        Handshakes { client, server }
    }

    /// Each side learns the other's names, and whether a root vouches for them, with STARTTLS and with direct TLS.
    #[tokio::test]
    async fn both_sides_learn_what_the_other_proves() {
        for roots_known in [false, true] {
            for direct_tls in [false, true] {
                let done = shake_hands(roots_known, ServerTrust::Any, direct_tls).await;
                let (server, client) = (done.client.unwrap().unwrap(), done.server.unwrap().unwrap());
                assert_eq!(server.dns, ["far.example"]);
                assert_eq!(client.dns, ["near.example"]);
                assert_eq!((server.trusted, client.trusted), (roots_known, roots_known));
            }
        }
    }

    /// With `Verified`, an unknown root ends the connection before a byte of XMPP is said.
    #[tokio::test]
    async fn verified_refuses_an_unknown_root() {
        let done = shake_hands(false, ServerTrust::Verified, false).await;
        assert!(matches!(done.client, Err(TlsError::NotProven(_))));
    }

    /// A self-signed certificate is trusted where it is listed itself, and SRV and XMPP names are read.
    #[test]
    fn a_listed_certificate_is_its_own_root() {
        let mut params = rcgen::CertificateParams::new(["b.example".to_owned()]).unwrap();
        let other_name =
            |kind: u64, value: &str| rcgen::SanType::OtherName((vec![1, 3, 6, 1, 5, 5, 7, 8, kind], value.into()));
        params.subject_alt_names.extend([
            other_name(5, "b.example"),
            other_name(7, "_xmpp-server.b.example"),
            other_name(9, "somebody@b.example"),
        ]);
        let key = rcgen::KeyPair::generate().unwrap();
        let chain = [params.self_signed(&key).unwrap().der().clone()];
        assert!(!Roots::default().examine(&chain, UnixTime::now()).unwrap().trusted);
        let certificate = Roots::new(chain.to_vec()).examine(&chain, UnixTime::now()).unwrap();
        let expected = Certificate {
            trusted: true,
            dns: vec!["b.example".to_owned()],
            srv: vec!["_xmpp-server.b.example".to_owned()],
            xmpp: vec!["b.example".to_owned()],
        };
        assert_eq!(certificate, expected);
    }

    /// No certificate, or one that is none, proves nothing and breaks nothing.
    #[test]
    fn rubbish_proves_nothing() {
        let rubbish = CertificateDer::from(vec![0x30, 0x03, 1, 2, 3]);
        assert_eq!(Roots::default().examine(&[rubbish], UnixTime::now()), None);
        assert_eq!(Roots::default().examine(&[], UnixTime::now()), None);
    }
}
