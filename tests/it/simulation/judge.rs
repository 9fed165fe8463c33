//! What really happened, and whether it may: one world that both fakes write to and only the judge reads.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

/// Shared by everything in one simulation.
#[derive(Clone)]
pub(super) struct World(Arc<Mutex<State>>);

/// A piece of WAL.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// When it is there.
    pub(super) at: Duration,
    pub(super) commit_lsn: u64,
    pub(super) end_lsn: u64,
    /// Ids of outbox rows; none: other tables' WAL, of which only the position is seen.
    pub(super) rows: Vec<String>,
}

pub(super) struct State {
    pub(super) random: fastrand::Rng,
    pub(super) began: Instant,
    /// Whether this seed has faults at all, and whether they go on.
    pub(super) faults: bool,
    had_faults: bool,
    had_refusals: bool,
    pub(super) wal: Vec<Entry>,
    pub(super) timeline: u32,
    /// Rows of transactions that a failover has undone.
    undone: HashSet<String>,
    /// The slot in memory, and on disk.
    pub(super) confirmed: u64,
    pub(super) saved: u64,
    pub(super) slot_in_use: bool,
    /// Whether the server takes a rest now and then.
    pub(super) pauses: bool,
    /// How long the broker takes to confirm a run, in any case.
    pub(super) acknowledge_after: Duration,
    /// Rows that the broker refuses so many more times.
    pub(super) refusals: HashMap<String, u32>,
    /// By session: rows sent by Postgres, rows published by the relay.
    sessions: Vec<Session>,
    /// In the order of arrival at the queue.
    held: Vec<String>,
    acknowledged: HashSet<String>,
    log: Vec<String>,
}

#[derive(Default)]
struct Session {
    sent: Vec<String>,
    published: Vec<String>,
    /// What was acknowledged before it began.
    before: HashSet<String>,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let faults = random.u8(..) > 25;
        let mut wal = Vec::new();
        let (mut lsn, mut at, mut refusals) = (1000, 0, HashMap::new());
        for number in 0..random.u32(5..40) {
            at += random.u64(0..3000);
            let commit_lsn = lsn + random.u64(0..3) * 8;
            let end_lsn = commit_lsn + 48;
            lsn = end_lsn;
            let rows = if random.u8(..) < 180 { random.u32(1..12) } else { 0 };
            let rows: Vec<String> = (0..rows).map(|row| format!("{number}.{row}")).collect();
            for id in &rows {
                if faults && random.u16(..) < 400 {
                    refusals.insert(id.clone(), random.u32(1..4));
                }
            }
            wal.push(Entry { at: Duration::from_millis(at), commit_lsn, end_lsn, rows });
        }
        let state = State {
            began: Instant::now(),
            faults,
            had_faults: faults,
            had_refusals: !refusals.is_empty(),
            wal,
            timeline: 1,
            undone: HashSet::new(),
            confirmed: 1000,
            saved: 1000,
            slot_in_use: false,
            pauses: true,
            acknowledge_after: Duration::ZERO,
            refusals,
            sessions: Vec::new(),
            held: Vec::new(),
            acknowledged: HashSet::new(),
            log: Vec::new(),
            random,
        };
        Self(Arc::new(Mutex::new(state)))
    }

    /// No faults, a row every 50 ms, and a broker that is always a little behind: the stream never pauses, and what is told
    /// never catches up with what is read.
    pub(super) fn steady() -> Self {
        let world = Self::new(0);
        world.with(|state| {
            (state.faults, state.had_faults, state.had_refusals) = (false, false, false);
            state.refusals.clear();
            state.pauses = false;
            state.acknowledge_after = Duration::from_millis(300);
            let entry = |number: u64| Entry {
                at: Duration::from_millis(50 * number),
                commit_lsn: 1000 + 48 * number,
                end_lsn: 1000 + 48 * (number + 1),
                rows: vec![format!("{number}.0")],
            };
            state.wal = (0..600).map(entry).collect();
        });
        world
    }

    pub(super) fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.0.lock().unwrap())
    }

    pub(super) fn random<T>(&self, draw: impl FnOnce(&mut fastrand::Rng) -> T) -> T {
        self.with(|state| draw(&mut state.random))
    }

    /// Whether a fault of this probability (in 1000) strikes now.
    pub(super) fn strikes(&self, per_mille: u16) -> bool {
        self.with(|state| state.faults && state.random.u16(0..1000) < per_mille)
    }

    pub(super) fn has_faults(&self) -> bool {
        self.with(|state| state.faults)
    }

    /// No more faults.
    pub(super) fn heal(&self) {
        self.note("healed");
        self.with(|state| {
            state.faults = false;
            state.refusals.clear();
        });
    }

    pub(super) fn note(&self, event: impl Into<String>) {
        self.with(|state| {
            let line = format!("{:>9.3} {}", state.began.elapsed().as_secs_f64(), event.into());
            state.log.push(line);
        });
    }

    pub(super) fn log(&self) -> String {
        self.with(|state| state.log.join("\n"))
    }

    /// A broker session and a stream begin; both are counted as one.
    pub(super) fn begin_session(&self) -> usize {
        let number = self.with(|state| {
            let before = state.acknowledged.clone();
            state.sessions.push(Session { before, ..Session::default() });
            state.sessions.len() - 1
        });
        self.note(format!("session {number} begins"));
        number
    }

    pub(super) fn current_session(&self) -> usize {
        self.with(|state| state.sessions.len() - 1)
    }

    pub(super) fn sent(&self, id: &str) {
        self.with(|state| state.sessions.last_mut().unwrap().sent.push(id.to_owned()));
    }

    pub(super) fn published(&self, session: usize, id: &str) {
        self.note(format!("session {session} publishes {id}"));
        self.with(|state| state.sessions[session].published.push(id.to_owned()));
    }

    /// The broker takes a message, or refuses it. Whether it holds it.
    pub(super) fn arrive(&self, session: usize, id: &str) -> bool {
        let refused = self.with(|state| match state.refusals.get_mut(id) {
            Some(left) if *left > 0 => {
                *left -= 1;
                true
            }
            _ => {
                state.held.push(id.to_owned());
                false
            }
        });
        self.note(format!("broker {} {id} of session {session}", if refused { "refuses" } else { "holds" }));
        !refused
    }

    pub(super) fn acknowledge(&self, ids: &[String]) {
        self.note(format!("broker acknowledges {}", ids.join(" ")));
        self.with(|state| state.acknowledged.extend(ids.iter().cloned()));
    }

    /// The server hears a status. What it says was checked against what this stream sent; here, against the truth.
    pub(super) fn told(&self, lsn: u64) {
        self.note(format!("told {lsn}"));
        let early = self.with(|state| {
            state.confirmed = state.confirmed.max(lsn);
            let covered = state.wal.iter().filter(|entry| entry.end_lsn <= lsn).flat_map(|entry| &entry.rows);
            covered.filter(|id| !state.acknowledged.contains(*id)).cloned().collect::<Vec<_>>()
        });
        assert!(early.is_empty(), "told {lsn} before {early:?} were acknowledged\n{}", self.log());
    }

    /// A crash: the slot comes back as it was saved last.
    pub(super) fn crash_postgres(&self) {
        self.note("Postgres crashes");
        self.with(|state| {
            if state.random.bool() {
                state.saved = state.confirmed;
            }
            state.confirmed = state.saved;
        });
    }

    /// A standby takes over that had not received everything; another history follows at the same positions.
    pub(super) fn fail_over(&self) {
        self.note("failover");
        self.with(|state| {
            let now = state.began.elapsed();
            let there = state.wal.iter().filter(|entry| entry.at <= now).count();
            // The slot on the standby lags too, and never stands beyond the standby's WAL.
            let reached = state.wal.iter().take(there).filter(|entry| entry.end_lsn <= state.saved).count();
            let kept = state.random.usize(reached..=there);
            let lost: Vec<Entry> = state.wal.drain(kept..there).collect();
            state.undone.extend(lost.iter().flat_map(|entry| entry.rows.iter().cloned()));
            let removed: u64 = lost.iter().map(|entry| entry.end_lsn - entry.commit_lsn).sum();
            for entry in state.wal.iter_mut().skip(kept) {
                entry.commit_lsn -= removed;
                entry.end_lsn -= removed;
            }
            state.timeline += 1;
            state.confirmed = state.saved;
        });
    }

    pub(super) fn is_all_told(&self) -> bool {
        self.with(|state| {
            let last = state.wal.last().map_or(0, |entry| entry.end_lsn);
            state.wal.iter().all(|entry| entry.at <= state.began.elapsed()) && state.confirmed >= last
        })
    }

    /// The verdict.
    pub(super) fn judge(&self) {
        let verdict = self.with(|state| {
            let truth: Vec<&String> = state.wal.iter().flat_map(|entry| &entry.rows).collect();
            let mut seen = HashSet::new();
            let first: Vec<&String> = state
                .held
                .iter()
                .filter(|id| !state.undone.contains(*id))
                .filter(|id| seen.insert(id.as_str()))
                .collect();
            lost(&truth, &first)
                .and_then(|()| reordered(state, &truth, &first))
                .and_then(|()| replayed(&state.sessions))
                .and_then(|()| duplicated(state))
        });
        if let Err(problem) = verdict {
            panic!("{problem}\n{}", self.log());
        }
    }
}

