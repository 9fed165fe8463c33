//! What RabbitMQ does to streams, seen by an independent client alone: the reason of `rabbitmq.queues`, and of what
//! guarantees.md does not promise. Ignored: it is RabbitMQ that is tested, and each run kills it a few times.
//!
//! ```text
//! cargo test --test it streams:: -- --ignored --nocapture
//! ```
//!
//! The trap: a client that connects as fast as it can to a port of the ephemeral range where nobody listens yet connects to
//! itself, and then RabbitMQ cannot listen. So it waits for the broker first.

use std::collections::{BTreeSet, VecDeque};
use std::path::Path;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind};
use pgoutbox::servers::RabbitMq;

use crate::support::rabbitmq_4;

const ROUNDS: usize = 5;

/// More of them take longer to have leaders.
const OTHER_STREAMS: usize = 10;

const WINDOW: usize = 500;

/// After every fifty messages, so that a busy machine has not too much to read afterwards.
const PAUSE: Duration = Duration::from_millis(10);

/// For a confirm.
const PATIENCE: Duration = Duration::from_secs(5);

/// What came of one exchange's messages, by number.
#[derive(Default)]
struct Published {
    confirmed: BTreeSet<u64>,
    returned: usize,
    unconfirmed: usize,
}

async fn open(url: &str) -> (Connection, Channel) {
    let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    (connection, channel)
}

async fn declare(channel: &Channel, queue: &str, kind: &str) {
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
    channel.queue_declare(queue.into(), durable, arguments).await.unwrap();
}

async fn bind(channel: &Channel, queue: &str, exchange: &str, key: &str) {
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    channel.exchange_declare(exchange.into(), ExchangeKind::Topic, durable, FieldTable::default()).await.unwrap();
    let options = QueueBindOptions::default();
    channel.queue_bind(queue.into(), exchange.into(), key.into(), options, FieldTable::default()).await.unwrap();
}

/// Publishes numbers from `from` on for so long, with up to `WINDOW` of them in flight, each mandatory and persistent.
async fn publish(channel: &Channel, exchange: &str, keys: &[&str], from: u64, long: Duration) -> Published {
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let (began, mut number, mut published) = (Instant::now(), from, Published::default());
    let mut in_flight = VecDeque::new();
    loop {
        let goes_on = began.elapsed() < long && published.unconfirmed == 0;
        if goes_on {
            let options = BasicPublishOptions { mandatory: true, ..Default::default() };
            let properties =
                BasicProperties::default().with_delivery_mode(2).with_message_id(number.to_string().into());
            let key = keys[usize::try_from(number).unwrap() % keys.len()];
            let sent = channel.basic_publish(exchange.into(), key.into(), options, b"{}", properties).await.unwrap();
            in_flight.push_back((number, sent));
            number += 1;
            if number.is_multiple_of(50) {
                tokio::time::sleep(PAUSE).await;
            }
        }
        while in_flight.len() > if goes_on { WINDOW } else { 0 } {
            let (number, confirm) = in_flight.pop_front().unwrap();
            // What is numbered wrongly may never be confirmed, with others behind it that are.
            let patience = if published.unconfirmed == 0 { PATIENCE } else { Duration::from_millis(1) };
            match tokio::time::timeout(patience, confirm).await {
                Ok(answer) if answer.as_ref().unwrap().is_ack() => match answer.unwrap().take_message() {
                    Some(_) => published.returned += 1,
                    None => drop(published.confirmed.insert(number)),
                },
                _ => published.unconfirmed += 1,
            }
        }
        if !goes_on {
            return published;
        }
    }
}

/// All numbers that a stream has.
async fn kept(url: &str, stream: &str) -> BTreeSet<u64> {
    let (_connection, channel) = open(url).await;
    channel.basic_qos(1000, BasicQosOptions::default()).await.unwrap();
    let mut first = FieldTable::default();
    first.insert("x-stream-offset".into(), AMQPValue::LongString("first".into()));
    let options = BasicConsumeOptions::default();
    let mut consumer = channel.basic_consume(stream.into(), "".into(), options, first).await.unwrap();
    let mut kept = BTreeSet::new();
    // A stream that says nothing for so long has said all.
    while let Ok(Some(delivery)) = tokio::time::timeout(Duration::from_secs(3), consumer.next()).await {
        let delivery = delivery.unwrap();
        kept.insert(delivery.properties.message_id().as_ref().unwrap().to_string().parse().unwrap());
        if kept.len() % 500 == 0 {
            delivery.ack(BasicAckOptions { multiple: true }).await.unwrap();
        }
    }
    kept
}

async fn can_be_looked_at(url: &str, queue: &str) -> bool {
    let (_connection, channel) = open(url).await;
    let passive = QueueDeclareOptions { passive: true, ..Default::default() };
    channel.queue_declare(queue.into(), passive, FieldTable::default()).await.is_ok()
}

