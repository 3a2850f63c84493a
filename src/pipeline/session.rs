//! An owner with its reader, decoder and dedup state: ready to take microbatches.

use std::time::Instant;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::TimestampMicrosecondType;
use futures::TryStreamExt;

use super::owner::{Owner, Prepared, prepare, side_record};
use super::report::{Event, Report, Summary};
use super::start::Allow;
use super::survey::{self, state_folder};
use super::{RunOptions, stops};
use crate::commit::ledger::{self, LedgerRecord};
use crate::counts::Counts;
use crate::decode::Decoder;
use crate::dedup::{
    self, BucketTally, Builder, GenerationName, GenerationRef, Key, Store, StoreError, StoreSpec, Tally,
};
use crate::event_time::EventTimeMs;
use crate::fingerprint::KeyEncoder;
use crate::job::ColumnSource;
use crate::job::file::LoadedJob;
use crate::lateness::Lateness;
use crate::memory::MemoryPlan;
use crate::offset::{NextOffset, TopicPartition};
use crate::sink::scan::{self, ScanError};
use crate::source::{Connection, Reader, ReaderOptions, STALL_AFTER_DEFAULT};
use crate::stop::{Reason, Stop};

/// Generations that the sweep keeps, the current one included, so that a table rolled back a little is at home at once.
const GENERATIONS_KEPT: usize = 3;

/// See the module.
pub(super) struct Session<'a> {
    pub(super) owner: Owner<'a>,
    pub(super) options: &'a RunOptions,
    pub(super) memory: MemoryPlan,
    /// Topic partitions by slot.
    pub(super) slots: Vec<TopicPartition>,
    connection: Connection,
    /// First offsets of this run, by slot.
    pub(super) starts: Vec<NextOffset>,
    pub(super) reader: Reader,
    pub(super) decoder: Decoder,
    pub(super) encoder: KeyEncoder,
    pub(super) lateness: Lateness,
    pub(super) store: Store,
    swept: bool,
}

/// How an opening ends well.
pub(super) enum Opened<'a> {
    /// Nothing to read and nothing to resolve: nothing was committed.
    NothingToRead(Box<Summary>),
    /// Ready for batches.
    Session(Box<Session<'a>>),
}

