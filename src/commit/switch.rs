//! One compare-and-swap on a head that was inspected, and its outcome as a fact.
//!
//! Flow: [`Switch`] -> guard on the head that is asserted -> one request -> reload -> [`Landed`] or a named error
//!
//! Invariants
//! 1. A [`Switch`] is sent only onto a head that its guard accepts; the transaction asserts that very head.
//! 2. The catalog is asked at most once per attempt at sending: no layer below may repeat a request that could have
//!    landed. `Transaction::commit` would (crates differ in what they call retryable), so the wrapper refuses.
//! 3. Success is what a reload shows: the switch's own attempt id on the ancestry. The catalog's answer decides nothing.
//! 4. Nothing is ever deleted here.
//!
//! An answer that is not a success leaves the request possibly in flight. Sending the same files again on a newer head
//! is still safe: both requests assert a head, the first to land moves it, the other fails.
//!
//! Bounds: [`SENDS_MAX`] requests, each followed by a reload with [`RELOADS_MAX`] tries.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use backon::{ExponentialBuilder, Retryable};
use iceberg::spec::{DataFile, TableMetadata};
use iceberg::table::Table;
use iceberg::transaction::{ApplyTransactionAction, Transaction};
use iceberg::{Catalog, Error, ErrorKind, Namespace, NamespaceIdent, TableCommit, TableCreation, TableIdent};
use uuid::Uuid;

use super::ledger;
use crate::catalog;
use crate::stop::Reason;

/// Requests for one switch before its outcome is reported as unknown or refused.
pub const SENDS_MAX: u32 = 12;
/// Tries to read a table before the catalog counts as away.
pub const RELOADS_MAX: usize = 8;
/// iceberg refuses a snapshot more than 60 s older than the table's last update; this much less is waited out.
const CLOCK_BEHIND_MS_MAX: i64 = 50_000;
/// Longest wait for a clock that was set back.
const CLOCK_WAIT_MAX: Duration = Duration::from_secs(300);

/// Judges the head that a switch would be put on; an error says what stands there instead.
pub type Guard<'a> = dyn Fn(&TableMetadata) -> Result<(), String> + Send + Sync + 'a;

/// Everything that one commit writes.
pub struct Switch<'a> {
    /// The catalog.
    pub catalog: &'a Arc<dyn Catalog>,
    /// The table.
    pub table: TableIdent,
    /// UUID that the table must still have.
    pub table_uuid: Uuid,
    /// Identity of this commit; stands in `summary` under `tidemill.attempt`.
    pub attempt: Uuid,
    /// Data files to append; may be empty.
    pub files: Vec<DataFile>,
    /// Snapshot summary.
    pub summary: BTreeMap<String, String>,
    /// Table properties.
    pub properties: BTreeMap<String, String>,
    /// What the head must be.
    pub guard: &'a Guard<'a>,
}

/// A switch that is on the ancestry of the table's current snapshot.
pub struct Landed {
    /// The table as reloaded.
    pub table: Table,
    /// Requests that were sent.
    pub sends: u32,
}

