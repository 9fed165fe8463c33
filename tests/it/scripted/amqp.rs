//! A broker on a script: real TCP, just enough AMQP 0-9-1 to be believed, and then whatever the script says.
//!
//! The trap: a fake that shares a library with what it tests agrees with its mistakes. Every byte is made here, so the test
//! knows only the wire, not the client behind it.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// Class and method.
pub(crate) type Method = (u16, u16);

const START_OK: Method = (10, 11);
const TUNE_OK: Method = (10, 31);
const OPEN: Method = (10, 40);
const CLOSE: Method = (10, 50);
const CLOSE_OK: Method = (10, 51);
const CHANNEL_OPEN: Method = (20, 10);
const CHANNEL_CLOSE: Method = (20, 40);
const EXCHANGE_DECLARE: Method = (40, 10);
const QUEUE_DECLARE: Method = (50, 10);
const CONFIRM_SELECT: Method = (85, 10);
const PUBLISH: Method = (60, 40);

/// What arrived whole: method, content header and body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Published {
    /// Which connection it came by, from 0.
    pub(crate) session: usize,
    pub(crate) tag: u64,
    pub(crate) id: String,
    /// The commit's position, of header `x-outbox-lsn`.
    pub(crate) lsn: String,
    pub(crate) exchange: String,
    pub(crate) routing_key: String,
}

/// What `connection.tune` proposes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tune {
    pub(crate) channel_max: u16,
    pub(crate) frame_max: u32,
    pub(crate) heartbeat: u16,
}

/// What RabbitMQ proposes.
pub(crate) const USUAL: Tune = Tune { channel_max: 2047, frame_max: 131_072, heartbeat: 60 };

#[derive(Default)]
struct Seen {
    connections: AtomicUsize,
    published: Mutex<Vec<Published>>,
    /// What scripts found wrong with what they read: in a thread of its own an assertion only closes a socket.
    faults: Mutex<Vec<String>>,
    is_open: Mutex<bool>,
    opened: Condvar,
}

/// The first connections follow a script, all later ones an honest broker's.
pub(crate) struct Broker {
    port: u16,
    seen: Arc<Seen>,
}

impl Broker {
    /// `hostile` connections follow the script. The honest ones after them confirm nothing before [`Broker::relent`].
    pub(crate) fn start<S>(hostile: usize, script: S) -> Self
    where
        S: Fn(&mut Wire) -> io::Result<()> + Send + Sync + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let broker = Self { port: listener.local_addr().unwrap().port(), seen: Arc::default() };
        let (seen, script) = (broker.seen.clone(), Arc::new(script));
        // The thread and its connections end with the test process.
        std::thread::spawn(move || {
            for socket in listener.incoming() {
                let (socket, seen, script) = (socket.unwrap(), seen.clone(), script.clone());
                let session = seen.connections.fetch_add(1, Ordering::SeqCst);
                std::thread::spawn(move || {
                    socket.set_nodelay(true).unwrap();
                    let mut wire = Wire { socket, seen, session, tag: 0, is_honest: session >= hostile };
                    // It ends when the other side goes, or when the script is done.
                    let talk = || if wire.is_honest { wire.serve() } else { script(&mut wire) };
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(talk)) {
                        wire.seen.faults.lock().unwrap().push(format!("connection {session}: {}", said(&*panic)));
                    }
                    let _ = wire.socket.shutdown(Shutdown::Both);
                });
            }
        });
        broker
    }

    /// Confirms whatever comes, from the first connection on.
    pub(crate) fn honest() -> Self {
        let broker = Self::start(0, |_| Ok(()));
        broker.relent();
        broker
    }

    pub(crate) fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.port)
    }

    /// From now on honest connections confirm.
    pub(crate) fn relent(&self) {
        *self.seen.is_open.lock().unwrap() = true;
        self.seen.opened.notify_all();
    }

    pub(crate) fn connections(&self) -> usize {
        self.seen.connections.load(Ordering::SeqCst)
    }

    /// No script found anything wrong with what it read.
    pub(crate) fn assert_spoken_to_well(&self) {
        let faults = self.seen.faults.lock().unwrap();
        assert!(faults.is_empty(), "{faults:#?}");
    }

    pub(crate) fn published(&self) -> Vec<Published> {
        self.seen.published.lock().unwrap().clone()
    }
}

