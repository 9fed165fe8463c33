//! Certificates, keys and revocation lists from PEM files, and who else may read a key.
//!
//! The trap: a message about a file that does not say which setting named it sends the operator to the wrong one. So every
//! file comes with the name of its setting.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use tokio_rustls::rustls;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};

/// A file, and the setting that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct File {
    pub(crate) path: PathBuf,
    pub(crate) setting: &'static str,
}

impl File {
    pub(crate) fn new(path: impl Into<PathBuf>, setting: &'static str) -> Self {
        Self { path: path.into(), setting }
    }

    fn wrong(&self, why: &str) -> String {
        format!("{}: {}: {why}", self.setting, self.path.display())
    }

    /// All certificates in it, of which there is one at least.
    pub(crate) fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, String> {
        self.all(CertificateDer::pem_file_iter(&self.path).and_then(Iterator::collect), "certificate")
    }

    /// All revocation lists in it, of which there is one at least.
    pub(crate) fn revocation_lists(&self) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
        self.all(CertificateRevocationListDer::pem_file_iter(&self.path).and_then(Iterator::collect), "revocation list")
    }

    fn all<T>(&self, found: Result<Vec<T>, rustls::pki_types::pem::Error>, what: &str) -> Result<Vec<T>, String> {
        match found {
            Ok(found) if found.is_empty() => Err(self.wrong(&format!("no {what} in it (PEM is needed)"))),
            Ok(found) => Ok(found),
            Err(error) => Err(self.wrong(&error.to_string())),
        }
    }

    /// libpq's rule for keys, and a good one: 0600 or less for one's own, 0640 or less for root's.
    ///
    /// # Errors
    /// Who else may read it, with a remedy; or that it is no file.
    pub(crate) fn check_mode(&self) -> Result<(), String> {
        let metadata = std::fs::metadata(&self.path).map_err(|error| self.wrong(&error.to_string()))?;
        let (setting, shown) = (self.setting, self.path.display());
        if !metadata.is_file() {
            return Err(format!("{setting}: {shown} is not a plain file"));
        }
        let forbidden = if metadata.uid() == 0 { 0o037 } else { 0o077 };
        if metadata.permissions().mode() & forbidden != 0 {
            return Err(format!(
                "{setting}: {shown} can be read by group or world. Remedy: chmod 600 {shown} (640 where root owns it)"
            ));
        }
        Ok(())
    }
}

/// Who we are, if the server asks: a certificate with what leads to its authority, and its key.
pub(crate) fn identity(
    certificate: &File,
    key: &File,
    provider: &CryptoProvider,
) -> Result<Arc<SingleCertAndKey>, String> {
    let chain = certificate.certificates()?;
    let shown = key.path.display();
    let read = PrivateKeyDer::from_pem_file(&key.path).map_err(|error| match error {
        rustls::pki_types::pem::Error::Io(error) => key.wrong(&error.to_string()),
        _ => format!("{}: {shown} holds no private key that can be read (PEM, without a passphrase)", key.setting),
    })?;
    let read = provider.key_provider.load_private_key(read).map_err(|error| key.wrong(&error.to_string()))?;
    let certified = CertifiedKey::new(chain, read);
    if let Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::KeyMismatch)) = certified.keys_match() {
        return Err(format!(
            "{} {} does not belong to {} {shown}",
            certificate.setting,
            certificate.path.display(),
            key.setting
        ));
    }
    Ok(Arc::new(SingleCertAndKey::from(certified)))
}

/// The certificates that the system trusts.
pub(crate) fn system_roots() -> Result<Vec<CertificateDer<'static>>, String> {
    let found = rustls_native_certs::load_native_certs();
    if !found.certs.is_empty() {
        return Ok(found.certs);
    }
    let why = found.errors.first().map_or("none is installed".to_owned(), ToString::to_string);
    Err(format!("no certificate of the system can be read ({why}). Remedy: install ca-certificates"))
}
