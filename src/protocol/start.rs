//! The start table of the design: what a start finds, and whether it may go on.
//!
//! Everything here is a pure function of facts that were read before, on the very head that the fence then asserts.
//! First match from the top; every stop names its reason, what is safe, and one command.

use std::collections::BTreeMap;

use iceberg::spec::TableMetadata;
use uuid::Uuid;

use crate::commit::ledger::{Found, Jump, LedgerRecord};
use crate::commit::savepoint;
use crate::commit::side::{Debt, Role, SideMark, debt_of, snapshot_of};
use crate::event_time::EventTimeMs;
use crate::mutant;
use crate::offset::{TopicId, TopicPartition};
use crate::protocol::stops;
use crate::source::{Loss, LostRange, OffsetRange, check_ranges};
use crate::stop::{Reason, Stop};

/// After the end of a lease this much passes before another machine may call it expired: clocks differ.
pub const LEASE_GRACE_MS: i64 = 60_000;

/// What a start has read.
#[derive(Debug)]
pub struct Facts<'a> {
    /// Job file as the user named it, for commands in messages.
    pub job_shown: &'a str,
    /// Name of the job.
    pub job_name: &'a str,
    /// Main table's name.
    pub table: &'a str,
    /// Side tables that the job uses or the ledger knows.
    pub sides: &'a BTreeMap<Role, SideFacts<'a>>,
    /// The ledger.
    pub found: &'a Found,
    /// Rows in the main table's current snapshot.
    pub table_rows: u64,
    /// Whether the state folder has generations of this job.
    pub local_generations: bool,
    /// Cluster id as the broker says.
    pub cluster_id: Option<&'a str>,
    /// Topic ids as the broker says, for every topic of the job.
    pub topic_ids: &'a BTreeMap<String, Option<TopicId>>,
    /// What the broker holds of every topic partition of the job.
    pub offsets: &'a BTreeMap<TopicPartition, OffsetRange>,
    /// What a key means now.
    pub key_spec_hash: &'a str,
}

impl Facts<'_> {
    /// A side table by its role in the ledger.
    pub fn side(&self, role: &str) -> Option<&SideFacts<'_>> {
        self.sides.get(&Role::of(role)?)
    }

    /// Rows of every table whose rows make the dedup state.
    fn rows_with_keys(&self) -> u64 {
        let sides = self.sides.iter().filter(|(role, _)| role.holds_keys());
        sides.fold(self.table_rows, |sum, (_, side)| sum.saturating_add(side.rows))
    }
}

/// What a start has read of one side table.
#[derive(Debug)]
pub struct SideFacts<'a> {
    /// Its name in the job.
    pub table: String,
    /// Its UUID; `None` if it does not exist.
    pub uuid: Option<Uuid>,
    /// What it says that it follows.
    pub mark: Option<SideMark>,
    /// Rows in its current snapshot.
    pub rows: u64,
    /// Its metadata, where it was loaded.
    pub metadata: Option<&'a TableMetadata>,
}

/// What the user or a command allows beyond the defaults.
#[derive(Debug, Clone, Copy, Default)]
pub struct Allow {
    /// `run --ignore-rows`.
    pub ignore_rows: bool,
    /// `rebase-offsets`, `accept-loss` or `savepoint restore` is at work: cluster and topics may differ. What moves offsets
    /// by those of the ledger asks [`same_log`] itself.
    pub rebase: bool,
    /// `side reread` is at work, or a savepoint is judged: offsets may be out of range.
    pub loss: bool,
    /// `accept-loss`, `side reread` or `savepoint restore` is at work: files that a side table is owed may be gone.
    pub lost_files: bool,
    /// `accept-loss` or `side reread` is at work: the list that names those files may be gone.
    pub lost_list: bool,
    /// `state adopt-rows` is at work: rows of a table without ledger come to count as seen.
    pub adopt_rows: bool,
    /// `state adopt` is at work: a lost ledger is made again.
    pub adopt_ledger: bool,
    /// `state rekey` is at work: the key may differ from the ledger's.
    pub rekey: bool,
    /// `on_rollback = "replay"`: a table that was rolled back is gone on with from its older batch.
    pub replay: bool,
    /// `run --trust-ledger`: the ledger's property holds although no snapshot and no row confirms it.
    pub trust_ledger: bool,
}