/// One connection, from the broker's side.
pub(crate) struct Wire {
    socket: TcpStream,
    seen: Arc<Seen>,
    session: usize,
    tag: u64,
    /// Answers when it is looked whether the exchange is still there.
    is_honest: bool,
}

/// The text of a panic.
fn said(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// The other side said goodbye.
fn over() -> io::Error {
    io::Error::from(io::ErrorKind::ConnectionAborted)
}

impl Wire {
    /// Everything up to the first message.
    pub(crate) fn handshake(&mut self) -> io::Result<()> {
        self.handshake_with(USUAL)
    }

    pub(crate) fn handshake_with(&mut self, tune: Tune) -> io::Result<()> {
        self.start()?;
        self.tune(tune)?;
        self.open_until(0)
    }

    /// As far as the first question of this class, which it reads and does not answer.
    pub(crate) fn handshake_until(&mut self, class: u16) -> io::Result<()> {
        self.start()?;
        self.tune(USUAL)?;
        self.open_until(class)
    }

    fn open_until(&mut self, class: u16) -> io::Result<()> {
        const STEPS: [(Method, u16, u16, &[u8]); 4] = [
            (OPEN, 0, 41, &[0]),
            (CHANNEL_OPEN, 1, 11, &[0; 4]),
            (EXCHANGE_DECLARE, 1, 11, &[]),
            (CONFIRM_SELECT, 1, 11, &[]),
        ];
        for (question, channel, answer, arguments) in STEPS {
            let mut asked = self.method_frame()?;
            while asked == QUEUE_DECLARE {
                // Whatever its name, it is there, and empty.
                self.method(1, (50, 11), &[&short("queue")[..], &[0; 8]].concat())?;
                asked = self.method_frame()?;
            }
            assert_eq!(asked, question);
            if question.0 == class {
                break;
            }
            self.method(channel, (question.0, answer), arguments)?;
        }
        Ok(())
    }

    /// The protocol header, and `connection.start` answered.
    pub(crate) fn start(&mut self) -> io::Result<()> {
        self.socket.read_exact(&mut [0; 8])?;
        let mut arguments = vec![0, 9];
        arguments.extend(long(&field("capabilities", b'F', &long(&capabilities()))));
        arguments.extend(long(b"PLAIN AMQPLAIN"));
        arguments.extend(long(b"en_US"));
        self.method(0, (10, 10), &arguments)?;
        self.expect(START_OK)
    }

    pub(crate) fn tune(&mut self, tune: Tune) -> io::Result<()> {
        let mut arguments = tune.channel_max.to_be_bytes().to_vec();
        arguments.extend(tune.frame_max.to_be_bytes());
        arguments.extend(tune.heartbeat.to_be_bytes());
        self.method(0, (10, 30), &arguments)?;
        self.expect(TUNE_OK)
    }

    /// An honest broker, for as long as it lasts.
    pub(crate) fn serve(&mut self) -> io::Result<()> {
        self.handshake()?;
        loop {
            let published = self.published()?;
            let mut is_open = self.seen.is_open.lock().unwrap();
            while !*is_open {
                is_open = self.seen.opened.wait(is_open).unwrap();
            }
            drop(is_open);
            self.ack(published.tag, false)?;
        }
    }

    /// Waits for this many messages.
    pub(crate) fn take(&mut self, count: usize) -> io::Result<Vec<Published>> {
        (0..count).map(|_| self.published()).collect()
    }

    /// Says nothing any more, until the other side goes.
    pub(crate) fn fall_silent(&mut self) -> io::Result<()> {
        io::copy(&mut self.socket, &mut io::sink()).map(|_| ())
    }

    /// Listens, and answers nothing but goodbyes, until the other side goes.
    pub(crate) fn listen(&mut self) -> io::Result<()> {
        loop {
            self.published()?;
        }
    }

    pub(crate) fn ack(&mut self, tag: u64, multiple: bool) -> io::Result<()> {
        self.raw(&ack(tag, multiple))
    }

    pub(crate) fn nack(&mut self, tag: u64, flags: u8) -> io::Result<()> {
        self.method(1, (60, 120), &[&tag.to_be_bytes()[..], &[flags]].concat())
    }

    /// `basic.return` with a content header that names the message, and a body.
    pub(crate) fn give_back(&mut self, id: &str) -> io::Result<()> {
        let mut arguments = 312u16.to_be_bytes().to_vec();
        for text in ["NO_ROUTE", "exchange", "key"] {
            arguments.extend(short(text));
        }
        self.method(1, (60, 50), &arguments)?;
        let mut header = [0, 60, 0, 0].to_vec();
        header.extend(2u64.to_be_bytes());
        // Only message_id is there.
        header.extend(0x0080u16.to_be_bytes());
        header.extend(short(id));
        self.raw(&frame(2, 1, &header))?;
        self.raw(&frame(3, 1, b"{}"))
    }

    /// Ends a channel (1) or, by channel 0, the connection.
    pub(crate) fn end(&mut self, channel: u16, code: u16, text: &str) -> io::Result<()> {
        let mut arguments = code.to_be_bytes().to_vec();
        arguments.extend(short(text));
        arguments.extend([0; 4]);
        self.method(channel, if channel == 0 { CLOSE } else { CHANNEL_CLOSE }, &arguments)
    }

    pub(crate) fn blocked(&mut self, reason: &str) -> io::Result<()> {
        self.method(0, (10, 60), &short(reason))
    }

    pub(crate) fn unblocked(&mut self) -> io::Result<()> {
        self.method(0, (10, 61), &[])
    }

    pub(crate) fn method(&mut self, channel: u16, (class, method): Method, arguments: &[u8]) -> io::Result<()> {
        let payload = [&class.to_be_bytes()[..], &method.to_be_bytes(), arguments].concat();
        self.raw(&frame(1, channel, &payload))
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes)
    }

    /// In pieces of one byte, each in a packet of its own.
    pub(crate) fn drip(&mut self, bytes: &[u8]) -> io::Result<()> {
        for byte in bytes {
            self.raw(&[*byte])?;
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// The next message, whole.
    pub(crate) fn published(&mut self) -> io::Result<Published> {
        let arguments = self.publish_method()?;
        let (kind, header) = self.frame()?;
        assert_eq!(kind, 2, "a content header follows basic.publish");
        let mut left = u64::from_be_bytes(header[4..12].try_into().unwrap());
        while left > 0 {
            let (kind, body) = self.frame()?;
            assert_eq!(kind, 3, "the body follows the content header");
            left -= body.len() as u64;
        }
        let exchange = text_at(&arguments, 2);
        let routing_key = text_at(&arguments, 3 + exchange.len());
        let published = Published {
            session: self.session,
            tag: self.tag,
            id: message_id(&header),
            lsn: text_header(&header, "x-outbox-lsn"),
            exchange,
            routing_key,
        };
        self.seen.published.lock().unwrap().push(published.clone());
        Ok(published)
    }

    /// The next `basic.publish` alone, before its content; its arguments.
    pub(crate) fn publish_method(&mut self) -> io::Result<Vec<u8>> {
        let arguments = loop {
            let (kind, payload) = self.frame()?;
            match method_of(&payload) {
                PUBLISH if kind == 1 => break payload[4..].to_vec(),
                EXCHANGE_DECLARE if kind == 1 && self.is_honest => self.method(1, (40, 11), &[])?,
                _ => {}
            }
        };
        self.tag += 1;
        Ok(arguments)
    }

    fn expect(&mut self, method: Method) -> io::Result<()> {
        assert_eq!(self.method_frame()?, method);
        Ok(())
    }

    fn method_frame(&mut self) -> io::Result<Method> {
        let (kind, payload) = self.frame()?;
        assert_eq!(kind, 1, "a method");
        Ok(method_of(&payload))
    }

    /// The next frame that is no heartbeat. Goodbyes are answered and end it.
    pub(crate) fn frame(&mut self) -> io::Result<(u8, Vec<u8>)> {
        loop {
            let mut head = [0; 7];
            self.socket.read_exact(&mut head)?;
            let length = u32::from_be_bytes(head[3..7].try_into().unwrap()) as usize;
            let mut payload = vec![0; length + 1];
            self.socket.read_exact(&mut payload)?;
            assert_eq!(payload.pop(), Some(0xce), "a frame's end");
            match (head[0], method_of(&payload)) {
                (8, _) => {}
                (1, CLOSE) => {
                    self.method(0, CLOSE_OK, &[])?;
                    return Err(over());
                }
                (1, CHANNEL_CLOSE) => self.method(1, (20, 41), &[])?,
                (kind, _) => return Ok((kind, payload)),
            }
        }
    }
}

/// A whole frame.
pub(crate) fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&[kind][..], &channel.to_be_bytes(), &length, payload, &[0xce]].concat()
}

