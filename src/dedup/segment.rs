//! Segments: the exact half of duplicate detection.
//!
//! A segment is an immutable file of fingerprints. It has one section per bucket of event time, and a section is
//! sorted and without repeats: a filter that answers "certainly new" for most keys, and pages that settle the
//! rest.
//!
//! Flow: sorted fingerprints -> [`SegmentWriter`] -> file -> [`Segment::open`] -> `lookup` (seen before?) and
//! [`SectionScan`] (all of a section, in order: for merges and checks)
//!
//! Invariants
//! 1. Fingerprints of a section strictly increase (asserted on write, checked again on every scan).
//! 2. Every piece that is read carries its checksum, seeded by its segment and its place, and is believed only if
//!    it is intact. Losing a piece is an error, never "not seen".
//! 3. The manifest holds the checksum of header, directory and footer; those say where every piece stands.
//!
//! Layout of format version 3, little-endian. Positions count from the begin of the file. Earlier versions differ in the
//! kinds of filters and pages, which both are tags: version 1 has other Bloom filters and other pages, version 2 has no
//! ribbon filters. They are read for ever.
//! ```text
//! header     magic "TMDEDUP\0" | version u16 | low 32 bits of XXH3-64 over these 10 bytes | zero u16
//!            job id 16 B | key spec hash 64 B, zero-filled | epoch u64 | batch u64 | attempt 16 B | number u32
//!            page bytes u32                                                                        136 B in all
//! section    filter: see `filter.rs`, sealed pages of 4 KiB
//!            strides: up to 256 pages (see `page.rs`) of 4 KiB, then an index page:
//!              checksum u64 | first fingerprint of each page of the stride, 11 B each | zeros to 4 KiB
//!            the section's last page and last index page are cut to what they hold
//!            stride index: checksum u64 | first fingerprint of each stride, 11 B each
//! directory  per section, buckets ascending: bucket from, to i64 | smallest, largest event time i64 |
//!            keys u64 | digest u128 | filter tag u64 | filter position u64 | filter blocks u64 |
//!            pages position u64 | pages u64 | bytes of the last page u64                           104 B each
//! footer     directory position u64 | sections u64 | keys u64 | file bytes u64 |
//!            XXH3-128 over header, directory and the footer so far | magic "TMDDEND\0"              56 B
//! ```
//! Sections of many keys begin at multiples of 4 KiB, and so do their pages; the gaps are zeros that nobody reads.
//! The version is checked by its own checksum first: a flipped version is told apart from a newer program's.
//!
//! Bounds. Writing: two buffers, one page and the page firsts of one stride, whatever the number of keys, plus 11
//! bytes per stride. Open: 200 bytes per section plus 11 bytes per stride (130 000 keys). A scan: one read buffer
//! and one decoded page.

pub(super) mod alone;
mod bulk;

use std::fs::File;
use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::bucket::{Bucket, Digest, Tally};
use super::filter::{FilterEffort, FilterPages, FilterShape};
use super::generation::GenerationName;
use super::page::{
    CHECKSUM_BYTES, PAGE_BYTES, PAGE_HEAD_BYTES, PAGE_KEYS_MAX, PageBuilder, is_intact, page_holds,
    read_page, seal,
};
use super::reads::{ReadFile, Reads};
use super::{BUCKETS_MAX, KEY_SPEC_HASH_BYTES_MAX, StoreError, StoreSpec, disk};
use crate::event_time::EventTimeMs;
use crate::fingerprint::{FINGERPRINT_BYTES, Fingerprint};
use crate::mutant;

/// Newest segment format that this program reads, and the one that it writes.
pub(super) const SEGMENT_VERSION: u16 = 3;
/// Pages of a stride: those that one index page covers.
pub(super) const STRIDE_PAGES: u64 = 256;

pub(super) const MAGIC: [u8; 8] = *b"TMDEDUP\0";
const END_MAGIC: [u8; 8] = *b"TMDDEND\0";
const PRELUDE_BYTES: usize = 16;
const HEADER_BYTES: usize = 136;
const ENTRY_BYTES: usize = 104;
const FOOTER_BYTES: usize = 56;
/// Bytes from one stride's begin to the next one's.
const STRIDE_BYTES: u64 = (STRIDE_PAGES + 1) * PAGE_BYTES as u64;
/// Sections of at least this many keys begin at multiples of [`PAGE_BYTES`], for at most 1 % more bytes.
const ALIGNED_KEYS_MIN: u64 = 64 << 10;

