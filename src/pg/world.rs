//! What the catalog says about everything a relay depends on, and what of it is set up wrong. Pure.
//!
//! One judgement serves `check`, every session's start and the watch beside a running stream. The trap: Postgres streams
//! happily from a world that has lost its outbox. A table dropped and re-created is no longer in the publication, a row
//! filter hides rows, and keepalives advance the slot past all of it.

use super::keywords::needs_quotes;
use super::refusal::raise;
use crate::finding::{Finding, Remedy, word};
use crate::lsn::Lsn;

/// The oldest server whose pgoutput and slots this was built against.
const VERSION_MIN: i32 = 140_000;

/// Creates what is missing.
pub(super) const INIT: &str = "pgoutbox init";

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

/// `server_version_num` as people write it.
pub fn version(number: i32) -> String {
    format!("{}.{}", number / 10_000, number % 10_000)
}

/// A name as SQL wants it: bare when it can stand bare.
pub fn identifier(name: &str) -> String {
    let bare = name.starts_with(|first: char| first.is_ascii_lowercase() || first == '_')
        && name.chars().all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_')
        && !needs_quotes(name);
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
    /// The role that logged in: another one where `ALTER ROLE ... SET role` makes it so. A walsender asks for its rights.
    pub login: String,
    /// Whether that one may replicate.
    pub may_replicate: bool,
    /// `max_replication_slots`.
    pub slots_max: u32,
    /// How many of them there are.
    pub slots_used: u32,
    /// `idle_replication_slot_timeout` as `SHOW` prints it; PostgreSQL 18 and later.
    pub idle_timeout: Option<String>,
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
    /// From where on WAL is kept; of a lost one none is, whatever stands here.
    pub restart: Lsn,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// Why it is lost; PostgreSQL 17 and later.
    pub invalidation_reason: Option<String>,
    /// Whether it is kept on standbys; PostgreSQL 17 and later.
    pub failover: Option<bool>,
    /// `safe_wal_size`: none without a limit, and none when it is lost. See [`Slot::safe_bytes`].
    pub safe_wal_size: Option<i64>,
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
    /// Whether it publishes updates, deletes or truncations as well.
    pub more_than_inserts: bool,
    /// Whether it is `FOR ALL TABLES`.
    pub all_tables: bool,
    /// Whether it names schemas.
    pub names_schemas: bool,
    /// Whether partitions are announced as their root.
    pub via_root: bool,
    /// What it publishes: a partitioned table's partitions, unless they are announced as their root.
    pub tables: Vec<Published>,
    /// The tables that it names, as opposed to their schemas, their roots or all tables: OID, and schema and name, quoted.
    pub members: Vec<(u32, String)>,
}

/// A row of `pg_publication_tables`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// The table's OID.
    pub oid: u32,
    /// Schema and name, quoted.
    pub name: String,
    /// Whether the publication names its schema.
    pub is_by_schema: bool,
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
    /// Its owner's name.
    pub owner: String,
    /// Whether that is a superuser, whose role is nobody's to be given.
    pub is_superusers: bool,
    /// `r`: a table, `p`: a partitioned one.
    pub kind: String,
    /// Its columns and the OIDs of their types.
    pub columns: Vec<(String, u32)>,
    /// Those of them that are generated, and whether they are stored.
    pub generated: Vec<(String, bool)>,
    /// The tables that hold its rows: its leaves, or itself.
    pub leaves: Vec<u32>,
    /// Every OID under which its rows may be announced: itself, its partitions and theirs.
    pub family: Vec<u32>,
    /// Tables that inherit from it and are no partitions: schema and name, quoted.
    pub heirs: Vec<String>,
    /// Those of the tables that hold its rows and are unlogged: schema and name, quoted.
    pub unlogged: Vec<String>,
    /// Partitions that are foreign tables, and what each is a partition of: schema and name, quoted.
    pub foreign: Vec<(String, String)>,
}

impl World {
    /// What keeps a relay from running here, each with its remedy. Pure, so that `check` and `run` cannot disagree.
    pub fn findings(&self, names: &Names) -> Vec<Finding> {
        let of_table = [self.table_findings(names), self.publication_findings(names)].concat();
        [self.server_findings(), self.slot_findings(names), of_table].concat()
    }

