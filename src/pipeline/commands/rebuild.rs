//! `state rebuild`: the state made again, from the files that are whole and from the table.

use super::{AtWork, Done, Restored, need_record};
use crate::dedup::{self, VerifyReport};
use crate::job::file::LoadedJob;
use crate::pipeline::owner::prepare;
use crate::pipeline::rebuild::{Restoring, restore};
use crate::pipeline::report::Report;
use crate::pipeline::survey::state_folder;
use crate::pipeline::{RunOptions, stops};
use crate::protocol::generation;
use crate::protocol::start::Allow;
use crate::stop::Stop;

/// Reads every page of the state that the ledger names; if one is wrong or missing, or `all` is asked for, makes the state
/// again: buckets that are whole from the folder (none of them with `all`), the others from the table. Nothing is
/// committed if the state is whole.
///
/// # Errors
/// The [`Stop`] of the start table, or `MISSING_KEYS` if the table lacks rows that the ledger counts.
pub async fn rebuild_state(
    loaded: &LoadedJob,
    options: &RunOptions,
    all: bool,
    report: &mut dyn Report,
) -> Result<Done, Stop> {
    let prepared = prepare(loaded, options, Allow::default()).await?;
    let record = need_record(&prepared, options)?;
    let table = prepared.survey.main_ident.to_string();
    let done = |changed, state, note: String| Done {
        command: "state rebuild",
        table: table.clone(),
        changed,
        state,
        notes: vec![note],
    };
    let folder = state_folder(&loaded.job);
    let verified = match generation(&record.dedup) {
        None if !record.lacks_generation() => Some(VerifyReport::default()),
        None => None,
        Some(named) => match dedup::verify(&folder, &named) {
            Ok(verified) => Some(verified),
            Err(error) if error.is_rebuildable() => {
                tracing::info!(%error, "the state is to be rebuilt");
                None
            }
            Err(error) => return Err(stops::state(&folder, error)),
        },
    };
    if let Some(verified) = verified.filter(|_| !all) {
        let state = Restored {
            keys: verified.keys,
            keys_kept: verified.keys,
            buckets: record.buckets.len() as u64,
            ..Restored::default()
        };
        let note = format!(
            "the state is whole: {} keys in {} segments, every page read; nothing was changed",
            verified.keys, verified.segments
        );
        return Ok(done(false, state, note));
    }
    let starts = prepared.survey.starts(&loaded.job, Some(&record))?;
    let mut work = AtWork::take(prepared, &starts).await?;
    let restoring = Restoring { by: "state rebuild", salvage: !all, release: true };
    let record = work.owner.record.clone();
    let restored = restore(&mut work.owner, record, &work.keys, &work.memory, restoring, report).await;
    let restored = work.end(restored).await?;
    let note = format!("rebuilt the dedup state: {}", restored.in_words());
    Ok(done(true, restored, note))
}
