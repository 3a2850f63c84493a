//! The owner of a table: from the heads over the start table to the fence, and every commit after it.
//!
//! Flow: [`heads`] -> [`admit`] (reads only) -> [`Owner::take`] (lock line, fence) -> side tables -> commits -> release
//!
//! Order of durable steps: the lock file names the owner, synced, before the fence is sent; a crash between the two
//! leaves a ledger that names the owner before, whom the lock file knows too.

mod head;
mod lost;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use iceberg::TableIdent;
use iceberg::spec::TableMetadata;
use serde_json::Value;
use uuid::Uuid;

use head::{Expected, head_carries, kin};
use lost::Owed;
pub(crate) use lost::{LostSide, find as lost_sides};

use super::side;
use super::start::{self, Allow, Facts, LeaseVerdict, Start};
use super::stops::{self, Committing};
use super::switch::switch;
use super::world::{FileOf, Heads, Request, TableOf, Tables, Terms, World};
use crate::commit::ledger::{
    self, Cursor, FORMAT_VERSION, Found, Kind, LIVE_LANE, Lane, LedgerRecord, SideRecord,
};
use crate::commit::savepoint;
use crate::commit::side::{self as side_mark, Debt, Role, SideError, SideMark};
use crate::commit::switch::SwitchError;
use crate::commit::upkeep::Upkeep;
use crate::counts::Counts;
use crate::mutant;
use crate::offset::{NextOffset, TopicId, TopicPartition};
use crate::stop::{Reason, Stop};

/// A lease holds so many heartbeats: two may fail to come before others believe in a death (R9).
const LEASE_HEARTBEATS: u32 = 3;
/// Heads of a table whose history was expired past our record that one commit looks for rows in.
const LOOKS_MAX: u32 = 8;
/// How long the head must stand still before an expired lease is believed.
const HEAD_STILL_TIME: Duration = Duration::from_secs(2);

/// Main and side tables, as far as they exist.
///
/// Side tables come first: what they follow has landed in main by the time that main is read, so a live owner never makes
/// them look ahead.
pub(crate) async fn heads<T: Tables>(
    tables: &T,
    main_ident: &TableIdent,
    side_idents: &BTreeMap<Role, TableIdent>,
) -> Result<Heads<T::Table>, Stop> {
    let mut sides = BTreeMap::new();
    for (role, ident) in side_idents {
        sides.extend(tables.find(ident).await?.map(|table| (*role, table)));
    }
    let main = tables.find(main_ident).await?;
    for (role, ident) in side_idents {
        if main.is_some() && !sides.contains_key(role) {
            sides.extend(tables.find(ident).await?.map(|table| (*role, table)));
        }
    }
    Ok((main, sides))
}

/// The start table and the lease: reads only. Gives the record to go on from, `None` for a first run. `main` is the table
/// whose ledger the facts name; `fits` refuses a table that the job can not write to.
pub(crate) async fn admit<W: World>(
    world: &W,
    facts: &Facts<'_>,
    allow: Allow,
    main: Option<&TableOf<W>>,
    fits: impl FnOnce() -> Result<(), Stop>,
) -> Result<Option<LedgerRecord>, Stop> {
    let record = match start::judge(facts, allow) {
        Ok(Start::First) => None,
        Ok(Start::Resume(record)) => Some(*record),
        Err(stop) => return Err(busy_before(world, stop, facts.found).await),
    };
    fits()?;
    if let Some(record) = &record {
        await_lease(world, record, facts.found).await?;
        if !allow.trust_ledger {
            refuse_cut_off(world, facts.found, main).await?;
        }
        if !allow.lost_list {
            refuse_lost_list(facts, record)?;
        }
    }
    Ok(record)
}

/// Tables that are read one after another may look torn while a live owner commits: then it is BUSY that is true.
async fn busy_before<W: World>(world: &W, stop: Stop, found: &Found) -> Stop {
    let torn = matches!(stop.reason, Reason::TableRolledBack | Reason::TableReplaced);
    match found.record() {
        Some(record) if torn => await_lease(world, record, found).await.err().unwrap_or(stop),
        _ => stop,
    }
}

