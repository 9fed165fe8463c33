//! RabbitMQ over AMQP 0-9-1: a durable topic exchange, persistent and mandatory messages, publisher confirms pipelined.
//!
//! The traps. "Acked" is not "routed": an unroutable mandatory message is returned *and then acked*. And lapin hands a
//! returned message to whichever confirm completes next, which may be another message's (reproduced on RabbitMQ 3.10 and
//! 4.3). What it does guarantee: a return is handed to a confirm that completes no later than the message's own. So
//! returns are matched by `message_id`, and nothing counts as settled before every confirm that is ready has been looked at;
//! see [`Ledger`]. Library recovery stays off: only the relay knows from where to publish again.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use lapin::message::BasicReturnMessage;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions};
use lapin::types::{AMQPValue, FieldArray, FieldTable, LongString, ShortString};
use lapin::uri::AMQPUri;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Event, ExchangeKind, PublisherConfirm,
};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::{Error, Receipt, Refusal, Sink};
use crate::metrics::Metrics;
use crate::outbox::{HeaderValue, Message};

/// Connecting, declaring, opening a channel: each answers in milliseconds or not at all.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Writing a run waits for the broker to read. Quorum queues may hold a channel for 65 s while they elect a leader, and a
/// memory alarm for as long as it lasts; the relay's own deadline on receipts comes first.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// Half of what `amqp://` URIs usually ask for: a broker that is gone is noticed after two silent intervals.
const HEARTBEAT_SECONDS: u16 = 10;

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
    confirms: mpsc::UnboundedSender<Published>,
    progress: watch::Receiver<Progress>,
    watchers: [JoinHandle<()>; 2],
    // Last: its drop closes the connection, when nothing uses it any more.
    _connection: Connection,
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
        let properties = ConnectionProperties::default().with_connection_name("pgoutbox".into());
        let unreachable = |error: lapin::Error| Error::Unreachable { host: host(&uri), problem: explain(&error) };
        let opened = answer("connecting", Connection::connect_uri(uri.clone(), properties)).await?;
        let connection = opened.map_err(unreachable)?;
        let blocked = tokio::spawn(watch_blocked(connection.events_listener(), metrics.clone()));
        let channel = rpc("opening a channel", connection.create_channel()).await?;
        let exchange = short(&settings.exchange)?;
        declare(&channel, &exchange, settings.declare).await?;
        rpc("selecting confirms", channel.confirm_select(ConfirmSelectOptions::default())).await?;
        let (confirms, incoming) = mpsc::unbounded_channel();
        let (sender, progress) = watch::channel(Progress::default());
        let frame_max = usize::try_from(connection.configuration().frame_max()).unwrap_or(usize::MAX);
        Ok(Self {
            channel,
            exchange,
            message_bytes_max: settings.message_bytes_max,
            // A content header must fit one frame: 7 bytes before it, 1 behind.
            header_bytes_max: if frame_max == 0 { usize::MAX } else { frame_max.saturating_sub(8) },
            published: 0,
            confirms,
            progress,
            watchers: [blocked, tokio::spawn(Ledger::new(sender).keep(incoming))],
            _connection: connection,
        })
    }
}

