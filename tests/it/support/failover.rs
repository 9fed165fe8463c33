//! Failovers as scenarios: a primary, a physical standby, a relay on an address that leads to one of them.
//!
//! The traps. A failover slot becomes lasting on the standby only after the primary's position has passed what the standby
//! first saw, and until then a promotion drops it: the scenarios wait for that. The standby's slot sync worker dies of a slot
//! in a database that the standby does not have yet, and comes back a minute later: so the database first. And a primary that dies must die by SIGKILL:
//! a clean stop waits until the standby has everything, and nothing lags.

use std::collections::HashSet;
use std::path::Path;

use pgoutbox::lsn::Lsn;
use pgoutbox::servers::Postgres;

use super::address::Address;
use super::consumer::Consumer;
use super::relay::Relay;
use super::{Outbox, connect, eventually, shared_rabbitmq};

const PHYSICAL_SLOT: &str = "physical";

/// What a scenario ended with, for those who judge and those who print.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Rows in the new primary's table that never came.
    pub(crate) lost: usize,
    /// Messages that came and whose rows the new primary does not have.
    pub(crate) phantoms: usize,
    /// Rows whose first delivery came before that of an earlier commit that survived.
    pub(crate) reordered: usize,
    /// More deliveries than ids.
    pub(crate) duplicates: usize,
    /// The relay's own count of phantoms.
    pub(crate) counted: f64,
    /// The relay's log.
    pub(crate) log: String,
}

/// Two servers and what is between them and the consumer.
pub(crate) struct Pair {
    pub(crate) primary: Postgres,
    pub(crate) standby: Postgres,
    pub(crate) address: Address,
    pub(crate) outbox: Outbox,
    pub(crate) consumer: Consumer,
}

impl Pair {
    /// The slot is a failover slot or not; Postgres waits for the standby before it publishes, or not.
    pub(crate) async fn start(bin: &Path, failover: bool, synchronized: bool) -> Self {
        let mut primary = Postgres::start_from(bin, &[("hot_standby_feedback", "on")]).unwrap();
        let admin = connect(&primary.url()).await;
        let slot = format!("select pg_create_physical_replication_slot('{PHYSICAL_SLOT}', true)");
        admin.batch_execute(&slot).await.unwrap();
        drop(admin);
        let standby = primary
            .standby(&[
                ("primary_slot_name", PHYSICAL_SLOT),
                ("sync_replication_slots", "on"),
                ("hot_standby_feedback", "on"),
            ])
            .unwrap();
        if synchronized {
            primary.append_conf(&format!("synchronized_standby_slots = '{PHYSICAL_SLOT}'")).unwrap();
            primary.reload().unwrap();
        }
        let mut outbox = Outbox::create(&primary, shared_rabbitmq()).await;
        if failover {
            follows(&standby, outbox.current().await).await;
            let name = &outbox.name;
            outbox.sql(&format!("select pg_drop_replication_slot('{name}')")).await;
            let create = format!("select pg_create_logical_replication_slot('{name}', 'pgoutput', false, false, true)");
            outbox.sql(&create).await;
        }
        let address = Address::of(primary.port()).await;
        outbox.url = format!("postgres://postgres@127.0.0.1:{}/{}", address.port(), outbox.name);
        let consumer = Consumer::start(&outbox).await;
        Self { primary, standby, address, outbox, consumer }
    }

    /// Commits so many rows, each in a transaction of its own.
    pub(crate) async fn insert(&self, rows: usize) {
        for _ in 0..rows {
            self.outbox.insert("placed").await;
        }
    }

    /// Waits until the slot lasts on the standby, and stands at least where the primary's stands now.
    pub(crate) async fn slot_is_synced(&self) {
        let standby = connect(&self.standby.url()).await;
        let confirmed = self.outbox.confirmed().await;
        let synced = format!(
            "select 1 from pg_replication_slots where slot_name = '{}' and synced and not temporary \
             and invalidation_reason is null and confirmed_flush_lsn >= '{confirmed}'",
            self.outbox.name
        );
        eventually("the slot is synced", || async {
            // The primary logs what runs every 15 s, and only then can its slot move on.
            self.outbox.sql("select pg_log_standby_snapshot()").await;
            !standby.query(&synced, &[]).await.unwrap().is_empty()
        })
        .await;
    }

