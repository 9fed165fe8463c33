//! One direction of one connection: read, inspect, spoil, write.
//!
//! The traps. A toxic must act in the middle of a frame that is being written slowly, so every piece looks again. And a
//! frame counts as delivered only if it is really written: one that is swallowed, held or cut is not inspected on its way to
//! the relay, or a confirm that never came would count as settled.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use super::{Direction, Kind, Protocol};

/// What is wrong with the network.
#[derive(Clone, Debug, Default)]
pub(crate) struct Toxics {
    /// One way, in each direction; the order is kept.
    pub(crate) latency: Duration,
    /// Bytes a second of each connection, towards the server.
    pub(crate) bandwidth_up: Option<u32>,
    /// Bytes a second of each connection, towards the relay.
    pub(crate) bandwidth_down: Option<u32>,
    /// Bytes towards the server vanish; sockets stay open.
    pub(crate) black_hole_up: bool,
    /// Bytes towards the relay vanish; sockets stay open.
    pub(crate) black_hole_down: bool,
    /// At most so many bytes a write.
    pub(crate) slice: Option<usize>,
    /// Resets each connection after so many more bytes towards the relay, wherever in a frame that falls.
    pub(crate) reset_after: Option<u64>,
    /// AMQP: `basic.ack` and `basic.nack` wait, all else passes.
    pub(crate) hold_confirms: bool,
    /// AMQP: resets a connection instead of forwarding the n-th next `basic.ack` or `basic.nack` frame, once.
    pub(crate) cut_before_confirm: Option<u64>,
    /// Postgres: statuses wait, all else passes.
    pub(crate) hold_statuses: bool,
    /// Postgres: resets a connection instead of forwarding the n-th next status, once.
    pub(crate) cut_before_status: Option<u64>,
}

impl Toxics {
    fn swallows(&self, direction: Direction) -> bool {
        match direction {
            Direction::Up => self.black_hole_up,
            Direction::Down => self.black_hole_down,
        }
    }

    fn holds(&self, kind: Kind) -> bool {
        (kind == Kind::Confirm && self.hold_confirms) || (kind == Kind::Status && self.hold_statuses)
    }

    fn bandwidth(&self, direction: Direction) -> Option<u32> {
        match direction {
            Direction::Up => self.bandwidth_up,
            Direction::Down => self.bandwidth_down,
        }
    }
}

/// The toxics in force, and the how many-th they are.
#[derive(Clone, Debug, Default)]
pub(crate) struct Setting {
    pub(crate) generation: u64,
    pub(crate) toxics: Toxics,
}

/// Frames still to be forwarded before the cut, counted over all connections of a link. 0: no cut.
#[derive(Default)]
pub(crate) struct Countdowns {
    confirms: AtomicU64,
    statuses: AtomicU64,
}

impl Countdowns {
    pub(crate) fn set(&self, toxics: &Toxics) {
        self.confirms.store(toxics.cut_before_confirm.unwrap_or(0), Ordering::SeqCst);
        self.statuses.store(toxics.cut_before_status.unwrap_or(0), Ordering::SeqCst);
    }

    fn is_over(&self, kind: Kind) -> bool {
        let left = match kind {
            Kind::Confirm => &self.confirms,
            Kind::Status => &self.statuses,
            Kind::Other => return false,
        };
        left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) == Ok(1)
    }
}

/// Both sockets are to be reset.
pub(crate) struct Reset;

/// More is not read before some of it is written.
const QUEUE_BYTES_MAX: usize = 1 << 20;

/// A slow write goes in so many pieces a second.
const PIECES_A_SECOND: u32 = 20;

pub(crate) struct Flow<'a> {
    direction: Direction,
    from: ReadHalf<'a>,
    to: WriteHalf<'a>,
    protocol: &'a Mutex<Box<dyn Protocol>>,
    countdowns: &'a Countdowns,
    setting: watch::Receiver<Setting>,
    toxics: Toxics,
    generation: u64,
    /// Frames and when they may go on.
    queue: VecDeque<(Instant, Bytes)>,
    queue_bytes: usize,
    held: VecDeque<Bytes>,
    /// Bytes left before a reset.
    budget: Option<u64>,
    /// Bytes were swallowed.
    lost: bool,
}

impl<'a> Flow<'a> {
    pub(crate) fn new(
        direction: Direction,
        from: ReadHalf<'a>,
        to: WriteHalf<'a>,
        protocol: &'a Mutex<Box<dyn Protocol>>,
        countdowns: &'a Countdowns,
        setting: watch::Receiver<Setting>,
    ) -> Self {
        let (queue, held) = (VecDeque::new(), VecDeque::new());
        let (toxics, generation) = (Toxics::default(), u64::MAX);
        Self {
            direction,
            from,
            to,
            protocol,
            countdowns,
            setting,
            toxics,
            generation,
            queue,
            queue_bytes: 0,
            held,
            budget: None,
            lost: false,
        }
    }

