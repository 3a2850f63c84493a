//! The world as the pipeline meets it: a catalog, a lock file, a clock.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use iceberg::spec::{DataFile, TableMetadata};
use iceberg::table::Table;
use iceberg::{Catalog, TableIdent};
use serde_json::Value;
use uuid::Uuid;

use super::profile::Stage;
use super::survey::{self, Survey};
use super::{RunOptions, stops};
use crate::catalog;
use crate::commit::ledger::{Cursor, DedupRecord, LIVE_LANE, LedgerRecord, Others, Suppressed};
use crate::commit::lock::StateLock;
use crate::commit::side::Role;
use crate::commit::switch;
use crate::commit::upkeep::Upkeep;
use crate::dedup;
use crate::job::file::LoadedJob;
use crate::offset::TopicPartition;
use crate::protocol::{self, AllTables, Answer, Below, Heads, Request, Tables, Terms, World};
use crate::sink::{scan, schema, writer};
use crate::stop::{Reason, Stop};

/// A lease outlives this many of the longest microbatches: each commit renews it.
const LEASE_MICROBATCHES: u32 = 3;
/// Shortest lease: a slow close of files or a rebuild must not look like a death.
const LEASE_MIN: Duration = Duration::from_secs(10 * 60);

/// Tables of a catalog.
#[derive(Clone)]
pub(crate) struct CatalogTables {
    pub(crate) catalog: Arc<dyn Catalog>,
}

impl Tables for CatalogTables {
    type Table = Table;
    type File = DataFile;

    fn metadata(table: &Table) -> &TableMetadata {
        table.metadata()
    }

    async fn find(&self, table: &TableIdent) -> Result<Option<Table>, Stop> {
        catalog::load(&*self.catalog, table).await.map_err(stops::catalog)
    }

    async fn load(&self, table: &TableIdent) -> Result<Table, Box<iceberg::Error>> {
        switch::reload(&self.catalog, table).await
    }

    async fn send(&self, head: &Table, request: &Request<DataFile>) -> Answer {
        switch::send(&self.catalog, head, request).await
    }

    async fn missing(&self, table: &Table, files: &[DataFile]) -> Result<Vec<String>, Box<iceberg::Error>> {
        let mut missing = Vec::new();
        for file in files {
            let input = table.file_io().new_input(file.file_path())?;
            if !input.exists().await? {
                missing.push(file.file_path().to_owned());
            }
        }
        Ok(missing)
    }

    fn now_ms(&self) -> i64 {
        chrono::Utc::now().timestamp_millis()
    }

    /// For the protocol, which says what it waits for; the simulator has a clock of its own.
    async fn wait(&self, time: Duration) {
        // The time itself is the condition: that nothing happens in it (R9), or that this machine's clock catches up.
        tokio::time::sleep(time).await;
    }

    /// 0.2 s, doubled with each send, and up to as much again at random so that two writers do not march in step.
    async fn back_off(&self, sends: u32) {
        let base = Duration::from_millis(100) * 2u32.pow(sends.min(6));
        // The head that is loaded next is the condition; a catalog tells nobody that it is free again.
        tokio::time::sleep(base + base.mul_f64(rand::random::<f64>())).await;
    }

    fn new_id(&self) -> Uuid {
        Uuid::now_v7()
    }
}

/// See the module.
pub(super) struct Outside<'a> {
    pub(super) loaded: &'a LoadedJob,
    pub(super) options: &'a RunOptions,
    pub(super) tables: CatalogTables,
    pub(super) terms: Terms,
    /// What a first record takes over.
    pub(super) inheritance: Inheritance,
    lock: StateLock,
}

/// What a first record takes over from a table that has rows.
#[derive(Debug, Default)]
pub(super) enum Inheritance {
    /// Nothing: the table is empty.
    #[default]
    Nothing,
    /// Rows that are not ours, whether they count as seen or not.
    Others(Others),
    /// All of it: the table had a ledger that was lost.
    Ledger(Box<AdoptedLedger>),
}

