//! The life of an owner after its fence: the dedup state opened or rebuilt, then microbatches, each in the one order.
//!
//! Durable steps of microbatch n, and what a crash after each leaves
//! 1. data files of all tables, closed and synced: files that no table names, swept as orphans.
//! 2. generation n of the dedup state, files and folder synced: files that no ledger names; the sweep takes them.
//! 3. main commit: the switch. Before it nothing of n is visible, after it all of it is.
//! 4. side tables: owed by the record of step 3, brought forward by the next start if missing.
//! 5. files of the state that nothing names any more are deleted.
//!
//! A microbatch that ends before step 3 was sent is dropped with its files. From the first request on nothing of it is
//! deleted by this life, whatever the outcome (R7).

use std::collections::BTreeMap;

use serde_json::Value;
use uuid::Uuid;

use super::owner::{Owner, side_record};
use super::world::{FileOf, Tables, World};
use crate::commit::ledger::{
    self, BucketRecord, Cursor, DedupRecord, EraRecord, Kind, LIVE_LANE, LaneState, LedgerRecord,
    RequeueLane, Tail,
};
use crate::commit::savepoint;
use crate::commit::side::Role;
use crate::counts::Counts;
use crate::dedup::{GenerationName, GenerationRef, StoreError};
use crate::event_time::EventTimeMs;
use crate::mutant;
use crate::offset::{NextOffset, TopicPartition};
use crate::stop::Stop;

/// Generations that the sweep keeps, the current one included, so that a table rolled back a little is at home at once.
pub(crate) const GENERATIONS_KEPT: usize = 3;

/// The dedup state of a life.
pub(crate) trait State {
    /// Expires what the watermark has passed and writes the keys of the microbatch under this name; durable when it
    /// returns. From then on probes use it.
    async fn prepare(
        &mut self,
        name: GenerationName,
        watermark: Option<EventTimeMs>,
    ) -> Result<DedupFacts, Stop>;

    /// Makes the prepared generation the one in use: the commit that names it has landed.
    fn publish(&mut self);

    /// Drops the keys of the microbatch: nothing of it counts as seen.
    fn abandon(&mut self);

    /// Whether enough files wait for a sweep.
    fn wants_sweep(&self) -> bool;

    /// Deletes files of this job's state that neither this state nor a generation of `keep` needs, of epochs below
    /// `epoch`.
    async fn sweep(&mut self, keep: &[GenerationRef], job_id: Uuid, epoch: u64) -> Result<(), StoreError>;
}

/// What the ledger says of a prepared generation.
#[derive(Debug, Clone)]
pub(crate) struct DedupFacts {
    pub(crate) generation: GenerationRef,
    pub(crate) bucket_width_ms: i64,
    pub(crate) eras: Vec<EraRecord>,
    pub(crate) floor: Option<EventTimeMs>,
    pub(crate) complete_since: Option<EventTimeMs>,
    pub(crate) keys: u64,
    pub(crate) digest: String,
    pub(crate) buckets: Vec<BucketRecord>,
}

/// Where dedup state is kept, and made again from the tables.
pub(crate) trait StateHome<W: World> {
    /// See [`State`].
    type State: State;

    /// Opens the generation that the record names, or `named` in its place; the outer error is for a person, the inner
    /// one for a rebuild.
    async fn open(
        &mut self,
        record: &LedgerRecord,
        named: Option<&GenerationRef>,
    ) -> Result<Result<Self::State, StoreError>, Stop>;

    /// Writes a generation with the keys that the tables hold, renewing the lease on the way.
    async fn rebuild(&mut self, owner: &mut Owner<W>, why: &StoreError) -> Result<GenerationRef, Stop>;

    /// Loads what a widened window lacks.
    async fn widen(&mut self, owner: &mut Owner<W>, state: &mut Self::State) -> Result<(), Stop>;

    /// A state that was made again can not be opened.
    fn failed(&self, error: StoreError) -> Stop;
}

/// Opens the state that the ledger names, or rebuilds it from the tables if it is gone or damaged; then loads what a
/// widened window lacks. Gives the table back if that fails.
pub(crate) async fn open_state<W: World, H: StateHome<W>>(
    owner: &mut Owner<W>,
    home: &mut H,
) -> Result<H::State, Stop> {
    let opened = open_and_widen(owner, home).await;
    if let Err(stop) = &opened {
        owner.release_after(stop).await;
    }
    opened
}

