//! The owner of a table: from the lock over the start table to the fence, and every commit after it.
//!
//! Flow: [`prepare`] (reads only) -> [`Owner::take`] (lock line, fence) -> [`Owner::forward_sides`] -> commits -> release
//!
//! Order of durable steps: the lock file names the owner, synced, before the fence is sent; a crash between the two
//! leaves a ledger that names the owner before, whom the lock file knows too.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use iceberg::spec::{DataFile, TableMetadata};
use iceberg::table::Table;
use iceberg::{Catalog, TableIdent};
use uuid::Uuid;

use super::start::{self, Allow, Facts, LeaseVerdict, Start};
use super::stops::{self, Committing};
use super::survey::{self, DEAD_LETTERS, Survey};
use super::{RunOptions, plan_memory};
use crate::catalog;
use crate::commit::ledger::{
    self, Cursor, DedupRecord, FORMAT_VERSION, Found, Jump, Kind, LIVE_LANE, Lane, LedgerRecord, SideRecord,
};
use crate::commit::lock::StateLock;
use crate::commit::side::{self, SideMark};
use crate::commit::switch::{self, Switch, switch};
use crate::counts::Counts;
use crate::decode::Decoder;
use crate::dedup;
use crate::job::Job;
use crate::job::file::LoadedJob;
use crate::memory::MemoryPlan;
use crate::offset::{NextOffset, TopicId, TopicPartition};
use crate::sink::{scan, schema, writer};
use crate::source::{Connection, ReadPlan, Reader, ReaderOptions, STALL_AFTER_DEFAULT, SourceError, Tail};
use crate::stop::{Reason, Stop};

/// A lease outlives this many of the longest microbatches: each commit renews it.
const LEASE_MICROBATCHES: u32 = 3;
/// How long the head must stand still before an expired lease is believed.
const HEAD_STILL_TIME: Duration = Duration::from_secs(2);
/// Shortest lease: a slow close of files or a rebuild must not look like a death.
const LEASE_MIN: Duration = Duration::from_secs(10 * 60);

/// What `rebase-offsets` and `accept-loss` do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OffsetCommand {
    /// Topics or cluster are new: begin at their earliest offsets.
    Rebase,
    /// Records are gone: go on at the earliest offset that is left.
    AcceptLoss,
}

impl OffsetCommand {
    /// As the user types it; stands in the ledger as the reason of a jump.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rebase => "rebase-offsets",
            Self::AcceptLoss => "accept-loss",
        }
    }
}

fn now_ms() -> i64 {
    chrono::Utc::now().timestamp_millis()
}

/// A record made by this program, before anything is known.
fn blank_record(loaded: &LoadedJob, owner: Uuid, seed: u64, key_spec_hash: String) -> LedgerRecord {
    let job = &loaded.job;
    LedgerRecord {
        format: FORMAT_VERSION,
        job_id: Uuid::new_v4(),
        job_name: job.name.clone(),
        epoch: 0,
        owner,
        lease_until_ms: 0,
        released: true,
        kind: Kind::Start,
        sequence: 0,
        attempt: Uuid::nil(),
        batch: 0,
        last_batch_with_rows: 0,
        cut_time_ms: now_ms(),
        cluster_id: None,
        schema_id: 0,
        spec_id: 0,
        job_hash: loaded.resolved_hash.clone(),
        sides_back_to: None,
        dedup: DedupRecord {
            generation: None,
            checksum: None,
            seed,
            key_spec_hash,
            shards: job.dedup.shards,
            bucket_width_ms: dedup::bucket_width_ms(job.dedup.window, job.dedup.repeats),
            eras: Vec::new(),
            repeats: job.dedup.repeats,
            floor: None,
            complete_since: None,
            keys: 0,
            digest: String::new(),
        },
        topics: BTreeMap::new(),
        lanes: BTreeMap::from([(LIVE_LANE.to_owned(), Lane::default())]),
        counts: Counts::default(),
        sides: BTreeMap::new(),
        buckets: Vec::new(),
        jumps: Vec::new(),
    }
}

