//! The ledger record: what one commit says about everything that it switches.
//!
//! Two forms are written by the same commit. The *full* form is JSON in the table property
//! [`PROPERTY`]; it survives snapshot expiry. The *packed* form stands in the snapshot summary under
//! [`SUMMARY_PACKED`], beside single keys for people and queries; it shows a rollback, because it moves with
//! the snapshot, and it is enough to resume. It leaves out what a resume can do without: tail hashes, starts
//! (the parent's ends), bucket digests (they stand in the generation manifest) and the list of side files.
//!
//! Invariants
//! 1. `sequence` rises by one with every commit of a job, of whatever kind; a property whose sequence is above the
//!    ancestry's means that the table was rolled back.
//! 2. `batch` rises by one with every commit of kind [`Kind::Data`] and by no other.
//! 3. `attempt` is new in every commit; finding it on the ancestry is the proof that the commit landed.
//!
//! Packed lanes: `partition:end,delta;...` per topic, where delta is the lane's largest event time less the
//! partition's, in ms, or `-` for none. At most 24 bytes a topic partition up to offsets of 1e12.

use std::collections::BTreeMap;

use iceberg::spec::TableMetadata;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::counts::Counts;
use crate::event_time::EventTimeMs;
use crate::job::Repeats;
use crate::offset::{NextOffset, TopicId};

/// Version of the record that this program writes. It reads this and older ones.
pub const FORMAT_VERSION: u32 = 1;
/// Table property with the full record.
pub const PROPERTY: &str = "tidemill.ledger";
/// Snapshot summary key with the packed record.
pub const SUMMARY_PACKED: &str = "tidemill.packed";
/// Name of the lane that follows the topics; backfills get lanes of their own.
pub const LIVE_LANE: &str = "live";

/// One record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LedgerRecord {
    /// Format version of this record.
    pub format: u32,
    /// Identity of the job, drawn by its first commit.
    pub job_id: Uuid,
    /// Name in the job file.
    pub job_name: String,
    /// Fencing token: rises by one with every fence.
    pub epoch: u64,
    /// Random identity of the process that may commit.
    pub owner: Uuid,
    /// End of the lease, ms since the epoch, by the owner's clock.
    pub lease_until_ms: i64,
    /// Whether the owner gave the table back.
    pub released: bool,
    /// What this commit did.
    pub kind: Kind,
    /// Number of this record in the job's history, from 1.
    pub sequence: u64,
    /// Identity of this commit, UUIDv7.
    pub attempt: Uuid,
    /// Number of the last microbatch, from 1; 0 before the first.
    pub batch: u64,
    /// Number of the last microbatch that wrote rows to the main table; 0 for none.
    pub last_batch_with_rows: u64,
    /// When the last microbatch was cut, ms since the epoch.
    pub cut_time_ms: i64,
    /// Kafka's cluster id.
    pub cluster_id: Option<String>,
    /// Schema of the main table that the files were written with.
    pub schema_id: i32,
    /// Partition spec of the main table that the files were written with.
    pub spec_id: i32,
    /// Hash of the job's meaning.
    pub job_hash: String,
    /// Side tables must go back to this batch before anything else (written by restore and replay).
    pub sides_back_to: Option<u64>,
    /// Dedup state.
    pub dedup: DedupRecord,
    /// Topic ids by topic.
    pub topics: BTreeMap<String, Option<TopicId>>,
    /// Cursors by lane.
    pub lanes: BTreeMap<String, Lane>,
    /// Outcomes of the last microbatch.
    #[serde(default)]
    pub counts: Counts,
    /// Side tables by role.
    pub sides: BTreeMap<String, SideRecord>,
    /// Live buckets of the generation.
    #[serde(default)]
    pub buckets: Vec<BucketRecord>,
    /// Why offsets jumped, if this commit moved them without reading.
    #[serde(default)]
    pub jumps: Vec<Jump>,
}

/// What a commit did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The first commit of a job: start offsets, no rows.
    Start,
    /// A new owner took the table: epoch + 1.
    Fence,
    /// A microbatch, perhaps without rows.
    Data,
    /// The owner renewed its lease: a copy of the record, same epoch.
    Renewal,
    /// The owner gave the table back.
    Release,
    /// Offsets moved without reading, for a stated reason.
    Jump,
}