async fn open_and_widen<W: World, H: StateHome<W>>(
    owner: &mut Owner<W>,
    home: &mut H,
) -> Result<H::State, Stop> {
    let mut state = open_or_rebuild(owner, home).await?;
    home.widen(owner, &mut state).await?;
    Ok(state)
}

/// Opens the state that the ledger names, or rebuilds it from the tables if it is gone or damaged.
pub(crate) async fn open_or_rebuild<W: World, H: StateHome<W>>(
    owner: &mut Owner<W>,
    home: &mut H,
) -> Result<H::State, Stop> {
    let named = generation(&owner.record.dedup);
    let state = match home.open(&owner.record, named.as_ref()).await? {
        Ok(state) => state,
        Err(why) => {
            let rebuilt = home.rebuild(owner, &why).await?;
            let opened = home.open(&owner.record, Some(&rebuilt)).await?;
            opened.map_err(|error| home.failed(error))?
        }
    };
    Ok(state)
}

/// The generation that a record names.
pub(crate) fn generation(dedup: &DedupRecord) -> Option<GenerationRef> {
    reference(dedup.generation.as_deref()?, dedup.checksum.clone()?)
}

pub(crate) fn reference(name: &str, checksum: String) -> Option<GenerationRef> {
    Some(GenerationRef { name: name.parse().ok()?, checksum })
}

/// What the ledger will say of a microbatch that was cut.
#[derive(Debug, Clone)]
pub(crate) struct Cut {
    /// Its number.
    pub(crate) number: u64,
    /// Identity of this try; stands in the names of its files.
    pub(crate) attempt: Uuid,
    /// When it was begun, ms since the epoch.
    pub(crate) cut_time_ms: i64,
    pub(crate) counts: Counts,
    /// The lane that was read.
    pub(crate) lane: String,
    /// Its watermark with what was read so far.
    pub(crate) watermark: Option<EventTimeMs>,
    /// Every topic partition of the lane in this life.
    pub(crate) reached: Vec<Reached>,
    /// How far dead letters were taken, of those that are decoded again.
    pub(crate) requeue: Option<RequeueLane>,
    /// Whether this life takes no microbatch after it.
    pub(crate) last: bool,
}

/// Where one topic partition stands at a cut.
#[derive(Debug, Clone)]
pub(crate) struct Reached {
    pub(crate) name: TopicPartition,
    /// Where this life began to read it.
    pub(crate) first: NextOffset,
    pub(crate) end: NextOffset,
    /// The last record taken by this life.
    pub(crate) tail: Option<Tail>,
    pub(crate) max_event_time: Option<EventTimeMs>,
}

/// A microbatch whose data files are durable and that nothing names yet.
#[derive(Debug)]
pub(crate) struct Built<File> {
    pub(crate) cut: Cut,
    /// Of the main table.
    pub(crate) files: Vec<File>,
    /// Of side tables that get any, as the ledger names them.
    pub(crate) owed: BTreeMap<Role, Vec<Value>>,
}

/// What one life does its own way.
pub(crate) trait Life {
    /// See [`World`].
    type World: World;
    /// See [`State`].
    type State: State;

    fn owner(&mut self) -> &mut Owner<Self::World>;

    fn state(&mut self) -> &mut Self::State;

    /// Takes up what others ask, and chooses the lane of the next microbatch; false if there is none. No microbatch is open,
    /// and no side table is owed a file.
    async fn turn(&mut self) -> Result<bool, Stop>;

    /// Keeps the tables small where that is due. No microbatch is open, and no side table is owed a file.
    async fn maintain(&mut self) -> Result<(), Stop> {
        Ok(())
    }

    /// Reads a microbatch, decides its rows and writes its data files; `None` if the life was asked to end before
    /// anything was read, or what was read of a lane other than live is put off.
    async fn build(&mut self) -> Result<Option<Built<FileOf<Self::World>>>, Stop>;

    /// Commits a microbatch; gives the number of requests. What is read of the next one meanwhile is neither probed nor
    /// written, and goes with the life where this one does not land.
    async fn commit(&mut self, next: LedgerRecord, files: Vec<FileOf<Self::World>>) -> Result<u32, Stop> {
        self.owner().commit(next, files).await
    }

