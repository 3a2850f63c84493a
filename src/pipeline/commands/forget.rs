//! `state forget`: keys that stay seen although their rows are erased.
//!
//! A row that another engine deletes is not forgotten while the state lives; a rebuild would forget it, and its event, sent
//! again, would come in. So before rows are erased their keys are named here: they go into the table of erased keys,
//! which every rebuild reads beside the main table, and the ledger counts them like any other key.
//!
//! Order: keys are looked up for their event time (in the table, while their rows stand there) -> those that the state lacks
//! are added to it -> rows of the table of erased keys, durable and committed -> the ledger names that table and the new
//! generation. A crash before the last leaves rows that no ledger counts; given again, the command adds them a second time,
//! and a fingerprint that stands twice counts once.
//!
//! Bounds: at most [`KEYS_MAX`] keys at once, about 100 bytes each; one scan of the key columns of the table, unless every
//! key comes with its event time.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arrow::array::{ArrayRef, FixedSizeBinaryArray, RecordBatch, StringArray};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Field, Schema};
use iceberg::spec::TableMetadata;
use serde_json::{Map, Value};
use uuid::Uuid;

use super::{AtWork, Confirm, Done, Restored, need_record, open_named};
use crate::commit::ledger::{Change, Kind, LedgerRecord, Suppressed};
use crate::commit::side::SideError;
use crate::dedup::{GenerationName, Key};
use crate::event_time::EventTimeMs;
use crate::fingerprint::Fingerprint;
use crate::job::file::LoadedJob;
use crate::job::{BucketFrom, Job};
use crate::pipeline::keys::{KeyMaker, optional_event_times};
use crate::pipeline::owner::{Owner, prepare};
use crate::pipeline::rebuild::{commit_change, ours, read_keys, suppressed_ident, suppressed_table};
use crate::pipeline::report::Report;
use crate::pipeline::state::facts;
use crate::pipeline::survey::{refuse_differences, state_folder};
use crate::pipeline::{RunOptions, stops};
use crate::protocol::start::Allow;
use crate::protocol::stops::{Committing, side};
use crate::protocol::switch::switch;
use crate::protocol::{Request, name_generation};
use crate::sink::schema;
use crate::sink::suppressed::{self, ErasedKey};
use crate::sink::writer::{TableWriter, WriteError};
use crate::stop::{Reason, Stop};

const FORGET: &str = "state forget";
/// Most keys of one command.
const KEYS_MAX: usize = 1_000_000;
/// Most lines that a stop names.
const LINES_SHOWN_MAX: usize = 5;
/// Memory of the one data file that a command writes.
const WRITER_BYTES: u64 = 64 << 20;

/// A key that is to be erased, and when its event happened, if the line or its id says so.
#[derive(Debug, Clone, Copy)]
struct Named {
    line: usize,
    fingerprint: Fingerprint,
    event_time: Option<EventTimeMs>,
}

/// Lets keys stay seen when their rows are gone. `text` has a JSON object a line: a member for each key column, and the
/// event time, if the row is gone already.
///
/// # Errors
/// `USAGE` names the lines that are no key, or whose event time is not known; the [`Stop`] of the start table.
pub async fn forget_keys(
    loaded: &LoadedJob,
    options: &RunOptions,
    text: &str,
    confirm: Confirm<'_>,
    report: &mut dyn Report,
) -> Result<Done, Stop> {
    let prepared = prepare(loaded, options, Allow::default()).await?;
    need_record(&prepared, options)?;
    let table = prepared.survey.main_ident.to_string();
    let rows = batch_of(text, &prepared.decoder.schema(), &loaded.job)?;
    let keys = rows.num_rows();
    confirm(&format!(
        "let {keys} keys of table {table} stay seen for good, also when their rows are deleted?"
    ))?;
    let starts = prepared.survey.starts(&loaded.job, prepared.record.as_ref())?;
    let mut work = AtWork::take(prepared, &starts).await?;
    let result = forget(&mut work, &rows, report).await;
    let (state, suppressed, new) = work.end(result).await?;
    let notes = vec![
        format!(
            "{keys} keys stay seen; table {} has them; {new} of them were not in the state",
            suppressed.table
        ),
        format!("the rows themselves are as they were: delete them from {table} with your engine"),
    ];
    Ok(Done { command: FORGET, table, changed: true, state, notes })
}

