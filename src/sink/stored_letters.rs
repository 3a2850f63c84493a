//! Dead letters read back: how many stand there and why, their bytes, and which wait to be decoded again.
//!
//! A letter that was decoded again is marked by a second row of its place, `kind` = [`KIND_REQUEUED`]; the first one stays.
//!
//! Bounds: [`Tally`] holds a line per reason and the places of marks; [`waiting`] holds 56 bytes per letter; [`fetch`] and
//! [`find`] hold the letters that they are asked for, and no other's bytes.

use std::collections::{BTreeMap, BTreeSet, HashSet};

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

/// How many letters stand in the current snapshot, by reason, the most frequent first.
///
/// # Errors
/// [`ScanError`] when the table can not be read.
pub async fn tally(table: &Table) -> Result<Vec<Tally>, ScanError> {
    let mut marks = HashSet::new();
    heads(table, None, None, &mut |head| _ = head.is_mark.then(|| marks.insert(head.place))).await?;
    // Waiting, requeued, and the first and last place with its topic.
    type OfReason = (u64, u64, [(LetterPlace, String); 2]);
    let mut reasons: BTreeMap<String, OfReason> = BTreeMap::new();
    heads(table, None, None, &mut |head| {
        if head.is_mark {
            return;
        }
        let at = (head.place, head.topic);
        let (waiting, requeued, [first, last]) =
            reasons.entry(head.reason).or_insert_with(|| (0, 0, [at.clone(), at.clone()]));
        *(if marks.contains(&at.0) { requeued } else { waiting }) += 1;
        if at.0 < first.0 {
            first.clone_from(&at);
        }
        if at.0 > last.0 {
            *last = at;
        }
    })
    .await?;
    let mut tallies: Vec<Tally> = reasons
        .into_iter()
        .map(|(reason, (waiting, requeued, [first, last]))| Tally {
            reason,
            waiting,
            requeued,
            first: place_in_words(&first.1, &first.0),
            last: place_in_words(&last.1, &last.0),
        })
        .collect();
    tallies.sort_by_key(|tally| std::cmp::Reverse(tally.waiting + tally.requeued));
    Ok(tallies)
}

/// Letters of a snapshot that have bytes and no mark, with this reason or any, in the order of their places.
///
/// # Errors
/// [`ScanError`] when the table can not be read.
pub async fn waiting(
    table: &Table,
    snapshot_id: Option<i64>,
    reason: Option<&str>,
) -> Result<Vec<Waiting>, ScanError> {
    let (mut marks, mut letters) = (HashSet::new(), Vec::new());
    heads(table, snapshot_id, None, &mut |head| {
        if head.is_mark {
            marks.insert(head.place);
        } else if reason.is_none_or(|reason| reason == head.reason)
            && !WITHOUT_BYTES.contains(&head.reason.as_str())
        {
            letters.push(Waiting { place: head.place, payload_bytes: head.payload_bytes });
        }
    })
    .await?;
    letters.retain(|letter| !marks.contains(&letter.place));
    letters.sort_unstable();
    letters.dedup();
    Ok(letters)
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
