//! The doors. To Postgres both connections go where libpq's would, with what libpq would, and are refused where it is; to
//! RabbitMQ a session goes where its URL says, and OpenSSL's word on a certificate is ours.
//!
//! The trap: a test of our own idea of libpq proves the idea. So each case is also given to psql, which is libpq, or to the
//! command line of OpenSSL, against the same server, and the two must agree.

mod amqp;
mod amqps;
mod auth;
mod files;
mod hosts;
mod peers;
mod tls;

use std::error::Error as _;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use pgoutbox::metrics::Metrics;
use pgoutbox::pg::catalog::Control;
use pgoutbox::pg::replication::Replication;
use pgoutbox::pg::{self, Settings};
use pgoutbox::servers::Postgres;
use pgoutbox::sink::rabbitmq::{Address, Files};
use pgoutbox::sink::{RabbitMq, Sink, rabbitmq};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SignatureAlgorithm, date_time_ymd};

use crate::support::unique;

/// Stands for every secret here: it may come out nowhere.
const CANARY: &str = "canary-4711";

/// A home directory, for default files.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Writes a file, only its owner's, and returns its path.
    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        mode(&path, 0o600);
        path
    }
}

fn mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// How a connection came in: whether TLS is spoken, as whom, and where.
#[derive(Debug, PartialEq, Eq)]
struct In {
    tls: bool,
    user: String,
    port: u16,
}

/// Asked about connections by their name.
const HOW: &str = "select coalesce(ssl, false), usename::text, current_setting('port')::int, backend_type \
    from pg_stat_activity left join pg_stat_ssl using (pid)";

/// Both connections of a relay, opened by ours.
async fn ours(conninfo: &str, home: &Home, variables: &[(&str, &str)]) -> Result<In, String> {
    let variable = |name: &str| match name {
        "HOME" => Some(home.path().display().to_string()),
        name => variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()),
    };
    let mark = unique("door");
    let separator = if conninfo.contains("://") { if conninfo.contains('?') { "&" } else { "?" } } else { " " };
    let marked = format!("{conninfo}{separator}application_name={mark}");
    let settings = Settings::parse(&marked, variable)?;
    let control = Control::open(&settings).await.map_err(told)?;
    let _replication = Replication::open(&control, &settings).await.map_err(told)?;
    let both = format!("{HOW} where application_name = $1 order by backend_type");
    let rows = control.client().query(&both, &[&mark]).await.unwrap();
    let kinds: Vec<String> = rows.iter().map(|row| row.get(3)).collect();
    assert_eq!(kinds, ["client backend", "walsender"], "{conninfo}");
    let port = |port: i32| u16::try_from(port).unwrap();
    let found: Vec<In> =
        rows.iter().map(|row| In { tls: row.get(0), user: row.get(1), port: port(row.get(2)) }).collect();
    assert_eq!(found[0], found[1], "the two connections of {conninfo} differ");
    Ok(found.into_iter().next().unwrap())
}

fn told(error: pg::Error) -> String {
    let text = error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"));
    assert!(!text.contains(CANARY) && !format!("{error:?}").contains(CANARY), "{text}");
    text
}

/// The same by libpq.
fn psql(conninfo: &str, home: &Home, variables: &[(&str, &str)]) -> Result<In, String> {
    let mut command = Command::new("psql");
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PG")) {
        command.env_remove(name);
    }
    command.env("HOME", home.path()).envs(variables.iter().copied());
    let sql = format!("{HOW} where pid = pg_backend_pid()");
    let output = command.args(["-X", "-w", "-A", "-t", "-c", &sql, "-d", conninfo]).output().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let text = String::from_utf8(output.stdout).unwrap();
    let fields: Vec<&str> = text.trim().split('|').collect();
    Ok(In { tls: fields[0] == "t", user: fields[1].to_owned(), port: fields[2].parse().unwrap() })
}

/// Both must agree; returns ours.
async fn agreed(conninfo: &str, home: &Home, variables: &[(&str, &str)]) -> Result<In, String> {
    let (ours, theirs) = (ours(conninfo, home, variables).await, psql(conninfo, home, variables));
    match (&ours, &theirs) {
        (Ok(ours), Ok(theirs)) => assert_eq!(ours, theirs, "{conninfo}"),
        (Err(_), Err(_)) => {}
        _ => panic!("{conninfo} {variables:?}\nours: {ours:?}\npsql: {theirs:?}"),
    }
    ours
}

