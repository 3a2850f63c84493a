//! Rebuild: the state made again from the keys of the tables, in whatever order they come and however often.
//!
//! Flow: keys -> one of two buffers, until it is full -> sorted on all cores and written as a run, while the other
//! buffer fills -> all runs merged at once -> one segment and its manifest. Keys that fit into one buffer become the
//! segment without a run.
//!
//! Runs are segments whose files are unlinked as soon as they are made, so a crash leaves at most one empty file
//! of epoch 0 for the sweep. Only the last merge writes files that stay, in the same durable order as
//! [`Store::prepare`](super::Store::prepare).
//!
//! Copies of a key in its bucket collapse and are counted. A key that stands in two buckets stays in both, also
//! with `any_time`: the state is then what the tables say. [`Builder::settle`] says on the way what the keys so far are,
//! for one more pass over them: what comes later is told from it by the difference.
//!
//! Bounds, whatever the number of keys. Memory: half of it holds keys (16 bytes each, in two buffers), half serves
//! merges, of which 1.2 MB is the least. Disk: as much again as the result takes, for the runs, until it is done.
//! Passes: all runs are merged at once while they are at most [`INPUTS_MAX`] and have memory for [`RUN_READ_BYTES`]
//! each (up to 1.6e8 keys with 64 MiB, 1e9 with 256 MiB); one more pass for each further power of that number. Open
//! files: two per run and pass. Threads: one beside the caller's, and those that sort. One whose builder was dropped ends
//! with its run.

use std::collections::BTreeMap;
use std::mem;
use std::ops::ControlFlow;
use std::panic;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use rayon::slice::ParallelSliceMut;
use uuid::Uuid;

use super::bucket::{Bucket, BucketTally, ERAS_MAX, Era, Grid, Tally};
use super::filter::FilterEffort;
use super::generation::{GenerationName, GenerationRef, Manifest};
use super::merge::{FAN_IN, INPUT_BYTES_MAX, Merged, merge};
use super::page::PAGE_BYTES;
use super::pending::BucketTable;
use super::segment::{Segment, SegmentName, SegmentWriter};
use super::tiers::SegmentFiles;
use super::{
    BUCKETS_MAX, Key, Limits, STORE_MEMORY_BYTES_MIN, StoreError, StoreSpec, TRANSFER_BYTES_MAX, disk,
};
use crate::event_time::EventTimeMs;
use crate::fingerprint::FINGERPRINT_BITS;
use crate::job::Repeats;

/// Bytes of one read of a run, if there is memory for it.
const RUN_READ_BYTES: usize = 64 << 10;
/// Most runs that are merged at once: open files, and one read is still long where there is memory for so many.
const INPUTS_MAX: usize = 256;
/// Keys that are unpacked for the writer at once.
const CHUNK_KEYS: usize = 8 << 10;
/// Keys of a batch as they are expected: says as what tier the segment counts.
const BATCH_KEYS: u64 = 1 << 20;

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
    files: SegmentFiles,
    grid: Option<Grid>,
    table: BucketTable,
    /// Ordinal of the bucket, then the fingerprint: see [`packed`].
    keys: Vec<u128>,
    /// Of one buffer.
    keys_max: usize,
    /// Bytes for the inputs of a merge.
    merge_memory: usize,
    /// Most runs that are merged at once.
    inputs_max: usize,
    /// The run that is being written, and the other buffer.
    writing: Option<JoinHandle<Result<Written, StoreError>>>,
    runs: Vec<Arc<Segment>>,
    keys_added: u64,
    eras: Vec<Era>,
    complete_since: EventTimeMs,
    stop: Arc<AtomicBool>,
}

