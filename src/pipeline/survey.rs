//! Facts of a start, read and not changed: broker, catalog, tables, ledger.
//!
//! `plan` prints them, `run` judges them. Nothing here creates a topic or a table. Opening an SQLite catalog makes its
//! file and the warehouse's folder, as every client of it does.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use iceberg::table::Table;
use iceberg::{Catalog, TableIdent};
use uuid::Uuid;

use super::stops;
use crate::catalog;
use crate::commit::ledger::{self, Found, LedgerRecord};
use crate::commit::side::{self, SideMark};
use crate::dedup;
use crate::fingerprint::KeyEncoder;
use crate::job::Job;
use crate::memory::MemoryPlan;
use crate::offset::{NextOffset, TopicId, TopicPartition};
use crate::sink::schema::{self, Comparison};
use crate::source::{ClusterFacts, Connection, OffsetRange};
use crate::stop::{Reason, Stop};

/// Role of the dead-letter table in the ledger.
pub const DEAD_LETTERS: &str = "dead_letters";

/// What a start found.
pub struct Survey {
    /// The catalog.
    pub catalog: Arc<dyn Catalog>,
    /// Main table's name.
    pub main_ident: TableIdent,
    /// Dead-letter table's name.
    pub dead_ident: TableIdent,
    /// Main table, if it exists.
    pub main: Option<Table>,
    /// Dead-letter table, if it exists.
    pub dead: Option<Table>,
    /// What main has otherwise than the job.
    pub comparison: Comparison,
    /// The ledger.
    pub found: Found,
    /// The broker.
    pub connection: Connection,
    /// Cluster and topics.
    pub cluster: ClusterFacts,
    /// What the broker holds of every topic partition of the job.
    pub offsets: BTreeMap<TopicPartition, OffsetRange>,
}

/// Folder of a job's lock and dedup state.
pub fn state_folder(job: &Job) -> PathBuf {
    job.state_dir.join(&job.name)
}

impl Survey {
    /// Asks catalog and broker.
    ///
    /// # Errors
    /// A [`Stop`]: something is away, refused, unknown or of another shape.
    pub async fn take(job: &Job, memory: &MemoryPlan) -> Result<Self, Stop> {
        let catalog = catalog::connect(&job.sink.catalog).await.map_err(stops::catalog)?;
        let main_ident = schema::table_ident(&job.sink.table).map_err(stops::schema)?;
        let dead_ident = schema::table_ident(&job.sink.dead_letters.table).map_err(stops::schema)?;
        // Before main: what it follows has landed in main by then, so a live owner never makes it look ahead.
        let mut dead = catalog::load(&*catalog, &dead_ident).await.map_err(stops::catalog)?;
        let main = catalog::load(&*catalog, &main_ident).await.map_err(stops::catalog)?;
        if dead.is_none() && main.is_some() {
            dead = catalog::load(&*catalog, &dead_ident).await.map_err(stops::catalog)?;
        }
        let comparison = match &main {
            Some(table) => schema::compare(table, job).map_err(stops::schema)?,
            None => Comparison::default(),
        };
        if let Some(dead) = &dead {
            refuse_differences(
                &dead_ident,
                &schema::compare_dead_letters(dead).map_err(stops::schema)?,
                job,
            )?;
        }
        let found = match &main {
            Some(table) => {
                ledger::inspect(table.metadata()).map_err(|error| stops::ledger(&main_ident, error))?
            }
            None => Found::Nothing,
        };
        let connection =
            Connection::open(&job.source, memory.client_queue, &job.name).map_err(stops::source)?;
        let cluster = connection.describe().map_err(stops::source)?;
        let offsets = connection.offsets(&cluster.topic_partitions()).map_err(stops::source)?;
        Ok(Self {
            catalog,
            main_ident,
            dead_ident,
            main,
            dead,
            comparison,
            found,
            connection,
            cluster,
            offsets,
        })
    }

    /// Refuses a table that the job can not write to.
    ///
    /// # Errors
    /// `SCHEMA_DIFFERS`, with every difference.
    pub fn refuse_other_schema(&self, job: &Job) -> Result<(), Stop> {
        refuse_differences(&self.main_ident, &self.comparison, job)
    }

