//! Pages: sorted fingerprints in at most 4 KiB, each readable on its own.
//!
//! Layout, little-endian:
//! ```text
//! checksum u64 | keys u16 | width u8 | kind u8 | first fingerprint 11 B, big-endian | the others | zeros
//! ```
//! Kind 1, Elias-Fano, which is what is written: the `keys - 1` other fingerprints by their distance from the first
//! one. `width` is the number of low bits of a distance. First the low bits of all distances, packed from the lowest bit
//! on, to the next whole byte; then, for distance number `i` (from 0), bit `(distance >> width) + i` is set. With `width`
//! near the logarithm of the mean gap this takes `width` + 2 bits per key, half a bit more than the entropy (Elias
//! 1974), and a fingerprint is found by counting zeros, without decoding the page: 8.0 bytes per key at 1e8 keys.
//!
//! Kind 0, which segments of format version 1 hold: the differences of neighbours, `width` bits each, packed alike.
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

const KIND_DELTAS: u8 = 0;
const KIND_ELIAS_FANO: u8 = 1;
const BODY_BYTES: usize = PAGE_BYTES - PAGE_HEAD_BYTES;
/// Bytes of one store of low bits.
const LOWS_STORE_BYTES: usize = size_of::<u128>();

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

/// Codes sorted fingerprints until a page is full.
#[derive(Debug)]
pub(super) struct PageBuilder {
    low_bits: u32,
    first: Option<u128>,
    last: u128,
    /// Distances coded so far.
    distances: usize,
    /// Low bits that fill whole bytes, and room for the widest store behind them.
    lows: Box<[u8; BODY_BYTES + LOWS_STORE_BYTES]>,
    lows_bytes: usize,
    /// Low bits that do not fill a byte yet, and how many: fewer than 8.
    waiting: u128,
    waiting_bits: u32,
    highs: [u64; BODY_BYTES.div_ceil(8)],
    highs_bits: usize,
}

impl PageBuilder {
    /// A builder for the pages of a section of about this many keys, at least 1, spread evenly as fingerprints are.
    pub(super) fn for_keys(keys: u64) -> Self {
        let gap = (1u128 << FINGERPRINT_BITS) / u128::from(keys.max(1));
        Self {
            low_bits: gap.max(1).ilog2().min(FINGERPRINT_BITS),
            first: None,
            last: 0,
            distances: 0,
            lows: Box::new([0; BODY_BYTES + LOWS_STORE_BYTES]),
            lows_bytes: 0,
            waiting: 0,
            waiting_bits: 0,
            highs: [0; BODY_BYTES.div_ceil(8)],
            highs_bits: 0,
        }
    }

    /// Takes the next fingerprint; `false` if it does not fit, then the page is to be written first.
    ///
    /// # Panics
    /// If fingerprints do not strictly increase.
    pub(super) fn push(&mut self, value: u128) -> bool {
        let Some(first) = self.first else {
            (self.first, self.last) = (Some(value), value);
            return true;
        };
        assert!(value > self.last, "fingerprints of a page strictly increase");
        let distance = value - first;
        let high = distance >> self.low_bits;
        let lows_bytes = ((self.distances + 1) * self.low_bits as usize).div_ceil(8);
        let highs_bits_max = (BODY_BYTES - lows_bytes.min(BODY_BYTES)) * 8;
        if self.distances + 2 > PAGE_KEYS_MAX
            || high >= (highs_bits_max.saturating_sub(self.distances)) as u128
        {
            return false;
        }
        self.waiting |= (distance & ((1u128 << self.low_bits) - 1)) << self.waiting_bits;
        self.waiting_bits += self.low_bits;
        let whole_bytes = (self.waiting_bits / 8) as usize;
        // A store of one size, of which the next one overwrites what is too much.
        self.lows[self.lows_bytes..self.lows_bytes + LOWS_STORE_BYTES]
            .copy_from_slice(&self.waiting.to_le_bytes());
        self.lows_bytes += whole_bytes;
        self.waiting = self.waiting.checked_shr(whole_bytes as u32 * 8).unwrap_or(0);
        self.waiting_bits %= 8;
        let bit = high as usize + self.distances;
        self.highs[bit / 64] |= 1 << (bit % 64);
        self.highs_bits = bit + 1;
        self.distances += 1;
        self.last = value;
        true
    }

    pub(super) fn first(&self) -> Option<u128> {
        self.first
    }

