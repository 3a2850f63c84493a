//! Sizing: what a dedup state costs, computed before there is one.
//!
//! Flow: [`Workload`] and [`Device`] -> [`size`] -> [`Sizing`]; [`advise`] tries modes and batch sizes.
//!
//! Everything here is arithmetic over numbers with units; nothing is measured when it runs. Where a constant was
//! measured it says so, and where the model was fitted to measurements the tests hold it to them.
//!
//! # Model
//!
//! **Shape.** A batch of `batch_events` adds `new share * batch_events` keys as one segment; eight segments of a tier
//! become one of the next. So the segments per tier are the digits, base 8, of the number of batches that the live keys
//! came in, and a key is written once and rewritten once per tier above the first.
//!
//! **Bytes per key** in a section of `n` keys: `88 - log2(n) + 2.2` bits of pages (Elias-Fano codes of uniform numbers)
//! and the filter's bits, which `dedup/filter.rs` chooses.
//!
//! **Seconds per batch** `= max(cpu, stream + reads)`. `stream` is the bytes of filters that are not pinned
//! and worth reading, over the sequential speed `S`. `reads` is the pages of the filters' positives: `p` positives in `d`
//! bytes of pages take `d / S * (1 - exp(-p * S / IOPS / d))` seconds, since a read is extended over a gap that costs less
//! than another read: few positives cost `p / IOPS`, many cost one pass. Both share the device's bytes per second, so they
//! add up.
//! With `same_time` a key meets the sections of its own bucket only.
//!
//! Writing and merging run beside the next batch and are named apart; the sustained rate charges them in full.
//!
//! # How good it is
//!
//! Against nine points measured with `benches/run dedup` (1e8 and 1e9 keys, probe batches of 1 and 4 M events, 128 to 864 MiB,
//! on a shared machine) it is within a factor of 1.6; a test holds it to them. Beyond 1e9 keys nothing was measured.

use std::time::Duration;

use serde::Serialize;

use super::bucket::bucket_width_ms;
use super::filter::{FilterEffort, FilterShape};
use super::merge::FAN_IN;
use super::page::{PAGE_BYTES, PAGE_HEAD_BYTES};
use super::segment::STRIDE_PAGES;
use super::{BUCKETS_MAX, Limits, STORE_MEMORY_BYTES_MIN, TRANSFER_BYTES_MAX};
use crate::fingerprint::{FINGERPRINT_BITS, FINGERPRINT_BYTES};
use crate::job::Repeats;

/// Time of both cores per event: sort, in-batch repeats, recent keys, pages, beside the merges. Measured on two cores.
const CPU_SECONDS_PER_EVENT: f64 = 0.22e-6;
/// Time of both cores per event and section whose filter is walked: 14 ns of one for a ribbon filter, 5 for a Bloom filter.
const CPU_SECONDS_PER_FILTER_PROBE: f64 = 5e-9;
/// Bits per key of a page above `88 - log2(keys)`. Measured as 7.6 B/key at 1e9 and 8.0 at 1.25e8 keys of one section.
const PAGE_BITS_ABOVE_QUOTIENT: f64 = 2.2;
/// Building, writing and syncing a batch's segment: 0.02 to 0.036 s per million keys measured.
const WRITE_SECONDS_PER_KEY: f64 = 0.03e-6;
/// One rewrite of a key by a merge: three took 0.13 s per million keys, before large sections had ribbon filters, which take
/// 45 ns a key to make.
const MERGE_SECONDS_PER_KEY: f64 = 0.06e-6;
/// A key of a table row on its way through a rebuild, before merges: read, hashed, sorted, written. Aimed at, not
/// measured.
const REBUILD_SECONDS_PER_KEY: f64 = 0.2e-6;
/// Memory per event of the probe batch in work: its probe, which becomes a pending key, bucket and verdict, and what a job
/// keeps of a row that waits on disk.
const PROBE_BYTES_PER_EVENT: f64 = 28.0;
/// Memory per recent key, and how many are kept at most.
const RECENT_KEY_BYTES: f64 = 12.0;
const RECENT_KEYS_MAX: f64 = 8e6;
/// Read buffers at full speed.
const READ_BUFFER_BYTES: f64 = 55e6;
/// Share of the memory that recent keys and read buffers may each take.
const SMALL_SHARE: f64 = 1.0 / 8.0;
/// Memory per section of an open segment.
const SECTION_BYTES: f64 = 200.0;
/// Bytes of a key as RocksDB stores it: its write amplification is quoted on this yardstick.
const PLAIN_KEY_BYTES: f64 = 16.0;
/// Reads that a segment's frame takes when it is opened: header, footer, directory.
const OPEN_READS_PER_SEGMENT: f64 = 3.0;
/// Reads one after another are this much slower than at queue depth: 15 k against 60 k.
const ONE_READ_AT_A_TIME: f64 = 4.0;

