//! Load and truth: concurrent writers with rollbacks, savepoints and COPY; an oracle that reads the same WAL through a
//! decoder that is not ours; a judge over what the consumer got.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::SinkExt;
use tokio_postgres::Client;

use super::consumer::Received;
use super::{Outbox, connect};

/// What writers write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mix {
    pub(crate) writers: u64,
    /// About so many rows are committed.
    pub(crate) rows: usize,
    /// In transactions of 1 to so many.
    pub(crate) most: usize,
    /// Two-phase commits, rows of up to 8 MB, NULLs and rows deleted at once as well.
    pub(crate) is_rich: bool,
    pub(crate) seed: u64,
}

/// In the payload of every row: no output may hold it.
pub(crate) const CANARY: &str = "payload-canary-5b1f";

/// Shared by the writers of one load.
pub(crate) struct Load {
    /// Rows still to be committed.
    left: AtomicUsize,
    stop: AtomicBool,
}

/// So many rows that only a stop ends the load.
pub(crate) const ENDLESS: usize = usize::MAX >> 1;

/// Writers at work.
pub(crate) struct Writers {
    load: Arc<Load>,
    tasks: Vec<tokio::task::JoinHandle<usize>>,
}

impl Writers {
    /// Starts writers that commit about `rows` rows in transactions of 1 to `most`.
    pub(crate) fn start(outbox: &Outbox, writers: u64, rows: usize, most: usize, seed: u64) -> Self {
        println!("load seed {seed}");
        Self::start_mix(outbox, Mix { writers, rows, most, is_rich: false, seed })
    }

    pub(crate) fn start_mix(outbox: &Outbox, mix: Mix) -> Self {
        let load = Arc::new(Load { left: AtomicUsize::new(mix.rows), stop: AtomicBool::new(false) });
        let writer = |number| {
            let mix = Mix { seed: mix.seed.wrapping_add(number), ..mix };
            tokio::spawn(write(outbox.url.clone(), load.clone(), mix))
        };
        Self { tasks: (0..mix.writers).map(writer).collect(), load }
    }

    /// Starts writers that go on until they are stopped, at a pace that leaves the servers room to come back.
    pub(crate) fn endless(outbox: &Outbox, writers: u64, most: usize) -> Self {
        Self::start(outbox, writers, ENDLESS, most, fastrand::u64(..))
    }

    /// Waits until all is written, and returns how many rows were committed.
    pub(crate) async fn done(self) -> usize {
        let mut rows = 0;
        for task in self.tasks {
            rows += task.await.unwrap();
        }
        rows
    }

    /// Ends the load early.
    pub(crate) async fn stop(self) -> usize {
        self.load.stop.store(true, Ordering::Relaxed);
        self.done().await
    }
}

/// One writer: survives a server that goes and comes back. Returns the rows whose commit was acknowledged; the truth is
/// in the table.
async fn write(url: String, load: Arc<Load>, mix: Mix) -> usize {
    let most = mix.most;
    let mut random = fastrand::Rng::with_seed(mix.seed);
    let mut written = 0;
    let mut client: Option<Client> = None;
    while !load.stop.load(Ordering::Relaxed) {
        // Many small transactions, few large ones.
        let size = if random.u8(..) < 200 { random.usize(1..=most.min(10)) } else { random.usize(1..=most) };
        if load.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(size)).is_err() {
            break;
        }
        let connected = match &client {
            Some(connected) if !connected.is_closed() => connected,
            _ => match reconnect(&url).await {
                Some(connected) => client.insert(connected),
                None => continue,
            },
        };
        if load.left.load(Ordering::Relaxed) > ENDLESS >> 1 {
            tokio::time::sleep(Duration::from_millis(random.u64(0..40))).await;
        }
        // A commit whose answer was lost counts as nothing: it is in the table, or it is not.
        let committed = match random.u8(..) {
            0..20 if mix.is_rich => unusual(connected, &mut random).await,
            _ => transaction(connected, size, &mut random).await,
        };
        if committed == Ok(true) {
            written += size;
        }
    }
    written
}