/// BUSY unless the table is free, its owner dead, its lease over, or a takeover is asked for.
async fn await_lease<W: World>(world: &W, record: &LedgerRecord, found: &Found) -> Result<(), Stop> {
    let (terms, tables) = (world.terms(), world.tables());
    if terms.takeover {
        return Ok(());
    }
    let table = terms.main.to_string();
    let busy = |until_ms| start::busy(&table, Some(record.owner), Some(until_ms), &terms.job_shown);
    match start::lease(record, world.knows_as_dead(record.owner), tables.now_ms()) {
        LeaseVerdict::Free | LeaseVerdict::OwnerDead => Ok(()),
        LeaseVerdict::Busy { until_ms } => mutant!("lease-ignored", Ok(()) => Err(busy(until_ms))),
        LeaseVerdict::Expired => {
            // A live owner whose clock is wrong still moves the head. That nothing happens is what is waited for (R9).
            tables.wait(HEAD_STILL_TIME).await;
            let again = load(tables, &terms.main).await?;
            let is_still = |now: Uuid| mutant!("moving-head-taken-for-still", true => now == record.attempt);
            match ledger::inspect(W::Tables::metadata(&again)) {
                Ok(Found::Record(now) | Found::CutOff(now)) if is_still(now.attempt) => Ok(()),
                // Rolled back, and gone on with from the older record on purpose.
                Ok(Found::RolledBack { older: Some(older), .. })
                    if record.sides_back_to.is_some() && older.attempt == record.attempt =>
                {
                    Ok(())
                }
                // Rolled back when it was surveyed, and still: nobody commits, so the stop of the start table is true.
                Ok(Found::RolledBack { newer, .. })
                    if newer.attempt == record.attempt && matches!(found, Found::RolledBack { .. }) =>
                {
                    Ok(())
                }
                _ => Err(busy(record.lease_until_ms)),
            }
        }
    }
}

/// History was expired before any record of ours: the property holds only if the rows of its last batch are there.
async fn refuse_cut_off<W: World>(world: &W, found: &Found, main: Option<&TableOf<W>>) -> Result<(), Stop> {
    let (Found::CutOff(record), Some(table)) = (found, main) else { return Ok(()) };
    let batch = record.last_batch_with_rows;
    if batch == 0 || mutant!("property-without-rows", true => world.has_rows_of(table, batch).await?) {
        return Ok(());
    }
    Err(Stop::new(
        Reason::TableRolledBack,
        format!(
            "no snapshot of table {} that is kept has a ledger record, and the rows of batch {} are not in it",
            world.terms().main,
            record.last_batch_with_rows
        ),
        format!(
            "nothing was read or written; either others deleted these rows, and the ledger is right: then go on with it:\n  \
             tidemill run {} --trust-ledger\nor the table was rolled back and its history expired: then bring its metadata \
             file of batch {} back with your engine (register_table)",
            world.terms().job_shown,
            record.batch
        ),
    ))
}

async fn load<T: Tables>(tables: &T, table: &TableIdent) -> Result<T::Table, Stop> {
    tables.load(table).await.map_err(|error| stops::unreadable(table, *error))
}

/// The list of files that a side table is owed stands in the property alone. Judged before the fence, which would write
/// the property anew without it.
fn refuse_lost_list(facts: &Facts<'_>, record: &LedgerRecord) -> Result<(), Stop> {
    let is_ours = |mark: &SideMark| mark.job_id == record.job_id && mark.batch >= record.batch;
    let has_them = |role: &str| facts.side(role).and_then(|side| side.mark.as_ref()).is_some_and(is_ours);
    let lost = record.sides.iter().find(|(role, side)| side.owed && side.files.is_none() && !has_them(role));
    lost.map_or(Ok(()), |(_, side)| {
        Err(Stop::new(
            Reason::SideFilesLost,
            format!("the list of files that side table {} is owed is gone with table property tidemill.ledger", side.table),
            format!(
                "nothing was read or written; put that property of table {} back from an earlier metadata file, then:\n  \
                 tidemill run {}\nor go on without these files, with the loss written into the ledger:\n  tidemill \
                 accept-loss {}",
                facts.table, facts.job_shown, facts.job_shown
            ),
        ))
    })
}

/// Loads a table that is known. One that was made anew under its name is not it, and must not get into the ledger.
async fn load_again<T: Tables>(tables: &T, table: &TableIdent, known: &T::Table) -> Result<T::Table, Stop> {
    let again = load(tables, table).await?;
    same_table(table, T::metadata(known), T::metadata(&again))?;
    Ok(again)
}

fn same_table(table: &TableIdent, known: &TableMetadata, again: &TableMetadata) -> Result<(), Stop> {
    let (expected, found) = (known.uuid(), again.uuid());
    if expected == found {
        return Ok(());
    }
    Err(Stop::new(
        Reason::TableReplaced,
        format!("table {table} was replaced: uuid {found} where {expected} was expected"),
        "every batch before is committed; put the table back under its name, then:\n  tidemill run JOB",
    ))
}

/// A side table as a start has judged it.
struct Judged {
    mark: Option<SideMark>,
    /// Whether it has the files of the last batch, where a ledger goes on that owes it some.
    is_paid: bool,
}

/// Side tables that were there.
type Judgements = BTreeMap<Role, Judged>;

