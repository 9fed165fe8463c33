//! A broker far away: a TCP proxy that holds back every byte for a time, and loses nothing of the bandwidth.
//!
//! The trap: a proxy that sleeps between reads delays the first byte and throttles the rest. Here one thread reads and
//! notes the time, another writes when it has come.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

const PIECE_BYTES: usize = 64 * 1024;

/// On the way at once: 64 MB, which no window here fills.
const PIECES_MAX: usize = 1024;

/// Listens as long as the bench runs; the port. Each direction takes so long.
pub(crate) fn proxy(target: u16, one_way: Duration) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, target)) else { continue };
            pipe(&client, &server, one_way);
            pipe(&server, &client, one_way);
        }
    });
    port
}

fn pipe(from: &TcpStream, to: &TcpStream, one_way: Duration) {
    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    to.set_nodelay(true).unwrap();
    let (pieces, due) = sync_channel(PIECES_MAX);
    thread::spawn(move || take(from, &pieces, one_way));
    thread::spawn(move || give(to, &due));
}

fn take(mut from: TcpStream, pieces: &SyncSender<(Instant, Vec<u8>)>, one_way: Duration) {
    let mut buffer = vec![0; PIECE_BYTES];
    while let Ok(count) = from.read(&mut buffer) {
        if count == 0 || pieces.send((Instant::now() + one_way, buffer[..count].to_vec())).is_err() {
            return;
        }
    }
}

fn give(mut to: TcpStream, pieces: &Receiver<(Instant, Vec<u8>)>) {
    for (due, piece) in pieces {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if to.write_all(&piece).is_err() {
            break;
        }
    }
    // The end of what the other side had to say; or nobody listens any more.
    let _ = to.shutdown(Shutdown::Both);
}
