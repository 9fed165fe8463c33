//! Throw-away private PostgreSQL and RabbitMQ, for `pgoutbox demo`, the tests and the benches.
//!
//! Each server has a directory of its own, listens on loopback only, and is gone after `Drop`. Nothing here is for
//! production: PostgreSQL trusts every local user, and RabbitMQ has its guest.
//!
//! The trap: ports. The usual "bind port 0 and remember" hands out ports of the ephemeral range, and a client that keeps
//! reconnecting to a *stopped* server on such a port is sooner or later given that same port as its source. TCP then
//! connects the socket to itself (a simultaneous open, RFC 9293 section 3.5): the client reads its own bytes back, and the
//! server cannot come back because its port is taken. So ports are picked below the ephemeral range.

mod installation;
mod keeper;
mod postgres;
mod process;
mod rabbitmq;

use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::time::Duration;

pub(crate) use keeper::Keeper;
pub use postgres::Postgres;
pub(crate) use process::Process;
pub use rabbitmq::{Extras, RabbitMq, Tls};

/// Two programs may pick the same port between our look and the server's bind; each further attempt picks anew.
const START_ATTEMPTS_MAX: u32 = 4;

/// Enough of a server's log to hold its reason, little enough to read in a terminal.
const LOG_TAIL_LINES: usize = 20;

/// Why a throw-away server could not be had, with the remedy where there is one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A program this needs is not on the machine.
    #[error("{server} is not installed (looked for {looked_for}): {remedy}")]
    Missing {
        /// The server.
        server: &'static str,
        /// The file or user that is missing.
        looked_for: String,
        /// What to run.
        remedy: &'static str,
    },
    /// The operating system refused.
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was attempted.
        doing: String,
        /// Its answer.
        source: io::Error,
    },
    /// A server, or a tool of its own, refused.
    #[error("cannot {doing}: {why}")]
    Refused {
        /// What was attempted.
        doing: String,
        /// The end of what the server wrote about it, and the remedy where there is one.
        why: String,
    },
    /// It may still happen, but not within the time allowed.
    #[error("cannot {doing} within {within:?}: {why}")]
    Late {
        /// What was attempted.
        doing: String,
        /// The time allowed.
        within: Duration,
        /// The end of what the server wrote.
        why: String,
    },
}

impl Error {
    /// For `map_err`: names what was attempted.
    fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }

    fn refused(doing: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Refused { doing: doing.into(), why: why.into() }
    }
}

/// Ports on loopback, all different, free a moment ago, and outside the ephemeral range (see the module).
///
/// # Errors
/// `Io` when there is none.
pub fn free_ports<const N: usize>() -> Result<[u16; N], Error> {
    let mut held = Vec::with_capacity(N);
    while held.len() < N {
        held.push(free_port().map_err(Error::io("find a free port on 127.0.0.1"))?);
    }
    // Held until all are found, so that no two are the same.
    let mut ports = [0; N];
    for (port, listener) in ports.iter_mut().zip(&held) {
        *port = listener.local_addr().map_err(Error::io("read the port of a socket"))?.port();
    }
    Ok(ports)
}

fn free_port() -> io::Result<TcpListener> {
    const LOWEST: u16 = 10_000;
    const PICKS_MAX: u32 = 200;
    let ephemeral = ephemeral_lowest();
    if ephemeral > LOWEST + 1_000 {
        for _ in 0..PICKS_MAX {
            if let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, fastrand::u16(LOWEST..ephemeral))) {
                return Ok(listener);
            }
        }
    }
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
}

fn ephemeral_lowest() -> u16 {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    range.split_whitespace().next().and_then(|lowest| lowest.parse().ok()).unwrap_or(32_768)
}

fn read_lossy(path: &Path) -> String {
    std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let from = lines.len().saturating_sub(LOG_TAIL_LINES);
    let last = lines.get(from..).unwrap_or_default().join("\n");
    if last.trim().is_empty() { "it wrote nothing to its log".to_owned() } else { format!("its log ends with\n{last}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_ports_differ_and_are_not_ephemeral() {
        let [a, b, c] = free_ports::<3>().unwrap();
        assert!(a != b && b != c && a != c);
        assert!([a, b, c].iter().all(|&port| port < ephemeral_lowest()));
    }

    #[test]
    fn the_tail_of_a_log_is_its_last_lines() {
        let log: String = (1..=30).map(|line| format!("line {line}\n")).collect();
        assert!(tail(&log).starts_with("its log ends with\nline 11\n"));
        assert!(tail(&log).ends_with("line 30"));
        assert_eq!(tail("\n"), "it wrote nothing to its log");
    }
}
