//! The right to publish. It lapses when this process did not run, or did not hear Postgres, for half of the time after which
//! Postgres gives the slot to another.
//!
//! The traps. A process that was stopped, or a machine that slept, wakes up with its buffers full and its timers wrong:
//! `CLOCK_MONOTONIC` stands still while the machine sleeps, so `CLOCK_BOOTTIME` is asked as well. And what wakes first must
//! not hide the gap from the rest: whoever sees it ends the session.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::time::{Instant, sleep};

use super::Error;

/// A beat that comes late is none that is missed.
const BEATS_IN_LIMIT: u32 = 6;

/// Shared by reader and publisher of one session.
pub(super) struct Lease {
    limit: Duration,
    began: (Instant, Duration),
    /// Nanoseconds since it began.
    ran: AtomicU64,
    heard: AtomicU64,
    is_listening: AtomicBool,
    is_over: AtomicBool,
}

impl Lease {
    /// Of a stream that may be silent for so long.
    pub(super) fn new(silence_max: Duration) -> Self {
        let began = (Instant::now(), since_boot());
        Self {
            limit: silence_max / 2,
            began,
            ran: AtomicU64::new(0),
            heard: AtomicU64::new(0),
            is_listening: AtomicBool::new(true),
            is_over: AtomicBool::new(false),
        }
    }

    /// Something came from Postgres.
    pub(super) fn hear(&self) {
        self.heard.fetch_max(self.now(), Ordering::Relaxed);
    }

    /// Whether the stream is being read. While it is not, because the channel is full or the session ends, nothing can be
    /// heard: what was read before, one channel at most, may still go. To wait for a sign of life then would be to wait for
    /// ourselves.
    pub(super) fn listen(&self, is_listening: bool) {
        if self.is_listening.swap(is_listening, Ordering::Relaxed) != is_listening {
            self.hear();
        }
    }

    /// Whether Postgres was heard lately.
    pub(super) fn is_fresh(&self) -> bool {
        !self.is_listening.load(Ordering::Relaxed)
            || self.now() - self.heard.load(Ordering::Relaxed).min(self.now()) <= nanos(self.limit)
    }

    /// The stream is gone.
    pub(super) fn end(&self) {
        self.is_over.store(true, Ordering::Relaxed);
    }

    /// Whether the stream is gone: what was not published yet is for the next session.
    pub(super) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    /// The process runs.
    ///
    /// # Errors
    /// When it did not for so long that another relay may have the slot.
    pub(super) fn beat(&self) -> Result<(), Error> {
        let now = self.now();
        let gap = Duration::from_nanos(now.saturating_sub(self.ran.fetch_max(now, Ordering::Relaxed)));
        if gap > self.limit { Err(Error::Paused { gap }) } else { Ok(()) }
    }

    /// Beats until the process did not run for too long, and says so. A station that waits for a peer does not beat, and is
    /// no sign of that.
    pub(super) async fn keep(&self) -> Error {
        loop {
            sleep(self.limit / BEATS_IN_LIMIT).await;
            if let Err(error) = self.beat() {
                return error;
            }
        }
    }

    /// The larger of both clocks: one stands still while the machine sleeps, the other while a test has paused time.
    fn now(&self) -> u64 {
        nanos(self.began.0.elapsed().max(since_boot().saturating_sub(self.began.1)))
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Zero where the clock is unknown: the other one remains.
fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_process_that_did_not_run_loses_it_and_only_once() {
        let lease = Lease::new(Duration::from_secs(10));
        tokio::time::advance(Duration::from_secs(4)).await;
        lease.beat().unwrap();
        tokio::time::advance(Duration::from_secs(4)).await;
        lease.beat().unwrap();
        tokio::time::advance(Duration::from_secs(6)).await;
        assert!(matches!(lease.beat(), Err(Error::Paused { gap }) if gap >= Duration::from_secs(6)));
        lease.beat().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_runs_keeps_it_however_long_its_stations_wait() {
        let lease = Lease::new(Duration::from_secs(10));
        assert!(timeout(Duration::from_secs(60), lease.keep()).await.is_err());
        lease.beat().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_was_not_heard_is_stale_until_it_is_heard_again() {
        let lease = Lease::new(Duration::from_secs(10));
        tokio::time::advance(Duration::from_secs(6)).await;
        assert!(!lease.is_fresh());
        lease.hear();
        assert!(lease.is_fresh());
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_listen_is_not_kept_waiting_for_a_sign_of_life() {
        let lease = Lease::new(Duration::from_secs(10));
        lease.listen(false);
        tokio::time::advance(Duration::from_secs(6)).await;
        assert!(lease.is_fresh());
        lease.listen(true);
        assert!(lease.is_fresh());
        tokio::time::advance(Duration::from_secs(6)).await;
        assert!(!lease.is_fresh());
    }
}
