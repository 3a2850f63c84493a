//! `state adopt-rows` and `state adopt`: a table that has rows and lacks what a ledger would say of them.
//!
//! `adopt-rows`: rows of others come to count as seen. The first record says so before a key is read, so a crash on the way
//! leaves a ledger whose state is made to its end by the next start. Rows are told from ours by their batch: ours
//! have numbers above the largest that stood in the table.
//!
//! `adopt`: the ledger of this job is lost, and its rows and perhaps its state are there. The rows do not say how far the
//! live offsets were: a backfill may have read ahead of them, and rows of an earlier topic may have larger offsets. So the
//! topics are read again from where the job began: what has a row is a repeat, letters are known by their places. Only who
//! knows better goes on after the last row of each topic partition. The state is made from the rows alone, so that a table
//! that came back from a backup takes in again what it lacks. Whether rows of others counted as seen stood in the ledger,
//! so it is asked for: their events are read again too. All rows make a state as large as the table ever was: where a disk or
//! a limit is too small for it, nothing was read yet, and the command may be given again in another way.

use std::collections::BTreeMap;

use bytesize::ByteSize;

use super::{AtWork, Confirm, Done, Restored, open_named};
use crate::commit::ledger::{
    BucketRecord, Change, Cursor, DedupRecord, EraRecord, Jump, Kind, LIVE_LANE, LedgerRecord, Others,
};
use crate::dedup::{
    self, BucketTally, GenerationFacts, GenerationName, GenerationRef, Key, Store, StoreError,
};
use crate::event_time::EventTimeMs;
use crate::job::Job;
use crate::job::file::LoadedJob;
use crate::memory::MemoryPlan;
use crate::offset::{NextOffset, TopicPartition};
use crate::pipeline::keys::KeyMaker;
use crate::pipeline::owner::{Owner, Prepared, prepare};
use crate::pipeline::rebuild::{
    Restoring, adopted, commit_change, find_suppressed, read_keys, restore, tallies, tally_at,
};
use crate::pipeline::report::Report;
use crate::pipeline::state::{bucket_record, facts};
use crate::pipeline::survey::{key_encoder, state_folder};
use crate::pipeline::world::{AdoptedLedger, Inheritance};
use crate::pipeline::{RunOptions, stops};
use crate::protocol::name_generation;
use crate::protocol::start::Allow;
use crate::sink::scan::{self, Reach, RowsOf, rows_of};
use crate::stop::{Reason, Stop};

const ADOPT_ROWS: &str = "state adopt-rows";
const ADOPT: &str = "state adopt";
/// What a key takes on disk while the state is made: itself, and once more while runs of keys are merged.
const DISK_BYTES_PER_KEY: u64 = 20;
/// Keys that are read from a table in a second on a machine of two cores (README, measured).
const KEYS_PER_SECOND: u64 = 2_000_000;

/// Lets the rows of others in the main table count as seen.
///
/// # Errors
/// The [`Stop`] of the start table, or `USAGE` if there are no such rows.
pub async fn adopt_rows(
    loaded: &LoadedJob,
    options: &RunOptions,
    confirm: Confirm<'_>,
    report: &mut dyn Report,
) -> Result<Done, Stop> {
    let allow = Allow { adopt_rows: true, ..Allow::default() };
    let prepared = prepare(loaded, options, allow).await?;
    let table = prepared.survey.main_ident.to_string();
    let rows = prepared.survey.tables_with_keys().map(rows_of).fold(0, u64::saturating_add);
    if rows == 0 {
        return Err(nothing_to_adopt(&table, options));
    }
    let of_whom = match &prepared.record {
        None => format!("the keys of the {rows} rows of table {table}"),
        Some(_) => format!("the keys of the rows of table {table} that this job did not write"),
    };
    confirm(&format!("let {of_whom} count as seen, for good?"))?;
    let starts = prepared.survey.starts(&loaded.job, prepared.record.as_ref())?;
    let is_first = prepared.record.is_none();
    let mut work = AtWork::take(prepared, &starts).await?;
    let result = if is_first {
        let restoring = Restoring { by: ADOPT_ROWS, salvage: false, release: true };
        let record = work.owner.record.clone();
        restore(&mut work.owner, record, &work.keys, &work.memory, restoring, report).await
    } else {
        adopt_beside(&mut work, report).await
    };
    let state = work.end(result).await?;
    let mut notes = vec![format!("{} keys of rows by others count as seen", state.keys_of_others)];
    if is_first {
        notes.push(
            "the ledger was begun at the job's start offsets; events of these rows will count as duplicates"
                .to_owned(),
        );
    }
    Ok(Done { command: ADOPT_ROWS, table, changed: true, state, notes })
}

