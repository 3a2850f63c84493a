//! The window: which buckets a state answers for, and what becomes of those that it no longer answers for.
//!
//! Flow of a bucket: live -> its end falls behind the cutoff: expired, in its grace -> behind the grace: gone
//!
//! - *Live* buckets are probed. Together they hold every key of our rows from `complete_since` on.
//! - A bucket *in its grace* stands on disk, whole, and is not probed, unless a key of it comes: then it is probed
//!   until the end of the microbatch, and what is new in it is written to it. A watermark that was pushed by mistake
//!   and is set back finds its buckets here, so it costs no read of the tables.
//! - A bucket that is *gone* is in no manifest. A key of it can not be proven new by the state alone: the caller reads
//!   the bucket from the tables into a [`Loan`], which is probed until the end of the microbatch, or longer if a backfill
//!   goes on in it ([`Store::keep_loans`]). New keys in it go to the table and not into the state, which would not be whole
//!   without the others; a loan that is kept takes them too, so that it stays what the tables hold.
//!
//! Widening is a loan that stays: with [`Store::adopt`] its buckets become live in the next generation.
//!
//! Invariants
//! 1. Every bucket that ends after `complete_since` is live; every expired one ends at or before it.
//! 2. A key is answered only if its bucket is live, in its grace, or lent. Any other is refused by
//!    [`StoreError::BeforeComplete`].
//! 3. Loans and expiry are of one microbatch: [`Store::prepare`] ends them, but for loans that are kept, and
//!    [`Store::abandon`] ends them all. Loans are taken while no generation is prepared, because a batch in flight is not
//!    yet in the tables that a loan is read from.
//! 4. Boundaries of buckets that a manifest names never move; see `bucket.rs` for how a width changes.
//!
//! Durable steps: none of its own. Runs of loans are files without a name, so they vanish with the process. Adopted
//! keys are written by [`Store::prepare`], in its order.
//!
//! Bounds: 100 bytes per bucket. A loan: the builder's bounds while it is loaded or takes keys, then at most
//! [`LOAN_RUNS_MAX`] open files and what their segments take; about 10 bytes of disk per key. [`LOANS_KEPT_MAX`] loans are
//! kept; one that is let go early is read from the tables again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::bucket::{Bucket, BucketTally, ERAS_MAX, Era, Grid, Tally};
use super::builder::Builder;
use super::generation::{GenerationName, Manifest};
use super::pending::Pending;
use super::segment::{Section, SectionScan, Segment};
use super::store::{Generation, Store};
use super::tiers::SegmentFiles;
use super::{Key, StoreError, TRANSFER_BYTES_MAX};
use crate::event_time::EventTimeMs;
use crate::fingerprint::Fingerprint;
use crate::mutant;

/// The grace is this part of the window, and at least one bucket: long enough that a person who sees a watermark run
/// away can set it back before a byte is lost, and short enough that disk stays near what is live.
const GRACE_PARTS: i64 = 8;

/// Most loans that are kept from one microbatch to the next.
const LOANS_KEPT_MAX: usize = 16;
/// Most runs of a loan that is kept: each microbatch that has new keys for it adds one, and then they become one.
const LOAN_RUNS_MAX: usize = 8;

/// What leaves the window with the next generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Expiry {
    /// Buckets that end here or before expire.
    cutoff: EventTimeMs,
    /// Expired buckets that end here or before are gone.
    grace_end: EventTimeMs,
}

/// What a microbatch holds beside its generation: loans, and what expires with it.
#[derive(Debug, Default)]
pub(super) struct Window {
    expiry: Option<Expiry>,
    loans: Vec<Loan>,
    /// Buckets in their grace that are probed.
    recalled: BTreeSet<Bucket>,
    /// The loan that stays, and from when on the state is complete with it.
    adopted: Option<(Loan, EventTimeMs)>,
    /// Loans with a bucket that ends after this are kept when the microbatch ends; `None` = none.
    keep_after: Option<EventTimeMs>,
}

/// Keys of slices of event time that the state does not hold, as the tables have them.
#[derive(Debug, Clone)]
pub struct Loan {
    /// Ascending, apart.
    slices: Vec<Bucket>,
    runs: Vec<Arc<Segment>>,
    keys: u64,
    memory_bytes: u64,
}

/// Takes the keys of a loan, in any order.
#[derive(Debug)]
pub struct LoanBuilder {
    slices: Vec<Bucket>,
    builder: Builder,
    memory_bytes: u64,
}

