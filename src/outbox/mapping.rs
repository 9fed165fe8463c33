//! A row becomes a message, by the names of its columns.
//!
//! The traps: columns move when a table is altered, so indices live only as long as the `Relation` message they came from;
//! NULL is not empty; a text may not be UTF-8 in a SQL_ASCII database; and an AMQP short string ends at 255 *bytes*.

use bytes::Bytes;
use bytestring::ByteString;

use super::columns::{AGGREGATEID, AGGREGATETYPE, HEADERS, ID, KIND, PAYLOAD, Search, TRACEPARENT, TRACESTATE};
use super::message::{HeaderValue, Message};
use super::template::Template;
use super::{Error, Position, headers};
use crate::finding::Remedy;
use crate::lsn::Lsn;
use crate::pg::pgoutput::{Column, Tuple};

/// AMQP's limit for routing key, message id and type, in bytes.
const SHORT_BYTES_MAX: usize = 255;

/// A message may keep so many bytes more of its row alive than it is counted with: less is not worth a copy.
const UNUSED_BYTES_MAX: usize = 4096;

/// Microseconds from 1970 to 2000, Postgres' epoch.
const EPOCH_MICROSECONDS: i64 = 946_684_800_000_000;

/// What the columns are called, where they are not called as usual.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ColumnNames {
    /// Default `id`.
    pub id: Option<String>,
    /// Default `aggregatetype` or `aggregate_type`.
    pub aggregatetype: Option<String>,
    /// Default `aggregateid` or `aggregate_id`.
    pub aggregateid: Option<String>,
    /// Default `type` or `event_type`.
    pub kind: Option<String>,
    /// Default `payload`.
    pub payload: Option<String>,
    /// Default `headers`; may be missing.
    pub headers: Option<String>,
    /// Default `traceparent`; may be missing.
    pub traceparent: Option<String>,
    /// Default `tracestate`; may be missing.
    pub tracestate: Option<String>,
}

/// How rows become messages.
#[derive(Clone, Debug)]
pub struct Mapping {
    /// The table's name, for messages to people.
    pub table: String,
    /// What its columns are called.
    pub columns: ColumnNames,
    /// What the routing key is made of.
    pub destination: Template,
}

/// Where the columns stand in the tuples of one `Relation` message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    id: usize,
    aggregatetype: usize,
    aggregateid: usize,
    kind: usize,
    payload: usize,
    payload_type: Payload,
    headers: Option<usize>,
    traceparent: Option<usize>,
    tracestate: Option<usize>,
    destination: Vec<Part>,
    /// The last row's, checked: rows of one kind come in a row, and share it.
    last_destination: ByteString,
}

/// A part of the routing key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Text(String),
    Column(usize, String),
}

/// What kind of bytes a payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Payload {
    Json,
    Text,
    Bytes,
}

impl Mapping {
    /// Whether rows of such columns can be messages at all.
    pub fn fits(&self, columns: &[Column]) -> bool {
        self.layout(columns).is_ok()
    }

    /// Finds the columns by name.
    ///
    /// # Errors
    /// `Columns`, naming all that is wrong at once.
    pub fn layout(&self, columns: &[Column]) -> Result<Layout, Error> {
        let mut search = Search { mapping: self, columns, problems: Vec::new(), remedy: Remedy::default() };
        let id = search.required(&ID, &self.columns.id);
        let aggregatetype = search.required(&AGGREGATETYPE, &self.columns.aggregatetype);
        let aggregateid = search.required(&AGGREGATEID, &self.columns.aggregateid);
        let kind = search.required(&KIND, &self.columns.kind);
        let payload = search.required(&PAYLOAD, &self.columns.payload);
        let headers = search.optional(&HEADERS, &self.columns.headers);
        let traceparent = search.optional(&TRACEPARENT, &self.columns.traceparent);
        let tracestate = search.optional(&TRACESTATE, &self.columns.tracestate);
        let role = |name: &str| match name {
            "id" => id,
            "aggregatetype" => aggregatetype,
            "aggregateid" => aggregateid,
            "type" => kind,
            _ => None,
        };
        let destination = search.destination(role);
        let payload_type = payload.and_then(|index| search.payload_type(index));
        match (id, aggregatetype, aggregateid, kind, payload, payload_type) {
            (Some(id), Some(aggregatetype), Some(aggregateid), Some(kind), Some(payload), Some(payload_type))
                if search.problems.is_empty() =>
            {
                Ok(Layout {
                    id,
                    aggregatetype,
                    aggregateid,
                    kind,
                    payload,
                    payload_type,
                    headers,
                    traceparent,
                    tracestate,
                    destination,
                    last_destination: ByteString::new(),
                })
            }
            _ => Err(Error::Columns(search.finding())),
        }
    }
}

