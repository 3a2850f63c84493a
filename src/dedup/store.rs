//! The store: one generation in use, the pending keys of the microbatch in work, and the generation being
//! committed.
//!
//! Flow: (`gather`* -> `settle`, or both in `probe`)* -> `prepare` -> (commit) -> `publish` | `abandon`. Between `prepare` and its outcome the next
//! microbatch may be probed already, on the assumption that the commit lands; `abandon` drops both.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use super::bucket::{Bucket, BucketTally, Grid, Tally};
use super::builder::Builder;
use super::gather::ProbeBatch;
use super::generation::{GenerationName, GenerationRef, Manifest, SweepReport, sweep_others};
use super::lookup::{self, Lookup, Target};
use super::pending::{Entry, Pending};
use super::pins::{PinStats, Pins};
use super::recent::{BatchRuns, Recent};
use super::segment::Segment;
use super::tiers::{Merges, SegmentFiles, dead_bytes, probed_keys, write_generation};
use super::window::{Window, set_width};
use super::{Key, Limits, StoreError, StoreSpec, Verdict, access, disk};
use crate::event_time::EventTimeMs;
use crate::job::Repeats;
use crate::mutant;

/// Sizes of a generation and of what is held in memory for it, and what writing it took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct StoreStats {
    /// Keys of the live buckets.
    pub keys: u64,
    /// Bytes of the segments on disk.
    pub segment_bytes: u64,
    /// Segments. Each is open once, or twice if it is read around the page cache.
    pub segments: u64,
    /// Live buckets.
    pub buckets: u64,
    /// Bytes of filters, page indexes and pages in memory now.
    pub pinned_bytes: u64,
    /// What of them may stay.
    pub pins: PinStats,
    /// Bytes of recent keys in memory.
    pub recent_bytes: u64,
    /// Keys that no generation holds yet.
    pub pending_keys: u64,
    /// Bytes of the segments that hold keys of buckets that are not live any more; they go with a merge.
    pub dead_bytes: u64,
    /// Files that the store needs now: segments, manifests, and outputs of merges.
    pub files: u64,
    /// Bytes of the segments that batches wrote, since the store was opened.
    pub segment_bytes_written: u64,
    /// Bytes that merges wrote since then. With those of batches, against those of batches alone, this is the write
    /// amplification.
    pub merge_bytes_written: u64,
    /// Merges whose outputs entered a published generation since then.
    pub merges: u64,
    /// Merges that were given up for want of disk space since then, to be tried again.
    pub merges_failed: u64,
    /// How often [`Store::prepare`] waited for a merge since then.
    pub merge_waits: u64,
    /// How long it waited in all, in milliseconds.
    pub merge_wait_ms: u64,
}

/// States below this size are read in a blink on any device: it is not measured for them.
const MEASURED_BYTES_MIN: u64 = 64 << 20;

/// A generation whose segments are open.
#[derive(Debug)]
pub(super) struct Generation {
    /// `None` of a state that was never committed.
    pub(super) name: Option<GenerationName>,
    pub(super) manifest: Manifest,
    /// Oldest first, as in the manifest.
    pub(super) segments: Vec<Arc<Segment>>,
    /// Places (segment, section) of every live bucket, newest segment first.
    pub(super) sections: BTreeMap<Bucket, Vec<(usize, usize)>>,
    /// The same of the buckets in their grace.
    pub(super) grace_sections: BTreeMap<Bucket, Vec<(usize, usize)>>,
}

