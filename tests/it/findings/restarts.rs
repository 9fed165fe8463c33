//! Postgres, where the remedy restarts it or the break would break other tests: `wal_level`, the limits of slots and
//! walsenders, a slot that is lost.

use std::process::Stdio;
use std::time::Duration;

use pgoutbox::servers::Postgres;
use serde_json::Value as Json;

use super::Run::{self, Stops, Waits};
use super::Surroundings;
use crate::support::relay::{environment, pgoutbox};
use crate::support::{Outbox, connect, eventually, shared_rabbitmq};

async fn again<'a>(postgres: &'a Postgres, name: &str) -> Surroundings<'a> {
    Surroundings::again(postgres, shared_rabbitmq(), name).await
}

fn restart(postgres: &mut Postgres) {
    postgres.stop("fast", Duration::from_secs(30)).unwrap();
    postgres.start_again().unwrap();
}

async fn restart_with(postgres: &mut Postgres, setting: &str) {
    connect(&postgres.url()).await.batch_execute(&format!("alter system set {setting}")).await.unwrap();
    restart(postgres);
}

/// Finds, does what the remedy says, and restarts where it says so.
async fn mended_by_a_restart(postgres: &mut Postgres, name: &str, problem: &str, run: Run) {
    let mut surroundings = again(postgres, name).await;
    let findings = surroundings.findings();
    let has = |key: &str, text: &str, found: &Json| found[key].as_str().unwrap().contains(text);
    assert!(findings.iter().any(|finding| has("problem", problem, finding)), "{problem:?} is not in {findings:#?}");
    let mut steps = findings.iter().flat_map(|finding| finding["steps"].as_array().unwrap());
    assert!(steps.any(|step| step["place"] == "do" && step["text"] == "restart PostgreSQL"), "{findings:#?}");
    surroundings.run_says(run, problem).await;
    surroundings.paste_into(&["sql"], &findings);
    drop(surroundings);
    restart(postgres);
    let mut surroundings = again(postgres, name).await;
    surroundings.paste_into(&["shell"], &findings);
    surroundings.is_sound();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_needs_a_restart_is_mended_by_one() {
    let mut postgres = Postgres::start(&[("wal_level", "replica"), ("min_wal_size", "32MB")]).unwrap();
    let outbox = Outbox::empty(&postgres, shared_rabbitmq()).await;
    outbox.sql(&crate::support::TABLE.replace("{table}", "public.outbox")).await;
    outbox.sql("create publication pgoutbox for table outbox with (publish = 'insert')").await;
    let name = outbox.name.clone();
    drop(Surroundings::around(&postgres, shared_rabbitmq(), outbox).await);
    mended_by_a_restart(&mut postgres, &name, "wal_level is replica", Stops).await;

    restart_with(&mut postgres, "max_replication_slots = 1").await;
    let surroundings = again(&postgres, &name).await;
    surroundings.is_sound();
    surroundings.outbox.sql(&format!("select pg_drop_replication_slot('{name}')")).await;
    surroundings.outbox.sql("select pg_create_physical_replication_slot('filler')").await;
    drop(surroundings);
    mended_by_a_restart(&mut postgres, &name, "does not exist in this cluster", Stops).await;

    restart_with(&mut postgres, "max_wal_senders = 1").await;
    let mut holder = pgoutbox();
    let url = postgres.url_for("postgres", None, &name);
    holder.arg("tail").envs(environment(&url, "", &name)).env_remove("AMQP_URL").stdout(Stdio::null());
    let mut holder = holder.spawn().unwrap();
    let surroundings = again(&postgres, &name).await;
    let held = "select count(*) from pg_stat_replication";
    eventually("a walsender is held", || async { surroundings.outbox.text(held).await.as_deref() == Some("1") }).await;
    drop(surroundings);
    mended_by_a_restart(&mut postgres, &name, "exceeds max_wal_senders", Waits).await;
    // Its server went, and it with it.
    holder.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_is_lost_is_made_again() {
    let postgres = Postgres::start(&[("max_slot_wal_keep_size", "16MB"), ("min_wal_size", "32MB")]).unwrap();
    let mut surroundings = Surroundings::of(&postgres, shared_rabbitmq()).await;
    surroundings.is_sound();
    let name = surroundings.outbox.name.clone();
    let status = format!("select wal_status from pg_replication_slots where slot_name = '{name}'");
    eventually("the slot is lost", || async {
        surroundings.outbox.sql("create table if not exists filler (); select pg_switch_wal()").await;
        surroundings.outbox.sql("checkpoint").await;
        surroundings.outbox.text(&status).await.as_deref() == Some("lost")
    })
    .await;
    let findings = surroundings.findings();
    let lost = format!("replication slot {name} is lost");
    assert!(findings[0]["problem"].as_str().unwrap().contains(&lost), "{findings:#?}");
    surroundings.run_says(Stops, &lost).await;
    surroundings.paste(&findings);
    surroundings.is_sound();
}
