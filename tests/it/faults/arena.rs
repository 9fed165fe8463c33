//! One round of one fault: servers, links between them and a real relay, load, an oracle, three kinds of queue.
//!
//! The trap: a bench that is kind to its subject. So the load is rich, every byte between relay and servers passes a link
//! that asserts, the relay lives under a memory limit, and what a row forgets to heal is a complaint, not a hang.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pgoutbox::lsn::Lsn;
use pgoutbox::servers::{Postgres, RabbitMq};

use super::cluster;
use super::judge::Outcome;
use crate::support::consumer::{Consumer, Kind, channel};
use crate::support::links::{Ledger, Link};
use crate::support::load::{ENDLESS, Mix, Oracle, Writers};
use crate::support::relay::{Relay, Way};
use crate::support::{Outbox, connect, eventually};

/// The relay's passwords: no output may hold them.
pub(super) const SECRET: &str = "secret-canary-93ac";

/// Bytes of memory a relay may have, by the kernel.
const MEMORY_MAX: &str = "134217728";
const MEMORY_MAX_KIB: u64 = 128 * 1024;

/// A server pair for many rounds, one after the other.
pub(super) struct Site {
    pub(super) postgres: Postgres,
    pub(super) rabbitmq: RabbitMq,
    /// The other nodes of its cluster; of most rows, none.
    pub(super) peers: Vec<RabbitMq>,
}

impl Site {
    /// With a broker of so many nodes.
    pub(super) fn start(nodes: usize) -> Self {
        let settings =
            [("wal_sender_timeout", "6s"), ("max_prepared_transactions", "20"), ("checkpoint_timeout", "30s")];
        let postgres = Postgres::start(&settings).unwrap();
        let (rabbitmq, peers) = cluster::start(nodes);
        let site = Self { postgres, rabbitmq, peers };
        site.permit();
        site
    }

    /// The relay's user at the broker.
    pub(super) fn permit(&self) {
        // It may be there already.
        let _ = self.rabbitmq.ctl(&["add_user", "relay", SECRET]);
        self.rabbitmq.ctl(&["set_permissions", "relay", ".*", ".*", ".*"]).unwrap();
    }
}

/// When all was well again, and what had come until then.
struct Healed {
    at: Instant,
    confirms: u64,
    distinct: Vec<usize>,
    /// The row that was inserted then.
    marker: String,
}

/// One round.
pub(super) struct Round {
    pub(super) site: Site,
    /// The outbox without links, as writers and consumers have it.
    pub(super) outbox: Outbox,
    pub(super) relay: Option<Relay>,
    pub(super) to_postgres: Link,
    pub(super) to_rabbitmq: Link,
    /// To the other nodes of a cluster.
    pub(super) to_peers: Vec<Link>,
    /// The node that relays to come try first.
    pub(super) first: usize,
    pub(super) ledger: Ledger,
    /// Of each kind of queue that the site's broker is asked for: classic, quorum and stream, in this order.
    pub(super) consumers: Vec<Consumer>,
    pub(super) random: fastrand::Rng,
    /// Settings of relays to come, as `section.key`.
    pub(super) settings: Vec<(String, String)>,
    /// What relays to come are run by.
    pub(super) way: Vec<String>,
    /// Postgres and the broker, as relays to come call them.
    pub(super) hosts: [&'static str; 2],
    /// How long relays to come may take to connect, when it is not the default.
    pub(super) connect_within: Option<Duration>,
    writers: Option<Writers>,
    oracle: Oracle,
    healed: Option<Healed>,
    /// What was wrong on the way.
    pub(super) complaints: Vec<String>,
    peak_kib: u64,
    pub(super) logs: String,
}

impl Round {
    /// Everything runs, and messages have flowed.
    pub(super) async fn start(site: Site, seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let outbox = Outbox::create_for(&site.postgres, site.amqp(&mut random)).await;
        outbox.sql(AUDIT).await;
        // Roles outlive a round's database.
        outbox.sql(&format!("{ROLE}; grant connect on database {} to relay", outbox.name)).await;
        let oracle = Oracle::start(&outbox).await;
        let mut consumers = Vec::new();
        for kind in site.kinds() {
            consumers.push(Consumer::start_kind(&outbox, *kind).await);
        }
        site.remember_queues();
        let mut settings = vec![("rabbitmq.confirm_timeout".to_owned(), "5s".to_owned())];
        // As guarantees.md tells those who have one beside other queues.
        if site.kinds().contains(&Kind::Stream) {
            settings.push(("rabbitmq.queues".to_owned(), Kind::Stream.queue(&outbox)));
        }
        let ledger = Ledger::new(outbox.confirmed().await);
        let mut to_peers = Vec::new();
        for peer in &site.peers {
            to_peers.push(Link::to_rabbitmq(peer.port(), &ledger).await);
        }
        let mut round = Self {
            to_postgres: Link::to_postgres(site.postgres.port(), &ledger).await,
            to_rabbitmq: Link::to_rabbitmq(site.rabbitmq.port(), &ledger).await,
            to_peers,
            first: 0,
            site,
            outbox,
            relay: None,
            ledger,
            consumers,
            random,
            settings,
            way: Vec::new(),
            hosts: ["127.0.0.1"; 2],
            connect_within: None,
            writers: None,
            oracle,
            healed: None,
            complaints: Vec::new(),
            peak_kib: 0,
            logs: String::new(),
        };
        round.start_relay();
        round.load(3);
        round.flowing(100).await;
        round
    }