fn nothing_to_adopt(table: &str, options: &RunOptions) -> Stop {
    Stop::new(
        Reason::Usage,
        format!("table {table} has no rows: there is nothing to adopt"),
        format!("nothing was changed:\n  tidemill run {}", options.job_shown),
    )
}

/// On a table with a ledger: the keys of others are looked up in the state, and what it lacks is added.
async fn adopt_beside(work: &mut AtWork<'_>, report: &mut dyn Report) -> Result<Restored, Stop> {
    let AtWork { owner, keys, memory, begun } = work;
    let folder = state_folder(&owner.world.loaded.job);
    let mut store = open_named(owner, keys, memory, report).await?;
    let mut next = owner.record.clone();
    let others =
        next.others.get_or_insert_with(|| Others { batch_max: 0, adopted: true, buckets: Vec::new() });
    others.adopted = true;
    let Some(which) = adopted(&next) else { unreachable!("the rows were adopted above") };
    let before = store.buckets().to_vec();
    let named = add_keys_of_others(owner, keys, memory, which, &mut store, report).await?;
    let named = match named {
        Some(named) => named,
        // Nothing new: the record alone says from now on that these rows count.
        None => {
            let name = GenerationName::new(owner.record.epoch, owner.record.batch, uuid::Uuid::now_v7());
            let named = store.prepare(name).map_err(|error| stops::state(&folder, error))?;
            store.publish();
            named
        }
    };
    let (others, others_before) = (added(&before, store.buckets(), &next.others), &owner.record.others);
    let count = |buckets: &[BucketRecord]| buckets.iter().map(|bucket| bucket.count).sum::<u64>();
    let new = count(&others) - others_before.as_ref().map_or(0, |others| count(&others.buckets));
    if let Some(kept) = &mut next.others {
        kept.buckets = others;
    }
    name_generation(&mut next, facts(&store, named));
    let state = Restored {
        keys: store.stats().keys,
        buckets: store.buckets().len() as u64,
        keys_of_others: new,
        seconds: begun.elapsed().as_secs_f64(),
        ..Restored::default()
    };
    let change = Change { by: ADOPT_ROWS.to_owned(), what: state.in_words() };
    commit_change(owner, next, change, true).await?;
    Ok(state)
}

/// Looks up the keys of rows by others in a store, many at once, and adds those that it lacks as generations of their own
/// segments. Gives the last of them.
async fn add_keys_of_others(
    owner: &mut Owner<'_>,
    keys: &KeyMaker,
    memory: &MemoryPlan,
    which: RowsOf,
    store: &mut Store,
    report: &mut dyn Report,
) -> Result<Option<GenerationRef>, Stop> {
    let folder = state_folder(&owner.world.loaded.job);
    let (epoch, batch) = (owner.record.epoch, owner.record.batch);
    let since = store.complete_since();
    let keys_max =
        usize::try_from(memory.pending_bytes_max() / dedup::PENDING_KEY_BYTES).unwrap_or(usize::MAX);
    let mut last = None;
    let mut settle = |store: &mut Store, found: &mut Vec<Key>| -> Result<(), StoreError> {
        store.probe(found)?;
        found.clear();
        if store.stats().pending_keys > 0 {
            last = Some(store.prepare(GenerationName::new(epoch, batch, uuid::Uuid::now_v7()))?);
            // Named by the ledger or not, the next keys are looked up among these: the commit names the last one.
            store.publish();
        }
        Ok(())
    };
    let mut found: Vec<Key> = Vec::with_capacity(keys_max);
    read_keys(owner, keys, memory, which, None, report, &mut |keys| {
        for key in keys.iter().filter(|key| key.event_time >= since) {
            if found.len() == keys_max {
                settle(store, &mut found)?;
            }
            found.push(*key);
        }
        Ok(())
    })
    .await?;
    settle(store, &mut found).map_err(|error| stops::state(&folder, error))?;
    Ok(last)
}

