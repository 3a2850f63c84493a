//! Facts of a start, read and not changed: broker, catalog, tables, ledger.
//!
//! `plan` prints them, `run` judges them. Nothing here creates a topic or a table. Opening an SQLite catalog makes its
//! file and the warehouse's folder, as every client of it does.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use iceberg::table::Table;
use iceberg::{Catalog, TableIdent};

use super::stops;
use super::world::CatalogTables;
use crate::catalog;
use crate::commit::ledger::{self, Cursor, Found, LedgerError, LedgerRecord};
use crate::commit::request;
use crate::commit::side::{self, Role};
use crate::dedup;
use crate::fingerprint::KeyEncoder;
use crate::job::{Job, StartPosition};
use crate::memory::MemoryPlan;
use crate::mutant;
use crate::offset::{NextOffset, TopicId, TopicPartition};
use crate::protocol::start::SideFacts;
use crate::protocol::{self, Tables};
use crate::sink::scan::{self, rows_of};
use crate::sink::schema::{self, Comparison};
use crate::source::{ClusterFacts, Connection, OffsetRange};
use crate::stop::{Reason, Stop};

/// What a start found.
pub struct Survey {
    /// The catalog.
    pub catalog: Arc<dyn Catalog>,
    /// Main table's name.
    pub main_ident: TableIdent,
    /// Names of the side tables that the job uses or its ledger knows; without a ledger, of those that are marked as its own too.
    pub side_idents: BTreeMap<Role, TableIdent>,
    /// Main table, if it exists.
    pub main: Option<Table>,
    /// Those of the side tables that exist.
    pub sides: BTreeMap<Role, Table>,
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
        let all_idents = side_idents(job)?;
        let is_used = |role: &Role, found: &Found| uses(job, *role) || is_known(found, *role);
        let used = |found: &Found| {
            let used = all_idents.iter().filter(|(role, _)| is_used(role, found));
            used.map(|(role, ident)| (*role, ident.clone())).collect::<BTreeMap<_, _>>()
        };
        let tables = CatalogTables { catalog: Arc::clone(&catalog) };
        let mut side_idents = used(&Found::Nothing);
        let (mut main, mut sides) = protocol::heads(&tables, &main_ident, &side_idents).await?;
        let mut found = ledger_of(main.as_ref(), &main_ident)?;
        if used(&found).len() > side_idents.len() {
            // The ledger knows a table that the job does not use any more.
            side_idents = used(&found);
            (main, sides) = protocol::heads(&tables, &main_ident, &side_idents).await?;
            found = ledger_of(main.as_ref(), &main_ident)?;
        }
        if matches!(found, Found::Nothing) {
            // Nor does a ledger that is lost say which it knew. The mark of a table does.
            for (role, ident) in &all_idents {
                let unused = match side_idents.contains_key(role) {
                    true => None,
                    false => tables.find(ident).await?,
                };
                let Some(table) = unused else { continue };
                let is_ours = follows(&table, job).map_err(|error| stops::ledger(ident, error))?;
                if mutant!("unused-late-table-passed-over", false => is_ours) {
                    side_idents.insert(*role, ident.clone());
                    sides.insert(*role, table);
                }
            }
        }
        let comparison = match &main {
            Some(table) => schema::compare(table, job).map_err(stops::schema)?,
            None => Comparison::default(),
        };
        for (role, table) in &sides {
            refuse_differences(&side_idents[role], &compare_side(table, *role, job)?, job)?;
        }
        let connection =
            Connection::open(&job.source, memory.client_queue, &job.name).map_err(stops::source)?;
        let cluster = connection.describe().map_err(stops::source)?;
        let offsets = connection.offsets(&cluster.topic_partitions()).map_err(stops::source)?;
        Ok(Self {
            catalog,
            main_ident,
            side_idents,
            main,
            sides,
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
        self.found.record()
    }

    /// Rows in main's current snapshot, as its summary says; a table without that figure counts as having rows.
    pub fn table_rows(&self) -> u64 {
        self.main.as_ref().map_or(0, rows_of)
    }

    /// Whether somebody asks the owner of main for something.
    pub fn has_requests(&self) -> bool {
        let asks = |name: &String| name.starts_with(request::PREFIX);
        self.main.as_ref().is_some_and(|table| table.metadata().properties().keys().any(asks))
    }

    /// Main and the side tables whose rows make the dedup state, as far as they exist.
    pub fn tables_with_keys(&self) -> impl Iterator<Item = &Table> {
        let sides = self.sides.iter().filter(|(role, _)| role.holds_keys()).map(|(_, table)| table);
        self.main.iter().chain(sides)
    }

    /// What a start judges of the side tables.
    ///
    /// # Errors
    /// A mark can not be read.
    pub fn side_facts(&self) -> Result<BTreeMap<Role, SideFacts<'_>>, Stop> {
        let mut facts = BTreeMap::new();
        for (role, ident) in &self.side_idents {
            let metadata = self.sides.get(role).map(Table::metadata);
            let mark = metadata.map(side::inspect).transpose();
            let mark = mark.map_err(|error| stops::ledger(ident, error))?.flatten();
            let uuid = metadata.map(iceberg::spec::TableMetadata::uuid);
            let rows = self.sides.get(role).map_or(0, rows_of);
            facts.insert(*role, SideFacts { table: ident.to_string(), uuid, mark, rows, metadata });
        }
        Ok(facts)
    }

