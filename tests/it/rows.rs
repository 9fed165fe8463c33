//! What becomes of rows: each arrives as it was written, and as often as it was committed.
//!
//! The trap: a comparison in the test's own words repeats the program's mistakes. What must arrive is what SQL says.

mod content;
mod transactions;

use crate::support::consumer::{Consumer, Received};
use crate::support::relay::Relay;
use crate::support::{Outbox, shared_postgres, shared_rabbitmq};

/// An outbox whose table is made by `table`, a consumer, and a relay that streams.
struct Stage {
    outbox: Outbox,
    consumer: Consumer,
    relay: Relay,
}

impl Stage {
    async fn set() -> Self {
        Self::of(Outbox::create(shared_postgres(), shared_rabbitmq()).await, &[]).await
    }

    /// With a table of one's own, published as `with`.
    async fn with_table(table: &str, with: &str, settings: &[(&str, &str)]) -> Self {
        let outbox = Outbox::empty(shared_postgres(), shared_rabbitmq()).await;
        outbox.sql(table).await;
        outbox.sql(&format!("create publication pgoutbox for table outbox with ({with})")).await;
        outbox.create_slot().await;
        Self::of(outbox, settings).await
    }

    async fn of(outbox: Outbox, settings: &[(&str, &str)]) -> Self {
        let consumer = Consumer::start(&outbox).await;
        let relay = Relay::start_with(&outbox, settings);
        relay.ready().await;
        Self { outbox, consumer, relay }
    }

    /// Waits until so many came and the slot has followed; nothing came twice, and nothing else came.
    async fn received(&self, count: usize) -> Vec<Received> {
        let received = self.consumer.wait_distinct(count).await;
        self.outbox.wait_confirmed(self.outbox.current().await).await;
        assert_eq!(self.consumer.count(), count, "{:?}", self.kinds());
        received
    }

    /// The types that came, in order.
    fn kinds(&self) -> Vec<String> {
        let received = self.consumer.received();
        received.iter().map(|received| received.routing_key.split_once('.').unwrap().1.to_owned()).collect()
    }

    fn stop(self) {
        assert_eq!(self.relay.stop(), 0);
    }
}
