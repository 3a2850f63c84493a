//! One microbatch: what one commit carries.
//!
//! Flow: [`RecordChunk`] -> rows and letters -> time verdicts -> first-seen rows -> data files -> commit -> side tables
//!
//! A microbatch is read in probe batches bounded by the memory plan. Each is decoded, judged, probed and written before
//! the next is read, so rows never wait for a verdict and memory does not depend on the size of the microbatch, but for
//! its pending keys, which the memory plan bounds.
//!
//! A batch that ends before its commit was sent leaves nothing: keys are abandoned, files deleted best effort. Once it
//! was sent, files stay whatever happens.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, BooleanArray, RecordBatch};
use arrow::compute::filter_record_batch;
use iceberg::spec::DataFile;
use iceberg::table::Table;
use uuid::Uuid;

use super::rebuild::{load, total};
use super::report::{Event, Report};
use super::session::{Session, complete_since};
use super::stops;
use crate::commit::ledger::{BucketRecord, Cursor, EraRecord, Kind, LIVE_LANE, LedgerRecord, Tail};
use crate::counts::Counts;
use crate::decode::{Decoded, metadata};
use crate::dedup::{self, BucketTally, Era, GenerationName, Key, StoreError, Verdict};
use crate::event_time::EventTimeMs;
use crate::job::{BRAKE_RECORDS_MIN, BucketFrom};
use crate::lateness::TimeVerdict;
use crate::letter::{DeadLetter, ReasonCode};
use crate::offset::{Place, TopicId};
use crate::record::RecordChunk;
use crate::sink::dead_letters::{self, LetterPlace};
use crate::sink::scan::ScanError;
use crate::sink::writer::{self, TableWriter, WriteError};
use crate::source::{ReadLimits, ReadStatus};
use crate::stop::{Reason, Stop};

/// Longest wait for records before a signal is looked for.
const READ_TURN_MAX: Duration = Duration::from_millis(250);
/// Reasons that a tripped brake names.
const BRAKE_REASONS_SHOWN: usize = 3;

/// A microbatch that landed.
pub(super) struct Landed {
    pub(super) counts: Counts,
    batch: u64,
    snapshot_id: i64,
    data_files: usize,
    sends: u32,
    lag: u64,
    watermark: Option<EventTimeMs>,
    complete_since: Option<String>,
    buckets_lent: u64,
}

impl Landed {
    pub(super) fn event(&self) -> Event {
        Event::Commit {
            batch: self.batch,
            counts: self.counts,
            snapshot_id: self.snapshot_id,
            data_files: self.data_files,
            sends: self.sends,
            lag: self.lag,
            watermark: self.watermark.map(|time| time.to_string()),
            complete_since: self.complete_since.clone(),
            buckets_lent: self.buckets_lent,
        }
    }
}

/// What the ledger will say of a microbatch.
#[derive(Debug, Clone, Copy)]
struct Cut {
    number: u64,
    attempt: Uuid,
    cut_time_ms: i64,
    counts: Counts,
}

/// A microbatch in the making.
struct Open {
    cut: Cut,
    payload_bytes: u64,
    /// When it closes whatever it holds; `None` before its first record.
    due: Option<Instant>,
    main: TableWriter,
    dead: TableWriter,
    /// By reason: how often, and the first place.
    refused: BTreeMap<ReasonCode, (u64, Place, String)>,
    /// Buckets read from the table for it.
    buckets_lent: u64,
    first_byte: bool,
}

impl Open {
    fn is_due(&self) -> bool {
        self.due.is_some_and(|due| Instant::now() >= due)
    }
}

/// A microbatch whose files and state are durable: only the commit is missing.
struct Built {
    next: LedgerRecord,
    files: Vec<DataFile>,
}

