//! TLS as libpq does it: when to ask for it, whom to trust, who we are.
//!
//! The traps. A root certificate file that exists is used whatever `sslmode` says, so `require` beside it is `verify-ca`.
//! What a server sends in the clear behind its answer to SSLRequest was put there by somebody else (CVE-2021-23222).
//! `prefer`, the default, falls back to no encryption: it hides from listeners, and from nobody who can change a packet. And
//! a key is checked before it is used, not before it is chosen, so that a default key nobody knew of is not used by accident
//! while the world can read it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream, rustls};

use rustls::crypto::CryptoProvider;
use rustls::pki_types::ServerName;
use rustls::sign::SingleCertAndKey;
use rustls::{CertificateError, ClientConfig, SupportedProtocolVersion};

use super::conninfo::Values;
use super::dial::{Address, Place, Socket};
use super::error::Error;
use crate::tls::{self, Certificate, Chain, File, Name};

/// The name of Postgres' protocol in TLS' own negotiation, registered with IANA.
const PROTOCOL: &[u8] = b"postgresql";

/// libpq's `sslmode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub(super) enum Mode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// Whether to encrypt, at one attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encryption {
    None,
    /// When the server can.
    IfOffered,
    Required,
}

/// All of libpq's `ssl*`.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) mode: Mode,
    is_direct: bool,
    roots: Roots,
    revocation_list: Option<File>,
    identity: Identity,
    sends_name: bool,
    versions: Vec<&'static SupportedProtocolVersion>,
}

/// Who we are, if the server asks.
#[derive(Clone, Debug)]
struct Identity {
    certificate: Option<File>,
    key: Option<File>,
    /// A file that was named must be there; a default one may be missing.
    is_named: bool,
}

impl Identity {
    fn read(values: &Values, certificate: Option<File>, key: Option<File>) -> Result<Self, String> {
        let is_named = values.get("sslcert").is_some();
        let is_used = values.one_of("sslcertmode", &[("disable", false), ("allow", true)]).map_err(|error| {
            format!("{error} (`require` is not supported: say `clientcert=verify-full` on the server's side)")
        })?;
        let certificate = certificate.filter(|_| is_used != Some(false));
        Ok(Self { certificate, key, is_named })
    }

    /// Our certificate and key; `None` when there is none.
    fn load(&self, provider: &CryptoProvider) -> Result<Option<Arc<SingleCertAndKey>>, String> {
        let Some(certificate) = self.certificate.as_ref().filter(|file| self.is_named || file.path.exists()) else {
            return Ok(None);
        };
        let key = self.key.as_ref().ok_or("sslkey: none is named, and there is no home directory to look in")?;
        key.check_mode()?;
        tls::identity(certificate, key, provider).map(Some)
    }
}

#[derive(Clone, Debug)]
enum Roots {
    System,
    /// libpq: used when it is there, needed to verify.
    File(Option<File>),
}

impl Settings {
    pub(super) fn read(values: &Values, home: Option<&Path>) -> Result<Self, String> {
        let modes = [
            ("disable", Mode::Disable),
            ("allow", Mode::Allow),
            ("prefer", Mode::Prefer),
            ("require", Mode::Require),
            ("verify-ca", Mode::VerifyCa),
            ("verify-full", Mode::VerifyFull),
        ];
        let mode = values.one_of("sslmode", &modes)?;
        let is_system = values.get("sslrootcert") == Some("system");
        if is_system && mode.is_some_and(|mode| mode != Mode::VerifyFull) {
            return Err(
                "sslrootcert=system needs sslmode=verify-full: whoever can get a certificate has one".to_owned()
            );
        }
        let mode = mode.unwrap_or(if is_system { Mode::VerifyFull } else { Mode::Prefer });
        let is_direct = values.one_of("sslnegotiation", &[("postgres", false), ("direct", true)])?.unwrap_or(false);
        if is_direct && mode < Mode::Require {
            return Err("sslnegotiation=direct needs sslmode=require or a stricter one".to_owned());
        }
        let file = |keyword, name: &str| {
            let default = || home.map(|home| home.join(".postgresql").join(name));
            values.get(keyword).map(PathBuf::from).or_else(default).map(|path| File::new(path, keyword))
        };
        Ok(Self {
            mode,
            is_direct,
            roots: if is_system { Roots::System } else { Roots::File(file("sslrootcert", "root.crt")) },
            revocation_list: file("sslcrl", "root.crl")
                .filter(|file| values.get("sslcrl").is_some() || file.path.exists()),
            identity: Identity::read(values, file("sslcert", "postgresql.crt"), file("sslkey", "postgresql.key"))?,
            sends_name: values.one_of("sslsni", &[("0", false), ("1", true)])?.unwrap_or(true),
            versions: versions(values)?,
        })
    }

