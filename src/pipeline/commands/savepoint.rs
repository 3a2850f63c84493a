//! `savepoint create | list | restore | drop`: a moment of a job that can be gone back to.
//!
//! A savepoint is a tag on main and one on each side table (`commit/savepoint.rs`), and by that the dedup generation that
//! main's record names: the sweep leaves its files in the state folder.
//!
//! Order of durable steps, each a commit by the owner of the table, and what a crash after each leaves
//! 1. create: tag of the side table: a stray, which the next create or drop takes away.
//! 2. create: record and tag of main: the savepoint stands.
//! 3. restore: main has the files, the offsets and the generation of the savepoint, in one commit under a new epoch; its
//!    record says that side tables are to follow. Before it nothing is changed.
//! 4. restore: the side table has the files of its tag. The next start does this if a crash came before, or again.
//! 5. drop: main's tag is gone, and with it the savepoint: what the side table still has is a stray.
//!
//! Beside a run in progress its owner is asked to create or drop (R9), and does so between two microbatches
//! ([`create_asked`], [`drop_asked`]). A restore takes rows and offsets from under a run, so it ends BUSY.

use std::collections::{BTreeMap, BTreeSet};

use iceberg::table::Table;
use serde::Serialize;

use super::{Confirm, need_record};
use crate::catalog::updates::Updates;
use crate::commit::ledger::{Change, Found, Jump, Kind, LIVE_LANE, LedgerRecord, SUMMARY_RESTORED};
use crate::commit::request::Ask;
use crate::commit::savepoint::{self, Savepoint};
use crate::commit::side::{self, Role};
use crate::commit::upkeep::{Beyond, Upkeep};
use crate::dedup;
use crate::event_time::EventTimeMs;
use crate::job::Job;
use crate::job::file::LoadedJob;
use crate::pipeline::owner::{Owner, judge, prepare};
use crate::pipeline::report::{Report, Unheard};
use crate::pipeline::requests::{self, done_or_asked};
use crate::pipeline::survey::{Survey, side_idents, state_folder};
use crate::pipeline::{RunOptions, plan_memory, stops};
use crate::protocol::generation;
use crate::protocol::start::Allow;
use crate::stop::{Reason, Stop};

/// A savepoint as `list` shows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// When it was made, RFC 3339.
    pub made: String,
    /// Last microbatch.
    pub batch: u64,
    /// Watermark of the live lane, RFC 3339.
    pub watermark: Option<String>,
    /// Next offsets of each topic, summed over its topic partitions.
    pub next_offsets: BTreeMap<String, i64>,
    /// Topic partitions.
    pub topic_partitions: usize,
    /// Keys in the dedup state.
    pub state_keys: u64,
    /// The dedup generation; `None` before the first microbatch.
    pub generation: Option<String>,
    /// Whether the state folder of this machine has all its files.
    pub at_home: bool,
    /// The tag, the same on every table.
    pub tag: String,
    /// Snapshot that the tag names, by table; `None` where a table of the savepoint lacks it.
    pub tables: BTreeMap<String, Option<i64>>,
}

/// What `savepoint list` found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Listing {
    /// The main table.
    pub table: String,
    /// Savepoints, by name.
    pub savepoints: Vec<Listed>,
    /// Names of tags that a crash left on the side table alone.
    pub strays: Vec<String>,
}

impl Listing {
    /// Whether there is a savepoint, or what a crash left of one, of this name.
    fn names(&self, name: &str) -> bool {
        self.savepoints.iter().any(|found| found.name == name)
            || self.strays.iter().any(|stray| stray == name)
    }
}

/// What `savepoint restore` does, or would do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Restoration {
    /// The savepoint.
    pub savepoint: Listed,
    /// Batch before.
    pub batch_before: u64,
    /// Offsets that go back, those of the live lane.
    pub jumps: Vec<Jump>,
    /// What a person should know, in sentences.
    pub notes: Vec<String>,
}

