//! Generated events and the job that reads them.

use tempfile::TempDir;
use tidemill::decode::Decoder;
use tidemill::generate::{Generator, GeneratorConfig, demo_job_toml};
use tidemill::job::{ColumnSource, Job, file};
use tidemill::offset::TopicPartition;
use tidemill::record::{RecordChunk, RecordParts};

/// Columns of the demo's job that [`job`] leaves out: what stays are ten, two of them inside a nested object.
const COLUMNS_LEFT_OUT: [&str; 3] = ["region", "locale", "trace_id"];

/// The demo's job with ten columns.
pub fn job() -> Job {
    let folder = TempDir::new().expect("a temporary folder");
    let path = folder.path().join("job.toml");
    let text = demo_job_toml("localhost:9092", folder.path(), &["t".to_owned()]);
    std::fs::write(&path, text).expect("the folder is writable");
    let mut job = file::read(&path, &[], &|_| None).expect("the demo's job is valid").job;
    job.decode.columns.retain(|column| !COLUMNS_LEFT_OUT.contains(&column.name.as_str()));
    let values = job.decode.columns.iter().filter(|column| matches!(column.from, ColumnSource::Value(_)));
    assert_eq!(values.count(), 10, "ten columns from the payload");
    job
}

/// A decoder for a job.
pub fn decoder(job: &Job) -> Decoder {
    Decoder::new(&job.decode, &job.dedup.key, &job.event_time.column, job.source.record_bytes_max)
        .expect("the demo's columns can be decoded")
}

/// The topic partition that all events are of.
pub fn assignment() -> [TopicPartition; 1] {
    [TopicPartition::new("t", 0)]
}

/// `events` generated records, repeats in all their forms among them, in chunks of `chunk_events`; event times advance
/// by `events_per_second`.
pub fn chunks(events: u64, chunk_events: u64, events_per_second: f64) -> Vec<RecordChunk> {
    let config = GeneratorConfig { events_per_second, ..GeneratorConfig::default() };
    let mut generator = Generator::new(&config).expect("the configuration is valid");
    let mut offset = 0;
    let mut chunks = Vec::new();
    for _ in 0..events.div_ceil(chunk_events) {
        let mut chunk = RecordChunk::default();
        for record in generator.wave(chunk_events) {
            let (key, payload) = (record.key.as_deref(), record.payload.as_deref());
            chunk.push(RecordParts { slot: 0, offset, timestamp_ms: record.timestamp_ms, key, payload });
            offset += 1;
        }
        chunks.push(chunk);
    }
    chunks
}
