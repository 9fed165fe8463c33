//! Whether trying again can help, and how long to wait before it.
//!
//! The trap: a backoff reset on every successful *connect* turns a peer that accepts and then fails into a hot loop, so
//! the relay resets it only on proof of progress.

use std::time::Duration;

/// What a failure says about the next attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// It may pass: back off, then begin again.
    Later,
    /// Proven to need a human: stop, and say the remedy.
    Never,
}

/// Exponential backoff with jitter: doubles from `first` up to `longest`, each wait between half of it and all of it.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    /// Begins at `first` and never exceeds `longest`.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, next: first }
    }

    /// How long to wait now; the wait after that doubles.
    pub fn wait(&mut self) -> Duration {
        let full = self.next;
        self.next = (full * 2).min(self.longest);
        full / 2 + (full / 2).mul_f64(fastrand::f64())
    }

    /// Progress was proven: the next wait is the first one again.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_its_limit_and_begins_again_after_progress() {
        let (first, longest) = (Duration::from_millis(100), Duration::from_secs(1));
        let mut backoff = Backoff::new(first, longest);
        let mut full = first;
        for _ in 0..20 {
            let wait = backoff.wait();
            assert!(wait >= full / 2 && wait <= full, "{wait:?} of {full:?}");
            full = (full * 2).min(longest);
        }
        backoff.reset();
        assert!(backoff.wait() <= first);
    }
}
