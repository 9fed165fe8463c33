//! Brokers that break AMQP: the real relay between a real PostgreSQL and a script.
//!
//! The trap: "the session ended" proves nothing by itself. What counts is from where the next one publishes, what the
//! counters say at that moment, and where the slot stands.

use std::io;
use std::time::Duration;

use pgoutbox::lsn::Lsn;

use super::amqp::{Broker, Published, Tune, USUAL, Wire, ack, frame};
use crate::support::relay::Relay;
use crate::support::{Outbox, eventually, shared_postgres};

/// In every payload, and never in a log.
const SECRET: &str = "s3cret-payload";

/// Rows of a case, each in a transaction of its own.
const ROWS: usize = 3;

/// Resident memory, in KiB.
const MEMORY_KIB_MAX: u64 = 128 * 1024;

/// A relay that meets a scripted broker, with rows waiting for it.
struct Case {
    outbox: Outbox,
    rows: Vec<String>,
    broker: Broker,
    relay: Relay,
    hostile: usize,
}

impl Case {
    /// The first connection follows the script.
    async fn start<S>(script: S) -> Self
    where
        S: Fn(&mut Wire) -> io::Result<()> + Send + Sync + 'static,
    {
        Self::start_with(1, &[], script).await
    }

    async fn start_with<S>(hostile: usize, settings: &[(&str, &str)], script: S) -> Self
    where
        S: Fn(&mut Wire) -> io::Result<()> + Send + Sync + 'static,
    {
        let broker = Broker::start(hostile, script);
        let outbox = Outbox::create_for(shared_postgres(), broker.url()).await;
        let mut rows = Vec::new();
        for _ in 0..ROWS {
            let sql = format!(
                "insert into outbox (aggregatetype, aggregateid, type, payload) \
                 values ('order', '1', 'placed', '{{\"a\": \"{SECRET}\"}}') returning id"
            );
            rows.push(outbox.text(&sql).await.unwrap());
        }
        let relay = Relay::start_with(&outbox, settings);
        Self { outbox, rows, broker, relay, hostile }
    }

    /// What came by connections after the script's.
    fn afterwards(&self) -> Vec<Published> {
        let published = self.broker.published();
        published.into_iter().filter(|published| published.session >= self.hostile).collect()
    }

    /// The session ends, and the next one publishes again behind the first `justified` rows at most: runs settle whole, so it
    /// may be fewer. Those alone were counted and told. Then all goes well.
    async fn replays_behind(self, justified: usize, says: &[&str]) {
        eventually("a session after the script", || async { !self.afterwards().is_empty() }).await;
        let first = self.afterwards()[0].clone();
        let counted = self.relay.metric("pgoutbox_settled_total");
        let confirmed = self.outbox.confirmed().await;
        let settled = self.rows.iter().position(|id| *id == first.id).unwrap();
        assert!(settled <= justified, "{settled} rows count as settled, {justified} were acked");
        assert_eq!(counted, settled as f64, "settled");
        let lsn: Lsn = first.lsn.parse().unwrap();
        assert!(confirmed <= lsn, "{confirmed} was told, and the row at {lsn} is not settled");
        let log = self.relay.log();
        for text in says {
            assert!(log.contains(text), "{text:?} is not in\n{log}");
        }
        self.ends_well(settled).await;
    }

    /// Nothing ends: all rows settle by the script's own connection.
    async fn settles_at_once(self) {
        eventually("all is settled", || async { self.relay.metric("pgoutbox_settled_total") == ROWS as f64 }).await;
        assert_eq!(self.broker.connections(), 1, "{}", self.relay.log());
        self.ends_well(ROWS).await;
    }

    async fn ends_well(self, settled: usize) {
        self.broker.relent();
        eventually("all is settled", || async { self.relay.metric("pgoutbox_settled_total") == ROWS as f64 }).await;
        // A message that was proven once may come again only after another failure, and there is none.
        let ids: Vec<String> = self.afterwards().into_iter().map(|published| published.id).collect();
        assert_eq!(ids, self.rows[settled..]);
        assert!(self.broker.connections() <= self.hostile + 1, "{} connections", self.broker.connections());
        let last = self.outbox.current().await;
        self.outbox.wait_confirmed(last).await;
        self.relay.ready().await;
        assert!(!self.relay.log().contains(SECRET), "{}", self.relay.log());
        assert!(
            self.relay.peak_memory_kib().unwrap() < MEMORY_KIB_MAX,
            "{} KiB",
            self.relay.peak_memory_kib().unwrap()
        );
        assert_eq!(self.relay.stop(), 0);
        self.broker.assert_spoken_to_well();
    }
}