/// What others have in each bucket, with what was added to the state just now.
fn added(before: &[BucketTally], after: &[BucketTally], others: &Option<Others>) -> Vec<BucketRecord> {
    let known = others.as_ref().map_or_else(Vec::new, |others| tallies(&others.buckets));
    let of_bucket = |bucket: &BucketTally| {
        let mut tally = bucket.tally().less(tally_at(before, bucket.from)).unwrap_or_default();
        tally.add_all(tally_at(&known, bucket.from));
        (tally.keys > 0)
            .then(|| bucket_record(&BucketTally { keys: tally.keys, digest: tally.digest, ..*bucket }))
    };
    after.iter().filter_map(of_bucket).collect()
}

/// How a lost ledger is made again.
#[derive(Debug, Clone, Copy, Default)]
pub struct Adopting {
    /// Whether the job goes on after the last record of each topic partition that left a row, and not from its start.
    pub after_last_row: bool,
    /// Whether rows that the job did not write count as seen; to be said where there are any.
    pub others_seen: Option<bool>,
}

/// Makes a lost ledger again from the rows of the table, and what the state folder knows of the job.
///
/// # Errors
/// `USAGE` if no ledger was lost, the table has no row of this job, or it has rows of others and nothing was said of them;
/// `KEY_SPEC_CHANGED` if the state was made for another key; the [`Stop`] of the start table.
pub async fn adopt_ledger(
    loaded: &LoadedJob,
    options: &RunOptions,
    adopting: Adopting,
    confirm: Confirm<'_>,
    report: &mut dyn Report,
) -> Result<Done, Stop> {
    let allow = Allow { adopt_ledger: true, ..Allow::default() };
    let mut prepared = prepare(loaded, options, allow).await?;
    let table = prepared.survey.main_ident.to_string();
    // One that was begun and whose keys never came together may be begun in another way.
    if prepared.record.as_ref().is_some_and(|record| !is_unfinished(record)) {
        return Err(Stop::new(
            Reason::Usage,
            format!("table {table} has its ledger: there is nothing to adopt"),
            format!("nothing was changed:\n  tidemill run {}", options.job_shown),
        ));
    }
    let reach = reach(&prepared, loaded).await?;
    if reach.rows == 0 {
        return Err(Stop::new(
            Reason::Usage,
            format!("table {table} has no row that this job wrote: there is no ledger to make again"),
            format!(
                "nothing was changed; to begin anew, on a table that is empty:\n  tidemill state discard {job}\n\
                 to let rows of others count as seen, after that:\n  tidemill state adopt-rows {job}",
                job = options.job_shown
            ),
        ));
    }
    let (name, known) = usable_generation(&prepared, loaded, options, &reach)?;
    if reach.rows_of_others > 0 && adopting.others_seen.is_none() {
        return Err(others_unsaid(&table, reach.rows_of_others, options));
    }
    let starts = prepared.survey.starts_again(&loaded.job, &reach.places)?;
    let mut adopted = adopted_ledger(&prepared, loaded, name, &known, &reach)?;
    if adopting.others_seen == Some(true) {
        // Those of them that carry a batch number of an earlier ledger are taken for ours.
        adopted.others = Some(Others { batch_max: 0, adopted: true, buckets: Vec::new() });
    }
    if !adopting.after_last_row {
        adopted.cursors.clear();
        // Who reads from the begin again meets keys of any age: all rows count, and buckets expire as they did at first.
        adopted.dedup.complete_since = None;
    }
    let catalog = &*prepared.survey.catalog;
    adopted.suppressed = find_suppressed(catalog, &loaded.job, &known.spec.key_spec_hash).await?;
    let next = |(name, start): (&TopicPartition, &NextOffset)| {
        let next = adopted.cursors.get(name).map_or(*start, |cursor| cursor.end);
        format!("{name}: next offset {next}")
    };
    let places: Vec<String> = starts.iter().map(next).collect();
    let rows = reach.rows.saturating_add(reach.rows_of_others);
    confirm(&format!(
        "make the ledger of table {table} again at batch {}, from its {} rows?\n  {}\n  {}",
        adopted.batch,
        reach.rows,
        places.join("\n  "),
        cost(rows, adopted.dedup.complete_since, &loaded.job)
    ))?;
    let begun = prepared.record.is_some();
    prepared.outside.inheritance = Inheritance::Ledger(Box::new(adopted.clone()));
    let mut work = AtWork::take(prepared, &starts).await?;
    let result = async {
        let AtWork { owner, keys, memory, .. } = &mut work;
        if begun {
            begin_again(owner, &adopted, &starts).await?;
        }
        let restoring = Restoring { by: ADOPT, salvage: false, release: true };
        let record = owner.record.clone();
        restore(owner, record, keys, memory, restoring, report).await
    };
    let result = result.await;
    let missing = lacking(&known.buckets, &tallies(&work.owner.record.buckets));
    let batch = work.owner.record.batch;
    let state = work.end(result).await?;
    let from = if adopting.after_last_row {
        "after the last row of each topic partition"
    } else {
        "from the job's start"
    };
    let mut notes = vec![format!(
        "the ledger was made again at batch {batch}; what the topics hold {from} is read again, and what has a row is \
         dropped as a repeat"
    )];
    if name.batch <= reach.batch_max && missing > 0 {
        notes.push(format!(
            "{missing} keys that the state folder knew have no row any more that counts as seen; if their events are sent \
             again, they are written again"
        ));
    }
    Ok(Done { command: ADOPT, table, changed: true, state, notes })
}

