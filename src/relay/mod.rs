//! The only room that knows both ends: order, retry, progress. At-least-once can be broken here and nowhere else.
//!
//! ```text
//! reader ──items──> publisher ──runs──> settler
//!    ^                                     │
//!    └────────── watch: settled ───────────┘     the only way back
//! ```
//!
//! Three stations, each a plain loop, joined by bounded queues. The position takes the same road as the data: a checkpoint
//! comes out of the settler only after every receipt before it, because a queue is a queue.
//!
//! Reading order: `progress` with `published`, `lease`, `channel`, `reader`, `window` with `sizing`, `publisher` with
//! `backlog`, `settler`, `session`, `postgres`.

mod backlog;
mod channel;
mod lease;
pub mod postgres;
pub mod progress;
mod published;
mod publisher;
mod reader;
mod session;
mod settler;
mod sizing;
mod window;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

pub use progress::Progress;
pub use published::Beyond;

use self::session::Common;
use self::window::Window;
use crate::finding::explain;
use crate::lsn::Lsn;
use crate::metrics::{End, Metrics, Reason};
use crate::outbox::{self, Mapping, Tables};
use crate::pg;
use crate::pg::replication::{Event, Identity, Status};
use crate::retry::{Backoff, Retry};
use crate::sink::{self, Sink};

/// Between two sessions at first, and at most: with them messages flow again within 30 s of any fault's end.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));

/// Two sessions begin at least so far apart, also when each makes a little progress: fewer than one attempt a second.
const BETWEEN_BEGINNINGS: Duration = Duration::from_millis(1050);

/// A session that lasted so long was a good one: the backoff begins anew.
const GOOD_SESSION: Duration = Duration::from_secs(30);

/// The same failure is logged again after this long.
const REPEAT_LOG: Duration = Duration::from_secs(60);

/// Limits of a relay.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Messages published and not settled, at most.
    pub window_messages: usize,
    /// The window becomes no smaller than this; as large as `window_messages`, it is fixed.
    pub window_messages_min: usize,
    /// Their bytes, at most; a larger message goes alone.
    pub window_bytes: usize,
    /// How long the broker may hold back its confirm.
    pub confirm_timeout: Duration,
    /// How long a stop may wait for what is in flight.
    pub drain_timeout: Duration,
    /// How long a peer may stay away before the relay gives up; `None`: for ever.
    pub give_up_after: Option<Duration>,
}

/// The stream from Postgres, or a fake of it.
pub trait Source: Send {
    /// What comes next. Cancel-safe.
    fn next(&mut self) -> impl Future<Output = Result<Event, pg::Error>> + Send;

    /// Writes a status. Never cancelled.
    fn tell(&mut self, status: Status) -> impl Future<Output = Result<(), pg::Error>> + Send;

    /// Asks the catalog again which tables are the outbox; and whether all that this transaction did was visible before.
    fn tables(&mut self, xid: u32) -> impl Future<Output = Result<(Tables, bool), pg::Error>> + Send;

    /// Tells the last status, ends the stream and sees the position arrive in the slot.
    fn finish(self, status: Status) -> impl Future<Output = Result<(), pg::Error>> + Send;
}

/// Opens streams.
pub trait Database: Send {
    /// What it opens.
    type Source: Source;

    /// Proves that the world is set up right and begins to stream where `progress` says.
    fn open(&mut self, progress: &mut Progress) -> impl Future<Output = Result<Opened<Self::Source>, Error>> + Send;

    /// There is no broker to stream to: looks what the slot keeps meanwhile, and at what will end the next session. Holds
    /// nothing that keeps a server from stopping.
    fn survey(&mut self) -> impl Future<Output = ()> + Send;
}

/// Opens broker sessions.
pub trait Broker: Send {
    /// What it opens.
    type Sink: Sink;

    /// Opens one.
    fn open(&mut self) -> impl Future<Output = Result<Self::Sink, sink::Error>> + Send;

    /// The last session took messages and held back their confirms: where there are several hosts, another one comes first
    /// from now on. A node that is cut off from its cluster lets everybody in, and can store nothing.
    fn pass_on(&mut self) {}
}

/// Resolves when the stream must not go on, with the reason.
pub type Watch = Pin<Box<dyn Future<Output = pg::Error> + Send>>;

/// A stream that has begun.
pub struct Opened<S> {
    /// The stream.
    pub source: S,
    /// Looks at server and catalog beside it.
    pub watch: Watch,
    /// Which tables are the outbox.
    pub tables: Tables,
    /// Which server it is.
    pub identity: Identity,
    /// Where it begins: all before is settled.
    pub start: Lsn,
    /// How long it may be silent.
    pub silence_max: Duration,
}