/// Everything before the fence.
pub(super) struct Prepared<'a> {
    loaded: &'a LoadedJob,
    options: &'a RunOptions,
    pub(super) memory: MemoryPlan,
    lock: StateLock,
    pub(super) survey: Survey,
    /// The record found, or `None` for a first run.
    pub(super) record: Option<LedgerRecord>,
    decoder: Decoder,
}

/// Lock, survey, start table, lease: reads only, but for the lock file.
pub(super) async fn prepare<'a>(
    loaded: &'a LoadedJob,
    options: &'a RunOptions,
    allow: Allow,
) -> Result<Prepared<'a>, Stop> {
    let job = &loaded.job;
    let memory = plan_memory(loaded)?;
    let lock = StateLock::acquire(&survey::state_folder(job)).map_err(stops::lock)?;
    let survey = Survey::take(job, &memory).await?;
    let decoder = new_decoder(job)?;
    let record = match judge(&survey, job, options, allow) {
        Ok(record) => record,
        Err(stop) => return Err(busy_before(stop, &survey, &lock, options).await),
    };
    survey.refuse_other_schema(job)?;
    if let Some(record) = &record {
        await_lease(&survey, record, &lock, options).await?;
        refuse_cut_off(&survey).await?;
    }
    Ok(Prepared { loaded, options, memory, lock, survey, record, decoder })
}

pub(super) fn new_decoder(job: &Job) -> Result<Decoder, Stop> {
    Decoder::new(&job.decode, &job.dedup.key, &job.event_time.column, job.source.record_bytes_max).map_err(
        |error| {
            Stop::new(
                Reason::Usage,
                "the job's columns can not be decoded",
                "mend decode.columns in the job file",
            )
            .because(error)
        },
    )
}

/// The start table on what the survey found; the record to go on from, `None` for a first run.
pub(super) fn judge(
    survey: &Survey,
    job: &Job,
    options: &RunOptions,
    allow: Allow,
) -> Result<Option<LedgerRecord>, Stop> {
    let seed = survey.record().map_or(0, |record| record.dedup.seed);
    let encoder = survey::key_encoder(&new_decoder(job)?.schema(), job, seed)?;
    let key_spec_hash = encoder.key_spec_hash(job.dedup.shards, &job.bucket_source(), job.dedup.repeats);
    let topic_ids = survey.topic_ids();
    let (side_uuids, mark) = (survey.side_uuids(), survey.dead_letter_mark()?);
    let facts = Facts {
        job_shown: &options.job_shown,
        job_name: &job.name,
        table: &survey.main_ident.to_string(),
        dead_letter_table: &survey.dead_ident.to_string(),
        dead_letter_mark: mark.as_ref(),
        state_dir: &job.state_dir.display().to_string(),
        found: &survey.found,
        table_rows: survey.table_rows(),
        side_uuids: &side_uuids,
        local_generations: survey::has_local_generations(job)?,
        cluster_id: survey.cluster.cluster_id.as_deref(),
        topic_ids: &topic_ids,
        offsets: &survey.offsets,
        key_spec_hash: &key_spec_hash,
    };
    match start::judge(&facts, allow)? {
        Start::First => Ok(None),
        Start::Resume(record) => Ok(Some(*record)),
    }
}

/// Tables that are read one after another may look torn while a live owner commits: then it is BUSY that is true.
async fn busy_before(stop: Stop, survey: &Survey, lock: &StateLock, options: &RunOptions) -> Stop {
    let torn = matches!(stop.reason, Reason::TableRolledBack | Reason::TableReplaced);
    match survey.record() {
        Some(record) if torn => await_lease(survey, record, lock, options).await.err().unwrap_or(stop),
        _ => stop,
    }
}

