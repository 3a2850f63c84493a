//! The switch against a catalog that lies, loses replies and refuses, by a script.
//!
//! Flow: a table at its owner's record -> [`Scripted`] over a real SQLite catalog -> [`switch`] -> what the real
//! catalog shows afterwards. The script says per request what happens meanwhile, whether the work is done, and what
//! is answered; a request or a load that is not in the script is an honest one.
//!
//! Bounds: at most three requests in one test, so that real pauses between them stay below 2 s.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Mutex;
use std::sync::atomic::AtomicU32;

use futures::TryStreamExt;
use iceberg::spec::{
    DataContentType, DataFileBuilder, DataFileFormat, NestedField, PrimitiveType, Schema, SnapshotReference,
    SnapshotRetention, Type,
};
use tempfile::TempDir;

use super::*;
use crate::catalog;
use crate::commit::ledger::{self, Found, LedgerRecord, PROPERTY};
use crate::job::{CatalogConfig, CatalogKind};
use crate::pipeline::world::CatalogTables;
use crate::protocol::switch::{Landed, switch};
use crate::stop::Reason;

/// Rows in each data file of these tests.
const FILE_ROWS: u64 = 10;

/// What a request to commit becomes.
#[derive(Debug, Clone, Copy)]
enum Work {
    /// The real catalog gets it.
    Done,
    /// Nobody gets it.
    NotDone,
    /// It is under way, and [`Meanwhile::HeldArrives`] or the test's end delivers it.
    Held,
}

/// What others do before a request or a load is served.
#[derive(Debug, Clone)]
enum Meanwhile {
    Nothing,
    /// A writer that keeps no ledger appends this file.
    ForeignAppend(Box<DataFile>),
    /// Another owner puts its record, with a higher epoch, on the head.
    OtherOwner,
    /// An orphan clean-up deletes a data file.
    FileDeleted(String),
    /// Somebody drops the table.
    TableDropped,
    /// Somebody drops the table and creates it again.
    TableReplaced,
    /// The request that was held back is served after all.
    HeldArrives,
}

/// One request by script.
#[derive(Debug)]
struct Act {
    meanwhile: Meanwhile,
    work: Work,
    /// The answer instead of the real catalog's (or, where no work was done, instead of success).
    answer: Option<Error>,
}

fn act(work: Work, answer: Option<Error>) -> Act {
    Act { meanwhile: Meanwhile::Nothing, work, answer }
}

/// As the REST client words a gateway's time-out.
fn lost_reply() -> Error {
    Error::new(ErrorKind::Unexpected, "A server-side gateway timeout occurred; the commit state is unknown.")
}

/// As the REST client words an answer that it has no case for.
fn forbidden() -> Error {
    Error::new(ErrorKind::Unexpected, "Received response with unexpected status code")
        .with_context("status", "403 Forbidden")
}

fn conflict() -> Error {
    Error::new(ErrorKind::CatalogCommitConflicts, "one or more requirements failed").with_retryable(true)
}

/// A catalog that does and says what a script tells it, above one that works.
#[derive(Debug)]
struct Scripted {
    inner: Arc<dyn Catalog>,
    acts: Mutex<VecDeque<Act>>,
    /// What happens before the loads to come, and what they answer if it is an error.
    loads: Mutex<VecDeque<(Meanwhile, Option<Error>)>>,
    requests: AtomicU32,
    held: Mutex<VecDeque<TableCommit>>,
}

impl Scripted {
    fn new(inner: &Arc<dyn Catalog>, acts: impl Into<VecDeque<Act>>) -> Arc<Self> {
        Self::with_loads(inner, acts, [])
    }

