//! What can go wrong with Postgres, and what each says about trying again; what mends it is in `refusal`.
//!
//! The trap: a walsender that gives up on a silent client says nothing, it just closes (`COMMERROR`), and SQLSTATE 55000
//! has many causes. So a bare close is `Later`, and a state error is settled by looking at the catalog in the next session.

use std::fmt;
use std::io;
use std::time::Duration;

use bytes::{Buf, Bytes};

use super::{pgoutput, refusal};
use crate::finding::{Finding, Remedy, as_called, explain};
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
         read; its rows are in the table but not in the stream. Remedy: drop the slot, run `{init}`, then reconcile from \
         the table what was committed before that and not delivered",
        init = as_called("pgoutbox init")
    )]
    PublicationSkipped(ServerError),
    /// The server did not get to an answer in the time it was given, mostly for a lock that others hold.
    #[error("a look at Postgres did not come off: {0}. Remedy: see in pg_locks who holds the outbox, and wait for it")]
    Late(String),
    /// Control SQL failed without an answer from the server.
    #[error("a query on Postgres failed")]
    Sql(#[source] tokio_postgres::Error),
    /// An `ErrorResponse` before the session began.
    #[error("Postgres at {} refused {attempt}: {}. Remedy: {}", attempt.host, error.plain(), refusal::login(attempt, error))]
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
        /// A password may be on its way; what the server asks for stays what it is.
        retry: Retry,
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
    #[error("no host of {} will do: {}", .0.len(), told(.0))]
    Hosts(Vec<Error>),
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

fn told(errors: &[Error]) -> String {
    errors.iter().map(|error| explain(error)).collect::<Vec<_>>().join("; ")
}

fn list(findings: &[Finding]) -> String {
    let lines: Vec<String> = findings.iter().map(|finding| finding.to_string()).collect();
    lines.join("; ")
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
    pub fn plain(&self) -> String {
        let mut text = format!("{} (SQLSTATE {})", self.message(), self.code());
        for (name, kind) in [("detail", b'D'), ("hint", b'H')] {
            if let Some(field) = self.field(kind) {
                text.push_str(&format!(", {name}: {field}"));
            }
        }
        text
    }

    /// A row whose text form exceeds what Postgres can allocate, by one column or by all together, or that has no form in
    /// UTF-8, jams its slot for ever.
    pub fn is_undecodable_row(&self) -> bool {
        match self.code() {
            "XX000" => self.message().contains("invalid memory alloc request size"),
            "54000" => self.field(b'R') == Some("enlargeStringInfo"),
            // Of a stream. An SQL connection may have put a name that has no such form into a query.
            "22P05" | "22021" => self.field(b'R').is_some(),
            _ => false,
        }
    }

    fn retry(&self) -> Retry {
        match self.code() {
            // Slot or publication missing, privilege missing, database missing, WAL removed, bad name or syntax.
            "42704" | "42501" | "3D000" | "58P01" | "42602" | "42601" => Retry::Never,
            _ if self.is_undecodable_row() => Retry::Never,
            _ => Retry::Later,
        }
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.plain())?;
        match refusal::session(self) {
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
            Some(db) if matches!(db.code().code(), "55P03" | "57014") => Error::Late(db.message().to_owned()),
            Some(db) => Error::Server(ServerError::from_sql(db)),
            None => Error::Sql(error),
        }
    }
}

impl Error {
    /// What is wrong and what mends it, apart.
    pub fn findings(&self) -> Vec<Finding> {
        match self {
            Error::World(findings) => findings.clone(),
            Error::Hosts(errors) => errors.iter().flat_map(Error::findings).collect(),
            Error::Refused { attempt, error } => {
                let problem = format!("Postgres at {} refused {attempt}: {}", attempt.host, error.plain());
                vec![Finding::new(problem, refusal::login(attempt, error))]
            }
            Error::Server(error) => {
                let problem = format!("Postgres refused: {}", error.plain());
                vec![Finding::new(problem, refusal::session(error).unwrap_or_default())]
            }
            error => {
                let text = explain(error);
                let (problem, remedy) = text
                    .split_once(". Remedy: ")
                    .unwrap_or((&text, "see that the server runs and that host and port in postgres.url are right"));
                vec![Finding::new(problem, Remedy::act(remedy))]
            }
        }
    }

    /// Whether a new session can help.
    pub fn retry(&self) -> Retry {
        match self {
            Error::World(_) | Error::PublicationSkipped(_) => Retry::Never,
            Error::Login { retry, .. } => *retry,
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
            (
                refused("28000", no_line, true),
                "pg_hba.conf: hostssl shop relay 10.0.0.7/32 scram-sha-256, then SELECT pg_reload_conf();",
            ),
            (refused("28000", no_line, false), "pg_hba.conf: host shop relay 10.0.0.7/32 scram-sha-256, then"),
            (refused("28000", no_line, false), "sslmode=require"),
            (
                refused("28000", r#"pg_hba.conf rejects connection for host "[local]""#, false),
                ": local shop relay scram-sha-256, then",
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
        assert!(jam.is_undecodable_row());
        assert_eq!(Error::Server(jam).retry(), Retry::Never);
        assert_eq!(Error::Closed.retry(), Retry::Later);
    }
}
