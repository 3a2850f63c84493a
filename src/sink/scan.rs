//! Reading a table back in bounded memory: keys for the dedup state, places of dead letters.
//!
//! Bounds: one data file at a time, batches of [`SCAN_ROWS_MAX`] rows; what is held is one row group's chunks of the
//! columns that are read. Delete files of other programs are applied.

use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use iceberg::expr::{Predicate, Reference};
use iceberg::spec::Datum;
use iceberg::table::Table;

use arrow::array::RecordBatch;

use crate::catalog::reason_of;
use crate::stop::Reason;

/// Most rows in a batch of a scan.
pub const SCAN_ROWS_MAX: usize = 16_384;
/// Column that names the batch of a row.
const BATCH_COLUMN: &str = "_tidemill_batch";

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
    let filter = batch_max.map(|batch| {
        let batch = i64::try_from(batch).unwrap_or(i64::MAX);
        Reference::new(BATCH_COLUMN).less_than_or_equal_to(Datum::long(batch))
    });
    scan(table, snapshot_id, columns, filter).await
}

/// Whether the current snapshot has a row of this batch. Reads until the first one.
///
/// # Errors
/// [`ScanError`] when the table can not be read.
pub async fn has_batch(table: &Table, batch: u64) -> Result<bool, ScanError> {
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
    let mut builder = table
        .scan()
        .select(columns)
        .with_batch_size(Some(SCAN_ROWS_MAX))
        .with_concurrency_limit(1)
        .with_row_group_filtering_enabled(true);
    if let Some(snapshot_id) = snapshot_id {
        builder = builder.snapshot_id(snapshot_id);
    }
    if let Some(filter) = filter {
        builder = builder.with_filter(filter);
    }
    let of_table = {
        let table = table.clone();
        move |error| ScanError::of(&table, error)
    };
    let batches = builder.build().map_err(&of_table)?.to_arrow().await.map_err(&of_table)?;
    Ok(batches.map(move |batch| batch.map_err(&of_table)).boxed())
}

#[cfg(test)]
mod tests {
    use arrow::array::AsArray;
    use arrow::datatypes::Int64Type;
    use futures::TryStreamExt;
    use uuid::Uuid;

    use super::*;
    use crate::sink::schema::create_main;
    use crate::sink::testing::{append, catalog, events, job};
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
