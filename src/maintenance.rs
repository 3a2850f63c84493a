//! Maintenance: what keeps a table that takes a commit a minute at the same cost for months.
//!
//! Snapshots leave by age and number, small manifests become few, files that nothing names any more are deleted. Data
//! files are never rewritten here.
//!
//! Flow of one pass over one table, by its owner
//! ```text
//! metadata folder -> intents of passes that did not end: finished
//! head -> [`Rules`], [`expiring`] -> [`Pass::prepare`]: intent, merged manifests
//!      -> commit with an [`Upkeep`](crate::commit::upkeep::Upkeep), read back -> [`finish`]: files deleted, intent deleted
//!      -> [`sweep`]: old metadata files, files of attempts that failed
//! ```
//!
//! Invariants
//! 1. A file is deleted only when the metadata that was read back after the commit reaches it by no snapshot, ref or
//!    statistics entry. What would be deleted is decided before, whether it may be is asked after.
//! 2. Snapshots on the ancestry leave from the old end only, so it stays whole down to the records of the dedup
//!    generations that are kept ([`retention`]).
//! 3. Everything that a pass writes or will delete is named by its intent before it is written or the commit is sent.
//! 4. A pass runs between two microbatches of the owner, after its fence and with the side tables forwarded: no attempt
//!    of this or an earlier epoch can still land on main, and no side table is owed a file. The fence does not reach
//!    side tables: what an earlier pass left there is finished only after a commit of this epoch moved their head.
//!
//! Order of durable steps, and what a crash after each leaves
//! 1. intent: a list of files; nothing is deleted by it that the table reaches.
//! 2. merged manifests: files that only the intent names. The next pass deletes them.
//! 3. commit: the table is as it will be; the intent names what is to go. The next pass deletes it.
//! 4. deletes: the same, less what is gone.
//!
//! Bounds: [`SNAPSHOTS_EXPIRED_MAX`] snapshots in a pass, `merge::ENTRIES_MAX` data files in a merged manifest,
//! [`REQUESTS_MAX`] requests at once, 17 bytes of memory per data file of the table while orphans are looked for.

mod intent;
mod merge;
mod names;
mod reach;
pub mod retention;
mod rules;
pub(crate) mod storage;
mod sweep;

use std::collections::BTreeSet;

use futures::StreamExt;
use iceberg::spec::{Operation, SnapshotRef, TableMetadata};
use iceberg::table::Table;
use serde::Serialize;
use uuid::Uuid;

pub use intent::{Intent, unfinished};
pub use names::metadata_folder;
pub use retention::{Keep, expiring};
pub use rules::{MergeRule, PropertyError, Rules};
pub use storage::Found;
pub use sweep::{Orphans, list_metadata, sweep};

use crate::catalog::reason_of;
use crate::commit::upkeep::MergedHead;
use crate::sink::durable::FolderSyncError;
use crate::stop::Reason;
use reach::Reach;

/// Most snapshots that leave in one pass; the oldest first. The next pass goes on.
pub const SNAPSHOTS_EXPIRED_MAX: usize = 1_000;
/// Most requests to the storage at once.
pub const REQUESTS_MAX: usize = 8;
/// Key of a snapshot's summary that says what a pass did.
pub const SUMMARY: &str = "tidemill.maintenance";

/// Why a pass did not end. Nothing that the table reaches is lost, and the next pass goes on where this one ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MaintenanceError {
    /// The storage failed, or a file of the table can not be read.
    #[error("{what}")]
    Storage {
        /// What was done.
        what: String,
        /// The error below.
        source: Box<iceberg::Error>,
    },
    /// A folder of the warehouse can not be listed.
    #[error("folder {folder} can not be listed")]
    Listing {
        /// The folder.
        folder: String,
        /// The error below.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Written names can not be made durable.
    #[error(transparent)]
    FolderSync(#[from] FolderSyncError),
    /// The names in the table's metadata are not those of the storage, so nothing can be told to be unnamed.
    #[error(
        "{missing} data files that table {table} names are not in the listing of {folder}; no orphan was deleted"
    )]
    NamesDiffer {
        /// The table.
        table: String,
        /// The folder.
        folder: String,
        /// How many.
        missing: usize,
    },
}

impl MaintenanceError {
    /// The named reason of a command that ends with this error.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Storage { source, .. } => reason_of(source),
            Self::Listing { .. } => Reason::CatalogAway,
            Self::FolderSync(_) => Reason::StorageFailed,
            Self::NamesDiffer { .. } => Reason::Unexpected,
        }
    }

    fn storage(what: impl Into<String>) -> impl FnOnce(iceberg::Error) -> Self {
        let what = what.into();
        move |source| Self::Storage { what, source: Box::new(source) }
    }
}

