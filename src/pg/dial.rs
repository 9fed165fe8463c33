//! From a host to a socket: names to addresses, TCP and Unix sockets, keepalives.
//!
//! The trap: without keepalives and `TCP_USER_TIMEOUT` a peer that lost its power is a peer that is still thinking. The
//! relay has deadlines of its own above this; these are libpq's, for those who set them.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::client::TlsStream;

use super::conninfo::Values;
use super::settings::Host;
use crate::lookup::Lookups;

static LOOKUPS: Lookups = Lookups::new();

/// What libpq lets an operator say about TCP.
#[derive(Clone, Debug)]
pub(super) struct Tcp {
    keepalive: Option<TcpKeepalive>,
    user_timeout: Option<Duration>,
}

impl Tcp {
    pub(super) fn read(values: &Values) -> Result<Self, String> {
        // To libpq zero and less is "as the system has it".
        let positive = |keyword| {
            Ok::<_, String>(values.number::<i64>(keyword)?.and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0))
        };
        let mut keepalive = TcpKeepalive::new();
        if let Some(seconds) = positive("keepalives_idle")? {
            keepalive = keepalive.with_time(Duration::from_secs(seconds.into()));
        }
        if let Some(seconds) = positive("keepalives_interval")? {
            keepalive = keepalive.with_interval(Duration::from_secs(seconds.into()));
        }
        if let Some(count) = positive("keepalives_count")? {
            keepalive = keepalive.with_retries(count);
        }
        let is_on = values.number::<i64>("keepalives")? != Some(0);
        let user_timeout = positive("tcp_user_timeout")?.map(|millis| Duration::from_millis(millis.into()));
        Ok(Self { keepalive: is_on.then_some(keepalive), user_timeout })
    }
}

/// A host at one of its addresses: what was chosen, so that the second connection goes where the first one went.
#[derive(Clone, Debug)]
pub struct Place {
    /// The host as the settings name it.
    pub host: Host,
    pub(super) address: Address,
}

#[derive(Clone, Debug)]
pub(super) enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.address {
            Address::Tcp(address) if self.host.name.parse() != Ok(address.ip()) && !self.host.name.is_empty() => {
                write!(f, "{} ({})", self.host, address.ip())
            }
            _ => write!(f, "{}", self.host),
        }
    }
}

/// Every address of the host, in the resolver's order.
pub(super) async fn places(host: &Host) -> io::Result<Vec<Place>> {
    let place = |address| Place { host: host.clone(), address };
    if let Some(path) = host.socket() {
        return Ok(vec![place(Address::Unix(path))]);
    }
    if let Some(address) = host.address {
        return Ok(vec![place(Address::Tcp(SocketAddr::new(address, host.port)))]);
    }
    let addresses = LOOKUPS.of(&host.name, host.port).await?;
    Ok(addresses.into_iter().map(|address| place(Address::Tcp(address))).collect())
}

/// The transport: one of those that Postgres listens on.
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Socket {
    pub(super) async fn connect(place: &Place, tcp: &Tcp) -> io::Result<Self> {
        match &place.address {
            Address::Tcp(address) => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                let socket = SockRef::from(&stream);
                if let Some(keepalive) = &tcp.keepalive {
                    socket.set_tcp_keepalive(keepalive)?;
                    socket.set_keepalive(true)?;
                }
                if tcp.user_timeout.is_some() {
                    socket.set_tcp_user_timeout(tcp.user_timeout)?;
                }
                Ok(Socket::Tcp(stream))
            }
            Address::Unix(path) => Ok(Socket::Unix(UnixStream::connect(path).await?)),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            Socket::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
            Socket::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Socket::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
            Socket::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Socket::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Socket::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Socket::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Socket::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::Settings;

    #[tokio::test]
    async fn what_is_said_about_tcp_is_set_on_the_socket() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let socket = async |more: &str| {
            let settings = Settings::parse(&format!("host=127.0.0.1 port={port} user=u {more}"), |_| None).unwrap();
            let place = places(&settings.hosts[0]).await.unwrap().remove(0);
            let Socket::Tcp(stream) = Socket::connect(&place, &settings.tcp).await.unwrap() else { panic!("not TCP") };
            stream
        };
        let stream = socket("keepalives_idle=7 keepalives_interval=3 keepalives_count=2 tcp_user_timeout=4500").await;
        let set = SockRef::from(&stream);
        assert!(set.keepalive().unwrap());
        assert_eq!(set.tcp_keepalive_time().unwrap(), Duration::from_secs(7));
        assert_eq!(set.tcp_keepalive_interval().unwrap(), Duration::from_secs(3));
        assert_eq!(set.tcp_keepalive_retries().unwrap(), 2);
        assert_eq!(set.tcp_user_timeout().unwrap(), Some(Duration::from_millis(4500)));
        assert!(!SockRef::from(&socket("keepalives=0").await).keepalive().unwrap());
        assert!(SockRef::from(&socket("").await).keepalive().unwrap());
    }
}
