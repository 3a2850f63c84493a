//! Everything outside a process: the log, the catalog, folders, the clock, requests under way. What a crash leaves is what
//! stands here.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::sync::Arc;

use iceberg::spec::{
    MAIN_BRANCH, NestedField, Operation, PrimitiveType, Schema, Snapshot, Summary, TableMetadata,
    TableMetadataBuilder, Type,
};
use iceberg::{ErrorKind, TableCreation, TableIdent};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use uuid::Uuid;

use super::oracles;
use crate::commit::ledger::{LedgerRecord, PROPERTY};
use crate::commit::{savepoint, side};
use crate::protocol::Request;

/// The simulated clock begins here, ms since the epoch.
const CLOCK_BEGIN_MS: i64 = 1_800_000_000_000;
/// Stands for a process where the world itself draws a number.
pub(super) const WORLD: usize = 0xFFFF;
/// Name of the one topic.
pub(super) const TOPIC: &str = "events";
/// Stands for the id of a job where no ledger has marked a table yet.
pub(super) const NO_LEDGER: Uuid = Uuid::nil();

/// What all parts share. One thread runs a seed, and a borrow never outlives a step.
pub(super) type Shared = Rc<RefCell<Universe>>;

/// A key of an event.
pub(super) type Key = u32;

/// Where a record stands: which log of this topic's name, topic partition, offset.
pub(super) type Place = (u32, i32, i64);

/// One record of the log.
#[derive(Debug, Clone, Copy)]
pub(super) struct Event {
    pub(super) key: Key,
    pub(super) kind: EventKind,
}

/// What becomes of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EventKind {
    /// It is written to main unless its key was seen.
    OnTime,
    /// It is written to the late table unless its key was seen.
    Late,
    /// Its bucket has left the state: it is written to the late table whatever its key, which does not come to be seen.
    Unproven,
    /// It can not be decoded, and becomes a dead letter.
    Bad,
}

/// The topic.
#[derive(Debug, Clone)]
pub(super) struct Log {
    /// Rises when the topic is made again.
    pub(super) incarnation: u32,
    pub(super) cluster: u32,
    pub(super) partitions: Vec<Partition>,
}

/// One topic partition. A place without an event is a control record.
#[derive(Debug, Clone, Default)]
pub(super) struct Partition {
    pub(super) records: Vec<Option<Event>>,
    /// What retention has left begins here; what it removed is kept for the oracles.
    pub(super) low: i64,
}

impl Log {
    /// Identity of the topic.
    pub(super) fn topic_id(&self) -> Uuid {
        Uuid::from_u128(0x70_0000 + u128::from(self.incarnation))
    }

    /// Records of one topic partition in `[start, end)`.
    pub(super) fn events(
        &self,
        partition: i32,
        start: i64,
        end: i64,
    ) -> impl Iterator<Item = (Place, Event)> {
        let records = &self.partitions[partition as usize].records;
        let incarnation = self.incarnation;
        (start..end).filter_map(move |offset| {
            let event = records.get(offset as usize).copied().flatten()?;
            Some(((incarnation, partition, offset), event))
        })
    }
}

/// A row of a data file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Row {
    pub(super) key: Key,
    pub(super) place: Place,
    /// Microbatch that wrote it; `None` for a row of another writer.
    pub(super) batch: Option<u64>,
    pub(super) is_unproven: bool,
}

/// A data file. Its bytes stand in [`Universe::stored`] under its path, if they survived.
#[derive(Debug, Clone)]
pub(super) struct File {
    pub(super) path: String,
    pub(super) rows: Rc<Vec<Row>>,
}

/// What the tables have to hold at a snapshot of main.
#[derive(Debug, Clone, Default)]
pub(super) struct Truth {
    /// Keys of all events taken that make the state.
    pub(super) keys: BTreeSet<Key>,
    /// Rows that main named for the late table.
    pub(super) late: BTreeSet<Row>,
    /// Places of all letters.
    pub(super) letters: BTreeSet<Place>,
    /// Those of the last microbatch.
    pub(super) letters_owed: BTreeSet<Place>,
}

/// What a snapshot stands for.
#[derive(Debug, Clone, Default)]
pub(super) struct Content {
    /// Live data files.
    pub(super) files: Rc<Vec<File>>,
    /// Newest record of ours on the ancestry.
    pub(super) record: Option<Rc<LedgerRecord>>,
    pub(super) truth: Rc<Truth>,
}

