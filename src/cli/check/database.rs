//! Postgres: the way there, twice, and everything that a relay depends on behind it.

use std::collections::HashSet;
use std::sync::Arc;

use super::deep;
use crate::config::Config;
use crate::error::Error;
use crate::finding::{Finding, Look, Remedy};
use crate::metrics::Metrics;
use crate::pg;
use crate::pg::catalog::Control;
use crate::pg::replication::Replication;
use crate::pg::world::World;
use crate::relay::postgres::Postgres;
use crate::sink::rabbitmq::probe::Sample;

/// What keeps `run` from running, as `run` itself would find it.
pub(in crate::cli) async fn findings(config: &Config, control: &Control) -> Result<Vec<Finding>, Error> {
    let world = control.inspect(&config.names).await?;
    let mut findings = relay(config).findings(&world);
    findings.extend(standby(&world, control));
    findings.extend(world.unfinished_slot(&config.names));
    Ok(findings)
}

fn relay(config: &Config) -> Postgres {
    Postgres {
        settings: config.postgres.clone(),
        names: config.names.clone(),
        mapping: config.mapping.clone(),
        metrics: Arc::new(Metrics::new()),
        said: HashSet::new(),
    }
}

pub(in crate::cli) fn standby(world: &World, control: &Control) -> Option<Finding> {
    let remedy = Remedy::act("name the primary in postgres.url, or all hosts; the relay waits for one");
    world.in_recovery.then(|| Finding::new(format!("{} is a standby", control.place()), remedy))
}

/// What was looked at, and with `is_deep` messages such as will be published.
pub(super) async fn look(config: &Config, is_deep: bool) -> (Vec<Look>, Vec<Sample>) {
    let settings = &config.postgres;
    let connection = format!("connection to Postgres as {}, database {}", settings.user, settings.database);
    let control = match Control::open(settings).await {
        Ok(control) => control,
        Err(error) => return (wrong(&connection, &error), Vec::new()),
    };
    let mut looks = vec![Look::sound(connection)];
    let world = match control.inspect(&config.names).await {
        Ok(world) => world,
        Err(error) => {
            looks.extend(wrong("catalog", &error));
            return (looks, Vec::new());
        }
    };
    looks.extend(server(&world, &control));
    looks.extend(replication(config, &world, &control).await);
    looks.extend(outbox(config, &world));
    if !is_deep {
        return (looks, Vec::new());
    }
    let (deep, samples) = deep::look(config, &control, &world).await;
    looks.extend(deep);
    (looks, samples)
}

fn wrong(what: &str, error: &pg::Error) -> Vec<Look> {
    Look::each(what, error.findings())
}

fn server(world: &World, control: &Control) -> Vec<Look> {
    let version = pg::world::version(world.version);
    let what = format!("PostgreSQL {version} at {}, wal_level, role {}", control.place(), world.role);
    let mut findings = world.server_findings();
    findings.extend(standby(world, control));
    Look::each(&what, findings)
}

/// Who may not replicate was told so already.
async fn replication(config: &Config, world: &World, control: &Control) -> Vec<Look> {
    if !world.may_replicate {
        return Vec::new();
    }
    let what = format!("replication connection to {} as {}", control.place(), config.postgres.user);
    match Replication::open(control, &config.postgres).await {
        Ok(_) => vec![Look::sound(what)],
        Err(error) => wrong(&what, &error),
    }
}

fn outbox(config: &Config, world: &World) -> Vec<Look> {
    let names = &config.names;
    let mut table = world.table_findings(names);
    let columns = relay(config).column_finding(world);
    if table.is_empty() {
        table.extend(columns);
    }
    let mut looks = Look::each(&format!("table {}", names.qualified()), table);
    looks.extend(Look::each(&format!("publication {}", names.publication), world.publication_findings(names)));
    let (mut slot, unfinished) = (world.slot_findings(names), world.unfinished_slot(names));
    let held = if unfinished.is_none() { held(config, world) } else { None };
    slot.extend(unfinished);
    looks.extend(Look::each(&format!("slot {}", names.slot), slot));
    looks.extend(held);
    looks
}

/// A relay would wait for it, which is what a second one is for.
fn held(config: &Config, world: &World) -> Option<Look> {
    let pid = world.slot.as_ref().filter(|slot| !slot.temporary)?.active_pid?;
    let problem = format!("walsender {pid} holds it: a relay runs, or another client; a second relay waits for it");
    Some(Look::note(format!("slot {}", config.names.slot), problem, Remedy::default()))
}
