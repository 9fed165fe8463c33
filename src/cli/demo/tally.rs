//! What was committed, what was received, and whether the two agree. Pure: no clock, no socket.
//!
//! The trap: judging order by the relay's own headers alone would let the relay be its own witness. Each service also
//! numbers its rows in the order in which it commits them, and both orders must hold.

use std::collections::{HashMap, HashSet, VecDeque};

use super::text::{grouped, milliseconds};
use crate::lsn::Lsn;

/// Enough to show that messages flow, few enough to read.
const LAST_MAX: usize = 4;
/// About a second of messages: the latency on the screen is that of now.
const RECENT_MAX: usize = 300;

/// What a consumer was given.
#[derive(Clone, Debug)]
pub(super) struct Delivery {
    pub(super) queue: &'static str,
    pub(super) routing_key: String,
    pub(super) id: String,
    /// Headers `x-outbox-lsn` and `x-outbox-seq`.
    pub(super) position: (Lsn, u64),
    /// The service's own count.
    pub(super) number: u64,
    /// Microseconds since 1970, from the row itself: just before its INSERT.
    pub(super) written_us: u64,
    /// Microseconds since 1970.
    pub(super) received_us: u64,
    /// To show.
    pub(super) payload: String,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    written_us: u64,
    latency_us: u64,
}

#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) transactions: u64,
    pub(super) committed: u64,
    pub(super) rolled_back: u64,
    pub(super) deliveries: u64,
    /// The most that ever waited at a time.
    pub(super) waited_max: u64,
    received: HashSet<String>,
    /// By queue: the position and the number of the last first delivery.
    reached: HashMap<&'static str, ((Lsn, u64), u64)>,
    /// The first thing found that must not be: a disorder, or a message that is not as the contract says.
    pub(super) fault: Option<String>,
    samples: Vec<Sample>,
    last: VecDeque<Delivery>,
}

impl Tally {
    pub(super) fn commit(&mut self, rows: u64) {
        self.transactions += 1;
        self.committed += rows;
        self.waited_max = self.waited_max.max(self.waiting());
    }

    pub(super) fn roll_back(&mut self, rows: u64) {
        self.rolled_back += rows;
    }

    pub(super) fn receive(&mut self, delivery: Delivery) {
        self.deliveries += 1;
        if !self.received.insert(delivery.id.clone()) {
            return;
        }
        let now = (delivery.position, delivery.number);
        if let Some(before) = self.reached.insert(delivery.queue, now)
            && (before.0 >= now.0 || before.1 >= now.1)
        {
            let describe = |((lsn, seq), number): ((Lsn, u64), u64)| format!("number {number} (at {lsn}, {seq})");
            let (queue, now, before) = (delivery.queue, describe(now), describe(before));
            self.fault.get_or_insert(format!("queue {queue} received {now} after {before}"));
        }
        let latency_us = delivery.received_us.saturating_sub(delivery.written_us);
        self.samples.push(Sample { written_us: delivery.written_us, latency_us });
        self.last.push_front(delivery);
        self.last.truncate(LAST_MAX);
    }

    pub(super) fn malformed(&mut self, queue: &str, problem: &str) {
        self.fault.get_or_insert(format!("queue {queue} received a message with {problem}"));
    }

    pub(super) fn distinct(&self) -> u64 {
        self.received.len() as u64
    }

    pub(super) fn duplicates(&self) -> u64 {
        self.deliveries - self.distinct()
    }

    /// Committed and not received yet.
    pub(super) fn waiting(&self) -> u64 {
        self.committed.saturating_sub(self.distinct())
    }

    /// Committed but not received, and received but not committed.
    pub(super) fn differences(&self, committed: &HashSet<String>) -> (u64, u64) {
        let missing = committed.difference(&self.received).count();
        let phantom = self.received.difference(committed).count();
        (missing as u64, phantom as u64)
    }

