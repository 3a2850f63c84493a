//! Data files of one batch for one table.
//!
//! Flow: Arrow batch -> columns matched to the table by name -> split by table partition -> one open Parquet file
//! per table partition -> [`TableWriter::finish`] -> data files for the commit
//!
//! Invariants
//! 1. Schema and partition spec are those of the table at [`TableWriter::new`]; the commit asserts the same ids.
//! 2. No file name is ever used twice: names carry the attempt and a number drawn for the writer.
//! 3. Every row written stands in exactly one of the files that `finish` gives back (asserted).
//! 4. Files are durable before `finish` returns: closed and synced, and in a local warehouse the folders too.
//!    A crash before leaves files that no snapshot names.
//! 5. A value never becomes a part of a path as it is: partition values are escaped and cut.
//!
//! Bounds: the share `memory_bytes` is split in eight. A row group grows to one eighth at most; one eighth each is
//! kept for the copy that is made when a row group is closed and for the storage client; the rest is what open
//! files may hold. Beyond that the fullest file is finished early and its table partition goes on in a new file; beyond
//! [`OPEN_FILES_MAX`] a file whose table partition the last batches did not have is finished, for as a rule no more of
//! it comes. Where all still come, or the fullest is small, there are too many for files side by side: their rows wait
//! on local disk ([`TableWriter::waiting_in`]) and are written in turn at the end. A share below about 4 MiB is exceeded
//! by the smallest possible file.

mod layout;
mod stored;
mod waiting;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, UInt32Array, new_null_array};
use arrow::compute::{CastOptions, cast_with_options, take_record_batch};
use arrow::datatypes::{DataType, Field, Schema as ArrowSchema, SchemaRef as ArrowSchemaRef};
use arrow::row::{RowConverter, SortField};
use futures::{StreamExt, TryStreamExt};
use iceberg::arrow::{PartitionValueCalculator, arrow_struct_to_literal, schema_to_arrow_schema};
use iceberg::io::FileIO;
use iceberg::spec::{DataFile, DataFileFormat, Literal, PartitionKey, PartitionSpecRef, SchemaRef, Struct};
use iceberg::table::Table;
use iceberg::writer::base_writer::data_file_writer::{DataFileWriter, DataFileWriterBuilder};
use iceberg::writer::file_writer::ParquetWriterBuilder;
use iceberg::writer::file_writer::location_generator::{
    DefaultFileNameGenerator, DefaultLocationGenerator, LocationGenerator,
};
use iceberg::writer::file_writer::rolling_writer::RollingFileWriterBuilder;
use iceberg::writer::{CurrentFileStatus, IcebergWriter, IcebergWriterBuilder};
use uuid::Uuid;

use crate::catalog::reason_of;
use crate::mutant;
use crate::sink::durable::{FolderSyncError, sync_folders};
use crate::stop::Reason;

use waiting::{Waiting, WaitingPartition};

pub use layout::{FileLayout, LayoutError};
pub use stored::{LostFile, StoredFilesError, files_exist, files_from_json, files_to_json};

/// Most Parquet files open at once.
pub const OPEN_FILES_MAX: usize = 64;
/// Most files that are closed, and so synced, at the same time.
pub const FILES_CLOSING_MAX: usize = 4;
/// A file whose table partition stood in none of so many batches is finished when its place is needed.
const IDLE_BATCHES_MAX: u64 = 2;
/// Longest partition value inside a path, in bytes after escaping; file systems take 255 for a whole name.
const PATH_VALUE_BYTES_MAX: usize = 150;

