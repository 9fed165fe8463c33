//! TLS for `amqps://`: rustls, verified against the system's certificates.
//!
//! The trap: a certificate store that cannot be read yields an empty one, and "unknown issuer" for every broker. What could
//! not be read is told when nothing else could be.

use std::sync::Arc;

use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

/// Talks TLS on this socket, with the host that the URL names.
pub(super) async fn secure(socket: TcpStream, host: &str) -> Result<TlsStream<TcpStream>, String> {
    // A URL writes IPv6 addresses in brackets.
    let name = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let name = ServerName::try_from(name).map_err(|_| format!("{host:?} is no name that a certificate could have"))?;
    // Reads the system's certificates: some milliseconds of a thread, once a session.
    let config = tokio::task::spawn_blocking(config).await.map_err(|error| error.to_string())??;
    TlsConnector::from(Arc::new(config)).connect(name, socket).await.map_err(|error| format!("TLS: {error}"))
}

fn config() -> Result<ClientConfig, String> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        let why = found.errors.first().map_or("none is installed".to_owned(), ToString::to_string);
        return Err(format!("TLS: no certificate of the system can be read ({why})"));
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let builder = builder.with_safe_default_protocol_versions().map_err(|error| format!("TLS: {error}"))?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}
