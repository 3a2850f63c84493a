//! What the user typed: commands, their options, and the exit code.
//!
//! Results go to standard output, logs, progress and errors to standard error. Every command has `--json`.
//! The environment is read in two places only: the options below that name a variable, and `${NAME}` in job files.

mod check;
mod demo;
mod generate;
mod offsets;
mod plan;
mod run;
mod state;
mod terminal;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::job::file::{self, LoadedJob};
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
    /// Drain the topics to their present end and commit, then exit: a scheduler's unit of work
    ///
    /// The end offsets are frozen at the start. Records are taken in bounded microbatches, each one Iceberg commit of
    /// data files, next offsets and dedup state. Killed at any moment, the next run goes on by itself.
    Run(RunArgs),
    /// Check a job file; opens no socket and writes nothing
    Check(JobArgs),
    /// Ask broker and catalog, print what a run would read, create and add; commits nothing
    Plan(JobArgs),
    /// Show everything that tidemill does with nothing but this program: broker, catalog and warehouse inside
    Demo(demo::DemoArgs),
    /// Send notification events with known repeats and bad records to Kafka; prints the exact truth as JSON
    Generate(generate::GenerateArgs),
    /// Begin again on topics or a cluster that were made anew; keys already seen stay seen
    ///
    /// For the stops TOPIC_CHANGED and CLUSTER_CHANGED. A commit without rows states the old end, the new start and the
    /// reason of every topic partition.
    RebaseOffsets(OffsetsArgs),
    /// Go on after offsets were lost to retention; the lost ranges are written into the ledger
    ///
    /// For the stop OFFSETS_LOST. A commit without rows states the old end, the new start and the reason.
    AcceptLoss(OffsetsArgs),
    /// Look at or discard the local dedup state
    #[command(subcommand)]
    State(StateCommand),
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
    /// Resolve everything, read and commit nothing
    #[arg(long)]
    dry_run: bool,
    /// End after this many microbatches
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_batches: Option<u64>,
    /// Append the name of each phase to a file as it is reached, for tests that kill
    #[arg(long, hide = true, env = "TIDEMILL_TRACE_PHASES")]
    trace_phases: Option<PathBuf>,
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

/// Parses, runs, prints the error chain once, and gives the exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    terminal::start_logging(&cli.log);
    let json = cli.json;
    let job_shown = cli.command.job().map(|job| job.shown());
    let result = match cli.command {
        Command::Run(args) => run::run(&args, json),
        Command::Check(args) => check::check(&args, json),
        Command::Plan(args) => plan::plan(&args, json),
        Command::Demo(args) => demo::demo(&args, json),
        Command::Generate(args) => generate::generate(&args, json),
        Command::RebaseOffsets(args) => offsets::rebase(&args, json),
        Command::AcceptLoss(args) => offsets::accept_loss(&args, json),
        Command::State(StateCommand::Inspect(args)) => state::inspect(&args, json),
        Command::State(StateCommand::Plan(args)) => state::plan(&args, json),
        Command::State(StateCommand::Verify(args)) => state::verify(&args, json),
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
            Self::Check(args) | Self::Plan(args) => Some(args.clone()),
            Self::RebaseOffsets(args) | Self::AcceptLoss(args) => Some(args.job.clone()),
            Self::State(StateCommand::Verify(args)) => Some(args.clone()),
            Self::State(StateCommand::Plan(args)) => args.job(),
            Self::State(StateCommand::Discard { job, .. }) => Some(job.clone()),
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
