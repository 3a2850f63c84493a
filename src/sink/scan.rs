//! Reading a table back in bounded memory: keys for the dedup state, places of dead letters.
//!
//! Bounds: one data file at a time for each reader, batches of [`SCAN_ROWS_MAX`] rows; what a reader holds is one row
//! group's chunks of the columns that are read, and `READ_AHEAD_BATCHES` batches. Delete files of other programs are
//! applied.

use std::collections::BTreeMap;

use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use iceberg::arrow::ScanMetrics;
use iceberg::expr::{Predicate, Reference};
use iceberg::scan::TableScanBuilder;
use iceberg::spec::{Datum, PrimitiveType, Type};
use iceberg::table::Table;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{Int32Type, Int64Type, TimestampMicrosecondType};

use crate::catalog::reason_of;
use crate::event_time::EventTimeMs;
use crate::mutant;
use crate::offset::TopicPartition;
use crate::stop::Reason;

/// Most rows in a batch of a scan.
pub const SCAN_ROWS_MAX: usize = 16_384;
/// Batches that a reader beside the caller is ahead of it.
const READ_AHEAD_BATCHES: usize = 4;
/// Most ranges of a scan's predicate; more are read as one.
const RANGES_MAX: usize = 32;
/// Column that names the batch of a row.
const BATCH_COLUMN: &str = "_tidemill_batch";
/// Column of a late table that marks rows which nothing proves to be new.
const UNPROVEN_COLUMN: &str = "_tidemill_unproven";

/// Why a table could not be read to its end. Rows that came before the error are true.
#[derive(Debug, thiserror::Error)]
#[error("table {table} can not be read")]
pub struct ScanError {
    /// Name of the table.
    pub table: String,
    /// The error below.
    #[source]
    pub source: Box<iceberg::Error>,
}

impl ScanError {
    pub(super) fn of(table: &Table, error: iceberg::Error) -> Self {
        Self { table: table.identifier().to_string(), source: Box::new(error) }
    }

    /// The named reason of a run that ends with this error.
    pub fn reason(&self) -> Reason {
        reason_of(&self.source)
    }
}

/// Batches of the columns asked for, in that order, in no order of rows. Ends after the first error.
pub type Scan = BoxStream<'static, Result<RecordBatch, ScanError>>;

/// Reads columns of one snapshot: all rows, or those of batches up to `batch_max`.
///
/// Gives an empty stream for a table without a snapshot. Columns keep the table's Arrow types.
///
/// # Errors
/// [`ScanError`] when the snapshot or a column does not exist, or a manifest can not be read.
pub async fn scan_keys(
    table: &Table,
    snapshot_id: Option<i64>,
    columns: &[String],
    batch_max: Option<u64>,
) -> Result<Scan, ScanError> {
    if batch_max.is_some() && !names_batches(table, snapshot_id) {
        return Ok(futures::stream::empty().boxed());
    }
    let filter = batch_max.map(|batch| {
        let batch = i64::try_from(batch).unwrap_or(i64::MAX);
        Reference::new(BATCH_COLUMN).less_than_or_equal_to(Datum::long(batch))
    });
    scan(table, snapshot_id, columns, filter).await
}

/// Rows whose time lies in one of some ranges.
#[derive(Debug, Clone)]
pub struct TimeRanges {
    /// A column of type timestamp or timestamptz.
    pub column: String,
    /// Half-open, ascending, apart or touching, at least one. The least and largest value of `i64` are no bounds.
    pub ranges: Vec<(EventTimeMs, EventTimeMs)>,
}

