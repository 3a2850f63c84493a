//! A process: the protocol's traits over the [`Universe`], and one life from the lock to the release.
//!
//! Every call gives the scheduler a turn before it acts, and wherever a real call has a middle: between a request, its
//! application and its reply, between a write and its sync. A process that is dropped there has crashed there.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use iceberg::spec::TableMetadata;
use iceberg::{Error, ErrorKind, TableIdent};
use serde_json::{Value, json};
use uuid::Uuid;

use super::universe::{
    Event, EventKind, File, Flight, Key, Place, Row, Shared, StateContent, StateFile, TOPIC, Universe,
};
use crate::commit::ledger::{self, Cursor, DedupRecord, Found, Jump, Kind, LIVE_LANE, LedgerRecord, Tail};
use crate::commit::side::{self, Role};
use crate::commit::upkeep::Upkeep;
use crate::counts::Counts;
use crate::dedup::{GenerationName, GenerationRef, StoreError};
use crate::event_time::EventTimeMs;
use crate::job::Repeats;
use crate::offset::{NextOffset, TopicId, TopicPartition};
use crate::protocol::start::{Allow, Facts, SideFacts};
use crate::protocol::{
    self, AllTables, Answer, Below, Built, Cut, DedupFacts, Fence, Heads, Owner, Reached, Request,
};
use crate::protocol::{Endless, Life, State, StateHome, Tables, Terms, Turn as Next, World, stops};
use crate::source::OffsetRange;
use crate::stop::{Reason, Stop};

/// Name of the main table.
pub(super) fn main_ident() -> TableIdent {
    TableIdent::from_strs(["events", "main"]).expect("a name")
}

/// Name of a side table.
pub(super) fn side_ident(role: Role) -> TableIdent {
    TableIdent::from_strs(["events", role.name()]).expect("a name")
}

/// What a process was started to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Run,
    AcceptLoss,
    Rebase,
}

/// How a process is started.
#[derive(Debug, Clone, Copy)]
pub(super) struct Orders {
    pub(super) command: Command,
    pub(super) folder: usize,
    pub(super) takeover: bool,
    pub(super) ignore_rows: bool,
    /// `on_rollback = "replay"`.
    pub(super) replay: bool,
    /// By how much its machine's clock is off.
    pub(super) skew_ms: i64,
    /// Most events of a topic partition in one microbatch.
    pub(super) batch_events: i64,
    /// Goes on when everything is read.
    pub(super) follows: bool,
}

/// Gives the scheduler a turn.
struct Turn(bool);

impl Future for Turn {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        match std::mem::replace(&mut self.0, true) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }
}

/// A place where only this process is concerned. In the exhaustive model, which interleaves what others can see, none.
async fn turn(shared: &Shared) {
    if !shared.borrow().is_coarse {
        Turn(false).await;
    }
}

/// A place where others are concerned.
async fn meet() {
    Turn(false).await;
}

/// A table as it was loaded.
#[derive(Debug, Clone)]
pub(super) struct Loaded(Arc<TableMetadata>);

impl Loaded {
    fn snapshot(&self) -> i64 {
        self.0.current_snapshot_id().unwrap_or(0)
    }
}

#[derive(Clone)]
struct SimTables {
    shared: Shared,
    process: usize,
    folder: usize,
    skew_ms: i64,
}

/// What a catalog says where it says something else than what it did.
fn answer_of(kind: usize) -> (&'static str, Error) {
    match kind {
        0 => (
            "answer: reply lost",
            Error::new(ErrorKind::Unexpected, "connection closed; the commit state is unknown"),
        ),
        1 => {
            ("answer: 409", Error::new(ErrorKind::CatalogCommitConflicts, "one or more requirements failed"))
        }
        2 => {
            ("answer: 5xx", Error::new(ErrorKind::Unexpected, "gateway timeout; the commit state is unknown"))
        }
        3 => ("answer: garbage", Error::new(ErrorKind::DataInvalid, "expected value at line 1 column 1")),
        _ => (
            "answer: throttle",
            Error::new(ErrorKind::Unexpected, "Received response with unexpected status code")
                .with_context("status", "429 Too Many Requests"),
        ),
    }
}

/// As the REST client words a refusal of the principal.
fn forbidden() -> Error {
    Error::new(ErrorKind::Unexpected, "Received response with unexpected status code")
        .with_context("status", "403 Forbidden")
}

impl SimTables {
    fn current(&self, table: &TableIdent) -> Option<Loaded> {
        let universe = self.shared.borrow();
        universe.tables.get(table).map(|named| Loaded(Arc::clone(&named.metadata)))
    }

    fn launch(&self, head: &Loaded, request: &Request<File>) -> Flight {
        let now_ms = self.now_ms();
        self.shared.borrow_mut().launch(self.process, self.folder, &head.0, now_ms, request)
    }

    /// The catalog gets a request that is under way, if it still is.
    fn arrive(&self, flight: &Flight) -> Result<(), Error> {
        let mut universe = self.shared.borrow_mut();
        let under_way = universe.flights.iter().position(|other| other.number == flight.number);
        match under_way {
            Some(at) => _ = universe.flights.remove(at),
            None => universe.hit("held request arrived before its reply"),
        }
        match under_way {
            Some(_) => universe.apply(flight),
            None => Err(Error::new(ErrorKind::CatalogCommitConflicts, "it arrived before")),
        }
    }

    /// What this process has been told decides what it does: the exhaustive model knows its state by it.
    fn learn(&self, what: i64) {
        let mut universe = self.shared.borrow_mut();
        let known = universe.learnt.entry(self.process).or_default();
        *known = xxhash_rust::xxh3::xxh3_64_with_seed(&what.to_le_bytes(), *known);
    }

