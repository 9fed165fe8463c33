//! Which columns make an outbox: what they are called, of what types, and what mends a table that lacks one.
//!
//! The trap: a statement that adds a column mends the rows to come. Rows that are in the write-ahead log already are
//! streamed with the columns that they were written with.

use super::Mapping;
use super::mapping::{Part, Payload};
use super::template::Piece;
use crate::finding::{Finding, Remedy, Step};
use crate::pg::pgoutput::Column;
use crate::pg::world::identifier;

/// OIDs of the built-in types that matter here (`pg_type.dat`).
mod oid {
    pub(super) const BYTEA: u32 = 17;
    pub(super) const TEXT: u32 = 25;
    pub(super) const JSON: u32 = 114;
    pub(super) const BPCHAR: u32 = 1042;
    pub(super) const VARCHAR: u32 = 1043;
    pub(super) const JSONB: u32 = 3802;
    /// From here on types are made by users (`FirstNormalObjectId`).
    pub(super) const OWN: u32 = 16_384;
}

/// A routing key that every outbox can have.
const USUAL_ROUTING_KEY: &str = "{aggregatetype}.{type}";

/// What a column is for.
pub(super) struct Role {
    /// The setting that names it.
    setting: &'static str,
    /// What it is called where nobody says.
    usual: &'static [&'static str],
    /// How it would be made.
    definition: &'static str,
}

const fn role(setting: &'static str, usual: &'static [&'static str], definition: &'static str) -> Role {
    Role { setting, usual, definition }
}

pub(super) const ID: Role = role("outbox.columns.id", &["id"], "uuid NOT NULL DEFAULT gen_random_uuid()");
pub(super) const AGGREGATETYPE: Role =
    role("outbox.columns.aggregatetype", &["aggregatetype", "aggregate_type"], "text");
pub(super) const AGGREGATEID: Role = role("outbox.columns.aggregateid", &["aggregateid", "aggregate_id"], "text");
pub(super) const KIND: Role = role("outbox.columns.type", &["type", "event_type"], "text");
pub(super) const PAYLOAD: Role = role("outbox.columns.payload", &["payload"], "jsonb");
pub(super) const HEADERS: Role = role("outbox.columns.headers", &["headers"], "jsonb");
pub(super) const TRACEPARENT: Role = role("outbox.columns.traceparent", &["traceparent"], "text");
pub(super) const TRACESTATE: Role = role("outbox.columns.tracestate", &["tracestate"], "text");

/// Columns looked for by name, and all that is missing.
pub(super) struct Search<'a> {
    pub(super) mapping: &'a Mapping,
    pub(super) columns: &'a [Column],
    pub(super) problems: Vec<String>,
    pub(super) remedy: Remedy,
}

impl Search<'_> {
    fn find(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|column| column.name == name)
    }

    /// A column that must be there.
    pub(super) fn required(&mut self, role: &Role, chosen: &Option<String>) -> Option<usize> {
        let names = chosen.as_deref().map_or_else(|| role.usual.to_vec(), |name| vec![name]);
        let found = names.iter().find_map(|name| self.find(name));
        if found.is_none() {
            self.problems.push(format!("column {} is missing", names.join(" or ")));
            let usual = role.usual.iter().find(|usual| self.find(usual).is_some());
            let step = match (usual, names.first()) {
                (Some(usual), _) => Step::Setting(role.setting, (*usual).to_owned()),
                (None, Some(name)) => self.add(name, role.definition),
                (None, None) => return None,
            };
            self.then(step);
        }
        found
    }

    /// A name that the operator chose must be there; a usual one may be.
    pub(super) fn optional(&mut self, role: &Role, chosen: &Option<String>) -> Option<usize> {
        if chosen.is_some() {
            return self.required(role, chosen);
        }
        role.usual.iter().find_map(|name| self.find(name))
    }

    /// The parts of the routing key; a name that is no column's may be that of what a column is for.
    pub(super) fn destination(&mut self, role: impl Fn(&str) -> Option<usize>) -> Vec<Part> {
        let mut parts = Vec::new();
        for piece in self.mapping.destination.pieces() {
            match piece {
                Piece::Text(text) => parts.push(Part::Text(text.clone())),
                Piece::Column(name) => match self.find(name).or_else(|| role(name)) {
                    Some(index) => parts.push(Part::Column(index, name.clone())),
                    // Said already, when it is missing as a column of its own.
                    None if ["id", "aggregatetype", "aggregateid", "type"].contains(&name.as_str()) => {}
                    None => {
                        self.problems.push(format!("column {name} of rabbitmq.routing_key is missing"));
                        self.then(Step::Setting("rabbitmq.routing_key", USUAL_ROUTING_KEY.to_owned()));
                    }
                },
            }
        }
        parts
    }

    /// Of a type for which we can promise bytes.
    pub(super) fn payload_type(&mut self, index: usize) -> Option<Payload> {
        let column = self.columns.get(index)?;
        match column.type_id {
            oid::JSON | oid::JSONB => Some(Payload::Json),
            oid::BYTEA => Some(Payload::Bytes),
            oid::TEXT | oid::VARCHAR | oid::BPCHAR => Some(Payload::Text),
            other => {
                let name = &column.name;
                self.problems
                    .push(format!("column {name} must be json, jsonb, text or bytea (its type's OID is {other})"));
                let (table, name) = (&self.mapping.table, identifier(name));
                self.then(if other < oid::OWN {
                    Step::Sql(format!("ALTER TABLE {table} ALTER COLUMN {name} TYPE text USING {name}::text;"))
                } else {
                    // As text, the bytes of a domain over bytea would be their hex digits.
                    Step::Act(format!("make {name} of {table} one of these; a domain, what it is a domain over"))
                });
                None
            }
        }
    }

    fn add(&self, name: &str, definition: &str) -> Step {
        let name = identifier(name);
        Step::Sql(format!("ALTER TABLE {} ADD COLUMN {name} {definition};", self.mapping.table))
    }

    fn then(&mut self, step: Step) {
        // A column may be missing twice, for the row and for the routing key.
        if !self.remedy.steps().contains(&step) {
            self.remedy = std::mem::take(&mut self.remedy).then(step);
        }
    }

    /// All that is wrong.
    pub(super) fn finding(self) -> Finding {
        let problem = format!("table {}: {}", self.mapping.table, self.problems.join(", "));
        let remedy = self.remedy.mind(
            "Or name the columns that are meant in outbox.columns.*. Rows that were inserted before are streamed as they \
             were, and NULL stops the relay where a value is needed",
        );
        Finding::new(problem, remedy)
    }
}