/// A disk.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Device {
    /// Random reads of 4 KiB per second, at queue depth.
    pub reads_per_second: f64,
    /// Sequential bytes per second.
    pub bytes_per_second: f64,
}

impl Device {
    /// A local NVMe drive.
    pub const NVME: Self = Self { reads_per_second: 300e3, bytes_per_second: 3e9 };
    /// A modest SSD, or a virtual disk in its host's cache: the disk of the measurements.
    pub const SSD: Self = Self { reads_per_second: 60e3, bytes_per_second: 0.95e9 };
    /// A network disk, or a virtual disk that is touched for the first time.
    pub const NETWORK: Self = Self { reads_per_second: 10e3, bytes_per_second: 0.6e9 };
}

/// What a state is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Workload {
    /// Live keys.
    pub keys: f64,
    /// How long a key is remembered.
    pub window: Duration,
    /// Events of one probe batch.
    pub batch_events: f64,
    /// Where a key's first copy is looked for.
    pub repeats: Repeats,
    /// Share of events that repeat a recent key, which is found in memory.
    pub near_share: f64,
    /// Share of events that repeat a key of any age, each a read.
    pub far_share: f64,
    /// The dedup share of the job's memory, in bytes.
    pub memory_bytes: f64,
    /// The disk.
    pub device: Device,
}

impl Workload {
    /// The load of the measurements: 94 % new, 4 % near, 2 % far repeats, a week, batches of 4 M events.
    pub fn usual(keys: f64, repeats: Repeats, memory_bytes: f64, device: Device) -> Self {
        Self {
            keys,
            window: Duration::from_secs(7 * 86_400),
            batch_events: 4e6,
            repeats,
            near_share: 0.04,
            far_share: 0.02,
            memory_bytes,
            device,
        }
    }

    fn new_keys_per_batch(&self) -> f64 {
        (self.batch_events * (1.0 - self.near_share - self.far_share)).max(1.0)
    }

    /// Buckets that the live keys fall into.
    fn buckets(&self) -> f64 {
        let width_ms = bucket_width_ms(self.window, self.repeats) as f64;
        (self.window.as_millis() as f64 / width_ms).clamp(1.0, BUCKETS_MAX as f64)
    }
}