macro_rules! case {
    ($name:ident, $case:expr) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            $case.await
        }
    };
}

// What settles.

case!(single_acks_out_of_order_settle_all, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        wire.take(ROWS)?;
        for tag in [2, 3, 1] {
            wire.ack(tag, false)?;
        }
        wire.listen()
    };
    Case::start(script).await.settles_at_once().await;
});

case!(an_ack_of_all_before_settles_all_before, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        wire.take(ROWS)?;
        wire.ack(2, true)?;
        wire.ack(3, true)?;
        wire.listen()
    };
    Case::start(script).await.settles_at_once().await;
});

case!(acks_in_single_bytes_settle_all, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        wire.take(ROWS)?;
        wire.drip(&[ack(1, false), frame(8, 0, &[]), ack(3, true)].concat())?;
        wire.listen()
    };
    Case::start(script).await.settles_at_once().await;
});

case!(a_broker_that_blocks_and_unblocks_between_acks_is_waited_for, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        wire.take(ROWS)?;
        for tag in 1..=ROWS as u64 {
            wire.blocked("low on memory")?;
            wire.ack(tag, false)?;
            wire.unblocked()?;
        }
        wire.listen()
    };
    Case::start(script).await.settles_at_once().await;
});

case!(a_broker_that_stays_blocked_is_waited_for_and_settles_nothing, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        wire.take(ROWS)?;
        wire.blocked("low on disk")?;
        wire.listen()
    };
    let case = Case::start_with(1, &[("rabbitmq.confirm_timeout", "1s"), ("run.drain_timeout", "1s")], script).await;
    eventually("blocked", || async { case.relay.metric("pgoutbox_broker_blocked") == 1.0 }).await;
    let first: Lsn = case.broker.published()[0].lsn.parse().unwrap();
    // Other WAL goes on, and confirm_timeout is over several times.
    case.outbox.sql("create table noise as select generate_series(1, 10000) n").await;
    let began = std::time::Instant::now();
    while began.elapsed() < Duration::from_secs(4) {
        let (code, body) = case.relay.get("/readyz");
        assert_eq!((code, body.contains("low on disk")), (503, true), "{body}");
        assert_eq!(case.relay.metric("pgoutbox_settled_total"), 0.0);
        assert!(case.outbox.confirmed().await <= first, "told, and nothing is settled");
        assert_eq!(case.broker.connections(), 1, "{}", case.relay.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // A stop waits no longer than it may: a second here, and 25 by default.
    assert_eq!(case.relay.stop_within(Duration::from_secs(15)), 0);
    assert!(case.outbox.confirmed().await <= first, "told at the stop, and nothing is settled");
});

// What must end the session.

case!(an_ack_of_a_message_never_published_ends_the_session, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        wire.take(ROWS)?;
        wire.ack(4, false)?;
        wire.listen()
    };
    Case::start(script).await.replays_behind(0, &["nothing is lost", "4"]).await;
});

case!(an_ack_of_all_up_to_a_message_never_published_ends_the_session, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        wire.take(ROWS)?;
        wire.ack(1_000_000, true)?;
        wire.listen()
    };
    Case::start(script).await.replays_behind(0, &["nothing is lost", "a confirm for delivery tag 1000000"]).await;
});

// Tag 0 with `multiple` means "all so far" where a consumer says it. Of a broker nobody has heard it.
case!(an_ack_of_all_without_a_tag_ends_the_session, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        wire.take(ROWS)?;
        wire.ack(0, true)?;
        wire.listen()
    };
    Case::start(script).await.replays_behind(0, &["nothing is lost", "a confirm for delivery tag 0"]).await;
});

