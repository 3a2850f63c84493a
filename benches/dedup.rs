//! Figures of the dedup state: `benches/run NAME [OPTIONS] [--json]`, one JSON object each.
//!
//! Every run knows the truth by arithmetic (`dedup/keys.rs`) and fails on a single wrong verdict. Every run has a fresh
//! seed, which it prints, and measures the device beside the figure that the device bounds.
//!
//! Timed is what the program does with the keys of a batch: probe, prepare (segment, manifest, syncs), publish; for
//! RocksDB sort, lookup and ingestion. Making the keys is not. Engines run one after the other, each in a process of its
//! own, under a hard limit of memory that counts the page cache (`dedup/limit.rs`).

#[path = "dedup/bloom.rs"]
mod bloom;
#[path = "dedup/compare.rs"]
mod compare;
#[path = "dedup/device.rs"]
mod device;
#[path = "dedup/flips.rs"]
mod flips;
#[path = "dedup/growth.rs"]
mod growth;
#[path = "dedup/keys.rs"]
mod keys;
#[path = "dedup/limit.rs"]
mod limit;
#[path = "dedup/ours.rs"]
mod ours;
#[path = "dedup/process.rs"]
mod process;
#[path = "dedup/rebuild.rs"]
mod rebuild;
#[path = "dedup/set.rs"]
mod set;
#[path = "dedup/settings.rs"]
mod settings;

use serde_json::{Value, json};

use settings::{Choice, Scratch, Settings};

/// Why there is no figure.
type Failure = Box<dyn std::error::Error + Send + Sync>;

struct Bench {
    name: &'static str,
    what: &'static str,
    choices: &'static [Choice],
    run: fn(&Settings) -> Result<Value, Failure>,
}

/// What a user calls, and below it the processes that those start.
const BENCHES: [Bench; 10] = [
    Bench {
        name: "dedup",
        what: "events per second on a state of many keys, beside RocksDB with --rocksdb",
        choices: &[
            ("keys", "1e7"),
            ("batch", "1e6"),
            ("repeats", "any_time"),
            ("load", "mix"),
            ("memory", "1GiB"),
            ("share", "768MiB"),
            ("batches", "50"),
            ("probe", "0"),
            ("state", ""),
            ("keep", "no"),
            ("rocksdb", "no"),
        ],
        run: compare::compare,
    },
    Bench {
        name: "growth",
        what: "from empty through real batches: speed, write amplification, files, merges",
        choices: &[
            ("keys", "1e7"),
            ("batch", "1e6"),
            ("repeats", "any_time"),
            ("load", "mix"),
            ("memory", "1GiB"),
            ("share", "768MiB"),
            ("probe", "0"),
            ("state", ""),
        ],
        run: growth::growth,
    },
    Bench {
        name: "bloom",
        what: "a textbook Bloom filter alone, beside the filter of the store",
        choices: &[("keys", "1e7"), ("batch", "1e6"), ("bits", "10")],
        run: bloom::bloom,
    },
    Bench {
        name: "rebuild",
        what: "the state made again from rows: keys per second",
        choices: &[
            ("rows", "1e7"),
            ("repeats", "any_time"),
            ("memory", "1GiB"),
            ("share", "768MiB"),
            ("state", ""),
        ],
        run: rebuild::rebuild,
    },
    Bench {
        name: "flips",
        what: "damaged files: each is named, or the answers are right",
        choices: &[("count", "1000")],
        run: flips::flips,
    },
    Bench {
        name: "set",
        what: "how many keys a plain set in memory bears under the limit",
        choices: &[("keys", "1e8"), ("memory", "256MiB"), ("state", "")],
        run: set::set,
    },
    Bench {
        name: "set-worker",
        what: "",
        choices: &[("keys", ""), ("form", ""), ("note", "")],
        run: set::work,
    },
    Bench {
        name: "dedup-worker",
        what: "",
        choices: &[
            ("folder", ""),
            ("keys", ""),
            ("batch", ""),
            ("repeats", ""),
            ("load", ""),
            ("share", ""),
            ("batches", ""),
            ("probe", ""),
            ("run-seed", ""),
        ],
        run: ours::work,
    },
    Bench {
        name: "growth-worker",
        what: "",
        choices: &[
            ("folder", ""),
            ("keys", ""),
            ("batch", ""),
            ("repeats", ""),
            ("load", ""),
            ("share", ""),
            ("probe", ""),
        ],
        run: growth::work,
    },
    Bench {
        name: "rebuild-worker",
        what: "",
        choices: &[("folder", ""), ("rows", ""), ("repeats", ""), ("share", "")],
        run: rebuild::work,
    },
];

fn run(words: &[String]) -> Result<(), Failure> {
    if words.iter().any(|word| word == "--list") {
        BENCHES.iter().filter(|bench| !bench.what.is_empty()).for_each(|bench| {
            println!("{}: {}", bench.name, bench.what);
        });
        return Ok(());
    }
    let (name, words) = words.split_first().ok_or("name a figure; see benches/run --list")?;
    let bench = BENCHES.iter().find(|bench| bench.name == name);
    let bench = bench.ok_or("no figure of this name; see benches/run --list")?;
    let is_json = bench.what.is_empty() || words.iter().any(|word| word == "--json");
    let words: Vec<String> = words.iter().filter(|word| *word != "--json").cloned().collect();
    let settings = Settings::parse(bench.choices, &words)?;
    settings.check()?;
    let mut result = (bench.run)(&settings)?;
    if !bench.what.is_empty() {
        result["commit"] = json!(std::env::var("TIDEMILL_BENCH_COMMIT").ok());
    }
    if is_json {
        println!("{result}")
    } else {
        settings::print_table("", &result)
    }
    Ok(())
}

fn main() {
    // as the program itself does
    tidemill::allocator::give_back_large_buffers();
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    if let Err(error) = run(&words) {
        eprintln!("{error}");
        std::process::exit(1);
    }
}
