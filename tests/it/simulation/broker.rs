//! A broker that takes messages one by one, refuses some, acknowledges late or never, dies, and goes on with what stands in
//! its socket after the relay has given up.

use std::time::Duration;

use pgoutbox::outbox::Message;
use pgoutbox::relay::Broker;
use pgoutbox::sink::{Error, Receipt, Refusal, Sink};
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;

use super::judge::World;

pub(super) struct FakeBroker {
    world: World,
}

impl FakeBroker {
    pub(super) fn new(world: &World) -> Self {
        Self { world: world.clone() }
    }
}

/// A run on its way to the broker.
struct Run {
    session: usize,
    ids: Vec<String>,
    settled: oneshot::Sender<Result<(), Error>>,
}

pub(super) struct FakeSink {
    world: World,
    runs: mpsc::UnboundedSender<Run>,
    /// Known once the stream has begun.
    session: Option<usize>,
}

impl Broker for FakeBroker {
    type Sink = FakeSink;

    async fn open(&mut self) -> Result<FakeSink, Error> {
        sleep(Duration::from_millis(self.world.random(|random| random.u64(1..50)))).await;
        if self.world.strikes(50) {
            return Err(Error::Unreachable { host: "fake".to_owned(), problem: "refused".to_owned() });
        }
        let (runs, incoming) = mpsc::unbounded_channel();
        tokio::spawn(serve(self.world.clone(), incoming));
        Ok(FakeSink { world: self.world.clone(), runs, session: None })
    }
}

impl Sink for FakeSink {
    async fn publish(&mut self, run: Vec<Message>) -> Result<Receipt, Error> {
        assert!(!run.is_empty(), "an empty run");
        let session = *self.session.get_or_insert_with(|| self.world.current_session());
        let ids: Vec<String> = run.into_iter().map(|message| message.id).collect();
        for id in &ids {
            self.world.published(session, id);
        }
        let (settled, receipt) = oneshot::channel();
        let _ = self.runs.send(Run { session, ids, settled });
        // The socket may be full for a while, or break with the run half written.
        if self.world.strikes(100) {
            sleep(Duration::from_millis(self.world.random(|random| random.u64(0..2000)))).await;
        }
        if self.world.strikes(10) {
            return Err(broken());
        }
        Ok(Receipt::new(async move { receipt.await.unwrap_or_else(|_| Err(broken())) }))
    }

    async fn check(&mut self) -> Result<(), Error> {
        if self.world.strikes(50) { Err(broken()) } else { Ok(()) }
    }
}

fn broken() -> Error {
    Error::Broken("the fake broke".to_owned())
}

/// One connection on the broker's side. It ends when it dies, or some time after the relay has let go of it.
async fn serve(world: World, mut incoming: mpsc::UnboundedReceiver<Run>) {
    while let Some(run) = incoming.recv().await {
        let mut refused = None;
        for id in &run.ids {
            let pause = world.random(|random| if random.u8(..) < 50 { random.u64(0..100) } else { 0 });
            sleep(Duration::from_millis(pause)).await;
            if world.strikes(5) {
                world.note("the broker dies");
                return;
            }
            if !world.arrive(run.session, id) && refused.is_none() {
                refused = Some(id.clone());
            }
        }
        if world.strikes(10) {
            // An acknowledgement that never comes: the relay's deadline ends it.
            world.note("the broker falls silent");
            sleep(Duration::from_secs(20)).await;
            return;
        }
        if world.strikes(100) {
            sleep(Duration::from_millis(world.random(|random| random.u64(0..3000)))).await;
        }
        sleep(world.with(|state| state.acknowledge_after)).await;
        match refused {
            None => {
                // Acknowledged is what the relay can know: nothing, when it is no longer there.
                if !run.settled.is_closed() {
                    world.acknowledge(&run.ids);
                }
                let _ = run.settled.send(Ok(()));
            }
            Some(id) => {
                let refusal = Refusal::Unroutable { exchange: "fake".to_owned(), routing_key: "order".to_owned() };
                let _ = run.settled.send(Err(Error::Refused { id, refusal }));
            }
        }
    }
}
