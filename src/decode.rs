//! Decode: payload bytes become typed Arrow rows, exactly, or dead letters that say why.
//!
//! Flow: [`RecordChunk`] -> fast read of a row that is as it should be, else depth, grammar and walk over wanted members
//! -> values -> verdict -> Arrow columns, or a [`DeadLetter`]. The stage is a function of chunk, job and assignment: no
//! clock, no file; what is remembered between chunks (buffers, which member follows which) changes speed alone.
//!
//! Invariants
//! 1. Every record makes at least one row or letter, and every array element of a split record exactly one:
//!    `consumed = rows + letters`.
//! 2. A value in a column is the value in the payload. What a type can not hold exactly is refused, never rounded
//!    to fit (but for the nearest-value rule of float and double below).
//! 3. A refused row leaves nothing in the columns: it is read into slots and appended after its verdict.
//! 4. No payload makes the decoder panic, recurse without bound or take more than a fixed multiple of its length.
//!
//! # Records
//! Judged in this order; the first that applies is the verdict, with row index 0 and the whole payload:
//! 1. `tombstone`: no payload. 2. `record_too_large`: longer than the job allows (the bytes are not kept).
//! 3. `invalid_utf8`: anywhere. 4. `empty_payload`: no bytes, or only JSON white space. 5. `too_deep`: more than 128
//!    arrays and objects inside each other, in wanted and skipped parts alike, counted before the grammar is.
//! 6. `truncated_json`: ends inside a value. `invalid_json`: any other breach of RFC 8259, such as NaN, bytes after
//!    the value, a byte order mark, or half of a surrogate pair in a `\u` escape anywhere (also in skipped members).
//! 7. `not_an_object`: a scalar. For an array: `array_refused` if the job says so, `empty_array`, or
//!    `record_too_large` (bytes kept) if it has more than [`ROWS_PER_RECORD_MAX`] elements or they would repeat
//!    key and headers to more than [`REPEATED_BYTES_MAX`] bytes.
//!
//! An array is split only if all of it is JSON. Each element is then a row of its own with its index and its own
//! verdict; an element that is no object is `not_an_object`. The letter of an element carries the element's bytes.
//!
//! # Rows
//! Judged in this order; the first that applies is the verdict:
//! 1. Members in the order of the payload: `duplicate_field` (a wanted member, or an object on the way to one,
//!    stands twice), `unknown_field` (if the job says so: a member that no column reads, at the top or inside an
//!    object on the way to a wanted member), `wrong_type`, `out_of_range`.
//! 2. Key, header, timestamp and topic columns in the order of the table: `invalid_utf8`, `out_of_range`.
//! 3. Dedup key columns in the order of the key: `null_key`, `empty_key` (text or bytes of length 0).
//! 4. `missing_event_time`. 5. `missing_required`, in the order of the table.
//!
//! # Values
//! A missing member, a null, and a null on the way to a member are all null. Anything else than an object on the way
//! is `wrong_type`, and so is a JSON value of another type than listed:
//!
//! | column | taken | refused as `out_of_range` |
//! |---|---|---|
//! | boolean | `true`, `false` | |
//! | int, long | digits without fraction or exponent (`1.0` and `1e3` are `wrong_type`), every digit counts | beyond 32 or 64 bits |
//! | double, float | any number, rounded once to the nearest value | to infinity; not zero but rounded to zero; an integer (no fraction, no exponent) that has no exact value |
//! | decimal(p, s) | any number, or a string that holds exactly one; exponents are worked out | a digit other than 0 that has no place |
//! | string | strings; NUL (`\u0000`) is a character like others | |
//! | uuid | 8-4-4-4-12 hexadecimal digits, either case | |
//! | binary, fixed(n) | base64 of RFC 4648 section 4, padded, canonical | another length than n |
//! | date | `YYYY-MM-DD` | no such date, years outside 0001..9999 |
//! | time | `HH:MM:SS[.f]`; numbers if `unit` is set: since midnight | 24 h and more; finer than 1 µs |
//! | timestamp | `YYYY-MM-DDTHH:MM:SS[.f]`, no offset; numbers if `unit` is set | years outside 0001..9999; second 60; finer than 1 µs |
//! | timestamptz | the same with `Z` or `+HH:MM`; numbers if `unit` is set: since the epoch | the same |
//!
//! A string that holds a number is no number, except for decimal, whose producers use strings on purpose. Text of
//! the wrong shape is `wrong_type`. Key and header columns are string (UTF-8, else `invalid_utf8`) or binary (as they
//! are); of headers with one name the first counts, a missing one is null.
//!
//! Unknown top-level members that the job keeps are gathered, in their order, repeats included, as one JSON object
//! whose values are verbatim; null if there are none. Unknown members inside an object that a path enters are not
//! kept.
//!
//! Bounds: rows cost their values plus 12 bytes per column at most (16 for decimal and uuid), 56 bytes per row for
//! places and origins; a letter costs its payload, key and 300 characters. One text column of one chunk holds at most
//! 2 GiB.

