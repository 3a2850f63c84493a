//! `tidemill state`: a look at the local dedup state, what it costs, and its removal.

/// Prints a line. A reader that went away is no error of ours.
macro_rules! say {
    ($($word:tt)*) => {{
        use std::io::Write;
        _ = writeln!(std::io::stdout(), $($word)*);
    }};
}

mod files;
mod plan;

use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::plan::table;
use super::{JobArgs, confirm, terminal};
use crate::commit::lock::{LockError, StateLock};
use crate::dedup::{self, GenerationRef, StoreError, VerifyReport};
use crate::pipeline::{stops, survey};
use crate::stop::{Reason, Stop};

pub(crate) use plan::{PlanArgs, plan};

/// `state inspect`.
#[derive(Debug, Clone, Args)]
pub(crate) struct InspectArgs {
    /// Job files, whose generations are listed; state folders; or files of a state folder, whose content is printed
    #[arg(value_name = "JOB|FILE", required = true)]
    paths: Vec<PathBuf>,
    /// Read every page of a segment and check it, as `state verify` does for a whole generation
    #[arg(long)]
    pages: bool,
    /// Set a field of the job: `--set state_dir=/mnt/state`
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

/// Lists the generations of jobs and folders, and prints what files say. Goes on after a damaged file; the end is that of
/// the highest exit code.
pub fn inspect(args: &InspectArgs, json: bool) -> Result<(), Stop> {
    let mut worst: Option<Stop> = None;
    for path in &args.paths {
        let looked = if path.is_dir() {
            list(path, json)
        } else if path.extension().is_some_and(|ending| ending == "toml") && !dedup::is_state_file(path) {
            let job = JobArgs { job: path.clone(), sets: args.sets.clone() };
            let listed = job.load().and_then(|loaded| list(&survey::state_folder(&loaded.job), json));
            listed.map_err(|stop| stop.for_job(&job.shown()))
        } else {
            files::show(path, args.pages, json)
        };
        let Err(stop) = looked else { continue };
        let is_worse = |worst: &Stop| stop.reason.exit_code() > worst.reason.exit_code();
        if worst.as_ref().is_none_or(is_worse) {
            if let Some(milder) = worst.replace(stop) {
                terminal::print_stop(&milder, json);
            }
        } else {
            terminal::print_stop(&stop, json);
        }
    }
    worst.map_or(Ok(()), Err)
}

/// Lists generations.
fn list(folder: &Path, json: bool) -> Result<(), Stop> {
    let generations = dedup::list_generations(folder, None).map_err(|error| stops::state(folder, error))?;
    if json {
        let listed: Vec<_> = generations
            .iter()
            .map(|found| {
                serde_json::json!({
                    "name": found.reference.name, "checksum": found.reference.checksum, "keys": found.keys,
                    "segment_bytes": found.segment_bytes, "key_spec_hash": found.key_spec_hash,
                    "complete_since": since(found), "buckets": found.buckets, "grace_keys": found.grace_keys,
                })
            })
            .collect();
        terminal::print_json(
            &serde_json::json!({ "event": "state", "folder": folder, "generations": listed }),
        );
        return Ok(());
    }
    if generations.is_empty() {
        say!("no dedup state in {}", folder.display());
        return Ok(());
    }
    let mut table =
        table(["generation", "keys", "bytes", "buckets", "complete since", "keys in their grace"]);
    for generation in &generations {
        table.add_row([
            generation.reference.name.to_string(),
            generation.keys.to_string(),
            generation.segment_bytes.to_string(),
            generation.buckets.to_string(),
            since(generation).unwrap_or_else(|| "ever".to_owned()),
            generation.grace_keys.to_string(),
        ]);
    }
    say!("{}\n{table}", folder.display());
    Ok(())
}

/// From when on a generation holds all keys; `None` = since ever.
fn since(generation: &dedup::GenerationInfo) -> Option<String> {
    (generation.complete_since.0 > i64::MIN).then(|| generation.complete_since.to_string())
}

/// Reads every page of the newest generation; a damaged file is set aside.
pub fn verify(args: &JobArgs, json: bool) -> Result<(), Stop> {
    let loaded = args.load()?;
    let folder = survey::state_folder(&loaded.job);
    let of_state = |error| stops::state(&folder, error);
    let generations = dedup::list_generations(&folder, None).map_err(of_state)?;
    let Some(newest) = generations.last() else {
        return Err(Stop::new(
            Reason::Usage,
            format!("no dedup state in {}", folder.display()),
            "the next run makes or rebuilds it",
        ));
    };
    let facts = read_all(&folder, &newest.reference, json).map_err(|error| damaged(&folder, error))?;
    if json {
        terminal::print_json(&serde_json::json!({
            "event": "verified", "generation": newest.reference.name, "keys": facts.keys, "segments": facts.segments,
        }));
    } else {
        say!("{}: ok: {} keys in {} segments", newest.reference.name, facts.keys, facts.segments);
    }
    Ok(())
}

/// Reads a generation, behind a bar on a terminal.
fn read_all(folder: &Path, generation: &GenerationRef, json: bool) -> Result<VerifyReport, StoreError> {
    let bar = if json { ProgressBar::hidden() } else { reading_bar() };
    let report = dedup::verify_with_progress(folder, generation, &mut |at| {
        bar.set_length(at.bytes);
        bar.set_position(at.bytes_done);
        bar.set_message(format!("segment {} of {}", at.segments_done + 1, at.segments));
    });
    bar.finish_and_clear();
    report
}

/// A bar over bytes, on standard error; nothing is drawn where that is no terminal.
fn reading_bar() -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{bar:30} {percent:>3}%  {bytes} of {total_bytes}  {msg}  left {eta_precise}",
    )
    .expect("the template is a constant");
    ProgressBar::new(0).with_style(style)
}

