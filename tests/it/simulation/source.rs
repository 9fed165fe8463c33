//! The stream of the fake Postgres: what a walsender sends, hears and punishes.
//!
//! The trap: a real server does not punish a wrong position, it believes it. This one accuses.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use pgoutbox::lsn::Lsn;
use pgoutbox::outbox::Tables;
use pgoutbox::pg::Error;
use pgoutbox::pg::replication::{Event, Status};
use pgoutbox::relay::Source;
use tokio::time::{Instant, sleep, sleep_until};

use super::database::{SILENCE_MAX, server_error, tables};
use super::faults::Fault;
use super::wire;
use super::world::{Cause, State, Stream, World};
use super::writers::Row;

/// A session that lasted for so long with nothing to do had both peers.
const GOOD_SESSION: Duration = Duration::from_secs(30);

/// What the real one allows itself for writing a status and for a goodbye.
const TELL_TIMEOUT: Duration = Duration::from_secs(10);
const FINISH_TIMEOUT: Duration = Duration::from_secs(5);

/// A frame to be sent, and what it means to the fake.
enum Frame {
    Begin(u64),
    Relation(u32, &'static str),
    Row(u32, Row),
    OtherRow,
    /// So many, and nothing happens between them.
    OtherRows(u32),
    Logical,
    Commit(u64, u64),
    Keepalive(u64, bool),
}

pub(super) struct FakeSource {
    world: World,
    stream: usize,
    /// A transaction is skipped if and only if its commit record starts before this.
    start: u64,
    frames: VecDeque<Frame>,
    next_at: Instant,
    /// Before the next frame is whole.
    parts: u32,
    /// The relay wants an answer; we want one.
    is_asked: bool,
    has_asked: bool,
    described: BTreeSet<u32>,
    /// Entries of the WAL that were decoded.
    decoded: usize,
    position: u64,
    is_silent: bool,
    /// What may be told: positions of commits and of keepalives outside transactions, as sent.
    allowed: BTreeSet<u64>,
    /// Entries whose rows were seen to be settled before their end was told.
    proven: usize,
}

impl Drop for FakeSource {
    fn drop(&mut self) {
        let held_on = self.world.strikes(Fault::SlotHeld);
        let free_at = Instant::now() + if held_on { self.world.pause(Duration::from_secs(3)) } else { Duration::ZERO };
        self.world.with(|state| {
            let stream = &mut state.streams[self.stream];
            stream.free_at.get_or_insert(free_at);
            let (life, began, is_idle) = (stream.life, stream.began, stream.settled == stream.published.len());
            state.lives[life].lived_at = Some(Instant::now());
            if is_idle && began.elapsed() > GOOD_SESSION {
                state.is_well(life);
            }
        });
    }
}

impl FakeSource {
    pub(super) fn new(world: &World, stream: usize, allowed: [u64; 2]) -> Self {
        let start = world.with(|state| state.streams[stream].start);
        Self {
            world: world.clone(),
            stream,
            start,
            frames: VecDeque::new(),
            next_at: Instant::now(),
            parts: 0,
            is_asked: false,
            has_asked: false,
            described: BTreeSet::new(),
            decoded: 0,
            position: start,
            is_silent: false,
            allowed: BTreeSet::from(allowed),
            proven: 0,
        }
    }

    fn strikes(&self, fault: Fault) -> bool {
        self.world.strikes(fault)
    }

