//! Files that a side table is owed and that are gone (`SIDE_FILES_LOST`): their rows are written again, or given up.
//!
//! Flow of `side reread`: ledger ranges `[start, end)` of microbatch n -> decode -> letters -> those that the table lacks -> new
//! files -> commit of kind change that names them -> side table
//!
//! What must be the same as then, and how that is known
//! 1. The records: the broker holds the whole ranges, as many rows came of them, and the last record of each topic partition is
//!    the one that the ledger hashed.
//! 2. The verdicts: the job has the same hash, and what is too far ahead is held against the batch's cut time. A letter depends
//!    on its record and the job alone, so it is the same wherever records are cut. But for one: a run without end held each
//!    chunk against the time by then, and the record has the last of these times alone. What was too far ahead by less than
//!    what passed since may not come out again; then their number differs, and 3 refuses.
//! 3. The rows: letters that stood in the table before the batch stand there still, and no later batch has come, so what it
//!    lacks is what the batch owed it. That they are as many as the record names is compared.
//!
//! Late rows are refused: whether one was new depends on the state before the batch, which copy of a key won on the order in
//! which topic partitions were read, and neither is kept.
//!
//! A crash before the commit leaves files that no table names; after it the next start brings the side table forward.
//!
//! Bounds: one chunk at a time, as a run's.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;

use iceberg::spec::DataFile;
use iceberg::table::Table;
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use super::commands::{Confirm, need_record};
use super::keys::KeyMaker;
use super::lanes::LaneReader;
use super::microbatch::{READ_TURN_MAX, letter_slots, undecodable, unexpected_arrow, unwritten};
use super::owner::{Owner, Prepared, prepare};
use super::session::reader_options;
use super::start::Allow;
use super::{RunOptions, late, stops};
use crate::commit::ledger::{Change, LIVE_LANE, Lane, LedgerRecord, SideRecord, Tail};
use crate::commit::side::Role;
use crate::decode::{Decoded, Decoder};
use crate::job::file::LoadedJob;
use crate::letter::DeadLetter;
use crate::memory::MemoryPlan;
use crate::mutant;
use crate::offset::TopicPartition;
use crate::protocol::{self, LostSide, side_record};
use crate::record::RecordChunk;
use crate::sink::dead_letters::{self, LetterPlace};
use crate::sink::writer::{self, TableWriter};
use crate::source::{OffsetRange, ReadLimits, ReadPlan, ReadStatus};
use crate::stop::{Reason, Stop};

const REREAD: &str = "side reread";
const ACCEPT_LOSS: &str = "accept-loss";

/// Rows that a side table does not get.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SideLoss {
    /// The side table.
    pub table: String,
    /// The microbatch that owed them.
    pub batch: u64,
    /// How many; `None` where the list of files is gone too.
    pub rows: Option<u64>,
    /// Whether their keys count as seen all the same.
    pub keys_stay_seen: bool,
}

impl fmt::Display for SideLoss {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, batch, rows, keys_stay_seen } = self;
        let rows = rows.map_or("rows".to_owned(), |rows| format!("{rows} rows"));
        write!(out, "{rows} of batch {batch} are lost to table {table}")?;
        if *keys_stay_seen { write!(out, "; their keys stay seen") } else { Ok(()) }
    }
}

/// What `side reread` did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reread {
    /// The side table; `None` if none lacks a file.
    pub table: Option<String>,
    /// The last microbatch.
    pub batch: u64,
    /// Rows written again.
    pub rows: u64,
}

/// Rows in files as the ledger names them.
fn rows_in(values: &[Value], table: &Table) -> Option<u64> {
    let files = writer::files_from_json(values, table).ok()?;
    Some(files.iter().map(DataFile::record_count).sum())
}

fn loss(lost: &LostSide, table: &Table, batch: u64) -> SideLoss {
    SideLoss {
        table: table.identifier().to_string(),
        batch,
        rows: lost.gone.as_ref().and_then(|gone| rows_in(gone, table)),
        keys_stay_seen: lost.role.holds_keys(),
    }
}

async fn lost_before_the_fence(
    prepared: &Prepared<'_>,
    record: &LedgerRecord,
) -> Result<Vec<LostSide>, Stop> {
    protocol::lost_sides(&prepared.outside, &prepared.survey.sides, record).await
}