mod columns;
mod fast;
pub mod metadata;
#[cfg(test)]
mod model_tests;
mod plan;
mod scan;
#[cfg(test)]
mod tests;
mod time;
mod value;
mod verdict;
mod walk;

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{BooleanArray, RecordBatch, RecordBatchOptions};
use arrow::compute::filter_record_batch;
use arrow::datatypes::{Schema, SchemaRef};

use self::columns::Columns;
use self::fast::FastRow;
use self::plan::{Plan, Tree};
use self::scan::Scan;
use self::value::{Bytes, JsonType, Scratch, Text, Value};
use self::verdict::{Fault, Refusal, letter};
use self::walk::{Walk, article, value_text};
use crate::event_time::EventTimeMs;
use crate::job::{self, Arrays, ColumnSource, UnknownFields};
use crate::letter::{DeadLetter, ReasonCode};
use crate::mutant;
use crate::offset::{Place, TopicPartition};
use crate::record::{Record, RecordChunk};

/// Most rows of one record. A longer array is one dead letter: a record must not cost a multiple of its own size.
pub const ROWS_PER_RECORD_MAX: usize = 65_536;
/// Most bytes of key and headers that the rows of one split record repeat.
pub const REPEATED_BYTES_MAX: usize = 64 << 20;

/// Why a job's columns can not be decoded. The job file is to be changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeSetupError {
    /// Two columns of one name, or a name that tidemill gives itself.
    #[error("column {column} stands twice or is a name that tidemill writes itself; rename it")]
    NameTaken {
        /// The column.
        column: String,
    },
    /// The key or the event time names no column.
    #[error(
        "{option} names {column}, which is no column of [decode.columns]; add it there or correct the name"
    )]
    NoSuchColumn {
        /// The option that names it.
        option: &'static str,
        /// The name.
        column: String,
    },
    /// Event time comes from a column that holds no instant.
    #[error(
        "event_time.column is {column} of type {column_type}; choose a column of type timestamptz or timestamp"
    )]
    EventTimeType {
        /// The column.
        column: String,
        /// Its type.
        column_type: String,
    },
    /// A type that rows can not hold.
    #[error("column {column} has type {column_type}: {why}")]
    TypeUnsupported {
        /// The column.
        column: String,
        /// Its type.
        column_type: String,
        /// Why, and what to use.
        why: &'static str,
    },
    /// A unit on a column that takes no numbers as times.
    #[error(
        "column {column} has a `unit`, which only time, timestamp and timestamptz read from the payload use; remove it"
    )]
    UnitUnused {
        /// The column.
        column: String,
    },
    /// A path without members or with too many.
    #[error("the path of column {column} has {members} members; 1 to {max} are possible", max = plan::PATH_MEMBERS_MAX)]
    PathLength {
        /// The column.
        column: String,
        /// Members of its path.
        members: usize,
    },
    /// A path that another path goes through: its value would have to be an object and something else at once.
    #[error(
        "column {column} reads {path}, but {inner} needs an object there; no column type holds an object"
    )]
    PathEntered {
        /// The column.
        column: String,
        /// Its path.
        path: String,
        /// A path through it.
        inner: String,
    },
    /// A column type that its source does not give.
    #[error(
        "column {column} reads the {source_text} and has type {column_type}; that source gives {allowed}"
    )]
    SourceType {
        /// The column.
        column: String,
        /// Where it reads.
        source_text: String,
        /// Types that the source gives.
        allowed: &'static str,
        /// The column's type.
        column_type: String,
    },
}

