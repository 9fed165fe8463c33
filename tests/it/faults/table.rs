//! What rounds add up to, and the table that is published.

use std::path::Path;
use std::time::Duration;

use super::judge::Outcome;

/// Rounds of one row.
#[derive(Clone, Debug)]
pub(super) struct Line {
    number: String,
    fault: String,
    rounds: u64,
    passed: u64,
    rows: usize,
    lost: usize,
    phantom: usize,
    reordered: usize,
    duplicates: Vec<usize>,
    recovered: Vec<Duration>,
    peak_kib: u64,
}

impl Line {
    pub(super) fn new(number: &str, fault: &str) -> Self {
        Self {
            number: number.to_owned(),
            fault: fault.to_owned(),
            rounds: 0,
            passed: 0,
            rows: 0,
            lost: 0,
            phantom: 0,
            reordered: 0,
            duplicates: Vec::new(),
            recovered: Vec::new(),
            peak_kib: 0,
        }
    }

    pub(super) fn add(&mut self, outcome: &Outcome, faults: Vec<String>) {
        self.rounds += 1;
        self.passed += u64::from(faults.is_empty());
        self.rows += outcome.rows;
        self.lost += outcome.lost;
        self.phantom += outcome.phantom;
        self.reordered += outcome.reordered;
        self.duplicates.push(outcome.duplicates);
        self.recovered.extend(outcome.recovered);
        self.peak_kib = self.peak_kib.max(outcome.peak_kib);
    }

    /// All of them as one.
    pub(super) fn sum(number: &str, fault: &str, lines: &[Line]) -> Self {
        let mut sum = Self::new(number, fault);
        for line in lines {
            sum.rounds += line.rounds;
            sum.passed += line.passed;
            sum.rows += line.rows;
            sum.lost += line.lost;
            sum.phantom += line.phantom;
            sum.reordered += line.reordered;
            sum.duplicates.extend(&line.duplicates);
            sum.recovered.extend(&line.recovered);
            sum.peak_kib = sum.peak_kib.max(line.peak_kib);
        }
        sum
    }

    pub(super) fn has_passed(&self) -> bool {
        self.passed == self.rounds
    }

    pub(super) fn markdown(&self) -> String {
        let (mut duplicates, mut recovered) = (self.duplicates.clone(), self.recovered.clone());
        duplicates.sort_unstable();
        recovered.sort_unstable();
        let seconds =
            |duration: Option<&Duration>| duration.map_or("-".to_owned(), |d| format!("{:.1}", d.as_secs_f64()));
        format!(
            "| {} | {} | {}/{} | {} | {} | {} | {} | {} / {} | {} / {} | {} |",
            self.number,
            self.fault,
            self.passed,
            self.rounds,
            self.rows,
            self.lost,
            self.phantom,
            self.reordered,
            duplicates.get(duplicates.len() / 2).unwrap_or(&0),
            duplicates.last().unwrap_or(&0),
            seconds(recovered.get(recovered.len() / 2)),
            seconds(recovered.last()),
            self.peak_kib.div_ceil(1024),
        )
    }
}

/// Below `target/`, whence a person who has read it brings it to `docs/faults.md`.
pub(super) fn write(name: &str, lines: &[Line], rounds: u64, seed: u64) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/faults");
    std::fs::create_dir_all(&directory).unwrap();
    let mut text = format!(
        "{rounds} rounds, seed {seed}\n\n| row | fault | passed | rows | lost | phantom | reordered | duplicates \
         (median / most) | recovered after, s (median / most) | peak MiB |\n|{}\n",
        " --- |".repeat(10)
    );
    for line in lines {
        text += &(line.markdown() + "\n");
    }
    let path = directory.join(format!("{name}.md"));
    std::fs::write(&path, text).unwrap();
    println!("written to {}", path.display());
}
