//! Keys from the table into the dedup state: what is missing when the state is lost or damaged, the buckets that a widened
//! window lacks, and a bucket that has expired when an event of it comes.
//!
//! Flow of [`restore`]: buckets that the folder still holds whole (`dedup/salvage.rs`), then the keys of all others from the
//! rows of our batches in main and late table -> [`Builder`], which says what they are -> rows of others, if they count as
//! seen -> the same builder -> a generation -> compared with the ledger -> a commit that names the generation
//!
//! Invariants
//! 1. A bucket comes into the new generation whole: from files that add up to what the ledger counts, or from the table.
//! 2. The ledger names a generation only after it was compared, so a crash on the way leaves the state as lost as it was.
//! 3. A key in a bucket that ours and others' rows have is ours: what others add is the difference.
//!
//! Bounds: what `sink/scan.rs` holds for its readers, and the memory of the builder; on disk about 10 bytes per key
//! while it is read. A loan reads its buckets whole: the number of rows in them decides how long it takes, and one scan
//! serves all buckets that a chunk lacks.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use iceberg::table::Table;
use iceberg::{Catalog, TableIdent};

use super::keys::KeyMaker;
use super::owner::Owner;
use super::report::{Event, Report};
use super::state::{bucket_record, facts};
use super::stops;
use super::survey::state_folder;
use crate::catalog;
use crate::commit::ledger::{BucketRecord, Change, Kind, LedgerRecord, Suppressed};
use crate::commit::side::Role;
use crate::dedup::{
    self, Bucket, BucketTally, Builder, Digest, Era, GenerationName, Key, Loan, Store, StoreError, StoreSpec,
    Tally,
};
use crate::event_time::EventTimeMs;
use crate::job::{Job, OnMissingKeys, SUPPRESSED_SUFFIX};
use crate::memory::MemoryPlan;
use crate::protocol::{generation, name_generation};
use crate::sink::scan::{self, Rows, RowsOf, ScanError, TimeRanges};
use crate::sink::schema;
use crate::sink::suppressed::{self, ErasedKey};
use crate::stop::{Reason, Stop};

/// Between two looks for a signal and at the lease while long work is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Most missing buckets that a stop names one by one.
const MISSING_SHOWN_MAX: usize = 5;

/// What the state of a record's job is, with the buckets that the record tells of.
pub(super) fn store_spec(record: &LedgerRecord) -> StoreSpec {
    StoreSpec {
        job_id: record.job_id,
        key_spec_hash: record.dedup.key_spec_hash.clone(),
        seed: record.dedup.seed,
        shards: record.dedup.shards,
        bucket_width_ms: record.dedup.bucket_width_ms,
        repeats: record.dedup.repeats,
    }
}

/// What a ledger counts in its buckets; a digest that is none makes the bucket one that is to be read again.
pub(super) fn tallies(records: &[BucketRecord]) -> Vec<BucketTally> {
    let tally = |record: &BucketRecord| {
        let digest = Digest::try_from(record.digest.clone()).ok()?;
        let (from, to) = (EventTimeMs(record.from), EventTimeMs(record.to));
        Some(BucketTally { from, to, keys: record.count, digest })
    };
    records.iter().filter_map(tally).collect()
}

/// What makes the state again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Restoring<'a> {
    /// The command or setting, for the ledger.
    pub(super) by: &'a str,
    /// Whether buckets that the folder holds whole are taken from it.
    pub(super) salvage: bool,
    /// Whether the commit that names the generation gives the table back.
    pub(super) release: bool,
}

/// A state that was made again, and what it cost.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize)]
pub struct Restored {
    /// Keys in it.
    pub keys: u64,
    /// Its live buckets.
    pub buckets: u64,
    /// Those of them that were read from the table.
    pub buckets_read: u64,
    /// Keys of the others, which the state folder still held whole.
    pub keys_kept: u64,
    /// Rows of this job that were read.
    pub rows_read: u64,
    /// Rows whose key stood in its bucket already.
    pub repeats: u64,
    /// Keys of rows by others that count as seen and no row of this job has.
    pub keys_of_others: u64,
    /// Keys that the ledger counted and that were accepted as missing.
    pub missing_keys: u64,
    /// How long it took.
    pub seconds: f64,
}

