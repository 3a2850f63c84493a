//! Rebuild: the state made again from the keys of the tables, in whatever order they come and however often.
//!
//! Flow: keys -> memory, until its share is full -> sorted run -> runs merged eight at a time -> one segment and
//! its manifest
//!
//! Runs are segments whose files are unlinked as soon as they are made, so a crash leaves at most one empty file
//! of epoch 0 for the sweep. Only the last merge writes files that stay, in the same durable order as
//! [`Store::prepare`](super::Store::prepare).
//!
//! Copies of a key in its bucket collapse and are counted. A key that stands in two buckets stays in both, also
//! with `any_time`: the state is then what the tables say.
//!
//! Bounds: half of the memory holds keys (16 bytes each), half serves merges, whatever the number of keys. Open
//! files: at most seven runs per tier of eight.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use super::bucket::{Bucket, BucketTally, Grid, Tally};
use super::generation::{GenerationName, GenerationRef, Manifest};
use super::merge::{FAN_IN, merge};
use super::pending::{BucketTable, Entry, write_sections};
use super::segment::{Segment, SegmentName, SegmentWriter};
use super::store::SegmentFiles;
use super::{BUCKETS_MAX, Key, Limits, STORE_MEMORY_BYTES_MIN, StoreError, StoreSpec, disk};
use crate::event_time::EventTimeMs;

/// What a rebuild found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RebuildReport {
    /// Keys in the new generation.
    pub keys: u64,
    /// Rows whose key stood in its bucket already.
    pub repeats: u64,
    /// Buckets with count and digest, ascending: to be compared with what the ledger says.
    pub buckets: Vec<BucketTally>,
}

/// Builds a generation from keys in any order.
#[derive(Debug)]
pub struct Builder {
    folder: PathBuf,
    spec: StoreSpec,
    limits: Limits,
    grid: Option<Grid>,
    table: BucketTable,
    entries: Vec<Entry>,
    entries_max: usize,
    runs: Vec<Arc<Segment>>,
    keys_added: u64,
}

impl Builder {
    /// Begins a rebuild. `floor` is the end of the open first bucket that the ledger names, so that buckets, counts
    /// and digests can be compared; without one the first keys set it, as in a new state. For the same reason the
    /// bucket width of `spec` is to be the ledger's here, whatever the job asks for.
    ///
    /// # Errors
    /// [`StoreError::SpecInvalid`] and [`StoreError::Io`].
    pub fn create(
        folder: &Path,
        spec: StoreSpec,
        memory_bytes: u64,
        floor: Option<EventTimeMs>,
    ) -> Result<Self, StoreError> {
        spec.check()?;
        disk::make_folder(folder)?;
        let memory = memory_bytes.max(STORE_MEMORY_BYTES_MIN);
        Ok(Self {
            folder: folder.to_owned(),
            grid: floor.map(|floor| Grid::with_floor(floor, spec.bucket_width_ms)),
            spec,
            limits: Limits::of(memory / 2),
            table: BucketTable::default(),
            entries: Vec::new(),
            entries_max: memory as usize / 2 / size_of::<Entry>(),
            runs: Vec::new(),
            keys_added: 0,
        })
    }

    /// Takes keys of table rows, in any order, repeats included.
    ///
    /// # Errors
    /// Any [`StoreError`]; the rebuild is to be begun again.
    pub fn add(&mut self, keys: &[Key]) -> Result<(), StoreError> {
        let Some(largest) = keys.iter().map(|key| key.event_time).max() else { return Ok(()) };
        let width_ms = self.spec.bucket_width_ms;
        let grid = *self.grid.get_or_insert_with(|| Grid::below(largest, width_ms));
        for key in keys {
            if self.entries.len() == self.entries_max {
                self.write_run()?;
            }
            let bucket = self.table.ordinal(grid.bucket_of(key.event_time))?;
            self.table.note(bucket, key.event_time);
            self.entries.push(Entry { fingerprint: key.fingerprint, bucket });
        }
        self.keys_added += keys.len() as u64;
        Ok(())
    }