    /// Decodes one entry more, if it is there.
    fn decode(&mut self) {
        let entry = self.world.with(|state| {
            let now = state.began.elapsed();
            state.wal.get(self.decoded).filter(|entry| entry.at <= now).cloned()
        });
        let Some(entry) = entry else {
            let silent = self.world.with(|state| state.streams[self.stream].last_status.elapsed());
            if std::mem::take(&mut self.is_asked) {
                self.keepalive(self.position, false);
            } else if silent >= SILENCE_MAX / 2 && !self.has_asked {
                // The real one asks when it has heard nothing for so long, and says nothing by itself.
                self.has_asked = true;
                self.keepalive(self.position, true);
            } else if self.strikes(Fault::KeepaliveJumps) {
                // Other databases' WAL, up to the very record that commits next.
                let next = self.world.with(|state| state.wal.get(self.decoded).map(|entry| entry.commit_lsn));
                self.keepalive(next.unwrap_or(self.position).max(self.position), false);
            }
            return;
        };
        self.decoded += 1;
        if entry.commit_lsn < self.start {
            self.position = self.position.max(entry.end_lsn);
            return;
        }
        if self.strikes(Fault::KeepaliveJumps) {
            self.keepalive(entry.commit_lsn, false);
        }
        if entry.rows.is_empty() {
            // Other tables' WAL: seen in keepalives only.
            self.keepalive(entry.end_lsn, false);
            return;
        }
        self.frames.push_back(Frame::Begin(entry.commit_lsn));
        for row in entry.rows.clone() {
            self.distract(entry.commit_lsn);
            let partition = entry.partition(row);
            let oid = wire::oid(partition);
            if self.described.insert(oid) || self.strikes(Fault::Described) {
                let name = if partition == 0 { "outbox" } else { "outbox_partition" };
                self.frames.push_back(Frame::Relation(oid, name));
            }
            self.frames.push_back(Frame::Row(oid, row));
        }
        self.distract(entry.commit_lsn);
        self.frames.push_back(Frame::Commit(entry.commit_lsn, entry.end_lsn));
        if self.strikes(Fault::Keepalive) {
            self.keepalive(entry.end_lsn, self.world.random(|random| random.bool()));
        }
    }

    /// What may stand between two rows of a transaction.
    fn distract(&mut self, commit_lsn: u64) {
        if self.strikes(Fault::Keepalive) {
            // Inside a transaction a keepalive carries its own commit record's position.
            let reply_requested = self.world.random(|random| random.bool());
            self.frames.push_back(Frame::Keepalive(commit_lsn, reply_requested));
        }
        let (one, many) = (self.strikes(Fault::OtherTable), self.strikes(Fault::OtherRows));
        if (one || many) && self.described.insert(wire::OTHER) {
            self.frames.push_back(Frame::Relation(wire::OTHER, "orders"));
        }
        if one {
            self.frames.push_back(Frame::OtherRow);
        }
        if many {
            // Around powers of two, where limits stand.
            let count = self.world.random(|random| (1 << random.u32(8..13)) + random.u32(0..7) - 3);
            self.frames.push_back(Frame::OtherRows(count));
        }
        if self.strikes(Fault::OtherMessage) {
            self.frames.push_back(Frame::Logical);
        }
    }

    fn keepalive(&mut self, wal_end: u64, reply_requested: bool) {
        self.frames.push_back(Frame::Keepalive(wal_end, reply_requested));
    }

    /// Why the stream ends instead of sending what comes next.
    fn end(&mut self) -> Option<Error> {
        if self.strikes(Fault::StreamBreaks) {
            if self.strikes(Fault::PostgresCrashes) {
                self.world.with(State::crash_postgres);
            }
            return Some(Error::Closed);
        }
        if self.strikes(Fault::ServerError) {
            return Some(Error::Server(server_error("XX000", "something")));
        }
        let fatal = if self.strikes(Fault::FatalServerError) {
            Error::Server(server_error("42704", "publication does not exist"))
        } else if self.strikes(Fault::Undecodable) {
            Error::Server(server_error("XX000", "invalid memory alloc request size 2000000000"))
        } else if self.strikes(Fault::PublicationSkipped) {
            Error::PublicationSkipped(server_error("55000", "skipped loading publication"))
        } else {
            return None;
        };
        self.world.with(|state| {
            let stream = &mut state.streams[self.stream];
            stream.fatal_after.get_or_insert(stream.sent.len());
            state.lives[stream.life].condemned.push(Cause::Stream);
        });
        Some(fatal)
    }

