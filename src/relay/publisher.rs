//! Second station: items become runs, runs go to the broker, receipts go on in order.
//!
//! Runs form from what is there, without timers: one message when there is one, many when there are many. The trap: a
//! message behind a refused one is published already when the refusal comes. So after a session that the broker ended,
//! messages are proven one by one, up to the refused one if there was one: a message that stays refused costs one window of
//! duplicates, once.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{sleep, timeout};

use super::lease::Lease;
use super::progress::{self, Caution, Progress};
use super::reader::Read;
use super::{Error, Settings};
use crate::lsn::Lsn;
use crate::metrics::Metrics;
use crate::outbox::{self, Item, Message, Position};
use crate::retry::Retry;
use crate::sink::{self, Receipt, Sink};

/// Messages in one run: enough that a run's fixed cost vanishes, few enough that the first ones do not wait.
const RUN_MESSAGES: usize = 256;

/// With nothing to publish, the broker is asked this often whether it is still there: a relay must not hold a replication
/// connection while its broker is away.
const IDLE_CHECK: Duration = Duration::from_secs(5);

/// What is in flight: shares are taken by the publisher and given back by the settler.
#[derive(Clone)]
pub(super) struct Window {
    messages: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    messages_max: u32,
    bytes_max: u32,
}

/// A message's share of the window.
pub(super) struct Share {
    _messages: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

impl Window {
    pub(super) fn new(settings: &Settings) -> Self {
        let limit = |value: usize| u32::try_from(value.clamp(1, Semaphore::MAX_PERMITS)).unwrap_or(u32::MAX);
        let (messages_max, bytes_max) = (limit(settings.window_messages), limit(settings.window_bytes));
        Self {
            messages: Arc::new(Semaphore::new(messages_max as usize)),
            bytes: Arc::new(Semaphore::new(bytes_max as usize)),
            messages_max,
            bytes_max,
        }
    }

    fn share_of(&self, message: &Message) -> u32 {
        u32::try_from(message.bytes()).unwrap_or(u32::MAX).min(self.bytes_max)
    }

    fn try_take(&self, message: &Message) -> Option<Share> {
        let messages = self.messages.clone().try_acquire_owned().ok()?;
        let bytes = self.bytes.clone().try_acquire_many_owned(self.share_of(message)).ok()?;
        Some(Share { _messages: messages, _bytes: bytes })
    }

    async fn take(&self, message: &Message) -> Share {
        // Never closed.
        let messages = self.messages.clone().acquire_owned().await.expect("the window is never closed");
        let bytes = self.bytes.clone().acquire_many_owned(self.share_of(message)).await;
        Share { _messages: messages, _bytes: bytes.expect("the window is never closed") }
    }

    /// Waits until nothing is in flight.
    async fn empty(&self) {
        let all = self.messages.acquire_many(self.messages_max).await;
        drop(all.expect("the window is never closed"));
    }

    fn is_empty(&self) -> bool {
        self.messages.available_permits() == self.messages_max as usize
    }
}

/// A run on its way, as the settler sees it.
pub(super) struct Settling {
    pub(super) receipt: Option<Receipt>,
    pub(super) shares: Vec<Share>,
    pub(super) last: Option<Position>,
    /// Of the messages, microseconds since 1970.
    pub(super) committed_at: Vec<u64>,
    pub(super) bytes: usize,
    /// The last one in the run. It may have stood before some of the run's messages: settling later is always safe.
    pub(super) checkpoint: Option<Lsn>,
}

/// The second station.
pub(super) struct Publisher<'a, K> {
    /// Borrowed: receipts live no longer than their sink, and the settler goes on when the publisher is done.
    pub(super) sink: &'a mut K,
    pub(super) items: mpsc::Receiver<Read>,
    pub(super) runs: mpsc::Sender<Settling>,
    pub(super) window: Window,
    pub(super) progress: &'a Mutex<Progress>,
    pub(super) metrics: &'a Metrics,
    pub(super) lease: &'a Lease,
    pub(super) caution: Caution,
}

/// Items gathered for one call of the sink.
#[derive(Default)]
struct Run {
    messages: Vec<Message>,
    shares: Vec<Share>,
    committed_at: Vec<u64>,
    bytes: usize,
    positions: Vec<Position>,
    checkpoint: Option<Lsn>,
}

impl Run {
    fn add(&mut self, position: Position, message: Message, share: Share) {
        self.positions.push(position);
        self.committed_at.push(message.committed_at);
        self.bytes += message.bytes();
        self.messages.push(message);
        self.shares.push(share);
    }
}

