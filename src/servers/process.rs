//! A process that cannot be mistaken for another.
//!
//! The trap: a process id is reused, and a signal sent to a remembered number may hit a stranger. The kernel's start time
//! (`/proc/PID/stat`, field 22, see proc(5)) goes with every id here. A zombie counts as gone: in a container whose first
//! process reaps nobody, an orphaned server stays one for ever.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

/// Short against everything waited for here, long enough to leave the processor to the servers.
const POLL: Duration = Duration::from_millis(5);

/// After the parent died its children leave by themselves; this long, then they are killed one by one.
const ORPHANS_LEAVE_WITHIN: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    /// Clock ticks since boot.
    pub(crate) started: u64,
}

struct Status {
    parent: i32,
    zombie: bool,
    started: u64,
}

impl Process {
    /// The process that has this id now.
    pub(crate) fn find(pid: i32) -> Option<Self> {
        let status = status(pid)?;
        (!status.zombie).then_some(Self { pid, started: status.started })
    }

    pub(super) fn is_running(&self) -> bool {
        Self::find(self.pid).is_some_and(|now| now == *self)
    }

    /// Does nothing to a process that is gone.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        if !self.is_running() {
            return Ok(());
        }
        match signal::kill(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// SIGKILL, then wait until everything it had started is gone too.
    pub(super) fn kill_with_descendants(&self) -> io::Result<bool> {
        // Stopped first: a server that forks between our look and its end would leave a child nobody knows of.
        self.signal(Signal::SIGSTOP)?;
        let mut all = self.descendants();
        all.push(*self);
        self.signal(Signal::SIGKILL)?;
        if gone_within(&all, ORPHANS_LEAVE_WITHIN) {
            return Ok(true);
        }
        for process in &all {
            process.signal(Signal::SIGKILL)?;
        }
        Ok(gone_within(&all, ORPHANS_LEAVE_WITHIN))
    }

    pub(super) fn descendants(&self) -> Vec<Self> {
        let processes = all();
        let mut found: Vec<Self> = Vec::new();
        let mut parents = vec![self.pid];
        while let Some(parent) = parents.pop() {
            for (pid, status) in processes.iter().filter(|(_, status)| status.parent == parent && !status.zombie) {
                found.push(Self { pid: *pid, started: status.started });
                parents.push(*pid);
            }
        }
        found
    }
}

pub(super) fn gone_within(processes: &[Process], within: Duration) -> bool {
    true_within(within, || processes.iter().all(|process| !process.is_running()))
}

/// Polls, because the servers' own announcements are files and sockets. Asks at least once, and once more at the end.
pub(super) fn true_within(within: Duration, mut is_so: impl FnMut() -> bool) -> bool {
    let begun = Instant::now();
    loop {
        let last = begun.elapsed() >= within;
        if is_so() {
            return true;
        }
        if last {
            return false;
        }
        thread::sleep(POLL);
    }
}

fn all() -> Vec<(i32, Status)> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, status(pid)?)))
        .collect()
}

fn status(pid: i32) -> Option<Status> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    // Field 2 is the program's name in parentheses and may itself hold spaces and parentheses.
    let (_, after_name) = stat.rsplit_once(") ")?;
    let field = |number: usize| after_name.split(' ').nth(number - 3);
    Some(Status {
        parent: field(4)?.parse().ok()?,
        zombie: matches!(field(3)?, "Z" | "X"),
        started: field(22)?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_zombie_counts_as_gone() {
        let mut child = Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert!(true_within(Duration::from_secs(10), || Process::find(pid).is_none()));
        assert!(child.wait().unwrap().success());
    }

    #[test]
    fn another_process_with_the_same_id_is_not_ours() {
        let own = Process::find(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(own.is_running());
        let stranger = Process { started: own.started + 1, ..own };
        assert!(!stranger.is_running());
        stranger.signal(Signal::SIGKILL).unwrap();
    }

    #[test]
    fn a_kill_takes_the_descendants_too() {
        let mut child = Command::new("sh").args(["-c", "sleep 600 & wait"]).spawn().unwrap();
        let shell = Process::find(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(true_within(Duration::from_secs(10), || shell.descendants().len() == 1));
        let descendants = shell.descendants();
        assert!(shell.kill_with_descendants().unwrap());
        assert!(gone_within(&descendants, Duration::ZERO));
        child.wait().unwrap();
    }
}