/// Name of a segment file: the generation that wrote it, and a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct SegmentName {
    pub(super) generation: GenerationName,
    /// 0 is the batch's own segment, the others are merges and adopted loans.
    pub(super) number: u32,
}

/// What a manifest says of a segment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SegmentEntry {
    pub(super) name: SegmentName,
    pub(super) bytes: u64,
    /// Over header, directory and footer.
    pub(super) checksum: Digest,
    /// 0 for a batch's own segment, one more than its inputs for a merge; a segment that is rewritten keeps its own.
    pub(super) tier: u32,
    pub(super) keys: u64,
    pub(super) event_time_min: EventTimeMs,
    pub(super) event_time_max: EventTimeMs,
}

/// A section as the directory describes it, checked against the file's bounds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Section {
    pub(super) bucket: Bucket,
    pub(super) event_time_min: EventTimeMs,
    pub(super) event_time_max: EventTimeMs,
    pub(super) tally: Tally,
    pub(super) filter: FilterShape,
    pub(super) filter_position: u64,
    pub(super) pages_position: u64,
    pub(super) pages: u64,
    pub(super) last_page_bytes: u64,
    /// First fingerprint of each stride.
    pub(super) strides: Box<[Fingerprint]>,
}

impl Section {
    pub(super) fn stride_count(&self) -> u64 {
        self.pages.div_ceil(STRIDE_PAGES)
    }

    pub(super) fn page_position(&self, page: u64) -> u64 {
        self.pages_position + page / STRIDE_PAGES * STRIDE_BYTES + page % STRIDE_PAGES * PAGE_BYTES as u64
    }

    pub(super) fn page_bytes(&self, page: u64) -> usize {
        if page + 1 == self.pages { self.last_page_bytes as usize } else { PAGE_BYTES }
    }

    /// Pages `[begin, end)` of a stride.
    pub(super) fn stride_pages(&self, stride: u64) -> std::ops::Range<u64> {
        let begin = stride * STRIDE_PAGES;
        begin..self.pages.min(begin + STRIDE_PAGES)
    }

    pub(super) fn index_position(&self, stride: u64) -> u64 {
        let last = self.stride_pages(stride).end - 1;
        self.page_position(last) + self.page_bytes(last) as u64
    }

    pub(super) fn index_bytes(&self, stride: u64) -> usize {
        let pages = self.stride_pages(stride);
        if pages.end == self.pages {
            index_page_bytes((pages.end - pages.start) as usize)
        } else {
            PAGE_BYTES
        }
    }

    fn stride_index_position(&self) -> u64 {
        let last = self.stride_count() - 1;
        self.index_position(last) + self.index_bytes(last) as u64
    }

    pub(super) fn end(&self) -> u64 {
        self.stride_index_position() + index_page_bytes(self.stride_count() as usize) as u64
    }
}

fn index_page_bytes(entries: usize) -> usize {
    CHECKSUM_BYTES + entries * FINGERPRINT_BYTES
}

/// Where an entry of an index page begins.
pub(super) fn index_entry_offset(entry: usize) -> usize {
    index_page_bytes(entry)
}

/// Bytes written in order from a position on, in large pieces.
struct Stream {
    position: u64,
    buffer: Vec<u8>,
    buffer_bytes_max: usize,
}

impl Stream {
    fn at(position: u64, buffer_bytes_max: usize) -> Self {
        Self { position, buffer: Vec::new(), buffer_bytes_max }
    }

    /// Where the next byte will stand.
    fn end(&self) -> u64 {
        self.position + self.buffer.len() as u64
    }

    fn append(&mut self, file: &File, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= self.buffer_bytes_max { self.flush(file, name) } else { Ok(()) }
    }

