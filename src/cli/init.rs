//! `pgoutbox init`: creates what is missing, in the order that loses nothing: table, publication, slot.
//!
//! The trap: a printed script that only a superuser can run makes superusers of relays. So it names two roles, makes
//! everything as the one that sets up, and says what each may do; the tests run it as they are.

use std::time::Duration;

use tokio::time::sleep;

use super::{say, write_out};
use crate::config::{Config, SinkSettings};
use crate::error::Error;
use crate::finding::{Finding, Remedy, as_called, word};
use crate::outbox::template::Piece;
use crate::outbox::{ColumnNames, Mapping};
use crate::pg::catalog::Control;
use crate::pg::refusal::{hba_name, raise, writing};
use crate::pg::world::{World, identifier, literal};
use crate::pg::{self, ServerError};
use crate::sink::rabbitmq::{Address, set_permissions};

/// A slot cannot be made in a transaction that wrote, and a tool may send all of this as one.
const SET_UP: &str =
    "-- As pgoutbox_setup: table, publication and slot, in this order.\nset role pgoutbox_setup;\nbegin;";

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Print all statements, with roles, grants, pg_hba.conf lines and RabbitMQ permissions, and touch nothing
    #[arg(long)]
    print_sql: bool,
}

pub(super) async fn run(arguments: &Arguments, config: &Config) -> Result<(), Error> {
    let sql = Sql::new(config);
    if arguments.print_sql {
        return write_out(&sql.all()).map(drop);
    }
    let names = &config.names;
    let control = Control::open(&config.postgres).await?;
    let world = control.inspect(names).await?;
    // It would get a slot of its own, which no relay reads and which keeps its WAL for ever.
    if let Some(standby) = super::check::standby(&world, &control) {
        return Err(Error::Found(format!("nothing was made: {standby}")));
    }
    if let (None, Some(lacking)) = (&world.table, lacking(config)) {
        let print = as_called("pgoutbox init --print-sql");
        let text = format!(
            "rabbitmq.routing_key needs {lacking}, which the table that `init` makes does not have; nothing was made. \
             Remedy: make the table as `{print}` prints it, with {lacking}, then run `{}`",
            as_called("pgoutbox init")
        );
        return Err(Error::Usage(text));
    }
    let creation = Creation { control: &control, world: &world, config };
    creation.create("table", &names.qualified(), world.table.is_some(), &sql.table).await?;
    creation.create("publication", &names.publication, world.publication.is_some(), &sql.publication).await?;
    creation.create("slot", &names.slot, world.slot.is_some(), &sql.slot).await?;
    let findings = super::check::findings(config, &control).await?;
    if findings.is_empty() {
        return say("ready: pgoutbox run");
    }
    let lines: Vec<String> = findings.iter().map(ToString::to_string).collect();
    Err(Error::Found(format!("not ready yet:\n  {}", lines.join("\n  "))))
}

struct Creation<'a> {
    control: &'a Control,
    /// Before anything was made.
    world: &'a World,
    config: &'a Config,
}

