//! Filters: "certainly new" for most keys, without touching a page.
//!
//! A filter is a split-block Bloom filter (blocks of 256 bits, eight words, one bit per word) whose block index comes
//! from the highest bits of the fingerprint, scaled to the number of blocks. The bit of each word is five of the lowest
//! 40 bits of the fingerprint, which is a hash already ([`FilterKind::Direct`]; format version 1 multiplied by the salts
//! of the Parquet format, [`FilterKind::Salted`]). So
//! sorted fingerprints visit blocks in order: a filter is written in one pass next to the pages, and a sorted
//! batch walks it forward, from memory or from the file, window by window.
//!
//! Layout: filter pages of 4 KiB, each sealed: checksum u64 | 127 blocks of 32 B | zeros. The last one is cut
//! after its last block.
//!
//! Invariants
//! 1. No false "new": the bits of every fingerprint of the section are set.
//! 2. A block is believed only from an intact page: a lost bit would let a repeat pass.

use super::page::{CHECKSUM_BYTES, PAGE_BYTES};
use crate::fingerprint::Fingerprint;

/// Where the bits of a fingerprint within its block come from; the number is the tag in the directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FilterKind {
    /// The lowest 32 bits, times a salt for each word.
    Salted = 1,
    /// Five of the lowest 40 bits for each word.
    Direct = 2,
}

impl FilterKind {
    /// The kind with this tag; `None` for a tag that this program does not know.
    pub(super) fn of(tag: u64) -> Option<Self> {
        [Self::Salted, Self::Direct].into_iter().find(|kind| *kind as u64 == tag)
    }
}

/// Bytes of a block.
pub(super) const BLOCK_BYTES: usize = 32;
/// Blocks of a filter page.
pub(super) const PAGE_BLOCKS: u64 = 127;

/// Bits per key of a section, by how many times its keys the whole state has, at least: 12 bits let 0.54 % of absent keys
/// pass, 16 bits 0.13 %, 22 bits 0.02 %. Each probe passes many sections and their false positives add up, so a small
/// section must let fewer pass; its bits are few in all (Dayan et al., Monkey, 2017).
const BITS_PER_KEY: [(u64, u64); 3] = [(32, 22), (3, 16), (0, 12)];
/// Salts of the split-block Bloom filter of the Parquet format.
const SALTS: [u32; 8] =
    [0x47b6_137b, 0x4497_4d91, 0x8824_ad5b, 0xa2b7_289d, 0x7054_95c7, 0x2df1_424b, 0x9efc_4947, 0x5c6b_fb31];

/// Blocks for at most `keys` keys of a state of about `state_keys`; at least one.
pub(super) fn block_count(keys: u64, state_keys: u64) -> u64 {
    let times = state_keys / keys.max(1);
    let bits_per_key = BITS_PER_KEY.iter().find(|(least, _)| times >= *least).map_or(12, |(_, bits)| *bits);
    (keys * bits_per_key).div_ceil(8 * BLOCK_BYTES as u64).max(1)
}

/// Expected false positives of a filter. A block holds a Poisson-distributed number of keys; with k of them, each of the
/// eight bits that are looked at is set with a chance of 1 - (31/32)^k (Putze et al., Cache-, Hash- and Space-Efficient
/// Bloom Filters, 2009).
pub(super) fn false_positive_rate(keys: u64, blocks: u64) -> f64 {
    let mean = keys as f64 / blocks.max(1) as f64;
    let (mut chance, mut sum) = ((-mean).exp(), 0.0);
    // Beyond ten standard deviations nothing is left.
    let keys_max = (mean + 10.0 * mean.sqrt() + 10.0) as u32;
    for keys in 1..=keys_max.min(10_000) {
        chance *= mean / f64::from(keys);
        sum += chance * (1.0 - (31.0_f64 / 32.0).powi(keys as i32)).powi(8);
    }
    sum
}

/// Filter pages for that many blocks.
pub(super) fn page_count(blocks: u64) -> u64 {
    blocks.div_ceil(PAGE_BLOCKS)
}

/// Bytes of filter page `page`.
pub(super) fn page_bytes(blocks: u64, page: u64) -> usize {
    let begin = page * PAGE_BLOCKS;
    if begin + PAGE_BLOCKS < blocks {
        PAGE_BYTES
    } else {
        CHECKSUM_BYTES + (blocks - begin) as usize * BLOCK_BYTES
    }
}

/// Bytes of the whole filter; `None` if the number can not be one of a real file.
pub(super) fn filter_bytes(blocks: u64) -> Option<u64> {
    let last = page_count(blocks).checked_sub(1)?;
    last.checked_mul(PAGE_BYTES as u64)?.checked_add(page_bytes(blocks, last) as u64)
}

/// The block of a fingerprint.
#[inline]
pub(super) fn block_of(value: u128, blocks: u64) -> u64 {
    let top = u128::from((value >> 24) as u64);
    (top.wrapping_mul(u128::from(blocks)) >> 64) as u64
}

/// Where a block begins within its filter page.
pub(super) fn block_offset(block: u64) -> usize {
    CHECKSUM_BYTES + (block % PAGE_BLOCKS) as usize * BLOCK_BYTES
}

