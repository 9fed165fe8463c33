//! One connection in the frontend/backend protocol: reach the server, log in, read and write frames.
//!
//! The traps. A frame is read cancel-safely: bytes land in one buffer that outlives the future, so a read raced against a
//! timer loses nothing. The same holds for writes: what is to go out waits in a buffer, and a cancelled flush goes on
//! where it stopped; a half-written frame would corrupt the stream. And no length of a peer is allocated before its bytes
//! are there.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::{fmt, io};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::backend;
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::error::{Error, ServerError};
use super::settings::{Host, Settings};

/// Postgres' own limit for one message: `PQ_LARGE_MESSAGE_LIMIT`, 1 GB less one byte.
const FRAME_BYTES_MAX: usize = 0x3fff_ffff;

/// One read asks for at least this much: many rows in one system call, little memory when idle.
const READ_BYTES: usize = 64 * 1024;

/// Session settings that decide how a row looks as text, pinned against `ALTER ROLE ... SET` and `ALTER DATABASE ... SET`.
/// `client_min_messages`: PostgreSQL 18 says only by a warning that it skips a publication.
const PINNED: &str = "-c datestyle=ISO -c intervalstyle=postgres -c bytea_output=hex -c extra_float_digits=1 \
    -c timezone=UTC -c client_min_messages=warning -c statement_timeout=0 -c lock_timeout=0";

/// One protocol message, without its length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its kind, by the protocol's letter.
    pub tag: u8,
    /// The rest.
    pub body: Bytes,
}

/// A connection in replication mode, logged in.
pub struct Connection {
    socket: Socket,
    incoming: BytesMut,
    outgoing: BytesMut,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

impl Connection {
    /// Connects to this host as a walsender of the database.
    ///
    /// # Errors
    /// `Unreachable`, `Login`, `Server`, or `Timeout` after the settings' `connect_timeout`.
    pub async fn open(host: &Host, settings: &Settings) -> Result<Self, Error> {
        let late = Error::Timeout { during: "connecting", after: settings.connect_timeout };
        timeout(settings.connect_timeout, Self::open_now(host, settings)).await.unwrap_or(Err(late))
    }

    async fn open_now(host: &Host, settings: &Settings) -> Result<Self, Error> {
        let socket =
            Socket::connect(host).await.map_err(|source| Error::Unreachable { host: host.to_string(), source })?;
        let mut connection = Self { socket, incoming: BytesMut::new(), outgoing: BytesMut::new() };
        let parameters = [
            ("user", settings.user.as_str()),
            ("database", settings.database.as_str()),
            ("replication", "database"),
            ("application_name", "pgoutbox"),
            ("client_encoding", "UTF8"),
            ("options", PINNED),
        ];
        frontend::startup_message(parameters, &mut connection.outgoing).map_err(Error::Broken)?;
        connection.log_in(host, settings).await?;
        if !connection.until_ready().await? {
            // Such a server converts nothing, but refuses to send what is not UTF-8 to a client that asked for it: one such
            // row would hold the stream for ever. Without a wish it sends the bytes as they are.
            connection.query("SET client_encoding = 'SQL_ASCII'").await?;
        }
        Ok(connection)
    }

