//! Copies of the dedup state (`state.copy_to`): for machines whose disk does not outlive a run.
//!
//! A generation is a list of immutable files, so a copy is the files and then their manifest, under the same names, in a folder
//! or an object store. It is made beside the microbatches after the commit that names it ([`Copier`]) and may lag; a start
//! that lacks its state takes the newest copy that is whole ([`fetch`]) and reads from the tables only the rows of later
//! batches ([`bring_up`]).
//!
//! Flow: commit lands -> [`Copier::tell`] -> segments, manifest, sweep of copies that nobody needs
//!       start without state -> [`fetch`] into a folder beside the state, every page verified -> files renamed into the
//!       state -> the very generation of the ledger: go; an older one: [`bring_up`], compared with the ledger
//!
//! Invariants
//! 1. A manifest is written after all that it names, and only for a generation that a landed commit names.
//! 2. A copy is believed only as far as it adds up: each page has its checksum, the manifest that of the ledger, or, for an
//!    older one, the state that it leads to has exactly the keys (count and digest) that the ledger counts. So a copy of a
//!    batch that was rolled back, or that somebody changed, costs time and nothing else: then all is read from the tables.
//! 3. A copier deletes only files of its own job, and of its own or an earlier epoch: a later owner's files stay.
//! 4. The copier never makes a batch wait, and a failure of it never fails a run.
//!
//! Crashes. Between two files: files without a manifest, which the next copier finds there and completes or deletes. While
//! fetching: a folder [`ARRIVING`], deleted by the next fetch.
//!
//! Bounds: one part ([`PART_BYTES_MIN`], more only above 45 GB) in memory in either direction; `copy_rate` bytes a second;
//! one open file for each segment that is to be copied; [`CANDIDATES_MAX`] copies are tried by a start.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use iceberg::io::{FileIO, FileIOBuilder};
use iceberg_storage_opendal::OpenDalResolvingStorageFactory;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::keys::KeyMaker;
use super::owner::Owner;
use super::rebuild::{commit_change, ours, read_keys, renewing, store_spec, tallies, total};
use super::report::{Event, Report};
use super::session::Session;
use super::state::facts;
use super::stops;
use super::survey::state_folder;
use crate::commit::ledger::{Change, LedgerRecord};
use crate::commit::savepoint;
use crate::dedup::{self, GenerationName, GenerationRef, Key, Store, StoreError};
use crate::event_time::EventTimeMs;
use crate::job::{Job, StateCopies};
use crate::maintenance::storage::list;
use crate::memory::MemoryPlan;
use crate::protocol::stops::chain;
use crate::protocol::{generation, name_generation, reference};
use crate::sink::durable::local_path;
use crate::sink::scan::RowsOf;
use crate::stop::Stop;

/// Smallest part of a file that is read and written at once: the least that S3 takes as a part.
const PART_BYTES_MIN: u64 = 5 << 20;
/// Most parts of a file: S3 takes 10,000.
const PARTS_MAX: u64 = 9_000;
/// Most copies that a start tries before it reads the tables.
const CANDIDATES_MAX: usize = 3;
/// Folder in the state folder where a copy arrives.
const ARRIVING: &str = "arriving";
/// Between two looks for an interrupt while the last copy is finished: a signal is only a flag, nothing wakes who waits.
const FINISH_LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// Why a copy was not made or not taken.
#[derive(Debug, thiserror::Error)]
enum CopyError {
    /// The place of the copies.
    #[error("{what}")]
    Place {
        what: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The state folder.
    #[error("{what}")]
    Disk { what: String, source: io::Error },
    /// A file of the state, here or in the copy.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A copy that can not be used.
    #[error("{0}")]
    Unusable(String),
}

fn of_place<E>(what: impl Into<String>) -> impl FnOnce(E) -> CopyError
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let what = what.into();
    move |source| CopyError::Place { what, source: source.into() }
}

