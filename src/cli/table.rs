//! `tidemill table`: what keeps the tables of a job small.

use std::time::Duration;

use clap::Args;

use super::{JobArgs, confirm, run, terminal};
use crate::job::ORPHAN_AGE_MIN;
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
    /// Files of failed commits older than this are deleted, at least 1h; else as maintenance.orphans_older_than of the job says
    #[arg(long, value_name = "AGE", value_parser = orphan_age)]
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

/// As in a job file: what is younger may belong to a commit that is under way.
fn orphan_age(text: &str) -> Result<Duration, String> {
    let age = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    match age < ORPHAN_AGE_MIN {
        true => Err("at least 1h is needed: a younger file may be in the making".to_owned()),
        false => Ok(age),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_may_be_in_the_making_is_no_orphan_as_in_a_job_file() {
        assert_eq!(orphan_age("1h"), Ok(Duration::from_secs(3_600)));
        for text in ["0s", "59m", "soon"] {
            orphan_age(text).unwrap_err();
        }
    }
}
