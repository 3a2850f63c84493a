//! A process: the protocol's traits over the [`Universe`], and one life from the lock to the release.
//!
//! A process that is dropped at a turn ([`super::catalog`]) has crashed there.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use iceberg::TableIdent;
use iceberg::spec::TableMetadata;

use super::catalog::{Loaded, SimTables, turn};
use super::reading::{SimLife, tail_hash};
use super::state::SimHome;
use super::universe::{Shared, TOPIC, Universe};
use super::world::{SimWorld, key_spec_hash};
use crate::commit::ledger::{
    self, Change, Cursor, DedupRecord, Found, Jump, Kind, LIVE_LANE, LedgerRecord, Others, SideRecord,
};
use crate::commit::side::{self, Role};
use crate::job::Repeats;
use crate::offset::{NextOffset, TopicId, TopicPartition};
use crate::protocol::start::{self, Allow, Facts, SideFacts};
use crate::protocol::{self, Fence, LostSide, Owner, Terms, stops};
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
    /// Keeps its side tables small before each microbatch, on tables that it loads for that.
    pub(super) keeps_up: bool,
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
        rebase: orders.command != Command::Run,
        lost_files: orders.command == Command::AcceptLoss,
        lost_list: orders.command == Command::AcceptLoss,
        replay: orders.replay,
        ..Allow::default()
    };
    let columns = job.columns;
    let mut world = SimWorld {
        tables: tables.clone(),
        terms: terms.clone(),
        columns,
        key_columns: job.key_columns,
        others: None,
    };
    let record = protocol::admit(&world, &facts, allow, main.as_ref(), || Ok(())).await?;
    if record.is_none() {
        world.others = others_in(&shared.borrow(), main.as_ref(), sides.get(&Role::Late));
    }
    let differing =
        record.as_ref().map(|record| differing_tails(&shared.borrow(), record)).unwrap_or_default();
    let lost = match (orders.command, &record) {
        (Command::AcceptLoss, Some(record)) => protocol::lost_sides(&world, &sides, record).await?,
        _ => Vec::new(),
    };
    let jumps = match (orders.command, &record) {
        (Command::Run, _) => None,
        (Command::Rebase, Some(record)) => Some(jumps(Command::Rebase, record, &source, &differing)),
        (Command::AcceptLoss, Some(record)) => match start::same_log(&facts, record) {
            Ok(()) => Some(jumps(Command::AcceptLoss, record, &source, &differing)),
            Err(stop) if lost.is_empty() => return Err(stop),
            Err(_) => {
                shared.borrow_mut().hit("letters of another log are given up");
                Some(Vec::new())
            }
        },
        (_, None) => return Ok(()),
    };
    if let Some(lost) = lost.iter().find(|lost| lost.role.holds_keys()) {
        // Before the fence, which writes the property anew: without the list, if that is what is lost.
        return Err(lost.stop(&terms.job_shown));
    }
    if jumps.as_ref().is_some_and(Vec::is_empty) && lost.is_empty() {
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
        bears_lost_files: orders.command == Command::AcceptLoss,
    };
    let mut owner = Owner::take(world, fence).await?;
    if let Some(jumps) = jumps {
        let given_up = give_up(&mut owner, &lost).await;
        if given_up.is_err() || jumps.is_empty() {
            return owner.end(given_up).await;
        }
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

/// As the pipeline tells rows that stand in tables without ledger from those to come.
fn others_in(universe: &Universe, main: Option<&Loaded>, late: Option<&Loaded>) -> Option<Others> {
    let contents: Vec<_> = main.iter().chain(&late).map(|table| universe.content_of(&table.0)).collect();
    let rows = || contents.iter().flat_map(|content| content.files.iter()).flat_map(|file| file.rows.iter());
    let mark = late.and_then(|late| side::inspect(&late.0).expect("a mark of ours"));
    let batch_max = rows().filter_map(|row| row.batch).chain(mark.map(|mark| mark.batch)).max().unwrap_or(0);
    rows().next().map(|_| Others { batch_max, adopted: false, buckets: Vec::new() })
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
    let waits = record.active_backfills().next().is_some();
    read && record.released && !record.owes_side_tables() && !lacks && !waits
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

/// As `accept-loss` goes on without letters whose files are gone.
async fn give_up(owner: &mut Owner<SimWorld>, asked: &[LostSide]) -> Result<(), Stop> {
    let asked: Vec<String> = asked.iter().map(|lost| side_ident(lost.role).to_string()).collect();
    let lost = owner.fence_lost(&asked.iter().map(String::as_str).collect::<Vec<_>>()).await?;
    if lost.is_empty() {
        return owner.forward_sides().await;
    }
    if let Some(lost) = lost.iter().find(|lost| lost.role.holds_keys()) {
        return Err(lost.stop("job.toml"));
    }
    let known = &owner.record.sides;
    let left = |lost: LostSide| {
        (lost.role, SideRecord { files: Some(lost.whole), ..known[lost.role.name()].clone() })
    };
    let instead = lost.into_iter().map(left).collect();
    owner.owe_instead(instead, Change { by: "accept-loss".to_owned(), what: "letters".to_owned() }).await?;
    owner.world.shared().borrow_mut().hit("lost letters given up");
    Ok(())
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
    let is_moved = |name: &TopicPartition| jumps.iter().any(|jump| jump.partition == name.partition);
    if jumps.iter().any(|jump| jump.reason == format!("{:?}", Command::Rebase)) {
        // As the pipeline: their offsets are those of another log.
        next.lanes
            .retain(|_, lane| lane.backfill.is_none() || !lane.cursors().any(|(name, _)| is_moved(&name)));
    }
    let lane = next.lanes.entry(LIVE_LANE.to_owned()).or_default();
    for jump in jumps {
        let cursor = Cursor { start: jump.new_start, end: jump.new_start, tail: None, max_event_time: None };
        lane.topics.entry(jump.topic).or_default().insert(jump.partition, cursor);
    }
    owner.commit(next, Vec::new()).await?;
    owner.world.shared().borrow_mut().hit("offsets moved by a command");
    Ok(())
}
