//! What we say: methods, and messages as `basic.publish`, content header and body frames.
//!
//! The traps. A short string holds 255 bytes, and a content header that does not fit one frame costs the whole connection
//! (501): [`header_bytes`] counts exactly what [`publish`] will write, so that such a row is refused before anything is
//! sent. And a body is the row's own bytes: a large one is handed to the socket as it stands and never copied.

use bytes::{BufMut, Bytes, BytesMut};
use bytestring::ByteString;

use super::frames::FRAME_OVERHEAD;
use super::link::Output;
use crate::outbox::{Header, HeaderValue, Message};

/// AMQP 0-9-1 section 4.2.2.
pub(super) const PROTOCOL_HEADER: &[u8] = b"AMQP\x00\x00\x09\x01";

/// The only one.
pub(super) const CHANNEL: u16 = 1;

const FRAME_END: u8 = 0xCE;
const SHORT_BYTES_MAX: usize = 255;
const APP_ID: &str = "pgoutbox";

/// content-type, headers, delivery-mode, message-id, timestamp, type, app-id.
const PROPERTY_FLAGS: u16 = 1 << 15 | 1 << 13 | 1 << 12 | 1 << 7 | 1 << 6 | 1 << 5 | 1 << 3;

/// Bodies up to here are copied between their frames: cheaper than one more piece for the kernel to gather.
const COPIED_BODY_BYTES_MAX: usize = 4096;

/// Appends a frame.
fn frame(out: &mut BytesMut, kind: u8, channel: u16, payload: impl FnOnce(&mut BytesMut)) {
    out.put_u8(kind);
    out.put_u16(channel);
    sized(out, payload);
    out.put_u8(FRAME_END);
}

/// Appends something behind its size.
fn sized(out: &mut BytesMut, content: impl FnOnce(&mut BytesMut)) {
    let start = out.len();
    out.put_u32(0);
    content(out);
    let size = u32::try_from(out.len() - start - 4).expect("frames are smaller than 4 GiB");
    if let Some(place) = out.get_mut(start..start + 4) {
        place.copy_from_slice(&size.to_be_bytes());
    }
}

/// Longer ones were refused before: see [`short_fits`]. Cut rather than overrun, should one come after all.
fn short(out: &mut BytesMut, text: &str) {
    let bytes = text.as_bytes().get(..SHORT_BYTES_MAX).unwrap_or(text.as_bytes());
    out.put_u8(u8::try_from(bytes.len()).unwrap_or(u8::MAX));
    out.put_slice(bytes);
}

/// Whether a short string can hold it.
pub(super) fn short_fits(text: &str) -> bool {
    text.len() <= SHORT_BYTES_MAX
}

fn long(out: &mut BytesMut, bytes: &[u8]) {
    out.put_u32(u32::try_from(bytes.len()).expect("frames are smaller than 4 GiB"));
    out.put_slice(bytes);
}

fn method(out: &mut BytesMut, channel: u16, class: u16, method: u16, arguments: impl FnOnce(&mut BytesMut)) {
    frame(out, 1, channel, |out| {
        out.put_u16(class);
        out.put_u16(method);
        arguments(out);
    });
}

/// `connection.start-ok`. The capabilities are promises: to understand what the broker then sends.
pub(super) fn start_ok(out: &mut BytesMut, mechanism: &str, response: &[u8]) {
    const CAPABILITIES: [&str; 5] = [
        "publisher_confirms",
        "basic.nack",
        "connection.blocked",
        "consumer_cancel_notify",
        "authentication_failure_close",
    ];
    let text = |text: &'static str| HeaderValue::Text(ByteString::from_static(text));
    let capabilities = CAPABILITIES.map(|name| (name.into(), HeaderValue::Bool(true)));
    let properties = [
        ("product", text(APP_ID)),
        ("version", text(env!("CARGO_PKG_VERSION"))),
        ("platform", text("Rust")),
        ("connection_name", text(APP_ID)),
        ("capabilities", HeaderValue::Map(capabilities.into())),
    ];
    method(out, 0, 10, 11, |out| {
        table(out, &properties.map(|(name, value)| (name.into(), value)));
        short(out, mechanism);
        long(out, response);
        short(out, "en_US");
    });
}