/// Why a switch did not land. One variant per way the caller must react.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SwitchError {
    /// The head is not the one expected, and this attempt is not below it. The caller reads the head's record to tell
    /// a new owner from a rollback.
    #[error("table {table} moved: {found}")]
    Moved {
        /// The table.
        table: String,
        /// What stands there.
        found: String,
        /// The head, to read its record.
        metadata: Box<TableMetadata>,
    },
    /// The table is another one under the same name, or gone.
    #[error("table {table} was replaced: uuid {found} where {expected} was expected")]
    Replaced {
        /// The table.
        table: String,
        /// UUID expected.
        expected: Uuid,
        /// UUID found.
        found: Uuid,
    },
    /// Data files that the commit names are gone; sending would break the table.
    #[error("{count} data files of the commit are gone, first {first}")]
    FilesGone {
        /// How many.
        count: usize,
        /// One of them.
        first: String,
    },
    /// The catalog can not be read.
    #[error("table {table} can not be read from the catalog")]
    Away {
        /// The table.
        table: String,
        /// Whether a request had been sent, so that the commit may be visible.
        sent: bool,
        /// Why.
        source: Box<Error>,
    },
    /// Every request was answered with an error and none landed so far.
    #[error("table {table}: {sends} requests, none landed")]
    Refused {
        /// The table.
        table: String,
        /// Requests sent.
        sends: u32,
        /// Whether every answer said that nothing was done, so that the commit can not land later.
        definite: bool,
        /// The last answer.
        source: Box<Error>,
    },
    /// The machine's clock is behind the table's last update.
    #[error("this machine's clock is {behind_ms} ms behind the last update of table {table}")]
    ClockBehind {
        /// The table.
        table: String,
        /// How far.
        behind_ms: i64,
    },
}

/// Sends a switch until a reload shows what became of it.
///
/// # Errors
/// [`SwitchError`]. After `Away { sent: true }` and `Refused` the commit may still land: delete nothing.
pub async fn switch(switch: Switch<'_>, sending: &(dyn Fn() + Send + Sync)) -> Result<Landed, SwitchError> {
    let name = switch.table.to_string();
    let (mut sends, mut definite) = (0, true);
    let mut table = reload(switch.catalog, &switch.table).await.map_err(|source| SwitchError::Away {
        table: name.clone(),
        sent: false,
        source,
    })?;
    loop {
        if let Some(landed) = settled(&switch, &table, sends)? {
            return Ok(landed);
        }
        check_files(&switch, &table, sends).await?;
        wait_for_clock(&name, &table).await?;
        sending();
        let answer = send_once(&switch, &table).await;
        let (error, sent) = match answer {
            Ok(()) => (None, true),
            Err((error, sent)) => (Some(error), sent),
        };
        sends += u32::from(sent);
        definite &= error.as_ref().is_some_and(is_definite);
        if let Some(error) = &error {
            tracing::warn!(table = %name, sends, sent, %error, "commit was not answered with a success, reading back");
        }
        table = reload(switch.catalog, &switch.table).await.map_err(|source| SwitchError::Away {
            table: name.clone(),
            sent: sends > 0,
            source,
        })?;
        if let Some(landed) = settled(&switch, &table, sends)? {
            return Ok(landed);
        }
        let error = error.unwrap_or_else(|| {
            Error::new(
                ErrorKind::Unexpected,
                "the catalog reported success, and the table does not show the commit",
            )
        });
        if sends >= SENDS_MAX || !sent || definite {
            return Err(SwitchError::Refused { table: name, sends, definite, source: Box::new(error) });
        }
        // The reload above is the condition; the pause keeps two writers from marching in step.
        tokio::time::sleep(resend_pause(sends)).await;
    }
}

/// Whether an answer says that the request was refused and not done (R7): no principal, no permission, no such thing.
fn is_definite(error: &Error) -> bool {
    matches!(catalog::reason_of(error), Reason::NotAuthorized | Reason::Usage)
}

/// Landed, still to be sent (`None`), or an error that says why it must not be sent.
fn settled(switch: &Switch<'_>, table: &Table, sends: u32) -> Result<Option<Landed>, SwitchError> {
    let metadata = table.metadata();
    let name = || switch.table.to_string();
    if metadata.uuid() != switch.table_uuid {
        let (expected, found) = (switch.table_uuid, metadata.uuid());
        return Err(SwitchError::Replaced { table: name(), expected, found });
    }
    if ledger::has_landed(metadata, switch.attempt) {
        return Ok(Some(Landed { table: table.clone(), sends }));
    }
    match (switch.guard)(metadata) {
        Ok(()) => Ok(None),
        Err(found) => Err(SwitchError::Moved { table: name(), found, metadata: Box::new(metadata.clone()) }),
    }
}