fn judgements<W: World>(terms: &Terms, fence: &Fence<TableOf<W>>) -> Result<Judgements, Stop> {
    let judged = |(role, table): (&Role, &TableOf<W>)| {
        let metadata = W::Tables::metadata(table);
        let mark = side_mark::inspect(metadata).map_err(|error| stops::ledger(&terms.sides[role], error))?;
        let has = |record: &LedgerRecord| side_mark::debt_of(metadata, record.job_id, record.batch);
        let is_paid = fence.record.as_ref().map(has) == Some(Debt::Paid);
        Ok((*role, Judged { mark, is_paid }))
    };
    fence.heads.1.iter().map(judged).collect()
}

/// What a fence says beside the record that it copies.
#[derive(Debug)]
pub(crate) struct Fence<Table> {
    /// The tables that were found.
    pub(crate) heads: Heads<Table>,
    /// The record that was admitted; `None` for a first run.
    pub(crate) record: Option<LedgerRecord>,
    /// Kafka's cluster id.
    pub(crate) cluster_id: Option<String>,
    /// Topic ids as the broker says, for every topic of the job.
    pub(crate) topic_ids: BTreeMap<String, Option<TopicId>>,
    /// Where a first run begins.
    pub(crate) starts: BTreeMap<TopicPartition, NextOffset>,
    /// A command is at work that sees to files that side tables are owed and that are gone: they are no reason to stop.
    pub(crate) bears_lost_files: bool,
}

/// Who may commit, and the record that the next commit builds on.
pub(crate) struct Owner<W: World> {
    pub(crate) world: W,
    /// Main as reloaded after the last commit.
    pub(crate) main: TableOf<W>,
    /// Side tables by role, as loaded last.
    pub(crate) sides: BTreeMap<Role, TableOf<W>>,
    /// The record as it landed last.
    pub(crate) record: LedgerRecord,
    /// Iceberg's sequence number of the snapshot that carries `record`.
    sequence_number: i64,
    id: Uuid,
    /// Whether a commit of this process has landed.
    owned: bool,
    /// Properties with requests that the next commit answers and so removes (R9).
    answered: Vec<String>,
}

impl<W: World> Owner<W> {
    /// Fences: the first commit of this process, epoch + 1. A first run's fence records its start offsets.
    pub(crate) async fn take(mut world: W, mut fence: Fence<TableOf<W>>) -> Result<Self, Stop> {
        let judged = judgements::<W>(world.terms(), &fence)?;
        let (main, sides) = world.ensure_tables(std::mem::take(&mut fence.heads)).await?;
        let id = world.tables().new_id();
        let Fence { record, topic_ids, bears_lost_files, .. } = &fence;
        let bears_lost_files = *bears_lost_files;
        let fenced = match record {
            Some(record) => {
                let batch = mutant!("fence-counts-a-batch", record.batch + 1 => record.batch);
                // A replay's offsets jump with its fence; jumps of an earlier commit are not told again.
                let jumps = record.sides_back_to.map_or_else(Vec::new, |_| record.jumps.clone());
                LedgerRecord { kind: Kind::Fence, batch, jumps, ..record.clone() }
            }
            None => first_record(&world, &main, &sides, &fence)?,
        };
        let is_ours = |mark: &&SideMark| mark.job_id == fenced.job_id;
        let marked = judged
            .values()
            .filter_map(|judged| judged.mark.as_ref())
            .filter(is_ours)
            .map(|mark| mark.epoch)
            .max()
            .unwrap_or(0);
        let known = mutant!("local-epoch-rules", 0 => fenced.epoch).max(world.epoch_max()).max(marked);
        let epoch = known + mutant!("fence-keeps-epoch", 0 => 1);
        crate::crash_point!("tables_ready");
        mutant!("lock-line-left-out", () => world.record_owner(id, epoch).await?);
        let record =
            record.clone().unwrap_or_else(|| LedgerRecord { attempt: Uuid::nil(), ..fenced.clone() });
        let sequence_number = ledger::sequence_number_of(W::Tables::metadata(&main), record.attempt);
        let mut owner =
            Self { world, main, sides, record, sequence_number, id, owned: false, answered: Vec::new() };
        let released = mutant!("fence-takes-no-lease", fenced.released => false);
        let fence = LedgerRecord { epoch, released, ..fenced };
        mutant!("no-fence", 0 => owner.commit(fence, Vec::new()).await?);
        owner.world.reach("fenced");
        owner.learn_topics(topic_ids);
        if let Err(stop) = owner.settle(&judged, bears_lost_files).await {
            owner.release_after(&stop).await;
            return Err(stop);
        }
        Ok(owner)
    }

