//! How large the window is: as small as the broker's full rate allows. Pure: it is told what settled and when.
//!
//! In flight = rate x latency (Little's law). While the pipe is not full, a larger window buys rate; once it is, it buys
//! only latency, memory and duplicates. So the size is compared, in short turns, with one twice as large or one a little
//! smaller, for as many turns as the noise of the rates asks for. What changes nothing is tried again, later and later.
//!
//! The traps. A rate that the source sets says nothing about the window: turns in which the window was not full do not
//! count. What settles just after a change was published before it: each turn begins when one window has passed. And a
//! broker gets faster in its first seconds, whatever the window: who goes second in a pair of turns goes first in the next.

use std::time::Duration;

use tokio::time::Instant;

/// Where it begins, and about where it stays for the first seconds where rates are too noisy to be compared. In the model of
/// the tests, there, a queue that syncs loses 7 % of its rate with a third less, and one that does not has more than twice
/// the latency it needs with a third more.
const FIRST: u32 = 192;

/// A turn lasts so many windows, and so long at least: shorter ones measure the scheduler.
const TURN_WINDOWS: u64 = 3;
const TURN_MIN: Duration = Duration::from_millis(40);

/// The window was full: on average so much of it was in flight.
const FULL: f64 = 0.7;

/// On the way up from where it began, this in one turn is taken for a pipe that is far from full: no noise brings it.
const SURE: f64 = 1.5;

/// A broker that takes so long for one window is far.
const FAR: Duration = Duration::from_millis(50);

/// What a comparison asks of the other size.
#[derive(Clone, Copy, Debug)]
struct Demand {
    /// Its rate must be more than so much of ours.
    factor: f64,
    /// Pairs of turns after which it is decided, however noisy.
    pairs_max: u32,
    /// And by so much more then, in errors of the mean.
    errors: f64,
}

/// Twice the size must bring more than 3 %, a smaller one may cost 1.5 %: both far below what a user sees. To grow by
/// mistake costs more than not to shrink; but on the way up, what brings much must not take seconds. Far away a pair takes
/// seconds, and so long a window twice as large is in use for half of the time: there the way up ends with the first that
/// brings little.
const UP: Demand = Demand { factor: 1.03, pairs_max: 6, errors: 0.0 };
const UP_FAR: Demand = Demand { factor: 1.08, pairs_max: 2, errors: 0.0 };
const LARGER: Demand = Demand { factor: 1.03, pairs_max: 48, errors: 1.0 };
const SMALLER: Demand = Demand { factor: 0.985, pairs_max: 24, errors: 0.0 };

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
    /// All comparisons so far were for more.
    is_on_its_way_up: bool,
    is_growing: bool,
    hold: Duration,
}

#[derive(Debug)]
enum Mode {
    Hold {
        until: Instant,
    },
    /// `first`: the rate of the pair's first turn, once it is over.
    Compare {
        other: u32,
        pairs: Pairs,
        first: Option<f64>,
    },
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
    /// The next one. Who always went second would have what changes with time for itself.
    fn begins_with_other(self) -> bool {
        !self.count.is_multiple_of(2)
    }

    fn add(&mut self, ratio: f64) {
        self.count += 1;
        self.sum += ratio;
        self.squares += ratio * ratio;
    }

    /// Whether the other size does what it must; `None`: too early to say.
    fn meet(self, demand: Demand) -> Option<bool> {
        let (count, threshold) = (f64::from(self.count), demand.factor.ln());
        let mean = self.sum / count;
        let variance = ((self.squares - self.sum * mean) / (count - 1.0)).max(0.0);
        let error = variance.sqrt().max(0.01) / count.sqrt();
        // Two pairs that agree by chance are not certain.
        let certain = 2.0 * error + if self.count == 2 { 0.05 } else { 0.0 };
        // Of an odd number, one has nobody who went second against it.
        if self.count.is_multiple_of(2) && (mean - threshold).abs() > certain {
            return Some(mean > threshold);
        }
        (self.count >= demand.pairs_max).then_some(mean > threshold + demand.errors * error)
    }
}