impl Generation {
    /// # Errors
    /// [`StoreError::Corrupt`] if the sections of a bucket do not add up to what the manifest counts.
    pub(super) fn new(
        manifest: Manifest,
        segments: Vec<Arc<Segment>>,
        name: Option<GenerationName>,
    ) -> Result<Self, StoreError> {
        let mut sections: BTreeMap<Bucket, Vec<(usize, usize)>> =
            manifest.named_buckets().map(|tally| (tally.bucket(), Vec::new())).collect();
        let mut found: BTreeMap<Bucket, Tally> = BTreeMap::new();
        for (segment_index, segment) in segments.iter().enumerate().rev() {
            for (section_index, section) in segment.sections.iter().enumerate() {
                if let Some(places) = sections.get_mut(&section.bucket) {
                    places.push((segment_index, section_index));
                    found.entry(section.bucket).or_default().add_all(section.tally);
                }
            }
        }
        for bucket in manifest.named_buckets() {
            if found.get(&bucket.bucket()) != Some(&bucket.tally()) {
                let file = name.map(|name| name.manifest_file()).unwrap_or_default();
                let what = format!("the segments do not add up to the bucket of {}", bucket.from);
                return Err(StoreError::corrupt(file, what));
            }
        }
        let live = sections.split_off(&Bucket { from: manifest.complete_since, to: EventTimeMs(i64::MIN) });
        Ok(Self { name, manifest, segments, sections: live, grace_sections: sections })
    }

    /// Its largest segment, if it is neither small nor fits in so many bytes.
    pub(super) fn larger_than(&self, bytes: u64) -> Option<Arc<Segment>> {
        let all: u64 = self.segments.iter().map(|segment| segment.entry.bytes).sum();
        let largest = self.segments.iter().max_by_key(|segment| segment.entry.bytes);
        largest.filter(|_| all > bytes.max(MEASURED_BYTES_MIN)).cloned()
    }

    /// Names of its manifest and its segments.
    fn file_names(&self) -> impl Iterator<Item = String> {
        let manifest = self.name.map(|name| name.manifest_file());
        manifest.into_iter().chain(self.segments.iter().map(|segment| segment.entry.name.to_string()))
    }
}

/// Dedup state of one job, opened at one generation.
#[derive(Debug)]
pub struct Store {
    pub(super) folder: PathBuf,
    pub(super) spec: StoreSpec,
    pub(super) current: Generation,
    pub(super) prepared: Option<Generation>,
    pub(super) pending: Pending,
    pub(super) grid: Option<Grid>,
    pub(super) window: Window,
    pins: Pins,
    lookup: Lookup,
    recent: Recent,
    merging: Merges,
    broken: bool,
}

impl Store {
    /// Opens the generation that the ledger names, or an empty state if it names none, in a folder that holds one
    /// job's state and is made if it is not there. Reads and checks the manifest and the frame of every segment;
    /// pages are checked as they are read. Merges that are due begin at once, on threads of their own, so a folder has
    /// one store at a time: its owner's.
    ///
    /// Memory: `memory_bytes`, at least [`STORE_MEMORY_BYTES_MIN`](super::STORE_MEMORY_BYTES_MIN); pending keys
    /// and the probe batch in work come on top, see the module head.
    ///
    /// # Errors
    /// [`StoreError::Missing`] and [`StoreError::Corrupt`] name the file: rebuild with [`Builder`](super::Builder).
    /// [`StoreError::SpecDiffers`], [`StoreError::NewerFormat`] and [`StoreError::SpecInvalid`]: stop.
    /// [`StoreError::Io`]: the disk.
    pub fn open(
        folder: &Path,
        spec: StoreSpec,
        generation: Option<&GenerationRef>,
        memory_bytes: u64,
    ) -> Result<Self, StoreError> {
        Self::open_within(folder, spec, generation, Limits::of(memory_bytes))
    }