fn of_disk(what: impl Into<String>) -> impl FnOnce(io::Error) -> CopyError {
    let what = what.into();
    move |source| CopyError::Disk { what, source }
}

/// Where the copies of one job are.
#[derive(Debug, Clone)]
struct Place {
    file_io: FileIO,
    folder: String,
}

impl Place {
    /// With the storage properties of the job's tables.
    fn of(job: &Job, copies: &StateCopies, job_id: Uuid, tables: &FileIO) -> Result<Self, CopyError> {
        let to = match local_or_relative(&copies.to) {
            Some(path) => {
                let path = std::path::absolute(path).map_err(of_disk(format!("folder {}", copies.to)))?;
                format!("file://{}", path.display())
            }
            None => copies.to.clone(),
        };
        let factory = Arc::new(OpenDalResolvingStorageFactory::new());
        let file_io = FileIOBuilder::new(factory).with_props(tables.config().props().clone()).build();
        Ok(Self { file_io, folder: format!("{to}/{}-{job_id}", job.name) })
    }

    fn path(&self, file_name: &str) -> String {
        format!("{}/{file_name}", self.folder)
    }

    /// Files of the state in it, and their bytes.
    async fn list(&self) -> Result<BTreeMap<String, u64>, CopyError> {
        let mut found = BTreeMap::new();
        let take = |file: crate::maintenance::Found| {
            let name = file.path.rsplit('/').next().unwrap_or_default();
            if dedup::generation_of_file(name).is_some() {
                found.insert(name.to_owned(), file.bytes);
            }
        };
        let listed = list(&self.file_io, &self.folder, false, take).await;
        listed.map_err(of_place(format!("copies in {} can not be listed", self.folder)))?;
        Ok(found)
    }

    async fn read(&self, file_name: &str) -> Result<Vec<u8>, CopyError> {
        let path = self.path(file_name);
        let failed = || of_place(format!("{path} can not be read"));
        let bytes = self.file_io.new_input(&path).map_err(failed())?.read().await.map_err(failed())?;
        Ok(bytes.to_vec())
    }

    async fn write(&self, file_name: &str, bytes: Vec<u8>) -> Result<(), CopyError> {
        let path = self.path(file_name);
        let failed = || of_place(format!("{path} can not be written"));
        self.file_io.new_output(&path).map_err(failed())?.write(bytes.into()).await.map_err(failed())
    }

    async fn delete(&self, file_name: &str) -> Result<(), CopyError> {
        let path = self.path(file_name);
        self.file_io.delete(&path).await.map_err(of_place(format!("{path} can not be deleted")))
    }

    /// Writes a file of the state folder, part by part.
    async fn upload(
        &self,
        file_name: &str,
        file: File,
        bytes: u64,
        pace: &mut Pace,
    ) -> Result<(), CopyError> {
        let part_bytes = part_bytes(bytes);
        if bytes <= part_bytes {
            let whole = read_part(file, 0, bytes, file_name).await?.1;
            self.write(file_name, whole).await?;
            pace.wait(bytes).await;
            return Ok(());
        }
        let path = self.path(file_name);
        let failed = || of_place(format!("{path} can not be written"));
        let mut writer = self.file_io.new_output(&path).map_err(failed())?.writer().await.map_err(failed())?;
        let (mut at, mut file) = (0, file);
        while at < bytes {
            let length = part_bytes.min(bytes - at);
            let part;
            (file, part) = read_part(file, at, length, file_name).await?;
            writer.write(part.into()).await.map_err(failed())?;
            at += length;
            pace.wait(length).await;
        }
        writer.close().await.map_err(failed())
    }

