-- The position. From here on Postgres keeps all WAL until the relay has confirmed it: watch pgoutbox_slot_retained_bytes,
-- and set max_slot_wal_keep_size if losing rows is better than a full disk. Waits for transactions that run now.
-- Where the publication could not be made, there is no slot either: an older one would miss rows of the newer publication.
select pg_create_logical_replication_slot({slot_literal}, 'pgoutput')
where exists (select from pg_publication where pubname = {publication_literal});
