//! Merges on threads of their own: started, waited for, taken over, thrown away.
//!
//! A merge is one [`Job`], from its start to the publication of a generation that names its output:
//!
//! `start` -> running -> `collect` -> merged -> `adopt` -> adopted -> `published`, or `abandoned` -> merged again
//!
//! Bounds: one job per tier that is not yet adopted, and one thread per running job.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::mem;
use std::panic;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use super::pace::{IngestRate, Pace};
use super::{Draft, Plan, RETRY_PREPARES, SegmentFiles, by_tier, kept_buckets};
use crate::dedup::StoreError;
use crate::dedup::bucket::{Bucket, Tally};
use crate::dedup::generation::GenerationName;
use crate::dedup::merge::merge;
use crate::dedup::segment::{Segment, SegmentName, SegmentWriter};
use crate::dedup::store::Generation;

/// What was written so far, and what was waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::dedup) struct WriteStats {
    /// Merges whose output entered a generation.
    pub(in crate::dedup) merges: u64,
    /// Merges that were given up for want of space.
    pub(in crate::dedup) merges_failed: u64,
    pub(in crate::dedup) merge_waits: u64,
    pub(in crate::dedup) merge_wait_ms: u64,
    /// Of the segments of batches.
    pub(in crate::dedup) segment_bytes_written: u64,
    /// Of merges, also of those that were thrown away.
    pub(in crate::dedup) merge_bytes_written: u64,
}

/// All merges of a store.
#[derive(Debug)]
pub(in crate::dedup) struct Merges {
    files: SegmentFiles,
    jobs: Vec<Job>,
    rate: IngestRate,
    /// Generations that were begun to be prepared.
    prepares: u64,
    /// From which of them on a tier is tried again that found no space.
    retry_at: BTreeMap<u32, u64>,
    /// Why a merge could not be started, until the next generation is prepared.
    failed: Option<StoreError>,
    /// Files that this store made and needs no more, as far as no sweep removed them.
    retired_files: u64,
    stats: WriteStats,
    #[cfg(test)]
    disk_is_full: bool,
}

#[derive(Debug)]
struct Job {
    plan: Plan,
    /// Buckets that were kept when it began.
    kept: BTreeSet<Bucket>,
    output: SegmentName,
    pace: Arc<Pace>,
    phase: Phase,
    /// Whether its output stands in the generation that is prepared.
    is_adopted: bool,
    /// Whether a manifest file may name its output.
    is_named: bool,
}

#[derive(Debug)]
enum Phase {
    Running(JoinHandle<Ended>),
    Merged(Output),
    /// Between two phases, or thrown away.
    Over,
}

/// How a thread ended.
#[derive(Debug)]
struct Ended {
    /// `None` if it was cancelled; without an output there is no file.
    output: Result<Option<Output>, StoreError>,
    bytes_written: u64,
}

#[derive(Debug)]
struct Output {
    /// `None` if nothing was to be kept.
    segment: Option<Arc<Segment>>,
    collapsed: BTreeMap<Bucket, Tally>,
}

impl Job {
    /// Whether its output can take the places of its inputs.
    fn fits(&self, draft: &Draft) -> bool {
        let stands = self.plan.inputs.iter().all(|input| draft.holds(input.entry.name));
        let now_kept = kept_buckets(&draft.manifest);
        let mut sections = self.plan.inputs.iter().flat_map(|input| &input.sections);
        stands
            && sections
                .all(|section| !now_kept.contains(&section.bucket) || self.kept.contains(&section.bucket))
    }

    /// Waits for the end of the thread and takes what it made.
    fn join(&mut self) -> Option<Ended> {
        match mem::replace(&mut self.phase, Phase::Over) {
            Phase::Running(thread) => match thread.join() {
                Ok(ended) => Some(ended),
                Err(panicked) => panic::resume_unwind(panicked),
            },
            other => {
                self.phase = other;
                None
            }
        }
    }

    fn is_merged(&self) -> bool {
        matches!(self.phase, Phase::Merged(_))
    }

