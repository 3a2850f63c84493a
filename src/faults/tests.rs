//! The list of mutants is the code's, and every rule of the protocol has enough of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use toml_edit::{DocumentMut, Table};

/// Least number of mutants, and of those that break one rule.
const MUTANTS_MIN: usize = 40;
const OF_A_RULE_MIN: usize = 3;

/// Sources that ship: those of the build, or the folder of `TIDEMILL_SOURCES`, where one line was changed.
fn sources() -> Vec<(PathBuf, String)> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let root = std::env::var_os("TIDEMILL_SOURCES").map_or(built, PathBuf::from);
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(&root).unwrap().to_owned(), text));
            }
        }
    }
    found.sort();
    found
}

fn table() -> DocumentMut {
    include_str!("../../tests/mutants.toml").parse().unwrap()
}

fn mutants(table: &DocumentMut) -> impl Iterator<Item = (&str, &Table)> {
    let mutants = table["mutant"].as_array_of_tables().unwrap().iter();
    mutants.map(|mutant| (mutant["name"].as_str().unwrap(), mutant))
}

#[test]
fn every_mutant_stands_once_in_the_code_and_once_in_the_list() {
    let mut placed = BTreeMap::<String, usize>::new();
    for (path, text) in sources() {
        if path.starts_with("faults") || path == Path::new("faults.rs") {
            continue;
        }
        for piece in text.split("mutant!(").skip(1) {
            let name = piece.trim_start().strip_prefix('"').and_then(|rest| rest.split_once('"'));
            *placed.entry(name.unwrap().0.to_owned()).or_default() += 1;
        }
    }
    let table = table();
    for (name, mutant) in mutants(&table) {
        if let Some(file) = mutant.get("file") {
            let file = file.as_str().unwrap().strip_prefix("src/").unwrap();
            let sources = sources();
            let (_, text) = sources.iter().find(|(path, _)| path == Path::new(file)).unwrap();
            assert_eq!(text.matches(mutant["ships"].as_str().unwrap()).count(), 1, "the line of {name}");
            placed.insert(name.to_owned(), 1);
        }
    }
    let listed: Vec<&str> = mutants(&table).map(|(name, _)| name).collect();
    let expected: BTreeMap<String, usize> = listed.iter().map(|name| ((*name).to_owned(), 1)).collect();
    assert_eq!(listed.len(), expected.len(), "a mutant is listed once");
    assert_eq!(placed, expected);
}

#[test]
fn every_rule_has_mutants_and_every_mutant_an_oracle() {
    let table = table();
    let mut of_rule = BTreeMap::<&str, usize>::new();
    for (name, mutant) in mutants(&table) {
        *of_rule.entry(mutant["rule"].as_str().unwrap()).or_default() += 1;
        let oracle = mutant["oracle"].as_str().unwrap();
        assert!(oracle.contains("::") || oracle.contains(' '), "{name} has the oracle {oracle:?}");
    }
    assert!(of_rule.values().sum::<usize>() >= MUTANTS_MIN, "{of_rule:?}");
    for number in 1..=10 {
        let rule = format!("R{number}");
        assert!(
            of_rule.get(rule.as_str()).is_some_and(|count| *count >= OF_A_RULE_MIN),
            "{rule}: {of_rule:?}"
        );
    }
}

/// Stages of the flow: each knows words and itself.
const STAGES: [&str; 5] = ["source", "decode", "lateness", "dedup", "sink"];
/// What stages share. A word knows words.
const WORDS: [&str; 15] = [
    "aside",
    "catalog",
    "counts",
    "crash_point",
    "event_time",
    "fingerprint",
    "id_time",
    "job",
    "letter",
    "memory",
    "mutant",
    "offset",
    "record",
    "security",
    "stop",
];

/// Modules of this crate that a file names where it ships.
fn known_by(text: &str) -> BTreeSet<&str> {
    let ships = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let code = ships.lines().filter(|line| !line.trim_start().starts_with("//"));
    code.flat_map(|line| line.split("crate::").skip(1))
        .map(|rest| rest.split(|letter: char| !letter.is_alphanumeric() && letter != '_').next().unwrap())
        .filter(|name| name.starts_with(char::is_lowercase))
        .collect()
}

#[test]
fn a_stage_knows_words_and_itself_and_a_word_knows_words() {
    let mut judged = BTreeSet::new();
    for (path, text) in sources() {
        let is_test = path.file_stem().unwrap().to_str().unwrap().ends_with("tests");
        let top = path.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
        let is_judged = STAGES.contains(&top.as_str()) || WORDS.contains(&top.as_str());
        if is_test || !is_judged || path.ends_with("testing.rs") {
            continue;
        }
        let foreign: Vec<&str> =
            known_by(&text).into_iter().filter(|known| !WORDS.contains(known) && *known != top).collect();
        assert!(foreign.is_empty(), "{} knows {foreign:?}", path.display());
        judged.insert(top);
    }
    assert!(STAGES.iter().all(|stage| judged.contains(*stage)), "{judged:?}");
}
