//! One connection in the frontend/backend protocol: reach the server, log in, read and write frames. Both connections begin
//! here, so that there is one way to choose encryption, to log in and to fail.
//!
//! The traps. A frame is read cancel-safely: bytes land in one buffer that outlives the future, so a read raced against a
//! timer loses nothing. The same holds for writes: what is to go out waits in a buffer, and a cancelled flush goes on
//! where it stopped; a half-written frame would corrupt the stream. And no length of a peer is allocated before its bytes
//! are there.

use std::fmt;
use std::io;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::dial::{Place, Socket};
use super::error::{Attempt, Error, ServerError};
use super::login;
use super::settings::Settings;
use super::tls::Encryption;

/// Postgres' own limit for one message: `PQ_LARGE_MESSAGE_LIMIT`, 1 GB less one byte.
pub const FRAME_BYTES_MAX: usize = 0x3fff_ffff;

/// And for one before the session begins, when anybody may be at the other end; libpq allows half of it.
const LOGIN_FRAME_BYTES_MAX: usize = 64 * 1024;

/// A buffer to read into: many rows in one system call, little memory when idle.
const READ_BYTES: usize = 64 * 1024;

/// A read makes do with so much of it. Rows in flight hold on to the buffer that they are slices of, so one that is given
/// up after each small read costs an allocation a row.
const READ_BYTES_MIN: usize = 8 * 1024;

/// Session settings that decide how a row looks as text, pinned against `ALTER ROLE ... SET` and `ALTER DATABASE ... SET`.
/// `client_min_messages`: PostgreSQL 18 says only by a warning that it skips a publication.
const PINNED: &str = "-c datestyle=ISO -c intervalstyle=postgres -c bytea_output=hex -c extra_float_digits=1 \
    -c timezone=UTC -c client_min_messages=warning";

/// The trap: the catalog's functions lock the tables they tell of, so a look waits behind `VACUUM FULL`, and a client that
/// gives up leaves its backend waiting there; the next attempt leaves one more. So the server gives up first.
const PATIENCE: &str = "-c lock_timeout=2s -c statement_timeout=8s";

/// Whoever owns a database can set a search path in which the catalog comes last, and put a function or an operator of their
/// own before it: it would run as our role. Not for the stream, where it decides how a `regclass` looks as text.
const CATALOG_ONLY: &str = "-c search_path=pg_catalog";

/// A walsender decodes what may be large, and waits for nothing but WAL.
const NO_HURRY: &str = "-c lock_timeout=0 -c statement_timeout=0";

/// One protocol message, without its length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its kind, by the protocol's letter.
    pub tag: u8,
    /// The rest.
    pub body: Bytes,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Replication,
    Sql,
}

/// A connection, logged in.
pub struct Connection {
    socket: Socket,
    incoming: BytesMut,
    outgoing: BytesMut,
    frame_bytes_max: usize,
    /// What the server said between the login and the first command, as it came.
    greeting: BytesMut,
}

/// Why an attempt failed, and whether one with the other encryption may go better.
struct Failure {
    error: Error,
    may_try_other: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let may_try_other = matches!(error, Error::Tls { .. });
        Self { error, may_try_other }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

impl Connection {
    /// Connects to this place and logs in: with the encryption that `sslmode` asks for first, then with the other one if it
    /// has one.
    ///
    /// # Errors
    /// `Unreachable`, also when connecting takes longer than `connect_timeout`; `Tls`, `Login`, `Refused`.
    pub(super) async fn open(place: &Place, settings: &Settings, purpose: Purpose) -> Result<Self, Error> {
        let (first, second) = settings.tls.attempts(place);
        let failure = match Self::attempt(place, settings, purpose, first).await {
            Ok(connection) => return Ok(connection),
            Err(failure) => failure,
        };
        let Some(second) = second.filter(|_| failure.may_try_other) else { return Err(failure.error) };
        match Self::attempt(place, settings, purpose, second).await {
            Ok(connection) => Ok(connection),
            // The encrypted attempt is the one that was wished for: its reason is the one to mend.
            Err(_) if first != Encryption::None => Err(failure.error),
            Err(other) => Err(other.error),
        }
    }

