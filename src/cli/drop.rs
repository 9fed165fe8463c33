//! `pgoutbox drop`: removes slot and publication, after saying what would be lost.

use std::io::{BufRead, Write};

use crate::config::Config;
use crate::error::Error;
use crate::pg;
use crate::pg::catalog::Control;
use crate::pg::world::{identifier, literal};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

pub(super) async fn run(arguments: &Arguments, config: &Config) -> Result<(), Error> {
    let names = &config.names;
    let control = Control::open(&config.postgres).await?;
    let world = control.inspect(names).await?;
    if let Some(slot) = &world.slot {
        if let Some(pid) = slot.active_pid {
            let text = format!("slot {} is in use (walsender {pid}). Remedy: stop the relay first", names.slot);
            return Err(Error::Found(text));
        }
        let behind = slot.server.bytes_since(slot.confirmed);
        println!(
            "slot {} stands at {}: rows committed in the {behind} bytes of WAL since then will never be published",
            names.slot, slot.confirmed
        );
    }
    println!("table {} stays as it is", names.qualified());
    if !arguments.yes && !confirmed() {
        println!("nothing changed");
        return Ok(());
    }
    let client = control.client();
    if world.slot.is_some() {
        let sql = format!("select pg_catalog.pg_drop_replication_slot({})", literal(&names.slot));
        client.batch_execute(&sql).await.map_err(pg::Error::from)?;
        println!("slot {} dropped", names.slot);
    }
    if world.publication.is_some() {
        let sql = format!("drop publication {}", identifier(&names.publication));
        client.batch_execute(&sql).await.map_err(pg::Error::from)?;
        println!("publication {} dropped", names.publication);
    }
    Ok(())
}

fn confirmed() -> bool {
    print!("drop them? [y/N] ");
    let _ = std::io::stdout().flush();
    let mut answer = String::new();
    // No answer is no.
    std::io::stdin().lock().read_line(&mut answer).is_ok() && matches!(answer.trim(), "y" | "Y" | "yes")
}