/// BUSY unless the table is free, its owner dead, its lease over, or a takeover is asked for.
async fn await_lease(
    survey: &Survey,
    record: &LedgerRecord,
    lock: &StateLock,
    options: &RunOptions,
) -> Result<(), Stop> {
    if options.takeover {
        return Ok(());
    }
    let table = survey.main_ident.to_string();
    let busy = |until_ms| start::busy(&table, Some(record.owner), Some(until_ms), &options.job_shown);
    match start::lease(record, lock.knows_as_dead(record.owner), now_ms()) {
        LeaseVerdict::Free | LeaseVerdict::OwnerDead => Ok(()),
        LeaseVerdict::Busy { until_ms } => Err(busy(until_ms)),
        LeaseVerdict::Expired => {
            // A live owner whose clock is wrong still moves the head. That nothing happens is what is waited for (R9).
            tokio::time::sleep(HEAD_STILL_TIME).await;
            let again = switch::reload(&survey.catalog, &survey.main_ident).await.map_err(|error| {
                stops::data(format!("table {table} can not be read"), catalog::reason_of(&error), *error)
            })?;
            match ledger::inspect(again.metadata()) {
                Ok(Found::Record(now) | Found::CutOff(now)) if now.attempt == record.attempt => Ok(()),
                // Rolled back when it was surveyed, and still: nobody commits, so the stop of the start table is true.
                Ok(Found::RolledBack { newer, .. })
                    if newer.attempt == record.attempt
                        && matches!(survey.found, Found::RolledBack { .. }) =>
                {
                    Ok(())
                }
                _ => Err(busy(record.lease_until_ms)),
            }
        }
    }
}

/// History was expired before any record of ours: the property holds only if the rows of its last batch are there.
async fn refuse_cut_off(survey: &Survey) -> Result<(), Stop> {
    let (Found::CutOff(record), Some(table)) = (&survey.found, &survey.main) else { return Ok(()) };
    if record.last_batch_with_rows == 0 {
        return Ok(());
    }
    let present = scan::has_batch(table, record.last_batch_with_rows).await.map_err(|error| {
        stops::data(format!("table {} can not be scanned", survey.main_ident), error.reason(), error)
    })?;
    if present {
        return Ok(());
    }
    Err(Stop::new(
        Reason::TableRolledBack,
        format!(
            "no snapshot of table {} that is kept has a ledger record, and the rows of batch {} are not in it",
            survey.main_ident, record.last_batch_with_rows
        ),
        "nothing was read or written; the table was rolled back and its history expired: roll it forward by hand",
    ))
}

impl Prepared<'_> {
    /// Whether a start would only find that there is nothing to do (R8).
    pub(super) fn nothing_to_do(&self, starts: &BTreeMap<TopicPartition, NextOffset>) -> bool {
        let Some(record) = &self.record else { return false };
        let read = self.survey.offsets.iter().all(|(name, range)| starts[name] >= range.end);
        read && record.released && !record.owes_side_files() && self.survey.comparison.additions.is_empty()
    }

    pub(super) fn read_plans(&self, starts: &BTreeMap<TopicPartition, NextOffset>) -> Vec<ReadPlan> {
        self.survey
            .offsets
            .iter()
            .map(|(name, range)| {
                let cursor =
                    self.record.as_ref().and_then(|record| record.cursor(&name.topic, name.partition));
                let tail = cursor.and_then(|cursor| cursor.tail);
                ReadPlan {
                    topic_partition: name.clone(),
                    start: starts[name],
                    end: range.end.max(starts[name]),
                    low: range.low,
                    tail: tail.map(|tail| Tail { offset: tail.offset, hash: tail.hash }),
                }
            })
            .collect()
    }
}

/// The tables of the job, made if they are missing. Called when the start table says that this run may begin.
async fn ensure_tables(survey: &mut Survey, job: &Job) -> Result<(Table, Table), Stop> {
    let main = match survey.main.take() {
        Some(table) => table,
        None => schema::create_main(&*survey.catalog, job).await.map_err(stops::schema)?,
    };
    let dead = match survey.dead.take() {
        Some(table) => table,
        None => schema::create_dead_letters(&*survey.catalog, job).await.map_err(stops::schema)?,
    };
    // A rival may have made them in between, from another job.
    let differs = schema::compare(&main, job).map_err(stops::schema)?;
    survey::refuse_differences(&survey.main_ident, &differs, job)?;
    let differs = schema::compare_dead_letters(&dead).map_err(stops::schema)?;
    survey::refuse_differences(&survey.dead_ident, &differs, job)?;
    Ok((main, dead))
}