impl Restored {
    /// As a sentence without its subject.
    pub fn in_words(&self) -> String {
        let mut text = format!("{} keys", self.keys);
        if self.keys_kept > 0 {
            text = format!(
                "{text}, of which {} were still whole in the state folder; the other {} of {} buckets",
                self.keys_kept, self.buckets_read, self.buckets
            );
        }
        text = format!("{text} from {} rows in {:.1} s", self.rows_read, self.seconds);
        for (count, what) in [
            (self.keys_of_others, "keys of rows by others"),
            (self.repeats, "rows repeat a key"),
            (self.missing_keys, "missing keys accepted"),
        ] {
            if count > 0 {
                text = format!("{text}; {count} {what}");
            }
        }
        text
    }
}

/// What a reading of keys cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct KeysRead {
    /// Rows.
    pub(super) rows: u64,
    /// Bytes of data files.
    pub(super) bytes: u64,
}

/// Reads keys of rows of main and of the late table, those of the slices or all, and hands them on; says what it read.
/// Renews the lease on the way.
pub(super) async fn read_keys(
    owner: &mut Owner<'_>,
    keys: &KeyMaker,
    memory: &MemoryPlan,
    which: RowsOf,
    slices: Option<&[Bucket]>,
    report: &mut dyn Report,
    take: &mut dyn FnMut(&[Key]) -> Result<(), StoreError>,
) -> Result<KeysRead, Stop> {
    let late = owner.sides.get(&Role::Late).map(|table| (table.clone(), Rows::Proven));
    let mut all = KeysRead::default();
    for (table, of) in [(owner.main.clone(), Rows::All)].into_iter().chain(late) {
        let read = Reading { keys, memory, which, slices, of };
        let KeysRead { rows, bytes } = read_keys_of(owner, &table, read, report, take).await?;
        (all.rows, all.bytes) = (all.rows + rows, all.bytes + bytes);
    }
    Ok(all)
}

/// What is read of one table.
struct Reading<'a> {
    keys: &'a KeyMaker,
    memory: &'a MemoryPlan,
    which: RowsOf,
    slices: Option<&'a [Bucket]>,
    of: Rows,
}

async fn read_keys_of(
    owner: &mut Owner<'_>,
    from: &Table,
    reading: Reading<'_>,
    report: &mut dyn Report,
    take: &mut dyn FnMut(&[Key]) -> Result<(), StoreError>,
) -> Result<KeysRead, Stop> {
    let Reading { keys, memory, which, slices, of } = reading;
    let folder = state_folder(&owner.world.loaded.job);
    let table = from.identifier().to_string();
    let of_scan = |error: ScanError| {
        stops::data(format!("keys of table {table} can not be read"), error.reason(), error)
    };
    let times = slices.zip(keys.prunable_column()).map(|(slices, column)| TimeRanges {
        column: column.to_owned(),
        ranges: slices.iter().map(|slice| (slice.from, slice.to)).collect(),
    });
    let columns = keys.table_columns();
    let rows_total = rows_in(from);
    let mut scan = scan::scan_keys_beside(from, &columns, (which, of), times.as_ref(), memory.scan_readers())
        .await
        .map_err(of_scan)?;
    let (mut rows, mut renewed) = (0, Instant::now());
    while let Some(batch) = scan.rows.try_next().await.map_err(of_scan)? {
        rows += batch.num_rows() as u64;
        let mut found = match which {
            RowsOf::Batches { .. } => keys.of_table_rows(&table, &batch)?,
            RowsOf::Others { .. } => keys.of_rows_of_others(&batch)?,
        };
        if let Some(slices) = slices {
            found.retain(|key| dedup::slice_at(slices, key.event_time).is_some());
        }
        take(&found).map_err(|error| stops::state(&folder, error))?;
        report.event(&Event::Reading { table: table.clone(), rows, rows_total });
        if owner.world.options.interrupted() {
            return Err(stops::interrupted());
        }
        if renewed.elapsed() > owner.lease() / 3 {
            owner.renew().await?;
            renewed = Instant::now();
        }
    }
    Ok(KeysRead { rows, bytes: scan.bytes_read() })
}

