//! One microbatch: what one commit carries.
//!
//! Flow: [`RecordChunk`] -> rows and letters -> time verdicts -> first-seen rows -> data files -> commit -> side tables
//!
//! A microbatch is read in chunks bounded by the memory plan. Each is judged, looked up and given to its writers before the next
//! is judged, unless the state is larger than memory: then keys of many chunks are looked up together (`gather`). So memory
//! does not depend on the size of the microbatch, but for its pending keys, which the memory plan bounds. The next chunk is read
//! and decoded meanwhile (`ahead`), and rows of those before are encoded (`writing`).
//!
//! A batch that ends before its commit was sent leaves nothing: keys are abandoned, files deleted best effort. Once it
//! was sent, files stay whatever happens.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use iceberg::spec::DataFile;
use iceberg::table::Table;
use uuid::Uuid;

use super::backfill::resume_command;
use super::gather::{self, Gathered};
use super::lanes::{self, LaneReader};
use super::late::{self, Fate, Judged};
use super::owner::Owner;
use super::profile::Stage;
use super::rebuild::load;
use super::report::{Event, Report, Unheard};
use super::requests;
use super::session::{Session, complete_since};
use super::state::KeyState;
use super::stops;
use super::world::Outside;
use super::writing::Writing;
use crate::commit::ledger::{LIVE_LANE, LedgerRecord, Tail};
use crate::commit::side::Role;
use crate::counts::Counts;
use crate::decode::{DecodeError, Decoded};
use crate::dedup::Key;
use crate::event_time::EventTimeMs;
use crate::job::{BRAKE_RECORDS_MIN, BeyondWindow};
use crate::lateness::TimeVerdict;
use crate::letter::{DeadLetter, ReasonCode};
use crate::mutant;
use crate::offset::{Place, TopicId, TopicPartition};
use crate::protocol::{Built, Cut, Life, Reached};
use crate::record::RecordChunk;
use crate::sink::dead_letters::{self, LetterPlace};
use crate::sink::scan::ScanError;
use crate::sink::writer::{self, TableWriter, WriteError};
use crate::source::{ReadLimits, ReadStatus};
use crate::stop::{Reason, Stop};

/// Longest wait for records before a signal is looked for.
pub(super) const READ_TURN_MAX: Duration = Duration::from_millis(250);
/// Reasons that a tripped brake names.
const BRAKE_REASONS_SHOWN: usize = 3;

/// A microbatch in the making.
pub(super) struct Open {
    pub(super) number: u64,
    attempt: Uuid,
    cut_time_ms: i64,
    pub(super) counts: Counts,
    payload_bytes: u64,
    /// When it closes whatever it holds; `None` before its first record.
    due: Option<Instant>,
    pub(super) main: Writing,
    /// Whether the run takes no microbatch after it, as far as is known.
    pub(super) is_last: bool,
    /// Of the side tables that the job has.
    pub(super) sides: BTreeMap<Role, TableWriter>,
    /// By reason: how often, and the first place.
    refused: BTreeMap<ReasonCode, (u64, Place, String)>,
    /// Buckets read from the table for it.
    pub(super) buckets_lent: u64,
    pub(super) first_byte: bool,
    /// Whether its lane gives no more now.
    is_cut_short: bool,
    /// Data files of the main table.
    pub(super) data_files: usize,
    /// Rows that wait for their verdict.
    pub(super) gathered: Gathered,
}

impl Open {
    /// Deletes the files of a microbatch that was never sent, as far as that works.
    pub(super) async fn discard(self) {
        let mut aborted = vec![self.main.abort().await];
        for writer in self.sides.into_values() {
            aborted.push(writer.abort().await);
        }
        for error in aborted.into_iter().filter_map(Result::err) {
            tracing::warn!(%error, "files of a dropped batch are left to an orphan clean-up");
        }
    }

    /// Whether its lane gives no more now.
    pub(super) fn is_cut_short(&self) -> bool {
        self.is_cut_short
    }

    /// Whether the time from its first record is up.
    pub(super) fn is_due(&self) -> bool {
        self.due.is_some_and(|due| Instant::now() >= due)
    }
}

/// Keys of a chunk that are to be looked up, each with the row that it is of; in the order of their places.
pub(super) struct Asked {
    pub(super) rows: Vec<u32>,
    pub(super) keys: Vec<Key>,
}