fn check_name(name: &str) -> Result<(), Stop> {
    if savepoint::is_name(name) {
        return Ok(());
    }
    Err(Stop::new(
        Reason::Usage,
        format!("{name:?} can not name a savepoint"),
        format!(
            "nothing was changed; take 1 to {} of a-z, 0-9, _, - and ., beginning with a letter or digit",
            savepoint::NAME_BYTES_MAX
        ),
    ))
}

/// The way out of a table at work for who would take rows and offsets from under it.
fn beside_a_run(stop: Stop, command: &str) -> Stop {
    if stop.reason != Reason::Busy {
        return stop;
    }
    let way_out = format!(
        "nothing was changed; a savepoint is restored between two runs: let that run end (a drain ends by itself, SIGTERM \
         ends a loop in order), then:\n  tidemill {command}"
    );
    Stop { way_out, ..stop }
}

fn updates_of(job: &Job) -> Result<Updates, Stop> {
    Updates::of(&job.sink.catalog).map_err(stops::catalog)
}

fn of_ledger(table: &Table, error: crate::commit::ledger::LedgerError) -> Stop {
    stops::ledger(table.identifier(), error)
}

/// Makes a savepoint of the last commit, or has it made by the owner that there is.
///
/// # Errors
/// `USAGE`: the name can not be one, or is taken. The [`Stop`] of the start table.
pub async fn create_savepoint(
    loaded: &LoadedJob,
    options: &RunOptions,
    name: &str,
    report: &mut dyn Report,
) -> Result<Listed, Stop> {
    check_name(name)?;
    let ask = Ask::CreateSavepoint { savepoint: name.to_owned() };
    let judge = async || match find_listed(loaded, options, name).await? {
        Some(known) => Err(taken(name, known.batch, options)),
        None => Ok(()),
    };
    let as_owner = async |was_asked| create_as_owner(loaded, options, name, was_asked).await;
    if let Some(made) = done_or_asked(loaded, options, &ask, report, judge, as_owner).await? {
        return Ok(made);
    }
    find_listed(loaded, options, name).await?.ok_or_else(|| not_done(name, "made"))
}

async fn create_as_owner(
    loaded: &LoadedJob,
    options: &RunOptions,
    name: &str,
    was_asked: bool,
) -> Result<Listed, Stop> {
    let prepared = prepare(loaded, options, Allow::default()).await?;
    need_record(&prepared, options)?;
    if let Some(known) = find(&prepared.survey, name)?.filter(|_| !was_asked) {
        return Err(taken(name, known.record.batch, options));
    }
    let (mut owner, _, _) = prepared.take(&BTreeMap::new()).await?;
    let tagged = tag_unless_tagged(&mut owner, name).await;
    owner.end(tagged).await?;
    let made = savepoint_on(&owner.main, name)?;
    Ok(listed(&loaded.job, &made, &owner.main, owner.sides.values()))
}

/// What was asked before comes first: it may be this very savepoint.
async fn tag_unless_tagged(owner: &mut Owner<'_>, name: &str) -> Result<(), Stop> {
    requests::take(owner, &mut Unheard).await?;
    if savepoint::tagged(owner.main_metadata(), name).is_some() {
        return Ok(());
    }
    tag_tables(owner, name, true).await
}

/// An owner makes a savepoint between two microbatches, and says so; nothing if it stands already.
pub(in crate::pipeline) async fn create_asked(
    owner: &mut Owner<'_>,
    name: &str,
) -> Result<Result<Option<String>, String>, Stop> {
    if !savepoint::is_name(name) {
        return Ok(Err(format!("{name:?} can not name a savepoint")));
    }
    if savepoint::tagged(owner.main_metadata(), name).is_some() {
        return Ok(Ok(None));
    }
    tag_tables(owner, name, false).await?;
    Ok(Ok(Some(format!("savepoint {name} was made of batch {}", owner.record.batch))))
}

fn taken(name: &str, batch: u64, options: &RunOptions) -> Stop {
    Stop::new(
        Reason::Usage,
        format!("savepoint {name} stands already, of batch {batch}"),
        format!(
            "nothing was changed; take another name, or drop that one first:\n  tidemill savepoint drop {} {name}",
            options.job_shown
        ),
    )
}