impl<'a> Session<'a> {
    /// From the lock to the state: ready to read, or nothing to do.
    pub(super) async fn open(
        loaded: &'a LoadedJob,
        options: &'a RunOptions,
        report: &mut dyn Report,
    ) -> Result<Opened<'a>, Stop> {
        let allow = Allow { ignore_rows: options.ignore_rows, ..Allow::default() };
        let prepared = prepare(loaded, options, allow).await?;
        let starts = prepared.survey.starts(&loaded.job, prepared.record.as_ref())?;
        if prepared.nothing_to_do(&starts) {
            return Ok(Opened::NothingToRead(Box::new(resting_summary(&prepared))));
        }
        let plans = prepared.read_plans(&starts);
        let lag = plans.iter().map(|plan| (plan.end.get() - plan.start.get()).max(0).unsigned_abs()).sum();
        let slots: Vec<TopicPartition> = plans.iter().map(|plan| plan.topic_partition.clone()).collect();
        let first_offsets = plans.iter().map(|plan| plan.start).collect();
        let columns = &loaded.job.decode.columns;
        let headers = columns.iter().any(|column| matches!(column.from, ColumnSource::Header(_)));
        let reading = ReaderOptions { headers, ..ReaderOptions::default() };
        let mut reader =
            Reader::assign(&prepared.survey.connection, plans, reading).map_err(stops::source)?;
        reader.verify_tails(STALL_AFTER_DEFAULT).map_err(stops::source)?;
        options.phases.reach("verified");
        let memory = prepared.memory;
        let (mut owner, connection, decoder) = Owner::take(prepared, &starts).await?;
        report.event(&Event::Start {
            job: loaded.job.name.clone(),
            epoch: owner.record.epoch,
            lag,
            topic_partitions: slots.len(),
            memory: memory.to_string(),
        });
        let encoder = survey::key_encoder(&decoder.schema(), &loaded.job, owner.record.dedup.seed)?;
        let store = match open_state(&mut owner, &encoder, &memory, report).await {
            Ok(store) => store,
            Err(stop) => {
                owner.release_after(&stop).await;
                return Err(stop);
            }
        };
        let record = &owner.record;
        let max_event_times = slots
            .iter()
            .map(|name| record.cursor(&name.topic, name.partition).and_then(|cursor| cursor.max_event_time))
            .collect();
        let lateness = Lateness::new(&loaded.job.event_time, max_event_times);
        Ok(Opened::Session(Box::new(Self {
            owner,
            options,
            memory,
            slots,
            connection,
            starts: first_offsets,
            reader,
            decoder,
            encoder,
            lateness,
            store,
            swept: false,
        })))
    }

    /// Offsets left to the frozen ends.
    pub(super) fn lag(&self) -> u64 {
        self.reader.lag_left()
    }

    /// Whether every topic partition was read to its frozen end.
    pub(super) fn exhausted(&self) -> bool {
        self.lag() == 0
    }

    /// Group offsets for lag tools; nothing reads them back (R4).
    pub(super) fn tell_lag_tools(&self) {
        let positions = self.slots.iter().cloned().zip(self.reader.positions()).collect();
        self.connection.commit_group_offsets(&positions);
    }

    /// Whether the ledger still trails the frozen ends.
    pub(super) fn has_more(&self) -> bool {
        !self.exhausted() || self.trails()
    }

    /// Whether positions moved past the ledger, by control records or gaps alone.
    fn trails(&self) -> bool {
        let positions = self.reader.positions();
        self.slots.iter().enumerate().any(|(slot, name)| {
            let cursor = self.owner.record.cursor(&name.topic, name.partition);
            cursor.is_none_or(|cursor| cursor.end != positions[slot])
        })
    }

    /// After the owner's own first microbatch: delete state files that nothing names (design, state generations).
    pub(super) fn sweep_once(&mut self) {
        if self.swept {
            return;
        }
        self.swept = true;
        let folder = state_folder(&self.owner.loaded.job);
        let recent = ledger::recent_generations(self.owner.main.metadata(), GENERATIONS_KEPT);
        let keep = recent.into_iter().filter_map(|(name, checksum)| reference(&name, checksum));
        let swept = dedup::list_generations(&folder, Some(self.owner.record.job_id)).and_then(|present| {
            // An older generation may have been lost with its folder; what is not there needs no keeping.
            let is_present = |kept: &GenerationRef| present.iter().any(|found| found.reference == *kept);
            let keep: Vec<GenerationRef> = keep.filter(is_present).collect();
            dedup::sweep(&folder, &keep, self.owner.record.epoch)
        });
        if let Err(error) = swept {
            tracing::warn!(%error, "state files that nothing names could not be deleted; the next run tries again");
        }
    }

    /// Totals of this run.
    pub(super) fn summary(&self, counts: Counts, batches: u64) -> Summary {
        let stats = self.store.stats();
        Summary {
            counts,
            batches,
            batch: self.owner.record.batch,
            table: self.owner.main_ident.to_string(),
            metadata_location: self.owner.main.metadata_location().map(str::to_owned),
            dead_letter_table: self.owner.dead_ident.to_string(),
            dead_letter_metadata_location: self.owner.dead.metadata_location().map(str::to_owned),
            state_keys: stats.keys,
            state_bytes: stats.segment_bytes,
            seconds: 0.0,
        }
    }

    /// What the next record says of the dead-letter table.
    pub(super) fn dead_letter_record(&self, files: Option<Vec<serde_json::Value>>) -> ledger::SideRecord {
        side_record(&self.owner.dead, files)
    }
}

/// The summary of a run that found nothing to do.
fn resting_summary(prepared: &Prepared<'_>) -> Summary {
    let survey = &prepared.survey;
    Summary {
        batch: prepared.record.as_ref().map_or(0, |record| record.batch),
        table: survey.main_ident.to_string(),
        metadata_location: survey
            .main
            .as_ref()
            .and_then(|table| table.metadata_location())
            .map(str::to_owned),
        dead_letter_table: survey.dead_ident.to_string(),
        dead_letter_metadata_location: survey
            .dead
            .as_ref()
            .and_then(|table| table.metadata_location())
            .map(str::to_owned),
        ..Summary::default()
    }
}

/// What the state of a record's job is.
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

/// The generation that a record names.
pub(super) fn generation(record: &LedgerRecord) -> Option<GenerationRef> {
    reference(record.dedup.generation.as_deref()?, record.dedup.checksum.clone()?)
}

