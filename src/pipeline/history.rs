//! What the tables themselves say happened: counts of committed microbatches, rows by value of a column.

use std::collections::BTreeMap;

use futures::TryStreamExt;

use super::stops;
use crate::catalog;
use crate::commit::ledger;
use crate::counts::Counts;
use crate::job::file::LoadedJob;
use crate::sink::{scan, schema};
use crate::stop::{Reason, Stop};

/// Committed microbatches that the main table still names.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// Number of the last one.
    pub batch: u64,
    /// Outcomes by number.
    pub counts: BTreeMap<u64, Counts>,
    /// Metadata file of the table.
    pub metadata_location: String,
}

impl History {
    /// Outcomes of all microbatches after `batch`.
    pub fn counts_since(&self, batch: u64) -> Counts {
        let mut sum = Counts::default();
        for counts in self.counts.range(batch + 1..).map(|(_, counts)| counts) {
            sum.add(counts);
        }
        sum
    }
}

async fn load(loaded: &LoadedJob) -> Result<Option<iceberg::table::Table>, Stop> {
    let sink = &loaded.job.sink;
    let catalog = catalog::connect(&sink.catalog).await.map_err(stops::catalog)?;
    let ident = schema::table_ident(&sink.table).map_err(stops::schema)?;
    catalog::load(&*catalog, &ident).await.map_err(stops::catalog)
}

/// Reads the summaries of the main table's snapshots; `None` if there is no table.
///
/// # Errors
/// The catalog is away, or the ledger can not be read.
pub async fn read(loaded: &LoadedJob) -> Result<Option<History>, Stop> {
    let Some(table) = load(loaded).await? else { return Ok(None) };
    let counts = ledger::counts_on_ancestry(table.metadata())
        .map_err(|error| stops::ledger(table.identifier(), error))?;
    let batch = counts.keys().next_back().copied().unwrap_or(0);
    let metadata_location = table.metadata_location().unwrap_or_default().to_owned();
    Ok(Some(History { batch, counts, metadata_location }))
}

/// Rows of the main table by value of a text column.
///
/// # Errors
/// The table can not be read.
pub async fn count_by(loaded: &LoadedJob, column: &str) -> Result<BTreeMap<String, u64>, Stop> {
    use arrow::array::AsArray;
    let Some(table) = load(loaded).await? else { return Ok(BTreeMap::new()) };
    let failed = |error: scan::ScanError| {
        stops::data(format!("table {} can not be read", table.identifier()), error.reason(), error)
    };
    let mut rows = scan::scan_keys(&table, None, &[column.to_owned()], None).await.map_err(failed)?;
    let mut counts = BTreeMap::new();
    while let Some(batch) = rows.try_next().await.map_err(failed)? {
        let values = batch.column(0).as_string_opt::<i32>().ok_or_else(|| {
            Stop::new(Reason::Usage, format!("column {column} is not text"), "name a text column")
        })?;
        for value in values.iter().flatten() {
            match counts.get_mut(value) {
                Some(count) => *count += 1,
                None => {
                    counts.insert(value.to_owned(), 1);
                }
            }
        }
    }
    Ok(counts)
}
