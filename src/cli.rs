//! What the user typed: commands, their options, and the exit code.
//!
//! Results go to standard output, logs, progress and errors to standard error. Every command has `--json`.
//! The environment is read in two places only: the options below that name a variable, and `${NAME}` in job files.

mod backfill;
mod cadence;
mod check;
mod dead_letters;
mod demo;
mod generate;
mod offsets;
mod plan;
mod remake;
mod run;
mod savepoint;
mod side;
mod state;
mod table;
mod terminal;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use remake::Remake;

use crate::job::file::{self, LoadedJob};
use crate::pipeline::commands::Adopting;
use crate::stop::{Reason, Stop};

const EXIT_CODES: &str = "\
Exit codes:
  0      done, or nothing to do
  1      unexpected: please report it
  2      wrong command line or job file
  10-19  try again later
         10 busy, 11 Kafka away, 12 catalog away, 13 interrupted, 14 disk,
         15 outcome unknown, 16 table changed under the batch
  20-29  a person decides
         20 fenced, 21 too many dead letters, 22 offsets lost,
         23 topic or cluster changed, 24 table replaced or rolled back,
         25 ledger, 26 schema or key, 27 format too new,
         28 not authorized, 29 files or keys missing

Scheduling: start `tidemill run JOB` as often as you like; a start beside a
run in progress ends with 10 and does nothing.";

