//! The socket with what came and what is to go: bytes in both directions in one call, whichever of them moves.
//!
//! The trap: a broker that is not read stops reading. A publisher that writes a large run to its end before it reads an ack
//! waits for a broker that waits for the publisher. So nothing here waits for a write alone. And a broker that refuses us
//! says why and closes: what it said stands in the socket when the next write fails, and is read before that is told.

use std::collections::VecDeque;
use std::future::Future;
use std::io::{self, ErrorKind, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

use super::frames::{self, Fault, Word};
use super::tls;
use super::wire::CHANNEL;
use crate::sink::UnderWay;

/// A socket, with TLS or without.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// One read's worth: some hundred acks.
const READ_BYTES: usize = 16 * 1024;

/// Pieces of one gathering write; the kernel takes up to 1024.
const PIECES_MAX: usize = 64;

/// Beyond this the next run waits for the socket: what is encoded is held twice.
const OUTPUT_BYTES_MAX: usize = 256 * 1024;

/// What is to be written: a buffer that is used again and again, and between its parts large bodies as they are.
#[derive(Default)]
pub(super) struct Output {
    sealed: VecDeque<Bytes>,
    sealed_bytes: usize,
    tail: BytesMut,
    written: u64,
}

impl Output {
    /// Where frames are appended.
    pub(super) fn tail(&mut self) -> &mut BytesMut {
        &mut self.tail
    }

    /// Appends bytes that are not copied.
    pub(super) fn own(&mut self, bytes: Bytes) {
        let before = self.tail.split().freeze();
        self.sealed_bytes += before.len() + bytes.len();
        self.sealed.extend([before, bytes]);
    }

    /// Bytes that the socket has taken, since the session's first.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// Where the last byte appended so far will stand among the written ones.
    pub(super) fn end(&self) -> u64 {
        self.written + self.pending() as u64
    }

    fn pending(&self) -> usize {
        self.sealed_bytes + self.tail.len()
    }

    /// The next pieces to write, none of them empty.
    pub(super) fn pieces(&self) -> Vec<IoSlice<'_>> {
        let sealed = self.sealed.iter().map(|bytes| &bytes[..]).take(PIECES_MAX);
        let tail = (self.sealed.len() < PIECES_MAX).then_some(&self.tail[..]);
        sealed.chain(tail).filter(|piece| !piece.is_empty()).map(IoSlice::new).collect()
    }

    fn poll_write<S: AsyncWrite + Unpin>(&self, stream: &mut S, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let stream = Pin::new(stream);
        if self.sealed.is_empty() {
            return stream.poll_write(context, &self.tail);
        }
        stream.poll_write_vectored(context, &self.pieces())
    }

    /// The socket has taken so many bytes.
    pub(super) fn advance(&mut self, mut count: usize) {
        self.written += count as u64;
        while let Some(front) = self.sealed.front_mut() {
            let taken = count.min(front.len());
            front.advance(taken);
            self.sealed_bytes -= taken;
            count -= taken;
            if !front.is_empty() {
                return;
            }
            self.sealed.pop_front();
        }
        self.tail.advance(count.min(self.tail.len()));
        if self.tail.is_empty() {
            self.tail.clear();
        }
    }
}

/// A socket and both its queues.
pub(super) struct Link {
    stream: Box<dyn Stream>,
    input: BytesMut,
    pub(super) output: Output,
    /// What the broker may send in one frame.
    pub(super) frame_max: usize,
    /// Something came since this was last cleared.
    pub(super) heard: bool,
    /// Who waits for confirms must know whether what is to be confirmed still goes.
    pub(super) under_way: Arc<UnderWay>,
    unflushed: bool,
    write_fault: Option<io::Error>,
}

impl Link {
    pub(super) fn new(stream: Box<dyn Stream>, frame_max: usize) -> Self {
        Self {
            stream,
            input: BytesMut::new(),
            output: Output::default(),
            frame_max,
            heard: false,
            under_way: Arc::default(),
            unflushed: false,
            write_fault: None,
        }
    }

    /// Whether another run may be encoded.
    pub(super) fn has_room(&self) -> bool {
        self.output.pending() < OUTPUT_BYTES_MAX
    }

    /// Whether everything is written.
    pub(super) fn is_written(&self) -> bool {
        self.output.pending() == 0
    }

    /// Waits until bytes have moved, in any direction. Cancel-safe: what has moved is kept here.
    pub(super) async fn moved(&mut self) -> Result<(), Fault> {
        let moved = std::future::poll_fn(|context| self.poll_move(context)).await;
        moved.map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => Fault::Lost("the broker closed the connection".to_owned()),
            _ => Fault::Lost(tls::told(&error)),
        })
    }

    fn poll_move(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let wrote = self.poll_output(context);
        match self.poll_input(context) {
            Poll::Ready(Ok(())) => Poll::Ready(Ok(())),
            // The end of what there was to read; why we could not write is told before it.
            Poll::Ready(Err(error)) => Poll::Ready(Err(self.write_fault.take().unwrap_or(error))),
            Poll::Pending => match self.write_fault.take() {
                Some(error) => Poll::Ready(Err(error)),
                None if wrote => Poll::Ready(Ok(())),
                None => Poll::Pending,
            },
        }
    }

    /// Writes what the socket takes; whether it took anything.
    fn poll_output(&mut self, context: &mut Context<'_>) -> bool {
        let mut wrote = false;
        while self.write_fault.is_none() && !self.is_written() {
            match self.output.poll_write(&mut self.stream, context) {
                Poll::Pending => break,
                Poll::Ready(Ok(0)) => self.write_fault = Some(ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(count)) => {
                    self.output.advance(count);
                    self.under_way.set((!self.is_written()).then_some(self.output.written()));
                    (wrote, self.unflushed) = (true, true);
                }
                Poll::Ready(Err(error)) => self.write_fault = Some(error),
            }
        }
        // TLS keeps records back; TCP has nothing to flush.
        if self.unflushed
            && self.write_fault.is_none()
            && let Poll::Ready(flushed) = Pin::new(&mut self.stream).poll_flush(context)
        {
            self.unflushed = false;
            self.write_fault = flushed.err();
        }
        wrote
    }

    fn poll_input(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.input.reserve(READ_BYTES);
        let count = ready!(pin!(self.stream.read_buf(&mut self.input)).poll(context))?;
        self.heard = true;
        if count == 0 { Poll::Ready(Err(ErrorKind::UnexpectedEof.into())) } else { Poll::Ready(Ok(())) }
    }

    /// Of what came and is not understood yet.
    pub(super) fn first_byte(&self) -> Option<u8> {
        self.input.first().copied()
    }

    /// What the next frame says, if a whole one is here.
    pub(super) fn word(&mut self) -> Result<Option<Word>, Fault> {
        let Some((frame, length)) = frames::first(&self.input, self.frame_max)? else { return Ok(None) };
        let word = frame.word(CHANNEL)?;
        self.input.advance(length);
        Ok(Some(word))
    }
}
