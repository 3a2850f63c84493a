//! Reads of one worker: several in flight, each into a buffer of its own.
//!
//! Where the kernel grants io_uring, reads are in flight together. Elsewhere a read is done when it is begun, and
//! parallel reads come from more workers ([`workers`]).
//!
//! Reads go around the page cache (O_DIRECT) where the file system can, so that a walk over a state larger than memory
//! does not push out what others use. Positions and lengths are rounded to 4 KiB for that.
//!
//! Bounds: `depth` buffers of the size given, allocated once.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::page::PAGE_BYTES;
use super::uring::Ring;

/// What direct I/O is aligned to. 4 KiB serves every device that has no larger sectors; where one has, the read is
/// repeated through the page cache.
const ALIGN_BYTES: usize = 4096;
/// Workers with a ring each: four to six had the best rate on two cores, twelve were no better (`benches/run dedup`).
const RING_WORKERS: usize = 4;
/// Workers where reads block: at 16 both cores were busy.
const PLAIN_WORKERS: usize = 16;
/// Fewest and most reads in flight per ring; a ring of fewer is not worth its making.
const DEPTH: (usize, usize) = (8, 32);
/// Largest read.
const READ_BYTES_MAX: usize = 256 << 10;

/// Bytes of a buffer beside those of its largest read: rounding at both ends, and the alignment of its begin.
const SLOT_BYTES_BESIDE: usize = 3 * ALIGN_BYTES;

/// A file open for reads, twice where it can: around the page cache and through it.
#[derive(Debug, Clone)]
pub(super) struct ReadFile {
    pub(super) buffered: Arc<File>,
    pub(super) direct: Option<Arc<File>>,
}

/// Bytes aligned for direct I/O.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    begin: usize,
    length: usize,
}

impl Buffer {
    pub(super) fn new(length: usize) -> Self {
        let bytes = vec![0; length + ALIGN_BYTES];
        let begin = bytes.as_ptr().align_offset(ALIGN_BYTES);
        assert!(begin <= ALIGN_BYTES, "bytes can be aligned");
        Self { bytes, begin, length }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.begin..self.begin + self.length]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.begin..self.begin + self.length]
    }
}

/// How many workers read, how many reads each has in flight, and how large they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ReadLimits {
    pub(super) workers: usize,
    pub(super) depth: usize,
    /// Largest read.
    pub(super) read_bytes_max: usize,
}

impl ReadLimits {
    /// Shares out `bytes` of buffers. Never less than one worker with two reads of one page in flight.
    pub(super) fn within(bytes: u64) -> Self {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        let slots = (bytes / (4 * ALIGN_BYTES)).clamp(2, RING_WORKERS * DEPTH.1);
        let workers = (slots / DEPTH.0).clamp(1, RING_WORKERS);
        let depth = slots / workers;
        let buffer = bytes / (workers * depth);
        let read_bytes_max = buffer.saturating_sub(SLOT_BYTES_BESIDE) / PAGE_BYTES * PAGE_BYTES;
        Self { workers, depth, read_bytes_max: read_bytes_max.clamp(PAGE_BYTES, READ_BYTES_MAX) }
    }

    /// The same bytes for workers whose reads block.
    fn plain(self) -> Self {
        let workers = (self.workers * self.depth).min(PLAIN_WORKERS);
        Self { workers, depth: 1, read_bytes_max: self.read_bytes_max }
    }
}

/// Sets of reads, one for each worker.
pub(super) fn workers(limits: ReadLimits) -> (ReadLimits, Vec<Reads>) {
    let blocking = |limits: ReadLimits| (limits, (0..limits.workers).map(|_| Reads::plain(limits)).collect());
    if limits.depth < DEPTH.0 {
        return blocking(limits.plain());
    }
    let rings: io::Result<Vec<Reads>> = (0..limits.workers).map(|_| Reads::with_ring(limits)).collect();
    match rings {
        Ok(rings) => (limits, rings),
        Err(error) => {
            tracing::info!(%error, "the kernel grants no io_uring; dedup state is read with threads");
            blocking(limits.plain())
        }
    }
}

#[derive(Debug)]
enum Backend {
    Ring(Box<Ring>),
    /// Buffers, and slots whose read ended.
    Plain(Vec<Buffer>, VecDeque<(usize, io::Result<usize>)>),
}

/// One read as it was asked for.
#[derive(Debug, Clone)]
struct Asked {
    file: ReadFile,
    position: u64,
    bytes: usize,
    tag: u64,
}

/// A read that ended well. Its bytes stay until [`Reads::release`].
#[derive(Debug)]
pub(super) struct Done {
    pub(super) tag: u64,
    slot: usize,
    skip: usize,
    bytes: usize,
}