/// Why rows could not be written. Nothing that was written counts: call [`TableWriter::abort`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The storage refused a write, a sync or a delete. The batch can be written again under another attempt.
    #[error("data files of table {table} can not be written")]
    Storage {
        /// Name of the table.
        table: String,
        /// The error below.
        source: Box<iceberg::Error>,
    },
    /// A folder of a local warehouse can not be synced.
    #[error("data files of table {table} are not durable")]
    FolderSync {
        /// Name of the table.
        table: String,
        /// The folder.
        source: FolderSyncError,
    },
    /// A table property does not say how to write a file.
    #[error("table {table}: {source}")]
    Layout {
        /// Name of the table.
        table: String,
        /// The property.
        source: LayoutError,
    },
    /// The batch does not fit the table's columns.
    #[error("rows do not fit table {table}: {what}")]
    Columns {
        /// Name of the table.
        table: String,
        /// The column and both sides.
        what: String,
    },
    /// Rows can not be laid aside in the state folder, or do not come back.
    #[error("rows of table {table} can not wait on local disk")]
    Waiting {
        /// Name of the table.
        table: String,
        /// The error below.
        source: arrow::error::ArrowError,
    },
    /// Arrow failed on a batch that fits.
    #[error("rows of table {table} can not be split or cast")]
    Arrow {
        /// Name of the table.
        table: String,
        /// The error below.
        source: arrow::error::ArrowError,
    },
}

impl WriteError {
    /// The named reason of a run that ends with this error.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Storage { source, .. } => reason_of(source),
            Self::FolderSync { .. } | Self::Waiting { .. } => Reason::StorageFailed,
            Self::Layout { .. } => Reason::Usage,
            Self::Columns { .. } | Self::Arrow { .. } => Reason::Unexpected,
        }
    }
}

type FileWriter = DataFileWriter<ParquetWriterBuilder, TableLocations, DefaultFileNameGenerator>;
type FileWriterBuilder =
    DataFileWriterBuilder<ParquetWriterBuilder, TableLocations, DefaultFileNameGenerator>;

/// Writes rows of one batch and one table into Parquet files.
pub struct TableWriter {
    table: String,
    file_io: FileIO,
    schema: SchemaRef,
    spec: PartitionSpecRef,
    columns: Columns,
    partitioner: Option<Partitioner>,
    layout: FileLayout,
    builder: FileWriterBuilder,
    locations: TableLocations,
    open: HashMap<PartitionBytes, OpenFile>,
    /// `None` = all table partitions have files side by side, however small.
    waiting: Option<Waiting>,
    finished: Vec<DataFile>,
    batches_written: u64,
    rows_written: u64,
}

/// Partition values of a row in Arrow's row format: equal bytes = same table partition.
type PartitionBytes = Box<[u8]>;

struct OpenFile {
    writer: FileWriter,
    values: Struct,
    /// Number of the last batch that had rows for it.
    last_batch: u64,
    /// Encoded bytes so far, those already handed to the storage included.
    written_bytes: usize,
}

/// The rows of a batch that belong to one table partition, by their numbers, ascending.
struct PartitionRows {
    key: PartitionBytes,
    values: Struct,
    rows: Vec<u32>,
}

impl TableWriter {
    /// A writer for the table as it was loaded.
    ///
    /// `attempt` names the attempt to commit. `memory_bytes` is the share of the job's memory. `key_columns` are
    /// the dedup key: almost every value is new, so they get no dictionary.
    ///
    /// # Errors
    /// [`WriteError::Layout`] names the table property that can not be followed.
    pub fn new(
        table: &Table,
        attempt: Uuid,
        memory_bytes: u64,
        key_columns: &[String],
    ) -> Result<Self, WriteError> {
        let name = table.identifier().to_string();
        let of_storage = |error| WriteError::Storage { table: name.clone(), source: Box::new(error) };
        let metadata = table.metadata();
        let schema = metadata.current_schema().clone();
        let spec = metadata.default_partition_spec().clone();
        let layout = FileLayout::of(metadata.properties(), &schema, memory_bytes, key_columns)
            .map_err(|source| WriteError::Layout { table: name.clone(), source })?;
        let partitioner = Partitioner::of(&schema, &spec).map_err(of_storage)?;
        let columns = Columns::of(&schema, &spec).map_err(of_storage)?;
        let locations = TableLocations::of(table).map_err(of_storage)?;
        let writer_number = &Uuid::new_v4().simple().to_string()[..8];
        let rolling = RollingFileWriterBuilder::new(
            ParquetWriterBuilder::new(layout.writer_properties().clone(), schema.clone()),
            layout.file_bytes_target(),
            table.file_io().clone(),
            locations.clone(),
            DefaultFileNameGenerator::new(
                format!("{attempt}-{writer_number}"),
                None,
                DataFileFormat::Parquet,
            ),
        );
        Ok(Self {
            table: name.clone(),
            file_io: table.file_io().clone(),
            schema,
            spec,
            columns,
            partitioner,
            layout,
            builder: DataFileWriterBuilder::new(rolling),
            locations,
            open: HashMap::new(),
            waiting: None,
            finished: Vec::new(),
            batches_written: 0,
            rows_written: 0,
        })
    }