/// What passes over a table did, or would do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Done {
    /// Snapshots that left.
    pub snapshots_expired: usize,
    /// Small manifests that were merged.
    pub manifests_merged: usize,
    /// Manifests that took their place.
    pub manifests_written: usize,
    /// Deleted files that only snapshots that left had named: manifest lists, manifests, data files, statistics.
    pub files_deleted: usize,
    /// Deleted metadata files.
    pub metadata_files_deleted: usize,
    /// Deleted files of attempts that failed.
    pub orphans_deleted: usize,
}

impl Done {
    /// Adds up.
    pub fn add(&mut self, other: &Self) {
        self.snapshots_expired += other.snapshots_expired;
        self.manifests_merged += other.manifests_merged;
        self.manifests_written += other.manifests_written;
        self.files_deleted += other.files_deleted;
        self.metadata_files_deleted += other.metadata_files_deleted;
        self.orphans_deleted += other.orphans_deleted;
    }

    /// Whether nothing was done.
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

impl std::fmt::Display for Done {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            out,
            "{} snapshots expired, {} manifests merged into {}, deleted: {} files that only those snapshots named, \
             {} old metadata files, {} files of failed attempts",
            self.snapshots_expired,
            self.manifests_merged,
            self.manifests_written,
            self.files_deleted,
            self.metadata_files_deleted,
            self.orphans_deleted
        )
    }
}

/// A pass whose commit is to be sent.
#[derive(Debug)]
pub struct Pass {
    /// Snapshots that leave, if the head is still the one that was looked at.
    pub expiring: Vec<i64>,
    /// The head in fewer manifests.
    pub merged: Option<MergedHead>,
    /// What the pass does when it lands.
    pub done: Done,
    intent: Intent,
}

impl Pass {
    /// Looks what is to be done, without writing anything.
    ///
    /// # Errors
    /// [`MaintenanceError`]
    pub async fn look(
        table: &Table,
        rules: &Rules,
        keep: &Keep,
        attempt: Uuid,
    ) -> Result<Option<Self>, MaintenanceError> {
        Ok(plan(table, rules, keep, attempt).await?.map(|(pass, _)| pass))
    }

    /// Writes the intent and then the merged manifests. `None` where nothing is to be done.
    ///
    /// # Errors
    /// [`MaintenanceError`]; what was written is named by the intent, and the next pass deletes it.
    pub async fn prepare(
        table: &Table,
        rules: &Rules,
        keep: &Keep,
        attempt: Uuid,
    ) -> Result<Option<Self>, MaintenanceError> {
        let Some((pass, merging)) = plan(table, rules, keep, attempt).await? else { return Ok(None) };
        pass.intent.write(table).await?;
        crate::crash_point!("maintenance_intended");
        if let Some(merging) = merging {
            merging.write(table).await?;
            crate::crash_point!("maintenance_merged");
        }
        Ok(Some(pass))
    }

    /// The intent, to be finished when the commit was read back.
    pub fn into_intent(self) -> Intent {
        self.intent
    }

    /// Files that the pass would delete at most.
    pub fn files_to_go(&self) -> usize {
        self.intent.files.len() + self.intent.data_files.len()
    }
}

async fn plan(
    table: &Table,
    rules: &Rules,
    keep: &Keep,
    attempt: Uuid,
) -> Result<Option<(Pass, Option<merge::Merging>)>, MaintenanceError> {
    let metadata = table.metadata();
    let expiring = if rules.collects { expiring(metadata, rules, keep) } else { Vec::new() };
    let merging = match (&rules.merge, metadata.current_snapshot()) {
        (Some(rule), Some(head)) => merge::Merging::plan(table, head, rule, attempt).await?,
        _ => None,
    };
    if expiring.is_empty() && merging.is_none() {
        return Ok(None);
    }
    let (mut files, data_files) = doomed(table, &expiring).await?;
    let mut done = Done { snapshots_expired: expiring.len(), ..Done::default() };
    if let Some(merging) = &merging {
        files.extend(merging.paths());
        (done.manifests_merged, done.manifests_written) = (merging.manifests_merged(), merging.bins());
    }
    let intent = Intent::new(table, attempt, files, data_files);
    let pass = Pass { expiring, merged: merging.as_ref().map(merge::Merging::head), done, intent };
    Ok(Some((pass, merging)))
}

