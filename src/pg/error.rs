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
    /// The server asks for a way to log in that we do not have.
    #[error("cannot log in to Postgres: {0}")]
    Login(String),
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

    /// What an operator can do about it, where the SQLSTATE alone tells.
    fn remedy(&self) -> Option<&'static str> {
        Some(match self.code() {
            "28P01" => "check user and password in postgres.url",
            "28000" if self.message().contains("pg_hba") => {
                "allow this role in pg_hba.conf (a replication=database connection matches the database's own lines)"
            }
            "28000" => "check the role in postgres.url: it must exist and may log in",
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
        write!(f, "{} (SQLSTATE {})", self.message(), self.code())?;
        for (name, kind) in [("detail", b'D'), ("hint", b'H')] {
            if let Some(text) = self.field(kind) {
                write!(f, ", {name}: {text}")?;
            }
        }
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
            Error::World(_) | Error::PublicationSkipped(_) | Error::Login(_) => Retry::Never,
            Error::Server(error) => error.retry(),
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
        let text = Error::Server(server("28P01", "password authentication failed")).to_string();
        for part in ["password authentication failed", "28P01", "look there", "Remedy: "] {
            assert!(text.contains(part), "{text}");
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
