//! `tidemill backfill` and `tidemill lane`: records of a time range once more, beside what runs.

use std::sync::Arc;

use clap::{Args, Subcommand};
use indicatif::{HumanBytes, HumanCount};

use super::terminal::{Terminal, print_json};
use super::{JobArgs, confirm, plan, run};
use crate::commit::request::{Ask, is_lane_name};
use crate::pipeline::backfill::{self, Asked, Plan};
use crate::pipeline::report::{Event, LaneSummary, Phases, Report};
use crate::pipeline::{RunOptions, Wish, requests};
use crate::stop::{Reason, Stop};

/// `backfill`.
#[derive(Debug, Clone, Args)]
pub(crate) struct BackfillArgs {
    #[command(flatten)]
    job: JobArgs,
    /// First Kafka timestamp, RFC 3339: `2026-01-31T14:00:00Z`
    #[arg(long, value_name = "TIME", required_unless_present_any = ["resume", "replace"])]
    from: Option<String>,
    /// First Kafka timestamp after the range; without it, everything up to now
    #[arg(long, value_name = "TIME", requires = "from")]
    to: Option<String>,
    /// Name of the backfill; one with the present time is given by default
    #[arg(long, value_name = "NAME", requires = "from")]
    name: Option<String>,
    /// Read every topic partition from its earliest offset, for brokers that can not tell the first record of a time
    #[arg(long, requires = "from")]
    scan_all: bool,
    /// Go on with a backfill that was begun, until it is done
    #[arg(long, value_name = "NAME", conflicts_with = "from")]
    resume: Option<String>,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Print what would be read, and end
    #[arg(long, requires = "from")]
    dry_run: bool,
    /// End after this many microbatches; the backfill stays registered
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_batches: Option<u64>,
    /// Take the table over from an owner elsewhere, which then ends FENCED
    #[arg(long)]
    takeover: bool,
    /// Refused: deleting and rewriting days in one commit is not built
    #[arg(long, hide = true)]
    replace: bool,
    /// Append the name of each phase to a file as it is reached, for tests that kill
    #[arg(long, hide = true, env = "TIDEMILL_TRACE_PHASES")]
    trace_phases: Option<std::path::PathBuf>,
}

/// `lane`.
#[derive(Debug, Subcommand)]
pub(crate) enum LaneCommand {
    /// Show the backfills that the ledger tells of
    List(JobArgs),
    /// Leave a backfill alone until it is resumed
    Pause(LaneArgs),
    /// Let a backfill have its turns again; `tidemill backfill JOB --resume NAME` stays until it is done
    Resume(LaneArgs),
    /// Forget a backfill; rows that it wrote stay
    Drop(LaneArgs),
}

/// A job and a backfill of it.
#[derive(Debug, Clone, Args)]
pub(crate) struct LaneArgs {
    #[command(flatten)]
    job: JobArgs,
    /// Name of the backfill, as `tidemill lane list` shows it
    #[arg(value_name = "NAME")]
    lane: String,
    /// Take the table over from an owner elsewhere, which then ends FENCED
    #[arg(long)]
    takeover: bool,
}

impl BackfillArgs {
    pub(super) fn job(&self) -> JobArgs {
        self.job.clone()
    }
}

impl LaneCommand {
    pub(super) fn job(&self) -> JobArgs {
        match self {
            Self::List(job) => job.clone(),
            Self::Pause(args) | Self::Resume(args) | Self::Drop(args) => args.job.clone(),
        }
    }
}

fn usage(what: String, way_out: &str) -> Stop {
    Stop::new(Reason::Usage, what, format!("nothing was changed; {way_out}"))
}

fn time_ms(option: &str, text: &str) -> Result<i64, Stop> {
    let time = chrono::DateTime::parse_from_rfc3339(text).map_err(|error| {
        usage(format!("{text:?} is no time"), &format!("write it as in {option} 2026-01-31T14:00:00Z"))
            .because(error)
    })?;
    Ok(time.timestamp_millis())
}

/// What is to be read, as the command line says it.
fn asked(args: &BackfillArgs) -> Result<Option<Asked>, Stop> {
    if args.replace {
        return Err(usage(
            "backfill --replace, which would delete and rewrite days in one commit, is not built".to_owned(),
            "without it, events that are missing are added and those that stand in the table stay as they are",
        ));
    }
    let Some(from) = &args.from else { return Ok(None) };
    let from_ms = time_ms("--from", from)?;
    let to_ms = args.to.as_deref().map(|to| time_ms("--to", to)).transpose()?;
    if to_ms.is_some_and(|to_ms| to_ms <= from_ms) {
        return Err(usage("the range is empty: --to is not after --from".to_owned(), "mend the times"));
    }
    let lane = args
        .name
        .clone()
        .unwrap_or_else(|| chrono::Utc::now().format("backfill-%Y%m%d-%H%M%S-%3f").to_string());
    if !is_lane_name(&lane) {
        return Err(usage(
            format!("{lane:?} is no name of a backfill"),
            "use up to 40 of a-z, 0-9, - and _, and not live",
        ));
    }
    Ok(Some(Asked { lane, from_ms, to_ms, scan_all: args.scan_all }))
}

