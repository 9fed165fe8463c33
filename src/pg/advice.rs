//! What does not keep a relay from running, and will hurt one day: settings, standbys, versions. Pure.
//!
//! The trap: advice that is always there is read once. What is as it should be says so in its line and is no note.

use super::world::{Names, Slot, World, identifier, literal, version};
use crate::finding::{Finding, Look, Remedy, as_called, word};

/// What is asked about settings.
pub const SETTINGS: [&str; 3] = ["max_slot_wal_keep_size", "wal_sender_timeout", "synchronized_standby_slots"];

/// A relay gives itself half of it to be heard.
const SENDER_TIMEOUT_MILLISECONDS: std::ops::RangeInclusive<i64> = 5_000..=300_000;

/// A transaction that was prepared longer ago is forgotten.
const PREPARED_SECONDS_MAX: f64 = 600.0;

const FAILOVER_SLOTS: i32 = 170_000;

/// A setting, as `SHOW` prints it and as a number of its unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Its name.
    pub name: String,
    /// For people.
    pub shown: String,
    /// Without its unit; a text where it is none.
    pub raw: String,
}

/// Around slot, publication and table.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Circumstances {
    /// Of [`SETTINGS`] those that this server has.
    pub settings: Vec<Setting>,
    /// Physical slots, and whether a standby uses each now.
    pub standbys: Vec<(String, bool)>,
    /// How long ago the oldest transaction was prepared that is not committed yet.
    pub prepared_seconds: Option<f64>,
}

impl Circumstances {
    /// What there is to say, line by line.
    pub fn looks(&self, names: &Names, world: &World) -> Vec<Look> {
        let mut looks = vec![self.minor(world)];
        looks.extend(self.kept_wal(names, world));
        looks.extend(self.sender_timeout(world));
        looks.extend(idle_timeout(world));
        looks.extend(self.standby(names, world));
        looks.extend(self.publication(names, world));
        looks.extend(self.prepared());
        looks
    }

    fn setting(&self, name: &str) -> Option<&Setting> {
        self.settings.iter().find(|setting| setting.name == name)
    }

    fn minor(&self, world: &World) -> Look {
        let what = format!("PostgreSQL {}", version(world.version));
        let faults: Vec<&str> = super::minors::faults(world.version).collect();
        if faults.is_empty() {
            return Look::sound(format!("{what}: no bug of its logical decoding is known that matters here"));
        }
        let remedy = Remedy::act(format!("update to {} or later", version(super::minors::sound(world.version))));
        Look::note(what, format!("known bugs of its logical decoding: {}", faults.join("; ")), remedy)
    }

    fn kept_wal(&self, names: &Names, world: &World) -> Option<Look> {
        let setting = self.setting("max_slot_wal_keep_size")?;
        let what = format!("max_slot_wal_keep_size = {}", setting.shown);
        let slot = world.slot.as_ref();
        if setting.raw == "-1" {
            return Some(Look::sound(format!("{what}: WAL is kept for as long as it takes, and no slot is lost")));
        }
        let left = slot.and_then(Slot::safe_bytes);
        let left = left.map(|bytes| format!(", {bytes} bytes from now")).unwrap_or_default();
        let problem = format!("slot {} is lost when the relay is further behind{left}", names.slot);
        let remedy = Remedy::sql("ALTER SYSTEM SET max_slot_wal_keep_size = -1")
            .then_sql("SELECT pg_reload_conf()")
            .mind("Only where a full disk is better than lost rows");
        Some(Look::note(what, problem, remedy))
    }

    fn sender_timeout(&self, world: &World) -> Option<Look> {
        let setting = self.setting("wal_sender_timeout")?;
        let what = format!("wal_sender_timeout = {}", setting.shown);
        let problem = match setting.raw.parse() {
            Ok(0) => "off: the slot of a relay whose machine is gone stays taken for hours",
            Ok(number) if number < *SENDER_TIMEOUT_MILLISECONDS.start() => {
                "short: a pause of half as long ends a relay's session"
            }
            Ok(number) if number > *SENDER_TIMEOUT_MILLISECONDS.end() => {
                "long: so long does a second relay wait when the machine of the first is gone"
            }
            _ => return Some(Look::sound(what)),
        };
        let remedy = Remedy::sql(format!("ALTER ROLE {} SET wal_sender_timeout = '60s'", identifier(&world.login)));
        Some(Look::note(what, problem, remedy))
    }

