//! How large the window is: as small as the broker's full rate allows. Pure: it is told what settled and when.
//!
//! In flight = rate x latency (Little's law). While the pipe is not full, a larger window buys rate; once it is, it buys
//! only latency, memory and duplicates. So the size doubles as long as that pays, and then is compared, in short turns, with
//! one twice as large and one a little smaller, for as many turns as the noise of the rates asks for. What changes nothing
//! is tried again, later and later.
//!
//! The traps. A rate that the source sets says nothing about the window: turns in which the window was not full do not
//! count. And what settles just after a change was published before it: each turn begins when one window has passed.

use std::time::Duration;

use tokio::time::Instant;

/// Where it begins: enough for a broker on the same machine, and soon doubled for one far away.
const FIRST: u32 = 128;

/// A turn lasts so many windows, and so long at least: shorter ones measure the scheduler.
const TURN_WINDOWS: u64 = 3;
const TURN_MIN: Duration = Duration::from_millis(40);

/// The window was full: on average so much of it was in flight.
const FULL: f64 = 0.7;

/// Doubling goes on while it brings a twelfth, by the median of so many turns; or this, which no noise brings, in one turn.
const CLIMB: f64 = 1.08;
const CLIMB_TURNS: usize = 3;
const CLIMB_SURE: f64 = 1.5;

/// Where a window takes so long, comparing takes seconds: a doubling that did not pay is taken back at once, and not
/// compared with next. Elsewhere one that brought a little is kept, since comparing soon tells.
const SLOW: Duration = Duration::from_millis(50);

/// Twice the size must bring more than 3 %; a smaller one may cost 1.5 %: both far below what a user sees.
const LARGER: f64 = 1.03;
const SMALLER: f64 = 0.985;

/// Pairs of turns after which a comparison with a smaller size is decided, however noisy; with a larger one, twice as many.
const PAIRS_MAX: u32 = 24;

/// Between two comparisons that changed nothing, at first and at most.
const HOLD: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(8));

/// See the file's head.
#[derive(Debug)]
pub(super) struct Sizing {
    min: u32,
    max: u32,
    size: u32,
    mode: Mode,
    turn: Turn,
    is_growing: bool,
    hold: Duration,
}

#[derive(Debug)]
enum Mode {
    Climb { best: f64, rates: Vec<f64> },
    Hold { until: Instant },
    Compare { other: u32, pairs: Pairs, ours: Option<f64> },
}

/// What settled in this turn.
#[derive(Debug)]
struct Turn {
    /// Messages to pass before it begins.
    before: u32,
    began: Option<Instant>,
    messages: u64,
    /// Summed over the messages.
    in_flight: u64,
}

/// Logarithms of rates of the other size to ours.
#[derive(Clone, Copy, Debug, Default)]
struct Pairs {
    count: u32,
    sum: f64,
    squares: f64,
}

impl Turn {
    fn after(messages: u32) -> Self {
        Self { before: messages, began: None, messages: 0, in_flight: 0 }
    }
}

impl Pairs {
    fn add(&mut self, ratio: f64) {
        self.count += 1;
        self.sum += ratio;
        self.squares += ratio * ratio;
    }

    /// Whether the other size's rate is more than `factor` of ours; `None`: too early to say.
    fn exceeds(self, factor: f64) -> Option<bool> {
        let (count, threshold) = (f64::from(self.count), factor.ln());
        let mean = self.sum / count;
        let variance = ((self.squares - self.sum * mean) / (count - 1.0)).max(0.0);
        // Two pairs that agree by chance are not certain.
        let error = variance.sqrt().max(0.01) / count.sqrt() * 2.0 + if self.count == 2 { 0.05 } else { 0.0 };
        let is_clear = self.count >= 2 && (mean - threshold).abs() > error;
        // To grow by mistake costs more than not to shrink.
        let pairs_max = if factor > 1.0 { 2 * PAIRS_MAX } else { PAIRS_MAX };
        (is_clear || self.count >= pairs_max).then_some(mean > threshold)
    }
}

