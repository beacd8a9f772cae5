//! What the other side of a TLS connection must prove in the handshake, be it the server or the client.
//!
//! Rustls asks one trait about servers and another about clients; here both ask the same. In any case the other side must hold
//! the key that it shows: the signature of the handshake is always checked.

use std::sync::Arc;

use tokio_rustls::rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{
        WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature,
        verify_tls13_signature_with_raw_key,
    },
    pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};

use super::keys::PublicKey;

/// What is shown in the handshake.
#[derive(Debug)]
enum Expected {
    /// Any certificate, and none from a client that has none. What it is worth is found out afterwards.
    Certificate,
    /// One of these, as a raw public key (RFC 7250).
    Key(Vec<PublicKey>),
}

#[derive(Debug)]
pub struct Verifier {
    expected: Expected,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    /// Lets any certificate through.
    pub fn any_certificate() -> Arc<Self> {
        Self::new(Expected::Certificate)
    }

    /// Accepts these keys and no others. For TLS 1.3 only.
    pub fn pinned(keys: Vec<PublicKey>) -> Arc<Self> {
        Self::new(Expected::Key(keys))
    }

    fn new(expected: Expected) -> Arc<Self> {
        Arc::new(Self {
            expected,
            algorithms: ring::default_provider().signature_verification_algorithms,
        })
    }

    fn check(&self, shown: &CertificateDer<'_>) -> Result<(), Error> {
        let Expected::Key(keys) = &self.expected else {
            return Ok(());
        };
        let refused = || Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure);
        let key = PublicKey::from_spki(shown).ok_or_else(refused)?;
        // All are looked at, each in constant time.
        let known = keys.iter().fold(false, |known, pinned| known | pinned.is(&key));
        if known { Ok(()) } else { Err(refused()) }
    }

    fn check_tls12(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        match self.expected {
            Expected::Certificate => verify_tls12_signature(message, shown, signature, &self.algorithms),
            // TLS 1.2 is not offered there, so nobody can come with it.
            Expected::Key(_) => Err(Error::General("a raw public key in TLS 1.2".to_owned())),
        }
    }

    fn check_tls13(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        match self.expected {
            Expected::Certificate => verify_tls13_signature(message, shown, signature, &self.algorithms),
            Expected::Key(_) => {
                let key = SubjectPublicKeyInfoDer::from(shown.as_ref());
                verify_tls13_signature_with_raw_key(message, &key, signature, &self.algorithms)
            }
        }
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        match self.expected {
            Expected::Certificate => self.algorithms.supported_schemes(),
            Expected::Key(_) => vec![SignatureScheme::ED25519],
        }
    }

    fn is_for_keys(&self) -> bool {
        matches!(self.expected, Expected::Key(_))
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(shown).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_tls12(message, shown, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_tls13(message, shown, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }

    fn requires_raw_public_keys(&self) -> bool {
        self.is_for_keys()
    }
}

impl ClientCertVerifier for Verifier {
    fn client_auth_mandatory(&self) -> bool {
        self.is_for_keys()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        shown: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(shown).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_tls12(message, shown, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_tls13(message, shown, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }

    fn requires_raw_public_keys(&self) -> bool {
        self.is_for_keys()
    }
}
