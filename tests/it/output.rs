//! Where a relay writes: a log that cannot be written, a standard output that is full, closed or never read.
//!
//! The traps. `eprintln!` panics when its line cannot be written, and libraries use it to say that a line could not be written.
//! And a line that a full disk cut short must not swallow the one that comes when there is room again.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use crate::support::consumer::Consumer;
use crate::support::relay::{Relay, Way, environment, pgoutbox};
use crate::support::{Outbox, eventually, shared_postgres, shared_rabbitmq};

/// `EX_UNAVAILABLE`.
const UNAVAILABLE: i32 = 69;

/// What [`Relay::stop`] returns of a process that has no exit code.
const BY_A_SIGNAL: i32 = -1;

/// Every write to it fails: no space left on device.
fn full() -> File {
    OpenOptions::new().write(true).open("/dev/full").unwrap()
}

/// Every write to it fails: broken pipe.
fn unread() -> PipeWriter {
    std::io::pipe().unwrap().1
}

async fn outbox() -> Outbox {
    Outbox::create(shared_postgres(), shared_rabbitmq()).await
}

/// A relay with something to say all the time delivers, comes back from a session that ended, and stops in order.
async fn delivers_without_a_log(log: impl Into<Stdio>) {
    let outbox = outbox().await;
    let consumer = Consumer::start(&outbox).await;
    let relay = Relay::start_by(Way { stderr: Some(log.into()), ..Way::default() }, &outbox, &[]);
    relay.ready().await;
    outbox.insert("placed").await;
    consumer.wait_distinct(1).await;
    let sql = "select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = ";
    outbox.sql(&format!("{sql}'{}'", outbox.name)).await;
    eventually("a session ends", || async { relay.metric("pgoutbox_sessions_total{end=\"postgres\"}") >= 1.0 }).await;
    outbox.insert("paid").await;
    consumer.wait_distinct(2).await;
    relay.ready().await;
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_on_a_full_disk_keeps_nothing_from_being_delivered() {
    delivers_without_a_log(full()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_nobody_reads_any_more_keeps_nothing_from_being_delivered() {
    delivers_without_a_log(unread()).await;
}

/// The signal ends the wait for a reader: that is no room. Within the first moments, which is where a line is waited for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_is_heard_while_the_log_waits_for_a_reader() {
    let outbox = outbox().await;
    for milliseconds in (40..200).step_by(20) {
        let (_reader, mut log) = std::io::pipe().unwrap();
        log.write_all(&[b'x'; 65_536]).unwrap();
        let relay = Relay::start_by(Way { stderr: Some(log.into()), ..Way::default() }, &outbox, &[]);
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
        let code = relay.stop_within(Duration::from_secs(15));
        // Or by the signal itself, where that came before the relay listened for it.
        assert!(code == 0 || code == BY_A_SIGNAL, "{code} after {milliseconds} ms");
    }
}

/// Once it is full, a line would wait for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_is_open_and_never_read_keeps_nothing_from_being_delivered() {
    /// What a pipe holds.
    const PIPE_BYTES: usize = 65_536;
    let (mut reader, mut log) = std::io::pipe().unwrap();
    log.write_all(&[b'x'; PIPE_BYTES]).unwrap();
    let copy = log.try_clone().unwrap();
    let mut full = [PollFd::new(copy.as_fd(), PollFlags::POLLOUT)];
    assert_eq!(poll(&mut full, PollTimeout::ZERO).unwrap(), 0, "the pipe takes more");
    delivers_without_a_log(log).await;
    let outbox = outbox().await;
    let relay = Relay::start_by(Way { stderr: Some(copy.into()), ..Way::default() }, &outbox, &[]);
    relay.ready().await;
    // Somebody reads again, and learns what he missed.
    reader.read_exact(&mut [0; PIPE_BYTES]).unwrap();
    assert_eq!(relay.stop(), 0);
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
    assert!(said.contains("lines of the log are lost") && said.contains("stopped"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exit_code_is_the_same_where_its_reason_cannot_be_written() {
    let outbox = outbox().await;
    outbox.sql(&format!("select pg_drop_replication_slot('{}')", outbox.name)).await;
    for log in [Stdio::from(full()), Stdio::from(unread())] {
        let relay = Relay::start_by(Way { stderr: Some(log), ..Way::default() }, &outbox, &[]);
        assert_eq!(relay.exit_code(), 78);
    }
    let mut usage = pgoutbox();
    usage.args(["run", "--set", "no.key=1"]).stderr(full());
    assert_eq!(usage.status().unwrap().code(), Some(64));
}

/// A verb for this outbox, and what it said on standard error.
fn verb(outbox: &Outbox, arguments: &[&str], out: impl Into<Stdio>) -> (Option<i32>, String) {
    let mut verb: Command = pgoutbox();
    verb.args(arguments).envs(environment(&outbox.url, &outbox.amqp, &outbox.name));
    let output = verb.stdout(out).stderr(Stdio::piped()).output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_verb_cannot_print_is_an_error_and_no_bug() {
    let outbox = outbox().await;
    let verbs: [&[&str]; 8] = [
        &["run", "--print-config"],
        &["init"],
        &["init", "--print-sql"],
        &["check"],
        &["check", "--json"],
        &["status"],
        &["config", "example"],
        &["drop", "--yes"],
    ];
    for arguments in verbs {
        let (code, said) = verb(&outbox, arguments, full());
        assert_eq!(code, Some(UNAVAILABLE), "{arguments:?} on a full disk: {said}");
        assert!(said.contains("cannot print: No space left on device"), "{arguments:?}: {said}");
        // As `pgoutbox check | head -1` would have it. What there was to do is done.
        let (code, said) = verb(&outbox, arguments, unread());
        assert_eq!((code, said.as_str()), (Some(0), ""), "{arguments:?} in a pipe that nobody reads");
    }
}

fn to_stdout(out: impl Into<Stdio>) -> Way {
    Way { stdout: Some(out.into()), ..Way::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_standard_output_is_waited_for_and_nothing_is_told() {
    let outbox = outbox().await;
    let before = outbox.current().await;
    outbox.insert("placed").await;
    let relay = Relay::start_by(to_stdout(full()), &outbox, &[("sink", "stdout")]);
    let reason = || async { relay.get("/readyz").1.contains("standard output: No space left on device") };
    eventually("readiness says why", reason).await;
    let failed = || async { relay.metric("pgoutbox_sessions_total{end=\"broker\"}") >= 2.0 };
    eventually("it is tried again", failed).await;
    assert!(outbox.confirmed().await <= before, "the slot was moved past what nobody has");
    assert_eq!(relay.stop(), 0);
    let settings = [("sink", "stdout"), ("run.give_up_after", "1s")];
    let (code, log) = Relay::start_by(to_stdout(full()), &outbox, &settings).ended();
    assert_eq!(code, UNAVAILABLE, "{log}");
    assert!(log.contains("exit 69: gave up") && log.contains("No space left on device"), "{log}");
    assert!(outbox.confirmed().await <= before, "the slot was moved past what nobody has");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standard_output_that_nobody_reads_any_more_ends_the_relay_and_nothing_is_told() {
    let outbox = outbox().await;
    let before = outbox.current().await;
    outbox.insert("placed").await;
    let (code, log) = Relay::start_by(to_stdout(unread()), &outbox, &[("sink", "stdout")]).ended();
    assert_eq!(code, UNAVAILABLE, "{log}");
    assert!(log.contains("exit 69: standard output: ") && log.contains("nobody reads it any more. Remedy: "), "{log}");
    assert!(outbox.confirmed().await <= before, "the slot was moved past what nobody has");
}

/// Of a line that is whole.
fn id(line: &str) -> Option<String> {
    Some(serde_json::from_str::<serde_json::Value>(line).ok()?["id"].to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_that_a_full_disk_cut_short_comes_again_whole_and_alone() {
    const ROWS: usize = 60;
    let outbox = outbox().await;
    for _ in 0..ROWS {
        outbox.insert("placed").await;
    }
    let out = tempfile::NamedTempFile::new().unwrap();
    // A limit on files stands for a disk; 10,001 bytes are no whole number of lines.
    let under = ["prlimit", "--fsize=10001:unlimited", "--", "sh", "-c", "trap '' XFSZ; exec \"$0\" \"$@\""];
    let way = Way { under: under.map(str::to_owned).into(), ..to_stdout(out.reopen().unwrap()) };
    let relay = Relay::start_by(way, &outbox, &[("sink", "stdout")]);
    eventually("the disk is full", || async { relay.get("/readyz").1.contains("standard output: File too large") })
        .await;
    let lines = || -> Vec<String> {
        let text = std::fs::read_to_string(out.path()).unwrap();
        text.lines().map(str::to_owned).collect()
    };
    assert_eq!(id(lines().last().unwrap()), None, "no line was cut short");
    let mut room = Command::new("prlimit");
    room.arg("--pid").arg(relay.pid().to_string()).arg("--fsize=unlimited");
    assert!(room.status().unwrap().success());
    outbox.wait_confirmed(outbox.current().await).await;
    let (whole, torn): (Vec<_>, Vec<_>) = lines().into_iter().partition(|line| id(line).is_some());
    let ids: HashSet<_> = whole.iter().filter_map(|line| id(line)).collect();
    assert_eq!((ids.len(), torn.len()), (ROWS, 1), "{torn:?}");
    relay.ready().await;
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standard_output_that_is_never_read_does_not_hold_up_the_end() {
    let outbox = outbox().await;
    let (mut reader, writer) = std::io::pipe().unwrap();
    let relay = Relay::start_by(to_stdout(writer), &outbox, &[("sink", "stdout"), ("run.drain_timeout", "1s")]);
    relay.ready().await;
    // More than a pipe holds.
    let sql = "insert into outbox (aggregatetype, aggregateid, type, payload) \
               select 'order', '1', 'large', to_jsonb(repeat('x', 100000)) from generate_series(1, 5)";
    outbox.sql(sql).await;
    reader.read_exact(&mut [0; 10]).unwrap();
    assert_eq!(relay.stop_within(Duration::from_secs(15)), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_that_waits_for_its_reader_is_seen_by_the_probes_until_it_ends() {
    let outbox = outbox().await;
    let (mut reader, writer) = std::io::pipe().unwrap();
    let copy = writer.try_clone().unwrap();
    let relay = Relay::start_by(to_stdout(writer), &outbox, &[("sink", "stdout"), ("run.drain_timeout", "60s")]);
    relay.ready().await;
    outbox.sql(LARGE).await;
    eventually("it takes no more", || async { !takes_more(&copy) }).await;
    drop(copy);
    relay.signal(Signal::SIGTERM);
    eventually("it is stopping", || async { relay.get("/readyz").1.contains("\"stopping\"") }).await;
    assert_eq!((relay.get("/readyz").0, relay.get("/livez").0), (503, 200));
    assert_eq!((relay.metric("pgoutbox_ready"), relay.metric("pgoutbox_settled_total")), (0.0, 0.0));
    let reading = std::thread::spawn(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        text
    });
    assert_eq!(relay.exit_code(), 0);
    assert_eq!(reading.join().unwrap().lines().filter_map(id).count(), 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_throws_all_messages_away_is_told_so() {
    let outbox = outbox().await;
    let closed = ["sh", "-c", "exec \"$@\" >&-", "sh"].map(str::to_owned).to_vec();
    let (_reader, writer) = std::io::pipe().unwrap();
    for (way, throws) in
        [(Way::default(), true), (Way { under: closed, ..Way::default() }, true), (to_stdout(writer), false)]
    {
        let relay = Relay::start_by(way, &outbox, &[("sink", "stdout")]);
        relay.ready().await;
        let says = "standard output is /dev/null, or was closed: all messages are thrown away";
        assert_eq!(relay.log().contains(says), throws, "{}", relay.log());
        assert_eq!(relay.stop(), 0);
    }
}

/// Five rows, each larger than what a pipe or a socket holds.
const LARGE: &str = "insert into outbox (aggregatetype, aggregateid, type, payload) \
                     select 'order', '1', 'large', to_jsonb(repeat('x', 1000000)) from generate_series(1, 5)";

fn takes_more(file: &impl AsFd) -> bool {
    poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLOUT)], PollTimeout::ZERO).unwrap() > 0
}

/// Whoever shares the open file, a terminal for instance, may have made it one that does not wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_behind_a_standard_output_that_does_not_wait_is_waited_for() {
    let outbox = outbox().await;
    let (mut reader, writer) = UnixStream::pair().unwrap();
    writer.set_nonblocking(true).unwrap();
    let copy = writer.try_clone().unwrap();
    let relay = Relay::start_by(to_stdout(OwnedFd::from(writer)), &outbox, &[("sink", "stdout")]);
    relay.ready().await;
    outbox.sql(LARGE).await;
    eventually("it takes no more", || async { !takes_more(&copy) }).await;
    drop(copy);
    let lines = tokio::task::spawn_blocking(move || {
        let mut text = Vec::new();
        while text.iter().filter(|byte| **byte == b'\n').count() < 5 {
            let mut piece = vec![0; 10_000];
            let count = reader.read(&mut piece).unwrap();
            assert!(count > 0, "it went");
            text.extend(&piece[..count]);
        }
        (String::from_utf8(text).unwrap(), reader)
    });
    let (text, _reader) = lines.await.unwrap();
    let ids: HashSet<_> = text.lines().filter_map(id).collect();
    assert_eq!((text.lines().count(), ids.len()), (5, 5), "lines, and those that are whole");
    outbox.wait_confirmed(outbox.current().await).await;
    assert_eq!(relay.metric("pgoutbox_sessions_total{end=\"broker\"}"), 0.0, "{}", relay.log());
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_end_while_standard_output_is_not_read_leave_no_thread_behind() {
    let outbox = outbox().await;
    let (_reader, writer) = std::io::pipe().unwrap();
    let way = to_stdout(writer.try_clone().unwrap());
    let settings = [("sink", "stdout"), ("run.drain_timeout", "1s")];
    let relay = Relay::start_by(way, &outbox, &settings);
    relay.ready().await;
    outbox.sql(LARGE).await;
    let written = outbox.current().await;
    eventually("it takes no more", || async { !takes_more(&writer) }).await;
    let threads = || std::fs::read_dir(format!("/proc/{}/task", relay.pid())).unwrap().count();
    let slot = format!(
        "from pg_stat_replication join pg_replication_slots on active_pid = pid where slot_name = '{}'",
        outbox.name
    );
    let before = threads();
    for session in 1..=3 {
        outbox.sql(&format!("select pg_terminate_backend(pid) {slot}")).await;
        let ended = || async { relay.metric("pgoutbox_sessions_total{end=\"postgres\"}") >= f64::from(session) };
        eventually("the session ends", ended).await;
        let sent = format!("select count(*)::text {slot} and sent_lsn >= '{written}'");
        eventually("the next one has the rows", || async { outbox.text(&sent).await.as_deref() == Some("1") }).await;
    }
    // One of the pool may be idle still.
    assert!(threads() <= before + 1, "{before} threads, now {}", threads());
    assert_eq!(relay.stop_within(Duration::from_secs(15)), 0);
}