/// Gives the state, the table of erased keys, and how many keys are new to the state.
async fn forget(
    work: &mut AtWork<'_>,
    rows: &RecordBatch,
    report: &mut dyn Report,
) -> Result<(Restored, Suppressed, u64), Stop> {
    let AtWork { owner, keys, memory, begun } = work;
    let folder = state_folder(&owner.world.loaded.job);
    let of_state = |error| stops::state(&folder, error);
    let mut named = named(keys, rows, &owner.world.loaded.job)?;
    let mut state = Restored::default();
    if named.iter().any(|key| key.event_time.is_none()) {
        let mut wanted: HashMap<Fingerprint, Option<EventTimeMs>> =
            named.iter().map(|key| (key.fingerprint, None)).collect();
        let which = ours(&owner.record);
        let mut note = |found: &[Key]| {
            for key in found {
                if let Some(time) = wanted.get_mut(&key.fingerprint) {
                    *time = Some(key.event_time);
                }
            }
            Ok(())
        };
        state.rows_read = read_keys(owner, keys, memory, which, None, report, &mut note).await?.rows;
        for key in &mut named {
            // What the table says is when the event happened.
            key.event_time = wanted[&key.fingerprint].or(key.event_time);
        }
    }
    refuse_unknown_times(&named)?;
    let keys_named: Vec<Key> = named
        .iter()
        .filter_map(|key| Some(Key { fingerprint: key.fingerprint, event_time: key.event_time? }))
        .collect();
    let mut store = open_named(owner, keys, memory, report).await?;
    let since = store.complete_since();
    let live: Vec<Key> = keys_named.iter().filter(|key| key.event_time >= since).copied().collect();
    store.probe(&live).map_err(of_state)?;
    let erased = |key: &Key| {
        let bucket = store.bucket_of(key.event_time);
        let after = EventTimeMs(key.event_time.0.saturating_add(1));
        let (bucket_from, bucket_to) =
            bucket.map_or((key.event_time, after), |bucket| (bucket.from, bucket.to));
        ErasedKey { fingerprint: key.fingerprint, bucket_from, bucket_to }
    };
    let erased: Vec<ErasedKey> = keys_named.iter().map(erased).collect();
    let suppressed = append(owner, &erased).await?;
    let mut next = LedgerRecord { suppressed: Some(suppressed.clone()), ..owner.record.clone() };
    let new = store.stats().pending_keys;
    if new > 0 {
        let name = GenerationName::new(owner.record.epoch, owner.record.batch, Uuid::now_v7());
        let generation = store.prepare(name).map_err(of_state)?;
        name_generation(&mut next, facts(&store, generation));
    }
    (state.keys, state.buckets) = (store.stats().keys, store.buckets().len() as u64);
    state.seconds = begun.elapsed().as_secs_f64();
    let what = format!("{} keys stay seen without their rows", named.len());
    commit_change(owner, next, Change { by: FORGET.to_owned(), what }, true).await?;
    Ok((state, suppressed, new))
}

fn refuse_unknown_times(named: &[Named]) -> Result<(), Stop> {
    let unknown: Vec<usize> =
        named.iter().filter(|key| key.event_time.is_none()).map(|key| key.line).collect();
    if unknown.is_empty() {
        return Ok(());
    }
    let what = "have no row in the table and do not say their event time";
    Err(bad_lines(
        &unknown,
        what,
        "name keys before their rows are deleted, or add the event time to these lines",
    ))
}

