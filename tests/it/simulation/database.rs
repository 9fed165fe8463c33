//! A Postgres that does what the real one does to a relay, and asserts what the real one would punish silently.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use pgoutbox::lsn::Lsn;
use pgoutbox::outbox::Tables;
use pgoutbox::pg::replication::{Event, Identity, Status};
use pgoutbox::pg::{Error, ServerError};
use pgoutbox::relay::{self, Database, Opened, Progress, Source};
use tokio::time::{Instant, sleep, sleep_until};

use super::judge::World;
use super::wire;

const SILENCE_MAX: Duration = Duration::from_secs(6);

pub(super) struct FakeDatabase {
    world: World,
}

impl FakeDatabase {
    pub(super) fn new(world: &World) -> Self {
        Self { world: world.clone() }
    }
}

fn in_use() -> Error {
    Error::Server(ServerError::parse(Bytes::from_static(b"C55006\0Mreplication slot is active\0\0")))
}

impl Database for FakeDatabase {
    type Source = FakeSource;

    async fn open(&mut self, progress: &mut Progress) -> Result<Opened<FakeSource>, relay::Error> {
        sleep(Duration::from_millis(self.world.random(|random| random.u64(1..50)))).await;
        if self.world.strikes(20) {
            return Err(Error::Closed.into());
        }
        if self.world.strikes(15) {
            self.world.crash_postgres();
        }
        if self.world.strikes(8) {
            self.world.fail_over();
        }
        if self.world.with(|state| state.slot_in_use) {
            return Err(in_use().into());
        }
        let (confirmed, timeline, server) = self.world.with(|state| {
            let now = state.began.elapsed();
            let server = state.wal.iter().filter(|entry| entry.at <= now).map(|entry| entry.end_lsn).max();
            (state.confirmed, state.timeline, server.unwrap_or(1000).max(state.confirmed))
        });
        let identity = Identity { system: "7".to_owned(), timeline };
        let start = progress.begin(identity.clone(), Lsn::new(server), "slot", Lsn::new(confirmed))?;
        self.world.with(|state| state.slot_in_use = true);
        self.world.begin_session();
        self.world.note(format!("stream from {start}, slot at {confirmed}, timeline {timeline}"));
        let world = self.world.clone();
        let watch = Box::pin(async move {
            loop {
                sleep(Duration::from_millis(500)).await;
                if world.strikes(3) {
                    return Error::GoingAway("shutting down".to_owned());
                }
            }
        });
        let source = FakeSource {
            world: self.world.clone(),
            // A position before the slot's is moved forward, silently; one beyond it is believed, silently.
            start: start.get().max(confirmed),
            frames: VecDeque::new(),
            next_at: Instant::now(),
            keepalive_at: Instant::now() + SILENCE_MAX / 3,
            described: false,
            decoded: 0,
            sent: 0,
            position: start.get().max(confirmed),
            open: None,
            allowed: BTreeSet::from([start.get(), confirmed]),
            told: 0,
        };
        let tables = Tables {
            outbox: [wire::OUTBOX].into(),
            name: ("public".to_owned(), "outbox".to_owned()),
            ..Tables::default()
        };
        Ok(Opened { source, watch, tables, identity, start, silence_max: SILENCE_MAX })
    }
}

/// A frame to be sent, and what it means to the fake.
enum Frame {
    Begin(u64, u64),
    Relation,
    Row(String),
    Commit(u64, u64),
    Keepalive(u64, bool),
}

pub(super) struct FakeSource {
    world: World,
    /// A transaction is skipped if and only if its commit record starts before this.
    start: u64,
    frames: VecDeque<Frame>,
    next_at: Instant,
    keepalive_at: Instant,
    described: bool,
    /// Entries of the WAL that were decoded.
    decoded: usize,
    sent: u64,
    position: u64,
    open: Option<u64>,
    /// What may be told: positions of commits and of keepalives outside transactions, as sent.
    allowed: BTreeSet<u64>,
    told: u64,
}

impl Drop for FakeSource {
    fn drop(&mut self) {
        self.world.with(|state| state.slot_in_use = false);
    }
}