// Whether the relay has written the whole message by then is the kernel's to say: if so, the ack is as good as any.
case!(an_ack_before_the_body_has_come_is_survived, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        wire.publish_method()?;
        wire.ack(1, false)?;
        wire.frame()?;
        wire.frame()?;
        for tag in 2..=ROWS as u64 {
            wire.published()?;
            wire.ack(tag, false)?;
        }
        wire.listen()
    };
    let case = Case::start(script).await;
    eventually("it is settled or published again", || async {
        case.relay.metric("pgoutbox_settled_total") == ROWS as f64 || !case.afterwards().is_empty()
    })
    .await;
    if case.afterwards().is_empty() {
        case.settles_at_once().await;
    } else {
        case.replays_behind(0, &["nothing is lost"]).await;
    }
});

case!(an_ack_of_message_zero_ends_the_session, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        wire.take(ROWS)?;
        wire.ack(0, false)?;
        wire.listen()
    };
    Case::start(script).await.replays_behind(0, &["nothing is lost"]).await;
});

case!(a_second_ack_of_one_message_ends_the_session, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        wire.take(ROWS)?;
        wire.raw(&[ack(1, false), ack(1, false)].concat())?;
        wire.listen()
    };
    Case::start(script).await.replays_behind(1, &["nothing is lost"]).await;
});

case!(a_nack_of_all_before_settles_none_of_them, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        wire.take(ROWS)?;
        wire.nack(2, 1)?;
        wire.listen()
    };
    Case::start(script).await.replays_behind(0, &["nacked"]).await;
});

case!(a_nack_that_asks_for_requeueing_is_a_nack, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        wire.take(ROWS)?;
        wire.ack(1, false)?;
        wire.nack(2, 2)?;
        wire.listen()
    };
    Case::start(script).await.replays_behind(1, &["nacked"]).await;
});

case!(a_nack_after_the_ack_of_a_later_message_settles_only_what_is_before_it, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        wire.take(ROWS)?;
        wire.raw(&[ack(3, false), ack(1, false)].concat())?;
        wire.nack(2, 0)?;
        wire.listen()
    };
    Case::start(script).await.replays_behind(1, &["nacked"]).await;
});

case!(a_return_before_its_ack_settles_nothing_of_it, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        let messages = wire.take(ROWS)?;
        wire.give_back(&messages[1].id)?;
        wire.ack(3, true)?;
        wire.listen()
    };
    Case::start(script).await.replays_behind(1, &["unroutable"]).await;
});

case!(a_return_of_an_unknown_message_settles_nothing, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        wire.take(ROWS)?;
        wire.give_back("who-is-this")?;
        wire.ack(3, true)?;
        wire.listen()
    };
    Case::start(script).await.replays_behind(0, &["nothing is lost", "returned"]).await;
});

case!(a_return_of_a_message_that_was_acked_ends_the_session_before_more_is_settled, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        let messages = wire.take(ROWS)?;
        wire.ack(1, false)?;
        std::thread::sleep(Duration::from_millis(300));
        wire.give_back(&messages[0].id)?;
        wire.ack(2, false)?;
        wire.listen()
    };
    Case::start(script).await.replays_behind(1, &["nothing is lost", "returned"]).await;
});

case!(a_return_that_no_ack_follows_settles_nothing, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        let messages = wire.take(ROWS)?;
        wire.give_back(&messages[0].id)?;
        wire.listen()
    };
    Case::start_with(1, &[("rabbitmq.confirm_timeout", "2s")], script).await.replays_behind(0, &[]).await;
});

case!(a_channel_that_closes_with_confirms_pending_settles_what_was_acked, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        wire.take(ROWS)?;
        wire.ack(1, false)?;
        wire.end(1, 404, "NOT_FOUND - no exchange 'outbox' in vhost '/'")?;
        wire.listen()
    };
    Case::start(script).await.replays_behind(1, &["NOT_FOUND"]).await;
});

case!(a_connection_that_is_closed_by_an_operator_settles_what_was_acked, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        wire.take(ROWS)?;
        wire.ack(2, true)?;
        wire.end(0, 320, "CONNECTION_FORCED - maintenance")?;
        wire.fall_silent()
    };
    Case::start(script).await.replays_behind(2, &["nothing is lost"]).await;
});

