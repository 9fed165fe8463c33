//! Failovers on real servers: what the new primary has arrives, what it has not is counted, and nothing is guessed.
//!
//! The trap: a position means something on one timeline only. A relay that takes its old one to a standby that lagged skips
//! the rows that were written there at the same positions, without a word.

use std::path::Path;

use crate::support::failover::{Pair, lagging_standby, synced_standby};
use crate::support::relay::Relay;
use crate::support::{PATIENCE, connect, eventually, postgres_bin};

async fn each(version: u32) {
    let bin = postgres_bin(version);
    let outcome = synced_standby(&bin).await;
    assert_eq!((outcome.lost, outcome.phantoms, outcome.reordered), (0, 0, 0), "{version}: {outcome:?}");
    assert!(outcome.counted == 0.0, "{version}: {outcome:?}");
    // Those since the standby last took over the slot's position.
    assert!(outcome.duplicates <= 60, "{version}: {outcome:?}");

    let outcome = lagging_standby(&bin).await;
    assert_eq!((outcome.lost, outcome.phantoms, outcome.reordered), (0, 60, 0), "{version}: {outcome:?}");
    assert!(outcome.counted == 60.0, "{version}: {outcome:?}");
    assert!(outcome.duplicates <= 20, "{version}: {outcome:?}");
    assert!(outcome.log.contains("whose transactions this primary does not have"), "{}", outcome.log);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_17_fails_over_to_a_synced_and_to_a_lagging_standby() {
    each(17).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_18_fails_over_to_a_synced_and_to_a_lagging_standby() {
    each(18).await;
}

/// Postgres says that it waits by a warning of the SQLSTATE of a skipped publication.
async fn waits_for_its_standby(version: u32) {
    let mut pair = Pair::start(&postgres_bin(version), true, true).await;
    let relay = Relay::start(&pair.outbox);
    relay.ready().await;
    pair.insert(1).await;
    pair.consumer.wait_distinct(1).await;
    pair.standby.stop("fast", PATIENCE).unwrap();
    pair.insert(3).await;
    eventually("it is said what is waited for", || async { relay.log().contains("does not have active_pid") }).await;
    assert_eq!(pair.consumer.received().len(), 1);
    pair.standby.start_again().unwrap();
    pair.consumer.wait_distinct(4).await;
    assert!(!relay.log().contains("skips rows"), "{}", relay.log());
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_waits_while_a_synchronized_standby_of_postgres_17_is_away() {
    waits_for_its_standby(17).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_waits_while_a_synchronized_standby_of_postgres_18_is_away() {
    waits_for_its_standby(18).await;
}

/// A relay that has delivered one row, then a standby that has it too is promoted, and the old primary still runs.
async fn promoted_beside(bin: &Path, failover: bool) -> (Pair, Relay) {
    let mut pair = Pair::start(bin, failover, false).await;
    let relay = Relay::start(&pair.outbox);
    relay.ready().await;
    pair.insert(1).await;
    pair.consumer.wait_distinct(1).await;
    pair.outbox.wait_confirmed(pair.outbox.current().await).await;
    if failover {
        pair.slot_is_synced().await;
    }
    pair.standby_has_all().await;
    pair.promote().await;
    (pair, relay)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_primary_without_the_slot_stops_the_relay_and_nothing_is_created_there() {
    let (pair, relay) = promoted_beside(&postgres_bin(18), false).await;
    pair.address.lead_to(pair.standby.port());
    let (code, log) = relay.ended();
    assert_eq!(code, 78, "{log}");
    assert!(log.contains("slot"), "{log}");
    assert_eq!(pair.outbox.text("select count(*) from pg_replication_slots").await.unwrap(), "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_primary_that_comes_back_is_not_listened_to() {
    let (pair, relay) = promoted_beside(&postgres_bin(18), true).await;
    let old = connect(&pair.primary.url_for("postgres", None, &pair.outbox.name)).await;
    pair.address.lead_to(pair.standby.port());
    pair.insert(1).await;
    pair.consumer.wait_distinct(2).await;

    pair.address.lead_to(pair.primary.port());
    let row = "insert into outbox (aggregatetype, aggregateid, type) values ('order', '1', 'resurrected')";
    old.batch_execute(row).await.unwrap();
    eventually("the old primary is seen", || async { relay.log().contains("it is an old primary") }).await;
    assert!(!relay.is_ready());

    pair.address.lead_to(pair.standby.port());
    pair.insert(1).await;
    let received = pair.consumer.wait_distinct(3).await;
    assert!(received.iter().all(|message| message.routing_key != "order.resurrected"), "{received:?}");
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_slots_position_on_one_server_is_never_used_on_another() {
    let (pair, relay) = promoted_beside(&postgres_bin(18), true).await;
    // What the relay settles on the old primary alone takes its slot far beyond the new one's rows.
    let old = connect(&pair.primary.url_for("postgres", None, &pair.outbox.name)).await;
    old.batch_execute("create table noise as select generate_series(1, 100000) n").await.unwrap();
    let position = "select pg_current_wal_flush_lsn()::text";
    let far: String = old.query_one(position, &[]).await.unwrap().get(0);
    let passed = format!("select 1 from pg_replication_slots where confirmed_flush_lsn >= '{far}'");
    eventually("the old slot moves", || async { !old.query(&passed, &[]).await.unwrap().is_empty() }).await;
    pair.insert(5).await;

    // SQL goes to the old primary, the stream to the new one; and then the other way round.
    pair.address.lead_in_turn(&[pair.primary.port(), pair.standby.port()]);
    eventually("both are seen", || async { relay.log().contains("two servers answer at") }).await;
    pair.address.lead_to(pair.standby.port());
    pair.consumer.wait_distinct(6).await;
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_on_a_standby_waits_and_works_after_its_promotion() {
    let mut pair = Pair::start(&postgres_bin(18), true, false).await;
    // Somebody has to move the slot, or it does not last on the standby.
    let relay = Relay::start(&pair.outbox);
    relay.ready().await;
    pair.insert(1).await;
    pair.consumer.wait_distinct(1).await;
    pair.slot_is_synced().await;
    assert_eq!(relay.stop(), 0);

    pair.address.lead_to(pair.standby.port());
    let relay = Relay::start(&pair.outbox);
    eventually("the relay waits", || async { relay.log().contains("is a standby: waiting for a primary") }).await;
    assert!(!relay.is_ready());
    pair.insert(3).await;
    pair.standby_has_all().await;
    pair.primary.kill().unwrap();
    pair.promote().await;
    relay.ready().await;
    pair.insert(3).await;
    pair.consumer.wait_distinct(7).await;
    assert_eq!(relay.stop(), 0);
}
