//! A service that receives: a durable queue, read with manual acknowledgement, again after every loss of the broker.
//!
//! The trap: with automatic acknowledgement the broker forgets a message when it has written it to the socket, and its
//! restart would lose messages *behind* the relay. A consumer that may not lose acknowledges after its work.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::message::Delivery as Received;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, ExchangeDeclareOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, ConnectionProperties, ExchangeKind};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::tally::Delivery;
use super::text::now_us;
use super::{Tally, locked};
use crate::error::Error;

/// The default of `rabbitmq.exchange`.
const EXCHANGE: &str = "outbox";
const RECONNECT_EVERY: Duration = Duration::from_millis(200);
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// Unacknowledged at a time.
const PREFETCH: u16 = 200;

pub(super) struct Service {
    /// Also its queue.
    pub(super) name: &'static str,
    pub(super) binding: &'static str,
}

pub(super) const SERVICES: [Service; 2] =
    [Service { name: "billing", binding: "order.#" }, Service { name: "mailing", binding: "user.#" }];

/// Declares the exchange as the relay does, and both queues on it: a message that no queue takes is refused, by design.
pub(super) async fn declare(url: &str) -> Result<(), Error> {
    let declared = async {
        let connection = Connection::connect(url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        channel.exchange_declare(EXCHANGE.into(), ExchangeKind::Topic, durable, FieldTable::default()).await?;
        for Service { name, binding } in SERVICES {
            channel.queue_declare(name.into(), QueueDeclareOptions::durable(), FieldTable::default()).await?;
            let (exchange, options) = (EXCHANGE.into(), QueueBindOptions::default());
            channel.queue_bind(name.into(), exchange, binding.into(), options, FieldTable::default()).await?;
        }
        connection.close(200, "declared".into()).await
    };
    let failed = |error: lapin::Error| Error::Demo(format!("cannot declare the consumers' queues: {error}"));
    declared.await.map_err(failed)
}

/// Returns when no message is ready in any queue: what a consumer has yet to see it was pushed by now.
pub(super) async fn until_empty(url: &str) -> Result<(), lapin::Error> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    for Service { name, .. } in SERVICES {
        let look = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        while channel.queue_declare(name.into(), look, FieldTable::default()).await?.message_count() > 0 {
            sleep(RECONNECT_EVERY).await;
        }
    }
    Ok(())
}

/// Without the guard that `wait_for` returns: it may not live across an await.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

impl Service {
    /// Until `stop`.
    pub(super) async fn consume(&'static self, url: String, tally: Arc<Mutex<Tally>>, mut stop: watch::Receiver<bool>) {
        while self.session(&url, &tally, &mut stop).await.is_err() {
            // Not with the session: while the broker is away, this is all a consumer can do.
            if *stop.borrow() {
                return;
            }
            sleep(RECONNECT_EVERY).await;
        }
    }

    async fn session(
        &self,
        url: &str,
        tally: &Mutex<Tally>,
        stop: &mut watch::Receiver<bool>,
    ) -> Result<(), lapin::Error> {
        let opening = async {
            let connection = Connection::connect(url, ConnectionProperties::default()).await?;
            let channel = connection.create_channel().await?;
            channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
            Ok::<_, lapin::Error>((connection, channel))
        };
        let late = |_| lapin::Error::from(std::io::Error::from(std::io::ErrorKind::TimedOut));
        // The connection lives as long as this binding.
        let (_connection, channel) = timeout(CONNECT_WITHIN, opening).await.map_err(late)??;
        let options = BasicConsumeOptions::default();
        let mut stream =
            channel.basic_consume(self.name.into(), self.name.into(), options, FieldTable::default()).await?;
        let mut stopping = false;
        loop {
            // Both arms are cancel-safe. The stop comes first, or a full queue would keep it from being heard.
            tokio::select! {
                biased;
                () = stopped(stop), if !stopping => {
                    // What was pushed before is still in the stream, which ends behind it.
                    channel.basic_cancel(self.name.into(), BasicCancelOptions::default()).await?;
                    stopping = true;
                }
                received = stream.next() => match received {
                    Some(received) => self.take(received?, tally).await?,
                    None if stopping => return Ok(()),
                    None => return Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset).into()),
                },
            }
        }
    }

    async fn take(&self, received: Received, tally: &Mutex<Tally>) -> Result<(), lapin::Error> {
        match self.delivery(&received) {
            Ok(delivery) => locked(tally).receive(delivery),
            Err(problem) => locked(tally).malformed(self.name, &problem),
        }
        received.ack(BasicAckOptions::default()).await.map(|_| ())
    }

    fn delivery(&self, received: &Received) -> Result<Delivery, String> {
        let received_us = now_us();
        let header = |name: &str| {
            let headers = received.properties.headers().as_ref();
            headers.and_then(|headers| headers.inner().get(name)).ok_or(format!("no header {name}"))
        };
        let lsn = match header("x-outbox-lsn")? {
            AMQPValue::LongString(text) => text.to_string().parse().map_err(|error| format!("{error}"))?,
            other => return Err(format!("x-outbox-lsn is {other:?}")),
        };
        let seq = match header("x-outbox-seq")? {
            AMQPValue::LongLongInt(seq) => u64::try_from(*seq).map_err(|error| error.to_string())?,
            other => return Err(format!("x-outbox-seq is {other:?}")),
        };
        let id = received.properties.message_id().as_ref().ok_or("no message_id")?.to_string();
        let mut payload: serde_json::Value = serde_json::from_slice(&received.data).map_err(|e| e.to_string())?;
        let number = |name: &str| payload.get(name).and_then(serde_json::Value::as_u64).unwrap_or_default();
        let (written_us, number) = (number("written_us"), number("number"));
        if let Some(fields) = payload.as_object_mut() {
            fields.remove("written_us");
        }
        Ok(Delivery {
            queue: self.name,
            routing_key: received.routing_key.to_string(),
            id,
            position: (lsn, seq),
            number,
            written_us,
            received_us,
            payload: payload.to_string(),
        })
    }
}
