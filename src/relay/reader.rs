//! First station: the stream becomes items in the channel, and the settled position goes back to Postgres.
//!
//! The traps. Status goes out on its own timer, also while the channel is full and nothing is read, or the server takes
//! us for dead in the middle of a large transaction. A reply to every keepalive at once makes a stopping server send the
//! next one at once, hundreds of thousands in seconds, so replies keep a distance. A row of megabytes on a slow way takes
//! longer than a stream may be silent, and a session that ended for that would end so at every attempt: its parts are
//! signs of life. And what is told is what came out of the settler, never what was read.

use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use super::channel::{Batch, Sender};
use super::lease::Lease;
use super::{Error, Progress, Source, progress, stopped};
use crate::lsn::Lsn;
use crate::metrics::Metrics;
use crate::outbox::{self, Assembler, Item};
use crate::pg;
use crate::pg::replication::{Event, Status};
use crate::retry::Retry;

/// Two statuses are at least so far apart. It bounds what a `kill -9` re-sends: messages settled but not yet told.
const STATUS_INTERVAL: Duration = Duration::from_millis(100);

/// When the stream breaks, what is in flight is given so long to settle: a broker that answers takes less.
pub(super) const SETTLE_WITHIN: Duration = Duration::from_secs(10);

/// Events taken in a row before the timer is looked at again: not every one is an item.
const EVENTS_MAX: usize = 1024;

/// Why reading ends: told to, by what stands next in the stream and goes no further, or by a failure.
type Ended = Result<Option<Error>, Error>;