    fn with_loads(
        inner: &Arc<dyn Catalog>,
        acts: impl Into<VecDeque<Act>>,
        loads: impl Into<VecDeque<(Meanwhile, Option<Error>)>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            inner: Arc::clone(inner),
            acts: Mutex::new(acts.into()),
            loads: Mutex::new(loads.into()),
            requests: AtomicU32::new(0),
            held: Mutex::new(VecDeque::new()),
        })
    }

    fn requests(&self) -> u32 {
        self.requests.load(Ordering::SeqCst)
    }

    /// Serves the oldest request that was held back.
    async fn serve_held(&self) -> iceberg::Result<Table> {
        let commit = self.held.lock().unwrap().pop_front().expect("a request was held back");
        self.inner.update_table(commit).await
    }

    async fn let_happen(&self, meanwhile: Meanwhile, ident: &TableIdent) {
        let table = self.inner.load_table(ident).await.unwrap();
        match meanwhile {
            Meanwhile::Nothing => {}
            Meanwhile::ForeignAppend(file) => {
                append(&self.inner, &table, vec![*file], None).await;
            }
            Meanwhile::OtherOwner => {
                append(&self.inner, &table, Vec::new(), Some(&other_owner())).await;
            }
            Meanwhile::FileDeleted(path) => table.file_io().delete(path).await.unwrap(),
            Meanwhile::TableDropped => self.inner.drop_table(ident).await.unwrap(),
            Meanwhile::TableReplaced => {
                self.inner.drop_table(ident).await.unwrap();
                create(&self.inner, ident).await;
            }
            Meanwhile::HeldArrives => {
                self.serve_held().await.expect("nothing moved the head since it was sent");
            }
        }
    }
}

#[async_trait]
impl Catalog for Scripted {
    async fn load_table(&self, ident: &TableIdent) -> iceberg::Result<Table> {
        let load = self.loads.lock().unwrap().pop_front();
        let (meanwhile, answer) = load.unwrap_or((Meanwhile::Nothing, None));
        if !matches!(meanwhile, Meanwhile::Nothing) {
            self.let_happen(meanwhile, ident).await;
        }
        match answer {
            Some(error) => Err(error),
            None => self.inner.load_table(ident).await,
        }
    }

    async fn update_table(&self, commit: TableCommit) -> iceberg::Result<Table> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        let act = self.acts.lock().unwrap().pop_front();
        let act = act.unwrap_or(Act { meanwhile: Meanwhile::Nothing, work: Work::Done, answer: None });
        let ident = commit.identifier().clone();
        let before = self.inner.load_table(&ident).await?;
        self.let_happen(act.meanwhile, &ident).await;
        let result = match act.work {
            Work::Done => self.inner.update_table(commit).await,
            Work::NotDone => Ok(before),
            Work::Held => {
                self.held.lock().unwrap().push_back(commit);
                Ok(before)
            }
        };
        match act.answer {
            Some(error) => {
                result.expect("the real catalog does the work whose answer is withheld");
                Err(error)
            }
            None => result,
        }
    }

    async fn list_namespaces(&self, _: Option<&NamespaceIdent>) -> iceberg::Result<Vec<NamespaceIdent>> {
        unreachable!("a switch loads and updates one table")
    }

    async fn create_namespace(
        &self,
        _: &NamespaceIdent,
        _: HashMap<String, String>,
    ) -> iceberg::Result<Namespace> {
        unreachable!("a switch loads and updates one table")
    }

    async fn get_namespace(&self, _: &NamespaceIdent) -> iceberg::Result<Namespace> {
        unreachable!("a switch loads and updates one table")
    }

    async fn namespace_exists(&self, _: &NamespaceIdent) -> iceberg::Result<bool> {
        unreachable!("a switch loads and updates one table")
    }

    async fn update_namespace(&self, _: &NamespaceIdent, _: HashMap<String, String>) -> iceberg::Result<()> {
        unreachable!("a switch loads and updates one table")
    }

    async fn drop_namespace(&self, _: &NamespaceIdent) -> iceberg::Result<()> {
        unreachable!("a switch loads and updates one table")
    }

    async fn list_tables(&self, _: &NamespaceIdent) -> iceberg::Result<Vec<TableIdent>> {
        unreachable!("a switch loads and updates one table")
    }

    async fn create_table(&self, _: &NamespaceIdent, _: TableCreation) -> iceberg::Result<Table> {
        unreachable!("a switch loads and updates one table")
    }

    async fn drop_table(&self, _: &TableIdent) -> iceberg::Result<()> {
        unreachable!("a switch loads and updates one table")
    }

    async fn purge_table(&self, _: &TableIdent) -> iceberg::Result<()> {
        unreachable!("a switch loads and updates one table")
    }

    async fn table_exists(&self, _: &TableIdent) -> iceberg::Result<bool> {
        unreachable!("a switch loads and updates one table")
    }

    async fn rename_table(&self, _: &TableIdent, _: &TableIdent) -> iceberg::Result<()> {
        unreachable!("a switch loads and updates one table")
    }

    async fn register_table(&self, _: &TableIdent, _: String) -> iceberg::Result<Table> {
        unreachable!("a switch loads and updates one table")
    }
}