impl LoanBuilder {
    /// Takes keys of table rows, in any order, repeats included. Keys outside the slices of the loan are passed over.
    ///
    /// # Errors
    /// Any [`StoreError`]; the loan is to be begun again.
    pub fn add(&mut self, keys: &[Key]) -> Result<(), StoreError> {
        let wanted: Vec<Key> =
            keys.iter().filter(|key| slice_at(&self.slices, key.event_time).is_some()).copied().collect();
        self.builder.add(&wanted)
    }

    /// Ends the loading.
    ///
    /// # Errors
    /// Any [`StoreError`]; the loan is to be begun again.
    pub fn finish(self) -> Result<Loan, StoreError> {
        let run = self.builder.into_run()?;
        let keys = run.as_ref().map_or(0, |run| run.entry.keys);
        Ok(Loan {
            slices: self.slices,
            runs: run.into_iter().collect(),
            keys,
            memory_bytes: self.memory_bytes,
        })
    }
}

/// The one of the ascending slices that holds a time.
pub(crate) fn slice_at(slices: &[Bucket], time: EventTimeMs) -> Option<Bucket> {
    let after = slices.partition_point(|slice| slice.from <= time);
    slices[..after].last().copied().filter(|slice| slice.holds(time))
}

impl Loan {
    /// Keys in it.
    pub fn keys(&self) -> u64 {
        self.keys
    }

    fn covers(&self, bucket: Bucket) -> bool {
        slice_at(&self.slices, bucket.from).is_some_and(|slice| slice.covers(bucket))
    }

    /// Takes keys that are new in it, as a run of their own, or all its runs as one if there are too many.
    fn take(&mut self, keys: &[Key], mut builder: Builder) -> Result<(), StoreError> {
        builder.add(keys)?;
        if self.runs.len() >= LOAN_RUNS_MAX {
            for (run, section_index) in self.sections(None) {
                let section = &run.sections[section_index];
                let mut scan = SectionScan::new(&run, section, TRANSFER_BYTES_MAX as usize);
                while let Some(value) = scan.next()? {
                    builder.add(&[section.bucket.key(Fingerprint::from_value(value))])?;
                }
            }
            self.runs.clear();
        }
        self.runs.extend(builder.into_run()?);
        self.keys += keys.len() as u64;
        Ok(())
    }

    /// Sections of one bucket, or all.
    fn sections(&self, bucket: Option<Bucket>) -> impl Iterator<Item = (Arc<Segment>, usize)> {
        self.runs.iter().flat_map(move |run| {
            let wanted = run.sections.iter().enumerate();
            wanted
                .filter(move |(_, section)| bucket.is_none_or(|bucket| bucket == section.bucket))
                .map(|(section_index, _)| (run.clone(), section_index))
        })
    }
}

impl Window {
    fn all_loans(&self) -> impl Iterator<Item = &Loan> {
        self.loans.iter().chain(self.adopted.iter().map(|(loan, _)| loan))
    }

    fn lends(&self, bucket: Bucket) -> bool {
        self.all_loans().any(|loan| loan.covers(bucket))
    }

    /// The sections that keys of a bucket are looked for in, or those of all buckets that are live or lent, newest bucket
    /// first.
    pub(super) fn sections(
        &self,
        generation: &Generation,
        bucket: Option<Bucket>,
    ) -> Vec<(Arc<Segment>, usize)> {
        let place = |(segment_index, section_index): &(usize, usize)| {
            (generation.segments[*segment_index].clone(), *section_index)
        };
        let on_disk: Vec<&Vec<(usize, usize)>> = match bucket {
            None => {
                let recalled =
                    self.recalled.iter().rev().filter_map(|bucket| generation.grace_sections.get(bucket));
                generation.sections.values().rev().chain(recalled).collect()
            }
            Some(bucket) => {
                let live = generation.sections.get(&bucket);
                live.or_else(|| generation.grace_sections.get(&bucket)).into_iter().collect()
            }
        };
        let lent = self.all_loans().flat_map(|loan| loan.sections(bucket));
        on_disk.into_iter().flatten().map(place).chain(lent).collect()
    }