/// The stop where an owner took a request up and what was asked is not so.
fn not_done(name: &str, done: &str) -> Stop {
    Stop::new(
        Reason::Usage,
        format!("the owner of the table was asked, and savepoint {name} was not {done}"),
        "its log says why it refused, or somebody else was quicker; see what there is:\n  tidemill savepoint list JOB",
    )
}

async fn find_listed(loaded: &LoadedJob, options: &RunOptions, name: &str) -> Result<Option<Listed>, Stop> {
    let listing = list_savepoints(loaded, options).await?;
    Ok(listing.savepoints.into_iter().find(|found| found.name == name))
}

/// Tags the tables at the last commit, and gives them back if that is asked for. No microbatch is open, and no side table is
/// owed a file.
pub(in crate::pipeline) async fn tag_tables(
    owner: &mut Owner<'_>,
    name: &str,
    release: bool,
) -> Result<(), Stop> {
    let updates = updates_of(&owner.world.loaded.job)?;
    for role in roles(owner) {
        let strays = savepoint::strays(owner.main_metadata(), owner.side(role).metadata());
        let gone = strays.iter().filter(|stray| *stray != name).map(|stray| savepoint::tag(stray)).collect();
        change_side_tags(owner, role, &updates, vec![savepoint::tag(name)], gone).await?;
        crate::crash_point!("savepoint_side_tagged");
    }
    let what = format!("{name} at batch {}", owner.record.batch);
    let tagged = vec![savepoint::tag(name)];
    let upkeep = Upkeep::beyond(Beyond { updates, tagged, untagged: Vec::new(), back_to: None });
    let next = changed(owner, "savepoint create", what, release);
    owner.commit_with(next, upkeep).await?;
    crate::crash_point!("savepoint_main_tagged");
    Ok(())
}

/// The last record under a statement of what changes beside it.
fn changed(owner: &Owner<'_>, by: &str, what: String, released: bool) -> LedgerRecord {
    let change = Some(Change { by: by.to_owned(), what });
    LedgerRecord { kind: Kind::Change, released, jumps: Vec::new(), change, ..owner.record.clone() }
}

fn roles(owner: &Owner<'_>) -> Vec<Role> {
    owner.sides.keys().copied().collect()
}

/// Sets and takes tags of a side table, with its mark.
async fn change_side_tags(
    owner: &mut Owner<'_>,
    role: Role,
    updates: &Updates,
    tagged: Vec<String>,
    untagged: Vec<String>,
) -> Result<(), Stop> {
    let table = owner.side(role);
    let mark = side::inspect(table.metadata()).map_err(|error| of_ledger(table, error))?;
    let Some(mark) = mark.filter(|mark| mark.job_id == owner.record.job_id) else {
        return Err(Stop::new(
            Reason::OtherJob,
            format!("table {} follows another ledger now", table.identifier()),
            "nothing was changed on it; see which job writes to it, then give the command again",
        ));
    };
    let updates = updates.clone();
    let beyond = Beyond { updates, tagged, untagged, back_to: None };
    owner.keep_up_side(role, &mark, Upkeep::beyond(beyond)).await
}

/// The savepoint of this name, if it stands.
fn find(survey: &Survey, name: &str) -> Result<Option<Savepoint>, Stop> {
    let Some(main) = &survey.main else { return Ok(None) };
    let all = savepoint::of_main(main.metadata()).map_err(|error| of_ledger(main, error))?;
    Ok(all.into_iter().find(|found| found.name == name))
}

fn savepoint_on(main: &Table, name: &str) -> Result<Savepoint, Stop> {
    let all = savepoint::of_main(main.metadata()).map_err(|error| of_ledger(main, error))?;
    all.into_iter().find(|found| found.name == name).ok_or_else(|| {
        Stop::new(
            Reason::TableChanged,
            format!(
                "table {} does not show the tag of savepoint {name} that was set on it",
                main.identifier()
            ),
            "somebody took it away at once; nothing else was changed",
        )
    })
}