    /// Reads a file into a folder, part by part.
    async fn download(&self, file_name: &str, bytes: u64, into: &Path) -> Result<(), CopyError> {
        let path = self.path(file_name);
        let failed = || of_place(format!("{path} can not be read"));
        let input = self.file_io.new_input(&path).map_err(failed())?;
        let found = input.metadata().await.map_err(failed())?.size;
        if found != bytes {
            return Err(CopyError::Unusable(format!("{path} has {found} bytes, its manifest says {bytes}")));
        }
        let reader = input.reader().await.map_err(failed())?;
        let unwritten = || of_disk(format!("{file_name} can not be written"));
        let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(into.join(file_name));
        let file = file.map_err(unwritten())?;
        let (mut at, part_bytes) = (0, part_bytes(bytes));
        while at < bytes {
            let length = part_bytes.min(bytes - at);
            let part = reader.read(at..at + length).await.map_err(failed())?;
            file.write_all_at(&part, at).map_err(unwritten())?;
            at += length;
        }
        file.sync_all().map_err(unwritten())
    }
}

/// A path of this machine, absolute or not; `None` for another storage.
fn local_or_relative(to: &str) -> Option<&Path> {
    local_path(to).or_else(|| (!to.contains("://")).then(|| Path::new(to)))
}

fn part_bytes(bytes: u64) -> u64 {
    bytes.div_ceil(PARTS_MAX).max(PART_BYTES_MIN)
}

/// Reads a range on a thread for it; gives the file back.
async fn read_part(file: File, at: u64, length: u64, name: &str) -> Result<(File, Vec<u8>), CopyError> {
    let reading = tokio::task::spawn_blocking(move || {
        let mut part = vec![0; usize::try_from(length).expect("a part fits into memory")];
        file.read_exact_at(&mut part, at).map(|()| (file, part))
    });
    reading.await.expect("reading a part does not panic").map_err(of_disk(format!("{name} can not be read")))
}

/// Holds a number of bytes a second, on average.
struct Pace {
    bytes_per_second: u64,
    begun: Instant,
    bytes: u64,
}

impl Pace {
    fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, begun: Instant::now(), bytes: 0 }
    }

    /// Waits until so many bytes more are due.
    async fn wait(&mut self, bytes: u64) {
        self.bytes += bytes;
        // A rate is what is asked for: the time itself is the condition.
        let due = Duration::from_secs_f64(self.bytes as f64 / self.bytes_per_second as f64);
        tokio::time::sleep(due.saturating_sub(self.begun.elapsed())).await;
    }
}

/// What is to be copied: a newer order takes the place of one that was not begun.
#[derive(Debug, Clone)]
struct Order {
    named: GenerationRef,
    /// Generations that savepoints need.
    pinned: Vec<GenerationRef>,
}

/// What a copier has done.
#[derive(Debug, Default)]
struct Copied {
    newest: Option<GenerationName>,
    files: u64,
    bytes: u64,
    /// Why the last order was not done.
    failed: Option<CopyError>,
}

/// Copies generations beside the microbatches.
pub(super) struct Copier {
    orders: watch::Sender<Option<Order>>,
    work: JoinHandle<Copied>,
    to: String,
}

/// A life that ends by an outage takes its copier with it: the next one has its own. What was begun is a file that no
/// manifest of the copy names.
impl Drop for Copier {
    fn drop(&mut self) {
        self.work.abort();
    }
}

impl Copier {
    fn start(place: Place, folder: PathBuf, bytes_per_second: u64) -> Self {
        let (orders, receiver) = watch::channel(None);
        let to = place.folder.clone();
        let work = Work {
            place,
            folder,
            bytes_per_second,
            present: None,
            previous: None,
            copied: Copied::default(),
        };
        Self { orders, work: tokio::spawn(work.follow(receiver)), to }
    }

    /// Orders a copy of a generation that a landed commit names. Never waits.
    fn tell(&self, order: Order) {
        self.orders.send_replace(Some(order));
    }

