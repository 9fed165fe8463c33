//! The first minutes of somebody who has a Postgres and a RabbitMQ and clones this repository: the README's own commands, timed
//! until a consumer has the first message.
//!
//! The trap: a quick start is read by everybody and run by nobody who wrote it. So its commands are taken out of the README, and
//! only the two URLs are replaced.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use pgoutbox::servers::{Postgres, RabbitMq};

use crate::support::consumer::Consumer;
use crate::support::{Outbox, connect};

const MARK: &str = "<!-- newcomer -->";
const POSTGRES: &str = "postgres://postgres@localhost/shop";
const RABBITMQ: &str = "amqp://localhost";

/// The README's commands, one a line.
fn commands(root: &Path) -> Vec<String> {
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    let block = readme.split_once(MARK).expect("the README marks its quick start").1;
    let block = block.split_once("```sh\n").unwrap().1.split_once("```").unwrap().0;
    block.lines().map(str::to_owned).collect()
}

#[test]
fn a_newcomer_needs_three_commands_and_writes_no_file() {
    let commands = commands(Path::new(env!("CARGO_MANIFEST_DIR")));
    assert!(commands.len() == 3 && commands.iter().all(|command| !command.is_empty()), "{commands:?}");
    let joins = ["&&", ";", "|", ">", "\\", "<"];
    assert!(!commands.iter().any(|command| joins.iter().any(|join| command.contains(join))), "{commands:?}");
    assert!(commands[1].contains(POSTGRES) && commands[1].ends_with("pgoutbox init"), "{commands:?}");
    assert!(commands[2].contains(RABBITMQ) && commands[2].ends_with("pgoutbox run"), "{commands:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "builds from nothing: scripts/newcomer"]
async fn a_newcomer_has_a_message_after_three_commands() {
    // Stand-ins for the newcomer's own servers, consumer and application; no part of what is timed.
    let (postgres, rabbitmq) = (Postgres::start(&[]).unwrap(), RabbitMq::start().unwrap());
    connect(&postgres.url()).await.batch_execute("create database shop").await.unwrap();
    let url = postgres.url_for("postgres", None, "shop");
    let (client, name) = (connect(&url).await, "outbox".to_owned());
    let outbox = Outbox { client, url: url.clone(), amqp: rabbitmq.url(), name };
    let consumer = Consumer::start(&outbox).await;

    let directory = tempfile::tempdir().unwrap();
    let clone = directory.path().join("pgoutbox");
    let mut git = Command::new("git");
    git.args(["clone", "--quiet", "--no-hardlinks"]).arg(env!("CARGO_MANIFEST_DIR")).arg(&clone);
    assert!(git.status().unwrap().success());
    let commands = commands(&clone);
    let shell = |command: &str| {
        let command = command.replace(POSTGRES, &url).replace(RABBITMQ, &rabbitmq.url());
        let mut shell = Command::new("bash");
        // What cargo tells a test, and what the caller may have set, a newcomer has not.
        for (name, _) in std::env::vars() {
            if ["CARGO", "RUST", "PG", "DATABASE", "AMQP"].iter().any(|prefix| name.starts_with(prefix))
                && !["CARGO_HOME", "RUSTUP_HOME"].contains(&name.as_str())
            {
                shell.env_remove(name);
            }
        }
        shell.args(["-c", &command]).current_dir(&clone).stdin(Stdio::null()).process_group(0);
        shell
    };

    let began = Instant::now();
    let told = |command: &str, since: Instant| println!("{:7.2} s  {command}", since.elapsed().as_secs_f64());
    for command in &commands[..2] {
        let since = Instant::now();
        assert!(shell(command).status().unwrap().success(), "{command}");
        told(command, since);
    }
    let id = outbox.insert("placed").await;
    let since = Instant::now();
    let mut relay = shell(&commands[2]).spawn().unwrap();
    consumer.wait_distinct(1).await;
    assert!(consumer.has(&id));
    told(&format!("{}, until the consumer had the message", commands[2]), since);
    println!("{:7.2} s  in all", began.elapsed().as_secs_f64());
    killpg(Pid::from_raw(i32::try_from(relay.id()).unwrap()), Signal::SIGTERM).unwrap();
    assert_eq!(relay.wait().unwrap().code(), Some(0));
}