impl FakeSource {
    /// Decodes one entry more, if it is there.
    fn decode(&mut self) {
        let (entry, faults) = self.world.with(|state| {
            let entry = state.wal.get(self.decoded).filter(|entry| entry.at <= state.began.elapsed()).cloned();
            (entry, state.faults)
        });
        let Some(entry) = entry else {
            if Instant::now() >= self.keepalive_at {
                self.frames.push_back(Frame::Keepalive(self.position, true));
                self.keepalive_at = Instant::now() + SILENCE_MAX / 3;
            }
            return;
        };
        self.decoded += 1;
        if entry.commit_lsn < self.start {
            return;
        }
        if entry.rows.is_empty() {
            // Other tables' WAL: seen in keepalives only.
            self.frames.push_back(Frame::Keepalive(entry.end_lsn, false));
            return;
        }
        self.frames.push_back(Frame::Begin(entry.commit_lsn, entry.end_lsn));
        if !std::mem::replace(&mut self.described, true) {
            self.frames.push_back(Frame::Relation);
        }
        for id in entry.rows {
            self.frames.push_back(Frame::Row(id));
            if faults && self.world.random(|random| random.u8(..)) < 20 {
                // Inside a transaction a keepalive carries its own commit record's position.
                self.frames.push_back(Frame::Keepalive(entry.commit_lsn, self.world.random(|random| random.bool())));
            }
        }
        self.frames.push_back(Frame::Commit(entry.commit_lsn, entry.end_lsn));
    }

    fn send(&mut self, frame: Frame) -> Event {
        self.sent += 1;
        match frame {
            Frame::Begin(commit_lsn, end_lsn) => {
                self.open = Some(end_lsn);
                Event::Data(wire::begin(commit_lsn))
            }
            Frame::Relation => Event::Data(wire::relation()),
            Frame::Row(id) => {
                self.world.sent(&id);
                Event::Data(wire::insert(&id))
            }
            Frame::Commit(commit_lsn, end_lsn) => {
                self.open = None;
                self.position = end_lsn;
                self.allowed.insert(end_lsn);
                Event::Data(wire::commit(commit_lsn, end_lsn))
            }
            Frame::Keepalive(wal_end, reply_requested) => {
                if self.open.is_none() {
                    self.position = self.position.max(wal_end);
                    self.allowed.insert(wal_end);
                }
                Event::Keepalive { wal_end: Lsn::new(wal_end), reply_requested }
            }
        }
    }
}

impl Source for FakeSource {
    async fn next(&mut self) -> Result<Event, Error> {
        loop {
            // Cancel-safe: what is due stands in the fields.
            sleep_until(self.next_at).await;
            if self.frames.is_empty() {
                self.decode();
            }
            let Some(frame) = self.frames.pop_front() else {
                self.next_at = Instant::now() + Duration::from_millis(20);
                continue;
            };
            let pauses = self.world.with(|state| state.pauses);
            let pause = self.world.random(|random| if pauses && random.u8(..) < 40 { random.u64(0..200) } else { 0 });
            self.next_at = Instant::now() + Duration::from_millis(pause);
            if self.world.strikes(3) {
                self.world.note("the stream breaks");
                if self.world.strikes(300) {
                    self.world.crash_postgres();
                }
                return Err(Error::Closed);
            }
            return Ok(self.send(frame));
        }
    }

    async fn tell(&mut self, status: Status) -> Result<(), Error> {
        let settled = status.settled.get();
        let log = || self.world.log();
        assert!(settled >= self.told, "feedback falls from {} to {settled}\n{}", self.told, log());
        assert!(self.allowed.contains(&settled), "told {settled}, which was never sent as a position\n{}", log());
        assert!(status.received >= status.settled, "settled beyond received\n{}", log());
        self.told = settled;
        if self.world.strikes(10) {
            self.world.note("the status is lost");
            return Err(Error::Closed);
        }
        self.world.told(settled);
        if self.world.random(|random| random.u8(..)) < 20 {
            self.world.with(|state| state.saved = state.confirmed);
        }
        Ok(())
    }

    async fn tables(&mut self) -> Result<Tables, Error> {
        Err(Error::Closed)
    }

    async fn finish(mut self, status: Status) -> Result<(), Error> {
        self.tell(status).await
    }
}
