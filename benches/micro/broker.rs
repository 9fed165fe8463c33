//! A broker that reads everything and confirms it at once: what is left is our own cost.
//!
//! It allocates nothing while it runs, because allocations are counted.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};

const BUFFER_BYTES: usize = 1 << 20;
const FRAME_OVERHEAD: usize = 8;

/// Serves one connection after the other, for ever; the port.
pub(crate) fn start() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut buffer = vec![0; BUFFER_BYTES];
        for stream in listener.incoming().flatten() {
            // It ends when the client goes.
            let _ = serve(stream, &mut buffer);
        }
    });
    port
}

fn serve(mut stream: TcpStream, buffer: &mut [u8]) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.read_exact(&mut buffer[..8])?;
    // connection.start: version 0-9, no properties, PLAIN, en_US.
    stream.write_all(&method(0, (10, 10), b"\x00\x09\0\0\0\0\0\0\0\x05PLAIN\0\0\0\x05en_US"))?;
    let (mut start, mut end) = (0, 0);
    let (mut tag, mut confirmed) = (0_u64, 0_u64);
    loop {
        while let Some(length) = whole(&buffer[start..end]) {
            let frame = &buffer[start..start + length];
            start += length;
            if frame[0] != 1 {
                continue;
            }
            match (u16::from_be_bytes([frame[7], frame[8]]), u16::from_be_bytes([frame[9], frame[10]])) {
                (60, 40) => tag += 1,
                // start-ok: tune; no limit on channels, frames of 128 KiB, no heartbeats.
                (10, 11) => stream.write_all(&method(0, (10, 30), &[0, 0, 0, 2, 0, 0, 0, 0]))?,
                (10, 31) => {}
                (10, 40) => stream.write_all(&method(0, (10, 41), &[0]))?,
                (10, 50) => return stream.write_all(&method(0, (10, 51), &[])),
                (20, 10) => stream.write_all(&method(1, (20, 11), &[0; 4]))?,
                (class, number) => stream.write_all(&method(1, (class, number + 1), &[]))?,
            }
        }
        if tag > confirmed {
            confirmed = tag;
            let mut ack = *b"\x01\0\x01\0\0\0\x0d\0\x3c\0\x50\0\0\0\0\0\0\0\0\x01\xce";
            ack[11..19].copy_from_slice(&tag.to_be_bytes());
            stream.write_all(&ack)?;
        }
        buffer.copy_within(start..end, 0);
        (start, end) = (0, end - start);
        let count = stream.read(&mut buffer[end..])?;
        if count == 0 {
            return Ok(());
        }
        end += count;
    }
}

/// The length of the first frame, if all of it is here.
fn whole(input: &[u8]) -> Option<usize> {
    let size = u32::from_be_bytes(input.get(3..7)?.try_into().ok()?) as usize;
    let length = size + FRAME_OVERHEAD;
    (input.len() >= length).then_some(length)
}

fn method(channel: u8, (class, number): (u16, u16), arguments: &[u8]) -> Vec<u8> {
    let size = u32::try_from(arguments.len() + 4).unwrap().to_be_bytes();
    [&[1, 0, channel], &size[..], &class.to_be_bytes(), &number.to_be_bytes(), arguments, &[0xCE]].concat()
}
