//! Second station: items become runs, runs go to the broker, receipts go on in order.
//!
//! Runs form from what is there, without timers: one message when there is one, many when there are many. The trap: a
//! message behind a refused one is published already when the refusal comes. So after a session that the broker ended,
//! messages are proven one by one, up to the refused one if there was one: a message that stays refused costs one window of
//! duplicates, once.

use std::sync::Mutex;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};

use super::backlog::Backlog;
use super::lease::Lease;
use super::progress::{self, Progress};
use super::window::{Need, Share, Window};
use super::{Error, channel};
use crate::lsn::Lsn;
use crate::metrics::{self, Metrics};
use crate::outbox::{self, Item, Message, Position};
use crate::retry::Retry;
use crate::sink::{self, Receipt, Sink};

/// Messages in one run: enough that a run's fixed cost vanishes, few enough that the first ones do not wait.
const RUN_MESSAGES: usize = 256;

/// With nothing to publish, the broker is asked this often whether it would take a message: a relay must not hold a
/// replication connection while its broker is away. Checkpoints of other tables' transactions are nothing to publish.
const IDLE_CHECK: Duration = Duration::from_secs(5);

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
    pub(super) channel: channel::Receiver,
    pub(super) runs: mpsc::Sender<Settling>,
    pub(super) window: Window,
    pub(super) progress: &'a Mutex<Progress>,
    pub(super) metrics: &'a Metrics,
    pub(super) lease: &'a Lease,
    pub(super) backlog: Backlog,
    /// When the broker was last asked, or given something.
    pub(super) asked: Instant,
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
    /// With room for so many: a vector that grows step by step moves its messages at each.
    fn of(messages: usize) -> Self {
        Self {
            messages: Vec::with_capacity(messages),
            committed_at: Vec::with_capacity(messages),
            positions: Vec::with_capacity(messages),
            ..Self::default()
        }
    }

    fn add(&mut self, position: Position, message: Message, bytes: usize) {
        self.positions.push(position);
        self.committed_at.push(message.committed_at);
        self.bytes += bytes;
        self.messages.push(message);
    }
}