    /// Appends the page to `page`, not yet sealed and not padded, and begins the next one.
    pub(super) fn take_page(&mut self, page: &mut Vec<u8>) {
        let first = self.first.take().expect("a page that is written holds a key");
        page.extend_from_slice(&[0; CHECKSUM_BYTES]);
        page.extend_from_slice(&(self.distances as u16 + 1).to_le_bytes());
        page.push(self.low_bits as u8);
        page.push(KIND_ELIAS_FANO);
        page.extend_from_slice(Fingerprint::from_value(first).as_bytes());
        page.extend_from_slice(&self.lows[..self.lows_bytes]);
        if self.waiting_bits > 0 {
            page.push(self.waiting as u8);
        }
        let highs_end = page.len() + self.highs_bits.div_ceil(8);
        for word in &self.highs[..self.highs_bits.div_ceil(64)] {
            page.extend_from_slice(&word.to_le_bytes());
        }
        page.truncate(highs_end);
        self.highs[..self.highs_bits.div_ceil(64)].fill(0);
        self.lows_bytes = 0;
        (self.distances, self.waiting, self.waiting_bits, self.highs_bits) = (0, 0, 0, 0);
    }
}

/// The head of a page, whose sizes fit the page.
struct Head<'a> {
    keys: usize,
    width: u32,
    kind: u8,
    first: u128,
    body: &'a [u8],
}

impl<'a> Head<'a> {
    fn read(page: &'a [u8]) -> Result<Self, &'static str> {
        if page.len() < PAGE_HEAD_BYTES {
            return Err("a page is shorter than its head");
        }
        let keys = usize::from(u16::from_le_bytes([page[8], page[9]]));
        let (width, kind) = (u32::from(page[10]), page[11]);
        if keys == 0 || keys > PAGE_KEYS_MAX || width > FINGERPRINT_BITS || kind > KIND_ELIAS_FANO {
            return Err("the head of a page names impossible sizes");
        }
        let body = &page[PAGE_HEAD_BYTES..];
        if ((keys - 1) * width as usize).div_ceil(8) > body.len() {
            return Err("a page is shorter than its head says");
        }
        let first = fingerprint_at(page, CHECKSUM_BYTES + 4);
        Ok(Self { keys, width, kind, first, body })
    }

    /// Number `index` of the fields of `width` bits at the begin of the body.
    fn field(&self, index: usize) -> u128 {
        let bit = index * self.width as usize;
        (bytes16_at(self.body, bit / 8) >> (bit % 8)) & ((1u128 << self.width) - 1)
    }

    fn highs(&self) -> &'a [u8] {
        &self.body[((self.keys - 1) * self.width as usize).div_ceil(8)..]
    }
}

/// Reads an intact page into `values`, in order.
///
/// # Errors
/// What is wrong with the page, if its checksum was made over nonsense.
pub(super) fn read_page(page: &[u8], values: &mut Vec<u128>) -> Result<(), &'static str> {
    values.clear();
    let head = Head::read(page)?;
    values.push(head.first);
    match head.kind {
        KIND_DELTAS => read_deltas(&head, values)?,
        _ => read_elias_fano(&head, values)?,
    }
    if values.last().is_some_and(|last| last >> FINGERPRINT_BITS != 0) {
        return Err("a fingerprint of a page has more than 88 bits");
    }
    Ok(())
}

