//! Rows that no broker could take: the relay stops exactly before them, and its log has the statement that goes on after them.
//!
//! The trap: what comes before the row is often read in the same breath. It is delivered and confirmed all the same, and the
//! statement must not skip one transaction more.

use pgoutbox::servers::Postgres;

use super::{ROW, Witness, ended, statement, stops, stops_with};
use crate::support::consumer::Consumer;
use crate::support::relay::Relay;
use crate::support::{Outbox, shared_postgres, shared_postgres_18, shared_rabbitmq};

/// An undeliverable row, as values of id, aggregatetype, type, payload and headers.
struct Bad {
    values: &'static str,
    settings: &'static [(&'static str, &'static str)],
    says: &'static str,
}

const ID: &str = "00000000-0000-0000-0000-00000000bad0";

async fn stops_before(postgres: &Postgres, bad: &Bad) {
    let outbox = Outbox::create(postgres, shared_rabbitmq()).await;
    outbox.sql("alter table outbox alter aggregatetype drop not null").await;
    let consumer = Consumer::start(&outbox).await;
    let witness = Witness::of(&outbox).await;
    let before = [outbox.insert("before").await, outbox.insert("before").await];
    let last_good = witness.last_commit().await;
    let values = bad.values;
    outbox
        .sql(&format!(
            "insert into outbox (id, aggregateid, aggregatetype, type, payload, headers) \
             values (gen_random_uuid(), '1', 'order', 'same-transaction', null, null), ('{ID}', '1', {values})"
        ))
        .await;
    let bad_commit = witness.last_commit().await;
    let after = outbox.insert("after").await;
    let log = stops_with(&outbox, bad.settings, ROW, &[ID, bad.says, "row 1 of the transaction"]).await;
    let confirmed = outbox.confirmed().await;
    assert!(confirmed >= last_good && confirmed < bad_commit, "{last_good} <= {confirmed} < {bad_commit}");
    let received = consumer.wait_distinct(3).await;
    let ids = || received.iter().map(|received| received.id.as_str());
    assert!(ids().take(2).eq(before.iter().map(String::as_str)), "{received:?}");
    assert_eq!((received[2].routing_key.as_str(), received.len()), ("order.same-transaction", 3), "{log}");
    // Again: it stops at the same place, and only the transaction in question begins anew.
    stops_with(&outbox, bad.settings, ROW, &[ID]).await;
    let skip = statement(&log, "whole transaction with: ");
    outbox.sql(&skip).await;
    let relay = Relay::start_with(&outbox, bad.settings);
    let received = consumer.wait_distinct(4).await;
    assert_eq!(received.last().unwrap().id, after);
    assert_eq!(relay.stop(), 0);
    assert_eq!(consumer.count(), 5, "only the row before the bad one in its own transaction came twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_null_where_a_value_is_needed_stops_the_relay() {
    let bad = Bad { values: "null, 'placed', '{}', null", settings: &[], says: "column aggregatetype is NULL" };
    stops_before(shared_postgres(), &bad).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_null_where_a_value_is_needed_stops_the_relay_on_18() {
    let bad = Bad { values: "null, 'placed', '{}', null", settings: &[], says: "column aggregatetype is NULL" };
    stops_before(shared_postgres_18(), &bad).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_routing_key_beyond_255_bytes_stops_the_relay() {
    let values = "repeat('ä', 125), 'placed', '{}', null";
    stops_before(shared_postgres(), &Bad { values, settings: &[], says: "the routing key has 257 bytes" }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_that_are_no_object_stop_the_relay() {
    let bad = Bad { values: "'order', 'placed', '{}', '[1]'", settings: &[], says: "headers is not a JSON object" };
    stops_before(shared_postgres(), &bad).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_header_that_steers_the_broker_stops_the_relay() {
    let values = "'order', 'placed', '{}', '{\"CC\": [\"s3cret-queue\"]}'";
    stops_before(shared_postgres(), &Bad { values, settings: &[], says: "header \"CC\" is reserved" }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_beyond_the_brokers_limit_stops_the_relay() {
    let bad = Bad {
        values: "'order', 'placed', to_jsonb(repeat('x', 5000)), null",
        settings: &[("rabbitmq.message_bytes_max", "4KiB")],
        says: "its body has 5002 bytes; the broker takes 4096 (where its max_message_size is larger, set rabbitmq.message_",
    };
    stops_before(shared_postgres(), &bad).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_beyond_a_frame_stop_the_relay() {
    let values = "'order', 'placed', '{}', jsonb_build_object('long', repeat('x', 131072))";
    stops_before(shared_postgres(), &Bad { values, settings: &[], says: "one frame takes 131064 (frame_max: " }).await;
}

/// 0x81 stands for nothing in WIN1252, which Postgres stores all the same; what has no form in UTF-8 cannot be sent in it.
async fn stops_before_what_the_server_cannot_send(kind_and_payload: &str) {
    let win1252 = "encoding 'WIN1252' lc_collate 'C' lc_ctype 'C' template template0";
    let outbox = Outbox::create_in(win1252, shared_postgres(), shared_rabbitmq()).await;
    let consumer = Consumer::start(&outbox).await;
    let witness = Witness::of(&outbox).await;
    let relay = Relay::start(&outbox);
    relay.ready().await;
    let before = outbox.insert("before").await;
    let last_good = witness.last_commit().await;
    outbox.wait_confirmed(last_good).await;
    outbox
        .sql(&format!(
            "insert into outbox (aggregatetype, aggregateid, type, payload) values ('order', '1', {kind_and_payload})"
        ))
        .await;
    let bad_commit = witness.last_commit().await;
    let after = outbox.insert("after").await;
    let says = ["SQLSTATE 22P05", "WIN1252", "is no UTF-8, can never be sent", "skip the whole transaction with: "];
    ended(relay, ROW, &says);
    // Again, and from the first moment on.
    let log = stops(&outbox, ROW, &says).await;
    let confirmed = outbox.confirmed().await;
    assert!(confirmed >= last_good && confirmed < bad_commit, "{last_good} <= {confirmed} < {bad_commit}");
    let ids = || consumer.received().into_iter().map(|received| received.id).collect::<Vec<_>>();
    assert_eq!(ids(), [before.as_str()]);
    outbox.sql(&statement(&log, "skip the whole transaction with: ")).await;
    let relay = Relay::start(&outbox);
    consumer.wait_distinct(2).await;
    assert_eq!(relay.stop(), 0);
    assert_eq!(ids(), [before, after]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_has_no_form_in_utf_8_stops_the_relay() {
    stops_before_what_the_server_cannot_send(r"E'\x81', '{}'").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payload_that_has_no_form_in_utf_8_stops_the_relay() {
    stops_before_what_the_server_cannot_send(r"'placed', to_jsonb(E'\x81'::text)").await;
}