    /// Writers that go on until the end of the round.
    pub(super) fn load(&mut self, writers: u64) {
        let mix = Mix { writers, rows: ENDLESS, most: 100, is_rich: true, seed: self.random.u64(..) };
        self.writers = Some(Writers::start_mix(&self.outbox, mix));
    }

    pub(super) async fn pause_load(&mut self) {
        if let Some(writers) = self.writers.take() {
            writers.stop().await;
        }
    }

    pub(super) fn start_relay(&mut self) {
        let relay = self.new_relay();
        self.relay = Some(relay);
    }

    /// One more relay of the same slot, through the same links, under the memory limit.
    pub(super) fn new_relay(&self) -> Relay {
        let (postgres, database) = (self.to_postgres.port(), &self.outbox.name);
        let [to_postgres, to_rabbitmq] = self.hosts;
        let within = |text: &dyn Fn(Duration) -> String| self.connect_within.map(text).unwrap_or_default();
        let (to_postgres_within, to_rabbitmq_within) = (
            within(&|long| format!("?connect_timeout={}", long.as_secs())),
            within(&|long| format!("&connection_timeout={}", long.as_millis())),
        );
        let mut ports: Vec<u16> = self.to_nodes().map(Link::port).collect();
        ports.rotate_left(self.first);
        let to_rabbitmq =
            |port: &u16| format!("amqp://relay:{SECRET}@{to_rabbitmq}:{port}/%2f?heartbeat=4{to_rabbitmq_within}");
        let settings: Vec<_> = self.settings.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let relay = Relay::start_at_by(
            Way { under: self.way.clone(), ..Way::default() },
            &format!("postgres://relay:{SECRET}@{to_postgres}:{postgres}/{database}{to_postgres_within}"),
            &ports.iter().map(to_rabbitmq).collect::<Vec<_>>().join(","),
            &self.outbox.name,
            &settings,
        );
        limit_memory(relay.pid());
        relay
    }

    pub(super) fn relay(&self) -> &Relay {
        self.relay.as_ref().expect("a relay runs")
    }

    /// Takes the relay out, with its log and its peak noted.
    pub(super) fn take_relay(&mut self) -> Relay {
        let relay = self.relay.take().expect("a relay runs");
        self.note(&relay);
        relay
    }

    /// Before a relay goes: how large it was, and what it said.
    pub(super) fn note(&mut self, relay: &Relay) {
        self.peak_kib = self.peak_kib.max(relay.peak_memory_kib().unwrap_or(0));
        let said = relay.log() + &relay.get("/metrics").1 + &relay.get("/readyz").1 + &relay.get("/").1;
        for canary in [SECRET, crate::support::load::CANARY] {
            if said.contains(canary) {
                self.complaints.push(format!("the relay said {canary}"));
            }
        }
        if said.contains("panicked") {
            self.complaints.push("the relay panicked".to_owned());
        }
        self.logs += &relay.log();
    }

    /// So many more messages have come out of the last queue.
    pub(super) async fn flowing(&self, count: usize) {
        let last = self.consumers.last().expect("a queue");
        let before = last.count();
        eventually("messages flow", || async { last.count() >= before + count }).await;
    }

    /// A random moment of traffic has passed.
    pub(super) async fn moment(&mut self) {
        let wait = Duration::from_millis(self.random.u64(0..400));
        tokio::time::sleep(wait).await;
    }