/// How a run begins.
#[derive(Debug)]
pub enum Start {
    /// No ledger: the first commit records start offsets.
    First,
    /// Go on from this record.
    Resume(Box<LedgerRecord>),
}

/// Judges the rows of the start table, from the top.
///
/// # Errors
/// A [`Stop`] with the row's reason.
pub fn judge(facts: &Facts<'_>, allow: Allow) -> Result<Start, Stop> {
    let replayed;
    let record = match facts.found {
        Found::Nothing => return judge_without_ledger(facts, allow),
        Found::RolledBack { older: Some(older), newer, is_undone }
            if allow.replay && !mutant!("undone-restore-replayed", false => *is_undone) =>
        {
            replayed = Box::new(replay(older, newer));
            &replayed
        }
        Found::RolledBack { older, newer, is_undone } => {
            same_job(facts, newer)?;
            return Err(rolled_back(facts, older.as_deref(), newer, *is_undone));
        }
        Found::Record(record) | Found::CutOff(record) => record,
    };
    same_job(facts, record)?;
    same_side_tables(facts, record)?;
    for (role, side) in facts.sides {
        side_follows(facts, *role, side, record)?;
    }
    if !allow.rebase {
        same_log(facts, record)?;
        if !allow.loss {
            offsets_in_range(facts, record)?;
        }
    }
    if !allow.rekey {
        same_key(facts, record)?;
    }
    Ok(Start::Resume(record.clone()))
}

fn judge_without_ledger(facts: &Facts<'_>, allow: Allow) -> Result<Start, Stop> {
    if facts.local_generations && !allow.adopt_ledger {
        return Err(ledger_lost(facts));
    }
    let is_others = |side: &SideFacts<'_>| {
        side.mark.as_ref().is_some_and(|mark| !mark.is_of(facts.job_name, facts.table))
    };
    let followed = facts.sides.iter().filter(|(_, side)| is_others(side));
    if let Some((role, side, mark)) =
        followed.filter_map(|(role, side)| Some((role, side, side.mark.as_ref()?))).next()
    {
        return Err(Stop::new(
            Reason::OtherJob,
            format!(
                "table {} has no ledger yet, and {} {} follows job {:?} of table {}",
                facts.table,
                role.table_in_words(),
                side.table,
                mark.job_name,
                mark.main
            ),
            format!(
                "nothing was read or written; its rows stay; write this job's to a table of their own:\n  \
                 tidemill run {} --set {}={}_2\n\
                 or, if the job was only renamed, name it {:?} again",
                facts.job_shown,
                role.setting(),
                side.table,
                mark.job_name
            ),
        ));
    }
    let rows = facts.rows_with_keys();
    if rows > 0 && !(allow.ignore_rows || allow.adopt_rows || allow.adopt_ledger) {
        return Err(Stop::new(
            Reason::TableNotEmpty,
            match rows - facts.table_rows {
                0 => format!("table {} has {rows} rows and no ledger", facts.table),
                late => format!(
                    "table {} has no ledger, and there are {rows} rows, {late} of them in its late table",
                    facts.table
                ),
            },
            format!(
                "nothing was read or written; let the keys of these rows count as seen, so that their events are not \
                 written again:\n  tidemill state adopt-rows {job}\nor write beside them, and they do not count as \
                 seen:\n  tidemill run {job} --ignore-rows",
                job = facts.job_shown
            ),
        ));
    }
    Ok(Start::First)
}

/// With rows the ledger can be made again from them; without, there is nothing to go on from.
fn ledger_lost(facts: &Facts<'_>) -> Stop {
    let what = format!(
        "table {} has no ledger of job {}, but the state folder has generations of it",
        facts.table, facts.job_name
    );
    let way_out = match facts.rows_with_keys() {
        0 => format!(
            "nothing was read or written; if the table was dropped on purpose, begin anew with:\n  \
             tidemill state discard {}",
            facts.job_shown
        ),
        rows => format!(
            "nothing was read or written; make the ledger again from the {rows} rows of the table and what the state \
             folder knows of them:\n  tidemill state adopt {}",
            facts.job_shown
        ),
    };
    Stop::new(Reason::LedgerLost, what, way_out)
}

