//! Payloads to Arrow columns, beside the reader of the crate arrow-json on the same payloads and columns.
//!
//! The two do not do the same. arrow-json reads one text of all payloads, line by line; it refuses nothing for being
//! there twice, rounds a number that does not fit, and stops at the first bad payload. Both leave unknown members out.

use std::hint::black_box;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use arrow_json::ReaderBuilder;
use serde_json::json;
use tidemill::record::RecordChunk;

use super::events;
use super::figure::{Figure, Pieces};

const EVENTS: u64 = 400_000;
/// As many as a job of 256 MiB decodes at once.
const CHUNK_EVENTS: u64 = 40_000;
/// Days of event time do not matter here.
const EVENTS_PER_SECOND: f64 = 5.0;
/// Rows of a batch of arrow-json: of 1024 (its default) to 65,536 the fastest.
const FLOOR_BATCH_ROWS: usize = 8_192;

/// The ten columns as arrow-json wants them: nested where the payload is.
fn floor_schema() -> SchemaRef {
    let text = |name: &str| Field::new(name, DataType::Utf8, true);
    let delivery =
        DataType::Struct(vec![text("provider"), Field::new("attempt", DataType::Int32, true)].into());
    Arc::new(Schema::new(vec![
        Field::new("event_id", DataType::Utf8, false),
        Field::new("event_type", DataType::Utf8, false),
        Field::new("ts", DataType::Timestamp(TimeUnit::Millisecond, Some("+00:00".into())), false),
        text("notification_id"),
        Field::new("user_id", DataType::Int64, true),
        text("campaign"),
        text("channel"),
        Field::new("delivery", delivery, true),
        Field::new("price", DataType::Decimal128(9, 2), true),
    ]))
}

/// The payloads of a chunk, one a line.
fn lines(chunk: &RecordChunk) -> Vec<u8> {
    let mut lines = Vec::new();
    for record in chunk.iter() {
        lines.extend_from_slice(record.payload().expect("no tombstones are generated"));
        lines.push(b'\n');
    }
    lines
}

fn read_with_arrow_json(lines: &[u8], schema: &SchemaRef) -> u64 {
    let reader = ReaderBuilder::new(schema.clone()).with_batch_size(FLOOR_BATCH_ROWS);
    let mut decoder = reader.build_decoder().expect("the schema can be read");
    let (mut rest, mut rows) = (lines, 0);
    while !rest.is_empty() {
        let taken = decoder.decode(rest).expect("good payloads");
        rest = &rest[taken..];
        if let Some(batch) = decoder.flush().expect("good values") {
            rows += batch.num_rows() as u64;
            black_box(batch);
        }
    }
    rows
}

/// Measures it.
pub fn decode() -> Vec<Figure> {
    let job = events::job();
    let chunks = events::chunks(EVENTS, CHUNK_EVENTS, EVENTS_PER_SECOND);
    let (lines, schema): (Vec<Vec<u8>>, _) = (chunks.iter().map(lines).collect(), floor_schema());
    let mut decoder = events::decoder(&job);
    let assignment = events::assignment();
    let mut figure = Figure::measure(
        "decode",
        "events",
        "arrow-json",
        Pieces {
            pieces: chunks.len(),
            count: CHUNK_EVENTS,
            work: &mut |piece| {
                let decoded = decoder.decode(&chunks[piece], &assignment).expect("the chunk is small");
                assert_eq!(decoded.rows.num_rows() as u64, CHUNK_EVENTS);
                black_box(decoded);
            },
        },
        Pieces {
            pieces: lines.len(),
            count: CHUNK_EVENTS,
            work: &mut |piece| assert_eq!(read_with_arrow_json(&lines[piece], &schema), CHUNK_EVENTS),
        },
    );
    let bytes: usize = lines.iter().map(Vec::len).sum();
    let bytes_per_event = bytes as f64 / EVENTS as f64 - 1.0;
    figure.facts = json!({ "bytes_per_event": bytes_per_event, "columns": job.decode.columns.len() });
    vec![figure]
}
