//! The RabbitMQ sink against a real broker: what is returned is never taken for held.
//!
//! The trap: a return belongs to one message of many in flight, and which one is easily got wrong. A test with one message at
//! a time never sees it; these publish in bursts, with unroutable messages strewn in.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use lapin::ExchangeKind;
use lapin::options::{BasicGetOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use pgoutbox::metrics::Metrics;
use pgoutbox::outbox::{HeaderValue, Message};
use pgoutbox::servers;
use pgoutbox::sink::rabbitmq::{Address, Files, MESSAGE_BYTES_MAX, Settings};
use pgoutbox::sink::{Error, RabbitMq, Refusal, Sink};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

use crate::support::{consumer, shared_rabbitmq, unique};

fn message(id: String, destination: &str) -> Message {
    Message {
        id: id.into(),
        destination: destination.into(),
        kind: "placed".into(),
        content_type: "application/json",
        committed_at: 1_000_000,
        body: Bytes::from_static(b"{}"),
        ..Message::default()
    }
}

fn addresses(url: &str) -> Vec<Address> {
    Address::parse_all(url, &Files::default()).unwrap()
}

/// A session with an exchange of its own, to which a queue is bound for the key `known`.
async fn open() -> RabbitMq {
    open_at(&shared_rabbitmq().url(), &unique("sink"), MESSAGE_BYTES_MAX).await
}

/// At this broker, with this exchange and queue.
async fn open_at(url: &str, name: &str, message_bytes_max: u64) -> RabbitMq {
    let (connection, channel) = consumer::channel(url).await;
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    let exchange = name;
    channel.exchange_declare(exchange.into(), ExchangeKind::Topic, durable, FieldTable::default()).await.unwrap();
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(exchange.into(), durable, FieldTable::default()).await.unwrap();
    let (bound, table) = (QueueBindOptions::default(), FieldTable::default());
    channel.queue_bind(exchange.into(), exchange.into(), "known".into(), bound, table).await.unwrap();
    connection.close(200, "done".into()).await.unwrap();
    let settings = Settings {
        addresses: addresses(url),
        exchange: name.to_owned(),
        declare: true,
        queues: Vec::new(),
        message_bytes_max,
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
    large.headers.push(("text".into(), HeaderValue::Text("x".repeat(200_000).into())));
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_brokers_version_says_how_large_a_body_may_be_unless_a_setting_does() {
    let rabbitmq = shared_rabbitmq();
    let sink = open_at(&rabbitmq.url(), &unique("sink"), 0).await;
    let version = rabbitmq.ctl(&["version"]).unwrap();
    assert_eq!(sink.server(), format!("RabbitMQ {}", version.trim()));
    let expected = if version.starts_with("3.") { 128 << 20 } else { MESSAGE_BYTES_MAX };
    assert_eq!(sink.message_bytes_max(), expected);
    assert_eq!(open_at(&rabbitmq.url(), &unique("sink"), 7).await.message_bytes_max(), 7);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_of_every_size_arrive_as_they_are() {
    const FRAME_MAX: usize = 131_072;
    let (url, name) = (shared_rabbitmq().url(), unique("sink"));
    for frame_max in [FRAME_MAX, 4096] {
        let url = format!("{url}?frame_max={frame_max}");
        let mut sink = open_at(&url, &name, MESSAGE_BYTES_MAX).await;
        let sizes = [0, 1, frame_max - 8, frame_max - 7, 2 * (frame_max - 8), 1 << 20, 8 << 20];
        let one = |size: &usize| {
            let mut message = message(size.to_string(), "known");
            message.body = (0..*size).map(|index| u8::try_from(index % 251).unwrap()).collect();
            message
        };
        let run: Vec<Message> = sizes.iter().map(one).collect();
        sink.publish(run.clone()).await.unwrap().await.unwrap();
        let (_connection, channel) = consumer::channel(&shared_rabbitmq().url()).await;
        for message in run {
            let options = BasicGetOptions { no_ack: true };
            let got = channel.basic_get(name.as_str().into(), options).await.unwrap().unwrap().delivery;
            assert_eq!(got.properties.message_id().as_ref().unwrap().as_str(), &*message.id);
            assert!(got.data == message.body, "a body of {} bytes with frame_max {frame_max}", message.id);
        }
        sink.close().await;
    }
}

/// A way to the broker on which what we write is passed on only in so many bytes at a time, and not at all once they add up
/// to `stop_at`, until `gone_on`. Gives the port, and when the client's end has closed, how much came in all.
async fn narrow_way(
    broker: u16,
    piece: usize,
    stop_at: usize,
    gone_on: Arc<Notify>,
) -> (u16, tokio::task::JoinHandle<usize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let way = tokio::spawn(async move {
        let (client, _) = listener.accept().await.unwrap();
        let server = TcpStream::connect(("127.0.0.1", broker)).await.unwrap();
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        let answers = tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
        let (mut buffer, mut passed) = (vec![0; piece], 0);
        while passed < stop_at {
            let Ok(count @ 1..) = from_client.read(&mut buffer).await else { break };
            passed += count;
            to_server.write_all(&buffer[..count]).await.unwrap();
            tokio::task::yield_now().await;
        }
        if passed >= stop_at {
            // Nobody reads until the client has given up; then the end must come, after what stood in the sockets.
            gone_on.notified().await;
            while let Ok(count @ 1..) = from_client.read(&mut buffer).await {
                passed += count;
            }
        }
        answers.abort();
        passed
    });
    (port, way)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_runs_in_flight_through_a_slow_reader_settle_in_order() {
    let (port, _way) = narrow_way(shared_rabbitmq().port(), 1500, usize::MAX, Arc::default()).await;
    let name = unique("sink");
    drop(open_at(&shared_rabbitmq().url(), &name, 0).await);
    let settings = Settings {
        addresses: addresses(&format!("amqp://guest:guest@127.0.0.1:{port}/%2f")),
        exchange: name,
        declare: true,
        queues: Vec::new(),
        message_bytes_max: 0,
    };
    let mut sink = RabbitMq::open(&settings, Arc::new(Metrics::new())).await.unwrap();
    let mut receipts = Vec::new();
    for run in 0..100 {
        let one = |number: usize| {
            let mut message = message(format!("{run}.{number}"), "known");
            message.body = Bytes::from(vec![b'x'; fastrand::usize(..10_000)]);
            message
        };
        receipts.push(sink.publish((0..40).map(one).collect()).await.unwrap());
    }
    // The last one first: what was before it must be settled by then.
    let last = receipts.pop().unwrap();
    tokio::time::timeout(Duration::from_secs(60), last).await.unwrap().unwrap();
    for receipt in receipts {
        tokio::time::timeout(Duration::ZERO, receipt).await.expect("settled before the last").unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_is_dropped_in_the_middle_of_a_run_leaves_no_socket_behind() {
    const LARGE: usize = 64 << 20;
    let gone = Arc::new(Notify::new());
    let (port, way) = narrow_way(shared_rabbitmq().port(), 1500, 100_000, gone.clone()).await;
    let settings = Settings {
        addresses: addresses(&format!("amqp://guest:guest@127.0.0.1:{port}/%2f")),
        exchange: unique("sink"),
        declare: true,
        queues: Vec::new(),
        message_bytes_max: 0,
    };
    let mut sink = RabbitMq::open(&settings, Arc::new(Metrics::new())).await.unwrap();
    let mut large = message("large".to_owned(), "known");
    large.body = Bytes::from(vec![b'x'; LARGE]);
    let receipt = sink.publish(vec![large]).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(200), receipt).await.is_err());
    drop(sink);
    gone.notify_one();
    let passed = tokio::time::timeout(Duration::from_secs(20), way).await.expect("the socket stays open").unwrap();
    assert!(passed < LARGE, "all {passed} bytes came: nothing was dropped in the middle");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_only_the_broker_knows_to_be_too_large_is_a_matter_of_setting_up() {
    let rabbitmq = servers::RabbitMq::start().unwrap();
    rabbitmq.ctl(&["eval", "application:set_env(rabbit, max_message_size, 1000)."]).unwrap();
    let mut sink = open_at(&rabbitmq.url(), "sink", 0).await;
    let mut large = message("large".to_owned(), "known");
    large.body = Bytes::from(vec![b'x'; 1001]);
    let run = vec![message("small".to_owned(), "known"), large, message("behind".to_owned(), "known")];
    let error = sink.publish(run).await.unwrap().await.unwrap_err();
    assert!(matches!(error, Error::Setup(_)), "{error}");
    assert!(error.to_string().contains("set rabbitmq.message_bytes_max"), "{error}");
    let after = sink.publish(vec![message("after".to_owned(), "known")]).await.unwrap().await.unwrap_err();
    assert!(matches!(after, Error::Setup(_)), "{after}");
}