    /// Waits for the copy that was ordered last, unless the run is interrupted; says what was done.
    async fn finish(mut self, is_interrupted: impl Fn() -> bool) -> String {
        // Ends the task once it has done what was ordered last.
        self.orders = watch::channel(None).0;
        loop {
            tokio::select! {
                copied = &mut self.work => return match copied {
                    Ok(copied) => copied.in_words(&self.to),
                    // Every microbatch is committed: a copy that fell is no reason to say otherwise.
                    Err(error) => format!("the dedup state was not copied to {}: {error}; please report this", self.to),
                },
                // A signal is only a flag, which is looked at below.
                () = tokio::time::sleep(FINISH_LOOK_INTERVAL) => {}
            }
            if is_interrupted() {
                return format!(
                    "the copy of the dedup state to {} was interrupted; a later run goes on with it",
                    self.to
                );
            }
        }
    }
}

impl Copied {
    fn in_words(&self, to: &str) -> String {
        let (files, size) = (self.files, bytesize::ByteSize(self.bytes));
        let newest = self.newest.map_or("none".to_owned(), |name| format!("that of batch {}", name.batch));
        match &self.failed {
            Some(error) => format!(
                "the dedup state was not copied to {to}: {}; the newest copy of this run is {newest}; a later run goes on with it",
                chain(error)
            ),
            None => format!("copied the dedup state to {to}: {files} files, {size}; the newest is {newest}"),
        }
    }
}

/// The task of a copier.
struct Work {
    place: Place,
    folder: PathBuf,
    bytes_per_second: u64,
    /// Files of the copy and their bytes; `None` before it was listed.
    present: Option<BTreeMap<String, u64>>,
    /// The generation that was copied before the last one: a start may be reading it.
    previous: Option<GenerationRef>,
    copied: Copied,
}

impl Work {
    async fn follow(mut self, mut orders: watch::Receiver<Option<Order>>) -> Copied {
        // An order that nobody has taken is given also after the sender is gone.
        while orders.changed().await.is_ok() {
            let Some(order) = orders.borrow_and_update().clone() else { continue };
            match self.carry_out(&order).await {
                Ok(()) => self.copied.failed = None,
                Err(error) => {
                    tracing::warn!(%error, generation = %order.named.name, "the dedup state was not copied, a later batch tries again");
                    self.copied.failed = Some(error);
                }
            }
        }
        self.copied
    }

    async fn carry_out(&mut self, order: &Order) -> Result<(), CopyError> {
        if self.present.is_none() {
            self.present = Some(self.place.list().await?);
        }
        for pinned in &order.pinned {
            if dedup::is_at_home(&self.folder, pinned) {
                self.copy(pinned).await?;
            }
        }
        self.copy(&order.named).await?;
        self.copied.newest = Some(order.named.name);
        self.sweep(order).await?;
        self.previous = Some(order.named.clone());
        Ok(())
    }

    /// Copies what the copy lacks of a generation, its manifest last.
    async fn copy(&mut self, generation: &GenerationRef) -> Result<(), CopyError> {
        let manifest = generation.name.manifest_file();
        let present = self.present.get_or_insert_default();
        let text =
            fs::read(self.folder.join(&manifest)).map_err(of_disk(format!("{manifest} can not be read")))?;
        // A file that a crash cut short is not there: a folder shows it while it is written.
        if present.get(&manifest) == Some(&(text.len() as u64)) {
            return Ok(());
        }
        let lacking: Vec<(String, u64)> = dedup::segments_of(&self.folder, generation)?
            .into_iter()
            .filter(|(name, bytes)| present.get(name) != Some(bytes))
            .collect();
        // Opened before the first is read: what the sweep deletes meanwhile can still be read.
        let mut files = Vec::with_capacity(lacking.len());
        for (name, bytes) in lacking {
            let file =
                File::open(self.folder.join(&name)).map_err(of_disk(format!("{name} can not be read")))?;
            files.push((name, bytes, file));
        }
        let mut pace = Pace::new(self.bytes_per_second);
        for (name, bytes, file) in files {
            self.place.upload(&name, file, bytes, &mut pace).await?;
            crate::crash_point!("copy_segment_written");
            present.insert(name, bytes);
            self.copied.files += 1;
            self.copied.bytes += bytes;
        }
        let bytes = text.len() as u64;
        self.copied.bytes += bytes;
        self.place.write(&manifest, text).await?;
        crate::crash_point!("copy_manifest_written");
        present.insert(manifest, bytes);
        self.copied.files += 1;
        Ok(())
    }

