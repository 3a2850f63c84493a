//! Access: which way the probes of a batch go through a section, by cost, like the plan of a query.
//!
//! | way | device | when |
//! |---|---|---|
//! | filter in memory | pages of positives | the filter stays in memory, or it pays to read it now |
//! | filter streamed | the filter, once, and pages of positives | many probes, no room for the filter |
//! | pages | a page for each probe | few probes: each would touch a filter page of its own |
//!
//! Costs are seconds of the device ([`Device::seconds`]) and of a core, as if they did not overlap. A key that stands in
//! the section costs its page behind a filter too; [`HIT_SHARE`] says how many are taken to stand in any.

use std::path::Path;

use serde::Serialize;

use super::device::Device;
use super::generation::{GenerationRef, Manifest};
use super::lookup::Lookup;
use super::page::PAGE_BYTES;
use super::pins::{Pinned, Pins};
use super::segment::Section;
use super::store::open_generation;
use super::{Limits, StoreError};
use crate::event_time::EventTimeMs;
use crate::job::Repeats;

/// Seconds of a core for a probe of a filter, and for a search in a page with the way to it (`benches/run dedup` on a
/// state in memory, 2 GHz). Only their order of magnitude matters: a page costs fifty filters.
const FILTER_PROBE_SECONDS: f64 = 6e-9;
const PAGE_PROBE_SECONDS: f64 = 300e-9;

/// Share of the probes that the sections which they go through are taken to hold, each as many as its part of their keys:
/// repeats of any age among notification events.
const HIT_SHARE: f64 = 0.02;

/// Share of the probes that a section is taken to hold, of those that go through sections of so many keys.
fn hit_share(section: &Section, keys_probed: u64) -> f64 {
    HIT_SHARE * section.tally.keys as f64 / keys_probed.max(1) as f64
}

/// A way through a section.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// The filter in memory, as far as it is held; the rest of it is streamed.
    Filter,
    /// The filter, read once for this batch.
    Stream,
    /// Straight to the pages.
    Pages,
}

/// A way and what it costs the device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Choice {
    pub(super) access: Access,
    /// Whether the filter is to be read into memory first.
    pub(super) load: bool,
    pub(super) seconds: f64,
}

/// What a section costs with its filter in memory, as far as the plan holds it, and without.
struct Ways {
    /// `None` if the plan holds nothing of the filter.
    held: Option<Choice>,
    without: Choice,
}

impl Ways {
    fn of(section: &Section, pinned: &Pinned, probes: u64, keys_probed: u64, device: &Device) -> Self {
        let probes = probes as f64;
        let filter_bytes = section.filter.bytes().unwrap_or_default() as f64;
        let page_bytes = section.pages as f64 * PAGE_BYTES as f64;
        let missing = 1.0 - pinned.cached_share(section.pages);
        let pages = |probes: f64| device.seconds(probes * missing, page_bytes) + probes * PAGE_PROBE_SECONDS;
        let rate = section.filter.false_positive_rate(section.tally.keys);
        let passed = probes * FILTER_PROBE_SECONDS + pages(probes * (rate + hit_share(section, keys_probed)));

        let stream = device.seconds(probes, filter_bytes) + passed;
        let straight = pages(probes);
        let without = if straight <= stream {
            Choice { access: Access::Pages, load: false, seconds: straight }
        } else {
            Choice { access: Access::Stream, load: false, seconds: stream }
        };
        let held_bytes = (pinned.filter_pages() as f64 * PAGE_BYTES as f64).min(filter_bytes);
        let rest = device.seconds(probes * (1.0 - held_bytes / filter_bytes), filter_bytes - held_bytes);
        let held = Choice { access: Access::Filter, load: false, seconds: rest + passed };
        Self { held: (held_bytes > 0.0).then_some(held), without }
    }

    /// The cheaper way, once the filter is in memory.
    fn settled(&self) -> Choice {
        self.held.filter(|held| held.seconds <= self.without.seconds).unwrap_or(self.without)
    }
}

/// What `probes` probes spread evenly over a section cost by the cheaper way that is open to them. `keys_probed` are those of
/// all sections that they go through.
pub(super) fn seconds(
    section: &Section,
    pinned: &Pinned,
    probes: u64,
    keys_probed: u64,
    device: &Device,
) -> f64 {
    Ways::of(section, pinned, probes, keys_probed, device).settled().seconds
}

