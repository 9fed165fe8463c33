//! `pgoutbox drop`: removes slot and publication, after saying what would be lost.
//!
//! The trap: a script whose standard input is empty, or is something else, is nobody who could have read what would be lost.

use std::io::{BufRead, IsTerminal};

use super::{say, write_out};
use crate::config::Config;
use crate::error::Error;
use crate::finding::{Finding, Remedy};
use crate::pg;
use crate::pg::catalog::Control;
use crate::pg::refusal::writing;
use crate::pg::replication::Replication;
use crate::pg::world::{Slot, World, identifier, literal};

/// So many changes are counted and no more: it is about none, some or many.
const COUNTED_CHANGES_MAX: u32 = 10_000;

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
    // Its slot would go, and the publication, which is the primary's, stay.
    if let Some(standby) = super::check::standby(&world, &control) {
        return Err(Error::Found(format!("nothing changed: {standby}")));
    }
    if let Some(slot) = &world.slot {
        ours(slot, &names.slot, &world)?;
    }
    if let Some(pid) = world.slot.as_ref().and_then(|slot| slot.active_pid) {
        let text = format!("slot {} is in use (walsender {pid}). Remedy: stop the relay first", names.slot);
        return Err(Error::Found(text));
    }
    if world.slot.is_none() && world.publication.is_none() {
        let (slot, publication) = (&names.slot, &names.publication);
        return say(&format!("neither slot {slot} nor publication {publication} exists: nothing to drop"));
    }
    tell(config, &control, &world).await?;
    if !arguments.yes && !std::io::stdin().is_terminal() {
        let text = "drop: nobody can be asked, since standard input is no terminal; nothing changed. Remedy: add --yes";
        return Err(Error::Usage(text.to_owned()));
    }
    if !arguments.yes && !confirmed()? {
        return say("nothing changed");
    }
    remove(config, &control, &world).await?;
    if world.slot.is_some() {
        say(&format!("slot {} dropped", names.slot))?;
    }
    if world.publication.is_some() {
        say(&format!("publication {} dropped", names.publication))?;
    }
    Ok(())
}

/// Both or nothing: the publication, which a transaction gives back, before the slot, which none does.
async fn remove(config: &Config, control: &Control, world: &World) -> Result<(), Error> {
    let names = &config.names;
    let publication =
        world.publication.as_ref().map(|_| format!("drop publication {}", identifier(&names.publication)));
    let slot = format!("select pg_catalog.pg_drop_replication_slot({})", literal(&names.slot));
    let slot = world.slot.as_ref().map(|_| slot);
    let statements: Vec<String> = publication.into_iter().chain(slot).collect();
    match control.change(&format!("begin; {}; commit", statements.join("; "))).await {
        Err(pg::Error::Server(error)) => {
            let remedy = match error.code() {
                "42501" => Remedy::act("drop as the publication's owner with REPLICATION, or as a superuser"),
                "25006" => writing(&world.role, &world.database),
                "55006" => Remedy::act("stop the relay first"),
                _ => Remedy::default(),
            };
            let found = Finding::new(format!("nothing changed: {}", error.plain()), remedy);
            Err(Error::Found(found.to_string()))
        }
        changed => Ok(changed?),
    }
}

/// Slots belong to a cluster, and their names are few: one that is somebody else's is not ours to remove. Postgres would.
fn ours(slot: &Slot, name: &str, world: &World) -> Result<(), Error> {
    let found = |whose: String| {
        let text = format!(
            "slot {name} {whose}: it is not the slot of an outbox in {}. Nothing changed. Remedy: see whose it is before \
             you drop it: SELECT * FROM pg_replication_slots;",
            world.database
        );
        Err(Error::Found(text))
    };
    match (&slot.plugin, &slot.database) {
        (None, _) => found("is physical".to_owned()),
        (Some(plugin), _) if plugin != "pgoutput" => found(format!("uses the plugin {plugin}, not pgoutput")),
        (_, Some(database)) if *database != world.database => found(format!("belongs to database {database}")),
        _ => Ok(()),
    }
}

/// What would be lost, and what would not.
async fn tell(config: &Config, control: &Control, world: &World) -> Result<(), Error> {
    let names = &config.names;
    if let Some(slot) = &world.slot {
        let behind = slot.server.bytes_since(slot.confirmed);
        say(&format!(
            "slot {} stands at {}: rows committed in the {behind} bytes of WAL since then will never be published; {}",
            names.slot,
            slot.confirmed,
            waiting(config, control).await
        ))?;
        say("a slot that is made later begins where WAL is then: what is committed in between is not in its stream")?;
    }
    if world.publication.is_some() {
        say(&format!("publication {} goes with all that it publishes", names.publication))?;
    }
    say(&format!("table {} stays as it is", names.qualified()))
}

/// How many rows wait there, as far as that can be told.
async fn waiting(config: &Config, control: &Control) -> String {
    let names = &config.names;
    let counting = async {
        let mut replication = Replication::open(control, &config.postgres).await?;
        replication.peek(&names.slot, &names.publication, COUNTED_CHANGES_MAX).await
    };
    match counting.await {
        Ok(0) => "none waits there".to_owned(),
        Ok(count) if count >= COUNTED_CHANGES_MAX.into() => format!("at least {count} wait there"),
        Ok(count) => format!("{count} wait there"),
        Err(error) => format!("they cannot be counted: {error}"),
    }
}

fn confirmed() -> Result<bool, Error> {
    write_out("drop them? [y/N] ")?;
    let mut answer = String::new();
    // No answer is no.
    Ok(std::io::stdin().lock().read_line(&mut answer).is_ok() && matches!(answer.trim(), "y" | "Y" | "yes"))
}
