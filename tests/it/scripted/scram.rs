//! Servers that cheat at SCRAM: somebody in Postgres' place who does not know the password, or wants us busy.
//!
//! The trap: a client that proves itself and never asks for the other side's proof logs in just as well, everywhere, to
//! everybody.

use std::io;
use std::time::Duration;

use super::postgres::{From, Wire};
use super::stream::{Case, authentication};
use crate::support::eventually;

/// Of the user, and never in a log.
const PASSWORD: &str = "s3cret-password";

/// `salt salt salt salt`, in base64.
const SALT: &str = "c2FsdCBzYWx0IHNhbHQgc2FsdA==";

/// Asks for SCRAM; the nonce that the relay answers with.
fn nonce(wire: &mut Wire) -> io::Result<String> {
    wire.raw(&authentication(10, b"SCRAM-SHA-256\0\0"))?;
    let (tag, body) = wire.read()?;
    assert_eq!((tag, body.starts_with(b"SCRAM-SHA-256\0")), (b'p', true));
    Ok(String::from_utf8_lossy(&body).rsplit_once("r=").unwrap().1.to_owned())
}

/// The server's first message.
fn challenge(wire: &mut Wire, nonce: &str, rounds: u32) -> io::Result<()> {
    wire.raw(&authentication(11, format!("r={nonce},s={SALT},i={rounds}").as_bytes()))
}

/// The relay refuses this login, with these words, and stops.
async fn refused<S>(script: S, says: &str)
where
    S: Fn(&mut Wire) -> io::Result<()> + Send + Sync + 'static,
{
    let case = Case::start_as(&format!("postgres:{PASSWORD}@"), 1, From::Login, move |_, wire| script(wire)).await;
    eventually("the end", || async { case.relay.get("/livez").0 == 0 && case.postgres.streams() > 0 }).await;
    // Not reaped yet, so the kernel still tells. Ten million rounds take many seconds.
    let cpu = case.relay.cpu();
    assert!(cpu < Duration::from_secs(2), "{cpu:?}");
    assert!(!case.relay.log().contains(PASSWORD), "{}", case.relay.log());
    case.stops(78, &["cannot log in to Postgres", says]).await;
}

macro_rules! case {
    ($name:ident, $script:expr, $says:expr) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            refused($script, $says).await;
        }
    };
}

case!(
    a_server_whose_signature_is_wrong_is_not_logged_in_to,
    |wire: &mut Wire| {
        let nonce = nonce(wire)?;
        challenge(wire, &format!("{nonce}more"), 4096)?;
        wire.read()?;
        wire.raw(&authentication(12, b"v=AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="))?;
        wire.raw(&authentication(0, b""))?;
        wire.fall_silent()
    },
    "the server does not know the password"
);

case!(
    a_server_that_lets_us_in_without_its_signature_is_not_logged_in_to,
    |wire: &mut Wire| {
        let nonce = nonce(wire)?;
        challenge(wire, &format!("{nonce}more"), 4096)?;
        wire.read()?;
        wire.raw(&authentication(0, b""))?;
        wire.fall_silent()
    },
    "SCRAM went out of step"
);

case!(
    a_server_whose_nonce_does_not_begin_with_ours_gets_no_proof,
    |wire: &mut Wire| {
        nonce(wire)?;
        challenge(wire, "another", 4096)?;
        let answer = wire.read();
        assert!(answer.is_err(), "{answer:?}");
        Ok(())
    },
    "nonce"
);

case!(
    a_server_that_asks_for_ten_million_rounds_gets_none,
    |wire: &mut Wire| {
        let nonce = nonce(wire)?;
        challenge(wire, &format!("{nonce}more"), 10_000_000)?;
        wire.fall_silent()
    },
    "more than 100000 SCRAM iterations"
);
