//! The protocol that ships, run through random orders of everything that can go wrong around it.
//!
//! Flow: seed -> [`chaos`] (a scheduler, one thread, one clock) -> processes over a [`universe`] of fakes -> [`oracles`]
//!
//! A seed decides everything, so a failure prints a seed that fails again. Heads are iceberg's own table metadata, records
//! are the ledger's own JSON: only the bytes of data files are left out.
//!
//! ```text
//! TIDEMILL_SIMULATOR_SEEDS=N     how many seeds (20000)
//! TIDEMILL_SIMULATOR_FIRST=N     the first of them (0)
//! TIDEMILL_SIMULATOR_TRACE=1     print what happens: for one seed
//! ```

mod catalog;
mod chaos;
mod exhaustive;
mod oracles;
mod process;
mod reading;
mod scenes;
mod state;
mod universe;
mod world;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use chaos::Chaos;

use crate::figures;

/// Seeds of the default run.
const SEEDS: u64 = 20_000;
/// From so many seeds on everything in [`MUST_HAPPEN`] has to have happened.
const SEEDS_THAT_TELL: u64 = 5_000;
/// Faults, foreign hands, stops and outcomes without which an oracle would have slept.
const MUST_HAPPEN: [&str; 75] = [
    "BUSY",
    "CATALOG_AWAY",
    "CLUSTER_CHANGED",
    "FENCED",
    "INTERRUPTED",
    "KEY_SPEC_CHANGED",
    "LEDGER_LOST",
    "NOT_AUTHORIZED",
    "OFFSETS_LOST",
    "OTHER_JOB",
    "OUTCOME_UNKNOWN",
    "SIDE_FILES_LOST",
    "STORAGE_FAILED",
    "TABLE_CHANGED",
    "TABLE_NOT_EMPTY",
    "TABLE_REPLACED",
    "TABLE_ROLLED_BACK",
    "TOPIC_CHANGED",
    "answer: 409",
    "answer: 5xx",
    "answer: garbage",
    "answer: reply lost",
    "answer: throttle",
    "backfill dropped",
    "backfill registered",
    "batch landed after it was sent again",
    "catalog away at reload",
    "catalog away at start",
    "clock set ahead",
    "clock set back",
    "cluster changed",
    "column added by its owner",
    "crash with a request under way",
    "data file of a dropped batch deleted",
    "data files swept by others",
    "dead letters maintained by their owner",
    "disk of the state full",
    "disk of the warehouse full",
    "foreign append",
    "foreign column",
    "foreign compaction",
    "head moved before sending",
    "held request landed",
    "held request refused",
    "job edited: settings",
    "ledger begun beside rows of others",
    "ledger property removed",
    "log truncated",
    "lost letters given up",
    "main maintained by its owner",
    "nothing to do",
    "offsets moved by a command",
    "person lets a rollback be replayed",
    "person put a table back",
    "person rolled forward",
    "power lost",
    "request done, answer bad",
    "request doubled",
    "request lost",
    "request refused by its head",
    "request refused for good",
    "snapshot tagged",
    "snapshots expired",
    "start with takeover",
    "state corrupt",
    "state folder lost",
    "state folder restored from a copy",
    "state rebuilt",
    "success without work",
    "table replaced",
    "table replaced in place",
    "table rolled back",
    "table set to a snapshot beside its history",
    "unsynced state file torn",
    "zombie released",
];

fn from_environment(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"))
}

/// Runs one seed; gives what happened, or what was broken.
fn run(seed: u64, traced: bool) -> Result<BTreeMap<&'static str, u64>, String> {
    let mut chaos = Chaos::of_seed(seed, traced);
    let outcome = catch_unwind(AssertUnwindSafe(|| chaos.run()));
    let outcome = outcome.unwrap_or_else(|_| Err("a panic".to_owned()));
    if traced && let Ok(universe) = chaos.shared.try_borrow() {
        universe.trace.iter().flatten().for_each(|line| println!("{line}"));
    }
    outcome?;
    let universe = chaos.shared.borrow();
    Ok(universe.coverage.clone())
}

#[test]
fn whatever_goes_wrong_every_key_stands_once_and_calm_starts_drain_everything() {
    let (first, seeds) = (
        from_environment("TIDEMILL_SIMULATOR_FIRST", 0),
        from_environment("TIDEMILL_SIMULATOR_SEEDS", SEEDS),
    );
    let traced = from_environment("TIDEMILL_SIMULATOR_TRACE", 0) != 0;
    let next = AtomicU64::new(first);
    let coverage = Mutex::new(BTreeMap::<&str, u64>::new());
    let broken = Mutex::new(Vec::new());
    let worker = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + seeds || broken.lock().unwrap().len() >= 10 {
                return;
            }
            match run(seed, traced) {
                Ok(happened) => {
                    let mut coverage = coverage.lock().unwrap();
                    happened
                        .into_iter()
                        .for_each(|(what, times)| *coverage.entry(what).or_default() += times);
                }
                Err(what) => broken.lock().unwrap().push((seed, what)),
            }
        }
    };
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..workers).for_each(|_| _ = scope.spawn(worker)));
    let mut broken = broken.into_inner().unwrap();
    broken.sort();
    let coverage = coverage.into_inner().unwrap();
    for (what, times) in &coverage {
        println!("{times:>9} {what}");
    }
    figures::leave(
        "simulator",
        &serde_json::json!({"first": first, "seeds": seeds, "broken": broken, "happened": &coverage}),
    );
    let shown: Vec<String> = broken.iter().map(|(seed, what)| format!("seed {seed}: {what}")).collect();
    assert!(
        broken.is_empty(),
        "{}\nreplay with TIDEMILL_SIMULATOR_SEEDS=1 TIDEMILL_SIMULATOR_TRACE=1 TIDEMILL_SIMULATOR_FIRST=<seed>",
        shown.join("\n")
    );
    let slept: Vec<_> = MUST_HAPPEN.iter().filter(|what| !coverage.contains_key(*what)).collect();
    assert!(seeds < SEEDS_THAT_TELL || slept.is_empty(), "never happened: {slept:?}");
}
