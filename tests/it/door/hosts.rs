//! Several hosts: which one is taken, and when the next one is asked.
//!
//! The trap: a relay that is content with the first host that answers sits on a standby for ever.

use pgoutbox::pg::Settings;
use pgoutbox::pg::catalog::Control;
use pgoutbox::servers::Postgres;
use tokio::net::TcpListener;

use super::{CANARY, Home, agreed, ours};
use crate::support::consumer::Consumer;
use crate::support::relay::Relay;
use crate::support::{Outbox, connect, eventually, shared_rabbitmq};

fn both(one: u16, other: u16) -> String {
    format!("host=127.0.0.1,127.0.0.1 port={one},{other} user=postgres dbname=postgres")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_primary_is_found_behind_a_standby_and_followed_after_a_promotion() {
    let mut primary = Postgres::start(&[]).unwrap();
    let standby = Postgres::start_standby_of(&primary).unwrap();
    let home = Home::new();
    for conninfo in [both(standby.port(), primary.port()), both(primary.port(), standby.port())] {
        assert_eq!(ours(&conninfo, &home, &[]).await.unwrap().port, primary.port(), "{conninfo}");
    }
    // A relay, with the standby first, which does not have the database yet.
    let there = connect(&standby.url()).await;
    there.batch_execute("select pg_wal_replay_pause()").await.unwrap();
    let mut outbox = Outbox::create(&primary, shared_rabbitmq()).await;
    outbox.url = both(standby.port(), primary.port()).replace("dbname=postgres", &format!("dbname={}", outbox.name));
    let consumer = Consumer::start(&outbox).await;
    let relay = Relay::start(&outbox);
    outbox.insert("placed").await;
    consumer.wait_distinct(1).await;
    // The standby has the table and the publication before it is alone.
    there.batch_execute("select pg_wal_replay_resume()").await.unwrap();
    let current = outbox.current().await;
    let caught_up = format!("select pg_last_wal_replay_lsn() >= '{current}'");
    eventually("the standby follows", || async { there.query_one(&caught_up, &[]).await.unwrap().get(0) }).await;
    primary.stop("immediate", crate::support::PATIENCE).unwrap();
    eventually("it says that there is only a standby", || async { relay.get("/readyz").1.contains("is a standby") })
        .await;
    standby.promote().unwrap();
    assert_eq!(ours(&both(primary.port(), standby.port()), &home, &[]).await.unwrap().port, standby.port());
    // PostgreSQL 15 leaves logical slots behind: the relay follows, and says what it found there.
    let (code, log) = relay.ended();
    assert!(code == 78 && log.contains("slot"), "{code}: {log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn target_session_attrs_means_what_it_means_to_libpq() {
    let primary = Postgres::start(&[]).unwrap();
    let standby = Postgres::start_standby_of(&primary).unwrap();
    let home = Home::new();
    let (first, second) = (primary.port(), standby.port());
    let mut refused = 0;
    for attrs in ["any", "read-write", "read-only", "primary", "standby", "prefer-standby"] {
        for ports in [vec![first, second], vec![second, first], vec![first], vec![second]] {
            let list: Vec<String> = ports.iter().map(u16::to_string).collect();
            let hosts = vec!["127.0.0.1"; ports.len()].join(",");
            let base = format!("host={hosts} port={} user=postgres", list.join(","));
            let found = agreed(&format!("{base} target_session_attrs={attrs}"), &home, &[]).await;
            if let Err(error) = found {
                refused += 1;
                assert!(error.contains(&format!("target_session_attrs={attrs} wants another")), "{error}");
            }
        }
    }
    assert_eq!(refused, 4);
    let read_only = format!("{}?options=-c%20default_transaction_read_only%3Don&target_session_attrs=", primary.url());
    assert!(agreed(&format!("{read_only}read-write"), &home, &[]).await.is_err());
    assert!(agreed(&format!("{read_only}read-only"), &home, &[]).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_says_nothing_is_passed_over_and_one_that_says_no_is_not() {
    let postgres = Postgres::start(&[]).unwrap();
    let other = Postgres::start(&[]).unwrap();
    let home = Home::new();
    let client = connect(&postgres.url()).await;
    client.batch_execute(&format!("create role relay login superuser password '{CANARY}'")).await.unwrap();
    postgres.append_hba("host all relay 127.0.0.1/32 scram-sha-256").unwrap();
    postgres.reload().unwrap();
    // One that nobody listens on, and one that accepts by the kernel's queue and never says a word.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    for port in [gone, silent.local_addr().unwrap().port()] {
        let conninfo = format!("{} connect_timeout=2", both(port, postgres.port()));
        assert_eq!(agreed(&conninfo, &home, &[]).await.unwrap().port, postgres.port());
    }
    let name = format!("host=does.not.exist.invalid,127.0.0.1 port={} user=postgres", postgres.port());
    assert!(agreed(&name, &home, &[]).await.is_ok());
    // A wrong password is an answer, also where the next host would let us in.
    connect(&other.url()).await.batch_execute("create role relay login superuser").await.unwrap();
    let wrong =
        format!("{} password={CANARY}x", both(postgres.port(), other.port())).replace("user=postgres", "user=relay");
    assert!(agreed(&wrong, &home, &[]).await.unwrap_err().contains("28P01"));
    // All of them are told.
    let error = ours(&both(gone, gone), &home, &[]).await.unwrap_err();
    assert_eq!(error.matches(&format!("cannot reach Postgres at 127.0.0.1:{gone}: ")).count(), 2, "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_of_its_own_spares_the_name_and_the_certificate_keeps_it() {
    let postgres = Postgres::start(&[]).unwrap();
    let home = Home::new();
    let authority = super::Authority::new("one");
    super::show(&postgres, &authority.issue(super::named(&["db.example"], "x")));
    home.write(".postgresql/root.crt", &authority.pem);
    let base = format!("port={} user=postgres sslmode=verify-full hostaddr=127.0.0.1", postgres.port());
    assert!(agreed(&format!("{base} host=db.example"), &home, &[]).await.is_ok_and(|found| found.tls));
    assert!(agreed(&format!("{base} host=other.example"), &home, &[]).await.is_err());
    assert!(agreed(&base, &home, &[]).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_are_shuffled_on_demand() {
    let (one, other) = (Postgres::start(&[]).unwrap(), Postgres::start(&[]).unwrap());
    let settings = format!("{} load_balance_hosts=random", both(one.port(), other.port()));
    let settings = Settings::parse(&settings, |_| None).unwrap();
    let mut seen = std::collections::HashSet::new();
    // Sixty-four times the same by chance: once in 2^63.
    for _ in 0..64 {
        seen.insert(Control::open(&settings).await.unwrap().place().host.port);
        if seen.len() == 2 {
            return;
        }
    }
    panic!("always {seen:?}");
}