/// Files may have been removed by an orphan clean-up between two sends.
async fn check_files(switch: &Switch<'_>, table: &Table, sends: u32) -> Result<(), SwitchError> {
    if sends == 0 {
        return Ok(());
    }
    let mut gone = Vec::new();
    for file in &switch.files {
        let exists = match table.file_io().new_input(file.file_path()) {
            Ok(input) => input.exists().await,
            Err(error) => Err(error),
        };
        match exists {
            Ok(true) => {}
            Ok(false) => gone.push(file.file_path().to_owned()),
            Err(source) => {
                let table = switch.table.to_string();
                return Err(SwitchError::Away { table, sent: true, source: Box::new(source) });
            }
        }
    }
    match gone.first() {
        None => Ok(()),
        Some(first) => Err(SwitchError::FilesGone { count: gone.len(), first: first.clone() }),
    }
}

async fn wait_for_clock(name: &str, table: &Table) -> Result<(), SwitchError> {
    let begun = std::time::Instant::now();
    loop {
        let behind_ms = table.metadata().last_updated_ms() - chrono::Utc::now().timestamp_millis();
        if behind_ms <= CLOCK_BEHIND_MS_MAX {
            return Ok(());
        }
        if begun.elapsed() > CLOCK_WAIT_MAX {
            return Err(SwitchError::ClockBehind { table: name.to_owned(), behind_ms });
        }
        tracing::warn!(table = name, behind_ms, "clock is behind the table's last update, waiting for it");
        let wait_ms = (behind_ms - CLOCK_BEHIND_MS_MAX).clamp(100, 10_000);
        // Until this machine's clock has caught up, which the loop looks at again.
        tokio::time::sleep(Duration::from_millis(wait_ms.unsigned_abs())).await;
    }
}

/// Reads a table with patience: transport errors are tried again, "not found" is an answer.
///
/// # Errors
/// The last error of [`RELOADS_MAX`] tries.
pub async fn reload(catalog: &Arc<dyn Catalog>, table: &TableIdent) -> Result<Table, Box<Error>> {
    let backoff = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(200))
        .with_max_delay(Duration::from_secs(10))
        .with_max_times(RELOADS_MAX)
        .with_jitter();
    let away =
        |error: &Error| !matches!(error.kind(), ErrorKind::TableNotFound | ErrorKind::NamespaceNotFound);
    (|| catalog.load_table(table))
        .retry(backoff)
        .when(away)
        .notify(|error, pause| {
            tracing::warn!(%table, %error, pause_ms = pause.as_millis() as u64, "catalog did not answer, trying again");
        })
        .await
        .map_err(Box::new)
}

/// 0.2 s, doubled with each send, and up to as much again at random so that two writers do not march in step.
fn resend_pause(sends: u32) -> Duration {
    let base = Duration::from_millis(100) * 2u32.pow(sends.min(6));
    base + base.mul_f64(rand::random::<f64>())
}

/// The error, and whether the request had left.
async fn send_once(switch: &Switch<'_>, table: &Table) -> Result<(), (Error, bool)> {
    let one_shot = OneShot {
        inner: Arc::clone(switch.catalog),
        guard: switch.guard,
        attempt: switch.attempt,
        sent: AtomicBool::new(false),
    };
    let result = build(switch, table).map(|transaction| transaction.commit(&one_shot));
    let result = match result {
        Ok(commit) => commit.await,
        Err(error) => Err(error),
    };
    result.map(|_| ()).map_err(|error| (error, one_shot.sent.load(Ordering::SeqCst)))
}

