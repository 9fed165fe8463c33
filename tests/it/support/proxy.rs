//! A TCP proxy that speaks enough AMQP to hold back confirms.
//!
//! The trap: holding *bytes* holds heartbeats and returns as well, and shows another fault. So frames are told apart, and
//! only `basic.ack` waits.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// A proxy in front of one broker.
pub(crate) struct AckProxy {
    port: u16,
    hold: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for AckProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl AckProxy {
    pub(crate) async fn start(broker: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (hold, held) = watch::channel(false);
        let held = Arc::new(held);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(("127.0.0.1", broker)).await else { continue };
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = server.into_split();
                tokio::spawn(copy(from_client, to_server));
                tokio::spawn(filter(from_server, to_client, (*held).clone()));
            }
        });
        Self { port, hold, task }
    }

    pub(crate) fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.port)
    }

    /// From now on acks wait, or go on in order.
    pub(crate) fn hold(&self, hold: bool) {
        self.hold.send_replace(hold);
    }
}

async fn copy(mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
    let _ = tokio::io::copy(&mut from, &mut to).await;
}

/// Frames from the broker: type, channel, length, payload, end.
async fn filter(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut hold: watch::Receiver<bool>) {
    const BASIC_ACK: [u8; 4] = [0, 60, 0, 80];
    let mut waiting: Vec<u8> = Vec::new();
    loop {
        let mut frame = vec![0; 7];
        tokio::select! {
            biased;
            released = async { hold.wait_for(|hold| !*hold).await.is_ok() }, if !waiting.is_empty() => {
                if !released || to.write_all(&waiting).await.is_err() {
                    return;
                }
                waiting.clear();
                continue;
            }
            // Only the wait for a frame's beginning is raced, and `readable` takes nothing.
            ready = from.readable() => if ready.is_err() { return },
        }
        if from.read_exact(&mut frame).await.is_err() {
            return;
        }
        let length = u32::from_be_bytes([frame[3], frame[4], frame[5], frame[6]]) as usize;
        frame.resize(7 + length + 1, 0);
        if from.read_exact(&mut frame[7..]).await.is_err() {
            return;
        }
        let is_ack = frame[0] == 1 && frame.get(7..11) == Some(&BASIC_ACK);
        if is_ack && (*hold.borrow() || !waiting.is_empty()) {
            waiting.extend(frame);
        } else if to.write_all(&frame).await.is_err() {
            return;
        }
    }
}
