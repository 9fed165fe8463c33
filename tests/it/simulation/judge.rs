//! Whether what happened may happen: reads the world when all is over, and a process's part when it ends.
//!
//! The trap: a judge inside the system under test shares its mistakes. This one reads what the peers saw.

use std::time::Duration;

use pgoutbox::relay;
use pgoutbox::retry::Retry;
use pgoutbox::{outbox, pg};

use super::database::is_slot_in_use;
use super::world::{Cause, Life, State, Stream, World};
use super::writers::{Entry, Row};

/// No attempt to reach a peer takes longer, its backoff included.
const ATTEMPT: Duration = Duration::from_secs(30);

/// The verdict on the whole.
pub(super) fn judge(world: &World) -> Result<(), String> {
    world.with(|state| {
        if let Some(accusation) = &state.accusation {
            return Err(accusation.clone());
        }
        let first = first_deliveries(state);
        lost(state, &first)?;
        reordered(state, &first)?;
        overtaken(state, &first)?;
        state.streams.iter().enumerate().try_for_each(|(number, stream)| replayed(state, number, stream))?;
        duplicated(state)
    })
}

/// Rows in the order in which the broker first held them, without those that a failover has undone, and those that an
/// operator has skipped: where a crash then undoes that, they come again.
fn first_deliveries(state: &State) -> Vec<Row> {
    let mut seen = vec![false; state.rows.len()];
    let counts = |row: &Row| !state.rows[*row].undone && !state.rows[*row].skipped;
    let held = state.held.iter().copied().filter(counts);
    held.filter(|row| !std::mem::replace(&mut seen[*row], true)).collect()
}

fn lost(state: &State, first: &[Row]) -> Result<(), String> {
    let mut there = vec![false; state.rows.len()];
    first.iter().for_each(|row| there[*row] = true);
    let truth: Vec<Row> = state.wal.iter().flat_map(|entry| entry.rows.clone()).collect();
    let is_missing = |row: &Row| !there[*row] && !state.rows[*row].skipped;
    let missing: Vec<String> = truth.iter().copied().filter(is_missing).map(|row| state.name(row)).collect();
    if !missing.is_empty() {
        return Err(format!("missing {}", missing.join(" ")));
    }
    truth.iter().for_each(|row| there[*row] = false);
    if there.contains(&true) {
        return Err("phantoms: the broker holds rows that were never committed".to_owned());
    }
    Ok(())
}

/// First deliveries come in commit order. Only a message that the broker has refused may come later than its successors: no
/// client can prevent that, the broker had taken some of them already.
fn reordered(state: &State, first: &[Row]) -> Result<(), String> {
    let kept: Vec<Row> = first.iter().copied().filter(|row| !state.rows[*row].refused).collect();
    match kept.windows(2).find(|pair| pair[0] > pair[1]) {
        Some(pair) => {
            Err(format!("first deliveries out of order: {} before {}", state.name(pair[0]), state.name(pair[1])))
        }
        None => Ok(()),
    }
}

/// And only what was in flight with it may overtake it, which is less than a window.
fn overtaken(state: &State, first: &[Row]) -> Result<(), String> {
    let mut place = vec![0; state.rows.len()];
    state.wal.iter().flat_map(|entry| entry.rows.clone()).enumerate().for_each(|(index, row)| place[row] = index);
    let mut furthest = 0;
    for row in first {
        if furthest >= place[*row] + state.window_max.max(1) {
            return Err(format!("{} was overtaken by more than a window", state.name(*row)));
        }
        furthest = furthest.max(place[*row]);
    }
    Ok(())
}