    /// [`Store::open`] with the shares of the memory given one by one.
    pub(super) fn open_within(
        folder: &Path,
        spec: StoreSpec,
        generation: Option<&GenerationRef>,
        limits: Limits,
    ) -> Result<Self, StoreError> {
        spec.check()?;
        disk::make_folder(folder)?;
        let mut current = match generation {
            None => Generation::new(Manifest::empty(&spec), Vec::new(), None)?,
            Some(reference) => open_generation(folder, &spec, reference)?,
        };
        set_width(&mut current.manifest, spec.bucket_width_ms);
        let mut merging = Merges::new(SegmentFiles {
            folder: folder.to_owned(),
            spec: spec.clone(),
            limits,
            state_keys: probed_keys(&spec, current.manifest.buckets.iter().map(|bucket| bucket.keys)),
        });
        merging.start_due(&current);
        let mut pins = Pins::new(limits.pinned_bytes_max);
        pins.plan(&current.segments, current.manifest.complete_since);
        Ok(Self {
            folder: folder.to_owned(),
            grid: current.manifest.grid(),
            pending: Pending::new(spec.repeats, limits.merged_keys_max),
            lookup: Lookup::new(limits.read_buffer_bytes),
            recent: Recent::new(limits.recent_keys_max),
            spec,
            current,
            prepared: None,
            window: Window::default(),
            pins,
            merging,
            broken: false,
        })
    }

    /// Says of every key, in the order given, whether it was seen before. Of equal keys in the batch the first one
    /// wins, so the caller passes rows in the order of their places. New keys become pending: later probes see
    /// them, and [`Store::prepare`] writes them.
    ///
    /// Costs 21 bytes per key beside what is given, of which 16 become those of pending keys, and at most one read of each
    /// page by each unit of the batch; no sync.
    ///
    /// # Errors
    /// Any [`StoreError`]; then no key became pending and the batch may be probed again or abandoned. A page that
    /// can not be read or is not intact is an error, never "not seen".
    ///
    /// # Panics
    /// If the batch holds 2^32 keys or more.
    pub fn probe(&mut self, keys: &[Key]) -> Result<Vec<Verdict>, StoreError> {
        let mut batch = ProbeBatch::default();
        self.gather(&mut batch, 0, keys)?;
        self.settle(batch)
    }

    /// Adds keys to a probe batch that is looked up later, by [`Store::settle`]. Of equal keys the one of the lowest `rank`
    /// wins, and of one rank the first, so that a batch may be gathered in parts that each hold rows of several topic
    /// partitions. It is of the microbatch in work: it is settled before [`Store::prepare`], or dropped.
    ///
    /// # Errors
    /// Any [`StoreError`]; the batch is then to be dropped.
    ///
    /// # Panics
    /// If the batch holds 2^32 keys or more.
    pub fn gather(&mut self, batch: &mut ProbeBatch, rank: u32, keys: &[Key]) -> Result<(), StoreError> {
        if self.broken {
            return Err(StoreError::Broken);
        }
        let ordinals = self.ordinals(keys)?;
        batch.push(rank, keys, &ordinals);
        Ok(())
    }

    /// Looks a gathered batch up: a verdict for each key, in the order in which they were gathered. Otherwise as
    /// [`Store::probe`].
    ///
    /// # Errors
    /// Any [`StoreError`], as [`Store::probe`]; the batch is gone, so what it is of can only be abandoned.
    pub fn settle(&mut self, mut batch: ProbeBatch) -> Result<Vec<Verdict>, StoreError> {
        if self.broken {
            return Err(StoreError::Broken);
        }
        self.mark_found(&mut batch)?;
        let (verdicts, entries) = batch.into_verdicts();
        self.pending.push(entries);
        Ok(verdicts)
    }

    /// Takes keys as pending that the caller knows to be new, without looking them up: keys of a table whose rows are
    /// unique already. In any order; none may be in the state, pending, or here twice.
    ///
    /// # Errors
    /// As [`Store::probe`].
    pub fn append_unprobed(&mut self, keys: &[Key]) -> Result<(), StoreError> {
        if self.broken {
            return Err(StoreError::Broken);
        }
        let ordinals = self.ordinals(keys)?;
        let entries = keys.iter().zip(ordinals);
        let mut entries: Vec<Entry> =
            entries.map(|(key, bucket)| Entry::new(key.fingerprint.value(), bucket)).collect();
        self.pending.sort(&mut entries);
        self.pending.push(entries);
        Ok(())
    }

