//! What snapshots name: manifest lists, manifests, data files.
//!
//! Cost: one read per snapshot for lists and manifests; one read per manifest for data files, which is asked for only
//! where a data file may have lost its last mention.

use std::collections::{BTreeMap, BTreeSet};

use futures::{StreamExt, TryStreamExt};
use iceberg::spec::{Manifest, ManifestFile, SnapshotRef};
use iceberg::table::Table;

use super::{MaintenanceError, REQUESTS_MAX};

/// Manifest lists and manifests that snapshots name.
#[derive(Debug, Default)]
pub(super) struct Reach {
    lists: BTreeSet<String>,
    manifests: BTreeMap<String, ManifestFile>,
}

impl Reach {
    /// Reads the manifest lists of the snapshots.
    pub(super) async fn of(table: &Table, snapshots: &[SnapshotRef]) -> Result<Self, MaintenanceError> {
        let mut reach = Self::default();
        let loads = snapshots.iter().map(|snapshot| manifests_of(table, snapshot));
        let mut loaded = futures::stream::iter(loads).buffer_unordered(REQUESTS_MAX);
        while let Some(manifests) = loaded.try_next().await? {
            reach
                .manifests
                .extend(manifests.into_iter().map(|manifest| (manifest.manifest_path.clone(), manifest)));
        }
        reach.lists = snapshots.iter().map(|snapshot| snapshot.manifest_list().to_owned()).collect();
        Ok(reach)
    }

    /// All manifests.
    pub(super) fn manifests(&self) -> impl Iterator<Item = &ManifestFile> {
        self.manifests.values()
    }

    /// Manifests that the other does not name.
    pub(super) fn manifests_beyond<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = &'a ManifestFile> {
        self.manifests().filter(|manifest| !other.manifests.contains_key(&manifest.manifest_path))
    }

    /// Lists and manifests that the other does not name.
    pub(super) fn files_beyond(&self, other: &Self) -> BTreeSet<String> {
        let lists = self.lists.difference(&other.lists).cloned();
        lists.chain(self.manifests_beyond(other).map(|manifest| manifest.manifest_path.clone())).collect()
    }

    /// Takes what is named out of a set.
    pub(super) fn strike(&self, files: &mut BTreeSet<String>) {
        files.retain(|path| !self.names(path));
    }

    /// Whether a file is a list or manifest of these snapshots.
    pub(super) fn names(&self, path: &str) -> bool {
        self.lists.contains(path) || self.manifests.contains_key(path)
    }

    /// Paths of lists and manifests.
    pub(super) fn paths(&self) -> impl Iterator<Item = &String> {
        self.lists.iter().chain(self.manifests.keys())
    }
}

/// Manifests of one snapshot.
pub(super) async fn manifests_of(
    table: &Table,
    snapshot: &SnapshotRef,
) -> Result<Vec<ManifestFile>, MaintenanceError> {
    let what = format!("reading manifest list {}", snapshot.manifest_list());
    let list = table.manifest_list_reader(snapshot).load().await.map_err(MaintenanceError::storage(what))?;
    Ok(list.consume_entries().into_iter().collect())
}

/// One manifest with its entries.
pub(super) async fn load(table: &Table, manifest: &ManifestFile) -> Result<Manifest, MaintenanceError> {
    let what = format!("reading manifest {}", manifest.manifest_path);
    manifest.load_manifest(table.file_io()).await.map_err(MaintenanceError::storage(what))
}

/// Data and delete files that manifests mention, live or deleted.
pub(super) async fn all_files(
    table: &Table,
    manifests: &[ManifestFile],
) -> Result<BTreeSet<String>, MaintenanceError> {
    let mut files = BTreeSet::new();
    for manifest in manifests {
        files.extend(load(table, manifest).await?.entries().iter().map(|entry| entry.file_path().to_owned()));
    }
    Ok(files)
}

/// Takes out of a set what is live in a manifest. Ends as soon as nothing is left in it.
pub(super) async fn strike_live(
    table: &Table,
    manifests: impl Iterator<Item = &ManifestFile>,
    files: &mut BTreeSet<String>,
) -> Result<(), MaintenanceError> {
    for manifest in manifests {
        if files.is_empty() {
            return Ok(());
        }
        for entry in load(table, manifest).await?.entries().iter().filter(|entry| entry.is_alive()) {
            files.remove(entry.file_path());
        }
    }
    Ok(())
}
