//! Dead letters read back: how many stand there and why, their bytes, and which wait to be decoded again.
//!
//! A letter that was decoded again is marked by a second row of its place, `kind` = [`KIND_REQUEUED`]; the first one stays.
//!
//! Letters are told from those that are marked a slice of places at a time: the least `PLACES_MAX` behind the slice before,
//! found by a scan of the table's places each. So a table of few letters is scanned once, and one of many is not held.
//!
//! Bounds: [`tally`] and [`Queue`] hold `PLACES_MAX` places, about 100 bytes each, and a line per reason and topic;
//! [`fetch`] and [`find`] hold the letters that they are asked for, and no other's bytes.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{Int32Type, Int64Type, TimestampMicrosecondType};
use futures::TryStreamExt;
use iceberg::expr::{Predicate, Reference};
use iceberg::spec::Datum;
use iceberg::table::Table;
use serde::Serialize;
use uuid::Uuid;

use super::dead_letters::{KIND_LETTER, LetterPlace, predicate_of};
use super::scan::{self, ScanError};
use crate::offset::TopicId;

/// Value of `kind` of a row that marks a letter as decoded again.
pub const KIND_REQUEUED: &str = "requeued";
/// Reasons whose letters have no bytes to decode: the payload was null, or too long to be kept.
pub const WITHOUT_BYTES: [&str; 2] = ["tombstone", "record_too_large"];

/// Most places that are held at once.
const PLACES_MAX: usize = 1 << 18;

/// Columns that say where a letter stands and why, in the order of [`Head`].
const HEAD_COLUMNS: [&str; 8] =
    ["topic", "topic_id", "partition", "offset", "index", "kind", "reason_code", "payload_bytes"];

/// One letter as it is shown and decoded again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredLetter {
    /// Name of the topic.
    pub topic: String,
    /// Where it stands.
    pub place: LetterPlace,
    /// Kafka timestamp in ms since the epoch.
    pub timestamp_ms: Option<i64>,
    /// Message key.
    pub key: Option<Vec<u8>>,
    /// The row's own bytes.
    pub payload: Option<Vec<u8>>,
    /// Length of the payload, also where its bytes are not kept.
    pub payload_bytes: i64,
    /// The reason, for machines.
    pub reason_code: String,
    /// The reason, for people.
    pub reason_text: String,
    /// Microbatch that wrote it.
    pub batch: i64,
}

/// Letters of one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// The reason.
    pub reason: String,
    /// Letters that wait.
    pub waiting: u64,
    /// Letters that were decoded again.
    pub requeued: u64,
    /// Place of the first one, in words.
    pub first: String,
    /// Place of the last one, in words.
    pub last: String,
}

/// A letter that waits to be decoded again.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Waiting {
    /// Where it stands.
    pub place: LetterPlace,
    /// Length of its payload.
    pub payload_bytes: u64,
}

/// A place as a sentence names it.
pub fn place_in_words(topic: &str, place: &LetterPlace) -> String {
    format!("{topic}[{}] offset {} index {}", place.partition, place.offset, place.row_index)
}

struct Head {
    topic: String,
    place: LetterPlace,
    is_mark: bool,
    reason: String,
    payload_bytes: u64,
}

fn wrong(table: &Table, what: impl Into<String>) -> ScanError {
    ScanError::of(table, iceberg::Error::new(iceberg::ErrorKind::DataInvalid, what.into()))
}

/// Place of a row; `None` for one of another program, whose topic id is no UUID.
fn place_at(batch: &RecordBatch, row: usize) -> Option<Option<LetterPlace>> {
    let topic_id = batch.column_by_name("topic_id")?.as_string_opt::<i32>()?.value(row).parse::<Uuid>();
    let partition = batch.column_by_name("partition")?.as_primitive_opt::<Int32Type>()?.value(row);
    let offset = batch.column_by_name("offset")?.as_primitive_opt::<Int64Type>()?.value(row);
    let row_index = batch.column_by_name("index")?.as_primitive_opt::<Int32Type>()?.value(row);
    Some(topic_id.ok().map(|id| LetterPlace { topic_id: TopicId(id), partition, offset, row_index }))
}

fn text_at<'b>(batch: &'b RecordBatch, name: &str, row: usize) -> Option<&'b str> {
    Some(batch.column_by_name(name)?.as_string_opt::<i32>()?.value(row))
}

fn long_at(batch: &RecordBatch, name: &str, row: usize) -> Option<i64> {
    Some(batch.column_by_name(name)?.as_primitive_opt::<Int64Type>()?.value(row))
}

