//! The slot: missing, of the wrong kind, lost, in use, dropped or re-created behind the relay's back.
//!
//! The trap: a slot of the same name looks like the old one. Only a relay that remembers what it told Postgres can see that
//! rows lie between the two.

use nix::sys::signal::Signal;
use pgoutbox::servers::Postgres;

use super::{Road, WORLD, ended, statement, stops, verb};
use crate::support::consumer::Consumer;
use crate::support::links::{Ledger, Link, Toxics};
use crate::support::relay::Relay;
use crate::support::{Outbox, eventually, postgres_18, shared_postgres, shared_rabbitmq};

async fn outbox() -> Outbox {
    Outbox::create(shared_postgres(), shared_rabbitmq()).await
}

impl Outbox {
    async fn drop_slot(&self) {
        self.sql(&format!("select pg_drop_replication_slot('{}')", self.name)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_slot_is_named_and_never_made_by_run() {
    let outbox = outbox().await;
    outbox.drop_slot().await;
    let consumer = Consumer::start(&outbox).await;
    let slot = format!("replication slot {} does not exist", outbox.name);
    let log = stops(&outbox, WORLD, &[&slot, "pgoutbox init", "reconcile"]).await;
    assert!(log.contains("exit 78:"), "{log}");
    // The remedy.
    assert!(verb(&outbox, &["init"]).status.success());
    let relay = Relay::start(&outbox);
    let id = outbox.insert("placed").await;
    assert_eq!(consumer.wait_distinct(1).await[0].id, id);
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_of_another_kind_or_database_stops_the_relay() {
    let outbox = outbox().await;
    let name = outbox.name.clone();
    outbox.drop_slot().await;
    outbox.sql(&format!("select pg_create_physical_replication_slot('{name}')")).await;
    stops(&outbox, WORLD, &[&format!("replication slot {name} is physical"), "postgres.slot"]).await;
    outbox.drop_slot().await;
    outbox.sql(&format!("select pg_create_logical_replication_slot('{name}', 'test_decoding')")).await;
    stops(&outbox, WORLD, &[&format!("replication slot {name} uses the plugin test_decoding"), "pgoutbox init"]).await;
    outbox.drop_slot().await;
    let elsewhere = Outbox::empty(shared_postgres(), shared_rabbitmq()).await;
    elsewhere.sql(&format!("select pg_create_logical_replication_slot('{name}', 'pgoutput')")).await;
    let belongs = format!("belongs to database {}, not to {name}", elsewhere.name);
    stops(&outbox, WORLD, &[&belongs, "postgres.url"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_relay_waits_says_so_once_and_takes_over() {
    let outbox = outbox().await;
    let consumer = Consumer::start(&outbox).await;
    let first = Relay::start(&outbox);
    first.ready().await;
    let second = Relay::start(&outbox);
    eventually("the second relay says why it waits", || async { second.log().contains("is active for PID") }).await;
    assert!(second.log().contains("another relay"), "{}", second.log());
    outbox.insert("placed").await;
    consumer.wait_distinct(1).await;
    let sessions = || second.metric("pgoutbox_sessions_total{end=\"postgres\"}");
    eventually("it tries again and again", || async { sessions() >= 3.0 }).await;
    assert!(!second.is_ready());
    assert!(second.get("/readyz").1.contains("is active for PID"));
    assert_eq!(second.log().matches("is active for PID").count(), 1, "once");
    assert_eq!(second.metric("pgoutbox_published_total"), 0.0);
    assert_eq!(first.stop(), 0);
    outbox.insert("paid").await;
    let received = consumer.wait_distinct(2).await;
    assert_eq!(received.len(), 2, "each came once");
    second.ready().await;
    assert_eq!(second.metric("pgoutbox_published_total"), 1.0);
    assert_eq!(second.stop(), 0);
}

/// It stood still for longer than Postgres waits, and the slot went on without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_finds_its_slot_with_another_one_waits_for_it() {
    let outbox = outbox().await;
    let consumer = Consumer::start(&outbox).await;
    let first = Relay::start(&outbox);
    outbox.insert("first").await;
    consumer.wait_distinct(1).await;
    first.ready().await;
    outbox.wait_confirmed(outbox.current().await).await;
    first.signal(Signal::SIGSTOP);
    let holder = format!("from pg_replication_slots where slot_name = '{}'", outbox.name);
    outbox.sql(&format!("select pg_terminate_backend(active_pid) {holder}")).await;
    let is_held = format!("select 'yes' {holder} and active");
    eventually("nobody holds it", || async { outbox.text(&is_held).await.is_none() }).await;
    let second = Relay::start(&outbox);
    outbox.insert("second").await;
    consumer.wait_distinct(2).await;
    let before = outbox.confirmed().await;
    outbox.insert("third").await;
    eventually("the slot goes on", || async { outbox.confirmed().await > before }).await;
    first.signal(Signal::SIGCONT);
    eventually("it waits", || async { first.get("/readyz").1.contains("is active for PID") }).await;
    assert_eq!(second.stop(), 0);
    first.ready().await;
    let keys: Vec<String> = consumer.wait_distinct(3).await.into_iter().map(|received| received.routing_key).collect();
    assert_eq!(keys, ["order.first", "order.second", "order.third"], "{}", first.log());
    assert_eq!(first.stop(), 0);
}

/// A relay that has streamed and then lost its broker.
async fn relay_without_broker(outbox: &mut Outbox) -> (Relay, Road) {
    let road = Road::to(shared_rabbitmq().port()).await;
    outbox.amqp = road.url(&outbox.amqp, shared_rabbitmq().port());
    let relay = Relay::start(outbox);
    relay.ready().await;
    outbox.insert("placed").await;
    outbox.wait_confirmed(outbox.current().await).await;
    road.close();
    let active = format!("select active from pg_replication_slots where slot_name = '{}'", outbox.name);
    eventually("no stream is held without a broker", || async { outbox.text(&active).await.as_deref() == Some("f") })
        .await;
    (relay, road)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_dropped_while_the_relay_waits_for_the_broker_is_missed() {
    let mut outbox = outbox().await;
    let _consumer = Consumer::start(&outbox).await;
    let (relay, road) = relay_without_broker(&mut outbox).await;
    outbox.drop_slot().await;
    road.open();
    ended(relay, WORLD, &[&format!("replication slot {} does not exist", outbox.name), "reconcile"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_recreated_while_the_relay_waits_for_the_broker_is_not_taken_for_the_old_one() {
    let mut outbox = outbox().await;
    let consumer = Consumer::start(&outbox).await;
    let (relay, road) = relay_without_broker(&mut outbox).await;
    outbox.drop_slot().await;
    outbox.insert("between").await;
    outbox.create_slot().await;
    road.open();
    let log = ended(relay, WORLD, &[&format!("replication slot {} stands at", outbox.name), "re-created"]);
    assert!(statement(&log, "Remedy: ").starts_with("reconcile from the table"), "{log}");
    // Read, decided, started anew: what comes now is delivered.
    let relay = Relay::start(&outbox);
    outbox.insert("after").await;
    let received = consumer.wait_distinct(2).await;
    assert_eq!(received.last().unwrap().routing_key, "order.after");
    assert_eq!(relay.stop(), 0);
}

/// Writes WAL until the server gives the slot up.
async fn lose(outbox: &Outbox) {
    let status = format!("select wal_status from pg_replication_slots where slot_name = '{}'", outbox.name);
    eventually("the slot is lost", || async {
        outbox.sql("create table if not exists filler (); select pg_switch_wal()").await;
        outbox.sql("checkpoint").await;
        outbox.text(&status).await.as_deref() == Some("lost")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_slot_is_named_before_the_start_and_after_waiting_for_the_broker() {
    let postgres = Postgres::start(&[("max_slot_wal_keep_size", "16MB"), ("min_wal_size", "32MB")]).unwrap();
    let mut outbox = Outbox::create(&postgres, shared_rabbitmq()).await;
    let _consumer = Consumer::start(&outbox).await;
    let (relay, road) = relay_without_broker(&mut outbox).await;
    lose(&outbox).await;
    // A server says of a lost slot what it says of one without a limit; and a position of zero is not all the WAL there is.
    let metrics = ["pgoutbox_slot_safe_bytes", "pgoutbox_slot_retained_bytes"];
    eventually("the metrics of a lost slot", || async { metrics.map(|name| relay.metric(name)) == [0.0, 0.0] }).await;
    let output = verb(&outbox, &["status", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&status["wal_status"], &status["safe_bytes"], &status["retained_bytes"]),
        (&"lost".into(), &0.into(), &0.into())
    );
    let output = String::from_utf8(verb(&outbox, &["status"]).stdout).unwrap();
    assert!(output.contains("safe         none: the slot is lost\n"), "{output}");
    road.open();
    let lost = format!("replication slot {} is lost", outbox.name);
    let says = [lost.as_str(), "max_slot_wal_keep_size", "reconcile"];
    ended(relay, WORLD, &says);
    let log = stops(&outbox, WORLD, &says).await;
    // The remedy: its statement, then `init`.
    outbox.sql(&statement(&log, "still needed. Remedy: ")).await;
    assert!(verb(&outbox, &["init"]).status.success());
    let relay = Relay::start(&outbox);
    relay.ready().await;
    assert_eq!(relay.stop(), 0);
}

/// Until the next checkpoint nothing is lost, and what the operator does now decides.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_whose_wal_goes_with_the_next_checkpoint_is_an_error_in_the_log_and_can_be_saved() {
    let postgres = Postgres::start_from(&postgres_18(), &[("max_slot_wal_keep_size", "16MB")]).unwrap();
    let outbox = Outbox::create(&postgres, shared_rabbitmq()).await;
    let consumer = Consumer::start(&outbox).await;
    let link = Link::to_rabbitmq(shared_rabbitmq().port(), &Ledger::new(outbox.confirmed().await)).await;
    let amqp = format!("amqp://guest:guest@127.0.0.1:{}/%2f", link.port());
    let relay = Relay::start_at(&outbox.url, &amqp, &outbox.name, &[]);
    relay.ready().await;
    link.set(Toxics { hold_confirms: true, ..Toxics::default() });
    outbox.insert("held").await;
    let status = format!("select wal_status from pg_replication_slots where slot_name = '{}'", outbox.name);
    let filler = "create table if not exists filler (); drop table filler; select pg_switch_wal()";
    eventually("the slot is unreserved", || async {
        outbox.sql(filler).await;
        outbox.text(&status).await.as_deref() == Some("unreserved")
    })
    .await;
    let says = "the slot is about to be lost: the server removes its WAL at the next checkpoint. Raise \
                max_slot_wal_keep_size now";
    eventually("it is said", || async { relay.log().contains(says) }).await;
    assert!(relay.log().contains("ERROR"), "{}", relay.log());
    // The remedy, and the broker.
    outbox.sql("alter system set max_slot_wal_keep_size = '1GB'").await;
    outbox.sql("select pg_reload_conf()").await;
    eventually("the slot is safe", || async { outbox.text(&status).await.as_deref() == Some("reserved") }).await;
    outbox.sql("checkpoint").await;
    link.heal();
    consumer.wait_distinct(1).await;
    outbox.wait_confirmed(outbox.current().await).await;
    outbox.insert("after").await;
    consumer.wait_distinct(2).await;
    assert_eq!(consumer.count(), 2, "duplicates");
    assert_eq!(relay.metric("pgoutbox_sessions_total{end=\"postgres\"}"), 0.0, "{}", relay.log());
    relay.ready().await;
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_was_idle_for_too_long_is_warned_of_ahead_and_named_when_it_is_lost() {
    let postgres = Postgres::start_from(&postgres_18(), &[("idle_replication_slot_timeout", "1s")]).unwrap();
    let mut outbox = Outbox::create(&postgres, shared_rabbitmq()).await;
    let _consumer = Consumer::start(&outbox).await;
    let (relay, road) = relay_without_broker(&mut outbox).await;
    let before = outbox.confirmed().await;
    outbox.insert("missed").await;
    // While its broker is away, a relay holds no stream: to the server it is as if there were none.
    let status = format!("select wal_status from pg_replication_slots where slot_name = '{}'", outbox.name);
    eventually("the slot is lost", || async {
        outbox.sql("checkpoint").await;
        outbox.text(&status).await.as_deref() == Some("lost")
    })
    .await;
    road.open();
    let lost = format!("replication slot {} is lost (idle_timeout)", outbox.name);
    let says = [lost.as_str(), "reconcile", "raise idle_replication_slot_timeout, or set it to 0"];
    let log = ended(relay, WORLD, &says);
    let warning = "WARN idle_replication_slot_timeout = 1s: the slot is lost when the relay is away for so long; while its \
                   broker is away, it is too. Remedy: ALTER SYSTEM SET idle_replication_slot_timeout = 0;";
    assert_eq!(log.matches(warning).count(), 1, "once, and ahead:\n{log}");
    assert!(log.find(warning) < log.find("streaming"), "{log}");
    stops(&outbox, WORLD, &says).await;
    assert_eq!(outbox.confirmed().await, before, "the slot was moved past a row that nobody has");
    // The remedies: the warning's, then the stop's.
    outbox.sql("alter system set idle_replication_slot_timeout = 0").await;
    outbox.sql("select pg_reload_conf()").await;
    outbox.sql(&statement(&log, "still needed. Remedy: ")).await;
    assert!(verb(&outbox, &["init"]).status.success());
    let relay = Relay::start(&outbox);
    relay.ready().await;
    assert!(!relay.log().contains("idle_replication_slot_timeout"), "{}", relay.log());
    assert_eq!(relay.stop(), 0);
}
