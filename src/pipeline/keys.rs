//! Keys of rows, the same for rows that were just decoded and for rows that a table gives back: fingerprint, and the
//! time that says which bucket of the dedup state a key belongs to.

use arrow::array::{Array, AsArray, BooleanArray, RecordBatch};
use arrow::compute::filter_record_batch;
use arrow::datatypes::{Schema, TimestampMicrosecondType};

use super::survey;
use crate::dedup::Key;
use crate::event_time::EventTimeMs;
use crate::fingerprint::{Fingerprint, KeyEncoder};
use crate::id_time;
use crate::job::{BucketFrom, Job};
use crate::stop::{Reason, Stop};

/// Makes keys of rows under one job and seed.
#[derive(Debug)]
pub(super) struct KeyMaker {
    encoder: KeyEncoder,
    key_columns: Vec<String>,
    event_time_column: String,
    bucket_from: BucketFrom,
}

impl KeyMaker {
    /// # Errors
    /// A key column has no encoding.
    pub(super) fn new(rows: &Schema, job: &Job, seed: u64) -> Result<Self, Stop> {
        Ok(Self {
            encoder: survey::key_encoder(rows, job, seed)?,
            key_columns: job.dedup.key.clone(),
            event_time_column: job.event_time.column.clone(),
            bucket_from: job.dedup.bucket_from.clone(),
        })
    }

    /// Columns of a table that keys are made of.
    pub(super) fn table_columns(&self) -> Vec<String> {
        let mut columns = self.key_columns.clone();
        let time_column = match &self.bucket_from {
            BucketFrom::EventTime => &self.event_time_column,
            BucketFrom::Id { column, .. } => column,
        };
        if !columns.contains(time_column) {
            columns.push(time_column.clone());
        }
        columns
    }

    /// Column by whose values a table can be cut to the buckets that are asked for; an id's time is not stored.
    pub(super) fn prunable_column(&self) -> Option<&str> {
        (self.bucket_from == BucketFrom::EventTime).then_some(self.event_time_column.as_str())
    }

    /// One fingerprint per decoded row.
    pub(super) fn fingerprints(&self, rows: &RecordBatch) -> Result<Vec<Fingerprint>, Stop> {
        self.encoder.encode(rows).map_err(|error| {
            Stop::new(Reason::Unexpected, "a decoded row has no key", "please report this").because(error)
        })
    }

    /// Times in the ids of decoded rows, `None` for a row whose id has none; nothing if event time rules.
    pub(super) fn id_times(&self, rows: &RecordBatch) -> Result<Option<Vec<Option<EventTimeMs>>>, Stop> {
        let BucketFrom::Id { kind, column } = &self.bucket_from else { return Ok(None) };
        let times = id_time::times_of(rows, column, *kind);
        times.map(Some).map_err(|what| Stop::new(Reason::Unexpected, what, "please report this"))
    }

    /// Keys of rows that a table gave back.
    ///
    /// # Errors
    /// `MISSING_KEYS`: others changed rows of ours.
    pub(super) fn of_table_rows(&self, table: &str, rows: &RecordBatch) -> Result<Vec<Key>, Stop> {
        let changed = |what: String| {
            Stop::new(
                Reason::MissingKeys,
                what,
                "no event was written; rows were changed by others: put the values back, or bring back the state folder, \
                 then:\n  tidemill run JOB",
            )
        };
        let fingerprints = self
            .encoder
            .encode(rows)
            .map_err(|error| changed(format!("table {table} has a row without key")).because(error))?;
        let times = match &self.bucket_from {
            BucketFrom::EventTime => event_times(rows, &self.event_time_column).ok_or_else(|| {
                changed(format!("a row of ours has no event time in column {}", self.event_time_column))
            })?,
            BucketFrom::Id { kind, column } => id_time::times_of(rows, column, *kind)
                .map_err(&changed)?
                .into_iter()
                .collect::<Option<Vec<_>>>()
                .ok_or_else(|| changed(format!("a row of ours has an id without time in column {column}")))?,
        };
        let key = |(fingerprint, event_time)| Key { fingerprint, event_time };
        Ok(fingerprints.into_iter().zip(times).map(key).collect())
    }

    /// Keys of rows that others wrote. A row without a value in a key column, or without a time, has no key: no event of
    /// ours can repeat it.
    ///
    /// # Errors
    /// `UNEXPECTED`: the columns are not those of the table's schema.
    pub(super) fn of_rows_of_others(&self, rows: &RecordBatch) -> Result<Vec<Key>, Stop> {
        let unexpected = |what: String| Stop::new(Reason::Unexpected, what, "please report this");
        let columns = self.table_columns();
        let whole = |row: usize| {
            columns.iter().all(|name| rows.column_by_name(name).is_some_and(|column| column.is_valid(row)))
        };
        let mask: BooleanArray = (0..rows.num_rows()).map(|row| Some(whole(row))).collect();
        let rows = filter_record_batch(rows, &mask).map_err(|error| unexpected(error.to_string()))?;
        if rows.num_rows() == 0 {
            return Ok(Vec::new());
        }
        let fingerprints = self.encoder.encode(&rows).map_err(|error| unexpected(error.to_string()))?;
        let times: Vec<Option<EventTimeMs>> = match &self.bucket_from {
            BucketFrom::EventTime => {
                let times = event_times(&rows, &self.event_time_column);
                times
                    .ok_or_else(|| unexpected("a row has no event time".to_owned()))?
                    .into_iter()
                    .map(Some)
                    .collect()
            }
            BucketFrom::Id { kind, column } => id_time::times_of(&rows, column, *kind).map_err(unexpected)?,
        };
        let key = |(fingerprint, time): (Fingerprint, Option<EventTimeMs>)| {
            time.map(|event_time| Key { fingerprint, event_time })
        };
        Ok(fingerprints.into_iter().zip(times).filter_map(key).collect())
    }
}

/// Event times of rows that may have none.
pub(super) fn optional_event_times(rows: &RecordBatch, column: &str) -> Vec<Option<EventTimeMs>> {
    let times =
        rows.column_by_name(column).and_then(|column| column.as_primitive_opt::<TimestampMicrosecondType>());
    match times {
        Some(times) => times.iter().map(|micros| micros.map(EventTimeMs::from_micros)).collect(),
        None => vec![None; rows.num_rows()],
    }
}

/// Event times as a table stores them.
fn event_times(rows: &RecordBatch, column: &str) -> Option<Vec<EventTimeMs>> {
    let times = rows.column_by_name(column)?.as_primitive_opt::<TimestampMicrosecondType>()?;
    if times.null_count() > 0 {
        return None;
    }
    Some(times.values().iter().map(|&micros| EventTimeMs::from_micros(micros)).collect())
}
