//! Servers that break the replication protocol: the real relay, a real catalog, and a script for the stream.
//!
//! The trap: a row that came whole before the garbage is a row, and goes out; what must never go out is the garbage, and what
//! must never be told is a position that stands behind something unsettled or beyond anything the server can have written.

use std::io;
use std::time::{Duration, Instant};

use super::amqp::Broker;
use super::postgres::{self, From, Postgres, Wire, begin, commit, data, fields, insert, keepalive, message, relation};
use crate::support::relay::Relay;
use crate::support::{Outbox, eventually, shared_postgres};

/// In every payload, and never in a log.
const SECRET: &[u8] = b"s3cret-payload";

/// Resident memory, in KiB.
const MEMORY_KIB_MAX: u64 = 128 * 1024;

const COLUMNS: [&[u8]; 5] = [b"id", b"aggregatetype", b"aggregateid", b"type", b"payload"];

const ROW: [(u8, &[u8]); 5] = [(b't', b"scripted"), (b't', b"order"), (b't', b"1"), (b't', b"placed"), (b't', SECRET)];

/// What a script needs to know to be believed.
#[derive(Clone, Copy, Debug)]
pub(super) struct World {
    /// The outbox's OID.
    oid: u32,
    /// Where the write-ahead log ends: whatever a script makes lies beyond.
    end: u64,
}

impl World {
    fn relation(self) -> Vec<u8> {
        relation(self.oid, b"outbox", &COLUMNS)
    }

    fn row(self) -> Vec<u8> {
        insert(self.oid, &ROW)
    }

    /// A whole transaction of one row, `at` bytes beyond the end.
    fn transaction(self, at: u64) -> Vec<Vec<u8>> {
        let lsn = self.end + at;
        vec![begin(lsn), self.relation(), self.row(), commit(lsn, lsn + 48)]
    }
}

pub(super) struct Case {
    outbox: Outbox,
    world: World,
    row: String,
    broker: Broker,
    pub(super) postgres: Postgres,
    pub(super) relay: Relay,
    hostile: usize,
}

impl Case {
    /// The first `hostile` replication connections follow the script.
    async fn start<S>(hostile: usize, from: From, script: S) -> Self
    where
        S: Fn(World, &mut Wire) -> io::Result<()> + Send + Sync + 'static,
    {
        Self::start_as("postgres@", hostile, from, script).await
    }

    /// The relay logs in so: `postgres@`, or with a password that the real server does not ask for.
    pub(super) async fn start_as<S>(user: &str, hostile: usize, from: From, script: S) -> Self
    where
        S: Fn(World, &mut Wire) -> io::Result<()> + Send + Sync + 'static,
    {
        Self::start_by(|url| url.replace("postgres@", user), hostile, from, script).await
    }

    /// The relay is given what is made of the plain URL.
    async fn start_by<S>(made: impl Fn(String) -> String, hostile: usize, from: From, script: S) -> Self
    where
        S: Fn(World, &mut Wire) -> io::Result<()> + Send + Sync + 'static,
    {
        let broker = Broker::honest();
        let mut outbox = Outbox::create_for(shared_postgres(), broker.url()).await;
        let end = outbox.current().await.get();
        let oid = outbox.text("select 'outbox'::regclass::oid").await.unwrap().parse().unwrap();
        let world = World { oid, end };
        let row = outbox.insert("placed").await;
        let port = shared_postgres().port();
        let postgres = Postgres::start(port, hostile, from, move |wire| script(world, wire));
        outbox.url = made(postgres.url(&outbox.url, port));
        let relay = Relay::start(&outbox);
        Self { outbox, world, row, broker, postgres, relay, hostile }
    }

    fn ids(&self) -> Vec<String> {
        self.broker.published().into_iter().map(|published| published.id).collect()
    }

    fn says(&self, says: &[&str]) {
        let log = self.relay.log();
        for text in says {
            assert!(log.contains(text), "{text:?} is not in\n{log}");
        }
        assert!(!log.contains(std::str::from_utf8(SECRET).unwrap()), "{log}");
    }

