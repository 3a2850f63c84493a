//! Filters: "certainly new" for most keys, without touching a page.
//!
//! There are two families. A split-block Bloom filter (blocks of 256 bits, eight words, one bit per word) is made in
//! nanoseconds per key; the bit of each word is five of the lowest 40 bits of the fingerprint, which is a hash already
//! ([`FilterKind::Direct`]; format version 1 multiplied by the salts of the Parquet format, [`FilterKind::Salted`]). A
//! ribbon filter ([`FilterKind::Ribbon`], see `filter/ribbon.rs`) takes some 50 ns per key to make and a third less
//! space for the same false positives. So what a batch writes while it is waited for has Bloom filters, and large
//! sections, which are written beside the batches and stay, have ribbon filters.
//!
//! In both, the page of a fingerprint comes from its highest bits, scaled to the number of blocks or pages, and pages
//! do not depend on each other. So sorted fingerprints visit pages in order: a filter is written in one pass next to the
//! pages of keys, and a sorted batch walks it forward, from memory or from the file, window by window.
//!
//! Layout: filter pages of 4 KiB, each sealed: checksum u64 | blocks | zeros. Blocks are of 32 B, 127 to a page (Bloom),
//! or of 64 rows times the result bits, as many as fit, and pages of a filter of several are all full (ribbon). The last
//! page is cut after its last Bloom block, and so is the only page of a ribbon filter.
//!
//! Invariants
//! 1. No false "new": every fingerprint of the section passes.
//! 2. A page is believed only if it is intact: a lost bit would let a repeat pass.

mod ribbon;

use super::page::{CHECKSUM_BYTES, PAGE_BYTES};
use crate::fingerprint::Fingerprint;

/// Where the bits of a fingerprint come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FilterKind {
    /// Bloom: the lowest 32 bits, times a salt for each word.
    Salted,
    /// Bloom: five of the lowest 40 bits for each word.
    Direct,
    /// Ribbon: the lowest 64 bits.
    Ribbon {
        /// Of 2^result_bits absent fingerprints one passes.
        result_bits: u8,
    },
}

const SALTED_TAG: u64 = 1;
const DIRECT_TAG: u64 = 2;
/// In the lowest byte; result bits stand in the next one.
const RIBBON_TAG: u64 = 3;

impl FilterKind {
    /// The tag in the directory.
    pub(super) fn tag(self) -> u64 {
        match self {
            Self::Salted => SALTED_TAG,
            Self::Direct => DIRECT_TAG,
            Self::Ribbon { result_bits } => RIBBON_TAG | u64::from(result_bits) << 8,
        }
    }

    /// The kind with this tag; `None` for a tag that this program does not know.
    pub(super) fn of(tag: u64) -> Option<Self> {
        let result_bits = (tag >> 8) as u8;
        let known = [Self::Salted, Self::Direct, Self::Ribbon { result_bits }];
        let kind = known.into_iter().find(|kind| kind.tag() == tag)?;
        let is_ribbon = matches!(kind, Self::Ribbon { .. });
        (!is_ribbon || ribbon::RESULT_BITS.contains(&result_bits)).then_some(kind)
    }
}

/// What a filter may cost to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FilterEffort {
    /// Someone waits for it, or it does not last, or it is asked so often from memory that its own speed counts.
    Quick,
    /// The same where memory has room for more bits: each false positive that they spare would read a page.
    Ample,
    /// It is written beside the batches, and many of them will read it from disk.
    Small,
}

impl FilterEffort {
    /// For a filter that lasts, in a state of about `state_keys`: where the filters of all of them stay in memory, a
    /// Bloom filter, which answers faster, with as many bits as there is room for; where most are streamed from disk, one of
    /// fewer bytes.
    pub(super) fn of_lasting(state_keys: u64, pinned_bytes_max: u64) -> Self {
        let stay_in_memory = |bytes_per_key| state_keys.saturating_mul(bytes_per_key) <= pinned_bytes_max;
        match () {
            () if stay_in_memory(AMPLE_BYTES_PER_KEY) => Self::Ample,
            () if stay_in_memory(BLOOM_BYTES_PER_KEY) => Self::Quick,
            () => Self::Small,
        }
    }
}

