//! Plain SQL: which server this is, and whether slot, publication and table are set up so that nothing can be skipped.
//!
//! One inspection serves `check`, every session's start and the watch beside a running stream. The trap: Postgres streams
//! happily from a world that has lost its outbox. A table dropped and re-created is no longer in the publication, a row
//! filter hides rows, and keepalives advance the slot past all of it. So the catalog is asked again and again.

use std::time::Duration;

use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::{Client, NoTls, Row};

use super::error::{Error, Finding};
use super::settings::{Host, Settings};
use crate::lsn::Lsn;

/// Catalog queries answer in milliseconds; one that does not is a peer that is not there.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);

/// PostgreSQL 15: column lists and row filters of publications.
const VERSION_WITH_FILTERS: i32 = 150_000;

/// The oldest server whose pgoutput and slots this was built against.
const VERSION_MIN: i32 = 140_000;

/// The names of the things that a relay depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    /// The replication slot.
    pub slot: String,
    /// The publication.
    pub publication: String,
    /// The outbox table's schema.
    pub schema: String,
    /// The outbox table.
    pub table: String,
}

impl Names {
    /// Schema and table, quoted where SQL needs it.
    pub fn qualified(&self) -> String {
        format!("{}.{}", identifier(&self.schema), identifier(&self.table))
    }
}

/// A name as SQL wants it: bare when it can stand bare.
pub fn identifier(name: &str) -> String {
    let bare = name.starts_with(|first: char| first.is_ascii_lowercase() || first == '_')
        && name.chars().all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_');
    if bare { name.to_owned() } else { format!("\"{}\"", name.replace('"', "\"\"")) }
}

/// A text as an SQL literal.
pub fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// An SQL connection, and word of its end.
#[derive(Debug)]
pub struct Control {
    client: Client,
    ended: JoinHandle<Result<(), tokio_postgres::Error>>,
    host: Host,
}

impl Drop for Control {
    fn drop(&mut self) {
        self.ended.abort();
    }
}

/// What the catalog says about everything a relay depends on.
#[derive(Clone, Debug, PartialEq)]
pub struct World {
    /// `server_version_num`.
    pub version: i32,
    /// Whether the server is a standby.
    pub in_recovery: bool,
    /// `wal_level`.
    pub wal_level: String,
    /// The database we are in.
    pub database: String,
    /// The role we are.
    pub role: String,
    /// Whether that role may replicate.
    pub may_replicate: bool,
    /// The slot, if there is one.
    pub slot: Option<Slot>,
    /// The publication, if there is one.
    pub publication: Option<Publication>,
    /// The outbox table, if there is one.
    pub table: Option<Table>,
}

/// A row of `pg_replication_slots`.
#[derive(Clone, Debug, PartialEq)]
pub struct Slot {
    /// The output plugin; none for a physical slot.
    pub plugin: Option<String>,
    /// The database it belongs to.
    pub database: Option<String>,
    /// The walsender that holds it.
    pub active_pid: Option<i32>,
    /// What Postgres was told.
    pub confirmed: Lsn,
    /// From where on WAL is kept.
    pub restart: Lsn,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// Bytes that may still be written before it is in danger; none without a limit.
    pub safe_bytes: Option<i64>,
    /// Whether transactions are sent at PREPARE, before their outcome is known.
    pub two_phase: bool,
    /// Whether it goes with the session that made it.
    pub temporary: bool,
    /// How far the server's WAL is flushed.
    pub server: Lsn,
    /// How long the last confirmed position took to be confirmed; none while nobody streams, or for a role that may not see.
    pub lag_seconds: Option<f64>,
}

/// A row of `pg_publication`, with what it covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publication {
    /// Whether it publishes inserts.
    pub inserts: bool,
    /// Whether partitions are announced as their root.
    pub via_root: bool,
    /// Its tables.
    pub tables: Vec<Published>,
}

/// A row of `pg_publication_tables`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// The table's OID.
    pub oid: u32,
    /// Its column list, where the server has such.
    pub columns: Option<Vec<String>>,
    /// Its row filter.
    pub row_filter: Option<String>,
}

/// The outbox table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its OID.
    pub oid: u32,
    /// `r`: a table, `p`: a partitioned one.
    pub kind: String,
    /// Its columns and the OIDs of their types.
    pub columns: Vec<(String, u32)>,
    /// The tables that hold its rows: its leaves, or itself.
    pub leaves: Vec<u32>,
    /// Every OID under which its rows may be announced: itself, its partitions and theirs.
    pub family: Vec<u32>,
}