fn need(survey: &Survey, name: &str, options: &RunOptions) -> Result<Savepoint, Stop> {
    find(survey, name)?.ok_or_else(|| no_such(&survey.main_ident.to_string(), name, options))
}

fn no_such(table: &str, name: &str, options: &RunOptions) -> Stop {
    Stop::new(
        Reason::Usage,
        format!("table {table} has no savepoint {name}"),
        format!(
            "nothing was changed; to see which there are:\n  tidemill savepoint list {}",
            options.job_shown
        ),
    )
}

fn listed<'a>(
    job: &Job,
    found: &Savepoint,
    main: &Table,
    sides: impl Iterator<Item = &'a Table> + Clone,
) -> Listed {
    let (record, tag) = (&found.record, savepoint::tag(&found.name));
    let live = record.live();
    let sum = |partitions: &BTreeMap<i32, crate::commit::ledger::Cursor>| {
        partitions.values().map(|cursor| cursor.end.get()).sum::<i64>()
    };
    let mut tables = BTreeMap::from([(main.identifier().to_string(), Some(found.snapshot_id))]);
    for side in record.sides.values() {
        let table = sides.clone().find(|table| table.metadata().uuid() == side.uuid);
        let tagged = table.and_then(|table| table.metadata().snapshot_for_ref(&tag));
        tables.insert(side.table.clone(), tagged.map(|snapshot| snapshot.snapshot_id()));
    }
    Listed {
        name: found.name.clone(),
        made: EventTimeMs(found.made_ms).to_string(),
        batch: record.batch,
        watermark: live.watermark.map(|time| time.to_string()),
        next_offsets: live
            .topics
            .iter()
            .map(|(topic, partitions)| (topic.clone(), sum(partitions)))
            .collect(),
        topic_partitions: live.topics.values().map(BTreeMap::len).sum(),
        state_keys: record.dedup.keys,
        generation: record.dedup.generation.clone(),
        at_home: generation(&record.dedup).is_none_or(|named| dedup::is_at_home(&state_folder(job), &named)),
        tag,
        tables,
    }
}

/// Savepoints of a job. Asks the catalog alone and changes nothing.
///
/// # Errors
/// The catalog does not answer, there is no main table, or a record can not be read.
pub async fn list_savepoints(loaded: &LoadedJob, options: &RunOptions) -> Result<Listing, Stop> {
    let sink = &loaded.job.sink;
    let catalog = crate::catalog::connect(&sink.catalog).await.map_err(stops::catalog)?;
    let load = async |name: &[String]| {
        let ident = crate::sink::schema::table_ident(name).map_err(stops::schema)?;
        crate::catalog::load(&*catalog, &ident).await.map_err(stops::catalog)
    };
    let Some(main) = load(&sink.table).await? else {
        return Err(Stop::new(
            Reason::Usage,
            format!("there is no table {} yet", sink.table.join(".")),
            format!("tidemill run {}", options.job_shown),
        ));
    };
    let mut sides = Vec::new();
    for ident in side_idents(&loaded.job)?.values() {
        sides.extend(crate::catalog::load(&*catalog, ident).await.map_err(stops::catalog)?);
    }
    let found = savepoint::of_main(main.metadata()).map_err(|error| of_ledger(&main, error))?;
    Ok(Listing {
        table: main.identifier().to_string(),
        savepoints: found.iter().map(|found| listed(&loaded.job, found, &main, sides.iter())).collect(),
        strays: strays_of(&main, sides.iter()),
    })
}

/// Names of tags that a crash left on side tables alone.
fn strays_of<'a>(main: &Table, sides: impl Iterator<Item = &'a Table>) -> Vec<String> {
    let names: BTreeSet<String> =
        sides.flat_map(|side| savepoint::strays(main.metadata(), side.metadata())).collect();
    names.into_iter().collect()
}