/// Bytes of a Bloom block.
const BLOCK_BYTES: usize = 32;
/// Bloom blocks of a filter page.
const PAGE_BLOCKS: u64 = 127;

/// Bits per key of a Bloom filter, by how many times its keys the whole state has, at least: 12 bits let 0.54 % of absent keys
/// pass, 16 bits 0.13 %, 22 bits 0.02 %. Each probe passes many sections and their false positives add up, so a small
/// section must let fewer pass; its bits are few in all (Dayan et al., Monkey, 2017).
const BITS_PER_KEY: [(u64, u64); 3] = [(32, 22), (3, 16), (0, 12)];
/// The same where there is room for more: 20 bits let 0.04 % pass, a thirteenth of 12. Thirty sections of 12 and 16 bits let 2.3 %
/// of absent keys pass, which read more pages than repeats did (`benches/run life`).
const AMPLE_BITS_PER_KEY: [(u64, u64); 2] = [(32, 22), (0, 20)];
/// Bytes of Bloom filters per key of a whole state, about. Tests have states of their own size.
const BLOOM_BYTES_PER_KEY: u64 = if cfg!(test) { u64::MAX } else { 2 };
/// The same of filters of [`AMPLE_BITS_PER_KEY`].
const AMPLE_BYTES_PER_KEY: u64 = if cfg!(test) { u64::MAX } else { 3 };
/// Sections of fewer keys have Bloom filters in any case: they are merged again soon. Tests have none so large.
const RIBBON_KEYS_MIN: u64 = if cfg!(test) { 256 } else { 8 << 20 };
/// One false positive of a whole state in so many probes, or somewhat fewer, by the same rule: a section of `n` of `N`
/// keys has `log2(250 N / n)` result bits. At 1e9 keys on a disk of 60 thousand reads and 1 GB a second, one bit more costs
/// a batch of 1 to 4 M events about as much to stream as it spares in reads of pages (`benches/run dedup`).
const PROBES_PER_FALSE_POSITIVE: u128 = 250;
/// Fewest and most result bits that are written.
const RESULT_BITS_WRITTEN: (u32, u32) = (8, 14);
/// Fingerprints whose words in a ribbon filter are fetched together.
const FETCHED_TOGETHER: usize = 16;
/// Fingerprints whose Bloom blocks are looked at together.
const LOOKED_AT_TOGETHER: usize = 64;
/// Salts of the split-block Bloom filter of the Parquet format.
const SALTS: [u32; 8] =
    [0x47b6_137b, 0x4497_4d91, 0x8824_ad5b, 0xa2b7_289d, 0x7054_95c7, 0x2df1_424b, 0x9efc_4947, 0x5c6b_fb31];

/// Kind and size of a filter: all that is needed to find a fingerprint's place in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FilterShape {
    kind: FilterKind,
    blocks: u64,
    /// Blocks of a page.
    page_blocks: u64,
}

impl FilterShape {
    /// For at most `keys` keys of a state of about `state_keys`.
    pub(super) fn for_keys(keys: u64, state_keys: u64, effort: FilterEffort) -> Self {
        let keys = keys.max(1);
        let state_keys = state_keys.max(keys);
        if effort == FilterEffort::Small && keys >= RIBBON_KEYS_MIN {
            let wanted = (PROBES_PER_FALSE_POSITIVE * u128::from(state_keys) / u128::from(keys)).ilog2();
            let result_bits = wanted.clamp(RESULT_BITS_WRITTEN.0, RESULT_BITS_WRITTEN.1) as u8;
            let blocks = ribbon::block_count(keys, result_bits);
            return Self::new(FilterKind::Ribbon { result_bits }, blocks);
        }
        let times = state_keys / keys;
        let by_times: &[(u64, u64)] =
            if effort == FilterEffort::Ample { &AMPLE_BITS_PER_KEY } else { &BITS_PER_KEY };
        let bits_per_key = by_times.iter().find(|(least, _)| times >= *least).map_or(12, |(_, bits)| *bits);
        Self::new(FilterKind::Direct, (keys * bits_per_key).div_ceil(8 * BLOCK_BYTES as u64).max(1))
    }