    pub(super) fn recent_latency(&self) -> String {
        latency(self.samples.iter().rev().take(RECENT_MAX).map(|sample| sample.latency_us))
    }

    /// Of what was written outside these times.
    pub(super) fn latency_without(&self, outage_us: Option<(u64, u64)>) -> String {
        let outside = |sample: &&Sample| outage_us.is_none_or(|(from, to)| !(from..=to).contains(&sample.written_us));
        latency(self.samples.iter().filter(outside).map(|sample| sample.latency_us))
    }

    /// The newest first.
    pub(super) fn last_lines(&self) -> Vec<String> {
        let line = |delivery: &Delivery| {
            let id: String = delivery.id.chars().take(8).collect();
            format!("{:<17} {id}…  {}", delivery.routing_key, delivery.payload)
        };
        self.last.iter().map(line).collect()
    }

    pub(super) fn order(&self) -> &'static str {
        if self.fault.is_none() { "in commit order" } else { "NOT IN COMMIT ORDER" }
    }

    pub(super) fn one_line(&self) -> String {
        format!(
            "committed {}  rolled back {}  received {}  waiting {}  duplicates {}  {}  {}",
            grouped(self.committed),
            grouped(self.rolled_back),
            grouped(self.distinct()),
            grouped(self.waiting()),
            grouped(self.duplicates()),
            self.order(),
            self.recent_latency(),
        )
    }
}

fn latency(samples: impl Iterator<Item = u64>) -> String {
    let mut sorted: Vec<u64> = samples.collect();
    sorted.sort_unstable();
    let percentile = |percent: usize| sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1)));
    match (percentile(50), percentile(99)) {
        (Some(half), Some(most)) => format!("p50 {}, p99 {}", milliseconds(*half), milliseconds(*most)),
        _ => "no latency yet".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delivery(id: &str, position: (u64, u64), number: u64) -> Delivery {
        Delivery {
            queue: "billing",
            routing_key: "order.placed".to_owned(),
            id: id.to_owned(),
            position: (Lsn::new(position.0), position.1),
            number,
            written_us: number * 1_000,
            received_us: number * 1_000 + 2_000,
            payload: String::new(),
        }
    }

    #[test]
    fn a_second_delivery_is_a_duplicate_and_no_disorder() {
        let mut tally = Tally::default();
        for (id, position, number) in [("a", (1, 0), 1), ("b", (1, 1), 2), ("a", (1, 0), 1), ("c", (5, 0), 4)] {
            tally.receive(delivery(id, position, number));
        }
        assert_eq!((tally.deliveries, tally.distinct(), tally.duplicates()), (4, 3, 1));
        assert_eq!(tally.fault, None);
    }

    #[test]
    fn either_order_alone_betrays_a_disorder() {
        for (position, number) in [((1, 0), 3), ((3, 0), 1)] {
            let mut tally = Tally::default();
            tally.receive(delivery("a", (2, 0), 2));
            tally.receive(delivery("b", position, number));
            assert!(tally.fault.is_some(), "{position:?} {number}");
        }
    }

    #[test]
    fn missing_and_phantom_messages_are_told_apart() {
        let mut tally = Tally::default();
        tally.receive(delivery("a", (1, 0), 1));
        tally.receive(delivery("b", (2, 0), 2));
        let committed = ["b", "c", "d"].map(str::to_owned).into();
        assert_eq!(tally.differences(&committed), (2, 1));
    }

    #[test]
    fn what_was_written_in_the_outage_does_not_count_as_latency() {
        let mut tally = Tally::default();
        tally.receive(delivery("a", (1, 0), 1));
        tally.receive(Delivery { received_us: 9_000_000, ..delivery("b", (2, 0), 2) });
        assert_eq!(tally.latency_without(Some((1_500, 2_500))), "p50 2.0 ms, p99 2.0 ms");
        assert_eq!(Tally::default().latency_without(None), "no latency yet");
    }
}
