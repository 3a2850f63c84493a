//! Lookup: which of many sorted fingerprints stand in the sections of a generation.
//!
//! Flow: sorted probes, in units of neighbouring fingerprints -> filters (in memory, or streamed in windows) -> candidates
//! -> page index -> pages, each read at most once by a unit, neighbours together, many reads in flight -> found
//!
//! One random read at a time is the trap of a dedup state on disk. Here workers take units in turn; each has several reads
//! in flight and decodes what came while others come. Pages closer than the device's gap become one read, so a dense
//! batch turns into a sequential scan by itself.
//!
//! Bounds: the read buffers ([`ReadLimits`]); in each worker 8 bytes per candidate of its unit and 24 per page that it
//! wants.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::StoreError;
use super::access::{self, Access, Choice};
use super::device::Device;
use super::page::{CHECKSUM_BYTES, PAGE_BYTES, fingerprint_at};
use super::pins::Pinned;
use super::reads::{self, ReadLimits, Reads};
use super::segment::{STRIDE_PAGES, Section, Segment};
use crate::fingerprint::FINGERPRINT_BYTES;

/// Fewest and most probes of a unit: below, threads cost more than they bring; above, the last unit ends late.
const UNIT_PROBES: (usize, usize) = (4 << 10, 64 << 10);
/// Pieces of fewer bytes in all are brought into memory without threads.
const LOAD_BYTES_PARALLEL_MIN: u64 = 1 << 20;
/// Most bytes of filters that a worker has in flight: enough to keep the device at its sequential speed. With more, page
/// reads of other workers wait behind them, and end after the filters instead of beside them.
const STREAM_BYTES_IN_FLIGHT: usize = 1 << 20;
/// Units for each worker, so that all end at about the same time.
const UNITS_PER_WORKER: usize = 16;

/// One fingerprint that is looked up, with its place in the probe batch, in 16 bytes that sort by both:
/// found, 1 bit | zeros | fingerprint, 88 bits | place, 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Probe(u128);

impl Probe {
    const FOUND: u128 = 1 << 127;

    pub(super) fn new(value: u128, index: u32) -> Self {
        Self(value << 32 | u128::from(index))
    }

    /// The fingerprint, as a number.
    pub(super) fn value(self) -> u128 {
        (self.0 & !Self::FOUND) >> 32
    }

    /// The place in the probe batch.
    pub(super) fn index(self) -> usize {
        self.0 as u32 as usize
    }

    pub(super) fn is_found(self) -> bool {
        self.0 & Self::FOUND != 0
    }

    pub(super) fn mark_found(&mut self) {
        self.0 |= Self::FOUND;
    }
}

/// A section that probes go through.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) segment: Arc<Segment>,
    pub(super) section_index: usize,
    pub(super) pinned: Arc<Pinned>,
}

impl Target {
    fn section(&self) -> &Section {
        &self.segment.sections[self.section_index]
    }
}

/// Sorted probes and the sections that they go through.
#[derive(Debug)]
pub(super) struct Group<'a> {
    pub(super) probes: &'a mut [Probe],
    pub(super) targets: Vec<Target>,
}

/// A target and the way through it.
struct Path<'a> {
    target: &'a Target,
    choice: Choice,
}

/// Neighbouring probes of a group: what a worker takes at once.
struct Unit<'a> {
    probes: &'a mut [Probe],
    paths: &'a [Path<'a>],
}

/// A piece that is to be in memory.
enum Load<'a> {
    Index(&'a Target),
    Filter(&'a Target),
}

impl Load<'_> {
    fn bytes(&self) -> u64 {
        match self {
            Self::Index(target) => target.section().pages * FINGERPRINT_BYTES as u64,
            Self::Filter(target) => target.pinned.filter_pages() * PAGE_BYTES as u64,
        }
    }
}

/// The workers of lookups, used again and again.
#[derive(Debug)]
pub(super) struct Lookup {
    limits: ReadLimits,
    workers: Vec<Worker>,
    device: Device,
    measured: bool,
}

impl Lookup {
    /// Workers whose buffers take at most `bytes`.
    pub(super) fn new(bytes: u64) -> Self {
        let (limits, reads) = reads::workers(ReadLimits::within(bytes));
        let workers = reads.into_iter().map(Worker::new).collect();
        Self { limits, workers, device: Device::default(), measured: false }
    }

    /// Speed of the device, as far as it is known.
    pub(super) fn device(&self) -> Device {
        self.device
    }

