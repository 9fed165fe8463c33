//! What is in flight: taken by the publisher before it publishes, given back by the settler; and how much may be.
//!
//! The trap: a permit for each message costs more than the message. Only the publisher takes, so what was seen free stays
//! free: a run counts what it needs against that and takes it at once.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::Instant;

use super::Settings;
use super::sizing::Sizing;
use crate::metrics::Metrics;

/// A run takes at most this part of the window: confirms then make room for the next while the others are on their way.
const RUNS_IN_WINDOW: u32 = 4;

/// The limits, and how much is in flight. Outlives sessions: what was learned of the broker holds for the next one.
#[derive(Clone)]
pub(super) struct Window {
    counts: Arc<Mutex<Counts>>,
    freed: Arc<Notify>,
    metrics: Arc<Metrics>,
    bytes_max: u32,
}

struct Counts {
    messages: u32,
    bytes: u32,
    sizing: Sizing,
}

/// What a run needs.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Need {
    messages: u32,
    bytes: u32,
}

/// A run's share of the window, until it is dropped.
pub(super) struct Share {
    window: Window,
    need: Need,
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut counts = self.window.counts();
        counts.messages = counts.messages.saturating_sub(self.need.messages);
        counts.bytes = counts.bytes.saturating_sub(self.need.bytes);
        drop(counts);
        self.window.freed.notify_one();
    }
}

impl Share {
    /// Its messages settled; how that went decides how large the window is from now on.
    pub(super) fn settle(self) {
        let mut counts = self.window.counts();
        let (in_flight, before) = (counts.messages, counts.sizing.now());
        counts.sizing.settled(Instant::now(), self.need.messages, in_flight);
        let now = counts.sizing.now();
        drop(counts);
        if now != before {
            self.window.metrics.window_messages.set(now.into());
        }
    }
}

impl Window {
    pub(super) fn new(settings: &Settings, metrics: &Arc<Metrics>) -> Self {
        let limit = |value: usize| u32::try_from(value.max(1)).unwrap_or(u32::MAX);
        let sizing = Sizing::new(limit(settings.window_messages_min), limit(settings.window_messages));
        metrics.window_messages.set(sizing.now().into());
        Self {
            counts: Arc::new(Mutex::new(Counts { messages: 0, bytes: 0, sizing })),
            freed: Arc::new(Notify::new()),
            metrics: metrics.clone(),
            bytes_max: limit(settings.window_bytes),
        }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// With one message of so many bytes more; one that is larger than the window has all of it.
    pub(super) fn with(&self, need: Need, message_bytes: usize) -> Need {
        let bytes = u32::try_from(message_bytes).unwrap_or(u32::MAX).min(self.bytes_max);
        Need { messages: need.messages.saturating_add(1), bytes: need.bytes.saturating_add(bytes) }
    }

    /// What a run may have, beyond what it took first, as things are now.
    pub(super) fn room(&self) -> Need {
        let counts = self.counts();
        let size = counts.sizing.now();
        Need {
            messages: size.saturating_sub(counts.messages).min(size / RUNS_IN_WINDOW),
            bytes: self.bytes_max.saturating_sub(counts.bytes),
        }
    }

    /// Waits until so much is free, and takes it. Cancel-safe.
    pub(super) async fn take(&self, need: Need) -> Share {
        loop {
            {
                let mut counts = self.counts();
                let fits = need.messages <= counts.sizing.now().saturating_sub(counts.messages)
                    && need.bytes <= self.bytes_max.saturating_sub(counts.bytes);
                if fits {
                    counts.messages += need.messages;
                    counts.bytes += need.bytes;
                    return Share { window: self.clone(), need };
                }
            }
            self.freed.notified().await;
        }
    }

    /// Waits until nothing is in flight. Cancel-safe.
    pub(super) async fn empty(&self) {
        while !self.is_empty() {
            self.freed.notified().await;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.counts().messages == 0
    }
}

impl Need {
    pub(super) fn fits(self, room: Need) -> bool {
        self.messages <= room.messages && self.bytes <= room.bytes
    }
}
