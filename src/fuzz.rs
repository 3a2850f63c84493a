//! What fuzzers call: every text that comes from outside, but for the files of the dedup state ([`crate::dedup::fuzz`]).
//!
//! What must hold for every input: an answer or an error, in time and memory that follow its length; and what was taken
//! says the same when it is written and read again. Each function says whether its input was taken, so that a replay can
//! tell mutations that get far from noise.

use std::cell::RefCell;
use std::path::Path;
use std::sync::LazyLock;

use arrow::array::{Array, AsArray};
use iceberg::io::FileIO;
use iceberg::spec::TableMetadata;
use iceberg::table::Table;
use iceberg::{Runtime, TableIdent};
use serde::de::IgnoredAny;
use serde_json::Value;

use crate::commit::ledger::{self, LedgerRecord};
use crate::commit::side;
use crate::decode::{DecodeSetupError, Decoder};
use crate::job::file::{JobSource, LoadedJob};
use crate::offset::TopicPartition;
use crate::record::{RecordChunk, RecordParts};
use crate::sink::{schema, writer};

/// A column of every kind of type, so that a payload can reach every conversion.
const JOB: &str = r#"
version = 1
name = "fuzzed"
[source.kafka]
topics = ["events"]
[source.kafka.properties]
"bootstrap.servers" = "localhost:9092"
[decode]
unknown_fields = "keep"
[decode.columns]
event_id = { type = "string", required = true }
event_time = { type = "timestamptz", path = "$.ts", unit = "ms", required = true }
flag = { type = "boolean" }
small = { type = "int" }
large = { type = "long" }
ratio = { type = "double" }
price = { type = "decimal(12,2)" }
day = { type = "date" }
clock = { type = "time" }
local = { type = "timestamp" }
zoned = { type = "timestamptz", path = "$.nested.zoned" }
device = { type = "uuid", path = "$.nested.device" }
raw = { type = "binary" }
[event_time]
column = "event_time"
[dedup]
key = ["event_id"]
[sink.iceberg]
table = "events.fuzzed"
"#;

static LOADED: LazyLock<LoadedJob> = LazyLock::new(|| job_of(JOB.as_bytes()).expect("the job is right"));

thread_local! {
    /// Lives on from payload to payload, as in a run: what it remembers is to change its speed alone. So an input that fails may
    /// not fail alone: those before it belong to it.
    static DECODER: RefCell<Decoder> = RefCell::new(decoder_of(&LOADED).expect("the columns can be decoded"));
}

fn decoder_of(loaded: &LoadedJob) -> Result<Decoder, DecodeSetupError> {
    let job = &loaded.job;
    Decoder::new(&job.decode, &job.dedup.key, &job.event_time.column, job.source.record_bytes_max)
}

/// A table as `metadata` describes it; its files are nowhere.
fn table_of(metadata: TableMetadata) -> Option<Table> {
    // A table wants to know where it would run, whatever is asked of it.
    static RUNTIME: LazyLock<tokio::runtime::Runtime> = LazyLock::new(|| {
        tokio::runtime::Builder::new_current_thread().build().expect("a runtime without drivers")
    });
    let ident = TableIdent::from_strs(["events", "fuzzed"]).ok()?;
    Table::builder()
        .metadata(metadata)
        .identifier(ident)
        .file_io(FileIO::new_with_memory())
        .runtime(Runtime::new(&RUNTIME))
        .disable_cache()
        .build()
        .ok()
}

/// Reads a ledger record in both of its forms.
pub fn ledger(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let full = LedgerRecord::from_property(text);
    if let Ok(record) = &full {
        let again = LedgerRecord::from_property(&record.to_property());
        assert_eq!(again.as_ref().ok(), Some(record), "a record comes back as it was written");
        let packed = &record.to_summary()[ledger::SUMMARY_PACKED];
        let unpacked = LedgerRecord::from_packed(packed, 1).expect("what was packed can be read");
        assert_eq!(
            (unpacked.batch, unpacked.epoch, unpacked.attempt),
            (record.batch, record.epoch, record.attempt),
            "the packed form names the same commit"
        );
    }
    LedgerRecord::from_packed(text, 1).is_ok() || full.is_ok()
}