/// The stop for lines of the input; values are not shown, for they may be a person's.
fn bad_lines(lines: &[usize], what: &str, way_out: &str) -> Stop {
    let shown: Vec<String> = lines.iter().take(LINES_SHOWN_MAX).map(usize::to_string).collect();
    let more = if lines.len() > LINES_SHOWN_MAX { ", ..." } else { "" };
    let what = format!("{} keys {what}: lines {}{more}", lines.len(), shown.join(", "));
    Stop::new(Reason::Usage, what, format!("nothing was changed; {way_out}, then give the command again"))
}

/// The rows of the input with their fingerprints and times.
fn named(keys: &KeyMaker, rows: &RecordBatch, job: &Job) -> Result<Vec<Named>, Stop> {
    let fingerprints = keys.fingerprints(rows)?;
    let times = match keys.id_times(rows)? {
        Some(times) => {
            let without = lines_where(times.len(), |row| times[row].is_none());
            if !without.is_empty() {
                return Err(bad_lines(&without, "are no ids that tell their time", "mend these lines"));
            }
            times
        }
        None => optional_event_times(rows, &job.event_time.column),
    };
    let named = fingerprints.into_iter().zip(times).enumerate();
    Ok(named
        .map(|(row, (fingerprint, event_time))| Named { line: row + 1, fingerprint, event_time })
        .collect())
}

/// Lines, counted from 1, of the rows where something holds.
fn lines_where(rows: usize, holds: impl Fn(usize) -> bool) -> Vec<usize> {
    (0..rows).filter(|&row| holds(row)).map(|row| row + 1).collect()
}

/// The lines of the input as rows of the key columns and, where events tell their time by a column, of that column.
fn batch_of(text: &str, decoded: &Schema, job: &Job) -> Result<RecordBatch, Stop> {
    let by_event_time = job.dedup.bucket_from == BucketFrom::EventTime;
    let time_column = by_event_time.then_some(job.event_time.column.as_str());
    let mut columns: Vec<&str> = job.dedup.key.iter().map(String::as_str).collect();
    columns.extend(time_column.filter(|column| !job.dedup.key.iter().any(|key| key == column)));
    let objects: Vec<Map<String, Value>> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| serde_json::from_str(line).unwrap_or_default())
        .collect();
    if objects.is_empty() || objects.len() > KEYS_MAX {
        let what = format!("{} keys were named, and 1 to {KEYS_MAX} can be at once", objects.len());
        return Err(Stop::new(Reason::Usage, what, "nothing was changed; name keys, one JSON object a line"));
    }
    let bad = lines_where(objects.len(), |row| {
        let object = &objects[row];
        let whole = job.dedup.key.iter().all(|column| text_of(object.get(column)).is_some());
        !whole || !object.keys().all(|name| columns.contains(&name.as_str()))
    });
    if !bad.is_empty() {
        let time =
            time_column.map_or(String::new(), |column| format!(" and, if its row is gone already, {column}"));
        let way_out = format!("write one JSON object a line with {}{time}", job.dedup.key.join(", "));
        return Err(bad_lines(&bad, "are not named by a JSON object of the key columns", &way_out));
    }
    let unexpected = |what: String| Stop::new(Reason::Unexpected, what, "please report this");
    let (mut fields, mut arrays) = (Vec::new(), Vec::new());
    for column in columns {
        let of = decoded.field_with_name(column).map_err(|error| unexpected(error.to_string()))?.data_type();
        let texts = objects.iter().map(|object| text_of(object.get(column))).collect();
        arrays.push(typed(column, texts, of)?);
        fields.push(Field::new(column, of.clone(), true));
    }
    RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays).map_err(|error| unexpected(error.to_string()))
}

