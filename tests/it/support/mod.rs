//! What the tests against real servers need: servers, an outbox of one's own, the relay as a process, a consumer.
//!
//! The traps. A test that skips itself when a server is missing passes for ever: a missing server fails here, with the
//! remedy. And servers are dear: tests that break nothing share one of each, with a database, slot and exchange of their own.

pub(crate) mod address;
pub(crate) mod consumer;
pub(crate) mod failover;
pub(crate) mod links;
pub(crate) mod load;
pub(crate) mod names;
pub(crate) mod relay;
pub(crate) mod volume;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pgoutbox::lsn::Lsn;
use pgoutbox::servers::{Postgres, RabbitMq};
use tokio_postgres::{Client, NoTls};

/// Longer than anything here takes on a busy machine; a hang fails, it does not last.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// The versions that the relay supports. 15 is Debian's, the others are unpacked.
pub(crate) const POSTGRES_VERSIONS: [u32; 5] = [14, 15, 16, 17, 18];

/// The directory of this version's programs, for `Postgres::start_from`.
pub(crate) fn postgres_bin(version: u32) -> PathBuf {
    let unpacked = format!("target/servers/postgresql-{version}/native/bin");
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join(unpacked);
    let debian = PathBuf::from(format!("/usr/lib/postgresql/{version}/bin"));
    let found = [&unpacked, &debian].into_iter().find(|bin| bin.join("postgres").is_file());
    let missing =
        || panic!("{} is missing: run `make test`, or scripts/install-postgres-versions once", unpacked.display());
    found.unwrap_or_else(missing).clone()
}

/// The directory of PostgreSQL 18's programs.
pub(crate) fn postgres_18() -> PathBuf {
    postgres_bin(18)
}

/// The root of RabbitMQ 4.0, for `RabbitMq::start_from`.
pub(crate) fn rabbitmq_4() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/servers/rabbitmq-4.0");
    let missing = "is missing: run `make test`, or scripts/install-rabbitmq-4 once";
    assert!(root.join("installed").is_file(), "{} {missing}", root.display());
    root
}

/// Every test leaves a slot or two behind.
const FOR_MANY: [(&str, &str); 3] =
    [("max_connections", "200"), ("max_replication_slots", "300"), ("max_wal_senders", "100")];

/// One PostgreSQL for all tests that do not stop it. Its keeper removes it when the test process ends.
pub(crate) fn shared_postgres() -> &'static Postgres {
    static SERVER: OnceLock<Postgres> = OnceLock::new();
    SERVER.get_or_init(|| Postgres::start(&FOR_MANY).unwrap())
}

/// One PostgreSQL 18 for all tests that do not stop it.
pub(crate) fn shared_postgres_18() -> &'static Postgres {
    static SERVER: OnceLock<Postgres> = OnceLock::new();
    SERVER.get_or_init(|| Postgres::start_from(&postgres_18(), &FOR_MANY).unwrap())
}

/// One RabbitMQ for all tests that do not stop or block it.
pub(crate) fn shared_rabbitmq() -> &'static RabbitMq {
    static SERVER: OnceLock<RabbitMq> = OnceLock::new();
    SERVER.get_or_init(|| RabbitMq::start().unwrap())
}

/// A name that no other test has: for databases, slots, exchanges.
pub(crate) fn unique(prefix: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{prefix}_{}", COUNT.fetch_add(1, Ordering::Relaxed))
}

/// An SQL connection.
pub(crate) async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Waits for the condition.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let began = Instant::now();
    while !condition().await {
        assert!(began.elapsed() < PATIENCE, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A database with an outbox, and the names that its relay uses.
pub(crate) struct Outbox {
    pub(crate) url: String,
    pub(crate) amqp: String,
    /// Of the database, the slot and the exchange.
    pub(crate) name: String,
    pub(crate) client: Client,
}

/// The outbox of the contract, a publication and a slot.
pub(crate) const TABLE: &str = include_str!("../../../sql/table.sql");

impl Outbox {
    /// Database, table, publication and slot, made by hand: `init` has tests of its own.
    pub(crate) async fn create(postgres: &Postgres, rabbitmq: &RabbitMq) -> Self {
        Self::create_for(postgres, rabbitmq.url()).await
    }

    /// For a broker at this URL.
    pub(crate) async fn create_for(postgres: &Postgres, amqp: String) -> Self {
        let outbox = Self::empty_for(postgres, amqp, "").await;
        outbox.furnish().await;
        outbox
    }

    /// In a database made with these options of `create database`.
    pub(crate) async fn create_in(options: &str, postgres: &Postgres, rabbitmq: &RabbitMq) -> Self {
        let outbox = Self::empty_in(options, postgres, rabbitmq).await;
        outbox.furnish().await;
        outbox
    }

    async fn furnish(&self) {
        self.sql(&TABLE.replace("{table}", "public.outbox")).await;
        self.sql("create publication pgoutbox for table outbox with (publish = 'insert')").await;
        self.create_slot().await;
    }

    /// A database with nothing in it.
    pub(crate) async fn empty(postgres: &Postgres, rabbitmq: &RabbitMq) -> Self {
        Self::empty_in("", postgres, rabbitmq).await
    }

    /// A database with nothing in it, made with these options of `create database`.
    pub(crate) async fn empty_in(options: &str, postgres: &Postgres, rabbitmq: &RabbitMq) -> Self {
        Self::empty_for(postgres, rabbitmq.url(), options).await
    }

    async fn empty_for(postgres: &Postgres, amqp: String, options: &str) -> Self {
        let name = unique("t");
        connect(&postgres.url()).await.batch_execute(&format!("create database {name} {options}")).await.unwrap();
        let url = postgres.url_for("postgres", None, &name);
        Self { client: connect(&url).await, url, amqp, name }
    }

    pub(crate) async fn create_slot(&self) {
        self.sql(&format!("select pg_create_logical_replication_slot('{}', 'pgoutput')", self.name)).await;
    }

    pub(crate) async fn sql(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    pub(crate) async fn text(&self, sql: &str) -> Option<String> {
        let messages = self.client.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        messages.iter().find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        })
    }

    /// Inserts one row of the given type and returns its id.
    pub(crate) async fn insert(&self, kind: &str) -> String {
        let sql = format!(
            "insert into outbox (aggregatetype, aggregateid, type, payload) \
             values ('order', '1', '{kind}', '{{\"a\": 1}}') returning id"
        );
        self.text(&sql).await.unwrap()
    }

    pub(crate) async fn confirmed(&self) -> Lsn {
        let sql = format!("select confirmed_flush_lsn from pg_replication_slots where slot_name = '{}'", self.name);
        self.text(&sql).await.unwrap().parse().unwrap()
    }

    pub(crate) async fn current(&self) -> Lsn {
        self.text("select pg_current_wal_flush_lsn()").await.unwrap().parse().unwrap()
    }

    /// Waits until the slot stands at or beyond this position.
    pub(crate) async fn wait_confirmed(&self, lsn: Lsn) {
        eventually("the slot follows", || async { self.confirmed().await >= lsn }).await;
    }
}
