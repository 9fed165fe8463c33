//! Rows 43 to 54: what brokers do, and what is done to them.

use std::time::Duration;

use lapin::ExchangeKind;
use lapin::options::{
    ExchangeBindOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};

use super::acts::{Side, TIMEOUTS};
use super::arena::Round;
use super::{FAILURE, Row, allow, allow_reorder};
use crate::support::consumer::{Kind, channel};
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
        number: "49c",
        fault: "disk alarm for longer than confirm timeout and heartbeats",
        allowed: allow(0),
        run: |round| Box::pin(async move { round.disk_alarm(TIMEOUTS + Duration::from_secs(2)).await }),
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

/// Puts one binding between the relay's exchange and all queues. The trap: queues that are bound one after the other. What
/// is published in between reaches some of them, rightly, and looks lost to the others.
struct Gate {
    _connection: lapin::Connection,
    channel: lapin::Channel,
    exchange: String,
    behind: String,
}

impl Gate {
    /// Opened for these keys.
    async fn new(round: &Round, keys: &[String]) -> Self {
        let (connection, channel) = channel(&round.outbox.amqp).await;
        let exchange = round.outbox.name.clone();
        let gate = Self { _connection: connection, channel, behind: format!("{exchange}_behind"), exchange };
        // Gone with the queues.
        let options = ExchangeDeclareOptions { auto_delete: true, ..Default::default() };
        let behind = gate.behind.as_str().into();
        gate.channel.exchange_declare(behind, ExchangeKind::Fanout, options, FieldTable::default()).await.unwrap();
        let queues = [Kind::Classic, Kind::Quorum, Kind::Stream].map(|kind| kind.queue(&round.outbox));
        for queue in &queues {
            let (queue, behind, options) = (queue.as_str().into(), gate.behind.as_str().into(), Default::default());
            gate.channel.queue_bind(queue, behind, "".into(), options, FieldTable::default()).await.unwrap();
        }
        for key in keys {
            gate.open(key).await;
        }
        for queue in &queues {
            let (queue, exchange) = (queue.as_str().into(), gate.exchange.as_str().into());
            gate.channel.queue_unbind(queue, exchange, "#".into(), FieldTable::default()).await.unwrap();
        }
        gate
    }

    async fn open(&self, key: &str) {
        let (behind, exchange) = (self.behind.as_str().into(), self.exchange.as_str().into());
        let options = ExchangeBindOptions::default();
        self.channel.exchange_bind(behind, exchange, key.into(), options, FieldTable::default()).await.unwrap();
    }
}

async fn exchange_deleted(round: &mut Round) {
    let gate = Gate::new(round, &["#".to_owned()]).await;
    round.moment().await;
    let exchange = gate.exchange.as_str();
    gate.channel.exchange_delete(exchange.into(), ExchangeDeleteOptions::default()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    gate.channel.exchange_declare(exchange.into(), ExchangeKind::Topic, durable, FieldTable::default()).await.unwrap();
    gate.open("#").await;
}

/// Until it is bound, its key is nobody's: the queues listen to the other kinds only.
async fn unroutable(round: &mut Round) {
    let kinds = ["placed", "paid", "shipped", "odd", "prepared", "gone", "undone", "marker"];
    let gate = Gate::new(round, &kinds.map(|kind| format!("*.{kind}"))).await;
    round.outbox.insert("lonely").await;
    let reason = || async { round.relay().get("/readyz").1.contains("order.lonely") };
    eventually("readiness names the key", reason).await;
    round.lasts(Duration::from_secs(3)).await;
    gate.open("#").await;
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
