//! A broker that takes messages one by one, refuses some, confirms as it likes or never, dies, and goes on with what stands in
//! its socket after the relay has given up; and the client's end of it, which says when a run is held.

use std::sync::Arc;
use std::time::Duration;

use pgoutbox::finding::{Finding, Remedy};
use pgoutbox::metrics::Metrics;
use pgoutbox::outbox::Message;
use pgoutbox::relay::Broker;
use pgoutbox::sink::{Error, Receipt, Refusal, Sink};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

use super::database::AWAY_MAX;
use super::faults::Fault;
use super::judge;
use super::world::{Cause, World};
use super::writers::Row;

/// What the real one allows itself for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) struct FakeBroker {
    pub(super) world: World,
    pub(super) life: usize,
    pub(super) metrics: Arc<Metrics>,
}

pub(super) struct FakeSink {
    world: World,
    life: usize,
    socket: mpsc::UnboundedSender<(usize, Row)>,
    confirmed: watch::Receiver<Confirmed>,
    published: Vec<Row>,
    /// Known once the stream has begun.
    stream: Option<usize>,
}

/// How many messages from the session's first on are held; and what ended it.
#[derive(Default)]
struct Confirmed {
    settled: usize,
    failure: Option<Error>,
}

impl Broker for FakeBroker {
    type Sink = FakeSink;

    async fn open(&mut self) -> Result<FakeSink, Error> {
        let world = &self.world;
        if world.with(|state| state.lives[self.life].doomed) {
            world.accuse("goes on after an error that no retry can help");
        }
        judge::persists(world, self.life);
        sleep(world.pause(Duration::from_millis(50))).await;
        if world.strikes(Fault::BrokerAway) {
            let back = Instant::now() + world.pause(AWAY_MAX);
            world.with(|state| state.broker_away_until = back);
        }
        let is_away = world.with(|state| state.broker_away_until > Instant::now());
        if is_away || world.strikes(Fault::BrokerRefuses) {
            return Err(Error::Unreachable { host: "fake".to_owned(), problem: "refused".to_owned() });
        }
        if world.strikes(Fault::BrokerHangs) {
            sleep(ANSWER_TIMEOUT).await;
            return Err(Error::Timeout { during: "connecting", after: ANSWER_TIMEOUT });
        }
        if world.strikes(Fault::BrokerSetup) {
            world.with(|state| state.dooms(self.life, Cause::Broker));
            return Err(Error::Setup(Finding::new("the fake is set up wrong", Remedy::default())));
        }
        let (socket, incoming) = mpsc::unbounded_channel();
        let (confirms, confirmed) = watch::channel(Confirmed::default());
        let connection = Connection {
            world: world.clone(),
            metrics: self.metrics.clone(),
            incoming,
            ledger: Ledger { verdicts: Vec::new(), confirms },
            unconfirmed: Vec::new(),
        };
        tokio::spawn(connection.serve());
        Ok(FakeSink { world: world.clone(), life: self.life, socket, confirmed, published: Vec::new(), stream: None })
    }
}

impl FakeSink {
    /// The one that was open when the first message came.
    fn stream(&mut self) -> usize {
        *self.stream.get_or_insert_with(|| {
            self.world.with(|state| state.lives[self.life].stream.expect("a stream is open when messages come"))
        })
    }

    fn write(&mut self, rows: &[Row]) {
        let stream = self.stream();
        for row in rows {
            self.published.push(*row);
            self.world.with(|state| {
                state.publishes(stream, *row);
                if state.lives[self.life].known[*row] {
                    let name = state.name(*row);
                    state.accuse(format!("published {name} again, which it knew to be settled"));
                }
                let stream = &state.streams[stream];
                let window = state.lives[self.life].window_messages;
                if stream.published.len() - stream.settled > window {
                    state.accuse(format!("more than {window} messages in flight"));
                }
            });
            let _ = self.socket.send((stream, *row));
        }
    }

    /// What follows is the broker's doing.
    fn excuse(&self) {
        self.world.with(|state| {
            if let Some(stream) = state.lives[self.life].stream {
                state.streams[stream].is_excused = true;
            }
        });
    }