    fn standby(&self, names: &Names, world: &World) -> Option<Look> {
        let slot = world.slot.as_ref().filter(|slot| !slot.temporary)?;
        let listed: Vec<&str> = self.standbys.iter().map(|(name, _)| name.as_str()).collect();
        let listed = listed.join(", ");
        let what = format!("failover of slot {}", names.slot);
        if listed.is_empty() && slot.failover != Some(true) {
            return Some(Look::sound(format!("{what}: no standby has a slot here")));
        }
        if world.version < FAILOVER_SLOTS {
            let problem = format!("slots do not survive one before PostgreSQL 17, and there are standbys: {listed}");
            let init = as_called("pgoutbox init");
            let remedy = Remedy::default().mind(format!("After one: `{init}`, and reconcile from the table"));
            return Some(Look::note(what, problem, remedy));
        }
        if slot.failover != Some(true) {
            let problem = format!("it is not kept on standbys, and there are some: {listed}");
            let command = format!("ALTER_REPLICATION_SLOT {} (FAILOVER true);", identifier(&names.slot));
            let database = world.database.replace('\\', r"\\").replace('\'', r"\'");
            let conninfo = format!("dbname='{database}' replication=database");
            let remedy = Remedy::shell(format!("psql -d {} -c {}", word(&conninfo), word(&command)))
                .mind("While no relay holds it. The standby needs sync_replication_slots");
            return Some(Look::note(what, problem, remedy));
        }
        Some(self.synchronized(what))
    }

    /// Postgres sends nothing before each slot that is named there has it: one that nobody uses makes a relay stand still.
    fn synchronized(&self, what: String) -> Look {
        let synchronized = self.setting("synchronized_standby_slots").map_or("", |setting| setting.shown.as_str());
        if synchronized.is_empty() {
            let problem =
                "synchronized_standby_slots is empty: messages can be published that a standby knows nothing of";
            return Look::note(what, problem, self.synchronize());
        }
        let is_here = |name: &str| self.standbys.iter().any(|(slot, is_active)| slot == name && *is_active);
        let names = synchronized.split(',').map(|name| name.trim().trim_matches('"'));
        let away: Vec<&str> = names.filter(|name| !is_here(name)).collect();
        if away.is_empty() {
            return Look::sound(format!(
                "{what}: kept on standbys, and nothing is published before {synchronized} has it"
            ));
        }
        let problem = format!("nothing is published until these standbys are back: {}", away.join(", "));
        Look::note(what, problem, Remedy::default().mind("Or take them out of synchronized_standby_slots"))
    }

    /// Names the slots that somebody uses now.
    fn synchronize(&self) -> Remedy {
        let joined = |is_active: bool| {
            let slots = self.standbys.iter().filter(|(_, active)| *active == is_active);
            slots.map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ")
        };
        let (here, away) = (joined(true), joined(false));
        let waits = "While one that is named there is away, nothing is decoded or published: name none that is not a \
                     standby's which may take over";
        let unused = format!("{waits}. Nobody uses these now: {away}");
        let mind = if away.is_empty() { waits } else { &unused };
        if here.is_empty() {
            return Remedy::act("name its slot there when a standby is connected").mind(mind);
        }
        let set = format!("ALTER SYSTEM SET synchronized_standby_slots = {}", literal(&here));
        Remedy::sql(set).then_sql("SELECT pg_reload_conf()").mind(mind)
    }

    fn publication(&self, names: &Names, world: &World) -> Vec<Look> {
        let Some(publication) = &world.publication else { return Vec::new() };
        let (what, name) = (format!("publication {}", names.publication), identifier(&names.publication));
        let mut looks = Vec::new();
        if publication.more_than_inserts {
            let remedy = Remedy::sql(format!("ALTER PUBLICATION {name} SET (publish = 'insert')"));
            let problem = "it publishes more than inserts, which is decoded, sent and passed over";
            looks.push(Look::note(what.clone(), problem, remedy));
        }
        let others = world.others().len();
        if others > 0 {
            let problem = format!("it publishes {others} other tables, whose rows are decoded, sent and passed over");
            looks.push(Look::note(what.clone(), problem, Remedy::act("give the outbox a publication of its own")));
        }
        if looks.is_empty() {
            vec![Look::sound(format!("{what}: inserts of the outbox and nothing else"))]
        } else {
            looks
        }
    }