    /// Topic ids as the broker says, for every topic of the job.
    pub fn topic_ids(&self) -> BTreeMap<String, Option<TopicId>> {
        self.cluster.topics.iter().map(|facts| (facts.topic.clone(), facts.id)).collect()
    }

    /// Id of one topic.
    pub fn topic_id(&self, topic: &str) -> Option<TopicId> {
        self.cluster.topics.iter().find(|facts| facts.topic == topic)?.id
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
                    let new = mutant!("new-topic-partitions-at-their-end", range.end => range.low);
                    let end = |cursor: &Cursor| mutant!("start-from-the-broker", range.low => cursor.end);
                    (name.clone(), known.map_or(new, end))
                })
                .collect()),
        }
    }
}

impl Survey {
    /// Where a job whose ledger is lost begins once more: no later than it began at first, as far as the broker still has it.
    ///
    /// What a start means now may lie after that: a time that no record had reached then, an offset of a topic that was made
    /// again since. So it begins no later than the first row of a topic partition either, and where there is none, or rows
    /// of offsets that its log does not reach, at its earliest offset: those are of a topic before it. A log that has
    /// outgrown such rows can not be told from theirs.
    ///
    /// # Errors
    /// The broker does not answer.
    pub fn starts_again(
        &self,
        job: &Job,
        rows: &BTreeMap<TopicPartition, scan::Span>,
    ) -> Result<BTreeMap<TopicPartition, NextOffset>, Stop> {
        let means_now = match &job.source.start {
            StartPosition::Timestamp(_) => self.starts(job, None)?,
            StartPosition::Offsets(named) => {
                let at = |name: &TopicPartition| named.get(&name.topic)?.get(&name.partition).copied();
                let named = self.offsets.keys().filter_map(|name| Some((name.clone(), at(name)?)));
                named.map(|(name, offset)| (name, NextOffset::at(offset))).collect()
            }
            // What was the end at the first start is known to nobody any more.
            StartPosition::Earliest | StartPosition::Latest => BTreeMap::new(),
        };
        let start = |(name, range): (&TopicPartition, &OffsetRange)| {
            (name.clone(), start_again(*range, means_now.get(name).copied(), rows.get(name).copied()))
        };
        Ok(self.offsets.iter().map(start).collect())
    }
}