impl Control {
    /// Connects to the first host that is a primary, or else to the first that answers.
    ///
    /// # Errors
    /// The last host's.
    pub async fn open(settings: &Settings) -> Result<Self, Error> {
        let mut standby = None;
        let mut last = Error::Closed;
        for host in &settings.hosts {
            let attempt = timeout(settings.connect_timeout, Self::open_at(host, settings)).await;
            match attempt.unwrap_or(Err(Error::Timeout { during: "connecting", after: settings.connect_timeout })) {
                Ok((control, false)) => return Ok(control),
                Ok((control, true)) => standby = standby.or(Some(control)),
                Err(error) => last = error,
            }
        }
        standby.ok_or(last)
    }

    async fn open_at(host: &Host, settings: &Settings) -> Result<(Self, bool), Error> {
        let config = settings.control();
        let unreachable = |source| Error::Unreachable { host: host.to_string(), source };
        let (client, ended) = match host {
            Host::Tcp(name, port) => {
                let stream = TcpStream::connect((name.as_str(), *port)).await.map_err(unreachable)?;
                let (client, connection) = config.connect_raw(stream, NoTls).await?;
                (client, tokio::spawn(connection))
            }
            Host::Unix(path) => {
                let stream = UnixStream::connect(path).await.map_err(unreachable)?;
                let (client, connection) = config.connect_raw(stream, NoTls).await?;
                (client, tokio::spawn(connection))
            }
        };
        let control = Self { client, ended, host: host.clone() };
        let in_recovery = control.one("select pg_catalog.pg_is_in_recovery()", &[]).await?.try_get(0)?;
        Ok((control, in_recovery))
    }

    /// The host that answered: the stream must come from the same one.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The client, for verbs that change things.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Resolves when the connection ends, with the reason. A stopping server ends it at once, whatever its walsenders
    /// wait for.
    pub async fn ended(&mut self) -> Error {
        match (&mut self.ended).await {
            Ok(Err(error)) => Error::from(error),
            Ok(Ok(())) => Error::Closed,
            Err(_) => Error::Closed,
        }
    }

    /// Looks at everything a relay depends on.
    ///
    /// # Errors
    /// Of the connection; nothing that is found is an error here.
    pub async fn inspect(&self, names: &Names) -> Result<World, Error> {
        let server = self
            .one(
                "select current_setting('server_version_num')::int, pg_catalog.pg_is_in_recovery(), \
                 current_setting('wal_level'), current_database()::text, current_user::text, \
                 coalesce((select rolreplication or rolsuper from pg_catalog.pg_roles where rolname = current_user), \
                 false)",
                &[],
            )
            .await?;
        let version = server.try_get(0)?;
        Ok(World {
            version,
            in_recovery: server.try_get(1)?,
            wal_level: server.try_get(2)?,
            database: server.try_get(3)?,
            role: server.try_get(4)?,
            may_replicate: server.try_get(5)?,
            slot: self.slot(&names.slot).await?,
            publication: self.publication(&names.publication, version).await?,
            table: self.table(&names.schema, &names.table).await?,
        })
    }

    /// The slot, if there is one, and how far the server is.
    ///
    /// # Errors
    /// Of the connection.
    pub async fn slot(&self, name: &str) -> Result<Option<Slot>, Error> {
        let rows = self
            .all(
                "select plugin::text, database::text, active_pid, confirmed_flush_lsn::text, restart_lsn::text, \
                 wal_status, safe_wal_size, two_phase, temporary, \
                 (case when pg_catalog.pg_is_in_recovery() then pg_catalog.pg_last_wal_replay_lsn() \
                  else pg_catalog.pg_current_wal_flush_lsn() end)::text, \
                 (select extract(epoch from flush_lag)::float8 from pg_catalog.pg_stat_replication \
                  where pid = active_pid) \
                 from pg_catalog.pg_replication_slots where slot_name = $1",
                &[&name],
            )
            .await?;
        rows.first().map(slot).transpose()
    }