/// Resolves, asks, and reads until it is done.
pub fn backfill(args: &BackfillArgs, json: bool) -> Result<(), Stop> {
    let asked = asked(args)?;
    let loaded = args.job.load()?;
    let phases = Phases::open(args.trace_phases.as_deref()).map_err(|error| {
        Stop::new(Reason::Usage, "the file of --trace-phases can not be opened", "name another file")
            .because(error)
    })?;
    let runtime = run::runtime_of(&loaded.job)?;
    let wish = match (&asked, &args.resume) {
        (Some(asked), _) => {
            let plan = runtime.block_on(backfill::resolve(&loaded, asked))?;
            if json {
                print_json(&serde_json::json!({ "event": "backfill_plan", "plan": plan }));
            } else {
                print(&plan);
            }
            if args.dry_run || plan.records_at_most == 0 {
                return Ok(());
            }
            confirm(&format!("register backfill {} and read it?", plan.lane), args.yes)?;
            Wish { lane: plan.lane, register: Some(plan.new_lane) }
        }
        (None, Some(lane)) => Wish { lane: lane.clone(), register: None },
        (None, None) => return Err(usage("nothing to read".to_owned(), "name --from TIME or --resume NAME")),
    };
    let options = RunOptions {
        job_shown: args.job.shown(),
        takeover: args.takeover,
        batches_max: args.max_batches,
        backfill: Some(wish),
        phases,
        ..RunOptions::default()
    };
    runtime.block_on(async {
        run::listen_for_signals(Arc::clone(&options.interrupt))?;
        let mut terminal = Terminal::new(json);
        let done = backfill::run(&loaded, &options, &mut terminal).await;
        terminal.clear();
        done.map(|_| ())
    })
}

fn print(plan: &Plan) {
    println!(
        "backfill {} of table {}: records with Kafka timestamp >= {}{}",
        plan.lane,
        plan.table,
        plan.from,
        plan.to.as_ref().map_or_else(String::new, |to| format!(" and < {to}"))
    );
    let mut offsets =
        plan::table(["topic", "partition", "earliest", "read from", "to", "records at most", "bytes about"]);
    for planned in &plan.topic_partitions {
        offsets.add_row([
            planned.topic.clone(),
            planned.partition.to_string(),
            planned.low.to_string(),
            planned.start.to_string(),
            planned.end.to_string(),
            planned.records_at_most.to_string(),
            HumanBytes(planned.bytes_about).to_string(),
        ]);
    }
    println!("{offsets}");
    println!(
        "{} records at most, about {} uncompressed, as the first of each topic partition weigh. Those outside the range are \
         passed over, those that stand in the table are repeats.",
        HumanCount(plan.records_at_most),
        HumanBytes(plan.bytes_about)
    );
    if plan.live_lag > 0 {
        println!("live first: {} offsets are still to be read", HumanCount(plan.live_lag));
    }
    if let Some(since) = &plan.complete_since {
        println!("event times before {since} are beyond the window: their keys are read from the table");
    }
    if plan.records_at_most == 0 {
        println!("nothing to read");
    }
}

/// `lane list | pause | resume | drop`.
pub fn lane(command: &LaneCommand, json: bool) -> Result<(), Stop> {
    let (args, ask): (_, fn(String) -> Ask) = match command {
        LaneCommand::List(job) => return list(job, json),
        LaneCommand::Pause(args) => (args, |lane| Ask::PauseLane { lane }),
        LaneCommand::Resume(args) => (args, |lane| Ask::ResumeLane { lane, letters_ratio_max: None }),
        LaneCommand::Drop(args) => (args, |lane| Ask::DropLane { lane }),
    };
    let loaded = args.job.load()?;
    let options =
        RunOptions { job_shown: args.job.shown(), takeover: args.takeover, ..RunOptions::default() };
    let mut terminal = Terminal::new(json);
    let text = run::runtime()?.block_on(async {
        run::listen_for_signals(Arc::clone(&options.interrupt))?;
        requests::ask(&loaded, &options, &ask(args.lane.clone()), &mut terminal).await
    });
    terminal.clear();
    terminal.event(&Event::Notice { text: text? });
    Ok(())
}

fn list(job: &JobArgs, json: bool) -> Result<(), Stop> {
    let loaded = job.load()?;
    let lanes = run::runtime()?.block_on(backfill::list(&loaded))?;
    if json {
        print_json(&serde_json::json!({ "event": "lanes", "lanes": lanes }));
        return Ok(());
    }
    if lanes.is_empty() {
        println!("no backfills");
        return Ok(());
    }
    let mut table = plan::table([
        "backfill",
        "state",
        "from",
        "to",
        "left",
        "consumed",
        "outside range",
        "written",
        "duplicate",
        "dead letters",
    ]);
    for LaneSummary { lane, state, from, to, left, counts, .. } in lanes {
        table.add_row([
            lane,
            state.to_owned(),
            from,
            to.unwrap_or_else(|| "its end".to_owned()),
            left.to_string(),
            counts.consumed.to_string(),
            counts.outside_range.to_string(),
            counts.written.to_string(),
            counts.duplicate.to_string(),
            (counts.dead_letter + counts.dead_letter_known).to_string(),
        ]);
    }
    println!("{table}");
    Ok(())
}