/// Why a chunk can not be decoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// A text column would outgrow what Arrow counts. Decode the records in smaller chunks.
    #[error("column {column} of one chunk has more than {text_bytes_max} bytes of text; use smaller chunks")]
    ChunkTooLarge {
        /// The column.
        column: String,
        /// The bound.
        text_bytes_max: usize,
    },
}

/// Turns chunks of records into rows and dead letters. Keeps its buffers from chunk to chunk.
#[derive(Debug)]
pub struct Decoder {
    plan: Plan,
    tree: Tree,
    schema: SchemaRef,
    arrays: Arrays,
    record_bytes_max: usize,
    scratch: Scratch,
    unknown: String,
    /// Number of the last reading of a row, over the decoder's life; a row is read once or twice.
    row: u64,
}

/// What a chunk became. The vectors have one entry per row of `rows`.
#[derive(Debug)]
pub struct Decoded {
    /// The good rows, in the order of the chunk, with the schema of [`Decoder::schema`]. May be empty.
    pub rows: RecordBatch,
    /// Where each row came from.
    pub places: Vec<Place>,
    /// Kafka timestamp of each row's record, in ms since the epoch.
    pub timestamps_ms: Vec<Option<i64>>,
    /// Event time of each row, floored to ms.
    pub event_times: Vec<EventTimeMs>,
    /// Where each row's bytes lie, for stages that refuse it later.
    pub origins: Vec<RowOrigin>,
    /// The refused rows, in the order of the chunk.
    pub letters: Vec<DeadLetter>,
    /// Rows after splitting: good ones and refused ones.
    pub consumed: u64,
}

/// Where the bytes of a row lie in the chunk that it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowOrigin {
    /// Index of the record in its chunk.
    record: u32,
    /// Range of bytes in the record's payload, half-open.
    payload_start: u32,
    payload_end: u32,
}

impl Decoder {
    /// Checks the columns and prepares to decode them.
    ///
    /// `key_columns` are the columns of the dedup key, `event_time_column` the column of the event time; payloads of
    /// more than `record_bytes_max` bytes are dead letters.
    ///
    /// # Errors
    /// [`DecodeSetupError`]: the job is to be changed; the text names the column and the way out.
    pub fn new(
        decode: &job::Decode,
        key_columns: &[String],
        event_time_column: &str,
        record_bytes_max: u64,
    ) -> Result<Self, DecodeSetupError> {
        let plan = Plan::new(decode, key_columns, event_time_column)?;
        Ok(Self {
            tree: Tree::new(&plan.columns)?,
            schema: Arc::new(Schema::new(plan.fields.clone())),
            plan,
            arrays: decode.arrays,
            // Kafka counts the bytes of a record in 32 bits.
            record_bytes_max: record_bytes_max.min(i32::MAX as u64) as usize,
            scratch: Scratch::default(),
            unknown: String::new(),
            row: 0,
        })
    }