fn head_at(batch: &RecordBatch, row: usize) -> Option<Option<Head>> {
    let Some(place) = place_at(batch, row)? else { return Some(None) };
    Some(Some(Head {
        topic: text_at(batch, "topic", row)?.to_owned(),
        place,
        is_mark: text_at(batch, "kind", row)? == KIND_REQUEUED,
        reason: text_at(batch, "reason_code", row)?.to_owned(),
        payload_bytes: u64::try_from(long_at(batch, "payload_bytes", row)?).unwrap_or(0),
    }))
}

async fn heads(
    table: &Table,
    snapshot_id: Option<i64>,
    filter: Option<Predicate>,
    take: &mut dyn FnMut(Head),
) -> Result<(), ScanError> {
    let columns = HEAD_COLUMNS.map(str::to_owned);
    let mut batches = scan::scan(table, snapshot_id, &columns, filter).await?;
    while let Some(batch) = batches.try_next().await? {
        for row in 0..batch.num_rows() {
            let head =
                head_at(&batch, row).ok_or_else(|| wrong(table, "a column was read in another type"))?;
            head.into_iter().for_each(&mut *take);
        }
    }
    Ok(())
}

/// Texts that many rows share, by number.
#[derive(Debug, Default)]
struct Names {
    numbers: BTreeMap<String, u32>,
    texts: Vec<String>,
}

impl Names {
    fn number(&mut self, text: String) -> u32 {
        let next = u32::try_from(self.texts.len()).expect("fewer than 2^32 reasons and topics");
        match self.numbers.entry(text) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(free) => {
                self.texts.push(free.key().clone());
                *free.insert(next)
            }
        }
    }

    fn text(&self, number: u32) -> &str {
        &self.texts[number as usize]
    }
}

/// What stands at a place.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Standing {
    letter: Option<Letter>,
    is_marked: bool,
}

/// A letter, with the numbers of its reason and its topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Letter {
    reason: u32,
    topic: u32,
    payload_bytes: u64,
}

/// The least places behind another one, at most so many, and what stands at each once every row was taken.
#[derive(Debug)]
struct Slice {
    after: Option<LetterPlace>,
    most: usize,
    /// The least place that was let go: from it on the slice knows nothing.
    end: Option<LetterPlace>,
    places: BTreeMap<LetterPlace, Standing>,
}

impl Slice {
    fn behind(after: Option<LetterPlace>, most: usize) -> Self {
        Self { after, most, end: None, places: BTreeMap::new() }
    }

    fn take(&mut self, names: &mut Names, head: Head) {
        let Head { topic, place, is_mark, reason, payload_bytes } = head;
        if self.after.is_some_and(|after| place <= after) || self.end.is_some_and(|end| place >= end) {
            return;
        }
        let standing = self.places.entry(place).or_default();
        if is_mark {
            standing.is_marked = true;
        } else {
            let letter = Letter { reason: names.number(reason), topic: names.number(topic), payload_bytes };
            // Whichever of two rows of other writers comes first, it is the same one.
            standing.letter = Some(standing.letter.map_or(letter, |known| known.min(letter)));
        }
        if self.places.len() > self.most {
            self.end = self.places.pop_last().map(|(place, _)| place);
        }
    }

    /// The last place of it; `None` if no place follows it.
    fn last(&self) -> Option<LetterPlace> {
        self.end.and(self.places.last_key_value().map(|(place, _)| *place))
    }
}

async fn slice(
    table: &Table,
    snapshot_id: Option<i64>,
    after: Option<LetterPlace>,
    names: &mut Names,
) -> Result<Slice, ScanError> {
    let mut slice = Slice::behind(after, PLACES_MAX);
    heads(table, snapshot_id, None, &mut |head| slice.take(names, head)).await?;
    Ok(slice)
}

/// Letters of one reason, as they are counted.
#[derive(Debug)]
struct OfReason {
    waiting: u64,
    requeued: u64,
    /// First and last place, and its topic.
    first: (LetterPlace, u32),
    last: (LetterPlace, u32),
}

