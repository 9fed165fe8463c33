//! The real stream: catalog first, then IDENTIFY_SYSTEM, then START_REPLICATION, and a control connection that watches.
//!
//! The traps. Nothing is created here: a slot that is missing is a gap, not a chore. A server that stops ends an SQL
//! connection at once but waits for its walsenders, so the control connection is how we hear of it. And the catalog is
//! asked again while streaming, since Postgres goes on without a word when the outbox has left the publication.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, interval, sleep, timeout};

use super::{Beyond, Database, Error, Opened, Progress, Source, Watch};
use crate::finding::{Finding, Look, Remedy, Verdict, explain};
use crate::lsn::Lsn;
use crate::metrics::Metrics;
use crate::outbox::{self, Mapping, Tables};
use crate::pg::advice::idle_timeout;
use crate::pg::catalog::Control;
use crate::pg::pgoutput::Column;
use crate::pg::replication::{Event, Replication, Status, Stream};
use crate::pg::world::{Names, Slot, World};
use crate::pg::{self, Settings};

/// How often the catalog is asked while streaming.
const WATCH_INTERVAL: Duration = Duration::from_secs(5);

/// Something is wrong when it was so each of these times: who changes several partitions takes longer than a look.
const LOOKS: u32 = 4;
const BETWEEN_LOOKS: Duration = Duration::from_millis(250);

/// Opening a stream: a handful of queries and two logins, each with a limit of its own. Starting decoding may take long:
/// the server reads WAL from the slot's restart position on before it answers.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// How long the slot may take to show what it was told.
const SEEN_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a row of an unknown table waits for its transaction to be seen, without which the session ends.
const VISIBLE_WITHIN: Duration = Duration::from_millis(500);

/// A look at what the slot keeps while nothing streams: a login and a handful of queries.
const SURVEY_TIMEOUT: Duration = Duration::from_secs(5);

/// The stream may be silent for so long where `wal_sender_timeout` is switched off.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// What to do when the outbox is another table than when the stream began.
const RECREATED: &str = "check which rows were committed before the new table joined the publication: they are not in the \
    stream";

/// Opens streams from one Postgres.
pub struct Postgres {
    /// Where it is.
    pub settings: Settings,
    /// What the relay depends on.
    pub names: Names,
    /// Proves that the table's columns make an outbox, before a row comes.
    pub mapping: Mapping,
    /// Lag and the slot's state.
    pub metrics: Arc<Metrics>,
    /// What was said already of what hurts now or one day: once is enough.
    pub said: HashSet<String>,
}

/// A running stream.
pub struct PostgresSource {
    stream: Stream,
    /// Which process sends it.
    server: String,
    settings: Settings,
    names: Names,
}

impl Postgres {
    /// What keeps a relay from running here: the catalog's findings and the columns'.
    pub fn findings(&self, world: &World) -> Vec<Finding> {
        let mut findings = world.findings(&self.names);
        findings.extend(self.column_finding(world));
        findings
    }

    /// What the columns lack. Where only the publication leaves one out, altering the table would not help.
    pub fn column_finding(&self, world: &World) -> Option<Finding> {
        let table = world.table.as_ref().filter(|table| matches!(table.kind.as_str(), "r" | "p"))?;
        let layout = |columns: &[(String, u32)]| {
            let column = |(name, type_id): &(String, u32)| Column { name: name.clone(), type_id: *type_id };
            self.mapping.layout(&columns.iter().map(column).collect::<Vec<_>>())
        };
        let Err(outbox::Error::Columns(finding)) = layout(&world.streamed_columns()) else { return None };
        if layout(&table.columns).is_err() {
            return Some(finding);
        }
        let (publication, table) = (&self.names.publication, &self.mapping.table);
        let problem = finding.problem.trim_start_matches(&format!("table {table}: "));
        let problem = format!("publication {publication} leaves out columns of {table}: {problem}");
        Some(Finding::new(problem, world.republish(&self.names)))
    }

    /// Looks again before it says that something is wrong: the catalog is read by several statements, and a partition that
    /// goes between two of them looks like a hole in the publication.
    async fn inspect(&self, control: &Control) -> Result<World, pg::Error> {
        let mut world = control.inspect(&self.names).await?;
        for _ in 1..LOOKS {
            if self.findings(&world).is_empty() {
                break;
            }
            sleep(BETWEEN_LOOKS).await;
            world = control.inspect(&self.names).await?;
        }
        if world.in_recovery {
            let place = control.place();
            return Err(pg::Error::NotNow(format!("{place} is a standby: waiting for a primary")));
        }
        let findings = self.findings(&world);
        if findings.is_empty() { Ok(world) } else { Err(pg::Error::World(findings)) }
    }