/// A read that did not end well.
#[derive(Debug)]
pub(super) struct Failed {
    /// Which one; `None` if the queue itself failed.
    pub(super) tag: Option<u64>,
    /// The system's error, or `UnexpectedEof` if the file ends before the bytes that were asked for.
    pub(super) error: io::Error,
}

/// Reads in flight.
#[derive(Debug)]
pub(super) struct Reads {
    limits: ReadLimits,
    backend: Backend,
    asked: Vec<Option<Asked>>,
    free: Vec<usize>,
}

impl Reads {
    fn with_ring(limits: ReadLimits) -> io::Result<Self> {
        let ring = Ring::new(limits.depth, limits.read_bytes_max + 2 * ALIGN_BYTES)?;
        Ok(Self::of(Backend::Ring(Box::new(ring)), limits))
    }

    fn plain(limits: ReadLimits) -> Self {
        let buffers =
            (0..limits.depth).map(|_| Buffer::new(limits.read_bytes_max + 2 * ALIGN_BYTES)).collect();
        Self::of(Backend::Plain(buffers, VecDeque::new()), limits)
    }

    fn of(backend: Backend, limits: ReadLimits) -> Self {
        Self { limits, backend, asked: vec![None; limits.depth], free: (0..limits.depth).collect() }
    }

    /// Whether another read can begin.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether a read is in flight or waits to be taken.
    pub(super) fn is_busy(&self) -> bool {
        self.asked.iter().any(Option::is_some)
    }

    /// Begins to read `bytes` bytes from `position` on.
    ///
    /// # Errors
    /// The system's, if not even the attempt is possible.
    ///
    /// # Panics
    /// If there is no room.
    pub(super) fn start(&mut self, file: &ReadFile, position: u64, bytes: usize, tag: u64) -> io::Result<()> {
        let slot = self.free.pop().expect("a read begins while there is room");
        let asked = Asked { file: file.clone(), position, bytes, tag };
        let (begin, length) = asked.aligned();
        let from = file.direct.as_ref().unwrap_or(&file.buffered);
        match &mut self.backend {
            Backend::Ring(ring) => ring.start(slot, from, begin, length)?,
            Backend::Plain(buffers, ended) => {
                let result = read_up_to(from, &mut buffers[slot].bytes_mut()[..length], begin);
                ended.push_back((slot, result));
            }
        }
        self.asked[slot] = Some(asked);
        Ok(())
    }

    /// The next read that ends, in any order.
    ///
    /// # Errors
    /// [`Failed`]; other reads go on.
    ///
    /// # Panics
    /// If none was begun.
    pub(super) fn next(&mut self) -> Result<Done, Failed> {
        let (slot, result) = match &mut self.backend {
            Backend::Ring(ring) => {
                let ended = ring.wait().map_err(|error| Failed { tag: None, error })?;
                (ended.slot, ended.result)
            }
            Backend::Plain(_, ended) => ended.pop_front().expect("a read was begun before it is waited for"),
        };
        let asked = self.asked[slot].take().expect("a read that ended was asked for");
        let done = self.complete(slot, &asked, result);
        done.map_err(|error| {
            self.free_slot(slot);
            Failed { tag: Some(asked.tag), error }
        })
    }

    /// Reads what is missing, through the page cache: a short read is rare, and so is a device that refuses 4 KiB.
    fn complete(&mut self, slot: usize, asked: &Asked, result: io::Result<usize>) -> io::Result<Done> {
        let (begin, _) = asked.aligned();
        let skip = (asked.position - begin) as usize;
        let wanted = skip + asked.bytes;
        let got = match result {
            Ok(got) => got,
            Err(error) if is_worth_another_way(&error) => 0,
            Err(error) => return Err(error),
        };
        if got < wanted {
            let buffer = self.buffer_mut(slot);
            asked.file.buffered.read_exact_at(&mut buffer[got..wanted], begin + got as u64)?;
        }
        Ok(Done { tag: asked.tag, slot, skip, bytes: asked.bytes })
    }

    fn buffer_mut(&mut self, slot: usize) -> &mut [u8] {
        match &mut self.backend {
            Backend::Ring(ring) => ring.bytes_mut(slot),
            Backend::Plain(buffers, _) => buffers[slot].bytes_mut(),
        }
    }

    /// The bytes that were asked for.
    pub(super) fn bytes(&self, done: &Done) -> &[u8] {
        let buffer = match &self.backend {
            Backend::Ring(ring) => ring.bytes(done.slot),
            Backend::Plain(buffers, _) => buffers[done.slot].bytes(),
        };
        &buffer[done.skip..done.skip + done.bytes]
    }