/// How many letters stand in the current snapshot, by reason, the most frequent first.
///
/// # Errors
/// [`ScanError`] when the table can not be read.
pub async fn tally(table: &Table) -> Result<Vec<Tally>, ScanError> {
    let snapshot_id = table.metadata().current_snapshot_id();
    let (mut names, mut reasons) = (Names::default(), BTreeMap::<u32, OfReason>::new());
    let mut after = None;
    loop {
        let slice = slice(table, snapshot_id, after, &mut names).await?;
        for (place, standing) in &slice.places {
            let Some(letter) = standing.letter else { continue };
            let at = (*place, letter.topic);
            let none = || OfReason { waiting: 0, requeued: 0, first: at, last: at };
            let known = reasons.entry(letter.reason).or_insert_with(none);
            *(if standing.is_marked { &mut known.requeued } else { &mut known.waiting }) += 1;
            known.last = at;
        }
        after = slice.last();
        if after.is_none() {
            break;
        }
    }
    let in_words = |(place, topic): (LetterPlace, u32)| place_in_words(names.text(topic), &place);
    let mut tallies: Vec<Tally> = reasons
        .into_iter()
        .map(|(reason, known)| Tally {
            reason: names.text(reason).to_owned(),
            waiting: known.waiting,
            requeued: known.requeued,
            first: in_words(known.first),
            last: in_words(known.last),
        })
        .collect();
    tallies.sort_by_key(|tally| (std::cmp::Reverse(tally.waiting + tally.requeued), tally.reason.clone()));
    Ok(tallies)
}

/// Letters of one frozen snapshot that have bytes and no mark, with one reason or any, in the order of their places.
#[derive(Debug)]
pub struct Queue {
    table: Table,
    snapshot_id: Option<i64>,
    reason: Option<String>,
    /// Those of the slice that were not taken.
    letters: VecDeque<Waiting>,
    /// Where the next slice begins; `None` if none follows.
    next: Option<Begin>,
}

/// Where a slice begins.
type Begin = Option<LetterPlace>;

impl Queue {
    /// Letters behind a place, or all.
    pub fn new(
        table: &Table,
        snapshot_id: Option<i64>,
        reason: Option<&str>,
        after: Option<LetterPlace>,
    ) -> Self {
        let (table, reason) = (table.clone(), reason.map(str::to_owned));
        Self { table, snapshot_id, reason, letters: VecDeque::new(), next: Some(after) }
    }

    /// How many letters it gives.
    ///
    /// # Errors
    /// [`ScanError`] when the table can not be read.
    pub async fn count(mut self) -> Result<u64, ScanError> {
        let mut count = 0;
        while self.fill().await? {
            count += self.letters.len() as u64;
            self.letters.clear();
        }
        Ok(count)
    }

    /// Whether letters are at hand; looks for more if none are.
    ///
    /// # Errors
    /// As [`Queue::count`].
    pub async fn fill(&mut self) -> Result<bool, ScanError> {
        let mut names = Names::default();
        while self.letters.is_empty()
            && let Some(after) = self.next
        {
            let slice = slice(&self.table, self.snapshot_id, after, &mut names).await?;
            self.next = slice.last().map(Some);
            self.letters.extend(slice.places.iter().filter_map(|(place, standing)| {
                let letter = standing.letter.filter(|_| !standing.is_marked)?;
                let reason = names.text(letter.reason);
                let is_asked = self.reason.as_deref().is_none_or(|asked| asked == reason);
                let has_bytes = !WITHOUT_BYTES.contains(&reason);
                (is_asked && has_bytes)
                    .then_some(Waiting { place: *place, payload_bytes: letter.payload_bytes })
            }));
        }
        Ok(!self.letters.is_empty())
    }

    /// Letters at hand, the next first.
    pub fn letters(&self) -> impl Iterator<Item = &Waiting> {
        self.letters.iter()
    }

    /// Takes so many of those at hand. Gives the place of the last of them.
    pub fn take(&mut self, count: usize) -> Option<LetterPlace> {
        self.letters.drain(..count).next_back().map(|letter| letter.place)
    }
}

/// The letters at these ascending places, in that order. A place at which no letter stands is left out.
///
/// # Errors
/// [`ScanError`] when the table can not be read.
pub async fn fetch(
    table: &Table,
    snapshot_id: Option<i64>,
    places: &[LetterPlace],
) -> Result<Vec<StoredLetter>, ScanError> {
    if places.is_empty() {
        return Ok(Vec::new());
    }
    read(table, snapshot_id, Some(predicate_of(places)), &mut |place| places.binary_search(place).is_ok())
        .await
}

