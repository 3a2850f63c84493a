//! The dead-letter table: refused rows with their place, their reason and the bytes to try again.
//!
//! Flow: letters -> [`known_places`] drops those that already stand -> [`rows`] -> `TableWriter`
//!
//! Invariants
//! 1. A letter stands once per place: topic id, topic partition, offset, index of the row in its record. A batch that
//!    is read again after a crash, or a rebuilt state, adds no second copy.
//! 2. Rows of a batch are written in the order of their places, so files are pruned by place.
//!
//! Columns: `topic`, `topic_id` (UUID as text: every engine shows it alike), `partition`, `offset`, `index`,
//! `kafka_timestamp`, `key`, `payload`, `payload_bytes`, `reason_code`, `reason_text`, `kind`, `_tidemill_batch`.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, AsArray, Int32Array, Int64Array, LargeBinaryArray, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use arrow::datatypes::{Int32Type, Int64Type};
use futures::TryStreamExt;
use iceberg::expr::{Predicate, Reference};
use iceberg::spec::{Datum, PrimitiveType, Schema};
use iceberg::table::Table;

use crate::letter::DeadLetter;
use crate::mutant;
use crate::offset::TopicId;
use crate::sink::scan::{self, ScanError};
use crate::sink::schema::{SchemaError, build_schema};
use crate::sink::stored_letters::KIND_REQUEUED;

/// Value of `kind` of a refused row.
pub const KIND_LETTER: &str = "letter";
/// Up to so many topic partitions each get a range of offsets of their own in the predicate of [`known_places`];
/// more share one wide range.
const RANGES_MAX: usize = 64;

/// Columns that a place is read from.
const PLACE_COLUMNS: [&str; 5] = ["topic_id", "partition", "offset", "index", "kind"];

/// A topic partition of the run, at the index that a letter's slot names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Name of the topic.
    pub topic: String,
    /// Identity of the topic.
    pub topic_id: TopicId,
    /// Number of the topic partition.
    pub partition: i32,
}

/// Where a letter stands, across runs: slots are numbered anew by each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LetterPlace {
    /// Identity of the topic.
    pub topic_id: TopicId,
    /// Number of the topic partition.
    pub partition: i32,
    /// Kafka offset of the record.
    pub offset: i64,
    /// Index of the row in its record.
    pub row_index: i32,
}

impl LetterPlace {
    /// The place of a letter of this run.
    ///
    /// # Panics
    /// When the letter names a slot that the run does not have.
    pub fn of(letter: &DeadLetter, slots: &[Slot]) -> Self {
        let slot = slot_of(letter, slots);
        Self {
            topic_id: slot.topic_id,
            partition: slot.partition,
            offset: letter.place.offset,
            row_index: letter.place.row_index,
        }
    }
}

fn slot_of<'a>(letter: &DeadLetter, slots: &'a [Slot]) -> &'a Slot {
    slots.get(letter.place.slot as usize).expect("a letter names a slot of its run")
}

/// Schema of the dead-letter table, with field ids from 1.
///
/// # Errors
/// Never in practice: the columns are fixed.
pub fn table_schema() -> Result<Schema, SchemaError> {
    let columns = [
        ("topic", PrimitiveType::String, true),
        ("topic_id", PrimitiveType::String, true),
        ("partition", PrimitiveType::Int, true),
        ("offset", PrimitiveType::Long, true),
        ("index", PrimitiveType::Int, true),
        ("kafka_timestamp", PrimitiveType::Timestamptz, false),
        ("key", PrimitiveType::Binary, false),
        ("payload", PrimitiveType::Binary, false),
        ("payload_bytes", PrimitiveType::Long, true),
        ("reason_code", PrimitiveType::String, true),
        ("reason_text", PrimitiveType::String, true),
        ("kind", PrimitiveType::String, true),
        ("_tidemill_batch", PrimitiveType::Long, true),
    ];
    build_schema(columns.map(|(name, of, required)| (name.to_owned(), of, required)).to_vec(), Vec::new())
}

/// Letters as rows for the dead-letter table, sorted by place. Costs a copy of keys and payloads.
///
/// # Errors
/// [`arrow::error::ArrowError`] when the batch is too large for Arrow.
///
/// # Panics
/// When a letter names a slot that the run does not have.
pub fn rows(
    letters: &[DeadLetter],
    slots: &[Slot],
    batch: u64,
) -> Result<RecordBatch, arrow::error::ArrowError> {
    rows_of_kind(KIND_LETTER, letters, slots, batch)
}