    /// The schema of good rows: the job's columns in order, then the unknown fields if the job keeps them; no metadata
    /// columns, no field ids. Types are those that iceberg 0.10.1 gives the columns' Iceberg types.
    pub fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    /// Decodes all records of a chunk. `assignment` is indexed by the records' slots.
    ///
    /// # Errors
    /// [`DecodeError::ChunkTooLarge`]: decode the records again in smaller chunks.
    pub fn decode(
        &mut self,
        chunk: &RecordChunk,
        assignment: &[TopicPartition],
    ) -> Result<Decoded, DecodeError> {
        let kept = usize::from(self.plan.unknown_fields == UnknownFields::Keep);
        let mut pass = Pass {
            plan: &self.plan,
            tree: &mut self.tree,
            scratch: &mut self.scratch,
            unknown: &mut self.unknown,
            row: &mut self.row,
            arrays: self.arrays,
            record_bytes_max: self.record_bytes_max,
            assignment,
            slots: vec![Value::Null; self.plan.columns.len() + kept],
            outside_fault: None,
            elements: Vec::new(),
            columns: Columns::new(&self.plan.fields, chunk.len()),
            rows: Rows::with_capacity(chunk.len()),
        };
        for (index, record) in chunk.iter().enumerate() {
            pass.record(u32::try_from(index).expect("a chunk has fewer than 2^32 records"), &record)?;
        }
        let Pass { columns, rows, .. } = pass;
        let options = RecordBatchOptions::new().with_row_count(Some(rows.places.len()));
        let batch = RecordBatch::try_new_with_options(Arc::clone(&self.schema), columns.finish(), &options)
            .expect("every row has a value or an allowed null in each column");
        Ok(Decoded {
            consumed: (rows.places.len() + rows.letters.len()) as u64,
            rows: batch,
            places: rows.places,
            timestamps_ms: rows.timestamps_ms,
            event_times: rows.event_times,
            origins: rows.origins,
            letters: rows.letters,
        })
    }
}

impl Decoded {
    /// A dead letter of a good row that a later stage refuses. `chunk` is the one that was decoded, `row` an index
    /// into `rows`; `text` is escaped and cut to 300 characters.
    pub fn letter_for(&self, chunk: &RecordChunk, row: usize, code: ReasonCode, text: &str) -> DeadLetter {
        let origin = self.origins[row];
        let record = chunk.get(origin.record as usize);
        let payload = record.payload().map(|payload| &payload[origin.range()]);
        letter(&record, self.places[row].row_index, payload, origin.range().len(), Fault::new(code, text))
    }

    /// Keeps the rows for which `keep` is true, in all columns and vectors alike. Letters and `consumed` stay.
    /// `keep` has one value per row and no nulls.
    pub fn retain(&mut self, keep: &BooleanArray) {
        assert_eq!(keep.len(), self.places.len(), "one verdict per row");
        self.rows = filter_record_batch(&self.rows, keep).expect("the verdicts are as many as the rows");
        retain_kept(&mut self.places, keep);
        retain_kept(&mut self.timestamps_ms, keep);
        retain_kept(&mut self.event_times, keep);
        retain_kept(&mut self.origins, keep);
    }
}

fn retain_kept<T>(values: &mut Vec<T>, keep: &BooleanArray) {
    let mut row = 0;
    values.retain(|_| {
        row += 1;
        keep.value(row - 1)
    });
}

impl RowOrigin {
    fn range(self) -> Range<usize> {
        self.payload_start as usize..self.payload_end as usize
    }

    /// The origin of a row whose bytes are a part of `payload`.
    fn of(record: u32, payload: &[u8], bytes: &[u8]) -> Self {
        let start = bytes.as_ptr().addr() - payload.as_ptr().addr();
        let position = |byte: usize| u32::try_from(byte).expect("a payload has fewer than 2^31 bytes");
        Self { record, payload_start: position(start), payload_end: position(start + bytes.len()) }
    }
}

/// Good rows and letters on their way out.
struct Rows {
    places: Vec<Place>,
    timestamps_ms: Vec<Option<i64>>,
    event_times: Vec<EventTimeMs>,
    origins: Vec<RowOrigin>,
    letters: Vec<DeadLetter>,
}

impl Rows {
    fn with_capacity(rows: usize) -> Self {
        Self {
            places: Vec::with_capacity(rows),
            timestamps_ms: Vec::with_capacity(rows),
            event_times: Vec::with_capacity(rows),
            origins: Vec::with_capacity(rows),
            letters: Vec::new(),
        }
    }
}

