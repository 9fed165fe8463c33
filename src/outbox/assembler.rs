//! The stream becomes messages and checkpoints: the only place that knows whether a transaction is open.
//!
//! The traps. A keepalive inside a transaction carries that transaction's own `commit_lsn`; told to Postgres plus one byte
//! it loses the transaction, so inside a transaction it is nothing. A commit's checkpoint is its `end_lsn`, not its
//! `commit_lsn`. Tables are told apart by OID, never by name: partitions have other names, and a table that was dropped and
//! re-created has the same one.

use std::collections::{BTreeMap, HashSet};

use bytes::Bytes;

use super::mapping::{Layout, Mapping, Transaction};
use super::{Error, Item, Position};
use crate::lsn::Lsn;
use crate::pg::pgoutput::{self, Insert, Message as Change, Relation};

/// One pebibyte: nobody writes so much log between two positions of one stream, so one beyond it is garbage. Postgres itself
/// takes any position it is told, and never sends again what lies below it.
const LOG_BYTES_MAX: u64 = 1 << 50;

/// Which OIDs are the outbox and which are known not to be, by the catalog.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// The outbox and its partitions.
    pub outbox: HashSet<u32>,
    /// Other tables of the publication: their rows pass by.
    pub others: HashSet<u32>,
    /// The outbox's schema and name.
    pub name: (String, String),
}

/// Turns changes into items.
#[derive(Debug)]
pub struct Assembler {
    mapping: Mapping,
    tables: Tables,
    /// Few: looked up for every row.
    relations: BTreeMap<u32, Known>,
    open: Option<Open>,
    start: Lsn,
    /// The last position handed out as a checkpoint, or begun with: nothing at or below it may come again.
    reached: Lsn,
}

/// What a `Relation` message said.
#[derive(Debug)]
struct Known {
    relation: Relation,
    owner: Owner,
    /// Of an outbox table, made at its first row.
    layout: Option<Layout>,
}

/// Whose table it is, by the catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Outbox,
    Other,
    Unknown,
}

/// A transaction of which not all is here yet.
#[derive(Debug)]
struct Open {
    transaction: Transaction,
    xid: u32,
    rows: u64,
}

impl Tables {
    fn owner(&self, oid: u32) -> Owner {
        match (self.others.contains(&oid), self.outbox.contains(&oid)) {
            (true, _) => Owner::Other,
            (false, true) => Owner::Outbox,
            (false, false) => Owner::Unknown,
        }
    }
}

impl Assembler {
    /// Begins at a transaction boundary, where every stream begins.
    pub fn new(mapping: Mapping, tables: Tables) -> Self {
        let start = Lsn::ZERO;
        Self { mapping, tables, relations: BTreeMap::new(), open: None, start, reached: Lsn::ZERO }
    }

    /// For a stream that was asked to begin here: without it the first position of all is believed.
    #[must_use]
    pub fn beginning_at(self, start: Lsn) -> Self {
        Self { start, ..self }
    }

    /// Whether a transaction has begun and not ended.
    pub fn in_transaction(&self) -> bool {
        self.open.is_some()
    }

    /// The number of the open transaction; none when none is.
    pub fn xid(&self) -> Option<u32> {
        self.open.as_ref().map(|open| open.xid)
    }

    /// Where the open transaction's commit record begins; zero when none is open.
    pub fn commit_lsn(&self) -> Lsn {
        self.open.as_ref().map(|open| open.transaction.commit_lsn).unwrap_or_default()
    }

    /// The catalog was asked again. What was the outbox when the stream began stays so in it: of a partition that was
    /// detached meanwhile, rows from before that may still come. What was another table and is gone was no outbox either.
    pub fn set_tables(&mut self, mut tables: Tables) {
        tables.others.extend(self.tables.others.difference(&tables.outbox));
        tables.outbox.extend(&self.tables.outbox);
        tables.others.retain(|oid| !self.tables.outbox.contains(oid));
        self.relations.iter_mut().for_each(|(oid, known)| known.owner = tables.owner(*oid));
        self.tables = tables;
    }