impl Layout {
    /// Where the payload stands.
    pub fn payload(&self) -> usize {
        self.payload
    }

    /// Makes the message of a transaction's row of that number.
    ///
    /// # Errors
    /// `Row` when no broker could take it, naming the row, the column and never a value but the id.
    pub fn message(&mut self, tuple: &Tuple, transaction: &Transaction, seq: u64) -> Result<Message, Error> {
        let row = Row { tuple, transaction, seq };
        let message = row.destination(self).and_then(|destination| row.message(self, destination));
        let mut message = message.map_err(|problem| row.named(self, problem))?;
        if tuple.bytes() > UNUSED_BYTES_MAX && tuple.bytes() > message.bytes() + UNUSED_BYTES_MAX {
            message.let_go(self.payload_type != Payload::Bytes);
        }
        Ok(message)
    }
}

/// What all rows of a transaction share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    /// Where its commit record starts.
    pub commit_lsn: Lsn,
    /// Microseconds since 2000-01-01 UTC.
    commit_time: i64,
    /// The position as text, made once.
    lsn: ByteString,
}

impl Transaction {
    /// Committed there and then.
    pub fn new(commit_lsn: Lsn, commit_time: i64) -> Self {
        Self { commit_lsn, commit_time, lsn: commit_lsn.to_string().into() }
    }
}

/// One row on its way to be a message.
struct Row<'a> {
    tuple: &'a Tuple,
    transaction: &'a Transaction,
    seq: u64,
}

impl Row<'_> {
    fn message(&self, layout: &Layout, destination: ByteString) -> Result<Message, String> {
        let (tuple, transaction) = (self.tuple, self.transaction);
        let (body, is_null) = match tuple.slice(layout.payload) {
            Some(text) => (body(text, layout.payload_type)?, false),
            None => (Bytes::new(), true),
        };
        let mut headers = Vec::new();
        for (name, index) in [("traceparent", layout.traceparent), ("tracestate", layout.tracestate)] {
            if let Some(index) = index.filter(|index| tuple.text(*index).is_some()) {
                headers.push((ByteString::from_static(name), HeaderValue::Text(text(tuple, index, name)?)));
            }
        }
        if let Some(json) = layout.headers.and_then(|index| tuple.text(index)) {
            headers::read(json, &mut headers)?;
        }
        Ok(Message {
            id: self.id(layout)?,
            destination,
            kind: short(text(tuple, layout.kind, "type")?, "type")?,
            content_type: match layout.payload_type {
                Payload::Json => "application/json",
                Payload::Text => "text/plain",
                Payload::Bytes => "application/octet-stream",
            },
            committed_at: u64::try_from(transaction.commit_time.saturating_add(EPOCH_MICROSECONDS)).unwrap_or(0),
            aggregatetype: text(tuple, layout.aggregatetype, "aggregatetype")?,
            aggregateid: text(tuple, layout.aggregateid, "aggregateid")?,
            transaction: transaction.lsn.clone(),
            seq: i64::try_from(self.seq).unwrap_or(i64::MAX),
            is_null,
            headers,
            body,
        })
    }

    fn id(&self, layout: &Layout) -> Result<ByteString, String> {
        short(text(self.tuple, layout.id, "id")?, "id")
    }

    /// What is wrong with it, and which row it is.
    fn named(&self, layout: &Layout, problem: String) -> Error {
        let position = Position { commit_lsn: self.transaction.commit_lsn, seq: self.seq };
        let id = self.id(layout).map_or_else(|_| "unknown".to_owned(), |id| id.escape_debug().to_string());
        Error::Row { position, id, problem }
    }

    fn destination(&self, layout: &mut Layout) -> Result<ByteString, String> {
        if !self.is_destination(layout) {
            layout.last_destination = self.new_destination(layout)?;
        }
        Ok(layout.last_destination.clone())
    }

    /// Whether this row's is the last one's: byte by byte, and nothing left over.
    fn is_destination(&self, layout: &Layout) -> bool {
        let mut rest: &[u8] = layout.last_destination.as_bytes();
        for part in &layout.destination {
            let text = match part {
                Part::Text(text) => Some(text.as_bytes()),
                Part::Column(index, _) => self.tuple.text(*index),
            };
            match text.and_then(|text| rest.strip_prefix(text)) {
                Some(left) => rest = left,
                None => return false,
            }
        }
        rest.is_empty() && !layout.last_destination.is_empty()
    }

    fn new_destination(&self, layout: &Layout) -> Result<ByteString, String> {
        // Exactly as long as it gets: then it is one allocation, and never moved.
        let bytes = |part: &Part| match part {
            Part::Text(text) => text.len(),
            Part::Column(index, _) => self.tuple.text(*index).map_or(0, <[u8]>::len),
        };
        let mut key = String::with_capacity(layout.destination.iter().map(bytes).sum());
        for part in &layout.destination {
            match part {
                Part::Text(text) => key.push_str(text),
                Part::Column(index, name) => {
                    let bytes = self.tuple.text(*index).ok_or_else(|| null(name))?;
                    key.push_str(std::str::from_utf8(bytes).map_err(|_| not_text(name))?);
                }
            }
        }
        // The broker takes them, but people's tools and logs do not.
        if key.chars().any(char::is_control) {
            return Err("the routing key holds a control character".to_owned());
        }
        short(key.into(), "the routing key")
    }
}

