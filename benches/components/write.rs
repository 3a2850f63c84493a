//! Rows to data files of a table, beside a bare ArrowWriter with the same properties on the same rows.
//!
//! Both write one file a day and sync it. The bare writer is given the rows of each day, one day after the other; the
//! table's writer also matches columns, splits rows by day, counts what Iceberg wants to know of each file, and syncs
//! folders.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{AsArray, RecordBatch, UInt32Array};
use arrow::compute::take_record_batch;
use arrow::datatypes::{Schema, TimestampMicrosecondType};
use iceberg::table::Table;
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use serde_json::json;
use tempfile::TempDir;
use tidemill::catalog::connect;
use tidemill::decode::metadata::{metadata_columns, metadata_fields};
use tidemill::job::Job;
use tidemill::memory::MemoryPlan;
use tidemill::sink::schema::create_main;
use tidemill::sink::writer::{FileLayout, TableWriter};
use tokio::runtime::Runtime;
use uuid::Uuid;

use super::events;
use super::figure::{Figure, Pieces};

const EVENTS: u64 = 400_000;
/// As many as a job of 256 MiB decodes at once.
const CHUNK_EVENTS: u64 = 40_000;
/// The job's memory.
const MEMORY_BYTES: u64 = 1 << 30;
const DAY_MICROS: i64 = 86_400_000_000;
/// All events within a few hours of one day.
const IN_ONE_DAY: f64 = 50.0;
/// Events of about ninety days, those of one batch of about ten.
const OVER_MANY_DAYS: f64 = 0.05;

/// Decoded events with the columns that every row carries.
fn batches(job: &Job, events_per_second: f64) -> Vec<RecordBatch> {
    let (mut decoder, assignment) = (events::decoder(job), events::assignment());
    let chunks = events::chunks(EVENTS, CHUNK_EVENTS, events_per_second);
    let batch = |chunk| {
        let decoded = decoder.decode(chunk, &assignment).expect("the chunk is small");
        let metadata = metadata_columns(&assignment, &decoded.places, &decoded.timestamps_ms, 1);
        let fields: Vec<_> = decoded.rows.schema().fields().iter().cloned().collect();
        let schema = Schema::new([fields, metadata_fields().into_iter().map(Arc::new).collect()].concat());
        let columns = [decoded.rows.columns(), &metadata].concat();
        RecordBatch::try_new(Arc::new(schema), columns).expect("the columns are the fields'")
    };
    chunks.iter().map(batch).collect()
}

async fn write_table(table: &Table, batches: &[RecordBatch], key: &[String], memory_bytes: u64) -> usize {
    let mut writer =
        TableWriter::new(table, Uuid::now_v7(), memory_bytes, key).expect("properties that can be followed");
    for batch in batches {
        writer.write(batch).await.expect("the folder is writable");
    }
    let files = writer.finish().await.expect("the folder is writable");
    assert_eq!(files.iter().map(|file| file.record_count()).sum::<u64>(), EVENTS);
    files.len()
}

fn write_bare(folder: &Path, days: &[Vec<RecordBatch>], properties: &WriterProperties) {
    for batches in days {
        let file = File::create(folder.join(Uuid::now_v7().to_string())).expect("the folder is writable");
        let synced = file.try_clone().expect("a second handle");
        let mut writer = ArrowWriter::try_new(file, batches[0].schema(), Some(properties.clone()))
            .expect("Parquet takes the columns");
        for batch in batches {
            writer.write(batch).expect("the folder is writable");
        }
        writer.close().expect("the folder is writable");
        synced.sync_all().expect("the disk takes it");
    }
}

/// The rows by day, each day's in their order: what a writer that knows the days beforehand is given.
fn by_day(batches: &[RecordBatch]) -> Vec<Vec<RecordBatch>> {
    let mut days: BTreeMap<i64, Vec<RecordBatch>> = BTreeMap::new();
    for batch in batches {
        let times = batch.column_by_name("event_time").expect("the event time");
        let times = times.as_primitive::<TimestampMicrosecondType>().values();
        let mut rows: BTreeMap<i64, Vec<u32>> = BTreeMap::new();
        for (row, micros) in (0..).zip(times) {
            rows.entry(micros.div_euclid(DAY_MICROS)).or_default().push(row);
        }
        for (day, rows) in rows {
            let rows = take_record_batch(batch, &UInt32Array::from(rows)).expect("rows of the batch");
            days.entry(day).or_default().push(rows);
        }
    }
    days.into_values().collect()
}

fn figure(name: &'static str, events_per_second: f64) -> Figure {
    let folder = TempDir::new().expect("a temporary folder");
    let mut job = events::job();
    job.sink.catalog.uri = format!("sqlite:{}", folder.path().join("catalog.db").display());
    job.sink.catalog.warehouse = folder.path().join("warehouse").display().to_string();
    let runtime = Runtime::new().expect("threads");
    let table = runtime.block_on(async {
        let catalog = connect(&job.sink.catalog).await.expect("the catalog is a file");
        create_main(catalog.as_ref(), &job).await.expect("the table is new")
    });
    let memory_bytes = MemoryPlan::divide(MEMORY_BYTES).expect("enough memory").writer * 3 / 4;
    let metadata = table.metadata();
    let key = &job.dedup.key;
    let layout = FileLayout::of(metadata.properties(), metadata.current_schema(), memory_bytes, key)
        .expect("properties that can be followed");
    let batches = batches(&job, events_per_second);
    let days = by_day(&batches);
    let mut files = 0;
    let mut figure = Figure::measure(
        name,
        "rows",
        "bare ArrowWriter",
        Pieces {
            pieces: 1,
            count: EVENTS,
            work: &mut |_| files = runtime.block_on(write_table(&table, &batches, key, memory_bytes)),
        },
        Pieces {
            pieces: 1,
            count: EVENTS,
            work: &mut |_| write_bare(folder.path(), &days, layout.writer_properties()),
        },
    );
    figure.facts = json!({ "columns": batches[0].num_columns(), "files": files, "days": days.len(), "batch_rows": CHUNK_EVENTS });
    figure
}

/// Measures it: batches that fall in one day, and batches of many days.
pub fn write() -> Vec<Figure> {
    vec![figure("write", IN_ONE_DAY), figure("write_many_days", OVER_MANY_DAYS)]
}