/// Chooses for `probes` probes spread evenly over a section. `keys_probed` are those of all sections that they go through.
pub(super) fn choose(
    section: &Section,
    pinned: &Pinned,
    probes: u64,
    keys_probed: u64,
    device: &Device,
) -> Choice {
    let ways = Ways::of(section, pinned, probes, keys_probed, device);
    if !pinned.wants_filter() {
        return ways.settled();
    }
    let Some(held) = ways.held else { return ways.without };
    // Bought or rented: the filter is read once what it would have spared so far is what reading it costs.
    let load = pinned.filter_pages() as f64 * PAGE_BYTES as f64 / device.bytes_per_second;
    let spared = (ways.without.seconds - held.seconds).max(0.0);
    let spared_ns = pinned.note_spared_ns((spared * 1e9) as u64);
    if spared_ns as f64 * 1e-9 >= load * 0.99 {
        Choice { load: true, seconds: held.seconds + load, ..held }
    } else {
        ways.without
    }
}

/// A section and the way that a batch takes through it.
#[derive(Debug, Clone, Serialize)]
pub struct SectionAccess {
    /// Begin of its bucket.
    pub bucket_from: EventTimeMs,
    /// End of its bucket.
    pub bucket_to: EventTimeMs,
    /// File of its segment.
    pub segment: String,
    /// Tier of its segment.
    pub tier: u32,
    /// Keys in it.
    pub keys: u64,
    /// Keys of the batch that go through it.
    pub probes: u64,
    /// Bytes of its filter.
    pub filter_bytes: u64,
    /// Bytes of it that stay in memory.
    pub filter_bytes_held: u64,
    /// The way.
    pub access: Access,
    /// Seconds of the device and of a core, if nothing overlaps.
    pub seconds: f64,
}

/// How a batch would go through a generation once what stays in memory is there.
#[derive(Debug, Clone, Serialize)]
pub struct AccessPlan {
    /// Random reads of a page, many in flight.
    pub reads_per_second: f64,
    /// Sequential reads.
    pub bytes_per_second: f64,
    /// Whether the two were measured now; a small state is read in a blink on any device.
    pub is_measured: bool,
    /// Newest bucket first.
    pub sections: Vec<SectionAccess>,
    /// Of all sections.
    pub seconds: f64,
}

/// Of the keys of a batch, with `same_time`, those that belong to older buckets than the newest: what the figures of
/// `benches/run dedup` assume.
const OLD_SHARE: f64 = 0.02;

