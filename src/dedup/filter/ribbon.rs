//! Ribbon filter pages: as many false positives as a Bloom filter of half as many bits again.
//!
//! A page holds a system of linear equations over bits (Dillinger and Walzer, Ribbon filter: practically smaller than
//! Bloom and Xor, 2021; the homogeneous kind). Each of its rows has `result_bits` unknown bits. A fingerprint stands for
//! 64 coefficients from a row on; a fingerprint that was inserted is one whose coefficients, times the unknowns, sum up to
//! zero in every result bit. Others do so by chance, one of `2^result_bits`. Rows that no equation determines are filled
//! with bits of a hash, so the page follows from its fingerprints alone.
//!
//! Equations are eliminated as they come. Since fingerprints come sorted and the row grows with the fingerprint, each one
//! meets few others: four on average at the load that [`LOAD_PERCENT`] allows. Nothing can fail: an equation that
//! follows from the others already adds nothing, and a page that more fingerprints fall into than it has rows lets all
//! pass.
//!
//! Layout: rows are put together to blocks of 64. Of each block there is a word per result bit, whose bit `i` belongs to
//! row `i`. First come the words of the first four result bits of all blocks, then those of the others of all blocks: most
//! fingerprints are sent away by what stands in 64 bytes.
//!
//! Bounds: 8 bytes per row of the page in work.

use super::super::page::{CHECKSUM_BYTES, PAGE_BYTES};

/// Rows of a block.
pub(super) const BLOCK_ROWS: u64 = 64;
/// Words of result bits that a page has room for.
const PAGE_WORDS: u64 = ((PAGE_BYTES - CHECKSUM_BYTES) / size_of::<u64>()) as u64;
/// Rows at the end of a page at which no equation begins.
const LAST_ROWS: u64 = BLOCK_ROWS - 1;
/// Fingerprints per hundred rows. False positives stay at `2^-result_bits` up to here; three more double them, also
/// because fingerprints do not spread evenly over pages.
pub(super) const LOAD_PERCENT: u64 = 88;
/// Result bits that a filter can have.
pub(super) const RESULT_BITS: std::ops::RangeInclusive<u8> = 8..=16;
/// Result bits that are compared at once, and bytes of their words in a block.
const FIRST_LANES: usize = 4;
const FIRST_BYTES: usize = FIRST_LANES * size_of::<u64>();
/// An odd multiplier (2^64 over the golden ratio), so that coefficients do not depend on the bits that choose the row.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// Blocks of a full page.
pub(super) fn page_blocks(result_bits: u8) -> u64 {
    PAGE_WORDS / u64::from(result_bits)
}

/// Blocks of a filter for that many keys: some of a page, or whole pages.
pub(super) fn block_count(keys: u64, result_bits: u8) -> u64 {
    let rows = (keys * 100).div_ceil(LOAD_PERCENT);
    let blocks_alone = (rows + LAST_ROWS).div_ceil(BLOCK_ROWS);
    let page_blocks = page_blocks(result_bits);
    if blocks_alone <= page_blocks {
        return blocks_alone;
    }
    rows.div_ceil(page_blocks * BLOCK_ROWS - LAST_ROWS) * page_blocks
}

/// Where the equation of a fingerprint begins, and its coefficients.
#[derive(Debug, Clone, Copy)]
struct Equation {
    row: usize,
    /// Of the rows from `row` on; the first one is always set.
    coefficients: u64,
}

impl Equation {
    /// Of a fingerprint in a page of so many blocks; `within` is its place in the page as a fraction of 2^64.
    #[inline]
    fn of(value: u128, within: u64, blocks: u64) -> Self {
        let rows = blocks * BLOCK_ROWS - LAST_ROWS;
        let row = (u128::from(within) * u128::from(rows)) >> 64;
        Self { row: row as usize, coefficients: (value as u64).wrapping_mul(SPREAD) | 1 }
    }
}

/// Equations of one page, eliminated so far that each begins at a row of its own.
#[derive(Debug)]
pub(super) struct Band {
    /// Coefficients of the equation that begins at each row; 0 where none does.
    rows: Vec<u64>,
    keys: usize,
}

impl Band {
    pub(super) fn new(blocks: u64) -> Self {
        Self { rows: vec![0; (blocks * BLOCK_ROWS) as usize], keys: 0 }
    }