/// Who may commit, and the record that the next commit builds on.
pub(super) struct Owner<'a> {
    pub(super) loaded: &'a LoadedJob,
    pub(super) options: &'a RunOptions,
    pub(super) catalog: Arc<dyn Catalog>,
    pub(super) main_ident: TableIdent,
    /// Main as reloaded after the last commit.
    pub(super) main: Table,
    pub(super) dead_ident: TableIdent,
    pub(super) dead: Table,
    /// The record as it landed last.
    pub(super) record: LedgerRecord,
    id: Uuid,
    /// Whether a commit of this process has landed.
    owned: bool,
    _lock: StateLock,
}

impl<'a> Owner<'a> {
    /// Fences: the first commit of this process, epoch + 1. A first run's fence records its start offsets.
    pub(super) async fn take(
        prepared: Prepared<'a>,
        starts: &BTreeMap<TopicPartition, NextOffset>,
    ) -> Result<(Self, Connection, Decoder), Stop> {
        let Prepared { loaded, options, mut lock, mut survey, record, decoder, .. } = prepared;
        let (main, dead) = ensure_tables(&mut survey, &loaded.job).await?;
        let id = Uuid::new_v4();
        let fenced = match &record {
            Some(record) => LedgerRecord { kind: Kind::Fence, ..record.clone() },
            None => first_record(loaded, &survey, &main, &dead, &decoder, starts)?,
        };
        let epoch = fenced.epoch.max(lock.epoch_max()) + 1;
        let topic_ids = survey.topic_ids();
        lock.record_owner(id, epoch).map_err(stops::lock)?;
        let mut owner = Self {
            loaded,
            options,
            catalog: survey.catalog,
            main_ident: survey.main_ident,
            main,
            dead_ident: survey.dead_ident,
            dead,
            record: record.unwrap_or_else(|| LedgerRecord { attempt: Uuid::nil(), ..fenced.clone() }),
            id,
            owned: false,
            _lock: lock,
        };
        owner.commit(LedgerRecord { epoch, released: false, ..fenced }, Vec::new()).await?;
        owner.options.phases.reach("fenced");
        owner.learn_topics(topic_ids);
        if let Err(stop) = owner.settle(&survey.comparison.additions).await {
            owner.release_after(&stop).await;
            return Err(stop);
        }
        Ok((owner, survey.connection, decoder))
    }

    /// What an owner sees to before it reads: side tables, new columns.
    async fn settle(&mut self, additions: &[schema::Addition]) -> Result<(), Stop> {
        self.forward_sides().await?;
        self.claim_sides().await?;
        self.add_columns(additions).await
    }

    /// Topics that joined the job since the last record, and ids that the broker now tells; stated by the next commit.
    fn learn_topics(&mut self, topic_ids: BTreeMap<String, Option<TopicId>>) {
        for (topic, id) in topic_ids {
            let known = self.record.topics.entry(topic).or_default();
            *known = known.or(id);
        }
    }