fn build(switch: &Switch<'_>, table: &Table) -> Result<Transaction, Error> {
    let transaction = Transaction::new(table);
    let append = transaction
        .fast_append()
        .with_check_duplicate(false)
        .add_data_files(switch.files.iter().cloned())
        .set_snapshot_properties(switch.summary.clone().into_iter().collect());
    let transaction = append.apply(transaction)?;
    if switch.properties.is_empty() {
        return Ok(transaction);
    }
    let mut update = transaction.update_table_properties();
    for (key, value) in &switch.properties {
        update = update.set(key.clone(), value.clone());
    }
    update.apply(transaction)
}

/// A catalog for one request: judges the head that the transaction loads, and lets a second request through never.
struct OneShot<'a> {
    inner: Arc<dyn Catalog>,
    guard: &'a Guard<'a>,
    attempt: Uuid,
    sent: AtomicBool,
}

impl fmt::Debug for OneShot<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("OneShot").field("attempt", &self.attempt).finish_non_exhaustive()
    }
}

fn refuse(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::PreconditionFailed, why).with_retryable(false)
}

#[async_trait]
impl Catalog for OneShot<'_> {
    async fn load_table(&self, table: &TableIdent) -> iceberg::Result<Table> {
        if self.sent.load(Ordering::SeqCst) {
            return Err(refuse("a request that may have landed is not repeated"));
        }
        let table = self.inner.load_table(table).await.map_err(|error| error.with_retryable(false))?;
        (self.guard)(table.metadata()).map_err(refuse)?;
        Ok(table)
    }

    async fn update_table(&self, commit: TableCommit) -> iceberg::Result<Table> {
        if self.sent.swap(true, Ordering::SeqCst) {
            return Err(refuse("a request that may have landed is not repeated"));
        }
        self.inner.update_table(commit).await.map_err(|error| error.with_retryable(false))
    }

    async fn list_namespaces(&self, parent: Option<&NamespaceIdent>) -> iceberg::Result<Vec<NamespaceIdent>> {
        self.inner.list_namespaces(parent).await
    }

    async fn create_namespace(
        &self,
        namespace: &NamespaceIdent,
        properties: HashMap<String, String>,
    ) -> iceberg::Result<Namespace> {
        self.inner.create_namespace(namespace, properties).await
    }

    async fn get_namespace(&self, namespace: &NamespaceIdent) -> iceberg::Result<Namespace> {
        self.inner.get_namespace(namespace).await
    }

    async fn namespace_exists(&self, namespace: &NamespaceIdent) -> iceberg::Result<bool> {
        self.inner.namespace_exists(namespace).await
    }

    async fn update_namespace(
        &self,
        namespace: &NamespaceIdent,
        properties: HashMap<String, String>,
    ) -> iceberg::Result<()> {
        self.inner.update_namespace(namespace, properties).await
    }

    async fn drop_namespace(&self, _namespace: &NamespaceIdent) -> iceberg::Result<()> {
        Err(refuse("a commit drops nothing"))
    }

    async fn list_tables(&self, namespace: &NamespaceIdent) -> iceberg::Result<Vec<TableIdent>> {
        self.inner.list_tables(namespace).await
    }

    async fn create_table(
        &self,
        _namespace: &NamespaceIdent,
        _creation: TableCreation,
    ) -> iceberg::Result<Table> {
        Err(refuse("a commit creates no table"))
    }

    async fn drop_table(&self, _table: &TableIdent) -> iceberg::Result<()> {
        Err(refuse("a commit drops nothing"))
    }

    async fn purge_table(&self, _table: &TableIdent) -> iceberg::Result<()> {
        Err(refuse("a commit drops nothing"))
    }

    async fn table_exists(&self, table: &TableIdent) -> iceberg::Result<bool> {
        self.inner.table_exists(table).await
    }

    async fn rename_table(&self, _from: &TableIdent, _to: &TableIdent) -> iceberg::Result<()> {
        Err(refuse("a commit renames nothing"))
    }

    async fn register_table(&self, _table: &TableIdent, _location: String) -> iceberg::Result<Table> {
        Err(refuse("a commit registers no table"))
    }
}

#[cfg(test)]
mod tests;
