//! How fast the disk below the state is, from a short calibration: random reads in flight together, and one long walk.
//!
//! The figures only steer which way a section is read and how far apart pages are still read together; a wrong figure
//! costs time, never an answer.
//!
//! Bounds: [`WINDOWS`] times [`WINDOW`] of reading, twice, of the largest segment.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::Rng;

use super::StoreError;
use super::page::PAGE_BYTES;
use super::reads::Reads;
use super::segment::Segment;

/// How often and how long each of the two figures is measured.
const WINDOWS: usize = 2;
const WINDOW: Duration = Duration::from_millis(30);
/// Reads per second and bytes per second of a modest SSD, until the device was measured: `benches/run dedup` prints 40 to 80
/// thousand reads and 0.6 to 1.2 GB/s of a virtual disk.
const DEFAULT: Device = Device { reads_per_second: 60_000.0, bytes_per_second: 1e9 };
/// Bounds of the gap over which reads are joined: below, a page is read for nothing; above, buffers are.
const GAP_BYTES: (u64, u64) = (8 << 10, 128 << 10);

/// Speed of a disk.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Device {
    /// Random reads of one page, many in flight.
    pub(super) reads_per_second: f64,
    /// Sequential reads.
    pub(super) bytes_per_second: f64,
}

impl Default for Device {
    fn default() -> Self {
        DEFAULT
    }
}

impl Device {
    /// Two reads that lie closer are one read: reading the gap takes no longer than another read.
    pub(super) fn gap_bytes(&self) -> u64 {
        ((self.bytes_per_second / self.reads_per_second) as u64).clamp(GAP_BYTES.0, GAP_BYTES.1)
    }

    /// Seconds to read `reads` pages spread evenly over `bytes`: each alone, or all of it where they lie densely.
    pub(super) fn seconds(&self, reads: f64, bytes: f64) -> f64 {
        let alone = reads * (1.0 / self.reads_per_second + PAGE_BYTES as f64 / self.bytes_per_second);
        alone.min(bytes / self.bytes_per_second)
    }

    /// Measures with the reads of all workers on a file larger than their buffers.
    pub(super) fn measure(
        workers: &mut [&mut Reads],
        read_bytes_max: usize,
        segment: &Segment,
    ) -> Result<Self, StoreError> {
        let bytes = segment.entry.bytes;
        let pages = (bytes / PAGE_BYTES as u64).max(1);
        let page_rate = best_rate(workers, segment, &|| {
            let position = rand::rng().random_range(0..pages) * PAGE_BYTES as u64;
            (position, PAGE_BYTES.min((bytes - position) as usize))
        })?;
        let chunks = (bytes / read_bytes_max as u64).max(1);
        let next_chunk = AtomicU64::new(rand::rng().random_range(0..chunks));
        let chunk_rate = best_rate(workers, segment, &|| {
            let position = next_chunk.fetch_add(1, Ordering::Relaxed) % chunks * read_bytes_max as u64;
            (position, read_bytes_max.min((bytes - position) as usize))
        })?;
        Ok(Self {
            reads_per_second: page_rate.max(1.0),
            bytes_per_second: (chunk_rate * read_bytes_max as f64).max(1.0),
        })
    }
}

/// Gives places to read, one after another.
type Places<'a> = &'a (dyn Fn() -> (u64, usize) + Sync);

/// Reads per second of all workers together, in the best of the windows: whoever else is busy only slows them down.
fn best_rate(workers: &mut [&mut Reads], segment: &Segment, places: Places<'_>) -> Result<f64, StoreError> {
    let mut best = 0.0;
    for _ in 0..WINDOWS {
        let rates: Vec<Result<f64, StoreError>> = std::thread::scope(|scope| {
            let mut running = Vec::with_capacity(workers.len());
            for reads in workers.iter_mut() {
                let thread = std::thread::Builder::new().name("dedup-measure".to_owned());
                // A thread that the system does not grant is one worker less.
                running.extend(thread.spawn_scoped(scope, || rate(reads, segment, places)).ok());
            }
            let ended = running.into_iter().map(|thread| match thread.join() {
                Ok(rate) => rate,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            ended.collect()
        });
        best = rates.into_iter().sum::<Result<f64, StoreError>>()?.max(best);
    }
    Ok(best)
}

/// Reads per second of one worker, with as many in flight as it has buffers.
fn rate(reads: &mut Reads, segment: &Segment, places: Places<'_>) -> Result<f64, StoreError> {
    let begun = Instant::now();
    let mut ended = 0u64;
    while begun.elapsed() < WINDOW || reads.is_busy() {
        while begun.elapsed() < WINDOW && reads.has_room() {
            let (position, bytes) = places();
            segment.start_read(reads, position, bytes, 0)?;
        }
        if reads.is_busy() {
            let done = reads.next().map_err(|failed| segment.read_failed(failed.error))?;
            reads.release(done);
            ended += 1;
        }
    }
    Ok(ended as f64 / begun.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dense_reads_cost_what_a_walk_costs_and_sparse_ones_what_each_costs() {
        let device = Device { reads_per_second: 50_000.0, bytes_per_second: 1e9 };
        assert_eq!(device.seconds(1e6, 1e8), 0.1);
        let sparse = device.seconds(1_000.0, 1e12);
        assert!((0.020..0.025).contains(&sparse), "{sparse}");
        assert_eq!(device.gap_bytes(), 20_000);
        assert_eq!(Device { reads_per_second: 1e6, bytes_per_second: 1e9 }.gap_bytes(), GAP_BYTES.0);
        assert_eq!(Device { reads_per_second: 100.0, bytes_per_second: 1e9 }.gap_bytes(), GAP_BYTES.1);
    }
}
