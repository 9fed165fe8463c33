//! Standard output: one JSON line a message, settled when it is flushed.
//!
//! The trap: a reader that went away is an error here, never a reason to go on as if someone had read.

mod line;

use tokio::io::{AsyncWriteExt, Stdout as Handle, stdout};

pub use self::line::line;
use super::{Error, Receipt, Sink};
use crate::outbox::Message;

/// Standard output.
#[derive(Debug)]
pub struct Stdout {
    handle: Handle,
}

impl Stdout {
    /// Opens it.
    pub fn open() -> Self {
        Self { handle: stdout() }
    }
}

impl Sink for Stdout {
    async fn publish(&mut self, run: Vec<Message>) -> Result<Receipt, Error> {
        let mut lines = Vec::new();
        for message in &run {
            line(message, &mut lines);
        }
        let written = async {
            self.handle.write_all(&lines).await?;
            self.handle.flush().await
        };
        written.await.map_err(|error| Error::Broken(format!("standard output: {error}")))?;
        Ok(Receipt::new(std::future::ready(Ok(()))))
    }

    async fn check(&mut self) -> Result<(), Error> {
        Ok(())
    }
}
