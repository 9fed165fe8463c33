//! A polling relay, as teams write it who know what they do: `SKIP LOCKED`, a partial index, pipelined confirms.
//!
//! The trap: a straw man. It publishes a whole batch before it waits for the first confirm, runs on one thread, which suits
//! lapin best, and selects in the index' order.

use std::time::Duration;

use futures_util::future::join_all;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use tokio_postgres::{NoTls, Row};

const SELECT: &str = "select number, id::text, aggregatetype, aggregateid, type, payload::text from polled \
                      where published_at is null order by number limit $1 for update skip locked";
const MARK: &str = "update polled set published_at = now() where number = any($1)";

/// For ever: batches one after the other, and a rest after an empty one.
pub(crate) fn run(url: &str, broker: u16, exchange: &str, batch: u64, pause: Duration) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (mut client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
        tokio::spawn(connection);
        let amqp = format!("amqp://guest:guest@127.0.0.1:{broker}/%2f");
        let connection = Connection::connect(&amqp, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        let select = client.prepare(SELECT).await.unwrap();
        let mark = client.prepare(MARK).await.unwrap();
        let limit = i64::try_from(batch).unwrap();
        loop {
            let transaction = client.transaction().await.unwrap();
            let rows = transaction.query(&select, &[&limit]).await.unwrap();
            publish(&channel, exchange, &rows).await;
            if !rows.is_empty() {
                let numbers: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
                transaction.execute(&mark, &[&numbers]).await.unwrap();
            }
            transaction.commit().await.unwrap();
            if rows.is_empty() && !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
        }
    });
}

async fn publish(channel: &Channel, exchange: &str, rows: &[Row]) {
    // All are written before the first confirm is waited for; lapin keeps the order in which the futures are polled first.
    let sent = join_all(rows.iter().map(|row| send(channel, exchange, row))).await;
    for confirmation in join_all(sent).await {
        assert!(confirmation.unwrap().is_ack(), "the broker refused a message");
    }
}

async fn send(channel: &Channel, exchange: &str, row: &Row) -> lapin::PublisherConfirm {
    let (id, aggregatetype, aggregateid): (&str, &str, &str) = (row.get(1), row.get(2), row.get(3));
    let (kind, payload): (&str, &str) = (row.get(4), row.get(5));
    let mut headers = FieldTable::default();
    headers.insert("aggregatetype".into(), AMQPValue::LongString(aggregatetype.into()));
    headers.insert("aggregateid".into(), AMQPValue::LongString(aggregateid.into()));
    let properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_delivery_mode(2)
        .with_message_id(ShortString::from(id))
        .with_type(ShortString::from(kind))
        .with_headers(headers);
    let key = format!("{aggregatetype}.{kind}");
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    let sent = channel.basic_publish(exchange.into(), key.as_str().into(), options, payload.as_bytes(), properties);
    sent.await.unwrap()
}
