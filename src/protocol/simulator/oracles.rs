//! What must hold, judged whenever a request lands, from the log and the history alone.

use std::collections::BTreeSet;
use std::rc::Rc;

use super::process::{main_ident, side_ident};
use super::universe::{Content, EventKind, File, Flight, Key, Place, Row, TOPIC, Truth, Universe};
use crate::commit::ledger::{self, Found, Kind, LIVE_LANE, LedgerRecord, PROPERTY, attempt_on_ancestry};
use crate::commit::side::{MARK, Role, SideMark, inspect};

/// What a request makes of a table; breaks the universe if it must not.
pub(super) fn judge(universe: &mut Universe, flight: &Flight, base: &Content, files: Vec<File>) -> Content {
    let paths: BTreeSet<&str> = files.iter().map(|file| file.path.as_str()).collect();
    universe.require(paths.len() == files.len(), || "a data file stands twice in a table".to_owned());
    for file in &flight.files {
        let is_durable = universe.stored.get(&file.path) == Some(&true);
        universe.require(is_durable, || format!("{} is named and not durable", file.path));
    }
    match flight.properties.get(PROPERTY) {
        Some(text) => judge_main(universe, flight, base, files, text),
        None => judge_side(universe, flight, base, files),
    }
}

/// The largest batch number of rows that stood in the tables before the ledger of this record; those to come are above it.
pub(super) fn after(record: &LedgerRecord) -> u64 {
    record.others.as_ref().map_or(0, |others| others.batch_max)
}

/// Rows of ours.
fn rows(files: &[File]) -> impl Iterator<Item = &Row> {
    files.iter().flat_map(|file| file.rows.iter()).filter(|row| row.batch.is_some())
}

fn judge_main(
    universe: &mut Universe,
    flight: &Flight,
    base: &Content,
    files: Vec<File>,
    text: &str,
) -> Content {
    let record = LedgerRecord::from_property(text).expect("a record of ours");
    let base = &below(universe, flight, base);
    judge_chain(universe, base.record.as_deref(), &record);
    let mut truth = (*base.truth).clone();
    if record.kind == Kind::Data {
        let consumed = take(universe, &mut truth, &record);
        let late = owed(universe, &record, Role::Late);
        judge_counts(universe, flight, &record, consumed, late.len() as u64);
        truth.late.extend(late);
        let letters = owed(universe, &record, Role::DeadLetters);
        truth.letters_owed = letters.iter().map(|row| row.place).collect();
    }
    let is_owed = record.sides.get(Role::DeadLetters.name()).is_some_and(|side| side.owed);
    if record.kind == Kind::Change && is_owed {
        // Letters that main names no more are given up. A rollback does not take that back: of this batch the newest list counts.
        let left = owed(universe, &record, Role::DeadLetters);
        let left: BTreeSet<Place> = left.iter().map(|row| row.place).collect();
        universe.given_up.extend(truth.letters_owed.difference(&left));
    }
    let late = truth.late.iter().filter(|row| !row.is_unproven);
    let main = rows(&files).filter(|row| row.batch > Some(after(&record)));
    let keys: Vec<Key> = main.chain(late).map(|row| row.key).collect();
    let once: BTreeSet<Key> = keys.iter().copied().collect();
    universe.require(keys.len() == once.len(), || {
        format!("a key stands twice in main and late table after batch {}", record.batch)
    });
    universe.require(once == truth.keys, || {
        let missing: Vec<_> = truth.keys.difference(&once).collect();
        let surplus: Vec<_> = once.difference(&truth.keys).collect();
        format!(
            "main and late table lack keys {missing:?} and have keys {surplus:?} too many after batch {}",
            record.batch
        )
    });
    if let Some(generation) = &record.dedup.generation
        && record.kind == Kind::Data
    {
        universe.landed.insert(generation.clone());
        let folder = &universe.folders[flight.folder];
        let keys = folder.generation(generation);
        let is_gone = keys.is_none() && (folder.is_lock_broken || folder.is_harmed);
        universe.require(is_gone || keys.as_ref() == Some(&truth.keys), || {
            format!("generation {generation} does not hold the keys of its table: {keys:?}")
        });
    }
    Content { files: Rc::new(files), record: Some(Rc::new(record)), truth: Rc::new(truth) }
}

/// What a commit builds on. Where history was cut off, a start believes the property once the rows of the last batch that
/// had any are there: then nothing but commits without rows was rolled back, and it goes on from them.
fn below(universe: &Universe, flight: &Flight, base: &Content) -> Content {
    let metadata = &universe.tables[&flight.table].metadata;
    let is_there = base.record.as_ref().is_some_and(|record| attempt_on_ancestry(metadata, record.attempt));
    if is_there {
        return base.clone();
    }
    match ledger::inspect(metadata) {
        Ok(Found::CutOff(record)) => {
            let landed = universe
                .contents
                .values()
                .find(|content| content.record.as_ref().is_some_and(|known| known.attempt == record.attempt));
            let landed = landed.cloned().unwrap_or_default();
            let last = rows(&landed.files).filter_map(|row| row.batch).max();
            if last.is_some() && !rows(&base.files).any(|row| row.batch == last) {
                return base.clone();
            }
            Content { record: Some(Rc::from(record)), truth: landed.truth, files: Rc::clone(&base.files) }
        }
        _ => base.clone(),
    }
}