    /// Lets rows wait on local disk where they are of too many table partitions to have a file open for each. `folder`
    /// exists; what lies there has no name and is gone with the process.
    #[must_use]
    pub fn waiting_in(mut self, folder: &Path) -> Self {
        self.waiting = Some(Waiting::new(folder));
        self
    }

    /// Id of the schema that the files are written with.
    pub fn schema_id(&self) -> i32 {
        self.schema.schema_id()
    }

    /// Id of the partition spec that the files are written with.
    pub fn spec_id(&self) -> i32 {
        self.spec.spec_id()
    }

    /// Rows taken so far.
    pub fn rows_written(&self) -> u64 {
        self.rows_written
    }

    /// Takes rows. Columns are matched by name in any order; an optional column that is missing becomes null.
    ///
    /// Copies rows only where a batch holds several table partitions that are not each in one piece, a quarter of a row group
    /// at a time.
    ///
    /// # Errors
    /// [`WriteError::Columns`] when a column is missing, unknown or of another type; others as they say. After an
    /// error the writer can only be aborted.
    pub async fn write(&mut self, batch: &RecordBatch) -> Result<(), WriteError> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        let batch = self.columns.conform(batch).map_err(|misfit| misfit.in_table(&self.table))?;
        let rows_per_piece = self.layout.rows_per_piece(&batch);
        self.batches_written += 1;
        for part in self.split(&batch)? {
            for piece in part.rows.chunks(rows_per_piece) {
                let rows = rows_at(&batch, piece).map_err(|misfit| misfit.in_table(&self.table))?;
                self.write_piece(&part.key, &part.values, rows).await?;
            }
        }
        Ok(())
    }

    fn split(&mut self, batch: &RecordBatch) -> Result<Vec<PartitionRows>, WriteError> {
        match &mut self.partitioner {
            None => {
                let rows = row_numbers(batch).collect();
                Ok(vec![PartitionRows { key: Box::default(), values: Struct::empty(), rows }])
            }
            Some(partitioner) => partitioner.split(batch).map_err(|misfit| misfit.in_table(&self.table)),
        }
    }

    async fn write_piece(
        &mut self,
        key: &PartitionBytes,
        values: &Struct,
        rows: RecordBatch,
    ) -> Result<(), WriteError> {
        let count = rows.num_rows() as u64;
        if !self.open.contains_key(key) && !self.make_room(key, values).await? {
            let waiting = self.waiting.as_mut().expect("only what can wait has no room");
            waiting.push(key, &rows).map_err(|source| not_laid_aside(&self.table, source))?;
            self.rows_written += count;
            return Ok(());
        }
        if !self.open.contains_key(key) {
            let writer = self.open_file(values).await?;
            let file = OpenFile { writer, values: values.clone(), last_batch: 0, written_bytes: 0 };
            self.open.insert(key.clone(), file);
        }
        let file = self.open.get_mut(key).expect("the file was opened above");
        let outcome = file.writer.write(rows).await;
        if outcome.is_ok() {
            file.written_bytes = file.writer.current_written_size();
            file.last_batch = self.batches_written;
        }
        outcome.map_err(|error| self.of_storage(error))?;
        self.rows_written += count;
        crate::crash_point!("data_rows_taken");
        while self.open.len() > 1 && self.held_bytes() > self.layout.open_bytes_max() {
            self.finish_fullest().await?;
        }
        Ok(())
    }

    /// Whether a file may be opened for this table partition; if not, its rows wait.
    async fn make_room(&mut self, key: &PartitionBytes, values: &Struct) -> Result<bool, WriteError> {
        if self.waiting.as_ref().is_some_and(|waiting| waiting.contains(key)) {
            return Ok(false);
        }
        while self.open.len() >= OPEN_FILES_MAX {
            if self.finish_idle().await? {
                continue;
            }
            match &mut self.waiting {
                Some(waiting) => {
                    waiting.begin(key, values);
                    return Ok(false);
                }
                None => self.finish_fullest().await?,
            }
        }
        Ok(true)
    }

    async fn open_file(&self, values: &Struct) -> Result<FileWriter, WriteError> {
        let partition = PartitionKey::new(self.spec.as_ref().clone(), self.schema.clone(), values.clone());
        crate::crash_point!("data_file_begins");
        let file = self.builder.build(Some(partition)).await.map_err(|error| self.of_storage(error))?;
        crate::crash_point!("data_file_open");
        Ok(file)
    }

    /// Upper bound of what the open files hold in memory.
    fn held_bytes(&self) -> usize {
        self.open.values().map(|file| self.layout.held_bytes(file.written_bytes)).sum()
    }

    /// Finishes the open file with most bytes: it frees most, and leaves the fewest small files behind. If even that one
    /// is small, the rest of its table partition waits.
    async fn finish_fullest(&mut self) -> Result<(), WriteError> {
        let fullest = self.open.iter().max_by_key(|(_, file)| file.written_bytes).map(|(key, _)| key.clone());
        let Some((key, file)) = fullest.and_then(|key| self.open.remove_entry(&key)) else { return Ok(()) };
        if let Some(waiting) = &mut self.waiting
            && file.written_bytes < self.layout.small_file_bytes()
        {
            waiting.begin(&key, &file.values);
        }
        self.close(file).await
    }

    /// Finishes the file that was written to longest ago, unless its table partition may still come.
    async fn finish_idle(&mut self) -> Result<bool, WriteError> {
        let idle = self.open.iter().min_by_key(|(_, file)| file.last_batch);
        let Some((key, file)) = idle else { return Ok(false) };
        if file.last_batch + IDLE_BATCHES_MAX >= self.batches_written {
            return Ok(false);
        }
        let key = key.clone();
        let file = self.open.remove(&key).expect("it was found above");
        self.close(file).await?;
        Ok(true)
    }

    async fn close(&mut self, mut file: OpenFile) -> Result<(), WriteError> {
        let files = file.writer.close().await.map_err(|error| self.of_storage(error))?;
        crate::crash_point!("data_file_closed_early");
        self.finished.extend(files);
        Ok(())
    }

    /// A file of a table partition whose rows waited.
    async fn write_waiting(
        &self,
        waiting: &Waiting,
        partition: WaitingPartition,
    ) -> Result<Vec<DataFile>, WriteError> {
        let mut writer = self.open_file(&partition.values).await?;
        for piece in partition.pieces {
            let rows = waiting.read(piece).map_err(|source| not_laid_aside(&self.table, source))?;
            writer.write(rows).await.map_err(|error| self.of_storage(error))?;
        }
        writer.close().await.map_err(|error| self.of_storage(error))
    }

    /// Closes and syncs all files and gives them back, none for a writer that took no row. The order means nothing.
    /// After it the writer takes no more rows; it can still be aborted.
    ///
    /// # Errors
    /// [`WriteError::Storage`] or [`WriteError::FolderSync`]: the files must not be committed.
    pub async fn finish(&mut self) -> Result<Vec<DataFile>, WriteError> {
        let open: Vec<OpenFile> = self.open.drain().map(|(_, file)| file).collect();
        let closing = futures::stream::iter(open)
            .map(|mut file| async move {
                let closed = file.writer.close().await;
                crate::crash_point!("data_file_closed");
                closed
            })
            .buffer_unordered(FILES_CLOSING_MAX);
        let closed: Vec<Vec<DataFile>> =
            closing.try_collect().await.map_err(|error| self.of_storage(error))?;
        let mut files = std::mem::take(&mut self.finished);
        files.extend(closed.into_iter().flatten());
        if let Some(mut waiting) = self.waiting.take() {
            let partitions = waiting.take();
            let writing = futures::stream::iter(partitions)
                .map(|partition| self.write_waiting(&waiting, partition))
                .buffer_unordered(FILES_CLOSING_MAX);
            files.extend(writing.try_collect::<Vec<_>>().await?.into_iter().flatten());
        }
        let rows: u64 = files.iter().map(DataFile::record_count).sum();
        assert_eq!(rows, self.rows_written, "every row written stands in exactly one data file");
        crate::crash_point!("data_folders_to_sync");
        let paths: Vec<&str> = files.iter().map(DataFile::file_path).collect();
        let top = self.locations.folder();
        let synced = mutant!("skip-data-folder-sync", Ok(()) => sync_folders(&paths, &top).await);
        synced.map_err(|source| WriteError::FolderSync { table: self.table.clone(), source })?;
        crate::crash_point!("data_folders_synced");
        Ok(files)
    }

    /// Gives up: deletes every file this writer began, finished or not. Call it only while no commit that names them
    /// was sent. On S3 the parts of a file that was still open stay until the bucket's rule for them.
    ///
    /// # Errors
    /// [`WriteError::Storage`] when a file stays behind, after all others were tried; no snapshot names it.
    pub async fn abort(mut self) -> Result<(), WriteError> {
        self.open.clear();
        let mut outcome = Ok(());
        for location in self.locations.given() {
            if let Err(error) = self.file_io.delete(&location).await {
                outcome = outcome.and(Err(self.of_storage(error)));
            }
            crate::crash_point!("data_file_given_up");
        }
        outcome
    }

    fn of_storage(&self, error: iceberg::Error) -> WriteError {
        WriteError::Storage { table: self.table.clone(), source: Box::new(error) }
    }
}