    #[inline]
    pub(super) fn insert(&mut self, value: u128, within: u64) {
        self.keys += 1;
        if self.keys > self.rows.len() {
            return;
        }
        let Equation { mut row, mut coefficients } =
            Equation::of(value, within, self.rows.len() as u64 / BLOCK_ROWS);
        while coefficients != 0 {
            let skipped = coefficients.trailing_zeros();
            row += skipped as usize;
            coefficients >>= skipped;
            let other = self.rows[row];
            if other == 0 {
                self.rows[row] = coefficients;
                return;
            }
            coefficients ^= other;
        }
    }

    /// Writes the result bits of all rows into the words of a page and begins an empty page.
    pub(super) fn take_page(&mut self, result_bits: u8, page_index: u64, words: &mut [u8]) {
        // What the compiler knows the number of it keeps in vectors.
        match result_bits {
            ..=8 => self.solve::<8>(result_bits, page_index, words),
            9..=10 => self.solve::<10>(result_bits, page_index, words),
            11..=12 => self.solve::<12>(result_bits, page_index, words),
            _ => self.solve::<16>(result_bits, page_index, words),
        }
        self.rows.fill(0);
        self.keys = 0;
    }

    /// Determines rows from the last one to the first: each is the sum of those behind it that its equation names.
    fn solve<const LANES: usize>(&self, result_bits: u8, page_index: u64, words: &mut [u8]) {
        if self.keys > self.rows.len() {
            words.fill(0);
            return;
        }
        let blocks = self.rows.len() / BLOCK_ROWS as usize;
        let (first, others) = words.split_at_mut(blocks * FIRST_BYTES);
        let others_bytes = (usize::from(result_bits) - FIRST_LANES) * size_of::<u64>();
        let of_blocks = first.chunks_exact_mut(FIRST_BYTES).zip(others.chunks_exact_mut(others_bytes));
        // Of each result bit the next 64 rows, the nearest one lowest.
        let mut behind = [0u64; LANES];
        let rows_of_blocks = self.rows.chunks_exact(BLOCK_ROWS as usize).enumerate();
        for ((block, rows), (first, others)) in rows_of_blocks.zip(of_blocks).rev() {
            for (row, coefficients) in rows.iter().enumerate().rev() {
                let others = coefficients >> 1;
                let free = if *coefficients == 0 { free_bits(page_index, block, row) } else { 0 };
                for (lane, rows_behind) in behind.iter_mut().enumerate() {
                    let bit = parity(*rows_behind & others) ^ (free >> lane & 1);
                    *rows_behind = *rows_behind << 1 | bit;
                }
            }
            let words =
                first.chunks_exact_mut(size_of::<u64>()).chain(others.chunks_exact_mut(size_of::<u64>()));
            for (word, bits) in words.zip(behind) {
                word.copy_from_slice(&bits.to_le_bytes());
            }
        }
    }
}

/// The bits of a row that no equation determines: any will do, but always the same (the finalizer of splitmix64).
fn free_bits(page_index: u64, block: usize, row: usize) -> u64 {
    let place = page_index << 12 ^ (block as u64) << 6 ^ row as u64;
    let value = place.wrapping_mul(SPREAD);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

/// 1 if an odd number of bits is set. Without an instruction that counts bits this is shorter than counting them.
#[inline]
fn parity(mut bits: u64) -> u64 {
    for half in [32, 16, 8, 4, 2, 1] {
        bits ^= bits >> half;
    }
    bits & 1
}

/// Whether any of four words has an odd number of bits set. Folded once they are half as long, and so in one vector.
#[inline]
fn any_is_odd(words: [u64; 4]) -> bool {
    let mut folded = words.map(|word| (word ^ word >> 32) as u32);
    for half in [16, 8, 4, 2, 1] {
        folded = folded.map(|bits| bits ^ bits >> half);
    }
    folded.iter().fold(0, |any, bits| any | bits) & 1 == 1
}

/// Blocks of one page of a filter, to be asked for fingerprints.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// In `RESULT_BITS`.
    pub(super) result_bits: u8,
    /// Of a page, at least 1.
    pub(super) blocks: u64,
}

