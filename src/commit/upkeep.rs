//! What a commit changes beside its record: snapshots leave the table, manifests become fewer (maintenance); tags come and
//! go, and a table goes back to the files of an earlier snapshot (savepoints).
//!
//! Flow: [`Upkeep`] in a request of the protocol -> the same guard, one request, read-back as every commit
//!
//! **How manifests are replaced.** `Transaction` of iceberg 0.10.1 has no action for it, and a `TableCommit` can not be
//! made outside the crate. But a fast append carries over exactly the manifests that its head's manifest list names. So
//! the transaction is shown the head with another manifest list, of fewer manifests and the same live files
//! ([`MergedHead`]), and the snapshot that it makes names those. What is sent asserts the real head, whose own list
//! stays as it is; readers of the head never see the other one. It is the merge append of Iceberg's specification.
//!
//! **How a table goes back** ([`Beyond`]). In the same way the transaction is shown the head with the manifest list and the
//! totals of the earlier snapshot, so the new snapshot names exactly that one's manifests. It is a child of the head that
//! was asserted: no ref moves without a new snapshot, and a request of an earlier life fails (R6). An append that takes
//! files away would lie to readers who follow a table by its appends, so it is sent as an overwrite.
//!
//! Invariants
//! 1. A merged list is shown only on the snapshot that it was made of. On any other head the commit goes without it.
//! 2. Which snapshots leave is asked anew for each head that a request is built on, so a tag that was set in between
//!    keeps its snapshot.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use iceberg::spec::{Operation, Snapshot, SnapshotReference, SnapshotRetention, Summary, TableMetadata};
use iceberg::table::Table;
use iceberg::transaction::{ApplyTransactionAction, Transaction};
use iceberg::{Error, ErrorKind, Runtime, TableCommit, TableRequirement, TableUpdate};
use serde_json::Value;

use crate::catalog::updates::Updates;

/// Gives the snapshots that leave a head, none of them the head of a ref.
pub type Expiring = dyn Fn(&TableMetadata) -> Vec<i64> + Send + Sync;

/// What a commit changes beside its record.
#[derive(Clone)]
pub struct Upkeep {
    /// Snapshots that leave.
    pub expiring: Arc<Expiring>,
    /// Fewer manifests for the head, if there are enough to merge.
    pub merged: Option<MergedHead>,
    /// Beside the record in the snapshot's summary.
    pub summary: BTreeMap<String, String>,
    /// Beside the record in the table's properties.
    pub properties: BTreeMap<String, String>,
    /// What no transaction of the crate can say.
    pub beyond: Option<Beyond>,
}

/// Tags, and a table that goes back.
#[derive(Debug, Clone)]
pub struct Beyond {
    /// The way to the catalog.
    pub updates: Updates,
    /// Tags that are set on the snapshot which this commit makes.
    pub tagged: Vec<String>,
    /// Tags that go.
    pub untagged: Vec<String>,
    /// The snapshot whose files the table has again.
    pub back_to: Option<i64>,
}

/// A snapshot's live files in fewer manifests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MergedHead {
    /// The snapshot that was merged.
    pub snapshot_id: i64,
    /// A manifest list that no snapshot names.
    pub manifest_list: String,
}

impl fmt::Debug for Upkeep {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Upkeep").field("merged", &self.merged).finish_non_exhaustive()
    }
}

impl Upkeep {
    /// Nothing but this.
    pub fn beyond(beyond: Beyond) -> Self {
        Self {
            expiring: Arc::new(|_| Vec::new()),
            merged: None,
            summary: BTreeMap::new(),
            properties: BTreeMap::new(),
            beyond: Some(beyond),
        }
    }

    /// The head as the transaction is to see it.
    pub(super) fn show(&self, table: &Table) -> Result<Table, Error> {
        if let Some(snapshot_id) = self.beyond.as_ref().and_then(|beyond| beyond.back_to) {
            return with_files_of(table, snapshot_id);
        }
        match &self.merged {
            Some(merged) if table.metadata().current_snapshot_id() == Some(merged.snapshot_id) => {
                with_manifest_list(table, merged)
            }
            _ => Ok(table.clone()),
        }
    }

    /// Adds the removal of snapshots to a transaction on this head. It comes before the append: the action asserts the
    /// head that it finds, and after an append that is a snapshot which no catalog knows yet.
    pub(super) fn expire(
        &self,
        transaction: Transaction,
        head: &TableMetadata,
    ) -> Result<Transaction, Error> {
        let snapshot_ids = (self.expiring)(head);
        if snapshot_ids.is_empty() {
            return Ok(transaction);
        }
        // The action's own rule of age is switched off: what leaves was decided by the rules of this program.
        let expire = transaction.expire_snapshots().expire_snapshot_ids(snapshot_ids);
        expire.expire_older_than_ms(i64::MIN).retain_last(usize::MAX).apply(transaction)
    }
}

