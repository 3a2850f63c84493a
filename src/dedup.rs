//! Dedup state on disk: which keys stand in the tables already.
//!
//! Flow: keys of a probe batch, in the order of their places -> [`Store::probe`], or [`Store::gather`] part by part and
//! [`Store::settle`] -> one [`Verdict`] per key; new
//! keys become *pending* and are seen by the next probe -> [`Store::prepare`] -> segment and manifest files ->
//! (the commit of the main table names the [`GenerationRef`]) -> [`Store::publish`], or [`Store::abandon`]
//!
//! Words. A *segment* is an immutable file of sorted fingerprints with a section per bucket of event time. A
//! *generation* is a manifest file that lists the live segments. A *bucket* is a slice of event time; expiry
//! drops whole buckets from a manifest, without a scan: see `dedup/window.rs`. Each layout stands in one file only:
//! `dedup/segment.rs`, `dedup/page.rs`, `dedup/filter.rs` and `dedup/generation.rs`.
//!
//! Invariants
//! 1. A key is a duplicate only because an equal fingerprint was read from an intact page or stands among the
//!    pending keys or those written last. A filter says "certainly new" or nothing; it never drops a key alone.
//! 2. A piece of a file that is missing, torn, flipped or from elsewhere is an error, never "not seen".
//! 3. Files never change once they are named. A name carries epoch, batch and attempt and is taken exclusively,
//!    so what an aborted attempt left can not be seen by another attempt of the same batch.
//! 4. No two live segments hold the same fingerprint in the same bucket, so counts and digests of buckets are
//!    those of sets.
//!
//! Durable steps of [`Store::prepare`], in order, and what a crash after each leaves
//! 1. Segment files are created, written and synced: files that no manifest names.
//! 2. The manifest is created, written and synced: a manifest that no ledger names.
//! 3. The folder is synced: the same, and now it survives.
//! 4. The caller's commit names the generation: from here on, and only from here, it is the state.
//!
//! Before step 4 the generation before is whole and in use; what was left behind is removed by [`Store::sweep`] after
//! a later commit, or by [`sweep`] once a later epoch owns the table. Nothing is renamed and nothing is overwritten, so
//! there is no step at which an older generation is damaged.
//!
//! Ways of a lookup stand in `dedup/access.rs`, reads in `dedup/reads.rs`, what stays in memory in `dedup/pins.rs`,
//! merges in `dedup/tiers.rs`, expiry in `dedup/window.rs`, and what all of it costs in [`sizing`].
//!
//! Bounds. Memory does not grow with the number of keys on disk: `memory_bytes` covers filters, page indexes and pages
//! that stay in memory, buffers of reads in flight, recent keys and the buffers of one merge; each further merge that
//! runs takes up to 4 MiB, and each merge 1.2 MB of decoded keys. Beside it stand about 200 bytes per section (segments times buckets), 11 bytes per 256 pages
//! (per 130 000 keys: 0.1 MB per billion), 21 bytes per key of the probe batch in work ([`ProbeBatch`]), and the
//! pending keys, which the caller bounds by [`Store::pending_bytes`]. Open files: two per segment, and segments are at
//! most 15 per tier of eight.

mod access;
mod bucket;
mod builder;
mod device;
mod disk;
mod filter;
#[doc(hidden)]
pub mod fuzz;
mod gather;
mod generation;
mod inspect;
mod lookup;
mod merge;
mod page;
mod pending;
mod pins;
mod reads;
mod recent;
mod salvage;
mod segment;
pub mod sizing;
mod store;
mod tiers;
mod uring;
mod verify;
mod window;

#[cfg(test)]
mod corruption_tests;
#[cfg(test)]
pub(crate) mod fuzz_tests;
#[cfg(test)]
mod golden_tests;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod store_tests;
#[cfg(test)]
mod window_tests;

use std::fmt;
use std::io;

use uuid::Uuid;

pub use access::{Access, AccessPlan, SectionAccess, access_plan};
pub use bucket::{Bucket, BucketTally, Digest, ERAS_MAX, Era, FLOOR_BUCKETS, Tally, bucket_width_ms};
pub use builder::{Builder, RebuildReport};
#[doc(hidden)]
pub use filter::FilterAlone;
pub use gather::ProbeBatch;
pub use generation::{
    GenerationInfo, GenerationName, GenerationRef, SweepReport, generation_of_file, is_at_home,
    list_generations, segments_in, segments_of, set_aside, sweep,
};
pub use inspect::{Content, Inspection, ManifestFacts, SectionFacts, SegmentFacts, inspect, is_state_file};
pub(crate) use pending::PENDING_KEY_BYTES;
pub use pins::PinStats;
pub use salvage::{GenerationFacts, generation_facts, salvage};
pub use store::{Store, StoreStats};
pub use verify::{VerifyProgress, VerifyReport, verify, verify_with_progress};
pub(crate) use window::slice_at;
pub use window::{Loan, LoanBuilder};