/// A run, and the empty buffer that it was in.
#[derive(Debug)]
struct Written {
    run: Segment,
    buffer: Vec<u128>,
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
        let grid = floor.map(|floor| Grid::with_floor(floor, spec.bucket_width_ms));
        Self::on_grid(folder, spec, memory_bytes, grid)
    }

    /// [`Builder::create`] with the whole grid given.
    pub(super) fn on_grid(
        folder: &Path,
        spec: StoreSpec,
        memory_bytes: u64,
        grid: Option<Grid>,
    ) -> Result<Self, StoreError> {
        spec.check()?;
        disk::make_folder(folder)?;
        let memory = memory_bytes.max(STORE_MEMORY_BYTES_MIN) as usize;
        let merge_memory = memory / 2;
        let keys_max = memory / 4 / size_of::<u128>();
        let inputs_max = (merge_memory / (INPUT_BYTES_MAX + RUN_READ_BYTES)).clamp(FAN_IN, INPUTS_MAX);
        Ok(Self {
            grid,
            files: SegmentFiles {
                folder: folder.to_owned(),
                spec,
                limits: Limits::of(merge_memory as u64),
                state_keys: 0,
            },
            table: BucketTable::default(),
            keys: Vec::with_capacity(keys_max),
            keys_max,
            merge_memory,
            inputs_max,
            writing: None,
            runs: Vec::new(),
            keys_added: 0,
            eras: Vec::new(),
            complete_since: EventTimeMs(i64::MIN),
            stop: Arc::default(),
        })
    }

    /// Ends the long merges with [`StoreError::Stopped`] once this flag is set.
    pub fn stop_by(mut self, stop: Arc<AtomicBool>) -> Self {
        self.stop = stop;
        self
    }

    /// Rebuilds a state whose width changed and whose first buckets have expired, as its ledger says: with these earlier
    /// widths, and without the keys before `complete_since`.
    ///
    /// # Errors
    /// [`StoreError::SpecInvalid`] for eras that no state of ours has.
    pub fn of_history(mut self, eras: &[Era], complete_since: EventTimeMs) -> Result<Self, StoreError> {
        let ascend = eras.windows(2).all(|pair| pair[0].until < pair[1].until);
        if eras.len() > ERAS_MAX || !ascend || eras.iter().any(|era| era.bucket_width_ms < 1) {
            let what =
                format!("{} eras of bucket widths: they are at most {ERAS_MAX} and ascend", eras.len());
            return Err(StoreError::SpecInvalid { what });
        }
        self.grid = self.grid.map(|grid| Grid::of(grid.floor(), self.files.spec.bucket_width_ms, eras));
        self.eras = eras.to_vec();
        self.complete_since = complete_since;
        Ok(self)
    }

    /// The bucket that a time falls into; `None` before the floor is known.
    pub(super) fn bucket_of(&self, time: EventTimeMs) -> Option<Bucket> {
        self.grid.map(|grid| grid.bucket_of(time))
    }

    /// Takes keys of table rows, in any order, repeats included.
    ///
    /// # Errors
    /// Any [`StoreError`]; the rebuild is to be begun again.
    pub fn add(&mut self, keys: &[Key]) -> Result<(), StoreError> {
        let Some(largest) = keys.iter().map(|key| key.event_time).max() else { return Ok(()) };
        let width_ms = self.files.spec.bucket_width_ms;
        let grid = *self.grid.get_or_insert_with(|| Grid::below(largest, width_ms));
        let complete_since = self.complete_since;
        for key in keys.iter().filter(|key| key.event_time >= complete_since) {
            if self.keys.len() == self.keys_max {
                self.write_run()?;
            }
            let bucket = self.table.ordinal(grid.bucket_of(key.event_time))?;
            self.table.note(bucket, key.event_time);
            self.keys.push(packed(bucket, key));
            self.keys_added += 1;
        }
        Ok(())
    }

    /// Says what the keys are that came so far; more may follow.
    ///
    /// # Errors
    /// Any [`StoreError`]; the rebuild is to be begun again.
    pub fn settle(&mut self) -> Result<RebuildReport, StoreError> {
        self.files.state_keys = self.probed_keys();
        self.write_run()?;
        self.keys = self.end_run()?;
        self.leave_runs(1)?;
        let sections = self.runs.iter().flat_map(|run| &run.sections);
        let buckets: BTreeMap<Bucket, Tally> =
            sections.map(|section| (section.bucket, section.tally)).collect();
        Ok(self.report(&buckets))
    }

    /// The keys that were added, as they were written.
    fn report(&self, written: &BTreeMap<Bucket, Tally>) -> RebuildReport {
        let buckets: Vec<BucketTally> =
            written.iter().map(|(bucket, tally)| BucketTally::new(*bucket, *tally)).collect();
        let keys = buckets.iter().map(|bucket| bucket.keys).sum();
        RebuildReport { keys, repeats: self.keys_added - keys, buckets }
    }

    /// Writes the generation, durably. It becomes the state when a commit names it.
    ///
    /// # Errors
    /// Any [`StoreError`]; the files written so far are named by nobody.
    pub fn finish(mut self, name: GenerationName) -> Result<(GenerationRef, RebuildReport), StoreError> {
        self.files.state_keys = self.probed_keys();
        let mut manifest = Manifest::empty(&self.files.spec);
        manifest.floor = self.grid.map(|grid| grid.floor());
        manifest.eras.clone_from(&self.eras);
        manifest.complete_since = self.complete_since;
        let written = self.write_segment(name, &mut manifest)?;
        let report = self.report(&written);
        manifest.buckets.clone_from(&report.buckets);
        if manifest.buckets.len() > BUCKETS_MAX {
            return Err(StoreError::TooManyBuckets { buckets_max: BUCKETS_MAX });
        }
        crate::crash_point!("rebuilt_segment_durable");
        let reference = manifest.write(&self.files.folder, name)?;
        crate::crash_point!("rebuilt_manifest_durable");
        disk::sync_folder(&self.files.folder)?;
        crate::crash_point!("rebuilt_generation_durable");
        Ok((reference, report))
    }

    /// Keys that a probe will be looked for among, if buckets are about equal.
    fn probed_keys(&self) -> u64 {
        match self.files.spec.repeats {
            Repeats::AnyTime => self.keys_added,
            Repeats::SameTime => self.keys_added / self.table.by_bucket().len().max(1) as u64,
        }
    }

    /// Writes the one segment of the generation, unless there are no keys.
    fn write_segment(
        &mut self,
        generation: GenerationName,
        manifest: &mut Manifest,
    ) -> Result<BTreeMap<Bucket, Tally>, StoreError> {
        if self.keys_added == 0 {
            return Ok(BTreeMap::new());
        }
        let name = SegmentName { generation, number: 0 };
        let is_one_run = self.runs.is_empty() && self.writing.is_none();
        let (mut writer, written);
        if is_one_run {
            writer = self.files.begin(name, FilterEffort::Quick)?;
            self.keys.par_sort_unstable();
            written = write_sections(&self.keys, &self.table.by_bucket(), &mut writer)?;
        } else {
            self.write_run()?;
            self.keys = Vec::new();
            self.end_run()?;
            self.leave_runs(self.inputs_max)?;
            writer = self.files.begin(name, FilterEffort::Quick)?;
            written = self.merge(&self.runs, &mut writer)?.kept;
        }
        let keys = written.values().map(|tally| tally.keys).sum();
        let segment = self.files.end(name, writer, tier_of(keys))?;
        manifest.segments.push(segment.entry);
        Ok(written)
    }

    /// All keys as one run; none without keys.
    ///
    /// # Errors
    /// Any [`StoreError`].
    pub(super) fn into_run(mut self) -> Result<Option<Arc<Segment>>, StoreError> {
        self.files.state_keys = self.probed_keys();
        self.write_run()?;
        self.end_run()?;
        self.keys = Vec::new();
        self.leave_runs(1)?;
        Ok(self.runs.pop())
    }

    /// Merges the smallest runs until no more than `runs_max` are left.
    fn leave_runs(&mut self, runs_max: usize) -> Result<(), StoreError> {
        while self.runs.len() > runs_max {
            self.runs.sort_by_key(|run| run.entry.keys);
            let inputs = self.runs.drain(..self.runs.len().min(self.inputs_max)).collect();
            self.merge_runs(inputs)?;
        }
        Ok(())
    }

    fn merge(&self, inputs: &[Arc<Segment>], writer: &mut SegmentWriter) -> Result<Merged, StoreError> {
        let share = (self.merge_memory / inputs.len()).saturating_sub(INPUT_BYTES_MAX);
        let read_bytes_max = share.clamp(PAGE_BYTES, TRANSFER_BYTES_MAX as usize);
        let mut pace = |_| match self.stop.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        };
        merge(inputs, None, writer, read_bytes_max, &mut pace)?.ok_or(StoreError::Stopped)
    }

    /// Hands the keys in memory to a thread that makes a run of them, once the run before is written.
    fn write_run(&mut self) -> Result<(), StoreError> {
        let buffer = self.end_run()?;
        if self.keys.is_empty() {
            return Ok(());
        }
        let mut keys = mem::replace(&mut self.keys, buffer);
        let files = self.files.clone();
        let rows = self.table.by_bucket();
        let work = move || {
            keys.par_sort_unstable();
            let (name, mut writer) = begin_run(&files)?;
            write_sections(&keys, &rows, &mut writer)?;
            keys.clear();
            Ok(Written { run: files.end(name, writer, 0)?, buffer: keys })
        };
        let thread = thread::Builder::new().name("dedup-rebuild".to_owned()).spawn(work);
        let started =
            thread.map_err(|error| StoreError::io("start to sort for", self.files.folder.display(), error));
        self.writing = Some(started?);
        Ok(())
    }

    /// Waits for the run that is being written, and merges runs while they are too many of one tier. Gives the buffer
    /// that became free.
    fn end_run(&mut self) -> Result<Vec<u128>, StoreError> {
        let Some(writing) = self.writing.take() else {
            return Ok(Vec::with_capacity(self.keys_max));
        };
        let written = writing.join().unwrap_or_else(|panicked| panic::resume_unwind(panicked))?;
        self.runs.push(Arc::new(written.run));
        while let Some(tier) = self.overfull_tier() {
            let is_input = |run: &mut Arc<Segment>| run.entry.tier == tier;
            let inputs = self.runs.extract_if(.., is_input).take(self.inputs_max).collect();
            self.merge_runs(inputs)?;
        }
        Ok(written.buffer)
    }

    /// The lowest tier that holds more runs than can be merged at once.
    fn overfull_tier(&self) -> Option<u32> {
        let mut runs_of_tier: BTreeMap<u32, usize> = BTreeMap::new();
        for run in &self.runs {
            *runs_of_tier.entry(run.entry.tier).or_default() += 1;
        }
        runs_of_tier.into_iter().find(|(_, runs)| *runs > self.inputs_max).map(|(tier, _)| tier)
    }

    fn merge_runs(&mut self, inputs: Vec<Arc<Segment>>) -> Result<(), StoreError> {
        let (name, mut writer) = begin_run(&self.files)?;
        self.merge(&inputs, &mut writer)?;
        let tier = inputs.iter().map(|input| input.entry.tier + 1).max().unwrap_or(0);
        self.runs.push(Arc::new(self.files.end(name, writer, tier)?));
        Ok(())
    }
}