/// Name of a job's table of erased keys.
pub(super) fn suppressed_ident(job: &Job) -> Result<TableIdent, Stop> {
    let mut name = job.sink.table.clone();
    if let Some(last) = name.last_mut() {
        last.push_str(SUPPRESSED_SUFFIX);
    }
    schema::table_ident(&name).map_err(stops::schema)
}

/// The table of erased keys, as the ledger knows it.
///
/// # Errors
/// `TABLE_REPLACED`: it is gone, or another one.
pub(super) async fn suppressed_table(
    catalog: &dyn Catalog,
    known: &Suppressed,
    job_shown: &str,
) -> Result<Table, Stop> {
    let parts: Vec<String> = known.table.split('.').map(str::to_owned).collect();
    let ident = schema::table_ident(&parts).map_err(stops::schema)?;
    let found = catalog::load(catalog, &ident).await.map_err(stops::catalog)?;
    let uuid = found.as_ref().map(|table| table.metadata().uuid());
    let what = match (found, uuid) {
        (Some(table), Some(uuid)) if uuid == known.uuid => return Ok(table),
        (_, Some(found)) => format!(
            "table {}, which holds the erased keys, was replaced: uuid {found} where {} was expected",
            known.table, known.uuid
        ),
        (_, None) => format!("table {}, which holds the erased keys, is missing", known.table),
    };
    let way_out = format!(
        "nothing was read or written; without it events of erased keys could come in again; put it back under its name \
         (register_table with its last metadata file), then:\n  tidemill run {job_shown}"
    );
    Err(Stop::new(Reason::TableReplaced, what, way_out))
}

/// The table of erased keys of a job whose ledger is lost, with the keys of this key spec; `None` if there never was one.
pub(super) async fn find_suppressed(
    catalog: &dyn Catalog,
    job: &Job,
    key_spec_hash: &str,
) -> Result<Option<Suppressed>, Stop> {
    let ident = suppressed_ident(job)?;
    let Some(table) = catalog::load(catalog, &ident).await.map_err(stops::catalog)? else { return Ok(None) };
    let of_scan = |error: ScanError| {
        stops::data(format!("erased keys of table {ident} can not be read"), error.reason(), error)
    };
    let mut keys = suppressed::read(&table, key_spec_hash).await.map_err(of_scan)?;
    let mut rows = 0;
    while let Some(batch) = keys.try_next().await.map_err(of_scan)? {
        rows += batch.len() as u64;
    }
    Ok(Some(Suppressed { table: ident.to_string(), uuid: table.metadata().uuid(), rows }))
}

