//! A socket with a buffer on either side.
//!
//! The trap: one system call a frame costs more than all else together, so a read takes what there is and a write takes
//! many frames.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};

/// One read takes at most so much.
const INPUT_BYTES: usize = 256 * 1024;

/// Whoever appends to the output looks at this first.
const OUTPUT_BYTES_MAX: usize = 256 * 1024;

pub(crate) struct Socket {
    pub(crate) stream: TcpStream,
    input: Vec<u8>,
    start: usize,
    end: usize,
    /// What is to be written.
    pub(crate) output: Vec<u8>,
    written: usize,
}

impl Socket {
    /// Blocking, until [`Self::set_nonblocking`].
    pub(crate) fn open(port: u16) -> Self {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("the server listens");
        stream.set_nodelay(true).unwrap();
        Self { stream, input: vec![0; INPUT_BYTES], start: 0, end: 0, output: Vec::new(), written: 0 }
    }

    pub(crate) fn set_nonblocking(&self) {
        self.stream.set_nonblocking(true).unwrap();
    }

    /// What was read and not consumed.
    pub(crate) fn input(&self) -> &[u8] {
        &self.input[self.start..self.end]
    }

    /// The first `length` bytes of the input, which are done with afterwards.
    pub(crate) fn take(&mut self, length: usize) -> &[u8] {
        let start = self.start;
        self.start += length;
        &self.input[start..start + length]
    }

    /// One read; whether anything came.
    pub(crate) fn read(&mut self) -> bool {
        match self.try_read() {
            Ok(0) => panic!("the server closed the connection"),
            Ok(_) => true,
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(error) => panic!("{error}"),
        }
    }

    /// One read; 0 at the end of the connection.
    pub(crate) fn try_read(&mut self) -> std::io::Result<usize> {
        // Little is left to move: nobody reads before all whole frames are consumed.
        self.input.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        if self.end == self.input.len() {
            self.input.resize(2 * self.end, 0);
        }
        let count = self.stream.read(&mut self.input[self.end..])?;
        self.end += count;
        Ok(count)
    }

    pub(crate) fn has_output(&self) -> bool {
        self.written < self.output.len()
    }

    /// Whether more may be appended.
    pub(crate) fn has_room(&self) -> bool {
        self.output.len() < OUTPUT_BYTES_MAX
    }

    /// Writes what the peer takes.
    pub(crate) fn write(&mut self) {
        self.try_write().unwrap_or_else(|error| panic!("{error}"));
    }

    /// The same, for who may be cut off.
    pub(crate) fn try_write(&mut self) -> std::io::Result<()> {
        while self.has_output() {
            match self.stream.write(&self.output[self.written..]) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.output.clear();
        self.written = 0;
        Ok(())
    }
}
