//! AMQP 0-9-1 as it passes: publishes to the broker; acks, nacks and returns to the relay.
//!
//! The trap: an unroutable message is returned *and then acked*, so an ack settles only what was not returned before it on
//! its channel. Frames are read by hand, without the product's client.

use std::collections::{BTreeMap, HashMap};

use bytes::{Buf, Bytes, BytesMut};

use super::ledger::{Ledger, Position};
use super::{Direction, Kind, Protocol};

const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;

const CHANNEL_OPEN: (u16, u16) = (20, 10);
const CONFIRM_SELECT: (u16, u16) = (85, 10);
const BASIC_PUBLISH: (u16, u16) = (60, 40);
const BASIC_RETURN: (u16, u16) = (60, 50);
const BASIC_ACK: (u16, u16) = (60, 80);
const BASIC_NACK: (u16, u16) = (60, 120);

/// Published, and the broker has not said what became of it.
struct Outstanding {
    id: String,
    position: Position,
    is_returned: bool,
}

#[derive(Default)]
struct Channel {
    confirms: bool,
    /// Delivery tag of the last publish.
    tag: u64,
    /// A `basic.publish` whose content header comes next.
    publishing: bool,
    /// Bytes of the body still to come from the relay.
    body: u64,
    /// A `basic.return` whose content header comes next.
    returning: bool,
    outstanding: BTreeMap<u64, Outstanding>,
}

/// What of a content header matters.
#[derive(Default)]
struct Properties {
    body: u64,
    delivery_mode: Option<u8>,
    id: Option<String>,
    lsn: Option<String>,
    seq: Option<i64>,
}

pub(crate) struct Connection {
    ledger: Ledger,
    /// The protocol header came: `None` before, then whether it was AMQP's.
    is_amqp: Option<bool>,
    channels: HashMap<u16, Channel>,
    /// The last publish on this connection.
    last: Option<Position>,
}

impl Connection {
    pub(crate) fn new(ledger: Ledger) -> Self {
        Self { ledger, is_amqp: None, channels: HashMap::new(), last: None }
    }

    fn relay_sent(&mut self, kind: u8, number: u16, mut payload: &[u8]) -> Option<()> {
        let channel = self.channels.entry(number).or_default();
        match kind {
            METHOD => match method(&mut payload)? {
                CHANNEL_OPEN => *channel = Channel::default(),
                CONFIRM_SELECT => channel.confirms = true,
                BASIC_PUBLISH => {
                    let _reserved = payload.try_get_u16().ok()?;
                    let (_exchange, routing_key) = (short(&mut payload)?, short(&mut payload)?);
                    let is_mandatory = payload.try_get_u8().ok()? & 1 == 1;
                    if !channel.confirms {
                        self.ledger.violation(format!("a publish to {routing_key} before confirm.select"));
                    }
                    if !is_mandatory {
                        self.ledger.violation(format!("a publish to {routing_key} that is not mandatory"));
                    }
                    if channel.body > 0 || channel.publishing {
                        self.ledger.violation(format!("a publish to {routing_key} inside another"));
                    }
                    channel.publishing = true;
                }
                _ => {}
            },
            HEADER if channel.publishing => self.published(number, properties(payload)?),
            BODY => channel.body = channel.body.checked_sub(payload.len() as u64)?,
            _ => {}
        }
        Some(())
    }

    fn published(&mut self, number: u16, properties: Properties) {
        let Properties { body, delivery_mode, id, lsn, seq } = properties;
        let id = id.unwrap_or_default();
        if delivery_mode != Some(2) {
            self.ledger.violation(format!("message {id}: delivery_mode {delivery_mode:?}"));
        }
        if id.is_empty() {
            self.ledger.violation(format!("the message at {lsn:?} {seq:?} has no message_id"));
        }
        let position = lsn.as_deref().and_then(|lsn| lsn.parse().ok()).zip(seq);
        if let Some(position) = position {
            self.ledger.published(self.last, position);
            self.last = Some(position);
        } else {
            self.ledger.violation(format!("message {id}: x-outbox-lsn {lsn:?}, x-outbox-seq {seq:?}"));
        }
        let channel = self.channels.entry(number).or_default();
        channel.publishing = false;
        channel.body = body;
        channel.tag += 1;
        // Without a position it can settle nothing.
        let position = position.unwrap_or_default();
        channel.outstanding.insert(channel.tag, Outstanding { id, position, is_returned: false });
    }

    fn broker_sent(&mut self, kind: u8, number: u16, mut payload: &[u8]) -> Option<()> {
        let channel = self.channels.entry(number).or_default();
        match kind {
            METHOD => {
                let method = method(&mut payload)?;
                channel.returning = method == BASIC_RETURN;
                if method == BASIC_ACK || method == BASIC_NACK {
                    let (tag, flags) = (payload.try_get_u64().ok()?, payload.try_get_u8().ok()?);
                    self.confirmed(number, tag, flags & 1 == 1, method == BASIC_ACK);
                }
            }
            HEADER if channel.returning => {
                channel.returning = false;
                let id = properties(payload)?.id.unwrap_or_default();
                self.ledger.count(|counts| counts.returns += 1);
                // The oldest of that id: returns come in order of publishing.
                let returned =
                    channel.outstanding.values_mut().find(|message| message.id == id && !message.is_returned);
                match returned {
                    Some(message) => message.is_returned = true,
                    None => self.ledger.violation(format!("the broker returned {id}, which is not outstanding")),
                }
            }
            _ => {}
        }
        Some(())
    }