impl Content {
    /// Rows of ours.
    pub(super) fn rows(&self) -> impl Iterator<Item = &Row> {
        self.files.iter().flat_map(|file| file.rows.iter()).filter(|row| row.batch.is_some())
    }
}

/// A table under its name.
#[derive(Debug, Clone)]
pub(super) struct Named {
    pub(super) metadata: Arc<TableMetadata>,
    /// Metadata after the last commit of ours: what a person rolls forward to.
    pub(super) best: Arc<TableMetadata>,
    /// Of a side table: metadata after the last commit of each ledger that marked it, by the id of its job; and, of
    /// [`NO_LEDGER`], as it was before any did.
    pub(super) of_ledgers: BTreeMap<Uuid, Arc<TableMetadata>>,
}

/// A request that has left its process.
#[derive(Debug, Clone)]
pub(super) struct Flight {
    pub(super) number: u64,
    /// The process that sent it.
    pub(super) sender: usize,
    /// Its state folder.
    pub(super) folder: usize,
    pub(super) table: TableIdent,
    pub(super) uuid: Uuid,
    pub(super) base: Option<i64>,
    pub(super) snapshot: Snapshot,
    pub(super) properties: BTreeMap<String, String>,
    pub(super) files: Vec<File>,
    /// The snapshot whose files the table has again.
    pub(super) back_to: Option<i64>,
    /// Snapshots that maintenance removes.
    pub(super) expiring: Vec<i64>,
}

/// A file of a state folder.
#[derive(Debug, Clone)]
pub(super) struct StateFile {
    pub(super) is_synced: bool,
    pub(super) is_damaged: bool,
    pub(super) content: StateContent,
}

/// What stands in it.
#[derive(Debug, Clone)]
pub(super) enum StateContent {
    Segment(Rc<BTreeSet<Key>>),
    /// Names of segments.
    Manifest(Rc<Vec<String>>),
}

/// A state folder with its lock file.
#[derive(Debug, Clone, Default)]
pub(super) struct Folder {
    pub(super) files: BTreeMap<String, StateFile>,
    /// Lines of the lock file, newest last.
    pub(super) owners: Vec<(Uuid, u64)>,
    /// Process that holds the lock.
    pub(super) locked_by: Option<usize>,
    /// A lock that locks nothing, as on some network file systems.
    pub(super) is_lock_broken: bool,
    /// Files of it were lost, damaged or put back by others.
    pub(super) is_harmed: bool,
}

impl Folder {
    /// Keys of a generation, if every file of it is whole.
    pub(super) fn generation(&self, name: &str) -> Option<BTreeSet<Key>> {
        let whole = |name: &str| self.files.get(name).filter(|file| !file.is_damaged);
        let StateContent::Manifest(segments) = &whole(&format!("{name}.manifest"))?.content else {
            return None;
        };
        let mut keys = BTreeSet::new();
        for segment in segments.iter() {
            let StateContent::Segment(more) = &whole(segment)?.content else { return None };
            keys.extend(more.iter().copied());
        }
        Some(keys)
    }
}

/// The job file as it stands.
#[derive(Debug, Clone)]
pub(super) struct JobFile {
    pub(super) name: String,
    /// Stands for everything that changes the hash and nothing else: memory, dead-letter ratio.
    pub(super) settings: u32,
    pub(super) key_columns: u32,
    pub(super) columns: i32,
}

/// Where choices come from.
#[derive(Clone)]
pub(super) enum Choices {
    /// A seed.
    Random(Box<ChaCha8Rng>),
    /// Always the first, and nothing happens by chance.
    First,
}

