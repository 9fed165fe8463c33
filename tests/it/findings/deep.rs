//! `check --deep`: what it proves, what it advises, and that it leaves everything as it was.
//!
//! The trap: a probe that publishes "only a test message" is a message. So the queues are looked at afterwards.

use lapin::options::BasicGetOptions;
use pgoutbox::servers::{Extras, Port, Postgres, RabbitMq};
use serde_json::Value as Json;

use super::Run::Stops;
use super::{PASSWORD, Surroundings, WORLD};
use crate::support::consumer::{bind, channel};
use crate::support::{TABLE, eventually, postgres_18, shared_postgres, shared_postgres_18, shared_rabbitmq};

const DEEP: &[&str] = &["--deep"];

async fn surroundings() -> Surroundings<'static> {
    Surroundings::of(shared_postgres(), shared_rabbitmq()).await
}

/// In words, of those in this state.
fn told(looks: &[Json], state: &str) -> Vec<String> {
    let of_state = looks.iter().filter(|look| look["state"] == state);
    of_state.map(|look| format!("{}: {}", look["what"], look["problem"]).replace('"', "")).collect()
}

fn tells(looks: &[Json], state: &str, text: &str) -> bool {
    told(looks, state).iter().any(|line| line.contains(text))
}

impl Surroundings<'_> {
    fn deep(&self) -> (i32, Vec<Json>) {
        self.check_with(DEEP)
    }

    /// There is such a note; the notes of this kind, pasted, are none any more.
    fn noted_and_mended(&mut self, text: &str) {
        let (code, looks) = self.deep();
        assert!(code == 0 && tells(&looks, "note", text), "{code}: {text:?} is not in {:#?}", told(&looks, "note"));
        let of_kind = |look: &&Json| look["problem"].as_str().is_some_and(|problem| problem.contains(text));
        self.paste(&looks.iter().filter(of_kind).cloned().collect::<Vec<_>>());
        let (code, looks) = self.deep();
        assert!(code == 0 && !tells(&looks, "note", text), "{code}: {:#?}", told(&looks, "note"));
    }

    async fn may_read(&self) {
        self.outbox.sql(&format!("grant select on outbox to {}", self.role)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sound_world_is_proven_and_nothing_is_published_or_moved() {
    let surroundings = surroundings().await;
    let outbox = &surroundings.outbox;
    surroundings.may_read().await;
    let queue = format!("{}_all", outbox.name);
    bind(outbox, &queue, "#").await;
    for kind in ["placed", "paid", "placed"] {
        outbox.insert(kind).await;
    }
    let before = outbox.confirmed().await;
    let (code, looks) = surroundings.deep();
    assert_eq!(code, 0, "{looks:#?}");
    for proof in [
        "what is next can be decoded",
        "last rows of public.outbox: each of 3 makes a message",
        "with routing key order.paid, order.placed",
        "max_slot_wal_keep_size = -1",
        "inserts of the outbox and nothing else",
        "no standby has a slot here",
    ] {
        assert!(tells(&looks, "ok", proof), "{proof:?} is not in {:#?}", told(&looks, "ok"));
    }
    assert!(tells(&looks, "note", "no management API at 127.0.0.1:15672"), "{looks:#?}");
    // A look as before, and as declared by somebody else.
    let (code, looks) = surroundings.check_with(&["--deep", "--set", "rabbitmq.declare=false"]);
    assert_eq!(code, 0, "{looks:#?}");
    assert_eq!(outbox.confirmed().await, before);
    let (_connection, channel) = channel(&outbox.amqp).await;
    let got = channel.basic_get(queue.as_str().into(), BasicGetOptions::default()).await.unwrap();
    assert!(got.is_none(), "`check` published {got:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn impossible_rows_are_named_before_a_relay_stops_at_them() {
    let surroundings = surroundings().await;
    let outbox = &surroundings.outbox;
    surroundings.may_read().await;
    outbox.sql("alter table outbox alter column type drop not null").await;
    let id = outbox
        .text("insert into outbox (aggregatetype, aggregateid, payload) values ('order', '1', '{}') returning id")
        .await;
    outbox.insert(&"x".repeat(300)).await;
    outbox
        .sql("insert into outbox (aggregatetype, aggregateid, type, headers) values ('a', '1', 'b', '{\"CC\": 1}')")
        .await;
    let (code, looks) = surroundings.deep();
    assert_eq!(code, 0, "such rows may be behind the slot: {looks:#?}");
    for problem in [
        format!("row {} would stop the relay: column type is NULL", id.unwrap()),
        "the routing key has 306 bytes; 255 are possible".to_owned(),
        "CC".to_owned(),
    ] {
        assert!(tells(&looks, "note", &problem), "{problem:?} is not in {:#?}", told(&looks, "note"));
    }
    outbox.sql("truncate outbox").await;
    outbox
        .sql(
            "insert into outbox (aggregatetype, aggregateid, type, payload) \
        values ('a', '1', 'b', jsonb_build_object('x', repeat('x', 2000)))",
        )
        .await;
    let limit = ["--deep", "--set", "rabbitmq.message_bytes_max=1KiB"];
    let (code, looks) = surroundings.check_with(&limit);
    assert!(code == 0 && tells(&looks, "note", "its body has 2009 bytes; the broker takes 1024"), "{looks:#?}");
    let (code, looks) = surroundings.check_with(&["--deep", "--set", "rabbitmq.message_bytes_max=512MiB"]);
    assert!(code == 0 && tells(&looks, "note", "takes unless its max_message_size is set"), "{looks:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_may_not_read_is_told_what_was_not_looked_at() {
    let mut surroundings = surroundings().await;
    surroundings.outbox.insert("placed").await;
    surroundings.noted_and_mended("permission denied for table outbox");
    let (_, looks) = surroundings.deep();
    assert!(tells(&looks, "ok", "each of 1 makes a message"), "{looks:#?}");
}

/// What the catalog of now cannot know: whether the publication was there when rows were written.
async fn a_gap_is_found_by_decoding(postgres: &'static Postgres) {
    let outbox = crate::support::Outbox::empty(postgres, shared_rabbitmq()).await;
    outbox.sql(&TABLE.replace("{table}", "public.outbox")).await;
    outbox.create_slot().await;
    let mut surroundings = Surroundings::around(postgres, shared_rabbitmq(), outbox).await;
    surroundings.outbox.insert("unpublished").await;
    surroundings.outbox.sql("create publication pgoutbox for table outbox with (publish = 'insert')").await;
    surroundings.outbox.insert("published").await;
    surroundings.is_sound();
    let before = surroundings.outbox.confirmed().await;
    let (code, looks) = surroundings.deep();
    assert_eq!(code, WORLD, "{looks:#?}");
    assert!(tells(&looks, "wrong", "pgoutbox"), "{:#?}", told(&looks, "wrong"));
    assert_eq!(surroundings.outbox.confirmed().await, before);
    surroundings.run_says(Stops, "publication").await;
    surroundings.paste(&looks.into_iter().filter(|look| look["state"] == "wrong").collect::<Vec<_>>());
    let (code, looks) = surroundings.deep();
    assert_eq!(code, 0, "{looks:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_younger_than_the_rows_is_found_by_decoding() {
    a_gap_is_found_by_decoding(shared_postgres()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_younger_than_the_rows_is_found_by_decoding_on_18() {
    a_gap_is_found_by_decoding(shared_postgres_18()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_of_more_than_the_outbox_is_worth_a_note() {
    let mut surroundings = surroundings().await;
    surroundings.outbox.sql("create table other (id int primary key)").await;
    surroundings.outbox.sql("drop publication pgoutbox; create publication pgoutbox for all tables").await;
    surroundings.is_sound();
    surroundings.noted_and_mended("it publishes more than inserts");
    let (code, looks) = surroundings.deep();
    assert!(code == 0 && tells(&looks, "note", "it publishes 1 other tables"), "{looks:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_runs_is_a_note_and_its_slot_is_let_alone() {
    let surroundings = surroundings().await;
    let settings = [("rabbitmq.declare", "true")];
    let relay = crate::support::relay::Relay::start_at(
        &surroundings.url,
        &surroundings.amqp,
        &surroundings.outbox.name,
        &settings,
    );
    relay.ready().await;
    let (code, looks) = surroundings.deep();
    assert!(code == 0 && tells(&looks, "note", "holds it: a relay runs"), "{looks:#?}");
    assert!(tells(&looks, "note", "not looked at: the slot is in use"), "{looks:#?}");
    assert!(relay.is_ready());
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_and_standbys_that_will_hurt_are_told_and_mended() {
    let postgres = Postgres::start_from(
        &postgres_18(),
        &[
            ("max_slot_wal_keep_size", "1GB"),
            ("wal_sender_timeout", "0"),
            ("idle_replication_slot_timeout", "1h"),
            ("max_prepared_transactions", "5"),
        ],
    )
    .unwrap();
    let mut surroundings = Surroundings::of(&postgres, shared_rabbitmq()).await;
    surroundings.noted_and_mended("is lost when the relay is further behind");
    surroundings.noted_and_mended("the slot is lost when the relay is away for so long");
    surroundings.noted_and_mended("the slot of a relay whose machine is gone stays taken");
    surroundings.outbox.sql("select pg_create_physical_replication_slot('standby_1')").await;
    surroundings.noted_and_mended("it is not kept on standbys, and there are some: standby_1");
    // Nobody uses that slot: to wait for it would be to stand still, and nothing but a decision names it.
    let (code, looks) = surroundings.deep();
    let empty = "synchronized_standby_slots is empty";
    assert!(
        code == 0 && tells(&looks, "note", empty) && !format!("{looks:?}").contains("SET synchronized"),
        "{looks:#?}"
    );
    surroundings.outbox.sql("alter system set synchronized_standby_slots = 'standby_1'").await;
    surroundings.outbox.sql("select pg_reload_conf()").await;
    let waiting = "nothing is published until these standbys are back: standby_1";
    eventually(waiting, || async { tells(&surroundings.deep().1, "note", waiting) }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routing_keys_that_a_user_may_not_use_are_found_by_those_of_the_last_rows() {
    const USER: &str = "topical";
    let mut surroundings = surroundings().await;
    surroundings.may_read().await;
    let name = surroundings.outbox.name.clone();
    let exchange = format!("^{name}$");
    let ctl = |words: &[&str]| surroundings.ctl(words.iter().map(|word| (*word).to_owned()).collect());
    ctl(&["add_user", USER]);
    ctl(&["set_permissions", "-p", "/", USER, &exchange, &exchange, "^$"]);
    ctl(&["set_topic_permissions", "-p", "/", USER, &name, "^order\\.placed$", "^$"]);
    surroundings.amqp = surroundings.amqp.replace("guest:guest", &format!("{USER}:{PASSWORD}"));
    // Topic permissions are asked of an exchange that is there.
    bind(&surroundings.outbox, &format!("{name}_all"), "#").await;
    surroundings.outbox.insert("placed").await;
    surroundings.is_sound();
    assert_eq!(surroundings.deep().0, 0);
    surroundings.outbox.insert("paid").await;
    surroundings.is_sound();
    let (code, looks) = surroundings.deep();
    let wrong: Vec<Json> = looks.into_iter().filter(|look| look["state"] == "wrong").collect();
    assert_eq!(code, WORLD, "{wrong:#?}");
    assert!(
        tells(&wrong, "wrong", "with some routing keys only") && tells(&wrong, "wrong", "order.paid"),
        "{wrong:#?}"
    );
    surroundings.paste(&wrong);
    assert_eq!(surroundings.deep().0, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_stands_behind_the_exchange_is_told_by_the_management_api() {
    let port = Port::pick().unwrap();
    let number = port.number();
    let configuration = format!("management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {number}\n");
    let plugins = vec!["rabbitmq_management".to_owned()];
    let rabbitmq = RabbitMq::start_with(&Extras { plugins, configuration, tls: None }).unwrap();
    let surroundings = Surroundings::of(shared_postgres(), &rabbitmq).await;
    surroundings.may_read().await;
    let url = format!("http://127.0.0.1:{number}");
    let look = |url: &str| {
        let (code, looks) = surroundings.check_with(&["--deep", "--management-url", url]);
        assert_eq!(code, 0, "{looks:#?}");
        looks
    };
    assert!(tells(&look(&url), "ok", "it is still to be declared"));
    let (_connection, channel) = channel(&surroundings.amqp).await;
    let name = surroundings.outbox.name.as_str();
    let durable = lapin::options::ExchangeDeclareOptions { durable: true, ..Default::default() };
    channel.exchange_declare(name.into(), lapin::ExchangeKind::Topic, durable, Default::default()).await.unwrap();
    assert!(tells(&look(&url), "note", "there is none: every message would be held back"));
    for (queue, kind) in [("one", "classic"), ("two", "quorum")] {
        let durable = lapin::options::QueueDeclareOptions { durable: true, ..Default::default() };
        let mut arguments = lapin::types::FieldTable::default();
        arguments.insert("x-queue-type".into(), lapin::types::AMQPValue::LongString(kind.into()));
        channel.queue_declare(queue.into(), durable, arguments).await.unwrap();
        let (options, none) = (Default::default(), Default::default());
        channel.queue_bind(queue.into(), name.into(), "*.placed".into(), options, none).await.unwrap();
    }
    surroundings.outbox.insert("placed").await;
    surroundings.outbox.insert("paid").await;
    let looks = look(&url);
    assert!(tells(&looks, "note", "none takes routing key order.paid, which"), "{looks:#?}");
    assert!(tells(&looks, "note", "queue one (classic): it confirms what the operating system has"), "{looks:#?}");
    assert!(tells(&looks, "ok", "queue two (quorum)"), "{looks:#?}");
    // It is no condition: where it does not answer, or not to us, that is told.
    assert!(tells(&look("http://127.0.0.1:1"), "note", "no management API at 127.0.0.1:1"));
    assert!(tells(&look("nonsense"), "note", "no address such as"));
}