/// The record that the table carries before each test.
fn standing() -> LedgerRecord {
    ledger::tests::record()
}

/// The record of the switch under test.
fn ours() -> LedgerRecord {
    let standing = standing();
    LedgerRecord {
        sequence: standing.sequence + 1,
        batch: standing.batch + 1,
        attempt: Uuid::from_u128(0xa77e),
        ..standing
    }
}

/// What another process writes when it takes the table.
fn other_owner() -> LedgerRecord {
    let standing = standing();
    LedgerRecord {
        sequence: standing.sequence + 1,
        epoch: standing.epoch + 1,
        owner: Uuid::from_u128(0x07e4),
        kind: ledger::Kind::Fence,
        attempt: Uuid::from_u128(0xfe4ce),
        ..standing
    }
}

/// Accepts a head whose newest record is the standing one, as the owner of a table does.
fn carries_the_standing_record(metadata: &TableMetadata) -> Result<(), String> {
    match ledger::inspect(metadata).map_err(|error| error.to_string())? {
        Found::Record(record) | Found::CutOff(record) if record.attempt == standing().attempt => Ok(()),
        Found::Record(record) | Found::CutOff(record) => Err(format!("it is at epoch {}", record.epoch)),
        found => Err(format!("{found:?}")),
    }
}

async fn create(catalog: &Arc<dyn Catalog>, ident: &TableIdent) -> Table {
    let id = NestedField::required(1, "event_number", Type::Primitive(PrimitiveType::Long));
    let schema = Schema::builder().with_fields([id.into()]).build().unwrap();
    let creation = TableCreation::builder().name(ident.name().to_owned()).schema(schema).build();
    catalog.create_table(ident.namespace(), creation).await.unwrap()
}

/// Commits the plain way.
async fn append(
    catalog: &Arc<dyn Catalog>,
    table: &Table,
    files: Vec<DataFile>,
    record: Option<&LedgerRecord>,
) -> Table {
    let transaction = Transaction::new(table);
    let mut append = transaction.fast_append().add_data_files(files);
    if let Some(record) = record {
        append = append.set_snapshot_properties(record.to_summary().into_iter().collect());
    }
    let mut transaction = append.apply(transaction).unwrap();
    if let Some(record) = record {
        let update = transaction.update_table_properties().set(PROPERTY.to_owned(), record.to_property());
        transaction = update.apply(transaction).unwrap();
    }
    transaction.commit(catalog.as_ref()).await.unwrap()
}

/// A table that stands at the record of its owner, a file to append, and one that others append.
struct Stand {
    inner: Arc<dyn Catalog>,
    table: Table,
    file: DataFile,
    foreign: DataFile,
    _folder: TempDir,
}

impl Stand {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = CatalogConfig {
            kind: CatalogKind::Sql,
            uri: format!("sqlite:{}", folder.path().join("catalog.db").display()),
            warehouse: folder.path().join("warehouse").display().to_string(),
            properties: BTreeMap::new(),
        };
        let inner = catalog::connect(&config).await.unwrap();
        let ident = TableIdent::from_strs(["events", "notifications"]).unwrap();
        catalog::ensure_namespace(inner.as_ref(), ident.namespace()).await.unwrap();
        let empty = create(&inner, &ident).await;
        let table = append(&inner, &empty, Vec::new(), Some(&standing())).await;
        let file = data_file(&table, "ours.parquet").await;
        let foreign = data_file(&table, "foreign.parquet").await;
        Self { inner, table, file, foreign, _folder: folder }
    }

    async fn switch(&self, catalog: &Arc<Scripted>) -> Result<Landed<Table>, SwitchError> {
        let tables = CatalogTables { catalog: Arc::clone(catalog) as _ };
        let request = Request {
            table: self.table.identifier().clone(),
            table_uuid: self.table.metadata().uuid(),
            attempt: ours().attempt,
            files: vec![self.file.clone()],
            summary: ours().to_summary(),
            properties: BTreeMap::from([(PROPERTY.to_owned(), ours().to_property())]),
            back_to: None,
            properties_removed: Vec::new(),
            upkeep: None,
        };
        switch(&tables, &request, &carries_the_standing_record, &|| {}).await
    }

    async fn head(&self) -> Table {
        self.inner.load_table(self.table.identifier()).await.unwrap()
    }

    /// Asserts that the real catalog shows the switch once, with these files and nothing else.
    async fn assert_landed_once(&self, landed: &Landed<Table>, files: &[&DataFile]) {
        let head = self.head().await;
        assert_eq!(landed.table.metadata(), head.metadata(), "what is handed back is the head");
        assert_eq!(snapshots_of(&head, ours().attempt), 1);
        assert_eq!(files_on(&head).await, paths_of(files));
        let Ok(Found::Record(record)) = ledger::inspect(head.metadata()) else {
            panic!("the ledger does not hold the record of the switch")
        };
        assert_eq!(*record, ours());
    }

    /// Asserts that nothing of the switch is visible, and these files of others are.
    async fn assert_unseen(&self, files: &[&DataFile]) {
        let head = self.head().await;
        assert_eq!(snapshots_of(&head, ours().attempt), 0);
        assert!(!ledger::has_landed(head.metadata(), ours().attempt));
        assert_ne!(head.metadata().properties().get(PROPERTY), Some(&ours().to_property()));
        assert_eq!(files_on(&head).await, paths_of(files));
    }
}

