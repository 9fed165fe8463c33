//! What really happens: one world that both fakes write to, and that only the judge reads afterwards.
//!
//! The trap: a fake that panics in a task of its own is not heard. What breaks a rule is an accusation, kept here until the
//! simulation ends.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pgoutbox::relay::{self, Settings};
use tokio::time::Instant;

use super::faults::{Dice, Fault, KINDS, Plan};
use super::owed::Owed;
use super::writers::{Entry, Fate, Row, WAL_START, write};

/// Shared by everything in one simulation.
#[derive(Clone)]
pub(super) struct World(Arc<Mutex<State>>);

/// What no retry can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// A row cannot be delivered.
    Row,
    /// The server cannot go on streaming.
    Stream,
    /// The catalog is not what it has to be.
    World,
    /// The broker is set up wrong.
    Broker,
    /// The slot stands where it should not.
    Slot,
}

/// One life of a process, as the world sees it.
#[derive(Default)]
pub(super) struct Life {
    /// By row: its receipt said so, on this timeline.
    pub(super) known: Vec<bool>,
    pub(super) timeline: u32,
    /// The stream that it opened last.
    pub(super) stream: Option<usize>,
    pub(super) window_messages: usize,
    /// After so long without a proof of a peer's health it gives up; and when it had the last one, or at least a session.
    pub(super) give_up_after: Option<Duration>,
    pub(super) good_at: Option<Instant>,
    pub(super) lived_at: Option<Instant>,
    /// Who said that no retry can help.
    pub(super) condemned: Vec<Cause>,
    /// ... in a way that ends the process before it opens anything else.
    pub(super) doomed: bool,
    pub(super) frozen: bool,
    pub(super) was_frozen: bool,
    /// The watch has told it to let go: what the stream says now is not what ends the session.
    pub(super) is_leaving: bool,
    /// It was told to stop; and this stream's goodbye has arrived since.
    pub(super) is_stopping: bool,
    pub(super) finished: Option<usize>,
}

/// A broker session and a stream, counted as one.
pub(super) struct Stream {
    pub(super) life: usize,
    pub(super) epoch: u32,
    pub(super) start: u64,
    pub(super) began: Instant,
    pub(super) last_status: Instant,
    pub(super) told: u64,
    /// The greatest position sent that may be told, and when.
    pub(super) reached: u64,
    pub(super) reached_at: Instant,
    /// The transaction that is being sent, by its commit record.
    pub(super) transaction: Option<u64>,
    /// The slot is free from then on.
    pub(super) free_at: Option<Instant>,
    pub(super) sent: Vec<Row>,
    /// Which of the sent rows cannot be delivered, and whether that is so for ever: what the broker does not take now it may
    /// take when all is healed, what was sent as poison stays so. And when the last was sent.
    pub(super) barriers: Vec<(usize, bool)>,
    pub(super) barrier_at: Instant,
    /// How many rows were sent before the server said that it cannot go on.
    pub(super) fatal_after: Option<usize>,
    pub(super) published: Vec<Row>,
    /// Of the published ones, how many the relay knows to be settled, and since when.
    pub(super) settled: usize,
    pub(super) settled_at: Instant,
    pub(super) owed: Owed,
    /// What was acknowledged when it began.
    pub(super) before: Vec<bool>,
    /// Something was done to it after which it need not tell all in time.
    pub(super) is_excused: bool,
    /// The relay waits for the catalog, and tells nothing meanwhile.
    pub(super) is_looking: bool,
}

pub(super) struct State {
    pub(super) random: fastrand::Rng,
    pub(super) dice: Dice,
    pub(super) plan: Plan,
    pub(super) began: Instant,
    pub(super) healed: bool,
    /// Nothing happens that excuses a duplicate.
    pub(super) is_harmless: bool,
    pub(super) wal: Vec<Entry>,
    pub(super) rows: Vec<Fate>,
    /// Of each transaction ever written.
    first_rows: Vec<Row>,
    pub(super) timeline: u32,
    /// Rises when the server goes and comes back: no stream outlives it.
    pub(super) epoch: u32,
    /// The slot in memory, and on disk.
    pub(super) confirmed: u64,
    pub(super) saved: u64,
    /// Until when neither peer can be reached.
    pub(super) database_away_until: Instant,
    pub(super) broker_away_until: Instant,
    /// The furthest position that a keepalive has named.
    pub(super) announced: u64,
    pub(super) holder: Option<usize>,
    /// An operator has moved the slot.
    pub(super) was_moved: bool,
    pub(super) streams: Vec<Stream>,
    pub(super) lives: Vec<Life>,
    /// Whether the server sends with pauses between.
    pub(super) pauses: bool,
    /// How long the broker waits before it confirms, in any case.
    pub(super) confirm_after: Duration,
    /// In the order of arrival at the queue.
    pub(super) held: Vec<Row>,
    pub(super) window_max: usize,
    pub(super) accusation: Option<String>,
    log: Vec<(Duration, Event)>,
}

