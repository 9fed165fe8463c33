//! One session: a broker session and a replication stream, opened in that order and dropped together.
//!
//! Nothing is ever continued after a doubt; the next session starts from the slot. The trap: a connected client that does
//! not confirm keeps Postgres from shutting down for ever, so a session that learns that the server goes away has a moment
//! to settle what it has and then lets go.

use std::sync::Mutex;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

use super::backlog::Backlog;
use super::lease::Lease;
use super::progress::Caution;
use super::publisher::Publisher;
use super::reader::{Feedback, Reader, SETTLE_WITHIN};
use super::settler::Settler;
use super::window::Window;
use super::{Broker, Database, Error, Opened, Progress, Settings, Watch, channel, stopped};
use crate::metrics::Metrics;
use crate::outbox::{Assembler, Mapping};
use crate::pg;
use crate::retry::Retry;
use crate::sink::{self, Sink};

/// Runs between publisher and settler: as many as there can be in a window, and never so few that the publisher waits here.
const RUNS_MIN: usize = 1024;

/// What a stopping server is given to hear the rest; `pg_ctl stop` waits for it.
const SERVER_STOP_GRACE: Duration = Duration::from_secs(2);

/// How long telling the last status may take when the broker has ended the session.
const PARTING: Duration = Duration::from_secs(2);

/// What all sessions of a relay have in common.
#[derive(Clone, Copy)]
pub(super) struct Common<'a> {
    pub(super) mapping: &'a Mapping,
    pub(super) settings: &'a Settings,
    pub(super) metrics: &'a Metrics,
    pub(super) window: &'a Window,
}

/// Runs one session. `Ok` when it was told to stop.
pub(super) async fn run<D: Database, B: Broker>(
    database: &mut D,
    broker: &mut B,
    common: Common<'_>,
    progress: &mut Progress,
    stop: &mut watch::Receiver<bool>,
) -> Result<(), Error> {
    let opening = async {
        let sink = match broker.open().await {
            Ok(sink) => sink,
            Err(error) => {
                // That may last for hours, and the disk that fills meanwhile is Postgres'.
                database.survey().await;
                return Err(error.into());
            }
        };
        match database.open(progress).await {
            Ok(opened) => Ok((sink, opened)),
            Err(error) => {
                sink.close().await;
                Err(error)
            }
        }
    };
    let opened = tokio::select! {
        biased;
        () = stopped(stop) => return Ok(()),
        opened = opening => opened,
    };
    let (sink, opened) = match opened {
        Ok(both) => both,
        Err(error) => {
            note_contention(&error, progress, common.metrics);
            return Err(error);
        }
    };
    progress.hold();
    note_doubt(progress, common.metrics);
    common.metrics.opened();
    common.metrics.heard(Instant::now(), opened.silence_max);
    if progress.caution().until.is_some() {
        // While a message is refused, sessions come every few seconds; why was said already.
        tracing::debug!(from = %opened.start, timeline = opened.identity.timeline, "streaming, one by one");
    } else {
        tracing::info!(from = %opened.start, timeline = opened.identity.timeline, "streaming");
    }
    let shared = Mutex::new(std::mem::take(progress));
    let result = stream(sink, opened, common, &shared, stop).await;
    *progress = shared.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    match &result {
        // It is among the first unsettled ones, of which there is at most one window.
        Err(Error::Sink(sink::Error::Refused { id, .. })) => {
            progress.be_cautious(Caution { messages: common.settings.window_messages, until: Some(id.clone()) });
        }
        Err(Error::Sink(_)) => progress.be_cautious(Caution { messages: 1, until: None }),
        // What was to be proven still is.
        _ => {}
    }
    result
}

/// Whether another relay holds the slot.
pub(super) fn is_contention(error: &Error) -> bool {
    const OBJECT_IN_USE: &str = "55006";
    matches!(error, Error::Postgres(pg::Error::Server(error)) if error.code() == OBJECT_IN_USE)
}

fn note_contention(error: &Error, progress: &mut Progress, metrics: &Metrics) {
    if is_contention(error) {
        progress.contend();
        // What was in flight here is somebody else's to publish now.
        metrics.oldest(None);
    }
}

/// A refused message may never come again: another relay has delivered it, or a failover has undone it. If it does come, and
/// is refused again, that is said again.
fn note_doubt(progress: &Progress, metrics: &Metrics) {
    if progress.caution().until.is_none() && metrics.taken() {
        tracing::info!("the refused message may be delivered by another relay, or undone by a failover: going on");
    }
}