/// A cursor over topic partitions with a watermark of its own.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Lane {
    /// Event time held to be complete; never moves back.
    pub watermark: Option<EventTimeMs>,
    /// Cursor by topic and topic partition.
    pub topics: BTreeMap<String, BTreeMap<i32, Cursor>>,
}

/// How far one topic partition has been read.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Cursor {
    /// First offset of the last microbatch.
    pub start: NextOffset,
    /// Next offset to read.
    pub end: NextOffset,
    /// The last record taken, to recognise a log that was cut and written again.
    #[serde(default)]
    pub tail: Option<Tail>,
    /// Largest event time of all records taken.
    pub max_event_time: Option<EventTimeMs>,
}

/// The last record taken from a topic partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tail {
    /// Its offset.
    pub offset: i64,
    /// Hash of its offset, timestamp, key and payload.
    pub hash: u64,
}

/// Which dedup state belongs to this commit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DedupRecord {
    /// Generation manifest; `None` before the first microbatch.
    pub generation: Option<String>,
    /// Checksum of the manifest, hexadecimal.
    pub checksum: Option<String>,
    /// Seed of fingerprints, drawn by the first commit.
    pub seed: u64,
    /// Hash of key columns, their types, the encoding version and everything else that a key means.
    pub key_spec_hash: String,
    /// Number of shards.
    pub shards: u32,
    /// Width of a bucket of event time that no era holds.
    pub bucket_width_ms: i64,
    /// Earlier widths, ascending, as far as a bucket of theirs may be live.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub eras: Vec<EraRecord>,
    /// The producer's promise about repeats.
    pub repeats: Repeats,
    /// End of the open first bucket, so that a rebuild makes the same buckets; `None` before the first key.
    pub floor: Option<EventTimeMs>,
    /// Every bucket from here on holds all keys of our rows; `None` = since ever.
    pub complete_since: Option<EventTimeMs>,
    /// Keys of all live buckets.
    #[serde(default)]
    pub keys: u64,
    /// Sum of the buckets' digests, hexadecimal: what is left to compare with when the list of buckets is gone.
    #[serde(default)]
    pub digest: String,
}

/// Buckets of event time before `until` had another width.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EraRecord {
    /// First event time that no longer has this width.
    pub until: EventTimeMs,
    /// The width.
    pub bucket_width_ms: i64,
}

/// One side table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SideRecord {
    /// Namespace and name.
    pub table: String,
    /// Table UUID.
    pub uuid: Uuid,
    /// Data files of microbatch `batch` that the table must receive, as the iceberg crate writes data files to JSON;
    /// `None` when only the packed form was left.
    pub files: Option<Vec<Value>>,
    /// Schema and partition spec that the files were written with.
    pub schema_id: i32,
    /// See `schema_id`.
    pub spec_id: i32,
    /// Whether `batch` owes this table files.
    pub owed: bool,
}

/// One bucket of event time, `[from, to)` in ms.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BucketRecord {
    /// First ms.
    pub from: i64,
    /// First ms after it.
    pub to: i64,
    /// Keys.
    pub count: u64,
    /// Order-free digest of the keys, hexadecimal.
    pub digest: String,
}

/// Offsets of one topic partition moved without reading.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Jump {
    /// Topic.
    pub topic: String,
    /// Topic partition.
    pub partition: i32,
    /// Next offset before; `None` for a topic partition that the ledger did not know.
    pub old_end: Option<NextOffset>,
    /// Next offset after.
    pub new_start: NextOffset,
    /// `accept-loss` or `rebase-offsets`.
    pub reason: String,
}

/// Why a record can not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// Written by a newer program.
    #[error("ledger format {found} is newer than {FORMAT_VERSION}, the newest that this program reads")]
    Newer {
        /// Version found.
        found: u64,
    },
    /// Not a record.
    #[error("ledger record in {place} can not be read: {why}")]
    Corrupt {
        /// Property or snapshot.
        place: String,
        /// What is wrong with it.
        why: String,
    },
}

