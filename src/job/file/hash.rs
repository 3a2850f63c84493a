//! The hash of a job that stands in the ledger beside each batch: equal as long as the job asks for the same rows in
//! the same tables.
//!
//! Hashed: name, topics (as a set), start, decode, event time, dedup, tables, partition fields, table properties,
//! brake. These decide which row ends up where.
//!
//! Not hashed: how things are reached (Kafka properties, catalog address, warehouse and properties, and so every
//! secret) and how fast it goes (memory, state folder, microbatch limits). Moving a job to another machine or
//! rotating a password is not a change of the job.
//!
//! Layout: lines `name=length:value`, in the order below. The order of columns and key columns counts, that of
//! topics and properties does not. A field that is added later is written only if it differs from its default, so
//! hashes of older jobs stay.

use std::fmt::Write;

use xxhash_rust::xxh3::xxh3_128;

use crate::job::{
    Arrays, BeyondWindow, BucketFrom, ColumnSource, Job, LatePolicy, OnMissingKeys, OnRollback, Repeats,
    StartPosition, TimeUnit, UnknownFields,
};

/// First line; changes with the layout.
const LAYOUT: &str = "tidemill job 1";

/// XXH3-128 of the job's canonical form, 32 hex digits.
pub(super) fn hash(job: &Job) -> String {
    format!("{:032x}", xxh3_128(canonical(job).as_bytes()))
}

fn canonical(job: &Job) -> String {
    let mut form = Form(format!("{LAYOUT}\n"));
    form.line("name", &job.name);
    let mut topics = job.source.topics.clone();
    topics.sort();
    form.lines("topic", &topics);
    match &job.source.start {
        StartPosition::Earliest => form.line("start", "earliest"),
        StartPosition::Latest => form.line("start", "latest"),
        StartPosition::Timestamp(ms) => form.line("start_ms", &ms.to_string()),
        StartPosition::Offsets(by_topic) => {
            for (topic, offsets) in by_topic {
                form.line("start_topic", topic);
                for (partition, offset) in offsets {
                    form.line("start_offset", &format!("{partition} {offset}"));
                }
            }
        }
    }
    form.line("max_record", &job.source.record_bytes_max.to_string());
    match job.decode.unknown_fields {
        UnknownFields::Ignore => form.line("unknown_fields", "ignore"),
        UnknownFields::Keep => form.line("unknown_fields", "keep"),
        UnknownFields::DeadLetter => form.line("unknown_fields", "dead_letter"),
    }
    match job.decode.arrays {
        Arrays::Split => form.line("arrays", "split"),
        Arrays::DeadLetter => form.line("arrays", "dead_letter"),
    }
    for column in &job.decode.columns {
        form.line("column", &column.name);
        form.line("type", &column.column_type.to_string());
        form.line("required", &column.required.to_string());
        match &column.from {
            ColumnSource::Value(path) => form.lines("path", path),
            ColumnSource::Key => form.line("from", "key"),
            ColumnSource::Header(name) => form.line("header", name),
            ColumnSource::Timestamp => form.line("from", "timestamp"),
            ColumnSource::Topic => form.line("from", "topic"),
        }
        match column.unit {
            None => {}
            Some(TimeUnit::Seconds) => form.line("unit", "s"),
            Some(TimeUnit::Millis) => form.line("unit", "ms"),
            Some(TimeUnit::Micros) => form.line("unit", "us"),
        }
    }
    let time = &job.event_time;
    form.line("event_time", &time.column);
    form.line("watermark_delay_ms", &time.watermark_delay.as_millis().to_string());
    form.line("allowed_lateness_ms", &time.allowed_lateness.as_millis().to_string());
    form.line("max_ahead_ms", &time.ahead_max.as_millis().to_string());
    form.line("idle_after_ms", &time.idle_after.as_millis().to_string());
    match time.late {
        LatePolicy::Keep => form.line("late", "keep"),
        LatePolicy::Side => form.line("late", "side"),
        LatePolicy::Drop => form.line("late", "drop"),
    }
    form.lines("key", &job.dedup.key);
    form.line("window_ms", &job.dedup.window.as_millis().to_string());
    form.line("shards", &job.dedup.shards.to_string());
    match job.dedup.repeats {
        Repeats::AnyTime => form.line("repeats", "any_time"),
        Repeats::SameTime => form.line("repeats", "same_time"),
    }
    match &job.dedup.bucket_from {
        BucketFrom::EventTime => {}
        BucketFrom::Id { kind, column } => {
            form.line("bucket_from", kind.name());
            form.line("id_column", column);
        }
    }
    match job.dedup.beyond_window {
        BeyondWindow::Check => {}
        BeyondWindow::Side => form.line("beyond_window", "side"),
    }
    match job.dedup.on_missing_keys {
        OnMissingKeys::Stop => {}
        OnMissingKeys::Accept => form.line("on_missing_keys", "accept"),
    }
    form.lines("table", &job.sink.table);
    for field in &job.sink.partition_by {
        form.line("partition", &format!("{} {}", field.transform, field.column));
    }
    for (name, value) in &job.sink.table_properties {
        form.line("property", name);
        form.line("value", value);
    }
    form.lines("dead_letters", &job.sink.dead_letters.table);
    form.line("max_ratio", &format!("{:?}", job.sink.dead_letters.ratio_max));
    if job.uses_late_table() {
        form.lines("late_table", &job.sink.late.table);
    }
    match job.sink.on_rollback {
        OnRollback::Stop => {}
        OnRollback::Replay => form.line("on_rollback", "replay"),
    }
    form.0
}

struct Form(String);

impl Form {
    fn line(&mut self, name: &str, value: &str) {
        // writing to a String does not fail
        let _ = writeln!(self.0, "{name}={}:{value}", value.len());
    }

    fn lines(&mut self, name: &str, values: &[String]) {
        self.line(&format!("{name}s"), &values.len().to_string());
        values.iter().for_each(|value| self.line(name, value));
    }
}
