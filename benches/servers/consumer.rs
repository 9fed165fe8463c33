//! The consumer by whose count everything is measured: a thread that reads frames, judges numbers and keeps times.
//!
//! It is as cheap as it can be, because it shares the machine with what it measures, and it forgives nothing: every row
//! once, in the order of its number, or the bench ends.
//!
//! The trap: a consumer that comes too late. It subscribes before the measured program starts, so a broker with a fast
//! consumer stores little, and all programs meet it in the same state.

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::arena::{PATIENCE, Queue};
use crate::bare::amqp::{Connection, short};
use crate::bare::postgres::{u16_at, u64_at};
use crate::process;

/// A stream wants acknowledgements; one for so many.
const ACK_EVERY: u64 = 200;
const PREFETCH: u16 = 5000;

/// Where rows come out of order, so many runs of them are told.
const RUNS_TOLD: usize = 10;

const DELIVER: (u16, u16) = (60, 60);

/// What is to come.
#[derive(Clone, Debug)]
pub(crate) struct Expectation {
    pub(crate) rows: u64,
    /// Number follows number; else each comes once.
    pub(crate) is_ordered: bool,
    /// Payloads hold when they were sent, in nanoseconds since.
    pub(crate) clock: Option<Instant>,
    /// Every byte that a consumer can see is to be hashed.
    pub(crate) is_hashed: bool,
}

/// How far it had come at a moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub(crate) at: Instant,
    pub(crate) count: u64,
    /// CPU time of the consumer.
    pub(crate) cpu: Duration,
}

#[derive(Debug)]
pub(crate) enum Event {
    First,
    Last,
    Fault(String),
}

/// What it saw.
#[derive(Debug, Default)]
pub(crate) struct Log {
    pub(crate) first: Option<Moment>,
    pub(crate) last: Option<Moment>,
    /// When each tenth of the rows was there.
    pub(crate) tenths: Vec<Instant>,
    /// Of every row, nanoseconds.
    pub(crate) latencies: Vec<u64>,
    /// First and last number of each run without a gap: one, if rows come once and in order.
    runs: Vec<(u64, u64)>,
    pub(crate) hash: u64,
}

pub(crate) struct Consumer {
    stream: TcpStream,
    thread: JoinHandle<Log>,
    events: Receiver<Event>,
    count: Arc<AtomicU64>,
}

impl Consumer {
    pub(crate) fn start(port: u16, queue: Queue, name: &str, expectation: Expectation) -> Self {
        let mut connection = Connection::open(port);
        let is_stream = queue == Queue::Stream;
        if is_stream {
            connection.ask((60, 10), &[&[0; 4][..], &PREFETCH.to_be_bytes(), &[0]].concat());
        }
        let offset = [&short("x-stream-offset")[..], b"S\0\0\0\x05first"].concat();
        let table = if is_stream { offset } else { Vec::new() };
        let size = u32::try_from(table.len()).unwrap().to_be_bytes();
        let no_ack = if is_stream { 0 } else { 2 };
        connection.ask((60, 20), &[&[0, 0], &short(name)[..], &short("c"), &[no_ack], &size, &table].concat());
        let stream = connection.socket.stream.try_clone().unwrap();
        let (events, receiver) = channel();
        let count = Arc::new(AtomicU64::new(0));
        let reading = Reading {
            connection,
            seen: if expectation.is_ordered { Vec::new() } else { vec![false; expectation.rows as usize + 1] },
            expectation,
            is_stream,
            events,
            count: 0,
            shared: count.clone(),
            log: Log::default(),
            body_left: 0,
            begins: false,
            now: Instant::now(),
        };
        let thread = std::thread::spawn(move || reading.run());
        Self { stream, thread, events: receiver, count }
    }

    /// Rows that came.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Waits for the next event; why it did not come.
    pub(crate) fn wait(&self) -> Result<(), String> {
        match self.events.recv_timeout(PATIENCE) {
            Ok(Event::First | Event::Last) => Ok(()),
            Ok(Event::Fault(fault)) => Err(fault),
            Err(error) => Err(format!("{error}, with {} rows", self.count())),
        }
    }

    pub(crate) fn stop(self) -> Log {
        let _ = self.stream.shutdown(Shutdown::Both);
        let log = self.thread.join().expect("the consumer's thread does not panic");
        assert!(log.runs.len() <= 1, "{}", out_of_order(&log.runs));
        // What came after all had come.
        if let Some(Event::Fault(fault)) = self.events.try_iter().last() {
            panic!("{fault}");
        }
        log
    }
}

struct Reading {
    connection: Connection,
    expectation: Expectation,
    is_stream: bool,
    events: Sender<Event>,
    count: u64,
    shared: Arc<AtomicU64>,
    seen: Vec<bool>,
    log: Log,
    /// Of the message that is being read.
    body_left: u64,
    begins: bool,
    now: Instant,
}

