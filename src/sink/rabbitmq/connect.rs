//! From a URL to an open channel with confirms on: TCP, TLS, the protocol's greeting, login, vhost, channel.
//!
//! The traps. A broker that hangs accepts the socket and says nothing, for a night, so every step has a deadline. Dropped on
//! the way, a step leaves nothing behind: the socket closes with its last owner, and no thread or task has begun. And the
//! plain and the TLS port stand side by side: who speaks at the wrong one is told so, instead of what his peer made of it.

use std::future::Future;
use std::time::Duration;

use bytes::BytesMut;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::address::{Address, Mechanism};
use super::frames::{Fault, Word};
use super::link::{Link, Stream};
use super::refusal::Account;
use super::{Settings, tls, wire};
use crate::lookup::Lookups;
use crate::metrics::Metrics;
use crate::sink::Error;

static LOOKUPS: Lookups = Lookups::new();

/// Connecting, declaring, opening a channel: each answers in milliseconds or not at all.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Half of what `amqp://` URIs usually ask for: a broker that is gone is noticed after two silent intervals.
const HEARTBEAT_SECONDS: u16 = 10;

/// RabbitMQ's default, for brokers that set no limit, and for what comes before one is agreed on.
const FRAME_BYTES_MAX: u32 = 131_072;

/// The least that AMQP 0-9-1 lets a peer ask for.
const FRAME_BYTES_MIN: u32 = 4096;

/// A connection with one channel, on which confirms are on.
pub(super) struct Opened {
    pub(super) link: Link,
    /// `None`: off, by the URL's will and the broker's.
    pub(super) heartbeat: Option<Duration>,
    /// As the broker says it, such as `RabbitMQ` and `3.10.8`.
    pub(super) product: String,
    pub(super) version: String,
}

/// An answer within the deadline.
pub(super) async fn answer<T>(during: &'static str, pending: impl Future<Output = T>) -> Result<T, Error> {
    timeout(ANSWER_TIMEOUT, pending).await.map_err(|_| Error::Timeout { during, after: ANSWER_TIMEOUT })
}

/// Opens a connection and its channel, and makes sure of the exchange and of the queues that must be there.
pub(super) async fn open(address: &Address, settings: &Settings, metrics: &Metrics) -> Result<Opened, Error> {
    let account = Account::of(address, settings);
    let mut opened = enter(address, &account, metrics).await?;
    let link = &mut opened.link;
    let failed = |fault: Fault| account.failure(&fault);
    let channel = |word: &Word| matches!(word, Word::ChannelOpenOk);
    ask(link, metrics, "opening a channel", wire::channel_open, channel).await?.map_err(failed)?;
    let declare = |out: &mut BytesMut| wire::exchange_declare(out, &settings.exchange, settings.declare);
    let declared = |word: &Word| matches!(word, Word::ExchangeDeclareOk);
    ask(link, metrics, "declaring the exchange", declare, declared).await?.map_err(failed)?;
    for queue in &settings.queues {
        let look = |out: &mut BytesMut| wire::queue_declare_passive(out, queue);
        let is_there = |word: &Word| matches!(word, Word::QueueDeclareOk);
        ask(link, metrics, "looking at a queue of rabbitmq.queues", look, is_there).await?.map_err(failed)?;
    }
    let selected = |word: &Word| matches!(word, Word::ConfirmSelectOk);
    ask(link, metrics, "selecting confirms", wire::confirm_select, selected).await?.map_err(failed)?;
    Ok(opened)
}

