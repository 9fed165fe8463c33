//! Rows a second through relay and broker: on each kind of queue, for each size of transaction and of row, for loads that
//! are hard in their own way. And the limits: the walsender alone, the broker alone.
//!
//! The trap: a yardstick that cheats. Before anything is measured, the bare relay and pgoutbox publish the same rows, and
//! every byte that a consumer can see is compared.

use std::time::{Duration, Instant};

use crate::arena::{Arena, DATABASE, PATIENCE, Queue};
use crate::consumer::{Consumer, Expectation};
use crate::drain::Drain;
use crate::load::{self, Scenario};
use crate::process;
use crate::results::{Results, Values, rounds, scaled, turned};
use crate::subject::{Program, Subject, WINDOW};

/// Of most rows, in bytes.
pub(crate) const PAYLOAD_BYTES: usize = 220;

/// Sizes of transactions.
pub(crate) const ROWS_A_TRANSACTION: [u64; 3] = [1, 10, 1000];

/// `rate`: queues and transactions, pollers, limits.
pub(crate) fn rate(arena: &mut Arena, results: &mut Results) {
    assert_honest(arena);
    let subjects = relays();
    for rows_a_transaction in ROWS_A_TRANSACTION {
        let scenario = |queue| Scenario::new(queue, scaled(100_000), rows_a_transaction, PAYLOAD_BYTES);
        compare(arena, results, "rate", &Queue::ALL.map(scenario), &subjects, rounds());
        walsender(arena, results, &scenario(Queue::Classic));
    }
    let polled = Scenario::new(Queue::Classic, scaled(100_000), 1, PAYLOAD_BYTES);
    compare(arena, results, "rate", &[polled], &[Subject::polling(100), Subject::polling(1000)], rounds());
    for queue in Queue::ALL {
        broker(arena, results, queue);
    }
}

/// `size`: rows of 0.2, 1 and 16 KB.
pub(crate) fn size(arena: &mut Arena, results: &mut Results) {
    for (bytes, rows) in [(PAYLOAD_BYTES, 100_000), (1024, 100_000), (16 * 1024, 20_000)] {
        let scenario = Scenario::new(Queue::Classic, scaled(rows), 100, bytes);
        compare(arena, results, "size", &[scenario], &relays(), rounds());
    }
}

/// `huge`: one transaction of a million rows.
pub(crate) fn huge(arena: &mut Arena, results: &mut Results) {
    let rows = scaled(1_000_000);
    let scenario = Scenario::new(Queue::Classic, rows, rows, PAYLOAD_BYTES);
    compare(arena, results, "huge", &[scenario.named(&format!("one transaction of {rows} rows"))], &relays(), few());
}

/// `backlog`: a gigabyte of it, in rows of 16 KB.
pub(crate) fn backlog(arena: &mut Arena, results: &mut Results) {
    const ROW_BYTES: usize = 16 * 1024;
    let scenario = Scenario::new(Queue::Classic, scaled((1 << 30) / ROW_BYTES as u64), 100, ROW_BYTES);
    let mib = scenario.rows * ROW_BYTES as u64 / (1024 * 1024);
    compare(arena, results, "backlog", &[scenario.named(&format!("a backlog of {mib} MiB"))], &relays(), few());
}

/// `busy`: a database whose other tables write a hundred times as much.
pub(crate) fn busy(arena: &mut Arena, results: &mut Results) {
    let mut scenario =
        Scenario::new(Queue::Classic, scaled(20_000), 1, PAYLOAD_BYTES).named("others write 100 times as much");
    scenario.rows_of_others = 100;
    compare(arena, results, "busy", &[scenario], &relays(), few());
}

fn relays() -> Vec<Subject> {
    [Subject::bare(), Subject::pgoutbox()].into_iter().chain(Subject::against()).collect()
}

/// For what takes long.
fn few() -> u32 {
    rounds().min(3)
}

/// The subjects on each of the scenarios, which share one load.
fn compare(
    arena: &mut Arena,
    results: &mut Results,
    part: &'static str,
    scenarios: &[Scenario],
    subjects: &[Subject],
    rounds: u32,
) {
    let slot = |round: u32, scenario: usize, subject: usize| format!("s{round}_{scenario}_{subject}");
    let mut slots = Vec::new();
    for round in 0..rounds {
        for scenario in 0..scenarios.len() {
            let relays = subjects.iter().enumerate().filter(|(_, subject)| !subject.polls());
            slots.extend(relays.map(|(number, _)| slot(round, scenario, number)));
        }
    }
    let end = load::fill(arena, &scenarios[0], &slots);
    let numbered: Vec<(usize, Subject)> = subjects.iter().cloned().enumerate().collect();
    for round in 0..rounds {
        for (index, scenario) in scenarios.iter().enumerate() {
            for (number, subject) in turned(&numbered, round) {
                let slot = slot(round, index, number);
                let drain = Drain { subject: &subject, scenario, slot: &slot, end };
                let values = drain.run(arena);
                results.add(part, &scenario.name, &subject.name(), round, values);
            }
        }
    }
}

/// Bare and measured publish the same bytes, or nothing here means anything.
fn assert_honest(arena: &mut Arena) {
    let scenario = Scenario::new(Queue::Classic, 2000, 10, PAYLOAD_BYTES);
    let slots = ["bare", "pgoutbox"].map(str::to_owned);
    let end = load::fill(arena, &scenario, &slots);
    let mut published = |subject: Subject, slot| {
        let drain = Drain { subject: &subject, scenario: &scenario, slot, end };
        drain.run_hashed(arena, true).1
    };
    let hashes = [published(Subject::bare(), &slots[0]), published(Subject::pgoutbox(), &slots[1])];
    assert_eq!(hashes[0], hashes[1], "the bare relay and pgoutbox publish different bytes");
}