/// Marks of letters that were decoded again, as rows: they have the places of the letters and none of their bytes.
///
/// # Errors
/// As [`rows`].
///
/// # Panics
/// As [`rows`].
pub fn marks(
    letters: &[DeadLetter],
    slots: &[Slot],
    batch: u64,
) -> Result<RecordBatch, arrow::error::ArrowError> {
    rows_of_kind(KIND_REQUEUED, letters, slots, batch)
}

fn rows_of_kind(
    kind: &str,
    letters: &[DeadLetter],
    slots: &[Slot],
    batch: u64,
) -> Result<RecordBatch, arrow::error::ArrowError> {
    let mut letters: Vec<&DeadLetter> = letters.iter().collect();
    letters.sort_by_cached_key(|letter| LetterPlace::of(letter, slots));
    let each = || letters.iter().copied();
    let batch = i64::try_from(batch).expect("batches are counted in 63 bits");
    // no overflow: Kafka timestamps are milliseconds of the common era, and a wild one saturates
    let micros = |ms: i64| ms.saturating_mul(1_000);
    let columns: [(&str, ArrayRef, bool); 13] = [
        ("topic", text(each().map(|letter| slot_of(letter, slots).topic.as_str())), false),
        ("topic_id", text(each().map(|letter| slot_of(letter, slots).topic_id.to_string())), false),
        (
            "partition",
            Arc::new(Int32Array::from_iter_values(each().map(|letter| slot_of(letter, slots).partition))),
            false,
        ),
        ("offset", Arc::new(Int64Array::from_iter_values(each().map(|letter| letter.place.offset))), false),
        ("index", Arc::new(Int32Array::from_iter_values(each().map(|letter| letter.place.row_index))), false),
        (
            "kafka_timestamp",
            Arc::new(
                TimestampMicrosecondArray::from_iter(each().map(|letter| letter.timestamp_ms.map(micros)))
                    .with_timezone("+00:00"),
            ),
            true,
        ),
        ("key", Arc::new(LargeBinaryArray::from_iter(each().map(|letter| letter.key.as_deref()))), true),
        (
            "payload",
            Arc::new(LargeBinaryArray::from_iter(each().map(|letter| letter.payload.as_deref()))),
            true,
        ),
        (
            "payload_bytes",
            Arc::new(Int64Array::from_iter_values(each().map(|letter| letter.payload_bytes))),
            false,
        ),
        ("reason_code", text(each().map(|letter| letter.code.as_str())), false),
        ("reason_text", text(each().map(|letter| letter.text.as_str())), false),
        ("kind", text(each().map(|_| kind)), false),
        ("_tidemill_batch", Arc::new(Int64Array::from_iter_values(each().map(|_| batch))), false),
    ];
    RecordBatch::try_from_iter_with_nullable(columns)
}

fn text<S: AsRef<str>>(values: impl Iterator<Item = S>) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(values))
}

/// Which of the candidates already stand in the dead-letter table, in the order given.
///
/// Reads only the columns of places, of files that may hold one of them; holds 32 bytes per candidate.
///
/// # Errors
/// [`ScanError`] when the table can not be read.
pub async fn known_places(table: &Table, candidates: &[LetterPlace]) -> Result<Vec<bool>, ScanError> {
    let mut known = vec![false; candidates.len()];
    if candidates.is_empty() {
        return Ok(known);
    }
    let mut sorted: Vec<(LetterPlace, usize)> = Vec::with_capacity(candidates.len());
    sorted.extend(candidates.iter().copied().enumerate().map(|(index, place)| (place, index)));
    sorted.sort_unstable();
    let columns = PLACE_COLUMNS.map(str::to_owned);
    let mut batches = scan::scan(table, None, &columns, Some(predicate_of(candidates))).await?;
    while let Some(batch) = batches.try_next().await? {
        mark_known(&batch, &sorted, &mut known).map_err(|error| ScanError::of(table, error))?;
    }
    Ok(known)
}

