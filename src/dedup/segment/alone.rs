//! A segment by itself: opened by what it says, without the manifest that names it.
//!
//! For a look at any file, and for fuzzers. Everything is checked as [`Segment::open`] checks it, and a wrong piece is
//! named with its byte; what only a manifest can tell (whether it is the right segment) stays open.

use std::fs::File;

use uuid::Uuid;

use super::{
    BUCKETS_MAX, END_MAGIC, ENTRY_BYTES, FOOTER_BYTES, Fields, Frame, HEADER_BYTES, MAGIC, PRELUDE_BYTES,
    Section, Segment, SegmentEntry, SegmentName, check_prelude, frame_checksum, prelude, read_entry,
};
use crate::dedup::bucket::Digest;
use crate::dedup::generation::GenerationName;
use crate::dedup::page::{PAGE_BYTES, seal};
use crate::dedup::{KEY_SPEC_HASH_BYTES_MAX, StoreError, StoreSpec, disk};
use crate::event_time::EventTimeMs;
use crate::job::Repeats;
use xxhash_rust::xxh3::xxh3_64;

/// Where the checksum stands within the footer.
const FOOTER_CHECKSUM_OFFSET: usize = 32;

/// What the header of a segment says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::dedup) struct Origin {
    pub(in crate::dedup) version: u16,
    pub(in crate::dedup) job_id: Uuid,
    pub(in crate::dedup) key_spec_hash: String,
    pub(in crate::dedup) name: SegmentName,
}

impl Origin {
    /// Reads the header of a file.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] and [`StoreError::NewerFormat`].
    pub(in crate::dedup) fn of_file(file: &File, file_name: &str) -> Result<Self, StoreError> {
        let bytes = file.metadata().map_err(|error| StoreError::io("inspect", file_name, error))?.len();
        if bytes < HEADER_BYTES as u64 {
            let what = format!("it ends at byte {bytes}, within the header of {HEADER_BYTES} bytes");
            return Err(StoreError::corrupt(file_name, what));
        }
        let mut header = [0; HEADER_BYTES];
        disk::read_at(file, file_name, &mut header, 0)?;
        Self::of_header(&header, file_name)
    }

    fn of_header(header: &[u8; HEADER_BYTES], file_name: &str) -> Result<Self, StoreError> {
        check_prelude(header, file_name)?;
        let mut fields = Fields(&header[PRELUDE_BYTES..]);
        let job_id = Uuid::from_bytes(fields.take());
        let hash: [u8; KEY_SPEC_HASH_BYTES_MAX] = fields.take();
        let (epoch, batch) = (fields.number(), fields.number());
        let attempt = Uuid::from_bytes(fields.take());
        let number = u32::from_le_bytes(fields.take());
        let page_bytes = u32::from_le_bytes(fields.take());
        if page_bytes != PAGE_BYTES as u32 {
            let what = format!("its header says pages of {page_bytes} bytes, at byte {}", HEADER_BYTES - 4);
            return Err(StoreError::corrupt(file_name, what));
        }
        let hash_bytes = hash.iter().position(|byte| *byte == 0).unwrap_or(hash.len());
        let hash_begin = PRELUDE_BYTES + 16;
        let plain = hash_bytes > 0
            && hash[..hash_bytes].iter().all(u8::is_ascii_graphic)
            && hash[hash_bytes..].iter().all(|byte| *byte == 0);
        if !plain {
            let what = format!("the key spec hash of its header, at byte {hash_begin}, is no hash");
            return Err(StoreError::corrupt(file_name, what));
        }
        Ok(Self {
            version: u16::from_le_bytes([header[8], header[9]]),
            job_id,
            key_spec_hash: String::from_utf8_lossy(&hash[..hash_bytes]).into_owned(),
            name: SegmentName { generation: GenerationName::new(epoch, batch, attempt), number },
        })
    }

    /// As much of a spec as a segment knows.
    fn spec(&self) -> StoreSpec {
        StoreSpec {
            job_id: self.job_id,
            key_spec_hash: self.key_spec_hash.clone(),
            seed: 0,
            shards: 1,
            bucket_width_ms: 1,
            repeats: Repeats::AnyTime,
        }
    }
}

/// Opens a segment and checks header, directory, footer and stride indexes against each other.
///
/// # Errors
/// [`StoreError::Corrupt`] with the byte where it is wrong, [`StoreError::NewerFormat`], [`StoreError::Io`].
pub(in crate::dedup) fn open(file: File, file_name: &str) -> Result<(Segment, Origin), StoreError> {
    let corrupt = |what: String| StoreError::corrupt(file_name, what);
    let origin = Origin::of_file(&file, file_name)?;
    let bytes = file.metadata().map_err(|error| StoreError::io("inspect", file_name, error))?.len();
    if bytes < (HEADER_BYTES + FOOTER_BYTES) as u64 {
        return Err(corrupt(format!("it ends at byte {bytes}: its footer is gone")));
    }
    let mut header = [0; HEADER_BYTES];
    disk::read_at(&file, file_name, &mut header, 0)?;
    let footer_position = bytes - FOOTER_BYTES as u64;
    let mut footer = [0; FOOTER_BYTES];
    disk::read_at(&file, file_name, &mut footer, footer_position)?;
    let entry = entry_of(&footer, bytes, &origin).map_err(|(offset, what)| {
        let position = footer_position + offset;
        corrupt(format!("{what}, at byte {position}: the file was cut short, written over or appended to"))
    })?;
    let frame =
        Frame::read(&footer, &entry).map_err(|what| corrupt(format!("{what}, at byte {footer_position}")))?;
    let mut directory = vec![0; frame.sections * ENTRY_BYTES];
    disk::read_at(&file, file_name, &mut directory, frame.directory_position)?;
    let checksum = frame_checksum(&header, &directory, &footer[..FOOTER_CHECKSUM_OFFSET]);
    if Digest(checksum) != entry.checksum {
        return Err(corrupt(format!(
            "the checksum at byte {} is wrong about the header (bytes 0 to {HEADER_BYTES}), the directory or the footer \
             (bytes {} to {bytes})",
            footer_position + FOOTER_CHECKSUM_OFFSET as u64,
            frame.directory_position,
        )));
    }
    if let Err(entry_index) = sections_of(&directory, frame.directory_position) {
        let position = frame.directory_position + (entry_index * ENTRY_BYTES) as u64;
        return Err(corrupt(format!(
            "its directory places a section outside of the file, at byte {position}"
        )));
    }
    let segment =
        Segment::from_file(file, &entry, &origin.spec()).map_err(|error| renamed(error, file_name))?;
    Ok((segment, origin))
}