/// Every record follows from the one before.
fn judge_chain(universe: &mut Universe, before: Option<&LedgerRecord>, next: &LedgerRecord) {
    let Some(before) = before else {
        let fine = next.kind == Kind::Start && next.batch == after(next) && next.sequence == 1;
        return universe.require(fine, || "the first record of a table is no start".to_owned());
    };
    // A replay goes on from an older record, above everything that was rolled back.
    let replays = next.kind == Kind::Fence && next.sides_back_to == Some(next.batch);
    let step = next.sequence - before.sequence.min(next.sequence);
    universe.require(step == 1 || (replays && step > 1), || {
        format!("sequence {} follows {}", next.sequence, before.sequence)
    });
    universe.require(next.job_id == before.job_id, || "the job's id changed".to_owned());
    let fenced = next.epoch > before.epoch;
    universe.require(next.epoch >= before.epoch && fenced == (next.kind == Kind::Fence), || {
        format!("epoch {} with a {:?} follows epoch {}", next.epoch, next.kind, before.epoch)
    });
    universe.require(fenced || next.owner == before.owner, || {
        "an owner without a fence of its own committed".to_owned()
    });
    let step = u64::from(next.kind == Kind::Data);
    universe.require(next.batch == before.batch + step, || {
        format!("batch {} ({:?}) follows batch {}", next.batch, next.kind, before.batch)
    });
    judge_backfills(universe, before, next);
    let served = next.batch_lane.is_none();
    for (partition, cursor) in next.live().topics.get(TOPIC).into_iter().flatten() {
        let known = before.cursor(TOPIC, *partition).map(|cursor| cursor.end);
        let jump = next.jumps.iter().find(|jump| jump.partition == *partition);
        let fine = match (next.kind, jump, known) {
            (Kind::Data, None, Some(end)) if served => cursor.start == end && cursor.end >= end,
            (Kind::Data, None, None) if served => cursor.end >= cursor.start,
            (Kind::Fence, Some(jump), known) => {
                replays && known == Some(jump.new_start) && known == Some(cursor.end)
            }
            (Kind::Jump, Some(jump), known) => jump.old_end == known && cursor.end == jump.new_start,
            (_, None, known) => known == Some(cursor.end),
            (_, Some(_), _) => false,
        };
        universe.require(fine, || {
            format!("{partition}: [{}, {}) ({:?}) follows {known:?}", cursor.start, cursor.end, next.kind)
        });
    }
}

/// A backfill moves by its own microbatches alone, each from where the one before ended, and never beyond its frozen end;
/// it comes and goes by a change that says so, or with offsets that a command moved.
fn judge_backfills(universe: &mut Universe, before: &LedgerRecord, next: &LedgerRecord) {
    for (name, lane, backfill) in next.backfills() {
        let Some(known) = before.lanes.get(name) else {
            universe.require(next.kind == Kind::Change, || {
                format!("backfill {name} came with a {:?}", next.kind)
            });
            continue;
        };
        let served = next.kind == Kind::Data && next.batch_lane.as_deref() == Some(name);
        for (place, cursor) in lane.cursors() {
            let end = known.topics.get(&place.topic).and_then(|known| known.get(&place.partition));
            let fine = match end.map(|known| known.end) {
                Some(end) if served => cursor.start == end && cursor.end >= end,
                end => end == Some(cursor.end),
            };
            let frozen = backfill.end(&place.topic, place.partition);
            universe.require(fine && frozen.is_none_or(|frozen| cursor.end <= frozen), || {
                format!("backfill {name} {place}: {cursor:?} follows {end:?}, frozen at {frozen:?}")
            });
        }
    }
    for name in before.active_backfills().filter(|name| !next.lanes.contains_key(*name)) {
        let fine = matches!(next.kind, Kind::Change | Kind::Jump);
        universe.require(fine, || format!("backfill {name} went with a {:?}", next.kind));
    }
}

/// Adds what a microbatch took to the truth; gives the number of events.
fn take(universe: &Universe, truth: &mut Truth, record: &LedgerRecord) -> u64 {
    let mut consumed = 0;
    let lane = record.batch_lane.as_deref().unwrap_or(LIVE_LANE);
    let topics = record.lanes.get(lane).map(|lane| &lane.topics);
    for (partition, cursor) in topics.and_then(|topics| topics.get(TOPIC)).into_iter().flatten() {
        for (place, event) in universe.log.events(*partition, cursor.start.get(), cursor.end.get()) {
            consumed += 1;
            match event.kind {
                EventKind::Bad => _ = truth.letters.insert(place),
                EventKind::OnTime | EventKind::Late => _ = truth.keys.insert(event.key),
                EventKind::Unproven => {}
            }
        }
    }
    consumed
}