use crate::event_time::EventTimeMs;
use crate::fingerprint::Fingerprint;
use crate::job::Repeats;

/// Least memory that a store works with; less is taken as this much.
pub const STORE_MEMORY_BYTES_MIN: u64 = 128 << 10;
/// Most buckets of one generation. More mean that the bucket width does not fit the event times.
pub const BUCKETS_MAX: usize = 65_536;
/// Longest key spec hash that a segment's header holds.
pub const KEY_SPEC_HASH_BYTES_MAX: usize = 64;

/// What a state is for. A generation of another spec can not be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreSpec {
    /// Identity of the job.
    pub job_id: Uuid,
    /// From [`KeyEncoder::key_spec_hash`](crate::fingerprint::KeyEncoder::key_spec_hash).
    pub key_spec_hash: String,
    /// Seed of the fingerprints.
    pub seed: u64,
    /// Number of shards: a power of two. A shard is a range of the highest bits of fingerprints, so a range of
    /// every section's pages; it has no files of its own.
    pub shards: u32,
    /// Width of a bucket, in milliseconds, at least 1: see [`bucket_width_ms`]. Rules for buckets after those that
    /// hold keys already; their boundaries are facts of their manifest.
    pub bucket_width_ms: i64,
    /// Where a key's earlier copy is looked for: in every live bucket, or in the key's own.
    pub repeats: Repeats,
}

/// A key to be looked up: its fingerprint, and the event time that says which bucket it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// The key.
    pub fingerprint: Fingerprint,
    /// Event time of its row.
    pub event_time: EventTimeMs,
}

/// What [`Store::probe`] says of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Not seen before: its row is to be written.
    New,
    /// Seen before, in a live bucket, in this microbatch, or earlier in the same probe batch.
    Duplicate,
}

/// Why the state can not answer. One variant per way the caller must react.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A file of the generation is not there. Rebuild the state from the tables.
    #[error("dedup state file {file} is missing; rebuild the state from the tables")]
    Missing {
        /// Name of the file in the state folder.
        file: String,
    },
    /// A file of the generation is not what was written. Rebuild the state from the tables.
    #[error("dedup state file {file} is corrupt: {what}; rebuild the state from the tables")]
    Corrupt {
        /// Name of the file in the state folder.
        file: String,
        /// What is wrong with it.
        what: String,
    },
    /// The generation was made for another job or key. Rebuild it for this key, or correct the job.
    #[error(
        "dedup state {file} has {fact} {found} where the job has {expected}; rebuild the state for the new key or \
         take the change back"
    )]
    SpecDiffers {
        /// Name of the file in the state folder.
        file: String,
        /// Which fact differs.
        fact: &'static str,
        /// Of the job.
        expected: String,
        /// Of the file.
        found: String,
    },
    /// A newer program wrote the file. Touch nothing; use that program.
    #[error(
        "dedup state file {file} has format version {found}, this program knows {known}; use the newer program"
    )]
    NewerFormat {
        /// Name of the file in the state folder.
        file: String,
        /// Version of the file.
        found: u32,
        /// Newest version that this program reads.
        known: u32,
    },
    /// The name of a generation or of one of its files was used before. Take a new attempt id.
    #[error("dedup state file {file} exists already; every attempt needs a name of its own")]
    NameTaken {
        /// Name of the file in the state folder.
        file: String,
    },
    /// The spec names sizes that no state can have. Correct the job.
    #[error("dedup state can not be made with {what}")]
    SpecInvalid {
        /// Which sizes.
        what: String,
    },
    /// The flag of [`Builder::stop_by`] was set. What was written so far is named by nobody.
    #[error("the rebuild of the dedup state was stopped")]
    Stopped,
    /// Event times fall into too many buckets. Widen the window or use `any_time`.
    #[error("event times fall into more than {buckets_max} buckets of dedup state; widen the buckets")]
    TooManyBuckets {
        /// The bound.
        buckets_max: usize,
    },
    /// The bucket of this event time has expired, so the state can not prove a key new. Lend it first what
    /// [`Store::missing_buckets`] names.
    #[error(
        "event time {event_time} lies before {complete_since}, from where on the dedup state is complete, and its bucket \
         is not lent; read the bucket from the table and lend it first"
    )]
    BeforeComplete {
        /// Of the key.
        event_time: EventTimeMs,
        /// Of the generation.
        complete_since: EventTimeMs,
    },
    /// An earlier call failed half way, so pending keys are not to be trusted. Abandon the batch.
    #[error("an earlier step of this batch failed in the dedup state; abandon the batch and read it again")]
    Broken,
    /// The disk failed. Nothing that was named before is damaged; do not retry a failed sync.
    #[error("could not {action} {file} of the dedup state")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Name of the file in the state folder, or the folder.
        file: String,
        /// The error of the system.
        source: io::Error,
    },
}

