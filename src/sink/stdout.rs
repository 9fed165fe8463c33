//! Standard output: one JSON line a message, settled when it is flushed.
//!
//! A thread of its own writes, because a pipe that nobody reads blocks whoever writes to it, and the relay's only thread has
//! Postgres to answer meanwhile. It writes what waits in one call. The traps: a reader that went away is an error here,
//! never a reason to go on as if someone had read; and a session that was given up has nothing more to say, whatever still
//! waits for a pipe.

mod line;

use std::io::{self, Write};
use std::sync::mpsc;
use std::thread;

use tokio::sync::watch;

pub use self::line::line;
use super::receipt::{Progress, failure};
use super::{Error, Receipt, Sink};
use crate::outbox::Message;

/// One call writes about so much at most.
const WRITE_BYTES: usize = 256 * 1024;

/// Standard output.
#[derive(Debug)]
pub struct Stdout {
    // Bounded by the window, which is taken before a run is made.
    runs: mpsc::Sender<Vec<u8>>,
    /// Counts runs.
    progress: watch::Receiver<Progress>,
    published: u64,
}

impl Stdout {
    /// Opens it.
    ///
    /// # Errors
    /// `Broken`, when the system gives us no thread.
    pub fn open() -> Result<Self, Error> {
        Self::over(io::stdout())
    }

    fn over(out: impl Write + Send + 'static) -> Result<Self, Error> {
        let (runs, waiting) = mpsc::channel();
        let (told, progress) = watch::channel(Progress::default());
        let writer = thread::Builder::new().name("stdout".to_owned());
        writer.spawn(move || write(out, &waiting, &told)).map_err(|error| broken(&error))?;
        Ok(Self { runs, progress, published: 0 })
    }
}

impl Sink for Stdout {
    async fn publish(&mut self, run: Vec<Message>) -> Result<Receipt, Error> {
        let mut lines = Vec::new();
        for message in &run {
            line(message, &mut lines);
        }
        self.published += 1;
        // A thread that has ended has said why.
        self.runs.send(lines).map_err(|_| failure(&self.progress))?;
        Ok(Receipt::after(self.published, &self.progress))
    }

    async fn check(&mut self) -> Result<(), Error> {
        let failure = self.progress.borrow().failure.clone();
        failure.map_or(Ok(()), Err)
    }
}

/// The thread: until nobody publishes any more, nobody waits any more, or nobody reads any more.
fn write(mut out: impl Write, runs: &mpsc::Receiver<Vec<u8>>, progress: &watch::Sender<Progress>) {
    let mut settled = 0;
    while let Ok(mut lines) = runs.recv() {
        settled += 1;
        while lines.len() < WRITE_BYTES
            && let Ok(more) = runs.try_recv()
        {
            lines.extend(more);
            settled += 1;
        }
        if progress.is_closed() {
            return;
        }
        if let Err(error) = out.write_all(&lines).and_then(|()| out.flush()) {
            progress.send_modify(|progress| progress.failure = Some(broken(&error)));
            return;
        }
        progress.send_modify(|progress| progress.settled = settled);
    }
}

fn broken(error: &io::Error) -> Error {
    Error::Broken(format!("standard output: {error}"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use tokio::time::timeout;

    use super::*;

    /// A pipe that takes what it is allowed to, one permission a write.
    struct Pipe {
        permits: mpsc::Receiver<io::Result<()>>,
        written: mpsc::Sender<Vec<u8>>,
    }

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.permits.recv().unwrap_or(Ok(()))?;
            let _ = self.written.send(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn pipe() -> (Stdout, mpsc::Sender<io::Result<()>>, mpsc::Receiver<Vec<u8>>) {
        let (permit, permits) = mpsc::channel();
        let (written, read) = mpsc::channel();
        (Stdout::over(Pipe { permits, written }).unwrap(), permit, read)
    }

    fn message(id: usize) -> Message {
        Message {
            id: id.to_string().into(),
            destination: "d".into(),
            kind: "k".into(),
            content_type: "text/plain",
            committed_at: 0,
            headers: Vec::new(),
            body: Bytes::new(),
        }
    }

    async fn soon<T>(future: impl Future<Output = T>) -> T {
        timeout(Duration::from_secs(10), future).await.expect("never")
    }

    #[tokio::test]
    async fn nothing_settles_before_it_is_written_and_what_waits_goes_in_one_call() {
        let (mut sink, permit, read) = pipe();
        let mut receipts = Vec::new();
        for id in 0..4 {
            receipts.push(sink.publish(vec![message(id)]).await.unwrap());
        }
        let first = timeout(Duration::from_millis(50), &mut receipts[0]).await;
        assert!(first.is_err(), "nobody has read");
        (0..4).for_each(|_| permit.send(Ok(())).unwrap());
        for receipt in receipts {
            soon(receipt).await.unwrap();
        }
        let calls: Vec<Vec<u8>> = read.try_iter().collect();
        assert!(calls.len() <= 2, "{} calls", calls.len());
        let text = String::from_utf8(calls.concat()).unwrap();
        let ids: Vec<&str> = text.lines().map(|line| &line[..8]).collect();
        assert_eq!(ids, ["{\"id\":\"0", "{\"id\":\"1", "{\"id\":\"2", "{\"id\":\"3"]);
    }

    #[tokio::test]
    async fn a_reader_that_went_away_settles_nothing_and_is_told() {
        let (mut sink, permit, _read) = pipe();
        let receipt = sink.publish(vec![message(0)]).await.unwrap();
        permit.send(Err(io::ErrorKind::BrokenPipe.into())).unwrap();
        assert!(soon(receipt).await.unwrap_err().to_string().contains("standard output: broken pipe"));
        assert!(sink.check().await.is_err());
        soon(async {
            while sink.publish(vec![message(1)]).await.is_ok() {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    #[tokio::test]
    async fn what_still_waits_when_a_session_is_given_up_is_not_written() {
        let (mut sink, permit, read) = pipe();
        drop(sink.publish(vec![message(0)]).await.unwrap());
        // The thread has begun with the first one once no permit is left over; the second waits behind it.
        permit.send(Ok(())).unwrap();
        assert!(read.recv().unwrap().starts_with(b"{\"id\":\"0"));
        drop(sink.publish(vec![message(1)]).await.unwrap());
        drop(sink.publish(vec![message(2)]).await.unwrap());
        drop(sink);
        drop(permit);
        let late: Vec<Vec<u8>> = read.iter().collect();
        assert!(late.len() <= 1, "one call may have begun: {late:?}");
    }
}