/// See [`Survey::starts_again`].
fn start_again(range: OffsetRange, means_now: Option<NextOffset>, rows: Option<scan::Span>) -> NextOffset {
    let is_of_log = |span: &scan::Span| span.offset_max < range.end.get();
    let first = means_now.zip(rows.filter(is_of_log));
    let first = first.map(|(now, span)| now.min(NextOffset::at(span.offset_min)));
    first.unwrap_or(range.low).clamp(range.low, range.end)
}

fn ledger_of(main: Option<&Table>, ident: &TableIdent) -> Result<Found, Stop> {
    let found =
        main.map(|table| ledger::inspect(table.metadata()).map_err(|error| stops::ledger(ident, error)));
    found.unwrap_or(Ok(Found::Nothing))
}

/// Names of a job's side tables, whether it uses them or not.
///
/// # Errors
/// `USAGE`: a name is none.
pub fn side_idents(job: &Job) -> Result<BTreeMap<Role, TableIdent>, Stop> {
    let ident = |role: Role| {
        let name = match role {
            Role::DeadLetters => &job.sink.dead_letters.table,
            Role::Late => &job.sink.late.table,
        };
        schema::table_ident(name).map(|ident| (role, ident)).map_err(stops::schema)
    };
    Role::ALL.into_iter().map(ident).collect()
}

/// Whether a job writes to the side table of a role.
pub fn uses(job: &Job, role: Role) -> bool {
    match role {
        Role::DeadLetters => true,
        Role::Late => job.uses_late_table(),
    }
}

/// Whether a side table is marked as the job's.
///
/// # Errors
/// Its mark can not be read.
pub fn follows(table: &Table, job: &Job) -> Result<bool, LedgerError> {
    let mark = side::inspect(table.metadata())?;
    Ok(mark.is_some_and(|mark| mark.is_of(&job.name, &job.sink.table.join("."))))
}

/// Whether a ledger knows a side table of a role, whatever the job says now.
pub fn is_known(found: &Found, role: Role) -> bool {
    let knows = |record: &LedgerRecord| record.sides.contains_key(role.name());
    match found {
        Found::Nothing => false,
        Found::Record(record) | Found::CutOff(record) => knows(record),
        // A replay sets back what the newer record knew.
        Found::RolledBack { older, newer, .. } => knows(newer) || older.as_deref().is_some_and(knows),
    }
}

/// What a side table has otherwise than the job writes to it.
///
/// # Errors
/// `USAGE`: the job's columns make no schema.
pub fn compare_side(table: &Table, role: Role, job: &Job) -> Result<Comparison, Stop> {
    match role {
        Role::DeadLetters => schema::compare_dead_letters(table),
        Role::Late => schema::compare_late(table, job),
    }
    .map_err(stops::schema)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event_time::EventTimeMs;

    #[test]
    fn a_lost_ledger_begins_no_later_than_rows_of_the_log_and_at_its_low_where_rows_are_of_another() {
        let begins = |(low, end), now: Option<i64>, rows: Option<(i64, i64)>| {
            let span = |(offset_min, offset_max)| scan::Span {
                offset_min,
                offset_max,
                event_time_max: EventTimeMs(0),
            };
            let range = OffsetRange { low: NextOffset::at(low), end: NextOffset::at(end) };
            start_again(range, now.map(NextOffset::at), rows.map(span)).get()
        };
        assert_eq!(begins((0, 200), Some(42), Some((42, 100))), 42);
        assert_eq!(begins((0, 200), Some(42), Some((10, 100))), 10);
        assert_eq!(begins((50, 200), Some(42), Some((42, 100))), 50);
        assert_eq!(begins((0, 101), Some(42), Some((42, 100))), 42, "the last row is the log's last record");
        assert_eq!(begins((0, 61), Some(42), Some((42, 100))), 0, "the topic was made again, and is shorter");
        assert_eq!(begins((0, 200), Some(42), None), 0);
        assert_eq!(begins((7, 200), None, Some((42, 100))), 7);
    }
}