impl Sizing {
    /// Between these bounds, in messages; equal ones fix it.
    pub(super) fn new(min: u32, max: u32) -> Self {
        let min = min.clamp(1, max.max(1));
        let size = FIRST.clamp(min, max.max(1));
        let mut sizing = Self {
            min,
            max: max.max(1),
            size,
            mode: Mode::Hold { until: Instant::now() },
            turn: Turn::after(size),
            is_on_its_way_up: true,
            is_growing: true,
            hold: HOLD.0,
        };
        if min < sizing.max {
            sizing.compare(None);
        }
        sizing
    }

    /// How many messages may be in flight now.
    pub(super) fn now(&self) -> u32 {
        match &self.mode {
            Mode::Compare { other, pairs, first } if pairs.begins_with_other() != first.is_some() => *other,
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
        } else {
            // A comparison that the source interrupts compares nothing.
            self.mode = Mode::Hold { until: now };
        }
        self.turn = Turn::after(if self.now() == size { 0 } else { size.max(self.now()) });
    }

    fn learn(&mut self, rate: f64, now: Instant) {
        match &mut self.mode {
            Mode::Hold { until } => {
                if now >= *until {
                    self.compare(None);
                }
            }
            Mode::Compare { first: first @ None, .. } => *first = Some(rate),
            Mode::Compare { other, pairs, first } => {
                let ratio = rate / first.take().unwrap_or(rate);
                let ratio = if pairs.begins_with_other() { ratio.recip() } else { ratio };
                if self.is_on_its_way_up && self.is_growing && pairs.count == 0 && ratio > SURE {
                    self.size = *other;
                    self.compare(Some(rate));
                    return;
                }
                pairs.add(ratio.ln());
                let is_far = f64::from(self.size) / rate > FAR.as_secs_f64();
                let demand = match (self.is_growing, self.is_on_its_way_up) {
                    (true, true) if is_far => UP_FAR,
                    (true, true) => UP,
                    (true, false) => LARGER,
                    (false, _) => SMALLER,
                };
                match pairs.meet(demand) {
                    None => {}
                    Some(true) => {
                        self.size = *other;
                        self.hold = HOLD.0;
                        self.compare(None);
                    }
                    Some(false) => {
                        self.is_growing = !self.is_growing;
                        self.is_on_its_way_up = false;
                        self.mode = Mode::Hold { until: now + self.hold };
                        self.hold = (self.hold * 3 / 2).min(HOLD.1);
                    }
                }
            }
        }
    }

