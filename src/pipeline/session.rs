//! An owner with its reader, decoder and dedup state: ready to take microbatches.

use std::collections::BTreeMap;
use std::sync::Arc;

use iceberg::table::Table;

use super::ahead::ReadingAhead;
use super::backfill::lane_summary;
use super::copies::Copier;
use super::gather::Gathering;
use super::keys::KeyMaker;
use super::lanes::{LaneReader, Lanes, READERS_MAX};
use super::maintain::Which;
use super::owner::{Owner, Prepared, new_decoder, prepare};
use super::report::{Event, Report, Summary};
use super::start::Allow;
use super::state::{Folder, KeyState};
use super::watch::Watch;
use super::writing::WriterThread;
use super::{RunOptions, stops};
use crate::commit::ledger::{LIVE_LANE, LedgerRecord};
use crate::commit::side::Role;
use crate::counts::Counts;
use crate::decode::Decoder;
use crate::job::file::LoadedJob;
use crate::job::{ColumnSource, Job};
use crate::memory::MemoryPlan;
use crate::offset::TopicPartition;
use crate::protocol;
use crate::sink::dead_letters::Slot;
use crate::source::{Connection, OffsetRange, ReadPlan, ReaderOptions, STALL_AFTER_DEFAULT, Tail};
use crate::stop::Stop;

