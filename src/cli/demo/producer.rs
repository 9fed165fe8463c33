//! A service that writes: its business row and its outbox row in one transaction, or neither.
//!
//! The trap: the numbers count attempts, not commits. A service that gave a number of a rolled back row again would hide
//! a phantom message behind a committed one.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tokio_postgres::{Client, NoTls};

use super::text::now_us;
use super::{Tally, locked};

/// A modest rate, so that a laptop shows the relay's latency and not its own disk's queue.
const TRANSACTION_EVERY: Duration = Duration::from_millis(10);
const ROLLED_BACK_SHARE: f64 = 0.2;
const SEVERAL_ROWS_SHARE: f64 = 0.2;
const ROWS_MAX: u64 = 5;

const OUTBOX: &str =
    "insert into outbox (aggregatetype, aggregateid, type, payload) values ($1, $2, $3, $4::text::jsonb)";

pub(super) struct Service {
    /// Also its table.
    pub(super) name: &'static str,
    aggregatetype: &'static str,
    types: [&'static str; 2],
    create: &'static str,
    insert: &'static str,
    about: (&'static str, [&'static str; 4]),
}

pub(super) const SERVICES: [Service; 2] = [
    Service {
        name: "orders",
        aggregatetype: "order",
        types: ["placed", "cancelled"],
        create: "create table orders (id bigint primary key, item text not null)",
        insert: "insert into orders (id, item) values ($1, $2)",
        about: ("item", ["tea", "ink", "paper", "lamp"]),
    },
    Service {
        name: "users",
        aggregatetype: "user",
        types: ["registered", "renamed"],
        create: "create table users (id bigint primary key, name text not null)",
        insert: "insert into users (id, name) values ($1, $2)",
        about: ("name", ["Ada", "Edsger", "Grace", "Leslie"]),
    },
];

impl Service {
    pub(super) async fn open(&'static self, url: &str) -> Result<Client, tokio_postgres::Error> {
        let client = connect(url).await?;
        client.batch_execute(self.create).await?;
        Ok(client)
    }

    /// Until `stop`; what is under way is finished first, so that the count is the truth.
    pub(super) async fn produce(
        &'static self,
        mut client: Client,
        tally: Arc<Mutex<Tally>>,
        stop: watch::Receiver<bool>,
    ) -> Result<(), tokio_postgres::Error> {
        let mut ticks = interval(TRANSACTION_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut number = 0;
        while !*stop.borrow() {
            ticks.tick().await;
            let rows = if fastrand::f64() < SEVERAL_ROWS_SHARE { fastrand::u64(2..=ROWS_MAX) } else { 1 };
            let transaction = client.transaction().await?;
            for _ in 0..rows {
                number += 1;
                self.write(&transaction, number).await?;
            }
            if fastrand::f64() < ROLLED_BACK_SHARE {
                transaction.rollback().await?;
                locked(&tally).roll_back(rows);
            } else {
                transaction.commit().await?;
                locked(&tally).commit(rows);
            }
        }
        Ok(())
    }

    async fn write(
        &self,
        transaction: &tokio_postgres::Transaction<'_>,
        number: i64,
    ) -> Result<(), tokio_postgres::Error> {
        let (field, values) = self.about;
        let value = fastrand::choice(values).unwrap_or_default();
        let kind = fastrand::choice(self.types).unwrap_or_default();
        transaction.execute(self.insert, &[&number, &value]).await?;
        let payload = serde_json::json!({ "number": number, field: value, "written_us": now_us() }).to_string();
        transaction.execute(OUTBOX, &[&self.aggregatetype, &number.to_string(), &kind, &payload]).await?;
        Ok(())
    }
}

/// What Postgres itself says was committed: the ids in the outbox, and the number of business rows.
pub(super) async fn truth(url: &str) -> Result<(HashSet<String>, u64), tokio_postgres::Error> {
    let client = connect(url).await?;
    let ids = client.query("select id::text from outbox", &[]).await?;
    let ids = ids.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    let count = "select (select count(*) from orders) + (select count(*) from users)";
    let rows: i64 = client.query_one(count, &[]).await?.try_get(0)?;
    Ok((ids, u64::try_from(rows).unwrap_or_default()))
}

async fn connect(url: &str) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    // Its end reaches the client as an error of the next statement.
    tokio::spawn(connection);
    Ok(client)
}
