//! Pieces of segments that stay in memory: page indexes, then filters, then pages, newest bucket first.
//!
//! Which pieces may stay is planned when the generation changes and never by use: every probe walks every filter, and
//! against a cyclic walk a least-recently-used cache of less than all keeps nothing. A filter that does not fit whole is
//! held up to a filter page. A planned index or filter is read and checked when a probe asks for enough of it; pages are
//! kept as they are read.
//!
//! Bounds: the bytes of the plan, whatever the generation holds, and 16 bytes per page that may be kept.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::page::PAGE_BYTES;
use super::segment::{STRIDE_PAGES, Segment, SegmentName};
use crate::event_time::EventTimeMs;
use crate::fingerprint::FINGERPRINT_BYTES;

/// Part of the memory that page indexes may take; where they need more, an index page is read before its page.
const INDEX_SHARE: u64 = 4;
/// Filters are held in eighths, so that one more small segment does not cut a little off a large filter each time.
const FILTER_PARTS: u64 = 8;
/// Filters up to this size are held whole or not at all.
const WHOLE_FILTER_BYTES_MAX: u64 = 1 << 20;

/// What of one section may stay in memory, and what is there.
#[derive(Debug, Default)]
pub(super) struct Pinned {
    index_planned: bool,
    /// Filter pages `[0, filter_pages)` may stay.
    filter_pages: u64,
    /// Pages `[0, cache_pages)` may stay: whole strides.
    cache_pages: u64,
    index: OnceLock<Vec<u8>>,
    filter: OnceLock<Vec<u8>>,
    cache: Vec<Mutex<StrideCache>>,
    cached: AtomicU64,
    /// Nanoseconds that the device would have been spared so far, had the filter been in memory.
    spared_ns: AtomicU64,
}

/// Pages of one stride.
type StrideCache = Vec<Option<Box<[u8]>>>;

impl Pinned {
    fn planned(index_planned: bool, filter_pages: u64, cache_pages: u64) -> Self {
        let strides = cache_pages.div_ceil(STRIDE_PAGES);
        Self {
            index_planned,
            filter_pages,
            cache_pages,
            cache: (0..strides).map(|_| Mutex::default()).collect(),
            ..Self::default()
        }
    }

    fn is_planned_as(&self, other: &Self) -> bool {
        (self.index_planned, self.filter_pages, self.cache_pages)
            == (other.index_planned, other.filter_pages, other.cache_pages)
    }

    /// First fingerprints of all pages of the section.
    pub(super) fn index(&self) -> Option<&[u8]> {
        self.index.get().map(Vec::as_slice)
    }

    pub(super) fn wants_index(&self) -> bool {
        self.index_planned && self.index.get().is_none()
    }

    pub(super) fn set_index(&self, firsts: Vec<u8>) {
        // Two workers may have read it; both read the same.
        let _ = self.index.set(firsts);
    }

    /// The first filter pages of the section, as they stand in the file.
    pub(super) fn filter(&self) -> &[u8] {
        self.filter.get().map_or(&[], Vec::as_slice)
    }

    /// Filter pages that may stay.
    pub(super) fn filter_pages(&self) -> u64 {
        self.filter_pages
    }

    pub(super) fn wants_filter(&self) -> bool {
        self.filter_pages > 0 && self.filter.get().is_none()
    }

    pub(super) fn set_filter(&self, pages: Vec<u8>) {
        let _ = self.filter.set(pages);
    }

    /// Counts what the device would have been spared, had the filter been there: the sum so far.
    pub(super) fn note_spared_ns(&self, nanoseconds: u64) -> u64 {
        self.spared_ns.fetch_add(nanoseconds, Ordering::Relaxed) + nanoseconds
    }

    /// Part of the section's pages that is in memory.
    pub(super) fn cached_share(&self, pages: u64) -> f64 {
        self.cached.load(Ordering::Relaxed) as f64 / pages.max(1) as f64
    }

