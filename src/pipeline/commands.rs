//! Commands that make the dedup state, or a fact of the ledger, anew.
//!
//! Each is an owner for its own time (R9): it judges the start table with the one row that it resolves allowed, asks, takes
//! the lease with a fence, does its work, and ends with one commit of kind change that says who asked for it and what it
//! did. A crash before that commit leaves the ledger as the fence found it, and the command may be given again.
//!
//! Beside a run in progress they end BUSY: the run is to end first. A savepoint is made and dropped by the owner that there
//! is, on request.

mod adopt;
mod forget;
mod rebuild;
mod rekey;
mod savepoint;
mod watermark;

pub use adopt::{Adopting, adopt_ledger, adopt_rows};
pub use forget::forget_keys;
pub use rebuild::rebuild_state;
pub use rekey::rekey_state;
pub use savepoint::{
    Listed, Listing, Restoration, create_savepoint, drop_savepoint, list_savepoints, look_at_restore,
    restore_savepoint,
};
pub use watermark::set_watermark;

pub(super) use savepoint::{back_to, create_asked, drop_asked};

use std::collections::BTreeMap;
use std::time::Instant;

use serde::Serialize;

pub use super::rebuild::Restored;

use super::RunOptions;
use super::keys::KeyMaker;
use super::owner::{Owner, Prepared};
use super::report::Report;
use super::state::Folder;
use crate::commit::ledger::LedgerRecord;
use crate::dedup::Store;
use crate::memory::MemoryPlan;
use crate::offset::{NextOffset, TopicPartition};
use crate::protocol;
use crate::stop::{Reason, Stop};

/// Asks a person a question; an error ends the command before anything was written.
pub type Confirm<'a> = &'a dyn Fn(&str) -> Result<(), Stop>;

/// What a command did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Done {
    /// The command, as the user types it.
    pub command: &'static str,
    /// The main table.
    pub table: String,
    /// Whether the ledger was changed.
    pub changed: bool,
    /// The state afterwards, and what it cost.
    #[serde(flatten)]
    pub state: Restored,
    /// What it did, in sentences for people.
    pub notes: Vec<String>,
}

/// An owner, and what it needs to work on the state.
struct AtWork<'a> {
    owner: Owner<'a>,
    keys: KeyMaker,
    memory: MemoryPlan,
    begun: Instant,
}

impl<'a> AtWork<'a> {
    /// Fences.
    async fn take(
        prepared: Prepared<'a>,
        starts: &BTreeMap<TopicPartition, NextOffset>,
    ) -> Result<Self, Stop> {
        let memory = prepared.memory.for_keys_of_tables();
        let (mut owner, _, decoder) = prepared.take(starts).await?;
        match KeyMaker::new(&decoder.schema(), &owner.world.loaded.job, owner.record.dedup.seed) {
            Ok(keys) => Ok(Self { owner, keys, memory, begun: Instant::now() }),
            Err(stop) => {
                owner.release_after(&stop).await;
                Err(stop)
            }
        }
    }

    /// Gives the table back after a stop; a command that ends well has given it back with its last commit.
    async fn end<T>(mut self, result: Result<T, Stop>) -> Result<T, Stop> {
        if let Err(stop) = &result {
            self.owner.release_after(stop).await;
        }
        result
    }
}

/// The state that the last record names, made again if it is gone or damaged.
async fn open_named(
    owner: &mut Owner<'_>,
    keys: &KeyMaker,
    memory: &MemoryPlan,
    report: &mut dyn Report,
) -> Result<Store, Stop> {
    let mut folder = Folder::new(&owner.world.loaded.job, keys, memory, report);
    protocol::open_or_rebuild(owner, &mut folder).await.map(|state| state.store)
}

/// The record that a command changes.
pub(super) fn need_record(prepared: &Prepared<'_>, options: &RunOptions) -> Result<LedgerRecord, Stop> {
    prepared.record.clone().ok_or_else(|| {
        Stop::new(
            Reason::Usage,
            format!("table {} has no ledger yet: there is nothing to change", prepared.survey.main_ident),
            format!("tidemill run {}", options.job_shown),
        )
    })
}
