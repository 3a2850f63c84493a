//! Dedup state as a folder keeps it: generations of segments, whose bytes survive a loss of power only once they are synced.

use std::collections::BTreeSet;
use std::rc::Rc;

use uuid::Uuid;

use super::catalog::{SimTables, turn};
use super::oracles::after;
use super::process::main_ident;
use super::universe::{Key, Row, StateContent, StateFile, Universe};
use super::world::SimWorld;
use crate::commit::ledger::{self, LedgerRecord};
use crate::commit::side::Role;
use crate::dedup::{GenerationName, GenerationRef, StoreError};
use crate::event_time::EventTimeMs;
use crate::protocol::{DedupFacts, Owner, State, StateHome, Tables};
use crate::stop::{Reason, Stop};

/// A dedup state as its process has it in memory.
pub(super) struct SimState {
    pub(super) tables: SimTables,
    /// Segments of the generation in use, and their keys.
    pub(super) current: (Option<GenerationName>, Vec<String>, BTreeSet<Key>),
    pub(super) prepared: Option<(GenerationName, Vec<String>, BTreeSet<Key>)>,
    pub(super) pending: BTreeSet<Key>,
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
    pub(super) fn is_new(&mut self, key: Key) -> bool {
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
pub(super) struct SimHome {
    pub(super) tables: SimTables,
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
                let of_batch = after(&record) + 1..=record.batch;
                let ours =
                    |row: &&Row| row.batch.is_some_and(|batch| of_batch.contains(&batch)) && !row.is_unproven;
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
