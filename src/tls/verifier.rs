//! Whether the server is who it says: chain and name, each only where it is asked for.
//!
//! The traps. webpki is stricter than OpenSSL: it refuses a self-signed server certificate that stands in the root file
//! itself, and version 1, which the recipe in Postgres' manual makes; both are trusted on purpose by those who wrote them
//! into that file. It is laxer as well: a root that has expired is as good to it as any other. And a handshake without a
//! look at the chain must still prove that the server has the certificate's key.

use std::sync::Arc;

use tokio_rustls::rustls;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

use super::certificate::Certificate;
use super::name::Name;

/// What to look at.
#[derive(Debug)]
pub(crate) struct Verifier {
    /// The chain, against these roots; `None`: not at all.
    pub(crate) chain: Option<Chain>,
    /// The name; `None`: whatever it is.
    pub(crate) name: Option<Name>,
    pub(crate) algorithms: WebPkiSupportedAlgorithms,
}

/// How chains are proven.
#[derive(Debug)]
pub(crate) struct Chain {
    webpki: Arc<WebPkiServerVerifier>,
    roots: Vec<CertificateDer<'static>>,
    /// With revocation lists only webpki may decide.
    has_revocation_lists: bool,
}

impl Chain {
    /// To these roots, and, where there are revocation lists, by them.
    ///
    /// # Errors
    /// What is wrong with them.
    pub(crate) fn new(
        roots: Vec<CertificateDer<'static>>,
        revocation_lists: Vec<CertificateRevocationListDer<'static>>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, String> {
        let now = UnixTime::now().as_secs();
        let is_valid = |root: &&CertificateDer<'_>| Certificate::parse(root).is_none_or(|root| root.is_valid_at(now));
        let mut store = RootCertStore::empty();
        let (added, _) = store.add_parsable_certificates(roots.iter().filter(is_valid).cloned());
        if added == 0 {
            return Err("no certificate in it can be used, or all have expired".to_owned());
        }
        let has_revocation_lists = !revocation_lists.is_empty();
        let mut webpki = WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider.clone());
        if has_revocation_lists {
            webpki = webpki.with_crls(revocation_lists).enforce_revocation_expiration();
        }
        let webpki = webpki.build().map_err(|error| error.to_string())?;
        Ok(Self { webpki, roots, has_revocation_lists })
    }

    fn verify(
        &self,
        der: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        algorithms: &WebPkiSupportedAlgorithms,
        now: UnixTime,
    ) -> Result<(), Error> {
        // The name comes last there, so that an error about it says that all else is well; names are compared elsewhere.
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
            Some(name) if !name.is_in(&parse(leaf)?) => Err(CertificateError::NotValidForName.into()),
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
