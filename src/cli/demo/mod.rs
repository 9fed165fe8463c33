//! `pgoutbox demo`: the whole of it on one machine, before your eyes, and judged at the end.
//!
//! Order of events: servers, queues, `pgoutbox init`, `pgoutbox run`, two services that write and two that receive, the
//! broker goes and comes back, everything drains, the relay stops, what was received is compared with what was committed.
//!
//! The trap: queues bound too late. Until a queue is bound the relay refuses to drop what nobody would receive, so a demo
//! that declared them after the relay had started would begin with the relay not ready.

mod consumer;
mod producer;
mod relay;
mod screen;
mod tally;
mod text;
mod view;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::{JoinSet, block_in_place, spawn_blocking};
use tokio::time::{Instant, sleep, timeout};

use self::relay::{Obstacle, Relay};
use self::screen::Screen;
use self::tally::Tally;
use self::text::{grouped, now_us};
use self::view::{Findings, Outage};
use crate::error::Error;
use crate::servers::{self, Postgres, RabbitMq};

/// Of the time, before the broker goes.
const OUTAGE_AFTER: f64 = 0.4;
const BROKER_AWAY: Duration = Duration::from_secs(3);
/// After the broker's return, however short the demo: messages flow again, and one sees them flow.
const FLOWS_AGAIN: Duration = Duration::from_secs(2);
/// What is written just before the broker stops may still meet its end.
const IN_FLIGHT: Duration = Duration::from_millis(200);
/// Less than the services write between two looks: nothing is left of what waited.
const CAUGHT_UP_BELOW: u64 = 20;

const READY_WITHIN: Duration = Duration::from_secs(30);
/// The relay's backoff included.
const CATCH_UP_WITHIN: Duration = Duration::from_secs(60);
const RECEIVED_WITHIN: Duration = Duration::from_secs(30);
const CLOSED_WITHIN: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(50);

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// How long orders are placed
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(5..=600))]
    seconds: u64,
}

struct Demo {
    screen: Arc<Screen>,
    tally: Arc<Mutex<Tally>>,
    /// How often somebody asked us to stop: once means early, twice means now.
    interrupts: watch::Receiver<u32>,
    postgres: Postgres,
    rabbitmq: RabbitMq,
    relay: Relay,
    obstacle: watch::Receiver<Option<Obstacle>>,
    producers: JoinSet<Result<(), tokio_postgres::Error>>,
}

pub(super) async fn run(arguments: &Arguments) -> Result<(), Error> {
    let screen = Arc::new(Screen::new());
    let mut interrupts = interrupts()?;
    screen.say("Two services write orders and users into Postgres; two others receive them from RabbitMQ.");
    screen.say("starting a private PostgreSQL and a private RabbitMQ; yours, if any, are not touched");
    let begun = Instant::now();
    let mut starting = std::pin::pin!(start_servers());
    let servers = tokio::select! {
        biased;
        _ = interrupts.wait_for(|count| *count > 0) => None,
        servers = &mut starting => Some(servers),
    };
    let Some(servers) = servers else {
        screen.say("interrupted; stopping what was started");
        // What is half started nobody can stop: it is waited for, unless somebody cannot wait.
        tokio::select! {
            biased;
            _ = interrupts.wait_for(|count| *count > 1) => {}
            servers = starting => block_in_place(|| drop(servers)),
        }
        return Ok(());
    };
    let (postgres, rabbitmq) = servers.inspect_err(|error| {
        if matches!(error, Error::Servers(servers::Error::Missing { .. })) {
            screen.say("something is not installed: `make demo` installs it first (scripts/install-servers)");
        }
    })?;
    let (postgres_port, rabbitmq_port, took) = (postgres.port(), rabbitmq.port(), begun.elapsed().as_secs_f64());
    screen.say(&format!("PostgreSQL on port {postgres_port}, RabbitMQ on port {rabbitmq_port}, after {took:.1} s"));

    let relay = Relay::new(postgres.url(), rabbitmq.url())?;
    let (obstacle_sender, obstacle) = watch::channel(Some(Obstacle::starting()));
    let (tally, producers) = (Arc::default(), JoinSet::new());
    let mut demo = Demo { screen: screen.clone(), tally, interrupts, postgres, rabbitmq, relay, obstacle, producers };
    let verdict = demo.play(Duration::from_secs(arguments.seconds), obstacle_sender).await;
    // Before their database goes: a service that is surprised by that says so.
    demo.producers.shutdown().await;
    block_in_place(|| drop(demo));
    screen.say("servers, relay and their files are gone");
    verdict
}

