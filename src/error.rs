//! The sum of the rooms' errors, and the exit code of each.

use std::fmt;

use crate::lsn::Lsn;
use crate::outbox;
use crate::pg;
use crate::relay;
use crate::sink;

/// How the process ends. The numbers are those of `sysexits.h` where it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitCode {
    /// Stopped cleanly.
    Stopped = 0,
    /// Usage or configuration (`EX_USAGE`).
    Usage = 64,
    /// A row that cannot be delivered as it is (`EX_DATAERR`).
    Row = 65,
    /// A peer stayed unreachable for too long, or something of this machine was not to be had (`EX_UNAVAILABLE`): it may be
    /// at the next start.
    Unavailable = 69,
    /// A bug in pgoutbox (`EX_SOFTWARE`).
    Bug = 70,
    /// The world is set up wrong (`EX_CONFIG`).
    World = 78,
}

impl ExitCode {
    /// Each with its meaning, for help, man page and README.
    pub const MEANINGS: [(Self, &'static str); 6] = [
        (Self::Stopped, "stopped cleanly"),
        (Self::Usage, "usage or configuration"),
        (Self::Row, "a row that cannot be delivered as it is"),
        (
            Self::Unavailable,
            "a peer stayed unreachable longer than `--give-up-after` (default: never), standard output cannot be \
             written, or `http.listen` is taken or not an address of this machine",
        ),
        (Self::Bug, "a bug in pgoutbox"),
        (
            Self::World,
            "the world is set up wrong: slot missing, lost, of another plugin, or re-created; publication or table missing, \
             changed or not covering the table; `wal_level`; privileges; a `rabbitmq.message_bytes_max` above the broker's",
        ),
    ];
}

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A verb that cannot be done so.
    #[error("{0}")]
    Usage(String),
    /// Settings that cannot be, all of them.
    #[error("{}", faults(.0))]
    Config(Vec<String>),
    /// Postgres.
    #[error(transparent)]
    Postgres(#[from] pg::Error),
    /// The relay.
    #[error(transparent)]
    Relay(#[from] relay::Error),
    /// A row that no broker could take, and the statement that skips its transaction.
    #[error(
        "{source}. Everything before it is published and confirmed, nothing after it is published. Remedy: mend what \
         writes such rows. This one is in the write-ahead log and cannot be changed: deliver by hand what matters of its \
         transaction (the rows after it were not published), then skip the whole transaction with: {skip}"
    )]
    Row {
        /// The statement.
        skip: String,
        /// The row, and what is wrong with it.
        source: outbox::Error,
    },
    /// A row that the server cannot send, and how to skip its transaction.
    #[error(
        "Postgres refused: {}. Everything before it is published and confirmed, nothing after it is. Remedy: a row whose \
         text form exceeds 1 GB, or is no UTF-8, can never be sent: deliver by hand what matters of its transaction, then \
         skip the whole transaction with: {skip}",
        error.plain()
    )]
    Undecodable {
        /// The statement.
        skip: String,
        /// What the server said.
        error: pg::ServerError,
    },
    /// Rows of a table that nobody knows any more, and the statement that skips their transaction.
    #[error(
        "{source}. Everything before them is published and confirmed, nothing after them is published. Remedy: if the table \
         is still there, attach it, or add it to the publication again, and restart. If it was re-created, restart, after \
         reconciling what was committed to it before it joined the publication. If it is gone, or it stops here again, only \
         the write-ahead log has these rows: save what matters of pg_logical_slot_peek_binary_changes, then skip the whole \
         transaction, other rows in it too, with: {skip}"
    )]
    Table {
        /// The statement.
        skip: String,
        /// Which table.
        source: outbox::Error,
    },
    /// The operating system.
    #[error("{doing}")]
    System {
        /// What was tried.
        doing: String,
        /// What it said.
        #[source]
        source: std::io::Error,
    },
    /// A check that found something, told already.
    #[error("{0}")]
    Found(String),
    /// The throw-away servers of the demo.
    #[error(transparent)]
    Servers(#[from] crate::servers::Error),
    /// The demo found what must not be.
    #[error("{0}")]
    Demo(String),
}

fn faults(faults: &[String]) -> String {
    let mut text = "configuration:".to_owned();
    for fault in faults {
        text.push_str("\n  ");
        text.push_str(fault);
    }
    text
}

impl Error {
    /// Why a relay of this slot stopped.
    pub fn of_relay(error: relay::Error, slot: &str) -> Self {
        match error {
            // Postgres skips a transaction if and only if its commit record begins before the slot's position, so one byte
            // beyond that beginning skips this transaction and no other.
            relay::Error::Outbox(source @ outbox::Error::Row { position, .. }) => {
                Error::Row { skip: skip(slot, position.commit_lsn), source }
            }
            relay::Error::Outbox(
                source @ (outbox::Error::UnknownTable { commit_lsn, .. } | outbox::Error::Recreated { commit_lsn, .. }),
            ) => Error::Table { skip: skip(slot, commit_lsn), source },
            relay::Error::Undecodable { commit_lsn, error } => {
                let skip = if commit_lsn == Lsn::ZERO {
                    "pg_replication_slot_advance, to the commit of its transaction".to_owned()
                } else {
                    skip(slot, commit_lsn)
                };
                Error::Undecodable { skip, error }
            }
            error => Error::Relay(error),
        }
    }

    /// The exit code that says it.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Error::Config(_) | Error::Usage(_) => ExitCode::Usage,
            Error::Postgres(error) => postgres(error),
            Error::Relay(error) => relay(error),
            Error::Row { .. } | Error::Undecodable { .. } => ExitCode::Row,
            Error::Table { .. } => ExitCode::World,
            Error::Found(_) => ExitCode::World,
            Error::System { .. } | Error::Servers(_) => ExitCode::Unavailable,
            Error::Demo(_) => ExitCode::Bug,
        }
    }
}

fn skip(slot: &str, commit_lsn: Lsn) -> String {
    format!("SELECT pg_replication_slot_advance({}, '{commit_lsn}'::pg_lsn + 1);", pg::world::literal(slot))
}

fn relay(error: &relay::Error) -> ExitCode {
    match error {
        relay::Error::Postgres(error) => postgres(error),
        relay::Error::Outbox(outbox::Error::Row { .. }) | relay::Error::Undecodable { .. } => ExitCode::Row,
        relay::Error::Outbox(_) => ExitCode::World,
        relay::Error::Sink(sink::Error::Undeliverable { .. }) => ExitCode::Row,
        relay::Error::Sink(sink::Error::Setup(_)) => ExitCode::World,
        relay::Error::Sink(_)
        | relay::Error::GaveUp { .. }
        | relay::Error::OldTimeline { .. }
        | relay::Error::Paused { .. } => ExitCode::Unavailable,
        relay::Error::Moved { .. } => ExitCode::World,
    }
}

fn postgres(error: &pg::Error) -> ExitCode {
    match error {
        pg::Error::Server(server) if server.is_undecodable_row() => ExitCode::Row,
        pg::Error::World(_)
        | pg::Error::PublicationSkipped(_)
        | pg::Error::Server(_)
        | pg::Error::Refused { .. }
        | pg::Error::Login { .. } => ExitCode::World,
        _ => ExitCode::Unavailable,
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        std::process::ExitCode::from(code as u8)
    }
}

impl fmt::Display for ExitCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", *self as u8)
    }
}
