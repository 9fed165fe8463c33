//! The throw-away servers themselves: they start, stop, die and come back, and leave nothing behind.
//!
//! The trap: a leak is invisible to the test that leaks. So these look at the whole machine (every process's command line,
//! directory and environment, and the shared memory) for the directory of the server that was dropped.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pgoutbox::servers::{Error, Extras, Postgres, RabbitMq};

use crate::support::{POSTGRES_VERSIONS, postgres_18, postgres_bin, rabbitmq_4};

const WITHIN: Duration = Duration::from_secs(30);
const ROLE_VARIABLE: &str = "PGOUTBOX_TEST_ROLE";

/// One line of `select`s, by the simple protocol of tokio-postgres.
fn query(url: &str, sql: &str) -> Result<String, tokio_postgres::Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await?;
        let connection = tokio::spawn(connection);
        let messages = client.simple_query(sql).await?;
        drop(client);
        let _ = connection.await;
        let value = messages.iter().find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        });
        Ok(value.unwrap_or_default())
    })
}

/// Processes that have to do with a directory, as `PID COMMAND`.
pub(crate) fn processes_of(directory: &Path) -> Vec<String> {
    let needle = directory.to_str().unwrap().as_bytes();
    let holds = |bytes: Vec<u8>| bytes.windows(needle.len()).any(|window| window == needle);
    let pids = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let own = Path::new("/proc").join(std::process::id().to_string());
    pids.filter(|process| *process != own && process.join("stat").exists())
        .filter(|process| {
            let cwd = std::fs::read_link(process.join("cwd")).unwrap_or_default();
            cwd.starts_with(directory)
                || holds(std::fs::read(process.join("cmdline")).unwrap_or_default())
                || holds(std::fs::read(process.join("environ")).unwrap_or_default())
        })
        .map(|process| {
            let command = std::fs::read(process.join("cmdline")).unwrap_or_default();
            format!("{} {}", process.display(), String::from_utf8_lossy(&command).replace('\0', " "))
        })
        .collect()
}

fn assert_nothing_left_of(directory: &Path) {
    assert_eq!(processes_of(directory), Vec::<String>::new());
    assert!(!directory.exists(), "{} is still there", directory.display());
}

fn directory_of(server: &Postgres) -> PathBuf {
    server.data_dir().parent().unwrap().to_owned()
}

fn directory_of_process(pid: Option<i32>) -> PathBuf {
    std::fs::read_link(format!("/proc/{}/cwd", pid.unwrap())).unwrap()
}

/// The id of a running server's System V segment; a killed one leaves it behind.
fn shared_memory(server: &Postgres) -> String {
    let file = std::fs::read_to_string(server.data_dir().join("postmaster.pid")).unwrap();
    file.lines().nth(6).unwrap().split_whitespace().nth(1).unwrap().to_owned()
}

fn shared_memory_exists(id: &str) -> bool {
    let segments = std::fs::read_to_string("/proc/sysvipc/shm").unwrap();
    segments.lines().any(|segment| segment.split_whitespace().nth(1) == Some(id))
}

/// The files of a running server's dynamic shared memory, in /dev/shm or in its data; a killed one leaves them behind.
fn shared_memory_files(server: &Postgres) -> Vec<PathBuf> {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", server.pid().unwrap())).unwrap();
    let files = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).map(PathBuf::from);
    files.filter(|file| file.starts_with("/dev/shm") || file.parent().unwrap().ends_with("pg_dynshmem")).collect()
}

fn answers_amqp(port: u16) -> bool {
    let mut first = [0];
    TcpStream::connect(("127.0.0.1", port)).is_ok_and(|mut stream| {
        stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        stream.write_all(b"AMQP\x00\x00\x09\x01").is_ok() && stream.read_exact(&mut first).is_ok() && first == [1]
    })
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < WITHIN, "not within {WITHIN:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn postgres_has_the_defaults_and_the_settings_it_was_given() {
    let server = Postgres::start(&[("wal_sender_timeout", "3s"), ("application_name", "it's")]).unwrap();
    let show = |name| query(&server.url(), &format!("show {name}")).unwrap();
    assert_eq!(show("wal_level"), "logical");
    assert_eq!(show("max_replication_slots"), "20");
    assert_eq!(show("fsync"), "on");
    assert_eq!(show("server_encoding"), "UTF8");
    assert_eq!(show("wal_sender_timeout"), "3s");
    assert_eq!(show("application_name"), "it's");
    UnixStream::connect(server.socket_dir().join(format!(".s.PGSQL.{}", server.port()))).unwrap();
}

