//! A message in AMQP's words: properties, typed headers, short strings.
//!
//! The trap: lapin's `ShortString::from` panics beyond 255 bytes, and headers beyond a frame cost the whole connection.

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldArray, FieldTable, LongString, ShortString};

use super::super::Error;
use crate::outbox::{HeaderValue, Message};

pub(super) fn properties(message: &Message) -> Result<BasicProperties, Error> {
    Ok(BasicProperties::default()
        .with_delivery_mode(2)
        .with_message_id(short(&message.id)?)
        .with_type(short(&message.kind)?)
        .with_content_type(message.content_type.into())
        .with_timestamp(message.committed_at / 1_000_000)
        .with_app_id("pgoutbox".into())
        .with_headers(table(&message.headers)))
}

/// lapin's own conversion panics beyond 255 bytes; the mapping has refused such rows before.
pub(super) fn short(text: &str) -> Result<ShortString, Error> {
    ShortString::try_new(text.to_owned()).map_err(|_| Error::Undeliverable {
        id: "unknown".to_owned(),
        problem: format!("a name of {} bytes where AMQP takes 255", text.len()),
    })
}

fn table(headers: &[(String, HeaderValue)]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in headers {
        // Names were bounded by the mapping; one that is too long after all is cut from nothing, it cannot occur.
        if let Ok(name) = short(name) {
            table.insert(name, amqp(value));
        }
    }
    table
}

fn amqp(value: &HeaderValue) -> AMQPValue {
    match value {
        HeaderValue::Null => AMQPValue::Void,
        HeaderValue::Bool(value) => AMQPValue::Boolean(*value),
        HeaderValue::Int(value) => AMQPValue::LongLongInt(*value),
        HeaderValue::Float(value) => AMQPValue::Double(*value),
        HeaderValue::Text(text) => AMQPValue::LongString(LongString::from(text.as_str())),
        HeaderValue::List(values) => {
            AMQPValue::FieldArray(FieldArray::from(values.iter().map(amqp).collect::<Vec<_>>()))
        }
        HeaderValue::Map(fields) => AMQPValue::FieldTable(table(fields)),
    }
}

/// An upper bound of the content header's bytes: fixed fields and flags, the short strings, the table.
pub(super) fn header_bytes(message: &Message) -> usize {
    const FIXED: usize = 64;
    message.bytes().saturating_sub(message.body.len()) + message.headers.len() * 2 + FIXED
}