fn read_deltas(head: &Head<'_>, values: &mut Vec<u128>) -> Result<(), &'static str> {
    let mut value = head.first;
    for index in 0..head.keys - 1 {
        let delta = head.field(index);
        if delta == 0 {
            return Err("fingerprints of a page do not increase");
        }
        value += delta;
        values.push(value);
    }
    Ok(())
}

fn read_elias_fano(head: &Head<'_>, values: &mut Vec<u128>) -> Result<(), &'static str> {
    let (distances, highs) = (head.keys - 1, head.highs());
    let (mut index, mut last) = (0, head.first);
    for (word_index, bytes) in highs.chunks(8).enumerate() {
        let mut word = word_of(bytes);
        while word != 0 && index < distances {
            let bit = word_index * 64 + word.trailing_zeros() as usize;
            word &= word - 1;
            let value = head.first + (((bit - index) as u128) << head.width | head.field(index));
            if value <= last {
                return Err("fingerprints of a page do not increase");
            }
            values.push(value);
            (index, last) = (index + 1, value);
        }
    }
    if index == distances { Ok(()) } else { Err("a page holds fewer fingerprints than its head says") }
}

/// Whether an intact page holds a fingerprint.
///
/// # Errors
/// As [`read_page`], as far as the page was looked at.
pub(super) fn page_holds(page: &[u8], value: u128) -> Result<bool, &'static str> {
    let head = Head::read(page)?;
    if value <= head.first {
        return Ok(value == head.first);
    }
    if head.kind == KIND_DELTAS {
        let mut values = Vec::with_capacity(head.keys);
        read_deltas(&head, &mut values)?;
        return Ok(values.binary_search(&value).is_ok());
    }
    let distance = value - head.first;
    let (high, low) = (distance >> head.width, distance & ((1u128 << head.width) - 1));
    let highs = head.highs();
    let Some(mut bit) = usize::try_from(high).ok().and_then(|high| end_of_zeros(highs, high)) else {
        return Ok(false);
    };
    let mut index = bit - high as usize;
    while index < head.keys - 1 && highs.get(bit / 8).is_some_and(|byte| byte >> (bit % 8) & 1 == 1) {
        let found = head.field(index);
        if found >= low {
            return Ok(found == low);
        }
        (bit, index) = (bit + 1, index + 1);
    }
    Ok(false)
}

/// The bit after the first `zeros` zeros; `None` if there are fewer.
fn end_of_zeros(bytes: &[u8], zeros: usize) -> Option<usize> {
    let mut left = zeros;
    for (word_index, bytes) in bytes.chunks(8).enumerate() {
        let mut zeros_of_word = !word_of(bytes);
        let count = zeros_of_word.count_ones() as usize;
        if left > count {
            left -= count;
            continue;
        }
        let mut end = 0;
        // Whole bytes first, then zero by zero.
        while left > 0 {
            let of_byte = (zeros_of_word as u8).count_ones() as usize;
            if of_byte < left {
                (left, end, zeros_of_word) = (left - of_byte, end + 8, zeros_of_word >> 8);
                continue;
            }
            let step = zeros_of_word.trailing_zeros() as usize + 1;
            (left, end, zeros_of_word) =
                (left - 1, end + step, zeros_of_word.checked_shr(step as u32).unwrap_or(0));
        }
        return Some(word_index * 64 + end);
    }
    None
}

/// Up to 8 bytes as a number; what is missing counts as zero.
fn word_of(bytes: &[u8]) -> u64 {
    match bytes.first_chunk::<8>() {
        Some(chunk) => u64::from_le_bytes(*chunk),
        None => {
            let mut chunk = [0; 8];
            chunk[..bytes.len()].copy_from_slice(bytes);
            u64::from_le_bytes(chunk)
        }
    }
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

    fn pages_of(values: &[u128], keys: u64) -> Vec<Vec<u8>> {
        let mut builder = PageBuilder::for_keys(keys);
        let mut pages = Vec::new();
        let mut take = |builder: &mut PageBuilder| {
            let mut page = Vec::new();
            builder.take_page(&mut page);
            pages.push(page);
        };
        for value in values {
            if !builder.push(*value) {
                take(&mut builder);
                assert!(builder.push(*value), "an empty page takes any fingerprint");
            }
        }
        take(&mut builder);
        pages
    }

    /// A page of kind 0, as format version 1 wrote it: gaps of `delta_bits` bits.
    fn deltas_page(values: &[u128], delta_bits: u32) -> Vec<u8> {
        let mut page = vec![0; CHECKSUM_BYTES];
        page.extend_from_slice(&(values.len() as u16).to_le_bytes());
        page.extend_from_slice(&[delta_bits as u8, KIND_DELTAS]);
        page.extend_from_slice(Fingerprint::from_value(values[0]).as_bytes());
        let (mut waiting, mut waiting_bits) = (0u128, 0);
        for pair in values.windows(2) {
            waiting |= (pair[1] - pair[0]) << waiting_bits;
            waiting_bits += delta_bits;
            while waiting_bits >= 8 {
                page.push(waiting as u8);
                (waiting, waiting_bits) = (waiting >> 8, waiting_bits - 8);
            }
        }
        page.push(waiting as u8);
        page
    }

    proptest! {
        /// Goal: what goes into pages comes out, whatever the distances, and no page outgrows its size.
        #[test]
        fn pages_give_back_what_they_hold(
            values in prop::collection::btree_set(
                prop_oneof![0u128..2_000, 0u128..1 << 88, (1u128 << 88) - 9..1 << 88], 1..3_000),
            keys in 1u64..1 << 40,
        ) {
            let values: Vec<u128> = values.into_iter().collect();
            let (mut all, mut page_values) = (Vec::new(), Vec::new());
            for page in pages_of(&values, keys) {
                prop_assert!(page.len() <= PAGE_BYTES);
                read_page(&page, &mut page_values).unwrap();
                all.extend_from_slice(&page_values);
            }
            prop_assert_eq!(all, values);
        }

        /// Goal: a search without decoding finds exactly what the page holds.
        /// Method: values close together, so that many share their high bits; neighbours of all of them are asked for.
        #[test]
        fn a_page_holds_its_fingerprints_and_no_others(
            values in prop::collection::btree_set(0u128..100_000, 1..400), low_bits in 0u32..20, padding in 0usize..40
        ) {
            let values: Vec<u128> = values.into_iter().map(|value| value + (1 << 87)).collect();
            for mut page in pages_of(&values, 1 << (64 - low_bits.max(1))) {
                let mut held = Vec::new();
                page.resize((page.len() + padding).min(PAGE_BYTES), 0);
                read_page(&page, &mut held).unwrap();
                for value in &values {
                    for near in [value - 1, *value, value + 1] {
                        prop_assert_eq!(page_holds(&page, near).unwrap(), held.contains(&near));
                    }
                }
                prop_assert!(!page_holds(&page, (1 << 88) - 1).unwrap());
            }
        }
    }

    #[test]
    fn pages_of_version_1_are_read_and_searched() {
        let values: Vec<u128> = (0..100).map(|number| 1_000 + number * 37).collect();
        let page = deltas_page(&values, 6);
        let mut read = Vec::new();
        read_page(&page, &mut read).unwrap();
        assert_eq!(read, values);
        for value in 900..5_000 {
            assert_eq!(page_holds(&page, value).unwrap(), values.contains(&value), "{value}");
        }
    }

    #[test]
    fn uniform_keys_take_width_and_two_bits() {
        let keys = 100_000_000u64;
        let gap = (1u128 << 88) / u128::from(keys);
        let mix = |number: u128| xxhash_rust::xxh3::xxh3_128(&number.to_le_bytes()) % (2 * gap);
        let values: Vec<u128> = (0..100_000u128)
            .scan(0, |at, number| {
                *at += mix(number) + 1;
                Some(*at)
            })
            .collect();
        let bytes_per_key = (pages_of(&values, keys).len() * PAGE_BYTES) as f64 / values.len() as f64;
        assert!((7.8..8.1).contains(&bytes_per_key), "{bytes_per_key}");
    }

    #[test]
    fn dense_keys_stop_at_the_most_keys_of_a_page() {
        let values: Vec<u128> = (0..PAGE_KEYS_MAX as u128 + 1).collect();
        assert_eq!(pages_of(&values, u64::MAX).len(), 2);
    }

    #[test]
    fn a_page_read_from_another_place_is_not_intact() {
        let mut page = pages_of(&[1, 5, 9], 3).remove(0);
        seal(&mut page, 77, 4096);
        assert!(is_intact(&page, 77, 4096));
        assert!(!is_intact(&page, 77, 8192));
        assert!(!is_intact(&page, 78, 4096));
        assert!(!is_intact(&page[..5], 77, 4096));
    }

    #[test]
    fn a_flipped_bit_is_seen() {
        let mut page = pages_of(&[1, 5, 900, 1 << 60], 4).remove(0);
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
        let good = pages_of(&[1, 5, 9], 3).remove(0);
        assert!(read_page(&good[..10], &mut values).is_err());
        for (at, byte) in [(8, 0), (8, 200), (9, 0xff), (10, 89), (11, 2)] {
            let mut page = good.clone();
            page[at] = byte;
            assert!(read_page(&page, &mut values).is_err(), "byte {at} = {byte}");
        }
        let deltas = deltas_page(&[1, 5, 9], 4);
        for (at, byte) in [(8, 200), (10, 0), (PAGE_HEAD_BYTES, 0)] {
            let mut page = deltas.clone();
            page[at] = byte;
            assert!(read_page(&page, &mut values).is_err(), "byte {at} = {byte}");
        }
    }

    proptest! {
        /// Goal: no bytes make reading or searching panic.
        #[test]
        fn any_bytes_are_a_page_or_an_error(
            mut page in prop::collection::vec(any::<u8>(), 0..4096), keys in 0u16..600, width in 0u8..90, kind in 0u8..3,
            value in 0u128..1 << 88,
        ) {
            if page.len() > PAGE_HEAD_BYTES {
                page[8..10].copy_from_slice(&keys.to_le_bytes());
                (page[10], page[11]) = (width, kind);
            }
            let mut values = Vec::new();
            if read_page(&page, &mut values).is_ok() {
                prop_assert!(values.is_sorted());
            }
            let _ = page_holds(&page, value);
        }
    }
}
