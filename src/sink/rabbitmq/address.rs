//! `amqp://` and `amqps://` URLs, by the RabbitMQ URI specification and its page of query parameters. Pure.
//!
//! The traps. A parser that finds no name where an IPv6 address stands, and takes its default instead, sends the password
//! to another host. A `/`, `?` or `#` that somebody forgot to escape in a password ends the host before it begins, with the
//! same effect; so an `@` that stands where none may is a fault, never a guess. And a message that shows the part that is
//! wrong shows a password: none of these repeats what it read, but for the names of parameters.

mod query;

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use self::query::Query;
use crate::tls::File;

const GUEST: &str = "guest";
const LOCALHOST: &str = "localhost";

/// What the specification calls a vhost is one short string of `connection.open`.
const VHOST_BYTES_MAX: usize = 255;

/// More than a cluster has nodes.
const HELD_BACK_MAX: usize = 64;

/// One broker, who we are there, and how to speak with it.
#[derive(Clone)]
pub struct Address {
    /// A name or an address, without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
    pub(super) user: String,
    pub(crate) password: String,
    pub(super) vhost: String,
    /// In this order, of those that the broker offers.
    pub(super) mechanisms: Vec<Mechanism>,
    /// Seconds.
    pub(super) heartbeat: Option<u16>,
    /// To reach one address.
    pub(super) connection_timeout: Option<Duration>,
    /// Bytes; 0: as the broker has it.
    pub(super) frame_max: Option<u32>,
    /// `None`: `amqp://`.
    pub(super) tls: Option<Tls>,
    /// Addresses of the host that held back their confirms, the last one at the end.
    held_back: Vec<SocketAddr>,
}

/// How a login is made (SASL).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mechanism {
    Plain,
    Amqplain,
    /// The client's certificate says who we are.
    External,
}

/// Whom to trust, and who we are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tls {
    /// `None`: the system's.
    pub(super) roots: Option<File>,
    /// Our certificate and its key.
    pub(super) identity: Option<(File, File)>,
    pub(super) verifies: bool,
    pub(super) server_name: ServerName,
}

/// The name that is sent and compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ServerName {
    Host,
    Other(String),
    /// None is sent, none is compared.
    Disable,
}

/// The files of the settings, for every URL that does not name its own.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// `rabbitmq.tls_ca`.
    pub roots: Option<PathBuf>,
    /// `rabbitmq.tls_certificate`.
    pub certificate: Option<PathBuf>,
    /// `rabbitmq.tls_key`.
    pub key: Option<PathBuf>,
}

impl Files {
    /// Whether none is named.
    pub fn is_empty(&self) -> bool {
        self.roots.is_none() && self.certificate.is_none() && self.key.is_none()
    }
}

impl Mechanism {
    /// As SASL and the broker write it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Mechanism::Plain => "PLAIN",
            Mechanism::Amqplain => "AMQPLAIN",
            Mechanism::External => "EXTERNAL",
        }
    }
}

/// Host and port, without user and password.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Address({self})")
    }
}

impl Address {
    /// Several URLs with commas between, to be tried in this order.
    ///
    /// # Errors
    /// Every fault, without what is at fault.
    pub fn parse_all(urls: &str, files: &Files) -> Result<Vec<Self>, Vec<String>> {
        let urls = separate(urls);
        let (mut addresses, mut faults) = (Vec::new(), Vec::new());
        for (index, url) in urls.iter().enumerate() {
            match Self::parse(url, files) {
                Ok(address) => addresses.push(address),
                Err(fault) if urls.len() == 1 => faults.push(fault),
                Err(fault) => faults.push(format!("URL {}: {fault}", index + 1)),
            }
        }
        if faults.is_empty() { Ok(addresses) } else { Err(faults) }
    }

