//! `make bench`: pgoutbox against the limits of the two servers, all measured in one run and interleaved.
//!
//! The trap: figures of different hours. A broker drifts by more than what is measured here, so programs that are compared
//! run one after the other, again and again, and what is reported is the ratio of neighbours.
//!
//! Reading order: `arena` (servers), `load` (what they hold), `subject` and `process` (who is measured), `consumer` (by what
//! count), `drain` and `live` (how), one file a part, and `results`, `report`, `bars`, `picture` (what is said about it).
// clippy.toml lifts these inside tests; a bench that goes wrong is to stop there and then as well.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]
// The bare programs write lengths that are known to be short, and figures are no bank accounts.
#![allow(missing_docs)]

mod arena;
#[path = "../bare/mod.rs"]
mod bare;
mod bars;
mod consumer;
mod delay;
mod drain;
mod idle;
mod live;
mod load;
mod picture;
mod polling;
mod process;
mod rate;
mod report;
mod results;
mod subject;
mod window;

use std::time::Instant;

use arena::Arena;
use results::Results;

type Part = fn(&mut Arena, &mut Results);

/// The parts, in the order in which they run.
const PARTS: [(&str, Part); 8] = [
    ("idle", idle::run),
    ("rate", rate::rate),
    ("size", rate::size),
    ("latency", live::run),
    ("window", window::run),
    ("busy", rate::busy),
    ("backlog", rate::backlog),
    ("huge", rate::huge),
];

/// A part of the other bench, which needs no servers.
const ELSEWHERE: &str = "micro";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [word, name, settings @ ..] = arguments.as_slice()
        && word == "subject"
    {
        return subject::run(name, settings);
    }
    // `cargo test --all-targets` runs benches too, and says nothing of it; `cargo bench` says `--bench`.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return;
    }
    let words = arguments.iter().filter(|argument| !argument.starts_with('-'));
    let wanted: Vec<&str> = words.flat_map(|words| words.split([',', ' '])).filter(|word| !word.is_empty()).collect();
    for word in &wanted {
        let names = PARTS.map(|(name, _)| name).join(", ");
        let is_known = *word == ELSEWHERE || PARTS.iter().any(|(name, _)| name == word);
        assert!(is_known, "there is no part {word}, only {names} and {ELSEWHERE}");
    }
    let parts: Vec<_> = PARTS.iter().filter(|(name, _)| wanted.is_empty() || wanted.contains(name)).collect();
    if parts.is_empty() {
        return;
    }
    let mut arena = Arena::start();
    let mut results = Results::default();
    let part = if wanted.is_empty() { String::new() } else { format!(" PART={}", wanted.join(",")) };
    let command = format!("make bench{part}");
    let mut text = String::new();
    for (name, part) in parts {
        let began = Instant::now();
        part(&mut arena, &mut results);
        println!("{name} took {:.0} s", began.elapsed().as_secs_f64());
        // A part that goes wrong ends the run; the ones before it took half an hour.
        text = report::write(&arena, &results, &command);
    }
    println!("{text}");
}
