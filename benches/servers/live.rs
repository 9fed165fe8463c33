//! Commit to consumer at a fixed rate: rows are inserted by the clock, whatever becomes of those before.
//!
//! The trap: a sender that waits for an answer sends less when the system is slow, and measures its best moments. Here each
//! row has its time; four connections keep it, and what they could not keep is reported. And the time in the payload is
//! taken before the statement that commits is sent, so that the commit's own way to the disk is in all figures alike.
//!
//! Another one: 5,000 commits a second fill two cores by themselves, and then everything waits for the scheduler. The same
//! rate in transactions of five rows leaves room to see who relays how fast.

use std::time::{Duration, Instant};

use crate::arena::{Arena, DATABASE, POLLED, Queue, Sql};
use crate::consumer::{Consumer, Expectation};
use crate::load::{self, Scenario};
use crate::process;
use crate::rate::PAYLOAD_BYTES;
use crate::results::{Results, Values, rounds, scaled, turned};
use crate::subject::{Subject, WINDOW, Way};

const SENDERS: u64 = 4;

/// Messages a second, rows a transaction, and for how many seconds.
const RATES: [(u64, u64, u64); 4] = [(200, 1, 8), (1000, 1, 6), (5000, 1, 5), (5000, 5, 5)];

/// Rows of other sizes, at this rate.
const SIZES: [usize; 2] = [1024, 16 * 1024];
const RATE_OF_SIZES: u64 = 1000;

/// Pollers are told apart by more than their noise.
const ROUNDS_OF_POLLERS: u32 = 2;

pub(crate) fn run(arena: &mut Arena, results: &mut Results) {
    let relays: Vec<Subject> = [Subject::bare(), Subject::pgoutbox()].into_iter().chain(Subject::against()).collect();
    let pollers =
        [Duration::ZERO, Duration::from_millis(500)].map(|pause| Subject::Polling { batch: WINDOW as u64, pause });
    for (rate, each, seconds) in RATES {
        let scenario = match each {
            1 => format!("{rate} a second"),
            each => format!("{rate} a second, {each} a transaction"),
        };
        let rows = scaled_rows(rate, seconds) / each * each;
        for round in 0..rounds() {
            let mut subjects = relays.clone();
            if round < ROUNDS_OF_POLLERS {
                subjects.extend(pollers.clone());
            }
            for subject in turned(&subjects, round) {
                let live = Live { subject: &subject, rate, each, rows, bytes: PAYLOAD_BYTES };
                let values = live.run(arena);
                results.add("latency", &scenario, &subject.name(), round, values);
            }
        }
    }
    for bytes in SIZES {
        let scenario = format!("{RATE_OF_SIZES} a second, {} KB", bytes / 1024);
        for round in 0..rounds().min(ROUNDS_OF_POLLERS) {
            for subject in turned(&relays, round) {
                let rows = scaled_rows(RATE_OF_SIZES, 4);
                let live = Live { subject: &subject, rate: RATE_OF_SIZES, each: 1, rows, bytes };
                let values = live.run(arena);
                results.add("latency", &scenario, &subject.name(), round, values);
            }
        }
    }
}

/// Half of the time at least: percentiles need rows.
fn scaled_rows(rate: u64, seconds: u64) -> u64 {
    scaled(rate * seconds).max(rate * seconds / 2)
}

struct Live<'a> {
    subject: &'a Subject,
    rate: u64,
    /// Rows a transaction.
    each: u64,
    rows: u64,
    bytes: usize,
}

