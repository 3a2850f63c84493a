//! Merging: segments become one, with bounded memory.
//!
//! Flow, for each bucket: pages of all inputs are decoded; the least of their last fingerprints is the bound up to which
//! nothing more can come; what lies below it is merged pair by pair, without a branch per key -> copies of a key
//! collapse -> [`SectionWriter::push_all`]
//!
//! Every page checksum is verified on the way. The keys that were written and the copies that collapsed must add up,
//! count and digest, to what the directories of the inputs say: a merge can not lose keys in silence, and hashes each
//! key once.
//!
//! Bounds: a read buffer and [`INPUT_BYTES_MAX`] of decoded fingerprints per input, and the
//! writer's buffers.

use std::collections::{BTreeMap, BTreeSet};
use std::hint::select_unpredictable;
use std::ops::ControlFlow;
use std::sync::Arc;

use super::StoreError;
use super::bucket::{Bucket, Tally};
use super::page::PAGE_KEYS_MAX;
use super::segment::{Section, SectionScan, SectionWriter, Segment, SegmentWriter};
use crate::fingerprint::Fingerprint;

/// Segments of one tier that are merged into one of the next.
pub(super) const FAN_IN: usize = 8;
/// Fingerprints that are decoded per input before a round of merging, for each input: so many that cutting the blocks
/// costs little against merging them.
const BLOCK_KEYS_PER_INPUT: usize = 256;
/// Most of them, but for the page that reaches it.
const BLOCK_KEYS_MAX: usize = 2048;
/// Most bytes of decoded fingerprints per input: as decoded, and in the two buffers of the pairwise merge.
pub(super) const INPUT_BYTES_MAX: usize = 3 * size_of::<u128>() * (BLOCK_KEYS_MAX + PAGE_KEYS_MAX);
/// Keys between two calls of the caller's pace: 8 ms at 2 M/s.
const PACE_KEYS: u64 = 16 << 10;

/// Called with a number of keys that were merged, waits as it likes, and says whether to go on.
pub(super) type Pace<'a> = &'a mut dyn FnMut(u64) -> ControlFlow<()>;

/// What a merge wrote and what it left out.
#[derive(Debug, Default)]
pub(super) struct Merged {
    pub(super) kept: BTreeMap<Bucket, Tally>,
    /// Second and further copies of a fingerprint in its bucket.
    pub(super) collapsed: BTreeMap<Bucket, Tally>,
}

/// Merges the buckets of `inputs` that are in `kept` (all, if it is `None`) into the segment that `writer` writes.
/// `None` if `pace` says to stop: then the writer's file is of no use.
///
/// # Errors
/// [`StoreError::Corrupt`] names the input that is not what its directory says.
pub(super) fn merge(
    inputs: &[Arc<Segment>],
    kept: Option<&BTreeSet<Bucket>>,
    writer: &mut SegmentWriter,
    read_bytes_max: usize,
    pace: Pace<'_>,
) -> Result<Option<Merged>, StoreError> {
    let mut merged = Merged::default();
    let buckets: BTreeSet<Bucket> = inputs
        .iter()
        .flat_map(|segment| segment.sections.iter().map(|section| section.bucket))
        .filter(|bucket| kept.is_none_or(|kept| kept.contains(bucket)))
        .collect();
    let mut buffers = Buffers::default();
    for bucket in buckets {
        let sections: Vec<(&Segment, &Section)> = inputs
            .iter()
            .flat_map(|segment| segment.sections.iter().map(move |section| (segment.as_ref(), section)))
            .filter(|(_, section)| section.bucket == bucket)
            .collect();
        let keys_max = sections.iter().map(|(_, section)| section.tally.keys).sum();
        let earliest = sections.iter().map(|(_, section)| section.event_time_min).min();
        let latest = sections.iter().map(|(_, section)| section.event_time_max).max();
        let (Some(earliest), Some(latest)) = (earliest, latest) else { continue };

        let mut blocks: Vec<Block<'_>> = sections
            .iter()
            .map(|(segment, section)| Block::new(SectionScan::new(segment, section, read_bytes_max)))
            .collect();
        let mut section_writer = writer.section(bucket, (earliest, latest), keys_max);
        let Some(collapsed) = merge_section(&mut blocks, &mut section_writer, &mut buffers, pace)? else {
            return Ok(None);
        };
        let written = section_writer.written();
        check_sum(&sections, written, collapsed, read_bytes_max)?;
        section_writer.finish()?;
        merged.kept.insert(bucket, written);
        if collapsed.keys > 0 {
            merged.collapsed.insert(bucket, collapsed);
        }
    }
    Ok(Some(merged))
}

