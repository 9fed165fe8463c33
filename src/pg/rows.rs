//! The last rows of the outbox, for a look at what they would become.
//!
//! The traps. An outbox can hold millions of rows in no index that helps, so only the last blocks of each table are read.
//! And a row can hold a gigabyte: a value is cut, and of the payload only the length is read.

use tokio_postgres::SimpleQueryMessage;

use super::catalog::Control;
use super::error::Error;
use super::world::{Table, identifier};

/// More than AMQP takes in any column but the payload.
const VALUE_CHARACTERS_MAX: u32 = 131_073;

/// Of each table, from its end.
const BLOCKS_MAX: i64 = 16;
const ROWS_MAX: u32 = 20;

/// Partitions, the youngest ones.
const LEAVES_MAX: i64 = 4;

/// One row, as the stream would have it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sampled {
    /// The values of the columns, in their order; the payload empty.
    pub values: Vec<Option<String>>,
    /// How long the payload would be; none for NULL.
    pub payload_bytes: Option<u64>,
}

impl Control {
    /// Reads them. `payload` is its column's index, `is_bytea` whether its length is that of its bytes.
    ///
    /// # Errors
    /// `Server` with 42501 for a role that may not read, which a relay need not; with 57014 when it takes long.
    pub async fn last_rows(
        &self,
        table: &Table,
        columns: &[(String, u32)],
        payload: usize,
    ) -> Result<Vec<Sampled>, Error> {
        const BYTEA: u32 = 17;
        let Some((payload_name, payload_type)) = columns.get(payload) else { return Ok(Vec::new()) };
        let payload_name = identifier(payload_name);
        let length = if *payload_type == BYTEA { payload_name.clone() } else { format!("{payload_name}::text") };
        let value = |(index, (name, _)): (usize, &(String, u32))| {
            let name = identifier(name);
            // An empty value stands for any.
            let empty = if *payload_type == BYTEA { "'\\x'" } else { "''" };
            if index == payload {
                format!("case when {name} is not null then {empty} end")
            } else {
                format!("left({name}::text, {VALUE_CHARACTERS_MAX})")
            }
        };
        let values: Vec<String> = columns.iter().enumerate().map(value).collect();
        let mut rows = Vec::new();
        self.client().batch_execute("set statement_timeout = '5s'").await?;
        for (leaf, block) in self.ends(table).await? {
            let sql = format!(
                "select octet_length({length}), {} from only {leaf} where ctid >= '({block},0)' \
                 order by ctid desc limit {ROWS_MAX}",
                values.join(", ")
            );
            rows.extend(self.client().simple_query(&sql).await?.iter().filter_map(sampled));
        }
        self.client().batch_execute("reset statement_timeout").await?;
        Ok(rows)
    }

    /// The tables that hold rows, and for each the block from which on it is read.
    async fn ends(&self, table: &Table) -> Result<Vec<(String, i64)>, Error> {
        let sql = "select pg_catalog.format('%I.%I', n.nspname, c.relname), \
            greatest(pg_catalog.pg_relation_size(c.oid) / pg_catalog.current_setting('block_size')::int8 - $2, 0) \
            from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
            where c.oid = any($1) and pg_catalog.pg_relation_size(c.oid) > 0 order by c.oid desc limit $3";
        let rows = self.all(sql, &[&table.leaves, &BLOCKS_MAX, &LEAVES_MAX]).await?;
        rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
    }
}

fn sampled(message: &SimpleQueryMessage) -> Option<Sampled> {
    let SimpleQueryMessage::Row(row) = message else { return None };
    let mut values = (0..row.len()).map(|index| row.get(index).map(str::to_owned));
    let payload_bytes = values.next().flatten().and_then(|length| length.parse().ok());
    Some(Sampled { values: values.collect(), payload_bytes })
}
