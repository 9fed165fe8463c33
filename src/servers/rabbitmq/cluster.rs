//! A node that joins another one's cluster.
//!
//! The trap: a cluster has no lock but the cookie, and nodes find each other through the port mapper that they were told of.
//! So a peer gets a copy of the first node's cookie and the port of its epmd, and names the two of them as all there is to
//! find: it asks the first one for the others, once, when it starts on no data.

use super::{Error, Extras, RabbitMq};

/// In HOME; Erlang makes one where there is none, and believes only what nobody else can read.
const COOKIE: &str = ".erlang.cookie";

impl RabbitMq {
    /// Starts one more node of this node's cluster, which must run, and returns when it answers on its AMQP port.
    ///
    /// It has a directory and ports of its own. The port mapper stays this node's child, and lives until this node is
    /// dropped, however often it is killed.
    pub fn peer(&self, extras: &Extras) -> Result<Self, Error> {
        Self::start_prepared(&self.root, extras, Some(self))
    }

    /// Its name among the nodes of its cluster.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Gives `peer` what it needs to get in, and returns the lines of its configuration.
    pub(super) fn admit(&self, peer: &Self) -> Result<String, Error> {
        std::fs::copy(self.path(COOKIE), peer.path(COOKIE)).map_err(Error::io("copy the Erlang cookie"))?;
        Ok(format!(
            "\ncluster_formation.peer_discovery_backend = classic_config\n\
             cluster_formation.classic_config.nodes.1 = {}\ncluster_formation.classic_config.nodes.2 = {}\n",
            self.node, peer.node
        ))
    }
}