/// Rows that a record owes a side table.
fn owed(universe: &Universe, record: &LedgerRecord, role: Role) -> Vec<Row> {
    let named = record.sides.get(role.name()).and_then(|side| side.files.as_ref());
    let paths = named.into_iter().flatten().filter_map(|file| file["path"].as_str());
    paths.flat_map(|path| universe.files[path].rows.iter().copied()).collect()
}

fn judge_counts(universe: &mut Universe, flight: &Flight, record: &LedgerRecord, consumed: u64, late: u64) {
    let counts = &record.counts;
    let written = rows(&flight.files).count() as u64;
    let fine = counts.conserved()
        && (counts.consumed, counts.written, counts.late_side) == (consumed, written, late);
    universe.require(fine, || {
        format!("{consumed} events, {written} rows and {late} late rows are not {counts:?}")
    });
}

fn judge_side(universe: &mut Universe, flight: &Flight, base: &Content, files: Vec<File>) -> Content {
    let mark: SideMark = serde_json::from_str(&flight.properties[MARK]).expect("a mark of ours");
    let role = Role::of(&mark.role).expect("a role of ours");
    // Offsets that a command moved back are read again: letters are known by their places, and unproven rows by nothing.
    let found: BTreeSet<(Place, Option<u64>)> = match role {
        Role::DeadLetters => rows(&files).map(|row| (row.place, None)).collect(),
        Role::Late => rows(&files).map(|row| (row.place, row.batch)).collect(),
    };
    let count = rows(&files).count();
    universe.require(found.len() == count, || {
        format!("a row stands twice in the {} after batch {}", role.table_in_words(), mark.batch)
    });
    let content = universe.content(&main_ident());
    let before = inspect(&universe.tables[&flight.table].metadata).expect("a mark of ours");
    let marked = before.map_or(0, |before| before.epoch).max(mark.epoch);
    // A table that was rolled back, or made anew, since its owner looked says nothing about this commit. Nor does the fence
    // of a replay until this side table is set back: then rows with keys leave it, and letters stay.
    let head = content.record.as_ref().filter(|record| {
        let is_to_go_back = record.sides_back_to.is_some() && marked < record.epoch;
        let is_followed = (record.epoch, record.batch) >= (mark.epoch, mark.batch);
        record.job_id == mark.job_id && is_followed && !is_to_go_back
    });
    let has_generation = mark.generation.as_ref().is_none_or(|name| universe.landed.contains(name));
    universe.require(has_generation, || format!("side batch {} comes before main's", mark.batch));
    let is_head = head.is_some();
    match role {
        Role::DeadLetters => {
            let mut added = rows(&flight.files).map(|row| row.place);
            let letters = &content.truth.letters;
            universe.require(!is_head || added.all(|place| letters.contains(&place)), || {
                format!("the side table has letters that main never took, after batch {}", mark.batch)
            });
        }
        Role::Late => {
            let is_of_batch = |row: &&Row| row.batch.is_some_and(|batch| batch <= mark.batch);
            let named: BTreeSet<Row> = content.truth.late.iter().filter(is_of_batch).copied().collect();
            let after = head.map_or(0, |record| after(record));
            let found: BTreeSet<Row> = rows(&files).filter(|row| row.batch > Some(after)).copied().collect();
            universe.require(!is_head || found == named, || {
                format!("the late table has {found:?} where main named {named:?}, after batch {}", mark.batch)
            });
        }
    }
    Content { files: Rc::new(files), ..base.clone() }
}

/// What must hold once everything is drained.
pub(super) fn judge_end(universe: &mut Universe) {
    let content = universe.content(&main_ident());
    let Some(record) = content.record.clone() else {
        return universe.broken("nothing was committed although faults stopped");
    };
    for (partition, log) in universe.log.partitions.clone().iter().enumerate() {
        // One that was added and is empty needs no commit: it begins where its log begins.
        let end = record.cursor(TOPIC, partition as i32).map_or(log.low, |cursor| cursor.end.get());
        universe.require(end == log.records.len() as i64, || {
            format!("topic partition {partition} is read to {end} of {}", log.records.len())
        });
    }
    let waiting: Vec<_> = record.active_backfills().collect();
    universe.require(waiting.is_empty(), || format!("backfills {waiting:?} were not read to their ends"));
    universe.require(record.released, || "the table was not given back".to_owned());
    let late = universe.content(&side_ident(Role::Late));
    let late: BTreeSet<Row> = late.rows().filter(|row| row.batch > Some(after(&record))).copied().collect();
    universe.require(late == content.truth.late, || {
        format!("the late table has {late:?} where main named {:?}", content.truth.late)
    });
    let dead = universe.content(&side_ident(Role::DeadLetters));
    let letters: BTreeSet<Place> = rows(&dead.files).map(|row| row.place).collect();
    let missing: Vec<Place> = content.truth.letters.difference(&letters).copied().collect();
    let missing: Vec<&Place> = missing.iter().filter(|place| !universe.given_up.contains(*place)).collect();
    let is_whole = missing.is_empty();
    let missing = format!("letters {missing:?} were lost");
    universe.require(is_whole, || missing);
}