/// The stop for a state that can not be read. A damaged file is set aside, so that the next run misses it and rebuilds
/// the state, unless a run holds the folder: then the file stays, and the stop says what to do.
fn damaged(folder: &Path, error: StoreError) -> Stop {
    let StoreError::Corrupt { file, .. } = &error else { return stops::state(folder, error) };
    let path = folder.join(file).display().to_string();
    let way_out = match StateLock::acquire(folder) {
        Ok(_lock) => match dedup::set_aside(folder, file) {
            Ok(()) => None,
            Err(failed) => {
                tracing::warn!(error = %failed, file, "a damaged state file could not be set aside");
                Some(format!("{path} could not be renamed; delete it, then:\n  tidemill run JOB"))
            }
        },
        Err(LockError::Held { .. }) => Some(format!(
            "{path} stays where it is, because a run is using the state folder; nothing was changed. That run, or a later \
             one that meets the damage, ends STORAGE_FAILED.\nWhen it has ended, set the file aside and rebuild the state \
             from the table:\n  tidemill state verify JOB\n  tidemill run JOB"
        )),
        Err(failed) => {
            tracing::warn!(error = %failed, file, "a damaged state file could not be set aside");
            Some(format!(
                "the lock of {} can not be taken; check its permissions, then:\n  tidemill state verify JOB",
                folder.display()
            ))
        }
    };
    let stop = stops::state(folder, error);
    match way_out {
        Some(way_out) => Stop { way_out, ..stop },
        None => stop,
    }
}

/// A number of bytes for people.
fn bytes(count: f64) -> String {
    ByteSize(count as u64).to_string()
}

/// Deletes the state folder of a job, under its lock.
pub fn discard(args: &JobArgs, yes: bool, json: bool) -> Result<(), Stop> {
    let loaded = args.load()?;
    let folder = survey::state_folder(&loaded.job);
    confirm(&format!("delete the dedup state in {}?", folder.display()), yes)?;
    let _lock = StateLock::acquire(&folder).map_err(stops::lock)?;
    crate::crash_point!("state_to_discard");
    std::fs::remove_dir_all(&folder).map_err(|error| {
        Stop::new(
            Reason::StorageFailed,
            format!("{} can not be deleted", folder.display()),
            "check the permissions of the folder",
        )
        .because(error)
    })?;
    crate::crash_point!("state_discarded");
    if json {
        terminal::print_json(&serde_json::json!({ "event": "discarded", "folder": folder }));
    } else {
        say!("deleted {}; go on with: tidemill run {}", folder.display(), args.shown());
    }
    Ok(())
}
