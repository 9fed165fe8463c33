//! A session with the broker, from the open channel to its end: one task that owns the socket and the ledger.
//!
//! Why a task, and not futures that whoever waits for a receipt drives: heartbeats go out and an alarm is heard also while
//! nobody publishes and nobody waits. Everything is this task's own, so there is no lock, and aborting it, which dropping
//! [`Session`] does, closes the socket.
//!
//! The trap: acks that came in one read with a protocol fault. A broker that contradicts itself has said nothing that may
//! settle a message, so what came with the contradiction is not told.

use std::collections::VecDeque;
use std::sync::Arc;

use futures_util::FutureExt;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use super::connect::Opened;
use super::frames::{Fault, Word};
use super::ledger::Ledger;
use super::link::Link;
use super::refusal::Account;
use super::wire;
use crate::metrics::Metrics;
use crate::outbox::Message;
use crate::sink::{Error, Receipt, Refusal, UnderWay};

/// Beats are looked at this often an interval, so that one goes out before the broker misses it.
const LOOKS_PER_HEARTBEAT: u32 = 2;

/// Two silent intervals, in looks.
const SILENT_LOOKS_MAX: u32 = 2 * LOOKS_PER_HEARTBEAT;

/// What the task is asked to do.
pub(super) enum Command {
    Publish(Vec<Message>),
    /// Look whether the exchange is there.
    Check(oneshot::Sender<()>),
    Close,
}

/// How many messages, counted from the session's first, the broker holds; and what ended it.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress {
    settled: u64,
    failure: Option<Error>,
}

/// The task's end of the rope. Dropped: the task ends, and the socket with it.
pub(super) struct Session {
    // Bounded by the window, which is taken before a run is made.
    commands: mpsc::UnboundedSender<Command>,
    progress: watch::Receiver<Progress>,
    under_way: Arc<UnderWay>,
    task: JoinHandle<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Session {
    pub(super) fn start(opened: Opened, account: Account, metrics: Arc<Metrics>) -> Self {
        let (commands, receiver) = mpsc::unbounded_channel();
        let (sender, progress) = watch::channel(Progress::default());
        let under_way = opened.link.under_way.clone();
        let task = Task {
            link: opened.link,
            ledger: Ledger::default(),
            account,
            metrics,
            progress: sender,
            run_ends: VecDeque::new(),
            checks: VecDeque::new(),
            returning: None,
            silent_looks: 0,
            is_closing: false,
        };
        let looks = opened.heartbeat.map(|heartbeat| {
            let every = heartbeat / LOOKS_PER_HEARTBEAT;
            let mut looks = interval_at(Instant::now() + every, every);
            // A machine that slept is no broker that was silent.
            looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            looks
        });
        Self { commands, progress, under_way, task: tokio::spawn(task.run(receiver, looks)) }
    }

    /// Asks the task. One that has ended has said why, or will not be asked.
    pub(super) fn ask(&self, command: Command) {
        let _ = self.commands.send(command);
    }

    /// Settles when the broker holds the first `last` messages of the session.
    pub(super) fn receipt(&self, last: u64) -> Receipt {
        let mut progress = self.progress.clone();
        let settled = async move {
            let settled = progress.wait_for(|progress| progress.settled >= last || progress.failure.is_some()).await;
            match settled {
                Ok(progress) if progress.settled >= last => Ok(()),
                Ok(progress) => Err(progress.failure.clone().unwrap_or_else(gone)),
                Err(_) => Err(gone()),
            }
        };
        Receipt::new(settled).with_under_way(self.under_way.clone())
    }

    /// What ended it.
    pub(super) fn failure(&self) -> Error {
        self.progress.borrow().failure.clone().unwrap_or_else(gone)
    }

    /// Waits until something has ended it. Cancel-safe.
    pub(super) async fn failed(&mut self) -> Error {
        let ended = self.progress.wait_for(|progress| progress.failure.is_some()).await;
        ended.ok().and_then(|progress| progress.failure.clone()).unwrap_or_else(gone)
    }

    /// Waits for the task's end.
    pub(super) async fn ended(&mut self) {
        let _ = (&mut self.task).await;
    }
}

fn gone() -> Error {
    Error::Broken("the session is closed".to_owned())
}

/// Heartbeats may be off.
async fn tick(looks: &mut Option<Interval>) {
    match looks {
        Some(looks) => drop(looks.tick().await),
        None => std::future::pending().await,
    }
}

/// A returned message, of which more is to come: its header, and so many bytes of its body.
enum Returning {
    Header(Refusal),
    Body(u64),
}

struct Task {
    link: Link,
    ledger: Ledger,
    account: Account,
    metrics: Arc<Metrics>,
    progress: watch::Sender<Progress>,
    /// The last messages of runs for which somebody has a receipt, by number.
    run_ends: VecDeque<u64>,
    checks: VecDeque<oneshot::Sender<()>>,
    returning: Option<Returning>,
    silent_looks: u32,
    is_closing: bool,
}

impl Task {
    async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>, mut looks: Option<Interval>) {
        loop {
            // All arms are cancel-safe. The socket first: acks free the window, and what a closing broker says is heard.
            // Then runs, as long as the socket takes them. The clock last: it has time.
            let turn = tokio::select! {
                biased;
                moved = self.link.moved() => moved.and_then(|()| self.listen()),
                command = commands.recv(), if self.link.has_room() && !self.is_closing => match command {
                    Some(command) => {
                        self.obey(command);
                        // Runs that wait already go out in the same call.
                        while self.link.has_room() && !self.is_closing && let Ok(command) = commands.try_recv() {
                            self.obey(command);
                        }
                        continue;
                    }
                    None => return,
                },
                () = tick(&mut looks) => self.look(),
            };
            let ended = match turn {
                Ok(is_over) => self.ledger.settle().err().map(Some).or(is_over.then_some(None)),
                Err(fault) => {
                    let refused = if matches!(fault, Fault::Protocol(_)) { Ok(()) } else { self.ledger.settle() };
                    Some(Some(refused.err().unwrap_or_else(|| self.account.failure(&fault))))
                }
            };
            let (is_over, failure) = (ended.is_some(), ended.flatten());
            self.tell(failure);
            if is_over {
                return;
            }
        }
    }