/// A line of the log, not yet printed: a seed that holds prints none.
enum Event {
    Text(String),
    Strike(Fault),
    Publishes(usize, Row),
    Sends(usize, Row),
    Arrives(usize, Row, &'static str),
    Told(usize, u64),
}

/// Statuses are so far apart, and a row that cannot be delivered stops the relay within this once all before it is settled.
const STATUS_INTERVAL: Duration = Duration::from_millis(100);
const STOPS_WITHIN: Duration = Duration::from_secs(30);

impl World {
    pub(super) fn new(plan: &Plan) -> Self {
        let mut random = fastrand::Rng::with_seed(plan.seed);
        let mut dice = Dice::new(plan, &mut random);
        let (wal, rows) = write(plan, &mut random, &mut dice);
        let state = State {
            is_harmless: dice.is_harmless(),
            random,
            dice,
            plan: plan.clone(),
            began: Instant::now(),
            healed: false,
            first_rows: wal.iter().map(|entry| entry.rows.start).collect(),
            wal,
            rows,
            timeline: 1,
            epoch: 0,
            confirmed: WAL_START,
            saved: WAL_START,
            database_away_until: Instant::now(),
            broker_away_until: Instant::now(),
            announced: WAL_START,
            holder: None,
            was_moved: false,
            streams: Vec::new(),
            lives: Vec::new(),
            pauses: true,
            confirm_after: Duration::ZERO,
            held: Vec::new(),
            window_max: 0,
            accusation: None,
            log: Vec::new(),
        };
        Self(Arc::new(Mutex::new(state)))
    }

    /// No faults, a row every 50 ms, and a broker that is always a little behind: the stream never pauses, and what is told
    /// never catches up with what is read.
    pub(super) fn steady() -> Self {
        let world = Self::new(&Plan { strikes: 0, ..Plan::new(0) });
        world.with(|state| {
            state.pauses = false;
            state.confirm_after = Duration::from_millis(300);
            let entry = |number: usize| Entry {
                at: Duration::from_millis(50 * number as u64),
                commit_lsn: WAL_START + 48 * number as u64,
                end_lsn: WAL_START + 48 * (number as u64 + 1),
                rows: number..number + 1,
                partitions: vec![0],
            };
            state.wal = (0..600).map(entry).collect();
            state.first_rows = (0..600).collect();
            state.rows = (0..600).map(|number| Fate { name: (number, 0), ..Fate::default() }).collect();
        });
        world
    }

    pub(super) fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.0.lock().unwrap())
    }

    pub(super) fn random<T>(&self, draw: impl FnOnce(&mut fastrand::Rng) -> T) -> T {
        self.with(|state| draw(&mut state.random))
    }

    /// Some time up to `max`.
    pub(super) fn pause(&self, max: Duration) -> Duration {
        Duration::from_millis(self.random(|random| random.u64(1..=max.as_millis() as u64)))
    }

    /// Whether a fault of this kind strikes now.
    pub(super) fn strikes(&self, fault: Fault) -> bool {
        self.with(|state| state.strikes(fault))
    }

    /// No more faults.
    pub(super) fn heal(&self) {
        self.note("healed");
        self.with(|state| {
            state.dice.heal();
            state.healed = true;
            (state.database_away_until, state.broker_away_until) = (Instant::now(), Instant::now());
            for row in &mut state.rows {
                (row.refusals, row.poisoned, row.inadmissible) = (0, false, false);
            }
        });
    }

    pub(super) fn fired(&self) -> [u64; KINDS] {
        self.with(|state| state.dice.fired)
    }

    pub(super) fn note(&self, event: impl Into<String>) {
        self.with(|state| state.note(Event::Text(event.into())));
    }

    /// Something that must not be.
    pub(super) fn accuse(&self, problem: impl Into<String>) {
        self.with(|state| state.accuse(problem));
    }

    pub(super) fn log(&self) -> String {
        self.with(|state| {
            let lines = state.log.iter().map(|(at, event)| format!("{:>9.3} {}", at.as_secs_f64(), state.tell(event)));
            lines.collect::<Vec<_>>().join("\n")
        })
    }

    /// A process begins.
    pub(super) fn begin_life(&self, settings: &Settings) -> usize {
        self.with(|state| {
            let known = vec![false; state.rows.len()];
            let (now, window_messages) = (Some(Instant::now()), settings.window_messages);
            let life = Life { known, window_messages, good_at: now, lived_at: now, ..Life::default() };
            state.lives.push(Life { give_up_after: settings.give_up_after, ..life });
            state.window_max = state.window_max.max(window_messages);
            state.lives.len() - 1
        })
    }

    pub(super) fn is_all_told(&self) -> bool {
        self.with(|state| {
            let last = state.wal.last().map_or(0, |entry| entry.end_lsn);
            state.confirmed >= last && state.wal.last().is_none_or(|entry| entry.at <= state.began.elapsed())
        })
    }
}

