//! Logging in: passwords, privileges, sockets, and a server that does not keep what logical decoding needs.
//!
//! The trap: a wrong password may be one that an operator is changing right now, so the relay waits; and the password itself
//! must not come out anywhere, right or wrong.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

use pgoutbox::servers::Postgres;

use super::{WORLD, ended, statement, stops, verb};
use crate::support::consumer::Consumer;
use crate::support::relay::Relay;
use crate::support::{Outbox, eventually, shared_postgres, shared_postgres_18, shared_rabbitmq};

const RIGHT: &str = "right-canary-4711";
const WRONG: &str = "wrong-canary-0815";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_logical_wal_is_named() {
    let postgres = Postgres::start(&[("wal_level", "replica")]).unwrap();
    let outbox = Outbox::empty(&postgres, shared_rabbitmq()).await;
    stops(&outbox, WORLD, &["wal_level is replica", "ALTER SYSTEM SET wal_level = logical"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_may_not_replicate_is_mended_by_the_remedy() {
    let mut outbox = Outbox::create(shared_postgres(), shared_rabbitmq()).await;
    let role = format!("{}_relay", outbox.name);
    outbox.sql(&format!("create role {role} login")).await;
    outbox.url = shared_postgres().url_for(&role, None, &outbox.name);
    let log = stops(&outbox, WORLD, &[&format!("role {role} may not replicate")]).await;
    let remedy = statement(&log, "Remedy: ");
    outbox.sql(&remedy).await;
    let relay = Relay::start(&outbox);
    relay.ready().await;
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_that_a_role_was_given_do_not_end_a_relays_sessions() {
    const ROWS: usize = 8_000;
    let mut outbox = Outbox::create(shared_postgres_18(), shared_rabbitmq()).await;
    let role = format!("{}_relay", outbox.name);
    outbox.sql(&format!("create role {role} login replication")).await;
    for limit in ["idle_session_timeout = '1s'", "transaction_timeout = '1s'", "statement_timeout = '1s'"] {
        outbox.sql(&format!("alter role {role} set {limit}")).await;
    }
    outbox.url = shared_postgres_18().url_for(&role, None, &outbox.name);
    let consumer = Consumer::start(&outbox).await;
    // One by one: longer than a second, and more than the sockets hold.
    let relay = Relay::start_with(&outbox, &[("rabbitmq.window_messages", "1")]);
    let rows = format!(
        "insert into outbox (aggregatetype, aggregateid, type, payload) \
         select 'order', '1', 'placed', jsonb_build_object('x', repeat('x', 2000)) from generate_series(1, {ROWS})"
    );
    outbox.sql(&rows).await;
    consumer.wait_distinct(ROWS).await;
    let idle = format!(
        "select count(*) from pg_stat_activity where usename = '{role}' and backend_type = 'client backend' \
         and state_change < clock_timestamp() - interval '2s'"
    );
    eventually("a connection that was idle for long", || async { outbox.text(&idle).await.as_deref() == Some("1") })
        .await;
    assert!(!relay.log().contains("session ended"), "{}", relay.log());
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_database_is_named() {
    let mut outbox = Outbox::create(shared_postgres(), shared_rabbitmq()).await;
    outbox.url = shared_postgres().url_for("postgres", None, "nowhere");
    let log = ended(Relay::start(&outbox), WORLD, &["database \"nowhere\" does not exist"]);
    assert!(log.contains("postgres.url"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn passwords_are_proven_by_scram_and_md5_and_a_wrong_one_is_waited_for_without_being_told() {
    let postgres = Postgres::start(&[]).unwrap();
    let mut outbox = Outbox::create(&postgres, shared_rabbitmq()).await;
    for (method, role) in [("scram-sha-256", "by_scram"), ("md5", "by_md5")] {
        let create = format!("create role {role} login replication password '{RIGHT}'");
        outbox.sql(&format!("set password_encryption = '{method}'; {create}")).await;
        postgres.append_hba(&format!("host all {role} 127.0.0.1/32 {method}")).unwrap();
    }
    postgres.reload().unwrap();
    let consumer = Consumer::start(&outbox).await;
    for (count, (method, role)) in [("scram-sha-256", "by_scram"), ("md5", "by_md5")].into_iter().enumerate() {
        outbox.url = postgres.url_for(role, Some(RIGHT), &outbox.name);
        let relay = Relay::start(&outbox);
        outbox.insert("placed").await;
        consumer.wait_distinct(count + 1).await;
        assert!(!relay.log().contains("canary"), "{}", relay.log());
        assert_eq!(relay.stop(), 0);
        outbox.url = postgres.url_for(role, Some(WRONG), &outbox.name);
        let relay = Relay::start(&outbox);
        let attempts = || relay.metric("pgoutbox_sessions_total{end=\"postgres\"}");
        eventually("it tries again", || async { attempts() >= 2.0 }).await;
        let (code, reasons) = relay.get("/readyz");
        assert!(code == 503 && reasons.contains("password authentication failed"), "{reasons}");
        let log = relay.log();
        assert!(
            log.contains("28P01") && log.contains("password in postgres.url (a change of it needs a restart)"),
            "{log}"
        );
        assert!(!(log + &reasons + &relay.get("/").1).contains("canary"));
        // Mended on the server, without a restart.
        outbox.sql(&format!("set password_encryption = '{method}'; alter role {role} password '{WRONG}'")).await;
        relay.ready().await;
        assert_eq!(relay.stop(), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_file_that_cannot_be_used_for_a_while_ends_no_relay() {
    let postgres = Postgres::start(&[]).unwrap();
    let mut outbox = Outbox::create(&postgres, shared_rabbitmq()).await;
    outbox.sql(&format!("create role by_file login replication password '{RIGHT}'")).await;
    postgres.append_hba("host all by_file 127.0.0.1/32 scram-sha-256").unwrap();
    postgres.reload().unwrap();
    let home = tempfile::tempdir().unwrap();
    let passfile = home.path().join("passfile");
    let line = format!("*:*:*:*:{RIGHT}\n");
    let write = |text: &str, mode| {
        std::fs::write(&passfile, text).unwrap();
        std::fs::set_permissions(&passfile, Permissions::from_mode(mode)).unwrap();
    };
    write(&line, 0o600);
    let (port, name, path) = (postgres.port(), outbox.name.clone(), passfile.display());
    outbox.url = format!("host=127.0.0.1 port={port} user=by_file dbname={name} passfile={path}");
    let relay = Relay::start(&outbox);
    relay.ready().await;
    let ends = "select count(pg_terminate_backend(pid)) from pg_stat_activity where usename = 'by_file'";
    for (text, mode, says) in
        [(line.as_str(), 0o644, "chmod 600"), ("", 0o600, "put it into"), ("gone", 0, "put it into")]
    {
        if text == "gone" {
            std::fs::remove_file(&passfile).unwrap()
        } else {
            write(text, mode)
        }
        outbox.sql(ends).await;
        eventually("it says what is wrong", || async { relay.get("/readyz").1.contains(says) }).await;
        for arguments in [&["check"][..], &["init"], &["run", "--give-up-after", "1s", "--set", "http.listen="]] {
            let ended = verb(&outbox, arguments);
            let said = String::from_utf8_lossy(&[ended.stdout, ended.stderr].concat()).into_owned();
            let code = if arguments[0] == "run" { 69 } else { WORLD };
            assert!(ended.status.code() == Some(code) && said.contains(says) && !said.contains(RIGHT), "{said}");
        }
        write(&line, 0o600);
        relay.ready().await;
    }
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_unix_socket_is_a_way_in() {
    let mut outbox = Outbox::create(shared_postgres(), shared_rabbitmq()).await;
    let directory = shared_postgres().socket_dir().display().to_string();
    let (port, name) = (shared_postgres().port(), outbox.name.clone());
    let consumer = Consumer::start(&outbox).await;
    let urls = [
        format!("host={directory} port={port} user=postgres dbname={name}"),
        format!("postgres://postgres@{}:{port}/{name}", directory.replace('/', "%2F")),
    ];
    for (count, url) in urls.into_iter().enumerate() {
        outbox.url = url;
        let relay = Relay::start(&outbox);
        outbox.insert("placed").await;
        consumer.wait_distinct(count + 1).await;
        assert_eq!(relay.stop(), 0);
    }
}