/// Sets the bits of a fingerprint in its block.
pub(super) fn insert(kind: FilterKind, block: &mut [u8], value: u128) {
    for (pair, words) in block.chunks_exact_mut(8).enumerate() {
        let set = u64::from_le_bytes(*words.first_chunk().expect("a pair of words has 8 bytes"));
        words.copy_from_slice(&(set | mask(kind, value as u64, pair)).to_le_bytes());
    }
}

/// Whether the fingerprint may be in the section; `false` is certain.
#[inline]
pub(super) fn may_contain(kind: FilterKind, block: &[u8; BLOCK_BYTES], value: u128) -> bool {
    let missing_of = |pair: usize| {
        let bytes = block[pair * 8..].first_chunk().expect("a block has four pairs of words");
        mask(kind, value as u64, pair) & !u64::from_le_bytes(*bytes)
    };
    // Half of the block sends 15 of 16 fingerprints away that are not there.
    (missing_of(0) | missing_of(1)) == 0 && (missing_of(2) | missing_of(3)) == 0
}

/// The bits of a fingerprint in a pair of words of its block.
#[inline]
fn mask(kind: FilterKind, low: u64, pair: usize) -> u64 {
    match kind {
        FilterKind::Direct => {
            let bits = low >> (pair * 10);
            1 << (bits & 31) | 1 << (32 + (bits >> 5 & 31))
        }
        FilterKind::Salted => {
            let bit_of = |salt: u32| (low as u32).wrapping_mul(salt) >> 27;
            1 << bit_of(SALTS[pair * 2]) | 1 << (32 + bit_of(SALTS[pair * 2 + 1]))
        }
    }
}

/// A filter without its section, for the bench that times it.
#[doc(hidden)]
#[derive(Debug)]
pub struct FilterAlone {
    blocks: Vec<[u8; BLOCK_BYTES]>,
}

impl FilterAlone {
    /// An empty one with room for that many keys.
    pub fn new(keys: u64, bits_per_key: u64) -> Self {
        let blocks = (keys * bits_per_key).div_ceil(8 * BLOCK_BYTES as u64).max(1);
        Self { blocks: vec![[0; BLOCK_BYTES]; blocks as usize] }
    }

    /// Takes a key.
    pub fn insert(&mut self, fingerprint: Fingerprint) {
        let block = block_of(fingerprint.value(), self.blocks.len() as u64);
        insert(FilterKind::Direct, &mut self.blocks[block as usize], fingerprint.value());
    }

    /// Whether the key may have been taken; `false` is certain.
    pub fn may_contain(&self, fingerprint: Fingerprint) -> bool {
        let block = block_of(fingerprint.value(), self.blocks.len() as u64);
        may_contain(FilterKind::Direct, &self.blocks[block as usize], fingerprint.value())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use xxhash_rust::xxh3::xxh3_128;

    use super::*;

    fn value(number: u64) -> u128 {
        xxh3_128(&number.to_le_bytes()) >> 40
    }

    fn blocks_of(values: &[u128]) -> Vec<[u8; BLOCK_BYTES]> {
        let count = block_count(values.len() as u64, 100_000_000);
        let mut blocks = vec![[0; BLOCK_BYTES]; count as usize];
        for value in values {
            insert(FilterKind::Direct, &mut blocks[block_of(*value, count) as usize], *value);
        }
        blocks
    }

    #[test]
    fn a_small_section_has_few_false_positives() {
        let held: Vec<u128> = (0..50_000).map(value).collect();
        let blocks = blocks_of(&held);
        let hit = |value: &u128| {
            may_contain(FilterKind::Direct, &blocks[block_of(*value, blocks.len() as u64) as usize], *value)
        };
        assert!(held.iter().all(hit), "a filter never says new of a key that it holds");
        let false_positives = (1_000_000..1_200_000).map(value).filter(hit).count();
        let rate = false_positive_rate(held.len() as u64, blocks.len() as u64);
        let expected = rate * 200_000.0;
        assert!(
            (false_positives as f64 - expected).abs() < 5.0 * expected.sqrt() + 5.0,
            "{false_positives}, {expected}"
        );
        assert!(rate < 0.0005, "{rate}");
    }

    #[test]
    fn filter_pages_add_up_to_the_filter() {
        for blocks in [1, 126, 127, 128, 254, 255, 1000] {
            let sum: usize = (0..page_count(blocks)).map(|page| page_bytes(blocks, page)).sum();
            let last = page_count(blocks) - 1;
            let padded: u64 = last * PAGE_BYTES as u64 + page_bytes(blocks, last) as u64;
            assert_eq!(filter_bytes(blocks), Some(padded));
            assert_eq!(sum as u64, padded, "{blocks} blocks");
        }
        assert_eq!(filter_bytes(0), None);
    }

    proptest! {
        /// Goal: sorted fingerprints visit blocks in order and never beyond the last one.
        #[test]
        fn blocks_follow_the_order_of_fingerprints(
            one in 0u128..1 << 88, other in 0u128..1 << 88, blocks in 1u64..1 << 40
        ) {
            let (low, high) = (one.min(other), one.max(other));
            prop_assert!(block_of(low, blocks) <= block_of(high, blocks));
            prop_assert!(block_of(high, blocks) < blocks);
        }
    }
}
