//! Dead letters decoded again with today's job: a lane of its own over one frozen snapshot of the dead-letter table.
//!
//! Flow: places that wait, ascending -> { letters with their bytes -> decode -> time rules -> dedup -> main or late table,
//! marks } in microbatches like any other -> the command ends
//!
//! Invariants
//! 1. A letter that came in is marked by the very microbatch that wrote its row (R10), so it is tried once; one that is
//!    refused again stays as it is, and its place is known.
//! 2. No offset moves, and the live lane's watermark stays. Letters are judged in the order of their places against earlier
//!    ones of their own topic partition.
//! 3. What must be exact follows from dedup: a letter that is tried twice is a repeat of itself.
//! 4. The cursor moves with the commit of the letters before it, and with nothing else. A row that is dropped for being late
//!    leaves its letter unmarked: behind other letters it may be on time.
//!
//! A kill leaves the cursor in the record of the last microbatch; the command given again goes on from it, over the same
//! snapshot while that is kept. Marks that main owes are brought forward first, by whoever starts next.
//!
//! Bounds: a slice of the places that wait (`stored_letters`), and a chunk of letters; a microbatch closes after
//! `max_interval`, so that its commit renews the lease. Headers are not kept in letters, so columns that are read from one are
//! null.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use iceberg::spec::DataFile;
use iceberg::table::Table;
use serde::Serialize;

use super::commands::Confirm;
use super::microbatch::{Open, unexpected_arrow, unwritten};
use super::owner::{Owner, new_decoder, prepare};
use super::report::Report;
use super::session::Session;
use super::start::Allow;
use super::state::KeyState;
use super::survey::side_idents;
use super::world::Outside;
use super::{RunOptions, plan_memory, stops};
use crate::catalog;
use crate::commit::ledger::{LIVE_LANE, RequeueLane};
use crate::commit::side::Role;
use crate::counts::Counts;
use crate::event_time::EventTimeMs;
use crate::job::file::LoadedJob;
use crate::lateness::Lateness;
use crate::letter::{DeadLetter, ReasonCode};
use crate::memory::MemoryPlan;
use crate::offset::{Place, TopicId, TopicPartition};
use crate::protocol::{self, Built, Cut, Life, Reached};
use crate::record::{RecordChunk, RecordParts};
use crate::sink::dead_letters::{self, LetterPlace, Slot};
use crate::sink::scan::ScanError;
use crate::sink::stored_letters::{self, Queue, StoredLetter, Tally, Waiting};
use crate::stop::Stop;

/// Most letters that are decoded together.
const LETTERS_MAX: usize = 4_096;

/// What a requeue did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Requeued {
    /// The dead-letter table.
    pub table: String,
    /// Letters that waited.
    pub waiting: u64,
    /// Outcomes of their rows; those that were refused again count as `dead_letter_known`.
    pub counts: Counts,
    /// Microbatches committed.
    pub batches: u64,
}

/// What a requeue would find: letters are decoded, and neither judged by time nor looked up.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct WouldDecode {
    /// The dead-letter table.
    pub table: String,
    /// Letters that wait.
    pub waiting: u64,
    /// Rows that today's job decodes from them.
    pub rows: u64,
    /// Rows that it still refuses, by reason.
    pub refused: BTreeMap<String, u64>,
}

/// The dead-letter table of a job; `None` if there is none yet. Asks the catalog alone.
///
/// # Errors
/// The catalog does not answer.
pub async fn dead_letter_table(loaded: &LoadedJob) -> Result<Option<Table>, Stop> {
    let catalog = catalog::connect(&loaded.job.sink.catalog).await.map_err(stops::catalog)?;
    let ident = &side_idents(&loaded.job)?[&Role::DeadLetters];
    catalog::load(&*catalog, ident).await.map_err(stops::catalog)
}

/// Letters by reason.
///
/// # Errors
/// A [`Stop`]: catalog or storage do not answer.
pub async fn list(loaded: &LoadedJob) -> Result<Vec<Tally>, Stop> {
    match dead_letter_table(loaded).await? {
        Some(table) => stored_letters::tally(&table).await.map_err(|error| unread(&table, error)),
        None => Ok(Vec::new()),
    }
}

