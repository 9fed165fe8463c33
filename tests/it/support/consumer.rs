//! An independent consumer: binds a queue before the relay runs and keeps what arrives, in order of arrival.
//!
//! The trap: a consumer without acknowledgements. The broker confirms what it has handed to such a consumer without
//! keeping it, and when it stops, what was between the two is gone: a loss that is the consumer's own choice and looks like
//! the relay's. So every delivery is acknowledged after it was kept, and a redelivery of what we have is not news.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicQosOptions, ExchangeDeclareOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, ConnectionProperties, ExchangeKind};
use pgoutbox::lsn::Lsn;

use super::{Outbox, PATIENCE};

/// A stream that says nothing for so long is asked again: RabbitMQ 3.10 was seen to give a consumer nothing that had come
/// after it, twice in about a hundred starts, and what counts is what the stream has.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// One delivery.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    pub(crate) id: String,
    pub(crate) position: (Lsn, i64),
    pub(crate) routing_key: String,
    pub(crate) properties: lapin::BasicProperties,
    pub(crate) body: Vec<u8>,
}

impl Received {
    pub(crate) fn header(&self, name: &str) -> Option<AMQPValue> {
        self.properties.headers().as_ref()?.inner().get(name).cloned()
    }

    pub(crate) fn text_header(&self, name: &str) -> Option<String> {
        match self.header(name)? {
            AMQPValue::LongString(text) => Some(text.to_string()),
            other => Some(format!("{other:?}")),
        }
    }
}

impl From<Delivery> for Received {
    fn from(delivery: Delivery) -> Self {
        let mut received = Received {
            id: delivery.properties.message_id().as_ref().map(ToString::to_string).unwrap_or_default(),
            position: (Lsn::ZERO, -1),
            routing_key: delivery.routing_key.to_string(),
            body: delivery.data,
            properties: delivery.properties,
        };
        let lsn = received.text_header("x-outbox-lsn").and_then(|text| text.parse().ok()).unwrap_or(Lsn::ZERO);
        let seq = match received.header("x-outbox-seq") {
            Some(AMQPValue::LongLongInt(seq)) => seq,
            _ => -1,
        };
        received.position = (lsn, seq);
        received
    }
}

/// How the broker keeps a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Classic,
    Quorum,
    /// Keeps everything, so what it holds is what was published: its count of duplicates is exact.
    Stream,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Classic => "classic",
            Kind::Quorum => "quorum",
            Kind::Stream => "stream",
        }
    }

    /// The name of this outbox's queue of that kind.
    pub(crate) fn queue(self, outbox: &Outbox) -> String {
        format!("{}_{}", outbox.name, self.name())
    }
}

/// All that came out of a queue.
#[derive(Default)]
struct Kept {
    received: Vec<Received>,
    ids: HashSet<String>,
    /// Of a stream: where to go on.
    offset: Option<i64>,
}

/// A queue and all that came out of it.
pub(crate) struct Consumer {
    kept: Arc<Mutex<Kept>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A channel on a connection of its own; the connection lives as long as the channel's task.
pub(crate) async fn channel(amqp: &str) -> (Connection, lapin::Channel) {
    open(amqp).await.unwrap()
}

/// At the first of these nodes, URLs with commas between, that lets us in.
async fn open(amqp: &str) -> Result<(Connection, lapin::Channel), lapin::Error> {
    /// A node that is frozen takes the socket and says nothing.
    const WITHIN: Duration = Duration::from_secs(10);
    let mut failed = lapin::Error::from(std::io::Error::from(std::io::ErrorKind::TimedOut));
    for url in amqp.split(',') {
        let opening = async {
            let connection = Connection::connect(url, ConnectionProperties::default()).await?;
            let channel = connection.create_channel().await?;
            Ok((connection, channel))
        };
        match tokio::time::timeout(WITHIN, opening).await {
            Ok(Ok(opened)) => return Ok(opened),
            Ok(Err(error)) => failed = error,
            Err(_) => {}
        }
    }
    Err(failed)
}

/// Declares the relay's exchange and a durable classic queue bound to it.
pub(crate) async fn bind(outbox: &Outbox, queue: &str, key: &str) {
    bind_kind(outbox, queue, key, Kind::Classic).await;
}

/// Declares the relay's exchange and a durable queue of that kind bound to it.
pub(crate) async fn bind_kind(outbox: &Outbox, queue: &str, key: &str, kind: Kind) {
    let (connection, channel) = channel(&outbox.amqp).await;
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    let exchange = outbox.name.as_str();
    channel.exchange_declare(exchange.into(), ExchangeKind::Topic, durable, FieldTable::default()).await.unwrap();
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.name().into()));
    if kind == Kind::Quorum {
        // Or a consumer that comes back at another node is given what follows before the broker takes from the old
        // connection what was on its way there: the queue's own disorder, that of several consumers, in nobody's publishes.
        arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
    }
    channel.queue_declare(queue.into(), durable, arguments).await.unwrap();
    let options = QueueBindOptions::default();
    channel.queue_bind(queue.into(), exchange.into(), key.into(), options, FieldTable::default()).await.unwrap();
    connection.close(200, "done".into()).await.unwrap();
}