/// The sums of a fingerprint in its page, of which the first ones are there already.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sums {
    /// Words of the block in which the equation begins and of the next one.
    first: [u8; 2 * FIRST_BYTES],
    block: usize,
    of_here: u64,
    of_next: u64,
}

impl Sums {
    /// What stands for no fingerprint.
    pub(super) const NONE: Self = Self { first: [0; 2 * FIRST_BYTES], block: 0, of_here: 0, of_next: 0 };

    /// Fetches what is looked at first of a fingerprint in the words of its page.
    #[inline]
    pub(super) fn fetch(shape: Shape, words: &[u8], value: u128, within: u64) -> Self {
        let Equation { row, coefficients } = Equation::of(value, within, shape.blocks);
        let (block, shift) = (row / BLOCK_ROWS as usize, row % BLOCK_ROWS as usize);
        // Behind the last block stand other words, and an equation that begins in its only row for that ends in it.
        let first = words[block * FIRST_BYTES..].first_chunk().expect("more words follow the first ones");
        let (of_here, of_next) = (coefficients << shift, coefficients >> 1 >> (LAST_ROWS as usize - shift));
        Self { first: *first, block, of_here, of_next }
    }

    /// Whether the fingerprint may have been inserted; `false` is certain.
    #[inline]
    pub(super) fn may_contain(&self, shape: Shape, words: &[u8]) -> bool {
        let first = std::array::from_fn(|lane| {
            word(&self.first, lane) & self.of_here ^ word(&self.first, FIRST_LANES + lane) & self.of_next
        });
        // Four result bits send fifteen of sixteen away that were not inserted.
        !any_is_odd(first) && self.others_are_even(shape, words)
    }

    fn others_are_even(&self, shape: Shape, words: &[u8]) -> bool {
        let lanes = usize::from(shape.result_bits) - FIRST_LANES;
        let blocks = shape.blocks as usize;
        let others = &words[blocks * FIRST_BYTES..];
        let next = (self.block + 1).min(blocks - 1);
        (0..lanes).all(|lane| {
            let (here, next) = (word(others, self.block * lanes + lane), word(others, next * lanes + lane));
            parity(here & self.of_here ^ next & self.of_next) == 0
        })
    }
}

#[inline]
fn word(bytes: &[u8], index: usize) -> u64 {
    let bytes = bytes[index * size_of::<u64>()..].first_chunk().expect("words are whole");
    u64::from_le_bytes(*bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parities_are_those_of_counting(words in any::<[u64; 4]>()) {
            let is_odd = |word: &u64| word.count_ones() % 2 == 1;
            prop_assert!(words.iter().all(|word| (parity(*word) == 1) == is_odd(word)));
            prop_assert_eq!(any_is_odd(words), words.iter().any(is_odd));
        }

        /// Goal: whatever falls into a page, at any load, all of it is found again.
        #[test]
        fn a_page_holds_whatever_was_inserted(
            values in prop::collection::vec((any::<u128>(), any::<u64>()), 0..700),
            blocks in 1u64..9,
            result_bits in RESULT_BITS,
        ) {
            let mut band = Band::new(blocks);
            values.iter().for_each(|(value, within)| band.insert(*value, *within));
            let mut words = vec![0; (blocks * u64::from(result_bits)) as usize * 8];
            band.take_page(result_bits, 7, &mut words);
            for (value, within) in &values {
                let shape = Shape { result_bits, blocks };
                prop_assert!(Sums::fetch(shape, &words, *value, *within).may_contain(shape, &words));
            }
            prop_assert!(band.rows.iter().all(|row| *row == 0));
        }
    }

    #[test]
    fn pages_have_room_for_their_keys() {
        for result_bits in RESULT_BITS {
            for keys in [1, 50, 1_000, 2_000, 5_000, 100_000, 10_000_000] {
                let (blocks, page) = (block_count(keys, result_bits), page_blocks(result_bits));
                assert!(blocks <= page || blocks.is_multiple_of(page), "{blocks} of {page}");
                let pages = blocks.div_ceil(page);
                let starts = blocks * BLOCK_ROWS - pages * LAST_ROWS;
                assert!(starts * LOAD_PERCENT >= keys * 100 - LOAD_PERCENT, "{keys} in {starts}");
                assert!(page * u64::from(result_bits) * 8 <= (PAGE_BYTES - CHECKSUM_BYTES) as u64);
            }
        }
    }
}