    /// Whether the rows of this table are messages.
    pub fn is_outbox(&self, oid: u32) -> bool {
        self.tables.owner(oid) == Owner::Outbox
    }

    /// A table that the catalog does not know any more: without the outbox's columns it was none, nor a partition of it, and
    /// its rows pass by from now on. `false`: it had them.
    pub fn pass_by(&mut self, oid: u32) -> bool {
        let Some(known) = self.relations.get_mut(&oid).filter(|known| !self.mapping.fits(&known.relation.columns))
        else {
            return false;
        };
        known.owner = Owner::Other;
        self.tables.others.insert(oid);
        true
    }

    /// Takes one pgoutput message. After `UnknownTable` the same bytes may be given again, with better tables.
    ///
    /// # Errors
    /// Any; none of them leaves a row behind.
    pub fn change(&mut self, bytes: &Bytes) -> Result<Option<Item>, Error> {
        match pgoutput::decode(bytes)? {
            Change::Begin(begin) => {
                self.closed("BEGIN")?;
                self.possible(begin.final_lsn)?;
                if begin.final_lsn < self.reached {
                    return Err(Error::Order(format!(
                        "a transaction at {} after position {}",
                        begin.final_lsn, self.reached
                    )));
                }
                let transaction = Transaction::new(begin.final_lsn, begin.commit_time);
                self.open = Some(Open { transaction, xid: begin.xid, rows: 0 });
                Ok(None)
            }
            Change::Commit(commit) => {
                let begun = opened(&mut self.open, "COMMIT")?.transaction.commit_lsn;
                if commit.commit_lsn != begun || commit.end_lsn <= commit.commit_lsn {
                    return Err(Error::Order(format!(
                        "COMMIT at {} to {} of the transaction at {}",
                        commit.commit_lsn, commit.end_lsn, begun
                    )));
                }
                self.possible(commit.end_lsn)?;
                self.open = None;
                self.reached = commit.end_lsn;
                Ok(Some(Item::Checkpoint(commit.end_lsn)))
            }
            Change::Relation(relation) => self.relation(relation).map(|()| None),
            Change::Insert(insert) => self.insert(&insert),
            // Updates, deletes and truncates are not events: rows may be deleted at any time.
            Change::Update | Change::Delete | Change::Truncate => Ok(None),
            Change::Origin | Change::Type | Change::Logical => Ok(None),
        }
    }

    /// Takes a keepalive. Outside a transaction everything up to its `wal_end` is in the stream before it.
    ///
    /// # Errors
    /// `Order` for a position that no server can stand at.
    pub fn keepalive(&mut self, wal_end: Lsn) -> Result<Option<Item>, Error> {
        if self.in_transaction() || wal_end <= self.reached {
            return Ok(None);
        }
        self.possible(wal_end)?;
        self.reached = wal_end;
        Ok(Some(Item::Checkpoint(wal_end)))
    }

    fn possible(&self, lsn: Lsn) -> Result<(), Error> {
        let from = self.reached.max(self.start);
        if from == Lsn::ZERO || lsn.bytes_since(from) <= LOG_BYTES_MAX {
            return Ok(());
        }
        Err(Error::Order(format!("position {lsn} after {from}: no server can have written so much")))
    }

    fn relation(&mut self, relation: Relation) -> Result<(), Error> {
        let name = (&relation.namespace, &relation.name);
        let is_ours = self.tables.outbox.contains(&relation.id);
        if !is_ours && name == (&self.tables.name.0, &self.tables.name.1) {
            let (oid, name) = (relation.id, format!("{}.{}", name.0, name.1));
            return Err(Error::Recreated { oid, name, commit_lsn: self.commit_lsn() });
        }
        // Tables are described again when they change: with the outbox's columns it may have become a partition.
        let owner = match self.tables.owner(relation.id) {
            Owner::Other if self.mapping.fits(&relation.columns) => Owner::Unknown,
            owner => owner,
        };
        self.relations.insert(relation.id, Known { relation, owner, layout: None });
        Ok(())
    }