fn lost(truth: &[&String], first: &[&String]) -> Result<(), String> {
    let (truth, first): (BTreeSet<_>, BTreeSet<_>) = (truth.iter().collect(), first.iter().collect());
    let missing: Vec<_> = truth.difference(&first).collect();
    let phantoms: Vec<_> = first.difference(&truth).collect();
    if missing.is_empty() && phantoms.is_empty() {
        Ok(())
    } else {
        Err(format!("missing {missing:?}, phantoms {phantoms:?}"))
    }
}

/// First deliveries come in commit order. A refusal in the middle of a window may reorder what follows it, and only that:
/// no client can prevent it (the broker has taken later messages already).
fn reordered(state: &State, truth: &[&String], first: &[&String]) -> Result<(), String> {
    if !state.had_refusals && truth != first {
        return Err(format!("first deliveries {first:?} instead of {truth:?}"));
    }
    Ok(())
}

/// Each session publishes a gapless run of what Postgres sent it, leaving out at its beginning only what was acknowledged
/// before: it begins again at the first unsettled message and never fills holes.
fn replayed(sessions: &[Session]) -> Result<(), String> {
    for (number, session) in sessions.iter().enumerate() {
        let Some(first) = session.published.first() else { continue };
        let skipped = session.sent.iter().position(|id| id == first).ok_or("published what was never sent")?;
        let run = session.sent.iter().skip(skipped).take(session.published.len());
        if !run.eq(&session.published) {
            return Err(format!("session {number} was sent {:?} and published {:?}", session.sent, session.published));
        }
        if let Some(hole) = session.sent.iter().take(skipped).find(|id| !session.before.contains(*id)) {
            return Err(format!("session {number} skipped {hole}, which was not settled"));
        }
    }
    Ok(())
}

fn duplicated(state: &State) -> Result<(), String> {
    let distinct: HashSet<&String> = state.held.iter().collect();
    if !state.had_faults && distinct.len() != state.held.len() {
        return Err(format!("{} duplicates without a fault", state.held.len() - distinct.len()));
    }
    Ok(())
}
