//! `set`: how many keys a plain set in memory bears under the limit, as ids and as their hashes.

use std::collections::HashSet;
use std::hash::Hash;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_128;

use super::{Failure, Scratch, Settings, limit};

/// Keys between two notes of how far the set is.
const NOTE_KEYS: u64 = 10_000;

/// Fills both kinds of set, each in a process of its own under the limit.
pub fn set(settings: &Settings) -> Result<Value, Failure> {
    let scratch = Scratch::of(settings)?;
    std::fs::create_dir_all(scratch.path())?;
    let mut result = json!({ "figure": "set", "keys": settings.number("keys") });
    for form in ["id", "hash"] {
        let note = scratch.path().join(format!("set-{form}"));
        let mut words = vec!["set-worker".to_owned(), "--form".to_owned(), form.to_owned()];
        words.extend(["--note".to_owned(), note.display().to_string()]);
        words.extend(settings.words(&["keys"]));
        let bytes = Some(settings.bytes("memory"));
        let mut of_form = limit::run(bytes, &std::env::current_exe()?, &words)?;
        of_form["keys_held"] = json!(held(&note)?);
        result[form] = of_form;
    }
    Ok(result)
}

/// Fills one set, and notes how far it came, for the kernel lets no process say that it is killed.
pub fn work(settings: &Settings) -> Result<Value, Failure> {
    let (keys, note) = (settings.number("keys"), PathBuf::from(settings.text("note")));
    let id = |number: u64| format!("{:032x}", xxh3_128(&number.to_le_bytes()));
    match settings.text("form") {
        "id" => fill(keys, &note, id)?,
        _ => fill(keys, &note, |number| xxh3_128(&number.to_le_bytes()))?,
    }
    Ok(json!({}))
}

fn fill<K: Hash + Eq>(keys: u64, note: &Path, key: impl Fn(u64) -> K) -> Result<(), Failure> {
    let file = std::fs::File::create(note)?;
    let mut set = HashSet::new();
    for number in 0..keys {
        set.insert(key(number));
        if (set.len() as u64).is_multiple_of(NOTE_KEYS) || number + 1 == keys {
            file.write_all_at(&(set.len() as u64).to_le_bytes(), 0)?;
        }
    }
    Ok(())
}

fn held(note: &Path) -> Result<u64, Failure> {
    let bytes = std::fs::read(note)?;
    Ok(bytes.try_into().map_or(0, u64::from_le_bytes))
}
