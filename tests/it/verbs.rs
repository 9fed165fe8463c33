//! The verbs as an operator types them: what they print, what they change, how they end.
//!
//! The trap: `--print-sql` that nobody ever pastes rots. Here it is pasted, and the relay runs as the role that it makes.

mod setting_up;
mod words;

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Output, Stdio};

use serde_json::Value as Json;

use crate::support::consumer::Consumer;
use crate::support::relay::{Relay, environment, pgoutbox};
use crate::support::{Outbox, TABLE, eventually, shared_postgres, shared_rabbitmq};

const USAGE: i32 = 64;
const WORLD: i32 = 78;
const CANARY: &str = "canary-4711";

async fn outbox() -> Outbox {
    Outbox::create(shared_postgres(), shared_rabbitmq()).await
}

async fn empty() -> Outbox {
    Outbox::empty(shared_postgres(), shared_rabbitmq()).await
}

fn command(outbox: &Outbox, arguments: &[&str]) -> Command {
    let mut command = pgoutbox();
    command.args(arguments).envs(environment(&outbox.url, &outbox.amqp, &outbox.name));
    command
}

/// Exit code, standard output, standard error.
fn told(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

fn verb(outbox: &Outbox, arguments: &[&str]) -> (i32, String, String) {
    told(&command(outbox, arguments).output().unwrap())
}

/// Tables, publications and slots of this database, with what identifies them.
async fn inventory(outbox: &Outbox) -> Option<String> {
    let sql = "select string_agg(thing, ' ' order by thing) from (\
        select slot_name || coalesce(confirmed_flush_lsn::text, '') as thing from pg_replication_slots \
        where database = current_database() \
        union all select 'publication ' || pubname || oid from pg_publication \
        union all select 'table ' || relname || oid from pg_class where relkind in ('r', 'p') and oid > 16384) things";
    outbox.text(sql).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn init_makes_what_is_missing_and_a_second_time_nothing() {
    let outbox = empty().await;
    let (code, out, err) = verb(&outbox, &["init"]);
    assert_eq!(code, 0, "{out}{err}");
    for thing in
        ["table public.outbox created", "publication pgoutbox created", &format!("slot {} created", outbox.name)]
    {
        assert!(out.contains(thing), "{out}");
    }
    let before = inventory(&outbox).await;
    let (code, out, _) = verb(&outbox, &["init"]);
    assert_eq!((code, out.matches("is there").count(), out.matches("created").count()), (0, 3, 0), "{out}");
    assert_eq!(inventory(&outbox).await, before);
    let (publishes, root) = (
        "select pubinsert and not (pubupdate or pubdelete or pubtruncate) from pg_publication",
        "select pubviaroot from pg_publication",
    );
    assert_eq!(outbox.text(publishes).await.as_deref(), Some("t"), "insert only");
    assert_eq!(outbox.text(root).await.as_deref(), Some("t"));
    let consumer = Consumer::start(&outbox).await;
    let relay = Relay::start(&outbox);
    outbox.insert("placed").await;
    consumer.wait_distinct(1).await;
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn init_takes_an_existing_table_as_it_is() {
    let outbox = empty().await;
    outbox.sql(&TABLE.replace("{table}", "public.outbox")).await;
    outbox.insert("older than the slot").await;
    let (code, out, err) = verb(&outbox, &["init"]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("table public.outbox is there") && out.contains("publication pgoutbox created"), "{out}");
    assert_eq!(outbox.text("select count(*) from outbox").await.as_deref(), Some("1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn init_makes_the_table_that_the_settings_ask_for_or_none() {
    let outbox = empty().await;
    let columns = ["--set", "outbox.columns.id=event_id", "--set", "outbox.columns.payload=body"];
    let tenant = ["--set", "rabbitmq.routing_key={tenant}.{id}.{type}"];
    let (code, out, err) = verb(&outbox, &[&["init"][..], &columns, &tenant].concat());
    assert!(code == USAGE && err.contains("rabbitmq.routing_key needs column tenant"), "{out}{err}");
    assert_eq!(inventory(&outbox).await, None, "nothing was made");
    let (code, printed, _) = verb(&outbox, &[&["init", "--print-sql"][..], &columns, &tenant].concat());
    assert!(code == 0 && printed.contains("-- Not enough: rabbitmq.routing_key needs column tenant."), "{printed}");
    // What a column is for may stand there as well.
    let by_role = ["--set", "rabbitmq.routing_key={id}.{event_id}.{created_at}"];
    let (code, out, err) = verb(&outbox, &[&["init"][..], &columns, &by_role].concat());
    assert!(code == 0 && out.contains("ready"), "{out}{err}");
    let names = "select string_agg(attname, ' ' order by attnum) from pg_attribute \
        where attrelid = 'outbox'::regclass and attnum > 0";
    let made = "event_id aggregatetype aggregateid type body headers traceparent created_at";
    assert_eq!(outbox.text(names).await.as_deref(), Some(made));
    // A table that is there is looked at, and not made.
    let (code, _, err) = verb(&outbox, &[&["init"][..], &columns, &tenant].concat());
    assert!(code == WORLD && err.contains("column tenant of rabbitmq.routing_key is missing"), "{err}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_printed_sql_touches_nothing_and_makes_all_that_the_relay_needs_when_pasted() {
    let mut outbox = empty().await;
    let before = inventory(&outbox).await;
    let (code, sql, err) = verb(&outbox, &["init", "--print-sql"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(inventory(&outbox).await, before);
    assert_eq!(verb(&outbox, &["check"]).0, WORLD);
    // Roles belong to the cluster, which other tests share: this one is made once.
    outbox.sql(&sql).await;
    let (code, out, err) = verb(&outbox, &["check"]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(!out.contains("WRONG"), "{out}");
    let privileges = "select rolsuper or rolcreatedb or rolcreaterole or rolbypassrls or not rolreplication \
        or has_table_privilege(rolname, 'outbox', 'select') from pg_roles where rolname = 'pgoutbox_relay'";
    assert_eq!(outbox.text(privileges).await.as_deref(), Some("f"), "login and replication, and nothing more");
    let consumer = Consumer::start(&outbox).await;
    outbox.url = shared_postgres().url_for("pgoutbox_relay", None, &outbox.name);
    assert_eq!(verb(&outbox, &["check"]).0, 0);
    let relay = Relay::start(&outbox);
    outbox.insert("placed").await;
    consumer.wait_distinct(1).await;
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_says_every_fault_at_once_as_text_and_as_json() {
    let outbox = empty().await;
    let before = inventory(&outbox).await;
    let (code, out, _) = verb(&outbox, &["check"]);
    assert_eq!(code, WORLD, "{out}");
    for problem in ["slot", "publication", "table"] {
        assert!(out.lines().any(|line| line.starts_with("WRONG") && line.contains(problem)), "{problem} in\n{out}");
    }
    assert_eq!(out.matches("\n       shell: pgoutbox init\n").count(), out.matches("WRONG").count(), "{out}");
    let (code, out, _) = verb(&outbox, &["check", "--json"]);
    assert_eq!(code, WORLD);
    let lines: Json = serde_json::from_str(&out).unwrap();
    let wrong = |line: &&Json| line["ok"] == false && line["problem"].is_string() && line["remedy"].is_string();
    assert_eq!(lines.as_array().unwrap().iter().filter(wrong).count(), 3, "{out}");
    assert_eq!(inventory(&outbox).await, before);
    assert_eq!(verb(&outbox, &["init"]).0, 0);
    let (code, out, _) = verb(&outbox, &["check", "--json"]);
    let lines: Json = serde_json::from_str(&out).unwrap();
    assert!(code == 0 && lines.as_array().unwrap().iter().all(|line| line["ok"] == true), "{out}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_looks_at_the_broker_and_declares_nothing_there() {
    let mut outbox = outbox().await;
    let strict = ["check", "--set", "rabbitmq.declare=false"];
    let (code, out, _) = verb(&outbox, &strict);
    assert!(code == WORLD && out.contains(&format!("exchange {} does not exist", outbox.name)), "{out}");
    assert_eq!(verb(&outbox, &["check"]).0, 0, "`run` would declare it");
    assert_eq!(verb(&outbox, &strict).0, WORLD, "`check` did not");
    outbox.amqp = "amqp://guest:guest@127.0.0.1:1/%2f".to_owned();
    let (code, out, _) = verb(&outbox, &["check"]);
    assert!(code == WORLD && out.contains("WRONG  RabbitMQ at 127.0.0.1:1"), "{out}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_tells_where_the_slot_stands_and_who_holds_it() {
    let outbox = outbox().await;
    outbox.insert("placed").await;
    let (code, out, _) = verb(&outbox, &["status", "--json"]);
    let status: Json = serde_json::from_str(&out).unwrap();
    assert_eq!((code, status["slot"].as_str()), (0, Some(outbox.name.as_str())));
    assert_eq!(status["confirmed_lsn"], outbox.confirmed().await.to_string());
    assert!(status["lag_bytes"].as_u64().unwrap() > 0 && status["retained_bytes"].as_u64().unwrap() > 0, "{out}");
    assert_eq!((&status["wal_status"], &status["held_by_pid"]), (&Json::from("reserved"), &Json::Null));
    assert_eq!(status["lag_seconds"], Json::Null, "nobody streams, so nobody knows");
    let _consumer = Consumer::start(&outbox).await;
    let relay = Relay::start(&outbox);
    relay.ready().await;
    eventually("lag is known in seconds", || async {
        let status: Json = serde_json::from_str(&verb(&outbox, &["status", "--json"]).1).unwrap();
        status["held_by_pid"].is_i64() && status["lag_seconds"].as_f64().is_some_and(|seconds| seconds >= 0.0)
    })
    .await;
    let probe = format!("http.listen=127.0.0.1:{}", relay.port());
    let (code, out, _) = verb(&outbox, &["status", "--set", &probe]);
    assert!(code == 0 && out.contains("wal_status") && out.contains("reserved"), "{out}");
    for part in ["pgoutbox from 127.0.0.1, streaming", "problems     none", ": ready\n"] {
        assert!(out.contains(part), "{part:?} is not in\n{out}");
    }
    assert_eq!(relay.stop(), 0);
    outbox.sql(&format!("select pg_drop_replication_slot('{}')", outbox.name)).await;
    // What `check` says of a slot that is gone, and nothing to parse is missing.
    let (code, out, err) = verb(&outbox, &["status"]);
    assert!(
        code == WORLD && err.contains("does not exist") && out.contains("rows committed since it went"),
        "{out}{err}"
    );
    let (code, out, _) = verb(&outbox, &["status", "--json"]);
    let status: Json = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &status["slot"], &status["confirmed_lsn"]), (WORLD, &outbox.name.as_str().into(), &Json::Null));
    let problem = status["problems"][0].as_str().unwrap();
    assert!(problem.contains("does not exist in this cluster") && problem.contains("reconcile"), "{out}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tail_prints_committed_rows_without_any_slot_of_the_relay_and_moves_nobodys() {
    let outbox = outbox().await;
    let mut other = Outbox { name: format!("{}_none", outbox.name), ..empty().await };
    other.url.clone_from(&outbox.url);
    other.amqp = String::new();
    let before = outbox.confirmed().await;
    let mut tail = command(&other, &["tail"]);
    let mut tail = tail.env_remove("AMQP_URL").stdout(Stdio::piped()).spawn().unwrap();
    let slots =
        "select count(*) from pg_replication_slots where temporary and active and database = current_database()";
    tail_streams(&outbox).await;
    outbox
        .sql("begin; insert into outbox (aggregatetype, aggregateid, type) values ('x', '1', 'undone'); rollback")
        .await;
    let id = outbox.insert("placed").await;
    let mut line = String::new();
    BufReader::new(tail.stdout.take().unwrap()).read_line(&mut line).unwrap();
    tail.kill().unwrap();
    tail.wait().unwrap();
    let message: Json = serde_json::from_str(&line).unwrap();
    assert_eq!((message["id"].as_str(), message["destination"].as_str()), (Some(id.as_str()), Some("order.placed")));
    assert_eq!(message["payload"], serde_json::json!({"a": 1}));
    assert_eq!(outbox.confirmed().await, before);
    eventually("its slot goes with it", || async { outbox.text(slots).await.as_deref() == Some("0") }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tail_says_what_is_wrong_but_not_that_a_slot_is_missing() {
    let outbox = empty().await;
    let (code, _, err) = verb(&outbox, &["tail"]);
    for problem in ["table public.outbox does not exist", "publication pgoutbox does not exist"] {
        assert!(code == WORLD && err.contains(problem), "{err}");
    }
    assert!(!err.contains("replication slot"), "{err}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tail_prints_only_the_rows_that_are_asked_for() {
    let outbox = outbox().await;
    let mut tail = command(&outbox, &["tail", "--type", "placed", "--type", "paid", "--aggregate", "order:1"]);
    let mut tail = tail.stdout(Stdio::piped()).spawn().unwrap();
    tail_streams(&outbox).await;
    outbox.insert("cancelled").await;
    outbox.sql("insert into outbox (aggregatetype, aggregateid, type) values ('order', '2', 'placed')").await;
    outbox.sql("insert into outbox (aggregatetype, aggregateid, type) values ('user', '1', 'placed')").await;
    let id = outbox.insert("paid").await;
    let mut line = String::new();
    BufReader::new(tail.stdout.take().unwrap()).read_line(&mut line).unwrap();
    tail.kill().unwrap();
    tail.wait().unwrap();
    assert!(line.contains(&id), "{line}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tail_goes_on_past_tables_that_are_younger_than_it_or_gone() {
    let outbox = outbox().await;
    outbox.sql("drop publication pgoutbox; create publication pgoutbox for all tables with (publish = 'insert')").await;
    let mut tail = command(&outbox, &["tail"]);
    let mut tail = tail.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    tail_streams(&outbox).await;
    outbox.sql("create table younger (id int); insert into younger values (1)").await;
    outbox.sql("begin; create table gone (id int); insert into gone values (1), (2); drop table gone; commit").await;
    let id = outbox.insert("placed").await;
    let mut line = String::new();
    BufReader::new(tail.stdout.take().unwrap()).read_line(&mut line).unwrap();
    tail.kill().unwrap();
    let err = String::from_utf8(tail.wait_with_output().unwrap().stderr).unwrap();
    assert!(line.contains(&id), "{line}{err}");
    assert_eq!(err.matches("rows of table public.gone").count(), 1, "{err}");
    assert!(!err.contains("public.younger") && !err.contains("drop the slot"), "{err}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tail_before_a_pager_that_waits_for_its_reader_is_not_taken_for_dead() {
    const ROWS: usize = 5000;
    let outbox = outbox().await;
    let alter = "execute format('alter database %I set wal_sender_timeout = 2000', current_database())";
    outbox.sql(&format!("do $$ begin {alter}; end $$")).await;
    let mut tail = command(&outbox, &["tail"]);
    let mut tail = tail.stdout(Stdio::piped()).spawn().unwrap();
    tail_streams(&outbox).await;
    let rows = "insert into outbox (aggregatetype, aggregateid, type, payload) \
        select 'order', n::text, 'placed', to_jsonb(repeat('x', 2000)) from generate_series(1, 5000) n";
    outbox.sql(rows).await;
    let began = outbox.text("select now()::text").await.unwrap();
    let answers = format!(
        "select count(*) from pg_stat_replication join pg_replication_slots on pid = active_pid \
         where temporary and database = current_database() and reply_time > '{began}'::timestamptz + interval '5 s'"
    );
    eventually("it answers, read or not", || async { outbox.text(&answers).await.as_deref() == Some("1") }).await;
    let lines = BufReader::new(tail.stdout.take().unwrap()).lines().take(ROWS);
    assert!(lines.last().unwrap().unwrap().contains("\"aggregateid\":\"5000\""));
    tail.kill().unwrap();
    tail.wait().unwrap();
}

/// A slot is there before it is of use: a row that is committed then is not in its stream.
async fn tail_streams(outbox: &Outbox) {
    let slots = "select count(*) from pg_replication_slots where temporary and active \
        and confirmed_flush_lsn is not null and database = current_database()";
    eventually("tail has a slot of its own", || async { outbox.text(slots).await.as_deref() == Some("1") }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_tells_what_is_wrong_and_how_the_relay_is() {
    let outbox = outbox().await;
    outbox.sql("alter publication pgoutbox drop table outbox").await;
    let status = |more: &[&str]| {
        let (code, out, err) = verb(&outbox, &[&["status", "--json"], more].concat());
        assert_eq!(code, 0, "{err}");
        serde_json::from_str::<Json>(&out).unwrap()
    };
    let told = status(&["--set", "http.listen="]);
    let problem = told["problems"][0].as_str().unwrap();
    assert!(problem.contains("does not cover table public.outbox. Remedy: ALTER PUBLICATION"), "{told}");
    assert_eq!((&told["relay"], &told["publication"]), (&Json::Null, &Json::from("pgoutbox")));
    outbox.sql("alter publication pgoutbox add table outbox").await;
    let silent = status(&["--set", "http.listen=127.0.0.1:1"]);
    assert!(silent["problems"].as_array().unwrap().is_empty() && silent["relay"]["answers"] == false, "{silent}");
    // A relay that waits for its broker says so.
    let relay = Relay::start_at(&outbox.url, "amqp://guest:guest@127.0.0.1:1/%2f", &outbox.name, &[]);
    let probe = format!("http.listen=0.0.0.0:{}", relay.port());
    eventually("it says why it is not ready", || async {
        let told = status(&["--set", &probe]);
        told["relay"]["ready"] == false && told["relay"]["reasons"].to_string().contains("127.0.0.1:1")
    })
    .await;
    relay.kill();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_is_watched_line_by_line_until_nobody_reads() {
    let outbox = outbox().await;
    let mut watch = command(&outbox, &["status", "--json", "--watch", "1"]);
    let mut watch = watch.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let mut next = || serde_json::from_str::<Json>(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(next()["slot"], outbox.name);
    outbox.sql(&format!("select pg_drop_replication_slot('{}')", outbox.name)).await;
    outbox.create_slot().await;
    let confirmed = outbox.confirmed().await.to_string();
    while next()["confirmed_lsn"] != confirmed.as_str() {}
    drop(lines);
    assert!(watch.wait().unwrap().success(), "its reader went, and it with it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drop_leaves_a_slot_that_is_not_its_own() {
    let (ours, theirs) = (outbox().await, outbox().await);
    let drop_theirs = || {
        told(&command(&ours, &["drop", "--yes", "--set", &format!("postgres.slot={}", theirs.name)]).output().unwrap())
    };
    let (code, _, err) = drop_theirs();
    assert!(code == WORLD && err.contains(&format!("belongs to database {}", theirs.name)), "{err}");
    // Whose it is comes before who holds it: stopping somebody else's relay would help nobody.
    let relay = Relay::start(&theirs);
    relay.ready().await;
    let (code, _, err) = drop_theirs();
    assert!(code == WORLD && err.contains("belongs to database") && !err.contains("stop the relay"), "{err}");
    assert_eq!(relay.stop(), 0);
    theirs.sql(&format!("select pg_drop_replication_slot('{}')", theirs.name)).await;
    for (make, whose) in [
        ("pg_create_physical_replication_slot('{}')", "is physical"),
        ("pg_create_logical_replication_slot('{}', 'test_decoding')", "uses the plugin test_decoding"),
    ] {
        theirs.sql(&format!("select {}", make.replace("{}", &theirs.name))).await;
        let (code, _, err) = drop_theirs();
        assert!(code == WORLD && err.contains(whose), "{err}");
        theirs.sql(&format!("select pg_drop_replication_slot('{}')", theirs.name)).await;
    }
    let publications = "select count(*)::text from pg_publication";
    assert_eq!(ours.text(publications).await.as_deref(), Some("1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drop_asks_first_and_removes_slot_and_publication_but_never_the_table() {
    let outbox = outbox().await;
    outbox.insert("placed").await;
    let before = inventory(&outbox).await;
    let answered = |mut drop: Command, answer: &str| {
        let drop = drop.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut drop = drop.spawn().unwrap();
        drop.stdin.take().unwrap().write_all(answer.as_bytes()).unwrap();
        told(&drop.wait_with_output().unwrap())
    };
    // Who is no terminal cannot be asked, whatever it says.
    for answer in ["n\n", "", "y\n"] {
        let (code, out, err) = answered(command(&outbox, &["drop"]), answer);
        assert!(code == USAGE && err.contains("--yes") && !err.contains("configuration"), "{err}");
        assert!(out.contains("will never be published; 1 wait there"), "{out}");
        assert_eq!(inventory(&outbox).await, before);
    }
    // `script` gives it a terminal.
    let with_terminal = || {
        let mut script = Command::new("script");
        script.args(["-qec", &format!("{} drop", env!("CARGO_BIN_EXE_pgoutbox")), "/dev/null"]);
        script.envs(environment(&outbox.url, &outbox.amqp, &outbox.name));
        script
    };
    for answer in ["n\n", "perhaps\n"] {
        let (code, out, _) = answered(with_terminal(), answer);
        assert!(code == 0 && out.contains("drop them?") && out.contains("nothing changed"), "{out}");
        assert_eq!(inventory(&outbox).await, before);
    }
    let _consumer = Consumer::start(&outbox).await;
    let relay = Relay::start(&outbox);
    relay.ready().await;
    let (code, _, err) = verb(&outbox, &["drop", "--yes"]);
    assert!(code == WORLD && err.contains("in use"), "{err}");
    relay.ready().await;
    assert_eq!(relay.stop(), 0);
    let (code, out, _) = verb(&outbox, &["drop", "--yes"]);
    assert!(code == 0 && out.contains(&format!("slot {} dropped", outbox.name)), "{out}");
    assert_eq!(outbox.text("select count(*) from outbox").await.as_deref(), Some("1"));
    let left = inventory(&outbox).await.unwrap();
    assert!(left.starts_with("table outbox") && !left.contains("publication"), "{left}");
    let (code, out, _) = verb(&outbox, &["drop"]);
    assert!(code == 0 && out.contains("nothing to drop"), "nothing left is fine: {out}");
    outbox.sql("create publication pgoutbox for table outbox with (publish = 'insert')").await;
    outbox.create_slot().await;
    let (code, out, _) = answered(with_terminal(), "y\n");
    assert!(code == 0 && out.contains("none waits there") && out.contains("publication pgoutbox dropped"), "{out}");
    assert_eq!(inventory(&outbox).await.unwrap(), left);
}

#[test]
fn usage_errors_are_64_and_help_is_0() {
    for arguments in [&["nonsense"][..], &["run", "--nonsense"], &[], &["run", "--set", "no-equals-sign"]] {
        let (code, ..) = told(&pgoutbox().args(arguments).output().unwrap());
        assert_eq!(code, USAGE, "{arguments:?}");
    }
    for arguments in [&["--help"][..], &["--version"], &["run", "--help"]] {
        let (code, out, _) = told(&pgoutbox().args(arguments).output().unwrap());
        assert!(code == 0 && !out.is_empty(), "{arguments:?}");
    }
}

#[test]
fn all_faults_of_the_settings_are_told_at_once_with_full_names_and_without_secrets() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    write!(
        file,
        "[rabbitmq]\nurl = \"http://guest:{CANARY}@h\"\nwindow_mesages = 5\nwindow_bytes = \"8 parsecs\"\n\
         [run]\ngive_up_after = \"soon\"\n[http]\nlisten = \"${{NOT_SET}}\"\n"
    )
    .unwrap();
    let mut run = pgoutbox();
    run.args(["run", "--config", file.path().to_str().unwrap(), "--set", "postgres.slot=Not A Slot"]);
    run.env("DATABASE_URL", format!("postgres://u:{CANARY}@h:port/d")).env("PGOUTBOX__OUTBOX__TABEL", "x");
    let (code, out, err) = told(&run.output().unwrap());
    assert_eq!(code, USAGE, "{err}");
    for fault in [
        "postgres.url: ",
        "postgres.slot: ",
        "rabbitmq.url: ",
        "rabbitmq.window_mesages: unknown key",
        "did you mean rabbitmq.window_messages?",
        "rabbitmq.window_bytes: ",
        "run.give_up_after: ",
        "http.listen: environment variable NOT_SET is not set",
        "outbox.tabel: unknown key",
        "did you mean outbox.table?",
    ] {
        assert!(err.contains(fault), "{fault:?} is not in\n{err}");
    }
    assert!(!(out + &err).contains(CANARY));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_printed_settings_hide_secrets_and_need_no_network() {
    let secret = format!("postgres://u:{CANARY}@nowhere.invalid/d");
    let mut run = pgoutbox();
    run.args(["run", "--print-config", "--set", "rabbitmq.exchange=events", "--give-up-after", "10min"]);
    run.env("DATABASE_URL", secret).env("AMQP_URL", format!("amqp://u:{CANARY}@nowhere.invalid"));
    run.env("PGOUTBOX__RABBITMQ__EXCHANGE", "overridden").env("PGOUTBOX__OUTBOX__TABLE", "shop.events");
    let (code, out, err) = told(&run.output().unwrap());
    assert_eq!(code, 0, "{err}");
    let printed: toml::Table = out.parse().unwrap();
    assert_eq!(printed["rabbitmq"]["exchange"].as_str(), Some("events"), "a flag comes before the environment");
    assert_eq!(printed["outbox"]["table"].as_str(), Some("shop.events"));
    assert_eq!(printed["run"]["give_up_after"].as_str(), Some("10min"));
    assert_eq!(printed["postgres"]["url"].as_str(), Some("***"));
    assert_eq!(printed["rabbitmq"]["url"].as_str(), Some("***"));
    assert!(!(out + &err).contains(CANARY));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_verb_tells_a_secret_whatever_goes_wrong() {
    let mut outbox = outbox().await;
    outbox.url = shared_postgres().url_for("nobody", Some(CANARY), &outbox.name);
    outbox.amqp = outbox.amqp.replace("guest:guest", &format!("nobody:{CANARY}"));
    let mut told = String::new();
    for arguments in [&["init"][..], &["check"], &["check", "--json"], &["status"], &["tail"], &["drop", "--yes"]] {
        let (code, out, err) = verb(&outbox, &[arguments, &["--log-level", "trace"]].concat());
        assert_ne!(code, 0, "{arguments:?}");
        told = told + &out + &err;
    }
    let relay = Relay::start_with(&outbox, &[("run.give_up_after", "1s")]);
    let (code, log) = relay.ended();
    assert_eq!(code, 69, "{log}");
    told += &log;
    assert!(told.contains("nobody") && !told.contains(CANARY), "{told}");
}
