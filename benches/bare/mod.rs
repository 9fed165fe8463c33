//! The limits: what the two servers give to a program that does the least that is still correct.
//!
//! One thread, sockets of the standard library, frames written by hand, no TLS, no login that deserves the name, no error
//! but a panic. They are honest where it counts: [`relay`] builds the very bytes that pgoutbox builds, mandatory and
//! persistent, and tells Postgres nothing that the broker has not confirmed. The trap: a yardstick that skips work which
//! the measured program must do measures the work.
//!
//! Reading order: `socket`, `postgres` and `amqp`, `relay`; then its halves, `drain` (the walsender alone) and `publisher`
//! (the broker alone).

pub(crate) mod amqp;
pub(crate) mod drain;
pub(crate) mod postgres;
pub(crate) mod publisher;
pub(crate) mod relay;
pub(crate) mod socket;