    /// What an owner sees to before it reads: side tables, new columns.
    async fn settle(&mut self, judged: &Judgements, bears_lost_files: bool) -> Result<(), Stop> {
        // They were loaded before the fence, and the owner before may have written since.
        for role in self.roles() {
            self.reload_side(role).await?;
        }
        self.claim_sides(judged).await?;
        mutant!("side-ahead-of-the-fence-passes", () => self.refuse_ahead().await?);
        self.set_sides_back().await?;
        match mutant!("start-forgets-debt", Ok(()) => self.forward_sides().await) {
            Err(stop) if bears_lost_files && stop.reason == Reason::SideFilesLost => {}
            forwarded => forwarded?,
        }
        // A table that was made anew meanwhile is not the one that got its columns.
        if let Some(main) = self.world.add_columns(None, &self.main).await? {
            same_table(&self.world.terms().main, self.main_metadata(), W::Tables::metadata(&main))?;
            self.main = main;
        }
        for role in self.roles() {
            if let Some(table) = self.world.add_columns(Some(role), self.side(role)).await? {
                let known = W::Tables::metadata(self.side(role));
                same_table(self.side_ident(role), known, W::Tables::metadata(&table))?;
                self.sides.insert(role, table);
            }
        }
        Ok(())
    }

    fn roles(&self) -> Vec<Role> {
        self.sides.keys().copied().collect()
    }

    /// A side table of the job, as loaded last.
    ///
    /// # Panics
    /// When neither the job nor its ledger has a table of this role.
    pub(crate) fn side(&self, role: Role) -> &TableOf<W> {
        self.sides.get(&role).expect("every side table of the job was made or found before the fence")
    }

    fn side_ident(&self, role: Role) -> &TableIdent {
        self.world.terms().sides.get(&role).expect("a side table that was loaded has a name")
    }

    /// After a rollback of main: side tables follow the older batch again. After a restore they have the files of the
    /// savepoint again.
    pub(crate) async fn set_sides_back(&mut self) -> Result<(), Stop> {
        if self.record.sides_back_to.is_none() {
            return Ok(());
        }
        for role in self.roles() {
            self.set_side_back(role).await?;
        }
        // Stated by the next commit; until then a start does this again, and finds it done.
        (self.record.sides_back_to, self.record.restored_from) = (None, None);
        Ok(())
    }

    /// Letters stay: they stand once per place, so those that are read again are known. Rows with keys leave: what is read
    /// again is written again, to this table or to main.
    async fn set_side_back(&mut self, role: Role) -> Result<(), Stop> {
        let (tables, ident) = (self.world.tables(), self.side_ident(role));
        let metadata = W::Tables::metadata(self.side(role));
        let found = side_mark::inspect(metadata).map_err(|error| stops::ledger(ident, error))?;
        let (batch, generation) = (self.record.batch, self.record.batch_generation());
        let fits = found.as_ref().is_none_or(|mark| mark.fits(batch, generation));
        let mark = match &found {
            Some(found) if fits => SideMark { epoch: self.record.epoch, ..found.clone() },
            _ => self.mark(role),
        };
        let tagged = self.record.restored_from.as_ref().and_then(|name| savepoint::tagged(metadata, name));
        let snapshot = match tagged {
            None if fits || !role.holds_keys() => None,
            None => match side_mark::snapshot_of(metadata, self.record.job_id, batch, generation) {
                None => {
                    let error = SideError::NotRestorable { table: ident.to_string(), batch };
                    return Err(stops::side(error, self.committing()));
                }
                kept => kept,
            },
            tagged => tagged,
        };
        // A commit even where the mark fits: files of a batch that was rolled back may be under way, and must not land (R6).
        let done = match snapshot.map(|snapshot| (snapshot, self.world.back_to(snapshot))) {
            None => side::claim(tables, ident, metadata.uuid(), &mark, &found, None).await,
            Some((snapshot, back)) => match back? {
                None => side::go_back(tables, ident, metadata.uuid(), &mark, &found, snapshot).await,
                overwrite => side::claim(tables, ident, metadata.uuid(), &mark, &found, overwrite).await,
            },
        };
        if let Err(error) = done {
            return Err(self.side_failed(error).await);
        }
        self.reload_side(role).await?;
        if !fits && let Some(side) = self.record.sides.get_mut(role.name()) {
            // It had the files of this batch before it had those of a later one (R10).
            (side.owed, side.files) = (false, None);
        }
        Ok(())
    }

    /// Topics that joined the job since the last record, and ids that the broker now tells; stated by the next commit.
    fn learn_topics(&mut self, topic_ids: &BTreeMap<String, Option<TopicId>>) {
        for (topic, id) in topic_ids {
            let known = self.record.topics.entry(topic.clone()).or_default();
            *known = known.or(*id);
        }
    }

    /// Metadata of main as reloaded after the last commit.
    pub(crate) fn main_metadata(&self) -> &TableMetadata {
        W::Tables::metadata(&self.main)
    }

