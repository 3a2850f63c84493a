//! Kafka -> records: bounded, exact reads of topic partitions from offsets that the ledger names.
//!
//! Flow: [`Connection::open`] -> [`Connection::describe`], [`Connection::offsets`], [`check_ranges`],
//! [`Connection::resolve_start`] -> [`Reader::assign`] -> [`Reader::verify_tails`] -> [`Reader::read`] again and again ->
//! [`Reader::positions`] and [`Reader::tails`] into the ledger -> [`Connection::commit_group_offsets`] (for lag tools).
//!
//! Invariants
//! 1. Every record that a committed reader sees in `[start, end)` is delivered once, in offset order per topic
//!    partition, to the slot of its topic partition; slots are indices into the sorted plan.
//! 2. A topic partition is finished only when its next offset, a record's offset or the offset of an end event is
//!    `>= end`; control records, aborted records and compaction leave gaps, so counting records proves nothing.
//! 3. Manual assignment only: no `subscribe`, no `seek`, no stored offsets. An offset out of range, a damaged record batch
//!    and an offset that goes back are errors, never a jump.
//! 4. The last consumed record is read again and compared before a start is believed ([`Tail`]).
//!
//! A crash at any point leaves nothing behind: the source writes only advisory group offsets.
//!
//! Bounds: the client's queue holds what [`Connection::open`] was given, soft by one fetched response per broker; every question
//! ends after [`ANSWER_TIME_MAX`], a silent topic partition after [`ReaderOptions::stall_after`], closing after two seconds.
//!
//! Unsafe code stands in two files, each with its argument: `topic_ids` and `queue`.

mod client;
mod config;
mod connection;
mod error;
mod queue;
mod ranges;
mod reader;
mod topic_ids;

#[cfg(test)]
mod tests;

pub use connection::{ANSWER_TIME_MAX, ClusterFacts, Connection, TopicFacts};
pub use error::{ACLS_NEEDED, SourceError};
pub use ranges::{Loss, LostRange, OffsetRange, check_ranges};
pub use reader::{
    ReadLimits, ReadPlan, ReadStatus, Reader, ReaderOptions, STALL_AFTER_DEFAULT, Tail, tail_hash,
};