    fn insert(&mut self, insert: &Insert) -> Result<Option<Item>, Error> {
        let open = opened(&mut self.open, "INSERT")?;
        let oid = insert.relation_id;
        let Some(known) = self.relations.get_mut(&oid) else {
            return Err(Error::Order(format!("a row of table {oid} before its description")));
        };
        match known.owner {
            Owner::Outbox => {}
            Owner::Other => return Ok(None),
            Owner::Unknown => {
                let name = format!("{}.{}", known.relation.namespace, known.relation.name);
                let commit_lsn = open.transaction.commit_lsn;
                return Err(Error::UnknownTable { oid, name, commit_lsn });
            }
        }
        let (columns, values) = (known.relation.columns.len(), insert.tuple.columns());
        if values != columns {
            return Err(Error::Order(format!("a row of {values} values for {columns} columns")));
        }
        let layout = match &mut known.layout {
            Some(layout) => layout,
            none => none.insert(self.mapping.layout(&known.relation.columns)?),
        };
        let message = layout.message(&insert.tuple, &open.transaction, open.rows)?;
        let position = Position { commit_lsn: open.transaction.commit_lsn, seq: open.rows };
        open.rows += 1;
        Ok(Some(Item::Message(position, message)))
    }

    fn closed(&self, what: &str) -> Result<(), Error> {
        match &self.open {
            None => Ok(()),
            Some(open) => {
                Err(Error::Order(format!("{what} inside the transaction at {}", open.transaction.commit_lsn)))
            }
        }
    }
}

fn opened<'a>(open: &'a mut Option<Open>, what: &str) -> Result<&'a mut Open, Error> {
    open.as_mut().ok_or_else(|| Error::Order(format!("{what} outside a transaction")))
}

#[cfg(test)]
mod tests {
    use super::super::mapping::ColumnNames;
    use super::*;

    const OUTBOX: u32 = 7;
    const OTHER: u32 = 8;

    fn assembler() -> Assembler {
        let mapping = Mapping {
            table: "public.outbox".to_owned(),
            columns: ColumnNames::default(),
            destination: "{aggregatetype}".parse().unwrap(),
        };
        let name = ("public".to_owned(), "outbox".to_owned());
        Assembler::new(mapping, Tables { outbox: [OUTBOX].into(), others: [OTHER].into(), name })
    }

    fn begin(commit_lsn: u64) -> Bytes {
        let mut bytes = vec![b'B'];
        bytes.extend(commit_lsn.to_be_bytes());
        bytes.extend([0; 12]);
        bytes.into()
    }

    fn commit(commit_lsn: u64, end_lsn: u64) -> Bytes {
        let mut bytes = vec![b'C', 0];
        bytes.extend(commit_lsn.to_be_bytes());
        bytes.extend(end_lsn.to_be_bytes());
        bytes.extend([0; 8]);
        bytes.into()
    }

    fn relation(oid: u32, name: &str, columns: &[&str]) -> Bytes {
        let mut bytes = vec![b'R'];
        bytes.extend(oid.to_be_bytes());
        bytes.extend(b"public\0");
        bytes.extend(name.as_bytes());
        bytes.extend([0, b'd']);
        bytes.extend((columns.len() as u16).to_be_bytes());
        for column in columns {
            bytes.push(0);
            bytes.extend(column.as_bytes());
            bytes.push(0);
            bytes.extend(25u32.to_be_bytes());
            bytes.extend([0xff; 4]);
        }
        bytes.into()
    }

    fn insert(oid: u32, values: &[&str]) -> Bytes {
        let mut bytes = vec![b'I'];
        bytes.extend(oid.to_be_bytes());
        bytes.push(b'N');
        bytes.extend((values.len() as u16).to_be_bytes());
        for value in values {
            bytes.push(b't');
            bytes.extend((value.len() as u32).to_be_bytes());
            bytes.extend(value.as_bytes());
        }
        bytes.into()
    }

    const COLUMNS: [&str; 5] = ["id", "aggregatetype", "aggregateid", "type", "payload"];
    const ROW: [&str; 5] = ["1", "order", "42", "placed", "{}"];