/// A file that exists; nobody reads its rows here.
async fn data_file(table: &Table, name: &str) -> DataFile {
    let path = format!("{}/data/{name}", table.metadata().location());
    table.file_io().new_output(&path).unwrap().write("rows".into()).await.unwrap();
    DataFileBuilder::default()
        .content(DataContentType::Data)
        .file_path(path)
        .file_format(DataFileFormat::Parquet)
        .record_count(FILE_ROWS)
        .file_size_in_bytes(4)
        .partition_spec_id(0)
        .build()
        .unwrap()
}

/// Every snapshot of the table, on the ancestry or not.
fn snapshots_of(table: &Table, attempt: Uuid) -> usize {
    let attempt = attempt.to_string();
    let summaries = table.metadata().snapshots().map(|snapshot| &snapshot.summary().additional_properties);
    summaries.filter(|summary| summary.get("tidemill.attempt") == Some(&attempt)).count()
}

/// What a reader of the table would open: a file that was appended twice stands here twice.
async fn files_on(table: &Table) -> Vec<String> {
    let tasks = table.scan().build().unwrap().plan_files().await.unwrap();
    let mut paths: Vec<String> = tasks.map_ok(|task| task.data_file_path).try_collect().await.unwrap();
    paths.sort();
    paths
}

fn paths_of(files: &[&DataFile]) -> Vec<String> {
    let mut paths: Vec<String> = files.iter().map(|file| file.file_path().to_owned()).collect();
    paths.sort();
    paths
}

#[tokio::test]
async fn a_commit_whose_reply_is_lost_has_landed_and_is_not_sent_again() {
    let stand = Stand::new().await;
    let catalog = Scripted::new(&stand.inner, [act(Work::Done, Some(lost_reply()))]);
    let landed = stand.switch(&catalog).await.unwrap();
    assert_eq!((landed.sends, catalog.requests()), (1, 1));
    stand.assert_landed_once(&landed, &[&stand.file]).await;
}

#[tokio::test]
async fn a_refusal_of_what_was_done_all_the_same_counts_for_nothing() {
    let stand = Stand::new().await;
    let catalog = Scripted::new(&stand.inner, [act(Work::Done, Some(forbidden()))]);
    let landed = stand.switch(&catalog).await.unwrap();
    assert_eq!((landed.sends, catalog.requests()), (1, 1));
    stand.assert_landed_once(&landed, &[&stand.file]).await;
}

#[tokio::test]
async fn a_success_that_the_table_does_not_show_is_sent_again_and_lands_once() {
    let stand = Stand::new().await;
    let catalog = Scripted::new(&stand.inner, [act(Work::NotDone, None)]);
    let landed = stand.switch(&catalog).await.unwrap();
    assert_eq!((landed.sends, catalog.requests()), (2, 2));
    stand.assert_landed_once(&landed, &[&stand.file]).await;
}