    /// The fault lasts so long: the relay neither burns CPU nor knocks at every door meanwhile.
    pub(super) async fn lasts(&mut self, long: Duration) {
        // What is under way when the fault comes may end first.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let knocks = |round: &Self| round.to_nodes().map(Link::connections).sum::<u64>();
        let before = (self.relay().cpu(), self.to_postgres.connections(), knocks(self));
        tokio::time::sleep(long).await;
        let cpu = self.relay().cpu().saturating_sub(before.0);
        let postgres = self.to_postgres.connections() - before.1;
        let (rabbitmq, nodes) = (knocks(self) - before.2, self.site.nodes() as u64);
        if cpu > long / 20 {
            self.complaints.push(format!("{cpu:?} of CPU while waiting {long:?}"));
        }
        // A session knocks once at every node of the broker, and at most three times at Postgres: control, stream, and to see
        // what was told.
        if rabbitmq > nodes * (long.as_secs() + 1) || postgres > 3 * (long.as_secs() + 1) {
            self.complaints.push(format!("{postgres} and {rabbitmq} connections while waiting {long:?}"));
        }
    }

    /// All is well again: messages must flow soon, and a row inserted now must arrive.
    pub(super) async fn healed(&mut self) {
        let began = Instant::now();
        loop {
            if let Ok(client) = connect_now(&self.outbox.url).await
                && let Ok(row) = client.query_one(MARKER, &[]).await
            {
                let (confirms, distinct) = (self.ledger.counts().confirms, self.distinct());
                self.healed = Some(Healed { at: Instant::now(), confirms, distinct, marker: row.get(0) });
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "Postgres does not take a row after the fault");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Ends the load, waits for what is due, and judges.
    pub(super) async fn finish(mut self) -> (Outcome, Site) {
        if self.healed.is_none() {
            self.healed().await;
        }
        let recovered = self.recovered().await;
        self.pause_load().await;
        self.outbox.client = connect(&self.outbox.url).await;
        self.resolve_prepared().await;
        let truth = self.oracle.ids(&self.outbox).await;
        let audited = self.outbox.text("select count(*) from audit").await.unwrap();
        if audited != truth.len().to_string() {
            self.complaints.push(format!("the audit table has {audited} rows, the oracle {}", truth.len()));
        }
        self.arrived(&truth).await;
        self.told().await;
        if self.relay.is_some() {
            let relay = self.take_relay();
            let code = relay.stop();
            if code != 0 {
                self.complaints.push(format!("a clean stop ended with {code}"));
            }
        }
        if !self.site.mend().await {
            self.complaints.push("the cluster is not whole again".to_owned());
        }
        self.complaints.extend(self.ledger.violations());
        if self.peak_kib > MEMORY_MAX_KIB {
            self.complaints.push(format!("{} KiB of memory", self.peak_kib));
        }
        let received: Vec<_> = self.consumers.iter().map(Consumer::received).collect();
        let mut outcome = Outcome::of(&received, &truth);
        outcome.recovered = recovered;
        outcome.peak_kib = self.peak_kib;
        outcome.complaints.append(&mut self.complaints);
        outcome.log = std::mem::take(&mut self.logs);
        if !outcome.complaints.is_empty() {
            let path = std::env::temp_dir().join(format!("pgoutbox-faults-{}.broker.log", self.outbox.name));
            std::fs::write(&path, self.site.broker_log()).unwrap();
            outcome.log += &format!("--- the broker's log is in {}\n", path.display());
        }
        self.clear().await;
        (outcome, self.site)
    }

    /// How long it took until the broker confirmed again, and every queue gave messages that had never come.
    async fn recovered(&mut self) -> Option<Duration> {
        const WITHIN: Duration = Duration::from_secs(30);
        const PATIENCE: Duration = Duration::from_secs(60);
        let healed = self.healed.as_ref()?;
        let flows = || {
            self.ledger.counts().confirms > healed.confirms
                && self.distinct().iter().zip(&healed.distinct).all(|(now, then)| now > then)
        };
        let took = loop {
            match healed.at.elapsed() {
                took if flows() || took > PATIENCE => break took,
                _ => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        if took > WITHIN {
            self.complaints.push(format!("recovered only after {took:?}, if at all"));
        }
        Some(took)
    }

    /// Of each queue.
    pub(super) fn distinct(&self) -> Vec<usize> {
        self.consumers.iter().map(Consumer::distinct).collect()
    }

    /// A transaction that a crash left prepared holds the slot for ever.
    async fn resolve_prepared(&self) {
        let sql = "select gid from pg_prepared_xacts where database = current_database()";
        while let Some(name) = self.outbox.text(sql).await {
            self.outbox.sql(&format!("rollback prepared '{name}'")).await;
        }
    }

    /// Waits for everything, as long as something comes.
    async fn arrived(&mut self, truth: &[String]) {
        const STANDSTILL: Duration = Duration::from_secs(20);
        let mut last = (Instant::now(), self.distinct());
        while last.1.iter().any(|count| *count < truth.len()) && last.0.elapsed() < STANDSTILL {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let now = self.distinct();
            if now != last.1 {
                last = (Instant::now(), now);
            }
        }
        for (kind, count) in self.site.kinds().iter().zip(last.1).filter(|(_, count)| *count < truth.len()) {
            self.complaints.push(format!("of {} messages {count} came out of the queue of kind {kind:?}", truth.len()));
        }
        if self.site.kinds().contains(&Kind::Stream) && !self.complaints.is_empty() {
            let again = Consumer::of(&self.outbox, Kind::Stream);
            tokio::time::sleep(STANDSTILL).await;
            self.complaints.push(format!("a new consumer finds {} messages in the stream", again.distinct()));
            self.logs += &self.stream_in_broker();
        }
        let marker = self.healed.as_ref().map(|healed| &healed.marker);
        if !marker.is_some_and(|marker| self.consumers.iter().all(|consumer| consumer.has(marker))) {
            self.complaints.push("the row inserted after the fault did not arrive".to_owned());
        }
    }

    /// What RabbitMQ knows of the stream: whether what was confirmed and did not come should have been there at all.
    fn stream_in_broker(&self) -> String {
        let stream = Kind::Stream.queue(&self.outbox);
        let looks = [
            format!("rabbit_stream_queue:status(<<\"/\">>, <<\"{stream}\">>)."),
            "ets:tab2list(rabbit_durable_route).".to_owned(),
            "ets:tab2list(rabbit_route).".to_owned(),
        ];
        let said = |look: &String| self.site.rabbitmq.ctl(&["eval", look]).unwrap_or_else(|error| error.to_string());
        looks.iter().map(|look| format!("--- {look}\n{}\n", said(look))).collect()
    }

    /// I7: an idle slot follows the server.
    async fn told(&mut self) {
        const WITHIN: Duration = Duration::from_secs(15);
        let (target, began) = (self.outbox.current().await, Instant::now());
        while self.outbox.confirmed().await < target {
            if began.elapsed() > WITHIN {
                let confirmed: Lsn = self.outbox.confirmed().await;
                self.complaints.push(format!("the slot stands at {confirmed}, {target} was due"));
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Slots hold WAL and queues hold memory: the next round needs neither.
    async fn clear(&mut self) {
        let sql = "select pg_drop_replication_slot(slot_name) from pg_replication_slots \
                   where database = current_database() and not active";
        // A slot may be held for another moment; nothing depends on it.
        let _ = self.outbox.client.batch_execute(sql).await;
        self.consumers.clear();
        let (_connection, channel) = channel(&self.outbox.amqp).await;
        for kind in self.site.kinds() {
            let queue = kind.queue(&self.outbox);
            let _ = channel.queue_delete(queue.as_str().into(), Default::default()).await;
        }
    }
}

async fn connect_now(url: &str) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// The truth: filled in the writer's own transaction, whatever becomes of the row.
const AUDIT: &str = "
create table audit (id uuid primary key);
create function audit() returns trigger language plpgsql as
  $$ begin insert into audit select id from added; return null; end $$;
create trigger audit after insert on outbox referencing new table as added for each statement execute function audit();
";

/// The relay's role: may replicate, and nothing else.
const ROLE: &str = "do $$ begin create role relay login replication; exception when duplicate_object then null; end $$";

const MARKER: &str = "insert into outbox (aggregatetype, aggregateid, type) values ('order', '0', 'marker') \
                      returning id::text";

/// Where the machine lets us: a relay that grows is killed, and that is a failure of the round.
fn limit_memory(pid: i32) {
    let group = PathBuf::from("/sys/fs/cgroup/memory/pgoutbox-faults").join(pid.to_string());
    if std::fs::create_dir_all(&group).is_ok() {
        let _ = std::fs::write(group.join("memory.limit_in_bytes"), MEMORY_MAX);
        let _ = std::fs::write(group.join("cgroup.procs"), pid.to_string());
    }
}