    pub(super) fn committing(&self) -> Committing<'a> {
        let (epoch, kind) = (self.record.epoch, self.record.kind);
        Committing { epoch, kind, owned: self.owned, job_shown: &self.options.job_shown }
    }

    /// Puts a record on the head that carries the last one, and makes it the last one. Fills in what every commit of
    /// this owner says: attempt, sequence, owner, lease. Gives the number of requests.
    pub(super) async fn commit(&mut self, next: LedgerRecord, files: Vec<DataFile>) -> Result<u32, Stop> {
        let next = LedgerRecord {
            format: FORMAT_VERSION,
            attempt: Uuid::now_v7(),
            sequence: self.record.sequence + 1,
            owner: self.id,
            lease_until_ms: now_ms()
                .saturating_add(i64::try_from(self.lease().as_millis()).unwrap_or(i64::MAX)),
            ..next
        };
        let (expected, base) = (self.record.attempt, self.main.metadata().current_snapshot_id());
        let ids = (!files.is_empty()).then_some((next.schema_id, next.spec_id));
        let guard = move |metadata: &TableMetadata| head_carries(metadata, expected, base, ids);
        let request = Switch {
            catalog: &self.catalog,
            table: self.main_ident.clone(),
            table_uuid: self.main.metadata().uuid(),
            attempt: next.attempt,
            files,
            summary: next.to_summary(),
            properties: BTreeMap::from([(ledger::PROPERTY.to_owned(), next.to_property())]),
            guard: &guard,
        };
        let committing = Committing { epoch: next.epoch, kind: next.kind, ..self.committing() };
        let phases = &self.options.phases;
        let landed = switch(request, &|| phases.reach("main_sent"))
            .await
            .map_err(|error| stops::switch(error, committing))?;
        phases.reach("main_landed");
        self.main = landed.table;
        self.record = next;
        self.owned = true;
        Ok(landed.sends)
    }

    /// How long this owner may be silent before others call it dead.
    pub(super) fn lease(&self) -> Duration {
        (self.loaded.job.microbatch.open_time_max * LEASE_MICROBATCHES).max(LEASE_MIN)
    }

    /// Renews the lease with a copy of the record, same epoch, for work that takes long between two commits.
    pub(super) async fn renew(&mut self) -> Result<(), Stop> {
        let renewed = LedgerRecord { kind: Kind::Renewal, jumps: Vec::new(), ..self.record.clone() };
        self.commit(renewed, Vec::new()).await.map(|_| ())
    }

    /// The mark of the dead-letter table when it follows the last record.
    fn mark(&self, role: &str) -> SideMark {
        SideMark {
            format: side::FORMAT_VERSION,
            job_id: self.record.job_id,
            job_name: self.record.job_name.clone(),
            main: self.main_ident.to_string(),
            role: role.to_owned(),
            epoch: self.record.epoch,
            batch: self.record.batch,
            generation: self.record.dedup.generation.clone(),
        }
    }

    /// Marks a dead-letter table that does not follow this job yet, so that no other job takes it. The start table has let
    /// only an unmarked one through, and one of this very job and main table under an earlier id.
    async fn claim_sides(&mut self) -> Result<(), Stop> {
        let mark =
            side::inspect(self.dead.metadata()).map_err(|error| stops::ledger(&self.dead_ident, error))?;
        if mark.as_ref().is_some_and(|mark| mark.job_id == self.record.job_id) {
            return Ok(());
        }
        let uuid = self.dead.metadata().uuid();
        side::claim(&self.catalog, &self.dead_ident, uuid, &self.mark(DEAD_LETTERS), &mark)
            .await
            .map_err(|error| stops::side(error, self.committing()))?;
        self.dead = self.reload(&self.dead_ident).await?;
        Ok(())
    }

    /// Gives each side table the files that the last record owes it.
    pub(super) async fn forward_sides(&mut self) -> Result<(), Stop> {
        if !self.record.owes_side_files() {
            return Ok(());
        }
        for (role, owed) in self.record.sides.clone() {
            if !owed.owed {
                continue;
            }
            self.options.phases.reach("sides_sent");
            self.forward_side(&role, &owed).await?;
        }
        for side in self.record.sides.values_mut() {
            (side.owed, side.files) = (false, None);
        }
        self.options.phases.reach("sides_landed");
        self.dead = self.reload(&self.dead_ident.clone()).await?;
        Ok(())
    }

    async fn forward_side(&self, role: &str, side: &SideRecord) -> Result<(), Stop> {
        let mark = self.mark(role);
        let lost = |what: String| {
            Stop::new(
                Reason::SideFilesLost,
                what,
                "main is committed and whole; writing the batch's side rows again (side reread) is not built yet: restore \
                 the files, then run again",
            )
        };
        let dead = self.reload(&self.dead_ident).await?;
        if side::inspect(dead.metadata()).ok().flatten().is_some_and(|now| now.batch >= mark.batch) {
            // Landed before; asking again only settles marks that are ahead or of another job.
            let done =
                side::bring_forward(&self.catalog, &self.dead_ident, side.uuid, &mark, Vec::new()).await;
            return done.map(|_| ()).map_err(|error| stops::side(error, self.committing()));
        }
        let Some(values) = &side.files else {
            return Err(lost(format!("the list of files that side table {} is owed is gone", side.table)));
        };
        let files = writer::files_from_json(values, &dead).map_err(|error| {
            lost(format!("the list of files that side table {} is owed can not be read", side.table))
                .because(error)
        })?;
        let missing = writer::files_exist(&dead, &files).await.map_err(|error| {
            stops::data(
                format!("files of side table {} can not be looked up", side.table),
                error.reason(),
                error,
            )
        })?;
        if let Some(first) = missing.first() {
            let (count, path) = (missing.len(), &first.path);
            return Err(lost(format!(
                "{count} files that side table {} is owed are gone, first {path}",
                side.table
            )));
        }
        side::bring_forward(&self.catalog, &self.dead_ident, side.uuid, &mark, files)
            .await
            .map(|_| ())
            .map_err(|error| stops::side(error, self.committing()))
    }

    async fn add_columns(&mut self, additions: &[schema::Addition]) -> Result<(), Stop> {
        if additions.is_empty() {
            return Ok(());
        }
        schema::add_columns(&*self.catalog, &self.main, additions).await.map_err(stops::schema)?;
        self.main = self.reload(&self.main_ident).await?;
        let comparison = schema::compare(&self.main, &self.loaded.job).map_err(stops::schema)?;
        if comparison.additions.is_empty() && comparison.refusals.is_empty() {
            return Ok(());
        }
        Err(Stop::new(
            Reason::TableChanged,
            format!("table {} does not show the columns that were added to it", self.main_ident),
            "nothing was read; run again",
        ))
    }

    async fn reload(&self, table: &TableIdent) -> Result<Table, Stop> {
        switch::reload(&self.catalog, table).await.map_err(|error| {
            stops::data(format!("table {table} can not be read"), catalog::reason_of(&error), *error)
        })
    }

    /// Gives the table back. A record that is released already costs nothing.
    pub(super) async fn release(&mut self) -> Result<(), Stop> {
        if self.record.released {
            return Ok(());
        }
        let released =
            LedgerRecord { kind: Kind::Release, released: true, jumps: Vec::new(), ..self.record.clone() };
        self.commit(released, Vec::new()).await.map(|_| ())
    }

    /// Gives the table back after a stop, where that is still ours to do. What can not be released is taken over by the
    /// next start on this machine at once, elsewhere when the lease ends.
    pub(super) async fn release_after(&mut self, stop: &Stop) {
        let ours = !matches!(
            stop.reason,
            Reason::Fenced
                | Reason::Busy
                | Reason::OutcomeUnknown
                | Reason::TableReplaced
                | Reason::TableRolledBack
        );
        if !ours || self.record.owes_side_files() {
            return;
        }
        if let Err(error) = self.release().await {
            tracing::warn!(%error, "the lease could not be released; the next start takes over");
        }
    }
}