    /// Looks at a page if it is in memory. Its checksum was checked when it came.
    pub(super) fn with_page<T>(&self, page: u64, look: impl FnOnce(&[u8]) -> T) -> Option<T> {
        let stride = self.cache.get((page / STRIDE_PAGES) as usize)?;
        let stride = stride.lock().unwrap_or_else(PoisonError::into_inner);
        stride.get((page % STRIDE_PAGES) as usize)?.as_deref().map(look)
    }

    /// Keeps a page whose checksum was checked, if the plan has room for it.
    pub(super) fn keep_page(&self, page: u64, bytes: &[u8]) {
        if page >= self.cache_pages {
            return;
        }
        let stride = &self.cache[(page / STRIDE_PAGES) as usize];
        let mut stride = stride.lock().unwrap_or_else(PoisonError::into_inner);
        let place = (page % STRIDE_PAGES) as usize;
        if stride.len() <= place {
            let begin = page / STRIDE_PAGES * STRIDE_PAGES;
            stride.resize((self.cache_pages - begin).min(STRIDE_PAGES) as usize, None);
        }
        if stride[place].is_none() {
            stride[place] = Some(bytes.into());
            self.cached.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn bytes(&self) -> u64 {
        let held = self.index.get().map_or(0, Vec::len) + self.filter().len();
        held as u64 + self.cached.load(Ordering::Relaxed) * PAGE_BYTES as u64
    }

    /// What this plan may keep of what another one held.
    fn take_over(&self, other: Self) {
        if let (true, Some(index)) = (self.index_planned, other.index.into_inner()) {
            self.set_index(index);
        }
        let kept = self.filter_pages as usize * PAGE_BYTES;
        match other.filter.into_inner() {
            Some(mut filter) if other.filter_pages >= self.filter_pages && kept > 0 => {
                filter.truncate(kept);
                filter.shrink_to_fit();
                self.set_filter(filter);
            }
            _ => {}
        }
        for (stride, pages) in other.cache.into_iter().enumerate() {
            let pages = pages.into_inner().unwrap_or_else(PoisonError::into_inner);
            for (place, page) in pages.into_iter().enumerate() {
                if let Some(page) = page {
                    self.keep_page(stride as u64 * STRIDE_PAGES + place as u64, &page);
                }
            }
        }
    }
}

/// What is planned, by bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct PinStats {
    /// Page indexes.
    pub index_bytes: u64,
    /// Filters.
    pub filter_bytes: u64,
    /// Filters of the generation, in memory or not.
    pub filter_bytes_total: u64,
    /// Pages.
    pub page_bytes: u64,
}

type PinKey = (SegmentName, usize);

/// Pieces in memory and those that may be there.
#[derive(Debug)]
pub(super) struct Pins {
    bytes_max: u64,
    sections: BTreeMap<PinKey, Arc<Pinned>>,
    stats: PinStats,
}

impl Pins {
    pub(super) fn new(bytes_max: u64) -> Self {
        Self { bytes_max, sections: BTreeMap::new(), stats: PinStats::default() }
    }