impl TimeRanges {
    fn predicate(&self, table: &Table) -> Predicate {
        let field = table.metadata().current_schema().field_by_name(&self.column);
        let zoned =
            field.is_some_and(|field| *field.field_type == Type::Primitive(PrimitiveType::Timestamptz));
        let datum = |time: EventTimeMs| {
            let micros = time.0.saturating_mul(1_000);
            if zoned { Datum::timestamptz_micros(micros) } else { Datum::timestamp_micros(micros) }
        };
        let in_range = |(from, to): (EventTimeMs, EventTimeMs)| {
            let column = || Reference::new(&self.column);
            let from = (from.0 > i64::MIN).then(|| column().greater_than_or_equal_to(datum(from)));
            let to = (to.0 < i64::MAX).then(|| column().less_than(datum(to)));
            match (from, to) {
                (Some(from), Some(to)) => from.and(to),
                (from, to) => from.or(to).unwrap_or(Predicate::AlwaysTrue),
            }
        };
        self.merged().into_iter().map(in_range).reduce(Predicate::or).unwrap_or(Predicate::AlwaysFalse)
    }

    /// Ranges that touch as one; all as one if they are too many for a predicate.
    fn merged(&self) -> Vec<(EventTimeMs, EventTimeMs)> {
        let mut merged: Vec<(EventTimeMs, EventTimeMs)> = Vec::new();
        for (from, to) in &self.ranges {
            match merged.last_mut() {
                Some(last) if last.1 >= *from => last.1 = last.1.max(*to),
                _ => merged.push((*from, *to)),
            }
        }
        match (merged.first(), merged.last()) {
            (Some(first), Some(last)) if merged.len() > RANGES_MAX => vec![(first.0, last.1)],
            _ => merged,
        }
    }
}

/// Rows of the main table by who wrote them. Rows that name batch 0 or less were written by others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowsOf {
    /// A ledger's batches: those after the first number, up to the second.
    Batches {
        /// The number with which the ledger began to count.
        after: u64,
        /// Its last batch.
        up_to: u64,
    },
    /// Others: rows without a batch, or of batches up to this one.
    Others {
        /// The number with which the ledger began to count.
        batch_max: u64,
    },
}

/// Whether rows that are marked as unproven are left out: they may repeat keys, and theirs do not count as seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// No row is marked: a main table.
    All,
    /// Only those that are proven: a late table.
    Proven,
}

impl RowsOf {
    fn predicate(self) -> Predicate {
        let column = || Reference::new(BATCH_COLUMN);
        let number = |batch: u64| Datum::long(i64::try_from(batch).unwrap_or(i64::MAX));
        match self {
            Self::Batches { after, up_to } => {
                let last = mutant!("rebuild-reads-later-batches", u64::MAX => up_to);
                column().less_than_or_equal_to(number(last)).and(column().greater_than(number(after)))
            }
            Self::Others { batch_max } => {
                column().is_null().or(column().less_than_or_equal_to(number(batch_max)))
            }
        }
    }
}

/// Reads columns of the current snapshot, rows of some writers and some times, with `readers` tasks of the runtime
/// beside the caller, each with data files of its own. Files whose metadata says that they hold no such
/// time are not opened.
///
/// # Errors
/// As [`scan_keys`].
pub async fn scan_keys_beside(
    table: &Table,
    columns: &[String],
    (rows, marked): (RowsOf, Rows),
    times: Option<&TimeRanges>,
    readers: usize,
) -> Result<KeyScan, ScanError> {
    let of_writers = match rows {
        _ if names_batches(table, None) => rows.predicate(),
        RowsOf::Others { .. } => Predicate::AlwaysTrue,
        RowsOf::Batches { .. } => return Ok(KeyScan::empty()),
    };
    let mut filter = match times {
        Some(times) => of_writers.and(times.predicate(table)),
        None => of_writers,
    };
    if marked == Rows::Proven {
        filter = mutant!("unproven-rows-seen", filter => filter
            .and(Reference::new(UNPROVEN_COLUMN).not_equal_to(Datum::bool(true))));
    }
    if table.metadata().current_snapshot().is_none() {
        return Ok(KeyScan::empty());
    }
    let of_table = |error| ScanError::of(table, error);
    let scan = builder(table, columns, Some(filter)).build().map_err(of_table)?;
    let files: Vec<_> = scan.plan_files().await.map_err(of_table)?.try_collect().await.map_err(of_table)?;
    let mut shares: Vec<Vec<_>> = (0..readers.clamp(1, files.len().max(1))).map(|_| Vec::new()).collect();
    for (file_index, file) in files.into_iter().enumerate() {
        let share = file_index % shares.len();
        shares[share].push(Ok(file));
    }
    let mut streams = Vec::with_capacity(shares.len());
    let mut metrics = Vec::with_capacity(shares.len());
    for share in shares {
        let reader = table
            .reader_builder()
            .with_batch_size(SCAN_ROWS_MAX)
            .with_data_file_concurrency_limit(1)
            .with_row_group_filtering_enabled(true)
            .build();
        let read = reader.read(futures::stream::iter(share).boxed()).map_err(of_table)?;
        metrics.push(read.metrics().clone());
        let owned = table.clone();
        let batches = read.stream().map(move |batch| batch.map_err(|error| ScanError::of(&owned, error)));
        streams.push(beside(batches.boxed()));
    }
    Ok(KeyScan { rows: futures::stream::select_all(streams).boxed(), metrics })
}