    /// Waits until the standby has replayed all that the primary has flushed.
    pub(crate) async fn standby_has_all(&self) {
        follows(&self.standby, self.outbox.current().await).await;
    }

    /// The standby becomes the primary, and inserts go there.
    pub(crate) async fn promote(&mut self) {
        let admin = connect(&self.standby.url()).await;
        admin.batch_execute("select pg_promote()").await.unwrap();
        let url = self.standby.url_for("postgres", None, &self.outbox.name);
        self.outbox.client = connect(&url).await;
    }

    /// The relay's work on the new primary, judged: `rows` more are committed there and must come.
    pub(crate) async fn judge(&self, relay: Relay, rows: usize) -> Outcome {
        self.insert(rows).await;
        let table = "select coalesce(string_agg(id::text, ',' order by number), '') from outbox";
        let committed = self.outbox.text(table).await.unwrap();
        let committed: Vec<&str> = committed.split(',').collect();
        eventually("every row of the new primary comes", || async {
            let received: HashSet<String> = self.consumer.received().into_iter().map(|message| message.id).collect();
            committed.iter().all(|id| received.contains(*id))
        })
        .await;
        self.outbox.wait_confirmed(self.outbox.current().await).await;
        let counted = relay.metric("pgoutbox_published_beyond_switchpoint_total");
        let received = self.consumer.received();
        let mut seen = HashSet::new();
        let first: Vec<&str> = received.iter().map(|one| one.id.as_str()).filter(|id| seen.insert(*id)).collect();
        let survived: Vec<&str> = first.iter().copied().filter(|id| committed.contains(id)).collect();
        let log = relay.log();
        assert_eq!(relay.stop(), 0, "{log}");
        Outcome {
            lost: committed.len() - survived.len(),
            phantoms: first.len() - survived.len(),
            reordered: survived.iter().zip(&committed).filter(|(came, row)| came != row).count(),
            duplicates: received.len() - first.len(),
            counted,
            log,
        }
    }

    async fn number_rows(&self) {
        self.outbox.sql("alter table outbox add column number bigserial").await;
    }
}

async fn follows(standby: &Postgres, flushed: Lsn) {
    let standby = connect(&standby.url()).await;
    let replayed = format!("select 1 where pg_last_wal_replay_lsn() >= '{flushed}'::pg_lsn");
    eventually("the standby follows", || async { !standby.query(&replayed, &[]).await.unwrap().is_empty() }).await;
}

/// The standby has the slot, and the primary publishes only what the standby has.
pub(crate) async fn synced_standby(bin: &Path) -> Outcome {
    let mut pair = Pair::start(bin, true, true).await;
    pair.number_rows().await;
    let relay = Relay::start(&pair.outbox);
    relay.ready().await;
    pair.insert(30).await;
    pair.consumer.wait_distinct(30).await;
    pair.slot_is_synced().await;
    pair.insert(30).await;
    pair.standby_has_all().await;
    pair.primary.kill().unwrap();
    pair.promote().await;
    pair.address.lead_to(pair.standby.port());
    pair.judge(relay, 20).await
}

/// The standby has the slot, but misses the last 60 transactions, which were published.
pub(crate) async fn lagging_standby(bin: &Path) -> Outcome {
    let mut pair = Pair::start(bin, true, false).await;
    pair.number_rows().await;
    let relay = Relay::start(&pair.outbox);
    relay.ready().await;
    pair.insert(20).await;
    pair.consumer.wait_distinct(20).await;
    pair.outbox.wait_confirmed(pair.outbox.current().await).await;
    pair.slot_is_synced().await;
    pair.standby_has_all().await;
    pair.standby.stop("fast", super::PATIENCE).unwrap();
    pair.insert(60).await;
    pair.consumer.wait_distinct(80).await;
    pair.outbox.wait_confirmed(pair.outbox.current().await).await;
    pair.primary.kill().unwrap();
    pair.standby.start_again().unwrap();
    let left_at = Lsn::new(relay.metric("pgoutbox_confirmed_lsn") as u64);
    pair.promote().await;
    // Rows where the relay's old position still lies ahead, and then WAL that passes it: whoever begins there skips them.
    pair.insert(20).await;
    pair.outbox.sql("create table noise as select generate_series(1, 50000) n").await;
    assert!(pair.outbox.current().await > left_at, "the new primary's WAL has passed the old position");
    pair.address.lead_to(pair.standby.port());
    pair.judge(relay, 20).await
}