/// Reads the erased keys of slices or all, and hands them on.
async fn read_suppressed(
    owner: &mut Owner<'_>,
    record: &LedgerRecord,
    slices: Option<&[Bucket]>,
    take: &mut dyn FnMut(&[Key]) -> Result<(), StoreError>,
) -> Result<(), Stop> {
    let Some(known) = &record.suppressed else { return Ok(()) };
    let world = &owner.world;
    let table = suppressed_table(&*world.tables.catalog, known, &world.options.job_shown).await?;
    let of_scan = |error: ScanError| {
        stops::data(format!("erased keys of table {} can not be read", known.table), error.reason(), error)
    };
    let folder = state_folder(&world.loaded.job);
    let mut keys = suppressed::read(&table, &record.dedup.key_spec_hash).await.map_err(of_scan)?;
    let mut rows = 0;
    while let Some(batch) = keys.try_next().await.map_err(of_scan)? {
        rows += batch.len() as u64;
        let key = |erased: &ErasedKey| Key {
            fingerprint: erased.fingerprint,
            // Where in its bucket it stood is not kept.
            event_time: erased.bucket_to.minus_ms(1),
        };
        let mut found: Vec<Key> = batch.iter().map(key).collect();
        if let Some(slices) = slices {
            found.retain(|key| dedup::slice_at(slices, key.event_time).is_some());
        }
        take(&found).map_err(|error| stops::state(&folder, error))?;
    }
    if rows < known.rows && world.loaded.job.dedup.on_missing_keys == OnMissingKeys::Stop {
        return Err(Stop::new(
            Reason::MissingKeys,
            format!("table {} holds {rows} erased keys where the ledger knows {}", known.table, known.rows),
            "no event was written; events of the erased keys that are missing could come in again; roll the table forward \
             with your engine, or go on without them:\n  tidemill run JOB --set dedup.on_missing_keys=accept",
        ));
    }
    Ok(())
}

/// Rows of a table's current snapshot, as its summary says.
fn rows_in(table: &Table) -> Option<u64> {
    let summary = table.metadata().current_snapshot()?.summary();
    summary.additional_properties.get("total-records")?.parse().ok()
}

/// The rows that a ledger's own batches wrote.
pub(super) fn ours(record: &LedgerRecord) -> RowsOf {
    let after = record.others.as_ref().map_or(0, |others| others.batch_max);
    RowsOf::Batches { after, up_to: record.batch }
}

/// The rows by others that count as seen.
pub(super) fn adopted(record: &LedgerRecord) -> Option<RowsOf> {
    let others = record.others.as_ref().filter(|others| others.adopted)?;
    Some(RowsOf::Others { batch_max: others.batch_max })
}

/// What is left of `[since, for ever)` without some ascending buckets.
fn gaps(since: EventTimeMs, without: &[Bucket]) -> Vec<Bucket> {
    let mut gaps = Vec::new();
    let mut from = since;
    for bucket in without {
        if from < bucket.from {
            gaps.push(Bucket { from, to: bucket.from });
        }
        from = from.max(bucket.to);
    }
    if from.0 < i64::MAX {
        gaps.push(Bucket { from, to: EventTimeMs(i64::MAX) });
    }
    gaps
}

