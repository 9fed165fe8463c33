//! `pgoutbox demo`, as somebody would run it.
//!
//! The trap: a leak is invisible to the program that leaks. So each demo gets a temporary directory of its own, which all
//! its servers, its relay and their keepers name somewhere, and the whole machine is searched for it afterwards.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::servers::processes_of;

const WITHIN: Duration = Duration::from_secs(60);

fn directory() -> TempDir {
    let directory = tempfile::Builder::new().prefix("pgoutbox-demo-").tempdir().unwrap();
    // PostgreSQL runs as someone else when we are root.
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

fn demo(directory: &Path, seconds: &str) -> Child {
    Command::new(env!("CARGO_BIN_EXE_pgoutbox"))
        .args(["demo", "--seconds", seconds])
        .env("TMPDIR", directory)
        // It must not go there.
        .env("DATABASE_URL", "postgres://nobody@127.0.0.1:1/nothing")
        .env("PGOUTBOX__OUTBOX__TABLE", "nowhere.nothing")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn send(child: &Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
}

/// The relay, found by its arguments among the demo's processes.
fn relay_runs(directory: &Path) -> bool {
    processes_of(directory).iter().any(|process| process.trim_end().ends_with("pgoutbox run"))
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < WITHIN, "not within {WITHIN:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn assert_nothing_left_in(directory: &Path) {
    assert_eq!(processes_of(directory), Vec::<String>::new());
    let left: Vec<_> = std::fs::read_dir(directory).unwrap().flatten().map(|entry| entry.path()).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// The words behind a name in the summary.
fn summary<'a>(printed: &'a str, name: &str) -> &'a str {
    let line = printed.lines().rev().find_map(|line| line.trim().strip_prefix(name));
    line.unwrap_or_else(|| panic!("no {name} in\n{printed}")).trim()
}

fn printed(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn demo_delivers_everything_over_a_restart_of_the_broker_and_leaves_nothing_behind() {
    let directory = directory();
    let output = demo(directory.path(), "8").wait_with_output().unwrap();
    let printed = printed(&output);
    assert!(output.status.success(), "{printed}");
    assert_eq!(summary(&printed, "missing"), "0", "{printed}");
    assert!(summary(&printed, "phantom").starts_with("0 "), "{printed}");
    assert_eq!(summary(&printed, "order"), "as committed, in both queues", "{printed}");
    assert!(printed.contains("relay waiting for the broker"), "{printed}");
    assert!(printed.contains("all of them have arrived"), "{printed}");
    assert_nothing_left_in(directory.path());
}

#[test]
fn interrupted_demo_still_judges_and_leaves_nothing_behind() {
    let directory = directory();
    let child = demo(directory.path(), "600");
    wait_until("the relay runs", || relay_runs(directory.path()));
    send(&child, Signal::SIGINT);
    let output = child.wait_with_output().unwrap();
    let printed = printed(&output);
    assert!(output.status.success(), "{printed}");
    assert_eq!(summary(&printed, "missing"), "0", "{printed}");
    assert_nothing_left_in(directory.path());
}

#[test]
fn killed_demo_leaves_nothing_behind() {
    let directory = directory();
    let mut child = demo(directory.path(), "600");
    wait_until("the relay runs", || relay_runs(directory.path()));
    send(&child, Signal::SIGKILL);
    child.wait().unwrap();
    wait_until("the keepers have cleaned up", || {
        processes_of(directory.path()).is_empty() && std::fs::read_dir(directory.path()).unwrap().next().is_none()
    });
}
