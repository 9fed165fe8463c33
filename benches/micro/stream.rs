//! A stream as a walsender sends it, made in memory: one relation, transactions of rows, each message a slice of one buffer.

use bytes::{Bytes, BytesMut};
use pgoutbox::lsn::Lsn;
use pgoutbox::outbox::{Mapping, Tables};

/// The outbox' OID.
const OUTBOX: u32 = 16_384;

/// Names and types (OIDs of `pg_type.dat`) of `sql/table.sql`.
const COLUMNS: [(&str, u32); 8] = [
    ("id", 2950),
    ("aggregatetype", 25),
    ("aggregateid", 25),
    ("type", 25),
    ("payload", 3802),
    ("headers", 3802),
    ("traceparent", 25),
    ("created_at", 1184),
];

/// The stream, and how many rows it has.
pub(crate) struct Rows {
    pub(crate) count: u64,
    pub(crate) changes: Vec<Bytes>,
    /// Where the last transaction ends.
    pub(crate) end: Lsn,
}

impl Rows {
    pub(crate) fn new(count: u64, rows_a_transaction: u64, payload_bytes: usize) -> Self {
        let mut buffer = BytesMut::new();
        let mut ends = Vec::new();
        let mut put = |message: &[u8]| {
            buffer.extend_from_slice(message);
            ends.push(buffer.len());
        };
        put(&relation());
        let mut lsn: u64 = 0x16_0000_0000;
        for row in 0..count {
            if row % rows_a_transaction == 0 {
                lsn += 0x1000;
                put(&[b"B", &lsn.to_be_bytes()[..], &800_000_000_000_000_i64.to_be_bytes(), &[0, 0, 3, 7]].concat());
            }
            put(&insert(row, payload_bytes));
            if row % rows_a_transaction == rows_a_transaction - 1 || row == count - 1 {
                let (begin, end) = (lsn.to_be_bytes(), (lsn + 48).to_be_bytes());
                put(&[b"C\0", &begin[..], &end, &800_000_000_000_000_i64.to_be_bytes()].concat());
            }
        }
        let whole = buffer.freeze();
        let mut start = 0;
        let changes = ends.into_iter().map(|end| whole.slice(std::mem::replace(&mut start, end)..end));
        Self { count, changes: changes.collect(), end: Lsn::new(lsn + 48) }
    }
}

fn relation() -> Vec<u8> {
    let mut bytes = [b"R", &OUTBOX.to_be_bytes()[..], b"public\0outbox\0d\0", &[COLUMNS.len() as u8]].concat();
    for (name, type_id) in COLUMNS {
        bytes.extend([b"\0", name.as_bytes(), b"\0", &type_id.to_be_bytes(), &[0xff; 4]].concat());
    }
    bytes
}

fn insert(row: u64, payload_bytes: usize) -> Vec<u8> {
    let mut bytes = [b"I", &OUTBOX.to_be_bytes()[..], b"N\0", &[COLUMNS.len() as u8]].concat();
    let mut text = |text: &str| {
        bytes.push(b't');
        bytes.extend((text.len() as u32).to_be_bytes());
        bytes.extend(text.as_bytes());
    };
    text(&format!("{row:08x}-5a8e-4f5c-9b57-3d2a0f6f7a11"));
    text("order");
    text(&row.to_string());
    text("placed");
    let payload = format!("{{\"n\": {row}, \"note\": \"\"}}");
    text(&payload.replace("\"\"", &format!("\"{}\"", "x".repeat(payload_bytes.saturating_sub(payload.len())))));
    bytes.extend(b"nn");
    let created = "2026-01-01 12:00:00.123456+00";
    bytes.push(b't');
    bytes.extend((created.len() as u32).to_be_bytes());
    bytes.extend(created.as_bytes());
    bytes
}

/// As `pgoutbox run` maps rows unless it is told otherwise.
pub(crate) fn mapping() -> Mapping {
    Mapping {
        table: "public.outbox".to_owned(),
        columns: pgoutbox::outbox::ColumnNames::default(),
        destination: "{aggregatetype}.{type}".parse().unwrap(),
    }
}

/// What the catalog would say.
pub(crate) fn tables() -> Tables {
    let name = ("public".to_owned(), "outbox".to_owned());
    Tables { outbox: [OUTBOX].into(), name, ..Tables::default() }
}