    /// Whether the tier is busy with it.
    fn is_open_of(&self, tier: u32) -> bool {
        self.plan.tier == tier && !self.is_adopted
    }
}

impl Merges {
    pub(in crate::dedup) fn new(files: SegmentFiles) -> Self {
        Self {
            files,
            jobs: Vec::new(),
            rate: IngestRate::default(),
            prepares: 0,
            retry_at: BTreeMap::new(),
            failed: None,
            retired_files: 0,
            stats: WriteStats::default(),
            #[cfg(test)]
            disk_is_full: false,
        }
    }

    pub(super) fn files(&self) -> &SegmentFiles {
        &self.files
    }

    pub(in crate::dedup) fn stats(&self) -> WriteStats {
        self.stats
    }

    /// Names of files that no generation needs to name and that are needed nevertheless.
    pub(in crate::dedup) fn file_names(&self) -> BTreeSet<String> {
        self.jobs.iter().map(|job| job.output.to_string()).collect()
    }

    /// See [`Store::retired_files`](crate::dedup::Store::retired_files).
    pub(in crate::dedup) fn retired_files(&self) -> u64 {
        self.retired_files
    }

    /// Notes that a sweep removed so many files.
    pub(in crate::dedup) fn swept(&mut self, files: u64) {
        self.retired_files = self.retired_files.saturating_sub(files);
    }

    pub(super) fn note_batch_segment(&mut self, segment: &Segment) {
        self.stats.segment_bytes_written += segment.entry.bytes;
    }

    /// A generation with so many new keys is about to be prepared: sets the speed of what runs.
    pub(super) fn begin_generation(&mut self, keys_before: u64, keys: u64) {
        self.files.state_keys = keys_before + keys;
        self.prepares += 1;
        self.rate.note(keys, Instant::now());
        self.set_speeds();
    }

    fn set_speeds(&self) {
        self.jobs.iter().for_each(|job| job.pace.set_speed(self.rate.merge_speed(job.plan.keys())));
    }

    /// Starts what the tiers of a generation need. Why one could not be started is said when the next generation is
    /// prepared.
    pub(in crate::dedup) fn start_due(&mut self, generation: &Generation) {
        let Some(name) = generation.name else { return };
        let kept = kept_buckets(&generation.manifest);
        for (tier, segments) in by_tier(&generation.segments) {
            let waits = self.retry_at.get(&tier).is_some_and(|retry_at| self.prepares < *retry_at);
            if waits || self.jobs.iter().any(|job| job.is_open_of(tier)) {
                continue;
            }
            if let Some(plan) = Plan::of_tier(tier, &segments, &kept)
                && let Err(error) = self.start(plan, kept.clone(), name)
                && let Err(error) = self.retry_later(tier, error)
            {
                self.failed.get_or_insert(error);
            }
        }
    }

    fn start(
        &mut self,
        plan: Plan,
        kept: BTreeSet<Bucket>,
        generation: GenerationName,
    ) -> Result<(), StoreError> {
        let (output, writer) = self.files.begin_numbered(generation)?;
        crate::crash_point!("merge_output_created");
        let pace = Arc::new(Pace::new(self.rate.merge_speed(plan.keys())));
        let work = Work {
            files: self.files.clone(),
            inputs: plan.inputs.clone(),
            tier_of_output: plan.tier_of_output,
            kept: kept.clone(),
            output,
            pace: pace.clone(),
            #[cfg(test)]
            disk_is_full: self.disk_is_full,
        };
        let named = thread::Builder::new().name(format!("dedup-merge-{}", plan.tier));
        let thread = named.spawn(move || work.run(writer)).map_err(|error| {
            self.files.remove(output);
            StoreError::io("start a merge into", output, error)
        })?;
        let phase = Phase::Running(thread);
        self.jobs.push(Job { plan, kept, output, pace, phase, is_adopted: false, is_named: false });
        Ok(())
    }