    fn flush(&mut self, file: &File, name: &str) -> Result<(), StoreError> {
        disk::write_at(file, name, &self.buffer, self.position)?;
        self.position += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

/// Writes one segment: sections by ascending bucket, fingerprints of each in ascending order.
pub(super) struct SegmentWriter {
    file: File,
    file_name: String,
    header: [u8; HEADER_BYTES],
    seed: u64,
    end: u64,
    write_bytes_max: usize,
    /// Keys that a probe is looked for among, about.
    state_keys: u64,
    filter_effort: FilterEffort,
    directory: Vec<u8>,
    sections: u64,
    keys: u64,
    event_times: Option<(EventTimeMs, EventTimeMs)>,
    previous_bucket: Option<Bucket>,
}

/// A section that is being written.
pub(super) struct SectionWriter<'a> {
    segment: &'a mut SegmentWriter,
    section: Section,
    filter: Stream,
    filter_pages: FilterPages,
    filter_page: Vec<u8>,
    pages: Stream,
    page: PageBuilder,
    page_bytes: Vec<u8>,
    stride_firsts: Vec<Fingerprint>,
    strides: Vec<Fingerprint>,
    previous: Option<u128>,
    keys_max: u64,
}

impl SegmentWriter {
    /// Begins a segment in a file that was just created.
    pub(super) fn new(
        file: File,
        name: SegmentName,
        spec: &StoreSpec,
        write_bytes_max: usize,
        state_keys: u64,
        filter_effort: FilterEffort,
    ) -> Self {
        let header = header_of(SEGMENT_VERSION, name, spec);
        Self {
            file,
            file_name: name.to_string(),
            header,
            seed: xxh3_64(&header),
            end: HEADER_BYTES as u64,
            write_bytes_max,
            state_keys,
            filter_effort,
            directory: Vec::new(),
            sections: 0,
            keys: 0,
            event_times: None,
            previous_bucket: None,
        }
    }

    /// Begins the section of a bucket that will hold at most `keys_max` keys with these event times.
    ///
    /// # Panics
    /// If buckets do not ascend or a section has no keys.
    pub(super) fn section(
        &mut self,
        bucket: Bucket,
        event_times: (EventTimeMs, EventTimeMs),
        keys_max: u64,
    ) -> SectionWriter<'_> {
        assert!(self.previous_bucket < Some(bucket), "buckets of a segment ascend");
        assert!(keys_max > 0, "a section holds at least one key");
        self.previous_bucket = Some(bucket);
        let align = |position: u64| {
            if keys_max >= ALIGNED_KEYS_MIN { position.next_multiple_of(PAGE_BYTES as u64) } else { position }
        };
        let filter = FilterShape::for_keys(keys_max, self.state_keys, self.filter_effort);
        let filter_position = align(self.end);
        let filter_bytes = filter.bytes().expect("a filter has at least one block");
        let pages_position = align(filter_position + filter_bytes);
        let section = Section {
            bucket,
            event_time_min: event_times.0,
            event_time_max: event_times.1,
            tally: Tally::default(),
            filter,
            filter_position,
            pages_position,
            pages: 0,
            last_page_bytes: 0,
            strides: Box::default(),
        };
        SectionWriter {
            filter: Stream::at(filter_position, self.write_bytes_max),
            filter_pages: FilterPages::new(filter),
            filter_page: Vec::new(),
            pages: Stream::at(pages_position, self.write_bytes_max),
            page: PageBuilder::for_keys(keys_max),
            page_bytes: Vec::with_capacity(PAGE_BYTES),
            stride_firsts: Vec::new(),
            strides: Vec::new(),
            previous: None,
            keys_max,
            section,
            segment: self,
        }
    }

    /// Whether no section was written.
    pub(super) fn is_empty(&self) -> bool {
        self.sections == 0
    }

    /// Writes header, directory and footer and syncs the file. The folder is not synced yet.
    pub(super) fn finish(self, name: SegmentName, tier: u32) -> Result<(SegmentEntry, File), StoreError> {
        let (event_time_min, event_time_max) =
            self.event_times.expect("a segment that is finished holds a section");
        let bytes = self.end + (self.directory.len() + FOOTER_BYTES) as u64;
        let mut footer = Vec::with_capacity(FOOTER_BYTES);
        for number in [self.end, self.sections, self.keys, bytes] {
            footer.extend_from_slice(&number.to_le_bytes());
        }
        let checksum = frame_checksum(&self.header, &self.directory, &footer);
        footer.extend_from_slice(&checksum.to_le_bytes());
        footer.extend_from_slice(&END_MAGIC);

        crate::crash_point!("segment_pages_written");
        disk::write_at(&self.file, &self.file_name, &self.header, 0)?;
        crate::crash_point!("segment_header_written");
        disk::write_at(&self.file, &self.file_name, &self.directory, self.end)?;
        disk::write_at(&self.file, &self.file_name, &footer, self.end + self.directory.len() as u64)?;
        crate::crash_point!("segment_footer_written");
        mutant!("skip-segment-sync", () => disk::sync(&self.file, &self.file_name)?);
        crate::crash_point!("segment_synced");
        let entry = SegmentEntry {
            name,
            bytes,
            checksum: Digest(checksum),
            tier,
            keys: self.keys,
            event_time_min,
            event_time_max,
        };
        Ok((entry, self.file))
    }
}