impl<K: Sink> Publisher<'_, K> {
    /// Publishes until the channel ends. Returns a message's own impossibility, after which the rest settles in peace.
    pub(super) async fn run(mut self) -> Result<Option<Error>, Error> {
        let (mut held, mut last) = (None, 0);
        loop {
            // About as many as last time.
            let mut run = Run::of(last);
            let first = match held.take() {
                Some(item) => item,
                None => match self.next().await? {
                    Some(item) => item,
                    None => return Ok(None),
                },
            };
            match first {
                Item::Checkpoint(lsn) => run.checkpoint = Some(lsn),
                Item::Message(position, message) => {
                    if let Err(error) = self.sink.admit(&message) {
                        return Ok(Some(at(position, error)));
                    }
                    let bytes = message.bytes();
                    run.shares.push(self.window.take(self.window.with(Need::default(), bytes)).await);
                    run.add(position, message, bytes);
                }
            }
            if !self.is_cautious() {
                held = self.gather(&mut run).await;
            }
            last = run.messages.len();
            match self.publish(run).await {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(Error::Sink(error)) if error.retry() == Retry::Never => return Ok(Some(error.into())),
                Err(error) => return Err(error),
            }
        }
    }

    /// The next item; `None` when there will be none. A broker that goes meanwhile is noticed here when nothing is in
    /// flight: with something in flight its receipt says so, after those before it.
    async fn next(&mut self) -> Result<Option<Item>, Error> {
        loop {
            // Biased: an item is no reason to overlook an end that is known. All are cancel-safe.
            tokio::select! {
                biased;
                error = self.sink.failed(), if self.window.is_empty() => return Err(error.into()),
                item = self.channel.next() => return Ok(item),
                () = sleep_until(self.asked + IDLE_CHECK) => {
                    self.backlog.none();
                    self.check().await?;
                }
            }
        }
    }

    /// Takes what is there, as long as the window has room. Returns a message that found none, that can never go, or that
    /// stands behind a checkpoint with which the run began, and which waits for nothing that comes after it: the next run
    /// begins with it, and what was before it is on its way.
    async fn gather(&mut self, run: &mut Run) -> Option<Item> {
        let (mut need, room) = (Need::default(), self.window.room());
        let mut left = None;
        let begins_with_checkpoint = run.messages.is_empty();
        while run.messages.len() < RUN_MESSAGES && left.is_none() {
            match self.channel.next_here() {
                None => break,
                Some(Item::Checkpoint(lsn)) => run.checkpoint = Some(lsn),
                Some(Item::Message(position, message)) => {
                    let bytes = message.bytes();
                    let more = self.window.with(need, bytes);
                    if !begins_with_checkpoint && more.fits(room) && self.sink.admit(&message).is_ok() {
                        need = more;
                        run.add(position, message, bytes);
                    } else {
                        left = Some(Item::Message(position, message));
                    }
                }
            }
        }
        // At once: it was seen to be free, and nobody else takes.
        run.shares.push(self.window.take(need).await);
        left
    }

    /// `false`: not any more, the stream is gone.
    async fn publish(&mut self, run: Run) -> Result<bool, Error> {
        let count = run.messages.len();
        metrics::ages(run.committed_at.get(..1).unwrap_or_default()).for_each(|age| self.backlog.sees(count, age));
        let alone = run.messages.first().filter(|_| self.is_cautious()).map(|message| message.id.clone());
        let receipt = if count > 0 {
            if !self.may_publish().await? {
                return Ok(false);
            }
            // Before it is: after a failure, any part of it may have arrived.
            self.note(&run.positions);
            self.asked = Instant::now();
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
            let is_still_on = progress::lock(self.progress).proven(&id);
            if !is_still_on && self.metrics.taken() {
                tracing::info!(id = %id.escape_debug(), "the broker takes what it had refused; going on");
            }
        }
        Ok(true)
    }

    fn is_cautious(&self) -> bool {
        progress::lock(self.progress).caution().is_on()
    }

    fn note(&self, positions: &[Position]) {
        let mut progress = progress::lock(self.progress);
        positions.iter().for_each(|position| progress.publish(*position));
    }

    /// Waits while Postgres is silent; the reader ends the session if it stays so.
    async fn may_publish(&self) -> Result<bool, Error> {
        const LOOK_AGAIN: Duration = Duration::from_millis(20);
        while !self.lease.is_over() {
            self.lease.beat()?;
            if self.lease.is_fresh() {
                return Ok(true);
            }
            sleep(LOOK_AGAIN).await;
        }
        Ok(false)
    }

    /// With messages in flight their confirms are the proof; while blocked a proof is impossible and known to be.
    async fn check(&mut self) -> Result<(), Error> {
        self.asked = Instant::now();
        if self.window.is_empty() && !self.metrics.is_blocked() {
            self.sink.check().await?;
        }
        Ok(())
    }
}

/// What no broker can take is a row's fault, and only here is known which row's.
fn at(position: Position, error: sink::Error) -> Error {
    match error {
        sink::Error::Undeliverable { id, problem } => {
            // A log has one line for it, whatever it holds.
            outbox::Error::Row { position, id: id.escape_debug().to_string(), problem }.into()
        }
        error => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::time::timeout;

    use super::*;
    use crate::metrics::Metrics;
    use crate::relay::Settings;

    /// A broker that goes after a second, and would not be asked in vain before.
    struct Going(Instant);

    impl Sink for Going {
        async fn publish(&mut self, _run: Vec<Message>) -> Result<Receipt, sink::Error> {
            Ok(Receipt::new(std::future::ready(Ok(()))))
        }

        async fn failed(&mut self) -> sink::Error {
            sleep_until(self.0 + Duration::from_secs(1)).await;
            sink::Error::Broken("it went".to_owned())
        }

        async fn check(&mut self) -> Result<(), sink::Error> {
            panic!("asked after {:?}", self.0.elapsed());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_broker_that_goes_ends_an_idle_session_at_once() {
        let metrics = Arc::new(Metrics::new());
        let settings = Settings {
            window_messages: 10,
            window_messages_min: 10,
            window_bytes: 1000,
            confirm_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(30),
            give_up_after: None,
        };
        let (channel_in, channel) = channel::channel();
        let (runs, _settler) = mpsc::channel(10);
        let lease = Lease::new(Duration::from_secs(60));
        let publisher = Publisher {
            sink: &mut Going(Instant::now()),
            channel,
            runs,
            window: Window::new(&settings, &metrics),
            progress: &Mutex::default(),
            metrics: &metrics,
            lease: &lease,
            backlog: Backlog::default(),
            asked: Instant::now(),
        };
        let ended = timeout(Duration::from_secs(2), publisher.run()).await.expect("it is noticed");
        assert!(matches!(ended, Err(Error::Sink(sink::Error::Broken(_)))), "{ended:?}");
        drop(channel_in);
    }
}