    fn told_nothing_beyond(&self, limit: u64) {
        let told = self.postgres.told();
        assert!(told.iter().all(|lsn| *lsn <= limit), "{told:?} beyond {limit}");
    }

    /// The scripted session ends with these words, at most `scripted` rows of it were published and nothing beyond `told` was
    /// told; the real server's row follows.
    async fn recovers(self, says: &[&str], scripted: usize, told: u64) {
        eventually("the real row is published", || async { self.ids().contains(&self.row) }).await;
        self.says(says);
        let mut ids = self.ids();
        assert_eq!(ids.pop(), Some(self.row.clone()));
        assert!(ids.len() <= scripted && ids.iter().all(|id| id == "scripted"), "{ids:?}");
        self.told_nothing_beyond(self.world.end + told);
        assert_eq!(self.postgres.streams(), self.hostile + 1, "{}", self.relay.log());
        assert!(
            self.relay.peak_memory_kib().unwrap() < MEMORY_KIB_MAX,
            "{} KiB",
            self.relay.peak_memory_kib().unwrap()
        );
        let last = self.outbox.current().await;
        self.outbox.wait_confirmed(last).await;
        assert_eq!(self.relay.stop(), 0);
        self.broker.assert_spoken_to_well();
    }

    /// The relay stops, with this code and these words, and published nothing.
    pub(super) async fn stops(self, code: i32, says: &[&str]) {
        eventually("the end", || async { self.relay.get("/livez").0 == 0 && self.postgres.streams() > 0 }).await;
        self.says(says);
        assert_eq!(self.ids(), Vec::<String>::new());
        self.told_nothing_beyond(self.world.end);
        assert_eq!(self.relay.exit_code(), code);
        self.broker.assert_spoken_to_well();
    }
}

/// These bytes instead of a stream, once.
async fn instead_of_a_stream(bytes: impl Fn(World) -> Vec<u8> + Send + Sync + 'static) -> Case {
    let script = move |world: World, wire: &mut Wire| {
        wire.raw(&bytes(world))?;
        wire.fall_silent()
    };
    Case::start(1, From::Stream, script).await
}

/// These pgoutput messages instead of a stream, once.
async fn messages(make: impl Fn(World) -> Vec<Vec<u8>> + Send + Sync + 'static) -> Case {
    let script = move |world: World, wire: &mut Wire| {
        wire.data(&make(world))?;
        wire.fall_silent()
    };
    Case::start(1, From::Stream, script).await
}

macro_rules! case {
    ($name:ident, $case:expr) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            $case.await
        }
    };
}

// Frames.

case!(a_script_that_is_a_good_server_is_believed, async {
    let case = messages(|world| world.transaction(1 << 20)).await;
    eventually("the scripted row is told", || async {
        case.postgres.told().contains(&(case.world.end + (1 << 20) + 48))
    })
    .await;
    assert_eq!(case.ids(), ["scripted"]);
});

case!(a_good_server_in_single_bytes_is_believed, async {
    let script = |world: World, wire: &mut Wire| {
        for message in world.transaction(1 << 20) {
            wire.drip(&data(&message))?;
        }
        wire.fall_silent()
    };
    let case = Case::start(1, From::Stream, script).await;
    eventually("the scripted row is told", || async {
        case.postgres.told().contains(&(case.world.end + (1 << 20) + 48))
    })
    .await;
    assert_eq!(case.ids(), ["scripted"]);
});

case!(an_absurd_length_is_refused_before_it_costs_memory, async {
    for length in [0, 3, 0x4000_0000, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
        let case = instead_of_a_stream(move |_| [b"d", &length.to_be_bytes()[..], &[b'w'; 100]].concat()).await;
        case.recovers(&["unexpected bytes from Postgres", "a message of"], 0, 0).await;
    }
});

case!(a_great_length_whose_bytes_never_come_costs_no_memory, async {
    let script = |_: World, wire: &mut Wire| wire.raw(&[b"d", &0x3fff_ffffu32.to_be_bytes()[..], b"w"].concat());
    Case::start(1, From::Stream, script).await.recovers(&["closed the connection"], 0, 0).await;
});

