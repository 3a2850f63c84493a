//! What the points and mutants do in a program built with the feature `faults`.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::{LazyLock, Mutex};

use rustix::process::{Signal, getpid, kill_process};

/// What happens at a point.
struct Trigger {
    name: String,
    hit: u64,
    signal: Signal,
}

impl Trigger {
    fn from_environment(variable: &str, signal: Signal) -> Option<Self> {
        let text = std::env::var(variable).ok()?;
        let (name, hit) = match text.split_once(':') {
            Some((name, hit)) => (name, hit.parse().expect("the number of a hit after the colon")),
            None => (text.as_str(), 1),
        };
        Some(Self { name: name.to_owned(), hit, signal })
    }
}

static TRIGGERS: LazyLock<Vec<Trigger>> = LazyLock::new(|| {
    [("TIDEMILL_CRASH_AT", Signal::KILL), ("TIDEMILL_STOP_AT", Signal::STOP)]
        .into_iter()
        .filter_map(|(variable, signal)| Trigger::from_environment(variable, signal))
        .collect()
});
static TRACE: LazyLock<Option<File>> = LazyLock::new(|| {
    let path = std::env::var_os("TIDEMILL_POINTS")?;
    let file = OpenOptions::new().create(true).append(true).open(path);
    Some(file.expect("the file of TIDEMILL_POINTS can be written"))
});
static HITS: LazyLock<Mutex<HashMap<String, u64>>> = LazyLock::new(Mutex::default);
static MUTANT: LazyLock<Option<String>> = LazyLock::new(|| std::env::var("TIDEMILL_MUTANT").ok());

/// Counts a hit of the point, and ends or stops the process if that is what the environment asks for.
pub fn reach(name: &str) {
    if let Some(mut file) = TRACE.as_ref() {
        file.write_all(format!("{name}\n").as_bytes()).expect("the file of TIDEMILL_POINTS can be written");
    }
    if TRIGGERS.is_empty() {
        return;
    }
    let hit = {
        let mut hits = HITS.lock().expect("no thread panics while it counts");
        let hit = hits.entry(name.to_owned()).or_default();
        *hit += 1;
        *hit
    };
    for trigger in TRIGGERS.iter().filter(|trigger| trigger.name == name && trigger.hit == hit) {
        kill_process(getpid(), trigger.signal).expect("a process may signal itself");
    }
}

/// Whether the environment asks for the mutant of this name.
pub fn alive(name: &str) -> bool {
    MUTANT.as_deref() == Some(name)
}
