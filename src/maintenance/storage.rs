//! A listing of the warehouse, which the iceberg crate does not give: local folders by the standard library, S3 by the
//! library that the crate's own storage is built on, with the properties of the table's storage.
//!
//! Files are given one by one with the time at which the storage says they were written. Links are not followed.

use std::path::Path;

use futures::TryStreamExt;
use iceberg::io::{
    CLIENT_REGION, FileIO, S3_ACCESS_KEY_ID, S3_ALLOW_ANONYMOUS, S3_ASSUME_ROLE_ARN,
    S3_ASSUME_ROLE_EXTERNAL_ID, S3_ASSUME_ROLE_SESSION_NAME, S3_DISABLE_CONFIG_LOAD, S3_ENDPOINT,
    S3_PATH_STYLE_ACCESS, S3_REGION, S3_SECRET_ACCESS_KEY, S3_SESSION_TOKEN,
};
use opendal::layers::{RetryLayer, TimeoutLayer};
use opendal::services::S3Config;
use opendal::{Configurator, Operator};

use super::MaintenanceError;
use crate::sink::durable::local_path;

/// A file of the warehouse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its location, as it begins in the table's metadata.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    /// When the storage says it was written, ms since the epoch.
    pub modified_ms: i64,
}

/// Gives every file below a folder to `take`; with `deep`, of the folders below too. A folder that is not there is empty.
///
/// # Errors
/// [`MaintenanceError::Listing`]
pub(crate) async fn list(
    file_io: &FileIO,
    folder: &str,
    deep: bool,
    mut take: impl FnMut(Found) + Send,
) -> Result<(), MaintenanceError> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| MaintenanceError::Listing {
        folder: folder.to_owned(),
        source,
    };
    match local_path(folder) {
        Some(path) => list_local(path, folder, deep, &mut take).map_err(|error| failed(error.into())),
        None => list_s3(file_io, folder, deep, &mut take).await.map_err(failed),
    }
}

fn list_local(path: &Path, folder: &str, deep: bool, take: &mut dyn FnMut(Found)) -> std::io::Result<()> {
    let mut open = vec![(path.to_path_buf(), folder.trim_end_matches('/').to_owned())];
    while let Some((path, location)) = open.pop() {
        let entries = match std::fs::read_dir(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            // A name that is no text is not one that a table can hold.
            let Ok(name) = entry.file_name().into_string() else { continue };
            let kind = entry.file_type()?;
            let below = format!("{location}/{name}");
            if kind.is_dir() && deep {
                open.push((entry.path(), below));
            } else if kind.is_file() {
                let metadata = match entry.metadata() {
                    // Deleted since the folder was read.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                    metadata => metadata?,
                };
                let modified = chrono::DateTime::<chrono::Utc>::from(metadata.modified()?);
                take(Found { path: below, bytes: metadata.len(), modified_ms: modified.timestamp_millis() });
            }
        }
    }
    Ok(())
}

async fn list_s3(
    file_io: &FileIO,
    folder: &str,
    deep: bool,
    take: &mut (dyn FnMut(Found) + Send),
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let (scheme, rest) = folder.split_once("://").ok_or("not a folder of S3 and not a local one")?;
    if !matches!(scheme, "s3" | "s3a" | "s3n") {
        return Err(format!("{scheme}:// is not listed").into());
    }
    let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
    let operator = Operator::new(s3_config(file_io, bucket).into_builder())?
        .layer(TimeoutLayer::new())
        .layer(RetryLayer::new())
        .finish();
    let prefix = format!("{}/", key.trim_end_matches('/'));
    let mut lister = operator.lister_with(&prefix).recursive(deep).await?;
    while let Some(entry) = lister.try_next().await? {
        let metadata = entry.metadata();
        if let (true, Some(modified)) = (metadata.is_file(), metadata.last_modified()) {
            let path = format!("{scheme}://{bucket}/{}", entry.path().trim_start_matches('/'));
            let modified_ms = modified.into_inner().as_millisecond();
            take(Found { path, bytes: metadata.content_length(), modified_ms });
        }
    }
    Ok(())
}

/// The properties of the table's storage as its library takes them.
fn s3_config(file_io: &FileIO, bucket: &str) -> S3Config {
    let property = |name: &str| file_io.config().get(name).cloned();
    let flag = |name: &str| {
        property(name).is_some_and(|value| matches!(value.to_lowercase().as_str(), "true" | "t" | "1" | "on"))
    };
    let mut config = S3Config::default();
    config.bucket = bucket.to_owned();
    config.endpoint = property(S3_ENDPOINT);
    config.region = property(CLIENT_REGION).or_else(|| property(S3_REGION));
    config.access_key_id = property(S3_ACCESS_KEY_ID);
    config.secret_access_key = property(S3_SECRET_ACCESS_KEY);
    config.session_token = property(S3_SESSION_TOKEN);
    config.role_arn = property(S3_ASSUME_ROLE_ARN);
    config.external_id = property(S3_ASSUME_ROLE_EXTERNAL_ID);
    config.role_session_name = property(S3_ASSUME_ROLE_SESSION_NAME);
    config.enable_virtual_host_style = !flag(S3_PATH_STYLE_ACCESS);
    config.skip_signature = flag(S3_ALLOW_ANONYMOUS);
    config.disable_config_load = flag(S3_DISABLE_CONFIG_LOAD);
    config
}
