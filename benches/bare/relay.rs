//! The bare relay: rows to frames, frames to the broker, confirms to Postgres, in one thread and one loop.
//!
//! The trap: whoever wakes up for every row makes the walsender and the broker wake up for every row as well. A turn takes
//! all that is there, writes it in one call, and only then sleeps.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::amqp::{Publisher, Transaction};
use super::postgres::{EPOCH_MICROSECONDS, Frame, Stream, row, u64_at};

/// Statuses under load; each may cost Postgres a write to disk.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);
/// And when all is settled.
const STATUS_INTERVAL_IDLE: Duration = Duration::from_millis(100);

pub(crate) struct Relay {
    pub(crate) stream: Stream,
    pub(crate) publisher: Publisher,
    /// Messages in flight, at most.
    pub(crate) window: usize,
    transaction: Transaction,
    seq: u64,
    is_open: bool,
    /// Positions, and the last tag before each.
    checkpoints: VecDeque<(u64, u64)>,
    settled: u64,
    told: u64,
    told_at: Instant,
    reply_requested: bool,
}

impl Relay {
    pub(crate) fn new(stream: Stream, publisher: Publisher, window: usize) -> Self {
        Self {
            stream,
            publisher,
            window,
            transaction: Transaction { lsn: String::new(), timestamp: 0 },
            seq: 0,
            is_open: false,
            checkpoints: VecDeque::new(),
            settled: 0,
            told: 0,
            told_at: Instant::now(),
            reply_requested: false,
        }
    }

    /// For ever.
    pub(crate) fn run(mut self) {
        loop {
            let is_hungry = self.relay();
            self.publisher.connection.socket.write();
            self.settle();
            let timeout = self.tell();
            self.wait(is_hungry, timeout);
        }
    }

    /// Makes frames of the rows that are here, as far as the window goes. Whether more rows could be used.
    fn relay(&mut self) -> bool {
        while self.publisher.in_flight() < self.window && self.publisher.connection.socket.has_room() {
            match self.stream.next() {
                None => return true,
                Some(Frame::Keepalive { wal_end, reply_requested }) => {
                    self.reply_requested |= reply_requested;
                    if !self.is_open {
                        self.checkpoints.push_back((self.publisher.published(), wal_end));
                    }
                }
                Some(Frame::Change(change)) => match change[0] {
                    b'I' => {
                        self.publisher.publish(&row(change), &self.transaction, self.seq);
                        self.seq += 1;
                    }
                    b'B' => {
                        let lsn = u64_at(change, 1);
                        let timestamp = (u64_at(change, 9) + EPOCH_MICROSECONDS) / 1_000_000;
                        self.transaction =
                            Transaction { lsn: format!("{:X}/{:X}", lsn >> 32, lsn & 0xffff_ffff), timestamp };
                        (self.seq, self.is_open) = (0, true);
                    }
                    b'C' => {
                        self.checkpoints.push_back((self.publisher.published(), u64_at(change, 10)));
                        self.is_open = false;
                    }
                    _ => {}
                },
            }
        }
        false
    }

    fn settle(&mut self) {
        while let Some((tag, lsn)) = self.checkpoints.front().copied()
            && tag <= self.publisher.settled()
        {
            self.settled = lsn;
            self.checkpoints.pop_front();
        }
    }

    /// Tells Postgres, if it is time; else until when.
    fn tell(&mut self) -> Option<Duration> {
        if self.settled <= self.told && !self.reply_requested {
            return None;
        }
        let is_idle = self.publisher.in_flight() == 0;
        let interval = if is_idle { STATUS_INTERVAL_IDLE } else { STATUS_INTERVAL };
        let since = self.told_at.elapsed();
        if since < interval {
            return Some(interval - since);
        }
        self.stream.tell(self.settled);
        (self.told, self.told_at, self.reply_requested) = (self.settled, Instant::now(), false);
        None
    }

    /// Until one of the sockets moves, and takes what it has.
    fn wait(&mut self, is_hungry: bool, timeout: Option<Duration>) {
        let broker = &self.publisher.connection.socket;
        let to_broker = if broker.has_output() { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
        let from_postgres = if is_hungry { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut sockets = [
            PollFd::new(broker.stream.as_fd(), to_broker),
            PollFd::new(self.stream.socket.stream.as_fd(), from_postgres),
        ];
        let timeout = timeout.map_or(PollTimeout::NONE, |timeout| {
            PollTimeout::try_from(timeout + Duration::from_millis(1)).expect("a second is short")
        });
        poll(&mut sockets, timeout).expect("both sockets are open");
        let [broker_has, postgres_has] =
            sockets.map(|socket| socket.revents().is_some_and(|events| events.intersects(PollFlags::POLLIN)));
        if broker_has {
            self.publisher.hear();
        }
        if postgres_has {
            self.stream.socket.read();
        }
    }
}
