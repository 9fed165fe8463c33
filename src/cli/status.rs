//! `pgoutbox status`: where the slot stands by the server, who holds it, whether all is set up, and how the relay is.
//!
//! The trap: a relay that answers "ready" and a slot that does not move are two truths. Both are told, side by side.

use std::io::IsTerminal;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytesize::ByteSize;
use serde_json::{Value as Json, json};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::{complain, write_out};
use crate::config::Config;
use crate::error::Error;
use crate::finding::{Finding, explain};
use crate::http::ask;
use crate::pg::catalog::{Control, Holder};
use crate::pg::world::Slot;

/// A relay on this machine answers at once.
const RELAY_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// As JSON; with --watch one line each time
    #[arg(long)]
    json: bool,
    /// Again and again, every so many seconds
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2",
        value_parser = clap::value_parser!(u64).range(1..=86_400))]
    watch: Option<u64>,
}

/// Everything at one moment.
struct Status {
    name: String,
    /// None: it is missing.
    slot: Option<Slot>,
    holder: Option<Holder>,
    publication: String,
    problems: Vec<Finding>,
    relay: Relay,
}

/// What the relay's own probe says.
enum Relay {
    /// `http.listen` is empty.
    Off,
    Silent(SocketAddr, String),
    Answers(SocketAddr, Vec<String>),
}

pub(super) async fn run(arguments: &Arguments, config: &Config) -> Result<(), Error> {
    let Some(seconds) = arguments.watch else {
        let status = look(config).await?;
        write_out(&if arguments.json { format!("{:#}\n", status.json()) } else { status.text() })?;
        return status.slot.as_ref().map(drop).ok_or_else(|| {
            Error::Found(format!("replication slot {} does not exist; what to do is said in problems", status.name))
        });
    };
    loop {
        let status = look(config).await;
        if std::io::stdout().is_terminal() && !arguments.json {
            // Home, and clear what was there.
            write_out("\x1b[H\x1b[2J")?;
        }
        let is_read = match status {
            Ok(status) if arguments.json => write_out(&format!("{}\n", status.json()))?,
            Ok(status) => write_out(&format!("{}\n", status.text()))?,
            // It may come back: that is what one watches for.
            Err(error) => {
                complain(&explain(&error));
                true
            }
        };
        if !is_read {
            return Ok(());
        }
        sleep(Duration::from_secs(seconds)).await;
    }
}

async fn look(config: &Config) -> Result<Status, Error> {
    let names = &config.names;
    let control = Control::open(&config.postgres).await?;
    let problems = super::check::findings(config, &control).await?;
    let slot = control.slot(&names.slot).await?;
    let holder = match slot.as_ref().and_then(|slot| slot.active_pid) {
        Some(pid) => control.holder(pid).await?,
        None => None,
    };
    let relay = match config.http {
        None => Relay::Off,
        Some(address) => ask_relay(address).await,
    };
    Ok(Status { name: names.slot.clone(), slot, holder, publication: names.publication.clone(), problems, relay })
}

async fn ask_relay(listen: SocketAddr) -> Relay {
    let host = match listen.ip() {
        // All addresses are none to connect to.
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    let address = SocketAddr::new(host, listen.port());
    let asking = async {
        let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
        ask(stream, &address.to_string(), "/readyz", None).await
    };
    let (_, body) = match timeout(RELAY_TIMEOUT, asking).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(problem)) => return Relay::Silent(address, problem),
        Err(_) => return Relay::Silent(address, "no answer".to_owned()),
    };
    let reasons = serde_json::from_slice::<Json>(&body).ok();
    match reasons.as_ref().and_then(|json| json.get("reasons")).and_then(Json::as_array) {
        Some(reasons) => {
            let texts = reasons.iter().filter_map(|reason| reason.as_str().map(str::to_owned));
            Relay::Answers(address, texts.collect())
        }
        None => Relay::Silent(address, "what answers there is no relay".to_owned()),
    }
}

