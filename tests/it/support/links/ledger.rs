//! What both links saw, and whether it is right: Postgres is told nothing that the broker has not confirmed.
//!
//! The traps. A status may get lost on its way, and a server killed hard forgets what it was told, so the told position
//! may fall from one connection to the next, and never within one. What lies at or below a told position was proven settled
//! when it was told, and is forgotten here: a million rows cost one range.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use pgoutbox::lsn::Lsn;

/// More say nothing new.
const VIOLATIONS_MAX: usize = 50;

/// Where a message stands: its transaction's commit record, and its number among the rows.
pub(crate) type Position = (Lsn, i64);

/// How much passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) publishes: u64,
    /// Messages acked, by however many frames; also those that were returned before.
    pub(crate) confirms: u64,
    pub(crate) returns: u64,
    pub(crate) nacks: u64,
    pub(crate) statuses: u64,
    pub(crate) keepalives: u64,
    /// Those of them in the middle of a transaction.
    pub(crate) keepalives_inside: u64,
    /// Those in replication mode.
    pub(crate) postgres_connections: u64,
    pub(crate) amqp_connections: u64,
}

/// One replication connection's share.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    id: u64,
    /// Where START_REPLICATION began.
    start: Lsn,
    /// The last flush on this connection.
    flush: Lsn,
}

#[derive(Clone, Copy)]
struct Transaction {
    end: Lsn,
    rows: i64,
}

/// Who may tell a position.
#[derive(Clone, Copy, PartialEq)]
enum Origin {
    /// The end of a commit: everybody.
    Commit,
    /// A keepalive: the connection that got it, and one that began there.
    Keepalive(u64),
}

#[derive(Default)]
struct State {
    start: Lsn,
    told: Lsn,
    highest: Lsn,
    streams: u64,
    counts: Counts,
    violations: Vec<String>,
    /// By commit record: complete, with rows, not yet told.
    transactions: BTreeMap<Lsn, Transaction>,
    /// By commit record: first row -> row after the last, of what the broker confirmed.
    settled: BTreeMap<Lsn, BTreeMap<i64, i64>>,
    /// Positions that were seen.
    known: BTreeMap<Lsn, Origin>,
}

/// What the two links of one relay saw, over many connections.
#[derive(Clone)]
pub(crate) struct Ledger {
    state: Arc<Mutex<State>>,
}

impl Ledger {
    /// For a slot that stands at `start`.
    pub(crate) fn new(start: Lsn) -> Self {
        let ledger = Self { state: Arc::default() };
        ledger.reset(start);
        ledger
    }

    /// Begins anew, while nothing is in flight.
    pub(crate) fn reset(&self, start: Lsn) {
        let mut state = self.state();
        // Connections live on: their numbers must not come again.
        let streams = state.streams;
        *state = State { start, told: start, highest: start, streams, ..State::default() };
    }

    /// Every broken assertion; none is good.
    pub(crate) fn violations(&self) -> Vec<String> {
        self.state().violations.clone()
    }

    pub(crate) fn counts(&self) -> Counts {
        self.state().counts
    }

    /// The highest flush the relay has ever told, arrived or not.
    pub(crate) fn told(&self) -> Lsn {
        self.state().told
    }

    pub(crate) fn violation(&self, text: String) {
        self.state().violation(text);
    }

    pub(crate) fn count(&self, count: impl FnOnce(&mut Counts)) {
        count(&mut self.state().counts);
    }

    /// A replication connection begins to stream.
    pub(crate) fn started(&self, from: Lsn) -> Stream {
        let mut state = self.state();
        state.streams += 1;
        if from > state.told {
            if !state.known.contains_key(&from) {
                state.violation(format!("START_REPLICATION at {from}, a position never seen"));
            }
            state.assert_settled(from, "START_REPLICATION at");
        }
        Stream { id: state.streams, start: from, flush: from }
    }

    /// A whole transaction is about to reach the relay.
    pub(crate) fn committed(&self, commit: Lsn, end: Lsn, rows: i64) {
        let mut state = self.state();
        state.highest = state.highest.max(end);
        state.known.insert(end, Origin::Commit);
        if end > state.told && rows > 0 {
            state.transactions.insert(commit, Transaction { end, rows });
        }
    }

    /// A keepalive is about to reach the relay.
    pub(crate) fn keepalive(&self, stream: &Stream, wal_end: Lsn, in_transaction: bool) {
        let mut state = self.state();
        state.counts.keepalives += 1;
        state.counts.keepalives_inside += u64::from(in_transaction);
        if !in_transaction {
            state.highest = state.highest.max(wal_end);
            let origin = state.known.entry(wal_end).or_insert(Origin::Keepalive(stream.id));
            if *origin != Origin::Commit {
                *origin = Origin::Keepalive(stream.id);
            }
        }
    }

