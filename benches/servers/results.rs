//! What was measured, and what follows from it.
//!
//! The trap: the ratio of two medians compares a good hour of the one with a bad hour of the other. Programs that are
//! compared run next to each other in every round; the ratio is taken in each round, and its median over the rounds.

use std::collections::BTreeSet;

/// One program, once.
#[derive(Clone, Debug)]
pub(crate) struct Measurement {
    pub(crate) part: &'static str,
    pub(crate) scenario: String,
    pub(crate) subject: String,
    pub(crate) round: u32,
    pub(crate) values: Values,
}

/// Named figures; units last.
pub(crate) type Values = Vec<(&'static str, f64)>;

#[derive(Debug, Default)]
pub(crate) struct Results {
    pub(crate) measurements: Vec<Measurement>,
}

/// The middle of some figures, and their extremes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
    pub(crate) count: usize,
}

impl Spread {
    pub(crate) fn of(mut figures: Vec<f64>) -> Option<Self> {
        figures.retain(|figure| figure.is_finite());
        figures.sort_by(f64::total_cmp);
        let count = figures.len();
        let (low, high) = (*figures.first()?, *figures.last()?);
        Some(Self { median: f64::midpoint(figures[(count - 1) / 2], figures[count / 2]), low, high, count })
    }
}

impl Results {
    pub(crate) fn add(&mut self, part: &'static str, scenario: &str, subject: &str, round: u32, values: Values) {
        let (scenario, subject) = (scenario.to_owned(), subject.to_owned());
        let figures: Vec<String> = values.iter().map(|(name, value)| format!("{name} {value:.2}")).collect();
        println!("{part:8} {scenario:36} {subject:24} {round:2}  {}", figures.join("  "));
        self.measurements.push(Measurement { part, scenario, subject, round, values });
    }

    /// A program's figures of that name, with their rounds.
    fn figures(&self, part: &str, scenario: &str, subject: &str, name: &str) -> Vec<(u32, f64)> {
        let of_it = |each: &&Measurement| each.part == part && each.scenario == scenario && each.subject == subject;
        let figure = |each: &Measurement| {
            let value = each.values.iter().find(|(found, _)| *found == name)?.1;
            Some((each.round, value))
        };
        self.measurements.iter().filter(of_it).filter_map(figure).collect()
    }

    pub(crate) fn spread(&self, part: &str, scenario: &str, subject: &str, name: &str) -> Option<Spread> {
        Spread::of(self.figures(part, scenario, subject, name).into_iter().map(|(_, figure)| figure).collect())
    }

    /// One program's figure over another's, round by round.
    pub(crate) fn ratio(&self, part: &str, scenario: &str, subjects: (&str, &str), name: &str) -> Option<Spread> {
        let others = self.figures(part, scenario, subjects.1, name);
        let other = |round: u32| others.iter().find(|(found, _)| *found == round).map(|(_, figure)| *figure);
        let ours = self.figures(part, scenario, subjects.0, name).into_iter();
        Spread::of(ours.filter_map(|(round, figure)| Some(figure / other(round)?)).collect())
    }

    /// How much the rate of a program differs from its own in the round before, in parts of 1: the median of all, and what
    /// every tenth exceeds. No ratio of one round says more than that.
    pub(crate) fn noise(&self) -> Option<(f64, f64)> {
        let figure = |each: &Measurement| each.values.iter().find(|(name, _)| *name == "rate").map(|(_, rate)| *rate);
        let is_same = |a: &Measurement, b: &Measurement| {
            (a.part, &a.scenario, &a.subject, a.round + 1) == (b.part, &b.scenario, &b.subject, b.round)
        };
        let change = |a: &Measurement| {
            let b = self.measurements.iter().find(|b| is_same(a, b))?;
            Some((figure(b)? / figure(a)?).ln().abs())
        };
        let mut changes: Vec<f64> = self.measurements.iter().filter_map(change).collect();
        changes.sort_by(f64::total_cmp);
        Some((*changes.get(changes.len() / 2)?, *changes.get(changes.len() * 9 / 10)?))
    }

    /// Scenarios of a part, in the order in which they were measured.
    pub(crate) fn scenarios(&self, part: &str) -> Vec<String> {
        in_order(self.measurements.iter().filter(|each| each.part == part).map(|each| &each.scenario))
    }

    /// Programs of a scenario, in the order in which they were measured.
    pub(crate) fn subjects(&self, part: &str, scenario: &str) -> Vec<String> {
        let of_it = self.measurements.iter().filter(|each| each.part == part && each.scenario == scenario);
        in_order(of_it.map(|each| &each.subject))
    }
}

fn in_order<'a>(names: impl Iterator<Item = &'a String>) -> Vec<String> {
    let mut seen = BTreeSet::new();
    names.filter(|name| seen.insert(*name)).cloned().collect()
}

/// How often everything is measured: `BENCH_ROUNDS`.
pub(crate) fn rounds() -> u32 {
    setting("BENCH_ROUNDS").unwrap_or(5)
}

/// A number of rows, scaled to `BENCH_ROWS` where others use 100,000.
pub(crate) fn scaled(rows: u64) -> u64 {
    setting::<u64>("BENCH_ROWS").map_or(rows, |wanted| (rows * wanted / 100_000).max(100))
}

fn setting<T: std::str::FromStr>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is {text}, which is no number")))
}

/// The same programs in another order each round, so that none always comes after the same one.
pub(crate) fn turned<T: Clone>(subjects: &[T], round: u32) -> Vec<T> {
    let mut turned = subjects.to_vec();
    if round % 2 == 1 {
        turned.reverse();
    }
    turned
}
