//! What pgoutbox is held to, and whether it holds: each a ratio within this run, with its noise.
//!
//! The trap: a bar that was not measured is not passed. It is left out, and the table says how many there are.

use crate::arena::Queue;
use crate::load::Scenario;
use crate::rate::PAYLOAD_BYTES;
use crate::results::{Results, Spread};
use crate::subject::{BARE, PGOUTBOX, Subject, Window};
use crate::window::{CHOSEN, WINDOWS};

/// Of the bare relay's rate, of the walsender's, of the best fixed window's.
const RATE_MIN: f64 = 0.95;
const CPU_MAX_US: f64 = 3.0;
/// Of what broker and walsender spend.
const CPU_MAX_SHARE: f64 = 0.08;
const P50_MAX: f64 = 1.2;
const P99_MAX: f64 = 1.5;
/// Of the confirm latency of the smallest fixed window that is as fast.
const CONFIRM_MAX: f64 = 2.0;
const TENTH_MAX: f64 = 0.1;
const PEAK_MAX_MIB: f64 = 32.0;
const IDLE_MAX_PERCENT: f64 = 0.2;
const READY_MAX_MS: f64 = 150.0;

/// One bar.
#[derive(Clone, Debug)]
pub(crate) struct Bar {
    pub(crate) what: String,
    pub(crate) wanted: String,
    pub(crate) got: Spread,
    pub(crate) passes: bool,
}

impl Bar {
    fn at_least(what: String, least: f64, got: Spread) -> Self {
        Self { what, wanted: format!("at least {least}"), got, passes: got.median >= least }
    }

    fn at_most(what: String, most: f64, got: Spread) -> Self {
        Self { what, wanted: format!("at most {most:.2}"), got, passes: got.median <= most }
    }
}

/// Every bar that this run has measured.
pub(crate) fn bars(results: &Results) -> Vec<Bar> {
    let mut bars = rates(results);
    bars.extend(latencies(results));
    bars.extend(windows(results));
    bars.extend(tenths(results));
    bars.extend(footprint(results));
    bars
}

fn rates(results: &Results) -> Vec<Bar> {
    let mut bars = Vec::new();
    let scenarios = [Queue::Classic, Queue::Quorum]
        .into_iter()
        .flat_map(|queue| [1, 1000].map(|rows| Scenario::new(queue, 0, rows, PAYLOAD_BYTES).name));
    for name in scenarios {
        if let Some(ratio) = results.ratio("rate", &name, (PGOUTBOX, BARE), "rate") {
            bars.push(Bar::at_least(format!("rate, of the bare relay's: {name}"), RATE_MIN, ratio));
        }
        let spread = |figure| results.spread("rate", &name, PGOUTBOX, figure);
        if let (Some(relay), Some(postgres), Some(broker)) =
            (spread("relay_us"), spread("postgres_us"), spread("broker_us"))
        {
            let most = CPU_MAX_US.min(CPU_MAX_SHARE * (postgres.median + broker.median));
            bars.push(Bar::at_most(format!("CPU a message, us: {name}"), most, relay));
        }
    }
    for name in results.scenarios("rate").iter().filter(|name| name.starts_with("no broker")) {
        let subjects = ("pgoutbox to /dev/null", "walsender alone");
        if let Some(ratio) = results.ratio("rate", name, subjects, "rate") {
            bars.push(Bar::at_least(format!("stdout, of the walsender's own rate: {name}"), RATE_MIN, ratio));
        }
    }
    bars
}

fn latencies(results: &Results) -> Vec<Bar> {
    let mut bars = Vec::new();
    // Rows of other sizes have no bar.
    for name in results.scenarios("latency").iter().filter(|name| !name.ends_with("KB")) {
        for (figure, percentile, most) in [("p50_us", "p50", P50_MAX), ("p99_us", "p99", P99_MAX)] {
            if let Some(ratio) = results.ratio("latency", name, (PGOUTBOX, BARE), figure) {
                bars.push(Bar::at_most(
                    format!("commit to consumer, {percentile} of the bare relay's: {name}"),
                    most,
                    ratio,
                ));
            }
        }
    }
    bars
}

/// The window that pgoutbox chooses, against every fixed one.
fn windows(results: &Results) -> Vec<Bar> {
    let mut bars = Vec::new();
    let chosen = Subject::pgoutbox_with(CHOSEN).name();
    for place in results.scenarios("window") {
        let fixed = WINDOWS.map(|window| Subject::pgoutbox_with(Window::Fixed(window)).name());
        let median = |name: &str, figure| results.spread("window", &place, name, figure).map(|spread| spread.median);
        let best = fixed.iter().max_by(|a, b| {
            let rate = |name: &String| median(name, "rate").unwrap_or(0.0);
            rate(a).total_cmp(&rate(b))
        });
        let Some((best, best_rate)) = best.and_then(|best| Some((best, median(best, "rate")?))) else { continue };
        let smallest = fixed.iter().find(|name| median(name, "rate").is_some_and(|rate| rate >= RATE_MIN * best_rate));
        let smallest = smallest.unwrap_or(best);
        if let Some(ratio) = results.ratio("window", &place, (&chosen, best), "rate") {
            bars.push(Bar::at_least(
                format!("chosen window, rate of the best fixed ({best}): {place}"),
                RATE_MIN,
                ratio,
            ));
        }
        if let Some(ratio) = results.ratio("window", &place, (&chosen, smallest), "confirm_ms") {
            let what = format!("chosen window, confirm latency of the smallest as fast ({smallest}): {place}");
            bars.push(Bar::at_most(what, CONFIRM_MAX, ratio));
        }
    }
    bars
}

fn tenths(results: &Results) -> Vec<Bar> {
    let mut bars = Vec::new();
    for part in ["huge", "backlog"] {
        for name in results.scenarios(part) {
            if let Some(got) = results.spread(part, &name, PGOUTBOX, "last_to_first") {
                let wanted = format!("within {TENTH_MAX} of 1");
                let passes = (got.median - 1.0).abs() <= TENTH_MAX;
                bars.push(Bar { what: format!("rate of the last tenth, of the first: {name}"), wanted, got, passes });
            }
        }
    }
    bars
}

fn footprint(results: &Results) -> Vec<Bar> {
    let mut bars = Vec::new();
    let ours = results.measurements.iter().filter(|each| each.subject.starts_with(PGOUTBOX));
    let peaks = ours.filter_map(|each| Some((each.values.iter().find(|(name, _)| *name == "peak_mib")?.1, each)));
    if let Some((peak, worst)) = peaks.max_by(|a, b| a.0.total_cmp(&b.0)) {
        let what = format!("peak memory, MiB, worst of all: {}, {}, {}", worst.part, worst.scenario, worst.subject);
        bars.extend(Spread::of(vec![peak]).map(|got| Bar::at_most(what, PEAK_MAX_MIB, got)));
    }
    if let Some(got) = results.spread("idle", "idle", PGOUTBOX, "cpu_percent") {
        bars.push(Bar::at_most("idle CPU, %".to_owned(), IDLE_MAX_PERCENT, got));
    }
    if let Some(got) = results.spread("idle", "start", PGOUTBOX, "ready_ms") {
        bars.push(Bar::at_most("exec to ready, ms".to_owned(), READY_MAX_MS, got));
    }
    bars
}
