//! The few ways in which the state touches the disk.
//!
//! Files are created exclusively and readable by their owner alone, read by position, and synced before their
//! folder is. An error of a sync is never retried: the pages that it lost would count as clean.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::num::NonZeroU64;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Advice, fadvise};

use super::StoreError;
use super::reads::ReadFile;

/// Makes the folder of the state, and what leads to it, unless it is there, and makes the new names durable.
pub(super) fn make_folder(folder: &Path) -> Result<(), StoreError> {
    let missing: Vec<&Path> = folder.ancestors().take_while(|ancestor| !ancestor.exists()).collect();
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|error| StoreError::io("make folder", folder.display(), error))?;
    crate::crash_point!("state_folder_made");
    for made in missing {
        match made.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => sync_folder(parent)?,
            _ => sync_folder(Path::new("."))?,
        }
    }
    Ok(())
}

/// Creates a file that must not be there yet, for writing and reading.
pub(super) fn create_new(folder: &Path, name: &str) -> Result<File, StoreError> {
    let created =
        OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(folder.join(name));
    created.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => StoreError::NameTaken { file: name.to_owned() },
        _ => StoreError::io("create", name, error),
    })
}

/// Opens a file that a generation names.
pub(super) fn open(folder: &Path, name: &str) -> Result<File, StoreError> {
    File::open(folder.join(name)).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => StoreError::Missing { file: name.to_owned() },
        _ => StoreError::io("open", name, error),
    })
}

/// Files below this size are read through the page cache: they take little of it, and a small read of it costs less.
const DIRECT_BYTES_MIN: u64 = 1 << 20;

/// Opens a file of `bytes` bytes a second time, around the page cache, if its file system can.
pub(super) fn for_reads(file: File, bytes: u64) -> ReadFile {
    if bytes < DIRECT_BYTES_MIN {
        return ReadFile { buffered: Arc::new(file), direct: None };
    }
    let direct = OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()));
    ReadFile { buffered: Arc::new(file), direct: direct.ok().map(Arc::new) }
}

/// Fills `bytes` from `position` on. A file that ends before is corrupt: its length was checked when it was
/// opened.
pub(super) fn read_at(file: &File, name: &str, bytes: &mut [u8], position: u64) -> Result<(), StoreError> {
    file.read_exact_at(bytes, position).map_err(|error| read_failed(name, error))
}

/// The error of a read of a file whose length was checked.
pub(super) fn read_failed(name: &str, error: io::Error) -> StoreError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => StoreError::corrupt(name, "the file is shorter than it was"),
        _ => StoreError::io("read", name, error),
    }
}

/// Writes `bytes` at `position`.
pub(super) fn write_at(file: &File, name: &str, bytes: &[u8], position: u64) -> Result<(), StoreError> {
    file.write_all_at(bytes, position).map_err(|error| StoreError::io("write", name, error))
}

/// Makes a file's bytes and length durable.
pub(super) fn sync(file: &File, name: &str) -> Result<(), StoreError> {
    file.sync_all().map_err(|error| StoreError::io("sync", name, error))
}

/// Makes the names of new files durable.
pub(super) fn sync_folder(folder: &Path) -> Result<(), StoreError> {
    File::open(folder)
        .and_then(|opened| opened.sync_all())
        .map_err(|error| StoreError::io("sync folder", folder.display(), error))
}

/// Asks the system to read ahead. Only advice: a file system without it reads when it is asked to.
pub(super) fn read_ahead(file: &File, position: u64, bytes: u64) {
    advise(file, position, bytes, Advice::WillNeed);
}

/// Lets the page cache forget a range that was read or written for the last time. Only advice.
pub(super) fn forget(file: &File, position: u64, bytes: u64) {
    advise(file, position, bytes, Advice::DontNeed);
}

fn advise(file: &File, position: u64, bytes: u64, advice: Advice) {
    if let Some(bytes) = NonZeroU64::new(bytes)
        && let Err(error) = fadvise(file, position, Some(bytes), advice)
    {
        tracing::trace!(%error, "the system takes no advice about a state file");
    }
}