    /// The bucket of every key, as its ordinal among the pending ones.
    fn ordinals(&mut self, keys: &[Key]) -> Result<Vec<u32>, StoreError> {
        let Some(largest) = keys.iter().map(|key| key.event_time).max() else { return Ok(Vec::new()) };
        let width_ms = self.probed().manifest.bucket_width_ms;
        let grid = *self.grid.get_or_insert_with(|| Grid::below(largest, width_ms));
        self.admit(keys)?;
        let mut ordinals = Vec::with_capacity(keys.len());
        // Neighbours mostly share their bucket.
        let mut last: Option<(Bucket, u32)> = None;
        for key in keys {
            let (bucket, ordinal) = match last {
                Some(same) if same.0.holds(key.event_time) => same,
                _ => {
                    let bucket = grid.bucket_of(key.event_time);
                    (bucket, self.pending.table.ordinal(bucket)?)
                }
            };
            last = Some((bucket, ordinal));
            self.pending.table.note(ordinal, key.event_time);
            ordinals.push(ordinal);
        }
        Ok(ordinals)
    }

    /// Sorts the probes of a batch and marks those that were seen.
    fn mark_found(&mut self, batch: &mut ProbeBatch) -> Result<(), StoreError> {
        self.measure_device()?;
        let Self { current, prepared, pending, pins, lookup, recent, spec, window, .. } = self;
        let generation: &Generation = prepared.as_ref().unwrap_or(current);
        let mut lookups = Vec::new();
        let mut places = Vec::new();
        for (ordinal, probes) in batch.groups(spec.repeats) {
            let bucket = match spec.repeats {
                Repeats::AnyTime => None,
                Repeats::SameTime => Some(pending.table.bucket(ordinal)),
            };
            let target = |(segment, section_index): (Arc<Segment>, usize)| {
                let pinned = pins.of(&segment, section_index);
                Target { segment, section_index, pinned }
            };
            let targets = window.sections(generation, bucket).into_iter().map(target).collect();
            lookups.push(lookup::Group { probes, targets });
            places.push((ordinal, bucket));
        }
        lookup.mark_found(
            &mut lookups,
            |group_index, unit| pending.mark_found(places[group_index].0, unit),
            |group_index, candidates| recent.mark_found(places[group_index].1, candidates),
        )
    }

    /// Seconds that a probe batch of so many keys takes the device and a core, as the plan of a lookup reckons them: beside
    /// what a batch costs wherever its state lies. With `same_time` as if all keys were of the newest bucket.
    ///
    /// # Errors
    /// Those of measuring the device, once.
    pub fn lookup_seconds(&mut self, keys: u64) -> Result<f64, StoreError> {
        self.measure_device()?;
        let generation = self.probed();
        let newest = generation.sections.keys().next_back().copied();
        let bucket = newest.filter(|_| self.spec.repeats == Repeats::SameTime);
        let device = self.lookup.device();
        let sections = self.window.sections(generation, bucket);
        let keys_probed =
            sections.iter().map(|(segment, section_index)| segment.sections[*section_index].tally.keys).sum();
        let seconds = |(segment, section_index): (Arc<Segment>, usize)| {
            let pinned = self.pins.of(&segment, section_index);
            access::seconds(&segment.sections[section_index], &pinned, keys, keys_probed, &device)
        };
        Ok(sections.into_iter().map(seconds).sum())
    }

    /// Bytes per second of the device that the state lies on, one after another.
    pub fn device_bytes_per_second(&self) -> f64 {
        self.lookup.device().bytes_per_second
    }

    /// Whether lookups read the disk: the state is neither small nor fits in memory.
    pub fn is_larger_than_memory(&self) -> bool {
        self.probed().larger_than(self.pins.bytes_max()).is_some()
    }

    /// Measures the device when the state no longer fits in memory: before, no choice depends on it.
    fn measure_device(&mut self) -> Result<(), StoreError> {
        let largest = self.probed().larger_than(self.pins.bytes_max());
        largest.map_or(Ok(()), |largest| self.lookup.measure(&largest))
    }

