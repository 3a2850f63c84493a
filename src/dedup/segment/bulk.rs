//! Sections in bulk: whole pages out of a section and sorted runs into one, for merges.
//!
//! The digest of a section costs a hash per key. A merge takes it once, of what it writes, and compares the sum with
//! what the directories of its inputs say; so pages that are taken here are checked by their checksums and their
//! order alone. Pages that were taken are not kept in the page cache, where they would push out what lookups need.

use super::super::bucket::Tally;
use super::super::{StoreError, disk};
use super::{Section, SectionScan, SectionWriter, Segment};
use crate::fingerprint::Fingerprint;

/// Fingerprints that go through one piece of the work together: 16 KiB.
const CHUNK_KEYS: usize = 1024;

impl SectionScan<'_> {
    /// Appends the fingerprints of the next page; `false` if there is none. Not to be mixed with `next`: whether count
    /// and digest are those of the directory is left to the caller.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if the page is not intact or order is broken.
    pub(in crate::dedup) fn append_page(&mut self, values: &mut Vec<u128>) -> Result<bool, StoreError> {
        if self.next_page == self.section.pages {
            return Ok(false);
        }
        let is_read = self.buffer_begin == self.buffer.len();
        self.decode_page()?;
        if is_read {
            self.advise();
        }
        let follows = self.values.first() > self.previous.as_ref();
        if !follows || !self.values.is_sorted_by(|one, next| one < next) {
            return Err(self.segment.corrupt("fingerprints of a section do not increase"));
        }
        self.taken_keys += self.values.len() as u64;
        if self.taken_keys > self.section.tally.keys {
            let told = self.section.tally.keys;
            return Err(self
                .segment
                .corrupt(format!("a section holds more keys than the {told} that its directory counts")));
        }
        self.previous = self.values.last().copied();
        values.extend_from_slice(&self.values);
        Ok(true)
    }

    /// Asks for the pages after those in the buffer, and lets the page cache forget those in it.
    fn advise(&self) {
        let page = self.next_page - 1;
        let bytes = self.buffer.len() as u64;
        let begin = self.section.page_position(page);
        disk::forget(&self.segment.file.buffered, begin, bytes);
        disk::read_ahead(&self.segment.file.buffered, begin + bytes, bytes);
    }
}

impl SectionWriter<'_> {
    /// What was taken so far.
    pub(in crate::dedup) fn written(&self) -> Tally {
        self.section.tally
    }

    /// Takes the next fingerprints.
    ///
    /// # Panics
    /// If fingerprints do not strictly increase or are more than were announced.
    pub(in crate::dedup) fn push_all(&mut self, values: &[u128]) -> Result<(), StoreError> {
        for chunk in values.chunks(CHUNK_KEYS) {
            self.push_chunk(chunk)?;
        }
        Ok(())
    }

    /// A loop for each piece of work keeps what it needs in registers; what they go over stays in the first cache.
    fn push_chunk(&mut self, values: &[u128]) -> Result<(), StoreError> {
        let increases =
            self.previous.as_ref() < values.first() && values.is_sorted_by(|one, next| one < next);
        assert!(increases, "fingerprints of a section strictly increase");
        self.previous = values.last().copied();
        for value in values {
            self.section.tally.add(Fingerprint::from_value(*value));
        }
        assert!(self.section.tally.keys <= self.keys_max, "a section holds no more keys than announced");
        for value in values {
            self.add_to_filter(*value)?;
        }
        for value in values {
            if !self.page.push(*value) {
                self.write_page(false)?;
                let taken = self.page.push(*value);
                assert!(taken, "an empty page takes any fingerprint");
            }
        }
        Ok(())
    }
}

impl Segment {
    /// Lets the page cache forget a file that was just written and synced, or read for the last time.
    pub(in crate::dedup) fn forget_cached(&self) {
        disk::forget(&self.file.buffered, 0, self.entry.bytes);
    }

    /// Reads a whole section and compares it with its directory entry.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] names this file if anything differs.
    pub(in crate::dedup) fn check_section(
        &self,
        section: &Section,
        read_bytes_max: usize,
    ) -> Result<(), StoreError> {
        let mut scan = SectionScan::new(self, section, read_bytes_max);
        while scan.next()?.is_some() {}
        Ok(())
    }
}
