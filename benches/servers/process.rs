//! What a process costs, by the kernel.
//!
//! The trap: `/proc/PID/stat` counts in ticks of 10 ms, of which a relay spends few. A process' CPU clock is the same
//! account to the nanosecond, threads that have ended included.

use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::time::ClockId;
use nix::unistd::Pid;

/// CPU time of a process; none when it is gone.
pub(crate) fn cpu(pid: i32) -> Duration {
    let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(pid));
    clock.and_then(ClockId::now).map_or(Duration::ZERO, TimeSpec::into)
}

/// CPU time of the thread that asks.
pub(crate) fn own_cpu() -> Duration {
    ClockId::CLOCK_THREAD_CPUTIME_ID.now().map_or(Duration::ZERO, TimeSpec::into)
}

/// How often its threads went to sleep and were woken.
pub(crate) fn sleeps(pid: i32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let switches = |task: std::fs::DirEntry| field(&task.path().join("status"), "voluntary_ctxt_switches");
    tasks.filter_map(switches).sum()
}

/// Resident memory's high-water mark.
pub(crate) fn peak_kib(pid: i32) -> u64 {
    field(format!("/proc/{pid}/status").as_ref(), "VmHWM").unwrap_or(0)
}

/// Bytes given to `write`: files and pipes, not sockets.
pub(crate) fn written_bytes(pid: i32) -> u64 {
    field(format!("/proc/{pid}/io").as_ref(), "wchar").unwrap_or(0)
}

fn field(file: &std::path::Path, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
