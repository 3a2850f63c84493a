//! The corpus of the fuzzers and seeded mutations of it, in every test run. `tests/fuzz` runs the same functions under a
//! coverage-guided fuzzer; what it finds becomes a file of `fixtures/fuzz`, which is read here for ever.

use crate::dedup::fuzz_tests::{MUTATIONS, Seeds, feed, files_in, fixtures};

/// Reads the corpus of a target and its mutations, of which at least one in `one_in` is to be taken: mutations are to
/// reach what stands behind the first check.
fn replay(target: &str, one_in: usize, read: fn(&[u8]) -> bool) {
    let whole = files_in(&fixtures("fuzz").join(target));
    assert!(whole.len() > 1, "{target} has seeds");
    assert!(whole.iter().any(|seed| read(seed)), "a seed of {target} is taken as it is");
    let taken = feed(target, &Seeds { kept: whole.clone(), whole }, read);
    assert!(taken > MUTATIONS / one_in, "{taken} mutations of {target} were taken");
}

#[test]
fn no_ledger_record_makes_its_reader_panic() {
    replay("ledger", 20, super::ledger);
}

#[test]
fn no_answer_of_a_catalog_makes_its_reader_panic_or_hang() {
    replay("table_metadata", 50, super::table_metadata);
}

#[test]
fn no_list_of_owed_files_makes_its_reader_panic() {
    replay("owed_files", 50, super::owed_files);
}

#[test]
fn no_job_file_makes_its_reader_panic() {
    replay("job_file", 50, super::job_file);
}

#[test]
fn no_payload_makes_the_decoder_panic_or_write_what_is_no_json() {
    replay("payload", 100, super::payload);
}

#[test]
fn a_snapshot_that_is_its_own_ancestor_ends_the_walk() {
    let text =
        String::from_utf8(std::fs::read(fixtures("fuzz/table_metadata/main-3.json")).unwrap()).unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    for snapshot in value["snapshots"].as_array_mut().unwrap() {
        snapshot["parent-snapshot-id"] = snapshot["snapshot-id"].clone();
        snapshot["summary"] = serde_json::json!({"operation": "append"});
    }
    super::table_metadata(value.to_string().as_bytes());
}