/// What is known of a ledger that was lost.
#[derive(Debug, Clone)]
pub(super) struct AdoptedLedger {
    pub(super) job_id: Uuid,
    /// Epoch of the newest generation that is known.
    pub(super) epoch: u64,
    pub(super) batch: u64,
    pub(super) last_batch_with_rows: u64,
    /// By which side tables know the batch.
    pub(super) batch_generation: Option<String>,
    pub(super) dedup: DedupRecord,
    /// The table of erased keys, if it stands there.
    pub(super) suppressed: Option<Suppressed>,
    /// Rows of others, where they count as seen.
    pub(super) others: Option<Others>,
    /// Cursor of each topic partition that has a row.
    pub(super) cursors: BTreeMap<TopicPartition, Cursor>,
}

impl<'a> Outside<'a> {
    pub(super) fn new(
        loaded: &'a LoadedJob,
        options: &'a RunOptions,
        lock: StateLock,
        survey: &Survey,
    ) -> Self {
        let tables = CatalogTables { catalog: Arc::clone(&survey.catalog) };
        let terms = terms(loaded, options, survey);
        Self { loaded, options, tables, terms, inheritance: Inheritance::Nothing, lock }
    }
}

impl Outside<'_> {
    /// What main, or the side table of a role, has otherwise than the job.
    fn compare(&self, role: Option<Role>, table: &Table) -> Result<schema::Comparison, Stop> {
        let job = &self.loaded.job;
        match role {
            None => schema::compare(table, job).map_err(stops::schema),
            Some(role) => survey::compare_side(table, role, job),
        }
    }
}

fn terms(loaded: &LoadedJob, options: &RunOptions, survey: &Survey) -> Terms {
    let job = &loaded.job;
    Terms {
        job_name: job.name.clone(),
        job_shown: options.job_shown.clone(),
        job_hash: loaded.resolved_hash.clone(),
        main: survey.main_ident.clone(),
        sides: survey.side_idents.clone(),
        lease: options.lease.unwrap_or((job.microbatch.open_time_max * LEASE_MICROBATCHES).max(LEASE_MIN)),
        takeover: options.takeover,
        dedup: DedupRecord {
            generation: None,
            checksum: None,
            seed: 0,
            key_spec_hash: String::new(),
            shards: job.dedup.shards,
            bucket_width_ms: dedup::bucket_width_ms(job.dedup.window, job.dedup.repeats),
            eras: Vec::new(),
            repeats: job.dedup.repeats,
            floor: None,
            complete_since: None,
            keys: 0,
            digest: String::new(),
        },
    }
}

/// The stage that begins where the protocol reaches this.
fn stage_after(phase: &str) -> Option<Stage> {
    match phase {
        "data_files_closed" | "published" => Some(Stage::State),
        "state_prepared" => Some(Stage::Commit),
        _ => None,
    }
}

