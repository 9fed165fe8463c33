//! What a process costs, by the kernel.
//!
//! The trap: `/proc/PID/stat` counts in ticks of 10 ms, of which a relay spends few. The scheduler's own account is in
//! nanoseconds, a thread at a time.

use std::time::Duration;

/// CPU time of all threads that live.
pub(crate) fn cpu(pid: i32) -> Duration {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.map(|task| spent(&task.path().join("schedstat"))).sum()
}

/// CPU time of the thread that asks.
pub(crate) fn own_cpu() -> Duration {
    spent("/proc/thread-self/schedstat".as_ref())
}

fn spent(schedstat: &std::path::Path) -> Duration {
    let text = std::fs::read_to_string(schedstat).unwrap_or_default();
    Duration::from_nanos(text.split(' ').next().and_then(|spent| spent.parse().ok()).unwrap_or(0))
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