/// Plans a batch of `probes` keys without changing anything: nothing is written, and merges are left alone.
///
/// Costs the directories of all segments, and a tenth of a second of reads to measure the device if the state is larger
/// than its memory.
///
/// # Errors
/// Those of [`Store::open`](super::Store::open).
pub fn access_plan(
    folder: &Path,
    generation: &GenerationRef,
    memory_bytes: u64,
    probes: u64,
) -> Result<AccessPlan, StoreError> {
    let manifest = Manifest::read(folder, generation)?;
    let spec = manifest.spec();
    let opened = open_generation(folder, &spec, generation)?;
    let limits = Limits::of(memory_bytes);
    let mut pins = Pins::new(limits.pinned_bytes_max);
    pins.plan(&opened.segments, opened.manifest.complete_since);
    let mut lookup = Lookup::new(limits.read_buffer_bytes);
    let measured_on = opened.larger_than(limits.pinned_bytes_max);
    if let Some(largest) = &measured_on {
        lookup.measure(largest)?;
    }
    let device = lookup.device();
    let newest = opened.sections.keys().next_back().copied();
    let older = opened.sections.len().saturating_sub(1).max(1) as f64;
    let mut sections = Vec::new();
    let keys_of = |places: &[(usize, usize)]| -> u64 {
        places.iter().map(|(segment, section)| opened.segments[*segment].sections[*section].tally.keys).sum()
    };
    let keys_of_all = opened.sections.values().map(|places| keys_of(places)).sum();
    for (bucket, places) in opened.sections.iter().rev() {
        let share = match spec.repeats {
            Repeats::AnyTime => 1.0,
            Repeats::SameTime if Some(*bucket) == newest => 1.0 - OLD_SHARE,
            Repeats::SameTime => OLD_SHARE / older,
        };
        let keys_probed = match spec.repeats {
            Repeats::AnyTime => keys_of_all,
            Repeats::SameTime => keys_of(places),
        };
        for (segment_index, section_index) in places {
            let segment = &opened.segments[*segment_index];
            let section = &segment.sections[*section_index];
            let pinned = pins.of(segment, *section_index);
            let probes = (probes as f64 * share).round() as u64;
            let choice = Ways::of(section, &pinned, probes, keys_probed, &device).settled();
            let filter_bytes = section.filter.bytes().unwrap_or_default();
            sections.push(SectionAccess {
                bucket_from: bucket.from,
                bucket_to: bucket.to,
                segment: segment.entry.name.to_string(),
                tier: segment.entry.tier,
                keys: section.tally.keys,
                probes,
                filter_bytes,
                filter_bytes_held: filter_bytes.min(pinned.filter_pages() * PAGE_BYTES as u64),
                access: choice.access,
                seconds: choice.seconds,
            });
        }
    }
    Ok(AccessPlan {
        reads_per_second: device.reads_per_second,
        bytes_per_second: device.bytes_per_second,
        is_measured: measured_on.is_some(),
        seconds: sections.iter().map(|section| section.seconds).sum(),
        sections,
    })
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::dedup::{GenerationName, Key, Store, StoreSpec};
    use crate::fingerprint::Fingerprint;

    const KEYS: u64 = 200_000;

    /// A state of one bucket and one segment, and its only section.
    fn state(folder: &Path) -> GenerationRef {
        let spec = StoreSpec {
            job_id: Uuid::from_u128(3),
            key_spec_hash: "access".into(),
            seed: 1,
            shards: 256,
            bucket_width_ms: 1_000_000,
            repeats: Repeats::AnyTime,
        };
        let mut store = Store::open(folder, spec, None, 1 << 20).unwrap();
        let key = |number: u64| Key {
            fingerprint: Fingerprint::of(&number.to_le_bytes(), 9),
            event_time: EventTimeMs(500_000),
        };
        store.append_unprobed(&(0..KEYS).map(key).collect::<Vec<_>>()).unwrap();
        let made = store.prepare(GenerationName::new(1, 1, Uuid::from_u128(1))).unwrap();
        store.publish();
        made
    }

    /// Goal: few probes go straight to pages; many take the filter, from memory if it may stay there.
    #[test]
    fn the_way_through_a_section_follows_from_how_many_go_through_it() {
        let folder = tempfile::tempdir().unwrap();
        let generation = state(folder.path());
        let way = |memory, probes| {
            let plan = access_plan(folder.path(), &generation, memory, probes).unwrap();
            assert_eq!(plan.sections.len(), 1);
            assert_eq!((plan.sections[0].keys, plan.is_measured), (KEYS, false));
            plan.sections[0].access
        };
        assert_eq!(way(0, 3), Access::Pages);
        assert_eq!(way(0, 100_000), Access::Stream);
        assert_eq!(way(64 << 20, 100_000), Access::Filter);
    }

    #[test]
    fn a_filter_is_read_into_memory_when_it_would_have_paid_for_itself() {
        let folder = tempfile::tempdir().unwrap();
        let generation = state(folder.path());
        let spec = Manifest::read(folder.path(), &generation).unwrap().spec();
        let opened = open_generation(folder.path(), &spec, &generation).unwrap();
        let mut pins = Pins::new(64 << 20);
        pins.plan(&opened.segments, opened.manifest.complete_since);
        let pinned = pins.of(&opened.segments[0], 0);
        let section = &opened.segments[0].sections[0];
        let device = Device { reads_per_second: 60_000.0, bytes_per_second: 1e9 };
        let mut batches = 0;
        while !choose(section, &pinned, 10, KEYS, &device).load {
            batches += 1;
            assert!(batches < 1_000, "ten probes a batch spare some milliseconds in the end");
        }
        assert!(batches > 0, "ten probes alone do not pay for a filter");
        assert!(choose(section, &Pinned::default(), 10, KEYS, &device).access != Access::Filter);
    }
}
