//! The walsender alone: a reader that counts rows and throws them away.

use std::os::fd::AsFd;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::postgres::{Frame, Stream};

/// Reads so many rows; the seconds from the first to the last, and how many came after the first look.
pub(crate) fn run(mut stream: Stream, rows: u64) -> (f64, u64) {
    let mut count = 0;
    let mut first = None;
    while count < rows {
        let mut sockets = [PollFd::new(stream.socket.stream.as_fd(), PollFlags::POLLIN)];
        poll(&mut sockets, PollTimeout::NONE).expect("the socket is open");
        stream.socket.read();
        while let Some(frame) = stream.next() {
            match frame {
                Frame::Change(change) => count += u64::from(change[0] == b'I'),
                // Nothing is settled, so nothing is told; but we are alive.
                Frame::Keepalive { reply_requested: true, .. } => stream.tell(0),
                Frame::Keepalive { .. } => {}
            }
        }
        if count > 0 {
            first.get_or_insert((Instant::now(), count));
        }
    }
    let (began, before) = first.expect("rows came");
    (began.elapsed().as_secs_f64(), count - before)
}
