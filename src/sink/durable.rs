//! Names that survive a power cut: the storage layer syncs files, and not the folders that hold their names.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A folder of a local warehouse that can not be synced: what was written may vanish with a power cut.
#[derive(Debug, thiserror::Error)]
#[error("folder {} can not be synced; check the disk", folder.display())]
pub struct FolderSyncError {
    /// The folder.
    pub folder: PathBuf,
    /// The error below.
    pub source: std::io::Error,
}

/// Path of a location in a local warehouse; `None` on other storage.
pub fn local_path(location: &str) -> Option<&Path> {
    let path =
        location.strip_prefix("file://").or_else(|| location.strip_prefix("file:")).unwrap_or(location);
    path.starts_with('/').then(|| Path::new(path))
}

/// Syncs the folders above local files, up to the one that holds `top`: once that returns, the names of all folders
/// from `top` down to the files are durable. Does nothing on other storage. Costs one sync per folder.
///
/// # Errors
/// [`FolderSyncError`] names the first folder that fails.
pub async fn sync_folders(locations: &[&str], top: &str) -> Result<(), FolderSyncError> {
    let Some(above_top) = local_path(top).and_then(Path::parent) else {
        return Ok(());
    };
    let mut folders = BTreeSet::new();
    for path in locations.iter().filter_map(|location| local_path(location)) {
        let above = path.ancestors().skip(1).take_while(|folder| folder.starts_with(above_top));
        folders.extend(above.map(Path::to_path_buf));
    }
    let syncing = tokio::task::spawn_blocking(move || folders.into_iter().try_for_each(sync_folder));
    syncing.await.expect("syncing folders does not panic")
}

fn sync_folder(folder: PathBuf) -> Result<(), FolderSyncError> {
    match std::fs::File::open(&folder).and_then(|file| file.sync_all()) {
        Ok(()) => Ok(()),
        Err(source) => Err(FolderSyncError { folder, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_local_locations_have_a_path() {
        assert_eq!(local_path("file:///w/t/data/a.parquet"), Some(Path::new("/w/t/data/a.parquet")));
        assert_eq!(local_path("file:/w/a"), Some(Path::new("/w/a")));
        assert_eq!(local_path("/w/a"), Some(Path::new("/w/a")));
        assert_eq!(local_path("s3://bucket/w/a"), None);
    }

    #[tokio::test]
    async fn a_folder_that_is_gone_is_an_error_and_other_storage_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let top = format!("file://{}/t/data", folder.path().display());
        let file = format!("{top}/day=1/a.parquet");
        std::fs::create_dir_all(folder.path().join("t/data/day=1")).unwrap();
        sync_folders(&[&file], &top).await.unwrap();
        std::fs::remove_dir(folder.path().join("t/data/day=1")).unwrap();
        let error = sync_folders(&[&file], &top).await.unwrap_err();
        assert_eq!(error.folder, folder.path().join("t/data/day=1"));
        sync_folders(&["s3://bucket/t/data/a.parquet"], "s3://bucket/t/data").await.unwrap();
    }
}
