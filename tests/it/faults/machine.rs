//! Rows 7b, 59 to 61: what machines do: clocks that jump, names that resolve to nothing, resources that run out.
//!
//! The trap: a fault that was not there. Whatever a machine does not let us do (a cgroup, a mount, a clock of one's own) is a
//! complaint of the round, and each row sees the fault with its own eyes where it can.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::acts::{Side, TIMEOUTS};
use super::arena::Round;
use super::{FAILURE, Row, allow};
use crate::support::eventually;
use crate::support::names::{Names, POSTGRES, RABBITMQ};
use crate::support::volume::Volume;

pub(super) const ROWS: &[Row] = &[
    Row {
        number: "7b",
        fault: "the relay's wall clock jumps an hour ahead, an hour back and home again",
        allowed: allow(0),
        run: |round| Box::pin(clock_jumps(round)),
    },
    Row {
        number: "59a",
        fault: "the name of Postgres, then that of the broker, resolves to nothing for a while",
        allowed: allow(FAILURE),
        run: |round| Box::pin(nameless(round, false)),
    },
    Row {
        number: "59b",
        fault: "the same, with a name server that never answers; stopped and started meanwhile",
        allowed: allow(2 * FAILURE),
        run: |round| Box::pin(nameless(round, true)),
    },
    Row {
        number: "60a",
        fault: "relay throttled to 1 % of a core for 10 s",
        allowed: allow(0),
        run: |round| Box::pin(throttled(round)),
    },
    Row {
        number: "60b",
        fault: "48 file descriptors, 200 idle clients at the probes, both links cut meanwhile",
        allowed: allow(FAILURE),
        run: |round| Box::pin(few_descriptors(round)),
    },
    Row {
        number: "60d",
        fault: "every file system read-only, relay killed and started again",
        allowed: allow(FAILURE),
        run: |round| Box::pin(read_only(round)),
    },
    Row {
        number: "61",
        fault: "Postgres' WAL fills its volume while the broker is away; then there is room, and the broker comes back",
        allowed: allow(FAILURE),
        run: |round| Box::pin(volume_full(round)),
    },
];

impl Round {
    /// From now on relays are run by these words. The one that runs is stopped for it, which duplicates nothing.
    async fn go_on_by(&mut self, way: Vec<String>) {
        self.way = way;
        self.restart_relay().await;
        self.flowing(20).await;
    }

    /// None of its sessions has ended but at our word.
    fn is_in_its_first_session(&mut self) {
        for end in ["postgres", "broker", "refused", "paused", "fatal"] {
            let ended = self.relay().metric(&format!("pgoutbox_sessions_total{{end=\"{end}\"}}"));
            if ended > 0.0 {
                self.complaints.push(format!("{ended} sessions ended: {end}"));
            }
        }
    }
}

/// `libfaketime`, where it is installed.
fn faketime() -> Option<PathBuf> {
    let below =
        std::fs::read_dir("/usr/lib").ok()?.flatten().map(|entry| entry.path().join("faketime/libfaketime.so.1"));
    below.into_iter().find(|library| library.is_file())
}