/// Drops a savepoint, or what a crash left of one, or has it dropped by the owner that there is. Rows stay as they are.
///
/// # Errors
/// `USAGE`: there is none of this name. The [`Stop`] of the start table.
pub async fn drop_savepoint(
    loaded: &LoadedJob,
    options: &RunOptions,
    name: &str,
    confirm: Confirm<'_>,
    report: &mut dyn Report,
) -> Result<(), Stop> {
    let listing = list_savepoints(loaded, options).await?;
    if !listing.names(name) {
        return Err(no_such(&listing.table, name, options));
    }
    confirm(&format!(
        "drop savepoint {name} of table {}? Its rows can not be gone back to then",
        listing.table
    ))?;
    let ask = Ask::DropSavepoint { savepoint: name.to_owned() };
    let as_owner = async |_| drop_as_owner(loaded, options, name).await;
    let done = done_or_asked(loaded, options, &ask, report, async || Ok(()), as_owner).await?;
    // Side tables lose their tags after main: the savepoint is gone with main's.
    let stands = |listing: Listing| listing.savepoints.iter().any(|found| found.name == name);
    if done.is_none() && stands(list_savepoints(loaded, options).await?) {
        return Err(not_done(name, "dropped"));
    }
    Ok(())
}

async fn drop_as_owner(loaded: &LoadedJob, options: &RunOptions, name: &str) -> Result<(), Stop> {
    let prepared = prepare(loaded, options, Allow::default()).await?;
    need_record(&prepared, options)?;
    let (mut owner, _, _) = prepared.take(&BTreeMap::new()).await?;
    let dropped = drop_after_requests(&mut owner, name).await;
    owner.end(dropped).await
}

async fn drop_after_requests(owner: &mut Owner<'_>, name: &str) -> Result<(), Stop> {
    requests::take(owner, &mut Unheard).await?;
    drop_asked(owner, name).await.map(|_| ())
}

/// An owner drops a savepoint between two microbatches, and says so; nothing if it is gone already.
pub(in crate::pipeline) async fn drop_asked(
    owner: &mut Owner<'_>,
    name: &str,
) -> Result<Option<String>, Stop> {
    let strays = strays_of(&owner.main, owner.sides.values());
    let stands = savepoint::tagged(owner.main_metadata(), name).is_some();
    if !stands && !strays.iter().any(|stray| stray == name) {
        return Ok(None);
    }
    untag_tables(owner, name, stands, &strays).await?;
    Ok(Some(format!("savepoint {name} is dropped; rows stay as they are")))
}

async fn untag_tables(
    owner: &mut Owner<'_>,
    name: &str,
    stands: bool,
    strays: &[String],
) -> Result<(), Stop> {
    let updates = updates_of(&owner.world.loaded.job)?;
    if stands {
        let beyond = Beyond {
            updates: updates.clone(),
            tagged: Vec::new(),
            untagged: vec![savepoint::tag(name)],
            back_to: None,
        };
        let next = changed(owner, "savepoint drop", name.to_owned(), false);
        owner.commit_with(next, Upkeep::beyond(beyond)).await?;
        crate::crash_point!("savepoint_main_untagged");
    }
    let names: BTreeSet<&str> = strays.iter().map(String::as_str).chain([name]).collect();
    for role in roles(owner) {
        let metadata = owner.side(role).metadata();
        let tags = names.iter().map(|name| savepoint::tag(name));
        let gone: Vec<String> = tags.filter(|tag| metadata.snapshot_for_ref(tag).is_some()).collect();
        if !gone.is_empty() {
            change_side_tags(owner, role, &updates, Vec::new(), gone).await?;
            crate::crash_point!("savepoint_side_untagged");
        }
    }
    Ok(())
}

/// What a restore would do now. Asks the catalog and the broker, and changes nothing.
///
/// # Errors
/// As [`restore_savepoint`].
pub async fn look_at_restore(
    loaded: &LoadedJob,
    options: &RunOptions,
    name: &str,
) -> Result<Restoration, Stop> {
    let mut survey = Survey::take(&loaded.job, &plan_memory(loaded)?).await?;
    let Some(head) = survey.record().cloned() else {
        return Err(no_such(&survey.main_ident.to_string(), name, options));
    };
    plan(&mut survey, &head, loaded, options, name)
}

