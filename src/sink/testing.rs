//! A job, a catalog in a folder that vanishes, and rows, for the tests of this module.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{
    ArrayRef, Decimal128Array, FixedSizeBinaryArray, Int32Array, Int64Array, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use futures::TryStreamExt;
use iceberg::Catalog;
use iceberg::spec::{DataFile, PrimitiveType, Transform};
use iceberg::table::Table;
use iceberg::transaction::{ApplyTransactionAction, Transaction};

use crate::catalog::connect;
use crate::job::{
    Arrays, CatalogConfig, CatalogKind, Column, ColumnSource, DeadLetterSink, Decode, Dedup, EventTimeRule,
    IcebergSink, Job, KafkaSource, LatePolicy, MicrobatchLimits, PartitionField, Repeats, StartPosition,
    UnknownFields,
};

/// 2026-03-01T00:00:00Z in microseconds.
pub const DAY_ZERO_MICROS: i64 = 1_772_323_200_000_000;
pub const DAY_MICROS: i64 = 86_400_000_000;

pub fn column(name: &str, column_type: PrimitiveType, required: bool) -> Column {
    let from = ColumnSource::Value(vec![name.to_owned()]);
    Column { name: name.to_owned(), column_type, from, unit: None, required }
}

pub fn job(folder: &Path) -> Job {
    Job {
        name: "notifications".to_owned(),
        memory_bytes: 256 << 20,
        threads: std::num::NonZeroUsize::MIN,
        state_dir: folder.join("state"),
        state_copies: None,
        source: KafkaSource {
            topics: vec!["sent".to_owned()],
            start: StartPosition::Earliest,
            properties: BTreeMap::new(),
            record_bytes_max: 1 << 20,
        },
        decode: Decode {
            unknown_fields: UnknownFields::Ignore,
            arrays: Arrays::Split,
            columns: vec![
                column("event_id", PrimitiveType::String, true),
                column("event_time", PrimitiveType::Timestamptz, true),
                column("amount", PrimitiveType::Decimal { precision: 12, scale: 2 }, false),
                column("device", PrimitiveType::Uuid, false),
                column("provider", PrimitiveType::String, false),
            ],
        },
        event_time: EventTimeRule {
            column: "event_time".to_owned(),
            watermark_delay: Duration::from_secs(600),
            allowed_lateness: Duration::from_secs(600),
            late: LatePolicy::Keep,
            ahead_max: Duration::from_secs(3_600),
            idle_after: Duration::from_secs(600),
        },
        dedup: Dedup {
            bucket_from: crate::job::BucketFrom::EventTime,
            beyond_window: crate::job::BeyondWindow::Check,
            on_missing_keys: crate::job::OnMissingKeys::Stop,
            probe_records_max: None,
            key: vec!["event_id".to_owned()],
            window: Duration::from_secs(7 * 86_400),
            repeats: Repeats::AnyTime,
            shards: 256,
        },
        microbatch: MicrobatchLimits {
            records_max: 1_000,
            payload_bytes_max: 1 << 20,
            open_time_max: Duration::from_secs(1),
        },
        sink: IcebergSink {
            table: vec!["events".to_owned(), "notifications".to_owned()],
            partition_by: vec![PartitionField { column: "event_time".to_owned(), transform: Transform::Day }],
            catalog: CatalogConfig {
                kind: CatalogKind::Sql,
                uri: format!("sqlite:{}", folder.join("catalog.db").display()),
                warehouse: folder.join("warehouse").display().to_string(),
                properties: BTreeMap::new(),
            },
            table_properties: BTreeMap::new(),
            dead_letters: DeadLetterSink {
                table: vec!["events".to_owned(), "notifications_dead_letters".to_owned()],
                ratio_max: 0.05,
            },
            late: crate::job::LateSink { table: vec!["events".to_owned(), "notifications_late".to_owned()] },
            on_rollback: crate::job::OnRollback::Stop,
            maintenance: crate::job::MaintenanceRule::default(),
        },
    }
}

pub async fn catalog(job: &Job) -> Arc<dyn Catalog> {
    connect(&job.sink.catalog).await.unwrap()
}

/// Rows with the columns of [`job`], in another order than the table's and without `provider`. Row `n` is event
/// `first + n` and lies `n % days` days after day zero; every third has no amount and no device.
pub fn events(first: i64, count: i64, days: i64) -> RecordBatch {
    let numbers = || first..first + count;
    let when = numbers().map(|number| DAY_ZERO_MICROS + (number % days) * DAY_MICROS + number);
    let amounts = numbers().map(|number| (number % 3 != 0).then_some(i128::from(number) * 101 - 5_000));
    let devices = numbers().map(|number| (number % 3 != 0).then(|| (number as u128).to_be_bytes()));
    let columns: [(&str, ArrayRef, bool); 10] = [
        ("_kafka_offset", Arc::new(Int64Array::from_iter_values(numbers())), false),
        (
            "amount",
            Arc::new(Decimal128Array::from_iter(amounts).with_precision_and_scale(12, 2).unwrap()),
            true,
        ),
        (
            "event_time",
            Arc::new(TimestampMicrosecondArray::from_iter_values(when).with_timezone("UTC")),
            false,
        ),
        (
            "device",
            Arc::new(FixedSizeBinaryArray::try_from_sparse_iter_with_size(devices, 16).unwrap()),
            true,
        ),
        ("_kafka_topic", Arc::new(StringArray::from_iter_values(numbers().map(|_| "sent"))), false),
        ("_kafka_partition", Arc::new(Int32Array::from_iter_values(numbers().map(|_| 3))), false),
        ("event_id", Arc::new(StringArray::from_iter_values(numbers().map(event_id))), false),
        ("_kafka_index", Arc::new(Int32Array::from_iter_values(numbers().map(|_| 0))), false),
        (
            "_kafka_timestamp",
            Arc::new(TimestampMicrosecondArray::from_iter(numbers().map(|_| None)).with_timezone("+00:00")),
            true,
        ),
        ("_tidemill_batch", Arc::new(Int64Array::from_iter_values(numbers().map(|_| 1))), false),
    ];
    RecordBatch::try_from_iter_with_nullable(columns).unwrap()
}

/// Text that does not compress to nothing.
pub fn event_id(number: i64) -> String {
    let low = xxhash_rust::xxh3::xxh3_128(&number.to_le_bytes());
    uuid::Uuid::from_u128(low).to_string()
}

/// Commits files the plain way: who may commit is another module's subject.
pub async fn append(catalog: &dyn Catalog, table: &Table, files: Vec<DataFile>) -> Table {
    let transaction = Transaction::new(table);
    let appended = transaction.fast_append().add_data_files(files).apply(transaction).unwrap();
    appended.commit(catalog).await.unwrap()
}

/// All rows of the current snapshot.
pub async fn read(table: &Table, columns: &[&str]) -> Vec<RecordBatch> {
    let columns: Vec<String> = columns.iter().map(|name| (*name).to_owned()).collect();
    let scan = crate::sink::scan::scan_keys(table, None, &columns, None).await.unwrap();
    scan.try_collect().await.unwrap()
}
