//! How many messages were published from which transactions on, in bounded memory.
//!
//! Asked only after a failover: transactions that the new primary never received are gone from the database, and their
//! messages are not. The trap: a record of every transaction grows for as long as a relay lives. So the younger half of the
//! record is exact, and in the older half neighbours are merged again and again: no message is ever left out of the count,
//! and only a switch point that falls between merged neighbours makes the answer a range instead of a number.

use crate::lsn::Lsn;
use crate::outbox::Position;

/// 24 bytes each. A standby that lags by fewer transactions than half of this gets an exact answer.
const RUNS_MAX: usize = 4096;

/// What was published, in commit order.
#[derive(Clone, Debug, Default)]
pub(super) struct Published {
    runs: Vec<Run>,
    last: Option<Position>,
}

/// Messages of neighbouring transactions.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// Where the commit record of the first transaction starts.
    from: Lsn,
    /// And that of the last.
    to: Lsn,
    messages: u64,
}

/// How many messages were published at or after a position.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Beyond {
    /// These for certain.
    pub at_least: u64,
    /// These if the worst is true of what the record no longer tells apart.
    pub at_most: u64,
}

impl Published {
    /// This message goes to the broker; perhaps not for the first time.
    pub(super) fn add(&mut self, position: Position) {
        if self.last.is_some_and(|last| position <= last) {
            return;
        }
        self.last = Some(position);
        let lsn = position.commit_lsn;
        match self.runs.last_mut() {
            Some(run) if run.from == lsn => run.messages += 1,
            _ => self.runs.push(Run { from: lsn, to: lsn, messages: 1 }),
        }
        if self.runs.len() > RUNS_MAX {
            self.merge();
        }
    }

    /// Of transactions whose commit record starts at `lsn` or later; `None`: nobody knows where the histories part.
    pub(super) fn beyond(&self, lsn: Option<Lsn>) -> Beyond {
        let sum = |part: &dyn Fn(&Run) -> bool| self.runs.iter().filter(|run| part(run)).map(|run| run.messages).sum();
        match lsn {
            Some(lsn) => Beyond { at_least: sum(&|run| run.from >= lsn), at_most: sum(&|run| run.to >= lsn) },
            None => Beyond { at_least: 0, at_most: sum(&|_| true) },
        }
    }

    fn merge(&mut self) {
        let young = self.runs.split_off(self.runs.len() / 2);
        let pairs = self.runs.chunks(2).filter_map(|pair| {
            let (first, last) = (pair.first()?, pair.last()?);
            Some(Run { from: first.from, to: last.to, messages: pair.iter().map(|run| run.messages).sum() })
        });
        self.runs = pairs.chain(young).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(transactions: std::ops::Range<u64>, rows: u64) -> Published {
        let mut published = Published::default();
        for lsn in transactions {
            for seq in 0..rows {
                published.add(Position { commit_lsn: Lsn::new(lsn), seq });
            }
        }
        published
    }

    #[test]
    fn a_transaction_that_commits_at_the_switch_point_is_beyond_it() {
        let published = of(100..110, 3);
        assert_eq!(published.beyond(Some(Lsn::new(109))), Beyond { at_least: 3, at_most: 3 });
        assert_eq!(published.beyond(Some(Lsn::new(110))), Beyond::default());
        assert_eq!(published.beyond(Some(Lsn::new(1))), Beyond { at_least: 30, at_most: 30 });
    }

    #[test]
    fn what_is_published_again_counts_once() {
        let mut published = of(100..110, 3);
        published.add(Position { commit_lsn: Lsn::new(104), seq: 1 });
        published.add(Position { commit_lsn: Lsn::new(109), seq: 2 });
        assert_eq!(published.beyond(Some(Lsn::new(1))).at_least, 30);
    }

    #[test]
    fn an_unknown_switch_point_may_cost_all_and_says_so() {
        assert_eq!(of(100..110, 3).beyond(None), Beyond { at_least: 0, at_most: 30 });
    }

    #[test]
    fn a_long_life_takes_bounded_memory_and_loses_no_message() {
        let published = of(1..1_000_001, 2);
        assert!(published.runs.len() <= RUNS_MAX && published.runs.capacity() <= 4 * RUNS_MAX);
        assert_eq!(published.beyond(Some(Lsn::new(1))), Beyond { at_least: 2_000_000, at_most: 2_000_000 });
        // The young are exact.
        let young = Lsn::new(1_000_001 - RUNS_MAX as u64 / 2);
        assert_eq!(published.beyond(Some(young)), Beyond { at_least: RUNS_MAX as u64, at_most: RUNS_MAX as u64 });
        // The old are a range that holds the truth.
        for lsn in [2, 777, 500_001, 990_000] {
            let (truth, beyond) = (2 * (1_000_001 - lsn), published.beyond(Some(Lsn::new(lsn))));
            assert!(beyond.at_least <= truth && truth <= beyond.at_most, "{lsn}: {beyond:?}");
        }
    }
}