#[tokio::test]
async fn an_append_of_another_writer_in_between_is_kept_and_built_upon() {
    let stand = Stand::new().await;
    // the real catalog answers: its own conflict, which iceberg's transaction would take as leave to repeat
    let meanwhile = Meanwhile::ForeignAppend(Box::new(stand.foreign.clone()));
    let catalog = Scripted::new(&stand.inner, [Act { meanwhile, work: Work::Done, answer: None }]);
    let landed = stand.switch(&catalog).await.unwrap();
    assert_eq!((landed.sends, catalog.requests()), (2, 2));
    stand.assert_landed_once(&landed, &[&stand.file, &stand.foreign]).await;
}

#[tokio::test]
async fn a_conflict_is_not_repeated_onto_a_head_that_another_owner_took() {
    let stand = Stand::new().await;
    let meanwhile = Meanwhile::OtherOwner;
    let catalog = Scripted::new(&stand.inner, [Act { meanwhile, work: Work::Done, answer: None }]);
    let Err(SwitchError::Moved { found, metadata, .. }) = stand.switch(&catalog).await else {
        panic!("the switch did not say that the table moved")
    };
    assert_eq!(found, "it is at epoch 4");
    assert_eq!(&*metadata, stand.head().await.metadata(), "the caller reads the record of the head");
    assert_eq!(catalog.requests(), 1);
    stand.assert_unseen(&[]).await;
}

#[tokio::test]
async fn an_owner_that_comes_between_inspection_and_request_stops_the_request() {
    let stand = Stand::new().await;
    // the first load is the inspection, the second the transaction's own
    let loads = [(Meanwhile::Nothing, None), (Meanwhile::OtherOwner, None)];
    let catalog = Scripted::with_loads(&stand.inner, [], loads);
    let outcome = stand.switch(&catalog).await;
    assert!(matches!(outcome, Err(SwitchError::Moved { .. })));
    assert_eq!(catalog.requests(), 0);
    stand.assert_unseen(&[]).await;
}

#[tokio::test]
async fn a_request_that_is_served_late_is_the_one_that_lands() {
    let stand = Stand::new().await;
    let late = Act { meanwhile: Meanwhile::HeldArrives, work: Work::Done, answer: None };
    let catalog = Scripted::new(&stand.inner, [act(Work::Held, Some(lost_reply())), late]);
    let landed = stand.switch(&catalog).await.unwrap();
    assert_eq!((landed.sends, catalog.requests()), (2, 2));
    stand.assert_landed_once(&landed, &[&stand.file]).await;
}

#[tokio::test]
async fn a_request_that_is_served_after_its_successor_is_refused_by_the_head_it_asserts() {
    let stand = Stand::new().await;
    let catalog = Scripted::new(&stand.inner, [act(Work::Held, Some(lost_reply()))]);
    let landed = stand.switch(&catalog).await.unwrap();
    assert_eq!((landed.sends, catalog.requests()), (2, 2));
    let late = catalog.serve_held().await.unwrap_err();
    assert_eq!(late.kind(), ErrorKind::CatalogCommitConflicts, "{late}");
    stand.assert_landed_once(&landed, &[&stand.file]).await;
}

#[tokio::test]
async fn a_commit_that_landed_before_is_recognised_without_a_request() {
    let stand = Stand::new().await;
    let first = stand.switch(&Scripted::new(&stand.inner, [])).await.unwrap();
    assert_eq!(first.sends, 1);
    let catalog = Scripted::new(&stand.inner, []);
    let again = stand.switch(&catalog).await.unwrap();
    assert_eq!((again.sends, catalog.requests()), (0, 0));
    stand.assert_landed_once(&again, &[&stand.file]).await;
}

#[tokio::test]
async fn a_definite_refusal_ends_the_switch_after_one_request() {
    let stand = Stand::new().await;
    let catalog = Scripted::new(&stand.inner, [act(Work::NotDone, Some(forbidden()))]);
    let Err(SwitchError::Refused { sends, definite, source, .. }) = stand.switch(&catalog).await else {
        panic!("the switch did not say that it was refused")
    };
    assert_eq!((sends, definite, catalog.requests()), (1, true, 1));
    assert_eq!(catalog::reason_of(&source), Reason::NotAuthorized);
    stand.assert_unseen(&[]).await;
}

