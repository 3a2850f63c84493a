//! `tidemill check`: the job file, without a socket.

use super::{JobArgs, terminal};
use crate::pipeline;
use crate::stop::Stop;

/// Reads and checks a job file.
pub fn check(args: &JobArgs, json: bool) -> Result<(), Stop> {
    let loaded = args.load()?;
    let memory = pipeline::plan_memory(&loaded)?;
    let job = &loaded.job;
    if json {
        let warnings: Vec<String> = loaded.warnings.iter().map(ToString::to_string).collect();
        terminal::print_json(&serde_json::json!({
            "event": "check", "job": job.name, "columns": job.decode.columns.len(), "topics": job.source.topics,
            "table": job.sink.table.join("."), "memory": memory, "job_hash": loaded.resolved_hash,
            "warnings": warnings,
        }));
        return Ok(());
    }
    println!(
        "{}: ok: job {} reads {} topics into {} ({} columns, key {})",
        args.shown(),
        job.name,
        job.source.topics.len(),
        job.sink.table.join("."),
        job.decode.columns.len(),
        job.dedup.key.join(", ")
    );
    Ok(())
}
