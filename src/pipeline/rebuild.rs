//! Keys from the table into the dedup state: all that is live when the state is lost, the buckets that a widened window
//! lacks, and a bucket that has expired when an event of it comes.
//!
//! Flow: rows of our batches -> [`KeyMaker`] -> [`Builder`] (a new generation) or a [`Loan`]
//!
//! Bounds: what `sink/scan.rs` holds for its readers, and the memory of the builder; on disk about 10 bytes per key
//! while it is read. A loan reads its buckets whole: the number of rows in them decides how long it takes, and one scan
//! serves all buckets that a probe batch lacks.

use std::time::{Duration, Instant};

use futures::TryStreamExt;

use super::keys::KeyMaker;
use super::owner::Owner;
use super::report::{Event, Report};
use super::stops;
use super::survey::state_folder;
use crate::commit::ledger::LedgerRecord;
use crate::dedup::{
    Bucket, BucketTally, Builder, Era, GenerationName, GenerationRef, Key, Loan, Store, StoreError,
    StoreSpec, Tally,
};
use crate::event_time::EventTimeMs;
use crate::job::Job;
use crate::memory::MemoryPlan;
use crate::sink::scan::{self, ScanError, TimeRanges};
use crate::stop::{Reason, Stop};

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

/// A generation made again.
pub(super) struct Rebuilt {
    pub(super) generation: GenerationRef,
    pub(super) keys: u64,
    pub(super) rows: u64,
    pub(super) time: Duration,
}

/// Reads keys of rows of our batches, those of the slices or all, and hands them on; gives the number of rows. Renews the
/// lease on the way.
async fn read_keys(
    owner: &mut Owner<'_>,
    keys: &KeyMaker,
    memory: &MemoryPlan,
    slices: Option<&[Bucket]>,
    take: &mut dyn FnMut(&[Key]) -> Result<(), StoreError>,
) -> Result<u64, Stop> {
    let folder = state_folder(&owner.loaded.job);
    let table = owner.main_ident.to_string();
    let of_scan = |error: ScanError| {
        stops::data(format!("keys of table {table} can not be read"), error.reason(), error)
    };
    let times = slices.zip(keys.prunable_column()).map(|(slices, column)| TimeRanges {
        column: column.to_owned(),
        ranges: slices.iter().map(|slice| (slice.from, slice.to)).collect(),
    });
    let columns = keys.table_columns();
    let batch_max = owner.record.batch;
    let mut scan =
        scan::scan_keys_beside(&owner.main, &columns, batch_max, times.as_ref(), memory.scan_readers())
            .await
            .map_err(of_scan)?;
    let (mut rows, mut renewed) = (0, Instant::now());
    while let Some(batch) = scan.try_next().await.map_err(of_scan)? {
        rows += batch.num_rows() as u64;
        take(&keys.of_table_rows(&table, &batch)?).map_err(|error| stops::state(&folder, error))?;
        if owner.options.interrupted() {
            return Err(stops::interrupted());
        }
        if renewed.elapsed() > owner.lease() / 3 {
            owner.renew().await?;
            renewed = Instant::now();
        }
    }
    Ok(rows)
}

/// Writes a generation with the live buckets of the last record; compares it with what the ledger counts.
pub(super) async fn rebuild(
    owner: &mut Owner<'_>,
    keys: &KeyMaker,
    memory: &MemoryPlan,
) -> Result<Rebuilt, Stop> {
    let begun = Instant::now();
    let folder = state_folder(&owner.loaded.job);
    let record = owner.record.clone();
    let of_state = |error| stops::state(&folder, error);
    let dedup = &record.dedup;
    let since = dedup.complete_since.unwrap_or(EventTimeMs(i64::MIN));
    let eras = dedup.eras.iter().map(|era| Era { until: era.until, bucket_width_ms: era.bucket_width_ms });
    let mut builder = Builder::create(&folder, store_spec(&record), memory.dedup_lookup_bytes(), dedup.floor)
        .and_then(|builder| builder.of_history(&eras.collect::<Vec<_>>(), since))
        .map_err(of_state)?;
    let live = [Bucket { from: since, to: EventTimeMs(i64::MAX) }];
    let slices = dedup.complete_since.is_some().then_some(live.as_slice());
    let rows = read_keys(owner, keys, memory, slices, &mut |keys| builder.add(keys)).await?;
    // What is left to merge takes a while too, and nobody renews meanwhile.
    owner.renew().await?;
    let name = GenerationName::new(record.epoch, record.batch, uuid::Uuid::now_v7());
    let (generation, rebuilt) = builder.finish(name).map_err(of_state)?;
    compare_with_ledger(&record, &owner.main_ident.to_string(), &rebuilt.buckets)?;
    Ok(Rebuilt { generation, keys: rebuilt.keys, rows, time: begun.elapsed() })
}

