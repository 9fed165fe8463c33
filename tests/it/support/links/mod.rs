//! Proxies between a relay and its two servers: they inject network faults, and assert all the time what passes through.
//!
//! The traps. Faults on bytes alone show that a relay survives, not that it was right meanwhile: so the frames are read as
//! well, and a `Ledger` compares what Postgres is told with what the broker confirmed. A proxy on an ephemeral port that
//! goes away can be met by a client that connects to itself: so the ports lie below that range. And an unfair proxy proves
//! nothing: what it swallowed, it never delivers later; the connection is reset.

pub(crate) mod amqp;
pub(crate) mod ledger;
pub(crate) mod postgres;
pub(crate) mod toxics;

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

pub(crate) use ledger::Ledger;
pub(crate) use toxics::Toxics;
use toxics::{Countdowns, Flow, Setting};

/// Of the receiving end of a slow link, where its kernel has megabytes otherwise.
const SLOW_BUFFER_BYTES: usize = 64 * 1024;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the relay to the server.
    Up,
    /// From the server to the relay.
    Down,
}

/// What a toxic may single out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `basic.ack` or `basic.nack`, on its way to the relay.
    Confirm,
    /// A standby status, on its way to Postgres.
    Status,
    Other,
}

/// One connection's protocol, told apart into frames. Both directions share it.
pub(crate) trait Protocol: Send {
    /// Takes the next whole frame out of the bytes, if there is one. Bytes that are not inspected are one frame.
    fn split(&mut self, direction: Direction, bytes: &mut BytesMut) -> Option<Bytes>;
    fn kind(&self, direction: Direction, frame: &[u8]) -> Kind;
    /// What comes from the relay is inspected when it is read, what goes to the relay when it is written.
    fn inspect(&mut self, direction: Direction, frame: &[u8]);
}

#[derive(Clone, Copy)]
enum Server {
    Postgres,
    RabbitMq,
}

struct Shared {
    server: Server,
    server_port: AtomicU16,
    ledger: Ledger,
    refuse: AtomicBool,
    accepted: AtomicU64,
    countdowns: Countdowns,
    setting: watch::Sender<Setting>,
    cut: watch::Sender<u64>,
}

/// One proxy on 127.0.0.1. Dropped: closes everything.
pub(crate) struct Link {
    port: u16,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Link {
    pub(crate) async fn to_postgres(server_port: u16, ledger: &Ledger) -> Self {
        Self::start(Server::Postgres, server_port, ledger).await
    }

    pub(crate) async fn to_rabbitmq(server_port: u16, ledger: &Ledger) -> Self {
        Self::start(Server::RabbitMq, server_port, ledger).await
    }

    async fn start(server: Server, server_port: u16, ledger: &Ledger) -> Self {
        let listener = listen().await;
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            server,
            server_port: AtomicU16::new(server_port),
            ledger: ledger.clone(),
            refuse: AtomicBool::new(false),
            accepted: AtomicU64::new(0),
            countdowns: Countdowns::default(),
            setting: watch::Sender::default(),
            cut: watch::Sender::default(),
        });
        let task = tokio::spawn(accept(listener, shared.clone()));
        Self { port, shared, task }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// New connections go there.
    pub(crate) fn retarget(&self, server_port: u16) {
        self.shared.server_port.store(server_port, Ordering::SeqCst);
    }

    /// Applies at once, to live and to new connections.
    pub(crate) fn set(&self, toxics: Toxics) {
        self.shared.countdowns.set(&toxics);
        self.shared.setting.send_modify(|setting| {
            setting.generation += 1;
            setting.toxics = toxics;
        });
    }

    /// No toxics. What waits goes on; connections that lost bytes are reset.
    pub(crate) fn heal(&self) {
        self.set(Toxics::default());
    }

    /// Resets all live connections, on both sides.
    pub(crate) fn cut(&self) {
        self.shared.cut.send_modify(|cuts| *cuts += 1);
    }

    /// From now on new connections are accepted and reset at once, or not.
    pub(crate) fn refuse(&self, refuse: bool) {
        self.shared.refuse.store(refuse, Ordering::SeqCst);
    }

    /// Accepted since the start.
    pub(crate) fn connections(&self) -> u64 {
        self.shared.accepted.load(Ordering::SeqCst)
    }
}

async fn listen() -> TcpListener {
    loop {
        // A stranger may take the port between the look and the bind.
        let port = pgoutbox::servers::Port::pick().unwrap();
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port.number())).await {
            return listener;
        }
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    // Dropped with this task: all connections end.
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        shared.accepted.fetch_add(1, Ordering::SeqCst);
        if shared.refuse.load(Ordering::SeqCst) {
            let _ = client.set_zero_linger();
            continue;
        }
        // Subscribed before the next await: a cut or a toxic that comes now counts.
        let (setting, cut) = (shared.setting.subscribe(), shared.cut.subscribe());
        connections.spawn(serve(client, shared.clone(), setting, cut));
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(
    mut client: TcpStream,
    shared: Arc<Shared>,
    setting: watch::Receiver<Setting>,
    mut cut: watch::Receiver<u64>,
) {
    let Ok(mut server) = TcpStream::connect(("127.0.0.1", shared.server_port.load(Ordering::SeqCst))).await else {
        let _ = client.set_zero_linger();
        return;
    };
    // What the kernel takes for us has not gone anywhere.
    if setting.borrow().toxics.bandwidth_up.is_some() {
        let _ = SockRef::from(&client).set_recv_buffer_size(SLOW_BUFFER_BYTES);
    }
    if setting.borrow().toxics.bandwidth_down.is_some() {
        let _ = SockRef::from(&server).set_recv_buffer_size(SLOW_BUFFER_BYTES);
    }
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let protocol: Mutex<Box<dyn Protocol>> = Mutex::new(match shared.server {
        Server::Postgres => Box::new(postgres::Connection::new(shared.ledger.clone())),
        Server::RabbitMq => Box::new(amqp::Connection::new(shared.ledger.clone())),
    });
    let is_reset = {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        let countdowns = &shared.countdowns;
        let up = Flow::new(Direction::Up, from_client, to_server, &protocol, countdowns, setting.clone());
        let down = Flow::new(Direction::Down, from_server, to_client, &protocol, countdowns, setting);
        tokio::select! {
            biased;
            _ = cut.changed() => true,
            ended = futures_util::future::try_join(up.run(), down.run()) => ended.is_err(),
        }
    };
    if is_reset {
        let _ = client.set_zero_linger();
        let _ = server.set_zero_linger();
    }
}