/// A run's microbatches, and what it tells of them.
pub(super) struct Run<'r, 'a> {
    pub(super) session: &'r mut Session<'a>,
    pub(super) report: &'r mut dyn Report,
    /// Outcomes of the microbatches that landed.
    pub(super) counts: Counts,
    /// How many landed.
    pub(super) batches: u64,
    /// Whether a continuous run found other topics than those it began with.
    pub(super) topics_changed: bool,
    /// When a continuous run loaded its table last to see what others ask.
    pub(super) requests_seen_at: Instant,
    open: Option<Open>,
}

impl<'r, 'a> Run<'r, 'a> {
    /// `counts` and `batches` are those of lives before in this process.
    pub(super) fn new(
        session: &'r mut Session<'a>,
        report: &'r mut dyn Report,
        counts: Counts,
        batches: u64,
    ) -> Self {
        Self {
            session,
            report,
            counts,
            batches,
            topics_changed: false,
            requests_seen_at: Instant::now(),
            open: None,
        }
    }

    /// Whether the microbatch that is open is the last of those that the run may take.
    pub(super) fn is_last_batch(&self) -> bool {
        self.session.options.batches_max.is_some_and(|most| self.batches + 1 >= most)
    }

    /// Whether the run was asked to end, by a signal, its time or its number of microbatches.
    pub(super) fn is_ending(&self) -> bool {
        let most = self.session.options.batches_max;
        self.session.options.is_ending() || most.is_some_and(|most| self.batches >= most)
    }
}

impl<'a> Life for Run<'_, 'a> {
    type World = Outside<'a>;
    type State = KeyState;

    fn owner(&mut self) -> &mut Owner<'a> {
        &mut self.session.owner
    }

    fn state(&mut self) -> &mut KeyState {
        &mut self.session.state
    }

    async fn turn(&mut self) -> Result<bool, Stop> {
        if let Some(stop) = self.session.lanes.ends_with.take() {
            return Err(stop);
        }
        self.session.pause_unread(self.report).await?;
        requests::take(&mut self.session.owner, self.report).await?;
        Ok(!self.is_ending() && self.session.choose_lane(None, self.report).await?)
    }

    async fn maintain(&mut self) -> Result<(), Stop> {
        self.session.options.profile.turn_to(Stage::Maintenance);
        let maintained = self.session.maintain_if_due(self.report).await;
        self.session.options.profile.turn_to(Stage::Other);
        maintained
    }

    async fn build(&mut self) -> Result<Option<Built<DataFile>>, Stop> {
        let is_last = self.is_last_batch();
        let open = self.open.insert(self.session.begin()?);
        open.is_last = is_last;
        let filled = self.session.fill(open, self.counts.consumed, self.report).await;
        if let Err(stop) = filled.and_then(|()| self.session.check(open)) {
            return self.session.lanes.put_off(stop).map(|()| None);
        }
        if open.counts.consumed == 0 && (open.is_cut_short || self.session.options.is_ending()) {
            return Ok(None);
        }
        self.session.finish(open).await.map(Some)
    }

    async fn commit(&mut self, next: LedgerRecord, files: Vec<DataFile>) -> Result<u32, Stop> {
        let sends = self.commit_beside_reading(next, files).await;
        self.session.options.profile.turn_to(Stage::SideTables);
        sends
    }

    async fn discard(&mut self) {
        crate::crash_point!("batch_to_drop");
        let Some(open) = self.open.take() else { return };
        open.discard().await;
        crate::crash_point!("batch_dropped");
    }

    fn landed(&mut self, cut: Cut, sends: u32) {
        let Some(open) = self.open.take() else { return };
        crate::crash_point!("state_swept");
        let event = self.session.committed(&open, &cut, self.session.lag(), sends);
        self.session.lanes.landed(&self.session.owner.record);
        self.session.copy_state();
        if cut.lane == LIVE_LANE {
            self.session.tell_lag_tools();
        }
        crate::crash_point!("lag_tools_told");
        self.session.watch.landed(self.report);
        self.session.buckets_lent += open.buckets_lent;
        self.counts.add(&cut.counts);
        self.batches += 1;
        self.report.event(&event);
        self.session.options.profile.turn_to(Stage::Other);
    }
}

