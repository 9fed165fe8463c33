//! The rooms, one after the other, each with nothing but what it needs.

use std::collections::VecDeque;
use std::future::Future;
use std::hint::black_box;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use pgoutbox::lsn::Lsn;
use pgoutbox::metrics::Metrics;
use pgoutbox::outbox::mapping::Transaction;
use pgoutbox::outbox::{Assembler, Item, Message, Tables};
use pgoutbox::pg::pgoutput::{self, Message as Change};
use pgoutbox::pg::replication::{Event, Identity, Status};
use pgoutbox::relay::{Broker, Database, Error, Opened, Progress, Settings, Source};
use pgoutbox::sink::rabbitmq::{Address, Files};
use pgoutbox::sink::{self, RabbitMq, Receipt, Sink, rabbitmq, stdout};
use pgoutbox::{pg, relay};
use tokio::sync::watch;

use crate::stream::{Rows, mapping, tables};
use crate::{Cost, broker, measured};

/// As the relay makes them.
const RUN_MESSAGES: usize = 256;

pub(crate) fn decode(rows: &Rows) -> Cost {
    measured(|| {
        for change in &rows.changes {
            black_box(pgoutput::decode(change).unwrap());
        }
    })
}

pub(crate) fn assemble(rows: &Rows) -> Cost {
    let mut assembler = Assembler::new(mapping(), tables());
    measured(|| {
        for change in &rows.changes {
            black_box(assembler.change(change).unwrap());
        }
    })
}

pub(crate) fn map(rows: &Rows) -> Cost {
    let Change::Relation(relation) = pgoutput::decode(&rows.changes[0]).unwrap() else { panic!("no relation") };
    let mut layout = mapping().layout(&relation.columns).unwrap();
    // One tuple, again and again: decoding is another room's.
    let Change::Insert(insert) = pgoutput::decode(&rows.changes[2]).unwrap() else { panic!("no insert") };
    let transaction = Transaction::new(rows.end, 800_000_000_000_000);
    measured(|| {
        for seq in 0..rows.count {
            black_box(layout.message(&insert.tuple, &transaction, seq).unwrap());
        }
    })
}

pub(crate) fn print(rows: &Rows) -> Cost {
    let messages = messages(rows);
    let mut line = Vec::new();
    measured(|| {
        for message in &messages {
            line.clear();
            stdout::line(message, &mut line);
            black_box(&line);
        }
    })
}

fn messages(rows: &Rows) -> Vec<Message> {
    let mut assembler = Assembler::new(mapping(), tables());
    let items = rows.changes.iter().map(|change| assembler.change(change).unwrap());
    let message = |item| if let Some(Item::Message(_, message)) = item { Some(message) } else { None };
    items.filter_map(message).collect()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Encoding, the socket, the ledger: four runs are in flight, as with a window of 1000.
pub(crate) fn publish(rows: &Rows) -> Cost {
    const RUNS_IN_FLIGHT: usize = 4;
    static PORT: LazyLock<u16> = LazyLock::new(broker::start);
    let mut messages = messages(rows).into_iter();
    let runtime = runtime();
    let settings = rabbitmq::Settings {
        addresses: Address::parse_all(&format!("amqp://127.0.0.1:{}", *PORT), &Files::default()).unwrap(),
        exchange: "bench".to_owned(),
        declare: true,
        queues: Vec::new(),
        message_bytes_max: 0,
    };
    let mut sink = runtime.block_on(RabbitMq::open(&settings, Arc::new(Metrics::new()))).unwrap();
    let took = measured(|| {
        runtime.block_on(async {
            let mut receipts: VecDeque<Receipt> = VecDeque::new();
            loop {
                let run: Vec<Message> = messages.by_ref().take(RUN_MESSAGES).collect();
                if run.is_empty() {
                    break;
                }
                receipts.push_back(sink.publish(run).await.unwrap());
                if receipts.len() >= RUNS_IN_FLIGHT {
                    receipts.pop_front().unwrap().await.unwrap();
                }
            }
            for receipt in receipts {
                receipt.await.unwrap();
            }
        });
    });
    runtime.block_on(sink.close());
    took
}

/// Reader, assembler, publisher, settler; between a stream from memory and a sink that holds everything at once.
pub(crate) fn relay(rows: &Rows) -> Cost {
    let (stop, stopped) = watch::channel(false);
    let changes = rows.changes.clone().into_iter().map(Event::Data).collect();
    let database = Memory { changes: Some(changes) };
    let broker = Nothing { left: rows.count, stop: Arc::new(stop) };
    let settings = Settings {
        window_messages: 1000,
        window_messages_min: 1000,
        window_bytes: 64 << 20,
        confirm_timeout: Duration::from_secs(30),
        drain_timeout: Duration::from_secs(30),
        give_up_after: None,
    };
    let (mapping, metrics, runtime) = (mapping(), Arc::new(Metrics::new()), runtime());
    measured(|| {
        let run = relay::run(database, broker, &mapping, &settings, &metrics, stopped);
        runtime.block_on(run).unwrap();
    })
}

/// A database that has a stream once.
struct Memory {
    changes: Option<VecDeque<Event>>,
}

impl Database for Memory {
    type Source = Changes;

    async fn open(&mut self, _progress: &mut Progress) -> Result<Opened<Changes>, Error> {
        Ok(Opened {
            source: Changes(self.changes.take().expect("one session is enough")),
            watch: Box::pin(std::future::pending()),
            tables: tables(),
            identity: Identity { system: "1".to_owned(), timeline: 1 },
            start: Lsn::new(1),
            silence_max: Duration::from_secs(60),
        })
    }

    async fn survey(&mut self) {}
}

struct Changes(VecDeque<Event>);

impl Source for Changes {
    async fn next(&mut self) -> Result<Event, pg::Error> {
        match self.0.pop_front() {
            Some(event) => Ok(event),
            None => std::future::pending().await,
        }
    }

    fn tell(&mut self, _status: Status) -> impl Future<Output = Result<(), pg::Error>> + Send {
        std::future::ready(Ok(()))
    }

    fn tables(&mut self, _xid: u32) -> impl Future<Output = Result<(Tables, bool), pg::Error>> + Send {
        std::future::ready(Ok((tables(), true)))
    }

    fn finish(self, _status: Status) -> impl Future<Output = Result<(), pg::Error>> + Send {
        std::future::ready(Ok(()))
    }
}

/// A broker, and its sink, that says stop when it has seen all.
#[derive(Clone)]
struct Nothing {
    left: u64,
    stop: Arc<watch::Sender<bool>>,
}

impl Broker for Nothing {
    type Sink = Nothing;

    async fn open(&mut self) -> Result<Nothing, sink::Error> {
        Ok(self.clone())
    }
}

impl Sink for Nothing {
    async fn publish(&mut self, run: Vec<Message>) -> Result<Receipt, sink::Error> {
        self.left -= run.len() as u64;
        black_box(run);
        if self.left == 0 {
            self.stop.send_replace(true);
        }
        Ok(Receipt::new(std::future::ready(Ok(()))))
    }

    async fn failed(&mut self) -> sink::Error {
        std::future::pending().await
    }

    async fn check(&mut self) -> Result<(), sink::Error> {
        Ok(())
    }
}