    /// Version, settings and the role's privileges.
    pub fn server_findings(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        if self.version < VERSION_MIN {
            let problem = format!("the server is PostgreSQL {}", self.version / 10_000);
            findings.push(Finding::new(problem, Remedy::act("use PostgreSQL 14 or later")));
        }
        if self.wal_level != "logical" {
            let remedy = Remedy::sql("ALTER SYSTEM SET wal_level = logical").then_act("restart PostgreSQL");
            findings.push(Finding::new(format!("wal_level is {}", self.wal_level), remedy));
        }
        if !self.may_replicate {
            let remedy = Remedy::sql(format!("ALTER ROLE {} REPLICATION", identifier(&self.login)))
                .mind("Managed services have a role to grant instead, such as rds_replication");
            findings.push(Finding::new(format!("role {} may not replicate", self.login), remedy));
        }
        findings
    }

    /// The slot: not for who brings a slot of its own.
    pub fn slot_findings(&self, names: &Names) -> Vec<Finding> {
        let name = &names.slot;
        let Some(slot) = &self.slot else {
            let problem = format!("replication slot {name} does not exist in this cluster");
            return vec![Finding::new(problem, self.missing_slot())];
        };
        let mut findings = Vec::new();
        // What was not read goes with it. Last: what is committed until there is a new one is in neither.
        let reconcile = format!("reconcile from the table what was committed after {} and before that", slot.confirmed);
        let drop = Remedy::sql(format!("SELECT pg_drop_replication_slot({})", literal(name)));
        let recreate = drop.then_shell(INIT).then_act(&reconcile);
        if slot.temporary {
            let pid = slot.active_pid.unwrap_or_default();
            let end = Remedy::sql(format!("SELECT pg_terminate_backend({pid}, 5000)"));
            let remedy = end.then_shell(INIT).then_act(&reconcile);
            findings.push(Finding::new(format!("replication slot {name} is temporary"), remedy));
        }
        match &slot.plugin {
            None => findings.push(Finding::new(format!("replication slot {name} is physical"), another_slot(name))),
            Some(plugin) if plugin != "pgoutput" => {
                let problem = format!("replication slot {name} uses the plugin {plugin}, not pgoutput");
                findings.push(Finding::new(problem, another_slot(name)));
            }
            Some(_) => {}
        }
        if let Some(database) = slot.database.as_ref().filter(|database| **database != self.database) {
            let problem = format!("replication slot {name} belongs to database {database}, not to {}", self.database);
            let mind = format!("Or, if the outbox is there, connect to {database} in postgres.url");
            findings.push(Finding::new(problem, another_slot(name).mind(mind)));
        }
        if slot.is_lost() {
            let remedy = recreate.clone().mind(slot.lost_by());
            let why = slot.invalidation_reason.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
            let problem = format!("replication slot {name} is lost{why}: the server has removed what was still needed");
            findings.push(Finding::new(problem, remedy));
        }
        if slot.two_phase {
            let problem =
                format!("replication slot {name} sends transactions at PREPARE, before their outcome is known");
            findings.push(Finding::new(problem, recreate));
        }
        findings
    }

    /// A slot that a session is still making. Nothing may be said to be ready before: what is committed until then is before
    /// its first position. A relay that finds it so waits, as for one that is in use.
    pub fn unfinished_slot(&self, names: &Names) -> Option<Finding> {
        let slot = self.slot.as_ref().filter(|slot| slot.plugin.is_some() && slot.confirmed == Lsn::ZERO)?;
        let problem = format!(
            "replication slot {} is still being made by backend {}: rows committed until then are not in its stream",
            names.slot, slot.active_pid?
        );
        let wait = "wait for the transactions that were open before (see pg_stat_activity), or end them";
        Some(Finding::new(problem, Remedy::act(wait).then_shell(INIT)))
    }

