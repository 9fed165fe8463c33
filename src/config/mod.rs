//! Flags, environment and file become settings, with all faults told at once and no network touched.
//!
//! Every key stands once, in [`KEYS`]. The trap: a misspelt key that is ignored is a default that nobody chose, so unknown
//! keys are faults, wherever they come from. No message repeats a value of a secret key.

mod example;
mod raw;
mod values;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use self::example::example;
use self::raw::Raw;
pub(crate) use self::raw::shown;
use self::values::{bytes, duration, exchange, name, qualified, queues, slot};
use crate::outbox::{ColumnNames, Mapping, Template};
use crate::pg;
use crate::pg::world::Names;
use crate::relay;
use crate::sink::rabbitmq;

/// One setting.
#[derive(Debug)]
pub struct Key {
    /// `section.key` in the file, `PGOUTBOX__SECTION__KEY` in the environment.
    pub name: &'static str,
    /// Used when nothing else says.
    pub default: &'static str,
    /// Printed as `***`, and can come from a file.
    pub is_secret: bool,
    /// For people.
    pub help: &'static str,
}

const fn key(name: &'static str, default: &'static str, help: &'static str) -> Key {
    Key { name, default, is_secret: false, help }
}

const fn secret(name: &'static str, help: &'static str) -> Key {
    Key { name, default: "", is_secret: true, help }
}

/// Every setting there is.
pub const KEYS: [Key; 29] = [
    secret("postgres.url", "libpq URL or key/value string; else DATABASE_URL, else libpq's defaults and PG* variables"),
    key("postgres.slot", "pgoutbox", "the logical replication slot"),
    key("postgres.publication", "pgoutbox", "the publication"),
    key("outbox.table", "public.outbox", "the outbox table"),
    key("outbox.columns.id", "", "the column's name; empty: `id`"),
    key("outbox.columns.aggregatetype", "", "the column's name; empty: `aggregatetype` or `aggregate_type`"),
    key("outbox.columns.aggregateid", "", "the column's name; empty: `aggregateid` or `aggregate_id`"),
    key("outbox.columns.type", "", "the column's name; empty: `type` or `event_type`"),
    key("outbox.columns.payload", "", "the column's name; empty: `payload`"),
    key("outbox.columns.headers", "", "the column's name; empty: `headers`, which may be missing"),
    key("outbox.columns.traceparent", "", "the column's name; empty: `traceparent`, which may be missing"),
    key("outbox.columns.tracestate", "", "the column's name; empty: `tracestate`, which may be missing"),
    key("sink", "rabbitmq", "`rabbitmq` or `stdout`"),
    secret("rabbitmq.url", "amqp:// or amqps:// URL, several with commas between; else AMQP_URL"),
    key("rabbitmq.tls_ca", "", "file with the authorities to trust for amqps://; else the system's"),
    key(
        "rabbitmq.tls_certificate",
        "",
        "file with our certificate for brokers that ask for one, and what leads to its authority",
    ),
    key("rabbitmq.tls_key", "", "file with its key"),
    key("rabbitmq.exchange", "outbox", "the exchange"),
    key("rabbitmq.declare", "true", "declare it as a durable topic exchange; `false`: only look that it exists"),
    key(
        "rabbitmq.queues",
        "",
        "queues that must be there before a session's first message, with commas between: each stream, and each queue on \
         one node of a cluster, that is bound beside other queues",
    ),
    key("rabbitmq.routing_key", "{aggregatetype}.{type}", "a template over the row's columns"),
    key("rabbitmq.window_messages", "1000", "messages published and not confirmed, at most"),
    key(
        "rabbitmq.window_messages_min",
        "16",
        "and at least: the window grows while the rate grows with it, and shrinks when only latency would; as large as \
         `window_messages`, it is fixed",
    ),
    key("rabbitmq.window_bytes", "4MiB", "their bytes, at most; a larger message goes alone"),
    key(
        "rabbitmq.message_bytes_max",
        "",
        "the broker's max_message_size; else its version's default, 16MiB since 4.0 and 128MiB before. A larger body stops \
         the relay",
    ),
    key("rabbitmq.confirm_timeout", "30s", "how long the broker may hold back a confirm of what it has in whole"),
    key("http.listen", "127.0.0.1:9190", "probes and metrics; empty: off"),
    key("run.drain_timeout", "25s", "how long a stop may wait for confirms"),
    key("run.give_up_after", "never", "how long a peer may stay away before exit 69"),
];