    async fn publication(&self, name: &str, version: i32) -> Result<Option<Publication>, Error> {
        let publications = "select pubinsert, pubviaroot from pg_catalog.pg_publication where pubname = $1";
        let rows = self.all(publications, &[&name]).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let filters = if version >= VERSION_WITH_FILTERS { "p.attnames::text[], p.rowfilter" } else { "null, null" };
        let tables = format!(
            "select c.oid, {filters} from pg_catalog.pg_publication_tables p \
             join pg_catalog.pg_namespace n on n.nspname = p.schemaname \
             join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = p.tablename where p.pubname = $1"
        );
        let with_filters = version >= VERSION_WITH_FILTERS;
        let published = |row: &Row| -> Result<Published, Error> {
            Ok(Published {
                oid: row.try_get(0)?,
                columns: if with_filters { row.try_get(1)? } else { None },
                row_filter: if with_filters { row.try_get(2)? } else { None },
            })
        };
        Ok(Some(Publication {
            inserts: row.try_get(0)?,
            via_root: row.try_get(1)?,
            tables: self.all(&tables, &[&name]).await?.iter().map(published).collect::<Result<_, _>>()?,
        }))
    }

    async fn table(&self, schema: &str, name: &str) -> Result<Option<Table>, Error> {
        let rows = self
            .all(
                "select c.oid, c.relkind::text from pg_catalog.pg_class c \
                 join pg_catalog.pg_namespace n on n.oid = c.relnamespace where n.nspname = $1 and c.relname = $2",
                &[&schema, &name],
            )
            .await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let oid: u32 = row.try_get(0)?;
        let columns = self
            .all(
                "select attname::text, atttypid from pg_catalog.pg_attribute \
                 where attrelid = $1 and attnum > 0 and not attisdropped order by attnum",
                &[&oid],
            )
            .await?;
        let family =
            self.all("select relid::oid, isleaf from pg_catalog.pg_partition_tree($1::oid::regclass)", &[&oid]).await?;
        let mut table = Table {
            oid,
            kind: row.try_get(1)?,
            columns: columns.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect::<Result<_, Error>>()?,
            leaves: Vec::new(),
            family: vec![oid],
        };
        for row in &family {
            let (member, leaf): (u32, bool) = (row.try_get(0)?, row.try_get(1)?);
            table.family.push(member);
            if leaf {
                table.leaves.push(member);
            }
        }
        if table.kind == "r" {
            table.leaves = vec![oid];
        }
        Ok(Some(table))
    }

    async fn all(
        &self,
        sql: &str,
        parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<Vec<Row>, Error> {
        let late = Error::Timeout { during: "a catalog query", after: QUERY_TIMEOUT };
        Ok(timeout(QUERY_TIMEOUT, self.client.query(sql, parameters)).await.map_err(|_| late)??)
    }

    async fn one(&self, sql: &str, parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)]) -> Result<Row, Error> {
        let none = || Error::Protocol("no row where there is always one".to_owned());
        self.all(sql, parameters).await?.into_iter().next().ok_or_else(none)
    }
}

fn slot(row: &Row) -> Result<Slot, Error> {
    let lsn = |index: usize| -> Result<Lsn, Error> {
        let text: Option<String> = row.try_get(index)?;
        Ok(text.and_then(|text| text.parse().ok()).unwrap_or(Lsn::ZERO))
    };
    Ok(Slot {
        plugin: row.try_get(0)?,
        database: row.try_get(1)?,
        active_pid: row.try_get(2)?,
        confirmed: lsn(3)?,
        restart: lsn(4)?,
        wal_status: row.try_get(5)?,
        safe_bytes: row.try_get(6)?,
        two_phase: row.try_get(7)?,
        temporary: row.try_get(8)?,
        server: lsn(9)?,
        lag_seconds: row.try_get(10)?,
    })
}

impl World {
    /// What keeps a relay from running here, each with its remedy. Pure, so that `check` and `run` cannot disagree.
    pub fn findings(&self, names: &Names) -> Vec<Finding> {
        [self.server_findings(), self.slot_findings(names), self.table_findings(names)].concat()
    }

    /// Version, settings and the role's privileges.
    pub fn server_findings(&self) -> Vec<Finding> {
        let mut findings = Findings(Vec::new());
        if self.version < VERSION_MIN {
            let problem = format!("the server is PostgreSQL {}", self.version / 10_000);
            findings.add(problem, "use PostgreSQL 14 or later");
        }
        if self.wal_level != "logical" {
            findings.add(
                format!("wal_level is {}", self.wal_level),
                "ALTER SYSTEM SET wal_level = logical; then restart the server",
            );
        }
        if !self.may_replicate {
            let role = identifier(&self.role);
            findings.add(
                format!("role {} may not replicate", self.role),
                format!("ALTER ROLE {role} REPLICATION (managed services have a role to grant instead)"),
            );
        }
        findings.0
    }