    /// Plans for a generation, whose segments come oldest first. Sections of buckets that ended before `complete_since`
    /// are rarely asked and stay on disk. Pieces that stay in memory are not read again.
    pub(super) fn plan(&mut self, segments: &[Arc<Segment>], complete_since: EventTimeMs) {
        let mut places = Vec::new();
        for (age, segment) in segments.iter().rev().enumerate() {
            let sections = segment.sections.iter().enumerate();
            for (section_index, section) in sections.filter(|(_, section)| section.bucket.to > complete_since)
            {
                let key = (segment.entry.name, section_index);
                places.push(((Reverse(section.bucket), age), key, section));
            }
        }
        places.sort_by_key(|(order, ..)| *order);

        let mut stats = PinStats::default();
        let mut index_bytes_left = self.bytes_max / INDEX_SHARE;
        let mut planned = Vec::with_capacity(places.len());
        for (_, key, section) in &places {
            let index_bytes = section.pages * FINGERPRINT_BYTES as u64;
            let fits = index_bytes <= index_bytes_left;
            if fits {
                index_bytes_left -= index_bytes;
                stats.index_bytes += index_bytes;
            }
            planned.push((*key, *section, fits, 0, 0));
        }
        let mut bytes_left = self.bytes_max - stats.index_bytes;
        for (_, section, _, filter_pages, _) in &mut planned {
            let bytes = section.filter.bytes().unwrap_or(u64::MAX);
            stats.filter_bytes_total = stats.filter_bytes_total.saturating_add(bytes);
            let held = filter_bytes_held(bytes, bytes_left);
            bytes_left -= held;
            stats.filter_bytes += held;
            *filter_pages = held.div_ceil(PAGE_BYTES as u64);
        }
        for (_, section, _, _, cache_pages) in &mut planned {
            let strides_max = bytes_left / (STRIDE_PAGES * PAGE_BYTES as u64);
            let pages = section.pages.min(strides_max * STRIDE_PAGES);
            bytes_left -= pages * PAGE_BYTES as u64;
            stats.page_bytes += pages * PAGE_BYTES as u64;
            *cache_pages = pages;
        }

        let mut earlier = std::mem::take(&mut self.sections);
        for (key, _, index, filter_pages, cache_pages) in planned {
            let plan = Pinned::planned(index, filter_pages, cache_pages);
            let pinned = match earlier.remove(&key) {
                Some(same) if same.is_planned_as(&plan) => same,
                Some(other) => {
                    if let Some(other) = Arc::into_inner(other) {
                        plan.take_over(other);
                    }
                    Arc::new(plan)
                }
                None => Arc::new(plan),
            };
            self.sections.insert(key, pinned);
        }
        self.stats = stats;
    }

    /// What of a section may stay.
    pub(super) fn of(&self, segment: &Segment, section_index: usize) -> Arc<Pinned> {
        self.sections.get(&(segment.entry.name, section_index)).cloned().unwrap_or_default()
    }

    /// Bytes that are in memory now.
    pub(super) fn bytes(&self) -> u64 {
        self.sections.values().map(|pinned| pinned.bytes()).sum()
    }

    /// The bound of all.
    pub(super) fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// What is planned.
    pub(super) fn stats(&self) -> PinStats {
        self.stats
    }
}

/// How much of a filter of `bytes` is held where `left` bytes are left: whole pages.
fn filter_bytes_held(bytes: u64, left: u64) -> u64 {
    if bytes <= left {
        return bytes;
    }
    if bytes <= WHOLE_FILTER_BYTES_MAX {
        return 0;
    }
    let part = bytes / FILTER_PARTS / PAGE_BYTES as u64 * PAGE_BYTES as u64;
    left / part * part
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_does_not_fit_is_held_in_eighths_of_whole_pages() {
        let bytes = 100 << 20;
        assert_eq!(filter_bytes_held(bytes, bytes), bytes);
        let held = filter_bytes_held(bytes, bytes / 2 + 5);
        assert!(held <= bytes / 2 && held > bytes / 2 - (1 << 20) && held.is_multiple_of(PAGE_BYTES as u64));
        assert_eq!(filter_bytes_held(bytes, bytes / 9), 0);
        assert_eq!(filter_bytes_held(1 << 20, (1 << 20) - 1), 0);
    }

    #[test]
    fn pages_are_kept_up_to_the_plan() {
        let pinned = Pinned::planned(false, 0, STRIDE_PAGES);
        pinned.keep_page(3, &[7; 4096]);
        pinned.keep_page(STRIDE_PAGES, &[8; 4096]);
        assert_eq!(pinned.with_page(3, |bytes| bytes[0]), Some(7));
        assert_eq!(pinned.with_page(4, |bytes| bytes[0]), None);
        assert_eq!(pinned.with_page(STRIDE_PAGES, |bytes| bytes[0]), None);
        assert_eq!(pinned.bytes(), 4096);
        let smaller = Pinned::planned(false, 0, STRIDE_PAGES);
        smaller.take_over(pinned);
        assert_eq!(smaller.with_page(3, |bytes| bytes[0]), Some(7));
    }
}
