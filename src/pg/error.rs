//! What can go wrong with Postgres, and what each says about trying again.
//!
//! The trap: a walsender that gives up on a silent client says nothing, it just closes (`COMMERROR`), and SQLSTATE 55000
//! has many causes. So a bare close is `Later`, and a state error is settled by looking at the catalog in the next session.

use std::fmt;
use std::io;
use std::time::Duration;

use bytes::{Buf, Bytes};

use super::pgoutput;
use crate::retry::Retry;

/// Why a session with Postgres ended or did not begin.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection to the host.
    #[error("cannot reach Postgres at {host}")]
    Unreachable {
        /// Host and port, or the socket's path.
        host: String,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The peer took longer than it may.
    #[error("Postgres did not answer within {after:?} ({during})")]
    Timeout {
        /// What was awaited.
        during: &'static str,
        /// The limit.
        after: Duration,
    },
    /// The connection broke.
    #[error("the connection to Postgres broke")]
    Broken(#[source] io::Error),
    /// The server closed the stream: it stops, or it gave up on us.
    #[error("Postgres closed the connection")]
    Closed,
    /// The server is shutting down or went away; seen on the control connection.
    #[error("Postgres is going away: {0}")]
    GoingAway(String),
    /// An `ErrorResponse`.
    #[error("Postgres refused: {0}")]
    Server(ServerError),
    /// PostgreSQL 18 and later skip the rows of a publication that was missing, with a mere warning.
    #[error(
        "Postgres skips rows: {0}. The publication did not exist for a part of the write-ahead log that is still to be \
         read; its rows are in the table but not in the stream. Remedy: reconcile from the table, then drop the slot and \
         run `pgoutbox init`"
    )]
    PublicationSkipped(ServerError),
    /// Control SQL failed without an answer from the server.
    #[error("a query on Postgres failed")]
    Sql(#[source] tokio_postgres::Error),
    /// An `ErrorResponse` before the session began.
    #[error("Postgres at {} refused {attempt}: {}. Remedy: {}", attempt.host, error.plain(), login_remedy(attempt, error))]
    Refused {
        /// Who tried what.
        attempt: Box<Attempt>,
        /// What the server said.
        error: ServerError,
    },
    /// We refuse what the server asks for, or have no answer to it.
    #[error("cannot log in to Postgres at {} as {attempt}: {problem}", attempt.host)]
    Login {
        /// Who tried what.
        attempt: Box<Attempt>,
        /// What is in the way, with a remedy.
        problem: String,
    },
    /// No TLS as it is asked for.
    #[error("no TLS with Postgres at {host}: {problem}")]
    Tls {
        /// Host and port.
        host: String,
        /// What is in the way, with a remedy where there is one.
        problem: String,
    },
    /// None of several hosts would do.
    #[error("no host of {} will do: {}", .0.len(), .0.join("; "))]
    Hosts(Vec<String>),
    /// Bytes that the protocol does not allow.
    #[error("unexpected bytes from Postgres: {0}")]
    Protocol(String),
    /// A change in the stream that is not pgoutput.
    #[error("unexpected bytes from Postgres")]
    Decode(#[from] pgoutput::Error),
    /// The world is set up wrong, proven by the catalog.
    #[error("{}", list(.0))]
    World(Vec<Finding>),
    /// The server cannot serve us yet.
    #[error("{0}")]
    NotNow(String),
}

/// Who tries to log in, and where; for messages.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// Where.
    pub host: String,
    /// The role.
    pub user: String,
    /// The database.
    pub database: String,
    /// Whether TLS is spoken.
    pub is_encrypted: bool,
    /// Where the password came from, when one was asked for.
    pub password_from: Option<String>,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "role {}, database {}", self.user, self.database)
    }
}

