//! Third station: receipts settle in order, and with them the checkpoints between them.
//!
//! The only place that says "settled". The trap that this queue removes: a position told because it was *received*, while a
//! message before it was still unconfirmed.

use std::sync::Mutex;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::publisher::Settling;
use super::window::Share;
use super::{Error, Progress, progress};
use crate::lsn::Lsn;
use crate::metrics::{self, Metrics};
use crate::sink::{self, Receipt};

/// How often a wait for a confirm looks whether the broker blocks publishers or is still being written to.
const LOOKS: u32 = 10;

/// The third station.
pub(super) struct Settler<'a> {
    pub(super) runs: mpsc::Receiver<Settling>,
    pub(super) settled: watch::Sender<Lsn>,
    pub(super) progress: &'a Mutex<Progress>,
    pub(super) metrics: &'a Metrics,
    pub(super) confirm_timeout: Duration,
}

impl Settler<'_> {
    /// Settles until there is nothing more to come.
    pub(super) async fn run(mut self) -> Result<(), Error> {
        while let Some(run) = self.runs.recv().await {
            self.settle(run).await?;
        }
        Ok(())
    }

    async fn settle(&mut self, run: Settling) -> Result<(), Error> {
        if let Some(receipt) = run.receipt {
            self.metrics.oldest(run.committed_at.first().copied());
            self.confirmed(receipt).await?;
            self.count(&run.committed_at, run.bytes);
        }
        let mut progress = progress::lock(self.progress);
        if let Some(last) = run.last {
            progress.message(last);
        }
        if let Some(lsn) = run.checkpoint {
            progress.checkpoint(lsn);
            self.settled.send_if_modified(|settled| {
                let rises = lsn > *settled;
                *settled = lsn.max(*settled);
                rises
            });
        }
        drop(progress);
        // Last: room in the window means that all of this is done.
        run.shares.into_iter().for_each(Share::settle);
        Ok(())
    }

    /// Waits for the receipt, and no longer than the broker may hold it back. An alarm can last for hours: leaving would not
    /// help, and coming back would publish once more. Nor would it help against a body that needs longer than that to get
    /// there: every session would end at it. So the time begins anew while the one lasts, and as long as the other moves.
    async fn confirmed(&self, mut receipt: Receipt) -> Result<(), Error> {
        let late = sink::Error::Timeout { during: "confirming", after: self.confirm_timeout };
        let mut under_way = None;
        let mut looks_left = LOOKS;
        while looks_left > 0 {
            match timeout(self.confirm_timeout / LOOKS, &mut receipt).await {
                Ok(settled) => return Ok(settled?),
                Err(_) => {
                    let before = std::mem::replace(&mut under_way, receipt.bytes_under_way());
                    let moves = under_way.is_some() && under_way != before;
                    looks_left = if moves || self.metrics.is_blocked() { LOOKS } else { looks_left - 1 };
                }
            }
        }
        Err(late.into())
    }

    fn count(&self, committed_at: &[u64], bytes: usize) {
        let count = committed_at.len();
        self.metrics.settled.inc_by(count as u64);
        self.metrics.in_flight_messages.dec_by(i64::try_from(count).unwrap_or(i64::MAX));
        self.metrics.in_flight_bytes.dec_by(i64::try_from(bytes).unwrap_or(i64::MAX));
        for age in metrics::ages(committed_at) {
            self.metrics.commit_to_settled.observe(age.as_secs_f64());
        }
        self.metrics.oldest(None);
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::sync::Arc;

    use tokio::time::{Instant, sleep};

    use super::*;
    use crate::sink::UnderWay;

    /// How long a receipt that never settles is waited for, while bytes move in the first so many seconds and then wait.
    async fn waited(moving: u64) -> u64 {
        let (progress, metrics) = (Mutex::default(), Metrics::new());
        let confirm_timeout = Duration::from_secs(30);
        let (runs, settled) = (mpsc::channel(1).1, watch::Sender::new(Lsn::ZERO));
        let settler = Settler { runs, settled, progress: &progress, metrics: &metrics, confirm_timeout };
        let under_way = Arc::new(UnderWay::default());
        let receipt = Receipt::new(pending()).with_under_way(under_way.clone());
        let writing = async {
            for second in 1..=moving {
                sleep(Duration::from_secs(1)).await;
                under_way.set(Some(second));
            }
            pending().await
        };
        let began = Instant::now();
        let ended = tokio::select! {
            ended = settler.confirmed(receipt) => ended,
            () = writing => Ok(()),
        };
        assert!(matches!(ended, Err(Error::Sink(sink::Error::Timeout { .. }))), "{ended:?}");
        began.elapsed().as_secs()
    }

    #[tokio::test(start_paused = true)]
    async fn a_confirm_is_late_a_timeout_after_the_last_byte_moved_and_not_before() {
        assert_eq!(waited(0).await, 30);
        let long = waited(300).await;
        assert!((330..=333).contains(&long), "{long}");
    }
}
