//! Salvage: the buckets of a damaged state that are still whole, so that only the others are read from the tables.
//!
//! Flow: what each bucket must hold (count and digest, from the ledger) -> manifests of the folder, newest first -> the
//! first one whose segments hold exactly that -> the keys of the bucket -> [`Builder`]
//!
//! Invariants
//! 1. A bucket is taken only if all its keys were read from intact pages and add up, count and digest, to what is
//!    wanted. It does not matter which generation they are found in: the same count and digest are the same keys.
//! 2. Nothing is changed or deleted. A file that was set aside as damaged is read too: its damage lies in one bucket.
//!
//! Bounds: the keys of a bucket are read twice, once to be added up and once to be taken; one read buffer. Disk and
//! memory are the builder's. Manifests: those of the folder, of which a sweep leaves a few.

use std::collections::BTreeMap;
use std::path::Path;

use super::bucket::{Bucket, BucketTally, Digest, Era, Tally};
use super::builder::Builder;
use super::generation::{GenerationRef, Manifest, list_generations};
use super::inspect::DAMAGED_SUFFIX;
use super::segment::{Section, SectionScan, Segment, SegmentEntry};
use super::{Key, StoreError, StoreSpec, TRANSFER_BYTES_MAX, disk};
use crate::event_time::EventTimeMs;
use crate::fingerprint::Fingerprint;

/// Keys that are handed to the builder at once.
const CHUNK_KEYS: usize = 64 << 10;

/// What a generation's manifest says of the state, as far as a ledger says it too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GenerationFacts {
    /// What it is for.
    pub spec: StoreSpec,
    /// End of the open first bucket.
    pub floor: Option<EventTimeMs>,
    /// Earlier widths.
    pub eras: Vec<Era>,
    /// Every bucket from here on holds all keys.
    pub complete_since: EventTimeMs,
    /// Live buckets, ascending.
    pub buckets: Vec<BucketTally>,
}

/// Reads the manifest of a generation; its segments are not looked at.
///
/// # Errors
/// [`StoreError::Missing`], [`StoreError::Corrupt`], [`StoreError::NewerFormat`] and [`StoreError::Io`].
pub fn generation_facts(folder: &Path, reference: &GenerationRef) -> Result<GenerationFacts, StoreError> {
    let manifest = Manifest::read(folder, reference)?;
    Ok(GenerationFacts {
        spec: manifest.spec(),
        floor: manifest.floor,
        eras: manifest.eras,
        complete_since: manifest.complete_since,
        buckets: manifest.buckets,
    })
}

/// Adds the keys of those `wanted` buckets to a builder that the folder still holds whole, and gives these buckets,
/// ascending. The builder is to have the ledger's floor and widths.
///
/// # Errors
/// Those of the builder, and [`StoreError::Corrupt`] if a file was changed between two reads; then the builder is to be
/// begun anew, without salvage. A file that is missing or damaged is no error: its buckets are not among the result.
pub fn salvage(
    folder: &Path,
    spec: &StoreSpec,
    wanted: &[BucketTally],
    builder: &mut Builder,
) -> Result<Vec<Bucket>, StoreError> {
    let mut left: BTreeMap<Bucket, Tally> =
        wanted.iter().map(|tally| (tally.bucket(), tally.tally())).collect();
    let mut saved = Vec::new();
    let mut generations = list_generations(folder, Some(spec.job_id))?;
    generations.reverse();
    for generation in generations {
        if left.is_empty() {
            break;
        }
        let Ok(manifest) = Manifest::read(folder, &generation.reference) else { continue };
        if manifest.key_spec_hash != spec.key_spec_hash || manifest.seed != spec.seed {
            continue;
        }
        let named: Vec<Bucket> = manifest
            .named_buckets()
            .filter(|bucket| left.get(&bucket.bucket()) == Some(&bucket.tally()))
            .map(BucketTally::bucket)
            .collect();
        if named.is_empty() {
            continue;
        }
        let segments: Vec<Option<Segment>> =
            manifest.segments.iter().map(|entry| open_anyhow(folder, entry, spec)).collect();
        for bucket in named {
            let sections = sections_of(&segments, bucket);
            let tally = left[&bucket];
            if add_up(&sections).is_some_and(|found| found == tally) && fits(builder, &sections, bucket) {
                take(&sections, builder)?;
                left.remove(&bucket);
                saved.push(bucket);
            }
        }
    }
    saved.sort_unstable();
    Ok(saved)
}

/// Opens a segment, under the name that it was set aside with if need be.
fn open_anyhow(folder: &Path, entry: &SegmentEntry, spec: &StoreSpec) -> Option<Segment> {
    let aside = format!("{}{DAMAGED_SUFFIX}", entry.name);
    let opened = Segment::open(folder, entry, spec)
        .or_else(|_| disk::open(folder, &aside).and_then(|file| Segment::from_file(file, entry, spec)));
    opened.ok()
}

type Place<'a> = (&'a Segment, &'a Section);

/// The sections of a bucket in all segments that could be opened.
fn sections_of(segments: &[Option<Segment>], bucket: Bucket) -> Vec<Place<'_>> {
    let all = segments.iter().flatten();
    all.flat_map(|segment| segment.sections.iter().map(move |section| (segment, section)))
        .filter(|(_, section)| section.bucket == bucket)
        .collect()
}

/// What the pages of these sections hold; `None` if one of them is damaged.
fn add_up(sections: &[Place<'_>]) -> Option<Tally> {
    let mut found = Tally { keys: 0, digest: Digest::default() };
    for (segment, section) in sections {
        let mut scan = SectionScan::new(segment, section, TRANSFER_BYTES_MAX as usize);
        while let Some(value) = scan.next().ok()? {
            found.add(Fingerprint::from_value(value));
        }
    }
    Some(found)
}

/// Whether the builder puts the event times of these sections into this very bucket.
fn fits(builder: &Builder, sections: &[Place<'_>], bucket: Bucket) -> bool {
    let times = sections.iter().flat_map(|(_, section)| [section.event_time_min, section.event_time_max]);
    times.into_iter().all(|time| builder.bucket_of(time) == Some(bucket))
}

/// Hands the keys of sections on. Which of them has which event time is not kept; their range is.
fn take(sections: &[Place<'_>], builder: &mut Builder) -> Result<(), StoreError> {
    let mut keys = Vec::with_capacity(CHUNK_KEYS);
    for (segment, section) in sections {
        let mut scan = SectionScan::new(segment, section, TRANSFER_BYTES_MAX as usize);
        let mut event_time = section.event_time_max;
        while let Some(value) = scan.next()? {
            keys.push(Key { fingerprint: Fingerprint::from_value(value), event_time });
            event_time = section.event_time_min;
            if keys.len() == CHUNK_KEYS {
                builder.add(&keys)?;
                keys.clear();
            }
        }
        builder.add(&keys)?;
        keys.clear();
    }
    Ok(())
}
