//! TLS 1.3 with raw public keys (RFC 7250), pinned on both sides, and nothing that is not needed: one group, one cipher
//! suite, one signature algorithm, no tickets. A handshake takes about 760 bytes in both directions.

use std::sync::Arc;

use tokio_rustls::rustls::{
    ClientConfig, Error, ServerConfig,
    client::{AlwaysResolvesClientRawPublicKeys, Resumption},
    crypto::{
        CryptoProvider,
        ring::{self, cipher_suite::TLS13_CHACHA20_POLY1305_SHA256, kx_group::X25519},
    },
    pki_types::CertificateDer,
    server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage},
    version::TLS13,
};

use crate::io::{
    keys::{PrivateKey, PublicKey},
    verifier::Verifier,
};

/// For dialling a peer that must prove `theirs`.
pub fn client_config(ours: &PrivateKey, theirs: PublicKey) -> Result<ClientConfig, Error> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Verifier::pinned(vec![theirs]))
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
        .with_client_cert_verifier(Verifier::pinned(theirs))
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

#[cfg(test)]
mod tests {
    use tokio_rustls::rustls::{CertificateError, ClientConnection, ServerConnection, pki_types::ServerName};

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
