-- The outbox. The columns are Debezium's, so an existing outbox works unchanged. Rows may be deleted at any time, also in
-- the inserting transaction: the relay reads the write-ahead log, not the table.
create table {table} (
  id            uuid        primary key default gen_random_uuid(),
  aggregatetype text        not null,
  aggregateid   text        not null,
  type          text        not null,
  payload       jsonb,
  headers       jsonb,
  traceparent   text,
  created_at    timestamptz not null default now()
);
-- The application's role writes to it, and cleans up, and needs nothing of pgoutbox:
--   grant usage on schema {schema} to <application>;
--   grant select, insert, delete on {table} to <application>;