fn not_laid_aside(table: &str, source: arrow::error::ArrowError) -> WriteError {
    WriteError::Waiting { table: table.to_owned(), source }
}

/// Why a batch does not fit, before the name of the table is added.
enum Misfit {
    Columns(String),
    Arrow(arrow::error::ArrowError),
    Iceberg(iceberg::Error),
}

impl Misfit {
    fn in_table(self, table: &str) -> WriteError {
        let table = table.to_owned();
        match self {
            Self::Columns(what) => WriteError::Columns { table, what },
            Self::Arrow(source) => WriteError::Arrow { table, source },
            Self::Iceberg(error) => WriteError::Storage { table, source: Box::new(error) },
        }
    }
}

impl From<arrow::error::ArrowError> for Misfit {
    fn from(error: arrow::error::ArrowError) -> Self {
        Self::Arrow(error)
    }
}

impl From<iceberg::Error> for Misfit {
    fn from(error: iceberg::Error) -> Self {
        Self::Iceberg(error)
    }
}

/// The table's columns in Arrow, with the Iceberg field ids that the Parquet writer needs.
struct Columns {
    arrow: ArrowSchemaRef,
    /// Columns that partition values come from: the transforms take the exact type only.
    partition_sources: Vec<bool>,
}

impl Columns {
    fn of(schema: &SchemaRef, spec: &PartitionSpecRef) -> Result<Self, iceberg::Error> {
        let is_source = |id: i32| spec.fields().iter().any(|field| field.source_id == id);
        let partition_sources = schema.as_struct().fields().iter().map(|field| is_source(field.id)).collect();
        Ok(Self { arrow: Arc::new(schema_to_arrow_schema(schema)?), partition_sources })
    }