/// The record to go on from when a table was rolled back: all of the older one, under an epoch and a sequence above the
/// newer one's, with the offsets that jump back. Its side tables are to go back to the same batch before anything else.
fn replay(older: &LedgerRecord, newer: &LedgerRecord) -> LedgerRecord {
    let mut jumps = Vec::new();
    for (topic, partitions) in &newer.live().topics {
        for (partition, cursor) in partitions {
            let new_start = older.cursor(topic, *partition).map(|cursor| cursor.end);
            if let Some(new_start) = new_start.filter(|new_start| *new_start != cursor.end) {
                let (topic, old_end) = (topic.clone(), Some(cursor.end));
                let reason = "on_rollback".to_owned();
                jumps.push(Jump { topic, partition: *partition, old_end, new_start, reason });
            }
        }
    }
    LedgerRecord {
        epoch: older.epoch.max(newer.epoch),
        sequence: newer.sequence,
        owner: newer.owner,
        lease_until_ms: newer.lease_until_ms,
        released: newer.released,
        // Files that the older batch still owed are told by the newer record if it is of the same batch.
        sides: if older.batch == newer.batch { newer.sides.clone() } else { older.sides.clone() },
        sides_back_to: Some(older.batch),
        timelines: newer.timelines_from(older.batch),
        jumps,
        ..older.clone()
    }
}

fn rolled_back(
    facts: &Facts<'_>,
    older: Option<&LedgerRecord>,
    newer: &LedgerRecord,
    is_undone: bool,
) -> Stop {
    let now = older.map_or("no commit of this job".to_owned(), |older| format!("batch {}", older.batch));
    let went_back = match is_undone {
        true => {
            ", which it had gone back to on purpose (savepoint restore, on_rollback), and its side tables with it"
        }
        false => "",
    };
    Stop::new(
        Reason::TableRolledBack,
        format!(
            "table {} was rolled back: it is at {now}, its ledger says batch {}{went_back}",
            facts.table, newer.batch
        ),
        match older {
            Some(_) if is_undone => format!(
                "nothing was read or written; the side tables can not follow main to where it is now; {forward}:\n  \
                 tidemill run {}\nor, where that snapshot is expired, bring the metadata file of that batch back first \
                 (register_table)",
                facts.job_shown,
                forward = roll_forward(newer)
            ),
            None if facts.table_rows > 0 => format!(
                "nothing was read or written; {forward}:\n  tidemill run {}",
                facts.job_shown,
                forward = roll_forward(newer)
            ),
            // There is no batch to go on from: the table that comes next has no ledger in its history.
            None => format!(
                "nothing was read or written; if this is meant (CREATE OR REPLACE TABLE), and the job is to begin anew, drop \
                 the table, which still has that ledger, create it again, and then:\n  tidemill state discard {job}\nif it \
                 is not, {forward}:\n  tidemill run {job}",
                job = facts.job_shown,
                forward = roll_forward(newer)
            ),
            Some(older) => format!(
                "nothing was read or written; if this is meant, go on from batch {}, and read again what came after it:\n  \
                 tidemill run {job} --set sink.iceberg.on_rollback=replay\nif it is not, {forward}:\n  tidemill run {job}",
                older.batch,
                job = facts.job_shown,
                forward = roll_forward(newer)
            ),
        },
    )
}

fn roll_forward(newer: &LedgerRecord) -> String {
    format!(
        "roll the table forward to its snapshot of batch {} (summary tidemill.attempt = {}) with your engine, then",
        newer.batch, newer.attempt
    )
}

