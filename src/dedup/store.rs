//! The store: one generation in use, the pending keys of the microbatch in work, and the generation being
//! committed.
//!
//! Flow: `probe`* -> `prepare` -> (commit) -> `publish` | `abandon`. Between `prepare` and its outcome the next
//! microbatch may be probed already, on the assumption that the commit lands; `abandon` drops both.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::bucket::{Bucket, BucketTally, Grid, Tally};
use super::generation::{GenerationName, GenerationRef, Manifest};
use super::lookup::{Lookup, Probe};
use super::merge::{FAN_IN, merge};
use super::pending::{Entry, Pending};
use super::pins::Pins;
use super::segment::{Segment, SegmentName, SegmentWriter};
use super::{BUCKETS_MAX, Key, Limits, StoreError, StoreSpec, Verdict, disk};
use crate::event_time::EventTimeMs;
use crate::job::Repeats;

/// Sizes of a generation and of what is held in memory for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreStats {
    /// Keys of the live buckets.
    pub keys: u64,
    /// Bytes of the segments on disk.
    pub segment_bytes: u64,
    /// Segments, and so open files.
    pub segments: u64,
    /// Live buckets.
    pub buckets: u64,
    /// Bytes of filters and page indexes in memory now.
    pub pinned_bytes: u64,
    /// Keys that no generation holds yet.
    pub pending_keys: u64,
}

/// A generation whose segments are open.
#[derive(Debug)]
struct Generation {
    manifest: Manifest,
    /// Oldest first, as in the manifest.
    segments: Vec<Arc<Segment>>,
    /// Places (segment, section) of every live bucket, newest segment first.
    sections: BTreeMap<Bucket, Vec<(usize, usize)>>,
}

impl Generation {
    /// # Errors
    /// [`StoreError::Corrupt`] if the sections of a bucket do not add up to what the manifest counts.
    fn new(
        manifest: Manifest,
        segments: Vec<Arc<Segment>>,
        name: Option<GenerationName>,
    ) -> Result<Self, StoreError> {
        let mut sections: BTreeMap<Bucket, Vec<(usize, usize)>> =
            manifest.buckets.iter().map(|tally| (tally.bucket(), Vec::new())).collect();
        let mut found: BTreeMap<Bucket, Tally> = BTreeMap::new();
        for (segment_index, segment) in segments.iter().enumerate().rev() {
            for (section_index, section) in segment.sections.iter().enumerate() {
                if let Some(places) = sections.get_mut(&section.bucket) {
                    places.push((segment_index, section_index));
                    found.entry(section.bucket).or_default().add_all(section.tally);
                }
            }
        }
        for bucket in &manifest.buckets {
            if found.get(&bucket.bucket()) != Some(&bucket.tally()) {
                let file = name.map(|name| name.manifest_file()).unwrap_or_default();
                let what = format!("the segments do not add up to the bucket of {}", bucket.from);
                return Err(StoreError::corrupt(file, what));
            }
        }
        Ok(Self { manifest, segments, sections })
    }
}

/// Makes the segment files of one generation.
pub(super) struct SegmentFiles<'a> {
    folder: &'a Path,
    spec: &'a StoreSpec,
    limits: Limits,
    generation: GenerationName,
    next_number: u32,
}

impl<'a> SegmentFiles<'a> {
    pub(super) fn new(
        folder: &'a Path,
        spec: &'a StoreSpec,
        limits: Limits,
        generation: GenerationName,
    ) -> Self {
        Self { folder, spec, limits, generation, next_number: 0 }
    }

    /// Begins the next segment of the generation.
    pub(super) fn begin(&mut self) -> Result<(SegmentName, SegmentWriter), StoreError> {
        let name = SegmentName { generation: self.generation, number: self.next_number };
        self.next_number += 1;
        let file = disk::create_new(self.folder, &name.to_string())?;
        Ok((name, SegmentWriter::new(file, name, self.spec, self.limits.write_bytes_max)))
    }

    /// Writes the end of a segment and opens it, which checks its frame as a later start will.
    pub(super) fn end(
        &self,
        name: SegmentName,
        writer: SegmentWriter,
        tier: u32,
    ) -> Result<Segment, StoreError> {
        let (entry, file) = writer.finish(name, tier)?;
        Segment::from_file(file, &entry, self.spec)
    }

