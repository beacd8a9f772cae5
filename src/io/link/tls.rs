//! TLS 1.3 with raw public keys (RFC 7250), pinned on both sides, and nothing that is not needed: one group, one cipher
//! suite, one signature algorithm, no tickets. A handshake takes about 760 bytes in both directions.

use std::sync::Arc;

use tokio_rustls::rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme,
    client::{
        AlwaysResolvesClientRawPublicKeys, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{
        CryptoProvider, WebPkiSupportedAlgorithms,
        ring::{self, cipher_suite::TLS13_CHACHA20_POLY1305_SHA256, kx_group::X25519},
        verify_tls13_signature_with_raw_key,
    },
    pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime},
    server::{
        AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    version::TLS13,
};

use crate::io::keys::{PrivateKey, PublicKey};

/// For dialling a peer that must prove `theirs`.
pub fn client_config(ours: &PrivateKey, theirs: PublicKey) -> Result<ClientConfig, Error> {
    let verifier = Arc::new(Pinned::new(vec![theirs]));
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(ours.certified())));
    // Names play no part: the key is who it is.
    config.enable_sni = false;
    // Resumption saves round trips only with early data, which can be replayed; tickets cost bytes on every connection.
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// For a listener where one of `theirs` must be proven.
pub fn server_config(ours: &PrivateKey, theirs: Vec<PublicKey>) -> Result<ServerConfig, Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(Pinned::new(theirs)))
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(ours.certified())));
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// The key that the other side has proven.
pub fn proven_key(certificates: Option<&[CertificateDer<'_>]>) -> Option<PublicKey> {
    match certificates {
        Some([only]) => PublicKey::from_spki(only),
        Some(_) | None => None,
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        // Fast without hardware for AES, which small boxes lack.
        cipher_suites: vec![TLS13_CHACHA20_POLY1305_SHA256],
        kx_groups: vec![X25519],
        ..ring::default_provider()
    })
}

/// Accepts these keys and no others, proven by a signature of this handshake.
#[derive(Debug)]
struct Pinned {
    keys: Vec<PublicKey>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Pinned {
    fn new(keys: Vec<PublicKey>) -> Self {
        Self {
            keys,
            algorithms: ring::default_provider().signature_verification_algorithms,
        }
    }

    fn check_key(&self, spki: &CertificateDer<'_>) -> Result<(), Error> {
        let refused = || Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure);
        let key = PublicKey::from_spki(spki).ok_or_else(refused)?;
        // All are looked at, each in constant time.
        let known = self.keys.iter().fold(false, |known, pinned| known | pinned.is(&key));
        if known { Ok(()) } else { Err(refused()) }
    }

    fn check_signature(
        &self,
        message: &[u8],
        spki: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let spki = SubjectPublicKeyInfoDer::from(spki.as_ref());
        verify_tls13_signature_with_raw_key(message, &spki, signature, &self.algorithms)
    }
}

/// TLS 1.2 is not offered, so nobody can come here with it.
fn no_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::General("TLS 1.2 on the link".to_owned()))
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check_key(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check_key(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use tokio_rustls::rustls::{ClientConnection, ServerConnection};

    use super::*;

    fn key(dir: &tempfile::TempDir, name: &str) -> PrivateKey {
        PrivateKey::generate(&dir.path().join(name)).unwrap()
    }

    /// Runs a handshake in memory: the bytes each side sent, and what the server knows the client by.
    fn shake(client: ClientConfig, server: ServerConfig) -> Result<(usize, usize, Option<PublicKey>), Error> {
        let name = ServerName::try_from("peer").unwrap();
        let mut client = ClientConnection::new(client.into(), name).unwrap();
        let mut server = ServerConnection::new(server.into()).unwrap();
        let (mut from_client, mut from_server) = (0, 0);
        while client.is_handshaking() || server.is_handshaking() || client.wants_write() || server.wants_write() {
            let mut wire = Vec::new();
            client.write_tls(&mut wire).unwrap();
            from_client += wire.len();
            server.read_tls(&mut wire.as_slice()).unwrap();
            server.process_new_packets()?;
            wire.clear();
            server.write_tls(&mut wire).unwrap();
            from_server += wire.len();
            client.read_tls(&mut wire.as_slice()).unwrap();
            client.process_new_packets()?;
        }
        Ok((from_client, from_server, proven_key(server.peer_certificates())))
    }

    /// Both prove who they are in at most 800 bytes together.
    #[test]
    fn handshake_is_small_and_mutual() {
        let dir = tempfile::tempdir().unwrap();
        let (ship, shore) = (key(&dir, "ship"), key(&dir, "shore"));
        let client = client_config(&ship, shore.public()).unwrap();
        let server = server_config(&shore, vec![ship.public()]).unwrap();
        let (from_client, from_server, proven) = shake(client, server).unwrap();
        assert_eq!(proven, Some(ship.public()));
        assert!(from_client + from_server <= 800, "{from_client} + {from_server}");
    }

    /// A server with another key than the pinned one, and a client with an unknown one, are refused.
    #[test]
    fn wrong_keys_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (ship, shore, other) = (key(&dir, "ship"), key(&dir, "shore"), key(&dir, "other"));
        let refused = Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure);
        let server = || server_config(&shore, vec![ship.public()]).unwrap();
        assert_eq!(
            shake(client_config(&ship, other.public()).unwrap(), server()),
            Err(refused.clone())
        );
        assert_eq!(
            shake(client_config(&other, shore.public()).unwrap(), server()),
            Err(refused)
        );
    }
}