    /// The batch in the table's order and types.
    fn conform(&self, batch: &RecordBatch) -> Result<RecordBatch, Misfit> {
        let given = batch.schema();
        for field in given.fields() {
            if self.arrow.column_with_name(field.name()).is_none() {
                return Err(Misfit::Columns(format!("the table has no column {}", field.name())));
            }
        }
        let mut fields = Vec::with_capacity(self.arrow.fields().len());
        let mut arrays = Vec::with_capacity(self.arrow.fields().len());
        for (field, is_source) in self.arrow.fields().iter().zip(&self.partition_sources) {
            let array = match batch.column_by_name(field.name()) {
                Some(array) => adapt(array, field, *is_source)?,
                None => new_null_array(field.data_type(), batch.num_rows()),
            };
            if !field.is_nullable() && array.null_count() > 0 {
                return Err(Misfit::Columns(format!(
                    "required column {} has no value in a row",
                    field.name()
                )));
            }
            fields.push(field.as_ref().clone().with_data_type(array.data_type().clone()));
            arrays.push(array);
        }
        Ok(RecordBatch::try_new(Arc::new(ArrowSchema::new(fields)), arrays)?)
    }
}

/// The array in a type that is written as the column's. Never changes a value: text is not parsed, numbers are not
/// narrowed.
fn adapt(array: &ArrayRef, field: &Field, is_partition_source: bool) -> Result<ArrayRef, Misfit> {
    let (found, wanted) = (array.data_type(), field.data_type());
    if found == wanted || (!is_partition_source && same_bytes(found, wanted)) {
        return Ok(array.clone());
    }
    if !same_bytes(found, wanted) && !same_instant(found, wanted) {
        return Err(Misfit::Columns(format!("column {} takes {wanted} and was given {found}", field.name())));
    }
    Ok(cast_with_options(array, wanted, &CastOptions { safe: false, ..CastOptions::default() })?)
}

