//! Rows 14 to 17: what networks do.

use std::time::Duration;

use super::acts::{Side, TIMEOUTS};
use super::{FAILURE, Row, allow};
use crate::support::links::Toxics;

pub(super) const ROWS: &[Row] = &[
    Row {
        number: "14a",
        fault: "black hole between relay and Postgres, both ways",
        allowed: allow(FAILURE),
        run: |round| Box::pin(async move { round.black_hole(Side::Postgres, true, true).await }),
    },
    Row {
        number: "14b",
        fault: "black hole from Postgres to the relay only",
        allowed: allow(FAILURE),
        run: |round| Box::pin(async move { round.black_hole(Side::Postgres, false, true).await }),
    },
    Row {
        number: "14c",
        fault: "black hole from the relay to Postgres only",
        allowed: allow(FAILURE),
        run: |round| Box::pin(async move { round.black_hole(Side::Postgres, true, false).await }),
    },
    Row {
        number: "14d",
        fault: "black hole between relay and broker, both ways",
        allowed: allow(FAILURE),
        run: |round| Box::pin(async move { round.black_hole(Side::RabbitMq, true, true).await }),
    },
    Row {
        number: "14e",
        fault: "black hole from the broker to the relay only",
        allowed: allow(FAILURE),
        run: |round| Box::pin(async move { round.black_hole(Side::RabbitMq, false, true).await }),
    },
    Row {
        number: "14f",
        fault: "black hole from the relay to the broker only",
        allowed: allow(FAILURE),
        run: |round| Box::pin(async move { round.black_hole(Side::RabbitMq, true, false).await }),
    },
    Row {
        number: "14g",
        fault: "no route to Postgres, then none to the broker: new connections hang",
        allowed: allow(2 * FAILURE),
        run: |round| {
            Box::pin(async move {
                for side in [Side::Postgres, Side::RabbitMq] {
                    round.link(side).set(Toxics { black_hole_up: true, black_hole_down: true, ..Toxics::default() });
                    round.link(side).cut();
                    round.lasts(TIMEOUTS).await;
                    round.link(side).heal();
                    round.flowing(1).await;
                }
            })
        },
    },
    Row {
        number: "14h",
        fault: "both peers refuse connections for a while",
        allowed: allow(2 * FAILURE),
        run: |round| {
            Box::pin(async move {
                for side in [Side::Postgres, Side::RabbitMq] {
                    round.link(side).refuse(true);
                    round.link(side).cut();
                    round.lasts(Duration::from_secs(5)).await;
                    round.link(side).refuse(false);
                    round.flowing(1).await;
                }
            })
        },
    },
    Row {
        number: "15a",
        fault: "Postgres' link reset at a random byte, three times",
        allowed: allow(0),
        run: |round| Box::pin(async move { round.resets(Side::Postgres, 3).await }),
    },
    Row {
        number: "15b",
        fault: "broker's link reset at a random byte, three times",
        allowed: allow(3 * FAILURE),
        run: |round| Box::pin(async move { round.resets(Side::RabbitMq, 3).await }),
    },
    Row {
        number: "16a",
        fault: "Postgres' link in single bytes, then 300 ms away, then 64 KB/s",
        allowed: allow(0),
        run: |round| Box::pin(slow(round, Side::Postgres)),
    },
    Row {
        number: "16b",
        fault: "broker's link in single bytes, then 300 ms away, then 64 KB/s",
        allowed: allow(FAILURE),
        run: |round| Box::pin(slow(round, Side::RabbitMq)),
    },
    Row {
        number: "17",
        fault: "broker takes 64 KB/s, transaction of 20,000 rows: walsender not timed out, memory flat",
        allowed: allow(0),
        run: |round| {
            Box::pin(async move {
                round.pause_load().await;
                // Megabytes of the load, on their way at that speed, are 16b.
                round.outbox.wait_confirmed(round.outbox.current().await).await;
                round
                    .outbox
                    .sql(
                        "insert into outbox (aggregatetype, aggregateid, type, payload) \
                    select 'order', n::text, 'slow', jsonb_build_object('n', n) from generate_series(1, 20000) n",
                    )
                    .await;
                round
                    .toxic(Side::RabbitMq, Toxics { bandwidth_up: Some(64 << 10), ..Toxics::default() }, TIMEOUTS)
                    .await;
                round.load(3);
            })
        },
    },
];

async fn slow(round: &mut super::Round, side: Side) {
    let each = Duration::from_secs(3);
    round.toxic(side, Toxics { slice: Some(1), ..Toxics::default() }, each).await;
    round.toxic(side, Toxics { latency: Duration::from_millis(300), ..Toxics::default() }, each).await;
    let slow = Some(64 << 10);
    round.toxic(side, Toxics { bandwidth_up: slow, bandwidth_down: slow, ..Toxics::default() }, each).await;
}
