//! RabbitMQ over AMQP 0-9-1: a durable topic exchange, persistent and mandatory messages, publisher confirms pipelined.
//!
//! Our own client of the fifteen methods that a publisher needs, because it decides what counts as held: it sees returns
//! and confirms in the order of the wire, and writes a run in one call. In reading order: `address` (the URL), `connect`
//! (from there to a channel, with `tls`), `session` (one task that owns the rest), `link` (the socket), `wire` (what we
//! say), `frames` (what the broker says), `ledger` (what it holds), `refusal` (what it means when it says no). `probe` and
//! `management` look, for `check`.
//!
//! The trap: a connection that survives an error looks like help. Only the relay knows from where to publish again, so
//! nothing here recovers: the first fault ends the session.

mod address;
mod connect;
mod frames;
mod ledger;
mod link;
mod management;
pub mod probe;
mod refusal;
mod session;
mod tls;
mod wire;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

pub use self::address::{Address, Files};
use self::connect::answer;
use self::frames::FRAME_OVERHEAD;
use self::refusal::Account;
pub use self::refusal::set_permissions;
use self::session::{Command, Session};
use super::{Error, Receipt, Sink};
use crate::finding::{Finding, Remedy};
use crate::metrics::Metrics;
use crate::outbox::Message;

/// RabbitMQ (3.10 and 4.0 alike) lets publishers in before each of its streams has a leader again, and confirms what other
/// queues took meanwhile: the stream never has it. Up to 1.2 s of that were seen after a start, on a busy machine; where a
/// stream is the only queue, it is returned. `rabbitmq.queues` waits for the queues themselves.
const STREAMS_NEED: Duration = Duration::from_secs(3);

/// How long a broker may take to answer a goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// `max_message_size`'s default since RabbitMQ 4.0, and what is taken for it where the version is not known.
pub const MESSAGE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// `max_message_size`'s default until RabbitMQ 3.13.
const MESSAGE_BYTES_MAX_3: u64 = 128 * 1024 * 1024;

/// Where the broker is and what messages go to.
#[derive(Clone)]
pub struct Settings {
    /// Tried in order.
    pub addresses: Vec<Address>,
    /// The exchange.
    pub exchange: String,
    /// Declare the exchange, or only look that it exists.
    pub declare: bool,
    /// Queues that must be there before a session's first message.
    pub queues: Vec<String>,
    /// The broker's `max_message_size`; 0: its version's default. A larger body would close the channel.
    pub message_bytes_max: u64,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut printed = f.debug_struct("Settings");
        printed.field("addresses", &self.addresses).field("exchange", &self.exchange).finish_non_exhaustive()
    }
}

impl Settings {
    /// Where somebody else could listen or pose as the broker, and what to do about it; told once, at start.
    pub fn warnings(&self) -> Vec<String> {
        let of = |address: &Address| {
            match &address.tls {
            Some(wanted) => tls::warnings(wanted),
            None if address.is_loopback() => Vec::new(),
            None => vec![
                "amqp:// is not encrypted: whoever is in between reads the password and every message. Remedy: say amqps:// \
                 and name the broker's TLS port (by default 5671)"
                    .to_owned(),
            ],
        }
        };
        let told = |address: &Address| -> Vec<String> {
            of(address).into_iter().map(|warning| format!("RabbitMQ at {address}: {warning}")).collect()
        };
        self.addresses.iter().flat_map(told).collect()
    }
}

/// The hosts of a broker, and what it is worth to remember from one session to the next.
#[derive(Debug)]
pub struct Hosts {
    settings: Settings,
    metrics: Arc<Metrics>,
    /// That of the last session, and which of its addresses.
    last: Option<(usize, SocketAddr)>,
    was_away: bool,
}

impl Hosts {
    /// None was tried yet.
    pub fn new(settings: Settings, metrics: Arc<Metrics>) -> Self {
        Self { settings, metrics, last: None, was_away: false }
    }

    /// Opens a session, as [`RabbitMq::open`] does. A broker that was away is given time for its streams.
    ///
    /// # Errors
    /// Every host's, as one.
    pub async fn open(&mut self) -> Result<RabbitMq, Error> {
        let opened = RabbitMq::open(&self.settings, self.metrics.clone()).await;
        let was_away = std::mem::replace(&mut self.was_away, opened.is_err());
        let session = opened?;
        self.last = Some((session.host, session.place));
        // Where somebody has said what to wait for, it is there.
        if was_away && self.settings.queues.is_empty() {
            tracing::debug!("the broker was away: its streams are given {STREAMS_NEED:?}");
            sleep(STREAMS_NEED).await;
        }
        Ok(session)
    }

    /// From now on the host of the last session is tried when all others have been, and its address when all others of that
    /// host have been.
    pub fn put_last(&mut self) {
        let addresses = &mut self.settings.addresses;
        if let Some((host, place)) = self.last.take().filter(|(host, _)| *host < addresses.len()) {
            let mut address = addresses.remove(host);
            tracing::debug!(host = %address, %place, "it held back its confirms: others come first from now on");
            address.put_last(place);
            addresses.push(address);
        }
    }
}

/// A broker session: one connection, one channel.
pub struct RabbitMq {
    session: Session,
    host: usize,
    place: SocketAddr,
    server: String,
    message_bytes_max: u64,
    header_bytes_max: usize,
    published: u64,
}