    fn prepared(&self) -> Option<Look> {
        let seconds = self.prepared_seconds.filter(|seconds| *seconds > PREPARED_SECONDS_MAX)?;
        let remedy = Remedy::sql("SELECT gid, prepared, owner, database FROM pg_prepared_xacts ORDER BY prepared")
            .mind("COMMIT PREPARED or ROLLBACK PREPARED what nobody will finish");
        let problem = format!("one is {seconds:.0} s old: it holds WAL back until it is committed or rolled back");
        Some(Look::note("prepared transactions", problem, remedy))
    }
}

/// What an idle slot of this server has to fear.
pub fn idle_timeout(world: &World) -> Option<Look> {
    let shown = world.idle_timeout.as_ref()?;
    let what = format!("idle_replication_slot_timeout = {shown}");
    if shown == "0" {
        return Some(Look::sound(what));
    }
    let problem = "the slot is lost when the relay is away for so long; while its broker is away, it is too";
    let remedy = Remedy::sql("ALTER SYSTEM SET idle_replication_slot_timeout = 0");
    Some(Look::note(what, problem, remedy.then_sql("SELECT pg_reload_conf()")))
}

/// What to do about rows that are out of the stream's reach because their publication was not there. Reconciling comes last:
/// what is committed between the old slot and the new one is in neither.
pub fn begin_anew(names: &Names) -> Remedy {
    Remedy::sql(format!("SELECT pg_drop_replication_slot({})", literal(&names.slot)))
        .then_shell("pgoutbox init")
        .then_act("reconcile from the table what was committed before that and not delivered")
}

/// A look that was not possible.
pub fn not_looked(what: impl Into<String>, why: impl Into<String>, remedy: Remedy) -> Look {
    let Finding { problem, remedy } = Finding::new(format!("not looked at: {}", why.into()), remedy);
    Look::note(what, problem, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finding::{Step, Verdict};
    use crate::pg::{Error, ServerError};

    #[test]
    fn what_a_new_slot_does_not_have_is_reconciled_when_it_is_there() {
        let name = || "outbox".to_owned();
        let names = Names { slot: name(), publication: name(), schema: name(), table: name() };
        let server = |code: &str| {
            let text = format!("C{code}\0Mpublication \"outbox\" does not exist\0\0");
            ServerError::parse(bytes::Bytes::from(text))
        };
        let advice = [
            begin_anew(&names).to_string(),
            server("42704").to_string(),
            server("58P01").to_string(),
            Error::PublicationSkipped(server("55000")).to_string(),
        ];
        for text in advice {
            let (init, reconcile) = (text.find("pgoutbox init"), text.find("reconcile from the table"));
            assert!(init.is_some() && init < reconcile, "{text}");
        }
    }

    #[test]
    fn only_slots_that_somebody_uses_are_proposed_for_postgres_to_wait_for() {
        let advised = |standbys: &[(&str, bool)]| {
            let standbys = standbys.iter().map(|(name, is_active)| ((*name).to_owned(), *is_active)).collect();
            let circumstances = Circumstances { standbys, ..Circumstances::default() };
            let Verdict::Note(finding) = circumstances.synchronized("failover".to_owned()).verdict else { panic!() };
            let steps = finding.remedy.steps().iter().map(Step::text).collect::<Vec<_>>();
            (steps, finding.remedy.to_mind().unwrap().to_owned())
        };
        let (steps, mind) = advised(&[("backup", false), ("one", true), ("retired", false), ("two", true)]);
        assert_eq!(steps[0], "ALTER SYSTEM SET synchronized_standby_slots = 'one, two';");
        assert!(mind.ends_with("Nobody uses these now: backup, retired"), "{mind}");
        let (steps, mind) = advised(&[("one", true)]);
        assert!(steps[0].ends_with("= 'one';") && mind.starts_with("While one that is named there is away"), "{mind}");
        let (steps, mind) = advised(&[("retired", false)]);
        assert!(!steps[0].contains("ALTER") && mind.contains("retired"), "{steps:?} {mind}");
    }
}
