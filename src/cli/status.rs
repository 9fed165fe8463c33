//! `pgoutbox status`: where the slot stands, by the server.

use crate::config::Config;
use crate::error::Error;
use crate::pg::catalog::Control;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// As JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(arguments: &Arguments, config: &Config) -> Result<(), Error> {
    let control = Control::open(&config.postgres).await?;
    let name = &config.names.slot;
    let Some(slot) = control.slot(name).await? else {
        return Err(Error::Found(format!("replication slot {name} does not exist. Remedy: run `pgoutbox init`")));
    };
    let lag_bytes = slot.server.bytes_since(slot.confirmed);
    let status = serde_json::json!({
        "slot": name,
        "confirmed_lsn": slot.confirmed.to_string(),
        "server_lsn": slot.server.to_string(),
        "lag_bytes": lag_bytes,
        // The server forgets the time once there is no lag.
        "lag_seconds": slot.lag_seconds.or((lag_bytes == 0).then_some(0.0)),
        "retained_bytes": slot.server.bytes_since(slot.restart),
        "safe_bytes": slot.safe_bytes,
        "wal_status": slot.wal_status,
        "held_by_pid": slot.active_pid,
    });
    if arguments.json {
        println!("{status:#}");
        return Ok(());
    }
    for (name, value) in status.as_object().into_iter().flatten() {
        println!("{name:15} {}", value.as_str().map_or_else(|| value.to_string(), str::to_owned));
    }
    Ok(())
}