    /// Settles when the broker holds all that was published until now.
    fn receipt(&self) -> Receipt {
        let (world, life, rows) = (self.world.clone(), self.life, self.published.clone());
        let (stream, mut confirmed) = (self.stream, self.confirmed.clone());
        Receipt::new(async move {
            let settled = match confirmed.wait_for(|all| all.settled >= rows.len() || all.failure.is_some()).await {
                Ok(all) if all.settled >= rows.len() => Ok(()),
                Ok(all) => Err(all.failure.clone().unwrap_or_else(broken)),
                Err(_) => Err(broken()),
            };
            if settled.is_err() {
                world.with(|state| state.streams[stream.expect("it was published to")].is_excused = true);
            }
            settled?;
            // From here on the relay knows.
            world.with(|state| {
                for row in &rows {
                    state.lives[life].known[*row] = true;
                }
                let number = stream.expect("it was published to");
                let stream = &mut state.streams[number];
                (stream.settled, stream.settled_at) = (rows.len(), Instant::now());
                state.proves(number);
                state.is_well(life);
            });
            Ok(())
        })
    }
}

impl Sink for FakeSink {
    async fn publish(&mut self, run: Vec<Message>) -> Result<Receipt, Error> {
        if run.is_empty() {
            self.world.accuse("an empty run");
        }
        let rows: Vec<Row> = self.world.with(|state| run.iter().map(|message| state.row(&message.id)).collect());
        let stream = self.stream();
        self.world.with(|state| state.groups(stream, &rows));
        if self.world.strikes(Fault::PublishFails) {
            self.excuse();
            return Err(broken());
        }
        let part = self.world.random(|random| random.usize(..rows.len().max(1)));
        if self.world.strikes(Fault::PublishTears) {
            self.write(&rows[..part]);
            self.excuse();
            return Err(broken());
        }
        if self.world.strikes(Fault::PublishHangs) {
            self.write(&rows[..part]);
            self.excuse();
            sleep(ANSWER_TIMEOUT).await;
            return Err(Error::Timeout { during: "publishing", after: ANSWER_TIMEOUT });
        }
        self.write(&rows);
        if self.world.strikes(Fault::PublishSlow) {
            let pause = self.world.pause(Duration::from_secs(2));
            // A position that was read meanwhile stands behind this run.
            self.world.with(|state| state.streams[stream].owed.excuses(pause));
            sleep(pause).await;
        }
        if self.world.strikes(Fault::PublishBreaks) {
            self.excuse();
            return Err(broken());
        }
        Ok(self.receipt())
    }

    fn admit(&self, message: &Message) -> Result<(), Error> {
        if self.world.with(|state| state.rows[state.row(&message.id)].inadmissible) {
            return Err(Error::Undeliverable { id: message.id.to_string(), problem: "too large".to_owned() });
        }
        Ok(())
    }

    async fn failed(&mut self) -> Error {
        let mut confirmed = self.confirmed.clone();
        let failure = confirmed.wait_for(|all| all.failure.is_some()).await.ok().and_then(|all| all.failure.clone());
        match failure {
            Some(failure) => {
                self.excuse();
                failure
            }
            None => std::future::pending().await,
        }
    }

    async fn check(&mut self) -> Result<(), Error> {
        if self.world.strikes(Fault::CheckHangs) {
            self.excuse();
            sleep(ANSWER_TIMEOUT).await;
            return Err(Error::Timeout { during: "checking", after: ANSWER_TIMEOUT });
        }
        if self.world.strikes(Fault::CheckFails) {
            self.excuse();
            return Err(broken());
        }
        Ok(())
    }
}

fn broken() -> Error {
    Error::Broken("the fake broke".to_owned())
}

/// What the broker will say about a message.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Held,
    Returned,
    Nacked,
}

/// The client's account of confirms: settled is what is held without a gap; a refusal counts when it is first in line.
struct Ledger {
    verdicts: Vec<(Row, Option<Verdict>)>,
    confirms: watch::Sender<Confirmed>,
}

impl Ledger {
    fn confirm(&mut self, world: &World, number: usize, verdict: Verdict) {
        self.verdicts[number].1 = Some(verdict);
        if verdict == Verdict::Held {
            // Acknowledged is what the relay can know: nothing, when it is no longer there.
            let row = self.verdicts[number].0;
            world.with(|state| state.rows[row].acknowledged |= self.confirms.receiver_count() > 0);
        }
        self.confirms.send_modify(|all| {
            while let Some((_, Some(Verdict::Held))) = self.verdicts.get(all.settled) {
                all.settled += 1;
            }
            let Some((row, Some(verdict))) = self.verdicts.get(all.settled) else { return };
            let refusal = match verdict {
                Verdict::Nacked => Refusal::Nacked,
                _ => Refusal::Unroutable { exchange: "fake".to_owned(), routing_key: "order".to_owned() },
            };
            let id = world.with(|state| state.name(*row));
            all.failure.get_or_insert(Error::Refused { id, refusal });
        });
    }
}