/// What a state costs. Computed, see the module head.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sizing {
    /// Segments of each tier, the smallest first.
    pub segments_per_tier: Vec<u64>,
    /// Bytes of live segments.
    pub disk_live_bytes: f64,
    /// The most while the largest merge runs and kept generations still name its inputs, with one expired bucket that
    /// waits for its grace.
    pub disk_peak_bytes: f64,
    /// Live bytes per key, filters included.
    pub bytes_per_key: f64,
    /// Bytes of all filters.
    pub filter_bytes: f64,
    /// Least memory that works at all: frames, and one probe batch.
    pub memory_floor_bytes: f64,
    /// Memory with which every filter that a batch meets is pinned. More buys nothing but recent keys.
    pub memory_useful_bytes: f64,
    /// Filters that the memory given pins.
    pub filters_pinned_bytes: f64,
    /// Looking a batch up.
    pub lookup: LookupCost,
    /// Writing a batch's segment, in seconds.
    pub write_seconds_per_batch: f64,
    /// Merging per batch, in seconds, spread evenly.
    pub merge_seconds_per_batch: f64,
    /// Events per second of the lookup alone.
    pub events_per_second: f64,
    /// Events per second with writing and merging charged in full.
    pub events_per_second_sustained: f64,
    /// How often a key is written.
    pub writes_per_key: f64,
    /// Bytes written over the 16 bytes of a plain key.
    pub write_amplification: f64,
    /// Seconds to open the state, and bytes read, before the first batch.
    pub open_seconds: f64,
    /// Bytes read to open the state and pin what is pinned.
    pub open_bytes: f64,
    /// Seconds of a rebuild from the tables.
    pub rebuild_seconds: f64,
}

/// Where the time of a batch goes. Seconds; parts overlap.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LookupCost {
    /// In all.
    pub seconds: f64,
    /// Processor time, of two cores.
    pub cpu_seconds: f64,
    /// Filters that are read because they are not pinned.
    pub stream_seconds: f64,
    /// Page reads.
    pub read_seconds: f64,
    /// Bytes of filters that are read.
    pub stream_bytes: f64,
    /// Keys that a page is read for.
    pub pages_wanted: f64,
}

/// Sections of one tier: all alike.
#[derive(Debug, Clone, Copy)]
struct Sections {
    count: f64,
    keys: f64,
    filter_bytes: f64,
    page_bytes: f64,
    false_positives: f64,
}

impl Sections {
    /// Sections of a state in which a probe is looked for among `probed_keys`.
    fn of(count: f64, keys: f64, probed_keys: f64, effort: FilterEffort) -> Self {
        let keys = keys.max(1.0);
        let filter = FilterShape::for_keys(keys as u64, probed_keys as u64, effort);
        Self {
            count,
            keys,
            filter_bytes: filter.bytes().unwrap_or_default() as f64,
            page_bytes: keys * page_bytes_per_key(keys),
            false_positives: filter.false_positive_rate(keys as u64),
        }
    }

    fn bytes(&self) -> f64 {
        self.filter_bytes + self.page_bytes
    }
}

/// Bytes of pages and page indexes per key of a section.
fn page_bytes_per_key(keys: f64) -> f64 {
    let bits = f64::from(FINGERPRINT_BITS) - keys.log2() + PAGE_BITS_ABOVE_QUOTIENT;
    let whole_page = PAGE_BYTES as f64;
    bits / 8.0 * whole_page / (whole_page - PAGE_HEAD_BYTES as f64) * (1.0 + 1.0 / STRIDE_PAGES as f64)
}

/// Seconds to read the pages of `wanted` keys spread evenly over `bytes`.
fn read_seconds(wanted: f64, bytes: f64, device: Device) -> f64 {
    let gap_bytes = device.bytes_per_second / device.reads_per_second;
    bytes / device.bytes_per_second * -(-wanted * gap_bytes / bytes).exp_m1()
}