impl SectionWriter<'_> {
    fn add_to_filter(&mut self, value: u128) -> Result<(), StoreError> {
        let page = self.filter_pages.page_of(value);
        while self.filter_pages.page() < page {
            self.write_filter_page()?;
        }
        self.filter_pages.insert(value);
        Ok(())
    }

    fn write_filter_page(&mut self) -> Result<(), StoreError> {
        self.filter_pages.take_page(&mut self.filter_page);
        seal(&mut self.filter_page, self.segment.seed, self.filter.end());
        self.filter.append(&self.segment.file, &self.segment.file_name, &self.filter_page)
    }

    fn write_page(&mut self, last: bool) -> Result<(), StoreError> {
        let first = self.page.first().expect("a page that is written holds a key");
        let mut page = std::mem::take(&mut self.page_bytes);
        page.clear();
        self.page.take_page(&mut page);
        if last {
            self.section.last_page_bytes = page.len() as u64;
        } else {
            page.resize(PAGE_BYTES, 0);
        }
        self.append_sealed(&mut page)?;
        self.page_bytes = page;
        self.section.pages += 1;
        if self.stride_firsts.is_empty() {
            self.strides.push(Fingerprint::from_value(first));
        }
        self.stride_firsts.push(Fingerprint::from_value(first));
        if last || self.stride_firsts.len() as u64 == STRIDE_PAGES {
            let mut index = index_page(&self.stride_firsts);
            if !last {
                index.resize(PAGE_BYTES, 0);
            }
            self.append_sealed(&mut index)?;
            self.stride_firsts.clear();
        }
        Ok(())
    }

    fn append_sealed(&mut self, piece: &mut [u8]) -> Result<(), StoreError> {
        seal(piece, self.segment.seed, self.pages.end());
        self.pages.append(&self.segment.file, &self.segment.file_name, piece)
    }

    /// Ends the section and enters it in the directory.
    ///
    /// # Panics
    /// If the section holds no key.
    pub(super) fn finish(mut self) -> Result<Tally, StoreError> {
        self.write_page(true)?;
        let mut stride_index = index_page(&self.strides);
        self.append_sealed(&mut stride_index)?;
        while self.filter_pages.page() < self.section.filter.page_count() {
            self.write_filter_page()?;
        }
        self.filter.flush(&self.segment.file, &self.segment.file_name)?;
        self.pages.flush(&self.segment.file, &self.segment.file_name)?;

        let section = &self.section;
        let segment = self.segment;
        write_entry(section, &mut segment.directory);
        segment.end = self.pages.end();
        segment.sections += 1;
        segment.keys += section.tally.keys;
        let (min, max) = segment.event_times.unwrap_or((section.event_time_min, section.event_time_max));
        segment.event_times = Some((min.min(section.event_time_min), max.max(section.event_time_max)));
        Ok(section.tally)
    }
}

fn index_page(firsts: &[Fingerprint]) -> Vec<u8> {
    let mut page = Vec::with_capacity(PAGE_BYTES);
    page.extend_from_slice(&[0; CHECKSUM_BYTES]);
    for first in firsts {
        page.extend_from_slice(first.as_bytes());
    }
    page
}