    /// Removes a segment of this generation that was merged before any manifest named it. Left to the sweep if it
    /// fails.
    fn forget(&self, segment: &Segment) {
        if segment.entry.name.generation == self.generation {
            let path = self.folder.join(segment.entry.name.to_string());
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::debug!(file = %segment.entry.name, %error, "merged segment is left to the sweep");
            }
        }
    }
}

/// Dedup state of one job, opened at one generation.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    spec: StoreSpec,
    limits: Limits,
    current: Generation,
    prepared: Option<Generation>,
    pending: Pending,
    grid: Option<Grid>,
    pins: Pins,
    lookup: Lookup,
    broken: bool,
}

impl Store {
    /// Opens the generation that the ledger names, or an empty state if it names none, in a folder that holds one
    /// job's state and is made if it is not there. Reads and checks the manifest and the frame of every segment;
    /// pages are checked as they are read.
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
        let current = match generation {
            None => Generation::new(Manifest::empty(&spec), Vec::new(), None)?,
            Some(reference) => open_generation(folder, &spec, reference)?,
        };
        let mut pins = Pins::new(limits.pinned_bytes_max);
        pins.plan(&current.segments);
        Ok(Self {
            folder: folder.to_owned(),
            grid: current.manifest.grid(),
            pending: Pending::new(spec.repeats),
            lookup: Lookup::new(limits.window_bytes_max),
            spec,
            limits,
            current,
            prepared: None,
            pins,
            broken: false,
        })
    }

    /// Says of every key, in the order given, whether it was seen before. Of equal keys in the batch the first one
    /// wins, so the caller passes rows in the order of their places. New keys become pending: later probes see
    /// them, and [`Store::prepare`] writes them.
    ///
    /// Costs 40 bytes per key and at most one read of each page; no sync.
    ///
    /// # Errors
    /// Any [`StoreError`]; then no key became pending and the batch may be probed again or abandoned. A page that
    /// can not be read or is not intact is an error, never "not seen".
    ///
    /// # Panics
    /// If the batch holds 2^32 keys or more.
    pub fn probe(&mut self, keys: &[Key]) -> Result<Vec<Verdict>, StoreError> {
        assert!(u32::try_from(keys.len()).is_ok(), "a probe batch holds fewer than 2^32 keys");
        if self.broken {
            return Err(StoreError::Broken);
        }
        let Groups { mut probes, groups } = self.groups(keys)?;
        for group in groups.iter().filter(|group| !group.range.is_empty()) {
            let of_group = &mut probes[group.range.clone()];
            of_group.sort_unstable();
            mark_later_copies(of_group);
            self.pending.mark_found(group.bucket, of_group);
            self.mark_found_on_disk(group.bucket, of_group)?;
        }

        let mut verdicts = vec![Verdict::Duplicate; keys.len()];
        let mut new_keys = Vec::new();
        for probe in probes.iter().filter(|probe| !probe.is_found()) {
            let key = &keys[probe.index()];
            let bucket = self.ordinal(key)?;
            self.pending.table.note(bucket, key.event_time);
            new_keys.push(Entry { fingerprint: key.fingerprint, bucket });
            verdicts[probe.index()] = Verdict::New;
        }
        self.pending.push(new_keys);
        Ok(verdicts)
    }

    /// Puts keys together that are looked for in the same place: all of them, or those of each bucket.
    fn groups(&mut self, keys: &[Key]) -> Result<Groups, StoreError> {
        if let (None, Some(largest)) = (self.grid, keys.iter().map(|key| key.event_time).max()) {
            self.grid = Some(Grid::below(largest, self.probed().manifest.bucket_width_ms));
        }
        let complete_since = self.probed().manifest.complete_since;
        if let Some(early) = keys.iter().find(|key| key.event_time < complete_since) {
            return Err(StoreError::BeforeComplete { event_time: early.event_time, complete_since });
        }
        let probe = |(index, key): (usize, &Key)| Probe::new(key.fingerprint.value(), index as u32);
        match self.spec.repeats {
            Repeats::AnyTime => {
                let probes: Vec<Probe> = keys.iter().enumerate().map(probe).collect();
                let groups = vec![Group { bucket: 0, range: 0..probes.len() }];
                Ok(Groups { probes, groups })
            }
            Repeats::SameTime => {
                let buckets = keys.iter().map(|key| self.ordinal(key)).collect::<Result<Vec<_>, _>>()?;
                let mut groups = Vec::new();
                for bucket in &buckets {
                    let bucket_index = *bucket as usize;
                    while groups.len() <= bucket_index {
                        groups.push(Group { bucket: groups.len() as u32, range: 0..0 });
                    }
                    groups[bucket_index].range.end += 1;
                }
                let mut begin = 0;
                for group in &mut groups {
                    let keys_of_group = group.range.end;
                    // The end grows again as the probes are put in their places.
                    group.range = begin..begin;
                    begin += keys_of_group;
                }
                let mut probes = vec![Probe::new(0, 0); keys.len()];
                for (index, bucket) in buckets.iter().enumerate() {
                    let end = &mut groups[*bucket as usize].range.end;
                    probes[*end] = probe((index, &keys[index]));
                    *end += 1;
                }
                Ok(Groups { probes, groups })
            }
        }
    }

    /// The ordinal of a key's bucket among the pending ones.
    fn ordinal(&mut self, key: &Key) -> Result<u32, StoreError> {
        let grid = self.grid.expect("the grid is set before the first key is placed");
        self.pending.table.ordinal(grid.bucket_of(key.event_time))
    }

    fn mark_found_on_disk(&mut self, bucket: u32, probes: &mut [Probe]) -> Result<(), StoreError> {
        let Self { current, prepared, pending, pins, lookup, .. } = self;
        let generation = prepared.as_ref().unwrap_or(current);
        let mut mark = |places: &[(usize, usize)]| {
            places.iter().try_for_each(|(segment_index, section_index)| {
                lookup.mark_found(&generation.segments[*segment_index], *section_index, pins, probes)
            })
        };
        match generation.manifest.repeats {
            Repeats::AnyTime => generation.sections.values().try_for_each(|places| mark(places)),
            Repeats::SameTime => {
                let places = generation.sections.get(&pending.table.bucket(bucket));
                places.map_or(Ok(()), |places| mark(places))
            }
        }
    }

    /// The generation that probes use: the prepared one, as soon as there is one.
    fn probed(&self) -> &Generation {
        self.prepared.as_ref().unwrap_or(&self.current)
    }

    /// Writes the pending keys as one segment, merges tiers that are full, and writes the manifest of the next
    /// generation; all of it is durable when this returns. The generation becomes the state when the caller's
    /// commit names it: then call [`Store::publish`], else [`Store::abandon`]. Without pending keys only a
    /// manifest is written.
    ///
    /// Costs as many bytes again as the pending keys take, and two syncs of files, one of the folder, and one per
    /// merge.
    ///
    /// # Errors
    /// Any [`StoreError`]; the files written so far are named by nobody. Abandon the batch; the name is spent.
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
        let pending = std::mem::replace(&mut self.pending, Pending::new(self.spec.repeats));
        let (generation, reference) = self.write_generation(name, pending)?;
        self.pins.plan(&generation.segments);
        self.prepared = Some(generation);
        self.broken = false;
        Ok(reference)
    }

    fn write_generation(
        &self,
        name: GenerationName,
        pending: Pending,
    ) -> Result<(Generation, GenerationRef), StoreError> {
        let mut manifest = self.current.manifest.clone();
        let mut segments = self.current.segments.clone();
        manifest.floor = self.grid.map(|grid| grid.floor());
        let mut tallies: BTreeMap<Bucket, Tally> =
            manifest.buckets.iter().map(|bucket| (bucket.bucket(), bucket.tally())).collect();
        let mut files = SegmentFiles::new(&self.folder, &self.spec, self.limits, name);

        if pending.keys() > 0 {
            let (segment_name, mut writer) = files.begin()?;
            for (bucket, tally) in pending.write(&mut writer)? {
                tallies.entry(bucket).or_default().add_all(tally);
            }
            segments.push(Arc::new(files.end(segment_name, writer, 0)?));
        }
        if tallies.len() > BUCKETS_MAX {
            return Err(StoreError::TooManyBuckets { buckets_max: BUCKETS_MAX });
        }
        manifest.buckets = tallies.iter().map(|(bucket, tally)| BucketTally::new(*bucket, *tally)).collect();
        merge_tiers(&mut files, &mut manifest, &mut segments)?;

        manifest.segments = segments.iter().map(|segment| segment.entry.clone()).collect();
        let reference = manifest.write(&self.folder, name)?;
        disk::sync_folder(&self.folder)?;
        Ok((Generation::new(manifest, segments, Some(name))?, reference))
    }

    /// Makes the prepared generation the one in use. To be called when the commit that names it has landed.
    ///
    /// # Panics
    /// If none is prepared.
    pub fn publish(&mut self) {
        let prepared = self.prepared.take();
        self.current = prepared.expect("a generation is prepared before it is published");
    }

    /// Drops pending keys and the prepared generation: nothing of this microbatch counts as seen. Files stay for
    /// [`sweep`](super::sweep).
    pub fn abandon(&mut self) {
        self.prepared = None;
        self.pending = Pending::new(self.spec.repeats);
        self.grid = self.current.manifest.grid();
        self.pins.plan(&self.current.segments);
        self.broken = false;
    }

    /// Bytes that the pending keys take at most, with the copy that [`Store::prepare`] makes. The caller ends the
    /// microbatch before they outgrow their share of the memory.
    pub fn pending_bytes(&self) -> u64 {
        self.pending.bytes()
    }

    /// Live buckets with count and digest, ascending, of the generation that probes use: after
    /// [`Store::prepare`] the prepared one.
    pub fn buckets(&self) -> &[BucketTally] {
        &self.probed().manifest.buckets
    }

    /// From this event time on the generation that probes use holds all keys. Keys before it are refused.
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

    /// Sizes of the generation that probes use.
    pub fn stats(&self) -> StoreStats {
        let generation = self.probed();
        StoreStats {
            keys: generation.manifest.buckets.iter().map(|bucket| bucket.keys).sum(),
            segment_bytes: generation.segments.iter().map(|segment| segment.entry.bytes).sum(),
            segments: generation.segments.len() as u64,
            buckets: generation.manifest.buckets.len() as u64,
            pinned_bytes: self.pins.bytes(),
            pending_keys: self.pending.keys(),
        }
    }
}

