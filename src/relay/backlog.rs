//! While rows wait that are late anyway, this thread is a batch job to the kernel (`SCHED_BATCH`, sched(7)): to be woken
//! up is no reason to interrupt who runs.
//!
//! A classic queue confirms almost one by one. Where broker and relay share processors, each confirm wakes up the relay,
//! which takes a processor from the broker for it: both spend more on that than on the message. A batch job waits for its
//! turn, and then finds many confirms. That costs a few milliseconds where the machine is busy, so only rows that are a
//! second late pay it, after an outage or when more is written than the broker takes, and only while they are confirmed one
//! by one.
//!
//! The traps. It is a thread that is a batch job, so only a relay that has its thread for itself may ask for it. It is the
//! operator's decision first: who is scheduled in another way stays so. And where the C library does not know the call
//! (musl), or a filter of system calls forbids it, all is as it was. Lateness is told by two clocks: where the server's is a
//! second behind, all rows are late.

use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use preempt_rt::sched::{Pid, Scheduler, SchedulerParams, get_scheduler, set_scheduler};
use tokio::runtime::{Handle, RuntimeFlavor};

/// So late is a row that a few milliseconds more are nothing; and it must be less late than this when they count again.
const LATE: Duration = Duration::from_secs(1);
const IN_TIME: Duration = Duration::from_millis(500);

/// Among so many late messages this thread slept more than this often: it is woken up for single ones. A quorum queue, which
/// confirms in groups, lets it sleep for dozens at a time, and needs no help.
const MESSAGES: usize = 512;
const SLEEPS: i64 = 64;

/// Whether late rows wait, and what follows from that. Dropped, none wait.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    is_batch: bool,
    is_refused: bool,
    /// Since sleeps were counted last.
    messages: usize,
    sleeps: i64,
}

impl Drop for Backlog {
    fn drop(&mut self) {
        self.none();
    }
}

impl Backlog {
    /// So many messages are on their way, the first of them so long after its commit.
    pub(super) fn sees(&mut self, messages: usize, age: Duration) {
        if self.is_batch {
            if age < IN_TIME {
                self.none();
            }
        } else if age < LATE || self.is_refused {
            self.messages = 0;
        } else {
            if self.messages == 0 {
                self.sleeps = sleeps();
            }
            self.messages += messages;
            if self.messages >= MESSAGES {
                self.messages = 0;
                if sleeps() - self.sleeps > SLEEPS {
                    self.is_batch = change(Scheduler::SCHED_NORMAL, Scheduler::SCHED_BATCH);
                    self.is_refused = !self.is_batch;
                }
            }
        }
    }

    /// Nothing waits.
    pub(super) fn none(&mut self) {
        if std::mem::take(&mut self.is_batch) {
            change(Scheduler::SCHED_BATCH, Scheduler::SCHED_NORMAL);
        }
        self.messages = 0;
    }
}

/// How often this thread has waited for something.
fn sleeps() -> i64 {
    getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.voluntary_context_switches())
}

/// Whether this thread is scheduled so now, and was in the other way.
fn change(from: Scheduler, to: Scheduler) -> bool {
    let is_alone = Handle::try_current().is_ok_and(|runtime| runtime.runtime_flavor() == RuntimeFlavor::CurrentThread);
    let this = Pid::current_thread();
    is_alone
        && get_scheduler(this).is_ok_and(|now| now == from)
        && set_scheduler(this, to, SchedulerParams { priority: 0 }).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scheduler() -> Scheduler {
        get_scheduler(Pid::current_thread()).unwrap()
    }

    /// Late messages, and a nap before each if `naps`.
    fn late(backlog: &mut Backlog, naps: bool) {
        for _ in 0..=MESSAGES {
            if naps {
                std::thread::sleep(Duration::from_micros(1));
            }
            backlog.sees(1, LATE);
        }
    }

    #[tokio::test]
    async fn a_thread_that_is_woken_for_single_late_rows_is_a_batch_job_until_one_is_in_time() {
        let mut backlog = Backlog::default();
        for (milliseconds, expected) in [(500, Scheduler::SCHED_BATCH), (499, Scheduler::SCHED_NORMAL)] {
            late(&mut backlog, true);
            assert_eq!(scheduler(), Scheduler::SCHED_BATCH);
            backlog.sees(1, Duration::from_millis(milliseconds));
            assert_eq!(scheduler(), expected, "at {milliseconds} ms");
        }
        late(&mut backlog, true);
        backlog.none();
        assert_eq!(scheduler(), Scheduler::SCHED_NORMAL);
        late(&mut backlog, true);
        assert_eq!(scheduler(), Scheduler::SCHED_BATCH);
        drop(backlog);
        assert_eq!(scheduler(), Scheduler::SCHED_NORMAL);
    }

    #[tokio::test]
    async fn rows_in_time_and_rows_that_come_together_make_no_batch_job() {
        let mut backlog = Backlog::default();
        late(&mut backlog, false);
        assert_eq!(scheduler(), Scheduler::SCHED_NORMAL);
        for _ in 0..=MESSAGES {
            std::thread::sleep(Duration::from_micros(1));
            backlog.sees(1, LATE.mul_f64(0.999));
        }
        assert_eq!(scheduler(), Scheduler::SCHED_NORMAL);
    }

    #[tokio::test]
    async fn who_is_scheduled_in_another_way_stays_so() {
        assert!(change(Scheduler::SCHED_NORMAL, Scheduler::SCHED_BATCH));
        let mut backlog = Backlog::default();
        late(&mut backlog, true);
        backlog.sees(1, Duration::ZERO);
        assert_eq!(scheduler(), Scheduler::SCHED_BATCH);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_thread_that_others_use_is_left_alone() {
        let mut backlog = Backlog::default();
        late(&mut backlog, true);
        assert_eq!(scheduler(), Scheduler::SCHED_NORMAL);
    }
}
