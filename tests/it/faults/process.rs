//! Rows 1 to 13: processes that are killed, stopped, frozen and doubled.

use std::time::Duration;

use super::acts::TIMEOUTS;
use super::{FAILURE, Row, allow};
use crate::support::eventually;
use crate::support::links::Toxics;

pub(super) const ROWS: &[Row] = &[
    Row {
        number: "1",
        fault: "relay killed (SIGKILL) three times at random instants",
        allowed: allow(3 * FAILURE),
        run: |round| {
            Box::pin(async move {
                for _ in 0..3 {
                    round.kill_relay().await;
                    round.flowing(20).await;
                }
            })
        },
    },
    Row {
        number: "2a",
        fault: "relay killed between publish and confirm",
        allowed: allow(FAILURE),
        run: |round| {
            Box::pin(async move {
                round.to_rabbitmq.set(Toxics { hold_confirms: true, ..Toxics::default() });
                round.moment().await;
                round.take_relay().kill();
                round.to_rabbitmq.heal();
                round.start_relay();
            })
        },
    },
    Row {
        number: "2b",
        fault: "relay killed between confirm and status",
        allowed: allow(FAILURE),
        run: |round| {
            Box::pin(async move {
                round.to_postgres.set(Toxics { hold_statuses: true, ..Toxics::default() });
                round.moment().await;
                round.take_relay().kill();
                round.to_postgres.heal();
                round.start_relay();
            })
        },
    },
    Row {
        number: "2c",
        fault: "broker's link cut between a publish and its confirm",
        allowed: allow(FAILURE),
        run: |round| {
            Box::pin(async move {
                let (cuts, after) = (round.link(super::acts::Side::RabbitMq).connections(), round.random.u64(1..20));
                round.to_rabbitmq.set(Toxics { cut_before_confirm: Some(after), ..Toxics::default() });
                eventually("it is cut", || async { round.to_rabbitmq.connections() > cuts }).await;
                round.to_rabbitmq.heal();
            })
        },
    },
    Row {
        number: "2d",
        fault: "Postgres' link cut between a confirm and its status; the relay lives",
        allowed: allow(0),
        run: |round| {
            Box::pin(async move {
                let (cuts, after) = (round.to_postgres.connections(), round.random.u64(1..5));
                round.to_postgres.set(Toxics { cut_before_status: Some(after), ..Toxics::default() });
                eventually("it is cut", || async { round.to_postgres.connections() > cuts }).await;
                round.to_postgres.heal();
            })
        },
    },
    Row {
        number: "3",
        fault: "relay told to stop (SIGTERM) under load, and started again",
        allowed: allow(0),
        run: |round| Box::pin(async move { round.restart_relay().await }),
    },
    Row {
        number: "4",
        fault: "relay frozen (SIGSTOP) for less than wal_sender_timeout",
        allowed: allow(0),
        run: |round| Box::pin(async move { round.freeze_relay(Duration::from_secs(2)).await }),
    },
    Row {
        number: "5",
        fault: "relay frozen for longer; a second one takes the slot; the first wakes up",
        allowed: allow(2 * FAILURE),
        run: |round| Box::pin(zombie(round)),
    },
    Row {
        number: "6",
        fault: "two relays on one slot: the second waits, the first dies, the second takes over",
        allowed: allow(FAILURE),
        run: |round| Box::pin(standby(round)),
    },
    Row {
        number: "7",
        fault: "machine paused (freezer) longer than every timeout, relay alone on the slot",
        allowed: allow(FAILURE),
        run: |round| Box::pin(async move { round.freeze_relay(TIMEOUTS).await }),
    },
    Row {
        number: "8",
        fault: "Postgres killed (SIGKILL), relay alive",
        allowed: allow(0),
        run: |round| Box::pin(async move { round.kill_postgres().await }),
    },
    Row {
        number: "9",
        fault: "Postgres and relay killed together",
        // Everything since Postgres last saved the slot.
        allowed: allow(usize::MAX),
        run: |round| {
            Box::pin(async move {
                round.take_relay().kill();
                round.kill_postgres().await;
                round.start_relay();
            })
        },
    },
    Row {
        number: "10",
        fault: "Postgres restarted (fast), broker healthy",
        allowed: allow(0),
        run: |round| Box::pin(async move { round.restart_postgres("fast").await }),
    },
    Row {
        number: "11",
        fault: "Postgres stopped (fast) while the broker is down",
        allowed: allow(FAILURE),
        run: |round| {
            Box::pin(async move {
                round.end_broker().await;
                round.moment().await;
                round.stop_postgres("fast").await;
                round.start_postgres().await;
                round.site.rabbitmq.start_again().unwrap();
            })
        },
    },
    Row {
        number: "12",
        fault: "Postgres stopped (immediate) in the middle of a transaction of 60,000 rows",
        allowed: allow(0),
        run: |round| {
            Box::pin(async move {
                round.pause_load().await;
                let sql = "insert into outbox (aggregatetype, aggregateid, type) \
                           select 'order', n::text, 'many' from generate_series(1, 60000) n";
                round.outbox.sql(sql).await;
                round.flowing(1000).await;
                round.restart_postgres("immediate").await;
                round.load(3);
            })
        },
    },
    Row {
        number: "13",
        fault: "walsender terminated (pg_terminate_backend)",
        allowed: allow(0),
        run: |round| Box::pin(async move { round.terminate_walsender().await }),
    },
];

/// I12: what the first publishes after it woke up is what its socket held already.
async fn zombie(round: &mut super::Round) {
    use nix::sys::signal::Signal;
    round.relay().signal(Signal::SIGSTOP);
    let second = round.new_relay();
    let took_over = || async { second.is_ready() };
    eventually("the second takes the slot", took_over).await;
    let first = round.relay.replace(second).expect("a relay runs");
    round.flowing(100).await;
    first.signal(Signal::SIGCONT);
    eventually("the first sees that it lost the slot", || async { !first.is_ready() }).await;
    round.flowing(100).await;
    if first.is_ready() {
        round.complaints.push("both relays say that they are ready".to_owned());
    }
    round.note(&first);
    first.kill();
}

async fn standby(round: &mut super::Round) {
    let second = round.new_relay();
    let waits = || async { second.get("/readyz").1.contains("active for PID") };
    eventually("the second says who holds the slot", waits).await;
    round.flowing(50).await;
    assert_eq!(second.metric("pgoutbox_published_total"), 0.0, "the second publishes");
    round.take_relay().kill();
    round.relay = Some(second);
}
