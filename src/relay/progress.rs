//! How far everything is settled, remembered from one session to the next while the process lives.
//!
//! The slot is the only store of position; this memory only spares duplicates, after a crash of Postgres (which saves slots
//! lazily) and inside a transaction that was published in part. The trap: a position means something on one system and one
//! timeline only. After a failover to a lagging standby, starting at the old one loses rows without a word.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::Error;
use super::published::{Beyond, Published};
use crate::lsn::Lsn;
use crate::outbox::Position;
use crate::pg::replication::Identity;

/// What this process knows to be settled.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    identity: Option<Identity>,
    /// The last checkpoint before which everything is settled.
    settled: Lsn,
    /// The last message such that it and everything before it is settled.
    frontier: Position,
    /// The highest position ever told to Postgres, arrived or not.
    told: Lsn,
    /// Someone else held the slot since: it may have been moved with good reason.
    contended: bool,
    /// How the last session ended, if by the broker's doing.
    caution: Caution,
    /// What went to the broker from this system and timeline.
    published: Published,
    steps: Steps,
}

/// How often something was settled that had not been. It rises whatever the server: after a failover positions are lower.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Steps {
    /// Runs of messages.
    pub runs: u64,
    /// Positions before which everything is settled.
    pub checkpoints: u64,
}

/// Messages to be proven one by one before many are sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Caution {
    /// So many at most.
    pub messages: usize,
    /// The refused one: once it is settled, caution ends.
    pub until: Option<String>,
}

impl Caution {
    /// Whether the next message goes alone.
    pub fn is_on(&self) -> bool {
        self.messages > 0
    }

    fn proven(&mut self, id: &str) {
        self.messages = if self.until.as_deref() == Some(id) { 0 } else { self.messages.saturating_sub(1) };
    }
}

impl Progress {
    /// What the next session proves one by one before it sends many.
    pub fn caution(&self) -> &Caution {
        &self.caution
    }

    /// The timeline that `identity` has left behind, if it is the same system's and a later one: a failover.
    pub fn left_behind(&self, identity: &Identity) -> Option<u32> {
        let known = self.identity.as_ref().filter(|known| known.system == identity.system)?;
        (known.timeline < identity.timeline).then_some(known.timeline)
    }

    /// Whether this is the same system and timeline, and its WAL ends before what was settled: a copy that was restored, or
    /// a log that lost its end. The frontier may lie beyond the last checkpoint: rows that a server writes below it a second
    /// time are others.
    pub fn has_outlived(&self, identity: &Identity, server: Lsn) -> bool {
        self.identity.as_ref() == Some(identity) && server < self.settled.max(self.frontier.commit_lsn)
    }

    /// How many messages were published whose transactions a server does not have that parted from ours at `switch_point`.
    pub fn beyond(&self, switch_point: Option<Lsn>) -> Beyond {
        self.published.beyond(switch_point)
    }

    /// This message goes to the broker.
    pub fn publish(&mut self, position: Position) {
        self.published.add(position);
    }

    /// Where a new stream begins, on this server whose WAL ends at `server` and whose slot stands at `confirmed`.
    ///
    /// # Errors
    /// `OldTimeline` for a server that was left behind, `Moved` when the slot stands beyond all that was ever told.
    pub fn begin(&mut self, identity: Identity, server: Lsn, slot: &str, confirmed: Lsn) -> Result<Lsn, Error> {
        let has_outlived = self.has_outlived(&identity, server);
        let known = self.identity.replace(identity.clone());
        if let Some(known) = known.filter(|known| known.system == identity.system) {
            if identity.timeline < known.timeline {
                let error = Error::OldTimeline { found: identity.timeline, seen: known.timeline };
                self.identity = Some(known);
                return Err(error);
            }
            if identity.timeline == known.timeline && !has_outlived {
                if confirmed > self.told && !self.contended {
                    let (found, told) = (confirmed, self.told);
                    return Err(Error::Moved { slot: slot.to_owned(), found, told });
                }
                if confirmed > self.told {
                    self.doubt();
                }
                self.settled = self.settled.max(confirmed);
                self.told = self.told.max(confirmed);
                return Ok(self.settled);
            }
            let what =
                if has_outlived { "the server's log ends before what was settled" } else { "the timeline changed" };
            tracing::warn!(
                from = known.timeline,
                to = identity.timeline,
                behind_bytes = self.settled.bytes_since(confirmed),
                "{what}: beginning at the slot's own position"
            );
        }
        // Another history: what was settled there says nothing here.
        self.doubt();
        *self = Progress {
            identity: Some(identity),
            settled: confirmed,
            told: confirmed,
            steps: self.steps,
            caution: std::mem::take(&mut self.caution),
            contended: self.contended,
            ..Progress::default()
        };
        Ok(confirmed)
    }