    /// Until the peer has said all it had to say.
    pub(crate) async fn run(mut self) -> Result<(), Reset> {
        let mut incoming = BytesMut::new();
        let mut ended = false;
        self.retune()?;
        loop {
            // An end vanishes in a black hole as everything does.
            if ended && self.queue.is_empty() && !self.lost && !self.toxics.swallows(self.direction) {
                return self.to.shutdown().await.map_err(|_| Reset);
            }
            let due = self.queue.front().map(|(due, _)| *due);
            // Biased: toxics act at once; then what is due goes before more is read. All are cancel-safe.
            tokio::select! {
                biased;
                changed = self.setting.changed() => {
                    changed.map_err(|_| Reset)?;
                    self.retune()?;
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    if let Some((_, frame)) = self.queue.pop_front() {
                        self.queue_bytes -= frame.len();
                        self.forward(frame).await?;
                    }
                }
                read = self.from.read_buf(&mut incoming), if !ended && self.queue_bytes < QUEUE_BYTES_MAX => {
                    ended = read.map_err(|_| Reset)? == 0;
                    self.take(&mut incoming, ended);
                }
            }
        }
    }

    /// The toxics have changed.
    fn retune(&mut self) -> Result<(), Reset> {
        let setting = self.setting.borrow_and_update().clone();
        self.toxics = setting.toxics;
        if setting.generation != self.generation {
            self.generation = setting.generation;
            self.budget = self.toxics.reset_after.filter(|_| self.direction == Direction::Down);
        }
        if self.lost && !self.toxics.swallows(self.direction) {
            return Err(Reset);
        }
        let latest = Instant::now() + self.toxics.latency;
        for (due, _) in &mut self.queue {
            *due = latest.min(*due);
        }
        if !self.toxics.holds(Kind::Confirm) && !self.toxics.holds(Kind::Status) {
            while let Some(frame) = self.held.pop_back() {
                self.queue_bytes += frame.len();
                self.queue.push_front((Instant::now(), frame));
            }
        }
        Ok(())
    }

    /// Cuts what was read into frames.
    fn take(&mut self, incoming: &mut BytesMut, ended: bool) {
        let due = Instant::now() + self.toxics.latency;
        let mut protocol = self.protocol.lock().unwrap();
        while let Some(frame) = protocol.split(self.direction, incoming) {
            if self.direction == Direction::Up {
                // What the relay says it has said, whether it arrives or not.
                protocol.inspect(Direction::Up, &frame);
            }
            self.queue_bytes += frame.len();
            self.queue.push_back((due, frame));
        }
        if ended && !incoming.is_empty() {
            self.queue_bytes += incoming.len();
            self.queue.push_back((due, incoming.split().freeze()));
        }
    }

    async fn forward(&mut self, frame: Bytes) -> Result<(), Reset> {
        let kind = self.protocol.lock().unwrap().kind(self.direction, &frame);
        if self.toxics.holds(kind) {
            self.held.push_back(frame);
            return Ok(());
        }
        if self.toxics.swallows(self.direction) {
            self.lost = true;
            return Ok(());
        }
        if self.countdowns.is_over(kind) {
            return Err(Reset);
        }
        let is_whole = self.budget.is_none_or(|budget| budget >= frame.len() as u64);
        if self.direction == Direction::Down && is_whole {
            self.protocol.lock().unwrap().inspect(Direction::Down, &frame);
        }
        self.write(&frame).await
    }

    async fn write(&mut self, mut rest: &[u8]) -> Result<(), Reset> {
        while !rest.is_empty() {
            if self.setting.has_changed().map_err(|_| Reset)? {
                self.retune()?;
            }
            if self.toxics.swallows(self.direction) {
                self.lost = true;
                return Ok(());
            }
            let rate = self.toxics.bandwidth(self.direction).map(|rate| rate.max(1));
            let mut size = rest.len().min(self.toxics.slice.unwrap_or(usize::MAX).max(1));
            if let Some(rate) = rate {
                size = size.min((rate / PIECES_A_SECOND).max(1) as usize);
            }
            if let Some(budget) = &mut self.budget {
                size = size.min(usize::try_from(*budget).unwrap_or(usize::MAX));
                *budget -= size as u64;
            }
            if size == 0 {
                return Err(Reset);
            }
            let (piece, after) = rest.split_at(size);
            self.to.write_all(piece).await.map_err(|_| Reset)?;
            rest = after;
            self.pause(rate, size).await;
        }
        Ok(())
    }

    /// Keeps the pace, until the toxics change.
    async fn pause(&self, rate: Option<u32>, size: usize) {
        if let Some(rate) = rate {
            let mut setting = self.setting.clone();
            tokio::select! {
                biased;
                _ = setting.changed() => {}
                () = sleep(Duration::from_secs_f64(size as f64 / f64::from(rate))) => {}
            }
        } else if self.toxics.slice.is_some() {
            tokio::task::yield_now().await;
        }
    }
}
