//! The relay itself, between a fake Postgres and a fake broker, under a paused clock: whatever fails when, nothing is lost,
//! reordered or skipped.
//!
//! Every fault comes from one seed, and so does the order in which everything runs: a failing seed shrinks, prints its log and
//! replays alone with `PGOUTBOX_SEED=plan cargo test --test it simulation`. The fakes accuse where the real peers would
//! believe: `delivery`, `crashes` and `feedback` prove them honest.
//!
//! Reading order: `faults`, `writers`, `world` with `owed`, `database`, `source`, `broker`, `judge`, `shrink`.
//!
//! The trap: a simulation in which nothing goes wrong passes. So every kind of fault is counted and must have struck.

mod broker;
mod database;
mod faults;
mod judge;
mod owed;
mod shrink;
mod source;
mod wire;
mod world;
mod writers;

use std::cell::Cell;
use std::future::Future;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once};
use std::time::Duration;

use futures_util::future::join;
use pgoutbox::metrics::{End, Metrics};
use pgoutbox::outbox::{ColumnNames, Mapping};
use pgoutbox::relay::{self, Settings};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use broker::FakeBroker;
use database::FakeDatabase;
use faults::{FAULTS, Fault, Plan};
use world::World;

/// Seeds in `make test`.
const SEEDS: u64 = 10_000;

/// From so many on, every kind of fault must have struck.
const SEEDS_ENOUGH: u64 = 5_000;

/// How long everything may take when faults have ended and all is written: what still sleeps wakes up, is noticed, and a
/// session or two go by; and each row takes its time.
const PATIENCE: Duration = Duration::from_secs(90);
const PATIENCE_PER_ROW: Duration = Duration::from_millis(100);

thread_local! {
    /// A panic of the relay is a verdict here, printed once the plan has shrunk.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

#[test]
fn nothing_is_lost_reordered_or_skipped_whatever_fails_when() {
    if let Ok(plan) = std::env::var("PGOUTBOX_SEED") {
        let simulated = simulate(&plan.parse().unwrap());
        println!("{}\n{:?}", simulated.world.log(), simulated.verdict);
        assert_eq!(simulated.verdict, Ok(()));
        return;
    }
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().expect("a number"));
    let (first, seeds) = (number("PGOUTBOX_FIRST_SEED").unwrap_or(0), number("PGOUTBOX_SEEDS").unwrap_or(SEEDS));
    let campaign = Campaign { next: AtomicU64::new(first), end: first + seeds, ..Campaign::default() };
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(|| campaign.work())).collect();
        workers.into_iter().for_each(|worker| worker.join().expect("verdicts are caught"));
    });
    if let Some(plan) = campaign.failed.into_inner().unwrap() {
        report(&plan);
    }
    let fired = campaign.fired.into_inner().unwrap();
    for (fault, count) in FAULTS.iter().zip(fired) {
        println!("{count:>9} {fault:?}: {}", fault.what());
        assert!(seeds < SEEDS_ENOUGH || count > 0, "{fault:?} never struck in {seeds} seeds: it guards nothing");
    }
}

/// Many seeds, on all cores.
#[derive(Default)]
struct Campaign {
    next: AtomicU64,
    end: u64,
    done: AtomicU64,
    stop: AtomicBool,
    failed: Mutex<Option<Plan>>,
    /// By kind.
    fired: Mutex<Vec<u64>>,
}

impl Campaign {
    /// Takes seeds until there are none, or one has failed: one is enough to look at.
    fn work(&self) {
        let began = std::time::Instant::now();
        let mut fired = vec![0; FAULTS.len()];
        while !self.stop.load(Ordering::Relaxed) {
            let seed = self.next.fetch_add(1, Ordering::Relaxed);
            if seed >= self.end {
                break;
            }
            let simulated = undisturbed(&Plan::new(seed));
            fired.iter_mut().zip(simulated.world.fired()).for_each(|(all, these)| *all += these);
            if simulated.verdict.is_err() {
                self.stop.store(true, Ordering::Relaxed);
                self.failed.lock().unwrap().get_or_insert(Plan::new(seed));
            }
            self.progress(began);
        }
        let mut all = self.fired.lock().unwrap();
        all.resize(FAULTS.len(), 0);
        all.iter_mut().zip(fired).for_each(|(all, these)| *all += these);
    }