impl Consumer {
    /// Of a queue of its own that takes everything of the outbox's exchange. Comes back when the broker does.
    pub(crate) async fn start(outbox: &Outbox) -> Self {
        Self::start_kind(outbox, Kind::Classic).await
    }

    /// The same, of a queue of that kind.
    pub(crate) async fn start_kind(outbox: &Outbox, kind: Kind) -> Self {
        bind_kind(outbox, &kind.queue(outbox), "#", kind).await;
        Self::of(outbox, kind)
    }

    /// Of that queue, as it is; of a stream, from its beginning.
    pub(crate) fn of(outbox: &Outbox, kind: Kind) -> Self {
        let queue = kind.queue(outbox);
        let kept = Arc::new(Mutex::new(Kept::default()));
        let task = tokio::spawn(consume(outbox.amqp.clone(), queue, kind, kept.clone()));
        Self { kept, task }
    }

    pub(crate) fn received(&self) -> Vec<Received> {
        self.kept.lock().unwrap().received.clone()
    }

    pub(crate) fn has(&self, id: &str) -> bool {
        self.kept.lock().unwrap().ids.contains(id)
    }

    /// How many ids came, each counted once.
    pub(crate) fn distinct(&self) -> usize {
        self.kept.lock().unwrap().ids.len()
    }

    pub(crate) fn count(&self) -> usize {
        self.kept.lock().unwrap().received.len()
    }

    /// Waits for so many distinct ids.
    pub(crate) async fn wait_distinct(&self, count: usize) -> Vec<Received> {
        let mut progress = (Instant::now(), 0);
        loop {
            let distinct = self.distinct();
            if distinct >= count {
                return self.received();
            }
            if distinct > progress.1 {
                progress = (Instant::now(), distinct);
            }
            assert!(progress.0.elapsed() < PATIENCE, "{distinct} of {count} messages came");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Whatever ends a connection, the next one goes on.
async fn consume(amqp: String, queue: String, kind: Kind, kept: Arc<Mutex<Kept>>) {
    let mut was_silent = false;
    loop {
        was_silent = consume_once(&amqp, &queue, kind, &kept, was_silent).await.unwrap_or(false);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// `true`: nothing came for too long.
async fn consume_once(
    amqp: &str,
    queue: &str,
    kind: Kind,
    kept: &Mutex<Kept>,
    was_silent: bool,
) -> Result<bool, lapin::Error> {
    /// Enough to keep the broker busy; what is not acknowledged comes again after a break.
    const PREFETCH: u16 = 1000;
    const ACK_AT_LEAST_EVERY: usize = 200;
    let (connection, channel) = open(amqp).await?;
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    let mut arguments = FieldTable::default();
    if kind == Kind::Stream {
        let next = kept.lock().unwrap().offset.map_or(0, |offset| offset + 1);
        arguments.insert("x-stream-offset".into(), AMQPValue::LongLongInt(next));
    }
    let consumer = channel.basic_consume(queue.into(), "".into(), BasicConsumeOptions::default(), arguments);
    let asked = tokio::time::timeout(PATIENCE, consumer).await;
    let mut consumer = asked.map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))??;
    let (asked_at, mut last, mut waiting) = (Instant::now(), 0, 0);
    loop {
        let patience = match kind {
            _ if waiting > 0 => Duration::from_millis(20),
            Kind::Stream => SILENCE_MAX,
            _ => Duration::MAX,
        };
        let next = tokio::time::timeout(patience, consumer.next()).await;
        match next {
            Ok(Some(delivery)) => {
                let delivery = delivery?;
                if was_silent && last == 0 && asked_at.elapsed() < Duration::from_millis(300) {
                    println!(
                        "{queue}: its consumer was given nothing for {SILENCE_MAX:?}, and more when it asked again"
                    );
                }
                last = delivery.delivery_tag;
                waiting += 1;
                kept.lock().unwrap().keep(delivery);
            }
            Ok(None) => return Ok(false),
            Err(_) if waiting == 0 => {
                let _ = tokio::time::timeout(SILENCE_MAX, connection.close(200, "silent".into())).await;
                return Ok(true);
            }
            Err(_) => waiting = ACK_AT_LEAST_EVERY,
        }
        if waiting >= ACK_AT_LEAST_EVERY {
            channel.basic_ack(last, BasicAckOptions { multiple: true }).await?;
            waiting = 0;
        }
    }
}

impl Kept {
    fn keep(&mut self, delivery: Delivery) {
        let redelivered = delivery.redelivered;
        let received = Received::from(delivery);
        if let Some(AMQPValue::LongLongInt(offset)) = received.header("x-stream-offset") {
            // A stream gives whole chunks, also what lies before the offset asked for.
            if self.offset.is_some_and(|reached| offset <= reached) {
                return;
            }
            self.offset = Some(offset);
        }
        if self.ids.insert(received.id.clone()) || !redelivered {
            self.received.push(received);
        }
    }
}
