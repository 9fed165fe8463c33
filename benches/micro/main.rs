//! What each room costs a row, without servers: time, and allocations counted by an allocator that counts.
//!
//! The trap: an optimiser that sees that nobody wants the result. Every result is looked at, and what is measured runs on
//! bytes that are made once and shared, as those of a socket's buffer are. The counting costs some nanoseconds an
//! allocation, so times here are for comparing rooms and commits with each other. They are the thread's own CPU time, which
//! neighbours on the machine disturb least.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod broker;
mod rooms;
mod stream;

use std::alloc::System;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use nix::time::ClockId;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const ROWS: u64 = 50_000;
const ROUNDS: usize = 7;

/// A pass over the rows; what it prepares does not count.
type Room = fn(&stream::Rows) -> Cost;

const ROOMS: [(&str, Room); 6] = [
    ("pg::pgoutput, bytes to messages", rooms::decode),
    ("outbox::assembler, bytes to items", rooms::assemble),
    ("outbox::mapping, tuple to message", rooms::map),
    ("relay, between a stream and a sink that do nothing", rooms::relay),
    ("sink::rabbitmq, to a broker that confirms at once", rooms::publish),
    ("sink::stdout, message to line", rooms::print),
];

/// What one pass over all rows took.
#[derive(Clone, Copy)]
struct Cost {
    time: Duration,
    allocations: usize,
    bytes: usize,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // `cargo test` runs benches too, and says nothing of it.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return;
    }
    let words = arguments.iter().filter(|argument| !argument.starts_with('-'));
    let wanted: Vec<&str> = words.flat_map(|words| words.split([',', ' '])).filter(|word| !word.is_empty()).collect();
    if !wanted.is_empty() && !wanted.contains(&"micro") {
        return;
    }
    let mut table = String::from("| room | rows | ns a row | rows/s | allocations a row | bytes allocated a row |\n");
    table.push_str("| --- | --- | --- | --- | --- | --- |\n");
    for (rows_a_transaction, payload_bytes) in [(1, 220), (1000, 220), (1000, 16 * 1024)] {
        let rows = if payload_bytes > 1024 { ROWS / 10 } else { ROWS };
        let rows = stream::Rows::new(rows, rows_a_transaction, payload_bytes);
        for (name, room) in ROOMS {
            let cost = measure(room, &rows);
            let a_row = |sum: f64| sum / rows.count as f64;
            let nanoseconds = a_row(cost.time.as_secs_f64() * 1e9);
            let (allocations, bytes) = (a_row(cost.allocations as f64), a_row(cost.bytes as f64));
            let _ = writeln!(
                table,
                "| {name} | {rows_a_transaction} a transaction, {payload_bytes} B | {nanoseconds:.0} | {:.0} k | \
                 {allocations:.1} | {bytes:.0} |",
                1e6 / nanoseconds
            );
        }
    }
    print!("{table}");
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench");
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("micro.md"), table).unwrap();
}

/// The fastest round: others were disturbed.
fn measure(room: Room, rows: &stream::Rows) -> Cost {
    room(rows);
    (0..ROUNDS).map(|_| room(rows)).min_by_key(|cost| cost.time).unwrap()
}

/// What it costs.
fn measured(work: impl FnOnce()) -> Cost {
    let region = Region::new(ALLOCATOR);
    let began = own_cpu();
    work();
    let time = own_cpu() - began;
    let change = region.change();
    Cost { time, allocations: change.allocations + change.reallocations, bytes: change.bytes_allocated }
}

fn own_cpu() -> Duration {
    ClockId::CLOCK_THREAD_CPUTIME_ID.now().expect("every thread has this clock").into()
}