/// The error as one of this file, whatever name the header gives it.
pub(in crate::dedup) fn renamed(error: StoreError, file_name: &str) -> StoreError {
    match error {
        StoreError::Corrupt { what, .. } => StoreError::corrupt(file_name, what),
        other => other,
    }
}

/// What a manifest would say of the segment, or the offset within the footer and what is wrong there.
fn entry_of(footer: &[u8; FOOTER_BYTES], bytes: u64, origin: &Origin) -> Result<SegmentEntry, (u64, String)> {
    let mut fields = Fields(footer);
    let (_directory_position, _sections) = (fields.number(), fields.number());
    let (keys, bytes_said) = (fields.number(), fields.number());
    let checksum = Digest(u128::from_le_bytes(fields.take()));
    let end_magic: [u8; 8] = fields.take();
    if end_magic != END_MAGIC {
        let offset = FOOTER_BYTES - END_MAGIC.len();
        return Err((offset as u64, "it does not end as a segment ends".to_owned()));
    }
    if bytes_said != bytes {
        return Err((24, format!("its footer is that of a file of {bytes_said} bytes and it has {bytes}")));
    }
    Ok(SegmentEntry {
        name: origin.name,
        bytes,
        checksum,
        tier: 0,
        keys,
        event_time_min: EventTimeMs(i64::MIN),
        event_time_max: EventTimeMs(i64::MAX),
    })
}

/// The sections of a directory, or the index of the first entry that lies outside of the file.
fn sections_of(directory: &[u8], directory_position: u64) -> Result<Vec<Section>, usize> {
    let mut sections: Vec<Section> = Vec::new();
    let mut begin = HEADER_BYTES as u64;
    for (entry_index, bytes) in directory.chunks_exact(ENTRY_BYTES).enumerate() {
        let section = read_entry(bytes, begin, directory_position).ok_or(entry_index)?;
        begin = section.end();
        sections.push(section);
    }
    Ok(sections)
}

/// Makes all checksums of a segment right again, as far as its bytes still say where they stand. For fuzzers: what
/// stands behind a checksum is reached only through a right one.
pub(in crate::dedup) fn repair(bytes: &mut [u8]) {
    if bytes.len() < HEADER_BYTES + FOOTER_BYTES {
        return;
    }
    let version = u16::from_le_bytes([bytes[8], bytes[9]]);
    bytes[..MAGIC.len()].copy_from_slice(&MAGIC);
    bytes[..PRELUDE_BYTES].copy_from_slice(&prelude(version));
    let seed = xxh3_64(&bytes[..HEADER_BYTES]);
    let footer = bytes.len() - FOOTER_BYTES;
    let length = bytes.len() as u64;
    bytes[footer + 24..footer + FOOTER_CHECKSUM_OFFSET].copy_from_slice(&length.to_le_bytes());
    let end = bytes.len();
    bytes[end - END_MAGIC.len()..].copy_from_slice(&END_MAGIC);
    let mut fields = Fields(&bytes[footer..]);
    let (directory_position, sections) = (fields.number(), fields.number());
    let fits = sections <= BUCKETS_MAX as u64
        && directory_position.checked_add(sections * ENTRY_BYTES as u64) == Some(footer as u64);
    if !fits {
        return;
    }
    let directory = directory_position as usize..footer;
    let checksum = frame_checksum(
        &bytes[..HEADER_BYTES],
        &bytes[directory.clone()],
        &bytes[footer..footer + FOOTER_CHECKSUM_OFFSET],
    );
    bytes[footer + FOOTER_CHECKSUM_OFFSET..end - END_MAGIC.len()].copy_from_slice(&checksum.to_le_bytes());
    for section in sections_of(&bytes[directory], directory_position).unwrap_or_default() {
        seal_section(bytes, &section, seed);
    }
}

fn seal_section(bytes: &mut [u8], section: &Section, seed: u64) {
    let mut seal_at = |position: u64, length: usize| {
        seal(&mut bytes[position as usize..position as usize + length], seed, position);
    };
    for page in 0..section.filter.page_count() {
        let position = section.filter_position + page * PAGE_BYTES as u64;
        seal_at(position, section.filter.page_bytes(page));
    }
    for page in 0..section.pages {
        seal_at(section.page_position(page), section.page_bytes(page));
    }
    for stride in 0..section.stride_count() {
        seal_at(section.index_position(stride), section.index_bytes(stride));
    }
    let position = section.stride_index_position();
    seal_at(position, (section.end() - position) as usize);
}
