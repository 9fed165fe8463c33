//! What the link to Postgres makes of bytes: each of its assertions can fail by them.
//!
//! The trap: the ledger alone may be right about a stream that the link misreads.

use pgoutbox::lsn::Lsn;

use super::{lsn, only_violation, pass};
use crate::scripted::postgres::{begin, commit, data, insert, keepalive, message};
use crate::support::links::Direction::{Down, Up};
use crate::support::links::{Ledger, postgres};

fn startup(parameters: &[u8]) -> Vec<u8> {
    let length = u32::try_from(parameters.len() + 8).unwrap().to_be_bytes();
    [&length[..], &196_608_u32.to_be_bytes(), parameters].concat()
}

/// A slot that stands at 100, and a connection that streams from there.
fn stream_from(position: &str) -> (Ledger, postgres::Connection) {
    let ledger = Ledger::new(lsn(100));
    let mut connection = postgres::Connection::new(ledger.clone());
    // Declined, and the login goes on.
    pass(&mut connection, Up, &[&8_u32.to_be_bytes()[..], &80_877_103_u32.to_be_bytes()].concat());
    pass(&mut connection, Down, b"N");
    pass(&mut connection, Up, &startup(b"user\0u\0replication\0database\0\0"));
    pass(&mut connection, Down, &message(b'R', &[0; 4]));
    start(&mut connection, position);
    (ledger, connection)
}

fn start(connection: &mut postgres::Connection, position: &str) {
    let query = format!("START_REPLICATION SLOT \"s\" LOGICAL {position} (proto_version '1')\0");
    pass(connection, Up, &message(b'Q', query.as_bytes()));
}

fn stream() -> (Ledger, postgres::Connection) {
    let (ledger, connection) = stream_from("0/64");
    assert_eq!((ledger.violations(), ledger.counts().postgres_connections), (vec![], 1));
    (ledger, connection)
}

fn status(write: u64, flush: u64) -> Vec<u8> {
    let positions = [write, flush, flush, 0].map(u64::to_be_bytes).concat();
    message(b'd', &[b"r", &positions[..], &[0]].concat())
}

/// A transaction of two rows at 200 that ends at 220, without its end.
fn open() -> Vec<u8> {
    let row = insert(1, &[(b't', b"x")]);
    [data(&begin(200)), data(&row), data(&row)].concat()
}

fn whole() -> Vec<u8> {
    [open(), data(&commit(200, 220))].concat()
}

#[test]
fn a_commit_is_told_after_all_of_its_rows_are_confirmed_and_not_before() {
    for (confirmed, word) in [(0, Some("only 0 of 2")), (1, Some("only 1 of 2")), (2, None)] {
        let (ledger, mut connection) = stream();
        pass(&mut connection, Down, &whole());
        for row in 0..confirmed {
            ledger.settled((lsn(200), row));
        }
        pass(&mut connection, Up, &status(220, 220));
        match word {
            Some(word) => assert!(only_violation(&ledger).contains(word), "{:?}", ledger.violations()),
            None => assert_eq!((ledger.violations(), ledger.told()), (vec![], lsn(220))),
        }
        assert_eq!(ledger.counts().statuses, 1);
    }
}

#[test]
fn a_keepalive_is_told_outside_a_transaction_and_not_inside() {
    let (ledger, mut connection) = stream();
    pass(&mut connection, Down, &keepalive(300));
    pass(&mut connection, Up, &status(300, 300));
    assert_eq!((ledger.violations(), ledger.told()), (vec![], lsn(300)));
    assert_eq!((ledger.counts().keepalives, ledger.counts().keepalives_inside), (1, 0));

    let (ledger, mut connection) = stream();
    pass(&mut connection, Down, &[open(), keepalive(300)].concat());
    pass(&mut connection, Up, &status(300, 300));
    assert!(only_violation(&ledger).contains("neither the end of a commit nor"), "{:?}", ledger.violations());
    assert_eq!((ledger.counts().keepalives, ledger.counts().keepalives_inside), (1, 1));
}

#[test]
fn a_flush_beyond_what_was_written_or_sent_is_a_violation() {
    let (ledger, mut connection) = stream();
    pass(&mut connection, Down, &keepalive(300));
    pass(&mut connection, Up, &status(299, 300));
    assert!(only_violation(&ledger).contains("beyond write"), "{:?}", ledger.violations());

    let (ledger, mut connection) = stream();
    pass(&mut connection, Down, &whole());
    ledger.settled((lsn(200), 0));
    ledger.settled((lsn(200), 1));
    pass(&mut connection, Up, &status(221, 221));
    assert!(only_violation(&ledger).contains("neither the end of a commit nor"), "{:?}", ledger.violations());
}

#[test]
fn a_flush_that_falls_and_a_status_before_the_stream_are_violations() {
    let (ledger, mut connection) = stream();
    pass(&mut connection, Down, &keepalive(300));
    pass(&mut connection, Up, &[status(300, 300), status(300, 100)].concat());
    assert!(only_violation(&ledger).contains("on the same connection"), "{:?}", ledger.violations());

    let ledger = Ledger::new(lsn(100));
    let mut connection = postgres::Connection::new(ledger.clone());
    pass(&mut connection, Up, &[startup(b"replication\0database\0\0"), status(100, 100)].concat());
    assert!(only_violation(&ledger).contains("before START_REPLICATION"), "{:?}", ledger.violations());
}

#[test]
fn a_stream_that_begins_beyond_what_was_told_is_a_violation_unless_all_before_it_is_confirmed() {
    assert!(only_violation(&stream_from("0/65").0).contains("never seen"));
    for rows in [1, 2] {
        let (ledger, mut connection) = stream();
        pass(&mut connection, Down, &whole());
        for row in 0..rows {
            ledger.settled((lsn(200), row));
        }
        start(&mut connection, &Lsn::new(220).to_string());
        if rows == 1 {
            assert!(only_violation(&ledger).contains("START_REPLICATION at 0/DC"), "{:?}", ledger.violations());
        } else {
            assert_eq!(ledger.violations(), Vec::<String>::new());
        }
    }
}

#[test]
fn a_message_that_ends_too_early_is_a_violation_and_other_connections_are_not_looked_into() {
    for bytes in [message(b'd', b"k\0\0"), data(b"B\0"), message(b'd', b"w\0"), data(&commit(200, 220))] {
        let (ledger, mut connection) = stream();
        pass(&mut connection, Down, &bytes);
        assert!(only_violation(&ledger).contains("out of shape"), "{:?}", ledger.violations());
    }
    let ledger = Ledger::new(lsn(100));
    let mut connection = postgres::Connection::new(ledger.clone());
    pass(&mut connection, Up, &[startup(b"user\0u\0\0"), status(900, 900)].concat());
    pass(&mut connection, Down, &message(b'd', b"k\0\0"));
    assert_eq!((ledger.violations(), ledger.counts().statuses), (vec![], 0));
}