impl LedgerRecord {
    /// The live lane.
    pub fn live(&self) -> &Lane {
        static EMPTY: Lane = Lane { watermark: None, topics: BTreeMap::new() };
        self.lanes.get(LIVE_LANE).unwrap_or(&EMPTY)
    }

    /// Cursor of one topic partition of the live lane.
    pub fn cursor(&self, topic: &str, partition: i32) -> Option<&Cursor> {
        self.live().topics.get(topic)?.get(&partition)
    }

    /// Whether a side table still waits for files of `batch`, as far as main's record knows.
    pub fn owes_side_files(&self) -> bool {
        self.sides.values().any(|side| side.owed)
    }

    /// Text of the table property.
    pub fn to_property(&self) -> String {
        serde_json::to_string(self).expect("a ledger record has only string keys and finite numbers")
    }

    /// Summary keys: the packed record, and single values for people.
    pub fn to_summary(&self) -> BTreeMap<String, String> {
        BTreeMap::from([
            ("tidemill.job-id".to_owned(), self.job_id.to_string()),
            ("tidemill.kind".to_owned(), kind_name(self.kind).to_owned()),
            ("tidemill.epoch".to_owned(), self.epoch.to_string()),
            ("tidemill.batch".to_owned(), self.batch.to_string()),
            ("tidemill.attempt".to_owned(), self.attempt.to_string()),
            ("tidemill.counts".to_owned(), serde_json::to_string(&self.counts).expect("counts are numbers")),
            (SUMMARY_PACKED.to_owned(), self.pack()),
        ])
    }

    fn pack(&self) -> String {
        let mut packed = match serde_json::to_value(self) {
            Ok(Value::Object(object)) => object,
            _ => unreachable!("a ledger record serialises to an object"),
        };
        for left_out in ["counts", "buckets", "jumps"] {
            packed.remove(left_out);
        }
        for side in packed["sides"].as_object_mut().into_iter().flat_map(Map::values_mut) {
            side["files"] = Value::Null;
        }
        let lanes = self.lanes.iter().map(|(name, lane)| (name.clone(), pack_lane(lane)));
        packed.insert("lanes".to_owned(), Value::Object(lanes.collect()));
        let mut packed = Value::Object(packed);
        drop_nulls(&mut packed);
        packed.to_string()
    }

    /// Reads the full form.
    ///
    /// # Errors
    /// [`LedgerError`]; the version is judged before anything else, so a newer record is never half understood.
    pub fn from_property(text: &str) -> Result<Self, LedgerError> {
        let place = format!("table property {PROPERTY}");
        let value = parse_versioned(text, &place)?;
        serde_json::from_value(Value::Object(value)).map_err(|error| corrupt(&place, error))
    }

    /// Reads the packed form; starts equal ends, tails and side files are absent.
    ///
    /// # Errors
    /// [`LedgerError`], as [`LedgerRecord::from_property`].
    pub fn from_packed(text: &str, snapshot_id: i64) -> Result<Self, LedgerError> {
        let place = format!("summary of snapshot {snapshot_id}");
        let mut value = parse_versioned(text, &place)?;
        let packed = value.remove("lanes").ok_or_else(|| corrupt(&place, "no lanes"))?;
        value.insert("lanes".to_owned(), Value::Object(Map::new()));
        let mut record: LedgerRecord =
            serde_json::from_value(Value::Object(value)).map_err(|error| corrupt(&place, error))?;
        for (name, lane) in packed.as_object().into_iter().flatten() {
            record.lanes.insert(name.clone(), unpack_lane(lane).map_err(|why| corrupt(&place, why))?);
        }
        Ok(record)
    }
}

/// Members that count up by one; the table is outside input, so their range is judged before they are used.
const COUNTERS: [&str; 4] = ["epoch", "sequence", "batch", "last_batch_with_rows"];

fn is_counter(value: Option<&Value>) -> bool {
    value.and_then(Value::as_u64).is_some_and(|number| number < 1 << 53)
}

fn corrupt(place: &str, why: impl ToString) -> LedgerError {
    LedgerError::Corrupt { place: place.to_owned(), why: why.to_string() }
}

