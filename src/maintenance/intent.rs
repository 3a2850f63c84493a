//! Intents: what a pass writes and what it will delete, named before it begins.
//!
//! A snapshot that left takes the knowledge of its files with it. So a pass writes their names down first, in a file of
//! the table's metadata folder; a pass that finds the intent of another that did not end finishes it. An intent gives
//! no right to delete: [`finish`](super::finish) asks the table again for each file. So it may be found after its
//! commit landed, after it failed, or twice.
//!
//! Layout: JSON `{"format": 1, "table": UUID, "files": [path, ...], "data_files": [path, ...]}` under
//! `tidemill-expiry-ATTEMPT.json`. Data files stand apart, because only their manifests tell whether they are live.

use std::collections::BTreeSet;

use iceberg::table::Table;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::storage::Found;
use super::{MaintenanceError, names};
use crate::sink::durable::sync_folders;

/// Version of intents that this program writes.
const FORMAT_VERSION: u32 = 1;

/// One intent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intent {
    path: String,
    /// Lists, manifests and statistics that go, unless the table names them.
    pub files: BTreeSet<String>,
    /// Data and delete files that go, unless they are live in a manifest of the table.
    pub data_files: BTreeSet<String>,
    table: Uuid,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    format: u32,
    table: Uuid,
    files: BTreeSet<String>,
    data_files: BTreeSet<String>,
}

impl Intent {
    pub(super) fn new(
        table: &Table,
        attempt: Uuid,
        files: BTreeSet<String>,
        data_files: BTreeSet<String>,
    ) -> Self {
        let path = format!("{}/tidemill-expiry-{attempt}.json", names::metadata_folder(table));
        Self { path, files, data_files, table: table.metadata().uuid() }
    }

    pub(super) async fn write(&self, table: &Table) -> Result<(), MaintenanceError> {
        let (files, data_files) = (self.files.clone(), self.data_files.clone());
        let stored = Stored { format: FORMAT_VERSION, table: self.table, files, data_files };
        let bytes = serde_json::to_vec(&stored).expect("an intent is text and numbers");
        let what = || MaintenanceError::storage(format!("writing {}", self.path));
        let output = table.file_io().new_output(&self.path).map_err(what())?;
        output.write(bytes.into()).await.map_err(what())?;
        sync_folders(&[&self.path], &names::metadata_folder(table)).await?;
        Ok(())
    }

    pub(super) async fn remove(&self, table: &Table) -> Result<(), MaintenanceError> {
        let what = format!("deleting {}", self.path);
        table.file_io().delete(&self.path).await.map_err(MaintenanceError::storage(what))
    }
}

/// Intents of passes that did not end, among the files of the metadata folder. One that was cut short by a crash or is
/// of another table or a newer format is passed over: the search for orphans takes what it would have named.
///
/// # Errors
/// [`MaintenanceError`] when an intent can not be read.
pub async fn unfinished(table: &Table, found: &[Found]) -> Result<Vec<Intent>, MaintenanceError> {
    let mut intents = Vec::new();
    for file in found.iter().filter(|file| names::is_intent(&file.path)) {
        let what = || MaintenanceError::storage(format!("reading {}", file.path));
        let input = table.file_io().new_input(&file.path).map_err(what())?;
        let bytes = input.read().await.map_err(what())?;
        let uuid = table.metadata().uuid();
        match serde_json::from_slice::<Stored>(&bytes) {
            Ok(stored) if stored.format == FORMAT_VERSION && stored.table == uuid => {
                let Stored { files, data_files, .. } = stored;
                intents.push(Intent { path: file.path.clone(), files, data_files, table: uuid });
            }
            _ => tracing::warn!(
                path = file.path,
                "an expiry that did not end can not be read, it is passed over"
            ),
        }
    }
    Ok(intents)
}
