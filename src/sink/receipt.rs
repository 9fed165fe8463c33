//! The promise of a session to say when a run is held, and how a session's own task or thread keeps it.
//!
//! The trap: a session that is gone has said nothing, and nothing is not yes. Who waits for it is told that it broke.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::watch;

use super::Error;

/// Settles when the broker holds every message of a run.
pub struct Receipt(Pin<Box<dyn Future<Output = Result<(), Error>> + Send>>);

impl Receipt {
    /// Settles when `settled` does.
    pub fn new(settled: impl Future<Output = Result<(), Error>> + Send + 'static) -> Self {
        Self(Box::pin(settled))
    }

    /// Settles when the session holds its first `last` messages, or runs, whichever it counts.
    pub(super) fn after(last: u64, progress: &watch::Receiver<Progress>) -> Self {
        let mut progress = progress.clone();
        Self::new(async move {
            let settled = progress.wait_for(|progress| progress.settled >= last || progress.failure.is_some()).await;
            match settled {
                Ok(progress) if progress.settled >= last => Ok(()),
                Ok(progress) => Err(progress.failure.clone().unwrap_or_else(gone)),
                Err(_) => Err(gone()),
            }
        })
    }
}

impl Future for Receipt {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}

impl fmt::Debug for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Receipt")
    }
}

/// How much is held, counted from the session's first; and what ended it.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress {
    pub(super) settled: u64,
    pub(super) failure: Option<Error>,
}

/// What ended a session.
pub(super) fn failure(progress: &watch::Receiver<Progress>) -> Error {
    progress.borrow().failure.clone().unwrap_or_else(gone)
}

fn gone() -> Error {
    Error::Broken("the session is closed".to_owned())
}
