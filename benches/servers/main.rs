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
mod consumer;
mod drain;
mod load;
mod polling;
mod process;
mod rate;
mod results;
mod subject;

use arena::Arena;
use results::Results;

/// The parts, in the order in which they run.
const PARTS: [(&str, fn(&mut Arena, &mut Results)); 1] = [("rate", rate::run)];

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
    let wanted: Vec<&str> = arguments.iter().map(String::as_str).filter(|word| !word.starts_with('-')).collect();
    let wanted: Vec<&str> = wanted.iter().flat_map(|words| words.split([',', ' '])).collect();
    for word in &wanted {
        let names = PARTS.map(|(name, _)| name).join(", ");
        assert!(PARTS.iter().any(|(name, _)| name == word), "there is no part {word}, only {names}");
    }
    let mut arena = Arena::start();
    let mut results = Results::default();
    for (name, part) in PARTS {
        if wanted.is_empty() || wanted.contains(&name) {
            part(&mut arena, &mut results);
        }
    }
}
