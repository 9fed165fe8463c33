//! What is done with bytes of a stranger, one function a decoder: no bytes may panic, hang or cost more than they weigh.
//!
//! The trap: a target that only calls a decoder finds panics and nothing else. Each of these also says what must hold of
//! whatever comes out. Shared by the tests and by cargo-fuzz, so that a crash found by the one stays found by the other.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use pgoutbox::config::{Config, Needs, Sources};
use pgoutbox::lsn::Lsn;
use pgoutbox::outbox::{Assembler, ColumnNames, Item, Mapping, Position, Tables, Template, headers};
use pgoutbox::pg::Settings;
use pgoutbox::pg::connection::{FRAME_BYTES_MAX, Frame, take_frame};
use pgoutbox::pg::pgoutput::{self, Message};
use pgoutbox::pg::replication::{self, Event, Notices};
use pgoutbox::sink::rabbitmq::{Address, Files};

/// A decoder and what must hold of it.
pub(super) type Target = fn(&[u8]);

/// All of them; each has a corpus of its name.
pub(super) const ALL: [(&str, Target); 8] = [
    ("pgoutput", pgoutput),
    ("frames", frames),
    ("assembler", assembler),
    ("config", config),
    ("template", template),
    ("headers", headers),
    ("settings", settings),
    ("address", address),
];

/// One message of the stream. Nothing is longer than the bytes it came in.
pub(super) fn pgoutput(data: &[u8]) {
    let Ok(message) = pgoutput::decode(&Bytes::copy_from_slice(data)) else { return };
    match message {
        Message::Insert(insert) => {
            let row = &insert.tuple;
            let length = |column| row.text(column).map_or(0, <[u8]>::len);
            assert!(row.columns() + (0..row.columns()).map(length).sum::<usize>() <= data.len());
        }
        Message::Relation(relation) => assert!(relation.columns.len() * 10 <= data.len()),
        _ => return,
    }
    // A message half understood is not understood.
    assert!(pgoutput::decode(&Bytes::copy_from_slice(&data[..data.len() - 1])).is_err());
    assert!(pgoutput::decode(&[data, b"\0"].concat().into()).is_err());
}

/// A connection's bytes. However they are cut into packets, the frames are the same.
pub(super) fn frames(data: &[u8]) {
    let whole = all_frames(data.chunks(data.len().max(1)));
    assert_eq!(whole, all_frames(data.chunks(1)));
    assert_eq!(whole, all_frames(data.chunks(7)));
    for frame in whole.0 {
        let length = frame.body.len();
        if let Ok(Some(Event::Data(bytes))) = replication::event(frame, &mut Notices::default()) {
            assert_eq!(bytes.len() + 25, length);
        }
    }
}

fn all_frames<'a>(packets: impl Iterator<Item = &'a [u8]>) -> (Vec<Frame>, bool) {
    let mut incoming = BytesMut::new();
    let mut frames = Vec::new();
    for packet in packets {
        incoming.extend_from_slice(packet);
        loop {
            match take_frame(&mut incoming, FRAME_BYTES_MAX) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(_) => return (frames, true),
            }
        }
    }
    (frames, false)
}

const OUTBOX: u32 = 7;
const COLUMNS: [&str; 6] = ["id", "aggregatetype", "aggregateid", "type", "payload", "headers"];

/// A sequence of messages, in a small language: an operation's byte, then what it needs. Whatever the sequence, positions
/// only rise, and nothing is a checkpoint inside a transaction.
pub(super) fn assembler(data: &[u8]) {
    let mapping = Mapping {
        table: "public.outbox".to_owned(),
        columns: ColumnNames::default(),
        destination: "{aggregatetype}.{type}".parse().unwrap(),
    };
    let name = ("public".to_owned(), "outbox".to_owned());
    let tables = Tables { outbox: [OUTBOX].into(), others: [8].into(), name };
    let start = Lsn::new(1000);
    let mut assembler = Assembler::new(mapping, tables).beginning_at(start);
    let mut input = Input(data);
    let (mut checkpoint, mut last, mut begun) = (Lsn::ZERO, None::<Position>, 1000);
    while !input.0.is_empty() {
        let item = match input.byte() % 8 {
            0 => assembler.keepalive(Lsn::new(input.number())),
            1 => {
                begun += u64::from(input.byte());
                assembler.change(&[b"B", &begun.to_be_bytes()[..], &[0; 12]].concat().into())
            }
            2 => {
                let end = begun + u64::from(input.byte());
                let lsns = [begun.to_be_bytes(), end.to_be_bytes()].concat();
                begun = end;
                assembler.change(&[b"C\0", &lsns[..], &[0; 8]].concat().into())
            }
            3 => assembler.change(&relation().into()),
            4 | 5 => {
                let values: Vec<&[u8]> = COLUMNS.iter().map(|_| input.short()).collect();
                assembler.change(&row(&values).into())
            }
            _ => assembler.change(&Bytes::copy_from_slice(input.short())),
        };
        match item {
            Ok(Some(Item::Checkpoint(lsn))) => {
                assert!(lsn > checkpoint && !assembler.in_transaction());
                checkpoint = lsn;
            }
            Ok(Some(Item::Message(position, message))) => {
                assert!(last.is_none_or(|last| last < position) && position.commit_lsn >= checkpoint);
                assert!(message.id.len() <= 255 && message.destination.len() <= 255 && assembler.in_transaction());
                last = Some(position);
            }
            Ok(None) => {}
            // The relay ends the session.
            Err(_) => return,
        }
    }
}

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    fn number(&mut self) -> u64 {
        self.take(8).iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    /// A length of one byte, and so many.
    fn short(&mut self) -> &'a [u8] {
        let length = usize::from(self.byte());
        self.take(length)
    }

    fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

