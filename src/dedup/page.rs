//! Pages: sorted fingerprints in at most 4 KiB, each readable on its own.
//!
//! Layout, little-endian:
//! ```text
//! checksum u64 | keys u16 | delta_bits u8 | zero u8 | first fingerprint 11 B, big-endian | deltas | zeros
//! ```
//! The deltas are the differences of neighbours, `keys - 1` of them, `delta_bits` each, packed from the lowest bit
//! on. Fingerprints are uniform, so one width per page costs about 2.6 bits per key more than the entropy and
//! needs no table: 9.3 bytes per key at a million keys, 8 at a billion.
//!
//! The checksum of a page is XXH3-64 over the bytes after it. Its seed is made of the segment's own seed and of
//! the position in the file, so a page that was read from another place or another file is as wrong as a torn
//! one. Filter pages and index pages of a segment are sealed in the same way.

use crate::fingerprint::{FINGERPRINT_BITS, FINGERPRINT_BYTES, Fingerprint};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Bytes of a page, but for the last one of its kind in a section, which is cut to what it holds.
pub(super) const PAGE_BYTES: usize = 4096;
/// Most keys of one page. Only keys that lie unnaturally dense reach it.
pub(super) const PAGE_KEYS_MAX: usize = 1024;
/// Bytes of the checksum at the begin of every sealed piece.
pub(super) const CHECKSUM_BYTES: usize = 8;
/// Bytes of a page before its deltas.
pub(super) const PAGE_HEAD_BYTES: usize = CHECKSUM_BYTES + 4 + FINGERPRINT_BYTES;

const DELTAS_BITS_MAX: usize = (PAGE_BYTES - PAGE_HEAD_BYTES) * 8;

/// Writes the checksum of `piece` into its first 8 bytes.
pub(super) fn seal(piece: &mut [u8], segment_seed: u64, position: u64) {
    let (checksum, rest) = piece.split_at_mut(CHECKSUM_BYTES);
    checksum.copy_from_slice(&checksum_of(rest, segment_seed, position).to_le_bytes());
}

/// Whether `piece` is what was sealed for this place of this segment.
pub(super) fn is_intact(piece: &[u8], segment_seed: u64, position: u64) -> bool {
    match piece.split_first_chunk::<CHECKSUM_BYTES>() {
        Some((checksum, rest)) => u64::from_le_bytes(*checksum) == checksum_of(rest, segment_seed, position),
        None => false,
    }
}

fn checksum_of(bytes: &[u8], segment_seed: u64, position: u64) -> u64 {
    xxh3_64_with_seed(bytes, segment_seed ^ position)
}

/// Gathers sorted fingerprints until a page is full.
#[derive(Debug, Default)]
pub(super) struct PageBuilder {
    values: Vec<u128>,
    delta_bits: u32,
}

impl PageBuilder {
    /// Takes the next fingerprint; `false` if it does not fit, then the page is to be written first.
    ///
    /// # Panics
    /// If fingerprints do not strictly increase.
    pub(super) fn push(&mut self, value: u128) -> bool {
        if let Some(last) = self.values.last() {
            assert!(value > *last, "fingerprints of a page strictly increase");
            let delta_bits = self.delta_bits.max(u128::BITS - (value - last).leading_zeros());
            let full = self.values.len() == PAGE_KEYS_MAX
                || self.values.len() * delta_bits as usize > DELTAS_BITS_MAX;
            if full {
                return false;
            }
            self.delta_bits = delta_bits;
        }
        self.values.push(value);
        true
    }

    pub(super) fn first(&self) -> Option<u128> {
        self.values.first().copied()
    }

    /// Writes the page, not yet sealed and not padded, and begins the next one.
    pub(super) fn take_page(&mut self) -> Vec<u8> {
        let mut page = Vec::with_capacity(PAGE_BYTES);
        page.extend_from_slice(&[0; CHECKSUM_BYTES]);
        page.extend_from_slice(&(self.values.len() as u16).to_le_bytes());
        page.push(self.delta_bits as u8);
        page.push(0);
        page.extend_from_slice(Fingerprint::from_value(self.values[0]).as_bytes());
        pack(&self.values, self.delta_bits, &mut page);
        self.values.clear();
        self.delta_bits = 0;
        page
    }
}

fn pack(values: &[u128], delta_bits: u32, out: &mut Vec<u8>) {
    // Below 8 bits wait from the delta before, and a delta has at most 88: they fit together.
    let (mut waiting, mut waiting_bits) = (0u128, 0);
    for pair in values.windows(2) {
        waiting |= (pair[1] - pair[0]) << waiting_bits;
        waiting_bits += delta_bits;
        let whole_bytes = (waiting_bits / 8) as usize;
        out.extend_from_slice(&waiting.to_le_bytes()[..whole_bytes]);
        waiting >>= whole_bytes * 8;
        waiting_bits %= 8;
    }
    if waiting_bits > 0 {
        out.push(waiting as u8);
    }
}