impl RabbitMq {
    /// Opens a session with the first host that lets us in, and makes sure of the exchange.
    ///
    /// # Errors
    /// Every host's, as one.
    pub async fn open(settings: &Settings, metrics: Arc<Metrics>) -> Result<Self, Error> {
        if !wire::short_fits(&settings.exchange) {
            let problem = format!("the exchange's name has {} bytes where AMQP takes 255", settings.exchange.len());
            return Err(Error::Setup(Finding::new(problem, Remedy::act("set rabbitmq.exchange to a shorter one"))));
        }
        let mut errors = Vec::new();
        for (host, address) in settings.addresses.iter().enumerate() {
            match Self::open_at(address, settings, &metrics).await {
                Ok(session) => return Ok(Self { host, ..session }),
                Err(error) => errors.push(error),
            }
        }
        Err(all(errors))
    }

    async fn open_at(address: &Address, settings: &Settings, metrics: &Arc<Metrics>) -> Result<Self, Error> {
        let opened = connect::open(address, settings, metrics).await?;
        let message_bytes_max = match settings.message_bytes_max {
            0 => message_bytes_max(&opened.product, &opened.version),
            set => set,
        };
        let server = format!("{} {}", opened.product, opened.version);
        let place = opened.place;
        let header_bytes_max = opened.link.frame_max.saturating_sub(FRAME_OVERHEAD);
        let session = Session::start(opened, Account::of(address, settings), metrics.clone());
        tracing::debug!(server, message_bytes_max, "a session with the broker is open");
        Ok(Self { session, host: 0, place, server, message_bytes_max, header_bytes_max, published: 0 })
    }

    /// The broker's product and version, as it says them: `RabbitMQ 3.10.8`.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// The largest body that is taken for possible, in bytes.
    pub fn message_bytes_max(&self) -> u64 {
        self.message_bytes_max
    }
}

impl Sink for RabbitMq {
    async fn publish(&mut self, run: Vec<Message>) -> Result<Receipt, Error> {
        self.published += run.len() as u64;
        self.session.ask(Command::Publish(run));
        Ok(self.session.receipt(self.published))
    }

    fn admit(&self, message: &Message) -> Result<(), Error> {
        let limits = Limits { body_bytes: self.message_bytes_max, header_bytes: self.header_bytes_max };
        match limits.forbid(message, message.body.len() as u64) {
            Some(problem) => Err(Error::Undeliverable { id: message.id.to_string(), problem }),
            None => Ok(()),
        }
    }

    async fn failed(&mut self) -> Error {
        self.session.failed().await
    }

    async fn check(&mut self) -> Result<(), Error> {
        let (answered, answer_of_broker) = oneshot::channel();
        self.session.ask(Command::Check(answered));
        answer("declaring the exchange", answer_of_broker).await?.map_err(|_| self.session.failure())
    }

    async fn close(mut self) {
        // Without it the broker logs a warning. It may be gone already: all the same.
        self.session.ask(Command::Close);
        let _ = timeout(GOODBYE, self.session.ended()).await;
    }
}

/// What several hosts said: one that was reached and needs a human tells more than one that was not.
fn all(mut errors: Vec<Error>) -> Error {
    let setup = errors.iter().position(|error| matches!(error, Error::Setup(_)));
    match errors.len() {
        0 => Error::Broken("no host is configured".to_owned()),
        1 => errors.remove(0),
        _ => match setup {
            Some(index) => errors.remove(index),
            None => Error::Hosts(errors.iter().map(ToString::to_string).collect()),
        },
    }
}

/// What the broker takes of one message.
struct Limits {
    body_bytes: u64,
    header_bytes: usize,
}

impl Limits {
    /// Why this message, with a body of so many bytes, is impossible.
    fn forbid(&self, message: &Message, body: u64) -> Option<String> {
        let (key, max) = (&*message.destination, self.body_bytes);
        match wire::header_bytes(message) {
            Err(name) => Some(format!("a name of {} bytes where AMQP takes 255", name.len())),
            Ok(_) if !wire::short_fits(key) => {
                Some(format!("its routing key has {} bytes where AMQP takes 255", key.len()))
            }
            Ok(_) if body > max => {
                // The remedy for such a row is to skip it, which a limit that is set too low is no reason for.
                Some(format!(
                    "its body has {body} bytes; the broker takes {max} (where its max_message_size is larger, set \
                     rabbitmq.message_bytes_max to that)"
                ))
            }
            Ok(header) if header > self.header_bytes => Some(format!(
                "its headers have {header} bytes; one frame takes {} (frame_max: the broker's, or what rabbitmq.url asks \
                     for)",
                self.header_bytes
            )),
            Ok(_) => None,
        }
    }
}

/// The default of a broker's `max_message_size`.
fn message_bytes_max(product: &str, version: &str) -> u64 {
    let major = version.split('.').next().and_then(|major| major.parse::<u32>().ok());
    match (product, major) {
        ("RabbitMQ", Some(3)) => MESSAGE_BYTES_MAX_3,
        _ => MESSAGE_BYTES_MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_held_back_its_confirms_goes_last_and_so_does_its_address() {
        let addresses = Address::parse_all("amqp://a,amqp://b", &Files::default()).unwrap();
        let (exchange, queues) = ("outbox".to_owned(), Vec::new());
        let settings = Settings { addresses, exchange, declare: true, queues, message_bytes_max: 0 };
        let mut hosts = Hosts::new(settings, Arc::default());
        let places = [1, 2].map(|last| SocketAddr::from(([192, 0, 2, last], 5672)));
        hosts.put_last();
        hosts.last = Some((0, places[0]));
        hosts.put_last();
        let order: Vec<String> = hosts.settings.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(order, ["b:5672", "a:5672"]);
        assert_eq!(hosts.settings.addresses[1].in_order(places.to_vec()), [places[1], places[0]]);
        assert_eq!(hosts.settings.addresses[0].in_order(places.to_vec()), places);
    }
}