/// What to do about a refused login, as exactly as the server's words allow.
fn login_remedy(attempt: &Attempt, error: &ServerError) -> String {
    let Attempt { user, database, is_encrypted, password_from, .. } = attempt;
    match error.code() {
        "28P01" => {
            let from = password_from.as_deref().filter(|from| *from != "postgres.url");
            let from = from.map(|path| format!(" (the password is from {path})")).unwrap_or_default();
            format!("check user and password in postgres.url{from}")
        }
        "28000" if error.message().contains("pg_hba") => {
            let (kind, address) = match error.message().split('"').nth(1) {
                Some("[local]") | None => ("local", String::new()),
                Some(address) => {
                    let bits = if address.contains(':') { 128 } else { 32 };
                    (if *is_encrypted { "hostssl" } else { "host" }, format!(" {address}/{bits}"))
                }
            };
            let line = format!("{kind} {database} {user}{address} scram-sha-256");
            let encrypt = if *is_encrypted || kind == "local" {
                ""
            } else {
                "; or, where a hostssl line has it, sslmode=require"
            };
            format!(
                "put this line into the server's pg_hba.conf, above any that rejects, and reload it: {line} (a relay's \
                 replication connection matches the same line){encrypt}"
            )
        }
        "28000" => format!("create the role, or let it log in: ALTER ROLE {user} LOGIN"),
        "42501" => format!("ALTER ROLE {user} REPLICATION"),
        "57P03" => "wait: the server is starting, stopping or not yet consistent".to_owned(),
        _ => error.remedy().unwrap_or("the server's log says more").to_owned(),
    }
}

/// A precondition that does not hold, and the statement that mends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What is wrong, naming the thing.
    pub problem: String,
    /// What to do about it.
    pub remedy: String,
}

fn list(findings: &[Finding]) -> String {
    let lines: Vec<String> = findings.iter().map(|finding| finding.to_string()).collect();
    lines.join("; ")
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}. Remedy: {}", self.problem, self.remedy)
    }
}

/// The fields of an `ErrorResponse` or `NoticeResponse`.
#[derive(Clone, PartialEq, Eq)]
pub struct ServerError {
    fields: Vec<(u8, String)>,
}

impl ServerError {
    /// Reads the body of an `E` or `N` message. Unknown fields are kept, bytes that are not UTF-8 are replaced: this is
    /// text for people.
    pub fn parse(mut body: Bytes) -> Self {
        let mut fields = Vec::new();
        while body.has_remaining() {
            let kind = body.get_u8();
            let Some(end) = body.iter().position(|byte| *byte == 0) else { break };
            let text = body.split_to(end);
            body.advance(1);
            fields.push((kind, String::from_utf8_lossy(&text).into_owned()));
        }
        Self { fields }
    }

    fn from_sql(error: &tokio_postgres::error::DbError) -> Self {
        let mut fields = vec![
            (b'S', error.severity().to_owned()),
            (b'C', error.code().code().to_owned()),
            (b'M', error.message().to_owned()),
        ];
        fields.extend(error.detail().map(|detail| (b'D', detail.to_owned())));
        fields.extend(error.hint().map(|hint| (b'H', hint.to_owned())));
        Self { fields }
    }

    /// The field of this kind, by the protocol's letter.
    pub fn field(&self, kind: u8) -> Option<&str> {
        self.fields.iter().find(|(k, _)| *k == kind).map(|(_, text)| text.as_str())
    }

    /// The SQLSTATE.
    pub fn code(&self) -> &str {
        self.field(b'C').unwrap_or("")
    }

    /// The primary message.
    pub fn message(&self) -> &str {
        self.field(b'M').unwrap_or("")
    }

    /// Without a remedy.
    fn plain(&self) -> String {
        let mut text = format!("{} (SQLSTATE {})", self.message(), self.code());
        for (name, kind) in [("detail", b'D'), ("hint", b'H')] {
            if let Some(field) = self.field(kind) {
                text.push_str(&format!(", {name}: {field}"));
            }
        }
        text
    }

