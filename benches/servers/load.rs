//! What the outbox holds when a measurement begins.
//!
//! One load serves all programs of a scenario and all rounds: each drains a slot of its own, and all slots began at the same
//! position. So the same WAL is read again and again, and the same messages are published. Pollers empty their table, and
//! get it filled anew.
//!
//! The trap: a payload that compresses is small in the WAL, whatever its size; here it is stored as it is.

use pgoutbox::lsn::Lsn;

use crate::arena::{Arena, Queue};

/// What is published to what.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) name: String,
    pub(crate) queue: Queue,
    pub(crate) rows: u64,
    pub(crate) rows_a_transaction: u64,
    pub(crate) payload_bytes: usize,
    /// So many rows of another table go with each row of the outbox.
    pub(crate) rows_of_others: u64,
}

impl Scenario {
    pub(crate) fn new(queue: Queue, rows: u64, rows_a_transaction: u64, payload_bytes: usize) -> Self {
        let size =
            if payload_bytes < 1024 { format!("{payload_bytes} B") } else { format!("{} KB", payload_bytes / 1024) };
        let name = format!("{}, {rows_a_transaction} a transaction, {size}", queue.name());
        Self { name, queue, rows, rows_a_transaction, payload_bytes, rows_of_others: 0 }
    }

    pub(crate) fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }
}

const TABLE: &str = include_str!("../../sql/table.sql");

/// As the payload of a shop's order: eight fields, one of them a list. Numbered, so that the consumer can judge it; `n`
/// comes first, because jsonb puts short keys first.
pub(crate) fn payload(number: &str, bytes: usize) -> String {
    const REST: usize = 150;
    let note = bytes.saturating_sub(REST);
    format!(
        "jsonb_build_object('n', {number}, 'total', 12.5, 'status', 'placed', 'currency', 'EUR', 'customer', 4711, \
         'lines', jsonb_build_array(jsonb_build_object('sku', 'A-1', 'quantity', 2)), 'express', true, \
         'note', repeat('x', {note}))"
    )
}

fn insert(table: &str, from: &str, to: &str, bytes: usize) -> String {
    format!(
        "insert into {table} (aggregatetype, aggregateid, type, payload) \
         select 'order', n::text, 'placed', {} from generate_series({from}, {to}) n",
        payload("n", bytes)
    )
}

/// Makes the tables anew, makes the slots, and writes the rows. Where the WAL then ends.
pub(crate) fn fill(arena: &Arena, scenario: &Scenario, slots: &[String]) -> Lsn {
    make_tables(arena);
    arena.make_slots(slots);
    let (rows, each) = (scenario.rows, scenario.rows_a_transaction.min(scenario.rows));
    let insert = insert("outbox", "first", &format!("least(first + {} - 1, {rows})", each), scenario.payload_bytes);
    let others = match scenario.rows_of_others {
        0 => String::new(),
        others => format!(
            "insert into other (content) select repeat('y', {}) from generate_series(1, {} * {each});",
            scenario.payload_bytes, others
        ),
    };
    arena.sql.run(&format!(
        "do $$ declare first bigint := 1; begin while first <= {rows} loop \
         {others} {insert}; commit; first := first + {each}; end loop; end $$"
    ));
    settle(arena)
}

/// The outbox, empty.
pub(crate) fn make_tables(arena: &Arena) {
    arena.sql.run("drop publication if exists pgoutbox; drop table if exists outbox, other");
    arena.sql.run(&TABLE.replace("{table}", "public.outbox"));
    arena.sql.run("alter table outbox alter payload set storage external");
    arena.sql.run("create table other (content text); alter table other alter content set storage external");
    arena.sql.run("create publication pgoutbox for table outbox with (publish = 'insert')");
}

/// All is on disk, and nothing is left to be done in the background.
fn settle(arena: &Arena) -> Lsn {
    arena.sql.run("checkpoint");
    arena.position()
}

/// The pollers' table: what an outbox with a mark looks like.
pub(crate) fn fill_polled(arena: &Arena, scenario: &Scenario) {
    arena.polled.run("drop table if exists polled");
    arena.polled.run(
        "create table polled (number bigserial primary key, id uuid default gen_random_uuid(), aggregatetype text not null, \
         aggregateid text not null, type text not null, payload jsonb, published_at timestamptz)",
    );
    arena.polled.run("alter table polled alter payload set storage external");
    arena.polled.run("create index on polled (number) where published_at is null");
    let rows = scenario.rows.to_string();
    if scenario.rows > 0 {
        arena.polled.run(&insert("polled", "1", &rows, scenario.payload_bytes));
    }
    arena.polled.run("analyze polled");
    arena.polled.run("checkpoint");
}