/// Rows that are being read, and what they cost.
pub struct KeyScan {
    /// The rows.
    pub rows: Scan,
    metrics: Vec<ScanMetrics>,
}

impl KeyScan {
    fn empty() -> Self {
        Self { rows: futures::stream::empty().boxed(), metrics: Vec::new() }
    }

    /// Bytes of data files that were read so far.
    pub fn bytes_read(&self) -> u64 {
        self.metrics.iter().map(ScanMetrics::bytes_read).sum()
    }
}

/// Runs a scan as a task of its own, a few batches ahead. It ends when nobody takes them any more.
///
/// A task that panicked must not look like one that has read all: its panic goes on in the stream.
fn beside(mut batches: Scan) -> Scan {
    let (sender, receiver) = tokio::sync::mpsc::channel(READ_AHEAD_BATCHES);
    let task = tokio::spawn(async move {
        while let Some(batch) = batches.next().await {
            if sender.send(batch).await.is_err() {
                return;
            }
        }
    });
    futures::stream::unfold((receiver, Some(task)), |(mut receiver, mut task)| async move {
        if let Some(batch) = receiver.recv().await {
            return Some((batch, (receiver, task)));
        }
        match task.take()?.await {
            Err(failed) if failed.is_panic() => std::panic::resume_unwind(failed.into_panic()),
            // The runtime is shutting down, and this stream with it.
            Err(cancelled) => panic!("a reader of the table was cancelled: {cancelled}"),
            Ok(()) => None,
        }
    })
    .boxed()
}

/// The largest batch that a row of the current snapshot names; 0 if none does.
///
/// # Errors
/// [`ScanError`] when the table can not be read.
pub async fn batch_max(table: &Table) -> Result<u64, ScanError> {
    if !names_batches(table, None) {
        return Ok(0);
    }
    let mut rows = scan(table, None, &[BATCH_COLUMN.to_owned()], None).await?;
    let mut largest = 0;
    while let Some(batch) = rows.try_next().await? {
        let numbers = batch.column(0).as_primitive_opt::<Int64Type>();
        let found = numbers.and_then(arrow::compute::max).unwrap_or(0);
        largest = largest.max(u64::try_from(found).unwrap_or(0));
    }
    Ok(largest)
}

/// How far the rows of a table that carry a batch reach.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reach {
    /// Rows.
    pub rows: u64,
    /// Rows without a batch: others wrote them.
    pub rows_of_others: u64,
    /// Largest batch.
    pub batch_max: u64,
    /// By topic partition.
    pub places: BTreeMap<TopicPartition, Span>,
}

/// What the rows of one topic partition span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Least offset.
    pub offset_min: i64,
    /// Largest offset.
    pub offset_max: i64,
    /// Largest event time.
    pub event_time_max: EventTimeMs,
}

impl Span {
    fn with(self, other: Self) -> Self {
        Self {
            offset_min: self.offset_min.min(other.offset_min),
            offset_max: self.offset_max.max(other.offset_max),
            event_time_max: self.event_time_max.max(other.event_time_max),
        }
    }
}