#[test]
fn postgres_keeps_its_data_and_port_over_a_stop_and_a_kill() {
    let mut server = Postgres::start(&[]).unwrap();
    let url = server.url();
    query(&url, "create table kept (at text); insert into kept values ('first')").unwrap();

    server.stop("fast", WITHIN).unwrap();
    assert_eq!(server.pid(), None);
    assert!(query(&url, "select 1").is_err());
    server.start_again().unwrap();
    query(&url, "insert into kept values ('after stop')").unwrap();

    let killed = server.pid().unwrap();
    server.kill().unwrap();
    assert_eq!(server.pid(), None);
    server.start_again().unwrap();
    assert_ne!(server.pid(), Some(killed));
    assert_eq!(query(&url, "select count(*) from kept").unwrap(), "2");
    assert!(server.log().contains("automatic recovery in progress"), "{}", server.log());

    server.restart("immediate").unwrap();
    assert_eq!(query(&url, "select count(*) from kept").unwrap(), "2");
}

#[test]
fn postgres_leaves_nothing_behind_when_dropped_running() {
    let server = Postgres::start(&[]).unwrap();
    let (directory, segment) = (directory_of(&server), shared_memory(&server));
    assert!(processes_of(&directory).len() > 1, "the search finds a running server");
    assert!(shared_memory_exists(&segment));
    drop(server);
    assert_nothing_left_of(&directory);
    assert!(!shared_memory_exists(&segment));
}

#[test]
fn postgres_leaves_nothing_behind_when_dropped_after_a_kill() {
    let mut server = Postgres::start(&[]).unwrap();
    let (directory, segment) = (directory_of(&server), shared_memory(&server));
    let files = shared_memory_files(&server);
    assert!(!files.is_empty(), "the search finds the memory of a running server");
    server.kill().unwrap();
    drop(server);
    assert_nothing_left_of(&directory);
    assert!(!shared_memory_exists(&segment));
    assert!(files.iter().all(|file| !file.exists()), "{files:?}");
}

#[test]
fn a_stop_of_postgres_that_takes_too_long_is_an_error_and_goes_on() {
    let mut server = Postgres::start(&[]).unwrap();
    // A smart shutdown waits for every session to end.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (client, connection) = runtime.block_on(tokio_postgres::connect(&server.url(), tokio_postgres::NoTls)).unwrap();
    let connection = runtime.spawn(connection);

    let error = server.stop("smart", Duration::from_millis(100)).unwrap_err();
    assert!(matches!(error, Error::Late { .. }), "{error}");
    assert!(server.pid().is_some());

    drop(client);
    runtime.block_on(connection).unwrap().unwrap();
    server.stop("smart", WITHIN).unwrap();
    assert!(matches!(server.stop("slow", WITHIN), Err(Error::Refused { .. })));
}

#[test]
fn postgres_asks_for_a_password_after_an_appended_rule() {
    let server = Postgres::start(&[("password_encryption", "scram-sha-256")]).unwrap();
    query(&server.url(), "create role relay login password 'p@ss/word'").unwrap();
    assert_eq!(query(&server.url_for("relay", None, "postgres"), "select current_user").unwrap(), "relay");

    server.append_hba("host all relay 127.0.0.1/32 scram-sha-256").unwrap();
    server.append_conf("work_mem = '7MB'").unwrap();
    server.reload().unwrap();

    assert!(query(&server.url_for("relay", Some("wrong"), "postgres"), "select 1").is_err());
    let right = server.url_for("relay", Some("p@ss/word"), "postgres");
    assert_eq!(query(&right, "select current_user").unwrap(), "relay");
    assert_eq!(query(&server.url(), "show work_mem").unwrap(), "7MB");
}

