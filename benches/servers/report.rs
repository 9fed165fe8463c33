//! What a run leaves behind: `results.json` with every figure, `results.md` for people, pictures.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Map, Value, json};

use crate::arena::Arena;
use crate::bars::{self, Bar};
use crate::picture::{Chart, Series};
use crate::results::{Results, Spread, rounds};
use crate::subject::{BARE, PGOUTBOX, Subject, Window};
use crate::window::WINDOWS;

/// A part's table: its figures, and what is compared with the bare relay.
struct Table {
    part: &'static str,
    title: &'static str,
    figures: &'static [(&'static str, &'static str)],
    ratio: Option<&'static str>,
}

const COSTS: [(&str, &str); 7] = [
    ("rate", "rows/s"),
    ("relay_us", "relay, us"),
    ("postgres_us", "Postgres, us"),
    ("broker_us", "broker, us"),
    ("consumer_us", "consumer, us"),
    ("all_us", "all, us"),
    ("peak_mib", "peak, MiB"),
];
const TENTHS: [(&str, &str); 7] = [
    ("rate", "rows/s"),
    ("relay_us", "relay, us"),
    ("postgres_us", "Postgres, us"),
    ("broker_us", "broker, us"),
    ("all_us", "all, us"),
    ("last_to_first", "last tenth / first"),
    ("peak_mib", "peak, MiB"),
];
const TABLES: [Table; 8] = [
    Table { part: "rate", title: "Rate, and CPU a message", figures: &COSTS, ratio: Some("rate") },
    Table { part: "size", title: "Rows of other sizes", figures: &COSTS, ratio: Some("rate") },
    Table { part: "huge", title: "One huge transaction", figures: &TENTHS, ratio: Some("rate") },
    Table { part: "backlog", title: "A large backlog", figures: &TENTHS, ratio: Some("rate") },
    Table { part: "busy", title: "A busy database", figures: &COSTS, ratio: Some("rate") },
    Table {
        part: "latency",
        title: "Commit to consumer, us",
        figures: &[
            ("p50_us", "p50"),
            ("p99_us", "p99"),
            ("p999_us", "p99.9"),
            ("max_us", "max"),
            ("relay_percent", "relay, % of a core"),
            ("sender_late_max_us", "sender late, max"),
        ],
        ratio: Some("p50_us"),
    },
    Table {
        part: "window",
        title: "Rate and confirm latency against the window",
        figures: &[
            ("rate", "rows/s"),
            ("confirm_ms", "confirm, ms"),
            ("in_flight", "in flight"),
            ("window", "window, at the end"),
            ("relay_us", "relay, us"),
            ("peak_mib", "peak, MiB"),
        ],
        ratio: None,
    },
    Table {
        part: "idle",
        title: "Start and rest",
        figures: &[
            ("streaming_ms", "exec to streaming, ms"),
            ("ready_ms", "exec to ready, ms"),
            ("cpu_percent", "idle CPU, %"),
            ("wakeups_a_second", "wake-ups/s"),
            ("peak_mib", "peak, MiB"),
        ],
        ratio: None,
    },
];

/// Writes it all below `target/bench`; returns the tables and where they are.
pub(crate) fn write(arena: &Arena, results: &Results, command: &str) -> String {
    let directory = directory();
    let mut about = about(arena, command);
    about.extend(results.noise().map(noise));
    let bars = bars::bars(results);
    let text = markdown(&about, results, &bars);
    put(&directory, "results.md", &text);
    put(&directory, "results.json", &format!("{:#}\n", as_json(&about, results, &bars)));
    for (name, chart) in charts(results) {
        if let Some(svg) = chart.svg() {
            put(&directory, name, &svg);
        }
    }
    format!("\n{text}\nwritten to {}", directory.display())
}

/// Where results go.
pub(crate) fn directory() -> PathBuf {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench");
    std::fs::create_dir_all(&directory).unwrap();
    directory
}

