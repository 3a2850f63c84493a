//! Filters: "certainly new" for most keys, without touching a page.
//!
//! A filter is a split-block Bloom filter (blocks of 256 bits, eight words, one bit per word, salts of the Parquet
//! format) whose block index comes from the highest bits of the fingerprint, scaled to the number of blocks. So
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

/// The only kind of filter that format version 1 knows.
pub(super) const FILTER_KIND_SPLIT_BLOCK: u64 = 1;
/// Bytes of a block.
pub(super) const BLOCK_BYTES: usize = 32;
/// Blocks of a filter page.
pub(super) const PAGE_BLOCKS: u64 = 127;

/// Sections below this many keys get more bits: they are a small share of all bytes, and false positives add up
/// over the sections that are probed.
const SMALL_SECTION_KEYS_MAX: u64 = 64 << 20;
/// 0.13 % false positives.
const SMALL_SECTION_BITS_PER_KEY: u64 = 16;
/// 0.54 % false positives.
const BITS_PER_KEY: u64 = 12;
/// Salts of the split-block Bloom filter of the Parquet format.
const SALTS: [u32; 8] =
    [0x47b6_137b, 0x4497_4d91, 0x8824_ad5b, 0xa2b7_289d, 0x7054_95c7, 0x2df1_424b, 0x9efc_4947, 0x5c6b_fb31];

/// Blocks for at most `keys` keys; at least one.
pub(super) fn block_count(keys: u64) -> u64 {
    let bits_per_key = if keys < SMALL_SECTION_KEYS_MAX { SMALL_SECTION_BITS_PER_KEY } else { BITS_PER_KEY };
    (keys * bits_per_key).div_ceil(8 * BLOCK_BYTES as u64).max(1)
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
pub(super) fn block_of(value: u128, blocks: u64) -> u64 {
    let top = u128::from((value >> 24) as u64);
    ((top * u128::from(blocks)) >> 64) as u64
}

/// Where a block begins within its filter page.
pub(super) fn block_offset(block: u64) -> usize {
    CHECKSUM_BYTES + (block % PAGE_BLOCKS) as usize * BLOCK_BYTES
}

/// Sets the bits of a fingerprint in its block.
pub(super) fn insert(block: &mut [u8], value: u128) {
    for (word, salt) in SALTS.into_iter().enumerate() {
        let bit = bit_of(value, salt);
        block[word * 4 + (bit / 8) as usize] |= 1 << (bit % 8);
    }
}

/// Whether the fingerprint may be in the section; `false` is certain.
pub(super) fn may_contain(block: &[u8; BLOCK_BYTES], value: u128) -> bool {
    let mut missing = 0;
    for (bytes, salt) in block.chunks_exact(4).zip(SALTS) {
        let word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        missing |= !word & (1 << bit_of(value, salt));
    }
    missing == 0
}

fn bit_of(value: u128, salt: u32) -> u32 {
    (value as u32).wrapping_mul(salt) >> 27
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
        let count = block_count(values.len() as u64);
        let mut blocks = vec![[0; BLOCK_BYTES]; count as usize];
        for value in values {
            insert(&mut blocks[block_of(*value, count) as usize], *value);
        }
        blocks
    }

    #[test]
    fn a_small_section_has_about_one_false_positive_in_a_thousand() {
        let held: Vec<u128> = (0..50_000).map(value).collect();
        let blocks = blocks_of(&held);
        let hit = |value: &u128| may_contain(&blocks[block_of(*value, blocks.len() as u64) as usize], *value);
        assert!(held.iter().all(hit), "a filter never says new of a key that it holds");
        let false_positives = (1_000_000..1_200_000).map(value).filter(hit).count();
        assert!(false_positives < 600, "{false_positives} of 200000");
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