/// See the module.
#[derive(Clone)]
pub(super) struct Universe {
    pub(super) choices: Choices,
    /// Whether faults happen still.
    pub(super) is_faulty: bool,
    /// Time since the beginning, which no step of a clock changes.
    pub(super) elapsed_ms: i64,
    /// By how much the wall clock was set.
    pub(super) clock_step_ms: i64,
    pub(super) log: Log,
    pub(super) next_key: Key,
    pub(super) job: JobFile,
    pub(super) tables: BTreeMap<TableIdent, Named>,
    /// What every snapshot stands for, expired ones too: files outlive them here.
    pub(super) contents: HashMap<i64, Content>,
    /// Tables that were dropped, as a person finds them again.
    pub(super) dropped: Vec<(TableIdent, Named)>,
    /// Paths of data files that exist, and whether they are synced.
    pub(super) stored: BTreeMap<String, bool>,
    /// Every data file ever written, by path.
    pub(super) files: HashMap<String, File>,
    /// Files that a living process saw there: it may be about to send a request that names them.
    pub(super) looked_at: BTreeSet<(usize, String)>,
    /// Letters without which a person went on, because their files were gone.
    pub(super) given_up: BTreeSet<Place>,
    /// Paths that a request or a record that was sent names.
    pub(super) sent_paths: BTreeSet<String>,
    pub(super) folders: Vec<Folder>,
    /// Generations whose commit landed.
    pub(super) landed: BTreeSet<String>,
    pub(super) flights: Vec<Flight>,
    /// When processes wake, by process.
    pub(super) wakes: BTreeMap<usize, i64>,
    /// What has happened, by name.
    pub(super) coverage: BTreeMap<&'static str, u64>,
    /// What was broken, if anything.
    pub(super) violation: Option<String>,
    /// What happened, in order; kept when a seed is replayed.
    pub(super) trace: Option<Vec<String>>,
    /// Numbers drawn, by who drew them.
    numbers: BTreeMap<usize, u64>,
    /// Whether processes give turns only where others are concerned.
    pub(super) is_coarse: bool,
    /// What processes were told, by process.
    pub(super) learnt: BTreeMap<usize, u64>,
    /// In the exhaustive model: the request for whose reply a process waits.
    pub(super) awaiting: BTreeMap<usize, u64>,
    /// Replies to come: whether they tell the truth.
    pub(super) grants: BTreeMap<usize, bool>,
    /// Requests that the catalog has served: whether they landed.
    pub(super) served: BTreeMap<u64, bool>,
}

impl Universe {
    pub(super) fn new(choices: Choices) -> Self {
        Self {
            choices,
            is_faulty: true,
            elapsed_ms: 0,
            clock_step_ms: 0,
            log: Log { incarnation: 0, cluster: 0, partitions: vec![Partition::default()] },
            next_key: 0,
            job: JobFile { name: "job".to_owned(), settings: 0, key_columns: 0, columns: 1 },
            tables: BTreeMap::new(),
            contents: HashMap::new(),
            dropped: Vec::new(),
            stored: BTreeMap::new(),
            files: HashMap::new(),
            looked_at: BTreeSet::new(),
            given_up: BTreeSet::new(),
            sent_paths: BTreeSet::new(),
            folders: Vec::new(),
            landed: BTreeSet::new(),
            flights: Vec::new(),
            wakes: BTreeMap::new(),
            coverage: BTreeMap::new(),
            violation: None,
            trace: None,
            numbers: BTreeMap::new(),
            is_coarse: false,
            learnt: BTreeMap::new(),
            awaiting: BTreeMap::new(),
            grants: BTreeMap::new(),
            served: BTreeMap::new(),
        }
    }

    /// The universe of a seed.
    pub(super) fn of_seed(seed: u64) -> Self {
        Self::new(Choices::Random(Box::new(ChaCha8Rng::seed_from_u64(seed))))
    }

    /// One of `count` choices.
    pub(super) fn choose(&mut self, count: usize) -> usize {
        assert!(count > 0, "a choice is between one thing or more");
        match &mut self.choices {
            Choices::Random(random) => random.random_range(0..count),
            Choices::First => 0,
        }
    }

    /// Whether something with this chance happens. Never in the exhaustive model, which names its choices.
    pub(super) fn chance(&mut self, of_thousand: u32) -> bool {
        match &mut self.choices {
            Choices::Random(random) => self.is_faulty && random.random_range(0..1000) < of_thousand,
            Choices::First => false,
        }
    }

    /// Counts that something happened.
    pub(super) fn hit(&mut self, what: &'static str) {
        *self.coverage.entry(what).or_default() += 1;
        if self.trace.is_some() {
            self.note(format!("  ({what})"));
        }
    }

