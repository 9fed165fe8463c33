//! The fault bench: every fault of the table, tried on real servers, round after round, counted.
//!
//! `make faults` runs it all and writes `docs/faults.md`; `make nemesis` mixes the faults from a seed. In `make test` a few
//! rows run once, so that the bench itself cannot rot.
//!
//! | variable | |
//! | --- | --- |
//! | `PGOUTBOX_ROUNDS` | of every row, else 20 |
//! | `PGOUTBOX_ROWS` | numbers of rows with spaces between, else all |
//! | `PGOUTBOX_WORKERS` | server pairs side by side, else 2 |
//! | `PGOUTBOX_MINUTES` | of the nemesis, else 60 |
//! | `PGOUTBOX_SEED` | else by the clock |
//!
//! The trap: a table written by hand. This one is made by the run that it describes.

mod acts;
mod arena;
mod broker;
mod cluster;
mod database;
mod judge;
mod machine;
mod nemesis;
mod network;
mod process;
mod table;

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::time::{Duration, Instant};

use futures_util::FutureExt;

use arena::{Round, Site};
use judge::{Allowed, Outcome};
use table::Line;

/// What one failure may send again: the window of 1,000 messages, and what was settled and not yet told, at a load of
/// about 1,000 messages a second.
const FAILURE: usize = 2_000;

/// One fault of the table.
struct Row {
    number: &'static str,
    fault: &'static str,
    allowed: Allowed,
    run: for<'a> fn(&'a mut Round) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>>,
}

impl Row {
    /// Of the broker that it is tried on.
    fn nodes(&self) -> usize {
        if cluster::ROWS.iter().any(|row| row.number == self.number) { cluster::NODES } else { 1 }
    }
}

const fn allow(duplicates: usize) -> Allowed {
    Allowed { duplicates, reorder: false }
}

const fn allow_reorder(duplicates: usize) -> Allowed {
    Allowed { duplicates, reorder: true }
}

fn rows() -> impl Iterator<Item = &'static Row> {
    [process::ROWS, network::ROWS, database::ROWS, broker::ROWS, cluster::ROWS, machine::ROWS].into_iter().flatten()
}

fn variable(name: &str, otherwise: u64) -> u64 {
    std::env::var(name)
        .map_or(otherwise, |value| value.parse().unwrap_or_else(|_| panic!("{name} is no number: {value}")))
}

fn seed() -> u64 {
    variable("PGOUTBOX_SEED", fastrand::u64(..1 << 32))
}

/// One round of a row; `None` for the site when it is not fit for another.
async fn play(row: &Row, site: Site, seed: u64) -> (Outcome, Option<Site>) {
    let played = async {
        let mut round = Round::start(site, seed).await;
        let struck = AssertUnwindSafe((row.run)(&mut round)).catch_unwind().await;
        if let Err(panic) = struck {
            round.complaints.push(format!("the fault: {}", said(&*panic)));
        }
        round.finish().await
    };
    let limit = Duration::from_secs(300);
    let result = AssertUnwindSafe(tokio::time::timeout(limit, played)).catch_unwind().await;
    let (outcome, site) = match result {
        Ok(Ok((outcome, site))) => (outcome, Some(site)),
        Ok(Err(_)) => (Outcome::failed(format!("not done after {limit:?}")), None),
        Err(panic) => (Outcome::failed(said(&*panic)), None),
    };
    let is_good = outcome.complaints.is_empty();
    (outcome, site.filter(|_| is_good))
}

fn said(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// Rounds of rows on one site, and on a new one where a round broke it.
struct Worker {
    site: Option<Site>,
}

impl Worker {
    async fn row(&mut self, row: &Row, rounds: u64, seed: u64) -> Line {
        let mut line = Line::new(row.number, row.fault);
        for round in 0..rounds {
            let site = self.site.take().filter(|site| site.nodes() == row.nodes());
            let site = site.unwrap_or_else(|| Site::start(row.nodes()));
            let seed = seed.wrapping_add(round);
            let (outcome, site) = play(row, site, seed).await;
            self.site = site;
            let faults = outcome.faults(row.allowed);
            for fault in &faults {
                println!("row {} seed {seed}: {fault}", row.number);
            }
            if !faults.is_empty() {
                println!("--- log of the relay\n{}", outcome.log);
            }
            line.add(&outcome, faults);
        }
        println!("{}", line.markdown());
        line
    }
}

/// Rows side by side on as many sites as there are workers.
fn run(rows: Vec<&'static Row>, rounds: u64, seed: u64) -> Vec<Line> {
    let queue = std::sync::Mutex::new(rows.into_iter().enumerate().collect::<Vec<_>>().into_iter());
    let lines = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..variable("PGOUTBOX_WORKERS", 2) {
            scope.spawn(|| {
                let runtime =
                    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
                let mut worker = Worker { site: None };
                loop {
                    let next = queue.lock().unwrap().next();
                    let Some((index, row)) = next else { return };
                    let line = runtime.block_on(worker.row(row, rounds, seed));
                    lines.lock().unwrap().push((index, line));
                }
            });
        }
    });
    let mut lines = lines.into_inner().unwrap();
    lines.sort_by_key(|(index, _)| *index);
    lines.into_iter().map(|(_, line)| line).collect()
}

fn assert_passed(lines: &[Line]) {
    let failed: Vec<String> = lines.iter().filter(|line| !line.has_passed()).map(Line::markdown).collect();
    assert!(failed.is_empty(), "rows that failed:\n{}", failed.join("\n"));
}

/// A row of each kind: process, network, database, broker and cluster.
#[test]
fn a_few_rows_of_the_fault_table_pass_once() {
    let few = ["2c", "8", "15a", "37", "52a"];
    let seed = seed();
    println!("seed {seed}");
    let rows = rows().filter(|row| few.contains(&row.number)).collect();
    assert_passed(&run(rows, 1, seed));
}

#[test]
#[ignore = "takes hours: make faults"]
fn the_whole_fault_table_passes() {
    let chosen = std::env::var("PGOUTBOX_ROWS").unwrap_or_default();
    let chosen: Vec<&str> = chosen.split_whitespace().collect();
    let rows: Vec<_> = rows().filter(|row| chosen.is_empty() || chosen.contains(&row.number)).collect();
    let (rounds, seed) = (variable("PGOUTBOX_ROUNDS", 20), seed());
    println!("{} rows, {rounds} rounds, seed {seed}", rows.len());
    let lines = run(rows, rounds, seed);
    table::write("faults", &lines, rounds, seed);
    assert_passed(&lines);
}

#[test]
#[ignore = "takes an hour: make nemesis"]
fn the_nemesis_finds_nothing() {
    const ROW: Row =
        Row { number: "N", fault: "nemesis", allowed: nemesis::ALLOWED, run: |round| Box::pin(nemesis::strike(round)) };
    let (began, minutes, seed) = (Instant::now(), variable("PGOUTBOX_MINUTES", 60), seed());
    println!("nemesis of {minutes} minutes, seed {seed}");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (mut worker, mut lines, mut round) = (Worker { site: None }, Vec::new(), 0);
    while began.elapsed() < Duration::from_secs(60 * minutes) {
        lines.push(runtime.block_on(worker.row(&ROW, 1, seed.wrapping_add(round))));
        round += 1;
    }
    let whole = Line::sum("N", "nemesis: eight random faults a round, some at once", &lines);
    println!("{}", whole.markdown());
    table::write("nemesis", &[whole], round, seed);
    assert_passed(&lines);
}