impl State {
    pub(super) fn strikes(&mut self, fault: Fault) -> bool {
        let strikes = self.dice.strikes(fault);
        if strikes {
            self.note(Event::Strike(fault));
        }
        strikes
    }

    pub(super) fn accuse(&mut self, problem: impl Into<String>) {
        let problem = problem.into();
        self.note(Event::Text(format!("ACCUSED: {problem}")));
        self.accusation.get_or_insert(problem);
    }

    fn note(&mut self, event: Event) {
        self.log.push((self.began.elapsed(), event));
    }

    pub(super) fn sends(&mut self, stream: usize, row: Row) {
        self.streams[stream].sent.push(row);
        self.note(Event::Sends(stream, row));
    }

    pub(super) fn publishes(&mut self, stream: usize, row: Row) {
        self.streams[stream].published.push(row);
        self.note(Event::Publishes(stream, row));
    }

    pub(super) fn arrives(&mut self, stream: usize, row: Row, verdict: &'static str) {
        self.note(Event::Arrives(stream, row, verdict));
    }

    /// A status between two others comes at a distance, whatever the server asks for; and one that comes long after a row
    /// that cannot be delivered comes from a relay that should have stopped there.
    pub(super) fn paces(&mut self, stream: usize) {
        let stream = &self.streams[stream];
        let known = &self.lives[stream.life].known;
        let barrier = stream.barriers.iter().find(|(_, is_final)| *is_final || !self.healed);
        let is_due = barrier.is_some_and(|(barrier, _)| stream.sent[..*barrier].iter().all(|row| known[*row]));
        let is_excused = stream.is_excused || stream.is_looking || self.lives[stream.life].frozen;
        if stream.last_status.elapsed() < STATUS_INTERVAL {
            self.accuse("two statuses at once");
        } else if is_due && !is_excused && stream.barrier_at.max(stream.settled_at).elapsed() > STOPS_WITHIN {
            self.accuse("goes on at a row that cannot be delivered");
        }
    }

    /// What may be told from now on: rows were settled, or a position was sent.
    pub(super) fn proves(&mut self, stream: usize) {
        let stream = &mut self.streams[stream];
        stream.owed.proves(&stream.sent, &self.lives[stream.life].known);
    }

    /// These rows are published at once.
    pub(super) fn groups(&mut self, stream: usize, rows: &[Row]) {
        let stream = &mut self.streams[stream];
        let Some(first) = stream.sent.iter().rposition(|row| *row == rows[0]) else { return };
        stream.owed.groups(first, first + rows.len());
    }

    /// What is settled is told soon.
    pub(super) fn tells_in_time(&mut self, stream: usize) {
        let stream = &mut self.streams[stream];
        let life = &self.lives[stream.life];
        if stream.is_excused || stream.is_looking || life.frozen || life.is_leaving {
            stream.owed.excuses(Duration::ZERO);
        }
        let (told, is_open) = (stream.told, stream.free_at.is_none() && stream.epoch == self.epoch);
        if let Some(late) = stream.owed.late().filter(|late| is_open && *late > told) {
            self.accuse(format!("told {told} although all was settled up to {late} for long"));
        }
    }

    /// A process has seen a peer do what only a healthy one does; or it had a session.
    pub(super) fn is_well(&mut self, life: usize) {
        let life = &mut self.lives[life];
        (life.good_at, life.lived_at) = (Some(Instant::now()), Some(Instant::now()));
    }

    /// Whether this process has the slot, and a stream.
    pub(super) fn streams_now(&self, life: usize) -> bool {
        let stream = self.lives[life].stream.filter(|stream| self.holder == Some(*stream));
        stream.is_some_and(|stream| {
            let stream = &self.streams[stream];
            stream.free_at.is_none() && stream.epoch == self.epoch
        })
    }