    /// The first attempt, and the one that may follow a refusal of the first. A Unix socket is never encrypted, as with
    /// libpq.
    pub(super) fn attempts(&self, place: &Place) -> (Encryption, Option<Encryption>) {
        match (&place.address, self.mode) {
            (Address::Unix(_), _) | (_, Mode::Disable) => (Encryption::None, None),
            (_, Mode::Allow) => (Encryption::None, Some(Encryption::Required)),
            (_, Mode::Prefer) => (Encryption::IfOffered, Some(Encryption::None)),
            _ => (Encryption::Required, None),
        }
    }

    fn config(&self, place: &Place) -> Result<ClientConfig, String> {
        let name = (self.mode == Mode::VerifyFull).then(|| place.host.name.clone());
        if name.as_ref().is_some_and(String::is_empty) {
            return Err("sslmode=verify-full needs a host beside hostaddr, to compare the certificate with".to_owned());
        }
        let provider = tls::provider();
        let (chain, identity) = (self.chain(&provider)?, self.identity.load(&provider)?);
        let mut config = tls::client(provider, &self.versions, chain, name.map(Name::Libpq), identity)?;
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        config.enable_sni = self.sends_name;
        Ok(config)
    }

    fn chain(&self, provider: &Arc<CryptoProvider>) -> Result<Option<Chain>, String> {
        let roots = match &self.roots {
            Roots::System => tls::system_roots().map_err(|problem| format!("sslrootcert=system: {problem}"))?,
            Roots::File(Some(file)) if file.path.exists() => file.certificates()?,
            Roots::File(_) if self.mode < Mode::VerifyCa => return Ok(None),
            Roots::File(file) => {
                let path = file
                    .as_ref()
                    .map_or_else(|| "~/.postgresql/root.crt".to_owned(), |file| file.path.display().to_string());
                return Err(format!(
                    "the root certificate file {path} does not exist. Remedy: put the certificate of the server's authority \
                     there or name it in sslrootcert; sslrootcert=system trusts the system's; a weaker sslmode \
                     verifies nobody"
                ));
            }
        };
        let revocation_lists = self.revocation_list.as_ref().map(File::revocation_lists).transpose()?;
        let chain = Chain::new(roots, revocation_lists.unwrap_or_default(), provider);
        chain.map(Some).map_err(|problem| format!("sslrootcert or sslcrl: {problem}"))
    }

    /// Asks for TLS and shakes hands; gives the stream back as it is when the server has no TLS and none is needed.
    ///
    /// # Errors
    /// `Tls`, with a remedy where there is one.
    pub(super) async fn negotiate(
        &self,
        mut stream: TcpStream,
        place: &Place,
        encryption: Encryption,
    ) -> Result<Socket, Error> {
        let fault = |problem: String| Error::Tls { host: place.to_string(), problem };
        // Before any byte is sent: a fault of our own files is not the server's.
        let config = self.config(place).map_err(fault)?;
        if !self.is_direct {
            match ask(&mut stream, place).await? {
                Answer::Yes => {}
                Answer::No if encryption == Encryption::IfOffered => return Ok(Socket::Tcp(stream)),
                Answer::No => {
                    return Err(fault(
                        "the server does not speak TLS, and sslmode needs it. Remedy: ssl = on with ssl_cert_file and \
                         ssl_key_file in postgresql.conf, or another sslmode"
                            .to_owned(),
                    ));
                }
            }
        }
        let name = ServerName::try_from(place.host.name.clone()).or_else(|error| match &place.address {
            // Not a name that could be sent; the verifier compares the setting itself.
            Address::Tcp(address) => Ok(ServerName::IpAddress(address.ip().into())),
            Address::Unix(_) => Err(error),
        });
        let name = name.map_err(|error| fault(error.to_string()))?;
        let connector = TlsConnector::from(Arc::new(config));
        let stream = connector.connect(name, stream).await.map_err(|error| fault(self.explain(&error, place)))?;
        if self.is_direct && stream.get_ref().1.alpn_protocol() != Some(PROTOCOL) {
            return Err(fault(
                "the server did not agree to Postgres' protocol, which sslnegotiation=direct needs".to_owned(),
            ));
        }
        Ok(Socket::Tls(Box::new(stream)))
    }