    async fn attempt(
        place: &Place,
        settings: &Settings,
        purpose: Purpose,
        encryption: Encryption,
    ) -> Result<Self, Failure> {
        let late = |after: Duration, doing: &str| {
            let problem = format!("{doing} took longer than connect_timeout, {after:?}");
            Error::Unreachable { host: place.to_string(), source: io::Error::new(io::ErrorKind::TimedOut, problem) }
        };
        let after = settings.connect_timeout;
        let mut doing = "connecting";
        let opening = async {
            let unreachable = |source| Error::Unreachable { host: place.to_string(), source };
            let socket = match Socket::connect(place, &settings.tcp).await.map_err(unreachable)? {
                Socket::Tcp(stream) if encryption != Encryption::None => {
                    doing = "the TLS handshake";
                    settings.tls.negotiate(stream, place, encryption).await?
                }
                socket => socket,
            };
            doing = "logging in";
            Self::begin(socket, place, settings, purpose).await
        };
        let opened = timeout(after, opening).await;
        opened.unwrap_or_else(|_| Err(late(after, doing).into()))
    }

    /// Startup message, login, and the wait for the server to take commands.
    async fn begin(socket: Socket, place: &Place, settings: &Settings, purpose: Purpose) -> Result<Self, Failure> {
        let is_encrypted = matches!(socket, Socket::Tls(_));
        let mut attempt = Attempt {
            host: place.to_string(),
            user: settings.user.clone(),
            database: settings.database.clone(),
            is_encrypted,
            password_from: None,
        };
        let mut connection = Self::over(socket);
        let of_purpose = if purpose == Purpose::Sql { [PATIENCE, CATALOG_ONLY].as_slice() } else { &[NO_HURRY] };
        let options = settings.options.iter().map(String::as_str).chain([PINNED]);
        let options = options.chain(of_purpose.iter().copied()).collect::<Vec<_>>().join(" ");
        let mut parameters = vec![
            ("user", settings.user.as_str()),
            ("database", settings.database.as_str()),
            ("application_name", settings.application_name.as_str()),
            ("client_encoding", "UTF8"),
            ("options", options.as_str()),
        ];
        if purpose == Purpose::Replication {
            parameters.push(("replication", "database"));
        }
        frontend::startup_message(parameters, &mut connection.outgoing).map_err(Error::Broken)?;
        login::log_in(&mut connection, settings, place, &mut attempt).await.map_err(|error| {
            // libpq: `prefer` tries without encryption what was refused with it, but not what was refused without.
            let may_try_other = match settings.tls.attempts(place).0 {
                Encryption::None => true,
                _ => is_encrypted,
            };
            Failure { may_try_other: may_try_other && matches!(error, Error::Refused { .. }), error }
        })?;
        let has_encoding =
            connection.until_ready(&attempt).await.map_err(|error| Failure { error, may_try_other: false })?;
        connection.frame_bytes_max = FRAME_BYTES_MAX;
        if purpose == Purpose::Replication && !has_encoding {
            // Such a server converts nothing, but refuses to send what is not UTF-8 to a client that asked for it: one such
            // row would hold the stream for ever. Without a wish it sends the bytes as they are.
            connection.query("SET client_encoding = 'SQL_ASCII'").await?;
        }
        Ok(connection)
    }

    fn over(socket: Socket) -> Self {
        let (incoming, outgoing, greeting) = (BytesMut::new(), BytesMut::new(), BytesMut::new());
        Self { socket, incoming, outgoing, frame_bytes_max: LOGIN_FRAME_BYTES_MAX, greeting }
    }

    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    pub(super) fn outgoing(&mut self) -> &mut BytesMut {
        &mut self.outgoing
    }

    /// The socket, and what the server said at the start of the session.
    pub(super) fn into_parts(self) -> (Socket, BytesMut) {
        (self.socket, self.greeting)
    }

    /// The next frame. Cancel-safe.
    ///
    /// # Errors
    /// `Closed` when the server closed, also in the middle of a frame; `Protocol` for an impossible length.
    pub async fn read(&mut self) -> Result<Frame, Error> {
        loop {
            if let Some(frame) = self.read_part().await? {
                return Ok(frame);
            }
        }
    }

    /// The next frame; `None`: more of it has come, and it is not whole yet. Cancel-safe.
    ///
    /// # Errors
    /// See [`Connection::read`].
    pub async fn read_part(&mut self) -> Result<Option<Frame>, Error> {
        if let Some(frame) = take_frame(&mut self.incoming, self.frame_bytes_max)? {
            return Ok(Some(frame));
        }
        if self.incoming.capacity() - self.incoming.len() < READ_BYTES_MIN {
            self.incoming.reserve(READ_BYTES);
        }
        if self.socket.read_buf(&mut self.incoming).await.map_err(Error::Broken)? == 0 {
            return Err(Error::Closed);
        }
        take_frame(&mut self.incoming, self.frame_bytes_max)
    }

