//! Files that nothing names: metadata files that left the log, and what failed attempts left.
//!
//! When a file may go
//! 1. A metadata file whose version is below every one of the log: at once, if the table says so
//!    (`write.metadata.delete-after-commit.enabled`). No commit can still build on it: it left the log by as many commits.
//! 2. A metadata file of a version up to the current one that the log does not hold lost its race: after the bound.
//! 3. A file of an attempt of this program, by its name ([`names`](super::names)), that no snapshot names: after the
//!    bound, by the storage's clock and by the attempt's. The caller holds the table by a commit of its own epoch and has
//!    no batch open (invariant 4 of the module above), so the attempt can not land any more; the bound is for readers.
//!
//! Everything else is left where it is, also what other programs forgot.
//!
//! Before any data file goes, every data file that the table names must be in the listing. Else names differ from what
//! the storage calls them, and nothing could be told to be unnamed.

use std::collections::{BTreeSet, HashSet};

use iceberg::spec::SnapshotRef;
use iceberg::table::Table;
use xxhash_rust::xxh3::xxh3_128;

use super::reach::{self, Reach};
use super::storage::{Found, list};
use super::{Done, MaintenanceError, delete, names, statistics_of};
use crate::mutant;

/// When orphans are old enough, and where they are looked for.
#[derive(Debug, Clone, Copy)]
pub struct Orphans {
    /// Written before this, ms since the epoch.
    pub before_ms: i64,
    /// Whether the folder of data files is searched too, which lists and reads as much as the table is large.
    pub in_data: bool,
    /// Whether metadata files that left the log go.
    pub metadata_files: bool,
    /// Only count.
    pub dry_run: bool,
}

/// Files of the metadata folder.
///
/// # Errors
/// [`MaintenanceError::Listing`]
pub async fn list_metadata(table: &Table) -> Result<Vec<Found>, MaintenanceError> {
    let mut found = Vec::new();
    list(table.file_io(), &names::metadata_folder(table), false, |file| found.push(file)).await?;
    Ok(found)
}

/// Deletes what nothing names any more, of files that were found before `table` was loaded.
///
/// # Errors
/// [`MaintenanceError`]; what was not deleted is found again.
pub async fn sweep(table: &Table, found: &[Found], orphans: &Orphans) -> Result<Done, MaintenanceError> {
    let old = old_metadata_files(table, found, orphans);
    let snapshots: Vec<SnapshotRef> = table.metadata().snapshots().cloned().collect();
    let reach = Reach::of(table, &snapshots).await?;
    let mut lost = lost_manifests(table, found, &reach, &snapshots, orphans);
    if orphans.in_data {
        lost.extend(lost_data_files(table, &reach, orphans).await?);
    }
    let done = Done { metadata_files_deleted: old.len(), orphans_deleted: lost.len(), ..Done::default() };
    if !orphans.dry_run {
        delete(table, old).await?;
        delete(table, lost).await?;
    }
    Ok(done)
}

fn old_metadata_files(table: &Table, found: &[Found], orphans: &Orphans) -> BTreeSet<String> {
    let metadata = table.metadata();
    let logged: HashSet<&str> =
        metadata.metadata_log().iter().map(|entry| names::plain(&entry.metadata_file)).collect();
    let logged_versions =
        metadata.metadata_log().iter().map(|entry| names::metadata_version(&entry.metadata_file));
    // A log of names that this program can not read, or none, tells nothing of what is old.
    let Some(oldest) = logged_versions.collect::<Option<Vec<_>>>().and_then(|all| all.into_iter().min())
    else {
        return BTreeSet::new();
    };
    let Some(current) = table.metadata_location() else { return BTreeSet::new() };
    let Some(newest) = names::metadata_version(current) else { return BTreeSet::new() };
    let goes = |file: &&Found| {
        let Some(version) = names::metadata_version(&file.path) else { return false };
        let plain = names::plain(&file.path);
        let named = plain == names::plain(current) || logged.contains(plain);
        let left_the_log = version < oldest && orphans.metadata_files;
        let lost_its_race = (oldest..=newest).contains(&version) && file.modified_ms < orphans.before_ms;
        !named && (left_the_log || lost_its_race)
    };
    found.iter().filter(goes).map(|file| file.path.clone()).collect()
}

fn is_old_attempt(file: &Found, orphans: &Orphans) -> bool {
    let made_ms = names::attempt_ms(&file.path);
    let before_ms = mutant!("young-attempts-are-orphans", i64::MAX => orphans.before_ms);
    made_ms.is_some_and(|made_ms| made_ms < before_ms) && file.modified_ms < before_ms
}

/// Manifests, lists and intents of failed attempts.
fn lost_manifests(
    table: &Table,
    found: &[Found],
    reach: &Reach,
    snapshots: &[SnapshotRef],
    orphans: &Orphans,
) -> BTreeSet<String> {
    let mut named: HashSet<String> = reach.paths().map(|path| names::plain(path).to_owned()).collect();
    for snapshot in snapshots {
        let statistics = statistics_of(table.metadata(), snapshot.snapshot_id());
        named.extend(statistics.iter().map(|path| names::plain(path).to_owned()));
    }
    let goes = |file: &&Found| is_old_attempt(file, orphans) && !named.contains(names::plain(&file.path));
    found.iter().filter(goes).map(|file| file.path.clone()).collect()
}

/// Data files of failed attempts.
async fn lost_data_files(
    table: &Table,
    reach: &Reach,
    orphans: &Orphans,
) -> Result<BTreeSet<String>, MaintenanceError> {
    let Some(folder) = names::own_data_folder(table) else {
        tracing::info!(table = %table.identifier(), "data files lie outside the table's folder, orphans are not looked for");
        return Ok(BTreeSet::new());
    };
    let named = live_data_files(table, reach, &folder).await?;
    let mut lost = BTreeSet::new();
    let mut listed = vec![false; named.len()];
    list(table.file_io(), &folder, true, |file| match named.binary_search(&hash_of(&file.path)) {
        Ok(place) => listed[place] = true,
        Err(_) if is_old_attempt(&file, orphans) => drop(lost.insert(file.path)),
        Err(_) => {}
    })
    .await?;
    let missing = listed.iter().filter(|listed| !**listed).count();
    match mutant!("orphans-go-though-files-are-missing", 0 => missing) {
        0 => Ok(lost),
        missing => {
            let table = table.identifier().to_string();
            Err(MaintenanceError::NamesDiffer { table, folder, missing })
        }
    }
}

/// Hashes of the paths of all live data files inside a folder, sorted. Two files of one hash would only keep an orphan.
async fn live_data_files(table: &Table, reach: &Reach, folder: &str) -> Result<Vec<u128>, MaintenanceError> {
    let inside = format!("{}/", names::plain(folder));
    let mut named = Vec::new();
    for manifest in reach.manifests() {
        let manifest = reach::load(table, manifest).await?;
        let live = manifest.entries().iter().filter(|entry| entry.is_alive()).map(|entry| entry.file_path());
        named.extend(live.filter(|path| names::plain(path).starts_with(&inside)).map(hash_of));
    }
    named.sort_unstable();
    named.dedup();
    Ok(named)
}

fn hash_of(path: &str) -> u128 {
    xxh3_128(names::plain(path).as_bytes())
}