fn reference(name: &str, checksum: String) -> Option<GenerationRef> {
    Some(GenerationRef { name: name.parse().ok()?, checksum })
}

/// Opens the generation that the ledger names, or rebuilds it from the table if it is gone or damaged.
async fn open_state(
    owner: &mut Owner<'_>,
    encoder: &KeyEncoder,
    memory: &MemoryPlan,
    report: &mut dyn Report,
) -> Result<Store, Stop> {
    let folder = state_folder(&owner.loaded.job);
    let spec = store_spec(&owner.record);
    let named = generation(&owner.record);
    let opened = Store::open(&folder, spec.clone(), named.as_ref(), memory.dedup_lookup_bytes());
    let why = match opened {
        Ok(store) => return Ok(store),
        Err(error @ (StoreError::Missing { .. } | StoreError::Corrupt { .. })) => error.to_string(),
        Err(error) => return Err(stops::state(&folder, error)),
    };
    report.event(&Event::Notice {
        text: format!("the dedup state is not usable ({why}); rebuilding it from table {}", owner.main_ident),
    });
    let rebuilt = rebuild(owner, encoder, memory).await?;
    report.event(&Event::Notice { text: format!("rebuilt the dedup state: {} keys", rebuilt.keys) });
    Store::open(&folder, spec, Some(&rebuilt.generation), memory.dedup_lookup_bytes())
        .map_err(|error| stops::state(&folder, error))
}

struct Rebuilt {
    generation: GenerationRef,
    keys: u64,
}

/// Reads the keys of all rows of our batches and writes a generation of them; compares it with what the ledger counts.
async fn rebuild(owner: &mut Owner<'_>, encoder: &KeyEncoder, memory: &MemoryPlan) -> Result<Rebuilt, Stop> {
    let job = &owner.loaded.job;
    let folder = state_folder(job);
    let record = owner.record.clone();
    let table = owner.main_ident.to_string();
    let of_state = |error| stops::state(&folder, error);
    let of_scan = |error: ScanError| {
        stops::data(format!("keys of table {table} can not be read"), error.reason(), error)
    };
    let mut builder =
        Builder::create(&folder, store_spec(&record), memory.dedup_lookup_bytes(), record.dedup.floor)
            .map_err(of_state)?;
    let mut columns = job.dedup.key.clone();
    if !columns.contains(&job.event_time.column) {
        columns.push(job.event_time.column.clone());
    }
    let mut renewed = Instant::now();
    let mut scan = scan::scan_keys(&owner.main, None, &columns, Some(record.batch)).await.map_err(of_scan)?;
    while let Some(batch) = scan.try_next().await.map_err(of_scan)? {
        let fingerprints = encoder.encode(&batch).map_err(|error| {
            stops::data(format!("table {table} has a row without key"), Reason::MissingKeys, error)
        })?;
        let times = event_times(&batch, &job.event_time.column)?;
        let keys: Vec<Key> = fingerprints
            .into_iter()
            .zip(times)
            .map(|(fingerprint, event_time)| Key { fingerprint, event_time })
            .collect();
        builder.add(&keys).map_err(of_state)?;
        if owner.options.interrupted() {
            return Err(stops::interrupted());
        }
        if renewed.elapsed() > owner.lease() / 3 {
            owner.renew().await?;
            renewed = Instant::now();
        }
    }
    let attempt = uuid::Uuid::now_v7();
    let (generation, rebuilt) =
        builder.finish(GenerationName::new(record.epoch, record.batch, attempt)).map_err(of_state)?;
    compare_with_ledger(&record, &table, &rebuilt.buckets)?;
    Ok(Rebuilt { generation, keys: rebuilt.keys })
}

/// Event times of rows as the tables store them.
fn event_times(rows: &RecordBatch, column: &str) -> Result<Vec<EventTimeMs>, Stop> {
    let times =
        rows.column_by_name(column).and_then(|values| values.as_primitive_opt::<TimestampMicrosecondType>());
    let times = times.filter(|times| times.null_count() == 0).ok_or_else(|| {
        Stop::new(
            Reason::MissingKeys,
            format!("a row of ours has no event time in column {column}"),
            "no event was written; rows were changed by others: put the event times back, or bring back the state folder, \
             then:\n  tidemill run JOB",
        )
    })?;
    Ok(times.values().iter().map(|&micros| EventTimeMs::from_micros(micros)).collect())
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