fn text_of(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// Values as the table's type; those that are none are named by their lines.
fn typed(column: &str, texts: Vec<Option<String>>, of: &DataType) -> Result<ArrayRef, Stop> {
    let what = format!("have a value in column {column} that is no {of}");
    let refuse = |bad: Vec<usize>| match bad.is_empty() {
        true => Ok(()),
        false => Err(bad_lines(&bad, &what, "mend these lines")),
    };
    let unnameable = |error| {
        Stop::new(Reason::Usage, format!("keys of type {of} can not be named as text"), "nothing was changed")
            .because(error)
    };
    if let DataType::FixedSizeBinary(16) = of {
        let id = |text: &Option<String>| Uuid::parse_str(text.as_ref()?).ok().map(Uuid::into_bytes);
        let ids: Vec<Option<[u8; 16]>> = texts.iter().map(id).collect();
        refuse(lines_where(ids.len(), |row| ids[row].is_none()))?;
        let array = FixedSizeBinaryArray::try_from_sparse_iter_with_size(ids.into_iter(), 16);
        return Ok(Arc::new(array.map_err(unnameable)?));
    }
    let given: Vec<bool> = texts.iter().map(Option::is_some).collect();
    let array: ArrayRef = Arc::new(StringArray::from(texts));
    let cast = cast_with_options(&array, of, &CastOptions::default()).map_err(unnameable)?;
    refuse(lines_where(given.len(), |row| given[row] && cast.is_null(row)))?;
    Ok(cast)
}

/// Rows of the table of erased keys, committed. The table is made if it is not there.
async fn append(owner: &mut Owner<'_>, erased: &[ErasedKey]) -> Result<Suppressed, Stop> {
    let (world, record) = (&owner.world, &owner.record);
    let (job, catalog) = (&world.loaded.job, &*world.tables.catalog);
    let table = match &record.suppressed {
        Some(known) => suppressed_table(catalog, known, &world.options.job_shown).await?,
        None => {
            let ident = suppressed_ident(job)?;
            let table = schema::create_suppressed(catalog, &ident).await.map_err(stops::schema)?;
            refuse_differences(&ident, &schema::compare_suppressed(&table).map_err(stops::schema)?, job)?;
            table
        }
    };
    let ident = table.identifier().clone();
    let unwritten = |error: WriteError| {
        stops::data(format!("data files of table {ident} can not be written"), error.reason(), error)
    };
    let attempt = Uuid::now_v7();
    let rows = suppressed::rows(erased, &record.dedup.key_spec_hash)
        .map_err(|error| Stop::new(Reason::Unexpected, error.to_string(), "please report this"))?;
    let mut writer = TableWriter::new(&table, attempt, WRITER_BYTES, &[]).map_err(unwritten)?;
    writer.write(&rows).await.map_err(unwritten)?;
    let request = Request {
        table: ident.clone(),
        table_uuid: table.metadata().uuid(),
        attempt,
        files: writer.finish().await.map_err(unwritten)?,
        summary: BTreeMap::from([
            ("tidemill.attempt".to_owned(), attempt.to_string()),
            ("tidemill.job-id".to_owned(), record.job_id.to_string()),
        ]),
        properties: BTreeMap::new(),
        back_to: None,
        properties_removed: Vec::new(),
        upkeep: None,
    };
    // On any head: rows of fingerprints are a set, and whoever else appends is this job too.
    let anything = |_: &TableMetadata| Ok(());
    let (epoch, job_shown) = (record.epoch, world.options.job_shown.as_str());
    let committing = Committing { epoch, owner: record.owner, owned: true, kind: Kind::Change, job_shown };
    switch(&world.tables, &request, &anything, &|| {})
        .await
        .map_err(|source| side(SideError::Switch { table: ident.to_string(), source }, committing))?;
    let before = record.suppressed.as_ref().map_or(0, |known| known.rows);
    Ok(Suppressed { table: ident.to_string(), uuid: request.table_uuid, rows: before + erased.len() as u64 })
}
