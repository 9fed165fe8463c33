create type mood as enum ('sad', 'glad')
create table everything (id int primary key, a text, b json, c jsonb, d bytea, e mood, f uuid, g timestamptz, h numeric)
create table "Größe ""q""" (id int primary key, "ü" text)
create table parts (id int, region text) partition by list (region)
create table parts_eu partition of parts for values in ('eu')
create table parts_us partition of parts for values in ('us')
create publication everything for all tables with (publish = 'insert, update, delete, truncate')
select pg_create_logical_replication_slot('golden', 'pgoutput')
insert into everything values (1, 'text', '{"b": 1, "a":  2}', '{"b": 1, "a":  2}', '\x00ff41', 'glad', '00000000-0000-0000-0000-00000000002a', '2026-01-02 03:04:05.678+09', 12.50)
insert into everything (id) values (2)
insert into everything (id, a) values (3, ''), (4, 'zwei Zeilen' || chr(10) || 'ζ 日本 🦀'), (5, repeat('x', 20))
insert into everything (id, a) select n, 'row ' || n from generate_series(10, 12) n
copy everything (id, a) from program 'printf "40\tcopied\n41\tas well\n"'
begin; insert into everything (id) values (20); savepoint s; insert into everything (id) values (21); rollback to s; insert into everything (id) values (22); commit
begin; insert into everything (id) values (23); rollback
update everything set a = 'other' where id = 2
update everything set id = 102 where id = 2
delete from everything where id = 102
alter table everything add column i int default 7
insert into everything (id) values (30)
alter table everything drop column b
insert into everything (id, a) values (31, 'without b')
alter table everything rename column a to z
alter table everything rename to all_things
insert into all_things (id, z) values (32, 'renamed')
insert into "Größe ""q""" values (1, 'ü')
insert into parts values (1, 'eu'), (2, 'us')
alter table parts detach partition parts_us
insert into parts_us values (3, 'us')
select pg_logical_emit_message(true, 'prefix', 'in a transaction')
select pg_logical_emit_message(false, 'prefix', 'outside of any')
truncate all_things, parts
insert into all_things (id) values (99)