/// Why a relay stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Postgres, or the way there.
    #[error(transparent)]
    Postgres(#[from] pg::Error),
    /// The stream's content.
    #[error(transparent)]
    Outbox(#[from] outbox::Error),
    /// The broker, or the way there.
    #[error(transparent)]
    Sink(#[from] sink::Error),
    /// The server cannot send a row.
    #[error("Postgres refused: {error}")]
    Undecodable {
        /// Of the row's transaction; zero when the server failed before it had begun to send it.
        commit_lsn: Lsn,
        /// What the server said.
        error: pg::ServerError,
    },
    /// The slot is somewhere else than where we left it.
    #[error(
        "replication slot {slot} stands at {found}, but this relay told Postgres {told} at most: the slot was \
         re-created, or someone else moved it. Remedy: reconcile from the table what was committed between the two, then \
         restart"
    )]
    Moved {
        /// The slot.
        slot: String,
        /// Where it stands.
        found: Lsn,
        /// The last position told.
        told: Lsn,
    },
    /// A server that an earlier session has left behind.
    #[error(
        "this server is on timeline {found} and timeline {seen} was seen: it is an old primary. Remedy: see that it is \
         fenced off; where it is the one to go on with, restart pgoutbox, which forgets the other"
    )]
    OldTimeline {
        /// Its timeline.
        found: u32,
        /// The one seen.
        seen: u32,
    },
    /// This process was stopped, or its machine slept.
    #[error("this process did not run for {gap:?}: Postgres may have given the slot to another relay; beginning anew")]
    Paused {
        /// How long.
        gap: Duration,
    },
    /// A peer stayed away too long.
    #[error("gave up after {after:?}: {last}")]
    GaveUp {
        /// The limit.
        after: Duration,
        /// The last failure.
        last: Box<Error>,
    },
}

impl Error {
    /// Whether a new session can help.
    pub fn retry(&self) -> Retry {
        match self {
            Error::Postgres(error) => error.retry(),
            Error::Outbox(error) => error.retry(),
            Error::Sink(error) => error.retry(),
            Error::Undecodable { .. } | Error::Moved { .. } | Error::GaveUp { .. } => Retry::Never,
            Error::OldTimeline { .. } | Error::Paused { .. } => Retry::Later,
        }
    }

    fn end(&self) -> &'static str {
        match self {
            Error::Sink(sink::Error::Refused { .. }) => "refused",
            _ if self.retry() == Retry::Never => "fatal",
            Error::Sink(_) => "broker",
            Error::Paused { .. } => "paused",
            _ => "postgres",
        }
    }
}

/// Resolves when it is time to stop; never when nobody can say so any more.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    if stop.wait_for(|stop| *stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Runs sessions, one after the other, until told to stop or proven hopeless.
///
/// # Errors
/// The failure that no new session can help.
pub async fn run<D: Database, B: Broker>(
    mut database: D,
    mut broker: B,
    mapping: &Mapping,
    settings: &Settings,
    metrics: &Arc<Metrics>,
    mut stop: watch::Receiver<bool>,
) -> Result<(), Error> {
    let common = Common { mapping, settings, metrics, window: &Window::new(settings, metrics) };
    let mut progress = Progress::default();
    let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
    let mut logged: Option<(String, Instant)> = None;
    let mut away_since: Option<Instant> = None;
    loop {
        let began = Instant::now();
        let before = progress.steps();
        let session = session::run(&mut database, &mut broker, common, &mut progress, &mut stop);
        let result = session.await;
        let label = result.as_ref().map_or_else(Error::end, |()| "stopped");
        metrics.sessions.get_or_create(&End { end: label }).inc();
        let Err(error) = result else {
            metrics.closed(None);
            return Ok(());
        };
        let was_idle = metrics.is_open() && metrics.in_flight_messages.get() == 0;
        metrics.closed(Some(explain(&error)));
        note_refusal(&error, metrics);
        if matches!(error, Error::Sink(sink::Error::Timeout { .. })) {
            broker.pass_on();
        }
        if error.retry() == Retry::Never {
            return Err(error);
        }
        if *stop.borrow() {
            tracing::warn!("stopping, nothing is lost: {}", explain(&error));
            return Ok(());
        }
        if progress.steps().runs > before.runs || began.elapsed() > GOOD_SESSION {
            backoff.reset();
        }
        // A session that lasted with nothing to do had both peers; and one answers that refuses a message, or says who holds
        // the slot.
        let was_good = was_idle && began.elapsed() > GOOD_SESSION
            || matches!(error, Error::Sink(sink::Error::Refused { .. }))
            || session::is_contention(&error);
        if progress.steps() != before || was_good {
            away_since = None;
        }
        let since = *away_since.get_or_insert_with(Instant::now);
        if let Some(after) = settings.give_up_after.filter(|after| since.elapsed() >= *after) {
            return Err(Error::GaveUp { after, last: Box::new(error) });
        }
        let wait = backoff.wait().max(BETWEEN_BEGINNINGS.saturating_sub(began.elapsed()));
        log(&error, wait, &mut logged);
        tokio::select! {
            biased;
            () = stopped(&mut stop) => return Ok(()),
            () = tokio::time::sleep(wait) => {}
        }
    }
}

fn note_refusal(error: &Error, metrics: &Metrics) {
    let reason = match error {
        Error::Sink(sink::Error::Refused { refusal, .. }) => refusal.reason(),
        Error::Sink(sink::Error::Undeliverable { .. }) | Error::Outbox(outbox::Error::Row { .. }) => "undeliverable",
        _ => return,
    };
    metrics.refused.get_or_create(&Reason { reason }).inc();
    metrics.refuse(explain(error));
}

/// Once, and again when it changes or lasts: a relay that waits must not fill the log.
fn log(error: &Error, wait: Duration, logged: &mut Option<(String, Instant)>) {
    let text = explain(error);
    let is_news = logged.as_ref().is_none_or(|(last, at)| *last != text || at.elapsed() > REPEAT_LOG);
    if is_news {
        tracing::warn!("session ended, nothing is lost, next in {} ms: {text}", wait.as_millis());
        *logged = Some((text, Instant::now()));
    } else {
        tracing::debug!("session ended again, next in {} ms: {text}", wait.as_millis());
    }
}