    /// Measures the device on a segment, once.
    pub(super) fn measure(&mut self, segment: &Segment) -> Result<(), StoreError> {
        if !self.measured {
            self.measured = true;
            let mut reads: Vec<&mut Reads> =
                self.workers.iter_mut().map(|worker| &mut worker.reads).collect();
            let measured = Device::measure(&mut reads, self.limits.read_bytes_max, segment);
            if measured.is_err() {
                reads.into_iter().for_each(Reads::drain);
            }
            self.device = measured?;
            tracing::debug!(
                reads_per_second = self.device.reads_per_second,
                bytes_per_second = self.device.bytes_per_second,
                "measured the device of the dedup state"
            );
        }
        Ok(())
    }

    /// Marks the probes whose fingerprints stand in their group's sections. `pending` marks those of a unit that stand in
    /// no section yet, `recent` those of its candidates that need no page. Probes of a group are sorted.
    ///
    /// # Errors
    /// The first error of any worker; marks are then incomplete.
    pub(super) fn mark_found(
        &mut self,
        groups: &mut [Group<'_>],
        pending: impl Fn(usize, &mut [Probe]) + Sync,
        recent: impl Fn(usize, &mut [Probe]) + Sync,
    ) -> Result<(), StoreError> {
        let device = self.device;
        let mut loads = Vec::new();
        let mut units = Vec::new();
        let all: usize = groups.iter().map(|group| group.probes.len()).sum();
        let unit_probes = (all / (self.workers.len() * UNITS_PER_WORKER)).clamp(UNIT_PROBES.0, UNIT_PROBES.1);
        let mut ways = Vec::with_capacity(groups.len());
        let mut probes = Vec::with_capacity(groups.len());
        for group in groups {
            let count = group.probes.len() as u64;
            let keys = group.targets.iter().map(|target| target.section().tally.keys).sum();
            let choose =
                |target: &Target| access::choose(target.section(), &target.pinned, count, keys, &device);
            let paths: Vec<Path<'_>> =
                group.targets.iter().map(|target| Path { target, choice: choose(target) }).collect();
            ways.push(paths);
            probes.push(&mut *group.probes);
        }
        for (group_index, (probes, paths)) in probes.into_iter().zip(&ways).enumerate() {
            for path in paths {
                if path.target.pinned.wants_index() {
                    loads.push(Load::Index(path.target));
                }
                if path.choice.load {
                    loads.push(Load::Filter(path.target));
                }
            }
            for unit in cut(probes, unit_probes) {
                units.push((group_index, Unit { probes: unit, paths }));
            }
        }
        let (read_bytes_max, gap_pages) = (self.limits.read_bytes_max, self.gap_pages());
        let loaded_bytes: u64 = loads.iter().map(Load::bytes).sum();
        let loaders = if loaded_bytes < LOAD_BYTES_PARALLEL_MIN { 1 } else { self.workers.len() };
        run(&mut self.workers[..loaders], loads, |worker, load| worker.load(&load, read_bytes_max))?;
        run(&mut self.workers, units, |worker, (group_index, unit)| {
            pending(group_index, unit.probes);
            worker.look_up(unit, |probes| recent(group_index, probes), read_bytes_max, gap_pages)
        })
    }

    fn gap_pages(&self) -> u64 {
        self.device.gap_bytes() / PAGE_BYTES as u64
    }
}

/// Cuts sorted probes into units. Later copies of a fingerprint are marked already, so it does not matter where they fall.
fn cut(mut probes: &mut [Probe], unit_probes: usize) -> Vec<&mut [Probe]> {
    let mut units = Vec::new();
    while !probes.is_empty() {
        let (unit, rest) = probes.split_at_mut(unit_probes.min(probes.len()));
        units.push(unit);
        probes = rest;
    }
    units
}

/// Gives every task to a worker. Where there is but one task or worker, it runs here.
fn run<T: Send>(
    workers: &mut [Worker],
    tasks: Vec<T>,
    work: impl Fn(&mut Worker, T) -> Result<(), StoreError> + Sync,
) -> Result<(), StoreError> {
    let threads = workers.len().min(tasks.len());
    let queue = Mutex::new(tasks.into_iter());
    let failed = AtomicBool::new(false);
    let serve = |worker: &mut Worker| -> Result<(), StoreError> {
        while !failed.load(Ordering::Relaxed) {
            let Some(task) = queue.lock().unwrap_or_else(PoisonError::into_inner).next() else { break };
            if let Err(error) = work(worker, task) {
                failed.store(true, Ordering::Relaxed);
                worker.reads.drain();
                return Err(error);
            }
        }
        Ok(())
    };
    if threads <= 1 {
        return workers.first_mut().map_or(Ok(()), serve);
    }
    let Some((here, others)) = workers[..threads].split_first_mut() else { return Ok(()) };
    std::thread::scope(|scope| {
        let serve = &serve;
        // A thread that the system does not grant is one worker less.
        let running: Vec<_> = others
            .iter_mut()
            .filter_map(|worker| {
                let thread = std::thread::Builder::new().name("dedup-lookup".to_owned());
                thread.spawn_scoped(scope, move || serve(worker)).ok()
            })
            .collect();
        let served_here = serve(here);
        let served = running.into_iter().map(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        served.fold(served_here, Result::and)
    })
}

/// A probe that the filter of a path lets pass; sorts by path, then by fingerprint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    path: u32,
    probe: u32,
}

/// A candidate and the page that would hold it; sorts by path and page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Wanted {
    path: u32,
    page: u64,
    probe: u32,
}

