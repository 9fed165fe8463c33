//! The streaming replication protocol: IDENTIFY_SYSTEM, START_REPLICATION, XLogData, keepalives, standby status.
//!
//! The traps. A keepalive's `wal_end` is how far the walsender has *decoded*, so everything at or below it is in this
//! stream before it; but inside a transaction it equals that transaction's own `commit_lsn`. PostgreSQL 18 says by a mere
//! warning that it skips the rows of a missing publication. And a status is written whole or not at all.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Buf, Bytes};
use tokio::time::{Instant, timeout};

use super::catalog::{Control, SERVER, UNLIMITED};
use super::connection::{Connection, Frame, Purpose};
use super::error::{Error, ServerError};
use super::settings::Settings;
use super::world::literal;
use crate::lsn::Lsn;

/// 2000-01-01 UTC, Postgres' epoch, in seconds since 1970.
pub const EPOCH_SECONDS: u64 = 946_684_800;

/// Writing a few bytes blocks only when the peer has not read for so long that its socket is full.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// A command that reads no WAL answers in milliseconds; one that does not is a peer that is not there.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a look at what is next may hold the slot: well below [`ANSWER_TIMEOUT`], since the server must end it.
const PEEK_MILLISECONDS: u32 = 5_000;

/// The first byte of pgoutput's Insert.
const INSERT: u8 = b'I';

/// How long a clean end may take: the server answers as soon as it has read our last status.
const FINISH_TIMEOUT: Duration = Duration::from_secs(5);

/// The routine of pgoutput that says a publication is skipped. Not the SQLSTATE: a walsender that waits for a standby of
/// `synchronized_standby_slots` warns with the same 55000, and skips nothing. And not the words, which are translated.
const SKIPPED_PUBLICATION: &str = "LoadPublications";

/// A walsender that waits for a standby says so at every turn: the same words are logged again after this long.
const REPEAT_NOTICE: Duration = Duration::from_secs(60);

/// Which server this is: positions mean something only on one system and one timeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster's identifier, given at initdb.
    pub system: String,
    /// The timeline, one higher after each promotion.
    pub timeline: u32,
}

/// What the stream says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// One pgoutput message.
    Data(Bytes),
    /// Nothing to send, up to here.
    Keepalive {
        /// How far the server has decoded.
        wal_end: Lsn,
        /// Whether it wants a status now.
        reply_requested: bool,
    },
    /// More bytes of a message that is not whole yet: a large row on a slow way. Only a sign of life.
    Part,
}

/// What we tell Postgres.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Received by us: as far as we have read.
    pub received: Lsn,
    /// Held by the broker: what Postgres may forget.
    pub settled: Lsn,
    /// Whether we want a keepalive now: a ping.
    pub reply_requested: bool,
}

/// A connection in replication mode, before it streams.
#[derive(Debug)]
pub struct Replication {
    connection: Connection,
}

/// A running stream.
#[derive(Debug)]
pub struct Stream {
    connection: Connection,
    notices: Notices,
}

/// What the server says beside the stream.
#[derive(Debug, Default)]
pub struct Notices {
    /// What was logged last, and when.
    logged: Option<(String, Instant)>,
}

impl Replication {
    /// Connects to where the control connection is, and makes sure that the same server answers.
    ///
    /// # Errors
    /// See `Connection::open`; `NotNow` when it is another server.
    pub async fn open(control: &Control, settings: &Settings) -> Result<Self, Error> {
        let place = control.place();
        let connection = Connection::open(place, settings, Purpose::Replication).await?;
        let mut replication = Self { connection };
        replication.ask(UNLIMITED).await?;
        let ours = replication.ask(SERVER).await?.into_iter().flatten().flatten().next().unwrap_or_default();
        let theirs = control.server().await?;
        if ours != theirs {
            return Err(Error::NotNow(format!(
                "two servers answer at {place}: the SQL connection reached system {theirs}, the replication connection \
                 system {ours}. Remedy: name one server, not a balancer in front of several"
            )));
        }
        Ok(replication)
    }

