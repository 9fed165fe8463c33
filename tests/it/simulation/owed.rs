//! Which positions a stream should have been told by now: it bounds what a kill sends again, however much there is to do.
//!
//! The trap: a position settles with the run that it stands in, and not with the row in front of it.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::writers::Row;

/// What is settled is told within this: a status interval and what the fakes may pause.
pub(super) const TOLD_WITHIN: Duration = Duration::from_secs(1);

/// Of one stream.
pub(super) struct Owed {
    /// How many of the sent rows are known to be settled, without a gap.
    proven: usize,
    /// Positions that were sent, each behind so many rows.
    sent: VecDeque<(usize, u64)>,
    /// Those that may be told, and since when.
    due: VecDeque<(Instant, u64)>,
    /// Nothing may be told before.
    from: Instant,
}

impl Owed {
    pub(super) fn new() -> Self {
        Self { proven: 0, sent: VecDeque::new(), due: VecDeque::new(), from: Instant::now() }
    }

    /// A position was sent, behind so many rows.
    pub(super) fn sends(&mut self, rows: usize, lsn: u64) {
        self.sent.push_back((rows, lsn));
    }

    /// Rows were settled, or a position was sent.
    pub(super) fn proves(&mut self, sent: &[Row], known: &[bool]) {
        while sent.get(self.proven).is_some_and(|row| known[*row]) {
            self.proven += 1;
        }
        while let Some((_, lsn)) = self.sent.pop_front_if(|(rows, _)| *rows <= self.proven) {
            self.due.push_back((self.from.max(Instant::now()), lsn));
        }
    }

    /// The sent rows from `first` to before `end` are one run.
    pub(super) fn groups(&mut self, first: usize, end: usize) {
        for (rows, _) in self.sent.iter_mut().filter(|(rows, _)| *rows > first && *rows < end) {
            *rows = end;
        }
    }

    /// Something keeps the relay from telling, for so long from now on: it has its time for all of it afterwards.
    pub(super) fn excuses(&mut self, pause: Duration) {
        self.from = self.from.max(Instant::now() + pause);
        for (at, _) in &mut self.due {
            *at = self.from.max(*at);
        }
    }

    /// The furthest position that should have been told.
    pub(super) fn late(&mut self) -> Option<u64> {
        let mut late = None;
        while let Some((_, lsn)) = self.due.pop_front_if(|(at, _)| at.elapsed() > TOLD_WITHIN) {
            late = Some(lsn);
        }
        late
    }
}