    fn confirmed(&mut self, number: u16, tag: u64, is_multiple: bool, is_ack: bool) {
        let channel = self.channels.entry(number).or_default();
        let confirmed: Vec<Outstanding> = if is_multiple {
            // 0: all.
            let after = if tag == 0 { u64::MAX } else { tag + 1 };
            let rest = channel.outstanding.split_off(&after);
            std::mem::replace(&mut channel.outstanding, rest).into_values().collect()
        } else {
            channel.outstanding.remove(&tag).into_iter().collect()
        };
        if confirmed.is_empty() {
            self.ledger.violation(format!("the broker confirmed delivery tag {tag}, which is not outstanding"));
        }
        for message in confirmed {
            self.ledger.count(|counts| *(if is_ack { &mut counts.confirms } else { &mut counts.nacks }) += 1);
            if is_ack && !message.is_returned {
                self.ledger.settled(message.position);
            }
        }
    }
}

fn method(payload: &mut &[u8]) -> Option<(u16, u16)> {
    Some((payload.try_get_u16().ok()?, payload.try_get_u16().ok()?))
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let taken = bytes.get(..length)?;
    bytes.advance(length);
    Some(taken)
}

fn short(bytes: &mut &[u8]) -> Option<String> {
    let length = usize::from(bytes.try_get_u8().ok()?);
    Some(String::from_utf8_lossy(take(bytes, length)?).into_owned())
}

fn long<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = bytes.try_get_u32().ok()? as usize;
    take(bytes, length)
}

/// Class, weight, body size, flags, and the properties in the order of their flags.
fn properties(mut payload: &[u8]) -> Option<Properties> {
    let _class_and_weight = payload.try_get_u32().ok()?;
    let mut properties = Properties { body: payload.try_get_u64().ok()?, ..Properties::default() };
    let flags = payload.try_get_u16().ok()?;
    let has = |bit: u16| flags & (1 << bit) != 0;
    for _content_type_and_encoding in [15, 14].into_iter().filter(|bit| has(*bit)) {
        short(&mut payload)?;
    }
    if has(13) {
        headers(long(&mut payload)?, &mut properties)?;
    }
    if has(12) {
        properties.delivery_mode = Some(payload.try_get_u8().ok()?);
    }
    if has(11) {
        let _priority = payload.try_get_u8().ok()?;
    }
    for _correlation_id_reply_to_expiration in [10, 9, 8].into_iter().filter(|bit| has(*bit)) {
        short(&mut payload)?;
    }
    if has(7) {
        properties.id = Some(short(&mut payload)?);
    }
    Some(properties)
}

fn headers(mut table: &[u8], properties: &mut Properties) -> Option<()> {
    while !table.is_empty() {
        let name = short(&mut table)?;
        let kind = table.try_get_u8().ok()?;
        let value = value(kind, &mut table)?;
        match (name.as_str(), kind) {
            ("x-outbox-lsn", b'S') => properties.lsn = Some(String::from_utf8_lossy(value).into_owned()),
            ("x-outbox-seq", b'l') => properties.seq = Some(i64::from_be_bytes(value.try_into().ok()?)),
            _ => {}
        }
    }
    Some(())
}

/// A field's bytes, by RabbitMQ's table of kinds.
fn value<'a>(kind: u8, table: &mut &'a [u8]) -> Option<&'a [u8]> {
    match kind {
        b'V' => take(table, 0),
        b't' | b'b' | b'B' => take(table, 1),
        b's' | b'u' => take(table, 2),
        b'I' | b'i' | b'f' => take(table, 4),
        b'D' => take(table, 5),
        b'l' | b'L' | b'd' | b'T' => take(table, 8),
        b'S' | b'x' | b'A' | b'F' => long(table),
        _ => None,
    }
}

impl Protocol for Connection {
    fn split(&mut self, direction: Direction, bytes: &mut BytesMut) -> Option<Bytes> {
        match (self.is_amqp, direction) {
            (None, Direction::Up) if bytes.len() < 8 && b"AMQP".starts_with(&bytes[..bytes.len().min(4)]) => {
                return None;
            }
            (None, Direction::Up) => {
                self.is_amqp = Some(bytes.starts_with(b"AMQP"));
                if self.is_amqp == Some(true) {
                    self.ledger.count(|counts| counts.amqp_connections += 1);
                    return Some(bytes.split_to(8).freeze());
                }
            }
            // A broker that wants another version answers with a header of its own.
            (Some(true), Direction::Down) if bytes.first() == Some(&b'A') => self.is_amqp = Some(false),
            _ => {}
        }
        if self.is_amqp != Some(true) {
            return (!bytes.is_empty()).then(|| bytes.split().freeze());
        }
        let size = bytes.get(3..).unwrap_or_default().try_get_u32().ok()? as usize;
        (bytes.len() >= size + 8).then(|| bytes.split_to(size + 8).freeze())
    }

    fn kind(&self, direction: Direction, frame: &[u8]) -> Kind {
        let is_method = self.is_amqp == Some(true) && direction == Direction::Down && frame.first() == Some(&METHOD);
        match frame.get(7..11).and_then(|mut payload| method(&mut payload)) {
            Some(BASIC_ACK | BASIC_NACK) if is_method => Kind::Confirm,
            _ => Kind::Other,
        }
    }

    fn inspect(&mut self, direction: Direction, frame: &[u8]) {
        if self.is_amqp != Some(true) || frame.starts_with(b"AMQP") {
            return;
        }
        let (kind, number, payload) = (frame[0], u16::from_be_bytes([frame[1], frame[2]]), &frame[7..frame.len() - 1]);
        let understood = match direction {
            Direction::Up => self.relay_sent(kind, number, payload),
            Direction::Down => self.broker_sent(kind, number, payload),
        };
        if understood.is_none() {
            self.ledger
                .violation(format!("{direction:?}: an AMQP frame of kind {kind} on channel {number} out of shape"));
        }
    }
}