    /// The next frame. Cancel-safe.
    ///
    /// # Errors
    /// `Closed` when the server closed, also in the middle of a frame; `Protocol` for an impossible length.
    pub async fn read(&mut self) -> Result<Frame, Error> {
        loop {
            if let Some(frame) = take_frame(&mut self.incoming)? {
                return Ok(frame);
            }
            self.incoming.reserve(READ_BYTES);
            if self.socket.read_buf(&mut self.incoming).await.map_err(Error::Broken)? == 0 {
                return Err(Error::Closed);
            }
        }
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
                b'T' | b'C' | b'I' | b'N' | b'S' => {}
                tag => return Err(unexpected(tag, "a query's answer")),
            }
        }
    }

    async fn log_in(&mut self, host: &Host, settings: &Settings) -> Result<(), Error> {
        loop {
            self.flush().await?;
            let frame = self.read().await?;
            match frame.tag {
                b'N' => continue,
                b'E' => return Err(Error::Server(ServerError::parse(frame.body))),
                b'R' => {}
                tag => return Err(unexpected(tag, "the login")),
            }
            match authentication(&frame)? {
                backend::Message::AuthenticationOk => return Ok(()),
                backend::Message::AuthenticationCleartextPassword => {
                    if matches!(host, Host::Tcp(..)) {
                        let text = "the server asks for a password in clear text over an unencrypted connection; \
                            set scram-sha-256 in its pg_hba.conf";
                        return Err(Error::Login(text.to_owned()));
                    }
                    frontend::password_message(password(settings)?, &mut self.outgoing).map_err(Error::Broken)?;
                }
                backend::Message::AuthenticationMd5Password(body) => {
                    let hash = md5_hash(settings.user.as_bytes(), password(settings)?, body.salt());
                    frontend::password_message(hash.as_bytes(), &mut self.outgoing).map_err(Error::Broken)?;
                }
                backend::Message::AuthenticationSasl(body) => {
                    let mechanisms: Vec<String> =
                        body.mechanisms().map(|name| Ok(name.to_owned())).collect().map_err(Error::Broken)?;
                    if !mechanisms.iter().any(|name| name == sasl::SCRAM_SHA_256) {
                        return Err(Error::Login(format!("the server offers only {}", mechanisms.join(", "))));
                    }
                    return self.log_in_scram(settings).await;
                }
                _ => return Err(Error::Login("the server asks for a method other than password".to_owned())),
            }
        }
    }

    async fn log_in_scram(&mut self, settings: &Settings) -> Result<(), Error> {
        let mut scram = sasl::ScramSha256::new(password(settings)?, sasl::ChannelBinding::unsupported());
        frontend::sasl_initial_response(sasl::SCRAM_SHA_256, scram.message(), &mut self.outgoing)
            .map_err(Error::Broken)?;
        self.flush().await?;
        let backend::Message::AuthenticationSaslContinue(challenge) = self.authentication().await? else {
            return Err(Error::Login("SCRAM went out of step".to_owned()));
        };
        bound_iterations(challenge.data())?;
        scram.update(challenge.data()).map_err(|error| Error::Login(error.to_string()))?;
        frontend::sasl_response(scram.message(), &mut self.outgoing).map_err(Error::Broken)?;
        self.flush().await?;
        // The server must prove that it knows the password too, before it may say that we are in.
        let backend::Message::AuthenticationSaslFinal(proof) = self.authentication().await? else {
            return Err(Error::Login("SCRAM went out of step".to_owned()));
        };
        scram.finish(proof.data()).map_err(|error| Error::Login(error.to_string()))?;
        match self.authentication().await? {
            backend::Message::AuthenticationOk => Ok(()),
            _ => Err(Error::Login("SCRAM went out of step".to_owned())),
        }
    }

    async fn authentication(&mut self) -> Result<backend::Message, Error> {
        let frame = self.read().await?;
        match frame.tag {
            b'R' => authentication(&frame),
            b'E' => Err(Error::Server(ServerError::parse(frame.body))),
            tag => Err(unexpected(tag, "the login")),
        }
    }

    /// Waits until the server takes commands. Whether its database has an encoding: SQL_ASCII is none.
    async fn until_ready(&mut self) -> Result<bool, Error> {
        let mut has_encoding = true;
        loop {
            let frame = self.read().await?;
            match frame.tag {
                b'Z' => return Ok(has_encoding),
                b'E' => return Err(Error::Server(ServerError::parse(frame.body))),
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
pub fn take_frame(incoming: &mut BytesMut) -> Result<Option<Frame>, Error> {
    let Some((&tag, length)) = incoming.split_first() else { return Ok(None) };
    let Some(length) = length.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_be_bytes(*length) as usize;
    if !(4..=FRAME_BYTES_MAX).contains(&length) {
        return Err(Error::Protocol(format!("a message of {length} bytes")));
    }
    if incoming.len() < 1 + length {
        return Ok(None);
    }
    let mut body = incoming.split_to(1 + length).freeze();
    body.advance(5);
    Ok(Some(Frame { tag, body }))
}

fn unexpected(tag: u8, during: &str) -> Error {
    Error::Protocol(format!("message {:?} in {during}", char::from(tag)))
}

fn password(settings: &Settings) -> Result<&[u8], Error> {
    let missing = || Error::Login(format!("the server asks for a password for role {}: none is set", settings.user));
    settings.password().ok_or_else(missing)
}

/// Re-frames an `R` message for postgres-protocol, which owns the parsing of logins.
fn authentication(frame: &Frame) -> Result<backend::Message, Error> {
    let mut bytes = BytesMut::with_capacity(5 + frame.body.len());
    bytes.put_u8(frame.tag);
    bytes.put_u32(u32::try_from(frame.body.len() + 4).map_err(|_| unexpected(frame.tag, "the login"))?);
    bytes.put_slice(&frame.body);
    let message = backend::Message::parse(&mut bytes).map_err(|error| Error::Protocol(error.to_string()))?;
    message.ok_or_else(|| unexpected(frame.tag, "the login"))
}

/// A server, or someone in its place, can ask for so many hash rounds that we do nothing else (CVE-2026-42198 of pgjdbc).
fn bound_iterations(challenge: &[u8]) -> Result<(), Error> {
    const ITERATIONS_MAX: u64 = 1_000_000;
    let text = String::from_utf8_lossy(challenge);
    let rounds = text.split(',').find_map(|part| part.strip_prefix("i=")).and_then(|digits| digits.parse::<u64>().ok());
    match rounds {
        Some(rounds) if rounds <= ITERATIONS_MAX => Ok(()),
        _ => Err(Error::Login(format!("the server asks for more than {ITERATIONS_MAX} SCRAM iterations"))),
    }
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

/// The transport, one of those that Postgres listens on.
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    async fn connect(host: &Host) -> io::Result<Self> {
        match host {
            Host::Tcp(name, port) => {
                let stream = TcpStream::connect((name.as_str(), *port)).await?;
                stream.set_nodelay(true)?;
                Ok(Socket::Tcp(stream))
            }
            Host::Unix(path) => Ok(Socket::Unix(UnixStream::connect(path).await?)),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            Socket::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Socket::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Socket::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Socket::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    async fn pair() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let connection =
            Connection { socket: Socket::Unix(ours), incoming: BytesMut::new(), outgoing: BytesMut::new() };
        (connection, theirs)
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
    async fn an_end_in_the_middle_of_a_frame_is_a_close_and_not_a_frame() {
        let (mut connection, mut peer) = pair().await;
        peer.write_all(b"d\0\0\0\x07ab").await.unwrap();
        drop(peer);
        assert!(matches!(connection.read().await, Err(Error::Closed)));
    }

    #[test]
    fn too_many_scram_rounds_are_refused() {
        assert!(bound_iterations(b"r=x,s=y,i=4096").is_ok());
        assert!(bound_iterations(b"r=x,s=y,i=2000000000").is_err());
        assert!(bound_iterations(b"r=x,s=y").is_err());
    }
}
