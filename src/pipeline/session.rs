//! An owner with its reader, decoder and dedup state: ready to take microbatches.

use super::keys::KeyMaker;
use super::owner::{Owner, Prepared, prepare, side_record};
use super::rebuild::{rebuild, store_spec, widen};
use super::report::{Event, Report, Summary};
use super::start::Allow;
use super::survey::state_folder;
use super::{RunOptions, stops};
use crate::commit::ledger::{self, LedgerRecord};
use crate::counts::Counts;
use crate::decode::Decoder;
use crate::dedup::{self, GenerationRef, Store, StoreError, StoreSpec};
use crate::job::ColumnSource;
use crate::job::file::LoadedJob;
use crate::lateness::Lateness;
use crate::memory::MemoryPlan;
use crate::offset::{NextOffset, TopicPartition};
use crate::source::{Connection, Reader, ReaderOptions, STALL_AFTER_DEFAULT};
use crate::stop::Stop;

/// Generations that the sweep keeps, the current one included, so that a table rolled back a little is at home at once.
const GENERATIONS_KEPT: usize = 3;
/// Files that wait for a sweep before one is worth reading the folder: the inputs of one merge, or as many manifests. A
/// merge's inputs are then deleted with the first commit at which no kept generation names them.
const RETIRED_FILES_MIN: u64 = 8;

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
    pub(super) keys: KeyMaker,
    pub(super) lateness: Lateness,
    pub(super) store: Store,
    /// Buckets read from the table by this run because an event beyond the window fell into them.
    pub(super) buckets_lent: u64,
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
        let keys = KeyMaker::new(&decoder.schema(), &loaded.job, owner.record.dedup.seed)?;
        let store = match open_state(&mut owner, &keys, &memory, report).await {
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
            keys,
            lateness,
            store,
            buckets_lent: 0,
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

    /// After each microbatch of the owner: delete state files that nothing names (design, state generations), of its own
    /// epoch too. Costs nothing while few are to go.
    pub(super) fn sweep_retired(&mut self) {
        if self.swept && self.store.retired_files() < RETIRED_FILES_MIN {
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
            self.store.sweep(&keep, self.owner.record.epoch.saturating_add(1))
        });
        if let Err(error) = swept {
            tracing::warn!(%error, "state files that nothing names could not be deleted; a later batch tries again");
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
            watermark: self.owner.record.live().watermark.map(|time| time.to_string()),
            complete_since: complete_since(&self.owner.record),
            buckets_lent: self.buckets_lent,
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
        watermark: prepared
            .record
            .as_ref()
            .and_then(|record| record.live().watermark)
            .map(|time| time.to_string()),
        complete_since: prepared.record.as_ref().and_then(complete_since),
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

/// From when on the state answers for the table; none = since ever.
pub(super) fn complete_since(record: &LedgerRecord) -> Option<String> {
    record.dedup.complete_since.map(|time| time.to_string())
}

/// The generation that a record names.
pub(super) fn generation(record: &LedgerRecord) -> Option<GenerationRef> {
    reference(record.dedup.generation.as_deref()?, record.dedup.checksum.clone()?)
}

fn reference(name: &str, checksum: String) -> Option<GenerationRef> {
    Some(GenerationRef { name: name.parse().ok()?, checksum })
}

/// Opens the generation that the ledger names, or rebuilds it from the table if it is gone or damaged; then loads what a
/// widened window lacks.
async fn open_state(
    owner: &mut Owner<'_>,
    keys: &KeyMaker,
    memory: &MemoryPlan,
    report: &mut dyn Report,
) -> Result<Store, Stop> {
    let job = &owner.loaded.job;
    let folder = state_folder(job);
    // The width of the job's window rules for buckets to come, whatever the ledger's buckets have.
    let bucket_width_ms = dedup::bucket_width_ms(job.dedup.window, job.dedup.repeats);
    let spec = StoreSpec { bucket_width_ms, ..store_spec(&owner.record) };
    let named = generation(&owner.record);
    let opened = Store::open(&folder, spec.clone(), named.as_ref(), memory.dedup_lookup_bytes());
    let mut store = match opened {
        Ok(store) => store,
        Err(error @ (StoreError::Missing { .. } | StoreError::Corrupt { .. })) => {
            report.event(&Event::Notice {
                text: format!(
                    "the dedup state is not usable ({error}); rebuilding it from table {}",
                    owner.main_ident
                ),
            });
            let rebuilt = rebuild(owner, keys, memory).await?;
            let text = format!(
                "rebuilt the dedup state: {} keys from {} rows in {:.1} s",
                rebuilt.keys,
                rebuilt.rows,
                rebuilt.time.as_secs_f64()
            );
            report.event(&Event::Notice { text });
            Store::open(&folder, spec, Some(&rebuilt.generation), memory.dedup_lookup_bytes())
                .map_err(|error| stops::state(&folder, error))?
        }
        Err(error) => return Err(stops::state(&folder, error)),
    };
    widen(owner, keys, memory, &mut store, report).await?;
    Ok(store)
}