    fn committing(&self) -> Committing<'_> {
        let (epoch, kind) = (self.record.epoch, self.record.kind);
        Committing {
            epoch,
            owner: self.id,
            kind,
            owned: self.owned,
            job_shown: &self.world.terms().job_shown,
        }
    }

    /// Puts a record on the head that carries the last one, and makes it the last one. Fills in what every commit of
    /// this owner says: attempt, sequence, owner, lease. Gives the number of requests.
    pub(crate) async fn commit(&mut self, next: LedgerRecord, files: Vec<FileOf<W>>) -> Result<u32, Stop> {
        self.put(next, files, None).await
    }

    async fn put(
        &mut self,
        next: LedgerRecord,
        files: Vec<FileOf<W>>,
        upkeep: Option<Upkeep>,
    ) -> Result<u32, Stop> {
        let tables = self.world.tables();
        let lease_ms = i64::try_from(self.lease().as_millis()).unwrap_or(i64::MAX);
        let change = next.change.filter(|_| next.kind == Kind::Change);
        let next = LedgerRecord {
            change,
            format: FORMAT_VERSION,
            attempt: tables.new_id(),
            sequence: self.record.sequence + mutant!("sequence-stands-still", 0 => 1),
            owner: self.id,
            lease_until_ms: tables.now_ms().saturating_add(lease_ms),
            ..next
        };
        let metadata = self.main_metadata();
        let ids = (!files.is_empty()).then_some((next.schema_id, next.spec_id));
        let mut expected = Expected {
            attempt: self.record.attempt,
            sequence_number: self.sequence_number,
            base: metadata.current_snapshot_id(),
            ids: mutant!("schema-not-asserted", None => ids),
            // Only the fence of a replay goes onto a table that was rolled back.
            replays: !self.owned && self.record.sides_back_to.is_some(),
            kin: kin(metadata, self.record.attempt, mutant!("reload-ends-the-look", true => !self.owned)),
            looked_at: None,
        };
        let request = Request {
            table: self.world.terms().main.clone(),
            table_uuid: metadata.uuid(),
            attempt: next.attempt,
            files,
            summary: next.to_summary(),
            properties: BTreeMap::from([(ledger::PROPERTY.to_owned(), next.to_property())]),
            back_to: None,
            properties_removed: self.answered.clone(),
            upkeep: None,
        };
        let request = request.with(upkeep);
        let committing = Committing { epoch: next.epoch, kind: next.kind, ..self.committing() };
        let is_sent = Cell::new(false);
        let sending = || {
            is_sent.set(true);
            self.world.reach("main_sent");
        };
        let mut looks = 0;
        let landed = loop {
            let guard = |metadata: &TableMetadata| mutant!("blind-rebase", Ok(()) => head_carries(metadata, &expected));
            let ended = switch(tables, &request, &guard, &sending).await;
            match ended {
                Err(SwitchError::Moved { metadata, .. })
                    if !is_sent.get() && looks < LOOKS_MAX && expected.is_doubtful(&metadata) =>
                {
                    expected.looked_at = self.look_for_rows().await?;
                    looks += 1;
                }
                ended => break ended.map_err(|error| stops::switch(error, committing))?,
            }
        };
        self.world.reach("main_landed");
        self.sequence_number = ledger::sequence_number_of(W::Tables::metadata(&landed.table), next.attempt);
        self.main = landed.table;
        self.record = next;
        self.owned = true;
        self.answered.clear();
        Ok(landed.sends)
    }

    /// Looks for the rows of the last batch that had any in main, whose history was expired past our record: were they rolled
    /// back before, nothing else tells. Gives the snapshot that has them.
    async fn look_for_rows(&self) -> Result<Option<i64>, Stop> {
        let (main, batch) = (&self.world.terms().main, self.record.last_batch_with_rows);
        let table = load_again::<W::Tables>(self.world.tables(), main, &self.main).await?;
        if batch > 0
            && mutant!("live-owner-trusts-cut-off", false => !self.world.has_rows_of(&table, batch).await?)
        {
            return Err(Stop::new(
                Reason::TableRolledBack,
                format!(
                    "table {main} was rolled back and its history expired: the rows of batch {batch} are not in it"
                ),
                format!(
                    "nothing was written on it; to see more:\n  tidemill plan {}",
                    self.world.terms().job_shown
                ),
            ));
        }
        self.world.reach("rows_looked_up");
        Ok(W::Tables::metadata(&table).current_snapshot_id())
    }

    /// Lets the next commit remove a request, whose answer that commit carries: both land, or neither.
    pub(crate) fn answer(&mut self, property: String) {
        self.answered.push(property);
    }

    /// Whether requests wait for a commit that takes them away.
    pub(crate) fn has_answers(&self) -> bool {
        !self.answered.is_empty()
    }

    /// How long this owner may be silent before others call it dead.
    pub(crate) fn lease(&self) -> Duration {
        self.world.terms().lease
    }

    /// When the lease is to be renewed, ms since the epoch: every commit does, so only an owner at rest gets there.
    pub(crate) fn heartbeat_ms(&self) -> i64 {
        let left = self.lease() / LEASE_HEARTBEATS * (LEASE_HEARTBEATS - 1);
        self.record.lease_until_ms.saturating_sub(i64::try_from(left.as_millis()).unwrap_or(i64::MAX))
    }

    /// Renews the lease with a copy of the record, same epoch, for work that takes long between two commits.
    pub(crate) async fn renew(&mut self) -> Result<(), Stop> {
        self.put(self.renewed(), Vec::new(), None).await.map(|_| ())
    }

    fn renewed(&self) -> LedgerRecord {
        LedgerRecord { kind: Kind::Renewal, jumps: Vec::new(), ..self.record.clone() }
    }

    /// Puts what maintenance of main changes on the head that carries the last record, with a copy of it. The table that
    /// was read back is the new `main`.
    pub(crate) async fn keep_up_main(&mut self, upkeep: Upkeep) -> Result<(), Stop> {
        self.put(self.renewed(), Vec::new(), Some(upkeep)).await.map(|_| ())
    }

    /// Commits a record without files, and what it changes beside.
    pub(crate) async fn commit_with(&mut self, next: LedgerRecord, upkeep: Upkeep) -> Result<(), Stop> {
        self.put(next, Vec::new(), Some(upkeep)).await.map(|_| ())
    }

    /// As [`Owner::keep_up_main`] for a side table that was found with this mark. It is marked with the own epoch, so that
    /// the mark says by whom the head was moved last.
    pub(crate) async fn keep_up_side(
        &mut self,
        role: Role,
        found: &SideMark,
        upkeep: Upkeep,
    ) -> Result<(), Stop> {
        let (tables, ident) = (self.world.tables(), self.side_ident(role));
        let uuid = W::Tables::metadata(self.side(role)).uuid();
        let epoch = mutant!("upkeep-copies-mark", found.epoch => self.record.epoch);
        let mark = SideMark { epoch, ..found.clone() };
        if let Err(error) = side::keep_up(tables, ident, uuid, &mark, found, upkeep).await {
            return Err(self.side_failed(error).await);
        }
        self.reload_side(role).await
    }

    /// Moves the head of a side table of this job, unless a commit of this epoch has done so: no request that was sent
    /// before can land on it any more.
    pub(crate) async fn fence_side(&mut self, role: Role) -> Result<(), Stop> {
        let (tables, ident) = (self.world.tables(), self.side_ident(role));
        let metadata = W::Tables::metadata(self.side(role));
        let found = side_mark::inspect(metadata).map_err(|error| stops::ledger(ident, error))?;
        let Some(mark) = found.clone().filter(|mark| mark.job_id == self.record.job_id) else {
            return Ok(());
        };
        if mutant!("side-not-fenced", true => mark.epoch == self.record.epoch) {
            return Ok(());
        }
        let mark = SideMark { epoch: self.record.epoch, ..mark };
        if let Err(error) = side::claim(tables, ident, metadata.uuid(), &mark, &found, None).await {
            return Err(self.side_failed(error).await);
        }
        self.reload_side(role).await
    }

    /// Loads every table again, as they are looked at before maintenance.
    pub(crate) async fn reload(&mut self) -> Result<(), Stop> {
        self.main =
            load_again::<W::Tables>(self.world.tables(), &self.world.terms().main, &self.main).await?;
        for role in self.roles() {
            self.reload_side(role).await?;
        }
        Ok(())
    }

    async fn reload_side(&mut self, role: Role) -> Result<(), Stop> {
        let (ident, known) = (self.side_ident(role), self.side(role));
        let again = load_again::<W::Tables>(self.world.tables(), ident, known).await?;
        self.sides.insert(role, again);
        Ok(())
    }

    /// The mark of a side table when it follows the last record.
    fn mark(&self, role: Role) -> SideMark {
        mark_of(&self.record, &self.world.terms().main, role)
    }

    /// Marks side tables that do not follow this ledger yet, so that no other takes them. The start table has let only
    /// unmarked ones through, and those of this very job and main table under another id. Of one whose rows have keys, or
    /// that is owed files, it has judged the rows too: none has come to it since if its mark is the same.
    async fn claim_sides(&mut self, judged: &Judgements) -> Result<(), Stop> {
        for role in self.roles() {
            let (tables, ident) = (self.world.tables(), self.side_ident(role));
            let metadata = W::Tables::metadata(self.side(role));
            let mark = side_mark::inspect(metadata).map_err(|error| stops::ledger(ident, error))?;
            if mark.as_ref().is_some_and(|mark| mark.job_id == self.record.job_id) {
                continue;
            }
            let judged = judged.get(&role);
            let is_judged = judged.is_some_and(|judged| judged.mark == mark) || mark.is_none();
            let is_owed = self.record.sides.get(role.name()).is_some_and(|side| side.owed);
            let concerns_rows = role.holds_keys() || is_owed;
            if mutant!("claims-what-was-not-judged", false => concerns_rows && !is_judged) {
                return Err(stops::side_went_on(ident, role));
            }
            let lacks = is_owed && !judged.is_some_and(|judged| judged.is_paid);
            let first = self.first_mark(role, lacks);
            let claimed = side::claim(tables, ident, metadata.uuid(), &first, &mark, None).await;
            if let Err(error) = claimed {
                return Err(self.side_failed(error).await);
            }
            crate::crash_point!("side_claimed");
            self.reload_side(role).await?;
        }
        Ok(())
    }

    /// What a table is claimed with. Where it lacks files that the last record owes it, the mark says so: the start table has
    /// let it through only where that is certain.
    fn first_mark(&self, role: Role, lacks: bool) -> SideMark {
        let mark = self.mark(role);
        match mutant!("claim-forgets-debt", false => lacks) {
            true => SideMark { batch: mark.batch.saturating_sub(1), generation: None, ..mark },
            false => mark,
        }
    }

    /// Main may have been rolled back while this start slept, to the very head that it had judged, and lost the property that
    /// would tell. A side table tells too, and what is read beside what it got since would stand twice.
    async fn refuse_ahead(&self) -> Result<(), Stop> {
        if self.record.sides_back_to.is_some() {
            return Ok(());
        }
        let (main, generation) = (self.record.batch, self.record.batch_generation());
        for role in self.roles() {
            let ident = self.side_ident(role);
            let mark = side_mark::inspect(W::Tables::metadata(self.side(role)));
            let mark = mark.map_err(|error| stops::ledger(ident, error))?;
            let is_ahead =
                |mark: &SideMark| mark.job_id == self.record.job_id && !mark.fits(main, generation);
            if let Some(ahead) = mark.filter(is_ahead) {
                let error = SideError::Ahead { table: ident.to_string(), side: ahead.batch, main };
                return Err(self.side_failed(error).await);
            }
        }
        Ok(())
    }

    /// Gives each side table the files that the last record owes it.
    pub(crate) async fn forward_sides(&mut self) -> Result<(), Stop> {
        if !self.record.owes_side_files() {
            return Ok(());
        }
        for role in self.roles() {
            let Some(owed) = self.record.sides.get(role.name()).filter(|side| side.owed) else { continue };
            self.world.reach("sides_sent");
            self.forward_side(role, owed).await?;
            self.reload_side(role).await?;
            // Stated by the next commit; until then a start asks again, and finds it done.
            if let Some(side) = self.record.sides.get_mut(role.name()) {
                (side.owed, side.files) = (false, None);
            }
        }
        self.world.reach("sides_landed");
        Ok(())
    }

    async fn forward_side(&self, role: Role, owed: &SideRecord) -> Result<(), Stop> {
        let (tables, ident) = (self.world.tables(), self.side_ident(role));
        let mark = self.mark(role);
        let table = load(tables, ident).await?;
        let files = match lost::look(&self.world, role, &table, owed, &mark).await? {
            // Asking again only settles marks that are ahead or of another job.
            Owed::Landed => Vec::new(),
            Owed::Whole(files) => files,
            Owed::Lost(lost) => return Err(lost.stop(&self.world.terms().job_shown)),
        };
        match side::bring_forward(tables, ident, owed.uuid, &mark, files).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.side_failed(error).await),
        }
    }

    /// A side table that went on without us follows another owner, or main was rolled back: main's head tells which.
    async fn side_failed(&self, error: SideError) -> Stop {
        let went_on = match &error {
            SideError::Ahead { .. } | SideError::OtherJob { .. } => true,
            SideError::Switch { source, .. } => matches!(source, SwitchError::Moved { .. }),
            _ => false,
        };
        let main = &self.world.terms().main;
        if went_on && let Ok(table) = self.world.tables().load(main).await {
            let metadata = W::Tables::metadata(&table);
            if let Err(replaced) = same_table(main, self.main_metadata(), metadata) {
                return replaced;
            }
            let expected = Expected {
                attempt: self.record.attempt,
                sequence_number: self.sequence_number,
                base: None,
                ids: None,
                replays: false,
                kin: BTreeSet::new(),
                looked_at: metadata.current_snapshot_id(),
            };
            if let Err(found) = head_carries(metadata, &expected) {
                let metadata = Box::new(metadata.clone());
                let moved = SwitchError::Moved { table: main.to_string(), found, metadata };
                return stops::switch(moved, self.committing());
            }
        }
        stops::side(error, self.committing())
    }

    /// Gives the table back. A record that is released already costs nothing.
    pub(crate) async fn release(&mut self) -> Result<(), Stop> {
        if self.record.released {
            return Ok(());
        }
        let released =
            LedgerRecord { kind: Kind::Release, released: true, jumps: Vec::new(), ..self.record.clone() };
        crate::crash_point!("release_to_send");
        self.commit(released, Vec::new()).await.map(|_| ())
    }

    /// Gives the table back after a stop, where that is still ours to do. What can not be released is taken over by the
    /// next start on this machine at once, elsewhere when the lease ends.
    pub(crate) async fn release_after(&mut self, stop: &Stop) {
        let ours = !matches!(
            stop.reason,
            Reason::Fenced
                | Reason::Busy
                | Reason::OutcomeUnknown
                | Reason::TableReplaced
                | Reason::TableRolledBack
        );
        if !ours || self.record.owes_side_files() {
            return;
        }
        if let Err(error) = self.release().await {
            tracing::warn!(%error, "the lease could not be released; the next start takes over");
        }
    }

    /// The end of a life that owned the table.
    pub(crate) async fn end<T>(&mut self, outcome: Result<T, Stop>) -> Result<T, Stop> {
        match &outcome {
            Ok(_) => self.release().await?,
            Err(stop) => self.release_after(stop).await,
        }
        self.world.reach("released");
        outcome
    }
}