    /// Gives the buffer back.
    pub(super) fn release(&mut self, done: Done) {
        self.free_slot(done.slot);
    }

    fn free_slot(&mut self, slot: usize) {
        if let Backend::Ring(ring) = &mut self.backend {
            ring.release(slot);
        }
        self.free.push(slot);
    }

    /// Waits for everything that is in flight and forgets it: after an error. A queue that can not even wait is replaced
    /// by blocking reads, or what it still holds would be taken for reads that are begun later.
    pub(super) fn drain(&mut self) {
        while self.is_busy() {
            match self.next() {
                Ok(done) => self.release(done),
                Err(Failed { tag: Some(_), .. }) => {}
                Err(Failed { tag: None, error }) => {
                    tracing::warn!(%error, "the queue of reads failed; dedup state is read without it");
                    *self = Self::plain(self.limits);
                    return;
                }
            }
        }
    }
}

impl Asked {
    /// Position and length, rounded outwards for direct I/O.
    fn aligned(&self) -> (u64, usize) {
        let begin = self.position / ALIGN_BYTES as u64 * ALIGN_BYTES as u64;
        let end = (self.position + self.bytes as u64).next_multiple_of(ALIGN_BYTES as u64);
        (begin, (end - begin) as usize)
    }
}

/// Whether the page cache may succeed where direct I/O did not.
fn is_worth_another_way(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::InvalidInput | io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// Fills as much as the file holds.
fn read_up_to(file: &File, bytes: &mut [u8], position: u64) -> io::Result<usize> {
    let mut got = 0;
    while got < bytes.len() {
        match file.read_at(&mut bytes[got..], position + got as u64) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::dedup::disk;

    const BYTES: usize = 1_000_000;

    fn file() -> (ReadFile, Vec<u8>) {
        let content: Vec<u8> = (0..BYTES).map(|index| (index * 31 / 7) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&content).unwrap();
        file.sync_all().unwrap();
        (disk::for_reads(file, u64::MAX), content)
    }

    fn both(limits: ReadLimits) -> Vec<Reads> {
        let mut all = vec![Reads::plain(limits)];
        all.extend(Reads::with_ring(limits));
        all
    }

    #[test]
    fn many_reads_in_flight_give_the_bytes_that_were_asked_for() {
        let (file, content) = file();
        let limits = ReadLimits { workers: 1, depth: 7, read_bytes_max: 64 << 10 };
        for mut reads in both(limits) {
            let asked: Vec<(usize, usize)> =
                (0..500).map(|n| (n * 1_861 % 930_000, 1 + n * 131 % 65_000)).collect();
            let (mut next, mut seen) = (0, 0);
            while seen < asked.len() {
                while next < asked.len() && reads.has_room() {
                    reads.start(&file, asked[next].0 as u64, asked[next].1, next as u64).unwrap();
                    next += 1;
                }
                let done = reads.next().unwrap();
                let (position, bytes) = asked[done.tag as usize];
                assert!(reads.bytes(&done) == &content[position..position + bytes], "read {}", done.tag);
                reads.release(done);
                seen += 1;
            }
            assert!(!reads.is_busy());
        }
    }

    #[test]
    fn a_read_past_the_end_is_an_error_and_the_slot_is_free_again() {
        let (file, _) = file();
        for mut reads in both(ReadLimits { workers: 1, depth: 1, read_bytes_max: 8192 }) {
            for _ in 0..3 {
                reads.start(&file, BYTES as u64 - 10, 11, 0).unwrap();
                let failed = reads.next().unwrap_err();
                assert_eq!((failed.tag, failed.error.kind()), (Some(0), io::ErrorKind::UnexpectedEof));
            }
            reads.start(&file, BYTES as u64 - 10, 10, 0).unwrap();
            reads.drain();
            assert!(!reads.is_busy() && reads.has_room());
        }
    }

    #[test]
    fn buffers_stay_within_their_share() {
        for bytes in [0, 100 << 10, 1 << 20, 32 << 20, 1 << 30] {
            let limits = ReadLimits::within(bytes);
            let used = limits.workers * limits.depth * (limits.read_bytes_max + SLOT_BYTES_BESIDE);
            assert!(used as u64 <= bytes.max(8 * ALIGN_BYTES as u64), "{limits:?} of {bytes}");
            assert!(limits.workers >= 1 && limits.depth >= 1 && limits.read_bytes_max >= PAGE_BYTES);
        }
        assert_eq!(ReadLimits::within(1 << 30).read_bytes_max, READ_BYTES_MAX);
    }
}