/// The first request may be under way still, so that "forbidden" for the second says nothing about it.
#[tokio::test]
async fn a_refusal_after_a_lost_reply_is_not_definite_and_the_switch_keeps_trying() {
    let stand = Stand::new().await;
    let script = [act(Work::NotDone, Some(lost_reply())), act(Work::NotDone, Some(forbidden()))];
    let catalog = Scripted::new(&stand.inner, script);
    let landed = stand.switch(&catalog).await.unwrap();
    assert_eq!((landed.sends, catalog.requests()), (3, 3));
    stand.assert_landed_once(&landed, &[&stand.file]).await;
}

#[tokio::test]
async fn a_table_that_can_not_be_read_back_at_once_is_read_again_and_not_sent_again() {
    let stand = Stand::new().await;
    let away = || Error::new(ErrorKind::Unexpected, "Failed to execute http request");
    let loads = [(Meanwhile::Nothing, None), (Meanwhile::Nothing, None), (Meanwhile::Nothing, Some(away()))];
    let catalog = Scripted::with_loads(&stand.inner, [act(Work::Done, Some(lost_reply()))], loads);
    let landed = stand.switch(&catalog).await.unwrap();
    assert!(catalog.loads.lock().unwrap().is_empty(), "the failing load took place");
    assert_eq!((landed.sends, catalog.requests()), (1, 1));
    stand.assert_landed_once(&landed, &[&stand.file]).await;
}

#[tokio::test]
async fn a_table_that_is_dropped_after_a_request_leaves_the_outcome_open() {
    let stand = Stand::new().await;
    let dropped = Act { meanwhile: Meanwhile::TableDropped, work: Work::NotDone, answer: Some(lost_reply()) };
    let catalog = Scripted::new(&stand.inner, [dropped]);
    let Err(SwitchError::Away { sent, source, .. }) = stand.switch(&catalog).await else {
        panic!("the switch did not say that the table can not be read")
    };
    assert_eq!((sent, source.kind(), catalog.requests()), (true, ErrorKind::TableNotFound, 1));
}

#[tokio::test]
async fn a_table_that_is_gone_before_the_first_request_is_told_apart() {
    let stand = Stand::new().await;
    stand.inner.drop_table(stand.table.identifier()).await.unwrap();
    let catalog = Scripted::new(&stand.inner, []);
    let outcome = stand.switch(&catalog).await;
    assert!(matches!(outcome, Err(SwitchError::Away { sent: false, .. })));
    assert_eq!(catalog.requests(), 0);
}

#[tokio::test]
async fn data_files_that_are_deleted_between_two_requests_are_not_sent_again() {
    let stand = Stand::new().await;
    let path = stand.file.file_path().to_owned();
    let meanwhile = Meanwhile::FileDeleted(path.clone());
    let swept = Act { meanwhile, work: Work::NotDone, answer: Some(lost_reply()) };
    let catalog = Scripted::new(&stand.inner, [swept]);
    let Err(SwitchError::FilesGone { count, first }) = stand.switch(&catalog).await else {
        panic!("the switch did not say that its files are gone")
    };
    assert_eq!((count, first, catalog.requests()), (1, path, 1));
    stand.assert_unseen(&[]).await;
}

#[tokio::test]
async fn a_table_that_was_created_anew_under_the_name_gets_nothing() {
    let stand = Stand::new().await;
    let replaced = Act { meanwhile: Meanwhile::TableReplaced, work: Work::NotDone, answer: Some(conflict()) };
    let catalog = Scripted::new(&stand.inner, [replaced]);
    let Err(SwitchError::Replaced { expected, found, .. }) = stand.switch(&catalog).await else {
        panic!("the switch did not say that the table was replaced")
    };
    let head = stand.head().await;
    assert_eq!((expected, found), (stand.table.metadata().uuid(), head.metadata().uuid()));
    assert_ne!(expected, found);
    assert_eq!((head.metadata().snapshots().count(), catalog.requests()), (0, 1));
}

#[tokio::test]
async fn a_transaction_can_not_repeat_its_request_below_the_switch() {
    let stand = Stand::new().await;
    let catalog = Scripted::new(&stand.inner, [act(Work::NotDone, Some(conflict()))]);
    let one_shot = OneShot::new(&(Arc::clone(&catalog) as _), &stand.table);
    let transaction = Transaction::new(&stand.table);
    let append = transaction.fast_append().add_data_files([stand.file.clone()]);
    let outcome = append.apply(transaction).unwrap().commit(&one_shot).await;
    let error = outcome.unwrap_err();
    assert_eq!((error.kind(), error.retryable()), (ErrorKind::CatalogCommitConflicts, false));
    assert_eq!(catalog.requests(), 1);
}

