//! Every fault there is, how often it strikes, and what a seed's plan allows of them.
//!
//! Each kind throws dice of its own, so that a plan without one kind leaves the others' dice as they were: that is what makes
//! a failing seed shrink. The trap: a fault that never strikes guards nothing, so strikes are counted and asserted.

use std::fmt;
use std::str::FromStr;

macro_rules! faults {
    ($($name:ident $per_mille:literal $harm:ident $what:literal,)*) => {
        /// One kind of fault.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Fault {
            $(#[doc = $what] $name,)*
        }

        /// All kinds.
        pub(super) const FAULTS: &[Fault] = &[$(Fault::$name,)*];

        impl Fault {
            /// How often it strikes, of a thousand occasions.
            pub(super) fn per_mille(self) -> u16 {
                match self { $(Fault::$name => $per_mille,)* }
            }

            /// Whether the relay must bear it without publishing anything twice.
            pub(super) fn is_harmless(self) -> bool {
                match self { $(Fault::$name => is_harmless!($harm),)* }
            }

            /// For the log.
            pub(super) fn what(self) -> &'static str {
                match self { $(Fault::$name => $what,)* }
            }
        }
    };
}

macro_rules! is_harmless {
    (harmless) => {
        true
    };
    (harmful) => {
        false
    };
}

faults! {
    // The process.
    Kill 500 harmful "kill -9",
    Terminate 500 harmless "SIGTERM",
    Freeze 300 harmful "the process is frozen",
    SecondRelay 1000 harmful "a second relay runs on the same slot",
    GivesUp 300 harmless "the process gives up after so long without progress",
    // The way to Postgres, and what it says before it streams.
    DatabaseRefuses 30 harmful "Postgres refuses the connection",
    DatabaseHangs 10 harmful "Postgres does not answer the connection",
    DatabaseAway 10 harmful "Postgres is away for a while",
    WorldWrong 5 harmful "the catalog is wrong when a stream is asked for",
    SlotHeld 200 harmful "the server has not noticed that the stream ended",
    OldPrimary 50 harmful "an old primary answers",
    SlotMoved 15 harmful "the slot was re-created further on",
    PostgresCrashes 20 harmful "Postgres crashes, the slot is as saved last",
    FailOver 12 harmful "a lagging standby takes over",
    // The stream.
    StreamBreaks 4 harmful "the stream breaks",
    StreamSilent 2 harmful "the stream falls silent",
    ServerError 2 harmful "the server ends the stream with an error that may pass",
    FatalServerError 1 harmful "the server ends the stream with an error that needs a human",
    Undecodable 1 harmful "the server cannot send a row",
    PublicationSkipped 1 harmful "the server says that it skips a publication",
    Keepalive 60 harmless "a keepalive where none is due",
    KeepaliveJumps 30 harmless "a keepalive as far on as the next commit record",
    StreamRests 30 harmless "the server takes a rest",
    SlowRow 2 harmless "a message comes in parts, for longer than the stream may be silent",
    OtherTable 60 harmless "a row of another table of the publication",
    OtherRows 6 harmless "thousands of rows of another table at once",
    OtherMessage 40 harmless "a change that is no event",
    Described 40 harmless "the table is described again",
    UnknownPartition 100 harmless "a row of a partition that came after the stream began",
    TablesFail 200 harmful "the catalog cannot be asked which tables are the outbox",
    TablesSlow 200 harmless "the catalog takes its time to say which tables are the outbox",
    TablesInvisible 100 harmful "a commit waits for a standby, and nobody can see the partition that it made",
    Poison 5 harmful "a row that can never be a message",
    Undeliverables 20 harmful "some transactions in a row hold several rows that cannot be delivered",
    // The watch beside it.
    GoingAway 4 harmful "the server is shutting down",
    WorldChanges 2 harmful "the catalog says that the world is wrong",
    // Statuses.
    TellFails 10 harmful "a status is lost",
    TellBreaks 10 harmful "the stream breaks when a status has arrived",
    TellHangs 5 harmful "a status cannot be written",
    FinishFails 50 harmful "the goodbye fails before the status has arrived",
    FinishBreaks 50 harmful "the goodbye fails when the status has arrived",
    FinishHangs 50 harmful "the goodbye is not answered",
    // The way to the broker.
    BrokerRefuses 40 harmful "the broker refuses the connection",
    BrokerHangs 15 harmful "the broker does not answer the connection",
    BrokerAway 15 harmful "the broker is away for a while",
    BrokerSetup 8 harmful "the broker is set up wrong",
    CheckFails 50 harmful "the check fails",
    CheckHangs 50 harmful "the check is not answered",
    // Publishing.
    Inadmissible 4 harmful "a message that the broker can never take",
    PublishFails 8 harmful "nothing of a run is written",
    PublishTears 8 harmful "a part of a run is written",
    PublishBreaks 8 harmful "a run is written and then the session breaks",
    PublishHangs 4 harmful "a run is written in part and then nothing moves",
    PublishSlow 40 harmless "the socket is full for a while",
    // The broker.
    Returned 10 harmful "a message is returned",
    Nacked 10 harmful "a message is nacked",
    BrokerDies 4 harmful "the broker dies",
    ConfirmsLost 8 harmful "the broker dies with confirms unsent",
    BrokerSilent 4 harmful "no confirm comes any more",
    BrokerFrozen 5 harmful "the broker is frozen and later reads what stands in its sockets",
    Blocked 4 harmless "the broker blocks publishers",
    BrokerSlow 60 harmless "the broker takes its time",
    ConfirmsShuffled 250 harmless "confirms come out of order",
    ConfirmsTogether 250 harmless "one confirm for many messages",
    // The writers.
    HugeTransaction 30 harmless "a huge transaction",
    LongSilence 30 harmless "nothing is written for long",
    Burst 60 harmless "many transactions at once",
    Partitions 100 harmless "a transaction has rows in several partitions",
    LargeRow 2 harmless "a row of megabytes",
}

