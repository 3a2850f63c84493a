//! The device below the state: what bounds every figure, so it is measured on the state's own files, just before.
//!
//! Direct I/O, so the page cache neither helps nor fills; where the file system has none the figures say so. Reads
//! begin at places drawn anew each time: a range that was read before may be faster than one that was not.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, OFlags, fadvise};
use serde_json::{Value, json};

use super::Failure;

const RANDOM_BYTES: u64 = 4 << 10;
const RANDOM_DEPTH: usize = 64;
const SEQUENTIAL_BYTES: u64 = 1 << 20;
const SEQUENTIAL_DEPTH: usize = 4;
const MEASURED_FOR: Duration = Duration::from_secs(1);

#[repr(align(4096))]
#[derive(Clone, Copy)]
struct Block([u8; RANDOM_BYTES as usize]);

#[repr(align(4096))]
#[derive(Clone, Copy)]
struct LargeBlock([u8; SEQUENTIAL_BYTES as usize]);

/// Files of a folder and its folders, with their bytes, largest first.
pub fn files_below(folder: &Path) -> Result<Vec<(u64, PathBuf)>, Failure> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let (entry, path) = entry.map(|entry| (entry.metadata(), entry.path()))?;
            match entry {
                Ok(facts) if facts.is_dir() => folders.push(path),
                Ok(facts) => files.push((facts.len(), path)),
                // Removed since the folder was listed.
                Err(_) => {}
            }
        }
    }
    files.sort_unstable_by(|one, other| other.cmp(one));
    Ok(files)
}

/// Takes the files of a folder out of the page cache: another process put them there, under another limit.
pub fn forget_cached(folder: &Path) -> Result<(), Failure> {
    for (_, path) in files_below(folder)? {
        let file = File::open(path)?;
        file.sync_all()?;
        fadvise(&file, 0, None, Advice::DontNeed)?;
    }
    Ok(())
}

/// Speed of random and of sequential reads of the largest file of a folder; null if there is none of 1 MiB.
pub fn measure(folder: &Path) -> Result<Value, Failure> {
    let files = files_below(folder)?;
    let Some((bytes, path)) = files.first().filter(|(bytes, _)| *bytes >= SEQUENTIAL_BYTES) else {
        return Ok(Value::Null);
    };
    let mut options = OpenOptions::new();
    options.read(true);
    let direct = options.clone().custom_flags(OFlags::DIRECT.bits() as i32).open(path);
    let is_direct = direct.is_ok();
    let file = direct.or_else(|_| options.open(path))?;

    let blocks = bytes / RANDOM_BYTES;
    let random = reads_per_second(RANDOM_DEPTH, |_| {
        let mut block = Box::new(Block([0; RANDOM_BYTES as usize]));
        let place = rand::random_range(0..blocks) * RANDOM_BYTES;
        file.read_exact_at(&mut block.0, place)
    })?;
    let large_blocks = bytes / SEQUENTIAL_BYTES;
    let begin = rand::random_range(0..large_blocks);
    let sequential = reads_per_second(SEQUENTIAL_DEPTH, |number| {
        let mut block: Vec<LargeBlock> = vec![LargeBlock([0; SEQUENTIAL_BYTES as usize])];
        let place = (begin + number) % large_blocks * SEQUENTIAL_BYTES;
        file.read_exact_at(&mut block[0].0, place)
    })?;
    Ok(json!({ "random_4k_per_second": random.round(), "random_depth": RANDOM_DEPTH,
        "sequential_bytes_per_second": (sequential * SEQUENTIAL_BYTES as f64).round(),
        "sequential_depth": SEQUENTIAL_DEPTH, "direct": is_direct, "file_bytes": bytes }))
}

/// How many of the numbered reads are done per second, on that many threads.
fn reads_per_second(depth: usize, read: impl Fn(u64) -> std::io::Result<()> + Sync) -> Result<f64, Failure> {
    let next = AtomicU64::new(0);
    let begun = Instant::now();
    let work = || -> std::io::Result<()> {
        while begun.elapsed() < MEASURED_FOR {
            read(next.fetch_add(1, Ordering::Relaxed))?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..depth).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("a reading thread does not panic"))
    })?;
    Ok(next.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64())
}
