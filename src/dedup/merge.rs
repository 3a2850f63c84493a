//! Merging: up to [`FAN_IN`] segments become one, with bounded memory.
//!
//! Buckets are merged one after another, each as one pass over the sections of its inputs. Equal fingerprints in
//! one bucket collapse. Every page checksum is verified on the way, and count and digest of every input section
//! must be those of its directory, so a merge can not lose keys in silence.
//!
//! Bounds: a read buffer and a decoded page per input, and the writer's buffers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::StoreError;
use super::bucket::{Bucket, Tally};
use super::segment::{SectionScan, SectionWriter, Segment, SegmentWriter};
use crate::fingerprint::Fingerprint;

/// Segments of one tier that are merged into one of the next, and the most inputs of a merge.
pub(super) const FAN_IN: usize = 8;

/// No fingerprint: they are below 2^88.
const END: u128 = u128::MAX;

/// What a merge wrote and what it left out.
#[derive(Debug, Default)]
pub(super) struct Merged {
    pub(super) kept: BTreeMap<Bucket, Tally>,
    /// Second and further copies of a fingerprint in its bucket.
    pub(super) collapsed: BTreeMap<Bucket, Tally>,
}

struct Input<'a> {
    scan: SectionScan<'a>,
    head: u128,
}

impl Input<'_> {
    fn advance(&mut self) -> Result<(), StoreError> {
        self.head = self.scan.next()?.unwrap_or(END);
        Ok(())
    }
}

/// Merges the live buckets of `inputs` (all, if `live` is `None`) into the segment that `writer` writes.
pub(super) fn merge(
    inputs: &[Arc<Segment>],
    live: Option<&BTreeSet<Bucket>>,
    writer: &mut SegmentWriter,
    read_bytes_max: usize,
) -> Result<Merged, StoreError> {
    let mut merged = Merged::default();
    let buckets: BTreeSet<Bucket> = inputs
        .iter()
        .flat_map(|segment| segment.sections.iter().map(|section| section.bucket))
        .filter(|bucket| live.is_none_or(|live| live.contains(bucket)))
        .collect();
    for bucket in buckets {
        let sections: Vec<_> = inputs
            .iter()
            .flat_map(|segment| segment.sections.iter().map(move |section| (segment, section)))
            .filter(|(_, section)| section.bucket == bucket)
            .collect();
        let keys_max = sections.iter().map(|(_, section)| section.tally.keys).sum();
        let earliest = sections.iter().map(|(_, section)| section.event_time_min).min();
        let latest = sections.iter().map(|(_, section)| section.event_time_max).max();
        let (Some(earliest), Some(latest)) = (earliest, latest) else { continue };

        let mut scans = Vec::with_capacity(sections.len());
        for (segment, section) in sections {
            let mut input = Input { scan: SectionScan::new(segment, section, read_bytes_max), head: END };
            input.advance()?;
            scans.push(input);
        }
        let mut section_writer = writer.section(bucket, (earliest, latest), keys_max);
        let collapsed = merge_section(&mut scans, &mut section_writer)?;
        merged.kept.insert(bucket, section_writer.finish()?);
        if collapsed.keys > 0 {
            merged.collapsed.insert(bucket, collapsed);
        }
    }
    Ok(merged)
}

fn merge_section(inputs: &mut [Input<'_>], writer: &mut SectionWriter<'_>) -> Result<Tally, StoreError> {
    let mut collapsed = Tally::default();
    loop {
        let least = inputs.iter().map(|input| input.head).min().unwrap_or(END);
        if least == END {
            return Ok(collapsed);
        }
        writer.push(least)?;
        let mut copies = 0;
        for input in inputs.iter_mut().filter(|input| input.head == least) {
            input.advance()?;
            copies += 1;
        }
        for _ in 1..copies {
            collapsed.add(Fingerprint::from_value(least));
        }
    }
}