    /// In the exhaustive model a reply comes when the model says so, and says what the model says.
    async fn await_grant(&self, flight: &Flight) -> Answer {
        self.shared.borrow_mut().awaiting.insert(self.process, flight.number);
        let is_true = loop {
            meet().await;
            if let Some(is_true) = self.shared.borrow_mut().grants.remove(&self.process) {
                break is_true;
            }
        };
        self.shared.borrow_mut().awaiting.remove(&self.process);
        let has_landed = self.shared.borrow().served.get(&flight.number).copied();
        self.learn(if is_true { -2 } else { -3 });
        match (is_true, has_landed) {
            (true, Some(true)) => Answer::Done,
            (true, _) => Answer::Failed(answer_of(1).1),
            (false, _) => Answer::Failed(answer_of(0).1),
        }
    }

    fn forget(&self, flight: &Flight) {
        self.shared.borrow_mut().flights.retain(|other| other.number != flight.number);
    }
}

impl Tables for SimTables {
    type Table = Loaded;
    type File = File;

    fn metadata(table: &Loaded) -> &TableMetadata {
        &table.0
    }

    async fn find(&self, table: &TableIdent) -> Result<Option<Loaded>, Stop> {
        meet().await;
        if self.shared.borrow_mut().chance(3) {
            self.shared.borrow_mut().hit("catalog away at start");
            return Err(Stop::new(Reason::CatalogAway, "the catalog is away", "try again"));
        }
        let found = self.current(table);
        self.learn(found.as_ref().map_or(0, Loaded::snapshot));
        Ok(found)
    }

    async fn load(&self, table: &TableIdent) -> Result<Loaded, Box<Error>> {
        meet().await;
        if self.shared.borrow_mut().chance(4) {
            self.shared.borrow_mut().hit("catalog away at reload");
            return Err(Box::new(Error::new(ErrorKind::Unexpected, "Failed to execute http request")));
        }
        let gone = || Box::new(Error::new(ErrorKind::TableNotFound, "no such table"));
        let found = self.current(table);
        self.learn(found.as_ref().map_or(0, Loaded::snapshot));
        found.ok_or_else(gone)
    }

    async fn send(&self, head: &Loaded, request: &Request<File>) -> Answer {
        meet().await;
        match self.current(&request.table) {
            None => return Answer::NotSent(Error::new(ErrorKind::TableNotFound, "no such table")),
            Some(now) if !Arc::ptr_eq(&now.0, &head.0) => {
                self.shared.borrow_mut().hit("head moved before sending");
                self.learn(-1);
                return Answer::HeadMoved;
            }
            Some(_) => {}
        }
        let flight = self.launch(head, request);
        if self.shared.borrow().is_coarse {
            return self.await_grant(&flight).await;
        }
        // From here on the request may arrive whatever becomes of its process.
        turn(&self.shared).await;
        if self.shared.borrow_mut().chance(200) {
            return self.send_badly(&flight).await;
        }
        let outcome = self.arrive(&flight);
        turn(&self.shared).await;
        outcome.map_or_else(Answer::Failed, |()| Answer::Done)
    }

    async fn missing(&self, _: &Loaded, files: &[File]) -> Result<Vec<String>, Box<Error>> {
        turn(&self.shared).await;
        let universe = self.shared.borrow();
        let gone = files.iter().filter(|file| !universe.stored.contains_key(&file.path));
        Ok(gone.map(|file| file.path.clone()).collect())
    }

    fn now_ms(&self) -> i64 {
        self.shared.borrow().now_ms() + self.skew_ms
    }

    async fn wait(&self, time: Duration) {
        if self.shared.borrow().is_coarse {
            return;
        }
        let until = {
            let mut universe = self.shared.borrow_mut();
            let until = universe.elapsed_ms + time.as_millis() as i64;
            universe.wakes.insert(self.process, until);
            until
        };
        turn(&self.shared).await;
        while self.shared.borrow().elapsed_ms < until {
            turn(&self.shared).await;
        }
        self.shared.borrow_mut().wakes.remove(&self.process);
    }

    async fn back_off(&self, sends: u32) {
        let extra = self.shared.borrow_mut().choose(50) as u64;
        self.wait(Duration::from_millis(100 * u64::from(sends) + extra)).await;
    }

    fn new_id(&self) -> Uuid {
        Uuid::from_u128(u128::from(self.shared.borrow_mut().next_number(self.process)))
    }
}

impl SimTables {
    /// A request whose way, work or answer goes wrong.
    async fn send_badly(&self, flight: &Flight) -> Answer {
        let hit = |what| self.shared.borrow_mut().hit(what);
        let kind = self.shared.borrow_mut().choose(9);
        let (name, error) = answer_of(self.shared.borrow_mut().choose(5));
        match kind {
            // Done, and the answer says something else.
            0..=2 => {
                _ = self.arrive(flight);
                hit("request done, answer bad");
            }
            // Under way still: the scheduler lets it arrive later, or never.
            3 | 4 => hit("request held"),
            // Lost on its way.
            5 => {
                self.forget(flight);
                hit("request lost");
            }
            // Done now and once more later.
            6 => {
                _ = self.arrive(flight);
                self.shared.borrow_mut().flights.push(flight.clone());
                hit("request doubled");
            }
            7 => {
                self.forget(flight);
                hit("success without work");
                turn(&self.shared).await;
                return Answer::Done;
            }
            _ => {
                self.forget(flight);
                if self.shared.borrow_mut().choose(2) == 0 {
                    hit("request refused for good");
                    turn(&self.shared).await;
                    return Answer::Failed(forbidden());
                }
                // A clean-up takes files of a commit that is not there for orphans. While a request that names them is
                // under way nobody can be saved from such a clean-up.
                let mut universe = self.shared.borrow_mut();
                let paths = |flight: &Flight| flight.files.iter().map(|file| file.path.clone()).collect();
                let ours: BTreeSet<String> = paths(flight);
                let mut under_way = universe.flights.iter().map(paths);
                let is_named = under_way.any(|theirs: BTreeSet<String>| !theirs.is_disjoint(&ours));
                for file in flight.files.iter().filter(|_| !is_named) {
                    universe.stored.remove(&file.path);
                }
                universe.hit("data files swept by others");
            }
        }
        hit(name);
        turn(&self.shared).await;
        Answer::Failed(error)
    }
}

