//! A figure: what was done per second of processor time, and the same of its floor, in turn.

use std::time::Instant;

use serde_json::{Value, json};

/// Ticks per second of the times in `/proc/self/stat`: the same on every Linux of today.
const TICKS_PER_SECOND: f64 = 100.0;

/// How often the work and its floor are measured, each time one after the other.
pub const ROUNDS: usize = 7;

/// What one run measured.
pub struct Figure {
    name: &'static str,
    /// What is counted.
    unit: &'static str,
    floor: &'static str,
    work: Rates,
    floor_work: Rates,
    /// What else a reader wants to know.
    pub facts: Value,
}

/// How much was done per second.
#[derive(Default)]
struct Rates {
    /// Of processor time, one per round.
    per_cpu_second: Vec<f64>,
    /// Of the clock, in the quickest piece of all rounds: what a core does while nobody else wants its caches.
    best_per_second: f64,
}

/// Work that is done in pieces.
pub struct Pieces<'w> {
    /// Pieces of a round, which should take half a second or more.
    pub pieces: usize,
    /// Things done in a piece.
    pub count: u64,
    /// Does the piece of this index.
    pub work: &'w mut dyn FnMut(usize),
}

/// User and system time of all threads of the process, in seconds.
pub fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let ticks: u64 = after_name.split_whitespace().skip(11).take(2).flat_map(str::parse::<u64>).sum();
    ticks as f64 / TICKS_PER_SECOND
}

impl Rates {
    fn measure(&mut self, pieces: &mut Pieces<'_>) {
        let begun = cpu_seconds();
        for piece in 0..pieces.pieces {
            let begun = Instant::now();
            (pieces.work)(piece);
            let per_second = pieces.count as f64 / begun.elapsed().as_secs_f64();
            self.best_per_second = self.best_per_second.max(per_second);
        }
        let count = pieces.count * pieces.pieces as u64;
        self.per_cpu_second.push(count as f64 / (cpu_seconds() - begun));
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The load of the machine over the last minute.
fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|load| load.parse().ok()).unwrap_or_default()
}

impl Figure {
    /// Measures the work and its floor in turn.
    pub fn measure(
        name: &'static str,
        unit: &'static str,
        floor: &'static str,
        mut work: Pieces<'_>,
        mut floor_work: Pieces<'_>,
    ) -> Self {
        // caches, allocator and page tables as they are in a process that has run for a while
        (work.work)(0);
        (floor_work.work)(0);
        let (mut rates, mut floor_rates) = (Rates::default(), Rates::default());
        for _ in 0..ROUNDS {
            rates.measure(&mut work);
            floor_rates.measure(&mut floor_work);
        }
        Self { name, unit, floor, work: rates, floor_work: floor_rates, facts: json!({}) }
    }

    /// Prints medians over the rounds: of the rates, and of the ratios of neighbours.
    pub fn print(&self, as_json: bool) {
        let (rates, floor_rates) = (&self.work.per_cpu_second, &self.floor_work.per_cpu_second);
        let ratio = median(rates.iter().zip(floor_rates).map(|(rate, floor)| rate / floor));
        let (rate, floor_rate) = (median(rates.iter().copied()), median(floor_rates.iter().copied()));
        let (best, floor_best) = (self.work.best_per_second, self.floor_work.best_per_second);
        let (load, unit, floor) = (load(), self.unit, self.floor);
        if as_json {
            println!(
                "{}",
                json!({ "figure": self.name, "kind": "component", "unit": unit, "per_cpu_second": rate,
                    "best_per_second": best, "floor": floor, "floor_per_cpu_second": floor_rate,
                    "floor_best_per_second": floor_best, "ratio": ratio, "rounds": ROUNDS, "load": load,
                    "facts": self.facts })
            );
        } else {
            println!(
                "{}: {rate:.0} {unit} per CPU second, {best:.0}/s at best; {floor}: {floor_rate:.0}, {floor_best:.0}/s at \
                 best; ratio {ratio:.2} of {ROUNDS} rounds at load {load}; {}",
                self.name, self.facts
            );
        }
    }
}