/// What AMQPLAIN says in `connection.start-ok`: a table, as everywhere, but for its size.
pub(super) fn amqplain(user: &str, password: &str) -> Vec<u8> {
    let fields = [("LOGIN", user), ("PASSWORD", password)];
    let mut out = BytesMut::new();
    table(&mut out, &fields.map(|(name, text)| (name.into(), HeaderValue::Text(text.into()))));
    out.get(4..).unwrap_or_default().to_vec()
}

pub(super) fn tune_ok(out: &mut BytesMut, frame_max: u32, heartbeat: u16) {
    method(out, 0, 10, 31, |out| {
        out.put_u16(CHANNEL);
        out.put_u32(frame_max);
        out.put_u16(heartbeat);
    });
}

pub(super) fn open(out: &mut BytesMut, vhost: &str) {
    method(out, 0, 10, 40, |out| {
        short(out, vhost);
        out.put_slice(&[0, 0]);
    });
}

pub(super) fn channel_open(out: &mut BytesMut) {
    method(out, CHANNEL, 20, 10, |out| out.put_u8(0));
}

/// A durable topic exchange: create it, or only look that one of its name exists.
pub(super) fn exchange_declare(out: &mut BytesMut, exchange: &str, create: bool) {
    const PASSIVE: u8 = 1;
    const DURABLE: u8 = 2;
    method(out, CHANNEL, 40, 10, |out| {
        out.put_u16(0);
        short(out, exchange);
        short(out, "topic");
        out.put_u8(if create { DURABLE } else { DURABLE | PASSIVE });
        table(out, &[]);
    });
}

/// A declare that no broker can obey: of its argument's type there is no alternate exchange. Whether we may declare the
/// exchange is decided before that is seen.
pub(super) fn exchange_declare_in_vain(out: &mut BytesMut, exchange: &str) {
    const DURABLE: u8 = 2;
    method(out, CHANNEL, 40, 10, |out| {
        out.put_u16(0);
        short(out, exchange);
        short(out, "topic");
        out.put_u8(DURABLE);
        table(out, &[(ByteString::from_static("alternate-exchange"), HeaderValue::Int(0))]);
    });
}

/// Only looks that a queue is there and reachable. It answers with the number of its messages, which nobody needs.
pub(super) fn queue_declare_passive(out: &mut BytesMut, queue: &str) {
    const PASSIVE: u8 = 1;
    method(out, CHANNEL, 50, 10, |out| {
        out.put_u16(0);
        short(out, queue);
        out.put_u8(PASSIVE);
        table(out, &[]);
    });
}

pub(super) fn channel_close_ok(out: &mut BytesMut) {
    method(out, CHANNEL, 20, 41, |_| {});
}

/// From here on nothing is published before a commit.
pub(super) fn tx_select(out: &mut BytesMut) {
    method(out, CHANNEL, 90, 10, |_| {});
}

pub(super) fn tx_rollback(out: &mut BytesMut) {
    method(out, CHANNEL, 90, 30, |_| {});
}

/// An empty message for a transaction that is rolled back. With the name of another user the broker refuses it even there,
/// after it has looked at permissions and before it has looked at bindings.
pub(super) fn publish_in_vain(out: &mut BytesMut, exchange: &str, routing_key: &str, user: Option<&str>) {
    const USER_ID: u16 = 1 << 4;
    method(out, CHANNEL, 60, 40, |out| {
        out.put_u16(0);
        short(out, exchange);
        short(out, routing_key);
        out.put_u8(0);
    });
    frame(out, 2, CHANNEL, |out| {
        out.put_u16(60);
        out.put_u16(0);
        out.put_u64(0);
        out.put_u16(if user.is_some() { USER_ID } else { 0 });
        user.into_iter().for_each(|user| short(out, user));
    });
}

pub(super) fn confirm_select(out: &mut BytesMut) {
    method(out, CHANNEL, 85, 10, |out| out.put_u8(0));
}

/// `connection.close`.
pub(super) fn close(out: &mut BytesMut, reason: &str) {
    method(out, 0, 10, 50, |out| {
        out.put_u16(200);
        short(out, reason);
        out.put_u32(0);
    });
}