    fn send(&mut self, frame: Frame) -> Event {
        match frame {
            Frame::Begin(commit_lsn) => {
                self.world.with(|state| state.streams[self.stream].transaction = Some(commit_lsn));
                Event::Data(wire::begin(commit_lsn))
            }
            Frame::Relation(oid, name) => Event::Data(wire::relation(oid, name)),
            Frame::Row(oid, row) => {
                let (name, is_poisoned, size) = self.world.with(|state| {
                    state.sends(self.stream, row);
                    let fate = &state.rows[row];
                    if fate.poisoned || fate.inadmissible {
                        let stream = &mut state.streams[self.stream];
                        stream.barriers.push((stream.sent.len() - 1, fate.poisoned));
                        stream.barrier_at = Instant::now();
                        state.lives[stream.life].condemned.push(Cause::Row);
                    }
                    (state.name(row), state.rows[row].poisoned, state.rows[row].size)
                });
                Event::Data(wire::insert(oid, &name, is_poisoned, &"-".repeat(size)))
            }
            Frame::OtherRow | Frame::OtherRows(_) => Event::Data(wire::insert(wire::OTHER, "0", false, "{}")),
            Frame::Logical => Event::Data(wire::logical()),
            Frame::Commit(commit_lsn, end_lsn) => {
                self.world.with(|state| state.streams[self.stream].transaction = None);
                self.reach(end_lsn);
                Event::Data(wire::commit(commit_lsn, end_lsn))
            }
            Frame::Keepalive(wal_end, reply_requested) => {
                if self.world.with(|state| state.streams[self.stream].transaction.is_none()) {
                    self.reach(wal_end);
                }
                Event::Keepalive { wal_end: Lsn::new(wal_end), reply_requested }
            }
        }
    }

    /// A position is sent that may be told once all before it is settled.
    fn reach(&mut self, lsn: u64) {
        self.position = self.position.max(lsn);
        self.allowed.insert(lsn);
        self.world.with(|state| {
            state.announced = state.announced.max(lsn);
            let stream = &mut state.streams[self.stream];
            if lsn > stream.reached {
                (stream.reached, stream.reached_at) = (lsn, Instant::now());
                stream.owed.sends(stream.sent.len(), lsn);
            }
            state.proves(self.stream);
        });
    }

    /// Whether the server still listens to this stream.
    fn is_alive(&self) -> bool {
        self.world.with(|state| {
            let stream = &state.streams[self.stream];
            let is_late = stream.last_status.elapsed() > SILENCE_MAX;
            let excused = state.lives[stream.life].frozen || stream.is_excused || stream.is_looking;
            let is_current = stream.epoch == state.epoch && state.holder == Some(self.stream);
            if is_late && is_current && !excused {
                state.accuse("the server took the relay for dead: it said nothing for too long");
            }
            is_current && !is_late
        })
    }

    /// The server hears a status.
    fn hear(&mut self, status: Status) {
        let settled = status.settled.get();
        (self.is_asked, self.has_asked) = (self.is_asked || status.reply_requested, false);
        self.world.with(|state| {
            state.hears(self.stream, settled);
            state.tells_in_time(self.stream);
            let stream = &mut state.streams[self.stream];
            (stream.told, stream.last_status) = (settled, Instant::now());
            state.lives[stream.life].frozen = false;
            state.confirmed = state.confirmed.max(settled);
            if state.random.u8(..) < 20 {
                state.saved = state.confirmed;
            }
        });
    }

    /// What the real server would believe without a word.
    fn examine(&mut self, status: Status) {
        let (settled, received) = (status.settled.get(), status.received.get());
        let told = self.world.with(|state| state.streams[self.stream].told);
        if settled < told {
            self.world.accuse(format!("feedback falls from {told} to {settled}"));
        }
        if !self.allowed.contains(&settled) || !self.allowed.contains(&received) {
            self.world.accuse(format!("told {settled} of {received}, which was never sent as a position"));
        }
        if received < settled {
            self.world.accuse(format!("settled {settled} beyond received {received}"));
        }
        self.world.with(|state| {
            let Stream { life, epoch, .. } = state.streams[self.stream];
            // A stream of a server that is gone tells positions of another history, to nobody.
            if epoch != state.epoch {
                return;
            }
            while let Some(entry) = state.wal.get(self.proven).filter(|entry| entry.end_lsn <= settled) {
                self.proven += 1;
                if entry.commit_lsn < self.start {
                    continue;
                }
                let (rows, known) = (&state.rows, &state.lives[life].known);
                let early = entry.rows.clone().find(|row| !rows[*row].acknowledged || !known[*row]);
                if let Some(row) = early {
                    let name = state.name(row);
                    state.accuse(format!("told {settled} before {name} was settled"));
                }
            }
        });
    }