impl World for Outside<'_> {
    type Tables = CatalogTables;

    fn tables(&self) -> &CatalogTables {
        &self.tables
    }

    fn terms(&self) -> &Terms {
        &self.terms
    }

    fn reach(&self, phase: &'static str) {
        if let Some(stage) = stage_after(phase) {
            self.options.profile.turn_to(stage);
        }
        self.options.phases.reach(phase);
    }

    fn knows_as_dead(&self, owner: Uuid) -> bool {
        self.lock.knows_as_dead(owner)
    }

    fn epoch_max(&self) -> u64 {
        self.lock.epoch_max()
    }

    async fn record_owner(&mut self, owner: Uuid, epoch: u64) -> Result<(), Stop> {
        self.lock.record_owner(owner, epoch).map_err(stops::lock)
    }

    async fn has_rows_of(&self, table: &Table, batch: u64) -> Result<bool, Stop> {
        scan::has_batch(table, batch).await.map_err(|error| {
            stops::data(format!("table {} can not be scanned", self.terms.main), error.reason(), error)
        })
    }

    fn draw_seed(&self) -> Result<(u64, String), Stop> {
        let (job, seed) = (&self.loaded.job, rand::random());
        let rows = super::owner::new_decoder(job)?.schema();
        let encoder = survey::key_encoder(&rows, job, seed)?;
        Ok((seed, encoder.key_spec_hash(job.dedup.shards, &job.bucket_source(), job.dedup.repeats)))
    }

    async fn ensure_tables(&self, (main, mut sides): Heads<Table>) -> Result<AllTables<Self>, Stop> {
        let (job, catalog) = (&self.loaded.job, &*self.tables.catalog);
        let main = match main {
            Some(table) => table,
            None => schema::create_main(catalog, job).await.map_err(stops::schema)?,
        };
        // A rival may have made them in between, from another job.
        survey::refuse_differences(&self.terms.main, &self.compare(None, &main)?, job)?;
        for (&role, ident) in &self.terms.sides {
            let table = match (sides.remove(&role), role) {
                (Some(table), _) => table,
                (None, Role::DeadLetters) => {
                    schema::create_dead_letters(catalog, job).await.map_err(stops::schema)?
                }
                (None, Role::Late) => schema::create_late(catalog, job).await.map_err(stops::schema)?,
            };
            survey::refuse_differences(ident, &self.compare(Some(role), &table)?, job)?;
            sides.insert(role, table);
        }
        Ok((main, sides))
    }

    async fn add_columns(&self, role: Option<Role>, table: &Table) -> Result<Option<Table>, Stop> {
        let (ident, catalog) = (table.identifier(), &self.tables.catalog);
        let additions = self.compare(role, table)?.additions;
        if additions.is_empty() {
            return Ok(None);
        }
        schema::add_columns(&**catalog, table, &additions).await.map_err(stops::schema)?;
        let again = switch::reload(catalog, ident)
            .await
            .map_err(|error| protocol::stops::unreadable(ident, *error))?;
        let comparison = self.compare(role, &again)?;
        if comparison.additions.is_empty() && comparison.refusals.is_empty() {
            return Ok(Some(again));
        }
        Err(Stop::new(
            Reason::TableChanged,
            format!("table {ident} does not show the columns that were added to it"),
            "nothing was read; run again",
        ))
    }

    fn inherit(&self, first: &mut LedgerRecord) {
        match &self.inheritance {
            Inheritance::Nothing => {}
            Inheritance::Others(others) => {
                first.batch = others.batch_max;
                first.others = Some(others.clone());
            }
            Inheritance::Ledger(known) => {
                (first.job_id, first.epoch) = (known.job_id, known.epoch);
                (first.batch, first.last_batch_with_rows) = (known.batch, known.last_batch_with_rows);
                first.batch_generation.clone_from(&known.batch_generation);
                first.dedup.clone_from(&known.dedup);
                first.suppressed.clone_from(&known.suppressed);
                first.others.clone_from(&known.others);
                let lane = first.lanes.entry(LIVE_LANE.to_owned()).or_default();
                for (name, cursor) in &known.cursors {
                    lane.topics.entry(name.topic.clone()).or_default().insert(name.partition, *cursor);
                }
            }
        }
    }

    fn back_to(&self, snapshot_id: i64) -> Result<Option<Upkeep>, Stop> {
        super::commands::back_to(&self.loaded.job, snapshot_id).map(Some)
    }

    fn files_of_ledger(&self, stored: &[Value], table: &Table) -> Result<Vec<DataFile>, Below> {
        Ok(writer::files_from_json(stored, table)?)
    }

    async fn damaged(&self, table: &Table, files: &[DataFile]) -> Result<Vec<String>, Stop> {
        let damaged = writer::files_exist(table, files).await.map_err(|error| {
            let what = format!("files of side table {} can not be looked up", table.identifier());
            stops::data(what, error.reason(), error)
        })?;
        Ok(damaged.into_iter().map(|file| file.path).collect())
    }
}
