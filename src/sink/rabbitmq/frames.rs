//! Frames from the broker: bytes -> what it says. Pure.
//!
//! The traps. A length is an announcement by somebody else: it is held against the negotiated `frame_max` before anything
//! waits for that many bytes. And a field table may nest as deep as a frame allows, which ends a recursive parser's stack:
//! only texts of the outermost table are read here, everything else is passed over by its length.

use super::super::Refusal;

/// Type, channel and size before a frame's payload; the end octet behind it.
pub(super) const FRAME_OVERHEAD: usize = 8;
const FRAME_END: u8 = 0xCE;

/// Why a conversation with the broker ended.
#[derive(Debug)]
pub(super) enum Fault {
    /// The socket.
    Lost(String),
    /// The broker said so.
    Closed(Close),
    /// The broker said what it may not say.
    Protocol(String),
}

/// `connection.close` or `channel.close`: why, and which method of ours it was about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Close {
    pub(super) code: u16,
    pub(super) text: String,
    pub(super) method: (u16, u16),
}

/// One frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Frame<'a> {
    kind: u8,
    channel: u16,
    payload: &'a [u8],
}

/// What one frame says: the methods that a publisher can be sent, and the parts of a returned message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Word {
    Start { properties: Vec<(String, String)>, mechanisms: String },
    Tune { frame_max: u32, heartbeat: u16 },
    OpenOk,
    Close(Close),
    CloseOk,
    Blocked(String),
    Unblocked,
    ChannelOpenOk,
    ChannelClose(Close),
    ExchangeDeclareOk,
    QueueDeclareOk,
    ConfirmSelectOk,
    TxSelectOk,
    TxRollbackOk,
    Return(Refusal),
    Ack { tag: u64, multiple: bool },
    Nack { tag: u64, multiple: bool },
    Header { message_id: String, body_bytes: u64 },
    Body { bytes: u64 },
    Heartbeat,
}

/// The first whole frame of these bytes, and how many it takes; `None`: more bytes are needed.
pub(super) fn first(input: &[u8], frame_max: usize) -> Result<Option<(Frame<'_>, usize)>, Fault> {
    if input.first().is_some_and(|kind| !matches!(kind, 1 | 2 | 3 | 8)) {
        // A broker of another version answers with its own protocol header.
        return Err(Fault::Protocol("the peer does not speak AMQP 0-9-1".to_owned()));
    }
    let mut cursor = Cursor(input);
    let (Ok(kind), Ok(channel), Ok(size)) = (cursor.u8(), cursor.u16(), cursor.u32()) else { return Ok(None) };
    let size = size as usize;
    if size.saturating_add(FRAME_OVERHEAD) > frame_max {
        let fault = format!("a frame of {size} bytes, where frame_max is {frame_max}");
        return Err(Fault::Protocol(fault));
    }
    let (Ok(payload), Ok(end)) = (cursor.take(size), cursor.u8()) else { return Ok(None) };
    if end != FRAME_END {
        return Err(Fault::Protocol("a frame without its end octet".to_owned()));
    }
    Ok(Some((Frame { kind, channel, payload }, size + FRAME_OVERHEAD)))
}

impl Frame<'_> {
    /// What it says. Methods of a connection come on channel 0, all others on `channel`.
    pub(super) fn word(&self, channel: u16) -> Result<Word, Fault> {
        let mut payload = Cursor(self.payload);
        let (word, expected) = match self.kind {
            1 => {
                let class = payload.u16()?;
                (payload.method(class)?, if class == 10 { 0 } else { channel })
            }
            2 => (payload.header()?, channel),
            3 => (Word::Body { bytes: self.payload.len() as u64 }, channel),
            _ => (Word::Heartbeat, 0),
        };
        if self.channel == expected {
            Ok(word)
        } else {
            Err(Fault::Protocol(format!("a frame on channel {}", self.channel)))
        }
    }
}

