//! The state of every message in flight, in the order of publishing; says how far all of them are held. Pure.
//!
//! The traps. "Acked" is not "routed": an unroutable mandatory message is returned *and then acked*, so a message is held
//! only if it was acked and not returned before. Acks come out of order (single ones above later `multiple` ones), so the
//! highest tag says nothing. And a return names no tag, only the message: it belongs to the first one of its `message_id`
//! that still waits for its ack, because a return precedes the ack of its own message.
//!
//! Whatever cannot be true (an ack for a tag that was never written, or a second one; a return of a message that is not
//! waiting) ends the session: somebody else's confirms must not settle our messages.

use std::collections::VecDeque;

use bytestring::ByteString;

use super::super::{Error, Refusal};

/// See the file's head.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    entries: VecDeque<Entry>,
    /// Messages before the first entry: all held.
    settled: u64,
    /// Entries from the first on that have their answer: a `multiple` looks at no message twice.
    answered: usize,
}

#[derive(Debug)]
struct Entry {
    id: ByteString,
    /// Where its last byte stands among those written.
    end: u64,
    state: State,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Pending,
    /// Its ack is still to come, and will not mean "held".
    Returned(Refusal),
    Held,
    Refused(Refusal),
}

impl Entry {
    fn is_answered(&self) -> bool {
        matches!(self.state, State::Held | State::Refused(_))
    }

    fn answer(&mut self, is_ack: bool) {
        self.state = match std::mem::replace(&mut self.state, State::Held) {
            State::Returned(refusal) | State::Refused(refusal) => State::Refused(refusal),
            State::Pending | State::Held if is_ack => State::Held,
            State::Pending | State::Held => State::Refused(Refusal::Nacked),
        };
    }
}

impl Ledger {
    /// The next message of the session, whose last byte is the `end`th. Its tag is its number, from 1.
    pub(super) fn publish(&mut self, id: ByteString, end: u64) {
        self.entries.push_back(Entry { id, end, state: State::Pending });
    }

    /// How many messages there were in the session.
    pub(super) fn published(&self) -> u64 {
        self.settled + self.entries.len() as u64
    }

    /// How many messages, counted from the session's first, the broker holds.
    pub(super) fn settled(&self) -> u64 {
        self.settled
    }

    /// `basic.ack` or `basic.nack`, when so many bytes have been written.
    pub(super) fn answer(&mut self, tag: u64, multiple: bool, is_ack: bool, written: u64) -> Result<(), String> {
        let index = tag.checked_sub(self.settled + 1).and_then(|index| usize::try_from(index).ok());
        let entry = index.and_then(|index| self.entries.get_mut(index));
        let (Some(index), Some(entry)) = (index, entry.filter(|entry| entry.end <= written && !entry.is_answered()))
        else {
            return Err(format!("a confirm for delivery tag {tag}, which is not waiting for one"));
        };
        entry.answer(is_ack);
        if multiple {
            for entry in self.entries.range_mut(self.answered.min(index)..index) {
                if !entry.is_answered() {
                    entry.answer(is_ack);
                }
            }
            self.answered = self.answered.max(index + 1);
        }
        Ok(())
    }

    /// `basic.return`.
    pub(super) fn returned(&mut self, id: &str, refusal: Refusal, written: u64) -> Result<(), String> {
        let waiting = |entry: &&mut Entry| entry.state == State::Pending && *entry.id == *id && entry.end <= written;
        // Two rows may share an id; the first one is taken, and everything after it is published again anyway.
        match self.entries.iter_mut().skip(self.answered).find(waiting) {
            Some(entry) => entry.state = State::Returned(refusal),
            None => return Err(format!("message {id:?} was returned and is not waiting for its confirm")),
        }
        Ok(())
    }