    /// The ledger's record, whatever else is true of it.
    pub fn record(&self) -> Option<&LedgerRecord> {
        match &self.found {
            Found::Record(record) | Found::CutOff(record) => Some(record),
            Found::RolledBack { newer, .. } => Some(newer),
            Found::Nothing => None,
        }
    }

    /// Rows in main's current snapshot, as its summary says; a table without that figure counts as having rows.
    pub fn table_rows(&self) -> u64 {
        let Some(snapshot) = self.main.as_ref().and_then(|table| table.metadata().current_snapshot()) else {
            return 0;
        };
        let total = snapshot.summary().additional_properties.get("total-records");
        total.and_then(|rows| rows.parse().ok()).unwrap_or(u64::MAX)
    }

    /// Side tables that exist, by role.
    pub fn side_uuids(&self) -> BTreeMap<String, Uuid> {
        self.dead.iter().map(|table| (DEAD_LETTERS.to_owned(), table.metadata().uuid())).collect()
    }

    /// Topic ids as the broker says, for every topic of the job.
    pub fn topic_ids(&self) -> BTreeMap<String, Option<TopicId>> {
        self.cluster.topics.iter().map(|facts| (facts.topic.clone(), facts.id)).collect()
    }

    /// Id of one topic.
    pub fn topic_id(&self, topic: &str) -> Option<TopicId> {
        self.cluster.topics.iter().find(|facts| facts.topic == topic)?.id
    }

    /// What the dead-letter table says that it follows.
    ///
    /// # Errors
    /// Its mark can not be read.
    pub fn dead_letter_mark(&self) -> Result<Option<SideMark>, Stop> {
        let Some(dead) = &self.dead else { return Ok(None) };
        side::inspect(dead.metadata()).map_err(|error| stops::ledger(&self.dead_ident, error))
    }

    /// Where each topic partition would be read from: the ledger, else the job's start (first run), else earliest.
    ///
    /// # Errors
    /// The broker does not answer, or an explicit offset lies outside the log.
    pub fn starts(
        &self,
        job: &Job,
        record: Option<&LedgerRecord>,
    ) -> Result<BTreeMap<TopicPartition, NextOffset>, Stop> {
        match record {
            None => self.connection.resolve_start(&job.source.start, &self.offsets).map_err(stops::source),
            Some(record) => Ok(self
                .offsets
                .iter()
                .map(|(name, range)| {
                    let known = record.cursor(&name.topic, name.partition);
                    (name.clone(), known.map_or(range.low, |cursor| cursor.end))
                })
                .collect()),
        }
    }
}

/// Refuses a table that the job can not write to.
///
/// # Errors
/// `SCHEMA_DIFFERS`, with every difference.
pub fn refuse_differences(table: &TableIdent, comparison: &Comparison, job: &Job) -> Result<(), Stop> {
    if comparison.refusals.is_empty() {
        return Ok(());
    }
    let sentences: Vec<String> = comparison.refusals.iter().map(ToString::to_string).collect();
    Err(Stop::new(
        Reason::SchemaDiffers,
        format!("table {table} does not fit the job:\n  {}", sentences.join("\n  ")),
        format!(
            "nothing was read or written; mend the job's columns, or write to a table of its own:\n  \
             tidemill run JOB --set sink.iceberg.table={}_2 --set sink.iceberg.dead_letters.table={}_2 --set state_dir={}_2",
            job.sink.table.join("."),
            job.sink.dead_letters.table.join("."),
            job.state_dir.display()
        ),
    ))
}

/// What a key means under this job: the encoder over the rows that decode gives, with a seed.
///
/// # Errors
/// A key column has no encoding.
pub fn key_encoder(rows: &arrow::datatypes::Schema, job: &Job, seed: u64) -> Result<KeyEncoder, Stop> {
    KeyEncoder::new(rows, &job.dedup.key, seed).map_err(|error| {
        Stop::new(Reason::Usage, "dedup.key can not be used", "mend dedup.key in the job file").because(error)
    })
}

/// Whether the state folder holds generations.
///
/// # Errors
/// The folder can not be read.
pub fn has_local_generations(job: &Job) -> Result<bool, Stop> {
    let folder = state_folder(job);
    let generations = dedup::list_generations(&folder, None).map_err(|error| stops::state(&folder, error))?;
    Ok(!generations.is_empty())
}
