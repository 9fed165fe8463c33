//! pgoutbox: the transactional outbox for Postgres, straight from the write-ahead log.
#![warn(missing_docs)]

pub mod lsn;
pub mod metrics;
pub mod outbox;
pub mod pg;
pub mod retry;
pub mod sink;
