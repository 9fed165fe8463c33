//! A Postgres on a script: everything goes to a real server except the replication connection, which a script takes over at
//! its login or at its stream.
//!
//! The trap: a fake catalog would have to lie consistently. The real one answers; only what must be broken is made here.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Where the script takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum From {
    /// Instead of an answer to the startup packet.
    Login,
    /// After CopyBothResponse.
    Stream,
}

#[derive(Default)]
struct Seen {
    streams: AtomicUsize,
    told: Mutex<Vec<u64>>,
    /// How often a status asked for a sign of life.
    pings: AtomicUsize,
    /// The position in the sign of life that is given then, if any.
    answer: Mutex<Option<u64>>,
}

/// The first replication connections follow a script, all later ones go to the real server.
pub(crate) struct Postgres {
    port: u16,
    seen: Arc<Seen>,
}

impl Postgres {
    /// `hostile` replication connections follow the script.
    pub(crate) fn start<S>(server: u16, hostile: usize, from: From, script: S) -> Self
    where
        S: Fn(&mut Wire) -> io::Result<()> + Send + Sync + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let postgres = Self { port: listener.local_addr().unwrap().port(), seen: Arc::default() };
        let (seen, script) = (postgres.seen.clone(), Arc::new(script));
        // The thread and its connections end with the test process.
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (client, seen, script) = (client.unwrap(), seen.clone(), script.clone());
                std::thread::spawn(move || {
                    client.set_nodelay(true).unwrap();
                    let _ = connection(&client, server, &seen, hostile, from, &*script);
                    let _ = client.shutdown(Shutdown::Both);
                });
            }
        });
        postgres
    }

    /// The same URL, by way of here.
    pub(crate) fn url(&self, url: &str, server: u16) -> String {
        url.replace(&format!(":{server}/"), &format!(":{}/", self.port))
    }

    /// Replication connections so far.
    pub(crate) fn streams(&self) -> usize {
        self.seen.streams.load(Ordering::SeqCst)
    }

    /// The positions that scripted streams were told as flushed.
    pub(crate) fn told(&self) -> Vec<u64> {
        self.seen.told.lock().unwrap().clone()
    }

    /// How often scripted streams were asked for a sign of life.
    pub(crate) fn pings(&self) -> usize {
        self.seen.pings.load(Ordering::SeqCst)
    }
}

fn connection(
    mut client: &TcpStream,
    port: u16,
    seen: &Arc<Seen>,
    hostile: usize,
    from: From,
    script: &dyn Fn(&mut Wire) -> io::Result<()>,
) -> io::Result<()> {
    let startup = startup(client)?;
    let is_replication = startup.windows(12).any(|window| window == b"replication\0");
    let is_hostile = is_replication && seen.streams.fetch_add(1, Ordering::SeqCst) < hostile;
    let mut wire = Wire { socket: client.try_clone()?, seen: seen.clone() };
    if is_hostile && from == From::Login {
        return script(&mut wire);
    }
    let mut server = TcpStream::connect(("127.0.0.1", port))?;
    server.set_nodelay(true)?;
    server.write_all(&startup)?;
    let (mut answers, mut back) = (server.try_clone()?, client.try_clone()?);
    std::thread::spawn(move || {
        let _ = io::copy(&mut answers, &mut back);
        // A server that goes ends its clients; while a script speaks, the real connection is only idle.
        let _ = back.shutdown(Shutdown::Both);
    });
    let ended = if is_hostile {
        until_stream(&mut wire, &mut server).and_then(|()| script(&mut wire))
    } else {
        io::copy(&mut client, &mut server).map(|_| ())
    };
    // The other direction holds a handle too; a walsender left behind would be missing for another test.
    server.shutdown(Shutdown::Both)?;
    ended
}

/// Everything goes to the real server until the stream is to begin.
fn until_stream(wire: &mut Wire, server: &mut TcpStream) -> io::Result<()> {
    loop {
        let (tag, body) = wire.read()?;
        if tag == b'Q' && body.starts_with(b"START_REPLICATION") {
            wire.send(b'W', &[0, 0, 0])?;
            return wire.hear();
        }
        server.write_all(&message(tag, &body))?;
    }
}

/// The startup packet, whole; wishes for encryption are declined.
fn startup(mut client: &TcpStream) -> io::Result<Vec<u8>> {
    loop {
        let mut packet = vec![0; 4];
        client.read_exact(&mut packet)?;
        let length = u32::from_be_bytes(packet[..4].try_into().unwrap()) as usize;
        packet.resize(length, 0);
        client.read_exact(&mut packet[4..])?;
        // SSLRequest and GSSENCRequest begin so.
        if packet[4..6] != [0x04, 0xd2] {
            return Ok(packet);
        }
        client.write_all(b"N")?;
    }
}

/// A replication connection, from the server's side.
pub(crate) struct Wire {
    socket: TcpStream,
    seen: Arc<Seen>,
}

