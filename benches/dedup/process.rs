//! What the kernel says of this process.

use std::time::Duration;

/// Ticks per second of the times in `/proc/self/stat`: the same on every Linux of today.
const TICKS_PER_SECOND: f64 = 100.0;

fn number_after(text: &str, word: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(word)).unwrap_or_default();
    line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or_default()
}

/// User and system time of all threads.
pub fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let ticks: u64 = after_name.split_whitespace().skip(11).take(2).flat_map(str::parse::<u64>).sum();
    Duration::from_secs_f64(ticks as f64 / TICKS_PER_SECOND)
}

/// Most memory that was resident at once.
pub fn peak_rss_bytes() -> u64 {
    number_after(&std::fs::read_to_string("/proc/self/status").unwrap_or_default(), "VmHWM:") * 1024
}

/// Bytes that came from disks and that were handed to files, since the begin of the process.
#[derive(Debug, Clone, Copy)]
pub struct Transferred {
    /// From disks; what the page cache held is not counted.
    pub read_bytes: u64,
    /// To files.
    pub written_bytes: u64,
}

impl Transferred {
    /// So far.
    pub fn now() -> Self {
        let io = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
        Self {
            read_bytes: number_after(&io, "read_bytes:"),
            written_bytes: number_after(&io, "write_bytes:"),
        }
    }
}
