//! Standard error, for the log and for what is said at the end.
//!
//! The trap: a pipe that is open and that nobody reads takes some kilobytes, and then the next line waits for ever, and the
//! relay with it. So a line is written when that does not wait; else it is lost, counted, and told when lines go again.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// `PIPE_BUF`: what a pipe that is ready takes without waiting.
const PIECE_BYTES: usize = 4096;

/// For a reader that is only slow; in milliseconds.
const PATIENCE: u16 = 200;

/// Lines since the last one that was taken.
static LOST: AtomicU64 = AtomicU64::new(0);

static IS_JSON: AtomicBool = AtomicBool::new(false);

/// How the log looks from now on.
pub(super) fn be_json(is_json: bool) {
    IS_JSON.store(is_json, Ordering::Relaxed);
}

/// Standard error as lines; each is written whole or not at all, unless it is longer than a pipe takes at once.
#[derive(Debug)]
pub(super) struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // Who was waited for in vain is not waited for again.
        let lost = LOST.load(Ordering::Relaxed);
        let mut patience = if lost == 0 { PATIENCE } else { 0 };
        let said = if lost == 0 { Vec::new() } else { note(lost) };
        let mut out = io::stderr().lock();
        for piece in said.chunks(PIECE_BYTES).chain(line.chunks(PIECE_BYTES)) {
            if !is_ready(&out, patience) {
                LOST.fetch_add(1, Ordering::Relaxed);
                return Ok(line.len());
            }
            out.write_all(piece)?;
            patience = PATIENCE;
        }
        LOST.fetch_sub(lost, Ordering::Relaxed);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A pipe whose reader is gone is ready as well: the write says what is wrong. A signal that ends the wait, such as SIGTERM,
/// has not made it ready: who wrote then would wait after all, and never stop.
fn is_ready(file: &impl AsFd, milliseconds: u16) -> bool {
    let mut file = [PollFd::new(file.as_fd(), PollFlags::POLLOUT)];
    poll(&mut file, PollTimeout::from(milliseconds)).is_ok_and(|count| count > 0)
}

fn note(lost: u64) -> Vec<u8> {
    let said = format!("{lost} lines of the log are lost: nobody took them");
    let line = if IS_JSON.load(Ordering::Relaxed) {
        format!("{{\"level\":\"WARN\",\"message\":\"{said}\"}}\n")
    } else {
        format!("WARN {said}\n")
    };
    line.into_bytes()
}
