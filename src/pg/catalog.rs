//! Plain SQL beside the stream: looks at what a relay depends on, and hears when the server goes.
//!
//! The traps. A server that stops ends an SQL connection at once but waits for its walsenders. And the catalog is read in
//! several statements: what one of them saw may be gone at the next, so a finding is looked at twice before it counts.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::config::SslMode;
use tokio_postgres::{Client, NoTls, Row};

use super::advice::{Circumstances, SETTINGS, Setting};
use super::dial::Place;
use super::error::Error;
use super::handover::Handover;
use super::hosts;
use super::settings::Settings;
use super::world::{Names, Publication, Published, Slot, Table, World};
use crate::lsn::Lsn;

/// Catalog queries answer in milliseconds; one that does not is a peer that is not there. The server gives up before, see
/// `connection::PATIENCE`.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);

/// PostgreSQL 15: column lists and row filters of publications.
const VERSION_WITH_FILTERS: i32 = 150_000;

/// The cluster's identifier and when its postmaster started: a primary and its standbys share the first, and behind one
/// address there may be several servers.
pub(super) const SERVER: &str = "select s.system_identifier || ' started ' || \
    extract(epoch from pg_catalog.pg_postmaster_start_time()) from pg_catalog.pg_control_system() s";

/// A walsender's client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Of the walsender.
    pub pid: i32,
    /// What it calls itself.
    pub application: Option<String>,
    /// Where it comes from; none by a Unix socket.
    pub address: Option<String>,
    /// `streaming`, `catchup` and others.
    pub state: Option<String>,
}

/// What our role may do, where an outbox is set up or looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Privileges {
    /// USAGE on the schema; also where there is none.
    pub uses_schema: bool,
    /// CREATE on the schema; also where there is none.
    pub creates_in_schema: bool,
    /// CREATE on the database.
    pub creates_in_database: bool,
}

/// Takes off what a role or a database may have been given for the sake of careless clients. Ours is idle for seconds
/// between two looks, and a walsender's transaction is as long as one of the outbox. By SQL and not at the login: a server
/// that does not know a parameter there refuses.
pub(super) const UNLIMITED: &str = "select pg_catalog.set_config(name, '0', false) from pg_catalog.pg_settings \
    where name in ('idle_session_timeout', 'transaction_timeout')";

/// An SQL connection, and word of its end.
#[derive(Debug)]
pub struct Control {
    client: Client,
    ended: JoinHandle<Result<(), tokio_postgres::Error>>,
    place: Place,
}

impl Drop for Control {
    fn drop(&mut self) {
        self.ended.abort();
    }
}

impl Control {
    /// Connects to the host that `target_session_attrs` asks for; when it says nothing, to the first that is a primary, or
    /// else to the first that answers.
    ///
    /// # Errors
    /// See `hosts::open`.
    pub async fn open(settings: &Settings) -> Result<Self, Error> {
        let (connection, place) = hosts::open(settings).await?;
        // Only what its own part of the login insists on; who we are was settled before.
        let mut config = tokio_postgres::Config::new();
        config.user(&settings.user).dbname(&settings.database).ssl_mode(SslMode::Disable);
        let handing = config.connect_raw(Handover::new(connection), NoTls);
        let late = |_| Error::Timeout { during: "connecting", after: settings.connect_timeout };
        let (client, connection) = timeout(settings.connect_timeout, handing).await.map_err(late)??;
        let control = Self { client, ended: tokio::spawn(connection), place };
        control.all(UNLIMITED, &[]).await?;
        Ok(control)
    }

    /// The place that answered: the stream must come from the same one.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Which server process this is: the cluster's identifier and when its postmaster started.
    ///
    /// # Errors
    /// Of the connection.
    pub async fn server(&self) -> Result<String, Error> {
        Ok(self.one(SERVER, &[]).await?.try_get(0)?)
    }

    /// The client, for more than looking.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Changes something, which may wait for others' transactions as long as they take.
    ///
    /// # Errors
    /// Of the connection, or the server's.
    pub async fn change(&self, sql: &str) -> Result<(), Error> {
        self.client.batch_execute("set lock_timeout = 0; set statement_timeout = 0").await?;
        Ok(self.client.batch_execute(sql).await?)
    }

    /// Resolves when the connection ends, with the reason. A stopping server ends it at once, whatever its walsenders
    /// wait for.
    pub async fn ended(&mut self) -> Error {
        match (&mut self.ended).await {
            Ok(Err(error)) => Error::from(error),
            Ok(Ok(())) => Error::Closed,
            Err(_) => Error::Closed,
        }
    }