fn same_job(facts: &Facts<'_>, record: &LedgerRecord) -> Result<(), Stop> {
    if mutant!("job-not-compared", true => record.job_name == facts.job_name) {
        return Ok(());
    }
    let name = facts.job_name.replace('-', "_");
    let set =
        |(role, side): (&Role, &SideFacts<'_>)| format!(" --set {}={}_{name}", role.setting(), side.table);
    let sides: String = facts.sides.iter().map(set).collect();
    Err(Stop::new(
        Reason::OtherJob,
        format!(
            "table {} carries the ledger of job {:?}, and this job is {:?}",
            facts.table, record.job_name, facts.job_name
        ),
        format!(
            "nothing was read or written; give this job tables of its own:\n  \
             tidemill run {} --set sink.iceberg.table={}_{name}{sides}\n\
             or, if the job was only renamed, name it {:?} again",
            facts.job_shown, facts.table, record.job_name,
        ),
    ))
}

fn same_side_tables(facts: &Facts<'_>, record: &LedgerRecord) -> Result<(), Stop> {
    for (role, side) in &record.sides {
        let named = Role::of(role).and_then(|role| Some((role, facts.sides.get(&role)?)));
        let found = named.and_then(|(_, side)| side.uuid);
        if found == Some(side.uuid) {
            continue;
        }
        let what = match found {
            _ if let Some((role, named)) = named.filter(|(_, named)| named.table != side.table) => format!(
                "the {} of the ledger is {}, and the job names {}; set {} back",
                role.table_in_words(),
                side.table,
                named.table,
                role.setting()
            ),
            None => format!("{role} table {} is missing", side.table),
            Some(found) => {
                format!(
                    "{role} table {} was replaced: uuid {found} where {} was expected",
                    side.table, side.uuid
                )
            }
        };
        return Err(Stop::new(
            Reason::TableReplaced,
            what,
            format!(
                "nothing was read or written; put the table back under its name (register_table with its last metadata \
                 file), then:\n  tidemill run {}",
                facts.job_shown
            ),
        ));
    }
    Ok(())
}

/// A table with keys has rows that this ledger can not answer for. `side` exists.
fn rows_of_others(facts: &Facts<'_>, role: Role, side: &SideFacts<'_>, record: &LedgerRecord) -> Stop {
    let (words, table, rows) = (role.table_in_words(), &side.table, side.rows);
    let (what, way_out) = if record.sides.get(role.name()).map(|named| named.uuid) == side.uuid {
        (
            format!(
                "{words} {table} of this ledger was claimed by another ledger of the job, and nothing tells which of its \
                 {rows} rows are of which"
            ),
            format!(
                "nothing was read or written; put the main table of the other ledger back, or the {words} as it was before \
                 the claim (register_table with an earlier metadata file), then:\n  tidemill run {}",
                facts.job_shown
            ),
        )
    } else {
        (
            format!("{words} {table} has {rows} rows that no batch of this ledger wrote"),
            format!(
                "nothing was read or written; their keys do not count as seen; write late rows to a table of their own:\n  \
                 tidemill run {} --set {}={table}_2",
                facts.job_shown,
                role.setting(),
            ),
        )
    };
    Stop::new(Reason::TableNotEmpty, what, way_out)
}

/// A side table follows this job, and is not ahead of main; one with keys has no rows but what this ledger wrote.
fn side_follows(
    facts: &Facts<'_>,
    role: Role,
    side: &SideFacts<'_>,
    record: &LedgerRecord,
) -> Result<(), Stop> {
    let words = role.table_in_words();
    let is_ours = side.mark.as_ref().is_some_and(|mark| mark.job_id == record.job_id);
    // A ledger that began on tables with rows has named them as not its own, and then claims the table. What another ledger
    // of the job brought to it since has higher numbers.
    let is_counted = |batch_max| side.mark.as_ref().is_none_or(|mark| mark.batch <= batch_max);
    let begins = record.others.as_ref().is_some_and(|others| {
        others.batch_max == record.batch
            && mutant!("rows-of-others-counted-as-ours", true => is_counted(others.batch_max))
    });
    let is_known = (is_ours || begins) && record.sides.contains_key(role.name());
    if role.holds_keys() && side.rows > 0 && !is_known {
        return Err(rows_of_others(facts, role, side, record));
    }
    let Some(mark) = &side.mark else { return debt_is_known(facts, role, side, record) };
    if !is_ours && mark.is_of(facts.job_name, facts.table) {
        // Its main table was dropped, and this ledger began anew, or was put back: the owner claims the table again.
        return debt_is_known(facts, role, side, record);
    }
    if !is_ours {
        return Err(Stop::new(
            Reason::OtherJob,
            format!("{words} {} follows another job, {}", side.table, mark.job_id),
            format!(
                "nothing was read or written; put this job's own {words} back under that name, or the main table that \
                 the {words} follows, with that job, then:\n  tidemill run {}",
                facts.job_shown
            ),
        ));
    }
    if mark.fits(record.batch, record.batch_generation()) {
        return Ok(());
    }
    if record.sides_back_to == Some(record.batch) {
        let tagged =
            |metadata| record.restored_from.as_ref().and_then(|name| savepoint::tagged(metadata, name));
        let kept = |metadata| snapshot_of(metadata, record.job_id, record.batch, record.batch_generation());
        return match side.metadata {
            Some(metadata) if role.holds_keys() && tagged(metadata).or_else(|| kept(metadata)).is_none() => {
                Err(not_restorable(facts, role, side, record.batch))
            }
            _ => Ok(()),
        };
    }
    let back_to = stops::where_main_is(mark.batch, record.batch);
    Err(Stop::new(
        Reason::TableRolledBack,
        format!(
            "{words} {} followed another batch {} than table {}, which is at batch {}: one of them was rolled back",
            side.table, mark.batch, facts.table, record.batch
        ),
        format!(
            "nothing was read or written; with your engine, roll table {} forward again, or the {words} back to its last \
             snapshot {back_to} (tidemill.side in its summary; what came since is read again), then:\n  tidemill run {}",
            facts.table, facts.job_shown
        ),
    ))
}

/// Whether a table that the owner is about to mark has the files that the last record owes it.
fn debt_is_known(
    facts: &Facts<'_>,
    role: Role,
    side: &SideFacts<'_>,
    record: &LedgerRecord,
) -> Result<(), Stop> {
    let is_owed = record.sides.get(role.name()).is_some_and(|named| named.owed);
    let is_known = |metadata| debt_of(metadata, record.job_id, record.batch) != Debt::Unknown;
    // An empty table has none of them.
    if !is_owed || side.rows == 0 || side.metadata.is_none_or(is_known) {
        return Ok(());
    }
    let (words, table) = (role.table_in_words(), &side.table);
    let (reason, what, put_back) = match side.mark {
        Some(_) => (
            Reason::OtherJob,
            format!("{words} {table} of this ledger was claimed by another ledger of the job"),
            format!("put the main table of the other ledger back, or the {words} as it was before the claim"),
        ),
        None => (
            Reason::LedgerCorrupt,
            format!("{words} {table} has lost its mark, table property tidemill.side"),
            format!("put the {words} back as it was with it"),
        ),
    };
    Err(Stop::new(
        reason,
        format!(
            "{what}, and nothing tells which rows that batch {} owes it stand there already",
            record.batch
        ),
        format!(
            "nothing was read or written; {put_back} (register_table with an earlier metadata file), or, where that file is \
             gone, copy its rows elsewhere and delete all of them there with your engine, then:\n  tidemill run {}",
            facts.job_shown
        ),
    ))
}

fn not_restorable(facts: &Facts<'_>, role: Role, side: &SideFacts<'_>, batch: u64) -> Stop {
    Stop::new(
        Reason::SideNotRestorable,
        format!(
            "table {} goes back to batch {batch}, and {} {} keeps no snapshot of that batch",
            facts.table,
            role.table_in_words(),
            side.table
        ),
        format!(
            "nothing was read or written; roll table {} forward again with your engine, or bring the metadata file of the \
             {} of that batch back (register_table), then:\n  tidemill run {}",
            facts.table,
            role.table_in_words(),
            facts.job_shown
        ),
    )
}

/// Whether cluster and topics are those that the ledger's offsets are of, as far as both are known.
///
/// # Errors
/// `CLUSTER_CHANGED` or `TOPIC_CHANGED`, with `rebase-offsets` as the way out.
pub fn same_log(facts: &Facts<'_>, record: &LedgerRecord) -> Result<(), Stop> {
    same_cluster(facts, record)?;
    same_topics(facts, record)
}

fn same_cluster(facts: &Facts<'_>, record: &LedgerRecord) -> Result<(), Stop> {
    let (Some(known), Some(found)) = (record.cluster_id.as_deref(), facts.cluster_id) else { return Ok(()) };
    if known == found {
        return Ok(());
    }
    Err(Stop::new(
        Reason::ClusterChanged,
        format!("the broker belongs to cluster {found}, the ledger of {} to cluster {known}", facts.table),
        rebase_way_out(facts),
    ))
}

fn same_topics(facts: &Facts<'_>, record: &LedgerRecord) -> Result<(), Stop> {
    let changed: Vec<String> = facts
        .topic_ids
        .iter()
        .filter_map(|(topic, found)| {
            let (known, found) = ((*record.topics.get(topic)?)?, (*found)?);
            mutant!("topic-id-not-compared", false => known != found)
                .then(|| format!("topic {topic} was made again: id {found} where {known} was read"))
        })
        .collect();
    if changed.is_empty() {
        return Ok(());
    }
    Err(Stop::new(Reason::TopicChanged, changed.join("\n"), rebase_way_out(facts)))
}

/// The one way out of a changed cluster, topic or tail.
pub fn rebase_way_out(facts: &Facts<'_>) -> String {
    format!(
        "nothing was read or written; if this is meant, begin again at the earliest offsets of the new topics (keys \
         already seen stay seen):\n  tidemill rebase-offsets {}",
        facts.job_shown
    )
}

fn offsets_in_range(facts: &Facts<'_>, record: &LedgerRecord) -> Result<(), Stop> {
    let lane = record.live().topics.iter().filter(|(topic, _)| facts.topic_ids.contains_key(*topic));
    let next_offsets = lane
        .flat_map(|(topic, partitions)| {
            partitions
                .iter()
                .map(move |(partition, cursor)| (TopicPartition::new(topic, *partition), cursor.end))
        })
        .collect();
    let (removed, cut_off): (Vec<_>, Vec<_>) =
        check_ranges(&next_offsets, facts.offsets).into_iter().partition(|range| range.loss == Loss::Removed);
    let joined = |ranges: &[LostRange]| ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if !cut_off.is_empty() {
        let what = format!("the log is shorter than what was read of it: {}", joined(&cut_off));
        return Err(Stop::new(Reason::TopicChanged, what, rebase_way_out(facts)));
    }
    if removed.is_empty() {
        return Ok(());
    }
    Err(Stop::new(
        Reason::OffsetsLost,
        format!("the broker no longer holds what was to be read: {}", joined(&removed)),
        format!(
            "nothing was read or written; the events of these ranges can not be had from this broker any more; to go on \
             without them, with the ranges written into the ledger:\n  tidemill accept-loss {}",
            facts.job_shown
        ),
    ))
}

fn same_key(facts: &Facts<'_>, record: &LedgerRecord) -> Result<(), Stop> {
    if mutant!("key-spec-not-compared", true => record.dedup.key_spec_hash == facts.key_spec_hash) {
        return Ok(());
    }
    Err(Stop::new(
        Reason::KeySpecChanged,
        format!(
            "what makes an event a repeat differs from the ledger of {}: key columns, their types, event-time column, \
             repeats or shards were changed",
            facts.table
        ),
        format!(
            "nothing was read or written; set these fields back as they were, or, if the change is meant, make the state \
             again under the new key from the rows of the table:\n  tidemill state rekey {}",
            facts.job_shown
        ),
    ))
}

/// Whether the table is free to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseVerdict {
    /// Released, or never owned.
    Free,
    /// Its owner held this machine's lock, which is free: dead.
    OwnerDead,
    /// Its lease is over; the head must not move over a short wait.
    Expired,
    /// Someone works on it until then, ms since the epoch.
    Busy {
        /// End of the lease.
        until_ms: i64,
    },
}

