//! Rows 18 to 37 and 55: what databases, their transactions and their operators do.

use std::time::Duration;

use super::arena::Round;
use super::{FAILURE, Row, allow};
use crate::support::links::Toxics;
use crate::support::{connect, eventually};

pub(super) const ROWS: &[Row] = &[
    Row {
        number: "18",
        fault: "idle outbox, 20 MB written to another table: the slot follows",
        allowed: allow(0),
        run: |round| {
            Box::pin(async move {
                round.pause_load().await;
                round
                    .outbox
                    .sql("create table other as select repeat('x', 1000) as t from generate_series(1, 20000)")
                    .await;
                let current = round.outbox.current().await;
                round.outbox.wait_confirmed(current).await;
                round.load(3);
            })
        },
    },
    Row {
        number: "19",
        fault: "keepalives inside a transaction of 20,000 rows that is read slowly, then Postgres and relay killed",
        allowed: allow(usize::MAX),
        run: |round| Box::pin(killed_in_a_transaction(round)),
    },
    Row {
        number: "35",
        fault: "rollbacks, savepoints, and a transaction of 2,000 subtransactions, each rolled back",
        allowed: allow(0),
        run: |round| {
            Box::pin(async move {
                round
                    .outbox
                    .sql(
                        "do $$ begin for n in 1 .. 2000 loop begin \
                    insert into outbox (aggregatetype, aggregateid, type) values ('order', '1', 'undone'); \
                    raise exception 'no'; exception when raise_exception then null; end; end loop; end $$",
                    )
                    .await;
            })
        },
    },
    Row {
        number: "36",
        fault: "a transaction stays prepared while the relay is restarted, then is committed",
        allowed: allow(0),
        run: |round| {
            Box::pin(async move {
                round
                    .outbox
                    .sql(
                        "begin; insert into outbox (aggregatetype, aggregateid, type) \
                    values ('order', '1', 'prepared'); prepare transaction 'waits'",
                    )
                    .await;
                round.restart_relay().await;
                round.flowing(20).await;
                round.outbox.sql("commit prepared 'waits'").await;
            })
        },
    },
    Row {
        number: "37",
        fault: "a long transaction stays open while the relay is killed and others commit, then commits",
        allowed: allow(FAILURE),
        run: |round| {
            Box::pin(async move {
                let client = connect(&round.outbox.url).await;
                let insert = "insert into outbox (aggregatetype, aggregateid, type) values ('order', '1', 'placed')";
                client.batch_execute(&format!("begin; {insert}")).await.unwrap();
                round.flowing(50).await;
                round.kill_relay().await;
                client.batch_execute(insert).await.unwrap();
                round.flowing(50).await;
                client.batch_execute("commit").await.unwrap();
            })
        },
    },
    Row {
        number: "55",
        fault: "REPLICATION revoked from the relay's role and its walsender ended: exit 78, granted and started again",
        allowed: allow(FAILURE),
        run: |round| Box::pin(revoked(round)),
    },
];

async fn killed_in_a_transaction(round: &mut Round) {
    round.pause_load().await;
    // The server asks for a reply after half of its timeout, and a relay speaks too often to be asked: its statuses are
    // held back for longer than that, and for less than all of it. Little is in the kernel's hands where a
    // connection begins slow.
    let slow = Toxics { bandwidth_down: Some(1 << 20), ..Toxics::default() };
    round.to_postgres.set(slow.clone());
    round.outbox.sql(&format!("alter database {} set wal_sender_timeout = '12s'", round.outbox.name)).await;
    round.restart_relay().await;
    let sql = "insert into outbox (aggregatetype, aggregateid, type, payload) \
               select 'order', n::text, 'many', to_jsonb(repeat('x', 800)) from generate_series(1, 20000) n";
    round.outbox.sql(sql).await;
    round.flowing(100).await;
    let before = round.ledger.counts().keepalives_inside;
    round.to_postgres.set(Toxics { hold_statuses: true, ..slow.clone() });
    tokio::time::sleep(Duration::from_secs(7)).await;
    round.to_postgres.set(slow);
    let asked = || async { round.ledger.counts().keepalives_inside > before };
    eventually("a keepalive comes inside the transaction", asked).await;
    // What it makes the relay tell is on its way.
    tokio::time::sleep(Duration::from_secs(1)).await;
    round.take_relay().kill();
    round.kill_postgres().await;
    round.to_postgres.heal();
    round.start_relay();
    round.load(3);
}

async fn revoked(round: &mut Round) {
    round.outbox.sql("alter role relay noreplication").await;
    round.terminate_walsender().await;
    let relay = round.take_relay();
    let (code, log) = tokio::task::spawn_blocking(|| relay.ended()).await.unwrap();
    if code != 78 || !log.contains("role relay may not replicate") {
        round.complaints.push(format!("exit {code}"));
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    round.outbox.sql("alter role relay replication").await;
    round.start_relay();
}