fn put(directory: &Path, name: &str, text: &str) {
    let path = directory.join(name);
    std::fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// What a figure is worth nothing without.
fn about(arena: &Arena, command: &str) -> Vec<(&'static str, String)> {
    let of = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output();
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
    };
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |path: &str, name: &str| {
        let line = read(path).lines().find(|line| line.starts_with(name)).map(str::to_owned).unwrap_or_default();
        line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory: f64 = field("/proc/meminfo", "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0.0);
    let machine = format!(
        "{}, {cores} cores, {:.0} GiB, Linux {}",
        field("/proc/cpuinfo", "model name"),
        memory / 1024.0 / 1024.0,
        of("uname", &["-r"])
    );
    let rabbitmq = arena.rabbitmq.ctl(&["version"]).unwrap_or_default();
    let versions = format!(
        "pgoutbox {} ({}), PostgreSQL {}, RabbitMQ {}, {}",
        env!("CARGO_PKG_VERSION"),
        of("git", &["describe", "--always", "--dirty"]),
        arena.sql.text("show server_version").unwrap_or_default(),
        rabbitmq.trim(),
        of("rustc", &["--version"])
    );
    let load = read("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned();
    vec![
        ("command", command.to_owned()),
        ("date", of("date", &["-u", "+%F %H:%M UTC"])),
        ("machine", machine),
        ("versions", versions),
        ("rounds", rounds().to_string()),
        ("load at the end, its own included", load),
    ]
}

fn noise((median, tenth): (f64, f64)) -> (&'static str, String) {
    let percent = |part: f64| format!("{:.0} %", 100.0 * part);
    let text = format!("{}, every tenth time by more than {}", percent(median), percent(tenth));
    ("noise: from one round to the next a program's own rate differs by", text)
}

fn markdown(about: &[(&'static str, String)], results: &Results, bars: &[Bar]) -> String {
    let mut text = String::new();
    for (name, value) in about {
        let _ = writeln!(text, "- {name}: {value}");
    }
    if !bars.is_empty() {
        let passed = bars.iter().filter(|bar| bar.passes).count();
        let _ = writeln!(text, "\n## Bars: {passed} of {} hold\n\n| bar | wanted | median (from, to) | |", bars.len());
        text.push_str("| --- | --- | --- | --- |\n");
        for bar in bars {
            let verdict = if bar.passes { "holds" } else { "**fails**" };
            let _ = writeln!(text, "| {} | {} | {} | {verdict} |", bar.what, bar.wanted, with_noise(bar.got));
        }
    }
    for each in TABLES {
        table(&mut text, results, &each);
    }
    text
}

fn with_noise(spread: Spread) -> String {
    match spread.count {
        1 => figure(spread.median),
        _ => format!("{} ({}, {})", figure(spread.median), figure(spread.low), figure(spread.high)),
    }
}

fn table(text: &mut String, results: &Results, table: &Table) {
    let scenarios = results.scenarios(table.part);
    if scenarios.is_empty() {
        return;
    }
    let titles: Vec<&str> = table.figures.iter().map(|(_, title)| *title).collect();
    let ratio = if table.ratio.is_some() { " of the bare relay's |" } else { "" };
    let _ = writeln!(text, "\n## {}\n\n| | | {} |{ratio}", table.title, titles.join(" | "));
    let columns = 2 + titles.len() + usize::from(table.ratio.is_some());
    let _ = writeln!(text, "|{}", " --- |".repeat(columns));
    for scenario in scenarios {
        for subject in results.subjects(table.part, &scenario) {
            let spread = |name| results.spread(table.part, &scenario, &subject, name);
            let figures = table.figures.iter().map(|(name, _)| spread(name).map(|spread| figure(spread.median)));
            let figures: Vec<String> = figures.map(Option::unwrap_or_default).collect();
            let _ = write!(text, "| {scenario} | {subject} | {} |", figures.join(" | "));
            if let Some(name) = table.ratio {
                let ratio = results.ratio(table.part, &scenario, (&subject, BARE), name).filter(|_| subject != BARE);
                let _ = write!(text, " {} |", ratio.map(with_noise).unwrap_or_default());
            }
            text.push('\n');
        }
    }
}

fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => {
            let digits = format!("{value:.0}");
            let (head, tail) = digits.split_at(digits.len() - 3);
            format!("{head},{tail}")
        }
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn as_json(about: &[(&'static str, String)], results: &Results, bars: &[Bar]) -> Value {
    let about: Map<String, Value> = about.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
    let bars = bars.iter().map(|bar| {
        let got = json!({"median": bar.got.median, "low": bar.got.low, "high": bar.got.high, "rounds": bar.got.count});
        json!({"bar": bar.what, "wanted": bar.wanted, "got": got, "holds": bar.passes})
    });
    let measurements = results.measurements.iter().map(|each| {
        let values: Map<String, Value> =
            each.values.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
        let (part, scenario, subject) = (each.part, &each.scenario, &each.subject);
        json!({"part": part, "scenario": scenario, "subject": subject, "round": each.round, "values": values})
    });
    json!({"about": about, "bars": bars.collect::<Vec<_>>(), "measurements": measurements.collect::<Vec<_>>()})
}

fn charts(results: &Results) -> [(&'static str, Chart); 4] {
    let window = |figure: &'static str| -> Vec<Series> {
        let place = |place: String| {
            let point = |window: usize| {
                let subject = Subject::pgoutbox_with(Window::Fixed(window)).name();
                Some((window as f64, results.spread("window", &place, &subject, figure)?.median))
            };
            Series { points: WINDOWS.into_iter().filter_map(point).collect(), name: place }
        };
        results.scenarios("window").into_iter().map(place).collect()
    };
    // The size stands at the end of a scenario's name.
    let bytes = |scenario: &str| match scenario.rsplit([',', ' ']).nth(1).and_then(|number| number.parse().ok()) {
        Some(number) if scenario.ends_with("KB") => 1024.0 * number,
        Some(number) if scenario.ends_with(" B") => number,
        _ => crate::rate::PAYLOAD_BYTES as f64,
    };
    let payload = |part: &'static str, wanted: &'static str, figure: &'static str| -> Vec<Series> {
        let line = |subject: &str| {
            let scenarios = results.scenarios(part).into_iter().filter(|name| name.contains(wanted));
            let point = |name: String| Some((bytes(&name), results.spread(part, &name, subject, figure)?.median));
            Series { name: subject.to_owned(), points: scenarios.filter_map(point).collect() }
        };
        [BARE, PGOUTBOX].map(line).into()
    };
    let (messages, size) = ("window, messages", "payload, bytes");
    let chart = |title, across, up, is_log_up, series| Chart { title, across, up, is_log_up, series };
    let (rate, ms, us) = ("rows a second", "ms", "us");
    [
        ("rate-window.svg", chart("Rate against the window", messages, rate, false, window("rate"))),
        ("latency-window.svg", chart("Confirm latency against the window", messages, ms, true, window("confirm_ms"))),
        ("rate-payload.svg", chart("Rate against the payload", size, rate, true, payload("size", "", "rate"))),
        (
            "latency-payload.svg",
            chart(
                "Commit to consumer against the payload, 1000 a second, p50",
                size,
                us,
                false,
                payload("latency", "1000 a", "p50_us"),
            ),
        ),
    ]
}
