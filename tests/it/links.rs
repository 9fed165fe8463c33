//! The proxies of the fault bench: a real relay passes through them, each toxic does what it says, and each assertion can
//! fail.
//!
//! The trap: an oracle that sees nothing finds nothing wrong, so the counts are compared with the load.

mod postgres;

use std::time::{Duration, Instant};

use bytes::BytesMut;
use pgoutbox::lsn::Lsn;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::support::consumer::Consumer;
use crate::support::links::{Direction, Ledger, Link, Protocol, Toxics, amqp};
use crate::support::load::{Oracle, Writers, judge};
use crate::support::relay::Relay;
use crate::support::{Outbox, PATIENCE, eventually, shared_postgres, shared_rabbitmq};

/// An outbox, and a relay's way to it through two links.
struct Bench {
    outbox: Outbox,
    /// The same with the links' ports.
    through: Outbox,
    consumer: Consumer,
    ledger: Ledger,
    postgres: Link,
    rabbitmq: Link,
}

impl Bench {
    async fn start() -> Self {
        let outbox = Outbox::create(shared_postgres(), shared_rabbitmq()).await;
        let consumer = Consumer::start(&outbox).await;
        let ledger = Ledger::new(outbox.confirmed().await);
        let postgres = Link::to_postgres(shared_postgres().port(), &ledger).await;
        let rabbitmq = Link::to_rabbitmq(shared_rabbitmq().port(), &ledger).await;
        let to = |url: &str, from: u16, to: u16| url.replace(&format!(":{from}/"), &format!(":{to}/"));
        let through = Outbox {
            url: to(&outbox.url, shared_postgres().port(), postgres.port()),
            amqp: to(&outbox.amqp, shared_rabbitmq().port(), rabbitmq.port()),
            name: outbox.name.clone(),
            client: crate::support::connect(&outbox.url).await,
        };
        assert!(through.url != outbox.url && through.amqp != outbox.amqp);
        Self { outbox, through, consumer, ledger, postgres, rabbitmq }
    }

