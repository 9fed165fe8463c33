//! The state of every message in flight, in the order of publishing; tells how far all of them are held.
//!
//! Why it is right although lapin misplaces returns: the broker sends a message's return before its ack, and lapin gives a
//! waiting return to the next confirm that it completes. When a message's own confirm completes without its return, the
//! return was therefore given to one that completed *earlier*, and that one is ready by now. So [`Ledger::keep`] looks at
//! all that is ready before it tells anything, and returns are matched by `message_id`, never by whose confirm they came
//! with.
//! For that it must know every message that the broker could know: the ledger itself begins each publish, so that none is
//! under way before it stands here.

use std::collections::VecDeque;
use std::future::Future;

use std::pin::Pin;
use std::task::Poll;

use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{mpsc, watch};

use super::super::{Error, Receipt, Refusal};

/// A message to be published: its id, and the future that publishes it and ends with what became of it. Its first poll
/// queues the message, so polling in order publishes in order.
pub(super) struct Publish {
    pub(super) id: String,
    pub(super) publish: Pin<Box<dyn Future<Output = Outcome> + Send>>,
}

/// What a confirm said, and what came with it.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) verdict: Verdict,
    pub(super) returned: Option<Returned>,
}

/// Of one message: the one that was confirmed.
#[derive(Debug)]
pub(super) enum Verdict {
    Acked,
    Nacked,
    Failed(Error),
}

/// A message that the broker gave back: any message in flight, not the one whose confirm it came with.
#[derive(Debug)]
pub(super) struct Returned {
    pub(super) id: String,
    pub(super) refusal: Refusal,
}

/// How many messages, counted from the session's first, the broker holds; and what ended it.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress {
    settled: u64,
    failure: Option<Error>,
}

/// Settles when the broker holds the first `last` messages of the session.
pub(super) fn receipt(mut progress: watch::Receiver<Progress>, last: u64) -> Receipt {
    Receipt::new(async move {
        let settled = progress.wait_for(|progress| progress.settled >= last || progress.failure.is_some()).await;
        match settled {
            Ok(progress) if progress.settled >= last => Ok(()),
            Ok(progress) => Err(progress.failure.clone().unwrap_or_else(gone)),
            Err(_) => Err(gone()),
        }
    })
}

fn gone() -> Error {
    Error::Broken("the session is closed".to_owned())
}

/// See the file's head.
pub(super) struct Ledger {
    states: VecDeque<(String, State)>,
    /// Messages before the first of `states`.
    settled: u64,
    failure: Option<Error>,
    /// The broker said what cannot be: whatever came with it is not believed.
    is_doubtful: bool,
    progress: watch::Sender<Progress>,
}

/// Of a message in flight.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Pending,
    Held,
    Refused(Refusal),
}

impl Ledger {
    pub(super) fn new(progress: watch::Sender<Progress>) -> Self {
        Self { states: VecDeque::new(), settled: 0, failure: None, is_doubtful: false, progress }
    }

    /// Publishes runs and keeps account of them until the session ends or fails.
    pub(super) async fn keep(mut self, mut runs: mpsc::UnboundedReceiver<Vec<Publish>>) {
        let mut outstanding = FuturesUnordered::new();
        let mut number: u64 = 0;
        while self.failure.is_none() {
            // Both arms are cancel-safe. Confirms first: they free the window.
            tokio::select! {
                biased;
                Some((number, outcome)) = outstanding.next() => {
                    self.record(number, outcome);
                    // A `Pending` here means that every future that was ready when this call began has been looked at.
                    while let Some(Some((number, outcome))) = outstanding.next().now_or_never() {
                        self.record(number, outcome);
                    }
                    self.tell();
                }
                run = runs.recv() => {
                    let Some(run) = run else { return };
                    for Publish { id, mut publish } in run {
                        let this = number;
                        number += 1;
                        self.states.push_back((id, State::Pending));
                        match futures_util::poll!(&mut publish) {
                            // Not even queued: the session is over.
                            Poll::Ready(outcome) => self.record(this, outcome),
                            Poll::Pending => outstanding.push(publish.map(move |outcome| (this, outcome))),
                        }
                    }
                    self.tell();
                }
            }
        }
    }