impl Demo {
    async fn play(&mut self, time: Duration, obstacle: watch::Sender<Option<Obstacle>>) -> Result<(), Error> {
        self.start_relay().await?;
        let (stop_consumers, stopped) = watch::channel(false);
        let mut consumers = JoinSet::new();
        for service in &consumer::SERVICES {
            consumers.spawn(service.consume(self.rabbitmq.url(), self.tally.clone(), stopped.clone()));
        }
        let mut view = JoinSet::new();
        let http_port = self.relay.http_port();
        view.spawn(view::watch_all(self.screen.clone(), self.tally.clone(), http_port, obstacle));
        self.until_ready().await?;
        let outage = self.write_for(time).await?;

        let (committed, business_rows) =
            producer::truth(&self.postgres.url()).await.map_err(failed("counting rows"))?;
        let everything = committed.len() as u64;
        self.until(RECEIVED_WITHIN, |demo| locked(&demo.tally).distinct() >= everything).await?;
        if self.interrupted() > 1 {
            self.screen.say("interrupted; nothing is judged");
            return Ok(());
        }
        view.shutdown().await;
        self.screen.draw(Vec::new());
        let took = self.relay.stop().await?;
        // The last look, for what must not come: a phantom would stand in a queue by now.
        let _ = timeout(CLOSED_WITHIN, consumer::until_empty(&self.rabbitmq.url())).await;
        stop_consumers.send_replace(true);
        let _ = timeout(CLOSED_WITHIN, async { while consumers.join_next().await.is_some() {} }).await;
        self.screen.say(&format!("SIGTERM to the relay: exit 0 after {:.2} s", took.as_secs_f64()));

        let (missing, phantom) = locked(&self.tally).differences(&committed);
        let findings = Findings { outbox_rows: everything, business_rows, missing, phantom, outage };
        self.judge(&findings)
    }

    async fn start_relay(&mut self) -> Result<(), Error> {
        consumer::declare(&self.rabbitmq.url()).await?;
        self.screen.say("$ pgoutbox init");
        for line in block_in_place(|| self.relay.init())?.lines() {
            self.screen.say(&format!("  {line}"));
        }
        let queues = consumer::SERVICES.map(|service| format!("{} takes {}", service.name, service.binding)).join(", ");
        self.screen.say(&format!("$ pgoutbox run   (exchange outbox; queues: {queues})"));
        self.relay.start()
    }

    async fn until_ready(&mut self) -> Result<(), Error> {
        self.until(READY_WITHIN, |demo| demo.obstacle.borrow().is_none()).await?;
        match self.obstacle.borrow().as_ref() {
            Some(Obstacle { reason, .. }) if self.interrupted() == 0 => {
                Err(self.relay.failed(&format!("the relay was not ready within {READY_WITHIN:?}: {reason}")))
            }
            _ => Ok(()),
        }
    }

    /// Both services write, for this time; the broker goes and comes back meanwhile.
    async fn write_for(&mut self, time: Duration) -> Result<Option<Outage>, Error> {
        let (stop, stopped) = watch::channel(false);
        let url = self.postgres.url();
        for service in &producer::SERVICES {
            let client = service.open(&url).await.map_err(failed(service.name))?;
            self.producers.spawn(service.produce(client, self.tally.clone(), stopped.clone()));
        }
        let ends = Instant::now() + time;
        self.wait(time.mul_f64(OUTAGE_AFTER)).await?;
        let mut outage = None;
        if self.interrupted() == 0 {
            outage = Some(self.outage().await?);
            self.wait(ends.saturating_duration_since(Instant::now()).max(FLOWS_AGAIN)).await?;
        }
        self.screen.say("the services stop writing");
        stop.send_replace(true);
        while let Some(ended) = self.producers.join_next().await {
            ended.map_err(failed("a producing service"))?.map_err(failed("a producing service"))?;
        }
        Ok(outage)
    }

