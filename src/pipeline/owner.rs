//! The pipeline's owner of a table: what a start reads before the fence, and commits that move offsets without reading.
//!
//! Flow: [`prepare`] (reads only, but for the lock file) -> [`Prepared::take`] (fence, side tables) -> commits
//!
//! What is decided, and in which order, stands in `protocol`.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::rebuild::suppressed_table;
use super::sides::{self, SideLoss};
use super::stops;
use super::survey::{self, Survey};
use super::world::{Inheritance, Outside};
use super::{RunOptions, plan_memory};
use crate::commit::ledger::{Cursor, Jump, Kind, LIVE_LANE, LedgerRecord, Others};
use crate::commit::lock::StateLock;
use crate::commit::side::Role;
use crate::decode::Decoder;
use crate::job::Job;
use crate::job::file::LoadedJob;
use crate::memory::MemoryPlan;
use crate::mutant;
use crate::offset::{NextOffset, TopicId, TopicPartition};
use crate::protocol::start::{self, Allow, Facts, SideFacts, Start};
use crate::protocol::{self, Fence};
use crate::sink::scan;
use crate::source::{Connection, ReadPlan, Reader, ReaderOptions, STALL_AFTER_DEFAULT, SourceError, Tail};
use crate::stop::{Reason, Stop};

/// The owner that the pipeline drives.
pub(super) type Owner<'a> = protocol::Owner<Outside<'a>>;

/// What `rebase-offsets` and `accept-loss` do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OffsetCommand {
    /// Topics or cluster are new: begin at their earliest offsets.
    Rebase,
    /// Records are gone: go on at the earliest offset that is left. Side files are gone: go on without them.
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

/// Everything before the fence.
pub(super) struct Prepared<'a> {
    pub(super) outside: Outside<'a>,
    pub(super) memory: MemoryPlan,
    pub(super) survey: Survey,
    /// The record found, or `None` for a first run.
    pub(super) record: Option<LedgerRecord>,
    pub(super) decoder: Decoder,
    /// Files that a side table is owed and that are gone are no reason to stop.
    bears_lost_files: bool,
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
    let mut outside = Outside::new(loaded, options, lock, &survey);
    let asked = Question::of(&survey, job)?;
    let fits = || survey.refuse_other_schema(job);
    let facts = asked.facts(&survey, job, options);
    let record = protocol::admit(&outside, &facts, allow, survey.main.as_ref(), fits).await?;
    if let Some(known) = record.as_ref().and_then(|record| record.suppressed.as_ref()) {
        suppressed_table(&*survey.catalog, known, &options.job_shown).await?;
    }
    if record.is_none() && survey.tables_with_keys().any(|table| scan::rows_of(table) > 0) {
        outside.inheritance = Inheritance::Others(others_in(&survey, allow.adopt_rows).await?);
    }
    Ok(Prepared { outside, memory, survey, record, decoder, bears_lost_files: allow.lost_files })
}

/// Rows that stand in a table without ledger: what this ledger writes is told from them by its batch numbers, and from
/// what an earlier ledger of the job still brings to a side table by the mark that this one has read.
async fn others_in(survey: &Survey, adopted: bool) -> Result<Others, Stop> {
    let sides = survey.side_facts()?;
    let with_keys = sides.iter().filter(|(role, _)| role.holds_keys());
    let marked = with_keys.filter_map(|(_, side)| Some(side.mark.as_ref()?.batch));
    let mut batch_max = marked.max().unwrap_or(0);
    for table in survey.tables_with_keys() {
        let found = scan::batch_max(table).await.map_err(|error| {
            stops::data(format!("table {} can not be read", table.identifier()), error.reason(), error)
        })?;
        batch_max = batch_max.max(found);
    }
    Ok(Others { batch_max, adopted, buckets: Vec::new() })
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

/// What the facts of a start table refer to.
struct Question<'a> {
    key_spec_hash: String,
    topic_ids: BTreeMap<String, Option<TopicId>>,
    sides: BTreeMap<Role, SideFacts<'a>>,
    local_generations: bool,
    table: String,
}

impl<'q> Question<'q> {
    fn of(survey: &'q Survey, job: &Job) -> Result<Self, Stop> {
        let seed = survey.record().map_or(0, |record| record.dedup.seed);
        let encoder = survey::key_encoder(&new_decoder(job)?.schema(), job, seed)?;
        Ok(Self {
            key_spec_hash: encoder.key_spec_hash(job.dedup.shards, &job.bucket_source(), job.dedup.repeats),
            topic_ids: survey.topic_ids(),
            sides: survey.side_facts()?,
            local_generations: survey::has_local_generations(job)?,
            table: survey.main_ident.to_string(),
        })
    }

    fn facts<'a>(&'a self, survey: &'a Survey, job: &'a Job, options: &'a RunOptions) -> Facts<'a> {
        Facts {
            job_shown: &options.job_shown,
            job_name: &job.name,
            table: &self.table,
            sides: &self.sides,
            found: &survey.found,
            table_rows: survey.table_rows(),
            local_generations: self.local_generations,
            cluster_id: survey.cluster.cluster_id.as_deref(),
            topic_ids: &self.topic_ids,
            offsets: &survey.offsets,
            key_spec_hash: &self.key_spec_hash,
        }
    }
}

/// The start table on what the survey found; the record to go on from, `None` for a first run.
pub(super) fn judge(
    survey: &Survey,
    job: &Job,
    options: &RunOptions,
    allow: Allow,
) -> Result<Option<LedgerRecord>, Stop> {
    match start::judge(&Question::of(survey, job)?.facts(survey, job, options), allow)? {
        Start::First => Ok(None),
        Start::Resume(record) => Ok(Some(*record)),
    }
}

