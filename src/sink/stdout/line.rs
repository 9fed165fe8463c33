//! A message as one line of JSON, written straight into the buffer that goes out. Pure.
//!
//! The trap: a JSON payload is not parsed and printed again, which would be another payload; it stands in the line as it is,
//! and only the line feeds between its tokens become spaces.

use std::io::Write;

use bytestring::ByteString;

use crate::outbox::{Header, HeaderValue, Message};

/// Appends the message as one line of JSON. A JSON payload stands as it is, other text as a string, bytes in hex.
pub fn line(message: &Message, out: &mut Vec<u8>) {
    out.extend(b"{\"id\":");
    text(&message.id, out);
    out.extend(b",\"destination\":");
    text(&message.destination, out);
    out.extend(b",\"type\":");
    text(&message.kind, out);
    out.extend(b",\"committed_at_us\":");
    print(message.committed_at, out);
    out.extend(b",\"content_type\":");
    text(message.content_type, out);
    out.extend(b",\"headers\":");
    headers(message, out);
    payload(message, out);
    out.extend(b"}\n");
}

fn payload(message: &Message, out: &mut Vec<u8>) {
    match message.content_type {
        _ if message.is_null => out.extend(b",\"payload\":null"),
        // Line feeds of a json payload are white space: JSON texts hold none inside.
        "application/json" => {
            out.extend(b",\"payload\":");
            out.extend(message.body.iter().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }));
        }
        "text/plain" => {
            out.extend(b",\"payload\":");
            text(&String::from_utf8_lossy(&message.body), out);
        }
        _ => {
            out.extend(b",\"payload_hex\":\"");
            message.body.iter().for_each(|byte| _ = write!(out, "{byte:02x}"));
            out.push(b'"');
        }
    }
}

fn headers(message: &Message, out: &mut Vec<u8>) {
    let mut before = b'{';
    message.each_header(|name, header| {
        out.push(std::mem::replace(&mut before, b','));
        text(name, out);
        out.push(b':');
        match header {
            Header::Text(value) => text(value, out),
            Header::Int(value) => print(value, out),
            Header::Bool(value) => print(value, out),
            Header::Value(header) => value(header, out),
        }
    });
    out.push(b'}');
}

fn object(fields: &[(ByteString, HeaderValue)], out: &mut Vec<u8>) {
    out.push(b'{');
    for (index, (name, field)) in fields.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        text(name, out);
        out.push(b':');
        value(field, out);
    }
    out.push(b'}');
}

fn value(value: &HeaderValue, out: &mut Vec<u8>) {
    match value {
        HeaderValue::Null => out.extend(b"null"),
        HeaderValue::Bool(value) => print(value, out),
        HeaderValue::Int(value) => print(value, out),
        // It was JSON's, so it is a number.
        HeaderValue::Float(value) => _ = serde_json::to_writer(out, value),
        HeaderValue::Text(value) => text(value, out),
        HeaderValue::List(values) => {
            out.push(b'[');
            for (index, element) in values.iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                self::value(element, out);
            }
            out.push(b']');
        }
        HeaderValue::Map(fields) => object(fields, out),
    }
}

/// A string, with what JSON wants escaped. A buffer takes everything.
fn text(text: &str, out: &mut Vec<u8>) {
    _ = serde_json::to_writer(out, text);
}

fn print(value: impl std::fmt::Display, out: &mut Vec<u8>) {
    _ = write!(out, "{value}");
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn every_message_is_one_line_of_json() {
        let nested = HeaderValue::Map(vec![
            ("list".into(), HeaderValue::List(vec![HeaderValue::Null, HeaderValue::Bool(true), "a\nb".into()])),
            ("none".into(), HeaderValue::Map(Vec::new())),
        ]);
        let mut message = Message {
            id: "7\"f".into(),
            destination: "order.placed".into(),
            kind: "placed".into(),
            content_type: "application/json",
            committed_at: 1_000_000,
            aggregatetype: "order".into(),
            aggregateid: "4\t2".into(),
            transaction: "0/1".into(),
            seq: 3,
            headers: vec![("half".into(), HeaderValue::Float(0.5)), ("nested".into(), nested)],
            body: Bytes::from_static(b"{\"a\":\n 1}"),
            ..Message::default()
        };
        let mut out = Vec::new();
        line(&message, &mut out);
        message.content_type = "application/octet-stream";
        message.body = Bytes::from_static(&[0, 255]);
        line(&message, &mut out);
        message.is_null = true;
        line(&message, &mut out);
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert_eq!((&lines[0]["id"], &lines[0]["payload"]["a"]), (&"7\"f".into(), &1.into()));
        assert_eq!(lines[0]["committed_at_us"], 1_000_000);
        let nested = serde_json::json!({ "list": [null, true, "a\nb"], "none": {} });
        let own = serde_json::json!({ "aggregatetype": "order", "aggregateid": "4\t2", "x-outbox-lsn": "0/1",
            "x-outbox-seq": 3, "half": 0.5, "nested": nested });
        assert_eq!(lines[0]["headers"], own);
        assert_eq!(lines[2]["headers"]["x-outbox-null"], true);
        assert_eq!(lines[1]["payload_hex"], "00ff");
        assert_eq!(lines[2]["payload"], serde_json::Value::Null);
    }
}