impl Sink for RabbitMq {
    async fn publish(&mut self, run: Vec<Message>) -> Result<Receipt, Error> {
        let mut sending = Vec::with_capacity(run.len());
        for message in &run {
            let properties = properties(message, table(&message.headers))?;
            let publish = self.channel.basic_publish(
                self.exchange.clone(),
                short(&message.destination)?,
                BasicPublishOptions { mandatory: true, immediate: false },
                &message.body,
                properties,
            );
            // The first poll takes the delivery tag and queues the frames, so polling in order publishes in order; the
            // future itself ends when the frames are written. Many are written by one call that way.
            let mut publish = Box::pin(publish);
            match futures_util::poll!(&mut publish) {
                Poll::Ready(confirm) => sending.push(Sending::Written(confirm)),
                Poll::Pending => sending.push(Sending::Queued(publish)),
            }
        }
        let mut written = Vec::with_capacity(sending.len());
        let all_written = async {
            for publish in sending {
                let confirm = match publish {
                    Sending::Written(confirm) => confirm,
                    Sending::Queued(publish) => publish.await,
                };
                written.push(confirm.map_err(|error| broken(&error))?);
            }
            Ok(())
        };
        let late = Error::Timeout { during: "writing messages", after: WRITE_TIMEOUT };
        timeout(WRITE_TIMEOUT, all_written).await.unwrap_or(Err(late))?;
        for (message, confirm) in run.into_iter().zip(written) {
            self.published += 1;
            // The ledger ends only after it has said why; the receipt below tells.
            let _ = self.confirms.send(Published { id: message.id, confirm });
        }
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
}

/// A publish on its way to the socket.
enum Sending<F> {
    Queued(Pin<Box<F>>),
    Written(Result<PublisherConfirm, lapin::Error>),
}

fn receipt(mut progress: watch::Receiver<Progress>, last: u64) -> Receipt {
    Receipt::new(async move {
        let settled = progress.wait_for(|progress| progress.settled >= last || progress.failure.is_some()).await;
        match settled {
            Ok(progress) if progress.settled >= last => Ok(()),
            Ok(progress) => Err(progress.failure.clone().unwrap_or_else(gone)),
            Err(_) => Err(gone()),
        }
    })
}

fn gone() -> Error {
    Error::Broken("the session is closed".to_owned())
}

/// A message on its way: its id, and lapin's confirm.
struct Published {
    id: String,
    confirm: PublisherConfirm,
}

/// How many messages, counted from the session's first, the broker holds; and what ended it.
#[derive(Clone, Debug, Default)]
struct Progress {
    settled: u64,
    failure: Option<Error>,
}

/// Keeps the state of every message in flight, in the order of publishing, and tells how far all of them are held.
///
/// Why it is right although lapin misplaces returns: the broker sends a message's return before its ack, and lapin gives a
/// waiting return to the next confirm it completes. When a message's own confirm completes without its return, the return
/// was therefore given to one that completed *earlier*, and that one is ready by now. `keep` looks at all that is ready
/// before it tells anything.
struct Ledger {
    states: VecDeque<(String, State)>,
    /// Messages before the first of `states`.
    settled: u64,
    failure: Option<Error>,
    progress: watch::Sender<Progress>,
}

/// Of a message in flight.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Pending,
    Held,
    Refused(Refusal),
}

impl Ledger {
    fn new(progress: watch::Sender<Progress>) -> Self {
        Self { states: VecDeque::new(), settled: 0, failure: None, progress }
    }

    async fn keep(mut self, mut incoming: mpsc::UnboundedReceiver<Published>) {
        let mut outstanding = FuturesUnordered::new();
        let mut number = 0;
        while self.failure.is_none() {
            // Both arms are cancel-safe. Confirms first: they free the window.
            tokio::select! {
                biased;
                Some((number, outcome)) = outstanding.next() => {
                    self.record(number, outcome);
                    // A `Pending` here means that every future that was ready when this call began has been looked at.
                    while let Some(Some((number, outcome))) = outstanding.next().now_or_never() {
                        self.record(number, outcome);
                    }
                    self.tell();
                }
                published = incoming.recv() => match published {
                    Some(published) => {
                        self.states.push_back((published.id, State::Pending));
                        outstanding.push(Numbered { number, confirm: published.confirm });
                        number += 1;
                    }
                    None => return,
                }
            }
        }
    }

    fn record(&mut self, number: u64, outcome: Result<Confirmation, lapin::Error>) {
        let (returned, state) = match outcome {
            Ok(Confirmation::Ack(returned)) => (returned, State::Held),
            Ok(Confirmation::Nack(returned)) => (returned, State::Refused(Refusal::Nacked)),
            Ok(Confirmation::NotRequested) => return self.fail(Error::Broken("confirms are not on".to_owned())),
            Err(error) => return self.fail(broken(&error)),
        };
        if let Some(returned) = returned {
            self.refuse(&returned);
        }
        let index = number.checked_sub(self.settled).and_then(|index| usize::try_from(index).ok());
        match index.and_then(|index| self.states.get_mut(index)) {
            // A return that came with another's confirm stands: the ack that follows it does not mean held.
            Some((_, pending @ State::Pending)) => *pending = state,
            Some(_) => {}
            None => self.fail(Error::Broken(format!("a confirm for message {number}, which is not in flight"))),
        }
    }