impl Session<'_> {
    /// Reads, decides, writes and commits one microbatch.
    pub(super) async fn microbatch(
        &mut self,
        consumed_before: u64,
        report: &mut dyn Report,
    ) -> Result<Landed, Stop> {
        let mut open = self.begin()?;
        match self.build(&mut open, consumed_before, report).await {
            Ok(built) => self.commit_batch(open.cut, built, open.buckets_lent).await,
            Err(stop) => {
                self.drop_batch(open).await;
                Err(stop)
            }
        }
    }

    /// Everything before the commit is sent: until then the batch can be dropped without a trace.
    async fn build(
        &mut self,
        open: &mut Open,
        consumed_before: u64,
        report: &mut dyn Report,
    ) -> Result<Built, Stop> {
        self.fill(open, consumed_before, report).await?;
        self.check(open)?;
        self.prepare(open).await
    }

    /// Nothing was sent, so nothing can name these files.
    async fn drop_batch(&mut self, open: Open) {
        self.store.abandon();
        for writer in [open.main, open.dead] {
            if let Err(error) = writer.abort().await {
                tracing::warn!(%error, "files of a dropped batch are left to an orphan clean-up");
            }
        }
    }

    fn begin(&mut self) -> Result<Open, Stop> {
        let attempt = Uuid::now_v7();
        let key = &self.owner.loaded.job.dedup.key;
        let (main_bytes, dead_bytes) = (self.memory.writer * 3 / 4, self.memory.writer / 4);
        let (main, dead) = (&self.owner.main, &self.owner.dead);
        let main =
            TableWriter::new(main, attempt, main_bytes, key).map_err(|error| unwritten(main, error))?;
        let dead =
            TableWriter::new(dead, attempt, dead_bytes, &[]).map_err(|error| unwritten(dead, error))?;
        Ok(Open {
            cut: Cut {
                number: self.owner.record.batch + 1,
                attempt,
                cut_time_ms: chrono::Utc::now().timestamp_millis(),
                counts: Counts::default(),
            },
            payload_bytes: 0,
            due: None,
            main,
            dead,
            refused: BTreeMap::new(),
            buckets_lent: 0,
            first_byte: false,
        })
    }

    /// Takes probe batches until the microbatch is full, its time is up, or the topics are read.
    async fn fill(
        &mut self,
        open: &mut Open,
        consumed_before: u64,
        report: &mut dyn Report,
    ) -> Result<(), Stop> {
        let mut chunk = RecordChunk::default();
        self.options.phases.reach("read");
        while let Some(limits) = self.next_chunk_limits(open) {
            chunk.clear();
            self.read_chunk(open, &mut chunk, limits)?;
            if !chunk.is_empty() {
                open.payload_bytes += chunk.payload_bytes() as u64;
                self.probe_batch(open, &chunk).await?;
            }
            report.event(&Event::Progress {
                batch: open.cut.number,
                consumed: consumed_before + open.cut.counts.consumed,
                lag: self.lag(),
            });
        }
        Ok(())
    }

    /// Bounds of the next probe batch; `None` when the microbatch is to be closed.
    fn next_chunk_limits(&self, open: &Open) -> Option<ReadLimits> {
        let limits = &self.owner.loaded.job.microbatch;
        let records_left = limits.records_max.saturating_sub(open.cut.counts.consumed);
        let bytes_left = limits.payload_bytes_max.saturating_sub(open.payload_bytes);
        let keys_full = self.store.pending_bytes() >= self.memory.pending_bytes_max();
        let full = records_left == 0 || bytes_left == 0 || keys_full;
        let bounded = |left: u64, most: u64| usize::try_from(left.min(most)).unwrap_or(usize::MAX);
        (!full && !self.exhausted() && !open.is_due()).then(|| ReadLimits {
            records_max: bounded(records_left, self.memory.probe_records_max()),
            bytes_max: bounded(bytes_left, self.memory.probe_payload_bytes_max()),
            deadline: Instant::now(),
        })
    }

    /// Reads until the chunk is at its bounds or the microbatch is due, in turns short enough that a signal is heard. A
    /// microbatch's time begins with its first record.
    fn read_chunk(
        &mut self,
        open: &mut Open,
        chunk: &mut RecordChunk,
        limits: ReadLimits,
    ) -> Result<(), Stop> {
        loop {
            if self.options.interrupted() {
                return Err(stops::interrupted());
            }
            let turn_end = Instant::now() + READ_TURN_MAX;
            let deadline = open.due.map_or(turn_end, |due| due.min(turn_end));
            let status =
                self.reader.read(chunk, ReadLimits { deadline, ..limits }).map_err(stops::reading)?;
            if open.due.is_none() && !chunk.is_empty() {
                open.due = Some(Instant::now() + self.owner.loaded.job.microbatch.open_time_max);
            }
            if status != ReadStatus::DeadlinePassed || open.is_due() {
                return Ok(());
            }
        }
    }

    /// One probe batch through every stage.
    async fn probe_batch(&mut self, open: &mut Open, chunk: &RecordChunk) -> Result<(), Stop> {
        let mut decoded = self.decoder.decode(chunk, &self.slots).map_err(|error| {
            let way_out = "nothing of this batch is visible; lower memory, which makes chunks smaller";
            Stop::new(Reason::Unexpected, "records can not be decoded", way_out).because(error)
        })?;
        open.cut.counts.consumed += decoded.consumed;
        let id_times = self.keys.id_times(&decoded.rows)?;
        let (kept, mut letters) = self.judge_time(open, chunk, &decoded, id_times.as_deref());
        letters.append(&mut decoded.letters);
        // The bucket of a key is told by its id where ids tell the time; rows whose id does not were refused.
        let bucket_times: Vec<EventTimeMs> = match &id_times {
            Some(times) => times.iter().map(|time| time.unwrap_or(EventTimeMs(0))).collect(),
            None => decoded.event_times.clone(),
        };
        let first_seen = self.drop_repeats(open, &decoded, kept, &bucket_times).await?;
        self.write_rows(open, &decoded, &first_seen).await?;
        self.write_letters(open, letters).await
    }

    /// Which rows go on, and letters for those too far ahead, and for those whose id should tell the time and does not.
    /// A row that is refused moves no watermark.
    fn judge_time(
        &mut self,
        open: &mut Open,
        chunk: &RecordChunk,
        decoded: &Decoded,
        id_times: Option<&[Option<EventTimeMs>]>,
    ) -> (Vec<bool>, Vec<DeadLetter>) {
        let mut letters = Vec::new();
        let mut kept = Vec::with_capacity(decoded.places.len());
        for (row, place) in decoded.places.iter().enumerate() {
            let (time, timestamp) = (decoded.event_times[row], decoded.timestamps_ms[row]);
            if let Some(times) = id_times
                && let Some((code, text)) = self.judge_id(times[row], timestamp, open.cut.cut_time_ms)
            {
                letters.push(decoded.letter_for(chunk, row, code, &text));
                kept.push(false);
                continue;
            }
            let verdict = self.lateness.judge(place.slot, time, timestamp, open.cut.cut_time_ms);
            if let TimeVerdict::Ahead { limit } = verdict {
                let text = format!(
                    "event time {time} is ahead of {limit}, the latest that event_time.max_ahead believes of this record"
                );
                letters.push(decoded.letter_for(chunk, row, ReasonCode::EventTimeAhead, &text));
            }
            open.cut.counts.late += u64::from(verdict == TimeVerdict::Late);
            kept.push(!matches!(verdict, TimeVerdict::Ahead { .. }));
        }
        (kept, letters)
    }

    /// Why a row is refused for the time in its id, if it is.
    fn judge_id(
        &self,
        time: Option<EventTimeMs>,
        timestamp_ms: Option<i64>,
        cut_time_ms: i64,
    ) -> Option<(ReasonCode, String)> {
        let BucketFrom::Id { kind, column } = &self.owner.loaded.job.dedup.bucket_from else { return None };
        let Some(time) = time else {
            let text = format!("column {column}: no {} that tells its time", kind.name());
            return Some((ReasonCode::IdWithoutTime, text));
        };
        let limit = self.lateness.limit(timestamp_ms, cut_time_ms);
        (time > limit).then(|| {
            let text = format!(
                "column {column}: the id was made at {time}, ahead of {limit}, the latest that event_time.max_ahead \
                 believes of this record"
            );
            (ReasonCode::EventTimeAhead, text)
        })
    }

    /// Reads the buckets of these keys that have left the state from the table, all in one scan, so that the probe can
    /// tell what is new in them (`beyond_window = "check"`).
    async fn lend(&mut self, open: &mut Open, keys: &[Key]) -> Result<(), Stop> {
        let missing = self.store.missing_buckets(keys);
        if missing.is_empty() {
            return Ok(());
        }
        let begun = Instant::now();
        let (loan, rows) = load(&mut self.owner, &self.keys, &self.memory, &self.store, &missing).await?;
        tracing::info!(
            buckets = missing.len(),
            rows,
            keys = loan.keys(),
            seconds = begun.elapsed().as_secs_f64(),
            "buckets beyond the window were read from the table"
        );
        self.store.borrow(loan);
        open.buckets_lent += missing.len() as u64;
        Ok(())
    }

    /// Marks rows whose key was not seen before. Keys are probed in the order of their places, so that of two copies in
    /// one probe batch the one at the lowest place wins (R2).
    async fn drop_repeats(
        &mut self,
        open: &mut Open,
        decoded: &Decoded,
        kept: Vec<bool>,
        bucket_times: &[EventTimeMs],
    ) -> Result<BooleanArray, Stop> {
        let fingerprints = self.keys.fingerprints(&decoded.rows)?;
        let mut order: Vec<usize> = (0..kept.len()).filter(|&row| kept[row]).collect();
        order.sort_unstable_by_key(|&row| decoded.places[row]);
        let keys: Vec<Key> = order
            .iter()
            .map(|&row| Key { fingerprint: fingerprints[row], event_time: bucket_times[row] })
            .collect();
        self.lend(open, &keys).await?;
        let verdicts = self.store.probe(&keys).map_err(|error| self.state_failed(error))?;
        let mut first_seen = vec![false; kept.len()];
        for (&row, verdict) in order.iter().zip(&verdicts) {
            first_seen[row] = *verdict == Verdict::New;
        }
        let new = verdicts.iter().filter(|verdict| **verdict == Verdict::New).count() as u64;
        open.cut.counts.written += new;
        open.cut.counts.duplicate += verdicts.len() as u64 - new;
        Ok(BooleanArray::from(first_seen))
    }

    async fn write_rows(
        &mut self,
        open: &mut Open,
        decoded: &Decoded,
        first_seen: &BooleanArray,
    ) -> Result<(), Stop> {
        if first_seen.true_count() == 0 {
            return Ok(());
        }
        if !open.first_byte {
            open.first_byte = true;
            self.options.phases.reach("first_data_file_byte");
        }
        let batch = i64::try_from(open.cut.number).expect("a batch number below 2^63");
        let metadata =
            metadata::metadata_columns(&self.slots, &decoded.places, &decoded.timestamps_ms, batch);
        let rows = with_metadata(&decoded.rows, metadata)?;
        let rows = filter_record_batch(&rows, first_seen).map_err(unexpected_arrow)?;
        open.main.write(&rows).await.map_err(|error| unwritten(&self.owner.main, error))
    }

    /// Letters that do not stand in the dead-letter table yet, once per place.
    async fn write_letters(&mut self, open: &mut Open, mut letters: Vec<DeadLetter>) -> Result<(), Stop> {
        if letters.is_empty() {
            return Ok(());
        }
        for letter in &letters {
            let entry =
                open.refused.entry(letter.code).or_insert_with(|| (0, letter.place, letter.text.clone()));
            entry.0 += 1;
        }
        let table = self.owner.dead_ident.to_string();
        let failed = |error: ScanError| {
            stops::data(format!("dead letters of table {table} can not be looked up"), error.reason(), error)
        };
        let slots = self.letter_slots();
        let places: Vec<LetterPlace> = letters.iter().map(|letter| LetterPlace::of(letter, &slots)).collect();
        let known = dead_letters::known_places(&self.owner.dead, &places).await.map_err(failed)?;
        let letters_count = letters.len() as u64;
        let mut is_known = known.iter();
        letters.retain(|_| !is_known.next().expect("one answer for each letter"));
        open.cut.counts.dead_letter += letters.len() as u64;
        open.cut.counts.dead_letter_known += letters_count - letters.len() as u64;
        if letters.is_empty() {
            return Ok(());
        }
        let rows = dead_letters::rows(&letters, &slots, open.cut.number).map_err(unexpected_arrow)?;
        open.dead.write(&rows).await.map_err(|error| unwritten(&self.owner.dead, error))
    }

    /// Topic partitions as dead letters name them. Where the broker gives no topic id, one is derived from the name.
    fn letter_slots(&self) -> Vec<dead_letters::Slot> {
        let topics = &self.owner.record.topics;
        self.slots
            .iter()
            .map(|name| dead_letters::Slot {
                topic: name.topic.clone(),
                topic_id: topics
                    .get(&name.topic)
                    .copied()
                    .flatten()
                    .unwrap_or_else(|| id_of_name(&name.topic)),
                partition: name.partition,
            })
            .collect()
    }

    /// What must hold before anything is sent.
    fn check(&self, open: &Open) -> Result<(), Stop> {
        assert!(
            open.cut.counts.conserved(),
            "every consumed row has exactly one outcome: {:?}",
            open.cut.counts
        );
        let letters = open.cut.counts.dead_letter + open.cut.counts.dead_letter_known;
        let ratio = letters as f64 / open.cut.counts.consumed.max(1) as f64;
        let ratio_max = self.owner.loaded.job.sink.dead_letters.ratio_max;
        if open.cut.counts.consumed >= BRAKE_RECORDS_MIN && ratio > ratio_max {
            return Err(self.brake(open, letters, ratio, ratio_max));
        }
        Ok(())
    }

    fn brake(&self, open: &Open, letters: u64, ratio: f64, ratio_max: f64) -> Stop {
        let mut reasons: Vec<_> = open.refused.iter().collect();
        reasons.sort_by_key(|(_, (count, _, _))| std::cmp::Reverse(*count));
        let shown: Vec<String> = reasons
            .iter()
            .take(BRAKE_REASONS_SHOWN)
            .map(|(code, (count, place, text))| {
                let name = &self.slots[place.slot as usize];
                format!(
                    "  {count} x {code}, first at {name} offset {} index {}: {text}",
                    place.offset, place.row_index
                )
            })
            .collect();
        Stop::new(
            Reason::Brake,
            format!(
                "{letters} of {} rows are dead letters, {:.1} % where {:.1} % are allowed; most frequent:\n{}",
                open.cut.counts.consumed,
                ratio * 100.0,
                ratio_max * 100.0,
                shown.join("\n")
            ),
            format!(
                "nothing was committed and the offsets stay; mend the producer or the job's columns, or let them through \
                 once:\n  tidemill run {} --set sink.iceberg.dead_letters.max_ratio=1.0",
                self.options.job_shown
            ),
        )
    }

    /// Steps 1 and 2 of the commit module: data files of all tables, then the generation, each durable.
    async fn prepare(&mut self, open: &mut Open) -> Result<Built, Stop> {
        let (main, dead) = (&self.owner.main, &self.owner.dead);
        let files = open.main.finish().await.map_err(|error| unwritten(main, error))?;
        let dead_files = open.dead.finish().await.map_err(|error| unwritten(dead, error))?;
        self.options.phases.reach("data_files_closed");
        let name = GenerationName::new(self.owner.record.epoch, open.cut.number, open.cut.attempt);
        if let Some(watermark) = self.watermark() {
            self.store.expire_behind(watermark, self.owner.loaded.job.dedup.window);
        }
        let generation = self.store.prepare(name).map_err(|error| self.state_failed(error))?;
        self.options.phases.reach("state_prepared");
        let owed = (!dead_files.is_empty())
            .then(|| writer::files_to_json(&dead_files, &self.owner.dead))
            .transpose()
            .map_err(|error| {
                let what = format!("files of table {} can not be named in the ledger", self.owner.dead_ident);
                stops::data(what, error.reason(), error)
            })?;
        let mut next = self.next_record(open.cut, owed);
        let total = total(self.store.buckets());
        next.dedup.generation = Some(generation.name.to_string());
        next.dedup.checksum = Some(generation.checksum);
        next.dedup.floor = self.store.floor();
        next.dedup.bucket_width_ms = self.store.bucket_width_ms();
        next.dedup.eras = self.store.eras().iter().map(era_record).collect();
        let since = self.store.complete_since();
        next.dedup.complete_since = (since.0 > i64::MIN).then_some(since);
        (next.dedup.keys, next.dedup.digest) = (total.keys, total.digest.to_string());
        next.buckets = self.store.buckets().iter().map(bucket_record).collect();
        Ok(Built { next, files })
    }

    /// A damaged file is set aside, so that the next start misses it and rebuilds the state, as its stop says.
    fn state_failed(&self, error: StoreError) -> Stop {
        let folder = super::survey::state_folder(&self.owner.loaded.job);
        if let StoreError::Corrupt { file, .. } = &error
            && let Err(error) = dedup::set_aside(&folder, file)
        {
            tracing::warn!(%error, file, "a damaged state file could not be set aside; delete it");
        }
        stops::state(&folder, error)
    }

    /// Steps 3 to 5 of the commit module: main, side tables, publish.
    async fn commit_batch(&mut self, cut: Cut, built: Built, buckets_lent: u64) -> Result<Landed, Stop> {
        let Built { next, files } = built;
        let (watermark, data_files) = (next.live().watermark, files.len());
        let sends = self.owner.commit(next, files).await?;
        self.owner.forward_sides().await?;
        self.store.publish();
        self.options.phases.reach("published");
        self.sweep_retired();
        self.tell_lag_tools();
        self.buckets_lent += buckets_lent;
        Ok(Landed {
            counts: cut.counts,
            batch: cut.number,
            snapshot_id: self.owner.main.metadata().current_snapshot_id().unwrap_or_default(),
            data_files,
            sends,
            lag: self.lag(),
            watermark,
            complete_since: complete_since(&self.owner.record),
            buckets_lent,
        })
    }

    /// The live lane's watermark with what was read so far.
    fn watermark(&self) -> Option<EventTimeMs> {
        self.lateness.watermark(self.owner.record.live().watermark, &self.reader.at_end())
    }

    /// The record of this microbatch, but for its dedup state.
    fn next_record(&self, cut: Cut, owed: Option<Vec<serde_json::Value>>) -> LedgerRecord {
        let before = &self.owner.record;
        let last = self.exhausted();
        let metadata = self.owner.main.metadata();
        let mut next = LedgerRecord {
            kind: Kind::Data,
            batch: cut.number,
            last_batch_with_rows: if cut.counts.written > 0 {
                cut.number
            } else {
                before.last_batch_with_rows
            },
            cut_time_ms: cut.cut_time_ms,
            schema_id: metadata.current_schema_id(),
            spec_id: metadata.default_partition_spec_id(),
            job_hash: self.owner.loaded.resolved_hash.clone(),
            counts: cut.counts,
            released: last && owed.is_none(),
            jumps: Vec::new(),
            ..before.clone()
        };
        next.sides.insert(super::survey::DEAD_LETTERS.to_owned(), self.dead_letter_record(owed));
        let (positions, tails) = (self.reader.positions(), self.reader.tails());
        let watermark = self.watermark();
        let lane = next.lanes.entry(LIVE_LANE.to_owned()).or_default();
        lane.watermark = watermark;
        for (slot, name) in self.slots.iter().enumerate() {
            let known = before.cursor(&name.topic, name.partition);
            let start = known.map_or(self.starts[slot], |cursor| cursor.end);
            let tail = tails[slot].map(|tail| Tail { offset: tail.offset, hash: tail.hash });
            let cursor = Cursor {
                start,
                end: positions[slot],
                tail: tail.or_else(|| known.and_then(|cursor| cursor.tail)),
                max_event_time: self.lateness.max_event_times()[slot],
            };
            assert!(cursor.end >= cursor.start, "offsets of {name} never move back");
            lane.topics.entry(name.topic.clone()).or_default().insert(name.partition, cursor);
        }
        next
    }
}

