//! A failing plan becomes a small one: fewer transactions, fewer strikes, a shorter time, fewer kinds, as long as it fails.
//!
//! The trap: less is another simulation, which may fail for another reason. That is a failure too, and easier to read.

use super::faults::{FAULTS, Plan};

/// So many simulations at most.
const ATTEMPTS: u32 = 400;

/// The smallest plan found that fails.
pub(super) fn shrink(plan: &Plan, fails: impl Fn(&Plan) -> bool) -> Plan {
    let (mut smallest, mut attempts) = (plan.clone(), 0);
    let mut attempt = |smallest: &mut Plan, candidate: Plan| {
        attempts += 1;
        let is_better = attempts <= ATTEMPTS && candidate != *smallest && fails(&candidate);
        if is_better {
            *smallest = candidate;
        }
        is_better
    };
    loop {
        let before = smallest.clone();
        for seconds in [1, 2, 5, 10, 20, 40] {
            if seconds < smallest.seconds {
                let candidate = Plan { seconds, ..smallest.clone() };
                attempt(&mut smallest, candidate);
            }
        }
        for transactions in [1, 2, 3, 5, 8, 13, 20] {
            if transactions < smallest.transactions {
                let candidate = Plan { transactions, ..smallest.clone() };
                attempt(&mut smallest, candidate);
            }
        }
        for kind in 0..FAULTS.len() {
            let candidate = Plan { without: smallest.without | 1 << kind, ..smallest.clone() };
            attempt(&mut smallest, candidate);
        }
        for strikes in [0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144] {
            if strikes < smallest.strikes {
                let candidate = Plan { strikes, ..smallest.clone() };
                if attempt(&mut smallest, candidate) {
                    break;
                }
            }
        }
        if smallest == before {
            return smallest;
        }
    }
}

#[test]
fn a_failing_plan_shrinks_to_what_it_takes() {
    // Fails whenever the third kind may strike at least twice in ten seconds.
    let fails = |plan: &Plan| plan.allows(FAULTS[2]) && plan.strikes >= 2 && plan.seconds >= 10;
    let smallest = shrink(&Plan::new(7), fails);
    assert_eq!((smallest.seed, smallest.strikes, smallest.seconds, smallest.transactions), (7, 2, 10, 1));
    assert_eq!(FAULTS.iter().filter(|fault| smallest.allows(**fault)).count(), 1);
}