/// A first run's record: start offsets before the first read.
fn first_record<W: World>(
    world: &W,
    main: &TableOf<W>,
    sides: &BTreeMap<Role, TableOf<W>>,
    fence: &Fence<TableOf<W>>,
) -> Result<LedgerRecord, Stop> {
    let (seed, key_spec_hash) = world.draw_seed()?;
    let Terms { job_name, job_hash, dedup, sides: idents, .. } = world.terms();
    let metadata = W::Tables::metadata(main);
    let mut lane = Lane::default();
    for (name, &start) in &fence.starts {
        let cursor = Cursor { start, end: start, tail: None, max_event_time: None };
        lane.topics.entry(name.topic.clone()).or_default().insert(name.partition, cursor);
    }
    let side = |(role, table): (&Role, &TableOf<W>)| {
        (role.name().to_owned(), side_record(&idents[role], W::Tables::metadata(table), None))
    };
    let mut first = LedgerRecord {
        format: FORMAT_VERSION,
        job_id: world.tables().new_id(),
        job_name: job_name.clone(),
        epoch: 0,
        owner: Uuid::nil(),
        lease_until_ms: 0,
        released: true,
        kind: Kind::Start,
        sequence: 0,
        attempt: Uuid::nil(),
        batch: 0,
        last_batch_with_rows: 0,
        cut_time_ms: world.tables().now_ms(),
        cluster_id: fence.cluster_id.clone(),
        schema_id: metadata.current_schema_id(),
        spec_id: metadata.default_partition_spec_id(),
        job_hash: job_hash.clone(),
        sides_back_to: None,
        restored_from: None,
        timelines: Vec::new(),
        dedup: ledger::DedupRecord { seed, key_spec_hash, ..dedup.clone() },
        topics: fence.topic_ids.clone(),
        lanes: BTreeMap::from([(LIVE_LANE.to_owned(), lane)]),
        batch_lane: None,
        counts: Counts::default(),
        sides: sides.iter().map(side).collect(),
        buckets: Vec::new(),
        jumps: Vec::new(),
        others: None,
        suppressed: None,
        batch_generation: None,
        change: None,
        requeue: None,
    };
    world.inherit(&mut first);
    Ok(first)
}

/// The mark of a side table when it follows a record of main.
fn mark_of(record: &LedgerRecord, main: &TableIdent, role: Role) -> SideMark {
    SideMark {
        format: side_mark::FORMAT_VERSION,
        job_id: record.job_id,
        job_name: record.job_name.clone(),
        main: main.to_string(),
        role: role.name().to_owned(),
        epoch: record.epoch,
        batch: mutant!("side-mark-lags", record.batch.saturating_sub(1) => record.batch),
        generation: record.batch_generation().map(str::to_owned),
    }
}

/// What the ledger says of a side table when it is owed `files`.
pub(crate) fn side_record(
    table: &TableIdent,
    metadata: &TableMetadata,
    files: Option<Vec<Value>>,
) -> SideRecord {
    SideRecord {
        table: table.to_string(),
        uuid: metadata.uuid(),
        owed: files.is_some(),
        files,
        schema_id: metadata.current_schema_id(),
        spec_id: metadata.default_partition_spec_id(),
    }
}

#[cfg(test)]
mod tests;