/// See the module.
pub(super) struct Session<'a> {
    pub(super) owner: Owner<'a>,
    pub(super) options: &'a RunOptions,
    pub(super) memory: MemoryPlan,
    pub(super) connection: Arc<Connection>,
    /// What is read, and for whom.
    pub(super) lanes: Lanes,
    pub(super) decoder: Decoder,
    pub(super) keys: KeyMaker,
    pub(super) state: KeyState,
    /// Buckets read from the table by this run because an event beyond the window fell into them.
    pub(super) buckets_lent: u64,
    /// Bytes of data files that were read for them.
    pub(super) bytes_lent: u64,
    /// Copies the state as it goes, if the job asks for it.
    pub(super) copier: Option<Copier>,
    /// Topic partitions by slot as stored letters name them, where letters are what is read.
    pub(super) letter_slots: Option<Vec<Slot>>,
    /// Sequence number of the ledger from which on maintenance of a table may be tried again.
    pub(super) maintain_from_sequence: BTreeMap<Which, u64>,
    /// What a continuous run looks at beside its records.
    pub(super) watch: Watch,
    /// What is read before it is asked for.
    pub(super) ahead: ReadingAhead,
    /// What data files of the main table are written by.
    pub(super) writing: WriterThread,
    /// How many keys are looked up together.
    pub(super) gathering: Gathering,
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
        let allow = Allow {
            ignore_rows: options.ignore_rows,
            trust_ledger: options.trust_ledger,
            replay: loaded.job.sink.replays(),
            ..Allow::default()
        };
        let prepared = prepare(loaded, options, allow).await?;
        let starts = prepared.survey.starts(&loaded.job, prepared.record.as_ref())?;
        if !options.continuous && options.backfill.is_none() && prepared.nothing_to_do(&starts) {
            return Ok(Opened::NothingToRead(Box::new(resting_summary(&prepared))));
        }
        let mut plans = prepared.read_plans(&starts);
        let lag = plans.iter().map(|plan| (plan.end.get() - plan.start.get()).max(0).unsigned_abs()).sum();
        if options.continuous {
            plans.iter_mut().for_each(|plan| plan.end = ReadPlan::no_end());
        }
        let backfills = prepared.record.iter().flat_map(LedgerRecord::active_backfills).count();
        let queue_parts = if options.backfill.is_some() || backfills > 0 { READERS_MAX } else { 1 };
        let reading = ReaderOptions { queue_parts, ..reader_options(&loaded.job, options) };
        let (connection, record) = (&prepared.survey.connection, prepared.record.as_ref());
        let live = LaneReader::open(connection, record, LIVE_LANE, plans, reading, &loaded.job.event_time)
            .map_err(stops::source)?;
        options.phases.reach("verified");
        let memory = prepared.memory;
        let ends = prepared.survey.offsets.iter().map(|(name, range)| (name.clone(), range.end)).collect();
        let (mut owner, connection, decoder) = prepared.take(&starts).await?;
        report.event(&Event::Start {
            job: loaded.job.name.clone(),
            epoch: owner.record.epoch,
            lag,
            topic_partitions: live.slots.len(),
            memory: memory.to_string(),
        });
        let (keys, state) = open_state(&mut owner, &decoder, &memory, report).await?;
        let watch = Watch::new(connection.look_interval(), ends);
        let (ahead, writing) = match loaded.job.threads.get() {
            1 => (ReadingAhead::never(), WriterThread::never()),
            _ => (
                ReadingAhead::with(new_decoder(&loaded.job)?, Arc::clone(&options.profile)),
                WriterThread::with(memory.rows_beside_bytes_max(), Arc::clone(&options.profile)),
            ),
        };
        let mut session = Box::new(Self {
            owner,
            options,
            memory,
            connection: Arc::new(connection),
            lanes: Lanes::new(live, options.continuous),
            decoder,
            keys,
            state,
            buckets_lent: 0,
            bytes_lent: 0,
            copier: None,
            letter_slots: None,
            maintain_from_sequence: BTreeMap::new(),
            watch,
            ahead,
            writing,
            gathering: Gathering::default(),
        });
        session.start_copier(report);
        Ok(Opened::Session(session))
    }

    /// Reads the topic partitions that the broker holds now, each from where the ledger stands, one that is new from its
    /// earliest offset. Between two microbatches.
    pub(super) fn follow_partitions(
        &mut self,
        offsets: &BTreeMap<TopicPartition, OffsetRange>,
    ) -> Result<(), Stop> {
        self.forget_ahead();
        let record = &self.owner.record;
        let plan = |(name, range): (&TopicPartition, &OffsetRange)| {
            let cursor = record.cursor(&name.topic, name.partition);
            let tail = cursor.and_then(|cursor| cursor.tail);
            ReadPlan {
                topic_partition: name.clone(),
                start: cursor.map_or(range.low, |cursor| cursor.end),
                end: ReadPlan::no_end(),
                low: range.low,
                tail: tail.map(|tail| Tail { offset: tail.offset, hash: tail.hash }),
            }
        };
        let plans: Vec<ReadPlan> = offsets.iter().map(plan).collect();
        let rule = &self.owner.world.loaded.job.event_time;
        let reassigned = self.lanes.live_mut().reassign(&self.connection, record, plans, rule);
        reassigned.map_err(stops::source)
    }

    /// An owner that reads no topic: its slots are filled when it is known what is read.
    pub(super) async fn at_rest(prepared: Prepared<'a>, report: &mut dyn Report) -> Result<Self, Stop> {
        let (loaded, options) = (prepared.outside.loaded, prepared.outside.options);
        let starts = prepared.survey.starts(&loaded.job, prepared.record.as_ref())?;
        let (reading, rule) = (ReaderOptions::default(), &loaded.job.event_time);
        let connection = &prepared.survey.connection;
        let none = LaneReader::open(connection, None, LIVE_LANE, Vec::new(), reading, rule);
        let (none, memory) = (none.map_err(stops::source)?, prepared.memory);
        let (mut owner, connection, decoder) = prepared.take(&starts).await?;
        let (keys, state) = open_state(&mut owner, &decoder, &memory, report).await?;
        Ok(Self {
            owner,
            options,
            memory,
            connection: Arc::new(connection),
            lanes: Lanes::new(none, false),
            decoder,
            keys,
            state,
            buckets_lent: 0,
            bytes_lent: 0,
            copier: None,
            letter_slots: None,
            maintain_from_sequence: BTreeMap::new(),
            watch: Watch::new(None, BTreeMap::new()),
            ahead: ReadingAhead::never(),
            writing: WriterThread::never(),
            gathering: Gathering::default(),
        })
    }

    /// Offsets that the served lane has left to its frozen ends; a continuous run's live lane to the ends as last looked
    /// at.
    pub(super) fn lag(&self) -> u64 {
        let served = self.lanes.served();
        if !self.options.continuous || !served.is_live() {
            return served.lag();
        }
        served.positions().iter().map(|(name, next)| self.watch.left(name, *next)).sum()
    }

    /// Whether the served lane was read to its frozen ends.
    pub(super) fn exhausted(&self) -> bool {
        let served = self.lanes.served();
        !(self.options.continuous && served.is_live()) && served.exhausted()
    }

    /// Group offsets of the live lane for lag tools; nothing reads them back (R4).
    pub(super) fn tell_lag_tools(&self) {
        let end = |name: &TopicPartition| {
            let cursor = self.owner.record.cursor(&name.topic, name.partition)?;
            Some((name.clone(), cursor.end))
        };
        let ends = self.lanes.live().slots.iter().filter_map(end).collect();
        self.connection.commit_group_offsets(&ends);
    }

    /// Whether some lane has a turn to come in this drain.
    pub(super) fn has_more(&self) -> bool {
        let record = &self.owner.record;
        self.lanes.standing(record, self.lanes.live().has_more(record)).choose().is_some()
    }

    /// Whether positions of the live lane moved past the ledger, by control records or gaps alone.
    pub(super) fn trails(&self) -> bool {
        self.lanes.live().trails(&self.owner.record)
    }

    /// Totals of this run.
    pub(super) fn summary(&self, counts: Counts, batches: u64) -> Summary {
        let stats = self.state.store.stats();
        Summary {
            counts,
            batches,
            batch: self.owner.record.batch,
            table: self.owner.world.terms.main.to_string(),
            metadata_location: self.owner.main.metadata_location().map(str::to_owned),
            dead_letter_table: self.owner.side(Role::DeadLetters).identifier().to_string(),
            dead_letter_metadata_location: location_of(self.owner.sides.get(&Role::DeadLetters)),
            late_table: self.owner.sides.get(&Role::Late).map(|table| table.identifier().to_string()),
            late_metadata_location: location_of(self.owner.sides.get(&Role::Late)),
            state_keys: stats.keys,
            state_bytes: stats.segment_bytes,
            watermark: self.owner.record.live().watermark.map(|time| time.to_string()),
            complete_since: complete_since(&self.owner.record),
            buckets_lent: self.buckets_lent,
            bytes_lent: self.bytes_lent,
            lanes: self.owner.record.backfills().map(|(name, lane, _)| lane_summary(name, lane)).collect(),
            seconds: 0.0,
        }
    }
}