    /// Whether this message was settled by an earlier session already: those before the first unsettled one, no other.
    pub fn has(&self, position: Position) -> bool {
        self.frontier.commit_lsn > Lsn::ZERO && position <= self.frontier
    }

    /// A run and all before it is settled.
    pub fn message(&mut self, last: Position) {
        self.steps.runs += u64::from(last > self.frontier);
        self.frontier = self.frontier.max(last);
    }

    /// All before this checkpoint is settled.
    pub fn checkpoint(&mut self, lsn: Lsn) {
        self.steps.checkpoints += u64::from(lsn > self.settled);
        self.settled = self.settled.max(lsn);
    }

    /// Whether a session has brought anything, and what.
    pub fn steps(&self) -> Steps {
        self.steps
    }

    /// Postgres is being told this position.
    pub fn tell(&mut self, lsn: Lsn) {
        self.told = self.told.max(lsn);
    }

    /// Someone else holds the slot.
    pub fn contend(&mut self) {
        self.contended = true;
    }

    /// The slot is ours: nobody else moves it from now on.
    pub fn hold(&mut self) {
        self.contended = false;
    }

    /// The refused message may never come again: another relay has delivered it, or its transaction is gone.
    fn doubt(&mut self) {
        if self.caution.until.take().is_some() {
            self.caution.messages = self.caution.messages.min(1);
        }
    }

    /// A message that went alone is settled. Whether the next one goes alone as well.
    pub fn proven(&mut self, id: &str) -> bool {
        self.caution.proven(id);
        self.caution.is_on()
    }

    /// A session ended, by the broker's doing. A message that it refused is still to be proven when the next session ends
    /// otherwise before that one is reached again.
    pub fn be_cautious(&mut self, caution: Caution) {
        if caution.until.is_some() || self.caution.until.is_none() || !self.caution.is_on() {
            self.caution = caution;
        }
    }
}