/// Somebody who signs certificates.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    key_pem: String,
}

/// A certificate and its key, as PEM.
#[derive(Clone)]
pub(crate) struct Issued {
    certificate: String,
    key: String,
}

impl Authority {
    fn new(name: &str) -> Self {
        Self::valid(name, 2020, 2090)
    }

    /// From the beginning of one year to that of another.
    fn valid(name: &str, from: i32, to: i32) -> Self {
        let mut params = CertificateParams::default();
        (params.not_before, params.not_after) = (date_time_ymd(from, 1, 1), date_time_ymd(to, 1, 1));
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        let key_pem = key.serialize_pem();
        Self { issuer: Issuer::new(params, key), pem, key_pem }
    }

    fn issue(&self, params: CertificateParams) -> Issued {
        self.issue_with(params, &KeyPair::generate().unwrap())
    }

    fn issue_with(&self, params: CertificateParams, key: &KeyPair) -> Issued {
        let certificate = params.signed_by(key, &self.issuer).unwrap();
        Issued { certificate: certificate.pem(), key: key.serialize_pem() }
    }
}

/// A certificate for these names and addresses.
fn named(names: &[&str], common_name: &str) -> CertificateParams {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params
}

pub(crate) fn self_signed(algorithm: &'static SignatureAlgorithm) -> Issued {
    let key = KeyPair::generate_for(algorithm).unwrap();
    let certificate = named(&["localhost", "127.0.0.1"], "localhost").self_signed(&key).unwrap();
    Issued { certificate: certificate.pem(), key: key.serialize_pem() }
}

/// What `openssl req -x509` makes: a server that is its own authority.
fn self_signed_authority() -> Issued {
    let mut params = named(&["localhost", "127.0.0.1"], "localhost");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    Issued { certificate: params.self_signed(&key).unwrap().pem(), key: key.serialize_pem() }
}

/// By the OpenSSL command line, for what rcgen cannot make: RSA keys, version 1.
fn openssl(arguments: &[&str], directory: &Path) {
    let output = Command::new("openssl").args(arguments).current_dir(directory).output().unwrap();
    assert!(output.status.success(), "openssl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// From now on the server shows this certificate.
pub(crate) fn show(postgres: &Postgres, issued: &Issued) {
    install(postgres, "server.crt", &issued.certificate);
    install(postgres, "server.key", &issued.key);
    postgres.append_conf("ssl = on").unwrap();
    let faults = || postgres.log().matches("SSL configuration was not reloaded").count();
    let before = faults();
    postgres.reload().unwrap();
    // A certificate that it does not take leaves it with the one before. It reads it before it takes another connection.
    assert!(psql(&format!("{} sslmode=disable", keywords(postgres)), &Home::new(), &[]).is_ok());
    assert_eq!(faults(), before, "{}", postgres.log());
}

fn keywords(postgres: &Postgres) -> String {
    format!("host={} port={} user=postgres", postgres.socket_dir().display(), postgres.port())
}

/// Writes a file that the server's user, and nobody else, can read.
fn install(postgres: &Postgres, name: &str, text: &str) {
    let path = postgres.data_dir().join(name);
    std::fs::write(&path, text).unwrap();
    mode(&path, 0o600);
    let owner = std::fs::metadata(postgres.data_dir()).unwrap();
    chown(&path, Some(owner.uid()), Some(owner.gid())).unwrap();
}

/// A session with RabbitMQ that changes nothing there.
async fn session(urls: &str, files: &Files) -> Result<RabbitMq, String> {
    let addresses = Address::parse_all(urls, files).map_err(|faults| faults.join("; "))?;
    let exchange = "amq.topic".to_owned();
    let settings = rabbitmq::Settings { addresses, exchange, declare: false, queues: Vec::new(), message_bytes_max: 0 };
    let opened = RabbitMq::open(&settings, Arc::new(Metrics::new())).await;
    opened.map_err(|error| {
        assert!(!error.to_string().contains(CANARY) && !format!("{error:?}{settings:?}").contains(CANARY), "{error}");
        error.to_string()
    })
}

/// Whether a session comes about, or why not.
async fn opens(urls: &str, files: &Files) -> Result<(), String> {
    session(urls, files).await?.close().await;
    Ok(())
}
