//! What Postgres is told: never more than the broker has confirmed, and all of that.
//!
//! The traps pull in opposite directions: telling a position too early loses rows, telling it too late fills the disk. Both
//! are tested here, together.

use std::time::Duration;

use nix::sys::signal::Signal;
use pgoutbox::servers::{Postgres, RabbitMq};

use crate::support::consumer::Consumer;
use crate::support::links::{Ledger, Link, Toxics};
use crate::support::load::Writers;
use crate::support::relay::Relay;
use crate::support::{Outbox, connect, eventually, shared_postgres, shared_rabbitmq};

/// The shared broker, by way of the link.
fn through(link: &Link) -> String {
    shared_rabbitmq().url().replace(&format!(":{}/", shared_rabbitmq().port()), &format!(":{}/", link.port()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn confirms_nothing_before_the_broker_does_and_a_crash_then_loses_nothing() {
    let mut outbox = Outbox::create(shared_postgres(), shared_rabbitmq()).await;
    let link = Link::to_rabbitmq(shared_rabbitmq().port(), &Ledger::new(outbox.confirmed().await)).await;
    let direct = outbox.amqp.clone();
    outbox.amqp = through(&link);
    let consumer = Consumer::start(&outbox).await;
    let relay = Relay::start(&outbox);
    relay.ready().await;
    outbox.insert("before").await;
    consumer.wait_distinct(1).await;
    outbox.wait_confirmed(outbox.current().await).await;

    link.set(Toxics { hold_confirms: true, ..Toxics::default() });
    outbox.insert("held").await;
    // Other WAL goes on: keepalives must not carry the slot past the held row.
    outbox.sql("create table noise as select generate_series(1, 100000) n").await;
    // The server writes WAL of its own at any time: the slot may stand anywhere up to the row's commit record.
    let commit = consumer.wait_distinct(2).await[1].position.0;
    for _ in 0..100 {
        let confirmed = outbox.confirmed().await;
        assert!(confirmed <= commit, "{confirmed} was told while the row committed at {commit} was not confirmed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(relay.metric("pgoutbox_in_flight_messages") > 0.0);
    relay.kill();
    outbox.amqp = direct;
    let relay = Relay::start(&outbox);
    eventually("the held row comes again", || async { consumer.count() == 3 }).await;
    assert_eq!(consumer.received()[2].id, consumer.received()[1].id);
    outbox.wait_confirmed(outbox.current().await).await;
    assert_eq!(relay.stop(), 0);
}

/// The process that sends to this outbox' relay.
async fn walsender(outbox: &Outbox) -> Option<String> {
    let sql = format!("select active_pid from pg_replication_slots where slot_name = '{}'", outbox.name);
    outbox.text(&sql).await
}

/// The server asks for a reply when it has heard nothing for half of its timeout, wherever it is in the stream. A relay
/// speaks too often to be asked, so its statuses are held back. Confirms flow: what the relay takes for settled, it tells.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keepalive_inside_an_open_transaction_never_moves_the_slot() {
    const ROWS: usize = 30_000;
    let mut postgres = Postgres::start(&[("wal_sender_timeout", "12s")]).unwrap();
    let outbox = Outbox::create(&postgres, shared_rabbitmq()).await;
    let consumer = Consumer::start(&outbox).await;
    let ledger = Ledger::new(outbox.confirmed().await);
    let to_rabbitmq = Link::to_rabbitmq(shared_rabbitmq().port(), &ledger).await;
    let to_postgres = Link::to_postgres(postgres.port(), &ledger).await;
    let url = outbox.url.replace(&format!(":{}/", postgres.port()), &format!(":{}/", to_postgres.port()));
    let amqp = through(&to_rabbitmq);
    let slow = Toxics { bandwidth_down: Some(1 << 20), ..Toxics::default() };
    to_postgres.set(slow.clone());
    let relay = Relay::start_at(&url, &amqp, &outbox.name, &[]);
    relay.ready().await;
    outbox.wait_confirmed(outbox.current().await).await;
    let sender = walsender(&outbox).await;
    // 30 MB: the server is in the middle of it for half a minute.
    outbox
        .sql(&format!(
            "insert into outbox (aggregatetype, aggregateid, type, payload) \
             select 'order', n::text, 'placed', to_jsonb(repeat('x', 800)) from generate_series(1, {ROWS}) n"
        ))
        .await;
    let commit = consumer.wait_distinct(50).await[0].position.0;
    to_postgres.set(Toxics { hold_statuses: true, ..slow.clone() });
    // More than half of the timeout; and not all of it since the last status, which is a third of it old at most.
    tokio::time::sleep(Duration::from_secs(7)).await;
    to_postgres.set(slow);
    eventually("the relay is asked", || async { ledger.counts().keepalives_inside > 0 }).await;
    let statuses = ledger.counts().statuses;
    eventually("it has answered, and spoken again", || async { ledger.counts().statuses >= statuses + 2 }).await;
    for _ in 0..20 {
        let confirmed = outbox.confirmed().await;
        assert!(confirmed <= commit, "{confirmed} was told in the middle of the transaction that commits at {commit}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(walsender(&outbox).await, sender, "the server took a busy relay for dead");
    assert!(consumer.distinct() < ROWS, "the transaction was over");
    relay.kill();
    postgres.kill().unwrap();
    postgres.start_again().unwrap();
    let outbox = Outbox { client: connect(&outbox.url).await, ..outbox };
    to_postgres.heal();
    let relay = Relay::start_at(&url, &amqp, &outbox.name, &[]);
    consumer.wait_distinct(ROWS).await;
    outbox.wait_confirmed(outbox.current().await).await;
    assert_eq!(relay.stop(), 0);
    assert_eq!(ledger.violations(), Vec::<String>::new());
}

/// The channel is full and nothing is read; statuses go out all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_the_broker_holds_up_for_longer_than_the_server_waits_goes_on_in_its_session() {
    const ROWS: usize = 60_000;
    let postgres = Postgres::start(&[("wal_sender_timeout", "12s")]).unwrap();
    let mut outbox = Outbox::create(&postgres, shared_rabbitmq()).await;
    let link = Link::to_rabbitmq(shared_rabbitmq().port(), &Ledger::new(outbox.confirmed().await)).await;
    outbox.amqp = through(&link);
    let consumer = Consumer::start(&outbox).await;
    let relay = Relay::start(&outbox);
    relay.ready().await;
    outbox.wait_confirmed(outbox.current().await).await;
    link.set(Toxics { hold_confirms: true, ..Toxics::default() });
    outbox
        .sql(&format!(
            "insert into outbox (aggregatetype, aggregateid, type, payload) \
             select 'order', n::text, 'placed', '{{}}' from generate_series(1, {ROWS}) n"
        ))
        .await;
    let commit = consumer.wait_distinct(50).await[0].position.0;
    let sender = walsender(&outbox).await;
    for _ in 0..150 {
        assert!(outbox.confirmed().await <= commit);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(walsender(&outbox).await, sender, "the server took a busy relay for dead");
    link.heal();
    consumer.wait_distinct(ROWS).await;
    outbox.wait_confirmed(outbox.current().await).await;
    assert_eq!(consumer.count(), ROWS, "duplicates");
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_stops_fast_whatever_the_broker_does() {
    let mut postgres = Postgres::start(&[]).unwrap();
    let mut rabbitmq = RabbitMq::start().unwrap();
    let outbox = Outbox::create(&postgres, &rabbitmq).await;
    let consumer = Consumer::start(&outbox).await;
    let relay = Relay::start(&outbox);
    relay.ready().await;
    let within = Duration::from_secs(5);
    for state in ["up", "blocked", "frozen", "down"] {
        let outbox = Outbox {
            client: connect(&outbox.url).await,
            url: outbox.url.clone(),
            amqp: outbox.amqp.clone(),
            name: outbox.name.clone(),
        };
        eventually("ready again", || async { relay.is_ready() }).await;
        let writers = Writers::endless(&outbox, 2, 50);
        let before = consumer.count();
        eventually("messages flow", || async { consumer.count() > before + 100 }).await;
        match state {
            "blocked" => {
                rabbitmq.ctl(&["set_vm_memory_high_watermark", "0.000001"]).unwrap();
                eventually("blocked", || async { relay.metric("pgoutbox_broker_blocked") == 1.0 }).await;
            }
            "frozen" => rabbitmq.freeze().unwrap(),
            "down" => rabbitmq.stop().unwrap(),
            _ => {}
        }
        // Something unconfirmed is certainly there.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let took = postgres.stop("fast", within);
        let took = took.unwrap_or_else(|error| panic!("{state}: {error}\n{}", relay.log()));
        println!("broker {state}: stopped in {took:?}");
        writers.stop().await;
        match state {
            "blocked" => drop(rabbitmq.ctl(&["set_vm_memory_high_watermark", "0.4"]).unwrap()),
            "frozen" => rabbitmq.thaw().unwrap(),
            "down" => rabbitmq.start_again().unwrap(),
            _ => {}
        }
        postgres.start_again().unwrap();
    }
    let outbox = Outbox { client: connect(&outbox.url).await, ..outbox };
    let rows: usize = outbox.text("select count(*) from outbox").await.unwrap().parse().unwrap();
    consumer.wait_distinct(rows).await;
    assert_eq!(relay.stop(), 0);
}

/// A relay that was told to stop while the broker holds back a confirm.
async fn stopping(postgres: &Postgres) -> (Link, Consumer, Relay) {
    let mut outbox = Outbox::create(postgres, shared_rabbitmq()).await;
    let link = Link::to_rabbitmq(shared_rabbitmq().port(), &Ledger::new(outbox.confirmed().await)).await;
    outbox.amqp = through(&link);
    let consumer = Consumer::start(&outbox).await;
    let relay = Relay::start(&outbox);
    relay.ready().await;
    link.set(Toxics { hold_confirms: true, ..Toxics::default() });
    outbox.insert("held").await;
    eventually("it is in flight", || async { relay.metric("pgoutbox_in_flight_messages") == 1.0 }).await;
    relay.signal(Signal::SIGTERM);
    eventually("the relay is stopping", || async { relay.log().contains("stopping: settling") }).await;
    (link, consumer, relay)
}

/// Both are told to stop, as when a machine goes down: what the broker holds back must not keep the server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_stops_fast_while_the_relay_is_stopping_too() {
    let mut postgres = Postgres::start(&[]).unwrap();
    let (link, _consumer, relay) = stopping(&postgres).await;
    let took = postgres.stop("fast", Duration::from_secs(5));
    took.unwrap_or_else(|error| panic!("{error}\n{}", relay.log()));
    link.heal();
    assert_eq!(relay.exit_code(), 0);
}

/// A stop that its peers interrupt is one, and no session follows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_that_a_crash_of_postgres_interrupts_announces_no_other_session() {
    let mut postgres = Postgres::start(&[]).unwrap();
    let (_link, _consumer, relay) = stopping(&postgres).await;
    postgres.kill().unwrap();
    let (code, log) = relay.ended();
    assert_eq!(code, 0, "{log}");
    assert!(!log.contains("next in"), "{log}");
}
