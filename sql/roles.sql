-- As a superuser: a role that sets up and a role that relays, each with what it needs and nothing more. REPLICATION reads
-- every publication of the cluster and can make and drop slots, so pg_hba.conf pins both to this database and to their
-- hosts. Put these lines above any that rejects, and reload: select pg_reload_conf(); (Managed services have a role to
-- grant instead of REPLICATION, such as rds_replication.) Roles are the cluster's: one that is there stays as it is.
--   hostssl  {hba_database}  pgoutbox_setup  10.0.0.0/8  scram-sha-256
--   hostssl  {hba_database}  pgoutbox_relay  10.0.0.0/8  scram-sha-256
do $$ begin create role pgoutbox_setup login replication; exception when duplicate_object then null; end $$;
do $$ begin create role pgoutbox_relay login replication; exception when duplicate_object then null; end $$;
-- \password pgoutbox_setup
-- \password pgoutbox_relay
grant connect, create on database {database} to pgoutbox_setup;
{create_schema}grant usage, create on schema {schema} to pgoutbox_setup;
grant connect on database {database} to pgoutbox_relay;
-- A table that exists already has an owner, and only the owner can publish it. Leave out its statement below, and:
--   grant <owner> to pgoutbox_setup;
-- Where a superuser owns it, let one make the publication instead: who is in a superuser's role can be one.
-- The relay reads no table. For the last rows in `check --deep` it may:
--   grant select on {table} to pgoutbox_relay;