fn header_of(version: u16, name: SegmentName, spec: &StoreSpec) -> [u8; HEADER_BYTES] {
    let mut key_spec_hash = [0; KEY_SPEC_HASH_BYTES_MAX];
    key_spec_hash[..spec.key_spec_hash.len()].copy_from_slice(spec.key_spec_hash.as_bytes());
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    bytes.extend_from_slice(&prelude(version));
    bytes.extend_from_slice(spec.job_id.as_bytes());
    bytes.extend_from_slice(&key_spec_hash);
    bytes.extend_from_slice(&name.generation.epoch.to_le_bytes());
    bytes.extend_from_slice(&name.generation.batch.to_le_bytes());
    bytes.extend_from_slice(name.generation.attempt.as_bytes());
    bytes.extend_from_slice(&name.number.to_le_bytes());
    bytes.extend_from_slice(&(PAGE_BYTES as u32).to_le_bytes());
    bytes.try_into().expect("the parts of a header are 136 bytes")
}

pub(super) fn prelude(version: u16) -> [u8; PRELUDE_BYTES] {
    let mut bytes = [0; PRELUDE_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&version.to_le_bytes());
    let check = xxh3_64(&bytes[..10]) as u32;
    bytes[10..14].copy_from_slice(&check.to_le_bytes());
    bytes
}

fn write_entry(section: &Section, directory: &mut Vec<u8>) {
    let times = [section.bucket.from, section.bucket.to, section.event_time_min, section.event_time_max];
    for time in times {
        directory.extend_from_slice(&time.0.to_le_bytes());
    }
    directory.extend_from_slice(&section.tally.keys.to_le_bytes());
    directory.extend_from_slice(&section.tally.digest.0.to_le_bytes());
    let numbers = [
        section.filter.kind().tag(),
        section.filter_position,
        section.filter.blocks(),
        section.pages_position,
        section.pages,
        section.last_page_bytes,
    ];
    for number in numbers {
        directory.extend_from_slice(&number.to_le_bytes());
    }
    assert!(directory.len().is_multiple_of(ENTRY_BYTES), "an entry of the directory has its size");
}

fn frame_checksum(header: &[u8], directory: &[u8], footer: &[u8]) -> u128 {
    let mut frame = Vec::with_capacity(header.len() + directory.len() + footer.len());
    frame.extend_from_slice(header);
    frame.extend_from_slice(directory);
    frame.extend_from_slice(footer);
    xxh3_128(&frame)
}

/// Reads little-endian numbers one after another from bytes whose length was checked.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const BYTES: usize>(&mut self) -> [u8; BYTES] {
        let (field, rest) = self.0.split_first_chunk().expect("the length of the fields was checked");
        self.0 = rest;
        *field
    }

    fn number(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn time(&mut self) -> EventTimeMs {
        EventTimeMs(i64::from_le_bytes(self.take()))
    }
}

/// An open segment whose header, directory and footer were checked. Its pages are checked as they are read.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) entry: SegmentEntry,
    /// By ascending bucket.
    pub(super) sections: Vec<Section>,
    file: ReadFile,
    file_name: String,
    seed: u64,
}

impl Segment {
    /// Opens the segment that a manifest names and checks length, header, directory, footer and stride indexes.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::Corrupt`], [`StoreError::NewerFormat`], [`StoreError::Io`].
    pub(super) fn open(folder: &Path, entry: &SegmentEntry, spec: &StoreSpec) -> Result<Self, StoreError> {
        let file = disk::open(folder, &entry.name.to_string())?;
        Self::from_file(file, entry, spec)
    }

    /// As [`Segment::open`], of a file that is open already.
    pub(super) fn from_file(file: File, entry: &SegmentEntry, spec: &StoreSpec) -> Result<Self, StoreError> {
        let file_name = entry.name.to_string();
        let corrupt = |what: String| StoreError::corrupt(&file_name, what);
        let bytes = file.metadata().map_err(|error| StoreError::io("inspect", &file_name, error))?.len();
        if bytes != entry.bytes {
            return Err(corrupt(format!("it has {bytes} bytes where the manifest says {}", entry.bytes)));
        }
        if bytes < (HEADER_BYTES + FOOTER_BYTES) as u64 {
            return Err(corrupt(format!("{bytes} bytes are too few for a segment")));
        }
        let mut header = [0; HEADER_BYTES];
        disk::read_at(&file, &file_name, &mut header, 0)?;
        let version = check_prelude(&header, &file_name)?;
        if header != header_of(version, entry.name, spec) {
            return Err(corrupt("its header is that of another segment, job or key spec".to_owned()));
        }
        let mut footer = [0; FOOTER_BYTES];
        disk::read_at(&file, &file_name, &mut footer, bytes - FOOTER_BYTES as u64)?;
        let frame = Frame::read(&footer, entry).map_err(corrupt)?;
        let mut directory = vec![0; frame.sections * ENTRY_BYTES];
        disk::read_at(&file, &file_name, &mut directory, frame.directory_position)?;
        let checksum = frame_checksum(&header, &directory, &footer[..32]);
        if Digest(checksum) != entry.checksum {
            let found = Digest(checksum);
            return Err(corrupt(format!(
                "its checksum is {found} where the manifest says {}",
                entry.checksum
            )));
        }
        let sections = read_directory(&directory, &frame, entry).map_err(corrupt)?;
        let seed = xxh3_64(&header);
        let file = disk::for_reads(file, bytes);
        let mut segment = Self { entry: entry.clone(), sections, file, file_name, seed };
        segment.read_stride_indexes()?;
        Ok(segment)
    }