    /// Says once, ahead, what would take the slot away while nothing is wrong but the broker.
    fn warn(&mut self, world: &World) {
        if let Some(Look { what, verdict: Verdict::Note(finding) }) = idle_timeout(world) {
            self.say(&format!("{what}: {finding}"));
        }
    }

    /// A warning, once.
    fn say(&mut self, text: &str) {
        if self.said.insert(text.to_owned()) {
            tracing::warn!("{text}");
        }
    }

    /// Asks again and again, and hears when the server goes.
    fn watch(&self, mut control: Control, expected: Tables) -> Watch {
        let (names, metrics, mapping) = (self.names.clone(), self.metrics.clone(), self.mapping.clone());
        let settings = self.settings.clone();
        let mut database = Postgres { settings, names, mapping, metrics, said: HashSet::new() };
        Box::pin(async move {
            let mut ticks = interval(WATCH_INTERVAL);
            loop {
                tokio::select! {
                    biased;
                    error = control.ended() => return error,
                    _ = ticks.tick() => {}
                }
                match database.look(&control, &expected).await {
                    Ok(()) => {}
                    Err(error) => return error,
                }
            }
        })
    }

    /// One look at the world, which must still be the one that the stream was opened in.
    async fn look(&mut self, control: &Control, expected: &Tables) -> Result<(), pg::Error> {
        // By itself: nobody's lock is in the way of that.
        control.slot(&self.names.slot).await?.iter().for_each(|slot| self.measure(slot));
        let world = match self.inspect(control).await {
            // Somebody alters the table, or rewrites it: the stream does not wait for that, and a later look sees it.
            Err(error @ pg::Error::Late(_)) => {
                self.say(&format!("streaming goes on, and {error}"));
                return Ok(());
            }
            world => world?,
        };
        self.said.clear();
        let oid = world.table.as_ref().map(|table| table.oid);
        if oid.is_some_and(|oid| !expected.outbox.contains(&oid)) {
            let table = self.names.qualified();
            let problem = format!("table {table} was dropped and re-created while it was streamed");
            return Err(pg::Error::World(vec![Finding::new(problem, Remedy::act(RECREATED).then_act("restart"))]));
        }
        Ok(())
    }

    /// Messages of transactions that this primary does not have stay delivered; all that can be done is to say so.
    fn count_beyond(&self, beyond: Beyond, from: u32, to: u32, switch_point: Option<Lsn>) {
        self.metrics.published_beyond_switchpoint.inc_by(beyond.at_least);
        let Beyond { at_least, at_most } = beyond;
        let what = if from == to { "a log that lost its end" } else { "failover" };
        let switch_point = switch_point.map_or_else(|| "unknown".to_owned(), |lsn| lsn.to_string());
        if at_most > 0 {
            tracing::error!(
                from,
                to,
                switch_point,
                at_least,
                at_most,
                "{what}: messages were published whose transactions this primary does not have: those with an \
                 x-outbox-lsn at or beyond the switch point"
            );
        } else {
            tracing::info!(from, to, switch_point, "{what}: nothing was published that this primary does not have");
        }
    }

    fn measure(&self, slot: &Slot) {
        let gauge = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        self.metrics.wal_lag_bytes.set(gauge(slot.server.bytes_since(slot.confirmed)));
        self.metrics.slot_retained_bytes.set(gauge(slot.retained_bytes()));
        self.metrics.slot_safe_bytes.set(slot.safe_bytes().unwrap_or(-1));
        if slot.wal_status.as_deref() == Some("unreserved") {
            tracing::error!(
                slot = self.names.slot,
                "the slot is about to be lost: the server removes its WAL at the next checkpoint. Raise \
                 max_slot_wal_keep_size now"
            );
        }
    }
}

impl Database for Postgres {
    type Source = PostgresSource;