    fn new(kind: FilterKind, blocks: u64) -> Self {
        let page_blocks = match kind {
            FilterKind::Salted | FilterKind::Direct => PAGE_BLOCKS,
            FilterKind::Ribbon { result_bits } => ribbon::page_blocks(result_bits),
        };
        Self { kind, blocks, page_blocks }
    }

    /// As a directory describes it; `None` if no filter is so.
    pub(super) fn described(tag: u64, blocks: u64) -> Option<Self> {
        let shape = Self::new(FilterKind::of(tag)?, blocks);
        let is_whole = match shape.kind {
            FilterKind::Salted | FilterKind::Direct => true,
            FilterKind::Ribbon { .. } => {
                blocks <= shape.page_blocks || blocks.is_multiple_of(shape.page_blocks)
            }
        };
        (blocks > 0 && is_whole).then_some(shape)
    }

    pub(super) fn kind(&self) -> FilterKind {
        self.kind
    }

    pub(super) fn blocks(&self) -> u64 {
        self.blocks
    }

    fn block_bytes(&self) -> usize {
        match self.kind {
            FilterKind::Salted | FilterKind::Direct => BLOCK_BYTES,
            FilterKind::Ribbon { result_bits } => usize::from(result_bits) * size_of::<u64>(),
        }
    }

    /// Bits without checksums and zeros.
    pub(super) fn bits(&self) -> u64 {
        self.blocks * self.block_bytes() as u64 * 8
    }

    /// Filter pages.
    pub(super) fn page_count(&self) -> u64 {
        self.blocks.div_ceil(self.page_blocks)
    }

    /// Bytes of filter page `page`.
    pub(super) fn page_bytes(&self, page: u64) -> usize {
        let begin = page * self.page_blocks;
        let is_ribbon = matches!(self.kind, FilterKind::Ribbon { .. });
        if begin + self.page_blocks < self.blocks || is_ribbon && self.blocks > self.page_blocks {
            PAGE_BYTES
        } else {
            CHECKSUM_BYTES + (self.blocks - begin) as usize * self.block_bytes()
        }
    }

    /// Bytes of the whole filter; `None` if the number can not be one of a real file.
    pub(super) fn bytes(&self) -> Option<u64> {
        let last = self.page_count().checked_sub(1)?;
        last.checked_mul(PAGE_BYTES as u64)?.checked_add(self.page_bytes(last) as u64)
    }

    /// The page of a fingerprint.
    #[inline]
    pub(super) fn page_of(&self, value: u128) -> u64 {
        match self.kind {
            FilterKind::Salted | FilterKind::Direct => scaled(value, self.blocks).0 / PAGE_BLOCKS,
            FilterKind::Ribbon { .. } => scaled(value, self.page_count()).0,
        }
    }

    /// Calls `passed` with the index of each fingerprint that may be in the section; that the others are not is certain.
    /// `pages` are whole ones from `first_page` on, and hold those of all fingerprints.
    pub(super) fn pass(
        &self,
        pages: &[u8],
        first_page: u64,
        values: impl Iterator<Item = u128>,
        passed: impl FnMut(usize),
    ) {
        let page_begin = |page: u64| (page - first_page) as usize * PAGE_BYTES + CHECKSUM_BYTES;
        match self.kind {
            FilterKind::Salted => self.pass_bloom::<true>(pages, page_begin, values, passed),
            FilterKind::Direct => self.pass_bloom::<false>(pages, page_begin, values, passed),
            FilterKind::Ribbon { result_bits } => {
                let shape = ribbon::Shape { result_bits, blocks: self.blocks.min(self.page_blocks) };
                self.pass_ribbon(shape, pages, page_begin, values, passed);
            }
        }
    }

