//! Savepoints as the tables know them: tags.
//!
//! A savepoint of main is the tag `tidemill-savepoint-NAME` on a snapshot that carries a ledger record. The tag is all there
//! is: the record says where the topics were, which dedup generation belongs to it and what its side tables are; the tag
//! keeps the snapshot from being expired, and the generation from being swept ([`pinned_generations`]). So a savepoint
//! that somebody drops with another engine is gone like one that was dropped here. Each side table has a tag of the same
//! name on the snapshot that belongs to it.
//!
//! Invariants
//! 1. Side tables are tagged before main: a tag of main means that the savepoint is whole. A tag that only a side table has
//!    is what a crash left ([`strays`]); the next `savepoint create` or `drop` takes it away.
//! 2. Main's tag goes first when a savepoint is dropped.
//! 3. A tag is set on the snapshot that its own commit makes, which asserts the head that was inspected.

use std::collections::{BTreeMap, HashMap};

use iceberg::spec::{SnapshotReference, TableMetadata};
use serde::Deserialize;

use super::ledger::{LedgerError, LedgerRecord, SUMMARY_PACKED};

/// What the tags of savepoints begin with.
pub const TAG_PREFIX: &str = "tidemill-savepoint-";
/// Longest name of a savepoint, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// The tag of a savepoint.
pub fn tag(name: &str) -> String {
    format!("{TAG_PREFIX}{name}")
}

/// Whether a text can name a savepoint: 1 to 64 of `a-z`, `0-9`, `_`, `-` and `.`, beginning with a letter or digit. It
/// becomes part of a ref's name, which other engines write into SQL.
pub fn is_name(text: &str) -> bool {
    let first = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let any = |byte: u8| first(byte) || b"_-.".contains(&byte);
    (1..=NAME_BYTES_MAX).contains(&text.len()) && first(text.as_bytes()[0]) && text.bytes().all(any)
}

/// A savepoint of a main table.
#[derive(Debug, Clone, PartialEq)]
pub struct Savepoint {
    /// Its name.
    pub name: String,
    /// Snapshot of main.
    pub snapshot_id: i64,
    /// When it was made, ms since the epoch, by the clock of who made it.
    pub made_ms: i64,
    /// What the ledger said then, from its packed form.
    pub record: LedgerRecord,
}

/// Savepoints of a main table, by name. `None` where its refs can not be read.
///
/// # Errors
/// [`LedgerError`] when the record of one is newer than this program or broken.
pub fn of_main(metadata: &TableMetadata) -> Result<Vec<Savepoint>, LedgerError> {
    let mut found = Vec::new();
    for (name, snapshot_id) in tags(metadata).unwrap_or_default() {
        let Some(snapshot) = metadata.snapshot_by_id(snapshot_id) else { continue };
        let Some(packed) = snapshot.summary().additional_properties.get(SUMMARY_PACKED) else { continue };
        let record = LedgerRecord::from_packed(packed, snapshot_id)?;
        found.push(Savepoint { name, snapshot_id, made_ms: snapshot.timestamp_ms(), record });
    }
    Ok(found)
}

/// Snapshots of a table's savepoint tags by the name of the savepoint. `None` where the refs can not be read.
pub fn tags(metadata: &TableMetadata) -> Option<BTreeMap<String, i64>> {
    let of_savepoint = |(name, at): (String, SnapshotReference)| {
        Some((name.strip_prefix(TAG_PREFIX)?.to_owned(), at.snapshot_id))
    };
    Some(refs(metadata)?.into_iter().filter_map(of_savepoint).collect())
}

/// The snapshot of a table that belongs to a savepoint.
pub fn tagged(metadata: &TableMetadata, name: &str) -> Option<i64> {
    metadata.snapshot_for_ref(&tag(name)).map(|snapshot| snapshot.snapshot_id())
}

/// Tags of a side table that no savepoint of main has.
pub fn strays(main: &TableMetadata, side: &TableMetadata) -> Vec<String> {
    let (Some(whole), Some(tagged)) = (tags(main), tags(side)) else { return Vec::new() };
    tagged.into_keys().filter(|name| !whole.contains_key(name)).collect()
}

/// Name and checksum of the generations that savepoints need. `None` where the refs can not be read: then nothing may be
/// deleted.
pub fn pinned_generations(metadata: &TableMetadata) -> Option<Vec<(String, String)>> {
    let mut pinned = Vec::new();
    for snapshot_id in tags(metadata)?.into_values() {
        let snapshot = metadata.snapshot_by_id(snapshot_id);
        let packed = snapshot.and_then(|found| found.summary().additional_properties.get(SUMMARY_PACKED));
        // A tag that somebody set by hand on a snapshot that is not ours pins nothing.
        let Some(packed) = packed else { continue };
        let dedup = LedgerRecord::from_packed(packed, snapshot_id).ok()?.dedup;
        pinned.extend(dedup.generation.zip(dedup.checksum));
    }
    Some(pinned)
}

#[derive(Deserialize)]
struct WithRefs {
    #[serde(default)]
    refs: HashMap<String, SnapshotReference>,
}

/// Refs of a table. The crate gives a ref by its name only, so they are read from the table's JSON.
pub(crate) fn refs(metadata: &TableMetadata) -> Option<HashMap<String, SnapshotReference>> {
    let text = serde_json::to_vec(metadata).ok()?;
    serde_json::from_slice::<WithRefs>(&text).ok().map(|with| with.refs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_every_engine_takes_as_a_ref() {
        for good in ["a", "before-rekey", "2026-03-01", "v1.2_x", &"a".repeat(64)] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", "-a", ".a", "A", "a b", "a/b", "ä", "a'b", &"a".repeat(65)] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