/// One read: pages `[first, end)` of a path's filter or pages, and what of the list it serves.
#[derive(Debug, Clone)]
struct PageRead {
    path: u32,
    pages: Range<u64>,
    serves: Range<usize>,
}

#[derive(Debug)]
struct Worker {
    reads: Reads,
    candidates: Vec<Candidate>,
    wanted: Vec<Wanted>,
    planned: Vec<PageRead>,
}

impl Worker {
    fn new(reads: Reads) -> Self {
        Self { reads, candidates: Vec::new(), wanted: Vec::new(), planned: Vec::new() }
    }

    fn look_up(
        &mut self,
        unit: Unit<'_>,
        recent: impl Fn(&mut [Probe]),
        read_bytes_max: usize,
        gap_pages: u64,
    ) -> Result<(), StoreError> {
        let Unit { probes, paths } = unit;
        let joined = Joined { pages_max: (read_bytes_max / PAGE_BYTES) as u64, gap_pages };
        self.candidates.clear();
        self.pass_filters(probes, paths, joined)?;
        self.settle_recent(probes, recent);
        self.candidates.sort_unstable();
        self.find_pages(probes, paths)?;
        self.wanted.sort_unstable();
        self.settle_in_memory(probes, paths)?;
        self.read_pages(probes, paths, joined)
    }

