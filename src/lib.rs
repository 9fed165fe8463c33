//! pgoutbox: the transactional outbox for Postgres, straight from the write-ahead log.
#![warn(missing_docs)]

pub mod servers;
