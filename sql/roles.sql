-- The role that `pgoutbox run` needs, and nothing more. REPLICATION reads every publication of the cluster, so pin the
-- role in pg_hba.conf to its database and hosts, for example:
--   hostssl  {database_bare}  pgoutbox_relay  10.0.0.0/8  scram-sha-256
create role pgoutbox_relay login replication;
-- \password pgoutbox_relay
grant connect on database {database} to pgoutbox_relay;

-- The application's role needs INSERT (and DELETE, to clean up) and nothing of pgoutbox:
--   grant insert, delete on {table} to <application>;