/// The first station.
pub(super) struct Reader<'a, S> {
    /// `None`: let go.
    pub(super) source: Option<S>,
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
    /// Reads until told to stop (then to the end of the open transaction), until what comes next cannot be delivered, or
    /// until the publisher wants no more; then waits for the settler.
    ///
    /// Returns why it stopped, if not because it was told to: all before that has settled, since its remedy may skip it.
    pub(super) async fn run(&mut self, channel: Sender, stop: &mut watch::Receiver<bool>) -> Ended {
        let ended = self.read(&channel, stop).await;
        let reason = match ended {
            Err(Error::Postgres(error)) => {
                // Nothing can be told any more, but what settles now is not published again.
                self.lease.end();
                self.source = None;
                drop(channel);
                let _ = timeout(SETTLE_WITHIN, self.settle()).await;
                return Err(error.into());
            }
            reason => reason?,
        };
        // The publisher sees the channel end, publishes what is in it and ends; so does the settler.
        drop(channel);
        if matches!(reason, Some(Error::Postgres(pg::Error::Server(_)) | Error::Undecodable { .. })) {
            // The server has ended the stream and given up the slot: nobody keeps it for us meanwhile.
            self.source = None;
            let late = || Err(pg::Error::NotNow("what is in flight did not settle".to_owned()).into());
            timeout(SETTLE_WITHIN, self.drain()).await.unwrap_or_else(|_| late())?;
        } else {
            self.drain().await?;
        }
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

    async fn read(&mut self, channel: &Sender, stop: &mut watch::Receiver<bool>) -> Ended {
        let mut pending = Batch::default();
        let mut ended = None;
        let mut is_stopping = false;
        let timer = sleep_until(Instant::now());
        let mut timer = std::pin::pin!(timer);
        loop {
            if pending.is_empty() {
                if let Some(ended) = ended {
                    return ended;
                }
                if is_stopping && !self.assembler.in_transaction() {
                    return Ok(None);
                }
            }
            self.lease.listen(pending.is_empty());
            let settled = *self.settled.borrow_and_update();
            let due = self.feedback.due(settled, self.silence_max);
            if timer.deadline() != due {
                timer.as_mut().reset(due);
            }
            // Biased: the timer first, so that a busy stream cannot starve it; then stop and release; then progress, which
            // only moves the timer; then either the batch that waits for room or, with none waiting, what comes next. All
            // are cancel-safe.
            tokio::select! {
                biased;
                () = timer.as_mut() => {
                    self.lease.beat()?;
                    self.tell(!pending.is_empty()).await?;
                }
                () = stopped(stop), if !is_stopping => is_stopping = true,
                () = stopped(&mut self.release) => {
                    return Err(pg::Error::NotNow("let go of a stopping server".to_owned()).into());
                }
                changed = self.settled.changed(), if settled <= self.feedback.told => {
                    if changed.is_err() {
                        return Ok(None);
                    }
                }
                sent = channel.send(&mut pending), if !pending.is_empty() => {
                    if sent.is_none() {
                        return Ok(None);
                    }
                    // Nothing was heard because nothing was read.
                    self.feedback.heard = Instant::now();
                }
                event = next(self.source.as_mut()), if pending.is_empty() => {
                    self.hear()?;
                    ended = self.gather(event, &mut pending, is_stopping).await;
                }
            }
        }
    }

    /// Takes this event and those that are here already, up to a batch, or up to the end of the transaction after which
    /// there shall be none: under load the next one has always begun. What came before an end still counts.
    ///
    /// The trap: an event that was taken out of the stream is in nobody's hands but ours. So the next one is taken only when
    /// nothing more can end the loop before it is looked at.
    async fn gather(&mut self, first: Result<Event, pg::Error>, batch: &mut Batch, is_stopping: bool) -> Option<Ended> {
        let (mut event, mut taken) = (first, 1);
        loop {
            let item = match event {
                Ok(event) => self.item(event).await,
                Err(pg::Error::Server(error)) if error.is_undecodable_row() => {
                    Err(Error::Undecodable { commit_lsn: self.assembler.commit_lsn(), error })
                }
                Err(error) => Err(error.into()),
            };
            match item {
                Ok(Some(item)) => batch.add(item),
                Ok(None) => {}
                Err(error) if is_ahead(&error) => return Some(Ok(Some(error))),
                Err(error) => return Some(Err(error)),
            }
            if batch.is_full() || taken == EVENTS_MAX || is_stopping && !self.assembler.in_transaction() {
                return None;
            }
            event = next(self.source.as_mut()).now_or_never()?;
            taken += 1;
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
            Event::Data(bytes) => match self.assembler.change(&bytes) {
                Err(outbox::Error::UnknownTable { oid, name, .. }) => self.look_up(oid, &name, &bytes).await?,
                item => item?,
            },
            Event::Keepalive { wal_end, reply_requested } => {
                self.feedback.reply_requested |= reply_requested;
                self.assembler.keepalive(wal_end)?
            }
            Event::Part => None,
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

    /// A row of a partition that came after the stream began, or of a table that is gone: the catalog knows. But a commit
    /// that waits for a synchronous standby is in the stream before the catalog shows what it made: the next session looks.
    async fn look_up(&mut self, oid: u32, name: &str, bytes: &Bytes) -> Result<Option<Item>, Error> {
        let xid = self.assembler.xid().unwrap_or_default();
        // A look takes its time, and several may follow each other: the server hears of us before each.
        let settled = *self.settled.borrow();
        if self.feedback.due(settled, self.silence_max) <= Instant::now() {
            self.tell(true).await?;
        }
        if let Some(source) = &mut self.source {
            let (tables, is_visible) = source.tables(xid).await?;
            self.assembler.set_tables(tables);
            if !is_visible && !self.assembler.is_outbox(oid) {
                return Err(outbox::Error::Unseen { name: name.to_owned(), xid }.into());
            }
        }
        match self.assembler.change(bytes) {
            Err(outbox::Error::UnknownTable { .. }) if self.assembler.pass_by(oid) => {
                tracing::warn!(
                    "rows of table {name} (OID {oid}) pass by: it is gone, and had not the columns of an outbox"
                );
                Ok(None)
            }
            item => Ok(item?),
        }
    }

    /// Tells Postgres; and finds out whether it is still there, unless we are the ones who do not listen.
    async fn tell(&mut self, is_full: bool) -> Result<(), Error> {
        let silent = self.feedback.heard.elapsed();
        if !is_full && silent > self.silence_max {
            return Err(pg::Error::Timeout { during: "streaming", after: self.silence_max }.into());
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

/// Whether it stands in the stream, ahead of what was read: that stays where it is, and what came before it is settled and
/// told.
fn is_ahead(error: &Error) -> bool {
    error.retry() == Retry::Never || matches!(error, Error::Outbox(outbox::Error::Unseen { .. }))
}

/// The next event; never, when the stream was let go. Cancel-safe.
async fn next<S: Source>(source: Option<&mut S>) -> Result<Event, pg::Error> {
    match source {
        Some(source) => source.next().await,
        None => std::future::pending().await,
    }
}

/// A position as a metric.
fn as_gauge(lsn: Lsn) -> i64 {
    i64::try_from(lsn.get()).unwrap_or(i64::MAX)
}
