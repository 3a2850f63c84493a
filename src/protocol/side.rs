//! A side table follows main: it takes the files that main's record owes it, by its own compare-and-swap.
//!
//! Flow: main's record of microbatch n -> [`bring_forward`] -> side snapshot with a mark (epoch, batch n)
//!
//! Invariants
//! 1. A side table takes the files of n only if its mark says less than n; its mark then says n. So files land once.
//! 2. A mark above main's batch, or at the same number with another generation, means that main was rolled back;
//!    nothing is written.
//! 3. A table is claimed by its first owner, with a mark and no files, before any row: two jobs never share one. Another
//!    ledger of the same job, begun on a new main table, claims it at its start and never later, so files of one ledger
//!    never land on the mark of another: whoever lost the table ends. Of a table whose rows have keys it claims what its
//!    start table has judged, and takes batch numbers above all that stand there, by which a rebuild tells the rows of
//!    the two apart. One that its ledger owes files it claims only where it is certain whether they stand there.
//! 4. An owner changes no table that a later epoch of its ledger has marked: it was fenced, and what it would bring forward
//!    or take back is not what main names now. A fence takes an epoch above every mark that it finds.
//! 5. After a rollback of main a table whose rows have keys goes back too, to its own snapshot of that batch ([`go_back`]):
//!    what is read again is written again. One whose rows stand once per place keeps them.
//!
//! A crash between main n and side n leaves a mark below n: the next start brings it forward from main's record.

use std::collections::BTreeMap;

use iceberg::TableIdent;
use iceberg::spec::TableMetadata;
use uuid::Uuid;

use super::switch::switch;
use super::world::{Request, Tables};
use crate::commit::side::{MARK, SideError, SideMark, inspect};
use crate::commit::switch::SwitchError;
use crate::commit::upkeep::Upkeep;
use crate::mutant;

/// Gives a side table the files of `mark.batch`, unless it has them.
///
/// # Errors
/// [`SideError`]; after an unknown outcome the next start asks again, and invariant 1 keeps the files from landing twice.
pub(super) async fn bring_forward<T: Tables>(
    tables: &T,
    table: &TableIdent,
    table_uuid: Uuid,
    mark: &SideMark,
    files: Vec<T::File>,
) -> Result<(), SideError> {
    let name = table.to_string();
    let failed = |source| SideError::Switch { table: name.clone(), source };
    let head = tables
        .load(table)
        .await
        .map_err(|source| failed(SwitchError::Away { table: name.clone(), sent: false, source }))?;
    let found = inspect(T::metadata(&head));
    let found = found.map_err(|source| SideError::Mark { table: name.clone(), source })?;
    match &found {
        Some(other) if mutant!("mark-of-another-ledger-passed-over", false => other.job_id != mark.job_id) => {
            let (found, expected) = (other.job_id, mark.job_id);
            return Err(SideError::OtherJob { table: name, found, expected });
        }
        Some(ahead) if !ahead.fits(mark.batch, mark.generation.as_deref()) => {
            return Err(SideError::Ahead { table: name, side: ahead.batch, main: mark.batch });
        }
        Some(same) if same.batch == mark.batch => return Ok(()),
        _ => {}
    }
    let change = Change { files, ..Change::default() };
    put(tables, table, table_uuid, mark, &found, change).await
}

/// Marks a side table for its job, whatever it followed before, if its mark still is `found`. With `back` it has the files
/// of an earlier snapshot again.
///
/// # Errors
/// [`SideError`], as [`bring_forward`].
pub(super) async fn claim<T: Tables>(
    tables: &T,
    table: &TableIdent,
    table_uuid: Uuid,
    mark: &SideMark,
    found: &Option<SideMark>,
    back: Option<Upkeep>,
) -> Result<(), SideError> {
    let change = Change { upkeep: back, ..Change::default() };
    put(tables, table, table_uuid, mark, found, change).await
}

/// Gives a side table the files of an earlier snapshot of its own again, and this mark, if its mark still is `found`.
///
/// # Errors
/// [`SideError`], as [`bring_forward`].
pub(super) async fn go_back<T: Tables>(
    tables: &T,
    table: &TableIdent,
    table_uuid: Uuid,
    mark: &SideMark,
    found: &Option<SideMark>,
    snapshot_id: i64,
) -> Result<(), SideError> {
    let change = Change { back_to: Some(snapshot_id), ..Change::default() };
    put(tables, table, table_uuid, mark, found, change).await
}

/// Puts what maintenance changes on the head that carries the mark `found`, and this mark.
///
/// # Errors
/// [`SideError`], as [`bring_forward`].
pub(super) async fn keep_up<T: Tables>(
    tables: &T,
    table: &TableIdent,
    table_uuid: Uuid,
    mark: &SideMark,
    found: &SideMark,
    upkeep: Upkeep,
) -> Result<(), SideError> {
    let change = Change { upkeep: Some(upkeep), ..Change::default() };
    put(tables, table, table_uuid, mark, &Some(found.clone()), change).await
}

/// What a commit of a side table changes beside its mark.
struct Change<File> {
    files: Vec<File>,
    back_to: Option<i64>,
    upkeep: Option<Upkeep>,
}

impl<File> Default for Change<File> {
    fn default() -> Self {
        Self { files: Vec::new(), back_to: None, upkeep: None }
    }
}

async fn put<T: Tables>(
    tables: &T,
    table: &TableIdent,
    table_uuid: Uuid,
    mark: &SideMark,
    found: &Option<SideMark>,
    change: Change<T::File>,
) -> Result<(), SideError> {
    if let Some(later) =
        found.as_ref().filter(|found| found.job_id == mark.job_id && found.epoch > mark.epoch)
        && mutant!("side-epoch-not-compared", false => true)
    {
        return Err(SideError::Ahead { table: table.to_string(), side: later.batch, main: mark.batch });
    }
    let text = serde_json::to_string(mark).expect("a mark is text and numbers");
    let attempt = tables.new_id();
    let guard = |metadata: &TableMetadata| match inspect(metadata) {
        Ok(now) if mutant!("side-guard-blind", true => now == *found) => Ok(()),
        Ok(now) => Err(format!("its mark is {now:?} where {found:?} was inspected")),
        Err(error) => Err(error.to_string()),
    };
    let request = Request {
        table: table.clone(),
        table_uuid,
        attempt,
        files: change.files,
        summary: BTreeMap::from([
            (MARK.to_owned(), text.clone()),
            ("tidemill.attempt".to_owned(), attempt.to_string()),
        ]),
        properties: BTreeMap::from([(MARK.to_owned(), text)]),
        back_to: change.back_to,
        properties_removed: Vec::new(),
        upkeep: None,
    };
    let request = request.with(change.upkeep);
    let landed = switch(tables, &request, &guard, &|| {}).await;
    landed.map(|_| ()).map_err(|source| SideError::Switch { table: table.to_string(), source })
}
