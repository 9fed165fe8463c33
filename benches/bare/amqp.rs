//! AMQP 0-9-1 by hand: login as guest, a channel, frames out, confirms counted.
//!
//! The trap: confirms come out of the order of tags. A highest tag is not how far the broker has come; the first one that
//! is missing is.

use std::collections::VecDeque;

use super::postgres::{Row, u16_at, u32_at, u64_at};
use super::socket::Socket;

/// Class and method.
pub(crate) type Method = (u16, u16);

const CHANNEL: u16 = 1;
const FRAME_END: u8 = 0xCE;
/// Kind, channel, size; and the end.
const FRAME_OVERHEAD: usize = 8;
const FRAME_BYTES_MAX: usize = 131_072;

/// A login, a vhost and an open channel.
pub(crate) struct Connection {
    pub(crate) socket: Socket,
}

impl Connection {
    pub(crate) fn open(port: u16) -> Self {
        let mut connection = Self { socket: Socket::open(port) };
        connection.socket.output.extend(b"AMQP\x00\x00\x09\x01");
        connection.until((10, 10));
        // No client properties; RabbitMQ then sends no `basic.nack` and no `connection.blocked`.
        let start_ok = [&[0; 4][..], b"\x05PLAIN", b"\0\0\0\x0c\0guest\0guest", b"\x05en_US"].concat();
        connection.put(0, (10, 11), &start_ok);
        connection.until((10, 30));
        let frame_max = u32::try_from(FRAME_BYTES_MAX).unwrap().to_be_bytes();
        // One channel, no heartbeats.
        connection.put(0, (10, 31), &[&[0, 1][..], &frame_max, &[0, 0]].concat());
        connection.call(0, (10, 40), b"\x01/\0\0");
        connection.call(CHANNEL, (20, 10), &[0]);
        connection
    }

    /// Appends a method.
    pub(crate) fn put(&mut self, channel: u16, method: Method, arguments: &[u8]) {
        let output = &mut self.socket.output;
        output.push(1);
        output.extend(channel.to_be_bytes());
        output.extend(u32::try_from(arguments.len() + 4).unwrap().to_be_bytes());
        output.extend(method.0.to_be_bytes());
        output.extend(method.1.to_be_bytes());
        output.extend(arguments);
        output.push(FRAME_END);
    }

    /// Says a method and waits for its answer, which has the next number.
    pub(crate) fn call(&mut self, channel: u16, method: Method, arguments: &[u8]) {
        self.put(channel, method, arguments);
        self.until((method.0, method.1 + 1));
    }

    /// The same on the channel.
    pub(crate) fn ask(&mut self, method: Method, arguments: &[u8]) {
        self.call(CHANNEL, method, arguments);
    }

    fn until(&mut self, wanted: Method) {
        self.socket.write();
        loop {
            while let Some(frame) = self.frame() {
                let got = (u16_at(frame, 7), u16_at(frame, 9));
                if got == wanted {
                    return;
                }
                assert!(got.1 != 50 && got.1 != 40, "{wanted:?}: {}", String::from_utf8_lossy(frame));
            }
            self.socket.read();
        }
    }

    /// The next whole frame.
    #[inline]
    pub(crate) fn frame(&mut self) -> Option<&[u8]> {
        let input = self.socket.input();
        if input.len() < FRAME_OVERHEAD {
            return None;
        }
        let length = u32_at(input, 3) as usize + FRAME_OVERHEAD;
        if input.len() < length { None } else { Some(self.socket.take(length)) }
    }
}