fn relation() -> Vec<u8> {
    let mut bytes = [b"R", &OUTBOX.to_be_bytes()[..], b"public\0outbox\0d\0", &[COLUMNS.len() as u8]].concat();
    for column in COLUMNS {
        bytes.extend([b"\0", column.as_bytes(), b"\0", &25u32.to_be_bytes(), &[0xff; 4]].concat());
    }
    bytes
}

/// An empty value is NULL.
fn row(values: &[&[u8]]) -> Vec<u8> {
    let mut bytes = [b"I", &OUTBOX.to_be_bytes()[..], b"N\0", &[COLUMNS.len() as u8]].concat();
    for value in values {
        match value.len() {
            0 => bytes.push(b'n'),
            length => bytes.extend([b"t", &(length as u32).to_be_bytes()[..], value].concat()),
        }
    }
    bytes
}

/// A file, and after a line `---` an environment. Faults come as a list that is not empty, and secrets stay secret.
pub(super) fn config(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    // Settings may name other files; what those hold is another matter.
    if text.to_ascii_lowercase().contains("_file") {
        return;
    }
    let (file, environment) = text.split_once("\n---\n").unwrap_or((&text, ""));
    let pair = |line: &str| line.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
    let environment: BTreeMap<String, String> = environment.lines().filter_map(pair).collect();
    let path = std::env::temp_dir().join(format!("pgoutbox-fuzz-{}.toml", std::process::id()));
    std::fs::write(&path, file).unwrap();
    let flags = vec![("run.drain_timeout".to_owned(), "5s".to_owned())];
    let loaded = Config::load(&Sources { flags, environment, file: Some(&path) }, Needs::Both);
    std::fs::remove_file(&path).unwrap();
    match loaded {
        Ok(config) => {
            let is_url = |line: &&str| line.starts_with("postgres.url ") || line.starts_with("rabbitmq.url ");
            for line in config.printed().lines().filter(is_url) {
                assert!(line.ends_with(" = \"***\"") || line.ends_with(" = \"\""), "{line}");
            }
        }
        Err(faults) => assert!(!faults.is_empty()),
    }
}

/// A routing key's template.
pub(super) fn template(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(template) = text.parse::<Template>() {
        assert!(template.pieces().len() <= text.len() + 1);
    }
}

/// The headers column. Names that steer the broker never come through.
pub(super) fn headers(data: &[u8]) {
    let mut read = Vec::new();
    if headers::read(data, &mut read).is_err() {
        return;
    }
    for (name, _) in read {
        let lower = name.to_ascii_lowercase();
        assert!((1..=255).contains(&name.len()) && !["cc", "bcc", "x-death"].contains(&lower.as_str()), "{name}");
        assert!(!lower.starts_with("x-outbox-"), "{name}");
    }
}

/// Where Postgres is. What is accepted leads somewhere, and is not printed with its password.
pub(super) fn settings(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Settings::parse(text, |_| None) {
        Ok(settings) => {
            assert!(!settings.hosts.is_empty());
            assert!(!format!("{settings:?}").contains("password"));
        }
        Err(problem) => assert!(!problem.is_empty()),
    }
}

/// Where the brokers are. What is accepted leads to hosts that stand in it, or to this machine where none does; and no message
/// tells a piece of a password.
pub(super) fn address(data: &[u8]) {
    const SECRET: &str = "s3cret";
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Address::parse_all(text, &Files::default()) {
        Ok(addresses) => {
            assert!(!addresses.is_empty() && addresses.len() <= text.matches("://").count());
            // What stands in brackets is an address, and no default takes its place.
            let begins_with_bracket = |rest: &&str| {
                let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
                authority.rsplit('@').next().is_some_and(|host| host.starts_with('['))
            };
            let brackets = text.split("://").skip(1).filter(begins_with_bracket).count();
            let numeric = addresses.iter().filter(|address| address.host.contains(':')).count();
            assert!(text.contains('?') || numeric == brackets, "{text}");
            for address in addresses {
                assert!(!address.host.is_empty() && address.port > 0 && !address.host.contains(['@', '/', '[', ',']));
                let is_numeric = address.host.contains(':');
                // Written out with its escapes or its zeros, it need not look the same.
                let stands_there = text.to_lowercase().contains(&address.host.to_lowercase());
                assert!(is_numeric || stands_there || address.host == "localhost" || text.contains('%'), "{text}");
                // Read again, what is shown is the same place.
                let shown = Address::parse(&format!("amqp://{address}"), &Files::default()).unwrap();
                assert_eq!((&shown.host, shown.port), (&address.host, address.port));
            }
        }
        Err(faults) => {
            assert!(!faults.is_empty());
            assert!(!faults.join("\n").contains(SECRET), "{text}: {faults:?}");
        }
    }
}