    /// The process has to end now, and for this reason.
    pub(super) fn dooms(&mut self, life: usize, cause: Cause) {
        let life = &mut self.lives[life];
        life.condemned.push(cause);
        life.doomed = true;
    }

    pub(super) fn hears(&mut self, stream: usize, lsn: u64) {
        self.note(Event::Told(stream, lsn));
    }

    pub(super) fn note_end(&mut self, life: usize, result: &Result<(), relay::Error>) {
        let how = result.as_ref().map_or_else(ToString::to_string, |()| "well".to_owned());
        self.note(Event::Text(format!("process {life} ends: {how}")));
    }

    /// The row as it is called in the log and at the broker.
    pub(super) fn name(&self, row: Row) -> String {
        let (transaction, number) = self.rows[row].name;
        format!("{transaction}.{number}")
    }

    /// The row that has this name.
    pub(super) fn row(&self, name: &str) -> Row {
        let (transaction, number) = name.split_once('.').expect("names are made by `name`");
        self.first_rows[transaction.parse::<usize>().unwrap()] + number.parse::<usize>().unwrap()
    }

    /// How far the server's WAL goes.
    pub(super) fn wal_end(&self) -> u64 {
        let now = self.began.elapsed();
        let end = self.wal.iter().take_while(|entry| entry.at <= now).map(|entry| entry.end_lsn).last();
        end.unwrap_or(WAL_START).max(self.confirmed).max(self.announced)
    }

    /// A crash: the slot comes back as it was saved last.
    pub(super) fn crash_postgres(&mut self) {
        if self.random.bool() {
            self.saved = self.confirmed;
        }
        self.confirmed = self.saved;
        self.epoch += 1;
    }

    /// A standby takes over that had not received everything; another history follows at the same positions.
    pub(super) fn fail_over(&mut self) {
        let now = self.began.elapsed();
        let there = self.wal.iter().filter(|entry| entry.at <= now).count();
        // The slot on the standby lags too, and never stands beyond the standby's WAL.
        let reached = self.wal.iter().take(there).filter(|entry| entry.commit_lsn < self.saved).count();
        let kept = self.random.usize(reached..=there);
        let lost: Vec<Entry> = self.wal.drain(kept..there).collect();
        for row in lost.iter().flat_map(|entry| entry.rows.clone()) {
            self.rows[row].undone = true;
        }
        let removed: u64 = lost.last().map_or(0, |last| {
            let before = kept.checked_sub(1).map_or(WAL_START, |index| self.wal[index].end_lsn);
            last.end_lsn - before.max(self.saved)
        });
        for entry in self.wal.iter_mut().skip(kept) {
            entry.commit_lsn -= removed;
            entry.end_lsn -= removed;
        }
        self.timeline += 1;
        self.epoch += 1;
        self.confirmed = self.saved;
        self.announced = self.saved;
    }

    /// An operator does what the relay advised when it stopped at this row: the slot goes past the beginning of its
    /// transaction's commit record, and so past everything before it.
    pub(super) fn skip(&mut self, commit_lsn: u64, seq: usize) {
        if commit_lsn < self.confirmed {
            return;
        }
        let passed = self.confirmed..=commit_lsn;
        for entry in self.wal.clone().iter().filter(|entry| passed.contains(&entry.commit_lsn)) {
            let named = if entry.commit_lsn == commit_lsn { entry.rows.start + seq } else { entry.rows.end };
            // A crash may have undone an earlier skip.
            let is_open = |row: &Row| !self.rows[*row].acknowledged && !self.rows[*row].skipped;
            if let Some(row) = (entry.rows.start..named).find(is_open) {
                let name = self.name(row);
                self.accuse(format!("what was advised skips {name}, which was not delivered"));
            }
            (named..entry.rows.end).for_each(|row| self.rows[row].skipped = true);
        }
        self.note(Event::Text(format!("an operator moves the slot to {}", commit_lsn + 1)));
        (self.confirmed, self.was_moved) = (commit_lsn + 1, true);
    }

    fn tell(&self, event: &Event) -> impl fmt::Display {
        match event {
            Event::Text(text) => text.clone(),
            Event::Strike(fault) => format!("FAULT: {} ({fault:?})", fault.what()),
            Event::Publishes(stream, row) => format!("relay: session {stream} publishes {}", self.name(*row)),
            Event::Sends(stream, row) => format!("Postgres: sends {} in session {stream}", self.name(*row)),
            Event::Arrives(stream, row, verdict) => {
                format!("broker: {verdict} {} of session {stream}", self.name(*row))
            }
            Event::Told(stream, lsn) => format!("Postgres: hears {lsn} in session {stream}"),
        }
    }
}