/// Makes the state of a record again: what the folder holds whole is kept, the rest is read from the table and compared with
/// what the record counts. Then a commit puts the record in the place of the last one, with the new generation.
///
/// # Errors
/// `MISSING_KEYS`: the table lacks rows that the ledger counts, and `dedup.on_missing_keys` is `stop`. The ledger then
/// still has its last record.
pub(super) async fn restore(
    owner: &mut Owner<'_>,
    record: LedgerRecord,
    keys: &KeyMaker,
    memory: &MemoryPlan,
    restoring: Restoring<'_>,
    report: &mut dyn Report,
) -> Result<Restored, Stop> {
    let begun = Instant::now();
    let folder = state_folder(&owner.world.loaded.job);
    let of_state = |error| match error {
        StoreError::Stopped => stops::interrupted(),
        error => stops::state(&folder, error),
    };
    let since = record.dedup.complete_since.unwrap_or(EventTimeMs(i64::MIN));
    let wanted = wanted(&record, &folder);
    let (mut builder, saved) =
        begin(&record, &wanted, &folder, memory, restoring.salvage).map_err(of_state)?;
    let stop = Arc::new(AtomicBool::new(false));
    builder = builder.stop_by(Arc::clone(&stop));
    let slices = gaps(since, &saved);
    let bounded = (saved.len() + usize::from(since.0 > i64::MIN) > 0).then_some(slices.as_slice());
    let read =
        read_keys(owner, keys, memory, ours(&record), bounded, report, &mut |keys| builder.add(keys)).await?;
    let mut restored = Restored { rows_read: read.rows, ..Restored::default() };
    read_suppressed(owner, &record, bounded, &mut |keys| builder.add(keys)).await?;
    crate::crash_point!("rebuild_keys_read");
    owner.renew().await?;
    crate::crash_point!("rebuild_lease_renewed");
    let mut of_ours = None;
    if let Some(which) = adopted(&record) {
        let settled;
        (builder, settled) = beside(owner, &stop, move || {
            let settled = builder.settle();
            (builder, settled)
        })
        .await?;
        of_ours = Some(settled.map_err(of_state)?);
        read_keys(owner, keys, memory, which, bounded, report, &mut |keys| builder.add(keys)).await?;
    }
    let name = GenerationName::new(record.epoch, record.batch, uuid::Uuid::now_v7());
    let finishing = move || builder.finish(name);
    let (generation, of_all) = beside(owner, &stop, finishing).await?.map_err(of_state)?;
    let ours = of_ours.as_ref().unwrap_or(&of_all);
    restored.repeats = ours.repeats;
    restored.keys_kept = wanted
        .iter()
        .filter(|bucket| saved.binary_search(&bucket.bucket()).is_ok())
        .map(|bucket| bucket.keys)
        .sum();
    let spec = store_spec(&record);
    let store =
        Store::open(&folder, spec, Some(&generation), memory.dedup_lookup_bytes()).map_err(of_state)?;
    let found = Found { ours: &ours.buckets, all: store.buckets(), saved: &saved };
    restored.missing_keys = compare_with_ledger(owner, &record, &found)?;
    crate::crash_point!("rebuild_compared");
    restored.buckets = store.buckets().len() as u64;
    restored.buckets_read = restored.buckets - saved.len().min(store.buckets().len()) as u64;
    restored.keys = store.stats().keys;
    let mut next = record.clone();
    name_generation(&mut next, facts(&store, generation));
    if let Some(others) = &mut next.others
        && others.adopted
    {
        others.buckets = of_others(&record, &found);
        restored.keys_of_others = others.buckets.iter().map(|bucket| bucket.count).sum();
    }
    restored.seconds = begun.elapsed().as_secs_f64();
    let change = Change { by: restoring.by.to_owned(), what: restored.in_words() };
    commit_change(owner, next, change, restoring.release).await?;
    Ok(restored)
}

/// Does long work on a thread that may block, and renews the lease meanwhile. Where that ends badly the work is stopped by
/// its flag, and waited for: it must not go on beside another owner, or another life.
async fn beside<T: Send + 'static>(
    owner: &mut Owner<'_>,
    stop: &AtomicBool,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Stop> {
    let mut working = tokio::task::spawn_blocking(work);
    let done = match renewing(owner, &mut working).await {
        Ok(done) => done,
        Err(failed) => {
            stop.store(true, Ordering::Relaxed);
            let _stopped = working.await;
            return Err(failed);
        }
    };
    Ok(done.unwrap_or_else(|failed| std::panic::resume_unwind(failed.into_panic())))
}

/// Waits for long work that does not commit, renews the lease meanwhile, and hears a signal.
pub(super) async fn renewing<T>(owner: &mut Owner<'_>, work: impl Future<Output = T>) -> Result<T, Stop> {
    let (mut work, mut renewed) = (std::pin::pin!(work), Instant::now());
    loop {
        if let Ok(done) = tokio::time::timeout(LOOK_EVERY, &mut work).await {
            return Ok(done);
        }
        if owner.world.options.interrupted() {
            return Err(stops::interrupted());
        }
        if renewed.elapsed() > owner.lease() / 3 {
            owner.renew().await?;
            renewed = Instant::now();
        }
    }
}