/// Whether both are text, or both bytes: the Parquet writer takes each as the other.
fn same_bytes(found: &DataType, wanted: &DataType) -> bool {
    let value = match found {
        DataType::Dictionary(_, value) => value.as_ref(),
        other => other,
    };
    let is_text = |of: &DataType| matches!(of, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View);
    let is_binary =
        |of: &DataType| matches!(of, DataType::Binary | DataType::LargeBinary | DataType::BinaryView);
    (is_text(value) && is_text(wanted)) || (is_binary(value) && is_binary(wanted))
}

/// Whether both are instants in the same unit: UTC has more than one name in Arrow.
fn same_instant(found: &DataType, wanted: &DataType) -> bool {
    let is_utc = |zone: &str| matches!(zone, "UTC" | "+00:00" | "Z" | "Etc/UTC");
    match (found, wanted) {
        (DataType::Timestamp(unit, Some(zone)), DataType::Timestamp(wanted_unit, Some(_))) => {
            unit == wanted_unit && is_utc(zone)
        }
        _ => false,
    }
}

/// Splits rows by the values of the partition spec.
struct Partitioner {
    calculator: PartitionValueCalculator,
    converter: RowConverter,
}

impl Partitioner {
    fn of(schema: &SchemaRef, spec: &PartitionSpecRef) -> Result<Option<Self>, iceberg::Error> {
        if spec.is_unpartitioned() {
            return Ok(None);
        }
        let calculator = PartitionValueCalculator::try_new(spec, schema)?;
        let DataType::Struct(fields) = calculator.partition_arrow_type() else {
            unreachable!("partition values are a struct");
        };
        let sort_fields = fields.iter().map(|field| SortField::new(field.data_type().clone())).collect();
        let converter = RowConverter::new(sort_fields).map_err(|error| {
            let message = "partition values can not be compared";
            iceberg::Error::new(iceberg::ErrorKind::FeatureUnsupported, message).with_source(error)
        })?;
        Ok(Some(Self { calculator, converter }))
    }

    /// Rows by table partition, in order of first appearance.
    fn split(&mut self, batch: &RecordBatch) -> Result<Vec<PartitionRows>, Misfit> {
        let values = self.calculator.calculate(batch)?;
        let rows = self.converter.convert_columns(values.as_struct().columns())?;
        let first = rows.row(0);
        if rows.iter().all(|row| row == first) {
            let (key, values) = (first.as_ref().into(), self.values_at(&values, 0)?);
            return Ok(vec![PartitionRows { key, values, rows: row_numbers(batch).collect() }]);
        }
        let mut group_of: HashMap<&[u8], usize> = HashMap::new();
        let mut groups: Vec<Vec<u32>> = Vec::new();
        for (row, number) in rows.iter().zip(row_numbers(batch)) {
            let group = *group_of.entry(row.data()).or_insert_with(|| {
                groups.push(Vec::new());
                groups.len() - 1
            });
            groups[group].push(number);
        }
        let part = |group: Vec<u32>| {
            let first = group[0] as usize;
            let (key, values) = (rows.row(first).as_ref().into(), self.values_at(&values, first)?);
            Ok(PartitionRows { key, values, rows: group })
        };
        groups.into_iter().map(part).collect()
    }