    fn record(&mut self, number: u64, outcome: Outcome) {
        let state = match outcome.verdict {
            Verdict::Acked => State::Held,
            Verdict::Nacked => State::Refused(Refusal::Nacked),
            Verdict::Failed(error) => return self.fail(error),
        };
        if let Some(returned) = outcome.returned {
            self.refuse(returned);
        }
        let index = number.checked_sub(self.settled).and_then(|index| usize::try_from(index).ok());
        match index.and_then(|index| self.states.get_mut(index)) {
            // A return that came with another's confirm stands: the ack that follows it does not mean held.
            Some((_, pending @ State::Pending)) => *pending = state,
            Some(_) => {}
            None => self.doubt(format!("a confirm for message {number}, which is not in flight")),
        }
    }

    fn refuse(&mut self, returned: Returned) {
        let not_refused = |state: &State| !matches!(state, State::Refused(_));
        // Two rows may share an id; the first one is taken, and everything after it is published again anyway.
        match self.states.iter_mut().find(|(id, state)| *id == returned.id && not_refused(state)) {
            Some((_, state)) => *state = State::Refused(returned.refusal),
            None => self.doubt(format!("message {:?} was returned and is not in flight", returned.id)),
        }
    }

    fn doubt(&mut self, problem: String) {
        self.is_doubtful = true;
        self.fail(Error::Broken(problem));
    }

    /// Tells how far everything is held. A refused message ends the session when all before it are held, so that
    /// publishing again begins with exactly that message.
    fn tell(&mut self) {
        while let Some((id, state)) = self.states.front().filter(|_| !self.is_doubtful) {
            match state {
                State::Pending => break,
                State::Held => {
                    self.states.pop_front();
                    self.settled += 1;
                }
                State::Refused(refusal) => {
                    let refused = Error::Refused { id: id.clone(), refusal: refusal.clone() };
                    self.fail(refused);
                    break;
                }
            }
        }
        self.progress.send_modify(|progress| {
            progress.settled = self.settled;
            progress.failure = self.failure.clone();
        });
    }