impl Sizing {
    /// Between these bounds, in messages; equal ones fix it.
    pub(super) fn new(min: u32, max: u32) -> Self {
        let min = min.clamp(1, max.max(1));
        let size = FIRST.clamp(min, max.max(1));
        Self {
            min,
            max: max.max(1),
            size,
            mode: Mode::Climb { best: 0.0, rates: Vec::new() },
            turn: Turn::after(size),
            is_growing: true,
            hold: HOLD.0,
        }
    }

    /// How many messages may be in flight now.
    pub(super) fn now(&self) -> u32 {
        match &self.mode {
            Mode::Compare { other, ours: Some(_), .. } => *other,
            _ => self.size,
        }
    }

    /// So many messages settled, of so many that were in flight.
    pub(super) fn settled(&mut self, now: Instant, messages: u32, in_flight: u32) {
        if self.min == self.max {
            return;
        }
        let (size, turn) = (self.now(), &mut self.turn);
        let Some(began) = turn.began else {
            turn.before = turn.before.saturating_sub(messages);
            turn.began = (turn.before == 0).then_some(now);
            return;
        };
        turn.messages += u64::from(messages);
        turn.in_flight += u64::from(messages) * u64::from(in_flight);
        let elapsed = now.duration_since(began);
        if turn.messages < TURN_WINDOWS * u64::from(size) || elapsed < TURN_MIN {
            return;
        }
        let count = turn.messages as f64;
        let was_full = turn.in_flight as f64 / count >= FULL * f64::from(size);
        if was_full {
            self.learn(count / elapsed.as_secs_f64(), now);
        } else if !matches!(self.mode, Mode::Climb { .. }) {
            // A comparison that the source interrupts compares nothing.
            self.mode = Mode::Hold { until: now };
        }
        self.turn = Turn::after(size.max(self.now()));
    }

    fn learn(&mut self, rate: f64, now: Instant) {
        match &mut self.mode {
            Mode::Climb { best, rates } => {
                rates.push(rate);
                let is_sure = *best > 0.0 && rate > *best * CLIMB_SURE;
                if rates.len() < CLIMB_TURNS && !is_sure {
                    return;
                }
                rates.sort_by(f64::total_cmp);
                let rate = if is_sure { rate } else { rates.get(CLIMB_TURNS / 2).copied().unwrap_or(rate) };
                let pays = rate > *best * CLIMB;
                if pays && self.size < self.max {
                    self.mode = Mode::Climb { best: rate, rates: Vec::new() };
                    self.size = self.size.saturating_mul(2).min(self.max);
                } else {
                    let is_slow = f64::from(self.size) / rate > SLOW.as_secs_f64();
                    if !pays && (is_slow || rate < *best * LARGER) {
                        self.size = (self.size / 2).max(FIRST).clamp(self.min, self.size);
                        // What is twice as large was tried just now; near by it is tried again, and better, soon enough.
                        self.is_growing = !is_slow;
                    }
                    self.compare();
                }
            }
            Mode::Hold { until } => {
                if now >= *until {
                    self.compare();
                }
            }
            Mode::Compare { ours: ours @ None, .. } => *ours = Some(rate),
            Mode::Compare { other, pairs, ours } => {
                pairs.add((rate / ours.take().unwrap_or(rate)).ln());
                match pairs.exceeds(if self.is_growing { LARGER } else { SMALLER }) {
                    None => {}
                    Some(true) => {
                        self.size = *other;
                        self.hold = HOLD.0;
                        self.compare();
                    }
                    Some(false) => {
                        self.is_growing = !self.is_growing;
                        self.mode = Mode::Hold { until: now + self.hold };
                        self.hold = (self.hold * 3 / 2).min(HOLD.1);
                    }
                }
            }
        }
    }