    fn explain(&self, error: &std::io::Error, place: &Place) -> String {
        let host = &place.host.name;
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        let roots = match &self.roots {
            Roots::System => "the system's certificates".to_owned(),
            Roots::File(file) => file.as_ref().map_or_else(String::new, |file| file.path.display().to_string()),
        };
        match inner {
            Some(rustls::Error::InvalidCertificate(problem)) => match problem {
                CertificateError::NotValidForName => format!(
                    "the server's certificate is not for {host}. Remedy: connect by a name that is in it (hostaddr says \
                     where), or give the server one for this name"
                ),
                CertificateError::UnknownIssuer => format!(
                    "the server's certificate comes from an authority that is not in {roots}. Remedy: put that authority's \
                     certificate there, if it is the one you trust"
                ),
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                    "the server's certificate has expired. Remedy: give the server a new one, and reload it".to_owned()
                }
                problem => format!("the server's certificate is refused: {problem}"),
            },
            Some(rustls::Error::AlertReceived(alert)) => format!(
                "the server ended the handshake: {alert:?}. Remedy: its log says why; it may not trust our \
                 certificate (sslcert)"
            ),
            _ if self.is_direct => {
                format!("the handshake failed: {error}. sslnegotiation=direct needs PostgreSQL 17 or later")
            }
            _ => format!("the handshake failed: {error}"),
        }
    }
}

/// The hash of the server's certificate, for channel binding.
pub(super) fn end_point(stream: &TlsStream<TcpStream>) -> Option<Vec<u8>> {
    let der = stream.get_ref().1.peer_certificates()?.first()?;
    Certificate::parse(der)?.end_point(der)
}

enum Answer {
    Yes,
    No,
}

/// SSLRequest and its one byte of an answer.
async fn ask(stream: &mut TcpStream, place: &Place) -> Result<Answer, Error> {
    // Not `Tls`, after which `prefer` would go on without any.
    let fault = |problem: &str| Error::Protocol(format!("{place}: {problem}"));
    let mut request = bytes::BytesMut::new();
    postgres_protocol::message::frontend::ssl_request(&mut request);
    stream.write_all(&request).await.map_err(Error::Broken)?;
    // Room for one more: what comes with the answer is not the server's.
    let mut answer = [0; 2];
    match (stream.read(&mut answer).await.map_err(Error::Broken)?, answer) {
        (0, _) => Err(Error::Closed),
        (1, [b'S', _]) => Ok(Answer::Yes),
        (1, [b'N', _]) => Ok(Answer::No),
        (2, [b'S' | b'N', _]) => Err(fault(
            "bytes in the clear came with the answer to SSLRequest: somebody between us and the server may \
             have put them there",
        )),
        // Its text is not shown: anybody could have sent it.
        (_, [b'E', _]) => Err(fault("the server answered SSLRequest with an error; its log says which")),
        _ => Err(fault("the answer to SSLRequest is neither S nor N: is this a PostgreSQL server?")),
    }
}

fn versions(values: &Values) -> Result<Vec<&'static SupportedProtocolVersion>, String> {
    let words = [("TLSv1", 10), ("TLSv1.1", 11), ("TLSv1.2", 12), ("TLSv1.3", 13)];
    let min = values.one_of("ssl_min_protocol_version", &words)?.unwrap_or(12);
    let max = values.one_of("ssl_max_protocol_version", &words)?.unwrap_or(13);
    let known = [(12, &rustls::version::TLS12), (13, &rustls::version::TLS13)];
    let found: Vec<_> =
        known.into_iter().filter(|(version, _)| (min..=max).contains(version)).map(|(_, v)| v).collect();
    if found.is_empty() {
        return Err(
            "ssl_min_protocol_version and ssl_max_protocol_version leave neither TLSv1.2 nor TLSv1.3".to_owned()
        );
    }
    Ok(found)
}
