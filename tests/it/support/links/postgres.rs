//! The replication protocol as it passes: transactions and keepalives to the relay, statuses to Postgres.
//!
//! The trap: an oracle that shares the product's decoder shares its mistakes, so the few fields are read here by hand. Only
//! connections that ask for `replication=database` are looked into; all others, and encrypted ones, are only forwarded.

use bytes::{Buf, Bytes, BytesMut};
use pgoutbox::lsn::Lsn;

use super::ledger::{Ledger, Stream};
use super::{Direction, Kind, Protocol};

const SSL_REQUEST: u32 = 80_877_103;
const GSS_REQUEST: u32 = 80_877_104;

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    /// The relay's next packet has no tag.
    Startup,
    /// The server answers a request for encryption with one byte.
    OneByte,
    Frames,
    /// Not for us.
    Raw,
}

/// The transaction that is being sent.
#[derive(Clone, Copy)]
struct Open {
    commit: Lsn,
    rows: i64,
}

pub(crate) struct Connection {
    ledger: Ledger,
    phase: Phase,
    stream: Option<Stream>,
    open: Option<Open>,
}

impl Connection {
    pub(crate) fn new(ledger: Ledger) -> Self {
        Self { ledger, phase: Phase::Startup, stream: None, open: None }
    }

    fn startup(&mut self, packet: &[u8]) {
        let code = packet.get(4..).unwrap_or_default().try_get_u32().unwrap_or(0);
        let text = String::from_utf8_lossy(packet);
        self.phase = match code {
            SSL_REQUEST | GSS_REQUEST => Phase::OneByte,
            _ if text.contains("replication\0database\0") => Phase::Frames,
            _ => Phase::Raw,
        };
        if self.phase == Phase::Frames {
            self.ledger.count(|counts| counts.postgres_connections += 1);
        }
    }

    fn relay_sent(&mut self, tag: u8, mut body: &[u8]) -> Option<()> {
        match tag {
            b'Q' => {
                let query = String::from_utf8_lossy(body);
                if query.starts_with("START_REPLICATION") {
                    let from = query.split_once(" LOGICAL ").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
                    self.stream = Some(self.ledger.started(from?));
                }
            }
            b'd' if body.first() == Some(&b'r') => {
                body.advance(1);
                let (write, flush) = (lsn(&mut body)?, lsn(&mut body)?);
                match &mut self.stream {
                    Some(stream) => self.ledger.status(stream, write, flush),
                    None => self.ledger.violation("a status before START_REPLICATION".to_owned()),
                }
            }
            _ => {}
        }
        Some(())
    }

    fn server_sent(&mut self, tag: u8, mut body: &[u8]) -> Option<()> {
        if tag != b'd' {
            return Some(());
        }
        match body.try_get_u8().ok()? {
            b'k' => {
                let wal_end = lsn(&mut body)?;
                if let Some(stream) = &self.stream {
                    self.ledger.keepalive(stream, wal_end, self.open.is_some());
                }
            }
            b'w' => {
                // Start, end of WAL, clock.
                let mut message = body.get(24..)?;
                match message.try_get_u8().ok()? {
                    b'B' => self.open = Some(Open { commit: lsn(&mut message)?, rows: 0 }),
                    b'I' => self.open.as_mut()?.rows += 1,
                    b'C' => {
                        let _flags = message.try_get_u8().ok()?;
                        let (commit, end) = (lsn(&mut message)?, lsn(&mut message)?);
                        let open = self.open.take().filter(|open| open.commit == commit)?;
                        self.ledger.committed(commit, end, open.rows);
                    }
                    _ => {}
                }
            }
            _ => {}
        }
        Some(())
    }
}

fn lsn(bytes: &mut &[u8]) -> Option<Lsn> {
    bytes.try_get_u64().ok().map(Lsn::new)
}

impl Protocol for Connection {
    fn split(&mut self, direction: Direction, bytes: &mut BytesMut) -> Option<Bytes> {
        let length_at = match (self.phase, direction) {
            (Phase::Raw, _) => return (!bytes.is_empty()).then(|| bytes.split().freeze()),
            (Phase::OneByte, Direction::Down) => {
                let answer = *bytes.first()?;
                self.phase = if answer == b'S' || answer == b'G' { Phase::Raw } else { Phase::Startup };
                return Some(bytes.split_to(1).freeze());
            }
            (Phase::Startup | Phase::OneByte, _) => 0,
            (Phase::Frames, _) => 1,
        };
        let length = bytes.get(length_at..).unwrap_or_default().try_get_u32().ok()? as usize;
        if length < 4 {
            // Not this protocol.
            self.phase = Phase::Raw;
            return Some(bytes.split().freeze());
        }
        let whole = length_at + length;
        (bytes.len() >= whole).then(|| bytes.split_to(whole).freeze())
    }

    fn kind(&self, direction: Direction, frame: &[u8]) -> Kind {
        let is_status = self.phase == Phase::Frames && frame.first() == Some(&b'd') && frame.get(5) == Some(&b'r');
        if direction == Direction::Up && is_status { Kind::Status } else { Kind::Other }
    }

    fn inspect(&mut self, direction: Direction, frame: &[u8]) {
        let understood = match (self.phase, direction) {
            (Phase::Startup, Direction::Up) => {
                self.startup(frame);
                return;
            }
            (Phase::Frames, _) => {
                let (tag, body) = (frame[0], &frame[5..]);
                if direction == Direction::Up { self.relay_sent(tag, body) } else { self.server_sent(tag, body) }
            }
            _ => Some(()),
        };
        if understood.is_none() {
            self.ledger.violation(format!("{direction:?}: a Postgres message {:?} out of shape", char::from(frame[0])));
        }
    }
}