/// Reads forward and never beyond the end.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Fault> {
        let cut = || Fault::Protocol("a frame that ends too early".to_owned());
        let (taken, rest) = self.0.split_at_checked(count).ok_or_else(cut)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let taken = self.take(N)?;
        Ok(taken.try_into().unwrap_or([0; N]))
    }

    fn u8(&mut self) -> Result<u8, Fault> {
        self.array().map(u8::from_be_bytes)
    }

    fn u16(&mut self) -> Result<u16, Fault> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, Fault> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, Fault> {
        self.array().map(u64::from_be_bytes)
    }

    fn short_text(&mut self) -> Result<String, Fault> {
        let length = self.u8()?;
        self.take(length.into()).map(|text| String::from_utf8_lossy(text).into_owned())
    }

    fn long(&mut self) -> Result<&'a [u8], Fault> {
        let length = self.u32()?;
        self.take(length as usize)
    }

    fn long_text(&mut self) -> Result<String, Fault> {
        self.long().map(|text| String::from_utf8_lossy(text).into_owned())
    }

    /// AMQP 0-9-1, and RabbitMQ's own `connection.blocked` and `basic.nack`.
    fn method(&mut self, class: u16) -> Result<Word, Fault> {
        let method = self.u16()?;
        Ok(match (class, method) {
            (10, 10) => {
                self.take(2)?; // the version, said in the protocol header
                let properties = self.texts()?;
                Word::Start { properties, mechanisms: self.long_text()? }
            }
            (10, 30) => {
                self.take(2)?; // channel_max: one is enough
                Word::Tune { frame_max: self.u32()?, heartbeat: self.u16()? }
            }
            (10, 41) => Word::OpenOk,
            (10, 50) => Word::Close(self.close()?),
            (10, 51) => Word::CloseOk,
            (10, 60) => Word::Blocked(self.short_text()?),
            (10, 61) => Word::Unblocked,
            (20, 11) => Word::ChannelOpenOk,
            (20, 40) => Word::ChannelClose(self.close()?),
            (40, 11) => Word::ExchangeDeclareOk,
            (50, 11) => Word::QueueDeclareOk,
            (85, 11) => Word::ConfirmSelectOk,
            (90, 11) => Word::TxSelectOk,
            (90, 31) => Word::TxRollbackOk,
            (60, 50) => {
                self.u16()?;
                self.short_text()?;
                let exchange = self.short_text()?;
                Word::Return(Refusal::Unroutable { exchange, routing_key: self.short_text()? })
            }
            (60, 80) => Word::Ack { tag: self.u64()?, multiple: self.u8()? & 1 == 1 },
            (60, 120) => Word::Nack { tag: self.u64()?, multiple: self.u8()? & 1 == 1 },
            _ => return Err(Fault::Protocol(format!("an unexpected method {class}.{method}"))),
        })
    }

    fn close(&mut self) -> Result<Close, Fault> {
        let (code, text) = (self.u16()?, self.short_text()?);
        Ok(Close { code, text, method: (self.u16()?, self.u16()?) })
    }

    /// The properties before `message_id`, by their flags from the highest bit on, and itself.
    fn header(&mut self) -> Result<Word, Fault> {
        self.take(4)?; // class and weight
        let (body_bytes, flags) = (self.u64()?, self.u16()?);
        for bit in (8..16).rev().filter(|bit| flags & (1 << bit) != 0) {
            match bit {
                13 => self.long().map(|_| ())?, // headers
                11 | 12 => self.take(1).map(|_| ())?,
                _ => self.short_text().map(|_| ())?,
            }
        }
        let message_id = if flags & (1 << 7) != 0 { self.short_text()? } else { String::new() };
        Ok(Word::Header { message_id, body_bytes })
    }

    /// The texts of a table.
    fn texts(&mut self) -> Result<Vec<(String, String)>, Fault> {
        let mut table = Cursor(self.long()?);
        let mut texts = Vec::new();
        while !table.0.is_empty() {
            let name = table.short_text()?;
            match table.u8()? {
                b'S' => texts.push((name, table.long_text()?)),
                b'x' | b'A' | b'F' => table.long().map(|_| ())?,
                b't' | b'b' | b'B' => table.take(1).map(|_| ())?,
                b's' | b'u' => table.take(2).map(|_| ())?,
                b'I' | b'i' | b'f' => table.take(4).map(|_| ())?,
                b'D' => table.take(5).map(|_| ())?,
                b'L' | b'l' | b'd' | b'T' => table.take(8).map(|_| ())?,
                b'V' => {}
                other => return Err(Fault::Protocol(format!("a field of type {other:#04x}"))),
            }
        }
        Ok(texts)
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::frame::{AMQPContentHeader, AMQPFrame, WriteContext, gen_frame};
    use amq_protocol::protocol::{AMQPClass, basic, connection, tx};
    use amq_protocol::types::{AMQPValue, FieldArray, FieldTable};

    use super::*;

    const FRAME_MAX: usize = 131_072;

    fn written(frame: &AMQPFrame) -> Vec<u8> {
        gen_frame(frame)(WriteContext::from(Vec::new())).unwrap().into_inner().0
    }

    fn read(bytes: &[u8]) -> Result<Option<Word>, Fault> {
        let Some((frame, length)) = first(bytes, FRAME_MAX)? else { return Ok(None) };
        assert_eq!(length, bytes.len());
        frame.word(1).map(Some)
    }

    fn basic(method: basic::AMQPMethod) -> AMQPFrame {
        AMQPFrame::Method(1, AMQPClass::Basic(method))
    }

    fn connection(method: connection::AMQPMethod) -> AMQPFrame {
        AMQPFrame::Method(0, AMQPClass::Connection(method))
    }

    /// Every field type, and what follows it.
    fn table() -> FieldTable {
        let mut table = FieldTable::default();
        let values = [
            AMQPValue::Boolean(true),
            AMQPValue::ShortShortInt(-1),
            AMQPValue::ShortShortUInt(1),
            AMQPValue::ShortInt(-1),
            AMQPValue::ShortUInt(1),
            AMQPValue::LongInt(-1),
            AMQPValue::LongUInt(1),
            AMQPValue::LongLongInt(-1),
            AMQPValue::Float(1.0),
            AMQPValue::Double(1.0),
            AMQPValue::Timestamp(1),
            AMQPValue::Void,
            AMQPValue::ByteArray(vec![1, 2].into()),
            AMQPValue::FieldArray(FieldArray::from(vec![AMQPValue::LongString("in".into())])),
            AMQPValue::FieldTable(FieldTable::default()),
        ];
        for (index, value) in values.into_iter().enumerate() {
            table.insert(format!("{index:02}").into(), value);
        }
        table.insert("product".into(), AMQPValue::LongString("RabbitMQ".into()));
        table.insert("version".into(), AMQPValue::LongString("3.10.8".into()));
        table
    }

    fn samples() -> Vec<(AMQPFrame, Word)> {
        let text = |text: &str| text.to_owned();
        let close =
            connection::Close { reply_code: 320, reply_text: "CONNECTION_FORCED".into(), class_id: 60, method_id: 40 };
        let start = connection::Start {
            version_major: 0,
            version_minor: 9,
            server_properties: table(),
            mechanisms: "PLAIN AMQPLAIN".into(),
            locales: "en_US".into(),
        };
        let properties = basic::AMQPProperties::default()
            .with_content_type("a".into())
            .with_content_encoding("b".into())
            .with_headers(table())
            .with_delivery_mode(2)
            .with_priority(1)
            .with_correlation_id("c".into())
            .with_reply_to("d".into())
            .with_expiration("e".into())
            .with_message_id("the id".into())
            .with_type("f".into());
        let returned = basic::Return {
            reply_code: 312,
            reply_text: "NO_ROUTE".into(),
            exchange: "ex".into(),
            routing_key: "key".into(),
        };
        let refusal = Refusal::Unroutable { exchange: text("ex"), routing_key: text("key") };
        vec![
            (
                connection(connection::AMQPMethod::Start(start)),
                Word::Start {
                    properties: vec![(text("product"), text("RabbitMQ")), (text("version"), text("3.10.8"))],
                    mechanisms: text("PLAIN AMQPLAIN"),
                },
            ),
            (
                connection(connection::AMQPMethod::Tune(connection::Tune {
                    channel_max: 2047,
                    frame_max: 131_072,
                    heartbeat: 60,
                })),
                Word::Tune { frame_max: 131_072, heartbeat: 60 },
            ),
            (
                connection(connection::AMQPMethod::Close(close)),
                Word::Close(Close { code: 320, text: text("CONNECTION_FORCED"), method: (60, 40) }),
            ),
            (
                connection(connection::AMQPMethod::Blocked(connection::Blocked { reason: "low on memory".into() })),
                Word::Blocked(text("low on memory")),
            ),
            (connection(connection::AMQPMethod::Unblocked(connection::Unblocked {})), Word::Unblocked),
            (
                basic(basic::AMQPMethod::Ack(basic::Ack { delivery_tag: 1 << 40, multiple: true })),
                Word::Ack { tag: 1 << 40, multiple: true },
            ),
            (
                basic(basic::AMQPMethod::Nack(basic::Nack { delivery_tag: 7, multiple: false, requeue: true })),
                Word::Nack { tag: 7, multiple: false },
            ),
            (basic(basic::AMQPMethod::Return(returned)), Word::Return(refusal)),
            (
                AMQPFrame::Header(1, AMQPContentHeader { class_id: 60, body_size: 9, properties }),
                Word::Header { message_id: text("the id"), body_bytes: 9 },
            ),
            (
                AMQPFrame::Header(
                    1,
                    AMQPContentHeader { class_id: 60, body_size: 0, properties: basic::AMQPProperties::default() },
                ),
                Word::Header { message_id: String::new(), body_bytes: 0 },
            ),
            (AMQPFrame::Body(1, vec![1, 2, 3]), Word::Body { bytes: 3 }),
            (AMQPFrame::Method(1, AMQPClass::Tx(tx::AMQPMethod::SelectOk(tx::SelectOk {}))), Word::TxSelectOk),
            (AMQPFrame::Method(1, AMQPClass::Tx(tx::AMQPMethod::RollbackOk(tx::RollbackOk {}))), Word::TxRollbackOk),
            (AMQPFrame::Heartbeat, Word::Heartbeat),
        ]
    }

    #[test]
    fn what_an_independent_writer_wrote_is_read_as_it_was_meant() {
        for (frame, word) in samples() {
            assert_eq!(read(&written(&frame)).unwrap(), Some(word), "{frame:?}");
        }
    }

    #[test]
    fn a_frame_that_is_not_whole_is_waited_for_and_one_that_is_cut_inside_is_a_fault() {
        for (frame, word) in samples() {
            let bytes = written(&frame);
            for length in 0..bytes.len() {
                assert!(matches!(first(&bytes[..length], FRAME_MAX), Ok(None)), "{frame:?} cut to {length}");
            }
            // The same payload, cut: the announced size is right, the content is not.
            let payload = &bytes[7..bytes.len() - 1];
            for length in (0..payload.len()).filter(|_| !matches!(word, Word::Body { .. })) {
                let mut cut = bytes[..3].to_vec();
                cut.extend(u32::try_from(length).unwrap().to_be_bytes());
                cut.extend(&payload[..length]);
                cut.push(FRAME_END);
                // Fields behind those that are read may be missing; nothing may panic, and nothing be read that is not there.
                if let Ok(read) = read(&cut) {
                    assert_eq!(read, Some(samples().into_iter().find(|(other, _)| *other == frame).unwrap().1));
                }
            }
        }
    }

    #[test]
    fn a_frame_beyond_frame_max_is_a_fault_before_its_bytes_are_waited_for() {
        let announced = |size: u32| [&[3, 0, 1][..], &size.to_be_bytes()].concat();
        assert!(matches!(first(&announced(131_064), FRAME_MAX), Ok(None)));
        for size in [131_065, u32::MAX] {
            assert!(matches!(first(&announced(size), FRAME_MAX), Err(Fault::Protocol(_))), "{size}");
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let samples: Vec<Vec<u8>> = samples().iter().map(|(frame, _)| written(frame)).collect();
        for _ in 0..100_000 {
            let mut bytes = random.choice(&samples).unwrap().clone();
            for _ in 0..random.usize(1..6) {
                let index = random.usize(..bytes.len());
                bytes[index] = random.u8(..);
            }
            if let Ok(Some((frame, length))) = first(&bytes, FRAME_MAX) {
                assert!(length <= bytes.len());
                let _ = frame.word(1);
            }
        }
    }

    #[test]
    fn another_channel_and_another_protocol_are_faults() {
        let mut bytes = written(&samples().remove(5).0);
        bytes[2] = 2;
        assert!(matches!(read(&bytes), Err(Fault::Protocol(_))));
        for other in [&b"AMQP\x00\x01\x00\x00"[..], b"HTTP/1.1 400"] {
            assert!(matches!(first(other, FRAME_MAX), Err(Fault::Protocol(_))));
        }
    }
}
