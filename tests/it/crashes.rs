//! Every process is killed in turn, under load: nothing missing, first deliveries in commit order, recovery by itself.
//!
//! The trap: a crash that hits an idle moment proves nothing. Writers write all the while, and each round waits until
//! messages have flowed since the last one.

use std::time::Duration;

use nix::sys::signal::Signal;
use pgoutbox::servers::{Postgres, RabbitMq};

use crate::support::consumer::{Consumer, Kind, bind_kind};
use crate::support::load::{Oracle, Writers, judge};
use crate::support::relay::Relay;
use crate::support::{Outbox, connect, eventually, shared_postgres, shared_rabbitmq};

/// Waits until `count` more messages have come, so that the next blow falls into traffic.
async fn flowing(consumer: &Consumer, count: usize) {
    let before = consumer.count();
    eventually("messages flow again", || async { consumer.count() >= before + count }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_or_reordered_whoever_is_killed_under_load() {
    let mut postgres = Postgres::start(&[]).unwrap();
    let mut rabbitmq = RabbitMq::start().unwrap();
    let outbox = Outbox::create(&postgres, &rabbitmq).await;
    let consumer = Consumer::start(&outbox).await;
    let oracle = Oracle::start(&outbox).await;
    let writers = Writers::endless(&outbox, 8, 200);

    let mut relay = Relay::start(&outbox);
    for _ in 0..20 {
        flowing(&consumer, 200).await;
        tokio::time::sleep(Duration::from_millis(fastrand::u64(0..300))).await;
        relay.kill();
        relay = Relay::start(&outbox);
    }
    for _ in 0..5 {
        flowing(&consumer, 200).await;
        rabbitmq.kill().unwrap();
        rabbitmq.start_again().unwrap();
    }
    flowing(&consumer, 200).await;
    for _ in 0..5 {
        flowing(&consumer, 200).await;
        postgres.restart("immediate").unwrap();
    }
    flowing(&consumer, 200).await;
    writers.stop().await;

    let outbox = Outbox { client: connect(&outbox.url).await, ..outbox };
    let ids = oracle.ids(&outbox).await;
    let rows = outbox.text("select count(*) from outbox").await.unwrap();
    assert_eq!(rows, ids.len().to_string(), "the oracle and the table agree");
    let received = consumer.wait_distinct(ids.len()).await;
    let duplicates = judge(&received, &ids);
    println!("{} rows, {duplicates} duplicates after 30 crashes", ids.len());
    outbox.wait_confirmed(outbox.current().await).await;
    assert_eq!(relay.stop(), 0);
}

/// RabbitMQ lets publishers in before it has given its streams their leaders, and confirms what the other queues take.
/// Many streams take longer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_must_be_there_misses_nothing_when_its_broker_starts() {
    let mut rabbitmq = RabbitMq::start().unwrap();
    let outbox = Outbox::create(shared_postgres(), &rabbitmq).await;
    let [beside, stream] = [Consumer::start_kind(&outbox, Kind::Classic), Consumer::start_kind(&outbox, Kind::Stream)];
    let (beside, stream) = (beside.await, stream.await);
    for number in 0..20 {
        bind_kind(&outbox, &format!("another_{number}"), "none", Kind::Stream).await;
    }
    // What was declared a moment before a kill may be lost to RabbitMQ.
    rabbitmq.stop().unwrap();
    rabbitmq.start_again().unwrap();
    let mut count = 0;
    for _ in 0..3 {
        rabbitmq.kill().unwrap();
        outbox.sql("insert into outbox (aggregatetype, aggregateid, type) select 'a', '1', 'b' from generate_series(1, 500)").await;
        count += 500;
        rabbitmq.start_again().unwrap();
        // As early as can be.
        let relay = Relay::start_with(&outbox, &[("rabbitmq.queues", &Kind::Stream.queue(&outbox))]);
        beside.wait_distinct(count).await;
        stream.wait_distinct(count).await;
        assert_eq!(relay.stop(), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_of_postgres_alone_costs_a_living_relay_no_duplicate() {
    let mut postgres = Postgres::start(&[]).unwrap();
    let outbox = Outbox::create(&postgres, shared_rabbitmq()).await;
    let consumer = Consumer::start(&outbox).await;
    let relay = Relay::start(&outbox);
    relay.ready().await;
    // The slot is saved lazily: what was told last is not on disk, unless WAL was about to be let go just then.
    let saved = format!("select md5(pg_read_binary_file('pg_replslot/{}/state'))", outbox.name);
    let mut rows = 0;
    loop {
        let before = outbox.text(&saved).await;
        for _ in 0..200 {
            outbox.insert("placed").await;
        }
        rows += 200;
        consumer.wait_distinct(rows).await;
        outbox.wait_confirmed(outbox.current().await).await;
        // Nothing more is told.
        relay.signal(Signal::SIGSTOP);
        if outbox.text(&saved).await == before {
            break;
        }
        relay.signal(Signal::SIGCONT);
    }
    let confirmed = outbox.confirmed().await;
    postgres.kill().unwrap();
    postgres.start_again().unwrap();
    let outbox = Outbox { client: connect(&outbox.url).await, ..outbox };
    // Without a memory of its own the relay would send again what lies between.
    assert!(outbox.confirmed().await < confirmed, "the crash did not set the slot back");
    relay.signal(Signal::SIGCONT);
    relay.ready().await;
    outbox.insert("placed").await;
    let received = consumer.wait_distinct(rows + 1).await;
    assert_eq!(received.len(), rows + 1, "duplicates");
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_under_load_ends_with_0_and_a_restart_sends_nothing_twice() {
    let outbox = Outbox::create(shared_postgres(), shared_rabbitmq()).await;
    let consumer = Consumer::start(&outbox).await;
    let oracle = Oracle::start(&outbox).await;
    let writers = Writers::endless(&outbox, 8, 1000);
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGTERM, Signal::SIGTERM, Signal::SIGTERM] {
        let relay = Relay::start(&outbox);
        relay.ready().await;
        flowing(&consumer, 1000).await;
        relay.signal(signal);
        let (code, log) = relay.ended();
        assert_eq!(code, 0, "{log}");
        assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    }
    writers.stop().await;
    let relay = Relay::start(&outbox);
    let ids = oracle.ids(&outbox).await;
    let received = consumer.wait_distinct(ids.len()).await;
    assert_eq!(judge(&received, &ids), 0, "duplicates");
    assert_eq!(relay.stop(), 0);
}
