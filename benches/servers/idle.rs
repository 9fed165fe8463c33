//! Nothing to do: what a relay costs then, and how soon it is there.

use std::time::{Duration, Instant};

use crate::arena::{Arena, PATIENCE};
use crate::load;
use crate::process;
use crate::results::{Results, Values, rounds};
use crate::subject::{Program, Subject, Way};

/// Caches, connections and first statuses are over by then.
const CALM_AFTER: Duration = Duration::from_secs(2);
const WATCHED: Duration = Duration::from_secs(20);
const STARTS: u32 = 10;

pub(crate) fn run(arena: &mut Arena, results: &mut Results) {
    load::make_tables(arena);
    for subject in std::iter::once(Subject::pgoutbox()).chain(Subject::against()) {
        for round in 0..STARTS.min(2 * rounds()) {
            let (program, values) = start(arena, &subject);
            drop(program);
            arena.drop_slot("idle");
            results.add("idle", "start", &subject.name(), round, values);
        }
        let (program, _) = start(arena, &subject);
        std::thread::sleep(CALM_AFTER);
        let look = || (process::cpu(program.pid()), process::sleeps(program.pid()));
        let (before, began) = (look(), Instant::now());
        std::thread::sleep(WATCHED);
        let (after, seconds) = (look(), began.elapsed().as_secs_f64());
        let values = vec![
            ("cpu_percent", (after.0 - before.0).as_secs_f64() / seconds * 100.0),
            ("wakeups_a_second", (after.1 - before.1) as f64 / seconds),
            ("peak_mib", process::peak_kib(program.pid()) as f64 / 1024.0),
        ];
        drop(program);
        arena.drop_slot("idle");
        results.add("idle", "idle", &subject.name(), 0, values);
    }
}

/// From exec to streaming, by the server's account and by its own probe.
fn start(arena: &mut Arena, subject: &Subject) -> (Program, Values) {
    arena.make_slots(&["idle".to_owned()]);
    let began = Instant::now();
    let program = subject.start(arena, &Way { slot: "idle", broker: arena.rabbitmq.port(), exchange: "idle" });
    let (mut streaming, mut ready) = (None, None);
    while streaming.is_none() || ready.is_none() {
        assert!(began.elapsed() < PATIENCE, "it does not start\n{}", program.log());
        if streaming.is_none() && arena.walsender("idle").is_some() {
            streaming = Some(began.elapsed());
        }
        if ready.is_none() && program.get("/readyz").is_some() {
            ready = Some(began.elapsed());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let ms = |time: Option<Duration>| time.map_or(f64::NAN, |time| time.as_secs_f64() * 1e3);
    (program, vec![("streaming_ms", ms(streaming)), ("ready_ms", ms(ready))])
}