/// The three stations, the watch beside them, and the two ways to end.
async fn stream<S: super::Source, K: Sink>(
    mut sink: K,
    opened: Opened<S>,
    Common { mapping, settings, metrics, window }: Common<'_>,
    progress: &Mutex<Progress>,
    stop: &mut watch::Receiver<bool>,
) -> Result<(), Error> {
    let before = super::progress::lock(progress).clone();
    let (channel_in, channel_out) = channel::channel();
    let (runs_in, runs_out) = mpsc::channel(settings.window_messages.max(RUNS_MIN));
    let (settled_in, settled_out) = watch::channel(opened.start);
    let (halt, mut halted) = watch::channel(false);
    let (release, released) = watch::channel(false);
    let lease = Lease::new(opened.silence_max);
    let mut reader = Reader {
        source: Some(opened.source),
        release: released,
        assembler: Assembler::new(mapping.clone(), opened.tables).beginning_at(opened.start),
        settled: settled_out,
        progress,
        before,
        metrics,
        silence_max: opened.silence_max,
        lease: &lease,
        feedback: Feedback::new(opened.start),
    };
    let publisher = Publisher {
        sink: &mut sink,
        channel: channel_out,
        runs: runs_in,
        window: window.clone(),
        progress,
        metrics,
        lease: &lease,
        backlog: Backlog::default(),
        asked: Instant::now(),
    };
    let confirm_timeout = settings.confirm_timeout;
    let settler = Settler { runs: runs_out, settled: settled_in, progress, metrics, confirm_timeout };
    let stations = async {
        let stations = async { tokio::try_join!(reader.run(channel_in, &mut halted), publisher.run(), settler.run()) };
        // Biased: who wakes up after too long sees that before anything is published.
        let (read, published, ()) = tokio::select! {
            biased;
            paused = lease.keep() => return Err(paused),
            done = stations => done?,
        };
        first(published, read)
    };
    let result = end(stations, opened.watch, (&halt, &release), settings, stop).await;
    let result = match result {
        Ok(()) => reader.finish().await,
        // The stream is broken, or the server waits for us to let go, or it is not ours any more.
        Err(error @ (Error::Postgres(_) | Error::Paused { .. })) if error.retry() == Retry::Later => {
            drop(reader);
            Err(error)
        }
        Err(error) => {
            // The failure is what counts; parting well only spares duplicates.
            let _ = timeout(PARTING, reader.finish()).await;
            Err(error)
        }
    };
    // Nothing more leaves this process when it may not publish.
    if !matches!(result, Err(Error::Sink(_) | Error::Paused { .. })) {
        sink.close().await;
    }
    result
}

/// The publisher's row lies before what the reader ended with: the first one is named, since all before it counts as
/// published.
fn first(published: Option<Error>, read: Option<Error>) -> Result<(), Error> {
    published.or(read).map_or(Ok(()), Err)
}

/// Waits for the stations, or for a reason to end them; makes them drain where that can help, within limits.
async fn end(
    stations: impl Future<Output = Result<(), Error>>,
    mut watch: Watch,
    (halt, release): (&watch::Sender<bool>, &watch::Sender<bool>),
    settings: &Settings,
    stop: &mut watch::Receiver<bool>,
) -> Result<(), Error> {
    let mut stations = std::pin::pin!(stations);
    // Biased: stations that are done have the last word.
    tokio::select! {
        biased;
        result = &mut stations => result,
        () = stopped(stop) => {
            halt.send_replace(true);
            // A machine that goes down stops both, and the server would wait for us for as long as we do for the broker.
            let server_goes = async {
                // A catalog that is slow, or wrong, waits for nobody.
                if !matches!((&mut watch).await, pg::Error::GoingAway(_) | pg::Error::Closed | pg::Error::Sql(_)) {
                    std::future::pending::<()>().await;
                }
                sleep(SERVER_STOP_GRACE).await;
            };
            let drained = tokio::select! {
                biased;
                drained = timeout(settings.drain_timeout, &mut stations) => drained.ok(),
                () = server_goes => None,
            };
            drained.unwrap_or_else(|| {
                tracing::warn!("stopping without all confirms: what is in flight will be published again, nothing is lost");
                Ok(())
            })
        }
        error = &mut watch => {
            if error.retry() == Retry::Never {
                // What was read before the world changed still counts.
                halt.send_replace(true);
            }
            // However the stations end now, the reason is what was seen here.
            if timeout(SERVER_STOP_GRACE, &mut stations).await.is_err() && error.retry() == Retry::Later {
                release.send_replace(true);
                let _ = timeout(SETTLE_WITHIN, stations).await;
            }
            Err(error.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lsn::Lsn;
    use crate::outbox::{self, Position};

    fn row(commit_lsn: u64) -> Error {
        let position = Position { commit_lsn: Lsn::new(commit_lsn), seq: 0 };
        outbox::Error::Row { position, id: commit_lsn.to_string(), problem: "too large".to_owned() }.into()
    }

    fn named(result: Result<(), Error>) -> String {
        result.map_or_else(|error| error.to_string(), |()| "none".to_owned())
    }

    /// The remedy skips all that lies before the named one.
    #[test]
    fn of_several_reasons_to_stop_the_first_in_the_stream_is_named() {
        assert!(named(first(Some(row(1)), Some(row(2)))).contains("id 1"));
        assert!(named(first(None, Some(row(2)))).contains("id 2"));
        assert_eq!(named(first(None, None)), "none");
    }
}
