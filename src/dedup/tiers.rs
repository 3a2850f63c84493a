//! Tiers: how a generation grows into the next one.
//!
//! Flow: pending keys -> one new segment of tier 0 -> merges that ended in the background take the places of their
//! inputs -> manifest -> merges of tiers that are full now begin
//!
//! A merge is a pure function of immutable segments, so it runs on a thread beside the next batches, and its outcome
//! appears with the first generation that is prepared after its end. A tier has at most one merge at a time; tiers do
//! not wait for each other, so a large merge never holds up small ones.
//!
//! Invariants
//! 1. An output takes the places of its inputs only if all of them still stand in the generation and no bucket of
//!    theirs is kept now that was not kept when the merge began. Else it is thrown away.
//! 2. An output file is durable before a manifest names it, and its pages were all read and checked on the way in.
//! 3. [`sweep`](super::generation::sweep_others) never takes the file of a merge of this process.
//!
//! What ends a merge early, and what that leaves
//! - `abandon`: nothing ends. What was merged from segments that stand stays good for the next `prepare`, also if the
//!   abandoned generation named it already; what was merged from an abandoned batch is thrown away there.
//! - The end of the process, or the drop of the store: merges in progress are cancelled and their files removed, as
//!   is what ended and was named by nobody. A crash leaves such files to the sweep. So a process that ends before its
//!   merges do makes no progress with them, until the wait below makes it.
//! - A full disk: the output is thrown away and tried again [`RETRY_PREPARES`] generations later. Other errors, such as
//!   an input that is corrupt, are the outcome of the next `prepare`.
//!
//! Bounds. A merge starts when a tier holds [`FAN_IN`] segments, at open already, and `prepare` waits for it, at full
//! speed, only when the tier would else hold more than [`TIER_SEGMENTS_MAX`]: hence at most 15 segments per tier,
//! whatever the rate, and also over processes that each live for one batch. Memory: each merge in progress has the read
//! share of the store's memory, the blocks that `merge.rs` states and a writer's buffers (4 MiB at the most). Disk: at
//! most half of a segment is dead before it is written again; what was merged and its inputs stand side by side until no
//! kept generation names the inputs, so with three of them kept, and a sweep after each commit, disk stays within three
//! times the live segments.

mod background;
mod pace;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use super::bucket::{Bucket, BucketTally, Grid, Tally};
use super::filter::FilterEffort;
use super::generation::{GenerationName, GenerationRef, Manifest};
use super::merge::FAN_IN;
use super::pending::Pending;
use super::segment::{Section, Segment, SegmentName, SegmentWriter};
use super::store::Generation;
use super::window::Window;
use super::{BUCKETS_MAX, Limits, StoreError, StoreSpec, disk};
use crate::job::Repeats;
use crate::mutant;

pub(super) use background::Merges;

/// Most segments of a tier in a prepared generation.
pub(super) const TIER_SEGMENTS_MAX: usize = 2 * FAN_IN - 1;
/// Generations that are prepared without it before a merge is tried again for which there was no space: trying costs
/// as much disk again, which the batches may need.
const RETRY_PREPARES: u64 = 4;
/// Files of earlier lives that one generation name can have left behind, more than any real number.
const NUMBERS_MAX: u32 = 100_000;

/// Makes segment files.
#[derive(Debug, Clone)]
pub(super) struct SegmentFiles {
    pub(super) folder: PathBuf,
    pub(super) spec: StoreSpec,
    pub(super) limits: Limits,
    /// Keys that a probe is looked for among once the segments stand ([`probed_keys`]), about: filters are sized by it.
    pub(super) state_keys: u64,
}

impl SegmentFiles {
    /// Begins a segment of this name.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`] if there is a file of this name.
    pub(super) fn begin(&self, name: SegmentName, effort: FilterEffort) -> Result<SegmentWriter, StoreError> {
        let file = disk::create_new(&self.folder, &name.to_string())?;
        Ok(SegmentWriter::new(file, name, &self.spec, self.limits.write_bytes_max, self.state_keys, effort))
    }

