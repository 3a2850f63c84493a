//! `tidemill savepoint`: moments of a job that can be gone back to.

use std::sync::Arc;

use clap::{Args, Subcommand};

use super::plan::table;
use super::terminal::Terminal;
use super::{JobArgs, confirm, run, terminal};
use crate::pipeline::RunOptions;
use crate::pipeline::commands::{self, Listed, Listing, Restoration};
use crate::stop::Stop;

#[derive(Debug, Subcommand)]
pub(crate) enum SavepointCommand {
    /// Make a savepoint of the last commit: rows, dead letters, offsets and dedup state can be gone back to
    ///
    /// Sets the tag tidemill-savepoint-NAME on every table of the job. What the tag names is kept by every expiry, of this
    /// program and of other engines, and so are the files of the dedup state that belong to it. It costs what was written
    /// before and would be expired or merged away since: drop savepoints that are not needed any more.
    ///
    /// Beside a run in progress that run makes it, after the batch that is being committed; one that waits for records looks
    /// for requests every half minute.
    Create(NamedArgs),
    /// Show the savepoints of a job; asks only the catalog
    List(JobArgs),
    /// Go back to a savepoint: rows, offsets and dedup state in one commit, then the side tables; the next run goes on from there
    ///
    /// Rows that were written after the savepoint leave the tables, whoever wrote them, and the records are read again. The
    /// snapshots before stay until they expire, so other engines can still read them, and can roll the table forward again.
    /// Works from another state folder, on another machine and with other memory: state that is not there is made again.
    Restore {
        #[command(flatten)]
        named: NamedArgs,
        /// Show what would be done; change nothing
        #[arg(long)]
        dry_run: bool,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Drop a savepoint; rows stay as they are
    ///
    /// Beside a run in progress that run does it between two batches.
    Drop {
        #[command(flatten)]
        named: NamedArgs,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

/// A job and the name of a savepoint.
#[derive(Debug, Clone, Args)]
pub(crate) struct NamedArgs {
    #[command(flatten)]
    job: JobArgs,
    /// Name of the savepoint: a-z, 0-9, _, - and .
    #[arg(value_name = "NAME")]
    name: String,
    /// Take the table over from another owner, which then ends FENCED
    #[arg(long)]
    takeover: bool,
}

impl NamedArgs {
    fn options(&self) -> RunOptions {
        RunOptions { job_shown: self.job.shown(), takeover: self.takeover, ..RunOptions::default() }
    }
}

impl SavepointCommand {
    /// The job that the command is about.
    pub(super) fn job(&self) -> JobArgs {
        match self {
            Self::List(job) => job.clone(),
            Self::Create(named) | Self::Restore { named, .. } | Self::Drop { named, .. } => named.job.clone(),
        }
    }

    pub(super) fn run(&self, json: bool) -> Result<(), Stop> {
        match self {
            Self::Create(named) => create(named, json),
            Self::List(job) => list(job, json),
            Self::Restore { named, dry_run, yes } => restore(named, *dry_run, *yes, json),
            Self::Drop { named, yes } => drop_one(named, *yes, json),
        }
    }
}

fn create(named: &NamedArgs, json: bool) -> Result<(), Stop> {
    let (loaded, options) = (named.job.load()?, named.options());
    let mut terminal = Terminal::new(json);
    let made = run::runtime()?.block_on(async {
        run::listen_for_signals(Arc::clone(&options.interrupt))?;
        commands::create_savepoint(&loaded, &options, &named.name, &mut terminal).await
    });
    terminal.clear();
    let made = made?;
    if json {
        terminal::print_json(&serde_json::json!({ "event": "savepoint_created", "savepoint": made }));
        return Ok(());
    }
    println!("savepoint {} of batch {}: {}", made.name, made.batch, tagged(&made));
    println!("go back to it with: tidemill savepoint restore {} {}", options.job_shown, made.name);
    Ok(())
}

/// The tables with the snapshots that are tagged.
fn tagged(listed: &Listed) -> String {
    let tables = listed.tables.iter().map(|(table, snapshot_id)| match snapshot_id {
        Some(snapshot_id) => format!("{table} at snapshot {snapshot_id}"),
        None => format!("{table} has no tag any more"),
    });
    format!("tag {} on {}", listed.tag, tables.collect::<Vec<_>>().join(", "))
}

fn list(job: &JobArgs, json: bool) -> Result<(), Stop> {
    let options = RunOptions { job_shown: job.shown(), ..RunOptions::default() };
    let listing = run::runtime()?.block_on(commands::list_savepoints(&job.load()?, &options))?;
    if json {
        terminal::print_json(&serde_json::json!({
            "event": "savepoints", "table": listing.table, "savepoints": listing.savepoints, "strays": listing.strays,
        }));
        return Ok(());
    }
    show(&listing, &options.job_shown);
    Ok(())
}

fn show(listing: &Listing, job_shown: &str) {
    if listing.savepoints.is_empty() {
        println!("table {} has no savepoint", listing.table);
    } else {
        let mut rows = table([
            "savepoint",
            "made",
            "batch",
            "next offsets",
            "watermark",
            "keys",
            "state here",
            "tables",
        ]);
        for found in &listing.savepoints {
            let offsets = found.next_offsets.iter().map(|(topic, sum)| format!("{topic} {sum}"));
            let tables = found.tables.iter().map(|(table, snapshot_id)| match snapshot_id {
                Some(snapshot_id) => format!("{table} {snapshot_id}"),
                None => format!("{table} NO TAG"),
            });
            rows.add_row([
                found.name.clone(),
                found.made.clone(),
                found.batch.to_string(),
                offsets.collect::<Vec<_>>().join("\n"),
                found.watermark.clone().unwrap_or_default(),
                found.state_keys.to_string(),
                if found.at_home { "yes".to_owned() } else { "no: would be made again".to_owned() },
                tables.collect::<Vec<_>>().join("\n"),
            ]);
        }
        println!("{rows}");
    }
    for stray in &listing.strays {
        println!(
            "a crash left a tag of savepoint {stray} on a side table alone; take it away with: tidemill savepoint \
             drop {job_shown} {stray}"
        );
    }
}

fn restore(named: &NamedArgs, dry_run: bool, yes: bool, json: bool) -> Result<(), Stop> {
    let (loaded, options) = (named.job.load()?, named.options());
    let ask = |question: &str| confirm(question, yes);
    let restoration = run::runtime()?.block_on(async {
        if dry_run {
            return commands::look_at_restore(&loaded, &options, &named.name).await;
        }
        commands::restore_savepoint(&loaded, &options, &named.name, &ask).await
    })?;
    if json {
        let event = "savepoint_restored";
        terminal::print_json(
            &serde_json::json!({ "event": event, "dry_run": dry_run, "restoration": restoration }),
        );
        return Ok(());
    }
    print(&restoration, dry_run);
    if !dry_run {
        println!("go on with: tidemill run {}", options.job_shown);
    }
    Ok(())
}

fn print(restoration: &Restoration, dry_run: bool) {
    let (verb, found) = (if dry_run { "would go" } else { "went" }, &restoration.savepoint);
    println!(
        "{verb} back from batch {} to batch {} (savepoint {} of {}); {}",
        restoration.batch_before,
        found.batch,
        found.name,
        found.made,
        tagged(found)
    );
    for jump in &restoration.jumps {
        println!("  {}", crate::pipeline::describe_jump(jump));
    }
    for note in &restoration.notes {
        println!("note: {note}");
    }
}

fn drop_one(named: &NamedArgs, yes: bool, json: bool) -> Result<(), Stop> {
    let (loaded, options) = (named.job.load()?, named.options());
    let ask = |question: &str| confirm(question, yes);
    let mut terminal = Terminal::new(json);
    let dropped = run::runtime()?.block_on(async {
        run::listen_for_signals(Arc::clone(&options.interrupt))?;
        commands::drop_savepoint(&loaded, &options, &named.name, &ask, &mut terminal).await
    });
    terminal.clear();
    dropped?;
    if json {
        terminal::print_json(&serde_json::json!({ "event": "savepoint_dropped", "name": named.name }));
    } else {
        println!("dropped savepoint {}", named.name);
    }
    Ok(())
}