/// One connection on the broker's side. It ends when it dies, or some time after the relay has let go of it.
struct Connection {
    world: World,
    metrics: Arc<Metrics>,
    incoming: mpsc::UnboundedReceiver<(usize, Row)>,
    ledger: Ledger,
    /// By number in the session.
    unconfirmed: Vec<(usize, Verdict)>,
}

impl Connection {
    async fn serve(mut self) {
        loop {
            let patience = if self.unconfirmed.is_empty() { Duration::from_secs(86_400) } else { self.pause() };
            match timeout(patience, self.incoming.recv()).await {
                Ok(None) => return,
                Ok(Some((stream, row))) => {
                    if !self.take(stream, row).await {
                        return;
                    }
                }
                Err(_) => {
                    if self.world.strikes(Fault::ConfirmsLost) {
                        return;
                    }
                    if self.world.strikes(Fault::BrokerSilent) {
                        return self.serve_silently().await;
                    }
                    self.confirm().await;
                }
            }
        }
    }

    fn pause(&self) -> Duration {
        let after = self.world.with(|state| state.confirm_after);
        after
            + self.world.random(|random| Duration::from_millis(if random.u8(..) < 50 { random.u64(0..100) } else { 0 }))
    }

    /// One message more; false: the broker died.
    async fn take(&mut self, stream: usize, row: Row) -> bool {
        sleep(self.pause() / 4).await;
        if self.world.strikes(Fault::BrokerDies) {
            return false;
        }
        if self.world.strikes(Fault::BrokerFrozen) {
            sleep(self.world.pause(Duration::from_secs(20))).await;
        }
        if !self.incoming.is_closed() && self.world.strikes(Fault::Blocked) {
            self.metrics.blocked(Some("alarm".to_owned()));
            sleep(self.world.pause(Duration::from_secs(30))).await;
            if !self.incoming.is_closed() {
                self.metrics.blocked(None);
            }
        }
        let verdict = self.judge(stream, row);
        self.unconfirmed.push((self.ledger.verdicts.len(), verdict));
        self.ledger.verdicts.push((row, None));
        if self.world.with(|state| state.confirm_after.is_zero() && state.random.u8(..) < 30) {
            self.confirm().await;
        }
        true
    }

    fn judge(&self, stream: usize, row: Row) -> Verdict {
        let (returned, nacked) = (self.world.strikes(Fault::Returned), self.world.strikes(Fault::Nacked));
        self.world.with(|state| {
            if returned || nacked {
                state.rows[row].refusals += state.random.u32(1..5);
            }
            let fate = &mut state.rows[row];
            let (verdict, text) = if fate.refusals == 0 {
                (Verdict::Held, "holds")
            } else if nacked || row.is_multiple_of(2) {
                (Verdict::Nacked, "nacks")
            } else {
                (Verdict::Returned, "returns")
            };
            if verdict == Verdict::Held {
                state.held.push(row);
            } else {
                (fate.refusals, fate.refused) = (fate.refusals - 1, true);
            }
            state.arrives(stream, row, text);
            verdict
        })
    }

    /// Says what became of the messages, in order or not, one by one or many at once.
    async fn confirm(&mut self) {
        if self.world.strikes(Fault::BrokerSlow) {
            sleep(self.world.pause(Duration::from_secs(2))).await;
        }
        if self.world.strikes(Fault::ConfirmsShuffled) {
            self.world.random(|random| random.shuffle(&mut self.unconfirmed));
        }
        let together = self.world.strikes(Fault::ConfirmsTogether);
        for (number, verdict) in self.unconfirmed.drain(..) {
            self.ledger.confirm(&self.world, number, verdict);
            if !together {
                // The client may act on one before the next comes.
                tokio::task::yield_now().await;
            }
        }
    }

    /// Takes what comes and confirms nothing any more; the relay's deadline ends it.
    async fn serve_silently(mut self) {
        while let Some((stream, row)) = self.incoming.recv().await {
            self.judge(stream, row);
        }
    }
}
