//! Where Postgres is and as whom to log in: one reading for the replication and the SQL connection, as libpq reads it.
//!
//! The traps: tokio-postgres' own reading of a URL is not libpq's (no `PG*` variables, no default host or user, other
//! units), and its error texts may repeat a piece of the URL. Here defaults are libpq's, and no message holds a value.
//! Files are not read here but at every connection, so that a password or a certificate can be changed under a running
//! relay.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::conninfo::{self, Values};
use super::passfile::{self, Found, Wanted};
use super::{dial, login, tls};

/// Where libpq of Debian and of the source distribution look for the server's socket.
const SOCKET_DIRECTORIES: [&str; 2] = ["/var/run/postgresql", "/tmp"];

/// Postgres' own default port.
const PORT: u16 = 5432;

/// How long connecting and logging in may take at one address when nobody says, or says 0, which libpq takes for "for ever".
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
    /// How long connecting and logging in may take at one address.
    pub connect_timeout: Duration,
    /// Which server to take; `None`: the primary, and only where there is none, a standby.
    pub(super) target: Option<Target>,
    pub(super) shuffles: bool,
    pub(super) tls: tls::Settings,
    pub(super) login: login::Rules,
    pub(super) tcp: dial::Tcp,
    pub(super) options: Option<String>,
    pub(super) application_name: String,
    password: Option<String>,
    passfile: Option<PathBuf>,
}

/// libpq's `target_session_attrs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Any,
    ReadWrite,
    ReadOnly,
    Primary,
    Standby,
    PreferStandby,
}

/// One place to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// A name or address, or the directory of a Unix socket. What a certificate is compared with.
    pub name: String,
    /// Where to connect instead of asking for the name's addresses.
    pub address: Option<IpAddr>,
    /// The port, also in a socket's name.
    pub port: u16,
}

impl Host {
    /// The socket's path, when it is a Unix socket.
    pub fn socket(&self) -> Option<PathBuf> {
        let is_socket = self.address.is_none() && self.name.starts_with('/');
        is_socket.then(|| PathBuf::from(&self.name).join(format!(".s.PGSQL.{}", self.port)))
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.socket(), &self.address) {
            (Some(path), _) => write!(f, "{}", path.display()),
            (None, Some(address)) if self.name.is_empty() => write!(f, "{address}:{}", self.port),
            (None, _) => write!(f, "{}:{}", self.name, self.port),
        }
    }
}

/// A password, and where it is from.
pub(super) struct Password {
    pub(super) text: String,
    pub(super) origin: String,
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
    /// Reads a libpq URL or key/value string; `variable` looks up environment variables.
    ///
    /// # Errors
    /// What is wrong with it, without repeating it.
    pub fn parse(url: &str, variable: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let values = conninfo::read(url, &variable)?;
        refuse(&values)?;
        let user = match values.get("user") {
            Some(user) => user.to_owned(),
            None => os_user().or_else(|| variable("USER")).ok_or("no user: name one in the URL or in PGUSER")?,
        };
        let hosts = hosts(&values)?;
        let home = home(&variable);
        let targets = [
            ("any", Target::Any),
            ("read-write", Target::ReadWrite),
            ("read-only", Target::ReadOnly),
            ("primary", Target::Primary),
            ("standby", Target::Standby),
            ("prefer-standby", Target::PreferStandby),
        ];
        let connect_timeout = values.number::<i64>("connect_timeout")?.and_then(|seconds| u64::try_from(seconds).ok());
        let name = values.get("application_name").or_else(|| values.get("fallback_application_name"));
        let tls = tls::Settings::read(&values, home.as_deref())?;
        Ok(Self {
            hosts,
            database: values.get("dbname").map_or_else(|| user.clone(), str::to_owned),
            user,
            connect_timeout: connect_timeout
                .filter(|seconds| *seconds > 0)
                .map_or(CONNECT_TIMEOUT, Duration::from_secs),
            target: values.one_of("target_session_attrs", &targets)?,
            shuffles: values.one_of("load_balance_hosts", &[("disable", false), ("random", true)])?.unwrap_or(false),
            tls,
            login: login::Rules::read(&values)?,
            tcp: dial::Tcp::read(&values)?,
            options: values.get("options").map(str::to_owned),
            application_name: name.unwrap_or("pgoutbox").to_owned(),
            password: values.get("password").map(str::to_owned),
            passfile: values.get("passfile").map(PathBuf::from).or_else(|| home.map(|home| home.join(".pgpass"))),
        })
    }

