//! Between reader and publisher: items in batches, bounded in number and in bytes.
//!
//! Batches form from what has arrived, without timers: one item when there is one, many when there are many; so a batch's
//! fixed cost vanishes under load and delays nothing without. The trap: a bound on batches bounds nothing. Items and bytes
//! are counted, and given back when the publisher has taken the batch.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::outbox::Item;

/// Items between reader and publisher.
const ITEMS_MAX: u32 = 1024;

/// Bytes of messages between reader and publisher; a larger message goes alone.
const BYTES_MAX: u32 = 2 * 1024 * 1024;

/// A batch takes no more items once it has so many; some fit into the channel.
const BATCH_ITEMS: usize = 256;

/// Nor once it has so many bytes: about one read from the socket.
const BATCH_BYTES: usize = 64 * 1024;

/// What was read and waits for room.
#[derive(Debug, Default)]
pub(super) struct Batch {
    items: Vec<Item>,
    bytes: usize,
}

impl Batch {
    pub(super) fn add(&mut self, item: Item) {
        if let Item::Message(_, message) = &item {
            self.bytes += message.bytes();
        }
        self.items.push(item);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    pub(super) fn is_full(&self) -> bool {
        self.items.len() >= BATCH_ITEMS || self.bytes >= BATCH_BYTES
    }
}

/// Holds the batch's share of the channel.
struct Sent {
    items: Vec<Item>,
    _share: (OwnedSemaphorePermit, OwnedSemaphorePermit),
}

/// The reader's end.
pub(super) struct Sender {
    batches: mpsc::Sender<Sent>,
    items: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
}

/// The publisher's end.
pub(super) struct Receiver {
    batches: mpsc::Receiver<Sent>,
    current: std::vec::IntoIter<Item>,
    share: Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)>,
}

pub(super) fn channel() -> (Sender, Receiver) {
    let (sender, receiver) = mpsc::channel(ITEMS_MAX as usize);
    let (items, bytes) = (Semaphore::new(ITEMS_MAX as usize), Semaphore::new(BYTES_MAX as usize));
    (
        Sender { batches: sender, items: Arc::new(items), bytes: Arc::new(bytes) },
        Receiver { batches: receiver, current: Vec::new().into_iter(), share: None },
    )
}

impl Sender {
    /// Sends the batch, which is then empty. `None`: the publisher wants no more. Cancel-safe: until there is room for all
    /// of it, nothing has happened.
    pub(super) async fn send(&self, batch: &mut Batch) -> Option<()> {
        let limited = |count: usize, max: u32| u32::try_from(count).unwrap_or(u32::MAX).min(max);
        let items = self.items.clone().acquire_many_owned(limited(batch.items.len(), ITEMS_MAX)).await.ok()?;
        let bytes = self.bytes.clone().acquire_many_owned(limited(batch.bytes, BYTES_MAX)).await.ok()?;
        let room = self.batches.reserve().await.ok()?;
        // The next one is about as large: a vector that grows step by step moves its messages at each.
        let next = Batch { items: Vec::with_capacity(batch.items.len()), bytes: 0 };
        let batch = std::mem::replace(batch, next);
        room.send(Sent { items: batch.items, _share: (items, bytes) });
        Some(())
    }
}

impl Receiver {
    /// The next item; `None`: no more will come. Cancel-safe.
    pub(super) async fn next(&mut self) -> Option<Item> {
        loop {
            if let Some(item) = self.current.next() {
                return Some(item);
            }
            self.share = None;
            let sent = self.batches.recv().await?;
            self.begin(sent);
        }
    }

    /// The next item, if it is here.
    pub(super) fn next_here(&mut self) -> Option<Item> {
        loop {
            if let Some(item) = self.current.next() {
                return Some(item);
            }
            self.share = None;
            let sent = self.batches.try_recv().ok()?;
            self.begin(sent);
        }
    }

    fn begin(&mut self, sent: Sent) {
        self.current = sent.items.into_iter();
        self.share = Some(sent._share);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures_util::FutureExt;

    use super::*;
    use crate::lsn::Lsn;
    use crate::outbox::{Message, Position};

    fn message(body: usize) -> Item {
        let message = Message { body: Bytes::from(vec![0; body]), ..Message::default() };
        Item::Message(Position { commit_lsn: Lsn::ZERO, seq: 0 }, message)
    }

    fn batch(items: impl IntoIterator<Item = Item>) -> Batch {
        let mut batch = Batch::default();
        items.into_iter().for_each(|item| batch.add(item));
        batch
    }

    /// How many such batches find room while nobody takes one.
    fn room_for(make: impl Fn() -> Batch) -> usize {
        let (sender, _receiver) = channel();
        (0..).take_while(|_| sender.send(&mut make()).now_or_never().is_some()).count()
    }

    #[test]
    fn items_and_bytes_are_bounded_and_what_is_larger_than_the_channel_goes_alone() {
        assert_eq!(room_for(|| batch((0..256).map(|_| Item::Checkpoint(Lsn::ZERO)))), 4);
        assert_eq!(room_for(|| batch([message(1_000_000)])), 2);
        assert_eq!(room_for(|| batch([message(5_000_000)])), 1);
    }

    #[test]
    fn a_send_that_is_given_up_has_done_nothing() {
        let (sender, mut receiver) = channel();
        sender.send(&mut batch([message(5_000_000)])).now_or_never().unwrap();
        let mut second = batch([message(1)]);
        assert!(sender.send(&mut second).now_or_never().is_none());
        assert!(!second.is_empty());
        // The room of a batch comes back when the publisher has taken all of it and wants more.
        assert!(receiver.next_here().is_some());
        assert!(receiver.next_here().is_none());
        sender.send(&mut second).now_or_never().unwrap();
        assert!(second.is_empty());
    }
}