async fn reconnect(url: &str) -> Option<Client> {
    let connected = tokio_postgres::connect(url, tokio_postgres::NoTls).await;
    if let Ok((client, connection)) = connected {
        tokio::spawn(connection);
        return Some(client);
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    None
}

/// One transaction; whether it was committed. A fifth is rolled back; some roll back to a savepoint and go on.
async fn transaction(client: &Client, size: usize, random: &mut fastrand::Rng) -> Result<bool, ()> {
    let run = |sql: String| async move { client.batch_execute(&sql).await.map_err(|_| ()) };
    run("begin".to_owned()).await?;
    if random.u8(..) < 40 {
        run(format!("savepoint s; {}; rollback to savepoint s", insert(random.usize(1..5), "undone"))).await?;
    }
    let kind = ["placed", "paid", "shipped"][random.usize(0..3)];
    match random.u8(0..3) {
        0 => run(insert(size, kind)).await?,
        1 => {
            for _ in 0..size.min(20) {
                run(insert(1, kind)).await?;
            }
            run(format!("savepoint t; {}", insert(size.saturating_sub(20), kind))).await?;
        }
        _ => copy(client, size, kind).await?,
    }
    if random.u8(..) < 51 {
        run("rollback".to_owned()).await?;
        return Ok(false);
    }
    run("commit".to_owned()).await?;
    Ok(true)
}

/// What is rare in production and cruel to decoders.
async fn unusual(client: &Client, random: &mut fastrand::Rng) -> Result<bool, ()> {
    let run = |sql: String| async move { client.batch_execute(&sql).await.map_err(|_| ()) };
    let row = "insert into outbox (aggregatetype, aggregateid, type, payload) values ('order', '1', 'odd', ";
    match random.u8(0..4) {
        0 => {
            let (name, end) = (random.u64(..), if random.bool() { "commit" } else { "rollback" });
            run(format!("begin; {}; prepare transaction 'p{name}'", insert(random.usize(1..10), "prepared"))).await?;
            run(format!("{end} prepared 'p{name}'")).await?;
        }
        1 => {
            // Most are small, a few are up to 8 MB.
            let bytes = 1_usize << random.u32(0..23);
            run(format!("{row} jsonb_build_object('{CANARY}', repeat('x', {bytes})))")).await?;
        }
        2 => run(format!("{row} null)")).await?,
        _ => run(format!("begin; {}; delete from outbox where type = 'gone'; commit", insert(3, "gone"))).await?,
    }
    Ok(true)
}

fn insert(rows: usize, kind: &str) -> String {
    format!(
        "insert into outbox (aggregatetype, aggregateid, type, payload) select 'order', n::text, '{kind}', \
         jsonb_build_object('n', n, '{CANARY}', repeat('x', 100)) from generate_series(1, {rows}) n"
    )
}

async fn copy(client: &Client, rows: usize, kind: &str) -> Result<(), ()> {
    let sink = client.copy_in("copy outbox (aggregatetype, aggregateid, type, payload) from stdin").await;
    let mut sink = std::pin::pin!(sink.map_err(|_| ())?);
    for n in 0..rows {
        let line = Bytes::from(format!("user\t{n}\t{kind}\t{{\"n\": {n}, \"canary\": \"{CANARY}\"}}\n"));
        sink.send(line).await.map_err(|_| ())?;
    }
    sink.close().await.map_err(|_| ())
}

/// A second slot, decoded by `test_decoding`: an independent reader of the same commits.
pub(crate) struct Oracle {
    slot: String,
}

impl Oracle {
    /// Before the first write.
    pub(crate) async fn start(outbox: &Outbox) -> Self {
        let slot = format!("{}_oracle", outbox.name);
        outbox.sql(&format!("select pg_create_logical_replication_slot('{slot}', 'test_decoding')")).await;
        Self { slot }
    }

    /// The ids of all committed rows, in commit order.
    pub(crate) async fn ids(&self, outbox: &Outbox) -> Vec<String> {
        let client = connect(&outbox.url).await;
        let sql = format!(
            "select substring(data from 'id\\[uuid\\]:''([^'']+)''') from \
             pg_logical_slot_peek_changes('{}', null, null, 'include-xids', '0') \
             where data like 'table public.outbox: INSERT:%'",
            self.slot
        );
        let rows = client.query(&sql, &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }
}

/// First deliveries, in the order in which they came.
pub(crate) fn first_deliveries(received: &[Received]) -> Vec<&Received> {
    let mut seen = HashSet::new();
    received.iter().filter(|received| seen.insert(received.id.as_str())).collect()
}

/// Asserts that first deliveries are exactly the oracle's sequence, and that every position belongs to one id. Returns the
/// number of duplicates.
pub(crate) fn judge(received: &[Received], oracle: &[String]) -> usize {
    let first = first_deliveries(received);
    let truth: HashSet<&str> = oracle.iter().map(String::as_str).collect();
    let missing = truth.len() - first.iter().filter(|received| truth.contains(received.id.as_str())).count();
    let phantoms = first.iter().filter(|received| !truth.contains(received.id.as_str())).count();
    assert_eq!((missing, phantoms), (0, 0), "missing and phantom of {}", oracle.len());
    for (index, (received, id)) in first.iter().zip(oracle).enumerate() {
        assert_eq!(&received.id, id, "first delivery {index} at {:?}", received.position);
    }
    assert_gapless_runs(received, &first);
    received.len() - first.len()
}

/// Every session publishes a gapless run of the total order that begins at or before the first message not yet delivered:
/// wherever the sequence goes back, it goes on from there without a hole.
fn assert_gapless_runs(received: &[Received], first: &[&Received]) {
    let index_of: HashMap<&str, usize> =
        first.iter().enumerate().map(|(index, received)| (received.id.as_str(), index)).collect();
    let mut reached = 0;
    let mut last: Option<usize> = None;
    for received in received {
        let index = index_of[received.id.as_str()];
        let follows = last.is_none_or(|last| index == last + 1) || index <= reached;
        assert!(follows, "message {index} after {last:?}, with {reached} delivered: a hole");
        reached = reached.max(index + 1);
        last = Some(index);
    }
    let positions: Vec<_> = first.iter().map(|received| received.position).collect();
    assert!(positions.windows(2).all(|pair| pair[0] < pair[1]), "positions do not rise");
}