/// Goes back to a savepoint: rows, offsets and dedup state in one commit of main, then the side table.
///
/// # Errors
/// `USAGE`: there is no such savepoint. `TABLE_REPLACED`, `CLUSTER_CHANGED`, `TOPIC_CHANGED`, `KEY_SPEC_CHANGED`: it belongs
/// to other tables, topics or another key than the job has now. `BUSY`: a run is in progress.
pub async fn restore_savepoint(
    loaded: &LoadedJob,
    options: &RunOptions,
    name: &str,
    confirm: Confirm<'_>,
) -> Result<Restoration, Stop> {
    let again = format!("savepoint restore {} {name}", options.job_shown);
    // What is wrong with the present offsets, topics, key and side files does not matter to who leaves them. Of a list of
    // side files that is lost with the property, the fence would write that nothing is owed.
    let allow = Allow { rebase: true, rekey: true, lost_files: true, ..Allow::default() };
    let mut prepared = prepare(loaded, options, allow).await.map_err(|stop| beside_a_run(stop, &again))?;
    let head = need_record(&prepared, options)?;
    let restoration = plan(&mut prepared.survey, &head, loaded, options, name)?;
    confirm(&question(&restoration, &prepared.survey.main_ident.to_string()))?;
    let (mut owner, _, _) =
        prepared.take(&BTreeMap::new()).await.map_err(|stop| beside_a_run(stop, &again))?;
    let restored = go_back(&mut owner, name).await;
    owner.end(restored).await?;
    Ok(restoration)
}

fn question(restoration: &Restoration, table: &str) -> String {
    let Listed { name, made, batch, .. } = &restoration.savepoint;
    let notes: String = restoration.notes.iter().map(|note| format!("\n  {note}")).collect();
    format!(
        "take table {table} back from batch {} to batch {batch}, savepoint {name} of {made}? Rows that were written after \
         it, by whomever, leave the table, and their records are read again{notes}\ngo back?",
        restoration.batch_before
    )
}

/// What restoring would do, judged by the start table as if it were done.
fn plan(
    survey: &mut Survey,
    head: &LedgerRecord,
    loaded: &LoadedJob,
    options: &RunOptions,
    name: &str,
) -> Result<Restoration, Stop> {
    let found = need(survey, name, options)?;
    if found.record.job_id != head.job_id {
        return Err(Stop::new(
            Reason::OtherJob,
            format!(
                "savepoint {name} is of job {}, and the ledger of job {}",
                found.record.job_id, head.job_id
            ),
            "nothing was changed; it can not be gone back to",
        ));
    }
    for (role, side) in &survey.sides {
        if found.record.sides.contains_key(role.name()) && savepoint::tagged(side.metadata(), name).is_none()
        {
            return Err(without_tag(side, name));
        }
    }
    let target = restored(head, &found.record, name);
    let before = std::mem::replace(&mut survey.found, Found::Record(Box::new(target.clone())));
    let judged = judge(survey, &loaded.job, options, Allow { loss: true, ..Allow::default() });
    let strict = judge(survey, &loaded.job, options, Allow::default());
    survey.found = before;
    judged.map_err(|stop| Stop {
        way_out: format!(
            "nothing was changed: savepoint {name} belongs to what was there when it was made; put that back (the fields of \
             the job, the table, the topic), then:\n  tidemill savepoint restore {} {name}",
            options.job_shown
        ),
        ..stop
    })?;
    let main = survey.main.as_ref().expect("a savepoint stands on a table");
    let savepoint = listed(&loaded.job, &found, main, survey.sides.values());
    let mut notes = Vec::new();
    if let Err(lost) = strict {
        notes.push(format!(
            "{}: the next run will stop {} and name the command that goes on without these records",
            lost.what,
            lost.reason.name()
        ));
    }
    if !savepoint.at_home {
        notes.push(format!(
            "the dedup state of the savepoint is not in {}: the next run makes it again, from a copy or from the table",
            state_folder(&loaded.job).display()
        ));
    }
    let erased = |record: &LedgerRecord| record.suppressed.as_ref().map_or(0, |known| known.rows);
    if erased(head) > erased(&found.record) {
        notes.push(format!(
            "{} keys were erased after the savepoint: rows of theirs that it has come back, and they do not stay seen; name \
             them again (state forget) and delete the rows again",
            erased(head) - erased(&found.record)
        ));
    }
    Ok(Restoration { savepoint, batch_before: head.batch, jumps: target.jumps, notes })
}

