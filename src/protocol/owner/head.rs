//! Whether a head is the one that an owner's next commit goes onto.
//!
//! Snapshots that others put on top of our record are no hindrance, a record of another owner is, and so is a table that was
//! rolled back below ours. Where others expired the history past our record, rollback and expiry look alike in the
//! metadata: what descends from a snapshot that we saw was not rolled back, and of anything else the rows of our last batch
//! tell ([`Expected::is_doubtful`]).

use std::collections::BTreeSet;

use iceberg::spec::{SnapshotRef, TableMetadata};
use uuid::Uuid;

use crate::commit::ledger::{self, Found};
use crate::mutant;

/// The head that the next commit goes onto.
pub(super) struct Expected {
    /// Of the record that it builds on.
    pub(super) attempt: Uuid,
    /// Iceberg's sequence number of that record's snapshot.
    pub(super) sequence_number: i64,
    /// The current snapshot, where there is no record yet.
    pub(super) base: Option<i64>,
    /// Schema and spec that the files were written with, if any are appended.
    pub(super) ids: Option<(i32, i32)>,
    /// Whether the table may have been rolled back to the record.
    pub(super) replays: bool,
    /// The snapshots from the record to the head as it was last seen: what descends from one of them was not rolled back.
    pub(super) kin: BTreeSet<i64>,
    /// A snapshot that has the rows of the last batch.
    pub(super) looked_at: Option<i64>,
}

impl Expected {
    /// Whether it can not be told that what is kept of the history came of ours.
    pub(super) fn is_doubtful(&self, metadata: &TableMetadata) -> bool {
        let is_cut_off =
            matches!(ledger::inspect(metadata), Ok(Found::CutOff(record)) if record.attempt == self.attempt);
        is_cut_off && ledger::came_after(metadata, self.sequence_number) && !self.is_of_ours(metadata)
    }

    fn is_of_ours(&self, metadata: &TableMetadata) -> bool {
        let is_kin = |id: i64| self.kin.contains(&id);
        let descends = |snapshot: &SnapshotRef| {
            is_kin(snapshot.snapshot_id()) || snapshot.parent_snapshot_id().is_some_and(is_kin)
        };
        self.looked_at == metadata.current_snapshot_id() || ledger::ancestry(metadata).any(descends)
    }
}

/// Snapshots from the record of this attempt to the head. Where it was expired none of what is kept is known to be kin, but
/// all of it is if the head `was_judged` by a start.
pub(super) fn kin(metadata: &TableMetadata, attempt: Uuid, was_judged: bool) -> BTreeSet<i64> {
    let attempt = attempt.to_string();
    let mut kin = BTreeSet::new();
    for snapshot in ledger::ancestry(metadata) {
        kin.insert(snapshot.snapshot_id());
        if snapshot.summary().additional_properties.get("tidemill.attempt") == Some(&attempt) {
            return kin;
        }
    }
    if was_judged { kin } else { BTreeSet::new() }
}

/// Whether the head still carries the record that the next commit builds on, and, if files are appended, the schema
/// and spec they were written with. Where the record's snapshot was expired, what is left must have come of it: else
/// the table was rolled back to a snapshot of others, which has lost its ancestors too.
pub(super) fn head_carries(metadata: &TableMetadata, head: &Expected) -> Result<(), String> {
    let expected = head.attempt;
    let found = ledger::inspect(metadata).map_err(|error| error.to_string())?;
    let is_expected = |now: Uuid| mutant!("later-head-accepted", now >= expected => now == expected);
    match found {
        Found::Nothing if expected.is_nil() => {
            if metadata.current_snapshot_id() != head.base {
                return Err("another writer committed before the first fence".to_owned());
            }
        }
        Found::Record(record) if is_expected(record.attempt) => {}
        Found::CutOff(record) if is_expected(record.attempt) => {
            if !ledger::came_after(metadata, head.sequence_number) {
                return Err("it was rolled back, and what lay below was expired".to_owned());
            }
            if !head.is_of_ours(metadata) {
                return Err("what is kept of its history does not tell whether it was rolled back".to_owned());
            }
        }
        Found::RolledBack { older: Some(older), .. } if head.replays && older.attempt == expected => {}
        Found::Nothing => return Err("its ledger record is gone".to_owned()),
        Found::Record(record) | Found::CutOff(record) => {
            return Err(format!(
                "it is at epoch {} batch {} of owner {}",
                record.epoch, record.batch, record.owner
            ));
        }
        Found::RolledBack { .. } => return Err("it was rolled back".to_owned()),
    }
    let now = (metadata.current_schema_id(), metadata.default_partition_spec_id());
    match head.ids {
        Some(written) if written != now => Err(format!(
            "its schema and spec are now {} and {}, the files were written with {} and {}",
            now.0, now.1, written.0, written.1
        )),
        _ => Ok(()),
    }
}