/// Kafka topics full of repeats become Iceberg tables where each event stands once.
#[derive(Debug, Parser)]
#[command(name = "tidemill", version, about, after_help = EXIT_CODES, max_term_width = 110)]
struct Cli {
    /// What the log shows: error, warn, info, debug, or a filter such as `tidemill=debug,librdkafka=warn`
    #[arg(long, global = true, env = "TIDEMILL_LOG", default_value = "warn", value_name = "FILTER")]
    log: String,
    /// Print machine-readable JSON, one object a line, instead of text for people
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Drain the topics to their present end and commit, then exit: a scheduler's unit of work; or --continuous
    ///
    /// The end offsets are frozen at the start. Records are taken in bounded microbatches, each one Iceberg commit of
    /// data files, next offsets and dedup state. Killed at any moment, the next run goes on by itself.
    ///
    /// On SIGTERM or Ctrl-C no more is read: the open microbatch is closed and committed with what was read, a commit in
    /// progress is resolved, the table is given back, and the exit code is 13 (0 if a drain was done). A second signal ends
    /// the process at once, with 130; as after any kill nothing is lost, and the next start takes over.
    Run(RunArgs),
    /// Process the records of a time range once more, beside what runs and without moving its offsets
    ///
    /// For events that were refused, filtered or lost before the job was mended. The backfill is a lane of its own in the
    /// ledger: each topic partition is read from the first record of the range to its present end, records with a Kafka
    /// timestamp outside the range are passed over, and what stands in the table already is a repeat. It prints what it would
    /// read and asks. Killed at any moment, it goes on with --resume, or a little with every run of the job. Beside a run in
    /// progress, on any host, that run is asked to read it, live first, and this command watches and takes over when the
    /// run ends.
    Backfill(backfill::BackfillArgs),
    /// List, pause, resume or drop backfills
    #[command(subcommand)]
    Lane(backfill::LaneCommand),
    /// Check a job file; opens no socket and writes nothing
    Check(JobArgs),
    /// Ask broker and catalog, print what a run would read, create and add; commits nothing
    Plan(JobArgs),
    /// Compute what hourly, 5-minute and 10-second batches of a job cost: commits, files, memory
    ///
    /// One job file serves every cadence: a scheduler that starts `run` each hour or every 5 minutes, or `run --continuous`
    /// with [microbatch] max_interval.
    ///
    /// Hourly: 24 commits and at least 24 data files a day, each large; the cheapest to write and to read. Rows are visible up
    /// to an hour late. 5 minutes: 288 of each; what most tables want. 10 seconds: 8,640 commits and files a day; readers open
    /// many small files until an engine compacts them (tidemill does not), and metadata is written that often. Below a
    /// second tidemill is the wrong tool: a commit takes several round trips of the catalog. Read the topic itself then.
    ///
    /// Memory does not depend on the cadence: the job's `memory` holds, and a batch closes early when its new keys fill half
    /// of the dedup share. Nor do repeats: one is found as far back as the window reaches, in whichever batch its first copy
    /// came. After a kill at most one batch is read again, and no row of it stands twice. A batch of repeats alone is kept
    /// open until a heartbeat is due (a third of the lease), and a topic at rest commits nothing but heartbeats.
    Cadence(CadenceArgs),
    /// Show everything that tidemill does with nothing but this program: broker, catalog and warehouse inside
    Demo(demo::DemoArgs),
    /// Send notification events with known repeats and bad records to Kafka; prints the exact truth as JSON
    Generate(generate::GenerateArgs),
    /// Begin again on topics or a cluster that were made anew; keys already seen stay seen
    ///
    /// For the stops TOPIC_CHANGED and CLUSTER_CHANGED. A commit without rows states the old end, the new start and the
    /// reason of every topic partition.
    RebaseOffsets(OffsetsArgs),
    /// Go on after offsets were lost to retention, or files of a side table; the loss is written into the ledger
    ///
    /// For the stops OFFSETS_LOST and SIDE_FILES_LOST. A commit without rows states the old end, the new start and the reason,
    /// or how many rows of which batch a side table does not get. Of late rows given up so the keys stay seen. On a cluster or
    /// topic that was made anew only rows of side tables are given up, and `rebase-offsets` comes after it.
    AcceptLoss(OffsetsArgs),
    /// Look at the dedup state, make it again, or discard it
    #[command(subcommand)]
    State(StateCommand),
    /// Set the watermark of a job
    #[command(subcommand)]
    Watermark(WatermarkCommand),
    /// Make moments of a job that can be gone back to, and go back to them
    #[command(subcommand)]
    Savepoint(savepoint::SavepointCommand),
    /// Keep the tables of a job small
    #[command(subcommand)]
    Table(TableCommand),
    /// Look at refused rows, and decode them again
    #[command(subcommand)]
    DeadLetters(dead_letters::DeadLettersCommand),
    /// Mend what a side table is owed
    #[command(subcommand)]
    Side(side::SideCommand),
    /// Print a completion script
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// The job.
#[derive(Debug, Clone, Args)]
pub(crate) struct JobArgs {
    /// Job file (TOML); `jobs/notifications.toml` explains every field
    #[arg(value_name = "JOB")]
    job: PathBuf,
    /// Set a field of the job: `--set memory="512 MiB"`, `--set source.kafka.start=latest`
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

/// `run`.
#[derive(Debug, Clone, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    job: JobArgs,
    /// Take the table over from an owner elsewhere, which then ends FENCED; in this state folder a live one is always BUSY
    #[arg(long)]
    takeover: bool,
    /// Start on a table that has rows but no ledger; its rows do not count as seen
    #[arg(long)]
    ignore_rows: bool,
    /// Go on from the ledger although history is expired and the rows of its last batch are gone, because others deleted them
    #[arg(long)]
    trust_ledger: bool,
    /// Resolve everything, read and commit nothing
    #[arg(long)]
    dry_run: bool,
    /// Go on when everything is read: commit as records come, until a signal
    ///
    /// A microbatch closes at max_records, max_bytes or max_interval of [microbatch], whichever is first. New topic partitions
    /// are read from their earliest offset. Where Kafka, catalog, warehouse or disk fail it says so once, tries again with
    /// growing pauses and goes on by itself; what a person must decide still ends it.
    #[arg(long)]
    continuous: bool,
    /// End after this many microbatches
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_batches: Option<u64>,
    /// End after this time, as in "10 minutes": the open microbatch is closed and committed; what is left is for the next run
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    max_time: Option<Duration>,
    /// Print at the end where the time went, and what limits the run
    ///
    /// On standard error: for each stage the seconds in which it worked and in which it waited, the processor time of the
    /// process by groups of threads, and one sentence that names the limit. The stages add up to the run. With --json it is an
    /// event of its own.
    #[arg(long)]
    profile: bool,
    /// How long this owner may be silent before others call it dead, for tests of heartbeats
    #[arg(long, hide = true, env = "TIDEMILL_LEASE", value_parser = parse_time)]
    lease: Option<Duration>,
    /// Append the name of each phase to a file as it is reached, for tests that kill
    #[arg(long, hide = true, env = "TIDEMILL_TRACE_PHASES")]
    trace_phases: Option<PathBuf>,
}

/// `cadence`.
#[derive(Debug, Clone, Args)]
pub(crate) struct CadenceArgs {
    #[command(flatten)]
    job: JobArgs,
    /// Records a second
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    rate: Option<u64>,
}

/// `rebase-offsets`, `accept-loss`.
#[derive(Debug, Clone, Args)]
pub(crate) struct OffsetsArgs {
    #[command(flatten)]
    job: JobArgs,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Take the table over from another owner, which then ends FENCED
    #[arg(long)]
    takeover: bool,
}

/// What rows that the job did not write are to the dedup state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RowsOfOthers {
    /// Events of their keys are duplicates
    Seen,
    /// Events of their keys are written beside them
    Unseen,
}

