//! Verification: every byte of a generation that anyone may ever read is read and checked.
//!
//! Beyond checksums it checks what a writer with a bug could break: that filters hold every key, that indexes
//! name the first key of every page, and that sections add up to the buckets of the manifest.
//!
//! Bounds: one read buffer, one page, one filter page and one index page; a segment is read once.

use std::collections::BTreeMap;
use std::path::Path;

use super::bucket::{Bucket, Tally};
use super::generation::{GenerationRef, Manifest};
use super::page::fingerprint_at;
use super::segment::{STRIDE_PAGES, Section, SectionScan, Segment, index_entry_offset};
use super::{StoreError, TRANSFER_BYTES_MAX};

/// What was read and found right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VerifyReport {
    /// Keys of the live buckets.
    pub keys: u64,
    /// Segments.
    pub segments: u64,
    /// Bytes of the segments.
    pub segment_bytes: u64,
}

/// How far a verification is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyProgress {
    /// The segment that is being read.
    pub segment: String,
    /// Segments that were read and found right.
    pub segments_done: u64,
    /// Segments of the generation.
    pub segments: u64,
    /// Bytes of the segments that were read.
    pub bytes_done: u64,
    /// Bytes of the segments.
    pub bytes: u64,
}

/// Reads and checks a whole generation.
///
/// # Errors
/// The [`StoreError`] of the first thing that is wrong; [`StoreError::Missing`] and [`StoreError::Corrupt`] name
/// the file.
pub fn verify(folder: &Path, generation: &GenerationRef) -> Result<VerifyReport, StoreError> {
    verify_with_progress(folder, generation, &mut |_| {})
}

/// As [`verify`]; says how far it is when a segment begins and about once per mebibyte of it.
///
/// # Errors
/// As [`verify`].
pub fn verify_with_progress(
    folder: &Path,
    generation: &GenerationRef,
    progress: &mut dyn FnMut(&VerifyProgress),
) -> Result<VerifyReport, StoreError> {
    let manifest = Manifest::read(folder, generation)?;
    let spec = manifest.spec();
    spec.check()?;
    let mut report = VerifyReport::default();
    let mut found: BTreeMap<Bucket, Tally> = BTreeMap::new();
    let bytes = manifest.segments.iter().map(|segment| segment.bytes).sum();
    for entry in &manifest.segments {
        let segment = Segment::open(folder, entry, &spec)?;
        let mut at = VerifyProgress {
            segment: entry.name.to_string(),
            segments_done: report.segments,
            segments: manifest.segments.len() as u64,
            bytes_done: report.segment_bytes,
            bytes,
        };
        progress(&at);
        for section in &segment.sections {
            verify_section(&segment, section, &mut |position| {
                at.bytes_done = report.segment_bytes + position;
                progress(&at);
            })?;
            found.entry(section.bucket).or_default().add_all(section.tally);
        }
        report.segments += 1;
        report.segment_bytes += entry.bytes;
    }
    for bucket in manifest.named_buckets() {
        if found.get(&bucket.bucket()) != Some(&bucket.tally()) {
            let what = format!("the segments do not add up to the bucket of {}", bucket.from);
            return Err(StoreError::corrupt(generation.name.manifest_file(), what));
        }
        report.keys += bucket.keys;
    }
    Ok(report)
}

/// Reads and checks every piece of a section; calls `reached` with a byte of the file per stride.
pub(super) fn verify_section(
    segment: &Segment,
    section: &Section,
    reached: &mut dyn FnMut(u64),
) -> Result<(), StoreError> {
    let mut filter_page = FilterPage { segment, section, page: None, bytes: Vec::new() };
    let mut index_page = Vec::new();
    let mut scan = SectionScan::new(segment, section, TRANSFER_BYTES_MAX as usize);
    while let Some(value) = scan.next()? {
        filter_page.check_holds(value)?;
        let Some((page, first)) = scan.page_begin() else { continue };
        let entry = (page % STRIDE_PAGES) as usize;
        if entry == 0 {
            let stride = page / STRIDE_PAGES;
            reached(section.page_position(page));
            index_page.resize(section.index_bytes(stride), 0);
            segment.read_sealed(&mut index_page, section.index_position(stride), "index page")?;
            if section.strides[stride as usize].value() != first {
                return Err(segment.corrupt(format!("the stride index is wrong about stride {stride}")));
            }
        }
        if fingerprint_at(&index_page, index_entry_offset(entry)) != first {
            return Err(segment.corrupt(format!("the page index is wrong about page {page}")));
        }
    }
    filter_page.read_to(section.filter.page_count() - 1)
}

/// The filter page that was read last, on a walk that reads each of them once.
struct FilterPage<'a> {
    segment: &'a Segment,
    section: &'a Section,
    page: Option<u64>,
    bytes: Vec<u8>,
}

impl FilterPage<'_> {
    fn check_holds(&mut self, value: u128) -> Result<(), StoreError> {
        let page = self.section.filter.page_of(value);
        self.read_to(page)?;
        let mut holds = false;
        self.section.filter.pass(&self.bytes, page, std::iter::once(value), |_| holds = true);
        if holds { Ok(()) } else { Err(self.segment.corrupt("a filter does not hold a key of its section")) }
    }

    /// Reads and checks all filter pages up to `page`.
    fn read_to(&mut self, page: u64) -> Result<(), StoreError> {
        for next in self.page.map_or(0, |read| read + 1)..=page {
            self.bytes.resize(self.section.filter.page_bytes(next), 0);
            let position = self.section.filter_position + next * super::page::PAGE_BYTES as u64;
            self.segment.read_sealed(&mut self.bytes, position, "filter page")?;
            self.page = Some(next);
        }
        Ok(())
    }
}
