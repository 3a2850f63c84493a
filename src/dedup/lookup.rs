//! Lookup: which of many sorted fingerprints stand in a section.
//!
//! Flow: sorted probes -> filter, walked forward from memory or through read windows -> candidates -> stride
//! index, page index -> pages, each read at most once and neighbours together -> found
//!
//! One random read at a time is the trap of a dedup state on disk; here reads are sorted, and pages closer than
//! [`COALESCE_GAP_BYTES`] become one read, so a dense batch turns into a sequential scan by itself.
//!
//! Bounds: one read window, one decoded page, four bytes per candidate and 16 per candidate of a stride.

use super::StoreError;
use super::filter;
use super::page::{CHECKSUM_BYTES, PAGE_BYTES, fingerprint_at};
use super::pins::Pins;
use super::segment::{STRIDE_PAGES, Section, Segment};
use crate::fingerprint::FINGERPRINT_BYTES;

/// Pages that lie closer are read together: the best of 4, 16 and 32 KiB at 1e8 keys on a disk of 60 k reads/s.
const COALESCE_GAP_BYTES: u64 = 16 << 10;
const COALESCE_GAP_PAGES: u64 = COALESCE_GAP_BYTES / PAGE_BYTES as u64;

/// One fingerprint that is looked up, with its place in the probe batch, in 16 bytes that sort by both:
/// found, 1 bit | zeros | fingerprint, 88 bits | place, 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Probe(u128);

impl Probe {
    const FOUND: u128 = 1 << 127;

    pub(super) fn new(value: u128, index: u32) -> Self {
        Self(value << 32 | u128::from(index))
    }

    /// The fingerprint, as a number.
    pub(super) fn value(self) -> u128 {
        (self.0 & !Self::FOUND) >> 32
    }

    /// The place in the probe batch.
    pub(super) fn index(self) -> usize {
        self.0 as u32 as usize
    }

    pub(super) fn is_found(self) -> bool {
        self.0 & Self::FOUND != 0
    }

    pub(super) fn mark_found(&mut self) {
        self.0 |= Self::FOUND;
    }
}

/// Buffers of lookups, used again and again.
#[derive(Debug)]
pub(super) struct Lookup {
    window_pages_max: u64,
    window: Vec<u8>,
    values: Vec<u128>,
    /// Places in the slice of probes.
    candidates: Vec<u32>,
    /// Page and candidate, within one stride.
    wanted: Vec<(u64, u32)>,
    index_page: Vec<u8>,
}

impl Lookup {
    pub(super) fn new(window_bytes_max: usize) -> Self {
        Self {
            window_pages_max: (window_bytes_max / PAGE_BYTES).max(1) as u64,
            window: Vec::new(),
            values: Vec::new(),
            candidates: Vec::new(),
            wanted: Vec::new(),
            index_page: Vec::new(),
        }
    }

    /// Marks the probes whose fingerprints stand in the section. Probes are sorted by value.
    pub(super) fn mark_found(
        &mut self,
        segment: &Segment,
        section_index: usize,
        pins: &mut Pins,
        probes: &mut [Probe],
    ) -> Result<(), StoreError> {
        let section = &segment.sections[section_index];
        self.candidates.clear();
        match pins.filter(segment, section_index)? {
            Some(filter_pages) => self.walk_filter(section, filter_pages, 0, probes, 0..probes.len()),
            None => self.stream_filter(segment, section, probes)?,
        }
        self.settle(segment, section_index, pins, probes)
    }

    /// Collects the candidates among `probes[range]`, whose filter pages stand in `pages` from `first_page` on.
    fn walk_filter(
        &mut self,
        section: &Section,
        pages: &[u8],
        first_page: u64,
        probes: &[Probe],
        range: std::ops::Range<usize>,
    ) {
        for (probe_index, probe) in probes.iter().enumerate().take(range.end).skip(range.start) {
            let block = filter::block_of(probe.value(), section.filter_blocks);
            let page = (block / filter::PAGE_BLOCKS - first_page) as usize;
            let block_bytes = pages[page * PAGE_BYTES + filter::block_offset(block)..]
                .first_chunk()
                .expect("a filter page holds its blocks whole");
            if filter::may_contain(block_bytes, probe.value()) && !probe.is_found() {
                self.candidates.push(probe_index as u32);
            }
        }
    }

    /// Walks a filter that is not in memory, window by window, over the pages that the probes need.
    fn stream_filter(
        &mut self,
        segment: &Segment,
        section: &Section,
        probes: &[Probe],
    ) -> Result<(), StoreError> {
        let blocks = section.filter_blocks;
        let page_of = |probe: &Probe| filter::block_of(probe.value(), blocks) / filter::PAGE_BLOCKS;
        let mut begin = 0;
        while begin < probes.len() {
            let (end, pages) = self.window_of(&probes[begin..], page_of);
            let mut window = std::mem::take(&mut self.window);
            let last = pages.end - 1;
            let bytes = (last - pages.start) as usize * PAGE_BYTES + filter::page_bytes(blocks, last);
            window.resize(bytes, 0);
            let position = section.filter_position + pages.start * PAGE_BYTES as u64;
            segment.read(&mut window, position)?;
            for (page_index, page) in window.chunks(PAGE_BYTES).enumerate() {
                let page_position = position + (page_index * PAGE_BYTES) as u64;
                segment.check_sealed(page, page_position, "filter page")?;
            }
            self.walk_filter(section, &window, pages.start, probes, begin..begin + end);
            self.window = window;
            begin += end;
        }
        Ok(())
    }