    /// Of several fingerprints half of the block is looked at, without a branch on what it says, before the other half of the few
    /// that passed: a wrong guess would throw away the words of the next ones, which are on their way.
    fn pass_bloom<const SALTED: bool>(
        &self,
        pages: &[u8],
        page_begin: impl Fn(u64) -> usize,
        mut values: impl Iterator<Item = u128>,
        mut passed: impl FnMut(usize),
    ) {
        let mut halfway = [(0, 0, 0); LOOKED_AT_TOGETHER];
        let mut begin = 0;
        loop {
            let (mut count, mut left) = (0, 0);
            for (index, value) in values.by_ref().take(LOOKED_AT_TOGETHER).enumerate() {
                let block = scaled(value, self.blocks).0;
                let at = page_begin(block / PAGE_BLOCKS) + (block % PAGE_BLOCKS) as usize * BLOCK_BYTES;
                halfway[left] = (index, at, value as u64);
                left += usize::from(holds_half::<SALTED>(&pages[at..at + BLOCK_BYTES], value as u64, 0));
                count += 1;
            }
            for (index, at, low) in &halfway[..left] {
                if holds_half::<SALTED>(&pages[*at..at + BLOCK_BYTES], *low, 1) {
                    passed(begin + index);
                }
            }
            if count < LOOKED_AT_TOGETHER {
                return;
            }
            begin += count;
        }
    }

    /// Of several fingerprints the first words are fetched before any is looked at, so that the waits for them overlap.
    fn pass_ribbon(
        &self,
        shape: ribbon::Shape,
        pages: &[u8],
        page_begin: impl Fn(u64) -> usize,
        mut values: impl Iterator<Item = u128>,
        mut passed: impl FnMut(usize),
    ) {
        let page_count = self.page_count();
        let words_bytes = shape.blocks as usize * self.block_bytes();
        let mut fetched = [(ribbon::Sums::NONE, 0); FETCHED_TOGETHER];
        let mut begin = 0;
        loop {
            let mut count = 0;
            for (place, value) in fetched.iter_mut().zip(&mut values) {
                let (page, within) = scaled(value, page_count);
                let words_begin = page_begin(page);
                let words = &pages[words_begin..words_begin + words_bytes];
                *place = (ribbon::Sums::fetch(shape, words, value, within), words_begin);
                count += 1;
            }
            for (index, (sums, words_begin)) in fetched[..count].iter().enumerate() {
                if sums.may_contain(shape, &pages[*words_begin..words_begin + words_bytes]) {
                    passed(begin + index);
                }
            }
            if count < FETCHED_TOGETHER {
                return;
            }
            begin += count;
        }
    }

    /// Expected false positives with so many keys in it.
    pub(super) fn false_positive_rate(&self, keys: u64) -> f64 {
        match self.kind {
            FilterKind::Salted | FilterKind::Direct => bloom_false_positive_rate(keys, self.blocks),
            FilterKind::Ribbon { result_bits } => 0.5_f64.powi(i32::from(result_bits)),
        }
    }
}

/// A fingerprint's place among `count` equal parts of all fingerprints, and its place in that part as a fraction of 2^64.
#[inline]
fn scaled(value: u128, count: u64) -> (u64, u64) {
    let top = u128::from((value >> 24) as u64);
    let place = top.wrapping_mul(u128::from(count));
    ((place >> 64) as u64, place as u64)
}