    fn values_at(&self, values: &ArrayRef, index: usize) -> Result<Struct, Misfit> {
        let literals = arrow_struct_to_literal(&values.slice(index, 1), self.calculator.partition_type())?;
        match literals.into_iter().next() {
            Some(Some(Literal::Struct(values))) => Ok(values),
            _ => Err(Misfit::Columns(format!("row {index} has no partition values"))),
        }
    }
}

fn row_numbers(batch: &RecordBatch) -> std::ops::Range<u32> {
    0..u32::try_from(batch.num_rows()).expect("a batch has fewer than 2^32 rows")
}

/// These rows of the batch, at least one, ascending: a view where they stand in one piece, else a copy.
fn rows_at(batch: &RecordBatch, numbers: &[u32]) -> Result<RecordBatch, Misfit> {
    let (first, last) = (numbers[0] as usize, numbers[numbers.len() - 1] as usize);
    if last - first + 1 == numbers.len() {
        return Ok(batch.slice(first, numbers.len()));
    }
    Ok(take_record_batch(batch, &UInt32Array::from(numbers.to_vec()))?)
}

/// Where the files of a table go: `write.data.path` or `<table>/data`, then `field=value` per partition field.
///
/// The crate's generator puts partition values into the path as they are; here they are escaped. It also
/// remembers every location it gave, so that an abort can delete files that were begun.
#[derive(Clone)]
struct TableLocations {
    base: DefaultLocationGenerator,
    given: Arc<Mutex<Vec<String>>>,
}

impl TableLocations {
    fn of(table: &Table) -> Result<Self, iceberg::Error> {
        Ok(Self { base: DefaultLocationGenerator::new(table.metadata())?, given: Arc::default() })
    }

    /// The folder above all data files, without a slash at its end.
    fn folder(&self) -> String {
        self.base.generate_location(None, "").trim_end_matches('/').to_owned()
    }

    fn given(&self) -> Vec<String> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl LocationGenerator for TableLocations {
    fn generate_location(&self, partition_key: Option<&PartitionKey>, file_name: &str) -> String {
        let location = match partition_key.map(partition_path) {
            Some(path) if !path.is_empty() => format!("{}/{path}/{file_name}", self.folder()),
            _ => format!("{}/{file_name}", self.folder()),
        };
        self.given.lock().unwrap_or_else(PoisonError::into_inner).push(location.clone());
        location
    }
}

/// `event_time_day=2026-01-31/channel=e-mail`, safe as a path whatever the values are.
fn partition_path(key: &PartitionKey) -> String {
    let Ok(partition_type) = key.spec().partition_type(key.schema()) else {
        return String::new();
    };
    let parts = key.spec().fields().iter().zip(partition_type.fields()).zip(key.data().iter());
    let named = parts.map(|((field, typed), value)| {
        let text = field.transform.to_human_string(&typed.field_type, value);
        format!("{}={}", path_part(&field.name), path_part(&text))
    });
    named.collect::<Vec<_>>().join("/")
}

/// Percent-encodes all but letters, digits, `-`, `_` and `.`; a long text is cut and told apart by its hash.
fn path_part(text: &str) -> String {
    let mut part = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => part.push(char::from(byte)),
            _ => part.push_str(&format!("%{byte:02X}")),
        }
    }
    if part.len() > PATH_VALUE_BYTES_MAX {
        part.truncate(PATH_VALUE_BYTES_MAX);
        part.push_str(&format!("-{:016x}", xxhash_rust::xxh3::xxh3_64(text.as_bytes())));
    }
    part
}

#[cfg(test)]
mod tests;