pub(super) fn close_ok(out: &mut BytesMut) {
    method(out, 0, 10, 51, |_| {});
}

pub(super) fn heartbeat(out: &mut BytesMut) {
    frame(out, 8, 0, |_| {});
}

/// One message, mandatory and persistent.
pub(super) fn publish(out: &mut Output, exchange: &str, message: &Message, frame_max: usize) {
    const MANDATORY: u8 = 1;
    let frames = out.tail();
    method(frames, CHANNEL, 60, 40, |out| {
        out.put_u16(0);
        short(out, exchange);
        short(out, &message.destination);
        out.put_u8(MANDATORY);
    });
    frame(frames, 2, CHANNEL, |out| {
        out.put_u16(60);
        out.put_u16(0);
        out.put_u64(message.body.len() as u64);
        properties(out, message);
    });
    let mut body = message.body.clone();
    while !body.is_empty() {
        let piece = body.split_to(body.len().min(frame_max.saturating_sub(FRAME_OVERHEAD).max(1)));
        body_frame(out, piece);
    }
}

fn body_frame(out: &mut Output, piece: Bytes) {
    let frames = out.tail();
    frames.put_u8(3);
    frames.put_u16(CHANNEL);
    frames.put_u32(u32::try_from(piece.len()).expect("frame_max is a u32"));
    if piece.len() <= COPIED_BODY_BYTES_MAX {
        frames.put_slice(&piece);
    } else {
        out.own(piece);
    }
    out.tail().put_u8(FRAME_END);
}

fn properties(out: &mut BytesMut, message: &Message) {
    const PERSISTENT: u8 = 2;
    out.put_u16(PROPERTY_FLAGS);
    short(out, message.content_type);
    sized(out, |out| {
        message.each_header(|name, value| {
            short(out, name);
            header(out, value);
        });
    });
    out.put_u8(PERSISTENT);
    short(out, &message.id);
    out.put_u64(message.committed_at / 1_000_000);
    short(out, &message.kind);
    short(out, APP_ID);
}

fn table(out: &mut BytesMut, fields: &[(ByteString, HeaderValue)]) {
    sized(out, |out| {
        for (name, value) in fields {
            short(out, name);
            field(out, value);
        }
    });
}

fn header(out: &mut BytesMut, value: Header<'_>) {
    match value {
        Header::Text(text) => text_field(out, text),
        Header::Int(value) => int_field(out, value),
        Header::Bool(value) => bool_field(out, value),
        Header::Value(value) => field(out, value),
    }
}

fn text_field(out: &mut BytesMut, text: &str) {
    out.put_u8(b'S');
    long(out, text.as_bytes());
}

fn int_field(out: &mut BytesMut, value: i64) {
    out.put_u8(b'l');
    out.put_i64(value);
}

fn bool_field(out: &mut BytesMut, value: bool) {
    out.put_slice(&[b't', u8::from(value)]);
}

/// RabbitMQ's types, which differ from the specification's.
fn field(out: &mut BytesMut, value: &HeaderValue) {
    match value {
        HeaderValue::Null => out.put_u8(b'V'),
        HeaderValue::Bool(value) => bool_field(out, *value),
        HeaderValue::Int(value) => int_field(out, *value),
        HeaderValue::Float(value) => {
            out.put_u8(b'd');
            out.put_f64(*value);
        }
        HeaderValue::Text(text) => text_field(out, text),
        HeaderValue::List(values) => {
            out.put_u8(b'A');
            sized(out, |out| values.iter().for_each(|value| field(out, value)));
        }
        HeaderValue::Map(fields) => {
            out.put_u8(b'F');
            table(out, fields);
        }
    }
}

/// The bytes of the content header's payload, or the name that no short string holds.
pub(super) fn header_bytes(message: &Message) -> Result<usize, &str> {
    // Class, weight, body size and flags; delivery mode and timestamp.
    const FIXED: usize = 14 + 9;
    let texts = [message.content_type, &message.id, &message.kind, APP_ID];
    let mut bytes = Ok(FIXED + 4);
    let mut add = |more: Result<usize, _>| bytes = bytes.and_then(|bytes| Ok(bytes + more?));
    message.each_header(|name, value| {
        add(short_bytes(name));
        add(match value {
            Header::Text(text) => Ok(1 + 4 + text.len()),
            Header::Int(_) => Ok(1 + 8),
            Header::Bool(_) => Ok(1 + 1),
            Header::Value(value) => field_bytes(value),
        });
    });
    texts.into_iter().for_each(|text| add(short_bytes(text)));
    bytes
}

