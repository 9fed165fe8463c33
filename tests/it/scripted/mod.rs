//! Peers on a script: what the relay makes of a broker or a Postgres that breaks its protocol.
//!
//! The trap: real servers behave, so the code for those that do not is never run until the night when a proxy, a bug or
//! somebody in between does not. What is judged is always the same: nothing counts as settled that the broker did not
//! confirm, nothing is published that Postgres did not say, and the relay is there afterwards.

pub(crate) mod amqp;
mod broker;
pub(crate) mod postgres;
mod scram;
mod stream;
