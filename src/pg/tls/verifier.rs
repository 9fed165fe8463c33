//! Whether the server is who it says: chain and name, each only where libpq looks at it.
//!
//! The traps. webpki is stricter than OpenSSL: it refuses a self-signed server certificate that stands in the root file
//! itself, and version 1, which the recipe in Postgres' manual makes; both are trusted on purpose by those who wrote them
//! into that file. And a handshake without a look at the chain (`require`) must still prove that the server has the
//! certificate's key.

use std::sync::Arc;

use tokio_rustls::rustls;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};

use super::certificate::Certificate;

/// What to look at.
#[derive(Debug)]
pub(super) struct Verifier {
    /// The chain, against these roots; `None`: not at all.
    pub(super) chain: Option<Chain>,
    /// The name, for `verify-full`.
    pub(super) name: Option<String>,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

/// How chains are proven.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) webpki: Arc<WebPkiServerVerifier>,
    pub(super) roots: Vec<CertificateDer<'static>>,
    /// With revocation lists only webpki may decide.
    pub(super) has_revocation_lists: bool,
}

impl Chain {
    fn verify(
        &self,
        der: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        algorithms: &WebPkiSupportedAlgorithms,
        now: UnixTime,
    ) -> Result<(), Error> {
        // The name comes last there, so that an error about it says that all else is well; names are compared as libpq does.
        let error = match self.webpki.verify_server_cert(der, intermediates, name, &[], now) {
            Ok(_) => return Ok(()),
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => return Ok(()),
            Err(error) => error,
        };
        let leaf = parse(der)?;
        let is_own_root = leaf.issuer == leaf.subject && self.roots.iter().any(|root| root == der);
        let is_known =
            || is_own_root || leaf.is_version_1 && self.roots.iter().any(|root| signed(&leaf, root, algorithms, now));
        if self.has_revocation_lists || !is_known() {
            return Err(error);
        }
        if !leaf.is_valid_at(now.as_secs()) {
            return Err(CertificateError::Expired.into());
        }
        Ok(())
    }
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<Certificate<'a>, Error> {
    Certificate::parse(der).ok_or_else(|| CertificateError::BadEncoding.into())
}

/// Whether this root, itself valid now and an authority, signed the leaf.
fn signed(
    leaf: &Certificate<'_>,
    root: &CertificateDer<'_>,
    algorithms: &WebPkiSupportedAlgorithms,
    now: UnixTime,
) -> bool {
    let Some(root) = Certificate::parse(root).filter(|root| root.subject == leaf.issuer) else { return false };
    let Some((key_algorithm, key)) = root.key_parts() else { return false };
    let fits = |algorithm: &&&dyn rustls::pki_types::SignatureVerificationAlgorithm| {
        algorithm.signature_alg_id().as_ref() == leaf.algorithm
            && algorithm.public_key_alg_id().as_ref() == key_algorithm
    };
    root.is_authority()
        && root.is_valid_at(now.as_secs())
        && algorithms.all.iter().filter(fits).any(|one| one.verify_signature(key, leaf.signed, leaf.signature).is_ok())
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(chain) = &self.chain {
            chain.verify(leaf, intermediates, server_name, &self.algorithms, now)?;
        }
        match &self.name {
            Some(name) if !parse(leaf)?.is_for(name) => Err(CertificateError::NotValidForName.into()),
            _ => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, leaf, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        // By the key alone: webpki would refuse a certificate of version 1 before it looks at the signature.
        let key = SubjectPublicKeyInfoDer::from(parse(leaf)?.key);
        verify_tls13_signature_with_raw_key(message, &key, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