fn short_bytes(text: &str) -> Result<usize, &str> {
    if short_fits(text) { Ok(1 + text.len()) } else { Err(text) }
}

fn table_bytes(fields: &[(ByteString, HeaderValue)]) -> Result<usize, &str> {
    let mut bytes = 4;
    for (name, value) in fields {
        bytes += short_bytes(name)? + field_bytes(value)?;
    }
    Ok(bytes)
}

fn field_bytes(value: &HeaderValue) -> Result<usize, &str> {
    Ok(1 + match value {
        HeaderValue::Null => 0,
        HeaderValue::Bool(_) => 1,
        HeaderValue::Int(_) | HeaderValue::Float(_) => 8,
        HeaderValue::Text(text) => 4 + text.len(),
        HeaderValue::List(values) => {
            let mut bytes = 4;
            for value in values {
                bytes += field_bytes(value)?;
            }
            bytes
        }
        HeaderValue::Map(fields) => table_bytes(fields)?,
    })
}

#[cfg(test)]
mod tests {
    use amq_protocol::frame::{AMQPFrame, parse_frame};
    use amq_protocol::protocol::{AMQPClass, basic, connection, exchange, queue, tx};
    use amq_protocol::types::AMQPValue;

    use super::*;

    /// What an independent parser reads in these bytes, and the size of each frame.
    fn parsed(mut bytes: &[u8]) -> Vec<(AMQPFrame, usize)> {
        let mut frames = Vec::new();
        while !bytes.is_empty() {
            let (rest, frame) = parse_frame(bytes).unwrap_or_else(|error| panic!("{error:?}"));
            frames.push((frame, bytes.len() - rest.len()));
            bytes = rest;
        }
        frames
    }

    /// Takes from an output what a socket would, in pieces of at most so many bytes.
    fn drained(output: &mut Output, piece: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while output.end() > output.written() {
            let pieces = output.pieces();
            let front: Vec<u8> = pieces.iter().flat_map(|slice| slice.iter().copied()).take(piece).collect();
            output.advance(front.len());
            bytes.extend(front);
        }
        bytes
    }

    fn message(body: Vec<u8>) -> Message {
        let nested = HeaderValue::Map(vec![("b".into(), HeaderValue::List(vec![HeaderValue::Bool(true)]))]);
        Message {
            id: "ä".repeat(100).into(),
            destination: "k".repeat(255).into(),
            kind: ByteString::new(),
            content_type: "text/plain",
            committed_at: 1_700_000_000_999_999,
            aggregatetype: "order".into(),
            aggregateid: "4".repeat(1000).into(),
            transaction: "16/B374D848".into(),
            seq: i64::MAX,
            is_null: true,
            headers: vec![
                ("null".into(), HeaderValue::Null),
                ("int".into(), HeaderValue::Int(i64::MIN)),
                ("float".into(), HeaderValue::Float(-0.5)),
                ("text".into(), HeaderValue::Text("🦀".repeat(100).into())),
                ("map".into(), nested),
            ],
            body: Bytes::from(body),
        }
    }