/// Letters of one reason, or at one topic partition and offset, at most `most`.
///
/// # Errors
/// As [`list`].
pub async fn show(
    loaded: &LoadedJob,
    reason: Option<&str>,
    at: Option<(&str, i32, i64)>,
    most: usize,
) -> Result<Vec<StoredLetter>, Stop> {
    match dead_letter_table(loaded).await? {
        Some(table) => {
            stored_letters::find(&table, reason, at, most).await.map_err(|error| unread(&table, error))
        }
        None => Ok(Vec::new()),
    }
}

/// What a requeue would decode now. Asks catalog and storage, not the broker, and writes nothing.
///
/// # Errors
/// As [`list`].
pub async fn look(loaded: &LoadedJob, reason: Option<&str>) -> Result<WouldDecode, Stop> {
    let Some(table) = dead_letter_table(loaded).await? else { return Ok(WouldDecode::default()) };
    let (memory, mut decoder) = (plan_memory(loaded)?, new_decoder(&loaded.job)?);
    let snapshot_id = table.metadata().current_snapshot_id();
    let mut queue = Queue::new(&table, snapshot_id, reason, None);
    let mut would = WouldDecode { table: table.identifier().to_string(), ..WouldDecode::default() };
    let mut slots = Slots::default();
    while queue.fill().await.map_err(|error| unread(&table, error))? {
        let places = next_places(queue.letters(), &memory);
        queue.take(places.len());
        would.waiting += places.len() as u64;
        let letters = stored_letters::fetch(&table, snapshot_id, &places).await;
        let letters = letters.map_err(|error| unread(&table, error))?;
        let chunk = slots.chunk(&letters);
        let decoded = decoder.decode(&chunk, &slots.names).map_err(unexpected_arrow)?;
        would.rows += decoded.places.len() as u64;
        for letter in &decoded.letters {
            *would.refused.entry(letter.code.to_string()).or_default() += 1;
        }
    }
    Ok(would)
}

fn unread(table: &Table, error: ScanError) -> Stop {
    let what = format!("dead letters of table {} can not be read", table.identifier());
    stops::data(what, error.reason(), error)
}

/// Decodes dead letters again, as the owner of the table: fence, microbatches, release.
///
/// # Errors
/// A [`Stop`], as a run's.
pub async fn requeue(
    loaded: &LoadedJob,
    options: &RunOptions,
    reason: Option<&str>,
    confirm: Confirm<'_>,
    report: &mut dyn Report,
) -> Result<Requeued, Stop> {
    let prepared = prepare(loaded, options, Allow::default()).await?;
    let table = prepared.survey.side_idents[&Role::DeadLetters].to_string();
    let (Some(_), Some(dead)) = (&prepared.record, prepared.survey.sides.get(&Role::DeadLetters)) else {
        return Ok(Requeued { table, ..Requeued::default() });
    };
    let found = Queue::new(dead, dead.metadata().current_snapshot_id(), reason, None).count().await;
    let found = found.map_err(|error| unread(dead, error))?;
    if found == 0 {
        return Ok(Requeued { table, ..Requeued::default() });
    }
    confirm(&format!("decode {found} dead letters of table {table} again with this job?"))?;
    let mut session = Session::at_rest(prepared, report).await?;
    let lane = Lane::open(&mut session, reason).await;
    let outcome = match lane {
        Ok(lane) => {
            let mut life =
                Requeue { session: &mut session, report, lane, open: None, done: Requeued::default() };
            life.done = Requeued { table, waiting: life.lane.left, ..Requeued::default() };
            let drained = protocol::drain(&mut life).await;
            let done = std::mem::take(&mut life.done);
            drained.map(|()| done)
        }
        Err(stop) => Err(stop),
    };
    session.owner.end(outcome).await
}

/// The next places whose letters fit into a chunk, at least one if there is any.
fn next_places<'w>(waiting: impl Iterator<Item = &'w Waiting>, memory: &MemoryPlan) -> Vec<LetterPlace> {
    let most = LETTERS_MAX.min(usize::try_from(memory.chunk_records_max()).unwrap_or(usize::MAX)).max(1);
    let mut bytes_left = memory.chunk_payload_bytes_max();
    let mut places = Vec::new();
    for letter in waiting.take(most) {
        if !places.is_empty() && letter.payload_bytes > bytes_left {
            break;
        }
        bytes_left = bytes_left.saturating_sub(letter.payload_bytes);
        places.push(letter.place);
    }
    places
}

