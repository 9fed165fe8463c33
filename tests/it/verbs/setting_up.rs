//! `init` and `drop` where they could do harm: on a standby, beside another one, in somebody else's database.
//!
//! The trap: both stop with 78 there as well as anywhere, so each test looks at what is left behind.

use std::process::Stdio;
use std::time::Duration;

use pgoutbox::servers::Postgres;
use tokio::time::interval;

use super::{WORLD, command, empty, outbox, told, verb};
use crate::support::relay::Relay;
use crate::support::{Outbox, TABLE, connect, eventually, postgres_18, shared_postgres, shared_rabbitmq};

async fn slots(outbox: &Outbox) -> String {
    outbox.text("select count(*) from pg_replication_slots").await.unwrap()
}

/// The same outbox, for a login without a password.
async fn seen_by(role: &str, outbox: &Outbox) -> Outbox {
    let url = shared_postgres().url_for(role, None, &outbox.name);
    Outbox { client: connect(&url).await, url, amqp: outbox.amqp.clone(), name: outbox.name.clone() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn init_and_drop_leave_a_standby_as_it_is() {
    let mut primary = Postgres::start_from(&postgres_18(), &[]).unwrap();
    let outbox = Outbox::create_for(&primary, String::new()).await;
    let standby = primary.standby(&[("hot_standby_feedback", "on")]).unwrap();
    let url = standby.url_for("postgres", None, &outbox.name);
    let standby = Outbox { client: connect(&url).await, url, ..outbox };
    // A slot of a standby begins where the primary says what runs there.
    let admin = connect(&primary.url()).await;
    let snapshots = tokio::spawn(async move {
        let mut ticks = interval(Duration::from_millis(100));
        loop {
            ticks.tick().await;
            admin.batch_execute("select pg_log_standby_snapshot()").await.unwrap();
        }
    });
    let (code, out, err) = verb(&standby, &["init"]);
    assert!(code == WORLD && err.contains("is a standby. Remedy: name the primary in postgres.url"), "{out}{err}");
    assert_eq!(slots(&standby).await, "0", "{out}{err}");
    standby.create_slot().await;
    let (code, out, err) = verb(&standby, &["drop", "--yes"]);
    assert!(code == WORLD && err.contains("is a standby. Remedy: name the primary in postgres.url"), "{out}{err}");
    assert_eq!(slots(&standby).await, "1", "{out}{err}");
    snapshots.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_is_still_being_made_is_not_ready() {
    let outbox = empty().await;
    let older = connect(&outbox.url).await;
    older.batch_execute("begin; select pg_current_xact_id()").await.unwrap();
    let first = command(&outbox, &["init"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let is_there = format!("select 1 from pg_replication_slots where slot_name = '{}'", outbox.name);
    eventually("the slot is there", || async { outbox.text(&is_there).await.is_some() }).await;
    // What is committed now is before the slot's first position, and so in no stream.
    outbox.insert("placed").await;
    let (code, out, err) = verb(&outbox, &["init"]);
    assert!(code == WORLD && err.contains("is still being made") && !out.contains("ready"), "{code} {out}{err}");
    let (code, out, err) = verb(&outbox, &["check"]);
    assert!(code == WORLD && out.contains("is still being made"), "{code} {out}{err}");
    let (code, out, err) = verb(&outbox, &["status"]);
    assert!(code == 0 && out.contains("is still being made"), "{code} {out}{err}");
    older.batch_execute("commit").await.unwrap();
    let (code, out, err) = told(&first.wait_with_output().unwrap());
    assert!(code == 0 && out.contains("ready"), "{code} {out}{err}");
    assert_eq!(verb(&outbox, &["init"]).0, 0);
}

/// What another one makes is not seen before its commit, and is in the way before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_that_set_up_at_once_both_are_ready() {
    for (before, made) in [
        ("", TABLE.replace("{table}", "public.outbox")),
        (TABLE, "create publication pgoutbox for table outbox with (publish = 'insert')".to_owned()),
    ] {
        let outbox = empty().await;
        outbox.sql(&before.replace("{table}", "public.outbox")).await;
        let other = connect(&outbox.url).await;
        other.batch_execute(&format!("begin; {made}")).await.unwrap();
        let init = command(&outbox, &["init"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let waits = "select 1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
        eventually("it waits for the other", || async { outbox.text(waits).await.is_some() }).await;
        other.batch_execute("commit").await.unwrap();
        let (code, out, err) = told(&init.wait_with_output().unwrap());
        assert!(code == 0 && out.contains("is there") && out.contains("ready"), "{code} {out}{err}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drop_removes_both_or_nothing() {
    let outbox = outbox().await;
    let role = format!("{}_setup", outbox.name);
    outbox.sql(&format!("create role {role} login replication")).await;
    let (code, out, err) = verb(&seen_by(&role, &outbox).await, &["drop", "--yes"]);
    assert!(code == WORLD && err.contains("nothing changed") && err.contains("owner"), "{code} {out}{err}");
    assert!(!err.contains("ALTER ROLE") && !out.contains("dropped"), "{out}{err}");
    outbox.confirmed().await;
    outbox.sql(&format!("alter role {role} superuser; alter role {role} set default_transaction_read_only = on")).await;
    let (code, out, err) = verb(&seen_by(&role, &outbox).await, &["drop", "--yes"]);
    assert!(
        code == WORLD && err.contains("nothing changed") && err.contains(&lets_write(&role, &outbox)),
        "{out}{err}"
    );
    outbox.confirmed().await;
    let (code, out, err) = verb(&outbox, &["drop", "--yes"]);
    assert!(code == 0 && out.matches("dropped").count() == 2, "{code} {out}{err}");
}

/// What lets a role write in this database.
fn lets_write(role: &str, outbox: &Outbox) -> String {
    format!("ALTER ROLE {role} IN DATABASE {} SET default_transaction_read_only = off;", outbox.name)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_only_reads_by_default_is_told_how_it_writes() {
    let outbox = empty().await;
    let role = format!("{}_setup", outbox.name);
    let reads = "set default_transaction_read_only = on";
    outbox
        .sql(&format!(
            "create role {role} login superuser; alter role {role} {reads}; \
             alter role {role} in database {} {reads}",
            outbox.name
        ))
        .await;
    let (code, out, err) = verb(&seen_by(&role, &outbox).await, &["init"]);
    let remedy = lets_write(&role, &outbox);
    assert!(code == WORLD && err.contains("table public.outbox cannot be made") && err.contains(&remedy), "{out}{err}");
    outbox.sql(&remedy).await;
    let (code, out, err) = verb(&seen_by(&role, &outbox).await, &["init"]);
    assert!(code == 0 && out.contains("ready"), "{out}{err}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_search_path_that_hides_the_catalog_hides_nothing_from_a_look() {
    let outbox = outbox().await;
    let (name, hide) = (&outbox.name, "returns text language plpgsql as");
    outbox
        .sql(&format!(
            "create schema other; create table other.seen (what text); \
             create function other.current_setting(text) {hide} \
             $$ begin insert into other.seen values ($1); return pg_catalog.current_setting($1); end $$; \
             create function other.same(oid, oid) returns bool language plpgsql as \
             $$ begin insert into other.seen values ('operator'); return $1::int8 = $2::int8; end $$; \
             create operator other.= (leftarg = oid, rightarg = oid, function = other.same); \
             alter database {name} set search_path = other, pg_catalog"
        ))
        .await;
    let (code, out, err) = verb(&outbox, &["check", "--deep"]);
    assert_eq!(code, 0, "{out}{err}");
    assert_eq!(outbox.text("select string_agg(distinct what, ' ') from other.seen").await, None);
}

/// As those are that some vaults make for an hour.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_role_that_logs_in_replicates_whatever_role_it_takes_on() {
    let outbox = Outbox::create(shared_postgres(), shared_rabbitmq()).await;
    let (group, role) = (format!("{}_app", outbox.name), format!("{}_vault", outbox.name));
    outbox
        .sql(&format!(
            "create role {group} nologin; create role {role} login replication in role {group}; \
             alter role {role} set role = '{group}'; grant select on outbox to {group}"
        ))
        .await;
    let by_vault = seen_by(&role, &outbox).await;
    let (code, out, err) = verb(&by_vault, &["check", "--deep"]);
    assert!(code == 0 && out.contains("what is next can be decoded"), "{code} {out}{err}");
    // Nor does it say of none that each is well.
    assert!(out.contains(&format!("last rows of public.outbox: none that role {group} can see")), "{out}");
    let relay = Relay::start(&by_vault);
    relay.ready().await;
    assert_eq!(relay.stop(), 0);
    outbox.sql(&format!("alter role {role} noreplication; alter role {group} replication")).await;
    let (code, out, err) = verb(&by_vault, &["check"]);
    assert!(code == WORLD && out.contains(&format!("ALTER ROLE {role} REPLICATION;")), "{code} {out}{err}");
}
