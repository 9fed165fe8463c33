//! Postgres, as far as nobody needs to restart it: slot, publication, table, columns, role, `pg_hba.conf`, limits.

use std::sync::OnceLock;

use pgoutbox::servers::Postgres;

use super::Break::{Elsewhere, Hba, Setting, Sql};
use super::Run::{Stops, Waits};
use super::{Case, Surroundings};
use crate::support::shared_rabbitmq;

/// One for all cases: each has a database and a role of its own.
fn server() -> &'static Postgres {
    static SERVER: OnceLock<Postgres> = OnceLock::new();
    SERVER.get_or_init(|| {
        Postgres::start(&[("max_connections", "200"), ("max_replication_slots", "100"), ("max_wal_senders", "50")])
            .unwrap()
    })
}

/// A test for each, named by what it says.
macro_rules! cases {
    ($($name:ident: $breaks:expr, $says:expr, $run:ident, $step:expr;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let case = Case { breaks: &$breaks, says: $says, run: $run, step: $step };
                case.is_found_and_mended(Surroundings::of(server(), shared_rabbitmq()).await).await;
            }
        )*

        #[test]
        fn there_are_many_ways() {
            assert!([$(stringify!($name)),*].len() >= 25);
        }
    };
}

cases! {
    a_slot_that_is_missing_is_made:
        [Sql("select pg_drop_replication_slot('{name}')")],
        "replication slot {name} does not exist", Stops, "pgoutbox init";

    a_physical_slot_is_left_to_its_owner:
        [Sql("select pg_drop_replication_slot('{name}')"), Sql("select pg_create_physical_replication_slot('{name}')")],
        "replication slot {name} is physical", Stops, "postgres.slot={name}_outbox";

    a_slot_of_another_plugin_is_left_to_its_owner:
        [
            Sql("select pg_drop_replication_slot('{name}')"),
            Sql("select pg_create_logical_replication_slot('{name}', 'test_decoding')"),
        ],
        "uses the plugin test_decoding", Stops, "pgoutbox init --set postgres.slot={name}_outbox";

    a_slot_of_another_database_is_left_to_its_owner:
        [
            Sql("select pg_drop_replication_slot('{name}')"),
            Elsewhere("select pg_create_logical_replication_slot('{name}', 'pgoutput')"),
        ],
        "belongs to database postgres, not to {name}", Stops, "postgres.slot={name}_outbox";

    a_slot_that_sends_prepared_transactions_is_made_again:
        [
            Sql("select pg_drop_replication_slot('{name}')"),
            Sql("select pg_create_logical_replication_slot('{name}', 'pgoutput', false, true)"),
        ],
        "sends transactions at PREPARE", Stops, "SELECT pg_drop_replication_slot('{name}');";

    a_temporary_slot_goes_with_its_session:
        [
            Sql("select pg_drop_replication_slot('{name}')"),
            Sql("select pg_create_logical_replication_slot('{name}', 'pgoutput', true)"),
        ],
        "replication slot {name} is temporary", Stops, "pgoutbox init";

    a_publication_that_is_missing_is_made:
        [Sql("drop publication pgoutbox")],
        "publication pgoutbox does not exist in database {name}", Stops, "pgoutbox init";

    a_publication_without_the_table_is_given_it:
        [Sql("alter publication pgoutbox drop table outbox")],
        "does not cover table public.outbox", Stops, "ALTER PUBLICATION pgoutbox ADD TABLE public.outbox;";

    a_publication_of_updates_and_deletes_is_made_one_of_inserts:
        [Sql("alter publication pgoutbox set (publish = 'update, delete')")],
        "does not publish inserts", Stops, "ALTER PUBLICATION pgoutbox SET (publish = 'insert');";

    a_row_filter_is_taken_off:
        [Sql("alter publication pgoutbox set table outbox where (type <> 'secret')")],
        "hides rows of public.outbox by a row filter", Stops, "ALTER PUBLICATION pgoutbox SET TABLE public.outbox;";

    a_row_filter_is_taken_off_and_other_tables_stay:
        [
            Sql("create table other (id int primary key)"),
            Sql("alter publication pgoutbox set table outbox where (type <> 'secret'), other"),
        ],
        "hides rows of public.outbox by a row filter", Stops,
        "BEGIN; ALTER PUBLICATION pgoutbox DROP TABLE public.outbox; ALTER PUBLICATION pgoutbox ADD TABLE public.outbox; \
         COMMIT;";

    a_column_list_without_the_payload_is_taken_off:
        [Sql("alter publication pgoutbox set table outbox (id, aggregatetype, aggregateid, type)")],
        "leaves out columns of public.outbox: column payload is missing", Stops, "ALTER PUBLICATION pgoutbox SET TABLE public.outbox;";

    a_publication_of_one_partition_is_given_the_table:
        [
            Sql("drop publication pgoutbox; drop table outbox"),
            Sql("create table outbox (id int, aggregatetype text, aggregateid text, type text, payload jsonb) \
                 partition by list (id)"),
            Sql("create table outbox_1 partition of outbox for values in (1)"),
            Sql("create table outbox_2 partition of outbox default"),
            Sql("create publication pgoutbox for table outbox_1 with (publish = 'insert')"),
        ],
        "does not cover table public.outbox", Stops, "ALTER PUBLICATION pgoutbox SET TABLE public.outbox;";

    partitions_that_stay_published_when_detached_are_published_as_their_root:
        [
            Sql("drop publication pgoutbox; drop table outbox"),
            Sql("create table outbox (id int, aggregatetype text, aggregateid text, type text, payload jsonb) \
                 partition by list (id)"),
            Sql("create table outbox_1 partition of outbox default"),
            Sql("create publication pgoutbox for all tables with (publish = 'insert')"),
        ],
        "as tables of their own", Stops, "ALTER PUBLICATION pgoutbox SET (publish_via_partition_root = true);";

    a_table_that_inherits_is_set_apart:
        [Sql("create table archive () inherits (outbox)")],
        "table public.archive inherits from public.outbox", Stops, "ALTER TABLE public.archive NO INHERIT public.outbox;";

    a_table_that_is_missing_is_made_and_published:
        [Sql("drop table outbox")],
        "table public.outbox does not exist", Stops, "ALTER PUBLICATION pgoutbox ADD TABLE public.outbox;";

    a_table_that_was_renamed_is_found_again:
        [Sql("alter table outbox rename to \"Events\"")],
        "table public.outbox does not exist", Stops, "outbox.table=public.\"Events\"";

    a_view_of_the_table_is_told_from_the_table:
        [Sql("alter table outbox rename to events; create view outbox as select * from events")],
        "public.outbox is a view, not a table", Stops, "outbox.table=public.events";

    an_unlogged_table_is_logged:
        [
            Sql("drop publication pgoutbox; create publication pgoutbox for all tables with (publish = 'insert')"),
            Sql("alter table outbox set unlogged"),
        ],
        "public.outbox is unlogged", Stops, "ALTER TABLE public.outbox SET LOGGED;";

    an_unlogged_partition_is_logged:
        [
            Sql("drop publication pgoutbox; drop table outbox"),
            Sql("create table outbox (id int, aggregatetype text, aggregateid text, type text, payload jsonb) \
                 partition by list (id)"),
            Sql("create table outbox_1 partition of outbox for values in (1)"),
            Sql("create unlogged table outbox_2 partition of outbox default"),
            Sql("create publication pgoutbox for all tables with (publish = 'insert', publish_via_partition_root)"),
        ],
        "public.outbox_2 is unlogged", Stops, "ALTER TABLE public.outbox_2 SET LOGGED;";

    a_foreign_partition_is_detached:
        [
            Sql("drop publication pgoutbox; drop table outbox"),
            Sql("create table outbox (id int, aggregatetype text, aggregateid text, type text, payload jsonb) \
                 partition by list (id)"),
            Sql("create table outbox_1 partition of outbox for values in (1)"),
            Sql("create table \"Far\" partition of outbox default partition by list (aggregateid)"),
            Sql("create foreign data wrapper nowhere; create server nowhere foreign data wrapper nowhere"),
            Sql("create foreign table outbox_2 partition of \"Far\" default server nowhere"),
            Sql("create publication pgoutbox for all tables with (publish = 'insert')"),
            Sql("alter publication pgoutbox set (publish_via_partition_root = true)"),
        ],
        "partition public.outbox_2 of public.outbox is a foreign table", Stops,
        "ALTER TABLE public.\"Far\" DETACH PARTITION public.outbox_2;";

    a_column_that_is_missing_is_added:
        [Sql("alter table outbox drop column aggregateid")],
        "column aggregateid or aggregate_id is missing", Stops,
        "ALTER TABLE public.outbox ADD COLUMN aggregateid text;";

    a_payload_of_an_impossible_type_is_altered:
        [Sql("alter table outbox drop column payload, add column payload int")],
        "column payload must be json, jsonb, text or bytea", Stops,
        "ALTER TABLE public.outbox ALTER COLUMN payload TYPE text USING payload::text;";

    a_setting_that_names_a_missing_column_is_set_to_the_usual_one:
        [Setting("outbox.columns.payload", "body")],
        "column body is missing", Stops, "outbox.columns.payload=payload";

    a_routing_key_of_a_missing_column_is_set_to_the_usual_one:
        [Setting("rabbitmq.routing_key", "{tenant}.{type}")],
        "column tenant of rabbitmq.routing_key is missing", Stops, "rabbitmq.routing_key={aggregatetype}.{type}";

    a_role_that_may_not_replicate_is_allowed_to:
        [Sql("alter role {role} noreplication")],
        "role {role} may not replicate", Stops, "ALTER ROLE {role} REPLICATION;";

    a_role_that_may_not_log_in_is_allowed_to:
        [Sql("alter role {role} nologin")],
        "role \"{role}\" is not permitted to log in", Waits, "ALTER ROLE {role} LOGIN;";

    a_role_that_does_not_exist_is_made:
        [Sql("drop role {role}")],
        "role \"{role}\" does not exist", Waits, "CREATE ROLE {role} LOGIN REPLICATION;";

    a_role_that_may_not_connect_is_allowed_to:
        [Sql("revoke connect on database {name} from public")],
        "permission denied for database \"{name}\"", Stops, "GRANT CONNECT ON DATABASE {name} TO {role};";

    a_wrong_password_is_set_anew:
        [Hba("host {name} {role} 127.0.0.1/32 scram-sha-256"), Sql("alter role {role} password 'another'")],
        "password authentication failed for user \"{role}\"", Waits, "\\password {role}";

    a_line_that_is_missing_in_pg_hba_is_put_there:
        [Hba("host {name} {role} 127.0.0.1/32 reject")],
        "pg_hba.conf rejects connection for host \"127.0.0.1\", user \"{role}\", database \"{name}\"", Waits,
        "host {name} {role} 127.0.0.1/32 scram-sha-256";

    a_limit_of_the_roles_connections_is_lifted:
        [Sql("alter role {role} connection limit 0")],
        "too many connections for role \"{role}\"", Waits, "ALTER ROLE {role} CONNECTION LIMIT -1;";

    a_limit_of_the_databases_connections_is_lifted:
        [Sql("alter database {name} connection limit 1")],
        "too many connections for database \"{name}\"", Waits, "ALTER DATABASE {name} CONNECTION LIMIT -1;";

    a_database_that_takes_no_connections_is_opened:
        [Elsewhere("alter database {name} allow_connections false")],
        "database \"{name}\" is not currently accepting connections", Waits,
        "ALTER DATABASE {name} ALLOW_CONNECTIONS true;";
}
