//! Throw-away private PostgreSQL and RabbitMQ, for `pgoutbox demo`, the tests and the benches.
//!
//! Each server has a directory of its own, listens on loopback only, and is gone after `Drop`. Nothing here is for
//! production: PostgreSQL trusts every local user, and RabbitMQ has its guest.
//!
//! The trap: ports. The usual "bind port 0 and remember" hands out ports of the ephemeral range, and a client that keeps
//! reconnecting to a *stopped* server on such a port is sooner or later given that same port as its source. TCP then
//! connects the socket to itself (a simultaneous open, RFC 9293 section 3.5): the client reads its own bytes back, and the
//! server cannot come back because its port is taken. So ports are picked below the ephemeral range. There, another program
//! of ours may pick the port of a server that is down for a moment: so a port is claimed for as long as somebody means it.

mod installation;
mod keeper;
mod postgres;
mod process;
mod rabbitmq;

use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::time::Duration;

pub(crate) use keeper::Keeper;
pub use postgres::Postgres;
pub(crate) use process::Process;
pub use rabbitmq::{Extras, RabbitMq, Tls};

/// A stranger may take the port between our look and the server's bind; each further attempt picks anew.
const START_ATTEMPTS_MAX: u32 = 4;

/// Below it are the ports of services that this machine may have.
const LOWEST: u16 = 10_000;

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

/// A port on loopback, free when it was picked, and outside the ephemeral range (see the module). While this lives, nobody
/// else who asks for one is given the same: neither in this program nor in another one on this machine.
#[derive(Debug)]
pub struct Port {
    number: u16,
    /// A name in the kernel, of this network namespace, that goes with the program that holds it, however that ends.
    _claim: UnixDatagram,
}

impl Port {
    /// Picks one.
    ///
    /// # Errors
    /// `Io` when there is none.
    pub fn pick() -> Result<Self, Error> {
        const PICKS_MAX: u32 = 200;
        let range = LOWEST..end();
        let mut picked = Self::claim(fastrand::u16(range.clone()));
        for _ in 1..PICKS_MAX {
            if picked.is_ok() {
                break;
            }
            picked = Self::claim(fastrand::u16(range.clone()));
        }
        picked.map_err(Error::io("find a free port on 127.0.0.1"))
    }

    /// The port.
    pub fn number(&self) -> u16 {
        self.number
    }

    /// The claim first: to look is to take the port for a moment, which may be the one in which its server comes back.
    fn claim(number: u16) -> io::Result<Self> {
        let name = SocketAddr::from_abstract_name(format!("pgoutbox-port-{number}"))?;
        let claim = UnixDatagram::bind_addr(&name)?;
        TcpListener::bind((Ipv4Addr::LOCALHOST, number))?;
        Ok(Self { number, _claim: claim })
    }
}

/// The first port that is not picked: the ephemeral range begins there, or below all that could be picked.
fn end() -> u16 {
    const DEFAULT: u16 = 32_768;
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let lowest = range.split_whitespace().next().and_then(|lowest| lowest.parse().ok()).unwrap_or(DEFAULT);
    if lowest > LOWEST + 1_000 { lowest } else { DEFAULT }
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
    fn a_port_that_somebody_means_is_nobody_elses_and_none_is_ephemeral() {
        let port = Port::pick().unwrap();
        let number = port.number();
        assert!((LOWEST..end()).contains(&number), "{number}");
        // Its server is down for the moment, or was not started yet.
        assert!(TcpListener::bind((Ipv4Addr::LOCALHOST, number)).is_ok());
        assert_eq!(Port::claim(number).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(port);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, number)).unwrap();
        assert_eq!(Port::claim(number).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        assert_eq!(Port::claim(number).unwrap().number(), number);
    }

    #[test]
    fn the_tail_of_a_log_is_its_last_lines() {
        let log: String = (1..=30).map(|line| format!("line {line}\n")).collect();
        assert!(tail(&log).starts_with("its log ends with\nline 11\n"));
        assert!(tail(&log).ends_with("line 30"));
        assert_eq!(tail("\n"), "it wrote nothing to its log");
    }
}
