//! `pgoutbox init` and `pgoutbox run`, as processes of their own: what the demo shows is what an operator would start.
//!
//! The trap: the environment. A DATABASE_URL or PGHOST of the caller would point the demo at a database that is not a
//! throw-away one, so everything by which a relay can be configured is taken out before two variables are put in.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use crate::error::Error;
use crate::servers::{Keeper, Port, Process};

/// Longer than the relay's own `run.drain_timeout`.
const STOP_WITHIN: Duration = Duration::from_secs(35);
const POLL_EVERY: Duration = Duration::from_millis(20);
const PROBE_WITHIN: Duration = Duration::from_secs(1);
const LOG_TAIL_LINES: usize = 20;

/// What configures a relay. `PG` is libpq's prefix and the beginning of ours.
const CONFIGURING: [&str; 3] = ["PG", "DATABASE_URL", "AMQP_URL"];

pub(super) struct Relay {
    postgres_url: String,
    amqp_url: String,
    http_port: Port,
    log: PathBuf,
    child: Option<Child>,
    // Dropped in this order, after our own Drop ended the child.
    directory: TempDir,
    keeper: Keeper,
}

impl Relay {
    pub(super) fn new(postgres_url: String, amqp_url: String) -> Result<Self, Error> {
        let directory = tempfile::Builder::new().prefix("pgoutbox-relay-").tempdir();
        let directory = directory.map_err(system("cannot make a temporary directory"))?;
        let keeper = Keeper::of(directory.path())?;
        let http_port = Port::pick()?;
        let log = directory.path().join("relay.log");
        Ok(Self { postgres_url, amqp_url, http_port, log, child: None, directory, keeper })
    }

    /// What `pgoutbox init` printed.
    pub(super) fn init(&self) -> Result<String, Error> {
        let output = self.command("init")?.output().map_err(system("cannot run pgoutbox init"))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(self.failed(&format!("pgoutbox init ended with {}", output.status)))
    }

    pub(super) fn start(&mut self) -> Result<(), Error> {
        let mut run = self.command("run")?;
        // A group of its own: the ctrl-C that ends the demo must not end the relay before its time.
        let child = run.stdout(Stdio::null()).process_group(0).spawn();
        let child = self.child.insert(child.map_err(system("cannot run pgoutbox run"))?);
        if let Some(process) = process_of(child) {
            self.keeper.tell(process, "TERM")?;
        }
        Ok(())
    }

    pub(super) fn http_port(&self) -> u16 {
        self.http_port.number()
    }

    /// An error once it ended by itself, which it never should.
    pub(super) fn still_runs(&mut self) -> Result<(), Error> {
        match self.child.as_mut().map(Child::try_wait) {
            Some(Ok(Some(status))) => Err(self.failed(&format!("pgoutbox run ended by itself with {status}"))),
            _ => Ok(()),
        }
    }

    /// SIGTERM, and how long it took; an error unless it ended with 0.
    pub(super) async fn stop(&mut self) -> Result<Duration, Error> {
        let begun = Instant::now();
        if let Some(process) = self.child.as_ref().and_then(process_of) {
            process.signal(Signal::SIGTERM).map_err(system("cannot stop pgoutbox run"))?;
        }
        while let Some(child) = &mut self.child {
            match child.try_wait().map_err(system("cannot wait for pgoutbox run"))? {
                Some(status) if status.success() => break,
                Some(status) => {
                    return Err(self.failed(&format!("pgoutbox run ended with {status} after SIGTERM")));
                }
                None if begun.elapsed() > STOP_WITHIN => {
                    return Err(self.failed(&format!("pgoutbox run did not end within {STOP_WITHIN:?} of SIGTERM")));
                }
                None => sleep(POLL_EVERY).await,
            }
        }
        Ok(begun.elapsed())
    }

    /// With the end of the relay's log.
    pub(super) fn failed(&self, what: &str) -> Error {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(LOG_TAIL_LINES)..).unwrap_or_default().join("\n  ");
        Error::Demo(format!("{what}; its log ends with\n  {tail}"))
    }

    fn command(&self, verb: &str) -> Result<Command, Error> {
        let program = std::env::current_exe().map_err(system("cannot find my own executable"))?;
        let log = File::options().create(true).append(true).open(&self.log);
        let mut command = Command::new(program);
        command.arg(verb).current_dir(self.directory.path());
        for (name, _) in std::env::vars_os() {
            if CONFIGURING.iter().any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes())) {
                command.env_remove(name);
            }
        }
        command
            .env("DATABASE_URL", &self.postgres_url)
            .env("AMQP_URL", &self.amqp_url)
            .env("PGOUTBOX__HTTP__LISTEN", format!("127.0.0.1:{}", self.http_port()))
            .stdin(Stdio::null())
            .stderr(log.map_err(system("cannot write the relay's log"))?);
        Ok(command)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What keeps the relay from being ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Obstacle {
    /// For a column of them.
    pub(super) short: &'static str,
    /// The relay's own words.
    pub(super) reason: String,
}

impl Obstacle {
    pub(super) fn starting() -> Self {
        Self { short: "starting", reason: String::new() }
    }
}

/// By the relay's own `/readyz`.
pub(super) async fn obstacle(http_port: u16) -> Option<Obstacle> {
    match timeout(PROBE_WITHIN, probe(http_port)).await {
        Ok(Ok(answer)) => answer,
        // It listens a moment after its start.
        Ok(Err(_)) => Some(Obstacle::starting()),
        Err(_) => Some(Obstacle { short: "not ready", reason: "it does not answer".to_owned() }),
    }
}

async fn probe(http_port: u16) -> std::io::Result<Option<Obstacle>> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, http_port)).await?;
    stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(read(&answer))
}

fn read(answer: &str) -> Option<Obstacle> {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((answer, ""));
    if head.split_whitespace().nth(1) == Some("200") {
        return None;
    }
    let body: serde_json::Value = serde_json::from_str(body).unwrap_or_default();
    // The last reason is the most precise one.
    let reason = body.get("reasons").and_then(|reasons| reasons.as_array()?.last()?.as_str());
    let reason = reason.unwrap_or("it does not say why").to_owned();
    let short = if reason.contains("broker") { "waiting for the broker" } else { "not ready" };
    Some(Obstacle { short, reason })
}

fn process_of(child: &Child) -> Option<Process> {
    Process::find(i32::try_from(child.id()).ok()?)
}

fn system(doing: &str) -> impl FnOnce(std::io::Error) -> Error {
    let doing = doing.to_owned();
    move |source| Error::System { doing, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_precise_reason_is_the_last() {
        let body = r#"{"ready":false,"reasons":["no stream from Postgres","the broker went"]}"#;
        let answer = format!("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 1\r\n\r\n{body}\n");
        let obstacle = read(&answer).unwrap();
        assert_eq!((obstacle.short, obstacle.reason.as_str()), ("waiting for the broker", "the broker went"));
        assert_eq!(read("HTTP/1.1 200 OK\r\n\r\n{\"ready\":true,\"reasons\":[]}"), None);
        assert_eq!(read("").unwrap().short, "not ready");
    }
}