    /// The password for a login at this host.
    ///
    /// # Errors
    /// Why there is none, and what to do about it.
    pub(super) fn password(&self, host: &Host) -> Result<Password, String> {
        if let Some(text) = &self.password {
            return Ok(Password { text: text.clone(), origin: "postgres.url".to_owned() });
        }
        let address = host.address.map(|address| address.to_string()).unwrap_or_default();
        // As libpq: a socket in the default directory goes by the name of localhost; so does, whatever the manual says, an
        // address without a name, which the manual lets go by itself.
        let names = match host.name.as_str() {
            "" => [address.as_str(), "localhost"],
            name if SOCKET_DIRECTORIES.contains(&name) => ["localhost", name],
            name => [name, name],
        };
        let (port, database, user) = (host.port, self.database.as_str(), self.user.as_str());
        let [name, _] = names;
        let remedy =
            format!("put it into postgres.url, PGPASSWORD or a .pgpass line {name}:{port}:{database}:{user}:...");
        let Some(path) = &self.passfile else { return Err(remedy) };
        for host in names {
            match passfile::look(path, &Wanted { host, port, database, user }) {
                Found::Password(text) => return Ok(Password { text, origin: path.display().to_string() }),
                Found::Nothing => {}
                Found::Unused(why) => return Err(format!("{why}; or {remedy}")),
            }
        }
        Err(remedy)
    }
}

/// What libpq knows and we do not, where leaving it out in silence would be less safe or a surprise.
fn refuse(values: &Values) -> Result<(), String> {
    if values.get("gssencmode") == Some("require") {
        return Err("gssencmode=require: GSSAPI encryption is not supported; use TLS (sslmode)".to_owned());
    }
    if values.get("sslpassword").is_some() {
        return Err("sslpassword: encrypted keys are not supported; give sslkey a key without a passphrase, mode 0600"
            .to_owned());
    }
    if values.get("sslcrldir").is_some() {
        return Err(
            "sslcrldir: directories are not supported; put the revocation lists into one file, sslcrl".to_owned()
        );
    }
    if values.get("replication").is_some() {
        return Err("replication: pgoutbox chooses it itself; leave it out".to_owned());
    }
    Ok(())
}