    /// Deletes data files of a microbatch that was never sent.
    async fn discard(&mut self);

    /// A microbatch landed, its side tables follow, and its keys count as seen.
    fn landed(&mut self, cut: Cut, sends: u32);
}

/// What a life that has no end does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Takes a microbatch: records wait, or a heartbeat is due and the ledger trails what was passed over (R8).
    Microbatch,
    /// Renews the lease: nothing was committed since the last heartbeat.
    Heartbeat,
    /// Ends: it was asked to.
    End,
}

/// A life that goes on when everything is read.
pub(crate) trait Endless: Life {
    /// Waits until there is something to do; not beyond the time of the next heartbeat, ms since the epoch.
    async fn await_turn(&mut self, heartbeat_ms: i64) -> Result<Turn, Stop>;
}

/// Takes microbatches until there is nothing left to read.
pub(crate) async fn drain<L: Life>(life: &mut L) -> Result<(), Stop> {
    while life.turn().await? {
        life.maintain().await?;
        microbatch(life).await?;
    }
    Ok(())
}

/// Takes microbatches as records come, and renews the lease while none come, until the life is asked to end.
pub(crate) async fn follow<L: Endless>(life: &mut L) -> Result<(), Stop> {
    loop {
        let heartbeat_ms = life.owner().heartbeat_ms();
        match life.await_turn(heartbeat_ms).await? {
            Turn::Microbatch => {
                life.maintain().await?;
                microbatch(life).await?;
            }
            Turn::Heartbeat => {
                life.owner().renew().await?;
                life.owner().world.reach("heartbeat");
                // Renewals are commits too.
                life.maintain().await?;
            }
            Turn::End => return Ok(()),
        }
    }
}

async fn microbatch<L: Life>(life: &mut L) -> Result<(), Stop> {
    let (cut, next, files) = match prepare(life).await {
        Ok(Some(prepared)) => prepared,
        unsent => {
            // Nothing was sent, so nothing can name these files.
            life.state().abandon();
            life.discard().await;
            return unsent.map(|_| ());
        }
    };
    let sent = mutant!("side-tables-first", {
        let owner = life.owner();
        (owner.record.sides, owner.record.batch) = (next.sides.clone(), next.batch);
        owner.forward_sides().await?;
        owner.commit(next, files).await
    } => life.commit(next, files).await);
    mutant!("delete-on-unknown", if sent.is_err() { life.discard().await } => ());
    let sends = sent?;
    mutant!("main-leaves-sides-behind", () => life.owner().forward_sides().await?);
    life.state().publish();
    life.owner().world.reach("published");
    sweep(life).await;
    life.landed(cut, sends);
    Ok(())
}

type Prepared<L> = (Cut, LedgerRecord, Vec<FileOf<<L as Life>::World>>);

/// Everything before the commit is sent.
async fn prepare<L: Life>(life: &mut L) -> Result<Option<Prepared<L>>, Stop> {
    let Some(Built { cut, files, owed }) = life.build().await? else { return Ok(None) };
    life.owner().world.reach("data_files_closed");
    let name = GenerationName::new(life.owner().record.epoch, cut.number, cut.attempt);
    let watermark = live_watermark(&life.owner().record, &cut);
    let dedup = life.state().prepare(name, watermark).await?;
    life.owner().world.reach("state_prepared");
    let next = next_record(life.owner(), &cut, owed, dedup);
    crate::crash_point!("record_made");
    Ok(Some((cut, next, files)))
}

/// After each microbatch: deletes state files that nothing names (design, state generations), of the owner's own epoch
/// too. Costs nothing while few are to go.
async fn sweep<L: Life>(life: &mut L) {
    if !life.state().wants_sweep() {
        return;
    }
    let owner = life.owner();
    let mut kept = ledger::recent_generations(owner.main_metadata(), GENERATIONS_KEPT);
    let Some(pinned) = savepoint::pinned_generations(owner.main_metadata()) else {
        tracing::warn!("a savepoint can not be read, so no state file is deleted: it may need them");
        return;
    };
    kept.extend(pinned);
    let keep: Vec<_> = kept.into_iter().filter_map(|(name, checksum)| reference(&name, checksum)).collect();
    let (job_id, epoch) = (owner.record.job_id, owner.record.epoch.saturating_add(1));
    if let Err(error) = life.state().sweep(&keep, job_id, epoch).await {
        tracing::warn!(%error, "state files that nothing names could not be deleted; a later batch tries again");
    }
}