/// Holds for every candidate, and for as little else as a predicate of bounded size can.
pub(super) fn predicate_of(candidates: &[LetterPlace]) -> Predicate {
    let mut ranges: BTreeMap<(TopicId, i32), (i64, i64)> = BTreeMap::new();
    for place in candidates {
        let range = ranges.entry((place.topic_id, place.partition)).or_insert((place.offset, place.offset));
        *range = (range.0.min(place.offset), range.1.max(place.offset));
    }
    let is_letter = Reference::new("kind").equal_to(Datum::string(KIND_LETTER));
    if ranges.len() > RANGES_MAX {
        return is_letter.and(wide_range(&ranges));
    }
    let each = ranges.iter().map(|((topic_id, partition), (first, last))| {
        Reference::new("topic_id")
            .equal_to(Datum::string(topic_id))
            .and(Reference::new("partition").equal_to(Datum::int(*partition)))
            .and(offsets(*first, *last))
    });
    is_letter.and(each.reduce(Predicate::or).expect("there is a candidate"))
}

fn wide_range(ranges: &BTreeMap<(TopicId, i32), (i64, i64)>) -> Predicate {
    let first = ranges.values().map(|(first, _)| *first).min().expect("there is a candidate");
    let last = ranges.values().map(|(_, last)| *last).max().expect("there is a candidate");
    let topics: std::collections::BTreeSet<TopicId> = ranges.keys().map(|(topic_id, _)| *topic_id).collect();
    let of_topics = Reference::new("topic_id").is_in(topics.iter().map(Datum::string));
    of_topics.and(offsets(first, last))
}

fn offsets(first: i64, last: i64) -> Predicate {
    let offset = || Reference::new("offset");
    offset()
        .greater_than_or_equal_to(Datum::long(first))
        .and(offset().less_than_or_equal_to(Datum::long(last)))
}

