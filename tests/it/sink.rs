//! The RabbitMQ sink against a real broker: what is returned is never taken for held.
//!
//! The trap: lapin attaches a returned message to whichever confirm completes next. A test with one message at a time never
//! sees it; these publish in bursts, with unroutable messages strewn in.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use lapin::ExchangeKind;
use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use pgoutbox::metrics::Metrics;
use pgoutbox::outbox::{HeaderValue, Message};
use pgoutbox::sink::rabbitmq::{MESSAGE_BYTES_MAX, Settings};
use pgoutbox::sink::{Error, RabbitMq, Refusal, Sink};

use crate::support::{consumer, shared_rabbitmq, unique};

fn message(id: String, destination: &str) -> Message {
    Message {
        id,
        destination: destination.to_owned(),
        kind: "placed".to_owned(),
        content_type: "application/json",
        committed_at: 1_000_000,
        headers: Vec::new(),
        body: Bytes::from_static(b"{}"),
    }
}

/// A session with an exchange of its own, to which a queue is bound for the key `known`.
async fn open() -> RabbitMq {
    let name = unique("sink");
    let url = shared_rabbitmq().url();
    let (connection, channel) = consumer::channel(&url).await;
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    let exchange = name.as_str();
    channel.exchange_declare(exchange.into(), ExchangeKind::Topic, durable, FieldTable::default()).await.unwrap();
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(exchange.into(), durable, FieldTable::default()).await.unwrap();
    let (bound, table) = (QueueBindOptions::default(), FieldTable::default());
    channel.queue_bind(exchange.into(), exchange.into(), "known".into(), bound, table).await.unwrap();
    connection.close(200, "done".into()).await.unwrap();
    let settings = Settings {
        uris: vec![url.parse().unwrap()],
        exchange: name,
        declare: true,
        message_bytes_max: MESSAGE_BYTES_MAX,
    };
    RabbitMq::open(&settings, Arc::new(Metrics::new())).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_settles_exactly_what_came_before_the_first_unroutable_message() {
    const RUNS: usize = 20;
    const RUN: usize = 50;
    for round in 0..40 {
        let unroutable: HashSet<usize> = (0..fastrand::usize(1..50)).map(|_| fastrand::usize(..RUNS * RUN)).collect();
        let first = *unroutable.iter().min().unwrap();
        let mut sink = open().await;
        let mut receipts = Vec::new();
        for run in 0..RUNS {
            let one = |number: usize| {
                let key = if unroutable.contains(&number) { "unknown" } else { "known" };
                message(number.to_string(), key)
            };
            match sink.publish((run * RUN..(run + 1) * RUN).map(one).collect()).await {
                Ok(receipt) => receipts.push(receipt),
                Err(error) => panic!("{error}"),
            }
        }
        for (run, receipt) in receipts.into_iter().enumerate() {
            let settled = tokio::time::timeout(Duration::from_secs(20), receipt).await.unwrap();
            if (run + 1) * RUN <= first {
                settled.unwrap_or_else(|error| panic!("round {round}, run {run}, first {first}: {error}"));
                continue;
            }
            let Err(Error::Refused { id, refusal: Refusal::Unroutable { routing_key, .. } }) = settled else {
                panic!("round {round}, run {run}: {settled:?}, though message {first} is unroutable")
            };
            assert_eq!((id, routing_key.as_str()), (first.to_string(), "unknown"));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_no_frame_could_take_is_refused_before_anything_is_sent() {
    let mut sink = open().await;
    sink.admit(&message("good".to_owned(), "known")).unwrap();
    let mut large = message("large".to_owned(), "known");
    large.headers.push(("text".to_owned(), HeaderValue::Text("x".repeat(200_000))));
    let mut long = message("long".to_owned(), "known");
    long.body = Bytes::from(vec![b'x'; usize::try_from(MESSAGE_BYTES_MAX).unwrap() + 1]);
    for bad in [large, long] {
        let error = sink.admit(&bad).unwrap_err();
        assert!(matches!(error, Error::Undeliverable { .. }), "{error}");
    }
    // The session is as it was.
    sink.publish(vec![message("good".to_owned(), "known")]).await.unwrap().await.unwrap();
    sink.check().await.unwrap();
}