    /// One URL.
    ///
    /// # Errors
    /// The first fault, without what is at fault.
    pub fn parse(url: &str, files: &Files) -> Result<Self, String> {
        let parts = Parts::of(url)?;
        let (host, port) = host_and_port(parts.host_and_port)?;
        let (user, password) = match parts.user_and_password {
            None => (None, None),
            Some(both) => {
                let (user, password) = both.split_once(':').map_or((both, None), |(user, rest)| (user, Some(rest)));
                (Some(decoded(user, "user")?), password.map(|text| decoded(text, "password")).transpose()?)
            }
        };
        let query = Query::read(parts.query)?;
        let tls = if parts.is_tls { Some(query.tls(files)?) } else { query.no_tls().map(|()| None)? };
        let mechanisms = query.mechanisms()?;
        // One channel is all that is ever opened.
        query.number("channel_max", 1..=u16::MAX)?;
        check_login(&mechanisms, tls.as_ref(), user.is_some() && password.is_none())?;
        Ok(Self {
            host,
            port: port.unwrap_or(if parts.is_tls { 5671 } else { 5672 }),
            password: if user.is_some() { password.unwrap_or_default() } else { GUEST.to_owned() },
            user: user.unwrap_or_else(|| GUEST.to_owned()),
            vhost: vhost(parts.path)?,
            mechanisms,
            heartbeat: query.number("heartbeat", 0..=u16::MAX)?,
            connection_timeout: query
                .number("connection_timeout", 1..=u32::MAX)?
                .map(|millis| Duration::from_millis(millis.into())),
            frame_max: query.frame_max()?,
            tls,
            held_back: Vec::new(),
        })
    }

    /// Of the addresses of its host, those that held back their confirms come last, that of the last time behind them all.
    pub(super) fn in_order(&self, mut places: Vec<SocketAddr>) -> Vec<SocketAddr> {
        places.sort_by_key(|place| self.held_back.iter().position(|other| other == place));
        places
    }

    /// This address of its host held back its confirms.
    pub(super) fn put_last(&mut self, place: SocketAddr) {
        self.held_back.retain(|other| *other != place);
        // Addresses come and go where nodes do.
        if self.held_back.len() >= HELD_BACK_MAX {
            self.held_back.remove(0);
        }
        self.held_back.push(place);
    }

    /// Whether the broker makes a user's name of our certificate: no name was given, and no other mechanism allowed.
    pub(super) fn is_by_certificate(&self) -> bool {
        self.mechanisms == [Mechanism::External] && self.user == GUEST
    }

    /// Who we are there.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The virtual host.
    pub fn vhost(&self) -> &str {
        &self.vhost
    }

    /// Whether it is `amqps://`.
    pub fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Whether nobody else can listen: an address of this machine's own, or a name that means one.
    pub(super) fn is_loopback(&self) -> bool {
        match self.host.parse() {
            Ok(IpAddr::V4(address)) => address.is_loopback(),
            Ok(IpAddr::V6(address)) => address.to_canonical().is_loopback(),
            Err(_) => {
                let host = self.host.to_ascii_lowercase();
                host == LOCALHOST || host.ends_with(".localhost")
            }
        }
    }

    /// Whether it logs in as the user that RabbitMQ lets in from its own machine only.
    pub(super) fn is_guest(&self) -> bool {
        self.user == GUEST && self.mechanisms != [Mechanism::External]
    }
}

/// What can be said only of TLS, user and mechanism together.
fn check_login(mechanisms: &[Mechanism], tls: Option<&Tls>, lacks_password: bool) -> Result<(), String> {
    let is_external = mechanisms.contains(&Mechanism::External);
    if is_external && tls.is_none_or(|tls| tls.identity.is_none()) {
        return Err("auth_mechanism: external is a login by client certificate. Remedy: say amqps:// and name \
                    rabbitmq.tls_certificate and rabbitmq.tls_key (or certfile and keyfile in the URL)"
            .to_owned());
    }
    if lacks_password && mechanisms != [Mechanism::External] {
        return Err(
            "a user without a password. Remedy: write user:password@, or auth_mechanism=external with a client \
                    certificate"
                .to_owned(),
        );
    }
    Ok(())
}

/// A comma stands between two URLs only where a scheme follows: passwords may hold one.
fn separate(urls: &str) -> Vec<&str> {
    let mut separated = Vec::new();
    let mut rest = urls;
    let begins_url = |text: &str| {
        let text = text.trim_start();
        ["amqp://", "amqps://"]
            .iter()
            .any(|scheme| text.get(..scheme.len()).is_some_and(|beginning| beginning.eq_ignore_ascii_case(scheme)))
    };
    let mut from = 0;
    while let Some(comma) = rest.get(from..).and_then(|tail| tail.find(',')).map(|index| from + index) {
        let (url, next) = (rest.get(..comma).unwrap_or_default(), rest.get(comma + 1..).unwrap_or_default());
        if begins_url(next) {
            separated.push(url.trim());
            (rest, from) = (next, 0);
        } else {
            from = comma + 1;
        }
    }
    separated.push(rest.trim());
    separated
}

/// The parts of a URL as they stand in it.
struct Parts<'a> {
    is_tls: bool,
    user_and_password: Option<&'a str>,
    host_and_port: &'a str,
    path: Option<&'a str>,
    query: &'a str,
}