    /// Collects the candidates of every path.
    fn pass_filters(
        &mut self,
        probes: &[Probe],
        paths: &[Path<'_>],
        joined: Joined,
    ) -> Result<(), StoreError> {
        self.planned.clear();
        for (path_index, path) in paths.iter().enumerate() {
            let section = path.target.section();
            let held = match path.choice.access {
                Access::Pages => {
                    self.take_all(path_index as u32, probes);
                    continue;
                }
                Access::Stream => &[],
                Access::Filter => path.target.pinned.filter(),
            };
            let pages_held = held.len().div_ceil(PAGE_BYTES) as u64;
            let page_of = |probe: &Probe| section.filter.page_of(probe.value());
            let in_memory = probes.partition_point(|probe| page_of(probe) < pages_held);
            let walk = FilterWalk { section, pages: held, first_page: 0, path: path_index as u32 };
            walk.collect(probes, 0..in_memory, &mut self.candidates);
            joined.plan(path_index as u32, probes, in_memory..probes.len(), page_of, &mut self.planned);
        }
        let Self { reads, candidates, planned, .. } = self;
        let place = |read: &PageRead| {
            let section = paths[read.path as usize].target.section();
            let last = read.pages.end - 1;
            let bytes = (last - read.pages.start) as usize * PAGE_BYTES + section.filter.page_bytes(last);
            (section.filter_position + read.pages.start * PAGE_BYTES as u64, bytes)
        };
        read_all(reads, paths, planned, STREAM_BYTES_IN_FLIGHT, place, |read, bytes| {
            let target = paths[read.path as usize].target;
            let section = target.section();
            check_filter_pages(target, read.pages.start, bytes)?;
            let walk = FilterWalk { section, pages: bytes, first_page: read.pages.start, path: read.path };
            walk.collect(probes, read.serves.clone(), candidates);
            Ok(())
        })
    }

    /// Settles the candidates that were written lately: far fewer than the probes, so they alone are looked for.
    fn settle_recent(&mut self, probes: &mut [Probe], recent: impl Fn(&mut [Probe])) {
        self.candidates.sort_unstable_by_key(|candidate| candidate.probe);
        let mut asked: Vec<Probe> = self
            .candidates
            .chunk_by(|one, other| one.probe == other.probe)
            .map(|of_probe| Probe::new(probes[of_probe[0].probe as usize].value(), of_probe[0].probe))
            .collect();
        recent(&mut asked);
        for found in asked.iter().filter(|probe| probe.is_found()) {
            probes[found.index()].mark_found();
        }
        self.candidates.retain(|candidate| !probes[candidate.probe as usize].is_found());
    }

    fn take_all(&mut self, path: u32, probes: &[Probe]) {
        let unfound = probes.iter().enumerate().filter(|(_, probe)| !probe.is_found());
        self.candidates.extend(unfound.map(|(probe, _)| Candidate { path, probe: probe as u32 }));
    }

    /// Finds the page of every candidate, from page indexes in memory or read now.
    fn find_pages(&mut self, probes: &[Probe], paths: &[Path<'_>]) -> Result<(), StoreError> {
        let Self { reads, candidates, wanted, planned, .. } = self;
        wanted.clear();
        planned.clear();
        let mut begin = 0;
        for of_path in candidates.chunk_by(|one, other| one.path == other.path) {
            let range = begin..begin + of_path.len();
            begin = range.end;
            let target = paths[of_path[0].path as usize].target;
            match target.pinned.index() {
                Some(firsts) => {
                    for candidate in of_path {
                        let value = probes[candidate.probe as usize].value();
                        let pages = firsts.len() / FINGERPRINT_BYTES;
                        if value >= fingerprint_at(firsts, 0) {
                            let page = last_at_most(firsts, pages, value) as u64;
                            wanted.push(Wanted { path: candidate.path, page, probe: candidate.probe });
                        }
                    }
                }
                None => plan_index_reads(target.section(), of_path, range, probes, planned),
            }
        }
        let place = |read: &PageRead| {
            let section = paths[read.path as usize].target.section();
            (section.index_position(read.pages.start), section.index_bytes(read.pages.start))
        };
        read_all(reads, paths, planned, usize::MAX, place, |read, bytes| {
            let target = paths[read.path as usize].target;
            let (section, stride) = (target.section(), read.pages.start);
            target.segment.check_sealed(bytes, section.index_position(stride), "index page")?;
            let firsts = &bytes[CHECKSUM_BYTES..];
            if fingerprint_at(firsts, 0) != section.strides[stride as usize].value() {
                return Err(target.segment.corrupt("an index page and the stride index disagree"));
            }
            let pages = section.stride_pages(stride);
            for candidate in &candidates[read.serves.clone()] {
                let value = probes[candidate.probe as usize].value();
                let page =
                    pages.start + last_at_most(firsts, (pages.end - pages.start) as usize, value) as u64;
                wanted.push(Wanted { path: candidate.path, page, probe: candidate.probe });
            }
            Ok(())
        })
    }

    /// Settles what stands in pages that are in memory; the others are left.
    fn settle_in_memory(&mut self, probes: &mut [Probe], paths: &[Path<'_>]) -> Result<(), StoreError> {
        let mut left = 0;
        for index in 0..self.wanted.len() {
            let wanted = self.wanted[index];
            let target = paths[wanted.path as usize].target;
            let position = target.section().page_position(wanted.page);
            let probe = &mut probes[wanted.probe as usize];
            let settled = target
                .pinned
                .with_page(wanted.page, |page| target.segment.page_holds(page, position, probe.value()));
            match settled {
                Some(holds) => {
                    if holds? {
                        probe.mark_found();
                    }
                }
                None => {
                    self.wanted[left] = wanted;
                    left += 1;
                }
            }
        }
        self.wanted.truncate(left);
        Ok(())
    }

    /// Reads the wanted pages and marks what is found in them.
    fn read_pages(
        &mut self,
        probes: &mut [Probe],
        paths: &[Path<'_>],
        joined: Joined,
    ) -> Result<(), StoreError> {
        let Self { reads, wanted, planned, .. } = self;
        planned.clear();
        let mut begin = 0;
        for of_path in wanted.chunk_by(|one, other| one.path == other.path) {
            let range = begin..begin + of_path.len();
            begin = range.end;
            joined.plan(of_path[0].path, wanted, range, |wanted| wanted.page, planned);
        }
        let place = |read: &PageRead| {
            let section = paths[read.path as usize].target.section();
            let (position, last) = (section.page_position(read.pages.start), read.pages.end - 1);
            let end = section.page_position(last) + section.page_bytes(last) as u64;
            (position, (end - position) as usize)
        };
        read_all(reads, paths, planned, usize::MAX, place, |read, bytes| {
            let Target { segment, pinned, .. } = paths[read.path as usize].target;
            let section = paths[read.path as usize].target.section();
            let begin = section.page_position(read.pages.start);
            for same_page in wanted[read.serves.clone()].chunk_by(|one, other| one.page == other.page) {
                let page = same_page[0].page;
                let position = section.page_position(page);
                let offset = (position - begin) as usize;
                let page_bytes = &bytes[offset..offset + section.page_bytes(page)];
                segment.check_sealed(page_bytes, position, "page")?;
                pinned.keep_page(page, page_bytes);
                for wanted in same_page {
                    let probe = &mut probes[wanted.probe as usize];
                    if segment.page_holds(page_bytes, position, probe.value())? {
                        probe.mark_found();
                    }
                }
            }
            Ok(())
        })
    }

    /// Brings a planned piece into memory.
    fn load(&mut self, load: &Load<'_>, read_bytes_max: usize) -> Result<(), StoreError> {
        let (Load::Index(target) | Load::Filter(target)) = load;
        let section = target.section();
        let paths = [Path { target, choice: Choice { access: Access::Filter, load: true, seconds: 0.0 } }];
        let read = |pages: Range<u64>| PageRead { path: 0, pages, serves: 0..0 };
        match load {
            Load::Index(_) => {
                let mut firsts = vec![0; section.pages as usize * FINGERPRINT_BYTES];
                let strides: Vec<PageRead> =
                    (0..section.stride_count()).map(|stride| read(stride..stride + 1)).collect();
                let place = |read: &PageRead| {
                    (section.index_position(read.pages.start), section.index_bytes(read.pages.start))
                };
                read_all(&mut self.reads, &paths, &strides, usize::MAX, place, |read, bytes| {
                    let stride = read.pages.start;
                    target.segment.check_sealed(bytes, section.index_position(stride), "index page")?;
                    let pages = section.stride_pages(stride);
                    if fingerprint_at(&bytes[CHECKSUM_BYTES..], 0) != section.strides[stride as usize].value()
                    {
                        return Err(target.segment.corrupt("an index page and the stride index disagree"));
                    }
                    let begin = pages.start as usize * FINGERPRINT_BYTES;
                    let length = (pages.end - pages.start) as usize * FINGERPRINT_BYTES;
                    firsts[begin..begin + length]
                        .copy_from_slice(&bytes[CHECKSUM_BYTES..CHECKSUM_BYTES + length]);
                    Ok(())
                })?;
                target.pinned.set_index(firsts);
            }
            Load::Filter(_) => {
                let all = section.filter.bytes().unwrap_or_default();
                let bytes = all.min(target.pinned.filter_pages() * PAGE_BYTES as u64);
                let mut held = vec![0; bytes as usize];
                let pages = bytes.div_ceil(PAGE_BYTES as u64);
                let step = (read_bytes_max / PAGE_BYTES) as u64;
                let windows: Vec<PageRead> = (0..pages.div_ceil(step))
                    .map(|window| read(window * step..pages.min((window + 1) * step)))
                    .collect();
                let place = |read: &PageRead| {
                    let begin = read.pages.start * PAGE_BYTES as u64;
                    let end = (read.pages.end * PAGE_BYTES as u64).min(bytes);
                    (section.filter_position + begin, (end - begin) as usize)
                };
                read_all(&mut self.reads, &paths, &windows, usize::MAX, place, |read, bytes| {
                    check_filter_pages(target, read.pages.start, bytes)?;
                    let begin = read.pages.start as usize * PAGE_BYTES;
                    held[begin..begin + bytes.len()].copy_from_slice(bytes);
                    Ok(())
                })?;
                target.pinned.set_filter(held);
            }
        }
        Ok(())
    }
}

/// Does all reads of a list, many in flight but no more bytes than `bytes_in_flight_max` and one read, and takes the bytes of
/// each as they come, in any order.
fn read_all(
    reads: &mut Reads,
    paths: &[Path<'_>],
    planned: &[PageRead],
    bytes_in_flight_max: usize,
    place: impl Fn(&PageRead) -> (u64, usize),
    mut take: impl FnMut(&PageRead, &[u8]) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let segment_of = |read: &PageRead| &paths[read.path as usize].target.segment;
    let (mut begun, mut ended, mut bytes_in_flight) = (0, 0, 0);
    while ended < planned.len() {
        while begun < planned.len() && reads.has_room() && bytes_in_flight < bytes_in_flight_max {
            let read = &planned[begun];
            let (position, bytes) = place(read);
            segment_of(read).start_read(reads, position, bytes, begun as u64)?;
            begun += 1;
            bytes_in_flight += bytes;
        }
        let done = reads.next().map_err(|failed| {
            let read = failed.tag.map_or(ended, |tag| tag as usize);
            segment_of(&planned[read]).read_failed(failed.error)
        })?;
        bytes_in_flight -= reads.bytes(&done).len();
        let taken = take(&planned[done.tag as usize], reads.bytes(&done));
        reads.release(done);
        taken?;
        ended += 1;
    }
    Ok(())
}

/// What becomes one read.
#[derive(Debug, Clone, Copy)]
struct Joined {
    /// Most pages of a read.
    pages_max: u64,
    /// Most pages between two wanted ones that are read for nothing.
    gap_pages: u64,
}

impl Joined {
    /// Plans the reads that serve `items[range]`, which are sorted by page.
    fn plan<T>(
        &self,
        path: u32,
        items: &[T],
        range: Range<usize>,
        page_of: impl Fn(&T) -> u64,
        planned: &mut Vec<PageRead>,
    ) {
        let mut begin = range.start;
        while begin < range.end {
            let first = page_of(&items[begin]);
            let (mut last, mut end) = (first, begin);
            while end < range.end {
                let page = page_of(&items[end]);
                // An index page stands between two strides; it is read along.
                let pages = page - first + 1 + (page / STRIDE_PAGES - first / STRIDE_PAGES);
                if page > last + 1 + self.gap_pages || pages > self.pages_max && page > first {
                    break;
                }
                last = page;
                end += 1;
            }
            planned.push(PageRead { path, pages: first..last + 1, serves: begin..end });
            begin = end;
        }
    }
}

/// Index reads of candidates of one path: one per stride. A candidate before the first key of the section is a false
/// positive that needs no page.
fn plan_index_reads(
    section: &Section,
    candidates: &[Candidate],
    range: Range<usize>,
    probes: &[Probe],
    planned: &mut Vec<PageRead>,
) {
    let value_of = |candidate: &Candidate| probes[candidate.probe as usize].value();
    let mut begin = 0;
    while begin < candidates.len() {
        let value = value_of(&candidates[begin]);
        let later_stride = section.strides.partition_point(|first| first.value() <= value);
        if later_stride == 0 {
            begin += 1;
            continue;
        }
        let next = section.strides.get(later_stride).map(|first| first.value());
        let count = candidates[begin..]
            .partition_point(|candidate| next.is_none_or(|next| value_of(candidate) < next));
        let stride = later_stride as u64 - 1;
        let serves = range.start + begin..range.start + begin + count;
        planned.push(PageRead { path: candidates[begin].path, pages: stride..stride + 1, serves });
        begin += count;
    }
}

/// Filter pages in memory, and the path whose candidates come out.
struct FilterWalk<'a> {
    section: &'a Section,
    pages: &'a [u8],
    first_page: u64,
    path: u32,
}

impl FilterWalk<'_> {
    /// Adds those of `probes[range]` that are not found yet and that the filter does not send away.
    fn collect(&self, probes: &[Probe], range: Range<usize>, candidates: &mut Vec<Candidate>) {
        let begin = range.start;
        let values = probes[range].iter().map(|probe| probe.value());
        self.section.filter.pass(self.pages, self.first_page, values, |index| {
            let probe_index = begin + index;
            if !probes[probe_index].is_found() {
                candidates.push(Candidate { path: self.path, probe: probe_index as u32 });
            }
        });
    }
}

fn check_filter_pages(target: &Target, first_page: u64, bytes: &[u8]) -> Result<(), StoreError> {
    let position = target.section().filter_position + first_page * PAGE_BYTES as u64;
    for (page_index, page) in bytes.chunks(PAGE_BYTES).enumerate() {
        target.segment.check_sealed(page, position + (page_index * PAGE_BYTES) as u64, "filter page")?;
    }
    Ok(())
}

/// Index of the last of `entries` sorted fingerprints that is at most `value`; the first one is.
fn last_at_most(firsts: &[u8], entries: usize, value: u128) -> usize {
    let (mut low, mut high) = (0, entries);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fingerprint_at(firsts, middle * FINGERPRINT_BYTES) <= value {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}