/// Opens a connection, without a channel.
pub(super) async fn enter(address: &Address, account: &Account, metrics: &Metrics) -> Result<Opened, Error> {
    let unreachable = |problem: String| Error::Unreachable { host: address.to_string(), problem };
    let socket = reach(address).await.map_err(unreachable)?;
    let greeting = async {
        let stream: Box<dyn Stream> = match &address.tls {
            None => Box::new(socket),
            Some(wanted) => Box::new(tls::secure(socket, address, wanted).await.map_err(Fault::Lost)?),
        };
        let mut link = Link::new(stream, FRAME_BYTES_MAX as usize);
        greet(&mut link, address, metrics).await.map(|greeted| greeted.opened(link))
    };
    let greeted = timeout(ANSWER_TIMEOUT, greeting).await.map_err(|_| unreachable(late(ANSWER_TIMEOUT)))?;
    greeted.map_err(|fault| account.outside(&fault))
}

/// Says something and waits for its answer.
pub(super) async fn ask(
    link: &mut Link,
    metrics: &Metrics,
    during: &'static str,
    say: impl FnOnce(&mut BytesMut),
    wanted: impl Fn(&Word) -> bool,
) -> Result<Result<Word, Fault>, Error> {
    say(link.output.tail());
    answer(during, heard(link, metrics, wanted)).await
}

fn late(after: Duration) -> String {
    format!("it did not answer within {after:?}")
}

/// A socket to the first address of the host that takes it.
async fn reach(address: &Address) -> Result<TcpStream, String> {
    let patience = address.connection_timeout.unwrap_or(ANSWER_TIMEOUT);
    let looking = timeout(patience, LOOKUPS.of(&address.host, address.port)).await;
    let places = looking.map_err(|_| "no address was found for its name in time".to_owned())?;
    let mut reached = Err("the host has no address".to_owned());
    for place in places.map_err(|error| error.to_string())? {
        let connected = timeout(patience, TcpStream::connect(place)).await;
        reached = connected.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())).map_err(|error| {
            match error.kind() {
                std::io::ErrorKind::TimedOut => late(patience),
                _ => error.to_string(),
            }
        });
        if reached.is_ok() {
            break;
        }
    }
    let socket = reached?;
    // A run is written whole; Nagle would hold back its last segment.
    socket.set_nodelay(true).map_err(|error| error.to_string())?;
    Ok(socket)
}

/// What the greeting agreed on.
struct Greeted {
    heartbeat: Option<Duration>,
    product: String,
    version: String,
}

impl Greeted {
    fn opened(self, link: Link) -> Opened {
        Opened { link, heartbeat: self.heartbeat, product: self.product, version: self.version }
    }
}

/// Protocol header, start, tune, open.
async fn greet(link: &mut Link, address: &Address, metrics: &Metrics) -> Result<Greeted, Fault> {
    link.output.tail().extend_from_slice(wire::PROTOCOL_HEADER);
    let start = heard(link, metrics, |word| matches!(word, Word::Start { .. })).await;
    let Word::Start { properties, mechanisms } = start.map_err(|fault| stranger(link, address, fault))? else {
        return Err(unexpected());
    };
    let mechanism = mechanism(address, &mechanisms)?;
    wire::start_ok(link.output.tail(), mechanism.name(), &response(mechanism, address));
    let Word::Tune { frame_max, heartbeat } = heard(link, metrics, |word| matches!(word, Word::Tune { .. })).await?
    else {
        return Err(unexpected());
    };
    let frame_max = match smaller(frame_max, address.frame_max.unwrap_or(FRAME_BYTES_MAX)) {
        0 => FRAME_BYTES_MAX,
        agreed => agreed,
    };
    if frame_max < FRAME_BYTES_MIN {
        return Err(Fault::Protocol(format!("frame_max is {frame_max}; AMQP asks for {FRAME_BYTES_MIN} at least")));
    }
    let heartbeat = smaller(heartbeat.into(), address.heartbeat.unwrap_or(HEARTBEAT_SECONDS).into());
    wire::tune_ok(link.output.tail(), frame_max, u16::try_from(heartbeat).unwrap_or(u16::MAX));
    link.frame_max = frame_max as usize;
    wire::open(link.output.tail(), &address.vhost);
    heard(link, metrics, |word| matches!(word, Word::OpenOk)).await?;
    let property = |name: &str| {
        let found = properties.iter().find(|(property, _)| property == name);
        found.map(|(_, value)| value.clone()).unwrap_or_default()
    };
    Ok(Greeted {
        heartbeat: (heartbeat > 0).then(|| Duration::from_secs(heartbeat.into())),
        product: property("product"),
        version: property("version"),
    })
}

