//! Every metric: name, help, type; and why the relay is not ready.
//!
//! The trap: health computed from a loop that turns says "fine" over a dead stream. Readiness here is what was last heard
//! from each peer, and lag is what the server says.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use tokio::time::Instant;

/// From one broker round trip on loopback to a backlog of an hour.
const COMMIT_TO_SETTLED_BUCKETS: [f64; 15] =
    [0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 300.0, 3600.0];

/// All that the outside can see of a running relay.
#[derive(Debug)]
pub struct Metrics {
    /// Messages written to the broker.
    pub published: Counter,
    /// Messages that the broker holds.
    pub settled: Counter,
    /// Messages that the broker refused, by reason.
    pub refused: Family<Reason, Counter>,
    /// Messages published from transactions that the primary does not have, after a failover or when its log lost its end.
    pub published_beyond_switchpoint: Counter,
    /// Messages published and not settled.
    pub in_flight_messages: Gauge,
    /// Their bytes.
    pub in_flight_bytes: Gauge,
    /// How many messages may be in flight now.
    pub window_messages: Gauge,
    /// From a transaction's commit until the broker held the message.
    pub commit_to_settled: Histogram,
    /// What Postgres was told.
    pub confirmed_lsn: Gauge,
    /// How far the stream was read.
    pub received_lsn: Gauge,
    /// WAL written since the confirmed position, by the server.
    pub wal_lag_bytes: Gauge,
    /// WAL that the slot keeps on the server's disk.
    pub slot_retained_bytes: Gauge,
    /// WAL that may still be written before the slot is in danger; -1 without a limit.
    pub slot_safe_bytes: Gauge,
    /// Sessions by how they ended.
    pub sessions: Family<End, Counter>,
    oldest_unsettled: Gauge<f64, AtomicU64>,
    ready: Gauge,
    broker_blocked: Gauge,
    /// Commit time of the oldest message in flight, microseconds since 1970; 0 when nothing waits.
    oldest_committed_at: AtomicI64,
    state: Mutex<State>,
    registry: Registry,
}

/// Why a message was refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Reason {
    /// `unroutable`, `nacked` or `undeliverable`.
    pub reason: &'static str,
}

/// How a session ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct End {
    /// `stopped`, `broker`, `postgres`, `refused`, `paused` or `fatal`.
    pub end: &'static str,
}