/// Computes what a workload costs.
pub fn size(workload: &Workload) -> Sizing {
    let new_keys = workload.new_keys_per_batch();
    let segments_per_tier = segments_per_tier(workload.keys, new_keys);
    let bucket_keys = (workload.keys / workload.buckets()).max(1.0);
    let probed_keys = match workload.repeats {
        Repeats::AnyTime => workload.keys,
        Repeats::SameTime => bucket_keys,
    };
    let pinned_bytes_max = Limits::of(workload.memory_bytes as u64).pinned_bytes_max;
    let lasting = FilterEffort::of_lasting(probed_keys as u64, pinned_bytes_max);
    let tiers: Vec<Sections> = segments_per_tier
        .iter()
        .enumerate()
        .map(|(tier, segments)| {
            let keys = (new_keys * (FAN_IN as f64).powi(tier as i32)).min(workload.keys);
            let sections = (keys / bucket_keys).max(1.0);
            let effort = if tier == 0 { FilterEffort::Quick } else { lasting };
            Sections::of(*segments as f64 * sections, keys / sections, probed_keys, effort)
        })
        .collect();
    let sum = |part: fn(&Sections) -> f64| -> f64 { tiers.iter().map(|tier| tier.count * part(tier)).sum() };
    let (disk_live_bytes, filter_bytes, page_bytes) =
        (sum(Sections::bytes), sum(|tier| tier.filter_bytes), sum(|tier| tier.page_bytes));
    let held_keys = sum(|tier| tier.keys);
    let bytes_per_key = disk_live_bytes / held_keys;

    let frame_bytes = sum(|_| SECTION_BYTES)
        + page_bytes / PAGE_BYTES as f64 / STRIDE_PAGES as f64 * FINGERPRINT_BYTES as f64;
    let batch_bytes = workload.batch_events * PROBE_BYTES_PER_EVENT;
    let index_bytes = page_bytes / PAGE_BYTES as f64 * FINGERPRINT_BYTES as f64;
    let beside_filters = frame_bytes
        + batch_bytes
        + (RECENT_KEYS_MAX * RECENT_KEY_BYTES).min(workload.memory_bytes * SMALL_SHARE)
        + READ_BUFFER_BYTES.min(workload.memory_bytes * SMALL_SHARE);
    let met = sections_met(workload, &tiers, bucket_keys);
    let filters_met: f64 = met.iter().map(|sections| sections.count * sections.filter_bytes).sum();
    let index_pinned = index_bytes.min((workload.memory_bytes - beside_filters).max(0.0) / 4.0);
    let budget = (workload.memory_bytes - beside_filters - index_pinned).max(0.0);
    let lookup = lookup(workload, &met, budget);

    let writes_per_key = segments_per_tier.len() as f64;
    let merges_per_key = writes_per_key - 1.0;
    let write_seconds_per_batch = new_keys * WRITE_SECONDS_PER_KEY;
    let merge_seconds_per_batch = new_keys * merges_per_key * MERGE_SECONDS_PER_KEY;
    let segments: f64 = segments_per_tier.iter().sum::<u64>() as f64;
    let filters_pinned_bytes = budget.min(filters_met);
    let open_bytes = frame_bytes + index_pinned + filters_pinned_bytes;
    let device = workload.device;
    let largest_merge = tiers.last().map_or(0.0, |tier| tier.count * tier.bytes());
    let rebuild_merges =
        (held_keys / (workload.memory_bytes / 2.0 / PLAIN_KEY_BYTES)).max(1.0).log(FAN_IN as f64);
    Sizing {
        disk_live_bytes,
        disk_peak_bytes: disk_live_bytes + largest_merge + bucket_keys * bytes_per_key,
        bytes_per_key,
        filter_bytes,
        memory_floor_bytes: STORE_MEMORY_BYTES_MIN as f64
            + frame_bytes
            + batch_bytes
            + TRANSFER_BYTES_MAX as f64,
        memory_useful_bytes: beside_filters + index_bytes + filters_met,
        filters_pinned_bytes,
        events_per_second: workload.batch_events / lookup.seconds,
        events_per_second_sustained: workload.batch_events
            / (lookup.seconds + write_seconds_per_batch + merge_seconds_per_batch),
        lookup,
        write_seconds_per_batch,
        merge_seconds_per_batch,
        writes_per_key,
        write_amplification: writes_per_key * bytes_per_key / PLAIN_KEY_BYTES,
        open_seconds: open_bytes / device.bytes_per_second
            + segments * OPEN_READS_PER_SEGMENT * ONE_READ_AT_A_TIME / device.reads_per_second,
        open_bytes,
        rebuild_seconds: held_keys
            * (REBUILD_SECONDS_PER_KEY + rebuild_merges.ceil().max(1.0) * MERGE_SECONDS_PER_KEY),
        segments_per_tier,
    }
}