/// Of two limits; 0 is none.
fn smaller(a: u32, b: u32) -> u32 {
    if a == 0 || b == 0 { a.max(b) } else { a.min(b) }
}

/// The first of ours that the broker offers.
fn mechanism(address: &Address, offered: &str) -> Result<Mechanism, Fault> {
    let is_offered = |mechanism: &&Mechanism| offered.split(' ').any(|name| name == mechanism.name());
    address.mechanisms.iter().find(is_offered).copied().ok_or_else(|| {
        let ours: Vec<&str> = address.mechanisms.iter().map(|mechanism| mechanism.name()).collect();
        let remedy = if ours.contains(&"EXTERNAL") {
            "enable its plugin rabbitmq_auth_mechanism_ssl and add EXTERNAL to its auth_mechanisms"
        } else {
            "name one of the latter as auth_mechanism in rabbitmq.url"
        };
        Fault::Lost(format!("the broker offers no login by {}, only by {offered}. Remedy: {remedy}", ours.join(" or ")))
    })
}

/// What to say with a mechanism.
fn response(mechanism: Mechanism, address: &Address) -> Vec<u8> {
    match mechanism {
        Mechanism::Plain => format!("\0{}\0{}", address.user, address.password).into_bytes(),
        Mechanism::Amqplain => wire::amqplain(&address.user, &address.password),
        Mechanism::External => Vec::new(),
    }
}

/// What ended a greeting before the broker's first word: perhaps it is none, or at its other port.
fn stranger(link: &Link, address: &Address, fault: Fault) -> Fault {
    const ALERT: u8 = 21;
    const HANDSHAKE: u8 = 22;
    let is_plain = address.tls.is_none();
    match (link.first_byte(), fault) {
        (Some(ALERT | HANDSHAKE), _) if is_plain => Fault::Lost(
            "the peer speaks TLS. Remedy: say amqps:// in rabbitmq.url, or name the broker's plain port".to_owned(),
        ),
        (Some(_), Fault::Protocol(problem)) => Fault::Lost(format!(
            "{problem}. Remedy: see that host and port are the broker's: by default 5672, and 5671 for amqps://"
        )),
        (None, Fault::Lost(problem)) if is_plain => Fault::Lost(format!(
            "{problem}. Remedy: see that it runs; if this is its TLS port, say amqps:// in rabbitmq.url"
        )),
        // What the broker says of a certificate gets lost when its reset overtakes it.
        (None, Fault::Lost(problem)) if !problem.contains("Remedy: ") => Fault::Lost(format!(
            "{problem}. Remedy: its log says why; it may demand a client certificate, or not trust ours \
             (rabbitmq.tls_certificate)"
        )),
        (_, fault) => fault,
    }
}

fn unexpected() -> Fault {
    Fault::Protocol("an unexpected method".to_owned())
}

/// Waits for the one answer that can come now.
async fn heard(link: &mut Link, metrics: &Metrics, wanted: impl Fn(&Word) -> bool) -> Result<Word, Fault> {
    loop {
        while let Some(word) = link.word()? {
            match word {
                Word::Heartbeat => {}
                Word::Blocked(reason) => super::session::blocked(metrics, reason),
                Word::Unblocked => super::session::unblocked(metrics),
                Word::Close(close) | Word::ChannelClose(close) => return Err(Fault::Closed(close)),
                word if wanted(&word) => return Ok(word),
                _ => return Err(unexpected()),
            }
        }
        link.moved().await?;
    }
}
