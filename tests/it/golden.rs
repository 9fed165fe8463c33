//! What each version of PostgreSQL really sends for one script of statements, byte for byte, and what it means to us.
//!
//! The captures (`golden/postgresql-NN.hex`, one pgoutput message a line) are of real servers by our own replication
//! connection, with positions, times, transaction ids and OIDs as they came; `PGOUTBOX_GOLDEN=write` makes them anew. The
//! trap: a decoder and an encoder by the same author agree on the same mistake. `pg_logical_emit_message` is in the script
//! to show that it sends nothing: such messages come only on request, and the relay does not ask.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use bytes::Bytes;
use pgoutbox::lsn::Lsn;
use pgoutbox::pg::Settings;
use pgoutbox::pg::catalog::Control;
use pgoutbox::pg::pgoutput::{Message, decode};
use pgoutbox::pg::replication::{Event, Replication, Status};
use pgoutbox::servers::Postgres;

use crate::support::{POSTGRES_VERSIONS, connect, postgres_bin};

const SCRIPT: &str = include_str!("golden/script.sql");
/// A transaction without a word in it.
const EMPTY: &str = "begin\ncommit\n";

const FIRST_USER_OID: u32 = 16_384;

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/it/golden").join(name)
}

fn golden(version: u32) -> Vec<Vec<u8>> {
    let text = std::fs::read_to_string(file(&format!("postgresql-{version}.hex"))).unwrap();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    text.lines().map(|line| line.as_bytes().chunks(2).map(byte).collect()).collect()
}

/// Runs the script and reads what comes of it.
async fn capture(version: u32) -> Vec<Vec<u8>> {
    let server = Postgres::start_from(&postgres_bin(version), &[]).unwrap();
    let client = connect(&server.url()).await;
    for statement in SCRIPT.lines() {
        client.batch_execute(statement).await.unwrap_or_else(|error| panic!("{version}: {statement}: {error:?}"));
    }
    let end: String = client.query_one("select pg_current_wal_flush_lsn()::text", &[]).await.unwrap().get(0);
    let end: Lsn = end.parse().unwrap();
    let settings = Settings::parse(&server.url(), |_| None).unwrap();
    let replication = Replication::open(&Control::open(&settings).await.unwrap(), &settings).await.unwrap();
    let mut stream = replication.start("golden", "everything", Lsn::ZERO).await.unwrap();
    let mut messages = Vec::new();
    loop {
        match stream.next().await.unwrap() {
            Event::Data(bytes) => messages.push(bytes.to_vec()),
            Event::Part => {}
            Event::Keepalive { wal_end, .. } if wal_end >= end => return messages,
            Event::Keepalive { .. } => {
                let status = Status { received: Lsn::ZERO, settled: Lsn::ZERO, reply_requested: true };
                stream.tell(status).await.unwrap();
            }
        }
    }
}

/// What the messages say, in words, without what differs from run to run: positions, times, transaction ids, OIDs.
fn listing(messages: &[Vec<u8>]) -> String {
    let mut text = String::new();
    let mut tables: HashMap<u32, String> = HashMap::new();
    let oid = |bytes: &[u8], at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    let mut commit = Lsn::ZERO;
    for bytes in messages {
        match decode(&Bytes::copy_from_slice(bytes)).unwrap() {
            Message::Begin(begin) => {
                assert!(begin.final_lsn > commit && begin.xid > 0 && begin.commit_time > 0, "{begin:?}");
                commit = begin.final_lsn;
                text.push_str("begin\n");
            }
            Message::Commit(end) => {
                assert!(end.commit_lsn == commit && end.end_lsn > commit && end.commit_time > 0, "{end:?}");
                text.push_str("commit\n");
            }
            Message::Relation(relation) => {
                let columns = relation.columns.iter().map(|column| match column.type_id {
                    FIRST_USER_OID.. => format!("{} (own type)", column.name),
                    builtin => format!("{} ({builtin})", column.name),
                });
                let columns: Vec<String> = columns.collect();
                writeln!(text, "relation {}.{}: {}", relation.namespace, relation.name, columns.join(", ")).unwrap();
                tables.insert(relation.id, relation.name);
            }
            Message::Insert(insert) => {
                let value = |column| match insert.tuple.text(column) {
                    None => "null".to_owned(),
                    Some(text) => format!("{:?}", std::str::from_utf8(text).unwrap()),
                };
                let values: Vec<String> = (0..insert.tuple.columns()).map(value).collect();
                writeln!(text, "insert {}: {}", tables[&insert.relation_id], values.join(", ")).unwrap();
            }
            // Passed over by the relay: their bytes are shown, but for the OID.
            Message::Type => writeln!(text, "type {}", bytes[5..].escape_ascii()).unwrap(),
            Message::Update => {
                writeln!(text, "update {}: {}", tables[&oid(bytes, 1)], bytes[5..].escape_ascii()).unwrap()
            }
            Message::Delete => {
                writeln!(text, "delete {}: {}", tables[&oid(bytes, 1)], bytes[5..].escape_ascii()).unwrap()
            }
            Message::Truncate => {
                let count = oid(bytes, 1) as usize;
                let names: Vec<&str> = (0..count).map(|at| tables[&oid(bytes, 6 + 4 * at)].as_str()).collect();
                writeln!(text, "truncate {}", names.join(", ")).unwrap();
            }
            other => panic!("not asked for: {other:?}"),
        }
    }
    text
}

fn expected() -> String {
    std::fs::read_to_string(file("expected.txt")).unwrap()
}

#[test]
fn the_bytes_of_every_version_mean_the_same() {
    for version in POSTGRES_VERSIONS {
        let found = listing(&golden(version));
        // 14 announces transactions in which nothing is published, those after it do not.
        assert_eq!(found.contains(EMPTY), version == 14, "PostgreSQL {version}:\n{found}");
        let found = found.replace(EMPTY, "");
        assert!(found == expected(), "PostgreSQL {version}:\n{found}");
    }
}

#[test]
fn no_cut_of_a_real_message_is_taken_for_a_whole_one() {
    // What is passed over is not read, so it cannot be found short.
    let read = |message: &&Vec<u8>| matches!(message[0], b'B' | b'C' | b'R' | b'I');
    for message in POSTGRES_VERSIONS.map(golden).iter().flatten().filter(read) {
        for length in 0..message.len() {
            assert!(decode(&Bytes::copy_from_slice(&message[..length])).is_err(), "{length} of {message:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_of_every_version_still_sends_what_was_captured() {
    for version in POSTGRES_VERSIONS {
        let messages = capture(version).await;
        if std::env::var("PGOUTBOX_GOLDEN").is_ok_and(|role| role == "write") {
            let line = |bytes: &Vec<u8>| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + "\n";
            let text: String = messages.iter().map(line).collect();
            std::fs::write(file(&format!("postgresql-{version}.hex")), text).unwrap();
            std::fs::write(file("expected.txt"), listing(&messages)).unwrap();
        }
        assert_eq!(listing(&messages), listing(&golden(version)), "PostgreSQL {version}");
    }
}