case!(an_end_in_the_middle_of_a_frame_is_an_end, async {
    let script = |world: World, wire: &mut Wire| {
        let whole = data(&begin(world.end + 100));
        wire.raw(&whole[..whole.len() - 3])
    };
    Case::start(1, From::Stream, script).await.recovers(&["closed the connection"], 0, 0).await;
});

case!(an_unknown_frame_is_named, async {
    let case = instead_of_a_stream(|_| message(b'!', b"what")).await;
    case.recovers(&["unexpected bytes from Postgres: message '!' in the stream"], 0, 0).await;
});

case!(an_unknown_replication_message_is_named, async {
    let case = instead_of_a_stream(|_| message(b'd', b"q_______________________________")).await;
    case.recovers(&["unexpected bytes from Postgres: replication message 'q'"], 0, 0).await;
});

case!(copy_data_that_ends_too_early_is_named, async {
    for body in [&b""[..], b"w\0\0", b"k\0\0\0\0\0\0\0\0"] {
        let case = instead_of_a_stream(move |_| message(b'd', body)).await;
        case.recovers(&["a replication message that ends too early"], 0, 0).await;
    }
});

case!(an_error_in_the_middle_of_a_transaction_ends_it_untold, async {
    let case = instead_of_a_stream(|world| {
        let mut bytes = world.transaction(100)[..3].iter().flat_map(|message| data(message)).collect::<Vec<_>>();
        bytes.extend(message(b'E', &fields("ERROR", "XX000", "could not read the log")));
        bytes
    });
    case.await.recovers(&["could not read the log (SQLSTATE XX000)"], 1, 0).await;
});

case!(the_end_of_the_copy_is_the_end_of_the_session, async {
    instead_of_a_stream(|_| message(b'c', b"")).await.recovers(&["closed the connection"], 0, 0).await;
});

case!(a_publication_that_is_skipped_stops_the_relay, async {
    let text = "skipped loading publication \"pgoutbox\"";
    let warning = format!("SWARNING\0VWARNING\0C55000\0M{text}\0RLoadPublications\0\0").into_bytes();
    let case = instead_of_a_stream(move |_| message(b'N', &warning)).await;
    case.stops(78, &["Postgres skips rows", text, "Remedy"]).await;
});

case!(an_error_without_fields_or_an_end_is_an_error, async {
    for body in [&b""[..], b"S", b"SERROR", b"\0\0\0", b"\xff\xfe\xfd\0"] {
        let case = instead_of_a_stream(move |_| message(b'E', body)).await;
        case.recovers(&["Postgres refused"], 0, 0).await;
    }
});