    /// Writes the generation, durably. It becomes the state when a commit names it.
    ///
    /// # Errors
    /// Any [`StoreError`]; the files written so far are named by nobody.
    pub fn finish(mut self, name: GenerationName) -> Result<(GenerationRef, RebuildReport), StoreError> {
        self.write_run()?;
        while self.runs.len() > FAN_IN {
            self.runs.sort_by_key(|run| run.entry.keys);
            let inputs = self.runs.drain(..FAN_IN).collect();
            self.merge_runs(inputs)?;
        }
        let mut manifest = Manifest::empty(&self.spec);
        manifest.floor = self.grid.map(|grid| grid.floor());
        let tallies = self.write_segment(name, &mut manifest)?;
        manifest.buckets = tallies.iter().map(|(bucket, tally)| BucketTally::new(*bucket, *tally)).collect();
        if manifest.buckets.len() > BUCKETS_MAX {
            return Err(StoreError::TooManyBuckets { buckets_max: BUCKETS_MAX });
        }
        let reference = manifest.write(&self.folder, name)?;
        disk::sync_folder(&self.folder)?;
        let keys = manifest.buckets.iter().map(|bucket| bucket.keys).sum();
        let repeats = self.keys_added - keys;
        Ok((reference, RebuildReport { keys, repeats, buckets: manifest.buckets }))
    }

    fn write_segment(
        &self,
        name: GenerationName,
        manifest: &mut Manifest,
    ) -> Result<BTreeMap<Bucket, Tally>, StoreError> {
        if self.runs.is_empty() {
            return Ok(BTreeMap::new());
        }
        let mut files = SegmentFiles::new(&self.folder, &self.spec, self.limits, name);
        let (segment_name, mut writer) = files.begin()?;
        let merged = merge(&self.runs, None, &mut writer, self.limits.merge_read_bytes_max)?;
        let segment = files.end(segment_name, writer, tier_of(&self.runs))?;
        manifest.segments.push(segment.entry);
        Ok(merged.kept)
    }

    /// Sorts the keys in memory into a run, and merges runs while eight are of one tier.
    fn write_run(&mut self) -> Result<(), StoreError> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let (name, mut writer) = self.begin_run()?;
        let entries = std::mem::take(&mut self.entries);
        write_sections(entries, &self.table, &mut writer)?;
        self.end_run(name, writer, 0)?;
        while let Some(tier) = self.full_tier() {
            let (inputs, others) = self.runs.drain(..).partition(|run| run.entry.tier == tier);
            self.runs = others;
            self.merge_runs(inputs)?;
        }
        Ok(())
    }

    fn full_tier(&self) -> Option<u32> {
        let mut runs_of_tier: BTreeMap<u32, usize> = BTreeMap::new();
        for run in &self.runs {
            *runs_of_tier.entry(run.entry.tier).or_default() += 1;
        }
        runs_of_tier.into_iter().find(|(_, runs)| *runs == FAN_IN).map(|(tier, _)| tier)
    }

    fn merge_runs(&mut self, inputs: Vec<Arc<Segment>>) -> Result<(), StoreError> {
        let (name, mut writer) = self.begin_run()?;
        merge(&inputs, None, &mut writer, self.limits.merge_read_bytes_max)?;
        self.end_run(name, writer, tier_of(&inputs))
    }

    /// Creates the file of a run and takes its name away, so that it vanishes with this process.
    fn begin_run(&self) -> Result<(SegmentName, SegmentWriter), StoreError> {
        let name = SegmentName { generation: GenerationName::new(0, 0, Uuid::new_v4()), number: 0 };
        let file_name = name.to_string();
        let file = disk::create_new(&self.folder, &file_name)?;
        std::fs::remove_file(self.folder.join(&file_name))
            .map_err(|error| StoreError::io("unlink", &file_name, error))?;
        Ok((name, SegmentWriter::new(file, name, &self.spec, self.limits.write_bytes_max)))
    }

    fn end_run(&mut self, name: SegmentName, writer: SegmentWriter, tier: u32) -> Result<(), StoreError> {
        let (entry, file) = writer.finish(name, tier)?;
        self.runs.push(Arc::new(Segment::from_file(file, &entry, &self.spec)?));
        Ok(())
    }
}

/// One more than the highest tier of the inputs.
fn tier_of(inputs: &[Arc<Segment>]) -> u32 {
    inputs.iter().map(|input| input.entry.tier + 1).max().unwrap_or(0)
}