/// How many there are.
pub(super) const KINDS: usize = FAULTS.len();
const _: () = assert!(KINDS <= 128, "a plan's kinds stand in 128 bits");

/// What may happen in a simulation. Printed by a failing one; replays it as `PGOUTBOX_SEED`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) seed: u64,
    /// So many strikes at most, of whatever kind.
    pub(super) strikes: u32,
    /// Faults go on for so long.
    pub(super) seconds: u64,
    /// So many transactions at most.
    pub(super) transactions: u32,
    /// Kinds that do not strike, by [`FAULTS`]' order.
    pub(super) without: u128,
}

impl Plan {
    pub(super) fn new(seed: u64) -> Self {
        Self { seed, strikes: u32::MAX, seconds: 60, transactions: 40, without: 0 }
    }

    pub(super) fn allows(&self, fault: Fault) -> bool {
        self.without & bit(fault) == 0
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = Plan::new(self.seed);
        write!(f, "{}", self.seed)?;
        if self.strikes != whole.strikes {
            write!(f, ",strikes={}", self.strikes)?;
        }
        if self.seconds != whole.seconds {
            write!(f, ",seconds={}", self.seconds)?;
        }
        if self.transactions != whole.transactions {
            write!(f, ",transactions={}", self.transactions)?;
        }
        if self.without != 0 {
            write!(f, ",without={:x}", self.without)?;
        }
        Ok(())
    }
}

impl FromStr for Plan {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |part: &str| format!("{part:?} in the plan {text:?}");
        let mut parts = text.split(',');
        let seed = parts.next().unwrap_or_default();
        let mut plan = Plan::new(seed.parse().map_err(|_| wrong(seed))?);
        for part in parts {
            let (name, value) = part.split_once('=').ok_or_else(|| wrong(part))?;
            let known = match name {
                "strikes" => value.parse().map(|number| plan.strikes = number),
                "seconds" => value.parse().map(|number| plan.seconds = number),
                "transactions" => value.parse().map(|number| plan.transactions = number),
                "without" => u128::from_str_radix(value, 16).map(|kinds| plan.without = kinds),
                _ => return Err(wrong(part)),
            };
            known.map_err(|_| wrong(part))?;
        }
        Ok(plan)
    }
}

/// A kind in a set of kinds.
fn bit(fault: Fault) -> u128 {
    1 << fault as u32
}

/// A seed has so many kinds as its theme: they strike so much oftener, within a limit. What takes two rare ones to go wrong
/// would take a hundred thousand seeds.
const THEME: usize = 3;
const OFTENER: u16 = 20;
const OFTENER_PER_MILLE_MAX: u16 = 150;

/// Dice for every kind, and how often each has struck.
pub(super) struct Dice {
    dice: Vec<fastrand::Rng>,
    enabled: u128,
    theme: u128,
    left: u32,
    pub(super) fired: [u64; KINDS],
}

impl Dice {
    /// A tenth of the seeds knows no fault, a tenth only harmless ones; the others a random half of all kinds, so that rare
    /// ones are not drowned by frequent ones.
    pub(super) fn new(plan: &Plan, random: &mut fastrand::Rng) -> Self {
        let harmless = FAULTS.iter().filter(|fault| fault.is_harmless()).fold(0, |set, fault| set | bit(*fault));
        let half = random.u128(..);
        let theme = (0..THEME).fold(0, |set, _| set | 1 << random.usize(..KINDS));
        let (enabled, theme) = match random.u8(0..10) {
            0 => (bit(Fault::Terminate), 0),
            1 => (harmless & (half | random.u128(..)), 0),
            2..=3 => (half, 0),
            4..=5 => (half | theme, theme),
            6..=7 => (half & random.u128(..), 0),
            _ => (half & random.u128(..) | theme, theme),
        };
        let die = |kind: usize| fastrand::Rng::with_seed(plan.seed.wrapping_mul(KINDS as u64) + kind as u64);
        Self {
            dice: (0..KINDS).map(die).collect(),
            enabled: enabled & !plan.without,
            theme,
            left: plan.strikes,
            fired: [0; KINDS],
        }
    }

    /// Whether nothing can strike that excuses a duplicate.
    pub(super) fn is_harmless(&self) -> bool {
        FAULTS.iter().all(|fault| fault.is_harmless() || self.enabled & bit(*fault) == 0)
    }

    pub(super) fn allows(&self, fault: Fault) -> bool {
        self.enabled & bit(fault) != 0
    }

    pub(super) fn strikes(&mut self, fault: Fault) -> bool {
        let kind = fault as usize;
        let per_mille = match self.theme & bit(fault) {
            0 => fault.per_mille(),
            _ => (fault.per_mille() * OFTENER).min(fault.per_mille().max(OFTENER_PER_MILLE_MAX)),
        };
        let strikes = self.allows(fault) && self.left > 0 && self.dice[kind].u16(0..1000) < per_mille;
        if strikes {
            self.fired[kind] += 1;
            self.left -= 1;
        }
        strikes
    }

    /// No more of any.
    pub(super) fn heal(&mut self) {
        self.enabled = 0;
    }
}

#[test]
fn a_plan_is_read_as_it_is_printed() {
    let plan = Plan { seed: 7, strikes: 3, seconds: 20, transactions: 4, without: 0x5f << 64 };
    assert_eq!(plan.to_string().parse(), Ok(plan));
    assert_eq!("9".parse(), Ok(Plan::new(9)));
    assert!("9,strokes=1".parse::<Plan>().is_err());
}