    fn assert_good(&self) {
        assert!(self.ledger.violations().is_empty(), "{:#?}", self.ledger.violations());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_under_load_passes_both_links_and_breaks_no_assertion() {
    let bench = Bench::start().await;
    let oracle = Oracle::start(&bench.outbox).await;
    let relay = Relay::start(&bench.through);
    relay.ready().await;
    let written = Writers::start(&bench.outbox, 4, 10_000, 500, fastrand::u64(..)).done().await;
    let received = bench.consumer.wait_distinct(written).await;
    assert_eq!(judge(&received, &oracle.ids(&bench.outbox).await), 0, "duplicates");
    bench.outbox.wait_confirmed(bench.outbox.current().await).await;
    assert_eq!(relay.stop(), 0);
    bench.assert_good();
    let counts = bench.ledger.counts();
    assert_eq!((counts.publishes, counts.confirms), (received.len() as u64, received.len() as u64));
    assert_eq!((counts.returns, counts.nacks), (0, 0));
    assert_eq!((counts.postgres_connections, counts.amqp_connections), (1, 1));
    assert!(counts.statuses > 1 && counts.keepalives > 0, "{counts:?}");
    assert!(bench.postgres.connections() >= 2 && bench.rabbitmq.connections() == 1);
    eventually("the slot stands where it was told", || async { bench.outbox.confirmed().await == bench.ledger.told() })
        .await;
    bench.ledger.reset(Lsn::ZERO);
    assert_eq!(bench.ledger.told(), Lsn::ZERO);
}

/// The text of the only violation.
fn only_violation(ledger: &Ledger) -> String {
    let violations = ledger.violations();
    assert_eq!(violations.len(), 1, "{violations:#?}");
    violations[0].clone()
}

fn lsn(position: u64) -> Lsn {
    Lsn::new(position)
}

/// A ledger whose slot stands at 100, with a transaction of two rows at 200 that ends at 220.
fn with_a_transaction() -> Ledger {
    let ledger = Ledger::new(lsn(100));
    ledger.committed(lsn(200), lsn(220), 2);
    ledger
}

#[test]
fn a_flush_is_good_once_all_rows_at_or_below_it_are_settled_and_not_before() {
    let ledger = with_a_transaction();
    let mut stream = ledger.started(lsn(100));
    ledger.status(&mut stream, lsn(220), lsn(100));
    ledger.settled((lsn(200), 1));
    ledger.settled((lsn(200), 0));
    ledger.status(&mut stream, lsn(220), lsn(220));
    assert_eq!((ledger.violations(), ledger.told()), (vec![], lsn(220)));

    let ledger = with_a_transaction();
    ledger.settled((lsn(200), 1));
    ledger.status(&mut ledger.started(lsn(100)), lsn(220), lsn(220));
    assert!(only_violation(&ledger).contains("only 0 of 2 rows are settled"));
}

#[test]
fn a_flush_beyond_the_end_of_a_commit_by_one_is_a_violation() {
    let ledger = with_a_transaction();
    ledger.settled((lsn(200), 0));
    ledger.settled((lsn(200), 1));
    ledger.status(&mut ledger.started(lsn(100)), lsn(221), lsn(221));
    assert!(only_violation(&ledger).contains("neither the end of a commit nor"));
}

#[test]
fn a_flush_that_falls_on_its_connection_is_a_violation() {
    let ledger = Ledger::new(lsn(100));
    let mut stream = ledger.started(lsn(100));
    ledger.keepalive(&stream, lsn(300), false);
    ledger.status(&mut stream, lsn(300), lsn(300));
    ledger.status(&mut stream, lsn(300), lsn(100));
    assert!(only_violation(&ledger).contains("on the same connection"));
    // A new process may begin where the slot stands: a status may have been lost.
    ledger.status(&mut ledger.started(lsn(100)), lsn(100), lsn(100));
    assert_eq!(ledger.violations().len(), 1);
}

#[test]
fn a_keepalive_inside_a_transaction_or_of_another_connection_gives_no_position_to_tell() {
    for in_transaction in [false, true] {
        let ledger = Ledger::new(lsn(100));
        let (mut stream, other) = (ledger.started(lsn(100)), ledger.started(lsn(100)));
        ledger.keepalive(if in_transaction { &stream } else { &other }, lsn(300), in_transaction);
        ledger.status(&mut stream, lsn(300), lsn(300));
        assert!(only_violation(&ledger).contains("neither the end of a commit nor"), "{in_transaction}");
    }
}

#[test]
fn a_stream_that_begins_beyond_what_is_settled_is_a_violation() {
    let ledger = with_a_transaction();
    ledger.started(lsn(220));
    assert!(only_violation(&ledger).contains("START_REPLICATION at 0/DC"));
    let ledger = with_a_transaction();
    ledger.started(lsn(101));
    assert!(only_violation(&ledger).contains("never seen"));
}

#[test]
fn a_hole_or_a_step_back_in_what_one_connection_publishes_is_a_violation() {
    let (a, b, c) = ((lsn(200), 0), (lsn(200), 1), (lsn(300), 0));
    for (last, next, word) in [
        (Some(b), a, "does not rise"),
        (Some(b), b, "does not rise"),
        (Some(a), (lsn(200), 2), "with a hole"),
        (Some(a), c, "not the last of 2 rows"),
        (Some((lsn(150), 0)), c, "is skipped"),
        (Some(b), (lsn(300), 1), "not its transaction's first row"),
        (None, b, "only 0 rows before it are settled"),
        (None, c, "is not settled"),
    ] {
        let ledger = with_a_transaction();
        ledger.published(last, next);
        assert!(only_violation(&ledger).contains(word), "{last:?} {next:?}: {:?}", ledger.violations());
    }
    let ledger = with_a_transaction();
    for (last, next) in [(None, a), (Some(a), b), (Some(b), c)] {
        ledger.published(last, next);
    }
    assert_eq!(ledger.violations(), Vec::<String>::new());
}

/// What a relay says on a channel that is not as it should be.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    NoConfirmSelect,
    NotMandatory,
    Transient,
    NoId,
    NoPosition,
}

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&[kind, 0, 1], &length[..], payload, &[0xCE]].concat()
}

