//! Names of one's own for a relay: resolver files that only it sees, and that change under it.
//!
//! The traps. `/etc/hosts` is read anew at every lookup, but by its path: what is bound over it must be rewritten in place. And
//! `resolv.conf` has no ports: a name server of one's own needs an address of its own, of which loopback has 16 million.

use std::net::{Ipv4Addr, UdpSocket};

use tempfile::TempDir;

/// Of Postgres and of the broker, by their links.
pub(crate) const POSTGRES: &str = "postgres.test";
pub(crate) const RABBITMQ: &str = "rabbitmq.test";

/// Dropped: its files are gone.
pub(crate) struct Names {
    directory: TempDir,
    /// A name server that takes every question and answers none.
    _mute: Option<UdpSocket>,
}

impl Names {
    /// Both names are there. A name that is not is asked of a name server that is not there, or of one that is mute and is
    /// asked for minutes.
    pub(crate) fn new(is_mute: bool) -> Result<Self, String> {
        let directory =
            tempfile::Builder::new().prefix("pgoutbox-names-").tempdir().map_err(|error| error.to_string())?;
        let (address, mute) = name_server(is_mute)?;
        let names = Self { directory, _mute: mute };
        names.write("nsswitch.conf", "hosts: files dns\n");
        names.write("resolv.conf", &format!("nameserver {address}\noptions timeout:30 attempts:5\n"));
        names.know(&[POSTGRES, RABBITMQ]);
        Ok(names)
    }

    /// From now on these are loopback's, and no others are there.
    pub(crate) fn know(&self, names: &[&str]) {
        let lines: String = names.iter().map(|name| format!("127.0.0.1 {name}\n")).collect();
        self.write("hosts", &lines);
    }

    /// What a relay is run by to see them.
    pub(crate) fn way(&self) -> Vec<String> {
        let bind = |file: &str| format!("mount --bind '{}' /etc/{file}", self.directory.path().join(file).display());
        let script =
            format!("{} && exec \"$0\" \"$@\"", ["hosts", "resolv.conf", "nsswitch.conf"].map(bind).join(" && "));
        ["unshare", "--mount", "sh", "-c", &script].map(str::to_owned).into()
    }

    fn write(&self, file: &str, text: &str) {
        std::fs::write(self.directory.path().join(file), text).unwrap();
    }
}

/// Its address; where it is mute, with its socket.
fn name_server(is_mute: bool) -> Result<(Ipv4Addr, Option<UdpSocket>), String> {
    let address = Ipv4Addr::new(127, fastrand::u8(64..128), fastrand::u8(..), fastrand::u8(1..255));
    if !is_mute {
        return Ok((address, None));
    }
    let mute = UdpSocket::bind((address, 53)).map_err(|error| format!("no name server at {address}:53: {error}"))?;
    Ok((address, Some(mute)))
}