/// What a message is given to.
#[derive(Clone, Debug)]
pub enum SinkSettings {
    /// RabbitMQ.
    RabbitMq(rabbitmq::Settings),
    /// Standard output.
    Stdout,
}

/// Settings, proven to be possible.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where Postgres is.
    pub postgres: pg::Settings,
    /// What the relay depends on there.
    pub names: Names,
    /// How rows become messages.
    pub mapping: Mapping,
    /// Where they go; without an address when the verb needs no broker and none is named.
    pub sink: SinkSettings,
    /// The relay's limits.
    pub relay: relay::Settings,
    /// Where to listen.
    pub http: Option<SocketAddr>,
    printed: String,
}

/// What a verb needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Postgres and a broker.
    Both,
    /// Postgres.
    Postgres,
}

/// Everything that settings can come from.
#[derive(Debug, Default)]
pub struct Sources<'a> {
    /// `section.key=value`, from flags.
    pub flags: Vec<(String, String)>,
    /// The environment.
    pub environment: BTreeMap<String, String>,
    /// The file.
    pub file: Option<&'a Path>,
}

impl Config {
    /// Reads all sources.
    ///
    /// # Errors
    /// Every fault, each with the key's full name.
    pub fn load(sources: &Sources<'_>, needs: Needs) -> Result<Self, Vec<String>> {
        let mut raw = Raw::new(&sources.environment);
        raw.read_file(sources.file);
        raw.read_environment();
        raw.read_flags(&sources.flags);
        raw.check(needs)
    }

    /// The result, with secrets as `***`, as TOML.
    pub fn printed(&self) -> &str {
        &self.printed
    }
}