/// Each session publishes a gapless run of what Postgres sent it, leaving out at its beginning only what was acknowledged
/// before: it begins again at the first unsettled message and never fills holes.
fn replayed(state: &State, number: usize, stream: &Stream) -> Result<(), String> {
    let Some(first) = stream.published.first() else { return Ok(()) };
    let skipped = stream.sent.iter().position(|row| row == first).ok_or("published what was never sent")?;
    let run = stream.sent.iter().skip(skipped);
    if let Some((sent, published)) = run.zip(&stream.published).find(|(sent, published)| sent != published) {
        let (sent, published) = (state.name(*sent), state.name(*published));
        return Err(format!("session {number} published {published} where {sent} was next"));
    }
    if stream.published.len() > stream.sent.len() - skipped {
        return Err(format!("session {number} published more than it was sent"));
    }
    if let Some(hole) = stream.sent.iter().take(skipped).find(|row| !stream.before[**row]) {
        return Err(format!("session {number} skipped {}, which was not settled", state.name(*hole)));
    }
    Ok(())
}

fn duplicated(state: &State) -> Result<(), String> {
    let mut seen = vec![false; state.rows.len()];
    let twice = state.held.iter().filter(|row| std::mem::replace(&mut seen[**row], true)).count();
    if state.is_harmless && twice > 0 {
        return Err(format!("{twice} duplicates without a fault that excuses them"));
    }
    Ok(())
}

/// A process has ended; if it was told to, `in_time` says whether it had the time to do so well.
pub(super) fn ended(world: &World, life: usize, result: &Result<(), relay::Error>, in_time: Option<bool>) {
    world.with(|state| {
        state.note_end(life, result);
        match result {
            Ok(()) if in_time.is_none() => state.accuse("a process ended without being told to"),
            Ok(()) if in_time == Some(true) => parted_well(state, life),
            Ok(()) => {}
            // Another relay held the slot and let go unseen, or an operator was at it: to this one it is moved, and it says so.
            Err(relay::Error::Moved { .. }) if state.lives[life].stream != state.holder || state.was_moved => {}
            Err(relay::Error::GaveUp { after, .. }) => gave_up(state, life, *after),
            Err(error) if cause(error).is_some_and(|cause| state.lives[life].condemned.contains(&cause)) => {
                stopped_ahead(state, life, error);
                skipped(state, life, error);
            }
            Err(error) => state.accuse(format!("a process gave up without need: {error}")),
        }
    });
}

/// A clean stop has told everything that it read, and read no transaction in part.
fn parted_well(state: &mut State, life: usize) {
    // The last session may have ended before, and in another way.
    let (Some(number), true) = (state.lives[life].stream, state.lives[life].finished == state.lives[life].stream)
    else {
        return;
    };
    let stream = &state.streams[number];
    // A server that stops too is not kept waiting.
    if stream.settled != stream.published.len() || stream.is_excused || state.lives[life].is_leaving {
        return;
    }
    if stream.transaction.is_some() {
        state.accuse("a clean stop in the middle of a transaction");
    } else if stream.told != stream.reached {
        let (told, reached) = (stream.told, stream.reached);
        state.accuse(format!("a clean stop told {told} where all was settled up to {reached}"));
    }
}

/// What an error that no retry can help says is wrong.
fn cause(error: &relay::Error) -> Option<Cause> {
    Some(match error {
        error if error.retry() != Retry::Never => return None,
        relay::Error::Outbox(_) => Cause::Row,
        relay::Error::Postgres(pg::Error::World(_)) => Cause::World,
        relay::Error::Postgres(_) | relay::Error::Undecodable { .. } => Cause::Stream,
        relay::Error::Sink(_) => Cause::Broker,
        relay::Error::Moved { .. } => Cause::Slot,
        _ => return None,
    })
}

