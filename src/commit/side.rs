//! Side tables follow main (R10): each receives the files that main's record names, once, by its own compare-and-swap.
//!
//! Flow: main's record of microbatch n -> [`bring_forward`] -> side snapshot with a mark (epoch, batch n)
//!
//! Invariants
//! 1. A side table takes the files of n only if its mark says less than n; its mark then says n. So files land once.
//! 2. A mark above main's batch, or at the same number with another generation, means that main was rolled back;
//!    nothing is written.
//! 3. A table is claimed by its first owner, with a mark and no files, before any letter: two jobs never share one.
//!
//! A crash between main n and side n leaves a mark below n: the next start brings it forward from main's record.

use std::collections::BTreeMap;
use std::sync::Arc;

use iceberg::spec::{DataFile, TableMetadata};
use iceberg::{Catalog, TableIdent};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::ledger::LedgerError;
use super::switch::{Switch, SwitchError, reload, switch};

/// Table property and summary key of a side table's mark.
pub const MARK: &str = "tidemill.side";
/// Version of the mark that this program writes.
pub const FORMAT_VERSION: u32 = 1;

/// How far a side table has followed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SideMark {
    /// Format version.
    pub format: u32,
    /// The job.
    pub job_id: Uuid,
    /// Its name.
    pub job_name: String,
    /// Name of its main table.
    pub main: String,
    /// Role of the table in the job, as in the ledger.
    pub role: String,
    /// Epoch of the writer.
    pub epoch: u64,
    /// Last microbatch whose files the table has received.
    pub batch: u64,
    /// Dedup generation of that microbatch: tells it from another one of the same number after a rollback.
    pub generation: Option<String>,
}

impl SideMark {
    /// Whether the mark is of the job of this name with this main table: after the main table was dropped and made
    /// again, that job has another id and may claim its side table again. Two living jobs never share both names.
    pub fn is_of(&self, job_name: &str, main: &str) -> bool {
        self.job_name == job_name && self.main == main
    }

    /// Whether main, at this batch and generation, can be what the mark followed.
    pub fn fits(&self, batch: u64, generation: Option<&str>) -> bool {
        self.batch < batch || (self.batch == batch && self.generation.as_deref() == generation)
    }
}

/// What became of a side table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Followed {
    /// The table has the files since before.
    Already,
    /// The table received the files now.
    Now,
}

/// Why a side table could not follow.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SideError {
    /// The table's mark is above main's batch: main was rolled back.
    #[error("side table {table} is at batch {side}, main at another batch {main}: main was rolled back")]
    Ahead {
        /// The side table.
        table: String,
        /// Its batch.
        side: u64,
        /// Main's batch.
        main: u64,
    },
    /// The table carries the mark of another job.
    #[error("side table {table} belongs to job {found}, not to {expected}")]
    OtherJob {
        /// The side table.
        table: String,
        /// Job of the mark.
        found: Uuid,
        /// This job.
        expected: Uuid,
    },
    /// The mark can not be read.
    #[error("mark of side table {table}")]
    Mark {
        /// The side table.
        table: String,
        /// Why.
        source: LedgerError,
    },
    /// The commit did not land.
    #[error("side table {table} could not follow")]
    Switch {
        /// The side table.
        table: String,
        /// Why.
        source: SwitchError,
    },
}

/// Reads the newest mark: ancestry first, property second.
///
/// # Errors
/// [`LedgerError`] when the mark is newer than this program or broken.
pub fn inspect(metadata: &TableMetadata) -> Result<Option<SideMark>, LedgerError> {
    let on_ancestry = std::iter::successors(metadata.current_snapshot(), |snapshot| {
        metadata.snapshot_by_id(snapshot.parent_snapshot_id()?)
    })
    .find_map(|snapshot| snapshot.summary().additional_properties.get(MARK));
    let Some(text) = on_ancestry.or_else(|| metadata.properties().get(MARK)) else { return Ok(None) };
    parse(text).map(Some)
}

fn parse(text: &str) -> Result<SideMark, LedgerError> {
    let corrupt =
        |why: serde_json::Error| LedgerError::Corrupt { place: MARK.to_owned(), why: why.to_string() };
    let value: serde_json::Value = serde_json::from_str(text).map_err(corrupt)?;
    match value["format"].as_u64() {
        Some(found) if found > u64::from(FORMAT_VERSION) => Err(LedgerError::Newer { found }),
        _ => serde_json::from_value(value).map_err(corrupt),
    }
}

