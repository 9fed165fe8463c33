//! Clients of the probe port that mean harm or are merely slow: the relay goes on, and sheds them.
//!
//! The trap: a client that was shed is the only proof. A relay that kept them all would answer as well, until the file
//! descriptors are gone.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::support::consumer::Consumer;
use crate::support::relay::{Relay, Way};
use crate::support::{Outbox, eventually, shared_postgres, shared_rabbitmq};

/// Of each kind; below the usual limit of 1024 file descriptors all together.
const CLIENTS: usize = 200;

/// The 64 connections, and what the relay opens and closes by itself.
const DESCRIPTORS_MAX: usize = 64 + 16;

const MEMORY_KIB_MAX: u64 = 32 * 1024;

/// Until the relay closes.
async fn hold(stream: &mut TcpStream) -> io::Result<()> {
    while stream.read(&mut [0; 4096]).await? > 0 {}
    Ok(())
}

/// Never says a word.
async fn mute(mut stream: TcpStream) -> io::Result<()> {
    hold(&mut stream).await
}

/// A header that goes on, byte by byte: no pause is long.
async fn slow(mut stream: TcpStream) -> io::Result<()> {
    stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nX: ").await?;
    loop {
        stream.write_all(b"x").await?;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A header without an end, as fast as it goes.
async fn huge(mut stream: TcpStream) -> io::Result<()> {
    stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nX: ").await?;
    loop {
        stream.write_all(&[b'x'; 1024]).await?;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Asks on and on, and reads no answer.
async fn deaf(mut stream: TcpStream) -> io::Result<()> {
    loop {
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").await?;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn descriptors(relay: &Relay) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", relay.pid())).unwrap().count()
}

/// `CLIENTS` of this kind come, messages flow meanwhile, and all of the clients are shed.
async fn survives<F>(harm: fn(TcpStream) -> F)
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let outbox = Outbox::create(shared_postgres(), shared_rabbitmq()).await;
    let consumer = Consumer::start(&outbox).await;
    let relay = Relay::start(&outbox);
    relay.ready().await;
    outbox.insert("before").await;
    consumer.wait_distinct(1).await;
    let (opened, peak) = (descriptors(&relay), relay.peak_memory_kib().unwrap());

    let shed = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let stream = TcpStream::connect(("127.0.0.1", relay.port())).await.unwrap();
        let shed = shed.clone();
        clients.spawn(async move {
            // Closed or reset: both is shed.
            let _ = harm(stream).await;
            shed.fetch_add(1, Ordering::SeqCst);
        });
    }
    let most = AtomicUsize::new(0);
    eventually("all are shed", || async {
        let next = consumer.distinct() + 1;
        outbox.insert("meanwhile").await;
        consumer.wait_distinct(next).await;
        most.fetch_max(descriptors(&relay), Ordering::SeqCst);
        shed.load(Ordering::SeqCst) == CLIENTS
    })
    .await;
    let most = most.into_inner();
    assert!(most <= opened + DESCRIPTORS_MAX, "{opened} file descriptors became {most}");
    let grown = relay.peak_memory_kib().unwrap() - peak;
    assert!(grown < MEMORY_KIB_MAX, "{grown} KiB more");
    relay.ready().await;
    eventually("their places are free", || async { descriptors(&relay) <= opened + 2 }).await;
    assert_eq!(relay.stop(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_say_nothing_are_shed() {
    survives(mute).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_send_a_header_byte_by_byte_are_shed() {
    survives(slow).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_whose_header_never_ends_are_shed() {
    survives(huge).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_never_read_are_shed() {
    survives(deaf).await;
}

/// Says nothing, and comes again when it was shed.
async fn linger(port: u16) {
    loop {
        if let Ok(stream) = TcpStream::connect(("127.0.0.1", port)).await {
            let _ = mute(stream).await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_never_go_leave_a_relay_the_few_file_descriptors_that_it_needs() {
    const DESCRIPTORS: usize = 40;
    let outbox = Outbox::create(shared_postgres(), shared_rabbitmq()).await;
    let consumer = Consumer::start(&outbox).await;
    let under = ["prlimit", &format!("--nofile={DESCRIPTORS}:{DESCRIPTORS}"), "--"].map(str::to_owned).into();
    let relay = Relay::start_by(Way { under, ..Way::default() }, &outbox, &[]);
    relay.ready().await;
    let opened = descriptors(&relay);
    let mut clients = JoinSet::new();
    (0..2 * DESCRIPTORS).for_each(|_| _ = clients.spawn(linger(relay.port())));
    eventually("they have what they can have", || async { descriptors(&relay) >= opened + DESCRIPTORS / 4 }).await;
    // A new session needs new ones.
    let sql = "select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = ";
    outbox.sql(&format!("{sql}'{}'", outbox.name)).await;
    outbox.insert("placed").await;
    consumer.wait_distinct(1).await;
    drop(clients);
    relay.ready().await;
    assert_eq!(relay.stop(), 0);
}