fn parse_versioned(text: &str, place: &str) -> Result<Map<String, Value>, LedgerError> {
    let value: Value = serde_json::from_str(text).map_err(|error| corrupt(place, error))?;
    let Value::Object(object) = value else { return Err(corrupt(place, "not a JSON object")) };
    match object.get("format").and_then(Value::as_u64) {
        None => Err(corrupt(place, "no format version")),
        Some(found) if found > u64::from(FORMAT_VERSION) => Err(LedgerError::Newer { found }),
        Some(_) => match COUNTERS.iter().find(|name| !is_counter(object.get(**name))) {
            None => Ok(object),
            Some(name) => Err(corrupt(place, format!("{name} is no number below 2^53"))),
        },
    }
}

/// An absent member reads as none, so the packed form needs no nulls.
fn drop_nulls(value: &mut Value) {
    if let Value::Object(members) = value {
        members.retain(|_, member| !member.is_null());
        members.values_mut().for_each(drop_nulls);
    }
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Start => "start",
        Kind::Fence => "fence",
        Kind::Data => "data",
        Kind::Renewal => "renewal",
        Kind::Release => "release",
        Kind::Jump => "jump",
    }
}

fn pack_lane(lane: &Lane) -> Value {
    let cursors = lane.topics.values().flat_map(BTreeMap::values);
    let leader = cursors.filter_map(|cursor| cursor.max_event_time).max();
    let topics = lane.topics.iter().map(|(topic, partitions)| {
        let text: Vec<String> = partitions
            .iter()
            .map(|(partition, cursor)| match (leader, cursor.max_event_time) {
                (Some(leader), Some(time)) => format!("{partition}:{},{}", cursor.end, leader.0 - time.0),
                _ => format!("{partition}:{},-", cursor.end),
            })
            .collect();
        (topic.clone(), Value::String(text.join(";")))
    });
    serde_json::json!({
        "watermark": lane.watermark, "leader": leader, "topics": Value::Object(topics.collect()),
    })
}

fn unpack_lane(value: &Value) -> Result<Lane, String> {
    let watermark = value["watermark"].as_i64().map(EventTimeMs);
    let leader = value["leader"].as_i64();
    let mut topics = BTreeMap::new();
    for (topic, text) in value["topics"].as_object().ok_or("a lane without topics")? {
        let text = text.as_str().ok_or("topic partitions are not text")?;
        let mut partitions = BTreeMap::new();
        for part in text.split(';').filter(|part| !part.is_empty()) {
            let (partition, cursor) =
                unpack_cursor(part, leader).ok_or_else(|| format!("bad cursor {part:?}"))?;
            partitions.insert(partition, cursor);
        }
        topics.insert(topic.clone(), partitions);
    }
    Ok(Lane { watermark, topics })
}

fn unpack_cursor(text: &str, leader: Option<i64>) -> Option<(i32, Cursor)> {
    let (partition, rest) = text.split_once(':')?;
    let (end, delta) = rest.split_once(',')?;
    let end = NextOffset::at(end.parse().ok()?);
    let max_event_time = match delta {
        "-" => None,
        delta => Some(EventTimeMs(leader?.checked_sub(delta.parse().ok()?)?)),
    };
    Some((partition.parse().ok()?, Cursor { start: end, end, tail: None, max_event_time }))
}

/// What a table's metadata says about our ledger.
#[derive(Debug)]
pub enum Found {
    /// Neither ancestry nor property has a record.
    Nothing,
    /// The record that holds.
    Record(Box<LedgerRecord>),
    /// The ancestry carries `older` (or, complete to its root, nothing) where the property says `newer`.
    RolledBack {
        /// The record on the ancestry, if any.
        older: Option<Box<LedgerRecord>>,
        /// The record of the property.
        newer: Box<LedgerRecord>,
    },
    /// History was expired before any record of ours; the property may hold. The caller looks for rows of
    /// `last_batch_with_rows` to tell expiry from a rollback followed by expiry.
    CutOff(Box<LedgerRecord>),
}