/// What side tables can not get any more, before anything is written.
pub(super) async fn lost(prepared: &Prepared<'_>) -> Result<Vec<SideLoss>, Stop> {
    let Some(record) = &prepared.record else { return Ok(Vec::new()) };
    let lost = lost_before_the_fence(prepared, record).await?;
    Ok(lost.iter().map(|lost| loss(lost, &prepared.survey.sides[&lost.role], record.batch)).collect())
}

/// States the loss in the ledger, and brings side tables forward with what is left. What nobody was asked about is no part of
/// it: a file that vanished since.
pub(super) async fn accept_loss(owner: &mut Owner<'_>, asked: &[SideLoss]) -> Result<Vec<SideLoss>, Stop> {
    let tables: Vec<&str> = asked.iter().map(|loss| loss.table.as_str()).collect();
    let lost = owner.fence_lost(&tables).await?;
    let batch = owner.record.batch;
    let losses: Vec<SideLoss> = lost.iter().map(|lost| loss(lost, owner.side(lost.role), batch)).collect();
    if losses.is_empty() || losses.iter().any(|loss| !asked.contains(loss)) {
        owner.forward_sides().await?;
        return Ok(Vec::new());
    }
    let known = &owner.record.sides;
    let left = |lost: LostSide| {
        let side = known[lost.role.name()].clone();
        (lost.role, SideRecord { files: Some(lost.whole), ..side })
    };
    let instead = lost.into_iter().map(left).collect();
    let what = losses.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    owner.owe_instead(instead, Change { by: ACCEPT_LOSS.to_owned(), what }).await?;
    Ok(losses)
}

/// Writes the rows again that the last microbatch owes a side table whose files are gone.
///
/// # Errors
/// The [`Stop`] of the start table; `SIDE_FILES_LOST` if they can not be had exactly as they were, with the reason.
pub async fn reread(loaded: &LoadedJob, options: &RunOptions, confirm: Confirm<'_>) -> Result<Reread, Stop> {
    let replay = loaded.job.sink.replays();
    let allow = Allow { loss: true, lost_files: true, lost_list: true, replay, ..Allow::default() };
    let prepared = prepare(loaded, options, allow).await?;
    let record = need_record(&prepared, options)?;
    let lost = lost_before_the_fence(&prepared, &record).await?;
    let Some(first) = lost.first() else {
        return Ok(Reread { table: None, batch: record.batch, rows: 0 });
    };
    let letters = lost.iter().find(|lost| lost.role == Role::DeadLetters);
    let role = letters.unwrap_or(first).role;
    let table = &prepared.survey.sides[&role];
    let name = table.identifier().to_string();
    let refuse = |why: String| refusal(&name, record.batch, &why, options);
    let rows = letters.map_or_else(
        || {
            Err("whether a late row was new depends on the state before its batch, which is not kept"
                .to_owned())
        },
        |letters| rows_owed(letters, table),
    );
    let rows = rows.map_err(refuse)?;
    if record.job_hash != loaded.resolved_hash {
        return Err(refuse("the job was changed since, and may judge them otherwise now".to_owned()));
    }
    let plans = plans(&record, &prepared.survey.offsets).map_err(refuse)?;
    let offsets: i64 = plans.iter().map(|plan| plan.end.get() - plan.start.get()).sum();
    // Letters are brought back alone: what the other table lacks stops the next run all the same.
    let others = lost.iter().filter(|lost| lost.role != role).map(|lost| {
        let other = prepared.survey.sides[&lost.role].identifier();
        format!("\ntable {other} lacks rows of it too, which this does not bring back")
    });
    confirm(&format!(
        "read {offsets} offsets of batch {} again and write {rows} rows of table {name} anew?{}",
        record.batch,
        others.collect::<String>()
    ))?;
    let reading = reader_options(&loaded.job, options);
    let memory = prepared.memory;
    let lane = lane_of(&record);
    let (mut owner, connection, decoder) = prepared.take(&BTreeMap::new()).await?;
    let rule = &loaded.job.event_time;
    let written = async {
        let lost = owner.fence_lost(&[&name]).await?;
        if !lost.iter().any(|lost| lost.role == role) {
            // Put back since the question; another table may be owed files still.
            owner.forward_sides().await?;
            return Ok(None);
        }
        let reader = LaneReader::open(&connection, Some(&record), lane, plans, reading, rule);
        let reader = reader.map_err(stops::source)?;
        Again { owner: &mut owner, reader, decoder, memory, options }.write_and_name(rows).await?;
        Ok(Some(rows))
    };
    let done = written.await.map(|rows| Reread {
        table: rows.map(|_| name.clone()),
        batch: record.batch,
        rows: rows.unwrap_or(0),
    });
    owner.end(done).await
}