impl Live<'_> {
    fn run(&self, arena: &mut Arena) -> Values {
        let slot = "live";
        let polls = self.subject.polls();
        let empty = Scenario::new(Queue::Classic, 0, 1, self.bytes);
        if polls {
            load::fill_polled(arena, &empty);
        } else {
            load::make_tables(arena);
            arena.make_slots(&[slot.to_owned()]);
        }
        let queue = arena.make_queue(Queue::Classic);
        let clock = Instant::now();
        let expectation = Expectation { rows: self.rows + 1, is_ordered: false, clock: Some(clock), is_hashed: false };
        let consumer = Consumer::start(arena.rabbitmq.port(), Queue::Classic, &queue, expectation);
        let program = self.subject.start(arena, &Way { slot, broker: arena.rabbitmq.port(), exchange: &queue });
        let (database, table) = if polls { (POLLED, "polled") } else { (DATABASE, "outbox") };
        let url = arena.url(database);
        let sender = || Sender::open(&url, table, self.bytes, clock);
        let fail = |fault: String| -> ! { panic!("{}: {fault}\n{}", self.subject.name(), program.log()) };
        // One ahead: the program works, and all is connected before the clock begins.
        sender().send(self.rows + 1, 1);
        consumer.wait().unwrap_or_else(|fault| fail(fault));
        let senders: Vec<Sender> = (0..SENDERS).map(|_| sender()).collect();
        let before = process::cpu(program.pid());
        let began = Instant::now() + Duration::from_millis(10);
        let threads = senders.into_iter().zip(0..).map(|(sender, first)| {
            let (rate, each, rows) = (self.rate, self.each, self.rows);
            std::thread::spawn(move || sender.keep_time(began, rate, each, first, rows))
        });
        let threads: Vec<_> = threads.collect();
        let late: Vec<Duration> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        consumer.wait().unwrap_or_else(|fault| fail(fault));
        let seconds = began.elapsed().as_secs_f64();
        let spent = process::cpu(program.pid()) - before;
        let peak_mib = process::peak_kib(program.pid()) as f64 / 1024.0;
        drop(program);
        let log = consumer.stop();
        arena.delete_queue(&queue);
        if !polls {
            arena.drop_slot(slot);
        }
        // The first tenth warms caches.
        let mut latencies = log.latencies.get(log.latencies.len() / 10..).unwrap_or_default().to_vec();
        latencies.sort_unstable();
        let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize] as f64 / 1000.0;
        let late_us = late.iter().max().map_or(0.0, |late| late.as_secs_f64() * 1e6);
        vec![
            ("p50_us", at(0.5)),
            ("p99_us", at(0.99)),
            ("p999_us", at(0.999)),
            ("max_us", at(1.0)),
            ("relay_percent", spent.as_secs_f64() / seconds * 100.0),
            ("peak_mib", peak_mib),
            ("sender_late_max_us", late_us),
        ]
    }
}

/// A connection that inserts rows, a statement a transaction.
struct Sender {
    sql: Sql,
    clock: Instant,
}

impl Sender {
    fn open(url: &str, table: &str, bytes: usize, clock: Instant) -> Self {
        let sql = Sql::open(url);
        // Short keys first: `n`, then `t`.
        let payload = load::payload("n", bytes).replace("'total'", "'t', $3::bigint, 'total'");
        let statement = format!(
            "prepare send(bigint, bigint, bigint) as insert into {table} (aggregatetype, aggregateid, type, payload) \
             select 'order', n::text, 'placed', {payload} from generate_series($1, $1 + $2 - 1) n"
        );
        sql.run(&statement);
        Self { sql, clock }
    }

    fn send(&self, first: u64, rows: u64) {
        let sent = self.clock.elapsed().as_nanos();
        self.sql.run(&format!("execute send({first}, {rows}, {sent})"));
    }

    /// Every fourth transaction, from this one on, each at its time; how late each was.
    fn keep_time(self, began: Instant, rate: u64, each: u64, first: u64, rows: u64) -> Vec<Duration> {
        let transactions = (first..rows / each).step_by(SENDERS as usize);
        let late = |transaction| {
            let due = began + Duration::from_secs_f64((transaction * each) as f64 / rate as f64);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let late = due.elapsed();
            self.send(transaction * each + 1, each);
            late
        };
        transactions.map(late).collect()
    }
}