    /// Deletes what neither the copy that was just made, nor the one before, nor a savepoint needs.
    async fn sweep(&mut self, order: &Order) -> Result<(), CopyError> {
        let present = self.present.clone().unwrap_or_default();
        let mut needed = BTreeSet::new();
        for kept in [&order.named].into_iter().chain(&self.previous).chain(&order.pinned) {
            let manifest = kept.name.manifest_file();
            if present.contains_key(&manifest) {
                let text = self.place.read(&manifest).await?;
                let segments = dedup::segments_in(text, &manifest)?;
                needed.extend(segments.into_iter().map(|(name, _)| name));
                needed.insert(manifest);
            }
        }
        let epoch = order.named.name.epoch;
        let is_ours = |name: &String| dedup::generation_of_file(name).is_some_and(|made| made.epoch <= epoch);
        let mut gone: Vec<String> =
            present.into_keys().filter(|name| !needed.contains(name) && is_ours(name)).collect();
        // Manifests first, so that what is left of a copy is never taken for one.
        gone.sort_by_key(|name| name.ends_with(".segment"));
        for name in gone {
            self.place.delete(&name).await?;
            crate::crash_point!("copy_deleted");
            self.present.get_or_insert_default().remove(&name);
        }
        Ok(())
    }
}

impl Session<'_> {
    /// Begins to copy the state, if the job asks for it, with the generation that the ledger names.
    pub(super) fn start_copier(&mut self, report: &mut dyn Report) {
        let job = &self.owner.world.loaded.job;
        let Some(copies) = &job.state_copies else { return };
        match Place::of(job, copies, self.owner.record.job_id, self.owner.main.file_io()) {
            Ok(place) => {
                self.copier = Some(Copier::start(place, state_folder(job), copies.bytes_per_second));
                self.copy_state();
            }
            Err(error) => {
                let text = format!("the dedup state is not copied: {}", chain(&error));
                report.event(&Event::Notice { text });
            }
        }
    }

    /// Orders a copy of the generation that the ledger names now.
    pub(super) fn copy_state(&self) {
        let Some(copier) = &self.copier else { return };
        let Some(named) = generation(&self.owner.record.dedup) else { return };
        let pinned = savepoint::pinned_generations(self.owner.main_metadata()).unwrap_or_default();
        let pinned = pinned.into_iter().filter_map(|(name, checksum)| reference(&name, checksum)).collect();
        copier.tell(Order { named, pinned });
    }

    /// Waits for the last copy, after the table was given back.
    pub(super) async fn finish_copies(&mut self, report: &mut dyn Report) {
        if let Some(copier) = self.copier.take() {
            let text = copier.finish(|| self.options.interrupted()).await;
            report.event(&Event::Notice { text });
        }
    }
}

/// The state that the last record names, from a copy, with what later batches wrote. `None` if there is no copy that leads
/// to it; then all is to be read from the tables.
pub(super) async fn from_copy(
    owner: &mut Owner<'_>,
    keys: &KeyMaker,
    memory: &MemoryPlan,
    report: &mut dyn Report,
) -> Result<Option<GenerationRef>, Stop> {
    let job = &owner.world.loaded.job;
    let (record, folder) = (owner.record.clone(), state_folder(job));
    let (Some(wanted), Some(copies)) = (generation(&record.dedup), &job.state_copies) else {
        return Ok(None);
    };
    let begun = Instant::now();
    let fetched = match Place::of(job, copies, record.job_id, owner.main.file_io()) {
        Ok(place) => renewing(owner, fetch(&place, &folder, &record, &wanted)).await?,
        Err(error) => Err(error),
    };
    let (text, named) = match fetched {
        Ok(Some(Fetched { named, bytes })) => {
            let (size, seconds) = (bytesize::ByteSize(bytes), begun.elapsed().as_secs_f64());
            let batch = named.name.batch;
            (
                format!("took the dedup state of batch {batch} from {}: {size} in {seconds:.1} s", copies.to),
                Some(named),
            )
        }
        Ok(None) => {
            (format!("{} has no copy of the dedup state of this job that can be used", copies.to), None)
        }
        Err(error) => (format!("copies of the dedup state can not be taken: {}", chain(&error)), None),
    };
    report.event(&Event::Notice { text });
    match named {
        Some(named) if named != wanted => bring_up(owner, keys, memory, &named, report).await,
        named => Ok(named),
    }
}