/// A process's view of everything but its tables.
struct SimWorld {
    tables: SimTables,
    terms: Terms,
    /// Columns of its job.
    columns: i32,
    key_columns: u32,
}

impl SimWorld {
    fn shared(&self) -> &Shared {
        &self.tables.shared
    }

    /// A table as it was found, or as it is made.
    async fn ensure(&self, found: Option<Loaded>, ident: &TableIdent, columns: i32) -> Result<Loaded, Stop> {
        if found.is_none() {
            self.shared().borrow_mut().create_table(ident, columns);
            turn(self.shared()).await;
        }
        let away = || Stop::new(Reason::CatalogAway, "a table vanished", "try again");
        found.or_else(|| self.tables.current(ident)).ok_or_else(away)
    }
}

fn key_spec_hash(key_columns: u32) -> String {
    format!("key of {key_columns}")
}

impl World for SimWorld {
    type Tables = SimTables;

    fn tables(&self) -> &SimTables {
        &self.tables
    }

    fn terms(&self) -> &Terms {
        &self.terms
    }

    fn reach(&self, phase: &'static str) {
        self.shared().borrow_mut().hit(phase);
    }

    fn knows_as_dead(&self, owner: Uuid) -> bool {
        self.shared().borrow().folders[self.tables.folder].owners.iter().any(|&(known, _)| known == owner)
    }

    fn epoch_max(&self) -> u64 {
        let universe = self.shared().borrow();
        universe.folders[self.tables.folder].owners.iter().map(|&(_, epoch)| epoch).max().unwrap_or(0)
    }

    async fn record_owner(&mut self, owner: Uuid, epoch: u64) -> Result<(), Stop> {
        turn(self.shared()).await;
        self.shared().borrow_mut().folders[self.tables.folder].owners.push((owner, epoch));
        turn(self.shared()).await;
        Ok(())
    }

    async fn has_rows_of(&self, table: &Loaded, batch: u64) -> Result<bool, Stop> {
        turn(self.shared()).await;
        let universe = self.shared().borrow();
        let content = universe.content_of(&table.0);
        Ok(content.files.iter().any(|file| file.rows.iter().any(|row| row.batch == Some(batch))))
    }

    async fn ensure_tables(&self, (main, mut sides): Heads<Loaded>) -> Result<AllTables<Self>, Stop> {
        turn(self.shared()).await;
        let main = self.ensure(main, &self.terms.main, self.columns).await?;
        for (&role, ident) in &self.terms.sides {
            let columns = if role == Role::Late { self.columns } else { 1 };
            let table = self.ensure(sides.remove(&role), ident, columns).await?;
            sides.insert(role, table);
        }
        Ok((main, sides))
    }

    async fn add_columns(&self, role: Option<Role>, table: &Loaded) -> Result<Option<Loaded>, Stop> {
        turn(self.shared()).await;
        let has = |table: &Loaded| table.0.current_schema().as_struct().fields().len() as i32;
        if has(table) >= self.columns || role == Some(Role::DeadLetters) {
            return Ok(None);
        }
        let ident = role.map_or_else(main_ident, side_ident);
        {
            let mut universe = self.shared().borrow_mut();
            let uuid = universe.tables.get(&ident).map(|named| named.metadata.uuid());
            if uuid != Some(table.0.uuid()) {
                return Err(Stop::new(Reason::CatalogAway, "no such table", "try again"));
            }
            universe.add_column(&ident);
            universe.hit("column added by its owner");
        }
        turn(self.shared()).await;
        self.tables.load(&ident).await.map(Some).map_err(|error| stops::unreadable(&ident, *error))
    }

    fn draw_seed(&self) -> Result<(u64, String), Stop> {
        Ok((7, key_spec_hash(self.key_columns)))
    }

    fn files_of_ledger(&self, stored: &[Value], _: &Loaded) -> Result<Vec<File>, Below> {
        let universe = self.shared().borrow();
        let file = |value: &Value| universe.files.get(value["path"].as_str()?).cloned();
        stored.iter().map(|value| file(value).ok_or_else(|| "no such file".into())).collect()
    }

    async fn damaged(&self, table: &Loaded, files: &[File]) -> Result<Vec<String>, Stop> {
        let missing = self.tables.missing(table, files).await;
        missing.map_err(|error| stops::unreadable(&self.terms.main, *error))
    }
}

/// A dedup state as its process has it in memory.
struct SimState {
    tables: SimTables,
    /// Segments of the generation in use, and their keys.
    current: (Option<GenerationName>, Vec<String>, BTreeSet<Key>),
    prepared: Option<(GenerationName, Vec<String>, BTreeSet<Key>)>,
    pending: BTreeSet<Key>,
}

fn checksum(name: &str, segments: &[String]) -> String {
    let text = format!("{name} {}", segments.join(" "));
    format!("{:032x}", xxhash_rust::xxh3::xxh3_128(text.as_bytes()))
}

