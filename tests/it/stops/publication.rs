//! The publication: missing, dropped, younger than the slot, or narrower than the table.
//!
//! The trap: PostgreSQL 15 says ERROR where PostgreSQL 18 says WARNING and skips the rows, so both are asked.

use pgoutbox::servers::Postgres;

use super::{WORLD, Witness, ended, statement, stops, verb};
use crate::support::consumer::Consumer;
use crate::support::relay::Relay;
use crate::support::{Outbox, shared_postgres, shared_postgres_18, shared_rabbitmq};

const PUBLISH: &str = "create publication pgoutbox for table outbox with (publish = 'insert')";

async fn outbox_on(postgres: &Postgres) -> Outbox {
    Outbox::create(postgres, shared_rabbitmq()).await
}

/// Drops slot and publication-made gaps: what the log says to do when rows are out of the stream's reach.
async fn drop_the_slot_and_init(outbox: &Outbox) {
    outbox.sql(&format!("select pg_drop_replication_slot('{}')", outbox.name)).await;
    let init = verb(outbox, &["init"]);
    assert!(init.status.success(), "{init:?}");
}

async fn dropped_while_streaming(postgres: &Postgres) {
    let outbox = outbox_on(postgres).await;
    let consumer = Consumer::start(&outbox).await;
    let witness = Witness::of(&outbox).await;
    let relay = Relay::start(&outbox);
    relay.ready().await;
    outbox.insert("before").await;
    consumer.wait_distinct(1).await;
    outbox.wait_confirmed(witness.last_commit().await).await;
    outbox.sql("drop publication pgoutbox").await;
    outbox.insert("unpublished").await;
    let unpublished = witness.last_commit().await;
    ended(relay, WORLD, &["publication \"pgoutbox\"", "reconcile from the table"]);
    assert!(outbox.confirmed().await < unpublished, "the slot was moved past a row that was not delivered");
    stops(&outbox, WORLD, &["publication pgoutbox does not exist", "pgoutbox init"]).await;
    // Creating it again brings back no row, and the relay does not go on as if it had.
    outbox.sql(PUBLISH).await;
    stops(&outbox, WORLD, &["drop the slot", "run `pgoutbox init`"]).await;
    assert!(outbox.confirmed().await < unpublished, "the slot was moved past a row that was not delivered");
    assert_eq!(consumer.count(), 1);
    drop_the_slot_and_init(&outbox).await;
    let relay = Relay::start(&outbox);
    outbox.insert("after").await;
    assert_eq!(consumer.wait_distinct(2).await[1].routing_key, "order.after");
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_dropped_while_streaming_stops_the_relay_before_the_row() {
    dropped_while_streaming(shared_postgres()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_dropped_while_streaming_stops_the_relay_before_the_row_on_18() {
    dropped_while_streaming(shared_postgres_18()).await;
}

async fn younger_than_the_slot(postgres: &Postgres) {
    let outbox = Outbox::empty(postgres, shared_rabbitmq()).await;
    outbox.sql(&crate::support::TABLE.replace("{table}", "public.outbox")).await;
    outbox.create_slot().await;
    let _consumer = Consumer::start(&outbox).await;
    let witness = Witness::of(&outbox).await;
    stops(&outbox, WORLD, &["publication pgoutbox does not exist", "older than the publication"]).await;
    outbox.insert("unpublished").await;
    let unpublished = witness.last_commit().await;
    outbox.sql(PUBLISH).await;
    outbox.insert("published").await;
    stops(&outbox, WORLD, &["drop the slot", "run `pgoutbox init`"]).await;
    assert!(outbox.confirmed().await < unpublished, "the slot was moved past a row that was not delivered");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_between_slot_and_publication_stop_the_relay() {
    younger_than_the_slot(shared_postgres()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_between_slot_and_publication_stop_the_relay_on_18() {
    younger_than_the_slot(shared_postgres_18()).await;
}

/// The world is broken by `sql` before the start; the log says `problem`, and its statement mends it.
async fn mended_by_the_remedy(postgres: &Postgres, sql: &str, problem: &str) {
    let outbox = outbox_on(postgres).await;
    let consumer = Consumer::start(&outbox).await;
    outbox.sql(sql).await;
    let log = stops(&outbox, WORLD, &[problem]).await;
    let remedy = statement(&log, "Remedy: ");
    assert!(remedy.starts_with("ALTER PUBLICATION"), "{log}");
    outbox.sql(&remedy).await;
    let relay = Relay::start(&outbox);
    outbox.insert("placed").await;
    consumer.wait_distinct(1).await;
    assert_eq!(relay.stop(), 0);
}

const ROW_FILTER: &str = "alter publication pgoutbox set table outbox where (type <> 'secret')";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_that_does_not_cover_the_table_is_mended_by_the_remedy() {
    let sql = "alter publication pgoutbox drop table outbox";
    mended_by_the_remedy(shared_postgres(), sql, "publication pgoutbox does not cover table public.outbox").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_filter_is_mended_by_the_remedy() {
    mended_by_the_remedy(shared_postgres(), ROW_FILTER, "hides rows of public.outbox by a row filter").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_filter_is_mended_by_the_remedy_on_18() {
    mended_by_the_remedy(shared_postgres_18(), ROW_FILTER, "hides rows of public.outbox by a row filter").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_of_updates_only_is_mended_by_the_remedy() {
    let sql = "alter publication pgoutbox set (publish = 'update')";
    mended_by_the_remedy(shared_postgres(), sql, "publication pgoutbox does not publish inserts").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_column_list_without_the_payload_is_mended_by_the_remedy() {
    let sql = "alter publication pgoutbox set table outbox (id, aggregatetype, aggregateid, type)";
    mended_by_the_remedy(shared_postgres(), sql, "leaves out columns of public.outbox: column payload is missing")
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_of_one_partition_only_is_mended_by_the_remedy() {
    let sql = "drop publication pgoutbox; drop table outbox; \
        create table outbox (id int, aggregatetype text, aggregateid text, type text, payload jsonb) partition by list (id);\
        create table outbox_1 partition of outbox for values in (1);\
        create table outbox_2 partition of outbox default;\
        create publication pgoutbox for table outbox_1 with (publish = 'insert')";
    let outbox = outbox_on(shared_postgres()).await;
    let consumer = Consumer::start(&outbox).await;
    outbox.sql(sql).await;
    let log = stops(&outbox, WORLD, &["publication pgoutbox does not cover table public.outbox"]).await;
    outbox.sql(&statement(&log, "Remedy: ")).await;
    let relay = Relay::start(&outbox);
    let row = |id: u8| format!("insert into outbox values ({id}, 'order', '1', 'placed', '{{}}')");
    outbox.sql(&(row(1) + ";" + &row(2))).await;
    assert_eq!(consumer.wait_distinct(2).await.len(), 2);
    assert_eq!(relay.stop(), 0);
}