/// What readiness is made of.
#[derive(Debug, Default)]
struct State {
    /// Since when the stream has been silent, and how long it may be.
    heard: Option<(Instant, Duration)>,
    broker_open: bool,
    blocked: Option<String>,
    refused: Option<String>,
    /// Why the last session ended, until the next one runs.
    waiting: Option<String>,
    /// The process was told to end.
    stopping: bool,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All at zero, not ready; but 0 safe bytes would be an alarm.
    pub fn new() -> Self {
        let mut metrics = Self {
            published: Counter::default(),
            settled: Counter::default(),
            refused: Family::default(),
            published_beyond_switchpoint: Counter::default(),
            in_flight_messages: Gauge::default(),
            in_flight_bytes: Gauge::default(),
            window_messages: Gauge::default(),
            commit_to_settled: Histogram::new(COMMIT_TO_SETTLED_BUCKETS),
            confirmed_lsn: Gauge::default(),
            received_lsn: Gauge::default(),
            wal_lag_bytes: Gauge::default(),
            slot_retained_bytes: Gauge::default(),
            slot_safe_bytes: Gauge::default(),
            sessions: Family::default(),
            oldest_unsettled: Gauge::default(),
            ready: Gauge::default(),
            broker_blocked: Gauge::default(),
            oldest_committed_at: AtomicI64::new(0),
            state: Mutex::default(),
            registry: Registry::with_prefix("pgoutbox"),
        };
        metrics.slot_safe_bytes.set(-1);
        metrics.register();
        // All there are, at zero: who counts what a counter rises by never sees the step with which it appears.
        for reason in ["unroutable", "nacked", "undeliverable"] {
            drop(metrics.refused.get_or_create(&Reason { reason }));
        }
        for end in ["stopped", "broker", "postgres", "refused", "paused", "fatal"] {
            drop(metrics.sessions.get_or_create(&End { end }));
        }
        metrics
    }

    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register("published", "Messages written to the broker", self.published.clone());
        registry.register("settled", "Messages that the broker holds", self.settled.clone());
        registry.register("refused", "Messages that the broker refused", self.refused.clone());
        registry.register(
            "published_beyond_switchpoint",
            "Messages published from transactions that the primary does not have: after a failover, or a lost log",
            self.published_beyond_switchpoint.clone(),
        );
        registry.register(
            "in_flight_messages",
            "Messages published and not yet settled",
            self.in_flight_messages.clone(),
        );
        registry.register("in_flight_bytes", "Bytes published and not yet settled", self.in_flight_bytes.clone());
        registry.register("window_messages", "Messages that may be in flight now", self.window_messages.clone());
        registry.register_with_unit(
            "commit_to_settled",
            "From a transaction's commit until the broker held the message",
            Unit::Seconds,
            self.commit_to_settled.clone(),
        );
        registry.register_with_unit(
            "oldest_unsettled",
            "Age of the oldest message in flight, by its commit; 0 when nothing waits",
            Unit::Seconds,
            self.oldest_unsettled.clone(),
        );
        registry.register("confirmed_lsn", "WAL position told to Postgres", self.confirmed_lsn.clone());
        registry.register("received_lsn", "WAL position read from Postgres", self.received_lsn.clone());
        registry.register("wal_lag_bytes", "WAL written since the confirmed position", self.wal_lag_bytes.clone());
        registry.register(
            "slot_retained_bytes",
            "WAL that the slot keeps on the server",
            self.slot_retained_bytes.clone(),
        );
        registry.register(
            "slot_safe_bytes",
            "WAL that may be written before the slot is in danger, 0 when it is lost; -1 without a limit, or not known yet",
            self.slot_safe_bytes.clone(),
        );
        registry.register("sessions", "Sessions by how they ended", self.sessions.clone());
        registry.register("ready", "1 when /readyz says so", self.ready.clone());
        registry.register("broker_blocked", "1 while the broker blocks publishers", self.broker_blocked.clone());
    }

    /// In the format of Prometheus.
    pub fn render(&self) -> String {
        self.ready.set(i64::from(self.reasons().is_empty()));
        self.oldest_unsettled.set(self.oldest_unsettled_age().as_secs_f64());
        let mut text = String::new();
        // Writing to a String cannot fail.
        if encode(&mut text, &self.registry).is_err() {
            let _ = writeln!(text, "# encoding failed");
        }
        text
    }

    /// What keeps the relay from being ready: nothing when it is.
    pub fn reasons(&self) -> Vec<String> {
        let state = self.state();
        let mut reasons = Vec::new();
        if state.stopping {
            reasons.push("stopping".to_owned());
        }
        match state.heard {
            None => reasons.push("no stream from Postgres".to_owned()),
            Some((at, limit)) if at.elapsed() > limit => {
                reasons.push(format!("nothing heard from Postgres for {} s", at.elapsed().as_secs()));
            }
            Some(_) => {}
        }
        if !state.broker_open {
            reasons.push("no broker session".to_owned());
        }
        reasons.extend(state.blocked.iter().map(|reason| format!("the broker blocks publishers: {reason}")));
        reasons.extend(state.refused.iter().cloned());
        // A refusal ends its session: said once.
        reasons.extend(state.waiting.iter().filter(|waiting| state.refused.as_ref() != Some(*waiting)).cloned());
        reasons
    }

    /// The process was told to end: whatever its peers say, nothing new is taken.
    pub fn stopping(&self) {
        self.state().stopping = true;
    }

    /// Postgres was heard last `at` then; the stream may be silent for `limit` from there.
    pub fn heard(&self, at: Instant, limit: Duration) {
        self.state().heard = Some((at, limit));
    }

    /// Broker and stream are open, in this order.
    pub fn opened(&self) {
        let mut state = self.state();
        state.broker_open = true;
        state.waiting = None;
        drop(state);
        self.oldest(None);
    }

    /// Whether a session is open: broker and stream.
    pub fn is_open(&self) -> bool {
        self.state().broker_open
    }

    /// The session is over, for this reason. What was in flight still waits, and grows older.
    pub fn closed(&self, reason: Option<String>) {
        let mut state = self.state();
        state.heard = None;
        state.broker_open = false;
        state.blocked = None;
        state.waiting = reason;
        drop(state);
        self.broker_blocked.set(0);
        self.in_flight_messages.set(0);
        self.in_flight_bytes.set(0);
    }

    /// The broker blocks publishers, or no longer does.
    pub fn blocked(&self, reason: Option<String>) {
        self.broker_blocked.set(i64::from(reason.is_some()));
        self.state().blocked = reason;
    }

    /// Whether the broker blocks publishers.
    pub fn is_blocked(&self) -> bool {
        self.state().blocked.is_some()
    }

    /// A message is refused.
    pub fn refuse(&self, reason: String) {
        self.state().refused = Some(reason);
    }

    /// Messages are taken. Whether one had been refused before.
    pub fn taken(&self) -> bool {
        self.state().refused.take().is_some()
    }

    /// Commit time of the oldest message in flight, microseconds since 1970; `None` when nothing waits.
    pub fn oldest(&self, committed_at: Option<u64>) {
        let value = committed_at.map_or(0, |at| i64::try_from(at).unwrap_or(i64::MAX));
        self.oldest_committed_at.store(value, Ordering::Relaxed);
    }

    fn oldest_unsettled_age(&self) -> Duration {
        match u64::try_from(self.oldest_committed_at.load(Ordering::Relaxed)) {
            Ok(at) if at > 0 => ages(&[at]).next().unwrap_or_default(),
            _ => Duration::ZERO,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere must not take the probes with it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Times since commits, given in microseconds since 1970; zero when the two clocks disagree. The clock is read once.
pub fn ages(committed_at: &[u64]) -> impl Iterator<Item = Duration> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    committed_at.iter().map(move |at| now.saturating_sub(Duration::from_micros(*at)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn ready_only_while_the_stream_is_heard_and_nothing_is_refused() {
        let metrics = Metrics::new();
        assert!(!metrics.reasons().is_empty());
        metrics.opened();
        metrics.heard(Instant::now(), Duration::from_secs(10));
        assert_eq!(metrics.reasons(), [""; 0]);
        metrics.refuse("unroutable".to_owned());
        metrics.blocked(Some("low on memory".to_owned()));
        assert_eq!(metrics.reasons().len(), 2);
        assert!(metrics.taken() && !metrics.taken());
        metrics.blocked(None);
        tokio::time::advance(Duration::from_secs(11)).await;
        assert!(metrics.reasons()[0].contains("nothing heard"));
        metrics.closed(Some("the broker went".to_owned()));
        assert_eq!(metrics.reasons().len(), 3);
        metrics.stopping();
        assert_eq!(metrics.reasons().len(), 4);
    }

    #[test]
    fn what_waits_for_a_broker_that_went_grows_older_until_it_is_published_again() {
        let metrics = Metrics::new();
        metrics.opened();
        metrics.oldest(Some(1_000_000));
        metrics.closed(None);
        assert!(metrics.oldest_unsettled_age().as_secs() > 1_000_000_000);
        metrics.opened();
        assert_eq!(metrics.oldest_unsettled_age(), Duration::ZERO);
    }

    #[test]
    fn names_are_those_of_the_contract() {
        let metrics = Metrics::new();
        metrics.sessions.get_or_create(&End { end: "broker" }).inc();
        let text = metrics.render();
        for name in [
            "pgoutbox_published_total 0",
            "pgoutbox_settled_total 0",
            "pgoutbox_refused_total{reason=\"unroutable\"} 0",
            "pgoutbox_published_beyond_switchpoint_total 0",
            "pgoutbox_in_flight_messages 0",
            "pgoutbox_in_flight_bytes 0",
            "pgoutbox_window_messages 0",
            "pgoutbox_commit_to_settled_seconds_count 0",
            "pgoutbox_oldest_unsettled_seconds 0",
            "pgoutbox_confirmed_lsn 0",
            "pgoutbox_received_lsn 0",
            "pgoutbox_wal_lag_bytes 0",
            "pgoutbox_slot_retained_bytes 0",
            "pgoutbox_slot_safe_bytes -1",
            "pgoutbox_sessions_total{end=\"broker\"} 1",
            "pgoutbox_ready 0",
            "pgoutbox_broker_blocked 0",
        ] {
            assert!(text.contains(name), "{name} in\n{text}");
        }
    }
}