    /// Begins a segment under the first number of a generation, from 1 on, that no file has.
    pub(super) fn begin_numbered(
        &self,
        generation: GenerationName,
    ) -> Result<(SegmentName, SegmentWriter), StoreError> {
        let effort = FilterEffort::of_lasting(self.state_keys, self.limits.pinned_bytes_max);
        let mut number = 1;
        loop {
            let name = SegmentName { generation, number };
            match self.begin(name, effort) {
                Ok(writer) => return Ok((name, writer)),
                Err(StoreError::NameTaken { .. }) if number < NUMBERS_MAX => number += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes the end of a segment and opens it, which checks its frame as a later start will.
    pub(super) fn end(
        &self,
        name: SegmentName,
        writer: SegmentWriter,
        tier: u32,
    ) -> Result<Segment, StoreError> {
        let (entry, file) = writer.finish(name, tier)?;
        Segment::from_file(file, &entry, &self.spec)
    }

    /// Removes a file that no manifest names. Left to the sweep if it fails.
    pub(super) fn remove(&self, name: SegmentName) {
        if let Err(error) = std::fs::remove_file(self.folder.join(name.to_string())) {
            tracing::debug!(file = %name, %error, "a segment that nobody names is left to the sweep");
        }
    }
}

/// Keys that a probe is looked for among, from those of each bucket: all of them, or those of its bucket.
pub(super) fn probed_keys(spec: &StoreSpec, keys_of_buckets: impl Iterator<Item = u64>) -> u64 {
    match spec.repeats {
        Repeats::AnyTime => keys_of_buckets.sum(),
        Repeats::SameTime => keys_of_buckets.max().unwrap_or_default(),
    }
}

/// The buckets whose keys a merge keeps: all that the manifest names.
fn kept_buckets(manifest: &Manifest) -> BTreeSet<Bucket> {
    manifest.named_buckets().map(BucketTally::bucket).collect()
}

/// Keys of a segment in buckets that nobody keeps.
fn dead_keys(segment: &Segment, kept: &BTreeSet<Bucket>) -> u64 {
    let is_dead = |section: &&Section| !kept.contains(&section.bucket);
    segment.sections.iter().filter(is_dead).map(|section| section.tally.keys).sum()
}

/// Bytes of a generation's segments that hold dead keys, by the share of the keys.
pub(super) fn dead_bytes(generation: &Generation) -> u64 {
    let kept = kept_buckets(&generation.manifest);
    let of_segment = |segment: &Arc<Segment>| {
        let (bytes, keys) = (u128::from(segment.entry.bytes), u128::from(segment.entry.keys.max(1)));
        (bytes * u128::from(dead_keys(segment, &kept)) / keys) as u64
    };
    generation.segments.iter().map(of_segment).sum()
}

/// Segments of one tier, oldest first.
type TierSegments = BTreeMap<u32, Vec<Arc<Segment>>>;

fn by_tier(segments: &[Arc<Segment>]) -> TierSegments {
    let mut tiers = TierSegments::new();
    for segment in segments {
        tiers.entry(segment.entry.tier).or_default().push(segment.clone());
    }
    tiers
}

/// What is to be merged, and into which tier.
#[derive(Debug)]
struct Plan {
    /// Tier of the inputs.
    tier: u32,
    tier_of_output: u32,
    inputs: Vec<Arc<Segment>>,
}

impl Plan {
    /// Keys of all inputs.
    fn keys(&self) -> u64 {
        self.inputs.iter().map(|input| input.entry.keys).sum()
    }

    /// What a tier needs: the oldest segments merged into the next tier if it is full, else the first segment that is
    /// mostly dead written again without its dead sections; `None` if it needs nothing.
    fn of_tier(tier: u32, segments: &[Arc<Segment>], kept: &BTreeSet<Bucket>) -> Option<Self> {
        if segments.len() >= FAN_IN {
            return Some(Self { tier, tier_of_output: tier + 1, inputs: segments[..FAN_IN].to_vec() });
        }
        // One that is dead as a whole goes without a merge.
        let is_mostly_dead = |segment: &&Arc<Segment>| {
            let dead = dead_keys(segment, kept);
            dead > segment.entry.keys / 2 && dead < segment.entry.keys
        };
        let segment = segments.iter().find(is_mostly_dead)?;
        Some(Self { tier, tier_of_output: tier, inputs: vec![segment.clone()] })
    }
}

/// A generation that is being made.
#[derive(Debug)]
struct Draft {
    manifest: Manifest,
    /// Oldest first.
    segments: Vec<Arc<Segment>>,
}

impl Draft {
    fn holds(&self, name: SegmentName) -> bool {
        self.segments.iter().any(|segment| segment.entry.name == name)
    }

    /// Puts the output of a merge into the place of its oldest input. Copies that collapsed are taken off the
    /// manifest's count.
    fn replace(
        &mut self,
        inputs: &[Arc<Segment>],
        output: Option<&Arc<Segment>>,
        collapsed: &BTreeMap<Bucket, Tally>,
    ) {
        let is_input =
            |segment: &Arc<Segment>| inputs.iter().any(|input| input.entry.name == segment.entry.name);
        let place = self.segments.iter().position(is_input).unwrap_or(self.segments.len());
        self.segments.retain(|segment| !is_input(segment));
        if let Some(output) = output {
            self.segments.insert(place, output.clone());
        }
        for bucket in self.manifest.expired.iter_mut().chain(&mut self.manifest.buckets) {
            if let Some(collapsed) = collapsed.get(&bucket.bucket()) {
                let left = bucket.tally().less(*collapsed).unwrap_or_default();
                *bucket = BucketTally::new(bucket.bucket(), left);
            }
        }
    }

    /// Segments without a section that anyone keeps need no merge to go.
    fn drop_dead_segments(&mut self) {
        let kept = kept_buckets(&self.manifest);
        self.segments.retain(|segment| segment.sections.iter().any(|section| kept.contains(&section.bucket)));
    }

    /// The lowest tier with more segments than a generation may have.
    fn overfull_tier(&self) -> Option<u32> {
        let tiers = by_tier(&self.segments);
        tiers.into_iter().find(|(_, segments)| segments.len() > TIER_SEGMENTS_MAX).map(|(tier, _)| tier)
    }
}

/// Writes the pending keys as one segment, takes what was merged, waits for a merge only if a tier would outgrow its
/// bound, writes the manifest, and starts the merges that are due; all but those is durable when this returns.
pub(super) fn write_generation(
    merges: &mut Merges,
    before: &Generation,
    grid: Option<Grid>,
    name: GenerationName,
    pending: Pending,
    window: &Window,
) -> Result<(Generation, GenerationRef), StoreError> {
    let mut draft = Draft { manifest: before.manifest.clone(), segments: before.segments.clone() };
    draft.manifest.floor = grid.map(|grid| grid.floor());
    let mut tallies = draft.manifest.tallies();
    let keys_before = probed_keys(&merges.files().spec, tallies.values().map(|tally| tally.keys));
    merges.begin_generation(keys_before, pending.keys());
    window.write_adopted(merges.files(), name, &mut draft.segments, &mut tallies, grid)?;
    add_batch(merges, &mut draft.segments, &mut tallies, name, pending)?;
    if tallies.len() > BUCKETS_MAX {
        return Err(StoreError::TooManyBuckets { buckets_max: BUCKETS_MAX });
    }
    crate::crash_point!("generation_drafted");
    window.advance(&mut draft.manifest, &mut draft.segments, tallies);
    merges.settle(&mut draft, name)?;
    draft.drop_dead_segments();

    let Draft { mut manifest, segments } = draft;
    manifest.segments = segments.iter().map(|segment| segment.entry.clone()).collect();
    let reference = manifest.write(&merges.files().folder, name)?;
    mutant!("skip-state-folder-sync", () => disk::sync_folder(&merges.files().folder)?);
    crate::crash_point!("generation_durable");
    let generation = Generation::new(manifest, segments, Some(name))?;
    merges.start_due(&generation);
    Ok((generation, reference))
}

/// Writes the batch's own segment, if it has keys, and counts them in their buckets.
fn add_batch(
    merges: &mut Merges,
    segments: &mut Vec<Arc<Segment>>,
    tallies: &mut BTreeMap<Bucket, Tally>,
    generation: GenerationName,
    pending: Pending,
) -> Result<(), StoreError> {
    if pending.keys() == 0 {
        return Ok(());
    }
    let name = SegmentName { generation, number: 0 };
    let mut writer = merges.files().begin(name, FilterEffort::Quick)?;
    crate::crash_point!("batch_segment_created");
    for (bucket, tally) in pending.write(&mut writer)? {
        tallies.entry(bucket).or_default().add_all(tally);
    }
    crate::crash_point!("batch_segment_filled");
    let segment = merges.files().end(name, writer, 0)?;
    crate::crash_point!("batch_segment_durable");
    merges.note_batch_segment(&segment);
    segments.push(Arc::new(segment));
    Ok(())
}
