//! First station: the stream becomes items in the channel, and the settled position goes back to Postgres.
//!
//! The traps. Status goes out on its own timer, also while the channel is full and nothing is read, or the server takes us
//! for dead in the middle of a large transaction. A reply to every keepalive at once makes a stopping server send the next
//! one at once, hundreds of thousands in seconds, so replies keep a distance. And what is told is what came out of the
//! settler, never what was read.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::lease::Lease;
use super::{Error, Progress, Source, progress, stopped};
use crate::lsn::Lsn;
use crate::metrics::Metrics;
use crate::outbox::{self, Assembler, Item};
use crate::pg::replication::{Event, Status};
use crate::retry::Retry;

/// Two statuses are at least so far apart. It bounds what a `kill -9` re-sends: messages settled but not yet told.
const STATUS_INTERVAL: Duration = Duration::from_millis(100);

/// Bytes of messages between reader and publisher; a larger one goes alone.
const CHANNEL_BYTES: usize = 2 * 1024 * 1024;

/// When the stream breaks, what is in flight is given so long to settle: a broker that answers takes less.
pub(super) const SETTLE_WITHIN: Duration = Duration::from_secs(10);

/// An item in the channel, holding its share of the channel's bytes until the publisher takes it.
pub(super) struct Read {
    pub(super) item: Item,
    pub(super) _share: Option<OwnedSemaphorePermit>,
}

/// The first station.
pub(super) struct Reader<'a, S> {
    /// `None`: let go.
    pub(super) source: Option<S>,
    /// Why the stream cannot go on, now or later.
    pub(super) fatal: Option<crate::pg::Error>,
    /// Becomes true when a stopping server waits for us to let go.
    pub(super) release: watch::Receiver<bool>,
    pub(super) assembler: Assembler,
    pub(super) settled: watch::Receiver<Lsn>,
    pub(super) progress: &'a Mutex<Progress>,
    /// What an earlier session settled already.
    pub(super) before: Progress,
    pub(super) metrics: &'a Metrics,
    pub(super) silence_max: Duration,
    pub(super) lease: &'a Lease,
    pub(super) feedback: Feedback,
}

/// When to tell Postgres what.
pub(super) struct Feedback {
    received: Lsn,
    told: Lsn,
    last: Instant,
    reply_requested: bool,
    heard: Instant,
}

impl Feedback {
    pub(super) fn new(start: Lsn) -> Self {
        Self { received: start, told: start, last: Instant::now(), reply_requested: false, heard: Instant::now() }
    }

    /// When the next status goes out: soon when there is something to say, else often enough to stay alive.
    fn due(&self, settled: Lsn, silence_max: Duration) -> Instant {
        let has_news = settled > self.told || self.reply_requested;
        self.last + if has_news { STATUS_INTERVAL } else { silence_max / 3 }
    }
}

