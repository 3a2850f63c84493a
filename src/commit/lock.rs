//! The lock of a state folder: politeness between processes on one machine, and the proof that an owner is dead.
//!
//! The file `lock` is held for as long as its owner lives; the kernel frees it whatever kills the process. Its lines
//! name the owners that held it, newest last: `<owner UUID> <epoch>`. An owner writes its line *before* it sends its
//! fence, so a ledger that names an owner of this file, while the lock is free, names a dead one. Several lines are
//! kept because a process may die between writing its line and landing its fence: the ledger then still names the
//! one before.
//!
//! The lock guards nothing in the table: the epoch does.

use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use uuid::Uuid;

use crate::mutant;

/// Owners that the file remembers.
const OWNERS_MAX: usize = 64;

/// A held lock. Dropping it frees the lock.
#[derive(Debug)]
pub struct StateLock {
    file: File,
    path: PathBuf,
    owners: Vec<(Uuid, u64)>,
}

/// Why a folder could not be locked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Another process holds it.
    #[error("state folder {folder} is in use by another process{}", owner.map(|owner| format!(" (owner {owner})")).unwrap_or_default())]
    Held {
        /// The folder.
        folder: PathBuf,
        /// Owner in the last line of the file.
        owner: Option<Uuid>,
    },
    /// The folder is another user's, or others may write to it.
    #[error("state folder {folder} {problem}")]
    NotOurs {
        /// The folder.
        folder: PathBuf,
        /// Whose it is, or who may write.
        problem: String,
    },
    /// The folder or file can not be made, read or written.
    #[error("lock file {path} can not be used")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl StateLock {
    /// Makes the folder (mode 0700) if it is missing and takes its lock without waiting.
    ///
    /// # Errors
    /// [`LockError::Held`]: another process of this machine works with the folder; try again later.
    pub fn acquire(folder: &Path) -> Result<Self, LockError> {
        let path = folder.join("lock");
        let io = |source| LockError::Io { path: path.clone(), source };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(io)?;
        refuse_others(folder, &std::fs::metadata(folder).map_err(io)?)?;
        crate::crash_point!("lock_folder_made");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            // The file is written in place: a link there would be written through.
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(&path)
            .map_err(io)?;
        let held = match file.try_lock() {
            Ok(()) => false,
            Err(TryLockError::WouldBlock) => true,
            Err(TryLockError::Error(source)) => return Err(io(source)),
        };
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(io)?;
        let owners: Vec<(Uuid, u64)> = text.lines().filter_map(parse_line).collect();
        if held {
            let owner = owners.last().map(|&(owner, _)| owner);
            return Err(LockError::Held { folder: folder.to_owned(), owner });
        }
        crate::crash_point!("lock_taken");
        Ok(Self { file, path, owners })
    }

    /// Whether an owner held this lock before us and so, the lock being ours, is dead.
    pub fn knows_as_dead(&self, owner: Uuid) -> bool {
        self.owners.iter().any(|&(known, _)| mutant!("every-owner-is-dead", true => known == owner))
    }

    /// The largest epoch that an owner of this folder meant to take.
    pub fn epoch_max(&self) -> u64 {
        self.owners.iter().map(|&(_, epoch)| epoch).max().unwrap_or(0)
    }

    /// Writes the line of an owner that is about to send its fence, and syncs it.
    ///
    /// # Errors
    /// [`LockError::Io`]; the fence must then not be sent.
    pub fn record_owner(&mut self, owner: Uuid, epoch: u64) -> Result<(), LockError> {
        self.owners.push((owner, epoch));
        let surplus = self.owners.len().saturating_sub(OWNERS_MAX);
        self.owners.drain(..surplus);
        let text: String = self.owners.iter().map(|(owner, epoch)| format!("{owner} {epoch}\n")).collect();
        let mut write = || {
            self.file.seek(SeekFrom::Start(0))?;
            self.file.write_all(text.as_bytes())?;
            crate::crash_point!("lock_line_written");
            self.file.set_len(text.len() as u64)?;
            mutant!("skip-lock-sync", Ok(()) => self.file.sync_all())
        };
        write().map_err(|source| LockError::Io { path: self.path.clone(), source })?;
        crate::crash_point!("lock_line_synced");
        Ok(())
    }
}

/// What is read from the folder is believed, and what is written there belongs to who runs: so it is one user's.
fn refuse_others(folder: &Path, metadata: &Metadata) -> Result<(), LockError> {
    let (owner, user) = (metadata.uid(), rustix::process::geteuid().as_raw());
    let problem = if owner != user {
        format!(
            "belongs to user {owner}, and this process runs as user {user}; run it as its owner, or give it away (chown -R)"
        )
    } else if metadata.mode() & 0o022 != 0 {
        format!("has mode {:o}: others may write to it; take that away (chmod go-w)", metadata.mode() & 0o777)
    } else {
        return Ok(());
    };
    Err(LockError::NotOurs { folder: folder.to_owned(), problem })
}

fn parse_line(line: &str) -> Option<(Uuid, u64)> {
    let (owner, epoch) = line.split_once(' ')?;
    let epoch: u64 = epoch.parse().ok()?;
    // A damaged line must not lift the epoch beyond what a ledger holds.
    (epoch < 1 << 53).then_some((owner.parse().ok()?, epoch))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_is_refused_and_learns_who_holds() {
        let folder = tempfile::tempdir().unwrap();
        let owner = Uuid::new_v4();
        let mut first = StateLock::acquire(folder.path()).unwrap();
        first.record_owner(owner, 7).unwrap();
        let refused = StateLock::acquire(folder.path());
        assert!(matches!(refused, Err(LockError::Held { owner: Some(found), .. }) if found == owner));
    }

    #[test]
    fn an_owner_of_a_freed_lock_is_known_as_dead_even_after_a_later_one() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (Uuid::new_v4(), Uuid::new_v4());
        StateLock::acquire(folder.path()).unwrap().record_owner(first, 1).unwrap();
        StateLock::acquire(folder.path()).unwrap().record_owner(second, 2).unwrap();
        let third = StateLock::acquire(folder.path()).unwrap();
        assert!(third.knows_as_dead(first) && third.knows_as_dead(second));
        assert!(!third.knows_as_dead(Uuid::new_v4()));
        assert_eq!(third.epoch_max(), 2);
    }

    #[test]
    fn a_folder_that_others_may_write_to_and_a_link_in_the_place_of_the_file_are_refused() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let set_mode =
            |mode| std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(mode)).unwrap();
        set_mode(0o777);
        assert!(matches!(StateLock::acquire(folder.path()), Err(LockError::NotOurs { .. })));
        set_mode(0o755);
        let victim = folder.path().join("victim");
        std::fs::write(&victim, "untouched").unwrap();
        std::os::unix::fs::symlink(&victim, folder.path().join("lock")).unwrap();
        assert!(matches!(StateLock::acquire(folder.path()), Err(LockError::Io { .. })));
        assert_eq!(std::fs::read_to_string(victim).unwrap(), "untouched");
    }

    #[test]
    fn the_file_stays_short() {
        let folder = tempfile::tempdir().unwrap();
        let mut lock = StateLock::acquire(folder.path()).unwrap();
        for epoch in 0..200 {
            lock.record_owner(Uuid::new_v4(), epoch).unwrap();
        }
        let text = std::fs::read_to_string(folder.path().join("lock")).unwrap();
        assert_eq!(text.lines().count(), OWNERS_MAX);
        assert_eq!(lock.epoch_max(), 199);
    }
}
