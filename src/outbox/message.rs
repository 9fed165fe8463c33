//! One outbox row as a message: what every sink gets and every consumer sees.
//!
//! The trap: a payload that is parsed and written again is another payload. The body is the row's bytes, untouched; like the
//! texts, it is a slice of what was read from the socket.

use bytes::Bytes;
use bytestring::ByteString;

/// One outbox row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Message {
    /// The row's id: the same on every redelivery.
    pub id: ByteString,
    /// Where it goes: the routing key.
    pub destination: ByteString,
    /// The row's type.
    pub kind: ByteString,
    /// Of the body.
    pub content_type: &'static str,
    /// The transaction's commit, microseconds since 1970-01-01 UTC.
    pub committed_at: u64,
    /// What the row is about, and the first of the headers that every message has.
    pub aggregatetype: ByteString,
    /// Which one of these.
    pub aggregateid: ByteString,
    /// Where its transaction stands in the total order, as text.
    pub transaction: ByteString,
    /// The row's number in its transaction.
    pub seq: i64,
    /// There was no payload, which is not an empty one.
    pub is_null: bool,
    /// Further headers; no name twice, and none of those above.
    pub headers: Vec<(ByteString, HeaderValue)>,
    /// The payload's bytes.
    pub body: Bytes,
}

/// A typed header value.
#[derive(Clone, Debug, PartialEq)]
pub enum HeaderValue {
    /// JSON null.
    Null,
    /// JSON true or false.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// Any other number.
    Float(f64),
    /// A text.
    Text(ByteString),
    /// A JSON array.
    List(Vec<HeaderValue>),
    /// A JSON object.
    Map(Vec<(ByteString, HeaderValue)>),
}

/// What a header of a message says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Header<'a> {
    /// A text.
    Text(&'a str),
    /// A whole number.
    Int(i64),
    /// True or false.
    Bool(bool),
    /// What the row's own headers said.
    Value(&'a HeaderValue),
}

impl Message {
    /// Shows each header, in the order in which they are written. Those that every message has are no list: it would cost
    /// each row an allocation.
    pub fn each_header<'a>(&'a self, mut show: impl FnMut(&'a str, Header<'a>)) {
        show("aggregatetype", Header::Text(&self.aggregatetype));
        show("aggregateid", Header::Text(&self.aggregateid));
        show("x-outbox-lsn", Header::Text(&self.transaction));
        show("x-outbox-seq", Header::Int(self.seq));
        if self.is_null {
            show("x-outbox-null", Header::Bool(true));
        }
        self.headers.iter().for_each(|(name, value)| show(name, Header::Value(value)));
    }

    /// Roughly what it occupies in memory and on the wire, for limits in bytes: never less than its body.
    pub fn bytes(&self) -> usize {
        let headers: usize = self.headers.iter().map(|(name, value)| name.len() + value.bytes()).sum();
        let texts = [&self.id, &self.destination, &self.kind, &self.aggregatetype, &self.aggregateid];
        texts.into_iter().map(|text| text.len()).sum::<usize>() + headers + self.body.len() + OVERHEAD_BYTES
    }

    /// Copies what is a slice of the row it was read from: while any slice lives, all of the row's bytes do, also those of
    /// columns that no message has.
    pub(super) fn let_go(&mut self, is_body_of_row: bool) {
        for text in [&mut self.id, &mut self.kind, &mut self.aggregatetype, &mut self.aggregateid] {
            *text = ByteString::from(&**text);
        }
        for (_, value) in &mut self.headers {
            if let HeaderValue::Text(text) = value {
                *text = ByteString::from(&**text);
            }
        }
        if is_body_of_row {
            self.body = Bytes::copy_from_slice(&self.body);
        }
    }
}

/// Fixed cost of a message beside its texts: the structs that hold it, the frames around it, the headers that every one has.
const OVERHEAD_BYTES: usize = 350;

impl HeaderValue {
    fn bytes(&self) -> usize {
        match self {
            HeaderValue::Null | HeaderValue::Bool(_) | HeaderValue::Int(_) | HeaderValue::Float(_) => 9,
            HeaderValue::Text(text) => 5 + text.len(),
            HeaderValue::List(values) => 5 + values.iter().map(HeaderValue::bytes).sum::<usize>(),
            HeaderValue::Map(fields) => {
                5 + fields.iter().map(|(name, value)| 1 + name.len() + value.bytes()).sum::<usize>()
            }
        }
    }
}

impl From<&str> for HeaderValue {
    fn from(text: &str) -> Self {
        HeaderValue::Text(text.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_costs_the_sum_of_its_parts() {
        let nested = HeaderValue::Map(vec![("key".into(), HeaderValue::List(vec![HeaderValue::Int(1)]))]);
        let message = Message {
            id: "7f".into(),
            destination: "order".into(),
            kind: "placed".into(),
            aggregatetype: "order".into(),
            aggregateid: "421".into(),
            headers: vec![("text".into(), "hello".into()), ("map".into(), nested)],
            body: Bytes::from_static(b"0123456789"),
            ..Message::default()
        };
        let headers = (4 + 5 + 5) + (3 + 5 + (1 + 3 + 5 + 9));
        assert_eq!(message.bytes(), 2 + 5 + 6 + 5 + 3 + headers + 10 + OVERHEAD_BYTES);
    }
}
