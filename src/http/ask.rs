//! One question by HTTP, to a relay's own probes or to a broker's management API.
//!
//! The trap: an answer has no end of its own. HTTP/1.0 ends it by closing, so there are no chunks to put together; size and
//! time are limited here.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

/// Bindings of an exchange with thousands of queues.
const ANSWER_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// For one answer.
const WITHIN: Duration = Duration::from_secs(5);

/// Asks and returns status code and body.
///
/// # Errors
/// In words.
pub async fn ask<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    host: &str,
    path: &str,
    authorization: Option<&str>,
) -> Result<(u16, Vec<u8>), String> {
    let authorization = authorization.map(|value| format!("Authorization: {value}\r\n")).unwrap_or_default();
    let request = format!("GET {path} HTTP/1.0\r\nHost: {host}\r\nAccept: application/json\r\n{authorization}\r\n");
    let mut answer = Vec::new();
    let asking = async {
        stream.write_all(request.as_bytes()).await?;
        stream.flush().await?;
        (&mut stream).take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await
    };
    timeout(WITHIN, asking).await.map_err(|_| "no answer".to_owned())?.map_err(|error| error.to_string())?;
    parse(&answer).ok_or_else(|| "an answer that is not HTTP".to_owned())
}

fn parse(answer: &[u8]) -> Option<(u16, Vec<u8>)> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(answer.get(..end)?).ok()?;
    let status = head.strip_prefix("HTTP/")?.split(' ').nth(1)?.parse().ok()?;
    Some((status, answer.get(end + 4..)?.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_its_code_and_its_body() {
        assert_eq!(parse(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n{}"), Some((200, b"{}".to_vec())));
        assert_eq!(parse(b"HTTP/1.0 503 x\r\n\r\n"), Some((503, Vec::new())));
        for odd in [&b""[..], b"HTTP/1.1 200 OK\r\n", b"AMQP\r\n\r\n", b"HTTP/1.1\r\n\r\n"] {
            assert_eq!(parse(odd), None);
        }
    }
}