/// Reads the ledger: ancestry of the current snapshot first, property second.
///
/// # Errors
/// [`LedgerError`] when the record that would hold is newer or broken. A broken property is passed over while the
/// ancestry has the record.
pub fn inspect(metadata: &TableMetadata) -> Result<Found, LedgerError> {
    let on_ancestry = newest_on_ancestry(metadata)?;
    let property = metadata.properties().get(PROPERTY).map(|text| LedgerRecord::from_property(text));
    match (on_ancestry, property) {
        (Ancestry::Record(_), Some(Err(newer @ LedgerError::Newer { .. }))) => Err(newer),
        (Ancestry::Record(older), Some(Ok(full))) if full.sequence > older.sequence => {
            Ok(Found::RolledBack { older: Some(older), newer: Box::new(full) })
        }
        (Ancestry::Record(packed), Some(Ok(full))) if is_full_form_of(&full, &packed) => {
            Ok(Found::Record(Box::new(full)))
        }
        (Ancestry::Record(packed), _) => Ok(Found::Record(packed)),
        (_, None) => Ok(Found::Nothing),
        (_, Some(Err(error))) => Err(error),
        (Ancestry::Complete, Some(Ok(full))) => Ok(Found::RolledBack { older: None, newer: Box::new(full) }),
        (Ancestry::CutOff, Some(Ok(full))) => Ok(Found::CutOff(Box::new(full))),
    }
}

/// Whether a full record says the same as the packed one of the same commit. One that was edited by hand does not, and
/// the ancestry wins. Both are read by this program, so a record of an older one compares as equal too.
fn is_full_form_of(full: &LedgerRecord, packed: &LedgerRecord) -> bool {
    let same = LedgerRecord::from_packed(&full.pack(), 0).is_ok_and(|again| again == *packed);
    if !same && full.attempt == packed.attempt {
        tracing::warn!(
            "table property {PROPERTY} was changed by hand; the record of the snapshot is used instead"
        );
    }
    same
}

/// Whether a commit of ours landed: it stands on the ancestry, or the ancestry was expired and the property names it.
pub fn has_landed(metadata: &TableMetadata, attempt: Uuid) -> bool {
    attempt_on_ancestry(metadata, attempt)
        || matches!(inspect(metadata), Ok(Found::CutOff(record)) if record.attempt == attempt)
}

/// Whether a commit of ours stands on the ancestry of the current snapshot.
pub fn attempt_on_ancestry(metadata: &TableMetadata, attempt: Uuid) -> bool {
    let wanted = attempt.to_string();
    ancestry(metadata)
        .any(|snapshot| snapshot.summary().additional_properties.get("tidemill.attempt") == Some(&wanted))
}

/// Outcomes of microbatches by number, as far as the ancestry is kept.
///
/// # Errors
/// [`LedgerError::Corrupt`] when a summary of ours can not be read.
pub fn counts_on_ancestry(metadata: &TableMetadata) -> Result<BTreeMap<u64, Counts>, LedgerError> {
    let mut counts = BTreeMap::new();
    for snapshot in ancestry(metadata) {
        let summary = &snapshot.summary().additional_properties;
        if summary.get("tidemill.kind").is_none_or(|kind| kind != kind_name(Kind::Data)) {
            continue;
        }
        let broken = |key: &str| corrupt(&format!("summary of snapshot {}", snapshot.snapshot_id()), key);
        let batch = summary.get("tidemill.batch").and_then(|text| text.parse().ok());
        let outcomes = summary.get("tidemill.counts").and_then(|text| serde_json::from_str(text).ok());
        let batch: u64 = batch.ok_or_else(|| broken("no tidemill.batch"))?;
        counts.insert(batch, outcomes.ok_or_else(|| broken("no tidemill.counts"))?);
    }
    Ok(counts)
}

/// Generations that the newest records on the ancestry name, newest first, each once, at most `most`.
pub fn recent_generations(metadata: &TableMetadata, most: usize) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    for snapshot in ancestry(metadata) {
        if found.len() == most {
            break;
        }
        let packed = snapshot.summary().additional_properties.get(SUMMARY_PACKED);
        let Some(Ok(record)) = packed.map(|text| LedgerRecord::from_packed(text, snapshot.snapshot_id()))
        else {
            continue;
        };
        if let (Some(name), Some(checksum)) = (record.dedup.generation, record.dedup.checksum)
            && found.iter().all(|(known, _)| *known != name)
        {
            found.push((name, checksum));
        }
    }
    found
}