    /// The slot: not for who brings a slot of its own.
    pub fn slot_findings(&self, names: &Names) -> Vec<Finding> {
        let mut findings = Findings(Vec::new());
        let name = &names.slot;
        let recreate = format!("SELECT pg_drop_replication_slot({}); then run `pgoutbox init`", literal(name));
        let Some(slot) = &self.slot else {
            findings.add(
                format!("replication slot {name} does not exist in this cluster"),
                "run `pgoutbox init`. If the slot existed before, rows committed since it went are not in the stream: \
                 reconcile them from the table",
            );
            return findings.0;
        };
        if slot.temporary {
            findings.add(format!("replication slot {name} is temporary"), recreate.as_str());
        }
        match &slot.plugin {
            None => findings.add(format!("replication slot {name} is physical"), "set postgres.slot to a logical slot"),
            Some(plugin) if plugin != "pgoutput" => findings.add(
                format!("replication slot {name} uses the plugin {plugin}, not pgoutput"),
                "set postgres.slot to another name and run `pgoutbox init`",
            ),
            Some(_) => {}
        }
        if let Some(database) = slot.database.as_ref().filter(|database| **database != self.database) {
            findings.add(
                format!("replication slot {name} belongs to database {database}, not to {}", self.database),
                "connect to that database in postgres.url, or set postgres.slot to another name and run `pgoutbox init`",
            );
        }
        if slot.wal_status.as_deref() == Some("lost") {
            findings.add(
                format!("replication slot {name} is lost: the server has removed WAL that was still needed"),
                format!(
                    "reconcile from the table what was committed after {}, raise max_slot_wal_keep_size, then {recreate}",
                    slot.confirmed
                ),
            );
        }
        if slot.two_phase {
            findings.add(
                format!("replication slot {name} sends transactions at PREPARE, before their outcome is known"),
                recreate.as_str(),
            );
        }
        findings.0
    }

    /// Table and publication.
    pub fn table_findings(&self, names: &Names) -> Vec<Finding> {
        let mut findings = Findings(Vec::new());
        let (table_name, publication_name) = (names.qualified(), identifier(&names.publication));
        match &self.table {
            None => findings.add(
                format!("table {table_name} does not exist"),
                "run `pgoutbox init`, or set outbox.table to the table's name",
            ),
            Some(table) if table.kind != "r" && table.kind != "p" => {
                findings.add(format!("{table_name} is not a table"), "set outbox.table to a table")
            }
            Some(_) => {}
        }
        let Some(publication) = &self.publication else {
            findings.add(
                format!("publication {} does not exist in database {}", names.publication, self.database),
                "run `pgoutbox init`. If the slot is older than the publication, rows committed before it are not in the \
                 stream: reconcile them from the table",
            );
            return findings.0;
        };
        if !publication.inserts {
            findings.add(
                format!("publication {} does not publish inserts", names.publication),
                format!("ALTER PUBLICATION {publication_name} SET (publish = 'insert')"),
            );
        }
        let Some(table) = &self.table else { return findings.0 };
        let announced = if publication.via_root { vec![table.oid] } else { table.leaves.clone() };
        let covering: Vec<&Published> =
            publication.tables.iter().filter(|published| announced.contains(&published.oid)).collect();
        if covering.len() < announced.len() {
            findings.add(
                format!("publication {} does not cover table {table_name}", names.publication),
                format!(
                    "ALTER PUBLICATION {publication_name} ADD TABLE {table_name}. Rows inserted before that are not in the \
                     stream: reconcile them from the table"
                ),
            );
        }
        if covering.iter().any(|published| published.row_filter.is_some()) {
            findings.add(
                format!("publication {} hides rows of {table_name} by a row filter", names.publication),
                format!("ALTER PUBLICATION {publication_name} SET TABLE {table_name}"),
            );
        }
        findings.0
    }
}

/// Findings as they are gathered.
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, problem: String, remedy: impl Into<String>) {
        self.0.push(Finding { problem, remedy: remedy.into() });
    }
}

impl World {
    /// The columns that the stream will carry: the table's, less those that a column list leaves out.
    pub fn streamed_columns(&self) -> Vec<(String, u32)> {
        let Some(table) = &self.table else { return Vec::new() };
        let lists = self.publication.iter().flat_map(|publication| &publication.tables);
        let list = lists.filter(|published| table.family.contains(&published.oid)).find_map(|p| p.columns.as_ref());
        let kept = |name: &str| list.is_none_or(|list| list.iter().any(|listed| listed == name));
        table.columns.iter().filter(|(name, _)| kept(name)).cloned().collect()
    }