    /// Lets the merges that ended enter a generation that is being made, throws away what fits it no more, and waits
    /// for a merge as long as a tier has too many segments.
    pub(super) fn settle(&mut self, draft: &mut Draft, generation: GenerationName) -> Result<(), StoreError> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        loop {
            self.collect()?;
            self.adopt(draft);
            self.discard_unfit(draft);
            let Some(tier) = draft.overfull_tier() else { return Ok(()) };
            self.wait_for(tier, draft, generation)?;
        }
    }

    /// Takes what ended threads made.
    fn collect(&mut self) -> Result<(), StoreError> {
        let mut outcome = Ok(());
        for mut job in mem::take(&mut self.jobs) {
            if let Phase::Running(thread) = &job.phase
                && thread.is_finished()
                && let Some(ended) = job.join()
            {
                let tier = job.plan.tier;
                if let Err(error) = self.take(job, ended)
                    && let Err(error) = self.retry_later(tier, error)
                {
                    outcome = outcome.and(Err(error));
                }
            } else {
                self.jobs.push(job);
            }
        }
        outcome
    }

    /// Keeps a job with what its thread made, or drops it if that is nothing.
    fn take(&mut self, mut job: Job, ended: Ended) -> Result<(), StoreError> {
        self.stats.merge_bytes_written += ended.bytes_written;
        if let Some(output) = ended.output? {
            job.phase = Phase::Merged(output);
            self.jobs.push(job);
        }
        Ok(())
    }

    /// A merge that found no space is tried again later; other errors are given back.
    fn retry_later(&mut self, tier: u32, error: StoreError) -> Result<(), StoreError> {
        if !is_no_space(&error) {
            return Err(error);
        }
        tracing::warn!(%error, tier, "no space to merge dedup segments; it is tried again later");
        self.stats.merges_failed += 1;
        self.retry_at.insert(tier, self.prepares + RETRY_PREPARES);
        Ok(())
    }

    /// Puts outputs into the places of their inputs, until none fits any more.
    fn adopt(&mut self, draft: &mut Draft) {
        while let Some(job) =
            self.jobs.iter_mut().find(|job| !job.is_adopted && job.is_merged() && job.fits(draft))
        {
            if let Phase::Merged(output) = &job.phase {
                draft.replace(&job.plan.inputs, output.segment.as_ref(), &output.collapsed);
            }
            (job.is_adopted, job.is_named) = (true, true);
            crate::crash_point!("merge_adopted");
        }
    }

    /// Cancels and throws away jobs whose output can never enter this generation or one after it.
    fn discard_unfit(&mut self, draft: &Draft) {
        let (left, unfit) =
            mem::take(&mut self.jobs).into_iter().partition(|job| job.is_adopted || job.fits(draft));
        self.jobs = left;
        self.discard(unfit);
    }

    fn discard(&mut self, jobs: Vec<Job>) {
        jobs.iter().for_each(|job| job.pace.cancel());
        for mut job in jobs {
            if let Some(ended) = job.join() {
                self.stats.merge_bytes_written += ended.bytes_written;
                if let Ok(Some(output)) = ended.output {
                    job.phase = Phase::Merged(output);
                }
            }
            let has_file = matches!(&job.phase, Phase::Merged(output) if output.segment.is_some());
            if has_file && job.is_named {
                self.retired_files += 1;
            } else if has_file {
                self.files.remove(job.output);
            }
        }
    }

    /// Waits for the merge of a tier, at full speed; starts it first if there is none.
    fn wait_for(&mut self, tier: u32, draft: &Draft, generation: GenerationName) -> Result<(), StoreError> {
        let begin = Instant::now();
        if !self.jobs.iter().any(|job| job.is_open_of(tier)) {
            let kept = kept_buckets(&draft.manifest);
            let segments = by_tier(&draft.segments).remove(&tier).unwrap_or_default();
            if let Some(plan) = Plan::of_tier(tier, &segments, &kept) {
                self.start(plan, kept, generation)?;
            }
        }
        let place = self.jobs.iter().position(|job| job.is_open_of(tier));
        let mut job = self.jobs.remove(place.expect("a tier that is overfull has a merge"));
        job.pace.hurry();
        let outcome = match job.join() {
            Some(ended) => self.take(job, ended),
            None => {
                self.jobs.push(job);
                Ok(())
            }
        };
        self.stats.merge_waits += 1;
        self.stats.merge_wait_ms += begin.elapsed().as_millis() as u64;
        outcome
    }

    /// The prepared generation is the one in use now: the inputs of what it adopted are needed no more.
    pub(in crate::dedup) fn published(&mut self) {
        // The manifest of the generation before.
        self.retired_files += 1;
        for job in self.jobs.extract_if(.., |job| job.is_adopted) {
            self.stats.merges += 1;
            self.retired_files += job.plan.inputs.len() as u64;
        }
    }

    /// The prepared generation is gone: what it adopted can enter the next one.
    pub(in crate::dedup) fn abandoned(&mut self) {
        // Its manifest and its segment.
        self.retired_files += 2;
        self.jobs.iter_mut().for_each(|job| job.is_adopted = false);
    }

    /// Waits for all merges that run, so that a test knows what the next generation adopts.
    #[cfg(test)]
    pub(in crate::dedup) fn finish(&mut self) {
        for job in &mut self.jobs {
            job.pace.hurry();
            while matches!(&job.phase, Phase::Running(thread) if !thread.is_finished()) {
                thread::yield_now();
            }
        }
    }

    #[cfg(test)]
    pub(in crate::dedup) fn set_disk_full(&mut self, is_full: bool) {
        self.disk_is_full = is_full;
    }

    /// Lets merges run so slowly that a test finds them running.
    #[cfg(test)]
    pub(in crate::dedup) fn hold(&mut self) {
        self.rate.hold();
        self.set_speeds();
    }
}

