//! What the protocol asks of the world, and what the world answers.

use std::collections::BTreeMap;
use std::time::Duration;

use iceberg::TableIdent;
use iceberg::spec::TableMetadata;
use serde_json::Value;
use uuid::Uuid;

use crate::commit::ledger::{DedupRecord, LedgerRecord};
use crate::commit::side::Role;
use crate::commit::upkeep::Upkeep;
use crate::stop::Stop;

/// One commit as it is sent: everything that it writes. The head that it asserts goes beside it.
#[derive(Debug, Clone)]
pub(crate) struct Request<File> {
    /// The table.
    pub(crate) table: TableIdent,
    /// UUID that the table must still have.
    pub(crate) table_uuid: Uuid,
    /// Identity of this commit; stands in `summary` under `tidemill.attempt`.
    pub(crate) attempt: Uuid,
    /// Data files to append; may be empty.
    pub(crate) files: Vec<File>,
    /// Snapshot summary.
    pub(crate) summary: BTreeMap<String, String>,
    /// Table properties.
    pub(crate) properties: BTreeMap<String, String>,
    /// Snapshot of the table whose files it is to have again, before `files` come; `None` = those of the head.
    pub(crate) back_to: Option<i64>,
    /// Names of table properties that leave.
    pub(crate) properties_removed: Vec<String>,
    /// What a commit of maintenance changes besides.
    pub(crate) upkeep: Option<Upkeep>,
}

impl<File> Request<File> {
    /// The same with what maintenance changes and says besides.
    pub(super) fn with(mut self, upkeep: Option<Upkeep>) -> Self {
        if let Some(upkeep) = &upkeep {
            self.summary.extend(upkeep.summary.clone());
            self.properties.extend(upkeep.properties.clone());
        }
        Self { upkeep, ..self }
    }
}

/// What came of one request. Only a look at the table tells whether it landed.
#[derive(Debug)]
pub(crate) enum Answer {
    /// The catalog says that it is done.
    Done,
    /// Nothing left this machine: the head was another one by the time of sending.
    HeadMoved,
    /// Nothing left this machine, for another reason.
    NotSent(iceberg::Error),
    /// The request was sent and answered with an error: it may be done, or be done later.
    Failed(iceberg::Error),
}

/// Tables as a catalog shows them, and time.
pub(crate) trait Tables {
    /// A table as it was loaded.
    type Table: Clone;
    /// A data file.
    type File: Clone;

    /// Metadata of a loaded table.
    fn metadata(table: &Self::Table) -> &TableMetadata;

    /// Looks for a table: one that is not there is an answer.
    async fn find(&self, table: &TableIdent) -> Result<Option<Self::Table>, Stop>;

    /// Loads a table, with patience for a catalog that does not answer.
    async fn load(&self, table: &TableIdent) -> Result<Self::Table, Box<iceberg::Error>>;

    /// Sends one request, once, that asserts `head`. No layer below repeats it.
    async fn send(&self, head: &Self::Table, request: &Request<Self::File>) -> Answer;

    /// Paths of those files that are not there any more.
    async fn missing(
        &self,
        table: &Self::Table,
        files: &[Self::File],
    ) -> Result<Vec<String>, Box<iceberg::Error>>;

    /// Wall clock, ms since the epoch.
    fn now_ms(&self) -> i64;

    /// Waits.
    async fn wait(&self, time: Duration);

    /// Waits before the next request of a series, the longer the more were sent, and never in step with another writer.
    async fn back_off(&self, sends: u32);

    /// An identity that nobody else has, ordered by time.
    fn new_id(&self) -> Uuid;
}

/// What the protocol has to know of a job.
#[derive(Debug, Clone)]
pub(crate) struct Terms {
    /// Name of the job.
    pub(crate) job_name: String,
    /// Job file as the user named it, for commands in messages.
    pub(crate) job_shown: String,
    /// Hash of the job's meaning.
    pub(crate) job_hash: String,
    /// Main table.
    pub(crate) main: TableIdent,
    /// Side tables that the job uses or its ledger knows.
    pub(crate) sides: BTreeMap<Role, TableIdent>,
    /// How long an owner may be silent before others call it dead.
    pub(crate) lease: Duration,
    /// Take the table over from a living owner.
    pub(crate) takeover: bool,
    /// What a first run's ledger says of its dedup state, but for what it draws.
    pub(crate) dedup: DedupRecord,
}

/// Main and side tables, as far as they exist.
pub(crate) type Heads<Table> = (Option<Table>, BTreeMap<Role, Table>);
/// Main and every side table of the job.
pub(crate) type AllTables<W> = (TableOf<W>, BTreeMap<Role, TableOf<W>>);
/// An error below a [`Stop`].
pub(crate) type Below = Box<dyn std::error::Error + Send + Sync>;
/// A table of this world, as it was loaded.
pub(crate) type TableOf<W> = <<W as World>::Tables as Tables>::Table;
/// A data file of this world.
pub(crate) type FileOf<W> = <<W as World>::Tables as Tables>::File;

/// Everything else that a life needs.
pub(crate) trait World {
    /// See [`Tables`].
    type Tables: Tables;

    /// Tables and time.
    fn tables(&self) -> &Self::Tables;

    /// The job.
    fn terms(&self) -> &Terms;

    /// Says that a point of the protocol is reached: for traces, and for tests that end a process there.
    fn reach(&self, phase: &'static str);

    /// Whether an owner held the lock of this state folder before us and so, the lock being ours, is dead.
    fn knows_as_dead(&self, owner: Uuid) -> bool;

    /// The largest epoch that an owner of this state folder meant to take.
    fn epoch_max(&self) -> u64;

    /// Writes the line of an owner that is about to send its fence, and syncs it.
    async fn record_owner(&mut self, owner: Uuid, epoch: u64) -> Result<(), Stop>;

    /// Whether rows of a microbatch stand in a table.
    async fn has_rows_of(&self, table: &TableOf<Self>, batch: u64) -> Result<bool, Stop>;

    /// The tables of the job, main and side tables, made if they are missing.
    async fn ensure_tables(&self, found: Heads<TableOf<Self>>) -> Result<AllTables<Self>, Stop>;

    /// Adds the columns of the job that main, or the side table of a role, lacks; `None` if it lacks none.
    async fn add_columns(
        &self,
        role: Option<Role>,
        table: &TableOf<Self>,
    ) -> Result<Option<TableOf<Self>>, Stop>;

    /// A seed of fingerprints, and the hash of what a key means under it.
    fn draw_seed(&self) -> Result<(u64, String), Stop>;

    /// Puts into a first record what it takes over from rows that stand in the table already.
    fn inherit(&self, _first: &mut LedgerRecord) {}

    /// How a commit that gives a table the files of an earlier snapshot says that it takes files away; `None` where nobody
    /// reads what kind of commit it is.
    fn back_to(&self, _snapshot_id: i64) -> Result<Option<Upkeep>, Stop> {
        Ok(None)
    }

    /// Files of a side table as the ledger names them; an error says what is wrong with the list.
    fn files_of_ledger(&self, stored: &[Value], table: &TableOf<Self>) -> Result<Vec<FileOf<Self>>, Below>;

    /// Paths of those files of a side table that are gone or cut short.
    async fn damaged(&self, table: &TableOf<Self>, files: &[FileOf<Self>]) -> Result<Vec<String>, Stop>;
}