    /// How many of the sorted `items` the next read serves, and the pages `[begin, end)` that it covers.
    fn window_of<T>(&self, items: &[T], page_of: impl Fn(&T) -> u64) -> (usize, std::ops::Range<u64>) {
        let first = page_of(&items[0]);
        let (mut count, mut last) = (0, first);
        for item in items {
            let page = page_of(item);
            if page > last + 1 + COALESCE_GAP_PAGES || page >= first + self.window_pages_max {
                break;
            }
            last = page;
            count += 1;
        }
        (count, first..last + 1)
    }

    /// Settles the candidates, stride by stride.
    fn settle(
        &mut self,
        segment: &Segment,
        section_index: usize,
        pins: &mut Pins,
        probes: &mut [Probe],
    ) -> Result<(), StoreError> {
        if self.candidates.is_empty() {
            return Ok(());
        }
        let section = &segment.sections[section_index];
        let pinned_index = pins.page_index(segment, section_index)?;
        let candidates = std::mem::take(&mut self.candidates);
        let mut begin = 0;
        while begin < candidates.len() {
            let value = probes[candidates[begin] as usize].value();
            let later_stride = section.strides.partition_point(|first| first.value() <= value);
            if later_stride == 0 {
                // Before the first key of the section: a false positive that needs no page.
                begin += 1;
                continue;
            }
            let in_stride = candidates[begin..].partition_point(|candidate| {
                let value = probes[*candidate as usize].value();
                section.strides.get(later_stride).is_none_or(|first| value < first.value())
            });
            let stride = later_stride as u64 - 1;
            let of_stride = &candidates[begin..begin + in_stride];
            self.find_pages(segment, section, stride, pinned_index, of_stride, probes)?;
            self.read_pages(segment, section, probes)?;
            begin += in_stride;
        }
        self.candidates = candidates;
        Ok(())
    }

    /// Finds the page of every candidate of a stride; all of them are at or after the stride's first key.
    fn find_pages(
        &mut self,
        segment: &Segment,
        section: &Section,
        stride: u64,
        pinned_index: Option<&[u8]>,
        candidates: &[u32],
        probes: &[Probe],
    ) -> Result<(), StoreError> {
        let pages = section.stride_pages(stride);
        let entries = (pages.end - pages.start) as usize;
        let firsts = match pinned_index {
            Some(all) => &all[(stride * STRIDE_PAGES) as usize * FINGERPRINT_BYTES..],
            None => {
                self.index_page.resize(section.index_bytes(stride), 0);
                segment.read_sealed(&mut self.index_page, section.index_position(stride), "index page")?;
                &self.index_page[CHECKSUM_BYTES..]
            }
        };
        if fingerprint_at(firsts, 0) != section.strides[stride as usize].value() {
            return Err(segment.corrupt("an index page and the stride index disagree"));
        }
        self.wanted.clear();
        for candidate in candidates {
            let value = probes[*candidate as usize].value();
            let page = last_at_most(firsts, entries, value);
            self.wanted.push((pages.start + page as u64, *candidate));
        }
        Ok(())
    }

    /// Reads the wanted pages, neighbours together, and marks what is found in them.
    fn read_pages(
        &mut self,
        segment: &Segment,
        section: &Section,
        probes: &mut [Probe],
    ) -> Result<(), StoreError> {
        let wanted = std::mem::take(&mut self.wanted);
        let mut begin = 0;
        while begin < wanted.len() {
            let (count, pages) = self.window_of(&wanted[begin..], |(page, _)| *page);
            let position = section.page_position(pages.start);
            let last = pages.end - 1;
            let bytes = section.page_position(last) + section.page_bytes(last) as u64 - position;
            self.window.resize(bytes as usize, 0);
            segment.read(&mut self.window, position)?;
            for same_page in wanted[begin..begin + count].chunk_by(|one, other| one.0 == other.0) {
                let page = same_page[0].0;
                let page_begin = (section.page_position(page) - position) as usize;
                let page_bytes = &self.window[page_begin..page_begin + section.page_bytes(page)];
                segment.read_page(page_bytes, section.page_position(page), &mut self.values)?;
                for (_, candidate) in same_page {
                    let probe = &mut probes[*candidate as usize];
                    if self.values.binary_search(&probe.value()).is_ok() {
                        probe.mark_found();
                    }
                }
            }
            begin += count;
        }
        self.wanted = wanted;
        Ok(())
    }
}

/// Index of the last of `entries` sorted fingerprints that is at most `value`; the first one is.
fn last_at_most(firsts: &[u8], entries: usize, value: u128) -> usize {
    let (mut low, mut high) = (0, entries);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fingerprint_at(firsts, middle * FINGERPRINT_BYTES) <= value {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}
