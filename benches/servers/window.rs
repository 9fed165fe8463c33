//! Rate and confirm latency against the window: of pgoutbox with windows that are fixed, with the one it chooses within the
//! same bounds, and with the one it chooses as it comes.
//!
//! The latency is Little's: what is in flight over the rate. That is what a message waits between entering the window and
//! its confirm, on average, and it costs nothing to measure.
//!
//! The trap: a window that starts small and grows has no rate before it has grown. Everything here begins to count when it
//! has run for a while.

use std::time::{Duration, Instant};

use crate::arena::{Arena, Queue};
use crate::consumer::{Consumer, Expectation};
use crate::delay;
use crate::load::{self, Scenario};
use crate::process;
use crate::rate::PAYLOAD_BYTES;
use crate::results::{Results, Values, rounds, scaled, turned};
use crate::subject::{Subject, Way, Window};

pub(crate) const WINDOWS: [usize; 7] = [10, 30, 100, 300, 1000, 3000, 10_000];

/// The window that has all these within its bounds.
pub(crate) const CHOSEN: Window = Window::UpTo(10_000);

/// What a ping to the far broker would say.
pub(crate) const ROUND_TRIP: Duration = Duration::from_millis(50);

const LOOK_EVERY: Duration = Duration::from_millis(25);

/// How long each runs before it counts, and then; and the rows that last so long.
#[derive(Clone, Copy)]
struct Times {
    before: Duration,
    counted: Duration,
    rows: u64,
}

const NEAR: Times = Times { before: Duration::from_millis(1500), counted: Duration::from_millis(1500), rows: 200_000 };
const FAR: Times = Times { before: Duration::from_secs(5), counted: Duration::from_secs(2), rows: 400_000 };

pub(crate) fn run(arena: &mut Arena, results: &mut Results) {
    let mut subjects: Vec<Subject> = WINDOWS.map(Window::Fixed).map(Subject::pgoutbox_with).into();
    subjects.push(Subject::pgoutbox_with(CHOSEN));
    subjects.push(Subject::pgoutbox());
    subjects.extend(Subject::against());
    let near = arena.rabbitmq.port();
    let far = delay::proxy(near, ROUND_TRIP / 2);
    let rounds = rounds();
    for queue in Queue::ALL {
        windows(
            arena,
            results,
            &Place { name: queue.name().to_owned(), queue, port: near, times: NEAR },
            &subjects,
            rounds,
        );
    }
    let name = format!("classic, {} ms away", ROUND_TRIP.as_millis());
    windows(arena, results, &Place { name, queue: Queue::Classic, port: far, times: FAR }, &subjects, rounds.min(3));
}

/// A queue and the way to it.
struct Place {
    name: String,
    queue: Queue,
    port: u16,
    times: Times,
}

fn windows(arena: &mut Arena, results: &mut Results, place: &Place, subjects: &[Subject], rounds: u32) {
    // A slow machine needs fewer, but not in proportion.
    let rows = scaled(place.times.rows).max(place.times.rows / 2);
    let scenario = Scenario::new(place.queue, rows, 1000, PAYLOAD_BYTES);
    let slot = |round: u32, subject: usize| format!("w{round}_{subject}");
    let slots: Vec<String> =
        (0..rounds).flat_map(|round| (0..subjects.len()).map(move |each| slot(round, each))).collect();
    load::fill(arena, &scenario, &slots);
    let numbered: Vec<(usize, Subject)> = subjects.iter().cloned().enumerate().collect();
    for round in 0..rounds {
        for (number, subject) in turned(&numbered, round) {
            let values = measure(arena, &subject, &scenario, &slot(round, number), place);
            results.add("window", &place.name, &subject.name(), round, values);
        }
    }
}

fn measure(arena: &mut Arena, subject: &Subject, scenario: &Scenario, slot: &str, place: &Place) -> Values {
    let queue = arena.make_queue(place.queue);
    let expectation = Expectation { rows: scenario.rows, is_ordered: true, clock: None, is_hashed: false };
    let consumer = Consumer::start(arena.rabbitmq.port(), place.queue, &queue, expectation);
    let program = subject.start(arena, &Way { slot, broker: place.port, exchange: &queue });
    consumer.wait().unwrap_or_else(|fault| panic!("{}: {fault}\n{}", subject.name(), program.log()));
    std::thread::sleep(place.times.before);
    let (began, before, cpu) = (Instant::now(), consumer.count(), process::cpu(program.pid()));
    let mut in_flight = Vec::new();
    while began.elapsed() < place.times.counted && consumer.count() < scenario.rows {
        in_flight.extend(program.metric("pgoutbox_in_flight_messages"));
        std::thread::sleep(LOOK_EVERY);
    }
    let (seconds, count) = (began.elapsed().as_secs_f64(), consumer.count() - before);
    let cpu = process::cpu(program.pid()).saturating_sub(cpu);
    let peak_mib = process::peak_kib(program.pid()) as f64 / 1024.0;
    let chosen = program.metric("pgoutbox_window_messages");
    drop(program);
    consumer.stop();
    arena.delete_queue(&queue);
    arena.drop_slot(slot);
    assert!(count > 0, "{}: all rows were gone before it counted, or none came", subject.name());
    let rate = count as f64 / seconds;
    let in_flight = in_flight.iter().sum::<f64>() / in_flight.len().max(1) as f64;
    let relay_us = cpu.as_secs_f64() * 1e6 / count as f64;
    let confirm_ms = in_flight / rate * 1e3;
    let mut values = vec![
        ("rate", rate),
        ("confirm_ms", confirm_ms),
        ("in_flight", in_flight),
        ("relay_us", relay_us),
        ("peak_mib", peak_mib),
    ];
    values.extend(chosen.map(|chosen| ("window", chosen)));
    values
}
