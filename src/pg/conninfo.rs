//! The two ways to write a connection string, as libpq reads them, and what fills their holes: service file, environment.
//!
//! The trap: a message that shows "the part that is wrong" shows a password as soon as somebody forgets to escape one. So no
//! message repeats what was read; it names the keyword, which is libpq's, or the place.

use std::collections::BTreeMap;

use super::service;

/// Keywords of libpq, and the environment variable of each. `_`: accepted, and without effect here.
const KEYWORDS: [(&str, &str); 49] = [
    ("host", "PGHOST"),
    ("hostaddr", "PGHOSTADDR"),
    ("port", "PGPORT"),
    ("dbname", "PGDATABASE"),
    ("user", "PGUSER"),
    ("password", "PGPASSWORD"),
    ("passfile", "PGPASSFILE"),
    ("service", "PGSERVICE"),
    ("servicefile", "PGSERVICEFILE"),
    ("connect_timeout", "PGCONNECT_TIMEOUT"),
    ("target_session_attrs", "PGTARGETSESSIONATTRS"),
    ("load_balance_hosts", "PGLOADBALANCEHOSTS"),
    ("options", "PGOPTIONS"),
    ("application_name", "PGAPPNAME"),
    ("fallback_application_name", ""),
    ("client_encoding", "PGCLIENTENCODING"),
    ("keepalives", ""),
    ("keepalives_idle", ""),
    ("keepalives_interval", ""),
    ("keepalives_count", ""),
    ("tcp_user_timeout", ""),
    ("sslmode", "PGSSLMODE"),
    ("sslnegotiation", "PGSSLNEGOTIATION"),
    ("sslcompression", "PGSSLCOMPRESSION"),
    ("sslcert", "PGSSLCERT"),
    ("sslkey", "PGSSLKEY"),
    ("sslcertmode", "PGSSLCERTMODE"),
    ("sslpassword", ""),
    ("sslrootcert", "PGSSLROOTCERT"),
    ("sslcrl", "PGSSLCRL"),
    ("sslcrldir", "PGSSLCRLDIR"),
    ("sslsni", "PGSSLSNI"),
    ("sslkeylogfile", ""),
    ("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION"),
    ("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION"),
    ("requirepeer", "PGREQUIREPEER"),
    ("require_auth", "PGREQUIREAUTH"),
    ("channel_binding", "PGCHANNELBINDING"),
    ("gssencmode", "PGGSSENCMODE"),
    ("krbsrvname", "PGKRBSRVNAME"),
    ("gsslib", "PGGSSLIB"),
    ("gssdelegation", "PGGSSDELEGATION"),
    ("min_protocol_version", "PGMINPROTOCOLVERSION"),
    ("max_protocol_version", "PGMAXPROTOCOLVERSION"),
    ("oauth_issuer", ""),
    ("oauth_client_id", ""),
    ("oauth_client_secret", ""),
    ("oauth_scope", ""),
    ("replication", ""),
];

