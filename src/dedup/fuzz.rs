//! What fuzzers call: every format that is read from disk, from any bytes at all.
//!
//! A checksum stands before each parser, and random bytes never pass one. So each input is read twice: as it is, and
//! with its checksums made right, which is what a writer with a bug, or somebody who means harm, would leave.
//!
//! What must hold for every input: no panic, no endless loop, and no allocation beyond the input's own length and the
//! named buffers of the readers (256 KiB).

use std::fs::File;

use xxhash_rust::xxh3::xxh3_128;

use super::generation::{FIRST_WORDS, parse_manifest};
use super::page::{PAGE_KEYS_MAX, read_page};
use super::segment::alone;
use super::verify::verify_section;
use crate::fingerprint::FINGERPRINT_BITS;

/// Reads a segment file: its frame, and if that is right every piece of every section. Says whether anything was
/// right up to the frame.
pub fn segment(bytes: &[u8]) -> bool {
    let as_it_is = read_segment(bytes);
    let mut repaired = bytes.to_vec();
    alone::repair(&mut repaired);
    read_segment(&repaired) || as_it_is
}

fn read_segment(bytes: &[u8]) -> bool {
    let Some(file) = file_of(bytes) else { return false };
    let Ok((segment, _)) = alone::open(file, "fuzzed.segment") else { return false };
    let strides: usize = segment.sections.iter().map(|section| section.strides.len()).sum();
    assert!(strides <= bytes.len(), "what a frame keeps in memory stands in the file");
    for section in &segment.sections {
        // Damage is what most inputs have; that it is an error and nothing worse is what is asked here.
        let _damage = verify_section(&segment, section, &mut |_| {});
    }
    true
}

/// A file in memory, or nothing where the system has none left.
fn file_of(bytes: &[u8]) -> Option<File> {
    let file = File::from(rustix::fs::memfd_create("fuzzed", rustix::fs::MemfdFlags::CLOEXEC).ok()?);
    std::os::unix::fs::FileExt::write_all_at(&file, bytes, 0).ok()?;
    Some(file)
}

/// Reads a manifest file. Says whether it was taken.
pub fn manifest(bytes: &[u8]) -> bool {
    let as_it_is = read_manifest(bytes.to_vec());
    repaired_manifest(bytes).is_some_and(read_manifest) || as_it_is
}

fn read_manifest(bytes: Vec<u8>) -> bool {
    let Ok((manifest, _)) = parse_manifest(bytes, "fuzzed.manifest") else { return false };
    let live = manifest.tallies();
    if let Some(grid) = manifest.grid() {
        for bucket in live.keys() {
            let time = crate::event_time::EventTimeMs(bucket.to.0.saturating_sub(1));
            assert!(grid.bucket_of(time).from <= time, "a bucket holds its times");
        }
    }
    true
}

/// The manifest with the checksum of what it says.
fn repaired_manifest(bytes: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(bytes).ok()?;
    let (line, json) = text.split_once('\n')?;
    let version = line.strip_prefix(FIRST_WORDS)?.split(' ').next()?;
    let checksum = xxh3_128(format!("{version}\n{json}").as_bytes());
    Some(format!("{FIRST_WORDS}{version} {checksum:032x}\n{json}").into_bytes())
}

/// Decodes a page whose checksum was right. Says whether it was taken.
pub fn page(bytes: &[u8]) -> bool {
    let mut values = Vec::new();
    if read_page(bytes, &mut values).is_err() {
        return false;
    }
    assert!((1..=PAGE_KEYS_MAX).contains(&values.len()), "a page holds a bounded number of keys");
    assert!(values.windows(2).all(|pair| pair[0] < pair[1]), "keys of a page increase");
    assert!(values.iter().all(|value| value >> FINGERPRINT_BITS == 0), "a key has 88 bits");
    true
}
