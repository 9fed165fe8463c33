//! The programs that are measured, each a process of its own.
//!
//! The trap: a program that was measured inside the bench shares its allocator, its threads and its peak of memory with it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pgoutbox::servers::Port;

use crate::arena::{Arena, DATABASE, POLLED};
use crate::bare::amqp::Publisher;
use crate::bare::postgres::Stream;
use crate::bare::relay::Relay;
use crate::bare::{drain, publisher};
use crate::polling;

/// Messages in flight: pgoutbox's default, and everyone's here.
pub(crate) const WINDOW: usize = 1000;

/// Names in the results.
pub(crate) const BARE: &str = "bare";
pub(crate) const PGOUTBOX: &str = "pgoutbox";

/// Messages in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Window {
    /// As it comes: chosen by itself, up to 1000.
    Default,
    /// Always so many.
    Fixed(usize),
    /// Chosen by itself, up to so many.
    UpTo(usize),
}

impl Window {
    fn settings(self) -> Vec<(&'static str, String)> {
        // Bytes never bind.
        let bytes = ("rabbitmq.window_bytes", "64MiB".to_owned());
        match self {
            Window::Default => Vec::new(),
            Window::UpTo(messages) => vec![("rabbitmq.window_messages", messages.to_string()), bytes],
            Window::Fixed(messages) => vec![
                ("rabbitmq.window_messages", messages.to_string()),
                ("rabbitmq.window_messages_min", messages.to_string()),
                bytes,
            ],
        }
    }
}

/// A program and how it is set.
#[derive(Clone, Debug)]
pub(crate) enum Subject {
    /// The bare relay.
    Bare { window: usize },
    /// A relay of ours.
    Pgoutbox { name: String, binary: PathBuf, window: Window },
    /// A polling relay: rows at a time, and the rest after an empty look.
    Polling { batch: u64, pause: Duration },
}

impl Subject {
    pub(crate) fn bare() -> Self {
        Self::Bare { window: WINDOW }
    }

    /// As it comes.
    pub(crate) fn pgoutbox() -> Self {
        Self::pgoutbox_with(Window::Default)
    }

    /// With another window.
    pub(crate) fn pgoutbox_with(window: Window) -> Self {
        Self::Pgoutbox { name: PGOUTBOX.to_owned(), binary: env!("CARGO_BIN_EXE_pgoutbox").into(), window }
    }

    /// Another build of it, to be compared with this one in the same run.
    pub(crate) fn against() -> Option<Self> {
        let binary = std::env::var_os("BENCH_AGAINST").filter(|path| !path.is_empty())?;
        Some(Self::Pgoutbox { name: "against".to_owned(), binary: binary.into(), window: Window::Default })
    }

    pub(crate) fn polling(batch: u64) -> Self {
        Self::Polling { batch, pause: Duration::ZERO }
    }

    pub(crate) fn name(&self) -> String {
        match self {
            Self::Bare { window: WINDOW } => BARE.to_owned(),
            Self::Bare { window } => format!("bare, window {window}"),
            Self::Pgoutbox { name, window: Window::Default, .. } => name.clone(),
            Self::Pgoutbox { name, window: Window::Fixed(window), .. } => format!("{name}, window {window}"),
            Self::Pgoutbox { name, window: Window::UpTo(window), .. } => format!("{name}, up to {window}"),
            Self::Polling { batch, pause: Duration::ZERO } => format!("polling, batch {batch}"),
            Self::Polling { pause, .. } => format!("polling every {} ms", pause.as_millis()),
        }
    }

    pub(crate) fn polls(&self) -> bool {
        matches!(self, Self::Polling { .. })
    }

    pub(crate) fn start(&self, arena: &Arena, way: &Way) -> Program {
        let Way { slot, broker, exchange } = *way;
        let postgres = arena.postgres.port().to_string();
        let broker_port = broker.to_string();
        match self {
            Self::Bare { window } => {
                let window = window.to_string();
                Program::own(
                    "bare",
                    &[
                        ("postgres", &postgres),
                        ("slot", slot),
                        ("broker", &broker_port),
                        ("exchange", exchange),
                        ("window", &window),
                    ],
                )
            }
            Self::Polling { batch, pause } => {
                let url = format!("{}?application_name={POLLED}", arena.url(POLLED));
                let (batch, pause) = (batch.to_string(), pause.as_millis().to_string());
                Program::own(
                    "polling",
                    &[
                        ("url", &url),
                        ("broker", &broker_port),
                        ("exchange", exchange),
                        ("batch", &batch),
                        ("pause", &pause),
                    ],
                )
            }
            Self::Pgoutbox { binary, window, .. } => {
                let amqp = format!("amqp://guest:guest@127.0.0.1:{broker}/%2f");
                let mut settings = vec![("rabbitmq.url", amqp), ("rabbitmq.exchange", exchange.to_owned())];
                settings.extend(window.settings());
                Program::pgoutbox(binary, &arena.url(DATABASE), slot, &settings)
            }
        }
    }
}