    /// The window of the next microbatch: the loans that are kept, with the pending keys of their buckets.
    pub(super) fn next(
        &self,
        pending: &Pending,
        begin: impl Fn(u64) -> Result<Builder, StoreError>,
    ) -> Result<Self, StoreError> {
        let Some(keep_after) = self.keep_after else { return Ok(Self::default()) };
        let is_kept = |loan: &Loan| loan.slices.last().is_some_and(|slice| slice.to > keep_after);
        let mut loans: Vec<Loan> = self.loans.iter().filter(|loan| is_kept(loan)).cloned().collect();
        loans.drain(..loans.len().saturating_sub(LOANS_KEPT_MAX));
        for loan in &mut loans {
            let keys = pending.keys_of(|bucket| loan.covers(bucket));
            if !keys.is_empty() {
                loan.take(&keys, begin(loan.memory_bytes)?)?;
            }
        }
        Ok(Self { loans, ..Self::default() })
    }

    /// Takes the keys of borrowed buckets out of those that a segment will hold.
    pub(super) fn drop_borrowed(&self, pending: &mut Pending) {
        if !self.loans.is_empty() {
            pending.retain(|bucket| !self.loans.iter().any(|loan| loan.covers(bucket)));
        }
    }

    /// Writes the adopted loan as a segment of the generation.
    ///
    /// Segments may still hold sections of its buckets, dead since those were gone. They come to life again with their
    /// buckets, so what they hold is not written a second time.
    pub(super) fn write_adopted(
        &self,
        files: &SegmentFiles,
        generation: GenerationName,
        segments: &mut Vec<Arc<Segment>>,
        tallies: &mut BTreeMap<Bucket, Tally>,
        grid: Option<Grid>,
    ) -> Result<(), StoreError> {
        let (Some((loan, _)), Some(grid)) = (&self.adopted, grid) else { return Ok(()) };
        let mut dead: BTreeMap<Bucket, Vec<(Arc<Segment>, usize)>> = BTreeMap::new();
        for segment in segments.iter() {
            for (section_index, section) in segment.sections.iter().enumerate() {
                // A section of an earlier width may be no bucket any more.
                if loan.covers(section.bucket) && grid.bucket_of(section.bucket.from) == section.bucket {
                    dead.entry(section.bucket).or_default().push((segment.clone(), section_index));
                }
            }
        }
        for (bucket, sections) in &dead {
            let tally = tallies.entry(*bucket).or_default();
            sections.iter().for_each(|(segment, section)| tally.add_all(segment.sections[*section].tally));
        }
        let (name, mut writer) = files.begin_numbered(generation)?;
        crate::crash_point!("adopted_segment_created");
        let read_bytes_max = files.limits.merge_read_bytes_max;
        for (run, section_index) in loan.sections(None) {
            let section = &run.sections[section_index];
            let held = dead.get(&section.bucket).map_or([].as_slice(), Vec::as_slice);
            let mut keys = 0;
            for_each_not_held(&run, section, held, read_bytes_max, |_| {
                keys += 1;
                Ok(())
            })?;
            if keys == 0 {
                continue;
            }
            let event_times = (section.event_time_min, section.event_time_max);
            let mut section_writer = writer.section(section.bucket, event_times, keys);
            for_each_not_held(&run, section, held, read_bytes_max, |value| {
                section_writer.push_all(&[value])
            })?;
            tallies.entry(section.bucket).or_default().add_all(section_writer.finish()?);
        }
        if writer.is_empty() {
            files.remove(name);
        } else {
            segments.push(Arc::new(files.end(name, writer, 0)?));
        }
        crate::crash_point!("adopted_segment_durable");
        Ok(())
    }

    /// Sorts the buckets of the next generation into live, expired and gone, and lets go of segments that hold none of
    /// the first two.
    pub(super) fn advance(
        &self,
        manifest: &mut Manifest,
        segments: &mut Vec<Arc<Segment>>,
        mut tallies: BTreeMap<Bucket, Tally>,
    ) {
        if let Some((_, complete_since)) = self.adopted {
            manifest.complete_since = complete_since;
        }
        let before = manifest.complete_since;
        if let Some(expiry) = self.expiry {
            let end =
                |bucket: &Bucket| mutant!("bucket-expires-with-its-first-key", bucket.from => bucket.to);
            let expiring = tallies.keys().filter(|bucket| end(bucket) <= expiry.cutoff);
            manifest.complete_since = expiring.map(|bucket| bucket.to).fold(before, EventTimeMs::max);
            tallies.retain(|bucket, _| bucket.to > manifest.complete_since || bucket.to > expiry.grace_end);
        }
        (manifest.expired, manifest.buckets) = tallies
            .iter()
            .map(|(bucket, tally)| BucketTally::new(*bucket, *tally))
            .partition(|bucket| bucket.to <= manifest.complete_since);
        let oldest = manifest
            .expired
            .first()
            .map_or(manifest.complete_since, |bucket| bucket.from.min(manifest.complete_since));
        // The era's end also begins the first bucket after it.
        manifest.eras.retain(|era| era.until >= oldest);
        segments
            .retain(|segment| segment.sections.iter().any(|section| tallies.contains_key(&section.bucket)));
        if manifest.complete_since > before {
            let newly = manifest.expired.iter().filter(|bucket| bucket.to > before);
            let (buckets, keys) = newly.fold((0, 0), |(count, keys), bucket| (count + 1, keys + bucket.keys));
            tracing::info!(buckets, keys, complete_since = %manifest.complete_since, "buckets expired");
        }
    }
}

