//! Standard output: one JSON line a message, settled when the operating system has it.
//!
//! The traps. A reader that went away is an error here, never a reason to go on as if someone had read. And a disk that is
//! full in the middle of a line is an error as well, after which nobody knows how much the standard library has written:
//! what comes next would stand on the same line, and be lost to who reads lines. So it is written without a buffer, and
//! counted. A write that waits for its reader cannot be called off: it outlives its session, and the next session waits
//! for it, or each would leave another thread with another run behind. And a terminal, or a socket, may have been made one
//! that does not wait by whoever else has it open: a line that was begun is gone on with, or one that is longer than its
//! buffer would never come whole.

mod line;

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::write;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

pub use self::line::line;
use super::{Error, Receipt, Sink};
use crate::outbox::Message;

/// Whether what was written ends in the middle of a line: as long as the process lives, whatever session wrote it.
static IS_TORN: AtomicBool = AtomicBool::new(false);

/// One run at a time, whatever session it is of.
static WRITING: Semaphore = Semaphore::const_new(1);

/// Standard output.
#[derive(Debug)]
pub struct Stdout;

impl Stdout {
    /// Opens it.
    pub fn open() -> Self {
        Self
    }

    /// What an operator may not have meant: of a standard output that is closed, the standard library makes /dev/null, and
    /// that takes everything.
    pub fn warning() -> Option<&'static str> {
        is_null().then_some(
            "standard output is /dev/null, or was closed: all messages are thrown away, and Postgres is told that they are \
             held. Remedy, if that is not meant: give it a reader, or a file",
        )
    }
}

impl Sink for Stdout {
    async fn publish(&mut self, run: Vec<Message>) -> Result<Receipt, Error> {
        // What a session that is gone still has to write comes first.
        let turn = WRITING.acquire().await.map_err(|error| failure(&io::Error::other(error)))?;
        let mut lines = Vec::new();
        for message in &run {
            line(message, &mut lines);
        }
        // A reader may pause for as long as it likes.
        let writing = spawn_blocking(move || {
            let written = write_lines(&lines);
            // Only now: nobody may wait for it any more.
            drop(turn);
            written
        });
        let written = writing.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        written.map_err(|error| failure(&error))?;
        Ok(Receipt::new(std::future::ready(Ok(()))))
    }

    /// A reader that goes away is noticed at the next line: nothing else asks for it.
    async fn failed(&mut self) -> Error {
        std::future::pending().await
    }

    async fn check(&mut self) -> Result<(), Error> {
        Ok(())
    }
}

fn is_null() -> bool {
    let device = |metadata: Metadata| metadata.file_type().is_char_device().then(|| metadata.rdev());
    let stdout = io::stdout().as_fd().try_clone_to_owned().and_then(|stdout| File::from(stdout).metadata());
    let devices = stdout.and_then(|stdout| Ok((device(stdout), device(std::fs::metadata("/dev/null")?))));
    devices.is_ok_and(|(stdout, null)| null.is_some() && stdout == null)
}

/// Writes all of it, on a line of its own.
fn write_lines(lines: &[u8]) -> io::Result<()> {
    let stdout = io::stdout().lock();
    let end: &[u8] = if IS_TORN.load(Ordering::Relaxed) { b"\n" } else { b"" };
    for mut rest in [end, lines] {
        while !rest.is_empty() {
            match write(&stdout, rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    let (written, left) = rest.split_at_checked(count).unwrap_or((rest, b""));
                    IS_TORN.store(written.last() != Some(&b'\n'), Ordering::Relaxed);
                    rest = left;
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => wait_for_room(&stdout)?,
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    Ok(())
}

/// Waits as a write would. A reader that went away is room as well: the next write says so.
fn wait_for_room(stdout: &impl AsFd) -> io::Result<()> {
    match poll(&mut [PollFd::new(stdout.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// A disk may have room again; a reader that went away comes back with another pipe, for another process.
fn failure(error: &io::Error) -> Error {
    let problem = format!("standard output: {error}");
    match error.kind() {
        io::ErrorKind::BrokenPipe => Error::Gone(format!(
            "{problem}, nobody reads it any more. Remedy: start both again, the reader and pgoutbox"
        )),
        _ => Error::Broken(problem),
    }
}