enum Ancestry {
    Record(Box<LedgerRecord>),
    Complete,
    CutOff,
}

fn newest_on_ancestry(metadata: &TableMetadata) -> Result<Ancestry, LedgerError> {
    let mut complete = true;
    for snapshot in ancestry(metadata) {
        if let Some(text) = snapshot.summary().additional_properties.get(SUMMARY_PACKED) {
            let record = LedgerRecord::from_packed(text, snapshot.snapshot_id())?;
            return Ok(Ancestry::Record(Box::new(record)));
        }
        complete = snapshot.parent_snapshot_id().is_none();
    }
    Ok(if complete { Ancestry::Complete } else { Ancestry::CutOff })
}

/// Snapshots from the current one to the oldest that is kept.
fn ancestry(metadata: &TableMetadata) -> impl Iterator<Item = &iceberg::spec::SnapshotRef> {
    std::iter::successors(metadata.current_snapshot(), move |snapshot| {
        metadata.snapshot_by_id(snapshot.parent_snapshot_id()?)
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A record at batch 4, with one topic partition read to offset 100.
    pub(crate) fn record() -> LedgerRecord {
        let cursor = Cursor {
            start: NextOffset::at(50),
            end: NextOffset::at(100),
            tail: Some(Tail { offset: 99, hash: 7 }),
            max_event_time: Some(EventTimeMs(1_700_000_000_000)),
        };
        let behind = Cursor { max_event_time: Some(EventTimeMs(1_699_999_000_000)), ..cursor };
        let empty = Cursor { max_event_time: None, tail: None, ..cursor };
        let partitions = BTreeMap::from([(0, cursor), (1, behind), (2, empty)]);
        let lane = Lane {
            watermark: Some(EventTimeMs(1_699_999_400_000)),
            topics: BTreeMap::from([("sent".to_owned(), partitions)]),
        };
        LedgerRecord {
            format: FORMAT_VERSION,
            job_id: Uuid::from_u128(1),
            job_name: "n".into(),
            epoch: 3,
            owner: Uuid::from_u128(2),
            lease_until_ms: 1_700_000_900_000,
            released: true,
            kind: Kind::Data,
            sequence: 11,
            attempt: Uuid::from_u128(3),
            batch: 4,
            last_batch_with_rows: 4,
            cut_time_ms: 1_700_000_000_500,
            cluster_id: Some("c1".into()),
            schema_id: 0,
            spec_id: 0,
            job_hash: "hash".into(),
            sides_back_to: None,
            dedup: DedupRecord {
                generation: Some("g".into()),
                checksum: Some("c".into()),
                seed: u64::MAX,
                key_spec_hash: "spec".into(),
                shards: 256,
                bucket_width_ms: 75_600_000,
                eras: Vec::new(),
                repeats: Repeats::AnyTime,
                floor: Some(EventTimeMs(1_600_000_000_000)),
                complete_since: None,
                keys: 50,
                digest: "0f".into(),
            },
            topics: BTreeMap::from([("sent".to_owned(), Some(TopicId(Uuid::from_u128(4))))]),
            lanes: BTreeMap::from([(LIVE_LANE.to_owned(), lane)]),
            counts: Counts { consumed: 50, written: 50, ..Counts::default() },
            sides: BTreeMap::new(),
            buckets: vec![BucketRecord { from: 0, to: 1, count: 50, digest: "00".into() }],
            jumps: Vec::new(),
        }
    }

    #[test]
    fn the_full_form_comes_back_as_it_was() {
        let record = record();
        assert_eq!(LedgerRecord::from_property(&record.to_property()).unwrap(), record);
    }

    #[test]
    fn both_forms_carry_the_widths_of_earlier_buckets_and_from_when_the_state_is_complete() {
        let mut record = record();
        assert!(!record.pack().contains("eras"), "a width that never changed takes no room");
        record.dedup.eras =
            vec![EraRecord { until: EventTimeMs(1_650_000_000_000), bucket_width_ms: 3_600_000 }];
        record.dedup.complete_since = Some(EventTimeMs(1_640_000_000_000));
        let full = LedgerRecord::from_property(&record.to_property()).unwrap();
        let packed = LedgerRecord::from_packed(&record.pack(), 1).unwrap();
        assert_eq!((&full.dedup, &packed.dedup), (&record.dedup, &record.dedup));
    }

    #[test]
    fn the_packed_form_is_enough_to_resume() {
        let record = record();
        let summary = record.to_summary();
        let unpacked = LedgerRecord::from_packed(&summary[SUMMARY_PACKED], 1).unwrap();
        let mut expected = record;
        for cursor in expected.lanes.get_mut(LIVE_LANE).unwrap().topics.get_mut("sent").unwrap().values_mut()
        {
            (cursor.start, cursor.tail) = (cursor.end, None);
        }
        (expected.counts, expected.buckets) = (Counts::default(), Vec::new());
        assert_eq!(unpacked, expected);
    }

    #[test]
    fn a_property_that_was_edited_by_hand_is_not_the_full_form_of_its_commit() {
        let record = record();
        let packed = LedgerRecord::from_packed(&record.pack(), 1).unwrap();
        assert!(is_full_form_of(&record, &packed));
        let mut edited = record;
        let cursors = edited.lanes.get_mut(LIVE_LANE).unwrap().topics.get_mut("sent").unwrap();
        cursors.get_mut(&0).unwrap().end = NextOffset::at(150);
        assert!(!is_full_form_of(&edited, &packed));
    }

    #[test]
    fn the_packed_form_keeps_to_its_size() {
        let mut record = record();
        record.dedup.generation = Some("e0000000012-b0000003456-0199aaaa-bbbb-7ccc-8ddd-eeeeffff0000".into());
        (record.dedup.checksum, record.dedup.key_spec_hash) = (Some("0".repeat(32)), "1".repeat(32));
        (record.job_hash, record.dedup.digest) = ("2".repeat(32), "3".repeat(32));
        (record.job_name, record.cluster_id) =
            ("notifications".into(), Some("4L6g3nShT-eMCtK--X86sw".into()));
        let partitions = &mut record.lanes.get_mut(LIVE_LANE).unwrap().topics;
        let cursor = Cursor {
            start: NextOffset::at(0),
            end: NextOffset::at(999_999_999_999),
            tail: None,
            max_event_time: Some(EventTimeMs(1_700_000_000_000)),
        };
        let trailing = Cursor { max_event_time: Some(EventTimeMs(1_699_900_000_000)), ..cursor };
        partitions.clear();
        partitions
            .insert("sent".into(), (0..100).map(|p| (p, if p == 0 { cursor } else { trailing })).collect());
        let hundred = record.to_summary()[SUMMARY_PACKED].len();
        assert!(hundred < 4096, "{hundred} bytes for 100 topic partitions");
        let partitions = &mut record.lanes.get_mut(LIVE_LANE).unwrap().topics;
        partitions
            .insert("sent".into(), (0..200).map(|p| (p, if p == 0 { cursor } else { trailing })).collect());
        let two_hundred = record.to_summary()[SUMMARY_PACKED].len();
        let each = (two_hundred - hundred) as f64 / 100.0;
        assert!(each <= 28.0, "{each} bytes for each further topic partition with offsets near 1e12");
    }

    #[test]
    fn a_newer_record_is_refused_by_name_before_anything_is_read_from_it() {
        let error = LedgerRecord::from_property(r#"{"format": 2, "everything": "else"}"#).unwrap_err();
        assert_eq!(error.to_string(), "ledger format 2 is newer than 1, the newest that this program reads");
    }

    #[test]
    fn a_broken_record_says_where_it_stands() {
        let huge = record().to_property().replace("\"epoch\":3", "\"epoch\":18446744073709551615");
        for text in ["", "[]", "{}", r#"{"format":1}"#, huge.as_str()] {
            let error = LedgerRecord::from_property(text).unwrap_err();
            assert!(
                error.to_string().starts_with("ledger record in table property tidemill.ledger"),
                "{error}"
            );
        }
    }

    #[test]
    fn the_golden_record_of_format_1_is_read() {
        let text = include_str!("../../fixtures/ledger-1.json");
        assert_eq!(LedgerRecord::from_property(text).unwrap(), record());
    }
}