impl Reading {
    fn run(mut self) -> Log {
        while self.connection.socket.try_read().is_ok_and(|count| count > 0) {
            self.now = Instant::now();
            let before = self.count;
            if let Err(fault) = self.frames() {
                let _ = self.events.send(Event::Fault(fault));
                return self.log;
            }
            if self.count > before {
                self.note(before);
            }
            if self.connection.socket.try_write().is_err() {
                break;
            }
        }
        self.log
    }

    fn note(&mut self, before: u64) {
        self.shared.store(self.count, Ordering::Relaxed);
        let rows = self.expectation.rows;
        while (self.log.tenths.len() as u64 + 1) * rows / 10 <= self.count && self.log.tenths.len() < 10 {
            self.log.tenths.push(self.now);
        }
        let moment = || Moment { at: self.now, count: self.count, cpu: process::own_cpu() };
        if before == 0 {
            self.log.first = Some(moment());
            let _ = self.events.send(Event::First);
        }
        if before < rows && self.count >= rows {
            self.log.last = Some(moment());
            let _ = self.events.send(Event::Last);
        }
    }

    fn frames(&mut self) -> Result<(), String> {
        let mut ack = None;
        while let Some(frame) = self.connection.frame() {
            let payload = &frame[7..frame.len() - 1];
            if self.expectation.is_hashed {
                // A delivery's consumer, tag and exchange are the run's; key, properties and body are the message's.
                let from = if frame[0] == 1 { 16 + usize::from(payload[15]) } else { 0 };
                self.log.hash = hash(self.log.hash, &payload[from..]);
            }
            match frame[0] {
                1 if (u16_at(payload, 0), u16_at(payload, 2)) == DELIVER => {
                    // Behind the consumer's name, "c".
                    let tag = u64_at(payload, 6);
                    if self.is_stream && tag.is_multiple_of(ACK_EVERY) {
                        ack = Some(tag);
                    }
                }
                1 => return Err(format!("the broker says {:?}", String::from_utf8_lossy(payload))),
                2 => (self.body_left, self.begins) = (u64_at(payload, 4), true),
                3 => {
                    let (length, begins) = (payload.len() as u64, std::mem::take(&mut self.begins));
                    let numbers = begins.then(|| (number(payload, b"{\"n\": "), number_of_time(payload)));
                    self.body_left -= length;
                    if let Some((number, time)) = numbers {
                        self.judge(number, time)?;
                    }
                    self.count += u64::from(self.body_left == 0);
                }
                _ => {}
            }
        }
        if let Some(tag) = ack {
            self.connection.put(1, (60, 80), &[&tag.to_be_bytes()[..], &[1]].concat());
        }
        Ok(())
    }

    fn judge(&mut self, number: u64, time: u64) -> Result<(), String> {
        if let Some(clock) = self.expectation.clock {
            let now = u64::try_from((self.now - clock).as_nanos()).unwrap_or(u64::MAX);
            self.log.latencies.push(now.saturating_sub(time));
        }
        if self.expectation.is_ordered {
            match self.log.runs.last_mut() {
                Some((_, last)) if number == *last + 1 => *last = number,
                None if number != 1 => return Err(format!("row {number} came first")),
                _ => self.log.runs.push((number, number)),
            }
            // Some more are awaited, for what they tell about the fault.
            return if self.log.runs.len() < RUNS_TOLD { Ok(()) } else { Err(out_of_order(&self.log.runs)) };
        }
        match self.seen.get_mut(usize::try_from(number).unwrap_or(usize::MAX)) {
            Some(seen) if !*seen => *seen = true,
            _ => return Err(format!("row {number} came twice, or was never sent")),
        }
        Ok(())
    }
}

fn out_of_order(runs: &[(u64, u64)]) -> String {
    let runs: Vec<String> = runs.iter().map(|(first, last)| format!("{first} to {last}")).collect();
    format!("rows came out of order: {}", runs.join(", "))
}

/// The digits behind a known beginning; 0 when it begins otherwise.
fn number(payload: &[u8], beginning: &[u8]) -> u64 {
    let digits = payload.strip_prefix(beginning).unwrap_or_default().iter();
    digits.take_while(|byte| byte.is_ascii_digit()).fold(0, |number, byte| number * 10 + u64::from(byte - b'0'))
}

/// The second field of a payload that has one: when it was sent.
fn number_of_time(payload: &[u8]) -> u64 {
    let comma = payload.iter().position(|byte| *byte == b',').unwrap_or(payload.len());
    number(&payload[comma..], b", \"t\": ")
}

/// FNV-1a.
fn hash(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