    /// Begins to compare with the next size in the direction, or in the other one at a bound.
    fn compare(&mut self) {
        self.is_growing = (self.is_growing || self.size == self.min) && self.size < self.max;
        let other = if self.is_growing {
            self.size.saturating_mul(2).min(self.max)
        } else {
            // About the square root of a half.
            (self.size - self.size * 3 / 10).clamp(self.min, self.size - 1)
        };
        self.mode = Mode::Compare { other, pairs: Pairs::default(), ours: None };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIN: u32 = 8;
    const MAX: u32 = 1000;

    /// A broker: its rate for so much in flight, in messages a second.
    type Broker = fn(f64) -> f64;

    fn near(window: f64) -> f64 {
        (window / 0.0015).min(60_000.0)
    }

    fn far(window: f64) -> f64 {
        (window / 0.05).min(60_000.0)
    }

    fn in_batches(window: f64) -> f64 {
        60_000.0 * window / (window + 5.0)
    }

    /// One that writes to disk together what came together.
    fn that_syncs(window: f64) -> f64 {
        30_000.0 * window / (window + 27.0)
    }

    fn that_chokes(window: f64) -> f64 {
        near(window) * if window > 200.0 { 0.8 } else { 1.0 }
    }

    /// What becomes of a window that is always full. `see` is told the clock, the window, and messages and rate of each run.
    fn drive(
        sizing: &mut Sizing,
        broker: Broker,
        noise: f64,
        seed: u64,
        seconds: f64,
        mut see: impl FnMut(f64, [f64; 3]),
    ) {
        let (mut random, start, mut clock) = (fastrand::Rng::with_seed(seed), Instant::now(), 0.0);
        while clock < seconds {
            let window = f64::from(sizing.now());
            // Noise comes in spells of about a turn.
            let noise = ((0..12).map(|_| random.f64()).sum::<f64>() - 6.0) * noise;
            let (rate, turn_ends) = (broker(window) * noise.exp(), sizing.turn.began.is_some());
            let run = (sizing.now() / 4).max(1);
            for _ in 0..10_000 {
                clock += f64::from(run) / rate;
                sizing.settled(start + Duration::from_secs_f64(clock), run, sizing.now());
                see(clock, [window, f64::from(run), rate]);
                if sizing.turn.began.is_some() != turn_ends || f64::from(sizing.now()) != window {
                    break;
                }
            }
        }
    }

    /// Rate and latency over a minute, behind a quarter of one, as shares of the best of all fixed windows' rate, and of
    /// the latency of the smallest one that reaches 95 % of it.
    fn shares(broker: Broker, noise: f64, seed: u64) -> (f64, f64) {
        let (mut seconds, mut messages, mut latencies) = (0.0, 0.0, 0.0);
        drive(&mut Sizing::new(MIN, MAX), broker, noise, seed, 75.0, |clock, [window, run, rate]| {
            if clock > 15.0 {
                seconds += run / rate;
                messages += run;
                latencies += run * window / rate;
            }
        });
        let all = (MIN..=MAX).map(|window| broker(window.into()));
        let best = all.clone().fold(0.0, f64::max);
        let smallest = all.clone().position(|rate| rate >= 0.95 * best).unwrap() as f64 + f64::from(MIN);
        (messages / seconds / best, latencies / messages / (smallest / broker(smallest)))
    }

    #[test]
    fn it_finds_nearly_the_best_rate_at_nearly_the_least_latency() {
        let brokers: [(&str, Broker); 5] = [
            ("near", near),
            ("far", far),
            ("in batches", in_batches),
            ("that syncs", that_syncs),
            ("that chokes", that_chokes),
        ];
        // At 5 % the noise is what the comparisons decide about, and in one run of ten wrongly for too long.
        const RUNS: usize = 100;
        for (name, broker) in brokers {
            for noise in [0.0, 0.02, 0.05] {
                let runs: Vec<(f64, f64)> = (0..RUNS as u64).map(|seed| shares(broker, noise, seed)).collect();
                let mut latencies: Vec<f64> = runs.iter().map(|(_, latency)| *latency).collect();
                latencies.sort_by(f64::total_cmp);
                let (median, high) = (latencies[RUNS / 2], latencies[RUNS * 3 / 4]);
                let rate = runs.iter().map(|(rate, _)| *rate).fold(1.0, f64::min);
                assert!(rate > 0.93, "{name}, noise {noise}: {rate:.3} of the best rate");
                let most = if noise < 0.05 { latencies[RUNS - 1] } else { high };
                assert!(most < 2.5, "{name}, noise {noise}: {most:.2} times the least latency, the most");
                assert!(median < 2.2, "{name}, noise {noise}: {median:.2} times the least latency, the median");
                assert!(
                    high < 2.5,
                    "{name}, noise {noise}: {high:.2} times the least latency in a quarter of the runs"
                );
            }
        }
    }

    /// A pipe of 3,000: the last doubling was one too many, and to find that out in turns takes seconds there.
    #[test]
    fn a_long_pipe_is_filled_and_not_filled_twice_within_seconds() {
        for noise in [0.0, 0.02] {
            for seed in 0..20 {
                let mut sizing = Sizing::new(MIN, 10_000);
                drive(&mut sizing, far, noise, seed, 5.0, |_, _| {});
                assert!((2700..=4200).contains(&sizing.size), "noise {noise}, seed {seed}: {}", sizing.size);
            }
        }
    }

    #[test]
    fn a_doubling_that_was_taken_back_is_not_what_is_tried_next() {
        let (mut sizing, mut next) = (Sizing::new(MIN, 10_000), None);
        while next.is_none() {
            drive(&mut sizing, far, 0.0, 0, 0.1, |_, _| {});
            if let Mode::Compare { other, .. } = &sizing.mode {
                next = Some(*other);
            }
        }
        assert!(next < Some(sizing.size), "{next:?} after {}", sizing.size);
    }

    /// Turns that noise makes better than the ones before lead further up at each doubling: what brought nothing is no start.
    #[test]
    fn of_a_rate_that_is_full_the_first_doubling_is_hardly_ever_exceeded() {
        const RUNS: usize = 200;
        let size = |seed| {
            let mut sizing = Sizing::new(MIN, 10_000);
            drive(&mut sizing, in_batches, 0.05, seed, 1.5, |_, _| {});
            sizing.size
        };
        let mut sizes: Vec<u32> = (0..RUNS as u64).map(size).collect();
        sizes.sort_unstable();
        assert!(sizes[RUNS / 2] <= FIRST && sizes[RUNS * 9 / 10] <= 2 * FIRST, "{sizes:?}");
    }

    /// There each doubling brings a little for long, and comparing tells quickly which was too much.
    #[test]
    fn near_by_the_last_doubling_is_kept_and_compared() {
        let mut sizing = Sizing::new(MIN, MAX);
        drive(&mut sizing, that_syncs, 0.0, 0, 1.0, |_, _| {});
        assert_eq!((sizing.size, matches!(sizing.mode, Mode::Compare { .. })), (512, true));
    }

    #[test]
    fn noise_that_never_clears_decides_later_to_grow_than_to_shrink() {
        let mut pairs = Pairs::default();
        for count in 1..=2 * PAIRS_MAX {
            pairs.add(if count % 2 == 0 { 0.2 } else { -0.2 });
            assert_eq!(pairs.exceeds(SMALLER).is_some(), count >= PAIRS_MAX, "{count} pairs");
            assert_eq!(pairs.exceeds(LARGER).is_some(), count == 2 * PAIRS_MAX, "{count} pairs");
        }
    }

    /// Half of what there is would be too little.
    #[test]
    fn a_bound_that_doubling_reaches_is_kept() {
        for seed in 0..20 {
            let mut sizing = Sizing::new(MIN, MAX);
            drive(&mut sizing, far, 0.02, seed, 3.0, |_, _| {});
            assert_eq!(sizing.size, MAX, "seed {seed}");
        }
    }

    #[test]
    fn a_window_that_is_not_full_teaches_nothing() {
        let (start, mut sizing) = (Instant::now(), Sizing::new(MIN, MAX));
        for second in 0..1000 {
            sizing.settled(start + Duration::from_secs(second), 1, 1);
        }
        assert_eq!(sizing.now(), FIRST);
    }

    #[test]
    fn it_stays_within_its_bounds_and_equal_ones_fix_it() {
        assert_eq!((Sizing::new(8, 20).now(), Sizing::new(200, 300).now(), Sizing::new(16, 1).now()), (20, 200, 1));
        for (min, max) in [(1, 1), (1, 2), (2, 3), (7, 7), (8, 100)] {
            let (start, mut sizing) = (Instant::now(), Sizing::new(min, max));
            let mut clock = 0.0;
            for _ in 0..20_000 {
                clock += 0.01 * fastrand::f64();
                sizing.settled(start + Duration::from_secs_f64(clock), sizing.now(), sizing.now());
                assert!((min..=max).contains(&sizing.now()), "{min}..={max}: {}", sizing.now());
            }
        }
    }
}
