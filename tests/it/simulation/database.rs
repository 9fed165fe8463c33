//! A Postgres that does what the real one does to a relay when a stream is opened.

use std::time::Duration;

use bytes::Bytes;
use pgoutbox::finding::{Finding, Remedy};
use pgoutbox::lsn::Lsn;
use pgoutbox::outbox::Tables;
use pgoutbox::pg::replication::Identity;
use pgoutbox::pg::{Error, ServerError};
use pgoutbox::relay::{self, Database, Opened, Progress, Watch};
use tokio::time::{Instant, sleep};

use super::faults::Fault;
use super::owed::Owed;
use super::source::FakeSource;
use super::wire;
use super::world::{Cause, State, Stream, World};

/// The server's `wal_sender_timeout`.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(6);

/// What the real one allows itself for opening a stream.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a peer stays away, at most.
pub(super) const AWAY_MAX: Duration = Duration::from_secs(60);

pub(super) struct FakeDatabase {
    pub(super) world: World,
    pub(super) life: usize,
}

pub(super) fn server_error(code: &str, message: &str) -> ServerError {
    ServerError::parse(Bytes::from(format!("C{code}\0M{message}\0\0")))
}

/// The tables as the catalog shows them now.
pub(super) fn tables(state: &State) -> Tables {
    let now = state.began.elapsed();
    let there = state.wal.iter().take_while(|entry| entry.at <= now);
    let partitions = there.flat_map(|entry| entry.partitions.iter().copied());
    Tables {
        outbox: partitions.chain([0]).map(wire::oid).collect(),
        others: [wire::OTHER].into(),
        name: ("public".to_owned(), "outbox".to_owned()),
    }
}

impl FakeDatabase {
    /// What happens to the server between two sessions, and whether it answers.
    async fn answer(&self) -> Result<(), Error> {
        let world = &self.world;
        sleep(world.pause(Duration::from_millis(50))).await;
        if world.strikes(Fault::DatabaseAway) {
            let back = Instant::now() + world.pause(AWAY_MAX);
            world.with(|state| state.database_away_until = back);
        }
        let is_away = world.with(|state| state.database_away_until > Instant::now());
        if is_away || world.strikes(Fault::DatabaseRefuses) {
            return Err(Error::Closed);
        }
        if world.strikes(Fault::DatabaseHangs) {
            sleep(OPEN_TIMEOUT).await;
            return Err(Error::Timeout { during: "connecting", after: OPEN_TIMEOUT });
        }
        if world.strikes(Fault::WorldWrong) {
            world.with(|state| state.dooms(self.life, Cause::World));
            return Err(Error::World(vec![Finding::new("the fake is wrong", Remedy::default())]));
        }
        if world.strikes(Fault::PostgresCrashes) {
            world.with(State::crash_postgres);
        }
        if world.strikes(Fault::FailOver) {
            world.with(State::fail_over);
        }
        Ok(())
    }

    /// A server, or a slot, that the relay must not stream from. The relay's verdict on it.
    fn imposture(&self, progress: &mut Progress) -> Result<(), relay::Error> {
        let (seen, wal_end, timeline) =
            self.world.with(|state| (state.lives[self.life].timeline, state.wal_end(), state.timeline));
        if seen > 1 && self.world.strikes(Fault::OldPrimary) {
            let identity = Identity { system: "7".to_owned(), timeline: seen - 1 };
            let result = progress.begin(identity, Lsn::new(wal_end + 10_000), "slot", Lsn::new(wal_end));
            if result.is_ok() {
                self.world.accuse("begins to stream from an old primary");
            }
            return result.map(|_| ());
        }
        let is_alone =
            self.world.with(|state| state.lives.len() == self.life + 1 && !state.dice.allows(Fault::SlotHeld));
        if is_alone && seen == timeline && !self.world.with(|state| state.dice.allows(Fault::SecondRelay)) {
            let freeze = self.world.with(|state| state.dice.allows(Fault::Freeze));
            if !freeze && self.world.strikes(Fault::SlotMoved) {
                let identity = Identity { system: "7".to_owned(), timeline };
                let result = progress.begin(identity, Lsn::new(wal_end + 800), "slot", Lsn::new(wal_end + 400));
                if result.is_ok() {
                    self.world.accuse("begins at a slot that someone has moved");
                }
                self.world.with(|state| state.dooms(self.life, Cause::Slot));
                return result.map(|_| ());
            }
        }
        Ok(())
    }

