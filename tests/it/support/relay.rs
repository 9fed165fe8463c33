//! `pgoutbox run` as a process, as an operator has it: environment in, exit code, log and probes out.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgoutbox::servers::Port;

use super::{Outbox, PATIENCE};

/// A running relay. Dropped: killed.
pub(crate) struct Relay {
    child: Child,
    log: tempfile::NamedTempFile,
    port: Port,
}

/// How a relay is started, where that is not the plain way.
#[derive(Default)]
pub(crate) struct Way {
    /// Words before the program: it is run by them, and as the same process.
    pub(crate) under: Vec<String>,
    /// Instead of a file that [`Relay::log`] reads.
    pub(crate) stderr: Option<Stdio>,
    /// Instead of nowhere.
    pub(crate) stdout: Option<Stdio>,
}

/// The program under test, with nothing inherited that could steer it.
pub(crate) fn pgoutbox() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgoutbox"));
    for (name, _) in std::env::vars() {
        if name.starts_with("PG") || name == "DATABASE_URL" || name == "AMQP_URL" || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command
}

/// The command as it is run by these words.
fn under(words: &[String], command: Command) -> Command {
    let Some((program, arguments)) = words.split_first() else { return command };
    let mut whole = Command::new(program);
    whole.args(arguments).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => whole.env(name, value),
            None => whole.env_remove(name),
        };
    }
    whole
}

/// The environment of a relay; `name` is that of slot and exchange.
pub(crate) fn environment(url: &str, amqp: &str, name: &str) -> Vec<(String, String)> {
    [
        ("DATABASE_URL", url),
        ("AMQP_URL", amqp),
        ("PGOUTBOX__POSTGRES__SLOT", name),
        ("PGOUTBOX__RABBITMQ__EXCHANGE", name),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}

impl Relay {
    pub(crate) fn start(outbox: &Outbox) -> Self {
        Self::start_with(outbox, &[])
    }

    /// With more settings, as `section.key`.
    pub(crate) fn start_with(outbox: &Outbox, settings: &[(&str, &str)]) -> Self {
        Self::start_at(&outbox.url, &outbox.amqp, &outbox.name, settings)
    }

    /// In another way than the plain one.
    pub(crate) fn start_by(way: Way, outbox: &Outbox, settings: &[(&str, &str)]) -> Self {
        Self::start_at_by(way, &outbox.url, &outbox.amqp, &outbox.name, settings)
    }

    /// With servers of that URL, for instance behind a link; `name` is that of slot and exchange.
    pub(crate) fn start_at(url: &str, amqp: &str, name: &str, settings: &[(&str, &str)]) -> Self {
        Self::start_at_by(Way::default(), url, amqp, name, settings)
    }

    /// The same in another way.
    pub(crate) fn start_at_by(way: Way, url: &str, amqp: &str, name: &str, settings: &[(&str, &str)]) -> Self {
        // Not one of the range that connections are given theirs from: it would be gone before the relay listens.
        let port = Port::pick().unwrap();
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut command = pgoutbox();
        command
            .arg("run")
            .envs(environment(url, amqp, name))
            .env("PGOUTBOX__HTTP__LISTEN", format!("127.0.0.1:{}", port.number()));
        for (key, value) in settings {
            command.arg("--set").arg(format!("{key}={value}"));
        }
        let mut command = under(&way.under, command);
        command.stdin(Stdio::null()).stdout(way.stdout.unwrap_or_else(Stdio::null));
        command.stderr(way.stderr.unwrap_or_else(|| log.reopen().unwrap().into()));
        Self { child: command.spawn().unwrap(), log, port }
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.log.path()).unwrap()
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Of probes and metrics.
    pub(crate) fn port(&self) -> u16 {
        self.port.number()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// SIGKILL, and gone.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM; the exit code.
    pub(crate) fn stop(self) -> i32 {
        self.stop_within(PATIENCE)
    }

    /// The same, where it matters how long that takes. A busy machine takes seconds.
    pub(crate) fn stop_within(self, within: Duration) -> i32 {
        self.signal(Signal::SIGTERM);
        self.exit_code_within(within)
    }

    /// Waits for its end.
    pub(crate) fn exit_code(self) -> i32 {
        self.exit_code_within(PATIENCE)
    }

    fn exit_code_within(mut self, within: Duration) -> i32 {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            assert!(began.elapsed() < within, "still running after {within:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for its end, and returns the log as well.
    pub(crate) fn ended(self) -> (i32, String) {
        let path = self.log.path().to_owned();
        let log = self.log.reopen().unwrap();
        let code = self.exit_code();
        let mut text = String::new();
        let mut log = log;
        log.read_to_string(&mut text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        (code, text)
    }

    /// Status code and body of a GET; 0 while nobody listens.
    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        let mut text = String::new();
        let asked = TcpStream::connect(("127.0.0.1", self.port())).and_then(|mut stream| {
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
            stream.read_to_string(&mut text)
        });
        if asked.is_err() {
            return (0, String::new());
        }
        let code = text.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
        let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
        (code, body)
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.get("/readyz").0 == 200
    }

    /// Waits until `/readyz` says 200.
    pub(crate) async fn ready(&self) {
        let began = Instant::now();
        while !self.is_ready() {
            assert!(began.elapsed() < PATIENCE, "never ready:\n{}\n{}", self.get("/readyz").1, self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// A metric's value.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").1;
        let line = text.lines().find(|line| line.split(' ').next() == Some(name));
        line.and_then(|line| line.split(' ').nth(1)).and_then(|value| value.parse().ok()).unwrap_or(f64::NAN)
    }

    /// Resident memory's high-water mark in KiB, by the kernel; `None` when the process is gone.
    pub(crate) fn peak_memory_kib(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).ok()?;
        let line = status.lines().find(|line| line.starts_with("VmHWM"))?;
        line.split_whitespace().nth(1)?.parse().ok()
    }

    /// CPU time spent so far, by the kernel (proc(5): fields 14 and 15, in ticks of 10 ms).
    pub(crate) fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        let fields: Vec<i64> =
            stat.rsplit(") ").next().unwrap_or_default().split(' ').filter_map(|field| field.parse().ok()).collect();
        // Field 3, the state, is no number; 4 is the first here.
        let ticks = fields.get(10).unwrap_or(&0) + fields.get(11).unwrap_or(&0);
        Duration::from_millis(10 * ticks.unsigned_abs())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // Already gone after `exit_code`.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of the relay\n{}", self.log());
        }
    }
}
