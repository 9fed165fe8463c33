//! A logged-in connection as a stream that tokio-postgres takes for a new one.
//!
//! Why: one login for both connections. tokio-postgres would log in by its own rules (a password in clear text to whoever
//! asks, any number of hash rounds, no `require_auth`), and it offers no way in behind the login. So its startup message
//! is swallowed, and it reads that it was let in, followed by what the server really said. The trap: the message may come
//! in pieces.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::connection::Connection;
use super::dial::Socket;

/// AuthenticationOk.
const LET_IN: [u8; 9] = [b'R', 0, 0, 0, 8, 0, 0, 0, 0];

pub(super) struct Handover {
    socket: Socket,
    /// Read first.
    said: BytesMut,
    /// The startup message as far as its length is not known.
    head: BytesMut,
    /// How much of it is still to be swallowed, once that is known.
    rest: Option<usize>,
}

impl Handover {
    pub(super) fn new(connection: Connection) -> Self {
        let (socket, greeting) = connection.into_parts();
        let mut said = BytesMut::from(&LET_IN[..]);
        said.put_slice(&greeting);
        Self { socket, said, head: BytesMut::new(), rest: None }
    }

    /// How many of these bytes belong to the startup message.
    fn swallow(&mut self, bytes: &[u8]) -> usize {
        if let Some(rest) = &mut self.rest {
            let count = bytes.len().min(*rest);
            *rest -= count;
            return count;
        }
        let count = bytes.len().min(4 - self.head.len());
        self.head.put_slice(bytes.get(..count).unwrap_or_default());
        if let Some(length) = self.head.first_chunk::<4>() {
            self.rest = Some((u32::from_be_bytes(*length) as usize).saturating_sub(4));
        }
        count
    }
}

impl AsyncRead for Handover {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.said.is_empty() {
            return Pin::new(&mut this.socket).poll_read(cx, buffer);
        }
        let count = this.said.len().min(buffer.remaining());
        buffer.put_slice(this.said.get(..count).unwrap_or_default());
        this.said.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Handover {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        match this.swallow(bytes) {
            0 => Pin::new(&mut this.socket).poll_write(cx, bytes),
            count => Poll::Ready(Ok(count)),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_shutdown(cx)
    }
}
