//! Names that are words of SQL: a database, a role, a schema, a table, a publication, a slot and a column may be called so.
//!
//! The trap: a statement with such a name left bare fails, or says something else; and only people with such names see it.

use pgoutbox::pg::world::identifier;

use super::{WORLD, verb};
use crate::support::consumer::Consumer;
use crate::support::relay::Relay;
use crate::support::{Outbox, connect, shared_postgres, shared_postgres_18, shared_rabbitmq};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_word_that_a_server_quotes_is_quoted_here() {
    for postgres in [shared_postgres(), shared_postgres_18()] {
        let client = connect(&postgres.url()).await;
        let words = client.query("select word, quote_ident(word) from pg_get_keywords()", &[]).await.unwrap();
        assert!(words.len() > 400);
        for row in words {
            let (word, quoted): (String, String) = (row.get(0), row.get(1));
            // The newest version's list holds for all: a word too many is two quotation marks.
            assert!([&quoted, &format!("\"{word}\"")].contains(&&identifier(&word)), "{quoted}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_that_are_words_of_sql_are_set_up_checked_relayed_and_dropped() {
    let postgres = shared_postgres();
    for sql in [
        "create role \"all\" login replication",
        "create database \"user\"",
        "grant create on database \"user\" to \"all\"",
    ] {
        connect(&postgres.url()).await.batch_execute(sql).await.unwrap();
    }
    let administrator = connect(&postgres.url_for("postgres", None, "user")).await;
    let url = postgres.url_for("all", None, "user");
    let client = connect(&url).await;
    let outbox = Outbox { client, url, amqp: shared_rabbitmq().url(), name: "select".to_owned() };
    let settings = [
        ("outbox.table", "order.group"),
        ("postgres.publication", "user"),
        ("rabbitmq.routing_key", "{user}.{aggregatetype}"),
    ];
    let set: Vec<String> = settings.iter().map(|(key, value)| format!("--set={key}={value}")).collect();
    let told = |words: &[&str], settings: usize| {
        let set: Vec<&str> = set[..settings].iter().map(String::as_str).collect();
        verb(&outbox, &[words, &set].concat())
    };
    let (code, _, err) = told(&["init"], 2);
    let create = "CREATE SCHEMA \"order\" AUTHORIZATION \"all\";";
    assert!(code == WORLD && err.contains(create), "{err}");
    administrator.batch_execute(create).await.unwrap();
    let (code, out, err) = told(&["init"], 2);
    assert!(code == 0 && out.contains("ready"), "{out}{err}");
    outbox.sql("alter publication \"user\" drop table \"order\".\"group\"").await;
    let (code, out, _) = told(&["check"], 2);
    let add = "ALTER PUBLICATION \"user\" ADD TABLE \"order\".\"group\";";
    assert!(code == WORLD && out.contains(&format!("sql: {add}\n")), "{out}");
    outbox.sql(add).await;
    outbox.sql("alter table \"order\".\"group\" add column \"user\" text").await;
    let consumer = Consumer::start(&outbox).await;
    outbox
        .sql(
            "insert into \"order\".\"group\" (aggregatetype, aggregateid, type, \"user\") \
             values ('order', '1', 'placed', 'zoe')",
        )
        .await;
    // Bare, `user` would be who asks.
    let (code, out, err) = told(&["check", "--deep"], 3);
    assert!(code == 0 && out.contains("with routing key zoe.order"), "{out}{err}");
    let relay = Relay::start_with(&outbox, &settings);
    assert_eq!(consumer.wait_distinct(1).await[0].routing_key, "zoe.order");
    assert_eq!(relay.stop(), 0);
    let (code, out, err) = told(&["drop", "--yes"], 3);
    assert!(code == 0 && out.contains("publication user dropped"), "{out}{err}");
}