/// Whether a record was made by `state adopt`, and its state never was: nothing was read under it.
fn is_unfinished(record: &LedgerRecord) -> bool {
    let before = record.others.as_ref().map_or(0, |others| others.batch_max);
    record.lacks_generation() && record.dedup.keys == 0 && record.batch > before
}

/// What the keys of so many rows cost, those before `since` left out; for the question.
fn cost(rows: u64, since: Option<EventTimeMs>, job: &Job) -> String {
    let (disk, seconds) = (rows.saturating_mul(DISK_BYTES_PER_KEY), rows / KEYS_PER_SECOND);
    let free = rustix::fs::statvfs(&job.state_dir).map_or(String::new(), |disk| {
        format!(", {} are free", ByteSize(disk.f_bavail.saturating_mul(disk.f_frsize)))
    });
    let of_rows = match since {
        None => "of all of them".to_owned(),
        Some(since) => format!("from {since} on"),
    };
    format!(
        "the keys {of_rows} take up to {} of disk in {}{free}, and about {} s",
        ByteSize(disk),
        job.state_dir.display(),
        seconds.max(1)
    )
}

/// Lets a ledger that was begun, and whose state was never made, begin in another way: one commit with the offsets that jump.
async fn begin_again(
    owner: &mut Owner<'_>,
    adopted: &AdoptedLedger,
    starts: &BTreeMap<TopicPartition, NextOffset>,
) -> Result<(), Stop> {
    let mut next = LedgerRecord { kind: Kind::Jump, jumps: Vec::new(), ..owner.record.clone() };
    next.dedup.clone_from(&adopted.dedup);
    next.others.clone_from(&adopted.others);
    let lane = next.lanes.entry(LIVE_LANE.to_owned()).or_default();
    // As a first record: what it was begun with says nothing of topics that the job does not read.
    let begun = std::mem::take(&mut lane.topics);
    let at_start = |start: NextOffset| Cursor { start, end: start, tail: None, max_event_time: None };
    let mut cursors: BTreeMap<&TopicPartition, Cursor> =
        starts.iter().map(|(name, start)| (name, at_start(*start))).collect();
    cursors.extend(adopted.cursors.iter().map(|(name, cursor)| (name, *cursor)));
    for (name, cursor) in cursors {
        lane.topics.entry(name.topic.clone()).or_default().insert(name.partition, cursor);
        let known = begun.get(&name.topic).and_then(|known| known.get(&name.partition));
        let old_end = known.map(|known| known.end);
        if old_end != Some(cursor.end) {
            let (topic, partition) = (name.topic.clone(), name.partition);
            let (new_start, reason) = (cursor.end, ADOPT.to_owned());
            next.jumps.push(Jump { topic, partition, old_end, new_start, reason });
        }
    }
    owner.commit(next, Vec::new()).await.map(|_| ())
}