impl Session<'_> {
    /// What is told of a microbatch that landed.
    pub(super) fn committed(&self, open: &Open, cut: &Cut, lag: u64, sends: u32) -> Event {
        Event::Commit {
            batch: cut.number,
            counts: cut.counts,
            snapshot_id: self.owner.main.metadata().current_snapshot_id().unwrap_or_default(),
            data_files: open.data_files,
            sends,
            lag,
            lane: Some(&cut.lane).filter(|lane| *lane != LIVE_LANE).cloned(),
            watermark: cut.watermark.map(|time| time.to_string()),
            complete_since: complete_since(&self.owner.record),
            buckets_lent: open.buckets_lent,
        }
    }

    pub(super) fn begin(&mut self) -> Result<Open, Stop> {
        self.plan_gathering()?;
        let attempt = Uuid::now_v7();
        let key = &self.owner.world.loaded.job.dedup.key;
        let main_bytes = self.memory.writer * 3 / 4;
        let side_bytes = self.memory.writer / 4 / self.owner.sides.len().max(1) as u64;
        let writer = |table: &Table, bytes, key: &[String]| {
            TableWriter::new(table, attempt, bytes, key).map_err(|error| unwritten(table, error))
        };
        let state_dir = &self.owner.world.loaded.job.state_dir;
        let main = self.writing.lend(writer(&self.owner.main, main_bytes, key)?.waiting_in(state_dir));
        let mut sides = BTreeMap::new();
        for (role, table) in &self.owner.sides {
            let key: &[String] = if role.holds_keys() { key } else { &[] };
            sides.insert(*role, writer(table, side_bytes, key)?);
        }
        Ok(Open {
            number: self.owner.record.batch + mutant!("batch-number-skips", 2 => 1),
            attempt,
            cut_time_ms: chrono::Utc::now().timestamp_millis(),
            counts: Counts::default(),
            payload_bytes: 0,
            due: None,
            is_last: false,
            main,
            sides,
            refused: BTreeMap::new(),
            buckets_lent: 0,
            first_byte: false,
            is_cut_short: false,
            data_files: 0,
            gathered: Gathered::new(state_dir),
        })
    }

    /// Takes chunks until the microbatch is full, its time is up, or the topics are read.
    async fn fill(
        &mut self,
        open: &mut Open,
        consumed_before: u64,
        report: &mut dyn Report,
    ) -> Result<(), Stop> {
        self.options.phases.reach("read");
        while let Some(limits) = self.next_chunk_limits(open) {
            if let Some((chunk, decoded)) = self.next_chunk(open, limits, report)? {
                self.take_chunk(open, chunk, decoded).await?;
            }
            if open.is_due() {
                // What comes next is another microbatch's, or waits for rows that are known to be new.
                self.settle(open, None).await?;
                self.wait_on(open);
            }
            report.event(&Event::Progress {
                batch: open.number,
                consumed: consumed_before + open.counts.consumed,
                lag: self.lag(),
                lane: Some(&self.lanes.served().lane).filter(|_| !self.lanes.served().is_live()).cloned(),
            });
        }
        self.settle(open, None).await
    }

    /// Where a continuous run found repeats alone, so that there is nothing to commit, what comes next is looked up together too:
    /// when as much time is up again.
    fn wait_on(&self, open: &mut Open) {
        if self.options.continuous && self.lanes.served().is_live() && !open.counts.gives_rows() {
            open.due = Some(Instant::now() + self.owner.world.loaded.job.microbatch.open_time_max);
        }
    }

    /// The next chunk, decoded: read ahead, or read now; `None` if there is no record of this lane in it.
    fn next_chunk(
        &mut self,
        open: &mut Open,
        limits: ReadLimits,
        report: &mut dyn Report,
    ) -> Result<Option<(RecordChunk, Decoded)>, Stop> {
        self.options.profile.turn_to(Stage::ReadAhead);
        let (mut chunk, decoded) = match self.take_ahead() {
            None => (self.ahead.take_spare(), None),
            Some(ahead) => {
                let due = ahead.since + self.owner.world.loaded.job.microbatch.open_time_max;
                open.due.get_or_insert(due);
                (ahead.chunk, ahead.decoded.transpose()?)
            }
        };
        if decoded.is_none() {
            self.read_chunk(open, &mut chunk, limits, report)?;
        }
        if !chunk.is_empty() {
            self.watch.source_answers(report);
            open.payload_bytes += chunk.payload_bytes() as u64;
            let outside = self.lanes.served().drop_outside(&mut chunk);
            open.counts.consumed += outside;
            open.counts.outside_range += outside;
        }
        if chunk.is_empty() {
            self.ahead.keep_spare(chunk);
            return Ok(None);
        }
        let decoded = match decoded {
            Some(decoded) => decoded,
            None => self.decode(&chunk)?,
        };
        Ok(Some((chunk, decoded)))
    }

    pub(super) fn decode(&mut self, chunk: &RecordChunk) -> Result<Decoded, Stop> {
        self.options.profile.turn_to(Stage::Decode);
        self.decoder.decode(chunk, &self.lanes.served().slots).map_err(undecodable)
    }

    /// A chunk that was read: goes through every stage, or as far as the lookup that it waits for, and the next is read
    /// meanwhile.
    async fn take_chunk(
        &mut self,
        open: &mut Open,
        chunk: RecordChunk,
        decoded: Decoded,
    ) -> Result<(), Stop> {
        if self.options.continuous {
            // A batch may wait long for its first record: what is believed of a clock is held against the time of
            // reading. In a drain that of the cut is later than every record.
            open.cut_time_ms = open.cut_time_ms.max(chrono::Utc::now().timestamp_millis());
        }
        self.gathering.note(&decoded, chunk.payload_bytes());
        let (decoded, mut judged, letters) = self.judge(open, &chunk, decoded)?;
        // Letters have bytes of their own: nothing needs the records any more.
        self.ahead.keep_spare(chunk);
        let letters_bytes: u64 = letters.iter().map(DeadLetter::kept_bytes).sum();
        let bytes = decoded.rows.get_array_memory_size() as u64 + letters_bytes;
        let held_bytes = self.memory.held_bytes(bytes, decoded.places.len() + letters.len());
        let asked = self.keys_to_ask(open, &decoded, &mut judged).await?;
        // Not before buckets were lent, which takes decode's share too.
        let held_bytes = match self.waits_for_more(open, asked.rows.len() as u64) {
            true => held_bytes,
            false => self.settling_bytes(open, held_bytes),
        };
        self.read_beside_work(open, held_bytes);
        self.gather(open, &decoded, judged, asked).await?;
        self.options.profile.turn_to(Stage::Write);
        self.write_letters(open, letters).await
    }

    /// Bounds of a microbatch's first chunk.
    pub(super) fn first_chunk_limits(&self) -> ReadLimits {
        let limits = &self.owner.world.loaded.job.microbatch;
        // Where rows wait, one that is taken back later needs room beside one that is read then.
        let part = if self.gathering.is_on() { 2 } else { 1 };
        let bytes_max = self.memory.chunk_payload_bytes_max() / part;
        self.chunk_limits(limits.records_max, limits.payload_bytes_max.min(bytes_max))
    }

    /// Bounds of a chunk of a microbatch that may take so much more.
    pub(super) fn chunk_limits(&self, records_left: u64, bytes_left: u64) -> ReadLimits {
        let bounded = |left: u64, most: u64| usize::try_from(left.min(most)).unwrap_or(usize::MAX);
        let said = self.owner.world.loaded.job.dedup.probe_records_max.map_or(u64::MAX, NonZeroU64::get);
        ReadLimits {
            records_max: bounded(records_left, self.memory.chunk_records_max().min(said)),
            bytes_max: bounded(bytes_left, self.memory.chunk_payload_bytes_max()),
            deadline: Instant::now(),
        }
    }

    /// Bounds of the next chunk; `None` when the microbatch is to be closed.
    pub(super) fn next_chunk_limits(&self, open: &Open) -> Option<ReadLimits> {
        let (records_left, bytes_left) = self.room_left(open)?;
        let keys_full = self.state.store.pending_bytes() >= self.memory.pending_bytes_max();
        let is_over = keys_full
            || self.exhausted()
            || open.is_cut_short
            || self.is_due(open)
            || self.options.is_ending();
        (!is_over).then(|| self.limits_beside(open, records_left, bytes_left))
    }

    /// Records and bytes that the microbatch may take beyond what it has; `None` when it is full.
    pub(super) fn room_left(&self, open: &Open) -> Option<(u64, u64)> {
        let limits = &self.owner.world.loaded.job.microbatch;
        let records_left = limits.records_max.saturating_sub(open.counts.consumed);
        let bytes_left = limits.payload_bytes_max.saturating_sub(open.payload_bytes);
        (records_left > 0 && bytes_left > 0).then_some((records_left, bytes_left))
    }

    /// Whether an open microbatch is closed for its time. A continuous run keeps one of its live lane that gives no table a
    /// row open until a heartbeat is due, whose place its commit takes (R8); one of a backfill that has no record yet, too.
    fn is_due(&self, open: &Open) -> bool {
        if self.ahead.is_ready() && open.counts.consumed == 0 {
            // Records for it are there: a commit without them would be for nothing.
            return false;
        }
        let waits = match self.lanes.served().is_live() {
            true => !open.counts.gives_rows(),
            false => open.due.is_none(),
        };
        if !self.options.continuous || !waits {
            return open.is_due();
        }
        chrono::Utc::now().timestamp_millis() >= self.owner.heartbeat_ms()
    }

    /// Reads until the chunk is at its bounds or the microbatch is due, in turns short enough that a signal is heard. A
    /// microbatch's time begins with its first record. What was read into the chunk when the run is asked to end still counts;
    /// what is read ahead of it then is read again.
    fn read_chunk(
        &mut self,
        open: &mut Open,
        chunk: &mut RecordChunk,
        limits: ReadLimits,
        report: &mut dyn Report,
    ) -> Result<(), Stop> {
        self.options.profile.turn_to(Stage::Fetch);
        // What was read ahead may have waited that long already.
        while chunk.is_empty() || !open.is_due() {
            let turn_end = Instant::now() + READ_TURN_MAX;
            let due = open.due.filter(|due| *due > Instant::now());
            let deadline = due.map_or(turn_end, |due| due.min(turn_end));
            let lane = self.lanes.served_mut();
            let status = match lane.read(chunk, ReadLimits { deadline, ..limits }) {
                Ok(status) => status,
                Err(error) if error.reason() == Reason::SourceAway => {
                    open.is_cut_short = self.gives_nothing(open, !chunk.is_empty(), error, report)?;
                    ReadStatus::DeadlinePassed
                }
                Err(error) => {
                    open.is_cut_short = self.is_cut_off(open, !chunk.is_empty(), error)?;
                    ReadStatus::DeadlinePassed
                }
            };
            if open.due.is_none() && !chunk.is_empty() {
                open.due = Some(Instant::now() + self.owner.world.loaded.job.microbatch.open_time_max);
            }
            // Rows that wait, here or for their verdict, are not known to be new before they are looked up.
            let waits = !(chunk.is_empty() && open.gathered.is_empty()) && open.is_due();
            let is_over = open.is_cut_short || self.is_due(open) || self.options.is_ending();
            if status != ReadStatus::DeadlinePassed || waits || is_over {
                break;
            }
        }
        Ok(())
    }

    /// One chunk judged and looked up; nothing of it is written yet.
    pub(super) async fn probe(
        &mut self,
        open: &mut Open,
        chunk: &RecordChunk,
        decoded: Decoded,
    ) -> Result<(Decoded, Judged, Vec<DeadLetter>), Stop> {
        let (decoded, mut judged, letters) = self.judge(open, chunk, decoded)?;
        let asked = self.keys_to_ask(open, &decoded, &mut judged).await?;
        let verdicts = self.state.store.probe(&asked.keys).map_err(|error| self.state.failed(error))?;
        gather::drop_repeats(&mut open.counts, &asked.rows, &verdicts, &mut judged);
        Ok((decoded, judged, letters))
    }

    /// One chunk judged by time, and the letters that it gives. The chunk is not needed after it.
    fn judge(
        &mut self,
        open: &mut Open,
        chunk: &RecordChunk,
        mut decoded: Decoded,
    ) -> Result<(Decoded, Judged, Vec<DeadLetter>), Stop> {
        self.options.profile.turn_to(Stage::Probe);
        open.counts.consumed += decoded.consumed;
        crate::crash_point!("rows_decoded");
        let id_times = self.keys.id_times(&decoded.rows)?;
        let (mut judged, mut letters) = self.judge_time(open, chunk, &decoded, id_times.as_deref());
        letters.append(&mut decoded.letters);
        // The bucket of a key is told by its id where ids tell the time; rows whose id does not were refused.
        let of_row = |time: Option<EventTimeMs>| time.unwrap_or(EventTimeMs(0));
        judged.times_of_ids = id_times.map(|times| times.into_iter().map(of_row).collect());
        Ok((decoded, judged, letters))
    }

    /// Where rows are to go, and letters for those too far ahead, and for those whose id should tell the time and does not.
    /// A row that is refused moves no watermark, and a late one none either.
    fn judge_time(
        &mut self,
        open: &mut Open,
        chunk: &RecordChunk,
        decoded: &Decoded,
        id_times: Option<&[Option<EventTimeMs>]>,
    ) -> (Judged, Vec<DeadLetter>) {
        let policy = self.owner.world.loaded.job.event_time.late;
        let mut letters = Vec::new();
        let mut judged = Judged::of_none(decoded.places.len());
        for (row, place) in decoded.places.iter().enumerate() {
            let (time, timestamp) = (decoded.event_times[row], decoded.timestamps_ms[row]);
            let limit = self.lanes.served().lateness.limit(timestamp, open.cut_time_ms);
            if let Some(times) = id_times
                && let Some((code, text)) =
                    late::judge_id(&self.owner.world.loaded.job.dedup.bucket_from, times[row], limit)
            {
                letters.push(decoded.letter_for(chunk, row, code, &text));
                continue;
            }
            let verdict =
                self.lanes.served_mut().lateness.judge(place.slot, time, timestamp, open.cut_time_ms);
            match verdict {
                TimeVerdict::OnTime => judged.fates[row] = Fate::Main,
                TimeVerdict::Late { watermark } => {
                    judged.late(row, watermark, policy);
                    open.counts.late += 1;
                    open.counts.late_dropped += u64::from(judged.fates[row] == Fate::Nowhere);
                }
                TimeVerdict::Ahead { limit } => {
                    let (code, text) = late::ahead(time, limit);
                    letters.push(decoded.letter_for(chunk, row, code, &text));
                }
            }
        }
        (judged, letters)
    }

    /// Reads the buckets of these keys that have left the state from the table, all in one scan, so that the probe can
    /// tell what is new in them (`beyond_window = "check"`).
    async fn lend(&mut self, open: &mut Open, keys: &[Key]) -> Result<(), Stop> {
        let missing = self.state.store.missing_buckets(keys);
        if missing.is_empty() {
            return Ok(());
        }
        // They take decode's share.
        open.main.settle().await;
        let begun = Instant::now();
        let (loan, read) =
            load(&mut self.owner, &self.keys, &self.memory, &self.state.store, &missing, &mut Unheard)
                .await?;
        tracing::info!(
            buckets = missing.len(),
            rows = read.rows,
            bytes = read.bytes,
            keys = loan.keys(),
            seconds = begun.elapsed().as_secs_f64(),
            "buckets beyond the window were read from the table"
        );
        self.state.store.borrow(loan);
        crate::crash_point!("bucket_lent");
        open.buckets_lent += missing.len() as u64;
        self.bytes_lent += read.bytes;
        Ok(())
    }

    /// Keys of the rows that go somewhere, in the order of their places, so that of two copies in one chunk the one at
    /// the lowest place wins (R2). A row whose key can not be looked up without the tables is set aside first, where the job
    /// says so; else the tables are read.
    async fn keys_to_ask(
        &mut self,
        open: &mut Open,
        decoded: &Decoded,
        judged: &mut Judged,
    ) -> Result<Asked, Stop> {
        let fingerprints = self.keys.fingerprints(&decoded.rows)?;
        let is_kept = |row: &u32| mutant!("refused-row-is-probed", true => judged.fates[*row as usize] != Fate::Nowhere);
        let rows = u32::try_from(judged.fates.len()).expect("a chunk holds fewer than 2^32 rows");
        let mut order: Vec<u32> = (0..rows).filter(is_kept).collect();
        order.sort_unstable_by_key(|&row| decoded.places[row as usize]);
        let times = judged.times_of_ids.take();
        let times = times.as_deref().unwrap_or(&decoded.event_times);
        let key =
            |&row: &u32| Key { fingerprint: fingerprints[row as usize], event_time: times[row as usize] };
        let mut keys: Vec<Key> = order.iter().map(key).collect();
        match self.owner.world.loaded.job.dedup.beyond_window {
            BeyondWindow::Check => self.lend(open, &keys).await?,
            BeyondWindow::Side => {
                let gone = self.state.store.are_unanswerable(&keys);
                open.counts.late_side += judged.set_aside(&mut order, &gone);
                keys = order.iter().map(key).collect();
            }
        }
        Ok(Asked { rows: order, keys })
    }

    /// Letters that do not stand in the dead-letter table yet, once per place.
    pub(super) async fn write_letters(
        &mut self,
        open: &mut Open,
        mut letters: Vec<DeadLetter>,
    ) -> Result<(), Stop> {
        if letters.is_empty() {
            return Ok(());
        }
        for letter in &letters {
            let entry =
                open.refused.entry(letter.code).or_insert_with(|| (0, letter.place, letter.text.clone()));
            entry.0 += 1;
        }
        let dead = self.owner.side(Role::DeadLetters);
        let table = dead.identifier().to_string();
        let failed = |error: ScanError| {
            stops::data(format!("dead letters of table {table} can not be looked up"), error.reason(), error)
        };
        let slots = self.letter_slots();
        let places: Vec<LetterPlace> = letters.iter().map(|letter| LetterPlace::of(letter, &slots)).collect();
        let known = dead_letters::known_places(dead, &places).await.map_err(failed)?;
        crate::crash_point!("letters_looked_up");
        let letters_count = letters.len() as u64;
        let mut is_known = known.iter();
        letters.retain(|_| !is_known.next().expect("one answer for each letter"));
        open.counts.dead_letter += letters.len() as u64;
        open.counts.dead_letter_known += letters_count - letters.len() as u64;
        if letters.is_empty() {
            return Ok(());
        }
        let rows = dead_letters::rows(&letters, &slots, open.number).map_err(unexpected_arrow)?;
        let writer = open.sides.get_mut(&Role::DeadLetters).expect("every job has a dead-letter table");
        writer.write(&rows).await.map_err(|error| unwritten(dead, error))?;
        crate::crash_point!("letters_written");
        Ok(())
    }

    fn letter_slots(&self) -> Vec<dead_letters::Slot> {
        if let Some(slots) = &self.letter_slots {
            return slots.clone();
        }
        letter_slots(&self.owner.record.topics, &self.lanes.served().slots)
    }

    /// What must hold before anything is sent.
    fn check(&self, open: &Open) -> Result<(), Stop> {
        assert!(open.counts.conserved(), "every consumed row has exactly one outcome: {:?}", open.counts);
        let letters = open.counts.dead_letter + open.counts.dead_letter_known;
        let ratio = letters as f64 / open.counts.consumed.max(1) as f64;
        let lane = self.owner.record.lanes.get(&self.lanes.served().lane);
        let said = lane.and_then(|lane| lane.backfill.as_ref()?.letters_ratio_max);
        let ratio_max = said.unwrap_or(self.owner.world.loaded.job.sink.dead_letters.ratio_max);
        if open.counts.consumed >= BRAKE_RECORDS_MIN && mutant!("brake-lets-go", false => ratio > ratio_max) {
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
                let name = &self.lanes.served().slots[place.slot as usize];
                format!(
                    "  {count} x {code}, first at {name} offset {} index {}: {text}",
                    place.offset, place.row_index
                )
            })
            .collect();
        let (job, served) = (&self.options.job_shown, self.lanes.served());
        let (of_lane, how_long, command) = match served.is_live() {
            true => (String::new(), "once", format!("tidemill run {job}")),
            false => (
                format!(" of backfill {}", served.lane),
                "for the rest of this backfill",
                resume_command(job, &served.lane),
            ),
        };
        Stop::new(
            Reason::Brake,
            format!(
                "{letters} of {} rows{of_lane} are dead letters, {:.1} % where {:.1} % are allowed; most frequent:\n{}",
                open.counts.consumed,
                ratio * 100.0,
                ratio_max * 100.0,
                shown.join("\n")
            ),
            format!(
                "nothing was committed and the offsets stay; mend the producer or the job's columns, or let them through \
                 {how_long}:\n  {command} --set sink.iceberg.dead_letters.max_ratio=1.0"
            ),
        )
    }

    /// Closes the data files of all tables, durably, and says where the microbatch was cut.
    pub(super) async fn finish(&mut self, open: &mut Open) -> Result<Built<DataFile>, Stop> {
        self.options.profile.turn_to(Stage::Write);
        let kept = self.lanes.loans_kept_after(&self.owner.record, self.watermark());
        self.state.store.keep_loans(kept);
        let main = &self.owner.main;
        let files = open.main.finish().await.map_err(|error| unwritten(main, error))?;
        crate::crash_point!("main_files_closed");
        open.data_files = files.len();
        let mut owed = BTreeMap::new();
        for (role, writer) in &mut open.sides {
            let table = self.owner.side(*role);
            let files = writer.finish().await.map_err(|error| unwritten(table, error))?;
            crate::crash_point!("side_files_closed");
            if files.is_empty() {
                continue;
            }
            let named = writer::files_to_json(&files, table).map_err(|error| {
                let what = format!("files of table {} can not be named in the ledger", table.identifier());
                stops::data(what, error.reason(), error)
            })?;
            owed.insert(*role, named);
        }
        let cut = Cut {
            number: open.number,
            attempt: open.attempt,
            cut_time_ms: open.cut_time_ms,
            counts: open.counts,
            lane: self.lanes.served().lane.clone(),
            watermark: self.watermark(),
            reached: self.reached(),
            requeue: self.owner.record.requeue.clone(),
            last: self.is_last() || self.options.is_ending(),
        };
        Ok(Built { cut, files, owed })
    }

    /// Whether this microbatch is known to be the last. With backfills that shows only when their turns are over: the table
    /// is then given back by a commit of its own.
    fn is_last(&self) -> bool {
        let live_is_read = !self.options.continuous && self.lanes.live().exhausted();
        live_is_read && self.owner.record.active_backfills().next().is_none()
    }

    /// The served lane's watermark with what was read so far.
    fn watermark(&self) -> Option<EventTimeMs> {
        let served = self.lanes.served();
        let LaneReader { lane, lateness, .. } = served;
        let before = self.owner.record.lanes.get(lane).and_then(|lane| lane.watermark);
        lateness.watermark(before, &served.reached().at_end)
    }

    fn reached(&self) -> Vec<Reached> {
        if self.letter_slots.is_some() {
            // Stored letters move no offset.
            return Vec::new();
        }
        let served = self.lanes.served();
        let LaneReader { slots, starts, lateness, .. } = served;
        let lanes::Reached { positions, tails, .. } = served.reached();
        slots
            .iter()
            .enumerate()
            .map(|(slot, name)| Reached {
                name: name.clone(),
                first: starts[slot],
                end: positions[slot],
                tail: tails[slot].map(|tail| Tail { offset: tail.offset, hash: tail.hash }),
                max_event_time: lateness.max_event_times()[slot],
            })
            .collect()
    }
}