/// Reads the keys of some buckets into a loan; gives the number of rows too.
pub(super) async fn load(
    owner: &mut Owner<'_>,
    keys: &KeyMaker,
    memory: &MemoryPlan,
    store: &Store,
    slices: &[Bucket],
) -> Result<(Loan, u64), Stop> {
    let folder = state_folder(&owner.loaded.job);
    let of_state = |error| stops::state(&folder, error);
    let mut loader = store.begin_loan(slices, memory.loan_bytes()).map_err(of_state)?;
    let rows = match slices {
        [] => 0,
        _ => read_keys(owner, keys, memory, Some(slices), &mut |keys| loader.add(keys)).await?,
    };
    Ok((loader.finish().map_err(of_state)?, rows))
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
    let Some((cutoff, before)) = widened(&owner.record, &owner.loaded.job) else { return Ok(()) };
    let since = store.bucket_begin(cutoff);
    let begun = Instant::now();
    report.event(&Event::Notice {
        text: format!(
            "the window was widened: reading the keys from {} to {before} from table {}",
            begin_in_words(since),
            owner.main_ident
        ),
    });
    let slices = store.missing_since(since);
    let (loan, rows) = load(owner, keys, memory, store, &slices).await?;
    report.event(&Event::Notice {
        text: format!(
            "the window reaches back to {}: {} keys from {rows} rows in {:.1} s",
            begin_in_words(since),
            loan.keys(),
            begun.elapsed().as_secs_f64()
        ),
    });
    store.adopt(loan, since);
    Ok(())
}

/// A begin of a bucket; the open first one has none.
pub(super) fn begin_in_words(time: EventTimeMs) -> String {
    if time.0 == i64::MIN { "the beginning".to_owned() } else { time.to_string() }
}

/// The ledger counts keys by bucket, or, where only its packed form was left, in all. Fewer in the table than that means
/// that rows were deleted by others; more are rows of others, which are no harm.
fn compare_with_ledger(record: &LedgerRecord, table: &str, rebuilt: &[BucketTally]) -> Result<(), Stop> {
    let mut missing = Vec::new();
    let mut compare = |what: String, (known, digest): (u64, &str), found: (u64, String)| {
        if found.0 < known {
            missing.push(format!("{} of {known} keys {what}", known - found.0));
        } else if found.0 == known && found.1 != digest {
            missing.push(format!("other keys than the ledger's {what}"));
        } else if found.0 > known {
            tracing::warn!(found = found.0, ledger = known, "the table holds rows of others {what}");
        }
    };
    if record.buckets.is_empty() {
        let all = total(rebuilt);
        compare(
            "in all".to_owned(),
            (record.dedup.keys, &record.dedup.digest),
            (all.keys, all.digest.to_string()),
        );
    }
    for known in &record.buckets {
        let found = rebuilt.iter().find(|bucket| bucket.from.0 == known.from);
        let found = found.map_or((0, String::new()), |bucket| (bucket.keys, bucket.digest.to_string()));
        compare(
            format!("of the bucket from {}", EventTimeMs(known.from)),
            (known.count, &known.digest),
            found,
        );
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(Stop::new(
        Reason::MissingKeys,
        format!("the dedup state was lost, and table {table} lacks rows that it had: {}", missing.join(", ")),
        "no event was written; rows were deleted by others, and their events would be written again; put the rows back, or \
         bring back the state folder, then:\n  tidemill run JOB\naccepting the loss (on_missing_keys = \"accept\") is not \
         built yet",
    ))
}

/// Keys of all buckets together.
pub(super) fn total(buckets: &[BucketTally]) -> Tally {
    let mut total = Tally::default();
    buckets.iter().for_each(|bucket| total.add_all(bucket.tally()));
    total
}