    /// The job that the header of a file names, if it has a header.
    pub(super) fn job_id_of(folder: &Path, file_name: &str) -> Option<Uuid> {
        let file = disk::open(folder, file_name).ok()?;
        let mut header = [0; HEADER_BYTES];
        disk::read_at(&file, file_name, &mut header, 0).ok()?;
        let job_id = header[PRELUDE_BYTES..].first_chunk::<16>()?;
        (header[..8] == MAGIC).then(|| Uuid::from_bytes(*job_id))
    }

    fn read_stride_indexes(&mut self) -> Result<(), StoreError> {
        for section_index in 0..self.sections.len() {
            let section = &self.sections[section_index];
            let mut piece = vec![0; index_page_bytes(section.stride_count() as usize)];
            self.read_sealed(&mut piece, section.stride_index_position(), "stride index")?;
            let strides: Box<[Fingerprint]> = piece[CHECKSUM_BYTES..]
                .chunks_exact(FINGERPRINT_BYTES)
                .filter_map(|bytes| bytes.first_chunk().copied().map(Fingerprint::from_bytes))
                .collect();
            if !strides.is_sorted() {
                return Err(self.corrupt("a stride index is not sorted"));
            }
            self.sections[section_index].strides = strides;
        }
        Ok(())
    }

    pub(super) fn corrupt(&self, what: impl Into<String>) -> StoreError {
        StoreError::corrupt(&self.file_name, what)
    }

    /// Reads bytes that the caller checks piece by piece with [`Segment::check_sealed`].
    pub(super) fn read(&self, bytes: &mut [u8], position: u64) -> Result<(), StoreError> {
        disk::read_at(&self.file.buffered, &self.file_name, bytes, position)
    }

    /// Begins a read whose bytes the caller checks as those of [`Segment::read`].
    pub(super) fn start_read(
        &self,
        reads: &mut Reads,
        position: u64,
        bytes: usize,
        tag: u64,
    ) -> Result<(), StoreError> {
        reads.start(&self.file, position, bytes, tag).map_err(|error| self.read_failed(error))
    }

    /// The error of a read. A file that ends early is corrupt: its length was checked when it was opened.
    pub(super) fn read_failed(&self, error: std::io::Error) -> StoreError {
        disk::read_failed(&self.file_name, error)
    }

    /// Refuses a piece that is not what was written at `position`.
    pub(super) fn check_sealed(&self, piece: &[u8], position: u64, kind: &str) -> Result<(), StoreError> {
        if mutant!("torn-pages-read", true => is_intact(piece, self.seed, position)) {
            Ok(())
        } else {
            Err(self.corrupt(format!("the checksum of the {kind} at byte {position} is wrong")))
        }
    }

    /// Reads and checks one sealed piece.
    pub(super) fn read_sealed(&self, piece: &mut [u8], position: u64, kind: &str) -> Result<(), StoreError> {
        self.read(piece, position)?;
        self.check_sealed(piece, position, kind)
    }

    /// Decodes a page that was read from `position`.
    pub(super) fn read_page(
        &self,
        page: &[u8],
        position: u64,
        values: &mut Vec<u128>,
    ) -> Result<(), StoreError> {
        self.check_sealed(page, position, "page")?;
        read_page(page, values).map_err(|what| self.corrupt(format!("{what}, at byte {position}")))
    }