    /// The stream that is about to begin, unless another one holds the slot.
    fn acquire(&self, start: u64) -> usize {
        let now = Instant::now();
        self.world.with(|state| {
            let stream = Stream {
                life: self.life,
                epoch: state.epoch,
                start,
                began: now,
                last_status: now,
                told: 0,
                reached: start,
                reached_at: now,
                transaction: None,
                free_at: None,
                sent: Vec::new(),
                barriers: Vec::new(),
                barrier_at: now,
                fatal_after: None,
                published: Vec::new(),
                settled: 0,
                settled_at: now,
                owed: Owed::new(),
                before: state.rows.iter().map(|row| row.acknowledged).collect(),
                is_excused: false,
                is_looking: false,
            };
            state.streams.push(stream);
            let number = state.streams.len() - 1;
            state.holder = Some(number);
            let life = &mut state.lives[self.life];
            life.stream = Some(number);
            life.is_leaving = false;
            if life.timeline != state.timeline {
                // Another history: what was known says nothing here.
                life.known.fill(false);
                life.timeline = state.timeline;
            }
            number
        })
    }
}

/// Whether the slot's stream is alive on the server's side.
pub(super) fn is_slot_in_use(state: &State) -> bool {
    let Some(stream) = state.holder.map(|holder| &state.streams[holder]) else { return false };
    let now = Instant::now();
    let is_alive = match stream.free_at {
        Some(free_at) => now < free_at,
        None => now <= stream.last_status + SILENCE_MAX,
    };
    is_alive && stream.epoch == state.epoch
}

/// What the control connection will say, if anything.
fn watch(world: World, life: usize) -> Watch {
    Box::pin(async move {
        loop {
            sleep(Duration::from_millis(500)).await;
            if world.strikes(Fault::GoingAway) {
                world.with(|state| state.lives[life].is_leaving = true);
                return Error::GoingAway("shutting down".to_owned());
            }
            if world.strikes(Fault::WorldChanges) {
                world.with(|state| state.dooms(life, Cause::World));
                return Error::World(vec![Finding::new("the fake changed", Remedy::default())]);
            }
        }
    })
}

impl Database for FakeDatabase {
    type Source = FakeSource;

    async fn open(&mut self, progress: &mut Progress) -> Result<Opened<FakeSource>, relay::Error> {
        if self.world.with(|state| state.lives[self.life].doomed) {
            self.world.accuse("goes on after an error that no retry can help");
        }
        self.answer().await?;
        if self.world.with(|state| is_slot_in_use(state)) {
            self.world.with(|state| state.is_well(self.life));
            return Err(Error::Server(server_error("55006", "replication slot is active")).into());
        }
        self.imposture(progress)?;
        let (confirmed, timeline, wal_end, tables) =
            self.world.with(|state| (state.confirmed, state.timeline, state.wal_end(), tables(state)));
        let identity = Identity { system: "7".to_owned(), timeline };
        let start = progress.begin(identity.clone(), Lsn::new(wal_end), "slot", Lsn::new(confirmed))?;
        // A position before the slot's is moved forward, silently; one beyond it is believed, silently.
        let stream = self.acquire(start.get().max(confirmed));
        self.world.note(format!(
            "session {stream} of process {} begins at {start}, slot at {confirmed}, timeline {timeline}",
            self.life
        ));
        let source = FakeSource::new(&self.world, stream, [start.get(), confirmed]);
        let watch = watch(self.world.clone(), self.life);
        Ok(Opened { source, watch, tables, identity, start, silence_max: SILENCE_MAX })
    }

    async fn survey(&mut self) {}
}