/// A content header of row 0 of the transaction at 200, with id `m`.
fn content_header(fault: Fault) -> Vec<u8> {
    let name = if fault == Fault::NoPosition { b"\x0cx-outbox-lsm" } else { b"\x0cx-outbox-lsn" };
    let table = [&name[..], b"S\0\0\0\x040/C8", b"\x0cx-outbox-seql", &0_i64.to_be_bytes()].concat();
    let has_id = fault != Fault::NoId;
    let flags: u16 = 1 << 13 | 1 << 12 | u16::from(has_id) << 7;
    let length = u32::try_from(table.len()).unwrap().to_be_bytes();
    let mode = if fault == Fault::Transient { 1 } else { 2 };
    let id: &[u8] = if has_id { b"\x01m" } else { b"" };
    frame(2, &[&[0, 60, 0, 0][..], &2_u64.to_be_bytes(), &flags.to_be_bytes(), &length, &table, &[mode], id].concat())
}

/// A connection that has published one message.
fn publish(ledger: &Ledger, fault: Fault) -> amqp::Connection {
    let mut frames = vec![b"AMQP\0\0\x09\x01".to_vec(), frame(1, &[0, 20, 0, 10, 0])];
    if fault != Fault::NoConfirmSelect {
        frames.push(frame(1, &[0, 85, 0, 10, 0]));
    }
    let mandatory = u8::from(fault != Fault::NotMandatory);
    frames.push(frame(1, &[0, 60, 0, 40, 0, 0, 1, b'x', 1, b'k', mandatory]));
    frames.extend([content_header(fault), frame(3, b"{}")]);
    let mut connection = amqp::Connection::new(ledger.clone());
    pass(&mut connection, Direction::Up, &frames.concat());
    connection
}

/// All bytes, one by one.
fn pass(connection: &mut impl Protocol, direction: Direction, bytes: &[u8]) {
    let mut incoming = BytesMut::new();
    for byte in bytes {
        incoming.extend_from_slice(&[*byte]);
        while let Some(frame) = connection.split(direction, &mut incoming) {
            connection.inspect(direction, &frame);
        }
    }
    assert!(incoming.is_empty());
}

#[test]
fn a_publish_that_could_be_lost_is_a_violation() {
    let ledger = Ledger::new(lsn(100));
    publish(&ledger, Fault::None);
    assert_eq!((ledger.violations(), ledger.counts().publishes), (vec![], 1));
    for (fault, word) in [
        (Fault::NoConfirmSelect, "before confirm.select"),
        (Fault::NotMandatory, "not mandatory"),
        (Fault::Transient, "delivery_mode Some(1)"),
        (Fault::NoId, "no message_id"),
        (Fault::NoPosition, "x-outbox-lsn None"),
    ] {
        let ledger = Ledger::new(lsn(100));
        publish(&ledger, fault);
        assert!(only_violation(&ledger).contains(word), "{:?}", ledger.violations());
    }
}

