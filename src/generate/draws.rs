//! Random draws that are the same on every machine: 32-bit integers from ChaCha8, one stream per subject.
//!
//! The generator of a subject is the seed's ChaCha8 set to the stream of that subject's number, so it can be made
//! for any subject at any time at the price of one refill, 256 bytes.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// A share in whole millionths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Millionths(pub(super) u32);

impl Millionths {
    /// Rounds a share between 0 and 1.
    pub(super) fn of(share: f64) -> Self {
        Self((share * 1e6).round().clamp(0.0, 1e6) as u32)
    }
}

/// Quantiles of a duration: (millionths of all, milliseconds), both increasing, from 0 to 1 000 000. Between two of
/// them the duration is uniform.
pub(super) type Quantiles = [(u32, u32)];

/// Draws for one subject.
#[derive(Debug, Clone)]
pub(super) struct Draws(ChaCha8Rng);

impl Draws {
    /// The seed's draws for stream 0.
    pub(super) fn new(seed: u64) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..].copy_from_slice(b"tidemill generated event");
        Self(ChaCha8Rng::from_seed(key))
    }

    /// The same seed's draws for the subject of this number, from this 32-bit word on.
    pub(super) fn of_subject(&self, number: u64, first_word: u32) -> Self {
        let mut draws = self.0.clone();
        draws.set_stream(number);
        draws.set_word_pos(u128::from(first_word));
        Self(draws)
    }

    /// 32 even bits.
    pub(super) fn bits(&mut self) -> u32 {
        self.0.next_u32()
    }

    /// 64 even bits.
    pub(super) fn bits_64(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A number below `end`, which is at least 1. The bias is at most `end` / 2^32.
    pub(super) fn below(&mut self, end: u32) -> u32 {
        ((u64::from(self.bits()) * u64::from(end)) >> 32) as u32
    }

    /// A number below `end`, which is at least 1. The bias is at most `end` / 2^64.
    pub(super) fn below_64(&mut self, end: u64) -> u64 {
        ((u128::from(self.bits_64()) * u128::from(end)) >> 64) as u64
    }

    /// True for this share of draws.
    pub(super) fn chance(&mut self, share: Millionths) -> bool {
        self.below(1_000_000) < share.0
    }

    /// One of `choices`, which is not empty.
    pub(super) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u32) as usize]
    }

    /// A duration in milliseconds of this distribution.
    pub(super) fn duration_ms(&mut self, quantiles: &Quantiles) -> i64 {
        let at = self.below(1_000_000);
        let upper = quantiles.partition_point(|(share, _)| *share <= at);
        let (share_low, ms_low) = quantiles[upper - 1];
        let (share_high, ms_high) = quantiles[upper];
        let along =
            u64::from(at - share_low) * u64::from(ms_high - ms_low) / u64::from(share_high - share_low);
        i64::from(ms_low) + along as i64
    }
}
