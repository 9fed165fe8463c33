//! RabbitMQ over AMQP 0-9-1: a durable topic exchange, persistent and mandatory messages, publisher confirms pipelined.
//!
//! The traps. "Acked" is not "routed": an unroutable mandatory message is returned *and then acked*. And lapin hands a
//! returned message to whichever confirm completes next, which may be another message's (reproduced on RabbitMQ 3.10 and
//! 4.3). What it does guarantee: a return is handed to a confirm that completes no later than the message's own. So
//! returns are matched by `message_id`, and nothing counts as settled before every confirm that is ready has been looked at:
//! see `ledger`. Library recovery stays off: only the relay knows from where to publish again.

mod connect;
mod ledger;
mod wire;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::uri::AMQPUri;
use lapin::{Channel, Confirmation, Connection, ConnectionProperties, Event, ExchangeKind};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use self::connect::{Leash, connect};
use self::ledger::{Ledger, Outcome, Progress, Publish, Returned, Verdict, receipt};
use self::wire::{header_bytes, properties, short};
use super::{Error, Receipt, Refusal, Sink};
use crate::metrics::Metrics;
use crate::outbox::Message;

/// Connecting, declaring, opening a channel: each answers in milliseconds or not at all.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a broker may take to answer a goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// Half of what `amqp://` URIs usually ask for: a broker that is gone is noticed after two silent intervals.
const HEARTBEAT_SECONDS: u16 = 10;

/// RabbitMQ's own default. A broker may propose 0, no limit, or anything up to 4 GiB, and lapin reserves 32 frames at once:
/// the process would be gone for want of memory.
const FRAME_BYTES_MAX: u32 = 131_072;

/// `max_message_size`'s default since RabbitMQ 4.0 (3.x: 128 MiB). lapin does not tell the server's version.
pub const MESSAGE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Where the broker is and what messages go to.
#[derive(Clone)]
pub struct Settings {
    /// Tried in order.
    pub uris: Vec<AMQPUri>,
    /// The exchange.
    pub exchange: String,
    /// Declare the exchange, or only look that it exists.
    pub declare: bool,
    /// The broker's `max_message_size`: a larger body would close the channel, again and again.
    pub message_bytes_max: u64,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let hosts: Vec<String> = self.uris.iter().map(host).collect();
        f.debug_struct("Settings").field("hosts", &hosts).field("exchange", &self.exchange).finish_non_exhaustive()
    }
}

/// A broker session: one connection, one channel.
pub struct RabbitMq {
    channel: Channel,
    exchange: ShortString,
    message_bytes_max: u64,
    header_bytes_max: usize,
    published: u64,
    runs: mpsc::UnboundedSender<Vec<Publish>>,
    progress: watch::Receiver<Progress>,
    watchers: [JoinHandle<()>; 2],
    connection: Connection,
    // Dropped: the socket goes at once. What still stands in it must not arrive later than need be.
    _leash: Leash,
}

impl Drop for RabbitMq {
    fn drop(&mut self) {
        for watcher in &self.watchers {
            watcher.abort();
        }
    }
}