/// From where to where.
pub(crate) struct Way<'a> {
    pub(crate) slot: &'a str,
    /// The port that leads to the broker.
    pub(crate) broker: u16,
    pub(crate) exchange: &'a str,
}

/// A running program. Dropped: killed.
pub(crate) struct Program {
    child: Child,
    log: tempfile::NamedTempFile,
    /// Of pgoutbox' probes and metrics.
    port: Option<Port>,
}

impl Program {
    /// One of this binary's own.
    pub(crate) fn own(name: &str, settings: &[(&str, &str)]) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["subject", name]).args(settings.iter().map(|(key, value)| format!("{key}={value}")));
        Self::spawn(command.stdout(Stdio::piped()), None)
    }

    pub(crate) fn pgoutbox(binary: &PathBuf, url: &str, slot: &str, settings: &[(&str, String)]) -> Self {
        let port = Port::pick().unwrap();
        let mut command = Command::new(binary);
        // A PGPORT or an AMQP_URL of the caller means other servers.
        let foreign = |name: &String| name.starts_with("PG") || name == "AMQP_URL" || name == "RUST_LOG";
        for name in std::env::vars().map(|(name, _)| name).filter(foreign) {
            command.env_remove(name);
        }
        command.arg("run").env("DATABASE_URL", url).arg("--set").arg(format!("postgres.slot={slot}"));
        command.arg("--set").arg(format!("http.listen=127.0.0.1:{}", port.number()));
        for (key, value) in settings {
            command.arg("--set").arg(format!("{key}={value}"));
        }
        Self::spawn(command.stdout(Stdio::null()), Some(port))
    }

    fn spawn(command: &mut Command, port: Option<Port>) -> Self {
        let log = tempfile::NamedTempFile::new().unwrap();
        let child = command.stdin(Stdio::null()).stderr(log.reopen().unwrap()).spawn();
        Self { child: child.unwrap_or_else(|error| panic!("{command:?}: {error}")), log, port }
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.log.path()).unwrap_or_default()
    }

    /// Body of a GET with status 200; `None` while nobody answers so.
    pub(crate) fn get(&self, path: &str) -> Option<String> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port.as_ref()?.number())).ok()?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let body = text.split_once("\r\n\r\n")?.1.to_owned();
        text.starts_with("HTTP/1.1 200").then_some(body)
    }

    /// A metric of pgoutbox.
    pub(crate) fn metric(&self, name: &str) -> Option<f64> {
        let text = self.get("/metrics")?;
        let line = text.lines().find_map(|line| line.split_once(' ').filter(|(found, _)| *found == name));
        line?.1.parse().ok()
    }

    /// Waits for its end, and what it printed.
    pub(crate) fn printed(mut self) -> String {
        let mut text = String::new();
        if let Some(stdout) = &mut self.child.stdout {
            stdout.read_to_string(&mut text).unwrap();
        }
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {}", self.log());
        text
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- what the measured program wrote\n{}", self.log());
        }
    }
}

/// The other side of [`Program::own`]: this binary as a measured program.
pub(crate) fn run(name: &str, settings: &[String]) {
    let text = |key: &str| {
        let found = settings.iter().find_map(|setting| setting.split_once('=').filter(|(name, _)| *name == key));
        found.unwrap_or_else(|| panic!("{key} is missing")).1
    };
    let number = |key: &str| text(key).parse::<u64>().unwrap_or_else(|error| panic!("{key}: {error}"));
    let port = |key: &str| u16::try_from(number(key)).unwrap();
    let stream = || Stream::open(port("postgres"), DATABASE, text("slot"), "pgoutbox");
    match name {
        "bare" => {
            Relay::new(stream(), Publisher::open(port("broker"), text("exchange")), number("window") as usize).run()
        }
        "drain" => {
            let (seconds, rows) = drain::run(stream(), number("rows"));
            println!("{seconds} {rows}");
        }
        "publish" => {
            let publisher = Publisher::open(port("broker"), text("exchange"));
            let window = number("window") as usize;
            let mut latencies = publisher::run(publisher, window, number("rows"), number("bytes") as usize);
            latencies.sort_unstable();
            println!("{}", latencies.get(latencies.len() / 2).map_or(0.0, |half| half.as_secs_f64() * 1e3));
        }
        "polling" => polling::run(
            text("url"),
            port("broker"),
            text("exchange"),
            number("batch"),
            Duration::from_millis(number("pause")),
        ),
        other => panic!("there is no program {other}"),
    }
}