/// One pass over one chunk.
struct Pass<'d, 'a> {
    plan: &'d Plan,
    tree: &'d mut Tree,
    scratch: &'d mut Scratch,
    unknown: &'d mut String,
    row: &'d mut u64,
    arrays: Arrays,
    record_bytes_max: usize,
    assignment: &'a [TopicPartition],
    /// One value per column of the row in work, the unknown fields last.
    slots: Vec<Value<'a>>,
    /// What is wrong with key, headers or timestamp of the record in work.
    outside_fault: Option<Fault>,
    /// Elements of the array in work.
    elements: Vec<&'a str>,
    columns: Columns<'d>,
    rows: Rows,
}

impl<'a> Pass<'_, 'a> {
    /// Rows and letters of one record.
    fn record(&mut self, index: u32, record: &Record<'a>) -> Result<(), DecodeError> {
        let payload = record.payload().unwrap_or_default();
        match self.rows_of(record) {
            Ok(Shape::Object(text)) => {
                self.read_outside(record);
                self.row(index, record, 0, text, payload)
            }
            Ok(Shape::Array) => {
                let elements = std::mem::take(&mut self.elements);
                for (row_index, element) in (0..).zip(&elements) {
                    self.row(index, record, row_index, element, element.as_bytes())?;
                }
                self.elements = elements;
                Ok(())
            }
            Err(fault) => {
                let too_large = payload.len() > self.record_bytes_max;
                let kept = record.payload().filter(|_| !too_large);
                self.rows.letters.push(letter(record, 0, kept, payload.len(), fault));
                Ok(())
            }
        }
    }

    /// Judges a record as a whole, in the order of the module head. Elements of an array are left in `elements`.
    fn rows_of(&mut self, record: &Record<'a>) -> Result<Shape<'a>, Fault> {
        let Some(payload) = record.payload() else {
            return Err(Fault::new(
                ReasonCode::Tombstone,
                "the payload is null; tombstones delete nothing here",
            ));
        };
        if payload.len() > self.record_bytes_max {
            return Err(Fault::new(
                ReasonCode::RecordTooLarge,
                format!("the payload has {} bytes, the job takes {}", payload.len(), self.record_bytes_max),
            ));
        }
        let text = std::str::from_utf8(payload).map_err(|error| {
            let position = error.valid_up_to();
            Fault::new(ReasonCode::InvalidUtf8, format!("the payload is not UTF-8 at byte {position}"))
        })?;
        let text = text.trim_matches([' ', '\t', '\n', '\r']);
        if text.is_empty() {
            return Err(Fault::new(ReasonCode::EmptyPayload, "the payload is empty or white space"));
        }
        match JsonType::of(text) {
            JsonType::Object => Ok(Shape::Object(text)),
            JsonType::Array => self.split(record, text).map(|()| Shape::Array),
            _ => {
                walk::check_depth(text)?;
                walk::check_grammar(text)?;
                Err(not_an_object("the payload", text))
            }
        }
    }

    /// Splits an array and checks that its rows stay within their bounds.
    fn split(&mut self, record: &Record<'a>, text: &'a str) -> Result<(), Fault> {
        let count = match scan::split(text, &mut self.elements, ROWS_PER_RECORD_MAX) {
            Some(count) => count,
            None => {
                walk::check_depth(text)?;
                walk::split(text, &mut self.elements, ROWS_PER_RECORD_MAX)?
            }
        };
        if self.arrays == Arrays::DeadLetter {
            let text = format!("the payload is an array of {count} elements; to split it set `arrays`");
            return Err(Fault::new(ReasonCode::ArrayRefused, text));
        }
        if count == 0 {
            return Err(Fault::new(ReasonCode::EmptyArray, "the payload is an array without elements"));
        }
        if count > ROWS_PER_RECORD_MAX {
            let text = format!(
                "the payload is an array of {count} elements, at most {ROWS_PER_RECORD_MAX} are taken"
            );
            return Err(Fault::new(ReasonCode::RecordTooLarge, text));
        }
        self.read_outside(record);
        let repeated = count.saturating_mul(self.outside_bytes(record));
        if repeated > REPEATED_BYTES_MAX {
            let text = format!(
                "the {count} elements of the array would repeat key and headers to {repeated} bytes, at most \
                 {REPEATED_BYTES_MAX} are taken"
            );
            return Err(Fault::new(ReasonCode::RecordTooLarge, text));
        }
        Ok(())
    }

    /// Bytes that each row of a record has from outside of its payload, and each letter as its key.
    fn outside_bytes(&self, record: &Record<'a>) -> usize {
        let columns = self.plan.outside.iter().map(|position| match &self.slots[*position] {
            Value::Text(Text::Chunk(text)) => text.len(),
            Value::Bytes(Bytes::Chunk(bytes)) => bytes.len(),
            _ => 0,
        });
        columns.sum::<usize>() + record.key().map_or(0, <[u8]>::len)
    }

    /// Reads key, headers, timestamp and topic into their slots, once per record.
    fn read_outside(&mut self, record: &Record<'a>) {
        self.outside_fault = None;
        for position in &self.plan.outside {
            let planned = &self.plan.columns[*position];
            let kind = &planned.column.column_type;
            let value = match &planned.column.from {
                ColumnSource::Key => record.key().map(|key| value::from_bytes(key, kind)),
                ColumnSource::Header(name) => {
                    first_header(record, name).map(|header| value::from_bytes(header, kind))
                }
                ColumnSource::Timestamp => record.timestamp_ms().map(timestamp_value),
                ColumnSource::Topic => {
                    let assigned = self.assignment.get(record.slot() as usize);
                    let topic = &assigned.expect("every slot is an index into the assignment").topic;
                    Some(Ok(Value::Text(Text::Chunk(topic))))
                }
                ColumnSource::Value(_) => unreachable!("a column outside of the payload has no path"),
            };
            self.slots[*position] = match value {
                Some(Ok(value)) => value,
                None => Value::Null,
                Some(Err(refusal)) => {
                    if self.outside_fault.is_none() {
                        let found = outside_found(refusal, record);
                        let text = value_text(planned, refusal, &found, None);
                        self.outside_fault = Some(Fault::new(refusal.code, text));
                    }
                    Value::Null
                }
            };
        }
    }

    /// One row or one letter. `bytes` is what a letter of this row carries.
    fn row(
        &mut self,
        index: u32,
        record: &Record<'a>,
        row_index: i32,
        text: &'a str,
        bytes: &'a [u8],
    ) -> Result<(), DecodeError> {
        match self.verdict(row_index, text) {
            Ok(event_time) => {
                self.columns.append(self.slots.iter(), self.scratch)?;
                let payload = record.payload().unwrap_or_default();
                self.rows.places.push(Place { slot: record.slot(), offset: record.offset(), row_index });
                self.rows.timestamps_ms.push(record.timestamp_ms());
                self.rows.event_times.push(event_time);
                self.rows.origins.push(RowOrigin::of(index, payload, bytes));
            }
            Err(fault) => self.rows.letters.push(letter(record, row_index, Some(bytes), bytes.len(), fault)),
        }
        Ok(())
    }

    /// Reads a row into the slots and judges it, in the order of the module head.
    fn verdict(&mut self, row_index: i32, text: &'a str) -> Result<EventTimeMs, Fault> {
        if JsonType::of(text) != JsonType::Object {
            return Err(not_an_object(&format!("element {row_index} of the array"), text));
        }
        self.read_payload(text)?;
        if let Some(fault) = &self.outside_fault {
            return Err(fault.clone());
        }
        self.check_keys()?;
        let event_time = self.event_time()?;
        self.check_required()?;
        Ok(event_time)
    }

    /// Reads the payload's columns into their slots: fast where all is well, else with a verdict.
    fn read_payload(&mut self, text: &'a str) -> Result<(), Fault> {
        if self.read_fast(text).is_none() {
            walk::check_depth(text)?;
            self.walk(text)?;
        }
        if self.plan.unknown_fields == UnknownFields::Keep {
            let slot = self.slots.last_mut().expect("kept members have a slot of their own");
            *slot = self.scratch.keep_object(self.unknown);
        }
        Ok(())
    }

    fn read_fast(&mut self, text: &'a str) -> Option<()> {
        self.begin_reading();
        let row = FastRow {
            nodes: &mut self.tree.nodes,
            columns: &self.plan.columns,
            slots: &mut self.slots,
            scratch: self.scratch,
            unknown_fields: self.plan.unknown_fields,
            unknown: self.unknown,
            row: *self.row,
            scan: Scan::new(text),
        };
        row.read()
    }

    fn walk(&mut self, text: &'a str) -> Result<(), Fault> {
        self.begin_reading();
        Walk::new(
            self.tree,
            &self.plan.columns,
            &mut self.slots,
            self.scratch,
            self.plan.unknown_fields,
            self.unknown,
            *self.row,
        )
        .object(text)
    }

    /// Nothing of this row is read yet.
    fn begin_reading(&mut self) {
        *self.row += 1;
        self.scratch.clear();
        self.unknown.clear();
        for position in &self.plan.inside {
            self.slots[*position] = Value::Null;
        }
    }

    fn check_keys(&self) -> Result<(), Fault> {
        for position in &self.plan.keys {
            let empty = match &self.slots[*position] {
                Value::Null if mutant!("null-key-passes", false => true) => {
                    return Err(self.missing(*position, ReasonCode::NullKey, "the dedup key needs a value"));
                }
                Value::Text(text) => self.scratch.text(text).is_empty(),
                Value::Bytes(bytes) => self.scratch.bytes(bytes).is_empty(),
                _ => false,
            };
            if empty {
                let why = "the dedup key needs a value of at least one byte; found an empty one";
                return Err(self.missing(*position, ReasonCode::EmptyKey, why));
            }
        }
        Ok(())
    }

    fn event_time(&self) -> Result<EventTimeMs, Fault> {
        match &self.slots[self.plan.event_time] {
            Value::Long(micros) => Ok(EventTimeMs::from_micros(*micros)),
            _ => Err(self.missing(
                self.plan.event_time,
                ReasonCode::MissingEventTime,
                "the event time needs a value",
            )),
        }
    }

    fn check_required(&self) -> Result<(), Fault> {
        for position in &self.plan.required {
            if matches!(self.slots[*position], Value::Null) {
                return Err(self.missing(*position, ReasonCode::MissingRequired, "the column is required"));
            }
        }
        Ok(())
    }

    fn missing(&self, position: usize, code: ReasonCode, why: &'static str) -> Fault {
        let planned = &self.plan.columns[position];
        let found = if code == ReasonCode::EmptyKey { "" } else { "; found null or nothing" };
        let (name, source) = (verdict::excerpt(&planned.column.name), verdict::excerpt(&planned.source));
        Fault::new(code, format!("column {name} ({source}): {why}{found}"))
    }
}

/// What the payload of a record is.
enum Shape<'a> {
    /// An object, by its first byte; without white space around it.
    Object(&'a str),
    /// An array whose elements are split.
    Array,
}

fn not_an_object(what: &str, text: &str) -> Fault {
    let found = JsonType::of(text);
    let text = format!("{what} is {} {}, expected an object", article(found), found.as_str());
    Fault::new(ReasonCode::NotAnObject, text)
}

fn first_header<'a>(record: &Record<'a>, name: &str) -> Option<&'a [u8]> {
    record.headers().find(|(header, _)| *header == name.as_bytes()).and_then(|(_, value)| value)
}

fn timestamp_value<'a>(timestamp_ms: i64) -> Result<Value<'a>, Refusal> {
    time::in_years(i128::from(timestamp_ms) * 1_000).map(Value::Long)
}

fn outside_found(refusal: Refusal, record: &Record<'_>) -> String {
    match (refusal.code, record.timestamp_ms()) {
        (ReasonCode::OutOfRange, Some(timestamp_ms)) => format!("{timestamp_ms} ms"),
        _ => "other bytes".into(),
    }
}