/// What is needed to tell keys that were seen. Gives the table back if that fails.
async fn open_state(
    owner: &mut Owner<'_>,
    decoder: &Decoder,
    memory: &MemoryPlan,
    report: &mut dyn Report,
) -> Result<(KeyMaker, KeyState), Stop> {
    let job = &owner.world.loaded.job;
    let keys = match KeyMaker::new(&decoder.schema(), job, owner.record.dedup.seed) {
        Ok(keys) => keys,
        Err(stop) => {
            owner.release_after(&stop).await;
            return Err(stop);
        }
    };
    let mut folder = Folder::new(job, &keys, memory, report);
    let state = protocol::open_state(owner, &mut folder).await?;
    Ok((keys, state))
}

/// How a job's records are read.
pub(super) fn reader_options(job: &Job, options: &RunOptions) -> ReaderOptions {
    let headers = job.decode.columns.iter().any(|column| matches!(column.from, ColumnSource::Header(_)));
    let stall_after = options.stall_after.unwrap_or(STALL_AFTER_DEFAULT);
    ReaderOptions { headers, stall_after, ..ReaderOptions::default() }
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
        dead_letter_table: survey.side_idents[&Role::DeadLetters].to_string(),
        dead_letter_metadata_location: location_of(survey.sides.get(&Role::DeadLetters)),
        late_table: survey.side_idents.get(&Role::Late).map(ToString::to_string),
        late_metadata_location: location_of(survey.sides.get(&Role::Late)),
        ..Summary::default()
    }
}

fn location_of(table: Option<&Table>) -> Option<String> {
    table?.metadata_location().map(str::to_owned)
}

/// From when on the state answers for the table; none = since ever.
pub(super) fn complete_since(record: &LedgerRecord) -> Option<String> {
    record.dedup.complete_since.map(|time| time.to_string())
}
