//! Pending keys: new in this microbatch, not yet in a segment.
//!
//! They lie in sorted runs. Small ones are merged as they come, so that their sizes at least double from the newest to the
//! oldest, a key is moved a logarithmic number of times and a lookup walks few runs. Runs above a bound stay as they are until
//! the keys are written, so that no copy is large while a batch is in work.
//!
//! Bounds: 16 bytes per key, and as much again for the runs of one merge. When the keys are written they become one run, which
//! takes as much again: a microbatch holds no rows and no open file then.

use std::collections::BTreeMap;

use rayon::slice::ParallelSliceMut;

use super::bucket::{Bucket, Tally};
use super::lookup::Probe;
use super::recent::{BatchRuns, Run};
use super::segment::SegmentWriter;
use super::{BUCKETS_MAX, Key, StoreError};
use crate::event_time::EventTimeMs;
use crate::fingerprint::Fingerprint;
use crate::job::Repeats;
use crate::mutant;

/// Bytes that a key of the open microbatch takes.
pub(crate) const PENDING_KEY_BYTES: u64 = size_of::<Entry>() as u64;

/// A key with the ordinal of its bucket in a [`BucketTable`], in 16 bytes: zeros | fingerprint, 88 bits | ordinal, 32 bits. Of
/// the size of a [`Probe`], so that probes become entries where they lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry(u128);

impl Entry {
    pub(super) fn new(value: u128, bucket: u32) -> Self {
        Self(value << 32 | u128::from(bucket))
    }

    /// The fingerprint, as a number.
    pub(super) fn value(self) -> u128 {
        self.0 >> 32
    }

    /// Ordinal of the bucket.
    pub(super) fn bucket(self) -> u32 {
        self.0 as u32
    }
}

/// The buckets that keys in memory fall into, by the order of their first key.
#[derive(Debug, Default)]
pub(super) struct BucketTable {
    rows: Vec<BucketRow>,
    ordinals: BTreeMap<Bucket, u32>,
}

#[derive(Debug)]
struct BucketRow {
    bucket: Bucket,
    /// Smallest and largest event time of the keys that came in.
    event_times: Option<(EventTimeMs, EventTimeMs)>,
}

impl BucketTable {
    /// The ordinal of a bucket, a new one if need be.
    pub(super) fn ordinal(&mut self, bucket: Bucket) -> Result<u32, StoreError> {
        if let Some(ordinal) = self.ordinals.get(&bucket) {
            return Ok(*ordinal);
        }
        if self.rows.len() == BUCKETS_MAX {
            return Err(StoreError::TooManyBuckets { buckets_max: BUCKETS_MAX });
        }
        let ordinal = self.rows.len() as u32;
        self.rows.push(BucketRow { bucket, event_times: None });
        self.ordinals.insert(bucket, ordinal);
        Ok(ordinal)
    }

    pub(super) fn bucket(&self, ordinal: u32) -> Bucket {
        self.rows[ordinal as usize].bucket
    }

    /// Notes that a key with this event time came in.
    pub(super) fn note(&mut self, ordinal: u32, time: EventTimeMs) {
        let event_times = &mut self.rows[ordinal as usize].event_times;
        let (min, max) = event_times.unwrap_or((time, time));
        *event_times = Some((min.min(time), max.max(time)));
    }

    /// Ordinals, buckets and event times, by ascending bucket.
    pub(super) fn by_bucket(&self) -> Vec<(u32, Bucket, (EventTimeMs, EventTimeMs))> {
        let row = |(bucket, ordinal): (&Bucket, &u32)| (*ordinal, *bucket, self.event_times(*ordinal));
        self.ordinals.iter().map(row).collect()
    }

    fn event_times(&self, ordinal: u32) -> (EventTimeMs, EventTimeMs) {
        let row = &self.rows[ordinal as usize];
        row.event_times.expect("a bucket that holds a key has event times")
    }
}

