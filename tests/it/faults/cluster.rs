//! Row 52: a broker of three nodes, of which one or two are killed, frozen or cut off; the relay knows all three.
//!
//! Judged is a quorum queue with a member on every node. Not a classic queue, which lives on one node, and not a stream: a
//! cluster that comes back lets publishers in before it has given the stream a leader, and a message that is routed to a
//! queue which is away goes to the others, and is confirmed. With RabbitMQ 3.10.8 two of five rounds of row 52c that judged a
//! stream as well missed messages, 1,009 and 1, all of them confirmed; in those seconds the broker called the stream's home
//! node "down or inaccessible" to its consumer. With the quorum queue alone none were missing.
//!
//! The trap: a cluster that an operator has to mend after each fault. By default a RabbitMQ that was cut in two stays so
//! until somebody restarts a part of it; these nodes pause instead when they are the smaller part, as RabbitMQ's own pages
//! advise for three, and what a node does that does not pause is tried by rows of its own.

use std::time::Duration;

use pgoutbox::servers::{Extras, RabbitMq};

use super::arena::{Round, Site};
use super::{FAILURE, Row, allow};
use crate::support::consumer::Kind;
use crate::support::eventually;
use crate::support::links::Link;

/// A majority is two.
pub(super) const NODES: usize = 3;

/// Nodes take a silent one for dead after 6 to 10 s, instead of 45 to 75.
const CONFIGURATION: &str = "cluster_partition_handling = pause_minority\nnet_ticktime = 8\n";

/// Longer than that, and than two heartbeats of relay and consumers.
const SILENCE: Duration = Duration::from_secs(12);

pub(super) const ROWS: &[Row] = &[
    Row {
        number: "52a",
        fault: "cluster of three: the relay's node killed (SIGKILL) under load, and started again",
        allowed: allow(FAILURE),
        run: |round| {
            Box::pin(async move {
                let node = round.random.usize(..NODES);
                round.serve_at(node).await;
                killed(round, node).await;
            })
        },
    },
    Row {
        number: "52b",
        fault: "cluster of three: the node that leads the queue killed, not the relay's, and started again",
        allowed: allow(FAILURE),
        run: |round| {
            Box::pin(async move {
                let leader = round.leader();
                round.serve_at(another(leader)).await;
                killed(round, leader).await;
            })
        },
    },
    Row {
        number: "52c",
        fault: "cluster of three: two nodes killed; the third pauses until they are back",
        allowed: allow(2 * FAILURE),
        run: |round| Box::pin(majority_killed(round, false)),
    },
    Row {
        number: "52d",
        fault: "cluster of three: two nodes killed; the third takes connections and can confirm nothing",
        allowed: allow(2 * FAILURE),
        run: |round| Box::pin(majority_killed(round, true)),
    },
    Row {
        number: "52e",
        fault: "cluster of three: the node that leads the queue frozen for longer than every timeout, then woken",
        allowed: allow(2 * FAILURE),
        run: |round| Box::pin(leader_frozen(round)),
    },
    Row {
        number: "52f",
        fault: "cluster of three: the relay's node cut off from the others; it pauses until it is let in again",
        allowed: allow(2 * FAILURE),
        run: |round| Box::pin(relays_node_cut_off(round, false)),
    },
    Row {
        number: "52g",
        fault: "cluster of three: the relay's node cut off from the others; it takes connections and can confirm nothing",
        allowed: allow(2 * FAILURE),
        run: |round| Box::pin(relays_node_cut_off(round, true)),
    },
];

/// A broker of so many nodes.
pub(super) fn start(nodes: usize) -> (RabbitMq, Vec<RabbitMq>) {
    if nodes == 1 {
        return (RabbitMq::start().unwrap(), Vec::new());
    }
    let extras = Extras { configuration: CONFIGURATION.to_owned(), ..Extras::default() };
    let first = RabbitMq::start_with(&extras).unwrap();
    let peers = (1..nodes).map(|_| first.peer(&extras).unwrap()).collect();
    (first, peers)
}

