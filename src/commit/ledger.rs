//! The ledger record: what one commit says about everything that it switches.
//!
//! Two forms are written by the same commit. The *full* form is JSON in the table property
//! [`PROPERTY`]; it survives snapshot expiry. The *packed* form stands in the snapshot summary under
//! [`SUMMARY_PACKED`], beside single keys for people and queries; it shows a rollback, because it moves with
//! the snapshot, and it is enough to resume. It leaves out what a resume can do without: tail hashes, starts
//! (the parent's ends), bucket digests (they stand in the generation manifest) and the list of side files.
//!
//! Invariants
//! 1. `sequence` rises by one with every commit of a job, of whatever kind, and by as many as were rolled back with the
//!    fence of a replay; a property whose sequence is above the ancestry's means that the table was rolled back.
//! 2. `batch` rises by one with every commit of kind [`Kind::Data`] and by no other.
//! 3. `attempt` is new in every commit; finding it on the ancestry is the proof that the commit landed.

mod lane;

use std::collections::BTreeMap;

use iceberg::spec::TableMetadata;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::counts::Counts;
use crate::event_time::EventTimeMs;
use crate::job::Repeats;
use crate::mutant;
use crate::offset::{NextOffset, TopicId};

pub use lane::{Backfill, Cursor, Lane, LaneState, Tail};
use lane::{pack_lane, unpack_lane};

/// Version of the record that this program writes. It reads this and older ones.
///
/// Version 1 knew no rows of others that count as seen ([`Others`]), no erased keys ([`Suppressed`]) and no
/// [`Kind::Change`]: a program that reads only version 1 would rebuild the state without them. Version 2 knew one lane: a
/// program that reads only version 2 would take a backfill's batch for one of the live lane. Version 3 knew no [`Timeline`]: a
/// program that reads only version 3 would replay from what a restore has left.
pub const FORMAT_VERSION: u32 = 4;
/// Most timelines that a record names: about 31 bytes each, so that the packed form of 100 topic partitions has room for them.
const TIMELINES_MAX: usize = 16;
/// Table property with the full record.
pub const PROPERTY: &str = "tidemill.ledger";
/// Snapshot summary key with the packed record.
pub const SUMMARY_PACKED: &str = "tidemill.packed";
/// Snapshot summary key of a commit of kind [`Kind::Change`]: what it did and who asked for it.
pub const SUMMARY_CHANGE: &str = "tidemill.change";
/// Snapshot summary key of a commit that goes back to a savepoint: its name.
pub const SUMMARY_RESTORED: &str = "tidemill.restored";
/// Name of the lane that follows the topics; backfills get lanes of their own.
pub const LIVE_LANE: &str = "live";

/// Backfills that are done and that a record still tells of; older ones leave it.
const LANES_DONE_MAX: usize = 4;

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
    /// The savepoint that `sides_back_to` comes from: side tables have its files again. `None` after a replay, whose letters
    /// stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restored_from: Option<String>,
    /// The times that the ledger went back on purpose, the oldest first. One that a later one went behind is left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub timelines: Vec<Timeline>,
    /// Dedup state.
    pub dedup: DedupRecord,
    /// Topic ids by topic.
    pub topics: BTreeMap<String, Option<TopicId>>,
    /// Cursors by lane.
    pub lanes: BTreeMap<String, Lane>,
    /// The backfill that `batch` read; `None` for the live lane.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch_lane: Option<String>,
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
    /// Rows that stood in the table before this ledger, or that others wrote: `None` if there were none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub others: Option<Others>,
    /// Keys that were erased: every rebuild reads them too. `None` if there never were any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suppressed: Option<Suppressed>,
    /// Generation that the commit of `batch` named, empty for none, if a later commit named another one for the same batch.
    /// Side tables know a batch by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch_generation: Option<String>,
    /// What a commit of kind [`Kind::Change`] did, and who asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<Change>,
    /// Dead letters that are being decoded again, if a command was interrupted at it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requeue: Option<RequeueLane>,
}

/// The lane of `dead-letters requeue`: letters of one frozen snapshot in the order of their places. It moves no offset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequeueLane {
    /// Snapshot of the dead-letter table that is read.
    pub snapshot_id: i64,
    /// Only letters with this reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The last place that was taken: topic id, topic partition, offset, index.
    pub after: (Uuid, i32, i64, i32),
    /// Largest event times of the letters that were taken, by topic id and topic partition: lateness goes on from them (R2).
    /// Not in the packed form: without them letters are judged as if none had come before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub max_event_times: Vec<(Uuid, i32, EventTimeMs)>,
}