fn refusal(table: &str, batch: u64, why: &str, options: &RunOptions) -> Stop {
    Stop::new(
        Reason::SideFilesLost,
        format!("what batch {batch} owes side table {table} can not be written again: {why}"),
        format!(
            "nothing was changed, main is committed and whole; put the files back and run again, or go on without them, \
             with the loss written into the ledger:\n  tidemill accept-loss {}",
            options.job_shown
        ),
    )
}

/// How many letters are to come out.
fn rows_owed(lost: &LostSide, table: &Table) -> Result<u64, String> {
    let unknown = || "the list that says how many rows they held is gone".to_owned();
    let gone = lost.gone.as_ref().ok_or_else(unknown)?;
    let (gone, whole) = (rows_in(gone, table), rows_in(&lost.whole, table));
    Ok(gone.ok_or_else(unknown)? + whole.ok_or_else(unknown)?)
}

fn lane_of(record: &LedgerRecord) -> &str {
    record.batch_lane.as_deref().unwrap_or(LIVE_LANE)
}

/// The ranges of the last microbatch, as the broker holds them.
fn plans(
    record: &LedgerRecord,
    held: &BTreeMap<TopicPartition, OffsetRange>,
) -> Result<Vec<ReadPlan>, String> {
    let mut plans = Vec::new();
    for (name, cursor) in record.lanes.get(lane_of(record)).into_iter().flat_map(Lane::cursors) {
        let (start, end) = (cursor.start, cursor.end);
        // A topic that had left the job before the batch keeps the cursor of its own last one. That the job has not changed
        // since was compared, so what it does not read now it did not read then.
        let is_read = held.keys().any(|held| held.topic == name.topic);
        if start == end || !is_read {
            continue;
        }
        let Some(range) = held.get(&name) else {
            return Err(format!("the job does not read {name} any more"));
        };
        if start < range.low || end > range.end {
            return Err(format!(
                "it read {name} [{start}, {end}), and the broker holds [{}, {})",
                range.low, range.end
            ));
        }
        plans.push(ReadPlan { topic_partition: name, start, end, low: range.low, tail: None });
    }
    match plans.is_empty() {
        true => Err("it read no records of the topics: it decoded letters again".to_owned()),
        false => Ok(plans),
    }
}

/// A microbatch whose letters are written again.
struct Again<'o, 'a> {
    owner: &'o mut Owner<'a>,
    reader: LaneReader,
    decoder: Decoder,
    memory: MemoryPlan,
    options: &'o RunOptions,
}

impl Again<'_, '_> {
    /// Writes them, compares what came out with what the record says, and lets the ledger name the new files.
    async fn write_and_name(mut self, rows_owed: u64) -> Result<(), Stop> {
        let role = Role::DeadLetters;
        let table = self.owner.side(role).clone();
        let mut writer = TableWriter::new(&table, Uuid::now_v7(), self.memory.writer, &[])
            .map_err(|error| unwritten(&table, error))?;
        let written = match self.write(&mut writer, &table).await {
            Ok((consumed, rows)) => self.compare(&table, consumed, (rows, rows_owed)).map(|()| rows),
            Err(stop) => Err(stop),
        };
        let files = match written {
            Ok(_) => writer.finish().await.map_err(|error| unwritten(&table, error)),
            Err(stop) => Err(stop),
        };
        let files = match files {
            Ok(files) => files,
            Err(stop) => {
                if let Err(error) = writer.abort().await {
                    tracing::warn!(%error, "files that nothing names are left to an orphan clean-up");
                }
                return Err(stop);
            }
        };
        let named = writer::files_to_json(&files, &table).map_err(|error| {
            let what = format!("files of table {} can not be named in the ledger", table.identifier());
            stops::data(what, error.reason(), error)
        })?;
        let what = format!(
            "{rows_owed} rows of batch {} for table {} were written again from their records",
            self.owner.record.batch,
            table.identifier()
        );
        let anew = side_record(table.identifier(), table.metadata(), Some(named));
        self.owner.owe_instead(vec![(role, anew)], Change { by: REREAD.to_owned(), what }).await
    }