impl Drop for Merges {
    /// Cancels what runs and removes what no manifest names. An output that one names stays, also if the store does
    /// not know whether that generation was committed.
    fn drop(&mut self) {
        self.jobs.iter().for_each(|job| job.pace.cancel());
        // A panic is not made worse by waiting; a thread that was cancelled removes its file itself.
        if !thread::panicking() {
            let jobs = mem::take(&mut self.jobs);
            self.discard(jobs);
        }
    }
}

/// Whether an error only says that there is no space.
fn is_no_space(error: &StoreError) -> bool {
    let kinds = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
    matches!(error, StoreError::Io { source, .. } if kinds.contains(&source.kind()))
}

/// What a thread has.
struct Work {
    files: SegmentFiles,
    inputs: Vec<Arc<Segment>>,
    tier_of_output: u32,
    kept: BTreeSet<Bucket>,
    output: SegmentName,
    pace: Arc<Pace>,
    #[cfg(test)]
    disk_is_full: bool,
}

impl Work {
    /// Merges; leaves a file only if it is the output.
    fn run(self, writer: SegmentWriter) -> Ended {
        crate::crash_point!("merge_runs");
        let output = self.merge(writer);
        crate::crash_point!("merge_ended");
        let path = self.files.folder.join(self.output.to_string());
        let bytes_written = fs::metadata(path).map_or(0, |file| file.len());
        if !matches!(&output, Ok(Some(Output { segment: Some(_), .. }))) {
            self.files.remove(self.output);
        }
        Ended { output, bytes_written }
    }

    fn merge(&self, mut writer: SegmentWriter) -> Result<Option<Output>, StoreError> {
        let read_bytes_max = self.files.limits.merge_read_bytes_max;
        let mut pace = |keys| self.pace.pass(keys);
        #[cfg(test)]
        if self.disk_is_full {
            return Err(StoreError::io("write", self.output, io::ErrorKind::StorageFull.into()));
        }
        let merged = merge(&self.inputs, Some(&self.kept), &mut writer, read_bytes_max, &mut pace)?;
        let Some(merged) = merged else { return Ok(None) };
        let segment = if writer.is_empty() {
            None
        } else {
            crate::crash_point!("merge_output_filled");
            let segment = self.files.end(self.output, writer, self.tier_of_output)?;
            segment.forget_cached();
            Some(Arc::new(segment))
        };
        Ok(Some(Output { segment, collapsed: merged.collapsed }))
    }
}
