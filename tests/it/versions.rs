//! The main job once on every PostgreSQL and every RabbitMQ that is supported.
//!
//! The trap: a version that nobody runs is supported on paper only.

use futures_util::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use pgoutbox::servers::{Postgres, RabbitMq};
use tokio::time::timeout;

use crate::support::consumer::{Consumer, Received, channel};
use crate::support::load::{Oracle, Writers, judge};
use crate::support::relay::Relay;
use crate::support::{Outbox, PATIENCE, POSTGRES_VERSIONS, postgres_bin, rabbitmq_4, shared_rabbitmq};

/// Writers, a consumer, a relay, and an oracle over all; every kind of queue holds the same in the same order.
async fn deliver(postgres: &Postgres, rabbitmq: &RabbitMq) {
    let outbox = Outbox::create(postgres, rabbitmq).await;
    let consumer = Consumer::start(&outbox).await;
    bind_every_kind(&outbox).await;
    let oracle = Oracle::start(&outbox).await;
    let relay = Relay::start(&outbox);
    relay.ready().await;
    let written = Writers::start(&outbox, 4, 2_000, 100, fastrand::u64(..)).done().await;
    let received = consumer.wait_distinct(written).await;
    assert_eq!(judge(&received, &oracle.ids(&outbox).await), 0, "duplicates");
    outbox.wait_confirmed(outbox.current().await).await;
    assert_eq!(relay.stop(), 0);
    for kind in KINDS {
        assert!(
            held(&outbox, kind, written).await == received.iter().map(|one| one.id.clone()).collect::<Vec<_>>(),
            "{kind}"
        );
    }
}

const KINDS: [&str; 2] = ["quorum", "stream"];

/// Beside the consumer's classic queue.
async fn bind_every_kind(outbox: &Outbox) {
    let (connection, channel) = channel(&outbox.amqp).await;
    let exchange = outbox.name.as_str();
    for kind in KINDS {
        let queue = format!("{exchange}_{kind}");
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(queue.as_str().into(), durable, arguments).await.unwrap();
        let (options, none) = (QueueBindOptions::default(), FieldTable::default());
        channel.queue_bind(queue.as_str().into(), exchange.into(), "#".into(), options, none).await.unwrap();
    }
    connection.close(200, "done".into()).await.unwrap();
}

/// The ids of the first `count` messages that this queue holds.
async fn held(outbox: &Outbox, kind: &str, count: usize) -> Vec<String> {
    let (_connection, channel) = channel(&outbox.amqp).await;
    // A stream is read only with a prefetch, and from where one says.
    channel.basic_qos(100, BasicQosOptions::default()).await.unwrap();
    let mut arguments = FieldTable::default();
    if kind == "stream" {
        arguments.insert("x-stream-offset".into(), AMQPValue::LongString("first".into()));
    }
    let queue = format!("{}_{kind}", outbox.name);
    let options = BasicConsumeOptions::default();
    let consumer = channel.basic_consume(queue.as_str().into(), "".into(), options, arguments).await.unwrap();
    let mut deliveries = consumer.take(count);
    let mut ids = Vec::new();
    while ids.len() < count {
        let delivery = timeout(PATIENCE, deliveries.next()).await.expect("a message is missing").unwrap().unwrap();
        delivery.ack(BasicAckOptions::default()).await.unwrap();
        ids.push(Received::from(delivery).id);
    }
    ids
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_postgres_delivers_in_order() {
    for version in POSTGRES_VERSIONS {
        deliver(&Postgres::start_from(&postgres_bin(version), &[]).unwrap(), shared_rabbitmq()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rabbitmq_4_delivers_in_order() {
    let rabbitmq = RabbitMq::start_from(&rabbitmq_4()).unwrap();
    deliver(&Postgres::start(&[]).unwrap(), &rabbitmq).await;
}