    /// Settles what is held, in order. A refused message ends the session when all before it are held, so that publishing
    /// again begins with exactly that message.
    pub(super) fn settle(&mut self) -> Result<(), Error> {
        while let Some(entry) = self.entries.front() {
            match &entry.state {
                State::Pending => break,
                State::Returned(refusal) | State::Refused(refusal) => {
                    return Err(Error::Refused { id: entry.id.to_string(), refusal: refusal.clone() });
                }
                State::Held => {
                    self.entries.pop_front();
                    self.settled += 1;
                    self.answered = self.answered.saturating_sub(1);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unroutable() -> Refusal {
        Refusal::Unroutable { exchange: "e".to_owned(), routing_key: "k".to_owned() }
    }

    /// Messages "1" to "8", of ten bytes each, all written.
    fn eight() -> Ledger {
        let mut ledger = Ledger::default();
        (1..=8).for_each(|tag: u64| ledger.publish(tag.to_string().into(), tag * 10));
        ledger
    }

    const WRITTEN: u64 = 80;

    fn ack(ledger: &mut Ledger, tag: u64) {
        ledger.answer(tag, false, true, WRITTEN).unwrap();
    }

    fn settled(ledger: &mut Ledger) -> (u64, Option<String>) {
        let refused = ledger.settle().err().map(|error| error.to_string());
        (ledger.settled(), refused)
    }

    #[test]
    fn confirms_out_of_order_settle_in_order() {
        let mut ledger = eight();
        [4, 2, 3].into_iter().for_each(|tag| ack(&mut ledger, tag));
        assert_eq!(settled(&mut ledger), (0, None));
        ack(&mut ledger, 1);
        assert_eq!(settled(&mut ledger), (4, None));
    }

    #[test]
    fn multiple_answers_all_that_wait_up_to_its_tag_and_nothing_beyond() {
        let mut ledger = eight();
        ack(&mut ledger, 2);
        ack(&mut ledger, 6);
        ledger.answer(4, true, true, WRITTEN).unwrap();
        assert_eq!(settled(&mut ledger), (4, None));
        ledger.answer(8, true, true, WRITTEN).unwrap();
        assert_eq!(settled(&mut ledger), (8, None));
        ledger.publish("9".into(), 90);
        ledger.publish("10".into(), 100);
        ledger.answer(9, true, true, 100).unwrap();
        assert_eq!(settled(&mut ledger), (9, None));
    }

    #[test]
    fn a_returned_message_is_refused_whatever_is_acked_between_and_with_it() {
        for multiple in [false, true] {
            let mut ledger = eight();
            ledger.returned("5", unroutable(), WRITTEN).unwrap();
            [7, 2, 1].into_iter().for_each(|tag| ack(&mut ledger, tag));
            assert_eq!(settled(&mut ledger), (2, None));
            if multiple {
                ledger.answer(6, true, true, WRITTEN).unwrap();
            } else {
                [3, 4, 5].into_iter().for_each(|tag| ack(&mut ledger, tag));
            }
            let (count, refused) = settled(&mut ledger);
            assert_eq!(count, 4);
            assert!(refused.unwrap().starts_with("message 5 was refused: unroutable"));
        }
    }

    #[test]
    fn a_refusal_waits_for_what_is_before_it() {
        let mut ledger = eight();
        ledger.answer(3, false, false, WRITTEN).unwrap();
        ack(&mut ledger, 1);
        assert_eq!(settled(&mut ledger), (1, None));
        ack(&mut ledger, 2);
        let (count, refused) = settled(&mut ledger);
        assert_eq!(count, 2);
        assert!(refused.unwrap().contains("message 3 was refused: nacked"));
    }

    #[test]
    fn a_multiple_nack_refuses_all_that_wait_and_no_other() {
        let mut ledger = eight();
        [1, 2].into_iter().for_each(|tag| ack(&mut ledger, tag));
        ledger.answer(4, true, false, WRITTEN).unwrap();
        let (count, refused) = settled(&mut ledger);
        assert_eq!(count, 2);
        assert!(refused.unwrap().contains("message 3 was refused: nacked"));
    }

    #[test]
    fn two_messages_of_one_id_are_returned_in_their_order() {
        let mut ledger = Ledger::default();
        (1..=3).for_each(|tag| ledger.publish("same".into(), tag * 10));
        ledger.returned("same", unroutable(), WRITTEN).unwrap();
        ack(&mut ledger, 1);
        ledger.returned("same", unroutable(), WRITTEN).unwrap();
        [2, 3].into_iter().for_each(|tag| ack(&mut ledger, tag));
        assert!(ledger.returned("same", unroutable(), WRITTEN).is_err());
        assert_eq!(settled(&mut ledger).0, 0);
    }

    #[test]
    fn what_cannot_be_true_is_told_and_settles_nothing() {
        type Lie = fn(&mut Ledger) -> Result<(), String>;
        let lies: [(&str, Lie); 9] = [
            ("tag 0", |ledger| ledger.answer(0, false, true, WRITTEN)),
            ("tag 0, multiple", |ledger| ledger.answer(0, true, true, WRITTEN)),
            ("a tag that was settled", |ledger| ledger.answer(1, false, true, WRITTEN)),
            ("a tag twice", |ledger| ledger.answer(3, false, true, WRITTEN)),
            ("a tag twice, the second time with multiple", |ledger| ledger.answer(3, true, true, WRITTEN)),
            ("a tag that nobody published", |ledger| ledger.answer(9, true, true, u64::MAX)),
            ("a tag of which a byte is missing", |ledger| ledger.answer(2, false, true, 19)),
            ("the return of an unknown message", |ledger| ledger.returned("99", unroutable(), WRITTEN)),
            ("a return behind its ack", |ledger| ledger.returned("3", unroutable(), WRITTEN)),
        ];
        for (lie, tell) in lies {
            let mut ledger = eight();
            [1, 3].into_iter().for_each(|tag| ack(&mut ledger, tag));
            assert_eq!(settled(&mut ledger), (1, None));
            tell(&mut ledger).expect_err(lie);
            assert_eq!(settled(&mut ledger), (1, None), "{lie}");
        }
        let mut ledger = eight();
        ledger.returned("8", unroutable(), 79).expect_err("a return of what is not written");
    }

    /// Against a slow and obvious model: for each message, its answers as they came.
    #[test]
    fn any_legal_order_of_answers_settles_exactly_the_held_prefix() {
        for seed in 0..2000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let count = random.u64(1..40);
            let mut ledger = Ledger::default();
            (1..=count).for_each(|tag| ledger.publish(tag.to_string().into(), tag));
            let mut model: Vec<Option<bool>> = vec![None; usize::try_from(count).unwrap()];
            let mut returned = vec![false; model.len()];
            loop {
                let waiting: Vec<usize> = (0..model.len()).filter(|index| model[*index].is_none()).collect();
                let Some(index) = random.choice(&waiting).copied() else { break };
                let (multiple, is_ack) = (random.bool(), random.u8(..) < 250);
                if random.u8(..) < 10 && !returned[index] {
                    returned[index] = true;
                    ledger.returned(&(index + 1).to_string(), unroutable(), count).unwrap();
                    continue;
                }
                for index in if multiple { 0..=index } else { index..=index } {
                    model[index].get_or_insert(is_ack && !returned[index]);
                }
                ledger.answer(index as u64 + 1, multiple, is_ack, count).unwrap();
                let refused = ledger.settle().is_err();
                let held = model.iter().take_while(|state| **state == Some(true)).count();
                assert_eq!(ledger.settled(), held as u64, "seed {seed}");
                let front = model.get(held).copied().flatten() == Some(false) || returned.get(held) == Some(&true);
                assert_eq!(refused, front, "seed {seed}");
                if refused {
                    break;
                }
            }
        }
    }
}
