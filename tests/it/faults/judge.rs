//! What came out, compared with what went in.
//!
//! The trap: a judge that stops at the first fault. This one counts, so that a table can be published and a failure read.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use crate::support::consumer::Received;

/// What a fault may do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Allowed {
    /// Messages that may come again: a window and what was settled but not told, for each failure in the round.
    pub(super) duplicates: usize,
    /// After a refusal, messages behind the refused one may have come before it (docs/guarantees.md).
    pub(super) reorder: bool,
}

/// One round.
#[derive(Clone, Debug, Default)]
pub(super) struct Outcome {
    pub(super) rows: usize,
    /// Summed over the queues.
    pub(super) lost: usize,
    pub(super) phantom: usize,
    pub(super) reordered: usize,
    /// By the last queue: the stream, which keeps everything that was routed to it, or in a cluster the quorum queue.
    pub(super) duplicates: usize,
    pub(super) recovered: Option<Duration>,
    pub(super) peak_kib: u64,
    pub(super) complaints: Vec<String>,
    pub(super) log: String,
}

impl Outcome {
    /// A round that could not be judged.
    pub(super) fn failed(why: String) -> Self {
        Self { complaints: vec![why], ..Self::default() }
    }

    pub(super) fn of(queues: &[Vec<Received>], truth: &[String]) -> Self {
        let index_of: HashMap<&str, usize> = truth.iter().enumerate().map(|(index, id)| (id.as_str(), index)).collect();
        let mut outcome = Self { rows: truth.len(), ..Self::default() };
        for received in queues {
            outcome.queue(received, &index_of);
        }
        if let Some(last) = queues.last() {
            let distinct: HashSet<_> = last.iter().map(|received| &received.id).collect();
            outcome.duplicates = last.len() - distinct.len();
        }
        outcome
    }

    fn queue(&mut self, received: &[Received], index_of: &HashMap<&str, usize>) {
        let (mut seen, mut highest) = (HashSet::new(), None);
        for received in received {
            let Some(index) = index_of.get(received.id.as_str()) else {
                self.phantom += 1;
                continue;
            };
            if seen.insert(*index) {
                if highest.is_some_and(|highest| *index < highest) {
                    self.reordered += 1;
                }
                highest = highest.max(Some(*index));
            }
        }
        self.lost += index_of.len() - seen.len();
    }

    /// What was not allowed; empty: the round passed.
    pub(super) fn faults(&self, allowed: Allowed) -> Vec<String> {
        let mut faults = self.complaints.clone();
        let mut expect = |is: bool, what: String| {
            if !is {
                faults.push(what);
            }
        };
        expect(self.lost == 0, format!("{} lost", self.lost));
        expect(self.phantom == 0, format!("{} phantom", self.phantom));
        expect(self.reordered == 0 || allowed.reorder, format!("{} reordered", self.reordered));
        let duplicates = self.duplicates;
        expect(duplicates <= allowed.duplicates, format!("{duplicates} duplicates, {} allowed", allowed.duplicates));
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgoutbox::lsn::Lsn;

    fn queue(ids: &str) -> Vec<Received> {
        let received = |id: char| Received {
            id: id.to_string(),
            position: (Lsn::ZERO, 0),
            routing_key: String::new(),
            properties: Default::default(),
            body: Vec::new(),
        };
        ids.chars().map(received).collect()
    }

    fn judge(ids: &str) -> (usize, usize, usize, usize) {
        let truth: Vec<String> = "abcde".chars().map(String::from).collect();
        let outcome = Outcome::of(&[queue(ids)], &truth);
        (outcome.lost, outcome.phantom, outcome.reordered, outcome.duplicates)
    }

    #[test]
    fn the_judge_sees_what_is_lost_invented_out_of_order_and_twice() {
        assert_eq!(judge("abcde"), (0, 0, 0, 0));
        assert_eq!(judge("abde"), (1, 0, 0, 0));
        assert_eq!(judge("abcxde"), (0, 1, 0, 0));
        assert_eq!(judge("abdce"), (0, 0, 1, 0));
        assert_eq!(judge("abcbcde"), (0, 0, 0, 2));
    }
}
