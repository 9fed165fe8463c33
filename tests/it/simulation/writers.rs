//! What the applications write in a seed: transactions at positions and times, and what becomes of their rows.

use std::time::Duration;

use super::faults::{Dice, Fault, Plan};

/// How long the writers may take between two transactions, and where the WAL begins.
const GAP_MAX: u64 = 3000;
pub(super) const WAL_START: u64 = 1000;

/// So many rows of megabytes at most: they cost time.
const LARGE_ROWS: u32 = 3;

/// A row by its number: rows are numbered in commit order.
pub(super) type Row = usize;

/// A piece of WAL.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// When it is there.
    pub(super) at: Duration,
    pub(super) commit_lsn: u64,
    pub(super) end_lsn: u64,
    /// Outbox rows; none: other tables' WAL, of which only the position is seen.
    pub(super) rows: std::ops::Range<Row>,
    /// In which partitions they are, in turn.
    pub(super) partitions: Vec<u32>,
}

impl Entry {
    /// The partition that holds the row.
    pub(super) fn partition(&self, row: Row) -> u32 {
        self.partitions[(row - self.rows.start) % self.partitions.len()]
    }
}

/// What became of a row.
#[derive(Clone, Debug, Default)]
pub(super) struct Fate {
    /// In which transaction, and which of its rows.
    pub(super) name: (usize, usize),
    /// The broker holds it and has said so.
    pub(super) acknowledged: bool,
    /// A failover has undone its transaction.
    pub(super) undone: bool,
    /// The broker has refused it at least once; and refuses it so many times more.
    pub(super) refused: bool,
    pub(super) refusals: u32,
    /// Bytes of its payload.
    pub(super) size: usize,
    /// It can never be a message; the broker could never take it.
    pub(super) poisoned: bool,
    pub(super) inadmissible: bool,
    /// An operator has done what the relay advised, and skipped it.
    pub(super) skipped: bool,
}

/// What the applications write in this seed.
pub(super) fn write(plan: &Plan, random: &mut fastrand::Rng, dice: &mut Dice) -> (Vec<Entry>, Vec<Fate>) {
    let (mut wal, mut rows) = (Vec::new(), Vec::new());
    let (mut lsn, mut at, mut burst) = (WAL_START, 0, 0);
    let (mut huge, mut cluster, mut large) = (false, 0, 0);
    for number in 0..random.u32(5..40).min(plan.transactions) {
        if dice.strikes(Fault::Burst) {
            burst = random.u32(3..10);
        }
        burst = burst.saturating_sub(1);
        at += if burst > 0 { 0 } else { random.u64(0..GAP_MAX) };
        if dice.strikes(Fault::LongSilence) {
            at += random.u64(20_000..40_000);
        }
        // Sometimes nothing lies between two commits, sometimes much.
        let between = if random.u8(..) < 20 { random.u64(..1_000_000) * 8 } else { random.u64(0..3) * 8 };
        let commit_lsn = lsn + between;
        let end_lsn = commit_lsn + 48;
        lsn = end_lsn;
        let mut count = if random.u8(..) < 180 { random.usize(1..12) } else { 0 };
        if !huge && plan.transactions > 1 && dice.strikes(Fault::HugeTransaction) {
            (huge, count) = (true, random.usize(200..1500));
        }
        if dice.strikes(Fault::Undeliverables) {
            cluster = 3;
        }
        if cluster > 0 {
            cluster -= 1;
            at = wal.last().map_or(at, |last: &Entry| last.at.as_millis() as u64);
        }
        let first = rows.len();
        for row in 0..count {
            let is_large = large < LARGE_ROWS && dice.strikes(Fault::LargeRow);
            large += u32::from(is_large);
            let size = if is_large { random.usize(500_000..3_000_000) } else { 2 };
            let (is_first, is_bad) = (row == 0, cluster > 0 && random.u8(..) < 40);
            let poisoned = is_first && dice.strikes(Fault::Poison) || is_bad && random.bool();
            let inadmissible = is_first && dice.strikes(Fault::Inadmissible) || is_bad && !poisoned;
            rows.push(Fate { name: (number as usize, row), size, poisoned, inadmissible, ..Fate::default() });
        }
        // Each name is a partition of its own.
        let mut partitions = vec![if dice.strikes(Fault::UnknownPartition) { number } else { 0 }];
        if dice.strikes(Fault::Partitions) {
            partitions.extend([0, number, 100 + number]);
        }
        wal.push(Entry { at: Duration::from_millis(at), commit_lsn, end_lsn, rows: first..rows.len(), partitions });
    }
    (wal, rows)
}