    pub(super) fn note(&mut self, what: String) {
        let elapsed_ms = self.elapsed_ms;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{elapsed_ms:>9} {what}"));
        }
    }

    /// Says that an oracle was broken; the first one counts.
    pub(super) fn broken(&mut self, what: impl Into<String>) {
        let what = what.into();
        self.note(format!("BROKEN {what}"));
        self.violation.get_or_insert(what);
    }

    pub(super) fn require(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.broken(what());
        }
    }

    /// A number that is used once: of a process, or of the [`WORLD`]. It tells who drew it and when, so that the same
    /// happening has the same numbers in whatever order others drew theirs.
    pub(super) fn next_number(&mut self, process: usize) -> u64 {
        let number = self.numbers.entry(process).or_default();
        *number += 1;
        ((process as u64 + 1) << 24) | *number
    }

    /// The wall clock.
    pub(super) fn now_ms(&self) -> i64 {
        CLOCK_BEGIN_MS + self.elapsed_ms + self.clock_step_ms
    }

    /// What the current snapshot of some metadata stands for.
    pub(super) fn content_of(&self, metadata: &TableMetadata) -> Content {
        let current = metadata.current_snapshot_id();
        current.map_or_else(Content::default, |snapshot| self.contents[&snapshot].clone())
    }

    /// What a table holds; nothing if there is none.
    pub(super) fn content(&self, table: &TableIdent) -> Content {
        self.tables.get(table).map_or_else(Content::default, |named| self.content_of(&named.metadata))
    }

    /// An empty table; false if there is one of this name.
    pub(super) fn create_table(&mut self, ident: &TableIdent, columns: i32) -> bool {
        if self.tables.contains_key(ident) {
            return false;
        }
        let uuid = Uuid::from_u128(0xAB1E_0000_0000 + u128::from(self.next_number(WORLD)));
        let creation = TableCreation::builder()
            .name(ident.name().to_owned())
            .location(format!("memory://{}", ident.name()))
            .schema(schema(columns))
            .build();
        let builder = TableMetadataBuilder::from_table_creation(creation).expect("a plain table");
        let metadata = builder.assign_uuid(uuid).build().expect("a plain table").metadata;
        let metadata = self.edited(&metadata, |_| {});
        let of_ledgers = BTreeMap::from([(NO_LEDGER, Arc::clone(&metadata))]);
        let named = Named { best: Arc::clone(&metadata), metadata, of_ledgers };
        self.tables.insert(ident.clone(), named);
        true
    }

    /// Metadata as another engine would have changed it, dated by the simulated clock.
    pub(super) fn edited(
        &self,
        metadata: &TableMetadata,
        edit: impl FnOnce(&mut Value),
    ) -> Arc<TableMetadata> {
        let mut text = serde_json::to_value(metadata).expect("metadata is JSON");
        let newest = metadata.history().last().map_or(0, |entry| entry.timestamp_ms);
        text["last-updated-ms"] = json!(self.now_ms().max(newest));
        edit(&mut text);
        Arc::new(serde_json::from_value(text).expect("an edit that keeps the metadata whole"))
    }

    /// Takes the ledger's property from a table.
    pub(super) fn remove_ledger_property(&mut self, ident: &TableIdent) {
        let edited = self.edited(&self.tables[ident].metadata, |text| {
            text["properties"].as_object_mut().into_iter().for_each(|all| _ = all.remove(PROPERTY));
        });
        self.tables.get_mut(ident).expect("it is there").metadata = edited;
    }

    /// Makes an older or newer snapshot the current one, as a rollback does.
    pub(super) fn set_current(&mut self, ident: &TableIdent, snapshot: i64) {
        let metadata = Arc::clone(&self.tables[ident].metadata);
        let now_ms = self.now_ms().max(metadata.last_updated_ms());
        let edited = self.edited(&metadata, |text| {
            text["current-snapshot-id"] = json!(snapshot);
            text["refs"][MAIN_BRANCH] = json!({ "snapshot-id": snapshot, "type": "branch" });
            text["last-updated-ms"] = json!(now_ms);
            let entry = json!({ "snapshot-id": snapshot, "timestamp-ms": now_ms });
            // One that was replaced in place has none.
            let mut log = text["snapshot-log"].as_array().cloned().unwrap_or_default();
            log.push(entry);
            text["snapshot-log"] = Value::Array(log);
        });
        self.tables.get_mut(ident).expect("the table is there").metadata = edited;
    }

    /// Gives the current snapshot a name that keeps it.
    pub(super) fn tag(&mut self, ident: &TableIdent) {
        let metadata = Arc::clone(&self.tables[ident].metadata);
        let Some(snapshot) = metadata.current_snapshot_id() else { return };
        let name = format!("kept-{}", self.next_number(WORLD));
        let edited = self.edited(&metadata, |text| {
            text["refs"][name] = json!({ "snapshot-id": snapshot, "type": "tag" });
        });
        self.tables.get_mut(ident).expect("the table is there").metadata = edited;
        self.hit("snapshot tagged");
    }

    /// `CREATE OR REPLACE TABLE` of Iceberg's Java library: the table keeps its id, properties and snapshots, and nothing of
    /// them is current.
    pub(super) fn replace_in_place(&mut self, ident: &TableIdent) {
        let edited = self.edited(&self.tables[ident].metadata, |text| {
            text["current-snapshot-id"] = json!(-1);
            text["refs"].as_object_mut().into_iter().for_each(|refs| _ = refs.remove(MAIN_BRANCH));
            text["snapshot-log"] = json!([]);
        });
        self.tables.get_mut(ident).expect("the table is there").metadata = edited;
        self.hit("table replaced in place");
    }

    /// Drops all snapshots but the current one, its `kept - 1` youngest ancestors and those with a tag.
    pub(super) fn expire(&mut self, ident: &TableIdent, kept: usize) {
        let metadata = Arc::clone(&self.tables[ident].metadata);
        let ancestors = std::iter::successors(metadata.current_snapshot(), |snapshot| {
            metadata.snapshot_by_id(snapshot.parent_snapshot_id()?)
        });
        let newest = ancestors.take(kept).map(|snapshot| snapshot.snapshot_id());
        let keep: BTreeSet<i64> = newest.chain(tagged(&metadata)).collect();
        let is_kept = |value: &Value| value["snapshot-id"].as_i64().is_some_and(|id| keep.contains(&id));
        let edited = self.edited(&metadata, |text| {
            text["snapshots"].as_array_mut().into_iter().for_each(|entries| entries.retain(is_kept));
            // As Iceberg's libraries do: a log with a gap would tell a time travel wrong, so what lies before one goes.
            for log in text["snapshot-log"].as_array_mut().into_iter() {
                let gap = log.iter().rposition(|entry| !is_kept(entry));
                log.drain(..gap.map_or(0, |gap| gap + 1));
            }
        });
        self.tables.get_mut(ident).expect("the table is there").metadata = edited;
    }

    /// Adds a column, as another engine or the owner does.
    pub(super) fn add_column(&mut self, ident: &TableIdent) {
        let metadata = Arc::clone(&self.tables[ident].metadata);
        let columns = metadata.current_schema().as_struct().fields().len() as i32 + 1;
        let id = metadata.schemas_iter().map(|schema| schema.schema_id()).max().unwrap_or(0) + 1;
        let edited = self.edited(&metadata, |text| {
            let mut added = serde_json::to_value(schema(columns)).expect("a schema is JSON");
            added["schema-id"] = json!(id);
            text["schemas"].as_array_mut().expect("a table has schemas").push(added);
            text["current-schema-id"] = json!(id);
            text["last-column-id"] = json!(columns);
        });
        self.tables.get_mut(ident).expect("the table is there").metadata = edited;
    }

    /// A commit of another writer: it keeps no ledger, and builds on whatever stands there.
    pub(super) fn foreign_commit(&mut self, ident: &TableIdent, files: Vec<File>) {
        let metadata = Arc::clone(&self.tables[ident].metadata);
        let base = self.content_of(&metadata);
        let snapshot = {
            let now_ms = self.now_ms().max(metadata.last_updated_ms());
            self.snapshot(&metadata, WORLD, now_ms, BTreeMap::new())
        };
        let content = Content { files: Rc::new(files), ..base };
        let id = snapshot.snapshot_id();
        let metadata =
            built(&metadata, snapshot, &BTreeMap::new(), &[]).expect("a commit on the current head");
        let named = self.tables.get_mut(ident).expect("the table is there");
        self.contents.insert(id, content);
        named.metadata = Arc::new(metadata);
    }

    fn snapshot(
        &mut self,
        head: &TableMetadata,
        drawer: usize,
        now_ms: i64,
        summary: BTreeMap<String, String>,
    ) -> Snapshot {
        let id = self.next_number(drawer) as i64;
        Snapshot::builder()
            .with_snapshot_id(id)
            .with_parent_snapshot_id(head.current_snapshot_id())
            .with_sequence_number(head.next_sequence_number())
            .with_timestamp_ms(now_ms)
            .with_manifest_list(format!("memory://{id}"))
            .with_summary(Summary {
                operation: Operation::Append,
                additional_properties: summary.into_iter().collect(),
            })
            .with_schema_id(head.current_schema_id())
            .build()
    }

    /// A request leaves its process.
    pub(super) fn launch(
        &mut self,
        sender: usize,
        folder: usize,
        head: &TableMetadata,
        now_ms: i64,
        request: &Request<File>,
    ) -> Flight {
        let snapshot = self.snapshot(head, sender, now_ms, request.summary.clone());
        let number = self.next_number(sender);
        self.sent_paths.extend(request.files.iter().map(|file| file.path.clone()));
        if let Some(text) = request.properties.get(PROPERTY) {
            let record = LedgerRecord::from_property(text).expect("a record of ours");
            let owed = record.sides.values().flat_map(|side| side.files.iter().flatten());
            self.sent_paths.extend(owed.map(|file| file["path"].as_str().unwrap_or_default().to_owned()));
        }
        let flight = Flight {
            number,
            sender,
            folder,
            table: request.table.clone(),
            uuid: request.table_uuid,
            base: head.current_snapshot_id(),
            snapshot,
            properties: request.properties.clone(),
            files: request.files.clone(),
            back_to: request.back_to,
            expiring: request.upkeep.as_ref().map_or_else(Vec::new, |upkeep| (upkeep.expiring)(head)),
        };
        self.flights.push(flight.clone());
        flight
    }

    /// The catalog gets a request: it lands, or the error of the catalog.
    pub(super) fn apply(&mut self, flight: &Flight) -> Result<(), iceberg::Error> {
        let Some(named) = self.tables.get(&flight.table) else {
            return Err(iceberg::Error::new(ErrorKind::TableNotFound, "no such table"));
        };
        if named.metadata.uuid() != flight.uuid || named.metadata.current_snapshot_id() != flight.base {
            self.hit("request refused by its head");
            let conflict = iceberg::Error::new(ErrorKind::CatalogCommitConflicts, "requirement failed");
            return Err(conflict.with_retryable(true));
        }
        let metadata = built(&named.metadata, flight.snapshot.clone(), &flight.properties, &flight.expiring)?;
        let base = self.content_of(&named.metadata);
        let kept = flight.back_to.map_or_else(|| base.clone(), |snapshot| self.contents[&snapshot].clone());
        let mut files = (*kept.files).clone();
        files.extend(flight.files.iter().cloned());
        let content = oracles::judge(self, flight, &base, files);
        self.note(format!("request {} of process {} lands", flight.number, flight.sender));
        let named = self.tables.get_mut(&flight.table).expect("the table is there");
        self.contents.insert(flight.snapshot.snapshot_id(), content);
        named.metadata = Arc::new(metadata);
        named.best = Arc::clone(&named.metadata);
        let mark = side::inspect(&named.metadata).expect("a mark of ours");
        named.of_ledgers.extend(mark.map(|mark| (mark.job_id, Arc::clone(&named.metadata))));
        Ok(())
    }

    /// The power goes: what was not synced survives in any subset, whole or torn.
    pub(super) fn lose_power(&mut self, folder: usize) {
        let unsynced: Vec<String> =
            self.stored.iter().filter(|(_, is_synced)| !**is_synced).map(|(path, _)| path.clone()).collect();
        for path in unsynced {
            if self.choose(2) == 0 {
                self.stored.remove(&path);
                self.hit("unsynced data file lost");
            }
        }
        let unsynced: Vec<String> = self.folders[folder]
            .files
            .iter()
            .filter(|(_, file)| !file.is_synced)
            .map(|(name, _)| name.clone())
            .collect();
        for name in unsynced {
            match self.choose(3) {
                0 => {
                    self.folders[folder].files.remove(&name);
                    self.hit("unsynced state file lost");
                }
                1 => {
                    self.folders[folder].files.get_mut(&name).expect("it was listed").is_damaged = true;
                    self.hit("unsynced state file torn");
                }
                _ => {}
            }
        }
    }
}

/// Snapshots that a tag keeps.
pub(super) fn tagged(metadata: &TableMetadata) -> Vec<i64> {
    let refs = savepoint::refs(metadata).expect("refs that the simulator wrote");
    refs.into_values().filter(|kept| !kept.is_branch()).map(|kept| kept.snapshot_id).collect()
}

fn built(
    metadata: &TableMetadata,
    snapshot: Snapshot,
    properties: &BTreeMap<String, String>,
    expiring: &[i64],
) -> Result<TableMetadata, iceberg::Error> {
    let builder = metadata.clone().into_builder(None).set_branch_snapshot(snapshot, MAIN_BRANCH)?;
    let builder = builder.remove_snapshots(expiring);
    let builder = builder.set_properties(properties.clone().into_iter().collect())?;
    Ok(builder.build()?.metadata)
}

fn schema(columns: i32) -> Schema {
    let field = |id: i32| {
        NestedField::optional(id, format!("column_{id}"), Type::Primitive(PrimitiveType::Long)).into()
    };
    Schema::builder().with_fields((1..=columns).map(field)).build().expect("a plain schema")
}