    /// Whether a page whose checksum was checked holds a fingerprint.
    pub(super) fn page_holds(&self, page: &[u8], position: u64, value: u128) -> Result<bool, StoreError> {
        let held = page_holds(page, value);
        let held = mutant!("filter-alone-drops", held.map(|_| true) => held);
        held.map_err(|what| self.corrupt(format!("{what}, at byte {position}")))
    }
}

/// The format version of a header that is one.
fn check_prelude(header: &[u8; HEADER_BYTES], file_name: &str) -> Result<u16, StoreError> {
    let version = u16::from_le_bytes([header[8], header[9]]);
    if header[..PRELUDE_BYTES] != prelude(version) {
        return Err(StoreError::corrupt(file_name, "its first bytes are not those of a segment"));
    }
    if version > SEGMENT_VERSION {
        return Err(StoreError::NewerFormat {
            file: file_name.to_owned(),
            found: version.into(),
            known: SEGMENT_VERSION.into(),
        });
    }
    if version == 0 {
        return Err(StoreError::corrupt(file_name, "format version 0 never was"));
    }
    Ok(version)
}

/// What the footer says, checked against the file's length.
struct Frame {
    directory_position: u64,
    sections: usize,
}

impl Frame {
    fn read(footer: &[u8; FOOTER_BYTES], entry: &SegmentEntry) -> Result<Self, String> {
        let mut fields = Fields(footer);
        let directory_position = fields.number();
        let sections = fields.number();
        let keys = fields.number();
        let bytes = fields.number();
        let checksum = u128::from_le_bytes(fields.take());
        let end_magic: [u8; 8] = fields.take();
        if end_magic != END_MAGIC || Digest(checksum) != entry.checksum {
            return Err("its footer is not the one that the manifest names".to_owned());
        }
        if bytes != entry.bytes || keys != entry.keys {
            return Err("its footer and the manifest disagree on keys or bytes".to_owned());
        }
        let sections = usize::try_from(sections).unwrap_or(usize::MAX);
        let directory_bytes = bytes.saturating_sub(directory_position);
        let fits = sections <= BUCKETS_MAX
            && directory_position >= HEADER_BYTES as u64
            && directory_bytes == (sections * ENTRY_BYTES + FOOTER_BYTES) as u64;
        if !fits {
            return Err("its footer places the directory outside of the file".to_owned());
        }
        Ok(Self { directory_position, sections })
    }
}

fn read_directory(directory: &[u8], frame: &Frame, entry: &SegmentEntry) -> Result<Vec<Section>, String> {
    let mut sections: Vec<Section> = Vec::with_capacity(frame.sections);
    let mut end = HEADER_BYTES as u64;
    let mut keys = 0u64;
    for bytes in directory.chunks_exact(ENTRY_BYTES) {
        let section = read_entry(bytes, end, frame.directory_position)
            .ok_or_else(|| "its directory places a section outside of the file".to_owned())?;
        if sections.last().is_some_and(|earlier| earlier.bucket.to > section.bucket.from) {
            return Err("the buckets of its directory do not ascend".to_owned());
        }
        end = section.end();
        keys = keys.saturating_add(section.tally.keys);
        sections.push(section);
    }
    if keys != entry.keys {
        return Err(format!("its sections hold {keys} keys where the manifest says {}", entry.keys));
    }
    Ok(sections)
}

/// A section whose pieces all lie in `[begin, end)` of the file; `None` if they do not.
fn read_entry(bytes: &[u8], begin: u64, end: u64) -> Option<Section> {
    let mut fields = Fields(bytes);
    let bucket = Bucket { from: fields.time(), to: fields.time() };
    let (event_time_min, event_time_max) = (fields.time(), fields.time());
    let keys = fields.number();
    let digest = Digest(u128::from_le_bytes(fields.take()));
    let filter_tag = fields.number();
    let filter_position = fields.number();
    let filter = FilterShape::described(filter_tag, fields.number())?;
    let section = Section {
        bucket,
        event_time_min,
        event_time_max,
        tally: Tally { keys, digest },
        filter,
        filter_position,
        pages_position: fields.number(),
        pages: fields.number(),
        last_page_bytes: fields.number(),
        strides: Box::default(),
    };
    // Numbers that are no larger than the file can not overflow in what follows.
    let plausible = bucket.from < bucket.to
        && section.filter.blocks() <= end
        && (1..=end / PAGE_HEAD_BYTES as u64).contains(&section.pages)
        && section.pages <= keys
        && keys.div_ceil(PAGE_KEYS_MAX as u64) <= section.pages
        && (PAGE_HEAD_BYTES as u64..=PAGE_BYTES as u64).contains(&section.last_page_bytes);
    if !plausible {
        return None;
    }
    let filter_end = section.filter_position.checked_add(section.filter.bytes()?)?;
    let pages_end = section.pages_position.checked_add(section.pages.checked_mul(PAGE_BYTES as u64 * 2)?)?;
    let fits = section.filter_position >= begin
        && section.pages_position >= filter_end
        && pages_end > section.pages_position
        && section.end() <= end;
    fits.then_some(section)
}