/// Starts a killed broker, `ROUNDS` times, and publishes at once, or once the stream can be looked at. Returns how many
/// confirmed messages a stream beside a classic queue missed, and how many one that stands alone.
async fn missed_at_starts(root: &Path, looks: bool) -> (usize, usize) {
    let mut rabbitmq = RabbitMq::start_from(root).unwrap();
    let (url, mut missed) = (rabbitmq.url(), (0, 0));
    let (_connection, channel) = open(&url).await;
    for (queue, kind) in [("classic", "classic"), ("beside", "stream"), ("alone", "stream")] {
        declare(&channel, queue, kind).await;
        bind(&channel, queue, if queue == "alone" { "alone" } else { "both" }, "#").await;
    }
    for number in 0..OTHER_STREAMS {
        declare(&channel, &format!("other_{number}"), "stream").await;
    }
    // What was declared a moment before a kill may be lost.
    rabbitmq.stop().unwrap();
    rabbitmq.start_again().unwrap();
    for round in 1..=ROUNDS {
        rabbitmq.kill().unwrap();
        rabbitmq.start_again().unwrap();
        while looks && !can_be_looked_at(&url, "beside").await {}
        let ((_first, both), (_second, alone)) = (open(&url).await, open(&url).await);
        let (from, long) = (round as u64 * 1_000_000, Duration::from_secs(3));
        let both = publish(&both, "both", &["key"], from, long);
        let (both, alone) = tokio::join!(both, publish(&alone, "alone", &["key"], from, long));
        let beside = both.confirmed.difference(&kept(&url, "beside").await).count();
        let alone_missed = alone.confirmed.difference(&kept(&url, "alone").await).count();
        println!(
            "start {round}: beside a classic queue, {} confirmed and {beside} missed; alone, {} returned, {} confirmed and \
             {alone_missed} missed",
            both.confirmed.len(),
            alone.returned,
            alone.confirmed.len()
        );
        missed = (missed.0 + beside, missed.1 + alone_missed);
    }
    missed
}

/// Changes the leader of a stream that takes every second message, `ROUNDS` times, while they are published. Returns how
/// many confirmed ones it missed.
async fn missed_at_changes_of_leader(root: &Path) -> usize {
    const KILL: &str = "{ok, Q} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"part\">>)), \
                        exit(amqqueue:get_pid(Q), kill).";
    let rabbitmq = RabbitMq::start_from(root).unwrap();
    let (url, mut missed) = (rabbitmq.url(), 0);
    let (_connection, channel) = open(&url).await;
    for (queue, kind, key) in [("all", "classic", "#"), ("part", "stream", "odd")] {
        declare(&channel, queue, kind).await;
        bind(&channel, queue, "both", key).await;
    }
    for round in 1..=ROUNDS {
        let (_connection, channel) = open(&url).await;
        let publishing = publish(&channel, "both", &["even", "odd"], round as u64 * 1_000_000, Duration::from_secs(6));
        let killing = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            tokio::task::block_in_place(|| rabbitmq.ctl(&["eval", KILL])).unwrap();
        };
        let (published, ()) = tokio::join!(publishing, killing);
        let due: BTreeSet<u64> = published.confirmed.into_iter().filter(|number| number % 2 == 1).collect();
        let lost = due.difference(&kept(&url, "part").await).count();
        println!("change {round}: {} confirmed for the stream and {lost} missed", due.len());
        missed += lost;
    }
    missed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "tests RabbitMQ, not pgoutbox"]
async fn a_stream_beside_others_misses_what_is_confirmed_right_after_a_start_and_one_alone_does_not() {
    let (beside, alone) = missed_at_starts(Path::new("/"), false).await;
    assert!(beside > 0 && alone == 0, "{beside} and {alone}");
    // It takes a client that is quicker to see it here.
    println!("RabbitMQ 4");
    assert_eq!(missed_at_starts(&rabbitmq_4(), false).await.1, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "tests RabbitMQ, not pgoutbox"]
async fn a_stream_that_can_be_looked_at_misses_nothing_after_a_start() {
    for root in [Path::new("/"), &rabbitmq_4()] {
        println!("RabbitMQ below {}, looked at first", root.display());
        assert_eq!(missed_at_starts(root, true).await, (0, 0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "tests RabbitMQ, not pgoutbox"]
async fn a_stream_of_a_part_misses_what_is_confirmed_when_its_leader_changes_before_rabbitmq_4() {
    assert!(missed_at_changes_of_leader(Path::new("/")).await > 0);
    println!("RabbitMQ 4");
    assert_eq!(missed_at_changes_of_leader(&rabbitmq_4()).await, 0);
}