    /// Puts a frame into the outgoing buffer; `flush` sends it.
    pub fn put(&mut self, tag: u8, body: &[u8]) {
        self.outgoing.put_u8(tag);
        // Our own frames are a few dozen bytes.
        self.outgoing.put_u32(u32::try_from(body.len() + 4).expect("our own frames are small"));
        self.outgoing.put_slice(body);
    }

    /// Writes out what is buffered. Cancel-safe: a later flush goes on where this one stopped.
    ///
    /// # Errors
    /// `Broken` when the socket is.
    pub async fn flush(&mut self) -> Result<(), Error> {
        while self.outgoing.has_remaining() {
            if self.socket.write_buf(&mut self.outgoing).await.map_err(Error::Broken)? == 0 {
                return Err(Error::Closed);
            }
        }
        self.socket.flush().await.map_err(Error::Broken)
    }

    /// Runs one command of the simple protocol and returns its rows as text.
    ///
    /// # Errors
    /// `Server` when the server refuses it.
    pub async fn query(&mut self, command: &str) -> Result<Vec<Vec<Option<String>>>, Error> {
        self.query_and_hear(command, |_| Ok(())).await
    }

    /// The same, with an ear for notices, which may make an error of the answer.
    ///
    /// # Errors
    /// Those of [`Self::query`], and the ear's.
    pub(super) async fn query_and_hear(
        &mut self,
        command: &str,
        mut hear: impl FnMut(Bytes) -> Result<(), Error>,
    ) -> Result<Vec<Vec<Option<String>>>, Error> {
        frontend::query(command, &mut self.outgoing).map_err(Error::Broken)?;
        self.flush().await?;
        let mut rows = Vec::new();
        let mut failure = None;
        loop {
            let frame = self.read().await?;
            match frame.tag {
                b'D' => rows.push(row(frame.body)?),
                b'E' => failure = Some(Error::Server(ServerError::parse(frame.body))),
                b'Z' => return failure.map_or(Ok(rows), Err),
                b'N' => failure = hear(frame.body).err().or(failure),
                b'T' | b'C' | b'I' | b'S' => {}
                tag => return Err(unexpected(tag, "a query's answer")),
            }
        }
    }

