//! What a publication streams of the outbox, what of it is missing, and what mends that. Pure.
//!
//! The trap: a publication covers tables and partitions, rows and columns each by another list, and what one of them leaves
//! out is left out without a word.

use super::world::{INIT, Names, Published, World, identifier};
use crate::finding::{Finding, Remedy};

/// Publications can have stored generated columns.
const VERSION_WITH_GENERATED: i32 = 180_000;

impl World {
    /// What the publication publishes of the table.
    pub fn publication_findings(&self, names: &Names) -> Vec<Finding> {
        let (table_name, publication_name) = (names.qualified(), identifier(&names.publication));
        let Some(publication) = &self.publication else {
            let problem = format!("publication {} does not exist in database {}", names.publication, self.database);
            let remedy = Remedy::shell(INIT).mind(
                "If the slot is older than the publication, rows committed before it are not in the stream: reconcile \
                 them from the table",
            );
            return vec![Finding::new(problem, remedy)];
        };
        let mut findings = Vec::new();
        if !publication.inserts {
            let remedy = Remedy::sql(format!("ALTER PUBLICATION {publication_name} SET (publish = 'insert')"));
            findings.push(Finding::new(format!("publication {} does not publish inserts", names.publication), remedy));
        }
        let Some(table) = self.table.as_ref().filter(|table| table.is_streamable()) else { return findings };
        let announced = if publication.via_root { vec![table.oid] } else { table.leaves.clone() };
        let covering: Vec<&Published> =
            publication.tables.iter().filter(|published| announced.contains(&published.oid)).collect();
        let is_divided = table.kind == "p" && !publication.via_root;
        let is_part = |oid: u32| oid != table.oid && table.family.contains(&oid);
        let has_named_parts = is_divided && publication.members.iter().any(|(oid, _)| is_part(*oid));
        // A list of partitions says nothing of a table that has none yet: then it counts how the next one would come in.
        let is_member = publication.members.iter().any(|(oid, _)| *oid == table.oid);
        let is_named = is_member || publication.all_tables || publication.names_schemas;
        if covering.len() < announced.len() || announced.is_empty() && !is_named {
            let add = if has_named_parts {
                self.publish_again(names)
            } else {
                Remedy::sql(format!("ALTER PUBLICATION {publication_name} ADD TABLE {table_name}"))
            };
            let remedy = add.mind("Rows inserted before that are not in the stream: reconcile them from the table");
            let problem = format!("publication {} does not cover table {table_name}", names.publication);
            findings.push(Finding::new(problem, remedy));
        } else if has_named_parts
            || is_divided && (publication.all_tables || covering.iter().any(|published| published.is_by_schema))
        {
            // Then nothing tells its rows from those of any other table.
            let problem = format!(
                "publication {} publishes partitions of {table_name} as tables of their own: one that is detached stays in \
                 it, and its rows that were not read yet would pass by",
                names.publication
            );
            let via_root = format!("ALTER PUBLICATION {publication_name} SET (publish_via_partition_root = true)");
            let remedy = if has_named_parts {
                self.publish_again(names)
            } else {
                Remedy::sql(via_root).mind("Or give the outbox a publication of its own")
            };
            findings.push(Finding::new(problem, remedy));
        }
        if covering.iter().any(|published| published.row_filter.is_some()) {
            let problem = format!("publication {} hides rows of {table_name} by a row filter", names.publication);
            findings.push(Finding::new(problem, self.publish_again(names)));
        }
        findings
    }

    /// Brings the columns into the stream that the publication leaves out: by a column list, or else because they are
    /// generated.
    pub fn republish(&self, names: &Names) -> Remedy {
        let streamed = self.streamed_columns();
        let is_left_out = |name: &str| !streamed.iter().any(|(streamed, _)| streamed == name);
        let generated = self.table.as_ref().map(|table| table.generated.as_slice()).unwrap_or_default();
        let columns = self.table.iter().flat_map(|table| &table.columns);
        let ordinary = columns.filter(|(name, _)| !generated.iter().any(|(generated, _)| generated == name));
        let absent: Vec<&(String, bool)> = generated.iter().filter(|(name, _)| is_left_out(name)).collect();
        if absent.is_empty() || ordinary.into_iter().any(|(name, _)| is_left_out(name)) {
            return self.publish_again(names);
        }
        if self.version >= VERSION_WITH_GENERATED && absent.iter().all(|(_, is_stored)| *is_stored) {
            let publication = identifier(&names.publication);
            return Remedy::sql(format!("ALTER PUBLICATION {publication} SET (publish_generated_columns = stored)"));
        }
        let absent: Vec<&str> = absent.iter().map(|(name, _)| name.as_str()).collect();
        Remedy::act("name a column that is not generated, or let the application or a trigger fill this one").mind(
            format!(
                "Generated columns are not in the stream before PostgreSQL 18, and virtual ones never: {}",
                absent.join(", ")
            ),
        )
    }

    /// Publishes the table again, whole, and leaves the publication's other tables as they are.
    fn publish_again(&self, names: &Names) -> Remedy {
        let (table, publication) = (names.qualified(), identifier(&names.publication));
        if self.others().is_empty() {
            return Remedy::sql(format!("ALTER PUBLICATION {publication} SET TABLE {table}"));
        }
        let family = self.table.as_ref().map(|table| table.family.as_slice()).unwrap_or_default();
        let members = self.publication.iter().flat_map(|publication| &publication.members);
        let members = members.filter(|(oid, _)| family.contains(oid));
        let members: Vec<&str> = members.map(|(_, name)| name.as_str()).collect();
        let (drop, add) = (format!("DROP TABLE {}", members.join(", ")), format!("ADD TABLE {table}"));
        Remedy::sql(format!(
            "BEGIN; ALTER PUBLICATION {publication} {drop}; ALTER PUBLICATION {publication} {add}; COMMIT"
        ))
    }

    /// The columns that the stream will carry: the table's, less those that a column list leaves out, and generated ones
    /// where no list of the server's says that they are in it.
    pub fn streamed_columns(&self) -> Vec<(String, u32)> {
        let Some(table) = &self.table else { return Vec::new() };
        let lists = self.publication.iter().flat_map(|publication| &publication.tables);
        let list = lists.filter(|published| table.family.contains(&published.oid)).find_map(|p| p.columns.as_ref());
        let is_generated = |name: &str| table.generated.iter().any(|(generated, _)| generated == name);
        let kept = |name: &str| match list {
            Some(list) if self.version >= VERSION_WITH_GENERATED => list.iter().any(|listed| listed == name),
            list => !is_generated(name) && list.is_none_or(|list| list.iter().any(|listed| listed == name)),
        };
        table.columns.iter().filter(|(name, _)| kept(name)).cloned().collect()
    }

    /// Every OID in the publication that is not the outbox: their rows pass by.
    pub fn others(&self) -> Vec<u32> {
        let family = self.table.as_ref().map(|table| table.family.as_slice()).unwrap_or_default();
        let tables = self.publication.iter().flat_map(|publication| &publication.tables);
        tables.map(|published| published.oid).filter(|oid| !family.contains(oid)).collect()
    }
}