#[test]
fn postgres_says_in_its_error_why_it_does_not_start() {
    let error = Postgres::start(&[("wal_level", "nonsense")]).unwrap_err().to_string();
    assert!(
        error.contains("start PostgreSQL") && error.contains("invalid value for parameter \"wal_level\""),
        "{error}"
    );
    let error = Postgres::start_from(Path::new("/nonexistent"), &[]).unwrap_err().to_string();
    assert!(error.contains("apt-get install postgresql"), "{error}");
}

#[test]
fn postgres_18_runs_from_an_unpacked_package() {
    let mut server = Postgres::start_from(&postgres_18(), &[]).unwrap();
    let version: u32 = query(&server.url(), "show server_version_num").unwrap().parse().unwrap();
    assert_eq!(version / 10_000, 18);
    server.kill().unwrap();
    server.start_again().unwrap();
    let directory = directory_of(&server);
    drop(server);
    assert_nothing_left_of(&directory);
}

#[test]
fn every_version_of_postgres_is_the_one_that_was_asked_for() {
    for version in POSTGRES_VERSIONS {
        let server = Postgres::start_from(&postgres_bin(version), &[]).unwrap();
        let found: u32 = query(&server.url(), "show server_version_num").unwrap().parse().unwrap();
        assert_eq!(found / 10_000, version);
    }
}

#[test]
fn rabbitmq_4_runs_from_an_unpacked_package_and_leaves_nothing_behind() {
    let mut server = RabbitMq::start_from(&rabbitmq_4()).unwrap();
    let directory = directory_of_process(server.pid());
    let version = server.ctl(&["version"]).unwrap();
    assert!(version.starts_with("4.0."), "{version}");
    assert!(server.ctl(&["add_user", "kept", "secret"]).is_ok());
    server.stop().unwrap();
    server.start_again().unwrap();
    assert!(server.ctl(&["list_users"]).unwrap().contains("kept"));
    server.kill().unwrap();
    server.start_again().unwrap();
    assert!(answers_amqp(server.port()));
    drop(server);
    assert_nothing_left_of(&directory);
}

#[test]
fn postgres_18_runs_from_where_its_user_cannot_go() {
    // What a clone in /root looks like; without root, the user is us and can go there.
    let closed = tempfile::tempdir().unwrap();
    let copied = Command::new("cp").arg("-a").arg(postgres_18().parent().unwrap()).arg(closed.path()).status().unwrap();
    assert!(copied.success());
    let server = Postgres::start_from(&closed.path().join("native/bin"), &[]).unwrap();
    assert_eq!(query(&server.url(), "select 1").unwrap(), "1");
    let directory = directory_of(&server);
    drop(server);
    assert_nothing_left_of(&directory);
    assert!(closed.path().join("native/bin/postgres").is_file(), "the original stays");
}

#[test]
fn a_taken_port_is_told_by_the_words_that_make_a_first_start_pick_another() {
    let mut postgres = Postgres::start(&[]).unwrap();
    postgres.stop("fast", WITHIN).unwrap();
    let taken = TcpListener::bind(("127.0.0.1", postgres.port())).unwrap();
    let error = postgres.start_again().unwrap_err().to_string();
    assert!(error.contains("Address already in use"), "{error}");
    drop(taken);
    postgres.start_again().unwrap();

    let mut rabbitmq = RabbitMq::start().unwrap();
    rabbitmq.stop().unwrap();
    let taken = TcpListener::bind(("127.0.0.1", rabbitmq.port())).unwrap();
    let error = rabbitmq.start_again().unwrap_err().to_string();
    assert!(rabbitmq.log().contains("eaddrinuse"), "{error}");
    assert_eq!(rabbitmq.pid(), None);
    drop(taken);
    rabbitmq.start_again().unwrap();
}

#[test]
fn two_postgres_run_side_by_side() {
    let (one, other) = (Postgres::start(&[]).unwrap(), Postgres::start(&[]).unwrap());
    assert_ne!(one.port(), other.port());
    assert_eq!(query(&one.url(), "select 1").unwrap(), query(&other.url(), "select 1").unwrap());
}