    /// What an operator can do about it, where the SQLSTATE alone tells.
    fn remedy(&self) -> Option<&'static str> {
        Some(match self.code() {
            "42501" => "give the role what is missing, usually: ALTER ROLE <role> REPLICATION",
            "3D000" => "check the database in postgres.url",
            "55006" => "another relay or a dead connection holds the slot; this one waits for it",
            "53300" => "raise max_wal_senders or max_connections",
            "58P01" => "the slot's WAL is gone: reconcile from the table, then drop the slot and run `pgoutbox init`",
            "42704" if self.message().contains("publication") => {
                "the publication did not exist for a part of the write-ahead log that is still to be read (creating it \
                 now does not help): reconcile from the table, then drop the slot and run `pgoutbox init`"
            }
            "XX000" if self.is_oversized_row() => {
                "a row's text form exceeds 1 GB and can never be decoded: skip its transaction with \
                 pg_replication_slot_advance, after saving what it holds"
            }
            _ => return None,
        })
    }

    /// A row whose text form exceeds what Postgres can allocate jams its slot for ever.
    pub fn is_oversized_row(&self) -> bool {
        self.code() == "XX000" && self.message().contains("invalid memory alloc request size")
    }

    fn retry(&self) -> Retry {
        match self.code() {
            // Slot or publication missing, privilege missing, database missing, WAL removed, bad name or syntax.
            "42704" | "42501" | "3D000" | "58P01" | "42602" | "42601" => Retry::Never,
            _ if self.is_oversized_row() => Retry::Never,
            _ => Retry::Later,
        }
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.plain())?;
        match self.remedy() {
            Some(remedy) => write!(f, ". Remedy: {remedy}"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<tokio_postgres::Error> for Error {
    fn from(error: tokio_postgres::Error) -> Self {
        match error.as_db_error() {
            Some(db) if db.code().code().starts_with("57P") => Error::GoingAway(db.message().to_owned()),
            Some(db) => Error::Server(ServerError::from_sql(db)),
            None => Error::Sql(error),
        }
    }
}

impl Error {
    /// Whether a new session can help.
    pub fn retry(&self) -> Retry {
        match self {
            Error::World(_) | Error::PublicationSkipped(_) | Error::Login { .. } => Retry::Never,
            Error::Server(error) | Error::Refused { error, .. } => error.retry(),
            _ => Retry::Later,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(code: &str, message: &str) -> ServerError {
        ServerError::parse(Bytes::from(format!("SERROR\0VERROR\0C{code}\0M{message}\0Hlook there\0Zodd\0\0")))
    }

    #[test]
    fn keeps_every_field_and_survives_a_missing_end() {
        let error = server("55006", "slot is active");
        assert_eq!((error.code(), error.message(), error.field(b'Z')), ("55006", "slot is active", Some("odd")));
        let broken = ServerError::parse(Bytes::from_static(b"C55006\0Mcut off"));
        assert_eq!((broken.code(), broken.message()), ("55006", ""));
    }

    #[test]
    fn says_code_hint_and_remedy() {
        let text = Error::Server(server("53300", "too many")).to_string();
        for part in ["too many", "53300", "look there", "Remedy: "] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_refused_login_names_host_role_database_and_what_mends_it() {
        let refused = |code: &str, message: &str, is_encrypted| {
            let attempt = Attempt {
                host: "db:5432".to_owned(),
                user: "relay".to_owned(),
                database: "shop".to_owned(),
                is_encrypted,
                password_from: Some("/home/x/.pgpass".to_owned()),
            };
            Error::Refused { attempt: Box::new(attempt), error: server(code, message) }.to_string()
        };
        let no_line = r#"no pg_hba.conf entry for host "10.0.0.7", user "relay""#;
        for (text, part) in [
            (refused("28P01", "password authentication failed", true), "from /home/x/.pgpass"),
            (refused("28000", no_line, true), "reload it: hostssl shop relay 10.0.0.7/32 scram-sha-256 ("),
            (refused("28000", no_line, false), "reload it: host shop relay 10.0.0.7/32 scram-sha-256 ("),
            (refused("28000", no_line, false), "sslmode=require"),
            (
                refused("28000", r#"pg_hba.conf rejects connection for host "[local]""#, false),
                ": local shop relay scram-sha-256 (",
            ),
            (
                refused("28000", r#"pg_hba.conf rejects connection for host "::1""#, true),
                ": hostssl shop relay ::1/128 scram",
            ),
            (refused("42501", "must be superuser", true), "ALTER ROLE relay REPLICATION"),
            (refused("3D000", "does not exist", true), "postgres.url"),
        ] {
            assert!(text.contains(part) && text.contains("db:5432 refused role relay, database shop"), "{text}");
        }
    }

    #[test]
    fn a_busy_slot_is_waited_for_and_a_missing_one_is_not() {
        assert_eq!(Error::Server(server("55006", "active")).retry(), Retry::Later);
        assert_eq!(Error::Server(server("42704", "does not exist")).retry(), Retry::Never);
        let jam = server("XX000", "invalid memory alloc request size 1153433603");
        assert!(jam.is_oversized_row());
        assert_eq!(Error::Server(jam).retry(), Retry::Never);
        assert_eq!(Error::Closed.retry(), Retry::Later);
    }
}