/// Stands for the id of a topic whose broker gives none.
fn id_of_name(topic: &str) -> TopicId {
    TopicId(Uuid::from_u128(xxhash_rust::xxh3::xxh3_128(topic.as_bytes())))
}

fn era_record(era: &Era) -> EraRecord {
    EraRecord { until: era.until, bucket_width_ms: era.bucket_width_ms }
}

fn bucket_record(bucket: &BucketTally) -> BucketRecord {
    BucketRecord {
        from: bucket.from.0,
        to: bucket.to.0,
        count: bucket.keys,
        digest: bucket.digest.to_string(),
    }
}

/// Names the place too, so that a full disk is found.
fn unwritten(table: &Table, error: WriteError) -> Stop {
    let (name, place) = (table.identifier(), table.metadata().location());
    stops::data(format!("data files of table {name} in {place} can not be written"), error.reason(), error)
}

fn unexpected_arrow(error: impl std::error::Error + Send + Sync + 'static) -> Stop {
    Stop::new(Reason::Unexpected, "rows do not fit together", "nothing was committed; please report this")
        .because(error)
}

/// The decoder's columns and then the metadata columns.
fn with_metadata(rows: &RecordBatch, metadata: Vec<ArrayRef>) -> Result<RecordBatch, Stop> {
    let schema = rows.schema();
    let mut fields: Vec<arrow::datatypes::FieldRef> = schema.fields().iter().cloned().collect();
    fields.extend(metadata::metadata_fields().into_iter().map(Arc::new));
    let mut columns = rows.columns().to_vec();
    columns.extend(metadata);
    RecordBatch::try_new(Arc::new(arrow::datatypes::Schema::new(fields)), columns).map_err(unexpected_arrow)
}