/// Whether the head still carries the record that the next commit builds on, and, if files are appended, the schema
/// and spec they were written with.
fn head_carries(
    metadata: &TableMetadata,
    expected: Uuid,
    base: Option<i64>,
    ids: Option<(i32, i32)>,
) -> Result<(), String> {
    let found = ledger::inspect(metadata).map_err(|error| error.to_string())?;
    match found {
        Found::Nothing if expected.is_nil() => {
            if metadata.current_snapshot_id() != base {
                return Err("another writer committed before the first fence".to_owned());
            }
        }
        Found::Record(record) | Found::CutOff(record) if record.attempt == expected => {}
        Found::Nothing => return Err("its ledger record is gone".to_owned()),
        Found::Record(record) | Found::CutOff(record) => {
            return Err(format!(
                "it is at epoch {} batch {} of owner {}",
                record.epoch, record.batch, record.owner
            ));
        }
        Found::RolledBack { .. } => return Err("it was rolled back".to_owned()),
    }
    let now = (metadata.current_schema_id(), metadata.default_partition_spec_id());
    match ids {
        Some(written) if written != now => Err(format!(
            "its schema and spec are now {} and {}, the files were written with {} and {}",
            now.0, now.1, written.0, written.1
        )),
        _ => Ok(()),
    }
}