    /// One line, over and over, past what holds back a test's output: a million seeds take a while.
    fn progress(&self, began: std::time::Instant) {
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        if done.is_multiple_of(10_000) {
            let per_second = done as f64 / began.elapsed().as_secs_f64();
            let _ = writeln!(std::io::stderr(), "simulation: {done} seeds, {per_second:.0} seeds/s");
        }
    }
}

/// Simulates, and once more where the machine stood still meanwhile. The lease reads `CLOCK_BOOTTIME` as well, which no test
/// pauses: it saw that, rightly, and ended a session that no fault of the plan excuses.
fn undisturbed(plan: &Plan) -> Simulated {
    /// A run takes milliseconds; the lease minds a gap of three seconds.
    const LONG: Duration = Duration::from_secs(1);
    let mut tries = 3;
    loop {
        let began = std::time::Instant::now();
        let simulated = simulate(plan);
        tries -= 1;
        if simulated.verdict.is_ok() || began.elapsed() < LONG || tries == 0 {
            return simulated;
        }
        println!("seed {} took {:?}: the machine stood still, once more", plan.seed, began.elapsed());
    }
}

/// Shrinks a failing plan and prints what it takes.
fn report(plan: &Plan) -> ! {
    let smallest = shrink::shrink(plan, |plan| simulate(plan).verdict.is_err());
    let simulated = simulate(&smallest);
    let verdict = simulated.verdict.err().unwrap_or_else(|| "it holds at the second try".to_owned());
    let fired: Vec<String> = FAULTS
        .iter()
        .zip(simulated.world.fired())
        .filter(|(_, count)| *count > 0)
        .map(|(fault, count)| format!("{count} x {}", fault.what()))
        .collect();
    panic!(
        "\n{}\n\nseed {} failed: {verdict}\nit takes: {}\nreplay: PGOUTBOX_SEED={smallest} cargo test --test it \
         simulation::nothing -- --nocapture",
        simulated.world.log(),
        plan.seed,
        if fired.is_empty() { "no fault at all".to_owned() } else { fired.join(", ") },
    );
}

struct Simulated {
    world: World,
    verdict: Result<(), String>,
}

fn simulate(plan: &Plan) -> Simulated {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                hook(panic);
            }
        }));
    });
    // The relay's own jitter too.
    fastrand::seed(plan.seed);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let world = {
        let _entered = runtime.enter();
        runtime.block_on(async { World::new(plan) })
    };
    QUIET.set(true);
    let result = catch_unwind(AssertUnwindSafe(|| runtime.block_on(run(&world))));
    QUIET.set(false);
    let verdict = match result {
        Ok(()) => judge::judge(&world),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            Err(format!(
                "panicked: {}",
                text.or(panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default()
            ))
        }
    };
    Simulated { world, verdict }
}

/// Processes live and die while faults last; those that live then live on until all is told.
async fn run(world: &World) {
    let second = async {
        if world.strikes(Fault::SecondRelay) {
            sleep(world.pause(Duration::from_secs(20))).await;
            supervise(world).await;
        }
    };
    tokio::select! {
        biased;
        _ = join(supervise(world), second) => {}
        () = heal(world) => {}
    }
}

/// Ends all faults, and the patience with what should end by itself now.
async fn heal(world: &World) {
    let seconds = world.with(|state| state.plan.seconds);
    sleep(Duration::from_secs(seconds)).await;
    world.heal();
    let (written, rows) = world.with(|state| {
        let written = state.wal.last().map_or(Duration::ZERO, |entry| entry.at);
        (written.saturating_sub(state.began.elapsed()), state.rows.len() as u32)
    });
    sleep(written + PATIENCE + PATIENCE_PER_ROW * rows).await;
    world.accuse("never finished");
}

/// One life after the other.
async fn supervise(world: &World) {
    while !(world.with(|state| state.healed) && world.is_all_told()) {
        live(world).await;
        sleep(world.pause(Duration::from_secs(3))).await;
    }
}