/// Probes of a batch, those of each group together.
struct Groups {
    probes: Vec<Probe>,
    groups: Vec<Group>,
}

struct Group {
    /// Ordinal of the only bucket in which the keys are looked for; 0 if they are looked for in all.
    bucket: u32,
    range: Range<usize>,
}

/// Marks every copy of a key but the first one. Probes are sorted by fingerprint, then by place.
fn mark_later_copies(probes: &mut [Probe]) {
    let mut earlier = None;
    for probe in probes {
        if earlier == Some(probe.value()) {
            probe.mark_found();
        }
        earlier = Some(probe.value());
    }
}

fn open_generation(
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

/// Merges the oldest segments of every tier that holds [`FAN_IN`] into one of the next tier.
fn merge_tiers(
    files: &mut SegmentFiles<'_>,
    manifest: &mut Manifest,
    segments: &mut Vec<Arc<Segment>>,
) -> Result<(), StoreError> {
    while let Some((tier, inputs)) = full_tier(segments) {
        let (name, mut writer) = files.begin()?;
        let live = manifest.live_buckets();
        let merged = merge(&inputs, Some(&live), &mut writer, files.limits.merge_read_bytes_max)?;
        for bucket in &mut manifest.buckets {
            if let Some(collapsed) = merged.collapsed.get(&bucket.bucket()) {
                let left = bucket.tally().less(*collapsed).unwrap_or_default();
                *bucket = BucketTally::new(bucket.bucket(), left);
            }
        }
        let is_input = |segment: &Arc<Segment>| inputs.iter().any(|input| Arc::ptr_eq(input, segment));
        let place = segments.iter().position(is_input).unwrap_or(segments.len());
        segments.retain(|segment| !is_input(segment));
        if !writer.is_empty() {
            segments.insert(place, Arc::new(files.end(name, writer, tier + 1)?));
        }
        for input in inputs {
            files.forget(&input);
        }
    }
    Ok(())
}

fn full_tier(segments: &[Arc<Segment>]) -> Option<(u32, Vec<Arc<Segment>>)> {
    let mut tiers: BTreeMap<u32, Vec<Arc<Segment>>> = BTreeMap::new();
    for segment in segments {
        let tier = tiers.entry(segment.entry.tier).or_default();
        tier.push(segment.clone());
        if tier.len() == FAN_IN {
            return Some((segment.entry.tier, std::mem::take(tier)));
        }
    }
    None
}
