//! Rows a second through relay and broker, on each kind of queue and for each size of transaction; and the limits.

use crate::arena::{Arena, Queue};
use crate::drain::Drain;
use crate::load::{self, Scenario};
use crate::results::{Results, rounds, scaled, turned};
use crate::subject::Subject;

const PART: &str = "rate";
const PAYLOAD_BYTES: usize = 220;

pub(crate) fn run(arena: &mut Arena, results: &mut Results) {
    for rows_a_transaction in [1, 1000] {
        let scenario = Scenario::new(Queue::Classic, scaled(100_000), rows_a_transaction, PAYLOAD_BYTES);
        let mut subjects = vec![Subject::bare(), Subject::pgoutbox()];
        subjects.extend(Subject::against());
        subjects.push(Subject::polling(100));
        subjects.push(Subject::polling(1000));
        compare(arena, results, PART, &[scenario], &subjects);
    }
}

/// The subjects on each of the scenarios, which share one load.
pub(crate) fn compare(
    arena: &mut Arena,
    results: &mut Results,
    part: &'static str,
    scenarios: &[Scenario],
    subjects: &[Subject],
) {
    let slot = |round: u32, scenario: usize, subject: usize| format!("s{round}_{scenario}_{subject}");
    let mut slots = Vec::new();
    for round in 0..rounds() {
        for scenario in 0..scenarios.len() {
            let relays = subjects.iter().enumerate().filter(|(_, subject)| !subject.polls());
            slots.extend(relays.map(|(number, _)| slot(round, scenario, number)));
        }
    }
    let end = load::fill(arena, &scenarios[0], &slots);
    let numbered: Vec<(usize, Subject)> = subjects.iter().cloned().enumerate().collect();
    for round in 0..rounds() {
        for (index, scenario) in scenarios.iter().enumerate() {
            for (number, subject) in turned(&numbered, round) {
                let slot = slot(round, index, number);
                let drain = Drain { subject: &subject, scenario, slot: &slot, end };
                let values = drain.run(arena);
                results.add(part, &scenario.name, &subject.name(), round, values);
            }
        }
    }
}
