//! One TCP address that leads to one server after the other, as a DNS name or a virtual IP does in a failover.
//!
//! The trap: an address that only leads *new* connections elsewhere lets a test of the old primary pass on connections that
//! are long gone in the field. So a change of the target cuts what is open.

use std::sync::{Arc, Mutex};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// A forwarder on a port of its own.
pub(crate) struct Address {
    port: u16,
    /// New connections go to these in turn.
    targets: Arc<Mutex<Vec<u16>>>,
    cut: watch::Sender<u64>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Address {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Address {
    pub(crate) async fn of(target: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let targets = Arc::new(Mutex::new(vec![target]));
        let (cut, cuts) = watch::channel(0);
        let turns = targets.clone();
        let task = tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let mut cuts = cuts.clone();
                cuts.mark_unchanged();
                let target = {
                    let mut targets = turns.lock().unwrap();
                    targets.rotate_left(1);
                    *targets.last().unwrap()
                };
                tokio::spawn(async move {
                    let Ok(mut server) = TcpStream::connect(("127.0.0.1", target)).await else { return };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                        _ = cuts.changed() => {}
                    }
                });
            }
        });
        Self { port, targets, cut, task }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// From now on it leads there.
    pub(crate) fn lead_to(&self, target: u16) {
        self.lead_in_turn(&[target]);
    }

    /// From now on each new connection goes to the next of these, as a name with several addresses does.
    pub(crate) fn lead_in_turn(&self, targets: &[u16]) {
        *self.targets.lock().unwrap() = targets.to_vec();
        self.cut.send_modify(|cut| *cut += 1);
    }
}