    /// Every OID in the publication that is not the outbox: their rows pass by.
    pub fn others(&self) -> Vec<u32> {
        let family = self.table.as_ref().map(|table| table.family.as_slice()).unwrap_or_default();
        let tables = self.publication.iter().flat_map(|publication| &publication.tables);
        tables.map(|published| published.oid).filter(|oid| !family.contains(oid)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        Names {
            slot: "pgoutbox".to_owned(),
            publication: "pgoutbox".to_owned(),
            schema: "public".to_owned(),
            table: "outbox".to_owned(),
        }
    }

    fn sound() -> World {
        World {
            version: 150_018,
            in_recovery: false,
            wal_level: "logical".to_owned(),
            database: "shop".to_owned(),
            role: "relay".to_owned(),
            may_replicate: true,
            slot: Some(Slot {
                plugin: Some("pgoutput".to_owned()),
                database: Some("shop".to_owned()),
                active_pid: None,
                confirmed: Lsn::new(16),
                restart: Lsn::new(8),
                wal_status: Some("reserved".to_owned()),
                safe_bytes: None,
                two_phase: false,
                temporary: false,
                server: Lsn::new(32),
                lag_seconds: None,
            }),
            publication: Some(Publication {
                inserts: true,
                via_root: true,
                tables: vec![Published { oid: 7, columns: None, row_filter: None }],
            }),
            table: Some(Table {
                oid: 7,
                kind: "r".to_owned(),
                columns: vec![("id".to_owned(), 2950), ("note".to_owned(), 25)],
                leaves: vec![7],
                family: vec![7],
            }),
        }
    }

    #[test]
    fn a_sound_world_has_no_findings() {
        assert_eq!(sound().findings(&names()), []);
    }

    type Break = fn(&mut World);

    #[test]
    fn every_broken_thing_is_named_with_its_remedy() {
        let breaks: [(&str, Break); 12] = [
            ("wal_level is replica", |world| world.wal_level = "replica".to_owned()),
            ("may not replicate", |world| world.may_replicate = false),
            ("slot pgoutbox does not exist", |world| world.slot = None),
            ("is physical", |world| world.slot.as_mut().unwrap().plugin = None),
            ("plugin test_decoding", |w| w.slot.as_mut().unwrap().plugin = Some("test_decoding".to_owned())),
            ("belongs to database other", |w| w.slot.as_mut().unwrap().database = Some("other".to_owned())),
            ("is lost", |world| world.slot.as_mut().unwrap().wal_status = Some("lost".to_owned())),
            ("at PREPARE", |world| world.slot.as_mut().unwrap().two_phase = true),
            ("publication pgoutbox does not exist", |world| world.publication = None),
            ("does not publish inserts", |world| world.publication.as_mut().unwrap().inserts = false),
            ("does not cover", |world| world.publication.as_mut().unwrap().tables.clear()),
            ("by a row filter", |world| {
                world.publication.as_mut().unwrap().tables[0].row_filter = Some("(id > 1)".to_owned());
            }),
        ];
        for (problem, break_it) in breaks {
            let mut world = sound();
            break_it(&mut world);
            let findings = world.findings(&names());
            assert_eq!(findings.len(), 1, "{problem}: {findings:?}");
            assert!(findings[0].problem.contains(problem), "{findings:?}");
            assert!(!findings[0].remedy.is_empty());
        }
    }

    #[test]
    fn a_partition_outside_the_publication_is_a_hole() {
        let mut world = sound();
        let table = world.table.as_mut().unwrap();
        table.kind = "p".to_owned();
        table.leaves = vec![8, 9];
        table.family = vec![7, 8, 9];
        assert_eq!(world.findings(&names()), [], "announced as the root");
        let publication = world.publication.as_mut().unwrap();
        publication.via_root = false;
        publication.tables = vec![Published { oid: 8, columns: None, row_filter: None }];
        assert_eq!(world.findings(&names()).len(), 1);
    }

    #[test]
    fn a_column_list_narrows_what_is_streamed() {
        let mut world = sound();
        world.publication.as_mut().unwrap().tables[0].columns = Some(vec!["id".to_owned()]);
        assert_eq!(world.streamed_columns(), [("id".to_owned(), 2950)]);
    }

    #[test]
    fn names_are_quoted_only_where_they_must_be() {
        assert_eq!(identifier("outbox_2"), "outbox_2");
        assert_eq!(identifier("Out\"box"), "\"Out\"\"box\"");
        assert_eq!(literal("it's"), "'it''s'");
    }
}
