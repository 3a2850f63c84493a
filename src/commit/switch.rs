//! The catalog's side of a switch: one request onto a head that was judged, and a patient look at the table.
//!
//! `protocol/switch.rs` decides when to send and what an answer means.
//!
//! Invariants
//! 1. The transaction asserts the head that it is given, or nothing is sent.
//! 2. The catalog is asked at most once: no layer below may repeat a request that could have landed.
//!    `Transaction::commit` would (crates differ in what they call retryable), so the wrapper refuses.
//!
//! Bounds: one request; [`RELOADS_MAX`] tries of a look.

use std::collections::HashMap;
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

use super::upkeep::{Upkeep, with_files_of};
use crate::mutant;
use crate::protocol::{Answer, Request};

/// Tries to read a table before the catalog counts as away.
pub const RELOADS_MAX: usize = 8;

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

/// Sends one request, once, that asserts `head`.
pub(crate) async fn send(catalog: &Arc<dyn Catalog>, head: &Table, request: &Request<DataFile>) -> Answer {
    let (upkeep, back_to) = (request.upkeep.as_ref(), request.back_to);
    let one_shot = OneShot { upkeep, back_to, ..OneShot::new(catalog, head) };
    let result = match build(head, request) {
        Ok(transaction) => transaction.commit(&one_shot).await,
        Err(error) => Err(error),
    };
    match result {
        Ok(_) => Answer::Done,
        Err(error) if one_shot.sent.load(Ordering::SeqCst) => Answer::Failed(error),
        Err(_) if one_shot.moved.load(Ordering::SeqCst) => Answer::HeadMoved,
        Err(error) => Answer::NotSent(error),
    }
}

fn build(head: &Table, request: &Request<DataFile>) -> Result<Transaction, Error> {
    let mut transaction = Transaction::new(head);
    if let Some(upkeep) = &request.upkeep {
        transaction = upkeep.expire(transaction, head.metadata())?;
    }
    let append = transaction
        .fast_append()
        .with_check_duplicate(false)
        .add_data_files(request.files.iter().cloned())
        .set_snapshot_properties(request.summary.clone().into_iter().collect());
    let transaction = append.apply(transaction)?;
    if request.properties.is_empty() {
        return Ok(transaction);
    }
    let mut update = transaction.update_table_properties();
    for (key, value) in &request.properties {
        update = update.set(key.clone(), value.clone());
    }
    for key in &request.properties_removed {
        update = update.remove(key.clone());
    }
    update.apply(transaction)
}

/// Sets a property of a table and nothing else, for a request to its owner (R9). It moves no snapshot, so it comes between
/// nobody and a head. Sent until a reload shows it: one that was taken up and removed before that reload is sent again.
///
/// # Errors
/// [`SwitchError::Replaced`], [`SwitchError::Away`]; [`SwitchError::Refused`] after [`RELOADS_MAX`] requests.
pub(crate) async fn set_property(
    catalog: &Arc<dyn Catalog>,
    table: &TableIdent,
    table_uuid: Uuid,
    (name, text): &(String, String),
) -> Result<(), SwitchError> {
    let mut sends = 0;
    loop {
        let away = |source| SwitchError::Away { table: table.to_string(), sent: false, source };
        let head = reload(catalog, table).await.map_err(away)?;
        let found = head.metadata().uuid();
        if found != table_uuid {
            return Err(SwitchError::Replaced { table: table.to_string(), expected: table_uuid, found });
        }
        if head.metadata().properties().get(name) == Some(text) {
            return Ok(());
        }
        let transaction = Transaction::new(&head);
        let update = transaction.update_table_properties().set(name.clone(), text.clone());
        let sent = match update.apply(transaction) {
            Ok(transaction) => transaction.commit(&OneShot::new(catalog, &head)).await,
            Err(error) => Err(error),
        };
        sends += 1;
        if sends as usize >= RELOADS_MAX {
            let unseen = || Error::new(ErrorKind::Unexpected, "it was taken, and no reload shows it");
            let error = sent.err().unwrap_or_else(unseen);
            let (table, source) = (table.to_string(), Box::new(error));
            return Err(SwitchError::Refused { table, sends, definite: false, source });
        }
        if sent.is_err() {
            // Another's commit came first, or the answer is not known: the head that is loaded next tells, and longer waits
            // let a catalog that is away recover.
            tokio::time::sleep(Duration::from_millis(200) * sends).await;
        }
    }
}

/// A catalog for one request: shows the transaction the head that was judged or none, and lets a second request through
/// never.
struct OneShot<'a> {
    inner: Arc<dyn Catalog>,
    head: &'a Table,
    upkeep: Option<&'a Upkeep>,
    back_to: Option<i64>,
    /// Whether the head was another one when the transaction loaded it.
    moved: AtomicBool,
    sent: AtomicBool,
}

impl<'a> OneShot<'a> {
    fn new(catalog: &Arc<dyn Catalog>, head: &'a Table) -> Self {
        Self {
            inner: Arc::clone(catalog),
            head,
            upkeep: None,
            back_to: None,
            moved: AtomicBool::new(false),
            sent: AtomicBool::new(false),
        }
    }
}

impl fmt::Debug for OneShot<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("OneShot").field("head", &self.head.metadata_location()).finish_non_exhaustive()
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
        if mutant!("judged-head-not-asserted", false => table.metadata() != self.head.metadata()) {
            self.moved.store(true, Ordering::SeqCst);
            return Err(refuse("the head is not the one that was judged"));
        }
        match (self.back_to, self.upkeep) {
            (Some(snapshot_id), _) => with_files_of(&table, snapshot_id),
            (None, Some(upkeep)) => upkeep.show(&table),
            (None, None) => Ok(table),
        }
    }

    async fn update_table(&self, commit: TableCommit) -> iceberg::Result<Table> {
        if self.sent.swap(true, Ordering::SeqCst) {
            return Err(refuse("a request that may have landed is not repeated"));
        }
        crate::crash_point!("request_to_send");
        let answer = match self.upkeep.and_then(|upkeep| upkeep.beyond.as_ref()) {
            Some(beyond) => beyond.send(self.head, commit).await,
            None => self.inner.update_table(commit).await,
        };
        crate::crash_point!("request_answered");
        let once = |error: Error| mutant!("repeated-below-the-switch", error => error.with_retryable(false));
        answer.map_err(once)
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