/// A whole `basic.ack`.
pub(crate) fn ack(tag: u64, multiple: bool) -> Vec<u8> {
    frame(1, 1, &[&[0, 60, 0, 80][..], &tag.to_be_bytes(), &[u8::from(multiple)]].concat())
}

fn method_of(payload: &[u8]) -> Method {
    let part = |at: usize| payload.get(at..at + 2).map_or(0, |two| u16::from_be_bytes([two[0], two[1]]));
    (part(0), part(2))
}

fn short(text: &str) -> Vec<u8> {
    [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat()
}

fn long(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat()
}

fn field(name: &str, kind: u8, value: &[u8]) -> Vec<u8> {
    [&short(name)[..], &[kind], value].concat()
}

fn capabilities() -> Vec<u8> {
    ["publisher_confirms", "basic.nack", "connection.blocked", "authentication_failure_close"]
        .map(|name| field(name, b't', &[1]))
        .concat()
}

fn text_at(bytes: &[u8], at: usize) -> String {
    String::from_utf8(bytes[at + 1..at + 1 + usize::from(bytes[at])].to_vec()).unwrap()
}

/// Properties stand in the order of their flags: those before `message_id` are stepped over.
fn message_id(header: &[u8]) -> String {
    let flags = u16::from_be_bytes([header[12], header[13]]);
    assert_ne!(flags & 0x0080, 0, "message_id is always set");
    let mut at = 14;
    for flag in [0x8000, 0x4000, 0x2000, 0x1000, 0x0800, 0x0400, 0x0200, 0x0100] {
        if flags & flag != 0 {
            at += match flag {
                0x2000 => 4 + u32::from_be_bytes(header[at..at + 4].try_into().unwrap()) as usize,
                0x1000 | 0x0800 => 1,
                _ => 1 + usize::from(header[at]),
            };
        }
    }
    text_at(header, at)
}

fn text_header(header: &[u8], name: &str) -> String {
    let key = field(name, b'S', &[]);
    let at = header.windows(key.len()).position(|window| window == key).unwrap() + key.len();
    let length = u32::from_be_bytes(header[at..at + 4].try_into().unwrap()) as usize;
    String::from_utf8(header[at + 4..at + 4 + length].to_vec()).unwrap()
}