/// A chunk that does not fit into columns.
pub(super) fn undecodable(error: DecodeError) -> Stop {
    let way_out = "nothing of this batch is visible; lower memory, which makes chunks smaller";
    Stop::new(Reason::Unexpected, "records can not be decoded", way_out).because(error)
}

/// Topic partitions as dead letters name them. Where the broker gives no topic id, one is derived from the name.
pub(super) fn letter_slots(
    topics: &BTreeMap<String, Option<TopicId>>,
    slots: &[TopicPartition],
) -> Vec<dead_letters::Slot> {
    let slot = |name: &TopicPartition| dead_letters::Slot {
        topic: name.topic.clone(),
        topic_id: topics.get(&name.topic).copied().flatten().unwrap_or_else(|| id_of_name(&name.topic)),
        partition: name.partition,
    };
    slots.iter().map(slot).collect()
}

/// Stands for the id of a topic whose broker gives none.
fn id_of_name(topic: &str) -> TopicId {
    TopicId(Uuid::from_u128(xxhash_rust::xxh3::xxh3_128(topic.as_bytes())))
}

/// Names the place too, so that a full disk is found.
pub(super) fn unwritten(table: &Table, error: WriteError) -> Stop {
    let (name, place) = (table.identifier(), table.metadata().location());
    stops::data(format!("data files of table {name} in {place} can not be written"), error.reason(), error)
}

pub(super) fn unexpected_arrow(error: impl std::error::Error + Send + Sync + 'static) -> Stop {
    Stop::new(Reason::Unexpected, "rows do not fit together", "nothing was committed; please report this")
        .because(error)
}