fn reference(name: GenerationName, segments: &[String]) -> GenerationRef {
    GenerationRef { name, checksum: checksum(&name.to_string(), segments) }
}

/// Writes files of a generation, unsynced, with a turn after each; then syncs them.
async fn write_generation(
    tables: &SimTables,
    name: GenerationName,
    mut segments: Vec<String>,
    new: Option<BTreeSet<Key>>,
) -> Result<Vec<String>, Stop> {
    let put = |file_name: String, content: StateContent| {
        let mut universe = tables.shared.borrow_mut();
        let files = &mut universe.folders[tables.folder].files;
        let file = StateFile { is_synced: false, is_damaged: false, content };
        let taken = files.insert(file_name, file).is_some();
        universe.require(!taken, || "a name of a state file was taken twice".to_owned());
    };
    let mut written = Vec::new();
    turn(&tables.shared).await;
    if let Some(keys) = new {
        let segment = format!("{name}-000.segment");
        put(segment.clone(), StateContent::Segment(Rc::new(keys)));
        written.push(segment.clone());
        segments.push(segment);
        turn(&tables.shared).await;
    }
    if tables.shared.borrow_mut().chance(5) {
        tables.shared.borrow_mut().hit("disk of the state full");
        return Err(Stop::new(Reason::StorageFailed, "no space left", "free space"));
    }
    let manifest = format!("{name}.manifest");
    put(manifest.clone(), StateContent::Manifest(Rc::new(segments.clone())));
    written.push(manifest);
    turn(&tables.shared).await;
    for file_name in written {
        if let Some(file) = tables.shared.borrow_mut().folders[tables.folder].files.get_mut(&file_name) {
            file.is_synced = true;
        }
    }
    Ok(segments)
}

impl SimState {
    /// Whether a key was seen; if not, it is from now on.
    fn is_new(&mut self, key: Key) -> bool {
        let keys = self.prepared.as_ref().map_or(&self.current.2, |(_, _, keys)| keys);
        !keys.contains(&key) && self.pending.insert(key)
    }
}

impl State for SimState {
    async fn prepare(&mut self, name: GenerationName, _: Option<EventTimeMs>) -> Result<DedupFacts, Stop> {
        let new = std::mem::take(&mut self.pending);
        let (_, segments, keys) = &self.current;
        let keys: BTreeSet<Key> = keys.union(&new).copied().collect();
        let merges = segments.len() > 1 && self.tables.shared.borrow_mut().chance(250);
        let (kept, written) = match merges {
            true => (Vec::new(), Some(keys.clone())),
            false => (segments.clone(), (!new.is_empty()).then_some(new)),
        };
        let segments = write_generation(&self.tables, name, kept, written).await?;
        let facts = DedupFacts {
            generation: reference(name, &segments),
            bucket_width_ms: 1,
            eras: Vec::new(),
            floor: None,
            complete_since: None,
            keys: keys.len() as u64,
            digest: format!("{:?}", keys.iter().map(|key| u64::from(*key)).sum::<u64>()),
            buckets: Vec::new(),
        };
        self.prepared = Some((name, segments, keys));
        Ok(facts)
    }

    fn publish(&mut self) {
        let (name, segments, keys) =
            self.prepared.take().expect("a generation is prepared before it is published");
        let mut universe = self.tables.shared.borrow_mut();
        let has_landed = universe.landed.contains(&name.to_string());
        universe.require(has_landed, || format!("generation {name} is seen and no table named it"));
        self.current = (Some(name), segments, keys);
    }

    fn abandon(&mut self) {
        self.prepared = None;
        self.pending.clear();
    }

    fn wants_sweep(&self) -> bool {
        self.tables.shared.borrow_mut().chance(500)
    }

    async fn sweep(&mut self, keep: &[GenerationRef], _: Uuid, epoch: u64) -> Result<(), StoreError> {
        turn(&self.tables.shared).await;
        let universe = &mut *self.tables.shared.borrow_mut();
        let folder = &universe.folders[self.tables.folder];
        let mut needed: BTreeSet<String> = self.current.1.iter().cloned().collect();
        needed.extend(self.current.0.map(|name| format!("{name}.manifest")));
        let mut kept = 0;
        for name in keep.iter().map(|kept| kept.name) {
            let manifest = format!("{name}.manifest");
            if let Some(StateFile { content: StateContent::Manifest(segments), .. }) =
                folder.files.get(&manifest)
            {
                kept += 1;
                needed.extend(segments.iter().cloned());
                needed.insert(manifest);
            }
        }
        if kept == 0 {
            return Ok(());
        }
        let is_old = |name: &str| name[1..11].parse::<u64>().is_ok_and(|of| of < epoch);
        let gone: Vec<String> =
            folder.files.keys().filter(|name| !needed.contains(*name) && is_old(name)).cloned().collect();
        judge_sweep(universe, self.tables.folder, &gone);
        for name in &gone {
            universe.folders[self.tables.folder].files.remove(name);
            universe.hit("state file swept");
        }
        Ok(())
    }
}

