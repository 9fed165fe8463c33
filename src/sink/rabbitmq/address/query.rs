//! What stands behind the `?` of an `amqp://` URL, with the names of RabbitMQ's page of query parameters. Pure.
//!
//! The trap: a parameter that is ignored is a wish that nobody hears: `verify`, misspelt, verifies nobody elsewhere. So what
//! is not known is a fault, and so is what would have no effect.

use std::fmt;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

use super::{Files, Mechanism, ServerName, Tls, decoded, is_host_name};
use crate::tls::File;

/// The least that AMQP 0-9-1 lets a peer ask for, and far more than any broker gives.
const FRAME_BYTES: RangeInclusive<u32> = 4096..=128 * 1024 * 1024;

/// Parameters that this program knows.
const PARAMETERS: [&str; 10] = [
    "auth_mechanism",
    "cacertfile",
    "certfile",
    "channel_max",
    "connection_timeout",
    "frame_max",
    "heartbeat",
    "keyfile",
    "server_name_indication",
    "verify",
];

/// Of those only TLS has.
const OF_TLS: [&str; 5] = ["cacertfile", "certfile", "keyfile", "server_name_indication", "verify"];

/// Parameters of other clients, and what to do instead.
const ELSEWHERE: [(&str, &str); 4] = [
    ("password", "a key with a passphrase is not supported: write it to a file without one (openssl pkey)"),
    ("fail_if_no_peer_cert", "leave it out, only servers have it; verify=verify_peer is the default"),
    ("depth", "leave it out, chains of any usual length are taken"),
    ("customize_hostname_check", "leave it out, a star in a certificate's name stands for one label"),
];