    #[test]
    fn rows_go_forward_as_they_arrive_and_the_commit_is_the_checkpoint() {
        let mut assembler = assembler();
        assert_eq!(assembler.change(&begin(100)).unwrap(), None);
        assembler.change(&relation(OUTBOX, "outbox", &COLUMNS)).unwrap();
        for seq in 0..2 {
            let Some(Item::Message(position, _)) = assembler.change(&insert(OUTBOX, &ROW)).unwrap() else {
                panic!("not a message")
            };
            assert_eq!(position, Position { commit_lsn: Lsn::new(100), seq });
        }
        assert_eq!(assembler.change(&commit(100, 148)).unwrap(), Some(Item::Checkpoint(Lsn::new(148))));
        assert!(!assembler.in_transaction());
    }

    #[test]
    fn a_keepalive_inside_a_transaction_is_nothing() {
        let mut assembler = assembler();
        assert_eq!(assembler.keepalive(Lsn::new(90)).unwrap(), Some(Item::Checkpoint(Lsn::new(90))));
        assembler.change(&begin(100)).unwrap();
        assert_eq!(assembler.keepalive(Lsn::new(100)).unwrap(), None);
        assembler.change(&commit(100, 148)).unwrap();
        assert_eq!(assembler.keepalive(Lsn::new(148)).unwrap(), None, "nothing new");
        assert_eq!(assembler.keepalive(Lsn::new(120)).unwrap(), None, "never back");
        assert_eq!(assembler.keepalive(Lsn::new(200)).unwrap(), Some(Item::Checkpoint(Lsn::new(200))));
    }

    #[test]
    fn a_position_that_no_server_can_stand_at_becomes_no_checkpoint() {
        let start = Lsn::new(1 << 40);
        let mut assembler = assembler().beginning_at(start);
        assert!(assembler.keepalive(Lsn::new(u64::MAX)).is_err());
        assert!(assembler.change(&begin(1 << 51)).is_err());
        assembler.change(&begin(1 << 41)).unwrap();
        assert!(assembler.change(&commit(1 << 41, u64::MAX)).is_err());
        assembler.change(&commit(1 << 41, (1 << 41) + 48)).unwrap();
        // A quiet night on a busy server is no reason.
        assert!(assembler.keepalive(Lsn::new(1 << 49)).unwrap().is_some());
    }

    #[test]
    fn columns_follow_the_relation_in_force() {
        let mut assembler = assembler();
        assembler.change(&begin(100)).unwrap();
        assembler.change(&relation(OUTBOX, "outbox", &COLUMNS)).unwrap();
        assembler.change(&insert(OUTBOX, &ROW)).unwrap();
        assembler
            .change(&relation(OUTBOX, "outbox", &["payload", "note", "id", "aggregatetype", "aggregateid", "type"]))
            .unwrap();
        let row = ["{}", "n", "2", "user", "9", "left"];
        let Some(Item::Message(_, message)) = assembler.change(&insert(OUTBOX, &row)).unwrap() else { panic!() };
        assert_eq!((&*message.id, &*message.destination), ("2", "user"));
        assembler.change(&relation(OUTBOX, "outbox", &["id"])).unwrap();
        assert!(matches!(assembler.change(&insert(OUTBOX, &["3"])), Err(Error::Columns(_))));
    }

    #[test]
    fn rows_of_other_tables_pass_by_and_rows_of_unknown_tables_do_not() {
        let mut assembler = assembler();
        assembler.change(&begin(100)).unwrap();
        assembler.change(&relation(OTHER, "orders", &["id"])).unwrap();
        assert_eq!(assembler.change(&insert(OTHER, &["1"])).unwrap(), None);
        assembler.change(&relation(9, "outbox_2024", &COLUMNS)).unwrap();
        assert!(matches!(assembler.change(&insert(9, &ROW)), Err(Error::UnknownTable { oid: 9, .. })));
        let mut better = assembler.tables.clone();
        better.outbox.insert(9);
        assembler.set_tables(better);
        let Some(Item::Message(position, _)) = assembler.change(&insert(9, &ROW)).unwrap() else { panic!() };
        assert_eq!(position.seq, 0);
    }

