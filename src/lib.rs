//! pgoutbox: the transactional outbox for Postgres, straight from the write-ahead log.
//!
//! ```text
//!              pg                     outbox                   relay                     sink
//!      ┌───────────────────┐    ┌───────────────────┐    ┌─────────────────┐    ┌─────────────────────┐
//! WAL  │ bytes -> frames   │───>│ frames -> items   │───>│ bounded channel │───>│ publish(run)        │──> broker
//!      │ (connection,      │    │ (assembler,       │    │ Message         │    │   -> Receipt        │
//!      │  replication,     │    │  mapping)         │    │ Checkpoint(Lsn) │    │ settled = the broker│
//!      │  pgoutput)        │    │                   │    │                 │    │ holds all of it     │
//!      └─────────^─────────┘    └───────────────────┘    └────────┬────────┘    └─────────────────────┘
//!                └──────────────── watch<Lsn>: settled ───────────┘      the only way back
//! ```
//!
//! Reading order is running order: [`pg`], [`outbox`], [`relay`], [`sink`]. Around them: [`lsn`], [`retry`] and [`finding`],
//! a position, a second try and what mends; `lookup` and `tls`, names and certificates for both doors; [`config`] and
//! [`error`], which gather; [`metrics`] and [`http`], which tell; [`cli`], the verbs; [`servers`], throw-away peers for the
//! demo and the tests.
//!
//! Four promises: nothing is lost, commit order, nothing is skipped in silence, everything has a limit. Two laws: a sink
//! does not know that positions exist, and only the relay knows both ends. ARCHITECTURE.md says more.
#![warn(missing_docs)]

pub mod cli;
pub mod config;
pub mod error;
pub mod finding;
pub mod http;
mod lookup;
pub mod lsn;
pub mod metrics;
pub mod outbox;
pub mod pg;
pub mod relay;
pub mod retry;
pub mod servers;
pub mod sink;
mod tls;