/// Digits, base 8, of the number of batches.
fn segments_per_tier(keys: f64, new_keys_per_batch: f64) -> Vec<u64> {
    let mut batches = (keys / new_keys_per_batch).round().max(1.0) as u64;
    let mut tiers = Vec::new();
    while batches > 0 {
        tiers.push(batches % FAN_IN as u64);
        batches /= FAN_IN as u64;
    }
    tiers
}

/// The sections that a new event's key is looked for in, the smallest first.
fn sections_met(workload: &Workload, tiers: &[Sections], bucket_keys: f64) -> Vec<Sections> {
    match workload.repeats {
        Repeats::AnyTime => tiers.to_vec(),
        Repeats::SameTime => {
            // The newest bucket: newest keys stand in the smallest segments.
            let mut left = bucket_keys;
            let mut met = Vec::new();
            for tier in tiers {
                let count = tier.count.min((left / tier.keys).ceil());
                met.push(Sections { count, ..*tier });
                left = (left - count * tier.keys).max(0.0);
            }
            met
        }
    }
}

fn lookup(workload: &Workload, met: &[Sections], mut pin_bytes: f64) -> LookupCost {
    let device = workload.device;
    let probes = workload.batch_events * (1.0 - workload.near_share);
    let far = workload.batch_events * workload.far_share;
    // Repeats of keys of any age: found by `any_time` among the sections that all events meet, by `same_time` in
    // sections of old buckets that few events meet, where the page is read without the filter.
    let met_keys: f64 = met.iter().map(|sections| sections.count * sections.keys).sum();
    let far_here = match workload.repeats {
        Repeats::AnyTime => far,
        Repeats::SameTime => far * (met_keys / workload.keys).min(1.0),
    };
    let (mut stream_bytes, mut read, mut pages_wanted, mut filters_walked) = (0.0, 0.0, 0.0, 0.0);
    for sections in met.iter().filter(|sections| sections.count > 0.0) {
        let found = far_here * sections.count * sections.keys / met_keys;
        let page_bytes = sections.count * sections.page_bytes;
        let positives = found + probes * sections.false_positives * sections.count;
        let all_filter_bytes = sections.count * sections.filter_bytes;
        let pinned = pin_bytes.min(all_filter_bytes);
        pin_bytes -= pinned;
        let with_filter = read_seconds(positives, page_bytes, device);
        let unpinned = all_filter_bytes - pinned;
        let without_filter = read_seconds(probes * sections.count, page_bytes, device);
        if unpinned > 0.0 && without_filter < with_filter + unpinned / device.bytes_per_second {
            read += without_filter;
            pages_wanted += probes * sections.count;
        } else {
            stream_bytes += unpinned;
            read += with_filter;
            pages_wanted += positives;
            filters_walked += sections.count;
        }
    }
    let elsewhere = far - far_here;
    if elsewhere > 0.0 {
        let bytes =
            (workload.keys - met_keys).max(1.0) * page_bytes_per_key(workload.keys / workload.buckets());
        read += read_seconds(elsewhere, bytes, device);
        pages_wanted += elsewhere;
    }
    let cpu_seconds = workload.batch_events * CPU_SECONDS_PER_EVENT
        + probes * filters_walked * CPU_SECONDS_PER_FILTER_PROBE;
    let stream_seconds = stream_bytes / device.bytes_per_second;
    let seconds = cpu_seconds.max(read + stream_seconds);
    LookupCost { seconds, cpu_seconds, stream_seconds, read_seconds: read, stream_bytes, pages_wanted }
}

/// Batch sizes that [`advise`] tries: larger ones share streams and passes among more events, and wait longer.
pub const BATCH_EVENTS_TRIED: [f64; 3] = [1e6, 4e6, 16e6];