/// Nothing happens for long in a quiet database, and a server whose timeout is switched off says nothing by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_speaks_only_when_it_is_asked_is_asked_in_time() {
    let timeout = Duration::from_secs(6);
    let options = format!("?options=-c%20wal_sender_timeout%3D{}s", timeout.as_secs());
    let script = |world: World, wire: &mut Wire| wire.answer_pings(world.end);
    let case = Case::start_by(|url| url + &options, 1, From::Stream, script).await;
    case.relay.ready().await;
    let began = Instant::now();
    while began.elapsed() < 3 * timeout {
        let (code, reasons) = case.relay.get("/readyz");
        assert_eq!(code, 200, "{reasons} after {:?}\n{}", began.elapsed(), case.relay.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(case.postgres.streams(), 1, "{}", case.relay.log());
    // At least every silence but for the first status; and no storm.
    let pings = case.postgres.pings();
    assert!((3..=30).contains(&pings), "{pings} in {:?}", began.elapsed());
    case.told_nothing_beyond(case.world.end);
}

// pgoutput.

/// What the log says of it, and the messages.
type Wrong = (&'static str, fn(World) -> Vec<Vec<u8>>);

case!(a_change_that_is_not_pgoutput_is_refused, async {
    let wrong: [Wrong; 10] = [
        ("unknown kind 0x7e", |_| vec![b"~~~".to_vec()]),
        ("unknown kind 0x53", |_| vec![b"S\0\0\0\x09\x01".to_vec()]),
        ("`B` ends too early", |world| vec![begin(world.end + 100)[..9].to_vec()]),
        ("`B` has 1 bytes too many", |world| vec![[begin(world.end + 100), vec![0]].concat()]),
        ("`R`", |world| {
            let mut relation = world.relation();
            let at = 1 + 4 + b"public\0outbox\0d".len();
            relation[at..at + 2].copy_from_slice(&[0xff, 0xff]);
            vec![begin(world.end + 100), relation]
        }),
        // Without its end a name swallows what follows.
        ("`R`", |world| vec![begin(world.end + 100), [b"R", &world.oid.to_be_bytes()[..], b"public"].concat()]),
        ("`R`", |world| vec![begin(world.end + 100), relation(world.oid, b"out\xff\xfebox", &COLUMNS)]),
        ("`I`", |world| {
            let mut row = ROW;
            row[4] = (b'u', b"");
            vec![begin(world.end + 100), world.relation(), insert(world.oid, &row)]
        }),
        ("`I`", |world| {
            let mut row = ROW;
            row[4] = (b'b', b"\x01");
            vec![begin(world.end + 100), world.relation(), insert(world.oid, &row)]
        }),
        ("`I`", |world| {
            let mut row = world.row();
            let at = row.len() - SECRET.len() - 4;
            row[at..at + 4].copy_from_slice(&u32::MAX.to_be_bytes());
            vec![begin(world.end + 100), world.relation(), row]
        }),
    ];
    for (says, make) in wrong {
        messages(make).await.recovers(&[says], 0, 0).await;
    }
});

case!(messages_out_of_order_are_refused, async {
    let wrong: [Wrong; 8] = [
        ("COMMIT outside a transaction", |world| vec![commit(world.end + 100, world.end + 148)]),
        ("INSERT outside a transaction", |world| vec![world.relation(), world.row()]),
        ("BEGIN inside the transaction", |world| vec![begin(world.end + 100), begin(world.end + 200)]),
        ("before its description", |world| vec![begin(world.end + 100), world.row()]),
        ("before its description", |world| vec![begin(world.end + 100), world.relation(), insert(77, &ROW)]),
        ("a row of 4 values for 5 columns", |world| {
            vec![begin(world.end + 100), world.relation(), insert(world.oid, &ROW[..4])]
        }),
        ("COMMIT at", |world| vec![begin(world.end + 100), commit(world.end + 101, world.end + 148)]),
        ("COMMIT at", |world| vec![begin(world.end + 100), commit(world.end + 100, world.end + 100)]),
    ];
    for (says, make) in wrong {
        messages(make).await.recovers(&["the stream from Postgres is out of order", says], 0, 0).await;
    }
});

case!(a_transaction_of_the_past_is_refused, async {
    let case = messages(|world| [world.transaction(200), world.transaction(100)].concat()).await;
    case.recovers(&["the stream from Postgres is out of order", "after position"], 1, 248).await;
});

case!(a_row_of_an_unknown_table_stops_the_relay, async {
    let case = messages(|world| vec![begin(world.end + 100), relation(7, b"what", &COLUMNS), insert(7, &ROW)]).await;
    case.stops(78, &["a row of table public.what (OID 7)", "Remedy"]).await;
});

// Positions.

case!(a_keepalive_of_the_past_or_of_nothing_is_not_told, async {
    let script = |world: World, wire: &mut Wire| {
        for message in world.transaction(1 << 20) {
            wire.raw(&data(&message))?;
        }
        wire.keepalive(world.end)?;
        wire.keepalive(0)?;
        wire.fall_silent()
    };
    let case = Case::start(1, From::Stream, script).await;
    let told = case.world.end + (1 << 20) + 48;
    eventually("the scripted row is told", || async { case.postgres.told().last() == Some(&told) }).await;
    case.told_nothing_beyond(told);
    let told = case.postgres.told();
    assert!(told.is_sorted(), "{told:?}");
});

case!(a_keepalive_inside_a_transaction_is_not_told, async {
    let script = |world: World, wire: &mut Wire| {
        // The real row's commit lies beyond 100, or the relay would have settled it already.
        wire.data(&world.transaction(100)[..3])?;
        wire.keepalive(world.end + (1 << 21))?;
        std::thread::sleep(Duration::from_secs(1));
        Ok(())
    };
    Case::start(1, From::Stream, script).await.recovers(&["closed the connection"], 1, 0).await;
});

case!(a_position_beyond_anything_possible_is_refused_and_never_told, async {
    let impossible: [fn(World) -> Vec<u8>; 5] = [
        |_| keepalive(u64::MAX),
        |world| [keepalive(world.end + 1), keepalive(u64::MAX)].concat(),
        |_| keepalive(1 << 63),
        |world| data(&begin(world.end + (1 << 60))),
        |world| {
            let lsn = world.end + 100;
            [data(&begin(lsn)), data(&commit(lsn, u64::MAX))].concat()
        },
    ];
    for make in impossible {
        let case = instead_of_a_stream(make).await;
        case.recovers(&["out of order", "no server can have written so much"], 0, 1).await;
    }
});

// Logins.

/// These messages instead of a login, each after the client's answer to the one before.
async fn instead_of_a_login(messages: Vec<Vec<u8>>) -> Case {
    let script = move |_: World, wire: &mut Wire| {
        for (index, message) in messages.iter().enumerate() {
            if index > 0 {
                wire.read()?;
            }
            wire.raw(message)?;
        }
        wire.fall_silent()
    };
    Case::start(1, From::Login, script).await
}

/// `R`, of this kind.
pub(super) fn authentication(kind: u32, rest: &[u8]) -> Vec<u8> {
    message(b'R', &[&kind.to_be_bytes()[..], rest].concat())
}

case!(a_way_to_log_in_that_nobody_knows_stops_the_relay_or_is_tried_again, async {
    // Kerberos V5, GSSAPI, SSPI; then kinds that do not exist.
    for kind in [2, 7, 9] {
        instead_of_a_login(vec![authentication(kind, b"")]).await.stops(78, &["cannot log in to Postgres"]).await;
    }
    for kind in [77, u32::MAX] {
        let case = instead_of_a_login(vec![authentication(kind, b"")]).await;
        case.recovers(&["unexpected bytes from Postgres"], 0, 0).await;
    }
});

case!(garbage_instead_of_a_login_is_tried_again, async {
    for bytes in [
        &b"HTTP/1.1 400 Bad Request\r\n\r\n"[..],
        b"R\0\0\0\x05x",
        b"R\0\0\0\x04",
        b"Z\0\0\0\x05I",
        b"R\xff\xff\xff\xff",
    ] {
        let case = instead_of_a_login(vec![bytes.to_vec()]).await;
        case.recovers(&["unexpected bytes from Postgres"], 0, 0).await;
    }
});

case!(a_server_that_never_answers_a_login_is_left_by_a_deadline, async {
    let silent = instead_of_a_login(Vec::new()).await;
    let slow = |_: World, wire: &mut Wire| {
        wire.send(b'R', &[0; 4])?;
        // An endless greeting: no ReadyForQuery ever.
        while wire.send(b'S', b"application_name\0pgoutbox\0").is_ok() {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    };
    let slow = Case::start(1, From::Login, slow).await;
    let says = ["took longer than connect_timeout"];
    // Whichever comes first: the deadline, or more greeting than there can be.
    futures_util::future::join(silent.recovers(&says, 0, 0), slow.recovers(&["nothing is lost"], 0, 0)).await;
});

case!(a_flood_of_parameters_costs_no_memory, async {
    let script = |_: World, wire: &mut Wire| {
        wire.send(b'R', &[0; 4])?;
        let flood = postgres::message(b'S', &[&[b'n'; 1000][..], b"\0", &[b'v'; 64_000], b"\0"].concat());
        for _ in 0..4_000 {
            wire.raw(&flood)?;
        }
        Ok(())
    };
    Case::start(1, From::Login, script).await.recovers(&["nothing is lost"], 0, 0).await;
});
