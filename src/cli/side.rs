//! `tidemill side reread`: rows that a side table is owed are written again.

use super::terminal::print_json;
use super::{JobArgs, RemakeArgs, confirm, run};
use crate::pipeline::{RunOptions, sides};
use crate::stop::Stop;

/// `side`.
#[derive(Debug, clap::Subcommand)]
pub(super) enum SideCommand {
    /// Write the rows of the last batch again whose files were lost before the dead-letter table had them
    ///
    /// For the stop SIDE_FILES_LOST. The records of that batch are read from Kafka once more, and the letters among them that
    /// the table lacks go into new files, which the ledger then names. Nothing is guessed: the job must be the one that wrote the
    /// batch, the broker must hold its offsets, and as many rows must come out as the ledger says. Where that fails, and for
    /// late rows, which depend on the dedup state of that moment, it says why and changes nothing: `accept-loss` goes on
    /// without them.
    Reread(RemakeArgs),
}

impl SideCommand {
    /// The job that the command is about.
    pub(super) fn job(&self) -> JobArgs {
        let Self::Reread(args) = self;
        args.job.clone()
    }

    /// Runs it.
    pub(super) fn run(&self, json: bool) -> Result<(), Stop> {
        let Self::Reread(args) = self;
        let (loaded, job_shown) = (args.job.load()?, args.job.shown());
        let options = RunOptions { job_shown, takeover: args.takeover, ..RunOptions::default() };
        let ask = |question: &str| confirm(question, args.yes);
        let done = run::runtime()?.block_on(async {
            run::listen_for_signals(options.interrupt.clone())?;
            sides::reread(&loaded, &options, &ask).await
        })?;
        if json {
            print_json(&serde_json::json!({
                "event": "side_reread", "table": done.table, "batch": done.batch, "rows": done.rows,
            }));
            return Ok(());
        }
        match &done.table {
            None => println!("nothing to write: every file that a side table is owed is there"),
            Some(table) => {
                println!("wrote {} rows of batch {} for table {table} again", done.rows, done.batch);
            }
        }
        println!("go on with: tidemill run {}", options.job_shown);
        Ok(())
    }
}