/// The walsender alone, and pgoutbox with its standard output thrown away.
fn walsender(arena: &mut Arena, results: &mut Results, scenario: &Scenario) {
    let name = scenario.name.replace("classic", "no broker");
    let slots: Vec<String> = (0..rounds()).flat_map(|round| [format!("d{round}"), format!("o{round}")]).collect();
    load::fill(arena, scenario, &slots);
    for round in 0..rounds() {
        for subject in turned(&["walsender alone", "pgoutbox to /dev/null"], round) {
            let values = match subject {
                "walsender alone" => drained(arena, scenario, &format!("d{round}")),
                _ => printed(arena, scenario, &format!("o{round}")),
            };
            results.add("rate", &name, subject, round, values);
        }
    }
}

fn drained(arena: &Arena, scenario: &Scenario, slot: &str) -> Values {
    let (port, rows) = (arena.postgres.port().to_string(), scenario.rows.to_string());
    let program = Program::own("drain", &[("postgres", &port), ("slot", slot), ("rows", &rows)]);
    let printed = program.printed();
    arena.drop_slot(slot);
    let (seconds, rows) = printed.trim().split_once(' ').unwrap();
    vec![("rate", rows.parse::<f64>().unwrap() / seconds.parse::<f64>().unwrap())]
}

/// By what it has written: asking its metrics would cost it more than the kernel's account does.
fn printed(arena: &Arena, scenario: &Scenario, slot: &str) -> Values {
    const LOOK_EVERY: Duration = Duration::from_millis(2);
    /// More than it says in its log, less than a hundred rows.
    const BEGUN_BYTES: u64 = 20_000;
    /// Less than a row; a wake-up inside the process counts a few bytes.
    const ROW_BYTES_MIN: u64 = 100;
    let binary = env!("CARGO_BIN_EXE_pgoutbox").into();
    let program = Program::pgoutbox(&binary, &arena.url(DATABASE), slot, &[("sink", "stdout".to_owned())]);
    let began = Instant::now();
    let (mut first, mut last): (Option<(Instant, u64, Duration)>, _) = (None, (Instant::now(), 0, Duration::ZERO));
    // All rows take more than this; afterwards it is still.
    let bytes_min = scenario.rows * scenario.payload_bytes as u64;
    while last.1 < bytes_min || last.0.elapsed() < Duration::from_millis(300) {
        assert!(began.elapsed() < PATIENCE, "it does not end\n{}", program.log());
        let written = process::written_bytes(program.pid());
        if written >= last.1 + ROW_BYTES_MIN {
            last = (Instant::now(), written, process::cpu(program.pid()));
        }
        if written > BEGUN_BYTES {
            first.get_or_insert(last);
        }
        std::thread::sleep(LOOK_EVERY);
    }
    let published = program.metric("pgoutbox_settled_total");
    assert_eq!(published, Some(scenario.rows as f64), "rows are missing");
    let peak_mib = process::peak_kib(program.pid()) as f64 / 1024.0;
    drop(program);
    arena.drop_slot(slot);
    let first = first.expect("it wrote more than that");
    let row_bytes = last.1 as f64 / scenario.rows as f64;
    let rows = (last.1 - first.1) as f64 / row_bytes;
    let relay_us = (last.2 - first.2).as_secs_f64() * 1e6 / rows;
    vec![("rate", rows / (last.0 - first.0).as_secs_f64()), ("relay_us", relay_us), ("peak_mib", peak_mib)]
}

/// The broker alone: messages from memory.
fn broker(arena: &mut Arena, results: &mut Results, queue: Queue) {
    for round in 0..rounds() {
        let rows = scaled(100_000);
        let name = arena.make_queue(queue);
        let expectation = Expectation { rows, is_ordered: true, clock: None, is_hashed: false };
        let consumer = Consumer::start(arena.rabbitmq.port(), queue, &name, expectation);
        let (port, window) = (arena.rabbitmq.port().to_string(), WINDOW.to_string());
        let (rows_text, bytes) = (rows.to_string(), PAYLOAD_BYTES.to_string());
        let settings =
            [("broker", &*port), ("exchange", &name), ("window", &window), ("rows", &rows_text), ("bytes", &bytes)];
        let program = Program::own("publish", &settings);
        let wait = |consumer: &Consumer| consumer.wait().unwrap_or_else(|fault| panic!("publisher: {fault}"));
        wait(&consumer);
        let spent = |arena: &Arena| process::cpu(arena.rabbitmq.pid().expect("RabbitMQ runs"));
        let before = spent(arena);
        wait(&consumer);
        let after = spent(arena);
        let p50_ms: f64 = program.printed().trim().parse().unwrap();
        let log = consumer.stop();
        arena.delete_queue(&name);
        let (Some(first), Some(last)) = (log.first, log.last) else { panic!("nothing was consumed") };
        let rows = (last.count - first.count) as f64;
        let rate = rows / (last.at - first.at).as_secs_f64();
        let broker_us = (after - before).as_secs_f64() * 1e6 / rows;
        let scenario = format!("{}, from memory", queue.name());
        let values = vec![("rate", rate), ("broker_us", broker_us), ("confirm_p50_ms", p50_ms)];
        results.add("rate", &scenario, "publisher alone", round, values);
    }
}