/// What cannot be delivered stops the relay, and everything before it is settled: the remedy skips that.
fn stopped_ahead(state: &mut State, life: usize, error: &relay::Error) {
    let Some(stream) = state.lives[life].stream.map(|stream| &state.streams[stream]) else { return };
    let named = match (error, stream.fatal_after) {
        (relay::Error::Outbox(outbox::Error::Row { id, .. }), _) => {
            let row = state.row(id);
            match stream.barriers.iter().find(|(sent, _)| stream.sent[*sent] == row) {
                Some((sent, _)) => *sent,
                None => return state.accuse(format!("stopped at row {id}, which could be delivered")),
            }
        }
        (relay::Error::Undecodable { commit_lsn, .. }, Some(_))
            if commit_lsn.get() != stream.transaction.unwrap_or(0) =>
        {
            let transaction = stream.transaction;
            return state.accuse(format!("names {commit_lsn} where {transaction:?} was being sent"));
        }
        (error, Some(sent)) if cause(error) == Some(Cause::Stream) => sent,
        (error, None) if cause(error) == Some(Cause::Stream) => {
            return state.accuse("stopped at a stream that could go on");
        }
        _ => return,
    };
    let before = &stream.sent[..named];
    let first = stream.barriers.iter().find(|(sent, is_final)| *sent < named && (*is_final || !state.healed));
    if let Some((first, _)) = first {
        let row = state.name(stream.sent[*first]);
        state.accuse(format!("row {row} cannot be delivered, and the relay stopped behind it: {error}"));
    } else if let Some(row) = before.iter().find(|row| !state.rows[**row].acknowledged) {
        let row = state.name(*row);
        state.accuse(format!("stopped with {row} before it unsettled: {error}"));
    }
}

/// An operator does what the relay says, where that is still the server which sent the row, and nobody holds the slot.
fn skipped(state: &mut State, life: usize, error: &relay::Error) {
    let Some(stream) = state.lives[life].stream.map(|number| &state.streams[number]) else { return };
    let (commit_lsn, seq) = match error {
        relay::Error::Outbox(outbox::Error::Row { position, .. }) => (position.commit_lsn.get(), position.seq as usize),
        // The first row that was not sent; between two transactions nobody knows which one is next.
        relay::Error::Undecodable { commit_lsn, .. } if commit_lsn.get() > 0 => {
            let entry = state.wal.iter().find(|entry| entry.commit_lsn == commit_lsn.get());
            let sent = |entry: &Entry| stream.sent.iter().filter(|row| entry.rows.contains(row)).count();
            (commit_lsn.get(), entry.map_or(0, sent))
        }
        _ => return,
    };
    if stream.epoch == state.epoch && !is_slot_in_use(state) {
        state.skip(commit_lsn, seq);
    }
}

/// A process has ended; so many of its sessions because it believed that it had stood still.
pub(super) fn paused(world: &World, life: usize, sessions: u64) {
    world.with(|state| {
        if sessions > 0 && !state.lives[life].was_frozen {
            state.accuse("a session ended as if the process had stood still");
        }
    });
}

/// A process is about to be killed: what it settled is told, so that little comes twice.
pub(super) fn quiet(world: &World, life: usize) {
    world.with(|state| {
        if let Some(stream) = state.lives[life].stream {
            state.tells_in_time(stream);
        }
    });
}

/// A process tries a broker again: not without end, where it was told to give up.
pub(super) fn persists(world: &World, life: usize) {
    world.with(|state| {
        let Life { give_up_after, lived_at, was_frozen, .. } = state.lives[life];
        let alone = lived_at.map_or(Duration::ZERO, |at| at.elapsed());
        if let Some(after) = give_up_after.filter(|after| alone > *after + ATTEMPT && !was_frozen) {
            state.accuse(format!("was to give up after {after:?} and tries again after {alone:?}"));
        }
    });
}

/// Whether it had the patience that it was told to have.
fn gave_up(state: &mut State, life: usize, after: Duration) {
    let Life { give_up_after, good_at, .. } = state.lives[life];
    let waited = good_at.map_or(Duration::ZERO, |at| at.elapsed());
    if give_up_after != Some(after) || waited < after {
        state.accuse(format!("gave up after {after:?}, {waited:?} after all was well"));
    }
}
