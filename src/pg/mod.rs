//! Postgres as a peer that sends bytes: a connection, the replication protocol on it, and pgoutput inside that.
//!
//! Reading order: `settings` (with `conninfo`, `service`, `passfile`), `hosts`, `dial`, `tls`, `connection`, `login`;
//! `replication`, `pgoutput`; `catalog` is the other road, plain SQL over the same door (`handover`), and `world` what is
//! read there.

pub mod catalog;
pub mod connection;
mod conninfo;
mod dial;
pub mod error;
mod handover;
mod hosts;
mod login;
mod passfile;
pub mod pgoutput;
pub mod replication;
mod service;
pub mod settings;
mod tls;
pub mod world;

pub use dial::Place;
pub use error::{Error, Finding, ServerError};
pub use settings::Settings;
