//! From a URL to an open channel with confirms on: TCP, TLS, the protocol's greeting, login, vhost, channel.
//!
//! The traps. A broker that hangs accepts the socket and says nothing, for a night, so every step has a deadline. Dropped on
//! the way, a step leaves nothing behind: the socket closes with its last owner, and no thread or task has begun. And the
//! plain and the TLS port stand side by side: who speaks at the wrong one is told so, instead of what his peer made of it.

use std::future::Future;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::time::Duration;

use bytes::BytesMut;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::address::{Address, Mechanism};
use super::frames::{Fault, Word};
use super::link::{Link, Stream};
use super::refusal::Account;
use super::{GOODBYE, Settings, tls, wire};
use crate::lookup::Lookups;
use crate::metrics::Metrics;
use crate::sink::Error;

static LOOKUPS: Lookups = Lookups::new();

/// Connecting, declaring, opening a channel: each answers in milliseconds or not at all.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Half of what `amqp://` URIs usually ask for: a broker that is gone is noticed after two silent intervals.
const HEARTBEAT_SECONDS: u16 = 10;

/// What the kernel asks a silent broker, by when, and how often until it is taken for gone: after three minutes. Heartbeats
/// are faster, but may be switched off, and nothing else ends the wait for a blocked broker that lost its power.
const KEEPALIVE: TcpKeepalive =
    TcpKeepalive::new().with_time(Duration::from_secs(120)).with_interval(Duration::from_secs(20)).with_retries(3);

/// What the kernel may hold that it has not sent. A confirm's time begins when the last byte is written, and on a slow way
/// a buffer of megabytes, as the kernel makes them, takes longer than that: such a row came to no end.
const UNSENT_BYTES_MAX: u32 = 128 * 1024;

/// RabbitMQ's default, for brokers that set no limit, and for what comes before one is agreed on.
const FRAME_BYTES_MAX: u32 = 131_072;

/// The least that AMQP 0-9-1 lets a peer ask for.
const FRAME_BYTES_MIN: u32 = 4096;

/// A connection with one channel, on which confirms are on.
pub(super) struct Opened {
    pub(super) link: Link,
    /// Of the host's addresses this one.
    pub(super) place: SocketAddr,
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
    open_at(&places(address).await?, address, &account, metrics, Some(settings)).await
}

/// Opens a connection, without a channel.
pub(super) async fn enter(address: &Address, account: &Account, metrics: &Metrics) -> Result<Opened, Error> {
    open_at(&places(address).await?, address, account, metrics, None).await
}

/// At the first of a name's addresses where a broker answers: who takes a socket may be none, or one that hangs, and the
/// resolver would name it first for ever.
async fn open_at(
    places: &[SocketAddr],
    address: &Address,
    account: &Account,
    metrics: &Metrics,
    publishing: Option<&Settings>,
) -> Result<Opened, Error> {
    let unreachable = |problem: String| Error::Unreachable { host: address.to_string(), problem };
    let mut unreached = "the host has no address".to_owned();
    let mut failed = None;
    for place in places {
        let socket = match reach(*place, address).await {
            Ok(socket) => socket,
            Err(problem) => {
                unreached = problem;
                continue;
            }
        };
        match speak(socket, *place, address, account, metrics, publishing).await {
            Err(error) if !is_answer(&error) => failed = Some(error),
            answered => return answered,
        }
    }
    Err(failed.unwrap_or_else(|| unreachable(unreached)))
}

/// Whether the broker said what somebody has to mend: by another address it would say the same.
fn is_answer(error: &Error) -> bool {
    match error {
        Error::Lacking(finding) => !finding.remedy.is_empty(),
        Error::Unreachable { .. } | Error::Broken(_) | Error::Timeout { .. } => false,
        _ => true,
    }
}

/// On this socket, as far as it is wanted.
async fn speak(
    socket: TcpStream,
    place: SocketAddr,
    address: &Address,
    account: &Account,
    metrics: &Metrics,
    publishing: Option<&Settings>,
) -> Result<Opened, Error> {
    // What another one said of itself it would never take back here.
    metrics.blocked(None);
    let greeting = async {
        let stream: Box<dyn Stream> = match &address.tls {
            None => Box::new(socket),
            Some(wanted) => Box::new(tls::secure(socket, address, wanted).await.map_err(Fault::Lost)?),
        };
        let mut link = Link::new(stream, FRAME_BYTES_MAX as usize);
        greet(&mut link, address, metrics).await.map(|greeted| greeted.opened(link, place))
    };
    let greeted = timeout(ANSWER_TIMEOUT, greeting).await.unwrap_or_else(|_| Err(Fault::Lost(late(ANSWER_TIMEOUT))));
    let mut opened = greeted.map_err(|fault| account.outside(&fault))?;
    let Some(settings) = publishing else { return Ok(opened) };
    match prepare(&mut opened.link, settings, account, metrics).await {
        Ok(()) => Ok(opened),
        Err(error) => {
            // An exchange is waited for, perhaps for long: no warning in the broker's log for each look.
            if is_answer(&error) {
                leave(&mut opened.link, metrics, "not set up yet").await;
            }
            Err(error)
        }
    }
}

/// Says goodbye; nothing depends on the answer.
pub(super) async fn leave(link: &mut Link, metrics: &Metrics, reason: &str) {
    let say = |out: &mut BytesMut| wire::close(out, reason);
    let closed = |word: &Word| matches!(word, Word::CloseOk);
    let _ = timeout(GOODBYE, ask(link, metrics, "closing", say, closed)).await;
}