    async fn open(&mut self, progress: &mut Progress) -> Result<Opened<PostgresSource>, Error> {
        let control = Control::open(&self.settings).await?;
        let world = self.inspect(&control).await?;
        self.warn(&world);
        world.slot.iter().for_each(|slot| self.measure(slot));
        if world.slot.as_ref().is_some_and(|slot| slot.active_pid.is_some()) {
            // It may stand further on by the time it is ours, and rightly.
            progress.contend();
        }
        let slot = world.slot.as_ref().map(|slot| slot.confirmed).unwrap_or_default();
        let mut replication = Replication::open(&control, &self.settings).await?;
        let (identity, server) = replication.identify().await?;
        let mut parted = None;
        if let Some(left) = progress.left_behind(&identity) {
            let switch_point = replication.switch_point(identity.timeline, left).await?;
            parted = Some((progress.beyond(switch_point), left, switch_point));
        } else if progress.has_outlived(&identity, server) {
            parted = Some((progress.beyond(Some(server)), identity.timeline, Some(server)));
        }
        let silence_max = replication.sender_timeout().await?.unwrap_or(SILENCE_MAX);
        let start = progress.begin(identity.clone(), server, &self.names.slot, slot)?;
        // Once: from here on this history is the known one.
        if let Some((beyond, left, switch_point)) = parted {
            self.count_beyond(beyond, left, identity.timeline, switch_point);
        }
        let late = pg::Error::Timeout { during: "starting to stream", after: START_TIMEOUT };
        let starting = replication.start(&self.names.slot, &self.names.publication, start);
        let stream = timeout(START_TIMEOUT, starting).await.unwrap_or(Err(late))?;
        let tables = tables(&self.names, &world);
        let (settings, names, server) = (self.settings.clone(), self.names.clone(), control.server().await?);
        Ok(Opened {
            source: PostgresSource { stream, server, settings, names },
            watch: self.watch(control, tables.clone()),
            tables,
            identity,
            start,
            silence_max,
        })
    }

    async fn survey(&mut self) {
        let looking = async {
            let control = Control::open(&self.settings).await?;
            control.slot(&self.names.slot).await?.iter().for_each(|slot| self.measure(slot));
            self.inspect(&control).await
        };
        match timeout(SURVEY_TIMEOUT, looking).await {
            Ok(Ok(world)) => self.warn(&world),
            Ok(Err(pg::Error::World(findings))) => {
                for finding in findings {
                    let text = format!("the relay will stop when the broker is back: {finding}");
                    if self.said.insert(text.clone()) {
                        tracing::error!("{text}");
                    }
                }
            }
            Ok(Err(error)) => tracing::debug!("Postgres was not looked at meanwhile: {}", explain(&error)),
            Err(_) => tracing::debug!("Postgres was not looked at meanwhile: it takes longer than {SURVEY_TIMEOUT:?}"),
        }
    }
}

impl Source for PostgresSource {
    async fn next(&mut self) -> Result<Event, pg::Error> {
        self.stream.next().await
    }

    async fn tell(&mut self, status: Status) -> Result<(), pg::Error> {
        self.stream.tell(status).await
    }

    async fn tables(&mut self, xid: u32) -> Result<(Tables, bool), pg::Error> {
        let control = Control::open(&self.settings).await?;
        // After a failover the address leads to a server that may lack the table of a row which the old one sent.
        if control.server().await? != self.server {
            return Err(pg::Error::NotNow(format!(
                "another server answers at {} since the stream began",
                control.place()
            )));
        }
        // A commit mostly comes here before the server shows it, and a standby seldom takes long.
        let began = Instant::now();
        let mut is_visible = control.is_visible(xid).await?;
        while !is_visible && began.elapsed() < VISIBLE_WITHIN {
            sleep(Duration::from_millis(20)).await;
            is_visible = control.is_visible(xid).await?;
        }
        // In this order: what is visible now is in the catalog that is read next.
        Ok((tables(&self.names, &control.inspect(&self.names).await?), is_visible))
    }

    async fn finish(self, status: Status) -> Result<(), pg::Error> {
        self.stream.finish(status).await?;
        let control = Control::open(&self.settings).await?;
        let began = Instant::now();
        loop {
            let slot = control.slot(&self.names.slot).await?;
            if slot.is_some_and(|slot| slot.confirmed >= status.settled) {
                return Ok(());
            }
            if began.elapsed() > SEEN_TIMEOUT {
                return Err(pg::Error::Timeout { during: "seeing the last position in the slot", after: SEEN_TIMEOUT });
            }
            sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Which tables are the outbox, and which are known not to be.
pub fn tables(names: &Names, world: &World) -> Tables {
    Tables {
        outbox: world.table.iter().flat_map(|table| table.family.iter().copied()).collect(),
        others: world.others().into_iter().collect(),
        name: (names.schema.clone(), names.table.clone()),
    }
}