/// One life, ended from outside while faults last, from inside once all is told.
async fn live(world: &World) {
    // A process that was killed while the broker blocked takes its knowledge of that along.
    let metrics = Arc::new(Metrics::new());
    let span = world.pause(Duration::from_secs(30));
    let settings = settings(world);
    let life = world.begin_life(&settings);
    let (stop, stopped) = watch::channel(false);
    let process = freezing(world, life, process(world, life, &settings, &metrics, stopped));
    let told = Cell::new(None);
    let end = async {
        sleep(span).await;
        let is_healed = || world.with(|state| state.healed);
        // Once all is healed this life must do.
        while !(is_healed() && world.is_all_told()) {
            if !is_healed() && world.strikes(Fault::Kill) {
                return;
            }
            if !is_healed() && world.strikes(Fault::Terminate) {
                break;
            }
            sleep(Duration::from_millis(500)).await;
        }
        if is_healed() && world.is_all_told() {
            recovers(world, life, &metrics).await;
        }
        told.set(Some(Instant::now()));
        world.with(|state| state.lives[life].is_stopping = true);
        stop.send_replace(true);
        std::future::pending::<()>().await;
    };
    tokio::select! {
        biased;
        result = process => {
            // A stop that gave up waiting leaves things open, and says so; so does a session that ended in another way.
            let stopped = metrics.sessions.get_or_create(&End { end: "stopped" }).get() > 0;
            let in_time = told.get().map(|told: Instant| stopped && told.elapsed() < settings.drain_timeout);
            judge::ended(world, life, &result, in_time);
        }
        () = end => judge::quiet(world, life),
    }
    judge::paused(world, life, metrics.sessions.get_or_create(&End { end: "paused" }).get());
}

/// Everything is told and nothing goes wrong any more: who has the slot says so, and that nothing waits.
async fn recovers(world: &World, life: usize, metrics: &Metrics) {
    for _ in 0..300 {
        let gauges = metrics.render();
        let is_empty =
            ["in_flight_messages 0", "in_flight_bytes 0", "oldest_unsettled_seconds 0.0", "broker_blocked 0"]
                .iter()
                .all(|gauge| gauges.contains(&format!("pgoutbox_{gauge}\n")));
        if !world.with(|state| state.streams_now(life)) || metrics.reasons().is_empty() && is_empty {
            return;
        }
        sleep(Duration::from_millis(100)).await;
    }
    world.accuse(format!("all is well and told, and it says {:?} {}", metrics.reasons(), metrics.render()));
}

/// Now and then the process does not run for a while, and the world does.
async fn freezing<T>(world: &World, life: usize, process: impl Future<Output = T>) -> T {
    let mut process = std::pin::pin!(process);
    loop {
        let awake = world.pause(Duration::from_secs(15));
        tokio::select! {
            biased;
            result = &mut process => return result,
            () = sleep(awake) => {}
        }
        if world.strikes(Fault::Freeze) {
            world.with(|state| (state.lives[life].frozen, state.lives[life].was_frozen) = (true, true));
            sleep(world.pause(Duration::from_secs(20))).await;
            world.note(format!("process {life} runs again"));
        }
    }
}

fn settings(world: &World) -> Settings {
    let is_harmless = world.with(|state| state.is_harmless);
    let give_up_after = world.strikes(Fault::GivesUp).then(|| world.pause(Duration::from_secs(20)));
    world.random(|random| Settings {
        window_messages: random.usize(1..20),
        window_messages_min: random.usize(1..20),
        window_bytes: random.usize(1..10_000),
        confirm_timeout: Duration::from_secs(5),
        // Where nothing excuses a duplicate, a stop waits until an alarm is over.
        drain_timeout: Duration::from_secs(if is_harmless { 600 } else { 5 }),
        give_up_after,
    })
}

/// One life of `pgoutbox run`.
async fn process(
    world: &World,
    life: usize,
    settings: &Settings,
    metrics: &Arc<Metrics>,
    stop: watch::Receiver<bool>,
) -> Result<(), relay::Error> {
    let mapping = Mapping {
        table: "public.outbox".to_owned(),
        columns: ColumnNames::default(),
        destination: "{aggregatetype}".parse().unwrap(),
    };
    let database = FakeDatabase { world: world.clone(), life };
    let broker = FakeBroker { world: world.clone(), life, metrics: metrics.clone() };
    relay::run(database, broker, &mapping, settings, metrics, stop).await
}

#[tokio::test(start_paused = true)]
async fn ready_is_said_all_along_while_the_stream_never_pauses() {
    let world = World::steady();
    let metrics = Arc::new(Metrics::new());
    let settings = settings(&world);
    let life = world.begin_life(&settings);
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
        result = process(&world, life, &settings, &metrics, stopped) => result.unwrap(),
        () = looking => {}
    }
    judge::judge(&world).unwrap_or_else(|problem| panic!("{problem}\n{}", world.log()));
}