    fn missing_slot(&self) -> Remedy {
        let remedy = if self.slots_used < self.slots_max {
            Remedy::shell(INIT)
        } else {
            raise("max_replication_slots", self.slots_max).then_shell(INIT)
        };
        remedy.mind(
            "If the slot existed before, rows committed since it went are not in the stream: reconcile them from the table",
        )
    }

    /// The table's kind and persistence.
    pub fn table_findings(&self, names: &Names) -> Vec<Finding> {
        let name = names.qualified();
        let Some(table) = &self.table else {
            return vec![Finding::new(format!("table {name} does not exist"), self.missing_table(names))];
        };
        if table.kind != "r" && table.kind != "p" {
            let remedy = self.other_table().unwrap_or_else(|| Remedy::act("set outbox.table to a table"));
            return vec![Finding::new(format!("{name} is {}, not a table", kind_in_words(&table.kind)), remedy)];
        }
        let logged = |unlogged: &String| {
            let remedy = Remedy::sql(format!("ALTER TABLE {unlogged} SET LOGGED"));
            Finding::new(format!("table {unlogged} is unlogged: its rows are not in the write-ahead log"), remedy)
        };
        let disowned = |heir: &String| {
            let problem = format!(
                "table {heir} inherits from {name}: its rows are rows of {name} to a query, and to a publication those of \
                 another table, so they would pass by"
            );
            let remedy = Remedy::sql(format!("ALTER TABLE {heir} NO INHERIT {name}")).mind(
                "Its rows are not in the stream: reconcile them from the table. To divide an outbox, partition it",
            );
            Finding::new(problem, remedy)
        };
        let detached = |(partition, parent): &(String, String)| {
            let problem = format!(
                "partition {partition} of {name} is a foreign table: its rows are in another server's write-ahead log, so \
                 they would pass by"
            );
            let remedy = Remedy::sql(format!("ALTER TABLE {parent} DETACH PARTITION {partition}"))
                .mind("Rows that were inserted through it are not in the stream: reconcile them from the table");
            Finding::new(problem, remedy)
        };
        let foreign = table.foreign.iter().map(detached);
        table.unlogged.iter().map(logged).chain(foreign).chain(table.heirs.iter().map(disowned)).collect()
    }

    fn missing_table(&self, names: &Names) -> Remedy {
        if let Some(other) = self.other_table() {
            return other.mind(format!("Or run `{INIT}` to make a new one"));
        }
        match &self.publication {
            Some(publication) if !publication.all_tables => {
                let add =
                    format!("ALTER PUBLICATION {} ADD TABLE {}", identifier(&names.publication), names.qualified());
                Remedy::shell(INIT)
                    .then_sql(add)
                    .mind("`init` makes the table, and says that the publication does not cover it yet")
            }
            _ => Remedy::shell(INIT),
        }
    }

    /// The one table of the publication is meant, perhaps: a renamed one stays published.
    fn other_table(&self) -> Option<Remedy> {
        match self.publication.as_ref()?.tables.as_slice() {
            [only] => Some(Remedy::setting("outbox.table", only.name.clone())),
            _ => None,
        }
    }
}

/// A slot beside one that is somebody else's.
fn another_slot(name: &str) -> Remedy {
    // The limit of a name is 63 bytes, and these are ASCII.
    let other = format!("{}_outbox", name.get(..56).unwrap_or(name));
    let init = format!("{INIT} --set postgres.slot={}", word(&other));
    Remedy::setting("postgres.slot", other).then_shell(init)
}

fn kind_in_words(relkind: &str) -> &'static str {
    match relkind {
        "v" => "a view",
        "m" => "a materialized view",
        "f" => "a foreign table",
        "S" => "a sequence",
        "i" | "I" => "an index",
        _ => "something else",
    }
}

impl Slot {
    /// Whether the server has removed what it needs.
    pub fn is_lost(&self) -> bool {
        self.wal_status.as_deref() == Some("lost")
    }

    /// WAL that is kept for its sake. The server leaves out a lost slot's position, or leaves it and keeps nothing.
    pub fn retained_bytes(&self) -> u64 {
        if self.is_lost() { 0 } else { self.server.bytes_since(self.restart) }
    }