    /// The generation that probes use: the prepared one, as soon as there is one.
    pub(super) fn probed(&self) -> &Generation {
        self.prepared.as_ref().unwrap_or(&self.current)
    }

    /// Writes the pending keys as one segment, takes what was merged in the background, and writes the manifest of
    /// the next generation; all of it is durable when this returns. The generation becomes the state when the
    /// caller's commit names it: then call [`Store::publish`], else [`Store::abandon`]. Without pending keys only a
    /// manifest is written.
    ///
    /// Costs as many bytes again as the pending keys take, and two syncs of files and one of the folder. Waits for a
    /// merge only if a tier would have more than 15 segments; merges that are due begin when this returns.
    ///
    /// # Errors
    /// Any [`StoreError`], that of a merge in the background too; the files written so far are named by nobody.
    /// Abandon the batch; the name is spent.
    ///
    /// # Panics
    /// If a generation is prepared already.
    pub fn prepare(&mut self, name: GenerationName) -> Result<GenerationRef, StoreError> {
        assert!(
            self.prepared.is_none(),
            "a generation is published or abandoned before the next is prepared"
        );
        if self.broken {
            return Err(StoreError::Broken);
        }
        // The pending keys leave memory here: until the generation is whole, nothing may be probed.
        self.broken = true;
        let mut pending = self.pending.next();
        std::mem::swap(&mut pending, &mut self.pending);
        let window = std::mem::take(&mut self.window);
        let begin = |bytes| Builder::on_grid(&self.folder, self.spec.clone(), bytes, self.grid);
        let next_window = window.next(&pending, begin)?;
        window.drop_borrowed(&mut pending);
        pending.compact();
        let mut runs = match self.recent.takes(pending.keys()) {
            true => pending.recent_runs(self.complete_since()),
            false => BatchRuns::new(),
        };
        let (generation, reference) =
            write_generation(&mut self.merging, &self.current, self.grid, name, pending, &window)?;
        let expired = generation.manifest.complete_since > self.current.manifest.complete_since;
        if expired && self.spec.repeats == Repeats::AnyTime {
            // What is found must follow from the generation, not from what happens to be in memory still.
            self.recent.clear();
            runs = BatchRuns::new();
        }
        self.grid = generation.manifest.grid();
        self.pins.plan(&generation.segments, generation.manifest.complete_since);
        self.prepared = Some(generation);
        self.window = next_window;
        self.recent.push(runs);
        self.broken = false;
        Ok(reference)
    }

    /// Makes the prepared generation the one in use. To be called when the commit that names it has landed.
    ///
    /// # Panics
    /// If none is prepared.
    pub fn publish(&mut self) {
        let prepared = self.prepared.take();
        self.current = prepared.expect("a generation is prepared before it is published");
        self.merging.published();
    }

    /// Drops pending keys, loans and the prepared generation: nothing of this microbatch counts as seen. Files stay for
    /// [`sweep`](super::sweep).
    pub fn abandon(&mut self) {
        if self.prepared.take().is_some() {
            self.recent.forget_last();
        }
        let empty = self.pending.next();
        self.pending =
            mutant!("abandoned-keys-stay-seen", std::mem::replace(&mut self.pending, empty) => empty);
        self.window = Window::default();
        self.grid = self.current.manifest.grid();
        self.pins.plan(&self.current.segments, self.current.manifest.complete_since);
        self.merging.abandoned();
        self.broken = false;
    }

    /// As [`sweep`](super::sweep), and spares what this store needs: its generation, one that is prepared, and the
    /// files of merges that run or ended. So an owner may pass its own epoch plus one after each of its commits, with
    /// the last generations that its ledger names in `keep`.
    ///
    /// # Errors
    /// Those of [`sweep`](super::sweep).
    pub fn sweep(&mut self, keep: &[GenerationRef], epoch: u64) -> Result<SweepReport, StoreError> {
        let mut needed = self.merging.file_names();
        needed.extend(self.current.file_names());
        needed.extend(self.prepared.iter().flat_map(Generation::file_names));
        let report = sweep_others(&self.folder, keep, epoch, needed)?;
        self.merging.swept(report.files);
        Ok(report)
    }