    fn fail(&mut self, error: Error) {
        self.failure.get_or_insert(error);
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    /// A session of eight messages, whose confirms the test completes as it likes.
    struct Session {
        confirms: Vec<Option<oneshot::Sender<Outcome>>>,
        progress: watch::Receiver<Progress>,
        _runs: mpsc::UnboundedSender<Vec<Publish>>,
    }

    impl Session {
        /// In two runs.
        async fn start() -> Self {
            let (sender, progress) = watch::channel(Progress::default());
            let (runs, incoming) = mpsc::unbounded_channel();
            let mut confirms = Vec::new();
            tokio::spawn(Ledger::new(sender).keep(incoming));
            for run in [0..3, 3..8] {
                let publish = |number: usize| {
                    let (confirm, receiver) = oneshot::channel();
                    confirms.push(Some(confirm));
                    let confirmed = receiver.map(|outcome| outcome.expect("the test answers"));
                    Publish { id: number.to_string(), publish: Box::pin(confirmed) }
                };
                let _ = runs.send(run.map(publish).collect());
            }
            let mut session = Self { confirms, progress, _runs: runs };
            session.progress().await;
            session
        }

        fn ack(&mut self, number: usize, returned: Option<usize>) {
            let refusal = Refusal::Unroutable { exchange: "e".to_owned(), routing_key: "k".to_owned() };
            let returned = returned.map(|id| Returned { id: id.to_string(), refusal });
            self.answer(number, Outcome { verdict: Verdict::Acked, returned });
        }

        fn answer(&mut self, number: usize, outcome: Outcome) {
            self.confirms[number].take().unwrap().send(outcome).unwrap();
        }

        /// Lets the ledger work through what is ready; how far it is, and what it says of the end.
        async fn progress(&mut self) -> (u64, Option<String>) {
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            let progress = self.progress.borrow();
            (progress.settled, progress.failure.as_ref().map(ToString::to_string))
        }
    }

    #[tokio::test]
    async fn confirms_out_of_order_settle_in_order() {
        let mut session = Session::start().await;
        for number in [3, 1, 2] {
            session.ack(number, None);
        }
        assert_eq!(session.progress().await, (0, None));
        session.ack(0, None);
        assert_eq!(session.progress().await, (4, None));
        receipt(session.progress.clone(), 4).await.unwrap();
    }

    #[tokio::test]
    async fn a_return_that_came_with_anothers_confirm_refuses_its_own_message() {
        // The return of 5 comes with the confirm of an earlier message, of a later one, and with its own.
        for carrier in [1, 7, 5] {
            let mut session = Session::start().await;
            session.ack(carrier, Some(5));
            for number in (0..8).filter(|number| *number != carrier) {
                session.ack(number, None);
            }
            let (settled, failure) = session.progress().await;
            assert_eq!(settled, 5, "carried by {carrier}");
            assert!(failure.unwrap().starts_with("message 5 was refused: unroutable"), "carried by {carrier}");
            receipt(session.progress.clone(), 5).await.unwrap();
            assert!(receipt(session.progress.clone(), 6).await.is_err());
        }
    }

    /// The broker answers while the run is still being queued: the third message's confirm carries the first one's return,
    /// completes before it, and stands behind it in the order of polling.
    #[tokio::test]
    async fn all_that_is_ready_is_looked_at_before_anything_is_told() {
        let (sender, mut progress) = watch::channel(Progress::default());
        let (runs, incoming) = mpsc::unbounded_channel();
        let (mut confirms, mut receivers): (Vec<_>, Vec<_>) = (0..3).map(|_| oneshot::channel()).unzip();
        let answer = |confirm: oneshot::Sender<Outcome>, returned| {
            confirm.send(Outcome { verdict: Verdict::Acked, returned }).unwrap();
        };
        let refusal = Refusal::Unroutable { exchange: "e".to_owned(), routing_key: "k".to_owned() };
        let (third, _second, first) = (confirms.pop().unwrap(), confirms.pop().unwrap(), confirms.pop().unwrap());
        let last = async move {
            answer(third, Some(Returned { id: "0".to_owned(), refusal }));
            answer(first, None);
            std::future::pending().await
        };
        let mut run: Vec<Publish> = Vec::new();
        for (number, receiver) in receivers.drain(..).enumerate() {
            let confirmed = receiver.map(|outcome| outcome.unwrap_or_else(|_| unreachable!("answered or pending")));
            run.push(Publish { id: number.to_string(), publish: Box::pin(confirmed) });
        }
        run.push(Publish { id: "last".to_owned(), publish: Box::pin(last) });
        runs.send(run).unwrap_or_else(|_| unreachable!("the ledger receives"));
        tokio::spawn(Ledger::new(sender).keep(incoming));
        let told = progress.wait_for(|progress| progress.settled > 0 || progress.failure.is_some()).await.unwrap();
        assert_eq!(told.settled, 0);
        assert!(told.failure.as_ref().unwrap().to_string().contains("message 0 was refused"));
    }

    #[tokio::test]
    async fn a_refusal_waits_for_what_is_before_it() {
        let mut session = Session::start().await;
        session.answer(2, Outcome { verdict: Verdict::Nacked, returned: None });
        session.ack(0, None);
        assert_eq!(session.progress().await, (1, None));
        session.ack(1, None);
        let (settled, failure) = session.progress().await;
        assert_eq!(settled, 2);
        assert!(failure.unwrap().contains("message 2 was refused: nacked"));
    }

    #[tokio::test]
    async fn a_broken_session_settles_nothing_more() {
        let mut session = Session::start().await;
        session.ack(0, None);
        session.answer(1, Outcome { verdict: Verdict::Failed(gone()), returned: None });
        assert_eq!(session.progress().await.0, 1);
        assert!(receipt(session.progress.clone(), 2).await.is_err());
    }

    #[tokio::test]
    async fn a_return_of_an_unknown_message_ends_the_session() {
        let mut session = Session::start().await;
        session.ack(0, Some(99));
        let (settled, failure) = session.progress().await;
        assert_eq!(settled, 0, "what came with it is not believed either");
        assert!(failure.unwrap().contains("not in flight"));
    }
}