fn mark_known(
    batch: &RecordBatch,
    sorted: &[(LetterPlace, usize)],
    known: &mut [bool],
) -> Result<(), iceberg::Error> {
    let wrong = |what: String| iceberg::Error::new(iceberg::ErrorKind::DataInvalid, what);
    let column =
        |name: &str| batch.column_by_name(name).ok_or_else(|| wrong(format!("no column {name} was read")));
    let typed = |name: &str| wrong(format!("column {name} was read in another type"));
    let topic_ids = column("topic_id")?.as_string_opt::<i32>().ok_or_else(|| typed("topic_id"))?;
    let partitions =
        column("partition")?.as_primitive_opt::<Int32Type>().ok_or_else(|| typed("partition"))?;
    let offsets = column("offset")?.as_primitive_opt::<Int64Type>().ok_or_else(|| typed("offset"))?;
    let indices = column("index")?.as_primitive_opt::<Int32Type>().ok_or_else(|| typed("index"))?;
    for row in 0..batch.num_rows() {
        // a text that is no UUID is another program's row, and so no letter of ours
        let Ok(topic_id) = topic_ids.value(row).parse::<uuid::Uuid>() else {
            continue;
        };
        let place = LetterPlace {
            topic_id: TopicId(topic_id),
            partition: partitions.value(row),
            offset: offsets.value(row),
            row_index: indices.value(row),
        };
        let first = sorted.partition_point(|(candidate, _)| *candidate < place);
        for (_, index) in sorted[first..].iter().take_while(|(candidate, _)| *candidate == place) {
            known[*index] = mutant!("letter-written-again", false => true);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::letter::ReasonCode;
    use crate::offset::Place;
    use crate::sink::schema::create_dead_letters;
    use crate::sink::testing::{append, catalog, job, read};
    use crate::sink::writer::TableWriter;

    fn slots(count: i32) -> Vec<Slot> {
        let slot = |partition: i32| Slot {
            topic: format!("topic-{}", partition % 2),
            topic_id: TopicId(Uuid::from_u128(0xabc0 + (partition % 2) as u128)),
            partition,
        };
        (0..count).map(slot).collect()
    }

    fn letter(slot: u32, offset: i64, row_index: i32) -> DeadLetter {
        DeadLetter {
            place: Place { slot, offset, row_index },
            timestamp_ms: (offset % 2 == 0).then_some(1_772_323_200_000 + offset),
            key: (offset % 3 == 0).then(|| vec![0, 159, 146, 150]),
            payload: (offset % 5 != 0).then(|| format!("{{\"n\":{offset}").into_bytes()),
            payload_bytes: offset,
            code: ReasonCode::TruncatedJson,
            text: format!("payload ends inside a value at byte {offset}"),
        }
    }

    async fn write(catalog: &dyn iceberg::Catalog, table: Table, batch: RecordBatch) -> Table {
        let mut writer = TableWriter::new(&table, Uuid::now_v7(), 16 << 20, &[]).unwrap();
        writer.write(&batch).await.unwrap();
        append(catalog, &table, writer.finish().await.unwrap()).await
    }

    #[tokio::test]
    async fn letters_stand_in_the_table_with_their_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let job = job(folder.path());
        let catalog = catalog(&job).await;
        let table = create_dead_letters(catalog.as_ref(), &job).await.unwrap();
        let letters = [letter(1, 8, 0), letter(0, 15, 2), letter(0, 7, 0)];
        let table = write(catalog.as_ref(), table, rows(&letters, &slots(2), 4).unwrap()).await;

        let found =
            read(&table, &["topic", "offset", "index", "payload", "key", "reason_code", "kafka_timestamp"])
                .await;
        let all = arrow::compute::concat_batches(&found[0].schema(), &found).unwrap();
        let offsets = all.column(1).as_primitive::<Int64Type>().values().to_vec();
        assert_eq!(offsets, [7, 15, 8]);
        assert_eq!(all.column(0).as_string::<i32>().value(2), "topic-1");
        assert_eq!(all.column(2).as_primitive::<Int32Type>().values().to_vec(), [0, 2, 0]);
        let payloads = all.column(3).as_binary::<i64>();
        assert_eq!(
            payloads.iter().collect::<Vec<_>>(),
            [Some(b"{\"n\":7".as_slice()), None, Some(b"{\"n\":8")]
        );
        let keys = all.column(4).as_binary::<i64>();
        assert_eq!(keys.iter().collect::<Vec<_>>(), [None, Some([0, 159, 146, 150].as_slice()), None]);
        assert_eq!(all.column(5).as_string::<i32>().value(0), "truncated_json");
        let times = all.column(6).as_primitive::<arrow::datatypes::TimestampMicrosecondType>();
        assert_eq!(times.iter().collect::<Vec<_>>(), [None, None, Some(1_772_323_200_008_000)]);
    }

    #[tokio::test]
    async fn only_places_that_stand_are_known_whatever_the_slots_are_today() {
        for partitions in [3, 200] {
            let folder = tempfile::tempdir().unwrap();
            let job = job(folder.path());
            let catalog = catalog(&job).await;
            let table = create_dead_letters(catalog.as_ref(), &job).await.unwrap();
            let mut slots = slots(partitions);
            let place = |letter: &DeadLetter, slots: &[Slot]| LetterPlace::of(letter, slots);
            assert_eq!(known_places(&table, &[place(&letter(0, 1, 0), &slots)]).await.unwrap(), [false]);
            let last = partitions as u32 - 1;
            let mut table = table;
            for part in 0..3 {
                let letters: Vec<DeadLetter> = (0..=last)
                    .flat_map(|slot| [letter(slot, part * 10, 0), letter(slot, part * 10, 1)])
                    .collect();
                table = write(catalog.as_ref(), table, rows(&letters, &slots, 1).unwrap()).await;
            }
            let today: Vec<DeadLetter> = (0..=last)
                .flat_map(|slot| {
                    [letter(slot, 10, 1), letter(slot, 10, 2), letter(slot, 11, 0), letter(slot, 20, 0)]
                })
                .collect();
            let places: Vec<LetterPlace> = today.iter().map(|letter| place(letter, &slots)).collect();
            let expected: Vec<bool> = (0..=last).flat_map(|_| [true, false, false, true]).collect();
            assert_eq!(known_places(&table, &places).await.unwrap(), expected);
            // the topic was made again: same name and offsets, other places
            for slot in &mut slots {
                slot.topic_id = TopicId(Uuid::from_u128(7));
            }
            let places: Vec<LetterPlace> = today.iter().map(|letter| place(letter, &slots)).collect();
            assert_eq!(known_places(&table, &places).await.unwrap(), vec![false; places.len()]);
        }
    }
}