/// Topic partitions of letters, numbered as they come. Two topics of one name with other ids are two.
#[derive(Default)]
struct Slots {
    letters: Vec<Slot>,
    names: Vec<TopicPartition>,
    numbers: BTreeMap<(TopicId, i32), u32>,
}

impl Slots {
    fn number(&mut self, letter: &StoredLetter) -> u32 {
        let (topic, topic_id) = (&letter.topic, letter.place.topic_id);
        let partition = letter.place.partition;
        *self.numbers.entry((topic_id, partition)).or_insert_with(|| {
            self.letters.push(Slot { topic: topic.clone(), topic_id, partition });
            self.names.push(TopicPartition::new(topic, partition));
            u32::try_from(self.names.len() - 1).expect("fewer than 2^32 topic partitions")
        })
    }

    /// Letters as records. The offset of each is its number in the chunk: rows are given their places back by it.
    fn chunk(&mut self, letters: &[StoredLetter]) -> RecordChunk {
        let mut chunk = RecordChunk::default();
        for (number, letter) in letters.iter().enumerate() {
            chunk.push(RecordParts {
                slot: self.number(letter),
                offset: i64::try_from(number).expect("a chunk is bounded"),
                timestamp_ms: letter.timestamp_ms,
                key: letter.key.as_deref(),
                payload: letter.payload.as_deref(),
            });
        }
        chunk
    }
}

/// The place of a row of a letter. The bytes of a letter with an index above 0 are one element of an array.
fn true_place(letters: &[StoredLetter], place: Place) -> Place {
    let number = usize::try_from(place.offset).expect("a number of a letter");
    let letter = &letters[number].place;
    let row_index = if letter.row_index > 0 { letter.row_index } else { place.row_index };
    Place { slot: place.slot, offset: letter.offset, row_index }
}

/// The place of the letter that a row came from.
fn letter_place(letters: &[StoredLetter], place: Place) -> Place {
    let number = usize::try_from(place.offset).expect("a number of a letter");
    let letter = &letters[number].place;
    Place { slot: place.slot, offset: letter.offset, row_index: letter.row_index }
}

/// What waits, and how far it was taken.
struct Lane {
    snapshot_id: Option<i64>,
    reason: Option<String>,
    queue: Queue,
    /// Letters that were not taken yet.
    left: u64,
    /// Place of the last one taken.
    last: Option<LetterPlace>,
    slots: Slots,
    /// Largest event times of letters that an earlier command took.
    times: BTreeMap<(TopicId, i32), EventTimeMs>,
    /// The dead-letter table with its frozen snapshot; the owner's moves on with every mark.
    table: Table,
}

impl Lane {
    /// Goes on with what was interrupted, if it is the same and its snapshot is kept, else begins with what waits now.
    async fn open(session: &mut Session<'_>, reason: Option<&str>) -> Result<Self, Stop> {
        let table = session.owner.side(Role::DeadLetters).clone();
        let is_kept = |lane: &&RequeueLane| {
            lane.reason.as_deref() == reason && table.metadata().snapshot_by_id(lane.snapshot_id).is_some()
        };
        let begun = session.owner.record.requeue.as_ref().filter(is_kept).cloned();
        let frozen = begun.as_ref().map(|lane| lane.snapshot_id).or(table.metadata().current_snapshot_id());
        let (mut times, mut last) = (BTreeMap::new(), None);
        if let Some(lane) = begun {
            times.extend(lane.max_event_times.iter().map(|(id, at, time)| ((TopicId(*id), *at), *time)));
            let (topic_id, partition, offset, row_index) = lane.after;
            last = Some(LetterPlace { topic_id: TopicId(topic_id), partition, offset, row_index });
        }
        let queue = || Queue::new(&table, frozen, reason, last);
        let left = queue().count().await.map_err(|error| unread(&table, error))?;
        let (queue, reason) = (queue(), reason.map(str::to_owned));
        Ok(Self { snapshot_id: frozen, reason, queue, left, last, slots: Slots::default(), times, table })
    }

