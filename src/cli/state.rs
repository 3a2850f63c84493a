//! `tidemill state`: a look at the local dedup state, and its removal.

use super::{JobArgs, confirm, plan, terminal};
use crate::commit::lock::StateLock;
use crate::dedup;
use crate::pipeline::{stops, survey};
use crate::stop::{Reason, Stop};

/// Lists generations.
pub fn inspect(args: &JobArgs, json: bool) -> Result<(), Stop> {
    let loaded = args.load()?;
    let folder = survey::state_folder(&loaded.job);
    let generations = dedup::list_generations(&folder, None).map_err(|error| stops::state(&folder, error))?;
    if json {
        let listed: Vec<_> = generations
            .iter()
            .map(|found| {
                serde_json::json!({
                    "name": found.reference.name, "checksum": found.reference.checksum, "keys": found.keys,
                    "segment_bytes": found.segment_bytes, "key_spec_hash": found.key_spec_hash,
                })
            })
            .collect();
        terminal::print_json(
            &serde_json::json!({ "event": "state", "folder": folder, "generations": listed }),
        );
        return Ok(());
    }
    if generations.is_empty() {
        println!("no dedup state in {}", folder.display());
        return Ok(());
    }
    let mut table = plan::table(["generation", "keys", "bytes"]);
    for generation in &generations {
        table.add_row([
            generation.reference.name.to_string(),
            generation.keys.to_string(),
            generation.segment_bytes.to_string(),
        ]);
    }
    println!("{}\n{table}", folder.display());
    Ok(())
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
    let facts = dedup::verify(&folder, &newest.reference).map_err(|error| {
        // Set aside, the file is missed by the next run, which then rebuilds the state, as the stop says.
        if let dedup::StoreError::Corrupt { file, .. } = &error
            && let Ok(_lock) = StateLock::acquire(&folder)
            && let Err(error) = dedup::set_aside(&folder, file)
        {
            tracing::warn!(%error, file, "a damaged state file could not be set aside; delete it");
        }
        stops::state(&folder, error)
    })?;
    if json {
        terminal::print_json(&serde_json::json!({
            "event": "verified", "generation": newest.reference.name, "keys": facts.keys, "segments": facts.segments,
        }));
    } else {
        println!("{}: ok: {} keys in {} segments", newest.reference.name, facts.keys, facts.segments);
    }
    Ok(())
}

/// Deletes the state folder of a job, under its lock.
pub fn discard(args: &JobArgs, yes: bool, json: bool) -> Result<(), Stop> {
    let loaded = args.load()?;
    let folder = survey::state_folder(&loaded.job);
    confirm(&format!("delete the dedup state in {}?", folder.display()), yes)?;
    let _lock = StateLock::acquire(&folder).map_err(stops::lock)?;
    std::fs::remove_dir_all(&folder).map_err(|error| {
        Stop::new(
            Reason::StorageFailed,
            format!("{} can not be deleted", folder.display()),
            "check the permissions of the folder",
        )
        .because(error)
    })?;
    if json {
        terminal::print_json(&serde_json::json!({ "event": "discarded", "folder": folder }));
    } else {
        println!("deleted {}; go on with: tidemill run {}", folder.display(), args.shown());
    }
    Ok(())
}
