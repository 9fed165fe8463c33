//! From a URL to an open channel with confirms on: TCP, TLS, the protocol's greeting, login, vhost, channel.
//!
//! The trap: a broker that hangs accepts the socket and says nothing, for a night, so every step has a deadline. Dropped on
//! the way, a step leaves nothing behind: the socket closes with its last owner, and no thread or task has begun.

use std::future::Future;
use std::time::Duration;

use amq_protocol_uri::{AMQPScheme, AMQPUri, SASLMechanism};
use bytes::BytesMut;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

use super::frames::{Fault, Word};
use super::link::{Link, Stream};
use super::refusal::Account;
use super::{Settings, tls, wire};
use crate::metrics::Metrics;
use crate::sink::Error;

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

/// Opens a connection and its channel, and makes sure of the exchange.
pub(super) async fn open(uri: &AMQPUri, settings: &Settings, metrics: &Metrics) -> Result<Opened, Error> {
    let account = Account::of(uri, settings);
    let mut opened = enter(uri, &account, metrics).await?;
    let link = &mut opened.link;
    let failed = |fault: Fault| account.failure(&fault);
    let channel = |word: &Word| matches!(word, Word::ChannelOpenOk);
    ask(link, metrics, "opening a channel", wire::channel_open, channel).await?.map_err(failed)?;
    let declare = |out: &mut BytesMut| wire::exchange_declare(out, &settings.exchange, settings.declare);
    let declared = |word: &Word| matches!(word, Word::ExchangeDeclareOk);
    ask(link, metrics, "declaring the exchange", declare, declared).await?.map_err(failed)?;
    let selected = |word: &Word| matches!(word, Word::ConfirmSelectOk);
    ask(link, metrics, "selecting confirms", wire::confirm_select, selected).await?.map_err(failed)?;
    Ok(opened)
}

/// Opens a connection, without a channel.
pub(super) async fn enter(uri: &AMQPUri, account: &Account, metrics: &Metrics) -> Result<Opened, Error> {
    let connecting = async {
        let stream = reach(uri).await.map_err(Fault::Lost)?;
        let mut link = Link::new(stream, FRAME_BYTES_MAX as usize);
        greet(&mut link, uri, metrics).await.map(|greeted| greeted.opened(link))
    };
    answer("connecting", connecting).await?.map_err(|fault| account.outside(&fault))
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

/// A socket to the first address that takes it, with TLS where the URL says so.
async fn reach(uri: &AMQPUri) -> Result<Box<dyn Stream>, String> {
    let name = uri.authority.host.trim_start_matches('[').trim_end_matches(']');
    let addresses = lookup_host((name, uri.authority.port)).await.map_err(|error| error.to_string())?;
    let mut reached = Err("the host has no address".to_owned());
    for address in addresses {
        reached = TcpStream::connect(address).await.map_err(|error| error.to_string());
        if reached.is_ok() {
            break;
        }
    }
    let socket = reached?;
    // A run is written whole; Nagle would hold back its last segment.
    socket.set_nodelay(true).map_err(|error| error.to_string())?;
    Ok(match uri.scheme {
        AMQPScheme::AMQP => Box::new(socket),
        AMQPScheme::AMQPS => Box::new(tls::secure(socket, &uri.authority.host).await?),
    })
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
async fn greet(link: &mut Link, uri: &AMQPUri, metrics: &Metrics) -> Result<Greeted, Fault> {
    link.output.tail().extend_from_slice(wire::PROTOCOL_HEADER);
    let Word::Start { properties, mechanisms } =
        heard(link, metrics, |word| matches!(word, Word::Start { .. })).await?
    else {
        return Err(unexpected());
    };
    let (mechanism, response) = login(uri, &mechanisms)?;
    wire::start_ok(link.output.tail(), mechanism, &response);
    let Word::Tune { frame_max, heartbeat } = heard(link, metrics, |word| matches!(word, Word::Tune { .. })).await?
    else {
        return Err(unexpected());
    };
    let frame_max = smaller(frame_max, uri.query.frame_max.unwrap_or(FRAME_BYTES_MAX));
    if frame_max < FRAME_BYTES_MIN {
        return Err(Fault::Protocol(format!("frame_max is {frame_max}; AMQP asks for {FRAME_BYTES_MIN} at least")));
    }
    let heartbeat = smaller(heartbeat.into(), uri.query.heartbeat.unwrap_or(HEARTBEAT_SECONDS).into());
    wire::tune_ok(link.output.tail(), frame_max, u16::try_from(heartbeat).unwrap_or(u16::MAX));
    link.frame_max = frame_max as usize;
    wire::open(link.output.tail(), &uri.vhost);
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

/// The mechanism and what to say with it.
fn login(uri: &AMQPUri, offered: &str) -> Result<(&'static str, Vec<u8>), Fault> {
    let user = &uri.authority.userinfo;
    let mechanism = uri.query.auth_mechanism.unwrap_or_default();
    let response = match mechanism {
        SASLMechanism::Plain => format!("\0{}\0{}", user.username, user.password).into_bytes(),
        // The client's certificate says who we are.
        SASLMechanism::External => Vec::new(),
        other => return Err(Fault::Protocol(format!("login by {other} is not supported, only PLAIN and EXTERNAL"))),
    };
    if !offered.split(' ').any(|name| name == mechanism.name()) {
        return Err(Fault::Protocol(format!("the broker offers no login by {mechanism}, only by {offered}")));
    }
    Ok((mechanism.name(), response))
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