/// A first run's record: start offsets before the first read.
fn first_record(
    loaded: &LoadedJob,
    survey: &Survey,
    main: &Table,
    dead: &Table,
    decoder: &Decoder,
    starts: &BTreeMap<TopicPartition, NextOffset>,
) -> Result<LedgerRecord, Stop> {
    let job = &loaded.job;
    let seed = rand::random();
    let encoder = survey::key_encoder(&decoder.schema(), job, seed)?;
    let key_spec_hash = encoder.key_spec_hash(job.dedup.shards, &job.bucket_source(), job.dedup.repeats);
    let mut record = blank_record(loaded, Uuid::nil(), seed, key_spec_hash);
    record.cluster_id.clone_from(&survey.cluster.cluster_id);
    record.topics = survey.topic_ids();
    record.schema_id = main.metadata().current_schema_id();
    record.spec_id = main.metadata().default_partition_spec_id();
    record.sides.insert(DEAD_LETTERS.to_owned(), side_record(dead, None));
    let lane = record.lanes.entry(LIVE_LANE.to_owned()).or_default();
    for (name, &start) in starts {
        let cursor = Cursor { start, end: start, tail: None, max_event_time: None };
        lane.topics.entry(name.topic.clone()).or_default().insert(name.partition, cursor);
    }
    Ok(record)
}

/// What the ledger says of the dead-letter table when it is owed `files`.
pub(super) fn side_record(table: &Table, files: Option<Vec<serde_json::Value>>) -> SideRecord {
    SideRecord {
        table: table.identifier().to_string(),
        uuid: table.metadata().uuid(),
        owed: files.is_some(),
        files,
        schema_id: table.metadata().current_schema_id(),
        spec_id: table.metadata().default_partition_spec_id(),
    }
}

/// Moves offsets without reading: fence, then one commit of kind jump.
pub async fn move_offsets(
    loaded: &LoadedJob,
    options: &RunOptions,
    command: OffsetCommand,
    confirm: &dyn Fn(&str) -> Result<(), Stop>,
) -> Result<Vec<Jump>, Stop> {
    let allow = Allow {
        rebase: command == OffsetCommand::Rebase,
        loss: command == OffsetCommand::AcceptLoss,
        ..Allow::default()
    };
    let prepared = prepare(loaded, options, allow).await?;
    let Some(record) = prepared.record.clone() else {
        return Err(Stop::new(
            Reason::Usage,
            format!("table {} has no ledger yet: there are no offsets to move", prepared.survey.main_ident),
            format!("tidemill run {}", options.job_shown),
        ));
    };
    let differing = match command {
        OffsetCommand::Rebase => differing_tails(&prepared, &record)?,
        OffsetCommand::AcceptLoss => BTreeSet::new(),
    };
    let jumps = jumps(&prepared.survey, &record, command, &differing);
    if jumps.is_empty() {
        return Ok(jumps);
    }
    let question: Vec<String> = jumps.iter().map(describe).collect();
    confirm(&format!(
        "{}\nwrite this into the ledger of {}?",
        question.join("\n"),
        prepared.survey.main_ident
    ))?;
    let mut topics = record.topics.clone();
    let cluster = prepared.survey.cluster.cluster_id.as_ref();
    let other_cluster = changed(record.cluster_id.as_ref(), cluster);
    for (topic, found) in prepared.survey.topic_ids() {
        let known = topics.entry(topic).or_default();
        // An id of another cluster says nothing about a topic of this one.
        *known = if other_cluster { found } else { found.or(*known) };
    }
    let cluster_id = prepared.survey.cluster.cluster_id.clone().or(record.cluster_id);
    let partition_counts: BTreeMap<String, i32> =
        prepared.survey.cluster.topics.iter().map(|facts| (facts.topic.clone(), facts.partitions)).collect();
    let (mut owner, _, _) = Owner::take(prepared, &BTreeMap::new()).await?;
    let mut next = LedgerRecord {
        kind: Kind::Jump,
        cluster_id,
        topics,
        jumps: jumps.clone(),
        released: true,
        ..owner.record.clone()
    };
    let lane = next.lanes.entry(LIVE_LANE.to_owned()).or_default();
    for (topic, known) in &mut lane.topics {
        // A topic made again may have fewer topic partitions than its ledger.
        let partitions = partition_counts.get(topic).copied();
        known.retain(|partition, _| partitions.is_none_or(|partitions| *partition < partitions));
    }
    for jump in &jumps {
        let known = lane.topics.entry(jump.topic.clone()).or_default();
        let max_event_time = known.get(&jump.partition).and_then(|cursor| cursor.max_event_time);
        let cursor = Cursor { start: jump.new_start, end: jump.new_start, tail: None, max_event_time };
        known.insert(jump.partition, cursor);
    }
    owner.commit(next, Vec::new()).await?;
    Ok(jumps)
}