/// The progress that the stations of one session share. They run in one task: the lock is never contended.
pub(super) fn lock(shared: &Mutex<Progress>) -> MutexGuard<'_, Progress> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(system: &str, timeline: u32) -> Identity {
        Identity { system: system.to_owned(), timeline }
    }

    fn lsn(position: u64) -> Lsn {
        Lsn::new(position)
    }

    /// A process that settled up to 500, told 400, and half of a transaction at 600.
    fn settled() -> Progress {
        let mut progress = Progress::default();
        assert_eq!(progress.begin(on("a", 1), lsn(1000), "s", lsn(100)).unwrap(), lsn(100));
        progress.checkpoint(lsn(500));
        progress.tell(lsn(400));
        progress.message(Position { commit_lsn: lsn(600), seq: 4 });
        progress
    }

    #[test]
    fn begins_at_its_own_position_on_the_same_system_and_timeline() {
        let mut progress = settled();
        assert_eq!(progress.begin(on("a", 1), lsn(1000), "s", lsn(400)).unwrap(), lsn(500));
        assert!(progress.has(Position { commit_lsn: lsn(600), seq: 4 }));
        assert!(!progress.has(Position { commit_lsn: lsn(600), seq: 5 }));
        assert!(!progress.has(Position { commit_lsn: lsn(700), seq: 0 }));
    }

    #[test]
    fn a_crash_of_postgres_that_sets_the_slot_back_changes_nothing() {
        assert_eq!(settled().begin(on("a", 1), lsn(1000), "s", lsn(100)).unwrap(), lsn(500));
    }

    #[test]
    fn never_begins_at_its_own_position_on_another_timeline_system_or_shorter_wal() {
        for (identity, server) in [(on("a", 2), 1000), (on("b", 1), 1000), (on("a", 1), 450), (on("a", 1), 550)] {
            let mut progress = settled();
            assert_eq!(progress.has_outlived(&identity, lsn(server)), server < 1000);
            assert_eq!(progress.begin(identity.clone(), lsn(server), "s", lsn(120)).unwrap(), lsn(120), "{identity:?}");
            assert!(!progress.has_outlived(&identity, lsn(server)), "it is told once");
            assert!(!progress.has(Position { commit_lsn: lsn(600), seq: 0 }), "{identity:?}");
            assert_eq!(progress.settled, lsn(120));
        }
    }

    #[test]
    fn what_is_settled_at_lower_positions_after_a_failover_is_a_step_all_the_same() {
        let mut progress = settled();
        let before = progress.steps();
        progress.begin(on("a", 2), lsn(1000), "s", lsn(120)).unwrap();
        assert_eq!(progress.steps(), before);
        progress.message(Position { commit_lsn: lsn(130), seq: 0 });
        assert_eq!(progress.steps(), Steps { runs: before.runs + 1, ..before });
        progress.checkpoint(lsn(140));
        let after = progress.steps();
        assert_eq!(after, Steps { runs: before.runs + 1, checkpoints: before.checkpoints + 1 });
        progress.message(Position { commit_lsn: lsn(130), seq: 0 });
        progress.checkpoint(lsn(140));
        assert_eq!(progress.steps(), after);
    }

    #[test]
    fn what_was_published_counts_for_its_own_timeline_only() {
        let mut progress = settled();
        progress.publish(Position { commit_lsn: lsn(450), seq: 0 });
        progress.publish(Position { commit_lsn: lsn(600), seq: 0 });
        assert_eq!(progress.left_behind(&on("a", 1)), None);
        assert_eq!(progress.left_behind(&on("b", 2)), None);
        assert_eq!(progress.left_behind(&on("a", 2)), Some(1));
        assert_eq!(progress.beyond(Some(lsn(600))), Beyond { at_least: 1, at_most: 1 });
        progress.begin(on("a", 2), lsn(1000), "s", lsn(300)).unwrap();
        assert_eq!(progress.beyond(Some(lsn(1))), Beyond::default());
    }

    #[test]
    fn an_old_primary_is_refused_and_the_memory_kept() {
        let mut progress = settled();
        progress.begin(on("a", 2), lsn(1000), "s", lsn(300)).unwrap();
        assert!(matches!(progress.begin(on("a", 1), lsn(900), "s", lsn(300)), Err(Error::OldTimeline { .. })));
        assert!(progress.begin(on("a", 2), lsn(1000), "s", lsn(300)).is_ok());
    }

    #[test]
    fn a_slot_beyond_all_that_was_told_is_refused_unless_someone_else_held_it() {
        let error = settled().begin(on("a", 1), lsn(1000), "s", lsn(401)).unwrap_err();
        assert!(matches!(error, Error::Moved { .. }));
        let mut contended = settled();
        contended.contend();
        assert_eq!(contended.begin(on("a", 1), lsn(1000), "s", lsn(700)).unwrap(), lsn(700));
        // The stream did not begin: the other one may have it again.
        assert_eq!(contended.begin(on("a", 1), lsn(1000), "s", lsn(800)).unwrap(), lsn(800));
        contended.hold();
        assert!(contended.begin(on("a", 1), lsn(1000), "s", lsn(900)).is_err());
    }

    #[test]
    fn caution_ends_with_the_refused_message_or_after_its_limit() {
        let mut caution = Caution { messages: 3, until: Some("refused".to_owned()) };
        caution.proven("before");
        assert!(caution.is_on());
        caution.proven("refused");
        assert!(!caution.is_on());
        let mut caution = Caution { messages: 1, until: None };
        caution.proven("any");
        assert!(!caution.is_on());
    }

    #[test]
    fn caution_for_a_refused_message_outlasts_a_session_that_ends_otherwise() {
        let mut progress = Progress::default();
        progress.be_cautious(Caution { messages: 3, until: Some("refused".to_owned()) });
        progress.be_cautious(Caution { messages: 1, until: None });
        assert!(progress.proven("before"));
        assert!(!progress.proven("refused"));
        progress.be_cautious(Caution { messages: 1, until: None });
        assert!(progress.caution().is_on() && !progress.proven("any"));
    }

    #[test]
    fn caution_waits_for_no_message_that_another_relay_may_have_delivered_or_a_failover_undone() {
        let refused = Caution { messages: 1000, until: Some("refused".to_owned()) };
        for (identity, confirmed) in [(on("a", 2), 300), (on("a", 1), 700)] {
            let mut progress = settled();
            progress.be_cautious(refused.clone());
            progress.contend();
            progress.begin(identity, lsn(1000), "s", lsn(confirmed)).unwrap();
            assert!(progress.caution().is_on() && !progress.proven("another"));
        }
        let mut progress = settled();
        progress.be_cautious(refused.clone());
        progress.begin(on("a", 1), lsn(1000), "s", lsn(400)).unwrap();
        assert_eq!(progress.caution(), &refused);
    }

    #[test]
    fn a_fresh_process_skips_nothing() {
        assert!(!Progress::default().has(Position::default()));
    }
}
