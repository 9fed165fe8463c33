//! Memory is the window, whatever the transaction and whatever the backlog.
//!
//! The trap: resident memory measured at the end shows nothing of the peak, so the kernel's high-water mark is read.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;

use crate::support::consumer::{self, Received};
use crate::support::relay::Relay;
use crate::support::{Outbox, shared_postgres, shared_rabbitmq};

/// The bar: nothing but window and row size may bound it.
const MEMORY_MAX_KIB: u64 = 64 * 1024;

/// Takes everything and keeps nothing; panics where a position does not rise.
async fn count(outbox: &Outbox, counted: Arc<AtomicUsize>) {
    let queue = format!("{}_all", outbox.name);
    consumer::bind(outbox, &queue, "#").await;
    let (connection, channel) = consumer::channel(&outbox.amqp).await;
    channel.basic_qos(500, BasicQosOptions::default()).await.unwrap();
    let options = BasicConsumeOptions::default();
    let mut deliveries =
        channel.basic_consume(queue.as_str().into(), "".into(), options, FieldTable::default()).await.unwrap();
    tokio::spawn(async move {
        let _connection = connection;
        let mut last = None;
        while let Some(delivery) = deliveries.next().await {
            let delivery = delivery.unwrap();
            let tag = delivery.delivery_tag;
            let position = Received::from(delivery).position;
            assert!(last < Some(position), "{position:?} after {last:?}");
            last = Some(position);
            if counted.fetch_add(1, Ordering::Relaxed) % 100 == 99 {
                channel.basic_ack(tag, BasicAckOptions { multiple: true }).await.unwrap();
            }
        }
    });
}

async fn deliver(outbox: &Outbox, rows: usize) {
    let counted = Arc::new(AtomicUsize::new(0));
    count(outbox, counted.clone()).await;
    let relay = Relay::start(outbox);
    let began = Instant::now();
    let mut progress = (Instant::now(), 0);
    while counted.load(Ordering::Relaxed) < rows {
        let now = counted.load(Ordering::Relaxed);
        if now > progress.1 {
            progress = (Instant::now(), now);
        }
        // The server spills a large transaction to disk before it sends the first row.
        assert!(progress.0.elapsed() < Duration::from_secs(120), "{now} of {rows} came\n{}", relay.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let peak = relay.peak_memory_kib().unwrap();
    println!("{rows} rows in {:?}, peak {peak} KiB", began.elapsed());
    outbox.wait_confirmed(outbox.current().await).await;
    assert_eq!(counted.load(Ordering::Relaxed), rows, "duplicates");
    assert!(peak < MEMORY_MAX_KIB, "peak {peak} KiB");
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_of_a_million_rows_passes_through_a_small_window() {
    let outbox = Outbox::create(shared_postgres(), shared_rabbitmq()).await;
    outbox
        .sql(
            "insert into outbox (aggregatetype, aggregateid, type, payload) \
             select 'order', n::text, 'placed', jsonb_build_object('n', n) from generate_series(1, 1000000) n",
        )
        .await;
    deliver(&outbox, 1_000_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_of_a_gigabyte_passes_through_a_small_window() {
    let outbox = Outbox::create(shared_postgres(), shared_rabbitmq()).await;
    outbox.sql("alter table outbox alter payload type text using null, alter payload set storage external").await;
    // 16 KB a row, a hundred rows a transaction.
    outbox
        .sql(
            "do $$ begin for i in 1..650 loop \
             insert into outbox (aggregatetype, aggregateid, type, payload) \
             select 'order', n::text, 'placed', repeat('payload ', 2048) from generate_series(1, 100) n; \
             commit; end loop; end $$",
        )
        .await;
    deliver(&outbox, 65_000).await;
}
