//! Certificates, keys and revocation lists from PEM files, with libpq's rules about who may read a key.
//!
//! The trap: a key is checked before it is used, not before it is chosen, so that a default key nobody knew of is not
//! used by accident while the world can read it.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::rustls;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};

use crate::pg::conninfo::Values;

/// Who we are, if the server asks.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    /// A file that was named must be there; a default one may be missing.
    is_named: bool,
}

impl Identity {
    pub(super) fn read(values: &Values, certificate: Option<PathBuf>, key: Option<PathBuf>) -> Result<Self, String> {
        let is_named = values.get("sslcert").is_some();
        let is_used = values.one_of("sslcertmode", &[("disable", false), ("allow", true)]).map_err(|error| {
            format!("{error} (`require` is not supported: say `clientcert=verify-full` on the server's side)")
        })?;
        let certificate = certificate.filter(|_| is_used != Some(false));
        Ok(Self { certificate, key, is_named })
    }

    /// Our certificate and key; `None` when there is none.
    pub(super) fn load(&self, provider: &Arc<CryptoProvider>) -> Result<Option<Arc<SingleCertAndKey>>, String> {
        let Some(path) = self.certificate.as_ref().filter(|path| self.is_named || path.exists()) else {
            return Ok(None);
        };
        let chain = certificates(path, "sslcert")?;
        let key_path = self.key.as_ref().ok_or("sslkey: none is named, and there is no home directory to look in")?;
        check_mode(key_path)?;
        let key = PrivateKeyDer::from_pem_file(key_path).map_err(|_| {
            let path = key_path.display();
            format!("sslkey: {path} holds no private key that can be read (PEM, without a passphrase)")
        })?;
        let key = provider.key_provider.load_private_key(key).map_err(|error| format!("sslkey: {error}"))?;
        let certified = CertifiedKey::new(chain, key);
        if let Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::KeyMismatch)) = certified.keys_match() {
            return Err(format!("sslcert {} does not belong to sslkey {}", path.display(), key_path.display()));
        }
        Ok(Some(Arc::new(SingleCertAndKey::from(certified))))
    }
}

/// libpq: 0600 or less for one's own, 0640 or less for root's.
fn check_mode(path: &Path) -> Result<(), String> {
    let metadata = std::fs::metadata(path).map_err(|error| format!("sslkey: {}: {error}", path.display()))?;
    let shown = path.display();
    if !metadata.is_file() {
        return Err(format!("sslkey: {shown} is not a plain file"));
    }
    let forbidden = if metadata.uid() == 0 { 0o037 } else { 0o077 };
    if metadata.permissions().mode() & forbidden != 0 {
        return Err(format!(
            "sslkey: {shown} can be read by group or world. Remedy: chmod 600 {shown} (640 where root owns it)"
        ));
    }
    Ok(())
}

pub(super) fn certificates(path: &Path, keyword: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let wrong = |why: String| format!("{keyword}: {}: {why}", path.display());
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    match found {
        Ok(found) if found.is_empty() => Err(wrong("no certificate in it (PEM is needed)".to_owned())),
        Ok(found) => Ok(found),
        Err(error) => Err(wrong(error.to_string())),
    }
}

pub(super) fn revocation_lists(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
    let wrong = |why: String| format!("sslcrl: {}: {why}", path.display());
    let found: Result<Vec<_>, _> = CertificateRevocationListDer::pem_file_iter(path).and_then(Iterator::collect);
    match found {
        Ok(found) if found.is_empty() => Err(wrong("no revocation list in it (PEM is needed)".to_owned())),
        Ok(found) => Ok(found),
        Err(error) => Err(wrong(error.to_string())),
    }
}