impl Creation<'_> {
    async fn create(&self, kind: &str, name: &str, exists: bool, sql: &str) -> Result<(), Error> {
        if exists {
            return say(&format!("{kind} {name} is there"));
        }
        let creating = self.control.change(sql);
        let mut creating = std::pin::pin!(creating);
        let result = tokio::select! {
            biased;
            result = &mut creating => result,
            () = sleep(Duration::from_secs(3)) => {
                let waits = "waiting for transactions that were open before (see pg_stat_activity)";
                // What is being made is worth more than the word of it.
                let _ = say(&format!("{kind} {name}: {waits}"));
                creating.await
            }
        };
        match result {
            Ok(()) => say(&format!("{kind} {name} created")),
            Err(pg::Error::Server(error)) if self.was_made_meanwhile(kind, &error).await => {
                say(&format!("{kind} {name} is there"))
            }
            Err(pg::Error::Server(error)) => {
                let problem = format!("{kind} {name} cannot be made: {}", error.plain());
                let remedy = self.remedy(kind, &error).await.unwrap_or_default();
                Err(Error::Found(Finding::new(problem, remedy).to_string()))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Whether another one was faster, who set up at the same time.
    async fn was_made_meanwhile(&self, kind: &str, error: &ServerError) -> bool {
        // A table, anything else, and what the catalog's own index says of one that was not committed yet.
        if !["42P07", "42710", "23505"].contains(&error.code()) {
            return false;
        }
        let world = self.control.inspect(&self.config.names).await;
        world.is_ok_and(|world| match kind {
            "table" => world.table.is_some(),
            "publication" => world.publication.is_some(),
            _ => world.slot.is_some(),
        })
    }

    /// What lets this role make it.
    async fn remedy(&self, kind: &str, error: &ServerError) -> Option<Remedy> {
        let (role, schema) = (identifier(&self.world.role), identifier(&self.config.names.schema));
        Some(match (error.code(), kind) {
            ("42501", "slot") => Remedy::sql(format!("ALTER ROLE {role} REPLICATION")),
            ("42501", _) => self.grant(kind, &role, &schema).await?,
            ("3F000", _) => Remedy::sql(format!("CREATE SCHEMA {schema} AUTHORIZATION {role}")),
            ("25006", _) => writing(&self.world.role, &self.world.database),
            ("53400", _) => raise("max_replication_slots", self.world.slots_max),
            ("55000", "slot") => self.world.server_findings().into_iter().next()?.remedy,
            _ => return None,
        })
    }

    /// The privilege that is missing, by the catalog and not by the server's words.
    async fn grant(&self, kind: &str, role: &str, schema: &str) -> Option<Remedy> {
        let privileges = self.control.privileges(&self.config.names.schema).await.ok()?;
        let is_publication = kind == "publication";
        if is_publication && !privileges.creates_in_database {
            let database = identifier(&self.world.database);
            return Some(Remedy::sql(format!("GRANT CREATE ON DATABASE {database} TO {role}")));
        }
        if is_publication && !privileges.uses_schema {
            return Some(Remedy::sql(format!("GRANT USAGE ON SCHEMA {schema} TO {role}")));
        }
        if is_publication {
            let table = self.world.table.as_ref()?;
            let (grant, why) =
                (format!("GRANT {} TO {role}", identifier(&table.owner)), "Only the owner of a table can publish it");
            if table.is_superusers {
                let names = &self.config.names;
                let publish = format!(
                    "CREATE PUBLICATION {} FOR TABLE {} WITH (publish = 'insert', publish_via_partition_root = true)",
                    identifier(&names.publication),
                    names.qualified()
                );
                return Some(Remedy::sql(publish).mind(format!("{why}, and this one's is a superuser")));
            }
            return Some(Remedy::sql(grant).mind(why));
        }
        let is_enough = privileges.uses_schema && privileges.creates_in_schema;
        (!is_enough).then(|| Remedy::sql(format!("GRANT USAGE, CREATE ON SCHEMA {schema} TO {role}")))
    }
}

/// The statements, from the files that people read.
struct Sql {
    roles: String,
    table: String,
    publication: String,
    slot: String,
    rabbitmq: String,
}

impl Sql {
    fn new(config: &Config) -> Self {
        let names = &config.names;
        let fill = |text: &str| {
            text.replace("{table}", &names.qualified())
                .replace("{schema}", &identifier(&names.schema))
                .replace("{publication}", &identifier(&names.publication))
                .replace("{slot_literal}", &literal(&names.slot))
                .replace("{publication_literal}", &literal(&names.publication))
                .replace("{create_schema}", &create_schema(&names.schema))
                .replace("{database}", &identifier(&config.postgres.database))
                .replace("{hba_database}", &hba_name(&config.postgres.database).replace(['\n', '\r'], " "))
        };
        Self {
            roles: fill(include_str!("../../sql/roles.sql")),
            table: hint(config) + &fill(&called(include_str!("../../sql/table.sql"), &config.mapping.columns)),
            publication: fill(include_str!("../../sql/publication.sql")),
            slot: fill(include_str!("../../sql/slot.sql")),
            rabbitmq: rabbitmq(&config.sink),
        }
    }

    /// Everything, in an order in which it can be pasted as a superuser, or from the second part on as the set-up role.
    fn all(&self) -> String {
        let set_up = [SET_UP, &self.table, &self.publication, "commit;\n", &self.slot];
        format!("{}\n{}reset role;\n{}", self.roles, set_up.map(|part| format!("{part}\n")).concat(), self.rabbitmq)
    }
}

/// The columns of `table.sql` that a setting may call otherwise, and that setting.
fn roles(columns: &ColumnNames) -> [(&'static str, Option<&str>); 7] {
    [
        ("id", columns.id.as_deref()),
        ("aggregatetype", columns.aggregatetype.as_deref()),
        ("aggregateid", columns.aggregateid.as_deref()),
        ("type", columns.kind.as_deref()),
        ("payload", columns.payload.as_deref()),
        ("headers", columns.headers.as_deref()),
        ("traceparent", columns.traceparent.as_deref()),
    ]
}

/// The table with its columns called as the settings call them, and with the one that only they ask for.
fn called(table: &str, columns: &ColumnNames) -> String {
    let mut text = String::new();
    for line in table.lines() {
        let role = roles(columns).into_iter().find_map(|(usual, name)| {
            let rest = line.strip_prefix("  ")?.strip_prefix(usual)?.strip_prefix(' ')?;
            Some((usual, name, rest.trim_start()))
        });
        match role {
            Some((_, Some(name), rest)) => text.push_str(&format!("  {:13} {rest}\n", identifier(name))),
            _ => text.push_str(&format!("{line}\n")),
        }
        if let (Some(("traceparent", ..)), Some(name)) = (role, &columns.tracestate) {
            text.push_str(&format!("  {:13} text,\n", identifier(name)));
        }
    }
    text
}

/// What the routing key is made of and this table is not.
fn lacking(config: &Config) -> Option<String> {
    let Mapping { columns, destination, .. } = &config.mapping;
    let has = |column: &str| {
        // What these are for may stand there as well as their names.
        let others = ["id", "aggregatetype", "aggregateid", "type", "created_at"].into_iter();
        let others = others.chain(columns.tracestate.as_deref());
        roles(columns).into_iter().map(|(usual, name)| name.unwrap_or(usual)).chain(others).any(|name| name == column)
    };
    let columns = destination.pieces().iter().filter_map(|piece| match piece {
        Piece::Column(name) if !has(name) => Some(format!("column {name}")),
        _ => None,
    });
    let mut columns: Vec<String> = columns.collect();
    columns.dedup();
    (!columns.is_empty()).then(|| columns.join(", "))
}

/// Where somebody can read it who is about to paste.
fn hint(config: &Config) -> String {
    let hint = |lacking: String| format!("-- Not enough: rabbitmq.routing_key needs {lacking}. Add it to these:");
    lacking(config).map(hint).map(|line| line.replace(['\n', '\r'], " ") + "\n").unwrap_or_default()
}

/// A schema of one's own; `public` is there, or was taken away with good reason.
fn create_schema(schema: &str) -> String {
    let schema = identifier(schema);
    if schema == "public" { String::new() } else { format!("create schema if not exists {schema};\n") }
}

/// Comments: what the user of RabbitMQ may do is not said in SQL.
fn rabbitmq(sink: &SinkSettings) -> String {
    let SinkSettings::RabbitMq(settings) = sink else { return String::new() };
    let address = settings.addresses.first();
    let user = address.map(Address::user).filter(|user| *user != "guest").unwrap_or("pgoutbox_relay");
    let vhost = address.map_or("/", Address::vhost);
    // A line of a comment stays one.
    let permissions = |declare| {
        set_permissions(vhost, user, &settings.exchange, &settings.queues, declare).replace(['\n', '\r'], " ")
    };
    let text = include_str!("../../sql/rabbitmq.txt")
        .replace("{user}", &word(user).replace(['\n', '\r'], " "))
        .replace("{permissions}", &permissions(true))
        .replace("{permissions_undeclared}", &permissions(false));
    format!("\n{text}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = include_str!("../../sql/table.sql");

    #[test]
    fn the_table_is_made_with_the_columns_that_the_settings_name() {
        assert_eq!(called(TABLE, &ColumnNames::default()), TABLE);
        let name = |name: &str| Some(name.to_owned());
        let columns = ColumnNames {
            id: name("event_id"),
            kind: name("Type"),
            payload: name("body"),
            tracestate: name("state"),
            ..ColumnNames::default()
        };
        let text = called(TABLE, &columns);
        for line in [
            "\n  event_id      uuid        primary key",
            "\n  aggregatetype text        not null,\n",
            "\n  \"Type\"        text        not null,\n",
            "\n  body          jsonb,\n",
            "\n  traceparent   text,\n  state         text,\n",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        for gone in ["\n  id ", "\n  type ", "\n  payload "] {
            assert!(!text.contains(gone), "{text}");
        }
    }
}
