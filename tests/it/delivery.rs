//! The main job on real servers: everything committed arrives, once, in commit order; and again after every kind of death.
//!
//! The trap: a consumer that compares with the relay's own idea of order proves nothing, so the truth is a second slot read
//! by `test_decoding`, and the table itself.

use std::time::Duration;

use crate::support::consumer::Consumer;
use crate::support::load::{Oracle, Writers, judge};
use crate::support::relay::Relay;
use crate::support::{Outbox, eventually, shared_postgres, shared_rabbitmq};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_committed_row_arrives_as_the_contract_says() {
    let outbox = Outbox::create(shared_postgres(), shared_rabbitmq()).await;
    let consumer = Consumer::start(&outbox).await;
    let relay = Relay::start(&outbox);
    relay.ready().await;
    let id = outbox.insert("placed").await;
    let received = consumer.wait_distinct(1).await;
    assert_eq!(received[0].id, id);
    assert_eq!(received[0].routing_key, "order.placed");
    assert_eq!(received[0].body, b"{\"a\": 1}");
    let lsn = outbox.current().await;
    outbox.wait_confirmed(lsn).await;
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_consumers_sequence_is_the_oracles_without_one_duplicate() {
    let outbox = Outbox::create(shared_postgres(), shared_rabbitmq()).await;
    let consumer = Consumer::start(&outbox).await;
    let oracle = Oracle::start(&outbox).await;
    let relay = Relay::start(&outbox);
    relay.ready().await;
    let written = Writers::start(&outbox, 8, 100_000, 1000, fastrand::u64(..)).done().await;
    let received = consumer.wait_distinct(written).await;
    assert_eq!(judge(&received, &oracle.ids(&outbox).await), 0, "duplicates");
    assert!(written > 60_000, "{written} rows were committed");
    let lsn = outbox.current().await;
    outbox.wait_confirmed(lsn).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(consumer.count(), received.len(), "nothing comes afterwards");
    assert_eq!(relay.stop(), 0);
}

/// How the kernel schedules the relay: `policy` of proc_pid_stat(5).
fn policy(relay: &Relay) -> String {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", relay.pid())).unwrap();
    let after_name = stat.rsplit(')').next().unwrap();
    after_name.split_whitespace().nth(38).unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_relay_is_a_batch_job_while_late_rows_come_one_by_one() {
    const NORMAL: &str = "0";
    const BATCH: &str = "3";
    let outbox = Outbox::create(shared_postgres(), shared_rabbitmq()).await;
    let consumer = Consumer::start(&outbox).await;
    let rows = "insert into outbox (aggregatetype, aggregateid, type) select 'order', n::text, 'placed' from \
                generate_series(1, 700) n";
    outbox.sql(rows).await;
    let are_late = "select clock_timestamp() > max(created_at) + interval '1.1 s' from outbox";
    eventually("late rows", async || outbox.text(are_late).await.as_deref() == Some("t")).await;
    // With one in flight each is waited for.
    let relay = Relay::start_with(&outbox, &[("rabbitmq.window_messages", "1")]);
    eventually("a batch job", async || policy(&relay) == BATCH).await;
    consumer.wait_distinct(700).await;
    outbox.insert("placed").await;
    consumer.wait_distinct(701).await;
    assert_eq!(policy(&relay), NORMAL);
    assert_eq!(relay.stop(), 0);
}