/// What stands behind the `?`, decoded.
pub(super) struct Query(Vec<(&'static str, String)>);

impl Query {
    pub(super) fn read(text: &str) -> Result<Self, String> {
        let mut pairs: Vec<(&'static str, String)> = Vec::new();
        for (index, pair) in text.split('&').enumerate().filter(|_| !text.is_empty()) {
            let (name, value) =
                pair.split_once('=').ok_or_else(|| format!("URL parameter {} has no `=`", index + 1))?;
            let Some(known) = PARAMETERS.iter().find(|known| **known == name) else {
                return Err(unknown(name, index + 1));
            };
            if *known != "auth_mechanism" && pairs.iter().any(|(before, _)| before == known) {
                return Err(format!("{known} stands in it twice"));
            }
            pairs.push((known, decoded(value, known)?));
        }
        Ok(Self(pairs))
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| *known == name).map(|(_, value)| value.as_str())
    }

    pub(super) fn number<T>(&self, name: &str, range: RangeInclusive<T>) -> Result<Option<T>, String>
    where
        T: FromStr + PartialOrd + fmt::Display,
    {
        let Some(text) = self.get(name) else { return Ok(None) };
        let is_number = !text.is_empty() && text.bytes().all(|digit| digit.is_ascii_digit());
        let number = text.parse().ok().filter(|number| is_number && range.contains(number));
        let wrong = || format!("{name}: a whole number from {} to {} is needed", range.start(), range.end());
        number.map(Some).ok_or_else(wrong)
    }

    pub(super) fn frame_max(&self) -> Result<Option<u32>, String> {
        if self.get("frame_max") == Some("0") { Ok(Some(0)) } else { self.number("frame_max", FRAME_BYTES) }
    }

    pub(super) fn mechanisms(&self) -> Result<Vec<Mechanism>, String> {
        const KNOWN: [Mechanism; 3] = [Mechanism::Plain, Mechanism::Amqplain, Mechanism::External];
        let mut mechanisms = Vec::new();
        for (_, value) in self.0.iter().filter(|(name, _)| *name == "auth_mechanism") {
            let found = KNOWN.iter().find(|mechanism| mechanism.name().eq_ignore_ascii_case(value));
            let wrong = "auth_mechanism: plain, amqplain or external is needed; several are several parameters";
            mechanisms.push(*found.ok_or(wrong)?);
        }
        // What RabbitMQ's own client does.
        Ok(if mechanisms.is_empty() { vec![Mechanism::Plain, Mechanism::Amqplain] } else { mechanisms })
    }

    fn file(&self, name: &'static str) -> Result<Option<File>, String> {
        match self.get(name) {
            Some("") => Err(format!("{name}: a file is needed")),
            path => Ok(path.map(|path| File::new(path, name))),
        }
    }

    pub(super) fn no_tls(&self) -> Result<(), String> {
        match OF_TLS.iter().find(|name| self.get(name).is_some()) {
            Some(name) => Err(format!("{name} is of TLS, and amqp:// has none. Remedy: say amqps://, or leave it out")),
            None => Ok(()),
        }
    }

    pub(super) fn tls(&self, files: &Files) -> Result<Tls, String> {
        let verifies = match self.get("verify") {
            None | Some("verify_peer") => true,
            Some("verify_none") => false,
            Some(_) => return Err("verify: verify_peer or verify_none is needed".to_owned()),
        };
        let server_name = match self.get("server_name_indication") {
            None => ServerName::Host,
            Some("disable") => ServerName::Disable,
            Some(name) if !name.is_empty() && is_host_name(name) => ServerName::Other(name.to_owned()),
            Some(_) => return Err("server_name_indication: a host's name, or disable, is needed".to_owned()),
        };
        let setting = |path: &Option<PathBuf>, setting| path.clone().map(|path| File::new(path, setting));
        let roots = self.file("cacertfile")?.or_else(|| setting(&files.roots, "rabbitmq.tls_ca"));
        let identity = match (self.file("certfile")?, self.file("keyfile")?) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => {
                setting(&files.certificate, "rabbitmq.tls_certificate").zip(setting(&files.key, "rabbitmq.tls_key"))
            }
            _ => {
                return Err(
                    "certfile and keyfile go together. Remedy: name both, the same file where it holds both".to_owned()
                );
            }
        };
        if verifies && server_name == ServerName::Disable && roots.is_none() {
            return Err(
                "server_name_indication=disable compares no name, and the system's authorities give everybody a \
                        certificate. Remedy: name the authority in cacertfile or rabbitmq.tls_ca, or the name that the \
                        broker's certificate has in server_name_indication"
                    .to_owned(),
            );
        }
        Ok(Tls { roots, identity, verifies, server_name })
    }
}

fn unknown(name: &str, position: usize) -> String {
    let is_name = name.len() <= 40 && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    let shown = if is_name && !name.is_empty() { name.to_owned() } else { format!("parameter {position}") };
    match ELSEWHERE.iter().find(|(elsewhere, _)| *elsewhere == name) {
        Some((_, remedy)) => format!("{shown} is not supported. Remedy: {remedy}"),
        None => format!("{shown} is unknown. Remedy: leave it out; known are {}", PARAMETERS.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::Address;
    use super::*;

    fn parse(url: &str) -> Result<Address, String> {
        Address::parse(url, &Files::default())
    }

    #[test]
    fn parameters_are_read_as_rabbitmqs_page_names_them() {
        let found = parse(
            "amqp://h?heartbeat=5&connection_timeout=10000&channel_max=1&frame_max=4096&auth_mechanism=amqplain&\
             auth_mechanism=PLAIN",
        )
        .unwrap();
        assert_eq!((found.heartbeat, found.frame_max), (Some(5), Some(4096)));
        assert_eq!(found.connection_timeout, Some(Duration::from_secs(10)));
        assert_eq!(found.mechanisms, [Mechanism::Amqplain, Mechanism::Plain]);
        let defaults = parse("amqp://h").unwrap();
        assert_eq!((defaults.heartbeat, defaults.frame_max, defaults.connection_timeout), (None, None, None));
        assert_eq!(defaults.mechanisms, [Mechanism::Plain, Mechanism::Amqplain]);
        assert_eq!(parse("amqp://h?heartbeat=0&frame_max=0").unwrap().frame_max, Some(0));
        let found = parse(
            "amqps://h?cacertfile=/a%20b/ca+1.pem&certfile=/c.pem&keyfile=/k.pem&verify=verify_none&\
             server_name_indication=other&auth_mechanism=external",
        )
        .unwrap();
        let file = |path: &str, setting| File::new(path, setting);
        let expected = Tls {
            roots: Some(file("/a b/ca+1.pem", "cacertfile")),
            identity: Some((file("/c.pem", "certfile"), file("/k.pem", "keyfile"))),
            verifies: false,
            server_name: ServerName::Other("other".to_owned()),
        };
        assert_eq!((found.tls, found.mechanisms), (Some(expected), vec![Mechanism::External]));
        let found = parse("amqps://h?server_name_indication=disable&cacertfile=/ca&verify=verify_peer").unwrap();
        assert_eq!(found.tls.map(|tls| (tls.verifies, tls.server_name)), Some((true, ServerName::Disable)));
    }

    #[test]
    fn what_would_be_ignored_is_refused_by_its_name() {
        for (url, part) in [
            ("amqp://h?vhost=x", "vhost is unknown. Remedy: leave it out; known are auth_mechanism, "),
            ("amqp://h?HEARTBEAT=5", "parameter 1 is unknown"),
            ("amqp://h?heartbeat=5&s3cret%20=x", "parameter 2 is unknown"),
            ("amqp://h?=x", "parameter 1 is unknown"),
            ("amqp://h?heartbeat", "parameter 1 has no `=`"),
            ("amqp://h?heartbeat=5&", "parameter 2 has no `=`"),
            ("amqp://h?heartbeat=5&heartbeat=6", "heartbeat stands in it twice"),
            ("amqp://h?heartbeat=", "heartbeat: a whole number from 0 to 65535"),
            ("amqp://h?heartbeat=65536", "heartbeat: a whole number"),
            ("amqp://h?heartbeat=-1", "heartbeat: a whole number"),
            ("amqp://h?heartbeat=+1", "heartbeat: a whole number"),
            ("amqp://h?connection_timeout=0", "connection_timeout: a whole number from 1"),
            ("amqp://h?channel_max=0", "channel_max: a whole number from 1"),
            ("amqp://h?frame_max=4095", "frame_max: a whole number from 4096"),
            ("amqp://h?frame_max=134217729", "frame_max: a whole number"),
            ("amqp://h?auth_mechanism=crdemo", "auth_mechanism: plain, amqplain or external"),
            ("amqp://h?auth_mechanism=plain,external", "several are several parameters"),
            ("amqps://h?verify=none", "verify: verify_peer or verify_none"),
            ("amqps://h?verify=VERIFY_PEER", "verify: verify_peer or verify_none"),
            ("amqps://h?server_name_indication=", "server_name_indication: a host's name, or disable"),
            ("amqps://h?server_name_indication=a%20b", "server_name_indication: a host's name"),
            ("amqps://h?cacertfile=", "cacertfile: a file is needed"),
            ("amqps://h?certfile=/c", "certfile and keyfile go together"),
            ("amqps://h?keyfile=/k", "certfile and keyfile go together"),
            ("amqps://h?server_name_indication=disable", "compares no name"),
            ("amqps://h?auth_mechanism=external", "a login by client certificate. Remedy: "),
            ("amqp://h?auth_mechanism=external", "say amqps://"),
            ("amqps://h?password=s3cret", "password is not supported. Remedy: "),
            ("amqps://h?fail_if_no_peer_cert=true", "only servers have it"),
            ("amqp://h?verify=verify_peer", "verify is of TLS, and amqp:// has none. Remedy: say amqps://"),
            ("amqp://h?cacertfile=/ca", "cacertfile is of TLS"),
        ] {
            let fault = parse(url).err().unwrap_or_else(|| panic!("{url} is taken"));
            assert!(fault.contains(part) && !fault.contains("s3cret"), "{url}: {fault}");
        }
    }

    #[test]
    fn the_settings_files_are_for_urls_that_name_none() {
        let path = |name: &str| Some(PathBuf::from(name));
        let files = Files { roots: path("/ca"), certificate: path("/c"), key: path("/k") };
        let tls = |url: &str| Address::parse(url, &files).unwrap().tls.unwrap();
        let names = |tls: Tls| {
            let (certificate, key) = tls.identity.unwrap();
            [tls.roots.unwrap(), certificate, key].map(|file| format!("{} {}", file.setting, file.path.display()))
        };
        let settings = ["rabbitmq.tls_ca /ca", "rabbitmq.tls_certificate /c", "rabbitmq.tls_key /k"];
        assert_eq!(names(tls("amqps://h")), settings);
        let own = ["cacertfile /1", "certfile /2", "keyfile /3"];
        assert_eq!(names(tls("amqps://h?cacertfile=/1&certfile=/2&keyfile=/3")), own);
        assert!(Address::parse("amqps://h?auth_mechanism=external", &files).is_ok());
        assert!(Address::parse("amqps://me@h?auth_mechanism=external", &files).is_ok());
        assert!(Address::parse("amqps://me@h?auth_mechanism=external&auth_mechanism=plain", &files).is_err());
    }
}