fn another(node: usize) -> usize {
    (node + 1) % NODES
}

async fn killed(round: &mut Round, node: usize) {
    round.moment().await;
    round.site.node_mut(node).kill().unwrap();
    round.goes_on().await;
    round.site.node_mut(node).start_again().unwrap();
}

/// Nothing is confirmed meanwhile. That nothing is told is the ledger's to say.
async fn majority_killed(round: &mut Round, is_open: bool) {
    let third = round.random.usize(..NODES);
    round.serve_at(third).await;
    if is_open {
        round.site.pauses(third, false);
    }
    let others = [another(third), another(another(third))];
    round.moment().await;
    for node in others {
        round.site.node_mut(node).kill().unwrap();
    }
    eventually("readiness ends", || async { !round.relay().is_ready() }).await;
    let confirms = round.ledger.counts().confirms;
    round.lasts(SILENCE).await;
    let confirmed = round.ledger.counts().confirms - confirms;
    if confirmed > 0 {
        round.complaints.push(format!("{confirmed} messages confirmed by one node of three"));
    }
    for node in others {
        round.site.node_mut(node).start_again().unwrap();
    }
    if is_open {
        round.site.pauses(third, true);
    }
}

/// With the relay at it, or at another.
async fn leader_frozen(round: &mut Round) {
    let leader = round.leader();
    let node = if round.random.bool() { leader } else { another(leader) };
    round.serve_at(node).await;
    round.moment().await;
    round.site.node(leader).freeze().unwrap();
    tokio::join!(round.goes_on(), tokio::time::sleep(SILENCE));
    round.site.node(leader).thaw().unwrap();
}

/// Not the node of the consumers, which is the one that leads: one that does not pause would keep them waiting.
async fn relays_node_cut_off(round: &mut Round, is_open: bool) {
    let node = another(round.leader());
    round.serve_at(node).await;
    if is_open {
        round.site.pauses(node, false);
    }
    round.moment().await;
    round.site.cut_off(node);
    round.goes_on().await;
    if is_open {
        // What RabbitMQ asks of the operator of such a node.
        round.site.node_mut(node).kill().unwrap();
        round.site.node_mut(node).start_again().unwrap();
    } else {
        round.site.let_in(node);
    }
}

impl Site {
    pub(super) fn nodes(&self) -> usize {
        1 + self.peers.len()
    }

    fn all(&self) -> impl Iterator<Item = &RabbitMq> {
        std::iter::once(&self.rabbitmq).chain(&self.peers)
    }

    fn node(&self, index: usize) -> &RabbitMq {
        if index == 0 { &self.rabbitmq } else { &self.peers[index - 1] }
    }

    fn node_mut(&mut self, index: usize) -> &mut RabbitMq {
        if index == 0 { &mut self.rabbitmq } else { &mut self.peers[index - 1] }
    }