    #[test]
    fn a_partition_that_is_detached_under_a_stream_stays_the_outbox_in_it() {
        let mut assembler = assembler();
        assembler.change(&begin(100)).unwrap();
        assembler.change(&relation(OUTBOX, "outbox_old", &COLUMNS)).unwrap();
        let detached = Tables { outbox: [9].into(), others: [OTHER, OUTBOX].into(), ..assembler.tables.clone() };
        assembler.set_tables(detached);
        let row = assembler.change(&insert(OUTBOX, &ROW)).unwrap();
        assert!(matches!(row, Some(Item::Message(..))), "{row:?}");
        assert_eq!(assembler.tables.owner(OTHER), Owner::Other);
    }

    #[test]
    fn a_table_that_may_have_become_a_partition_is_looked_up_when_it_is_described() {
        let mut assembler = assembler();
        assembler.change(&begin(100)).unwrap();
        for is_partition in [false, true] {
            assembler.change(&relation(OTHER, "outbox_2027", &COLUMNS)).unwrap();
            let row = assembler.change(&insert(OTHER, &ROW));
            assert!(matches!(row, Err(Error::UnknownTable { oid: OTHER, .. })), "{row:?}");
            let outbox = if is_partition { [OUTBOX, OTHER].into() } else { [OUTBOX].into() };
            let others = if is_partition { [].into() } else { [OTHER].into() };
            assembler.set_tables(Tables { outbox, others, ..assembler.tables.clone() });
            let row = assembler.change(&insert(OTHER, &ROW)).unwrap();
            assert_eq!(matches!(row, Some(Item::Message(..))), is_partition, "{row:?}");
        }
    }

    #[test]
    fn a_table_that_is_gone_passes_by_when_it_was_no_outbox() {
        let mut assembler = assembler();
        assembler.change(&begin(100)).unwrap();
        assembler.change(&relation(OTHER, "orders", &["id"])).unwrap();
        assembler.set_tables(Tables { others: [].into(), ..assembler.tables.clone() });
        assert_eq!(assembler.change(&insert(OTHER, &["1"])).unwrap(), None, "known, and dropped since");
        assembler.change(&relation(9, "staging", &["id"])).unwrap();
        assert!(assembler.change(&insert(9, &["1"])).is_err(), "the catalog may know it");
        assert!(assembler.pass_by(9));
        assert_eq!(assembler.change(&insert(9, &["1"])).unwrap(), None);
        assembler.change(&relation(10, "outbox_old", &COLUMNS)).unwrap();
        assert!(!assembler.pass_by(10), "it may have been a partition");
        assert!(matches!(assembler.change(&insert(10, &ROW)), Err(Error::UnknownTable { oid: 10, .. })));
    }

    #[test]
    fn the_outbox_name_under_another_oid_is_an_error() {
        let mut assembler = assembler();
        assembler.change(&begin(100)).unwrap();
        let error = assembler.change(&relation(99, "outbox", &COLUMNS)).unwrap_err();
        assert!(matches!(error, Error::Recreated { oid: 99, .. }));
    }

    #[test]
    fn messages_out_of_order_are_errors() {
        let mut first = assembler();
        assert!(first.change(&commit(100, 148)).is_err(), "COMMIT without BEGIN");
        assert!(first.change(&insert(OUTBOX, &ROW)).is_err(), "INSERT without BEGIN");
        first.change(&begin(100)).unwrap();
        assert!(first.change(&begin(200)).is_err(), "BEGIN inside");
        assert!(first.change(&insert(OUTBOX, &ROW)).is_err(), "INSERT before RELATION");
        assert!(first.change(&commit(101, 148)).is_err(), "COMMIT of another");
        let mut second = assembler();
        second.change(&begin(100)).unwrap();
        second.change(&commit(100, 148)).unwrap();
        assert!(second.change(&begin(120)).is_err(), "going back");
        assert!(second.change(&begin(148)).is_ok(), "the next record starts where this one ended");
    }
}