/// A key in a form that sorts as a number: the ordinal of its bucket above the bits of its fingerprint.
fn packed(ordinal: u32, key: &Key) -> u128 {
    u128::from(ordinal) << FINGERPRINT_BITS | key.fingerprint.value()
}

/// Creates the file of a run and takes its name away, so that it vanishes with this process.
fn begin_run(files: &SegmentFiles) -> Result<(SegmentName, SegmentWriter), StoreError> {
    let name = SegmentName { generation: GenerationName::new(0, 0, Uuid::new_v4()), number: 0 };
    let writer = files.begin(name, FilterEffort::Quick)?;
    let file_name = name.to_string();
    crate::crash_point!("run_file_created");
    std::fs::remove_file(files.folder.join(&file_name))
        .map_err(|error| StoreError::io("unlink", &file_name, error))?;
    crate::crash_point!("run_file_unlinked");
    Ok((name, writer))
}

/// Writes sorted keys as sections; copies of a key in its bucket collapse. Gives the keys written per bucket.
fn write_sections(
    keys: &[u128],
    rows: &[(u32, Bucket, (EventTimeMs, EventTimeMs))],
    writer: &mut SegmentWriter,
) -> Result<BTreeMap<Bucket, Tally>, StoreError> {
    let mut written = BTreeMap::new();
    let mut values = Vec::with_capacity(CHUNK_KEYS);
    for (ordinal, bucket, event_times) in rows {
        let begin = keys.partition_point(|key| key >> FINGERPRINT_BITS < u128::from(*ordinal));
        let end = keys.partition_point(|key| key >> FINGERPRINT_BITS <= u128::from(*ordinal));
        if begin == end {
            continue;
        }
        let mut section = writer.section(*bucket, *event_times, (end - begin) as u64);
        let mut previous = None;
        for chunk in keys[begin..end].chunks(CHUNK_KEYS) {
            values.clear();
            values.extend(chunk.iter().map(|key| key & ((1 << FINGERPRINT_BITS) - 1)));
            values.dedup();
            let is_copy = values.first() == previous.as_ref();
            previous = values.last().copied();
            section.push_all(&values[usize::from(is_copy)..])?;
        }
        written.insert(*bucket, section.finish()?);
    }
    Ok(written)
}

/// The tier in which batches would have brought so many keys.
fn tier_of(keys: u64) -> u32 {
    let batches = keys.div_ceil(BATCH_KEYS);
    (0..).find(|tier| (FAN_IN as u64).saturating_pow(*tier) >= batches).unwrap_or(0)
}
