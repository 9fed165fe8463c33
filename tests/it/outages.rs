//! Long outages of the broker: the relay waits, and waiting costs nothing that grows.
//!
//! The trap: an attempt that fails looks free, and leaves a thread or a socket behind that only a night of them shows.

use std::time::Duration;

use pgoutbox::servers::{Postgres, RabbitMq};

use crate::support::consumer::Consumer;
use crate::support::links::{Ledger, Link, Toxics};
use crate::support::relay::Relay;
use crate::support::{Outbox, connect, eventually, shared_postgres, shared_postgres_18, shared_rabbitmq};

fn count(relay: &Relay, what: &str) -> usize {
    std::fs::read_dir(format!("/proc/{}/{what}", relay.pid())).unwrap().count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attempts_at_a_frozen_broker_leave_no_thread_and_no_socket_behind() {
    let rabbitmq = RabbitMq::start().unwrap();
    let outbox = Outbox::create(shared_postgres(), &rabbitmq).await;
    let consumer = Consumer::start(&outbox).await;
    rabbitmq.freeze().unwrap();
    let relay = Relay::start(&outbox);
    let failed = |sessions: f64| {
        let relay = &relay;
        move || async move { relay.metric("pgoutbox_sessions_total{end=\"broker\"}") >= sessions }
    };
    eventually("a first attempt fails", failed(1.0)).await;
    let (threads, files) = (count(&relay, "task"), count(&relay, "fd"));
    eventually("more attempts fail", failed(4.0)).await;
    // One attempt may be under way.
    assert!(count(&relay, "task") <= threads + 1, "{threads} threads, now {}", count(&relay, "task"));
    assert!(count(&relay, "fd") <= files + 3, "{files} files, now {}", count(&relay, "fd"));
    outbox.insert("placed").await;
    rabbitmq.thaw().unwrap();
    consumer.wait_distinct(1).await;
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_alarm_is_waited_out_in_one_session_and_costs_no_duplicate() {
    let rabbitmq = RabbitMq::start().unwrap();
    let outbox = Outbox::create(shared_postgres(), &rabbitmq).await;
    let consumer = Consumer::start(&outbox).await;
    let relay = Relay::start_with(&outbox, &[("rabbitmq.confirm_timeout", "2s")]);
    relay.ready().await;
    rabbitmq.ctl(&["set_vm_memory_high_watermark", "0.000001"]).unwrap();
    for _ in 0..50 {
        outbox.insert("placed").await;
    }
    eventually("blocked", || async { relay.metric("pgoutbox_broker_blocked") == 1.0 }).await;
    assert!(relay.get("/readyz").1.contains("blocks publishers"));
    tokio::time::sleep(Duration::from_secs(6)).await;
    rabbitmq.ctl(&["set_vm_memory_high_watermark", "0.4"]).unwrap();
    let received = consumer.wait_distinct(50).await;
    assert_eq!(received.len(), 50, "duplicates");
    relay.ready().await;
    assert!(relay.metric("pgoutbox_sessions_total{end=\"broker\"}") == 0.0, "{}", relay.log());
    assert_eq!(relay.stop(), 0);
    // A clean stop says goodbye: a warning in the broker's log at every deploy would hide those that matter.
    let goodbye = || {
        let log = rabbitmq.log();
        log.lines()
            .find(|line| line.contains("closing AMQP connection") && line.contains("- pgoutbox"))
            .map(str::to_owned)
    };
    eventually("the broker has seen the end", || async { goodbye().is_some() }).await;
    assert!(goodbye().unwrap().contains("[info]"), "{}", goodbye().unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_as_large_as_the_channel_behind_a_broker_that_holds_back_goes_on_when_it_confirms() {
    let postgres = Postgres::start(&[("wal_sender_timeout", "4s")]).unwrap();
    let outbox = Outbox::create(&postgres, shared_rabbitmq()).await;
    let consumer = Consumer::start(&outbox).await;
    let ledger = Ledger::new(outbox.confirmed().await);
    let link = Link::to_rabbitmq(shared_rabbitmq().port(), &ledger).await;
    let amqp = format!("amqp://guest:guest@127.0.0.1:{}/%2f", link.port());
    let relay = Relay::start_at(&outbox.url, &amqp, &outbox.name, &[("rabbitmq.window_messages", "50")]);
    relay.ready().await;
    link.set(Toxics { hold_confirms: true, ..Toxics::default() });
    let rows = |bytes: usize, count: usize| {
        format!(
            "insert into outbox (aggregatetype, aggregateid, type, payload) select 'order', n::text, 'large', \
             to_jsonb(repeat('x', {bytes})) from generate_series(1, {count}) n"
        )
    };
    for sql in [rows(10, 500), rows(4 << 20, 2), rows(10, 500)] {
        outbox.sql(&sql).await;
    }
    // Longer than Postgres may be unheard, and shorter than a confirm may take.
    tokio::time::sleep(Duration::from_secs(5)).await;
    link.heal();
    let received = consumer.wait_distinct(1002).await;
    assert_eq!(received.len(), 1002, "duplicates");
    assert_eq!(ledger.violations(), Vec::<String>::new());
    assert_eq!(relay.stop(), 0);
}

/// Checkpoints of other tables' transactions keep coming, and are no reason to believe in the broker.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_goes_is_noticed_while_only_other_tables_are_written() {
    let outbox = Outbox::create(shared_postgres(), shared_rabbitmq()).await;
    outbox.sql("create table busy (t text)").await;
    let ledger = Ledger::new(outbox.confirmed().await);
    let link = Link::to_rabbitmq(shared_rabbitmq().port(), &ledger).await;
    let amqp = format!("amqp://guest:guest@127.0.0.1:{}/%2f", link.port());
    let relay = Relay::start_at(&outbox.url, &amqp, &outbox.name, &[]);
    relay.ready().await;
    link.refuse(true);
    link.cut();
    eventually("it is not ready", || async {
        outbox.sql("insert into busy values ('x')").await;
        relay.metric("pgoutbox_sessions_total{end=\"broker\"}") > 0.0 && !relay.is_ready()
    })
    .await;
    link.refuse(false);
    relay.ready().await;
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_slot_keeps_is_measured_while_the_broker_is_away() {
    let outbox = Outbox::create(shared_postgres(), shared_rabbitmq()).await;
    let relay = Relay::start_at(&outbox.url, "amqp://guest:guest@127.0.0.1:1/%2f", &outbox.name, &[]);
    outbox.sql("create table busy as select repeat(md5(n::text), 60) from generate_series(1, 5000) n").await;
    eventually("the WAL that waits is seen", || async {
        let kept = ["pgoutbox_slot_retained_bytes", "pgoutbox_wal_lag_bytes"].map(|name| relay.metric(name));
        kept.iter().all(|bytes| *bytes > 1e6)
    })
    .await;
    outbox.sql("alter publication pgoutbox set (publish = 'update')").await;
    eventually("what will stop it is said", || async { relay.log().contains("does not publish inserts") }).await;
    let attempts = relay.metric("pgoutbox_sessions_total{end=\"broker\"}");
    eventually("it goes on trying", || async {
        relay.metric("pgoutbox_sessions_total{end=\"broker\"}") > attempts + 1.0
    })
    .await;
    assert_eq!(relay.log().matches("does not publish inserts").count(), 1, "{}", relay.log());
    assert_eq!(relay.stop(), 0);
}

/// The catalog's functions wait for the table's lock. The stream does not, and attempts must not pile up in the server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_on_the_outbox_ends_no_session_and_leaves_no_backend_waiting() {
    let outbox = Outbox::create(shared_postgres_18(), shared_rabbitmq()).await;
    let consumer = Consumer::start(&outbox).await;
    let relay = Relay::start(&outbox);
    relay.ready().await;
    outbox.insert("placed").await;
    consumer.wait_distinct(1).await;
    let holder = connect(&outbox.url).await;
    holder.batch_execute("begin; lock table outbox in access exclusive mode").await.unwrap();
    let waiting = "select count(*)::text from pg_stat_activity where datname = current_database() \
        and wait_event_type = 'Lock'";
    let (mut seen, mut most) = (0, 0);
    let began = std::time::Instant::now();
    // Until a look has come, has been given up, and the session with it.
    while began.elapsed() < Duration::from_secs(22) {
        let now: usize = outbox.text(waiting).await.unwrap().parse().unwrap();
        (seen, most) = (seen + now, most.max(now));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(seen > 0, "nobody has looked");
    assert!(most <= 1, "{most} backends wait");
    holder.batch_execute("commit").await.unwrap();
    outbox.insert("placed").await;
    consumer.wait_distinct(2).await;
    assert_eq!(relay.metric("pgoutbox_sessions_total{end=\"postgres\"}"), 0.0, "{}", relay.log());
    assert_eq!(relay.stop(), 0);
}