fn others_unsaid(table: &str, rows: u64, options: &RunOptions) -> Stop {
    let job = &options.job_shown;
    Stop::new(
        Reason::Usage,
        format!(
            "table {table} has {rows} rows that this job did not write, and it does not say whether they counted as seen"
        ),
        format!(
            "nothing was changed; if their keys are to count as seen, so that their events are not written again (the job \
             had been given `state adopt-rows`):\n  tidemill state adopt {job} --rows-of-others seen\nif they are not (it \
             was begun with --ignore-rows, or others appended them):\n  tidemill state adopt {job} --rows-of-others unseen"
        ),
    )
}

/// Keys that were counted and are not there.
fn lacking(known: &[BucketTally], found: &[BucketTally]) -> u64 {
    let in_bucket = |bucket: &BucketTally| bucket.keys.saturating_sub(tally_at(found, bucket.from).keys);
    known.iter().map(in_bucket).sum()
}

async fn reach(prepared: &Prepared<'_>, loaded: &LoadedJob) -> Result<Reach, Stop> {
    let mut reach = Reach::default();
    for table in prepared.survey.tables_with_keys() {
        let columns_there = ["_kafka_topic", "_kafka_partition", "_kafka_offset", "_tidemill_batch"]
            .iter()
            .all(|name| table.metadata().current_schema().field_by_name(name).is_some());
        if !columns_there {
            reach.rows_of_others = reach.rows_of_others.saturating_add(rows_of(table));
            continue;
        }
        let found = scan::reach(table, &loaded.job.event_time.column).await.map_err(|error| {
            stops::data(format!("table {} can not be read", table.identifier()), error.reason(), error)
        })?;
        reach.add(found);
    }
    Ok(reach)
}