    /// Gives the rows that were read, and the letters that the table lacked.
    async fn write(&mut self, writer: &mut TableWriter, table: &Table) -> Result<(u64, u64), Stop> {
        let job = &self.owner.world.loaded.job;
        let keys = KeyMaker::new(&self.decoder.schema(), job, self.owner.record.dedup.seed)?;
        let slots = letter_slots(&self.owner.record.topics, &self.reader.slots);
        let (mut consumed, mut rows) = (0, 0);
        let mut chunk = RecordChunk::default();
        loop {
            if self.options.interrupted() {
                return Err(stops::reread_interrupted(&self.options.job_shown));
            }
            if chrono::Utc::now().timestamp_millis() >= self.owner.heartbeat_ms() {
                self.owner.renew().await?;
            }
            chunk.clear();
            let status = self.reader.read(&mut chunk, self.limits()).map_err(stops::source)?;
            consumed += self.reader.drop_outside(&mut chunk);
            let decoded = self.decoder.decode(&chunk, &self.reader.slots).map_err(undecodable)?;
            consumed += decoded.consumed;
            let mut letters = self.letters(&keys, &chunk, decoded)?;
            let places: Vec<LetterPlace> =
                letters.iter().map(|letter| LetterPlace::of(letter, &slots)).collect();
            let known = dead_letters::known_places(table, &places).await.map_err(|error| {
                let what = format!("dead letters of table {} can not be looked up", table.identifier());
                stops::data(what, error.reason(), error)
            })?;
            let mut is_known = known.iter();
            letters.retain(|_| !is_known.next().expect("one answer for each letter"));
            rows += letters.len() as u64;
            let batch =
                dead_letters::rows(&letters, &slots, self.owner.record.batch).map_err(unexpected_arrow)?;
            writer.write(&batch).await.map_err(|error| unwritten(table, error))?;
            if status == ReadStatus::Exhausted {
                return Ok((consumed, rows));
            }
        }
    }

    fn limits(&self) -> ReadLimits {
        let bounded = |most: u64| usize::try_from(most).unwrap_or(usize::MAX);
        ReadLimits {
            records_max: bounded(self.memory.chunk_records_max()),
            bytes_max: bounded(self.memory.chunk_payload_bytes_max()),
            deadline: Instant::now() + READ_TURN_MAX,
        }
    }

    /// Rows that were refused, for what they are or for their time.
    fn letters(
        &self,
        keys: &KeyMaker,
        chunk: &RecordChunk,
        mut decoded: Decoded,
    ) -> Result<Vec<DeadLetter>, Stop> {
        let id_times = keys.id_times(&decoded.rows)?;
        let bucket_from = &self.owner.world.loaded.job.dedup.bucket_from;
        let mut letters = std::mem::take(&mut decoded.letters);
        for row in 0..decoded.places.len() {
            let (time, timestamp) = (decoded.event_times[row], decoded.timestamps_ms[row]);
            let limit = self.reader.lateness.limit(timestamp, self.owner.record.cut_time_ms);
            let of_id = id_times.as_ref().and_then(|times| late::judge_id(bucket_from, times[row], limit));
            let refused = of_id.or_else(|| (time > limit).then(|| late::ahead(time, limit)));
            if let Some((code, text)) = refused {
                letters.push(decoded.letter_for(chunk, row, code, &text));
            }
        }
        Ok(letters)
    }

    /// Whether what was read is what the microbatch read, as far as its record can tell.
    fn compare(&self, table: &Table, consumed: u64, (rows, rows_owed): (u64, u64)) -> Result<(), Stop> {
        let record = &self.owner.record;
        let name = table.identifier().to_string();
        let refuse = |why: String| Err(refusal(&name, record.batch, &why, self.options));
        let lane = &record.lanes[lane_of(record)];
        for (slot, tail) in self.reader.reached().tails.iter().cloned().enumerate() {
            let place = &self.reader.slots[slot];
            let cursor = lane.topics.get(&place.topic).and_then(|known| known.get(&place.partition));
            let then = cursor.and_then(|cursor| cursor.tail.filter(|tail| tail.offset >= cursor.start.get()));
            let differs =
                |then: &Tail| tail.is_none_or(|now| (now.offset, now.hash) != (then.offset, then.hash));
            if then.as_ref().is_some_and(differs) {
                return refuse(format!("the last record of {place} is not the one that it read"));
            }
        }
        if consumed != record.counts.consumed {
            return refuse(format!("it took {} rows, and there are {consumed} now", record.counts.consumed));
        }
        if mutant!("reread-not-compared", false => rows != rows_owed) {
            return refuse(format!("it owed {rows_owed} rows, and {rows} come of its records now"));
        }
        Ok(())
    }
}
