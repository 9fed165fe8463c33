//! Connecting, with a hold on the socket that lapin does not give.
//!
//! The trap: lapin serves a connection from a thread of its own, which goes on when the future that connects is dropped and
//! when a connection that the broker blocks is closed. A broker that hangs for a night would leave a thread and a socket
//! behind for every attempt. So a second handle of the socket stays here, and shutting it down ends the thread.

use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use lapin::tcp::{AsyncTcpStream, OwnedTLSConfig};
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Connection, ConnectionProperties};
use tokio::net::lookup_host;
use tokio::time::timeout;

use super::{ANSWER_TIMEOUT, answer, explain, host};
use crate::sink::Error;

/// A second handle of a connection's socket. Dropped: the socket is shut down.
#[derive(Debug, Default)]
pub(super) struct Leash(Arc<Mutex<Option<TcpStream>>>);

impl Drop for Leash {
    fn drop(&mut self) {
        if let Some(socket) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // Already closed: all the better.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

/// Opens a connection, within the deadline.
pub(super) async fn connect(uri: &AMQPUri, properties: ConnectionProperties) -> Result<(Connection, Leash), Error> {
    let unreachable = |problem: String| Error::Unreachable { host: host(uri), problem };
    let runtime = lapin::runtime::default_runtime().map_err(|error| unreachable(explain(&error)))?;
    let leash = Leash::default();
    let handle = leash.0.clone();
    let connecting = Connection::connector(
        uri.clone(),
        runtime,
        async move |uri: AMQPUri, runtime| {
            let reach = async {
                let mut last = std::io::Error::from(std::io::ErrorKind::NotFound);
                for address in lookup_host((uri.authority.host.as_str(), uri.authority.port)).await? {
                    match AsyncTcpStream::connect(&runtime, address).await {
                        Ok(stream) => return Ok(stream),
                        Err(error) => last = error,
                    }
                }
                Err(last)
            };
            let stream = timeout(ANSWER_TIMEOUT, reach).await.map_err(std::io::Error::from)??;
            if let AsyncTcpStream::Plain(plain) = &stream {
                plain.get_ref().set_nodelay(true)?;
                let socket = TcpStream::from(plain.get_ref().as_fd().try_clone_to_owned()?);
                *handle.lock().unwrap_or_else(PoisonError::into_inner) = Some(socket);
            }
            match uri.scheme {
                AMQPScheme::AMQP => Ok(stream),
                AMQPScheme::AMQPS => {
                    let tls = OwnedTLSConfig::default();
                    Ok(stream.into_tls(&uri.authority.host, tls.as_ref()).await?)
                }
            }
        },
        properties,
    );
    let connection = answer("connecting", connecting).await?.map_err(|error| unreachable(explain(&error)))?;
    Ok((connection, leash))
}
