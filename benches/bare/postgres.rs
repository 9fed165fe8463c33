//! A logical replication stream by hand: startup without a password, START_REPLICATION, CopyData, standby status.
//!
//! The trap: everything is found by its place, so the table is the outbox as `sql/table.sql` makes it.

use std::time::SystemTime;

use super::socket::Socket;

/// Microseconds from 1970 to 2000, Postgres' epoch.
pub(crate) const EPOCH_MICROSECONDS: u64 = 946_684_800_000_000;

pub(crate) struct Stream {
    pub(crate) socket: Socket,
}

/// What the stream says.
pub(crate) enum Frame<'a> {
    /// A pgoutput message.
    Change(&'a [u8]),
    Keepalive {
        wal_end: u64,
        reply_requested: bool,
    },
}

/// The columns of a row that a message is made of.
pub(crate) struct Row<'a> {
    pub(crate) id: &'a [u8],
    pub(crate) aggregatetype: &'a [u8],
    pub(crate) aggregateid: &'a [u8],
    pub(crate) kind: &'a [u8],
    pub(crate) payload: &'a [u8],
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().unwrap())
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl Stream {
    /// Streams from the slot's own position.
    pub(crate) fn open(port: u16, database: &str, slot: &str, publication: &str) -> Self {
        let mut stream = Self { socket: Socket::open(port) };
        let startup = format!("user\0postgres\0database\0{database}\0replication\0database\0\0");
        let output = &mut stream.socket.output;
        output.extend(u32::try_from(startup.len() + 8).unwrap().to_be_bytes());
        output.extend(196_608_u32.to_be_bytes());
        output.extend(startup.as_bytes());
        stream.until(b'Z');
        let command = format!(
            "START_REPLICATION SLOT \"{slot}\" LOGICAL 0/0 (\"proto_version\" '1', \"publication_names\" '{publication}')"
        );
        stream.put(b'Q', &[command.as_bytes(), b"\0"].concat());
        stream.until(b'W');
        stream.socket.set_nonblocking();
        stream
    }

    fn put(&mut self, tag: u8, body: &[u8]) {
        let output = &mut self.socket.output;
        output.push(tag);
        output.extend(u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        output.extend(body);
    }

    /// Writes what is to be written and waits for a message of that kind.
    fn until(&mut self, wanted: u8) {
        self.socket.write();
        loop {
            while let Some(message) = self.message() {
                assert!(message[0] != b'E', "{}", String::from_utf8_lossy(message));
                if message[0] == wanted {
                    return;
                }
            }
            self.socket.read();
        }
    }

    /// The next whole message, tag and length included.
    fn message(&mut self) -> Option<&[u8]> {
        let input = self.socket.input();
        if input.len() < 5 {
            return None;
        }
        let length = 1 + u32_at(input, 1) as usize;
        if input.len() < length { None } else { Some(self.socket.take(length)) }
    }

    /// What stands in the buffer next.
    #[inline]
    pub(crate) fn next(&mut self) -> Option<Frame<'_>> {
        let message = self.message()?;
        assert!(message[0] == b'd', "{}", String::from_utf8_lossy(message));
        Some(match message[5] {
            b'w' => Frame::Change(&message[30..]),
            b'k' => Frame::Keepalive { wal_end: u64_at(message, 6), reply_requested: message[22] != 0 },
            other => panic!("replication message {other}"),
        })
    }

    /// A standby status: all before `lsn` is settled.
    pub(crate) fn tell(&mut self, lsn: u64) {
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_micros();
        let clock = u64::try_from(since_1970).unwrap() - EPOCH_MICROSECONDS;
        let lsn = lsn.to_be_bytes();
        self.put(b'd', &[&b"r"[..], &lsn, &lsn, &lsn, &clock.to_be_bytes(), &[0]].concat());
        self.socket.write();
    }
}

/// The row of an insert.
#[inline]
pub(crate) fn row(change: &[u8]) -> Row<'_> {
    let mut at = 8;
    let mut column = || {
        assert!(change[at] == b't', "a column of the outbox is NULL");
        let start = at + 5;
        at = start + u32_at(change, at + 1) as usize;
        &change[start..at]
    };
    let (id, aggregatetype, aggregateid) = (column(), column(), column());
    Row { id, aggregatetype, aggregateid, kind: column(), payload: column() }
}
