//! `watermark set`: the live lane's watermark at another time, and the buckets that the window then reaches.
//!
//! For a clock that ran ahead and pushed the watermark: the watermark goes back, the largest event time of each topic
//! partition is capped, or the next batch would push it again, and buckets that expired wrongly are live again: from
//! disk while they are in their grace, else from the table. The open bucket before all others is not needed for it.

use super::{AtWork, Confirm, Done, Restored, need_record, open_named};
use crate::commit::ledger::{Change, LIVE_LANE};
use crate::dedup::GenerationName;
use crate::event_time::EventTimeMs;
use crate::job::file::LoadedJob;
use crate::pipeline::owner::prepare;
use crate::pipeline::rebuild::{begin_in_words, commit_change, load};
use crate::pipeline::report::Report;
use crate::pipeline::state::facts;
use crate::pipeline::survey::state_folder;
use crate::pipeline::{RunOptions, stops};
use crate::protocol::name_generation;
use crate::protocol::start::Allow;
use crate::stop::Stop;

const SET: &str = "watermark set";

/// Sets the watermark of the live lane.
///
/// # Errors
/// The [`Stop`] of the start table; what opening or rebuilding the state can end with.
pub async fn set_watermark(
    loaded: &LoadedJob,
    options: &RunOptions,
    to: EventTimeMs,
    confirm: Confirm<'_>,
    report: &mut dyn Report,
) -> Result<Done, Stop> {
    let prepared = prepare(loaded, options, Allow::default()).await?;
    let record = need_record(&prepared, options)?;
    let table = prepared.survey.main_ident.to_string();
    let before = record.live().watermark.map_or("none".to_owned(), |time| time.to_string());
    confirm(&format!("set the watermark of {table} from {before} to {to}?"))?;
    let starts = prepared.survey.starts(&loaded.job, Some(&record))?;
    let mut work = AtWork::take(prepared, &starts).await?;
    let result = set(&mut work, to, &before, report).await;
    let (state, note) = work.end(result).await?;
    Ok(Done { command: SET, table, changed: true, state, notes: vec![note] })
}

async fn set(
    work: &mut AtWork<'_>,
    to: EventTimeMs,
    before: &str,
    report: &mut dyn Report,
) -> Result<(Restored, String), Stop> {
    let AtWork { owner, keys, memory, begun } = work;
    let job = &owner.world.loaded.job;
    let folder = state_folder(job);
    let of_state = |error| stops::state(&folder, error);
    let mut store = open_named(owner, keys, memory, report).await?;
    let window_ms = i64::try_from(job.dedup.window.as_millis()).unwrap_or(i64::MAX);
    let delay_ms = i64::try_from(job.event_time.watermark_delay.as_millis()).unwrap_or(i64::MAX);
    let buckets_before = store.buckets().len();
    let mut state = Restored::default();
    let since = store.bucket_begin(to.minus_ms(window_ms));
    let mut named = None;
    if since < store.complete_since() {
        let slices = store.missing_since(since);
        let (loan, read) = load(owner, keys, memory, &store, &slices, report).await?;
        state.rows_read = read.rows;
        store.adopt(loan, since);
        let name = GenerationName::new(owner.record.epoch, owner.record.batch, uuid::Uuid::now_v7());
        named = Some(store.prepare(name).map_err(of_state)?);
    }
    let mut next = owner.record.clone();
    if let Some(named) = &named {
        name_generation(&mut next, facts(&store, named.clone()));
    }
    let largest = EventTimeMs(to.0.saturating_add(delay_ms));
    let lane = next.lanes.entry(LIVE_LANE.to_owned()).or_default();
    lane.watermark = Some(to);
    for cursor in lane.topics.values_mut().flat_map(|partitions| partitions.values_mut()) {
        cursor.max_event_time = cursor.max_event_time.map(|time| time.min(largest));
    }
    (state.keys, state.buckets) = (store.stats().keys, store.buckets().len() as u64);
    state.buckets_read = state.buckets.saturating_sub(buckets_before as u64);
    state.seconds = begun.elapsed().as_secs_f64();
    let mut what = format!("the watermark was {before} and is {to}");
    if named.is_some() {
        what = format!(
            "{what}; the state is complete again since {}, with {} buckets more ({} rows read)",
            begin_in_words(since),
            state.buckets_read,
            state.rows_read
        );
    }
    let change = Change { by: SET.to_owned(), what: what.clone() };
    commit_change(owner, next, change, true).await?;
    Ok((state, what))
}