#[test]
fn rabbitmq_stops_dies_freezes_and_comes_back_and_leaves_nothing_behind() {
    let mut server = RabbitMq::start().unwrap();
    let directory = directory_of_process(server.pid());
    assert!(answers_amqp(server.port()));
    assert!(server.ctl(&["add_user", "kept", "secret"]).is_ok());
    assert!(server.ctl(&["list_users"]).unwrap().contains("kept"));
    let error = server.ctl(&["delete_user", "nobody"]).unwrap_err().to_string();
    assert!(error.contains("rabbitmqctl delete_user nobody"), "{error}");

    server.freeze().unwrap();
    assert!(!answers_amqp(server.port()));
    server.thaw().unwrap();
    wait_until("a thawed node answers", || answers_amqp(server.port()));

    // A frozen node stops and dies as well as a running one.
    server.freeze().unwrap();
    server.stop().unwrap();
    assert_eq!(server.pid(), None);
    assert!(!answers_amqp(server.port()));
    server.start_again().unwrap();
    assert!(server.ctl(&["list_users"]).unwrap().contains("kept"));

    server.kill().unwrap();
    assert_eq!(server.pid(), None);
    assert!(server.freeze().is_err());
    server.start_again().unwrap();
    assert!(answers_amqp(server.port()));

    assert!(processes_of(&directory).len() > 2, "the search finds the node, its port mapper and its keeper");
    drop(server);
    assert_nothing_left_of(&directory);
}

#[test]
fn a_peer_is_in_the_cluster_comes_back_to_it_and_leaves_nothing_behind() {
    let first = RabbitMq::start().unwrap();
    let mut peer = first.peer(&Extras::default()).unwrap();
    let directories = [&first, &peer].map(|node| directory_of_process(node.pid()));
    assert!(directories[0] != directories[1] && first.port() != peer.port());
    assert!(first.ctl(&["add_user", "kept", "secret"]).is_ok());
    assert!(peer.ctl(&["list_users"]).unwrap().contains("kept"));

    peer.kill().unwrap();
    assert!(first.ctl(&["add_user", "meanwhile", "secret"]).is_ok());
    peer.start_again().unwrap();
    let users = peer.ctl(&["list_users"]).unwrap();
    assert!(users.contains("kept") && users.contains("meanwhile"), "{users}");

    // The one with the port mapper goes first.
    drop(first);
    drop(peer);
    directories.iter().for_each(|directory| assert_nothing_left_of(directory));
}

#[test]
fn rabbitmq_leaves_nothing_behind_when_dropped_frozen() {
    let server = RabbitMq::start().unwrap();
    let directory = directory_of_process(server.pid());
    server.freeze().unwrap();
    drop(server);
    assert_nothing_left_of(&directory);
}

#[test]
fn servers_do_not_outlive_a_program_that_is_killed() {
    let program = std::env::current_exe().unwrap();
    let mut program = Command::new(program)
        .args(["servers::the_program_that_is_killed", "--exact", "--ignored", "--nocapture"])
        .env(ROLE_VARIABLE, "killed")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(program.stdout.take().unwrap()).lines().map_while(Result::ok);
    let directories: Vec<PathBuf> =
        lines.filter_map(|line| Some(line.split_once("directory=")?.1.into())).take(2).collect();
    assert_eq!(directories.len(), 2);
    for directory in &directories {
        assert!(processes_of(directory).len() > 1, "the search finds a running server");
    }
    program.kill().unwrap();
    program.wait().unwrap();
    for directory in &directories {
        wait_until("the keeper has cleaned up", || !directory.exists() && processes_of(directory).is_empty());
    }
}

#[test]
#[ignore = "not a test: the other half of servers_do_not_outlive_a_program_that_is_killed"]
fn the_program_that_is_killed() {
    // `cargo test -- --ignored` must not wait for ever.
    if std::env::var(ROLE_VARIABLE).is_err() {
        return;
    }
    let postgres = Postgres::start(&[]).unwrap();
    let rabbitmq = RabbitMq::start().unwrap();
    println!("\ndirectory={}", directory_of(&postgres).display());
    println!("\ndirectory={}", directory_of_process(rabbitmq.pid()).display());
    std::thread::park();
}