impl<'a> Parts<'a> {
    fn of(url: &'a str) -> Result<Self, String> {
        let needed = || "a URL such as amqps://user:password@host:5671/vhost is needed".to_owned();
        let (scheme, rest) = url.split_once("://").ok_or_else(needed)?;
        let is_tls = match scheme.to_ascii_lowercase().as_str() {
            "amqp" => false,
            "amqps" => true,
            _ => return Err(needed()),
        };
        if rest.chars().any(|letter| letter.is_whitespace() || letter.is_control()) {
            return Err("white space in it. Remedy: write %20 where it belongs to a name or a password".to_owned());
        }
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, rest) = rest.split_at(end);
        if rest.contains('@') || authority.matches('@').count() > 1 {
            return Err(
                "an `@` where none may be. Remedy: in a user, password or vhost write %40 for @, %2F for /, %3F \
                        for ? and %23 for #"
                    .to_owned(),
            );
        }
        if rest.contains('#') {
            return Err("a `#`, which no AMQP URL has. Remedy: write %23".to_owned());
        }
        let (user_and_password, host_and_port) =
            authority.split_once('@').map_or((None, authority), |(user, host)| (Some(user), host));
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        Ok(Self { is_tls, user_and_password, host_and_port, path: path.strip_prefix('/'), query })
    }
}

/// Without a name it is this machine, as the specification proposes.
fn host_and_port(text: &str) -> Result<(String, Option<u16>), String> {
    let (host, port) = match text.strip_prefix('[') {
        Some(inner) => {
            let (address, rest) = inner.split_once(']').ok_or("an IPv6 address that no `]` ends")?;
            let address: Ipv6Addr = address.parse().map_err(|_| "between `[` and `]` stands no IPv6 address")?;
            let port = match rest.strip_prefix(':') {
                Some(port) => port,
                None if rest.is_empty() => "",
                None => return Err("behind the `]` of an IPv6 address only a port may come".to_owned()),
            };
            (address.to_string(), port)
        }
        None => {
            let (name, port) = text.split_once(':').unwrap_or((text, ""));
            (host_name(name, port)?, port)
        }
    };
    // `parse` would take a plus.
    let is_number = port.bytes().all(|digit| digit.is_ascii_digit());
    match port.parse() {
        Ok(number) if is_number && number > 0 => Ok((host, Some(number))),
        _ if port.is_empty() => Ok((host, None)),
        _ => Err("a port is a number from 1 to 65535".to_owned()),
    }
}

fn host_name(text: &str, port: &str) -> Result<String, String> {
    if text.contains(',') || port.contains(',') {
        return Err(
            "a `,` in the host. Remedy: several hosts are several URLs with commas between, each with its own \
                    user, password and vhost"
                .to_owned(),
        );
    }
    if port.contains(':') {
        return Err(
            "more than one `:` behind the user. Remedy: write an IPv6 address in brackets, as in [::1]:5672".to_owned()
        );
    }
    let name = decoded(text, "host")?;
    match name.as_str() {
        "" => Ok(LOCALHOST.to_owned()),
        name if is_host_name(name) => Ok(name.to_owned()),
        _ => Err(
            "a host has letters, digits, `.`, `-` and `_` only. Remedy: write a name of other letters in its ASCII \
                  form (xn--...)"
                .to_owned(),
        ),
    }
}

fn is_host_name(name: &str) -> bool {
    name.bytes().all(|letter| letter.is_ascii_alphanumeric() || matches!(letter, b'.' | b'-' | b'_'))
}

/// Absent and empty are two: no path is the vhost `/`, a path of `/` alone the one of the empty name.
fn vhost(path: Option<&str>) -> Result<String, String> {
    let Some(path) = path else { return Ok("/".to_owned()) };
    if path.contains('/') {
        return Err(
            "a vhost with a `/` in it. Remedy: write %2F; the vhost / is /%2F, or nothing behind the port".to_owned()
        );
    }
    let vhost = decoded(path, "vhost")?;
    if vhost.len() > VHOST_BYTES_MAX {
        return Err(format!("a vhost of {} bytes, where AMQP takes {VHOST_BYTES_MAX}", vhost.len()));
    }
    Ok(vhost)
}