    /// About how many files this store made, needs no more, and has not swept. Kept generations may still need them.
    pub fn retired_files(&self) -> u64 {
        self.merging.retired_files()
    }

    /// Waits for the merges that run.
    #[cfg(test)]
    pub(super) fn finish_merges(&mut self) {
        self.merging.finish();
    }

    /// From now on merges end only if someone waits for them.
    #[cfg(test)]
    pub(super) fn hold_merges(&mut self) {
        self.merging.hold();
    }

    /// From now on merges find no space on the disk, or find it again.
    #[cfg(test)]
    pub(super) fn set_disk_full(&mut self, is_full: bool) {
        self.merging.set_disk_full(is_full);
    }

    /// Bytes that the pending keys take at most. [`Store::prepare`] takes as much again for a moment. The caller ends the
    /// microbatch before they outgrow their share of the memory.
    pub fn pending_bytes(&self) -> u64 {
        self.pending.bytes()
    }

    /// Live buckets with count and digest, ascending, of the generation that probes use: after
    /// [`Store::prepare`] the prepared one.
    pub fn buckets(&self) -> &[BucketTally] {
        &self.probed().manifest.buckets
    }

    /// From this event time on the generation that probes use holds all keys. Keys before it need a bucket in its grace
    /// or a loan: see [`Store::missing_buckets`].
    pub fn complete_since(&self) -> EventTimeMs {
        self.probed().manifest.complete_since
    }

    /// End of the open first bucket; `None` before the first key. A rebuild needs it to make the same buckets.
    pub fn floor(&self) -> Option<EventTimeMs> {
        self.grid.map(|grid| grid.floor())
    }

    /// Width of a bucket, in milliseconds, that the manifest names. A rebuild needs it to make the same buckets.
    pub fn bucket_width_ms(&self) -> i64 {
        self.probed().manifest.bucket_width_ms
    }

    /// Sizes of the generation that probes use, and what was written since the store was opened.
    pub fn stats(&self) -> StoreStats {
        let generation = self.probed();
        let written = self.merging.stats();
        let mut files = self.merging.file_names();
        files.extend(self.current.file_names());
        files.extend(self.prepared.iter().flat_map(Generation::file_names));
        StoreStats {
            keys: generation.manifest.buckets.iter().map(|bucket| bucket.keys).sum(),
            segment_bytes: generation.segments.iter().map(|segment| segment.entry.bytes).sum(),
            segments: generation.segments.len() as u64,
            buckets: generation.manifest.buckets.len() as u64,
            pinned_bytes: self.pins.bytes(),
            pins: self.pins.stats(),
            recent_bytes: self.recent.bytes(),
            pending_keys: self.pending.keys(),
            dead_bytes: dead_bytes(generation),
            files: files.len() as u64,
            segment_bytes_written: written.segment_bytes_written,
            merge_bytes_written: written.merge_bytes_written,
            merges: written.merges,
            merges_failed: written.merges_failed,
            merge_waits: written.merge_waits,
            merge_wait_ms: written.merge_wait_ms,
        }
    }
}

pub(super) fn open_generation(
    folder: &Path,
    spec: &StoreSpec,
    reference: &GenerationRef,
) -> Result<Generation, StoreError> {
    let manifest = Manifest::read(folder, reference)?;
    manifest.check_spec(reference.name, spec)?;
    let segments = manifest
        .segments
        .iter()
        .map(|entry| Segment::open(folder, entry, spec).map(Arc::new))
        .collect::<Result<Vec<_>, _>>()?;
    Generation::new(manifest, segments, Some(reference.name))
}
