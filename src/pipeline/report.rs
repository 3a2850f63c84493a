//! What a run tells while it works.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;

use crate::counts::Counts;

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
    /// A probe batch is done.
    Progress {
        /// Number of the open microbatch.
        batch: u64,
        /// Rows taken by this run so far.
        consumed: u64,
        /// Offsets left to the frozen ends.
        lag: u64,
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
        /// Watermark of the live lane, RFC 3339.
        watermark: Option<String>,
        /// From when on the dedup state answers without the table, RFC 3339; none = since ever. With the watermark it is
        /// the effective window.
        complete_since: Option<String>,
        /// Buckets beyond the window that were read from the table for it.
        buckets_lent: u64,
    },
    /// Something that did not stop the run and that its operator should know.
    Notice {
        /// A sentence.
        text: String,
    },
    /// The run is over.
    Done(Summary),
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
    /// Seconds from the start of the run.
    pub seconds: f64,
}

/// Takes events as they happen.
pub trait Report {
    /// One event.
    fn event(&mut self, event: &Event);
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
    }
}