async fn prepare(link: &mut Link, settings: &Settings, account: &Account, metrics: &Metrics) -> Result<(), Error> {
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
    Ok(())
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

/// Every address of the host.
async fn places(address: &Address) -> Result<Vec<SocketAddr>, Error> {
    let looking = timeout(patience(address), LOOKUPS.of(&address.host, address.port)).await;
    let found = match looking {
        Ok(places) => places.map_err(|error| error.to_string()),
        Err(_) => Err("no address was found for its name in time".to_owned()),
    };
    let places = found.map_err(|problem| Error::Unreachable { host: address.to_string(), problem })?;
    Ok(address.in_order(places))
}

fn patience(address: &Address) -> Duration {
    address.connection_timeout.unwrap_or(ANSWER_TIMEOUT)
}

async fn reach(place: SocketAddr, address: &Address) -> Result<TcpStream, String> {
    let patience = patience(address);
    let connected = timeout(patience, TcpStream::connect(place)).await;
    let socket = connected.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into())).map_err(|error| match error.kind() {
        ErrorKind::TimedOut => late(patience),
        _ => error.to_string(),
    })?;
    tune(&socket).map_err(|error| error.to_string())?;
    Ok(socket)
}

fn tune(socket: &TcpStream) -> io::Result<()> {
    let set = SockRef::from(socket);
    // A run is written whole; Nagle would hold back its last segment.
    set.set_tcp_nodelay(true)?;
    set.set_tcp_keepalive(&KEEPALIVE)?;
    set.set_tcp_notsent_lowat(UNSENT_BYTES_MAX)
}

/// What the greeting agreed on.
struct Greeted {
    heartbeat: Option<Duration>,
    product: String,
    version: String,
}

impl Greeted {
    fn opened(self, link: Link, place: SocketAddr) -> Opened {
        Opened { link, place, heartbeat: self.heartbeat, product: self.product, version: self.version }
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::sync::mpsc;

    use super::super::Files;
    use super::*;

    /// What is said of a name with two addresses, of which the first says this and closes; and whether the second was asked.
    async fn asked(says: Vec<u8>) -> (Error, bool) {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (first, second) = (listen(), listen());
        let places = [&first, &second].map(|listener| listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let (mut socket, _) = first.accept().unwrap();
            socket.read_exact(&mut [0; 8]).unwrap();
            socket.write_all(&says).unwrap();
        });
        let (asked, was_asked) = mpsc::channel();
        // Ends with the process, where nobody comes.
        std::thread::spawn(move || second.accept().map(|_socket| asked.send(())));
        let address = Address::parse("amqp://rabbit", &Files::default()).unwrap();
        let (exchange, queues) = ("outbox".to_owned(), Vec::new());
        let settings = Settings { addresses: Vec::new(), exchange, declare: true, queues, message_bytes_max: 0 };
        let account = Account::of(&address, &settings);
        let error = open_at(&places, &address, &account, &Metrics::new(), None).await.err().unwrap();
        (error, was_asked.try_recv().is_ok())
    }

    fn close(code: u16, reason: &str) -> Vec<u8> {
        let text = [&[u8::try_from(reason.len()).unwrap()], reason.as_bytes()].concat();
        let payload = [&[0, 10, 0, 50][..], &code.to_be_bytes(), &text, &[0; 4]].concat();
        let size = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&[1, 0, 0][..], &size, &payload, &[0xCE]].concat()
    }

    #[tokio::test]
    async fn the_next_address_of_a_name_is_asked_where_the_first_is_no_broker_or_one_in_trouble() {
        for says in [Vec::new(), b"HTTP/1.1 400 Bad Request".to_vec(), close(541, "INTERNAL_ERROR - vhost '/' is down")]
        {
            let (error, is_second_asked) = asked(says).await;
            assert!(is_second_asked, "{error}");
        }
    }

    #[tokio::test]
    async fn a_broker_that_is_gone_and_was_to_send_no_heartbeats_is_noticed_by_the_kernel() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::parse("amqp://rabbit?heartbeat=0", &Files::default()).unwrap();
        let socket = reach(listener.local_addr().unwrap(), &address).await.unwrap();
        let set = SockRef::from(&socket);
        assert!(set.keepalive().unwrap());
        let asked = set.tcp_keepalive_interval().unwrap() * set.tcp_keepalive_retries().unwrap();
        assert_eq!(set.tcp_keepalive_time().unwrap() + asked, Duration::from_secs(180));
    }

    #[tokio::test]
    async fn the_kernel_holds_little_that_a_slow_way_has_still_to_take() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // A window of a few kilobytes, and nobody who reads.
        SockRef::from(&listener).set_recv_buffer_size(4096).unwrap();
        let address = Address::parse("amqp://rabbit", &Files::default()).unwrap();
        let socket = reach(listener.local_addr().unwrap(), &address).await.unwrap();
        let _peer = listener.accept().unwrap();
        socket.writable().await.unwrap();
        let mut held = 0;
        while let Ok(bytes) = socket.try_write(&[0; 65_536]) {
            held += bytes;
        }
        assert!(held >= 65_536 && held <= 4 * UNSENT_BYTES_MAX as usize, "{held}");
    }

    #[tokio::test]
    async fn a_broker_whose_refusal_somebody_must_mend_has_answered_for_its_name() {
        let (error, is_second_asked) = asked(close(530, "NOT_ALLOWED - vhost / not found")).await;
        assert!(!is_second_asked && error.to_string().contains("vhost / not found"), "{error}");
    }
}