impl<K: Sink> Publisher<'_, K> {
    /// Publishes until the channel ends. Returns a message's own impossibility, after which the rest settles in peace.
    pub(super) async fn run(mut self) -> Result<Option<Error>, Error> {
        let mut held = None;
        loop {
            let mut run = Run::default();
            let first = match held.take() {
                Some(item) => item,
                None => match timeout(IDLE_CHECK, self.items.recv()).await {
                    Ok(Some(read)) => read.item,
                    Ok(None) => return Ok(None),
                    Err(_) => {
                        self.check().await?;
                        continue;
                    }
                },
            };
            match first {
                Item::Checkpoint(lsn) => run.checkpoint = Some(lsn),
                Item::Message(position, message) => {
                    if let Err(error) = self.sink.admit(&message) {
                        return Ok(Some(at(position, error)));
                    }
                    let share = self.window.take(&message).await;
                    run.add(position, message, share);
                }
            }
            if !self.caution.is_on() {
                held = self.gather(&mut run);
            }
            match self.publish(run).await {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(Error::Sink(error)) if error.retry() == Retry::Never => return Ok(Some(error.into())),
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes what is there, as long as the window has room. Returns a message that found none, or that can never go: the
    /// next run begins with it, and what was before it is on its way.
    fn gather(&mut self, run: &mut Run) -> Option<Item> {
        while run.messages.len() < RUN_MESSAGES {
            match self.items.try_recv().ok()?.item {
                Item::Checkpoint(lsn) => run.checkpoint = Some(lsn),
                Item::Message(position, message) => {
                    let share = self.sink.admit(&message).ok().and_then(|()| self.window.try_take(&message));
                    match share {
                        Some(share) => run.add(position, message, share),
                        None => return Some(Item::Message(position, message)),
                    }
                }
            }
        }
        None
    }

    /// `false`: not any more, the stream is gone.
    async fn publish(&mut self, run: Run) -> Result<bool, Error> {
        let count = run.messages.len();
        let alone = run.messages.first().filter(|_| self.caution.is_on()).map(|message| message.id.clone());
        let receipt = if count > 0 {
            if !self.may_publish().await? {
                return Ok(false);
            }
            // Before it is: after a failure, any part of it may have arrived.
            self.note(&run.positions);
            Some(self.sink.publish(run.messages).await?)
        } else {
            None
        };
        self.metrics.published.inc_by(count as u64);
        self.metrics.in_flight_messages.inc_by(i64::try_from(count).unwrap_or(i64::MAX));
        self.metrics.in_flight_bytes.inc_by(i64::try_from(run.bytes).unwrap_or(i64::MAX));
        let settling = Settling {
            receipt,
            shares: run.shares,
            last: run.positions.last().copied(),
            committed_at: run.committed_at,
            bytes: run.bytes,
            checkpoint: run.checkpoint,
        };
        // The settler ends before us only by an error of its own, which ends the session.
        if self.runs.send(settling).await.is_err() {
            std::future::pending::<()>().await;
        }
        if let Some(id) = alone {
            self.window.empty().await;
            self.caution.proven(&id);
            if !self.caution.is_on() && self.metrics.taken() {
                tracing::info!(id, "the broker takes what it had refused; going on");
            }
        }
        Ok(true)
    }

    fn note(&self, positions: &[Position]) {
        let mut progress = progress::lock(self.progress);
        positions.iter().for_each(|position| progress.publish(*position));
    }

    /// Waits while Postgres is silent; the reader ends the session if it stays so.
    async fn may_publish(&self) -> Result<bool, Error> {
        const LOOK_AGAIN: Duration = Duration::from_millis(20);
        self.lease.beat()?;
        while !self.lease.is_over() && !self.lease.is_fresh() {
            sleep(LOOK_AGAIN).await;
            self.lease.beat()?;
        }
        Ok(!self.lease.is_over())
    }

    /// With messages in flight their confirms are the proof; while blocked a proof is impossible and known to be.
    async fn check(&mut self) -> Result<(), Error> {
        if self.window.is_empty() && !self.metrics.is_blocked() {
            self.sink.check().await?;
        }
        Ok(())
    }
}

/// What no broker can take is a row's fault, and only here is known which row's.
fn at(position: Position, error: sink::Error) -> Error {
    match error {
        sink::Error::Undeliverable { id, problem } => outbox::Error::Row { position, id, problem }.into(),
        error => error.into(),
    }
}
