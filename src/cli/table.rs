//! `tidemill table`: what keeps the tables of a job small.

use std::time::Duration;

use clap::Args;

use super::{JobArgs, confirm, run, terminal};
use crate::pipeline::RunOptions;
use crate::pipeline::maintain::{self, Asked, TableDone};
use crate::stop::Stop;

/// `table expire`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ExpireArgs {
    #[command(flatten)]
    pub(super) job: JobArgs,
    /// Snapshots older than this leave, as in `7d`; else as the table's history.expire.max-snapshot-age-ms says
    #[arg(long, value_name = "AGE", value_parser = humantime::parse_duration)]
    older_than: Option<Duration>,
    /// So many of each branch stay whatever their age; else as the table's history.expire.min-snapshots-to-keep says
    #[arg(long, value_name = "N")]
    retain_last: Option<usize>,
    /// Files of failed commits older than this are deleted; else as maintenance.orphans_older_than of the job says
    #[arg(long, value_name = "AGE", value_parser = humantime::parse_duration)]
    orphans_older_than: Option<Duration>,
    /// Show what would leave; change nothing, and ask only the catalog and the warehouse
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Take the table over from another owner, which then ends FENCED
    #[arg(long)]
    takeover: bool,
}

/// Expires snapshots of main and side tables and deletes what nothing names any more.
pub fn expire(args: &ExpireArgs, json: bool) -> Result<(), Stop> {
    let loaded = args.job.load()?;
    let asked = Asked {
        older_than: args.older_than,
        retain_last: args.retain_last,
        orphans_older_than: args.orphans_older_than,
    };
    let runtime = run::runtime()?;
    if args.dry_run {
        let tables = runtime.block_on(maintain::look(&loaded, &asked))?;
        show(&tables, true, json);
        return Ok(());
    }
    let options =
        RunOptions { job_shown: args.job.shown(), takeover: args.takeover, ..RunOptions::default() };
    let ask = |tables: &[TableDone]| {
        let lines: Vec<String> = tables.iter().map(|table| line(table, true)).collect();
        confirm(&format!("{}\ngo on?", lines.join("\n")), args.yes)
    };
    let tables = runtime.block_on(maintain::expire(&loaded, &options, &asked, &ask))?;
    show(&tables, false, json);
    Ok(())
}

fn line(table: &TableDone, would: bool) -> String {
    let would = if would { "would be " } else { "" };
    format!("table {} {would}maintained: {}", table.table, table.done)
}

fn show(tables: &[TableDone], dry_run: bool, json: bool) {
    if json {
        terminal::print_json(
            &serde_json::json!({ "event": "expired", "dry_run": dry_run, "tables": tables }),
        );
        return;
    }
    for table in tables {
        println!("{}", line(table, dry_run));
    }
}