/// iceberg 0.10.1 subtracts times of a metadata file before it judges them, which overflows for times at the ends of
/// the range (`TableMetadata::validate_chronological_snapshot_logs`). That panic is not ours to find again.
fn times_are_near(value: &Value) -> bool {
    let near = |time: &Value| time.as_i64().is_none_or(|time| time.unsigned_abs() < 1 << 53);
    match value {
        Value::Object(members) => members
            .iter()
            .all(|(name, member)| (!name.ends_with("-ms") || near(member)) && times_are_near(member)),
        Value::Array(elements) => elements.iter().all(times_are_near),
        _ => true,
    }
}

/// Reads what a catalog says of a table: the ledger and mark in it, and how it differs from a job.
pub fn table_metadata(bytes: &[u8]) -> bool {
    let Ok(value) = serde_json::from_slice::<Value>(bytes) else { return false };
    if !times_are_near(&value) {
        return false;
    }
    let Ok(metadata) = serde_json::from_value::<TableMetadata>(value) else { return false };
    let found = ledger::inspect(&metadata);
    let _mark = side::inspect(&metadata);
    let _counts = ledger::counts_on_ancestry(&metadata);
    assert!(ledger::recent_generations(&metadata, 3).len() <= 3, "no more generations than were asked for");
    let Some(table) = table_of(metadata) else { return false };
    let _differences = schema::compare(&table, &LOADED.job);
    let _differences = schema::compare_dead_letters(&table);
    found.is_ok()
}

/// Reads the list of files that a side table is owed.
pub fn owed_files(bytes: &[u8]) -> bool {
    static TABLE: LazyLock<Table> = LazyLock::new(|| {
        let metadata = include_bytes!("../fixtures/fuzz/owed_files.metadata.json");
        let metadata = serde_json::from_slice(metadata).expect("the metadata of a table");
        table_of(metadata).expect("a table")
    });
    let Ok(Value::Array(stored)) = serde_json::from_slice(bytes) else { return false };
    let Ok(files) = writer::files_from_json(&stored, &TABLE) else { return false };
    assert_eq!(files.len(), stored.len(), "one file for each entry");
    true
}

fn job_of(bytes: &[u8]) -> Result<LoadedJob, String> {
    let environment = |name: &str| name.len().is_multiple_of(2).then(|| "3".to_owned());
    let source = JobSource::of_bytes(Path::new("job.toml"), bytes.to_vec(), &[]);
    source.and_then(|source| source.check(&environment)).map_err(|problems| problems.to_string())
}

/// Reads a job file and, if it is right, prepares to decode by it.
pub fn job_file(bytes: &[u8]) -> bool {
    let loaded = match job_of(bytes) {
        Ok(loaded) => loaded,
        Err(problems) => {
            assert!(!problems.trim().is_empty(), "a refusal says why");
            return false;
        }
    };
    let _decoder = decoder_of(&loaded);
    let _schema = schema::table_schema(&loaded.job);
    true
}

/// Decodes the payload of one record.
pub fn payload(bytes: &[u8]) -> bool {
    let mut chunk = RecordChunk::default();
    chunk.push(RecordParts { slot: 0, offset: 0, timestamp_ms: Some(0), key: None, payload: Some(bytes) });
    let decoded = DECODER
        .with_borrow_mut(|decoder| decoder.decode(&chunk, &[TopicPartition::new("events", 0)]))
        .expect("one record is no chunk that is too large");
    let rows = decoded.rows.num_rows();
    assert_eq!(
        (rows + decoded.letters.len()) as u64,
        decoded.consumed,
        "every row of a record is written or a dead letter"
    );
    // Outside judge: serde_json's own grammar.
    if serde_json::from_slice::<IgnoredAny>(bytes).is_err() {
        assert_eq!(rows, 0, "what is no JSON makes no row");
    }
    if let (1, Ok(Value::Object(members))) = (rows, serde_json::from_slice::<Value>(bytes)) {
        let ids = decoded.rows.column_by_name("event_id").expect("a column of the job").as_string::<i32>();
        assert!(ids.is_valid(0), "a required column is never null");
        assert_eq!(members.get("event_id").and_then(Value::as_str), Some(ids.value(0)));
    }
    rows > 0
}

#[cfg(test)]
mod tests;