impl RabbitMq {
    /// Opens a session with the first host that lets us in, and makes sure of the exchange.
    ///
    /// # Errors
    /// The last host's.
    pub async fn open(settings: &Settings, metrics: Arc<Metrics>) -> Result<Self, Error> {
        let mut last = Error::Broken("no host is configured".to_owned());
        for uri in &settings.uris {
            match Self::open_at(uri, settings, &metrics).await {
                Ok(session) => return Ok(session),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn open_at(uri: &AMQPUri, settings: &Settings, metrics: &Arc<Metrics>) -> Result<Self, Error> {
        let mut uri = uri.clone();
        uri.query.heartbeat.get_or_insert(HEARTBEAT_SECONDS);
        let chosen = uri.query.frame_max.filter(|bytes| *bytes > 0);
        uri.query.frame_max = Some(chosen.map_or(FRAME_BYTES_MAX, |bytes| bytes.min(FRAME_BYTES_MAX)));
        let properties = ConnectionProperties::default().with_connection_name("pgoutbox".into());
        let (connection, leash) = connect(&uri, properties).await?;
        let blocked = tokio::spawn(watch_blocked(connection.events_listener(), metrics.clone()));
        let channel = rpc("opening a channel", connection.create_channel()).await?;
        let exchange = short(&settings.exchange)?;
        declare(&channel, &exchange, settings.declare).await?;
        rpc("selecting confirms", channel.confirm_select(ConfirmSelectOptions::default())).await?;
        let (runs, incoming) = mpsc::unbounded_channel();
        let (sender, progress) = watch::channel(Progress::default());
        let frame_max = usize::try_from(connection.configuration().frame_max()).unwrap_or(usize::MAX);
        Ok(Self {
            channel,
            exchange,
            message_bytes_max: settings.message_bytes_max,
            // A content header must fit one frame: 7 bytes before it, 1 behind.
            header_bytes_max: if frame_max == 0 { usize::MAX } else { frame_max.saturating_sub(8) },
            published: 0,
            runs,
            progress,
            watchers: [blocked, tokio::spawn(Ledger::new(sender).keep(incoming))],
            connection,
            _leash: leash,
        })
    }
}

impl Sink for RabbitMq {
    async fn publish(&mut self, run: Vec<Message>) -> Result<Receipt, Error> {
        self.published += run.len() as u64;
        let publish = |message: Message| Publish {
            id: message.id.clone(),
            publish: Box::pin(publish(self.channel.clone(), self.exchange.clone(), message)),
        };
        // The ledger ends only after it has said why: the receipt tells.
        let _ = self.runs.send(run.into_iter().map(publish).collect());
        Ok(receipt(self.progress.clone(), self.published))
    }

    fn admit(&self, message: &Message) -> Result<(), Error> {
        let header_bytes = header_bytes(message);
        let body = message.body.len() as u64;
        let problem = if body > self.message_bytes_max {
            format!(
                "its body has {body} bytes; the broker takes {} (rabbitmq.message_bytes_max)",
                self.message_bytes_max
            )
        } else if header_bytes > self.header_bytes_max {
            format!("its headers have about {header_bytes} bytes; one frame takes {}", self.header_bytes_max)
        } else {
            return Ok(());
        };
        Err(Error::Undeliverable { id: message.id.clone(), problem })
    }

    async fn check(&mut self) -> Result<(), Error> {
        declare(&self.channel, &self.exchange, false).await
    }

    async fn close(self) {
        // Without it the broker logs a warning. It may be gone already: all the same.
        let _ = timeout(GOODBYE, self.connection.close(200, "stopped".into())).await;
    }
}

/// Publishes one message and waits for its confirm. The first poll takes the delivery tag and queues the frames; the io
/// thread writes many of them in one call.
async fn publish(channel: Channel, exchange: ShortString, message: Message) -> Outcome {
    let published = async {
        let properties = properties(&message)?;
        let key = short(&message.destination)?;
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let written = channel.basic_publish(exchange, key, options, &message.body, properties).await;
        written.map_err(|error| broken(&error))
    };
    let written = published.await;
    // The broker's socket has it: its body need not wait for the confirm.
    drop(message);
    match written {
        Ok(confirm) => outcome(confirm.await),
        Err(error) => Outcome { verdict: Verdict::Failed(error), returned: None },
    }
}

/// lapin's word on one message, and a return that may be another's.
fn outcome(confirmation: Result<Confirmation, lapin::Error>) -> Outcome {
    let (verdict, returned) = match confirmation {
        Ok(Confirmation::Ack(returned)) => (Verdict::Acked, returned),
        Ok(Confirmation::Nack(returned)) => (Verdict::Nacked, returned),
        Ok(Confirmation::NotRequested) => (Verdict::Failed(Error::Broken("confirms are not on".to_owned())), None),
        Err(error) => (Verdict::Failed(broken(&error)), None),
    };
    let returned = returned.map(|message| Returned {
        id: message.properties.message_id().as_ref().map(ToString::to_string).unwrap_or_default(),
        refusal: Refusal::Unroutable {
            exchange: message.delivery.exchange.to_string(),
            routing_key: message.delivery.routing_key.to_string(),
        },
    });
    Outcome { verdict, returned }
}

async fn watch_blocked(events: impl StreamExt<Item = Event> + Send, metrics: Arc<Metrics>) {
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        match event {
            Event::ConnectionBlocked(reason) => {
                tracing::warn!(reason, "the broker blocks publishers; nothing is lost, Postgres keeps what waits");
                metrics.blocked(Some(reason));
            }
            Event::ConnectionUnblocked => {
                tracing::info!("the broker takes messages again");
                metrics.blocked(None);
            }
            _ => {}
        }
    }
}

async fn declare(channel: &Channel, exchange: &ShortString, create: bool) -> Result<(), Error> {
    let options = ExchangeDeclareOptions { durable: true, passive: !create, ..ExchangeDeclareOptions::default() };
    let declared = channel.exchange_declare(exchange.clone(), ExchangeKind::Topic, options, FieldTable::default());
    let declared = answer("declaring the exchange", declared).await?;
    declared.map_err(|error| match amqp_code(&error) {
        Some(406) => Error::Setup {
            problem: format!("exchange {exchange} exists and is not a durable topic exchange"),
            remedy: "set rabbitmq.declare = false to use it as it is, or choose another rabbitmq.exchange".to_owned(),
        },
        Some(404) => Error::Broken(format!(
            "exchange {exchange} does not exist. Remedy: create it, or set rabbitmq.declare = true"
        )),
        Some(403) => Error::Broken(format!(
            "the broker refuses access to exchange {exchange}. Remedy: give the user configure (or set rabbitmq.declare = \
             false) and write permission for it"
        )),
        _ => broken(&error),
    })
}

/// An answer within the deadline.
async fn answer<T>(during: &'static str, pending: impl Future<Output = T>) -> Result<T, Error> {
    timeout(ANSWER_TIMEOUT, pending).await.map_err(|_| Error::Timeout { during, after: ANSWER_TIMEOUT })
}

async fn rpc<T>(during: &'static str, pending: impl Future<Output = Result<T, lapin::Error>>) -> Result<T, Error> {
    answer(during, pending).await?.map_err(|error| broken(&error))
}

fn broken(error: &lapin::Error) -> Error {
    Error::Broken(explain(error))
}

/// What lapin says, with a remedy where the broker's code tells one. Never a URI, never a body.
fn explain(error: &lapin::Error) -> String {
    let text = match error.kind() {
        // lapin's words for a channel or connection that is gone.
        lapin::ErrorKind::InvalidChannelState(..) | lapin::ErrorKind::InvalidConnectionState(_) => {
            "the broker closed the connection".to_owned()
        }
        // RabbitMQ ends its sentences, ours go on.
        _ => error.to_string().trim_end_matches('.').to_owned(),
    };
    match amqp_code(error) {
        Some(403) => format!("{text}. Remedy: check user, password, vhost and permissions of rabbitmq.url"),
        Some(406) if text.contains("larger than") => {
            format!("{text}. Remedy: set rabbitmq.message_bytes_max to the broker's max_message_size")
        }
        _ => text,
    }
}

fn amqp_code(error: &lapin::Error) -> Option<u16> {
    match error.kind() {
        lapin::ErrorKind::ProtocolError(error) => Some(error.get_id()),
        _ => None,
    }
}

/// Host and port of a URI, without user and password.
pub fn host(uri: &AMQPUri) -> String {
    format!("{}:{}", uri.authority.host, uri.authority.port)
}