/// The head with the files of an earlier snapshot of it: an append then makes a snapshot with these files and what is
/// appended, on top of the head, as a rollback that hides no history. Totals of the summary follow from it too.
///
/// # Errors
/// The table does not keep the snapshot.
pub(super) fn with_files_of(table: &Table, snapshot_id: i64) -> Result<Table, Error> {
    let metadata = table.metadata();
    let (Some(head), Some(earlier)) = (metadata.current_snapshot(), metadata.snapshot_by_id(snapshot_id))
    else {
        let what = format!("snapshot {snapshot_id}, to which the table is to go back, is gone");
        return Err(Error::new(ErrorKind::PreconditionFailed, what));
    };
    let summary = serde_json::to_value(earlier.summary()).map_err(unreadable)?;
    let manifest_list = Value::String(earlier.manifest_list().to_owned());
    with_current_snapshot(table, head.snapshot_id(), [("manifest-list", manifest_list), ("summary", summary)])
}

/// The same table, whose current snapshot names another manifest list.
fn with_manifest_list(table: &Table, merged: &MergedHead) -> Result<Table, Error> {
    let manifest_list = Value::String(merged.manifest_list.clone());
    with_current_snapshot(table, merged.snapshot_id, [("manifest-list", manifest_list)])
}

fn unreadable(why: serde_json::Error) -> Error {
    Error::new(ErrorKind::Unexpected, "table metadata does not go through JSON").with_source(why)
}

/// The same table with other members of its current snapshot. Goes through JSON: the crate has no setter.
fn with_current_snapshot<const MEMBERS: usize>(
    table: &Table,
    snapshot_id: i64,
    members: [(&str, Value); MEMBERS],
) -> Result<Table, Error> {
    let mut metadata = serde_json::to_value(table.metadata()).map_err(unreadable)?;
    for snapshot in metadata["snapshots"].as_array_mut().into_iter().flatten() {
        if snapshot["snapshot-id"].as_i64() == Some(snapshot_id) {
            for (name, value) in &members {
                snapshot[*name] = value.clone();
            }
        }
    }
    let metadata: TableMetadata = serde_json::from_value(metadata).map_err(unreadable)?;
    Table::builder()
        .identifier(table.identifier().clone())
        .metadata(metadata)
        .metadata_location(table.metadata_location_result()?)
        .file_io(table.file_io().clone())
        .runtime(Runtime::try_current()?)
        .build()
}

impl Beyond {
    /// Sends what a transaction built on `head`, and these changes with it; gives the head back.
    pub(super) async fn send(&self, head: &Table, mut commit: TableCommit) -> Result<Table, Error> {
        let (mut requirements, updates) = (commit.take_requirements(), commit.take_updates());
        let mut updates: Vec<TableUpdate> = updates.into_iter().map(|update| self.changed(update)).collect();
        let made = updates.iter().find_map(|update| match update {
            TableUpdate::AddSnapshot { snapshot } => Some(snapshot.snapshot_id()),
            _ => None,
        });
        for tag in self.tagged.iter().chain(&self.untagged) {
            let snapshot_id = head.metadata().snapshot_for_ref(tag).map(|found| found.snapshot_id());
            requirements.push(TableRequirement::RefSnapshotIdMatch { r#ref: tag.clone(), snapshot_id });
        }
        for (tag, snapshot_id) in self.tagged.iter().filter_map(|tag| Some((tag, made?))) {
            // A bound of its own, or the table's `history.expire.max-ref-age-ms` would let it go.
            let retention = SnapshotRetention::Tag { max_ref_age_ms: Some(i64::MAX) };
            let reference = SnapshotReference::new(snapshot_id, retention);
            updates.push(TableUpdate::SetSnapshotRef { ref_name: tag.clone(), reference });
        }
        let gone = self.untagged.iter().cloned();
        updates.extend(gone.map(|ref_name| TableUpdate::RemoveSnapshotRef { ref_name }));
        self.updates.send(head, requirements, updates).await.map(|()| head.clone())
    }

    /// A snapshot that takes files away is an overwrite.
    fn changed(&self, update: TableUpdate) -> TableUpdate {
        match update {
            TableUpdate::AddSnapshot { snapshot } if self.back_to.is_some() => {
                TableUpdate::AddSnapshot { snapshot: as_overwrite(&snapshot) }
            }
            update => update,
        }
    }
}

fn as_overwrite(made: &Snapshot) -> Snapshot {
    let additional_properties = made.summary().additional_properties.clone();
    Snapshot::builder()
        .with_snapshot_id(made.snapshot_id())
        .with_parent_snapshot_id(made.parent_snapshot_id())
        .with_sequence_number(made.sequence_number())
        .with_timestamp_ms(made.timestamp_ms())
        .with_manifest_list(made.manifest_list())
        .with_summary(Summary { operation: Operation::Overwrite, additional_properties })
        .schema_id_opt(made.schema_id())
        .build()
}