case!(a_broker_that_falls_silent_settles_nothing, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        wire.take(ROWS)?;
        wire.fall_silent()
    };
    Case::start_with(1, &[("rabbitmq.confirm_timeout", "2s")], script)
        .await
        .replays_behind(0, &["did not answer"])
        .await;
});

case!(a_broker_that_sends_no_heartbeat_is_left, async {
    let script = |wire: &mut Wire| {
        wire.handshake_with(Tune { heartbeat: 1, ..USUAL })?;
        wire.take(ROWS)?;
        wire.fall_silent()
    };
    Case::start(script).await.replays_behind(0, &["nothing is lost"]).await;
});

/// Sends these bytes instead of confirms.
fn instead_of_confirms(bytes: Vec<u8>) -> impl Fn(&mut Wire) -> io::Result<()> + Send + Sync + 'static {
    move |wire| {
        wire.handshake()?;
        wire.take(ROWS)?;
        wire.raw(&bytes)?;
        wire.listen()
    }
}

case!(a_frame_with_a_wrong_end_ends_the_session, async {
    let mut bytes = ack(3, true);
    *bytes.last_mut().unwrap() = 0;
    Case::start(instead_of_confirms(bytes)).await.replays_behind(0, &["nothing is lost"]).await;
});

case!(a_frame_of_absurd_size_ends_the_session, async {
    let bytes = [&[1, 0, 1][..], &u32::MAX.to_be_bytes(), &[0; 64]].concat();
    Case::start(instead_of_confirms(bytes)).await.replays_behind(0, &["nothing is lost"]).await;
});

case!(an_unknown_method_ends_the_session, async {
    let bytes = frame(1, 1, &[0x7f, 0xff, 0x7f, 0xff, 1, 2, 3]);
    Case::start(instead_of_confirms(bytes)).await.replays_behind(0, &["nothing is lost"]).await;
});

case!(a_content_header_without_a_method_ends_the_session, async {
    let bytes = frame(2, 1, &[&[0, 60, 0, 0][..], &2u64.to_be_bytes(), &[0, 0]].concat());
    Case::start(instead_of_confirms(bytes)).await.replays_behind(0, &["nothing is lost"]).await;
});

case!(a_frame_on_a_channel_that_is_not_open_ends_the_session, async {
    let mut bytes = ack(3, true);
    bytes[2] = 9;
    Case::start(instead_of_confirms(bytes)).await.replays_behind(0, &["nothing is lost"]).await;
});

case!(an_ack_that_ends_too_early_ends_the_session, async {
    let bytes = frame(1, 1, &[0, 60, 0, 80, 0, 0, 0]);
    Case::start(instead_of_confirms(bytes)).await.replays_behind(0, &["nothing is lost"]).await;
});

// What never becomes a session: connecting ends by its own deadlines, and attempts keep a distance.

/// Three connections go wrong like this, the fourth goes well.
async fn waits_for_a_better_broker<S>(script: S)
where
    S: Fn(&mut Wire) -> io::Result<()> + Send + Sync + 'static,
{
    let began = std::time::Instant::now();
    let case = Case::start_with(3, &[], script).await;
    eventually("a session after the script", || async { !case.afterwards().is_empty() }).await;
    // The backoff's lower ends; a storm would take milliseconds.
    assert!(began.elapsed() > Duration::from_millis(500), "{} connections at once", case.broker.connections());
    case.replays_behind(0, &["nothing is lost"]).await;
}