impl Wire {
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes)
    }

    pub(crate) fn send(&mut self, tag: u8, body: &[u8]) -> io::Result<()> {
        self.raw(&message(tag, body))
    }

    /// pgoutput messages, each as XLogData.
    pub(crate) fn data(&mut self, messages: &[Vec<u8>]) -> io::Result<()> {
        messages.iter().try_for_each(|message| self.raw(&data(message)))
    }

    pub(crate) fn keepalive(&mut self, wal_end: u64) -> io::Result<()> {
        self.raw(&keepalive(wal_end))
    }

    /// In pieces of one byte, each in a packet of its own.
    pub(crate) fn drip(&mut self, bytes: &[u8]) -> io::Result<()> {
        for byte in bytes {
            self.raw(&[*byte])?;
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// The next message of the client.
    pub(crate) fn read(&mut self) -> io::Result<(u8, Vec<u8>)> {
        let mut head = [0; 5];
        self.socket.read_exact(&mut head)?;
        let mut body = vec![0; u32::from_be_bytes(head[1..5].try_into().unwrap()) as usize - 4];
        self.socket.read_exact(&mut body)?;
        Ok((head[0], body))
    }

    /// From now on statuses are noted as they come.
    fn hear(&self) -> io::Result<()> {
        let mut wire = Wire { socket: self.socket.try_clone()?, seen: self.seen.clone() };
        std::thread::spawn(move || {
            while let Ok((tag, body)) = wire.read() {
                if tag == b'd' && body[0] == b'r' {
                    // Written, flushed, applied, the clock; then whether an answer is wanted.
                    wire.seen.told.lock().unwrap().push(u64::from_be_bytes(body[9..17].try_into().unwrap()));
                    if body[33] == 1 {
                        wire.answer();
                    }
                }
            }
            let _ = wire.socket.shutdown(Shutdown::Both);
        });
        Ok(())
    }

    fn answer(&mut self) {
        self.seen.pings.fetch_add(1, Ordering::SeqCst);
        if let Some(wal_end) = *self.seen.answer.lock().unwrap() {
            // A client that is gone asks no more.
            let _ = self.socket.write_all(&keepalive_with(wal_end, 0));
        }
    }

    /// Says nothing unasked, until the client goes.
    pub(crate) fn answer_pings(&mut self, wal_end: u64) -> io::Result<()> {
        *self.seen.answer.lock().unwrap() = Some(wal_end);
        self.fall_silent()
    }

    /// Says nothing more, until the client goes.
    pub(crate) fn fall_silent(&mut self) -> io::Result<()> {
        loop {
            // `peek` fails or finds the end; what arrives is somebody else's to read.
            if self.socket.peek(&mut [0])? == 0 {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Tag, length, body.
pub(crate) fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    [&[tag], &u32::try_from(body.len() + 4).unwrap().to_be_bytes()[..], body].concat()
}

/// XLogData, as CopyData.
pub(crate) fn data(pgoutput: &[u8]) -> Vec<u8> {
    message(b'd', &[b"w", &[0; 24][..], pgoutput].concat())
}

/// A keepalive that wants an answer, as CopyData.
pub(crate) fn keepalive(wal_end: u64) -> Vec<u8> {
    keepalive_with(wal_end, 1)
}

fn keepalive_with(wal_end: u64, reply_requested: u8) -> Vec<u8> {
    message(b'd', &[b"k", &wal_end.to_be_bytes()[..], &[0; 8], &[reply_requested]].concat())
}

pub(crate) fn begin(commit_lsn: u64) -> Vec<u8> {
    [b"B", &commit_lsn.to_be_bytes()[..], &[0; 8], &[0, 0, 0, 9]].concat()
}

pub(crate) fn commit(commit_lsn: u64, end_lsn: u64) -> Vec<u8> {
    [b"C\0", &commit_lsn.to_be_bytes()[..], &end_lsn.to_be_bytes(), &[0; 8]].concat()
}

/// Text columns.
pub(crate) fn relation(oid: u32, name: &[u8], columns: &[&[u8]]) -> Vec<u8> {
    let count = u16::try_from(columns.len()).unwrap().to_be_bytes();
    let mut bytes = [b"R", &oid.to_be_bytes()[..], b"public\0", name, b"\0d", &count].concat();
    for column in columns {
        bytes.extend([b"\0", *column, b"\0", &25u32.to_be_bytes(), &[0xff; 4]].concat());
    }
    bytes
}

/// Values of this kind: `t`, `b`, or `u` and `n`, which have no bytes.
pub(crate) fn insert(oid: u32, values: &[(u8, &[u8])]) -> Vec<u8> {
    let count = u16::try_from(values.len()).unwrap().to_be_bytes();
    let mut bytes = [b"I", &oid.to_be_bytes()[..], b"N", &count].concat();
    for (kind, value) in values {
        bytes.push(*kind);
        if matches!(kind, b't' | b'b') {
            bytes.extend(u32::try_from(value.len()).unwrap().to_be_bytes());
            bytes.extend(*value);
        }
    }
    bytes
}

/// An `ErrorResponse`'s or `NoticeResponse`'s fields.
pub(crate) fn fields(severity: &str, code: &str, text: &str) -> Vec<u8> {
    format!("S{severity}\0V{severity}\0C{code}\0M{text}\0\0").into_bytes()
}