    /// The relay tells Postgres.
    pub(crate) fn status(&self, stream: &mut Stream, write: Lsn, flush: Lsn) {
        let mut state = self.state();
        state.counts.statuses += 1;
        if flush < stream.flush {
            state.violation(format!("flush {flush} after {} on the same connection", stream.flush));
        }
        if flush > write {
            state.violation(format!("flush {flush} beyond write {write}"));
        }
        let may_be_told = match state.known.get(&flush) {
            Some(Origin::Commit) => true,
            Some(Origin::Keepalive(id)) => *id == stream.id,
            None => false,
        };
        if !may_be_told && ![stream.start, state.start, state.told].contains(&flush) {
            let highest = state.highest;
            state.violation(format!(
                "flush {flush} is neither the end of a commit nor a keepalive's position outside a transaction (highest \
                 seen: {highest})"
            ));
        }
        state.assert_settled(flush, "flush");
        stream.flush = stream.flush.max(flush);
        state.tell(flush);
    }

    /// The relay publishes; `last` is the one before on the same connection.
    pub(crate) fn published(&self, last: Option<Position>, next: Position) {
        let mut state = self.state();
        state.counts.publishes += 1;
        let hole = match last {
            Some(last) if next <= last => Some(format!("which does not rise after {last:?}")),
            Some(last) if next.0 == last.0 => (next.1 != last.1 + 1).then(|| format!("with a hole after {last:?}")),
            Some(last) => state.hole_between(last, next),
            None => state.hole_before(next),
        };
        if let Some(hole) = hole {
            state.violation(format!("publish of {next:?}, {hole}"));
        }
    }

    /// The broker's ack of a message that it did not return is about to reach the relay.
    pub(crate) fn settled(&self, (commit, row): Position) {
        let mut state = self.state();
        // A commit record that starts before a told position ends at or before it.
        if commit >= state.told {
            add(state.settled.entry(commit).or_default(), row);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl State {
    fn violation(&mut self, text: String) {
        if self.violations.len() < VIOLATIONS_MAX {
            self.violations.push(text);
        }
    }

    /// How many rows from the first on are settled.
    fn prefix(&self, commit: Lsn) -> i64 {
        self.settled.get(&commit).and_then(|ranges| ranges.get(&0)).copied().unwrap_or(0)
    }

    fn assert_settled(&mut self, lsn: Lsn, what: &str) {
        let below = self.transactions.iter().take_while(|(_, transaction)| transaction.end <= lsn);
        let unsettled: Vec<String> = below
            .filter(|(commit, transaction)| self.prefix(**commit) < transaction.rows)
            .map(|(commit, Transaction { end, rows })| {
                let prefix = self.prefix(*commit);
                format!(
                    "{what} {lsn}: of the transaction {commit} (end {end}) only {prefix} of {rows} rows are settled"
                )
            })
            .collect();
        unsettled.into_iter().for_each(|text| self.violation(text));
    }

    /// Forgets what need not be asked again.
    fn tell(&mut self, flush: Lsn) {
        self.known = self.known.split_off(&flush);
        if flush > self.told {
            self.told = flush;
            self.transactions.retain(|_, transaction| transaction.end > flush);
            self.settled = self.settled.split_off(&flush);
        }
    }

    /// The run on this connection goes from one transaction to another.
    fn hole_between(&self, last: Position, next: Position) -> Option<String> {
        if next.1 != 0 {
            return Some(format!("not its transaction's first row, after {last:?}"));
        }
        if let Some(Transaction { rows, .. }) = self.transactions.get(&last.0)
            && last.1 + 1 != *rows
        {
            return Some(format!("after {last:?}, which is not the last of {rows} rows"));
        }
        let after = (std::ops::Bound::Excluded(last.0), std::ops::Bound::Excluded(next.0));
        let skipped = self.transactions.range(after).next();
        skipped.map(|(commit, _)| format!("after {last:?}: the transaction {commit} is skipped"))
    }

    /// A run begins: at or before the first unsettled message.
    fn hole_before(&self, next: Position) -> Option<String> {
        let mut before = self.transactions.range(..next.0);
        let unsettled = before.find(|(commit, transaction)| self.prefix(**commit) < transaction.rows);
        if let Some((commit, _)) = unsettled {
            return Some(format!("first of its connection, while {commit} is not settled"));
        }
        let prefix = self.prefix(next.0);
        (next.0 >= self.told && next.1 > prefix)
            .then(|| format!("first of its connection, while only {prefix} rows before it are settled"))
    }
}

/// Adds one row to the ranges.
fn add(ranges: &mut BTreeMap<i64, i64>, row: i64) {
    let (mut from, mut to) = (row, row + 1);
    if let Some((&before, &end)) = ranges.range(..=row).next_back()
        && end >= row
    {
        from = before;
        to = to.max(end);
    }
    if let Some(&end) = ranges.get(&to) {
        ranges.remove(&to);
        to = end;
    }
    ranges.insert(from, to);
}