    /// Waits until the server takes commands. Whether its database has an encoding: SQL_ASCII is none.
    async fn until_ready(&mut self, attempt: &Attempt) -> Result<bool, Error> {
        let mut has_encoding = true;
        loop {
            let frame = self.read().await?;
            if matches!(frame.tag, b'S' | b'K' | b'Z') {
                if self.greeting.len() + frame.body.len() > LOGIN_FRAME_BYTES_MAX {
                    return Err(Error::Protocol(format!("a greeting of more than {LOGIN_FRAME_BYTES_MAX} bytes")));
                }
                self.greeting.put_u8(frame.tag);
                // Shorter than the limit of a frame.
                self.greeting.put_u32(u32::try_from(frame.body.len() + 4).unwrap_or(u32::MAX));
                self.greeting.put_slice(&frame.body);
            }
            match frame.tag {
                b'Z' => return Ok(has_encoding),
                b'E' => {
                    let error = ServerError::parse(frame.body);
                    return Err(Error::Refused { attempt: Box::new(attempt.clone()), error });
                }
                b'S' => has_encoding &= &frame.body[..] != b"server_encoding\0SQL_ASCII\0",
                b'K' | b'N' => {}
                tag => return Err(unexpected(tag, "the start of a session")),
            }
        }
    }
}

/// Takes a frame that has arrived whole already, if there is one.
///
/// # Errors
/// `Protocol` for an impossible length, as soon as the length is there.
pub fn take_frame(incoming: &mut BytesMut, frame_bytes_max: usize) -> Result<Option<Frame>, Error> {
    let Some((&tag, length)) = incoming.split_first() else { return Ok(None) };
    let Some(length) = length.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_be_bytes(*length) as usize;
    if !(4..=frame_bytes_max).contains(&length) {
        return Err(Error::Protocol(format!("a message of {length} bytes")));
    }
    if incoming.len() < 1 + length {
        return Ok(None);
    }
    let mut body = incoming.split_to(1 + length).freeze();
    if body.len() > READ_BYTES {
        // Frames are slices of one buffer: one of a hundred bytes would keep that of a megabyte before it alive.
        // Not `reserve`, which is content with what the old buffer has left.
        let mut fresh = BytesMut::with_capacity(READ_BYTES.max(incoming.len()));
        fresh.extend_from_slice(incoming);
        *incoming = fresh;
    }
    body.advance(5);
    Ok(Some(Frame { tag, body }))
}

pub(super) fn unexpected(tag: u8, during: &str) -> Error {
    Error::Protocol(format!("message {:?} in {during}", char::from(tag)))
}

fn row(mut body: Bytes) -> Result<Vec<Option<String>>, Error> {
    let cut = |_| Error::Protocol("a row that ends too early".to_owned());
    let count = body.try_get_u16().map_err(cut)?;
    let mut columns = Vec::new();
    for _ in 0..count {
        let length = body.try_get_i32().map_err(cut)?;
        let Ok(length) = usize::try_from(length) else {
            columns.push(None);
            continue;
        };
        if length > body.len() {
            return Err(Error::Protocol("a row that ends too early".to_owned()));
        }
        columns.push(Some(String::from_utf8_lossy(&body.split_to(length)).into_owned()));
    }
    Ok(columns)
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixStream;

    use super::*;

    async fn pair() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Connection::over(Socket::Unix(ours)), theirs)
    }

    #[tokio::test]
    async fn a_frame_in_one_byte_slices_survives_cancelled_reads() {
        let (mut connection, mut peer) = pair().await;
        for byte in *b"d\0\0\0\x07abc" {
            assert!(timeout(Duration::from_millis(1), connection.read()).await.is_err());
            peer.write_all(&[byte]).await.unwrap();
        }
        let frame = connection.read().await.unwrap();
        assert_eq!((frame.tag, &frame.body[..]), (b'd', &b"abc"[..]));
    }

    #[tokio::test]
    async fn a_length_beyond_the_limit_is_refused_before_its_bytes_arrive() {
        for length in [0u32, 3, u32::MAX] {
            let (mut connection, mut peer) = pair().await;
            peer.write_all(b"d").await.unwrap();
            peer.write_all(&length.to_be_bytes()).await.unwrap();
            assert!(matches!(connection.read().await, Err(Error::Protocol(_))), "{length}");
            assert!(connection.incoming.capacity() <= 2 * READ_BYTES);
        }
    }

    #[tokio::test]
    async fn a_small_frame_does_not_stand_in_the_buffer_of_a_large_one() {
        let (mut connection, mut peer) = pair().await;
        connection.frame_bytes_max = FRAME_BYTES_MAX;
        let sizes = [1_000_000, 10, 20, 500_000, 30];
        let frame =
            |bytes: usize| [&b"d"[..], &u32::try_from(bytes + 4).unwrap().to_be_bytes(), &vec![b'x'; bytes]].concat();
        let frames = sizes.map(frame).concat();
        let writing = tokio::spawn(async move {
            peer.write_all(&frames).await.unwrap();
            peer
        });
        let mut before: Option<(usize, usize)> = None;
        for bytes in sizes {
            let body = connection.read().await.unwrap().body;
            assert!(body.len() == bytes && body.iter().all(|byte| *byte == b'x'), "{bytes}");
            let begins = body.as_ptr() as usize;
            if let Some((end, _)) = before.filter(|(_, length)| *length > READ_BYTES) {
                assert_ne!(begins, end + 5, "{bytes} bytes behind a large frame");
            }
            before = Some((begins + body.len(), body.len()));
            // It lives on, as a message in flight does.
            std::mem::forget(body);
        }
        drop(writing.await);
    }

    #[tokio::test]
    async fn a_large_frame_has_its_buffer_for_itself() {
        // Of the sizes to which a buffer grows, these leave nearly nothing, half and most of it.
        for bytes in [100_000, 600_000, 1_040_000] {
            let (mut connection, mut peer) = pair().await;
            connection.frame_bytes_max = FRAME_BYTES_MAX;
            let large = [&b"d"[..], &u32::try_from(bytes + 4).unwrap().to_be_bytes(), &vec![b'x'; bytes]].concat();
            let writing = tokio::spawn(async move {
                peer.write_all(&large).await.unwrap();
                peer
            });
            let large = connection.read().await.unwrap().body;
            let mut peer = writing.await.unwrap();
            peer.write_all(b"d\0\0\0\x06ab").await.unwrap();
            let small = connection.read().await.unwrap().body;
            assert_eq!((large.len(), &small[..]), (bytes, &b"ab"[..]));
            assert!(large.is_unique(), "{bytes} bytes live as long as two");
        }
    }

    #[tokio::test]
    async fn an_end_in_the_middle_of_a_frame_is_a_close_and_not_a_frame() {
        let (mut connection, mut peer) = pair().await;
        peer.write_all(b"d\0\0\0\x07ab").await.unwrap();
        drop(peer);
        assert!(matches!(connection.read().await, Err(Error::Closed)));
    }
}
