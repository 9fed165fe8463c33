//! An independent consumer: binds a queue before the relay runs and keeps what arrives, in order of arrival.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{BasicConsumeOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, ConnectionProperties, ExchangeKind};
use pgoutbox::lsn::Lsn;

use super::{Outbox, PATIENCE};

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

/// A queue and all that came out of it.
pub(crate) struct Consumer {
    received: Arc<Mutex<Vec<Received>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A channel on a connection of its own; the connection lives as long as the channel's task.
pub(crate) async fn channel(amqp: &str) -> (Connection, lapin::Channel) {
    let connection = Connection::connect(amqp, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    (connection, channel)
}

/// Declares the relay's exchange and a durable queue bound to it.
pub(crate) async fn bind(outbox: &Outbox, queue: &str, key: &str) {
    let (connection, channel) = channel(&outbox.amqp).await;
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    let exchange = outbox.name.as_str();
    channel.exchange_declare(exchange.into(), ExchangeKind::Topic, durable, FieldTable::default()).await.unwrap();
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(queue.into(), durable, FieldTable::default()).await.unwrap();
    let options = QueueBindOptions::default();
    channel.queue_bind(queue.into(), exchange.into(), key.into(), options, FieldTable::default()).await.unwrap();
    connection.close(200, "done".into()).await.unwrap();
}

impl Consumer {
    /// Of a queue of its own that takes everything of the outbox's exchange. Comes back when the broker does.
    pub(crate) async fn start(outbox: &Outbox) -> Self {
        let queue = format!("{}_all", outbox.name);
        bind(outbox, &queue, "#").await;
        let received = Arc::new(Mutex::new(Vec::new()));
        let task = tokio::spawn(consume(outbox.amqp.clone(), queue, received.clone()));
        Self { received, task }
    }

    pub(crate) fn received(&self) -> Vec<Received> {
        self.received.lock().unwrap().clone()
    }

    /// How many ids came, each counted once.
    pub(crate) fn distinct(&self) -> usize {
        let received = self.received.lock().unwrap();
        received.iter().map(|received| received.id.as_str()).collect::<HashSet<_>>().len()
    }

    pub(crate) fn count(&self) -> usize {
        self.received.lock().unwrap().len()
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

async fn consume(amqp: String, queue: String, received: Arc<Mutex<Vec<Received>>>) {
    loop {
        if let Ok(connection) = Connection::connect(&amqp, ConnectionProperties::default()).await
            && let Ok(channel) = connection.create_channel().await
        {
            let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
            let consumer = channel.basic_consume(queue.as_str().into(), "".into(), options, FieldTable::default());
            if let Ok(mut consumer) = consumer.await {
                while let Some(Ok(delivery)) = consumer.next().await {
                    received.lock().unwrap().push(delivery.into());
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
