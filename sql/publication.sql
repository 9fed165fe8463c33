-- What the slot may stream: inserts into the outbox, partitions under their root's name. Create it before the slot: rows
-- written between the two would not be in the stream.
create publication {publication} for table {table} with (publish = 'insert', publish_via_partition_root = true);