    /// Looks at everything a relay depends on.
    ///
    /// # Errors
    /// Of the connection; nothing that is found is an error here.
    pub async fn inspect(&self, names: &Names) -> Result<World, Error> {
        let server = self
            .one(
                "select current_setting('server_version_num')::int, pg_catalog.pg_is_in_recovery(), \
                 current_setting('wal_level'), current_database()::text, current_user::text, \
                 coalesce((select rolreplication or rolsuper from pg_catalog.pg_roles where rolname = session_user), \
                 false) \
                 or exists (select from pg_catalog.pg_roles where rolname = 'rds_replication' \
                 and pg_catalog.pg_has_role(session_user, oid, 'usage')), \
                 current_setting('max_replication_slots')::int, \
                 (select count(*)::int from pg_catalog.pg_replication_slots), \
                 current_setting('idle_replication_slot_timeout', true), session_user::text",
                &[],
            )
            .await?;
        let version = server.try_get(0)?;
        Ok(World {
            version,
            in_recovery: server.try_get(1)?,
            wal_level: server.try_get(2)?,
            database: server.try_get(3)?,
            role: server.try_get(4)?,
            may_replicate: server.try_get(5)?,
            slots_max: count(&server, 6)?,
            slots_used: count(&server, 7)?,
            idle_timeout: server.try_get(8)?,
            login: server.try_get(9)?,
            slot: self.slot(&names.slot).await?,
            // Before the publication: a partition that is made between the two is in it, and not a hole.
            table: self.table(&names.schema, &names.table).await?,
            publication: self.publication(&names.publication, version).await?,
        })
    }

    /// The slot, if there is one, and how far the server is.
    ///
    /// # Errors
    /// Of the connection.
    pub async fn slot(&self, name: &str) -> Result<Option<Slot>, Error> {
        let rows = self
            .all(
                "select plugin::text, database::text, active_pid, confirmed_flush_lsn::text, restart_lsn::text, \
                 wal_status, safe_wal_size, two_phase, temporary, \
                 (case when pg_catalog.pg_is_in_recovery() then pg_catalog.pg_last_wal_replay_lsn() \
                  else pg_catalog.pg_current_wal_flush_lsn() end)::text, \
                 (select extract(epoch from flush_lag)::float8 from pg_catalog.pg_stat_replication \
                  where pid = active_pid), \
                 pg_catalog.to_jsonb(s) ->> 'invalidation_reason', (pg_catalog.to_jsonb(s) ->> 'failover')::bool \
                 from pg_catalog.pg_replication_slots s where slot_name = $1",
                &[&name],
            )
            .await?;
        rows.first().map(slot).transpose()
    }

    /// Whether what this transaction did can be seen by now. One whose commit waits for a synchronous standby is in the log,
    /// and in nobody's sight.
    ///
    /// # Errors
    /// Of the connection.
    pub async fn is_visible(&self, xid: u32) -> Result<bool, Error> {
        // The log has the lower half of a transaction's number; its upper half is that of the next one to come, or one less.
        let sql = "select pg_catalog.pg_visible_in_snapshot((case when near <= next then near else near - 4294967296 \
            end)::text::xid8, now) from (select now, next, next - next % 4294967296 + $1::int8 as near from (select now, \
            pg_catalog.pg_snapshot_xmax(now)::text::int8 + 1000000 as next from pg_catalog.pg_current_snapshot() now) a) b";
        Ok(self.one(sql, &[&i64::from(xid)]).await?.try_get(0)?)
    }

    /// Who streams by this walsender, as far as this role may see.
    ///
    /// # Errors
    /// Of the connection.
    pub async fn holder(&self, pid: i32) -> Result<Option<Holder>, Error> {
        let sql = "select nullif(application_name, ''), pg_catalog.host(client_addr), state \
            from pg_catalog.pg_stat_replication where pid = $1";
        let rows = self.all(sql, &[&pid]).await?;
        let holder = |row: &Row| -> Result<Holder, Error> {
            Ok(Holder { pid, application: row.try_get(0)?, address: row.try_get(1)?, state: row.try_get(2)? })
        };
        rows.first().map(holder).transpose()
    }

    /// What our role may do: a refusal says it in the server's language, and with names that may say anything.
    ///
    /// # Errors
    /// Of the connection.
    pub async fn privileges(&self, schema: &str) -> Result<Privileges, Error> {
        let sql = "select coalesce(pg_catalog.has_schema_privilege(n.oid, 'usage'), true), \
            coalesce(pg_catalog.has_schema_privilege(n.oid, 'create'), true), \
            pg_catalog.has_database_privilege(current_database(), 'create') \
            from (values (1)) one left join pg_catalog.pg_namespace n on n.nspname = $1";
        let row = self.one(sql, &[&schema]).await?;
        Ok(Privileges {
            uses_schema: row.try_get(0)?,
            creates_in_schema: row.try_get(1)?,
            creates_in_database: row.try_get(2)?,
        })
    }