/// Sends these bytes at once, and then nothing.
fn instead_of_a_handshake(bytes: &'static [u8]) -> impl Fn(&mut Wire) -> io::Result<()> + Send + Sync + 'static {
    move |wire| {
        wire.raw(bytes)?;
        wire.fall_silent()
    }
}

case!(a_web_server_on_the_broker_s_port_is_no_broker, async {
    waits_for_a_better_broker(instead_of_a_handshake(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")).await;
});

case!(a_broker_of_another_protocol_version_is_no_broker, async {
    waits_for_a_better_broker(instead_of_a_handshake(b"AMQP\x03\x01\x00\x00")).await;
});

// What it announces is enough: nobody waits for the rest.
case!(an_absurd_frame_instead_of_a_handshake_is_no_broker, async {
    let bytes = b"\x01\0\0\xff\xff\xff\xff\0\x0a\0\x0a";
    let says = ["nothing is lost", "a frame of 4294967295 bytes"];
    Case::start(instead_of_a_handshake(bytes)).await.replays_behind(0, &says).await;
});

case!(a_broker_that_closes_at_once_is_no_broker, waits_for_a_better_broker(|_| Ok(())));

case!(a_broker_that_closes_at_every_step_is_no_broker, async {
    let steps: [fn(&mut Wire) -> io::Result<()>; 3] = [
        Wire::start,
        |wire| {
            wire.start()?;
            wire.tune(USUAL)
        },
        Wire::handshake,
    ];
    for step in steps {
        waits_for_a_better_broker(move |wire: &mut Wire| step(wire)).await;
    }
});

case!(a_broker_that_stops_answering_at_any_step_is_left_by_a_deadline, async {
    let steps: [fn(&mut Wire) -> io::Result<()>; 6] = [
        |_| Ok(()),
        Wire::start,
        |wire| {
            wire.start()?;
            wire.tune(USUAL)
        },
        |wire| wire.handshake_until(20),
        |wire| wire.handshake_until(40),
        |wire| wire.handshake_until(85),
    ];
    let cases = steps.map(|step| async move {
        let script = move |wire: &mut Wire| {
            step(wire)?;
            wire.fall_silent()
        };
        Case::start(script).await.replays_behind(0, &["did not answer within"]).await;
    });
    futures_util::future::join_all(cases).await;
});

case!(a_broker_that_never_says_goodbye_does_not_hold_a_stop, async {
    let script = |wire: &mut Wire| {
        wire.handshake()?;
        wire.take(ROWS)?;
        wire.ack(ROWS as u64, true)?;
        wire.fall_silent()
    };
    let case = Case::start(script).await;
    eventually("all is settled", || async { case.relay.metric("pgoutbox_settled_total") == ROWS as f64 }).await;
    assert_eq!(case.relay.stop_within(Duration::from_secs(15)), 0);
    case.broker.assert_spoken_to_well();
});

case!(whatever_a_broker_proposes_for_tuning_the_messages_get_there, async {
    let odd = [
        Tune { frame_max: 0, ..USUAL },
        Tune { frame_max: 4096, ..USUAL },
        Tune { heartbeat: 0, ..USUAL },
        Tune { channel_max: 0, ..USUAL },
        Tune { channel_max: 1, ..USUAL },
        Tune { frame_max: u32::MAX, heartbeat: u16::MAX, channel_max: u16::MAX },
    ];
    let cases = odd.map(|tune| async move {
        let script = move |wire: &mut Wire| {
            wire.handshake_with(tune)?;
            wire.take(ROWS)?;
            wire.ack(ROWS as u64, true)?;
            wire.listen()
        };
        Case::start(script).await.settles_at_once().await;
    });
    futures_util::future::join_all(cases).await;
});

// Frames of one byte, where AMQP's least is 4096: messages in 8-byte frames or none, and never a wrong one.
case!(a_broker_that_proposes_frames_too_small_to_use_does_no_harm, async {
    let script = |wire: &mut Wire| {
        wire.handshake_with(Tune { frame_max: 1, ..USUAL })?;
        wire.fall_silent()
    };
    Case::start_with(1, &[("rabbitmq.confirm_timeout", "2s")], script).await.replays_behind(0, &[]).await;
});

/// A node that is cut off from its cluster lets everybody in, and can store nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_holds_back_its_confirms_is_left_for_the_next_one() {
    let (silent, honest) = (Broker::start(0, |_| Ok(())), Broker::honest());
    let outbox = Outbox::create_for(shared_postgres(), format!("{},{}", silent.url(), honest.url())).await;
    let row = outbox.insert("placed").await;
    let relay = Relay::start_with(&outbox, &[("rabbitmq.confirm_timeout", "5s")]);
    eventually("the row is settled", || async { relay.metric("pgoutbox_settled_total") == 1.0 }).await;
    let came = |broker: &Broker| broker.published().into_iter().map(|published| published.id).collect::<Vec<_>>();
    assert_eq!((came(&silent), came(&honest)), (vec![row.clone()], vec![row]), "{}", relay.log());
    assert_eq!((silent.connections(), honest.connections()), (1, 1));
    assert_eq!(relay.stop(), 0);
}
