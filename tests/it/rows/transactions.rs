//! What is an event and what is none: inserts that were committed, in the order of their commits, wherever they are stored.
//!
//! The trap: a partition is announced under its own name, a table may change between two transactions, and what is prepared
//! is not yet committed.

use bytes::Bytes;
use futures_util::SinkExt;
use nix::sys::signal::Signal;
use pgoutbox::servers::Postgres;

use super::Stage;
use crate::support::consumer::Consumer;
use crate::support::links::{Ledger, Link, Toxics};
use crate::support::relay::Relay;
use crate::support::{Outbox, connect, eventually, shared_postgres, shared_rabbitmq};

fn insert(kinds: &[&str]) -> String {
    let rows: Vec<String> = kinds.iter().map(|kind| format!("('order', '1', '{kind}', '{{}}')")).collect();
    format!("insert into outbox (aggregatetype, aggregateid, type, payload) values {}", rows.join(", "))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_committed_inserts_are_events() {
    let stage = Stage::set().await;
    let outbox = &stage.outbox;
    let sql = |sql: String| async move { outbox.sql(&sql).await };
    sql("create table other (n int); alter publication pgoutbox add table other".to_owned()).await;
    sql(format!("begin; {}; delete from outbox; commit", insert(&["deleted"]))).await;
    sql(format!("begin; {}; rollback", insert(&["undone"]))).await;
    sql(format!(
        "begin; {}; savepoint s; {}; rollback to s; {}; savepoint t; {}; release t; commit",
        insert(&["first"]),
        insert(&["undone"]),
        insert(&["second"]),
        insert(&["third"])
    ))
    .await;
    sql(insert(&["fourth", "fifth"])).await;
    sql("alter publication pgoutbox set (publish = 'insert, update, delete, truncate')".to_owned()).await;
    sql("update outbox set type = 'updated'; delete from outbox where true; truncate outbox".to_owned()).await;
    sql("insert into other select generate_series(1, 100)".to_owned()).await;
    let copy = stage.outbox.client.copy_in("copy outbox (aggregatetype, aggregateid, type, payload) from stdin").await;
    let mut copy = std::pin::pin!(copy.unwrap());
    copy.send(Bytes::from_static(b"order\t1\tsixth\t{}\norder\t1\tseventh\t\\N\n")).await.unwrap();
    copy.close().await.unwrap();
    let received = stage.received(8).await;
    assert_eq!(stage.kinds(), ["deleted", "first", "second", "third", "fourth", "fifth", "sixth", "seventh"]);
    assert!(received.windows(2).all(|pair| pair[0].position < pair[1].position));
    stage.stop();
}

/// The relay takes what is there in batches, and another table's rows fill none: here most batches end by the number of events
/// that they look at, and with every eleventh a row, each place in such a batch is one's in some of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_among_many_of_another_table_are_all_events() {
    const ROWS: usize = 1500;
    let stage = Stage::set().await;
    stage.outbox.sql("create table other (n int); alter publication pgoutbox add table other").await;
    let all = format!(
        "do $$ begin for number in 1..{ROWS} loop \
         insert into other select generate_series(1, 10); \
         insert into outbox (aggregatetype, aggregateid, type, payload) values ('order', '1', number::text, '{{}}'); \
         end loop; end $$"
    );
    // All of it is in the relay's socket before it reads on: else batches end where the server is the slower one.
    stage.relay.signal(Signal::SIGSTOP);
    stage.outbox.sql(&all).await;
    let sent = format!(
        "select (sent_lsn >= '{}')::text from pg_stat_replication join pg_replication_slots on active_pid = pid \
         where database = current_database()",
        stage.outbox.current().await
    );
    eventually("all is sent", || async { stage.outbox.text(&sent).await.as_deref() == Some("true") }).await;
    stage.relay.signal(Signal::SIGCONT);
    stage.received(ROWS).await;
    assert_eq!(stage.kinds(), (1..=ROWS).map(|number| number.to_string()).collect::<Vec<_>>());
    stage.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_may_be_altered_between_two_transactions() {
    let stage = Stage::set().await;
    for (kind, change) in [
        ("1", "alter table outbox add note text default 'n'"),
        ("2", "alter table outbox drop created_at, drop headers"),
        ("3", "alter table outbox add headers jsonb default '{\"h\": 1}', drop note"),
        ("4", "alter table outbox drop payload, add payload text default 'last'"),
    ] {
        stage.outbox.sql(&insert(&[kind])).await;
        stage.outbox.sql(change).await;
    }
    stage.outbox.sql("insert into outbox (aggregatetype, aggregateid, type) values ('order', '1', '5')").await;
    let received = stage.received(5).await;
    assert_eq!(stage.kinds(), ["1", "2", "3", "4", "5"]);
    assert_eq!(received[4].body, b"last");
    assert!(received[2].header("h").is_none() && received[3].header("h").is_some());
    stage.stop();
}

const PARTITIONED: &str = "create table outbox (id int generated always as identity, aggregatetype text, aggregateid text, \
    type text, payload jsonb) partition by list (type); create table outbox_a partition of outbox for values in ('a')";

async fn partitions_as_they_come(with: &str) {
    let stage = Stage::with_table(PARTITIONED, with, &[]).await;
    stage.outbox.sql(&insert(&["a"])).await;
    stage.outbox.sql("create table outbox_b partition of outbox for values in ('b')").await;
    stage.outbox.sql(&insert(&["b", "a"])).await;
    // Attached with its columns in another order, and with a row that was there before.
    stage
        .outbox
        .sql(
            "create table late (payload jsonb, type text not null, id int not null, aggregateid text, aggregatetype text); \
             insert into late values ('{}', 'c', 0, '1', 'early'); \
             alter table outbox attach partition late for values in ('c')",
        )
        .await;
    stage.outbox.sql(&insert(&["c"])).await;
    // Dropped only after its rows have arrived: what the log of a dropped partition holds cannot be told from a stranger's.
    stage.received(4).await;
    stage.outbox.sql("drop table outbox_b").await;
    stage.outbox.sql(&insert(&["a"])).await;
    let received = stage.received(5).await;
    assert_eq!(stage.kinds(), ["a", "b", "a", "c", "a"]);
    assert!(received.iter().all(|received| received.routing_key.starts_with("order.")));
    stage.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_partitions_arrive_when_they_are_announced_as_their_root() {
    partitions_as_they_come("publish = 'insert', publish_via_partition_root = true").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_partitions_arrive_when_they_are_announced_as_themselves() {
    partitions_as_they_come("publish = 'insert', publish_via_partition_root = false").await;
}

/// Its commit is in the stream before the catalog shows what it made.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_a_partition_whose_commit_waits_for_a_standby_arrive_when_it_does() {
    // From the start: who sets it later does not know since when it holds. Nobody but the writer waits.
    let settings = [("synchronous_standby_names", "nobody"), ("synchronous_commit", "local")];
    let postgres = Postgres::start(&settings).unwrap();
    let outbox = Outbox::empty(&postgres, shared_rabbitmq()).await;
    outbox.sql(PARTITIONED).await;
    outbox.sql("create publication pgoutbox for table outbox with (publish = 'insert')").await;
    outbox.create_slot().await;
    // In the same read as what waits, and not its hostage.
    outbox.sql(&insert(&["a"])).await;
    let writer = connect(&outbox.url).await;
    writer.batch_execute("set synchronous_commit = on").await.unwrap();
    let transaction = format!("create table outbox_b partition of outbox for values in ('b'); {}", insert(&["b"]));
    let waiting = tokio::spawn(async move { writer.batch_execute(&format!("begin; {transaction}; commit")).await });
    let written = "select 'yes' from pg_stat_activity where wait_event = 'SyncRep'";
    eventually("the commit waits", || async { outbox.text(written).await.is_some() }).await;
    let (consumer, relay) = (Consumer::start(&outbox).await, Relay::start(&outbox));
    let stage = Stage { outbox, consumer, relay };
    stage.consumer.wait_distinct(1).await;
    let waits =
        || async { stage.relay.log().contains("rows of table public.outbox_b, waits for a synchronous standby") };
    eventually("the relay waits for the table", waits).await;
    assert!(!waiting.is_finished());
    postgres.append_conf("synchronous_standby_names = ''").unwrap();
    postgres.reload().unwrap();
    waiting.await.unwrap().unwrap();
    stage.received(2).await;
    assert_eq!(stage.kinds(), ["a", "b"]);
    stage.stop();
}

/// A table of the publication from the stream's beginning, attached before its first row.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_a_published_table_that_becomes_a_partition_arrive() {
    let stage = Stage::with_table(PARTITIONED, "publish = 'insert'", &[]).await;
    let sql = "create table late (like outbox); alter publication pgoutbox add table late";
    stage.outbox.sql(sql).await;
    stage.outbox.sql("insert into late (id, type) values (1, 'own')").await;
    stage.outbox.sql(&insert(&["a"])).await;
    stage.received(1).await;
    stage
        .outbox
        .sql(&format!(
            "delete from late; alter table outbox attach partition late for values in ('b'); {}",
            insert(&["b"])
        ))
        .await;
    stage.received(2).await;
    assert_eq!(stage.kinds(), ["a", "b"]);
}

/// A publication of all tables, and one that is there for the length of a transaction only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_a_table_that_is_gone_pass_by_when_it_had_not_the_columns_of_an_outbox() {
    let outbox = Outbox::empty(shared_postgres(), shared_rabbitmq()).await;
    outbox.sql(PARTITIONED).await;
    outbox
        .sql("create publication pgoutbox for all tables with (publish = 'insert', publish_via_partition_root = true)")
        .await;
    outbox.create_slot().await;
    let stage = Stage::of(outbox, &[]).await;
    let staging = "create table staging (id int); insert into staging values (1)";
    stage.outbox.sql(&format!("begin; {staging}; {}; drop table staging; commit", insert(&["a"]))).await;
    stage.received(1).await;
    assert!(stage.relay.log().contains("rows of table public.staging"), "{}", stage.relay.log());
    stage.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prepared_transaction_arrives_when_it_is_committed() {
    // A prepared transaction would hold up every new slot of a shared server.
    let postgres = Postgres::start(&[("max_prepared_transactions", "5")]).unwrap();
    let stage = Stage::of(Outbox::create(&postgres, shared_rabbitmq()).await, &[]).await;
    for kind in ["prepared", "abandoned"] {
        stage.outbox.sql(&format!("begin; {}; prepare transaction '{kind}'", insert(&[kind]))).await;
    }
    stage.outbox.sql(&insert(&["between"])).await;
    stage.received(1).await;
    stage.outbox.sql("rollback prepared 'abandoned'").await;
    stage.outbox.sql("commit prepared 'prepared'").await;
    stage.outbox.sql(&insert(&["after"])).await;
    stage.received(3).await;
    assert_eq!(stage.kinds(), ["between", "prepared", "after"]);
    stage.stop();
}

/// As the worker of a subscription writes, or a tool that copies rows: pgoutput says so in a message of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_a_replication_origin_are_events_as_all_others() {
    let stage = Stage::set().await;
    let origin = &stage.outbox.name;
    stage.outbox.sql(&insert(&["before"])).await;
    let copier = connect(&stage.outbox.url).await;
    let setup =
        format!("select pg_replication_origin_create('{origin}'), pg_replication_origin_session_setup('{origin}')");
    copier.batch_execute(&setup).await.unwrap();
    copier.batch_execute(&insert(&["copied"])).await.unwrap();
    let then = "select pg_replication_origin_xact_setup('0/AB', '2024-03-01 00:00:00+00')";
    copier.batch_execute(&format!("begin; {then}; {}; commit", insert(&["first", "second"]))).await.unwrap();
    stage.outbox.sql(&insert(&["after"])).await;
    let received = stage.received(5).await;
    assert_eq!(stage.kinds(), ["before", "copied", "first", "second", "after"]);
    let seconds: Vec<_> = received.iter().map(|received| received.properties.timestamp().unwrap()).collect();
    assert_eq!(seconds[2..4], [1_709_251_200; 2], "a commit that says when it was first made was made then");
    let progress = format!("select pg_replication_origin_progress('{origin}', true)");
    assert_eq!(stage.outbox.text(&progress).await.as_deref(), Some("0/AB"), "none of them has an origin");
    stage.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_outbox_follows_the_writes_of_other_tables() {
    let stage = Stage::set().await;
    stage.outbox.sql("create table busy (t text)").await;
    let began = std::time::Instant::now();
    let before = stage.outbox.current().await;
    stage.outbox.sql("alter table busy alter t set storage external").await;
    stage.outbox.sql("insert into busy select repeat(md5(n::text), 300) from generate_series(1, 2000) n").await;
    let after = stage.outbox.current().await;
    assert!(after.bytes_since(before) > 19_000_000, "{}", after.bytes_since(before));
    eventually("the slot follows", || async { stage.outbox.confirmed().await >= after }).await;
    assert!(began.elapsed().as_secs() < 30, "{:?}", began.elapsed());
    assert_eq!(stage.relay.metric("pgoutbox_published_total"), 0.0);
    stage.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_in_the_middle_of_the_stream_settles_what_is_in_flight() {
    let mut outbox = Outbox::create(shared_postgres(), shared_rabbitmq()).await;
    let link = Link::to_rabbitmq(shared_rabbitmq().port(), &Ledger::new(outbox.confirmed().await)).await;
    let consumer = Consumer::start(&outbox).await;
    outbox.amqp = format!("amqp://guest:guest@127.0.0.1:{}/%2f", link.port());
    let rows = "insert into outbox (aggregatetype, aggregateid, type) select 'order', n::text, 'x' from \
        generate_series(1, 50) n";
    outbox.sql(&format!("do $$ begin for i in 1..400 loop {rows}; commit; end loop; end $$")).await;
    // The first stop is in the middle, however fast the relay is: before it nothing is confirmed, and a window is not all.
    link.set(Toxics { hold_confirms: true, ..Toxics::default() });
    let mut stops = 0;
    while consumer.distinct() < 20_000 {
        let already = consumer.count();
        let relay = Relay::start(&outbox);
        eventually("some come", || async { consumer.count() > already }).await;
        stops += 1;
        relay.signal(Signal::SIGTERM);
        link.heal();
        assert_eq!(relay.exit_code(), 0);
    }
    assert_eq!(consumer.count(), 20_000, "nothing twice in {stops} runs");
    assert!(stops > 1, "it was never in the middle");
}
