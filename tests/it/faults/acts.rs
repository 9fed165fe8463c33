//! What a round can do to its processes, servers and links. Each act ends with all well again, unless its name says otherwise.

use std::time::Duration;

use nix::sys::signal::Signal;

use super::arena::Round;
use crate::support::links::{Link, Toxics};
use crate::support::{connect, eventually};

/// Longer than Postgres and the broker wait for a silent relay here (6 s, and twice 4 s).
pub(super) const TIMEOUTS: Duration = Duration::from_secs(9);

/// For `rabbitmqctl eval` before a node is killed. RabbitMQ 3.10 writes its directory of quorum queues when nothing has
/// touched it for half a second (dets' auto_save in Ra); a node killed before that comes back with a queue that never finds
/// its leader. And now and then it comes back without the binding that was made last, a second or two before, and confirms
/// rightly what goes to the other queues alone. Its own losses, not ours to try.
pub(super) const SYNC: &str = "[dets:sync(T) || T <- dets:all()], mnesia:dump_log().";

/// One of the two links.
#[derive(Clone, Copy, Debug)]
pub(super) enum Side {
    Postgres,
    RabbitMq,
}

impl Round {
    pub(super) async fn kill_relay(&mut self) {
        self.moment().await;
        self.take_relay().kill();
        self.start_relay();
    }

    /// A deploy: nothing may come twice.
    pub(super) async fn restart_relay(&mut self) {
        self.moment().await;
        let code = self.take_relay().stop();
        if code != 0 {
            self.complaints.push(format!("SIGTERM ended with {code}"));
        }
        self.start_relay();
    }

    pub(super) async fn freeze_relay(&mut self, long: Duration) {
        self.relay().signal(Signal::SIGSTOP);
        tokio::time::sleep(long).await;
        self.relay().signal(Signal::SIGCONT);
    }

    /// SIGKILL to the postmaster and all its processes.
    pub(super) async fn kill_postgres(&mut self) {
        self.moment().await;
        self.site.postgres.kill().unwrap();
        self.site.postgres.start_again().unwrap();
        self.reconnect().await;
    }

    pub(super) async fn restart_postgres(&mut self, mode: &str) {
        self.moment().await;
        self.stop_postgres(mode).await;
        self.start_postgres().await;
    }

    /// I14: in whatever state the broker is. Left stopped.
    pub(super) async fn stop_postgres(&mut self, mode: &str) {
        let took = self.site.postgres.stop(mode, Duration::from_secs(20)).unwrap();
        if took > Duration::from_secs(5) {
            self.complaints.push(format!("a {mode} stop of Postgres took {took:?}"));
        }
    }

    pub(super) async fn start_postgres(&mut self) {
        self.site.postgres.start_again().unwrap();
        self.reconnect().await;
    }

    pub(super) async fn reconnect(&mut self) {
        self.outbox.client = connect(&self.outbox.url).await;
    }

    pub(super) async fn terminate_walsender(&mut self) {
        self.moment().await;
        let sql = format!(
            "select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = '{}'",
            self.outbox.name
        );
        self.outbox.sql(&sql).await;
    }

    /// SIGKILL. Left dead.
    pub(super) async fn end_broker(&mut self) {
        self.site.rabbitmq.ctl(&["eval", SYNC]).unwrap();
        self.moment().await;
        self.site.rabbitmq.kill().unwrap();
    }

    pub(super) async fn kill_broker(&mut self, away: Duration) {
        self.end_broker().await;
        if !away.is_zero() {
            self.lasts(away).await;
        }
        self.site.rabbitmq.start_again().unwrap();
    }

    pub(super) async fn freeze_broker(&mut self, long: Duration) {
        self.site.rabbitmq.freeze().unwrap();
        self.lasts(long).await;
        self.site.rabbitmq.thaw().unwrap();
    }

    /// A memory alarm: publishers are blocked.
    pub(super) async fn alarm(&mut self, long: Duration) {
        self.site.rabbitmq.ctl(&["set_vm_memory_high_watermark", "0.000001"]).unwrap();
        self.lasts(long).await;
        self.site.rabbitmq.ctl(&["set_vm_memory_high_watermark", "absolute", "1GB"]).unwrap();
    }

    /// A disk alarm: publishers are blocked as well, and it is said.
    pub(super) async fn disk_alarm(&mut self, long: Duration) {
        self.site.rabbitmq.ctl(&["set_disk_free_limit", "10000GB"]).unwrap();
        let says = || async { self.relay().get("/readyz").1.contains("blocks publishers") };
        eventually("readiness names the alarm", says).await;
        self.lasts(long).await;
        self.site.rabbitmq.ctl(&["set_disk_free_limit", "50MB"]).unwrap();
    }

    pub(super) async fn close_all_connections(&mut self) {
        self.moment().await;
        self.site.rabbitmq.ctl(&["close_all_connections", "maintenance"]).unwrap();
    }

    pub(super) fn link(&self, side: Side) -> &Link {
        match side {
            Side::Postgres => &self.to_postgres,
            Side::RabbitMq => &self.to_rabbitmq,
        }
    }

    /// The network does this for so long.
    pub(super) async fn toxic(&mut self, side: Side, toxics: Toxics, long: Duration) {
        self.moment().await;
        self.link(side).set(toxics);
        tokio::time::sleep(long).await;
        self.link(side).heal();
    }

    /// Bytes vanish without a word; the relay must notice by itself and say so.
    pub(super) async fn black_hole(&mut self, side: Side, up: bool, down: bool) {
        self.moment().await;
        self.link(side).set(Toxics { black_hole_up: up, black_hole_down: down, ..Toxics::default() });
        eventually("readiness ends", || async { !self.relay().is_ready() }).await;
        self.link(side).heal();
    }

    /// Reset at a random byte on its way to the relay, a few times: in the greeting, or in what follows.
    pub(super) async fn resets(&mut self, side: Side, times: u32) {
        // A broker says little: a greeting, and one ack of 21 bytes for many messages.
        let most = match side {
            Side::Postgres => 20_000,
            Side::RabbitMq => 2_000,
        };
        for _ in 0..times {
            let after = self.random.u64(1..most);
            let before = self.link(side).connections();
            self.link(side).set(Toxics { reset_after: Some(after), ..Toxics::default() });
            eventually("it is reset", || async { self.link(side).connections() > before }).await;
            self.link(side).heal();
            self.flowing(1).await;
        }
    }

    pub(super) async fn cut(&mut self, side: Side) {
        self.moment().await;
        self.link(side).cut();
    }
}