impl Status {
    fn json(&self) -> Json {
        let slot = self.slot.as_ref();
        let holder = |holder: &Holder| {
            let Holder { pid, application, address, state } = holder;
            json!({ "pid": pid, "application": application, "address": address, "state": state })
        };
        let relay = match &self.relay {
            Relay::Off => Json::Null,
            Relay::Silent(address, problem) => json!({ "address": address, "answers": false, "problem": problem }),
            Relay::Answers(address, reasons) => {
                json!({ "address": address, "answers": true, "ready": reasons.is_empty(), "reasons": reasons })
            }
        };
        json!({
            "slot": self.name,
            "confirmed_lsn": slot.map(|slot| slot.confirmed.to_string()),
            "server_lsn": slot.map(|slot| slot.server.to_string()),
            "lag_bytes": slot.map(lag_bytes),
            "lag_seconds": slot.and_then(lag_seconds),
            "retained_bytes": slot.map(Slot::retained_bytes),
            "safe_bytes": slot.and_then(Slot::safe_bytes),
            "wal_status": slot.map(|slot| &slot.wal_status),
            "invalidation_reason": slot.map(|slot| &slot.invalidation_reason),
            "failover": slot.map(|slot| slot.failover),
            "held_by_pid": slot.map(|slot| slot.active_pid),
            "held_by": self.holder.as_ref().map(holder),
            "publication": self.publication,
            "problems": self.problems.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "relay": relay,
        })
    }

    fn text(&self) -> String {
        let mut lines = match &self.slot {
            Some(slot) => self.position(slot),
            None => vec![("slot", format!("{} does not exist", self.name))],
        };
        lines.push(("publication", self.publication.clone()));
        let sound = || vec!["none".to_owned()];
        let problems: Vec<String> = self.problems.iter().map(ToString::to_string).collect();
        let problems = if problems.is_empty() { sound() } else { problems };
        lines.extend(problems.into_iter().map(|problem| ("problems", problem)));
        lines.push(("relay", self.relay()));
        lines.iter().map(|(name, value)| format!("{name:12} {value}\n")).collect()
    }

    fn position(&self, slot: &Slot) -> Vec<(&'static str, String)> {
        let seconds = lag_seconds(slot).map_or_else(|| "unknown".to_owned(), |seconds| format!("{seconds:.1} s"));
        let safe = match slot.safe_bytes() {
            _ if slot.is_lost() => "none: the slot is lost".to_owned(),
            None => "no limit".to_owned(),
            Some(bytes) => size(u64::try_from(bytes).unwrap_or(0)) + " more WAL until the slot is in danger",
        };
        let status = slot.wal_status.as_deref().unwrap_or("unknown");
        let status =
            slot.invalidation_reason.as_ref().map_or(status.to_owned(), |reason| format!("{status}: {reason}"));
        vec![
            ("slot", format!("{} at {}", self.name, slot.confirmed)),
            ("server", slot.server.to_string()),
            ("lag", format!("{}, {seconds}", size(lag_bytes(slot)))),
            ("retained", size(slot.retained_bytes())),
            ("safe", safe),
            ("wal_status", status),
            ("held by", self.holder(slot)),
        ]
    }

    fn holder(&self, slot: &Slot) -> String {
        let Some(pid) = slot.active_pid else { return "nobody".to_owned() };
        let told = |text: &Option<String>, word: &str| text.as_ref().map(|text| format!("{word}{text}"));
        let holder = self.holder.as_ref();
        let parts = [
            holder.and_then(|holder| told(&holder.application, ", ")),
            holder.and_then(|holder| told(&holder.address, " from ")),
            holder.and_then(|holder| told(&holder.state, ", ")),
        ];
        format!("walsender {pid}{}", parts.into_iter().flatten().collect::<String>())
    }

    fn relay(&self) -> String {
        match &self.relay {
            Relay::Off => "http.listen is empty: it cannot be asked".to_owned(),
            Relay::Silent(address, problem) => format!("{address}: {problem}"),
            Relay::Answers(address, reasons) if reasons.is_empty() => format!("{address}: ready"),
            Relay::Answers(address, reasons) => format!("{address}: not ready: {}", reasons.join("; ")),
        }
    }
}

fn lag_bytes(slot: &Slot) -> u64 {
    slot.server.bytes_since(slot.confirmed)
}

/// The server forgets the time once there is no lag.
fn lag_seconds(slot: &Slot) -> Option<f64> {
    slot.lag_seconds.or((lag_bytes(slot) == 0).then_some(0.0))
}

/// For people, and exactly.
fn size(bytes: u64) -> String {
    if bytes < 1024 { format!("{bytes} bytes") } else { format!("{} ({bytes} bytes)", ByteSize(bytes)) }
}