/// Pending keys of one microbatch.
#[derive(Debug)]
pub(super) struct Pending {
    repeats: Repeats,
    /// Most keys of runs that are merged as they come.
    merged_keys_max: usize,
    pub(super) table: BucketTable,
    runs: Vec<Vec<Entry>>,
}

impl Pending {
    pub(super) fn new(repeats: Repeats, merged_keys_max: usize) -> Self {
        Self { repeats, merged_keys_max, table: BucketTable::default(), runs: Vec::new() }
    }

    /// The set after this one: empty.
    pub(super) fn next(&self) -> Self {
        Self::new(self.repeats, self.merged_keys_max)
    }

    /// By what keys are sorted: the fingerprint, under its bucket if only that one is probed.
    fn rank(&self, entry: &Entry) -> (u32, u128) {
        match self.repeats {
            Repeats::AnyTime => (0, entry.value()),
            Repeats::SameTime => (entry.bucket(), entry.value()),
        }
    }

    pub(super) fn keys(&self) -> u64 {
        self.runs.iter().map(|run| run.len() as u64).sum()
    }

    /// Bytes that the pending keys take at most until they are written, the copy made by a merge included.
    pub(super) fn bytes(&self) -> u64 {
        (self.keys() + self.keys().min(self.merged_keys_max as u64)) * PENDING_KEY_BYTES
    }

    /// Marks the probes of one bucket (of all, if every bucket is probed), sorted, that are pending already.
    pub(super) fn mark_found(&self, bucket: u32, probes: &mut [Probe]) {
        for run in &self.runs {
            let mut left = self.of_bucket(run, bucket);
            for probe in probes.iter_mut() {
                left = &left[count_below(left, probe.value())..];
                match left.first() {
                    None => break,
                    Some(entry) if entry.value() == probe.value() => {
                        mutant!("pending-keys-not-seen", () => probe.mark_found());
                    }
                    Some(_) => {}
                }
            }
        }
    }

