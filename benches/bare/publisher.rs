//! The broker alone: messages from memory, as fast as it confirms them.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::amqp::{Publisher, Transaction};
use super::postgres::Row;

/// Publishes so many messages with that many in flight. The time from a message's frame to its confirm, of one message in
/// a hundred.
pub(crate) fn run(mut publisher: Publisher, window: usize, rows: u64, bytes: usize) -> Vec<Duration> {
    let transaction = Transaction { lsn: "0/1234568".to_owned(), timestamp: 1 };
    let mut latencies = Vec::new();
    let mut sampled: Option<(u64, Instant)> = None;
    while publisher.settled() < rows {
        while publisher.in_flight() < window && publisher.published() < rows && publisher.connection.socket.has_room() {
            let number = publisher.published() + 1;
            let payload = payload(number, bytes);
            publisher.publish(&row(&payload), &transaction, number);
            if sampled.is_none() && number.is_multiple_of(100) {
                sampled = Some((number, Instant::now()));
            }
        }
        publisher.connection.socket.write();
        let socket = &publisher.connection.socket;
        let flags = if socket.has_output() { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
        let mut sockets = [PollFd::new(socket.stream.as_fd(), flags)];
        poll(&mut sockets, PollTimeout::NONE).expect("the socket is open");
        if sockets[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLIN)) {
            publisher.hear();
        }
        if let Some((number, at)) = sampled
            && publisher.settled() >= number
        {
            latencies.push(at.elapsed());
            sampled = None;
        }
    }
    latencies
}

fn row(payload: &[u8]) -> Row<'_> {
    Row {
        id: b"6f0d7f8e-5a8e-4f5c-9b57-3d2a0f6f7a11",
        aggregatetype: b"order",
        aggregateid: b"12345",
        kind: b"placed",
        payload,
    }
}

/// Numbered as the rows of the outbox are, so that the consumer can judge it.
fn payload(number: u64, bytes: usize) -> Vec<u8> {
    let mut payload = format!("{{\"n\": {number}, \"note\": \"").into_bytes();
    payload.resize(bytes.max(payload.len() + 2) - 2, b'x');
    payload.extend(b"\"}");
    payload
}
