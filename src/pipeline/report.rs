//! What a run tells while it works.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;

use super::profile::ProfileReport;
use crate::counts::Counts;
use crate::maintenance::Done;

/// Something a person or a script wants to know.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The run knows what it will read.
    Start {
        /// Name of the job.
        job: String,
        /// Epoch of this owner.
        epoch: u64,
        /// Records between the ledger's and the frozen end offsets, control records and gaps included.
        lag: u64,
        /// Topic partitions assigned.
        topic_partitions: usize,
        /// The memory split, in words.
        memory: String,
    },
    /// A chunk is done.
    Progress {
        /// Number of the open microbatch.
        batch: u64,
        /// Rows taken by this run so far.
        consumed: u64,
        /// Offsets left to the frozen ends.
        lag: u64,
        /// The backfill that is read; none = live.
        #[serde(skip_serializing_if = "Option::is_none")]
        lane: Option<String>,
    },
    /// Keys are read from a table, so that the dedup state has them.
    Reading {
        /// The table.
        table: String,
        /// Rows read so far.
        rows: u64,
        /// Rows of the table; not all of them may be needed.
        rows_total: Option<u64>,
    },
    /// A microbatch landed.
    Commit {
        /// Its number.
        batch: u64,
        /// Its outcomes.
        counts: Counts,
        /// Snapshot of the main table.
        snapshot_id: i64,
        /// Data files of the main table.
        data_files: usize,
        /// Requests until it landed; 1 unless the catalog answered badly.
        sends: u32,
        /// Offsets left to the frozen ends.
        lag: u64,
        /// The backfill that it read; none = live.
        #[serde(skip_serializing_if = "Option::is_none")]
        lane: Option<String>,
        /// Watermark of the lane that it read, RFC 3339.
        watermark: Option<String>,
        /// From when on the dedup state answers without the table, RFC 3339; none = since ever. With the watermark it is
        /// the effective window.
        complete_since: Option<String>,
        /// Buckets beyond the window that were read from the table for it.
        buckets_lent: u64,
    },
    /// A backfill gets its turn, or another owner has gone on with it.
    Backfill(LaneSummary),
    /// A table was maintained.
    Maintained {
        /// The table.
        table: String,
        /// What was done.
        #[serde(flatten)]
        done: Done,
        /// How long it took.
        seconds: f64,
    },
    /// Something that did not stop the run and that its operator should know.
    Notice {
        /// A sentence.
        text: String,
    },
    /// Something that a continuous run needs is away; it goes on by itself. Said when it begins and when its cause changes.
    Away {
        /// The name of the stop that a drain would have ended with.
        reason: &'static str,
        /// What happened.
        what: String,
    },
    /// What was away is back.
    Back {
        /// As in `Away`.
        reason: &'static str,
        /// How long it took.
        seconds: f64,
    },
    /// The run is over.
    Done(Summary),
    /// Where its time went, however it ended, if that was asked for.
    Profile(ProfileReport),
}

/// Totals of a run.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Summary {
    /// Outcomes of all its microbatches.
    pub counts: Counts,
    /// Microbatches committed.
    pub batches: u64,
    /// Number of the last microbatch in the ledger.
    pub batch: u64,
    /// The main table.
    pub table: String,
    /// Its metadata file.
    pub metadata_location: Option<String>,
    /// The dead-letter table.
    pub dead_letter_table: String,
    /// Its metadata file.
    pub dead_letter_metadata_location: Option<String>,
    /// The late table, if the job uses one or its ledger knows one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub late_table: Option<String>,
    /// Its metadata file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub late_metadata_location: Option<String>,
    /// Keys in the dedup state.
    pub state_keys: u64,
    /// Bytes of the dedup state on disk.
    pub state_bytes: u64,
    /// Watermark of the live lane, RFC 3339.
    pub watermark: Option<String>,
    /// From when on the dedup state answers without the table, RFC 3339; none = since ever.
    pub complete_since: Option<String>,
    /// Buckets beyond the window that were read from the table.
    pub buckets_lent: u64,
    /// Bytes of data files that were read for them.
    #[serde(skip_serializing_if = "is_zero")]
    pub bytes_lent: u64,
    /// Backfills that the ledger tells of.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lanes: Vec<LaneSummary>,
    /// Seconds from the start of the run.
    pub seconds: f64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// A backfill as the ledger tells of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LaneSummary {
    /// Its name.
    pub lane: String,
    /// `active`, `paused` or `done`.
    pub state: &'static str,
    /// First Kafka timestamp of its range, RFC 3339.
    pub from: String,
    /// First Kafka timestamp after its range, RFC 3339; none = up to its frozen ends.
    pub to: Option<String>,
    /// Offsets left to its frozen ends.
    pub left: u64,
    /// Its own watermark, RFC 3339.
    pub watermark: Option<String>,
    /// Outcomes of all its microbatches.
    pub counts: Counts,
}

/// Takes events as they happen.
pub trait Report {
    /// One event.
    fn event(&mut self, event: &Event);
}

/// Listens to nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unheard;

impl Report for Unheard {
    fn event(&mut self, _event: &Event) {}
}

/// Names of phases, appended to a file as they are reached; for tests that kill at a known place.
#[derive(Debug, Default)]
pub struct Phases {
    file: Option<File>,
}

impl Phases {
    /// Opens the file, if one is asked for.
    ///
    /// # Errors
    /// The file can not be opened.
    pub fn open(path: Option<&Path>) -> io::Result<Self> {
        let file = path.map(|path| OpenOptions::new().create(true).append(true).open(path)).transpose()?;
        Ok(Self { file })
    }

    /// Writes the name of a phase. A failure is passed over: the file serves tests only.
    pub fn reach(&self, phase: &str) {
        tracing::debug!(phase, "reached");
        if let Some(mut file) = self.file.as_ref() {
            let _ = file.write_all(format!("{phase}\n").as_bytes());
        }
        crate::crash_point!(phase);
    }
}
