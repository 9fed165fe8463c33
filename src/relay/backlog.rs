//! While rows wait that are late anyway, this thread is a batch job to the kernel (`SCHED_BATCH`, sched(7)): to be woken
//! up is no reason to interrupt who runs.
//!
//! A classic queue confirms almost one by one. Where broker and relay share processors, each confirm wakes up the relay,
//! which takes a processor from the broker for it: both spend more on that than on the message. A batch job waits for its
//! turn, and then finds many confirms. That costs a few milliseconds where the machine is busy, so only rows that are a
//! second late pay it: after an outage, or when more is written than the broker takes.
//!
//! The traps. It is a thread that is a batch job, so only a relay that has its thread for itself may ask for it. It is the
//! operator's decision first: who is scheduled in another way stays so. And where the C library does not know the call
//! (musl), or a filter of system calls forbids it, all is as it was.

use std::time::Duration;

use preempt_rt::sched::{Pid, Scheduler, SchedulerParams, get_scheduler, set_scheduler};
use tokio::runtime::{Handle, RuntimeFlavor};

/// So late is a row that a few milliseconds more are nothing; and it must be less late than this when they count again.
const LATE: Duration = Duration::from_secs(1);
const IN_TIME: Duration = Duration::from_millis(500);

/// Whether late rows wait, and what follows from that. Dropped, none wait.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    is_batch: bool,
    is_refused: bool,
}

impl Drop for Backlog {
    fn drop(&mut self) {
        self.none();
    }
}

impl Backlog {
    /// A row is on its way, so long after its commit.
    pub(super) fn sees(&mut self, age: Duration) {
        if self.is_batch && age < IN_TIME {
            self.none();
        } else if !self.is_batch && !self.is_refused && age >= LATE {
            self.is_batch = change(Scheduler::SCHED_NORMAL, Scheduler::SCHED_BATCH);
            self.is_refused = !self.is_batch;
        }
    }

    /// Nothing waits.
    pub(super) fn none(&mut self) {
        if std::mem::take(&mut self.is_batch) {
            change(Scheduler::SCHED_BATCH, Scheduler::SCHED_NORMAL);
        }
    }
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

    #[tokio::test]
    async fn a_thread_is_a_batch_job_from_a_late_row_to_one_in_time() {
        let mut backlog = Backlog::default();
        for (milliseconds, expected) in [
            (999, Scheduler::SCHED_NORMAL),
            (1000, Scheduler::SCHED_BATCH),
            (500, Scheduler::SCHED_BATCH),
            (499, Scheduler::SCHED_NORMAL),
            (999, Scheduler::SCHED_NORMAL),
            (1000, Scheduler::SCHED_BATCH),
        ] {
            backlog.sees(Duration::from_millis(milliseconds));
            assert_eq!(scheduler(), expected, "at {milliseconds} ms");
        }
        backlog.none();
        assert_eq!(scheduler(), Scheduler::SCHED_NORMAL);
        backlog.sees(LATE);
        drop(backlog);
        assert_eq!(scheduler(), Scheduler::SCHED_NORMAL);
    }

    #[tokio::test]
    async fn who_is_scheduled_in_another_way_stays_so() {
        assert!(change(Scheduler::SCHED_NORMAL, Scheduler::SCHED_BATCH));
        let mut backlog = Backlog::default();
        backlog.sees(LATE);
        backlog.sees(Duration::ZERO);
        assert_eq!(scheduler(), Scheduler::SCHED_BATCH);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_thread_that_others_use_is_left_alone() {
        let mut backlog = Backlog::default();
        backlog.sees(LATE);
        assert_eq!(scheduler(), Scheduler::SCHED_NORMAL);
    }
}