/// Gives a side table the files of `mark.batch`, unless it has them.
///
/// # Errors
/// [`SideError`]; after an unknown outcome the next start asks again, and invariant 1 keeps the files from landing twice.
pub async fn bring_forward(
    catalog: &Arc<dyn Catalog>,
    table: &TableIdent,
    table_uuid: Uuid,
    mark: &SideMark,
    files: Vec<DataFile>,
) -> Result<Followed, SideError> {
    let name = table.to_string();
    let failed = |source| SideError::Switch { table: name.clone(), source };
    let head = reload(catalog, table)
        .await
        .map_err(|source| failed(SwitchError::Away { table: name.clone(), sent: false, source }))?;
    let found = inspect(head.metadata()).map_err(|source| SideError::Mark { table: name.clone(), source })?;
    match &found {
        Some(other) if other.job_id != mark.job_id => {
            let (found, expected) = (other.job_id, mark.job_id);
            return Err(SideError::OtherJob { table: name, found, expected });
        }
        Some(ahead) if !ahead.fits(mark.batch, mark.generation.as_deref()) => {
            return Err(SideError::Ahead { table: name, side: ahead.batch, main: mark.batch });
        }
        Some(same) if same.batch == mark.batch => return Ok(Followed::Already),
        _ => {}
    }
    put(catalog, table, table_uuid, mark, &found, files).await.map(|()| Followed::Now)
}

/// Marks a side table for its job, whatever it followed before, if its mark still is `found`.
///
/// # Errors
/// [`SideError`], as [`bring_forward`].
pub async fn claim(
    catalog: &Arc<dyn Catalog>,
    table: &TableIdent,
    table_uuid: Uuid,
    mark: &SideMark,
    found: &Option<SideMark>,
) -> Result<(), SideError> {
    put(catalog, table, table_uuid, mark, found, Vec::new()).await
}

async fn put(
    catalog: &Arc<dyn Catalog>,
    table: &TableIdent,
    table_uuid: Uuid,
    mark: &SideMark,
    found: &Option<SideMark>,
    files: Vec<DataFile>,
) -> Result<(), SideError> {
    let text = serde_json::to_string(mark).expect("a mark is text and numbers");
    let attempt = Uuid::now_v7();
    let guard = |metadata: &TableMetadata| match inspect(metadata) {
        Ok(now) if now == *found => Ok(()),
        Ok(now) => Err(format!("its mark is {now:?} where {found:?} was inspected")),
        Err(error) => Err(error.to_string()),
    };
    let request = Switch {
        catalog,
        table: table.clone(),
        table_uuid,
        attempt,
        files,
        summary: BTreeMap::from([
            (MARK.to_owned(), text.clone()),
            ("tidemill.attempt".to_owned(), attempt.to_string()),
        ]),
        properties: BTreeMap::from([(MARK.to_owned(), text)]),
        guard: &guard,
    };
    let landed = switch(request, &|| {}).await;
    landed.map(|_| ()).map_err(|source| SideError::Switch { table: table.to_string(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark() -> SideMark {
        SideMark {
            format: 1,
            job_id: Uuid::from_u128(1),
            job_name: "n".into(),
            main: "events.n".into(),
            role: "dead_letters".into(),
            epoch: 3,
            batch: 4,
            generation: Some("g".into()),
        }
    }

    #[test]
    fn the_golden_mark_of_format_1_is_read() {
        assert_eq!(parse(include_str!("../../fixtures/side-mark-1.json")).unwrap(), mark());
    }

    #[test]
    fn a_newer_mark_is_refused_by_name_and_a_broken_one_says_where_it_stands() {
        assert!(matches!(parse(r#"{"format": 2}"#), Err(LedgerError::Newer { found: 2 })));
        let error = parse("{}").unwrap_err().to_string();
        assert!(error.starts_with("ledger record in tidemill.side can not be read"), "{error}");
    }

    #[test]
    fn a_mark_fits_a_later_batch_and_its_own_but_not_another_of_the_same_number() {
        let mark = mark();
        assert!(mark.fits(5, Some("h")) && mark.fits(4, Some("g")));
        assert!(!mark.fits(4, Some("h")) && !mark.fits(4, None) && !mark.fits(3, Some("g")));
    }
}
