//! The sum of the rooms' errors, and the exit code of each.

use std::fmt;

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
    /// A peer stayed unreachable for too long (`EX_UNAVAILABLE`).
    Unavailable = 69,
    /// A bug in pgoutbox (`EX_SOFTWARE`).
    Bug = 70,
    /// The world is set up wrong (`EX_CONFIG`).
    World = 78,
}

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Settings that cannot be, all of them.
    #[error("{}", faults(.0))]
    Config(Vec<String>),
    /// Postgres.
    #[error(transparent)]
    Postgres(#[from] pg::Error),
    /// The relay.
    #[error(transparent)]
    Relay(#[from] relay::Error),
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
    /// The exit code that says it.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Error::Config(_) => ExitCode::Usage,
            Error::Postgres(error) => postgres(error),
            Error::Relay(error) => relay(error),
            Error::Found(_) => ExitCode::World,
            Error::System { .. } | Error::Servers(_) => ExitCode::Unavailable,
            Error::Demo(_) => ExitCode::Bug,
        }
    }
}

fn relay(error: &relay::Error) -> ExitCode {
    match error {
        relay::Error::Postgres(error) => postgres(error),
        relay::Error::Outbox(outbox::Error::Row { .. }) => ExitCode::Row,
        relay::Error::Outbox(_) => ExitCode::World,
        relay::Error::Sink(sink::Error::Undeliverable { .. }) => ExitCode::Row,
        relay::Error::Sink(sink::Error::Setup { .. }) => ExitCode::World,
        relay::Error::Sink(_) | relay::Error::GaveUp { .. } | relay::Error::OldTimeline { .. } => ExitCode::Unavailable,
        relay::Error::Moved { .. } => ExitCode::World,
    }
}

fn postgres(error: &pg::Error) -> ExitCode {
    match error {
        pg::Error::Server(server) if server.is_oversized_row() => ExitCode::Row,
        pg::Error::World(_) | pg::Error::PublicationSkipped(_) | pg::Error::Server(_) | pg::Error::Login(_) => {
            ExitCode::World
        }
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