struct Fetched {
    named: GenerationRef,
    bytes: u64,
}

/// Brings the newest usable copy into the state folder, every page of it verified: the very one that is wanted, else one of
/// an earlier batch.
async fn fetch(
    place: &Place,
    folder: &Path,
    record: &LedgerRecord,
    wanted: &GenerationRef,
) -> Result<Option<Fetched>, CopyError> {
    let present = place.list().await?;
    let is_manifest = |name: &String, made: &GenerationName| *name == made.manifest_file();
    let mut candidates: Vec<GenerationName> = present
        .keys()
        .filter_map(|name| dedup::generation_of_file(name).filter(|made| is_manifest(name, made)))
        .filter(|made| *made == wanted.name || made.batch < record.batch)
        .collect();
    candidates.sort_by_key(|made| (*made == wanted.name, made.batch, made.epoch));
    for name in candidates.into_iter().rev().take(CANDIDATES_MAX) {
        match arrive(place, folder, name, record, wanted).await {
            Ok(fetched) => return Ok(Some(fetched)),
            Err(error) => {
                tracing::warn!(%error, generation = %name, "a copy of the dedup state can not be used")
            }
        }
    }
    let arriving = folder.join(ARRIVING);
    match fs::remove_dir_all(&arriving) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(of_disk(format!("folder {} can not be deleted", arriving.display()))(error))
        }
        _ => Ok(None),
    }
}

async fn arrive(
    place: &Place,
    folder: &Path,
    name: GenerationName,
    record: &LedgerRecord,
    wanted: &GenerationRef,
) -> Result<Fetched, CopyError> {
    let arriving = folder.join(ARRIVING);
    let unmade = || of_disk(format!("folder {} can not be made anew", arriving.display()));
    match fs::remove_dir_all(&arriving) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(unmade()(error)),
        _ => {}
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&arriving).map_err(unmade())?;
    let manifest = name.manifest_file();
    let text = place.read(&manifest).await?;
    let segments = dedup::segments_in(text.clone(), &manifest)?;
    fs::write(arriving.join(&manifest), &text).map_err(unmade())?;
    let listed = dedup::list_generations(&arriving, Some(record.job_id))?;
    let Some(found) = listed.into_iter().find(|found| found.reference.name == name) else {
        return Err(CopyError::Unusable(format!("{manifest} is of another job")));
    };
    let named = found.reference;
    let facts = dedup::generation_facts(&arriving, &named)?;
    let fits = facts.spec.key_spec_hash == record.dedup.key_spec_hash && facts.spec.seed == record.dedup.seed;
    if !fits || (named.name == wanted.name && named != *wanted) {
        return Err(CopyError::Unusable(format!("{manifest} is not the one that the ledger means")));
    }
    let mut bytes = text.len() as u64;
    for (segment, segment_bytes) in &segments {
        place.download(segment, *segment_bytes, &arriving).await?;
        crate::crash_point!("copy_segment_arrived");
        bytes += segment_bytes;
    }
    let (checked, at) = (named.clone(), arriving.clone());
    let verifying = tokio::task::spawn_blocking(move || dedup::verify(&at, &checked));
    verifying.await.expect("verifying does not panic")?;
    // Names are those of immutable files: what stands under one is the same, or damaged.
    let moved = || of_disk(format!("the copy in {} can not be moved", arriving.display()));
    let sync = |folder: &Path| File::open(folder).and_then(|folder| folder.sync_all());
    for (segment, _) in &segments {
        fs::rename(arriving.join(segment), folder.join(segment)).map_err(moved())?;
    }
    sync(folder).map_err(moved())?;
    fs::rename(arriving.join(&manifest), folder.join(&manifest)).map_err(moved())?;
    sync(folder).map_err(moved())?;
    crate::crash_point!("copy_arrived");
    fs::remove_dir_all(&arriving).map_err(moved())?;
    Ok(Fetched { named, bytes })
}