impl Reach {
    /// Adds the reach of another table's rows.
    pub fn add(&mut self, other: Self) {
        self.rows += other.rows;
        self.rows_of_others = self.rows_of_others.saturating_add(other.rows_of_others);
        self.batch_max = self.batch_max.max(other.batch_max);
        for (name, span) in other.places {
            self.places.entry(name).and_modify(|known| *known = known.with(span)).or_insert(span);
        }
    }
}

/// Reads how far the rows reach that carry a batch. Rows without one are counted; those without a place or time are passed
/// over.
///
/// # Errors
/// [`ScanError`] when the table can not be read.
pub async fn reach(table: &Table, event_time_column: &str) -> Result<Reach, ScanError> {
    if !names_batches(table, None) {
        return Ok(Reach { rows_of_others: rows_of(table), ..Reach::default() });
    }
    let names = [BATCH_COLUMN, "_kafka_topic", "_kafka_partition", "_kafka_offset", event_time_column];
    let mut rows = scan(table, None, &names.map(str::to_owned), None).await?;
    let mut reach = Reach::default();
    while let Some(batch) = rows.try_next().await? {
        let wrong = |name: &str| {
            let what = format!("column {name} is not of the type that tidemill writes");
            ScanError::of(table, iceberg::Error::new(iceberg::ErrorKind::DataInvalid, what))
        };
        let numbers = batch.column(0).as_primitive_opt::<Int64Type>().ok_or_else(|| wrong(names[0]))?;
        let topics = batch.column(1).as_string_opt::<i32>().ok_or_else(|| wrong(names[1]))?;
        let partitions = batch.column(2).as_primitive_opt::<Int32Type>().ok_or_else(|| wrong(names[2]))?;
        let offsets = batch.column(3).as_primitive_opt::<Int64Type>().ok_or_else(|| wrong(names[3]))?;
        let times =
            batch.column(4).as_primitive_opt::<TimestampMicrosecondType>().ok_or_else(|| wrong(names[4]))?;
        for row in 0..batch.num_rows() {
            if numbers.is_null(row) || numbers.value(row) <= 0 {
                reach.rows_of_others += 1;
                continue;
            }
            if batch.columns().iter().any(|column| column.is_null(row)) {
                continue;
            }
            reach.rows += 1;
            reach.batch_max = reach.batch_max.max(u64::try_from(numbers.value(row)).unwrap_or(0));
            let name = TopicPartition::new(topics.value(row), partitions.value(row));
            let (offset, event_time_max) = (offsets.value(row), EventTimeMs::from_micros(times.value(row)));
            let span = Span { offset_min: offset, offset_max: offset, event_time_max };
            reach.places.entry(name).and_modify(|known| *known = known.with(span)).or_insert(span);
        }
    }
    Ok(reach)
}