#[test]
fn an_ack_settles_and_a_nack_or_a_return_before_the_ack_does_not() {
    let ack = frame(1, &[0, 60, 0, 80, 0, 0, 0, 0, 0, 0, 0, 1, 1]);
    let nack = frame(1, &[0, 60, 0, 120, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    let back = [frame(1, &[0, 60, 0, 50, 1, 56, 0, 1, b'x', 1, b'k']), content_header(Fault::None)].concat();
    for (answer, settles) in [(ack.clone(), true), (nack, false), ([back, ack].concat(), false)] {
        let ledger = Ledger::new(lsn(100));
        ledger.committed(lsn(200), lsn(220), 1);
        pass(&mut publish(&ledger, Fault::None), Direction::Down, &answer);
        ledger.status(&mut ledger.started(lsn(100)), lsn(220), lsn(220));
        assert_eq!(ledger.violations().is_empty(), settles, "{:?}", ledger.violations());
    }
}

/// A server that sends back what it gets, behind a link that does not know its protocol.
async fn echo() -> Link {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let link = Link::to_rabbitmq(listener.local_addr().unwrap().port(), &Ledger::new(Lsn::ZERO)).await;
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = client.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    link
}

async fn client(link: &Link) -> TcpStream {
    TcpStream::connect(("127.0.0.1", link.port())).await.unwrap()
}

/// Sends the text and waits for it to come back.
async fn round_trip(client: &mut TcpStream, text: &[u8]) -> std::io::Result<Vec<u8>> {
    client.write_all(text).await?;
    let mut answer = vec![0; text.len()];
    client.read_exact(&mut answer).await?;
    Ok(answer)
}

fn is_reset<T>(result: std::io::Result<T>) -> bool {
    result.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset)
}

/// 900 KB at 100 KB a second: twice `wal_sender_timeout`, and no whole message meanwhile. A session that took it for silence
/// would end, and so would the next one, at the same row.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_takes_longer_to_arrive_than_a_stream_may_be_silent_arrives() {
    let mut bench = Bench::start().await;
    let mark = if bench.through.url.contains('?') { '&' } else { '?' };
    bench.through.url += &format!("{mark}options=-c%20wal_sender_timeout%3D4s");
    let relay = Relay::start(&bench.through);
    relay.ready().await;
    bench.postgres.set(Toxics { bandwidth_down: Some(100 << 10), ..Toxics::default() });
    let large = "insert into outbox (aggregatetype, aggregateid, type, payload) \
                 values ('order', '1', 'large', to_jsonb(repeat('x', 900000)))";
    bench.outbox.sql(large).await;
    bench.consumer.wait_distinct(1).await;
    bench.postgres.heal();
    bench.outbox.wait_confirmed(bench.outbox.current().await).await;
    assert_eq!(relay.stop(), 0);
    bench.assert_good();
}

/// 48 MB at 4 MB a second: three times `rabbitmq.confirm_timeout`, with one confirm at its end. The last megabytes are in the
/// kernel's hands when the relay has written all, so the timeout is several times what these need. (On a busy machine it may
/// not be: then the body comes once more.)
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_takes_longer_to_go_than_a_confirm_may_be_held_back_is_delivered() {
    let bench = Bench::start().await;
    bench.rabbitmq.set(Toxics { bandwidth_up: Some(4 << 20), ..Toxics::default() });
    let relay = Relay::start_with(&bench.through, &[("rabbitmq.confirm_timeout", "4s")]);
    relay.ready().await;
    let large = "insert into outbox (aggregatetype, aggregateid, type, payload) \
                 values ('order', '1', 'large', to_jsonb(repeat('x', 48000000)))";
    bench.outbox.sql(large).await;
    bench.consumer.wait_distinct(1).await;
    bench.outbox.wait_confirmed(bench.outbox.current().await).await;
    assert_eq!(relay.stop(), 0);
    bench.assert_good();
}

#[tokio::test]
async fn latency_is_paid_both_ways_and_bandwidth_by_every_byte() {
    let link = echo().await;
    let mut client = client(&link).await;
    assert_eq!(round_trip(&mut client, b"quick").await.unwrap(), b"quick");
    link.set(Toxics { latency: Duration::from_millis(100), ..Toxics::default() });
    let began = Instant::now();
    assert_eq!(round_trip(&mut client, b"late").await.unwrap(), b"late");
    assert!(began.elapsed() >= Duration::from_millis(200));
    for (up, down) in [(Some(10_000), None), (None, Some(10_000))] {
        link.set(Toxics { bandwidth_up: up, bandwidth_down: down, ..Toxics::default() });
        let began = Instant::now();
        // The last piece's pause is paid after it.
        round_trip(&mut client, &[7; 3000]).await.unwrap();
        assert!(began.elapsed() >= Duration::from_millis(240), "{:?}", began.elapsed());
    }
    link.set(Toxics { slice: Some(1), ..Toxics::default() });
    assert_eq!(round_trip(&mut client, &[8; 3000]).await.unwrap(), [8; 3000]);
}