    /// Bytes that may still be written before it is in danger; none without a limit. For a lost slot the server says
    /// nothing, as it does where there is no limit.
    pub fn safe_bytes(&self) -> Option<i64> {
        if self.is_lost() { Some(0) } else { self.safe_wal_size }
    }

    /// Why the server did not keep what it needs.
    fn lost_by(&self) -> &'static str {
        match self.invalidation_reason.as_deref() {
            Some("idle_timeout") => "Then raise idle_replication_slot_timeout, or set it to 0",
            Some("rows_removed" | "wal_level_insufficient") => "Make slots on the primary only",
            _ => "Then raise max_slot_wal_keep_size, or set it to -1",
        }
    }
}

impl Table {
    /// Whether rows of it can be in a stream at all; if not, that is said and nothing more.
    pub(super) fn is_streamable(&self) -> bool {
        matches!(self.kind.as_str(), "r" | "p") && self.unlogged.is_empty() && self.foreign.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finding::Step;

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
            login: "relay".to_owned(),
            may_replicate: true,
            slots_max: 10,
            slots_used: 1,
            idle_timeout: None,
            slot: Some(Slot {
                plugin: Some("pgoutput".to_owned()),
                database: Some("shop".to_owned()),
                active_pid: None,
                confirmed: Lsn::new(16),
                restart: Lsn::new(8),
                wal_status: Some("reserved".to_owned()),
                invalidation_reason: None,
                failover: None,
                safe_wal_size: None,
                two_phase: false,
                temporary: false,
                server: Lsn::new(32),
                lag_seconds: None,
            }),
            publication: Some(Publication {
                inserts: true,
                more_than_inserts: false,
                all_tables: false,
                names_schemas: false,
                via_root: true,
                tables: vec![published(7)],
                members: vec![(7, "public.t7".to_owned())],
            }),
            table: Some(Table {
                oid: 7,
                owner: "admin".to_owned(),
                is_superusers: false,
                kind: "r".to_owned(),
                columns: vec![("id".to_owned(), 2950), ("note".to_owned(), 25)],
                generated: Vec::new(),
                leaves: vec![7],
                family: vec![7],
                heirs: Vec::new(),
                unlogged: Vec::new(),
                foreign: Vec::new(),
            }),
        }
    }

    fn published(oid: u32) -> Published {
        Published { oid, name: format!("public.t{oid}"), is_by_schema: false, columns: None, row_filter: None }
    }

    #[test]
    fn a_sound_world_has_no_findings() {
        assert_eq!(sound().findings(&names()), []);
    }

    #[test]
    fn a_lost_slot_keeps_nothing_and_is_not_without_a_limit() {
        let mut slot = sound().slot.unwrap();
        assert_eq!((slot.retained_bytes(), slot.safe_bytes()), (24, None));
        // As the server shows it.
        (slot.wal_status, slot.restart, slot.safe_wal_size) = (Some("lost".to_owned()), Lsn::ZERO, None);
        assert_eq!((slot.retained_bytes(), slot.safe_bytes()), (0, Some(0)));
    }

    type Break = fn(&mut World);

    #[test]
    fn every_broken_thing_is_named_with_its_remedy() {
        let breaks: [(&str, Break); 17] = [
            ("wal_level is replica", |world| world.wal_level = "replica".to_owned()),
            ("may not replicate", |world| world.may_replicate = false),
            ("slot pgoutbox does not exist", |world| world.slot = None),
            ("is physical", |world| world.slot.as_mut().unwrap().plugin = None),
            ("plugin test_decoding", |w| w.slot.as_mut().unwrap().plugin = Some("test_decoding".to_owned())),
            ("belongs to database other", |w| w.slot.as_mut().unwrap().database = Some("other".to_owned())),
            ("is lost (idle_timeout)", |world| {
                let slot = world.slot.as_mut().unwrap();
                slot.wal_status = Some("lost".to_owned());
                slot.invalidation_reason = Some("idle_timeout".to_owned());
            }),
            ("is lost", |world| world.slot.as_mut().unwrap().wal_status = Some("lost".to_owned())),
            ("at PREPARE", |world| world.slot.as_mut().unwrap().two_phase = true),
            ("publication pgoutbox does not exist", |world| world.publication = None),
            ("does not publish inserts", |world| world.publication.as_mut().unwrap().inserts = false),
            ("does not cover", |world| world.publication.as_mut().unwrap().tables.clear()),
            ("is a view, not a table", |world| world.table.as_mut().unwrap().kind = "v".to_owned()),
            ("public.outbox is unlogged", |world| {
                world.table.as_mut().unwrap().unlogged = vec!["public.outbox".to_owned()];
            }),
            ("table public.old inherits from public.outbox", |world| {
                world.table.as_mut().unwrap().heirs = vec!["public.old".to_owned()];
            }),
            ("table public.outbox does not exist", |world| world.table = None),
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

    fn steps(world: &World) -> Vec<String> {
        world.findings(&names())[0].remedy.steps().iter().map(Step::text).collect()
    }

    #[test]
    fn a_filter_is_taken_off_without_taking_other_tables_out_of_the_publication() {
        let mut world = sound();
        let publication = world.publication.as_mut().unwrap();
        publication.tables[0].row_filter = Some("(id > 1)".to_owned());
        assert_eq!(steps(&world), ["ALTER PUBLICATION pgoutbox SET TABLE public.outbox;"]);
        world.publication.as_mut().unwrap().tables.push(published(8));
        let steps = steps(&world);
        assert!(steps[0].contains("DROP TABLE public.t7;") && !steps[0].contains("SET TABLE"), "{steps:?}");
    }

    /// A new one begins where it is made, and writers do not wait for it.
    #[test]
    fn what_was_not_read_from_a_slot_is_reconciled_once_there_is_another() {
        let breaks: [fn(&mut Slot); 3] = [
            |slot| slot.two_phase = true,
            |slot| slot.temporary = true,
            |slot| slot.wal_status = Some("lost".to_owned()),
        ];
        for break_it in breaks {
            let mut world = sound();
            break_it(world.slot.as_mut().unwrap());
            let steps = steps(&world);
            assert_eq!(steps.len(), 3, "{steps:?}");
            assert_eq!(steps[2], "reconcile from the table what was committed after 0/10 and before that");
        }
    }

    #[test]
    fn a_slot_that_has_no_room_is_made_after_there_is_some() {
        let mut world = sound();
        world.slot = None;
        assert_eq!(steps(&world), ["pgoutbox init"]);
        (world.slots_max, world.slots_used) = (3, 3);
        let raised = ["ALTER SYSTEM SET max_replication_slots = 13;", "restart PostgreSQL", "pgoutbox init"];
        assert_eq!(steps(&world), raised);
    }

    #[test]
    fn a_table_that_was_renamed_is_found_by_its_publication() {
        let mut world = sound();
        world.table = None;
        assert_eq!(steps(&world), ["outbox.table=public.t7"]);
        world.publication.as_mut().unwrap().tables.clear();
        assert_eq!(steps(&world).len(), 2, "`init`, and it into the publication");
    }

    #[test]
    fn a_table_without_partitions_is_not_covered_by_having_none() {
        let mut world = sound();
        let table = world.table.as_mut().unwrap();
        (table.kind, table.leaves) = ("p".to_owned(), Vec::new());
        let publication = world.publication.as_mut().unwrap();
        (publication.via_root, publication.tables) = (false, Vec::new());
        assert_eq!(world.findings(&names()), [], "its partitions will be published");
        world.publication.as_mut().unwrap().members.clear();
        assert_eq!(steps(&world), ["ALTER PUBLICATION pgoutbox ADD TABLE public.outbox;"]);
        let others: [fn(&mut Publication); 2] = [|p| p.all_tables = true, |p| p.names_schemas = true];
        for publish in others {
            let mut world = world.clone();
            publish(world.publication.as_mut().unwrap());
            assert!(!format!("{:?}", world.findings(&names())).contains("does not cover"));
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
        publication.tables = vec![published(8)];
        assert_eq!(world.findings(&names()).len(), 1);
    }

    #[test]
    fn partitions_that_stay_published_when_they_are_detached_are_found() {
        type Publish = fn(&mut Publication);
        let ways: [(Publish, &[&str]); 7] = [
            (|_| {}, &[]),
            (|publication| publication.via_root = true, &[]),
            (|p| p.all_tables = true, &["ALTER PUBLICATION pgoutbox SET (publish_via_partition_root = true);"]),
            (
                |p| p.tables[1].is_by_schema = true,
                &["ALTER PUBLICATION pgoutbox SET (publish_via_partition_root = true);"],
            ),
            (|p| p.members.push((9, "public.t9".to_owned())), &["ALTER PUBLICATION pgoutbox SET TABLE public.outbox;"]),
            // Between the root and the leaves.
            (
                |p| p.members.push((10, "public.t10".to_owned())),
                &["ALTER PUBLICATION pgoutbox SET TABLE public.outbox;"],
            ),
            (
                |p| {
                    p.members.push((10, "public.t10".to_owned()));
                    p.tables.push(published(99));
                },
                &["BEGIN; ALTER PUBLICATION pgoutbox DROP TABLE public.t7, public.t10; \
                   ALTER PUBLICATION pgoutbox ADD TABLE public.outbox; COMMIT;"],
            ),
        ];
        for (number, (publish, mends)) in ways.into_iter().enumerate() {
            let mut world = sound();
            let table = world.table.as_mut().unwrap();
            (table.kind, table.leaves, table.family) = ("p".to_owned(), vec![8, 9], vec![7, 8, 9, 10]);
            let publication = world.publication.as_mut().unwrap();
            publication.via_root = false;
            publication.tables = vec![published(8), published(9)];
            publish(publication);
            if publication.via_root {
                publication.tables = vec![published(7)];
            }
            let findings = world.findings(&names());
            let steps: Vec<String> = findings.iter().flat_map(|found| found.remedy.steps()).map(Step::text).collect();
            assert_eq!(steps, mends, "{number}: {findings:?}");
        }
    }

    #[test]
    fn a_column_list_narrows_what_is_streamed() {
        let mut world = sound();
        world.publication.as_mut().unwrap().tables[0].columns = Some(vec!["id".to_owned()]);
        assert_eq!(world.streamed_columns(), [("id".to_owned(), 2950)]);
    }

    #[test]
    fn a_generated_column_is_streamed_where_the_server_says_so_and_nowhere_else() {
        let mut world = sound();
        world.table.as_mut().unwrap().generated = vec![("note".to_owned(), true)];
        let ordinary = [("id".to_owned(), 2950)];
        assert_eq!(world.streamed_columns(), ordinary, "no list of columns before PostgreSQL 15");
        assert!(matches!(world.republish(&names()).steps(), [Step::Act(_)]));
        let list = |world: &mut World, columns: &[&str]| {
            let columns = columns.iter().map(|column| (*column).to_owned()).collect();
            world.publication.as_mut().unwrap().tables[0].columns = Some(columns);
        };
        world.version = 180_000;
        list(&mut world, &["id"]);
        assert_eq!(world.streamed_columns(), ordinary);
        let publish = "ALTER PUBLICATION pgoutbox SET (publish_generated_columns = stored);";
        assert_eq!(world.republish(&names()).steps(), [Step::Sql(publish.to_owned())]);
        list(&mut world, &["id", "note"]);
        assert_eq!(world.streamed_columns().len(), 2);
        list(&mut world, &["note"]);
        let again = "ALTER PUBLICATION pgoutbox SET TABLE public.outbox;";
        assert_eq!(world.republish(&names()).steps(), [Step::Sql(again.to_owned())]);
        list(&mut world, &["id"]);
        world.table.as_mut().unwrap().generated = vec![("note".to_owned(), false)];
        assert!(matches!(world.republish(&names()).steps(), [Step::Act(_)]), "a virtual one");
    }

    #[test]
    fn names_are_quoted_only_where_they_must_be() {
        assert_eq!(identifier("outbox_2"), "outbox_2");
        assert_eq!(identifier("Out\"box"), "\"Out\"\"box\"");
        assert_eq!(identifier("user"), "\"user\"");
        assert_eq!(literal("it's"), "'it''s'");
    }
}
