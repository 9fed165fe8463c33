//! TLS for `amqps://`: chain and name as OpenSSL sees them, against the system's authorities or one's own.
//!
//! The traps. In TLS 1.3 a broker that demands a client certificate says so only after the handshake: what looks like a
//! broken session is a refusal, so errors of reading are explained here as well. And files are read for every session, so
//! that a certificate can be renewed under a running relay.

use std::io;

use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsConnector, rustls};

use rustls::pki_types::ServerName;
use rustls::{AlertDescription, CertificateError, ClientConfig};

use super::address::{self, Address, Tls};
use crate::tls::{self, Chain, File, Name};

/// Talks TLS on this socket.
pub(super) async fn secure(socket: TcpStream, address: &Address, wanted: &Tls) -> Result<TlsStream<TcpStream>, String> {
    let expected = match &wanted.server_name {
        address::ServerName::Other(name) => name.clone(),
        address::ServerName::Host | address::ServerName::Disable => address.host.clone(),
    };
    let (files, name) = (wanted.clone(), expected.clone());
    // Some milliseconds of a thread, once a session.
    let config =
        tokio::task::spawn_blocking(move || config(&files, name)).await.map_err(|error| error.to_string())??;
    let name = match ServerName::try_from(expected.clone()) {
        Ok(name) => name,
        // Not a name that could be sent; the verifier compares it all the same.
        Err(_) => ServerName::IpAddress(socket.peer_addr().map_err(|error| error.to_string())?.ip().into()),
    };
    let connector = TlsConnector::from(std::sync::Arc::new(config));
    connector.connect(name, socket).await.map_err(|error| explain(&error, &expected, wanted))
}

fn config(wanted: &Tls, name: String) -> Result<ClientConfig, String> {
    let provider = tls::provider();
    let chain = match &wanted.roots {
        _ if !wanted.verifies => None,
        Some(file) => {
            let chain = Chain::new(file.certificates()?, Vec::new(), &provider);
            Some(chain.map_err(|problem| format!("{}: {}: {problem}", file.setting, file.path.display()))?)
        }
        None => Some(Chain::new(tls::system_roots()?, Vec::new(), &provider)?),
    };
    let is_compared = wanted.verifies && wanted.server_name != address::ServerName::Disable;
    let identity = match &wanted.identity {
        Some((certificate, key)) => Some(tls::identity(certificate, key, &provider)?),
        None => None,
    };
    let name = is_compared.then_some(Name::OpenSsl(name));
    let mut config = tls::client(provider, rustls::DEFAULT_VERSIONS, chain, name, identity)?;
    config.enable_sni = wanted.server_name != address::ServerName::Disable;
    Ok(config)
}

/// What is unsafe in what is wanted, and what to do about it.
pub(super) fn warnings(wanted: &Tls) -> Vec<String> {
    let mut warnings = Vec::new();
    if !wanted.verifies {
        warnings.push(
            "verify=verify_none: whoever is in between can pose as the broker and read the password. Remedy: leave \
                       it out, and name the authority of the broker's certificate in rabbitmq.tls_ca"
                .to_owned(),
        );
    } else if wanted.server_name == address::ServerName::Disable {
        warnings.push(
            "server_name_indication=disable: whoever has a certificate of the same authority can pose as the \
                       broker. Remedy: name what the broker's certificate has instead"
                .to_owned(),
        );
    }
    // Secrets that an orchestrator mounts are often everybody's; that they cannot be read is told by the session.
    if let Some((_, key)) = &wanted.identity
        && key.path.is_file()
    {
        warnings.extend(key.check_mode().err());
    }
    warnings
}

fn explain(error: &io::Error, name: &str, wanted: &Tls) -> String {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let roots = match &wanted.roots {
        Some(File { path, .. }) => path.display().to_string(),
        None => "the system's certificates".to_owned(),
    };
    match inner {
        Some(rustls::Error::InvalidCertificate(problem)) => match problem {
            CertificateError::NotValidForName => format!(
                "the broker's certificate is not for {name}. Remedy: connect by a name that is in it, name one in \
                 server_name_indication, or give the broker a certificate for this name"
            ),
            CertificateError::UnknownIssuer => format!(
                "the broker's certificate comes from an authority that is not in {roots}. Remedy: name the file with that \
                 authority's certificate in rabbitmq.tls_ca, if it is the one you trust"
            ),
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "the broker's certificate has expired. Remedy: give the broker a new one".to_owned()
            }
            // What `openssl req -x509` makes.
            problem if problem.to_string().contains("CaUsedAsEndEntity") => format!(
                "the broker's certificate is an authority's own, and {roots} has not that very certificate. Remedy: put it \
                 into rabbitmq.tls_ca, if it is signed by itself and you trust it; else give the broker one of a server"
            ),
            problem => format!("the broker's certificate is refused: {problem}"),
        },
        Some(rustls::Error::InvalidMessage(_)) => {
            "the peer does not speak TLS. Remedy: name the broker's TLS port (by default 5671), or, where nobody else can \
             listen, say amqp:// in rabbitmq.url"
                .to_owned()
        }
        _ if error.kind() == io::ErrorKind::UnexpectedEof => {
            "the peer closed the connection in the TLS handshake. Remedy: see that this is the broker's TLS port; the \
             broker's log says more"
                .to_owned()
        }
        _ => told(error),
    }
}

/// An error of a socket, with a remedy where TLS knows one.
pub(super) fn told(error: &io::Error) -> String {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::AlertReceived(AlertDescription::CertificateRequired)) => {
            "the broker demands a client certificate. Remedy: name one in rabbitmq.tls_certificate, and its key in \
             rabbitmq.tls_key"
                .to_owned()
        }
        Some(rustls::Error::AlertReceived(alert)) => format!(
            "the broker ended the TLS handshake ({alert:?}). Remedy: its log says why; it may demand a client certificate, \
             or not trust ours (rabbitmq.tls_certificate)"
        ),
        Some(error) => format!("TLS: {error}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A broker that demands a certificate and resets the connection before its word is read leaves only the general text, so
    /// the tests with a real one take either.
    #[test]
    fn a_demand_for_a_certificate_is_told_apart_from_a_refusal_of_ours() {
        let alert = |alert| told(&io::Error::other(rustls::Error::AlertReceived(alert)));
        let demand = alert(AlertDescription::CertificateRequired);
        assert!(demand.starts_with("the broker demands a client certificate. Remedy: name one in"), "{demand}");
        let refusal = alert(AlertDescription::UnknownCA);
        assert!(refusal.contains("(UnknownCA)") && refusal.contains("or not trust ours"), "{refusal}");
        assert_eq!(told(&io::Error::other("reset")), "reset");
    }
}