/// A column's text; a slice of what was read.
fn text(tuple: &Tuple, index: usize, name: &str) -> Result<ByteString, String> {
    let bytes = tuple.slice(index).ok_or_else(|| null(name))?;
    ByteString::try_from(bytes).map_err(|_| not_text(name))
}

fn null(name: &str) -> String {
    format!("column {name} is NULL")
}

fn not_text(name: &str) -> String {
    format!("column {name} is not valid UTF-8")
}

fn short(text: ByteString, name: &str) -> Result<ByteString, String> {
    match text.len() {
        0..=SHORT_BYTES_MAX => Ok(text),
        bytes => Err(format!("{name} has {bytes} bytes; {SHORT_BYTES_MAX} are possible")),
    }
}

fn body(text: Bytes, payload: Payload) -> Result<Bytes, String> {
    match payload {
        Payload::Json | Payload::Text => Ok(text),
        Payload::Bytes => unhex(&text).ok_or_else(|| "column payload is not bytea in hex form".to_owned()),
    }
}

/// `\x0aff`, as `bytea_output = hex` prints it, which the session pins.
fn unhex(text: &[u8]) -> Option<Bytes> {
    let digits = text.strip_prefix(b"\\x")?;
    if digits.len() % 2 != 0 {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let pair = |pair: &[u8]| match pair {
        [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
        _ => None,
    };
    digits.chunks_exact(2).map(pair).collect::<Option<Vec<u8>>>().map(Bytes::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finding::Step;
    use crate::outbox::Header;
    use crate::pg::pgoutput::{Message as Change, decode};

    fn mapping() -> Mapping {
        Mapping {
            table: "public.outbox".to_owned(),
            columns: ColumnNames::default(),
            destination: "{aggregatetype}.{type}".parse().unwrap(),
        }
    }

    fn columns(names: &[(&str, u32)]) -> Vec<Column> {
        names.iter().map(|(name, type_id)| Column { name: (*name).to_owned(), type_id: *type_id }).collect()
    }

    const USUAL: [(&str, u32); 7] = [
        ("id", 2950),
        ("aggregatetype", 25),
        ("aggregateid", 25),
        ("type", 25),
        ("payload", 3802),
        ("headers", 3802),
        ("traceparent", 25),
    ];

    type Value = Option<Vec<u8>>;

    fn value(text: &str) -> Value {
        Some(text.into())
    }

    fn row() -> Vec<Value> {
        let mut row: Vec<Value> = ["7f", "order", "42", "placed", "{\"a\": 1}"].map(value).to_vec();
        row.extend([None, None]);
        row
    }

    fn map(columns: &[(&str, u32)], row: &[Value]) -> Result<Message, Error> {
        let transaction = Transaction::new(Lsn::new(0x16_B374_D848), 1_000_000);
        mapping().layout(&self::columns(columns))?.message(&row.iter().cloned().collect(), &transaction, 3)
    }

    fn headers(message: &Message) -> Vec<(&str, Header<'_>)> {
        let mut headers = Vec::new();
        message.each_header(|name, value| headers.push((name, value)));
        headers
    }

    #[test]
    fn a_row_becomes_the_message_of_the_contract() {
        let message = map(&USUAL, &row()).unwrap();
        assert_eq!((&*message.id, &*message.destination, &*message.kind), ("7f", "order.placed", "placed"));
        assert_eq!(&message.body[..], b"{\"a\": 1}");
        assert_eq!(message.content_type, "application/json");
        assert_eq!(message.committed_at, 946_684_801_000_000);
        let expected = [
            ("aggregatetype", Header::Text("order")),
            ("aggregateid", Header::Text("42")),
            ("x-outbox-lsn", Header::Text("16/B374D848")),
            ("x-outbox-seq", Header::Int(3)),
        ];
        assert_eq!(headers(&message), expected);
    }

    #[test]
    fn columns_are_found_by_name_in_any_order_and_under_other_names() {
        let moved = [
            ("note", 25),
            ("payload", 25),
            ("event_type", 25),
            ("aggregate_id", 25),
            ("aggregate_type", 25),
            ("id", 20),
        ];
        let row: Vec<Value> = ["-", "hello", "placed", "42", "order", "9"].map(value).to_vec();
        let message = map(&moved, &row).unwrap();
        assert_eq!((&*message.id, &*message.destination), ("9", "order.placed"));
        assert_eq!((message.content_type, &message.body[..]), ("text/plain", &b"hello"[..]));
    }

    #[test]
    fn a_routing_key_may_call_columns_by_what_they_are_for() {
        let called =
            [("event_type", 25), ("aggregate_id", 25), ("aggregate_type", 25), ("number", 20), ("payload", 25)];
        let row: Tuple = ["placed", "42", "order", "9", "hello"].map(Some).into_iter().collect();
        let mapping = Mapping {
            columns: ColumnNames { id: Some("number".to_owned()), ..ColumnNames::default() },
            destination: "{id}.{aggregatetype}.{aggregateid}.{type}".parse().unwrap(),
            ..mapping()
        };
        let mut layout = mapping.layout(&columns(&called)).unwrap();
        assert_eq!(layout.message(&row, &Transaction::new(Lsn::ZERO, 0), 0).unwrap().destination, "9.order.42.placed");
    }

    #[test]
    fn a_row_has_a_routing_key_of_its_own_whatever_the_row_before_had() {
        let mut layout = mapping().layout(&columns(&USUAL)).unwrap();
        let mut key = |kind: Value, action: Value| {
            let row: Tuple = [value("7f"), kind, value("42"), action, None].into_iter().collect();
            let message = layout.message(&row, &Transaction::new(Lsn::ZERO, 0), 0);
            message.map_err(|error| error.to_string()).map(|message| message.destination.to_string())
        };
        for (kind, action) in [
            ("order", "placed"),
            ("order", "placed"),
            ("order", "place"),
            ("order", "placed"),
            ("o", "rder.placed"),
            ("", ""),
        ] {
            assert_eq!(key(value(kind), value(action)), Ok(format!("{kind}.{action}")));
        }
        assert!(key(value("order"), None).unwrap_err().contains("column type is NULL"));
        assert!(key(value("order"), Some(b"\xff".into())).unwrap_err().contains("type is not valid UTF-8"));
        assert_eq!(key(value("order"), value("placed")).unwrap(), "order.placed");
    }

    #[test]
    fn all_missing_columns_are_named_at_once() {
        let error = map(&[("id", 2950), ("payload", 23)], &[]).unwrap_err().to_string();
        for part in
            ["aggregatetype or aggregate_type", "aggregateid", "type or event_type", "json, jsonb, text or bytea"]
        {
            assert!(error.contains(part), "{error}");
        }
        let mut chosen = mapping();
        chosen.columns.headers = Some("meta".to_owned());
        let error = chosen.layout(&columns(&USUAL)).unwrap_err().to_string();
        assert!(error.contains("column meta is missing"), "{error}");
    }

    #[test]
    fn a_payload_of_a_type_of_ones_own_is_not_advised_to_become_text() {
        for (type_id, is_sql) in [(23, true), (16_384, false), (90_000, false)] {
            let mut columns = USUAL.to_vec();
            columns[4].1 = type_id;
            let Error::Columns(finding) = map(&columns, &row()).unwrap_err() else { panic!("not the columns") };
            let step = &finding.remedy.steps()[0];
            assert_eq!(matches!(step, Step::Sql(_)), is_sql, "{step:?}");
            assert!(step.text().contains("payload of public.outbox") != is_sql, "{step:?}");
        }
    }

    #[test]
    fn null_payload_is_an_empty_body_with_a_header_and_an_empty_one_is_not() {
        let mut empty = row();
        let text_payload: Vec<(&str, u32)> =
            USUAL.iter().map(|(name, oid)| if *name == "payload" { (*name, 25) } else { (*name, *oid) }).collect();
        empty[4] = value("");
        let null_header = ("x-outbox-null", Header::Bool(true));
        assert!(!headers(&map(&text_payload, &empty).unwrap()).contains(&null_header));
        empty[4] = None;
        let message = map(&text_payload, &empty).unwrap();
        assert!(message.body.is_empty() && headers(&message).contains(&null_header));
    }

    #[test]
    fn bytea_becomes_its_raw_bytes() {
        let columns: Vec<(&str, u32)> =
            USUAL.iter().map(|(name, oid)| if *name == "payload" { (*name, 17) } else { (*name, *oid) }).collect();
        let mut binary = row();
        binary[4] = value("\\x00ff0A");
        let message = map(&columns, &binary).unwrap();
        assert_eq!((&message.body[..], message.content_type), (&[0u8, 255, 10][..], "application/octet-stream"));
        for broken in ["00", "\\x0", "\\xzz", "\\000"] {
            binary[4] = value(broken);
            assert!(map(&columns, &binary).is_err(), "{broken}");
        }
    }

    #[test]
    fn columns_that_no_message_has_do_not_live_as_long_as_it() {
        for payload in [3802, 17] {
            let mut columns = USUAL.to_vec();
            columns[4].1 = payload;
            columns.push(("document", 25));
            let mut frame = vec![b'I', 0, 0, 0, 1, b'N', 0, 8];
            let texts = ["7f", "order", "42", "placed", "\\x00ff", "{}", "00-1-2-3", &"d".repeat(100_000)];
            for text in texts {
                frame.push(b't');
                frame.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
                frame.extend(text.as_bytes());
            }
            let frame = Bytes::from(frame);
            let Change::Insert(insert) = decode(&frame).unwrap() else { panic!("not an insert") };
            let mut layout = mapping().layout(&self::columns(&columns)).unwrap();
            let message = layout.message(&insert.tuple, &Transaction::new(Lsn::ZERO, 0), 0).unwrap();
            drop(insert);
            assert!(frame.is_unique(), "{payload}");
            assert_eq!((&*message.id, message.headers.len(), message.body.is_empty()), ("7f", 1, false));
        }
    }

    #[test]
    fn a_row_that_no_broker_could_take_is_named_and_its_values_are_not() {
        let cases: [(usize, Value, &str); 7] = [
            (1, None, "aggregatetype is NULL"),
            (2, None, "aggregateid is NULL"),
            (3, value(&"s3cret".repeat(50)), "routing key has"),
            (1, value("s3cret\r\n"), "control character"),
            (1, Some(b"s3cret\xff".into()), "not valid UTF-8"),
            (5, value("{\"CC\":[\"s3cret\"]}"), "reserved"),
            (0, None, "id is NULL"),
        ];
        for (column, bad, problem) in cases {
            let mut row = row();
            row[column] = bad;
            let error = map(&USUAL, &row).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(problem), "{text}");
            assert!(text.contains("16/B374D848") && !text.contains("s3cret"), "{text}");
            assert!(column == 0 || text.contains("id 7f"), "{text}");
        }
    }

    #[test]
    fn a_key_of_255_bytes_passes_and_one_of_256_does_not() {
        for (bytes, passes) in [(255, true), (256, false)] {
            let mut row = row();
            row[3] = value("p");
            row[1] = value(&"é".repeat((bytes - 2) / 2));
            if bytes % 2 == 1 {
                row[3] = value("pp");
                row[1] = value(&"é".repeat((bytes - 3) / 2));
            }
            assert_eq!(map(&USUAL, &row).is_ok(), passes, "{bytes}");
        }
    }
}