/// As libpq: HOME, else what the system knows.
pub(super) fn home(variable: &impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let named = variable("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    named.or_else(|| nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten().map(|user| user.dir))
}

fn os_user() -> Option<String> {
    nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten().map(|user| user.name)
}

fn hosts(values: &Values) -> Result<Vec<Host>, String> {
    let list = |keyword| values.get(keyword).map(|text| text.split(',').map(str::trim).collect::<Vec<_>>());
    let (names, addresses) = (list("host"), list("hostaddr"));
    let count = addresses.as_ref().or(names.as_ref()).map_or(1, Vec::len);
    let fits = |given: &Option<Vec<&str>>| given.as_ref().is_none_or(|given| given.len() == count);
    if !fits(&names) {
        return Err("host and hostaddr: as many names as addresses are needed".to_owned());
    }
    let ports = list("port").unwrap_or_default();
    if ports.len() > 1 && ports.len() != count {
        return Err("port: one for all hosts, or one for each, is needed".to_owned());
    }
    let at = |list: &Option<Vec<&str>>, index: usize| {
        let text = list.as_ref().and_then(|list| list.get(index)).copied();
        text.filter(|text| !text.is_empty()).map(str::to_owned)
    };
    (0..count)
        .map(|index| {
            let port = match ports.get(index).or(ports.first()).copied().unwrap_or_default() {
                "" => PORT,
                text => match text.parse() {
                    Ok(port) if port > 0 => port,
                    _ => return Err("port: a number from 1 to 65535 is needed".to_owned()),
                },
            };
            let address = at(&addresses, index).map(|text| text.parse::<IpAddr>()).transpose();
            let address = address.map_err(|_| "hostaddr: an IP address is needed".to_owned())?;
            let name = at(&names, index);
            let name =
                if address.is_some() { name.unwrap_or_default() } else { name.unwrap_or_else(|| default_host(port)) };
            if name.starts_with('@') {
                return Err("host: abstract sockets are not supported; name the socket's directory".to_owned());
            }
            Ok(Host { name, address, port })
        })
        .collect()
}

/// The first directory that has the socket, else the first that is there.
fn default_host(port: u16) -> String {
    let directories = SOCKET_DIRECTORIES.map(PathBuf::from);
    let socket = format!(".s.PGSQL.{port}");
    let with_socket = directories.iter().find(|directory| directory.join(&socket).exists());
    let found = with_socket.or_else(|| directories.iter().find(|directory| directory.is_dir()));
    found.map_or_else(|| SOCKET_DIRECTORIES.concat(), |directory| directory.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none(_: &str) -> Option<String> {
        None
    }

    fn tcp(name: &str, port: u16) -> Host {
        Host { name: name.to_owned(), address: None, port }
    }

    fn password(settings: &Settings) -> Option<String> {
        settings.password(&settings.hosts[0]).ok().map(|password| password.text)
    }

    #[test]
    fn reads_urls_and_key_value_strings_alike() {
        for text in ["postgres://relay:s3cret@db:5433/shop", "host=db port=5433 user=relay password=s3cret dbname=shop"]
        {
            let settings = Settings::parse(text, none).unwrap();
            assert_eq!(settings.hosts, [tcp("db", 5433)]);
            assert_eq!((settings.user.as_str(), settings.database.as_str()), ("relay", "shop"));
            assert_eq!(password(&settings).as_deref(), Some("s3cret"));
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
        assert_eq!(settings.hosts, [tcp("a", 6000), tcp("/run/pg", 6000)]);
        assert_eq!(settings.hosts[1].socket(), Some("/run/pg/.s.PGSQL.6000".into()));
        assert_eq!(settings.database, "relay");
        assert_eq!(password(&settings).as_deref(), Some("s3cret"));
        assert!(Settings::parse("port=1", none).unwrap().hosts[0].socket().is_some());
    }

    #[test]
    fn several_hosts_and_unix_sockets_keep_their_order() {
        let settings = Settings::parse("host=/run/pg,db2 port=1,2 user=u", none).unwrap();
        assert_eq!(settings.hosts, [tcp("/run/pg", 1), tcp("db2", 2)]);
        let settings = Settings::parse("host=a,b hostaddr=127.0.0.1,::1 user=u", none).unwrap();
        let addresses: Vec<_> = settings.hosts.iter().filter_map(|host| host.address).collect();
        assert_eq!(addresses, ["127.0.0.1".parse::<IpAddr>().unwrap(), "::1".parse().unwrap()]);
        // Sockets in the default place.
        let ports =
            |text| Settings::parse(text, none).map(|settings| settings.hosts.iter().map(|host| host.port).collect());
        assert_eq!(ports("postgresql://:1,:2/x"), Ok(vec![1, 2]));
        for text in ["host=a,b hostaddr=127.0.0.1", "host=a,b,c port=1,2", "host=a port=70000", "hostaddr=a"] {
            assert!(Settings::parse(text, none).is_err(), "{text}");
        }
    }

    #[test]
    fn an_error_never_repeats_the_url() {
        for url in [
            "postgres://u:s3cret@h:port/d",
            "s3cret",
            "postgres://u:s3cret@h/d?nonsense=s3cret",
            "host=h sslmode=s3cret",
            "host=h connect_timeout=s3cret",
            "host=h require_auth=s3cret",
        ] {
            let error = Settings::parse(url, none).unwrap_err();
            assert!(!error.contains("s3cret"), "{error}");
        }
    }
}
