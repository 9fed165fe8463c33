//! `--deep`: what takes longer, and what is worth knowing though nothing is wrong. Publishes nothing, changes nothing.
//!
//! The trap: what could not be looked at must say so, or silence is taken for "all is well".

use std::collections::BTreeMap;

use crate::config::Config;
use crate::finding::{Finding, Look, Remedy};
use crate::lsn::Lsn;
use crate::outbox;
use crate::outbox::mapping::Transaction;
use crate::pg::advice::{begin_anew, not_looked};
use crate::pg::catalog::Control;
use crate::pg::pgoutput::{Column, Tuple};
use crate::pg::replication::Replication;
use crate::pg::world::{World, identifier};
use crate::pg::{self, Sampled};
use crate::sink::rabbitmq::probe::Sample;

/// So many kinds of impossible rows are told.
const PROBLEMS_MAX: usize = 5;

/// What Postgres tells about itself, the stream and the last rows; and what these rows would become.
pub(super) async fn look(config: &Config, control: &Control, world: &World) -> (Vec<Look>, Vec<Sample>) {
    let names = &config.names;
    let mut looks = match control.circumstances().await {
        Ok(circumstances) => circumstances.looks(names, world),
        Err(error) => vec![not_looked("settings", error.to_string(), Remedy::default())],
    };
    looks.extend(stream(config, control, world).await);
    let (rows, samples) = rows(config, control, world).await;
    looks.extend(rows);
    (looks, samples)
}

/// Whether decoding would begin: the catalog of now does not say what it was when rows were written.
async fn stream(config: &Config, control: &Control, world: &World) -> Option<Look> {
    let names = &config.names;
    let (what, free) = (format!("stream of slot {}", names.slot), world.slot.as_ref()?.active_pid.is_none());
    if !world.slot_findings(names).is_empty() || world.publication.is_none() || !world.may_replicate {
        return None;
    }
    if !free {
        return Some(not_looked(what, "the slot is in use", Remedy::default()));
    }
    let peeked = async {
        let mut replication = Replication::open(control, &config.postgres).await?;
        replication.peek(&names.slot, &names.publication, 1).await
    };
    Some(match peeked.await {
        Ok(_) => Look::sound(format!("{what}: what is next can be decoded")),
        Err(error @ pg::Error::PublicationSkipped(_)) => Look::wrong(what, gap(&error, config)),
        Err(pg::Error::Server(error)) if error.code() == "42704" => {
            Look::wrong(what, gap(&pg::Error::Server(error), config))
        }
        Err(pg::Error::Server(error)) if ["55006", "57014"].contains(&error.code()) => {
            not_looked(what, error.message(), Remedy::default())
        }
        Err(error) => return Look::each(&what, error.findings()).into_iter().next(),
    })
}

fn gap(error: &pg::Error, config: &Config) -> Finding {
    let problem = error.to_string();
    let problem = problem.split_once(". Remedy: ").map_or(problem.as_str(), |(problem, _)| problem);
    Finding::new(problem, begin_anew(&config.names))
}

/// What the last rows would become, by the code that a relay maps them with.
async fn rows(config: &Config, control: &Control, world: &World) -> (Vec<Look>, Vec<Sample>) {
    let what = format!("last rows of {}", config.names.qualified());
    let columns = world.streamed_columns();
    let column = |(name, type_id): &(String, u32)| Column { name: name.clone(), type_id: *type_id };
    let layout = config.mapping.layout(&columns.iter().map(column).collect::<Vec<_>>());
    // Without a table, or one that is none, that was said.
    let (Some(table), Ok(mut layout)) = (&world.table, layout) else { return (Vec::new(), Vec::new()) };
    let rows = match control.last_rows(table, &columns, layout.payload()).await {
        Ok(rows) => rows,
        Err(error) => return (vec![unreadable(what, &error, config, control, world).await], Vec::new()),
    };
    let nowhere = Transaction::new(Lsn::ZERO, 0);
    let mut problems = BTreeMap::new();
    let mut samples = Vec::new();
    for row in &rows {
        match layout.message(&values(row), &nowhere, 0) {
            Ok(message) => samples.push(Sample { message, body_bytes: row.payload_bytes.unwrap_or(0) }),
            Err(outbox::Error::Row { id, problem, .. }) => drop(problems.insert(problem, id)),
            Err(_) => {}
        }
    }
    let mut looks: Vec<Look> = Vec::new();
    for (problem, id) in problems.into_iter().take(PROBLEMS_MAX) {
        let problem = format!("row {id} would stop the relay: {problem}");
        looks.push(Look::note(what.clone(), problem, Remedy::act("mend what writes such rows")));
    }
    if rows.is_empty() {
        looks.push(Look::sound(format!("{what}: none that role {} can see", world.role)));
    } else if looks.is_empty() {
        looks.push(Look::sound(format!("{what}: each of {} makes a message", rows.len())));
    }
    (looks, samples)
}

fn values(row: &Sampled) -> Tuple {
    row.values.iter().map(Option::as_ref).collect()
}

/// A relay reads no table, so it need not be allowed to.
async fn unreadable(what: String, error: &pg::Error, config: &Config, control: &Control, world: &World) -> Look {
    let (role, names) = (identifier(&world.role), &config.names);
    match error {
        pg::Error::Server(error) if error.code() == "42501" => {
            // Its words are another language's elsewhere, and names in them say anything.
            let privileges = control.privileges(&names.schema).await;
            let grant = if privileges.is_ok_and(|privileges| !privileges.uses_schema) {
                format!("GRANT USAGE ON SCHEMA {} TO {role}", identifier(&names.schema))
            } else {
                format!("GRANT SELECT ON {} TO {role}", names.qualified())
            };
            let remedy =
                Remedy::sql(grant).mind("For `check --deep` only; or check as another role. A relay reads no table");
            not_looked(what, error.message(), remedy)
        }
        error => not_looked(what, error.to_string(), Remedy::default()),
    }
}
