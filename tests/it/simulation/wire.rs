//! pgoutput as a server writes it: the opposite of the decoder, written from the manual and not from the decoder.

use bytes::{BufMut, Bytes, BytesMut};

/// The outbox table's OID; its partitions' follow.
const OUTBOX: u32 = 16_384;

/// Another table of the publication.
pub(super) const OTHER: u32 = 9_999;

/// The OID of a partition of the outbox; 0 is the table itself.
pub(super) fn oid(partition: u32) -> u32 {
    OUTBOX + partition
}

const COLUMNS: [&str; 5] = ["id", "aggregatetype", "aggregateid", "type", "payload"];
const TEXT: u32 = 25;

pub(super) fn begin(commit_lsn: u64) -> Bytes {
    let mut bytes = BytesMut::new();
    bytes.put_u8(b'B');
    bytes.put_u64(commit_lsn);
    bytes.put_i64(0);
    bytes.put_u32(700);
    bytes.freeze()
}

pub(super) fn commit(commit_lsn: u64, end_lsn: u64) -> Bytes {
    let mut bytes = BytesMut::new();
    bytes.put_u8(b'C');
    bytes.put_u8(0);
    bytes.put_u64(commit_lsn);
    bytes.put_u64(end_lsn);
    bytes.put_i64(0);
    bytes.freeze()
}

/// The table by its OID and name.
pub(super) fn relation(oid: u32, name: &str) -> Bytes {
    let mut bytes = BytesMut::new();
    bytes.put_u8(b'R');
    bytes.put_u32(oid);
    bytes.put_slice(b"public\0");
    bytes.put_slice(name.as_bytes());
    bytes.put_slice(b"\0d");
    bytes.put_u16(COLUMNS.len() as u16);
    for column in COLUMNS {
        bytes.put_u8(0);
        bytes.put_slice(column.as_bytes());
        bytes.put_u8(0);
        bytes.put_u32(TEXT);
        bytes.put_i32(-1);
    }
    bytes.freeze()
}

/// A row; a poisoned one has a NULL where no event can have one.
pub(super) fn insert(oid: u32, id: &str, is_poisoned: bool, payload: &str) -> Bytes {
    let mut bytes = BytesMut::with_capacity(128 + payload.len());
    bytes.put_u8(b'I');
    bytes.put_u32(oid);
    bytes.put_u8(b'N');
    bytes.put_u16(COLUMNS.len() as u16);
    for (value, name) in [id, "order", "1", "placed", payload].into_iter().zip(COLUMNS) {
        if is_poisoned && name == "type" {
            bytes.put_u8(b'n');
            continue;
        }
        bytes.put_u8(b't');
        bytes.put_u32(value.len() as u32);
        bytes.put_slice(value.as_bytes());
    }
    bytes.freeze()
}

/// A logical message: not an event.
pub(super) fn logical() -> Bytes {
    let mut bytes = BytesMut::new();
    bytes.put_u8(b'M');
    bytes.put_u8(1);
    bytes.put_u64(0);
    bytes.put_slice(b"prefix\0");
    bytes.put_u32(4);
    bytes.put_slice(b"text");
    bytes.freeze()
}