/// Refuses a merge whose outcome is not the sum of its inputs, and finds the input that is wrong.
fn check_sum(
    sections: &[(&Segment, &Section)],
    written: Tally,
    collapsed: Tally,
    read_bytes_max: usize,
) -> Result<(), StoreError> {
    let mut expected = Tally::default();
    sections.iter().for_each(|(_, section)| expected.add_all(section.tally));
    let mut found = written;
    found.add_all(collapsed);
    if found == expected {
        return Ok(());
    }
    for (segment, section) in sections {
        segment.check_section(section, read_bytes_max)?;
    }
    let (segment, _) = sections[0];
    Err(segment.corrupt("its keys changed while they were merged"))
}

/// Decoded fingerprints of one input.
struct Block<'a> {
    scan: SectionScan<'a>,
    values: Vec<u128>,
    /// Values before this one were merged.
    taken: usize,
}

impl<'a> Block<'a> {
    fn new(scan: SectionScan<'a>) -> Self {
        Self { scan, values: Vec::new(), taken: 0 }
    }

    fn left(&self) -> &[u128] {
        &self.values[self.taken..]
    }

    /// Decodes the next pages once all values were taken; whether there are any.
    fn refill(&mut self, keys_min: usize) -> Result<bool, StoreError> {
        if self.taken == self.values.len() {
            self.values.clear();
            self.taken = 0;
            while self.values.len() < keys_min && self.scan.append_page(&mut self.values)? {}
        }
        Ok(!self.values.is_empty())
    }

    /// How many of the values left are at most `bound`.
    fn up_to(&self, bound: u128) -> usize {
        self.left().partition_point(|value| *value <= bound)
    }
}

/// Merges sorted blocks until they are used up and gives the copies that collapsed; `None` if `pace` says to stop.
fn merge_section(
    blocks: &mut Vec<Block<'_>>,
    writer: &mut SectionWriter<'_>,
    buffers: &mut Buffers,
    pace: Pace<'_>,
) -> Result<Option<Tally>, StoreError> {
    let block_keys = (blocks.len() * BLOCK_KEYS_PER_INPUT).min(BLOCK_KEYS_MAX);
    let mut collapsed = Tally::default();
    let mut keys_since_pace = 0;
    loop {
        let mut index = 0;
        while index < blocks.len() {
            if blocks[index].refill(block_keys)? {
                index += 1;
            } else {
                blocks.remove(index);
            }
        }
        let bound = blocks.iter().filter_map(|block| block.values.last().copied()).min();
        if keys_since_pace >= PACE_KEYS || bound.is_none() {
            if pace(keys_since_pace).is_break() {
                return Ok(None);
            }
            keys_since_pace = 0;
        }
        let Some(bound) = bound else { return Ok(Some(collapsed)) };
        let lengths: Vec<usize> = blocks.iter().map(|block| block.up_to(bound)).collect();
        let parts: Vec<&[u128]> =
            blocks.iter().zip(&lengths).map(|(block, length)| &block.left()[..*length]).collect();
        let values = buffers.merge(&parts);
        keys_since_pace += values.len() as u64;
        collapse_copies(values, &mut collapsed);
        writer.push_all(values)?;
        for (block, length) in blocks.iter_mut().zip(lengths) {
            block.taken += length;
        }
    }
}

/// Takes second and further copies out of a sorted run and counts them.
fn collapse_copies(values: &mut Vec<u128>, collapsed: &mut Tally) {
    if values.is_sorted_by(|one, next| one < next) {
        return;
    }
    values.dedup_by(|copy, first| {
        let is_copy = copy == first;
        if is_copy {
            collapsed.add(Fingerprint::from_value(*copy));
        }
        is_copy
    });
}

