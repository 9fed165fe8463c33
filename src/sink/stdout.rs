//! Standard output: one JSON line a message, settled when it is flushed.
//!
//! The trap: a reader that went away is an error here, never a reason to go on as if someone had read.

use tokio::io::{AsyncWriteExt, Stdout as Handle, stdout};

use super::{Error, Receipt, Sink};
use crate::outbox::{HeaderValue, Message};

/// Standard output.
#[derive(Debug)]
pub struct Stdout {
    handle: Handle,
}

impl Stdout {
    /// Opens it.
    pub fn open() -> Self {
        Self { handle: stdout() }
    }
}

impl Sink for Stdout {
    async fn publish(&mut self, run: Vec<Message>) -> Result<Receipt, Error> {
        let mut lines = Vec::new();
        for message in &run {
            line(message, &mut lines);
        }
        let written = async {
            self.handle.write_all(&lines).await?;
            self.handle.flush().await
        };
        written.await.map_err(|error| Error::Broken(format!("standard output: {error}")))?;
        Ok(Receipt::new(std::future::ready(Ok(()))))
    }

    async fn check(&mut self) -> Result<(), Error> {
        Ok(())
    }
}

/// Appends the message as one line of JSON. A JSON payload stands as it is, other text as a string, bytes in hex.
pub fn line(message: &Message, out: &mut Vec<u8>) {
    let mut field = |name: &str, value: &[u8]| {
        out.push(if out.last().is_none_or(|last| *last == b'\n') { b'{' } else { b',' });
        out.extend(quoted(name).as_bytes());
        out.push(b':');
        out.extend(value);
    };
    field("id", quoted(&message.id).as_bytes());
    field("destination", quoted(&message.destination).as_bytes());
    field("type", quoted(&message.kind).as_bytes());
    field("committed_at_us", message.committed_at.to_string().as_bytes());
    field("content_type", quoted(message.content_type).as_bytes());
    let headers = message.headers.iter().map(|(name, value)| (name.to_string(), json(value)));
    field("headers", serde_json::Value::Object(headers.collect()).to_string().as_bytes());
    let is_null = message.headers.iter().any(|(name, _)| name == "x-outbox-null");
    match message.content_type {
        _ if is_null => field("payload", b"null"),
        // Line feeds of a json payload are white space: JSON texts hold none inside.
        "application/json" => {
            let flat: Vec<u8> =
                message.body.iter().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }).collect();
            field("payload", &flat);
        }
        "text/plain" => field("payload", quoted(&String::from_utf8_lossy(&message.body)).as_bytes()),
        _ => {
            let digits: String = message.body.iter().map(|byte| format!("{byte:02x}")).collect();
            field("payload_hex", quoted(&digits).as_bytes());
        }
    }
    out.extend(b"}\n");
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn json(value: &HeaderValue) -> serde_json::Value {
    match value {
        HeaderValue::Null => serde_json::Value::Null,
        HeaderValue::Bool(value) => (*value).into(),
        HeaderValue::Int(value) => (*value).into(),
        HeaderValue::Float(value) => (*value).into(),
        HeaderValue::Text(text) => (&**text).into(),
        HeaderValue::List(values) => values.iter().map(json).collect(),
        HeaderValue::Map(fields) => fields.iter().map(|(name, value)| (name.to_string(), json(value))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn every_message_is_one_line_of_json() {
        let mut message = Message {
            id: "7\"f".into(),
            destination: "order.placed".into(),
            kind: "placed".into(),
            content_type: "application/json",
            committed_at: 1_000_000,
            headers: vec![("x-outbox-seq".into(), HeaderValue::Int(3))],
            body: Bytes::from_static(b"{\"a\":\n 1}"),
        };
        let mut out = Vec::new();
        line(&message, &mut out);
        message.content_type = "application/octet-stream";
        message.body = Bytes::from_static(&[0, 255]);
        line(&message, &mut out);
        message.headers.push(("x-outbox-null".into(), HeaderValue::Bool(true)));
        line(&message, &mut out);
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert_eq!((&lines[0]["id"], &lines[0]["payload"]["a"]), (&"7\"f".into(), &1.into()));
        assert_eq!(lines[1]["payload_hex"], "00ff");
        assert_eq!(lines[2]["payload"], serde_json::Value::Null);
    }
}