/// Walks the keys of a section that none of the other sections holds, in order.
fn for_each_not_held(
    segment: &Segment,
    section: &Section,
    held: &[(Arc<Segment>, usize)],
    read_bytes_max: usize,
    mut take: impl FnMut(u128) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut scan = SectionScan::new(segment, section, read_bytes_max);
    let mut others = Vec::with_capacity(held.len());
    for (other, section_index) in held {
        let mut other_scan = SectionScan::new(other, &other.sections[*section_index], read_bytes_max);
        let head = other_scan.next()?;
        others.push((other_scan, head));
    }
    while let Some(value) = scan.next()? {
        let mut is_held = false;
        for (other_scan, head) in &mut others {
            while head.is_some_and(|head| head < value) {
                *head = other_scan.next()?;
            }
            is_held |= *head == Some(value);
        }
        if !is_held {
            take(value)?;
        }
    }
    Ok(())
}

/// Lets buckets that no key has touched yet have another width: those after the last one that holds a key.
pub(super) fn set_width(manifest: &mut Manifest, width_ms: i64) {
    let Some(floor) = manifest.floor else {
        manifest.bucket_width_ms = width_ms;
        return;
    };
    if manifest.bucket_width_ms == width_ms {
        return;
    }
    let ends = manifest.named_buckets().map(|bucket| bucket.to);
    let until = ends.fold(floor.max(manifest.complete_since), EventTimeMs::max);
    match manifest.eras.last() {
        // The width of the last era comes back before any key had another one.
        Some(last) if last.until == until && last.bucket_width_ms == width_ms => drop(manifest.eras.pop()),
        Some(last) if last.until == until => {}
        _ if manifest.eras.len() == ERAS_MAX => {
            tracing::info!(
                width_ms,
                "the bucket width changed too often; it stays until an earlier one has expired"
            );
            return;
        }
        _ => manifest.eras.push(Era { until, bucket_width_ms: manifest.bucket_width_ms }),
    }
    manifest.bucket_width_ms = width_ms;
}

impl Store {
    /// Lets buckets expire with the next generation that is prepared: those that end at or before `watermark` less
    /// `window`. They stay on disk for a grace of an eighth of the window, at least one bucket. Forgotten by
    /// [`Store::abandon`].
    pub fn expire_behind(&mut self, watermark: EventTimeMs, window: Duration) {
        let window_ms = i64::try_from(window.as_millis()).unwrap_or(i64::MAX);
        let cutoff = watermark.minus_ms(window_ms);
        let grace_ms = (window_ms / GRACE_PARTS).max(self.bucket_width_ms());
        self.window.expiry = Some(Expiry { cutoff, grace_end: cutoff.minus_ms(grace_ms) });
    }

    /// Buckets of these keys that are gone and not lent yet, ascending. They are to be lent before the keys are probed.
    /// Those in their grace are not among them: they are on disk.
    pub fn missing_buckets(&self, keys: &[Key]) -> Vec<Bucket> {
        let complete_since = self.complete_since();
        let early = keys.iter().filter(|key| key.event_time < complete_since);
        let buckets: BTreeSet<Bucket> = early.filter_map(|key| self.bucket_of(key.event_time)).collect();
        buckets.into_iter().filter(|bucket| !self.is_known(*bucket)).collect()
    }

    /// For each of these keys, whether its bucket is gone and not lent: the state can not tell whether such a key is new.
    pub fn are_unanswerable(&self, keys: &[Key]) -> Vec<bool> {
        let complete_since = self.complete_since();
        let is_gone = |key: &Key| {
            key.event_time < complete_since
                && self.bucket_of(key.event_time).is_some_and(|bucket| !self.is_known(bucket))
        };
        keys.iter().map(is_gone).collect()
    }

