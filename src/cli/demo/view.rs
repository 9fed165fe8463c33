//! What is drawn while it runs, and the summary at the end.
//!
//! The trap: a demo that explains its numbers away. A duplicate is called a duplicate, an outage is shown as one, and the
//! summary compares with what Postgres says, not with what the demo hoped.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, interval};

use super::relay::{self, Obstacle};
use super::screen::{Colour, Screen};
use super::text::grouped;
use super::{Tally, locked};

const DRAW_EVERY: Duration = Duration::from_millis(100);

/// The broker's absence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outage {
    /// Messages written in this time, microseconds since 1970, waited for the broker.
    pub(super) written_us: (u64, u64),
    pub(super) lasted: Duration,
    pub(super) caught_up_after: Duration,
}

/// What the end is judged by.
#[derive(Clone, Debug)]
pub(super) struct Findings {
    pub(super) outbox_rows: u64,
    pub(super) business_rows: u64,
    pub(super) missing: u64,
    pub(super) phantom: u64,
    pub(super) outage: Option<Outage>,
}

/// Draws for ever, and asks the relay whether it is ready. Without a terminal, where lines stay, one a second.
pub(super) async fn watch_all(
    screen: Arc<Screen>,
    tally: Arc<Mutex<Tally>>,
    http_port: u16,
    obstacle: watch::Sender<Option<Obstacle>>,
) {
    let begun = Instant::now();
    let mut ticks = interval(DRAW_EVERY);
    let mut said = 0;
    loop {
        ticks.tick().await;
        let now = relay::obstacle(http_port).await;
        obstacle.send_replace(now.clone());
        let second = begun.elapsed().as_secs();
        if screen.is_live() {
            let lines = lines(&screen, &locked(&tally), now.as_ref(), second);
            screen.draw(lines);
        } else if second > said {
            said = second;
            let relay = now.map_or("ready", |obstacle| obstacle.short);
            let tally = locked(&tally).one_line();
            screen.say(&format!("  {second:>3} s  {tally}  relay {relay}"));
        }
    }
}

fn lines(screen: &Screen, tally: &Tally, obstacle: Option<&Obstacle>, second: u64) -> Vec<String> {
    let relay = match obstacle {
        None => screen.coloured(Colour::Green, "ready"),
        Some(Obstacle { short, reason }) => format!("{}  {reason}", screen.coloured(Colour::Yellow, short)),
    };
    let order = match &tally.fault {
        None => screen.coloured(Colour::Green, tally.order()),
        Some(fault) => screen.coloured(Colour::Red, &format!("{}: {fault}", tally.order())),
    };
    let waiting = match tally.waiting() {
        0 => "0".to_owned(),
        waiting if obstacle.is_some() => screen.coloured(Colour::Yellow, &grouped(waiting)),
        waiting => grouped(waiting),
    };
    let (committed, rolled_back) = (grouped(tally.committed), grouped(tally.rolled_back));
    let (received, duplicates) = (grouped(tally.distinct()), grouped(tally.duplicates()));
    let mut lines = vec![
        String::new(),
        format!("  {second:>4} s       relay {relay}"),
        format!("  committed    {committed:<9} rolled back {rolled_back}"),
        format!("  received     {received:<9} duplicates {duplicates}, {order}"),
        format!("  waiting      {waiting}"),
        format!("  latency      {} (INSERT to consumer)", tally.recent_latency()),
    ];
    lines.extend(tally.last_lines().into_iter().map(|line| format!("    {line}")));
    lines
}

pub(super) fn summary(tally: &Tally, findings: &Findings) -> Vec<String> {
    let Findings { outbox_rows, business_rows, missing, phantom, outage } = findings;
    let mut lines = vec![
        format!("committed    {} messages, {} transactions", grouped(tally.committed), grouped(tally.transactions)),
        format!(
            "             Postgres: {} outbox rows, {} orders and users",
            grouped(*outbox_rows),
            grouped(*business_rows)
        ),
        format!("rolled back  {} messages", grouped(tally.rolled_back)),
        format!("received     {} deliveries of {} messages", grouped(tally.deliveries), grouped(tally.distinct())),
        format!("missing      {}", grouped(*missing)),
        format!("phantom      {} (received, but never committed)", grouped(*phantom)),
        format!("duplicates   {}{}", grouped(tally.duplicates()), duplicates_explained(tally, outage.is_some())),
        format!("order        {}", tally.fault.as_deref().unwrap_or("as committed, in both queues")),
    ];
    if let Some(outage) = outage {
        let (seconds, after) = (outage.lasted.as_secs_f64(), outage.caught_up_after.as_secs_f64());
        lines.push(format!("outage       {seconds:.1} s without a broker, caught up {after:.1} s after its return"));
        lines.push(format!("             up to {} messages waited in Postgres", grouped(tally.waited_max)));
    }
    let latency = tally.latency_without(outage.map(|outage| outage.written_us));
    let excluded = if outage.is_some() { ", the outage left out" } else { "" };
    lines.push(format!("latency      {latency}, INSERT to consumer{excluded}"));
    lines
}

fn duplicates_explained(tally: &Tally, outage: bool) -> &'static str {
    match (tally.duplicates(), outage) {
        (0, _) => "",
        (_, true) => " (in doubt when the broker stopped, so sent again: drop a message_id seen before)",
        (_, false) => " (delivery is at least once: drop a message_id seen before)",
    }
}