fn same_log(survey: &Survey, job: &Job, options: &RunOptions, record: &LedgerRecord) -> Result<(), Stop> {
    start::same_log(&Question::of(survey, job)?.facts(survey, job, options), record)
}

impl<'a> Prepared<'a> {
    /// The fence: from here on this process owns the table.
    pub(super) async fn take(
        self,
        starts: &BTreeMap<TopicPartition, NextOffset>,
    ) -> Result<(Owner<'a>, Connection, Decoder), Stop> {
        let Self { outside, survey, record, decoder, bears_lost_files, .. } = self;
        let is_same_log = |record| same_log(&survey, &outside.loaded.job, outside.options, record).is_ok();
        let fence = Fence {
            cluster_id: survey.cluster.cluster_id.clone(),
            // Ids of another log are none of the ledger's.
            topic_ids: match record.as_ref().is_none_or(is_same_log) {
                true => survey.topic_ids(),
                false => BTreeMap::new(),
            },
            starts: starts.clone(),
            heads: (survey.main, survey.sides),
            record,
            bears_lost_files,
        };
        Ok((Owner::take(outside, fence).await?, survey.connection, decoder))
    }

    /// Whether a start would only find that there is nothing to do (R8).
    pub(super) fn nothing_to_do(&self, starts: &BTreeMap<TopicPartition, NextOffset>) -> bool {
        let Some(record) = &self.record else { return mutant!("first-run-is-silent", true => false) };
        let read = self.survey.offsets.iter().all(|(name, range)| starts[name] >= range.end);
        let settled = mutant!("debt-rests", true => record.released && !record.owes_side_tables());
        let asked = record.active_backfills().next().is_some() || self.survey.has_requests();
        mutant!("idle-run-commits", false => read)
            && settled
            && !asked
            && self.survey.comparison.additions.is_empty()
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

/// What a person let go.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Moved {
    /// Offsets that moved without reading.
    pub jumps: Vec<Jump>,
    /// Rows that side tables do not get.
    pub side_losses: Vec<SideLoss>,
}

impl Moved {
    /// Whether nothing had to be.
    pub fn is_nothing(&self) -> bool {
        self.jumps.is_empty() && self.side_losses.is_empty()
    }
}

/// Moves offsets without reading: fence, then one commit of kind jump. A loss of side files is accepted before, by a commit
/// of its own.
pub async fn move_offsets(
    loaded: &LoadedJob,
    options: &RunOptions,
    command: OffsetCommand,
    confirm: &dyn Fn(&str) -> Result<(), Stop>,
) -> Result<Moved, Stop> {
    // Side files are given up whatever became of the log: `rebase-offsets` is refused until they are.
    let gives_up = command == OffsetCommand::AcceptLoss;
    let replay = loaded.job.sink.replays();
    let allow = Allow { rebase: true, lost_files: gives_up, lost_list: gives_up, replay, ..Allow::default() };
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
    let jumps = || jumps(&prepared.survey, &record, command, &differing);
    let (lost, same_log, jumps) = match command {
        OffsetCommand::Rebase => (Vec::new(), Ok(()), jumps()),
        OffsetCommand::AcceptLoss => {
            let same_log = same_log(&prepared.survey, &loaded.job, options, &record);
            // Offsets of another log say nothing about what this one lost.
            let jumps = if same_log.is_ok() { jumps() } else { Vec::new() };
            (sides::lost(&prepared).await?, same_log, jumps)
        }
    };
    if jumps.is_empty() && lost.is_empty() {
        return same_log.map(|()| Moved::default());
    }
    let losses = lost.iter().map(ToString::to_string);
    let question: Vec<String> = losses.chain(jumps.iter().map(describe)).collect();
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
    let (mut owner, _, _) = prepared.take(&BTreeMap::new()).await?;
    let side_losses = match sides::accept_loss(&mut owner, &lost).await {
        Ok(side_losses) if !jumps.is_empty() => side_losses,
        Ok(side_losses) => {
            let moved = Moved { jumps: Vec::new(), side_losses };
            return owner.end(if moved.is_nothing() { same_log.map(|()| moved) } else { Ok(moved) }).await;
        }
        Err(stop) => return owner.end(Err(stop)).await,
    };
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
    if command == OffsetCommand::Rebase {
        // Their offsets are those of another log.
        let moved = |name: &TopicPartition| {
            jumps.iter().any(|jump| jump.topic == name.topic && jump.partition == name.partition)
        };
        next.lanes.retain(|name, lane| {
            let stays = lane.backfill.is_none() || !lane.cursors().any(|(name, _)| moved(&name));
            if !stays {
                tracing::warn!("backfill {name} is dropped: the topics that it was to read are others now");
            }
            stays
        });
    }
    let lane = next.lanes.entry(LIVE_LANE.to_owned()).or_default();
    for jump in &jumps {
        let known = lane.topics.entry(jump.topic.clone()).or_default();
        let max_event_time = known.get(&jump.partition).and_then(|cursor| cursor.max_event_time);
        let cursor = Cursor { start: jump.new_start, end: jump.new_start, tail: None, max_event_time };
        known.insert(jump.partition, cursor);
    }
    let moved = owner.commit(next, Vec::new()).await;
    owner.end(moved.map(|_| Moved { jumps, side_losses })).await
}

/// Topic partitions whose last consumed record is another one now.
fn differing_tails(prepared: &Prepared<'_>, record: &LedgerRecord) -> Result<BTreeSet<TopicPartition>, Stop> {
    let starts = prepared.survey.starts(&prepared.outside.loaded.job, Some(record))?;
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