    /// The broker gave a message back. By its id, never by whose confirm it came with.
    fn refuse(&mut self, returned: &BasicReturnMessage) {
        let id = returned.properties.message_id().as_ref().map(ShortString::as_str).unwrap_or_default();
        let refusal = Refusal::Unroutable {
            exchange: returned.delivery.exchange.to_string(),
            routing_key: returned.delivery.routing_key.to_string(),
        };
        let not_refused = |state: &State| !matches!(state, State::Refused(_));
        match self.states.iter_mut().find(|(known, state)| known == id && not_refused(state)) {
            Some((_, state)) => *state = State::Refused(refusal),
            None => self.fail(Error::Broken(format!("a returned message {id:?} that is not in flight"))),
        }
    }

    /// Tells how far everything is held. A refused message ends the session when all before it are held, so that
    /// publishing again begins with exactly that message.
    fn tell(&mut self) {
        while let Some((id, state)) = self.states.front() {
            match state {
                State::Pending => break,
                State::Held => {
                    self.states.pop_front();
                    self.settled += 1;
                }
                State::Refused(refusal) => {
                    let refused = Error::Refused { id: id.clone(), refusal: refusal.clone() };
                    self.fail(refused);
                    break;
                }
            }
        }
        self.progress.send_modify(|progress| {
            progress.settled = self.settled;
            progress.failure = self.failure.clone();
        });
    }

    fn fail(&mut self, error: Error) {
        self.failure.get_or_insert(error);
    }
}

/// A confirm that knows its message's number.
struct Numbered {
    number: u64,
    confirm: PublisherConfirm,
}

impl Future for Numbered {
    type Output = (u64, Result<Confirmation, lapin::Error>);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let number = self.number;
        Pin::new(&mut self.confirm).poll(cx).map(|outcome| (number, outcome))
    }
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
    let text = error.to_string();
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

fn properties(message: &Message, headers: FieldTable) -> Result<BasicProperties, Error> {
    Ok(BasicProperties::default()
        .with_delivery_mode(2)
        .with_message_id(short(&message.id)?)
        .with_type(short(&message.kind)?)
        .with_content_type(message.content_type.into())
        .with_timestamp(message.committed_at / 1_000_000)
        .with_app_id("pgoutbox".into())
        .with_headers(headers))
}

/// lapin's own conversion panics beyond 255 bytes; the mapping has refused such rows before.
fn short(text: &str) -> Result<ShortString, Error> {
    ShortString::try_new(text.to_owned()).map_err(|_| Error::Undeliverable {
        id: "unknown".to_owned(),
        problem: format!("a name of {} bytes where AMQP takes 255", text.len()),
    })
}

fn table(headers: &[(String, HeaderValue)]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in headers {
        // Names were bounded by the mapping; one that is too long after all is cut from nothing, it cannot occur.
        if let Ok(name) = short(name) {
            table.insert(name, amqp(value));
        }
    }
    table
}

fn amqp(value: &HeaderValue) -> AMQPValue {
    match value {
        HeaderValue::Null => AMQPValue::Void,
        HeaderValue::Bool(value) => AMQPValue::Boolean(*value),
        HeaderValue::Int(value) => AMQPValue::LongLongInt(*value),
        HeaderValue::Float(value) => AMQPValue::Double(*value),
        HeaderValue::Text(text) => AMQPValue::LongString(LongString::from(text.as_str())),
        HeaderValue::List(values) => {
            AMQPValue::FieldArray(FieldArray::from(values.iter().map(amqp).collect::<Vec<_>>()))
        }
        HeaderValue::Map(fields) => AMQPValue::FieldTable(table(fields)),
    }
}

/// An upper bound of the content header's bytes: fixed fields and flags, the short strings, the table.
fn header_bytes(message: &Message) -> usize {
    const FIXED: usize = 64;
    message.bytes().saturating_sub(message.body.len()) + message.headers.len() * 2 + FIXED
}