    /// Wakes those who wait for receipts when a whole run is held, and no sooner: a broker may confirm one by one.
    fn tell(&mut self, failure: Option<Error>) {
        let settled = self.ledger.settled();
        let before = self.run_ends.len();
        while self.run_ends.pop_front_if(|end| *end <= settled).is_some() {}
        if self.run_ends.len() < before || failure.is_some() {
            self.progress.send_modify(|progress| *progress = Progress { settled, failure });
        }
    }

    fn obey(&mut self, command: Command) {
        let output = &mut self.link.output;
        match command {
            Command::Publish(mut run) => {
                for message in &mut run {
                    wire::publish(output, &self.account.exchange, message, self.link.frame_max);
                    self.ledger.publish(std::mem::take(&mut message.id), output.end());
                }
                self.run_ends.push_back(self.ledger.published());
            }
            Command::Check(answered) => {
                wire::exchange_declare(output.tail(), &self.account.exchange, false);
                self.checks.push_back(answered);
            }
            Command::Close => {
                wire::close(output.tail(), "stopped");
                self.is_closing = true;
            }
        }
    }

    /// Every whole frame that is here. `true`: the goodbye was answered.
    fn listen(&mut self) -> Result<bool, Fault> {
        while let Some(word) = self.link.word()? {
            if matches!(word, Word::CloseOk) && self.is_closing {
                return Ok(true);
            }
            self.hear(word)?;
        }
        Ok(false)
    }

    fn hear(&mut self, word: Word) -> Result<(), Fault> {
        let written = self.link.output.written();
        match (word, self.returning.take()) {
            // Of a connection, and so between any others.
            (Word::Heartbeat, returning) => self.returning = returning,
            (Word::Blocked(reason), returning) => {
                blocked(&self.metrics, reason);
                self.returning = returning;
            }
            (Word::Unblocked, returning) => {
                unblocked(&self.metrics);
                self.returning = returning;
            }
            (Word::Close(close), _) => {
                // The broker waits for this answer; whether it still takes it is its own matter.
                wire::close_ok(self.link.output.tail());
                let _ = self.link.moved().now_or_never();
                return Err(Fault::Closed(close));
            }
            (Word::ChannelClose(close), _) => return Err(Fault::Closed(close)),
            // A return is a method, a header and the body it announces.
            (Word::Return(refusal), None) => self.returning = Some(Returning::Header(refusal)),
            (Word::Header { message_id, body_bytes }, Some(Returning::Header(refusal))) => {
                self.ledger.returned(&message_id, refusal, written).map_err(Fault::Protocol)?;
                self.returning = (body_bytes > 0).then_some(Returning::Body(body_bytes));
            }
            (Word::Body { bytes }, Some(Returning::Body(left))) => {
                let short = || Fault::Protocol("a returned body that is longer than announced".to_owned());
                let left = left.checked_sub(bytes).ok_or_else(short)?;
                self.returning = (left > 0).then_some(Returning::Body(left));
            }
            (Word::Ack { tag, multiple }, None) => {
                self.ledger.answer(tag, multiple, true, written).map_err(Fault::Protocol)?;
            }
            (Word::Nack { tag, multiple }, None) => {
                self.ledger.answer(tag, multiple, false, written).map_err(Fault::Protocol)?;
            }
            (Word::ExchangeDeclareOk, None) if !self.checks.is_empty() => {
                // Who asked may have stopped waiting.
                let _ = self.checks.pop_front().map(|answered| answered.send(()));
            }
            _ => return Err(Fault::Protocol("a method that nothing had asked for".to_owned())),
        }
        Ok(())
    }

