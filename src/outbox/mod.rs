//! What the bytes mean: pgoutput messages become outbox messages and checkpoints. Pure: no socket, no clock.
//!
//! Reading order: `message`, `mapping` with `columns`, `template` and `headers`, `assembler`.

pub mod assembler;
mod columns;
pub mod headers;
pub mod mapping;
pub mod message;
pub mod template;

use std::fmt;

pub use assembler::{Assembler, Tables};
pub use mapping::{ColumnNames, Mapping};
pub use message::{Header, HeaderValue, Message};
pub use template::Template;

use crate::finding::Finding;
use crate::lsn::Lsn;
use crate::pg::pgoutput;
use crate::retry::Retry;

/// Where a row stands in the total order: its transaction's commit, and its number in the transaction from 0.
///
/// LSNs of single changes are neither unique (all rows of a COPY share one) nor ordered (transactions interleave).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Where the transaction's commit record starts.
    pub commit_lsn: Lsn,
    /// The row's number in its transaction.
    pub seq: u64,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "row {} of the transaction committed at {}", self.seq, self.commit_lsn)
    }
}

/// What travels from Postgres to the broker, on one road.
#[derive(Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "nearly all are messages, and a box would cost each an allocation")]
pub enum Item {
    /// One outbox row.
    Message(Position, Message),
    /// Once everything before it has settled, Postgres may be told this position.
    Checkpoint(Lsn),
}

/// A stream or a row that cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The change is not pgoutput.
    #[error("a change cannot be decoded")]
    Decode(#[from] pgoutput::Error),
    /// Messages in an order that the protocol does not allow.
    #[error("the stream from Postgres is out of order: {0}")]
    Order(String),
    /// A row of a table about which the catalog said nothing: ask it again.
    #[error(
        "a row of table {name} (OID {oid}) came through the publication, and the catalog knows it neither as the outbox or \
         a partition of it nor as another table of the publication: it was dropped, detached or taken out of the \
         publication before its rows were read"
    )]
    UnknownTable {
        /// Its OID.
        oid: u32,
        /// Its name in the stream.
        name: String,
        /// Of the row's transaction.
        commit_lsn: Lsn,
    },
    /// A row of a table that nobody can see yet: the commit that made it waits for a synchronous standby, and is in the
    /// stream before the catalog shows it.
    #[error(
        "the commit of transaction {xid}, with rows of table {name}, waits for a synchronous standby, and nobody can see \
         yet what it made"
    )]
    Unseen {
        /// The table's name in the stream.
        name: String,
        /// The transaction's number.
        xid: u32,
    },
    /// The outbox table went and another took its name.
    #[error(
        "table {name} was dropped and re-created: rows of its OID {oid} follow, which is not the table's of when the stream \
         began"
    )]
    Recreated {
        /// Its new OID.
        oid: u32,
        /// Its name.
        name: String,
        /// Of the transaction with the first of them.
        commit_lsn: Lsn,
    },
    /// The table's columns do not make an outbox.
    #[error("{0}")]
    Columns(Finding),
    /// A row that no broker could take as it is.
    #[error("{position} (id {id}) cannot be delivered: {problem}")]
    Row {
        /// Which row.
        position: Position,
        /// The row's id, as far as it has one.
        id: String,
        /// What is wrong.
        problem: String,
    },
}

impl Error {
    /// Whether a new session can help.
    pub fn retry(&self) -> Retry {
        match self {
            Error::Decode(_) | Error::Order(_) | Error::Unseen { .. } => Retry::Later,
            Error::UnknownTable { .. } | Error::Recreated { .. } | Error::Columns(_) | Error::Row { .. } => {
                Retry::Never
            }
        }
    }
}
