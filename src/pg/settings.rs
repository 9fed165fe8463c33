//! Where Postgres is and as whom to log in: one reading for the replication and the SQL connection.
//!
//! The trap: tokio-postgres' own reading of a URL is not libpq's (no `PG*` variables, no default host or user), and its
//! error texts may repeat a piece of the URL. Here defaults are libpq's, and no message holds the URL.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_postgres::config::{Config, Host as ConfigHost, SslMode};

/// Where libpq of Debian and of the source distribution look for the server's socket.
const SOCKET_DIRECTORIES: [&str; 2] = ["/var/run/postgresql", "/tmp"];

/// Postgres' own default port.
const PORT: u16 = 5432;

/// How long connecting and logging in may take when the URL does not say.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Where Postgres is and as whom to log in.
#[derive(Clone)]
pub struct Settings {
    /// Tried in order.
    pub hosts: Vec<Host>,
    /// The role.
    pub user: String,
    /// The database: a logical slot belongs to one.
    pub database: String,
    /// How long connecting and logging in may take.
    pub connect_timeout: Duration,
    password: Option<Vec<u8>>,
}

/// One place to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// A name or address, and a port.
    Tcp(String, u16),
    /// The socket's path.
    Unix(PathBuf),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::Tcp(name, port) => write!(f, "{name}:{port}"),
            Host::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("hosts", &self.hosts)
            .field("user", &self.user)
            .field("database", &self.database)
            .finish_non_exhaustive()
    }
}

impl Settings {
    /// Reads a libpq URL or key/value string; `variable` looks up `PG*` environment variables.
    ///
    /// # Errors
    /// What is wrong with it, without repeating it.
    pub fn parse(url: &str, variable: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let config: Config = url.parse().map_err(|error: tokio_postgres::Error| explain(&error))?;
        if config.get_ssl_mode() == SslMode::Require {
            return Err(NO_TLS.to_owned());
        }
        let user = match config.get_user().map(str::to_owned).or_else(|| variable("PGUSER")) {
            Some(user) => user,
            None => variable("USER").ok_or("no user: name one in the URL or in PGUSER")?,
        };
        let database = config.get_dbname().map(str::to_owned).or_else(|| variable("PGDATABASE"));
        let password = config.get_password().map(<[u8]>::to_vec);
        Ok(Self {
            hosts: hosts(&config, &variable)?,
            database: database.unwrap_or_else(|| user.clone()),
            user,
            connect_timeout: config.get_connect_timeout().copied().unwrap_or(CONNECT_TIMEOUT),
            password: password.or_else(|| variable("PGPASSWORD").map(String::into_bytes)),
        })
    }

    /// The password, for the login only.
    pub(super) fn password(&self) -> Option<&[u8]> {
        self.password.as_deref()
    }

    /// The same place and role, for tokio-postgres and one host of ours.
    pub(super) fn control(&self) -> Config {
        let mut config = Config::new();
        config.user(&self.user).dbname(&self.database).application_name("pgoutbox");
        config.options("-c client_min_messages=warning -c statement_timeout=0 -c lock_timeout=0");
        config.ssl_mode(SslMode::Disable);
        if let Some(password) = &self.password {
            config.password(password);
        }
        config
    }
}

const NO_TLS: &str = "sslmode `require` and the stricter ones need TLS, which this version does not speak to Postgres yet: \
    use a unix socket, loopback or a tunnel, with sslmode=disable";

fn explain(error: &tokio_postgres::Error) -> String {
    let source = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    match source.contains("sslmode") {
        true => NO_TLS.to_owned(),
        false if source.is_empty() => "not a libpq URL or key/value string".to_owned(),
        false => format!("not a libpq URL or key/value string: {source}"),
    }
}

