//! pgoutput, protocol version 1, streaming and two-phase off: bytes in, messages out. Pure: no socket, no clock.
//!
//! Version 1 sends only committed transactions, whole and in commit order, so nothing here waits for an outcome.
//! The layouts are those of "Logical Replication Message Formats" in the PostgreSQL manual, field by field in its order.
//! The trap: lengths and counts come from a peer. Nothing is allocated by an announced length, every read is checked, and
//! bytes left over are an error: a message half understood is not understood.

use std::ops::Range;

use bytes::Bytes;

use crate::lsn::Lsn;

/// A table has at most 1600 columns; Postgres' own limit for a tuple is 1664 (`MaxTupleAttributeNumber`).
const COLUMNS_MAX: usize = 1664;

/// One message of the stream.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// A transaction begins; its rows follow.
    Begin(Begin),
    /// The transaction is complete.
    Commit(Commit),
    /// The transaction was replayed from another server.
    Origin,
    /// How the columns of a table stand from here on.
    Relation(Relation),
    /// A data type that is not built in.
    Type,
    /// A row.
    Insert(Insert),
    /// A row changed: not an event of an outbox.
    Update,
    /// A row went: not an event of an outbox.
    Delete,
    /// Tables were emptied: not an event of an outbox.
    Truncate,
    /// `pg_logical_emit_message`: sent only on request, and not an event of an outbox.
    Logical,
}

/// `B`: a transaction begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Begin {
    /// Where the commit record starts: `commit_lsn` of the `Commit` to come.
    pub final_lsn: Lsn,
    /// Commit time, microseconds since 2000-01-01 UTC.
    pub commit_time: i64,
    /// The transaction.
    pub xid: u32,
}

/// `C`: the transaction is complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Where the commit record starts. Never to be confirmed: the server would send the transaction again.
    pub commit_lsn: Lsn,
    /// The byte after the commit record: the position to confirm.
    pub end_lsn: Lsn,
    /// Commit time, microseconds since 2000-01-01 UTC.
    pub commit_time: i64,
}

/// `R`: a table and its columns, in force until the next `R` of the same id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation {
    /// The table's OID.
    pub id: u32,
    /// Its schema; empty for `pg_catalog`.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its columns, in the order of the tuples.
    pub columns: Vec<Column>,
}

/// A column of a [`Relation`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// The OID of its data type.
    pub type_id: u32,
}

/// `I`: a row was inserted.
#[derive(Clone, Debug, PartialEq)]
pub struct Insert {
    /// The table's OID.
    pub relation_id: u32,
    /// The row.
    pub tuple: Tuple,
}

/// A row: the message it came in, and where each column's text stands there. A column becomes a slice of its own only when
/// somebody wants it: most of the cost of a row would be slices that nobody keeps.
#[derive(Clone, PartialEq, Eq)]
pub struct Tuple {
    bytes: Bytes,
    /// `None`: SQL NULL, which is not an empty text.
    columns: Vec<Option<Range<usize>>>,
}

impl Tuple {
    /// How many columns it has.
    pub fn columns(&self) -> usize {
        self.columns.len()
    }

    /// How many bytes it occupies; so many stay as long as any slice of it.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// A column's text, as the server sent it; none for NULL, and where there is no such column.
    pub fn text(&self, column: usize) -> Option<&[u8]> {
        self.bytes.get(self.range(column)?)
    }

    /// The same as a slice that keeps the row's bytes.
    pub fn slice(&self, column: usize) -> Option<Bytes> {
        Some(self.bytes.slice(self.range(column)?))
    }

    fn range(&self, column: usize) -> Option<Range<usize>> {
        self.columns.get(column)?.clone()
    }
}

/// Of columns that come from somewhere else than a stream.
impl<T: AsRef<[u8]>> FromIterator<Option<T>> for Tuple {
    fn from_iter<I: IntoIterator<Item = Option<T>>>(columns: I) -> Self {
        let mut bytes = Vec::new();
        let columns = columns.into_iter().map(|text| {
            let start = bytes.len();
            bytes.extend_from_slice(text?.as_ref());
            Some(start..bytes.len())
        });
        let columns = columns.collect();
        Self { bytes: bytes.into(), columns }
    }
}

/// Never what is in it.
impl std::fmt::Debug for Tuple {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tuple").field("columns", &self.columns.len()).field("bytes", &self.bytes.len()).finish()
    }
}

