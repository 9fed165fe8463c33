//! `pgoutbox check`: every precondition of both peers, found before `run` would, by the same code.
//!
//! The trap: a finding whose remedy is prose. Every step that can be pasted stands on a line of its own, behind the place
//! where it goes.

mod broker;
mod database;
mod deep;

use super::write_out;
use crate::config::Config;
use crate::error::Error;
use crate::finding::{Finding, Look, Step, Verdict, word};
use crate::sink::rabbitmq::probe::Deep;

pub(super) use database::{findings, standby};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// What was looked at as JSON
    #[arg(long)]
    json: bool,
    /// Look longer and closer: decode what is next, map the last rows, ask about settings, versions, standbys and queues.
    /// Publishes nothing, changes nothing
    #[arg(long)]
    deep: bool,
    /// RabbitMQ's management API for --deep; else port 15672 of the broker's host, 15671 with TLS
    #[arg(long, value_name = "URL", requires = "deep")]
    management_url: Option<String>,
}

pub(super) async fn run(arguments: &Arguments, config: &Config) -> Result<(), Error> {
    let (mut looks, samples) = database::look(config, arguments.deep).await;
    let deep = arguments.deep.then(|| Deep { samples, management_url: arguments.management_url.clone() });
    looks.extend(broker::look(config, deep.as_ref()).await);
    write_out(&if arguments.json {
        format!("{:#}\n", looks.iter().map(entry).collect::<serde_json::Value>())
    } else {
        looks.iter().map(lines).collect()
    })?;
    match looks.iter().filter(|look| look.is_wrong()).count() {
        0 => Ok(()),
        count => Err(Error::Found(format!("{count} found; `pgoutbox run` would not work"))),
    }
}

/// One line, and under a finding one line a step.
fn lines(look: &Look) -> String {
    let (state, finding) = match &look.verdict {
        Verdict::Sound => return format!("ok     {}\n", look.what),
        Verdict::Note(finding) => ("note ", finding),
        Verdict::Wrong(finding) => ("WRONG", finding),
    };
    let mut text = format!("{state}  {}: {}\n", look.what, finding.problem);
    for step in finding.remedy.steps() {
        let pasted = match step {
            // Behind `--set`, in a shell.
            Step::Setting(key, value) => format!("{key}={}", word(value)),
            step => step.text(),
        };
        text.push_str(&format!("       {}: {pasted}\n", step.place()));
    }
    if let Some(mind) = finding.remedy.to_mind() {
        text.push_str(&format!("       mind: {mind}\n"));
    }
    text
}

fn entry(look: &Look) -> serde_json::Value {
    let (state, finding) = match &look.verdict {
        Verdict::Sound => ("ok", None),
        Verdict::Note(finding) => ("note", Some(finding)),
        Verdict::Wrong(finding) => ("wrong", Some(finding)),
    };
    let step = |step: &Step| serde_json::json!({ "place": step.place(), "text": step.text() });
    let steps = |finding: &Finding| finding.remedy.steps().iter().map(step).collect::<serde_json::Value>();
    serde_json::json!({
        "what": look.what,
        "state": state,
        "ok": state != "wrong",
        "problem": finding.map(|finding| &finding.problem),
        "remedy": finding.map(|finding| finding.remedy.to_string()),
        "steps": finding.map(steps),
        "mind": finding.and_then(|finding| finding.remedy.to_mind()),
    })
}
