//! The table: missing, dropped and re-created, or with other columns than an outbox has.
//!
//! The trap: Postgres streams on without a word when the outbox has left the publication, and its keepalives move the slot.

use super::{WORLD, Witness, ended, stops, stops_with};
use crate::support::consumer::Consumer;
use crate::support::relay::Relay;
use crate::support::{Outbox, TABLE, shared_postgres, shared_rabbitmq};

async fn outbox() -> Outbox {
    Outbox::create(shared_postgres(), shared_rabbitmq()).await
}

/// The table is replaced by an empty one of the same name.
fn recreate() -> String {
    format!("drop table outbox; {}", TABLE.replace("{table}", "public.outbox"))
}

const ADD: &str = "alter publication pgoutbox add table outbox";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_table_is_named() {
    let outbox = outbox().await;
    outbox.sql("drop table outbox").await;
    stops(&outbox, WORLD, &["table public.outbox does not exist", "pgoutbox init", "ADD TABLE public.outbox"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_recreated_outside_the_publication_stops_the_relay_at_its_start_and_while_it_streams() {
    let outbox = outbox().await;
    let consumer = Consumer::start(&outbox).await;
    let relay = Relay::start(&outbox);
    relay.ready().await;
    outbox.sql(&recreate()).await;
    outbox.insert("unpublished").await;
    let covers = "publication pgoutbox does not cover table public.outbox";
    ended(relay, WORLD, &[covers, "reconcile"]);
    stops(&outbox, WORLD, &[covers, "ALTER PUBLICATION pgoutbox ADD TABLE public.outbox", "reconcile"]).await;
    outbox.sql(ADD).await;
    let relay = Relay::start(&outbox);
    outbox.insert("after").await;
    assert_eq!(consumer.wait_distinct(1).await[0].routing_key, "order.after");
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_recreated_in_the_publication_while_it_streams_stops_the_relay_before_its_first_row() {
    let outbox = outbox().await;
    let consumer = Consumer::start(&outbox).await;
    let relay = Relay::start(&outbox);
    relay.ready().await;
    outbox.sql(&format!("begin; {}; {ADD}; commit", recreate())).await;
    let witness = Witness::of(&outbox).await;
    outbox.insert("new").await;
    let new = witness.last_commit().await;
    ended(relay, WORLD, &["public.outbox was dropped and re-created", "restart"]);
    assert!(outbox.confirmed().await < new);
    // The remedy.
    let relay = Relay::start(&outbox);
    assert_eq!(consumer.wait_distinct(1).await[0].routing_key, "order.new");
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_a_dropped_table_are_not_passed_over() {
    let outbox = outbox().await;
    let consumer = Consumer::start(&outbox).await;
    let witness = Witness::of(&outbox).await;
    outbox.insert("old").await;
    let old = witness.last_commit().await;
    outbox.sql(&recreate()).await;
    outbox.sql(ADD).await;
    outbox.insert("new").await;
    let says = ["public.outbox was dropped and re-created", "pg_logical_slot_peek_binary_changes"];
    stops(&outbox, WORLD, &says).await;
    assert!(outbox.confirmed().await < old);
    assert_eq!(consumer.count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renamed_column_stops_the_relay_at_the_first_row_that_has_it() {
    let outbox = outbox().await;
    let consumer = Consumer::start(&outbox).await;
    let witness = Witness::of(&outbox).await;
    outbox.insert("before").await;
    let before = witness.last_commit().await;
    outbox.sql("alter table outbox rename payload to body").await;
    outbox
        .sql("insert into outbox (aggregatetype, aggregateid, type, body) values ('order', '1', 'renamed', '{}')")
        .await;
    let renamed = witness.last_commit().await;
    // With both names unknown to the catalog, the start says so; the column's own name then streams the rows before it.
    stops(&outbox, WORLD, &["column payload is missing", "outbox.columns"]).await;
    outbox.sql("alter table outbox add payload jsonb").await;
    outbox.sql("alter table outbox drop payload").await;
    assert_eq!(consumer.count(), 0);
    outbox.sql("alter table outbox rename body to payload").await;
    let log = stops(&outbox, WORLD, &["column payload is missing"]).await;
    assert!(log.contains("outbox.columns"), "{log}");
    assert_eq!(consumer.wait_distinct(1).await[0].routing_key, "order.before");
    let confirmed = outbox.confirmed().await;
    assert!(confirmed >= before && confirmed < renamed, "{before} {confirmed} {renamed}");
    // The remedy: the name that the column had at the time.
    outbox.sql("alter table outbox rename payload to body").await;
    let relay = Relay::start_with(&outbox, &[("outbox.columns.payload", "body")]);
    assert_eq!(consumer.wait_distinct(2).await[1].routing_key, "order.renamed");
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_column_dropped_while_streaming_stops_the_relay_before_the_row() {
    let outbox = outbox().await;
    let consumer = Consumer::start(&outbox).await;
    let witness = Witness::of(&outbox).await;
    let relay = Relay::start(&outbox);
    relay.ready().await;
    outbox.insert("before").await;
    outbox.sql("alter table outbox drop payload").await;
    outbox.sql("insert into outbox (aggregatetype, aggregateid, type) values ('order', '1', 'after')").await;
    let after = witness.last_commit().await;
    ended(relay, WORLD, &["table public.outbox: column payload is missing", "ALTER TABLE"]);
    assert!(outbox.confirmed().await < after);
    assert_eq!(consumer.wait_distinct(1).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payload_that_is_neither_json_nor_text_nor_bytes_is_refused() {
    let outbox = outbox().await;
    outbox.sql("alter table outbox drop payload; alter table outbox add payload int").await;
    stops_with(&outbox, &[], WORLD, &["column payload must be json, jsonb, text or bytea"]).await;
}

/// A partitioned outbox, and a row in a partition that is detached before anybody has read the row.
async fn detached(via_root: bool) -> Outbox {
    let outbox = Outbox::empty(shared_postgres(), shared_rabbitmq()).await;
    outbox
        .sql(
            "create table outbox (id uuid not null default gen_random_uuid(), aggregatetype text, aggregateid text, \
             type text, payload jsonb) partition by list (type); \
             create table outbox_old partition of outbox for values in ('old'); \
             create table outbox_new partition of outbox default",
        )
        .await;
    let with = format!("publish = 'insert', publish_via_partition_root = {via_root}");
    outbox.sql(&format!("create publication pgoutbox for table outbox with ({with})")).await;
    outbox.create_slot().await;
    outbox.insert("old").await;
    outbox.sql("alter table outbox detach partition outbox_old").await;
    outbox.insert("new").await;
    outbox
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unread_row_of_a_detached_partition_stops_the_relay_until_it_is_attached_again() {
    let outbox = detached(false).await;
    let consumer = Consumer::start(&outbox).await;
    let skip = format!(
        "skip the whole transaction, other rows in it too, with: SELECT pg_replication_slot_advance('{}', '",
        outbox.name
    );
    stops(&outbox, WORLD, &["a row of table public.outbox_old", "detached", "attach it", &skip]).await;
    assert_eq!(consumer.count(), 0);
    outbox.sql("alter table outbox attach partition outbox_old for values in ('old')").await;
    let relay = Relay::start(&outbox);
    let received = consumer.wait_distinct(2).await;
    let keys: Vec<&str> = received.iter().map(|received| received.routing_key.as_str()).collect();
    assert_eq!(keys, ["order.old", "order.new"]);
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unread_row_of_a_detached_partition_that_is_announced_as_its_root_arrives() {
    let outbox = detached(true).await;
    let consumer = Consumer::start(&outbox).await;
    let relay = Relay::start(&outbox);
    let received = consumer.wait_distinct(2).await;
    assert_eq!(received[0].routing_key, "order.old");
    assert_eq!(relay.stop(), 0);
}