    /// Settings, standbys and prepared transactions, for advice.
    ///
    /// # Errors
    /// Of the connection.
    pub async fn circumstances(&self) -> Result<Circumstances, Error> {
        let known: Vec<&str> = SETTINGS.to_vec();
        let settings = "select name, pg_catalog.current_setting(name), setting from pg_catalog.pg_settings \
            where name = any($1)";
        let setting = |row: &Row| -> Result<Setting, Error> {
            Ok(Setting { name: row.try_get(0)?, shown: row.try_get(1)?, raw: row.try_get(2)? })
        };
        let standbys = "select slot_name::text, active from pg_catalog.pg_replication_slots \
            where slot_type = 'physical' and not temporary order by slot_name";
        let standby = |row: &Row| -> Result<(String, bool), Error> { Ok((row.try_get(0)?, row.try_get(1)?)) };
        let prepared = "select extract(epoch from now() - min(prepared))::float8 from pg_catalog.pg_prepared_xacts";
        Ok(Circumstances {
            settings: self.all(settings, &[&known]).await?.iter().map(setting).collect::<Result<_, _>>()?,
            standbys: self.all(standbys, &[]).await?.iter().map(standby).collect::<Result<_, _>>()?,
            prepared_seconds: self.one(prepared, &[]).await?.try_get(0)?,
        })
    }

    async fn publication(&self, name: &str, version: i32) -> Result<Option<Publication>, Error> {
        let schemas = if version >= VERSION_WITH_FILTERS {
            "exists (select from pg_catalog.pg_publication_namespace where pnpubid = b.oid)"
        } else {
            "false"
        };
        let publications = format!(
            "select pubinsert, pubviaroot, puballtables, pubupdate or pubdelete or pubtruncate, {schemas} \
             from pg_catalog.pg_publication b where pubname = $1"
        );
        let rows = self.all(&publications, &[&name]).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        // PostgreSQL 15 brought publications of whole schemas as well.
        let filters = if version >= VERSION_WITH_FILTERS {
            "p.attnames::text[], p.rowfilter, exists (select from pg_catalog.pg_publication_namespace s \
             join pg_catalog.pg_publication b on b.oid = s.pnpubid where s.pnnspid = n.oid and b.pubname = p.pubname)"
        } else {
            "null, null, false"
        };
        let tables = format!(
            "select c.oid, pg_catalog.format('%I.%I', p.schemaname, p.tablename), {filters} \
             from pg_catalog.pg_publication_tables p join pg_catalog.pg_namespace n on n.nspname = p.schemaname \
             join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = p.tablename where p.pubname = $1"
        );
        let with_filters = version >= VERSION_WITH_FILTERS;
        let published = |row: &Row| -> Result<Published, Error> {
            Ok(Published {
                oid: row.try_get(0)?,
                name: row.try_get(1)?,
                columns: if with_filters { row.try_get(2)? } else { None },
                row_filter: if with_filters { row.try_get(3)? } else { None },
                is_by_schema: row.try_get(4)?,
            })
        };
        let members = "select c.oid, pg_catalog.format('%I.%I', n.nspname, c.relname) \
            from pg_catalog.pg_publication_rel r join pg_catalog.pg_publication b on b.oid = r.prpubid \
            join pg_catalog.pg_class c on c.oid = r.prrelid join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
            where b.pubname = $1 order by c.oid";
        let member = |row: &Row| -> Result<(u32, String), Error> { Ok((row.try_get(0)?, row.try_get(1)?)) };
        Ok(Some(Publication {
            inserts: row.try_get(0)?,
            via_root: row.try_get(1)?,
            all_tables: row.try_get(2)?,
            more_than_inserts: row.try_get(3)?,
            names_schemas: row.try_get(4)?,
            tables: self.all(&tables, &[&name]).await?.iter().map(published).collect::<Result<_, _>>()?,
            members: self.all(members, &[&name]).await?.iter().map(member).collect::<Result<_, _>>()?,
        }))
    }

