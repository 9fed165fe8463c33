//! A row of equal doors, one a broker. A sink does not know that positions exist: it takes messages and says when the
//! broker holds them.
//!
//! To add a broker: one file beside `rabbitmq` and `stdout` with the same parts in the same order (`Settings`, `open`, the
//! methods), and one variant of [`AnySink`].

pub mod rabbitmq;
pub mod stdout;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

pub use rabbitmq::RabbitMq;
pub use stdout::Stdout;

use crate::finding::Finding;
use crate::outbox::Message;
use crate::retry::Retry;

/// Where messages go.
pub trait Sink: Send {
    /// Writes the run to the broker, in the order given, and returns a receipt for it. The receipt settles when the broker
    /// has taken responsibility for every message of the run; receipts settle in the order of their runs.
    ///
    /// # Errors
    /// Any, here or in a receipt, ends the session: any part of what was unsettled may have arrived.
    fn publish(&mut self, run: Vec<Message>) -> impl Future<Output = Result<Receipt, Error>> + Send;

    /// Says whether the broker could ever take this message; sends nothing. Asked before `publish`, one by one, so that a
    /// message that is impossible does not take those before it along.
    ///
    /// # Errors
    /// `Undeliverable`.
    fn admit(&self, _message: &Message) -> Result<(), Error> {
        Ok(())
    }

    /// Resolves when the session is over by the broker's doing, with the reason: nobody may be publishing or waiting then.
    /// Cancel-safe.
    fn failed(&mut self) -> impl Future<Output = Error> + Send;

    /// Proves that a delivery could succeed now; changes nothing.
    ///
    /// # Errors
    /// Why it could not.
    fn check(&mut self) -> impl Future<Output = Result<(), Error>> + Send;

    /// Says goodbye to a broker that did nothing wrong. A session that is dropped without it ends as well.
    fn close(self) -> impl Future<Output = ()> + Send
    where
        Self: Sized,
    {
        std::future::ready(())
    }
}

/// Settles when the broker holds every message of a run.
pub struct Receipt {
    settled: Pin<Box<dyn Future<Output = Result<(), Error>> + Send>>,
    under_way: Option<Arc<UnderWay>>,
}

/// How much of a session's output the broker has taken, while more of it waits.
#[derive(Debug, Default)]
pub struct UnderWay(AtomicU64);

impl UnderWay {
    /// So many bytes were taken since the session began, and more wait; or none does.
    pub fn set(&self, bytes: Option<u64>) {
        self.0.store(bytes.unwrap_or(0), Ordering::Relaxed);
    }
}

impl Receipt {
    /// Settles when `settled` does.
    pub fn new(settled: impl Future<Output = Result<(), Error>> + Send + 'static) -> Self {
        Self { settled: Box::pin(settled), under_way: None }
    }

    /// With what tells whether messages still move towards the broker.
    pub fn with_under_way(self, under_way: Arc<UnderWay>) -> Self {
        Self { under_way: Some(under_way), ..self }
    }

    /// A number that rises as long as the broker takes messages that wait for it; `None`: none waits, or that is not known.
    /// A confirm is owed for what the broker has in whole, so a slow way there is no late confirm.
    pub fn bytes_under_way(&self) -> Option<u64> {
        let bytes = self.under_way.as_ref()?.0.load(Ordering::Relaxed);
        (bytes > 0).then_some(bytes)
    }
}

impl Future for Receipt {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.settled.as_mut().poll(cx)
    }
}

impl fmt::Debug for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Receipt")
    }
}

/// Why a session with a broker ended or did not begin.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// No session.
    #[error("cannot open a session with the broker at {host}: {problem}")]
    Unreachable {
        /// Host and port.
        host: String,
        /// What was said.
        problem: String,
    },
    /// No session with any of several hosts.
    #[error("no host of {} will do: {}", .0.len(), .0.join("; "))]
    Hosts(Vec<String>),
    /// The session broke.
    #[error("the session with the broker broke: {0}")]
    Broken(String),
    /// The broker took longer than it may.
    #[error("the broker did not answer within {after:?} ({during})")]
    Timeout {
        /// What was awaited.
        during: &'static str,
        /// The limit.
        after: Duration,
    },
    /// The broker refused a message that is possible: it may take it later.
    #[error("message {} was refused: {refusal}", .id.escape_debug())]
    Refused {
        /// The message's id.
        id: String,
        /// How, and what to do.
        refusal: Refusal,
    },
    /// The message can never be taken as it is.
    #[error("message {} cannot be delivered: {problem}", .id.escape_debug())]
    Undeliverable {
        /// The message's id.
        id: String,
        /// What is wrong.
        problem: String,
    },
    /// There is nobody who takes messages, and nobody can come.
    #[error("{0}")]
    Gone(String),
    /// The broker is set up in a way that excludes us.
    #[error("{0}")]
    Setup(Finding),
    /// The broker lacks something, or refuses us something, that its operator may be mending right now.
    #[error("{0}")]
    Lacking(Finding),
}

/// How a broker refuses a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Nothing is bound that would take this key.
    Unroutable {
        /// The exchange.
        exchange: String,
        /// The routing key.
        routing_key: String,
    },
    /// A queue refused it, or could not store it.
    Nacked,
}

impl Refusal {
    /// The label of `pgoutbox_refused_total`.
    pub fn reason(&self) -> &'static str {
        match self {
            Refusal::Unroutable { .. } => "unroutable",
            Refusal::Nacked => "nacked",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Unroutable { exchange, routing_key } => write!(
                f,
                "unroutable, no queue is bound to exchange {exchange:?} for routing key {routing_key:?}. Remedy: bind one"
            ),
            Refusal::Nacked => f.write_str(
                "nacked, a queue is full (overflow reject-publish) or could not store it. Remedy: look at the queues bound \
                 for it and at the broker's log",
            ),
        }
    }
}

impl Error {
    /// Whether a new session can help.
    pub fn retry(&self) -> Retry {
        match self {
            Error::Undeliverable { .. } | Error::Gone(_) | Error::Setup(_) => Retry::Never,
            _ => Retry::Later,
        }
    }
}

/// Every broker there is.
pub enum AnySink {
    /// AMQP 0-9-1.
    RabbitMq(Box<RabbitMq>),
    /// One JSON line a message.
    Stdout(Stdout),
}

impl Sink for AnySink {
    async fn publish(&mut self, run: Vec<Message>) -> Result<Receipt, Error> {
        match self {
            AnySink::RabbitMq(sink) => sink.publish(run).await,
            AnySink::Stdout(sink) => sink.publish(run).await,
        }
    }

    fn admit(&self, message: &Message) -> Result<(), Error> {
        match self {
            AnySink::RabbitMq(sink) => sink.admit(message),
            AnySink::Stdout(sink) => sink.admit(message),
        }
    }

    async fn failed(&mut self) -> Error {
        match self {
            AnySink::RabbitMq(sink) => sink.failed().await,
            AnySink::Stdout(sink) => sink.failed().await,
        }
    }

    async fn check(&mut self) -> Result<(), Error> {
        match self {
            AnySink::RabbitMq(sink) => sink.check().await,
            AnySink::Stdout(sink) => sink.check().await,
        }
    }

    async fn close(self) {
        match self {
            AnySink::RabbitMq(sink) => sink.close().await,
            AnySink::Stdout(sink) => sink.close().await,
        }
    }
}