/// A generation that the table names, or that a request under way may still make it name, is not swept.
fn judge_sweep(universe: &mut Universe, folder: usize, gone: &[String]) {
    let mut named: Vec<String> = Vec::new();
    if let Some(main) = universe.tables.get(&main_ident()) {
        let record = universe.content_of(&main.metadata).record;
        let newest = universe.content_of(&main.best).record;
        // Of a table that was rolled back the last few generations are kept, and an older one is made again.
        let is_newest = |record: &&Rc<LedgerRecord>| {
            newest.as_ref().is_some_and(|newest| newest.attempt == record.attempt)
        };
        named.extend(record.as_ref().filter(is_newest).and_then(|record| record.dedup.generation.clone()));
        for flight in universe.flights.iter().filter(|flight| flight.folder == folder) {
            // After a rollback a request may find its head again, and is refused by its sequence number all the same.
            let may_land = flight.base == main.metadata.current_snapshot_id()
                && flight.uuid == main.metadata.uuid()
                && flight.snapshot.sequence_number() > main.metadata.last_sequence_number();
            let record = flight.properties.get(ledger::PROPERTY).filter(|_| may_land);
            let record = record.map(|text| LedgerRecord::from_property(text).expect("a record of ours"));
            named.extend(record.and_then(|record| record.dedup.generation));
        }
    }
    for name in named {
        let was_whole = universe.folders[folder].generation(&name).is_some();
        let mut swept = universe.folders[folder].clone();
        swept.files.retain(|file, _| !gone.contains(file));
        universe.require(!was_whole || swept.generation(&name).is_some(), || {
            format!("generation {name} was swept and is needed")
        });
    }
}

/// Opens states, and rebuilds them from main and late table.
struct SimHome {
    tables: SimTables,
}

impl StateHome<SimWorld> for SimHome {
    type State = SimState;

    async fn open(
        &mut self,
        _: &LedgerRecord,
        named: Option<&GenerationRef>,
    ) -> Result<Result<SimState, StoreError>, Stop> {
        turn(&self.tables.shared).await;
        let tables = self.tables.clone();
        let state = |current| SimState { tables, current, prepared: None, pending: BTreeSet::new() };
        let Some(named) = named else { return Ok(Ok(state((None, Vec::new(), BTreeSet::new())))) };
        let mut universe = self.tables.shared.borrow_mut();
        let folder = &universe.folders[self.tables.folder];
        let file = format!("{}.manifest", named.name);
        let Some(manifest) = folder.files.get(&file) else {
            universe.hit("state missing");
            return Ok(Err(StoreError::Missing { file }));
        };
        let StateContent::Manifest(segments) = &manifest.content else {
            unreachable!("a manifest is no segment")
        };
        let segments = (**segments).clone();
        let is_same = !manifest.is_damaged && reference(named.name, &segments) == *named;
        match folder.generation(&named.name.to_string()) {
            Some(keys) if is_same => Ok(Ok(state((Some(named.name), segments, keys)))),
            _ => {
                universe.hit("state corrupt");
                Ok(Err(StoreError::Corrupt { file, what: "of its checksum".to_owned() }))
            }
        }
    }

    async fn rebuild(&mut self, owner: &mut Owner<SimWorld>, _: &StoreError) -> Result<GenerationRef, Stop> {
        let record = owner.record.clone();
        let mut keys = BTreeSet::new();
        for table in [owner.main.clone(), owner.side(Role::Late).clone()] {
            let content = self.tables.shared.borrow().content_of(&table.0);
            for file in content.files.iter() {
                turn(&self.tables.shared).await;
                let ours =
                    |row: &&Row| row.batch.is_some_and(|batch| batch <= record.batch) && !row.is_unproven;
                keys.extend(file.rows.iter().filter(ours).map(|row| row.key));
            }
        }
        owner.renew().await?;
        let name = GenerationName::new(record.epoch, record.batch, self.tables.new_id());
        if keys.len() as u64 != record.dedup.keys {
            return Err(Stop::new(Reason::MissingKeys, "keys are missing", "put them back"));
        }
        let segments = write_generation(&self.tables, name, Vec::new(), Some(keys)).await?;
        self.tables.shared.borrow_mut().hit("state rebuilt");
        Ok(reference(name, &segments))
    }

    async fn widen(&mut self, _: &mut Owner<SimWorld>, _: &mut SimState) -> Result<(), Stop> {
        Ok(())
    }

    fn failed(&self, error: StoreError) -> Stop {
        Stop::new(Reason::StorageFailed, error.to_string(), "the next run makes it again")
    }
}

/// A life that reads.
struct SimLife {
    owner: Owner<SimWorld>,
    state: SimState,
    orders: Orders,
    /// By topic partition: where this life began, where it is, where it ends.
    spans: Vec<(i64, i64, i64)>,
    /// Paths of the open microbatch.
    open: Vec<String>,
}

/// Snapshots that maintenance lets go: all but the current one and its parent.
fn all_but_newest(head: &TableMetadata) -> Vec<i64> {
    let kept: Vec<i64> = ledger::ancestry(head).take(2).map(|snapshot| snapshot.snapshot_id()).collect();
    head.snapshots().map(|snapshot| snapshot.snapshot_id()).filter(|id| !kept.contains(id)).collect()
}

fn tail_hash(place: Place, event: Option<Event>) -> u64 {
    let event = event.map_or(0, |event| u64::from(event.key) + 1);
    (u64::from(place.0) << 48) ^ ((place.2 as u64) << 24) ^ event
}

impl SimLife {
    async fn write(&mut self, path: String, rows: Vec<Row>) -> Result<Option<File>, Stop> {
        if rows.is_empty() {
            return Ok(None);
        }
        let file = File { path: path.clone(), rows: Rc::new(rows) };
        let shared = Rc::clone(&self.state.tables.shared);
        turn(&shared).await;
        self.open.push(path.clone());
        shared.borrow_mut().stored.insert(path.clone(), false);
        shared.borrow_mut().files.insert(path.clone(), file.clone());
        turn(&shared).await;
        if shared.borrow_mut().chance(5) {
            shared.borrow_mut().hit("disk of the warehouse full");
            return Err(Stop::new(Reason::StorageFailed, "no space left", "free space"));
        }
        shared.borrow_mut().stored.insert(path, true);
        turn(&shared).await;
        Ok(Some(file))
    }
}