/// Commits a record that differs from the last one without a microbatch, for a stated reason.
pub(super) async fn commit_change(
    owner: &mut Owner<'_>,
    next: LedgerRecord,
    change: Change,
    release: bool,
) -> Result<(), Stop> {
    let before = owner.record.batch_generation().unwrap_or_default().to_owned();
    let next = LedgerRecord {
        kind: Kind::Change,
        released: release,
        batch_generation: Some(before).filter(|name| next.dedup.generation.as_ref() != Some(name)),
        jumps: Vec::new(),
        change: Some(change),
        ..next
    };
    crate::crash_point!("change_to_commit");
    owner.commit(next, Vec::new()).await?;
    crate::crash_point!("change_committed");
    Ok(())
}

/// What each live bucket must hold: as the ledger counts it, else, where only its packed form was left, as the manifest of
/// the very generation that it names. Empty if neither is there.
fn wanted(record: &LedgerRecord, folder: &Path) -> Vec<BucketTally> {
    let counted = tallies(&record.buckets);
    if !counted.is_empty() {
        return counted;
    }
    let facts = generation(&record.dedup).map(|named| dedup::generation_facts(folder, &named));
    facts.and_then(Result::ok).map_or_else(Vec::new, |facts| facts.buckets)
}

/// A builder with what could be saved, and which buckets that is.
fn begin(
    record: &LedgerRecord,
    wanted: &[BucketTally],
    folder: &Path,
    memory: &MemoryPlan,
    salvage: bool,
) -> Result<(Builder, Vec<Bucket>), StoreError> {
    let dedup = &record.dedup;
    let since = dedup.complete_since.unwrap_or(EventTimeMs(i64::MIN));
    let eras: Vec<Era> =
        dedup.eras.iter().map(|era| Era { until: era.until, bucket_width_ms: era.bucket_width_ms }).collect();
    let spec = store_spec(record);
    let empty = || {
        Builder::create(folder, spec.clone(), memory.rebuild_bytes(), dedup.floor)?.of_history(&eras, since)
    };
    let mut builder = empty()?;
    if !salvage || dedup.floor.is_none() {
        return Ok((builder, Vec::new()));
    }
    match dedup::salvage(folder, &spec, wanted, &mut builder) {
        Ok(saved) => Ok((builder, saved)),
        Err(error) if error.is_rebuildable() => {
            tracing::warn!(%error, "the state folder gives other bytes on a second read; all is read from the table");
            Ok((empty()?, Vec::new()))
        }
        Err(error) => Err(error),
    }
}

/// Reads the keys of some buckets into a loan; says too what it read.
pub(super) async fn load(
    owner: &mut Owner<'_>,
    keys: &KeyMaker,
    memory: &MemoryPlan,
    store: &Store,
    slices: &[Bucket],
    report: &mut dyn Report,
) -> Result<(Loan, KeysRead), Stop> {
    let folder = state_folder(&owner.world.loaded.job);
    let of_state = |error| stops::state(&folder, error);
    let mut loader = store.begin_loan(slices, memory.loan_bytes()).map_err(of_state)?;
    let mut read = KeysRead::default();
    if !slices.is_empty() {
        for which in [Some(ours(&owner.record)), adopted(&owner.record)].into_iter().flatten() {
            let more =
                read_keys(owner, keys, memory, which, Some(slices), report, &mut |keys| loader.add(keys))
                    .await?;
            (read.rows, read.bytes) = (read.rows + more.rows, read.bytes + more.bytes);
        }
        let record = owner.record.clone();
        read_suppressed(owner, &record, Some(slices), &mut |keys| loader.add(keys)).await?;
    }
    crate::crash_point!("loan_keys_read");
    Ok((loader.finish().map_err(of_state)?, read))
}

/// From when to when a window that was widened lacks keys, if it was.
pub(super) fn widened(record: &LedgerRecord, job: &Job) -> Option<(EventTimeMs, EventTimeMs)> {
    let window_ms = i64::try_from(job.dedup.window.as_millis()).unwrap_or(i64::MAX);
    let cutoff = record.live().watermark?.minus_ms(window_ms);
    // Buckets expire only when the cutoff has passed them, so this means another window.
    record.dedup.complete_since.filter(|since| cutoff < *since).map(|since| (cutoff, since))
}

