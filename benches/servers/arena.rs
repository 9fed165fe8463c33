//! The two servers, as every part finds them.
//!
//! The trap: a server that does its housekeeping in the middle of a measurement. Checkpoints are made when a load is
//! written, before anything is measured, and nothing vacuums.

use std::time::{Duration, Instant};

use pgoutbox::lsn::Lsn;
use pgoutbox::servers::{Postgres, RabbitMq};
use tokio::runtime::Runtime;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::bare::amqp::{self, short};

/// Database of the outbox; its own is the pollers', whose table would be in the outbox' WAL.
pub(crate) const DATABASE: &str = "bench";
pub(crate) const POLLED: &str = "polled";

/// What RabbitMQ may use. Some hundred queues that were filled and deleted leave it with more than the tests' gigabyte, and
/// then it blocks whoever comes next, for minutes.
const MEMORY: &str = "6GB";

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);

const SETTINGS: [(&str, &str); 8] = [
    ("max_replication_slots", "100"),
    ("max_wal_senders", "100"),
    ("wal_sender_timeout", "60s"),
    ("max_wal_size", "16GB"),
    ("min_wal_size", "1GB"),
    ("checkpoint_timeout", "1d"),
    ("autovacuum", "off"),
    ("max_connections", "100"),
];

/// A queue's kind, by RabbitMQ's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Queue {
    Classic,
    Quorum,
    Stream,
}

impl Queue {
    pub(crate) const ALL: [Queue; 3] = [Queue::Classic, Queue::Quorum, Queue::Stream];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Queue::Classic => "classic",
            Queue::Quorum => "quorum",
            Queue::Stream => "stream",
        }
    }
}

/// An SQL connection for a program without tasks.
pub(crate) struct Sql {
    runtime: Runtime,
    client: Client,
}

impl Sql {
    pub(crate) fn open(url: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = runtime.block_on(async {
            let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
            tokio::spawn(connection);
            client
        });
        Self { runtime, client }
    }

    pub(crate) fn run(&self, sql: &str) {
        let done = self.runtime.block_on(self.client.batch_execute(sql));
        done.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// The first column of the first row.
    pub(crate) fn text(&self, sql: &str) -> Option<String> {
        let messages = self.runtime.block_on(self.client.simple_query(sql));
        let messages = messages.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        })
    }
}

pub(crate) struct Arena {
    pub(crate) postgres: Postgres,
    pub(crate) rabbitmq: RabbitMq,
    /// In the outbox' database.
    pub(crate) sql: Sql,
    /// In the pollers' database.
    pub(crate) polled: Sql,
    control: amqp::Connection,
    queues: u32,
}

impl Arena {
    pub(crate) fn start() -> Self {
        let postgres = Postgres::start(&SETTINGS).unwrap_or_else(|error| panic!("{error}"));
        let rabbitmq = RabbitMq::start().unwrap_or_else(|error| panic!("{error}"));
        rabbitmq.ctl(&["set_vm_memory_high_watermark", "absolute", MEMORY]).unwrap_or_else(|error| panic!("{error}"));
        let admin = Sql::open(&postgres.url());
        for database in [DATABASE, POLLED] {
            admin.run(&format!("create database {database}"));
        }
        let connect = |database| {
            let sql = Sql::open(&postgres.url_for("postgres", None, database));
            sql.run("set synchronous_commit = off");
            sql
        };
        let (sql, polled) = (connect(DATABASE), connect(POLLED));
        let control = amqp::Connection::open(rabbitmq.port());
        Self { postgres, rabbitmq, sql, polled, control, queues: 0 }
    }

    /// A durable queue, and an exchange of the same name whose messages it gets. Of its own: a program that is killed leaves
    /// messages in sockets, which the broker still publishes when the next program runs.
    pub(crate) fn make_queue(&mut self, queue: Queue) -> String {
        self.queues += 1;
        let name = format!("{}{}", queue.name(), self.queues);
        // exchange.declare: durable, no arguments.
        self.control.ask((40, 10), &[&[0, 0], &short(&name)[..], &short("topic"), &[2, 0, 0, 0, 0]].concat());
        let kind = queue.name();
        let mut table = [&short("x-queue-type")[..], b"S"].concat();
        table.extend(u32::try_from(kind.len()).unwrap().to_be_bytes());
        table.extend(kind.as_bytes());
        let size = u32::try_from(table.len()).unwrap().to_be_bytes();
        self.control.ask((50, 10), &[&[0, 0], &short(&name)[..], &[2], &size, &table].concat());
        let binding = [&[0, 0], &short(&name)[..], &short(&name), &short("#"), &[0, 0, 0, 0, 0]].concat();
        self.control.ask((50, 20), &binding);
        name
    }

    pub(crate) fn delete_queue(&mut self, name: &str) {
        self.control.ask((50, 40), &[&[0, 0], &short(name)[..], &[0]].concat());
        self.control.ask((40, 20), &[&[0, 0], &short(name)[..], &[0]].concat());
    }

    pub(crate) fn url(&self, database: &str) -> String {
        self.postgres.url_for("postgres", None, database)
    }

    pub(crate) fn position(&self) -> Lsn {
        self.sql.text("select pg_current_wal_flush_lsn()").unwrap().parse().unwrap()
    }

    /// Slots that all begin here.
    pub(crate) fn make_slots(&self, names: &[String]) {
        let [first, others @ ..] = names else { return };
        self.sql.run(&format!("select pg_create_logical_replication_slot('{first}', 'pgoutput')"));
        for name in others {
            self.sql.run(&format!("select pg_copy_logical_replication_slot('{first}', '{name}')"));
        }
    }

    /// The process that serves the slot, if one does.
    pub(crate) fn walsender(&self, slot: &str) -> Option<i32> {
        let sql = format!("select active_pid from pg_replication_slots where slot_name = '{slot}'");
        self.sql.text(&sql).and_then(|pid| pid.parse().ok())
    }

    /// Waits until the slot stands at or beyond this position: what Postgres was told.
    pub(crate) fn wait_confirmed(&self, slot: &str, lsn: Lsn) {
        let sql = format!("select confirmed_flush_lsn from pg_replication_slots where slot_name = '{slot}'");
        let began = Instant::now();
        while self.sql.text(&sql).unwrap().parse::<Lsn>().unwrap() < lsn {
            assert!(began.elapsed() < PATIENCE, "slot {slot} does not reach {lsn}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Removes a slot whose reader is gone, or is going.
    pub(crate) fn drop_slot(&self, slot: &str) {
        let began = Instant::now();
        while self.walsender(slot).is_some() {
            assert!(began.elapsed() < PATIENCE, "slot {slot} stays in use");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.sql.run(&format!("select pg_drop_replication_slot('{slot}')"));
    }
}