/// Topic partitions whose last consumed record is another one now.
fn differing_tails(prepared: &Prepared<'_>, record: &LedgerRecord) -> Result<BTreeSet<TopicPartition>, Stop> {
    let starts = prepared.survey.starts(&prepared.loaded.job, Some(record))?;
    let mut plans = prepared.read_plans(&starts);
    let survey = &prepared.survey;
    if changed(record.cluster_id.as_ref(), survey.cluster.cluster_id.as_ref()) {
        return Ok(BTreeSet::new());
    }
    // Topic partitions that move for another reason need no look, and a shorter log has no record to compare.
    plans.retain(|plan| {
        let name = &plan.topic_partition;
        let known = record.topics.get(&name.topic).copied().flatten();
        let same_topic = !changed(known.as_ref(), survey.topic_id(&name.topic).as_ref());
        plan.tail.is_some() && plan.start >= plan.low && plan.start <= survey.offsets[name].end && same_topic
    });
    for plan in &mut plans {
        plan.end = plan.start;
    }
    let reader = Reader::assign(&prepared.survey.connection, plans, ReaderOptions::default());
    let verified = reader.and_then(|mut reader| reader.verify_tails(STALL_AFTER_DEFAULT));
    match verified {
        Ok(()) => Ok(BTreeSet::new()),
        Err(SourceError::TailDiffers { places }) => Ok(places.into_iter().map(|(name, _)| name).collect()),
        Err(error) => Err(stops::source(error)),
    }
}

/// One jump as a line.
pub fn describe(jump: &Jump) -> String {
    let old = jump.old_end.map_or("none".to_owned(), |old| old.to_string());
    format!("{}[{}]: next offset {old} -> {}", jump.topic, jump.partition, jump.new_start)
}

/// Whether both are known and differ, as the start table judges.
fn changed<T: PartialEq>(known: Option<&T>, found: Option<&T>) -> bool {
    matches!((known, found), (Some(known), Some(found)) if known != found)
}

/// Which cursors move: lost ranges to the earliest offset left; topics made anew to their earliest offset.
fn jumps(
    survey: &Survey,
    record: &LedgerRecord,
    command: OffsetCommand,
    differing: &BTreeSet<TopicPartition>,
) -> Vec<Jump> {
    let other_cluster = changed(record.cluster_id.as_ref(), survey.cluster.cluster_id.as_ref());
    let mut jumps = Vec::new();
    for (name, range) in &survey.offsets {
        let old_end = record.cursor(&name.topic, name.partition).map(|cursor| cursor.end);
        let known = record.topics.get(&name.topic).copied().flatten();
        let found = survey.topic_id(&name.topic);
        let moves = match command {
            OffsetCommand::AcceptLoss => old_end.is_some_and(|old| old < range.low),
            OffsetCommand::Rebase => {
                let out_of_range = old_end.is_some_and(|old| old < range.low || old > range.end);
                let other_topic = old_end.is_none() || changed(known.as_ref(), found.as_ref());
                other_cluster || other_topic || out_of_range || differing.contains(name)
            }
        };
        if moves {
            jumps.push(Jump {
                topic: name.topic.clone(),
                partition: name.partition,
                old_end,
                new_start: range.low,
                reason: command.name().to_owned(),
            });
        }
    }
    jumps
}