    /// Slices of event time from `since`, the begin of a bucket, to [`Store::complete_since`] that are not on disk,
    /// ascending: what a state that is to be complete from `since` on has to load.
    pub fn missing_since(&self, since: EventTimeMs) -> Vec<Bucket> {
        let mut slices = Vec::new();
        let mut from = since;
        for bucket in self.grace_buckets().iter().filter(|bucket| bucket.to > since) {
            if from < bucket.from {
                slices.push(Bucket { from, to: bucket.from });
            }
            from = bucket.to;
        }
        if from < self.complete_since() {
            slices.push(Bucket { from, to: self.complete_since() });
        }
        slices
    }

    /// Begin of the bucket that a time falls into; the time itself before the first key.
    pub fn bucket_begin(&self, time: EventTimeMs) -> EventTimeMs {
        self.bucket_of(time).map_or(time, |bucket| bucket.from)
    }

    /// Begins a loan of buckets, or of slices that begin and end with buckets, ascending and apart.
    ///
    /// Memory: `memory_bytes`, as a [`Builder`].
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn begin_loan(&self, slices: &[Bucket], memory_bytes: u64) -> Result<LoanBuilder, StoreError> {
        let builder = Builder::on_grid(&self.folder, self.spec.clone(), memory_bytes, self.grid)?;
        Ok(LoanBuilder { slices: slices.to_vec(), builder, memory_bytes })
    }

    /// Lets keys be found in a loan until the end of this microbatch.
    ///
    /// # Panics
    /// If a generation is prepared.
    pub fn borrow(&mut self, loan: Loan) {
        assert!(
            self.prepared.is_none(),
            "a loan is taken between two batches or within one, not while one commits"
        );
        self.window.loans.push(loan);
    }

    /// Keeps loans with a bucket that ends after this time when this microbatch ends, for a lane that is not past them; none
    /// without one. To be said again in every microbatch.
    pub fn keep_loans(&mut self, after: Option<EventTimeMs>) {
        self.window.keep_after = after;
    }

    /// Widens the state: with the next generation it is complete from `since` on, the begin of a bucket. The loan holds
    /// what [`Store::missing_since`] names. Until then its keys are found as in a live bucket. Undone by
    /// [`Store::abandon`].
    ///
    /// # Panics
    /// If a microbatch has begun, or the loan lacks a part of what is missing.
    pub fn adopt(&mut self, loan: Loan, since: EventTimeMs) {
        assert!(
            self.prepared.is_none() && self.pending.keys() == 0,
            "a state is widened between two batches"
        );
        assert!(
            self.missing_since(since).iter().all(|slice| loan.covers(*slice)),
            "what is adopted leaves no gap before the live buckets"
        );
        let back = self.current.manifest.expired.iter().filter(|bucket| bucket.to > since);
        self.window.recalled.extend(back.map(BucketTally::bucket));
        self.window.adopted = Some((loan, since));
    }

    /// Expired buckets that are still on disk, ascending, of the generation that probes use.
    pub fn grace_buckets(&self) -> &[BucketTally] {
        &self.probed().manifest.expired
    }

    /// Earlier bucket widths that the generation that probes use remembers. A rebuild needs them to make the same
    /// buckets.
    pub fn eras(&self) -> &[Era] {
        &self.probed().manifest.eras
    }

    /// The bucket that a time falls into; `None` before the first key.
    pub fn bucket_of(&self, time: EventTimeMs) -> Option<Bucket> {
        self.grid.map(|grid| grid.bucket_of(time))
    }

    fn is_known(&self, bucket: Bucket) -> bool {
        let generation = self.probed();
        mutant!("expired-bucket-answers", true => bucket.to > generation.manifest.complete_since)
            || generation.grace_sections.contains_key(&bucket)
            || self.window.lends(bucket)
    }

    /// Refuses keys whose bucket is neither live nor lent, and calls back buckets in their grace that a key falls into.
    pub(super) fn admit(&mut self, keys: &[Key]) -> Result<(), StoreError> {
        let complete_since = self.complete_since();
        let mut last: Option<Bucket> = None;
        for key in keys.iter().filter(|key| key.event_time < complete_since) {
            if last.is_some_and(|same| same.holds(key.event_time)) {
                continue;
            }
            let Some(bucket) = self.bucket_of(key.event_time).filter(|bucket| self.is_known(*bucket)) else {
                return Err(StoreError::BeforeComplete { event_time: key.event_time, complete_since });
            };
            if self.probed().grace_sections.contains_key(&bucket) {
                self.window.recalled.insert(bucket);
            }
            last = Some(bucket);
        }
        Ok(())
    }
}