    #[test]
    fn an_independent_parser_reads_every_message_as_it_was() {
        const FRAME_MAX: usize = 4096 + 1000;
        let inner = FRAME_MAX - FRAME_OVERHEAD;
        for length in [0, 1, 4096, 4097, inner - 1, inner, inner + 1, 2 * inner, 2 * inner + 1, 1 << 20] {
            let message = message((0..length).map(|index| u8::try_from(index % 251).unwrap()).collect());
            let mut output = Output::default();
            publish(&mut output, "ex", &message, FRAME_MAX);
            publish(&mut output, "ex", &message, FRAME_MAX);
            let end = output.end();
            let bytes = drained(&mut output, 1000);
            assert_eq!((bytes.len() as u64, output.written()), (end, end));
            let frames = parsed(&bytes);
            assert!(frames.iter().all(|(_, size)| *size <= FRAME_MAX), "{length}");
            let (first, second) = frames.split_at(frames.len() / 2);
            assert_eq!(first, second, "{length}");
            let AMQPFrame::Method(1, AMQPClass::Basic(basic::AMQPMethod::Publish(method))) = &first[0].0 else {
                panic!("{:?}", first[0])
            };
            assert_eq!((method.exchange.as_str(), method.routing_key.as_str()), ("ex", &*message.destination));
            assert_eq!((method.mandatory, method.immediate), (true, false));
            let AMQPFrame::Header(1, header) = &first[1].0 else { panic!("{:?}", first[1]) };
            assert_eq!((header.class_id, header.body_size), (60, length as u64));
            assert_eq!(first[1].1 - FRAME_OVERHEAD, header_bytes(&message).unwrap());
            let properties = &header.properties;
            assert_eq!(properties.message_id().as_ref().unwrap().as_str(), &*message.id);
            assert_eq!((properties.delivery_mode(), properties.timestamp()), (&Some(2), &Some(1_700_000_000)));
            assert_eq!(properties.content_type().as_ref().unwrap().as_str(), "text/plain");
            assert_eq!(properties.app_id().as_ref().unwrap().as_str(), "pgoutbox");
            assert_eq!(properties.kind().as_ref().unwrap().as_str(), "");
            let table = properties.headers().as_ref().unwrap().inner();
            assert_eq!(table["aggregatetype"], AMQPValue::LongString("order".into()));
            assert_eq!(table["aggregateid"], AMQPValue::LongString("4".repeat(1000).into()));
            assert_eq!(table["x-outbox-lsn"], AMQPValue::LongString("16/B374D848".into()));
            assert_eq!(table["x-outbox-seq"], AMQPValue::LongLongInt(i64::MAX));
            assert_eq!(table["x-outbox-null"], AMQPValue::Boolean(true));
            assert_eq!(table["null"], AMQPValue::Void);
            assert_eq!(table["int"], AMQPValue::LongLongInt(i64::MIN));
            assert_eq!(table["float"], AMQPValue::Double(-0.5));
            assert_eq!(table["text"], AMQPValue::LongString("🦀".repeat(100).into()));
            let AMQPValue::FieldTable(map) = &table["map"] else { panic!("{table:?}") };
            let AMQPValue::FieldArray(list) = &map.inner()["b"] else { panic!("{map:?}") };
            assert_eq!(list.as_slice(), [AMQPValue::Boolean(true)]);
            let body: Vec<u8> = first[2..]
                .iter()
                .flat_map(|(frame, _)| match frame {
                    AMQPFrame::Body(1, piece) => piece.clone(),
                    other => panic!("{other:?}"),
                })
                .collect();
            assert!(body == message.body, "{length}");
        }
    }