/// Whether the current snapshot has a row of this batch. Reads until the first one.
///
/// # Errors
/// [`ScanError`] when the table can not be read.
pub async fn has_batch(table: &Table, batch: u64) -> Result<bool, ScanError> {
    if !names_batches(table, None) {
        return Ok(false);
    }
    let number = Datum::long(i64::try_from(batch).unwrap_or(i64::MAX));
    let filter = Reference::new(BATCH_COLUMN).equal_to(number);
    let mut rows = scan(table, None, &[BATCH_COLUMN.to_owned()], Some(filter)).await?;
    while let Some(found) = rows.try_next().await? {
        if found.num_rows() > 0 {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Rows in a table's current snapshot, as its summary says; a table without that figure counts as having rows.
pub fn rows_of(table: &Table) -> u64 {
    let Some(snapshot) = table.metadata().current_snapshot() else { return 0 };
    let total = snapshot.summary().additional_properties.get("total-records");
    total.and_then(|rows| rows.parse().ok()).unwrap_or(u64::MAX)
}

/// Whether rows of a snapshot, or of the current one, may carry a batch: none do in a table of another tool, to which the
/// column was added after its last snapshot, and a scan knows the columns of its snapshot alone.
fn names_batches(table: &Table, snapshot_id: Option<i64>) -> bool {
    let metadata = table.metadata();
    let snapshot = match snapshot_id {
        Some(id) => metadata.snapshot_by_id(id),
        None => metadata.current_snapshot(),
    };
    let schema = snapshot.and_then(|snapshot| snapshot.schema(metadata).ok());
    let schema = schema.as_ref().unwrap_or_else(|| metadata.current_schema());
    schema.field_by_name(BATCH_COLUMN).is_some()
}

/// Reads columns of one snapshot, or of the current one, where the predicate holds.
pub(super) async fn scan(
    table: &Table,
    snapshot_id: Option<i64>,
    columns: &[String],
    filter: Option<Predicate>,
) -> Result<Scan, ScanError> {
    if snapshot_id.is_none() && table.metadata().current_snapshot().is_none() {
        return Ok(futures::stream::empty().boxed());
    }
    let mut builder = builder(table, columns, filter);
    if let Some(snapshot_id) = snapshot_id {
        builder = builder.snapshot_id(snapshot_id);
    }
    let of_table = {
        let table = table.clone();
        move |error| ScanError::of(&table, error)
    };
    let batches = builder.build().map_err(&of_table)?.to_arrow().await.map_err(&of_table)?;
    Ok(batches.map(move |batch| batch.map_err(&of_table)).boxed())
}

fn builder<'a>(table: &'a Table, columns: &[String], filter: Option<Predicate>) -> TableScanBuilder<'a> {
    let builder = table
        .scan()
        .select(columns)
        .with_batch_size(Some(SCAN_ROWS_MAX))
        .with_concurrency_limit(1)
        .with_row_group_filtering_enabled(true);
    match filter {
        Some(filter) => builder.with_filter(filter),
        None => builder,
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::sink::schema::create_main;
    use crate::sink::testing::{DAY_MICROS, DAY_ZERO_MICROS, append, catalog, events, job};
    use crate::sink::writer::TableWriter;

    async fn offsets(table: &Table, snapshot_id: Option<i64>, batch_max: Option<u64>) -> Vec<i64> {
        let columns = ["event_id", "_kafka_offset"].map(str::to_owned);
        let scan = scan_keys(table, snapshot_id, &columns, batch_max).await.unwrap();
        let batches: Vec<RecordBatch> = scan.try_collect().await.unwrap();
        let mut found = Vec::new();
        for batch in &batches {
            assert!(batch.num_rows() <= SCAN_ROWS_MAX);
            assert_eq!(batch.schema().field(0).name(), "event_id");
            found.extend_from_slice(batch.column(1).as_primitive::<Int64Type>().values());
        }
        found.sort_unstable();
        found
    }

    #[tokio::test]
    async fn keys_are_read_of_one_snapshot_and_up_to_one_batch() {
        let folder = tempfile::tempdir().unwrap();
        let job = job(folder.path());
        let catalog = catalog(&job).await;
        let mut table = create_main(catalog.as_ref(), &job).await.unwrap();
        assert_eq!(offsets(&table, None, None).await, Vec::<i64>::new());
        let mut snapshots = Vec::new();
        for batch in 1..=3_i64 {
            let rows = events(batch * 20_000, 20_000, 2);
            let index = rows.schema().index_of("_tidemill_batch").unwrap();
            let mut columns = rows.columns().to_vec();
            columns[index] =
                std::sync::Arc::new(arrow::array::Int64Array::from(vec![batch; rows.num_rows()]));
            let rows = RecordBatch::try_new(rows.schema(), columns).unwrap();
            let mut writer = TableWriter::new(&table, Uuid::now_v7(), 64 << 20, &[]).unwrap();
            writer.write(&rows).await.unwrap();
            table = append(catalog.as_ref(), &table, writer.finish().await.unwrap()).await;
            snapshots.push(table.metadata().current_snapshot_id());
        }
        assert_eq!(offsets(&table, None, None).await, (20_000..80_000).collect::<Vec<_>>());
        assert_eq!(offsets(&table, None, Some(2)).await, (20_000..60_000).collect::<Vec<_>>());
        assert_eq!(offsets(&table, snapshots[0], None).await, (20_000..40_000).collect::<Vec<_>>());
        assert_eq!(offsets(&table, None, Some(0)).await, Vec::<i64>::new());
    }

    #[tokio::test]
    async fn keys_of_some_times_are_read_by_several_readers() {
        let folder = tempfile::tempdir().unwrap();
        let job = job(folder.path());
        let catalog = catalog(&job).await;
        let mut table = create_main(catalog.as_ref(), &job).await.unwrap();
        for file in 0..3 {
            let mut writer = TableWriter::new(&table, Uuid::now_v7(), 64 << 20, &[]).unwrap();
            writer.write(&events(file * 4_000, 4_000, 4)).await.unwrap();
            table = append(catalog.as_ref(), &table, writer.finish().await.unwrap()).await;
        }
        let day = |days: i64| EventTimeMs::from_micros(DAY_ZERO_MICROS + days * DAY_MICROS);
        let ranges = vec![(day(1), day(2)), (day(3), EventTimeMs(i64::MAX))];
        let times = TimeRanges { column: "event_time".to_owned(), ranges };
        let columns = ["event_time", "_kafka_offset"].map(str::to_owned);
        let ours = RowsOf::Batches { after: 0, up_to: 1 };
        for readers in [1, 2, 9] {
            let scan = scan_keys_beside(&table, &columns, (ours, Rows::All), Some(&times), readers);
            let scan = scan.await.unwrap().rows;
            let batches: Vec<RecordBatch> = scan.try_collect().await.unwrap();
            let offsets =
                batches.iter().flat_map(|batch| batch.column(1).as_primitive::<Int64Type>().values());
            let mut found: Vec<i64> = offsets.copied().collect();
            found.sort_unstable();
            assert_eq!(found, (0..12_000).filter(|number| number % 2 == 1).collect::<Vec<_>>());
        }
        for none in [
            RowsOf::Batches { after: 0, up_to: 0 },
            RowsOf::Batches { after: 1, up_to: 2 },
            RowsOf::Others { batch_max: 0 },
        ] {
            let none = scan_keys_beside(&table, &columns, (none, Rows::All), None, 2).await.unwrap().rows;
            assert!(none.try_collect::<Vec<_>>().await.unwrap().iter().all(|batch| batch.num_rows() == 0));
        }
    }

    #[test]
    fn ranges_that_touch_are_read_as_one_and_too_many_as_their_span() {
        let time = |ms: i64| (EventTimeMs(ms * 10), EventTimeMs(ms * 10 + 10));
        let ranges = |times: Vec<i64>| TimeRanges {
            column: "t".to_owned(),
            ranges: times.into_iter().map(time).collect(),
        };
        assert_eq!(ranges(vec![1, 2, 5]).merged(), [(EventTimeMs(10), EventTimeMs(30)), time(5)]);
        let many = ranges((0..=RANGES_MAX as i64).map(|step| step * 2).collect());
        assert_eq!(many.merged(), [(EventTimeMs(0), EventTimeMs(RANGES_MAX as i64 * 20 + 10))]);
    }

    #[tokio::test]
    #[should_panic(expected = "a page that no reader survives")]
    async fn a_reader_that_panics_does_not_look_like_the_end_of_the_table() {
        let failing = futures::stream::once(async { panic!("a page that no reader survives") });
        let scan = beside(failing.boxed());
        let _: Vec<RecordBatch> = scan.try_collect().await.unwrap();
    }

    #[tokio::test]
    async fn a_column_or_snapshot_that_is_not_there_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let job = job(folder.path());
        let catalog = catalog(&job).await;
        let table = create_main(catalog.as_ref(), &job).await.unwrap();
        let columns = ["event_id".to_owned()];
        assert!(scan_keys(&table, Some(42), &columns, None).await.is_err());
        let mut writer = TableWriter::new(&table, Uuid::now_v7(), 64 << 20, &[]).unwrap();
        writer.write(&events(0, 1, 1)).await.unwrap();
        let table = append(catalog.as_ref(), &table, writer.finish().await.unwrap()).await;
        assert!(scan_keys(&table, None, &["nowhere".to_owned()], None).await.is_err());
    }
}