async fn clock_jumps(round: &mut Round) {
    let Some(library) = faketime() else {
        round.complaints.push("no libfaketime: apt-get install faketime".to_owned());
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let clock = directory.path().join("clock");
    // By a rename: a clock that is read half is a clock that jumps once more.
    let set = |offset: &str| {
        let next = directory.path().join("next");
        std::fs::write(&next, offset).unwrap();
        std::fs::rename(&next, &clock).unwrap();
    };
    set("+0");
    let preload = format!("LD_PRELOAD={}", library.display());
    let file = format!("FAKETIME_TIMESTAMP_FILE={}", clock.display());
    let way = ["env", &preload, &file, "FAKETIME_NO_CACHE=1", "FAKETIME_DONT_FAKE_MONOTONIC=1"];
    round.go_on_by(way.map(str::to_owned).into()).await;
    for (offset, hour) in [("+3600", 3600.0), ("-3600", 0.0), ("+0", 0.0)] {
        set(offset);
        // What is settled as the clock jumps is of both hours.
        round.flowing(20).await;
        let before = (round.age(), round.settled());
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(3) {
            round.moment().await;
            let (code, reasons) = round.relay().get("/readyz");
            let oldest = round.relay().metric("pgoutbox_oldest_unsettled_seconds");
            if code != 200 || !(0.0..3700.0).contains(&oldest) {
                round.complaints.push(format!("at {offset}: {code} {reasons}, oldest {oldest}"));
            }
        }
        round.flowing(20).await;
        let mean = (round.age() - before.0) / (round.settled() - before.1);
        if !(hour * 0.5..hour + 60.0).contains(&mean) {
            round.complaints.push(format!("at {offset} messages are {mean} s old"));
        }
    }
    round.is_in_its_first_session();
}

impl Round {
    /// Of all that was settled, in seconds.
    fn age(&self) -> f64 {
        self.relay().metric("pgoutbox_commit_to_settled_seconds_sum")
    }

    fn settled(&self) -> f64 {
        self.relay().metric("pgoutbox_settled_total")
    }
}

async fn nameless(round: &mut Round, is_mute: bool) {
    let names = match Names::new(is_mute) {
        Ok(names) => names,
        Err(why) => return round.complaints.push(why),
    };
    (round.hosts, round.connect_within) = ([POSTGRES, RABBITMQ], Some(Duration::from_secs(3)));
    round.go_on_by(names.way()).await;
    for (side, gone, left) in [(Side::Postgres, POSTGRES, RABBITMQ), (Side::RabbitMq, RABBITMQ, POSTGRES)] {
        names.know(&[left]);
        round.link(side).cut();
        let says = || async {
            let (code, reasons) = round.relay().get("/readyz");
            code == 503 && reasons.contains(gone)
        };
        eventually("readiness names the host", says).await;
        round.lasts(TIMEOUTS).await;
        let threads = std::fs::read_dir(format!("/proc/{}/task", round.relay().pid())).unwrap().count();
        // One for everything, one for signals or time at most, and those that ask.
        if threads > 2 + 8 {
            round.complaints.push(format!("{threads} threads"));
        }
        if is_mute {
            let began = Instant::now();
            round.restart_relay().await;
            if began.elapsed() > Duration::from_secs(4) {
                round.complaints.push(format!("SIGTERM took {:?}", began.elapsed()));
            }
        }
        names.know(&[left, gone]);
        round.flowing(1).await;
    }
}

/// A cgroup that gives little CPU; dropped: as much as there is.
struct Throttle(PathBuf);

impl Throttle {
    const ROOT: &str = "/sys/fs/cgroup/cpu";

    fn on(pid: i32, percent: u32) -> Result<Self, String> {
        let path = Path::new(Self::ROOT).join(format!("pgoutbox-faults-{pid}"));
        let failed = |error: std::io::Error| format!("no cgroup {} to throttle in: {error}", path.display());
        std::fs::create_dir(&path).map_err(failed)?;
        let throttle = Self(path.clone());
        // Never made: where no controller is mounted these would be files like any other.
        let set = |file: &str, text: String| {
            let opened = std::fs::OpenOptions::new().write(true).open(path.join(file));
            opened.and_then(|mut file| file.write_all(text.as_bytes())).map_err(failed)
        };
        set("cpu.cfs_period_us", "100000".to_owned())?;
        set("cpu.cfs_quota_us", (1000 * percent).to_string())?;
        set("cgroup.procs", pid.to_string())?;
        Ok(throttle)
    }

    /// How often it had to wait.
    fn throttled(&self) -> u64 {
        let stat = std::fs::read_to_string(self.0.join("cpu.stat")).unwrap_or_default();
        let line = stat.lines().find_map(|line| line.strip_prefix("nr_throttled "));
        line.and_then(|count| count.parse().ok()).unwrap_or(0)
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        for pid in std::fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default().lines() {
            let _ = std::fs::write(Path::new(Self::ROOT).join("cgroup.procs"), pid);
        }
        let _ = std::fs::remove_dir(&self.0);
    }
}

async fn throttled(round: &mut Round) {
    round.restart_relay().await;
    // Where the broker is busy with others as well, a relay gets by with 2.
    let throttle = match Throttle::on(round.relay().pid(), 1) {
        Ok(throttle) => throttle,
        Err(why) => return round.complaints.push(why),
    };
    // On an idle machine the load alone is too little for a relay to notice.
    let many = "insert into outbox (aggregatetype, aggregateid, type) \
                select 'order', n::text, 'placed' from generate_series(1, 20000) n";
    round.outbox.sql(many).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    round.flowing(1).await;
    if throttle.throttled() == 0 {
        round.complaints.push("it was never throttled".to_owned());
    }
    drop(throttle);
    round.is_in_its_first_session();
}

/// Comes, says nothing, and comes again when it was shed.
async fn linger(address: SocketAddr) {
    loop {
        if let Ok(mut stream) = TcpStream::connect(address).await {
            let _ = stream.read(&mut [0]).await;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn few_descriptors(round: &mut Round) {
    round.go_on_by(["prlimit", "--nofile=48:48", "--"].map(str::to_owned).into()).await;
    let address = SocketAddr::from(([127, 0, 0, 1], round.relay().port()));
    let mut clients = JoinSet::new();
    (0..200).for_each(|_| _ = clients.spawn(linger(address)));
    round.flowing(200).await;
    for side in [Side::Postgres, Side::RabbitMq] {
        round.link(side).cut();
        let began = Instant::now();
        round.flowing(200).await;
        if began.elapsed() > Duration::from_secs(20) {
            round.complaints.push(format!("{side:?} cut, messages flow only after {:?}", began.elapsed()));
        }
    }
    // Nothing to do but to keep clients away.
    round.pause_load().await;
    round.lasts(Duration::from_secs(5)).await;
    drop(clients);
    round.relay().ready().await;
    round.load(3);
}

/// In a mount namespace of its own; that nothing can be written is tried first.
const READ_ONLY: &str = "while read -r _ at _; do mount -o remount,bind,ro \"$at\" 2>/dev/null; done </proc/self/mounts
    for at in / /tmp /dev /dev/shm /run \"$PWD\"; do
        if (: >\"$at/pgoutbox-can-write\") 2>/dev/null; then echo \"$at can be written to\" >&2; exit 99; fi
    done
    exec \"$0\" \"$@\"";

async fn read_only(round: &mut Round) {
    round.go_on_by(["unshare", "--mount", "sh", "-c", READ_ONLY].map(str::to_owned).into()).await;
    round.kill_relay().await;
    round.flowing(20).await;
    // What flows may have been on its way already, and a shell that still remounts knows no SIGTERM.
    round.relay().ready().await;
    round.restart_relay().await;
    round.flowing(20).await;
}

/// Of WAL, beside what there is.
const ROOM: u64 = 80 << 20;

async fn volume_full(round: &mut Round) {
    round.restart_postgres("fast").await;
    round.flowing(20).await;
    round.stop_postgres("fast").await;
    let wal = round.site.postgres.data_dir().join("pg_wal");
    let volume = match Volume::at(&wal, ROOM) {
        Ok(volume) => volume,
        Err(why) => return round.complaints.push(format!("no volume for WAL: {why}")),
    };
    round.start_postgres().await;
    round.flowing(20).await;
    round.end_broker().await;
    fill(round).await;
    round.lasts(Duration::from_secs(5)).await;
    volume.resize(8 << 30).unwrap();
    // It may have come back by itself, to fail again at the next segment.
    round.site.postgres.kill().unwrap();
    round.start_postgres().await;
    let full = round.outbox.current().await;
    round.site.rabbitmq.start_again().unwrap();
    round.flowing(20).await;
    round.outbox.wait_confirmed(full).await;
    round.stop_postgres("fast").await;
    volume.put_back().unwrap();
    round.start_postgres().await;
    round.outbox.sql("drop table filler").await;
}

/// Writes until the server says that its disk is full. A checkpoint every now and then shows that it is the slots that keep it.
async fn fill(round: &mut Round) {
    let complains = || round.site.postgres.log().matches("No space left on device").count();
    let before = complains();
    let client = &round.outbox.client;
    let sql = "create table filler (t text); alter table filler alter column t set storage external";
    let mut failed = client.batch_execute(sql).await.is_err();
    let began = Instant::now();
    while !failed && began.elapsed() < Duration::from_secs(60) {
        let sql = "insert into filler select repeat('x', 1000000) from generate_series(1, 8)";
        failed = client.batch_execute(sql).await.is_err() || client.batch_execute("checkpoint").await.is_err();
    }
    if complains() == before {
        round.complaints.push("Postgres did not fill its volume".to_owned());
    }
}