#[tokio::test]
async fn the_wrapped_catalog_lets_one_request_through_and_refuses_the_next() {
    let stand = Stand::new().await;
    // only a transaction can make requests, so two are caught before they are served
    let catcher = Scripted::new(&stand.inner, [act(Work::Held, None), act(Work::Held, None)]);
    let catching: Arc<dyn Catalog> = Arc::clone(&catcher) as _;
    append(&catching, &stand.table, vec![stand.file.clone()], None).await;
    append(&catching, &stand.table, vec![stand.foreign.clone()], None).await;
    let caught = std::mem::take(&mut *catcher.held.lock().unwrap());
    let [first, second] = <[TableCommit; 2]>::try_from(Vec::from(caught)).unwrap();

    let catalog = Scripted::new(&stand.inner, []);
    let one_shot = OneShot::new(&(Arc::clone(&catalog) as _), &stand.table);
    one_shot.update_table(first).await.unwrap();
    for error in [
        one_shot.update_table(second).await.unwrap_err(),
        one_shot.load_table(stand.table.identifier()).await.unwrap_err(),
    ] {
        assert_eq!((error.kind(), error.retryable()), (ErrorKind::PreconditionFailed, false));
    }
    assert_eq!(catalog.requests(), 1);
    assert_eq!(files_on(&stand.head().await).await, paths_of(&[&stand.file]));
}

#[tokio::test]
async fn a_commit_below_another_writers_append_has_landed() {
    let stand = Stand::new().await;
    let landed = stand.switch(&Scripted::new(&stand.inner, [])).await.unwrap();
    let head = append(&stand.inner, &landed.table, vec![stand.foreign.clone()], None).await;
    assert!(ledger::has_landed(head.metadata(), ours().attempt));
    assert!(ledger::has_landed(head.metadata(), standing().attempt));
    assert!(!ledger::has_landed(head.metadata(), other_owner().attempt));
}

#[tokio::test]
async fn a_commit_that_was_rolled_back_has_not_landed_although_the_property_names_it() {
    let stand = Stand::new().await;
    let landed = stand.switch(&Scripted::new(&stand.inner, [])).await.unwrap();
    let snapshot_id = stand.table.metadata().current_snapshot_id().unwrap();
    let retention = SnapshotRetention::branch(None, None, None);
    let builder = landed.table.metadata().clone().into_builder(None);
    let builder = builder.set_ref("main", SnapshotReference { snapshot_id, retention }).unwrap();
    let rolled_back = builder.build().unwrap().metadata;
    assert_eq!(rolled_back.properties().get(PROPERTY), Some(&ours().to_property()));
    assert!(!ledger::has_landed(&rolled_back, ours().attempt));
    assert!(ledger::has_landed(&rolled_back, standing().attempt));
    let Ok(Found::RolledBack { older: Some(older), newer, is_undone: false }) = ledger::inspect(&rolled_back)
    else {
        panic!("nothing tells that the table was rolled back")
    };
    assert_eq!((older.attempt, newer.attempt), (standing().attempt, ours().attempt));
}

#[tokio::test]
async fn a_commit_whose_snapshot_was_expired_has_landed_by_the_word_of_the_property() {
    let stand = Stand::new().await;
    let landed = stand.switch(&Scripted::new(&stand.inner, [])).await.unwrap();
    let expired: Vec<i64> = landed.table.metadata().snapshots().map(|known| known.snapshot_id()).collect();
    let head = append(&stand.inner, &landed.table, vec![stand.foreign.clone()], None).await;
    let builder = head.metadata().clone().into_builder(None).remove_snapshots(&expired);
    let cut_off = builder.build().unwrap().metadata;
    assert_eq!(cut_off.snapshots().count(), 1);
    assert!(!ledger::attempt_on_ancestry(&cut_off, ours().attempt));
    assert!(ledger::has_landed(&cut_off, ours().attempt));
    assert!(!ledger::has_landed(&cut_off, standing().attempt));
}