    #[test]
    fn an_independent_parser_reads_every_method_as_it_was_meant() {
        let mut out = BytesMut::new();
        start_ok(&mut out, "PLAIN", b"\0u\0p");
        tune_ok(&mut out, 131_072, 10);
        open(&mut out, "shop");
        channel_open(&mut out);
        exchange_declare(&mut out, "ex", true);
        exchange_declare(&mut out, "ex", false);
        queue_declare_passive(&mut out, "orders");
        confirm_select(&mut out);
        heartbeat(&mut out);
        close(&mut out, "stopped");
        close_ok(&mut out);
        let frames: Vec<AMQPFrame> = parsed(&out).into_iter().map(|(frame, _)| frame).collect();
        assert_eq!(frames.len(), 11);
        let AMQPFrame::Method(0, AMQPClass::Connection(connection::AMQPMethod::StartOk(start))) = &frames[0] else {
            panic!("{:?}", frames[0])
        };
        assert_eq!((start.mechanism.as_str(), start.response.as_bytes()), ("PLAIN", &b"\0u\0p"[..]));
        let AMQPValue::FieldTable(capabilities) = &start.client_properties.inner()["capabilities"] else { panic!() };
        assert!(capabilities.inner().values().all(|value| *value == AMQPValue::Boolean(true)));
        for name in ["publisher_confirms", "basic.nack", "connection.blocked"] {
            assert!(capabilities.inner().contains_key(name));
        }
        let AMQPFrame::Method(0, AMQPClass::Connection(connection::AMQPMethod::TuneOk(tune))) = &frames[1] else {
            panic!("{:?}", frames[1])
        };
        assert_eq!((tune.frame_max, tune.heartbeat), (131_072, 10));
        for (frame, passive) in [(&frames[4], false), (&frames[5], true)] {
            let AMQPFrame::Method(1, AMQPClass::Exchange(exchange::AMQPMethod::Declare(declare))) = frame else {
                panic!("{frame:?}")
            };
            assert_eq!((declare.exchange.as_str(), declare.kind.as_str()), ("ex", "topic"));
            assert_eq!((declare.passive, declare.durable, declare.nowait), (passive, true, false));
            assert!(!declare.auto_delete && !declare.internal);
        }
        let AMQPFrame::Method(1, AMQPClass::Queue(queue::AMQPMethod::Declare(declare))) = &frames[6] else {
            panic!("{:?}", frames[6])
        };
        assert_eq!((declare.queue.as_str(), declare.passive, declare.nowait), ("orders", true, false));
        assert_eq!(frames[8], AMQPFrame::Heartbeat);
    }

    #[test]
    fn what_is_said_in_vain_is_understood_by_an_independent_parser() {
        let mut out = BytesMut::new();
        exchange_declare_in_vain(&mut out, "ex");
        channel_close_ok(&mut out);
        tx_select(&mut out);
        publish_in_vain(&mut out, "ex", "key", None);
        publish_in_vain(&mut out, "ex", "key", Some("nobody"));
        tx_rollback(&mut out);
        let frames: Vec<AMQPFrame> = parsed(&out).into_iter().map(|(frame, _)| frame).collect();
        let AMQPFrame::Method(1, AMQPClass::Exchange(exchange::AMQPMethod::Declare(declare))) = &frames[0] else {
            panic!("{:?}", frames[0])
        };
        assert!(!declare.passive && declare.durable && declare.exchange.as_str() == "ex");
        assert_eq!(declare.arguments.inner()["alternate-exchange"], AMQPValue::LongLongInt(0));
        let is_tx = |frame: &AMQPFrame, tx: tx::AMQPMethod| *frame == AMQPFrame::Method(1, AMQPClass::Tx(tx));
        assert!(is_tx(&frames[2], tx::AMQPMethod::Select(tx::Select {})));
        assert!(is_tx(&frames[7], tx::AMQPMethod::Rollback(tx::Rollback {})));
        for (method, header, user) in [(3, 4, None), (5, 6, Some("nobody"))] {
            let AMQPFrame::Method(1, AMQPClass::Basic(basic::AMQPMethod::Publish(publish))) = &frames[method] else {
                panic!("{:?}", frames[method])
            };
            assert_eq!((publish.exchange.as_str(), publish.routing_key.as_str()), ("ex", "key"));
            let AMQPFrame::Header(1, header) = &frames[header] else { panic!("{:?}", frames[header]) };
            assert_eq!(header.body_size, 0);
            assert_eq!(header.properties.user_id().as_ref().map(|user| user.as_str()), user);
        }
    }

    #[test]
    fn a_name_that_no_short_string_holds_is_found_wherever_it_stands() {
        let long = "x".repeat(256);
        let mut deep = message(Vec::new());
        deep.headers.push(("a".into(), HeaderValue::Map(vec![(long.clone().into(), HeaderValue::Null)])));
        let mut id = message(Vec::new());
        id.id = long.clone().into();
        let mut kind = message(Vec::new());
        kind.kind = long.clone().into();
        for bad in [deep, id, kind] {
            assert_eq!(header_bytes(&bad), Err(long.as_str()));
        }
    }

    #[test]
    fn a_large_body_is_not_copied() {
        let message = message(vec![7; 100_000]);
        let mut output = Output::default();
        publish(&mut output, "ex", &message, 131_072);
        let body = message.body.as_ptr();
        assert!(output.pieces().iter().any(|piece| piece.as_ptr() == body));
    }
}