    async fn outage(&mut self) -> Result<Outage, Error> {
        let (begun, begun_us) = (Instant::now(), now_us());
        self.screen.say("stopping RabbitMQ: orders go on being committed, and Postgres keeps them for the relay");
        block_in_place(|| self.rabbitmq.stop())?;
        self.wait(BROKER_AWAY).await?;
        self.screen.say("starting RabbitMQ again");
        block_in_place(|| self.rabbitmq.start_again())?;
        let waited = locked(&self.tally).waiting();
        self.screen.say(&format!("RabbitMQ is back, {} messages wait", grouped(waited)));
        let back = Instant::now();
        self.until(CATCH_UP_WITHIN, |demo| {
            demo.obstacle.borrow().is_none() && locked(&demo.tally).waiting() < CAUGHT_UP_BELOW
        })
        .await?;
        let left = locked(&self.tally).waiting();
        let took = back.elapsed().as_secs_f64();
        if left < CAUGHT_UP_BELOW {
            self.screen.say(&format!("all of them have arrived, {took:.1} s after its return"));
        } else {
            self.screen.say(&format!("{} messages still wait, {took:.1} s after its return", grouped(left)));
        }
        let margin = u64::try_from(IN_FLIGHT.as_micros()).unwrap_or_default();
        let written_us = (begun_us.saturating_sub(margin), now_us());
        Ok(Outage { written_us, lasted: back - begun, caught_up_after: back.elapsed() })
    }

    fn judge(&self, findings: &Findings) -> Result<(), Error> {
        let tally = locked(&self.tally);
        self.screen.say("");
        for line in view::summary(&tally, findings) {
            self.screen.say(&format!("  {line}"));
        }
        self.screen.say("");
        let Findings { outbox_rows, business_rows, missing, phantom, .. } = findings;
        let counts = [*outbox_rows, *business_rows, tally.committed];
        let mut problems: Vec<String> = tally.fault.iter().cloned().collect();
        if *missing > 0 {
            problems.push(format!("{missing} committed messages were not received"));
        }
        if *phantom > 0 {
            problems.push(format!("{phantom} messages were received that were not committed"));
        }
        if counts.iter().any(|count| count != outbox_rows) {
            problems.push(format!("outbox rows, business rows and commits differ: {counts:?}"));
        }
        if !problems.is_empty() {
            return Err(self.relay.failed(&problems.join("; ")));
        }
        self.screen.say("What was committed was received, in commit order, and nothing else was.");
        self.screen.say("With your own servers: set DATABASE_URL and AMQP_URL, then pgoutbox init, check, run.");
        Ok(())
    }

    fn interrupted(&self) -> u32 {
        // Nobody reads: nobody is there to ask twice either.
        if self.screen.is_closed() { 2 } else { *self.interrupts.borrow() }
    }

    /// Shorter when interrupted; an error when something ended that should not have.
    async fn wait(&mut self, time: Duration) -> Result<(), Error> {
        self.until(time, |demo| demo.interrupted() > 0).await
    }

    /// True, late, or interrupted twice: the caller looks which.
    async fn until(&mut self, within: Duration, is_so: impl Fn(&Self) -> bool) -> Result<(), Error> {
        let begun = Instant::now();
        while !is_so(self) && begun.elapsed() < within && self.interrupted() < 2 {
            self.relay.still_runs()?;
            if let Some(ended) = self.producers.try_join_next() {
                ended.map_err(failed("a producing service"))?.map_err(failed("a producing service"))?;
            }
            sleep(LOOK_EVERY).await;
        }
        Ok(())
    }
}

async fn start_servers() -> Result<(Postgres, RabbitMq), Error> {
    let (postgres, rabbitmq) = (spawn_blocking(|| Postgres::start(&[])), spawn_blocking(RabbitMq::start));
    let postgres = async { Ok::<_, Error>(postgres.await.map_err(failed("starting PostgreSQL"))??) };
    let rabbitmq = async { Ok::<_, Error>(rabbitmq.await.map_err(failed("starting RabbitMQ"))??) };
    // Both to their end, also when one fails: what a thread has begun goes on without us.
    let (postgres, rabbitmq) = tokio::join!(postgres, rabbitmq);
    Ok((postgres?, rabbitmq?))
}

/// SIGINT, SIGTERM and SIGHUP, counted.
fn interrupts() -> Result<watch::Receiver<u32>, Error> {
    let listen =
        |kind| signal(kind).map_err(|source| Error::System { doing: "cannot listen for signals".to_owned(), source });
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut hangup = listen(SignalKind::hangup())?;
    let (sender, receiver) = watch::channel(0);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            sender.send_modify(|count| *count += 1);
        }
    });
    Ok(receiver)
}

fn failed<E: std::error::Error + 'static>(what: &str) -> impl FnOnce(E) -> Error {
    let what = what.to_owned();
    move |error| Error::Demo(format!("{what}: {}", crate::finding::explain(&error)))
}

/// Nothing here leaves it half-changed, so a panic elsewhere does not spoil it.
fn locked(tally: &Mutex<Tally>) -> MutexGuard<'_, Tally> {
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}