#[tokio::test]
async fn a_black_hole_swallows_and_its_end_resets_who_lost_bytes() {
    for (black_hole_up, black_hole_down) in [(true, false), (false, true)] {
        let link = echo().await;
        let (mut loser, mut idle) = (client(&link).await, client(&link).await);
        for client in [&mut loser, &mut idle] {
            round_trip(client, b"there").await.unwrap();
        }
        link.set(Toxics { black_hole_up, black_hole_down, ..Toxics::default() });
        let swallowed = timeout(Duration::from_millis(200), round_trip(&mut loser, b"lost")).await;
        assert!(swallowed.is_err(), "{swallowed:?}");
        link.heal();
        assert!(is_reset(timeout(PATIENCE, loser.read_u8()).await.unwrap()));
        assert_eq!(round_trip(&mut idle, b"still").await.unwrap(), b"still");
    }
}

#[tokio::test]
async fn resets_come_after_so_many_bytes_on_a_cut_and_at_once_when_refused() {
    let link = echo().await;
    let (mut first, mut second) = (client(&link).await, client(&link).await);
    round_trip(&mut first, b"there").await.unwrap();
    round_trip(&mut second, b"there").await.unwrap();
    link.set(Toxics { reset_after: Some(10), ..Toxics::default() });
    assert_eq!(round_trip(&mut first, b"12345").await.unwrap(), b"12345");
    assert!(is_reset(round_trip(&mut first, b"678901").await));
    assert_eq!(round_trip(&mut second, b"1234567890").await.unwrap(), b"1234567890");
    link.heal();
    link.cut();
    assert!(is_reset(second.read_u8().await));
    link.refuse(true);
    assert!(is_reset(client(&link).await.read_u8().await));
    link.refuse(false);
    assert_eq!(link.connections(), 3);
    let target = echo().await;
    link.retarget(target.port());
    round_trip(&mut client(&link).await, b"moved").await.unwrap();
    assert_eq!((link.connections(), target.connections()), (4, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn held_confirms_and_held_statuses_keep_the_slot_until_they_are_released() {
    for is_confirm in [true, false] {
        let bench = Bench::start().await;
        let relay = Relay::start(&bench.through);
        relay.ready().await;
        let (hold_confirms, hold_statuses) = (is_confirm, !is_confirm);
        bench.rabbitmq.set(Toxics { hold_confirms, ..Toxics::default() });
        bench.postgres.set(Toxics { hold_statuses, ..Toxics::default() });
        bench.outbox.insert("held").await;
        let commit = bench.consumer.wait_distinct(1).await[0].position.0;
        if !is_confirm {
            eventually("the status is on its way", || async { bench.ledger.told() > commit }).await;
        }
        // Long enough for a status that goes out too early.
        for _ in 0..50 {
            bench.assert_good();
            assert!(bench.outbox.confirmed().await <= commit);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(bench.ledger.counts().confirms, u64::from(!is_confirm));
        bench.rabbitmq.heal();
        bench.postgres.heal();
        bench.outbox.wait_confirmed(bench.outbox.current().await).await;
        assert_eq!(relay.stop(), 0);
        assert_eq!(bench.consumer.count(), 1);
        bench.assert_good();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_before_a_confirm_repeats_the_message_and_one_before_a_status_does_not() {
    let bench = Bench::start().await;
    let relay = Relay::start(&bench.through);
    relay.ready().await;
    bench.rabbitmq.set(Toxics { cut_before_confirm: Some(1), ..Toxics::default() });
    bench.outbox.insert("twice").await;
    eventually("it comes again", || async { bench.consumer.count() == 2 }).await;
    bench.outbox.wait_confirmed(bench.outbox.current().await).await;
    assert_eq!(bench.ledger.counts().amqp_connections, 2);
    let before = bench.ledger.counts().postgres_connections;
    bench.postgres.set(Toxics { cut_before_status: Some(1), ..Toxics::default() });
    bench.outbox.insert("once").await;
    eventually("a new stream", || async { bench.ledger.counts().postgres_connections > before }).await;
    bench.outbox.wait_confirmed(bench.outbox.current().await).await;
    assert_eq!(relay.stop(), 0);
    assert_eq!(bench.consumer.distinct(), 2);
    bench.assert_good();
}