    /// Which server this is, and how far its WAL goes.
    ///
    /// # Errors
    /// `Protocol` when the answer is not one.
    pub async fn identify(&mut self) -> Result<(Identity, Lsn), Error> {
        let rows = self.ask("IDENTIFY_SYSTEM").await?;
        let wrong = || Error::Protocol("an answer to IDENTIFY_SYSTEM without its columns".to_owned());
        let row = rows.into_iter().next().ok_or_else(wrong)?;
        let mut columns = row.into_iter().map(Option::unwrap_or_default);
        let system = columns.next().ok_or_else(wrong)?;
        let timeline = columns.next().and_then(|text| text.parse().ok()).ok_or_else(wrong)?;
        let position = columns.next().and_then(|text| text.parse().ok()).ok_or_else(wrong)?;
        Ok((Identity { system, timeline }, position))
    }

    /// Where the history of this timeline left the earlier one, `left`; `None` when the server cannot tell, or when the one
    /// does not come from the other.
    ///
    /// # Errors
    /// Of the connection.
    pub async fn switch_point(&mut self, timeline: u32, left: u32) -> Result<Option<Lsn>, Error> {
        match self.ask(&format!("TIMELINE_HISTORY {timeline}")).await {
            Ok(rows) => Ok(rows.into_iter().flatten().nth(1).flatten().and_then(|history| parted(&history, left))),
            // A history file can be missing where an archive was restored.
            Err(Error::Server(error)) => {
                tracing::warn!("the history of timeline {timeline} is not to be had: {error}");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// `wal_sender_timeout` of this session; `None` when it is switched off.
    ///
    /// # Errors
    /// `Protocol` when the answer is not one.
    pub async fn sender_timeout(&mut self) -> Result<Option<Duration>, Error> {
        let wrong = || Error::Protocol("an answer to SHOW wal_sender_timeout that is no duration".to_owned());
        let rows = self.ask("SHOW wal_sender_timeout").await?;
        let text = rows.into_iter().flatten().flatten().next().ok_or_else(wrong)?;
        parse_duration(&text).ok_or_else(wrong)
    }

    /// Decodes what the slot would stream first, up to the end of the transaction that reaches so many changes, and moves
    /// nothing. Holds the slot meanwhile. How many inserts there are.
    ///
    /// # Errors
    /// What would end a stream at its beginning; `Server` with 55006 when the slot is in use, with 57014 when it takes long.
    pub async fn peek(&mut self, slot: &str, publication: &str, changes: u32) -> Result<u64, Error> {
        // Decoding by SQL asks for the rights of the role that was taken on, the stream for those of the one that logged in.
        self.ask(&format!("set role none; set statement_timeout = {PEEK_MILLISECONDS}")).await?;
        let command = format!(
            "select count(*) filter (where pg_catalog.get_byte(data, 0) = {INSERT}) from \
             pg_catalog.pg_logical_slot_peek_binary_changes({}, null, {changes}, 'proto_version', '1', \
             'publication_names', '{}')",
            literal(slot),
            quoted_list(publication),
        );
        let late = Error::Timeout { during: "decoding what is next", after: ANSWER_TIMEOUT };
        let mut notices = Notices::default();
        let peeking = self.connection.query_and_hear(&command, |body| notices.hear(body));
        let rows = timeout(ANSWER_TIMEOUT, peeking).await.unwrap_or(Err(late))?;
        Ok(rows.into_iter().flatten().flatten().next().and_then(|count| count.parse().ok()).unwrap_or(0))
    }

    async fn ask(&mut self, command: &str) -> Result<Vec<Vec<Option<String>>>, Error> {
        let late = Error::Timeout { during: "a replication command", after: ANSWER_TIMEOUT };
        timeout(ANSWER_TIMEOUT, self.connection.query(command)).await.unwrap_or(Err(late))
    }

    /// Makes a slot that goes with this connection. Waits for the transactions that run now, however long they do.
    ///
    /// # Errors
    /// `Server`, when there is no room for one.
    pub async fn create_temporary_slot(&mut self, name: &str) -> Result<(), Error> {
        let command = format!("CREATE_REPLICATION_SLOT \"{name}\" TEMPORARY LOGICAL pgoutput NOEXPORT_SNAPSHOT");
        self.connection.query(&command).await.map(|_| ())
    }

    /// Begins to stream. The server starts at the later of `from` and the slot's own position; `from` must never lie
    /// beyond what was settled on this very system and timeline, since the server skips up to it without a word.
    ///
    /// # Errors
    /// `Server` with its SQLSTATE: 55006 in use, 42704 missing, 55000 invalidated.
    pub async fn start(mut self, slot: &str, publication: &str, from: Lsn) -> Result<Stream, Error> {
        let command = format!(
            "START_REPLICATION SLOT \"{slot}\" LOGICAL {from} (\"proto_version\" '1', \"publication_names\" '{}')",
            quoted_list(publication),
        );
        let mut message = Vec::from(command);
        message.push(0);
        self.connection.put(b'Q', &message);
        self.connection.flush().await?;
        let mut notices = Notices::default();
        loop {
            let frame = self.connection.read().await?;
            match frame.tag {
                b'W' => return Ok(Stream { connection: self.connection, notices }),
                b'E' => return Err(Error::Server(ServerError::parse(frame.body))),
                b'N' => notices.hear(frame.body)?,
                b'S' => {}
                tag => return Err(Error::Protocol(format!("message {:?} before the stream", char::from(tag)))),
            }
        }
    }
}

impl Stream {
    /// What comes next, in the order of the stream. Cancel-safe: it waits at one place, for bytes.
    ///
    /// # Errors
    /// `Closed` when the server ends the stream, `Server` with its reason, `PublicationSkipped` on PostgreSQL 18.
    pub async fn next(&mut self) -> Result<Event, Error> {
        loop {
            let Some(frame) = self.connection.read_part().await? else { return Ok(Event::Part) };
            if let Some(event) = event(frame, &mut self.notices)? {
                return Ok(event);
            }
        }
    }

    /// Writes a standby status. Not to be raced: it has its own deadline.
    ///
    /// # Errors
    /// `Timeout` when the server reads nothing.
    pub async fn tell(&mut self, status: Status) -> Result<(), Error> {
        self.connection.put(b'd', &encode(status));
        let deadline = Error::Timeout { during: "writing a status", after: WRITE_TIMEOUT };
        timeout(WRITE_TIMEOUT, self.connection.flush()).await.unwrap_or(Err(deadline))
    }

    /// Tells the last status and ends the stream. The server reads in order, so its own end proves that it has read the
    /// status.
    ///
    /// # Errors
    /// `Timeout` when it does not answer.
    pub async fn finish(mut self, status: Status) -> Result<(), Error> {
        self.tell(status).await?;
        self.connection.put(b'c', &[]);
        let ended = async {
            self.connection.flush().await?;
            while self.connection.read().await?.tag != b'C' {}
            Ok(())
        };
        let deadline = Error::Timeout { during: "ending the stream", after: FINISH_TIMEOUT };
        timeout(FINISH_TIMEOUT, ended).await.unwrap_or(Err(deadline))
    }
}

/// The line of a history file (`src/backend/access/transam/timeline.c`) that ends this timeline: its number, the position
/// where the next one begins, a reason.
fn parted(history: &str, left: u32) -> Option<Lsn> {
    history.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let timeline: u32 = words.next()?.parse().ok()?;
        let end = words.next()?.parse().ok()?;
        (timeline == left).then_some(end)
    })
}

/// What a frame of a stream says; `None` for what says nothing about the stream.
///
/// # Errors
/// See [`Stream::next`].
pub fn event(frame: Frame, notices: &mut Notices) -> Result<Option<Event>, Error> {
    match frame.tag {
        b'd' => copy_data(frame.body).map(Some),
        b'N' => notices.hear(frame.body).map(|()| None),
        b'S' => Ok(None),
        b'E' => Err(Error::Server(ServerError::parse(frame.body))),
        // The server stops: CopyDone, or the command's completion.
        b'c' | b'C' => Err(Error::Closed),
        tag => Err(Error::Protocol(format!("message {:?} in the stream", char::from(tag)))),
    }
}

fn copy_data(mut body: Bytes) -> Result<Event, Error> {
    let cut = |_| Error::Protocol("a replication message that ends too early".to_owned());
    match body.try_get_u8().map_err(cut)? {
        b'w' => {
            let _data_start = body.try_get_u64().map_err(cut)?;
            let _wal_end = body.try_get_u64().map_err(cut)?;
            let _clock = body.try_get_u64().map_err(cut)?;
            Ok(Event::Data(body))
        }
        b'k' => {
            let wal_end = Lsn::new(body.try_get_u64().map_err(cut)?);
            let _clock = body.try_get_u64().map_err(cut)?;
            let reply_requested = body.try_get_u8().map_err(cut)? != 0;
            Ok(Event::Keepalive { wal_end, reply_requested })
        }
        kind => Err(Error::Protocol(format!("replication message {:?}", char::from(kind)))),
    }
}

impl Notices {
    fn hear(&mut self, body: Bytes) -> Result<(), Error> {
        let notice = ServerError::parse(body);
        if notice.field(b'R') == Some(SKIPPED_PUBLICATION) {
            return Err(Error::PublicationSkipped(notice));
        }
        let text = notice.plain();
        if self.logged.as_ref().is_none_or(|(last, at)| *last != text || at.elapsed() > REPEAT_NOTICE) {
            tracing::warn!("Postgres says: {text}");
            self.logged = Some((text, Instant::now()));
        }
        Ok(())
    }
}

fn encode(status: Status) -> [u8; 34] {
    let since = SystemTime::now().duration_since(UNIX_EPOCH + Duration::from_secs(EPOCH_SECONDS));
    let clock = since.map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(u64::MAX));
    let mut bytes = [0; 34];
    let mut rest = &mut bytes[..];
    let mut put = |value: &[u8]| bytes::BufMut::put_slice(&mut rest, value);
    put(b"r");
    put(&status.received.get().to_be_bytes());
    put(&status.settled.get().to_be_bytes());
    // Applied is what is settled: we keep nothing else, and synchronous replication may wait for it.
    put(&status.settled.get().to_be_bytes());
    put(&clock.to_be_bytes());
    put(&[u8::from(status.reply_requested)]);
    bytes
}