    /// What the ledger says of it; nothing once all is taken. `times` are the largest event times by slot.
    fn cursor(&self, times: &[Option<EventTimeMs>]) -> Option<RequeueLane> {
        let last = self.last?;
        let after = (last.topic_id.0, last.partition, last.offset, last.row_index);
        let snapshot_id = self.snapshot_id.filter(|_| self.left > 0)?;
        let mut known = self.times.clone();
        let slots = self.slots.letters.iter().zip(times);
        known.extend(slots.filter_map(|(slot, time)| Some(((slot.topic_id, slot.partition), (*time)?))));
        let max_event_times = known.into_iter().map(|((id, partition), time)| (id.0, partition, time));
        let (reason, max_event_times) = (self.reason.clone(), max_event_times.collect());
        Some(RequeueLane { snapshot_id, reason, after, max_event_times })
    }
}

/// One command.
struct Requeue<'r, 'a> {
    session: &'r mut Session<'a>,
    report: &'r mut dyn Report,
    lane: Lane,
    open: Option<Open>,
    done: Requeued,
}

impl<'a> Life for Requeue<'_, 'a> {
    type World = Outside<'a>;
    type State = KeyState;

    fn owner(&mut self) -> &mut Owner<'a> {
        &mut self.session.owner
    }

    fn state(&mut self) -> &mut KeyState {
        &mut self.session.state
    }

    async fn turn(&mut self) -> Result<bool, Stop> {
        let has_more = self.has_more();
        if has_more && self.session.options.interrupted() {
            return Err(stops::requeue_interrupted());
        }
        Ok(has_more)
    }

    async fn build(&mut self) -> Result<Option<Built<DataFile>>, Stop> {
        let mut open = self.session.begin()?;
        let filled = self.fill(&mut open).await;
        let open = self.open.insert(open);
        filled?;
        assert!(open.counts.conserved(), "every row of a letter has exactly one outcome: {:?}", open.counts);
        let mut built = self.session.finish(open).await?;
        built.cut.requeue = self.lane.cursor(self.session.lanes.live().lateness.max_event_times());
        self.at_rest(&mut built.cut);
        Ok(Some(built))
    }

    async fn discard(&mut self) {
        if let Some(open) = self.open.take() {
            open.discard().await;
        }
    }

    fn landed(&mut self, cut: Cut, sends: u32) {
        let Some(open) = self.open.take() else { return };
        self.done.counts.add(&cut.counts);
        self.done.batches += 1;
        let event = self.session.committed(&open, &cut, self.lane.left, sends);
        self.report.event(&event);
    }
}

impl Requeue<'_, '_> {
    fn has_more(&self) -> bool {
        self.lane.left > 0
    }

    /// Takes letters until the microbatch is full or its time is up, all are taken, or a signal came.
    async fn fill(&mut self, open: &mut Open) -> Result<(), Stop> {
        let begun = Instant::now();
        let limits = &self.session.owner.world.loaded.job.microbatch;
        let (records_max, open_time_max) = (limits.records_max, limits.open_time_max);
        let keys_max = self.session.memory.pending_bytes_max();
        while open.counts.consumed < records_max && self.session.state.store.pending_bytes() < keys_max {
            let is_over = begun.elapsed() >= open_time_max || self.session.options.interrupted();
            if is_over && open.counts.consumed > 0 {
                break;
            }
            if !self.lane.queue.fill().await.map_err(|error| unread(&self.lane.table, error))? {
                break;
            }
            let mut places = next_places(self.lane.queue.letters(), &self.session.memory);
            places.truncate(usize::try_from(records_max - open.counts.consumed).unwrap_or(usize::MAX));
            let letters = stored_letters::fetch(&self.lane.table, self.lane.snapshot_id, &places).await;
            let letters = letters.map_err(|error| unread(&self.lane.table, error))?;
            self.take(open, &letters).await?;
            self.lane.last = self.lane.queue.take(places.len());
            self.lane.left -= places.len() as u64;
        }
        Ok(())
    }