/// A short string.
pub(crate) fn short(text: &str) -> Vec<u8> {
    [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat()
}

/// What a transaction's messages have in common.
pub(crate) struct Transaction {
    /// Of its commit.
    pub(crate) lsn: String,
    /// Of its commit, seconds since 1970.
    pub(crate) timestamp: u64,
}

/// A channel with confirms on.
pub(crate) struct Publisher {
    pub(crate) connection: Connection,
    exchange: Vec<u8>,
    published: u64,
    /// Tags up to here are confirmed.
    settled: u64,
    /// Whether the tags behind are.
    confirmed: VecDeque<bool>,
    in_flight: usize,
}

impl Publisher {
    pub(crate) fn open(port: u16, exchange: &str) -> Self {
        let mut connection = Connection::open(port);
        connection.ask((85, 10), &[0]);
        connection.socket.set_nonblocking();
        let exchange = short(exchange);
        Self { connection, exchange, published: 0, settled: 0, confirmed: VecDeque::new(), in_flight: 0 }
    }

    /// The last message's tag.
    pub(crate) fn published(&self) -> u64 {
        self.published
    }

    /// The broker holds all tags up to this one.
    pub(crate) fn settled(&self) -> u64 {
        self.settled
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Appends one message, mandatory and persistent.
    #[inline]
    pub(crate) fn publish(&mut self, row: &Row, transaction: &Transaction, seq: u64) {
        let out = &mut self.connection.socket.output;
        let frame = begin(out, 1);
        out.extend_from_slice(&[0, 60, 0, 40, 0, 0]);
        out.extend_from_slice(&self.exchange);
        out.push((row.aggregatetype.len() + 1 + row.kind.len()) as u8);
        out.extend_from_slice(row.aggregatetype);
        out.push(b'.');
        out.extend_from_slice(row.kind);
        out.push(1);
        end(out, frame);
        let frame = begin(out, 2);
        out.extend_from_slice(&[0, 60, 0, 0]);
        out.extend_from_slice(&(row.payload.len() as u64).to_be_bytes());
        // content-type, headers, delivery-mode, message-id, timestamp, type, app-id.
        out.extend_from_slice(&[0xb0, 0xe8]);
        out.extend_from_slice(b"\x10application/json");
        let table = out.len();
        out.extend_from_slice(b"\0\0\0\0\x0daggregatetypeS");
        long(out, row.aggregatetype);
        out.extend_from_slice(b"\x0baggregateidS");
        long(out, row.aggregateid);
        out.extend_from_slice(b"\x0cx-outbox-lsnS");
        long(out, transaction.lsn.as_bytes());
        out.extend_from_slice(b"\x0cx-outbox-seql");
        out.extend_from_slice(&seq.to_be_bytes());
        let size = ((out.len() - table - 4) as u32).to_be_bytes();
        out[table..table + 4].copy_from_slice(&size);
        out.push(2);
        out.push(row.id.len() as u8);
        out.extend_from_slice(row.id);
        out.extend_from_slice(&transaction.timestamp.to_be_bytes());
        out.push(row.kind.len() as u8);
        out.extend_from_slice(row.kind);
        out.extend_from_slice(b"\x08pgoutbox");
        end(out, frame);
        for piece in row.payload.chunks(FRAME_BYTES_MAX - FRAME_OVERHEAD) {
            let frame = begin(out, 3);
            out.extend_from_slice(piece);
            end(out, frame);
        }
        self.published += 1;
        self.in_flight += 1;
        self.confirmed.push_back(false);
    }

    /// What the broker has said. Nothing but a confirm is expected: a return, a refusal or a goodbye ends the program.
    pub(crate) fn hear(&mut self) {
        self.connection.socket.read();
        while let Some(frame) = self.connection.frame() {
            let method = (u16_at(frame, 7), u16_at(frame, 9));
            assert!(frame[0] == 1 && method == (60, 80), "{method:?}: {}", String::from_utf8_lossy(frame));
            let (tag, is_multiple) = (u64_at(frame, 11), frame[19] & 1 == 1);
            self.confirm(tag, is_multiple);
        }
    }

    fn confirm(&mut self, tag: u64, is_multiple: bool) {
        let last = (tag - self.settled - 1) as usize;
        let first = if is_multiple { 0 } else { last };
        for confirmed in self.confirmed.range_mut(first..=last) {
            self.in_flight -= usize::from(!*confirmed);
            *confirmed = true;
        }
        while self.confirmed.front() == Some(&true) {
            self.confirmed.pop_front();
            self.settled += 1;
        }
    }
}

fn begin(out: &mut Vec<u8>, kind: u8) -> usize {
    out.extend_from_slice(&[kind, 0, 1, 0, 0, 0, 0]);
    out.len()
}

fn end(out: &mut Vec<u8>, start: usize) {
    let size = ((out.len() - start) as u32).to_be_bytes();
    out[start - 4..start].copy_from_slice(&size);
    out.push(FRAME_END);
}

fn long(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
    out.extend_from_slice(bytes);
}