fn decoded(text: &str, part: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, tail)) = rest.split_first() {
        rest = tail;
        if *byte != b'%' {
            bytes.push(*byte);
            continue;
        }
        let digits = tail.split_at_checked(2).and_then(|(two, after)| {
            let value = |digit: &u8| char::from(*digit).to_digit(16);
            let [high, low] = two else { return None };
            Some((u8::try_from(value(high)? * 16 + value(low)?).ok()?, after))
        });
        let (byte, after) = digits.ok_or_else(|| {
            format!("{part}: a `%` without two hexadecimal digits behind it. Remedy: write %25 for a %")
        })?;
        bytes.push(byte);
        rest = after;
    }
    // It would end the user in a login.
    if bytes.contains(&0) {
        return Err(format!("{part}: a zero byte in it"));
    }
    String::from_utf8(bytes).map_err(|_| format!("{part}: what is written with % is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<Address, String> {
        Address::parse(url, &Files::default())
    }

    fn parts(url: &str) -> (String, String, String, u16, String) {
        let found = parse(url).unwrap_or_else(|fault| panic!("{url}: {fault}"));
        (found.user, found.password, found.host, found.port, found.vhost)
    }

    #[test]
    fn every_example_of_the_specification_is_read_as_it_says() {
        for (url, user, password, host, port, vhost) in [
            ("amqp://user:pass@host:10000/vhost", "user", "pass", "host", 10_000, "vhost"),
            ("amqp://user%61:%61pass@ho%61st:10000/v%2fhost", "usera", "apass", "hoast", 10_000, "v/host"),
            ("amqp://", "guest", "guest", "localhost", 5672, "/"),
            ("amqp://:@/", "", "", "localhost", 5672, ""),
            ("amqp://user:pass@", "user", "pass", "localhost", 5672, "/"),
            ("amqp://host", "guest", "guest", "host", 5672, "/"),
            ("amqp://:10000", "guest", "guest", "localhost", 10_000, "/"),
            ("amqp:///vhost", "guest", "guest", "localhost", 5672, "vhost"),
            ("amqp://host/", "guest", "guest", "host", 5672, ""),
            ("amqp://host/%2f", "guest", "guest", "host", 5672, "/"),
            ("amqp://[::1]", "guest", "guest", "::1", 5672, "/"),
            // What they leave open.
            ("amqps://host", "guest", "guest", "host", 5671, "/"),
            ("AMQPS://host:1/%2F", "guest", "guest", "host", 1, "/"),
            ("amqp://u:p@[2001:DB8::1]:5673/v", "u", "p", "2001:db8::1", 5673, "v"),
            ("amqp://u:p@127.0.0.1:/", "u", "p", "127.0.0.1", 5672, ""),
            ("amqp://u:a,b:c!$&'()*+;=@h", "u", "a,b:c!$&'()*+;=", "h", 5672, "/"),
            ("amqp://%40%3a:%40%2F%3f%23%25@h/%40", "@:", "@/?#%", "h", 5672, "@"),
            ("amqp://ü:ß@h/é", "ü", "ß", "h", 5672, "é"),
            ("amqp://my_host-1.example?", "guest", "guest", "my_host-1.example", 5672, "/"),
        ] {
            let expected = (user.to_owned(), password.to_owned(), host.to_owned(), port, vhost.to_owned());
            assert_eq!(parts(url), expected, "{url}");
        }
    }

    #[test]
    fn what_could_lead_elsewhere_is_refused_with_a_remedy_and_never_shown() {
        for (url, part) in [
            ("amqp://u:s3cret@h@elsewhere", "write %40"),
            ("amqp://u:s3c/ret@h", "%2F for /"),
            ("amqp://u:s3c?ret@h", "%3F for ?"),
            ("amqp://u:s3c#ret@h", "%23 for #"),
            ("amqp://u:s3c?s3cret=x@h", "%3F for ?"),
            ("amqp://u:p@h/v@s3cret", "write %40"),
            ("amqp://u:s3cret@h/v#x", "a `#`"),
            ("amqp://u:s3cret@h/a/b", "write %2F"),
            ("amqp://u:s3cret@h//", "the vhost / is /%2F"),
            ("amqp://u:s3cret@[::1", "no `]`"),
            ("amqp://u:s3cret@[::1%25lo]", "no IPv6 address"),
            ("amqp://u:s3cret@[127.0.0.1]", "no IPv6 address"),
            ("amqp://u:s3cret@[]", "no IPv6 address"),
            ("amqp://u:s3cret@[::1]x:1", "behind the `]`"),
            ("amqp://u:s3cret@::1", "in brackets"),
            ("amqp://u:s3cret@h:1:2", "in brackets"),
            ("amqp://u:s3cret@h1,h2", "several hosts are several URLs"),
            ("amqp://u:s3cret@h1:1,h2:1", "several hosts are several URLs"),
            ("amqp://u:s3cret@h/v, h2", "white space"),
            ("amqp://u:s3cret", "a number from 1 to 65535"),
            ("amqp://u:s3cret@h:0", "a number from 1 to 65535"),
            ("amqp://u:s3cret@h:+1", "a number from 1 to 65535"),
            ("amqp://u:s3cret@h:65536", "a number from 1 to 65535"),
            ("amqp://u:s3cret@h\u{f6}", "xn--"),
            ("amqp://u:s3cret@h%00", "host: a zero byte"),
            ("amqp://u:s3cret%00admin@h", "password: a zero byte"),
            ("amqp://u:s3cret%zz@h", "write %25"),
            ("amqp://u:s3cret%4@h", "write %25"),
            ("amqp://u:s3cret%ff@h", "not UTF-8"),
            ("amqp://u:s3 cret@h", "white space"),
            ("amqp://u@h", "a user without a password"),
            ("http://u:s3cret@h", "a URL such as amqps://"),
            ("u:s3cret@h", "a URL such as amqps://"),
            ("", "a URL such as amqps://"),
        ] {
            let fault = parse(url).err().unwrap_or_else(|| panic!("{url} is taken"));
            assert!(fault.contains(part), "{url}: {fault}");
            assert!(!fault.contains("s3c") && !fault.contains("cret"), "{url}: {fault}");
        }
        let long = format!("amqp://h/{}", "v".repeat(256));
        assert!(parse(&long).err().unwrap().contains("256 bytes"));
    }

    #[test]
    fn commas_stand_between_urls_only_where_a_scheme_follows() {
        let hosts = |urls: &str| -> Result<Vec<String>, Vec<String>> {
            Ok(Address::parse_all(urls, &Files::default())?.iter().map(ToString::to_string).collect())
        };
        assert_eq!(hosts("amqp://a").unwrap(), ["a:5672"]);
        assert_eq!(hosts(" amqp://u:p,q@a:1/v , amqps://[::1] ,AMQP://c\n").unwrap(), ["a:1", "[::1]:5671", "c:5672"]);
        let faults = hosts("amqp://a:x,amqp://b,amqp://c?heartbeat=s3cret").unwrap_err();
        assert_eq!(faults.len(), 2, "{faults:?}");
        assert!(faults[0].starts_with("URL 1: ") && faults[1].starts_with("URL 3: heartbeat: "), "{faults:?}");
        for wrong in ["amqp://a,", "amqp://a,b", "amqp://a,http://b", ",amqp://a"] {
            assert!(hosts(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_address_is_shown_without_its_password() {
        let address = parse("amqps://user:s3cret@[::1]/v").unwrap();
        assert_eq!(format!("{address} {address:?}"), "[::1]:5671 Address([::1]:5671)");
    }

    #[test]
    fn of_a_names_addresses_those_that_held_back_confirms_come_last_and_each_has_its_turn() {
        let places = |last: &[u8]| -> Vec<SocketAddr> {
            last.iter().map(|last| SocketAddr::from(([192, 0, 2, *last], 5672))).collect()
        };
        let mut address = parse("amqp://rabbit").unwrap();
        assert_eq!(address.in_order(places(&[3, 1, 2])), places(&[3, 1, 2]));
        for order in [[3, 1, 2], [1, 2, 3], [2, 3, 1], [3, 1, 2]] {
            assert_eq!(address.in_order(places(&[3, 1, 2])), places(&order));
            address.put_last(places(&order[..1])[0]);
        }
        assert_eq!(address.in_order(places(&[3, 4])), places(&[4, 3]));
        (0..=u8::MAX).for_each(|last| address.put_last(places(&[last])[0]));
        assert_eq!(address.held_back.len(), HELD_BACK_MAX);
    }

    #[test]
    fn only_this_machine_is_loopback() {
        let loopback =
            ["localhost", "LocalHost", "a.localhost", "127.0.0.1", "127.9.9.9", "[::1]", "[::ffff:127.0.0.1]", ""];
        let others = ["localhost.example", "127.0.0.1.example", "128.0.0.1", "[::2]", "rabbit", "0.0.0.0", "[::]"];
        for host in loopback {
            assert!(parse(&format!("amqp://{host}")).unwrap().is_loopback(), "{host}");
        }
        for host in others {
            assert!(!parse(&format!("amqp://{host}")).unwrap().is_loopback(), "{host}");
        }
    }
}