/// A publication as `publication_names` wants it: an identifier, inside a literal.
fn quoted_list(publication: &str) -> String {
    format!("\"{}\"", publication.replace('"', "\"\"")).replace('\'', "''")
}

/// `10s`, `1min`, `500ms`: the units in which `SHOW` prints a duration. `0` is off.
fn parse_duration(text: &str) -> Option<Option<Duration>> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let number: u64 = digits.parse().ok()?;
    let unit = match text.get(digits.len()..)? {
        "ms" | "" => 1,
        "s" => 1_000,
        "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    let duration = Duration::from_millis(number.checked_mul(unit)?);
    Some(Some(duration).filter(|duration| !duration.is_zero()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn publication_names_are_quoted_twice() {
        assert_eq!(quoted_list("we,ird'p\"ub"), "\"we,ird''p\"\"ub\"");
    }

    #[test]
    fn durations_are_read_as_show_prints_them() {
        assert_eq!(parse_duration("1min"), Some(Some(Duration::from_secs(60))));
        assert_eq!(parse_duration("2500ms"), Some(Some(Duration::from_millis(2500))));
        assert_eq!(parse_duration("0"), Some(None));
        assert_eq!(parse_duration("soon"), None);
    }

    #[test]
    fn a_timeline_ends_where_its_line_in_the_history_says() {
        let history = "1\t0/3000158\tno recovery target specified\n\n# a comment\n3\t16/B374D848\tbefore 2026-01-01\n";
        assert_eq!(parted(history, 1), Some(Lsn::new(0x300_0158)));
        assert_eq!(parted(history, 3), Some(Lsn::new(0x16_B374_D848)));
        assert_eq!(parted(history, 2), None);
        assert_eq!(parted("1", 1), None);
    }

    #[test]
    fn a_skipped_publication_is_an_error_and_a_standby_that_is_waited_for_is_not() {
        let heard = |routine: &str| {
            let body = Bytes::from(format!("SWARNING\0C55000\0Mwords\0R{routine}\0\0"));
            event(Frame { tag: b'N', body }, &mut Notices::default())
        };
        assert!(matches!(heard("LoadPublications"), Err(Error::PublicationSkipped(_))));
        assert!(matches!(heard("StandbySlotsHaveCaughtup"), Ok(None)));
    }

    #[test]
    fn truncated_replication_messages_are_errors() {
        for whole in [&[b'k'; 18][..], &[b'w'; 25][..]] {
            for length in 0..whole.len() {
                assert!(copy_data(Bytes::copy_from_slice(&whole[..length])).is_err(), "{length}");
            }
            assert!(copy_data(Bytes::copy_from_slice(whole)).is_ok());
        }
    }

    #[test]
    fn a_status_tells_the_settled_position_as_flushed_and_applied() {
        let status = Status { received: Lsn::new(7), settled: Lsn::new(5), reply_requested: true };
        let bytes = encode(status);
        assert_eq!(bytes[0], b'r');
        assert_eq!(bytes[1..9], 7u64.to_be_bytes());
        assert_eq!(bytes[9..17], 5u64.to_be_bytes());
        assert_eq!(bytes[17..25], 5u64.to_be_bytes());
        assert_eq!(bytes[33], 1);
    }
}