/// Expected false positives of a Bloom filter. A block holds a Poisson-distributed number of keys; with k of them, each
/// of the eight bits that are looked at is set with a chance of 1 - (31/32)^k (Putze et al., Cache-, Hash- and
/// Space-Efficient Bloom Filters, 2009).
fn bloom_false_positive_rate(keys: u64, blocks: u64) -> f64 {
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

/// Makes the pages of a filter one after another, from fingerprints in ascending order.
#[derive(Debug)]
pub(super) struct FilterPages {
    shape: FilterShape,
    page: u64,
    making: Making,
}

#[derive(Debug)]
enum Making {
    Bloom(Vec<u8>),
    Ribbon(ribbon::Band),
}

impl FilterPages {
    pub(super) fn new(shape: FilterShape) -> Self {
        let making = match shape.kind {
            FilterKind::Salted | FilterKind::Direct => Making::Bloom(vec![0; shape.page_bytes(0)]),
            FilterKind::Ribbon { .. } => {
                Making::Ribbon(ribbon::Band::new(shape.blocks.min(shape.page_blocks)))
            }
        };
        Self { shape, page: 0, making }
    }

    /// The page in work; the number of pages after the last one.
    pub(super) fn page(&self) -> u64 {
        self.page
    }

    /// The page of a fingerprint, which must be the one in work when it is inserted.
    #[inline]
    pub(super) fn page_of(&self, value: u128) -> u64 {
        self.shape.page_of(value)
    }

    /// Takes a fingerprint of the page in work.
    #[inline]
    pub(super) fn insert(&mut self, value: u128) {
        match &mut self.making {
            Making::Bloom(bytes) => {
                let block = scaled(value, self.shape.blocks).0;
                let begin = CHECKSUM_BYTES + (block % PAGE_BLOCKS) as usize * BLOCK_BYTES;
                insert(self.shape.kind, &mut bytes[begin..begin + BLOCK_BYTES], value);
            }
            Making::Ribbon(band) => band.insert(value, scaled(value, self.shape.page_count()).1),
        }
    }

    /// Ends the page in work: its bytes, not sealed yet.
    pub(super) fn take_page(&mut self, bytes: &mut Vec<u8>) {
        bytes.clear();
        bytes.resize(self.shape.page_bytes(self.page), 0);
        match (&mut self.making, self.shape.kind) {
            (Making::Ribbon(band), FilterKind::Ribbon { result_bits }) => {
                let blocks = self.shape.blocks.min(self.shape.page_blocks) as usize;
                let words = CHECKSUM_BYTES..CHECKSUM_BYTES + blocks * self.shape.block_bytes();
                band.take_page(result_bits, self.page, &mut bytes[words]);
            }
            (Making::Bloom(made), _) => {
                std::mem::swap(bytes, made);
                let next = self.page + 1;
                made.clear();
                if next < self.shape.page_count() {
                    made.resize(self.shape.page_bytes(next), 0);
                }
            }
            (Making::Ribbon(_), _) => unreachable!("a band is made for ribbon filters"),
        }
        self.page += 1;
    }
}

/// Sets the bits of a fingerprint in its block.
fn insert(kind: FilterKind, block: &mut [u8], value: u128) {
    for (pair, words) in block.chunks_exact_mut(8).enumerate() {
        let set = u64::from_le_bytes(*words.first_chunk().expect("a pair of words has 8 bytes"));
        words.copy_from_slice(&(set | mask(kind, value as u64, pair)).to_le_bytes());
    }
}

/// Whether half of a block, 0 or 1, has the bits of a fingerprint. One half sends 15 of 16 away that are not there.
#[inline]
fn holds_half<const SALTED: bool>(block: &[u8], low: u64, half: usize) -> bool {
    let kind = if SALTED { FilterKind::Salted } else { FilterKind::Direct };
    let missing_of = |pair: usize| {
        let bytes = block[pair * 8..].first_chunk().expect("a block has four pairs of words");
        mask(kind, low, pair) & !u64::from_le_bytes(*bytes)
    };
    (missing_of(2 * half) | missing_of(2 * half + 1)) == 0
}

/// The bits of a fingerprint in a pair of words of its block.
#[inline]
fn mask(kind: FilterKind, low: u64, pair: usize) -> u64 {
    if kind == FilterKind::Salted {
        let bit_of = |salt: u32| (low as u32).wrapping_mul(salt) >> 27;
        1 << bit_of(SALTS[pair * 2]) | 1 << (32 + bit_of(SALTS[pair * 2 + 1]))
    } else {
        let bits = low >> (pair * 10);
        1 << (bits & 31) | 1 << (32 + (bits >> 5 & 31))
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

    fn block_of(&self, fingerprint: Fingerprint) -> usize {
        scaled(fingerprint.value(), self.blocks.len() as u64).0 as usize
    }

    /// Takes a key.
    pub fn insert(&mut self, fingerprint: Fingerprint) {
        let block = self.block_of(fingerprint);
        insert(FilterKind::Direct, &mut self.blocks[block], fingerprint.value());
    }

    /// Whether the key may have been taken; `false` is certain.
    pub fn may_contain(&self, fingerprint: Fingerprint) -> bool {
        let (block, low) = (&self.blocks[self.block_of(fingerprint)], fingerprint.value() as u64);
        holds_half::<false>(block, low, 0) && holds_half::<false>(block, low, 1)
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

    fn shapes() -> Vec<FilterShape> {
        let bloom = |keys| FilterShape::for_keys(keys, 100_000_000, FilterEffort::Quick);
        let ample = |keys| FilterShape::for_keys(keys, keys, FilterEffort::Ample);
        let ribbon = |keys, result_bits| {
            FilterShape::new(FilterKind::Ribbon { result_bits }, ribbon::block_count(keys, result_bits))
        };
        vec![
            bloom(50_000),
            ample(50_000),
            ribbon(50_000, 8),
            ribbon(50_000, 11),
            ribbon(50_000, 14),
            ribbon(300, 9),
        ]
    }

    /// All pages of a filter of sorted fingerprints, each padded to its full size.
    fn pages_of(shape: FilterShape, sorted: &[u128]) -> Vec<u8> {
        let (mut pages, mut making, mut page) = (Vec::new(), FilterPages::new(shape), Vec::new());
        let mut take = |making: &mut FilterPages| {
            let index = making.page();
            making.take_page(&mut page);
            assert_eq!(page.len(), shape.page_bytes(index));
            pages.extend_from_slice(&page);
            pages.resize((index + 1) as usize * PAGE_BYTES, 0);
        };
        for value in sorted {
            while making.page() < making.page_of(*value) {
                take(&mut making);
            }
            making.insert(*value);
        }
        while making.page() < shape.page_count() {
            take(&mut making);
        }
        pages
    }

    fn count_passing(shape: &FilterShape, pages: &[u8], values: &[u128]) -> usize {
        let mut passing = 0;
        shape.pass(pages, 0, values.iter().copied(), |_| passing += 1);
        passing
    }

    #[test]
    fn a_filter_lets_its_keys_pass_and_as_many_others_as_computed() {
        for shape in shapes() {
            let keys = if shape.page_count() == 1 { 300 } else { 50_000 };
            let mut held: Vec<u128> = (0..keys).map(value).collect();
            held.sort_unstable();
            let pages = pages_of(shape, &held);
            assert_eq!(
                count_passing(&shape, &pages, &held),
                held.len(),
                "a filter never says new of its key"
            );
            let others: Vec<u128> = (1_000_000..1_400_000).map(value).collect();
            let expected = shape.false_positive_rate(keys) * others.len() as f64;
            let found = count_passing(&shape, &pages, &others) as f64;
            assert!(
                (found - expected).abs() < 0.05 * expected + 5.0 * expected.sqrt() + 5.0,
                "{shape:?}: {found}, {expected}"
            );
        }
    }

    #[test]
    fn large_lasting_sections_have_ribbon_filters_and_others_bloom_filters() {
        let kind = |keys, effort| FilterShape::for_keys(keys, 1_000_000_000, effort).kind();
        assert_eq!(kind(64_000_000, FilterEffort::Quick), FilterKind::Direct);
        assert_eq!(kind(RIBBON_KEYS_MIN - 1, FilterEffort::Small), FilterKind::Direct);
        assert_eq!(kind(64_000_000, FilterEffort::Small), FilterKind::Ribbon { result_bits: 11 });
        assert_eq!(kind(125_000_000, FilterEffort::Small), FilterKind::Ribbon { result_bits: 10 });
        let large = FilterShape::for_keys(125_000_000, 1_000_000_000, FilterEffort::Small);
        let bits_per_key = large.bytes().unwrap() as f64 * 8.0 / 125e6;
        assert!((11.0..12.0).contains(&bits_per_key), "{bits_per_key}");
    }

    #[test]
    fn what_passes_together_is_what_passes_alone() {
        let mut keys: Vec<u128> = (0..20_000).map(value).collect();
        keys.sort_unstable();
        // 14 bits a key: about one in three hundred that are absent passes
        let absent: Vec<u128> = (20_000..24_321).map(value).collect();
        let mut asked: Vec<u128> = keys.iter().step_by(7).chain(&absent).copied().collect();
        asked.sort_unstable();
        let blocks = 20_000 * 14 / (8 * BLOCK_BYTES as u64);
        for kind in [FilterKind::Salted, FilterKind::Direct, FilterKind::Ribbon { result_bits: 8 }] {
            let shape = match kind {
                FilterKind::Ribbon { result_bits } => {
                    FilterShape::new(kind, ribbon::block_count(20_000, result_bits))
                }
                _ => FilterShape::new(kind, blocks),
            };
            let pages = pages_of(shape, &keys);
            for count in [0, 1, 63, 64, 65, 128, asked.len()] {
                let mut together = Vec::new();
                shape.pass(&pages, 0, asked[..count].iter().copied(), |index| together.push(index));
                let passes = |index: &usize| count_passing(&shape, &pages, &asked[*index..=*index]) == 1;
                let alone: Vec<usize> = (0..count).filter(passes).collect();
                assert_eq!(together, alone, "{kind:?} {count}");
                assert!(count < asked.len() || alone.len() < asked.len() - 4_000, "{kind:?}");
            }
        }
    }

    #[test]
    fn filter_pages_add_up_to_the_filter() {
        let bloom =
            [1, 126, 127, 128, 254, 255, 1000].map(|blocks| FilterShape::new(FilterKind::Direct, blocks));
        for shape in bloom.into_iter().chain(shapes()) {
            let sum: usize = (0..shape.page_count()).map(|page| shape.page_bytes(page)).sum();
            assert_eq!(shape.bytes(), Some(sum as u64), "{shape:?}");
            assert_eq!(FilterShape::described(shape.kind.tag(), shape.blocks), Some(shape));
        }
    }

    #[test]
    fn what_no_program_wrote_is_no_filter() {
        assert_eq!(FilterShape::described(DIRECT_TAG, 0), None);
        for tag in [
            0,
            4,
            1 << 8 | DIRECT_TAG,
            RIBBON_TAG,
            7 << 8 | RIBBON_TAG,
            17 << 8 | RIBBON_TAG,
            1 << 16 | 8 << 8 | RIBBON_TAG,
        ] {
            assert_eq!(FilterShape::described(tag, 1), None, "{tag}");
        }
        let page_blocks = ribbon::page_blocks(8);
        assert!(FilterShape::described(8 << 8 | RIBBON_TAG, 3 * page_blocks).is_some());
        assert_eq!(FilterShape::described(8 << 8 | RIBBON_TAG, 3 * page_blocks + 1), None);
    }

    proptest! {
        /// Goal: sorted fingerprints visit pages in order and never beyond the last one.
        #[test]
        fn pages_follow_the_order_of_fingerprints(
            one in 0u128..1 << 88, other in 0u128..1 << 88, pages in 1u64..1 << 30, result_bits in ribbon::RESULT_BITS
        ) {
            let (low, high) = (one.min(other), one.max(other));
            let ribbon = FilterShape::new(FilterKind::Ribbon { result_bits }, pages * ribbon::page_blocks(result_bits));
            for shape in [FilterShape::new(FilterKind::Direct, pages), ribbon] {
                prop_assert!(shape.page_of(low) <= shape.page_of(high));
                prop_assert!(shape.page_of(high) < shape.page_count());
            }
        }
    }
}
