//! The relay itself, between a fake Postgres and a fake broker, under a paused clock: whatever fails when, nothing is lost,
//! reordered or skipped.
//!
//! Every fault comes from one seed, and so does the order in which everything runs: a failing seed is printed and replays
//! alone with `PGOUTBOX_SEED=n cargo test --test it simulation`. The fakes refuse what the real peers would punish: feedback
//! that falls, or that passes what was sent outside a transaction; `delivery`, `crashes` and `feedback` prove them honest.
//!
//! The trap: a judge inside the system under test shares its mistakes. This one reads a log of what the peers saw.

mod broker;
mod database;
mod judge;
mod wire;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pgoutbox::metrics::Metrics;
use pgoutbox::outbox::{ColumnNames, Mapping};
use pgoutbox::relay::{self, Settings};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use broker::FakeBroker;
use database::FakeDatabase;
use judge::World;

/// Seeds in `make test`.
const SEEDS: u64 = 10_000;

/// How long faults go on, in the clock of the simulation.
const FAULTS: Duration = Duration::from_secs(60);

/// How long everything may take afterwards.
const PATIENCE: Duration = Duration::from_secs(300);

#[test]
fn nothing_is_lost_reordered_or_skipped_whatever_fails_when() {
    if let Ok(seed) = std::env::var("PGOUTBOX_SEED") {
        return simulate(seed.parse().expect("PGOUTBOX_SEED is a number"), true);
    }
    let seeds: u64 = std::env::var("PGOUTBOX_SEEDS").map_or(SEEDS, |count| count.parse().expect("a number"));
    let workers = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let failed = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        for worker in 0..workers {
            scope.spawn(move || {
                for seed in (0..seeds).filter(|seed| seed % workers == worker) {
                    // One failing seed is enough to look at.
                    if failed.load(Ordering::Relaxed) {
                        return;
                    }
                    let result = std::panic::catch_unwind(|| simulate(seed, false));
                    failed.fetch_or(result.is_err(), Ordering::Relaxed);
                    assert!(result.is_ok(), "seed {seed} failed: PGOUTBOX_SEED={seed} cargo test --test it simulation");
                }
            });
        }
    });
}

fn simulate(seed: u64, verbose: bool) {
    // The relay's own jitter too.
    fastrand::seed(seed);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let world = World::new(seed);
        run(&world).await;
        if verbose {
            println!("{}", world.log());
        }
        world.judge();
    });
}

#[tokio::test(start_paused = true)]
async fn ready_is_said_all_along_while_the_stream_never_pauses() {
    let world = World::steady();
    let metrics = Arc::new(Metrics::new());
    let (stop, stopped) = watch::channel(false);
    let looking = async {
        sleep(Duration::from_secs(1)).await;
        while !world.is_all_told() {
            assert_eq!(metrics.reasons(), Vec::<String>::new(), "\n{}", world.log());
            sleep(Duration::from_millis(100)).await;
        }
        stop.send_replace(true);
        std::future::pending::<()>().await;
    };
    tokio::select! {
        biased;
        result = process(&world, &metrics, stopped) => result.unwrap(),
        () = looking => {}
    }
    world.judge();
}

/// Processes live and die while faults last; then one lives on until all is settled.
async fn run(world: &World) {
    let (began, metrics) = (Instant::now(), Arc::new(Metrics::new()));
    while began.elapsed() < FAULTS {
        let life = world.random(|random| Duration::from_millis(random.u64(1..30_000)));
        if !world.has_faults() || world.random(|random| random.bool()) {
            // SIGTERM: no fault, so a seed without faults has its restarts too, and no duplicate.
            let (stop, stopped) = watch::channel(false);
            let process = process(world, &metrics, stopped);
            let end = async {
                sleep(life).await;
                stop.send_replace(true);
                std::future::pending::<()>().await;
            };
            tokio::select! {
                biased;
                result = process => result.unwrap_or_else(|error| panic!("{error}")),
                () = end => {}
            }
        } else {
            // kill -9: the future is dropped wherever it is.
            let (_stop, stopped) = watch::channel(false);
            if let Ok(result) = timeout(life, process(world, &metrics, stopped)).await {
                result.unwrap_or_else(|error| panic!("{error}"));
            }
        }
        world.note("process ended");
    }
    world.heal();
    let (stop, stopped) = watch::channel(false);
    let all_told = async {
        let began = Instant::now();
        while !world.is_all_told() {
            assert!(began.elapsed() < PATIENCE, "never finished:\n{}", world.log());
            sleep(Duration::from_millis(100)).await;
        }
        stop.send_replace(true);
        std::future::pending::<()>().await;
    };
    tokio::select! {
        biased;
        result = process(world, &metrics, stopped) => result.unwrap_or_else(|error| panic!("{error}")),
        () = all_told => {}
    }
}

/// One life of `pgoutbox run`.
async fn process(world: &World, metrics: &Arc<Metrics>, stop: watch::Receiver<bool>) -> Result<(), relay::Error> {
    let settings = world.random(|random| Settings {
        window_messages: random.usize(1..20),
        window_bytes: random.usize(1..10_000),
        confirm_timeout: Duration::from_secs(5),
        drain_timeout: Duration::from_secs(5),
        give_up_after: None,
    });
    let mapping = Mapping {
        table: "public.outbox".to_owned(),
        columns: ColumnNames::default(),
        destination: "{aggregatetype}".parse().unwrap(),
    };
    let (database, broker) = (FakeDatabase::new(world), FakeBroker::new(world));
    relay::run(database, broker, &mapping, &settings, metrics, stop).await
}