/// The table of keys that were erased on purpose and stay seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suppressed {
    /// Namespace and name.
    pub table: String,
    /// Table UUID.
    pub uuid: Uuid,
    /// Rows of the present key that it holds at least.
    pub rows: u64,
}

/// Rows of the main table that no microbatch of this ledger wrote: those without a batch number, and those whose number
/// is at most `batch_max`, with which this ledger began to count.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Others {
    /// Rows up to this batch number are not ours.
    pub batch_max: u64,
    /// Whether their keys count as seen, so that every rebuild reads them too.
    pub adopted: bool,
    /// Keys of theirs in the live buckets that no row of ours has. They are counted in `buckets` too, so what is left
    /// there after taking them off is ours.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub buckets: Vec<BucketRecord>,
}

/// Why a record differs from its parent without a microbatch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The command or setting, as the user writes it: `state rekey`.
    pub by: String,
    /// What it did, in words.
    pub what: String,
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
    /// A command made the dedup state anew or set a watermark, as `change` says.
    Change,
}

/// A restore or a replay: from here on batches are counted again from an earlier one, and side tables went back with main.
/// PostgreSQL calls what a point-in-time recovery begins so.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Timeline {
    /// Counts up from 1, whatever is left out of those before.
    pub number: u64,
    /// The batch that was gone back to.
    pub begin: u64,
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
    /// The command: `accept-loss`, `rebase-offsets` or `state adopt`.
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
        static EMPTY: Lane = Lane { watermark: None, topics: BTreeMap::new(), backfill: None };
        self.lanes.get(LIVE_LANE).unwrap_or(&EMPTY)
    }

    /// Cursor of one topic partition of the live lane.
    pub fn cursor(&self, topic: &str, partition: i32) -> Option<&Cursor> {
        self.live().topics.get(topic)?.get(&partition)
    }

    /// Backfills by name, those that are done too.
    pub fn backfills(&self) -> impl Iterator<Item = (&String, &Lane, &Backfill)> {
        self.lanes.iter().filter_map(|(name, lane)| Some((name, lane, lane.backfill.as_ref()?)))
    }

    /// Names of the backfills that are to be served.
    pub fn active_backfills(&self) -> impl Iterator<Item = &String> {
        let active = |(_, _, backfill): &(_, _, &Backfill)| backfill.state == LaneState::Active;
        self.backfills().filter(active).map(|(name, _, _)| name)
    }

    /// Takes the cursors off backfills that are done, which nothing reads any more. Of those, the last few by name are told
    /// of; names that this program gives rise with time.
    pub fn tidy_lanes(&mut self) {
        let is_done =
            |lane: &Lane| lane.backfill.as_ref().is_some_and(|known| known.state == LaneState::Done);
        for lane in self.lanes.values_mut().filter(|lane| is_done(lane)) {
            lane.topics.clear();
            lane.backfill.iter_mut().for_each(|backfill| backfill.ends.clear());
        }
        let done: Vec<String> =
            self.lanes.iter().filter(|(_, lane)| is_done(lane)).map(|(name, _)| name.clone()).collect();
        for name in &done[..done.len().saturating_sub(LANES_DONE_MAX)] {
            self.lanes.remove(name);
        }
    }

    /// The generation by which side tables know `batch`.
    pub fn batch_generation(&self) -> Option<&str> {
        let named = self.batch_generation.as_deref().or(self.dedup.generation.as_deref());
        named.filter(|name| !name.is_empty())
    }

    /// Whether a state that was begun lacks its generation: adopted rows, or a ledger made again from the table.
    pub fn lacks_generation(&self) -> bool {
        self.dedup.generation.is_none()
            && (self.batch > 0 || self.others.as_ref().is_some_and(|others| others.adopted))
    }

    /// Whether a side table still waits for files of `batch`, as far as main's record knows.
    pub fn owes_side_files(&self) -> bool {
        self.sides.values().any(|side| side.owed)
    }

    /// Whether a start has something to do for side tables before anything else: files to bring, or batches to take off.
    pub fn owes_side_tables(&self) -> bool {
        self.sides_back_to.is_some() || self.owes_side_files()
    }

    /// The timelines of a record that goes back from this one to a batch.
    pub fn timelines_from(&self, batch: u64) -> Vec<Timeline> {
        let mut timelines = self.timelines.clone();
        timelines.retain(|earlier| earlier.begin < batch);
        timelines.push(Timeline { number: self.timeline() + 1, begin: batch });
        while timelines.len() > TIMELINES_MAX {
            // The two oldest become one that says no less: it has the later number and the earlier begin.
            let oldest = timelines.remove(0);
            timelines[0].begin = oldest.begin;
        }
        timelines
    }

    fn timeline(&self) -> u64 {
        self.timelines.last().map_or(0, |last| last.number)
    }

    /// Whether this ledger went back to before `older` since.
    fn left_behind(&self, older: &LedgerRecord) -> bool {
        let since = self.timelines.iter().filter(|timeline| timeline.number > older.timeline());
        since.map(|timeline| timeline.begin).any(|begin| begin < older.batch)
    }

    /// Text of the table property.
    pub fn to_property(&self) -> String {
        serde_json::to_string(self).expect("a ledger record has only string keys and finite numbers")
    }

    /// Summary keys: the packed record, and single values for people.
    pub fn to_summary(&self) -> BTreeMap<String, String> {
        let change = self.change.as_ref().filter(|_| self.kind == Kind::Change);
        let change = change.map(|change| serde_json::to_string(change).expect("a change is text"));
        let mut summary = BTreeMap::from([
            ("tidemill.job-id".to_owned(), self.job_id.to_string()),
            ("tidemill.kind".to_owned(), kind_name(self.kind).to_owned()),
            ("tidemill.epoch".to_owned(), self.epoch.to_string()),
            ("tidemill.batch".to_owned(), self.batch.to_string()),
            ("tidemill.attempt".to_owned(), self.attempt.to_string()),
            ("tidemill.counts".to_owned(), serde_json::to_string(&self.counts).expect("counts are numbers")),
            (SUMMARY_PACKED.to_owned(), self.pack()),
        ]);
        summary.extend(change.map(|change| (SUMMARY_CHANGE.to_owned(), change)));
        summary
    }

    fn pack(&self) -> String {
        let mut packed = match serde_json::to_value(self) {
            Ok(Value::Object(object)) => object,
            _ => unreachable!("a ledger record serialises to an object"),
        };
        for left_out in ["counts", "buckets", "jumps", "change"] {
            packed.remove(left_out);
        }
        if let Some(others) = packed.get_mut("others").and_then(Value::as_object_mut) {
            others.remove("buckets");
        }
        if let Some(requeue) = packed.get_mut("requeue").and_then(Value::as_object_mut) {
            requeue.remove("max_event_times");
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

    /// The record as it comes back from its packed form.
    fn without_what_packing_leaves_out(&self) -> Self {
        let mut packed = Self {
            counts: Counts::default(),
            buckets: Vec::new(),
            jumps: Vec::new(),
            change: None,
            ..self.clone()
        };
        packed.others.iter_mut().for_each(|others| others.buckets.clear());
        packed.requeue.iter_mut().for_each(|requeue| requeue.max_event_times.clear());
        packed.sides.values_mut().for_each(|side| side.files = None);
        for cursor in
            packed.lanes.values_mut().flat_map(|lane| lane.topics.values_mut()).flat_map(BTreeMap::values_mut)
        {
            (cursor.start, cursor.tail) = (cursor.end, None);
        }
        packed
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
    let numbers = object.get("timelines").and_then(Value::as_array).into_iter().flatten();
    let is_counted = |timeline: &Value| is_counter(timeline.get("number"));
    match object.get("format").and_then(Value::as_u64) {
        None => Err(corrupt(place, "no format version")),
        Some(found) if found > u64::from(FORMAT_VERSION) => Err(LedgerError::Newer { found }),
        Some(_) => match COUNTERS.iter().find(|name| !is_counter(object.get(**name))) {
            None if !numbers.into_iter().all(is_counted) => {
                Err(corrupt(place, "a timeline has no number below 2^53"))
            }
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
        Kind::Change => "change",
    }
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
        /// Whether `newer` came of going back on purpose, to before `older`: its side tables went back with it, and a rollback
        /// of main alone does not bring them forward again.
        is_undone: bool,
    },
    /// History was expired before any record of ours; the property may hold. The caller looks for rows of
    /// `last_batch_with_rows` to tell expiry from a rollback followed by expiry.
    CutOff(Box<LedgerRecord>),
}

impl Found {
    /// The record, whatever else is true of it; of a table that was rolled back, that of its property.
    pub fn record(&self) -> Option<&LedgerRecord> {
        match self {
            Self::Record(record) | Self::CutOff(record) => Some(record),
            Self::RolledBack { newer, .. } => Some(newer),
            Self::Nothing => None,
        }
    }
}

/// Reads the ledger: ancestry of the current snapshot first, property second; where that does not agree, the other snapshots.
///
/// # Errors
/// [`LedgerError`] when the record that would hold is newer or broken. What is broken beside the ancestry is passed over
/// while that has the record.
pub fn inspect(metadata: &TableMetadata) -> Result<Found, LedgerError> {
    let on_ancestry = newest_on_ancestry(metadata)?;
    let property = metadata.properties().get(PROPERTY).map(|text| LedgerRecord::from_property(text));
    match (on_ancestry, property) {
        (Ancestry::Record(_), Some(Err(newer @ LedgerError::Newer { .. }))) => Err(newer),
        (Ancestry::Record(older), Some(Ok(full)))
            if full.sequence > mutant!("rollback-unseen", u64::MAX => older.sequence) =>
        {
            Ok(rolled_back(Some(older), Box::new(full)))
        }
        (Ancestry::Record(packed), Some(Ok(full))) if is_full_form_of(&full, &packed) => {
            Ok(Found::Record(Box::new(full)))
        }
        // Nothing but what was rolled back says so where the property is gone.
        (Ancestry::Record(packed), _) => Ok(match newest_rolled_back(metadata, Some(&packed))? {
            Some(newer) => rolled_back(Some(packed), newer),
            None => Found::Record(packed),
        }),
        (_, None) => Ok(match newest_rolled_back(metadata, None)? {
            Some(newer) => rolled_back(None, newer),
            None => Found::Nothing,
        }),
        (_, Some(Err(error))) => Err(error),
        (Ancestry::Complete, Some(Ok(full))) => Ok(rolled_back(None, Box::new(full))),
        (Ancestry::CutOff, Some(Ok(full))) => Ok(Found::CutOff(Box::new(full))),
    }
}

fn rolled_back(older: Option<Box<LedgerRecord>>, newer: Box<LedgerRecord>) -> Found {
    // By their numbers alone too: records of before version 4 know no timelines.
    let is_undone = older.as_ref().is_some_and(|older| newer.batch < older.batch || newer.left_behind(older));
    Found::RolledBack { older, newer, is_undone }
}

/// Whether a full record says the same as the packed one of the same commit. One that was edited by hand does not, and
/// the ancestry wins. Both are read by this program, so a record of an older one compares as equal too.
fn is_full_form_of(full: &LedgerRecord, packed: &LedgerRecord) -> bool {
    let same = full.without_what_packing_leaves_out() == *packed;
    if !same && full.attempt == packed.attempt {
        tracing::warn!(
            "table property {PROPERTY} was changed by hand; the record of the snapshot is used instead"
        );
    }
    mutant!("property-over-ancestry", true => same)
}

/// Whether a commit of ours landed: it stands on the ancestry, or the ancestry was expired and the property names it.
pub fn has_landed(metadata: &TableMetadata, attempt: Uuid) -> bool {
    // A look at the text spares reading a record that can not be it.
    let names_it = |text: &String| text.contains(&attempt.to_string());
    let is_cut_off = || matches!(inspect(metadata), Ok(Found::CutOff(record)) if record.attempt == attempt);
    attempt_on_ancestry(metadata, attempt)
        || metadata.properties().get(PROPERTY).is_some_and(names_it)
            && mutant!("landed-by-property", true => is_cut_off())
}

/// Iceberg's sequence number of the snapshot that a commit of ours made. One that was expired counts as just below what
/// is left: where its place was judged before, everything kept came after it.
pub fn sequence_number_of(metadata: &TableMetadata, attempt: Uuid) -> i64 {
    let wanted = attempt.to_string();
    let is_ours = |snapshot: &&iceberg::spec::SnapshotRef| {
        snapshot.summary().additional_properties.get("tidemill.attempt") == Some(&wanted)
    };
    let oldest = || ancestry(metadata).map(|snapshot| snapshot.sequence_number()).min();
    match ancestry(metadata).find(is_ours) {
        Some(snapshot) => snapshot.sequence_number(),
        None => oldest().map_or(0, |oldest| oldest - 1),
    }
}

/// Whether all that is kept of the ancestry came after this sequence number. If not, and our commit of that number is
/// not on it, then the table was rolled back: expiry takes the oldest first.
pub fn came_after(metadata: &TableMetadata, sequence_number: i64) -> bool {
    ancestry(metadata).all(|snapshot| snapshot.sequence_number() > sequence_number)
}

/// Whether a commit of ours stands on the ancestry of the current snapshot.
pub fn attempt_on_ancestry(metadata: &TableMetadata, attempt: Uuid) -> bool {
    let wanted = attempt.to_string();
    ancestry(metadata)
        .any(|snapshot| snapshot.summary().additional_properties.get("tidemill.attempt") == Some(&wanted))
}

/// Outcomes of microbatches by number, as far as the ancestry is kept. Of a batch that was taken again after a restore,
/// those of the newest; those that a restore took away are left out.
///
/// # Errors
/// [`LedgerError::Corrupt`] when a summary of ours can not be read.
pub fn counts_on_ancestry(metadata: &TableMetadata) -> Result<BTreeMap<u64, Counts>, LedgerError> {
    let (mut counts, mut last) = (BTreeMap::new(), u64::MAX);
    for snapshot in ancestry(metadata) {
        let summary = &snapshot.summary().additional_properties;
        if summary.contains_key(SUMMARY_RESTORED) {
            let restored = summary.get("tidemill.batch").and_then(|text| text.parse().ok());
            last = last.min(restored.unwrap_or(u64::MAX));
        }
        if summary.get("tidemill.kind").is_none_or(|kind| kind != kind_name(Kind::Data)) {
            continue;
        }
        let broken = |key: &str| corrupt(&format!("summary of snapshot {}", snapshot.snapshot_id()), key);
        let batch = summary.get("tidemill.batch").and_then(|text| text.parse().ok());
        let outcomes = summary.get("tidemill.counts").and_then(|text| serde_json::from_str(text).ok());
        let batch: u64 = batch.ok_or_else(|| broken("no tidemill.batch"))?;
        let outcomes = outcomes.ok_or_else(|| broken("no tidemill.counts"))?;
        if batch <= last {
            counts.entry(batch).or_insert(outcomes);
        }
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
        // pyiceberg takes the parent away from a snapshot whose parent it expires; only the first one of a table has
        // sequence number 1 (0 in format version 1).
        complete = snapshot.parent_snapshot_id().is_none() && snapshot.sequence_number() <= 1;
    }
    Ok(if complete { Ancestry::Complete } else { Ancestry::CutOff })
}

/// The newest record that was rolled back, as snapshots tell that are kept and not on the ancestry: of the ledger of `older` and
/// above it, or, where the ancestry has no record, any. It came after `older`, or after the oldest that is kept of the
/// ancestry, in Iceberg's numbers: what is older may have been expired from below, and is kept for a tag, and a ledger that
/// was made again counts from 1 anew.
fn newest_rolled_back(
    metadata: &TableMetadata,
    older: Option<&LedgerRecord>,
) -> Result<Option<Box<LedgerRecord>>, LedgerError> {
    let after = match older {
        Some(older) => Some(sequence_number_of(metadata, older.attempt)),
        None => ancestry(metadata).map(|snapshot| snapshot.sequence_number()).min(),
    };
    let came_after = |snapshot: &&iceberg::spec::SnapshotRef| {
        let number = snapshot.sequence_number();
        mutant!("tag-of-before-rolled-back", true => after.is_none_or(|after| number > after))
    };
    let mut newest: Option<(i64, Box<LedgerRecord>)> = None;
    for snapshot in metadata.snapshots().filter(came_after) {
        let Some(text) = snapshot.summary().additional_properties.get(SUMMARY_PACKED) else { continue };
        let record = match LedgerRecord::from_packed(text, snapshot.snapshot_id()) {
            Ok(record) => record,
            Err(newer @ LedgerError::Newer { .. }) => return Err(newer),
            Err(_) => continue,
        };
        let is_above =
            |older: &LedgerRecord| record.job_id == older.job_id && record.sequence > older.sequence;
        let number = snapshot.sequence_number();
        let is_newest = newest.as_ref().is_none_or(|(newest, _)| number > *newest);
        if mutant!("rollback-forgotten-with-property", false => older.is_none_or(is_above) && is_newest) {
            newest = Some((number, Box::new(record)));
        }
    }
    Ok(newest.map(|(_, newest)| newest))
}

/// Snapshots from the current one to the oldest that is kept; ends too where a broken catalog lets them go in a circle.
pub(crate) fn ancestry(metadata: &TableMetadata) -> impl Iterator<Item = &iceberg::spec::SnapshotRef> {
    std::iter::successors(metadata.current_snapshot(), move |snapshot| {
        metadata.snapshot_by_id(snapshot.parent_snapshot_id()?)
    })
    .take(metadata.snapshots().len())
}

#[cfg(test)]
pub(crate) mod tests;