    /// Begins to compare with the next size in the direction, or in the other one at a bound. With the rate of this size, if
    /// it was measured just now.
    fn compare(&mut self, first: Option<f64>) {
        self.is_growing = (self.is_growing || self.size == self.min) && self.size < self.max;
        let other = if self.is_growing {
            self.size.saturating_mul(2).min(self.max)
        } else {
            // About the square root of a half.
            (self.size - self.size * 3 / 10).clamp(self.min, self.size - 1)
        };
        self.mode = Mode::Compare { other, pairs: Pairs::default(), first };
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
    fn drive(sizing: &mut Sizing, broker: Broker, noise: f64, seed: u64, seconds: f64, see: impl FnMut(f64, [f64; 3])) {
        drive_over_time(sizing, |window, _| broker(window), noise, seed, seconds, see);
    }

    /// The same with a broker whose rate is of the clock too.
    fn drive_over_time(
        sizing: &mut Sizing,
        broker: impl Fn(f64, f64) -> f64,
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
            let (rate, turn_ends) = (broker(window, clock) * noise.exp(), sizing.turn.began.is_some());
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
        for (noise, least) in [(0.0, 1.0), (0.02, 1.0), (0.05, 0.95)] {
            let fits = |seed: &u64| {
                let mut sizing = Sizing::new(MIN, 10_000);
                drive(&mut sizing, far, noise, *seed, 5.0, |_, _| {});
                (2700..=4200).contains(&sizing.size)
            };
            let share = (0..200).filter(fits).count() as f64 / 200.0;
            assert!(share >= least, "noise {noise}: {share}");
        }
    }

    /// Rate in the first seconds, as a share of the largest window's, and what a message waits when half of them are over,
    /// as a multiple of what it waits in a window of so many: medians of many.
    fn first_seconds(broker: Broker, noise: f64, window_enough: f64) -> (f64, f64) {
        const RUNS: usize = 200;
        let (mut rates, mut waits) = (Vec::new(), Vec::new());
        for seed in 0..RUNS as u64 {
            let (mut seconds, mut all, mut later, mut waited) = (0.0, 0.0, 0.0, 0.0);
            drive(&mut Sizing::new(MIN, MAX), broker, noise, seed, 3.0, |clock, [window, run, _]| {
                seconds += run / broker(window);
                all += run;
                if clock > 1.5 {
                    later += run;
                    waited += run * window / broker(window);
                }
            });
            rates.push(all / seconds / broker(MAX.into()));
            waits.push(waited / later / (window_enough / broker(window_enough)));
        }
        rates.sort_by(f64::total_cmp);
        waits.sort_by(f64::total_cmp);
        (rates[RUNS / 2], waits[RUNS / 2])
    }

    /// There, comparing near rates is little better than chance: where it begins has to be good.
    #[test]
    fn where_a_rate_differs_by_a_seventh_from_turn_to_turn_the_first_seconds_are_good_all_the_same() {
        let (rate, _) = first_seconds(that_syncs, 0.14, 350.0);
        let (_, wait) = first_seconds(in_batches, 0.14, 100.0);
        assert!(rate >= 0.95 && wait <= 2.0, "rate {rate}, wait {wait}");
    }

    /// There a window is in use for seconds before it is known to be too large.
    #[test]
    fn far_away_the_way_up_ends_with_the_first_doubling_that_brings_little() {
        let average = |seed| {
            let (mut messages, mut windows) = (0.0, 0.0);
            drive(&mut Sizing::new(MIN, 10_000), far, 0.1, seed, 6.0, |clock, [window, run, _]| {
                if clock > 4.0 {
                    messages += run;
                    windows += run * window;
                }
            });
            windows / messages
        };
        let mut averages: Vec<f64> = (0..100).map(average).collect();
        averages.sort_by(f64::total_cmp);
        assert!(averages[50] < 4200.0, "{averages:?}");
    }

    /// Turns that noise makes better must not lead further up and up: what brought nothing is no start.
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

    #[test]
    fn noise_that_never_clears_is_decided_in_the_end() {
        let mut pairs = Pairs::default();
        for count in 1..=LARGER.pairs_max {
            // Better by 4 % on average, which is less than its error.
            pairs.add(0.04 + if count % 2 == 0 { 0.4 } else { -0.4 });
            for (demand, answer) in [(UP, true), (UP_FAR, false), (LARGER, false), (SMALLER, true)] {
                let decided = pairs.meet(demand);
                assert_eq!(decided.is_some(), count >= demand.pairs_max, "{demand:?}, {count} pairs");
                if count.is_multiple_of(2) {
                    assert!(decided.is_none_or(|decided| decided == answer), "{demand:?}, {count} pairs");
                }
            }
        }
    }

    /// A broker that just began doubles its rate within a second, whatever the window: no reason for a larger one.
    #[test]
    fn what_gets_faster_by_itself_does_not_lead_further_up() {
        for noise in [0.0, 0.02, 0.05] {
            let size = |seed| {
                let mut sizing = Sizing::new(MIN, 10_000);
                let warming = |window: f64, clock: f64| in_batches(window) * (1.0 - 0.5 * (-2.0 * clock).exp());
                drive_over_time(&mut sizing, warming, noise, seed, 1.5, |_, _| {});
                sizing.size
            };
            let mut sizes: Vec<u32> = (0..100).map(size).collect();
            sizes.sort_unstable();
            assert!(sizes[50] <= FIRST && sizes[90] <= 2 * FIRST, "noise {noise}: {sizes:?}");
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
