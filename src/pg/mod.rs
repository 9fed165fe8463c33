//! Postgres as a peer that sends bytes: a connection, the replication protocol on it, and pgoutput inside that.
//!
//! Reading order: `settings` (with `conninfo`, `service`, `passfile`), `hosts`, `dial`, `tls`, `connection`, `login`;
//! `replication`, `pgoutput`; `catalog` is the other road, plain SQL over the same door (`handover`), and `world` what is
//! read there, with `coverage`. What a refusal means, and what mends it, is in `refusal`. For
//! `check`: `advice` with `minors`, and `rows`.

pub mod advice;
pub mod catalog;
pub mod connection;
mod conninfo;
mod coverage;
mod dial;
pub mod error;
mod handover;
mod hosts;
mod keywords;
mod login;
mod minors;
mod passfile;
pub mod pgoutput;
pub mod refusal;
pub mod replication;
mod rows;
mod service;
pub mod settings;
mod tls;
pub mod world;

pub use dial::Place;
pub use error::{Error, ServerError};
pub use rows::Sampled;
pub use settings::Settings;