    /// The part of a run that holds the keys a probe of this bucket can find.
    fn of_bucket<'a>(&self, run: &'a [Entry], bucket: u32) -> &'a [Entry] {
        match self.repeats {
            Repeats::AnyTime => run,
            Repeats::SameTime => {
                let begin = run.partition_point(|entry| entry.bucket() < bucket);
                let end = run.partition_point(|entry| entry.bucket() <= bucket);
                &run[begin..end]
            }
        }
    }

    /// Takes new keys, none of which is pending: sorted by fingerprint, under their buckets if only those are probed.
    pub(super) fn push(&mut self, run: Vec<Entry>) {
        if run.is_empty() {
            return;
        }
        self.runs.push(run);
        while let [.., older, newer] = self.runs.as_slice() {
            if older.len() > newer.len() * 2 || older.len() + newer.len() > self.merged_keys_max {
                break;
            }
            let merged = self.merged(older, newer);
            self.runs.truncate(self.runs.len() - 2);
            self.runs.push(merged);
        }
    }

    fn merged(&self, older: &[Entry], newer: &[Entry]) -> Vec<Entry> {
        let mut merged = Vec::with_capacity(older.len() + newer.len());
        let (mut older, mut newer) = (older, newer);
        while let ([one, older_rest @ ..], [other, newer_rest @ ..]) = (older, newer) {
            if self.rank(one) < self.rank(other) {
                merged.push(*one);
                older = older_rest;
            } else {
                merged.push(*other);
                newer = newer_rest;
            }
        }
        merged.extend_from_slice(older);
        merged.extend_from_slice(newer);
        merged
    }

    /// The keys of some buckets. Of their event times only the bucket is told.
    pub(super) fn keys_of(&self, wanted: impl Fn(Bucket) -> bool) -> Vec<Key> {
        let is_wanted: Vec<bool> = self.table.rows.iter().map(|row| wanted(row.bucket)).collect();
        let entries = self.runs.iter().flatten().filter(|entry| is_wanted[entry.bucket() as usize]);
        let key =
            |entry: &Entry| self.table.bucket(entry.bucket()).key(Fingerprint::from_value(entry.value()));
        entries.map(key).collect()
    }

    /// Drops the keys of buckets that are not to be kept.
    pub(super) fn retain(&mut self, keep: impl Fn(Bucket) -> bool) {
        let kept: Vec<bool> = self.table.rows.iter().map(|row| keep(row.bucket)).collect();
        for run in &mut self.runs {
            run.retain(|entry| kept[entry.bucket() as usize]);
        }
    }

    /// Sorts entries as [`Pending::push`] takes them.
    pub(super) fn sort(&self, entries: &mut [Entry]) {
        entries.par_sort_unstable_by_key(|entry| self.rank(entry));
    }

    /// Makes all runs one.
    pub(super) fn compact(&mut self) {
        while let [.., older, newer] = self.runs.as_slice() {
            let merged = self.merged(older, newer);
            self.runs.truncate(self.runs.len() - 2);
            self.runs.push(merged);
        }
    }

    /// The keys of a compact set, as they are to be remembered. Where all buckets are probed, those of buckets that end at
    /// or before `complete_since` are left out: what is found must follow from the generation alone.
    pub(super) fn recent_runs(&self, complete_since: EventTimeMs) -> BatchRuns {
        let mut runs = BatchRuns::new();
        for entries in
            self.runs.iter().flat_map(|run| run.chunk_by(|one, other| self.is_probed_with(one, other)))
        {
            let bucket = match self.repeats {
                Repeats::AnyTime => None,
                Repeats::SameTime => Some(self.table.bucket(entries[0].bucket())),
            };
            let mut run = Run::with_capacity(entries.len());
            let is_live =
                |entry: &&Entry| bucket.is_some() || self.table.bucket(entry.bucket()).to > complete_since;
            entries.iter().filter(is_live).for_each(|entry| run.push(entry.value()));
            runs.insert(bucket, run);
        }
        runs
    }

    fn is_probed_with(&self, one: &Entry, other: &Entry) -> bool {
        self.repeats == Repeats::AnyTime || one.bucket() == other.bucket()
    }

    /// Writes all pending keys of a compact set as sections; nothing if there are none.
    pub(super) fn write(self, writer: &mut SegmentWriter) -> Result<BTreeMap<Bucket, Tally>, StoreError> {
        let Self { table, runs, .. } = self;
        let mut values_of: BTreeMap<Bucket, (u32, Vec<u128>)> = BTreeMap::new();
        let mut counts = vec![0usize; table.rows.len()];
        runs.iter().flatten().for_each(|entry| counts[entry.bucket() as usize] += 1);
        let mut places: Vec<Vec<u128>> = counts.into_iter().map(Vec::with_capacity).collect();
        // Within a bucket the order of the run is that of fingerprints, whatever the run is sorted by first.
        runs.iter().flatten().for_each(|entry| places[entry.bucket() as usize].push(entry.value()));
        drop(runs);
        for (ordinal, values) in (0..).zip(places).filter(|(_, values)| !values.is_empty()) {
            values_of.insert(table.bucket(ordinal), (ordinal, values));
        }
        let mut written = BTreeMap::new();
        for (bucket, (ordinal, values)) in values_of {
            let mut section = writer.section(bucket, table.event_times(ordinal), values.len() as u64);
            section.push_all(&values)?;
            written.insert(bucket, section.finish()?);
        }
        Ok(written)
    }
}

/// How many entries of a sorted run lie below a fingerprint: looks near first, in growing steps.
fn count_below(run: &[Entry], value: u128) -> usize {
    let below = |entry: &Entry| entry.value() < value;
    let mut reach = 1;
    while reach < run.len() && below(&run[reach - 1]) {
        reach *= 2;
    }
    let begin = reach / 2;
    begin + run[begin..reach.min(run.len())].partition_point(below)
}
