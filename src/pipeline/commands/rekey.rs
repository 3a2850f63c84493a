//! `state rekey`: the state made again from the rows of the table under another definition of the key.
//!
//! Rows that share a key under the new definition stay in the table as they are: from now on they count as one key.

use super::{AtWork, Confirm, Done, need_record};
use crate::commit::ledger::LedgerRecord;
use crate::dedup::{self, FLOOR_BUCKETS};
use crate::event_time::EventTimeMs;
use crate::job::file::LoadedJob;
use crate::pipeline::RunOptions;
use crate::pipeline::owner::{Owner, prepare};
use crate::pipeline::rebuild::{Restoring, restore};
use crate::pipeline::report::Report;
use crate::pipeline::survey::key_encoder;
use crate::protocol::start::Allow;
use crate::sink::scan::rows_of;
use crate::stop::{Reason, Stop};

const REKEY: &str = "state rekey";

/// Makes the state again under the key of the job, with the keys of all rows of the window.
///
/// # Errors
/// `USAGE` if the key is the ledger's; `KEY_SPEC_CHANGED` if a row has no value in a key column; the [`Stop`] of the start
/// table.
pub async fn rekey_state(
    loaded: &LoadedJob,
    options: &RunOptions,
    confirm: Confirm<'_>,
    report: &mut dyn Report,
) -> Result<Done, Stop> {
    let replay = loaded.job.sink.replays();
    let allow = Allow { rekey: true, replay, ..Allow::default() };
    let prepared = prepare(loaded, options, allow).await?;
    let record = need_record(&prepared, options)?;
    let (job, table) = (&loaded.job, prepared.survey.main_ident.to_string());
    let encoder = key_encoder(&prepared.decoder.schema(), job, record.dedup.seed)?;
    let key_spec_hash = encoder.key_spec_hash(job.dedup.shards, &job.bucket_source(), job.dedup.repeats);
    if key_spec_hash == record.dedup.key_spec_hash {
        return Err(Stop::new(
            Reason::Usage,
            format!("the key of this job is the one of the ledger of {table}: there is nothing to rekey"),
            format!("nothing was changed:\n  tidemill run {}", options.job_shown),
        ));
    }
    confirm(&format!(
        "make the dedup state of {table} again with the key ({}), from its {} rows?",
        job.dedup.key.join(", "),
        prepared.survey.tables_with_keys().map(rows_of).fold(0, u64::saturating_add)
    ))?;
    let erased = record.suppressed.as_ref().map_or(0, |suppressed| suppressed.rows);
    let starts = prepared.survey.starts(job, Some(&record))?;
    let mut work = AtWork::take(prepared, &starts).await?;
    let rekeyed = rekeyed(&work.owner, key_spec_hash);
    let restoring = Restoring { by: REKEY, salvage: false, release: true };
    let result = restore(&mut work.owner, rekeyed, &work.keys, &work.memory, restoring, report).await;
    let state = work.end(result.map_err(|stop| without_key(stop, options))).await?;
    let mut notes = vec![format!("the state has the new key: {}", state.in_words())];
    if state.repeats > 0 {
        notes.push(format!(
            "{} rows have a key of another row under the new definition; they stay in the table as they are",
            state.repeats
        ));
    }
    if erased > 0 {
        notes.push(format!(
            "{erased} erased keys were named under the old key and do not count under the new one: name them again with \
             tidemill state forget"
        ));
    }
    Ok(Done { command: REKEY, table, changed: true, state, notes })
}

/// The last record with the new key and no state.
fn rekeyed(owner: &Owner<'_>, key_spec_hash: String) -> LedgerRecord {
    let (mut next, job) = (owner.record.clone(), &owner.world.loaded.job);
    let width_ms = dedup::bucket_width_ms(job.dedup.window, job.dedup.repeats);
    let window_ms = i64::try_from(job.dedup.window.as_millis()).unwrap_or(i64::MAX);
    let begin = next.live().watermark.map(|watermark| {
        EventTimeMs(watermark.minus_ms(window_ms).0.div_euclid(width_ms).saturating_mul(width_ms))
    });
    let dedup = &mut next.dedup;
    (dedup.key_spec_hash, dedup.shards, dedup.repeats) = (key_spec_hash, job.dedup.shards, job.dedup.repeats);
    (dedup.bucket_width_ms, dedup.eras) = (width_ms, Vec::new());
    dedup.floor = begin.map(|begin| begin.minus_ms(width_ms.saturating_mul(FLOOR_BUCKETS)));
    dedup.complete_since = begin;
    (dedup.keys, dedup.digest) = (0, String::new());
    next.buckets.clear();
    if let Some(suppressed) = &mut next.suppressed {
        suppressed.rows = 0;
    }
    if let Some(others) = &mut next.others {
        others.buckets.clear();
    }
    next
}

/// A rebuild blames whoever changed rows; here it is the key that asks for a column which old rows lack.
fn without_key(stop: Stop, options: &RunOptions) -> Stop {
    if stop.reason != Reason::MissingKeys {
        return stop;
    }
    Stop {
        reason: Reason::KeySpecChanged,
        way_out: format!(
            "the ledger still has the old key, and nothing else was changed; take key columns that every row has, then:\n  \
             tidemill state rekey {job}\nor set [dedup] back as it was:\n  tidemill run {job}",
            job = options.job_shown
        ),
        ..stop
    }
}