impl Life for SimLife {
    type World = SimWorld;
    type State = SimState;

    fn owner(&mut self) -> &mut Owner<SimWorld> {
        &mut self.owner
    }

    fn state(&mut self) -> &mut SimState {
        &mut self.state
    }

    fn has_more(&self) -> bool {
        self.spans.iter().any(|(_, at, end)| at < end)
    }

    async fn maintain(&mut self) -> Result<(), Stop> {
        let shared = Rc::clone(&self.state.tables.shared);
        if !shared.borrow_mut().chance(100) {
            return Ok(());
        }
        let upkeep = || Upkeep {
            expiring: Arc::new(all_but_newest),
            merged: None,
            summary: BTreeMap::new(),
            properties: BTreeMap::new(),
            beyond: None,
        };
        self.owner.reload().await?;
        self.owner.keep_up_main(upkeep()).await?;
        shared.borrow_mut().hit("main maintained by its owner");
        for role in Role::ALL {
            let mark = side::inspect(&self.owner.side(role).0);
            if let Some(mark) = mark.map_err(|error| stops::ledger(&side_ident(role), error))? {
                self.owner.keep_up_side(role, &mark, upkeep()).await?;
                shared.borrow_mut().hit(match role {
                    Role::DeadLetters => "dead letters maintained by their owner",
                    Role::Late => "late table maintained by its owner",
                });
            }
        }
        Ok(())
    }

    async fn build(&mut self) -> Result<Option<Built<File>>, Stop> {
        let shared = Rc::clone(&self.state.tables.shared);
        turn(&shared).await;
        let attempt = self.state.tables.new_id();
        let batch = Some(self.owner.record.batch + 1);
        let mut counts = Counts::default();
        let (mut rows, mut late, mut letters) = (Vec::new(), Vec::new(), Vec::new());
        let mut reached = Vec::new();
        let known: BTreeSet<Place> = {
            let universe = shared.borrow();
            let content = universe.content_of(&self.owner.side(Role::DeadLetters).0);
            content.files.iter().flat_map(|file| file.rows.iter().map(|row| row.place)).collect()
        };
        for partition in 0..self.spans.len() {
            let (first, start, last) = self.spans[partition];
            let most = 1 + shared.borrow_mut().choose(self.orders.batch_events as usize) as i64;
            let end = last.min(start + most);
            let universe = shared.borrow();
            if start < end && start < universe.log.partitions[partition].low {
                return Err(Stop::new(Reason::OffsetsLost, "records were removed", "accept-loss"));
            }
            let events: Vec<_> = universe.log.events(partition as i32, start, end).collect();
            for (place, event) in &events {
                counts.consumed += 1;
                let is_unproven = event.kind == EventKind::Unproven;
                let row = Row { key: event.key, place: *place, batch, is_unproven };
                match event.kind {
                    EventKind::Bad if known.contains(place) => counts.dead_letter_known += 1,
                    EventKind::Bad => {
                        counts.dead_letter += 1;
                        letters.push(row);
                    }
                    EventKind::OnTime if self.state.is_new(event.key) => {
                        counts.written += 1;
                        rows.push(row);
                    }
                    EventKind::Late if self.state.is_new(event.key) => {
                        counts.late_side += 1;
                        late.push(row);
                    }
                    EventKind::Unproven => {
                        counts.late_side += 1;
                        late.push(row);
                    }
                    EventKind::OnTime | EventKind::Late => counts.duplicate += 1,
                }
            }
            let tail = events
                .last()
                .map(|(place, event)| Tail { offset: place.2, hash: tail_hash(*place, Some(*event)) });
            self.spans[partition].1 = end;
            reached.push(Reached {
                name: TopicPartition::new(TOPIC, partition as i32),
                first: NextOffset::at(first),
                end: NextOffset::at(end),
                tail,
                max_event_time: None,
            });
        }
        if shared.borrow_mut().chance(8) {
            shared.borrow_mut().hit("interrupted by a signal");
            return Err(Stop::new(Reason::Interrupted, "interrupted", "run again"));
        }
        let main = self.write(format!("main/{attempt}"), rows).await?;
        let mut owed = BTreeMap::new();
        for (role, rows) in [(Role::DeadLetters, letters), (Role::Late, late)] {
            if let Some(file) = self.write(format!("{}/{attempt}", role.name()), rows).await? {
                owed.insert(role, vec![json!({ "path": file.path })]);
            }
        }
        let cut = Cut {
            number: self.owner.record.batch + 1,
            attempt,
            cut_time_ms: self.state.tables.now_ms(),
            counts,
            lane: LIVE_LANE.to_owned(),
            watermark: None,
            reached,
            last: !self.orders.follows && !self.has_more(),
        };
        Ok(Some(Built { cut, files: main.into_iter().collect(), owed }))
    }

    async fn discard(&mut self) {
        for path in std::mem::take(&mut self.open) {
            turn(&self.state.tables.shared).await;
            let universe = &mut *self.state.tables.shared.borrow_mut();
            let was_sent = universe.sent_paths.contains(&path);
            universe
                .require(!was_sent, || format!("{path} was deleted, and a commit that was sent names it"));
            universe.stored.remove(&path);
            universe.hit("data file of a dropped batch deleted");
        }
    }

    fn landed(&mut self, _: Cut, sends: u32) {
        self.open.clear();
        let mut universe = self.state.tables.shared.borrow_mut();
        universe.hit("batch landed");
        if sends > 1 {
            universe.hit("batch landed after it was sent again");
        }
    }
}

/// Most topic partitions of a log that grows.
const PARTITIONS_MAX: usize = 3;