/// Loads what a window that was widened lacks, so that it becomes live with the next commit.
pub(super) async fn widen(
    owner: &mut Owner<'_>,
    keys: &KeyMaker,
    memory: &MemoryPlan,
    store: &mut Store,
    report: &mut dyn Report,
) -> Result<(), Stop> {
    let Some((cutoff, before)) = widened(&owner.record, &owner.world.loaded.job) else { return Ok(()) };
    let since = store.bucket_begin(cutoff);
    let begun = Instant::now();
    report.event(&Event::Notice {
        text: format!(
            "the window was widened: reading the keys from {} to {before} from table {}",
            begin_in_words(since),
            owner.world.terms.main
        ),
    });
    let slices = store.missing_since(since);
    let (loan, read) = load(owner, keys, memory, store, &slices, report).await?;
    report.event(&Event::Notice {
        text: format!(
            "the window reaches back to {}: {} keys from {} rows in {:.1} s",
            begin_in_words(since),
            loan.keys(),
            read.rows,
            begun.elapsed().as_secs_f64()
        ),
    });
    store.adopt(loan, since);
    crate::crash_point!("window_widened");
    Ok(())
}

/// A begin of a bucket; the open first one has none.
pub(super) fn begin_in_words(time: EventTimeMs) -> String {
    if time.0 == i64::MIN { "the beginning".to_owned() } else { time.to_string() }
}

/// What a rebuild found.
struct Found<'a> {
    /// Keys from files and from rows of ours, by bucket.
    ours: &'a [BucketTally],
    /// Those of others too.
    all: &'a [BucketTally],
    /// Buckets that were taken from files, ascending: they hold what the ledger counts, whoever wrote it.
    saved: &'a [Bucket],
}

/// Keys of the bucket that begins there, of ascending ones; none if there is no such bucket.
pub(super) fn tally_at(buckets: &[BucketTally], from: EventTimeMs) -> Tally {
    let place = buckets.binary_search_by_key(&from, |bucket| bucket.from);
    place.map_or(Tally::default(), |index| buckets[index].tally())
}

/// Keys of others by bucket, as found now; of buckets that were saved as the ledger counts them.
fn of_others(record: &LedgerRecord, found: &Found<'_>) -> Vec<BucketRecord> {
    let known: BTreeMap<i64, &BucketRecord> =
        record.others.iter().flat_map(|others| &others.buckets).map(|bucket| (bucket.from, bucket)).collect();
    let of_bucket = |bucket: &BucketTally| {
        if found.saved.binary_search(&bucket.bucket()).is_ok() {
            return known.get(&bucket.from.0).map(|bucket| (*bucket).clone());
        }
        let theirs = bucket.tally().less(tally_at(found.ours, bucket.from)).filter(|tally| tally.keys > 0)?;
        Some(bucket_record(&BucketTally { keys: theirs.keys, digest: theirs.digest, ..*bucket }))
    };
    found.all.iter().filter_map(of_bucket).collect()
}