/// Space of the pairwise merge, kept from round to round.
#[derive(Default)]
struct Buffers {
    from: Vec<u128>,
    into: Vec<u128>,
}

impl Buffers {
    /// All values of sorted parts, sorted.
    fn merge(&mut self, parts: &[&[u128]]) -> &mut Vec<u128> {
        let mut lengths: Vec<usize> = merge_pairs(parts, &mut self.into);
        while lengths.len() > 1 {
            std::mem::swap(&mut self.from, &mut self.into);
            let mut runs = Vec::with_capacity(lengths.len());
            let mut left = self.from.as_slice();
            for length in lengths {
                let (run, rest) = left.split_at(length);
                runs.push(run);
                left = rest;
            }
            lengths = merge_pairs(&runs, &mut self.into);
        }
        &mut self.into
    }
}

/// Merges neighbours two by two, one after another into `into`, and gives the lengths of the runs.
fn merge_pairs(runs: &[&[u128]], into: &mut Vec<u128>) -> Vec<usize> {
    into.resize(runs.iter().map(|run| run.len()).sum(), 0);
    let mut left = into.as_mut_slice();
    let mut lengths = Vec::with_capacity(runs.len().div_ceil(2));
    for pair in runs.chunks(2) {
        let (one, other) = (pair[0], pair.get(1).copied().unwrap_or_default());
        let (out, rest) = left.split_at_mut(one.len() + other.len());
        merge_two(one, other, out);
        lengths.push(out.len());
        left = rest;
    }
    lengths
}

/// Merges two sorted runs into `out`, which is as long as both. Which value comes next is a selection and not a branch:
/// with hashes it could not be foretold. One walk from the front and one from the back do not wait for each other.
fn merge_two(mut one: &[u128], mut other: &[u128], mut out: &mut [u128]) {
    loop {
        // So many steps from either side can not meet.
        let steps = one.len().min(other.len()) / 2;
        if steps == 0 {
            break;
        }
        let (mut one_begin, mut other_begin) = (0, 0);
        let (mut one_end, mut other_end) = (one.len() - 1, other.len() - 1);
        let last = out.len() - 1;
        for step in 0..steps {
            let (value, other_value) = (one[one_begin], other[other_begin]);
            let takes_one = value <= other_value;
            out[step] = select_unpredictable(takes_one, value, other_value);
            one_begin += usize::from(takes_one);
            other_begin += usize::from(!takes_one);

            let (value, other_value) = (one[one_end], other[other_end]);
            let takes_one = value > other_value;
            out[last - step] = select_unpredictable(takes_one, value, other_value);
            one_end -= usize::from(takes_one);
            other_end -= usize::from(!takes_one);
        }
        one = &one[one_begin..=one_end];
        other = &other[other_begin..=other_end];
        out = &mut out[steps..=last - steps];
    }
    // One of the two has at most one value left.
    let (few, many) = if one.len() < other.len() { (one, other) } else { (other, one) };
    let below = few.first().map_or(many.len(), |value| many.partition_point(|other| other < value));
    out[..below].copy_from_slice(&many[..below]);
    out[below..below + few.len()].copy_from_slice(few);
    out[below + few.len()..].copy_from_slice(&many[below..]);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Goal: any number of sorted parts, of any lengths, with copies among them, become one sorted run of all.
        #[test]
        fn parts_become_one_sorted_run(
            mut parts in prop::collection::vec(prop::collection::vec(0u128..50, 0..9), 0..12)
        ) {
            parts.iter_mut().for_each(|part| part.sort_unstable());
            let mut expected = parts.concat();
            expected.sort_unstable();
            let slices: Vec<&[u128]> = parts.iter().map(Vec::as_slice).collect();
            let mut buffers = Buffers::default();
            let merged = buffers.merge(&slices);
            prop_assert_eq!(&*merged, &expected);

            let mut collapsed = Tally::default();
            collapse_copies(merged, &mut collapsed);
            expected.dedup();
            prop_assert_eq!(&*merged, &expected);
            let copies = parts.concat().len() - expected.len();
            prop_assert_eq!(collapsed.keys, copies as u64);
        }
    }
}