/// Judges the lease of a record (R9).
pub fn lease(record: &LedgerRecord, owner_dead: bool, now_ms: i64) -> LeaseVerdict {
    let grace_ms = mutant!("lease-without-grace", 0 => LEASE_GRACE_MS);
    if record.released {
        LeaseVerdict::Free
    } else if mutant!("silence-is-death", true => owner_dead) {
        LeaseVerdict::OwnerDead
    } else if now_ms > record.lease_until_ms.saturating_add(grace_ms) {
        LeaseVerdict::Expired
    } else {
        LeaseVerdict::Busy { until_ms: record.lease_until_ms }
    }
}

/// The stop of a start that meets another owner.
pub fn busy(table: &str, owner: Option<Uuid>, until_ms: Option<i64>, job_shown: &str) -> Stop {
    let owner = owner.map_or("another owner".to_owned(), |owner| format!("owner {owner}"));
    let until = until_ms.map_or(String::new(), |until| format!(", lease until {}", EventTimeMs(until)));
    Stop::new(
        Reason::Busy,
        format!("{owner} works on table {table}{until}"),
        format!(
            "nothing was read or written; try again later, or, if that owner is dead on another machine:\n  \
             tidemill run {job_shown} --takeover"
        ),
    )
}

#[cfg(test)]
mod tests;