/// Files that are named by snapshots that leave, and by none that stays; data and delete files apart.
async fn doomed(
    table: &Table,
    expiring: &[i64],
) -> Result<(BTreeSet<String>, BTreeSet<String>), MaintenanceError> {
    let metadata = table.metadata();
    let leaves = |snapshot: &SnapshotRef| expiring.contains(&snapshot.snapshot_id());
    let (leaving, staying): (Vec<_>, Vec<_>) = metadata.snapshots().cloned().partition(leaves);
    if leaving.is_empty() {
        return Ok((BTreeSet::new(), BTreeSet::new()));
    }
    let leaving_reach = Reach::of(table, &leaving).await?;
    let staying_reach = Reach::of(table, &staying).await?;
    let mut doomed = leaving_reach.files_beyond(&staying_reach);
    for id in expiring {
        doomed.extend(statistics_of(metadata, *id));
    }
    let mut data_files = BTreeSet::new();
    if may_drop_data_files(metadata, &leaving) {
        let gone: Vec<_> = leaving_reach.manifests_beyond(&staying_reach).cloned().collect();
        data_files = reach::all_files(table, &gone).await?;
        reach::strike_live(table, staying_reach.manifests(), &mut data_files).await?;
    }
    Ok((doomed, data_files))
}

fn statistics_of(metadata: &TableMetadata, snapshot_id: i64) -> Vec<String> {
    let whole = metadata.statistics_for_snapshot(snapshot_id).map(|file| file.statistics_path.clone());
    let parts =
        metadata.partition_statistics_for_snapshot(snapshot_id).map(|file| file.statistics_path.clone());
    whole.into_iter().chain(parts).collect()
}

/// Whether a data file may have had its last mention in a snapshot that leaves. An append only adds files (Iceberg
/// specification, "Snapshots", operation), so where all snapshots that leave are appends below the current one, and so
/// is each that stays on top of one that leaves, all their data files are still named.
fn may_drop_data_files(metadata: &TableMetadata, leaving: &[SnapshotRef]) -> bool {
    let is_append = |snapshot: &SnapshotRef| snapshot.summary().operation == Operation::Append;
    let ancestors: BTreeSet<i64> =
        crate::commit::ledger::ancestry(metadata).map(|snapshot| snapshot.snapshot_id()).collect();
    let leaving_ids: BTreeSet<i64> = leaving.iter().map(|snapshot| snapshot.snapshot_id()).collect();
    let on_top = |snapshot: &&SnapshotRef| {
        snapshot.parent_snapshot_id().is_some_and(|parent| leaving_ids.contains(&parent))
    };
    let all_below =
        leaving.iter().all(|snapshot| is_append(snapshot) && ancestors.contains(&snapshot.snapshot_id()));
    !(all_below && metadata.snapshots().filter(on_top).all(is_append))
}

/// Deletes what an intent names and the table, as it was read back, does not reach; then the intent. Gives the number of
/// files deleted.
///
/// # Errors
/// [`MaintenanceError`]; the intent stays, and the next pass finishes it.
pub async fn finish(table: &Table, intent: &Intent) -> Result<usize, MaintenanceError> {
    let (mut files, mut data_files) = (intent.files.clone(), intent.data_files.clone());
    let metadata = table.metadata();
    let snapshots: Vec<SnapshotRef> = metadata.snapshots().cloned().collect();
    let reach = Reach::of(table, &snapshots).await?;
    reach.strike(&mut files);
    for snapshot in &snapshots {
        for path in statistics_of(metadata, snapshot.snapshot_id()) {
            files.remove(&path);
        }
    }
    reach::strike_live(table, reach.manifests(), &mut data_files).await?;
    files.extend(data_files);
    let deleted = delete(table, files).await?;
    crate::crash_point!("maintenance_deleted");
    intent.remove(table).await?;
    Ok(deleted)
}

/// Deletes files, several at a time. One that is gone already is no error.
async fn delete(table: &Table, files: BTreeSet<String>) -> Result<usize, MaintenanceError> {
    let file_io = table.file_io();
    let deletes = files.into_iter().map(|path| async move {
        crate::crash_point!("maintenance_deleting");
        file_io.delete(&path).await.map_err(MaintenanceError::storage(format!("deleting {path}")))
    });
    let mut results = futures::stream::iter(deletes).buffer_unordered(REQUESTS_MAX);
    let (mut deleted, mut failed) = (0, None);
    while let Some(result) = results.next().await {
        match result {
            Ok(()) => deleted += 1,
            Err(error) => failed = Some(error),
        }
    }
    failed.map_or(Ok(deleted), Err)
}

#[cfg(test)]
mod tests;