fn hosts(config: &Config, variable: &impl Fn(&str) -> Option<String>) -> Result<Vec<Host>, String> {
    let default_port = match variable("PGPORT") {
        Some(text) => text.parse().map_err(|_| "PGPORT is not a port".to_owned())?,
        None => PORT,
    };
    let ports = config.get_ports();
    let port_of = |index: usize| match ports {
        [] => default_port,
        [one] => *one,
        many => many.get(index).copied().unwrap_or(default_port),
    };
    let named: Vec<Host> = match config.get_hosts() {
        [] => variable("PGHOST")
            .map(|names| names.split(',').enumerate().map(|(index, name)| host(name, port_of(index))).collect())
            .unwrap_or_default(),
        hosts => hosts
            .iter()
            .enumerate()
            .map(|(index, host)| match host {
                ConfigHost::Tcp(name) => Host::Tcp(name.clone(), port_of(index)),
                ConfigHost::Unix(directory) => socket(directory, port_of(index)),
            })
            .collect(),
    };
    if !named.is_empty() {
        return Ok(named);
    }
    // libpq: the default socket directory first; where it has no socket, loopback.
    let sockets = SOCKET_DIRECTORIES.iter().map(|directory| socket(Path::new(directory), port_of(0)));
    let present = sockets.into_iter().find(|host| matches!(host, Host::Unix(path) if path.exists()));
    Ok(vec![present.unwrap_or_else(|| Host::Tcp("localhost".to_owned(), port_of(0)))])
}

fn host(name: &str, port: u16) -> Host {
    if name.starts_with('/') { socket(Path::new(name), port) } else { Host::Tcp(name.to_owned(), port) }
}

fn socket(directory: &Path, port: u16) -> Host {
    Host::Unix(directory.join(format!(".s.PGSQL.{port}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none(_: &str) -> Option<String> {
        None
    }

    #[test]
    fn reads_urls_and_key_value_strings_alike() {
        for text in ["postgres://relay:s3cret@db:5433/shop", "host=db port=5433 user=relay password=s3cret dbname=shop"]
        {
            let settings = Settings::parse(text, none).unwrap();
            assert_eq!(settings.hosts, [Host::Tcp("db".to_owned(), 5433)]);
            assert_eq!((settings.user.as_str(), settings.database.as_str()), ("relay", "shop"));
            assert_eq!(settings.password(), Some(&b"s3cret"[..]));
            assert!(!format!("{settings:?}").contains("s3cret"));
        }
    }

    #[test]
    fn defaults_are_those_of_libpq() {
        let variable = |name: &str| match name {
            "PGHOST" => Some("a,/run/pg".to_owned()),
            "PGPORT" => Some("6000".to_owned()),
            "PGUSER" => Some("relay".to_owned()),
            "PGPASSWORD" => Some("s3cret".to_owned()),
            _ => None,
        };
        let settings = Settings::parse("postgres://", variable).unwrap();
        let socket = Host::Unix("/run/pg/.s.PGSQL.6000".into());
        assert_eq!(settings.hosts, [Host::Tcp("a".to_owned(), 6000), socket]);
        assert_eq!(settings.database, "relay");
        assert_eq!(settings.password(), Some(&b"s3cret"[..]));
    }

    #[test]
    fn several_hosts_and_unix_sockets_keep_their_order() {
        let settings = Settings::parse("host=/run/pg,db2 port=1,2 user=u", none).unwrap();
        assert_eq!(settings.hosts, [Host::Unix("/run/pg/.s.PGSQL.1".into()), Host::Tcp("db2".to_owned(), 2)]);
    }

    #[test]
    fn a_demand_for_tls_is_refused_and_not_ignored() {
        for mode in ["require", "verify-ca", "verify-full"] {
            let error = Settings::parse(&format!("postgres://u:s3cret@h/d?sslmode={mode}"), none).unwrap_err();
            assert!(error.contains("TLS") && !error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn an_error_never_repeats_the_url() {
        for url in ["postgres://u:s3cret@h:port/d", "s3cret", "postgres://u:s3cret@h/d?nonsense=s3cret"] {
            let error = Settings::parse(url, none).unwrap_err();
            assert!(!error.contains("s3cret"), "{error}");
        }
    }
}