    async fn hang(&mut self, during: &'static str, after: Duration) -> Error {
        self.world.with(|state| state.streams[self.stream].is_excused = true);
        sleep(after).await;
        Error::Timeout { during, after }
    }
}

impl Source for FakeSource {
    async fn next(&mut self) -> Result<Event, Error> {
        loop {
            // Cancel-safe: what is due stands in the fields. What is due already is here already: a timer would say so later.
            if Instant::now() < self.next_at {
                sleep_until(self.next_at).await;
            }
            if self.is_silent || self.strikes(Fault::StreamSilent) {
                self.is_silent = true;
                sleep(Duration::from_secs(3600)).await;
            }
            let is_alive = self.is_alive();
            if self.frames.is_empty() && is_alive {
                self.decode();
            }
            if self.parts == 0 && !self.frames.is_empty() && self.strikes(Fault::SlowRow) {
                self.parts = 12;
            }
            if self.parts > 0 && is_alive {
                self.parts -= 1;
                self.next_at = Instant::now() + SILENCE_MAX / 8;
                return Ok(Event::Part);
            }
            // What stands in the socket arrives although the server is gone; but not always all of it.
            if !is_alive && (self.frames.is_empty() || self.world.random(|random| random.u8(..) < 60)) {
                return Err(Error::Closed);
            }
            let Some(frame) = self.frames.pop_front() else {
                self.next_at = Instant::now() + Duration::from_millis(20);
                continue;
            };
            if let Frame::OtherRows(left @ 2..) = frame {
                self.frames.push_front(Frame::OtherRows(left - 1));
                return Ok(self.send(Frame::OtherRow));
            }
            let pauses = self.world.with(|state| state.pauses);
            let pause = self.world.random(|random| if pauses && random.u8(..) < 40 { random.u64(0..200) } else { 0 });
            self.next_at = Instant::now() + Duration::from_millis(pause);
            if self.strikes(Fault::StreamRests) {
                self.next_at += self.world.pause(Duration::from_secs(4));
            }
            return match self.end() {
                Some(error) => Err(error),
                None => Ok(self.send(frame)),
            };
        }
    }

    async fn tell(&mut self, status: Status) -> Result<(), Error> {
        self.examine(status);
        self.world.with(|state| state.paces(self.stream));
        if self.strikes(Fault::TellHangs) {
            return Err(self.hang("writing a status", TELL_TIMEOUT).await);
        }
        if !self.is_alive() || self.strikes(Fault::TellFails) {
            return Err(Error::Closed);
        }
        self.hear(status);
        if self.strikes(Fault::TellBreaks) { Err(Error::Closed) } else { Ok(()) }
    }

    async fn tables(&mut self, _xid: u32) -> Result<(Tables, bool), Error> {
        self.world.note("the catalog is asked for tables");
        if self.strikes(Fault::TablesSlow) {
            self.world.with(|state| state.streams[self.stream].is_looking = true);
            sleep(self.world.pause(Duration::from_secs(3))).await;
            self.world.with(|state| {
                let stream = &mut state.streams[self.stream];
                stream.is_looking = false;
                stream.owed.excuses(Duration::ZERO);
            });
        }
        if self.strikes(Fault::TablesFail) {
            return Err(Error::Closed);
        }
        // The address may lead to another server by now, and the real one looks for that.
        if self.world.with(|state| state.streams[self.stream].epoch != state.epoch) {
            return Err(Error::NotNow("another server".to_owned()));
        }
        if self.strikes(Fault::TablesInvisible) {
            let tables = self.world.with(|state| tables(state));
            return Ok((Tables { outbox: [wire::oid(0)].into(), ..tables }, false));
        }
        Ok((self.world.with(|state| tables(state)), true))
    }

    async fn finish(mut self, status: Status) -> Result<(), Error> {
        self.examine(status);
        if !self.is_alive() || self.strikes(Fault::FinishFails) {
            return Err(Error::Closed);
        }
        if self.strikes(Fault::FinishHangs) {
            return Err(self.hang("ending the stream", FINISH_TIMEOUT).await);
        }
        self.hear(status);
        if self.strikes(Fault::FinishBreaks) {
            return Err(Error::Closed);
        }
        self.world.with(|state| {
            let stream = &mut state.streams[self.stream];
            stream.free_at = Some(Instant::now());
            // A session that the broker ended parts well, too: what it had read and not published is for the next one.
            let life = &mut state.lives[stream.life];
            life.finished = life.is_stopping.then_some(self.stream);
        });
        Ok(())
    }
}