/// Bytes that are not a message of protocol version 1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The message ends before its fields do.
    #[error("pgoutput message `{kind}` ends too early")]
    Truncated {
        /// The message's first byte, as a character.
        kind: char,
    },
    /// The message goes on after its last field.
    #[error("pgoutput message `{kind}` has {bytes} bytes too many")]
    Overlong {
        /// The message's first byte, as a character.
        kind: char,
        /// How many.
        bytes: usize,
    },
    /// A field holds what the protocol does not allow there.
    #[error("pgoutput message `{kind}`: {problem}")]
    Invalid {
        /// The message's first byte, as a character.
        kind: char,
        /// What is wrong.
        problem: &'static str,
    },
    /// A message of a later protocol version, or none at all.
    #[error("pgoutput message of unknown kind {0:#04x}")]
    Unknown(u8),
}

/// Decodes one message. A row's texts stay where they are in `bytes`.
pub fn decode(bytes: &Bytes) -> Result<Message, Error> {
    let mut reader = Reader { kind: ' ', bytes, at: 0 };
    let kind = reader.u8()?;
    reader.kind = char::from(kind);
    let message = match kind {
        b'B' => Message::Begin(reader.begin()?),
        b'C' => Message::Commit(reader.commit()?),
        b'O' => reader.skip(Message::Origin),
        b'R' => Message::Relation(reader.relation()?),
        b'Y' => reader.skip(Message::Type),
        b'I' => Message::Insert(reader.insert()?),
        b'U' => reader.skip(Message::Update),
        b'D' => reader.skip(Message::Delete),
        b'T' => reader.skip(Message::Truncate),
        b'M' => reader.skip(Message::Logical),
        other => return Err(Error::Unknown(other)),
    };
    match reader.rest().len() {
        0 => Ok(message),
        bytes => Err(Error::Overlong { kind: reader.kind, bytes }),
    }
}

/// Where in a message we are, and whose it is.
struct Reader<'a> {
    kind: char,
    bytes: &'a Bytes,
    at: usize,
}

impl<'a> Reader<'a> {
    fn begin(&mut self) -> Result<Begin, Error> {
        Ok(Begin { final_lsn: self.lsn()?, commit_time: self.i64()?, xid: self.u32()? })
    }

    fn commit(&mut self) -> Result<Commit, Error> {
        let flags = self.u8()?;
        if flags != 0 {
            return Err(self.invalid("flags that this version does not know"));
        }
        Ok(Commit { commit_lsn: self.lsn()?, end_lsn: self.lsn()?, commit_time: self.i64()? })
    }

    fn relation(&mut self) -> Result<Relation, Error> {
        let id = self.u32()?;
        let namespace = self.string()?;
        let name = self.string()?;
        let _replica_identity = self.u8()?;
        let count = self.column_count()?;
        let mut columns = Vec::new();
        for _ in 0..count {
            let _is_key = self.u8()?;
            let name = self.string()?;
            let type_id = self.u32()?;
            let _type_modifier = self.u32()?;
            columns.push(Column { name, type_id });
        }
        Ok(Relation { id, namespace, name, columns })
    }

    fn insert(&mut self) -> Result<Insert, Error> {
        let relation_id = self.u32()?;
        if self.u8()? != b'N' {
            return Err(self.invalid("a row that is not marked new"));
        }
        let count = self.column_count()?;
        let mut columns = Vec::with_capacity(count);
        for _ in 0..count {
            columns.push(self.value()?);
        }
        Ok(Insert { relation_id, tuple: Tuple { bytes: self.bytes.clone(), columns } })
    }

    fn value(&mut self) -> Result<Option<Range<usize>>, Error> {
        match self.u8()? {
            b'n' => Ok(None),
            b't' => {
                let length = self.u32()? as usize;
                let start = self.at;
                self.take(length)?;
                Ok(Some(start..self.at))
            }
            // `u` stands only in updates; `b` only when asked for.
            _ => Err(self.invalid("a column value of unknown kind")),
        }
    }

    /// Passes over a message whose content means nothing to an outbox.
    fn skip(&mut self, message: Message) -> Message {
        self.at = self.bytes.len();
        message
    }

    fn column_count(&mut self) -> Result<usize, Error> {
        let count = usize::from(u16::from_be_bytes(self.array()?));
        if count > COLUMNS_MAX { Err(self.invalid("more columns than a table can have")) } else { Ok(count) }
    }

