//! RabbitMQ: an exchange that is missing or another, a password, and messages that it refuses, blocks or gives back.
//!
//! The trap: "acked" is not "routed", and behind a refused message others are on their way already. They come again, in
//! order, and never more than one window of them.

use lapin::options::{BasicGetOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, ExchangeKind};
use pgoutbox::servers::RabbitMq;

use super::{WORLD, Witness, stops};
use crate::support::consumer::{Consumer, bind, channel};
use crate::support::load::first_deliveries;
use crate::support::relay::Relay;
use crate::support::{Outbox, eventually, shared_postgres, shared_rabbitmq};

async fn outbox() -> Outbox {
    Outbox::create(shared_postgres(), shared_rabbitmq()).await
}

async fn declare(channel: &Channel, exchange: &str, kind: ExchangeKind) {
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    channel.exchange_declare(exchange.into(), kind, durable, FieldTable::default()).await.unwrap();
}

fn passive() -> QueueDeclareOptions {
    QueueDeclareOptions { passive: true, ..Default::default() }
}

/// Waits until the relay is not ready for this reason.
async fn not_ready(relay: &Relay, reason: &str) {
    eventually(reason, || async {
        let (code, reasons) = relay.get("/readyz");
        code == 503 && reasons.contains(reason)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exchange_that_nobody_declared_is_waited_for() {
    let rabbitmq = RabbitMq::start().unwrap();
    let outbox = Outbox::create(shared_postgres(), &rabbitmq).await;
    let relay = Relay::start_with(&outbox, &[("rabbitmq.declare", "false")]);
    not_ready(&relay, &format!("exchange {} does not exist", outbox.name)).await;
    assert!(relay.log().contains("rabbitmq.declare = true"), "{}", relay.log());
    let (_connection, channel) = channel(&outbox.amqp).await;
    assert!(
        channel
            .exchange_declare(
                outbox.name.as_str().into(),
                ExchangeKind::Topic,
                ExchangeDeclareOptions { passive: true, ..Default::default() },
                FieldTable::default()
            )
            .await
            .is_err(),
        "the relay declared it"
    );
    let id = outbox.insert("placed").await;
    let consumer = Consumer::start(&outbox).await;
    assert_eq!(consumer.wait_distinct(1).await[0].id, id);
    relay.ready().await;
    let sessions = relay.metric("pgoutbox_sessions_total{end=\"broker\"}");
    assert_eq!(relay.stop(), 0);
    assert!(sessions >= 1.0, "{sessions}");
    // Who waits for days warns of nothing there: each look has said goodbye.
    let ends = || {
        let is_ours = |line: &&str| line.contains("closing AMQP connection") && line.contains("- pgoutbox");
        rabbitmq.log().lines().filter(is_ours).map(str::to_owned).collect::<Vec<_>>()
    };
    eventually("the broker has seen the ends", || async { ends().len() > sessions as usize }).await;
    assert!(ends().iter().all(|line| line.contains("[info]")), "{:#?}", ends());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exchange_of_another_type_stops_the_relay_unless_it_is_taken_as_it_is() {
    let outbox = outbox().await;
    let (_connection, channel) = channel(&outbox.amqp).await;
    declare(&channel, &outbox.name, ExchangeKind::Fanout).await;
    let problem = format!("exchange {} exists and is not a durable topic exchange", outbox.name);
    stops(&outbox, WORLD, &[&problem, "rabbitmq.declare = false"]).await;
    let queue = format!("{}_fanout", outbox.name);
    channel.queue_declare(queue.as_str().into(), QueueDeclareOptions::default(), FieldTable::default()).await.unwrap();
    let (exchange, key) = (outbox.name.as_str().into(), "".into());
    let options = QueueBindOptions::default();
    channel.queue_bind(queue.as_str().into(), exchange, key, options, FieldTable::default()).await.unwrap();
    let relay = Relay::start_with(&outbox, &[("rabbitmq.declare", "false")]);
    outbox.insert("placed").await;
    eventually("the remedy works", || async {
        channel.basic_get(queue.as_str().into(), BasicGetOptions { no_ack: true }).await.unwrap().is_some()
    })
    .await;
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_amqp_password_is_waited_for_without_being_told() {
    let mut outbox = outbox().await;
    outbox.amqp = outbox.amqp.replace("guest:guest", "guest:canary-4711");
    let relay = Relay::start(&outbox);
    not_ready(&relay, "ACCESS_REFUSED").await;
    let log = relay.log();
    assert!(log.contains("check user, password, vhost and permissions of rabbitmq.url"), "{log}");
    assert!(!(log + &relay.get("/readyz").1 + &relay.get("/").1).contains("canary"));
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unroutable_message_holds_the_slot_until_a_queue_is_bound() {
    const WINDOW: usize = 20;
    let outbox = outbox().await;
    let witness = Witness::of(&outbox).await;
    let queue = format!("{}_classic", outbox.name);
    bind(&outbox, &queue, "order.placed").await;
    outbox.insert("placed").await;
    let placed = witness.last_commit().await;
    outbox.insert("lonely").await;
    let lonely = witness.last_commit().await;
    for _ in 0..100 {
        outbox.insert("placed").await;
    }
    let relay = Relay::start_with(&outbox, &[("rabbitmq.window_messages", &WINDOW.to_string())]);
    not_ready(&relay, "order.lonely").await;
    let refused = || relay.metric("pgoutbox_refused_total{reason=\"unroutable\"}");
    eventually("it is tried again", || async { refused() >= 3.0 }).await;
    assert!(relay.log().contains("no queue is bound to exchange"), "{}", relay.log());
    assert_eq!(relay.metric("pgoutbox_ready"), 0.0);
    // What was settled before it is told, though no session lives long; the refused one is not.
    eventually("the slot passes what came before", || async { outbox.confirmed().await >= placed }).await;
    assert!(outbox.confirmed().await < lonely, "the slot was moved past a refused message");
    // The remedy; the consumer's own binding takes everything.
    let consumer = Consumer::start(&outbox).await;
    let received = consumer.wait_distinct(102).await;
    let keys: Vec<_> = first_deliveries(&received).iter().map(|received| received.position).collect();
    // What was behind the refused message came before it, once: the order holds from the refused one on.
    let index = received.iter().position(|received| received.routing_key == "order.lonely").unwrap();
    assert!(received[index..].windows(2).all(|pair| pair[0].position < pair[1].position), "{keys:?}");
    assert_eq!(received.len() - index, 101, "everything from the refused message on comes in order");
    assert!(received.len() - 102 <= WINDOW, "{} duplicates of a window of {WINDOW}", received.len() - 102);
    relay.ready().await;
    outbox.wait_confirmed(witness.last_commit().await).await;
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nacked_message_holds_the_slot_until_the_queue_has_room() {
    let outbox = outbox().await;
    let witness = Witness::of(&outbox).await;
    let (_connection, channel) = channel(&outbox.amqp).await;
    declare(&channel, &outbox.name, ExchangeKind::Topic).await;
    let queue = format!("{}_small", outbox.name);
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    channel.queue_declare(queue.as_str().into(), QueueDeclareOptions::default(), arguments).await.unwrap();
    let (exchange, options) = (outbox.name.as_str().into(), QueueBindOptions::default());
    channel.queue_bind(queue.as_str().into(), exchange, "#".into(), options, FieldTable::default()).await.unwrap();
    outbox.insert("first").await;
    outbox.insert("second").await;
    let second = witness.last_commit().await;
    let relay = Relay::start(&outbox);
    not_ready(&relay, "nacked").await;
    assert!(relay.metric("pgoutbox_refused_total{reason=\"nacked\"}") >= 1.0);
    assert!(outbox.confirmed().await < second, "the slot was moved past a refused message");
    // The remedy: somebody consumes. What was confirmed in one run with a refused message comes again, in order.
    let mut keys = Vec::new();
    while keys.last().is_none_or(|key| key != "order.second") {
        let options = BasicGetOptions { no_ack: true };
        match channel.basic_get(queue.as_str().into(), options).await.unwrap() {
            Some(message) => keys.push(message.routing_key.to_string()),
            None => {
                eventually("the next message comes", || async {
                    let queue =
                        channel.queue_declare(queue.as_str().into(), passive(), FieldTable::default()).await.unwrap();
                    queue.message_count() > 0
                })
                .await
            }
        }
    }
    assert!(keys.iter().rev().skip(1).all(|key| key == "order.first"), "{keys:?}");
    outbox.wait_confirmed(second).await;
    relay.ready().await;
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_alarm_of_the_broker_holds_everything_and_loses_nothing() {
    let rabbitmq = RabbitMq::start().unwrap();
    let outbox = Outbox::create(shared_postgres(), &rabbitmq).await;
    let consumer = Consumer::start(&outbox).await;
    let relay = Relay::start(&outbox);
    relay.ready().await;
    rabbitmq.ctl(&["set_vm_memory_high_watermark", "0.000001"]).unwrap();
    // The broker says so to those who publish.
    for _ in 0..10 {
        outbox.insert("placed").await;
    }
    not_ready(&relay, "the broker blocks publishers").await;
    assert_eq!(relay.metric("pgoutbox_broker_blocked"), 1.0);
    rabbitmq.ctl(&["set_vm_memory_high_watermark", "absolute", "1GB"]).unwrap();
    consumer.wait_distinct(10).await;
    relay.ready().await;
    assert_eq!(relay.metric("pgoutbox_broker_blocked"), 0.0);
    outbox.wait_confirmed(outbox.current().await).await;
    assert_eq!(relay.stop(), 0);
}