    async fn table(&self, schema: &str, name: &str) -> Result<Option<Table>, Error> {
        let rows = self
            .all(
                "select c.oid, c.relkind::text, c.relpersistence = 'u', pg_catalog.format('%I.%I', n.nspname, c.relname), \
                 pg_catalog.pg_get_userbyid(c.relowner)::text, \
                 exists (select from pg_catalog.pg_roles where oid = c.relowner and rolsuper) from pg_catalog.pg_class c \
                 join pg_catalog.pg_namespace n on n.oid = c.relnamespace where n.nspname = $1 and c.relname = $2",
                &[&schema, &name],
            )
            .await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let oid: u32 = row.try_get(0)?;
        let columns = self
            .all(
                "select attname::text, atttypid, attgenerated::text from pg_catalog.pg_attribute \
                 where attrelid = $1 and attnum > 0 and not attisdropped order by attnum",
                &[&oid],
            )
            .await?;
        let family = self
            .all(
                "select c.oid, t.isleaf, c.relpersistence = 'u', pg_catalog.format('%I.%I', n.nspname, c.relname), \
                 case when c.relkind = 'f' then pg_catalog.format('%I.%I', m.nspname, p.relname) end \
                 from pg_catalog.pg_partition_tree($1::oid::regclass) t join pg_catalog.pg_class c on c.oid = t.relid \
                 join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
                 join pg_catalog.pg_class p on p.oid = t.parentrelid \
                 join pg_catalog.pg_namespace m on m.oid = p.relnamespace where t.relid <> $1::oid",
                &[&oid],
            )
            .await?;
        let heirs = self
            .all(
                "select pg_catalog.format('%I.%I', n.nspname, c.relname) from pg_catalog.pg_inherits i \
                 join pg_catalog.pg_class c on c.oid = i.inhrelid \
                 join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
                 where i.inhparent = $1 and not c.relispartition order by 1",
                &[&oid],
            )
            .await?;
        let mut table = Table {
            oid,
            owner: row.try_get(4)?,
            is_superusers: row.try_get(5)?,
            kind: row.try_get(1)?,
            columns: columns.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect::<Result<_, Error>>()?,
            generated: generated(&columns)?,
            leaves: Vec::new(),
            family: vec![oid],
            heirs: heirs.iter().map(|row| Ok(row.try_get(0)?)).collect::<Result<_, Error>>()?,
            unlogged: Vec::new(),
            foreign: Vec::new(),
        };
        if table.kind == "r" {
            table.add(row.try_get(0)?, row.try_get(2)?, row.try_get(3)?);
        }
        for row in &family {
            table.family.push(row.try_get(0)?);
            if let Some(parent) = row.try_get(4)? {
                table.foreign.push((row.try_get(3)?, parent));
            } else if row.try_get(1)? {
                table.add(row.try_get(0)?, row.try_get(2)?, row.try_get(3)?);
            }
        }
        Ok(Some(table))
    }

    pub(super) async fn all(
        &self,
        sql: &str,
        parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<Vec<Row>, Error> {
        let late = Error::Timeout { during: "a catalog query", after: QUERY_TIMEOUT };
        Ok(timeout(QUERY_TIMEOUT, self.client.query(sql, parameters)).await.map_err(|_| late)??)
    }

    async fn one(&self, sql: &str, parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)]) -> Result<Row, Error> {
        let none = || Error::Protocol("no row where there is always one".to_owned());
        self.all(sql, parameters).await?.into_iter().next().ok_or_else(none)
    }
}

impl Table {
    /// A table that holds rows.
    fn add(&mut self, oid: u32, is_unlogged: bool, name: String) {
        self.leaves.push(oid);
        if is_unlogged {
            self.unlogged.push(name);
        }
    }
}

/// Those of these columns that are generated, and whether they are stored.
fn generated(columns: &[Row]) -> Result<Vec<(String, bool)>, Error> {
    let mut generated = Vec::new();
    for row in columns {
        match row.try_get(2)? {
            "" => {}
            kind => generated.push((row.try_get(0)?, kind == "s")),
        }
    }
    Ok(generated)
}

fn count(row: &Row, index: usize) -> Result<u32, Error> {
    let count: i32 = row.try_get(index)?;
    Ok(u32::try_from(count).unwrap_or(0))
}

fn slot(row: &Row) -> Result<Slot, Error> {
    let lsn = |index: usize| -> Result<Lsn, Error> {
        let text: Option<String> = row.try_get(index)?;
        Ok(text.and_then(|text| text.parse().ok()).unwrap_or(Lsn::ZERO))
    };
    Ok(Slot {
        plugin: row.try_get(0)?,
        database: row.try_get(1)?,
        active_pid: row.try_get(2)?,
        confirmed: lsn(3)?,
        restart: lsn(4)?,
        wal_status: row.try_get(5)?,
        safe_wal_size: row.try_get(6)?,
        two_phase: row.try_get(7)?,
        temporary: row.try_get(8)?,
        server: lsn(9)?,
        lag_seconds: row.try_get(10)?,
        invalidation_reason: row.try_get(11)?,
        failover: row.try_get(12)?,
    })
}