impl SimLife {
    /// What the log has now; it may have grown by a topic partition.
    fn look(&mut self) {
        let universe = &mut *self.state.tables.shared.borrow_mut();
        if universe.log.partitions.len() < PARTITIONS_MAX && universe.chance(20) {
            universe.log.partitions.push(Default::default());
            universe.hit("topic partition added");
        }
        for (partition, log) in universe.log.partitions.iter().enumerate() {
            let end = log.records.len() as i64;
            match self.spans.get_mut(partition) {
                Some(span) => span.2 = span.2.max(end),
                None => self.spans.push((log.low, log.low, end)),
            }
        }
    }
}

impl Endless for SimLife {
    async fn await_turn(&mut self, heartbeat_ms: i64) -> Result<Next, Stop> {
        let shared = Rc::clone(&self.state.tables.shared);
        loop {
            turn(&shared).await;
            self.look();
            if self.has_more() {
                return Ok(Next::Microbatch);
            }
            let is_calm = !shared.borrow().is_faulty;
            if is_calm || shared.borrow_mut().choose(4) == 0 {
                shared.borrow_mut().hit("continuous life asked to end");
                return Ok(Next::End);
            }
            let left_ms = heartbeat_ms - self.state.tables.now_ms();
            if left_ms <= 0 {
                return Ok(Next::Heartbeat);
            }
            let rest_ms = left_ms.min(60_000).unsigned_abs();
            self.state.tables.wait(Duration::from_millis(rest_ms)).await;
        }
    }
}

fn terms(universe: &Universe, orders: &Orders) -> Terms {
    let job = &universe.job;
    Terms {
        job_name: job.name.clone(),
        job_shown: "job.toml".to_owned(),
        job_hash: format!("settings {}", job.settings),
        main: main_ident(),
        sides: Role::ALL.map(|role| (role, side_ident(role))).into(),
        lease: Duration::from_secs(600),
        takeover: orders.takeover,
        dedup: DedupRecord {
            generation: None,
            checksum: None,
            seed: 0,
            key_spec_hash: String::new(),
            shards: 1,
            bucket_width_ms: 1,
            eras: Vec::new(),
            repeats: Repeats::AnyTime,
            floor: None,
            complete_since: None,
            keys: 0,
            digest: String::new(),
        },
    }
}

/// What a start reads of the log.
struct Source {
    cluster_id: String,
    topic_ids: BTreeMap<String, Option<TopicId>>,
    offsets: BTreeMap<TopicPartition, OffsetRange>,
}

impl Source {
    fn of(universe: &Universe) -> Self {
        let range = |partition: &super::universe::Partition| OffsetRange {
            low: NextOffset::at(partition.low),
            end: NextOffset::at(partition.records.len() as i64),
        };
        let named = |(partition, log)| (TopicPartition::new(TOPIC, partition as i32), range(log));
        Self {
            cluster_id: format!("cluster {}", universe.log.cluster),
            topic_ids: BTreeMap::from([(TOPIC.to_owned(), Some(TopicId(universe.log.topic_id())))]),
            offsets: universe.log.partitions.iter().enumerate().map(named).collect(),
        }
    }

    /// Where each topic partition is read from: the ledger, else earliest.
    fn starts(&self, record: Option<&LedgerRecord>) -> BTreeMap<TopicPartition, NextOffset> {
        let start = |(name, range): (&TopicPartition, &OffsetRange)| {
            let known = record.and_then(|record| record.cursor(&name.topic, name.partition));
            (name.clone(), known.map_or(range.low, |cursor| cursor.end))
        };
        self.offsets.iter().map(start).collect()
    }
}

/// One life, from the lock to the release.
pub(super) async fn live(shared: Shared, process: usize, orders: Orders) -> Result<(), Stop> {
    let folder = orders.folder;
    take_lock(&shared, process, folder)?;
    let tables = SimTables { shared: Rc::clone(&shared), process, folder, skew_ms: orders.skew_ms };
    let (terms, job) = { (terms(&shared.borrow(), &orders), shared.borrow().job.clone()) };
    let (main, sides) = protocol::heads(&tables, &terms.main, &terms.sides).await?;
    let found = match &main {
        Some(main) => ledger::inspect(&main.0).map_err(|error| stops::ledger(&terms.main, error))?,
        None => Found::Nothing,
    };
    turn(&shared).await;
    let source = Source::of(&shared.borrow());
    let mut side_facts = BTreeMap::new();
    for (role, ident) in &terms.sides {
        let metadata = sides.get(role).map(|table| &*table.0);
        let mark = metadata.map(side::inspect).transpose();
        let mark = mark.map_err(|error| stops::ledger(ident, error))?.flatten();
        let uuid = metadata.map(TableMetadata::uuid);
        let rows = metadata.map_or(0, |metadata| shared.borrow().content_of(metadata).rows().count() as u64);
        side_facts.insert(*role, SideFacts { table: ident.to_string(), uuid, mark, rows, metadata });
    }
    let table_rows = main.as_ref().map_or(0, |main| shared.borrow().content_of(&main.0).files.len() as u64);
    let key_spec_hash = key_spec_hash(job.key_columns);
    let table = terms.main.to_string();
    let has_manifest = |name: &String| name.ends_with(".manifest");
    let local_generations = shared.borrow().folders[folder].files.keys().any(has_manifest);
    let facts = Facts {
        job_shown: &terms.job_shown,
        job_name: &job.name,
        table: &table,
        sides: &side_facts,
        found: &found,
        table_rows,
        local_generations,
        cluster_id: Some(&source.cluster_id),
        topic_ids: &source.topic_ids,
        offsets: &source.offsets,
        key_spec_hash: &key_spec_hash,
    };
    let allow = Allow {
        ignore_rows: orders.ignore_rows,
        rebase: orders.command == Command::Rebase,
        loss: orders.command == Command::AcceptLoss,
        replay: orders.replay,
        ..Allow::default()
    };
    let columns = job.columns;
    let world =
        SimWorld { tables: tables.clone(), terms: terms.clone(), columns, key_columns: job.key_columns };
    let record = protocol::admit(&world, &facts, allow, main.as_ref(), || Ok(())).await?;
    let differing =
        record.as_ref().map(|record| differing_tails(&shared.borrow(), record)).unwrap_or_default();
    let jumps = match (orders.command, &record) {
        (Command::Run, _) => None,
        (command, Some(record)) => Some(jumps(command, record, &source, &differing)),
        (_, None) => return Ok(()),
    };
    if jumps.as_ref().is_some_and(Vec::is_empty) {
        return Ok(());
    }
    let starts = source.starts(record.as_ref());
    let rests = jumps.is_none() && !orders.follows;
    if rests && nothing_to_do(record.as_ref(), &starts, &source, main.as_ref(), columns) {
        shared.borrow_mut().hit("nothing to do");
        return Ok(());
    }
    if jumps.is_none() && !differing.is_empty() {
        return Err(Stop::new(Reason::TopicChanged, "the last record is another one", "rebase-offsets"));
    }
    let fence = Fence {
        heads: (main, sides),
        record,
        cluster_id: Some(source.cluster_id.clone()),
        topic_ids: source.topic_ids.clone(),
        starts: starts.clone(),
    };
    let mut owner = Owner::take(world, fence).await?;
    if let Some(jumps) = jumps {
        return jump(owner, jumps, &source).await;
    }
    let state = protocol::open_state(&mut owner, &mut SimHome { tables }).await?;
    let spans = starts.iter().map(|(name, start)| (start.get(), start.get(), source.offsets[name].end.get()));
    let spans = spans.collect();
    let mut life = SimLife { owner, state, orders, spans, open: Vec::new() };
    let lived = match orders.follows {
        true => protocol::follow(&mut life).await,
        false => protocol::drain(&mut life).await,
    };
    life.owner.end(lived).await
}

