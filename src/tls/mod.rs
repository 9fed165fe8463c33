//! TLS on rustls with OpenSSL's ideas of whom to trust: what the doors to Postgres and to RabbitMQ share.
//!
//! Each door knows its own words for it (`sslmode`, `verify`) and says them; here are files, chains and names, and no other
//! room of ours is named.
//!
//! The trap: rustls' own verifier refuses what OpenSSL, and with it every other client of these servers, takes on purpose.

mod certificate;
mod files;
mod name;
mod verifier;

use std::sync::Arc;

use tokio_rustls::rustls;

use rustls::crypto::CryptoProvider;
use rustls::sign::SingleCertAndKey;
use rustls::{ClientConfig, SupportedProtocolVersion};

pub(crate) use self::certificate::Certificate;
pub(crate) use self::files::{File, identity, system_roots};
pub(crate) use self::name::Name;
pub(crate) use self::verifier::{Chain, Verifier};

/// Named, because rustls panics where a process has two and none was chosen.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// A client that looks at this and shows that.
pub(crate) fn client(
    provider: Arc<CryptoProvider>,
    versions: &[&'static SupportedProtocolVersion],
    chain: Option<Chain>,
    name: Option<Name>,
    identity: Option<Arc<SingleCertAndKey>>,
) -> Result<ClientConfig, String> {
    let verifier = Verifier { chain, name, algorithms: provider.signature_verification_algorithms };
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    Ok(match identity {
        Some(identity) => config.with_client_cert_resolver(identity),
        None => config.with_no_client_auth(),
    })
}