#[derive(Debug, Subcommand)]
enum StateCommand {
    /// List the generations of a job's state folder, or print what any file of it says
    ///
    /// A manifest is printed as JSON, a segment with the facts of its sections. A damaged file is named with the byte that is
    /// wrong. No other file is needed, and nothing is changed.
    Inspect(state::InspectArgs),
    /// Compute disk, memory and speed of a dedup state from keys, window, rate and device
    ///
    /// Arithmetic alone, unless a job is named: then it also shows how a batch would go through the state that is there,
    /// section by section, and measures the device for a tenth of a second if that state is larger than its memory.
    Plan(state::PlanArgs),
    /// Read every page of the newest generation and check it
    Verify(JobArgs),
    /// Check every page of the state; make again what is damaged or missing, from the rows of the table
    ///
    /// A run does this by itself when it meets damage. Buckets that the folder still holds whole are kept: count and digest
    /// of each are compared with the ledger. Only the others are read from the table. Memory is bounded by the job's
    /// `memory`; disk by twice the size of the state.
    Rebuild {
        #[command(flatten)]
        remake: RemakeArgs,
        /// Read everything from the table, whatever the folder holds
        #[arg(long)]
        all: bool,
    },
    /// Let rows that this job did not write count as seen
    ///
    /// For the stop TABLE_NOT_EMPTY: a table with rows and no ledger. The ledger begins at the job's start offsets, and events
    /// of the rows that are there will count as duplicates. On a table with a ledger: rows that others appended come to
    /// count as seen, up to now; give the command again for later ones. Rows without a value in a key column or without
    /// event time have no key and are passed over. There is no way back: every rebuild reads these rows too.
    AdoptRows(RemakeArgs),
    /// Make a lost ledger again from the rows of the table and what the state folder knows of the job
    ///
    /// For the stop LEDGER_LOST, on a table that was copied, registered anew or brought back from a backup. The topics are
    /// read again from where the job began (from their earliest offset with start = "latest", since nobody knows any more where
    /// the end was then, and where the table has no row of a topic partition), as far as the broker has them; what has a row of
    /// this job leaves no second one (but for rows that beyond_window = "side" sets aside as unproven: they are judged anew).
    /// Whether rows that it did not write counted as seen stood in the lost ledger: the command asks for it where there are any.
    Adopt {
        #[command(flatten)]
        remake: RemakeArgs,
        /// Go on after the last record of each topic partition that left a row: faster, and right only if no backfill
        /// read ahead of the live offsets and offsets were never rebased; else what lies between is never read
        #[arg(long)]
        after_last_row: bool,
        /// Whether rows that this job did not write count as seen; to be said where the table has any
        #[arg(long, value_enum)]
        rows_of_others: Option<RowsOfOthers>,
    },
    /// Make the state again under another key, from the rows of the table
    ///
    /// For the stop KEY_SPEC_CHANGED, when the change of key columns, event-time column, repeats, bucket_from or shards is
    /// meant. Rows stay as they are; those that share the new key count as one key from now on.
    Rekey(RemakeArgs),
    /// Let keys stay seen although their rows are deleted: for the erasure of a person's events
    ///
    /// While the state lives, a deleted row stays seen. A state that is lost is rebuilt from the rows that are there, and the
    /// person's event, sent again, would come in. Keys named here stand in a table of their own (the main table's name with
    /// _suppressed, as fingerprints), which every rebuild reads. Name them before you delete the rows: then their event times
    /// are found in the table. Rows are not touched: delete them with your engine.
    Forget {
        #[command(flatten)]
        remake: RemakeArgs,
        /// One JSON object a line with the key columns, as in {"event_id": "e-1"}; with the event-time column too for rows
        /// that are gone already; - reads standard input
        #[arg(long, value_name = "FILE")]
        keys: PathBuf,
    },
    /// Delete a job's local state, so that the job may start anew on a table without ledger
    ///
    /// For the stop LEDGER_LOST. While the table has its ledger this loses nothing: the next run rebuilds the state from
    /// the table.
    Discard {
        #[command(flatten)]
        job: JobArgs,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

/// Commands that make the state again.
#[derive(Debug, Clone, Args)]
pub(crate) struct RemakeArgs {
    #[command(flatten)]
    job: JobArgs,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Take the table over from another owner, which then ends FENCED
    #[arg(long)]
    takeover: bool,
}

#[derive(Debug, Subcommand)]
enum WatermarkCommand {
    /// Set it back after a clock ran ahead, or forward
    ///
    /// The watermark says up to when event time is held to be complete; what lies more than the window behind it leaves the
    /// state. Set back, buckets that left it wrongly are live again: from disk while they are in their grace, else from
    /// the table. The largest event time of each topic partition is capped too, or it would push the watermark again.
    Set {
        #[command(flatten)]
        remake: RemakeArgs,
        /// The new watermark, RFC 3339
        #[arg(long, value_name = "TIME")]
        to: String,
    },
}

#[derive(Debug, Subcommand)]
enum TableCommand {
    /// Let old snapshots of the job's tables go, merge small manifests, delete files that nothing names any more
    ///
    /// A run does this by itself every so many commits (sink.iceberg.maintenance). Rows stay as they are. What a tag, a
    /// branch, a kept snapshot or the ledger needs stays too. Commits as the owner of the table, so it ends BUSY beside a
    /// run in progress. Data files are not compacted.
    Expire(table::ExpireArgs),
}

/// Parses, runs, prints the error chain once, and gives the exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    terminal::start_logging(&cli.log);
    let json = cli.json;
    let job_shown = cli.command.job().map(|job| job.shown());
    let result = match cli.command {
        Command::Run(args) => run::run(&args, json),
        Command::Backfill(args) => backfill::backfill(&args, json),
        Command::Lane(command) => backfill::lane(&command, json),
        Command::Check(args) => check::check(&args, json),
        Command::Plan(args) => plan::plan(&args, json),
        Command::Cadence(args) => cadence::cadence(&args, json),
        Command::Demo(args) => demo::demo(&args, json),
        Command::Generate(args) => generate::generate(&args, json),
        Command::RebaseOffsets(args) => offsets::rebase(&args, json),
        Command::AcceptLoss(args) => offsets::accept_loss(&args, json),
        Command::Savepoint(command) => command.run(json),
        Command::Table(TableCommand::Expire(args)) => table::expire(&args, json),
        Command::DeadLetters(command) => command.run(json),
        Command::Side(command) => command.run(json),
        Command::State(StateCommand::Inspect(args)) => state::inspect(&args, json),
        Command::State(StateCommand::Plan(args)) => state::plan(&args, json),
        Command::State(StateCommand::Verify(args)) => state::verify(&args, json),
        Command::State(StateCommand::Rebuild { remake: args, all }) => {
            remake::remake(&args, &Remake::Rebuild { all }, json)
        }
        Command::State(StateCommand::AdoptRows(args)) => remake::remake(&args, &Remake::AdoptRows, json),
        Command::State(StateCommand::Adopt { remake: args, after_last_row, rows_of_others }) => {
            let others_seen = rows_of_others.map(|others| others == RowsOfOthers::Seen);
            remake::remake(&args, &Remake::Adopt(Adopting { after_last_row, others_seen }), json)
        }
        Command::State(StateCommand::Rekey(args)) => remake::remake(&args, &Remake::Rekey, json),
        Command::State(StateCommand::Forget { remake: args, keys }) => {
            remake::remake(&args, &Remake::Forget { keys }, json)
        }
        Command::Watermark(WatermarkCommand::Set { remake: args, to }) => {
            remake::remake(&args, &Remake::SetWatermark { to }, json)
        }
        Command::State(StateCommand::Discard { job, yes }) => state::discard(&job, yes, json),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "tidemill", &mut std::io::stdout());
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(stop) => {
            let stop = match job_shown {
                Some(job_shown) => stop.for_job(&job_shown),
                None => stop,
            };
            terminal::print_stop(&stop, json);
            ExitCode::from(stop.reason.exit_code())
        }
    }
}

