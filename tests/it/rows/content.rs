//! The content of a message: bytes, properties, headers, and columns of other names, orders and types.
//!
//! The trap: a role's own settings change how Postgres prints a row, and NULL is not empty.

use lapin::types::AMQPValue;

use super::Stage;
use crate::support::{Outbox, shared_postgres, shared_rabbitmq};

/// Payloads of a type, as SQL expressions; what SQL says of them must arrive.
async fn arrives_as_sql_says(kind: &str, content_type: &str, payloads: &[&str]) {
    let stage = Stage::set().await;
    stage.outbox.sql(&format!("alter table outbox alter payload type {kind} using null")).await;
    for payload in payloads {
        stage
            .outbox
            .sql(&format!(
                "insert into outbox (aggregatetype, aggregateid, type, payload) values ('order', '1', 'x', {payload})"
            ))
            .await;
    }
    let bytes = if kind == "bytea" { "payload" } else { "convert_to(payload::text, 'UTF8')" };
    let query = format!("select encode({bytes}, 'hex') from outbox where id = $1::text::uuid");
    for received in stage.received(payloads.len()).await {
        let row = stage.outbox.client.query_one(&query, &[&received.id]).await.unwrap();
        let hex: Option<String> = row.get(0);
        let body: String = received.body.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(body == hex.clone().unwrap_or_default(), "{kind}: {} bytes", received.body.len());
        let null = received.header("x-outbox-null");
        assert_eq!(null, hex.is_none().then_some(AMQPValue::Boolean(true)), "{kind}");
        assert_eq!(received.properties.content_type().as_ref().unwrap().as_str(), content_type);
    }
    stage.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jsonb_and_json_arrive_as_sql_prints_them() {
    let payloads = [
        "'{\"b\":  1.10,\n \"a\": [null, \"\\u00e4 ä 🦀\", 12345678901234567890.123456789]}'",
        "'null'",
        "null",
        "'\"\"'",
        "to_json(repeat('ä', 1500000))",
    ];
    arrives_as_sql_says("json", "application/json", &payloads).await;
    arrives_as_sql_says("jsonb", "application/json", &payloads).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn text_and_bytes_arrive_untouched_and_null_is_not_empty() {
    let payloads = ["''", "null", "E' \\t\\r\\n\\\\x00 '", "'ä 🦀'", "repeat('x', 3000000)"];
    arrives_as_sql_says("text", "text/plain", &payloads).await;
    arrives_as_sql_says("varchar", "text/plain", &payloads).await;
    let payloads = ["''", "null", "'\\x00ff0a5c'", "decode(repeat('00ff', 1500000), 'hex')"];
    arrives_as_sql_says("bytea", "application/octet-stream", &payloads).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn properties_and_headers_are_those_of_the_contract() {
    let stage = Stage::set().await;
    stage
        .outbox
        .sql(
            "alter table outbox add tracestate text; \
             insert into outbox (aggregatetype, aggregateid, type, payload, headers, traceparent, tracestate) values \
             ('order', '42', 'placed', '{}', '{\"text\": \"ä\", \"whole\": -7, \"half\": 0.5, \"yes\": true, \
             \"none\": null, \"list\": [1, \"b\"], \"map\": {\"k\": 2}}', '00-ab-cd-01', 'vendor=1'), \
             ('user', '43', 'left', '{}', null, null, null)",
        )
        .await;
    let received = stage.received(2).await;
    let (first, second) = (&received[0], &received[1]);
    let properties = &first.properties;
    assert_eq!(first.routing_key, "order.placed");
    assert_eq!(properties.kind().as_ref().unwrap().as_str(), "placed");
    assert_eq!(properties.app_id().as_ref().unwrap().as_str(), "pgoutbox");
    assert_eq!(*properties.delivery_mode(), Some(2));
    // The commit comes at or after `now()`, which is the transaction's beginning.
    let inserted = stage.outbox.text("select floor(extract(epoch from max(created_at)))::bigint from outbox").await;
    let inserted: u64 = inserted.unwrap().parse().unwrap();
    let timestamp = properties.timestamp().unwrap();
    assert!((inserted..=inserted + 5).contains(&timestamp), "{inserted} {timestamp}");
    let text = |text: &str| AMQPValue::LongString(text.into());
    for (name, value) in [
        ("aggregatetype", text("order")),
        ("aggregateid", text("42")),
        ("traceparent", text("00-ab-cd-01")),
        ("tracestate", text("vendor=1")),
        ("text", text("ä")),
        ("whole", AMQPValue::LongLongInt(-7)),
        ("half", AMQPValue::Double(0.5)),
        ("yes", AMQPValue::Boolean(true)),
        ("none", AMQPValue::Void),
        ("list", AMQPValue::FieldArray(vec![AMQPValue::LongLongInt(1), text("b")].into())),
    ] {
        assert_eq!(first.header(name), Some(value), "{name}");
    }
    assert!(matches!(first.header("map"), Some(AMQPValue::FieldTable(_))));
    assert_eq!((first.position.1, second.position.1), (0, 1), "numbered in the transaction");
    assert_eq!(first.position.0, second.position.0);
    for name in ["traceparent", "tracestate", "text", "x-outbox-null"] {
        assert_eq!(second.header(name), None, "{name}");
    }
    stage.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_of_role_and_database_change_nothing() {
    let table =
        "create table outbox (id timestamptz, aggregatetype interval, aggregateid float8, type text, payload bytea)";
    let row = "insert into outbox values ('2024-03-01 00:00:00+00', '1 day 02:00', 1.0 / 30, 'x', '\\x00ff41')";
    let mut bodies = Vec::new();
    for is_set in [false, true] {
        let mut outbox = Outbox::empty(shared_postgres(), shared_rabbitmq()).await;
        let name = outbox.name.clone();
        outbox.sql(&format!("{table}; create publication pgoutbox for table outbox with (publish = 'insert')")).await;
        outbox.create_slot().await;
        outbox.sql(&format!("create role {name}_relay login replication")).await;
        if is_set {
            for setting in [
                "bytea_output = escape",
                "datestyle = 'SQL, DMY'",
                "timezone = 'Asia/Tokyo'",
                "intervalstyle = sql_standard",
                "extra_float_digits = -10",
                "client_encoding = LATIN1",
            ] {
                outbox
                    .sql(&format!("alter role {name}_relay set {setting}; alter database {name} set {setting}"))
                    .await;
            }
        }
        let admin = outbox.url.clone();
        outbox.url = shared_postgres().url_for(&format!("{name}_relay"), None, &name);
        let stage = Stage::of(outbox, &[("rabbitmq.routing_key", "x.{aggregateid}")]).await;
        assert_ne!(admin, stage.outbox.url);
        stage.outbox.sql(row).await;
        let received = stage.received(1).await.remove(0);
        let header = received.text_header("aggregatetype");
        bodies.push((received.id, received.routing_key, header, received.body));
        stage.stop();
    }
    assert_eq!(bodies[0], bodies[1]);
    let (id, key, header, body) = &bodies[0];
    assert_eq!((id.as_str(), key.as_str()), ("2024-03-01 00:00:00+00", "x.0.03333333333333333"));
    assert_eq!((header.as_deref(), body.as_slice()), (Some("1 day 02:00:00"), &[0, 255, b'A'][..]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn columns_are_found_by_name_in_any_order_and_by_the_names_of_the_settings() {
    let table = "create table outbox (payload text, event_type text, note int default 7, aggregate_id text, \
        aggregate_type text, id bigint)";
    let stage = Stage::with_table(table, "publish = 'insert'", &[]).await;
    stage.outbox.sql("insert into outbox values ('body', 'placed', 1, '42', 'order', 9007199254740993)").await;
    let received = stage.received(1).await.remove(0);
    assert_eq!((received.id.as_str(), received.routing_key.as_str()), ("9007199254740993", "order.placed"));
    assert_eq!((received.body.as_slice(), received.text_header("aggregateid").as_deref()), (&b"body"[..], Some("42")));
    stage.stop();

    let table = "create table outbox (k text, topic text, subject text, verb text, data json, meta jsonb, id int, \
        payload bytea, tenant text)";
    let settings = [
        ("outbox.columns.id", "k"),
        ("outbox.columns.aggregatetype", "topic"),
        ("outbox.columns.aggregateid", "subject"),
        ("outbox.columns.type", "verb"),
        ("outbox.columns.payload", "data"),
        ("outbox.columns.headers", "meta"),
        ("rabbitmq.routing_key", "{tenant}.{aggregatetype}.{type}"),
    ];
    let stage = Stage::with_table(table, "publish = 'insert'", &settings).await;
    stage.outbox.sql("insert into outbox values ('K', 't', 's', 'v', '[1 ]', '{\"h\": 1}', 1, 'no', 'acme')").await;
    let received = stage.received(1).await.remove(0);
    assert_eq!((received.id.as_str(), received.routing_key.as_str()), ("K", "acme.t.v"));
    assert_eq!(received.body, b"[1 ]");
    assert_eq!(received.header("h"), Some(AMQPValue::LongLongInt(1)));
    stage.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_of_a_sql_ascii_database_arrive_untouched_and_stop_the_relay_in_a_key() {
    let ascii = "encoding 'SQL_ASCII' template template0";
    let outbox = Outbox::empty_in(ascii, shared_postgres(), shared_rabbitmq()).await;
    outbox.sql("create table outbox (id text, aggregatetype text, aggregateid text, type text, payload text)").await;
    outbox.sql("create publication pgoutbox for table outbox with (publish = 'insert')").await;
    outbox.create_slot().await;
    let stage = Stage::of(outbox, &[]).await;
    stage.outbox.sql("insert into outbox values ('1', 'a', 'b', 'c', E'\\xff\\xfe ok')").await;
    assert_eq!(stage.received(1).await[0].body, b"\xff\xfe ok");
    stage.outbox.sql("insert into outbox values ('2', E'\\xff', 'b', 'c', '')").await;
    let (code, log) = stage.relay.ended();
    assert!(code == 65 && log.contains("column aggregatetype is not valid UTF-8"), "{code}\n{log}");
}