/// What to set for a rate.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Advice {
    /// Where a key's first copy is looked for.
    pub repeats: Repeats,
    /// Events of a probe batch: the smallest that holds the rate, else the fastest.
    pub batch_events: f64,
    /// Events per second, writing and merging charged.
    pub events_per_second: f64,
    /// Whether that is the rate asked for.
    pub holds_rate: bool,
}

/// The batch size to take with each mode, `any_time` first. A batch must fit the memory.
pub fn advise(workload: &Workload, events_per_second: f64) -> [Advice; 2] {
    [Repeats::AnyTime, Repeats::SameTime].map(|repeats| {
        let tried = BATCH_EVENTS_TRIED.map(|batch_events| {
            let sizing = size(&Workload { repeats, batch_events, ..*workload });
            let fits = sizing.memory_floor_bytes <= workload.memory_bytes;
            (batch_events, if fits { sizing.events_per_second_sustained } else { 0.0 })
        });
        let fastest =
            tried.iter().copied().fold(tried[0], |best, one| if one.1 > best.1 { one } else { best });
        let enough = tried.iter().copied().find(|(_, rate)| *rate >= events_per_second);
        let (batch_events, rate) = enough.unwrap_or(fastest);
        Advice { repeats, batch_events, events_per_second: rate, holds_rate: rate >= events_per_second }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: f64 = (1u64 << 30) as f64;

    fn at(keys: f64, batch_events: f64, repeats: Repeats) -> Workload {
        Workload { batch_events, ..Workload::usual(keys, repeats, GIB, Device::SSD) }
    }

    fn worst(workload: Workload) -> Workload {
        Workload { near_share: 0.0, far_share: 0.06, ..workload }
    }

    /// Million events per second of this program (`benches/run dedup`), on the device and with the share of the memory that
    /// stood beside each figure. The machine was shared, so a figure is what a neighbour left.
    #[test]
    fn the_model_is_near_what_was_measured() {
        use Repeats::{AnyTime, SameTime};
        let points = [
            (at(1e8, 1e6, AnyTime), 768, (73e3, 0.95e9), 2.1),
            (at(1e8, 4e6, AnyTime), 560, (75e3, 1.1e9), 2.9),
            (at(1e8, 1e6, SameTime), 768, (40e3, 0.78e9), 2.6),
            (at(1e9, 1e6, AnyTime), 864, (58e3, 0.65e9), 0.5),
            (at(1e9, 4e6, AnyTime), 640, (50e3, 0.70e9), 0.85),
            (at(1e9, 4e6, AnyTime), 192, (54e3, 0.70e9), 0.79),
            (worst(at(1e9, 1e6, AnyTime)), 864, (61e3, 0.65e9), 0.35),
            (worst(at(1e9, 4e6, AnyTime)), 640, (49e3, 0.50e9), 0.64),
            (at(1e9, 1e6, AnyTime), 128, (57e3, 0.65e9), 0.31),
        ];
        for (workload, share_mib, (reads_per_second, bytes_per_second), measured) in points {
            // The share holds no batch; the model's memory does.
            let batch_bytes = workload.batch_events * PROBE_BYTES_PER_EVENT;
            let memory_bytes = f64::from(share_mib) * f64::from(1 << 20) + batch_bytes;
            let device = Device { reads_per_second, bytes_per_second };
            let sizing = size(&Workload { memory_bytes, device, ..workload });
            let computed = sizing.events_per_second / 1e6;
            eprintln!(
                "{computed:.2} {measured} {:?} {} {} {:?}",
                workload.repeats, workload.keys, workload.batch_events, sizing.lookup
            );
            let ratio = computed / measured;
            assert!(
                (0.6..1.67).contains(&ratio),
                "{computed:.2} where {measured} M/s were measured: {workload:?}"
            );
        }
    }

    #[test]
    fn bytes_per_key_are_those_that_were_measured() {
        for (keys, measured) in [(1e9, 7.6), (1.25e8, 8.0)] {
            let computed: f64 = page_bytes_per_key(keys);
            assert!((computed / measured - 1.0).abs() < 0.02, "{computed} for {keys} keys in one section");
        }
        let sizing = size(&at(1e9, 4e6, Repeats::AnyTime));
        assert!((9.0..10.2).contains(&sizing.bytes_per_key), "{sizing:?}");
        assert!(sizing.disk_peak_bytes <= 2.3 * sizing.disk_live_bytes, "{sizing:?}");
    }

    #[test]
    fn writing_costs_what_was_measured() {
        // 1 M keys a batch up to 5e8 keys: three merges, 34 B written per key, 2.2 times a 16-byte key.
        let sizing = size(&at(5e8, 1e6 / 0.94, Repeats::AnyTime));
        assert_eq!(sizing.writes_per_key, 3.0);
        assert!((sizing.write_amplification / 2.2 - 1.0).abs() < 0.25, "{sizing:?}");
        assert!(sizing.merge_seconds_per_batch < 0.14);
    }

    #[test]
    fn few_reads_cost_one_each_and_many_cost_one_pass() {
        let device = Device::SSD;
        let sparse = read_seconds(100.0, 1e12, device);
        assert!((sparse * device.reads_per_second / 100.0 - 1.0).abs() < 0.01);
        let dense = read_seconds(1e9, 1e9, device);
        assert!((dense * device.bytes_per_second / 1e9 - 1.0).abs() < 0.01);
    }

    #[test]
    fn with_same_time_the_rate_hardly_depends_on_the_number_of_keys() {
        let rate = |keys| size(&at(keys, 1e6, Repeats::SameTime)).events_per_second;
        assert!(rate(1e9) / rate(1e8) > 0.7, "{} {}", rate(1e9), rate(1e8));
        assert!(rate(1e10) / rate(1e9) > 0.75, "{} {}", rate(1e10), rate(1e9));
        let any = |keys| size(&at(keys, 1e6, Repeats::AnyTime)).events_per_second;
        assert!(any(1e10) / any(1e9) < 0.2);
    }

    #[test]
    fn more_memory_a_faster_disk_and_larger_batches_never_cost_events() {
        for keys in [1e7, 1e8, 1e9, 1e10, 1e11] {
            for repeats in [Repeats::AnyTime, Repeats::SameTime] {
                let base = at(keys, 4e6, repeats);
                let rate = |workload: &Workload| size(workload).events_per_second;
                assert!(rate(&Workload { memory_bytes: 8.0 * GIB, ..base }) >= rate(&base) * 0.999, "{keys}");
                assert!(rate(&Workload { device: Device::NVME, ..base }) >= rate(&base), "{keys}");
                assert!(rate(&Workload { device: Device::NETWORK, ..base }) <= rate(&base), "{keys}");
                let useful = size(&base).memory_useful_bytes;
                let rich = size(&Workload { memory_bytes: useful * 1.5, ..base });
                assert!(rich.lookup.stream_bytes == 0.0, "{keys}: {rich:?}");
            }
        }
    }

    #[test]
    fn advice_takes_the_smallest_batch_that_holds_the_rate() {
        let workload = at(1e9, 4e6, Repeats::AnyTime);
        let [any_time, same_time] = advise(&workload, 1e6);
        assert!(any_time.holds_rate && same_time.holds_rate, "{any_time:?} {same_time:?}");
        assert_eq!(same_time.batch_events, 1e6);
        let day = Workload { device: Device::NVME, ..at(1e11, 4e6, Repeats::AnyTime) };
        let [any_time, same_time] = advise(&day, 1.16e6);
        assert!(!any_time.holds_rate, "{any_time:?}");
        assert!(same_time.holds_rate, "{same_time:?}");
    }
}