/// The record of a savepoint as it becomes the last one: all of it but who may commit, with the offsets that jump back.
/// Side tables are to follow before anything else.
fn restored(head: &LedgerRecord, then: &LedgerRecord, name: &str) -> LedgerRecord {
    let mut next = then.clone();
    let mut jumps = Vec::new();
    let lane = next.lanes.entry(LIVE_LANE.to_owned()).or_default();
    for (topic, partitions) in &head.live().topics {
        for (partition, cursor) in partitions {
            let Some(known) = lane.topics.get(topic).and_then(|known| known.get(partition)) else { continue };
            if known.end != cursor.end {
                let (topic, old_end, reason) =
                    (topic.clone(), Some(cursor.end), format!("savepoint restore {name}"));
                jumps.push(Jump { topic, partition: *partition, old_end, new_start: known.end, reason });
            }
        }
    }
    for (role, side) in &head.sides {
        // A table that joined the job later is known, and goes back to how it joined.
        next.sides.entry(role.clone()).or_insert_with(|| side.clone());
    }
    for side in next.sides.values_mut() {
        // It was settled before it was tagged.
        (side.owed, side.files) = (false, None);
    }
    LedgerRecord {
        kind: Kind::Jump,
        epoch: head.epoch,
        sequence: head.sequence,
        owner: head.owner,
        lease_until_ms: head.lease_until_ms,
        released: false,
        sides_back_to: Some(then.batch),
        timelines: head.timelines_from(then.batch),
        restored_from: Some(name.to_owned()),
        batch_generation: then.batch_generation.clone(),
        jumps,
        ..next
    }
}

/// The commit that goes back, and the side table after it. The savepoint is looked up again on the head that was fenced.
async fn go_back(owner: &mut Owner<'_>, name: &str) -> Result<(), Stop> {
    let found = savepoint_on(&owner.main, name)?;
    let next = restored(&owner.record, &found.record, name);
    let mut upkeep = back_to(&owner.world.loaded.job, found.snapshot_id)?;
    upkeep.summary.insert(SUMMARY_RESTORED.to_owned(), name.to_owned());
    crate::crash_point!("savepoint_to_restore");
    owner.commit_with(next, upkeep).await?;
    crate::crash_point!("savepoint_main_restored");
    owner.set_sides_back().await?;
    crate::crash_point!("savepoint_sides_restored");
    Ok(())
}

/// Going back to an earlier snapshot, of whichever table, as an overwrite.
pub(in crate::pipeline) fn back_to(job: &Job, snapshot_id: i64) -> Result<Upkeep, Stop> {
    let (tagged, untagged, back_to) = (Vec::new(), Vec::new(), Some(snapshot_id));
    Ok(Upkeep::beyond(Beyond { updates: updates_of(job)?, tagged, untagged, back_to }))
}

/// The stop where a side table of a savepoint has lost its tag.
fn without_tag(side: &Table, name: &str) -> Stop {
    let tag = savepoint::tag(name);
    Stop::new(
        Reason::SideNotRestorable,
        format!("side table {} has no tag of savepoint {name}", side.identifier()),
        format!(
            "nothing was changed; set tag {tag} on its snapshot of that moment with your engine, then:\n  \
             tidemill savepoint restore JOB {name}"
        ),
    )
}
