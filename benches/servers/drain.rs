//! A backlog, and a program that empties it: rate, CPU a message, memory.
//!
//! Measured from the first to the last message that the consumer sees, so starting up is not in it. Before and after, all
//! that makes the comparison fair is asserted: every row once and in order, and Postgres told that it is done.
//!
//! The trap: the first and the last message come in reads with others. What came with the first was done before the clock
//! began, and does not count.

use std::time::Duration;

use pgoutbox::lsn::Lsn;

use crate::arena::{Arena, POLLED};
use crate::consumer::{Consumer, Expectation, Log};
use crate::load::{self, Scenario};
use crate::process;
use crate::results::Values;
use crate::subject::{Program, Subject, Way};

/// CPU times of those who take part, at a moment.
struct Spent {
    subject: Duration,
    postgres: Duration,
    broker: Duration,
}

/// One program on one load.
pub(crate) struct Drain<'a> {
    pub(crate) subject: &'a Subject,
    pub(crate) scenario: &'a Scenario,
    /// Its own.
    pub(crate) slot: &'a str,
    /// Where the load ends.
    pub(crate) end: Lsn,
}

impl Drain<'_> {
    pub(crate) fn run(&self, arena: &mut Arena) -> Values {
        let (values, _) = self.run_hashed(arena, false);
        values
    }

    /// The hash is over every byte that a consumer can see.
    pub(crate) fn run_hashed(&self, arena: &mut Arena, is_hashed: bool) -> (Values, u64) {
        let polls = self.subject.polls();
        if polls {
            load::fill_polled(arena, self.scenario);
        }
        let queue = arena.make_queue(self.scenario.queue);
        let expectation = Expectation { rows: self.scenario.rows, is_ordered: true, clock: None, is_hashed };
        let consumer = Consumer::start(arena.rabbitmq.port(), self.scenario.queue, &queue, expectation);
        let program =
            self.subject.start(arena, &Way { slot: self.slot, broker: arena.rabbitmq.port(), exchange: &queue });
        let wait = |consumer: &Consumer| {
            consumer.wait().unwrap_or_else(|fault| panic!("{}: {fault}\n{}", self.subject.name(), program.log()))
        };
        wait(&consumer);
        let server = self.server(arena);
        let before = self.spent(arena, &program, server);
        wait(&consumer);
        let after = self.spent(arena, &program, server);
        if !polls {
            arena.wait_confirmed(self.slot, self.end);
        }
        let peak_kib = process::peak_kib(program.pid());
        drop(program);
        let log = consumer.stop();
        arena.delete_queue(&queue);
        if !polls {
            arena.drop_slot(self.slot);
        }
        let hash = log.hash;
        (self.values(&log, &before, &after, peak_kib), hash)
    }

    /// The walsender, or the poller's backend.
    fn server(&self, arena: &Arena) -> i32 {
        let server = if self.subject.polls() {
            let sql = format!("select pid from pg_stat_activity where application_name = '{POLLED}'");
            arena.polled.text(&sql).and_then(|pid| pid.parse().ok())
        } else {
            arena.walsender(self.slot)
        };
        server.expect("somebody serves the program")
    }

    fn spent(&self, arena: &Arena, program: &Program, server: i32) -> Spent {
        Spent {
            subject: process::cpu(program.pid()),
            postgres: process::cpu(server),
            broker: process::cpu(arena.rabbitmq.pid().expect("RabbitMQ runs")),
        }
    }

    fn values(&self, log: &Log, before: &Spent, after: &Spent, peak_kib: u64) -> Values {
        let (Some(first), Some(last)) = (log.first, log.last) else { panic!("nothing was consumed") };
        assert_eq!(last.count, self.scenario.rows, "rows came more than once");
        let rows = (last.count - first.count) as f64;
        let us_a_row = |before: Duration, after: Duration| (after.saturating_sub(before)).as_secs_f64() * 1e6 / rows;
        let seconds = (last.at - first.at).as_secs_f64();
        let tenth = |index: usize| {
            let from = if index == 0 { first.at } else { log.tenths[index - 1] };
            let count = self.scenario.rows as f64 / 10.0 - if index == 0 { first.count as f64 } else { 0.0 };
            count / (log.tenths[index] - from).as_secs_f64()
        };
        let relay = us_a_row(before.subject, after.subject);
        let postgres = us_a_row(before.postgres, after.postgres);
        let broker = us_a_row(before.broker, after.broker);
        let consumer = us_a_row(first.cpu, last.cpu);
        vec![
            ("rate", rows / seconds),
            ("relay_us", relay),
            ("postgres_us", postgres),
            ("broker_us", broker),
            ("consumer_us", consumer),
            ("all_us", relay + postgres + broker + consumer),
            ("peak_mib", peak_kib as f64 / 1024.0),
            ("last_to_first", tenth(9) / tenth(0)),
        ]
    }
}