/// Letters of one reason, or of one topic partition and offset: the first `most` in the order of their places.
///
/// Reads the places of all of them, and the bytes of those alone that it gives.
///
/// # Errors
/// [`ScanError`] when the table can not be read.
pub async fn find(
    table: &Table,
    reason: Option<&str>,
    at: Option<(&str, i32, i64)>,
    most: usize,
) -> Result<Vec<StoredLetter>, ScanError> {
    let is_letter = Reference::new("kind").equal_to(Datum::string(KIND_LETTER));
    let mut filter = is_letter;
    if let Some(reason) = reason {
        filter = filter.and(Reference::new("reason_code").equal_to(Datum::string(reason)));
    }
    if let Some((topic, partition, offset)) = at {
        filter = filter
            .and(Reference::new("topic").equal_to(Datum::string(topic)))
            .and(Reference::new("partition").equal_to(Datum::int(partition)))
            .and(Reference::new("offset").equal_to(Datum::long(offset)));
    }
    let mut first = BTreeSet::new();
    heads(table, None, Some(filter.clone()), &mut |head| {
        first.insert(head.place);
        if first.len() > most {
            first.pop_last();
        }
    })
    .await?;
    if first.is_empty() {
        return Ok(Vec::new());
    }
    let places: Vec<LetterPlace> = first.into_iter().collect();
    let filter = filter.and(predicate_of(&places));
    read(table, None, Some(filter), &mut |place| places.binary_search(place).is_ok()).await
}

async fn read(
    table: &Table,
    snapshot_id: Option<i64>,
    filter: Option<Predicate>,
    is_asked: &mut dyn FnMut(&LetterPlace) -> bool,
) -> Result<Vec<StoredLetter>, ScanError> {
    let columns = ["topic", "topic_id", "partition", "offset", "index", "kafka_timestamp", "key", "payload"];
    let more = ["payload_bytes", "reason_code", "reason_text", "kind", "_tidemill_batch"];
    let columns: Vec<String> = columns.iter().chain(&more).map(|name| (*name).to_owned()).collect();
    let mut batches = scan::scan(table, snapshot_id, &columns, filter).await?;
    let mut found = Vec::new();
    while let Some(batch) = batches.try_next().await? {
        for row in 0..batch.num_rows() {
            let typed = || wrong(table, "a column was read in another type");
            let Some(place) = place_at(&batch, row).ok_or_else(typed)? else { continue };
            if is_asked(&place) && text_at(&batch, "kind", row).ok_or_else(typed)? == KIND_LETTER {
                found.push(letter_at(&batch, row, place).ok_or_else(typed)?);
            }
        }
    }
    found.sort_by_key(|letter| letter.place);
    found.dedup_by_key(|letter| letter.place);
    Ok(found)
}

fn letter_at(batch: &RecordBatch, row: usize, place: LetterPlace) -> Option<StoredLetter> {
    let bytes_at = |name: &str| {
        let column = batch.column_by_name(name)?.as_binary_opt::<i64>()?;
        Some(column.is_valid(row).then(|| column.value(row).to_vec()))
    };
    let times = batch.column_by_name("kafka_timestamp")?.as_primitive_opt::<TimestampMicrosecondType>()?;
    Some(StoredLetter {
        topic: text_at(batch, "topic", row)?.to_owned(),
        place,
        timestamp_ms: times.is_valid(row).then(|| times.value(row).div_euclid(1_000)),
        key: bytes_at("key")?,
        payload: bytes_at("payload")?,
        payload_bytes: long_at(batch, "payload_bytes", row)?,
        reason_code: text_at(batch, "reason_code", row)?.to_owned(),
        reason_text: text_at(batch, "reason_text", row)?.to_owned(),
        batch: long_at(batch, "_tidemill_batch", row)?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn head((offset, is_mark, payload_bytes): (i64, bool, u64)) -> Head {
        let place = LetterPlace { topic_id: TopicId(Uuid::nil()), partition: 0, offset, row_index: 0 };
        let reason = format!("reason {}", payload_bytes % 3);
        Head { topic: "t".to_owned(), place, is_mark, reason, payload_bytes }
    }

    proptest! {
        /// Goal: slices together hold what stands at every place, whatever their size and the order of rows, and none holds
        /// more than it may.
        #[test]
        fn slices_of_any_size_agree_with_all_places_at_once(
            rows in vec((0i64..40, any::<bool>(), 0u64..6), 0..80),
            most in 1usize..50,
        ) {
            let mut names = Names::default();
            let mut all = Slice::behind(None, usize::MAX);
            rows.iter().for_each(|row| all.take(&mut names, head(*row)));
            prop_assert_eq!(all.last(), None);
            let (mut joined, mut after) = (BTreeMap::new(), None);
            loop {
                let mut slice = Slice::behind(after, most);
                for row in rows.iter().rev() {
                    slice.take(&mut names, head(*row));
                    prop_assert!(slice.places.len() <= most);
                }
                after = slice.last();
                joined.extend(slice.places);
                if after.is_none() {
                    break;
                }
            }
            prop_assert_eq!(joined, all.places);
        }
    }
}