/// Reads an intact page into `values`, in order.
///
/// # Errors
/// What is wrong with the page, if its checksum was made over nonsense.
pub(super) fn read_page(page: &[u8], values: &mut Vec<u128>) -> Result<(), &'static str> {
    values.clear();
    if page.len() < PAGE_HEAD_BYTES {
        return Err("a page is shorter than its head");
    }
    let keys = usize::from(u16::from_le_bytes([page[8], page[9]]));
    let delta_bits = u32::from(page[10]);
    let deltas = &page[PAGE_HEAD_BYTES..];
    if keys == 0 || keys > PAGE_KEYS_MAX || delta_bits > FINGERPRINT_BITS {
        return Err("the head of a page names impossible sizes");
    }
    if (keys - 1) * delta_bits as usize > deltas.len() * 8 {
        return Err("a page is shorter than its head says");
    }
    let mut value = fingerprint_at(page, CHECKSUM_BYTES + 4);
    values.push(value);
    let mask = (1u128 << delta_bits) - 1;
    for delta_index in 0..keys - 1 {
        let bit = delta_index * delta_bits as usize;
        let delta = (bytes16_at(deltas, bit / 8) >> (bit % 8)) & mask;
        if delta == 0 {
            return Err("fingerprints of a page do not increase");
        }
        value += delta;
        values.push(value);
    }
    if value >> FINGERPRINT_BITS != 0 {
        return Err("a fingerprint of a page has more than 88 bits");
    }
    Ok(())
}

/// The fingerprint that stands at `at`, as a number.
pub(super) fn fingerprint_at(bytes: &[u8], at: usize) -> u128 {
    let mut wide = [0; 16];
    wide[16 - FINGERPRINT_BYTES..].copy_from_slice(&bytes[at..at + FINGERPRINT_BYTES]);
    u128::from_be_bytes(wide)
}

/// 16 bytes from `at` on; what lies beyond the end counts as zero.
fn bytes16_at(bytes: &[u8], at: usize) -> u128 {
    let tail = &bytes[at..];
    match tail.first_chunk::<16>() {
        Some(chunk) => u128::from_le_bytes(*chunk),
        None => {
            let mut chunk = [0; 16];
            chunk[..tail.len()].copy_from_slice(tail);
            u128::from_le_bytes(chunk)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pages_of(values: &[u128]) -> Vec<Vec<u8>> {
        let mut builder = PageBuilder::default();
        let mut pages = Vec::new();
        for value in values {
            if !builder.push(*value) {
                pages.push(builder.take_page());
                assert!(builder.push(*value), "an empty page takes any fingerprint");
            }
        }
        pages.push(builder.take_page());
        pages
    }

    proptest! {
        /// Goal: what goes into pages comes out, whatever the distances, and no page outgrows its size.
        #[test]
        fn pages_give_back_what_they_hold(
            values in prop::collection::btree_set(
                prop_oneof![0u128..2_000, 0u128..1 << 88, (1u128 << 88) - 9..1 << 88], 1..3_000)
        ) {
            let values: Vec<u128> = values.into_iter().collect();
            let (mut all, mut page_values) = (Vec::new(), Vec::new());
            for page in pages_of(&values) {
                prop_assert!(page.len() <= PAGE_BYTES);
                read_page(&page, &mut page_values).unwrap();
                all.extend_from_slice(&page_values);
            }
            prop_assert_eq!(all, values);
        }
    }

    #[test]
    fn dense_keys_stop_at_the_most_keys_of_a_page() {
        let values: Vec<u128> = (0..PAGE_KEYS_MAX as u128 + 1).collect();
        assert_eq!(pages_of(&values).len(), 2);
    }

    #[test]
    fn a_page_read_from_another_place_is_not_intact() {
        let mut page = pages_of(&[1, 5, 9]).remove(0);
        seal(&mut page, 77, 4096);
        assert!(is_intact(&page, 77, 4096));
        assert!(!is_intact(&page, 77, 8192));
        assert!(!is_intact(&page, 78, 4096));
        assert!(!is_intact(&page[..5], 77, 4096));
    }

    #[test]
    fn a_flipped_bit_is_seen() {
        let mut page = pages_of(&[1, 5, 900, 1 << 60]).remove(0);
        seal(&mut page, 1, 2);
        for bit in 0..page.len() * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(!is_intact(&page, 1, 2), "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
        assert!(is_intact(&page, 1, 2));
    }

    #[test]
    fn nonsense_under_a_right_checksum_is_an_error() {
        let mut values = Vec::new();
        let good = pages_of(&[1, 5, 9]).remove(0);
        assert!(read_page(&good[..10], &mut values).is_err());
        for (at, byte) in [(8, 0), (9, 0xff), (10, 89), (10, 0)] {
            let mut page = good.clone();
            page[at] = byte;
            assert!(read_page(&page, &mut values).is_err(), "byte {at} = {byte}");
        }
    }
}