/// Walks all fingerprints of a section in order, with bounded memory, and checks them against the directory.
pub(super) struct SectionScan<'a> {
    segment: &'a Segment,
    section: &'a Section,
    read_pages_max: u64,
    /// Pages `[next_page - pages in the buffer.., next_page)` that were read and not yet decoded.
    buffer: Vec<u8>,
    buffer_begin: usize,
    next_page: u64,
    values: Vec<u128>,
    next_value: usize,
    previous: Option<u128>,
    tally: Tally,
    /// Keys of the pages that were taken in bulk.
    taken_keys: u64,
}

impl<'a> SectionScan<'a> {
    pub(super) fn new(segment: &'a Segment, section: &'a Section, read_bytes_max: usize) -> Self {
        Self {
            segment,
            section,
            read_pages_max: (read_bytes_max / PAGE_BYTES).max(1) as u64,
            buffer: Vec::new(),
            buffer_begin: 0,
            next_page: 0,
            values: Vec::new(),
            next_value: 0,
            previous: None,
            tally: Tally::default(),
            taken_keys: 0,
        }
    }

    /// The next fingerprint; `None` at the end, when count and digest were found to be the directory's.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if a page is not intact, order is broken, or the keys are not those that the
    /// directory counts.
    pub(super) fn next(&mut self) -> Result<Option<u128>, StoreError> {
        while self.next_value == self.values.len() {
            if self.next_page == self.section.pages {
                return self.finish().map(|()| None);
            }
            self.decode_page()?;
        }
        let value = self.values[self.next_value];
        self.next_value += 1;
        if self.previous >= Some(value) {
            return Err(self.segment.corrupt("fingerprints of a section do not increase"));
        }
        self.previous = Some(value);
        self.tally.add(Fingerprint::from_value(value));
        Ok(Some(value))
    }

    /// First fingerprint of the page that was decoded last, and the page's number.
    pub(super) fn page_begin(&self) -> Option<(u64, u128)> {
        (self.next_value == 1).then(|| (self.next_page - 1, self.values[0]))
    }

    fn decode_page(&mut self) -> Result<(), StoreError> {
        if self.buffer_begin == self.buffer.len() {
            self.fill_buffer()?;
        }
        let bytes = self.section.page_bytes(self.next_page);
        let page = &self.buffer[self.buffer_begin..self.buffer_begin + bytes];
        self.segment.read_page(page, self.section.page_position(self.next_page), &mut self.values)?;
        self.buffer_begin += bytes;
        self.next_page += 1;
        self.next_value = 0;
        Ok(())
    }

    fn fill_buffer(&mut self) -> Result<(), StoreError> {
        let stride_end = self.section.stride_pages(self.next_page / STRIDE_PAGES).end;
        let end = stride_end.min(self.next_page + self.read_pages_max);
        let begin_position = self.section.page_position(self.next_page);
        let end_position = self.section.page_position(end - 1) + self.section.page_bytes(end - 1) as u64;
        self.buffer.resize((end_position - begin_position) as usize, 0);
        self.buffer_begin = 0;
        self.segment.read(&mut self.buffer, begin_position)
    }

    fn finish(&self) -> Result<(), StoreError> {
        if self.tally == self.section.tally {
            return Ok(());
        }
        let what = format!(
            "the section of {} holds {} keys with digest {} where its directory says {} with {}",
            self.section.bucket.from,
            self.tally.keys,
            self.tally.digest,
            self.section.tally.keys,
            self.section.tally.digest
        );
        Err(self.segment.corrupt(what))
    }
}