impl<S: Source> Reader<'_, S> {
    /// Reads until told to stop (then to the end of the open transaction), until a row cannot be delivered, or until the
    /// publisher wants no more; then waits for the settler.
    ///
    /// Returns why it stopped, if not because it was told to.
    pub(super) async fn run(
        &mut self,
        items: mpsc::Sender<Read>,
        stop: &mut watch::Receiver<bool>,
    ) -> Result<Option<Error>, Error> {
        let reason = match self.read(&items, stop).await {
            Err(Error::Postgres(error)) if error.retry() == Retry::Never => {
                // Whatever the broker says meanwhile, this is the reason.
                self.fatal = Some(error);
                drop(items);
                return match timeout(SETTLE_WITHIN, self.drain()).await {
                    Ok(drained) => drained.map(|()| None),
                    Err(_) => Err(crate::pg::Error::NotNow("what is in flight did not settle".to_owned()).into()),
                };
            }
            Err(Error::Postgres(error)) => {
                // Nothing can be told any more, but what settles now is not published again.
                self.lease.end();
                self.source = None;
                drop(items);
                let _ = timeout(SETTLE_WITHIN, self.settle()).await;
                return Err(error.into());
            }
            reason => reason?,
        };
        // The publisher sees the channel end, publishes what is in it and ends; so does the settler.
        drop(items);
        self.drain().await?;
        Ok(reason)
    }

    /// Waits until the settler has ended.
    async fn settle(&mut self) {
        while self.settled.changed().await.is_ok() {}
    }

    /// Tells the last status and ends the stream. Also when the broker ended the session: what it settled in the last
    /// moments is told, and the slot is free for the next session at once.
    pub(super) async fn finish(mut self) -> Result<(), Error> {
        let status = self.status(false);
        self.note(status);
        match self.source {
            Some(source) => Ok(source.finish(status).await?),
            None => Ok(()),
        }
    }

    async fn read(
        &mut self,
        items: &mpsc::Sender<Read>,
        stop: &mut watch::Receiver<bool>,
    ) -> Result<Option<Error>, Error> {
        let bytes = Arc::new(Semaphore::new(CHANNEL_BYTES));
        let mut pending: Option<Item> = None;
        let mut is_stopping = false;
        let timer = sleep_until(Instant::now());
        let mut timer = std::pin::pin!(timer);
        loop {
            if is_stopping && pending.is_none() && !self.assembler.in_transaction() {
                return Ok(None);
            }
            self.lease.listen(pending.is_none());
            let settled = *self.settled.borrow_and_update();
            let due = self.feedback.due(settled, self.silence_max);
            if timer.deadline() != due {
                timer.as_mut().reset(due);
            }
            // Biased: the timer first, so that a busy stream cannot starve it; then stop and release; then progress, which
            // only moves the timer; then either the item that waits for room or, with none waiting, the next event. All
            // are cancel-safe.
            tokio::select! {
                biased;
                () = timer.as_mut() => {
                    self.lease.beat()?;
                    self.tell(pending.is_some()).await?;
                }
                () = stopped(stop), if !is_stopping => is_stopping = true,
                () = stopped(&mut self.release) => {
                    return Err(crate::pg::Error::NotNow("let go of a stopping server".to_owned()).into());
                }
                changed = self.settled.changed(), if settled <= self.feedback.told => {
                    if changed.is_err() {
                        return Ok(None);
                    }
                }
                sent = send(items, &bytes, pending.as_ref()), if pending.is_some() => {
                    let Some((room, share)) = sent else { return Ok(None) };
                    if let Some(item) = pending.take() {
                        room.send(Read { item, _share: share });
                    }
                    // Nothing was heard because nothing was read.
                    self.feedback.heard = Instant::now();
                }
                event = next(self.source.as_mut()), if pending.is_none() => {
                    self.hear()?;
                    match self.item(event?).await {
                        Ok(item) => pending = item,
                        // The row stays where it is; what came before it is settled and told.
                        Err(Error::Outbox(error)) if error.retry() == Retry::Never => {
                            return Ok(Some(error.into()));
                        }
                        Err(error) => return Err(error),
                    }
                }
            }
        }
    }

    fn hear(&mut self) -> Result<(), Error> {
        self.feedback.heard = Instant::now();
        self.lease.beat()?;
        self.lease.hear();
        Ok(())
    }

    /// Waits until the settler has ended, and stays alive for the server meanwhile.
    async fn drain(&mut self) -> Result<(), Error> {
        self.lease.listen(false);
        loop {
            let settled = *self.settled.borrow_and_update();
            let due = self.feedback.due(settled, self.silence_max);
            tokio::select! {
                biased;
                () = sleep_until(due) => {
                    self.lease.beat()?;
                    self.tell(true).await?;
                }
                changed = self.settled.changed() => if changed.is_err() { return Ok(()) },
                () = stopped(&mut self.release), if self.source.is_some() => self.source = None,
            }
        }
    }

    async fn item(&mut self, event: Event) -> Result<Option<Item>, Error> {
        let item = match event {
            Event::Data(bytes) => match self.assembler.change(bytes.clone()) {
                Err(outbox::Error::UnknownTable { .. }) => {
                    // A partition that came after the stream began, or a table that is gone: the catalog knows.
                    if let Some(source) = &mut self.source {
                        self.assembler.set_tables(source.tables().await?);
                    }
                    self.assembler.change(bytes)?
                }
                item => item?,
            },
            Event::Keepalive { wal_end, reply_requested } => {
                self.feedback.reply_requested |= reply_requested;
                self.assembler.keepalive(wal_end)?
            }
        };
        if let Some(Item::Checkpoint(lsn)) = &item {
            self.feedback.received = self.feedback.received.max(*lsn);
            self.metrics.received_lsn.set(as_gauge(*lsn));
        }
        Ok(item.filter(|item| match item {
            Item::Message(position, _) => !self.before.has(*position),
            Item::Checkpoint(_) => true,
        }))
    }

    /// Tells Postgres; and finds out whether it is still there, unless we are the ones who do not listen.
    async fn tell(&mut self, is_full: bool) -> Result<(), Error> {
        let silent = self.feedback.heard.elapsed();
        if !is_full && silent > self.silence_max {
            return Err(crate::pg::Error::Timeout { during: "streaming", after: self.silence_max }.into());
        }
        let heard = if is_full { Instant::now() } else { self.feedback.heard };
        self.metrics.heard(heard, self.silence_max);
        let status = self.status(!is_full && silent >= self.silence_max / 4);
        self.note(status);
        match &mut self.source {
            Some(source) => Ok(source.tell(status).await?),
            None => Ok(()),
        }
    }

    fn status(&mut self, reply_requested: bool) -> Status {
        let settled = (*self.settled.borrow()).max(self.feedback.told);
        Status { received: self.feedback.received.max(settled), settled, reply_requested }
    }

    /// Before it is written: a status that may have arrived counts as told.
    fn note(&mut self, status: Status) {
        progress::lock(self.progress).tell(status.settled);
        self.metrics.confirmed_lsn.set(as_gauge(status.settled));
        self.feedback.told = status.settled;
        self.feedback.last = Instant::now();
        self.feedback.reply_requested = false;
    }
}

/// Room for the item in the channel, in bytes and in messages; `None` when the publisher wants no more. Cancel-safe: what
/// was got is given back.
async fn send<'a>(
    items: &'a mpsc::Sender<Read>,
    bytes: &Arc<Semaphore>,
    pending: Option<&Item>,
) -> Option<(mpsc::Permit<'a, Read>, Option<OwnedSemaphorePermit>)> {
    let share = match pending {
        Some(Item::Message(_, message)) => {
            let share = message.bytes().min(CHANNEL_BYTES);
            Some(bytes.clone().acquire_many_owned(u32::try_from(share).unwrap_or(u32::MAX)).await.ok()?)
        }
        _ => None,
    };
    Some((items.reserve().await.ok()?, share))
}

/// The next event; never, when the stream was let go. Cancel-safe.
async fn next<S: Source>(source: Option<&mut S>) -> Result<Event, crate::pg::Error> {
    match source {
        Some(source) => source.next().await,
        None => std::future::pending().await,
    }
}

/// A position as a metric.
fn as_gauge(lsn: Lsn) -> i64 {
    i64::try_from(lsn.get()).unwrap_or(i64::MAX)
}