/// Adds the keys of later batches to the state of an earlier one, and names it in the ledger if it then is what the ledger
/// counts.
async fn bring_up(
    owner: &mut Owner<'_>,
    keys: &KeyMaker,
    memory: &MemoryPlan,
    earlier: &GenerationRef,
    report: &mut dyn Report,
) -> Result<Option<GenerationRef>, Stop> {
    let begun = Instant::now();
    let (record, folder) = (owner.record.clone(), state_folder(&owner.world.loaded.job));
    let of_state = |error| stops::state(&folder, error);
    let memory = &memory.for_keys_of_tables();
    let mut store = Store::open(&folder, store_spec(&record), Some(earlier), memory.dedup_lookup_bytes())
        .map_err(of_state)?;
    let since = record.dedup.complete_since.unwrap_or(EventTimeMs(i64::MIN));
    let RowsOf::Batches { after, up_to } = ours(&record) else {
        unreachable!("our rows are those of batches")
    };
    let later = RowsOf::Batches { after: after.max(earlier.name.batch), up_to };
    let (epoch, batch) = (record.epoch, record.batch);
    let new_name = || GenerationName::new(epoch, batch, Uuid::now_v7());
    let pending_bytes_max = memory.pending_bytes_max();
    let read = read_keys(owner, keys, memory, later, None, report, &mut |keys| {
        // What lies before is not in the state, whoever wrote it.
        let live: Vec<Key> = keys.iter().filter(|key| key.event_time >= since).copied().collect();
        store.append_unprobed(&live)?;
        if store.pending_bytes() >= pending_bytes_max {
            store.prepare(new_name())?;
            store.publish();
        }
        Ok(())
    })
    .await?;
    crate::crash_point!("copy_rows_read");
    // Exactly the buckets that the ledger says are gone: the job's window may have become another one.
    if since.0 > i64::MIN {
        store.expire_behind(since, Duration::ZERO);
    }
    let named = store.prepare(new_name()).map_err(of_state)?;
    let found = total(store.buckets());
    let counted = (record.dedup.keys, record.dedup.digest.as_str());
    let by_bucket = tallies(&record.buckets);
    if (found.keys, found.digest.to_string().as_str()) != counted
        || !(by_bucket.is_empty() || by_bucket == store.buckets())
    {
        store.abandon();
        report.event(&Event::Notice {
            text: format!(
                "the copy of batch {} and the rows of later batches have {} keys, not those {} that the ledger counts; \
                 reading the table",
                earlier.name.batch, found.keys, record.dedup.keys
            ),
        });
        return Ok(None);
    }
    store.publish();
    let mut next = record.clone();
    name_generation(&mut next, facts(&store, named.clone()));
    let what = format!(
        "the copy of batch {} with the keys of {} rows of later batches: {} keys in {:.1} s",
        earlier.name.batch,
        read.rows,
        found.keys,
        begun.elapsed().as_secs_f64()
    );
    report.event(&Event::Notice { text: format!("made the dedup state again from {what}") });
    commit_change(owner, next, Change { by: "run".to_owned(), what }, false).await?;
    Ok(Some(named))
}