/// Values by keyword. Not `Debug`: it holds the password.
#[derive(Default)]
pub(super) struct Values(BTreeMap<&'static str, String>);

impl Values {
    /// The value, unless it is missing or empty, which is the same to libpq.
    pub(super) fn get(&self, keyword: &str) -> Option<&str> {
        self.0.get(keyword).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Reads a whole number.
    pub(super) fn number<T: std::str::FromStr>(&self, keyword: &str) -> Result<Option<T>, String> {
        let wrong = || format!("{keyword}: a whole number is needed");
        self.get(keyword).map(|text| text.trim().parse().map_err(|_| wrong())).transpose()
    }

    /// Reads one of several words.
    pub(super) fn one_of<T: Copy>(&self, keyword: &str, words: &[(&str, T)]) -> Result<Option<T>, String> {
        let Some(text) = self.get(keyword) else { return Ok(None) };
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        let names: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        found.map(Some).ok_or_else(|| format!("{keyword}: one of {} is needed", names.join(", ")))
    }

    /// Stores a value under libpq's own name of the keyword; false when there is no such keyword.
    pub(super) fn set(&mut self, keyword: &str, value: String) -> bool {
        // libpq's old name for the two modes there were.
        if keyword == "requiressl" {
            let mode = if value.starts_with('1') { "require" } else { "prefer" };
            return self.set("sslmode", mode.to_owned());
        }
        let known = KEYWORDS.iter().find(|(name, _)| *name == keyword);
        known.map(|(name, _)| self.0.insert(name, value)).is_some()
    }

    /// The same, where a keyword's first value counts.
    pub(super) fn set_first(&mut self, keyword: &str, value: String) -> bool {
        let mut one = Self::default();
        let is_known = one.set(keyword, value);
        one.0.into_iter().for_each(|(keyword, value)| self.set_if_missing(keyword, value));
        is_known
    }

    fn set_if_missing(&mut self, keyword: &'static str, value: String) {
        self.0.entry(keyword).or_insert(value);
    }
}

/// Reads the string, then the service it or the environment names, then the environment.
pub(super) fn read(text: &str, variable: &impl Fn(&str) -> Option<String>) -> Result<Values, String> {
    let mut values = parse(text)?;
    if let Some(name) = values.get("service").map(str::to_owned).or_else(|| variable("PGSERVICE"))
        && !name.is_empty()
    {
        for (keyword, value) in service::find(&name, values.get("servicefile"), variable)?.0 {
            values.set_if_missing(keyword, value);
        }
    }
    // Superseded in 1.7.4's days, and read to this day: PGREQUIRESSL=1 is sslmode=require.
    if values.get("sslmode").is_none()
        && variable("PGSSLMODE").is_none()
        && variable("PGREQUIRESSL").is_some_and(|value| value.starts_with('1'))
    {
        values.set_if_missing("sslmode", "require".to_owned());
    }
    for (keyword, name) in KEYWORDS {
        if let Some(value) = variable(name).filter(|_| !name.is_empty()) {
            values.set_if_missing(keyword, value);
        }
    }
    Ok(values)
}

fn parse(text: &str) -> Result<Values, String> {
    let text = text.trim();
    match ["postgresql://", "postgres://"].iter().find_map(|scheme| text.strip_prefix(scheme)) {
        Some(rest) => url(rest),
        None => key_value(text),
    }
}

fn unknown(count: usize) -> String {
    format!("parameter {count} is not a keyword of libpq (see the list of parameter key words in its documentation)")
}

/// `keyword=value keyword='va lue'`, with backslashes before what is to be taken as it is.
fn key_value(text: &str) -> Result<Values, String> {
    let mut values = Values::default();
    let mut rest = text.trim_start();
    let mut count = 0;
    while !rest.is_empty() {
        count += 1;
        let (keyword, after) = rest.split_once('=').ok_or_else(|| {
            format!("not a libpq URL or key/value string: parameter {count} has no `=` (postgres:// begins an URL)")
        })?;
        let (value, after) =
            value(after.trim_start()).ok_or_else(|| format!("parameter {count}: a quote is not closed"))?;
        if !values.set(keyword.trim_end(), value) {
            return Err(unknown(count));
        }
        rest = after.trim_start();
    }
    Ok(values)
}

/// One value and what follows it; `None` when its quote does not end.
fn value(text: &str) -> Option<(String, &str)> {
    let (quoted, text) = match text.strip_prefix('\'') {
        Some(inner) => (true, inner),
        None => (false, text),
    };
    let mut value = String::new();
    let mut letters = text.char_indices();
    while let Some((index, letter)) = letters.next() {
        match letter {
            '\\' => value.extend(letters.next().map(|(_, letter)| letter)),
            '\'' if quoted => return Some((value, text.get(index + 1..)?)),
            letter if !quoted && letter.is_ascii_whitespace() => return Some((value, text.get(index..)?)),
            letter => value.push(letter),
        }
    }
    (!quoted).then_some((value, ""))
}

/// `user:password@host:port,host:port/dbname?keyword=value&...`
fn url(rest: &str) -> Result<Values, String> {
    let mut values = Values::default();
    let (authority_and_path, query) =
        rest.split_once('?').map_or((rest, None), |(before, query)| (before, Some(query)));
    // Like libpq: a user's part ends at the first `@` before any `/`; a password may hold a `?`.
    let user_end = rest.find(['@', '/']).filter(|end| rest.get(*end..).is_some_and(|tail| tail.starts_with('@')));
    let (place, query) = match user_end {
        None => (authority_and_path, query),
        Some(end) => {
            let (who, place) = (rest.get(..end).unwrap_or_default(), rest.get(end + 1..).unwrap_or_default());
            let (user, password) = who.split_once(':').map_or((who, None), |(user, password)| (user, Some(password)));
            set_decoded(&mut values, "user", user)?;
            if let Some(password) = password {
                set_decoded(&mut values, "password", password)?;
            }
            place.split_once('?').map_or((place, None), |(place, query)| (place, Some(query)))
        }
    };
    let (hosts, database) = place.split_once('/').map_or((place, ""), |both| both);
    url_hosts(&mut values, hosts)?;
    set_decoded(&mut values, "dbname", database)?;
    // One that ends with `?` or `&` is taken by libpq.
    let query = query.map(|query| query.strip_suffix('&').unwrap_or(query)).filter(|query| !query.is_empty());
    for (index, parameter) in query.into_iter().flat_map(|query| query.split('&')).enumerate() {
        let (keyword, value) =
            parameter.split_once('=').ok_or_else(|| format!("URL parameter {} has no `=`", index + 1))?;
        match (decoded(keyword)?.as_str(), decoded(value)?) {
            ("ssl", value) if value == "true" => _ = values.set("sslmode", "require".to_owned()),
            (keyword, value) => {
                if !values.set(keyword, value) {
                    return Err(unknown(index + 1));
                }
            }
        }
    }
    Ok(values)
}

fn url_hosts(values: &mut Values, hosts: &str) -> Result<(), String> {
    let (mut names, mut ports) = (Vec::new(), Vec::new());
    for host in hosts.split(',') {
        let (name, port) = match host.strip_prefix('[').and_then(|inner| inner.split_once(']')) {
            Some((name, "")) => (name, ""),
            Some((name, port)) => {
                (name, port.strip_prefix(':').ok_or("an IPv6 address in the URL: `:` or `/` is needed after `]`")?)
            }
            None => host.split_once(':').unwrap_or((host, "")),
        };
        names.push(decoded(name)?);
        ports.push(decoded(port)?);
    }
    // Several hosts are several, also where none has a name: each is the default then.
    if names.len() > 1 || names.iter().any(|name| !name.is_empty()) {
        values.set("host", names.join(","));
    }
    if ports.iter().any(|port| !port.is_empty()) {
        values.set("port", ports.join(","));
    }
    Ok(())
}

fn set_decoded(values: &mut Values, keyword: &str, text: &str) -> Result<(), String> {
    if !text.is_empty() {
        values.set(keyword, decoded(text)?);
    }
    Ok(())
}

fn decoded(text: &str) -> Result<String, String> {
    let wrong = || "the URL holds a `%` without two hexadecimal digits behind it (a `%` itself is %25)".to_owned();
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|byte| char::from(byte).to_digit(16));
        let (high, low) = (digit().ok_or_else(wrong)?, digit().ok_or_else(wrong)?);
        bytes.push(u8::try_from(high * 16 + low).map_err(|_| wrong())?);
    }
    match String::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err("the URL holds bytes that are not UTF-8, or a %00".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none(_: &str) -> Option<String> {
        None
    }

    fn pairs(text: &str) -> Vec<(&'static str, String)> {
        read(text, &none).unwrap_or_else(|error| panic!("{text}: {error}")).0.into_iter().collect()
    }

    fn owned(pairs: &[(&'static str, &str)]) -> Vec<(&'static str, String)> {
        pairs.iter().map(|(name, value)| (*name, (*value).to_owned())).collect()
    }

    #[test]
    fn urls_are_read_as_in_the_documentation_of_libpq() {
        for (url, expected) in [
            ("postgresql://", &[][..]),
            ("postgresql://localhost:5433", &[("host", "localhost"), ("port", "5433")]),
            ("postgresql://localhost/mydb", &[("dbname", "mydb"), ("host", "localhost")]),
            ("postgresql://user:secret@localhost", &[("host", "localhost"), ("password", "secret"), ("user", "user")]),
            (
                "postgresql:///mydb?host=localhost&port=5433",
                &[("dbname", "mydb"), ("host", "localhost"), ("port", "5433")],
            ),
            ("postgresql://h/d?", &[("dbname", "d"), ("host", "h")]),
            ("postgresql://h/d?port=1&", &[("dbname", "d"), ("host", "h"), ("port", "1")]),
            ("postgresql://h?requiressl=1", &[("host", "h"), ("sslmode", "require")]),
            ("postgresql://h?requiressl=0", &[("host", "h"), ("sslmode", "prefer")]),
            ("postgresql://h1:123,h2:456/x", &[("dbname", "x"), ("host", "h1,h2"), ("port", "123,456")]),
            ("postgresql://h1,h2:456/x", &[("dbname", "x"), ("host", "h1,h2"), ("port", ",456")]),
            ("postgresql://:1,:2/x", &[("dbname", "x"), ("host", ","), ("port", "1,2")]),
            ("postgresql://:1/x", &[("dbname", "x"), ("port", "1")]),
            ("postgresql://[2001:db8::1234]/database", &[("dbname", "database"), ("host", "2001:db8::1234")]),
            ("postgresql://%2Fvar%2Flib/dbname", &[("dbname", "dbname"), ("host", "/var/lib")]),
            (
                "postgres://u:p%40s?s@h?ssl=true",
                &[("host", "h"), ("password", "p@s?s"), ("sslmode", "require"), ("user", "u")],
            ),
        ] {
            assert_eq!(pairs(url), owned(expected), "{url}");
        }
    }

    #[test]
    fn key_value_strings_know_quotes_and_backslashes() {
        let expected = owned(&[("dbname", ""), ("host", "a b"), ("password", r"it's\"), ("user", "u")]);
        assert_eq!(pairs(r"host = 'a b' password='it\'s\\' user=u dbname=''"), expected);
    }

    #[test]
    fn no_message_repeats_what_was_read() {
        for text in [
            "s3cret",
            "user=u s3cret",
            "user=u s3cret=1",
            "password='s3cret",
            "postgres://u:s3cret%zz@h",
            "postgres://u:p@h/d?s3cret=1",
            "postgres://u:p@h/d?s3cret",
            "postgres://u:s3c/ret@h",
            "postgres://[::1s3cret",
        ] {
            let message = read(text, &none).err().unwrap_or_default();
            assert!(!message.contains("s3c"), "{text}: {message}");
        }
    }

    #[test]
    fn what_the_string_says_beats_the_environment() {
        let variable = |name: &str| match name {
            "PGHOST" => Some("of_env".to_owned()),
            "PGUSER" => Some("of_env".to_owned()),
            _ => None,
        };
        let values = read("host=of_string", &variable).ok().unwrap();
        assert_eq!((values.get("host"), values.get("user")), (Some("of_string"), Some("of_env")));
    }
}