/// The ledger counts keys by bucket, or, where only its packed form was left, in all. Fewer in the table than that means
/// that rows were deleted by others; more are rows of others, which are no harm. Gives the number of missing keys that the
/// job accepts.
///
/// A bucket is right if the keys of our rows are what the ledger counts without those of others, or if all keys together
/// are what it counts: rows that were adopted when the window was widened are not counted apart.
fn compare_with_ledger(owner: &Owner<'_>, record: &LedgerRecord, found: &Found<'_>) -> Result<u64, Stop> {
    let (mut missing, mut missing_keys) = (Vec::new(), 0);
    let mut compare = |what: String, known: Tally, candidates: [Tally; 2]| {
        let most = if candidates[0].keys >= candidates[1].keys { candidates[0] } else { candidates[1] };
        if candidates.contains(&known) {
            return;
        }
        if most.keys < known.keys {
            missing_keys += known.keys - most.keys;
            missing.push(format!("{} of {} keys {what}", known.keys - most.keys, known.keys));
        } else if most.keys == known.keys {
            missing_keys += 1;
            missing.push(format!("other keys than the ledger's {what}"));
        } else {
            tracing::warn!(found = most.keys, ledger = known.keys, "the table holds rows of others {what}");
        }
    };
    if record.buckets.is_empty() {
        let digest = Digest::try_from(record.dedup.digest.clone()).unwrap_or_default();
        let known = Tally { keys: record.dedup.keys, digest };
        if known.keys > 0 {
            compare("in all".to_owned(), known, [total(found.ours), total(found.all)]);
        }
    }
    let theirs = record.others.as_ref().map_or_else(Vec::new, |others| tallies(&others.buckets));
    for known in tallies(&record.buckets) {
        if found.saved.binary_search(&known.bucket()).is_ok() {
            continue;
        }
        let of_others = tally_at(&theirs, known.from);
        let ours = known.tally().less(of_others).unwrap_or_default();
        let found_all = tally_at(found.all, known.from);
        let found_ours = tally_at(found.ours, known.from);
        let what = format!("of the bucket from {}", begin_in_words(known.from));
        if found_ours == ours {
            continue;
        }
        compare(what, known.tally(), [found_all, sum(found_ours, of_others)]);
    }
    if missing.is_empty() {
        return Ok(0);
    }
    if owner.world.loaded.job.dedup.on_missing_keys == OnMissingKeys::Accept {
        return Ok(missing_keys);
    }
    Err(missing_keys_stop(&owner.world.terms.main.to_string(), &missing))
}

fn sum(mut one: Tally, other: Tally) -> Tally {
    one.add_all(other);
    one
}

fn missing_keys_stop(table: &str, missing: &[String]) -> Stop {
    let shown = missing.iter().take(MISSING_SHOWN_MAX).cloned().collect::<Vec<_>>().join(", ");
    let more = match missing.len().saturating_sub(MISSING_SHOWN_MAX) {
        0 => String::new(),
        more => format!(", and {more} buckets more"),
    };
    Stop::new(
        Reason::MissingKeys,
        format!("the dedup state was lost, and table {table} lacks rows that it had: {shown}{more}"),
        "no event was written; others deleted rows, and if their events are sent again they are written again. Put the rows \
         or the state folder back, or, if the rows are gone for good, go on without their keys, which the ledger then \
         says:\n  tidemill run JOB --set dedup.on_missing_keys=accept\n\
         (to delete rows whose events are to stay out, name their keys first: tidemill state forget --help)",
    )
}

/// Keys of all buckets together.
pub(super) fn total(buckets: &[BucketTally]) -> Tally {
    let mut total = Tally::default();
    buckets.iter().for_each(|bucket| total.add_all(bucket.tally()));
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(from: i64, to: i64) -> Bucket {
        Bucket { from: EventTimeMs(from), to: EventTimeMs(to) }
    }

    #[test]
    fn what_is_not_saved_is_read_from_the_table_and_nothing_else() {
        let ever = EventTimeMs(i64::MIN);
        assert_eq!(gaps(ever, &[]), [bucket(i64::MIN, i64::MAX)]);
        let saved = [bucket(i64::MIN, 10), bucket(20, 30), bucket(30, 40)];
        assert_eq!(gaps(ever, &saved), [bucket(10, 20), bucket(40, i64::MAX)]);
        assert_eq!(gaps(EventTimeMs(10), &saved[1..]), [bucket(10, 20), bucket(40, i64::MAX)]);
        assert_eq!(dedup::slice_at(&[bucket(10, 20), bucket(40, 50)], EventTimeMs(25)), None);
        assert_eq!(dedup::slice_at(&[bucket(10, 20), bucket(40, 50)], EventTimeMs(40)), Some(bucket(40, 50)));
    }
}