fn take_lock(shared: &Shared, process: usize, folder: usize) -> Result<(), Stop> {
    let universe = &mut *shared.borrow_mut();
    let folder = &mut universe.folders[folder];
    if folder.locked_by.is_some() && !folder.is_lock_broken {
        universe.hit("lock held");
        return Err(Stop::new(Reason::Busy, "the folder is in use", "try again later"));
    }
    folder.locked_by = Some(process);
    Ok(())
}

fn nothing_to_do(
    record: Option<&LedgerRecord>,
    starts: &BTreeMap<TopicPartition, NextOffset>,
    source: &Source,
    main: Option<&Loaded>,
    columns: i32,
) -> bool {
    let Some(record) = record else { return false };
    let read = source.offsets.iter().all(|(name, range)| starts[name] >= range.end);
    let lacks =
        main.is_some_and(|main| (main.0.current_schema().as_struct().fields().len() as i32) < columns);
    read && record.released && !record.owes_side_files() && !lacks
}

/// Topic partitions whose last record taken is another one now.
fn differing_tails(universe: &Universe, record: &LedgerRecord) -> BTreeSet<i32> {
    let log = &universe.log;
    let differs = |(partition, cursor): (&i32, &Cursor)| {
        let tail = cursor.tail?;
        let event = log.partitions[*partition as usize].records.get(tail.offset as usize).copied().flatten();
        let hash = tail_hash((log.incarnation, *partition, tail.offset), event);
        (hash != tail.hash).then_some(*partition)
    };
    record.live().topics.get(TOPIC).into_iter().flatten().filter_map(differs).collect()
}

/// Which offsets a command moves, as `rebase-offsets` and `accept-loss` do.
fn jumps(command: Command, record: &LedgerRecord, source: &Source, differing: &BTreeSet<i32>) -> Vec<Jump> {
    let known = record.topics.get(TOPIC).copied().flatten();
    let other_topic = known != source.topic_ids[TOPIC];
    let other_cluster = record.cluster_id.as_ref() != Some(&source.cluster_id);
    let mut jumps = Vec::new();
    for (name, range) in &source.offsets {
        let old_end = record.cursor(&name.topic, name.partition).map(|cursor| cursor.end);
        let lost = old_end.is_some_and(|old| old < range.low);
        let moves = match command {
            Command::Rebase => {
                let shorter = old_end.is_none_or(|old| old > range.end);
                other_topic || other_cluster || lost || shorter || differing.contains(&name.partition)
            }
            _ => lost,
        };
        if moves {
            let (topic, partition) = (name.topic.clone(), name.partition);
            let reason = format!("{command:?}");
            jumps.push(Jump { topic, partition, old_end, new_start: range.low, reason });
        }
    }
    jumps
}

async fn jump(mut owner: Owner<SimWorld>, jumps: Vec<Jump>, source: &Source) -> Result<(), Stop> {
    let mut next = LedgerRecord {
        kind: Kind::Jump,
        cluster_id: Some(source.cluster_id.clone()),
        topics: source.topic_ids.clone(),
        jumps: jumps.clone(),
        released: true,
        ..owner.record.clone()
    };
    let lane = next.lanes.entry(LIVE_LANE.to_owned()).or_default();
    for jump in jumps {
        let cursor = Cursor { start: jump.new_start, end: jump.new_start, tail: None, max_event_time: None };
        lane.topics.entry(jump.topic).or_default().insert(jump.partition, cursor);
    }
    owner.commit(next, Vec::new()).await?;
    owner.world.shared().borrow_mut().hit("offsets moved by a command");
    Ok(())
}
