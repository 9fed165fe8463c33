//! pgoutput as a server writes it: the opposite of the decoder, written from the manual and not from the decoder.

use bytes::{BufMut, Bytes, BytesMut};

/// The outbox table's OID.
pub(super) const OUTBOX: u32 = 16_384;

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

pub(super) fn relation() -> Bytes {
    let mut bytes = BytesMut::new();
    bytes.put_u8(b'R');
    bytes.put_u32(OUTBOX);
    bytes.put_slice(b"public\0outbox\0d");
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

pub(super) fn insert(id: &str) -> Bytes {
    let mut bytes = BytesMut::new();
    bytes.put_u8(b'I');
    bytes.put_u32(OUTBOX);
    bytes.put_u8(b'N');
    bytes.put_u16(COLUMNS.len() as u16);
    for value in [id, "order", "1", "placed", "{}"] {
        bytes.put_u8(b't');
        bytes.put_u32(value.len() as u32);
        bytes.put_slice(value.as_bytes());
    }
    bytes.freeze()
}