    /// What rounds have queues of.
    pub(super) fn kinds(&self) -> &'static [Kind] {
        if self.peers.is_empty() { &[Kind::Classic, Kind::Quorum, Kind::Stream] } else { &[Kind::Quorum] }
    }

    /// For those who declare and consume: a random node first, which thereby leads the queue.
    pub(super) fn amqp(&self, random: &mut fastrand::Rng) -> String {
        if self.peers.is_empty() {
            return self.rabbitmq.url();
        }
        let mut urls: Vec<String> = self.all().map(|node| node.url() + "?heartbeat=4").collect();
        let leader = random.usize(..urls.len());
        urls.rotate_left(leader);
        urls.join(",")
    }

    pub(super) fn broker_log(&self) -> String {
        self.all().map(|node| format!("--- {}\n{}", node.node(), node.log())).collect()
    }

    /// How many nodes this one takes for running.
    fn running(&self, node: &RabbitMq) -> usize {
        let counted = node.ctl(&["eval", "length(rabbit_mnesia:cluster_nodes(running))."]);
        counted.ok().and_then(|counted| counted.trim().parse().ok()).unwrap_or(0)
    }

    async fn whole(&self) {
        let is_whole = async || self.all().all(|node| self.running(node) == self.nodes());
        eventually("the cluster is whole", is_whole).await;
    }

    /// Every node runs and knows it of the others, or next round's queues had fewer members; whether this could be had.
    ///
    /// A node that wakes up is back with the others before it has noticed that it was without them. So it does not pause, Mnesia
    /// takes the cluster for parted, and so it stays until the node is started again, as RabbitMQ then asks its operator.
    pub(super) async fn mend(&mut self) -> bool {
        const BY_ITSELF: Duration = Duration::from_secs(15);
        const STARTED: Duration = Duration::from_secs(60);
        if self.peers.is_empty() || tokio::time::timeout(BY_ITSELF, self.whole()).await.is_ok() {
            return true;
        }
        let alone: Vec<usize> = (0..NODES).filter(|index| self.running(self.node(*index)) <= NODES / 2).collect();
        println!("nodes {alone:?} see no majority and are started again");
        for index in alone {
            let node = self.node_mut(index);
            node.kill().unwrap();
            node.start_again().unwrap();
        }
        tokio::time::timeout(STARTED, self.whole()).await.is_ok()
    }

    /// Makes every node of a cluster write down which quorum queues it holds.
    pub(super) fn remember_queues(&self) {
        if !self.peers.is_empty() {
            self.all().for_each(|node| node.ctl(&["eval", super::acts::SYNC]).map(drop).unwrap());
        }
    }

    /// Whether the node pauses when it finds itself in the smaller part. Until it is started again.
    fn pauses(&self, node: usize, pauses: bool) {
        let handling = if pauses { "pause_minority" } else { "ignore" };
        let set = format!("application:set_env(rabbit, cluster_partition_handling, {handling}).");
        self.node(node).ctl(&["eval", &set]).unwrap();
    }

    /// The node speaks with no other node any more. What firewalls do, done by Erlang: it takes the others for strangers.
    fn cut_off(&self, node: usize) {
        let apart = "[begin erlang:set_cookie(N, apart), erlang:disconnect_node(N) end || N <- nodes()].";
        self.node(node).ctl(&["eval", apart]).unwrap();
    }

    /// And again it does.
    fn let_in(&self, node: usize) {
        let names: Vec<String> = self.all().map(|node| format!("'{}'", node.node())).collect();
        let again = format!("[erlang:set_cookie(N, erlang:get_cookie()) || N <- [{}], N =/= node()].", names.join(","));
        self.node(node).ctl(&["eval", &again]).unwrap();
    }
}

impl Round {
    pub(super) fn to_nodes(&self) -> impl Iterator<Item = &Link> {
        std::iter::once(&self.to_rabbitmq).chain(&self.to_peers)
    }

    /// The node that leads the quorum queue.
    fn leader(&self) -> usize {
        let queue = Kind::Quorum.queue(&self.outbox);
        let listed = self.site.rabbitmq.ctl(&["list_queues", "name", "leader"]).unwrap();
        let leader = listed.lines().find_map(|line| line.strip_prefix(&queue)).unwrap_or_default().trim();
        self.site.all().position(|node| node.node() == leader).unwrap_or_else(|| panic!("no leader in {listed}"))
    }

    /// A relay that tries this node first, in place of the one that runs.
    async fn serve_at(&mut self, node: usize) {
        self.first = node;
        self.restart_relay().await;
        self.goes_on().await;
    }

    /// While the fault lasts: what is left of the cluster is enough, and messages must flow as soon as after one.
    async fn goes_on(&mut self) {
        const WITHIN: Duration = Duration::from_secs(30);
        const ENOUGH: usize = 100;
        let before = self.distinct();
        let flows = async || self.distinct().iter().zip(&before).all(|(now, then)| *now > then + ENOUGH);
        if tokio::time::timeout(WITHIN, eventually("messages flow", flows)).await.is_err() {
            let now = self.distinct();
            self.complaints
                .push(format!("from {before:?} to {now:?} messages within {WITHIN:?}, with a majority there"));
        }
    }
}
