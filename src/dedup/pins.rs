//! Pieces of segments that stay in memory: page indexes, then filters, newest bucket first.
//!
//! Which pieces stay is planned when the generation changes and never by use: every probe walks every filter, and
//! against a cyclic walk a least-recently-used cache of less than all keeps nothing. A planned piece is read and
//! checked when it is first needed.
//!
//! Bounds: the bytes of the plan, whatever the generation holds.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::StoreError;
use super::filter;
use super::page::{CHECKSUM_BYTES, PAGE_BYTES};
use super::segment::{Segment, SegmentName};
use crate::fingerprint::FINGERPRINT_BYTES;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Piece {
    /// First fingerprints of all pages of a section.
    PageIndex,
    /// All filter pages of a section, as they stand in the file.
    Filter,
}

type PinKey = (SegmentName, usize, Piece);

/// Pieces in memory and those that are to be there once they are needed.
#[derive(Debug)]
pub(super) struct Pins {
    bytes_max: u64,
    pieces: BTreeMap<PinKey, Option<Box<[u8]>>>,
}

impl Pins {
    pub(super) fn new(bytes_max: u64) -> Self {
        Self { bytes_max, pieces: BTreeMap::new() }
    }

    /// Plans for a generation, whose segments come oldest first. Pieces that stay are not read again.
    pub(super) fn plan(&mut self, segments: &[Arc<Segment>]) {
        let mut wanted = Vec::new();
        for (age, segment) in segments.iter().rev().enumerate() {
            for (section_index, section) in segment.sections.iter().enumerate() {
                let index_bytes = section.pages * FINGERPRINT_BYTES as u64;
                let filter_bytes = filter::filter_bytes(section.filter_blocks).unwrap_or(u64::MAX);
                for (piece, bytes) in [(Piece::PageIndex, index_bytes), (Piece::Filter, filter_bytes)] {
                    let key = (segment.entry.name, section_index, piece);
                    wanted.push((piece, Reverse(section.bucket), age, key, bytes));
                }
            }
        }
        wanted.sort();
        let mut earlier = std::mem::take(&mut self.pieces);
        let mut bytes_left = self.bytes_max;
        for (_, _, _, key, bytes) in wanted {
            if bytes <= bytes_left {
                bytes_left -= bytes;
                self.pieces.insert(key, earlier.remove(&key).flatten());
            }
        }
    }

    /// The whole filter of a section, if the plan holds it.
    pub(super) fn filter(
        &mut self,
        segment: &Segment,
        section_index: usize,
    ) -> Result<Option<&[u8]>, StoreError> {
        self.piece(segment, section_index, Piece::Filter)
    }

    /// The first fingerprints of all pages of a section, if the plan holds them.
    pub(super) fn page_index(
        &mut self,
        segment: &Segment,
        section_index: usize,
    ) -> Result<Option<&[u8]>, StoreError> {
        self.piece(segment, section_index, Piece::PageIndex)
    }

    /// Bytes that are in memory now.
    pub(super) fn bytes(&self) -> u64 {
        self.pieces.values().flatten().map(|piece| piece.len() as u64).sum()
    }

    fn piece(
        &mut self,
        segment: &Segment,
        section_index: usize,
        piece: Piece,
    ) -> Result<Option<&[u8]>, StoreError> {
        match self.pieces.get_mut(&(segment.entry.name, section_index, piece)) {
            None => Ok(None),
            Some(Some(bytes)) => Ok(Some(bytes)),
            Some(empty) => {
                let bytes = match piece {
                    Piece::PageIndex => read_page_index(segment, section_index)?,
                    Piece::Filter => read_filter(segment, section_index)?,
                };
                Ok(Some(empty.insert(bytes)))
            }
        }
    }
}

fn read_filter(segment: &Segment, section_index: usize) -> Result<Box<[u8]>, StoreError> {
    let section = &segment.sections[section_index];
    let bytes = filter::filter_bytes(section.filter_blocks).unwrap_or_default();
    let mut pages = vec![0; bytes as usize];
    segment.read(&mut pages, section.filter_position)?;
    for (page_index, page) in pages.chunks(PAGE_BYTES).enumerate() {
        let position = section.filter_position + (page_index * PAGE_BYTES) as u64;
        segment.check_sealed(page, position, "filter page")?;
    }
    Ok(pages.into())
}

fn read_page_index(segment: &Segment, section_index: usize) -> Result<Box<[u8]>, StoreError> {
    let section = &segment.sections[section_index];
    let mut firsts = Vec::with_capacity(section.pages as usize * FINGERPRINT_BYTES);
    let mut index_page = Vec::new();
    for stride in 0..section.stride_count() {
        index_page.resize(section.index_bytes(stride), 0);
        segment.read_sealed(&mut index_page, section.index_position(stride), "index page")?;
        let pages = section.stride_pages(stride);
        let bytes = (pages.end - pages.start) as usize * FINGERPRINT_BYTES;
        firsts.extend_from_slice(&index_page[CHECKSUM_BYTES..CHECKSUM_BYTES + bytes]);
    }
    Ok(firsts.into())
}
