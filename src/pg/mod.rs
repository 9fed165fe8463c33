//! Postgres as a peer that sends bytes: a connection, the replication protocol on it, and pgoutput inside that.
//!
//! Reading order: `settings`, `connection`, `replication`, `pgoutput`; `catalog` is the other road, plain
//! SQL, and `world` what is read there.

pub mod catalog;
pub mod connection;
pub mod error;
pub mod pgoutput;
pub mod replication;
pub mod settings;
pub mod world;

pub use error::{Error, Finding, ServerError};
pub use settings::Settings;
