//! `pgoutbox init`: creates what is missing, in the order that loses nothing: table, publication, slot.

use std::time::Duration;

use tokio::time::sleep;

use crate::config::Config;
use crate::error::Error;
use crate::pg;
use crate::pg::catalog::Control;
use crate::pg::world::{identifier, literal};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Print all statements, roles and grants too, and touch nothing
    #[arg(long)]
    print_sql: bool,
}

pub(super) async fn run(arguments: &Arguments, config: &Config) -> Result<(), Error> {
    let sql = Sql::new(config);
    if arguments.print_sql {
        // A slot cannot be made in a transaction that wrote, and a tool may send all of this as one.
        for part in ["begin;", &sql.table, &sql.publication, "commit;\n", &sql.slot, &sql.roles] {
            println!("{part}");
        }
        return Ok(());
    }
    let names = &config.names;
    let control = Control::open(&config.postgres).await?;
    let world = control.inspect(names).await?;
    create("table", &names.qualified(), world.table.is_some(), &control, &sql.table).await?;
    create("publication", &names.publication, world.publication.is_some(), &control, &sql.publication).await?;
    create("slot", &names.slot, world.slot.is_some(), &control, &sql.slot).await?;
    let findings = super::check::findings(config, &control).await?;
    if findings.is_empty() {
        println!("ready: pgoutbox run");
        return Ok(());
    }
    let lines: Vec<String> = findings.iter().map(ToString::to_string).collect();
    Err(Error::Found(format!("not ready yet:\n  {}", lines.join("\n  "))))
}

async fn create(kind: &str, name: &str, exists: bool, control: &Control, sql: &str) -> Result<(), Error> {
    if exists {
        println!("{kind} {name} is there");
        return Ok(());
    }
    let creating = control.client().batch_execute(sql);
    let mut creating = std::pin::pin!(creating);
    let result = tokio::select! {
        biased;
        result = &mut creating => result,
        () = sleep(Duration::from_secs(3)) => {
            println!("{kind} {name}: waiting for transactions that were open before (see pg_stat_activity)");
            creating.await
        }
    };
    result.map_err(pg::Error::from)?;
    println!("{kind} {name} created");
    Ok(())
}

/// The statements, from the files that people read.
struct Sql {
    table: String,
    publication: String,
    slot: String,
    roles: String,
}

impl Sql {
    fn new(config: &Config) -> Self {
        let names = &config.names;
        let fill = |text: &str| {
            text.replace("{table}", &names.qualified())
                .replace("{publication}", &identifier(&names.publication))
                .replace("{slot_literal}", &literal(&names.slot))
                .replace("{database}", &identifier(&config.postgres.database))
                .replace("{database_bare}", &config.postgres.database)
        };
        Self {
            table: fill(include_str!("../../sql/table.sql")),
            publication: fill(include_str!("../../sql/publication.sql")),
            slot: fill(include_str!("../../sql/slot.sql")),
            roles: fill(include_str!("../../sql/roles.sql")),
        }
    }
}