impl Raw<'_> {
    fn check(mut self, needs: Needs) -> Result<Config, Vec<String>> {
        self.ambient("postgres.url", "DATABASE_URL");
        self.ambient("rabbitmq.url", "AMQP_URL");
        let url = match self.text("postgres.url") {
            url if url.is_empty() => "postgres://".to_owned(),
            url => url,
        };
        let environment = self.environment;
        let postgres = pg::Settings::parse(&url, |name| environment.get(name).cloned())
            .map_err(|problem| self.fault(format!("postgres.url: {problem}")))
            .ok();
        let slot = self.parsed("postgres.slot", String::new(), slot);
        let publication = self.parsed("postgres.publication", String::new(), name);
        let (schema, table) = self.parsed("outbox.table", Default::default(), qualified);
        let names = Names { slot, publication, schema, table };
        let destination = self.parsed("rabbitmq.routing_key", None, |text| text.parse::<Template>().map(Some));
        let sink = self.sink(needs);
        let relay = self.relay();
        let http = self.parsed("http.listen", None, |text| match text {
            "" => Ok(None),
            text => {
                text.parse().map(Some).map_err(|_| "an address and port such as 127.0.0.1:9190 is needed".to_owned())
            }
        });
        let columns = self.columns();
        let printed = self.print();
        match (postgres, destination) {
            (Some(postgres), Some(destination)) if self.faults.is_empty() => {
                let mapping = Mapping { table: names.qualified(), columns, destination };
                Ok(Config { postgres, names, mapping, sink, relay, http, printed })
            }
            _ => Err(self.faults),
        }
    }

    fn columns(&self) -> ColumnNames {
        let column = |role: &str| self.optional(&format!("outbox.columns.{role}"));
        ColumnNames {
            id: column("id"),
            aggregatetype: column("aggregatetype"),
            aggregateid: column("aggregateid"),
            kind: column("type"),
            payload: column("payload"),
            headers: column("headers"),
            traceparent: column("traceparent"),
            tracestate: column("tracestate"),
        }
    }

    fn sink(&mut self, needs: Needs) -> SinkSettings {
        let is_stdout = match self.text("sink").as_str() {
            "stdout" => true,
            "rabbitmq" => false,
            _ => {
                self.fault("sink: `rabbitmq` or `stdout` is needed".to_owned());
                false
            }
        };
        let exchange = self.parsed("rabbitmq.exchange", String::new(), exchange);
        let declare = self.parsed("rabbitmq.declare", true, |text| {
            text.parse().map_err(|_| "`true` or `false` is needed".to_owned())
        });
        let queues = self.parsed("rabbitmq.queues", Vec::new(), queues);
        // 0: only the broker's version tells.
        let message_bytes_max = self
            .parsed("rabbitmq.message_bytes_max", 0, |text| if text.is_empty() { Ok(0) } else { bytes(text, 1 << 29) });
        let url = self.optional("rabbitmq.url");
        if url.is_none() && needs == Needs::Both && !is_stdout {
            self.fault(
                "rabbitmq.url: none is set; set it, or AMQP_URL, or `sink = \"stdout\"` to try without a broker"
                    .to_owned(),
            );
        }
        let addresses = url.map(|url| self.addresses(&url)).unwrap_or_default();
        // Only now: what is set wrong is told, whether it is used or not.
        if is_stdout {
            return SinkSettings::Stdout;
        }
        SinkSettings::RabbitMq(rabbitmq::Settings { addresses, exchange, declare, queues, message_bytes_max })
    }

    fn addresses(&mut self, urls: &str) -> Vec<rabbitmq::Address> {
        let file = |raw: &Self, name: &str| raw.optional(name).map(PathBuf::from);
        let [roots, certificate, key] =
            ["rabbitmq.tls_ca", "rabbitmq.tls_certificate", "rabbitmq.tls_key"].map(|name| file(self, name));
        if certificate.is_some() != key.is_some() {
            self.fault(
                "rabbitmq.tls_certificate: it goes together with rabbitmq.tls_key; set both, or none".to_owned(),
            );
        }
        let files = rabbitmq::Files { roots, certificate, key };
        match rabbitmq::Address::parse_all(urls, &files) {
            Ok(addresses) => {
                if !files.is_empty() && !addresses.iter().any(rabbitmq::Address::is_tls) {
                    self.fault(
                        "rabbitmq.tls_ca, tls_certificate, tls_key: rabbitmq.url says amqp://, which is without \
                                TLS; say amqps://, or leave them out"
                            .to_owned(),
                    );
                }
                addresses
            }
            Err(faults) => {
                faults.into_iter().for_each(|fault| self.fault(format!("rabbitmq.url: {fault}")));
                Vec::new()
            }
        }
    }

    fn relay(&mut self) -> relay::Settings {
        let window_messages = self.parsed("rabbitmq.window_messages", 1, |text| match text.parse::<usize>() {
            // Beyond what fills the pipe a window buys only latency, memory and duplicates.
            Ok(count) if (1..=100_000).contains(&count) => Ok(count),
            _ => Err("a number from 1 to 100000 is needed".to_owned()),
        });
        let window_messages_min = self.parsed("rabbitmq.window_messages_min", 1, |text| match text.parse::<usize>() {
            Ok(count) if count >= 1 => Ok(count),
            _ => Err("a number from 1 is needed".to_owned()),
        });
        if window_messages_min > window_messages && self.is_set("rabbitmq.window_messages_min") {
            self.fault(format!(
                "rabbitmq.window_messages_min: {window_messages_min} is more than rabbitmq.window_messages = \
                 {window_messages}"
            ));
        }
        let window_bytes = self.parsed("rabbitmq.window_bytes", 1, |text| bytes(text, 1 << 30));
        let second = Duration::from_secs(1);
        relay::Settings {
            window_messages,
            // The least is for small machines as good as for large ones; the most is what somebody chose.
            window_messages_min: window_messages_min.min(window_messages),
            window_bytes: usize::try_from(window_bytes).unwrap_or(usize::MAX),
            confirm_timeout: self.parsed("rabbitmq.confirm_timeout", second, |text| match duration(text)? {
                short if short < second => Err("at least 1s is needed: no broker confirms at once".to_owned()),
                long => Ok(long),
            }),
            drain_timeout: self.parsed("run.drain_timeout", second, duration),
            give_up_after: self.parsed("run.give_up_after", None, |text| match text {
                "never" => Ok(None),
                text => duration(text).map(Some),
            }),
        }
    }

    fn print(&self) -> String {
        let mut text = String::new();
        for key in &KEYS {
            let value = match self.text(key.name) {
                value if key.is_secret && !value.is_empty() => "***".to_owned(),
                value => value,
            };
            text.push_str(&format!("{} = {}\n", key.name, toml::Value::from(value)));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn load(env: &[(&str, &str)], file: Option<&Path>, flags: &[(&str, &str)]) -> Result<Config, Vec<String>> {
        let flags = flags.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Config::load(&Sources { flags, environment: environment(env), file }, Needs::Both)
    }

    const URLS: [(&str, &str); 2] = [("DATABASE_URL", "postgres://u@h/d"), ("AMQP_URL", "amqp://h")];

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn defaults_are_those_of_the_contract() {
        let config = load(&URLS, None, &[]).unwrap();
        assert_eq!((config.names.slot.as_str(), config.names.publication.as_str()), ("pgoutbox", "pgoutbox"));
        assert_eq!(config.names.qualified(), "public.outbox");
        assert_eq!(config.http, Some("127.0.0.1:9190".parse().unwrap()));
        let SinkSettings::RabbitMq(rabbitmq) = config.sink else { panic!("not rabbitmq") };
        assert_eq!((rabbitmq.exchange.as_str(), rabbitmq.declare), ("outbox", true));
        assert_eq!(config.relay.give_up_after, None);
    }

    #[test]
    fn a_flag_beats_the_environment_beats_the_file_beats_the_default() {
        let file = file("[postgres]\nslot = \"of_file\"\n[rabbitmq]\nexchange = \"of_file\"\nwindow_messages = 7\n");
        let env =
            [URLS[0], URLS[1], ("PGOUTBOX__POSTGRES__SLOT", "of_env"), ("PGOUTBOX__RABBITMQ__EXCHANGE", "of_env")];
        let config = load(&env, Some(file.path()), &[("postgres.slot", "of_flag")]).unwrap();
        assert_eq!(config.names.slot, "of_flag");
        assert_eq!(config.relay.window_messages, 7);
        let SinkSettings::RabbitMq(rabbitmq) = config.sink else { panic!("not rabbitmq") };
        assert_eq!(rabbitmq.exchange, "of_env");
    }

    #[test]
    fn all_faults_are_told_at_once_with_the_full_name_of_the_key() {
        let file = file(
            "sinc = \"x\"\n[postgres]\nslot = \"Not Legal\"\n[rabbitmq]\nwindow_bytes = \"8 apples\"\ndeclare = 7\n",
        );
        let env = [
            ("PGOUTBOX__HTTP__LISTEN", "nowhere"),
            ("PGOUTBOX__OUTBOX__COLUMS__ID", "x"),
            ("DATABASE_URL", "nonsense s3cret"),
        ];
        let faults = load(&env, Some(file.path()), &[("run.drain_timeout", "soon")]).unwrap_err();
        for name in [
            "sinc: unknown key",
            "did you mean sink?",
            "postgres.slot:",
            "rabbitmq.window_bytes:",
            "rabbitmq.declare:",
            "http.listen:",
            "outbox.colums.id: unknown key",
            "run.drain_timeout:",
            "postgres.url:",
            "rabbitmq.url:",
        ] {
            assert!(faults.iter().any(|fault| fault.contains(name)), "{name} in {faults:?}");
        }
        assert!(!faults.iter().any(|fault| fault.contains("s3cret")), "{faults:?}");
    }

    #[test]
    fn secrets_come_from_files_and_are_never_printed() {
        let secret = file("amqp://user:s3cret@h\n");
        let path = secret.path().to_str().unwrap();
        let named = file(&format!("[rabbitmq]\nurl_file = \"{path}\"\n"));
        for loaded in [
            load(&[URLS[0], ("PGOUTBOX__RABBITMQ__URL_FILE", path)], None, &[]),
            load(&[URLS[0], ("AMQP_URL_FILE", path)], None, &[]),
            load(&URLS[..1], Some(named.path()), &[]),
            load(&URLS[..1], None, &[("rabbitmq.url_file", path)]),
        ] {
            let config = loaded.unwrap();
            let SinkSettings::RabbitMq(rabbitmq) = &config.sink else { panic!("not rabbitmq") };
            assert_eq!(rabbitmq.addresses[0].password, "s3cret");
            assert!(config.printed().contains("rabbitmq.url = \"***\""), "{}", config.printed());
            assert!(!format!("{config:?}{}", config.printed()).contains("s3cret"));
        }
        assert!(load(&[URLS[0], ("AMQP_URL_FILE", "/does/not/exist")], None, &[]).is_err());
    }

    #[test]
    fn whatever_stands_where_the_file_of_a_secret_is_asked_for_is_repeated_only_when_it_can_be_a_path() {
        for value in ["host=db user=u password=s3cret", "password=s3cret", "s3cret db", "postgres://u:s3cret@h/d"] {
            for (env, flags) in [
                (&[URLS[1], ("DATABASE_URL_FILE", value)][..], &[][..]),
                (&[URLS[1], ("PGOUTBOX__POSTGRES__URL_FILE", value)], &[]),
                (&[URLS[1]], &[("postgres.url_file", value)]),
            ] {
                let faults = load(env, None, flags).unwrap_err();
                assert!(faults[0].starts_with("postgres.url_file: the name of a file is needed"), "{faults:?}");
                assert!(!faults.concat().contains("s3cret"), "{faults:?}");
            }
        }
        let faults = load(&[URLS[1], ("DATABASE_URL_FILE", "/does/not/exist")], None, &[]).unwrap_err();
        assert!(faults[0].starts_with("postgres.url_file: /does/not/exist: No such file"), "{faults:?}");
    }

    #[test]
    fn an_unknown_key_is_repeated_only_as_far_as_it_can_be_one() {
        let mistaken = "postgres.url:postgres://u:s3cret@h/d?sslmode";
        let of_file = file(&format!("\"{mistaken}\" = \"require\"\n[rabbitmq]\n\"url:amqp://u:s3cret@h\" = 1.5\n"));
        for (file, flags) in [(None, &[(mistaken, "require")][..]), (Some(of_file.path()), &[])] {
            let faults = load(&URLS, file, flags).unwrap_err();
            assert!(faults.iter().any(|fault| fault.starts_with("postgres.url...: unknown key")), "{faults:?}");
            assert!(!faults.concat().contains("s3cret"), "{faults:?}");
        }
    }

    #[test]
    fn a_part_of_a_secret_that_looks_like_a_variable_is_not_named() {
        let url = "\"postgres://u:${s3cret}@h/d\"";
        let file = file(&format!("[postgres]\nurl = {url}\nurll = {url}\nslot = \"${{abc}}\"\n"));
        let faults = load(&[URLS[1]], Some(file.path()), &[]).unwrap_err();
        assert!(!faults.concat().contains("s3cret"), "{faults:?}");
        for part in ["postgres.url: a variable that it names by `${...}` is not set", "%24{", "abc is not set"] {
            assert!(faults.iter().any(|fault| fault.contains(part)), "{part} in {faults:?}");
        }
    }

    #[test]
    fn settings_with_which_nothing_could_settle_are_refused() {
        for (key, value, problem) in [
            ("rabbitmq.confirm_timeout", "0s", "at least 1s"),
            ("rabbitmq.confirm_timeout", "999ms", "at least 1s"),
            ("rabbitmq.window_messages_min", "1001", "1001 is more than rabbitmq.window_messages = 1000"),
        ] {
            let faults = load(&URLS, None, &[(key, value)]).unwrap_err();
            assert!(faults.len() == 1 && faults[0].contains(problem), "{faults:?}");
        }
        assert!(load(&URLS, None, &[("rabbitmq.confirm_timeout", "1s"), ("rabbitmq.window_messages", "1")]).is_ok());
    }

    #[test]
    fn the_url_of_postgres_comes_from_a_file_as_well() {
        let secret = file("postgres://u:s3cret@of-file/d\n");
        let path = secret.path().to_str().unwrap();
        for name in ["PGOUTBOX__POSTGRES__URL_FILE", "DATABASE_URL_FILE"] {
            let config = load(&[URLS[1], (name, path)], None, &[]).unwrap();
            assert!(format!("{:?}", config.postgres).contains("of-file"), "{:?}", config.postgres);
            assert!(config.printed().contains("postgres.url = \"***\""), "{}", config.printed());
            assert!(!format!("{config:?}{}", config.printed()).contains("s3cret"));
        }
    }

    #[test]
    fn an_empty_variable_is_one_that_nobody_set() {
        let secret = file("amqp://of-file\n");
        let path = secret.path().to_str().unwrap();
        let env = [URLS[0], ("PGOUTBOX__RABBITMQ__URL", ""), ("AMQP_URL", ""), ("AMQP_URL_FILE", path)];
        let config = load(&env, None, &[]).unwrap();
        let SinkSettings::RabbitMq(rabbitmq) = &config.sink else { panic!("not rabbitmq") };
        assert_eq!(rabbitmq.addresses[0].host, "of-file");
    }

    #[test]
    fn an_empty_url_takes_the_place_of_no_other_one() {
        let secret = file("postgres://of-file/d");
        let path = secret.path().to_str().unwrap();
        let (url, url_file) = ("PGOUTBOX__POSTGRES__URL", "PGOUTBOX__POSTGRES__URL_FILE");
        for text in [
            "[postgres]\nurl = \"postgres://of-file/d\"\n".to_owned(),
            format!("[postgres]\nurl = \"\"\nurl_file = \"{path}\"\n"),
        ] {
            let file = file(&text);
            let config =
                load(&[URLS[1], (url, ""), (url_file, "")], Some(file.path()), &[("postgres.url", "")]).unwrap();
            assert!(format!("{:?}", config.postgres).contains("of-file"), "{:?}", config.postgres);
        }
        assert!(load(&[URLS[1], (url, ""), ("DATABASE_URL_FILE", "")], None, &[]).is_ok());
        // A text that is empty says something in other keys.
        let env = [URLS[0], URLS[1], ("PGOUTBOX__HTTP__LISTEN", "")];
        assert_eq!(load(&env, None, &[]).unwrap().http, None);
    }

    #[test]
    fn a_file_that_should_hold_a_url_and_is_empty_is_a_fault() {
        let empty = file(" \n");
        let path = empty.path().to_str().unwrap();
        for name in ["DATABASE_URL_FILE", "PGOUTBOX__POSTGRES__URL_FILE"] {
            let faults = load(&[URLS[1], (name, path)], None, &[]).unwrap_err();
            assert_eq!(faults, [format!("postgres.url_file: {path}: it is empty, and should hold the URL")]);
        }
    }

    #[test]
    fn a_url_and_its_file_at_one_level_contradict_each_other() {
        let secret = file("postgres://of-file/d");
        let path = secret.path().to_str().unwrap();
        let both = file(&format!("[postgres]\nurl = \"postgres://h/d\"\nurl_file = \"{path}\"\n"));
        let (url, url_file) = ("PGOUTBOX__POSTGRES__URL", "PGOUTBOX__POSTGRES__URL_FILE");
        for (env, file, flags) in [
            (&[URLS[1]][..], Some(both.path()), &[][..]),
            (&[URLS[1], (url, "postgres://h/d"), (url_file, path)], None, &[]),
            (&[URLS[1]], None, &[("postgres.url_file", path), ("postgres.url", "postgres://h/d")]),
            (&[URLS[0], URLS[1], ("DATABASE_URL_FILE", path)], None, &[]),
        ] {
            let faults = load(env, file, flags).unwrap_err();
            assert!(faults.len() == 1 && faults[0].contains("set one of the two"), "{faults:?}");
        }
        // Of two levels the higher one counts.
        let config = load(&[URLS[0], URLS[1], (url_file, path)], None, &[]).unwrap();
        assert!(format!("{:?}", config.postgres).contains("of-file"), "{:?}", config.postgres);
        let config = load(&[URLS[1], (url, "postgres://higher/d")], None, &[]);
        assert!(format!("{:?}", config.unwrap().postgres).contains("higher"));
    }

    #[test]
    fn what_is_set_for_a_broker_is_looked_at_where_none_is_needed() {
        let stdout = ("sink", "stdout");
        assert!(matches!(load(&URLS[..1], None, &[stdout]).unwrap().sink, SinkSettings::Stdout));
        for (key, value) in [
            ("rabbitmq.declare", "maybe"),
            ("rabbitmq.queues", ","),
            ("rabbitmq.exchange", ""),
            ("rabbitmq.message_bytes_max", "much"),
            ("rabbitmq.url", "http://h"),
        ] {
            let faults = load(&URLS[..1], None, &[stdout, (key, value)]).unwrap_err();
            assert!(faults.len() == 1 && faults[0].starts_with(key), "{faults:?}");
        }
    }

    #[test]
    fn variables_are_filled_into_the_file() {
        let file = file("[rabbitmq]\nurl = \"amqp://user:${SECRET}@h\"\n");
        let config = load(&[URLS[0], ("SECRET", "s3cret")], Some(file.path()), &[]).unwrap();
        let SinkSettings::RabbitMq(rabbitmq) = &config.sink else { panic!("not rabbitmq") };
        assert_eq!(rabbitmq.addresses[0].password, "s3cret");
        let faults = load(&[URLS[0]], Some(file.path()), &[]).unwrap_err();
        assert!(faults[0].starts_with("rabbitmq.url: a variable that it names by"), "{faults:?}");
    }

    #[test]
    fn there_is_no_way_to_the_default_exchange() {
        assert!(load(&URLS, None, &[("rabbitmq.exchange", "")]).is_err());
    }
}
