//! Rows 43 to 54: what brokers do, and what is done to them.

use std::time::Duration;

use lapin::options::{ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};

use super::acts::{Side, TIMEOUTS};
use super::arena::Round;
use super::{FAILURE, Row, allow, allow_reorder};
use crate::support::consumer::{Kind, bind_kind, channel};
use crate::support::eventually;

pub(super) const ROWS: &[Row] = &[
    Row {
        number: "43",
        fault: "exchange deleted while running, declared and bound again later",
        allowed: allow(FAILURE),
        run: |round| Box::pin(exchange_deleted(round)),
    },
    Row {
        number: "44",
        fault: "unroutable key in the middle of traffic, bound 3 s later",
        allowed: allow_reorder(3 * FAILURE),
        run: |round| Box::pin(unroutable(round)),
    },
    Row {
        number: "46",
        fault: "a bystander's queue deleted in the middle of a window",
        allowed: allow(0),
        run: |round| Box::pin(queue_deleted(round)),
    },
    Row {
        number: "47",
        fault: "a full queue refuses (reject-publish, length 5), emptied 3 s later",
        allowed: allow_reorder(3 * FAILURE),
        run: |round| Box::pin(full(round)),
    },
    Row {
        number: "49a",
        fault: "memory alarm for 3 s",
        allowed: allow(0),
        run: |round| Box::pin(async move { round.alarm(Duration::from_secs(3)).await }),
    },
    Row {
        number: "49b",
        fault: "memory alarm for longer than confirm timeout and heartbeats",
        allowed: allow(0),
        run: |round| Box::pin(async move { round.alarm(TIMEOUTS + Duration::from_secs(2)).await }),
    },
    Row {
        number: "50a",
        fault: "broker frozen (SIGSTOP) for 2 s",
        allowed: allow(0),
        run: |round| Box::pin(async move { round.freeze_broker(Duration::from_secs(2)).await }),
    },
    Row {
        number: "50b",
        fault: "broker frozen for longer than every timeout, then woken: its sockets' frames arrive late",
        allowed: allow(3 * FAILURE),
        run: |round| Box::pin(async move { round.freeze_broker(TIMEOUTS + Duration::from_secs(2)).await }),
    },
    Row {
        number: "51a",
        fault: "broker killed (SIGKILL) under load",
        allowed: allow(FAILURE),
        run: |round| Box::pin(async move { round.kill_broker(Duration::ZERO).await }),
    },
    Row {
        number: "51b",
        fault: "broker killed, away for 6 s",
        allowed: allow(FAILURE),
        run: |round| Box::pin(async move { round.kill_broker(Duration::from_secs(6)).await }),
    },
    Row {
        number: "51c",
        fault: "broker stopped in good order and started again",
        allowed: allow(FAILURE),
        run: |round| {
            Box::pin(async move {
                round.moment().await;
                round.site.rabbitmq.stop().unwrap();
                round.site.rabbitmq.start_again().unwrap();
            })
        },
    },
    Row {
        number: "53",
        fault: "connections closed by an operator (320 CONNECTION_FORCED)",
        allowed: allow(FAILURE),
        run: |round| Box::pin(async move { round.close_all_connections().await }),
    },
    Row {
        number: "54a",
        fault: "the relay's permissions at the broker revoked, granted 4 s later",
        allowed: allow(FAILURE),
        run: |round| Box::pin(forbidden(round, &["clear_permissions", "relay"])),
    },
    Row {
        number: "54b",
        fault: "the relay's password at the broker changed, set back 4 s later",
        allowed: allow(FAILURE),
        run: |round| Box::pin(forbidden(round, &["change_password", "relay", "another"])),
    },
];

async fn exchange_deleted(round: &mut Round) {
    let (_connection, channel) = channel(&round.outbox.amqp).await;
    round.moment().await;
    let exchange = round.outbox.name.clone();
    channel.exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    for kind in [Kind::Classic, Kind::Quorum, Kind::Stream] {
        bind_kind(&round.outbox, &kind.queue(&round.outbox), "#", kind).await;
    }
}

/// Until it is bound, its key is nobody's: the queues listen to the other kinds only.
async fn unroutable(round: &mut Round) {
    let (_connection, channel) = channel(&round.outbox.amqp).await;
    let exchange = round.outbox.name.clone();
    let kinds = ["placed", "paid", "shipped", "odd", "prepared", "gone", "undone", "marker"];
    for queue in [Kind::Classic, Kind::Quorum, Kind::Stream].map(|kind| kind.queue(&round.outbox)) {
        for kind in kinds {
            let key = format!("*.{kind}");
            let options = QueueBindOptions::default();
            let arguments = FieldTable::default();
            let (queue, exchange) = (queue.as_str().into(), exchange.as_str().into());
            channel.queue_bind(queue, exchange, key.as_str().into(), options, arguments).await.unwrap();
        }
        let (queue, exchange) = (queue.as_str().into(), exchange.as_str().into());
        channel.queue_unbind(queue, exchange, "#".into(), FieldTable::default()).await.unwrap();
    }
    round.outbox.insert("lonely").await;
    let reason = || async { round.relay().get("/readyz").1.contains("order.lonely") };
    eventually("readiness names the key", reason).await;
    round.lasts(Duration::from_secs(3)).await;
    for kind in [Kind::Classic, Kind::Quorum, Kind::Stream] {
        bind_kind(&round.outbox, &kind.queue(&round.outbox), "#", kind).await;
    }
}

async fn bystander(round: &Round, arguments: FieldTable) -> (lapin::Connection, lapin::Channel, String) {
    let (connection, channel) = channel(&round.outbox.amqp).await;
    let queue = format!("{}_bystander", round.outbox.name);
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(queue.as_str().into(), durable, arguments).await.unwrap();
    let (exchange, options) = (round.outbox.name.as_str().into(), QueueBindOptions::default());
    channel.queue_bind(queue.as_str().into(), exchange, "#".into(), options, FieldTable::default()).await.unwrap();
    (connection, channel, queue)
}

async fn queue_deleted(round: &mut Round) {
    for _ in 0..3 {
        let (_connection, channel, queue) = bystander(round, FieldTable::default()).await;
        round.moment().await;
        channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    }
}

async fn full(round: &mut Round) {
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(5));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    let (_connection, channel, queue) = bystander(round, arguments).await;
    eventually("the relay says that it is refused", || async { !round.relay().is_ready() }).await;
    round.lasts(Duration::from_secs(3)).await;
    channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
}

/// 403 or a refused login: not ready, no storm, and no secret in the log (every round looks for it).
async fn forbidden(round: &mut Round, how: &[&str]) {
    round.site.rabbitmq.ctl(how).unwrap();
    round.link(Side::RabbitMq).cut();
    eventually("readiness ends", || async { !round.relay().is_ready() }).await;
    round.lasts(Duration::from_secs(4)).await;
    round.site.rabbitmq.ctl(&["change_password", "relay", super::arena::SECRET]).unwrap();
    round.site.permit();
}