    fn string(&mut self) -> Result<String, Error> {
        let length = self.rest().iter().position(|byte| *byte == 0).ok_or_else(|| self.truncated())?;
        let text = self.take(length)?.to_vec();
        self.at += 1;
        String::from_utf8(text).map_err(|_| self.invalid("a name that is not UTF-8"))
    }

    fn lsn(&mut self) -> Result<Lsn, Error> {
        Ok(Lsn::new(u64::from_be_bytes(self.array()?)))
    }

    fn i64(&mut self) -> Result<i64, Error> {
        Ok(i64::from_be_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, Error> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    fn u8(&mut self) -> Result<u8, Error> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let array = self.rest().first_chunk().copied().ok_or_else(|| self.truncated())?;
        self.at += N;
        Ok(array)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], Error> {
        let bytes = self.rest().get(..length).ok_or_else(|| self.truncated())?;
        self.at += length;
        Ok(bytes)
    }

    fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }

    fn truncated(&self) -> Error {
        Error::Truncated { kind: self.kind }
    }

    fn invalid(&self, problem: &'static str) -> Error {
        Error::Invalid { kind: self.kind, problem }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn insert_of(values: &[Option<&[u8]>]) -> Vec<u8> {
        let mut bytes = vec![b'I', 0, 0, 0, 9, b'N'];
        bytes.extend((values.len() as u16).to_be_bytes());
        for value in values {
            match value {
                None => bytes.push(b'n'),
                Some(text) => {
                    bytes.push(b't');
                    bytes.extend((text.len() as u32).to_be_bytes());
                    bytes.extend(*text);
                }
            }
        }
        bytes
    }

    #[test]
    fn tells_null_from_empty_and_keeps_bytes_that_are_not_text() {
        let bytes = insert_of(&[None, Some(b""), Some(&[0xff, 0xfe])]);
        let Message::Insert(insert) = decode(&bytes.into()).unwrap() else { panic!("not an insert") };
        assert_eq!(insert.relation_id, 9);
        for (column, expected) in [None, Some(&b""[..]), Some(&[0xff, 0xfe]), None].into_iter().enumerate() {
            assert_eq!(insert.tuple.text(column), expected);
            assert_eq!(insert.tuple.slice(column).as_deref(), expected);
        }
        assert_eq!(insert.tuple.columns(), 3);
    }

    #[test]
    fn every_prefix_of_a_message_is_an_error_and_so_is_every_tail() {
        let whole = insert_of(&[Some(b"abc"), None]);
        for length in 0..whole.len() {
            assert!(decode(&Bytes::copy_from_slice(&whole[..length])).is_err(), "{length} bytes");
        }
        let mut longer = whole.clone();
        longer.push(0);
        assert_eq!(decode(&longer.into()), Err(Error::Overlong { kind: 'I', bytes: 1 }));
    }

    #[test]
    fn an_absurd_length_is_refused_without_being_allocated() {
        let mut bytes = insert_of(&[]);
        bytes[6..8].copy_from_slice(&1u16.to_be_bytes());
        bytes.push(b't');
        bytes.extend(u32::MAX.to_be_bytes());
        assert_eq!(decode(&bytes.into()), Err(Error::Truncated { kind: 'I' }));
        let mut columns = insert_of(&[]);
        columns[6..8].copy_from_slice(&u16::MAX.to_be_bytes());
        assert!(matches!(decode(&columns.into()), Err(Error::Invalid { .. })));
    }

    #[test]
    fn an_unchanged_toast_value_in_an_insert_is_an_error() {
        let mut bytes = insert_of(&[None]);
        *bytes.last_mut().unwrap() = b'u';
        assert!(matches!(decode(&bytes.into()), Err(Error::Invalid { .. })));
    }

    #[test]
    fn messages_of_streamed_and_prepared_transactions_are_unknown() {
        for kind in *b"SEcAbPKrp\0" {
            assert_eq!(decode(&Bytes::copy_from_slice(&[kind])), Err(Error::Unknown(kind)));
        }
    }

    #[test]
    fn random_bytes_never_panic() {
        let seed = fastrand::u64(..);
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..20_000 {
            let mut bytes = vec![0; random.usize(0..64)];
            random.fill(&mut bytes);
            if let Some(first) = bytes.first_mut() {
                *first = *random.choice(b"BCORYIUDTM").unwrap();
            }
            let _ = decode(&bytes.into());
        }
    }
}