impl Command {
    /// The job that the command is about.
    fn job(&self) -> Option<JobArgs> {
        match self {
            Self::Run(args) => Some(args.job.clone()),
            Self::Backfill(args) => Some(args.job()),
            Self::Lane(command) => Some(command.job()),
            Self::Check(args) | Self::Plan(args) => Some(args.clone()),
            Self::Cadence(args) => Some(args.job.clone()),
            Self::RebaseOffsets(args) | Self::AcceptLoss(args) => Some(args.job.clone()),
            Self::Savepoint(command) => Some(command.job()),
            Self::Table(TableCommand::Expire(args)) => Some(args.job.clone()),
            Self::DeadLetters(command) => Some(command.job().clone()),
            Self::Side(command) => Some(command.job()),
            Self::State(StateCommand::Verify(args)) => Some(args.clone()),
            Self::State(StateCommand::Plan(args)) => args.job(),
            Self::State(StateCommand::Discard { job, .. }) => Some(job.clone()),
            Self::State(
                StateCommand::Rebuild { remake: args, .. }
                | StateCommand::Forget { remake: args, .. }
                | StateCommand::AdoptRows(args)
                | StateCommand::Adopt { remake: args, .. }
                | StateCommand::Rekey(args),
            )
            | Self::Watermark(WatermarkCommand::Set { remake: args, .. }) => Some(args.job.clone()),
            Self::State(StateCommand::Inspect(_))
            | Self::Demo(_)
            | Self::Generate(_)
            | Self::Completions { .. } => None,
        }
    }
}