    /// Twice a heartbeat interval: was the broker heard, and has it heard us?
    fn look(&mut self) -> Result<bool, Fault> {
        self.silent_looks = if std::mem::take(&mut self.link.heard) { 0 } else { self.silent_looks + 1 };
        if self.silent_looks > SILENT_LOOKS_MAX {
            return Err(Fault::Lost("the broker was silent for two heartbeat intervals".to_owned()));
        }
        // What still waits for the socket is as good, once it goes.
        if self.link.is_written() {
            wire::heartbeat(self.link.output.tail());
        }
        Ok(false)
    }
}

pub(super) fn blocked(metrics: &Metrics, reason: String) {
    tracing::warn!(reason, "the broker blocks publishers; nothing is lost, Postgres keeps what waits");
    metrics.blocked(Some(reason));
}

pub(super) fn unblocked(metrics: &Metrics) {
    tracing::info!("the broker takes messages again");
    metrics.blocked(None);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::time::timeout;

    use super::*;

    const HEARTBEAT: [u8; 8] = [8, 0, 0, 0, 0, 0, 0, 0xCE];

    /// A session, and the broker's end of its socket, which holds a kilobyte in each direction.
    fn session() -> (Session, DuplexStream) {
        let (ours, theirs) = duplex(1024);
        let opened = Opened {
            link: Link::new(Box::new(ours), 4096),
            place: ([127, 0, 0, 1], 5672).into(),
            heartbeat: Some(Duration::from_secs(10)),
            product: String::new(),
            version: String::new(),
        };
        let account = Account {
            host: "h:5672".to_owned(),
            user: "u".to_owned(),
            vhost: "/".to_owned(),
            exchange: "ex".to_owned(),
            declare: true,
            queues: Vec::new(),
            is_guest_from_afar: false,
            is_by_certificate: false,
        };
        (Session::start(opened, account, Arc::new(Metrics::new())), theirs)
    }

    fn message(id: u64, body: usize) -> Message {
        Message {
            id: id.to_string().into(),
            destination: "key".into(),
            kind: "kind".into(),
            content_type: "text/plain",
            body: Bytes::from(vec![b'x'; body]),
            ..Message::default()
        }
    }

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let size = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&[kind, 0, 1][..], &size, payload, &[0xCE]].concat()
    }

    fn confirm(method: u8, tag: u8, multiple: bool) -> Vec<u8> {
        frame(1, &[0, 60, 0, method, 0, 0, 0, 0, 0, 0, 0, tag, u8::from(multiple)])
    }

    fn ack(tag: u8) -> Vec<u8> {
        confirm(80, tag, false)
    }

    fn returned(id: u8, body: &[&[u8]]) -> Vec<u8> {
        let method = [&[0, 60, 0, 50, 1, 56, 0, 2][..], b"ex", &[3], b"key"].concat();
        let length = u8::try_from(body.concat().len()).unwrap();
        let header = [0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, length, 0, 128, 1, id];
        let body: Vec<u8> = body.iter().flat_map(|piece| frame(3, piece)).collect();
        [frame(1, &method), frame(2, &header), body].concat()
    }

    /// Takes so many messages of one body frame each off the socket.
    async fn read_messages(broker: &mut DuplexStream, count: usize) {
        let mut bodies = 0;
        while bodies < count {
            let mut head = [0; 7];
            broker.read_exact(&mut head).await.unwrap();
            let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
            let mut payload = vec![0; size + 1];
            broker.read_exact(&mut payload).await.unwrap();
            bodies += usize::from(head[0] == 3);
        }
    }

    #[tokio::test]
    async fn what_the_broker_says_is_read_while_a_run_is_being_written() {
        let (session, mut broker) = session();
        session.ask(Command::Publish((1..=100).map(|id| message(id, 5000)).collect()));
        // A broker that reads nothing before it got rid of what it has to say: far more than the socket holds.
        let speech = HEARTBEAT.repeat(10_000);
        timeout(Duration::from_secs(20), broker.write_all(&speech)).await.expect("nobody reads").unwrap();
        let receipt = session.receipt(100);
        // Two frames a body.
        read_messages(&mut broker, 200).await;
        broker.write_all(&(1..=100).flat_map(ack).collect::<Vec<u8>>()).await.unwrap();
        receipt.await.unwrap();
    }

    #[tokio::test]
    async fn a_return_refuses_its_message_though_acks_come_between_and_its_body_in_pieces() {
        let (session, mut broker) = session();
        session.ask(Command::Publish((1..=3).map(|id| message(id, 5)).collect()));
        let (first, second) = (session.receipt(1), session.receipt(2));
        read_messages(&mut broker, 3).await;
        let words = [ack(3), returned(b'2', &[b"xx", b"xxx"]), HEARTBEAT.to_vec(), ack(1), ack(2)];
        broker.write_all(&words.concat()).await.unwrap();
        first.await.unwrap();
        let error = second.await.unwrap_err();
        assert!(matches!(&error, Error::Refused { id, .. } if id == "2"), "{error}");
    }

    #[tokio::test]
    async fn what_comes_with_a_contradiction_settles_nothing() {
        let lies = [
            ("a tag that nobody published", [ack(1), ack(9)].concat()),
            ("tag 0", [ack(1), confirm(80, 0, true)].concat()),
            ("a second ack", [ack(1), ack(1)].concat()),
            ("a return behind its ack", [ack(1), returned(b'1', &[b"xxxxx"])].concat()),
            ("a return of nobody", [ack(1), returned(b'7', &[])].concat()),
            ("an ack inside a return", [returned(b'2', &[])[..24].to_vec(), ack(1)].concat()),
            ("a body of nobody", [ack(1), frame(3, b"x")].concat()),
            ("an unknown method", [ack(1), frame(1, &[0, 60, 0, 60])].concat()),
            ("a huge frame", [ack(1), vec![3, 0, 1, 255, 255, 255, 255]].concat()),
        ];
        for (lie, bytes) in lies {
            let (session, mut broker) = session();
            session.ask(Command::Publish((1..=2).map(|id| message(id, 5)).collect()));
            let receipt = session.receipt(1);
            read_messages(&mut broker, 2).await;
            broker.write_all(&bytes).await.unwrap();
            let error = timeout(Duration::from_secs(10), receipt).await.expect(lie).expect_err(lie).to_string();
            assert!(error.contains("broke the protocol"), "{lie}: {error}");
            let mut rest = Vec::new();
            timeout(Duration::from_secs(10), broker.read_to_end(&mut rest)).await.expect("the socket closes").unwrap();
        }
    }

    #[tokio::test]
    async fn acks_that_came_before_the_broker_closed_count() {
        let (session, mut broker) = session();
        session.ask(Command::Publish((1..=2).map(|id| message(id, 5)).collect()));
        let (first, second) = (session.receipt(1), session.receipt(2));
        read_messages(&mut broker, 2).await;
        let reason = b"CONNECTION_FORCED - shutdown";
        let close = [&[0, 10, 0, 50, 1, 64, 28][..], reason, &[0, 0, 0, 0]].concat();
        let mut close = frame(1, &close);
        close[2] = 0;
        broker.write_all(&[ack(1), close].concat()).await.unwrap();
        first.await.unwrap();
        assert!(second.await.unwrap_err().to_string().contains("CONNECTION_FORCED - shutdown"));
        let mut rest = Vec::new();
        broker.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, [1, 0, 0, 0, 0, 0, 4, 0, 10, 0, 51, 0xCE], "close-ok");
    }

    #[tokio::test(start_paused = true)]
    async fn heartbeats_go_out_twice_an_interval_and_a_silent_broker_is_given_up_after_two() {
        let (session, mut broker) = session();
        let began = Instant::now();
        let mut beat = [0; 8];
        for _ in 0..10 {
            broker.read_exact(&mut beat).await.unwrap();
            assert_eq!(beat, HEARTBEAT);
            broker.write_all(&HEARTBEAT).await.unwrap();
        }
        assert_eq!(began.elapsed().as_secs(), 50);
        let error = session.receipt(1).await.unwrap_err();
        assert!(error.to_string().contains("silent"), "{error}");
        let silent = (began.elapsed() - Duration::from_secs(50)).as_secs();
        assert!((20..=30).contains(&silent), "{silent}");
    }

    #[tokio::test]
    async fn a_session_that_is_dropped_in_the_middle_of_a_write_closes_its_socket() {
        let (session, mut broker) = session();
        session.ask(Command::Publish((1..=100).map(|id| message(id, 5000)).collect()));
        let mut beginning = [0; 2000];
        broker.read_exact(&mut beginning).await.unwrap();
        drop(session);
        let mut rest = Vec::new();
        timeout(Duration::from_secs(10), broker.read_to_end(&mut rest)).await.expect("the socket stays").unwrap();
        assert!(rest.len() < 10_000, "{} bytes came after the end", rest.len());
    }
}