    /// One chunk of letters through every stage.
    async fn take(&mut self, open: &mut Open, letters: &[StoredLetter]) -> Result<(), Stop> {
        let chunk = self.lane.slots.chunk(letters);
        self.know_slots();
        let session = &mut *self.session;
        let decoded = session.decode(&chunk)?;
        let (mut decoded, judged, mut refused) = session.probe(open, &chunk, decoded).await?;
        let dropped: Vec<Place> =
            judged.dropped.iter().map(|&row| letter_place(letters, decoded.places[row])).collect();
        decoded.places.iter_mut().for_each(|place| *place = true_place(letters, *place));
        refused.iter_mut().for_each(|letter| letter.place = true_place(letters, letter.place));
        let rows = session.whole_rows(open, &decoded)?;
        session.write_rows(open, &rows, &judged).await?;
        let still: BTreeSet<Place> = refused.iter().map(|letter| letter.place).chain(dropped).collect();
        session.write_letters(open, refused).await?;
        let slots = &self.lane.slots;
        let marks: Vec<DeadLetter> = letters
            .iter()
            .map(|letter| mark(letter, slots.numbers[&(letter.place.topic_id, letter.place.partition)]))
            .filter(|mark| !still.contains(&mark.place))
            .collect();
        if marks.is_empty() {
            return Ok(());
        }
        let rows = dead_letters::marks(&marks, &slots.letters, open.number).map_err(unexpected_arrow)?;
        let writer = open.sides.get_mut(&Role::DeadLetters).expect("every job has a dead-letter table");
        let dead = session.owner.side(Role::DeadLetters);
        writer.write(&rows).await.map_err(|error| unwritten(dead, error))?;
        crate::crash_point!("marks_written");
        Ok(())
    }

    /// Lets the session know the topic partitions that letters came from; what it knows of their times stays.
    fn know_slots(&mut self) {
        let (session, slots) = (&mut *self.session, &self.lane.slots);
        let lane = session.lanes.live_mut();
        let mut max_event_times = lane.lateness.max_event_times().to_vec();
        let before = |slot: &Slot| self.lane.times.get(&(slot.topic_id, slot.partition)).copied();
        max_event_times.extend(slots.letters[max_event_times.len()..].iter().map(before));
        lane.lateness = Lateness::new(&session.owner.world.loaded.job.event_time, max_event_times);
        lane.slots = slots.names.as_slice().into();
        session.letter_slots = Some(slots.letters.clone());
    }

    /// The live lane stands still: each of its cursors begins and ends where it was.
    fn at_rest(&self, cut: &mut Cut) {
        let record = &self.session.owner.record;
        cut.watermark = record.lanes.get(LIVE_LANE).and_then(|lane| lane.watermark);
        cut.last = !self.has_more();
        cut.reached.clear();
        for (topic, partitions) in &record.live().topics {
            for (partition, cursor) in partitions {
                cut.reached.push(Reached {
                    name: TopicPartition::new(topic, *partition),
                    first: cursor.end,
                    end: cursor.end,
                    tail: cursor.tail,
                    max_event_time: cursor.max_event_time,
                });
            }
        }
    }
}

fn mark(letter: &StoredLetter, slot: u32) -> DeadLetter {
    let code = ReasonCode::ALL.into_iter().find(|code| code.as_str() == letter.reason_code);
    DeadLetter {
        place: Place { slot, offset: letter.place.offset, row_index: letter.place.row_index },
        timestamp_ms: letter.timestamp_ms,
        key: None,
        payload: None,
        payload_bytes: letter.payload_bytes,
        code: code.unwrap_or(ReasonCode::InvalidJson),
        text: "decoded again".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(offset: i64, payload_bytes: u64) -> Waiting {
        let topic_id = TopicId(uuid::Uuid::nil());
        Waiting { place: LetterPlace { topic_id, partition: 0, offset, row_index: 0 }, payload_bytes }
    }

    #[test]
    fn letters_are_taken_by_their_bytes_and_at_least_one() {
        let memory = MemoryPlan::divide(crate::memory::MEMORY_BYTES_MIN).unwrap();
        let most = memory.chunk_payload_bytes_max();
        let all = [waiting(1, most * 2), waiting(2, most / 2), waiting(3, most / 2), waiting(4, 1)];
        assert_eq!(next_places(all.iter(), &memory).len(), 1);
        assert_eq!(next_places(all[1..].iter(), &memory).len(), 2);
        assert_eq!(next_places(all[4..].iter(), &memory), []);
    }
}
