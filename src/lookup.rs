//! Names to addresses, by the system's resolver, few at a time.
//!
//! The trap: `getaddrinfo(3)` cannot be called off. An attempt that gives up on a name server that never answers leaves a
//! thread behind that asks on, for as long as `resolv.conf` says, and the next attempt would begin another.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};

use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

/// At once for one peer. A lookup that hangs hears nothing of a file that has changed since, so several may try; as the
/// system is set up by default, three are under way at most.
const LOOKUPS_MAX: usize = 8;

/// The lookups of one peer's names.
pub(crate) struct Lookups(Semaphore);

impl Lookups {
    /// None yet.
    pub(crate) const fn new() -> Self {
        Self(Semaphore::const_new(LOOKUPS_MAX))
    }

    /// Every address of the name, in the resolver's order. Waits while too many lookups are under way; whoever gives up
    /// waiting leaves a lookup that has begun to itself.
    ///
    /// # Errors
    /// The resolver's.
    pub(crate) async fn of(&'static self, name: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        if let Ok(address) = name.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        let name = name.to_owned();
        self.ask(move || Ok((name.as_str(), port).to_socket_addrs()?.collect())).await
    }

    async fn ask<T: Send + 'static>(
        &'static self,
        resolver: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let place = self.0.acquire().await.map_err(io::Error::other)?;
        let asked = spawn_blocking(move || {
            let answer = resolver();
            // Free when the resolver has answered, and not when nobody waits for it any more.
            drop(place);
            answer
        });
        asked.await.map_err(io::Error::other)?
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn lookups_that_hang_are_given_up_and_do_not_pile_up() {
        static LOOKUPS: Lookups = Lookups::new();
        static BEGUN: AtomicUsize = AtomicUsize::new(0);
        let mut hanging = Vec::new();
        for _ in 0..2 * LOOKUPS_MAX {
            let (answer, awaited) = mpsc::channel();
            let lookup = LOOKUPS.ask(move || {
                BEGUN.fetch_add(1, Ordering::SeqCst);
                awaited.recv().map_err(io::Error::other)
            });
            assert!(timeout(Duration::from_millis(20), lookup).await.is_err(), "nobody answered");
            hanging.push(answer);
        }
        assert!(BEGUN.load(Ordering::SeqCst) <= LOOKUPS_MAX);
        hanging.iter().for_each(|answer| _ = answer.send(()));
        assert_eq!(LOOKUPS.ask(|| Ok(7)).await.unwrap(), 7);
        assert_eq!(LOOKUPS.of("127.0.0.1", 5).await.unwrap(), ["127.0.0.1:5".parse().unwrap()]);
    }
}
