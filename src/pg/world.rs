//! What the catalog says about everything a relay depends on, and what of it is set up wrong. Pure.
//!
//! One judgement serves `check`, every session's start and the watch beside a running stream. The trap: Postgres streams
//! happily from a world that has lost its outbox. A table dropped and re-created is no longer in the publication, a row
//! filter hides rows, and keepalives advance the slot past all of it.

use super::error::Finding;
use crate::lsn::Lsn;

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