/// Lets a record name a prepared generation, with what it holds.
pub(crate) fn name_generation(next: &mut LedgerRecord, facts: DedupFacts) {
    next.dedup = DedupRecord {
        generation: Some(facts.generation.name.to_string()),
        checksum: Some(facts.generation.checksum),
        floor: facts.floor,
        bucket_width_ms: facts.bucket_width_ms,
        eras: facts.eras,
        complete_since: facts.complete_since,
        keys: facts.keys,
        digest: facts.digest,
        ..next.dedup.clone()
    };
    next.buckets = facts.buckets;
    if let Some(others) = &mut next.others {
        let live = &next.buckets;
        others.buckets.retain(|known| live.binary_search_by_key(&known.from, |bucket| bucket.from).is_ok());
    }
}

/// Buckets expire by the live lane's watermark, whatever lane was read.
fn live_watermark(record: &LedgerRecord, cut: &Cut) -> Option<EventTimeMs> {
    if cut.lane == LIVE_LANE { cut.watermark } else { record.live().watermark }
}

/// The record of a microbatch.
fn next_record<W: World>(
    owner: &Owner<W>,
    cut: &Cut,
    mut owed: BTreeMap<Role, Vec<Value>>,
    facts: DedupFacts,
) -> LedgerRecord {
    let (before, terms, metadata) = (&owner.record, owner.world.terms(), owner.main_metadata());
    let mut next = LedgerRecord {
        kind: Kind::Data,
        batch: cut.number,
        last_batch_with_rows: match cut.counts.written {
            0 => mutant!("repeats-claim-rows", cut.number => before.last_batch_with_rows),
            _ => cut.number,
        },
        cut_time_ms: cut.cut_time_ms,
        schema_id: metadata.current_schema_id(),
        spec_id: metadata.default_partition_spec_id(),
        job_hash: terms.job_hash.clone(),
        counts: cut.counts,
        released: mutant!("released-with-debt", cut.last => cut.last && owed.is_empty()),
        jumps: Vec::new(),
        batch_generation: None,
        batch_lane: Some(cut.lane.clone()).filter(|lane| lane != LIVE_LANE),
        requeue: cut.requeue.clone(),
        ..before.clone()
    };
    for (role, table) in &owner.sides {
        let side = side_record(&terms.sides[role], W::Tables::metadata(table), owed.remove(role));
        next.sides.insert(role.name().to_owned(), side);
    }
    assert!(owed.is_empty(), "a microbatch has side files only of tables that its owner has");
    name_generation(&mut next, facts);
    next.tidy_lanes();
    advance(&mut next, before, cut);
    next
}

/// Moves the cursors of the lane that was read, and of no other. A backfill whose cursors have reached their frozen ends
/// is done.
fn advance(next: &mut LedgerRecord, before: &LedgerRecord, cut: &Cut) {
    let known_lane = before.lanes.get(&cut.lane);
    let lane = next.lanes.entry(cut.lane.clone()).or_default();
    lane.watermark = cut.watermark;
    for Reached { name, first, end, tail, max_event_time } in &cut.reached {
        let known = known_lane.and_then(|lane| lane.topics.get(&name.topic)?.get(&name.partition));
        let parents_end = |cursor: &Cursor| mutant!("start-is-not-the-parents-end", *first => cursor.end);
        let cursor = Cursor {
            start: known.map_or(*first, parents_end),
            end: *end,
            tail: tail.or_else(|| known.and_then(|cursor| cursor.tail)),
            max_event_time: *max_event_time,
        };
        assert!(cursor.end >= cursor.start, "offsets of {name} never move back");
        lane.topics.entry(name.topic.clone()).or_default().insert(name.partition, cursor);
    }
    let left = lane.offsets_left();
    if let Some(backfill) = &mut lane.backfill {
        backfill.counts.add(&cut.counts);
        if left == 0 {
            backfill.state = LaneState::Done;
        }
    }
}
