//! Stops that tell the truth: what a relay does when the world, a row or a login is wrong, as an operator sees it.
//!
//! The trap: "it exited" proves little. Each stop has its exit code, names the thing and the remedy, leaves slot, publication
//! and table as they were, and stands before what it could not deliver; where the remedy is a statement, it is pasted.

mod broker;
mod login;
mod publication;
mod row;
mod slot;
mod table;

use pgoutbox::lsn::Lsn;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::support::Outbox;
use crate::support::relay::{Relay, environment, pgoutbox};

/// `EX_DATAERR`: a row that cannot be delivered as it is.
const ROW: i32 = 65;

/// `EX_CONFIG`: the world is set up wrong.
const WORLD: i32 = 78;

/// Starts a relay, sees it end with this code and say all of this, and returns its log. It changed nothing.
async fn stops(outbox: &Outbox, code: i32, says: &[&str]) -> String {
    stops_with(outbox, &[], code, says).await
}

async fn stops_with(outbox: &Outbox, settings: &[(&str, &str)], code: i32, says: &[&str]) -> String {
    let before = inventory(outbox).await;
    let log = ended(Relay::start_with(outbox, settings), code, says);
    assert_eq!(inventory(outbox).await, before, "`run` creates and drops nothing");
    log
}

/// Waits for the relay's end, and checks code and words.
fn ended(relay: Relay, code: i32, says: &[&str]) -> String {
    let (ended, log) = relay.ended();
    assert_eq!(ended, code, "{log}");
    for text in says {
        assert!(log.contains(text), "{text:?} is not in\n{log}");
    }
    log
}

/// Everything that a relay could make or remove.
async fn inventory(outbox: &Outbox) -> Option<String> {
    let sql = format!(
        "select string_agg(thing, ' ' order by thing) from (\
         select 'slot ' || slot_name || ' ' || coalesce(plugin, 'physical') as thing from pg_replication_slots \
         where slot_name like '{}%' \
         union all select 'publication ' || pubname from pg_publication \
         union all select relkind::text || ' ' || oid from pg_class where oid > 16384) things",
        outbox.name
    );
    outbox.text(&sql).await
}

/// The statement after the last occurrence of `before` in the log, up to the end of the sentence or the line's fields.
fn statement(log: &str, before: &str) -> String {
    let (_, rest) = log.rsplit_once(before).unwrap_or_else(|| panic!("{before:?} is not in\n{log}"));
    let line = rest.lines().next().unwrap();
    let line = line.split_once(". ").map_or(line, |(sentence, _)| sentence);
    line.split_once("; ").map_or(line, |(statement, _)| statement).to_owned()
}

/// Runs a verb for this outbox.
fn verb(outbox: &Outbox, arguments: &[&str]) -> std::process::Output {
    pgoutbox().args(arguments).envs(environment(&outbox.url, &outbox.amqp, &outbox.name)).output().unwrap()
}

/// Where the last transaction of this database ends, by a decoder that is not ours.
struct Witness<'a> {
    outbox: &'a Outbox,
}

impl<'a> Witness<'a> {
    async fn of(outbox: &'a Outbox) -> Self {
        outbox
            .sql(&format!("select pg_create_logical_replication_slot('{}_witness', 'test_decoding')", outbox.name))
            .await;
        Self { outbox }
    }

    async fn last_commit(&self) -> Lsn {
        let sql = format!(
            "select max(lsn) from pg_logical_slot_peek_changes('{}_witness', null, null) where data like 'COMMIT%'",
            self.outbox.name
        );
        self.outbox.text(&sql).await.unwrap().parse().unwrap()
    }
}

/// A road to a server that can be closed and opened again.
struct Road {
    port: u16,
    is_open: watch::Sender<bool>,
}

impl Road {
    async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let road = Self { port: listener.local_addr().unwrap().port(), is_open: watch::Sender::new(true) };
        let is_open = road.is_open.subscribe();
        tokio::spawn(async move {
            while let Ok((mut traveller, _)) = listener.accept().await {
                let mut is_open = is_open.clone();
                tokio::spawn(async move {
                    if !*is_open.borrow_and_update() {
                        return;
                    }
                    let Ok(mut server) = TcpStream::connect(("127.0.0.1", port)).await else { return };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut traveller, &mut server) => {}
                        _ = is_open.wait_for(|is_open| !is_open) => {}
                    }
                });
            }
        });
        road
    }

    /// Of an AMQP URL on the loopback address.
    fn url(&self, url: &str, port: u16) -> String {
        url.replace(&format!(":{port}/"), &format!(":{}/", self.port))
    }

    fn close(&self) {
        self.is_open.send_replace(false);
    }

    fn open(&self) {
        self.is_open.send_replace(true);
    }
}