impl JobArgs {
    /// Reads the job; warnings go to the log.
    fn load(&self) -> Result<LoadedJob, Stop> {
        let environment = |name: &str| std::env::var(name).ok();
        let loaded = file::read(&self.job, &self.sets, &environment).map_err(|errors| {
            let way_out = format!("mend the job file, then: tidemill check {}", self.job.display());
            Stop::new(Reason::Usage, errors.to_string(), way_out)
        })?;
        for warning in &loaded.warnings {
            tracing::warn!("{warning}");
        }
        Ok(loaded)
    }

    /// The job as the user named it, `--set` and all, for commands in messages.
    fn shown(&self) -> String {
        let path = quoted(&self.job.display().to_string());
        self.sets.iter().fold(path, |text, set| format!("{text} --set {}", quoted(set)))
    }
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./=:,@%+".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// A duration in words that is not zero.
fn parse_time(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if time.is_zero() { Err("must not be zero".to_owned()) } else { Ok(time) }
}

/// Asks on a terminal; without one, `--yes` is needed.
fn confirm(question: &str, yes: bool) -> Result<(), Stop> {
    if yes {
        return Ok(());
    }
    let refused =
        |what: &str| Err(Stop::new(Reason::Usage, what.to_owned(), "add --yes to go on without asking"));
    if !std::io::stdin().is_terminal() {
        return refused("nothing was changed: this command asks first, and there is no terminal to ask on");
    }
    eprint!("{question} [y/N] ");
    let mut answer = String::new();
    match std::io::stdin().read_line(&mut answer) {
        Ok(_) if matches!(answer.trim(), "y" | "Y" | "yes") => Ok(()),
        _ => refused("nothing was changed"),
    }
}