impl StoreError {
    fn io(action: &'static str, file: impl fmt::Display, source: io::Error) -> Self {
        Self::Io { action, file: file.to_string(), source }
    }

    fn corrupt(file: impl fmt::Display, what: impl Into<String>) -> Self {
        Self::Corrupt { file: file.to_string(), what: what.into() }
    }

    /// Whether a rebuild from the tables resolves it.
    pub fn is_rebuildable(&self) -> bool {
        matches!(self, Self::Missing { .. } | Self::Corrupt { .. })
    }
}

impl StoreSpec {
    /// Refuses sizes that no state can have.
    fn check(&self) -> Result<(), StoreError> {
        let invalid = |what: String| Err(StoreError::SpecInvalid { what });
        if !self.shards.is_power_of_two() {
            return invalid(format!("{} shards: their number is a power of two", self.shards));
        }
        if self.bucket_width_ms < 1 {
            return invalid(format!(
                "buckets of {} ms: a bucket is at least 1 ms wide",
                self.bucket_width_ms
            ));
        }
        if self.key_spec_hash.is_empty() || self.key_spec_hash.len() > KEY_SPEC_HASH_BYTES_MAX {
            return invalid(format!(
                "a key spec hash of {} bytes: it has 1 to {KEY_SPEC_HASH_BYTES_MAX}",
                self.key_spec_hash.len()
            ));
        }
        Ok(())
    }
}

/// How `memory_bytes` is shared out.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Filters, page indexes and pages that stay in memory.
    pinned_bytes_max: u64,
    /// Buffers of reads in flight.
    read_buffer_bytes: u64,
    /// Keys that were written lately and stay in memory.
    recent_keys_max: u64,
    /// One read of one input of a merge.
    merge_read_bytes_max: usize,
    /// One write of a segment's filter or pages.
    write_bytes_max: usize,
    /// Pending keys whose lists are merged as they come: their copy is counted with them.
    merged_keys_max: usize,
}

/// Largest single read or write; 128 to 512 KiB were equal on a virtual disk of 1 GB/s.
const TRANSFER_BYTES_MAX: u64 = 256 << 10;
/// Most bytes of read buffers: four workers with 32 reads of 256 KiB.
const READ_BUFFER_BYTES_MAX: u64 = 34 << 20;
/// Most keys that are kept as recent: most repeats come within minutes, and each batch walks all of them.
const RECENT_KEYS_MAX: u64 = 8 << 20;

impl Limits {
    fn of(memory_bytes: u64) -> Self {
        let memory = memory_bytes.max(STORE_MEMORY_BYTES_MIN);
        let transfer = |share: u64| share.clamp(page::PAGE_BYTES as u64, TRANSFER_BYTES_MAX) as usize;
        let read_buffer_bytes = (memory / 8).min(READ_BUFFER_BYTES_MAX);
        let recent_keys_max = (memory / 8 / recent::RECENT_KEY_BYTES).min(RECENT_KEYS_MAX);
        let merge_read_bytes_max = transfer(memory / 8 / merge::FAN_IN as u64);
        let write_bytes_max = transfer(memory / 32);
        let others = read_buffer_bytes
            + recent_keys_max * recent::RECENT_KEY_BYTES
            + (merge_read_bytes_max * merge::FAN_IN + 2 * write_bytes_max) as u64;
        Self {
            pinned_bytes_max: memory.saturating_sub(others),
            read_buffer_bytes,
            recent_keys_max,
            merge_read_bytes_max,
            write_bytes_max,
            merged_keys_max: (memory / 4 / PENDING_KEY_BYTES) as usize,
        }
    }
}