/// The newest generation of this key that a commit can have named: its batch has rows in the table. If there is none, the
/// newest of this key still says who the job is.
fn usable_generation(
    prepared: &Prepared<'_>,
    loaded: &LoadedJob,
    options: &RunOptions,
    reach: &Reach,
) -> Result<(GenerationName, GenerationFacts), Stop> {
    let folder = state_folder(&loaded.job);
    let of_state = |error| stops::state(&folder, error);
    let (mut fitting, mut other_key) = (Vec::new(), false);
    for found in dedup::list_generations(&folder, None).map_err(of_state)? {
        let facts = dedup::generation_facts(&folder, &found.reference).map_err(of_state)?;
        let encoder = key_encoder(&prepared.decoder.schema(), &loaded.job, facts.spec.seed)?;
        let job = &loaded.job;
        let hash = encoder.key_spec_hash(job.dedup.shards, &job.bucket_source(), job.dedup.repeats);
        if hash == facts.spec.key_spec_hash {
            fitting.push((found.reference.name, facts));
        } else {
            other_key = true;
        }
    }
    let newest = fitting.iter().rposition(|(name, _)| name.batch <= reach.batch_max);
    let chosen = newest.or_else(|| fitting.len().checked_sub(1));
    if let Some(index) = chosen {
        return Ok(fitting.swap_remove(index));
    }
    if prepared.record.is_some() && !other_key {
        return Err(begun_elsewhere(options));
    }
    let (reason, what) = if other_key {
        (Reason::KeySpecChanged, "the state folder was made for another key than this job's")
    } else {
        (Reason::Usage, "the state folder has no generation of this job, so no ledger was lost")
    };
    let way_out = if other_key {
        format!(
            "nothing was changed; set the fields of [dedup] back as they were, then:\n  tidemill state adopt {}",
            options.job_shown
        )
    } else {
        format!(
            "nothing was changed; to let the rows of the table count as seen:\n  tidemill state adopt-rows {}",
            options.job_shown
        )
    };
    Err(Stop::new(reason, what, way_out))
}

/// What the ledger that was begun took over of the one before it stands in the state folder of then.
fn begun_elsewhere(options: &RunOptions) -> Stop {
    Stop::new(
        Reason::Usage,
        "the ledger was begun to be made again, and this state folder knows nothing of the one before it",
        format!(
            "nothing was changed; to finish it as it was begun, in this state folder:\n  tidemill run {}\nto begin it in another \
             way, give the command with the state folder that it was begun with",
            options.job_shown
        ),
    )
}

fn adopted_ledger(
    prepared: &Prepared<'_>,
    loaded: &LoadedJob,
    name: GenerationName,
    facts: &GenerationFacts,
    reach: &Reach,
) -> Result<AdoptedLedger, Stop> {
    let spec = &facts.spec;
    let sides = prepared.survey.side_facts()?;
    let marks = sides.into_values().filter_map(|side| side.mark).filter(|mark| mark.job_id == spec.job_id);
    let mark = marks.max_by_key(|mark| mark.batch);
    let marked = mark.as_ref().map_or(0, |mark| mark.batch);
    let batch = reach.batch_max.max(marked);
    let width_ms = dedup::bucket_width_ms(loaded.job.dedup.window, loaded.job.dedup.repeats);
    let dedup = DedupRecord {
        generation: None,
        checksum: None,
        seed: spec.seed,
        key_spec_hash: spec.key_spec_hash.clone(),
        shards: spec.shards,
        bucket_width_ms: if facts.floor.is_some() { spec.bucket_width_ms } else { width_ms },
        eras: facts
            .eras
            .iter()
            .map(|era| EraRecord { until: era.until, bucket_width_ms: era.bucket_width_ms })
            .collect(),
        repeats: spec.repeats,
        floor: facts.floor,
        complete_since: (facts.complete_since.0 > i64::MIN).then_some(facts.complete_since),
        keys: 0,
        digest: String::new(),
    };
    let cursors: BTreeMap<TopicPartition, Cursor> = reach
        .places
        .iter()
        .map(|(place, span)| {
            let end = NextOffset::after(span.offset_max);
            let max_event_time = Some(span.event_time_max);
            (place.clone(), Cursor { start: end, end, tail: None, max_event_time })
        })
        .collect();
    Ok(AdoptedLedger {
        job_id: spec.job_id,
        epoch: name.epoch,
        batch,
        last_batch_with_rows: reach.batch_max,
        batch_generation: mark.filter(|mark| mark.batch == batch).and_then(|mark| mark.generation),
        dedup,
        suppressed: None,
        others: None,
        cursors,
    })
}
